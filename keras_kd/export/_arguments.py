"""What does every export ask of its model and numbers?"""

import math
import numbers
from typing import Any

import keras

from keras_kd.quantized._copying import copy_model


def checked_model(model: Any) -> keras.Model:
    """The model that is exported: of a Distiller, its student. Raises a TypeError or ValueError for what is none, or not built."""
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    return model


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}.")


def check_number(name: str, value: Any, highest: float) -> None:
    """Raises a TypeError for what is no number, a ValueError for one that is not from 0 to `highest`."""
    rule = "a number of 0 or more" if highest == math.inf else f"a number from 0 to {highest:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {rule}. Received: {name}={value!r} of type {type(value).__name__}.")
    if not 0 <= float(value) <= highest:
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}.")


def in_float32(model: keras.Model) -> keras.Model:
    """The model itself, or a twin of the same weights that computes in float32: LiteRT has no kernels for other precisions."""
    others = ("float16", "bfloat16", "float64")
    policies = {layer.dtype_policy.name for layer in model._flatten_layers() if layer.compute_dtype in others}
    if not policies:
        return model
    try:
        return copy_model(model, dtype="float32")
    except ValueError as error:
        raise ValueError(
            f'"{model.name}" computes in {", ".join(sorted(policies))}, LiteRT in float32, and the model cannot be rebuilt from '
            "its config in float32. Build it with the float32 policy, and set the weights."
        ) from error
