"""A frozen teacher computes batch normalisation inside its convolutions, and nobody sees a difference."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd.teachers import FrozenTeacher
from keras_kd.teachers._folding import find_pairs

X = np.random.default_rng(0).normal(size=(5, 8, 8, 3))


def stirred(model):
    """Gives every weight a random value: fresh batch statistics would hide a mistake."""
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.3, 1.5, weight.shape) for weight in model.get_weights()])
    return model


def net(**options):
    inputs = keras.Input((8, 8, 3), dtype="float64")
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv", **options)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(scale=False, center=False, epsilon=0.1, name="second")(x)
    return stirred(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.parametrize("compiled", [False, True, "xla"])
def test_outputs_and_features_are_those_of_the_model(compiled):
    model = net()
    teacher = FrozenTeacher(model)
    assert len(teacher._pairs) == 2

    def run(x):
        return teacher(x, ["norm", "second"])

    outputs, features = (tf.function(run, jit_compile=compiled == "xla") if compiled else run)(tf.constant(X))
    twin = keras.Model(model.input, [model.output, model.get_layer("norm").output, model.get_layer("second").output])
    for seen, truth in zip((outputs, features["norm"], features["second"]), twin(X), strict=True):
        np.testing.assert_allclose(seen, truth, rtol=1e-12, atol=1e-12)


def test_a_convolution_that_a_loss_looks_at_gives_its_own_output():
    model = net(use_bias=False)
    outputs, features = FrozenTeacher(model)(tf.constant(X), ["conv"])
    np.testing.assert_allclose(features["conv"], model.get_layer("conv")(X), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(outputs, model(X), rtol=1e-12, atol=1e-12)


def test_nested_models_are_folded_too_and_the_model_keeps_no_trace():
    inner = net()
    model = keras.Sequential([keras.Input((8, 8, 3)), inner, layers.Dense(3)])
    teacher, before = FrozenTeacher(model), {layer.name: sorted(vars(layer)) for layer in inner.layers}
    assert len(teacher._pairs) == 2
    np.testing.assert_allclose(teacher(tf.constant(X))[0], model(X), rtol=1e-12, atol=1e-12)
    assert {layer.name: sorted(vars(layer)) for layer in inner.layers} == before


def test_a_sequential_model_that_grew_by_add_is_folded():
    model = keras.Sequential()
    model.add(keras.Input((8, 8, 3)))
    for layer in (layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU(), layers.DepthwiseConv2D(3)):
        model.add(layer)
    model.add(layers.BatchNormalization(name="last"))
    stirred(model)
    assert [pair.norm.name for pair in find_pairs(model)] == [model.layers[1].name, "last"]
    np.testing.assert_allclose(FrozenTeacher(model)(tf.constant(X))[0], model(X), rtol=1e-12, atol=1e-12)


class _Forked(keras.Model):
    def __init__(self):
        super().__init__()
        self.net = net()

    def call(self, x):
        return self.net.get_layer("conv")(x)  # without the normalisation that reads it elsewhere


def _output_of_the_convolution():
    model = net()
    return keras.Model(model.input, [model.get_layer("conv").output, model.output])


def _shared():
    conv, norm = layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization()
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, norm(conv(conv(inputs))))


def _read_by_another_model():
    base = net()
    head = keras.Model(base.input, base.get_layer("conv").output)
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, [base(inputs), head(inputs)])


class _Around(layers.Layer):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return self.inner(x)


def _read_inside_a_layer():
    base = net()
    inputs = keras.Input((8, 8, 3))
    around = _Around(base.get_layer("conv"))
    around.built = True
    return keras.Model(inputs, [base(inputs), around(inputs)])


@pytest.mark.parametrize(
    "make",
    [_Forked, _read_by_another_model, _read_inside_a_layer, _output_of_the_convolution, _shared, lambda: net(activation="relu")],
)
def test_where_the_convolution_has_another_reader_or_an_activation_it_stays_as_it_is(make):
    model = make()
    expected = tf.nest.flatten(model(X))
    assert "conv" not in {pair.convolution.name for pair in find_pairs(model)}
    for seen, truth in zip(tf.nest.flatten(FrozenTeacher(model)(tf.constant(X))[0]), expected, strict=True):
        np.testing.assert_allclose(seen, truth, rtol=1e-12, atol=1e-12)


def test_half_precision_is_left_alone():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 3, dtype="mixed_float16"), layers.BatchNormalization()])
    assert find_pairs(model) == []


def test_compiled_steps_follow_weights_that_are_assigned_to_the_teacher():
    teacher, student = net(), net()
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(keras.optimizers.SGD(0.0))
    distiller.evaluate(X, verbose=0)
    teacher.set_weights(student.get_weights())
    assert distiller.evaluate(X, verbose=0, return_dict=True)["distillation_loss"] == pytest.approx(0.0, abs=1e-9)
