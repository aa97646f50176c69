"""How does a student begin with what its teacher knows? Takes over weights: by name, by shape, or of the channels that it has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_kd import _lineage, _taps
from keras_kd.surgery import _analysis, _nodes
from keras_kd.surgery._matching import Choice, Unit, paired, units
from keras_kd.surgery._reports import Report
from keras_kd.teachers import check_model

_WAYS = ("auto", "name", "shape", "channels")


@dataclasses.dataclass(frozen=True)
class Transferred:
    """What happened to a layer of the target.

    Attributes:
        layer: its path.
        source: path of the layer that it was compared with; None without any.
        outcome: `"copied"`, `"sliced"` or `"left"`, as it was.
        detail: of a sliced layer, its weights and those that they are of; of one that was left, why.
    """

    layer: str
    source: str | None
    outcome: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class TransferReport(Report):
    """What `transfer_weights` did.

    Attributes:
        layers: for each layer of the target that has weights, what happened to it.
        taken: number of weights of the target that were taken over.
        weights: number of weights that it has.
    """

    layers: tuple[Transferred, ...]
    taken: int
    weights: int

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layer", "from", "what", "detail"):
            made.add_column(heading, overflow="fold")
        for one in self.layers:
            made.add_row(one.layer, one.source or "", "left as it was" if one.outcome == "left" else one.outcome, one.detail)
        console = Console(width=160, markup=False, highlight=False, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            console.print(f"{self.taken:,} of {self.weights:,} weights taken over")
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def transfer_weights(
    source: Any,
    target: Any,
    *,
    by: str = "auto",
    layers: Mapping[str, str] | None = None,
    channels: Mapping[str, Any] | None = None,
) -> TransferReport:
    """Writes weights of one model into another: a student begins with what its teacher knows.

    Unlike the rest of surgery this changes `target`, and nothing but its weights; either all that fits is written or, on an error,
    nothing. Layers are paired as `layers` says, and beyond that

    | `by` | layers of | weights |
    |---|---|---|
    | `"name"` | the same path and kind | of the same shapes |
    | `"shape"` | the same kind, the first with the first and so on | of the same shapes |
    | `"channels"` | the same path and kind | sliced, where the source's are wider |
    | `"auto"` | the same path and kind; then the same kind and ranks, the first with the first | sliced, where wider |

    For `"auto"`, names that Keras numbers (`"conv2d_3"`) count where the source has all of the target's.

    Slices are taken through the whole graph of the source: what one layer keeps of its output, with all that is tied to it, is
    what the next one reads. Of a layer in `channels` those are taken; of a target that surgery made from this very source, those
    that it kept, and the result is exactly what surgery gave without data. Otherwise as many as the target is wide, those with the
    largest kernels by their L2 norm; never of the model's outputs, nor of what no layer makes. Layers that are wider than the
    source's, or in which the channels taken do not fit, stay as they are.

    Args:
        source: a built Keras model; for slices a Functional or Sequential one, whose graph can be seen. It is not changed.
        target: a built Keras model. For a Distiller, its student.
        by: `"auto"`, `"name"`, `"shape"` or `"channels"`.
        layers: names or paths of layers of the target, with the layer of the source that each takes its weights from; of nested
            models, all layers inside.
        channels: for layers of the source, which channels of their output are taken: ascending indices. `kept` of a
            `SurgeryReport` is such a dict, for copies of what surgery made.

    Returns:
        A `TransferReport`; as a string it is a table.

    Raises:
        TypeError: if one is no Keras model, or `layers` or `channels` no dict.
        ValueError: if a model is not built, both are one, a name or index is not there, a layer named in `layers` or `channels`
            does not fit, or nothing does.

    Example:

    >>> def network(width):
    ...     return keras.Sequential(
    ...         [keras.Input((4,)), keras.layers.Dense(width, name="hidden"), keras.layers.Dense(2, name="head")]
    ...     )
    >>> teacher, student = network(6), network(3)
    >>> report = keras_kd.surgery.transfer_weights(teacher, student)
    >>> [(one.layer, one.outcome, one.detail) for one in report.layers][1]
    ('head', 'sliced', 'kernel (3, 2) of (6, 2)')

    Reference:
        Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, 2017 (the norms).
    """
    source, target = getattr(source, "student", source), getattr(target, "student", target)
    _check(source, target, by, layers, channels)
    sources, targets = units(source), units(target)
    lineage = _lineage.masks_between(target, source)
    order = by == "shape" or (by == "auto" and lineage is None)
    explicit = _expanded(source, target, sources, targets, layers or {})
    pairs = paired(targets, sources, explicit, paths=by != "shape", order=order, exact=by == "shape")
    choice = None
    if by in ("auto", "channels") and _nodes.is_open(source):
        choice = Choice(_analysis.analyse(source))
        masks = lineage if channels is None and lineage is not None else {}
        given = {name: np.flatnonzero(mask) for name, mask in masks.items()}
        _choose(choice, given if channels is None else _checked_channels(choice, channels), pairs, sources, targets)
    own = {id(variable) for unit in sources.values() for variable in unit.weights}
    plans = {path: _plan(unit, sources.get(pairs.get(path, "\0")), choice, own) for path, unit in targets.items()}
    _check_plans(plans, targets, set(layers or {}), set(channels or {}), pairs, explicit)
    for path, (_, values) in plans.items():
        _write(targets[path], values)
    taken = sum(value.size for _, values in plans.values() for value in values)
    total = sum(int(np.prod(shape)) for unit in targets.values() for shape in unit.shapes)
    return TransferReport(tuple(one for one, _ in plans.values()), taken, total)


def kept_channels(model: Any) -> dict[str, np.ndarray]:
    """Which channels of the original model does each layer of a model have that surgery made?

    Channel i of what a layer gives is channel `kept_channels(model)[layer][i]` of what the layer of that path gives in the model
    that the first surgery was on. Heads of "attention" are under "attention:heads". Layers that surgery put in the place of others
    are not there.

    It is known as long as the model is in memory: neither a Keras file nor `keras.models.clone_model` has a place for it. Keep
    these indices beside the file, and hand them to `transfer_weights(channels=...)` and to `teacher_channels` of the losses.

    Args:
        model: a model that surgery made. For a Distiller, its student.

    Returns:
        Indices by path.

    Raises:
        ValueError: if surgery did not make the model.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, name="hidden"), keras.layers.Dense(2, name="head")])
    >>> smaller = keras_kd.surgery.remove_channels(model, {"hidden": [0, 3]})
    >>> smaller = keras_kd.surgery.remove_channels(smaller, {"hidden": [0]})
    >>> keras_kd.surgery.kept_channels(smaller)["hidden"].tolist()
    [2, 4, 5]
    """
    model = getattr(model, "student", model)
    check_model(model, "model")
    masks = _lineage.masks_from_first(model)
    if masks is None:
        raise ValueError(
            f'`model` must be the very object that surgery made. Received: "{model.name}". Nobody knows it of loaded and cloned '
            "models: keep the indices, from `kept_channels` or the SurgeryReport, beside the file."
        )
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def _check(source: Any, target: Any, by: Any, layers: Any, channels: Any) -> None:
    check_model(source, "source")
    check_model(target, "target")
    if source is target:
        raise ValueError(f'`source` and `target` must be two models. Received: "{source.name}" for both.')
    if by not in _WAYS:
        raise ValueError(f"`by` must be one of {', '.join(_WAYS)}. Received: by={by!r}.")
    for name, value in (("layers", layers), ("channels", channels)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"`{name}` must be a dict by names of layers. Received: {name}={value!r}.")
    if (by == "channels" or channels is not None) and not _nodes.is_open(source):
        raise ValueError(
            f"`source` must be a Functional or Sequential model, whose graph says which channels go together. Received: "
            f'"{source.name}" of type {type(source).__name__}. Use by="name" or by="shape".'
        )
    if channels is not None and by not in ("auto", "channels"):
        raise ValueError(f'`channels` are taken with by="auto" or by="channels". Received: by="{by}".')


def _expanded(
    source: Any, target: Any, sources: Mapping[str, Unit], targets: Mapping[str, Unit], layers: Mapping[str, str]
) -> dict[str, str]:
    """The pairs in `layers` by path, for nested models those of the layers inside."""
    pairs: dict[str, str] = {}
    for name, other in layers.items():
        mine = _taps.find_path(target, name, role="target", argument="layers")
        theirs = _taps.find_path(source, other, role="source", argument="layers")
        inside = [path for path in targets if path == mine or path.startswith(f"{mine}/")]
        found = {path: theirs + path[len(mine) :] for path in inside if theirs + path[len(mine) :] in sources}
        if not found:
            raise ValueError(f'`layers` must name layers with weights that fit. Received: layers={{"{name}": "{other}"}}.')
        pairs |= found
    return pairs


def _checked_channels(choice: Choice, channels: Mapping[str, Any]) -> dict[str, np.ndarray]:
    places = choice.found.places()
    checked = {}
    for name, indices in channels.items():
        if name not in places:
            raise ValueError(
                f'`channels` must name layers of the source that give channels. Received: "{name}". Layers: {", ".join(places)}.'
            )
        given, width = np.asarray(indices), len(places[name][1])
        whole = given.ndim == 1 and given.size > 0 and given.dtype.kind in "iu"
        if not whole or given.min() < 0 or given.max() >= width or np.any(np.diff(given) <= 0):
            raise ValueError(f'`channels` of "{name}" must be ascending whole numbers in [0, {width - 1}]. Received: {indices!r}.')
        checked[name] = given
    return checked


def _choose(
    choice: Choice,
    given: Mapping[str, np.ndarray],
    pairs: Mapping[str, str],
    sources: Mapping[str, Unit],
    targets: Mapping[str, Unit],
) -> None:
    """Decides which channels of the source are taken: those that are given, then as many as the target's weights ask for."""
    for name, indices in given.items():
        choice.give(name, indices)
    wanted = []
    for path, other in pairs.items():
        mine, theirs = targets[path], sources[other]
        if mine.signature(False)[1:] == theirs.signature(False)[1:]:
            for variable, shape in zip(theirs.weights, mine.shapes, strict=True):
                axes = choice.axes_of(theirs, variable)
                wanted += [(atoms, length) for atoms, length in zip(axes, shape, strict=True) if atoms is not None]
    choice.fit(wanted)


