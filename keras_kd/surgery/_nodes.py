"""In which order does a model of layers compute what? Nodes of Functional and Sequential models, nested ones too."""

from collections.abc import Callable, Iterator
from typing import Any

import keras


def is_open(layer: Any) -> bool:
    """Whether a layer is a model whose graph says all that it computes: Functional or Sequential, with Keras' own `call`."""
    if not isinstance(layer, keras.Model) or vars(layer).get("call") is not None:
        return False
    return type(layer).call.__module__.startswith("keras.src.models.") and bool(getattr(layer, "outputs", None))


def graph_of(model: Any) -> Any:
    """What holds a model's nodes: the model itself, or what a Sequential model keeps inside."""
    return getattr(model, "_functional", None) or model


def nodes_of(model: Any) -> Iterator[Any]:
    """Calls of a model's layers and operations, each after those that it reads."""
    levels = graph_of(model)._nodes_by_depth
    for depth in sorted(levels, reverse=True):
        for node in levels[depth]:
            if node.operation is not None and not node.is_input:
                yield node


def calls_of(model: Any) -> Iterator[Any]:
    """The same with the calls inside nested models, as often as these are called."""
    for node in nodes_of(model):
        if is_open(node.operation) and inner_inputs(node) is not None:
            yield from calls_of(node.operation)
        else:
            yield node


def inner_inputs(node: Any) -> list[Any] | None:
    """What a nested model is called on, in the order of its own inputs; None where that is not plain to see."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    given = args[0] if args else kwargs.get("inputs")
    own = graph_of(node.operation)._inputs_struct
    flat = keras.tree.flatten(given)
    by_name = isinstance(given, dict) and (not isinstance(own, dict) or set(given) != set(own))
    fits = not by_name and len(flat) == len(keras.tree.flatten(own)) and all(isinstance(t, keras.KerasTensor) for t in flat)
    return flat if fits else None


def tensors_in(arguments: Any) -> list[Any]:
    """The symbolic tensors among arguments, in order."""
    return [one for one in keras.tree.flatten(arguments) if isinstance(one, keras.KerasTensor)]


def run(model: Any, inputs: list[Any], call: Callable[[Any, dict[int, Any]], list[Any]]) -> list[Any]:
    """Computes a model call by call.

    Args:
        model: whose graph is walked; nested ones are entered.
        inputs: a value for each of its inputs.
        call: function of a call and of what it reads, by `id` of the symbolic tensors, that gives its outputs.

    Returns:
        A value for each of its outputs.
    """
    graph = graph_of(model)
    values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    for node in nodes_of(model):
        read = {id(t): values[id(t)] for t in node.arguments.keras_tensors}
        inner = inner_inputs(node) if is_open(node.operation) else None
        given = call(node, read) if inner is None else run(node.operation, [read[id(t)] for t in inner], call)
        values.update({id(tensor): value for tensor, value in zip(node.outputs, given, strict=True)})
    return [values[id(tensor)] for tensor in graph.outputs]


def called(operation: Any, node: Any, read: dict[int, Any]) -> list[Any]:
    """What an operation gives in inference for the arguments of a call."""
    args, kwargs = node.arguments.fill_in(read)
    if getattr(operation, "_call_has_training_arg", False):
        kwargs = {**kwargs, "training": False}
    return list(keras.tree.flatten(operation(*args, **kwargs)))
