"""Does the teacher say NaN? A check in every compiled step, and an error that one can read."""

from typing import Any

import keras
import tensorflow as tf

from keras_kd import _outputs

_NOT_FINITE = "gave NaN or infinite outputs"


class FiniteCheck:
    """Checks outputs of a teacher within compiled steps.

    It is no Keras object, so that its variable is no weight of the model which it hangs on.
    """

    def __init__(self) -> None:
        self.known = keras.Variable(True, dtype="bool", trainable=False, aggregation="only_first_replica")

    def apply(self, outputs: Any, *, name: str, jit_compile: bool) -> Any:
        """Returns the outputs, in a graph that fails when they are not finite; XLA drops assertions and notes it instead."""
        floats = [t for t in keras.tree.flatten(outputs) if t.dtype.is_floating]
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(t)) for t in floats] or [tf.constant(True)]))
        if not jit_compile:
            with tf.control_dependencies([tf.debugging.Assert(finite, [message(name)])]):
                return _outputs.map_outputs(tf.identity, outputs)
        self.known.value.assign(tf.logical_and(tf.convert_to_tensor(self.known.value), finite))
        return _outputs.map_outputs(lambda t: tf.where(finite, t, tf.zeros_like(t)), outputs)  # spares the student meanwhile

    def watched(self, function: Any, model: Any) -> Any:
        """Wraps a compiled step: what `apply` found becomes a `ValueError` that names the teacher of `model`."""

        def run(iterator: Any) -> Any:
            try:
                logs = function(iterator)
            except tf.errors.InvalidArgumentError as error:
                if _NOT_FINITE in str(error):
                    raise ValueError(message(model.teacher_name)) from None
                raise
            if model.jit_compile and not bool(keras.ops.convert_to_numpy(self.known.value)):
                self.known.value.assign(True)
                raise ValueError(message(model.teacher_name))
            return logs

        return run


def message(name: str) -> str:
    """What is wrong, and what to do."""
    return (
        f'The teacher "{name}" {_NOT_FINITE}, which the student would learn. Check its weights, its inputs '
        "(teacher_preprocessing=) and, in half precision, their range. To mask a class use -1e4, not -inf."
    )
