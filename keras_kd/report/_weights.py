"""What weights does a LiteRT file hold? Read from the file itself: how many, how many zeros, of how many bits, by operator."""

import math
from typing import Any, NamedTuple

import numpy as np

# Operators that only change how a constant is stored.
_STORAGE = {"DENSIFY", "DEQUANTIZE"}


class Weights(NamedTuple):
    """What one operator holds; constants that several operators read count for the first.

    Attributes:
        name: of the layer that it came from, as far as the file says it.
        operator: its name.
        parameters: number of weights.
        nonzero: how many are not 0.
        bits: mean bits of a weight.
    """

    name: str
    operator: str
    parameters: int
    nonzero: int
    bits: float


class _Constant(NamedTuple):
    name: str
    parameters: int
    nonzero: int
    bits: int


def weights_of(content: bytes) -> list[Weights]:
    """The operators of a file that hold weights, in their order.

    Weights are constants of floats, and integers that stand for floats; lengths and axes are none.

    Raises:
        ValueError: if it is no LiteRT file.
    """
    from ai_edge_litert import schema_py_generated as schema

    if content[4:8] != b"TFL3":
        raise ValueError("It must hold a LiteRT model. Received: a file without its mark, TFL3.")
    model = schema.Model.GetRootAsModel(content, 0)
    names = _names_of(schema.BuiltinOperator)
    found: list[Weights] = []
    seen: set[int] = set()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        constants = _constants(model, graph, _names_of(schema.TensorType), seen)
        for place in range(graph.OperatorsLength()):
            operator = graph.Operators(place)
            code = model.OperatorCodes(operator.OpcodeIndex())
            # Old files have their code in a byte, newer ones in an int; what is not used is 0.
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs = [int(number) for number in operator.InputsAsNumpy()] if operator.InputsLength() else []
            if name in _STORAGE and inputs[0] in constants:
                constants[int(operator.Outputs(0))] = constants.pop(inputs[0])
                continue
            held = [constants.pop(number) for number in dict.fromkeys(inputs) if number in constants]
            if held:
                found.append(_joined(held, name, len(found)))
    return found


def _names_of(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _constants(model: Any, graph: Any, types: dict[int, str], seen: set[int]) -> dict[int, _Constant]:
    """The weights of a graph by the numbers of their tensors; `seen` are the buffers that were counted before."""
    found = {}
    for number in range(graph.TensorsLength()):
        tensor = graph.Tensors(number)
        buffer, kind = model.Buffers(tensor.Buffer()), types[tensor.Type()]
        bits = _bits_of(kind, tensor)
        if bits is None or not buffer.DataLength() or tensor.Buffer() in seen:
            continue
        seen.add(tensor.Buffer())
        shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else ()
        nonzero = int(np.count_nonzero(_values(buffer.DataAsNumpy(), kind)))
        found[number] = _Constant(tensor.Name().decode(errors="replace"), math.prod(map(int, shape)), nonzero, bits)
    return found


def _bits_of(kind: str, tensor: Any) -> int | None:
    """Bits of one value; None for what is no weight."""
    bits = {"FLOAT64": 64, "FLOAT32": 32, "FLOAT16": 16, "BFLOAT16": 16}.get(kind)
    if bits is not None:
        return bits
    scales = tensor.Quantization()
    integers = {"INT64": 64, "INT32": 32, "INT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4, "INT2": 2}
    return integers.get(kind) if scales is not None and scales.ScaleLength() else None


def _values(data: np.ndarray, kind: str) -> np.ndarray:
    """The values that a buffer holds; sparse ones are those that are stored."""
    if kind in ("INT4", "INT2"):
        width = int(kind[3:])
        return np.stack([(data >> shift) & (2**width - 1) for shift in range(0, 8, width)])
    if kind == "BFLOAT16":
        return data.view(np.uint16) & 0x7FFF
    return data.view(kind.lower())


def _joined(held: list[_Constant], operator: str, place: int) -> Weights:
    largest = max(held, key=lambda one: one.parameters)
    first = largest.name.split(";")[0]
    name = first.rsplit("/", 1)[0] if "/" in first else f"{operator.lower()}_{place}"
    parameters = sum(one.parameters for one in held)
    bits = sum(one.bits * one.parameters for one in held) / max(parameters, 1)
    return Weights(name, operator, parameters, sum(one.nonzero for one in held), bits)
