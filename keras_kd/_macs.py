"""What does one inference cost? Counts multiply-accumulates and the memory of activations on a trace of the model."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _calls, _taps

ROOT = "(model)"
_VIEWS = {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient", "EnsureShape"}
_LENGTHS = {"Shape", "ShapeN", "Size", "Rank"}  # read no values
_WEIGHTS = {"Const", "ReadVariableOp", "Placeholder"}
_NO_MEMORY = (tf.resource, tf.variant, tf.string)
# Products that no rule knows: a layer with one of them is named, not taken for 0.
_UNKNOWN = {
    *("CudnnRNN", "CudnnRNNV2", "CudnnRNNV3", "SparseMatMul", "SparseTensorDenseMatMul", "Conv"),
    *("Conv2DBackpropFilter", "Conv3DBackpropFilterV2", "DepthwiseConv2dNativeBackpropInput", "XlaConvV2", "XlaDotV2"),
    *("PyFunc", "PyFuncStateless", "EagerPyFunc", "TridiagonalMatMul", "SymbolicGradient", "RemoteCall"),
}


class _UncountedError(Exception):
    """Multiply-accumulates that a trace does not show."""


@dataclasses.dataclass
class LayerCost:
    """What all calls of one layer cost for one sample.

    Attributes:
        path: path of the layer; `ROOT` for the model itself.
        kind: its class.
        output_shape: shape of its (last) output, batch of one; None if it gives several.
        macs: multiply-accumulates; None where they cannot be counted.
        activation_bytes: bytes of the memory that its outputs take.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...] | None
    macs: int | None
    activation_bytes: int


def measure(model: keras.Model, sample: Any) -> tuple[list[LayerCost], int]:
    """Costs of one sample, by layer, and the peak of the memory of activations.

    What a layer with parts computes between them is its own; what a loop or a function computes belongs to the layer around it.

    Args:
        model: a built model.
        sample: arrays of one sample, nested as the model takes them.

    Returns:
        The costs in the order of first calls, and bytes.
    """
    trace, owners = _traced(model, sample)
    needed = _needed(trace.graph, trace.outputs)
    run = _Run(trace, needed, keras.tree.flatten(sample))
    costs: dict[str, LayerCost] = {}
    for call in _in_order(trace.calls, owners):
        cost = costs.setdefault(call.path, LayerCost(call.path, type(call.layer).__name__, None, 0, 0))
        cost.output_shape = run.output_shape(call.outputs)
    for operation in needed:
        cost = costs[owners[operation.name].path]
        try:
            cost.macs = None if cost.macs is None else cost.macs + _macs_of(operation, run)
        except _UncountedError:
            cost.macs = None
    activations = _activations(trace, owners, needed, run)
    for path, size, _ in activations.values():
        if path:
            costs[path].activation_bytes += size
    leaves = {call.path for call in trace.calls}
    found = [cost for cost in costs.values() if cost.path in leaves or cost.macs != 0 or cost.activation_bytes]
    return sorted(found, key=lambda cost: cost.path == ROOT), _peak(trace, owners, needed, activations)


def _in_order(leaves: list[_calls.Call], owners: dict[str, _calls.Call]) -> list[_calls.Call]:
    """Calls in order of their beginnings; those of layers with parts before their parts."""
    around = {id(call): call for call in owners.values()}
    for call in leaves:
        around.pop(id(call), None)
    outer_first = sorted(around.values(), key=lambda call: (call.start, -call.end))
    places = {id(call): place for place, call in enumerate(leaves)}
    for call in outer_first:
        places[id(call)] = next((place for place, leaf in enumerate(leaves) if leaf.start >= call.start), len(leaves))
    return sorted([*outer_first, *leaves], key=lambda call: places[id(call)])


def _traced(model: keras.Model, sample: Any) -> tuple[_calls.Trace, dict[str, _calls.Call]]:
    """A trace of one sample, and whose each operation is: the layer's without parts, else the innermost one's with parts."""
    leaves = {id(layer) for layer in _calls.find_leaves(model).values()}
    around: list[tuple[Any, _calls.Call]] = []

    def watched(path: str, layer: Any) -> Callable[..., Any]:
        def function(call: Any, *args: Any, **kwargs: Any) -> Any:
            graph = tf.compat.v1.get_default_graph()
            start = len(graph.get_operations())
            result = call(*args, **kwargs)
            outputs = [tensor for tensor in keras.tree.flatten(result) if tf.is_symbolic_tensor(tensor)]
            around.append((graph, _calls.Call(path, path, layer, [], outputs, start, len(graph.get_operations()))))
            return result

        return function

    with contextlib.ExitStack() as stack:
        for path, layer in _taps.find_layers(model).items():
            if id(layer) not in leaves:
                stack.enter_context(_taps.replace(layer, watched(path, layer)))
        trace = _calls.trace(model, keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), sample))
    trace.inputs, trace.outputs = ([t for t in each if tf.is_symbolic_tensor(t)] for each in (trace.inputs, trace.outputs))
    operations = trace.graph.get_operations()
    whole = _calls.Call(ROOT, ROOT, model, [], trace.outputs, 0, len(operations))
    owners = dict.fromkeys((operation.name for operation in operations), whole)
    inside = [call for graph, call in around if graph is trace.graph]  # in the order of their ends: inner ones first
    for call in (*reversed(inside), *trace.calls):
        call.outputs = [tensor for tensor in call.outputs if tf.is_symbolic_tensor(tensor)]
        owners |= dict.fromkeys((operation.name for operation in operations[call.start : call.end]), call)
    return trace, owners


