"""What do layers and operations without weights do with channels: element by element, by shape, or all at once?"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_kd.surgery import _labels
from keras_kd.surgery._labels import Labels
from keras_kd.surgery._visits import Visit

_L = keras.layers
_POSITIONS = "mixes it as positions"
_MIXING = {"softmax", "log_softmax", "sparsemax", "glu"}
_ELEMENTWISE = {name for name in dir(keras.activations) if not name.startswith("_")} - _MIXING - {"get", "serialize", "deserialize"}


def is_elementwise(activation: Any) -> bool:
    """Whether an activation is one of Keras' own that look at each number alone."""
    if activation is None:
        return True
    if isinstance(activation, (_L.ReLU, _L.LeakyReLU, _L.ELU)):
        return True
    if isinstance(activation, _L.Activation):
        return is_elementwise(activation.activation)
    name = getattr(activation, "__name__", "")
    return name in _ELEMENTWISE and getattr(keras.activations, name, None) is activation


def check_activation(visit: Visit, activation: Any, labels: Labels) -> None:
    """Keeps what an activation mixes: all channels of a softmax, everything where it is not known."""
    if is_elementwise(activation):
        return
    name = getattr(activation, "__name__", type(activation).__name__)
    last_alone = name in ("softmax", "log_softmax", "sparsemax") and getattr(keras.activations, name, None) is activation
    visit.pin(labels[-1:] if last_alone else labels, f"has the activation {name}, which is not known to look at each channel alone")


def _same(visit: Visit) -> list[Labels]:
    return [visit.of(visit.inputs[0])]


