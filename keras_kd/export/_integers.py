"""What shall the numbers of a file be: floats, or which integers? Chooses, and gives the model that the converter gets."""

from typing import Any, NamedTuple

import keras

from keras_kd.callbacks import Quantization
from keras_kd.quantized import QuantizedModel
from keras_kd.quantized.model import quantized_parts, trained_with_rounding


class Prepared(NamedTuple):
    """What the converter gets.

    Attributes:
        model: the model to convert.
        mode: what its file is to be.
        measured: data on which the converter measures ranges, if it does.
        after_training: whether the model was quantised here, without training.
    """

    model: keras.Model
    mode: str
    measured: Any = None
    after_training: bool = False


def prepared(model: keras.Model, quantization: str, data: Any) -> Prepared:
    """Chooses what a file is to be, and quantises the model where that is to be done before the conversion.

    Args:
        model: a built model, or a `QuantizedModel`.
        quantization: as in `to_litert`.
        data: inputs for ranges, or None.

    Raises:
        ValueError: if the model cannot be what is asked for, or data are needed.
    """
    parts = _integers_of_parts(model)
    after_training = False
    if quantization in ("auto", "int8", "int4") and not isinstance(model, QuantizedModel):
        trained = trained_with_rounding(model)
        if trained is not None and quantization in ("auto", _integers_of(trained)):
            model = trained
        elif quantization != "auto" and data is None and quantization != parts:
            lost = (
                " If it was trained so: what `model.save` writes has no ranges, and weights that changed since have others. Save "
                "`quantization.quantized_model()` instead and export that, or give `representative_data`."
            )
            raise ValueError(
                f'quantization="{quantization}" needs `representative_data`, or a model that was trained with '
                f'callbacks.Quantization. Received: the plain model "{model.name}".{lost if trained is None else ""}'
            )
        elif quantization == "int4" and parts is None:
            model, after_training = _quantized(model, 4, data), True
    if isinstance(model, QuantizedModel):
        found = _integers_of(model)
        if quantization not in ("auto", found):
            raise ValueError(
                f'What "{model.name}" rounds makes a file of {found}. Received: quantization="{quantization}". Take "auto", or '
                "export the plain model inside, `model.model`."
            )
        return Prepared(model.with_rounded_kernels() if found == "dynamic" else model, found, None, after_training)
    if quantization == "auto":
        quantization = (parts or "float32") if data is None else "int8"
    if quantization != "int8" or data is None:
        return Prepared(model, quantization)
    if _has_loops(model):  # TensorFlow's own measuring of ranges crashes the process there
        return Prepared(_quantized(model, 8, data), "int8", None, True)
    return Prepared(model, "int8", data, True)


def _quantized(model: keras.Model, bits: int, data: Any) -> QuantizedModel:
    try:
        return Quantization(bits, calibration_data=data).quantize(model)
    except ValueError as error:
        raise ValueError(
            f'`representative_data` asks for a file of integers, which "{model.name}" cannot become: {error} Give it as '
            '`check_data`, and take quantization="float32", "float16" or "dynamic".'
        ) from error


def _integers_of_parts(model: keras.Model) -> str | None:
    """What the quantised models inside of a plain one ask for; None if there are none."""
    found = set() if isinstance(model, QuantizedModel) else {_integers_of(part) for part in quantized_parts(model)}
    return "int8" if len(found) > 1 else next(iter(found), None)


def _integers_of(model: QuantizedModel) -> str:
    """What file a quantised model makes."""
    plan = model.plan
    if any(bits > 8 for bits in plan.bits.values()) or plan.activation_bits not in (None, 8):
        raise ValueError(
            "LiteRT has kernels of up to 8 bits, and activations of 8. Received: a model of kernels of "
            f"{', '.join(str(bits) for bits in sorted(set(plan.bits.values())))} bits and activations of {plan.activation_bits}."
        )
    if plan.activation_bits is None:
        return "dynamic"
    return "int4" if plan.bits and max(plan.bits.values()) <= 4 else "int8"


def _has_loops(model: keras.Model) -> bool:
    return any(isinstance(layer, keras.layers.RNN) and not layer.unroll for layer in model._flatten_layers())


def has_nibbles(model: keras.Model) -> bool:
    """Whether kernels have 4 bits or fewer: TensorFlow's converter ends the whole process where it is to make these sparse."""
    parts = [model] if isinstance(model, QuantizedModel) else quantized_parts(model)
    return any(bits <= 4 for part in parts for bits in part.plan.bits.values())
