"""How does a frozen teacher answer faster? Batch normalisation goes into the convolution before it, for the length of a pass.

In inference `gamma (conv(x, w) + b - mean) / sqrt(var + eps) + beta` is one convolution with the kernel `w gamma / sqrt(var + eps)`
and a bias, which TensorFlow computes together with the activation that follows. The teacher's variables are read anew in every
pass and never written.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers, ops

from keras_kd import _taps


class Pair(NamedTuple):
    """A convolution whose only reader is a batch normalisation."""

    convolution: Any
    norm: Any


def find_pairs(model: keras.Model) -> list[Pair]:
    """Finds what can be folded in Functional and Sequential models, nested ones too; where code decides, nothing is touched."""
    owners: collections.Counter[int] = collections.Counter()
    found = list(_pairs_of(model, owners))
    # A layer that stands in a second model or inside a custom layer too has readers that this graph does not show.
    return [pair for pair in found if owners[id(pair.convolution)] == owners[id(pair.norm)] == 1]


def _pairs_of(model: keras.Model, owners: Any) -> Iterator[Pair]:
    """Pairs by the graph of each model alone; counts how many models and layers own each layer."""
    if not type(model).call.__module__.startswith("keras.") or not getattr(model, "outputs", None):
        owners.update(id(layer) for layer in model._flatten_layers(include_self=False))
        return
    graph = getattr(model, "_functional", None) or model  # of a Sequential model
    nodes = [node for level in graph._nodes_by_depth.values() for node in level]  # layers bear nodes of other graphs, too
    given = {id(output) for output in graph.outputs}
    for layer in model.layers:
        owners[id(layer)] += 1
        if isinstance(layer, keras.Model):
            yield from _pairs_of(layer, owners)
            continue
        owners.update(id(inner) for inner in layer._flatten_layers(include_self=False))
        if type(layer) in (layers.Conv2D, layers.DepthwiseConv2D) and (norm := _only_reader(layer, nodes, given)) is not None:
            yield Pair(layer, norm)


def _only_reader(layer: Any, nodes: list[Any], given: set[int]) -> Any:
    """The batch normalisation that alone reads a linear convolution in a graph of these nodes and ids of outputs, or None."""
    calls = [node for node in nodes if node.operation is layer]
    if len(calls) != 1 or id(calls[0].outputs[0]) in given:
        return None
    readers = [node for node in nodes if any(parent is calls[0] for parent in node.parent_nodes)]
    norm: Any = readers[0].operation if len(readers) == 1 else None
    fits = (
        type(norm) is layers.BatchNormalization
        and sum(node.operation is norm for node in nodes) == 1
        and norm.axis in (-1, len(calls[0].outputs[0].shape) - 1)
        and layer.data_format == "channels_last"
        and layer.activation in (None, keras.activations.linear)
        and all(one.compute_dtype == one.variable_dtype and one.quantization_mode is None for one in (layer, norm))
        and not getattr(layer, "lora_enabled", False)
        and vars(layer).get("call") is None is vars(norm).get("call")  # somebody else's wrapper has a reason to be there
    )
    return norm if fits else None


@contextlib.contextmanager
def folded(pairs: list[Pair], *, keep: list[Any]) -> Iterator[None]:
    """While the context is open, and in this thread alone, calls of these pairs in inference mode compute one convolution.

    Args:
        pairs: see `find_pairs`.
        keep: layers whose own outputs somebody wants to see.
    """
    kept = {id(layer) for layer in keep}
    with contextlib.ExitStack() as stack:
        for pair in pairs:
            if id(pair.convolution) not in kept:
                stack.enter_context(_taps.replace(pair.convolution, _folded_call(pair)))
                stack.enter_context(_taps.replace(pair.norm, lambda call, inputs, *args, **kwargs: inputs))
        yield


def scale_and_bias(norm: Any, bias: Any, read: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What a batch normalisation makes of `x + bias` in inference: `x scale + bias`, of each channel.

    Args:
        norm: the layer.
        bias: 0 for none.
        read: gives the values of its variables.
    """
    scale = (read(norm.moving_variance) + norm.epsilon) ** -0.5  # (channels,)
    scale = scale * read(norm.gamma) if norm.scale else scale
    return scale, (bias - read(norm.moving_mean)) * scale + (read(norm.beta) if norm.center else 0.0)


def _folded_call(pair: Pair) -> Any:
    layer, norm = pair

    def call(former: Any, inputs: Any) -> Any:
        scale, bias = scale_and_bias(norm, layer.bias if layer.use_bias else 0.0, ops.convert_to_tensor)
        options = {name: getattr(layer, name) for name in ("strides", "padding", "dilation_rate", "data_format")}
        if isinstance(layer, layers.DepthwiseConv2D):
            kernel = layer.kernel * ops.reshape(scale, layer.kernel.shape[2:])  # (height, width, channels, multiplier)
            return tf.nn.bias_add(ops.depthwise_conv(inputs, kernel, **options), bias)
        return tf.nn.bias_add(ops.conv(inputs, layer.kernel * scale, **options), bias)

    return call
