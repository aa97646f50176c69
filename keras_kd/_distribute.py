"""What does a Keras 3 model need to train on several machines? Cures for what `fit` does wrong there."""

from typing import Any

import keras
import tensorflow as tf


def is_multi_worker() -> bool:
    """Whether several machines train together (MultiWorkerMirroredStrategy)."""
    return isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


def logs_of_step(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs as the trainer can reduce them over workers: Keras 3 takes the first entry of an axis that scalars do not have."""
    if not is_multi_worker():
        return logs
    return keras.tree.map_structure(lambda value: tf.expand_dims(tf.convert_to_tensor(value), 0), logs)


def symbolic_build(model: keras.Model, iterator: Any, data_batch: Any) -> bool:
    """Builds what a model needs before its first step from the shapes of a batch.

    Keras averages the batch over the replicas to see its shape, which fails for the values of several workers.

    Returns:
        Whether it did; False where Keras' own way works.
    """
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    if iterator is not None:
        data_batch = next(next(step for _, _, step in iterator))
    first = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], data_batch)
    with strategy.scope():
        model._symbolic_build(data_batch=first)
    return True
