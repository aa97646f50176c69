"""Where can a network be looked at, and what does each place read? From one trace of its inference."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kd import _calls, _taps
from keras_kd.analysis._flows import CONVOLUTIONS, CROPPINGS, PADDINGS, POOLINGS, Links


@dataclasses.dataclass(frozen=True)
class Window:
    """What one position of an output reads: along each inner axis, positions `jump * i + start` to `jump * i + start + size - 1`.

    Attributes:
        jump: steps in the input for one step in the output.
        start: where position 0 begins.
        size: number of positions; those outside of the input are zeros.
    """

    jump: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def point(cls, axes: int) -> "Window":
        """The position itself."""
        return cls((1,) * axes, (0,) * axes, (1,) * axes)

    def after(self, inner: "Window") -> "Window":
        """What this window reads through another one that stands before it."""
        jump = tuple(a * b for a, b in zip(self.jump, inner.jump, strict=True))
        start = tuple(j * s + t for j, s, t in zip(inner.jump, self.start, inner.start, strict=True))
        size = tuple((n - 1) * j + m for n, j, m in zip(self.size, inner.jump, inner.size, strict=True))
        return Window(jump, start, size)

    def around(self, other: "Window | None") -> "Window | None":
        """The smallest window that holds both; None where their steps differ."""
        if other is None or other.jump != self.jump:
            return None
        start = tuple(map(min, self.start, other.start))
        ends = [max(s + n, t + m) for s, n, t, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        return Window(self.jump, start, tuple(end - s for end, s in zip(ends, start, strict=True)))

    def cut(self, positions: int) -> "Window":
        """The middle part with at most this number of positions."""
        size, start = list(self.size), list(self.start)
        while math.prod(size) > max(positions, 1):
            axis = max(range(len(size)), key=size.__getitem__)
            start[axis] += size[axis] > 2 or size[axis] - 1
            size[axis] -= min(2, size[axis] - 1)
        return Window(self.jump, tuple(int(s) for s in start), tuple(size))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a place reads.

    Attributes:
        call: name of the call whose input it is.
        index: which of its input tensors.
        window: what each position reads; None for all of it.
        columns: number of features.
    """

    call: str
    index: int
    window: Window | None
    columns: int


@dataclasses.dataclass
class Place:
    """A call of a layer that gives one tensor of floats.

    Attributes:
        name: as in `_calls.trace`.
        path: path of the layer.
        layer: the layer.
        channels: width of the last axis.
        positions: number of positions of a sample, None where it varies.
        readings: what a linear map from its input to its output reads; empty where no such map is known.
        reason: why `readings` is empty.
        same_shape: whether input and output have the same shape.
        cut: whether a window was cut to its middle.
        members: of a block: paths of the layers in it.
        escapes: of a block: who reads what is inside of it from outside, "" if nobody does.
    """

    name: str
    path: str
    layer: Any
    channels: int
    positions: int | None
    readings: list[Reading]
    reason: str = ""
    same_shape: bool = False
    cut: bool = False
    members: tuple[str, ...] = ()
    escapes: str = ""


def input_specs(model: keras.Model, batch: Any) -> Any:
    """Shapes and types of a model's inputs, with any number of samples, nested as the batch is."""
    specs = _taps.input_specs(model) if getattr(model, "inputs", None) else None
    if specs is None:  # of subclassed models the batch tells more than how they were built: whole numbers, say
        specs = keras.tree.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), batch)
    return keras.tree.map_structure(lambda spec: tf.TensorSpec((None, *spec.shape[1:]), spec.dtype), specs)


def find_places(trace: _calls.Trace) -> dict[str, _calls.Call]:
    """Calls that give one tensor of floats with a known width, by name; each tensor once."""
    found: dict[str, _calls.Call] = {}
    seen = {id(tensor) for tensor in trace.inputs}
    for call in trace.calls:
        output = call.outputs[0] if len(call.outputs) == 1 else None
        if output is None or not output.dtype.is_floating or output.shape.rank is None or output.shape.rank < 2:
            continue
        if output.shape[-1] is None or id(output) in seen:  # dropout gives what it got
            continue
        seen.add(id(output))
        found[call.name] = call
    return found


def make_place(call: _calls.Call, max_columns: int) -> Place:
    """A place with what its layer reads."""
    output = call.outputs[0]
    inner = output.shape[1:-1]
    place = Place(call.name, call.path, call.layer, int(output.shape[-1]), inner.num_elements(), [])
    windows = [_window_of(call.layer, tensor, output) for tensor in call.inputs]
    place.readings, place.reason = _readings(call, call.inputs, windows, output, max_columns)
    place.same_shape = _same_shape(call.inputs[:1], output)
    place.cut = _is_cut(place, windows)
    return place


