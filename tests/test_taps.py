"""Reading what layers give, in one pass of any model, and leaving no trace."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import _taps

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def nested():
    backbone = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="conv"), layers.ReLU(name="act")], name="backbone")
    return keras.Sequential([keras.Input((4,)), backbone, layers.Dense(3, name="head")])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.shared = layers.Dense(4, name="shared")

    def call(self, x):
        return self.shared(self.shared(x))


@pytest.mark.parametrize("compiled", [False, True, "xla"])
def test_layers_are_read_by_path_and_by_a_name_that_only_one_bears(compiled):
    model = nested()

    def run(x):
        with _taps.record(model, ["backbone/conv", "act", "head"]) as found:
            y = model(x)
        return y, dict(found)

    y, found = (tf.function(run, jit_compile=compiled == "xla") if compiled else run)(tf.constant(X))
    conv = model.layers[0].layers[0]
    np.testing.assert_allclose(found["backbone/conv"], conv(X), rtol=1e-5)
    np.testing.assert_allclose(found["act"], np.maximum(conv(X), 0), rtol=1e-5)
    np.testing.assert_allclose(found["head"], y, rtol=1e-5)
    assert "call" not in vars(conv)


def test_a_shared_layer_is_read_by_call():
    model = Subclassed()
    model(X)
    with _taps.record(model, ["shared:0", "shared:1"]) as found:
        y = model(X)
    np.testing.assert_allclose(found["shared:0"], model.shared(X), rtol=1e-6)
    np.testing.assert_allclose(found["shared:1"], y, rtol=1e-6)
    with pytest.raises(ValueError, match="is called 2 times in a pass. Name the call: shared:0, shared:1"):
        with _taps.record(model, ["shared"]):
            model(X)
    with pytest.raises(ValueError, match=r"not called in a pass \(2 calls"):
        with _taps.record(model, ["shared:2"]):
            model(X)


def test_names_that_fit_nothing_or_several_list_the_candidates():
    model = keras.Sequential(
        [keras.Sequential([keras.Input((4,)), layers.Dense(4, name="same")], name=name) for name in ("one", "two")]
    )
    with pytest.raises(ValueError, match=r'No layer "nine" in the teacher.*Layers: one, one/same, two, two/same'):
        _taps.find_layer(model, "nine", role="teacher")
    with pytest.raises(ValueError, match=r'"same" is the name of several layers.*one/same, two/same'):
        _taps.find_layer(model, "same")
    assert _taps.find_layer(model, "two/same") is model.layers[1].layers[0]


def test_an_error_inside_leaves_no_tap_behind():
    model = nested()
    with pytest.raises(RuntimeError, match="mine"):
        with _taps.record(model, ["head"]):
            raise RuntimeError("mine")
    assert "call" not in vars(model.layers[-1])


def test_another_wrapper_on_the_same_layer_stays():
    model = nested()
    layer, calls = model.layers[-1], []
    original = layer.call
    object.__setattr__(layer, "call", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    for _ in range(2):
        with _taps.record(model, ["head"]):
            model(X)
    model(X)
    assert len(calls) == 3


def test_threads_read_their_own_passes():
    model, failures = nested(), []

    def work(scale):
        for _ in range(40):
            with _taps.record(model, ["head"]) as found:
                y = model(scale * X)
            if not np.array_equal(found["head"], y):
                failures.append(scale)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert "call" not in vars(model.layers[-1])
