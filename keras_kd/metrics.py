"""How faithful is the student to its teacher, and how far can its confidence be trusted? Keras metrics.

The metrics of the teacher work in `compile(metrics=[...])` of a `keras_kd.Distiller`, which hands them the teacher's outputs, and
alone: `metric.update_state(teacher_outputs, student_outputs)`.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from keras import ops

from keras_kd._outputs import LOGITS, SIGMOID, SOFTMAX, as_logits, convert, shapes_agree
from keras_kd._tunable import at_least_float32, finite_number, positive
from keras_kd.losses._math import forward_kl

Pair = tuple[Any, Any, str | None, str | None]


class _Lesson(threading.local):
    """The outputs of the present step; per thread, since each replica traces its step in a thread of its own."""

    pairs: list[Pair] | None = None  # None: no step is under way


_lesson = _Lesson()


@contextlib.contextmanager
def teaching(pairs: Iterable[Pair] | None) -> Iterator[None]:
    """Hands a step's teacher outputs to the metrics that are updated inside, for custom training steps.

    `keras_kd.Distiller` opens it around its metrics. Inside, `update_state(y_true, y_pred)` of a `TeacherMetric` leaves `y_true`
    (the labels) alone and compares `y_pred` with the teacher's output of the pair whose student output is that very object.

    Args:
        pairs: `(teacher_output, student_output, teacher_kind, student_kind)` per output; a kind is "logits", "softmax",
            "sigmoid" or None (unknown). None, or nothing, means that the step has no outputs of a teacher: the metrics stay as
            they are.

    Example:

    >>> metric, labels = keras_kd.metrics.TeacherAgreement(), np.zeros(2)
    >>> teacher, student = np.array([[4.0, 0.0], [1.0, 3.0]]), np.array([[0.9, 0.1], [0.6, 0.4]])
    >>> with keras_kd.metrics.teaching([(teacher, student, "logits", "softmax")]):
    ...     metric.update_state(labels, student)
    >>> float(metric.result())
    0.5
    """
    before, _lesson.pairs = _lesson.pairs, list(pairs or [])
    try:
        yield
    finally:
        _lesson.pairs = before


@keras.saving.register_keras_serializable(package="keras_kd")
class TeacherMetric(keras.metrics.Mean):
    """Base class of the metrics that compare the student with its teacher: the weighted mean of one value per position.

    A subclass implements `compare(teacher, student)`, on logits. In a Distiller `y_true` is ignored; anywhere else it *is* the
    teacher's output. A Keras mask of `y_pred` is applied, as Keras' own metrics do.

    Args:
        name: name in the logs.
        dtype: dtype of the computation; a half precision is raised to float32. Defaults to `keras.config.floatx()`.
        activation: "softmax" for one class of several, "sigmoid" for yes-or-no outputs, one or several.
        from_logits: True: both outputs are logits; False: both are probabilities; None: found by `Distiller` from the last
            layer of each model, and taken as logits elsewhere.

    Call arguments:
        y_true: the teacher's output, shape `(batch, ..., classes)`; in a Distiller, the labels.
        y_pred: the student's output, shape `(batch, ..., classes)`.
        sample_weight: one weight per sample, or per position.

    Raises:
        ValueError: for an unknown `activation` or `from_logits`, shapes that do not agree, or outputs of which nobody knows
            whether they are logits.

    Example:

    >>> class LargestGap(keras_kd.metrics.TeacherMetric):
    ...     def compare(self, teacher, student):
    ...         return keras.ops.max(keras.ops.abs(teacher - student), axis=-1)
    >>> metric = LargestGap(name="largest_gap")
    >>> float(metric(np.array([[1.0, 2.0]]), np.array([[1.0, 5.0]])))
    3.0
    """

    uses_teacher = True

    def __init__(
        self, name: str = "teacher_metric", dtype: Any = None, *, activation: str = SOFTMAX, from_logits: bool | None = None
    ) -> None:
        super().__init__(name=name, dtype=at_least_float32(dtype))
        if activation not in (SOFTMAX, SIGMOID):
            raise ValueError(f"`activation` must be 'softmax' or 'sigmoid'. Received: activation={activation!r}.")
        if from_logits not in (None, True, False):
            raise ValueError(f"`from_logits` must be True, False or None. Received: from_logits={from_logits!r}.")
        self.activation = activation
        self.from_logits = from_logits

    def compare(self, teacher: Any, student: Any) -> Any:
        """Returns one value per position, shape `(batch, ...)`, for logits of shape `(batch, ..., classes)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement compare(teacher, student), on logits.")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: see the class."""
        pair = _pair(y_true, y_pred)
        if pair is None:
            return
        teacher, student = convert(pair[0], self.dtype), convert(pair[1], self.dtype)
        self._check_shapes(teacher, student)
        weights = _weights(sample_weight, student, self.dtype)
        teacher, student = self._as_logits(teacher, pair[2], "teacher"), self._as_logits(student, pair[3], "student")
        super().update_state(self.compare(teacher, student), sample_weight=weights)

    def _as_logits(self, outputs: Any, kind: str | None, role: str) -> Any:
        if self.from_logits is not None:
            return outputs if self.from_logits else as_logits(outputs, self.activation)
        if kind is None:
            raise ValueError(
                f"{self.name} cannot find out whether the {role} gives logits or probabilities. Pass from_logits=True (logits) or "
                f"from_logits=False (probabilities) to {type(self).__name__}."
            )
        if kind not in (LOGITS, self.activation):
            raise ValueError(
                f"{self.name} compares {self.activation} distributions; the {role} ends in a {kind}. Use "
                f'{type(self).__name__}(activation="{kind}").'
            )
        return as_logits(outputs, kind)

    def _check_shapes(self, teacher: Any, student: Any) -> None:
        shapes = tuple(teacher.shape), tuple(student.shape)
        if len(shapes[1]) < 2 or not shapes_agree(*shapes):
            raise ValueError(
                f"{self.name} compares outputs of one shape, (batch, ..., classes). Received: teacher {shapes[0]}, student "
                f"{shapes[1]}. Outside a keras_kd.Distiller `y_true` must be the teacher's output, not the labels."
            )
        if self.activation == SOFTMAX and shapes[1][-1] == 1:
            raise ValueError(
                f"{self.name} compares classes, and a softmax over one unit says nothing. Received: outputs of shape {shapes[1]}. "
                f'Use {type(self).__name__}(activation="sigmoid").'
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "activation": self.activation, "from_logits": self.from_logits}


@keras.saving.register_keras_serializable(package="keras_kd")
class TeacherAgreement(TeacherMetric):
    """Share of samples, or of positions, where student and teacher decide alike: fidelity, whoever is right.

    ```
    softmax:  mean_b [argmax_i z_s,bi = argmax_i z_t,bi]
    sigmoid:  mean_b mean_i [(p_s,bi > 1/2) = (p_t,bi > 1/2)]
    ```

    Args:
        name: name in the logs.
        dtype: dtype of the computation; a half precision is raised to float32.
        activation: "softmax" for one class of several, "sigmoid" for yes-or-no outputs, one or several.
        from_logits: True, False or None: see `TeacherMetric`. The largest of several needs no telling; it matters with
            "sigmoid", where the threshold is 0 for logits and 1/2 for probabilities.

    Call arguments:
        y_true: the teacher's output, shape `(batch, ..., classes)`; in a Distiller, the labels, which are ignored.
        y_pred: the student's output, shape `(batch, ..., classes)`.
        sample_weight: one weight per sample, or per position.

    Returns:
        `result()`: a scalar in [0, 1].

    Raises:
        ValueError: see `TeacherMetric`.

    Example:

    >>> metric = keras_kd.metrics.TeacherAgreement()
    >>> float(metric(np.array([[4.0, 0.0], [1.0, 3.0]]), np.array([[1.0, 0.0], [2.0, 0.5]])))
    0.5

    Reference:
        Stanton, Izmailov, Kirichenko, Alemi, Wilson: Does Knowledge Distillation Really Work?, 2021.
    """

    def __init__(self, name: str = "teacher_agreement", dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(name, dtype, **kwargs)
        self._direction = "up"

    def compare(self, teacher: Any, student: Any) -> Any:
        """Returns 1 where both decide alike, else 0; for sigmoid the mean over the outputs."""
        if self.activation == SOFTMAX:
            return ops.cast(ops.equal(ops.argmax(teacher, axis=-1), ops.argmax(student, axis=-1)), self.dtype)
        return ops.mean(ops.cast(ops.equal(teacher > 0, student > 0), self.dtype), axis=-1)

    def _as_logits(self, outputs: Any, kind: str | None, role: str) -> Any:
        if self.activation == SOFTMAX:  # the order of classes is that of the logits, whatever the outputs are
            return outputs if kind is None else as_logits(outputs, kind)
        return super()._as_logits(outputs, kind, role)


@keras.saving.register_keras_serializable(package="keras_kd")
class TeacherKL(TeacherMetric):
    """Mean divergence of the student's distribution from the teacher's, in nats.

    ```
    mean_b KL(p_t,b || p_s,b),    p = softmax(z / T)    (sigmoid: summed over the yes-or-no outputs)
    ```

    There is no factor T^2: this measures, and does not train.

    Args:
        temperature: T > 0.
        name: name in the logs.
        dtype: dtype of the computation; a half precision is raised to float32.
        activation: "softmax" for one class of several, "sigmoid" for yes-or-no outputs, one or several.
        from_logits: True, False or None: see `TeacherMetric`.

    Call arguments:
        y_true: the teacher's output, shape `(batch, ..., classes)`; in a Distiller, the labels, which are ignored.
        y_pred: the student's output, shape `(batch, ..., classes)`.
        sample_weight: one weight per sample, or per position.

    Returns:
        `result()`: a scalar, not negative.

    Raises:
        ValueError: for a temperature that is not above 0; see `TeacherMetric`.

    Example:

    >>> metric = keras_kd.metrics.TeacherKL()
    >>> teacher, student = np.array([[4.0, 0.0, -2.0]]), np.array([[1.0, 0.0, 0.5]])
    >>> round(float(metric(teacher, student)), 4)
    0.5925
    """

    def __init__(self, temperature: float = 1.0, name: str = "teacher_kl", dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(name, dtype, **kwargs)
        self.temperature = positive("temperature", temperature)
        self._direction = "down"

    def compare(self, teacher: Any, student: Any) -> Any:
        """Returns KL(teacher || student) per position."""
        z_t, z_s = teacher / self.temperature, student / self.temperature
        if self.activation == SOFTMAX:
            return ops.sum(forward_kl(ops.log_softmax(z_t), ops.log_softmax(z_s)), axis=-1)
        yes, no = forward_kl(ops.log_sigmoid(z_t), ops.log_sigmoid(z_s)), forward_kl(ops.log_sigmoid(-z_t), ops.log_sigmoid(-z_s))
        return ops.sum(yes + no, axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_kd")
class CalibrationError(keras.metrics.Metric):
    """Expected calibration error: by how much confidence and accuracy differ. It compares with labels and needs no teacher.

    ```
    sum_m (n_m / n) |accuracy(m) - confidence(m)|,    bin m: samples whose largest probability is in ((m - 1) / M, m / M]
    ```

    The sums of each bin are kept over all batches, so that the result is that of the whole data set. Rows without a label (a
    negative class index, an all-zero row) are left out.

    Args:
        num_bins: M, the number of bins of equal width, at least 1.
        from_logits: whether `y_pred` holds logits, as in Keras' losses. Probabilities outside [0, 1] give NaN: they are logits.
        name: name in the logs.
        dtype: dtype of the computation; a half precision is raised to float32.

    Call arguments:
        y_true: class indices of shape `(batch, ...)` or `(batch, ..., 1)`, or one-hot of shape `(batch, ..., classes)`.
        y_pred: shape `(batch, ..., classes)`; a single unit is the probability (or logit) of class 1 of two.
        sample_weight: one weight per sample, or per position.

    Returns:
        `result()`: a scalar in [0, 1].

    Raises:
        TypeError: if `num_bins` is no integer.
        ValueError: for `num_bins` below 1, labels whose shape does not fit, or `from_logits=True` on the output of a softmax or
            sigmoid layer.

    Example:

    >>> metric = keras_kd.metrics.CalibrationError()
    >>> round(float(metric(np.array([0, 1]), np.array([[0.9, 0.1], [0.9, 0.1]]))), 3)  # 90 % sure, and right half the time
    0.4

    Reference:
        Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017.
    """

    def __init__(self, num_bins: int = 15, from_logits: bool = False, name: str = "calibration_error", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=at_least_float32(dtype))
        if not isinstance(finite_number("num_bins", num_bins), int):
            raise TypeError(f"`num_bins` must be an integer. Received: num_bins={num_bins!r}.")
        if from_logits not in (True, False):
            raise ValueError(f"`from_logits` must be True or False. Received: from_logits={from_logits!r}.")
        self.num_bins = int(positive("num_bins", num_bins))
        self.from_logits = from_logits
        self._direction = "down"
        self.weights_per_bin, self.confidences, self.hits = (
            self.add_variable((self.num_bins,), "zeros", dtype=self.dtype, name=name) for name in ("weight", "confidence", "hits")
        )

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: see the class."""
        y_pred = convert(y_pred, self.dtype)
        p = self._probabilities(y_pred)  # (batch, ..., classes)
        labels = self._labels(ops.convert_to_tensor(y_true), p)  # (batch, ...)
        confidence, hit = ops.max(p, axis=-1), ops.cast(ops.equal(ops.argmax(p, axis=-1), labels), self.dtype)
        weights = ops.cast(labels >= 0, self.dtype)
        if (given := _weights(sample_weight, y_pred, self.dtype)) is not None:
            weights = weights * given
        # NaN shows what cannot be (logits taken for probabilities, a label beyond the classes), unless it weighs nothing.
        possible = ops.logical_and(ops.min(p, axis=-1) >= 0, confidence <= 1.001)
        wrong = ops.logical_or(ops.logical_not(possible), labels >= p.shape[-1])
        hit = ops.where(wrong, float("nan"), hit)
        seen, confidence = ops.not_equal(weights, 0), ops.where(possible, confidence, 0.0)
        bins = ops.clip(ops.ceil(confidence * self.num_bins) - 1, 0, self.num_bins - 1)
        self.weights_per_bin.assign_add(self._per_bin(weights, bins))
        self.confidences.assign_add(self._per_bin(weights * confidence, bins))
        self.hits.assign_add(self._per_bin(ops.where(seen, weights * hit, 0.0), bins))

    def _per_bin(self, values: Any, bins: Any) -> Any:
        flat, indices = ops.reshape(values, (-1,)), ops.cast(ops.reshape(bins, (-1,)), "int32")
        return ops.segment_sum(flat, indices, num_segments=self.num_bins)

    def _probabilities(self, y_pred: Any) -> Any:
        if self.from_logits and getattr(y_pred, "_keras_logits", None) is not None:
            raise ValueError(
                f"{self.name} got from_logits=True, and `y_pred` comes out of a softmax or sigmoid layer. Leave from_logits=False."
            )
        if len(y_pred.shape) < 2:
            raise ValueError(f"`y_pred` must have the shape (batch, ..., classes). Received: {tuple(y_pred.shape)} in {self.name}.")
        if y_pred.shape[-1] == 1:
            p = ops.sigmoid(y_pred) if self.from_logits else y_pred
            return ops.concatenate([1 - p, p], axis=-1)
        return ops.softmax(y_pred) if self.from_logits else y_pred

    def _labels(self, labels: Any, p: Any) -> Any:
        if len(labels.shape) == len(p.shape) and labels.shape[-1] == p.shape[-1]:
            labels = ops.cast(labels, self.dtype)
            return ops.where(ops.any(labels > 0, axis=-1), ops.argmax(labels, axis=-1), -1)
        if len(labels.shape) == len(p.shape) and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, axis=-1)
        if len(labels.shape) != len(p.shape) - 1:
            raise ValueError(
                f"`y_true` must be class indices of shape {tuple(p.shape)[:-1]} or one-hot of shape {tuple(p.shape)}. Received: "
                f"labels of shape {tuple(labels.shape)} in {self.name}."
            )
        return ops.cast(labels, "int32")

    def result(self) -> Any:
        """Returns the calibration error of all batches since the last reset."""
        gaps = ops.sum(ops.abs(self.hits - self.confidences))
        return ops.divide_no_nan(gaps, ops.sum(self.weights_per_bin))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_bins": self.num_bins, "from_logits": self.from_logits}


def _pair(y_true: Any, y_pred: Any) -> Pair | None:
    """Finds the teacher's output that belongs to `y_pred`; None if the step has none."""
    pairs = _lesson.pairs
    if pairs is None:  # standalone: y_true is the teacher's output
        if getattr(y_pred, "_keras_logits", None) is not None:
            return y_true, y_pred, None, None
        return y_true, y_pred, LOGITS, LOGITS
    if len(pairs) == 1:
        return pairs[0][0], y_pred, *pairs[0][2:]
    found = next((pair for pair in pairs if pair[1] is y_pred), None)
    if pairs and found is None:
        raise ValueError(
            f"`y_pred` is none of the {len(pairs)} student outputs of this step. Hand update_state the very tensor that `teaching` "
            "got, not a copy of it."
        )
    return found


def _weights(sample_weight: Any, y_pred: Any, dtype: str) -> Any:
    """Sample weights times the Keras mask of `y_pred`, with as many axes as there are positions; None without either."""
    factors = [sample_weight, getattr(y_pred, "_keras_mask", None)]
    factors = [ops.cast(ops.convert_to_tensor(factor), dtype) for factor in factors if factor is not None]
    for index, factor in enumerate(factors):
        while len(factor.shape) < len(y_pred.shape) - 1:  # one weight per sample, several positions in each
            factor = ops.expand_dims(factor, -1)
        if len(factor.shape) == len(y_pred.shape) and factor.shape[-1] == 1:
            factor = ops.squeeze(factor, axis=-1)
        factors[index] = factor
    if not factors:
        return None
    return factors[0] if len(factors) == 1 else factors[0] * factors[1]