def make_block(trace: _calls.Trace, first: _calls.Call, last: _calls.Call, max_columns: int) -> Place:
    """A place whose input is that of `first` and whose output is that of `last`.

    Raises:
        ValueError: if `last` does not follow from `first`.
    """
    links = Links(trace)
    after = links.following([*first.outputs])
    if first is not last and last.name not in after:
        raise ValueError(
            "`blocks` must be pairs (first, last) of which the last follows from the first. Received: "
            f'"{first.name}", "{last.name}".'
        )
    reached: dict[int, dict[int, Any]] = {id(t): {i: _identity(t)} for i, t in enumerate(first.inputs)}
    inside: dict[str, set[str]] = {}  # who stands before whom
    for call in trace.calls:
        windows: dict[int, Any] = {}
        for tensor in call.inputs:
            own = _window_of(call.layer, tensor, call.outputs[0]) if call.outputs else None
            for source in links.sources(tensor, reached):
                inside.setdefault(call.name, set()).add(links.giver.get(id(source), ""))
                for index, window in reached.get(id(source), {}).items():
                    through = own.after(window) if isinstance(own, Window) and isinstance(window, Window) else None
                    windows[index] = through if index not in windows else _around(windows[index], through)
        if windows:
            for tensor in call.outputs:
                reached.setdefault(id(tensor), windows)
        if call is last:
            break
    output = last.outputs[0]
    found = reached.get(id(output), {})
    inputs = [first.inputs[index] for index in found]
    name = f"{first.name} .. {last.name}"
    place = Place(name, last.path, last.layer, int(output.shape[-1]), output.shape[1:-1].num_elements(), [])
    place.readings, place.reason = _readings(first, inputs, list(found.values()), output, max_columns, list(found))
    place.same_shape = _same_shape(inputs[:1], output)
    place.cut = _is_cut(place, list(found.values()))
    members, pending = {last.name}, [last.name]
    while pending:
        for name in inside.get(pending.pop(), ()):
            if name and name in inside and name not in members:
                members.add(name)
                pending.append(name)
    calls = [call for call in trace.calls if call.name in members]
    place.members = tuple(call.path for call in calls)
    place.escapes = links.escape([call for call in calls if call is not last], members)
    return place


def _is_cut(place: Place, windows: Sequence[Any]) -> bool:
    whole = sum(math.prod(window.size) if window is not None else 1 for window in windows)
    return bool(place.readings) and sum(math.prod(r.window.size) if r.window is not None else 1 for r in place.readings) < whole


def _same_shape(inputs: Sequence[Any], output: Any) -> bool:
    return bool(inputs) and inputs[0].shape.rank is not None and inputs[0].shape[1:].as_list() == output.shape[1:].as_list()


def middle(place: Place) -> int | None:
    """First column of what a place reads at the same position, if it reads one tensor of the shape of its output."""
    if len(place.readings) != 1:
        return None
    reading = place.readings[0]
    if reading.window is None:
        return None
    width = reading.columns // math.prod(reading.window.size)
    at = 0
    for jump, start, size in zip(reading.window.jump, reading.window.start, reading.window.size, strict=True):
        if jump != 1 or not 0 <= -start < size:
            return None
        at = at * size - start
    return at * width if width == place.channels and place.same_shape else None


def _identity(tensor: Any) -> Window:
    return Window.point(max(len(tensor.shape) - 2, 0))


def _around(a: Any, b: Any) -> Any:
    return a.around(b) if isinstance(a, Window) else None


def _readings(
    call: _calls.Call, inputs: Sequence[Any], windows: Sequence[Any], output: Any, max_columns: int, indices: Sequence[int] = ()
) -> tuple[list[Reading], str]:
    """What a linear map to `output` reads, or why there is none."""
    made: list[Reading] = []
    seen: set[int] = set()
    for position, (tensor, window) in enumerate(zip(inputs, windows, strict=True)):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not tensor.dtype.is_floating or tensor.shape.rank is None or tensor.shape.rank < 2 or tensor.shape[-1] is None:
            return [], "its input is no tensor of floats with a known width"
        index = indices[position] if indices else position
        width = int(tensor.shape[-1])
        if window is None and output.shape.rank > 2:
            return [], "it is not known what each of its positions reads"
        if window is None:
            columns = tensor.shape[1:].num_elements() or max_columns + 1
            if columns > max_columns:
                return [], f"it reads more than {max_columns} features"
            made.append(Reading(call.name, index, None, int(columns)))
            continue
        if width > max_columns:
            return [], f"it reads more than {max_columns} features"
        window = window.cut(max_columns // width)
        made.append(Reading(call.name, index, window, width * math.prod(window.size)))
    if not made or sum(reading.columns for reading in made) > max_columns:
        return [], f"it reads more than {max_columns} features" if made else "it reads no tensor"
    return made, ""


def _window_of(layer: Any, tensor: Any, output: Any) -> Window | None:
    """What one position of a layer's output reads of an input; None for all of it, or where it is not known."""
    if tensor.shape.rank is None or tensor.shape.rank != output.shape.rank:
        return None
    axes = tensor.shape.rank - 2
    if axes < 0:
        return None
    sizes = tensor.shape[1:-1].as_list()
    if isinstance(layer, CONVOLUTIONS):
        reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
        return _strided(reach, list(layer.strides), layer.padding, sizes)
    if isinstance(layer, POOLINGS):
        strides = layer.strides or layer.pool_size
        return _strided(_several(layer.pool_size, axes), _several(strides, axes), layer.padding, sizes)
    if isinstance(layer, PADDINGS):
        return Window((1,) * axes, tuple(-p for p in _befores(layer.padding, axes)), (1,) * axes)
    if isinstance(layer, CROPPINGS):
        return Window((1,) * axes, tuple(_befores(layer.cropping, axes)), (1,) * axes)
    same = tensor.shape[1:-1].as_list() == output.shape[1:-1].as_list()
    return Window.point(axes) if same else None


def _several(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value)


def _befores(value: Any, axes: int) -> list[int]:
    pairs = value if axes > 1 else [value]
    return [one if isinstance(one, int) else one[0] for one in pairs]


def _strided(reach: list[int], strides: list[int], padding: str, sizes: list[int | None]) -> Window:
    starts = []
    for size, stride, length in zip(reach, strides, sizes, strict=True):
        if padding == "causal":
            starts.append(1 - size)
        elif padding == "same":
            covered = length if length is not None else stride
            starts.append(-(max((math.ceil(covered / stride) - 1) * stride + size - covered, 0) // 2))
        else:
            starts.append(0)
    return Window(tuple(strides), tuple(starts), tuple(reach))
