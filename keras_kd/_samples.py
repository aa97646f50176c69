"""What inputs does a model take? Random ones, and what the user hands over as arrays of the right order, shapes and types."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd._outputs import shapes_agree


def random_inputs(model: keras.Model) -> Any:
    """Eight seeded samples of the shapes that the model takes.

    Raises:
        ValueError: if these are not known.
    """
    known = _known_inputs(model)
    if known is None:
        raise ValueError(
            f'The input shapes of the subclassed model "{model.name}" are not known. Pass check_data=: a few samples of its inputs.'
        )
    rng = np.random.default_rng(0)
    arrays = []
    for tensor in known:
        shape = (8, *(length or 8 for length in tensor.shape[1:]))
        is_float = keras.backend.is_float_dtype(tensor.dtype)
        arrays.append((rng.normal(size=shape) if is_float else rng.integers(0, 2, shape)).astype(tensor.dtype))
    return _nested_as_in(model, arrays)


def check_inputs(model: keras.Model, data: Any, name: str, *, finite: bool = False) -> Any:
    """Data as arrays, nested and of the types that the model takes.

    Args:
        model: whose inputs they are.
        data: arrays nested as it takes them or by the names of its inputs, or an iterable of batches of them (a `tf.data.Dataset`,
            a generator; a list, if the model's inputs are known).
        name: of the argument.
        finite: whether NaN and infinite numbers are refused.

    Raises:
        TypeError: if they are no numbers, for inputs that are.
        ValueError: if they are no arrays, of other shapes, of uneven lengths, empty or not finite.
    """
    known = _known_inputs(model)
    data = _without_batches(data, name, None if known is None else len(known))
    if isinstance(data, dict) and known is not None:
        data = _by_name(model, data, name)
    arrays = _arrays(data)
    if known is not None and len(known) == 1 and len(arrays) != 1 and isinstance(data, list | tuple):
        arrays = _arrays(_as_array(data))  # a matrix written as lists
    if not arrays or any(array.ndim == 0 or len(array) == 0 for array in arrays) or len(arrays) != len(known or arrays):
        wanted = "" if known is None else f" ({', '.join(tensor.name for tensor in known)})"
        raise ValueError(
            f"`{name}` must be an array of samples, or arrays nested as the model takes them{wanted}, with at least one sample. "
            f"Received: {_described(data)}."
        )
    if len({len(array) for array in arrays}) > 1:
        lengths = ", ".join(str(len(array)) for array in arrays)
        raise ValueError(f"`{name}` must have as many samples in each of its arrays. Received: {lengths} samples.")
    if known is None:
        types = [keras.config.floatx() if array.dtype == "float64" else array.dtype for array in arrays]
        arrays = [_cast(array, kind, name, finite) for array, kind in zip(arrays, types, strict=True)]
        return keras.tree.pack_sequence_as(data, arrays) if keras.tree.is_nested(data) else arrays[0]
    shapes = [tuple(tensor.shape[1:]) for tensor in known]
    arrays = [_of_rank(array, shape) for array, shape in zip(arrays, shapes, strict=True)]
    if not all(shapes_agree(array.shape[1:], shape) for array, shape in zip(arrays, shapes, strict=True)):
        raise ValueError(
            f'`{name}` must have the shapes of the inputs of "{model.name}", {shapes} a sample. Received: '
            f"{[array.shape[1:] for array in arrays]}."
        )
    return _nested_as_in(model, [_cast(array, tensor.dtype, name, finite) for array, tensor in zip(arrays, known, strict=True)])


def count(inputs: Any) -> int:
    """Number of samples."""
    return len(keras.tree.flatten(inputs)[0])


def fixed_batch_size(model: keras.Model) -> int | None:
    """The batch size that a model was built for, if it takes no other."""
    known = _known_inputs(model)
    return None if known is None else known[0].shape[0]


def whole_batches(array: np.ndarray, size: int) -> np.ndarray:
    """An array whose last batch is filled with its last sample."""
    missing = -len(array) % size
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def _known_inputs(model: keras.Model) -> list[Any] | None:
    return getattr(model, "inputs", None) or None


def _nested_as_in(model: keras.Model, arrays: list[np.ndarray]) -> Any:
    struct = getattr(model, "_inputs_struct", None)
    return keras.tree.pack_sequence_as(struct, arrays) if keras.tree.is_nested(struct) else arrays[0]


def _without_batches(data: Any, name: str, number: int | None) -> Any:
    """Batches joined to whole arrays; everything else as it is. `number` is that of the model's inputs, if it is known."""
    if isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f"`{name}` must end. Received: a data set that repeats without end. Use `.take(...)`.")
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable) or hasattr(data, "__array__"):
        return data
    if isinstance(data, list | tuple):
        flat = _arrays(data)
        are_arrays = all(array.ndim for array in flat)
        if number is None or not data or len(flat) == number or not are_arrays or len(flat) != number * len(data):
            return data
    batches = [batch[0] if isinstance(batch, tuple) and batch else batch for batch in data]  # tuples are (x, y), as for `fit`
    parts = [_arrays(batch) for batch in batches]
    if not parts or len({tuple(array.shape[1:] for array in part) for part in parts}) > 1 or any(a.ndim == 0 for a in parts[0]):
        raise ValueError(
            f"`{name}` must be arrays, or hold at least one batch and batches of the same arrays. Received: {len(parts)} batches"
            f"{''.join(f', {_described(batch)}' for batch in batches[:3])}."
        )
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return keras.tree.pack_sequence_as(batches[0], joined) if keras.tree.is_nested(batches[0]) else joined[0]


