"""With which weight did the reference code train each loss?"""

from typing import Any

# Weight of the term on CIFAR-100 beside cross-entropy with weight 1: the published training scripts of RepDistiller (Tian, 2020)
# for most, those of the papers' authors for DKD, DIST, NKD, multi-level KD and ReviewKD.
_WEIGHTS = {
    "KDLoss": 0.9,  # beside 0.1 * cross-entropy
    "DKDLoss": 1.0,
    "DISTLoss": 1.0,
    "NKDLoss": 1.0,
    "MultiLevelKDLoss": 1.0,
    "HintLoss": 100.0,
    "AttentionTransferLoss": 1000.0,
    "NSTLoss": 50.0,
    "FactorTransferLoss": 200.0,
    "VIDLoss": 1.0,
    "ABLoss": 1.0,
    "FSPLoss": 50.0,
    "ReviewKDLoss": 5.0,
    "CRDLoss": 0.8,
    "RKDLoss": 1.0,
    "SPLoss": 3000.0,
    "PKTLoss": 30000.0,
    "CorrelationLoss": 0.02,
}


def recommended_weight(loss: Any) -> float:
    """The weight that a loss has in the published training code (CIFAR-100), beside cross-entropy with weight 1.

    In a `Distiller` use it with `student_loss_weight=0.5`, which weighs both sides alike. `KDLoss` is published as 0.9 beside 0.1
    times cross-entropy: weight 1 with `student_loss_weight=0.1` is the same. DKD (over 20 epochs) and ReviewKD let theirs rise
    from zero first: `keras_kd.callbacks.AnnealWeight` with `keras_kd.schedules.WarmUpValue`. On other data the best weight is
    another: take it for a start.

    Args:
        loss: a loss of this library, its class, or its name.

    Returns:
        The weight.

    Raises:
        ValueError: for a loss for which none was published.

    Example:

    >>> keras_kd.losses.recommended_weight(keras_kd.losses.SPLoss())
    3000.0

    Reference:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, 2020, and its code, RepDistiller.
    """
    from keras_kd.losses import get  # they know each other: `get` finds losses by name

    kind = type(get(loss)) if isinstance(loss, str) else loss if isinstance(loss, type) else type(loss)
    for ancestor in kind.__mro__:  # a user's subclass of ours
        if ancestor.__name__ in _WEIGHTS and ancestor.__module__.startswith("keras_kd."):
            return _WEIGHTS[ancestor.__name__]
    raise ValueError(f"No weight is published for this loss. Received: {loss!r}. Known: {', '.join(_WEIGHTS)}.")
