"""How does a layer read its input as a linear map? Rows of what it reads, the kernel that maps them, and how to write another."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.surgery import _heads, _labels, _nodes
from keras_kd.surgery._labels import Labels
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._rules import letters
from keras_kd.surgery._visits import Record

_L = keras.layers
_CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)
_TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
_SEPARABLE = (_L.SeparableConv1D, _L.SeparableConv2D)
_RECURRENT = (_L.LSTM, _L.GRU, _L.SimpleRNN)
_KERNELS = ("kernel", "pointwise_kernel")


@dataclasses.dataclass
class Channels:
    """Columns that are the same channels at several positions.

    Attributes:
        old: `(positions, channels)`, columns of the old layer.
        new: `(positions, channels left)`, columns of the new layer.
        keep: which channels are still there.
    """

    old: np.ndarray
    new: np.ndarray
    keep: np.ndarray


@dataclasses.dataclass
class Part:
    """One linear map of a layer: `rows @ kernel + bias`.

    Attributes:
        source: the symbolic tensor that it reads, in the old model.
        rows: function of a batch of that tensor, whether it is the old network's, and chosen positions, that gives
            `(positions, columns)`.
        positions: function of a batch that gives the number of positions to choose from, samples one after the other.
        kernel: `(columns, outputs)` of the old layer; outputs are those that are still there.
        bias: `(outputs,)` of it, or None.
        start: `(columns left, outputs)` of the new layer.
        begin: its bias, or None.
        write: writes a kernel, and a bias where there is one, to the new layer.
        channels: which columns are one channel at several positions, where that is so.
        outputs: where these outputs stand among the layer's.
        shifts: whether a constant in all positions is a bias, so that a normalisation afterwards may take it.
        inside: for what is read inside the layer: function of what the call reads, by `id` of the symbolic tensors, and whether it
            is the old network's, that gives what `rows` and `positions` take in the place of a batch of the source.
        labels: of that.
    """

    source: Any
    rows: Callable[[Any, bool, np.ndarray], np.ndarray]
    positions: Callable[[Any], int]
    kernel: np.ndarray
    bias: np.ndarray | None
    start: np.ndarray
    begin: np.ndarray | None
    write: Callable[[np.ndarray, np.ndarray | None], None]
    channels: "Channels | None" = None
    outputs: slice = dataclasses.field(default_factory=lambda: slice(None))
    shifts: bool = True
    inside: Callable[[dict[int, Any], bool], Any] | None = None
    labels: Labels | None = None


def parts_of(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part] | str:
    """The linear maps of a layer that lost some of what it reads, or why they cannot be fitted.

    Args:
        rebuilt: the old and the new model.
        record: of the layer.
        node: a call of it.
    """
    layer = record.operation
    make = next((make for classes, make in _makers() if isinstance(layer, classes)), None)
    return f"there is no refit for {type(layer).__name__}" if make is None else make(rebuilt, record, node)


def can_be_fitted(layer: Any) -> bool:
    """Whether `parts_of` knows layers of this kind."""
    return any(isinstance(layer, classes) for classes, _ in _makers())


def _makers() -> list[tuple[tuple[Any, ...], Callable[..., Any]]]:
    return [
        (_CONVOLUTIONS, _convolution),
        (_TRANSPOSED, _transposed),
        (_SEPARABLE, _separable),
        ((_L.Dense,), _dense),
        ((_L.EinsumDense,), _einsum),
        (_RECURRENT, _recurrent),
        ((_L.Bidirectional,), _bidirectional),
        (_heads.LAYERS, _attention),
    ]


def read_axes(record: Record) -> list[np.ndarray]:
    """Atoms of what the kernels of a layer read, where more than one at a time gives an output."""
    layer, found = record.operation, []
    if isinstance(layer, (_L.DepthwiseConv1D, _L.DepthwiseConv2D)):
        return []
    for variable in getattr(layer, "variables", ()):
        axes = record.weights.get(id(variable))
        if axes is not None and variable.name in _KERNELS:
            found += [one for one in (axes[-1:] if isinstance(layer, _TRANSPOSED) else axes[:-1]) if one is not None]
    return found


def reads_less(rebuilt: Rebuilt, record: Record) -> bool:
    """Whether a kernel of a layer lost some of its inputs, and more than one at a time gives an output."""
    return any(not rebuilt.keep[one].all() for one in read_axes(record))


def _array(variable: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable), "float32")


def _source(node: Any) -> Any:
    return _nodes.tensors_in(node.arguments.args[:1] or node.arguments.kwargs.get("inputs"))[0]


def _kept(rebuilt: Rebuilt, record: Record, variable: Any, axis: int = -1) -> np.ndarray:
    """Which entries of an axis of a variable are still there."""
    atoms = record.weights[id(variable)][axis]
    return np.ones(variable.shape[axis], bool) if atoms is None else rebuilt.keep[atoms]


def _flat_rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
    """Each position's channels, the last axis."""
    values = np.asarray(ops.convert_to_numpy(x), "float32")
    return values.reshape(-1, values.shape[-1])[chosen]


