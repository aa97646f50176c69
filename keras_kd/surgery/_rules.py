"""What do Keras' layers do with channels? One rule for each kind that has weights; those without are in `_shapes`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.surgery import _heads, _labels, _nodes, _shapes
from keras_kd.surgery._labels import Labels
from keras_kd.surgery._visits import Visit

_L = keras.layers
_POSITIONS = "mixes it as positions"


def rule_for(operation: Any) -> Callable[[Visit], list[Labels]] | None:
    """The rule for a layer or an operation; None where what it does is not known."""
    if not isinstance(operation, keras.layers.Layer):
        return _shapes.rule_for_operation(operation)
    if getattr(operation, "quantization_mode", None) is not None or getattr(operation, "lora_enabled", False):
        return None
    if vars(operation).get("call") is not None:
        return None
    own: Any = type(operation)
    for cls in own.__mro__:
        if cls in RULES:
            same = own.call is cls.call and own.build is cls.build and own.__call__ is cls.__call__
            return RULES[cls] if same else None
    return None


def _activate(visit: Visit, labels: Labels) -> Labels:
    """Labels after a layer's own activation."""
    _shapes.check_activation(visit, visit.layer.activation, labels)
    return labels


def _with(labels: Labels, axis: int, channels: np.ndarray | None) -> Labels:
    """Labels with channels on one axis alone."""
    return [channels if index == axis else None for index in range(len(labels))]


def _channel_axis(layer: Any, rank: int) -> int:
    return 1 if layer.data_format == "channels_first" else rank - 1


def _convolution(visit: Visit) -> list[Labels]:
    layer, (tensor,) = visit.layer, visit.inputs
    labels = visit.of(tensor)
    axis = _channel_axis(layer, len(labels))
    visit.pin_beside(labels, axis, _POSITIONS)
    read, made = labels[axis], visit.make(layer.filters)
    inner = _grouped(visit, read, made, tensor.shape[axis], layer.groups) if layer.groups > 1 else read
    spatial = [None] * (len(labels) - 2)
    visit.weight("kernel", [*spatial, inner, made])
    visit.weight("bias", [made])
    visit.size("filters", made)
    return [_activate(visit, _with(labels, axis, made))]