def _by_name(model: keras.Model, data: dict[Any, Any], name: str) -> Any:
    """The values of a dict in the order of the model's inputs."""
    struct = getattr(model, "_inputs_struct", None)
    names = list(struct) if isinstance(struct, dict) else [tensor.name for tensor in model.inputs]
    missing, others = [key for key in names if key not in data], [str(key) for key in data if key not in names]
    if missing or others:
        problems = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(others)}, which are none"] * bool(others)
        raise ValueError(
            f'`{name}` must have the names of the inputs of "{model.name}": {", ".join(names)}. Received: a dict '
            f"{' and '.join(problems)}."
        )
    return {key: data[key] for key in names} if isinstance(struct, dict) else [data[key] for key in names]


def _as_array(data: Any) -> Any:
    try:
        return np.asarray(data)
    except Exception:  # uneven lists, symbolic tensors, whatever the leaves raise
        return np.empty((), dtype=object)


def _arrays(data: Any) -> list[np.ndarray]:
    """The arrays in nested data; none if there is something else in it."""
    arrays = [_as_array(leaf) for leaf in keras.tree.flatten(data)]
    return [] if any(array.dtype == object for array in arrays) else arrays


def _described(data: Any) -> str:
    leaves = keras.tree.flatten(data)
    parts = [
        f"{type(leaf).__name__} of shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)[:40] for leaf in leaves[:4]
    ]
    more = ", ..." if len(leaves) > 4 else ""
    return f"{type(data).__name__} of {', '.join(parts) or 'nothing'}{more}" if keras.tree.is_nested(data) else parts[0]


def _of_rank(array: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    """A last axis of length one more or less, as Keras adds or takes it itself."""
    if array.ndim == len(shape) and shape[-1:] == (1,):
        return array[..., None]
    return array[..., 0] if array.ndim == len(shape) + 2 and array.shape[-1] == 1 else array


def _cast(array: np.ndarray, dtype: Any, name: str, finite: bool) -> np.ndarray:
    """An array of the type that the model takes; what the type cannot hold is refused."""
    if dtype == "string":
        return array
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"`{name}` must hold numbers. Received: an array of {array.dtype.name}.")
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if finite and not np.all(np.isfinite(cast)):
        raise ValueError(
            f"`{name}` must be finite. Received: an array of {array.dtype.name} with NaN, infinite or too large values."
        )
    if whole and not np.array_equal(cast, array):
        raise ValueError(
            f"`{name}` must hold whole numbers of {np.dtype(dtype).name}, the type of the model's input. Received: "
            f"{array.dtype.name} from {array.min()} to {array.max()}."
        )
    return cast
