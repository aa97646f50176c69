"""What every test shares: two logical CPUs (for MirroredStrategy), seeds, small models and data."""

import functools
import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # TensorFlow's default on some CPUs only; channels first need it there

import keras
import numpy as np
import pytest
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
)


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(7)


@pytest.fixture(autouse=True, scope="module")
def _cleared():
    """Forgets the models of a module; after each test that would take longer than most tests."""
    yield
    keras.backend.clear_session()
    gc.freeze()


def pytest_collection_finish():
    """Keeps what the imports left out of each later collection of garbage, of which the LiteRT converter asks for a full one."""
    gc.collect()
    gc.freeze()


@functools.cache
def two_devices():
    """MirroredStrategy over the two logical CPUs; one for all tests of a process.

    TensorFlow numbers the collective operations of every new strategy from the same start, and fails where other shapes went under
    these numbers before.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def classifier(width=8, *, classes=3, activation=None, features=4, name=None, **kwargs):
    """A small built classifier on vectors of 4 features."""
    return keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(width, activation="tanh"),
            keras.layers.Dense(classes, activation=activation, **kwargs),
        ],
        name=name,
    )


def convolutional(widths=(4, 6), *, classes=4, size=8, norm=False, name=None, activation=None):
    """A small built classifier of (size, size, 1) images with layers "conv1", "conv2" (half the size), "pool" and "head"."""
    first, second = widths
    return keras.Sequential(
        [
            keras.Input((size, size, 1)),
            keras.layers.Conv2D(first, 3, padding="same", activation="relu", name="conv1"),
            *([keras.layers.BatchNormalization(name="norm")] if norm else []),
            keras.layers.Conv2D(second, 3, strides=2, padding="same", name="conv2"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(classes, activation=activation, name="head"),
        ],
        name=name,
    )


@pytest.fixture
def teacher():
    return classifier(16, name="teacher")


@pytest.fixture
def student():
    return classifier(5, name="student")


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    return rng.normal(size=(24, 4)).astype("float32"), rng.integers(0, 3, size=24)


class KilledError(Exception):
    """What `KillAtEpoch` raises."""


class KillAtEpoch(keras.callbacks.Callback):
    """Ends a `fit` before its third epoch, as a machine that fails would."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KilledError
