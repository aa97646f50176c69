"""The same demands on every public layer: adding one to `keras_kd.layers` enrols it here."""

import inspect

import keras
import numpy as np
import pytest

from keras_kd import layers

PUBLIC = [value for name, value in vars(layers).items() if name in layers.__all__ and inspect.isclass(value)]
EXAMPLES = {"LinearProbe": lambda **options: layers.LinearProbe(3, **options)}
# What a layer needs more than an input.
OWN_TESTS = {"Projector"}  # tests/losses and tests/test_distiller_features.py: losses own it

every_layer = pytest.mark.parametrize("name", [kind.__name__ for kind in PUBLIC if kind.__name__ not in OWN_TESTS])
X = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")


def test_every_public_layer_has_an_example_here():
    assert {kind.__name__ for kind in PUBLIC} == set(EXAMPLES) | OWN_TESTS


@every_layer
def test_the_config_makes_it_again(name):
    layer = EXAMPLES[name]()
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()


@every_layer
@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_float16"])
def test_it_saves_loads_and_computes_in_every_precision(name, policy, tmp_path):
    model = keras.Sequential([keras.Input((5,)), EXAMPLES[name](dtype=policy)])
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded(X).dtype == ("float16" if policy == "mixed_float16" else policy)


@every_layer
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}], ids=str)
def test_it_trains_every_way(name, options):
    model = keras.Sequential([keras.Input((5,)), EXAMPLES[name]()])
    model.compile("sgd", "mse", **options)
    model.fit(X, np.ones((16, 3)), verbose=0)


@every_layer
def test_it_is_documented(name):
    doc = inspect.getdoc(getattr(layers, name))
    for part in ("Args:", "Call arguments:", "Returns:", "Raises:", "Example:", ">>> "):
        assert part in doc, part
