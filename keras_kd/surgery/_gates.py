"""What of a layer's outputs do the next layers see? Where a ReLU follows, what is below 0 need only stay there."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_kd.surgery._rebuild import Rebuilt

_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Gate:
    """A ReLU behind a layer, perhaps after batch normalisation: `clip(scale * z + offset, 0, upper)` is what is seen of z.

    Attributes:
        scale: of each output, not 0.
        offset: of each output.
        upper: where it is cut off, or infinity.
    """

    scale: np.ndarray
    offset: np.ndarray
    upper: float

    def part(self, outputs: slice) -> "Gate":
        """The same for some of the outputs."""
        return Gate(self.scale[outputs], self.offset[outputs], self.upper)

    def missing(self, wanted: np.ndarray, now: np.ndarray) -> np.ndarray:
        """What to add to outputs, nothing where the ReLU hides the difference: both are below 0, or both beyond the upper end."""
        aim, here = wanted * self.scale + self.offset, now * self.scale + self.offset
        aim = np.where(aim > 0, np.where(aim < self.upper, aim, np.maximum(here, self.upper)), np.minimum(here, 0.0))
        return (aim - here) / self.scale


def gate_after(rebuilt: Rebuilt, node: Any, nodes: list[Any], outputs: set[int]) -> Gate | None:
    """The ReLU that alone reads what a call gives, or alone reads the batch normalisation that alone does; None for others.

    Args:
        rebuilt: the old and the new model.
        node: the call, in the old model.
        nodes: all calls of the model around it.
        outputs: `id` of the tensors that this model gives.
    """
    upper = _upper(getattr(node.operation, "activation", keras.activations.linear))
    count = _kept(rebuilt, node)
    if count is None:
        return None
    if upper is not None:
        return Gate(np.ones(count), np.zeros(count), upper)
    if getattr(node.operation, "activation", None) is not keras.activations.linear:
        return None
    reader = _only_reader(node, nodes, outputs)
    scale, offset = np.ones(count), np.zeros(count)
    if reader is not None and isinstance(reader.operation, keras.layers.BatchNormalization):
        record = rebuilt.found.records[id(reader.operation)]
        values = {v.name: rebuilt.slice(record, v).astype("float64") for v in reader.operation.variables}
        if len(values["moving_mean"]) != count:
            return None
        scale = values.get("gamma", 1.0) / np.sqrt(values["moving_variance"] + reader.operation.epsilon)
        offset = values.get("beta", 0.0) - values["moving_mean"] * scale
        reader = _only_reader(reader, nodes, outputs)
    upper = None if reader is None else _upper(reader.operation)
    return None if upper is None or np.any(scale == 0) else Gate(scale, offset, upper)


def _kept(rebuilt: Rebuilt, node: Any) -> int | None:
    """Number of channels that a call gives in the new model, if these are along its last axis or, in images, the first."""
    labels = rebuilt.found.labels[id(node.outputs[0])]
    axes = [axis for axis, one in enumerate(labels) if one is not None]
    first = getattr(node.operation, "data_format", None) == "channels_first"
    expected = 1 if first else len(labels) - 1
    return rebuilt.count(labels[expected]) if axes == [expected] else None  # type: ignore[arg-type]


def _only_reader(node: Any, nodes: list[Any], outputs: set[int]) -> Any:
    given = node.outputs[0]
    readers = [other for other in nodes if any(t is given for t in other.arguments.keras_tensors)]
    return readers[0] if len(readers) == 1 and id(given) not in outputs else None


def _upper(function: Any) -> float | None:
    """Where a ReLU, as a function, a layer or an operation, is cut off; None for everything else."""
    if isinstance(function, keras.layers.Activation):
        return _upper(function.activation)
    if isinstance(function, keras.layers.ReLU):
        plain = not np.any(function.negative_slope) and not np.any(function.threshold)
        return None if not plain else np.inf if function.max_value is None else float(function.max_value)
    if function is keras.activations.relu or type(function).__name__ == "Relu":
        return np.inf
    return 6.0 if function is keras.activations.relu6 or type(function).__name__ == "Relu6" else None


def through_gate(
    gate: Gate,
    rows: tuple[np.ndarray, np.ndarray],
    fit: tuple[np.ndarray, np.ndarray],
    origin: tuple[np.ndarray, np.ndarray],
    l2: float,
    free: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Changes a least squares fit so that it fits what is seen through a ReLU.

    ```
    min over W, b of  sum_i c(z_i, W' a_i + b) + l2 |W - W_0|^2
    c(z, p) = (z - p)^2 where z is seen,  max(p, 0)^2 where it is below 0      (in the ReLU's own scale, before it)
    ```

    This is convex, and no less than what differs behind the ReLU. Each step is a least squares fit to targets without what the ReLU
    hides, so that it never gets worse; all steps share one inverse, and the momentum of Nesterov makes them few. (Zhang et al. 2016
    fit through a ReLU by alternating with free targets.)

    Args:
        gate: of the outputs.
        rows: what is read, `(rows, columns)`, and the outputs wanted, `(rows, outputs)`.
        fit: kernel and bias to start from.
        origin: kernel and bias that the penalty draws to.
        l2: penalty, relative to the mean square of the inputs about their mean, or about 0 where the bias is not free.
        free: whether the bias may change.

    Returns:
        Kernel and bias.
    """
    read, wanted = rows
    count, columns = read.shape
    mean = read.mean(0, dtype="float64") if free else np.zeros(columns)
    centered = read - mean.astype("float32")
    second = np.asarray(centered.T @ centered, "float64") / count
    penalty = l2 * (float(np.trace(second)) / columns or 1.0)
    inverse = np.linalg.inv(second + penalty * np.eye(columns))
    kernel, bias = fit
    former = fit
    for step in range(_STEPS):
        now = read @ kernel.astype("float32") + bias.astype("float32")
        missing = gate.missing(wanted, now)
        slope = np.asarray(centered.T @ missing.astype("float32"), "float64") / count - penalty * (kernel - origin[0])
        change = inverse @ slope
        shift = missing.mean(0) - mean @ change if free else np.zeros_like(bias)
        new = kernel + change, bias + shift
        speed = step / (step + 3)
        kernel, bias = (one + speed * (one - other) for one, other in zip(new, former, strict=True))
        former = new
    return former
