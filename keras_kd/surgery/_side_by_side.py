"""What do two networks give for the same data? Both run side by side, layer after layer, so that one can be fitted to the other."""

import collections
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import _batching
from keras_kd._progress import Progress, Verbose
from keras_kd.surgery import _nodes
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._visits import Record

LEAST_ROWS = 16384
_MAX_ROWS = 32768
_BATCH = 64
_MEMORY = 1 << 30  # bytes for what both networks hold at a time


def checked_batches(model: Any, data: Any) -> Iterator[list[Any]]:
    """Flat inputs of the model's types; the first batch is looked at right away."""
    stream = _batching.batches(data, size=64, required=False)
    first = fitting(model, next(stream)[0])
    return itertools.chain([first], (fitting(model, batch[0]) for batch in stream))


def fitting(model: Any, x: Any) -> list[Any]:
    """Flat inputs of a batch, of the model's types."""
    wanted = _nodes.graph_of(model).inputs
    given = keras.tree.flatten(x)
    names = {tensor.name for tensor in wanted}
    if isinstance(x, dict) and set(x) == names:
        given = [x[tensor.name] for tensor in wanted]
    elif isinstance(x, dict) and len(x) == len(wanted) > 1 and set(x) != _keys(model):
        raise ValueError(
            f'`data` must have the names that "{model.name}" takes, {", ".join(sorted(names))}. '
            f"Received: {', '.join(sorted(map(str, x)))}."
        )
    shapes = [tuple(np.shape(value)) for value in given]
    fits = len(given) == len(wanted) and all(
        len(shape) == len(tensor.shape) and all(m in (None, n) for n, m in zip(shape[1:], tensor.shape[1:], strict=True))
        for shape, tensor in zip(shapes, wanted, strict=True)
    )
    if not fits:
        expected = ", ".join(str(tuple(tensor.shape)) for tensor in wanted)
        raise ValueError(
            f'`data` must have the shape that "{model.name}" takes, {expected}. '
            f"Received: {', '.join(map(str, shapes)) or 'nothing'}."
        )
    return [keras.ops.convert_to_tensor(value, tensor.dtype) for value, tensor in zip(given, wanted, strict=True)]


def _keys(model: Any) -> set[Any]:
    """Names of a model's inputs where it was made with a dict of them."""
    structure = _nodes.graph_of(model)._inputs_struct
    return set(structure) if isinstance(structure, dict) else set()


def held(model: Any, batches: Iterable[list[Any]]) -> list[list[Any]]:
    """For each input of a model, lists of batches: as much as both networks can hold."""
    room = samples_that_fit(model)
    kept: list[list[Any]] = []
    for batch in batches:
        kept.append([x[:room] for x in batch])
        room -= len(batch[0])
        if room <= 0:
            break
    kept = [[x[at : at + _BATCH] for x in batch] for batch in kept for at in range(0, len(batch[0]), _BATCH)]
    return [[batch[index] for batch in kept] for index in range(len(kept[0]))]


Samples = list[tuple[list[Any], Any]]


def samples_of(model: Any, data: Any, labels: Any) -> Samples:
    """Batches of flat inputs and labels, as many as both networks can hold."""
    room = samples_that_fit(model)
    kept: Samples = []
    for x, y, _ in _batching.batches(data, labels, size=64, required=False):
        flat = [one[:room] for one in fitting(model, x)]
        _check_finite(flat)
        count = len(flat[0])
        kept.append((flat, None if y is None else keras.tree.map_structure(operator.itemgetter(slice(count)), y)))
        room -= count
        if room <= 0:
            break
    return kept


def _check_finite(flat: Sequence[Any]) -> None:
    for one in flat:
        if keras.backend.is_float_dtype(one.dtype) and not bool(keras.ops.all(keras.ops.isfinite(one))):
            raise ValueError("`data` must be finite. Received: NaN or infinity.")


