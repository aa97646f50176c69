"""What does a Keras 3 model need to train on several devices or machines? Cures for what `fit` does wrong there."""

from typing import Any

import keras
import tensorflow as tf


def is_multi_worker(strategy: Any) -> bool:
    """Whether several processes train together (MultiWorkerMirroredStrategy with a TF_CONFIG of several workers)."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.extended._in_multi_worker_mode()


def logs_of_step(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs as the trainer can reduce them over workers: Keras 3 averages over an axis that scalars do not have."""
    if not is_multi_worker(tf.distribute.get_strategy()):
        return logs
    return keras.tree.map_structure(lambda value: tf.expand_dims(tf.convert_to_tensor(value), 0), logs)


def symbolic_build(model: keras.Model, iterator: Any, data_batch: Any) -> bool:
    """Builds what a model needs before its first step from the shapes of a batch.

    Keras averages the batch over the replicas to see its shapes, which fails for shares of different size and for several workers.

    Returns:
        Whether it did; False without a strategy, where Keras builds nothing beforehand.
    """
    if model._distribute_strategy is None:
        return False
    strategy = model.distribute_strategy
    if iterator is not None:
        data_batch = next(next(step for _, _, step in iterator))
    first = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], data_batch)
    with strategy.scope():
        model._symbolic_build(data_batch=first)
    return True


def check_scope(model: keras.Model) -> None:
    """Raises a `ValueError` for a model and an optimizer that were not made under one strategy: Keras fails in the first step."""
    strategy = getattr(model.optimizer, "_distribution_strategy", None)
    if strategy is None:
        return
    outside = [v.path for v in model.trainable_variables if not strategy.extended.variable_created_in_scope(v.value)]
    if outside:
        raise ValueError(
            "The student, the Distiller and its optimizer must be made under the same strategy. Received: weights made elsewhere "
            f"than the optimizer: {', '.join(outside[:4])}{', ...' if len(outside) > 4 else ''}. Write all of them, and compile, "
            "inside one `with strategy.scope():`."
        )


def build_optimizer(optimizer: keras.Optimizer, variables: list[Any]) -> None:
    """Makes an optimizer's slots before the graph of a step: inside, TensorFlow guards each one by a branch, slow to trace.

    Under a strategy the optimizer makes them itself, in the scope that it was made in.
    """
    if not optimizer.built and not tf.distribute.has_strategy():
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(variables)


def batch_size(x: Any) -> Any:
    """Number of samples of a batch, as a tensor."""
    return tf.shape(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))[0]


def across_replicas(value: Any) -> Any:
    """Undoes the division by the number of replicas that Keras applies to losses, for the logs."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return value * replicas if replicas > 1 else value
