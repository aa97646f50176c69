"""What the last layers of a model say of its outputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import _outputs


class Custom(layers.Layer):
    def call(self, x):
        return x


CASES = {
    "linear": (lambda x: layers.Dense(3)(x), "logits"),
    "softmax activation": (lambda x: layers.Dense(3, activation="softmax")(x), "softmax"),
    "softmax layer as activation": (lambda x: layers.Dense(3, activation=layers.Softmax())(x), "softmax"),
    "sigmoid activation": (lambda x: layers.Dense(3, activation="sigmoid")(x), "sigmoid"),
    "Softmax layer": (lambda x: layers.Softmax()(layers.Dense(3)(x)), "softmax"),
    "Softmax over another axis": (lambda x: layers.Softmax(axis=1)(layers.Reshape((3, 1))(layers.Dense(3)(x))), None),
    "Activation": (lambda x: layers.Activation("softmax", dtype="float32")(layers.Dense(3)(x)), "softmax"),
    "TensorFlow's softmax": (lambda x: layers.Activation(tf.nn.softmax)(layers.Dense(3)(x)), "softmax"),
    "operation": (lambda x: keras.ops.softmax(layers.Dense(3)(x)), "softmax"),
    "sigmoid operation": (lambda x: keras.ops.sigmoid(layers.Dense(3)(x)), "sigmoid"),
    "log-softmax": (lambda x: keras.ops.log_softmax(layers.Dense(3)(x)), "logits"),
    "dropout after": (lambda x: layers.Dropout(0.5)(layers.Dense(3, activation="softmax")(x)), "softmax"),
    "reshape after": (lambda x: layers.Reshape((1, 3))(layers.Dense(3, activation="softmax")(x)), "softmax"),
    "batch norm": (lambda x: layers.BatchNormalization()(layers.Dense(3)(x)), "logits"),
    "sum of logits": (lambda x: layers.Add()([layers.Dense(3)(x), layers.Dense(3)(x)]), "logits"),
    "mean of softmaxes": (
        lambda x: layers.Average()([layers.Dense(3, activation="softmax")(x), layers.Dense(3, activation="softmax")(x)]),
        "softmax",
    ),
    "sum of softmaxes": (lambda x: layers.Add()([layers.Dense(3, activation="softmax")(x)] * 2), None),
    "per time step": (
        lambda x: layers.TimeDistributed(layers.Dense(3, activation="softmax"))(layers.Reshape((2, 2))(x)),
        "softmax",
    ),
    "nested": (lambda x: keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])(x), "softmax"),
    "lambda": (lambda x: layers.Lambda(lambda z: z)(layers.Dense(3)(x)), None),
    "linear activation in float32 after softmax": (
        lambda x: layers.Activation("linear", dtype="float32")(layers.Dense(3, activation="softmax")(x)),
        "softmax",
    ),
    "a model per time step": (
        lambda x: layers.TimeDistributed(keras.Sequential([keras.Input((2,)), layers.Dense(3, activation="softmax")]))(
            layers.Reshape((2, 2))(x)
        ),
        "softmax",
    ),
    "the user's own activation": (lambda x: layers.Dense(3, activation=lambda z: keras.activations.softmax(z))(x), None),
    "sparsemax": (lambda x: layers.Dense(3, activation="sparsemax")(x), None),
    "sparse sigmoid": (lambda x: layers.Dense(3, activation="sparse_sigmoid")(x), None),
    "relu": (lambda x: layers.Dense(3, activation="relu")(x), "logits"),
    "upsampling after a custom layer": (
        lambda x: layers.UpSampling1D()(Custom()(layers.Reshape((2, 2))(layers.Dense(4)(x)))),
        None,
    ),
    "a softmax by hand": (lambda x: (lambda e: e / keras.ops.sum(e, -1, keepdims=True))(keras.ops.exp(layers.Dense(3)(x))), None),
    "global pooling of a convolution": (
        lambda x: layers.GlobalAveragePooling1D()(layers.Conv1D(3, 1)(layers.Reshape((2, 2))(x))),
        "logits",
    ),
    "scaled logits": (lambda x: layers.Rescaling(0.1)(layers.Dense(3)(x)), "logits"),
    "custom layer": (lambda x: Custom()(layers.Dense(3)(x)), None),
    "the input itself": (lambda x: layers.Identity()(x), None),
}


@pytest.mark.parametrize(("build", "kind"), CASES.values(), ids=CASES)
def test_the_last_layers_tell_what_an_output_holds(build, kind):
    inputs = keras.Input((4,))
    assert _outputs.output_kinds(keras.Model(inputs, build(inputs))) == [kind]


def test_each_of_several_outputs_has_its_own_kind():
    inputs = keras.Input((4,))
    outputs = {"b": layers.Dense(2, activation="sigmoid")(inputs), "a": layers.Dense(3)(inputs)}
    assert _outputs.output_kinds(keras.Model(inputs, outputs)) == ["logits", "sigmoid"]  # in the order of keras.tree


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_come_back_from_probabilities(kind):
    z = np.random.default_rng(0).normal(size=(5, 4))
    p = keras.activations.get(kind)(tf.constant(z))
    for given in (p, tf.constant(p.numpy())):  # with and without the trace that the layer leaves
        logits = _outputs.as_logits(given, kind)
        np.testing.assert_allclose(keras.activations.get(kind)(logits), p, rtol=1e-9)


def test_probabilities_of_zero_and_one_give_finite_logits_and_gradients():
    for kind in ("softmax", "sigmoid"):
        p = tf.constant([[0.0, 1.0, 0.0]])
        with tf.GradientTape() as tape:
            tape.watch(p)
            logits = _outputs.as_logits(p, kind)
        assert np.all(np.isfinite(logits))
        assert np.all(np.isfinite(tape.gradient(logits, p)))


def test_targets_are_laid_beside_outputs_by_path_name_or_order():
    assert _outputs.match(None, ["0", "1"]) == {"0": None, "1": None}
    assert _outputs.match(7, [""]) == {"": 7}
    assert _outputs.match([7], [""]) == {"": 7}
    assert _outputs.match({"a": 1, "b": 2}, ["0", "1"], ["b", "a"]) == {"0": 2, "1": 1}
    assert _outputs.match({"b": 2}, ["a", "b"]) == {"a": None, "b": 2}
    assert _outputs.match([1, 2], ["a", "b"]) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="do not match the outputs"):
        _outputs.match([1, 2, 3], ["a", "b"])
