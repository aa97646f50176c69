"""What users combine: found by a review, each one once silently wrong or an obscure error."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import losses, metrics, teachers

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, size=16)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
HIDDEN = {"teacher_layer_name": "hidden", "student_layer_name": "hidden"}


def model(width=5, classes=3, *, name=None, activation=None, **kwargs):
    hidden = layers.Dense(width, name="hidden", **kwargs)
    return keras.Sequential([keras.Input((4,)), hidden, layers.Dense(classes, activation=activation, name="head")], name=name)


@keras.saving.register_keras_serializable(package="test_combinations")
class Subclassed(keras.Model):
    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden, self.head = layers.Dense(width, name="hidden"), layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.hidden(x))

    def get_config(self):
        return {"width": self.width}


def subclassed(width):
    made = Subclassed(width)
    made(X)
    return made


# Several teachers take from the losses what their outputs mean


def test_several_teachers_of_numbers_are_averaged_as_numbers():
    members, student = [model(classes=1), model(classes=1)], model(classes=1)
    distiller = keras_kd.Distiller(members, student, keras.losses.MeanSquaredError())
    expected = np.mean([member.predict(X, verbose=0) for member in members], axis=0)
    np.testing.assert_allclose(distiller.teacher_outputs(X), expected, rtol=1e-5, atol=1e-6)


def test_several_teachers_of_independent_labels_are_averaged_by_sigmoids():
    members, student = [model(), model()], model()
    distiller = keras_kd.Distiller(members, student, losses.KDLoss(activation="sigmoid"))
    p = np.mean([tf.sigmoid(member(X)) for member in members], axis=0)
    np.testing.assert_allclose(distiller.teacher_outputs(X), np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_another_activation_than_the_loss_is_refused():
    with pytest.raises(ValueError, match='kd_loss compares sigmoid.*averaged as softmax.*activation="sigmoid"'):
        keras_kd.Distiller(teachers.Ensemble([model(), model()]), model(), losses.KDLoss(activation="sigmoid"))
    with pytest.raises(ValueError, match="A softmax over a single output"):
        teachers.Ensemble([model(classes=1)])(X)


# Students that teach each other


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_order_of_students_does_not_matter(order):
    made = {"a": model(name="a", activation="softmax"), "b": model(name="b")}
    for one, seed in zip(made.values(), (0, 1), strict=True):
        rng = np.random.default_rng(seed)
        one.set_weights([rng.normal(size=w.shape) for w in one.get_weights()])
    distiller = keras_kd.MutualDistiller([made[name] for name in order], student_loss_weight=0.0)
    distiller.compile("sgd", {"a": keras.losses.SparseCategoricalCrossentropy(), "b": CROSS_ENTROPY}, metrics=[metrics.TeacherKL()])
    logs = distiller.evaluate(X, Y, return_dict=True, verbose=0)
    log_a, log_b = np.log(made["a"](X)), tf.nn.log_softmax(made["b"](X)).numpy()
    a_of_b, b_of_a = (np.mean(np.sum(np.exp(p) * (p - q), -1)) for p, q in ((log_a, log_b), (log_b, log_a)))
    assert logs["distillation_loss"] == pytest.approx(a_of_b + b_of_a, rel=1e-4)
    assert logs["a_teacher_kl"] == pytest.approx(b_of_a, rel=1e-4)
    assert logs["b_teacher_kl"] == pytest.approx(a_of_b, rel=1e-4)


def test_a_mutual_distiller_is_copied_and_loaded_with_custom_objects(tmp_path, monkeypatch):
    class MyDense(layers.Dense):
        pass

    students = [keras.Sequential([keras.Input((4,)), MyDense(3)], name="a"), model(name="b")]
    distiller = keras_kd.MutualDistiller(students)
    distiller.compile("sgd", CROSS_ENTROPY)
    distiller.save(tmp_path / "m.keras")
    monkeypatch.setattr(MyDense, "__module__", "nowhere")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"MyDense": MyDense})
    np.testing.assert_allclose(loaded.predict(X, verbose=0)["a"], students[0](X), rtol=1e-5)
    with keras.saving.custom_object_scope({"MyDense": MyDense}):
        assert len(copy.deepcopy(distiller).students) == 2


# Preprocessing


def test_a_preprocessing_that_nobody_would_use_is_refused():
    for teacher in (teachers.MovingAverage(), teachers.Ensemble([model(), model()])):
        with pytest.raises(ValueError, match="`teacher_preprocessing` is for models that a Distiller asks itself"):
            keras_kd.Distiller(teacher, model(), teacher_preprocessing=lambda x: x)


def test_one_preprocessing_per_teacher_survives_a_copy():
    distiller = keras_kd.Distiller([model(), model()], model(), teacher_preprocessing=[layers.Rescaling(100.0), None])
    twin = copy.deepcopy(distiller)
    np.testing.assert_allclose(twin.teacher_outputs(X), distiller.teacher_outputs(X), rtol=1e-6)
    with pytest.raises(ValueError, match="One preprocessing per teacher is for a list"):
        distiller.teacher = model()


# Another teacher


def test_a_refused_teacher_changes_nothing():
    first, second = model(8), model(9)
    distiller = keras_kd.Distiller(first, model(5), losses.HintLoss(**HIDDEN))
    distiller.compile("sgd", CROSS_ENTROPY)
    distiller.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="features of other shapes"):
        distiller.teacher = second
    assert distiller.teacher is first
    distiller.fit(X, Y, verbose=0)


def test_a_teacher_that_needs_new_layers_asks_to_compile_again():
    distiller = keras_kd.Distiller(model(5), model(5), losses.HintLoss(**HIDDEN))
    distiller.compile("adam", CROSS_ENTROPY)
    distiller.fit(X, Y, verbose=0)
    other = model(8)
    for _ in range(2):
        distiller.teacher = other
        with pytest.raises(ValueError, match=r"Call `distiller.compile\(...\)` again"):
            distiller.fit(X, Y, verbose=0)
    distiller.compile("adam", CROSS_ENTROPY)
    distiller.fit(X, Y, verbose=0)


def test_a_loss_with_trained_layers_belongs_to_one_distiller():
    loss = losses.HintLoss(**HIDDEN)
    keras_kd.Distiller(model(8), model(5), loss)
    with pytest.raises(ValueError, match="HintLoss has trained layers, and belongs to another Distiller"):
        keras_kd.Distiller(model(8), model(5), loss)
    without = losses.SPLoss(**HIDDEN)
    for _ in range(2):
        keras_kd.Distiller(model(8), model(5), without)


# The student's average


def test_activity_regularisers_count_once_beside_the_students_average():
    student = model(6, activity_regularizer=keras.regularizers.L2(1.0))
    distiller = keras_kd.Distiller(teachers.MovingAverage(), student)
    distiller.compile("sgd", CROSS_ENTROPY)
    logs = distiller.evaluate(X, Y, batch_size=16, return_dict=True, verbose=0)
    student(X)
    (penalty,) = student.losses  # Keras 3.12 takes the sum over the batch, later ones the mean
    hidden = student.get_layer("hidden")(X)
    assert float(penalty) in (pytest.approx(np.sum(np.square(hidden)) / 16), pytest.approx(np.sum(np.square(hidden))))
    expected = 0.5 * logs["student_loss"] + 0.5 * logs["distillation_loss"] + float(penalty)
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_average_of_a_student_with_a_lambda_or_a_local_class():
    class Local(layers.Dense):
        pass

    student = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: 2 * x), Local(3)])
    distiller = keras_kd.Distiller(teachers.MovingAverage(), student)
    np.testing.assert_allclose(distiller.teacher.model(X), student(X), rtol=1e-6)


# Masks


@pytest.mark.parametrize(
    ("loss", "several"),
    [
        (losses.CorrelationLoss(), False),
        (losses.CorrelationLoss("bilinear"), False),
        (losses.ABLoss(), False),
        (losses.FSPLoss(), True),
        (losses.HintLoss(), False),
        (losses.SPLoss(), False),
        (losses.VIDLoss(), False),
    ],
)
def test_masked_positions_do_not_count(loss, several):
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    mask = tf.constant([[True, True, False, False], [True, True, True, False], [True] * 4])
    values = []
    for change in (0.0, 50.0):
        features = [np.where(mask[..., None], x, x + change).astype("float32") for x in (teacher, student)]
        learned = tf.constant(features[1])
        learned._keras_mask = mask
        values.append(float(loss([features[0]] * 2, [learned] * 2) if several else loss(features[0], learned)))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# Subclassed models


def test_projectors_of_subclassed_models_are_there_from_the_start(tmp_path):
    student = subclassed(5)
    distiller = keras_kd.Distiller(subclassed(8), student, losses.HintLoss(**HIDDEN))
    distiller.compile("adam", CROSS_ENTROPY)
    distiller.fit(X, Y, verbose=0)
    distiller.save_weights(tmp_path / "d.weights.h5")
    again = keras_kd.Distiller(distiller.teacher, subclassed(5), losses.HintLoss(**HIDDEN))
    again.compile("adam", CROSS_ENTROPY)
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "d.weights.h5")
    assert again.evaluate(X, Y, verbose=0) == pytest.approx(distiller.evaluate(X, Y, verbose=0), rel=1e-6)
    again.fit(X, Y, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])


# Names


def test_a_metric_whose_name_ends_like_the_teachers_stays():
    distiller = keras_kd.Distiller(model(), model(), evaluate_teacher=False)
    own = keras.metrics.SparseCategoricalAccuracy(name="my_top")
    distiller.compile("sgd", CROSS_ENTROPY, metrics=[metrics.TeacherKL(name="top"), own])
    logs = distiller.evaluate(X, Y, return_dict=True, verbose=0)
    assert "my_top" in logs
    assert "top" not in logs


def test_a_loss_on_outputs_takes_one_layer_at_a_time():
    both = {"teacher_layer_name": ["hidden", "head"], "student_layer_name": ["hidden", "head"]}
    with pytest.raises(ValueError, match="kd_loss compares one layer"):
        keras_kd.Distiller(model(), model(), losses.KDLoss(from_logits=True, **both))
