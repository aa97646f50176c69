"""How do the kept channels take over the work of the removed ones? Least squares, layer by layer, on what the layers read."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_kd._moments import Moments
from keras_kd._progress import Verbose
from keras_kd.surgery import _nodes, _reading, _side_by_side
from keras_kd.surgery._gates import Gate, gate_after, through_gate
from keras_kd.surgery._reading import Channels, Part
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._ridge import PENALTIES, Fit, about, solve, solve_few
from keras_kd.surgery._visits import Record

_GATED_COLUMNS = 1536  # rows of more are not kept
_EXACT = 1e-4  # share of the variance below which a fit is left as it is


@dataclasses.dataclass(frozen=True)
class Refit:
    """What was done with the weights of one layer.

    Attributes:
        layer: path of the layer, which read removed channels.
        columns: number of features that it reads now.
        rows: number of positions that it was fitted on.
        error_before: what its outputs, before its activation, are off by if it reads the kept channels with its old weights:
            the share of their variance, on samples that the fit did not see.
        error_after: the same with its new weights.
        l2: penalty that was chosen on these samples, relative to the mean square of the inputs; None where no fit was better than
            the old weights, which it has then; infinite where one map of channels for all positions was better than a fit of each.
    """

    layer: str
    columns: int
    rows: int
    error_before: float
    error_after: float
    l2: float | None


def refit(rebuilt: Rebuilt, batches: Iterable[list[Any]], verbose: Verbose) -> tuple[list[Refit], dict[str, str]]:
    """Fits the layers of the new model that lost inputs, in order, each to what the old one gave.

    Both networks run side by side, layer after layer, so that each layer is fitted on what the new network really gives it.

    Args:
        rebuilt: the two models.
        batches: inputs of the old model, flat.
        verbose: of the progress.

    Returns:
        What was done, and why other layers that lost inputs were left as they are, by path.
    """
    return _Walk(rebuilt, verbose).run(batches)


@dataclasses.dataclass
class _Sums:
    """Moments of what a part reads and of what it is off by.

    Attributes:
        seen: on samples to fit.
        unseen: on others.
        targets: of what it shall give, on these.
        channels: of what each position of a channel reads and is off by, whichever position it is.
        few: what is read, what it is off by and which rows to fit, batch by batch, in the place of the moments of both: where there
            are fewer rows than columns.
        rows: what is read and what shall be given, batch by batch, where a ReLU follows.
    """

    seen: Moments
    unseen: Moments
    targets: Moments
    channels: Moments
    few: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    rows: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.seen.rows + self.unseen.rows if self.few is None else sum(len(fits) for _, _, fits in self.few)

    def is_finite(self) -> bool:
        """Whether all that was read is."""
        if self.few is not None:
            return all(np.isfinite(read).all() and np.isfinite(missing).all() for read, missing, _ in self.few)
        return bool(np.isfinite(self.seen.mean).all() and np.isfinite(self.unseen.mean).all())


class _Walk(_side_by_side.Walk):
    """Fits while two networks run side by side.

    Args:
        rebuilt: both.
        verbose: of the progress.
    """

    title = "refit"

    def __init__(self, rebuilt: Rebuilt, verbose: Verbose) -> None:
        super().__init__(rebuilt.found, rebuilt, verbose)
        self.rebuilt = rebuilt
        self.done: dict[str, Refit] = {}
        self.skipped: dict[str, str] = {}
        self.shared: dict[str, list[tuple[Part, _Sums]]] | None = None

    def run(self, batches: Iterable[list[Any]]) -> tuple[list[Refit], dict[str, str]]:
        """Does all of it."""
        inputs = _side_by_side.held(self.found.model, batches)
        if self._has_shared(self.found.model, 1):  # all their calls count: what they read is only known of the old network
            self.shared, self.alone = {}, True
            self.through(inputs)
            found, self.shared, self.alone = self.shared, None, False
            for path, several in found.items():
                fits = [self._written(path, part, sums, None) for part, sums in several]
                self._finish(path, [part for part, _ in several], [sums for _, sums in several], fits)
        self.through(inputs)
        order = {record.path: index for index, record in enumerate(self.records.values())}
        return sorted(self.done.values(), key=lambda one: order[one.layer]), self.skipped

    def _has_shared(self, model: Any, calls: int) -> bool:
        for node in _nodes.nodes_of(model):
            record = self.records[id(node.operation)]
            count = calls * len(record.outputs)
            if _nodes.is_open(node.operation):
                if self._has_shared(node.operation, count):
                    return True
            elif count > 1 and _reading.reads_less(self.rebuilt, record):
                return True
        return False

    def visit(
        self, node: Any, record: Record, values: list[dict[int, Any]], calls: int, nodes: list[Any], outputs: set[int]
    ) -> None:
        """Fits what reads less."""
        if _reading.reads_less(self.rebuilt, record):
            self._fit(node, record, values, calls, *followers(self, node, nodes, outputs))

    def _fit(self, node: Any, record: Record, values: list[dict[int, Any]], calls: int, norm: Any, gate: Gate | None) -> None:
        """Fits a layer where it stands; those with several calls are only looked at, in a walk of their own."""
        if (calls > 1) != (self.shared is not None):
            return
        parts = _reading.parts_of(self.rebuilt, record, node)
        if isinstance(parts, str):
            self.skipped[record.path] = parts
            return
        if self.shared is None:
            sums, fits = [], []
            for part in parts:  # one after the other: what is inside a layer depends on those before
                old, new = (_read(part, node, one, is_old) for one, is_old in zip(values, (True, False), strict=True))
                sums.append(_empty(part, sum(part.positions(x) for x in new) < len(part.start)))
                self._gather(part, sums[-1], old, new, seen=gate)
                fits.append(self._written(record.path, part, sums[-1], norm, gate))
            self._finish(record.path, parts, sums, fits)
            return
        several = self.shared.setdefault(record.path, [(part, _empty(part)) for part in parts])
        for part, (_, one) in zip(parts, several, strict=True):
            old = _read(part, node, values[0], True)
            labels = self.rebuilt.found.labels[id(part.source)] if part.labels is None else part.labels
            self._gather(part, one, old, [self._narrowed(value, labels) for value in old])

    def _narrowed(self, value: Any, labels: Any) -> Any:
        """What the old network gives, of the channels that are kept."""
        for axis, atoms in enumerate(labels):
            if atoms is not None:
                value = keras.ops.take(value, np.flatnonzero(self.rebuilt.keep[atoms]), axis=axis)
        return value

    def _gather(self, part: Part, sums: _Sums, old: list[Any], new: list[Any], *, seen: Gate | None = None) -> None:
        """Takes in rows of all batches: three quarters of the samples to fit, the last quarter to choose the penalty."""
        offset = 0.0 if part.bias is None else part.bias
        begin = 0.0 if part.begin is None else part.begin
        for before, after in zip(old, new, strict=True):
            chosen, fits = self.sampled(part.positions(after), len(after), len(old), len(part.start))
            wanted = part.rows(before, True, chosen) @ part.kernel + offset
            read = part.rows(after, False, chosen)
            missing = wanted - read @ part.start - begin
            sums.targets.add(Moments.of(wanted[~fits]))
            if sums.few is not None:
                sums.few.append((read, missing, fits))
            else:
                pairs = np.concatenate([read, missing], axis=1)
                sums.seen.add(Moments.of(pairs[fits]))
                sums.unseen.add(Moments.of(pairs[~fits]))
            if seen is not None and len(part.start) <= _GATED_COLUMNS:
                sums.rows.append((read, wanted))
            if part.channels is not None:
                rows = _of_channels(part.channels, part.rows(before, True, chosen)[fits], read[fits])
                sums.channels.add(Moments.of(rows[:: max(len(rows) * len(old) // _side_by_side.LEAST_ROWS, 1)]))

    def _written(self, path: str, part: Part, sums: _Sums, norm: Any, gate: Gate | None = None) -> Fit:
        """Solves, and writes what is better than the old weights."""
        takes = norm if part.shifts and part.begin is None else None
        free = part.begin is not None or takes is not None
        if not sums.is_finite():
            raise ValueError(f'`data` must give finite numbers everywhere. Received: NaN or infinity in what "{path}" reads.')
        fit = _solved(part, sums, free)
        if fit.l2 is None:
            return fit
        kernel, bias = _through(gate, part, sums, fit, free)
        part.write(part.start + kernel, None if part.begin is None else part.begin + bias)
        if takes is not None:  # the constant that a layer without bias cannot give
            mean = np.asarray(keras.ops.convert_to_numpy(takes.moving_mean), "float64")
            mean[part.outputs] -= bias
            takes.moving_mean.assign(mean)
        return fit

    def _finish(self, path: str, parts: list[Part], sums: list[_Sums], fits: list[Fit]) -> None:
        """Says what was done with a layer."""
        energy = sum(float(np.trace(one.targets.scatter)) for one in sums) or 1.0
        errors = [sum(getattr(fit, name) for fit in fits) / energy for name in ("before", "after")]
        penalties = [fit.l2 for fit in fits if fit.l2 is not None]
        self.done[path] = Refit(path, len(parts[0].start), sums[0].count, errors[0], errors[1], max(penalties, default=None))


def _read(part: Part, node: Any, values: dict[int, Any], is_old: bool) -> list[Any]:
    """What a part reads in one of the networks, batch by batch."""
    if part.inside is None:
        return list(values[id(part.source)])
    batches = range(len(values[id(part.source)]))
    return [part.inside({id(t): values[id(t)][index] for t in node.arguments.keras_tensors}, is_old) for index in batches]


def _through(gate: Gate | None, part: Part, sums: _Sums, fit: Fit, free: bool) -> tuple[np.ndarray, np.ndarray]:
    """What to add to a part's kernel and bias: the fit, and where a ReLU follows, what is better behind that."""
    rows = sum(len(read) for read, _ in sums.rows)
    is_exact = fit.after <= _EXACT * float(np.trace(sums.targets.scatter))
    if gate is None or fit.l2 is None or is_exact or rows < 4 * len(part.start):
        return fit.kernel, fit.bias
    start = part.start.astype("float64"), np.zeros(part.start.shape[1]) if part.begin is None else part.begin.astype("float64")
    pairs = np.concatenate([read for read, _ in sums.rows]), np.concatenate([wanted for _, wanted in sums.rows])
    fitted = start[0] + fit.kernel, start[1] + fit.bias
    l2 = fit.l2 if np.isfinite(fit.l2) else PENALTIES[-1]
    kernel, bias = through_gate(gate.part(part.outputs), pairs, fitted, start, l2, free)
    return kernel - start[0], bias - start[1]