def _activation(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    check_activation(visit, visit.layer.activation, labels)
    return [labels]


def _softmax(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    axes = visit.layer.axis
    chosen = labels if axes is None else [labels[axis] for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
    visit.pin(chosen, "normalises over it")
    return [labels]


def _dropout(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    shape = getattr(visit.layer, "noise_shape", None) or _labels.none(labels)
    visit.pin([one for one, n in zip(labels, shape, strict=True) if n not in (None, 1)], "has a noise shape for it")
    return [labels]


def _rescaling(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    if np.size(visit.layer.scale) > 1 or np.size(visit.layer.offset) > 1:
        visit.pin(labels, "has numbers for each")
    return [labels]


def _spatial(visit: Visit) -> list[Labels]:
    """Pooling, padding, cropping and up-sampling: channels stay, positions change."""
    labels = visit.of(visit.inputs[0])
    first = getattr(visit.layer, "data_format", None) == "channels_first"
    axis = 1 if first else len(labels) - 1
    visit.pin_beside(labels, axis, _POSITIONS)
    return [[one if index == axis else None for index, one in enumerate(labels)]]


def _global_pooling(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    axis = 1 if visit.layer.data_format == "channels_first" else len(labels) - 1
    visit.pin_beside(labels, axis, _POSITIONS)
    kept = [one if index == axis else None for index, one in enumerate(labels)]
    return [kept if visit.layer.keepdims else [None, labels[axis]]]


def _fold(visit: Visit, tensor: Any, shape: Any) -> Labels:
    """Labels after a reshape to `shape`, both without samples."""
    labels = visit.of(tensor)
    visit.pin(labels[:1], "reshapes samples")
    result = _labels.reshaped(visit.atoms, labels[1:], tensor.shape[1:], shape)
    if isinstance(result, str):
        visit.pin(labels, result.removeprefix("it "))
        return [None, *_labels.none(shape)]
    return [None, *result]


def _flatten(visit: Visit) -> list[Labels]:
    tensor = visit.inputs[0]
    if visit.layer.data_format == "channels_first" and len(tensor.shape) > 2:
        visit.pin(visit.of(tensor), "moves channels before it flattens")
        return [_labels.none(visit.outputs[0].shape)]
    return [_fold(visit, tensor, visit.outputs[0].shape[1:])]


def _reshape(visit: Visit) -> list[Labels]:
    result = _fold(visit, visit.inputs[0], visit.outputs[0].shape[1:])
    visit.size("target_shape", (tuple(visit.layer.target_shape), result[1:]))
    return [result]


def _reshape_operation(visit: Visit) -> list[Labels]:
    tensor, output, wanted = visit.inputs[0], visit.outputs[0], visit.layer.newshape
    whole = isinstance(wanted, (tuple, list)) and all(n is None or isinstance(n, int) for n in wanted)
    if not whole or tensor.shape[0] != output.shape[0] or len(tensor.shape) < 2:
        return _unknown(visit, "reshapes samples")
    result = _fold(visit, tensor, output.shape[1:])
    visit.size("newshape", (tuple(wanted), result))
    return [result]


def _permute(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    return [[labels[0], *[labels[axis] for axis in visit.layer.dims]]]


def _transpose(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    axes = visit.layer.axes
    return [[labels[axis] for axis in (range(len(labels) - 1, -1, -1) if axes is None else axes)]]


def _repeat_vector(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    return [[labels[0], None, labels[1]]]


def _merge(visit: Visit) -> list[Labels]:
    """Add, multiply and the like: layers put axes of length 1 behind the samples of what has fewer."""
    tensors = visit.inputs
    rank = max(len(tensor.shape) for tensor in tensors)
    shapes, several = [], []
    for tensor in tensors:
        missing = rank - len(tensor.shape)
        labels = visit.of(tensor)
        several.append([labels[0], *[None] * missing, *labels[1:]])
        shapes.append((tensor.shape[0], *[1] * missing, *tensor.shape[1:]))
    return [visit.tie(several, shapes)]


def _binary(visit: Visit) -> list[Labels]:
    """Operations on several tensors or numbers: axes of length 1 come before those of what has fewer."""
    operands = [one for one in (*visit.args, *visit.kwargs.values()) if one is not None]
    shapes = [tuple(one.shape) if hasattr(one, "shape") else np.shape(one) for one in operands]
    rank = max(len(shape) for shape in shapes)
    several: list[Labels] = []
    for operand, shape in zip(operands, shapes, strict=True):
        labels = visit.of(operand) if isinstance(operand, keras.KerasTensor) else _labels.none(shape)
        several.append([*[None] * (rank - len(shape)), *labels])
    return [visit.tie(several, [(1,) * (rank - len(shape)) + shape for shape in shapes])]


def _concatenate(visit: Visit) -> list[Labels]:
    tensors = visit.inputs
    several = [visit.of(tensor) for tensor in tensors]
    axis = visit.layer.axis % len(several[0])
    result = visit.tie([[one for i, one in enumerate(labels) if i != axis] for labels in several])
    parts = [labels[axis] for labels in several]
    joined = None
    if any(part is not None for part in parts):
        whole = []
        for tensor, part in zip(tensors, parts, strict=True):
            if part is None:
                part = visit.atoms.new(tensor.shape[axis])
                visit.pin([part], "takes it from what no layer makes")
            whole.append(part)
        joined = np.concatenate(whole)
    return [[*result[:axis], joined, *result[axis:]]]


def _expand(visit: Visit) -> list[Labels]:
    labels, rank = list(visit.of(visit.inputs[0])), len(visit.outputs[0].shape)
    axes = visit.layer.axis
    for axis in sorted(axis % rank for axis in (axes if isinstance(axes, (list, tuple)) else [axes])):
        labels.insert(axis, None)
    return [labels]


def _squeeze(visit: Visit) -> list[Labels]:
    tensor = visit.inputs[0]
    labels, axes = visit.of(tensor), visit.layer.axis
    if axes is None:
        axes = [axis for axis, n in enumerate(tensor.shape) if n == 1]
    chosen = {axis % len(labels) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
    visit.pin([labels[axis] for axis in chosen], "leaves its axis out")
    return [[one for axis, one in enumerate(labels) if axis not in chosen]]


def _reduce(visit: Visit) -> list[Labels]:
    labels = visit.of(visit.inputs[0])
    axes = visit.layer.axis
    axes = range(len(labels)) if axes is None else axes if isinstance(axes, (list, tuple)) else [axes]
    chosen = {axis % len(labels) for axis in axes}
    visit.pin([labels[axis] for axis in chosen], "reduces over it")
    if visit.layer.keepdims:
        return [[None if axis in chosen else one for axis, one in enumerate(labels)]]
    return [[one for axis, one in enumerate(labels) if axis not in chosen]]


def _get_item(visit: Visit) -> list[Labels]:
    """Slices of whole axes and single positions keep the other axes as they are."""
    labels = visit.of(visit.inputs[0])
    key = visit.args[1] if len(visit.args) > 1 else visit.kwargs.get("key")
    keys = key if isinstance(key, tuple) else (key,)
    if any(one is not Ellipsis and not isinstance(one, (int, slice)) for one in keys) or keys.count(Ellipsis) > 1:
        return _unknown(visit, "takes parts of it")
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    fill = (slice(None),) * (len(labels) - len(keys) + (Ellipsis in keys))
    keys = (*keys[:at], *fill, *keys[at + 1 :])
    result: Labels = []
    for one, label in zip(keys, labels, strict=True):
        whole = one == slice(None)
        if not whole:
            visit.pin([label], "takes parts of it")
        if not isinstance(one, int):
            result.append(label if whole else None)
    return [result]


def _matmul(visit: Visit) -> list[Labels]:
    """Sums over the last axis of the first and the last but one of the second."""
    tensors = visit.args[:2]
    if len(tensors) < 2 or any(not isinstance(t, keras.KerasTensor) or len(t.shape) < 2 for t in tensors):
        return _unknown(visit, "multiplies it with what has another shape")
    first, second = (visit.of(t) for t in tensors)
    if len(first) != len(second):
        return _unknown(visit, "multiplies it with what has another shape")
    visit.tie([first[-1:], second[-2:-1]])
    beside = visit.tie([first[:-2], second[:-2]], [t.shape[:-2] for t in tensors]) if len(first) > 2 else []
    return [[*beside, first[-2], second[-1]]]


def _unknown(visit: Visit, reason: str) -> list[Labels]:
    for tensor in visit.inputs:
        visit.pin(visit.of(tensor), reason)
    return [_labels.none(output.shape) for output in visit.outputs]


_UNARY = (
    "Relu", "Relu6", "Sigmoid", "SparseSigmoid", "Softplus", "Softsign", "SoftShrink", "SparsePlus", "Silu", "Squareplus",
    "LogSigmoid", "LeakyRelu", "HardSigmoid", "HardSilu", "Elu", "Selu", "Gelu", "Celu", "TanhShrink", "HardTanh",
    "HardShrink", "Threshold", "Absolute", "Abs", "Exp", "Exp2", "Expm1", "Log", "Log1p", "Log10", "Log2", "Sqrt", "Square",
    "Rsqrt", "Negative", "Reciprocal", "Sign", "Sin", "Cos", "Tan", "Tanh", "Sinh", "Cosh", "Arctan", "Erf", "Cast",
    "StopGradient", "Clip", "Round", "Floor", "Ceil", "Trunc", "Isnan", "Isfinite", "Isinf", "LogicalNot", "Cbrt",
    "NanToNum", "Copy", "OnesLike", "ZerosLike",
)  # fmt: skip
_BINARY = (
    "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "DivideNoNan", "Power", "Maximum", "Minimum", "FloorDivide",
    "Mod", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr", "LogicalXor",
    "Where", "Arctan2", "Hypot", "Logaddexp",
)  # fmt: skip
_REDUCTIONS = (
    "Mean", "Sum", "Max", "Min", "Amax", "Amin", "Prod", "Std", "Var", "Any", "All", "Logsumexp", "CountNonzero",
)  # fmt: skip
_OPERATIONS: dict[str, Callable[[Visit], list[Labels]]] = {
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Sparsemax"), _softmax),
    "Concatenate": _concatenate,
    "Reshape": _reshape_operation,
    "Transpose": _transpose,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "GetItem": _get_item,
    "Matmul": _matmul,
}


def rule_for_operation(operation: Any) -> Callable[[Visit], list[Labels]] | None:
    """The rule for one of Keras' operations; None for others, and for those that hold arrays."""
    if not type(operation).__module__.startswith("keras.src.ops."):
        return None
    own = {value for key, value in vars(operation).items() if not key.startswith("_") and isinstance(value, np.ndarray)}
    return None if own else _OPERATIONS.get(type(operation).__name__)


def _pairs(rule: Callable[[Visit], list[Labels]], *classes: Any) -> dict[Any, Callable[[Visit], list[Labels]]]:
    return dict.fromkeys(classes, rule)


RULES: dict[Any, Callable[[Visit], list[Labels]]] = {
    **_pairs(_activation, _L.Activation),
    **_pairs(_same, _L.ReLU, _L.LeakyReLU, _L.ELU, _L.Identity, _L.ActivityRegularization, _L.GaussianNoise, _L.GaussianDropout),
    **_pairs(_same, _L.SpatialDropout1D, _L.SpatialDropout2D, _L.SpatialDropout3D),
    **_pairs(_dropout, _L.Dropout, _L.AlphaDropout),
    **_pairs(_softmax, _L.Softmax),
    **_pairs(_rescaling, _L.Rescaling),
    **_pairs(_spatial, _L.MaxPooling1D, _L.MaxPooling2D, _L.MaxPooling3D),
    **_pairs(_spatial, _L.AveragePooling1D, _L.AveragePooling2D, _L.AveragePooling3D),
    **_pairs(_spatial, _L.ZeroPadding1D, _L.ZeroPadding2D, _L.ZeroPadding3D, _L.Cropping1D, _L.Cropping2D, _L.Cropping3D),
    **_pairs(_spatial, _L.UpSampling1D, _L.UpSampling2D, _L.UpSampling3D),
    **_pairs(_global_pooling, _L.GlobalAveragePooling1D, _L.GlobalAveragePooling2D, _L.GlobalAveragePooling3D),
    **_pairs(_global_pooling, _L.GlobalMaxPooling1D, _L.GlobalMaxPooling2D, _L.GlobalMaxPooling3D),
    **_pairs(_flatten, _L.Flatten),
    **_pairs(_reshape, _L.Reshape),
    **_pairs(_permute, _L.Permute),
    **_pairs(_repeat_vector, _L.RepeatVector),
    **_pairs(_merge, _L.Add, _L.Subtract, _L.Multiply, _L.Average, _L.Maximum, _L.Minimum),
    **_pairs(_concatenate, _L.Concatenate),
}
