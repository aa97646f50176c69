"""Which ranges belong to the weights that a model has now? Those of the epoch whose weights they are, known by fingerprints."""

import hashlib
from typing import Any, NamedTuple

import keras
import numpy as np


class Epoch(NamedTuple):
    """What rounding knew while a model had certain weights.

    Args:
        limits: the ranges.
        equal: layers whose channels shared one range.
    """

    limits: np.ndarray
    equal: frozenset[str]


class Epochs:
    """The epochs of a training, by their weights: 16 bytes for each weight, and the ranges.

    Callbacks put weights of earlier epochs back (EarlyStopping), and files do (ModelCheckpoint); ranges have to follow.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[bytes, ...], Epoch] = {}

    def note(self, model: keras.Model, limits: Any, equal: set[str]) -> None:
        """Keeps the ranges that go with the weights that the model has now."""
        fingerprint = _fingerprint(model)
        self._found.pop(fingerprint, None)  # the newest stands last
        self._found[fingerprint] = Epoch(keras.ops.convert_to_numpy(limits), frozenset(equal))

    def find(self, model: keras.Model) -> Epoch | None:
        """The epoch that had exactly these weights."""
        return self._found.get(_fingerprint(model))

    def nearest(self, model: keras.Model) -> Epoch | None:
        """The epoch that shares most weights with the model, the last one among equals; None if there was none.

        Pruning may have zeroed kernels of the weights that were put back: the others tell.
        """
        present, best, most = _fingerprint(model), None, -1
        for fingerprint, epoch in self._found.items():
            same = sum(old == new for old, new in zip(fingerprint, present, strict=True))
            if same >= most:
                best, most = epoch, same
        return best


def _fingerprint(model: keras.Model) -> tuple[bytes, ...]:
    views = (np.ascontiguousarray(weight).reshape(-1).view(np.uint8) for weight in model.get_weights())
    return tuple(hashlib.blake2b(view.data, digest_size=16).digest() for view in views)
