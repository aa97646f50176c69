"""How does a model compute as integers would? Runs it with rounded kernels and activations, and follows their ranges."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kd import _taps
from keras_kd.quantized import _kinds, _quantizers
from keras_kd.quantized._forms import form_of
from keras_kd.quantized._plan import Plan, Spot, match_leaves


@keras.saving.register_keras_serializable(package="keras_kd")
class Ranges(keras.layers.Layer):
    """The ranges of activations, as weights, so that checkpoints hold them.

    Args:
        count: number of ranges.
    """

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"trainable": False, "dtype": "float32"})
        self.count = count
        options: dict[str, Any] = {"initializer": "zeros", "trainable": False, "aggregation": "mean"}
        self.limits = self.add_weight(shape=(count, 2), name="limits", **options)
        self.updates = self.add_weight(shape=(), name="updates", **options)
        self.built = True

    def load_own_variables(self, store: Any) -> None:
        """Takes the ranges of a file; one that was written without rounding has none, and they stay what they are."""
        if len(store.keys()):
            super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        return super().get_config() | {"count": self.count}


class Rounding:
    """Runs the layers of a model by a plan.

    Args:
        model: the model.
        plan: what is rounded in it.
        ranges: the layer that holds the ranges.
        momentum: how much of a range stays at each update; the first ones are plain means.
    """

    def __init__(self, model: keras.Model, plan: Plan, ranges: Ranges, momentum: float = 0.9) -> None:
        self.model, self.plan, self.ranges, self.momentum = model, plan, ranges, momentum
        self.leaves = match_leaves(model, plan)
        self.forms = {path: form for path in plan.bits if (form := form_of(self.leaves[path])) is not None}
        self.equal: set[str] = set()  # layers whose channels share one range, since few values of theirs are to stay few

    @property
    def is_begun(self) -> bool:
        """Whether any range has been measured."""
        return bool(ops.convert_to_numpy(self.ranges.updates) > 0)

    @contextlib.contextmanager
    def active(self, *, update: bool = False, freeze: bool = False) -> Iterator[None]:
        """While the context is open, calls of the model in this thread round.

        Args:
            update: whether the ranges follow the activations.
            freeze: whether batch normalisation uses, and keeps, its moving statistics, also in training.
        """
        passage = _Pass(self, update, freeze)
        with contextlib.ExitStack() as stack:
            for path, layer in self.leaves.items():
                if (stand_in := passage.stand_in(path, layer)) is not None:
                    stack.enter_context(_taps.replace(layer, stand_in))
            for layer in self._inner_norms() if freeze else ():
                stack.enter_context(_taps.replace(layer, _in_inference))
            yield
        if update:
            passage.store()

    def _inner_norms(self) -> list[Any]:
        """Batch normalisations inside of layers that are taken as a whole, such as `TimeDistributed`."""
        leaves = {id(layer) for layer in self.leaves.values()}
        layers = self.model._flatten_layers(include_self=False)
        return [each for each in layers if isinstance(each, keras.layers.BatchNormalization) and id(each) not in leaves]

    def rounded_kernel(self, path: str, name: str) -> Any:
        """A kernel as integers would hold it, with a leading axis of one for convolutions over one axis."""
        layer, bits = self.leaves[path], self.plan.bits[path]
        variable = _variable(layer, name)
        kernel = tf.cast(tf.convert_to_tensor(variable._value), tf.float32)  # `value` would be cast to the compute dtype first
        if not self.forms[path].per_channel:
            return _quantizers.round_kernel(kernel, bits, "tensor")
        mode = "equal" if path in self.equal else "channel"
        kernel = kernel[None] if layer.rank == 1 else kernel
        if name == "depthwise_kernel" or isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D):
            height, width, channels, multiplier = shape = kernel.shape
            flat = tf.reshape(kernel, (height, width, 1, channels * multiplier))
            return tf.reshape(_quantizers.round_kernel(flat, bits, mode), shape)
        return _quantizers.round_kernel(kernel, bits, mode)

    def round_kernels(self) -> None:
        """Gives the model's kernels their rounded values."""
        for path, form in self.forms.items():
            for name in form.kernels:
                variable = _variable(self.leaves[path], name)
                variable.assign(tf.reshape(self.rounded_kernel(path, name), variable.shape))


