"""How far are the student's inner features from the teacher's? Losses that compare layer with layer.

Notation: F are features of shape `(batch, positions..., channels)`: B samples, H x W positions, D channels; subscripts t and s are
teacher and student. Every class takes the name of one layer, or lists of names, whose values add up.
"""

import itertools
import math
from typing import Any

import keras
from keras import ops

from keras_kd._tunable import non_negative, positive
from keras_kd.layers.projectors import pooled_to
from keras_kd.losses._features import FeatureLoss, flat
from keras_kd.losses._math import channels_first, l2_normalized, safe_sqrt

_MAPS = (3, 4, 5)


@keras.saving.register_keras_serializable(package="keras_kd")
class HintLoss(FeatureLoss):
    """Hint (FitNets): the student's feature, projected to the teacher's width, equals the teacher's.

    ```
    mean over positions and channels of (r(F_s) - F_t)^2
    ```

    The larger map is average-pooled to the size of the smaller; r is the projector, trained with the student.

    Args:
        projector: `"auto"`: none where the shapes agree or `teacher_channels` are given, else a `keras_kd.layers.Projector` (1x1
            convolution and batch normalisation for maps, a dense layer for vectors); a Keras layer; or None, for features of the
            same shape.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for features of different rank, or of different shape without a projector.
        TypeError: for a projector that is no layer.

    Example:

    >>> loss = keras_kd.losses.HintLoss()
    >>> float(loss(np.zeros((2, 4, 4, 3)), np.full((2, 4, 4, 3), 2.0)))
    4.0

    Reference:
        Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, 2015.
    """

    positions = "mean"

    def __init__(self, projector: Any = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projector = self.use_projector(projector)

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per position and channel."""
        return ops.square(student - teacher)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "projector": _serialized(self.projector)}


@keras.saving.register_keras_serializable(package="keras_kd")
class AttentionTransferLoss(FeatureLoss):
    """Attention transfer: the student looks where the teacher looks.

    ```
    Q = vec(mean_d |F_d|^power) / |vec(mean_d |F_d|^power)|_2
    "mean":   mean over B * H * W of (Q_s - Q_t)^2
    "paper":  sum_b |Q_s - Q_t|_2 / B,  with sum_d in place of mean_d (the normalised Q is the same)
    ```

    Widths may differ; the larger map is average-pooled to the size of the smaller first.

    Args:
        power: exponent of the activations, above 0.
        form: `"mean"` or `"paper"`.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's map, shape `(batch, positions..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for features that are no maps, a power that is not above 0, or an unknown form.

    Example:

    >>> loss = keras_kd.losses.AttentionTransferLoss()
    >>> teacher, student = np.ones((1, 2, 2, 8)), np.zeros((1, 2, 2, 3))
    >>> student[0, 0, 0] = 1.0
    >>> float(loss(teacher, student))  # ((1 - 1/2)^2 + 3 * (1/2)^2) / 4
    0.25

    Reference:
        Zagoruyko, Komodakis: Paying More Attention to Attention, 2017. The form "mean" is that of RepDistiller (Tian, 2020).
    """

    ranks = _MAPS
    equal_widths = False

    def __init__(self, power: float = 2, form: str = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.power = positive("power", power)
        if form not in ("mean", "paper"):
            raise ValueError(f'`form` must be "mean" or "paper". Received: form={form!r}.')
        self.form = form

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per sample."""
        difference = self._attention(student) - self._attention(teacher)  # (batch, positions)
        squares = difference**2
        return ops.mean(squares, axis=-1) if self.form == "mean" else safe_sqrt(ops.sum(squares, axis=-1))

    def _attention(self, feature: Any) -> Any:
        size = ops.abs(feature)
        if self.power != 2 and self.power < 1:  # a power below 1 has no slope at 0
            size = ops.where(size > 0, size, ops.ones_like(size)) ** self.power * ops.cast(size > 0, size.dtype)
        else:
            size = size**self.power
        attention = ops.mean(size, axis=-1)
        return l2_normalized(flat(attention))  # (batch, positions)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "power": self.power, "form": self.form}


@keras.saving.register_keras_serializable(package="keras_kd")
class NSTLoss(FeatureLoss):
    """Neuron selectivity transfer: channels of the student fire on the same regions as channels of the teacher.

    The maximum mean discrepancy of the channels' activation patterns, with a polynomial kernel:

    ```
    f = F[..., c] / |F[..., c]|_2 over positions
    mean k(f_t, f_t') + mean k(f_s, f_s') - 2 mean k(f_s, f_t),   k(a, b) = (a . b)^2,   means over pairs of channels
    ```

    Widths may differ; the larger map is average-pooled to the size of the smaller first.

    Args:
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's map, shape `(batch, positions..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for features that are no maps.

    Example:

    >>> maps = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    >>> round(float(keras_kd.losses.NSTLoss()(maps, maps)), 6)
    0.0

    Reference:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    """

    ranks = _MAPS
    equal_widths = False

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per sample."""
        t, s = (l2_normalized(channels_first(feature)) for feature in (teacher, student))
        return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _kernel(a: Any, b: Any) -> Any:
    products = ops.matmul(a, ops.transpose(b, (0, 2, 1)))  # (batch, channels of a, channels of b)
    return ops.mean(products**2, axis=(1, 2))


@keras.saving.register_keras_serializable(package="keras_kd")
class FactorTransferLoss(FeatureLoss):
    """Factor transfer: compares normalised factors of the maps.

    ```
    Q = vec(mean_d F_d^p1) / |vec(mean_d F_d^p1)|_2,     mean over positions of |Q_s - Q_t|^p2
    ```

    The form of RepDistiller, which takes the maps themselves for factors. Widths may differ; the larger map is average-pooled to
    the size of the smaller first.

    Args:
        p1: exponent of the activations, a whole number above 0 (activations may be negative).
        p2: exponent of the difference, above 0.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's map, shape `(batch, positions..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for features that are no maps, or exponents that are not above 0.

    Example:

    >>> loss = keras_kd.losses.FactorTransferLoss()
    >>> teacher, student = np.ones((1, 2, 2, 8)), np.zeros((1, 2, 2, 3))
    >>> student[0, 0, 0] = 1.0
    >>> float(loss(teacher, student))
    0.5

    Reference:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018.
    """

    ranks = _MAPS
    equal_widths = False

    def __init__(self, p1: int = 2, p2: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.p1 = positive("p1", p1)
        if int(self.p1) != self.p1:
            raise ValueError(f"`p1` must be a whole number: activations may be negative. Received: p1={p1!r}.")
        self.p2 = positive("p2", p2)

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per sample."""
        difference = ops.abs(self._factor(student) - self._factor(teacher))
        if self.p2 < 1:  # no slope at 0
            difference = ops.where(difference > 0, difference, ops.ones_like(difference)) ** self.p2 * ops.cast(
                difference > 0, difference.dtype
            )
        elif self.p2 != 1:
            difference = difference**self.p2
        return ops.mean(difference, axis=-1)

    def _factor(self, feature: Any) -> Any:
        factor = ops.mean(feature ** int(self.p1), axis=-1)
        return l2_normalized(flat(factor))  # (batch, positions)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "p1": self.p1, "p2": self.p2}


@keras.saving.register_keras_serializable(package="keras_kd")
class VIDLoss(FeatureLoss):
    """Variational information distillation: the teacher's feature is likely, given the student's.

    ```
    mean over positions and channels of  1/2 ((mu(F_s) - F_t)^2 / s^2 + log s^2),     s^2 = softplus(a) + eps per channel
    ```

    mu is three 1x1 convolutions with ReLU between them (dense layers for vectors); mu and a are trained with the student. The
    larger map is average-pooled to the size of the smaller first.

    Args:
        init_variance: s^2 at the start, above `eps`.
        eps: smallest variance, above 0.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`. A log-likelihood: it can be negative, and is not zero at equality.

    Raises:
        ValueError: for features of different rank, or variances that are not above 0.

    Example:

    >>> loss = keras_kd.losses.VIDLoss(init_variance=1.0)
    >>> round(float(loss(np.zeros((2, 4, 4, 5)), np.zeros((2, 8, 8, 3)))), 6)
    0.0

    Reference:
        Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, 2019.
    """

    positions = "mean"
    equal_widths = False

    def __init__(self, init_variance: float = 5.0, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_variance, self.eps = positive("init_variance", init_variance), positive("eps", eps)
        if init_variance <= eps:
            raise ValueError(f"`init_variance` must be above eps={eps}. Received: init_variance={init_variance!r}.")

    def create_layers(self, teacher_shapes: list[Any], student_shapes: list[Any]) -> None:
        """Creates mu and the variance of each layer."""
        for teacher, student in zip(teacher_shapes, student_shapes, strict=True):
            mean = keras.Sequential(
                [
                    keras.layers.Dense(teacher[-1], "relu", use_bias=False, dtype=self.dtype),
                    keras.layers.Dense(teacher[-1], "relu", use_bias=False, dtype=self.dtype),
                    keras.layers.Dense(teacher[-1], use_bias=False, dtype=self.dtype),
                ],
                name="mean",
            )
            mean.build(student)
            variance = Variance(self.init_variance, self.eps, dtype=self.dtype, name="variance")
            variance.build(teacher)
            self.layers += [mean, variance]

    def adapt(self, index: int, teacher: Any, student: Any) -> tuple[Any, Any]:
        """Pools both to one size and predicts the teacher's feature."""
        teacher, student = super().adapt(index, teacher, student)
        return teacher, self.layers[2 * index](student)

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per position and channel."""
        variance = self.layers[2 * index + 1](student)
        return 0.5 * (ops.square(student - teacher) / variance + ops.log(variance))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "init_variance": self.init_variance, "eps": self.eps}


@keras.saving.register_keras_serializable(package="keras_kd")
class Variance(keras.layers.Layer):
    """A trained variance per channel: softplus(a) + eps.

    Args:
        initial: value at the start.
        eps: smallest value.
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, initial: float = 5.0, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial, self.eps = initial, eps

    def build(self, input_shape: Any) -> None:
        """Creates a for the channels of this shape."""
        start = self.initial - self.eps
        value = start + math.log(-math.expm1(-start))  # log(exp(start) - 1), for large numbers too
        self.a = self.add_weight(shape=(input_shape[-1],), initializer=keras.initializers.Constant(value), name="a")

    def call(self, inputs: Any) -> Any:
        """Returns the variances, shape `(channels,)`; the inputs are not looked at."""
        return ops.softplus(ops.convert_to_tensor(self.a)) + self.eps

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "initial": self.initial, "eps": self.eps}


@keras.saving.register_keras_serializable(package="keras_kd")
class ABLoss(FeatureLoss):
    """Activation boundaries: the student's neurons are on where the teacher's are, with a margin.

    ```
    3 / 1000 * sum over positions and channels of  (s + m)^2 where s > -m and t <= 0,  plus  (s - m)^2 where s <= m and t > 0
    ```

    averaged over the batch. Of several layers the last has weight 1 and each one before it half of the next. Name layers before
    their ReLU. The larger map is average-pooled to the size of the smaller first.

    Args:
        margin: m, not negative.
        projector: what brings the student's feature to the teacher's width: see `HintLoss`.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature before its activation, shape `(batch, ..., channels)`, or a list.
        y_pred: student's, of the same rank, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`. Not zero at equality: neurons within the margin count.

    Raises:
        ValueError: for features of different rank, or a negative margin.

    Example:

    >>> loss = keras_kd.losses.ABLoss()
    >>> round(float(loss(np.ones((1, 10)), np.zeros((1, 10)))), 6)  # 10 neurons, each (0 - 1)^2
    0.03

    Reference:
        Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, 2019.
    """

    positions = "sum"

    def __init__(self, margin: float = 1.0, projector: Any = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = non_negative("margin", margin)
        self.projector = self.use_projector(projector)

    def compare_layers(self, teachers: list[Any], students: list[Any]) -> Any:
        """Returns one value per sample: the layers' values, halved each step back."""
        total: Any = 0.0
        for index, pair in enumerate(zip(teachers, students, strict=True)):
            total = total / 2 + self._compare_pair(index, *pair)
        return total

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per position and channel."""
        off = ops.cast(ops.logical_and(student > -self.margin, teacher <= 0), student.dtype)
        on = ops.cast(ops.logical_and(student <= self.margin, teacher > 0), student.dtype)
        squares = (student + self.margin) ** 2 * off + (student - self.margin) ** 2 * on
        return squares / 1000 * 3

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "margin": self.margin, "projector": _serialized(self.projector)}


@keras.saving.register_keras_serializable(package="keras_kd")
class FSPLoss(FeatureLoss):
    """Flow of solution procedure: how features of one layer turn into those of the next.

    ```
    G = F_a^T F_b / (H W)   for consecutive layers a, b;      mean over the entries of (G_s - G_t)^2
    ```

    The values of the pairs add up. The larger map of a pair is average-pooled to the size of the smaller. Both models must have
    the same widths in the named layers.

    Args:
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name` (lists of at least two layers, in their
            order), `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: list of the teacher's maps, shapes `(batch, positions..., channels)`.
        y_pred: list of the student's.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for fewer than two layers, features that are no maps, or different widths.

    Example:

    >>> loss = keras_kd.losses.FSPLoss()
    >>> ones, twos = np.ones((1, 2, 2, 3)), np.full((1, 2, 2, 3), 2.0)
    >>> float(loss([ones, ones], [ones, twos]))
    1.0

    Reference:
        Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning, 2017.
    """

    ranks = _MAPS
    min_layers = 2
    equal_sizes = False

    def compare_layers(self, teachers: list[Any], students: list[Any]) -> Any:
        """Returns one value per sample: the sum over pairs of consecutive layers."""
        pairs = [self.without_masked(*pair) for pair in zip(teachers, students, strict=True)]
        flows = zip(_flows([t for t, _ in pairs]), _flows([s for _, s in pairs]), strict=True)
        return sum(ops.mean((student - teacher) ** 2, axis=(1, 2)) for teacher, student in flows)

    def _check_pair(self, teacher: Any, student: Any, received: str) -> None:
        if teacher[-1] != student[-1]:
            raise ValueError(f"FSPLoss compares layers of the same number of channels. {received} Name other layers.")


def _flows(features: list[Any]) -> list[Any]:
    """Matrices of shape `(batch, channels of a, channels of b)` for consecutive features."""
    flows = []
    for a, b in itertools.pairwise(features):
        size = tuple(n if n == m else min(n, m) for n, m in zip(a.shape[1:-1], b.shape[1:-1], strict=True))
        a, b = (channels_first(pooled_to(feature, size)) for feature in (a, b))  # (batch, channels, positions)
        flows.append(ops.matmul(a, ops.transpose(b, (0, 2, 1))) / ops.cast(ops.shape(a)[2], a.dtype))
    return flows


def _serialized(projector: Any) -> Any:
    return keras.saving.serialize_keras_object(projector) if isinstance(projector, keras.layers.Layer) else projector
