"""Which smaller models are there? Ways to spend a share of the work, each without any training."""

from collections.abc import Callable
from typing import Any

from keras_kd import surgery

Way = Callable[[Any, float, Any, bool], Any]


def channels(model: Any, share: float, data: Any, together: bool) -> Any:
    """Fewer channels."""
    how = True if together else "layers"
    return surgery.prune_channels(model, parameters=share, data=data, reconstruct=how, verbose=0)


def rank(model: Any, share: float, data: Any, together: bool) -> Any:
    """Thinner layers, two in the place of one."""
    thin = surgery.factorize(model, macs=share, data=data)
    return surgery.reconstruct(thin, model, data, verbose=0) if together else thin


def both(model: Any, share: float, data: Any, together: bool) -> Any:
    """Fewer channels, and then thinner layers."""
    half = surgery.prune_channels(model, parameters=share**0.5, data=data, reconstruct="layers", verbose=0)
    thin = surgery.factorize(half, macs=share**0.5, data=data)
    return surgery.reconstruct(thin, model, data, verbose=0) if together else thin


WAYS: dict[str, Way] = {"channels": channels, "channels and rank": both, "rank": rank}
