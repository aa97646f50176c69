"""Who may teach: several models, the student's own average, other students, a reused classifier, chains of teachers."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import losses, teachers
from tests import references
from tests.conftest import classifier

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, size=16)


def weights_of(model):
    return [np.array(weight) for weight in model.get_weights()]


# Several teachers


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_several_teachers_speak_by_the_mean_of_their_probabilities(weights, student):
    members = [classifier(name="a"), classifier(name="b", activation="softmax")]
    share = np.array([0.5, 0.5] if weights is None else [0.75, 0.25])
    mean = share[0] * references.softmax(members[0].predict(X, verbose=0)) + share[1] * members[1].predict(X, verbose=0)
    expected = np.mean(references.kd(np.log(mean), student.predict(X, verbose=0)))
    distiller = keras_kd.Distiller(members, student, losses.KDLoss(), student_loss_weight=0.0, teacher_weights=weights)
    distiller.compile("sgd", CROSS_ENTROPY)
    logs = distiller.evaluate(X, Y, return_dict=True, verbose=0)
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-5)


def test_sigmoid_teachers_average_their_probabilities():
    members = [classifier(name="a", activation="sigmoid"), classifier(name="b", activation="sigmoid")]
    outputs, _ = teachers.Ensemble(members)(X)
    mean = np.mean([member.predict(X, verbose=0) for member in members], axis=0)
    np.testing.assert_allclose(outputs, np.log(mean / (1 - mean)), rtol=1e-4, atol=1e-5)


def test_teachers_of_numbers_average_them_as_they_are():
    members = [classifier(name="a"), classifier(name="b")]
    outputs, _ = teachers.Ensemble(members, activation=None)(X)
    np.testing.assert_allclose(outputs, np.mean([m.predict(X, verbose=0) for m in members], axis=0), rtol=1e-5, atol=1e-7)


def test_extreme_logits_of_several_teachers_stay_finite():
    members = [classifier(name=name) for name in "ab"]
    for member, scale in zip(members, (1e4, -1e4), strict=True):
        member.set_weights([scale * np.ones_like(w) for w in member.get_weights()])
    members[0].layers[-1].bias.assign([1e4, 0, -1e4])
    outputs, _ = teachers.Ensemble(members)(X)
    assert np.all(np.isfinite(outputs))


def test_a_loss_names_the_layer_of_one_of_several_teachers(student):
    members = [classifier(8, name="a"), classifier(12, name="b")]
    for prefix, member in (("a", 0), ("1", 1)):
        first = members[member].layers[0].name
        loss = losses.SPLoss(teacher_layer_name=f"{prefix}/{first}", student_layer_name=student.layers[0].name)
        distiller = keras_kd.Distiller(members, student, loss)
        distiller.compile("sgd")
        expected = loss(members[member].layers[0](X), student.layers[0](X))
        assert distiller.evaluate(X, return_dict=True, verbose=0)["distillation_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_no_teacher_or_several_have_is_an_error_that_lists_the_teachers():
    members = [conv_net(8, name="a"), conv_net(12, name="b")]
    student = conv_net(3, name="student")
    for name, problem in (("head", "several teachers have"), ("nowhere", "no teacher has")):
        loss = losses.SPLoss(teacher_layer_name=name, student_layer_name="head")
        with pytest.raises(ValueError, match=rf"{problem} a layer of that name.*0/\.\.\. \(a\), 1/\.\.\. \(b\)"):
            keras_kd.Distiller(members, student, loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: keras_kd.Distiller([], s), "at least one teacher"),
        (lambda s: keras_kd.Distiller([classifier(), s], s), "The teacher is the student"),
        (lambda s: keras_kd.Distiller([classifier(), classifier(classes=4)], s), "outputs of the same shapes"),
        (lambda s: keras_kd.Distiller([classifier()], s, teacher_weights=[1, 2]), "one number per teacher"),
        (lambda s: keras_kd.Distiller([classifier()], s, teacher_weights=[0]), "not all 0"),
        (lambda s: keras_kd.Distiller(classifier(), s, teacher_weights=[1]), "for a list of teachers"),
        (lambda s: teachers.Ensemble([classifier()], activation="relu"), '"softmax", "sigmoid" or None'),
        (lambda s: teachers.MovingAverage(1.5), "`momentum` must be between 0 and 1"),
        (lambda s: keras_kd.MutualDistiller([s]), "at least two models of different names"),
        (lambda s: keras_kd.MutualDistiller([s, s]), "different names"),
    ],
)
def test_bad_teachers_are_refused(make, message, student):
    with pytest.raises(ValueError, match=message):
        make(student)


# The student's own average


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 4}])
def test_the_moving_average_follows_the_student_step_by_step(options, student):
    average = teachers.MovingAverage(momentum=0.8)
    distiller = keras_kd.Distiller(average, student)
    distiller.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY, **options)
    kept = weights_of(student)
    if options.get("steps_per_execution"):  # the same four steps at once
        plain = keras_kd.Distiller(teachers.MovingAverage(0.8), copied(student))
        plain.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY)
        for _ in range(4):
            plain.train_on_batch(X, Y)
        distiller.fit(tf.data.Dataset.from_tensors((X, Y)).repeat(4), shuffle=False, verbose=0)
        kept = weights_of(plain.teacher.model)
    else:
        for _ in range(4):
            distiller.train_on_batch(X, Y)
            kept = [0.8 * old + 0.2 * new for old, new in zip(kept, weights_of(student), strict=True)]
    for got, want in zip(weights_of(average.model), kept, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def copied(model):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


def test_the_moving_average_is_saved_with_the_distiller_and_goes_on(tmp_path, student):
    distiller = keras_kd.Distiller(teachers.MovingAverage(0.8), student)
    distiller.compile("sgd", CROSS_ENTROPY)
    distiller.fit(X, Y, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    for got, want in zip(weights_of(loaded.teacher.model), weights_of(distiller.teacher.model), strict=True):
        np.testing.assert_array_equal(got, want)
    for model in (loaded, distiller):
        model.train_on_batch(X, Y)
    for got, want in zip(weights_of(loaded.teacher.model), weights_of(distiller.teacher.model), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert loaded.teacher.momentum == 0.8


def test_a_copy_of_the_distiller_averages_its_own_student(student):
    distiller = keras_kd.Distiller(teachers.MovingAverage(0.8), student)
    twin = copy.deepcopy(distiller)
    assert twin.teacher is not distiller.teacher
    assert twin.teacher.model is not distiller.teacher.model
    with pytest.raises(ValueError, match=r"belongs to one Distiller. Make another, teachers.MovingAverage\(0.8\)"):
        keras_kd.Distiller(distiller.teacher, student)


def test_the_average_is_not_trained_by_gradients_and_not_part_of_the_student(student):
    count = len(student.weights)
    distiller = keras_kd.Distiller(teachers.MovingAverage(), student)
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    assert len(student.weights) == count
    assert student.trainable


# Students that teach each other


def numpy_step(students, rate=0.5):
    """One step of deep mutual learning with SGD, from gradients of each student's own loss."""
    stepped = []
    outputs = [student(X) for student in students]
    for k, student in enumerate(students):
        with tf.GradientTape() as tape:
            z = student(X)
            log_p = tf.nn.log_softmax(z)
            loss = 0.5 * tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, z))
            others = [tf.nn.log_softmax(outputs[j]) for j in range(len(students)) if j != k]
            kls = [tf.reduce_mean(tf.reduce_sum(tf.exp(q) * (q - log_p), -1)) for q in others]
            loss += 0.5 * tf.add_n(kls) / len(kls)
        slopes = tape.gradient(loss, student.trainable_variables)
        stepped.append([np.array(v - rate * g) for v, g in zip(student.trainable_variables, slopes, strict=True)])
    return stepped


