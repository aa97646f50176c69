"""How are features of a student brought to the width of its teacher's? Trained adapters, thrown away with the teacher."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_kd")
class Projector(keras.layers.Layer):
    """A linear map of the channels: a 1x1 convolution with batch normalisation for maps, a dense layer for vectors.

    ```
    y = batch_norm(x W)     maps        y = x W + b     vectors
    ```

    The distillation losses make one by themselves where widths differ, and train it with the student.

    Args:
        units: width of the result, at least 1.
        **kwargs: `name`, `dtype`, ...: see `keras.layers.Layer`.

    Call arguments:
        x: shape `(batch, channels)` or `(batch, positions..., channels)`.
        training: whether batch normalisation uses and updates batch statistics.

    Returns:
        The same shape with `units` channels.

    Raises:
        ValueError: for a width below 1.

    Example:

    >>> keras_kd.layers.Projector(16)(np.ones((2, 4, 4, 3))).shape
    TensorShape([2, 4, 4, 16])

    Reference:
        Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, 2015.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ValueError(f"`units` must be a whole number, at least 1. Received: units={units!r}.")
        self.units = units

    def build(self, input_shape: Any) -> None:
        """Creates the weights for inputs of this shape."""
        is_map = len(input_shape) > 2
        # On the last axis of a map a dense layer is a 1x1 convolution, for any number of dimensions.
        self.dense = keras.layers.Dense(self.units, use_bias=not is_map, dtype=self.dtype_policy, name="dense")
        self.dense.build(input_shape)
        self.norm = keras.layers.BatchNormalization(dtype=self.dtype_policy, name="norm") if is_map else None
        if self.norm is not None:
            self.norm.build((*input_shape[:-1], self.units))

    def call(self, x: Any, training: bool = False) -> Any:
        """Projects the channels."""
        y = self.dense(x)
        return y if self.norm is None else self.norm(y, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape with `units` channels."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "units": self.units}


def pooled_to(x: Any, size: Any) -> Any:
    """Averages the positions of a map into fewer: windows from floor(i n / m) to ceil((i + 1) n / m), as adaptive pooling does.

    Args:
        x: shape `(batch, positions..., channels)`, with known positions.
        size: positions of the result, none of them larger than those of `x`.

    Returns:
        Shape `(batch, *size, channels)`.
    """
    for axis, (n, m) in enumerate(zip(x.shape[1:-1], size, strict=True), start=1):
        if n == m:
            continue
        if n % m == 0:
            x = ops.mean(ops.reshape(x, (-1, *x.shape[1:axis], m, n // m, *x.shape[axis + 1 :])), axis=axis + 1)
            continue
        windows = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        rows = [[(start <= j < stop) / (stop - start) for j in range(n)] for start, stop in windows]
        weights = ops.convert_to_tensor(rows, dtype=x.dtype)  # (m, n)
        x = ops.moveaxis(ops.tensordot(x, weights, axes=[[axis], [1]]), -1, axis)
    return x
