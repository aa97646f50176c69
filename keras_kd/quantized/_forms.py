"""What does a layer with a kernel compute, before its activation? In the form that the converter turns into integers.

Layers over one axis are written as those over two, as LiteRT has them: only so can the ranges of their channels be kept.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import layers, ops

Weight = Callable[[str], Any]  # gives a rounded kernel by its name
Between = Callable[[Any], Any]  # rounds what flows between two kernels, or between kernel and bias


def _dense(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    return _biased(layer, between(ops.matmul(x, weight("kernel"))))


def _einsum(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    product = ops.einsum(layer.equation, x, weight("kernel"))
    return product if layer.bias is None else _biased(layer, between(product))  # the converter reshapes before it adds


def _embedding(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    return ops.take(weight("embeddings"), ops.cast(x, "int32"), axis=0)


def _conv(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    x, options, flat = _widened(layer, x)
    return flat(_biased(layer, _convolved(ops.conv, x, weight("kernel"), options)))


def _depthwise(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    x, options, flat = _widened(layer, x)
    return flat(_biased(layer, _convolved(ops.depthwise_conv, x, weight("kernel"), options)))


def _separable(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    x, options, flat = _widened(layer, x)
    x = between(_convolved(ops.depthwise_conv, x, weight("depthwise_kernel"), options))
    return flat(_biased(layer, ops.conv(x, weight("pointwise_kernel"), data_format=layer.data_format)))


def _transposed(layer: Any, x: Any, weight: Weight, between: Between) -> Any:
    options = {name: getattr(layer, name) for name in ("strides", "padding", "output_padding", "dilation_rate", "data_format")}
    kernel = weight("kernel")
    if layer.rank == 2:
        return _biased(layer, ops.conv_transpose(x, kernel, **options))
    options |= {"strides": (1, *layer.strides), "dilation_rate": (1, *layer.dilation_rate)}
    if layer.output_padding is not None:
        options["output_padding"] = (0, *layer.output_padding)
    return ops.squeeze(_biased(layer, ops.conv_transpose(ops.expand_dims(x, 1), kernel[None], **options)), 1)


def _widened(layer: Any, x: Any) -> tuple[Any, dict[str, Any], Callable[[Any], Any]]:
    """Inputs and options of a convolution over two axes, and a function that takes its outputs back."""
    strides, dilation, padding = tuple(layer.strides), tuple(layer.dilation_rate), layer.padding
    if layer.rank == 1 and padding == "causal":
        x, padding = ops.pad(x, [[0, 0], [dilation[0] * (layer.kernel_size[0] - 1), 0], [0, 0]]), "valid"
    options = {"strides": strides, "dilation_rate": dilation, "padding": padding, "data_format": layer.data_format}
    if layer.rank == 2:
        return x, options, lambda outputs: outputs
    # TensorFlow wants depthwise strides that are equal in both axes; over an axis of length 1 any stride is the same.
    wide = {"strides": (strides[0], strides[0]), "dilation_rate": (1, dilation[0])}
    return ops.expand_dims(x, 1), options | wide, lambda outputs: ops.squeeze(outputs, 1)


def _convolved(operation: Callable[..., Any], x: Any, kernel: Any, options: dict[str, Any]) -> Any:
    """A convolution over two axes.

    TensorFlow writes one with a dilation as SPACE_TO_BATCH, convolution, BATCH_TO_SPACE; what follows would not be folded into it.
    As an attribute it has a dilation forwards alone, and for all kinds of processors only where it is no depthwise one; that is
    the same as a convolution with a group for each channel. Gradients are those of Keras' convolution.
    """
    if max(options["dilation_rate"]) == 1:
        return operation(x, kernel, **options)

    @tf.custom_gradient
    def dilated(x: Any, kernel: Any) -> tuple[Any, Any]:
        def gradient(upstream: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                outputs = operation(x, kernel, **options)
            return tape.gradient(outputs, (x, kernel), upstream)

        filters = kernel
        if operation is ops.depthwise_conv:
            height, width, channels, multiplier = kernel.shape
            filters = tf.reshape(kernel, (height, width, 1, channels * multiplier))
        first = options["data_format"] == "channels_first"
        outputs = tf.nn.conv2d(
            tf.transpose(x, (0, 2, 3, 1)) if first else x,
            filters,
            options["strides"],
            options["padding"].upper(),
            dilations=options["dilation_rate"],
        )
        return tf.transpose(outputs, (0, 3, 1, 2)) if first else outputs, gradient

    return dilated(x, kernel)


def _biased(layer: Any, outputs: Any) -> Any:
    if layer.bias is None:
        return outputs
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return outputs + ops.reshape(layer.bias, (1, -1) + (1,) * (len(outputs.shape) - 2))
    return outputs + ops.reshape(layer.bias, (1,) * (len(outputs.shape) - len(layer.bias.shape)) + tuple(layer.bias.shape))


class Form:
    """How layers of a class are quantised.

    Args:
        compute: function of layer, inputs, kernels by name, and what rounds between two kernels; gives the outputs before the
            activation.
        kernels: names of the kernels.
        per_channel: whether each output channel may have its own range: the converter fails where kernels are transposed.
        takes_relu: whether a ReLU after it becomes a part of it. After a transposed convolution it does only where there is a bias
            that is not zero.
    """

    def __init__(self, compute: Callable[..., Any], *kernels: str, per_channel: bool = True, takes_relu: bool = True) -> None:
        self.compute, self.kernels, self.per_channel, self.takes_relu = compute, kernels, per_channel, takes_relu

    def has_between(self, layer: Any, rank: int) -> bool:
        """Whether something is rounded between its parts, for inputs of this many axes: the converter reshapes before a bias."""
        reshapes = self.compute is _einsum or (self.compute is _dense and rank > 2)
        return len(self.kernels) > 1 or (reshapes and layer.bias is not None)

    def takes_norm(self, layer: Any, shape: Any) -> bool:
        """Whether a batch normalisation after it becomes a part of it, for inputs of this shape.

        The converter multiplies channels into kernels that have a range for each; with a length that it does not know it takes
        nothing past the axis that is put in for layers over one.
        """
        return self.per_channel and (layer.rank == 2 or shape[1] is not None)


FORMS: dict[Any, Form] = {
    layers.Dense: Form(_dense, "kernel", per_channel=False),
    layers.EinsumDense: Form(_einsum, "kernel", per_channel=False),
    layers.Embedding: Form(_embedding, "embeddings", per_channel=False),
    layers.Conv1D: Form(_conv, "kernel"),
    layers.Conv2D: Form(_conv, "kernel"),
    layers.DepthwiseConv1D: Form(_depthwise, "kernel"),
    layers.DepthwiseConv2D: Form(_depthwise, "kernel"),
    layers.SeparableConv1D: Form(_separable, "depthwise_kernel", "pointwise_kernel"),
    layers.SeparableConv2D: Form(_separable, "depthwise_kernel", "pointwise_kernel"),
    layers.Conv1DTranspose: Form(_transposed, "kernel", per_channel=False, takes_relu=False),
    layers.Conv2DTranspose: Form(_transposed, "kernel", per_channel=False, takes_relu=False),
}


def form_of(layer: Any) -> Form | None:
    """How a layer is quantised; None for classes that are not known, or that compute something of their own."""
    for kind, form in FORMS.items():
        if isinstance(layer, kind):
            own = [getattr(type(layer), name, None) is getattr(kind, name, None) for name in ("call", "convolution_op")]
            plain = all(own) and not getattr(layer, "lora_enabled", False)
            narrow = getattr(layer, "rank", 2) == 1 and layer.data_format == "channels_first"
            return form if plain and not narrow and getattr(layer, "quantization_mode", None) is None else None
    return None
