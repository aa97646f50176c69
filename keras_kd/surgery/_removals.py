"""What goes if a layer goes? What is handed on in its place, and which layers are fitted to that."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from keras_kd._progress import Verbose
from keras_kd.surgery import _nodes, _places, _reading
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._places import Block, Graph, Place, inputs_of
from keras_kd.surgery._rebuild import Rebuilt, Replacement
from keras_kd.surgery._refit import Refit, _Walk, followers
from keras_kd.surgery._visits import Record


@dataclasses.dataclass(frozen=True)
class Removal:
    """What removing a layer, a block or a branch means.

    Attributes:
        operation: the layer or operation that something else is handed on for.
        replacement: what.
        layers: paths of what goes.
        staying: paths of what is read from outside, and stays.
    """

    operation: Any
    replacement: Replacement
    layers: tuple[str, ...]
    staying: tuple[str, ...] = ()


def of_block(block: Block, told: str) -> Removal:
    """Removes all between two tensors.

    Raises:
        ValueError: if their shapes differ.
    """
    given = block.last.outputs[0]
    if tuple(block.start.shape) != tuple(given.shape):
        raise ValueError(_other_shapes(told, [block.start], given))
    return Removal(block.last.operation, Replacement(reads=block.start), block.members, block.staying)


def of_layer(found: Analysis, place: Place) -> Removal:
    """Removes a layer whose input and output have one shape, or the residual branch that it belongs to.

    Raises:
        ValueError: if neither is possible.
    """
    branches = _branches(found, place.graph)
    if len(place.nodes) == 1:
        for merge, skip in branches:
            if merge is place.node:
                return _branch(found, place.graph, merge, skip)
    chosen = {_alike(node) for node in place.nodes}
    if chosen != {None} and len(chosen) == 1 and _merges(place.node) == "":
        return Removal(place.node.operation, Replacement(hands_on=chosen.pop() or 0), (place.path,))
    around = []
    for merge, skip in branches:
        members = place.graph.between(skip, merge.outputs[0]) or []
        if place.calls == 1 and place.node in members:
            around.append((len(members), merge, skip))
    if around:
        _, merge, skip = min(around, key=lambda one: one[0])
        return _branch(found, place.graph, merge, skip)
    raise ValueError(_other_shapes(f'"{place.path}"', inputs_of(place.node), place.node.outputs[0]))


def _other_shapes(told: str, read: list[Any], given: Any) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in read)
    return (
        f"What is removed must read and give the same shape, or belong to a residual branch whose other input is where it begins. "
        f"Received: {told}, which gives {tuple(given.shape)} from {shapes}. Name a block (first, last) around it that keeps the "
        "shape, or let `linearize` put a linear map in its place."
    )


def _branch(found: Analysis, graph: Graph, merge: Any, skip: Any) -> Removal:
    members = graph.between(skip, merge.outputs[0]) or [merge]
    block = _places.as_block(found, graph, skip, merge, members)
    return Removal(merge.operation, Replacement(reads=skip), block.members, block.staying)


def _merges(node: Any) -> str:
    """`"Add"` or `"Subtract"` for what adds or subtracts several tensors; "" for all else."""
    kind = type(node.operation)
    known = kind.__name__ in ("Add", "Subtract") and kind.__module__.startswith("keras.")
    return kind.__name__ if known and len(inputs_of(node)) > 1 and _alike(node) is None else ""


def _branches(found: Analysis, graph: Graph) -> list[tuple[Any, Any]]:
    """Calls that add branches to the tensor where these begin, and that tensor."""
    pairs = []
    for node in graph.nodes:
        kind = _merges(node) if len(found.records[id(node.operation)].outputs) == 1 else ""
        tensors = inputs_of(node)
        for skip in tensors[: 1 if kind == "Subtract" else None] if kind else ():
            others = [tensor for tensor in tensors if tensor is not skip]
            same = tuple(skip.shape) == tuple(node.outputs[0].shape)
            if same and all(graph.between(skip, tensor) is not None for tensor in others):
                pairs.append((node, skip))
    return pairs


def _alike(node: Any) -> int | None:
    """Number of the one input that has the shape of the output; None where there is none, or more than one."""
    if len(node.outputs) != 1:
        return None
    shape = tuple(node.outputs[0].shape)
    found = [tensor for tensor in inputs_of(node) if tuple(tensor.shape) == shape]
    if type(node.operation).__name__ == "Subtract" and found[:1] != inputs_of(node)[:1]:
        return None  # b - x is not x without b
    at = [index for index, tensor in enumerate(node.arguments.keras_tensors) if len(found) == 1 and tensor is found[0]]
    return at[0] if at else None


def refit(rebuilt: Rebuilt, batches: Iterable[list[Any]], verbose: Verbose) -> tuple[list[Refit], dict[str, str]]:
    """Fits the next layers with kernels after what was removed to what they gave before.

    Args:
        rebuilt: the two models.
        batches: inputs of the old model, flat.
        verbose: of the progress.

    Returns:
        What was done, and why other such layers were left as they are, by path.
    """
    walk = _Neighbours(rebuilt, verbose)
    walk.spread(rebuilt.found.model, 1)
    return walk.run(batches)


class _Neighbours(_Walk):
    """Runs two networks side by side, and fits those layers that read something else than before."""

    def __init__(self, rebuilt: Rebuilt, verbose: Verbose) -> None:
        super().__init__(rebuilt, verbose)
        self.readers: set[int] = set()
        self.changed: set[int] = set()
        self.used = {id(layer) for layer in rebuilt.model._flatten_layers()}

    def spread(self, model: Any, calls: int) -> None:
        """Finds these layers: what changes goes on through layers without kernels."""
        for node in _nodes.nodes_of(model):
            operation, record = node.operation, self.records[id(node.operation)]
            if id(operation) in self.rebuilt.replacements:
                self._mark(node.outputs)
            elif _nodes.is_open(operation) and (inner := _nodes.inner_inputs(node)) is not None:
                graph = _nodes.graph_of(operation)
                self._mark(own for own, given in zip(graph.inputs, inner, strict=True) if id(given) in self.changed)
                self.spread(operation, calls * len(record.outputs))
                self._mark(given for given, own in zip(node.outputs, graph.outputs, strict=True) if id(own) in self.changed)
            elif any(id(tensor) in self.changed for tensor in inputs_of(node)):
                self._reached(node, record, calls)

    def _reached(self, node: Any, record: Record, calls: int) -> None:
        operation = node.operation
        fits = _reading.can_be_fitted(operation)
        if fits and id(self.rebuilt.clones[id(operation)]) not in self.used:
            return
        if fits and calls * len(record.outputs) > 1:
            self.skipped[record.path] = "it is used several times"
        elif fits:
            self.readers.add(id(operation))
            return
        self._mark(node.outputs)

    def _mark(self, tensors: Iterable[Any]) -> None:
        self.changed |= {id(tensor) for tensor in tensors}

    def _has_shared(self, model: Any, calls: int) -> bool:
        return False

    def visit(
        self, node: Any, record: Record, values: list[dict[int, Any]], calls: int, nodes: list[Any], outputs: set[int]
    ) -> None:
        """Fits these layers."""
        if id(node.operation) in self.readers:
            self._fit(node, record, values, calls, *followers(self, node, nodes, outputs))