@pytest.mark.parametrize("count", [2, 3])
def test_students_learn_from_labels_and_from_each_other(count):
    students = [classifier(4 + k, name=f"s{k}") for k in range(count)]
    expected = numpy_step(students)
    distiller = keras_kd.MutualDistiller(students)
    distiller.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY, metrics=["accuracy"])
    logs = distiller.train_on_batch(X, Y, return_dict=True)
    for student, want in zip(students, expected, strict=True):
        for got, value in zip(weights_of(student), want, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6)
    assert {f"s{k}_accuracy" for k in range(count)} <= set(logs)
    assert distiller.students == students


def test_mutual_learning_mixes_softmax_and_logits_and_weights_samples():
    students = [classifier(name="a", activation="softmax"), classifier(name="b", activation="softmax")]
    distiller = keras_kd.MutualDistiller(students, losses.DKDLoss())
    distiller.compile("sgd", "sparse_categorical_crossentropy", metrics=[keras_kd.metrics.TeacherAgreement()])
    history = distiller.fit(X, Y, sample_weight=np.linspace(0, 1, 16), validation_data=(X, Y), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert 0 <= history["val_a_teacher_agreement"][-1] <= 1
    assert set(distiller.predict(X, verbose=0)) == {"a", "b"}


def test_a_mutual_distiller_is_saved_and_goes_on(tmp_path):
    students = [classifier(4, name="a"), classifier(6, name="b")]
    distiller = keras_kd.MutualDistiller(students)
    distiller.compile("adam", CROSS_ENTROPY, metrics=["accuracy"])
    distiller.fit(X, Y, verbose=0)
    distiller.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    distiller.reset_metrics()  # `train_on_batch` of Keras 3.12 goes on from those of `fit`
    np.testing.assert_allclose(loaded.train_on_batch(X, Y), distiller.train_on_batch(X, Y), rtol=1e-5)
    for got, want in zip(weights_of(loaded), weights_of(distiller), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_students_that_teach_each_other_compare_no_layers():
    students = [classifier(4, name="a"), classifier(6, name="b")]
    name = f"a/{students[0].layers[0].name}"
    with pytest.raises(ValueError, match="compare outputs.*sp_loss"):
        keras_kd.MutualDistiller(students, losses.SPLoss(teacher_layer_name=name, student_layer_name=name))


# SimKD


def conv_net(width, *, name, size=8, pool=True, relu=True):
    model = keras.Sequential([keras.Input((size, size, 1)), layers.Conv2D(width, 3, padding="same", name="conv")], name=name)
    model.add(layers.BatchNormalization())
    if relu:
        model.add(layers.ReLU(name="act"))
    model.add(layers.GlobalAveragePooling2D() if pool else layers.Flatten())
    model.add(layers.Dropout(0.1))
    model.add(layers.Dense(3, activation="softmax", name="head"))
    return model


@pytest.mark.parametrize("relu", [True, False])
def test_a_student_reuses_the_classifier_of_its_teacher(relu):
    teacher, student = conv_net(8, name="teacher", relu=relu), conv_net(3, name="student")
    before = weights_of(teacher), weights_of(student)
    simkd = teachers.reuse_classifier(student, teacher)
    assert simkd.output_shape == (None, 3)
    head = next(layer for layer in simkd.layers if layer.name == "teacher_head")
    assert not head.trainable
    for got, want in zip(weights_of(head), weights_of(teacher.get_layer("head")), strict=True):
        np.testing.assert_array_equal(got, want)
    loss = losses.HintLoss(
        projector=None, teacher_layer_name=teachers.classifier_input(teacher), student_layer_name="simkd_projector"
    )
    distiller = keras_kd.Distiller(teacher, simkd, loss, student_loss_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.01))
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype("float32")
    values = distiller.fit(x, epochs=15, verbose=0).history["distillation_loss"]
    assert values[-1] < 0.7 * values[0]
    for kept, model in zip(before, (teacher, student), strict=True):
        for got, want in zip(weights_of(model), kept, strict=True):
            np.testing.assert_array_equal(got, want)
    for got, want in zip(weights_of(head), weights_of(teacher.get_layer("head")), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_student_with_the_teachers_feature_gives_the_teachers_answers():
    teacher = conv_net(8, name="teacher")
    simkd = teachers.reuse_classifier(teacher, teacher)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    feature = keras.Model(teacher.inputs[0], teacher.get_layer("act").output)(x)
    tail = keras.Sequential(simkd.layers[simkd.layers.index(simkd.get_layer("simkd_projector")) + 1 :])
    np.testing.assert_allclose(tail(feature), teacher(x), rtol=1e-5)


def test_larger_maps_of_the_student_are_shrunk_to_those_of_the_teacher(tmp_path):
    teacher, student = conv_net(8, name="teacher", size=8), conv_net(3, name="student", size=16)
    simkd = teachers.reuse_classifier(student, teacher, reduction=4)
    assert simkd.get_layer("simkd_projector").output.shape == (None, 8, 8, 8)
    simkd.save(tmp_path / "simkd.keras")
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype("float32")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "simkd.keras")(x), simkd(x), rtol=1e-5)