def _grouped(visit: Visit, read: np.ndarray | None, made: np.ndarray, width: int, groups: int) -> np.ndarray | None:
    """Ties what a grouped convolution needs tied, and gives the atoms along its kernel's input axis.

    Either whole groups go, or in each group the channels at the same place; whichever leaves more to choose from.
    """
    given = made.reshape(groups, -1)
    if read is None:
        visit.atoms.unite(given[:1], given)
        return None
    taken = read.reshape(groups, width // groups)
    if groups > min(taken.shape[1], given.shape[1]):
        visit.atoms.unite(taken[:, :1], taken)
        visit.atoms.unite(taken[:, :1], given)
        visit.size("groups", taken[:, 0])
        return None
    visit.atoms.unite(taken[:1], taken)
    visit.atoms.unite(given[:1], given)
    return taken[0]


def _transposed(visit: Visit) -> list[Labels]:
    layer, (tensor,) = visit.layer, visit.inputs
    labels = visit.of(tensor)
    axis = _channel_axis(layer, len(labels))
    visit.pin_beside(labels, axis, _POSITIONS)
    made = visit.make(layer.filters)
    visit.weight("kernel", [*[None] * (len(labels) - 2), made, labels[axis]])
    visit.weight("bias", [made])
    visit.size("filters", made)
    return [_activate(visit, _with(labels, axis, made))]


def _depthwise(visit: Visit) -> list[Labels]:
    layer, (tensor,) = visit.layer, visit.inputs
    labels = visit.of(tensor)
    axis = _channel_axis(layer, len(labels))
    visit.pin_beside(labels, axis, _POSITIONS)
    read = labels[axis]
    given = None if read is None else np.repeat(read, layer.depth_multiplier)
    visit.weight("kernel", [*[None] * (len(labels) - 2), read, None])
    visit.weight("bias", [given])
    return [_activate(visit, _with(labels, axis, given))]


def _separable(visit: Visit) -> list[Labels]:
    layer, (tensor,) = visit.layer, visit.inputs
    labels = visit.of(tensor)
    axis = _channel_axis(layer, len(labels))
    visit.pin_beside(labels, axis, _POSITIONS)
    read, made = labels[axis], visit.make(layer.filters)
    spatial = [None] * (len(labels) - 2)
    visit.weight("depthwise_kernel", [*spatial, read, None])
    visit.weight("pointwise_kernel", [*spatial, None if read is None else np.repeat(read, layer.depth_multiplier), made])
    visit.weight("bias", [made])
    visit.size("filters", made)
    return [_activate(visit, _with(labels, axis, made))]


def _dense(visit: Visit) -> list[Labels]:
    labels, made = visit.of(visit.inputs[0]), visit.make(visit.layer.units)
    visit.weight("kernel", [labels[-1], made])
    visit.weight("bias", [made])
    visit.size("units", made)
    return [_activate(visit, [*labels[:-1], made])]


def _einsum(visit: Visit) -> list[Labels]:
    """Each letter is an axis: those that only the kernel brings begin here, those that it shares with the input index it."""
    layer, tensor = visit.layer, visit.inputs[0]
    labels = list(visit.of(tensor))
    if "..." in layer.equation:  # Keras gives the shape of several such axes in the wrong order
        hidden = 1 + len(labels) - len(layer.equation.split(",")[0].replace(".", ""))
        visit.pin(labels[:hidden], "folds it into `...`")
        labels[:hidden] = _labels.none(labels[:hidden])
    read, weights, given = letters(layer.equation, len(labels))
    lengths = dict(zip(weights, layer.kernel.shape, strict=True))
    known: dict[str, np.ndarray | None] = dict(zip(read, labels, strict=True))
    for letter in weights:
        if letter not in known:
            known[letter] = visit.make(lengths[letter], letter) if letter in given else None
    visit.pin([known[letter] for letter in read if letter not in given and letter not in weights], "sums over it")
    visit.weight("kernel", [known[letter] for letter in weights])
    visit.weight("bias", _bias_axes(layer, known, given))
    result = [known[letter] for letter in given]
    shape = layer.partial_output_shape  # without what `...` stands for
    visit.size("output_shape", (shape, result[len(result) - len(shape) :]))
    if not _shapes.is_elementwise(layer.activation):
        visit.pin(result, "has an activation that mixes it")
    return [result]


def _bias_axes(layer: Any, known: dict[str, Any], given: str) -> list[np.ndarray | None]:
    """Atoms along a bias: axes that `bias_axes` does not name have length 1; it begins with the first that is named."""
    named = layer.bias_axes or ""
    if not named:
        return []
    first = min(given.index(letter) for letter in named)
    return [known[letter] if letter in named else None for letter in given[first:]]


def letters(equation: str, rank: int) -> tuple[str, str, str]:
    """Letters of input, kernel and output, with letters that nobody uses for `...`."""
    left, given = equation.replace(" ", "").split("->")
    read, weights = left.split(",")
    if "..." in equation:
        spare = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation)[: rank - len(read.replace(".", ""))]
        read, given = read.replace("...", spare), given.replace("...", spare)
    return read, weights, given


