"""How does one remove channels? A new model without them, and, with data, the work of the removed ones done by the kept ones."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_kd import _batching
from keras_kd.surgery import _analysis, _nodes
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._refit import Refit, refit


@dataclasses.dataclass(frozen=True)
class SurgeryReport:
    """What `remove_channels` did.

    Attributes:
        kept: for each layer of the old model through which channels pass, the indices of its output's channels that are still
            there, in order: channel i of the new layer is channel `kept[layer][i]` of the old one.
        removed: for each layer that lost channels, their indices in the old layer's output; those that were asked for and those
            that are tied to them.
        parameters: number of weights before.
        parameters_after: and after.
        refits: with data, what was done with the weights of each layer that read removed channels.
        not_refitted: layers that read removed channels and keep slices of their old weights, and why.
    """

    kept: dict[str, np.ndarray]
    removed: dict[str, np.ndarray]
    parameters: int
    parameters_after: int
    refits: tuple[Refit, ...] = ()
    not_refitted: dict[str, str] = dataclasses.field(default_factory=dict)


Removals = Mapping[str, Any]


@overload
def remove_channels(model: Any, channels: Removals, *, data: Any = ..., return_report: Literal[False] = ...) -> keras.Model: ...


@overload
def remove_channels(
    model: Any, channels: Removals, *, data: Any = ..., return_report: Literal[True]
) -> tuple[keras.Model, SurgeryReport]: ...


def remove_channels(
    model: Any, channels: Removals, *, data: Any = None, return_report: bool = False
) -> keras.Model | tuple[keras.Model, SurgeryReport]:
    """Removes channels from layers, with everything that is tied to them."""
    model = _analysis.checked(model)
    found = _analysis.analyse(model)
    gone = chosen(found, channels)
    stream = None if data is None else _checked_batches(model, data)
    rebuilt = Rebuilt(found, gone)
    refits, skipped = ([], {}) if stream is None else refit(rebuilt, stream)
    if not return_report:
        return rebuilt.model
    return rebuilt.model, _report(rebuilt, refits, skipped)


def _checked_batches(model: Any, data: Any) -> Iterator[list[Any]]:
    """Flat inputs of the model's types; the first batch is looked at right away."""
    stream = _batching.batches(data, size=64, required=False)
    first = _fitting(model, next(stream)[0])
    return itertools.chain([first], (_fitting(model, batch[0]) for batch in stream))


def _fitting(model: Any, x: Any) -> list[Any]:
    wanted = _nodes.graph_of(model).inputs
    given = keras.tree.flatten(x)
    if isinstance(x, dict) and set(x) == {tensor.name for tensor in wanted}:
        given = [x[tensor.name] for tensor in wanted]
    shapes = [tuple(np.shape(value)) for value in given]
    fits = len(given) == len(wanted) and all(
        len(shape) == len(tensor.shape) and all(m in (None, n) for n, m in zip(shape[1:], tensor.shape[1:], strict=True))
        for shape, tensor in zip(shapes, wanted, strict=True)
    )
    if not fits:
        expected = ", ".join(str(tuple(tensor.shape)) for tensor in wanted)
        raise ValueError(
            f'`data` must have the shape that "{model.name}" takes, {expected}. Received: {", ".join(map(str, shapes)) or "nothing"}.'
        )
    return [keras.ops.convert_to_tensor(value, tensor.dtype) for value, tensor in zip(given, wanted, strict=True)]


def _report(rebuilt: Rebuilt, refits: Sequence[Refit], skipped: Mapping[str, str]) -> SurgeryReport:
    found = rebuilt.found
    kept, removed = {}, {}
    for name, (_, channels) in found.places().items():
        keep = rebuilt.keep[channels]
        kept[name] = np.flatnonzero(keep)
        if not keep.all():
            removed[name] = np.flatnonzero(~keep)
    return SurgeryReport(kept, removed, found.model.count_params(), rebuilt.model.count_params(), tuple(refits), dict(skipped))


def chosen(found: Analysis, channels: Removals) -> set[int]:
    """Roots of the channels that a user named.

    Raises:
        TypeError: if `channels` is no dict.
        ValueError: for layers and indices that are not there, channels that must stay, and layers left without any.
    """
    if not isinstance(channels, Mapping):
        raise TypeError(
            "`channels` must be a dict from names of layers to indices or boolean masks. Received: "
            f"channels={channels!r} of type {type(channels).__name__}."
        )
    places = found.places()
    gone: set[int] = set()
    for name, wanted in channels.items():
        atoms = places[_resolved(found, places, name)][1]
        indices = _indices(name, wanted, len(atoms))
        roots = found.roots[atoms[indices]]
        for index, root in zip(indices.tolist(), roots.tolist(), strict=True):
            if root in found.pinned:
                raise ValueError(
                    f'Channel {index} of "{name}" must stay: {found.pinned[root]}. Received: channels={{"{name}": ...}}. '
                    f"Layers that can lose channels: {_removable(found)}."
                )
        gone |= set(roots.tolist())
    _check_left(found, gone)
    return gone


def _removable(found: Analysis) -> str:
    names = [
        record.path
        for record in found.records.values()
        if any(root not in found.pinned for one in record.made.values() for root in found.roots[one].tolist())
    ]
    return ", ".join(names) or "none"


def _resolved(found: Analysis, places: Mapping[str, Any], name: Any) -> str:
    """The place that a name means: its path, or the last part of one."""
    if name in places:
        return str(name)
    short = [place for place in places if place.split("/")[-1] == name]
    if len(short) == 1:
        return short[0]
    several = short or [place for place in places if place.rsplit(":", 1)[0] == name]
    if several:
        raise ValueError(f'`channels` must name one layer each. Received: "{name}", which may be {", ".join(several)}.')
    if name in found.unknown:
        raise ValueError(f'Nothing can be removed from "{name}": {found.unknown[name]}. Layers that can: {_removable(found)}.')
    known = any(record.path == name for record in found.records.values())
    told = f'"{name}" makes no channels, and none pass through it' if known else f'No layer "{name}" in the model'
    raise ValueError(f'{told}. Received: channels={{"{name}": ...}}. Layers that can lose channels: {_removable(found)}.')


def _indices(name: str, wanted: Any, width: int) -> np.ndarray:
    given = np.asarray(wanted)
    if given.dtype == bool:
        if given.shape != (width,):
            raise ValueError(f'A mask for "{name}" must have the shape ({width},). Received: shape {given.shape}.')
        return np.flatnonzero(given)
    if given.size == 0:
        return np.zeros(0, "int64")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(
            f'Channels of "{name}" must be a sequence of whole numbers, or a boolean mask. Received: {given.dtype} of shape {given.shape}.'
        )
    if given.min() < 0 or given.max() >= width:
        raise ValueError(f'Channels of "{name}" must be in [0, {width - 1}]. Received: {given.min()} to {given.max()}.')
    return np.unique(given)


def _check_left(found: Analysis, gone: set[int]) -> None:
    """No layer may be left without channels."""
    for record in found.records.values():
        vectors = [*record.made.values(), *[one for labels in record.outputs for one in labels]]
        vectors += [one for axes in record.weights.values() for one in axes]
        for one in vectors:
            if one is not None and gone.issuperset(found.roots[one].tolist()):
                raise ValueError(
                    f'Every layer must keep at least one channel. Received: channels that leave "{record.path}" without any of its '
                    f"{len(one)}."
                )
