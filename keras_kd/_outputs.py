"""What do a model's outputs mean: logits, softmax or sigmoid probabilities? And which belong together?"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd._tunable import at_least_float32

LOGITS, SOFTMAX, SIGMOID = "logits", "softmax", "sigmoid"

# Layers that hand on what they get: shapes change, the meaning of the numbers does not.
_PASSES_ON = (
    "ActivityRegularization", "AlphaDropout", "Average", "Cropping1D", "Cropping2D", "Cropping3D", "Dropout", "Flatten",
    "GaussianDropout", "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "Identity", "Masking",
    "RepeatVector", "Reshape", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "Squeeze", "ExpandDims", "Cast",
    "UpSampling1D", "UpSampling2D", "UpSampling3D",
)  # fmt: skip
# Those that give logits whatever they get (a kernel does so too), and those that give logits from logits.
_NORMALIZES = ("BatchNormalization", "LayerNormalization", "GroupNormalization", "LogSoftmax")
_MAKES_LOGITS = (*_NORMALIZES, "MultiHeadAttention")
_COMBINES = ("Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Concatenate", "Rescaling", "TrueDivide",
             "AveragePooling1D", "AveragePooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "MaxPooling2D")  # fmt: skip
# Activations whose outputs are no probabilities.
_KEEPS_LOGITS = ("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "softplus",
                 "softsign", "log_softmax")  # fmt: skip


def output_kinds(model: Any) -> list[str | None]:
    """Finds what each output of `model` holds, in `keras.tree.flatten` order.

    Args:
        model: a Keras model. Functional and Sequential models are read from their graph.

    Returns:
        One of `"logits"`, `"softmax"`, `"sigmoid"` or `None` (cannot be known) per output; an empty list for a subclassed
        model, whose graph is not there to read.
    """
    return [_kind_of_tensor(tensor) for tensor in getattr(model, "outputs", None) or []]


def _kind_of_tensor(tensor: Any) -> str | None:
    operation, parents = _producer(tensor)
    if isinstance(operation, (keras.layers.InputLayer, keras.Model)):
        return None
    name = type(operation).__name__
    if name == "Softmax":
        return SOFTMAX if operation.axis in (-1, (-1,), [-1], len(tensor.shape) - 1) else None
    if name == "Sigmoid":
        return SIGMOID
    is_keras = _is_keras(operation)
    identity = name == "Activation" and operation.activation is keras.activations.linear
    if getattr(operation, "activation", None) is not None and not identity:
        return _kind_of_activation(operation.activation)
    if is_keras and (name in _MAKES_LOGITS or getattr(operation, "kernel", None) is not None):
        return LOGITS
    kinds = {_kind_of_tensor(parent) for parent in parents}
    if is_keras and len(kinds) == 1 and (name in _PASSES_ON or identity or (name in _COMBINES and kinds == {LOGITS})):
        return kinds.pop()
    return None  # custom code, or arithmetic that may have made probabilities


def _is_keras(thing: Any) -> bool:
    return type(thing).__module__.startswith("keras.")


def _calls_its_graph(model: Any) -> bool:
    """Whether a model computes what its graph says: its `call` is that of Keras, or of this library."""
    return type(model).call.__module__.startswith(("keras.", "keras_kd."))


def _producer(tensor: Any) -> tuple[Any, list[Any]]:
    """The operation that made a tensor, inside of Keras' wrappers and of inner models, and what it read."""
    operation, node_index, tensor_index = tensor._keras_history
    nodes = operation._inbound_nodes
    parents = nodes[min(node_index, len(nodes) - 1)].input_tensors if nodes else []
    while isinstance(operation, keras.layers.Wrapper) and _is_keras(operation):
        operation = operation.layer
    inner = getattr(operation, "outputs", None) if isinstance(operation, keras.Model) else None
    return _producer(inner[tensor_index]) if inner and _calls_its_graph(operation) else (operation, parents)


