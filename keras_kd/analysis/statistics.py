"""Which channels could the others replace? Redundancy, rank and orders of removal, from the moments of activations alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_kd._moments import Moments

# Below this share of a channel's variance, what is left of it is rounding.
ROUNDING = 1e-10


def effective_rank(spectrum: np.ndarray) -> float:
    """Number of directions that a spectrum is spread over.

    ```
    exp(-sum_i p_i log p_i),   p = spectrum / sum(spectrum)
    ```

    Args:
        spectrum: eigenvalues of a scatter matrix, or squared singular values, 0 or more.

    Returns:
        From 1, for a single direction, to their number, for equal ones; 0 if all are 0.

    Example:

    >>> keras_kd.analysis.effective_rank(np.array([1.0, 1.0, 0.0]))
    2.0

    Reference:
        Roy, Vetterli: The effective rank: a measure of effective dimensionality, 2007.
    """
    values = _checked_spectrum(spectrum)
    total = values.sum()
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def rank_at(spectrum: np.ndarray, energy: float = 0.99) -> int:
    """The smallest number of directions that hold a share of the energy.

    Args:
        spectrum: eigenvalues of a scatter matrix, or squared singular values, 0 or more.
        energy: the share, in (0, 1].

    Example:

    >>> keras_kd.analysis.rank_at(np.array([6.0, 3.0, 1.0]), 0.9)
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1]. Received: energy={energy!r}.")
    values = np.sort(_checked_spectrum(spectrum))[::-1]
    if not values.sum():
        return 0
    held = np.cumsum(values) / values.sum()
    return int(np.searchsorted(held, energy - 1e-12) + 1)


def _checked_spectrum(spectrum: np.ndarray) -> np.ndarray:
    values = np.asarray(spectrum, "float64")
    if values.ndim != 1 or not np.isfinite(values).all() or np.any(values < -ROUNDING * max(values.max(initial=0.0), 1.0)):
        raise ValueError(f"`spectrum` must be a vector of finite numbers of at least 0. Received: {values!r}.")
    return np.maximum(values, 0.0)


def redundancy(moments: Moments) -> np.ndarray:
    """How well does a linear map of all other channels give each channel?

    ```
    R^2_j = 1 - 1 / (S_jj (S^-1)_jj),   S: scatter matrix
    ```

    One eigendecomposition serves all channels; a loop of regressions is not needed.

    Args:
        moments: of channels.

    Returns:
        R^2 of each channel, in [0, 1]; 1 for a channel that the others give exactly, and for a constant one.

    Raises:
        ValueError: if there are no rows.
    """
    scatter = _scaled(moments)
    values, vectors = np.linalg.eigh(scatter)
    # Channels are scaled to 1: an eigenvalue below the rounding is a channel that the others give exactly.
    inverse = np.sum(vectors**2 / np.maximum(values, ROUNDING), axis=1)
    found = 1 - 1 / np.maximum(inverse, 1.0)
    found[inverse >= 0.5 / ROUNDING / len(scatter)] = 1.0
    return np.where(np.diag(moments.scatter) > 0, found, 1.0)


def _scaled(moments: Moments) -> np.ndarray:
    """The correlation matrix; a constant channel correlates with none."""
    if not moments.rows:
        raise ValueError("`moments` must hold at least one row. Received: none.")
    spread = np.sqrt(np.diag(moments.scatter))
    safe = np.where(spread > 0, spread, 1.0)
    scaled = moments.scatter / np.outer(safe, safe)
    np.fill_diagonal(scaled, 1.0)
    return scaled


@dataclasses.dataclass(frozen=True)
class RemovalOrder:
    """In which order channels can go.

    Attributes:
        keep: channels, the ones to keep longest first; removal takes them from the end.
        errors: `errors[k]`: share of the variance of all channels that a linear map of the first k to keep does not give, in
            [0, 1]; `errors[0]` is 1.
    """

    keep: tuple[int, ...]
    errors: tuple[float, ...]

    def removable(self, tolerance: float) -> tuple[int, ...]:
        """The channels that can go while the error stays at or below `tolerance`."""
        number = next(k for k, error in enumerate(self.errors) if error <= tolerance or k == len(self.keep))
        return self.keep[number:]


def removal_order(moments: Moments) -> RemovalOrder:
    """Chooses greedily which channels to keep: at each step the one that explains most of what is not explained yet.

    ```
    j = argmax sum_i C_ij^2 / C_jj;   C <- C - C_j C_j' / C_jj      (pivoted Cholesky on the scatter matrix, C = S at first)
    ```

    Args:
        moments: of channels, at the place where the next layer reads them.

    Returns:
        A `RemovalOrder`. Channels of which nothing is left come last, in the order of their numbers.

    Raises:
        ValueError: if there are no rows.

    Reference:
        He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017, for the reconstruction that this
        prepares.
    """
    if not moments.rows:
        raise ValueError("`moments` must hold at least one row. Received: none.")
    left = moments.scatter.copy()
    start = np.diag(left).copy()
    total = float(start.sum())
    keep: list[int] = []
    errors = [1.0 if total else 0.0]
    alive = start > 0
    while alive.any():
        pivots = np.diag(left)
        gains = np.where(alive, np.sum(left**2, axis=0) / np.where(alive, pivots, 1.0), -1.0)
        chosen = int(np.argmax(gains))
        column = left[:, chosen] / np.sqrt(pivots[chosen])
        left -= np.outer(column, column)
        keep.append(chosen)
        alive &= np.diag(left) > ROUNDING * start
        alive[chosen] = False
        errors.append(float(max(np.sum(np.diag(left)[alive]), 0.0) / total))
    rest = [channel for channel in range(len(start)) if channel not in set(keep)]
    return RemovalOrder((*keep, *rest), (*errors, *[0.0] * len(rest)))


def errors_in_order(moments: Moments, keep: Sequence[int]) -> tuple[float, ...]:
    """The errors, as in `RemovalOrder`, of keeping channels in an order of one's own.

    Args:
        moments: of channels.
        keep: all channels, the ones to keep longest first.
    """
    left, start = moments.scatter.copy(), np.diag(moments.scatter).copy()
    total = float(start.sum())
    errors = [1.0 if total else 0.0]
    for channel in keep:
        if left[channel, channel] > ROUNDING * max(start[channel], np.finfo("float64").tiny):
            column = left[:, channel] / np.sqrt(left[channel, channel])
            left -= np.outer(column, column)
        errors.append(float(max(np.sum(np.diag(left)), 0.0) / total) if total else 0.0)
    errors[-1] = 0.0
    return tuple(errors)


def dead_channels(moments: Moments) -> tuple[int, ...]:
    """Channels that gave the same value for all rows."""
    return tuple(int(channel) for channel in np.flatnonzero(np.diag(moments.scatter) == 0))


def duplicate_channels(moments: Moments, tolerance: float = 1e-9) -> tuple[tuple[int, ...], ...]:
    """Groups of channels that are multiples of each other, up to a constant.

    Args:
        moments: of channels.
        tolerance: how far the square of a correlation may be from 1.

    Returns:
        Groups of two channels or more, each in ascending order; constant channels are in none.
    """
    scaled = _scaled(moments) ** 2
    alive = [int(channel) for channel in np.flatnonzero(np.diag(moments.scatter) > 0)]
    groups: list[list[int]] = []
    for channel in alive:
        group = next((group for group in groups if scaled[group[0], channel] >= 1 - tolerance), None)
        if group is None:
            groups.append([channel])
        else:
            group.append(channel)
    return tuple(tuple(group) for group in groups if len(group) > 1)
