"""Which single layer computes what two linear ones do, one after the other? Their kernels as one, in float64."""

import math
from typing import Any

import keras
import numpy as np

from keras_kd.surgery._rebuild import Replacement, plain_initializers, without_shapes
from keras_kd.surgery._rules import letters
from keras_kd.teachers._folding import scale_and_bias

_L = keras.layers
_CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)
_TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
_DEPTHWISE = (_L.DepthwiseConv1D, _L.DepthwiseConv2D)
_SEPARABLE = (_L.SeparableConv1D, _L.SeparableConv2D)
_MIXING = (_L.Dense, *_CONVOLUTIONS)
_KERNELS = (*_MIXING, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE, _L.EinsumDense)


def kind_of(layer: Any) -> str:
    """`"kernel"`, `"norm"`, `"identity"`, or `""` for what has no part in this, or must stay as it is."""
    if vars(layer).get("call") is not None or getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return ""
    if type(layer) in _KERNELS:
        return "kernel"
    if type(layer) is _L.BatchNormalization:
        return "norm"
    linear = type(layer) is _L.Activation and layer.activation is keras.activations.linear
    return "identity" if linear or type(layer) is _L.Identity else ""


def with_norm_after(layer: Any, norm: Any, rank: int) -> Replacement | str:
    """A layer that gives what a batch normalisation makes of its output; or why there is none.

    Args:
        layer: with a kernel.
        norm: the batch normalisation.
        rank: axes of the tensor between them.
    """
    if not is_linear(layer):
        return f'"{layer.name}" has an activation'
    if isinstance(layer, _L.EinsumDense):
        return _einsum_with_norm(layer, norm, rank)
    if norm.axis % rank != _axis(layer, rank):
        return "it normalises another axis"
    scale, bias = scale_and_bias(norm, _bias(layer), _values)
    *others, kernel = _kernels(layer)
    if isinstance(layer, _TRANSPOSED):
        kernel = kernel * scale[:, None]
    elif isinstance(layer, _DEPTHWISE):
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    else:
        kernel = kernel * scale
    return Replacement([_like(layer, use_bias=True)], [[*others, kernel, bias]])


def _einsum_with_norm(layer: Any, norm: Any, rank: int) -> Replacement | str:
    _, weights, given = letters(layer.equation, rank)
    channel = given[norm.axis % rank]
    if channel not in weights:
        return f'the kernel of "{layer.name}" does not make the axis that it normalises'
    axes = layer.bias_axes or channel
    if channel not in axes:
        return f'"{layer.name}" has no bias along the axis that it normalises'
    first = min(given.index(letter) for letter in axes)  # Keras' bias has an axis for each letter from here, of 1 where it has none
    beside, within = ([-1 if letter == channel else 1 for letter in some] for some in (given[first:], weights))
    scale, shift = scale_and_bias(norm, 0.0, _values)
    bias = (0.0 if layer.bias is None else _values(layer.bias)) * scale.reshape(beside) + shift.reshape(beside)
    return Replacement([_like(layer, bias_axes=axes)], [[_values(layer.kernel) * scale.reshape(within), bias]])


def with_norm_before(norm: Any, layer: Any, rank: int) -> Replacement | str:
    """A layer that gives what it makes of a batch normalisation's output, from that one's input; or why there is none."""
    if isinstance(layer, (*_TRANSPOSED, _L.EinsumDense)):
        return f'"{layer.name}" is no Dense layer and no convolution'
    if norm.axis % rank != _axis(layer, rank):
        return "it normalises another axis"
    scale, shift = scale_and_bias(norm, 0.0, _values)
    if np.any(shift) and _is_padded(layer):
        return f'"{layer.name}" pads its input with zeros, where no bias stands for the shift'
    first, *others = _kernels(layer)
    taps = tuple(range(first.ndim - 2))
    if isinstance(layer, (*_DEPTHWISE, *_SEPARABLE)):
        bias = np.sum(first * shift[:, None], axis=taps).ravel()
        bias = bias @ others[0].reshape(others[0].shape[-2:]) if others else bias
        first = first * scale[:, None]
    else:
        factor, summand = (_of_groups(layer, one, first.shape) for one in (scale, shift))
        bias = np.sum(first * summand, axis=(*taps, -2))
        first = first * factor
    changed = _is_biased(layer) or bool(np.any(shift))
    return Replacement([_like(layer, use_bias=changed)], [[first, *others, *([_bias(layer) + bias] if changed else [])]])


