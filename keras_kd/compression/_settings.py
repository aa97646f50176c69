"""What may be asked of a compression? Checks the arguments, and turns them into what is kept."""

import math
import numbers
import re
from typing import Any

from keras_kd.compression._data import Data

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1_000_000, "kib": 1024, "mib": 1 << 20}


def bytes_of(budget: Any) -> int | str:
    """A number of bytes, or a share as text, "20%".

    Args:
        budget: the number, or text with a unit.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is not above 0, or the unit is not known.
    """
    if isinstance(budget, str):
        parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*|%)\s*", budget)
        if parts is not None and parts[2] == "%" and 0 < float(parts[1]) <= 100:
            return f"{float(parts[1]):.15g}%"  # one text for one share
        if parts is None or parts[2].lower() not in _UNITS:
            raise ValueError(
                f'`budget` must be bytes, as 100000, "100KB", "98KiB" or "1.5MB", or a share up to "100%". Received: '
                f'budget="{budget}".'
            )
        budget = float(parts[1]) * _UNITS[parts[2].lower()]
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f'`budget` must be a number of bytes, or text such as "100KB". Received: budget={budget!r}.')
    if not 1 <= float(budget) < math.inf:
        raise ValueError(f'`budget` must be at least 1 byte; "20%" is a share. Received: budget={budget!r}.')
    return int(float(budget))


def check_settings(max_trials: Any, max_minutes: Any, epochs: Any, batch_size: Any, learning_rate: Any, seed: Any) -> None:
    """Raises a ValueError for numbers out of range: see `compress`."""
    whole = (("max_trials", max_trials, 0), ("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0))
    for name, value, least in whole:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}. Received: {name}={value!r}.")
    for name, value in (("max_minutes", max_minutes), ("learning_rate", learning_rate)):
        if value is None and name == "max_minutes":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise ValueError(f"`{name}` must be a number above 0. Received: {name}={value!r}.")


def checked_model(model: Any) -> Any:
    """The model that is compressed: of a Distiller, its student. Raises as surgery does for models that it refuses."""
    from keras_kd.surgery import find_groups

    model = getattr(model, "student", model)
    find_groups(model)  # says what is wrong with models that surgery refuses
    return model


def loss_of(models: tuple[Any, ...], loss: Any, data: Data) -> Any:
    """The loss that was given, or the first one that a model was compiled with."""
    if loss is not None and not data.has_labels:
        raise ValueError("`labels` must be given with `loss`. Received: labels=None.")
    known = [loss, *(getattr(model, "loss", None) for model in models)]
    return next((one for one in known if one is not None), None) if data.has_labels else None
