"""Which correction of a linear map is best, and how much of it do the data tell? Ridge regression, its penalty of other rows."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_kd._moments import Moments

PENALTIES = (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the inputs' mean square


@dataclasses.dataclass(frozen=True)
class Fit:
    """A correction of a linear map: what to add to its kernel and its bias."""

    kernel: np.ndarray
    bias: np.ndarray
    l2: float | None
    before: float
    after: float


def solve(
    seen: Moments,
    unseen: Moments,
    columns: int,
    intercept: bool,
    origins: Sequence[np.ndarray] = (),
) -> Fit:
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
    """
    check = about(unseen, False)
    before = float(np.trace(check[columns:, columns:]))
    origin = np.zeros((columns, len(seen.mean) - columns))
    best = Fit(origin, origin[0], None, before, before)
    if not seen.rows or not unseen.rows:
        return best
    for start in origins:
        bias = seen.mean[columns:] - seen.mean[:columns] @ start if intercept else np.zeros(start.shape[1])
        after = squares(unseen, check, columns, start, bias)
        if after < best.after:
            origin, best = start, dataclasses.replace(best, kernel=start, bias=bias, l2=np.inf, after=after)
    seen, unseen = _moved(seen, columns, origin), _moved(unseen, columns, origin)
    fit, check = about(seen, intercept), about(unseen, False)
    scale = float(np.trace(fit[:columns, :columns])) / columns or 1.0
    for l2, (kernel, bias), after in _descent(
        lambda l2: _ridge(seen, fit, columns, l2 * scale, intercept), lambda pair: squares(unseen, check, columns, *pair)
    ):
        if after < best.after:
            best = dataclasses.replace(best, kernel=origin + kernel, bias=bias, l2=l2, after=after)
    if best.l2 is not None and np.isfinite(best.l2):  # once more, on all rows
        whole = Moments(seen.weight, seen.rows, seen.mean.copy(), seen.scatter.copy())
        whole.add(unseen)
        fit = about(whole, intercept)
        scale = float(np.trace(fit[:columns, :columns])) / columns or 1.0
        kernel, bias = _ridge(whole, fit, columns, best.l2 * scale, intercept)
        best = dataclasses.replace(best, kernel=origin + kernel, bias=bias)
    return best


def solve_few(read: np.ndarray, missing: np.ndarray, fits: np.ndarray, intercept: bool, origins: Sequence[np.ndarray] = ()) -> Fit:
    """The same where there are fewer rows than columns, from the products of rows: `D = X' (X X' + l2)^-1 R`.

    Args:
        read: the rows x, `(rows, columns)`.
        missing: the residuals r, `(rows, outputs)`.
        fits: which rows to fit, `(rows,)`; the others choose the penalty.
        intercept: whether b is free, or 0.
        origins: as in `solve`.
    """
    read, missing = read.astype("float64"), missing.astype("float64")
    before = float(np.sum(np.square(missing[~fits])))
    origin = np.zeros((read.shape[1], missing.shape[1]))
    best = Fit(origin, origin[0], None, before, before)
    if fits.all() or not fits.any():
        return best
    for start in origins:
        left = missing - read @ start
        bias = left[fits].mean(0) if intercept else np.zeros(left.shape[1])
        after = float(np.sum(np.square(left[~fits] - bias)))
        if after < best.after:
            origin, best = start, dataclasses.replace(best, kernel=start, bias=bias, l2=np.inf, after=after)
    left = missing - read @ origin
    rows = _Rows(read, left, fits, intercept)
    for l2, _, after in _descent(rows.predicted, lambda one: float(np.sum(np.square(left[~fits] - one)))):
        if after < best.after:
            best = dataclasses.replace(best, l2=l2, after=after)
    if best.l2 is not None and np.isfinite(best.l2):  # once more, on all rows
        kernel, bias = _Rows(read, left, np.ones(len(fits), bool), intercept).solved(best.l2)
        best = dataclasses.replace(best, kernel=origin + kernel, bias=bias)
    return best


class _Rows:
    """Ridge regression of residuals by the products of rows.

    Args:
        read: `(rows, columns)`.
        left: residuals, `(rows, outputs)`.
        fits: which rows to fit.
        intercept: whether there is a constant.
    """

    def __init__(self, read: np.ndarray, left: np.ndarray, fits: np.ndarray, intercept: bool) -> None:
        self._mean, self._level = (one[fits].mean(0) if intercept else np.zeros(one.shape[1]) for one in (read, left))
        self._read, self._left, self._fits = read - self._mean, left[fits] - self._level, fits
        self._products = self._read @ self._read.T
        self._scale = float(np.trace(self._products[np.ix_(fits, fits)])) / read.shape[1] or 1.0

    def _weights(self, l2: float) -> np.ndarray:
        among = self._products[np.ix_(self._fits, self._fits)]
        among.flat[:: len(among) + 1] += l2 * self._scale
        return np.linalg.solve(among, self._left)

    def predicted(self, l2: float) -> np.ndarray:
        """What the rows that are not fitted are off by, as the others say."""
        return self._products[np.ix_(~self._fits, self._fits)] @ self._weights(l2) + self._level

    def solved(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias."""
        kernel = self._read[self._fits].T @ self._weights(l2)
        return kernel, self._level - self._mean @ kernel


def _descent(fit: Callable[[float], Any], error: Callable[[Any], float]) -> Iterator[tuple[float, Any, float]]:
    """Penalties, their fits and errors: from the middle to where the error falls, until it rises.

    The error has one valley: too small a penalty follows chance, too large a one does not follow the data.
    """
    errors: dict[int, float] = {}

    def tried(index: int) -> tuple[float, Any, float]:
        pair = fit(PENALTIES[index])
        errors[index] = error(pair)
        return PENALTIES[index], pair, errors[index]

    at = len(PENALTIES) // 2
    yield tried(at)
    for step in (1, -1):
        index = at + step
        while 0 <= index < len(PENALTIES):
            yield tried(index)
            if errors[index] > errors[index - step]:
                break
            index += step
        if errors[at + 1] < errors[at]:
            return


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
