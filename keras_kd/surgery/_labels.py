"""Which channels are one and the same? Atoms, their union, and the reasons why some of them must stay."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# For each axis of a tensor, the atoms along it: None where nothing can be taken from it (samples, pixels, steps).
Labels = list[np.ndarray | None]


class Atoms:
    """Numbers for channels; what is united goes together, what is pinned stays (union-find)."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: list[tuple[int, str]] = []

    def new(self, count: int) -> np.ndarray:
        """Atoms that nobody has yet."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def unite(self, first: Any, second: Any) -> None:
        """Says that two atoms, or those of two arrays one by one, go together."""
        a, b = (np.ravel(x) for x in np.broadcast_arrays(first, second))
        for one, other in {pair for pair in zip(a.tolist(), b.tolist(), strict=True) if pair[0] != pair[1]}:
            one, other = self._root(one), self._root(other)
            self._parents[max(one, other)] = min(one, other)

    def pin(self, atoms: Any, reason: str) -> None:
        """Says that atoms must stay, and why."""
        self._reasons.extend((atom, reason) for atom in np.unique(atoms).tolist())

    def roots(self) -> np.ndarray:
        """For each atom, the one that stands for all that go together with it."""
        return np.asarray([self._root(atom) for atom in range(len(self._parents))], dtype="int64")

    def pinned(self, roots: np.ndarray) -> dict[int, str]:
        """The first reason for each root that must stay."""
        found: dict[int, str] = {}
        for atom, reason in self._reasons:
            found.setdefault(int(roots[atom]), reason)
        return found

    def _root(self, atom: int) -> int:
        parents = self._parents
        while parents[atom] != atom:
            parents[atom] = parents[parents[atom]]
            atom = parents[atom]
        return atom


def none(shape: Sequence[Any]) -> Labels:
    """Labels of a tensor from which nothing can be taken."""
    return [None] * len(shape)


def reshaped(atoms: Atoms, labels: Labels, old: Sequence[int | None], new: Sequence[int | None]) -> Labels | str:
    """Labels after a reshape, without the axis of samples; channels that land in one place go together from then on.

    Returns:
        Labels, or why they cannot be known.
    """
    labelled = [axis for axis, one in enumerate(labels) if one is not None]
    if not labelled:
        return none(new)
    if len(labelled) > 1:
        return "it folds two axes of channels into one"
    axis = labelled[0]
    vector = labels[axis]
    if None in old or None in new:
        tail_old, tail_new = old[axis:], new[axis - len(old) :]
        if vector is not None and None not in tail_old and list(tail_old) == list(tail_new):
            result = none(new)
            result[axis - len(old)] = vector
            return result
        return "it reshapes an axis of unknown length"
    known, wanted = [int(n or 0) for n in old], [int(n or 0) for n in new]
    spread = np.asarray(vector).reshape([-1 if i == axis else 1 for i in range(len(old))])
    spread = np.broadcast_to(spread, known).reshape(wanted)
    candidates = [i for i in reversed(range(len(new))) if wanted[i] > 1] or [len(new) - 1]
    chosen = next((i for i in candidates if _constant_beside(spread, i)), candidates[0])
    table = np.moveaxis(spread, chosen, 0).reshape(wanted[chosen], -1)
    if table.shape[1] > 1:
        atoms.unite(table[:, :1], table)
    result = none(new)
    result[chosen] = table[:, 0]
    return result


def _constant_beside(spread: np.ndarray, axis: int) -> bool:
    """Whether atoms change along one axis alone."""
    moved = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
    return bool(np.all(moved == moved[:, :1]))
