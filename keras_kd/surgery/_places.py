"""Which part of a network does a name mean? Layers by path, what lies between two of them, and residual branches."""

import collections
import dataclasses
from typing import Any

from keras_kd.surgery import _nodes
from keras_kd.surgery._analysis import Analysis


class Graph:
    """The calls of one model, without those inside of nested ones.

    Attributes:
        model: the model.
        nodes: its calls in order.
        giver: the call that gave a tensor, by `id`.
        readers: the calls that read it.
        outputs: tensors that the model gives, by `id`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(_nodes.nodes_of(model))
        self.giver = {id(tensor): node for node in self.nodes for tensor in node.outputs}
        self.readers: dict[int, list[Any]] = collections.defaultdict(list)
        for node in self.nodes:
            for tensor in inputs_of(node):
                self.readers[id(tensor)].append(node)
        self.outputs = {id(tensor) for tensor in _nodes.graph_of(model).outputs}

    def only_reader(self, tensor: Any) -> Any:
        """The call that alone reads a tensor, which the model does not give; None if there is none."""
        readers = self.readers[id(tensor)]
        return readers[0] if len(readers) == 1 and id(tensor) not in self.outputs else None

    def between(self, start: Any, end: Any) -> list[Any] | None:
        """The calls that make `end` from `start`; None if they need more than that."""
        found: set[int] = set()
        pending, seen = [end], {id(start)}
        while pending:
            tensor = pending.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            node = self.giver.get(id(tensor))
            if node is None:
                return None
            found.add(id(node))
            pending += inputs_of(node)
        return [node for node in self.nodes if id(node) in found]

    def escapes(self, members: list[Any], last: Any) -> list[Any]:
        """Those of the members, but for the last one, that are read from outside."""
        inside = {id(node) for node in members}
        return [
            node
            for node in members
            if node is not last
            and any(id(t) in self.outputs or any(id(r) not in inside for r in self.readers[id(t)]) for t in node.outputs)
        ]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer or an operation is called.

    Attributes:
        path: its path.
        nodes: its calls in one graph.
        graph: that graph.
        calls: how many calls it has in all graphs.
    """

    path: str
    nodes: tuple[Any, ...]
    graph: Graph
    calls: int

    @property
    def node(self) -> Any:
        """The first call."""
        return self.nodes[0]


def inputs_of(node: Any) -> list[Any]:
    """The tensors that a call reads, each once."""
    return list({id(tensor): tensor for tensor in node.arguments.keras_tensors}.values())


def shape_of(tensor: Any) -> tuple[Any, ...]:
    """Its shape without the samples."""
    return tuple(tensor.shape[1:])


def graphs_of(model: Any) -> list[Graph]:
    """The graph of a model, and those of nested ones, each once; outer ones first."""
    found = {id(model): Graph(model)}
    pending = [model]
    while pending:
        for node in found[id(pending.pop(0))].nodes:
            inner = node.operation
            if _nodes.is_open(inner) and _nodes.inner_inputs(node) is not None and id(inner) not in found:
                found[id(inner)] = Graph(inner)
                pending.append(inner)
    return list(found.values())


def find_places(found: Analysis) -> dict[str, Place]:
    """All layers and operations by path."""
    places: dict[str, Place] = {}
    for graph in graphs_of(found.model):
        calls: dict[int, list[Any]] = collections.defaultdict(list)
        for node in graph.nodes:
            calls[id(node.operation)].append(node)
        for key, nodes in calls.items():
            record = found.records[key]
            places.setdefault(record.path, Place(record.path, tuple(nodes), graph, len(record.outputs)))
    return places


def resolved(places: dict[str, Place], name: Any, argument: str) -> Place:
    """The place that a name means: its path, or the last part of one.

    Raises:
        TypeError: if it is no string.
        ValueError: if it fits none, or several.
    """
    if not isinstance(name, str):
        raise TypeError(f"`{argument}` must name layers as strings. Received: {name!r} of type {type(name).__name__}.")
    short = [name] if name in places else [path for path in places if path.split("/")[-1] == name]
    if len(short) == 1:
        return places[short[0]]
    if short:
        raise ValueError(f'`{argument}` must name one layer. Received: "{name}", which may be {", ".join(short)}.')
    raise ValueError(f'No layer "{name}" in the model. Received: {argument}="{name}". Layers: {", ".join(places)}.')


@dataclasses.dataclass(frozen=True)
class Block:
    """What makes one tensor from another one.

    Attributes:
        start: the tensor that it reads.
        last: the call that gives the other one.
        nodes: its calls in order.
        members: paths of its layers that go if something else stands for it.
        staying: paths of those that are read from outside, or used elsewhere.
        graph: where it stands.
    """

    start: Any
    last: Any
    nodes: tuple[Any, ...]
    members: tuple[str, ...]
    staying: tuple[str, ...]
    graph: Graph


def block_of(found: Analysis, first: Place, last: Place, argument: str) -> Block:
    """The block from what `first` reads to what `last` gives.

    Raises:
        ValueError: if there is no such block.
    """
    told = f'{argument}="{first.path}"' if first == last else f'{argument}=("{first.path}", "{last.path}")'
    for place in (first, last):
        if len(place.nodes) > 1 or (place is last and place.calls > 1):
            raise ValueError(
                f'A block must begin and end with layers that are used once. Received: {told}; "{place.path}" is used '
                f"{place.calls} times."
            )
    if first.graph is not last.graph:
        raise ValueError(f"A block must begin and end in the same model, not inside of different nested ones. Received: {told}.")
    read, given = inputs_of(first.node), last.node.outputs
    if len(read) != 1 or len(given) != 1:
        raise ValueError(
            f"A block must read one tensor and give one. Received: {told}, which reads {len(read)} and gives {len(given)}. "
            "Begin it with a layer that reads one tensor."
        )
    members = first.graph.between(read[0], given[0])
    if members is None or first.node not in members:
        raise ValueError(
            f"All that a block gives must come from what its first layer reads. Received: {told}; "
            f'"{last.path}" also reads something else, or does not follow from it. Begin the block where all that it reads is one '
            "tensor."
        )
    return as_block(found, first.graph, read[0], last.node, members)


def as_block(found: Analysis, graph: Graph, start: Any, last: Any, members: list[Any]) -> Block:
    """A block of these calls."""
    inside = {id(node) for node in members}
    kept = {id(node) for node in graph.escapes(members, last)}
    for node in reversed(members):  # what these read stays, too
        if id(node) in kept:
            kept |= {id(graph.giver[id(t)]) for t in inputs_of(node) if id(graph.giver.get(id(t))) in inside}
    kept -= {id(last)}

    def paths(stays: bool) -> tuple[str, ...]:
        records = {id(node): found.records[id(node.operation)] for node in members}
        several = collections.Counter(id(node.operation) for node in members)
        return tuple(
            dict.fromkeys(
                record.path
                for key, record in records.items()
                if (key in kept or len(record.outputs) > several[id(record.operation)]) is stays
            )
        )

    return Block(start, last, tuple(members), paths(False), paths(True), graph)
