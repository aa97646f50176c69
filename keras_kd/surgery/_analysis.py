"""Which channels of a whole model go together, and which weights do they index? One walk over its graph, nested models included."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_kd.surgery import _heads, _labels, _nodes
from keras_kd.surgery._labels import Atoms, Labels
from keras_kd.surgery._rules import rule_for
from keras_kd.surgery._visits import Record, Visit


@dataclasses.dataclass
class Analysis:
    """What is known of the channels of a model.

    Attributes:
        model: the model.
        atoms: channels, before and after they are united.
        labels: of its tensors by `id`.
        records: of its layers and operations by `id`, in order.
        roots: for each atom, the one that stands for all that go with it.
        pinned: why roots must stay.
        unknown: why layers are not known, by path.
    """

    model: Any
    atoms: Atoms
    labels: dict[int, Labels] = dataclasses.field(default_factory=dict)
    records: dict[int, Record] = dataclasses.field(default_factory=dict)
    roots: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, "int64"))
    pinned: dict[int, str] = dataclasses.field(default_factory=dict)
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)

    def places(self) -> dict[str, tuple[Record, np.ndarray]]:
        """Layers whose outputs have channels, by path, with `:0`, `:1` where calls differ: their record and these channels.

        Heads of attention are under the path with `:heads`.
        """
        found: dict[str, tuple[Record, np.ndarray]] = {}
        for record in self.records.values():
            calls = [channels_of(labels) for labels in record.outputs]
            different = any(not np.array_equal(self.rooted(calls[0]), self.rooted(one)) for one in calls[1:])
            for index, channels in enumerate(calls if different else calls[:1]):
                if channels is not None:
                    found[f"{record.path}:{index}" if different else record.path] = (record, channels)
            heads = _heads.heads_of(record)
            if heads is not None:
                found[_heads.place_of(record.path)] = (record, heads)
        return found

    def rooted(self, atoms: np.ndarray | None) -> np.ndarray:
        """Roots of atoms."""
        return np.zeros(0, "int64") if atoms is None else self.roots[atoms]


def channels_of(labels: Labels) -> np.ndarray | None:
    """What a user means by the channels of an output: the last axis from which something can be taken."""
    return next((one for one in reversed(labels) if one is not None), None)


def checked(model: Any) -> Any:
    """A built Functional or Sequential model; of a Distiller, its student.

    Raises:
        TypeError: if it is no Keras model.
        ValueError: if it is not built, or a subclassed model.
    """
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if _nodes.is_open(model):
        return model
    if isinstance(model, keras.Sequential):
        raise ValueError(
            f'`model` must be built. Received: the unbuilt Sequential model "{model.name}". Begin it with keras.Input(shape).'
        )
    raise ValueError(
        f"`model` must be a Functional or Sequential model: surgery needs its graph. Received: the subclassed model "
        f'"{model.name}" of type {type(model).__name__}. Give it as a graph: x = keras.Input(shape); '
        "keras.Model(x, model.call(x)), whose layers are those of your model."
    )


def analyse(model: Any) -> Analysis:
    """Walks over a model's graph.

    Args:
        model: a built Functional or Sequential model.
    """
    found = Analysis(model, Atoms())
    _walk(found, model, "", set())
    for index, tensor in enumerate(_nodes.graph_of(model).outputs):
        for one in found.labels[id(tensor)]:
            if one is not None:
                name = tensor._keras_history.operation.name
                found.atoms.pin(one, f'"{name}" gives the model\'s output' + f" {index}" * (len(model.outputs) > 1))
    found.roots = found.atoms.roots()
    found.pinned = found.atoms.pinned(found.roots)
    for record in found.records.values():
        for one in record.vectors():
            if len(set(found.roots[one].tolist())) == 1:  # what has no channel to spare cannot lose any
                reason = f'"{record.path}" would have no channel left: all that it has go together'
                found.pinned.setdefault(int(found.roots[one[0]]), reason)
    return found


def _walk(found: Analysis, model: Any, prefix: str, done: set[int]) -> None:
    """Visits the calls of a model, whose inputs have labels already or get none."""
    done.add(id(model))
    for tensor in _nodes.graph_of(model).inputs:
        found.labels.setdefault(id(tensor), _labels.none(tensor.shape))
    for node in _nodes.nodes_of(model):
        path = prefix + node.operation.name
        if _nodes.is_open(node.operation) and _nodes.inner_inputs(node) is not None:
            _enter(found, node, path, done)
        else:
            _visit(found, node, path)


def _enter(found: Analysis, node: Any, path: str, done: set[int]) -> None:
    """Visits a nested model once; all its calls read and give the same channels."""
    inner = node.operation
    graph = _nodes.graph_of(inner)
    record = found.records.setdefault(id(inner), Record(inner, path))
    visit = Visit(found.atoms, record, found.labels, node.arguments.args, node.arguments.kwargs, node.outputs)
    outside = [visit.of(tensor) for tensor in _nodes.inner_inputs(node) or ()]
    if id(inner) not in done:
        for tensor, labels in zip(graph.inputs, outside, strict=True):
            found.labels[id(tensor)] = labels
        _walk(found, inner, path + "/", done)
    for tensor, labels in zip(graph.inputs, outside, strict=True):
        visit.tie([found.labels[id(tensor)], labels])
    for given, tensor in zip(node.outputs, graph.outputs, strict=True):
        found.labels[id(given)] = found.labels[id(tensor)]
    record.outputs.append(found.labels[id(node.outputs[0])])


def _visit(found: Analysis, node: Any, path: str) -> None:
    operation = node.operation
    record = found.records.setdefault(id(operation), Record(operation, path))
    visit = Visit(found.atoms, record, found.labels, node.arguments.args, node.arguments.kwargs, node.outputs)
    rule = rule_for(operation)
    if rule is None:
        kind = type(operation).__name__
        found.unknown[path] = f"what {kind} does with channels is not known"
        for tensor in _nodes.tensors_in((visit.args, visit.kwargs)):
            visit.pin(visit.of(tensor), f"reads it, and what {kind} does with channels is not known")
        given = [_labels.none(tensor.shape) for tensor in node.outputs]
    else:
        given = rule(visit)
    for tensor, labels in zip(node.outputs, given, strict=True):
        found.labels[id(tensor)] = labels
    record.outputs.append(given[0])