def _flat_count(x: Any) -> int:
    return math.prod(x.shape[:-1])


def _simple(
    rebuilt: Rebuilt,
    record: Record,
    source: Any,
    owners: tuple[Any, Any],
    *,
    name: str = "kernel",
    rows: Any = _flat_rows,
    positions: Any = _flat_count,
    inputs: int = 1,
) -> Part:
    """A kernel of which the first `inputs` axes are read, and a bias of the outputs; `owners` hold the old and the new ones."""
    old, new = owners
    kernel, start = (_array(getattr(owner, name)) for owner in owners)
    bias = getattr(old, "bias", None)
    keep: np.ndarray = np.ones((), bool)
    for axis in range(inputs, len(kernel.shape)):
        keep = np.multiply.outer(keep, _kept(rebuilt, record, getattr(old, name), axis))
    keep = keep.ravel()
    wide = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)[:, keep]
    narrow = start.reshape(math.prod(start.shape[:inputs]), -1)
    biases = [None if bias is None else _array(owner.bias) for owner in owners]
    rowed = bias is not None and len(bias.shape) == 2 and isinstance(old, _L.GRUCell)  # one for inputs, one for states
    flat = [None if one is None else (one[0] if rowed else one).reshape(-1) for one in biases]
    if flat[0] is not None:
        flat[0] = flat[0][keep]

    def write(weights: np.ndarray, offset: np.ndarray | None) -> None:
        getattr(new, name).assign(weights.reshape(start.shape))
        if offset is not None and biases[1] is not None:
            new.bias.assign(np.stack([offset, biases[1][1]]) if rowed else offset.reshape(biases[1].shape))

    channels = _repeated(rebuilt, record.weights[id(getattr(old, name))][0]) if inputs == 1 else None
    return Part(source, rows, positions, wide, flat[0], narrow, flat[1], write, channels=channels)


def _repeated(rebuilt: Rebuilt, atoms: np.ndarray | None) -> Channels | None:
    """Channels that stand several times in what a layer reads, as after a Flatten; None where each stands once."""
    roots = rebuilt.found.rooted(atoms)
    unique, counts = np.unique(roots, return_counts=True)
    if not len(roots) or counts[0] == 1 or np.any(counts != counts[0]):
        return None
    keep = rebuilt.keep[unique]
    old = np.argsort(roots, kind="stable").reshape(len(unique), -1).T  # (positions, channels)
    new = (np.cumsum(rebuilt.keep[roots]) - 1)[old[:, keep]]
    return Channels(old, new, keep)


def _owners(rebuilt: Rebuilt, record: Record) -> tuple[Any, Any]:
    return record.operation, rebuilt.clones[id(record.operation)]


