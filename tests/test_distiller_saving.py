"""Saving, loading and resuming a Distiller: the student's state is in the file, the teacher's weights are not."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import Distiller, losses
from keras_kd.callbacks import Quantization
from tests.conftest import classifier

ROOT = pathlib.Path(__file__).parent.parent
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(teacher, student, **kwargs):
    distiller = Distiller(teacher, student, [losses.KDLoss(3.0), losses.DISTLoss()], [1.0, 0.5], **kwargs)
    distiller.compile(keras.optimizers.Adam(0.01), loss=FROM_LOGITS, metrics=["accuracy"])
    distiller.optimizer.build(distiller.trainable_variables)  # Keras warns on loading what was saved before training
    return distiller


def numbers_in(path):
    """How many numbers of each shape a weight file holds."""
    shapes = []
    with h5py.File(path) as file:
        file.visititems(lambda _, item: shapes.append(item.shape) if isinstance(item, h5py.Dataset) else None)
    return shapes


def test_weight_files_hold_the_student_and_the_optimizer_and_nothing_of_the_teacher(data, tmp_path):
    teacher, student = classifier(61), classifier(5)
    distiller = compiled(teacher, student)
    distiller.fit(*data, verbose=0)
    distiller.save_weights(tmp_path / "a.weights.h5")
    distiller.save(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
    for path in (tmp_path / "a.weights.h5", tmp_path / "model.weights.h5"):
        shapes = numbers_in(path)
        assert (4, 5) in shapes
        assert not [shape for shape in shapes if 61 in shape]
        assert len(shapes) == len(student.weights) + len(distiller.optimizer.variables)


def test_a_tensorflow_checkpoint_holds_nothing_of_the_teacher(data, tmp_path):
    distiller = compiled(classifier(61), classifier(5))
    path = tf.train.Checkpoint(distiller).save(str(tmp_path / "checkpoint"))
    shapes = [shape for _, shape in tf.train.list_variables(path)]
    assert [4, 5] in shapes
    assert not [shape for shape in shapes if 61 in shape]


def test_a_loaded_distiller_goes_on_where_the_saved_one_stopped(data, tmp_path):
    teacher, student = classifier(16), classifier(5)
    distiller = compiled(teacher, student, student_loss_weight=0.3)
    distiller.fit(*data, epochs=2, verbose=0)
    distiller.student_loss_weight = 0.4
    distiller.distillation_losses[0].temperature = 2.5
    distiller.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.compiled
    assert loaded.optimizer.iterations == distiller.optimizer.iterations == 2
    assert loaded.student_loss_weight == 0.4
    assert loaded.distillation_loss_weights == [1.0, 0.5]
    assert loaded.distillation_losses[0].temperature == 2.5
    loaded.teacher = teacher
    histories = [model.fit(*data, epochs=2, shuffle=False, verbose=0).history for model in (distiller, loaded)]
    for name, values in histories[0].items():
        np.testing.assert_allclose(values, histories[1][name], rtol=1e-5)


def test_a_loaded_distiller_refuses_to_train_on_a_teacher_without_weights(data, tmp_path):
    distiller = compiled(classifier(16), classifier(5))
    distiller.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    before = loaded.get_weights()
    for call in (loaded.fit, loaded.evaluate, loaded.train_on_batch):
        with pytest.raises(ValueError, match=r"distiller\.teacher = your_teacher"):
            call(*data)
    for was, now in zip(before, loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    np.testing.assert_allclose(loaded.predict(data[0], verbose=0), distiller.predict(data[0], verbose=0), rtol=1e-6)
    loaded.evaluate_teacher = False
    assert "accuracy" in loaded.evaluate(*data, verbose=0, return_dict=True)


def test_the_loaded_architecture_can_take_the_teachers_weights(data, tmp_path):
    teacher = classifier(16)
    compiled(teacher, classifier(5)).save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    loaded.teacher.set_weights(teacher.get_weights())
    loaded.teacher = loaded.teacher
    np.testing.assert_array_equal(loaded.teacher(data[0]), teacher(data[0]))
    assert np.isfinite(loaded.fit(*data, verbose=0).history["loss"][0])


def test_a_saved_loaded_and_saved_distiller_still_knows_the_teachers_architecture(tmp_path):
    compiled(classifier(16, name="wise"), classifier(5)).save(tmp_path / "a.keras")
    keras.saving.load_model(tmp_path / "a.keras").save(tmp_path / "b.keras")
    assert keras.saving.load_model(tmp_path / "b.keras").teacher.name == "wise"


def test_a_teacher_that_cannot_be_serialised_does_not_hinder_saving(data, tmp_path):
    class Local(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x):
            return self.inner(x)

    teacher = Local(classifier(16))
    teacher(data[0])
    distiller = Distiller(teacher, classifier(5), losses.KDLoss(from_logits=True))
    distiller.compile("sgd")
    distiller.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert loaded.teacher is None
    loaded.teacher = teacher
    assert np.isfinite(loaded.fit(data[0], verbose=0).history["loss"][0])


def test_the_config_says_that_the_teacher_was_not_compiled(data):
    teacher = classifier(16)
    teacher.compile("adam", loss="mse")
    config = compiled(teacher, classifier(5)).get_config()
    assert config["teacher"]["compile_config"] is None
    assert json.dumps(config)


def test_options_survive_a_round_trip(tmp_path):
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    preprocessing = layers.Rescaling(0.5)
    distiller = Distiller(teacher, classifier(5), "dist_loss", teacher_preprocessing=preprocessing, evaluate_teacher=False)
    again = Distiller.from_config(distiller.get_config())
    assert again.evaluate_teacher is False
    assert again._teacher.preprocessing.scale == 0.5
    again.teacher = teacher
    assert again._teacher.preprocessing.scale == 0.5


def test_model_checkpoint_keeps_the_best_epoch(data, tmp_path):
    distiller = compiled(classifier(16), classifier(5))
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True)
    history = distiller.fit(*data, validation_data=data, epochs=3, verbose=0, callbacks=[best]).history
    loaded = keras.saving.load_model(tmp_path / "best.keras")
    loaded.teacher = distiller.teacher
    assert loaded.evaluate(*data, verbose=0, return_dict=True)["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_training_that_was_killed_resumes_to_the_same_weights(data, tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    teacher, weights = classifier(16), classifier(5).get_weights()

    def distiller():
        student = classifier(5)
        student.set_weights(weights)
        return compiled(teacher, student)

    whole = distiller()
    whole.fit(*data, epochs=5, shuffle=False, verbose=0)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        distiller().fit(*data, epochs=5, shuffle=False, verbose=0, callbacks=[backup, Kill()])
    resumed = distiller()
    history = resumed.fit(
        *data, epochs=5, shuffle=False, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")]
    )
    assert history.epoch == [2, 3, 4] or history.epoch == [1, 2, 3, 4]
    for a, b in zip(whole.student.get_weights(), resumed.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_distiller_and_a_quantised_model_load_in_another_process(data, tmp_path):
    distiller, student = compiled(classifier(16), classifier(5)), classifier(5)
    for part in student.layers:
        part.bias.assign(keras.ops.linspace(-1.0, 1.0, part.bias.shape[0]))
    quantized = Quantization(calibration_data=data[0]).quantize(student)
    expected = {}
    for name, model in (("distiller", distiller), ("quantised", quantized)):
        model.save(tmp_path / f"{name}.keras")
        expected[name] = model.predict(data[0], verbose=0)
    assert not np.allclose(expected["quantised"], student(data[0]), rtol=1e-5)
    np.savez(tmp_path / "a.npz", x=data[0], **expected)
    script = textwrap.dedent(
        """
        import keras, keras_kd, numpy as np
        arrays = np.load("a.npz")
        for name in ("distiller", "quantised"):
            loaded = keras.saving.load_model(f"{name}.keras")
            np.testing.assert_allclose(loaded.predict(arrays["x"], verbose=0), arrays[name], rtol=1e-5, atol=1e-6)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("how", ["argument", "scope"])
def test_custom_objects_reach_the_losses_and_the_student(how, data, tmp_path):
    class Mine(losses.DistillationLoss):
        def call(self, y_true, y_pred):
            return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)

    class Twice(layers.Layer):
        def call(self, x):
            return 2 * x

    student = keras.Sequential([keras.Input((4,)), Twice(), layers.Dense(3)])
    distiller = Distiller(classifier(16), student, Mine())
    distiller.compile("sgd")
    distiller.save(tmp_path / "a.keras")
    objects = {"Mine": Mine, "Twice": Twice}
    if how == "argument":
        loaded = keras.saving.load_model(tmp_path / "a.keras", custom_objects=objects)
    else:
        with keras.saving.custom_object_scope(objects):
            loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert isinstance(loaded.distillation_losses[0], Mine)
    np.testing.assert_allclose(loaded(data[0]), student(data[0]), rtol=1e-6)
