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
        activation = getattr(layer, "activation", None)  # may be a layer, which does not make its owner a container
        parts = [part for part in layer._flatten_layers(include_self=False) if part is not activation]
        if not inside_leaf and (isinstance(layer, OPAQUE) or not parts):
            found[path] = layer
    for prefix, owner in [("", model), *((path + "/", layer) for path, layer in layers.items())]:
        for operation in getattr(owner, "operations", ()) if isinstance(owner, keras.Model) else ():
            if not isinstance(operation, keras.layers.Layer):
                found.setdefault(_taps.free_path(found, prefix + operation.name, operation), operation)
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
            arguments = args or (kwargs.get("inputs"),)
            read, given = ([t for t in keras.tree.flatten(each) if tf.is_tensor(t)] for each in (arguments, result))
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


def observer(
    model: keras.Model, names: list[str], see: Callable[[str, Any, Any], Any]
) -> Callable[[Any], tuple[dict[str, Any], Any]]:
    """A compiled function of the model's inputs that gives what `see(name, output, mask)` makes of calls, and the model's outputs.

    Args:
        model: a built model.
        names: names of calls, as `trace` gives them.
        see: function of a name, what that call gave, and the mask of its steps (None where there is none); its results leave
            the graph.
    """
    leaves = find_leaves(model)
    wanted: dict[str, dict[int, str]] = {}
    for name in names:
        path, _, index = name.rpartition(":") if name not in leaves else (name, "", "0")
        wanted.setdefault(path, {})[int(index)] = name

    @tf.function(reduce_retracing=True)
    def run(x: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        given: dict[str, Any] = {}
        counts = dict.fromkeys(wanted, 0)

        def watched(path: str) -> Callable[..., Any]:
            def function(call: Any, *args: Any, **kwargs: Any) -> Any:
                result = call(*args, **kwargs)
                if tf.compat.v1.get_default_graph() is graph:
                    index, counts[path] = counts[path], counts[path] + 1
                    if index in wanted[path]:
                        given[wanted[path][index]] = result, _mask_of(leaves[path], args)
                return result

            return function

        with contextlib.ExitStack() as stack:
            for path in wanted:
                stack.enter_context(_taps.replace(leaves[path], watched(path)))
            outputs = model(x, training=False)
        return {name: see(name, result, mask) for name, (result, mask) in given.items()}, outputs

    return run


def _mask_of(layer: Any, args: Any) -> Any:
    """The mask of what a layer gives. Keras puts it on the tensor after the call, but attention takes it off again."""
    if not args or not isinstance(layer, keras.layers.Layer) or not layer.supports_masking:
        return None
    masks = keras.tree.map_structure(lambda tensor: getattr(tensor, "_keras_mask", None), args[0])
    return layer.compute_mask(args[0], masks)
