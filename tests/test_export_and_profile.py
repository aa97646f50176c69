"""Exported files compute what the model computes, appear whole or not at all, and are measured."""

import os

import keras
import numpy as np
import pytest
from keras import layers

import keras_kd
from keras_kd import _litert, _samples, export, profile
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
    assert str(report).startswith(
        f"m.tflite: float32, {report.size:,} bytes ({report.gzip_size:,} after gzip); agrees with the model"
    )


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
    monkeypatch.setattr(export.litert, "run_litert", lambda content, inputs: [np.zeros((8, 3), "float32")])
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


@pytest.mark.parametrize("who", ["model", "file"])
def test_nan_is_not_taken_for_agreement(who, tmp_path, monkeypatch):
    model = conv_net()
    if who == "model":
        model.layers[-1].bias.assign([np.nan] * 3)
    else:
        monkeypatch.setattr(export.litert, "run_litert", lambda content, inputs: [np.full((8, 3), np.nan)])
    with pytest.raises(RuntimeError, match="gives NaN"):
        export.to_litert(model, tmp_path / "m.tflite")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_models_of_other_precisions_are_exported_in_float32(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = conv_net()
    finally:
        keras.config.set_dtype_policy("float32")
    report = export.to_litert(model, tmp_path / "m.tflite")
    x = np.random.default_rng(1).normal(size=(5, 8, 8, 1)).astype("float32")
    (found,) = export.run_litert(report.path, x)
    np.testing.assert_allclose(found, model.predict(x, verbose=0).astype("float32"), atol=2e-2)
    assert model.dtype_policy.name == policy


@pytest.mark.parametrize("layer", [layers.LSTM(4), layers.GRU(4), layers.Bidirectional(layers.LSTM(3))], ids=lambda x: x.name)
def test_recurrent_models_are_exported_for_single_samples_and_run_on_many(layer, tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), layer, layers.Dense(2)])
    x = np.random.default_rng(1).normal(size=(6, 5, 3)).astype("float32")
    report = export.to_litert(model, tmp_path / "m.tflite", check_data=x)
    assert report.samples == 6
    (found,) = export.run_litert(report.path, x)
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-5)


def test_token_models_are_checked_on_different_tokens(tmp_path):
    model = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(9, 4), layers.Flatten(), layers.Dense(3)])
    assert len(np.unique(_samples.random_inputs(model), axis=0)) > 1
    assert export.to_litert(model, tmp_path / "m.tflite").agreement == 1.0


def test_a_dict_of_check_data_goes_by_the_names_of_the_inputs(tmp_path):
    z, a = keras.Input((4,), name="z"), keras.Input((4,), name="a")
    model = keras.Model([z, a], layers.Dense(3)(layers.Concatenate()([z, a])))
    data = {"a": np.ones((3, 4), "float32"), "z": -np.ones((3, 4), "float32")}
    assert export.to_litert(model, tmp_path / "m.tflite", check_data=data).max_difference < 1e-5


@pytest.mark.parametrize("data", [np.empty((0, 8, 8, 1)), 3.0, "x", []])
def test_check_data_that_is_no_data_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="`check_data` must be"):
        export.to_litert(conv_net(), tmp_path / "m.tflite", check_data=data)
    with pytest.raises(IsADirectoryError, match="must be a file"):
        export.to_litert(conv_net(), tmp_path)


def test_a_model_that_the_converter_refuses_is_named(tmp_path, monkeypatch):
    def refuse(model, inputs, batch, configure):
        raise TypeError("\n\nno kernel for frobnicate\nmore")

    monkeypatch.setattr(_litert, "convert_for", refuse)
    with pytest.raises(RuntimeError, match='refuses ".*". Nothing was written. It says: no kernel for frobnicate'):
        export.to_litert(conv_net(), tmp_path / "m.tflite")