def _batch_norm(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        visit.weight(name, [labels[visit.layer.axis]])
    return [labels]


def _norm(visit: Visit) -> list[Labels]:
    """Layer, RMS and unit normalisation: what the statistics run over must stay."""
    labels = visit.of(visit.inputs[0])
    axes = visit.layer.axis
    chosen = [labels[axis] for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
    visit.pin(chosen, "normalises over it: without some of its channels the statistics would be others")
    return [labels]


def _group_norm(visit: Visit) -> list[Labels]:
    layer, tensor = visit.layer, visit.inputs[0]
    labels = visit.of(tensor)
    axis = layer.axis % len(labels)
    visit.pin_beside(labels, axis, "normalises over it")
    read = labels[axis]
    if read is not None:
        groups = read.reshape(layer.groups, -1)
        visit.atoms.unite(groups[:, :1], groups)
        visit.size("groups", groups[:, 0])
    for name in ("gamma", "beta"):
        visit.weight(name, [read])
    return [labels]


def _prelu(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    shared = visit.layer.shared_axes or ()
    visit.weight("alpha", [None if axis in shared else one for axis, one in enumerate(labels) if axis > 0])
    return [labels]


def _embedding(visit: Visit) -> list[Labels]:
    made = visit.make(visit.layer.output_dim)
    labels = visit.of(visit.inputs[0])
    visit.pin(labels, "looks it up")
    visit.weight("embeddings", [None, made])
    visit.size("output_dim", made)
    return [[*_labels.none(labels), made]]


def _recurrent(gates: int) -> Callable[[Visit], list[Labels]]:
    def rule(visit: Visit) -> list[Labels]:
        layer, tensor = visit.layer, visit.inputs[0]
        labels, made = visit.of(tensor), visit.make(layer.units)
        visit.pin(labels[:-1], "steps along it")
        wide = np.tile(made, gates)
        visit.weight("kernel", [labels[-1], wide], layer.cell)
        visit.weight("recurrent_kernel", [made, wide], layer.cell)
        visit.weight("bias", [None, wide] if getattr(layer, "reset_after", False) else [wide], layer.cell)
        visit.size("units", made)
        given = [*visit.args[1:2], visit.kwargs.get("initial_state")]
        for state in [*visit.inputs[1:], *_nodes.tensors_in(given)]:
            visit.tie([visit.of(state)[-1:], [made]])
        whole = _shapes.is_elementwise(layer.activation) and _shapes.is_elementwise(getattr(layer, "recurrent_activation", None))
        if not whole or layer.stateful:
            visit.pin([made], "keeps its state" if whole else "has an activation that mixes it")
        return [[*_labels.none(output.shape[:-1]), made] for output in visit.outputs]

    return rule


def _bidirectional(visit: Visit) -> list[Labels]:
    """Both directions read channels; their units stay as they are: one number of units stands for both."""
    layer = visit.layer
    labels = visit.of(visit.inputs[0])
    cells = [getattr(one, "cell", None) for one in (layer.forward_layer, layer.backward_layer)]
    plain = all(rule_for(one) in _RECURRENT for one in (layer.forward_layer, layer.backward_layer)) and len(visit.inputs) == 1
    visit.pin(labels[:-1] if plain else labels, "steps along it")
    for cell in cells if plain else ():
        visit.weight("kernel", [labels[-1], None], cell)
    return [_labels.none(output.shape) for output in visit.outputs]


def _attention(visit: Visit) -> list[Labels]:
    """Query and key are multiplied with each other along their channels; the value's go through."""
    tensors = visit.inputs
    query, value = visit.of(tensors[0]), visit.of(tensors[1])
    key = visit.of(tensors[2]) if len(tensors) > 2 else value
    for labels in (query, key, value):
        visit.pin(labels[:-1], "attends along it")
    visit.tie([query[-1:], key[-1:]])
    if isinstance(visit.layer, _L.AdditiveAttention):
        visit.weight("scale", [query[-1]])
    return [[None, None, value[-1]], *[_labels.none(output.shape) for output in visit.outputs[1:]]]


def _table(*pairs: tuple[Sequence[Any], Any]) -> dict[Any, Any]:
    return {cls: rule for classes, rule in pairs for cls in classes}


_RECURRENT = [_recurrent(4), _recurrent(3), _recurrent(1)]
RULES: dict[Any, Callable[[Visit], list[Labels]]] = (
    _table(
        ((_L.Conv1D, _L.Conv2D, _L.Conv3D), _convolution),
        ((_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose), _transposed),
        ((_L.DepthwiseConv1D, _L.DepthwiseConv2D), _depthwise),
        ((_L.SeparableConv1D, _L.SeparableConv2D), _separable),
        ((_L.Dense,), _dense),
        ((_L.EinsumDense,), _einsum),
        ((_L.BatchNormalization,), _batch_norm),
        ((_L.LayerNormalization, _L.RMSNormalization, _L.UnitNormalization), _norm),
        ((_L.GroupNormalization,), _group_norm),
        ((_L.PReLU,), _prelu),
        ((_L.Embedding,), _embedding),
        ((_L.LSTM,), _RECURRENT[0]),
        ((_L.GRU,), _RECURRENT[1]),
        ((_L.SimpleRNN,), _RECURRENT[2]),
        ((_L.Bidirectional,), _bidirectional),
        ((_L.Attention, _L.AdditiveAttention), _attention),
        ((_L.MultiHeadAttention,), _heads.multi_head),
        ((_L.GroupQueryAttention,), _heads.grouped_query),
    )
    | _shapes.RULES
)
