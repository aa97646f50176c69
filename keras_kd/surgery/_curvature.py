"""What do the outputs lose without a channel, and how well do the others stand for it? Moments of values and of gradients."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _outputs
from keras_kd.surgery import _heads, _nodes, _reading
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._shrinkage import Covariance

_WORK = 4e10  # multiply-accumulates for the moments of one read point
_LEAST = 8  # rows a channel, whatever the work
_RIDGE = 1e-3  # of the mean variance
_TINY = float(np.finfo("float32").tiny)
_FEW = 0.1  # of the mean variance for each number a row, of heads: in few rows any number seems to be a combination of many others
_MEMORY = 1 << 28  # bytes for a pass with gradients


@dataclasses.dataclass
class ReadPoint:
    """A tensor that a layer reads channels from.

    Attributes:
        axis: where its channels are.
        roots: of its channels, each once.
        table: `(positions, roots)`, where each of them stands along the axis; None where some stand more often than others.
        inverse: for each place along the axis, which root it is.
        features: numbers of each root in a row: 1 for channels.
        first: where the same tensor is read before, by another layer; None there.
    """

    axis: int
    roots: np.ndarray
    table: np.ndarray | None
    inverse: np.ndarray
    features: int = 1
    first: "ReadPoint | None" = None

    def rows(self, x: Any) -> Any:
        """`(samples, rows, roots * features)` of a batch; what stands several times along the axis is one row each."""
        x = ops.cast(ops.moveaxis(x, self.axis, -1), "float32")
        if self.table is not None and len(self.table) == 1:
            return ops.reshape(ops.take(x, self.table[0], -1), (x.shape[0], -1, len(self.roots)))
        if self.table is not None:
            return ops.reshape(ops.take(x, self.table, -1), (x.shape[0], -1, len(self.roots)))
        spread = np.eye(len(self.roots), dtype="float32")[self.inverse] / np.bincount(self.inverse)
        return ops.reshape(ops.matmul(x, spread), (x.shape[0], -1, len(self.roots)))


@dataclasses.dataclass
class HeadPoint(ReadPoint):
    """What the output projection of attention reads: `features` are all that the heads of a root give.

    Heads often give much the same at all steps, so that what is lost there adds up. A point of its own is therefore the mean over
    the steps, with the sum of the gradients, and here is what is left: `sum_t g_t' d_t = (sum_t g_t)' mean d + sum_t g_t' (d_t -
    mean d)`.

    Attributes:
        steady: the point of the means.
    """

    steady: ReadPoint = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.steady = ReadPoint(self.axis, self.roots, None, self.inverse, self.features)

    def parted(self, values: Any, slopes: Any) -> list[tuple[ReadPoint, Any, Any]]:
        """Both points with the rows of values and gradients."""
        mean, total = ops.mean(values, 1, keepdims=True), ops.sum(slopes, 1, keepdims=True)
        return [(self.steady, mean, total), (self, values - mean, slopes - total / values.shape[1])]

    def rows(self, x: Any) -> Any:
        """`(samples, steps, roots * features)` of `(samples, *steps, heads, channels)`."""
        together = ops.take(ops.cast(x, "float32"), np.argsort(self.inverse, kind="stable"), -2)
        return ops.reshape(together, (x.shape[0], -1, len(self.roots) * self.features))


HEADS = -2  # their axis
_INSIDE = 0  # in the place of the `id` of a tensor: what is read inside of the layer


def read_points(found: Analysis) -> dict[tuple[int, int], ReadPoint]:
    """Where channels are read that can go, by `id` of the call and of the tensor; of heads, that of the call and 0."""
    points: dict[tuple[int, int], ReadPoint] = {}
    firsts: dict[tuple[int, int], ReadPoint] = {}
    for node in _nodes.calls_of(found.model):
        record = found.records[id(node.operation)]
        read = {root for one in _reading.read_axes(record) for root in found.roots[one].tolist()}
        given = {root for t in node.outputs for one in found.labels[id(t)] if one is not None for root in found.roots[one].tolist()}
        for tensor in node.arguments.keras_tensors:
            for axis, atoms in enumerate(found.labels[id(tensor)]):
                roots = found.rooted(atoms)
                ending = [root for root in set(roots.tolist()) if (root in read or root not in given) and root not in found.pinned]
                if ending:
                    point = points[id(node), id(tensor)] = _point(axis, roots)
                    point.first = firsts.get((id(tensor), axis))
                    firsts.setdefault((id(tensor), axis), point)
        heads = found.rooted(_heads.heads_of(record))
        if any(root not in found.pinned for root in heads.tolist()):
            roots, inverse = np.unique(heads, return_inverse=True)
            features = math.prod(record.operation._output_dense.kernel.shape[:2]) // len(roots)
            points[id(node), _INSIDE] = HeadPoint(HEADS, roots, None, inverse, features)
    return points


def _point(axis: int, roots: np.ndarray) -> ReadPoint:
    unique, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    even = bool(np.all(counts == counts[0]))
    table = np.argsort(roots, kind="stable").reshape(len(unique), -1).T if even else None
    return ReadPoint(axis, unique, table, inverse)


def gradients(
    found: Analysis, points: dict[tuple[int, int], ReadPoint], inputs: list[Any], loss: Callable[[list[Any]], Any]
) -> Iterator[tuple[ReadPoint, Any, Any]]:
    """Values at all read points, in `ReadPoint.rows`, and the gradients of the sum of a loss over the samples; one by one."""
    seen: list[tuple[ReadPoint, Any, Any, Any]] = []  # a tensor, what is read of it, and the layer inside of which that is

    with tf.GradientTape(watch_accessed_variables=False) as tape:

        def watched(x: Any) -> Any:
            entered = tf.identity(x)
            entered._keras_mask = getattr(x, "_keras_mask", None)
            tape.watch(entered)
            return entered

        def call(node: Any, values: dict[int, Any]) -> list[Any]:
            for key in list(values):
                point = points.get((id(node), key))
                if point is not None:
                    values[key] = watched(values[key])
                    seen.append((point, values[key], values[key], None))
            inside = points.get((id(node), _INSIDE))
            if inside is None:
                return _nodes.called(node.operation, node, values)
            with tape.stop_recording():
                context = _heads.context_of(node.operation, node, values)
            first, *others = _nodes.called(node.operation, node, values)
            first = watched(first)
            seen.append((inside, first, context, node.operation))
            return [first, *others]

        for x in (one for one in inputs if one.dtype.is_floating):
            tape.watch(x)  # so that what comes before the first read point is no constant
        total = loss(_nodes.run(found.model, inputs, call))
    slopes = tape.gradient(total, [value for _, value, _, _ in seen])
    del total
    if seen and all(one is None for one in slopes):
        raise ValueError(
            "The outputs must change smoothly with what the layers read, for a criterion of gradients. Received: a model whose "
            'outputs do not (is there an argmax, a rounding, stop_gradient?). Use criterion="magnitude".'
        )
    while seen:  # what was looked at needs no memory any more
        (point, _, read, layer), gradient = seen.pop(), slopes.pop()
        if gradient is not None and isinstance(point, HeadPoint):
            yield from point.parted(point.rows(read), point.rows(_heads.slopes_of(layer, gradient)))
        elif gradient is not None:
            yield point, point.rows(read), point.rows(gradient)


def samples_at_once(model: Any) -> int:
    """How many samples a pass with gradients may have: it holds what all layers give, the gradients, and copies at read points."""
    held = sum(int(np.prod([n or 64 for n in t.shape[1:]], initial=4.0)) for node in _nodes.calls_of(model) for t in node.outputs)
    return max(_MEMORY // (3 * max(held, 1)), 1)


def parted(batches: Iterable[Any], most: int) -> Iterator[Any]:
    """The same batches, nested arrays, in parts of at most so many samples."""
    for batch in batches:
        for at in range(0, len(keras.tree.flatten(batch)[0]), most):
            part = slice(at, at + most)
            yield keras.tree.map_structure(lambda one, part=part: None if one is None else one[part], batch)


class Chance:
    """A random sum of a model's outputs: the mean square of its gradient is what the outputs' squares change by (Hutchinson).

    Probabilities count by their logarithms, so that it is as if they were logits. Outputs are divided by their spread.
    """

    def __init__(self, model: Any) -> None:
        self._kinds = _outputs.output_kinds(model)
        self._rng = np.random.default_rng(0)
        self._scales: list[float] = []

    def __call__(self, outputs: list[Any]) -> Any:
        values = [as_logits(value, kind) for value, kind in zip(outputs, self._kinds, strict=True)]
        if not self._scales:
            self._scales = [1 / _size(value) for value in values]
        signs = [self._rng.choice(np.asarray([-1, 1], "float32"), value.shape) for value in values]
        return sum(
            ops.sum(value * sign) * scale / np.sqrt(max(value[0].shape.num_elements(), 1))
            for value, sign, scale in zip(values, signs, self._scales, strict=True)
        )


def _size(value: Any) -> float:
    """Standard deviation of an output; its size where all that it gives is the same."""
    spread, size = float(tf.math.reduce_std(value)), float(tf.math.sqrt(tf.reduce_mean(tf.square(value))))
    return spread if spread > 1e-6 * size else size or 1.0


def as_logits(value: Any, kind: str | None) -> Any:
    """An output in single precision; the logarithm of probabilities."""
    value = ops.cast(value, "float32")
    if kind == _outputs.SOFTMAX:
        return ops.log(ops.maximum(value, 1e-7))
    if kind == _outputs.SIGMOID:
        value = ops.clip(value, 1e-7, 1 - 1e-7)
        return ops.log(value) - ops.log(1 - value)
    return value


class Curvature:
    """Second moments of what is read at each point, and of the gradient there.

    The outputs change by `E (g' d)^2` if the values change by `d`. With values and gradients taken as independent of each other
    (Martens, Grosse 2015) and `d` what the kept channels do not give by a linear map, that is the trace of `E g g'` times the
    covariance of `d`. With few samples the others seem to stand for each channel, as many as there are: so the covariance is a
    shrunk one. Layers that read the same tensor share it, and their `E g g'` are summed.

    Args:
        found: analysis of the model.
        batches: inputs, flat, batch by batch.
        samples: how many there are in all.
    """

    def __init__(self, found: Analysis, batches: Iterable[list[Any]], samples: int) -> None:
        points, loss, self._rng = read_points(found), Chance(found.model), np.random.default_rng(0)
        self._samples = samples
        self._covariances: dict[int, tuple[ReadPoint, Covariance]] = {}
        self._metrics: dict[int, np.ndarray] = {}
        self._precisions: dict[int, np.ndarray] = {}
        self.points: list[ReadPoint] = []
        for batch in parted(batches, samples_at_once(found.model)):
            for point, values, slopes in gradients(found, points, batch, loss):
                self._add(point, values, slopes)

    def _add(self, point: ReadPoint, values: Any, slopes: Any) -> None:
        width, count = values.shape[-1], values.shape[1]
        key = id(point.first or point)
        if key not in self._metrics:
            self._metrics[key] = np.zeros((width, width))
            self.points.append(point.first or point)
        most = int(max(_WORK / width**2, _LEAST * width) / self._samples) + 1
        if count > most:
            chosen = np.sort(self._rng.choice(count, most, replace=False))
            values, slopes = (ops.take(x, chosen, 1) for x in (values, slopes))
        if key not in self._covariances:
            self._covariances[key] = point, Covariance(np.mean(values, (0, 1), dtype="float64").astype("float32"))
        if self._covariances[key][0] is point:
            self._covariances[key][1].add(values)
        slopes = ops.reshape(slopes, (-1, width))
        products = np.asarray(ops.matmul(ops.transpose(slopes), slopes))
        self._metrics[key] += products * (max(count / most, 1) / self._samples)

    def _precision(self, point: ReadPoint) -> np.ndarray:
        """Inverse covariance of all that a tensor holds; the moments are used up."""
        key = id(point)
        if key not in self._precisions:
            moments = self._covariances.pop(key)[1]
            covariance = moments.plain() if point.axis == HEADS else moments.shrunk()
            if not np.isfinite(covariance).all() or not np.isfinite(self._metrics[key]).all():
                raise ValueError("`data` must give finite numbers everywhere. Received: NaN or infinity in what a layer reads.")
            n = len(covariance)
            share = max(_RIDGE, _FEW * n / moments.rows) if point.axis == HEADS else _RIDGE
            lost = n * _TINY  # what single precision may have taken for 0: without it, tiny values would leave no inverse
            covariance.flat[:: n + 1] += (share * float(np.trace(covariance)) / n or 1.0) + lost
            self._precisions[key] = np.linalg.inv(covariance)
        return self._precisions[key]

    def orders(self, several: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`order` of several groups; what no later group needs is forgotten."""
        last = {id(point): index for index, roots in enumerate(several) for point in self._reading(roots)}
        found = []
        for index, roots in enumerate(several):
            found.append(self.order(roots, frozenset(key for key, at in last.items() if at == index)))
        return found

    def _reading(self, roots: np.ndarray) -> list[ReadPoint]:
        """The tensors that hold all of some channels."""
        return [point for point in self.points if np.isin(roots, point.roots).all()]

    def order(self, roots: np.ndarray, last: frozenset[int] = frozenset()) -> tuple[np.ndarray, np.ndarray]:
        """In which order channels, or heads, of one group go, each the one that then costs least, and what all removed ones cost.

        Args:
            roots: of the channels.
            last: tensors that are forgotten, by `id` of the point.

        Returns:
            Their numbers, `(channels,)`, and the cost after each, `(channels,)`, in shares of the outputs' variance.
        """
        reading = self._reading(roots)
        if not reading:
            return np.arange(len(roots)), np.zeros(len(roots))
        return _eliminated([_Elimination(*self._pair(point, roots, id(point) in last), point.features) for point in reading])

    def _pair(self, point: ReadPoint, roots: np.ndarray, is_last: bool) -> tuple[np.ndarray, np.ndarray]:
        """Inverse covariance and metric of some channels; without a copy where nothing else needs them."""
        precision, metric = self._precision(point), self._metrics[id(point)]
        if is_last:
            del self._precisions[id(point)], self._metrics[id(point)]
        if np.array_equal(point.roots, roots):
            return precision, metric
        at = _spread(np.searchsorted(point.roots, roots), point.features)
        return precision[np.ix_(at, at)], metric[np.ix_(at, at)]


