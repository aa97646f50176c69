"""What flows through a layer? Reads the outputs of named layers during one ordinary forward pass, on any Keras model."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras


def find_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """All layers inside `model` by path: `"conv1"`, `"backbone/block3/conv"`."""
    found: dict[str, keras.layers.Layer] = {}

    def walk(owner: Any, prefix: str) -> None:
        for layer in owner._flatten_layers(include_self=False, recursive=False):
            path = prefix + layer.name
            if path not in found and not isinstance(layer, keras.layers.InputLayer):
                found[path] = layer
                walk(layer, path + "/")

    walk(model, "")
    return found


def find_layer(model: keras.Model, name: str, *, role: str = "model", argument: str = "layer_name") -> keras.layers.Layer:
    """Finds one layer by path, or by a name that only one layer bears.

    Raises:
        ValueError: if no layer or more than one fits; the message lists the candidates.
    """
    layers = find_layers(model)
    name = name.split(":")[0]
    if name in layers:
        return layers[name]
    paths = [path for path in layers if path.split("/")[-1] == name]
    if len(paths) == 1:
        return layers[paths[0]]
    problem = f'"{name}" is the name of several layers of' if paths else f'No layer "{name}" in'
    raise ValueError(f'{problem} the {role}. Received: {argument}="{name}". Layers: {", ".join(paths or layers)}.')


@contextlib.contextmanager
def record(model: keras.Model, names: Iterable[str], *, role: str = "model") -> Iterator[dict[str, Any]]:
    """Records what the named layers give while the context is open.

    Args:
        model: the model that is called inside the context, once.
        names: names or paths of layers; `"shared:1"` is the second call of a layer that is used several times.
        role: what error messages call the model.

    Yields:
        A dict that is filled when the context closes: outputs by name.

    Raises:
        ValueError: if a name fits no layer or several, or a layer was called several times and the name does not say which.
    """
    names = list(dict.fromkeys(names))
    layers = {name: find_layer(model, name, role=role) for name in names}
    calls: dict[int, list[Any]] = {id(layer): [] for layer in layers.values()}
    outputs: dict[str, Any] = {}
    tapped = {id(layer): layer for layer in layers.values()}.values()
    for layer in tapped:
        _tap(layer, calls[id(layer)])
    try:
        yield outputs
    finally:
        for layer in tapped:
            object.__delattr__(layer, "call")  # the class's own `call` is back
    for name, layer in layers.items():
        outputs[name] = _choose(name, calls[id(layer)], role)


def _tap(layer: keras.layers.Layer, seen: list[Any]) -> None:
    call = layer.call

    def recording_call(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        seen.append(result)
        return result

    object.__setattr__(layer, "call", recording_call)  # not through Keras: it would track the closure


def _choose(name: str, seen: list[Any], role: str) -> Any:
    index = int(name.split(":")[1]) if ":" in name else 0
    if len(seen) > 1 and ":" not in name:
        names = ", ".join(f"{name}:{i}" for i in range(len(seen)))
        raise ValueError(f'Layer "{name}" of the {role} is called {len(seen)} times in a pass. Name the call: {names}.')
    if index >= len(seen):
        raise ValueError(f'Layer "{name}" of the {role} is not called in a pass ({len(seen)} calls of it were seen).')
    return seen[index]
