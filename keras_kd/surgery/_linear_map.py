"""Which linear layer gives nearly what a block of layers does? Its window, and least squares on what the block reads and gives."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _calls, _taps
from keras_kd._moments import Moments, RidgeFit, ridge
from keras_kd.analysis import _places as _windows
from keras_kd.surgery import _nodes, _reading
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._places import Block, inputs_of
from keras_kd.surgery._rebuild import Rebuilt, Replacement

_L = keras.layers
_CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)
_PADDINGS = (_L.ZeroPadding1D, _L.ZeroPadding2D, _L.ZeroPadding3D)
_CROPPINGS = (_L.Cropping1D, _L.Cropping2D, _L.Cropping3D)
_PENALTIES = (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the mean variance of the inputs
_ROWS = 4096  # of a batch, or four for each feature


@dataclasses.dataclass
class Map:
    """Layers that are a linear map together.

    Attributes:
        layers: new layers; the last of them has the weights.
        pads: zeros that go before and after the input along each inner axis; negative ones are cut off.
        columns: number of features that each output reads.
    """

    layers: list[Any]
    pads: list[tuple[int, int]]
    columns: int

    def rows(self, read: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """What the map reads at some positions of its output."""
        layer = self.layers[-1]
        if not isinstance(layer, _CONVOLUTIONS):
            return read.reshape(-1, self.columns)[chosen]
        for axis, (before, after) in enumerate(self.pads, 1):
            widths = [(0, 0)] * read.ndim
            widths[axis] = (max(before, 0), max(after, 0))
            kept = slice(max(-before, 0), read.shape[axis] - max(-after, 0))
            read = np.pad(read[(slice(None),) * axis + (kept,)], widths)
        return _reading.patches(layer, read, chosen)

    def weights(self, fit: RidgeFit) -> list[list[np.ndarray]]:
        """Weights of the layers."""
        layer = self.layers[-1]
        kernel = (
            fit.kernel.reshape(*layer.kernel_size, -1, fit.kernel.shape[-1]) if isinstance(layer, _CONVOLUTIONS) else fit.kernel
        )
        return [*[[]] * (len(self.layers) - 1), [kernel, fit.bias]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The best linear map of a block.

    Attributes:
        replacement: what stands for the block.
        columns: number of features that each output reads.
        rows: number of positions that it was fitted on.
        l2: penalty that was chosen, relative to the mean variance of the inputs.
        r2: share of the output's variance that it gives on samples that the fit did not see.
        error: root mean square of what it is off by on these.
    """

    replacement: Replacement
    columns: int
    rows: int
    l2: float
    r2: float
    error: float


def fit(found: Analysis, block: Block, batches: Iterable[list[Any]], max_columns: int) -> Fitted:
    """Fits a linear map to a block.

    Args:
        found: analysis of the model.
        block: the block.
        batches: inputs of the model, flat.
        max_columns: most features that it may read; windows are cut to their middle.

    Raises:
        ValueError: if no linear map is known, and for data that are too few or not finite.
    """
    made = _map_of(found, block, max_columns)
    outputs = int(block.last.outputs[0].shape[-1])
    seen, unseen = (Moments.empty(made.columns + outputs) for _ in range(2))
    rng = np.random.default_rng(0)
    number = 0
    for read, given in _pairs(found, block, batches):
        held_out = np.arange(number, number + len(read)) % 4 == 3
        number += len(read)
        for part, moments in ((~held_out, seen), (held_out, unseen)):
            targets = given[part].reshape(-1, outputs)
            most = max(_ROWS, 4 * made.columns)
            chosen = np.sort(rng.choice(len(targets), min(most, len(targets)), replace=False))
            if len(chosen):
                moments.add(Moments.of(np.concatenate([made.rows(read[part], chosen), targets[chosen]], axis=1)))
    if seen.rows <= made.columns + 1 or not unseen.rows:
        raise ValueError(
            f"`data` must give more rows than the linear map has features, {made.columns}, in three quarters of the samples. "
            f"Received: {seen.rows}. Give more samples."
        )
    if not (np.isfinite(seen.mean).all() and np.isfinite(unseen.mean).all()):
        raise ValueError("`data` must give finite numbers everywhere. Received: NaN or infinity in what the block reads or gives.")
    return _solved(made, seen, unseen)


