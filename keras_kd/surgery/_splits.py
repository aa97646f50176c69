"""Which two thin maps are nearest to a linear one? Closed forms, weighted by what the map reads, for all ranks at once."""

import functools
from collections.abc import Sequence

import numpy as np

_JITTER = 1e-11  # relative to the mean diagonal


class ChannelSplit:
    """`kernel` by `first @ second`, of any rank: what is lost of the outputs is least (Eckart, Young 1936; Izenman 1975).

    ```
    min over A, B of  E |C'x - B'A'x|^2      A = C V, B = V',  V: first eigenvectors of C' E[x x'] C
    ```

    Args:
        kernel: C, `(columns, outputs)`.
        second: second moments of x, `(columns, columns)`; None for the identity, which makes it the SVD of C.

    Attributes:
        lost: for rank 0, 1, ..., what is lost of the sum of squares of the outputs.
    """

    def __init__(self, kernel: np.ndarray, second: np.ndarray | None = None) -> None:
        self._left = second is None and kernel.shape[0] < kernel.shape[1]  # the smaller of two matrices has the same spectrum
        weighted = kernel if second is None else second @ kernel
        values, vectors = np.linalg.eigh(kernel @ kernel.T if self._left else kernel.T @ weighted)
        self.kernel, self._vectors = kernel, vectors[:, ::-1]
        self.lost = _tails(np.maximum(values[::-1], 0.0))[: min(kernel.shape) + 1]

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """A, `(columns, rank)`, and B, `(rank, outputs)`."""
        vectors = self._vectors[:, :rank]
        return (vectors, vectors.T @ self.kernel) if self._left else (self.kernel @ vectors, vectors.T)

    def product(self, rank: int) -> np.ndarray:
        """What they make together, `(columns, outputs)`."""
        first, second = self.factors(rank)
        return np.asarray(first @ second)


class SpatialSplit:
    """A kernel of images by one along the height and one along the width (Jaderberg, Vedaldi, Zisserman 2014).

    ```
    K[h, w, c, n]  by  sum_j V[h, c, j] H[w, j, n]
    ```

    V is the SVD of K as a matrix from (h, c) to (w, n), weighted by the second moments of the columns of a window. H is then the
    least squares solution on the whole window, drawn to that of the SVD in directions that the data do not show.

    Args:
        kernel: `(height * width * channels, outputs)`.
        shape: height, width, channels and outputs.
        second: second moments of windows, `(height * width * channels,) * 2`; None for the identity.
    """

    def __init__(self, kernel: np.ndarray, shape: Sequence[int], second: np.ndarray | None = None) -> None:
        self.kernel, self.shape = kernel, tuple(shape)
        height, width, channels, outputs = self.shape
        matrix = kernel.reshape(self.shape).transpose(0, 2, 1, 3).reshape(height * channels, width * outputs)
        columns = None
        if second is not None:
            columns = np.einsum("hwcgwd->hcgd", second.reshape(self.shape[:3] * 2)).reshape(height * channels, -1)
        gram = matrix.T @ (matrix if columns is None else columns @ matrix)
        vectors = np.linalg.eigh(gram)[1][:, ::-1][:, : min(matrix.shape)]  # right singular ones of the weighted matrix
        strengths = np.sqrt(np.sum(np.square(matrix @ vectors), axis=0))
        self._strengths, self._second = strengths, second
        self._first = matrix @ vectors / np.where(strengths > 0, strengths, 1.0)  # (height * channels, all ranks)
        self._start = (strengths * vectors).reshape(width, outputs, -1).transpose(2, 0, 1).reshape(-1, outputs)

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Second moments of what the first half gives along a window, and with what the kernel gives."""
        height, width, channels, _ = self.shape
        first = self._first.reshape(height, channels, -1)
        window = np.einsum("hcj,wv->hwcjv", first, np.eye(width)).reshape(len(self.kernel), -1)
        seen = self._second @ window
        return window.T @ seen, seen.T @ self.kernel

    @functools.cached_property
    def lost(self) -> np.ndarray:
        """For rank 0, 1, ..., what is lost of the sum of squares of the outputs."""
        if self._second is None:
            return _tails(np.square(self._strengths))
        gram, cross = self._moments
        parts = np.linalg.solve(np.linalg.cholesky(_regular(gram)), cross)  # of each rank, beside those before it
        known = np.sum(np.square(parts), axis=1).reshape(-1, self.shape[1]).sum(1)
        energy = float(np.sum(self.kernel * (self._second @ self.kernel)))
        return np.maximum(energy - np.concatenate([[0.0], np.cumsum(known)]), 0.0)

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """V, `(height, channels, rank)`, and H, `(width, rank, outputs)`."""
        height, width, channels, outputs = self.shape
        part = slice(0, rank * width)
        second = self._start[part]
        if self._second is not None:
            gram, cross = self._moments
            second = second + np.linalg.solve(_regular(gram)[part, part], cross[part] - gram[part, part] @ second)
        first = self._first[:, :rank].reshape(height, channels, rank)
        return first, second.reshape(rank, width, outputs).transpose(1, 0, 2)

    def product(self, rank: int) -> np.ndarray:
        """What they make together, as `kernel`."""
        first, second = self.factors(rank)
        return np.einsum("hcj,wjn->hwcn", first, second, optimize=True).reshape(self.kernel.shape)


def _regular(gram: np.ndarray) -> np.ndarray:
    """Second moments that can be inverted, the same but for rounding."""
    return gram + (_JITTER * float(np.trace(gram)) / len(gram) or _JITTER) * np.eye(len(gram))


def balanced(first: np.ndarray, second: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The same product, with both factors of each rank equally large: the last axis of the first, `axis` of the second."""
    one = np.sqrt(np.square(first).reshape(-1, first.shape[-1]).sum(0))
    other = np.sqrt(np.square(np.moveaxis(second, axis, 0)).reshape(second.shape[axis], -1).sum(1))
    alive = (one > 0) & (other > 0)
    ratio = np.sqrt(np.divide(other, one, out=np.ones_like(one), where=alive))
    ratio = np.where(alive, ratio, 1.0)
    return first * ratio, second / ratio.reshape([-1 if n == axis else 1 for n in range(second.ndim)])


def _tails(values: np.ndarray) -> np.ndarray:
    """Sums of what comes after the first 0, 1, ... values."""
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])
