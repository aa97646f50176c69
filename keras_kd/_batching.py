"""What is data? Batches of inputs, targets and weights, from arrays, `tf.data` and Keras' own data sets."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Batch = tuple[Any, Any, Any]


def batches(
    data: Any, targets: Any = None, weights: Any = None, *, size: int = 256, role: str = "labels", required: bool = True
) -> Iterator[Batch]:
    """Yields `(x, y, sample_weight)`; what is not there is None.

    Args:
        data: arrays, nested as a model takes them; or an iterable of batches `x`, `(x, y)` or `(x, y, sample_weight)`.
        targets: an entry for each sample, nested as the loss takes them, where `data` are arrays.
        weights: `(samples,)`, where `data` are arrays.
        size: samples in a batch, where `data` are arrays.
        role: name of the argument that `targets` came in, for messages.
        required: whether there must be targets.

    Raises:
        ValueError: for lengths that differ, targets that are missing or given twice, and no samples at all.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1. Received: batch_size={size!r}.")
    data, targets = as_arrays(data), as_arrays(targets)
    nothing = True
    source = _of_arrays(data, targets, weights, size, role) if _are_arrays(data, targets) else _of_iterable(data, targets, role)
    for x, y, w in source:
        if y is None and required:
            raise ValueError(f"`{role}` must be given: with arrays as `{role}=`, with batches as tuples (x, y). Received: none.")
        if _length(x):
            nothing = False
            yield x, y, w
    if nothing:
        raise ValueError("`data` must hold at least one sample. Received: none.")


def count(data: Any, targets: Any = None) -> int | None:
    """Number of samples, None where it would take a pass to know."""
    data = as_arrays(data)
    return _length(data) if _are_arrays(data, targets) else None


def as_arrays(data: Any) -> Any:
    """An array where data are numbers in lists, also of what a dict holds; everything else as it is."""
    if isinstance(data, dict):
        return {key: as_arrays(value) for key, value in data.items()}
    if not isinstance(data, (list, tuple)) or not data:
        return data
    if not isinstance(next(iter(keras.tree.flatten(data)), None), (bool, int, float, str, bytes, np.generic)):
        return data
    array = _as_array(data)
    return data if array.dtype == object else array


def _as_array(data: Any) -> np.ndarray:
    try:
        return np.asarray(data)
    except ValueError:  # lists of other lengths
        return np.empty((), object)


def _are_arrays(data: Any, targets: Any) -> bool:
    if targets is not None or isinstance(data, dict):
        return True
    if isinstance(data, (list, tuple)):
        return bool(data) and all(hasattr(one, "shape") for one in data)
    return hasattr(data, "shape")


def _length(x: Any) -> int:
    shape = tuple(np.shape(keras.tree.flatten(x)[0]))
    if not shape:
        raise ValueError(
            "`data` must be batches, with samples along the first axis. Received: single numbers. Batch the data set first: "
            "`data.batch(256)`."
        )
    return int(shape[0])


def _of_arrays(data: Any, targets: Any, weights: Any, size: int, role: str) -> Iterator[Batch]:
    arrays = [np.asarray(array) for array in keras.tree.flatten(data)]
    if not arrays or any(array.ndim == 0 or array.dtype == object for array in arrays):
        raise ValueError(f"`data` must be arrays of samples, or an iterable of batches. Received: {type(data).__name__}.")
    lengths = {len(array) for array in arrays}
    if len(lengths) > 1:
        raise ValueError(f"All arrays of `data` must be of one length. Received: lengths {sorted(lengths)}.")
    length = lengths.pop()
    wanted = None if targets is None else [_as_array(one) for one in keras.tree.flatten(targets)]
    weight = None if weights is None else np.asarray(weights)
    for one in wanted or ():
        if one.ndim == 0:
            raise ValueError(f"`{role}` must hold one entry for each sample. Received: the single value {one!r}.")
        if len(one) != length:
            raise ValueError(f"`{role}` must hold one entry for each sample. Received: {len(one)} for {length} samples.")
    if weight is not None and weight.shape != (length,):
        raise ValueError(f"`sample_weight` must have shape ({length},). Received: shape {weight.shape}.")
    for start in range(0, length, size):
        part = slice(start, start + size)
        x = keras.tree.pack_sequence_as(data, [array[part] for array in arrays])
        y = None if wanted is None else keras.tree.pack_sequence_as(targets, [one[part] for one in wanted])
        yield x, y, None if weight is None else weight[part]


def _of_iterable(data: Any, targets: Any, role: str) -> Iterator[Batch]:
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise ValueError(f"`data` must be arrays of samples, or an iterable of batches. Received: {type(data).__name__}.")
    if isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("`data` must end. Received: a data set that repeats without end. Use `.take(...)`.")
    # A PyDataset ends by its length, not by an error of its items.
    source = (data[index] for index in range(len(data))) if isinstance(data, keras.utils.PyDataset) else data
    for batch in source:
        parts = batch if isinstance(batch, tuple) else (batch,)
        if not 1 <= len(parts) <= 3:
            raise ValueError(f"Batches must be x, (x, y) or (x, y, sample_weight). Received: a tuple of {len(parts)}.")
        x, y, w = (*parts, None, None)[:3]
        x, y = as_arrays(x), as_arrays(y)
        if not keras.tree.flatten(x) or not all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x)):
            raise ValueError(f"Batches must hold arrays, or tensors. Received: {type(x).__name__}.")
        if y is not None and _length(y) != _length(x):
            raise ValueError(f"`{role}` must hold one entry for each sample. Received: {_length(y)} for {_length(x)} in a batch.")
        yield x, y, w
