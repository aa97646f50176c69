"""How right is a model, and how like another? Counted batch by batch, for several models on the same samples."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_kd._outputs import LOGITS, SIGMOID, SOFTMAX

CLASSES, BINARY, NUMBERS = "classes", "binary", "numbers"


def find_task(outputs: np.ndarray, labels: np.ndarray | None, kind: str | None) -> str:
    """What outputs are taken for, from a first batch.

    Args:
        outputs: `(batch, ..., width)`, of the reference.
        labels: of any shape that losses take; None: there are none.
        kind: "softmax", "sigmoid", "logits" or None, as far as the model tells.

    Returns:
        `"classes"`: the largest output is the answer; `"binary"`: each output says yes or no; `"numbers"`.
    """
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    if labels is None:
        return CLASSES if width > 1 and kind != SIGMOID else BINARY if kind == SIGMOID else NUMBERS
    if width > 1 and labels.shape != outputs.shape:
        return CLASSES if np.array_equal(labels, np.round(labels)) else NUMBERS
    if width > 1 and np.all(labels >= 0) and np.allclose(labels.sum(-1), 1, atol=1e-3):
        return CLASSES
    return BINARY if np.all((labels == 0) | (labels == 1)) else NUMBERS


def find_kind(outputs: np.ndarray, task: str) -> str:
    """Logits or probabilities, from the values of a first batch; sums of bytes that stand for probabilities are far from 1."""
    within = bool(np.all((outputs >= 0) & (outputs <= 1)))
    if task == CLASSES:
        return SOFTMAX if within and np.all(np.abs(outputs.sum(-1) - 1) < 0.5) else LOGITS
    return SIGMOID if within else LOGITS


def shaped_as(labels: np.ndarray, outputs: np.ndarray, task: str) -> np.ndarray:
    """Labels as the scores take them: class numbers without a last axis of one, others in the shape of the outputs.

    Raises:
        ValueError: if they do not fit the outputs.
    """
    if task == CLASSES and labels.shape != outputs.shape:
        labels = labels[..., 0] if labels.shape == (*outputs.shape[:-1], 1) else labels
        width = outputs.shape[-1]
        if labels.shape != outputs.shape[:-1] or np.any((labels < 0) | (labels >= width) | (labels != np.round(labels))):
            raise ValueError(
                f"`labels` must be whole numbers from 0 to {width - 1} for outputs of shape {outputs.shape}, or shares of the "
                f"classes. Received: shape {labels.shape}, from {labels.min():g} to {labels.max():g}."
            )
        return labels.astype("int64")
    if labels.size != outputs.size:
        raise ValueError(f"`labels` must have the shape of the outputs, {outputs.shape}. Received: shape {labels.shape}.")
    return labels.reshape(outputs.shape).astype("float64")


def decisions(outputs: np.ndarray, task: str, kind: str) -> np.ndarray:
    """What a model says: class numbers, or 1 and 0; -1 where it gives NaN, which is no answer."""
    if task == CLASSES:
        return np.where(np.isnan(outputs).any(-1), -1, outputs.argmax(-1))
    said = np.where(np.isnan(outputs), -1, outputs > (0 if kind == LOGITS else 0.5))
    return said[..., 0] if said.ndim > 1 and said.shape[-1] == 1 else said


def _losses(labels: np.ndarray, outputs: np.ndarray, task: str, kind: str) -> np.ndarray:
    if task == NUMBERS:
        return np.square(outputs - labels)
    logits = kind == LOGITS
    if task == BINARY:
        return np.asarray(keras.losses.binary_crossentropy(labels, outputs, from_logits=logits))
    of_classes = (
        keras.losses.sparse_categorical_crossentropy if labels.ndim < outputs.ndim else keras.losses.categorical_crossentropy
    )
    return np.asarray(of_classes(labels, outputs, from_logits=logits))


@dataclasses.dataclass
class Score:
    """What was counted of one model.

    Attributes:
        metrics: by name, metrics of Keras, or functions of labels and outputs.
        kind: of its outputs; None: found on the first batch.
        samples: number of samples.
        decisions: number of decisions; more than samples where there are several for each.
        right: decisions that are the label's.
        same: decisions that are the reference's.
        gained: right here, wrong in the reference.
        lost: wrong here, right in the reference.
        loss: sum over `losses`.
        losses: number of terms in it.
        squares: sum of squared differences from the reference.
        sums: of what functions of `metrics` gave, by name.
    """

    metrics: Mapping[str, Any]
    kind: str | None = None
    samples: int = 0
    decisions: int = 0
    right: int = 0
    same: int = 0
    gained: int = 0
    lost: int = 0
    loss: float = 0.0
    losses: int = 0
    squares: float = 0.0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, outputs: np.ndarray, reference: np.ndarray, reference_kind: str, labels: np.ndarray | None, task: str) -> None:
        """Counts a batch."""
        self.kind = self.kind or find_kind(outputs, task)
        self.samples += len(outputs)
        if labels is not None:
            losses = _losses(labels, outputs, task, self.kind)
            self.loss, self.losses = self.loss + float(losses.sum()), self.losses + losses.size
            self._add_metrics(labels, outputs.astype("float32"))
        if task == NUMBERS:
            self.squares += float(np.square(outputs - reference).sum())
            return
        said, said_there = decisions(outputs, task, self.kind), decisions(reference, task, reference_kind)
        self.decisions += said.size
        self.same += int((said == said_there).sum())
        if labels is not None:
            wanted = labels if labels.ndim < outputs.ndim else decisions(labels, task, SIGMOID)
            right, right_there = said == wanted, said_there == wanted
            self.right += int(right.sum())
            self.gained += int((right & ~right_there).sum())
            self.lost += int((right_there & ~right).sum())

    def _add_metrics(self, labels: np.ndarray, outputs: np.ndarray) -> None:
        for name, metric in self.metrics.items():
            if isinstance(metric, keras.metrics.Metric):
                metric.update_state(labels, outputs)
            else:
                mean = float(np.mean(np.asarray(metric(labels, outputs), "float64")))
                self.sums[name] = self.sums.get(name, 0.0) + mean * len(outputs)

    @property
    def is_one_each(self) -> bool:
        """Whether there is one decision for each sample, so that they can be taken as independent."""
        return self.decisions == self.samples

    def metric(self, name: str) -> float | None:
        """The value of a metric; None if it is not finite."""
        metric = self.metrics[name]
        return finite(float(metric.result()) if isinstance(metric, keras.metrics.Metric) else self.sums[name] / self.samples)


class Spread:
    """Sum of squared differences from the mean of each column, for the R^2 of outputs that are numbers."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, outputs: np.ndarray) -> None:
        """Adds a batch."""
        columns = outputs.reshape(-1, outputs.shape[-1] if outputs.ndim > 1 else 1)
        if not self.count:
            self.shift = columns.mean(0)  # sums of squares far from 0 would lose their digits
        self.count += len(columns)
        self.sum = self.sum + (columns - self.shift).sum(0)
        self.squares = self.squares + np.square(columns - self.shift).sum(0)

    @property
    def value(self) -> float:
        """The sum over all columns."""
        return float((self.squares - np.square(self.sum) / self.count).sum())


def finite(value: float) -> float | None:
    """The number, or None if it is none."""
    return value if math.isfinite(value) else None


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with z = 1.96

    Reference:
        Wilson: Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    z, p = 1.959963984540054, right / count
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def mcnemar(gained: int, lost: int) -> float:
    """P-value of the exact two-sided test that gains and losses are equally likely.

    min(1, 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c))

    Reference:
        McNemar: Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages, 1947.
    """
    count, term, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * tail / 2**count)
