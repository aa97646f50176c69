"""How far is the student's answer from the teacher's? Losses on logits and probabilities.

Notation: z are logits, of shape `(batch, ..., classes)`; p = softmax(z / T); subscripts t and s are teacher and student. Every
class takes `from_logits`, and turns probabilities into logits (their logs) before anything else.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_kd._mistakes import OF_RESPONSE_LOSSES, refuse_keywords
from keras_kd._outputs import SIGMOID, SOFTMAX, as_logits, convert, shapes_agree
from keras_kd._tunable import Tunable, each, fraction, non_negative, positive
from keras_kd.losses._math import DIVERGENCES, forward_kl, pearson, present_rows, rows, split_target, standardized
from keras_kd.losses.base import DistillationLoss


@keras.saving.register_keras_serializable(package="keras_kd")
class ResponseLoss(DistillationLoss):
    """Base class of the losses that compare final outputs: brings both sides to logits, and finds labels and weights their shape.

    A subclass implements `call` on logits: `y_true` is the teacher's (or a dict, see `DistillationLoss`), `y_pred` the student's,
    and it returns one value per position: shape `(batch,)` for logits of shape `(batch, classes)`, `(batch, time)` for `(batch,
    time, classes)`. `class_targets(labels, z)` turns labels into one-hot rows.

    Args:
        from_logits: True: both outputs are logits; False: both are probabilities; None: found by `Distiller` from the last
            layer of each model, and taken as logits for a bare tensor that does not come out of a softmax or sigmoid layer.
        **kwargs: see `DistillationLoss`.
    """

    activation = SOFTMAX

    def __init__(self, *, from_logits: bool | None = None, **kwargs: Any) -> None:
        refuse_keywords(type(self).__name__, kwargs, OF_RESPONSE_LOSSES)
        super().__init__(**kwargs)
        if from_logits not in (None, True, False):
            raise ValueError(f"`from_logits` must be True, False or None. Received: from_logits={from_logits!r}.")
        self.from_logits = from_logits

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Brings both sides to logits and computes the weighted, reduced loss: see `DistillationLoss`."""
        y_true = self._unpack(y_true)
        y_true["teacher"], y_pred = convert(y_true["teacher"], self.dtype), convert(y_pred, self.dtype)
        if self.from_logits is None and getattr(y_pred, "_keras_logits", None) is not None:
            raise ValueError(
                f"{type(self).__name__} cannot know whether `y_true` holds logits or probabilities, while `y_pred` comes out of a "
                f"softmax or sigmoid layer. Pass from_logits=False if both are probabilities."
            )
        if self.from_logits is False:
            y_true["teacher"], y_pred = as_logits(y_true["teacher"], self.activation), as_logits(y_pred, self.activation)
        self._check_shapes(y_true["teacher"], y_pred)
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            while len(sample_weight.shape) < len(y_pred.shape) - 1:  # one weight per sample, several positions in each
                sample_weight = ops.expand_dims(sample_weight, -1)
        return super().__call__(y_true, y_pred, sample_weight)

    def _check_shapes(self, teacher: Any, student: Any) -> None:
        shapes = tuple(teacher.shape), tuple(student.shape)
        if not shapes_agree(*shapes):
            raise ValueError(
                f"Teacher and student outputs must have the same shape. Received: teacher {shapes[0]}, student {shapes[1]}. Give "
                f"both models the same classes, or compare inner layers by `teacher_layer_name` and `student_layer_name`."
            )
        if self.activation == SOFTMAX and shapes[1][-1] == 1:
            raise ValueError(
                f"{type(self).__name__} compares softmax distributions, and a softmax over a single class is always 1. Received: "
                f'outputs of shape {shapes[1]}. For binary outputs use KDLoss(activation="sigmoid"); for numbers '
                "keras.losses.MeanSquaredError(); where only other outputs are classes, name one of them: output_name=."
            )

    def class_targets(self, labels: Any, z: Any) -> Any:
        """Turns labels into one-hot rows; a row without a label (a negative index, an all-zero row) is all zeros.

        Args:
            labels: class indices of shape `(batch, ...)` or `(batch, ..., 1)`, or one-hot of the shape of `z`.
            z: logits, shape `(batch, ..., classes)`.

        Returns:
            Tensor of the shape and dtype of `z`.
        """
        classes = z.shape[-1]
        if len(labels.shape) == len(z.shape) and labels.shape[-1] in (classes, None):
            known = ops.sum(labels, axis=-1) > 0
            indices = ops.argmax(labels, axis=-1)
        else:
            if len(labels.shape) == len(z.shape) and labels.shape[-1] == 1:
                labels = ops.squeeze(labels, axis=-1)
            if len(labels.shape) != len(z.shape) - 1:
                raise ValueError(
                    f"Labels must be class indices of shape {tuple(z.shape)[:-1]} or one-hot of shape {tuple(z.shape)}. Received: "
                    f"labels of shape {tuple(labels.shape)}."
                )
            # An index beyond the classes is a mistake that must show, as it does in Keras' own losses: NaN.
            known = ops.where(labels >= classes, float("nan"), ops.cast(labels >= 0, self.dtype))
            indices = ops.maximum(ops.cast(labels, "int32"), 0)
        one_hot = ops.one_hot(indices, classes, dtype=self.dtype)
        return one_hot * ops.expand_dims(ops.cast(known, self.dtype), -1)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "from_logits": self.from_logits}


