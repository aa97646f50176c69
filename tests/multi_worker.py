"""What `test_devices.py` trains: in its own process, and in two, by `python -m tests.multi_worker RESULT RECORDING`."""

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_kd
from keras_kd import losses

RNG = np.random.default_rng(2)
X, Y = RNG.normal(size=(24, 6, 6, 1)).astype("float32"), RNG.integers(0, 3, size=24)
X_VAL, Y_VAL = RNG.normal(size=(11, 6, 6, 1)).astype("float32"), RNG.integers(0, 3, size=11)
BATCH = 8  # of the validation samples a batch of 3 is left, which two workers cannot share evenly


def network(width):
    """A small built classifier."""
    convolution = keras.layers.Conv2D(width, 3, activation="tanh", name="conv")
    return keras.Sequential([keras.Input((6, 6, 1)), convolution, keras.layers.Flatten(), keras.layers.Dense(3)])


def taught():
    """The teacher, the same in every process."""
    keras.utils.set_random_seed(5)
    return network(6)


def hint():
    projector = keras.layers.Dense(6)
    return losses.HintLoss(projector, teacher_layer_name="conv", student_layer_name="conv")


LOSSES = {"response": losses.KDLoss, "feature": hint, "recorded": lambda: [losses.KDLoss(), hint()]}


def dataset(x, y):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).with_options(options)


def data_of(name, recording):
    """Arguments of `fit`: a data set, arrays, or a recording."""
    if name == "recorded":
        return {"x": recording.dataset(BATCH), "validation_data": dataset(X_VAL, Y_VAL)}
    if name == "feature":
        return {"x": X, "y": Y, "batch_size": BATCH, "validation_data": (X_VAL, Y_VAL)}
    return {"x": dataset(X, Y), "validation_data": dataset(X_VAL, Y_VAL)}


def train(name, strategy, recording, *, seed=6, callbacks=()):
    """Trains, validates, evaluates and predicts; returns what came out."""
    with strategy.scope():
        teacher = recording if name == "recorded" else taught()
        keras.utils.set_random_seed(seed)
        distiller = keras_kd.Distiller(teacher, network(3), LOSSES[name](), student_loss_weight=0.4)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    settings = {"epochs": 2, "verbose": 0, "shuffle": False, "callbacks": list(callbacks)}
    found = {"history": distiller.fit(**data_of(name, recording), **settings).history}
    found["evaluation"] = distiller.evaluate(dataset(X_VAL, Y_VAL), verbose=0, return_dict=True)
    distiller.evaluate_teacher = False
    found["without teacher"] = distiller.evaluate(dataset(X_VAL, Y_VAL), verbose=0, return_dict=True)
    found["prediction"] = {"logits": np.asarray(distiller.predict(X_VAL, batch_size=BATCH, verbose=0)).tolist()}
    found["weights"] = {str(place): weight.numpy().tolist() for place, weight in enumerate(distiller.trainable_variables)}
    return found


def main(result, recording):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = strategy.cluster_resolver.task_id
    found = {"replicas": strategy.num_replicas_in_sync}
    for name in LOSSES:
        backup = keras.callbacks.BackupAndRestore(f"{result}.{name}")  # a path of its own for each worker
        # Weights that start differently in each worker: the first worker's count.
        found[name] = train(name, strategy, keras_kd.Recording(recording), seed=6 + worker, callbacks=[backup])
        print(name, flush=True)
    with open(result, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