def _needed(graph: Any, outputs: list[Any]) -> list[Any]:
    """The operations that the outputs need, in order: TensorFlow leaves out the others."""
    pending = [tensor.op for tensor in outputs] + list(graph.control_outputs)
    found: set[str] = set()
    while pending:
        operation = pending.pop()
        if operation.name not in found:
            found.add(operation.name)
            pending += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    return [operation for operation in graph.get_operations() if operation.name in found]


class _Run:
    """What a trace does not show: how often its loops turn, and lengths that depend on values. One run of the sample tells.

    Args:
        trace: the trace.
        operations: those that are needed.
        sample: arrays, flat.
    """

    def __init__(self, trace: _calls.Trace, operations: list[Any], sample: list[Any]) -> None:
        self.graph = trace.graph
        loops = [operation for operation in operations if operation.type in ("While", "StatelessWhile")]
        counters = [loop.outputs[0] for loop in loops if "loop_counter" in loop.inputs[0].name]  # TensorFlow's own
        made = [tensor for operation in operations for tensor in operation.outputs if tensor.dtype not in _NO_MEMORY]
        unknown = [tensor for tensor in made if not tensor.shape.is_fully_defined()]
        values = _evaluated(trace, [*counters, *unknown], sample)
        self.turns = {tensor.op.name: int(values[tensor.name]) for tensor in counters}
        self.shapes = {tensor.name: tuple(np.shape(values[tensor.name])) for tensor in unknown}

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """The shape of a tensor of any graph."""
        if tensor.shape.is_fully_defined():
            return tuple(tensor.shape)
        if tensor.graph is not self.graph or tensor.name not in self.shapes:
            raise _UncountedError
        return self.shapes[tensor.name]

    def turns_of(self, loop: Any) -> int:
        """How often a loop turns; not known of one inside another loop or a function."""
        if loop.graph is not self.graph or loop.name not in self.turns:
            raise _UncountedError
        return self.turns[loop.name]

    def size(self, tensor: Any) -> int:
        """Number of elements."""
        return math.prod(self.shape(tensor))

    def bytes(self, tensor: Any) -> int:
        """Bytes of a tensor; 0 for handles."""
        return 0 if tensor.dtype in _NO_MEMORY else self.size(tensor) * int(tensor.dtype.size)

    def output_shape(self, outputs: list[Any]) -> tuple[int, ...] | None:
        """The shape of what a call gives, None if it is not one tensor."""
        with contextlib.suppress(_UncountedError):
            return self.shape(outputs[0]) if len(outputs) == 1 else None
        return None


def _evaluated(trace: _calls.Trace, tensors: list[Any], sample: list[Any]) -> dict[str, Any]:
    """Values of tensors by name; what they do not need does not run."""
    if not tensors:
        return {}
    content = trace.graph.as_graph_def()

    def fetch(*arguments: Any) -> Any:
        capture = tf.compat.v1.get_default_graph().capture
        given = {inner.name: capture(outer) for outer, inner in trace.graph.captures}
        given |= {placeholder.name: argument for placeholder, argument in zip(trace.inputs, arguments, strict=True)}
        return tf.graph_util.import_graph_def(content, input_map=given, return_elements=[tensor.name for tensor in tensors])

    specs = [tf.TensorSpec(placeholder.shape, placeholder.dtype) for placeholder in trace.inputs]
    values = tf.compat.v1.wrap_function(fetch, specs)(*(tf.convert_to_tensor(array) for array in sample))
    return {tensor.name: value.numpy() for tensor, value in zip(tensors, values, strict=True)}


def _macs_of(operation: Any, run: _Run) -> int:
    """Multiply-accumulates of one of TensorFlow's operations; 0 for those without."""
    kind = operation.type
    if kind in _UNKNOWN:
        raise _UncountedError
    if kind in ("PartitionedCall", "StatefulPartitionedCall"):
        return _macs_of_function(operation, operation.get_attr("f"), run)
    if kind in ("If", "StatelessIf"):
        return max(_macs_of_function(operation, operation.get_attr(branch), run) for branch in ("then_branch", "else_branch"))
    if kind in ("Case", "StatelessCase"):
        return max(_macs_of_function(operation, branch, run) for branch in operation.get_attr("branches"))
    if kind in ("While", "StatelessWhile"):
        macs, test = (_macs_of_function(operation, operation.get_attr(part), run) for part in ("body", "cond"))
        return macs * run.turns_of(operation) + test * (run.turns_of(operation) + 1) if macs or test else 0
    return _RULES[kind](operation, run) if kind in _RULES else 0


