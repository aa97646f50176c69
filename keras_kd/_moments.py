"""What is the best linear map between two things that stream by? Moments in one pass, and ridge regression on them."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class Moments:
    """Weighted number, mean and scatter matrix of rows, in float64; memory O(columns ** 2), whatever the number of rows.

    ```
    mean = sum_i v_i z_i / sum_i v_i        scatter = sum_i v_i (z_i - mean) (z_i - mean)'
    ```

    Attributes:
        weight: sum of the rows' weights.
        rows: number of rows that have a weight.
        mean: `(columns,)`.
        scatter: `(columns, columns)`.
        squares: sum of the squares of the rows' weights; None for rows of one weight.
    """

    weight: float
    rows: int
    mean: np.ndarray
    scatter: np.ndarray
    squares: float | None = None

    @classmethod
    def empty(cls, columns: int) -> "Moments":
        """Those of no rows."""
        return cls(0.0, 0, np.zeros(columns), np.zeros((columns, columns)), 0.0)

    @classmethod
    def of(cls, rows: Any, weights: Any = None) -> "Moments":
        """Those of a batch.

        Args:
            rows: `(batch, columns)`.
            weights: `(batch,)`, not negative; None for 1 each.
        """
        values = np.asarray(rows, "float64")
        if weights is None:
            mean = values.mean(0) if len(values) else np.zeros(values.shape[1])
            centered = values - mean
            return cls(float(len(values)), len(values), mean, centered.T @ centered, float(len(values)))
        weights = np.asarray(weights, "float64")
        total = float(weights.sum())
        mean = weights @ values / total if total else np.zeros(values.shape[1])
        centered = (values - mean) * np.sqrt(weights)[:, None]
        return cls(total, int(np.count_nonzero(weights)), mean, centered.T @ centered, float(np.square(weights).sum()))

    @property
    def effective_rows(self) -> float:
        """Number of rows of one weight that say as much: `(sum v)^2 / sum v^2` (Kish 1965)."""
        squares = self._squares()
        return self.weight**2 / squares if squares else 0.0

    def _squares(self) -> float:
        return self.weight**2 / max(self.rows, 1) if self.squares is None else self.squares

    def part(self, columns: Any) -> "Moments":
        """Those of some of the columns: a slice, or their numbers."""
        chosen = np.arange(len(self.mean))[columns]
        return Moments(self.weight, self.rows, self.mean[chosen], self.scatter[np.ix_(chosen, chosen)], self.squares)

    def scaled(self, factors: np.ndarray) -> "Moments":
        """Those of columns that are multiplied by factors."""
        return Moments(self.weight, self.rows, self.mean * factors, self.scatter * np.outer(factors, factors))

    def with_mean(self, share: float) -> "Moments":
        """The same, as if no constant could stand for the mean in a share of the rows."""
        return dataclasses.replace(self, scatter=self.scatter + share * self.weight * np.outer(self.mean, self.mean))

    def add(self, other: "Moments") -> None:
        """Takes in those of other rows, exactly as if all had come at once (Chan, Golub, LeVeque 1979)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Moments of {len(self.mean)} columns do not go with moments of {len(other.mean)}.")
        total, self.squares = self.weight + other.weight, self._squares() + other._squares()
        if not total:
            self.rows += other.rows
            return
        step = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(step, step) * (self.weight * other.weight / total)
        self.mean = self.mean + step * (other.weight / total)
        self.weight, self.rows = total, self.rows + other.rows