def _solved(made: Map, seen: Moments, unseen: Moments) -> Fitted:
    """Fits on some samples, measures on others, and fits once more on all with the same penalty."""
    columns = made.columns
    scale = float(np.trace(seen.scatter[:columns, :columns])) / columns or 1.0
    first = ridge(seen, columns, [l2 * scale for l2 in _PENALTIES])
    left = _left(unseen, first, columns)
    whole = float(np.trace(unseen.scatter[columns:, columns:]))
    share = first.l2 / scale
    rows = seen.rows + unseen.rows
    seen.add(unseen)
    best = ridge(seen, columns, [share * float(np.trace(seen.scatter[:columns, :columns])) / columns])
    r2 = 1 - left / whole if whole else float(left <= 0)
    error = math.sqrt(left / unseen.weight / (len(unseen.mean) - columns))
    return Fitted(Replacement(made.layers, made.weights(best)), columns, rows, share, r2, error)


def _left(moments: Moments, fit: RidgeFit, columns: int) -> float:
    """Sum of squares of what a fit is off by."""
    inner, cross = moments.scatter[:columns, :columns], moments.scatter[:columns, columns:]
    spread = np.trace(moments.scatter[columns:, columns:]) + np.sum(fit.kernel * (inner @ fit.kernel - 2 * cross))
    off = moments.mean[columns:] - moments.mean[:columns] @ fit.kernel - fit.bias
    return max(float(spread + moments.weight * off @ off), 0.0)