def _plan(mine: Unit, theirs: Unit | None, choice: Choice | None, own: set[int]) -> tuple[Transferred, list[np.ndarray]]:
    """What to do with a layer of the target, and the values to write."""
    name, origin = _shown(mine), None if theirs is None else _shown(theirs)

    def left(reason: str) -> tuple[Transferred, list[np.ndarray]]:
        return Transferred(name, origin, "left", reason), []

    if any(id(variable) in own for variable in mine.weights):
        return left("its weights are the source's own")
    if theirs is None:
        return left("no layer of the source stands for it")
    if [len(shape) for shape in mine.shapes] != [len(shape) for shape in theirs.shapes]:
        return left(f"its weights have the shapes {mine.shapes}, the source's {theirs.shapes}")
    if mine.shapes == theirs.shapes:
        return Transferred(name, origin, "copied"), [np.asarray(variable) for variable in theirs.weights]
    values = [np.asarray(variable) if choice is None else choice.slice(theirs, variable) for variable in theirs.weights]
    compared = list(zip(mine.weights, mine.shapes, theirs.shapes, [value.shape for value in values], strict=True))
    for variable, shape, whole, sliced in compared:
        if sliced != shape:
            wider = any(a > b for a, b in zip(shape, whole, strict=True))
            taken = "" if wider or sliced == whole else f", of which {sliced} fit to the channels taken"
            reason = choice.pin_of(theirs) if choice is not None and not wider else ""
            return left(f"{variable.name} {shape}, the source's {whole}{taken}" + f": {reason}" * bool(reason))
    cut = ", ".join(f"{one.name} {shape} of {whole}" for one, shape, whole, _ in compared if shape != whole)
    return Transferred(name, origin, "sliced", cut), values


