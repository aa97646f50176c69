"""Which smaller models are there? Ways to spend a share of the work, each without any training."""

from collections.abc import Callable
from typing import Any

from keras_kd import surgery
from keras_kd.surgery import _side_by_side, reconstruction

Way = Callable[[Any, float, Any], Any]


def channels(model: Any, share: float, data: Any) -> Any:
    """Fewer channels."""
    return surgery.prune_channels(model, parameters=share, data=data, reconstruct="layers", verbose=0)


def rank(model: Any, share: float, data: Any) -> Any:
    """Thinner layers, two in the place of one."""
    return surgery.factorize(model, macs=share, data=data, verbose=0)


def both(model: Any, share: float, data: Any) -> Any:
    """Fewer channels, and then thinner layers."""
    return rank(channels(model, share**0.5, data), share**0.5, data)


def fitted(cut: Any, model: Any, data: Any) -> Any:
    """What was cut, in place, all layers fitted together to what the model gives, as far as that is a matter of seconds."""
    reconstruction.fit_where_it_pays(cut, model, [x for x, _ in _side_by_side.samples_of(model, data, None)])
    return cut


WAYS: dict[str, Way] = {"channels": channels, "channels and rank": both, "rank": rank}
