"""How does a network look without some channels, or with other layers? The same graph of new layers, with the old weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd import _lineage
from keras_kd.surgery import _heads, _nodes
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._visits import Record


@dataclasses.dataclass
class Replacement:
    """What stands for a layer: other layers one after the other. Without any, what they would read is handed on.

    Attributes:
        layers: new layers, not built yet; what they give together has the shape of what the old one gave.
        weights: for each of them, what `set_weights` takes.
        hands_on: number of the input that the first of them reads.
        reads: what it reads instead: a tensor of the old model, from the same graph. What only led from there to here is left out.
    """

    layers: Sequence[Any] = ()
    weights: Sequence[Sequence[np.ndarray]] = ()
    hands_on: int = 0
    reads: Any = None


class Rebuilt:
    """A model without some channels, or with other layers in the place of some.

    Args:
        found: analysis of the old model.
        gone: roots of the channels to leave out.
        replacements: what stands for layers and operations, by `id` of these; they keep all their channels.

    Attributes:
        model: the new model.
        keep: for each atom, whether it is still there.
        clones: new layers, operations and nested models by `id` of the old ones, but for those that were replaced.
    """

    def __init__(self, found: Analysis, gone: set[int], replacements: Mapping[int, Replacement] | None = None) -> None:
        self.found = found
        self.keep = ~np.isin(found.roots, sorted(gone))
        self.clones: dict[int, Any] = {}
        self.replacements = replacements or {}
        self.model = self._model(found.model)
        for record in found.records.values():
            clone = self.clones.get(id(record.operation))
            if getattr(clone, "built", False) and not _nodes.is_open(record.operation):  # what is left out may never be built
                self._copy_weights(record)
        for replacement in self.replacements.values():
            for layer, weights in zip(replacement.layers, replacement.weights, strict=True):
                layer.set_weights(weights)
        _copy_flags(found.model, self.model)
        _lineage.remember(self.model, found.model, self._masks())

    def count(self, atoms: np.ndarray) -> int:
        """How many of these channels are left."""
        return int(np.count_nonzero(self.keep[atoms]))

    def _masks(self) -> dict[str, np.ndarray]:
        """For each layer that is still there, or whose last stand-in has its name, which channels of its output are left."""
        masks = {}
        for path, (record, channels) in self.found.places().items():
            replacement = self.replacements.get(id(record.operation))
            stands = replacement is not None and [layer.name for layer in replacement.layers][-1:] == [record.operation.name]
            if replacement is None or (stands and channels is not _heads.heads_of(record)):
                masks[path] = self.keep[channels]
        return masks

    def sliced(self, record: Record) -> bool:
        """Whether a layer's weights or sizes change."""
        vectors = [one for axes in record.weights.values() for one in axes] + _vectors(record.sizes.values())
        return any(one is not None and not self.keep[one].all() for one in vectors)

    def slice(self, record: Record, variable: Any) -> np.ndarray:
        """What is left of a variable of the old layer."""
        value = np.asarray(variable)
        for axis, atoms in enumerate(record.weights.get(id(variable), ())):
            if atoms is not None:
                value = np.compress(self.keep[atoms], value, axis=axis)
        return value

    def _model(self, model: Any) -> Any:
        graph = _nodes.graph_of(model)
        inputs = {id(tensor): self._input(tensor) for tensor in graph.inputs}
        if isinstance(model, keras.Sequential):
            return keras.Sequential([*inputs.values(), *self._chain(graph)], name=model.name)
        values = dict(inputs)
        for node in _nodes.nodes_of(model):
            given = self._called(node, values)
            for old, new in zip(node.outputs, given, strict=True):
                self._check(node.operation, old, new)
                values[id(old)] = new
        structures = [
            keras.tree.map_structure(lambda tensor: values[id(tensor)], structure)
            for structure in (graph._inputs_struct, graph._outputs_struct)
        ]
        return keras.Model(*structures, name=model.name)

    def _called(self, node: Any, values: dict[int, Any]) -> list[Any]:
        """What stands for a call of the old model."""
        replacement = self.replacements.get(id(node.operation))
        if replacement is None:
            args, kwargs = node.arguments.fill_in(values)
            return keras.tree.flatten(self._clone(node.operation)(*args, **kwargs))
        read = node.arguments.keras_tensors[replacement.hands_on] if replacement.reads is None else replacement.reads
        value = values[id(read)]
        for layer in replacement.layers:
            value = layer(value)
        return [value]

    def _chain(self, graph: Any) -> list[Any]:
        """Layers of a Sequential model."""
        layers: list[Any] = []
        lengths = {id(graph.inputs[0]): 0}  # how many of them lead to a tensor
        for node in _nodes.nodes_of(graph):
            replacement = self.replacements.get(id(node.operation))
            if replacement is not None and replacement.reads is not None:
                del layers[lengths[id(replacement.reads)] :]
            layers += [self._clone(node.operation)] if replacement is None else replacement.layers
            lengths[id(node.outputs[0])] = len(layers)
        return layers

    def _input(self, tensor: Any) -> Any:
        layer = tensor._keras_history.operation
        shape = self._shape(tensor)
        return keras.Input(batch_shape=shape, dtype=tensor.dtype, sparse=tensor.sparse, name=layer.name, optional=layer.optional)

    def _shape(self, tensor: Any) -> tuple[Any, ...]:
        """Shape of a tensor of the old model in the new one."""
        labels = self.found.labels[id(tensor)]
        return tuple(n if atoms is None else self.count(atoms) for n, atoms in zip(tensor.shape, labels, strict=True))

    def _check(self, operation: Any, old: Any, new: Any) -> None:
        expected = self._shape(old)
        if tuple(new.shape) != expected:
            raise RuntimeError(
                f'Without these channels "{operation.name}" must give the shape {expected}. Received: {tuple(new.shape)}. '
                "This is an error of keras_kd; please report it with the model."
            )

    def _clone(self, operation: Any) -> Any:
        """The new layer, one for each old one."""
        if id(operation) not in self.clones:
            is_model = _nodes.is_open(operation)
            self.clones[id(operation)] = self._model(operation) if is_model else self._from_config(operation)
        return self.clones[id(operation)]

    def _from_config(self, operation: Any) -> Any:
        record = self.found.records[id(operation)]
        if type(operation) is keras.layers.Lambda:  # Keras does not make one from its configuration: that could be anybody's code
            options = {"name": operation.name, "dtype": operation.dtype_policy, "trainable": operation.trainable}
            shape = operation._output_shape
            return keras.layers.Lambda(operation.function, shape, operation.mask, operation.arguments, **options)
        try:
            config = operation.get_config() | _heads.options_of(operation)
            if self.sliced(record):
                config = without_shapes(config)
                config |= plain_initializers(operation, config)
                config |= {key: self._size(value) for key, value in record.sizes.items()}
            return type(operation).from_config(config)
        except NotImplementedError as error:
            raise ValueError(
                f'Surgery makes layers anew from their configuration. Received: "{record.path}" of type '
                f"{type(operation).__name__}, which has none. Its `get_config` must return its constructor's arguments."
            ) from error

    def _size(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.count(value)
        base, axes = value
        return tuple(n if atoms is None or n in (None, -1) else self.count(atoms) for n, atoms in zip(base, axes, strict=True))

    def _copy_weights(self, record: Record) -> None:
        old, new = getattr(record.operation, "variables", ()), getattr(self.clones[id(record.operation)], "variables", ())
        if len(old) != len(new):
            raise ValueError(
                f'"{record.path}" of type {type(record.operation).__name__} must have the same variables when it is made from its '
                f"configuration. Received: {len(new)} instead of {len(old)}. Repair its `get_config`."
            )
        for one, other in zip(old, new, strict=True):
            other.assign(self.slice(record, one))
        if hasattr(self.clones[id(record.operation)], "finalize_state"):  # of preprocessing layers that have seen data
            self.clones[id(record.operation)].finalize_state()


def _vectors(sizes: Any) -> list[np.ndarray | None]:
    found: list[np.ndarray | None] = []
    for value in sizes:
        found.extend([value] if isinstance(value, np.ndarray) else value[1])
    return found


def without_shapes(config: Any) -> Any:
    """A configuration without the shapes that layers inside the layer were built with."""
    if not isinstance(config, dict):
        return config
    return {key: without_shapes(value) for key, value in config.items() if key != "build_config"}


def plain_initializers(layer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Initialisers that hold arrays do not fit smaller weights, which are copied anyway."""
    return {
        key: "zeros"
        for key in config
        if key.endswith("_initializer") and np.ndim(getattr(getattr(layer, key, None), "value", 0)) > 0
    }


def _copy_flags(old: Any, new: Any) -> None:
    """Copies what is trainable, from the outside to the inside: setting it on a layer sets it on all its parts."""
    pairs = [(old, new)]
    while pairs:
        one, other = pairs.pop(0)
        if other.trainable != one.trainable:
            other.trainable = one.trainable
        inner = [list(layer._flatten_layers(include_self=False, recursive=False)) for layer in (one, other)]
        if not isinstance(one, keras.Model):
            pairs += zip(*inner, strict=False)
            continue
        by_name = {layer.name: layer for layer in inner[1]}
        pairs += [(layer, by_name[layer.name]) for layer in inner[0] if layer.name in by_name]
