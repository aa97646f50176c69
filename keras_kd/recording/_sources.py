"""What was handed over to be recorded? Data from tf.data or arrays, read batch by batch; a teacher; settings; all with checks."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd.recording._shards import Field, field_of, skeleton
from keras_kd.teachers import Ensemble, FrozenTeacher, check_model

ROLES = ("x", "y", "sample_weight")


class Source:
    """A data set, read batch by batch.

    Args:
        dataset: a batched tf.data.Dataset of `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, or the same in arrays.
        batch_size: for arrays.

    Raises:
        TypeError: for other data.
        ValueError: for data that is infinite, empty or not batched, or whose samples have different shapes.
    """

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.samples: int | None = None
        self.batches: int | None = None
        if isinstance(dataset, tf.data.Dataset):
            self._inspect_dataset()
        else:
            self._inspect_arrays()
        first = next((element for element in self._elements() if len(keras.tree.flatten(element[0])[0])), None)
        if first is None:
            raise ValueError("`dataset` must hold at least one sample. Received: none.")
        self.first_batch_size = len(keras.tree.flatten(first[0])[0])
        self.structure: dict[str, Any] = {role: skeleton(part) for role, part in zip(ROLES, first, strict=False)}
        self.fields: list[Field] = []
        self.field_roles: list[str] = []
        for role, part in zip(ROLES, first, strict=False):
            for name, leaf in named(role, part):
                self.fields.append(field_of(name, leaf.dtype, leaf.shape[1:]))
                self.field_roles.append(role)

    def _inspect_dataset(self) -> None:
        for role, part in zip(ROLES, _parts(self.dataset.element_spec), strict=False):
            for name, spec in named(role, part):
                if not isinstance(spec, tf.TensorSpec):
                    raise TypeError(f"A recording holds dense tensors. Received: {name} as {type(spec).__name__}.")
                if spec.shape.rank == 0:
                    raise ValueError(
                        f"`dataset` must be batched. Received: {name} of shape (). Write "
                        "record_teacher(teacher, dataset.batch(32), ...)."
                    )
                field_of(name, spec.dtype, ())
        cardinality = int(self.dataset.cardinality())
        if cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError("`dataset` must end. Received: an infinite one. Leave out `.repeat()`, or add `.take(batches)`.")
        self.batches = cardinality if cardinality >= 0 else None

    def _inspect_arrays(self) -> None:
        parts = _parts(self.dataset)
        lengths = {}
        for role, part in zip(ROLES, parts, strict=False):
            for name, leaf in named(role, part):
                if not (hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")) or isinstance(leaf, tf.RaggedTensor):
                    raise TypeError(
                        "`dataset` must be a batched tf.data.Dataset, an array, or a tuple (x, y) or (x, y, sample_weight) of "
                        f"arrays. Received: {name} of type {type(leaf).__name__}."
                    )
                lengths[name] = int(leaf.shape[0]) if len(leaf.shape) else 0
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The arrays of `dataset` must have the same number of samples. Received: {lengths}.")
        self.samples = next(iter(lengths.values()))

    @property
    def expected_samples(self) -> int | None:
        """How many samples there are, at most; None if that is not known."""
        return self.samples if self.batches is None else self.batches * self.first_batch_size

    def _elements(self) -> Iterator[tuple[Any, ...]]:
        if self.samples is None:
            yield from map(_parts, self.dataset.prefetch(1))  # the next batch loads while the teacher runs
            return
        for begin in range(0, self.samples, self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield _parts(keras.tree.map_structure(lambda array, batch=batch: _native(array[batch]), self.dataset))

    def __iter__(self) -> Iterator[list[Any]]:
        """Yields the flat leaves of each batch that is not empty, in the order of `fields`."""
        for element in self._elements():
            leaves = [leaf for part in element for leaf in keras.tree.flatten(part)]
            shapes = [tuple(leaf.shape) for leaf in leaves]
            if all(shape[:1] == (0,) for shape in shapes):  # a filter after batching leaves such
                continue
            for field, shape in zip(self.fields, shapes, strict=True):
                if shape[1:] != field.shape:
                    raise ValueError(
                        f"A recording needs samples of one shape. Received: {field.name} of shapes {field.shape} and {shape[1:]}. "
                        "Pad or resize them to one shape in the data set."
                    )
                if shape[0] != shapes[0][0]:
                    raise ValueError(
                        f"Every part of a batch must have the same number of samples. Received: {self.fields[0].name} with "
                        f"{shapes[0][0]}, {field.name} with {shape[0]}. The data set must be batched: `.batch(32)`."
                    )
            yield leaves

    def first(self, count: int) -> list[np.ndarray]:
        """The first `count` samples, or fewer if there are no more, whatever the batches."""
        found: list[list[np.ndarray]] = []
        for leaves in self:
            found.append([as_array(leaf)[:count] for leaf in leaves])
            if sum(len(batch[0]) for batch in found) >= count:
                break
        return [np.concatenate(parts)[:count] for parts in zip(*found, strict=True)]

    def spread(self, count: int) -> list[np.ndarray] | None:
        """`count` samples at equal distances and the last one, or all if there are fewer; None for a tf.data.Dataset."""
        if self.samples is None:
            return None
        chosen = sorted({*(index * self.samples // count for index in range(count)), self.samples - 1})
        leaves = keras.tree.flatten(_parts(self.dataset))
        return [np.concatenate([_native(leaf[index : index + 1]) for index in chosen]) for leaf in leaves]


def as_array(leaf: Any) -> np.ndarray:
    """A tensor or array as a NumPy array."""
    return leaf.numpy() if isinstance(leaf, tf.Tensor) else np.asarray(leaf)


def named(role: str, part: Any) -> Iterator[tuple[str, Any]]:
    """Leaves with a readable name: `x`, `y["digit"]`, `x[0]`."""
    if not keras.tree.is_nested(part):
        yield role, part
        return
    for path, leaf in keras.tree.flatten_with_path(part):
        yield role + "".join(f'["{key}"]' if isinstance(key, str) else f"[{key}]" for key in path), leaf


def _parts(element: Any) -> tuple[Any, ...]:
    """`x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)` as a tuple without trailing Nones."""
    parts = element if isinstance(element, tuple) else (element,)
    while len(parts) > 1 and parts[-1] is None:
        parts = parts[:-1]
    if not 1 <= len(parts) <= 3 or any(part is None for part in parts):
        nothing = ", with None among them" if any(part is None for part in parts) else ""
        raise ValueError(
            f"`dataset` must give x, (x,), (x, y) or (x, y, sample_weight). Received: a tuple of {len(parts)}{nothing}."
        )
    return tuple(parts)


def _native(array: Any) -> np.ndarray:
    """An array in this machine's byte order."""
    array = np.asarray(array)
    if array.dtype.kind in "OSUMmV" and array.dtype.name != "bfloat16":
        raise TypeError(f"A recording holds numbers. Received: an array of dtype {array.dtype}. Turn it into numbers first.")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


# What else was handed over


def as_folder(path: Any) -> pathlib.Path:
    """An absolute path, which may be a folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"`path` must be the path of a folder. Received: path={path!r} of type {type(path).__name__}.")
    folder = pathlib.Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'`path` must be a folder. Received: path="{folder}", a file.')
    return folder


def as_holder(teacher: Any, preprocessing: Any) -> Any:
    """The holder of a model, of a list of models, or the holder itself."""
    if isinstance(teacher, list | tuple):
        return Ensemble(teacher, preprocessing=preprocessing)
    if not isinstance(teacher, keras.Model) and callable(teacher) and hasattr(teacher, "kinds") and hasattr(teacher, "name"):
        if preprocessing is not None:
            raise ValueError("`teacher_preprocessing` is for a Keras model. Received: a holder; give it to the holder itself.")
        return teacher
    check_model(teacher, "teacher")
    if stateful := [layer.name for layer in teacher._flatten_layers() if getattr(layer, "stateful", False)]:
        raise ValueError(
            f"The teacher's layers {', '.join(stateful)} are stateful: what they say depends on the batches before. Rebuild them "
            "with stateful=False."
        )
    if preprocessing is not None and not callable(preprocessing):
        raise TypeError(f"`teacher_preprocessing` must be callable. Received: teacher_preprocessing={preprocessing!r}.")
    return FrozenTeacher(teacher, preprocessing)


def as_names(layer_names: Any) -> list[str]:
    """Names of layers, each once."""
    names = list(layer_names) if isinstance(layer_names, list | tuple) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`layer_names` must be a list of names. Received: layer_names={layer_names!r}.")
    return list(dict.fromkeys(names))


def check_settings(settings: dict[str, Any], augment: Any, batch_size: Any, samples_per_shard: Any) -> None:
    """Raises a `ValueError` or `TypeError` for what is out of range, and makes NumPy's integers Python's."""
    if settings["dtype"] not in ("float16", "float32"):
        raise ValueError(f'`dtype` must be "float16" or "float32". Received: dtype={settings["dtype"]!r}.')
    check_count("top_k", settings["top_k"], none=True)
    check_count("views", settings["views"])
    check_count("batch_size", batch_size)
    check_count("samples_per_shard", samples_per_shard, none=True)
    if not is_int(settings["seed"]):
        raise ValueError(f"`seed` must be an integer. Received: seed={settings['seed']!r}.")
    if augment is not None and not callable(augment):
        raise TypeError(f"`augment` must be a function of x and seed. Received: augment={augment!r}.")
    if augment is None and settings["views"] > 1:
        raise ValueError(
            "Several views need an augmentation: without one they are all the same. "
            f"Received: views={settings['views']}, augment=None."
        )
    for name in ("top_k", "views", "seed"):  # NumPy's integers too, as JSON
        settings[name] = None if settings[name] is None else int(settings[name])


def is_int(value: Any) -> bool:
    """Whether it is an integer, NumPy's too, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(name: str, value: Any, *, none: bool = False) -> None:
    """Raises a `ValueError` for what is no integer of at least 1."""
    if not (none and value is None) and not (is_int(value) and value >= 1):
        raise ValueError(f"`{name}` must be an integer of at least 1{', or None' if none else ''}. Received: {name}={value!r}.")
