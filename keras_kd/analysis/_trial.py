"""How good is a model with one thing changed? Its accuracy and loss on batches that are kept."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _calls, _taps
from keras_kd.analysis import _arguments


class Trial:
    """Accuracy and loss of a model with one thing changed."""

    def __init__(self, model: keras.Model, batches: list[Any], task: _arguments.Task) -> None:
        self.model, self.batches, self.task = model, batches, task
        for _, y, _ in batches:
            task.check(y)
        self.samples = sum(len(keras.tree.flatten(x)[0]) for x, _, _ in batches)
        self.plain = self._compiled(None)
        self.changed: tuple[str, Any] | None = None
        self.accuracy, self.mean = self._measured(self.plain)
        if not np.isfinite(self.mean):
            raise ValueError(f"The loss must be finite. Received: {self.mean}. Look at `labels` and `loss`.")

    def _compiled(self, name: str | None) -> Any:
        """A function that sums losses and counts right answers, with the output of one call mapped."""
        leaves = _calls.find_leaves(self.model)
        path, _, index = (name or "").rpartition(":") if name and name not in leaves else (name, "", "0")

        def mapped(matrix: Any, shift: Any) -> Callable[..., Any]:
            count = 0

            def function(call: Any, *args: Any, **kwargs: Any) -> Any:
                nonlocal count
                result = call(*args, **kwargs)
                count += 1
                if count - 1 != int(index):
                    return result
                given = next(one for one in keras.tree.flatten(result) if tf.is_tensor(one))
                wide = given.dtype if given.dtype.size >= 4 else tf.float32
                made = tf.tensordot(tf.cast(given, wide), tf.cast(matrix, wide), 1) + tf.cast(shift, wide)
                return keras.tree.map_structure(lambda one: tf.cast(made, one.dtype) if one is given else one, result)

            return function

        @tf.function(reduce_retracing=True, autograph=False)
        def run(x: Any, y: Any, matrix: Any, shift: Any) -> tuple[Any, Any]:
            if path is None:
                outputs = self.model(x, training=False)
            else:
                with _taps.replace(leaves[path], mapped(matrix, shift)):
                    outputs = self.model(x, training=False)
            total = tf.reduce_sum(tf.cast(self.task.loss(y, outputs), "float32")) if self.task.loss else tf.zeros(())
            scores = keras.tree.flatten(outputs)
            if not self.task.kind or len(scores) != 1 or scores[0].shape.rank != 2:
                return total, tf.constant(-1, "int64")
            return total, _right(scores[0], y, self.task)

        return run

    def _measured(self, run: Any, matrix: Any = None, shift: Any = None) -> tuple[float | None, float]:
        nothing = tf.zeros(())
        given = [nothing if one is None else tf.constant(one, "float64") for one in (matrix, shift)]
        total, right = 0.0, 0
        for x, y, _ in self.batches:
            one = run(x, keras.tree.map_structure(tf.convert_to_tensor, y), *given)
            total, right = total + float(one[0]), right + int(one[1])
        return right / self.samples if right >= 0 else None, total / self.samples

    def with_channels(self, name: str, matrix: np.ndarray, shift: np.ndarray) -> tuple[float | None, float]:
        """With the output of a call mapped."""
        if self.changed is None or self.changed[0] != name:
            self.changed = name, self._compiled(name)
        return self._measured(self.changed[1], matrix, shift)

    def with_kernel(self, layer: Any, kernel: np.ndarray) -> tuple[float | None, float]:
        """With another kernel, which is put back afterwards."""
        former = ops.convert_to_numpy(layer.kernel)
        try:
            layer.kernel.assign(kernel.astype(former.dtype))
            return self._measured(self.plain)
        finally:
            layer.kernel.assign(former)


def _right(scores: Any, y: Any, task: _arguments.Task) -> Any:
    """Number of right answers: the highest score, or the side of a single one's middle."""
    labels = tf.argmax(y, -1) if task.kind == "rows" else tf.reshape(tf.cast(y, "int64"), (-1,))
    binary = scores.shape[-1] == 1
    said = tf.cast(tf.reshape(scores, (-1,)) > task.middle, "int64") if binary else tf.argmax(scores, -1)
    return tf.reduce_sum(tf.cast(said == labels, "int64"))