def test_vectors_are_projected_by_dense_layers():
    simkd = teachers.reuse_classifier(classifier(4), classifier(16))
    assert simkd.get_layer("simkd_projector").output.shape == (None, 16)


def test_models_without_a_classifier_at_the_end_are_refused():
    x = keras.Input((4,))
    bare = keras.Model(x, layers.LayerNormalization(name="norm")(x))
    with pytest.raises(ValueError, match="No dense layer ends the teacher.*norm at its end.*`teacher_layer_name`"):
        teachers.reuse_classifier(classifier(4), bare)
    a, b = layers.Dense(4)(x), layers.Dense(4)(x)
    branched = keras.Model(x, layers.Dense(3)(layers.Add(name="add")([a, b])))
    with pytest.raises(ValueError, match="Only a chain of layers.*Received: add"):
        teachers.reuse_classifier(classifier(4), branched, teacher_layer_name=a._keras_history[0].name)


# Chains: no machinery is needed


def test_a_teacher_assistant_and_born_again_generations_are_distillers_in_a_row():
    """The recipe of docs/teachers.md: each student is the teacher of the next."""
    teacher = classifier(32, name="teacher")
    generations = [classifier(16, name="assistant"), classifier(8, name="student"), classifier(8, name="born_again")]
    teacher.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype("float32")
    y = np.argmax(x[:, :3] + x[:, 1:], axis=-1)
    teacher.fit(x, y, epochs=20, verbose=0)
    for student in generations:
        distiller = keras_kd.Distiller(teacher, student, losses.KDLoss(temperature=2.0), student_loss_weight=0.1)
        distiller.compile(keras.optimizers.Adam(0.02), CROSS_ENTROPY, metrics=[keras_kd.metrics.TeacherAgreement()])
        history = distiller.fit(x, y, epochs=20, verbose=0).history
        assert history["teacher_agreement"][-1] > 0.9
        teacher = student
