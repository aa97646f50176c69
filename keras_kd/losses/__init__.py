"""Distillation losses, each a `keras.losses.Loss` true to its paper."""

from typing import Any

import keras

from keras_kd.losses.base import DistillationLoss, snake_case
from keras_kd.losses.response import DISTLoss, DKDLoss, KDLoss, MultiLevelKDLoss, NKDLoss, ResponseLoss

_BY_NAME = {snake_case(loss.__name__): loss for loss in (KDLoss, DKDLoss, DISTLoss, NKDLoss, MultiLevelKDLoss)}


def get(identifier: Any) -> Any:
    """Finds a distillation loss.

    Args:
        identifier: a loss object, which is returned as it is; or the name of a loss of this library (`"KDLoss"`, `"kd_loss"`)
            or of Keras (`"mean_squared_error"`), built with its defaults.

    Returns:
        A loss object.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything that is not a name or a loss.

    Example:

    >>> keras_kd.losses.get("kd_loss").temperature
    4.0
    """
    if isinstance(identifier, str):
        return _from_name(identifier)
    if isinstance(identifier, keras.losses.Loss) or callable(getattr(identifier, "compute_loss", None)):
        return identifier
    raise TypeError(
        "A distillation loss must be a loss of `keras_kd.losses` or of `keras.distillation`, a `keras.losses.Loss`, or a name. "
        f"Received: {identifier!r} of type {type(identifier).__name__}."
    )


def _from_name(name: str) -> Any:
    if loss := _BY_NAME.get(name) or _BY_NAME.get(snake_case(name)):
        return loss()
    # By its class name, since `keras.losses.get("mean_squared_error")` gives a function, which knows no sample weights.
    found = getattr(keras.losses, "".join(part.title() for part in name.split("_")) if name.islower() else name, None)
    if isinstance(found, type) and issubclass(found, keras.losses.Loss) and found is not keras.losses.Loss:
        return found()
    raise ValueError(f"Unknown distillation loss {name!r}. Known: {', '.join(_BY_NAME)}, and the classes of `keras.losses`.")


__all__ = ["DISTLoss", "DKDLoss", "DistillationLoss", "KDLoss", "MultiLevelKDLoss", "NKDLoss", "ResponseLoss", "get"]
