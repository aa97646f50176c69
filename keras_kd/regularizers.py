"""Which penalties empty whole filters? Regularisers beside Keras' own L1 and L2."""

from typing import Any

import keras
from keras import ops

from keras_kd._tunable import non_negative


@keras.saving.register_keras_serializable(package="keras_kd")
class GroupLasso(keras.regularizers.Regularizer):
    """Group lasso: a penalty on the norm of each filter or neuron, under which whole ones go to zero.

    ```
    strength * sum_g sqrt(size of g) * |w_g|_2
    ```

    A group is what leads to one output channel: a slice of the kernel at one place of `axis`. Unlike L2, whose pull fades with
    the weight, this pulls a group to zero at a constant rate. Optimizers stop a step's length short of the exact zero:
    `Pruning(Threshold(...))` or surgery removes what is left.

    Args:
        strength: weight of the penalty, not negative.
        axis: axis of the output channels: the last one of Keras' kernels.

    Call arguments:
        x: a weight, of any shape.

    Returns:
        The penalty, a scalar.

    Raises:
        TypeError: for a strength that is no number.
        ValueError: for a negative one.

    Example:

    >>> round(float(keras_kd.regularizers.GroupLasso(0.5)(np.array([[3.0, 0.0], [4.0, 0.0]]))), 4)
    3.5355
    >>> layer = keras.layers.Conv2D(8, 3, kernel_regularizer=keras_kd.regularizers.GroupLasso(1e-3))

    Reference:
        Yuan, Lin: Model selection and estimation in regression with grouped variables, 2006.
    """

    def __init__(self, strength: float = 0.01, *, axis: int = -1) -> None:
        self.strength = non_negative("strength", strength)
        self.axis = int(axis)

    def __call__(self, x: Any) -> Any:
        """Returns the penalty."""
        x = ops.convert_to_tensor(x)
        groups = ops.reshape(ops.moveaxis(x, self.axis, 0), (x.shape[self.axis], -1))  # (groups, size)
        squares = ops.sum(ops.square(groups), axis=1)
        empty = ops.equal(squares, 0)  # whose norm has no gradient: 0 is one of its subgradients
        norms = ops.where(empty, 0.0, ops.sqrt(ops.where(empty, 1.0, squares)))
        return self.strength * groups.shape[1] ** 0.5 * ops.sum(norms)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"strength": self.strength, "axis": self.axis}
