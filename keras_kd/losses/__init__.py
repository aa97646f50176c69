"""Distillation losses, each a `keras.losses.Loss` true to its paper."""

from typing import Any

import keras

from keras_kd.losses._features import FeatureLoss, RelationLoss
from keras_kd.losses._recommended import recommended_weight
from keras_kd.losses.base import DistillationLoss, snake_case
from keras_kd.losses.contrastive import CRDLoss
from keras_kd.losses.feature import (
    ABLoss,
    AttentionTransferLoss,
    FactorTransferLoss,
    FSPLoss,
    HintLoss,
    NSTLoss,
    VIDLoss,
)
from keras_kd.losses.relation import CorrelationLoss, PKTLoss, RKDLoss, SPLoss
from keras_kd.losses.response import DISTLoss, DKDLoss, KDLoss, MultiLevelKDLoss, NKDLoss, ResponseLoss
from keras_kd.losses.review import ReviewKDLoss

_RESPONSE = (KDLoss, DKDLoss, DISTLoss, NKDLoss, MultiLevelKDLoss)
_FEATURE = (HintLoss, AttentionTransferLoss, NSTLoss, FactorTransferLoss, VIDLoss, ABLoss, FSPLoss, ReviewKDLoss, CRDLoss)
_RELATION = (RKDLoss, SPLoss, PKTLoss, CorrelationLoss)
_BY_NAME = {snake_case(loss.__name__): loss for loss in (*_RESPONSE, *_FEATURE, *_RELATION)}


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
    is_loss = isinstance(identifier, keras.losses.Loss) or callable(getattr(identifier, "compute_loss", None))
    if is_loss and not isinstance(identifier, type):
        return identifier
    raise TypeError(
        "A distillation loss must be a loss of `keras_kd.losses` or of `keras.distillation`, a `keras.losses.Loss`, or a name. "
        f"Received: {identifier!r} of type {type(identifier).__name__}."
        + (f" Write {identifier.__name__}() for an object of the class." if isinstance(identifier, type) else "")
    )


def _from_name(name: str) -> Any:
    if loss := _BY_NAME.get(name) or _BY_NAME.get(snake_case(name)):
        return loss()
    try:
        found = keras.losses.get(name)
    except ValueError:
        found = None
    # Keras gives a function for most names, which knows no sample weights: its class does.
    classes = {snake_case(key): value for key, value in vars(keras.losses).items() if isinstance(value, type)}
    found = classes.get(getattr(found, "__name__", ""), found)
    if isinstance(found, type):
        found = found()
    if isinstance(found, keras.losses.Loss):
        return found
    raise ValueError(f"Unknown distillation loss {name!r}. Known: {', '.join(_BY_NAME)}, and the classes of `keras.losses`.")


__all__ = [
    "ABLoss",
    "AttentionTransferLoss",
    "CRDLoss",
    "CorrelationLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FSPLoss",
    "FactorTransferLoss",
    "FeatureLoss",
    "HintLoss",
    "KDLoss",
    "MultiLevelKDLoss",
    "NKDLoss",
    "NSTLoss",
    "PKTLoss",
    "RKDLoss",
    "RelationLoss",
    "ResponseLoss",
    "ReviewKDLoss",
    "SPLoss",
    "VIDLoss",
    "get",
    "recommended_weight",
]
