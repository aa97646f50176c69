"""What does quantisation have to know of a layer or an operation? Whether integers keep its values, round them, or cannot do it."""

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from keras_kd.quantized._forms import form_of
from keras_kd.quantized._quantizers import FIXED_RANGES

# KERNEL: see `_forms`. NORM: a factor and an addend. RELU: a part of what comes before, if that is all that it reads.
# CARRIER: gives values that it got. POOL: gives values within the range that it got. JOINT: inputs and output share one range.
# GATE: x * sigmoid(x). FIXED: the range of the output is LiteRT's. OPERATION: any other that works on integers. FLOAT: none.
KERNEL, NORM, RELU, CARRIER, POOL = "kernel", "norm", "relu", "carrier", "pool"
JOINT, GATE, FIXED, OPERATION, FLOAT = "joint", "gate", "fixed", "operation", "float"

_CLASSES: dict[str, tuple[Any, ...]] = {
    CARRIER: (
        *(layers.Flatten, layers.Reshape, layers.Permute, layers.RepeatVector, layers.Identity, layers.ActivityRegularization),
        *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.GaussianNoise, layers.GaussianDropout),
        *(layers.AlphaDropout, layers.MaxPooling1D, layers.MaxPooling2D, layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D),
        *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.Cropping1D, layers.Cropping2D, layers.UpSampling1D),
    ),
    POOL: (layers.AveragePooling1D, layers.AveragePooling2D),
    JOINT: (layers.Concatenate, layers.Maximum, layers.Minimum),
    OPERATION: (
        *(layers.Add, layers.Subtract, layers.Multiply, layers.LeakyReLU, layers.PReLU),
        *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D),
    ),
    FIXED: (layers.Softmax,),
}
_FUNCTIONS = {
    "linear": CARRIER,
    **dict.fromkeys(("relu", "relu6"), RELU),
    **dict.fromkeys(FIXED_RANGES, FIXED),
    "silu": GATE,
    **dict.fromkeys(("leaky_relu", "gelu", "hard_silu", "exponential"), OPERATION),
}
# Nodes of a Functional model that are no layers: `a + b`, `keras.ops.relu(a)`.
_OPERATIONS = {
    **dict.fromkeys(("Add", "Subtract", "Multiply", "LeakyRelu", "Gelu", "HardSilu"), OPERATION),
    **dict.fromkeys(("Relu", "Relu6"), RELU),
    **dict.fromkeys(("Reshape", "Transpose", "Squeeze", "ExpandDims"), CARRIER),
    **dict.fromkeys(("Concatenate", "Maximum", "Minimum"), JOINT),
    **dict.fromkeys(("Sigmoid", "Tanh", "Softmax"), FIXED),
    "Silu": GATE,
}
FOLLOWED_BY_RELU = {"Add", "Subtract", "Multiply"}  # LiteRT computes them and a ReLU as one


def kind_of(layer: Any) -> str:
    """The kind of a layer, or of an operation of a Functional model."""
    if not isinstance(layer, layers.Layer):
        return _OPERATIONS.get(type(layer).__name__, FLOAT)
    if form_of(layer) is not None:
        return KERNEL
    if type(layer) is layers.BatchNormalization:
        return NORM if layer.axis in (-1, layer.input_spec.ndim - 1) else FLOAT
    if type(layer) is layers.Rescaling:
        return NORM
    if type(layer) is layers.ReLU:
        return RELU if not layer.negative_slope and not layer.threshold and layer.max_value in (None, 6) else FLOAT
    if type(layer) is layers.Activation:
        return function_kind(layer.activation)
    if type(layer) is layers.UpSampling2D:
        return CARRIER if layer.interpolation == "nearest" else POOL if layer.interpolation == "bilinear" else FLOAT
    return next((kind for kind, classes in _CLASSES.items() if type(layer) in classes), FLOAT)


def function_kind(function: Any) -> str:
    """The kind of an activation function, which may be a layer."""
    if isinstance(function, layers.Layer):
        return RELU if kind_of(function) == RELU else FLOAT
    return _FUNCTIONS.get(function_name(function), FLOAT)


def function_name(function: Any) -> str:
    """The name of an activation function of Keras or TensorFlow; an empty one for any other."""
    if function is None:
        return "linear"
    name = getattr(function, "__name__", "")
    return name if function in (getattr(keras.activations, name, None), getattr(tf.nn, name, None)) else ""


def fixed_name(layer: Any) -> str:
    """The name of the function, for the kind FIXED."""
    activation = getattr(layer, "activation", None)
    return function_name(activation) if activation is not None else type(layer).__name__.lower()