@keras.saving.register_keras_serializable(package="keras_kd")
class KDLoss(ResponseLoss):
    """Knowledge distillation: the student matches the teacher's softened distribution.

    ```
    soft:   T^2 * sum_c p_t (log p_t - log p_s)
    hard:   - log softmax(z_s)[argmax z_t]
    mixed:  T^2 * sum_c q (log q - log p_s),   q = mix * p_t + (1 - mix) * onehot(argmax z_t)
    ```

    `T^2` keeps the size of the gradient when T changes. With `divergence="reverse_kl"` the two distributions change places in
    the sum; `"jensen_shannon"` is the mean of both divergences to their average. Hard targets have no temperature and no
    divergence: they are trained by cross-entropy.

    With `activation="sigmoid"` each output is a distribution of its own over yes and no (binary and multi-label models), and
    the values of all outputs add up.

    Args:
        temperature: T > 0. Readable and assignable: compiled steps follow.
        targets: `"soft"`, `"hard"` or `"mixed"`.
        mix: share of the teacher's distribution in mixed targets, in [0, 1].
        divergence: `"forward_kl"`, `"reverse_kl"` or `"jensen_shannon"`.
        standardize: first z <- (z - mean) / (1e-7 + std) over the classes, std unbiased, so that the student matches the shape of
            the teacher's logits and not their size. The paper uses it with T = 2.
        activation: `"softmax"` or `"sigmoid"`: what turns these logits into probabilities.
        from_logits: see `ResponseLoss`.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `output_name`: see `DistillationLoss`.

    Call arguments:
        y_true: teacher's logits (or probabilities), shape `(batch, classes)` or `(batch, time, classes)`.
        y_pred: student's, the same shape.
        sample_weight: shape `(batch,)` or `(batch, time)`.

    Returns:
        A scalar; without reduction, shape `(batch,)` or `(batch, time)`. Zero for a student that equals its teacher, except for
        hard and mixed targets.

    Raises:
        ValueError: for a temperature that is not above 0, an unknown option, or shapes that do not agree.

    Example:

    >>> loss = keras_kd.losses.KDLoss(temperature=2.0)
    >>> teacher, student = np.array([[4.0, 0.0, -2.0]]), np.array([[1.0, 0.0, 0.5]])
    >>> round(float(loss(teacher, student)), 4)
    1.6507
    >>> float(loss(teacher, teacher))
    0.0

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. Standardization: Sun et al.: Logit
        Standardization in Knowledge Distillation, 2024.
    """

    temperature = Tunable(positive)

    def __init__(
        self,
        temperature: float = 4.0,
        targets: str = "soft",
        *,
        mix: float = 0.5,
        divergence: str = "forward_kl",
        standardize: bool = False,
        activation: str = SOFTMAX,
        from_logits: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        self.temperature = temperature
        self.targets = _one_of("targets", targets, ("soft", "hard", "mixed"))
        self.mix = fraction("mix", mix)
        self.divergence = _one_of("divergence", divergence, tuple(DIVERGENCES))
        self.standardize = standardize
        self.activation = _one_of("activation", activation, (SOFTMAX, SIGMOID))
        if standardize and activation == SIGMOID:
            raise ValueError('`standardize=True` compares logits across classes: it goes with activation="softmax" only.')

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per position, for logits of shape `(batch, ..., classes)`."""
        z_t, z_s = (standardized(y_true), standardized(y_pred)) if self.standardize else (y_true, y_pred)
        if self.targets == "hard":
            return -self._sum(self._hard_targets(z_t) * self._log_probabilities(z_s))
        temperature = Tunable.tensor(self, "temperature")
        log_p_t, log_p_s = self._log_probabilities(z_t / temperature), self._log_probabilities(z_s / temperature)
        if self.targets == "mixed":
            # log q, in logarithms throughout: p_t may be too small for its exponential. 1e30 stands for infinity.
            log_mix, log_rest = (math.log(share) if share > 0 else -1e30 for share in (self.mix, 1 - self.mix))
            hard = self._hard_targets(z_t)
            log_p_t = ops.logaddexp(log_mix + log_p_t, hard * log_rest + (1 - hard) * -1e30)
        return temperature**2 * self._sum(DIVERGENCES[self.divergence](log_p_t, log_p_s))

    def _log_probabilities(self, z: Any) -> Any:
        if self.activation == SOFTMAX:
            return ops.log_softmax(z)  # (batch, ..., classes)
        return ops.stack([ops.log_sigmoid(z), ops.log_sigmoid(-z)], axis=-1)  # (batch, ..., classes, 2)

    def _hard_targets(self, z_t: Any) -> Any:
        if self.activation == SOFTMAX:
            return ops.one_hot(ops.argmax(z_t, axis=-1), z_t.shape[-1], dtype=self.dtype)
        yes = ops.cast(z_t > 0, self.dtype)
        return ops.stack([yes, 1 - yes], axis=-1)

    def _sum(self, terms: Any) -> Any:
        return ops.sum(terms, axis=-1 if self.activation == SOFTMAX else (-2, -1))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("temperature", "targets", "mix", "divergence", "standardize", "activation")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="keras_kd")
class DKDLoss(ResponseLoss):
    """Decoupled knowledge distillation: weights what the teacher says of the true class and of the others apart.

    ```
    T^2 * (alpha * TCKD + beta * NCKD)
    TCKD = KL((p_t,y, 1 - p_t,y) || (p_s,y, 1 - p_s,y))
    NCKD = KL(softmax over the classes without y)
    ```

    Rows without a label (a negative class index) count 0. With two classes NCKD is 0.

    Args:
        alpha: weight of TCKD, not negative.
        beta: weight of NCKD, not negative.
        temperature: T > 0. Readable and assignable: compiled steps follow.
        **kwargs: `from_logits`, `name`, `reduction`, `dtype`, layer names: see `ResponseLoss` and `DistillationLoss`.

    Call arguments:
        y_true: `{"teacher": logits of shape (batch, ..., classes), "labels": class indices or one-hot}`.
        y_pred: student's logits, the teacher's shape.

    Returns:
        A scalar; without reduction, shape `(batch, ...)`.

    Raises:
        ValueError: if labels are missing, for a temperature that is not above 0, or shapes that do not agree.

    Example:

    >>> loss = keras_kd.losses.DKDLoss(temperature=4.0)
    >>> teacher, student = np.array([[4.0, 0.0, -2.0]]), np.array([[1.0, 0.0, 0.5]])
    >>> round(float(loss({"teacher": teacher, "labels": np.array([0])}, student)), 4)
    8.176

    Reference:
        Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, 2022.
    """

    uses_labels = True
    temperature = Tunable(positive)

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = non_negative("alpha", alpha)
        self.beta = non_negative("beta", beta)
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per position, for logits of shape `(batch, ..., classes)`."""
        temperature = Tunable.tensor(self, "temperature")
        y = self.class_targets(y_true["labels"], y_pred)
        log_y_t, log_not_y_t, log_q_t = split_target(y_true["teacher"] / temperature, y)
        log_y_s, log_not_y_s, log_q_s = split_target(y_pred / temperature, y)
        tckd = forward_kl(log_y_t, log_y_s) + forward_kl(log_not_y_t, log_not_y_s)
        nckd = ops.sum((1 - y) * forward_kl(log_q_t, log_q_s), axis=-1)
        return ops.sum(y, axis=-1) * temperature**2 * (self.alpha * tckd + self.beta * nckd)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_kd")
class DISTLoss(ResponseLoss):
    """DIST: the student matches the teacher's relations between classes and between samples, not its exact probabilities.

    ```
    T^2 * (beta * (1 - mean_b rho(p_s, p_t) over classes) + gamma * (1 - mean_c rho(p_s, p_t) over the batch))
    ```

    rho is Pearson's correlation, 0 where one side is constant. The second part belongs to the batch as a whole; each row
    returns its own first part plus the second. Positions of a sequence are rows; masked ones are left out of the correlation.

    Args:
        beta: weight of the relation between classes, not negative.
        gamma: weight of the relation between samples, not negative.
        temperature: T > 0. Readable and assignable: compiled steps follow.
        **kwargs: `from_logits`, `name`, `reduction`, `dtype`, layer names: see `ResponseLoss` and `DistillationLoss`.

    Call arguments:
        y_true: teacher's logits, shape `(batch, ..., classes)`.
        y_pred: student's, the same shape.

    Returns:
        A scalar; without reduction, shape `(batch, ...)`.

    Raises:
        ValueError: for a temperature that is not above 0, or shapes that do not agree.

    Example:

    >>> loss = keras_kd.losses.DISTLoss()
    >>> teacher = np.array([[4.0, 0.0, -2.0], [0.0, 1.0, 3.0]])
    >>> abs(float(loss(teacher, teacher))) < 1e-6
    True
    >>> round(float(loss(teacher, -teacher)), 4)
    3.0439

    Reference:
        Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, 2022.
    """

    uses_mask = True
    temperature = Tunable(positive)

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = non_negative("beta", beta)
        self.gamma = non_negative("gamma", gamma)
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per position, for logits of shape `(batch, ..., classes)`."""
        temperature = Tunable.tensor(self, "temperature")
        p_t = rows(ops.softmax(y_true["teacher"] / temperature))  # (rows, classes)
        p_s = rows(ops.softmax(y_pred / temperature))
        present = present_rows(y_true.get("mask"), p_s)  # (rows, 1)
        inter = 1 - pearson(p_s, p_t, ops.ones_like(p_s), axis=-1)  # (rows,)
        intra = 1 - ops.mean(pearson(p_s, p_t, present, axis=0))
        values = temperature**2 * (self.beta * inter + self.gamma * intra)
        return ops.reshape(values, ops.shape(y_pred)[:-1])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "beta": self.beta, "gamma": self.gamma, "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_kd")
class NKDLoss(ResponseLoss):
    """Normalised knowledge distillation: the teacher weights the true class, and teaches the others among themselves.

    ```
    - p_t,y log p_s,y  -  gamma * T^2 * sum_{i != y} q_t,i log q_s,i
    ```

    p at T = 1; q are softmaxes over the classes without y, at T. Rows without a label (a negative class index) count 0.

    Args:
        gamma: weight of the other classes, not negative.
        temperature: T > 0. Readable and assignable: compiled steps follow.
        **kwargs: `from_logits`, `name`, `reduction`, `dtype`, layer names: see `ResponseLoss` and `DistillationLoss`.

    Call arguments:
        y_true: `{"teacher": logits of shape (batch, ..., classes), "labels": class indices or one-hot}`.
        y_pred: student's logits, the teacher's shape.

    Returns:
        A scalar; without reduction, shape `(batch, ...)`. A cross-entropy: not zero for a student that equals its teacher.

    Raises:
        ValueError: if labels are missing, for a temperature that is not above 0, or shapes that do not agree.

    Example:

    >>> loss = keras_kd.losses.NKDLoss()
    >>> teacher, student = np.array([[4.0, 0.0, -2.0]]), np.array([[1.0, 0.0, 0.5]])
    >>> round(float(loss({"teacher": teacher, "labels": np.array([0])}, student)), 4)
    2.0381

    Reference:
        Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
        Normalized Loss and Customized Soft Labels, 2023.
    """

    uses_labels = True
    temperature = Tunable(positive)

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma = non_negative("gamma", gamma)
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per position, for logits of shape `(batch, ..., classes)`."""
        temperature = Tunable.tensor(self, "temperature")
        z_t, y = y_true["teacher"], self.class_targets(y_true["labels"], y_pred)
        target = ops.sum(y * ops.softmax(z_t) * ops.log_softmax(y_pred), axis=-1)
        log_q_t, log_q_s = split_target(z_t / temperature, y)[2], split_target(y_pred / temperature, y)[2]
        others = ops.sum((1 - y) * ops.exp(log_q_t) * log_q_s, axis=-1)
        return -ops.sum(y, axis=-1) * (target + self.gamma * temperature**2 * others)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "gamma": self.gamma, "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_kd")