class _Pass:
    """What a thread does in one context."""

    def __init__(self, rounding: Rounding, update: bool, freeze: bool) -> None:
        self.rounding, self.plan, self.update, self.freeze = rounding, rounding.plan, update, freeze
        self.calls: collections.Counter[str] = collections.Counter()
        self.graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self.old = [tf.unstack(pair) for pair in tf.unstack(tf.convert_to_tensor(rounding.ranges.limits))]
        self.now = list(self.old)
        self.seen: dict[int, tuple[Any, Any]] = {}  # extremes in this pass
        self.bits = self.plan.activation_bits or 8
        if update:
            updates = tf.convert_to_tensor(rounding.ranges.updates)
            self.rate = tf.maximum(1.0 - rounding.momentum, 1.0 / (updates + 1.0))

    def store(self) -> None:
        """Writes the ranges that this pass has seen."""
        self.rounding.ranges.limits.assign(
            tf.stack([tf.stack(pair) for pair in self.now]) if self.now else self.rounding.ranges.limits
        )
        self.rounding.ranges.updates.assign(self.rounding.ranges.updates + 1.0)

    def stand_in(self, path: str, layer: Any) -> Any:
        """A function that a layer's call is replaced by; None if it stays as it is."""
        spots, freezes = self.plan.spots[path], self.freeze and isinstance(layer, keras.layers.BatchNormalization)
        active = [spot.kind == _kinds.KERNEL or spot.kind == _kinds.GATE or bool(_numbers(spot)) for spot in spots]
        if not any(active) and not freezes:
            return None

        def function(call: Any, *args: Any, **kwargs: Any) -> Any:
            spot = spots[self.calls[path] % len(spots)]
            self.calls[path] += 1
            if freezes:
                kwargs["training"] = False
            if not args and "inputs" in kwargs:
                args = (kwargs.pop("inputs"),)
            return self.rounded(self.compute(path, layer, spot, call, self.rounded_inputs(args, spot), kwargs), spot.output)

        return function

    def rounded_inputs(self, args: Any, spot: Spot) -> Any:
        """The arguments, with those rounded that nobody has rounded before."""
        if not any(number is not None for number in spot.inputs):
            return args
        numbers = iter(spot.inputs)
        return keras.tree.map_structure(lambda one: self.rounded(one, next(numbers)) if tf.is_tensor(one) else one, args)

    def compute(self, path: str, layer: Any, spot: Spot, call: Any, args: Any, kwargs: Any) -> Any:
        """What the layer gives, before its output is rounded."""
        if spot.kind == _kinds.KERNEL:
            return self.with_kernel(path, layer, spot, args[0])
        if spot.kind == _kinds.NORM and "product" in spot.inner:
            return self.norm(layer, spot, call, args, kwargs)
        if spot.kind == _kinds.GATE and spot.output is not None:
            return _gated(args[0], self.bits)
        return call(*args, **kwargs)

    def with_kernel(self, path: str, layer: Any, spot: Spot, x: Any) -> Any:
        """A layer with rounded kernels."""

        def weight(name: str) -> Any:
            return ops.cast(self.rounding.rounded_kernel(path, name), layer.compute_dtype)

        linear = self.rounding.forms[path].compute(
            layer, x, weight, lambda between: self.rounded(between, spot.inner.get("between"))
        )
        linear = self.rounded(linear, spot.inner.get("linear"))
        activation = getattr(layer, "activation", None)
        if "linear" in spot.inner and _kinds.function_kind(activation) == _kinds.GATE:
            return _gated(linear, self.bits)
        return linear if activation is None else activation(linear)

    def norm(self, layer: Any, spot: Spot, call: Any, args: Any, kwargs: Any) -> Any:
        """A normalisation that no convolution takes in, or a rescaling: a product and a sum, both of integers."""
        x = args[0]
        factor, addend = _factor_and_addend(layer)
        rounded_factor, rounded_addend = (ops.cast(_quantizers.round_constant(one, self.bits), x.dtype) for one in (factor, addend))
        product = x * rounded_factor
        rounded = self.rounded(product, spot.inner["product"])
        if (
            kwargs.get("training") and layer.trainable and layer.weights
        ):  # the statistics of the batch, and the error of the rounding
            return call(*args, **kwargs) + tf.stop_gradient(rounded - product)
        return rounded + rounded_addend

    def rounded(self, x: Any, number: int | None) -> Any:
        """Rounds an activation to one of the ranges, which may follow it first."""
        if number is None or not (tf.is_tensor(x) and x.dtype.is_floating):
            return x
        if number in self.plan.fixed:
            return _with_logits_of(x, _quantizers.round_tensor(x, *self.plan.fixed[number], self.bits))
        if self.update and (self.graph is None or tf.compat.v1.get_default_graph() is self.graph):
            self.follow(x, number)
        low, high = self.now[number]
        return _with_logits_of(x, _quantizers.round_tensor(x, low, high, self.bits))

    def follow(self, x: Any, number: int) -> None:
        """Moves a range towards the extremes of a batch."""
        low, high = _quantizers.extremes(x)
        if number in self.seen:  # several tensors share it
            low, high = tf.minimum(low, self.seen[number][0]), tf.maximum(high, self.seen[number][1])
        self.seen[number] = low, high
        finite = tf.math.is_finite(low) & tf.math.is_finite(high)  # an overflow of half precision must not stay
        moved = [old + (new - old) * self.rate for old, new in zip(self.old[number], (low, high), strict=True)]
        self.now[number] = [tf.where(finite, new, old) for old, new in zip(self.old[number], moved, strict=True)]


def _in_inference(call: Any, *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs | {"training": False})


def _with_logits_of(x: Any, rounded: Any) -> Any:
    """The rounded tensor, with the logits that Keras' losses look for on outputs of softmax and sigmoid."""
    logits = getattr(x, "_keras_logits", None)
    if logits is not None:
        with contextlib.suppress(AttributeError):
            rounded._keras_logits = logits
    return rounded


def _numbers(spot: Spot) -> list[int]:
    return [number for number in (*spot.inputs, spot.output, *spot.inner.values()) if number is not None]


def _factor_and_addend(layer: Any) -> tuple[Any, Any]:
    if isinstance(layer, keras.layers.Rescaling):
        return tf.constant(layer.scale, tf.float32), tf.constant(layer.offset, tf.float32)
    factor = ops.rsqrt(layer.moving_variance + layer.epsilon) * (layer.gamma if layer.scale else 1.0)  # (channels,)
    return factor, (layer.beta if layer.center else 0.0) - layer.moving_mean * factor


def _gated(x: Any, bits: int) -> Any:
    """x * sigmoid(x), with the sigmoid as LiteRT has it."""
    return x * _quantizers.round_tensor(ops.sigmoid(x), *_quantizers.FIXED_RANGES["sigmoid"], bits)


def _variable(layer: Any, name: str) -> Any:
    """The Keras variable of a kernel; some layers hold it under a name with an underscore."""
    variable = getattr(layer, f"_{name}", None)
    return getattr(layer, name) if variable is None else variable