def _dense(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    return [_simple(rebuilt, record, _source(node), _owners(rebuilt, record))]


def _recurrent(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    """What a cell reads of its inputs; what units read of each other stays."""
    old, new = _owners(rebuilt, record)
    return [_simple(rebuilt, record, _source(node), (old.cell, new.cell))]


def _bidirectional(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    """The same in both directions."""
    names = ("forward_layer", "backward_layer")
    cells = [[getattr(layer, name).cell for layer in _owners(rebuilt, record)] for name in names]
    return [_simple(rebuilt, record, _source(node), (old, new)) for old, new in cells]


def _attention(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    """The projections of query, key, value and gate that lost inputs, then that of the output, if heads went; else all of them."""
    sources = _heads.sources_of(_heads.arguments_of(node.arguments.args, node.arguments.kwargs))
    old, new = (_heads.parts_of(layer) for layer in _owners(rebuilt, record))
    names = [name for name in old if name != "output"]
    lost = [name for name in names if not _kept(rebuilt, record, old[name].kernel, 0).all()]
    heads = record.made[_heads.HEADS]
    some = not rebuilt.keep[heads].all()
    parts = [_simple(rebuilt, record, sources[name], (old[name], new[name])) for name in lost or ([] if some else names)]
    return [*parts, _heads_read(rebuilt, record, node, sources["query"])] if some else parts


def _heads_read(rebuilt: Rebuilt, record: Record, node: Any, query: Any) -> Part:
    """The projection of the output, which reads what the heads give."""
    layers = _owners(rebuilt, record)

    def inside(read: dict[int, Any], is_old: bool) -> Any:
        return _heads.context_of(layers[0 if is_old else 1], node, read)

    def rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
        return _array(x).reshape(-1, math.prod(x.shape[-2:]))[chosen]

    def positions(x: Any) -> int:
        return math.prod(x.shape[:-2])

    owners = (layers[0]._output_dense, layers[1]._output_dense)
    part = _simple(rebuilt, record, query, owners, rows=rows, positions=positions, inputs=2)
    labels = [*_labels.none(query.shape[:-1]), record.made[_heads.HEADS], None]
    return dataclasses.replace(part, inside=inside, labels=labels)


def _einsum(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part] | str:
    """Equations that sum over the last axes of the input, and put the new ones in their place: `"abc,cde->abde"`."""
    layer = record.operation
    summed = summed_axes(layer, len(_source(node).shape))
    if isinstance(summed, str):
        return summed

    def rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
        return _array(x).reshape(-1, math.prod(x.shape[-summed:]))[chosen]

    def positions(x: Any) -> int:
        return math.prod(x.shape[:-summed])

    owners = _owners(rebuilt, record)
    return [_simple(rebuilt, record, _source(node), owners, rows=rows, positions=positions, inputs=summed)]


def summed_axes(layer: Any, rank: int) -> int | str:
    """How many of its input's last axes an EinsumDense sums over, to put its new ones in their place; or why it does not."""
    read, weights, given = letters(layer.equation, rank)
    beside = next((n for n in range(len(read)) if read[n] != given[n : n + 1]), len(read))
    summed = len(read) - beside
    if not summed or read[beside:] != weights[:summed] or given[beside:] != weights[summed:]:
        return "its equation is none that can be fitted"
    if layer.bias is not None and tuple(layer.bias.shape) != tuple(layer.kernel.shape[summed:]):
        return "its bias is not one of channels alone"
    return summed


def _transposed(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    """Each of its kernel's positions is a map of one position of the input; the sum over them is not looked at."""
    old, new = _owners(rebuilt, record)
    kernel, start = (np.moveaxis(_array(layer.kernel), -1, 0) for layer in (old, new))
    keep = np.tile(_kept(rebuilt, record, old.kernel, -2), math.prod(old.kernel_size))

    def rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
        values = _channels_last(old, _array(x))
        return values.reshape(-1, values.shape[-1])[chosen]

    def write(weights: np.ndarray, offset: np.ndarray | None) -> None:
        new.kernel.assign(np.moveaxis(weights.reshape(start.shape), 0, -1))

    def positions(x: Any) -> int:
        return int(x.shape[0] * math.prod(_inner(old, x)))

    wide = kernel.reshape(len(kernel), -1)[:, keep]
    return [Part(_source(node), rows, positions, wide, None, start.reshape(len(start), -1), None, write, shifts=False)]


def _convolution(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part] | str:
    """What its window shows, with the zeros around the image; groups one by one."""
    old, new = _owners(rebuilt, record)
    if new.groups != old.groups:
        return "whole groups of it went"
    kernel, start = _array(old.kernel), _array(new.kernel)
    keep = _kept(rebuilt, record, old.kernel)
    bias, begin = (None if layer.bias is None else _array(layer.bias) for layer in (old, new))
    current, offsets = start.reshape(-1, start.shape[-1]).copy(), None if begin is None else begin.copy()

    def positions(x: Any) -> int:
        return int(x.shape[0] * math.prod(_sizes(old, _inner(old, x))))

    def part(group: int) -> Part:
        wide, narrow = (slice(group * n // old.groups, (group + 1) * n // old.groups) for n in (len(keep), start.shape[-1]))

        atoms = record.weights[id(old.kernel)][-2]
        taps, left = math.prod(old.kernel_size), np.ones(kernel.shape[-2], bool) if atoms is None else rebuilt.keep[atoms]
        wide_table, narrow_table = (np.arange(taps * n).reshape(taps, n) for n in (len(left), int(left.sum())))

        def rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
            values = _channels_last(old, _array(x))
            width = values.shape[-1] // old.groups
            return patches(old, values[..., group * width : (group + 1) * width], chosen)

        def write(weights: np.ndarray, offset: np.ndarray | None) -> None:
            current[:, narrow] = weights
            new.kernel.assign(current.reshape(start.shape))
            if offset is not None and offsets is not None:
                offsets[narrow] = offset
                new.bias.assign(offsets)

        return Part(
            _source(node),
            rows,
            positions,
            kernel.reshape(-1, kernel.shape[-1])[:, wide][:, keep[wide]],
            None if bias is None else bias[wide][keep[wide]],
            current[:, narrow].copy(),
            None if begin is None else begin[narrow],
            write,
            channels=Channels(wide_table, narrow_table, left) if taps > 1 else None,
            outputs=narrow,
        )

    return [part(group) for group in range(old.groups)]


def _separable(rebuilt: Rebuilt, record: Record, node: Any) -> list[Part]:
    """The pointwise half: what the depthwise half gives is read like a Dense layer's input."""
    old, new = _owners(rebuilt, record)

    def rows(x: Any, is_old: bool, chosen: np.ndarray) -> np.ndarray:
        return _flat_rows(_depthwise_half(old if is_old else new, _channels_last(old, _array(x))), is_old, chosen)

    def positions(x: Any) -> int:
        return int(x.shape[0] * math.prod(_sizes(old, _inner(old, x))))

    axes = len(old.kernel_size) + 1
    return [
        _simple(rebuilt, record, _source(node), (old, new), name="pointwise_kernel", rows=rows, positions=positions, inputs=axes)
    ]


def _depthwise_half(layer: Any, values: np.ndarray) -> Any:
    if len(layer.kernel_size) == 2:
        return ops.depthwise_conv(
            values, layer.depthwise_kernel, layer.strides, layer.padding, "channels_last", layer.dilation_rate
        )
    padded = np.pad(values, [(0, 0), *_paddings(layer, values.shape[1:-1]), (0, 0)])[:, None]  # as images of height 1
    kernel = ops.expand_dims(layer.depthwise_kernel, 0)
    dilated = ops.depthwise_conv(padded, kernel, 1, "valid", "channels_last", (1, *layer.dilation_rate))
    return dilated[:, 0, :: layer.strides[0]]


def _channels_last(layer: Any, values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 1, -1) if layer.data_format == "channels_first" else values


def _inner(layer: Any, tensor: Any) -> list[int]:
    return list(tensor.shape[2:] if layer.data_format == "channels_first" else tensor.shape[1:-1])


def _reach(layer: Any) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]


def _sizes(layer: Any, inner: Any) -> list[int]:
    """Number of positions of a convolution's output along each axis."""
    pairs = zip(inner, _reach(layer), layer.strides, strict=True)
    if layer.padding == "valid":
        return [(n - reach) // stride + 1 for n, reach, stride in pairs]
    return [-(-n // stride) for n, _, stride in pairs]


def _paddings(layer: Any, inner: Any) -> list[tuple[int, int]]:
    """Zeros that a convolution puts before and after its input along each axis."""
    found = []
    for n, reach, stride in zip(inner, _reach(layer), layer.strides, strict=True):
        total = max((-(-n // stride) - 1) * stride + reach - n, 0)
        before = {"valid": 0, "causal": reach - 1}.get(layer.padding, total // 2)
        found.append((before, 0 if layer.padding != "same" else total - before))
    return found


def patches(layer: Any, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What a convolution reads at some positions of its output.

    Args:
        layer: the convolution.
        values: `(batch, *inner, channels)`.
        chosen: indices into `(batch, *positions)`, flat.

    Returns:
        `(chosen, kernel positions * channels)`, in the order of the kernel's axes.
    """
    inner = values.shape[1:-1]
    padded = np.pad(values, [(0, 0), *_paddings(layer, inner), (0, 0)])
    sample, *places = np.unravel_index(chosen, (len(values), *_sizes(layer, inner)))
    axes = len(inner)
    index: list[np.ndarray] = [sample.reshape(-1, *[1] * axes)]
    for axis, (place, size) in enumerate(zip(places, layer.kernel_size, strict=True)):
        steps = np.arange(size) * layer.dilation_rate[axis]
        shape = [-1 if i == axis + 1 else 1 for i in range(axes + 1)]
        index.append((place * layer.strides[axis]).reshape(-1, *[1] * axes) + steps.reshape(shape))
    return padded[tuple(index)].reshape(len(chosen), -1)


def reader_of(layer: Any, node: Any) -> tuple[Any, Callable[[Any], int], Callable[[Any, np.ndarray], np.ndarray]]:
    """How a Dense or EinsumDense layer or a convolution without groups reads its input.

    Args:
        layer: the layer; an EinsumDense sums over the last axes of its input.
        node: a call of it.

    Returns:
        The symbolic tensor that it reads; functions of a batch of that, the number of positions, and rows at chosen ones,
        `(positions, columns)`.
    """
    source = _source(node)
    if isinstance(layer, _CONVOLUTIONS):
        return (
            source,
            lambda x: int(x.shape[0] * math.prod(_sizes(layer, _inner(layer, x)))),
            lambda x, chosen: patches(layer, _channels_last(layer, _array(x)), chosen),
        )
    summed = int(summed_axes(layer, len(source.shape))) if isinstance(layer, _L.EinsumDense) else 1
    return (
        source,
        lambda x: math.prod(x.shape[: len(x.shape) - summed]),
        lambda x, chosen: _array(x).reshape(-1, math.prod(x.shape[len(x.shape) - summed :]))[chosen],
    )
