"""How far are the student's relations between samples from the teacher's? Losses that need no equal widths.

Notation: F are features flattened to `(batch, width)`, B samples; subscripts t and s are teacher and student.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_kd._tunable import non_negative, positive
from keras_kd.losses._features import RelationLoss, flat
from keras_kd.losses._math import frobenius_norm, huber, l2_normalized, safe_divide, safe_sqrt


@keras.saving.register_keras_serializable(package="keras_kd")
class RKDLoss(RelationLoss):
    """Relational knowledge distillation: distances between samples, and angles in triples of them.

    ```
    distance_weight * mean_ij h(d_ij^s / mu^s - d_ij^t / mu^t)  +  angle_weight * mean_ijk h(cos_ijk^s - cos_ijk^t)
    ```

    d_ij = |x_i - x_j|_2, mu its mean over entries above 0, cos_ijk the cosine of x_j - x_i and x_k - x_i, h smooth L1 (delta 1).
    Time and memory grow with B^2 * width and B^3.

    Args:
        distance_weight: weight of the distances, not negative.
        angle_weight: weight of the angles, not negative.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ...)`.
        y_pred: student's; the widths may differ.

    Returns:
        A scalar; without reduction, shape `(batch,)`: each row's share.

    Raises:
        ValueError: for a negative weight.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(4, 8))
    >>> round(float(keras_kd.losses.RKDLoss()(x, 3 * x + 1)), 4)  # neither scale nor shift matters
    0.0

    Reference:
        Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019.
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.distance_weight = non_negative("distance_weight", distance_weight)
        self.angle_weight = non_negative("angle_weight", angle_weight)

    def relate(self, teacher: Any, student: Any) -> Any:
        """Returns one value per row."""
        (d_t, e_t), (d_s, e_s) = _pairs(teacher), _pairs(student)
        distance = ops.mean(huber(d_s - d_t), axis=1)
        if self.angle_weight == 0:
            return self.distance_weight * distance
        cos_t, cos_s = (ops.matmul(e, ops.transpose(e, (0, 2, 1))) for e in (e_t, e_s))  # (i, j, k)
        return self.distance_weight * distance + self.angle_weight * ops.mean(huber(cos_s - cos_t), axis=(1, 2))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "distance_weight": self.distance_weight, "angle_weight": self.angle_weight}


def _pairs(x: Any) -> tuple[Any, Any]:
    """Distances by their mean, shape `(i, j)`, and unit vectors from x_i to x_j, shape `(i, j, width)`."""
    difference = ops.expand_dims(x, 0) - ops.expand_dims(x, 1)  # (i, j, width): x_j - x_i
    largest = ops.stop_gradient(ops.max(ops.abs(difference), initial=0.0))
    difference = safe_divide(difference, largest)  # neither result depends on the scale; squares cannot overflow
    distance = safe_sqrt(ops.sum(difference**2, axis=-1))
    above = ops.cast(distance > 0, distance.dtype)
    mean = safe_divide(ops.sum(distance), ops.sum(above))
    unit = safe_divide(difference, ops.expand_dims(distance, -1))
    return safe_divide(distance, mean), unit


@keras.saving.register_keras_serializable(package="keras_kd")
class SPLoss(RelationLoss):
    """Similarity preserving: inputs that are alike for the teacher are alike for the student.

    ```
    G = F F^T with rows divided by their l2 norms;      |G_s - G_t|_F^2 / B^2
    ```

    Args:
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ...)`.
        y_pred: student's; the widths may differ.

    Returns:
        A scalar; without reduction, shape `(batch,)`: each row's share.

    Raises:
        ValueError: for a different number of layers on the two sides.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(4, 2, 2, 8))
    >>> round(float(keras_kd.losses.SPLoss()(x, 3 * x)), 6)
    0.0

    Reference:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019.
    """

    def relate(self, teacher: Any, student: Any) -> Any:
        """Returns one value per row."""
        g_t, g_s = (l2_normalized(_gram(_scaled(x))) for x in (teacher, student))  # (batch, batch)
        return ops.mean((g_s - g_t) ** 2, axis=1)


@keras.saving.register_keras_serializable(package="keras_kd")
class PKTLoss(RelationLoss):
    """Probabilistic knowledge transfer: a sample's neighbours are as likely for the student as for the teacher.

    ```
    K_ij = (cos(x_i, x_j) + 1) / 2,   P_ij = K_ij / sum_j K_ij;     mean_ij P_ij^t log((P_ij^t + eps) / (P_ij^s + eps))
    ```

    Args:
        eps: added to probabilities in the logarithm, above 0.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ...)`.
        y_pred: student's; the widths may differ.

    Returns:
        A scalar; without reduction, shape `(batch,)`: each row's share.

    Raises:
        ValueError: for an eps that is not above 0.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(4, 8))
    >>> abs(round(float(keras_kd.losses.PKTLoss()(x, 3 * x)), 6))
    0.0

    Reference:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, 2018.
    """

    def __init__(self, eps: float = 1e-7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps = positive("eps", eps)

    def relate(self, teacher: Any, student: Any) -> Any:
        """Returns one value per row."""
        p_t, p_s = (_neighbours(l2_normalized(x)) for x in (teacher, student))
        return ops.mean(p_t * ops.log((p_t + self.eps) / (p_s + self.eps)), axis=1)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "eps": self.eps}


def _neighbours(x: Any) -> Any:
    similarity = (_gram(x) + 1) / 2
    return similarity / ops.sum(similarity, axis=1, keepdims=True)  # of a row at least (0 + 1) / 2


@keras.saving.register_keras_serializable(package="keras_kd")
class CorrelationLoss(RelationLoss):
    """Correlation congruence: samples correlate with each other as they do for the teacher.

    ```
    None:       D = |F_s - F_t|,  mean over i < B - 1 of sum_d D_id D_(i+1)d
    "bilinear": |C_s - C_t|_F / B^2,   C = F F^T
    "gaussian": the same with  C = exp(-2 gamma) * sum_{p=0..order} (2 gamma)^p / p! * (F F^T)^p  (elementwise powers)
    ```

    F as given, not normalised: for "gaussian" the paper's features have length 1. A matrix norm is no sum over rows: each row
    returns the whole.

    Args:
        kernel: None, `"bilinear"` or `"gaussian"`. Only None compares widths: where they differ, a `keras_kd.layers.Projector`
            brings the student's to the teacher's, trained with the student.
        gamma: width of the Gaussian, above 0.
        order: of its Taylor series, at least 1.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ...)`.
        y_pred: student's; the widths may differ.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for an unknown kernel, or a gamma or order out of range.

    Example:

    >>> loss = keras_kd.losses.CorrelationLoss()
    >>> float(loss(np.zeros((3, 2)), np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])))  # (1*2*2 + 2*3*2) / 2
    8.0

    Reference:
        Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang: Correlation Congruence for Knowledge Distillation, 2019. The form without a
        kernel is that of RepDistiller (Tian, 2020).
    """

    positions_count = True

    def __init__(self, kernel: str | None = None, gamma: float = 0.4, order: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_projector("auto" if kernel is None else None)
        if kernel not in (None, "bilinear", "gaussian"):
            raise ValueError(f'`kernel` must be None, "bilinear" or "gaussian". Received: kernel={kernel!r}.')
        if isinstance(order, bool) or not isinstance(order, int) or order < 1:
            raise ValueError(f"`order` must be a whole number, at least 1. Received: order={order!r}.")
        self.kernel, self.gamma, self.order = kernel, positive("gamma", gamma), order

    def relate(self, teacher: Any, student: Any) -> Any:
        """Returns one value per row."""
        batch = ops.cast(ops.shape(student)[0], student.dtype)
        if self.kernel is None:
            difference = ops.abs(student - teacher)
            products = ops.sum(difference[:-1] * difference[1:], axis=1)  # (batch - 1,)
            return ops.pad(products, [[0, 1]]) * (batch / ops.maximum(batch - 1, 1))
        norm = frobenius_norm(self._correlation(student) - self._correlation(teacher))
        return ops.ones_like(student[:, 0]) * norm / batch**2

    def _correlation(self, x: Any) -> Any:
        gram = _gram(x)
        if self.kernel == "bilinear":
            return gram
        terms = [(2 * self.gamma) ** p / math.factorial(p) * gram**p for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * sum(terms)

    def _adapter(self, teacher: Any, student: Any) -> Any:
        if self.kernel is not None or teacher[1:] == student[1:]:
            return None
        if None in (*teacher[1:], *student[1:]):
            raise ValueError(
                f"CorrelationLoss without a kernel must know the widths of the features. Received: teacher {teacher}, student "
                f"{student}. Give the models inputs of a fixed size, or pass a kernel."
            )
        return super()._adapter((None, math.prod(teacher[1:])), (None, math.prod(student[1:])))

    def adapt(self, index: int, teacher: Any, student: Any) -> tuple[Any, Any]:
        """Flattens both and brings the student's to the teacher's width where the form needs it."""
        return super().adapt(index, flat(teacher), flat(student))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "kernel": self.kernel, "gamma": self.gamma, "order": self.order}


def _gram(x: Any) -> Any:
    return ops.matmul(x, ops.transpose(x))  # (batch, batch)


def _scaled(x: Any) -> Any:
    return safe_divide(x, ops.stop_gradient(ops.max(ops.abs(x), initial=0.0)))
