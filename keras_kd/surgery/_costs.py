"""What does a network of fewer channels cost? Multiply-accumulates and weights for any number of channels kept in each group."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import _macs, _samples
from keras_kd.surgery import _nodes
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery.graph import Group

_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel")


def count_macs(model: Any) -> list[_macs.LayerCost]:
    """Multiply-accumulates of a model, layer by layer."""
    sample = keras.tree.map_structure(lambda x: x[:1], _samples.random_inputs(model))
    return _macs.measure(model, sample)[0]


def macs_of(model: Any) -> int | None:
    """Multiply-accumulates of one sample; None where the lengths of the inputs are not known."""
    if any(None in tensor.shape[1:] for tensor in model.inputs):
        return None
    return int(sum(row.macs or 0 for row in count_macs(model)))


@dataclasses.dataclass
class _Axis:
    """Length of an axis: what always stays, and how many entries a channel of each group has."""

    fixed: int
    groups: dict[int, int]

    def length(self, kept: Sequence[int]) -> int:
        return self.fixed + sum(count * kept[group] for group, count in self.groups.items())


@dataclasses.dataclass
class _Share:
    """One layer: its multiply-accumulates go with its kernels, its weights with all its variables."""

    macs: float
    kernels: list[list[_Axis]]
    variables: list[list[_Axis]]
    entries: int

    def cost(self, kept: Sequence[int]) -> tuple[float, float]:
        kernels = sum(_size(axes, kept) for axes in self.kernels)
        return self.macs * kernels / self.entries, sum(_size(axes, kept) for axes in self.variables)


def _size(axes: list[_Axis], kept: Sequence[int]) -> int:
    return math.prod(axis.length(kept) for axis in axes)


class Costs:
    """Costs of a model by the number of channels that each group keeps.

    What layers without kernels and operations between layers compute counts as it is.

    Args:
        found: analysis of the model.
        groups: its groups and their roots.

    Attributes:
        macs: of the whole model.
        parameters: of the whole model.
        neighbours: for each group, itself and those that share a layer with it.
    """

    def __init__(self, found: Analysis, groups: Sequence[tuple[Group, np.ndarray]]) -> None:
        owner = np.full(len(found.roots), -1)
        for index, (_, roots) in enumerate(groups):
            owner[np.isin(found.roots, roots)] = index
        rows = count_macs(found.model)
        self.macs = sum(row.macs or 0 for row in rows)
        self.parameters = found.model.count_params()
        whole = [len(roots) for _, roots in groups]
        shares = [_share(record, owner, whole, rows) for record in found.records.values() if not _nodes.is_open(record.operation)]
        self._of: list[list[_Share]] = [[] for _ in groups]
        self.neighbours: list[set[int]] = [{index} for index in range(len(groups))]
        self._macs, self._parameters = float(self.macs), float(self.parameters)  # of what no group changes
        self._shares = []
        for share in shares:
            involved = {group for axes in share.variables for axis in axes for group in axis.groups} if share else set()
            if share is None or not involved:
                continue
            self._shares.append(share)
            for group in involved:
                self._of[group].append(share)
                self.neighbours[group] |= involved
            macs, parameters = share.cost(whole)
            self._macs -= macs
            self._parameters -= parameters

    def of(self, kept: Sequence[int]) -> tuple[float, float]:
        """Multiply-accumulates and weights."""
        macs, parameters = self._macs, self._parameters
        for share in self._shares:
            one, other = share.cost(kept)
            macs, parameters = macs + one, parameters + other
        return macs, parameters

    def saving(self, kept: list[int], group: int, count: int) -> tuple[float, float]:
        """What is saved when a group keeps `count` channels instead of those of `kept`; below 0 where it keeps more."""
        before = [share.cost(kept) for share in self._of[group]]
        now, kept[group] = kept[group], count
        after = [share.cost(kept) for share in self._of[group]]
        kept[group] = now
        macs, parameters = (sum(b[at] - a[at] for b, a in zip(before, after, strict=True)) for at in (0, 1))
        return macs, parameters


def _share(record: Any, owner: np.ndarray, whole: list[int], rows: list[_macs.LayerCost]) -> _Share | None:
    variables, kernels = [], []
    for variable in getattr(record.operation, "variables", ()):
        atoms = record.weights.get(id(variable)) or [None] * len(variable.shape)
        axes = [_axis(n, one, owner, whole) for n, one in zip(variable.shape, atoms, strict=True)]
        variables.append(axes)
        if variable.name in _KERNELS:
            kernels.append(axes)
    if not variables:
        return None
    macs = sum(row.macs or 0 for row in rows if row.path == record.path or row.path.startswith(record.path + "/"))
    return _Share(macs, kernels, variables, max(sum(_size(axes, whole) for axes in kernels), 1))


def _axis(length: int, atoms: np.ndarray | None, owner: np.ndarray, whole: list[int]) -> _Axis:
    if atoms is None:
        return _Axis(length, {})
    groups, counts = np.unique(owner[atoms], return_counts=True)
    entries = dict(zip(groups.tolist(), counts.tolist(), strict=True))
    return _Axis(entries.pop(-1, 0), {group: count // whole[group] for group, count in entries.items()})