class MultiLevelKDLoss(ResponseLoss):
    """Multi-level logit distillation: matches samples, the batch's Gram matrix and the classes' Gram matrix.

    ```
    mean over T of  T^2 * mean_b KL(p_t || p_s)  +  |P_t P_t^T - P_s P_s^T|_F^2 / B  +  |P_t^T P_t - P_s^T P_s|_F^2 / C
    ```

    P is the B x C matrix of probabilities at T. The last part belongs to the batch as a whole: each row returns its own share of
    the first two plus the last. Positions of a sequence are rows; masked ones are left out.

    Args:
        temperatures: the temperatures T > 0. Readable and assignable: compiled steps follow; their number stays.
        **kwargs: `from_logits`, `name`, `reduction`, `dtype`, layer names: see `ResponseLoss` and `DistillationLoss`.

    Call arguments:
        y_true: teacher's logits, shape `(batch, ..., classes)`.
        y_pred: student's, the same shape.

    Returns:
        A scalar; without reduction, shape `(batch, ...)`.

    Raises:
        ValueError: for temperatures that are missing or not above 0, or shapes that do not agree.

    Example:

    >>> loss = keras_kd.losses.MultiLevelKDLoss(temperatures=[1.0, 2.0])
    >>> teacher = np.array([[4.0, 0.0, -2.0], [0.0, 1.0, 3.0]])
    >>> float(loss(teacher, teacher))
    0.0

    Reference:
        Jin, Wang, Lin: Multi-Level Logit Distillation, 2023.
    """

    uses_mask = True
    temperatures = Tunable(each(positive))

    def __init__(self, temperatures: Any = (2, 3, 4, 5, 6), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperatures = temperatures
        if not self.temperatures:
            raise ValueError("`temperatures` must hold at least one number. Received: an empty list.")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per position, for logits of shape `(batch, ..., classes)`."""
        z_t, z_s = rows(y_true["teacher"]), rows(y_pred)
        present = present_rows(y_true.get("mask"), z_s)  # (rows, 1)
        temperatures = Tunable.tensor(self, "temperatures")
        values = [self._level(z_t, z_s, present, temperatures[level]) for level in range(len(self.temperatures))]
        return ops.reshape(sum(values) / len(values), ops.shape(y_pred)[:-1])

    def _level(self, z_t: Any, z_s: Any, present: Any, temperature: Any) -> Any:
        log_p_t, log_p_s = ops.log_softmax(z_t / temperature), ops.log_softmax(z_s / temperature)
        p_t, p_s = present * ops.exp(log_p_t), present * ops.exp(log_p_s)
        instance = temperature**2 * ops.sum(forward_kl(log_p_t, log_p_s), axis=-1)
        batch_gram = ops.matmul(p_t, ops.transpose(p_t)) - ops.matmul(p_s, ops.transpose(p_s))  # (rows, rows)
        class_gram = ops.matmul(ops.transpose(p_t), p_t) - ops.matmul(ops.transpose(p_s), p_s)  # (classes, classes)
        classes = class_gram.shape[0]
        return instance + ops.sum(batch_gram**2, axis=-1) + ops.sum(class_gram**2) / classes

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "temperatures": list(self.temperatures)}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}.")
    return str(value)
