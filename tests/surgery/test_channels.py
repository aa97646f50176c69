"""remove_channels: what is left computes what the whole computed with those channels counted as 0."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.surgery import _analysis, channels
from keras_kd.surgery._rebuild import Rebuilt
from tests.surgery import networks

L = keras.layers


def close(actual, expected, tolerance=1e-5):
    for a, b in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        scale = max(float(np.max(np.abs(b))), 1.0)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


@pytest.mark.parametrize("seed", range(40))
def test_a_random_network_computes_what_it_did_with_removed_channels_at_0(seed):
    model = networks.random_network(seed)
    before = [np.asarray(v).copy() for v in model.variables]
    x = networks.inputs_for(model)
    whole = model(x)
    wanted = networks.random_channels(model, seed)
    found = _analysis.analyse(model)
    gone = channels.chosen(found, wanted)
    rebuilt = Rebuilt(found, gone)
    smaller = keras_kd.surgery.remove_channels(model, wanted)
    assert smaller.count_params() < model.count_params()
    close(smaller(x), networks.masked(rebuilt, x))
    close(keras_kd.surgery.remove_channels(model, {})(x), whole, 1e-6)
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), value)
