"""What computes as integers would? A Keras model around another one, to be evaluated, saved, loaded and exported."""

import contextlib
import weakref
from typing import Any

import keras
import numpy as np

from keras_kd.quantized._copying import copy_model, finalize_states
from keras_kd.quantized._epochs import Epochs
from keras_kd.quantized._plan import Plan
from keras_kd.quantized._rounding import Ranges, Rounding

__all__ = ["QuantizedModel", "copy_model", "finalize_states", "quantized_parts", "remember", "trained_with_rounding"]


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedModel(keras.Model):
    """A model whose kernels and activations are rounded as its training with `callbacks.Quantization` rounded them.

    ```
    w' = round(w / s) s,  s = max|w| / (2^(bits - 1) - 1)           kernels: for each channel of a convolution, else for all
    x' = (clip(round(x / s) + z, 0, 2^bits - 1) - z) s              activations: s and z from the trained range
    ```

    `Quantization.quantized_model()` makes it. It computes in float what the integers of the exported file compute; it saves,
    loads, evaluates and trains on (with fixed ranges) like any model, and `keras_kd.export.to_litert` writes it as an int8 file.

    Args:
        model: the model. It is used as it is, not copied.
        plan: what is rounded in it, as `Quantization` found it, or the config of that.
        channels_together: paths of layers whose channels share one range.
        limits: lowest and highest value of each range, in the plan's order; None where weights are loaded afterwards.

    Call arguments:
        inputs: what `model` takes.
        training: as for `model`.

    Returns:
        What `model` gives.

    Raises:
        ValueError: if the plan names layers that the model does not have.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model.compile("adam", "mse")
    >>> quantization = keras_kd.callbacks.Quantization()
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 3)), callbacks=[quantization], verbose=0)
    >>> quantized = quantization.quantized_model()
    >>> quantized(np.ones((1, 4))).shape
    TensorShape([1, 3])

    Reference:
        Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
    """

    def __init__(self, model: keras.Model, plan: Any, channels_together: Any = (), limits: Any = None, **kwargs: Any) -> None:
        super().__init__(**{"name": f"{model.name}_quantized"} | kwargs)
        self.model = model
        self.plan = plan if isinstance(plan, Plan) else Plan.from_config(plan)
        self.channels_together = sorted(channels_together)
        self.ranges = Ranges(len(self.plan.names), name="ranges")
        if limits is not None:
            self.ranges.limits.assign(np.reshape(keras.ops.convert_to_numpy(limits), (-1, 2)))
            self.ranges.updates.assign(1.0)
        self._rounding = _Held(Rounding(model, self.plan, self.ranges))
        self._rounding.value.equal = set(self.channels_together)
        self.built = model.built

    @property
    def rounding(self) -> Rounding:
        """What rounds: `with quantized.rounding.active(): quantized.model(x)`."""
        return self._rounding.value

    @property
    def inputs(self) -> Any:
        """Symbolic inputs of the model inside; None if it has none."""
        return getattr(self.model, "inputs", None)

    @property
    def _inputs_struct(self) -> Any:
        return getattr(self.model, "_inputs_struct", self.inputs[0] if self.inputs else None)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Runs the model with rounding."""
        with self._rounding.value.active():
            masked = any(part is not None for part in keras.tree.flatten(mask))
            return self.model(inputs, training=training, **({"mask": mask} if masked else {}))

    def export(self, filepath: Any, *args: Any, input_signature: Any = None, **kwargs: Any) -> None:
        """As `keras.Model.export`; the input signature is that of the model inside, if it has one."""
        if input_signature is None and self.inputs:
            struct = self._inputs_struct
            signature = keras.tree.map_structure(lambda x: keras.InputSpec(shape=(None, *x.shape[1:]), dtype=x.dtype), struct)
            input_signature = [signature]
        super().export(filepath, *args, input_signature=input_signature, **kwargs)

    def with_rounded_kernels(self) -> keras.Model:
        """Makes a plain model whose kernels have their rounded values; its activations are not rounded."""
        plain = copy_model(self.model)
        rounding = Rounding(plain, self.plan, self.ranges)
        rounding.equal = set(self.channels_together)
        rounding.round_kernels()
        return plain

    def get_config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        model = keras.saving.serialize_keras_object(self.model)
        limits = keras.ops.convert_to_numpy(self.ranges.limits).tolist()  # a clone without them would compute zeros
        config = {"model": model, "plan": self.plan.get_config(), "channels_together": self.channels_together, "limits": limits}
        return {"name": self.name, "trainable": self.trainable} | config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "QuantizedModel":
        """The model again, with weights of its own."""
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**config | {"model": model})

    def get_build_config(self) -> dict[str, Any]:
        """Nothing: the model inside is built by its own config."""
        return {}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Nothing."""


class _Held:
    """Keeps something from Keras' tracking."""

    def __init__(self, value: Any) -> None:
        self.value = value


_TRAINED: "weakref.WeakKeyDictionary[keras.Model, tuple[Plan, Epochs]]" = weakref.WeakKeyDictionary()


def remember(model: keras.Model, plan: Plan, epochs: Epochs) -> None:
    """Keeps, for as long as the model lives, the ranges that its weights were trained with."""
    with contextlib.suppress(TypeError):  # models of users that cannot be keys
        _TRAINED[model] = plan, epochs


def trained_with_rounding(model: keras.Model) -> QuantizedModel | None:
    """The quantised model of a plain one, if its weights are those that an epoch of training with rounding left."""
    plan, epochs = _TRAINED.get(model, (None, None))
    epoch = epochs.find(model) if epochs is not None else None
    if plan is None or epoch is None:
        return None
    return QuantizedModel(model, plan, epoch.equal, epoch.limits)  # no copy: what cannot be copied can be exported


def quantized_parts(model: keras.Model) -> list[QuantizedModel]:
    """The quantised models inside a model, which round by themselves."""
    return [layer for layer in model._flatten_layers(include_self=False) if isinstance(layer, QuantizedModel)]
