"""What flows through a layer? Reads, or replaces, what layers give during one ordinary forward pass, on any Keras model."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf


def find_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """All layers inside `model` by path: `"conv1"`, `"backbone/block3/conv"`.

    Where a subclassed model, or a layer with parts, holds several of the same name, those after the first have a number at theirs:
    `"conv"`, `"conv#2"`, `"conv#3"`, and `"block#2/conv"` for a part of the second block.
    """
    found: dict[str, keras.layers.Layer] = {}

    def walk(owner: Any, prefix: str) -> None:
        for layer in owner._flatten_layers(include_self=False, recursive=False):
            path = free_path(found, prefix + layer.name, layer)
            if path not in found and not isinstance(layer, keras.layers.InputLayer):
                found[path] = layer
                walk(layer, path + "/")

    walk(model, "")
    return found


def free_path(found: dict[str, Any], path: str, layer: Any) -> str:
    """The path of a layer: this one, with a number behind it if other layers have it already."""
    paths = itertools.chain([path], (f"{path}#{number}" for number in itertools.count(2)))
    return next(each for each in paths if found.get(each, layer) is layer)


def find_layer(model: keras.Model, name: str, *, role: str = "model", argument: str = "layer_name") -> keras.layers.Layer:
    """Finds one layer by path, or by a name that only one layer bears.

    Raises:
        ValueError: if no layer or more than one fits; the message lists the candidates.
    """
    return find_layers(model)[find_path(model, name, role=role, argument=argument)]


def find_path(model: keras.Model, name: str, *, role: str = "model", argument: str = "layer_name") -> str:
    """The path of the layer that `find_layer` finds.

    Raises:
        ValueError: as `find_layer` does.
    """
    layers = find_layers(model)
    name = name.split(":")[0]
    if name in layers:
        return name
    paths = [path for path, layer in layers.items() if layer.name == name]
    if len(paths) == 1:
        return paths[0]
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
    layers = {name: find_layer(model, name, role=role) for name in dict.fromkeys(names)}
    outputs: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        seen = {id(layer): stack.enter_context(_tap(layer)) for layer in {id(x): x for x in layers.values()}.values()}
        yield outputs
    for name, layer in layers.items():
        outputs[name] = _choose(name, seen[id(layer)], role)


def shapes(model: keras.Model, names: Iterable[str], *, role: str = "model") -> tuple[Any, dict[str, Any]] | None:
    """Finds the shapes of the outputs and of what the named layers give, without running the model.

    Args:
        model: a built model.
        names: as for `record`.
        role: what error messages call the model.

    Returns:
        Shape of the outputs, nested as the model gives them, and shapes by name; None where the inputs of a subclassed model are
        not known: a single float input is known from how it was built.

    Raises:
        ValueError: as `record` does.
    """
    specs = input_specs(model)
    if specs is None:
        return None
    try:
        return _traced_shapes(model, names, role, specs)
    except Exception:
        if getattr(model, "inputs", None):
            raise
        return None  # a subclassed model: whole numbers for an embedding, say; the first step will show


def input_specs(model: keras.Model) -> Any:
    """Shapes and types of a built model's inputs, nested as it takes them.

    Returns:
        `tf.TensorSpec`s, or None where they are not known: a single float input of a subclassed model is known from how it was
        built.
    """
    inputs = getattr(model, "inputs", None) or None
    if inputs is not None:  # a Sequential model has no `input` before it is called
        inputs = getattr(model, "input", inputs[0] if len(inputs) == 1 else None)
    if inputs is not None:
        sparse = any(getattr(tensor, "sparse", False) for tensor in keras.tree.flatten(inputs))
        return None if sparse else keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), inputs)
    known = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(known) != 1 or not isinstance(known[0], (list, tuple)) or not all(isinstance(n, int | None) for n in known[0]):
        return None
    return tf.TensorSpec((None, *known[0][1:]), model.compute_dtype)


def _traced_shapes(model: keras.Model, names: Iterable[str], role: str, inputs: Any) -> tuple[Any, dict[str, Any]]:
    found: dict[str, Any] = {}

    @tf.function
    def trace(x: Any) -> None:
        with record(model, names, role=role) as features:
            outputs = model(x, training=False)
        found.update(outputs=outputs, features=dict(features))

    trace.get_concrete_function(inputs)
    return keras.tree.map_structure(lambda t: t.shape, (found["outputs"], found["features"]))


class _Tap:
    """Stands before a layer's `call`: tells each thread that listens what came out in it, and lets a thread put a function in.

    Replicas of tf.distribute and users' own threads may run one model at the same time.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.call = layer.call
        self.former = vars(layer).get("call")  # another wrapper on this very object, put back afterwards
        self.users = 0
        self.here = threading.local()
        object.__setattr__(layer, "call", self._recording_call)  # not through Keras: it would track the closure

    def _recording_call(self, *args: Any, **kwargs: Any) -> Any:
        stand_in = getattr(self.here, "stand_in", None)
        result = self.call(*args, **kwargs) if stand_in is None else stand_in(self.call, *args, **kwargs)
        for seen in getattr(self.here, "listeners", ()):
            seen.append(result)
        return result

    def remove(self) -> None:
        """Puts back the `call` that was there."""
        if self.former is not None:
            object.__setattr__(self.layer, "call", self.former)
        else:
            object.__delattr__(self.layer, "call")  # the class's own is back


_LOCK = threading.RLock()
_TAPS: dict[int, _Tap] = {}


@contextlib.contextmanager
def _held(layer: keras.layers.Layer) -> Iterator[_Tap]:
    """The tap of a layer, which is there as long as somebody uses it."""
    with _LOCK:
        if id(layer) not in _TAPS:
            _TAPS[id(layer)] = _Tap(layer)
        tap = _TAPS[id(layer)]
        tap.users += 1
    try:
        yield tap
    finally:
        with _LOCK:
            tap.users -= 1
            if tap.users == 0:
                del _TAPS[id(layer)]
                tap.remove()


@contextlib.contextmanager
def _tap(layer: keras.layers.Layer) -> Iterator[list[Any]]:
    """Yields the list of what `layer` gives in this thread while the context is open."""
    with _held(layer) as tap:
        seen: list[Any] = []
        listeners = tap.here.__dict__.setdefault("listeners", [])
        listeners.append(seen)
        try:
            yield seen
        finally:
            listeners[:] = [other for other in listeners if other is not seen]


@contextlib.contextmanager
def replace(layer: keras.layers.Layer, function: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, calls of `layer` in this thread are calls of `function(call, *args, **kwargs)`.

    Args:
        layer: a layer of any model.
        function: takes the layer's own `call`, then its arguments, and returns what the layer shall give.
    """
    with _held(layer) as tap:
        former, tap.here.stand_in = getattr(tap.here, "stand_in", None), function
        try:
            yield
        finally:
            tap.here.stand_in = former


def _choose(name: str, seen: list[Any], role: str) -> Any:
    index = int(name.split(":")[1]) if ":" in name else 0
    if len(seen) > 1 and ":" not in name:
        names = ", ".join(f"{name}:{i}" for i in range(len(seen)))
        raise ValueError(f'Layer "{name}" of the {role} is called {len(seen)} times in a pass. Name the call: {names}.')
    if index >= len(seen):
        raise ValueError(f'Layer "{name}" of the {role} is not called in a pass ({len(seen)} calls of it were seen).')
    return seen[index]
