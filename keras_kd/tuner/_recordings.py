"""Has the teacher already said what it thinks of these data? One recording for all trials and workers, found by what is in it."""

import hashlib
import inspect
import math
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras_tuner.errors import FatalValueError

from keras_kd.recording import Recording, record_teacher
from keras_kd.recording._fingerprints import _code, teacher_fingerprint
from keras_kd.recording._sources import as_holder

_WAIT = 3600.0  # seconds for another worker's recording
_BATCH = 32  # Keras' own


def bound(model: keras.Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `fit`, by name.

    Raises:
        TypeError: for arguments that `fit` does not have.
    """
    return dict(inspect.signature(model.fit).bind(*args, **kwargs).arguments)


def is_array_data(x: Any) -> bool:
    """Whether it is an array, or arrays nested as a model takes them."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(isinstance(leaf, np.ndarray | tf.Tensor) and len(leaf.shape) > 0 for leaf in leaves)


def steps_per_epoch(call: Mapping[str, Any], *, needed: bool) -> int:
    """How many batches an epoch of a call of `fit` has; 0 if that is neither known nor needed.

    Raises:
        ValueError: if it is needed.
    """
    x = call.get("x")
    if call.get("steps_per_epoch"):
        return int(call["steps_per_epoch"])
    if isinstance(x, tf.data.Dataset):
        count = int(x.cardinality())
        if count > 0:
            return count
    elif is_array_data(x):
        samples = int(keras.tree.flatten(x)[0].shape[0])
        samples = math.floor(samples * (1 - (call.get("validation_split") or 0.0)))
        return max(1, math.ceil(samples / (call.get("batch_size") or _BATCH)))
    elif x is not None and hasattr(x, "__len__"):
        return len(x)
    if not needed:
        return 0
    raise FatalValueError(
        f"A schedule needs the number of batches of an epoch. Received: data of type {type(x).__name__}, of unknown length. "
        "Pass steps_per_epoch= to `search`, or tell a data set by `.apply(tf.data.experimental.assert_cardinality(batches))`."
    )


def split_off_validation(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with `validation_split` carried out, as Keras does it: the last samples."""
    share = call.get("validation_split") or 0.0
    if not share or call.get("validation_data") is not None or not is_array_data(call.get("x")):
        return call
    names = [name for name in ("x", "y", "sample_weight") if call.get(name) is not None]
    length = int(keras.tree.flatten(call["x"])[0].shape[0])
    place = math.floor(length * (1 - share))
    if not 0 < place < length:
        raise FatalValueError(f"`validation_split` must leave samples on both sides. Received: {share} of {length} samples.")
    parts = {name: keras.tree.map_structure(lambda leaf: leaf[:place], call[name]) for name in names}
    held_out = tuple(keras.tree.map_structure(lambda leaf: leaf[place:], call[name]) for name in names)
    rest = {name: value for name, value in call.items() if name != "validation_split"}
    return rest | parts | {"validation_data": held_out}


class Recordings:
    """Recordings of one teacher in a folder, one for each data set (and choice of layers).

    Args:
        teacher: a model, a list of models, or a holder.
        preprocessing: of the teacher's inputs.
        options: of `record_teacher`.
    """

    def __init__(self, teacher: Any, preprocessing: Any, options: Mapping[str, Any]) -> None:
        self.teacher, self.preprocessing, self.options = teacher, preprocessing, dict(options)
        self._known: dict[str, Recording] = {}
        self._warned = False

    def __call__(
        self, call: dict[str, Any], folder: pathlib.Path, layer_names: list[str]
    ) -> tuple[Recording, dict[str, Any]] | None:
        """The recording for a call of `fit`, and that call with its data; None where the teacher must be asked itself.

        Raises:
            ValueError: if the data cannot be recorded.
        """
        call = split_off_validation(call)
        data = self._data(call)
        if data is None:
            return None
        names = [*dict.fromkeys([*self.options.get("layer_names", ()), *layer_names])]
        key = self._key(data, names)
        if key not in self._known:
            try:
                self._known[key] = self._record(data, folder / key, names)
            except (TypeError, ValueError, OSError) as error:
                raise FatalValueError(f"The teacher cannot be recorded on these data: {error} Or pass record=False.") from error
        recording = self._known[key]
        is_dataset = isinstance(call["x"], tf.data.Dataset)
        batch = _length(next(iter(call["x"]))) if is_dataset else call.get("batch_size") or _BATCH
        shuffle = not is_dataset and bool(call.get("shuffle", True))
        rest = {name: value for name, value in call.items() if name not in ("x", "y", "sample_weight", "batch_size", "shuffle")}
        return recording, rest | {"x": recording.dataset(batch, shuffle=shuffle), "shuffle": False}

    def _data(self, call: Mapping[str, Any]) -> Any:
        """What can be recorded of a call; None if nothing."""
        x = call.get("x")
        if isinstance(x, tf.data.Dataset):
            if call.get("steps_per_epoch") or int(x.cardinality()) == tf.data.INFINITE_CARDINALITY:
                return self._live("does not end")
            once, again = (keras.tree.flatten(next(iter(x), ())) for _ in range(2))
            if not all(np.array_equal(one, other) for one, other in zip(once, again, strict=True)):
                return self._live("gives other batches each time, by shuffling or augmenting")
            return x
        if not is_array_data(x):
            return self._live("can be read once only") if x is not None else None
        parts = [x, call.get("y"), call.get("sample_weight")]
        while parts[-1] is None:
            parts.pop()
        return None if any(part is None or not is_array_data(part) for part in parts) else tuple(parts)

    def _live(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The data set {what}, so the teacher is not recorded, and runs in every step of every trial. Pass arrays, or a "
                "data set in one order with record_options={'augment': ...}; record=False says that it is meant so.",
                stacklevel=2,
            )

    def _key(self, data: Any, names: list[str]) -> str:
        """A name for a recording: what teacher, data, layers and options are."""
        found = hashlib.sha256()
        fingerprint = teacher_fingerprint(as_holder(self.teacher, self.preprocessing))
        settings = {name: value for name, value in sorted(self.options.items()) if name not in ("augment", "verbose", "verify")}
        augment = self.options.get("augment")
        found.update(repr((sorted(fingerprint.items()), names, settings, augment and _code(augment))).encode())
        leaves = [data.element_spec, int(data.cardinality()), next(iter(data))] if isinstance(data, tf.data.Dataset) else data
        for leaf in keras.tree.flatten(leaves):
            if isinstance(leaf, np.ndarray | tf.Tensor):
                array = np.asarray(leaf)
                found.update(f"{array.dtype}{array.shape}".encode())
                for begin in range(0, len(array), 4096):  # memory of a part, where the array is on disk
                    found.update(np.ascontiguousarray(array[begin : begin + 4096]).tobytes())
            else:
                found.update(repr(leaf).encode())
        return found.hexdigest()[:16]

    def _record(self, data: Any, path: pathlib.Path, names: list[str]) -> Recording:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"verbose": 0, **self.options, "layer_names": names, "teacher_preprocessing": self.preprocessing}
        end = time.monotonic() + _WAIT
        while True:
            try:
                return record_teacher(self.teacher, data, path, **options)
            except RuntimeError as error:  # another worker is at it
                if "is being recorded by" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.5)


def _length(element: Any) -> int:
    return int(keras.tree.flatten(element)[0].shape[0])
