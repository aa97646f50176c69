"""teacher_channels: losses on layers that compare chosen channels of the teacher, and a Distiller that finds those of surgery."""

import copy
import gc

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import losses, surgery
from tests.conftest import convolutional

RNG = np.random.default_rng(4)
X, Y = RNG.normal(size=(12, 8, 8, 1)).astype("float32"), RNG.integers(0, 4, size=12)
TEACHER, STUDENT = RNG.normal(size=(3, 4, 4, 6)), RNG.normal(size=(3, 4, 4, 2))
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BY_LAYER = {"teacher_layer_name": "conv2", "student_layer_name": "conv2"}


def pruned(channels=None):
    """A teacher, and what surgery made of it without data."""
    teacher = convolutional((5, 8))
    return teacher, surgery.remove_channels(teacher, channels or {"conv1": [0, 3], "conv2": [1, 2, 6]})


def test_the_value_is_that_of_the_slice_and_nothing_is_projected():
    loss = losses.HintLoss(teacher_channels=[4, 1], dtype="float64")
    np.testing.assert_allclose(loss(TEACHER, STUDENT), np.mean(np.square(STUDENT - TEACHER[..., [4, 1]])), rtol=1e-12)
    assert loss.variables == []


MAKERS = [
    losses.HintLoss,
    losses.AttentionTransferLoss,
    losses.NSTLoss,
    losses.FactorTransferLoss,
    losses.ABLoss,
    losses.ReviewKDLoss,
    losses.RKDLoss,
    losses.SPLoss,
    losses.PKTLoss,
    losses.CorrelationLoss,
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_loss_compares_with_the_slice(make):
    sliced = make(dtype="float64")(TEACHER[..., [4, 1]], STUDENT)
    np.testing.assert_allclose(make(teacher_channels=[4, 1], dtype="float64")(TEACHER, STUDENT), sliced, rtol=1e-12)
    assert float(make(dtype="float64", teacher_channels=[1, 4])(TEACHER, STUDENT)) != 0


def test_layers_of_a_loss_are_made_for_the_slice_and_rebuilt_for_it():
    loss = losses.VIDLoss(teacher_channels=[4, 1])
    loss(TEACHER, STUDENT)
    assert [layer.units for layer in loss.layers[0].layers] == [2, 2, 2]
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    again.build_from_config(loss.get_build_config())
    assert [tuple(v.shape) for v in again.variables] == [tuple(v.shape) for v in loss.variables]
    again(TEACHER, STUDENT)


def test_several_layers_take_a_list_each_and_none_takes_all():
    loss = losses.FSPLoss(teacher_channels=[None, [4, 1]], dtype="float64")
    first = RNG.normal(size=(3, 4, 4, 5))
    value = loss([first, TEACHER], [first, STUDENT])
    plain = losses.FSPLoss(dtype="float64")
    np.testing.assert_allclose(value, plain([first, TEACHER[..., [4, 1]]], [first, STUDENT]), rtol=1e-12)
    hint = losses.HintLoss(teacher_channels=[None, [4, 1]])
    hint([TEACHER, TEACHER], [STUDENT, STUDENT])
    assert len(hint.layers) == 1  # the projector of the first


def test_the_indices_of_a_report_are_looked_up_by_layer():
    kept = {"conv1": np.array([1, 2]), "conv2": np.array([0, 3]), "pool": np.array([0, 3])}
    loss = losses.HintLoss(teacher_channels=kept, teacher_layer_name=["conv2", "conv1:0"], student_layer_name=["x", "y"])
    assert loss.get_config()["teacher_channels"] == [[0, 3], [1, 2]]
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert again.get_config() == loss.get_config()
    assert copy.deepcopy(loss).teacher_channels == loss.teacher_channels


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        ([0, 1, 2], ValueError, "`teacher_channels` must hold one index for each channel of the student. Received: 3 indices"),
        ([0, 6], ValueError, "`teacher_channels` must be below the teacher's number of channels. Received: index 6"),
        ([0, -1], ValueError, "`teacher_channels` must hold one index or more for each layer, none below 0"),
        ([], ValueError, "`teacher_channels` must hold one index or more"),
        ([[0, 1], [0, 1]], ValueError, "`teacher_channels` must hold indices, or None, for each of 1 layers. Received: 2 lists"),
        ([0.0, 1.0], TypeError, "`teacher_channels` must be whole numbers. Received: float64"),
        ([True, False], TypeError, "`teacher_channels` must be whole numbers. Received: bool"),
        ("all", TypeError, '`teacher_channels` must be "auto", None, indices'),
        (3, TypeError, '`teacher_channels` must be "auto", None, indices'),
        ({"conv2": [0, 1]}, ValueError, "A dict for `teacher_channels` is looked up by `teacher_layer_name`"),
    ],
)
def test_wrong_channels_are_named(channels, error, message):
    with pytest.raises(error, match=message):
        losses.HintLoss(teacher_channels=channels)(TEACHER, STUDENT)


