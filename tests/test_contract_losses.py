"""The same demands on every public loss: adding one to `keras_kd.losses` enrols it here."""

import copy
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd import losses
from tests.conftest import classifier

BASES = (losses.DistillationLoss, losses.ResponseLoss)
PUBLIC = [
    value
    for name, value in vars(losses).items()
    if name in losses.__all__ and inspect.isclass(value) and issubclass(value, losses.DistillationLoss) and value not in BASES
]
# A student that equals its teacher has no loss, except where the loss is a cross-entropy.
NOT_ZERO_AT_EQUALITY = (losses.NKDLoss,)

RNG = np.random.default_rng(5)
T, S = 2 * RNG.normal(size=(6, 4)), 2 * RNG.normal(size=(6, 4))
LABELS = RNG.integers(0, 4, size=6)

every_loss = pytest.mark.parametrize("make", PUBLIC, ids=lambda loss: loss.__name__)


def targets(loss, teacher):
    labels = LABELS[: len(teacher)] if np.ndim(teacher) == 2 else np.zeros(np.shape(teacher)[:-1], int)
    return {"teacher": teacher, "labels": labels} if loss.uses_labels else teacher


def gradient(loss, y_true, student):
    student = tf.convert_to_tensor(student)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(y_true, student)
    return value, tape.gradient(value, student)


def test_all_public_losses_are_found():
    assert {loss.__name__ for loss in PUBLIC} >= {"KDLoss", "DKDLoss", "DISTLoss", "NKDLoss", "MultiLevelKDLoss"}


@every_loss
def test_a_config_round_trip_keeps_every_argument_and_the_value(make):
    loss = make(name="mine", reduction="sum", dtype="float64", output_name="digit")
    if hasattr(loss, "temperature"):
        loss.temperature = 2.25  # assigned later: the config holds what is true now
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert again.get_config() == loss.get_config()
    assert set(inspect.signature(make.__init__).parameters) - {"self", "kwargs"} <= set(loss.get_config())
    np.testing.assert_array_equal(again(targets(loss, T), S), loss(targets(loss, T), S))


@every_loss
def test_a_copy_is_independent_of_the_original(make):
    loss = make()
    before = float(loss(targets(loss, T), S))
    twin = copy.deepcopy(loss)
    if hasattr(twin, "temperature"):
        twin.temperature = 9.0
    assert float(loss(targets(loss, T), S)) == before


@every_loss
def test_one_value_comes_per_sample_and_their_mean_is_the_loss(make):
    loss, per_sample = make(dtype="float64"), make(dtype="float64", reduction="none")
    values = per_sample(targets(loss, T), S)
    assert values.shape == (6,)
    np.testing.assert_allclose(loss(targets(loss, T), S), np.mean(values), rtol=1e-12)


@every_loss
def test_sample_weights_weigh_the_values(make):
    loss, per_sample = make(dtype="float64"), make(dtype="float64", reduction="none")
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    expected = np.mean(weights * np.array(per_sample(targets(loss, T), S)))
    np.testing.assert_allclose(loss(targets(loss, T), S, weights), expected, rtol=1e-12)


@every_loss
def test_sequences_give_one_value_per_position(make):
    loss = make(reduction="none")
    sequence = np.stack([T, T])
    assert loss(targets(loss, sequence), np.stack([S, S])).shape == (2, 6)


@every_loss
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(make):
    if make in NOT_ZERO_AT_EQUALITY:
        pytest.skip("a cross-entropy")
    loss = make(dtype="float64")
    value, slope = gradient(loss, targets(loss, T), T)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-12)


@every_loss
def test_eager_graph_and_xla_agree(make):
    loss = make()
    student = tf.constant(S, tf.float32)
    expected = [np.array(part) for part in gradient(loss, targets(loss, T), student)]
    for jit in (False, True):
        compiled = tf.function(lambda s: gradient(loss, targets(loss, T), s), jit_compile=jit)
        for got, want in zip(compiled(student), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@every_loss
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_outputs_are_computed_in_float32(make, dtype):
    loss = make(dtype=dtype)
    assert loss.dtype == "float32"
    teacher, student = tf.cast(T, dtype), tf.cast(S, dtype)
    expected = loss(targets(loss, tf.cast(teacher, "float32")), tf.cast(student, "float32"))
    value = loss(targets(loss, teacher), student)
    assert value.dtype == tf.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@every_loss
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (1e4 * np.sign(T), -1e4 * np.sign(T)),
        (1e4 * T, 1e4 * S),
        (np.zeros((6, 4)), np.zeros((6, 4))),
        (np.ones((6, 4)), 7 * np.ones((6, 4))),
        (np.full((6, 4), 0.1), np.full((6, 4), -0.3)),
        (T[:1], S[:1]),
        (np.zeros((1, 4)), np.zeros((1, 4))),
        (T[:, :2], S[:, :2]),
    ],
    ids=[
        "opposite extremes",
        "extremes",
        "zeros",
        "constants",
        "rounded constants",
        "one sample",
        "one zero sample",
        "two classes",
    ],
)
def test_values_and_gradients_stay_finite(make, teacher, student):
    loss = make()
    y_true = targets(loss, teacher.astype("float32"))
    if loss.uses_labels:
        y_true["labels"] = y_true["labels"] % teacher.shape[-1]
    value, slope = gradient(loss, y_true, student.astype("float32"))
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert np.max(np.abs(slope)) < 1e3  # and not just below overflow


@every_loss
def test_it_trains_a_plain_model_on_stored_teacher_outputs(make):
    loss = make()
    student = classifier(classes=4)
    student.compile("adam", loss=loss if not loss.uses_labels else lambda y, p: loss({"teacher": y, "labels": LABELS}, p))
    history = student.fit(RNG.normal(size=(6, 4)), T, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]


@every_loss
def test_it_stands_in_a_keras_distillation_distiller(make):
    loss = make()
    if loss.uses_labels:
        pytest.skip("keras.distillation hands no labels to its losses")
    teacher, student = classifier(classes=4), classifier(classes=4)
    distiller = keras.distillation.Distiller(teacher, student, loss, student_loss_weight=0.0)
    distiller.compile(keras.optimizers.SGD(0.0), loss="sparse_categorical_crossentropy")
    x = RNG.normal(size=(6, 4)).astype("float32")
    logs = distiller.train_on_batch(x, LABELS, return_dict=True)
    np.testing.assert_allclose(logs["distillation_loss"], loss(teacher(x), student(x)), rtol=1e-5)


@every_loss
def test_it_survives_saving_a_compiled_distiller(make, tmp_path):
    loss = make()
    teacher, student = classifier(classes=4), classifier(classes=4)
    distiller = keras_kd.Distiller(teacher, student, loss)
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.teacher = teacher
    x = RNG.normal(size=(6, 4)).astype("float32")
    assert loaded.evaluate(x, LABELS, verbose=0) == pytest.approx(distiller.evaluate(x, LABELS, verbose=0))


@every_loss
def test_its_docstring_has_an_equation_an_example_and_a_reference(make):
    doc = inspect.getdoc(make)
    for part in ("```", "Args:", "Call arguments:", "Returns:", "Raises:", "Example:", ">>> ", "Reference:"):
        assert part in doc, part
