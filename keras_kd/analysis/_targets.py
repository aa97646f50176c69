"""Which layers can be changed alone, and where is what they give seen? From one trace, before anything is measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from keras_kd import _calls
from keras_kd.analysis import _flows, _places

_KERNELS = ("Dense", "Conv1D", "Conv2D", "Conv3D")


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer, and the places where what it gives is seen: for channels where they are read, for kernels each of its calls."""

    path: str
    layer: Any
    places: tuple[str, ...]


def find_targets(
    model: keras.Model, trace: _calls.Trace, layers: Sequence[str] | None, what: str, max_columns: int
) -> list[Target]:
    """The layers to change, in the order in which the model computes."""
    places = _places.find_places(trace)
    narrow = {name for name, call in places.items() if call.outputs[0].shape[-1] <= max_columns}
    flows = _flows.find_flows(model, trace, narrow) if getattr(model, "inputs", None) else {}
    last = _last_mixers(trace)
    calls: dict[str, list[_calls.Call]] = {}
    for call in places.values():
        if type(call.layer).__name__ in _KERNELS:
            calls.setdefault(call.path, []).append(call)
    found, refused = [], {}
    for path, those in calls.items():
        names = tuple(call.name for call in those)
        reason = "" if narrow.issuperset(names) else f"it has more than {max_columns} channels"
        if what == "channels" and not reason:
            flow = flows.get(names[0])
            reason = "it is called several times" if len(names) > 1 else flow.reason if flow else last.get(path, "")
            names = (flow.place,) if flow else names
            same = reason or (names[0] in narrow and places[names[0]].outputs[0].shape[-1] == those[0].outputs[0].shape[-1])
            reason = reason or ("" if same else "its channels are read under another number")
        if reason:
            refused[path] = reason
        else:
            found.append(Target(path, those[0].layer, names))
    unknown = [name for name in layers or () if name not in {target.path for target in found}]
    if unknown or not found:
        told = [f"{name} ({refused[name]})" if name in refused else name for name in unknown or refused]
        raise ValueError(
            f"`layers` must name layers whose {what} can go alone. Received: {', '.join(told) or layers}. Layers: "
            f"{', '.join(target.path for target in found) or 'none'}."
        )
    return [target for target in found if layers is None or target.path in set(layers)]


def _last_mixers(trace: _calls.Trace) -> dict[str, str]:
    """Layers with kernels from which the model's outputs follow without another one in between, and what is wrong with that."""
    mixers = {id(t): call.path for call in trace.calls for t in call.outputs if getattr(call.layer, "kernel", None) is not None}
    found, pending, seen = {}, list(trace.outputs), set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in mixers:
            found[mixers[id(tensor)]] = "it gives the model's output"
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            pending.extend(tensor.op.inputs)
    return found