def test_channels_and_names_or_a_projector_must_go_together():
    with pytest.raises(ValueError, match='`teacher_channels` must know the layer "conv2" of `teacher_layer_name`. Received: conv1'):
        losses.HintLoss(teacher_channels={"conv1": [0]}, **BY_LAYER)
    with pytest.raises(ValueError, match="for each of 1 layers. Received: 2 lists"):
        losses.HintLoss(teacher_channels=[[0], [1]], **BY_LAYER)
    with pytest.raises(ValueError, match="`teacher_channels` are compared without a projector: give one of the two"):
        losses.HintLoss(keras.layers.Dense(6), teacher_channels=[0, 1])


def distilled(teacher, student, *made):
    distiller = keras_kd.Distiller(teacher, student, list(made))
    distiller.compile("sgd", loss=FROM_LOGITS)
    return distiller


@pytest.mark.parametrize("make", [losses.HintLoss, losses.ABLoss, losses.FSPLoss])
def test_a_distiller_takes_the_channels_that_surgery_kept_of_this_teacher(make, tmp_path):
    teacher, student = pruned()
    names = ["conv1", "conv2"] if make is losses.FSPLoss else "conv2"
    layers = {"teacher_layer_name": names, "student_layer_name": names}
    told = make(teacher_channels=surgery.kept_channels(student), **layers)
    found = make(**layers)
    distiller = distilled(teacher, student, losses.KDLoss(), found)
    expected = distilled(teacher, student, losses.KDLoss(), told).evaluate(X, Y, verbose=0)
    assert distiller.evaluate(X, Y, verbose=0) == expected
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.teacher = keras.models.clone_model(teacher)  # no original in memory any more, and not needed
    loaded.teacher.set_weights(teacher.get_weights())
    assert loaded.evaluate(X, Y, verbose=0) == expected
    assert loaded.distillation_losses[1].teacher_channels == told.teacher_channels
    assert found.teacher_channels == "auto"  # the loss is as it was, and serves others
    assert [one.layers for one in (found, told, loaded.distillation_losses[1])] == [[], [], []]


def test_a_step_trains_the_student_alone_and_a_student_that_equals_the_slice_has_no_loss():
    teacher, student = pruned()
    hint = losses.HintLoss(teacher_layer_name="conv1", student_layer_name="conv1")
    distiller = distilled(teacher, student, losses.KDLoss(), hint)
    logs = distiller.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(logs["hint_loss"], 0, atol=1e-12)
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    assert distiller.train_on_batch(X, Y, return_dict=True)["hint_loss"] > 1e-9  # the step has moved it


def test_layers_are_compared_over_several_surgeries_and_inside_nested_models():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(5, name="b")], name="inner")
    vector = keras.Input((4,))
    first = keras.Model(vector, keras.layers.Dense(4, name="head")(inner(vector)))
    second = surgery.remove_channels(first, {"inner/a": [0, 5]})
    third = surgery.remove_channels(second, {"inner/a": [1]})
    x = RNG.normal(size=(5, 4)).astype("float32")
    for teacher in (first, second):
        hint = losses.HintLoss(teacher_layer_name="inner/a", student_layer_name="a")
        np.testing.assert_allclose(distilled(teacher, third, hint).evaluate(x, np.zeros(5), verbose=0)[1], 0, atol=1e-12)


