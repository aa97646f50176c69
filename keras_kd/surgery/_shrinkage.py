"""How do channels vary together, and how much of that is chance? A covariance that few samples make nearer to a sphere."""

from typing import Any

import numpy as np
from keras import ops

_MEMORY = 1 << 25  # bytes for the products of single samples


class Covariance:
    """Covariance of rows that stream by, drawn to a multiple of the identity as far as chance made it.

    ```
    C = (1 - b) S + b m I        m = tr S / n        b = a min(1, n / K)
    a = min(1, sum_k |A_k - A / K|^2 / (N^2 |S - m I|^2))
    ```

    with S the covariance of N rows of n columns, A_k the sum of products of the rows of sample k, and A that of all K of them. The
    positions of an image are alike, so a sample counts once, however many rows it has; with one row each it is the estimate of
    Ledoit and Wolf (A well-conditioned estimator for large-dimensional covariance matrices, 2004). Theirs is a; with more samples
    than columns b falls faster than that, so that a channel that the others stand for looks like it.

    Args:
        shift: `(n,)`, near the mean: means far above the spread would swallow it.
    """

    def __init__(self, shift: np.ndarray) -> None:
        n = len(shift)
        self.shift, self.rows, self.samples = shift, 0, 0
        self.total, self.products, self._squares = np.zeros(n), np.zeros((n, n)), 0.0

    def add(self, values: Any) -> None:
        """Takes in `(samples, rows, n)`."""
        samples, rows, n = values.shape
        values = values - self.shift
        self._squares += sum(_squares(one) for one in _parts(values, max(_MEMORY // (4 * min(rows, n) ** 2), 1)))
        flat = ops.reshape(values, (-1, n))
        self.rows, self.samples = self.rows + samples * rows, self.samples + samples
        self.total += np.sum(flat, 0, dtype="float64")
        self.products += np.asarray(ops.matmul(ops.transpose(flat), flat))

    def shrinkage(self, covariance: np.ndarray) -> float:
        """The a above, from 0 to 1."""
        if self.samples < 2:
            return 1.0
        chance = (self._squares - float(np.vdot(self.products, self.products)) / self.samples) / self.rows**2
        spread = float(np.vdot(covariance, covariance)) - float(np.trace(covariance)) ** 2 / len(covariance)
        return min(max(chance, 0.0) / spread, 1.0) if spread > 0 else 1.0

    def plain(self) -> np.ndarray:
        """The S above, `(n, n)`."""
        mean = self.total / self.rows
        covariance = self.products / self.rows
        covariance -= np.outer(mean, mean)
        return covariance

    def shrunk(self) -> np.ndarray:
        """The C above, `(n, n)`; the products are used up."""
        covariance = self.plain()
        n = len(covariance)
        share = self.shrinkage(covariance) * min(n / self.samples, 1.0)
        self.products = np.zeros((0, 0))
        level = share * float(np.trace(covariance)) / n
        covariance *= 1 - share
        covariance.flat[:: n + 1] += level
        return covariance


def _parts(values: Any, most: int) -> Any:
    return (values[at : at + most] for at in range(0, len(values), most))


def _squares(values: Any) -> float:
    """Sum over samples of the squares of all entries of their products: of the columns', or of the rows', which has the same."""
    _, rows, n = values.shape
    turned = ops.transpose(values, (0, 2, 1))
    products = ops.matmul(turned, values) if n <= rows else ops.matmul(values, turned)
    return float(ops.sum(ops.square(products)))
