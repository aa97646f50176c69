"""What do TensorFlow's operations do to integers? Says it of all that `_kinds` does not know: nodes, and layers of one's own."""

from typing import Any

import tensorflow as tf

from keras_kd.quantized import _kinds

# Give values that they got, or zeros.
MOVES = frozenset(
    [
        *(
            "Reshape",
            "Transpose",
            "Squeeze",
            "ExpandDims",
            "StridedSlice",
            "Slice",
            "Pad",
            "MirrorPad",
            "ReverseV2",
            "Roll",
            "Tile",
        ),
        *("BroadcastTo", "GatherV2", "Split", "SplitV", "Unpack", "ConcatV2", "Pack", "Max", "MaxPool", "DepthToSpace"),
        *("SpaceToDepth", "ResizeNearestNeighbor", "StopGradient"),
    ]
)
_JOINTS = ("ConcatV2", "Pack", "Maximum", "Minimum")
_FIXED = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Softmax": "softmax"}
# What becomes one operator with the operation after it, or a clip.
_FUSED = {
    **dict.fromkeys(("AddV2", "Sub", "Mul"), ("Relu", "Relu6")),
    "Minimum": ("Maximum",),
    "Maximum": ("Minimum",),
}
_ALONE = {
    **dict.fromkeys(("Relu", "Relu6"), _kinds.RELU),
    **dict.fromkeys(("AddV2", "Sub", "Mul", "BiasAdd", "LeakyRelu", "Mean"), _kinds.OPERATION),
    **dict.fromkeys(_JOINTS, _kinds.JOINT),
    **dict.fromkeys(_FIXED, _kinds.FIXED),
    "AvgPool": _kinds.POOL,
}


def kind_of_call(inputs: list[Any], output: Any) -> tuple[str, str]:
    """The kind of what lies between a call's inputs and its output, and for the kind FIXED the name of the function.

    Integers are possible where nothing but values is moved, or one operation computes; between several of them ranges would be
    missing.
    """
    given = {key_of(tensor) for tensor in inputs if is_float(tensor)}
    operations = operations_between(given, output)
    types = [operation.type for operation in operations]
    read = {key_of(tensor) for operation in operations for tensor in operation.inputs if is_float(tensor)}
    computed = {key_of(tensor) for operation in operations for tensor in operation.outputs}
    constants = read - computed - given
    if types and len(given & read) == 1 and not constants and MOVES.issuperset(types):
        return _kinds.POOL, ""
    if sorted(types) == ["Maximum", "Minimum"] and len(given & read) == 1:  # clips
        return _kinds.OPERATION, ""
    kind = _ALONE.get(types[0], _kinds.FLOAT) if len(types) == 1 else _kinds.FLOAT
    if kind == _kinds.JOINT and (constants or not given <= read):
        kind = _kinds.OPERATION if types[0] in ("Maximum", "Minimum") else _kinds.FLOAT
    return kind, _FIXED.get(types[0], "") if kind == _kinds.FIXED else ""


def moved_from(tensor: Any) -> Any:
    """The tensor that all values of another one come from, which may be itself."""
    tensor = source_of(tensor)
    while tensor.op.type in MOVES:
        read = {key_of(each): each for each in tensor.op.inputs if is_float(each)}
        if len(read) != 1:
            break
        tensor = source_of(next(iter(read.values())))
    return tensor


def floats_between(given: set[int], tensors: list[Any], ranged: set[int], rounded: set[int]) -> list[Any]:
    """The operations between some tensors and others that the file computes in float.

    Integers are possible where what an operation reads and what it gives has a range, itself or moved. Some functions have one of
    LiteRT's own, and a ReLU may be a part of the operation before it.

    Args:
        given: keys of the first.
        tensors: the others.
        ranged: keys of tensors with a range.
        rounded: keys of tensors that are rounded where they are read.
    """
    between = {operation.name: operation for tensor in tensors for operation in operations_between(given, tensor)}

    def readers(operation: Any) -> list[Any]:
        return [reader for output in operation.outputs for reader in consumers(output)]

    def is_fused(operation: Any) -> bool:
        after = readers(operation)
        return len(after) == 1 and after[0].type in _FUSED.get(operation.type, ())

    def is_ranged(tensor: Any) -> bool:
        tensor, maker = source_of(tensor), source_of(tensor).op
        if id(tensor) in ranged or maker.name not in between:
            return id(tensor) in ranged or id(tensor) not in given  # or a constant
        return (maker.type in MOVES or maker.type in _FIXED or is_fused(maker)) and reads_ranges(maker)

    def reads_ranges(operation: Any) -> bool:
        return all(map(is_ranged, filter(is_float, operation.inputs)))

    def gives_ranges(operation: Any) -> bool:
        if operation.type in _FIXED or any(key_of(output) in rounded for output in operation.outputs):
            return True
        after = [reader for reader in readers(operation) if reader.name in between]
        passing = operation.type in MOVES or is_fused(operation)
        return bool(after) and all((reader.type in MOVES or passing) and gives_ranges(reader) for reader in after)

    def is_integer(operation: Any) -> bool:
        return operation.type in MOVES or (operation.type in _ALONE and reads_ranges(operation) and gives_ranges(operation))

    return [operation for operation in between.values() if not is_integer(operation)]


def consumers(tensor: Any) -> list[Any]:
    """The operations that read a tensor's values."""
    found: list[Any] = []
    for operation in tensor.consumers():
        same = [output for output in operation.outputs if _same_as(output) is tensor]
        if same:
            found += [reader for output in same for reader in consumers(output)]
        elif operation.type not in ("Shape", "Identity", "IdentityN"):
            found.append(operation)
    return found


def key_of(tensor: Any) -> int:
    """The same for all tensors of the same values."""
    return id(source_of(tensor))


def source_of(tensor: Any) -> Any:
    """The tensor whose values it has, in whatever precision."""
    while (same := _same_as(tensor)) is not None:
        tensor = same
    return tensor


def is_float(tensor: Any) -> bool:
    """Whether it is a tensor of floats."""
    return tf.is_tensor(tensor) and tensor.dtype.is_floating


def operations_between(given: set[int], output: Any) -> list[Any]:
    """The operations that lead from some tensors of floats to another one."""
    found: dict[str, Any] = {}
    answers: dict[str, bool] = {}

    def leads(tensor: Any) -> bool:
        tensor = source_of(tensor)
        if id(tensor) in given:
            return True
        operation = tensor.op
        if operation.name not in answers:
            answers[operation.name] = False
            led = [leads(each) for each in operation.inputs if is_float(each)]  # all of them: those before are noted
            answers[operation.name] = any(led)
            if answers[operation.name]:
                found[operation.name] = operation
        return answers[operation.name]

    leads(output)
    return list(found.values())


def _same_as(tensor: Any) -> Any:
    """What an operation that leaves values as they are has made a tensor of; None for any other."""
    operation = getattr(tensor, "op", None)
    if operation is None:
        return None
    if operation.type in ("Identity", "IdentityN"):  # the latter of functions with gradients of their own
        return operation.inputs[tensor.value_index]
    if operation.type == "Cast" and is_float(operation.inputs[0]) and is_float(tensor):
        return operation.inputs[0]
    if operation.type == "Mul":  # by one: TensorFlow's SiLU
        for one, other in (operation.inputs, reversed(operation.inputs)):
            if one.shape.rank == 0 and tf.get_static_value(source_of(one)) == 1:
                return other
    return None