def test_another_teacher_of_the_same_architecture_has_other_channels_and_gets_a_projector():
    teacher, student = pruned()
    other = keras.models.clone_model(teacher)
    hint = losses.HintLoss(**BY_LAYER)
    distiller = distilled(other, student, hint)
    assert len(hint.layers) == 1
    distiller.teacher = teacher  # the projector is there
    assert len(hint.layers) == 1
    distiller.train_on_batch(X, Y)


def test_a_new_teacher_that_needs_a_projector_asks_for_a_new_compile():
    teacher, student = pruned()
    hint = losses.HintLoss(**BY_LAYER)
    distiller = distilled(teacher, student, hint)
    before = distiller.evaluate(X, Y, verbose=0)
    with pytest.raises(ValueError, match="inputs of different shapes"):
        distiller.teacher = convolutional(size=9)
    assert distiller.evaluate(X, Y, verbose=0) == before
    distiller.teacher = keras.models.clone_model(teacher)
    assert len(hint.layers) == 1
    with pytest.raises(ValueError, match="Call `distiller.compile"):
        distiller.train_on_batch(X, Y)


def test_layers_of_other_names_and_given_projectors_are_taken_as_they_are():
    teacher, student = pruned()
    hints = [
        losses.HintLoss(teacher_layer_name="pool", student_layer_name="pool", teacher_channels=None),
        losses.HintLoss(keras.layers.Dense(8), **BY_LAYER),
        losses.VIDLoss(**BY_LAYER),
        losses.SPLoss(**BY_LAYER),
    ]
    distilled(teacher, student, *hints).train_on_batch(X, Y)
    assert [len(hint.layers) for hint in hints] == [1, 1, 2, 0]
    assert hints[2].layers[0].layers[-1].units == 8


def test_a_list_of_layers_may_need_a_projector_for_some_and_keeps_its_teacher():
    teacher, student = pruned()
    hint = losses.HintLoss(teacher_layer_name=["conv1", "pool"], student_layer_name=["conv1", "head"])
    distiller = distilled(teacher, student, hint)
    assert [layer.units for layer in hint.layers] == [8]
    distiller.train_on_batch(X, Y)
    distiller.teacher = teacher
    distiller.train_on_batch(X, Y)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_it_trains_in_mixed_precision_and_compiled_by_xla(policy):
    keras.config.set_dtype_policy(policy)
    try:
        teacher, student = pruned()
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = keras_kd.Distiller(teacher, student, losses.HintLoss(**BY_LAYER))
    distiller.compile("sgd", loss=FROM_LOGITS, jit_compile=True)
    assert np.isfinite(distiller.train_on_batch(X, Y, return_dict=True)["loss"])


def test_a_recording_of_this_teacher_has_its_channels_and_one_opened_by_its_path_does_not(tmp_path):
    teacher, student = pruned()
    recording = keras_kd.record_teacher(teacher, (X, Y), tmp_path / "said", layer_names=["conv2"], dtype="float32", verbose=0)
    hint = losses.HintLoss(**BY_LAYER)
    live = distilled(teacher, student, losses.HintLoss(**BY_LAYER)).evaluate(X, Y, verbose=0)
    found = distilled(recording, student, hint).evaluate(recording.dataset(12), verbose=0)
    np.testing.assert_allclose(found, live, rtol=1e-5)
    assert hint.layers == []
    projected = losses.HintLoss(**BY_LAYER)
    distilled(keras_kd.Recording(tmp_path / "said"), student, projected)
    assert len(projected.layers) == 1


def test_a_recording_may_outlive_the_models_that_a_student_was_made_from(tmp_path):
    teacher, student = pruned()
    recording = keras_kd.record_teacher(teacher, (X, Y), tmp_path / "said", layer_names=["conv2"], verbose=0)
    opened = keras_kd.Recording(tmp_path / "said")
    del teacher
    gc.collect()
    for known in (recording, opened):
        hint = losses.HintLoss(**BY_LAYER)
        distilled(known, student, hint)
        assert len(hint.layers) == 1