class Walk:
    """Runs an old network and a new one, and visits each call before it is computed.

    Args:
        found: analysis of the old model.
        rebuilt: both models; None for the old one alone.
        verbose: of the progress, which counts calls of layers.

    Attributes:
        records: of the old model's layers by `id`.
        alone: whether only the old network runs.
        title: what the progress of a pass is called.
    """

    title = ""

    def __init__(self, found: Analysis, rebuilt: Rebuilt | None = None, verbose: Verbose = 0) -> None:
        self.found, self._both, self._verbose = found, rebuilt, verbose
        self._replacements = {} if rebuilt is None else rebuilt.replacements
        self.records = found.records
        self.alone = rebuilt is None
        self._rng = np.random.default_rng(0)
        self._progress = Progress(verbose=0)

    def visit(
        self, node: Any, record: Record, values: list[dict[int, Any]], calls: int, nodes: list[Any], outputs: set[int]
    ) -> None:
        """What to do before a call is computed.

        Args:
            node: the call.
            record: of its layer.
            values: lists of batches by `id` of the symbolic tensors, in the old and in the new network.
            calls: how often the layer is called in a pass.
            nodes: all calls of the model around it.
            outputs: `id` of the tensors that this gives.
        """
        raise NotImplementedError

    def through(self, inputs: list[Any]) -> None:
        """Runs the whole model: for each of its inputs, lists of batches."""
        calls = sum(1 for _ in _nodes.calls_of(self.found.model))
        with Progress(calls, what="layers", title=self.title, verbose=self._verbose) as self._progress:
            self._through(self.found.model, inputs, inputs, 1)

    def sampled(self, count: int, samples: int, batches: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Some of a batch's positions, and which of them to fit on: those in three quarters of the samples.

        Args:
            count: positions in the batch, samples one after the other.
            samples: in the batch.
            batches: how many there are.
            columns: of what is fitted: more of them need more rows.
        """
        share = max(min(_MAX_ROWS, max(LEAST_ROWS, 8 * columns)) // batches, 1)
        chosen = np.sort(self._rng.choice(count, min(count, share), replace=False))
        split = count * 3 // 4 if samples == 1 else count // samples * (samples - max(samples // 4, 1))
        return chosen, chosen < split

    def _through(self, model: Any, old: list[Any], new: list[Any], calls: int) -> tuple[list[Any], list[Any]]:
        """Runs a model: for each of its inputs, lists of batches; the same lists where both networks give the same."""
        graph = _nodes.graph_of(model)
        values = [{id(t): v for t, v in zip(graph.inputs, given, strict=True)} for given in (old, new)]
        nodes = list(_nodes.nodes_of(model))
        uses = collections.Counter(id(t) for node in nodes for t in node.arguments.keras_tensors)
        uses.update(id(t) for t in graph.outputs)
        uses.update(id(one.reads) for one in self._replacements.values() if one.reads is not None)  # these may be read later
        for node in nodes:
            given = self._node(node, values, calls, nodes, {id(t) for t in graph.outputs})
            for one, several in zip(values, given, strict=True):
                one.update({id(t): value for t, value in zip(node.outputs, several, strict=True)})
            for tensor in node.arguments.keras_tensors:
                uses[id(tensor)] -= 1
                if not uses[id(tensor)]:
                    for one in values:
                        one.pop(id(tensor), None)
        first, second = ([one[id(t)] for t in graph.outputs] for one in values)
        return first, second

    def _node(
        self, node: Any, values: list[dict[int, Any]], calls: int, nodes: list[Any], outputs: set[int]
    ) -> tuple[list[Any], list[Any]]:
        operation, record = node.operation, self.records[id(node.operation)]
        calls *= len(record.outputs)
        replaced = id(operation) in self._replacements
        if _nodes.is_open(operation) and not replaced and (inner := _nodes.inner_inputs(node)) is not None:
            old, new = ([one[id(t)] for t in inner] for one in values)
            return self._through(operation, old, new, calls)
        self.visit(node, record, values, calls, nodes, outputs)
        masks = _masks_of(node, values)
        old = _call(operation, node, values[0])
        self._progress.advance()
        same = all(values[0][id(t)] is values[1][id(t)] for t in node.arguments.keras_tensors)
        if self.alone or self._both is None or (same and not self._differs(self._both, record)):
            return old, old
        for tensor, mask in masks:
            tensor._keras_mask = mask
        return old, self._new(self._both, node, values[1])

    def _differs(self, rebuilt: Rebuilt, record: Record) -> bool:
        return id(record.operation) in self._replacements or rebuilt.sliced(record)

    def _new(self, rebuilt: Rebuilt, node: Any, values: dict[int, Any]) -> list[Any]:
        """What the new network gives in the place of a call."""
        replacement = self._replacements.get(id(node.operation))
        if replacement is None:
            return _call(rebuilt.clones[id(node.operation)], node, values)
        read = node.arguments.keras_tensors[replacement.hands_on] if replacement.reads is None else replacement.reads
        given = values[id(read)]
        for layer in replacement.layers:
            given = [layer(x) for x in given]
        return [given]


def _masks_of(node: Any, values: list[dict[int, Any]]) -> list[tuple[Any, Any]]:
    """Tensors with masks that both networks read: attention takes a mask off what it has read."""
    shared = [values[0][id(t)] for t in node.arguments.keras_tensors if values[0][id(t)] is values[1][id(t)]]
    pairs = [(tensor, getattr(tensor, "_keras_mask", None)) for batches in shared for tensor in batches]
    return [(tensor, mask) for tensor, mask in pairs if mask is not None]


def _call(operation: Any, node: Any, values: dict[int, Any]) -> list[Any]:
    """What an operation gives for all batches, in inference: for each of its outputs, a list."""
    given = []
    for index in range(len(next(iter(values.values())))):
        given.append(_nodes.called(operation, node, {id(t): values[id(t)][index] for t in node.arguments.keras_tensors}))
    return [list(one) for one in zip(*given, strict=True)]


def samples_that_fit(model: Any) -> int:
    """How many samples both networks can hold at a time, by the shapes of the tensors that are alive together."""
    nodes = list(_nodes.nodes_of(model))
    uses = collections.Counter(id(t) for node in nodes for t in node.arguments.keras_tensors)
    alive = sum(_bytes(t) for t in _nodes.graph_of(model).inputs)
    most = alive
    for node in nodes:
        alive += sum(_bytes(t) for t in node.outputs)
        most = max(most, alive)
        for tensor in node.arguments.keras_tensors:
            uses[id(tensor)] -= 1
            if not uses[id(tensor)]:
                alive -= _bytes(tensor)
    return max(_MEMORY // (2 * most), 16)


def _bytes(tensor: Any) -> int:
    return int(np.prod([n or 64 for n in tensor.shape[1:]], initial=4.0))
