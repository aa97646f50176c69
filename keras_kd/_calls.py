"""Who computes what in a model, in which order? One trace of its inference, with the calls of all layers that have no parts."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kd import _taps

# Layers that are taken as a whole: what their parts do stands in loops.
OPAQUE = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)


@dataclasses.dataclass
class Call:
    """One call of one layer.

    Attributes:
        path: path of the layer.
        name: the path, with the number of the call where there are several.
        layer: the layer, or the operation of a Functional model.
        inputs: the tensors among its arguments.
        outputs: the tensors that it gives.
        start: place of its first operation among TensorFlow's in the graph.
        end: place after its last one.
    """

    path: str
    name: str
    layer: Any
    inputs: list[Any]
    outputs: list[Any]
    start: int
    end: int


def find_leaves(model: keras.Model) -> dict[str, Any]:
    """Layers without parts, recurrent ones as a whole, and operations of Functional models (`a + b`), by path."""
    found: dict[str, Any] = {}
    layers = _taps.find_layers(model)
    for path, layer in layers.items():
        parents = ["/".join(path.split("/")[:count]) for count in range(1, path.count("/") + 1)]
        inside_leaf = any(parent in found for parent in parents)
        if not inside_leaf and (isinstance(layer, OPAQUE) or not list(layer._flatten_layers(include_self=False))):
            found[path] = layer
    for prefix, owner in [("", model), *((path + "/", layer) for path, layer in layers.items())]:
        for operation in getattr(owner, "operations", ()) if isinstance(owner, keras.Model) else ():
            if not isinstance(operation, keras.layers.Layer):
                found.setdefault(prefix + operation.name, operation)
    return found


@dataclasses.dataclass
class Trace:
    """What one pass of inference showed.

    Attributes:
        calls: calls in order; those inside loops are not among them.
        graph: TensorFlow's graph.
        inputs: the model's input tensors.
        outputs: its output tensors.
    """

    calls: list[Call]
    graph: Any
    inputs: list[Any]
    outputs: list[Any]


def trace(model: keras.Model, specs: Any) -> Trace:
    """Traces a model's inference.

    Args:
        model: a built model.
        specs: `tf.TensorSpec`s of its inputs, nested as it takes them.
    """
    found = Trace([], None, [], [])

    def watched(path: str, layer: Any, graph: Any) -> Callable[..., Any]:
        def function(call: Any, *args: Any, **kwargs: Any) -> Any:
            if tf.compat.v1.get_default_graph() is not graph:  # inside a loop
                return call(*args, **kwargs)
            start = len(graph.get_operations())
            result = call(*args, **kwargs)
            read, given = ([t for t in keras.tree.flatten(each) if tf.is_tensor(t)] for each in (args, result))
            found.calls.append(Call(path, path, layer, read, given, start, len(graph.get_operations())))
            return result

        return function

    @tf.function
    def run(x: Any) -> None:
        graph = tf.compat.v1.get_default_graph()
        found.inputs = keras.tree.flatten(x)
        with contextlib.ExitStack() as stack:
            for path, layer in find_leaves(model).items():
                stack.enter_context(_taps.replace(layer, watched(path, layer, graph)))
            found.outputs = keras.tree.flatten(model(x, training=False))

    found.graph = run.get_concrete_function(specs).graph
    for path in {call.path for call in found.calls}:
        several = [call for call in found.calls if call.path == path]
        for index, call in enumerate(several if len(several) > 1 else []):
            call.name = f"{path}:{index}"
    return found
