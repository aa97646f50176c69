"""How is one output of a teacher stored? As logits in half precision, or as the few largest log-probabilities."""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kd._outputs import LOGITS, SIGMOID, SOFTMAX, as_logits
from keras_kd.recording._shards import Field, field_of

# Rounding of a logit that may matter (float16 does it from 128 on), then of a probability, and in shares of all logits' range.
_COARSE, _SHIFTED, _LOST, _SPOILT = 0.05, 0.02, 0.01, 0.05
_ENOUGH = 4  # samples, before their range says something


class Checks(NamedTuple):
    """What `Encoding.encode` found out about a batch.

    Args:
        finite: whether all numbers are.
        fits: whether all stored numbers are finite.
        error: the largest difference that rounding made to a logit.
        shift: the largest difference that it made to a probability, were they a softmax's logits.
        low: the smallest logit.
        high: the largest logit.
    """

    finite: float
    fits: float
    error: float
    shift: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How one tensor is stored, and read again.

    Attributes:
        what: what messages call it: `output "digit"`, `layer "conv1"`.
        dtype: of the stored numbers.
        shape: of a sample as it is read: `(..., classes)`.
        given: what the teacher gave: see `output_kinds`.
        top_k: number of classes that are kept; None for all.
    """

    what: str
    dtype: str
    shape: tuple[int, ...]
    given: str | None = None
    top_k: int | None = None

    @property
    def kind(self) -> str | None:
        """What is read: probabilities have become logits."""
        return self.given and LOGITS

    @property
    def is_float(self) -> bool:
        """Whether the numbers may be rounded, and are read in float32."""
        return self.dtype in ("float16", "float32")

    @property
    def fields(self) -> list[Field]:
        """What a record holds."""
        if self.top_k is None:
            return [field_of(self.what, self.dtype, self.shape)]
        rows, classes = self.shape[:-1], self.shape[-1]
        index_dtype = "uint8" if classes <= 2**8 else "uint16" if classes <= 2**16 else "int32"
        values = self.top_k + (self.top_k < classes)  # the last is that of each of the others
        return [field_of(self.what, self.dtype, (*rows, values)), field_of(self.what, index_dtype, (*rows, self.top_k))]

    def encode(self, tensor: Any) -> tuple[list[Any], Any]:
        """What to store, and the numbers of `Checks` about it: `(6,)` in float32."""
        if not self.is_float:
            return [tensor], tf.constant([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        values = tf.cast(as_logits(tensor, self.given) if self.given else tensor, tf.float32)
        if self.given == SOFTMAX or self.top_k is not None:
            values = tf.nn.log_softmax(values)  # the shift that half precision likes best: exact near probability 1
        finite = tf.reduce_all(tf.math.is_finite(values))
        indices = []
        if self.top_k is not None:
            values, index = _largest(values, self.top_k)
            indices = [tf.cast(index, self.fields[1].dtype)]
        stored = tf.cast(values, self.dtype)
        whole = tf.cast([finite, tf.reduce_all(tf.math.is_finite(stored))], tf.float32)
        is_coarse = self.dtype == "float16" and self.given == LOGITS and self.top_k is None
        return [stored, *indices], tf.concat([whole, _losses(values, stored) if is_coarse else tf.zeros(4)], 0)

    def decode(self, stored: list[Any]) -> Any:
        """Undoes `encode` for a batch of any size."""
        if not self.is_float:
            return stored[0]
        values = tf.cast(stored[0], tf.float32)
        return values if self.top_k is None else _spread(values, tf.cast(stored[1], tf.int32), self.top_k, self.shape)


def encoding_of(what: str, tensor: Any, *, dtype: str, kind: str | None = None, top_k: int | None = None) -> Encoding:
    """How to store a tensor of a batch.

    Raises:
        ValueError: if `top_k` does not fit it.
    """
    shape = tuple(tensor.shape)[1:]
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
    field_of(f"the teacher's {what}", tensor.dtype, shape)
    if top_k is not None:
        if kind == SIGMOID:
            raise ValueError(
                f"`top_k` is for classes that exclude each other. Received: top_k={top_k} for the teacher's {what}, which is a "
                "sigmoid. Leave top_k=None."
            )
        if kind is None or not is_float:
            raise ValueError(
                f"`top_k` needs an output that is known to be logits or softmax. Received: top_k={top_k} for the teacher's {what}, "
                "which may be anything. End the model with a Dense or Softmax layer, or leave top_k=None."
            )
        if not shape or not 1 <= top_k <= shape[-1]:
            raise ValueError(
                f"`top_k` must be between 1 and the number of classes. Received: top_k={top_k} for the teacher's {what} of shape "
                f"{shape}."
            )
    return Encoding(what, dtype if is_float else tensor.dtype.name, shape, kind if is_float else None, top_k)


def _losses(values: Any, stored: Any) -> Any:
    """The last four numbers of `Checks`."""
    rounded = tf.cast(stored, tf.float32)
    shift = tf.nn.softmax(values) - tf.nn.softmax(rounded) if values.shape.rank > 1 else tf.zeros(1)
    return tf.stack([
        tf.reduce_max(tf.abs(values - rounded)), tf.reduce_max(tf.abs(shift)), tf.reduce_min(values), tf.reduce_max(values),
    ])  # fmt: skip


class Rounding:
    """Watches what half precision does to logits, batch by batch.

    Logits up to 64 lose at most 0.016, which is nothing. Beyond, it depends: a large number beside small ones may be coarse, as
    may a regression's; a large number that all logits have in common leaves nothing of their differences.
    """

    def __init__(self) -> None:
        self.warned = False
        self.low, self.high, self.samples = math.inf, -math.inf, 0

    def check(self, encoding: Encoding, checks: Checks, samples: int, where: str, *, stacklevel: int) -> None:
        """Warns once, or raises a `ValueError` if next to nothing is left of the logits."""
        self.low, self.high, self.samples = min(self.low, checks.low), max(self.high, checks.high), self.samples + samples
        if not checks.error > _COARSE:
            return
        lost, fix = checks.error / max(self.high - self.low, checks.error), 'Record with dtype="float32".'
        found = f"logits from {self.low:.6g} to {self.high:.6g}, rounded by up to {checks.error:.2g}, for {where}"
        if lost > _SPOILT and encoding.shape[-1:] != (1,) and self.samples >= _ENOUGH:
            raise ValueError(
                f"The teacher's {encoding.what} loses too much in float16, whose steps grow with the numbers. "
                f"Received: {found}. {fix}"
            )
        if not self.warned and (checks.shift > _SHIFTED or (lost > _LOST and self.samples >= _ENOUGH)):
            self.warned = True
            warnings.warn(
                f"The teacher's {encoding.what} loses accuracy in float16, whose steps grow with the numbers: {found}. {fix}",
                stacklevel=stacklevel + 1,
            )


def _largest(log_probabilities: Any, k: int) -> tuple[Any, Any]:
    """The k largest, and after them what each other class gets of the rest; and the classes of the k."""
    classes = log_probabilities.shape[-1]
    values, index = tf.math.top_k(log_probabilities, k)
    if k == classes:
        return values, index
    # Not 1 - sum: that loses a rest below 1e-7.
    others = _scatter(tf.reshape(log_probabilities, (-1, classes)), tf.reshape(index, (-1, k)), tf.float32.min)
    rest = tf.reduce_logsumexp(others, axis=-1) - math.log(classes - k)
    return tf.concat([values, tf.reshape(rest, (*tf.unstack(tf.shape(values))[:-1], 1))], axis=-1), index


def _spread(values: Any, index: Any, k: int, shape: tuple[int, ...]) -> Any:
    """Full logits of `(batch, *shape)`: the kept ones, and the rest for all others."""
    classes = shape[-1]
    rows = tf.reshape(values, (-1, values.shape[-1]))  # (rows, k or k + 1)
    others = tf.repeat(rows[:, -1:], classes, axis=-1)
    full = _scatter(others, tf.reshape(index, (-1, k)), rows[:, :k])
    return tf.reshape(full, (values.shape[0] or -1, *shape))


def _scatter(rows: Any, index: Any, values: Any) -> Any:
    """Sets `rows[i, index[i, j]]`."""
    first = tf.broadcast_to(tf.range(tf.shape(rows)[0])[:, None], tf.shape(index))
    where = tf.stack([first, index], axis=-1)  # (rows, k, 2)
    return tf.tensor_scatter_nd_update(rows, where, tf.broadcast_to(values, tf.shape(index)))
