"""A profile counts weights, multiplications and memory as brute force does, and measures files and time."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import export, profile
from tests.conftest import classifier


def sequential(shape, *parts, **options):
    return keras.Sequential([keras.Input(shape, **options), *parts])


def macs_of(model, **options):
    return profile.profile(model, runs=1, **options).macs


def macs_by_tensorflow(model):
    """Half of the float operations of products and convolutions that TensorFlow's own profiler counts."""
    specs = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    graph = tf.function(lambda *x: model(list(x) if len(x) > 1 else x[0], training=False)).get_concrete_function(*specs).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    found = tf.compat.v1.profiler.profile(graph, options=options)
    kinds = {node.name: node.type for node in graph.get_operations()}

    def total(node):
        own = node.float_ops if kinds.get(node.name, "") in COUNTED else 0
        return own + sum(total(child) for child in node.children)

    return total(found) // 2


COUNTED = {"MatMul", "BatchMatMulV2", "Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3D"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: sequential((7,), layers.Dense(5)), 7 * 5),
        (lambda: sequential((3, 7), layers.Dense(5)), 3 * 7 * 5),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, strides=2)), 4 * 4 * 6 * 3 * 3 * 4),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, padding="same", groups=2)), 81 * 6 * 9 * 2),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, dilation_rate=2)), 25 * 6 * 9 * 4),
        (lambda: sequential((9, 4), layers.Conv1D(6, 3)), 7 * 6 * 3 * 4),
        (lambda: sequential((5, 5, 5, 2), layers.Conv3D(3, 2)), 64 * 3 * 8 * 2),
        (lambda: sequential((9, 9, 4), layers.DepthwiseConv2D(3, depth_multiplier=2)), 49 * 8 * 9),
        (lambda: sequential((9, 9, 4), layers.SeparableConv2D(6, 3)), 49 * 4 * 9 + 49 * 4 * 6),
        (lambda: sequential((5, 5, 4), layers.Conv2DTranspose(6, 3, strides=2)), 25 * 9 * 4 * 6),
        (lambda: sequential((5, 8), layers.EinsumDense("abc,cd->abd", (5, 3))), 5 * 8 * 3),
        (lambda: sequential((6, 3), layers.LSTM(4)), 6 * (3 * 16 + 4 * 16)),
        (lambda: sequential((6, 3), layers.GRU(4)), 6 * (3 * 12 + 4 * 12)),
        (lambda: sequential((6, 3), layers.Bidirectional(layers.SimpleRNN(4))), 2 * 6 * (3 * 4 + 4 * 4)),
        (lambda: sequential((8, 8, 3), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(2)), 0),
    ],
)
def test_multiplications_are_those_of_the_formula(model, expected):
    assert macs_of(model()) == expected


def test_attention_counts_its_products_with_the_scores():
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs))
    projections, scores = 4 * 6 * 8 * 8, 2 * (6 * 6 * 2 * 4)
    assert macs_of(model) == projections + scores


def convolutional():
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="first")(inputs)
    y = layers.DepthwiseConv2D(3, padding="same", name="spatial")(x)
    x = layers.Add(name="add")([x, layers.Conv2D(8, 1, name="point")(layers.ReLU(name="relu")(y))])
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten(name="flat")(x)))


@pytest.mark.parametrize("make", [convolutional, lambda: classifier(9), lambda: sequential((6, 4), layers.Conv1D(3, 2))])
def test_multiplications_are_those_of_tensorflows_profiler(make):
    model = make()
    assert macs_of(model) == macs_by_tensorflow(model) > 0


def test_shared_nested_and_subclassed_layers_are_counted_at_every_call():
    shared, inputs = layers.Dense(4, name="shared"), keras.Input((4,))
    inner = keras.Model(inputs, shared(shared(inputs)), name="inner")

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = inner
            self.scale = self.add_weight(shape=(4, 2), name="scale")

        def call(self, x):
            return tf.matmul(self.inner(x), self.scale)

    model = Outer()
    model(np.ones((2, 4), "float32"))
    found = profile.profile(model, runs=1)
    rows = {layer.path: layer for layer in found.layers}
    assert rows["inner/shared"].macs == 2 * 16
    assert rows["(between layers)"].macs == 8
    assert rows["(model)"].parameters == 8
    assert found.macs == 40
    assert sum(layer.parameters for layer in found.layers) == found.parameters == 28


