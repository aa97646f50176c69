"""How is a tensor rounded as integers would round it? TF-MOT's fake quantisation, with ranges handed in."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_kd import _tfmot

BITS = range(2, 17)
# Outputs of these functions have the scale and zero point that LiteRT fixes for them.
FIXED_RANGES = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}


class _Slot(NamedTuple):
    """What TF-MOT's quantisers take for a variable: it holds nothing, and gives what it is assigned, as a constant."""

    dtype: Any = tf.float32

    def assign(self, value: Any, name: str | None = None) -> Any:
        """Returns `value`."""
        return tf.stop_gradient(value)


def round_tensor(x: Any, low: Any, high: Any, bits: int) -> Any:
    """Rounds an activation to `2 ** bits` values from `low` to `high` (scalars); in float32, whatever its dtype."""
    quantizer = _quantizers().MovingAverageQuantizer(bits, per_axis=False, symmetric=False, narrow_range=False)
    low, high = tf.convert_to_tensor(low), tf.convert_to_tensor(high)
    high = tf.where(high > low, high, tf.ones_like(high))  # a range of width 0 would be NaN under XLA, and no scale in a file
    limits = {"min_var": low, "max_var": high}
    rounded = quantizer(tf.cast(x, tf.float32), training=False, weights=limits)
    return tf.cast(rounded, x.dtype)


def round_constant(x: Any, bits: int) -> Any:
    """Rounds a vector of constants by its own extremes, as the converter does."""
    quantizer = _quantizers().LastValueQuantizer(bits, per_axis=False, symmetric=False, narrow_range=False)
    return tf.cast(quantizer(tf.cast(x, tf.float32), training=True, weights=_slots()), x.dtype)


def round_kernel(kernel: Any, bits: int, mode: str) -> Any:
    """Rounds a kernel by symmetric ranges that are its own extremes; the gradient passes as it is.

    TensorFlow's own gradient is the same but for the extremes themselves: those it takes for clipped where float32 has put the
    range's end a little inside.

    Args:
        kernel: `(..., channels)`, float32; of two or four axes for "channel".
        bits: 2 to 16.
        mode: "tensor": one range. "channel": one for each index of the last axis. "equal": one for all, written for every
            channel: the integers are those of "tensor", in the form that lets the converter fold batch normalisation.
    """

    @tf.custom_gradient
    def straight_through(kernel: Any) -> tuple[Any, Any]:
        quantizer = _quantizers().LastValueQuantizer(bits, per_axis=mode != "tensor", symmetric=True, narrow_range=True)
        high = _largest(kernel, mode)
        return quantizer(kernel, training=False, weights={"min_var": -high, "max_var": high}), lambda upstream: upstream

    return straight_through(kernel)


def _largest(kernel: Any, mode: str) -> Any:
    """The ends of the ranges: largest magnitudes.

    A channel without weights takes that of the others. Its own, 0, would be the scale in which its bias is stored, and overflow.
    """
    magnitudes = tf.abs(kernel)
    largest = tf.reduce_max(magnitudes)
    largest = tf.where(largest > 0, largest, tf.ones_like(largest))
    if mode == "tensor":
        return largest
    channels = tf.reduce_max(magnitudes, axis=tuple(range(len(kernel.shape) - 1)))
    return tf.where((mode == "equal") | (channels < 1e-6 * largest), tf.fill(channels.shape, largest), channels)


def extremes(x: Any) -> tuple[Any, Any]:
    """Lowest and highest value of a tensor and of zero, which integers must hold."""
    wide = tf.stop_gradient(tf.cast(x, tf.float32))
    return tf.minimum(tf.reduce_min(wide), 0.0), tf.maximum(tf.reduce_max(wide), 0.0)


def _slots() -> dict[str, Any]:
    return {"min_var": _Slot(), "max_var": _Slot()}


def _quantizers() -> Any:
    return _tfmot.load_part("quantization.keras.quantizers")
