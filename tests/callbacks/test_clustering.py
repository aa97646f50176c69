"""Clustering: few distinct values after every step, TF-MOT's gradients, zeros that stay, no trace afterwards."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import _tfmot, callbacks
from keras_kd.callbacks import clustering
from tests.conftest import classifier, two_devices

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 4)).astype("float32"), RNG.integers(0, 3, size=32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def distinct(weight):
    return len(np.unique(np.asarray(weight)))


class Watch(keras.callbacks.Callback):
    """The number of distinct values and of zeros of a kernel after every batch."""

    def __init__(self):
        super().__init__()
        self.values, self.zeros = [], []

    def on_train_batch_end(self, batch, logs=None):
        kernel = np.asarray(getattr(self.model, "student", self.model).layers[0].kernel)
        self.values.append(distinct(kernel))
        self.zeros.append(float(np.mean(kernel == 0)))


def test_the_nearest_centroid_is_that_of_brute_force():
    weights, centroids = RNG.normal(size=(7, 9)).astype("float32"), np.sort(RNG.normal(size=6)).astype("float32")
    expected = np.abs(weights[..., None] - centroids).argmin(-1)
    np.testing.assert_array_equal(clustering._nearest(tf.constant(weights), tf.constant(centroids)), expected)


def test_under_sgd_weights_and_centroids_move_by_tf_mots_gradients():
    config = _tfmot.load_part("clustering.keras.cluster_config").GradientAggregation.AVG
    x, y, rate = RNG.normal(size=(16, 5)), RNG.normal(size=(16, 6)), 0.05
    kernel = layers.Dense(6, use_bias=False, dtype="float64")
    model = keras.Sequential([keras.Input((5,)), kernel])
    model.compile(keras.optimizers.SGD(rate), "mse")
    hidden = tf.Variable(kernel.kernel.numpy())
    callback = callbacks.Clustering(4, cluster_centroids_init="linear")
    centroids = tf.Variable(callback.first_centroids(hidden.numpy()))
    algorithm = _tfmot.load_part("clustering.keras.clustering_algorithm").ClusteringAlgorithm(centroids, config)
    for _ in range(5):
        with tf.GradientTape() as tape:
            clustered = algorithm.get_clustered_weight(algorithm.get_pulling_indices(hidden), hidden)
            loss = tf.reduce_mean((tf.matmul(x, clustered) - y) ** 2)
        for variable, gradient in zip((hidden, centroids), tape.gradient(loss, (hidden, centroids)), strict=True):
            variable.assign_sub(rate * gradient)
    expected = tf.gather(centroids, algorithm.get_pulling_indices(hidden))
    model.fit(x, y, batch_size=16, epochs=5, verbose=0, callbacks=[callback])
    np.testing.assert_allclose(kernel.kernel, expected, atol=1e-7)  # the first centroids are float32 in TF-MOT


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ({}, {}),
        ({}, {"run_eagerly": True}),
        ({}, {"jit_compile": True}),
        ({}, {"steps_per_execution": 4}),
        ({"use_ema": True, "ema_momentum": 0.9}, {}),
        ({"weight_decay": 0.1}, {}),
        ({"gradient_accumulation_steps": 2}, {}),
    ],
    ids=str,
)
def test_a_kernel_holds_few_values_after_every_step_and_after_fit(optimizer, options):
    model, watch = classifier(16), Watch()
    model.compile(keras.optimizers.AdamW(0.05, **optimizer), LOSS, **options)
    before = model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, batch_size=4, epochs=6, verbose=0, callbacks=[callbacks.Clustering(5), watch])
    assert max(watch.values) <= 5
    assert min(watch.values) >= 3
    assert all(distinct(layer.kernel) <= 5 for layer in model.layers)
    assert all(layer.kernel.constraint is None for layer in model.layers)
    assert model.evaluate(X, Y, verbose=0) < before


@pytest.mark.parametrize("init", clustering._INITS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("preserve", [False, True])
def test_every_initialiser_serves_weights_of_any_size(init, scale, preserve):
    weights = (RNG.normal(size=(40, 30)) * scale).astype("float32")
    weights[RNG.random(weights.shape) < 0.5] = 0
    callback = callbacks.Clustering(8, cluster_centroids_init=init, preserve_sparsity=preserve)
    found = callback.first_centroids(weights)
    assert found.shape == (8,)
    assert np.all(np.isfinite(found))
    assert np.all(np.diff(found) >= 0)
    assert distinct(found) >= 5
    assert np.abs(found).max() <= 1.05 * np.abs(weights).max()
    assert not preserve or 0 in found


@pytest.mark.parametrize("init", clustering._INITS)
def test_an_initialiser_may_be_written_as_by_tf_mot(init):
    member = _tfmot.load().clustering.keras.CentroidInitialization[init.upper()]
    for given in (init.upper(), member):
        assert callbacks.Clustering(4, cluster_centroids_init=given).cluster_centroids_init == init


def test_a_later_fit_goes_on_from_the_clusters_that_it_finds():
    model = classifier(16)
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Clustering(4)])
    clustered = model.layers[0].kernel.numpy()
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Clustering(4, cluster_centroids_init="random")])
    np.testing.assert_array_equal(model.layers[0].kernel, clustered)


@pytest.mark.parametrize("order", ["pruning first", "clustering first"])
@pytest.mark.parametrize("distilling", [False, True])
def test_zeros_of_pruning_stay_zero_and_are_one_of_the_values(order, distilling, teacher):
    model, watch = classifier(16), Watch()
    trained = keras_kd.Distiller(teacher, model) if distilling else model
    trained.compile(keras.optimizers.Adam(0.02), LOSS)
    both = [callbacks.Pruning(0.75), callbacks.Clustering(6, preserve_sparsity=True)]
    both = both if order == "pruning first" else both[::-1]
    trained.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[*both, watch])
    assert max(watch.values) <= 6
    assert min(watch.zeros) >= 0.75
    assert all(distinct(layer.kernel) <= 6 for layer in model.layers)
    assert all(np.mean(np.asarray(layer.kernel) == 0) >= 0.74 for layer in model.layers)
    assert all(layer.kernel.constraint is None for layer in model.layers)


def test_two_devices_cluster_as_one():
    found = {}
    for name, strategy in (("one", tf.distribute.get_strategy()), ("two", two_devices())):
        with strategy.scope():
            keras.utils.set_random_seed(3)
            model = classifier(16)
            model.compile(keras.optimizers.SGD(0.1), LOSS)
            model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[callbacks.Clustering(5)])
        found[name] = model.layers[0].kernel.numpy()
    assert distinct(found["two"]) <= 5
    np.testing.assert_allclose(found["two"], found["one"], atol=1e-5)


def test_clusters_beside_a_mask_without_preserve_sparsity_are_warned_of():
    model = classifier(16)
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="preserve_sparsity=True"):
        model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.5), callbacks.Clustering(4)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: callbacks.Clustering(1), "at least 2. Received: number_of_clusters=1"),
        (lambda: callbacks.Clustering(4, cluster_centroids_init="best"), "one of kmeans_plus_plus, linear"),
        (lambda: callbacks.Clustering(4, cluster_centroids_init=None), "Received: cluster_centroids_init=None"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_clusters_than_weights_are_an_error_or_leave_the_kernel_alone():
    model = classifier(16)  # kernels of 64 and 48 weights
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"number_of_clusters=100 for .*shape \(4, 16\)"):
        model.fit(X, Y, verbose=0, callbacks=[callbacks.Clustering(100)])
    with pytest.warns(UserWarning, match=r"number_of_clusters=50 for .*shape \(16, 3\).*stay as they are"):
        model.fit(X, Y, verbose=0, callbacks=[callbacks.Clustering(50)])
    assert distinct(model.layers[1].kernel) == 48


def test_zero_is_one_of_the_values_of_a_kernel_that_was_clustered_without():
    weights = np.repeat(np.array([1.0, 2.0, 3.0, 4.0], "float32"), 5)
    found = callbacks.Clustering(4, preserve_sparsity=True, cluster_centroids_init="linear").first_centroids(weights)
    assert len(found) == 4
    assert 0 in found


def test_half_precision_counts_large_clusters():
    kernel = layers.Dense(1000, use_bias=False, dtype="bfloat16")
    model = keras.Sequential([keras.Input((10,)), kernel])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(np.ones((4, 10)), np.ones((4, 1000)), verbose=0, callbacks=[callbacks.Clustering(2, cluster_centroids_init="linear")])
    clustered = clustering._Clustered.__new__(clustering._Clustered)
    clustered.callback = callbacks.Clustering(2)
    mean = clustered._mean_update(tf.ones((10000,), tf.bfloat16), tf.zeros((10000,), tf.int32))
    np.testing.assert_array_equal(tf.cast(mean, tf.float32), [1.0, 0.0])


def test_a_step_holds_nothing_larger_than_the_kernel():
    kernel = layers.Dense(300, use_bias=False)
    model = keras.Sequential([keras.Input((200,)), kernel])
    model.compile("sgd", "mse")
    sizes = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            step = tf.function(kernel.kernel.constraint).get_concrete_function(tf.zeros((200, 300)))
            outputs = [output.shape for op in step.graph.get_operations() for output in op.outputs]
            sizes.extend(int(np.prod(shape)) for shape in outputs if shape.is_fully_defined())

    x, y = np.ones((8, 200), "float32"), np.ones((8, 300), "float32")
    model.fit(x, y, verbose=0, callbacks=[callbacks.Clustering(64, cluster_centroids_init="linear"), Look()])
    assert max(sizes) == 200 * 300  # TF-MOT's holds 64 times that


def test_memory_of_a_whole_fit_does_not_grow_with_the_clusters():
    script = """
import os, resource
import keras, numpy as np, keras_kd

def growth(init):
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000, use_bias=False)])
    model.compile("sgd", "mse", jit_compile=False)
    x, y = np.ones((8, 1000), "float32"), np.ones((8, 1000), "float32")
    model.fit(x, y, verbose=0, callbacks=[keras_kd.callbacks.Clustering(2, cluster_centroids_init=init)])
    model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(1000, 1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.fit(x, y, verbose=0, callbacks=[keras_kd.callbacks.Clustering(128, cluster_centroids_init=init)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

for init in ("kmeans_plus_plus", "linear"):  # a process each, for each has one highest mark; one import for both
    if os.fork() == 0:  # TensorFlow is imported, and has not started its threads yet
        try:
            print("grown", growth(init), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""
    unit = 1 if sys.platform == "darwin" else 1024
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = [int(line.split()[1]) * unit for line in done.stdout.splitlines() if line.startswith("grown")]
    assert len(grown) == 2, done.stderr
    assert max(grown) < 0.25 * 4 * 1000 * 1000 * 128  # a quarter of weights x clusters