def test_what_loops_hide_is_named():
    model = sequential((6, 3), layers.TimeDistributed(layers.Dense(4), name="each"), layers.Flatten(), layers.Dense(2))
    found = profile.profile(model, runs=1)
    assert found.uncounted == ("each",)
    assert found.macs == 48
    assert "not counted" in found.table()


def test_zeros_are_not_counted_among_the_nonzero_weights():
    model = classifier(5)
    kernel = model.layers[0].kernel.numpy()
    kernel[:2] = 0
    model.layers[0].kernel.assign(kernel)
    found = profile.profile(model, runs=1)
    expected = sum(np.count_nonzero(weight) for weight in model.get_weights())
    assert found.nonzero_parameters == sum(layer.nonzero_parameters for layer in found.layers) == expected
    assert found.parameters == model.count_params()


def test_memory_is_the_largest_sum_of_tensors_that_live_together():
    found = profile.profile(convolutional(), runs=1)
    image, map_ = 12 * 12 * 3 * 4, 6 * 6 * 8 * 4
    # first: image and map. spatial: its output beside the map, which the sum needs later; relu and point: one more at a time.
    assert found.peak_activation_bytes == max(image + map_, 3 * map_)
    shared = sequential((100,), layers.Reshape((10, 10)), layers.Flatten(), layers.Dropout(0.5), layers.Dense(1))
    assert profile.profile(shared, runs=1).peak_activation_bytes == 4 * (100 + 1)


def test_one_call_gives_a_dict_for_json_and_a_table_with_a_row_for_each_layer(tmp_path):
    model = convolutional()
    report = export.to_litert(model, tmp_path / "m.tflite")
    found = profile.profile(keras_kd.Distiller(convolutional(), model), report.path, runs=5, threads=2)
    loaded = json.loads(json.dumps(found.as_dict()))
    assert loaded["size"] == report.size
    assert loaded["gzip_size"] == report.gzip_size
    assert loaded["latency"]["threads"] == 2
    assert loaded["latency"]["runs"] == loaded["keras_latency"]["runs"] == 5
    assert [layer["path"] for layer in loaded["layers"]][:2] == ["first", "spatial"]
    lines = found.table().splitlines()
    for path in ("first", "spatial", "relu", "point", "add", "flat", "head"):
        assert any(line.startswith(path) for line in lines)
    assert f"{found.macs:,}" in next(line for line in lines if line.startswith("all"))
    assert "2 threads" in lines[-2]
    assert str(found) == found.table()


def test_without_a_file_there_are_no_numbers_of_one():
    found = profile.profile(classifier(3), runs=1)
    assert (found.size, found.gzip_size, found.latency) == (None, None, None)
    assert 0 < found.keras_latency.low <= found.keras_latency.median <= found.keras_latency.high


def test_unknown_lengths_are_taken_from_data_and_asked_for_without():
    model = sequential((None, 3), layers.Conv1D(2, 2, padding="same"), layers.GlobalAveragePooling1D())
    with pytest.raises(ValueError, match="unknown lengths. Received: data=None. Pass `data`"):
        profile.profile(model)
    assert macs_of(model, data=np.zeros((4, 7, 3), "float32")) == 7 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: profile.profile("model"), TypeError, "`model` must be a keras.Model"),
        (lambda: profile.profile(keras.Sequential([layers.Dense(3)])), ValueError, "`model` must be built"),
        (lambda: profile.profile(classifier(3), runs=0), ValueError, "`runs` must be at least 1. Received: runs=0"),
        (lambda: profile.profile(classifier(3), "nowhere.tflite"), FileNotFoundError, 'Received: path="nowhere.tflite"'),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
