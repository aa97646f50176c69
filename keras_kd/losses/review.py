"""How far are several levels of the student's features, reviewed together, from the teacher's? Knowledge review."""

from typing import Any

import keras
from keras import ops

from keras_kd.layers.projectors import pooled_to
from keras_kd.losses._features import FeatureLoss, run_layer


@keras.saving.register_keras_serializable(package="keras_kd")
class ReviewKDLoss(FeatureLoss):
    """Knowledge review: shallow layers of the teacher teach, through fused features, and context of several sizes is compared.

    ```
    for each layer   (MSE(F_s, F_t) + sum_l w_l * MSE(pool_l(F_s), pool_l(F_t))) / (1 + sum_l w_l)
    ```

    pool_l averages the map into l x l, for the levels l < H; the levels that are used weigh 1/2, 1/4, 1/8 in their order. The
    values of the layers add up.

    A single layer is compared as it is where the shapes agree. Otherwise, and with several layers, the student's features pass
    the paper's fusion cascade, from the deepest to the shallowest: 1x1 convolution to `mid_channels`; a two-way sigmoid gate
    blends it with the fused feature of the layer before, upsampled to its size by nearest neighbours; 3x3 convolution to the
    teacher's width; batch normalisation after both convolutions. It is trained with the student.

    The paper lets the weight of this loss rise over the first epochs: `keras_kd.callbacks.AnnealWeight`.

    Args:
        levels: sizes of the pooled maps, each at least 1.
        mid_channels: width inside the cascade, at least 1. None: that of the student's deepest layer, at most 512.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name` (from the shallowest to the deepest),
            `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's map, shape `(batch, height, width, channels)`, or a list.
        y_pred: student's, or a list.

    Returns:
        A scalar; without reduction, shape `(batch,)`.

    Raises:
        ValueError: for features that are no two-dimensional maps, or levels or a width below 1.

    Example:

    >>> loss = keras_kd.losses.ReviewKDLoss()
    >>> float(loss(np.zeros((2, 8, 8, 3)), np.full((2, 8, 8, 3), 2.0)))
    4.0

    Reference:
        Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, 2021.
    """

    ranks = (4,)
    equal_sizes = False
    equal_widths = False

    def __init__(self, levels: Any = (4, 2, 1), mid_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = list(levels) if isinstance(levels, (list, tuple)) else [levels]
        self.mid_channels = mid_channels
        for name, values in (("levels", self.levels), ("mid_channels", [] if mid_channels is None else [mid_channels])):
            if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values):
                raise ValueError(f"`{name}` must be whole numbers, at least 1. Received: {name}={values!r}.")

    def create_layers(self, teacher_shapes: list[Any], student_shapes: list[Any]) -> None:
        """Creates the fusion cascade, from the shallowest layer to the deepest."""
        if len(teacher_shapes) == 1 and teacher_shapes[0][1:] == student_shapes[0][1:]:
            return
        mid = self.mid_channels or min(512, student_shapes[-1][-1])
        for index, (teacher, student) in enumerate(zip(teacher_shapes, student_shapes, strict=True)):
            deepest = index == len(teacher_shapes) - 1
            fusion = Fusion(mid, teacher[-1], gated=not deepest, dtype=self.dtype, name=f"fusion_{index}")
            fusion.build(student)
            self.layers.append(fusion)

    def compare_layers(self, teachers: list[Any], students: list[Any]) -> Any:
        """Returns one value per sample: the sum over layers, the student's fused from the deepest on."""
        total: Any = 0.0
        above = None
        for index in reversed(range(len(teachers))):
            teacher, student = teachers[index], students[index]
            if self.layers:
                student, above = run_layer(self.layers[index], student, above=above, size=tuple(teacher.shape[1:3]))
            total = total + self._context(teacher, student)
        return total

    def _context(self, teacher: Any, student: Any) -> Any:
        height, width = teacher.shape[1:3]
        value, weight, weights = _squared_error(teacher, student), 1.0, 1.0
        for level in self.levels:
            if level >= height:
                continue
            weight /= 2
            size = (level, min(level, width))
            value = value + weight * _squared_error(pooled_to(teacher, size), pooled_to(student, size))
            weights += weight
        return value / weights

    def _check_pair(self, teacher: Any, student: Any, received: str) -> None:
        if None in (*teacher[1:], *student[1:]):
            raise ValueError(
                f"ReviewKDLoss must know height, width and channels. {received} Give the models inputs of a fixed size."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "levels": list(self.levels), "mid_channels": self.mid_channels}


def _squared_error(a: Any, b: Any) -> Any:
    return ops.mean((a - b) ** 2, axis=(1, 2, 3))


@keras.saving.register_keras_serializable(package="keras_kd")
class Fusion(keras.layers.Layer):
    """One step of the cascade: brings a feature to `mid` channels, blends it with the one above, gives the teacher's width.

    Args:
        mid: width inside the cascade.
        units: width of the teacher's feature.
        gated: whether a fused feature comes from above.
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, mid: int, units: int, gated: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mid, self.units, self.gated = mid, units, gated

    def build(self, input_shape: Any) -> None:
        """Creates the convolutions."""
        place = tuple(input_shape[:-1])
        spread = keras.initializers.HeUniform

        def conv(filters: int, size: int, name: str, **kwargs: Any) -> Any:
            return keras.layers.Conv2D(filters, size, padding="same", name=name, dtype=self.dtype_policy, **kwargs)

        self.reduce = conv(self.mid, 1, "reduce", use_bias=False, kernel_initializer=spread())
        self.reduce_norm = keras.layers.BatchNormalization(dtype=self.dtype_policy, name="reduce_norm")
        self.expand = conv(self.units, 3, "expand", use_bias=False, kernel_initializer=spread())
        self.expand_norm = keras.layers.BatchNormalization(dtype=self.dtype_policy, name="expand_norm")
        self.gate = conv(2, 1, "gate", activation="sigmoid") if self.gated else None
        self.reduce.build(input_shape)
        for layer in (self.reduce_norm, self.expand):
            layer.build((*place, self.mid))
        self.expand_norm.build((*place, self.units))
        if self.gate is not None:
            self.gate.build((*place, 2 * self.mid))

    def call(self, x: Any, above: Any = None, size: Any = None, training: bool = False) -> tuple[Any, Any]:
        """Returns the feature for the teacher and the fused one for the next, shallower step, both of `size`."""
        x = self.reduce_norm(self.reduce(x), training=training)
        if self.gate is not None:
            above = _resized(above, x.shape[1:3])
            gates = self.gate(ops.concatenate([x, above], axis=-1))  # (batch, height, width, 2)
            x = x * gates[..., :1] + above * gates[..., 1:]
        x = _resized(x, size)
        return self.expand_norm(self.expand(x), training=training), x

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "mid": self.mid, "units": self.units, "gated": self.gated}


def _resized(x: Any, size: Any) -> Any:
    """Nearest neighbours: position i of n comes from floor(i * m / n) of m, in both directions."""
    for axis, n in ((1, size[0]), (2, size[1])):
        m = x.shape[axis]
        if n != m:
            x = ops.take(x, [i * m // n for i in range(n)], axis=axis)
    return x
