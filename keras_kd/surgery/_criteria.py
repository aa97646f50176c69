"""Which channel of a group matters least? Criteria of the literature: one number a channel, from weights or from gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd.surgery import _curvature
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery.graph import Group

Groups = Sequence[tuple[Group, np.ndarray]]


def magnitudes(found: Analysis, groups: Groups) -> list[np.ndarray]:
    """L2 norm of the weights that make a channel, over all layers that make it; each group's are divided by their mean.

    The norms are those of Li et al. (2017), summed over tied layers and divided as by Fang et al. (2023).
    """
    scores = []
    for group, roots in groups:
        squares = np.zeros(len(roots))
        for record in found.records.values():
            if record.path in group.makers:
                squares += _squares(found, record, roots)
        scores.append(_over_mean(np.sqrt(squares)))
    return scores


def _squares(found: Analysis, record: Any, roots: np.ndarray) -> np.ndarray:
    """Sum of the squares of what a layer's kernels have for each root that it makes."""
    total = np.zeros(len(roots))
    made = np.concatenate([*record.made.values()])
    place = {root: index for index, root in enumerate(roots.tolist())}
    for variable in record.operation.variables:
        axes = record.weights.get(id(variable), ())
        if not variable.name.endswith("kernel") and variable.name != "embeddings":
            continue
        values = np.square(np.asarray(keras.ops.convert_to_numpy(variable), "float64"))
        for axis, atoms in enumerate(axes):
            if atoms is None or not np.isin(atoms, made).all():  # of what it reads
                continue
            sums = values.sum(tuple(other for other in range(values.ndim) if other != axis))
            for root, one in zip(found.roots[atoms].tolist(), sums.tolist(), strict=True):
                if root in place:
                    total[place[root]] += one
    return total


def scales(found: Analysis, groups: Groups) -> list[np.ndarray]:
    """|gamma| of the batch normalisation that a channel goes through, summed where there are several (Liu et al. 2017).

    Raises:
        ValueError: for a group that goes through none with a scale.
    """
    scores: list[np.ndarray | None] = []
    for _, roots in groups:
        total, seen = np.zeros(len(roots)), False
        for record in found.records.values():
            layer = record.operation
            if not isinstance(layer, keras.layers.BatchNormalization) or layer.gamma is None:
                continue
            atoms = record.weights.get(id(layer.gamma), [None])[0]
            here = found.rooted(atoms)
            if np.isin(roots, here).all():
                gamma = np.abs(np.asarray(keras.ops.convert_to_numpy(layer.gamma), "float64"))
                total += [gamma[here == root].sum() for root in roots]
                seen = True
        scores.append(total if seen else None)
    if all(one is None for one in scores):
        raise ValueError(
            '`criterion="batch_norm"` needs channels that go through a BatchNormalization with a scale. Received: a model in which '
            'none do. Use criterion="magnitude" or "redundancy".'
        )
    # Groups without one are taken as average.
    return [np.ones(len(roots)) if one is None else _over_mean(one) for one, (_, roots) in zip(scores, groups, strict=True)]


def first_order(
    found: Analysis, groups: Groups, batches: Iterable[list[Any]], losses: Sequence[Callable[[list[Any]], Any]], kind: str
) -> list[np.ndarray]:
    """What the loss changes by, to first order, when a channel is set to 0 wherever it is read.

    ```
    taylor: E |sum_p g_p x_p|        fisher: 1/2 E (sum_p g_p x_p)^2        (p: positions and places where it is read)
    ```

    Args:
        found: analysis of the model.
        groups: whose channels are scored.
        batches: inputs, flat.
        losses: for each batch, a function of the outputs that gives the sum of the samples' losses.
        kind: `"taylor"` (Molchanov et al. 2017) or `"fisher"` (Theis et al. 2018).
    """
    points = _curvature.read_points(found)
    totals = np.zeros(len(found.roots))
    samples = 0
    for batch, loss in zip(batches, losses, strict=True):
        changes = np.zeros((len(batch[0]), len(found.roots)))
        for point, values, slopes in _curvature.gradients(found, points, batch, loss):
            spread = point.table is None and point.axis != _curvature.HEADS
            occurrences = len(point.inverse) // len(point.roots) if spread else 1
            sums = np.asarray(tf.reduce_sum(values * slopes, 1), "float64").reshape(len(batch[0]), len(point.roots), -1)
            changes[:, point.roots] += sums.sum(-1) * occurrences
        totals += np.abs(changes).sum(0) if kind == "taylor" else np.square(changes).sum(0) / 2
        samples += len(batch[0])
    return [totals[roots] / samples for _, roots in groups]


def of_user(criterion: Callable[[Any, Group], Any], model: Any, groups: Groups) -> list[np.ndarray]:
    """Scores that a function of the user gives for each group.

    Raises:
        ValueError: for scores of another length, or that are not finite.
    """
    scores = []
    for group, roots in groups:
        raw = criterion(model, group)
        try:
            given = np.asarray(raw, "float64")
        except (TypeError, ValueError):  # text, or rows of other lengths
            given = np.full((), np.nan)
        if given.shape != (len(roots),) or not np.isfinite(given).all():
            raise ValueError(
                f"`criterion` must give a finite number for each of the {len(roots)} channels of the group of "
                f'"{group.makers[0]}". Received: {_told(raw, given)}.'
            )
        scores.append(given)
    return scores


def _told(raw: Any, given: np.ndarray) -> str:
    """What a user's function gave in the place of numbers."""
    if not given.shape:
        return f"{raw!r:.60}"
    return f"shape {given.shape}" + ", not all finite" * (not np.isfinite(given).all())


def _over_mean(scores: np.ndarray) -> np.ndarray:
    mean = float(scores.mean())
    return scores / mean if mean > 0 else scores
