"""Which weights does a callback work on? Finds the kernels of a model's layers, those that `layers=` chooses, and their zeros."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd import _taps

# Weights that multiply what flows through, by the names that Keras' layers give them.
_NAMES = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel", "embeddings")


class Kernel(NamedTuple):
    """A weight that can be pruned or clustered.

    Args:
        path: path of the layer inside the model, such as `"backbone/conv1"`.
        layer: the layer.
        variable: its Keras variable; None where only the layer matters.
    """

    path: str
    layer: Any
    variable: Any

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.path} ({self.variable.name}, shape {tuple(self.variable.shape)})"


def find_kernels(model: keras.Model) -> list[Kernel]:
    """Finds the trainable kernels of a built model, each once: those of cells and of sublayers (attention) too."""
    found: dict[int, Kernel] = {}
    for path, layer in _taps.find_layers(model).items():
        for variable in layer._trainable_variables:
            if variable.name in _NAMES and variable.trainable:
                found.setdefault(id(variable), Kernel(path, layer, variable))
    trained = {id(variable) for variable in model.trainable_variables}
    return [kernel for identity, kernel in found.items() if identity in trained]


def count_zeros(kernels: Iterable[Kernel]) -> tuple[int, int]:
    """How many weights of kernels are 0, and how many there are."""
    zeros = size = 0
    for kernel in kernels:
        array = keras.ops.convert_to_numpy(kernel.variable)
        zeros, size = zeros + array.size - int(np.count_nonzero(array)), size + array.size
    return zeros, size


def sparsity_of(model: keras.Model) -> float:
    """The share of zeros in all weights that pruning can touch, trainable at the moment or not, in [0, 1]; 0.0 without any."""
    kernels = {
        id(variable): Kernel(path, layer, variable)
        for path, layer in _taps.find_layers(model).items()
        for variable in layer._trainable_variables + layer._non_trainable_variables
        if variable.name in _NAMES
    }
    zeros, size = count_zeros(kernels.values())
    return zeros / size if size else 0.0


def choose_kernels(model: keras.Model, layers: Any) -> list[Kernel]:
    """The kernels that `layers` chooses.

    Args:
        model: a built model.
        layers: None for all; a name or path, a layer class, a function of a layer that returns whether to take it, or a list of
            these. The name of a nested model or of a layer with parts chooses all kernels inside.

    Returns:
        The kernels, in the model's order.

    Raises:
        ValueError: if the model has no kernels, or a choice matches none of them.
        TypeError: for another kind of choice.
    """
    kernels = find_kernels(model)
    if not kernels:
        raise ValueError(
            f'The model "{model.name}" has no trainable kernels: nothing of it can be pruned or clustered. Build it, and leave the '
            "layers trainable that it is about."
        )
    if layers is None:
        return kernels
    chosen: set[int] = set()
    for choice in layers if isinstance(layers, (list, tuple, set)) else [layers]:
        test = matcher(choice)
        matches = {id(kernel.variable) for kernel in kernels if test(kernel)}
        if not matches:
            raise ValueError(
                f"`layers` must match trainable layers that have a kernel. Received: {choice!r}, which matches none. Layers: "
                f"{', '.join(dict.fromkeys(kernel.path for kernel in kernels))}."
            )
        chosen |= matches
    return [kernel for kernel in kernels if id(kernel.variable) in chosen]


def matcher(choice: Any) -> Callable[[Kernel], bool]:
    """A function that says whether a choice, one of those that `layers=` may hold, takes a kernel."""
    if isinstance(choice, str):
        return lambda kernel: f"/{kernel.path}/".find(f"/{choice}/") >= 0
    if inspect.isclass(choice):
        return lambda kernel: isinstance(kernel.layer, choice)
    if isinstance(choice, keras.layers.Layer):
        inside = {id(layer) for layer in choice._flatten_layers()}
        return lambda kernel: id(kernel.layer) in inside
    if callable(choice):
        return lambda kernel: bool(choice(kernel.layer))
    raise TypeError(
        "`layers` must be a layer's name or path, a layer class, a function of a layer, or a list of these. Received: "
        f"{choice!r} of type {type(choice).__name__}."
    )