def _macs_of_function(operation: Any, function: Any, run: _Run) -> int:
    graph = operation.graph._get_function(function.name).graph
    return sum(_macs_of(inner, run) for inner in _needed(graph, [t for t in graph.outputs if t is not None]))


def _matmul(operation: Any, run: _Run) -> int:
    transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
    return run.size(operation.outputs[0]) * run.shape(operation.inputs[0])[-2 if transposed else -1]


def _einsum(operation: Any, run: _Run) -> int:
    """The product of the lengths of all letters; one operand alone is not multiplied."""
    sizes: dict[Any, int] = {}
    for letters, tensor in zip(operation.get_attr("equation").decode().split("->")[0].split(","), operation.inputs, strict=True):
        before, _, after = letters.partition("...")
        shape = run.shape(tensor)
        names = [*before, *range(len(before) + len(after) - len(shape), 0), *after]  # an ellipsis is read from its end
        for name, length in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), length)
    return math.prod(sizes.values()) if len(operation.inputs) > 1 else 0


def _convolution(operation: Any, run: _Run) -> int:
    """Output elements times what each of them reads: all of the kernel but its last axis, or the window where depthwise."""
    output, kernel = operation.outputs[0], run.shape(operation.inputs[1])
    readers = output.consumers()
    while len(readers) == 1 and readers[0].type in _VIEWS:
        readers = readers[0].outputs[0].consumers()
    if len(readers) == 1 and readers[0].type == "BatchToSpaceND":  # a dilated one, on a map cut into parts with some padding
        output = readers[0].outputs[0]
    return run.size(output) * math.prod(kernel[:2] if operation.type == "DepthwiseConv2dNative" else kernel[:-1])


def _transposed_convolution(operation: Any, run: _Run) -> int:
    return run.size(operation.inputs[2]) * math.prod(run.shape(operation.inputs[1])[:-1])


_RULES: dict[str, Callable[[Any, _Run], int]] = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative"), _convolution),
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), _transposed_convolution),
}


def _activations(
    trace: _calls.Trace, owners: dict[str, _calls.Call], needed: list[Any], run: _Run
) -> dict[str, tuple[str, int, int]]:
    """What takes memory, by name of the tensor: path of the layer ("" for inputs), bytes, place in the graph that makes it."""
    found = {tensor.name: ("", run.bytes(tensor), -1) for tensor in trace.inputs}
    leaves, runs = {id(call) for call in trace.calls}, {operation.name for operation in needed}
    for call in trace.calls:
        for tensor in map(_storage, call.outputs):
            if owners[tensor.op.name] is call and tensor.op.name in runs and tensor.op.type not in _WEIGHTS:
                found.setdefault(tensor.name, (call.path, run.bytes(tensor), call.end - 1))
    reached = {tensor.name for tensor in trace.inputs}
    places = {operation.name: place for place, operation in enumerate(trace.graph.get_operations())}
    for operation in needed:
        if operation.type in _LENGTHS or not any(tensor.name in reached for tensor in operation.inputs):
            continue
        reached |= {tensor.name for tensor in operation.outputs}
        if id(owners[operation.name]) not in leaves and operation.type not in _VIEWS:  # between layers
            for tensor in operation.outputs:
                found[tensor.name] = (owners[operation.name].path, run.bytes(tensor), places[operation.name])
    return found


def _peak(
    trace: _calls.Trace,
    owners: dict[str, _calls.Call],
    needed: list[Any],
    activations: dict[str, tuple[str, int, int]],
) -> int:
    """The largest sum of bytes that live at the same time, where a layer without parts is one step."""
    operations = trace.graph.get_operations()
    leaves = {id(call) for call in trace.calls}
    last: dict[str, int] = {}
    alive = {operation.name for operation in needed if operation.type not in _VIEWS}
    for place, operation in enumerate(operations):
        if operation.name in alive:
            owner = owners[operation.name]
            step = owner.end - 1 if id(owner) in leaves else place
            last |= dict.fromkeys((_storage(tensor).name for tensor in operation.inputs), step)
    last |= dict.fromkeys((_storage(tensor).name for tensor in trace.outputs), len(operations))
    change = np.zeros(len(operations) + 3, np.int64)
    for name, (_, size, born) in activations.items():
        change[born + 1] += size
        change[max(last.get(name, born), born) + 2] -= size
    return int(np.cumsum(change).max())


def _storage(tensor: Any) -> Any:
    """The tensor whose memory it shares."""
    while tensor.op.type in _VIEWS:
        tensor = tensor.op.inputs[0]
    return tensor
