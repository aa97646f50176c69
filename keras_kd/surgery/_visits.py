"""What does one call of a layer say about channels? A notebook for it: labels of tensors, weights that they index, and sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.surgery import _labels
from keras_kd.surgery._labels import Atoms, Labels


@dataclasses.dataclass
class Record:
    """What is known of a layer, or an operation, from all its calls.

    Attributes:
        operation: the layer or operation.
        path: its path.
        weights: for each of its variables by `id`, the atoms along each axis.
        sizes: entries of its configuration that count channels: the atoms counted; or, of shapes, the shape and the atoms along it.
        made: channels that begin here, by what they are.
        outputs: labels of its first output, for each call.
    """

    operation: Any
    path: str
    weights: dict[int, list[np.ndarray | None]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    outputs: list[Labels] = dataclasses.field(default_factory=list)

    def vectors(self) -> list[np.ndarray]:
        """All axes that have atoms: of what it makes, gives and weighs."""
        given = [one for labels in self.outputs for one in labels]
        weighed = [one for axes in self.weights.values() for one in axes]
        return [one for one in (*self.made.values(), *given, *weighed) if one is not None]


@dataclasses.dataclass
class Visit:
    """One call of one layer.

    Attributes:
        atoms: of the whole model.
        record: of the layer.
        labels: of all tensors so far, by `id`.
        args: arguments of the call.
        kwargs: arguments of the call by name.
        outputs: symbolic tensors that it gives.
    """

    atoms: Atoms
    record: Record
    labels: dict[int, Labels]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]

    @property
    def layer(self) -> Any:
        """The layer or operation."""
        return self.record.operation

    @property
    def inputs(self) -> list[Any]:
        """Tensors in the first argument."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        return [one for one in keras.tree.flatten(first) if isinstance(one, keras.KerasTensor)]

    def of(self, tensor: Any) -> Labels:
        """Labels of a tensor."""
        return self.labels.get(id(tensor)) or _labels.none(tensor.shape)

    def make(self, count: int, what: str = "channels") -> np.ndarray:
        """Channels that begin in this layer, the same ones in all its calls."""
        if what not in self.record.made:
            self.record.made[what] = self.atoms.new(count)
        return self.record.made[what]

    def pin(self, labels: Sequence[np.ndarray | None], reason: str) -> None:
        """Keeps whatever is labelled."""
        for one in labels:
            if one is not None:
                self.atoms.pin(one, f'"{self.record.path}" {reason}')

    def pin_beside(self, labels: Labels, axis: int, reason: str) -> None:
        """Keeps what is labelled on all axes but one."""
        self.pin([one for index, one in enumerate(labels) if index != axis], reason)

    def weight(self, name: str, axes: Sequence[np.ndarray | None], owner: Any = None) -> None:
        """Says which atoms index a variable; those of several calls of the layer go together."""
        owner = self.layer if owner is None else owner
        variable = next((v for v in owner.variables if v.name == name), None)
        if variable is None:
            return
        former = self.record.weights.get(id(variable))
        self.record.weights[id(variable)] = list(axes) if former is None else self.tie([former, list(axes)])

    def size(self, key: str, value: Any) -> None:
        """Says which entry of the configuration counts atoms."""
        self.record.sizes[key] = value

    def tie(self, several: Sequence[Labels], shapes: Sequence[Sequence[Any]] | None = None) -> Labels:
        """Labels of what is computed element by element from tensors of one rank, those of length 1 spread along the others.

        Args:
            several: labels of each.
            shapes: their shapes; None where they are all the same.
        """
        result: Labels = []
        for axis in range(len(several[0])):
            lengths = [0 if shapes is None else shape[axis] for shape in shapes or several]
            spread = [n == 1 and any(m != 1 for m in lengths) for n in lengths]
            here = [labels[axis] for labels, one in zip(several, spread, strict=True) if not one]
            self.pin([labels[axis] for labels, one in zip(several, spread, strict=True) if one], "spreads it along other channels")
            labelled = [one for one in here if one is not None]
            for one in labelled[1:]:
                self.atoms.unite(labelled[0], one)
            if labelled and len(labelled) < len(here):
                self.pin(labelled[:1], "ties it to what no layer makes")
            result.append(labelled[0] if labelled else None)
        return result