def _pairs(found: Analysis, block: Block, batches: Iterable[list[Any]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the block reads and gives: for each batch, and for each time that it is used."""
    model = found.model
    structure = _nodes.graph_of(model)._inputs_struct
    readers = [node for node in block.nodes if inputs_of(node) == [block.start]]
    first = next((node for node in readers if len(found.records[id(node.operation)].outputs) == 1), None)
    if first is None:
        name = found.records[id(readers[0].operation)].path
        raise ValueError(f'A block must begin with a layer that is used once. Received: "{name}", which is used several times.')
    seen: dict[str, list[np.ndarray]] = {"read": [], "given": []}

    def array(values: Any) -> np.ndarray:
        tensor = next(t for t in keras.tree.flatten(values) if tf.is_tensor(t))
        return np.asarray(keras.ops.convert_to_numpy(tensor), "float32")

    def reading(call: Any, *args: Any, **kwargs: Any) -> Any:
        seen["read"].append(array((args, kwargs)))
        return call(*args, **kwargs)

    def giving(call: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        seen["given"].append(array(result))
        return result

    def both(call: Any, *args: Any, **kwargs: Any) -> Any:
        return giving(lambda *a, **k: reading(call, *a, **k), *args, **kwargs)

    for batch in batches:
        with contextlib.ExitStack() as stack:
            if first.operation is block.last.operation:
                stack.enter_context(_taps.replace(first.operation, both))
            else:
                stack.enter_context(_taps.replace(first.operation, reading))
                stack.enter_context(_taps.replace(block.last.operation, giving))
            model(keras.tree.pack_sequence_as(structure, batch), training=False)
        yield from zip(seen["read"], seen["given"], strict=True)
        seen["read"].clear()
        seen["given"].clear()


def _map_of(found: Analysis, block: Block, max_columns: int) -> Map:
    """A linear map that reads what a block's outputs depend on."""
    read, given = block.start, block.last.outputs[0]
    name = f'The block up to "{found.records[id(block.last.operation)].path}"'
    if not all(keras.backend.is_float_dtype(t.dtype) and len(t.shape) > 1 and t.shape[-1] is not None for t in (read, given)):
        told = ", ".join(f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in (read, given))
        raise ValueError(f"{name} must read and give floats with a known number of channels. Received: {told}.")
    width, units = int(read.shape[-1]), int(given.shape[-1])
    reading, reason = _reading_of(found, block, max_columns)
    same = tuple(read.shape[1:-1]) == tuple(given.shape[1:-1])
    options = {"name": block.last.operation.name, "dtype": _policy(block)}
    if reading is not None and reading.window is None and len(given.shape) == 2:
        layers = [_L.Flatten()] if len(read.shape) > 2 else []
        return Map([*layers, _L.Dense(units, **options)], [], reading.columns)
    if reading is None and not same:
        raise ValueError(f"{name} has no linear map that is known: {reason or 'its steps are not known'}.")
    axes = len(given.shape) - 2
    window = _windows.Window.point(axes) if reading is None or reading.window is None else reading.window
    if axes not in (1, 2, 3) or (axes == 1 and window == _windows.Window.point(1)):
        return Map([_L.Dense(units, **options)], [], width)
    made = _convolution(window, list(read.shape[1:-1]), list(given.shape[1:-1]), units, options)
    if made is None:
        raise ValueError(f"{name} pads its input in a way that needs its size. Received: an input of shape {tuple(read.shape)}.")
    return Map(*made, width * math.prod(window.size))


def _policy(block: Block) -> Any:
    """The type that the block's layers compute in."""
    return next((n.operation.dtype_policy for n in reversed(block.nodes) if isinstance(n.operation, _L.Layer)), None)


def _convolution(
    window: Any, read: list[int | None], given: list[int | None], units: int, options: dict[str, Any]
) -> tuple[list[Any], list[tuple[int, int]]] | None:
    """A convolution that reads such windows, with the padding that it needs; None where that needs unknown sizes."""
    axes = len(read)
    kind = _CONVOLUTIONS[axes - 1]
    for padding in ("valid", "same", *(["causal"] if axes == 1 else [])):
        layer = kind(units, window.size, strides=window.jump, padding=padding, **options)
        fits = list(layer.compute_output_shape((None, *read, 1))[1:-1]) == given
        if fits and _windows._strided(list(window.size), list(window.jump), padding, read) == window:
            return [layer], []
    if None in read or None in given:
        return None
    pads = []
    for n, m, jump, start, size in zip(read, given, window.jump, window.start, window.size, strict=True):
        pads.append((-start, (m - 1) * jump + size + start - n))  # type: ignore[operator]
    layers: list[Any] = []
    for kinds, sign in ((_CROPPINGS, -1), (_PADDINGS, 1)):
        several = tuple(tuple(max(sign * one, 0) for one in pair) for pair in pads)
        if any(map(any, several)):
            layers.append(kinds[axes - 1](several if axes > 1 else several[0]))
    return [*layers, kind(units, window.size, strides=window.jump, **options)], pads


def _reading_of(found: Analysis, block: Block, max_columns: int) -> tuple[Any, str]:
    """What the analysis knows of the positions that a block's outputs read; or why it knows nothing."""
    clones = Rebuilt(found, set()).clones
    start = keras.Input(batch_shape=block.start.shape, dtype=block.start.dtype)
    values = {id(block.start): start}
    for node in block.nodes:
        args, kwargs = node.arguments.fill_in(values)
        given = keras.tree.flatten(clones[id(node.operation)](*args, **kwargs))
        values.update({id(old): new for old, new in zip(node.outputs, given, strict=True)})
    model = keras.Model(start, values[id(block.last.outputs[0])])
    trace = _calls.trace(model, tf.TensorSpec((None, *block.start.shape[1:]), block.start.dtype))
    last = next((c for c in reversed(trace.calls) if any(t is trace.outputs[0] for t in c.outputs)), None)
    if last is None:
        return None, "what it gives is what no layer gives"
    first = _calls.Call("", "", None, trace.inputs, trace.inputs, 0, 0)
    place = _windows.make_block(trace, first, last, max_columns)
    return (place.readings[0], "") if place.readings else (None, place.reason)
