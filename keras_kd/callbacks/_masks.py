"""Which weights go at a given sparsity? TF-MOT's mask rules as tensor functions, without its full sort and for more shapes.

Every mask is 1 for weights that stay and 0 for those that go, in the dtype of the weights.
"""

import math
from typing import Any

import tensorflow as tf


def kth_largest(values: Any, k: Any, *, xla: bool = False) -> Any:
    """Finds the k-th largest of non-negative numbers without sorting them, exactly.

    The bits of non-negative floats order as the floats do. A histogram of the upper half of the bits finds the bin of the k-th
    number, and one of the lower half within that bin the number itself: two passes over the data. XLA has no fast histogram; there
    the bits are found one by one.

    Args:
        values: tensor of shape `(n,)`, not negative.
        k: rank, in [1, n].
        xla: whether XLA compiles this.

    Returns:
        The value, a scalar of the same dtype.
    """
    if values.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        return tf.gather(tf.sort(values, direction="DESCENDING"), k - 1)
    bits = tf.bitcast(tf.abs(tf.cast(values, tf.float32)), tf.int32)
    found = _by_bisection(bits, k) if xla else _by_histogram(bits, k)
    return tf.cast(tf.bitcast(found, tf.float32), values.dtype)


def _by_bisection(bits: Any, k: Any) -> Any:
    found = tf.constant(0)
    for place in range(30, -1, -1):
        trial = found | (1 << place)
        found = tf.where(tf.reduce_sum(tf.cast(bits >= trial, tf.int32)) >= k, trial, found)
    return found


def _by_histogram(bits: Any, k: Any) -> Any:
    halves = tf.bitwise.right_shift(bits, 16)
    upper, k = _bin_of_kth(halves, k, 1 << 15)
    lower, _ = _bin_of_kth(tf.where(tf.equal(halves, upper), bits & 0xFFFF, -1) + 1, k, (1 << 16) + 1)  # bin 0: other halves
    return tf.bitwise.left_shift(upper, 16) | (lower - 1)


def _bin_of_kth(bins: Any, k: Any, count: int) -> tuple[Any, Any]:
    """The bin that holds the k-th largest entry, and its rank within the bin."""
    from_above = tf.cumsum(tf.math.bincount(bins, minlength=count, maxlength=count), reverse=True)
    found = tf.reduce_sum(tf.cast(from_above >= k, tf.int32)) - 1
    above = tf.where(found + 1 < count, from_above[tf.minimum(found + 1, count - 1)], 0)
    return found, k - above


def count_kept(size: int, sparsity: Any) -> Any:
    """How many of `size` weights stay, at least one: rounded in float32, as TF-MOT does."""
    kept = tf.round(tf.cast(size, tf.float32) * (1 - tf.cast(sparsity, tf.float32)))
    return tf.cast(tf.maximum(kept, 1), tf.int32)


def magnitude_masks(weights: list[Any], sparsity: Any, *, block_size: Any, pooling: str, together: bool, xla: bool) -> list[Any]:
    """Masks that keep the largest magnitudes.

    Args:
        weights: tensors.
        sparsity: share of the entries (or blocks) that go.
        block_size: `(rows, columns)` of the blocks that go or stay as one, over the last two axes.
        pooling: how a block's magnitude is made: "AVG" or "MAX".
        together: whether all tensors share one threshold, instead of one for each.
        xla: whether XLA compiles this.
    """
    pooled = [pooled_magnitudes(weight, block_size, pooling) for weight in weights]
    flat = [tf.reshape(one, [-1]) for one in pooled]
    if together:
        flat = [tf.concat([tf.cast(one, flat[0].dtype) for one in flat], 0)]
    thresholds = [kth_largest(one, count_kept(one.shape[0], sparsity), xla=xla) for one in flat]
    thresholds = thresholds * len(weights) if together else thresholds
    kept = [one >= tf.cast(limit, one.dtype) for one, limit in zip(pooled, thresholds, strict=True)]
    return [expanded(one, weight, block_size) for one, weight in zip(kept, weights, strict=True)]


def threshold_masks(weights: list[Any], threshold: float, *, block_size: Any, pooling: str) -> list[Any]:
    """Masks that keep magnitudes (or blocks of them) of at least `threshold`."""
    kept = [pooled_magnitudes(weight, block_size, pooling) >= tf.cast(threshold, weight.dtype) for weight in weights]
    return [expanded(one, weight, block_size) for one, weight in zip(kept, weights, strict=True)]


def pooled_magnitudes(weight: Any, block_size: Any, pooling: str) -> Any:
    """Magnitudes of the blocks over the last two axes, shape `(..., blocks down, blocks across)`; 1x1 blocks are the weights."""
    magnitudes = tf.abs(weight)
    if tuple(block_size) == (1, 1):
        return magnitudes
    rows, columns = weight.shape[-2:]
    height, width = block_size
    down, across = math.ceil(rows / height), math.ceil(columns / width)

    # TF-MOT pools a matrix with padding on both sides and lays the mask from the first row and column on: where blocks do not fill
    # the matrix, magnitude and mask are a little apart. A matrix gets the same masks here; other kernels are padded at the end.
    missing = (down * height - rows, across * width - columns)
    before = [pad // 2 if len(weight.shape) == 2 else 0 for pad in missing]
    padding = [[first, pad - first] for first, pad in zip(before, missing, strict=True)]

    def blocks(tensor: Any) -> Any:
        padded = tf.pad(tensor, [[0, 0], *padding])
        return tf.reshape(padded, (-1, down, height, across, width))

    magnitudes = blocks(tf.reshape(magnitudes, (-1, rows, columns)))
    if pooling == "MAX":
        pooled = tf.reduce_max(magnitudes, axis=(2, 4))
    else:  # blocks at the edge are averaged over what is there
        pooled = tf.reduce_sum(magnitudes, axis=(2, 4)) / tf.reduce_sum(
            blocks(tf.ones((1, rows, columns), weight.dtype)), axis=(2, 4)
        )
    return tf.reshape(pooled, (*weight.shape[:-2], down, across))


def expanded(kept: Any, weight: Any, block_size: Any) -> Any:
    """Gives each weight the value of its block, in the dtype of the weight."""
    mask = tf.cast(kept, weight.dtype)
    if tuple(block_size) == (1, 1):
        return mask
    mask = tf.repeat(tf.repeat(mask, block_size[0], axis=-2), block_size[1], axis=-1)
    return mask[..., : weight.shape[-2], : weight.shape[-1]]


def m_by_n_mask(weight: Any, zeros: Any, size: int) -> Any:
    """Zeroes the `zeros` smallest of every `size` consecutive weights along the input channels, the axis before the last.

    Args:
        weight: kernel of shape `(..., inputs, outputs)`.
        zeros: how many go in each group, a number or a scalar tensor.
        size: length of a group; the last group may be shorter and counts as filled up with zeros.
    """
    inputs = weight.shape[-2]
    groups = math.ceil(inputs / size)
    rows = tf.linalg.matrix_transpose(tf.abs(weight))  # (..., outputs, inputs)
    rows = tf.pad(rows, [[0, 0]] * (len(weight.shape) - 1) + [[0, groups * size - inputs]])
    rows = tf.reshape(rows, (*rows.shape[:-1], groups, size))
    order = tf.math.top_k(rows, k=size).indices  # the first of equals comes first
    rank = tf.argsort(order, axis=-1)
    mask = tf.reshape(tf.cast(rank < size - zeros, weight.dtype), (*rows.shape[:-2], groups * size))
    return tf.linalg.matrix_transpose(mask[..., :inputs])
