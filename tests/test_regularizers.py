"""Group lasso: its value and gradient, and that whole filters go."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kd import regularizers
from tests.references import gradient

RNG = np.random.default_rng(0)


def truth(w, strength, axis):
    groups = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    return strength * sum(np.sqrt(groups.shape[1]) * np.sqrt((group**2).sum()) for group in groups)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), -1), ((3, 3, 2, 5), -1), ((4, 3), 0)])
def test_value_and_gradient_are_those_of_the_formula(shape, axis):
    weight = tf.Variable(RNG.normal(size=shape))
    with tf.GradientTape() as tape:
        value = regularizers.GroupLasso(0.3, axis=axis)(tf.convert_to_tensor(weight))
    np.testing.assert_allclose(value, truth(weight.numpy(), 0.3, axis), rtol=1e-12)
    expected = gradient(lambda w: truth(w, 0.3, axis), weight.numpy())
    np.testing.assert_allclose(tape.gradient(value, weight), expected, atol=1e-12)


def test_empty_groups_have_a_finite_gradient():
    weight = tf.Variable(np.zeros((4, 3)))
    with tf.GradientTape() as tape:
        value = regularizers.GroupLasso(1.0)(tf.convert_to_tensor(weight))
    assert np.all(tape.gradient(value, weight).numpy() == 0)


def test_it_empties_the_filters_that_are_not_needed_and_l2_of_the_same_size_does_not():
    x = RNG.normal(size=(256, 6, 6, 2)).astype("float32")
    y = tf.nn.relu(tf.nn.conv2d(x, RNG.normal(size=(3, 3, 2, 2)).astype("float32"), 1, "VALID")).numpy().mean((1, 2))

    def norms(regularizer):
        keras.utils.set_random_seed(0)
        conv = keras.layers.Conv2D(8, 3, activation="relu", kernel_regularizer=regularizer)
        model = keras.Sequential([keras.Input((6, 6, 2)), conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Adam(3e-3), "mse")
        model.fit(x, y, epochs=60, verbose=0)
        return np.linalg.norm(np.asarray(conv.kernel).reshape(-1, 8), axis=0)

    lasso, ridge = norms(regularizers.GroupLasso(0.01)), norms(keras.regularizers.L2(0.01))
    assert 2 <= np.sum(lasso < 0.02) <= 6
    assert lasso.max() > 0.3
    assert np.sum(ridge < 0.02) < np.sum(lasso < 0.02)


def test_it_goes_through_its_config():
    made = keras.regularizers.deserialize(keras.regularizers.serialize(regularizers.GroupLasso(0.2, axis=0)))
    assert made.get_config() == {"strength": 0.2, "axis": 0}


@pytest.mark.parametrize("strength", [-1, "much", float("nan")])
def test_a_wrong_strength_is_refused(strength):
    with pytest.raises((TypeError, ValueError), match="strength"):
        regularizers.GroupLasso(strength)
