"""How do the kept channels take over the work of the removed ones? Least squares, layer by layer, on what the layers read."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd._moments import Moments
from keras_kd._progress import Verbose
from keras_kd.surgery import _nodes, _reading, _side_by_side
from keras_kd.surgery._gates import Gate, gate_after, through_gate
from keras_kd.surgery._reading import Channels, Part
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._visits import Record

_PENALTIES = (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the inputs' mean square
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
        basis: `(columns, directions)`, in which what is read is expressed, where it has fewer directions than columns.
        rows: what is read and what shall be given, batch by batch, where a ReLU follows.
    """

    seen: Moments
    unseen: Moments
    targets: Moments
    channels: Moments
    basis: np.ndarray | None = None
    rows: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)


class _Walk(_side_by_side.Walk):
    """Fits while two networks run side by side.

    Args:
        rebuilt: both.
        verbose: of the progress.
    """

    title = "refit"

    def __init__(self, rebuilt: Rebuilt, verbose: Verbose) -> None:
        super().__init__(rebuilt.found, rebuilt)
        self.verbose = verbose
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
                sums.append(_empty(part, _basis(part, new)))
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
            pairs = np.concatenate([read if sums.basis is None else read @ sums.basis, missing], axis=1)
            sums.seen.add(Moments.of(pairs[fits]))
            sums.unseen.add(Moments.of(pairs[~fits]))
            sums.targets.add(Moments.of(wanted[~fits]))
            if seen is not None and len(part.start) <= _GATED_COLUMNS:
                sums.rows.append((read, wanted))
            if part.channels is not None:
                rows = _of_channels(part.channels, part.rows(before, True, chosen)[fits], read[fits])
                sums.channels.add(Moments.of(rows[:: max(len(rows) * len(old) // _side_by_side.LEAST_ROWS, 1)]))

    def _written(self, path: str, part: Part, sums: _Sums, norm: Any, gate: Gate | None = None) -> "_Fit":
        """Solves, and writes what is better than the old weights."""
        takes = norm if part.shifts and part.begin is None else None
        free = part.begin is not None or takes is not None
        if not np.isfinite(sums.seen.mean).all() or not np.isfinite(sums.unseen.mean).all():
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

    def _finish(self, path: str, parts: list[Part], sums: list[_Sums], fits: list["_Fit"]) -> None:
        """Says what was done with a layer."""
        energy = sum(float(np.trace(one.targets.scatter)) for one in sums) or 1.0
        errors = [sum(getattr(fit, name) for fit in fits) / energy for name in ("before", "after")]
        rows = sums[0].seen.rows + sums[0].unseen.rows
        penalties = [fit.l2 for fit in fits if fit.l2 is not None]
        self.done[path] = Refit(path, len(parts[0].start), rows, errors[0], errors[1], max(penalties, default=None))


def _read(part: Part, node: Any, values: dict[int, Any], is_old: bool) -> list[Any]:
    """What a part reads in one of the networks, batch by batch."""
    if part.inside is None:
        return list(values[id(part.source)])
    batches = range(len(values[id(part.source)]))
    return [part.inside({id(t): values[id(t)][index] for t in node.arguments.keras_tensors}, is_old) for index in batches]


def _through(gate: Gate | None, part: Part, sums: _Sums, fit: "_Fit", free: bool) -> tuple[np.ndarray, np.ndarray]:
    """What to add to a part's kernel and bias: the fit, and where a ReLU follows, what is better behind that."""
    rows = sum(len(read) for read, _ in sums.rows)
    is_exact = fit.after <= _EXACT * float(np.trace(sums.targets.scatter))
    if gate is None or fit.l2 is None or is_exact or rows < 4 * len(part.start):
        return fit.kernel, fit.bias
    start = part.start.astype("float64"), np.zeros(part.start.shape[1]) if part.begin is None else part.begin.astype("float64")
    pairs = np.concatenate([read for read, _ in sums.rows]), np.concatenate([wanted for _, wanted in sums.rows])
    fitted = start[0] + fit.kernel, start[1] + fit.bias
    l2 = fit.l2 if np.isfinite(fit.l2) else _PENALTIES[-1]
    kernel, bias = through_gate(gate.part(part.outputs), pairs, fitted, start, l2, free)
    return kernel - start[0], bias - start[1]


def _basis(part: Part, new: list[Any]) -> np.ndarray | None:
    """The directions of what a part reads, where there are fewer positions than columns; None for others."""
    counts = [part.positions(x) for x in new]
    if sum(counts) >= len(part.start):
        return None
    read = np.concatenate([part.rows(x, False, np.arange(count)) for x, count in zip(new, counts, strict=True)])
    if not np.isfinite(read).all():
        return None
    return np.linalg.qr(read.T)[0]


def _solved(part: Part, sums: _Sums, free: bool) -> "_Fit":
    """The correction of a part's kernel; the penalty lets directions that are never read be, so that they can be left out."""
    origins, basis, width = list(_origins(part, sums.channels)), sums.basis, len(part.start)
    if basis is None:
        return solve(sums.seen, sums.unseen, width, free, origins)
    fit = solve(sums.seen, sums.unseen, basis.shape[1], free, [basis.T @ one for one in origins], width=width)
    whole = np.zeros(part.start.shape) if fit.origin is None else origins[fit.origin]
    return dataclasses.replace(fit, kernel=whole + basis @ (fit.kernel - basis.T @ whole))


def _empty(part: Part, basis: np.ndarray | None = None) -> _Sums:
    columns, outputs = part.start.shape
    columns = columns if basis is None else basis.shape[1]
    width = 0 if part.channels is None else len(part.channels.keep) + part.channels.new.shape[1]
    seen, unseen, targets, channels = (Moments.empty(n) for n in (columns + outputs, columns + outputs, outputs, width))
    return _Sums(seen, unseen, targets, channels, basis)


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
    for l2 in _PENALTIES[::2]:
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


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A correction of a linear map: what to add to its kernel and its bias."""

    kernel: np.ndarray
    bias: np.ndarray
    l2: float | None
    before: float
    after: float
    origin: int | None = None


def solve(
    seen: Moments,
    unseen: Moments,
    columns: int,
    intercept: bool,
    origins: Sequence[np.ndarray] = (),
    *,
    width: int | None = None,
) -> _Fit:
    """Ridge regression of residuals, its penalty chosen on rows that it did not see.

    ```
    min over D, b of  sum_i |r_i - D' x_i - b|^2 + l2 |D|^2
    ```

    The penalty draws to an origin: the old weights, or what a better of the `origins` makes of them. So little data changes little.

    Args:
        seen: moments of rows `[x, r]`.
        unseen: of others.
        columns: of x.
        intercept: whether b is free, or 0.
        origins: corrections from which the penalty may start, besides that of the old weights.
        width: number of columns that the penalty is relative to, if these are not all.
    """
    check = about(unseen, False)
    before = float(np.trace(check[columns:, columns:]))
    origin = np.zeros((columns, len(seen.mean) - columns))
    best = _Fit(origin, origin[0], None, before, before)
    if not seen.rows or not unseen.rows:
        return best
    for index, start in enumerate(origins):
        bias = seen.mean[columns:] - seen.mean[:columns] @ start if intercept else np.zeros(start.shape[1])
        after = squares(unseen, check, columns, start, bias)
        if after < best.after:
            origin, best = start, dataclasses.replace(best, kernel=start, bias=bias, l2=np.inf, after=after, origin=index)
    seen, unseen = _moved(seen, columns, origin), _moved(unseen, columns, origin)
    fit, check = about(seen, intercept), about(unseen, False)
    scale = float(np.trace(fit[:columns, :columns])) / (width or columns) or 1.0
    for l2 in _PENALTIES if columns <= 1500 else _PENALTIES[1::2]:
        kernel, bias = _ridge(seen, fit, columns, l2 * scale, intercept)
        after = squares(unseen, check, columns, kernel, bias)
        if after < best.after:
            best = dataclasses.replace(best, kernel=origin + kernel, bias=bias, l2=l2, after=after)
    if best.l2 is not None and np.isfinite(best.l2):  # once more, on all rows
        whole = Moments(seen.weight, seen.rows, seen.mean.copy(), seen.scatter.copy())
        whole.add(unseen)
        fit = about(whole, intercept)
        scale = float(np.trace(fit[:columns, :columns])) / (width or columns) or 1.0
        kernel, bias = _ridge(whole, fit, columns, best.l2 * scale, intercept)
        best = dataclasses.replace(best, kernel=origin + kernel, bias=bias)
    return best


def _moved(moments: Moments, columns: int, origin: np.ndarray) -> Moments:
    """Moments of `[x, r - origin' x]` from those of `[x, r]`."""
    if not origin.any():
        return moments
    mean, scatter = moments.mean.copy(), moments.scatter.copy()
    mean[columns:] -= mean[:columns] @ origin
    known = scatter[:columns, :columns] @ origin  # (columns, outputs)
    cross = origin.T @ scatter[:columns, columns:]
    scatter[columns:, columns:] += origin.T @ known - cross - cross.T
    scatter[:columns, columns:] -= known
    scatter[columns:, :columns] -= known.T
    return Moments(moments.weight, moments.rows, mean, scatter)


def about(moments: Moments, mean: bool) -> np.ndarray:
    """Second moments, about the mean or about 0."""
    return moments.scatter if mean else moments.scatter + moments.weight * np.outer(moments.mean, moments.mean)


def _ridge(moments: Moments, second: np.ndarray, columns: int, l2: float, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    square = second[:columns, :columns] + l2 * np.eye(columns)
    kernel = np.linalg.solve(square, second[:columns, columns:])
    bias = moments.mean[columns:] - moments.mean[:columns] @ kernel
    return kernel, bias if intercept else np.zeros_like(bias)


def squares(moments: Moments, second: np.ndarray, columns: int, kernel: np.ndarray, bias: np.ndarray) -> float:
    """Sum of squares of what is left of the residuals."""
    inner, cross = second[:columns, :columns], second[:columns, columns:]
    whole = float(np.trace(second[columns:, columns:]))
    left = whole - 2 * np.sum(kernel * cross) + np.sum(kernel * (inner @ kernel))
    mean = moments.mean[columns:] - moments.mean[:columns] @ kernel
    return max(float(left + moments.weight * (bias @ bias - 2 * bias @ mean)), 1e-13 * whole)  # below is rounding