def _of_groups(layer: Any, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values of input channels as the last two axes of a kernel of these groups."""
    groups = getattr(layer, "groups", 1)
    return np.repeat(values.reshape(groups, -1).T, shape[-1] // groups, axis=1)  # (inputs of a group, outputs)


def can_be_one(first: Any, second: Any) -> bool:
    """Whether two layers map channels and the first one has no activation."""
    return isinstance(first, _MIXING) and isinstance(second, _MIXING) and is_linear(first)


def as_one(first: Any, second: Any, between: Any, output: Any, if_larger: bool) -> Replacement | str:
    """One layer for two that map channels, one of them position by position; or why there is none.

    Args:
        first: a Dense layer or convolution without activation.
        second: another one that alone reads its output.
        between: that tensor.
        output: what the second one gives.
        if_larger: also where one layer takes more multiply-accumulates than two.
    """
    rank = len(between.shape)
    if _axis(first, rank) != _axis(second, rank):
        return "they map other axes"
    if any(getattr(layer, "groups", 1) != 1 for layer in (first, second)):
        return "one of them has groups"
    if first.dtype_policy != second.dtype_policy:
        return "they compute in other types"
    points = [isinstance(layer, _L.Dense) or math.prod((*layer.kernel_size, *layer.strides)) == 1 for layer in (first, second)]
    if not any(points):
        return "neither of them maps position by position"
    if not points[1] and np.any(_bias(first)) and _is_padded(second):
        return f'"{second.name}" pads its input with zeros, where no bias stands for that of "{first.name}"'
    one, other = _kernels(first)[0], _kernels(second)[0]
    if points[1]:
        base, kernel, shift = (second if points[0] else first), one @ _matrix(other), _bias(first) @ _matrix(other)
    else:
        base, kernel = second, np.einsum("ih,...ho->...io", _matrix(one), other)
        shift = np.sum(_bias(first) @ other, axis=tuple(range(other.ndim - 2)))
    if base is second and kernel.ndim != other.ndim:
        kernel = kernel.reshape(*other.shape[:-2], *kernel.shape[-2:])
    apart = _positions(first, between) * one.size + _positions(second, output) * other.size
    together = _positions(second, output) * kernel.size
    if together > apart and not if_larger:
        return f"one layer would take {together:,} multiply-accumulates, both take {apart:,}"
    biased = _is_biased(first) or _is_biased(second)
    return Replacement([_joined(base, second, biased)], [[kernel, *([shift + _bias(second)] if biased else [])]])


def _joined(base: Any, second: Any, biased: bool) -> Any:
    """A layer of the kind of `base` that looks like `second` from outside."""
    config = second.get_config()
    width = "units" if isinstance(base, _L.Dense) else "filters"
    outer = {key: config.get(key) for key in ("name", "trainable", "activation", "activity_regularizer")}
    return _like(base, **outer, use_bias=biased, **{width: _kernels(second)[0].shape[-1]})


def _matrix(kernel: np.ndarray) -> np.ndarray:
    """Inputs to outputs of a kernel of one position."""
    return kernel.reshape(kernel.shape[-2:])


def _positions(layer: Any, output: Any) -> int:
    """Positions of a layer's output, of which each takes its whole kernel."""
    axis = _axis(layer, len(output.shape))
    return math.prod(n or 64 for index, n in enumerate(output.shape) if index not in (0, axis))


def _like(layer: Any, **changes: Any) -> Any:
    """A new layer with another configuration."""
    config = without_shapes(layer.get_config())
    return type(layer).from_config(config | plain_initializers(layer, config) | changes)


def _values(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), "float64")


def _kernels(layer: Any) -> list[np.ndarray]:
    """What a layer multiplies with, in order."""
    names = ("depthwise_kernel", "pointwise_kernel") if isinstance(layer, _SEPARABLE) else ("kernel",)
    return [_values(getattr(layer, name)) for name in names]


def _is_biased(layer: Any) -> bool:
    return getattr(layer, "bias", None) is not None


def _bias(layer: Any) -> Any:
    """Its bias, or zeros."""
    if _is_biased(layer):
        return _values(layer.bias)
    if isinstance(layer, _DEPTHWISE):
        return np.zeros(math.prod(layer.kernel.shape[-2:]))
    return np.zeros(layer.kernel.shape[-2] if isinstance(layer, _TRANSPOSED) else _kernels(layer)[-1].shape[-1])


def is_linear(layer: Any) -> bool:
    """Whether a layer with a kernel has no activation."""
    return layer.activation in (None, keras.activations.linear)


def _axis(layer: Any, rank: int) -> int:
    """The axis of its channels."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _is_padded(layer: Any) -> bool:
    return getattr(layer, "padding", "valid") != "valid" and math.prod(layer.kernel_size) > 1
