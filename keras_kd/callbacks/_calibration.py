"""Which inputs are ranges measured on? Batches of calibration data, checked against the model's inputs."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np


def batches(data: Any, count: int | None, size: int = 32) -> Iterator[Any]:
    """Batches of inputs, as arrays nested as the model takes them; `count` is how many arrays it takes, where that is known."""
    arrays = keras.tree.flatten(data)
    if arrays and count in (None, len(arrays)) and all(hasattr(array, "shape") and hasattr(array, "__array__") for array in arrays):
        data = keras.tree.map_structure(np.asarray, data)  # tensors and data frames, too
        for start in range(0, len(keras.tree.flatten(data)[0]), size):
            yield keras.tree.map_structure(lambda array: array[start : start + size], data)  # noqa: B023
        return
    if isinstance(data, (str, bytes)) or not hasattr(data, "__iter__"):
        raise TypeError(
            "`calibration_data` must be an array, arrays nested as the model takes them, or an iterable of batches. Received: "
            f"{data!r} of type {type(data).__name__}."
        )
    for batch in data:
        yield keras.tree.map_structure(np.asarray, batch[0] if isinstance(batch, tuple) else batch)


def check_batch(batch: Any, specs: list[Any]) -> None:
    """Raises `ValueError` if a batch has other arrays or shapes than the model takes, whose `tf.TensorSpec`s are given."""
    arrays = keras.tree.flatten(batch)
    if len(arrays) != len(specs) or not all(
        spec.shape[1:].is_compatible_with(a.shape[1:]) for a, spec in zip(arrays, specs, strict=True)
    ):
        wanted, received = [tuple(spec.shape) for spec in specs], [array.shape for array in arrays]
        raise ValueError(f"`calibration_data` must have the shapes of the model's inputs, {wanted}. Received: {received}.")
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in arrays):
        raise ValueError("`calibration_data` must be finite. Received: an array with NaN or infinite values.")
