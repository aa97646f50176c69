"""Exported files compute what the model computes, appear whole or not at all, and are measured."""

import os

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd
from keras_kd import export, profile
from tests.conftest import classifier


def conv_net():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def test_the_file_gives_the_models_outputs_on_other_data(tmp_path):
    model = conv_net()
    report = export.to_litert(model, tmp_path / "m.tflite")
    x = np.random.default_rng(1).normal(size=(13, 8, 8, 1)).astype("float32")
    (found,) = export.run_litert(report.path, x)
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-5)
    assert report.size == os.path.getsize(report.path) > report.gzip_size > 0
    assert report.samples == 8
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_a_distiller_exports_its_student(tmp_path):
    student = classifier(5)
    report = export.to_litert(keras_kd.Distiller(classifier(64), student), tmp_path / "s.tflite")
    assert report.size < 3000
    assert report.agreement == 1.0


def test_models_with_several_named_inputs_and_outputs_keep_their_order(tmp_path):
    a, b = keras.Input((4,), name="a"), keras.Input((6,), name="b")
    hidden = layers.Concatenate()([a, b])
    model = keras.Model({"b": b, "a": a}, {"z": layers.Dense(3)(hidden), "y": layers.Dense(2)(hidden)})
    x = {"a": np.ones((5, 4), "float32"), "b": -np.ones((5, 6), "float32")}
    export.to_litert(model, tmp_path / "m.tflite", check_data=x)
    found = export.run_litert(tmp_path / "m.tflite", x)
    for got, want in zip(found, keras.tree.flatten(model.predict(x, verbose=0)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_subclassed_model_needs_data_to_know_its_inputs(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = layers.Dense(3)

        def call(self, x):
            return self.out(x)

    model, x = Net(), np.ones((2, 4), "float32")
    model(x)
    with pytest.raises(ValueError, match="check_data="):
        export.to_litert(model, tmp_path / "m.tflite")
    assert export.to_litert(model, tmp_path / "m.tflite", check_data=x).samples == 2


def test_a_file_that_does_not_agree_is_not_left_behind(tmp_path, monkeypatch):
    target = tmp_path / "m.tflite"
    target.write_bytes(b"old")
    monkeypatch.setattr(export, "run_litert", lambda content, inputs: [np.zeros((8, 3), "float32")])
    with pytest.raises(RuntimeError, match="does not compute what the model computes"):
        export.to_litert(conv_net(), target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="`model` must be a keras.Model"):
        export.to_litert("model", tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="`model` must be built"):
        export.to_litert(keras.Sequential([layers.Dense(3)]), tmp_path / "m.tflite")
    with pytest.raises(FileNotFoundError, match="`path` must lie in a folder that exists"):
        export.to_litert(conv_net(), tmp_path / "nowhere" / "m.tflite")
    with pytest.raises(ValueError, match="`runs` must be at least 1"):
        profile.measure_latency(b"", runs=0)


def test_a_profile_counts_and_times(tmp_path):
    small, large = classifier(5), classifier(4096)
    profiles = []
    for index, model in enumerate((small, large)):
        report = export.to_litert(model, tmp_path / f"{index}.tflite")
        profiles.append(profile.profile(model, report.path, runs=50))
    assert profiles[0].parameters == small.count_params() == 43
    assert profiles[1].size == os.path.getsize(tmp_path / "1.tflite")
    assert profiles[0].gzip_size < profiles[0].size < profiles[1].size
    for found in profiles:
        assert 0 < found.latency.low <= found.latency.median <= found.latency.high
    assert profiles[0].latency.median < profiles[1].latency.median