def _shown(unit: Unit) -> str:
    return unit.path or str(unit.layer.name)


def _check_plans(
    plans: Mapping[str, tuple[Transferred, list[np.ndarray]]],
    targets: Mapping[str, Unit],
    layers: set[str],
    channels: set[str],
    pairs: Mapping[str, str],
    explicit: Mapping[str, str],
) -> None:
    """Raises a `ValueError` where what the user named does not fit, or nothing does."""
    for path, (one, values) in plans.items():
        if values:
            continue
        if path in explicit and (path in layers or targets[path].layer.name in layers):
            raise ValueError(f'`layers` must name layers that fit. Received: {{"{path}": "{pairs[path]}"}}: {one.detail}.')
        if one.source in channels:
            raise ValueError(f'`channels` of "{one.source}" must fit the target\'s "{path}". Received: {one.detail}.')
    if not any(values for _, values in plans.values()):
        reasons = "; ".join(f"{one.layer}: {one.detail}" for one, _ in list(plans.values())[:3]) or "it has no weights"
        raise ValueError(f"Nothing of `source` fits `target`: {reasons}. Pair layers: layers={{target's: source's}}.")


def _write(unit: Unit, values: list[np.ndarray]) -> None:
    for variable, value in zip(unit.weights, values, strict=bool(values)):
        variable.assign(value)
    if values and hasattr(unit.layer, "finalize_state"):  # of preprocessing layers that have seen data
        unit.layer.finalize_state()
