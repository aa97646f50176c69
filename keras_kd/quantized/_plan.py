"""Where in a model are integers possible? Finds, on one trace of its inference, what is rounded and which ranges that takes."""

import bisect
import dataclasses
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import keras

from keras_kd import _calls
from keras_kd._calls import find_leaves
from keras_kd.quantized import _kinds, _operations
from keras_kd.quantized._forms import form_of
from keras_kd.quantized._operations import consumers, is_float, key_of, source_of
from keras_kd.quantized._quantizers import FIXED_RANGES


@dataclasses.dataclass
class Spot:
    """One call of one layer.

    Attributes:
        kind: see `_kinds`.
        inputs: by place among the arguments, the range that an input is rounded to; None for an input as it comes.
        output: the range of the output; None if it stays as it is.
        inner: ranges between the parts of a layer: "linear", before the activation; "between" two kernels, or kernel and bias;
            "product", of a normalisation's factor.
    """

    kind: str
    inputs: list[int | None]
    output: int | None = None
    inner: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plan:
    """What is rounded in a model; ranges are referred to by number.

    Attributes:
        spots: by path of the layer, its calls in order.
        bits: by path of the layer, of its kernels.
        fixed: ranges that are no statistics but LiteRT's, by number.
        names: of each range, for people.
        activation_bits: bits of all activations; None if only kernels are rounded.
        floats: layers that compute in float, with their classes.
        leaves: paths and classes of all layers without parts: a copy of the model may call them otherwise, in the same order.
    """

    spots: dict[str, list[Spot]] = dataclasses.field(default_factory=dict)
    bits: dict[str, int] = dataclasses.field(default_factory=dict)
    fixed: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=list)
    activation_bits: int | None = 8
    floats: list[str] = dataclasses.field(default_factory=list)
    leaves: list[list[str]] = dataclasses.field(default_factory=list)

    def get_config(self) -> dict[str, Any]:
        """A dict that JSON can write."""
        return dataclasses.asdict(self) | {"fixed": [[number, *limits] for number, limits in self.fixed.items()]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Plan":
        """The plan again."""
        spots = {path: [Spot(**spot) for spot in calls] for path, calls in config["spots"].items()}
        fixed = {int(number): (low, high) for number, low, high in config["fixed"]}
        return cls(**config | {"spots": spots, "fixed": fixed})


def match_leaves(model: keras.Model, plan: Plan) -> dict[str, Any]:
    """The layers of a model that a plan speaks of, by the paths of the plan.

    Raises:
        ValueError: if the model does not have them.
    """
    leaves = find_leaves(model)
    if [kind for _, kind in plan.leaves] == [type(layer).__name__ for layer in leaves.values()]:
        leaves = {path: layer for (path, _), layer in zip(plan.leaves, leaves.values(), strict=True)}
    missing = [path for path in plan.spots if path not in leaves]
    if missing:
        raise ValueError(f'The model "{model.name}" has no layers {", ".join(missing)}, which the plan rounds.')
    return {path: leaves[path] for path in plan.spots}


class _Call:
    """A call of a layer, and what is planned for it."""

    def __init__(self, call: _calls.Call, kind: str, unwanted: bool) -> None:
        self.path, self.name, self.layer, self.inputs = call.path, call.name, call.layer, call.inputs
        self.start, self.end, self.kind, self.outputs = call.start, call.end, kind, call.outputs
        single = len(call.outputs) == 1 and is_float(call.outputs[0])
        self.output = call.outputs[0] if single else None  # None for layers that give several tensors, or no floats
        self.fixed = ""  # the name of the function, for the kind FIXED
        if kind == _kinds.FIXED:
            self.fixed = _kinds.fixed_name(call.layer)
        elif kind == _kinds.FLOAT and self.output is not None and not unwanted:
            self.kind, self.fixed = _operations.kind_of_call(call.inputs, self.output)
        self.spot = Spot(self.kind, [None] * len(call.inputs))


class _Planner:
    """Goes through the calls of a trace in order; see the kinds for the rules."""

    def __init__(self, plan: Plan, calls: list[_Call], graph: Any, outputs: list[Any]) -> None:
        self.plan, self.calls = plan, calls
        self.places = {operation.name: place for place, operation in enumerate(graph.get_operations())}
        self.results, self.outputs = outputs, {key_of(tensor) for tensor in outputs}
        self.made = {key_of(call.output): call for call in calls if call.output is not None and not _is_input(call)}
        self.ranges: dict[int, int] = {}  # by key of the tensor
        self.inside: set[int] = set()  # tensors between the parts of a group
        self.at_readers: set[int] = set()  # tensors that no layer gives: who reads them rounds them
        self.done: set[int] = set()  # calls that compute on integers

    def run(self) -> None:
        """Plans every call."""
        for call in self.calls:
            if id(call) in self.done:
                continue
            known = [tensor for tensor in call.inputs if key_of(tensor) in self.ranges.keys() | self.inside]
            if call.kind == _kinds.KERNEL or (known and call.kind != _kinds.FLOAT):
                self.quantize(call)

    def quantize(self, call: _Call) -> None:
        """Lets a call compute on integers."""
        self.done.add(id(call))
        numbers = [self.range_of_input(call, place) for place in range(len(call.inputs))]
        if call.output is None or _is_input(call):
            return
        if call.kind in (_kinds.CARRIER, _kinds.POOL):
            self.carry(call, next((number for number in numbers if number is not None), None))
        elif call.kind == _kinds.JOINT:
            self.join(call, numbers)
        elif call.kind == _kinds.KERNEL:
            self.finish_kernel(call)
        elif call.kind == _kinds.NORM:
            if key_of(call.inputs[0]) not in self.inside:
                call.spot.inner["product"] = self.new(f"{call.name}, product")
            self.finish(call, self.is_followed(call, _kinds.RELU))
        elif call.kind == _kinds.FIXED:
            self.finish(call, False, FIXED_RANGES[call.fixed])
        else:
            fuses = type(call.layer).__name__ in _kinds.FOLLOWED_BY_RELU
            self.finish(call, fuses and self.is_followed(call, _kinds.RELU))

    def finish_kernel(self, call: _Call) -> None:
        """Plans what a layer with a kernel gives."""
        form = form_of(call.layer)
        if form is not None and form.has_between(call.layer, len(call.inputs[0].shape)):
            call.spot.inner["between"] = self.new(f"{call.name}, between")
        kind = _kinds.function_kind(getattr(call.layer, "activation", None))
        takes_relu = form is not None and form.takes_relu
        if kind == _kinds.CARRIER or (kind == _kinds.RELU and takes_relu):
            folds = form is not None and form.takes_norm(call.layer, call.inputs[0].shape) and self.is_followed(call, _kinds.NORM)
            self.finish(call, kind == _kinds.CARRIER and (folds or (takes_relu and self.is_followed(call, _kinds.RELU))))
            return
        call.spot.inner["linear"] = self.new(f"{call.name}, before its activation")
        if kind == _kinds.FLOAT:  # its reader rounds what it gives
            self.plan.floats.append(f"{call.path} (activation {getattr(call.layer.activation, '__name__', 'of its own')})")
        else:
            fixed = FIXED_RANGES[_kinds.function_name(call.layer.activation)] if kind == _kinds.FIXED else None
            self.finish(call, False, fixed)

    def finish(self, call: _Call, inside: bool, fixed: tuple[float, float] | None = None) -> None:
        """Gives the output a range, unless it is inside a group."""
        if inside:
            self.inside.add(key_of(call.output))
        else:
            call.spot.output = self.ranges[key_of(call.output)] = self.new(call.name, fixed)

    def carry(self, call: _Call, number: int | None) -> None:
        """The output has the range of the input."""
        if number is not None:
            self.ranges[key_of(call.output)] = number
            call.spot.output = number if call.kind == _kinds.POOL else None

    def join(self, call: _Call, numbers: list[int | None]) -> None:
        """Inputs that nobody else reads take the range of the output; the converter rounds the others a second time."""
        self.finish(call, False)
        shared = self.ranges[key_of(call.output)]
        for place, number in enumerate(numbers):
            key = key_of(call.inputs[place])
            maker = self.made.get(key)
            alone = len(self.readers(call.inputs[place])) == 1 and key not in self.outputs
            if key in self.at_readers:
                call.spot.inputs[place] = shared
            elif alone and number not in self.plan.fixed and maker is not None and maker.spot.output == number:
                maker.spot.output = self.ranges[key] = shared

    def range_of_input(self, call: _Call, place: int) -> int | None:
        """The range of an input, which is made if it has none; None inside a group, and for what is no float."""
        tensor = call.inputs[place]
        if not is_float(tensor):
            return None
        number = self.range_of(tensor, f"input {place} of {call.name}")
        if key_of(tensor) in self.at_readers:
            call.spot.inputs[place] = number
        return number

    def range_of(self, tensor: Any, name: str) -> int | None:
        """The range of a tensor, by this name if one is made."""
        key = key_of(tensor)
        if key in self.inside:
            return None
        maker = self.made.get(key)
        if key not in self.ranges:
            if maker is None:
                origin = _operations.moved_from(tensor)
                number = None if key_of(origin) == key else self.range_of(origin, name)
                self.ranges[key] = self.new(name) if number is None else number
                self.at_readers.add(key)
            elif maker.kind == _kinds.FLOAT or id(maker) in self.done:
                maker.spot.output = self.ranges[key] = self.new(maker.name)
            else:
                self.quantize(maker)
        return self.ranges.get(key)

    def new(self, name: str, fixed: tuple[float, float] | None = None) -> int:
        """A new range."""
        number = len(self.plan.names)
        self.plan.names.append(name)
        if fixed is not None:
            self.plan.fixed[number] = fixed
        return number

    def is_followed(self, call: _Call, kind: str) -> bool:
        """Whether all that reads the output is one call of this kind."""
        readers = self.readers(call.output)
        return len(readers) == 1 and readers[0] is not None and readers[0].kind == kind and key_of(call.output) not in self.outputs

    def readers(self, tensor: Any) -> list[_Call | None]:
        """The calls that read a tensor, each once; None stands for operations outside of all layers."""
        maker = self.made.get(key_of(tensor))
        found = {id(call): call for call in map(self._call_of, consumers(source_of(tensor))) if call is not maker}
        return list(found.values())

    def name_floats(self, inputs: list[Any], unwanted: set[str]) -> list[str]:
        """Layers, and operations between them, that compute in float, but for those that nobody wants in integers."""
        whole: list[_Call] = []
        found: list[tuple[int, str, _Call | None]] = []
        for call in self.calls:
            known = id(call) in self.done and call.kind != _kinds.FLOAT
            if known or call.output is None or not _operations.operations_between(set(map(key_of, call.inputs)), call.output):
                whole.append(call)  # nothing is known of what is inside
                if not known and call.output is not None:
                    found.append((call.start, call.path, call))
        given = {key_of(tensor) for tensor in (*inputs, *(tensor for call in whole for tensor in call.outputs))}
        read = [tensor for tensor in (*self.results, *(tensor for call in whole for tensor in call.inputs)) if is_float(tensor)]
        ranges = set(self.ranges) | self.inside
        for operation in _operations.floats_between(given, read, ranges, ranges):
            maker = self._call_of(operation)
            place, name = (self.places[operation.name], operation.type) if maker is None else (maker.start, maker.path)
            found.append((place, name, maker))
        wanted = [(name, call) for _, name, call in sorted(found, key=itemgetter(0)) if call is None or name not in unwanted]
        return [f"{name} ({'between layers' if call is None else type(call.layer).__name__})" for name, call in wanted]

    def _call_of(self, operation: Any) -> _Call | None:
        place = self.places[operation.name]
        index = bisect.bisect_right([call.start for call in self.calls], place) - 1
        return self.calls[index] if index >= 0 and place < self.calls[index].end else None


def make_plan(model: keras.Model, bits_of: Callable[[str, Any], int | None], activation_bits: int | None, inputs: Any) -> Plan:
    """Finds what can be rounded in a built model.

    Args:
        model: a built model.
        bits_of: function of a layer's path and the layer, which gives the bits of its kernels, or None to leave it in float.
        activation_bits: bits of what flows between the layers; None rounds kernels alone.
        inputs: specs of the model's inputs, nested as it takes them.

    Returns:
        A `Plan`.
    """
    plan = Plan(activation_bits=None if activation_bits is None else int(activation_bits))  # NumPy's integers are not for JSON
    kinds, unwanted = {}, set()
    leaves = find_leaves(model)
    plan.leaves = [[path, type(layer).__name__] for path, layer in leaves.items()]
    for path, layer in leaves.items():
        kinds[path] = layer, _kinds.kind_of(layer)
        if kinds[path][1] == _kinds.KERNEL:
            bits = bits_of(path, layer)
            if bits is None:
                kinds[path] = layer, _kinds.FLOAT
                unwanted.add(path)
            else:
                plan.bits[path] = int(bits)
    trace = _calls.trace(model, inputs)
    calls = [_Call(call, kinds[call.path][1], call.path in unwanted) for call in trace.calls]
    planner = _Planner(plan, calls, trace.graph, trace.outputs)
    if activation_bits is not None:
        planner.run()
    for call in calls:
        plan.spots.setdefault(call.path, []).append(call.spot)
    plan.bits = {path: bits for path, bits in plan.bits.items() if path in plan.spots}
    if activation_bits is None:
        plan.floats = [f"{call.path} ({type(call.layer).__name__})" for call in calls if _is_left(call, unwanted)]
    else:
        plan.floats += planner.name_floats(trace.inputs, unwanted)
    plan.floats = list(dict.fromkeys(plan.floats))
    return _compressed(plan)


def _compressed(plan: Plan) -> Plan:
    """Numbers the ranges that are in use."""
    spots = [spot for calls in plan.spots.values() for spot in calls]
    used = sorted({n for spot in spots for n in (*spot.inputs, spot.output, *spot.inner.values()) if n is not None})
    new: dict[int | None, Any] = {None: None} | {old: number for number, old in enumerate(used)}
    for spot in spots:
        spot.inputs, spot.output = [new[n] for n in spot.inputs], new[spot.output]
        spot.inner = {part: new[n] for part, n in spot.inner.items()}
    plan.fixed = {new[old]: limits for old, limits in plan.fixed.items() if old in new}
    plan.names = [plan.names[old] for old in used]
    return plan


def _is_left(call: _Call, unwanted: set[str]) -> bool:
    """Whether integers cannot compute it, although somebody wants them."""
    return call.kind == _kinds.FLOAT and call.output is not None and call.path not in unwanted


def _is_input(call: _Call) -> bool:
    """Whether it gives its input on: dropout in inference."""
    return any(key_of(call.output) == key_of(tensor) for tensor in call.inputs)
