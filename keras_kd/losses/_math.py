"""Which arithmetic do the losses share, and how does it stay finite where the formula alone would not?"""

from typing import Any

import keras
import numpy as np
from keras import ops


def safe_sqrt(x: Any) -> Any:
    """Square root with gradient 0, rather than infinite, at 0."""
    above = x > 0
    return ops.where(above, ops.sqrt(ops.where(above, x, 1.0)), 0.0)


def safe_divide(x: Any, y: Any) -> Any:
    """x / y, and 0 (with gradient 0) where y is 0."""
    zero = ops.equal(y, 0)
    return ops.where(zero, ops.zeros_like(x), x / ops.where(zero, ops.ones_like(y), y))


def forward_kl(log_p: Any, log_q: Any) -> Any:
    """Terms of KL(p || q)."""
    return ops.exp(log_p) * (log_p - log_q)


def reverse_kl(log_p: Any, log_q: Any) -> Any:
    """Terms of KL(q || p)."""
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Any, log_q: Any) -> Any:
    """Terms of the mean of KL(p || m) and KL(q || m), m = (p + q) / 2."""
    log_m = ops.logaddexp(log_p, log_q) - 0.6931471805599453  # log 2
    return 0.5 * (forward_kl(log_p, log_m) + forward_kl(log_q, log_m))


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}


def standardized(z: Any) -> Any:
    """(z - mean) / (1e-7 + std) over the classes, std unbiased."""
    deviation = z - ops.mean(z, axis=-1, keepdims=True)
    std = safe_sqrt(ops.sum(deviation**2, axis=-1, keepdims=True) / (z.shape[-1] - 1))
    return deviation / (1e-7 + std)


def split_target(z: Any, y: Any) -> tuple[Any, Any, Any]:
    """log p_y, log (1 - p_y), and the log-softmax over the other classes (0 in place of y), with y one-hot."""
    log_p = ops.log_softmax(z)
    log_p_y = ops.sum(y * log_p, axis=-1)
    # -1e30, not -inf: the sum over an empty set (one class, no label) stays finite, and so do the gradients.
    log_not_y = ops.logsumexp(ops.where(y > 0, -1e30, log_p), axis=-1)
    log_q = ops.where(y > 0, 0.0, log_p - ops.expand_dims(log_not_y, -1))
    return log_p_y, log_not_y, log_q


def rows(z: Any) -> Any:
    """Flattens all axes but the last."""
    return ops.reshape(z, (-1, z.shape[-1]))  # (batch * ..., classes)


def present_rows(mask: Any, rows: Any) -> Any:
    """1 for each row that the mask keeps, else 0; shape `(rows, 1)`."""
    if mask is None:
        return ops.ones_like(rows[:, :1])
    return ops.cast(ops.reshape(mask, (-1, 1)), rows.dtype)


def pearson(a: Any, b: Any, present: Any, *, axis: int) -> Any:
    """Pearson's correlation along `axis`, over entries where `present` is 1; 0 where one side is constant."""
    (a, norm_a), (b, norm_b) = (_deviations(x, present, axis) for x in (a, b))
    return safe_divide(ops.sum(a * b, axis=axis), norm_a * norm_b)


def _deviations(x: Any, present: Any, axis: int) -> tuple[Any, Any]:
    """x - mean, and its norm along `axis`: exactly 0 where x is constant up to rounding, whose direction would be noise."""
    mean = safe_divide(ops.sum(present * x, axis=axis, keepdims=True), ops.sum(present, axis=axis, keepdims=True))
    deviation = present * (x - mean)
    squares = ops.sum(deviation**2, axis=axis)
    rounding = (10 * float(np.finfo(keras.backend.standardize_dtype(x.dtype)).eps)) ** 2 * ops.sum((present * x) ** 2, axis=axis)
    return deviation, safe_sqrt(ops.where(squares > rounding, squares, 0.0))


def l2_normalized(x: Any, *, axis: Any = -1) -> Any:
    """x / |x| along `axis`, and 0 (with gradient 0) where x is 0."""
    largest = ops.stop_gradient(ops.max(ops.abs(x), axis=axis, keepdims=True, initial=0.0))
    x = safe_divide(x, largest)  # squares neither overflow nor underflow
    return safe_divide(x, safe_sqrt(ops.sum(x**2, axis=axis, keepdims=True)))


def frobenius_norm(x: Any) -> Any:
    """Norm of a matrix, stable on large entries, with gradient 0 at 0."""
    largest = ops.stop_gradient(ops.max(ops.abs(x), initial=0.0))
    return largest * safe_sqrt(ops.sum(safe_divide(x, largest) ** 2))


def channels_first(x: Any) -> Any:
    """Flattens the positions of a map and puts them last: `(batch, channels, positions)`."""
    return ops.transpose(ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1])), (0, 2, 1))


def huber(x: Any) -> Any:
    """Smooth L1 with delta 1: x^2 / 2 within [-1, 1], |x| - 1/2 outside."""
    size = ops.abs(x)
    return ops.where(size < 1, 0.5 * x**2, size - 0.5)
