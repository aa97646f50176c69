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
        rows: number of rows.
        mean: `(columns,)`.
        scatter: `(columns, columns)`.
    """

    weight: float
    rows: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, columns: int) -> "Moments":
        """Those of no rows."""
        return cls(0.0, 0, np.zeros(columns), np.zeros((columns, columns)))

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
            return cls(float(len(values)), len(values), mean, centered.T @ centered)
        weights = np.asarray(weights, "float64")
        total = float(weights.sum())
        mean = weights @ values / total if total else np.zeros(values.shape[1])
        centered = (values - mean) * np.sqrt(weights)[:, None]
        return cls(total, len(values), mean, centered.T @ centered)

    def part(self, columns: Any) -> "Moments":
        """Those of some of the columns: a slice, or their numbers."""
        chosen = np.arange(len(self.mean))[columns]
        return Moments(self.weight, self.rows, self.mean[chosen], self.scatter[np.ix_(chosen, chosen)])

    def scaled(self, factors: np.ndarray) -> "Moments":
        """Those of columns that are multiplied by factors."""
        return Moments(self.weight, self.rows, self.mean * factors, self.scatter * np.outer(factors, factors))

    def uncentred(self) -> "Moments":
        """The same, as if the mean were known to be 0: a linear map fitted to it has no constant."""
        return Moments(
            self.weight, self.rows, np.zeros_like(self.mean), self.scatter + self.weight * np.outer(self.mean, self.mean)
        )

    def add(self, other: "Moments") -> None:
        """Takes in those of other rows, exactly as if all had come at once (Chan, Golub, LeVeque 1979)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Moments of {len(self.mean)} columns do not go with moments of {len(other.mean)}.")
        total = self.weight + other.weight
        if not total:
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
    ```

    One eigendecomposition serves all penalties. Directions without any variance, as collinear and constant columns make them, get
    no weight.

    Args:
        moments: of rows `[x, y]`.
        inputs: number of columns of x.
        l2s: penalties, 0 or more; the one with the lowest GCV is taken (Golub, Heath, Wahba 1979).

    Returns:
        The fit of the best penalty.
    """
    scatter, n = moments.scatter, moments.weight
    sxx, sxy, syy = scatter[:inputs, :inputs], scatter[:inputs, inputs:], np.diag(scatter)[inputs:]
    values, vectors = np.linalg.eigh(sxx)
    floor = max(values[-1], 0.0) * inputs * np.finfo("float64").eps
    alive = values > floor
    values, vectors = values[alive], vectors[:, alive]
    rotated = vectors.T @ sxy  # (alive, outputs)
    best: RidgeFit | None = None
    for l2 in l2s:
        shrunk = rotated / (values + l2)[:, None]
        residual = syy - np.sum(shrunk * (2 * rotated - values[:, None] * shrunk), axis=0)
        freedom = n - 1 - float(np.sum(values / (values + l2)))
        gcv = float(n * np.sum(residual) / freedom**2) if freedom > 0 else np.inf
        if best is None or gcv < best.gcv:
            kernel = vectors @ shrunk
            bias = moments.mean[inputs:] - moments.mean[:inputs] @ kernel
            explained = np.divide(residual, syy, out=np.ones_like(syy), where=syy > 0)
            best = RidgeFit(kernel, bias, float(l2), 1 - explained, gcv)
    if best is None:
        raise ValueError("`l2` must hold at least one penalty.")
    return best
