"""What does a network of fewer channels cost? Multiply-accumulates and weights for any number of channels kept in each group."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import _macs, _samples
from keras_kd.surgery import _heads, _nodes
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._visits import Record
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


_Axis = tuple[int, tuple[tuple[int, int], ...]]  # what always stays, and how many entries a channel of each group has


class _Terms:
    """Products of axes: `sum_t coefficients_t * prod_a (fixed_a + sum_g slopes_ag kept_g)`.

    Args:
        terms: for axes that change, the multiply-accumulates and the weights of one entry.
        groups: their number.
    """

    def __init__(self, terms: Mapping[tuple[_Axis, ...], np.ndarray], groups: int) -> None:
        numbers: dict[_Axis, int] = {(1, ()): 0}
        for axes in terms:
            for axis in axes:
                numbers.setdefault(axis, len(numbers))
        self.groups = np.asarray(sorted({group for axis in numbers for group, _ in axis[1]}), "int64")
        slopes = np.zeros((len(numbers), groups))
        for axis, number in numbers.items():
            for group, count in axis[1]:
                slopes[number, group] = count
        self._slopes = slopes[:, self.groups]
        self._fixed = np.asarray([fixed for fixed, _ in numbers], "float64")
        self._axes = np.zeros((len(terms), max(map(len, terms), default=0)), "int64")
        for row, axes in enumerate(terms):
            self._axes[row, : len(axes)] = [numbers[axis] for axis in axes]
        self._coefficients = np.asarray(list(terms.values())).reshape(-1, 2)

    def of(self, kept: Sequence[int]) -> np.ndarray:
        """Multiply-accumulates and weights."""
        lengths = self._fixed + self._slopes @ np.asarray(kept, "float64")[self.groups]
        return lengths[self._axes].prod(1) @ self._coefficients


class Costs:
    """Costs of a model by the number of channels that each group keeps.

    A layer's multiply-accumulates go with its kernels, and those of the products inside attention with its heads; its weights go
    with all its variables. What layers without kernels and operations between layers compute counts as it is.

    Args:
        found: analysis of the model.
        groups: its groups and their roots.

    Attributes:
        macs: of the whole model.
        parameters: of the whole model.
        neighbours: for each group, itself and those that share a layer with it.
    """

    def __init__(self, found: Analysis, groups: Sequence[tuple[Group, np.ndarray]]) -> None:
        number = np.full(len(found.roots), -1)
        for index, (_, roots) in enumerate(groups):
            number[roots] = index
        owner = number[found.roots]
        rows = count_macs(found.model)
        self.macs = sum(row.macs or 0 for row in rows)
        self.parameters = found.model.count_params()
        whole = [len(roots) for _, roots in groups]
        inside = _inside(rows)
        terms: dict[tuple[_Axis, ...], np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
        involved: list[set[int]] = []
        for record in found.records.values():
            if not _nodes.is_open(record.operation):
                share = _share(record, owner, whole, inside)
                involved.append({group for axes in share for axis in axes for group, _ in axis[1]})
                for axes, amounts in share.items():
                    terms[axes] += amounts
        self.neighbours: list[set[int]] = [{index} for index in range(len(groups))]
        for together in involved:
            for group in together:
                self.neighbours[group] |= together
        self._all = _Terms(terms, len(groups))
        self._of = [
            _Terms({axes: one for axes, one in terms.items() if any(group == g for axis in axes for g, _ in axis[1])}, len(groups))
            for group in range(len(groups))
        ]
        self._rest = np.asarray([self.macs, self.parameters]) - self._all.of(whole)

    def of(self, kept: Sequence[int]) -> tuple[float, float]:
        """Multiply-accumulates and weights."""
        macs, parameters = (self._rest + self._all.of(kept)).tolist()
        return macs, parameters

    def saving(self, kept: list[int], group: int, count: int) -> tuple[float, float]:
        """What is saved when a group keeps `count` channels instead of those of `kept`; below 0 where it keeps more."""
        before = self._of[group].of(kept)
        now, kept[group] = kept[group], count
        macs, parameters = (before - self._of[group].of(kept)).tolist()
        kept[group] = now
        return macs, parameters


def _inside(rows: list[_macs.LayerCost]) -> dict[str, float]:
    """Multiply-accumulates of each layer with all that is inside of it."""
    found: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        parts = row.path.split("/")
        for end in range(1, len(parts) + 1):
            found["/".join(parts[:end])] += row.macs or 0
    return found


def _share(record: Record, owner: np.ndarray, whole: list[int], inside: Mapping[str, float]) -> dict[tuple[_Axis, ...], np.ndarray]:
    """One layer: for products of its axes that change, the multiply-accumulates and the weights of one entry."""
    found: dict[tuple[_Axis, ...], np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    rates = _rates(record, inside)
    for variable in getattr(record.operation, "variables", ()):
        atoms = record.weights.get(id(variable)) or [None] * len(variable.shape)
        axes = [_axis(n, one, owner, whole) for n, one in zip(variable.shape, atoms, strict=True)]
        constant = math.prod(fixed for fixed, several in axes if not several)
        found[tuple(sorted(axis for axis in axes if axis[1]))] += np.asarray([rates.get(id(variable), 0.0), 1]) * constant
    heads = _heads.heads_of(record)
    if heads is not None:  # the products of queries with keys, and of what they give with values
        parts = sum(inside.get(f"{record.path}/{part.name}", 0.0) for part in _heads.parts_of(record.operation).values())
        axis = _axis(len(heads), heads, owner, whole)
        found[(axis,) * bool(axis[1])] += np.asarray([(inside.get(record.path, 0.0) - parts) / len(heads), 0])
    return {axes: one for axes, one in found.items() if axes}


def _rates(record: Record, inside: Mapping[str, float]) -> dict[int, float]:
    """Multiply-accumulates of one entry of each kernel of a layer, by `id`."""
    layer = record.operation
    owners = [(record.path, getattr(layer, "variables", ()))]
    if _heads.heads_of(record) is not None:
        owners = [(f"{record.path}/{part.name}", part.variables) for part in _heads.parts_of(layer).values()]
    rates: dict[int, float] = {}
    for path, variables in owners:
        kernels = [variable for variable in variables if variable.name in _KERNELS]
        entries = sum(math.prod(kernel.shape) for kernel in kernels)
        rates |= {id(kernel): inside.get(path, 0.0) / max(entries, 1) for kernel in kernels}
    return rates


def _axis(length: int, atoms: np.ndarray | None, owner: np.ndarray, whole: list[int]) -> _Axis:
    if atoms is None:
        return length, ()
    groups, counts = np.unique(owner[atoms], return_counts=True)
    entries = dict(zip(groups.tolist(), counts.tolist(), strict=True))
    fixed = entries.pop(-1, 0)
    return fixed, tuple((group, count // whole[group]) for group, count in entries.items())
