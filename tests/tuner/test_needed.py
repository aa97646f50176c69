"""Without KerasTuner the package says how to install it."""

import importlib
import importlib.util

import pytest

import keras_kd
from keras_kd import tuner
from keras_kd.tuner import _needed


def test_it_is_loaded_on_demand():
    assert keras_kd.tuner is tuner
    assert "tuner" in dir(keras_kd)


@pytest.mark.parametrize("absent", ["keras_tuner", "tensorboard"])
def test_what_is_missing_is_named_with_the_way_to_install_it(absent, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    with pytest.raises(ImportError, match=rf"no module {absent}. Install them: pip install 'keras-kd\[tuner\]'"):
        importlib.reload(_needed)
