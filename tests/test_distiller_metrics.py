"""Metrics that compare student and teacher, in `compile(metrics=[...])` of a Distiller."""

import keras
import numpy as np
import pytest
from scipy.special import log_softmax

import keras_kd
from keras_kd import metrics
from tests.conftest import classifier

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, size=24)


def truth(teacher, student):
    z_t, z_s = (model.predict(X, verbose=0) for model in (teacher, student))
    log_t, log_s = log_softmax(z_t, -1), log_softmax(z_s, -1)
    return np.mean(z_t.argmax(-1) == z_s.argmax(-1)), np.mean(np.sum(np.exp(log_t) * (log_t - log_s), -1))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}])
def test_agreement_and_divergence_are_those_of_the_two_models(options, teacher, student):
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(
        keras.optimizers.SGD(0.0), CROSS_ENTROPY, metrics=["accuracy", metrics.TeacherAgreement(), metrics.TeacherKL()], **options
    )
    history = distiller.fit(X, Y, batch_size=8, validation_data=(X, Y), verbose=0).history
    agreement, divergence = truth(teacher, student)
    for prefix in ("", "val_"):
        assert history[f"{prefix}teacher_agreement"][0] == pytest.approx(agreement, rel=1e-5)
        assert history[f"{prefix}teacher_kl"][0] == pytest.approx(divergence, rel=1e-3)
        assert f"{prefix}accuracy" in history


def test_without_labels_the_teacher_is_enough(teacher, student):
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(keras.optimizers.SGD(0.0), metrics=[metrics.TeacherAgreement()])
    assert distiller.fit(X, verbose=0).history["teacher_agreement"][0] == pytest.approx(truth(teacher, student)[0])


def test_validation_without_the_teacher_leaves_its_metrics_out(teacher, student):
    distiller = keras_kd.Distiller(teacher, student, evaluate_teacher=False)
    watched = ["accuracy", metrics.TeacherAgreement(), metrics.CalibrationError(from_logits=True)]
    distiller.compile("sgd", CROSS_ENTROPY, metrics=watched)
    history = distiller.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert "teacher_agreement" in history
    assert "val_teacher_agreement" not in history
    assert {"val_accuracy", "val_calibration_error"} <= set(history)


def test_each_of_several_outputs_has_its_own_agreement():
    def heads(width):
        x = keras.Input((4,))
        h = keras.layers.Dense(width, "tanh")(x)
        return keras.Model(x, {"digit": keras.layers.Dense(3, name="digit")(h), "color": keras.layers.Dense(2, name="color")(h)})

    teacher, student = heads(16), heads(4)
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        {"digit": CROSS_ENTROPY, "color": CROSS_ENTROPY},
        metrics={"digit": [metrics.TeacherAgreement()], "color": [metrics.TeacherAgreement()]},
    )
    labels = {"digit": Y, "color": Y % 2}
    logs = distiller.evaluate(X, labels, return_dict=True, verbose=0)
    for name in ("digit", "color"):
        expected = np.mean(*[np.argmax(teacher(X)[name], -1) == np.argmax(student(X)[name], -1)])
        assert logs[f"{name}_teacher_agreement"] == pytest.approx(expected)
    distiller.evaluate_teacher = False
    assert not [name for name in distiller.evaluate(X, labels, return_dict=True, verbose=0) if name.endswith("agreement")]


def test_a_saved_distiller_keeps_its_metrics(tmp_path, teacher):
    student = classifier(5, activation="softmax")
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile("sgd", "sparse_categorical_crossentropy", metrics=[metrics.TeacherKL(temperature=2.0)])
    distiller.fit(X, Y, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    loaded.teacher = teacher
    assert loaded.evaluate(X, Y, verbose=0) == pytest.approx(distiller.evaluate(X, Y, verbose=0), rel=1e-5)