def linear_outputs(model: Any) -> list[bool]:
    """Finds which outputs of `model` surely may be any number, since a linear layer or a normalisation gives them.

    That is less than `output_kinds` calls logits: an output of ReLU or softplus, of a kernel under a constraint, or of a kernel
    that mixes probabilities may be meant as probabilities.

    Args:
        model: a Keras model.

    Returns:
        One flag per output, in `keras.tree.flatten` order; an empty list for a subclassed model.
    """
    outputs = getattr(model, "outputs", None) or []
    if not _calls_its_graph(model):
        return [False] * len(outputs)
    entries = {id(tensor._keras_history[0]) for tensor in model.inputs}
    known: dict[int, bool] = {}
    return [_is_linear(tensor, entries, known) for tensor in outputs]


def _is_linear(tensor: Any, entries: set[int], known: dict[int, bool]) -> bool:
    """Whether it is sure of a tensor; `known` are the answers so far, `entries` the layers of the model's inputs."""
    if id(tensor) in known:
        return known[id(tensor)]
    operation, parents = _producer(tensor)
    name, activation = type(operation).__name__, getattr(operation, "activation", None)
    if not _is_keras(operation) or isinstance(operation, (keras.layers.InputLayer, keras.Model)):
        found = False
    elif name in _NORMALIZES:
        found = True
    elif activation not in (None, keras.activations.linear):
        found = False
    elif getattr(operation, "kernel", None) is not None:
        found = getattr(operation, "kernel_constraint", None) is None and not _may_have_probabilities(parents, entries)
    else:
        passes_on = name in (*_PASSES_ON, "Activation", "Add", "Subtract")
        found = passes_on and bool(parents) and all(_is_linear(one, entries, known) for one in parents)
    known[id(tensor)] = found
    return found


def _may_have_probabilities(tensors: list[Any], entries: set[int]) -> bool:
    """Whether one of the tensors holds probabilities, alone or among other numbers, or comes from nobody knows where."""
    left, seen = list(tensors), set()
    while left:
        tensor = left.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation, parents = _producer(tensor)
        name, activation = type(operation).__name__, getattr(operation, "activation", None)
        inside = isinstance(operation, keras.layers.InputLayer) and id(operation) not in entries
        if inside or name in ("Softmax", "Sigmoid") or (activation and _kind_of_activation(activation) in (SOFTMAX, SIGMOID)):
            return True
        if name in (*_PASSES_ON, *_COMBINES, "Activation"):
            left += parents
    return False


def _kind_of_activation(activation: Any) -> str | None:
    if activation in (keras.activations.softmax, tf.nn.softmax) or isinstance(activation, keras.layers.Softmax):
        return SOFTMAX
    if activation in (keras.activations.sigmoid, tf.nn.sigmoid):
        return SIGMOID
    name = getattr(activation, "__name__", "")
    return LOGITS if name in _KEEPS_LOGITS and activation is getattr(keras.activations, name) else None


def as_logits(outputs: Any, kind: str) -> Any:
    """Turns outputs of a known kind into logits, up to a shift that softmax does not see.

    A softmax or sigmoid layer leaves its input on the tensor that it returns (Keras' own cross-entropies read it too): it is
    exact where a probability has underflowed to 0. Without it the logits are the logs of the probabilities.

    Args:
        outputs: tensor of shape `(..., classes)`.
        kind: `"logits"`, `"softmax"` or `"sigmoid"`.

    Returns:
        Logits, of the same shape and with the same Keras mask.
    """
    if kind == LOGITS:
        return outputs
    logits = getattr(outputs, "_keras_logits", None)
    if logits is None or tuple(logits.shape) != tuple(outputs.shape):
        p = ops.cast(outputs, at_least_float32(keras.backend.standardize_dtype(outputs.dtype)))
        tiny = float(np.finfo(keras.backend.standardize_dtype(p.dtype)).tiny)
        logits = ops.log(ops.maximum(p, tiny))
        if kind == SIGMOID:
            logits = logits - ops.log(ops.maximum(1.0 - p, tiny))
    return _with_mask(logits, getattr(outputs, "_keras_mask", None))


def convert(outputs: Any, dtype: str) -> Any:
    """Converts to a tensor of `dtype`, with the Keras mask and the logits that came with the outputs."""
    if not keras.ops.is_tensor(outputs):
        return ops.convert_to_tensor(outputs, dtype=dtype)
    if keras.backend.standardize_dtype(outputs.dtype) == dtype:
        return outputs
    converted = _with_mask(ops.cast(outputs, dtype), getattr(outputs, "_keras_mask", None))
    if getattr(outputs, "_keras_logits", None) is not None:
        converted._keras_logits = ops.cast(outputs._keras_logits, dtype)
    return converted