def _solved(part: Part, sums: _Sums, free: bool) -> Fit:
    """The correction of a part's kernel; the penalty lets directions that are never read be, so that they can be left out."""
    origins = list(_origins(part, sums.channels))
    if sums.few is None:
        return solve(sums.seen, sums.unseen, len(part.start), free, origins)
    read, missing, fits = (np.concatenate(several) for several in zip(*sums.few, strict=True))
    return solve_few(read, missing, fits, free, origins)


def _empty(part: Part, few: bool = False) -> _Sums:
    columns, outputs = part.start.shape
    both = 0 if few else columns + outputs
    width = 0 if part.channels is None else len(part.channels.keep) + part.channels.new.shape[1]
    seen, unseen, targets, channels = (Moments.empty(n) for n in (both, both, outputs, width))
    return _Sums(seen, unseen, targets, channels, [] if few else None)


def _of_channels(channels: Channels, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Rows `[kept channels in the new network, all in the old one minus these]`, of all positions one by one."""
    kept = new[:, channels.new].reshape(-1, channels.new.shape[1])
    missing = old[:, channels.old].reshape(-1, channels.old.shape[1])
    missing[:, channels.keep] -= kept
    return np.concatenate([kept, missing], axis=1)


def _origins(part: Part, moments: Moments) -> Iterator[np.ndarray]:
    """Corrections of a kernel that are the same map of channels at all positions: few numbers, which little data tells."""
    if part.channels is None or not moments.rows:
        return
    width = part.channels.new.shape[1]
    second = about(moments, False)
    scale = float(np.trace(second[:width, :width])) / width or 1.0
    kernels = part.kernel[part.channels.old]  # (positions, channels, outputs)
    for l2 in PENALTIES[::2]:
        shared = np.linalg.solve(second[:width, :width] + l2 * scale * np.eye(width), second[:width, width:])
        correction = np.zeros(part.start.shape)
        correction[part.channels.new.ravel()] = (shared @ kernels).reshape(-1, kernels.shape[-1])
        yield correction


def followers(walk: _Walk, node: Any, nodes: list[Any], outputs: set[int]) -> tuple[Any, Gate | None]:
    """What follows a call: the batch normalisation that can take a constant, and the ReLU through which the outputs are seen."""
    return _norm_after(walk, node, nodes, outputs), gate_after(walk.rebuilt, node, nodes, outputs)


def _norm_after(walk: _Walk, node: Any, nodes: list[Any], outputs: set[int]) -> Any:
    """The batch normalisation of the new model that alone reads a call, and reads nothing else; None if there is none."""
    given = node.outputs[0]
    readers = [other for other in nodes if any(t is given for t in other.arguments.keras_tensors)]
    if len(readers) != 1 or id(given) in outputs or getattr(node.operation, "activation", None) is not keras.activations.linear:
        return None
    norm = readers[0].operation
    alone = isinstance(norm, keras.layers.BatchNormalization) and len(walk.records[id(norm)].outputs) == 1
    channels = -1 if getattr(node.operation, "data_format", "channels_last") == "channels_last" else 1
    if not alone or norm.axis % len(given.shape) != channels % len(given.shape):
        return None
    return walk.rebuilt.clones.get(id(norm))
