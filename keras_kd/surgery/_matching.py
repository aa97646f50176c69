"""Which weights of one model belong into which of another? Pairs of layers, and the channels that are taken from wide ones."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_kd import _taps
from keras_kd.surgery._analysis import Analysis


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer with all the weights inside it; of models, those that are in none of its layers.

    Attributes:
        path: its path.
        layer: the layer.
        weights: variables, without states of metrics and random numbers.
    """

    path: str
    layer: Any
    weights: list[Any]

    @property
    def kind(self) -> str:
        """Name of its class."""
        return type(self.layer).__name__

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its weights."""
        return [tuple(variable.shape) for variable in self.weights]

    def signature(self, exact: bool) -> tuple[Any, ...]:
        """What a unit must share with another one to stand for it: the kind, and shapes of the weights or only their ranks."""
        return (self.kind, *(shape if exact else len(shape) for shape in self.shapes))

    @property
    def has_default_name(self) -> bool:
        """Whether Keras numbered it, as "conv2d_3"."""
        return re.sub(r"_\d+$", "", self.layer.name).replace("_", "") == self.kind.lower()


def units(model: Any) -> dict[str, Unit]:
    """The layers of a model that have weights, by path, nested models entered."""
    found: dict[str, Unit] = {}
    closed: set[str] = set()  # paths of layers whose parts belong to them
    for path, layer in {"": model, **_taps.find_layers(model)}.items():
        parts = path.split("/")
        if closed.intersection("/".join(parts[:length]) for length in range(1, len(parts))):
            continue
        inside = isinstance(layer, keras.Model)
        weights = [*layer._trainable_variables, *layer._non_trainable_variables] if inside else layer.weights
        if not inside:
            closed.add(path)
        if weights:
            found[path] = Unit(path, layer, list(weights))
    return found


def paired(
    targets: Mapping[str, Unit], sources: Mapping[str, Unit], explicit: Mapping[str, str], *, paths: bool, order: bool, exact: bool
) -> dict[str, str]:
    """For layers of the target, the layer of the source that their weights come from, both by path.

    Args:
        targets: layers of the target.
        sources: layers of the source.
        explicit: pairs that are given.
        paths: whether layers of one path and kind belong together.
        order: whether further ones are paired in their order, by kind; numbered names then count if the source has all of them.
        exact: whether those must have weights of the same shapes; otherwise of the same ranks.
    """
    pairs = dict(explicit)
    if paths:
        numbered = {path for path, unit in targets.items() if unit.has_default_name}
        doubted = numbered if order and not numbered <= set(sources) else set()
        for path in targets:
            if path not in pairs and path not in doubted and path in sources and sources[path].kind == targets[path].kind:
                pairs[path] = path
    if order:
        waiting: dict[Any, list[str]] = {}
        for path in sources:
            if path not in pairs.values():
                waiting.setdefault(sources[path].signature(exact), []).append(path)
        for path in targets:
            if path not in pairs and waiting.get(targets[path].signature(exact)):
                pairs[path] = waiting[targets[path].signature(exact)].pop(0)
    return pairs


class Choice:
    """Which channels of the source are taken.

    Args:
        found: analysis of the source.
    """

    def __init__(self, found: Analysis) -> None:
        self.found = found
        self._taken = np.full(len(found.roots), -1)  # by root: 1 taken, 0 not, -1 not decided

    def give(self, layer: str, indices: np.ndarray) -> None:
        """Takes these channels of a layer, and no others of it.

        Raises:
            ValueError: if channels that are tied to them were decided otherwise.
        """
        atoms = self.found.places()[layer][1]
        for value, roots in enumerate([self.found.roots[np.delete(atoms, indices)], self.found.roots[atoms[indices]]]):
            if np.any(self._taken[roots] == 1 - value):
                raise ValueError(f'`channels` must agree on channels that are tied. Received: others for "{layer}" than before.')
            self._taken[roots] = value

    def fit(self, axes: list[tuple[np.ndarray, int]]) -> None:
        """Decides on the rest: along each axis as many channels as wanted, those with the largest weights where all do not fit."""
        for atoms, wanted in sorted(axes, key=lambda axis: len(np.unique(self.found.roots[axis[0]]))):
            roots, counts = np.unique(self.found.roots[atoms], return_counts=True)
            count_of = dict(zip(roots.tolist(), counts.tolist(), strict=True))
            taken = {root for root in count_of if self._taken[root] == 1}
            free = [root for root in count_of if self._taken[root] == -1]
            left = wanted - sum(count_of[root] for root in taken)
            chosen = set()
            for root in sorted(free, key=lambda root: (root not in self.found.pinned, -self._sizes[root], root)):
                if count_of[root] <= left:
                    chosen.add(root)
                    left -= count_of[root]
            if left == 0 and not any(root in self.found.pinned for root in set(free) - chosen):
                for root in free:
                    self._taken[root] = root in chosen

    def taken(self, atoms: np.ndarray) -> np.ndarray:
        """Mask of those that are taken, or not decided on."""
        mask: np.ndarray = self._taken[self.found.roots[atoms]] != 0
        return mask

    def axes_of(self, unit: Unit, variable: Any) -> list[np.ndarray | None]:
        """The channels along each axis of a weight; None where nothing can be left out."""
        record = self.found.records.get(id(unit.layer))
        none: list[np.ndarray | None] = [None] * len(variable.shape)
        return none if record is None else record.weights.get(id(variable), none)

    def slice(self, unit: Unit, variable: Any) -> np.ndarray:
        """What is taken of a weight of the source."""
        value = keras.ops.convert_to_numpy(variable)
        for axis, atoms in enumerate(self.axes_of(unit, variable)):
            if atoms is not None:
                value = np.compress(self.taken(atoms), value, axis=axis)
        return value

    def pin_of(self, unit: Unit) -> str:
        """Why channels of a layer must stay; empty where none must."""
        for variable in unit.weights:
            for atoms in self.axes_of(unit, variable):
                for root in [] if atoms is None else self.found.roots[atoms].tolist():
                    if root in self.found.pinned:
                        return self.found.pinned[root]
        return ""

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """For each root, the sum of squares of the kernels that make it."""
        sizes = np.zeros(len(self.found.roots))
        for record in self.found.records.values():
            made = np.concatenate([np.zeros(0, "int64"), *record.made.values()])
            for variable in getattr(record.operation, "weights", ()):
                axes = record.weights.get(id(variable), ())
                for axis, atoms in enumerate(axes if len(axes) > 1 else ()):
                    if atoms is not None and np.isin(atoms, made).all():
                        value = np.moveaxis(keras.ops.convert_to_numpy(variable).astype("float64"), axis, 0)
                        np.add.at(sizes, self.found.roots[atoms], np.square(value).reshape(len(atoms), -1).sum(axis=1))
        return sizes