def as_probabilities(outputs: Any, kind: str, *, activation: str = SOFTMAX) -> Any:
    """Turns outputs of a known kind into probabilities of the same shape and mask."""
    if kind != LOGITS:
        return outputs
    probabilities = ops.softmax(outputs) if activation == SOFTMAX else ops.sigmoid(outputs)
    return _with_mask(probabilities, getattr(outputs, "_keras_mask", None))


def _with_mask(tensor: Any, mask: Any) -> Any:
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def map_outputs(function: Any, outputs: Any) -> Any:
    """Applies `function` to every tensor, and to the logits that a softmax or sigmoid layer left on it."""

    def apply(tensor: Any) -> Any:
        mapped = function(tensor)
        if getattr(tensor, "_keras_logits", None) is not None:
            mapped._keras_logits = function(tensor._keras_logits)
        return mapped

    return keras.tree.map_structure(apply, outputs)


def structure(tree: Any) -> Any:
    """A readable picture of a nested structure, with `"*"` for each leaf."""
    return keras.tree.map_structure(lambda _: "*", tree)


def flatten_outputs(outputs: Any) -> dict[str, Any]:
    """Flattens nested outputs into a dict by path: `{"": y}`, `{"0": a, "1": b}`, `{"digit": a, "box/0": b}`."""
    if not keras.tree.is_nested(outputs):
        return {"": outputs}
    return {"/".join(str(part) for part in path): leaf for path, leaf in keras.tree.flatten_with_path(outputs)}


def pair(teacher: Any, student: Any) -> dict[str, tuple[Any, Any]]:
    """Lays the teacher's outputs beside the student's, by path.

    Raises:
        ValueError: if their structures differ.
    """
    teacher_flat, student_flat = flatten_outputs(teacher), flatten_outputs(student)
    if len(teacher_flat) == len(student_flat) == 1:
        teacher_flat = dict(zip(student_flat, teacher_flat.values(), strict=True))
    if set(teacher_flat) != set(student_flat):
        raise ValueError(
            "Teacher and student must give the same structure of outputs. "
            f"Received: teacher {structure(teacher)}, student {structure(student)}."
        )
    return {path: (teacher_flat[path], student_flat[path]) for path in student_flat}


def packed(paths: list[str], values: list[Any]) -> Any:
    """Undoes `flatten_outputs` for one output, a list or a dict; deeper nestings stay a dict by path."""
    if paths == [""]:
        return values[0]
    return list(values) if all(path.isdigit() for path in paths) else dict(zip(paths, values, strict=True))


def match(targets: Any, paths: list[str], names: list[str] | None = None) -> dict[str, Any]:
    """Lays targets or sample weights beside outputs; what is not given is None.

    Args:
        targets: nothing, one tensor, or tensors nested like the outputs, or in a dict by output name.
        paths: paths of the outputs, as `flatten_outputs` gives them.
        names: names of the outputs (`model.output_names`), in the order of `paths`.

    Raises:
        ValueError: if they do not fit.
    """
    if targets is None:
        return dict.fromkeys(paths)
    flat = flatten_outputs(targets)
    if names is not None and len(names) == len(paths):
        by_name = dict(zip(names, paths, strict=True))
        flat = {by_name.get(key, key) if key not in paths else key: value for key, value in flat.items()}
    if set(flat) <= set(paths):
        return {path: flat.get(path) for path in paths}
    if len(flat) == len(paths):  # the same number in other containers: a list of targets for a dict of outputs
        return dict(zip(paths, flat.values(), strict=True))
    raise ValueError(f"The targets do not match the outputs. Targets: {sorted(flat)}. Outputs: {sorted(paths)}.")


def shapes_agree(a: Any, b: Any) -> bool:
    """Whether two shapes can be the same, where None stands for any length."""
    return len(a) == len(b) and all(None in (x, y) or x == y for x, y in zip(a, b, strict=True))