def _spread(members: np.ndarray, features: int) -> np.ndarray:
    """Indices of all numbers of some members that have several each."""
    return (members[:, None] * features + np.arange(features)).ravel()


def eliminate(
    precisions: Sequence[np.ndarray], metrics: Sequence[np.ndarray], features: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Removes variables one after the other, each time that whose absence costs least when the others stand for it.

    Args:
        precisions: for each point, the inverse covariance, `(n f, n f)`.
        metrics: for each point, what errors cost: `d' M d`, `(n f, n f)`.
        features: for each point, f, of how many numbers a variable consists there; 1 each where it is not given.

    Returns:
        The order, `(n,)`, and the summed cost after each, `(n,)`.
    """
    features = features or [1] * len(precisions)
    return _eliminated([_Elimination(*triple) for triple in zip(precisions, metrics, features, strict=True)])


def _eliminated(parts: "list[_Elimination]") -> tuple[np.ndarray, np.ndarray]:
    n = len(parts[0].scores())
    left, order, costs = np.arange(n), [], [0.0]
    at_once, block = max(n // 128, 1), max(n // 16, 32)
    while len(left):
        alive = np.ones(len(left), bool)
        while alive.any() and len(left) - alive.sum() < block:
            scores = np.where(alive, sum(part.scores() for part in parts), np.inf)
            gone = np.argsort(scores, kind="stable")[: min(at_once, int(alive.sum()))]
            lost = sum(part.remove(gone) for part in parts)
            shares = np.cumsum(scores[gone]) / max(float(scores[gone].sum()), 1e-300)
            costs += (costs[-1] + lost * shares).tolist()
            order += left[gone].tolist()
            alive[gone] = False
        left = left[alive]
        for part in parts:
            part.shrink(alive)
    return np.asarray(order), np.asarray(costs[1:])


class _Elimination:
    """Variables that go from one precision and one metric; what that changes is worked into the matrices block by block.

    ```
    P -> P - U U'        M -> M - X Y'
    ```

    Args:
        precision: `(n f, n f)`.
        metric: `(n f, n f)`.
        features: f, numbers of each variable.
    """

    def __init__(self, precision: np.ndarray, metric: np.ndarray, features: int = 1) -> None:
        self._features = features
        self._set(precision, metric)

    def _set(self, precision: np.ndarray, metric: np.ndarray) -> None:
        self._precision, self._metric = precision, metric
        self._variances, self._prices = (self._blocks(one) for one in (precision, metric))
        self._u, self._x, self._y = (np.zeros((len(precision), 0)) for _ in range(3))

    def _blocks(self, matrix: np.ndarray) -> np.ndarray:
        """Those on the diagonal, `(n, f, f)`."""
        n = len(matrix) // self._features
        return matrix.reshape(n, self._features, n, self._features)[np.arange(n), :, np.arange(n)].copy()

    def scores(self) -> np.ndarray:
        """What each variable costs, given those that have gone; those have no meaning any more."""
        if self._features == 1:
            return np.maximum(self._prices.ravel(), 0.0) / np.maximum(self._variances.ravel(), 1e-300)
        return np.maximum(np.trace(np.linalg.solve(self._variances, self._prices), axis1=1, axis2=2), 0.0)

    def remove(self, gone: np.ndarray) -> float:
        """Removes some variables; what they cost together: the trace of the metric times the errors' covariance."""
        at = _spread(gone, self._features)
        across = self._precision[:, at] - self._u @ self._u[at].T  # (n f, gone f)
        cross = self._metric[:, at] - self._x @ self._y[at].T  # (n f, gone f)
        pivot = across[at]
        root = 1 / np.sqrt(pivot) if pivot.size == 1 else np.linalg.inv(np.linalg.cholesky(pivot))
        inverse = root.T @ root
        among = cross[at]
        maps = across @ inverse
        halved = cross - maps @ among / 2
        self._u = np.concatenate([self._u, across @ root.T], axis=1)
        self._x = np.concatenate([self._x, maps, halved], axis=1)
        self._y = np.concatenate([self._y, halved, maps], axis=1)
        self._variances -= self._products(across, maps)
        twice = self._products(maps, halved)
        self._prices -= twice + twice.transpose(0, 2, 1)
        self._variances[gone] = np.eye(self._features)  # of no meaning, but regular
        return max(float(np.sum(among * inverse)), 0.0)

    def _products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Blocks on the diagonal of a product, `(n, f, f)`."""
        if self._features == 1:
            return np.einsum("ij,ij->i", a, b)[:, None, None]
        shape = (-1, self._features, a.shape[1])
        return np.matmul(a.reshape(shape), b.reshape(shape).transpose(0, 2, 1))

    def shrink(self, alive: np.ndarray) -> None:
        """Leaves the removed variables out of the matrices."""
        at = _spread(np.flatnonzero(alive), self._features)
        both = np.ix_(at, at)
        precision, metric = self._precision[both], self._metric[both]
        precision -= self._u[at] @ self._u[at].T
        metric -= self._x[at] @ self._y[at].T
        self._set(precision, metric)
