"""What does one inference cost? Counts multiply-accumulates and the memory of activations on a trace of the model."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_kd import _calls

BETWEEN = "(between layers)"
_VIEWS = {"Identity", "Reshape", "Squeeze", "ExpandDims"}  # share the memory of what they read
_LOOPS = {"While", "StatelessWhile", "If", "StatelessIf", "PartitionedCall", "StatefulPartitionedCall"}
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_CONVOLUTIONS = (
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D, *_TRANSPOSED),
)


@dataclasses.dataclass
class LayerCost:
    """What all calls of one layer cost for one sample.

    Attributes:
        path: path of the layer.
        kind: its class.
        output_shape: shape of its (last) output, batch of one; None if it gives several.
        macs: multiply-accumulates; None where loops hide them.
        activation_bytes: bytes of its outputs.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...] | None
    macs: int | None
    activation_bytes: int


def measure(model: keras.Model, specs: Any) -> tuple[list[LayerCost], int]:
    """Costs of one sample, by layer, and the peak of the memory of activations.

    Args:
        model: a built model.
        specs: `tf.TensorSpec`s of its inputs, nested as it takes them, for a batch of one and without unknown lengths.

    Returns:
        The costs in the order of first calls, and bytes.
    """
    trace = _calls.trace(model, specs)
    calls, operations = trace.calls, trace.graph.get_operations()
    owner: dict[str, _calls.Call] = {}
    for call in calls:
        owner |= {operation.name: call for operation in operations[call.start : call.end]}
    costs: dict[str, LayerCost] = {}
    for call in calls:
        inside = operations[call.start : call.end]
        found = _macs_of_layer(call, inside)
        shapes = [tuple(tensor.shape) for tensor in call.outputs]
        cost = costs.setdefault(call.path, LayerCost(call.path, type(call.layer).__name__, None, 0, 0))
        cost.output_shape = shapes[0] if len(shapes) == 1 else None
        cost.macs = None if found is None or cost.macs is None else cost.macs + found
        cost.activation_bytes += sum(_bytes(tensor) for tensor in call.outputs)
    outside = sum(_macs_of(operation) for operation in operations if operation.name not in owner)
    if outside:
        costs[BETWEEN] = LayerCost(BETWEEN, "", None, outside, 0)
    return list(costs.values()), _peak(trace, owner)


def _macs_of_layer(call: _calls.Call, operations: list[Any]) -> int | None:
    """Multiply-accumulates of a call; None if they are in a loop that nothing is known of."""
    layer = call.layer
    if isinstance(layer, _calls.OPAQUE):
        return _macs_of_recurrent(layer, call.inputs[0].shape)
    if isinstance(layer, _CONVOLUTIONS):  # TensorFlow writes some of them as several operations, or hides them in a function
        kernels = [variable for variable in layer.weights if "kernel" in variable.name]
        positions = _positions(layer, call.inputs[0] if isinstance(layer, _TRANSPOSED) else call.outputs[0])
        return positions * sum(int(np.prod(kernel.shape)) for kernel in kernels)
    if any(operation.type in _LOOPS for operation in operations):
        return None
    return sum(_macs_of(operation) for operation in operations)


def _positions(layer: Any, tensor: Any) -> int:
    """Number of places in a map."""
    shape = [int(length) for length in tensor.shape]
    return int(np.prod(shape[2:] if layer.data_format == "channels_first" else shape[1:-1]))


def _macs_of_recurrent(layer: Any, shape: Any) -> int | None:
    if isinstance(layer, keras.layers.Bidirectional):
        parts = [_macs_of_recurrent(part, shape) for part in (layer.forward_layer, layer.backward_layer)]
        return None if None in parts else sum(part for part in parts if part is not None)
    cell: Any = getattr(layer, "cell", None)
    if type(cell) not in (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell) or len(shape) != 3:
        return None
    return int(shape[1]) * (int(np.prod(cell.kernel.shape)) + int(np.prod(cell.recurrent_kernel.shape)))


def _macs_of(operation: Any) -> int:
    """Multiply-accumulates of one of TensorFlow's operations; 0 for those without."""
    kind = operation.type
    if kind == "Einsum":
        equation = operation.get_attr("equation").decode()
        sizes: dict[str, int] = {}
        for letters, tensor in zip(equation.split("->")[0].split(","), operation.inputs, strict=True):
            sizes |= dict(zip(letters.replace(".", ""), (int(n) for n in tensor.shape), strict=False))
        return int(np.prod(list(sizes.values()))) if len(operation.inputs) > 1 else 0
    if kind in ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        return _size(operation.outputs[0]) * int(operation.inputs[0].shape[-2 if transposed else -1])
    if kind in ("Conv2D", "Conv3D"):
        return _size(operation.outputs[0]) * int(np.prod(operation.inputs[1].shape[:-1]))
    if kind == "DepthwiseConv2dNative":
        return _size(operation.outputs[0]) * int(np.prod(operation.inputs[1].shape[:2]))
    if kind in ("Conv2DBackpropInput", "Conv3DBackpropInputV2"):  # transposed convolutions
        return _size(operation.inputs[2]) * int(np.prod(operation.inputs[1].shape[:-1]))
    return 0


def _peak(trace: _calls.Trace, owner: dict[str, _calls.Call]) -> int:
    """The largest sum of bytes of inputs and outputs of layers that live at the same time."""
    calls, inputs, outputs = trace.calls, trace.inputs, trace.outputs
    order = {id(call): place for place, call in enumerate(calls)}
    born: dict[int, tuple[int, int]] = {id(_storage(tensor)): (0, _bytes(tensor)) for tensor in inputs}
    last: dict[int, int] = {}
    for place, call in enumerate(calls):
        for tensor in call.outputs:
            born.setdefault(id(_storage(tensor)), (place, _bytes(tensor)))
    for call in calls:
        for tensor in (*call.inputs, *call.outputs, *inputs):
            storage = _storage(tensor)
            ends = [order[id(owner[operation.name])] for operation in _readers(storage) if operation.name in owner]
            last[id(storage)] = max([last.get(id(storage), 0), *ends])
    for tensor in outputs:
        last[id(_storage(tensor))] = len(calls)
    sums = [
        sum(size for key, (start, size) in born.items() if start <= place <= last.get(key, start)) for place in range(len(calls))
    ]
    return max(sums, default=0)


def _storage(tensor: Any) -> Any:
    """The tensor whose memory it shares."""
    while tensor.op.type in _VIEWS:
        tensor = tensor.op.inputs[0]
    return tensor


def _readers(tensor: Any) -> list[Any]:
    found: list[Any] = []
    for operation in tensor.consumers():
        found += _readers(operation.outputs[0]) if operation.type in _VIEWS else [operation]
    return found


def _size(tensor: Any) -> int:
    return int(np.prod([int(length) for length in tensor.shape]))


def _bytes(tensor: Any) -> int:
    return _size(tensor) * int(tensor.dtype.size) if tensor.shape.is_fully_defined() else 0
