"""Which channels of its original does a model still have? Known of models made by surgery, as long as they are in memory.

A saved Keras model has no place for it: its file holds the constructors' arguments and the weights of its layers, and what else
hangs on a model is lost. The losses of a saved Distiller hold their share, as indices.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

Masks = Mapping[str, np.ndarray]  # by layer, True for each channel of the original's output that is still there

_SPEAKERS: Any = weakref.WeakKeyDictionary()  # of each recording, the model that it is of
_ANCESTORS: Any = weakref.WeakKeyDictionary()  # of each model: the models that it was made from, the nearest first, and masks


def remember(model: Any, original: Any, masks: Masks) -> None:
    """Says that `model` was made from `original`, and so from all that this one was made from."""
    ancestors = [(weakref.ref(original), dict(masks))]
    for older, former in _ANCESTORS.get(original, ()):
        ancestors.append((older, {name: _composed(former[name], mask) for name, mask in masks.items() if name in former}))
    _ANCESTORS[model] = ancestors


def masks_between(model: Any, original: Any) -> Masks | None:
    """Which channels of `original` a model has; None if it was not made from it."""
    if original is None:  # as ancestors are that nobody holds any more
        return None
    return next((masks for ancestor, masks in _ANCESTORS.get(model, ()) if ancestor() is original), None)


def remember_speaker(recording: Any, model: Any) -> None:
    """Says whose answers a recording holds."""
    _SPEAKERS[recording] = weakref.ref(model)


def speaker_of(recording: Any) -> Any:
    """The model that was recorded, as long as it is in memory; else None."""
    speaker = _SPEAKERS.get(recording)
    return None if speaker is None else speaker()


def masks_from_first(model: Any) -> Masks | None:
    """Which channels it has of the model that the first surgery was on; None without surgery."""
    ancestors = _ANCESTORS.get(model)
    return ancestors[-1][1] if ancestors else None


def _composed(former: np.ndarray, mask: np.ndarray) -> np.ndarray:
    composed = np.zeros_like(former)
    composed[np.flatnonzero(former)[mask]] = True
    return composed
