"""Which of several points are the better ones, when there are several objectives? Fronts, crowding, volume. All are minimised."""

import numpy as np


def dominates(values: np.ndarray, violations: np.ndarray) -> np.ndarray:
    """Whether point i is better than point j: at least as good in all objectives, and better in one.

    A point within all limits is better than any that is not; of two that are not, the one that violates less (Deb, 2000).

    Args:
        values: shape `(points, objectives)`.
        violations: shape `(points,)`, 0 for points within the limits.

    Returns:
        Booleans of shape `(points, points)`.
    """
    none_worse = (values[:, None] <= values[None]).all(-1)
    one_better = (values[:, None] < values[None]).any(-1)
    equal = violations[:, None] == violations[None]
    return np.where(equal, none_worse & one_better, violations[:, None] < violations[None])


def front_indices(values: np.ndarray, violations: np.ndarray) -> np.ndarray:
    """The front of each point: 0 for those that no other dominates, 1 for those that only these dominate, and so on."""
    better = dominates(values, violations)
    fronts = np.full(len(values), -1)
    index = 0
    while (left := fronts < 0).any():
        fronts[left & ~better[left].any(0)] = index
        index += 1
    return fronts


def crowding(values: np.ndarray) -> np.ndarray:
    """How far each point's neighbours are, over all objectives (Deb and others, 2002); infinite for the points at an end."""
    distances = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if span > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distances


def volume(points: np.ndarray, reference: np.ndarray) -> float:
    """What the points dominate of the space below `reference`: slices along the last objective, and so on inwards."""
    points = points[(points < reference).all(-1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.diff(np.append(points[:, -1], reference[-1]))
    inner = [volume(points[: index + 1, :-1], reference[:-1]) if depth else 0.0 for index, depth in enumerate(depths)]
    return float(depths @ np.asarray(inner))
