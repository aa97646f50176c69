"""Who reads what a layer gives? From one trace: which channels could go alone, and why others cannot."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_kd import _calls, _taps

_L = keras.layers
CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D, _L.DepthwiseConv1D, _L.DepthwiseConv2D, _L.SeparableConv1D, _L.SeparableConv2D)
POOLINGS = (_L.MaxPooling1D, _L.MaxPooling2D, _L.MaxPooling3D, _L.AveragePooling1D, _L.AveragePooling2D, _L.AveragePooling3D)
PADDINGS = (_L.ZeroPadding1D, _L.ZeroPadding2D, _L.ZeroPadding3D)
CROPPINGS = (_L.Cropping1D, _L.Cropping2D, _L.Cropping3D)
OUTPUT = "it gives the model's output"


@dataclasses.dataclass
class Flow:
    """Where what a layer with a kernel gives is read.

    Attributes:
        place: the last place before other layers mix its channels.
        readers: paths of the layers that mix them.
        between: paths of layers on the way that have weights for each channel.
        padded: share of the windows of those that read them that show zeros beyond the border, where no constant stands for them.
        reason: why its channels cannot go alone, "" if they can.
    """

    place: str
    readers: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    padded: float = 0.0
    reason: str = ""


class Links:
    """Who gives and who reads the tensors of a trace, through operations between layers too."""

    # Operations that pass channels on as they are, or look at nothing but the shape.
    TRANSPARENT = ("Cast", "Identity", "StopGradient")
    BLIND = ("Shape", "ShapeN", "Rank", "Size", "ZerosLike", "OnesLike")

    def __init__(self, trace: _calls.Trace) -> None:
        self.outputs = {id(tensor) for tensor in trace.outputs}
        self.giver = {id(tensor): call.name for call in trace.calls for tensor in call.outputs}
        self.places = {operation.name: index for index, operation in enumerate(trace.graph.get_operations())}
        self.ranges = sorted((call.start, call.end, call.name) for call in trace.calls if call.end > call.start)
        self.by_name = {call.name: call for call in trace.calls}

    def owner(self, operation: Any) -> str | None:
        """The call that an operation is computed in."""
        at = self.places.get(operation.name)
        if at is None:
            return None
        index = bisect.bisect_right(self.ranges, (at, math.inf, "")) - 1
        return self.ranges[index][2] if index >= 0 and at < self.ranges[index][1] else None

    def readers(self, tensor: Any) -> tuple[list[_calls.Call], str]:
        """The calls that read a tensor, and what else does: "" for nothing."""
        found, other, pending, seen = {}, "", [tensor], set()
        giver = self.giver.get(id(tensor))
        while pending:
            one = pending.pop()
            if id(one) in self.outputs:
                other = other or OUTPUT
            for operation in one.consumers():
                owner = self.owner(operation)
                if operation.type in self.BLIND or operation.name in seen:
                    continue
                seen.add(operation.name)
                if owner is not None and (owner != giver or one is not tensor):
                    found[owner] = self.by_name[owner]
                elif owner is None and operation.type in self.TRANSPARENT:
                    pending.extend(operation.outputs)
                elif owner is None:
                    other = other or "operations between layers read it"
        return list(found.values()), other

    def sources(self, tensor: Any, known: Any) -> list[Any]:
        """The nearest tensors that calls gave, or that are known, which this one was computed from."""
        found, pending, seen = [], [tensor], set()
        while pending:
            one = pending.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            if id(one) in known or id(one) in self.giver:
                found.append(one)
            else:
                pending.extend(one.op.inputs)
        return found

    def following(self, tensors: list[Any]) -> set[str]:
        """Names of all calls that depend on tensors."""
        found: set[str] = set()
        reached = {id(tensor) for tensor in tensors}
        for call in self.by_name.values():
            if any(id(source) in reached for tensor in call.inputs for source in self.sources(tensor, reached)):
                found.add(call.name)
                reached |= {id(tensor) for tensor in call.outputs}
        return found

    def escape(self, calls: list[_calls.Call], members: set[str]) -> str:
        """Who reads what these calls give, besides the members."""
        for call in calls:
            for tensor in call.outputs:
                following, other = self.readers(tensor)
                outside = [one.path for one in following if one.name not in members]
                if outside or other == OUTPUT:
                    return f'"{call.path}" is read by {outside[0] if outside else "whoever takes the outputs"}'
        return ""


_FOLLOWED = (
    *POOLINGS,
    *PADDINGS,
    *CROPPINGS,
    _L.BatchNormalization,
    _L.Activation,
    _L.ReLU,
    _L.LeakyReLU,
    _L.PReLU,
    _L.ELU,
    _L.Dropout,
    _L.SpatialDropout1D,
    _L.SpatialDropout2D,
    _L.SpatialDropout3D,
    _L.GlobalAveragePooling1D,
    _L.GlobalAveragePooling2D,
    _L.GlobalAveragePooling3D,
    _L.GlobalMaxPooling1D,
    _L.GlobalMaxPooling2D,
    _L.GlobalMaxPooling3D,
    _L.UpSampling1D,
    _L.UpSampling2D,
    _L.UpSampling3D,
    _L.DepthwiseConv1D,
    _L.DepthwiseConv2D,
    _L.Rescaling,
    _L.Identity,
)
MIXERS = (_L.Conv1D, _L.Conv2D, _L.Conv3D, _L.Dense)
# Activations that treat each channel for itself. Softmax does not.
_ELEMENTWISE = (
    *(
        "celu",
        "elu",
        "exponential",
        "gelu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_tanh",
        "leaky_relu",
        "linear",
        "mish",
    ),
    *(
        "log_sigmoid",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "soft_shrink",
        "softplus",
        "softsign",
        "sparse_plus",
        "squareplus",
    ),
    *("sparse_sigmoid", "tanh", "tanh_shrink", "threshold"),
)


def is_linear(layer: Any) -> bool:
    """Whether a layer is a linear map with all its inputs mixed: a convolution without groups or Dense, without activation."""
    return isinstance(layer, MIXERS) and getattr(layer, "groups", 1) == 1 and layer.activation is keras.activations.linear


def find_flows(model: keras.Model, trace: _calls.Trace, places: Iterable[str]) -> dict[str, Flow]:
    """For each convolution and Dense layer, where its channels go and whether they can go alone."""
    links = Links(trace)
    counts: dict[str, int] = {}
    for call in trace.calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    layers, known, found = _taps.find_layers(model), set(places), {}

    def reason(call: _calls.Call) -> str:
        if counts[call.path] > 1:
            return f'"{call.path}" is called several times'
        parts = call.path.split("/")[:-1]
        around = (layers.get("/".join(parts[: index + 1])) for index in range(len(parts)))
        if not all(isinstance(layer, keras.Model) and getattr(layer, "inputs", None) for layer in around):
            return f'"{call.path}" is inside of a layer that is no Functional model'
        activation = getattr(call.layer, "activation", None)
        name = getattr(activation, "__name__", "")
        alone = activation is None or isinstance(activation, _FOLLOWED)
        if not alone and not (name in _ELEMENTWISE and activation is getattr(keras.activations, name, None)):
            return f'the activation of "{call.path}" may mix channels'
        return ""

    for call in trace.calls:
        if _mixes(call.layer):
            found[call.name] = _follow(call, links, known, reason)
    return found


def _mixes(layer: Any) -> bool:
    return isinstance(layer, MIXERS) and getattr(layer, "groups", 1) == 1


def _follow(call: _calls.Call, links: Links, known: set[str], reason: Callable[[_calls.Call], str]) -> Flow:
    flow, tensor = Flow(call.name, reason=reason(call)), call.outputs[0]
    between: list[str] = []
    flat = False
    while not flow.reason:
        following, flow.reason = links.readers(tensor)
        if flow.reason:
            break
        if following and all(_mixes(one.layer) for one in following):
            flow.reason = next((why for one in following if (why := _of_reader(reason(one)))), "")
            flow.readers, flow.between = tuple(one.path for one in following), tuple(between)
            flow.padded = max(flow.padded, *(_padded(one) for one in following))
            return flow
        if len(following) != 1:
            flow.reason = "several layers read it" if following else "no layer is seen to read it"
            break
        one = following[0]
        follows = isinstance(one.layer, (*_FOLLOWED, _L.Flatten)) and getattr(one.layer, "depth_multiplier", 1) == 1
        flow.reason = reason(one) if follows else f'"{one.path}" ties its channels to others'
        flat |= isinstance(one.layer, _L.Flatten)
        flow.padded = max(flow.padded, _padded(one))
        if getattr(one.layer, "variables", None):
            flow.reason = flow.reason or (f'"{one.path}" stands after a Flatten' if flat else "")
            between.append(one.path)
        tensor = one.outputs[0]
        if one.name in known and not flat:
            flow.place = one.name
    return Flow(call.name, reason=flow.reason)


def _of_reader(reason: str) -> str:
    """Of a layer that reads channels, its own activation does not matter."""
    return "" if reason.endswith("may mix channels") else reason


def _padded(call: _calls.Call) -> float:
    """Share of a layer's windows that show zeros beyond the border of its input."""
    layer, sizes = call.layer, [length or 8 for length in call.inputs[0].shape[1:-1]]
    if isinstance(layer, PADDINGS):
        return 1 - math.prod(a / (b or a) for a, b in zip(sizes, call.outputs[0].shape[1:-1], strict=True))
    if not isinstance(layer, CONVOLUTIONS) or layer.padding == "valid":
        return 0.0
    reach = [(size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    return 1 - math.prod(max(length - beyond, 0) / length for length, beyond in zip(sizes, reach, strict=True))
