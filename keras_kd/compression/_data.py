"""What is compressed by which data? Arrays or batches for the training, some inputs for ranges and fits, and what scores are of."""

from typing import Any

import keras
import numpy as np

from keras_kd import _batching

CALIBRATION = 1000
_LEAST = 64


class Data:
    """Training, calibration and validation data.

    Args:
        data: arrays or an iterable of batches, as `compress` takes them.
        labels: an entry for each sample, or None.
        validation: `(x, y)`, `x` or batches; None takes a tenth of the arrays.
        batch_size: of the training on arrays.
        seed: of the split.

    Attributes:
        calibration: at most 1,000 inputs, nested as the model takes them.
        validation: inputs and labels or None, as arrays.
        has_labels: whether the training has labels.
        is_held_out: whether the validation data are a part of the training arrays.

    Raises:
        ValueError: for data that do not fit, and for labels in arrays, or of the validation, that are not finite.
    """

    def __init__(self, data: Any, labels: Any, validation: Any, batch_size: int, seed: int) -> None:
        data = _batching.as_arrays(data)
        is_array = labels is not None or _are_arrays(data)
        if not is_array and not hasattr(data, "__len__") and iter(data) is data:
            raise ValueError(
                "`data` must be arrays, or batches that can be read again, such as a tf.data.Dataset. Received: an iterator."
            )
        if validation is None and not is_array:
            raise ValueError("`validation_data` must be given with batches. Received: validation_data=None.")
        _check_finite("labels", labels)
        self._arrays = (data, labels) if is_array else None
        self._batches = data
        self._batch_size = batch_size
        self.is_held_out = validation is None
        if validation is None:
            self.validation = self._split(seed)
        else:
            pair = validation if isinstance(validation, tuple) and len(validation) == 2 else (validation, None)
            self.validation = _whole(*pair)
            _check_finite("validation_data", self.validation[1])
        found = _first(self._arrays[0], CALIBRATION) if self._arrays else _whole(self._batches, None, CALIBRATION)[0]
        self.calibration = found
        first = next(_batching.batches(*(self._arrays or (data, None)), size=1, required=False))
        self.has_labels = first[1] is not None

    def _split(self, seed: int) -> tuple[Any, Any]:
        x, y = self._arrays or (None, None)
        count = len(keras.tree.flatten(x)[0])
        if count < _LEAST:
            raise ValueError(f"`data` must have at least {_LEAST} samples. Received: {count}.")
        order = np.random.default_rng(seed).permutation(count)
        rest, held = np.sort(order[count // 10 :]), np.sort(order[: count // 10])

        def part(values: Any, rows: np.ndarray) -> Any:
            return None if values is None else keras.tree.map_structure(lambda one: np.asarray(one)[rows], values)

        self._arrays = part(x, rest), part(y, rest)
        return part(x, held), part(y, held)

    def share_of_most_frequent(self, output: tuple[int | None, ...]) -> float | None:
        """Accuracy of always saying the most frequent class of the validation labels.

        Args:
            output: shape of the first output, for which the labels are class numbers, shares of classes, or 0 and 1.

        Returns:
            The share; None without labels, for labels of one class alone, and for several answers of yes or no a sample, of which
            most are no in a good model, too.
        """
        if self.validation[1] is None:
            return None
        labels = np.asarray(keras.tree.flatten(self.validation[1])[0])
        width = output[-1] if len(output) > 1 else 1
        if width != 1 and labels.ndim == len(output) and labels.shape[-1] == width:
            if not np.allclose(labels.sum(-1), 1, atol=1e-3):
                return None
            labels = labels.argmax(-1)
        counts = np.unique(labels, return_counts=True)[1]
        return float(counts.max() / counts.sum()) if len(counts) > 1 else None

    def fit_arguments(self) -> dict[str, Any]:
        """What `fit` is given."""
        if self._arrays is None:
            return {"x": self._batches}
        x, y = self._arrays
        return {"x": x, "y": y, "batch_size": self._batch_size}

    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        if self._arrays is not None:
            return -(-len(keras.tree.flatten(self._arrays[0])[0]) // self._batch_size)
        return sum(1 for _ in self._batches)


def _are_arrays(data: Any) -> bool:
    flat = keras.tree.flatten(data) if isinstance(data, dict | list | tuple) else [data]
    return bool(flat) and all(hasattr(one, "shape") and hasattr(one, "dtype") for one in flat)


def _check_finite(name: str, labels: Any) -> None:
    for one in () if labels is None else map(np.asarray, keras.tree.flatten(_batching.as_arrays(labels))):
        if one.ndim and one.dtype.kind == "f" and not np.isfinite(one).all():
            rows = np.flatnonzero(~np.isfinite(one.reshape(len(one), -1)).all(1))
            raise ValueError(
                f"`{name}` must have finite labels. Received: NaN or infinity for {len(rows):,} of {len(one):,} samples, first for "
                f"sample {rows[0]}. Leave these samples out."
            )


def _first(x: Any, count: int) -> Any:
    return keras.tree.map_structure(lambda one: np.asarray(one[:count]), x)


def _whole(data: Any, labels: Any, most: int | None = None) -> tuple[Any, Any]:
    """Arrays of all batches, or of the first ones."""
    inputs, targets, seen = [], [], 0
    for x, y, _ in _batching.batches(data, labels, required=False):
        inputs.append(x)
        targets.append(y)
        seen += len(keras.tree.flatten(x)[0])
        if most is not None and seen >= most:
            break
    x = keras.tree.map_structure(lambda *parts: np.concatenate([np.asarray(one) for one in parts])[:most], *inputs)
    if any(one is None for one in targets):
        return x, None
    return x, keras.tree.map_structure(lambda *parts: np.concatenate([np.asarray(one) for one in parts])[:most], *targets)
