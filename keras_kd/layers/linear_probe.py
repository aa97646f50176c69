"""What can be read off linearly? A linear read-out that never disturbs what it reads, trained in `fit` or solved in closed form."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _batching
from keras_kd._moments import Moments, RidgeFit, ridge

_POOLINGS = ("auto", "average", "max", "flatten", "none")


@keras.saving.register_keras_serializable(package="keras_kd")
class LinearProbe(keras.layers.Layer):
    """A linear map of pooled features: how much of something do they hold in a form that a linear layer can read?

    ```
    z = activation(W' pool(x) + b)
    adapt:  min over W, b of  1/2 sum_i v_i |y_i - W' pool(x_i) - b|^2 + 1/2 l2 |W|^2
    ```

    In `model.fit` it is a layer like `Dense`; with `stop_gradient` nothing that it reads feels it. `adapt` solves for W and b in
    one pass over the data, in float64, with memory that depends on the width alone; `l2` is the `alpha` of scikit-learn's `Ridge`,
    and the intercept is not penalised. Class indices count as one-hot targets.

    Args:
        units: number of outputs: classes, or targets.
        l2: penalty of `adapt`, or a list of penalties, of which it takes the best by generalised cross-validation, without
            another pass.
        pooling: what becomes of the axes between the first and the last: "average", "max", "flatten" or "none"; "auto" is
            "average", with masked steps left out.
        stop_gradient: whether gradients end here.
        activation: of the output.
        **kwargs: of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, ..., channels)`.
        mask: `(batch, steps)`, of sequences.

    Returns:
        `(batch, units)`.

    Raises:
        ValueError: for an argument out of its range, and by `adapt` for data that does not fit.

    Example:

    >>> features = np.random.default_rng(0).normal(size=(200, 5))
    >>> probe = keras_kd.layers.LinearProbe(3)
    >>> probe.adapt(features, features[:, :3].argmax(-1))
    >>> probe(features).shape
    TensorShape([200, 3])

    Reference:
        Alain, Bengio: Understanding intermediate layers using linear classifier probes, 2016.
    """

    def __init__(
        self,
        units: int,
        *,
        l2: Any = 1e-3,
        pooling: str = "auto",
        stop_gradient: bool = True,
        activation: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ValueError(f"`units` must be a whole number of at least 1. Received: units={units!r}.")
        penalties = list(l2) if isinstance(l2, (list, tuple)) else [l2]
        if not penalties or any(isinstance(one, bool) or not isinstance(one, (int, float)) or not one >= 0 for one in penalties):
            raise ValueError(f"`l2` must be a number of at least 0, or a list of such. Received: l2={l2!r}.")
        if pooling not in _POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(_POOLINGS)}. Received: pooling={pooling!r}.")
        self.units = units
        self.l2 = [float(one) for one in penalties] if isinstance(l2, (list, tuple)) else float(l2)
        self.pooling = pooling
        self.stop_gradient = bool(stop_gradient)
        self.activation = keras.activations.get(activation)
        self.supports_masking = True
        self._moments: Moments | None = None
        self._solution: RidgeFit | None = None
        self.kernel: Any = None
        self.bias: Any = None

    def build(self, input_shape: Any) -> None:
        """Makes W and b."""
        inner = input_shape[1:-1]
        width = input_shape[-1]
        if self.pooling == "flatten":
            width = int(np.prod(input_shape[1:])) if None not in input_shape[1:] else None
        if width is None or (self.pooling == "none" and inner):
            raise ValueError(
                f'The input of "{self.name}" must have a known width after pooling="{self.pooling}". Received: shape '
                f"{tuple(input_shape)}."
            )
        self.kernel = self.add_weight(shape=(width, self.units), initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Reads."""
        x = self.pooled(ops.stop_gradient(inputs) if self.stop_gradient else inputs, mask)
        return self.activation(ops.matmul(x, self.kernel) + self.bias)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """There are no steps left to mask."""
        return

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """`(batch, units)`."""
        return (input_shape[0], self.units)

    def pooled(self, inputs: Any, mask: Any = None) -> Any:
        """Features as the linear map reads them, `(batch, width)`."""
        inner = tuple(range(1, len(inputs.shape) - 1))
        if self.pooling == "flatten":
            return ops.reshape(inputs, (ops.shape(inputs)[0], -1))
        if not inner or self.pooling == "none":
            return inputs
        if mask is not None and len(inner) == 1:
            shown = ops.expand_dims(ops.cast(mask, inputs.dtype), -1)  # (batch, steps, 1)
            if self.pooling == "max":
                return ops.max(ops.where(shown > 0, inputs, ops.full_like(inputs, -np.inf)), axis=1)
            return ops.sum(inputs * shown, axis=1) / ops.maximum(ops.sum(shown, axis=1), 1.0)
        return ops.max(inputs, axis=inner) if self.pooling == "max" else ops.mean(inputs, axis=inner)

    def adapt(self, data: Any, targets: Any = None, *, sample_weight: Any = None, batch_size: int = 1024) -> None:
        """Solves for W and b, in one pass; what was adapted to before is forgotten.

        Args:
            data: `(samples, ..., channels)`; or an iterable of batches `(x, y)` or `(x, y, sample_weight)`, such as a
                `tf.data.Dataset`, without `targets`.
            targets: class indices `(samples,)`, or `(samples, units)`.
            sample_weight: `(samples,)`, not negative.
            batch_size: rows at a time, for arrays.

        Raises:
            ValueError: if there are no samples, lengths or widths differ, an index is outside of the units, or something is NaN.
        """
        moments: Moments | None = None
        for x, y, weights in _batching.batches(data, targets, sample_weight, size=batch_size, role="targets"):
            features, wanted = self._features(x), self._targets(y, len(np.asarray(x)))
            rows = np.concatenate([features, wanted], axis=1)
            if not np.isfinite(rows).all():
                raise ValueError("`data` and `targets` must be finite. Received: NaN or infinite values.")
            weights = _checked_weights(weights, len(rows))
            moments = moments or Moments.empty(rows.shape[1])
            moments.add(Moments.of(rows, weights))
        if moments is None or not moments.weight:
            raise ValueError("`data` must hold at least one sample with a weight above 0. Received: none.")
        self._moments = moments
        self._solve()

    def merge(self, other: "LinearProbe") -> None:
        """Takes in what another probe was adapted to, as if one pass had seen the data of both.

        Raises:
            ValueError: if one of them is not adapted, or their widths differ.
        """
        mine, theirs = self._moments, getattr(other, "_moments", None)
        if mine is None or theirs is None:
            raise ValueError("Both probes must be adapted before they are merged: call `adapt` first.")
        if self.units != other.units or mine.mean.shape != theirs.mean.shape:
            raise ValueError(
                "Probes must have the same width and units to be merged. Received: "
                f"{len(mine.mean) - self.units} to {self.units}, and {len(theirs.mean) - other.units} to {other.units}."
            )
        mine.add(theirs)
        self._solve()

    @property
    def solution(self) -> RidgeFit | None:
        """The last closed-form solution: the penalty that was taken, R^2 of each output, and the GCV score."""
        return self._solution

    def _solve(self) -> None:
        moments = self._moments
        if moments is None:
            return
        width = len(moments.mean) - self.units
        penalties = self.l2 if isinstance(self.l2, list) else [self.l2]
        self._solution = ridge(moments, width, penalties)
        self.kernel.assign(self._solution.kernel)
        self.bias.assign(self._solution.bias)

    def _features(self, x: Any) -> np.ndarray:
        x = np.asarray(x)
        if getattr(self, "kernel", None) is None:
            self.build((None, *x.shape[1:]))
            self.built = True
        features = ops.convert_to_numpy(self.pooled(tf.convert_to_tensor(x))).astype("float64")
        if features.shape[1] != self.kernel.shape[0]:
            raise ValueError(
                f'`data` must have the width that "{self.name}" was built for, {self.kernel.shape[0]}. Received: shape {x.shape}, '
                f"which gives {features.shape[1]}."
            )
        return features

    def _targets(self, y: Any, count: int) -> np.ndarray:
        y = np.asarray(y)
        if y.dtype.kind not in "biuf":
            raise ValueError(
                f"`targets` must be numbers. Received: {y.dtype} of shape {y.shape}. Turn names of classes into indices: "
                "targets=np.unique(targets, return_inverse=True)[1]."
            )
        if len(y) != count:
            raise ValueError(f"`targets` must hold one entry for each sample. Received: {len(y)} for {count} samples.")
        flat = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if self.units > 1 and flat.ndim == 1:
            if flat.dtype.kind not in "iu" or (len(flat) and not (flat.min() >= 0 and flat.max() < self.units)):
                raise ValueError(
                    f"`targets` must be class indices from 0 to {self.units - 1}, or of shape (samples, {self.units}). Received: "
                    f"{flat.dtype} from {flat.min()} to {flat.max()}."
                )
            return np.eye(self.units)[flat]
        wanted = y[:, None] if y.ndim == 1 else y
        if wanted.shape[1:] != (self.units,):
            raise ValueError(f"`targets` must have shape (samples, {self.units}). Received: a batch of shape {y.shape}.")
        return wanted.astype("float64")

    def get_config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        own = {"units": self.units, "l2": self.l2, "pooling": self.pooling, "stop_gradient": self.stop_gradient}
        return super().get_config() | own | {"activation": keras.activations.serialize(self.activation)}


def _checked_weights(weights: Any, count: int) -> np.ndarray | None:
    """Weights of a batch's samples."""
    if weights is None:
        return None
    weights = np.asarray(weights)
    numbers = weights.dtype.kind in "biuf"
    if not numbers or weights.shape != (count,) or not np.isfinite(weights).all() or np.any(weights < 0):
        told = f"{weights.dtype} of shape {weights.shape}" + (f", the lowest {weights.min()}" if numbers and weights.size else "")
        raise ValueError(f"`sample_weight` must hold one finite number of at least 0 for each sample. Received: {told}.")
    return weights