@dataclasses.dataclass(frozen=True)
class RidgeFit:
    """A linear map with an intercept.

    Attributes:
        kernel: `(inputs, outputs)`.
        bias: `(outputs,)`.
        l2: the penalty it was fitted with.
        r2: share of each output's variance that it explains; 0 for outputs that are constant.
        gcv: generalised cross-validation score, the sum over outputs; lower is better.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    r2: np.ndarray
    gcv: float


def ridge(moments: Moments, inputs: int, l2s: Any) -> RidgeFit:
    """Ridge regression of the last columns on the first ones, from their moments alone.

    ```
    min over W, b of  1/2 sum_i v_i |y_i - W' x_i - b|^2 + 1/2 l2 |W|^2       (the b is free)
    GCV(l2) = n RSS(l2) / (n - 1 - sum_j e_j / (e_j + l2))^2,   e: eigenvalues of the inputs' scatter
    n = (sum v)^2 / sum v^2,   RSS = n / sum v * sum_i v_i |y_i - W' x_i - b|^2
    ```

    One eigendecomposition serves all penalties; for a single one an inverse does, where that is as exact. Directions without any
    variance, as collinear and constant columns make them, get no weight. All weights times c, and the penalties too, change
    nothing.

    Args:
        moments: of rows `[x, y]`.
        inputs: number of columns of x.
        l2s: penalties, 0 or more; the one with the lowest GCV is taken (Golub, Heath, Wahba 1979).

    Returns:
        The fit of the best penalty.
    """
    penalties = [float(l2) for l2 in l2s]
    if not penalties:
        raise ValueError("`l2` must hold at least one penalty. Received: none.")
    solved = _inverted(moments, inputs, penalties[0]) if len(penalties) == 1 else None
    solutions = _decomposed(moments, inputs, penalties) if solved is None else [solved]
    fits = [_as_fit(moments, inputs, l2, *solution) for l2, solution in zip(penalties, solutions, strict=True)]
    return min(fits, key=lambda fit: fit.gcv)


# Up to this condition an inverse is as good as an eigendecomposition, to nine digits.
_WELL_CONDITIONED = 1e6

_Solution = tuple[np.ndarray, np.ndarray, float]  # W, the weighted residual of each output, degrees of freedom that it takes


def _inverted(moments: Moments, inputs: int, l2: float) -> _Solution | None:
    """The solution for one penalty; None where the scatter is too near to a singular one."""
    scatter = moments.scatter
    sxy, syy = scatter[:inputs, inputs:], np.diag(scatter)[inputs:]
    penalised = scatter[:inputs, :inputs] + l2 * np.eye(inputs)
    spread = np.sqrt(np.diag(penalised))
    if not np.all(spread > 0):
        return None
    scaled = penalised / np.outer(spread, spread)
    try:
        inverse = np.linalg.inv(scaled)
    except np.linalg.LinAlgError:
        return None
    if not np.linalg.norm(scaled) * np.linalg.norm(inverse) < _WELL_CONDITIONED:
        return None
    inverse /= np.outer(spread, spread)
    kernel = inverse @ sxy
    residual = syy - np.sum(kernel * (2 * sxy - scatter[:inputs, :inputs] @ kernel), axis=0)
    return kernel, residual, float(inputs - l2 * np.trace(inverse))


def _decomposed(moments: Moments, inputs: int, penalties: list[float]) -> list[_Solution]:
    """The solutions for all penalties."""
    scatter = moments.scatter
    sxx, sxy, syy = scatter[:inputs, :inputs], scatter[:inputs, inputs:], np.diag(scatter)[inputs:]
    values, vectors = np.linalg.eigh(sxx)
    floor = max(values[-1], 0.0) * inputs * np.finfo("float64").eps
    alive = values > floor
    values, vectors = values[alive], vectors[:, alive]
    rotated = vectors.T @ sxy  # (alive, outputs)
    found = []
    for l2 in penalties:
        shrunk = rotated / (values + l2)[:, None]
        residual = syy - np.sum(shrunk * (2 * rotated - values[:, None] * shrunk), axis=0)
        found.append((vectors @ shrunk, residual, float(np.sum(values / (values + l2)))))
    return found


def _as_fit(moments: Moments, inputs: int, l2: float, kernel: np.ndarray, residual: np.ndarray, taken: float) -> RidgeFit:
    bias = moments.mean[inputs:] - moments.mean[:inputs] @ kernel
    spread = np.diag(moments.scatter)[inputs:]
    unexplained = np.divide(residual, spread, out=np.ones_like(spread), where=spread > 0)
    n = moments.effective_rows
    freedom = n - 1 - taken
    gcv = float(n * np.sum(residual) * (n / moments.weight) / freedom**2) if freedom > 0 else np.inf
    return RidgeFit(kernel, bias, l2, 1 - unexplained, gcv)
