"""What can be trained with rounding? Models and plans in which nothing, or not everything, can be rounded."""

import numbers
import warnings
from typing import Any

from keras_kd.quantized import _quantizers
from keras_kd.quantized import model as quantized_models
from keras_kd.quantized._plan import Plan
from keras_kd.quantized._rounding import Rounding


def check_model(model: Any, student: Any) -> None:
    """Raises a `ValueError` for what this callback does not train."""
    if (students := getattr(model, "students", None)) is not None:
        raise ValueError(
            "Quantization rounds one model. Received: a MutualDistiller of the students "
            f"{', '.join(one.name for one in students)}. Let them teach each other first, and then `fit` each with a Quantization."
        )
    if not student.built:
        raise ValueError(
            f'The model "{student.name}" is not built, so what to round is not known. Call it on a batch of data first.'
        )
    if isinstance(student, quantized_models.QuantizedModel):
        raise ValueError(
            f'"{student.name}" is quantised already: it trains with rounding, and with the ranges that it has, by itself. Leave '
            "Quantization out; or give it the plain model inside, `model.model`, to measure ranges anew."
        )
    if inner := quantized_models.quantized_parts(student):
        raise ValueError(
            f'The model "{student.name}" has parts that round by themselves, with the ranges that they have. Received: the '
            f"QuantizedModel {', '.join(one.name for one in inner)} inside. Leave Quantization out; or build with the plain model "
            "inside, `quantized.model`."
        )


def check_plan(student: Any, plan: Plan) -> None:
    """Raises a `ValueError` for a model in which nothing would be rounded."""
    if not plan.spots and plan.leaves:
        raise ValueError(
            f'No layer of "{student.name}" was seen at work: its `call` is a `tf.function`, or runs them in loops. Take '
            "`@tf.function` off, since `fit` compiles the whole step."
        )
    if not plan.bits:
        found = plan.floats or [f"{path} ({kind})" for path, kind in plan.leaves] or ["no layers"]
        raise ValueError(f'The model "{student.name}" has no layers that can be rounded. It has: {", ".join(found)}.')


def warn_of_floats(rounding: Rounding) -> None:
    """Names the layers that integers cannot compute, in one warning."""
    if rounding.plan.floats:
        warnings.warn(f"These stay in float: {', '.join(rounding.plan.floats)}.", stacklevel=3)


def check_bits(name: str, bits: Any) -> None:
    """Raises `ValueError` unless the argument of that name is a whole number from 2 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or int(bits) not in _quantizers.BITS:
        raise ValueError(f"`{name}` must be a whole number from 2 to 16. Received: {name}={bits!r}.")
