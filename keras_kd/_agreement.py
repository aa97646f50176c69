"""Does a file compute what its model computes? Outputs are compared, each in its own scale."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd._samples import fixed_batch_size, whole_batches

# What rounding of floats leaves of sums that are 0: a scale below which differences mean nothing.
_SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far one list of outputs is from another.

    Attributes:
        difference: the largest absolute difference.
        relative: the largest difference of an output relative to the largest number of that output.
        same: share of rows in which the largest output is the same; 1.0 for single-valued outputs.
    """

    difference: float
    relative: float
    same: float


def compare(expected: list[np.ndarray], found: list[np.ndarray], ranges: Sequence[float] = ()) -> Agreement:
    """Compares outputs, each in its own scale.

    Args:
        expected: outputs of the model.
        found: outputs of the file.
        ranges: widths of the ranges that the file's integers have for each output; they are the scale where they are larger.

    Raises:
        RuntimeError: if there are more outputs of one than of the other, or of other shapes.
    """
    shapes = [[output.shape for output in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"The file gives outputs of shapes {shapes[1]}, the model {shapes[0]}. Nothing was written.")
    difference, relative, same = 0.0, 0.0, 1.0
    for want, got, width in zip(expected, found, ranges or [0.0] * len(expected), strict=True):
        largest = float(np.max(np.abs(want - got), initial=0.0))
        difference = max(difference, largest)
        relative = max(relative, largest / max(_largest(want), float(width), _SMALLEST))
        if want.ndim > 1 and want.shape[-1] > 1:
            same = min(same, float(np.mean(want.argmax(-1) == got.argmax(-1))))
    return Agreement(difference, relative, same)


def check_close(
    expected: list[np.ndarray], found: list[np.ndarray], tolerance: float, name: str, ranges: Sequence[float] = ()
) -> Agreement:
    """Compares a file's outputs with those of its model.

    Args:
        expected: outputs of the model.
        found: outputs of the file.
        tolerance: largest relative difference.
        name: what the data is called in messages.
        ranges: as for `compare`.

    Raises:
        RuntimeError: if they differ by more, or are not finite.
    """
    for outputs, whose in ((expected, "model"), (found, "file")):
        if not all(np.all(np.isfinite(output)) for output in outputs):
            raise RuntimeError(f"The {whose} gives NaN or infinite outputs on {name}. Nothing was written.")
    agreement = compare(expected, found, ranges)
    if not agreement.relative <= tolerance:
        raise RuntimeError(
            f"The file does not compute what the model computes on {name}: the largest difference is {agreement.difference:.3g} "
            f"for outputs of up to {', '.join(f'{_largest(output):.3g}' for output in expected)}, {agreement.relative:.3g} of "
            f"them (tolerance={tolerance:g}), the same class in {agreement.same:.1%}. Nothing was written."
        )
    return agreement


def _largest(output: np.ndarray) -> float:
    return float(np.max(np.abs(output), initial=0.0))


def outputs_of(model: keras.Model, inputs: Any, name: str) -> list[np.ndarray]:
    """What a model gives, flat and in float64.

    Raises:
        ValueError: if it does not take these inputs.
    """
    arrays = keras.tree.flatten(inputs)
    count, size = len(arrays[0]), fixed_batch_size(model)
    if size:
        inputs = keras.tree.map_structure(lambda array: whole_batches(array, size), inputs)
    try:
        outputs = model.predict(inputs, verbose=0, batch_size=size)
    except Exception as error:
        shapes = [array.shape for array in arrays]
        raise ValueError(
            f'{name} must be inputs of "{model.name}", which does not take them. Received: arrays of shapes {shapes}. Nest arrays '
            f"as the model takes them, and join batches. It says: {_reason(error)}"
        ) from error
    return as_floats(output[:count] if size else output for output in keras.tree.flatten(outputs))


def as_floats(outputs: Iterable[Any]) -> list[np.ndarray]:
    """Outputs as arrays of float64."""
    return [np.asarray(output, "float64") for output in outputs]


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    frames = ("Graph execution error", "Exception encountered when calling", "Detected at node", "Arguments received", 'File "')
    return next((line for line in lines if not line.startswith(frames)), type(error).__name__)
