"""Keras' own TensorBoard callback shows what is distilled, pruned and quantised; read back from its event files."""

import keras
import numpy as np
import pytest

import keras_kd

L = keras.layers
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def classifier(width, name):
    layers = [L.Dense(width, activation="relu", name="hidden"), L.Dense(3, name="head")]
    return keras.Sequential([keras.Input((4,)), *layers], name=name)


def test_losses_agreement_sparsity_ranges_and_histograms_are_in_the_event_files(tmp_path):
    from tensorboard.util import tensor_util

    keras.utils.set_random_seed(0)
    x, y = np.random.default_rng(0).normal(size=(48, 4)).astype("float32"), np.arange(48) % 3
    hint = keras_kd.losses.HintLoss(teacher_layer_name="hidden", student_layer_name="hidden")
    distiller = keras_kd.Distiller(classifier(8, "teacher"), classifier(4, "student"), [keras_kd.losses.KDLoss(), hint])
    supervised = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile("adam", supervised, metrics=[keras_kd.metrics.TeacherAgreement()])
    quantization = keras_kd.callbacks.Quantization()
    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    given = {"epochs": 2, "batch_size": 16, "validation_data": (x, y), "verbose": 0}
    history = distiller.fit(x, y, callbacks=[keras_kd.callbacks.Pruning(0.5), quantization, board], **given).history

    def read(part):
        found = event_accumulator.EventAccumulator(str(tmp_path / part), size_guidance={"tensors": 0})
        found.Reload()
        return {tag: [tensor_util.make_ndarray(one.tensor_proto) for one in found.Tensors(tag)] for tag in found.Tags()["tensors"]}

    train, validation = read("train"), read("validation")
    logged = [name for name in history if not name.startswith("val_")]
    assert {"kd_loss", "hint_loss", "student_loss", "teacher_agreement", "sparsity", "hidden_sparsity"} <= set(logged)
    for name in logged:
        np.testing.assert_allclose(train[f"epoch_{name}"], history[name], rtol=1e-6)
    for name in ("kd_loss", "teacher_agreement"):
        np.testing.assert_allclose(validation[f"epoch_{name}"], history[f"val_{name}"], rtol=1e-6)
    assert train["epoch_hidden_sparsity"][-1] == 0.5
    for name, (low, high) in quantization.activation_ranges().items():
        np.testing.assert_allclose([train[f"range/{name}/{end}"][-1] for end in ("low", "high")], [low, high], rtol=1e-6)
    kernel = np.asarray(distiller.student.get_layer("hidden").kernel)
    left, right, count = train["student/hidden/kernel/histogram"][-1].T
    assert count.sum() == kernel.size
    assert left[0] <= kernel.min() <= kernel.max() <= right[-1] + 1e-6
