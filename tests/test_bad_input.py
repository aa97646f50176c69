"""Each wrong call of the Distiller gets an error that names the argument, the rule, what came and the way out."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from keras_kd import Distiller, losses
from tests.conftest import classifier

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def two_outputs(kind):
    inputs = keras.Input((4,))
    a, b = layers.Dense(3, name="a")(inputs), layers.Dense(5, name="b")(inputs)
    return keras.Model(inputs, [a, b] if kind == "list" else {"a": a, "b": b})


@pytest.mark.parametrize("wrong", ["resnet", None, 3, lambda x: x, layers.Dense(3)])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_is_no_model_is_refused(role, wrong):
    models = {"teacher": classifier(), "student": classifier()} | {role: wrong}
    with pytest.raises(TypeError, match=rf"`{role}` must be a keras\.Model\. Received: {role}="):
        Distiller(**models)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_unbuilt_model_is_refused(role):
    unbuilt = keras.Sequential([layers.Dense(3)], name="raw")
    models = {"teacher": classifier(), "student": classifier()} | {role: unbuilt}
    with pytest.raises(ValueError, match=rf'`{role}` must be built.*"raw".*{role}\.build'):
        Distiller(**models)


def test_a_teacher_that_is_the_student_is_refused():
    model = classifier()
    with pytest.raises(ValueError, match="The teacher is the student"):
        Distiller(model, model)
    distiller = Distiller(classifier(), model)
    with pytest.raises(ValueError, match="The teacher is the student"):
        distiller.teacher = model


def test_output_shapes_that_do_not_match_are_refused_at_once():
    with pytest.raises(ValueError, match=re.escape("Received: teacher [(None, 4)], student [(None, 3)]")):
        Distiller(classifier(classes=4), classifier(classes=3))
    with pytest.raises(ValueError, match="outputs of the same shapes"):
        Distiller(two_outputs("list"), classifier())


def test_output_structures_that_do_not_match_are_refused(data):
    distiller = Distiller(two_outputs("list"), two_outputs("dict"))
    distiller.compile("sgd")
    with pytest.raises(ValueError, match="same structure of outputs"):
        distiller.fit(data[0], verbose=0)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], 1.0, []])
def test_weights_of_the_wrong_length_are_refused(weights):
    with pytest.raises(ValueError, match=r"one number per distillation loss.*for 2 losses"):
        Distiller(classifier(), classifier(), ["kd_loss", "dist_loss"], weights)


@pytest.mark.parametrize(("weights", "error"), [([-1.0], ValueError), ([float("nan")], ValueError), (["much"], TypeError)])
def test_weights_that_are_no_weights_are_refused(weights, error):
    with pytest.raises(error, match=r"`distillation_loss_weights\[0\]` must"):
        Distiller(classifier(), classifier(), ["kd_loss"], weights)


@pytest.mark.parametrize(("weight", "error"), [(-0.1, ValueError), (1.5, ValueError), ("half", TypeError), (None, TypeError)])
def test_a_student_loss_weight_outside_0_to_1_is_refused(weight, error):
    with pytest.raises(error, match="`student_loss_weight` must be"):
        Distiller(classifier(), classifier(), student_loss_weight=weight)
    distiller = Distiller(classifier(), classifier())
    with pytest.raises(error, match="`student_loss_weight` must be"):
        distiller.student_loss_weight = weight
    assert distiller.student_loss_weight == 0.5


def test_labels_that_are_missing_are_named(data):
    distiller = Distiller(classifier(), classifier(), losses.DKDLoss())
    distiller.compile("sgd")
    with pytest.raises(ValueError, match="DKDLoss compares with the ground truth"):
        distiller.fit(data[0], verbose=0)
    distiller = Distiller(classifier(), classifier())
    distiller.compile("sgd", loss=FROM_LOGITS)
    with pytest.raises(ValueError, match="loss=None to learn from the teacher alone"):
        distiller.fit(data[0], verbose=0)


def test_a_loss_that_is_no_loss_and_an_unknown_name_are_refused():
    with pytest.raises(TypeError, match="Received: 3 of type int"):
        Distiller(classifier(), classifier(), 3)
    with pytest.raises(ValueError, match="Unknown distillation loss 'kdd'"):
        Distiller(classifier(), classifier(), "kdd")
    with pytest.raises(ValueError, match="at least one loss"):
        Distiller(classifier(), classifier(), [])
    distiller = Distiller(classifier(), classifier())
    distiller.compile("sgd", loss="no_such_loss")
    with pytest.raises(ValueError, match="no_such_loss"):
        distiller.fit(np.zeros((4, 4)), np.zeros(4), verbose=0)


def test_fit_without_compile_is_an_error(data):
    with pytest.raises(ValueError, match=r"compile\(\)"):
        Distiller(classifier(), classifier()).fit(*data)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (np.nan, {}),
        (np.inf, {"run_eagerly": True}),
        (np.nan, {"jit_compile": True}),
        (np.inf, {"jit_compile": True}),
        (np.inf, {"steps_per_execution": 2}),
    ],
)
def test_a_teacher_that_gives_nan_is_named_and_the_student_survives(value, options, data):
    teacher, student = classifier(name="broken"), classifier()
    teacher.layers[-1].bias.assign([value, 0.0, 0.0])
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", **options)
    for run in (distiller.fit, distiller.evaluate):
        with pytest.raises(ValueError, match='The teacher "broken" gave NaN or infinite outputs'):
            run(data[0], batch_size=8, verbose=0)
    assert all(np.all(np.isfinite(w)) for w in student.get_weights())
    teacher.layers[-1].bias.assign([0.0, 0.0, 0.0])
    assert np.isfinite(distiller.fit(data[0], verbose=0).history["loss"][0])


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_layer_names_that_fit_nothing_list_the_candidates(which):
    names = {"teacher_layer_name": "first", "student_layer_name": "first"} | {f"{which}_layer_name": "conv9"}
    models = [keras.Sequential([keras.Input((4,)), layers.Dense(3, name="first"), layers.Dense(3, name="last")]) for _ in "ab"]
    with pytest.raises(ValueError, match=rf'No layer "conv9" in the {which}. Received: {which}_layer_name="conv9".*first, last'):
        Distiller(*models, losses.KDLoss(**names))


def test_one_of_two_layer_names_is_refused_for_losses_of_keras_too():
    half = keras.distillation.FeatureDistillation("mse", teacher_layer_name="first")
    with pytest.raises(ValueError, match="Give both `teacher_layer_name` and `student_layer_name`"):
        Distiller(classifier(), classifier(), half)


def test_a_softmax_loss_on_sigmoid_models_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'the teacher ends in a sigmoid. Use KDLoss\(activation="sigmoid"\)'):
        Distiller(classifier(activation="sigmoid"), classifier(activation="sigmoid"))


def test_an_output_name_that_does_not_exist_lists_the_names(data):
    distiller = Distiller(two_outputs("list"), two_outputs("list"), losses.KDLoss(output_name="c"))
    distiller.compile("sgd")
    with pytest.raises(ValueError, match=r"No output 'c'.*'a', 'b'"):
        distiller.fit(data[0], verbose=0)


def test_the_default_of_keras_logits_distillation_gets_a_warning():
    with pytest.warns(UserWarning, match=r"without softmax.*KDLoss\(temperature=3\.0\)"):
        Distiller(classifier(), classifier(), keras.distillation.LogitsDistillation())


def test_sample_weights_with_a_loss_of_keras_distillation_get_a_warning(data):
    distiller = Distiller(classifier(), classifier(), keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence()))
    distiller.compile("sgd", loss=FROM_LOGITS)
    with pytest.warns(UserWarning, match="takes no sample weights"):
        distiller.fit(*data, sample_weight=np.ones(24), verbose=0)


def test_a_structure_of_losses_that_does_not_match_the_outputs_is_named(data):
    distiller = Distiller(two_outputs("list"), two_outputs("list"), keras.distillation.FeatureDistillation("mse"))
    distiller.compile("sgd")
    with pytest.raises(ValueError, match="structure of losses in feature_distillation does not match the outputs"):
        distiller.fit(data[0], verbose=0)


def test_a_student_that_would_train_the_teachers_own_weights_is_refused():
    teacher = classifier()
    stem = teacher.layers[0]
    student = keras.Model(teacher.inputs, layers.Dense(3)(stem.output))
    with pytest.raises(ValueError, match=r"they share the weights .*kernel.*clone_model"):
        Distiller(teacher, student)
    stem.trainable = False
    assert Distiller(teacher, student).teacher is teacher


def test_a_stateful_teacher_is_refused():
    teacher = keras.Sequential([keras.Input((3, 4), batch_size=2), layers.LSTM(5, stateful=True, name="memory"), layers.Dense(3)])
    student = keras.Sequential([keras.Input((3, 4)), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(ValueError, match="The teacher's layers memory are stateful"):
        Distiller(teacher, student)


def test_inputs_of_different_shapes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"teacher \[\(None, 6\)\], student \[\(None, 4\)\]. Pass teacher_preprocessing="):
        Distiller(classifier(features=6), classifier(features=4))


def test_a_softmax_teacher_and_a_sigmoid_student_are_refused_at_once():
    with pytest.raises(ValueError, match="a teacher that ends in softmax, a student that ends in sigmoid"):
        Distiller(classifier(activation="softmax"), classifier(activation="sigmoid"))


def test_a_loss_without_call_says_what_to_implement():
    class Empty(losses.DistillationLoss):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must implement call\(y_true, y_pred\)"):
        Empty()(np.zeros((1, 2)), np.zeros((1, 2)))


def test_a_teacher_may_bear_any_name():
    with pytest.raises(ValueError, match="outputs of the same shapes"):
        Distiller(classifier(classes=5, name="absent"), classifier(classes=3))


def test_weights_may_come_as_numpy_numbers():
    for weights in (np.float32(2.0), np.array([2.0]), 2.0, [2.0], (2,)):
        distiller = Distiller(classifier(), classifier(), "kd_loss", weights)
        assert distiller.distillation_loss_weights == [2.0]
        distiller.distillation_loss_weights = weights
        assert [type(weight) for weight in distiller.distillation_loss_weights] in ([float], [int])


def test_a_feature_loss_of_keras_that_would_broadcast_is_refused():
    name = {"teacher_layer_name": "wide", "student_layer_name": "narrow"}
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="wide"), layers.Dense(3)])
    student = keras.Sequential([keras.Input((4,)), layers.Dense(1, name="narrow"), layers.Dense(3)])
    distiller = Distiller(teacher, student, keras.distillation.FeatureDistillation("mse", **name))
    distiller.compile("sgd")
    with pytest.raises(ValueError, match=r"teacher \(8, 5\), student \(8, 1\) in feature_distillation.*HintLoss"):
        distiller.train_on_batch(np.ones((8, 4), "float32"))
