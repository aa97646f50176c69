"""Values and gradients of the response losses against `tests/references.py`, in float64 to 1e-9."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kd import losses
from tests import references

RNG = np.random.default_rng(11)
T, S = 3 * RNG.normal(size=(6, 5)), 3 * RNG.normal(size=(6, 5))
LABELS = np.array([0, 4, 2, 1, 3, 0])


def value_and_gradient(loss, y_true, student):
    student = tf.constant(student, dtype=loss.dtype)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(y_true, student)
    return value.numpy(), tape.gradient(value, student).numpy()


def assert_matches(loss, y_true, reference, student=S):
    value, gradient = value_and_gradient(loss, y_true, student)
    np.testing.assert_allclose(value, np.real(reference(student)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient, references.gradient(reference, student), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize(("targets", "mix"), [("soft", 0.5), ("hard", 0.5), ("mixed", 0.5), ("mixed", 0.9)])
@pytest.mark.parametrize("temperature", [1.0, 3.3])
def test_kd_equals_its_formula(temperature, targets, mix, kind, standardized):
    loss = losses.KDLoss(temperature, targets, mix=mix, divergence=kind, standardize=standardized, dtype="float64")
    assert_matches(loss, T, lambda s: np.mean(references.kd(T, s, temperature, targets, mix, kind, standardized)))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("targets", ["soft", "hard", "mixed"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_binary_kd_equals_its_formula(outputs, targets, kind):
    loss = losses.KDLoss(2.5, targets, divergence=kind, activation="sigmoid", dtype="float64")
    teacher, student = T[:, :outputs], S[:, :outputs]
    assert_matches(loss, teacher, lambda s: np.mean(references.binary_kd(teacher, s, 2.5, targets, 0.5, kind)), student)


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], np.eye(5)[LABELS]], ids=["indices", "column", "one-hot"])
def test_dkd_equals_its_formula_for_labels_of_every_form(labels):
    loss = losses.DKDLoss(alpha=0.7, beta=3.0, temperature=2.5, dtype="float64")
    assert_matches(loss, {"teacher": T, "labels": labels}, lambda s: np.mean(references.dkd(T, s, LABELS, 0.7, 3.0, 2.5)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_nkd_equals_its_formula(temperature):
    loss = losses.NKDLoss(gamma=0.8, temperature=temperature, dtype="float64")
    assert_matches(loss, {"teacher": T, "labels": LABELS}, lambda s: np.mean(references.nkd(T, s, LABELS, 0.8, temperature)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_equals_its_formula(temperature):
    loss = losses.DISTLoss(beta=0.6, gamma=1.7, temperature=temperature, dtype="float64")
    assert_matches(loss, T, lambda s: references.dist(T, s, 0.6, 1.7, temperature))


def test_multi_level_equals_its_formula():
    assert_matches(losses.MultiLevelKDLoss(dtype="float64"), T, lambda s: references.multi_level(T, s))


def test_the_defaults_are_the_published_ones():
    labels = {"teacher": T, "labels": LABELS}
    for loss, y_true, expected in [
        (losses.KDLoss(dtype="float64"), T, np.mean(references.kd(T, S))),
        (losses.DKDLoss(dtype="float64"), labels, np.mean(references.dkd(T, S, LABELS))),
        (losses.NKDLoss(dtype="float64"), labels, np.mean(references.nkd(T, S, LABELS))),
        (losses.DISTLoss(dtype="float64"), T, references.dist(T, S)),
        (losses.MultiLevelKDLoss(dtype="float64"), T, references.multi_level(T, S)),
    ]:
        np.testing.assert_allclose(loss(y_true, S), expected, rtol=1e-9)


def test_with_two_classes_dkd_is_its_target_part_and_finite():
    teacher, student, labels = T[:, :2], S[:, :2], LABELS % 2
    loss = losses.DKDLoss(alpha=1.0, beta=8.0, dtype="float64")
    value, gradient = value_and_gradient(loss, {"teacher": teacher, "labels": labels}, student)
    p_t, p_s = references.softmax(teacher / 4), references.softmax(student / 4)
    np.testing.assert_allclose(value, 16 * np.mean(references.divergence(p_t, p_s, "forward_kl")), rtol=1e-9)
    assert np.all(np.isfinite(gradient))


def test_rows_without_a_label_count_nothing_in_losses_that_use_labels():
    labels = LABELS.copy()
    labels[[1, 3]] = -1
    for loss in (losses.DKDLoss(reduction="none"), losses.NKDLoss(reduction="none")):
        with_all = np.array(loss({"teacher": T, "labels": LABELS}, S))
        values = np.array(loss({"teacher": T, "labels": labels}, S))
        np.testing.assert_array_equal(values[[1, 3]], 0)
        np.testing.assert_allclose(values[[0, 2, 4, 5]], with_all[[0, 2, 4, 5]])


PLAIN = [losses.KDLoss, losses.DISTLoss, losses.MultiLevelKDLoss]


@pytest.mark.parametrize("make", PLAIN)
def test_probabilities_give_the_value_of_their_logits(make):
    expected = make(dtype="float64")(T, S)
    given = make(from_logits=False, dtype="float64")(references.softmax(T), references.softmax(S))
    np.testing.assert_allclose(given, expected, rtol=1e-9)


def test_binary_probabilities_give_the_value_of_their_logits():
    expected = losses.KDLoss(activation="sigmoid", dtype="float64")(T, S)
    probabilities = [1 / (1 + np.exp(-z)) for z in (T, S)]
    np.testing.assert_allclose(losses.KDLoss(activation="sigmoid", from_logits=False, dtype="float64")(*probabilities), expected)


def test_a_softmax_that_underflowed_is_read_through_its_logits():
    logits = np.array([[60.0, 0.0, -60.0]], dtype="float32")
    student = keras.activations.softmax(tf.constant(-logits))  # float32 holds nothing of e^-120
    value = losses.KDLoss(1.0, from_logits=False)(keras.activations.softmax(tf.constant(logits)), student)
    np.testing.assert_allclose(value, 120.0, rtol=1e-6)


def test_a_softmax_output_without_from_logits_is_an_error_that_asks_for_it():
    student = keras.activations.softmax(tf.constant(S))
    with pytest.raises(ValueError, match="from_logits=False"):
        losses.KDLoss()(T, student)


@pytest.mark.parametrize("make", PLAIN)
def test_padded_positions_count_nothing_even_in_statistics_of_the_batch(make):
    teacher, student = T.reshape(2, 3, 5), S.reshape(2, 3, 5)
    mask = np.array([[True, True, False], [True, False, False]])
    y_pred = tf.constant(student)
    y_pred._keras_mask = tf.constant(mask)
    loss = make(dtype="float64")
    # Keras 3.12 forms the mean over a mask in float32.
    np.testing.assert_allclose(loss(teacher, y_pred), loss(teacher[mask], student[mask]), rtol=1e-7)


def test_token_losses_give_a_value_for_each_position_and_take_weights_per_sample_or_position():
    teacher, student = T.reshape(2, 3, 5), S.reshape(2, 3, 5)
    loss = losses.KDLoss(reduction="none", dtype="float64")
    values = references.kd(teacher, student)
    assert loss(teacher, student).shape == (2, 3)
    np.testing.assert_allclose(loss(teacher, student, np.array([1.0, 3.0])), values * [[1.0], [3.0]])
    per_position = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(loss(teacher, student, per_position), values * per_position)


def test_a_temperature_reads_as_it_was_set_and_reaches_compiled_steps():
    loss = losses.KDLoss(temperature=4, dtype="float64")
    compiled = tf.function(lambda: loss(T, S))
    assert loss.temperature == 4
    np.testing.assert_allclose(compiled(), np.mean(references.kd(T, S, 4)))
    loss.temperature = 1.7
    assert loss.temperature == 1.7
    np.testing.assert_allclose(compiled(), np.mean(references.kd(T, S, 1.7)), rtol=1e-9)
    assert compiled.experimental_get_tracing_count() == 1


def test_one_of_several_temperatures_can_be_assigned():
    loss = losses.MultiLevelKDLoss([2.0, 3.0], dtype="float64")
    compiled = tf.function(lambda: loss(T, S))
    compiled()
    loss.temperatures[0] = 5.0
    assert loss.temperatures == [5.0, 3.0]
    np.testing.assert_allclose(compiled(), references.multi_level(T, S, (5.0, 3.0)), rtol=1e-9)
    with pytest.raises(TypeError, match="fixed length"):
        loss.temperatures.append(1.0)
    with pytest.raises(ValueError, match="keep its length, 2"):
        loss.temperatures = [1.0, 2.0, 3.0]


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [losses.KDLoss, losses.DKDLoss, losses.DISTLoss, losses.NKDLoss])
def test_a_temperature_that_is_not_above_zero_is_refused(make, temperature):
    with pytest.raises(ValueError, match="`temperature` must be"):
        make(temperature=temperature)
    loss = make()
    with pytest.raises(ValueError, match="`temperature` must be"):
        loss.temperature = temperature
    assert loss.temperature > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "hot"}, "`temperature` must be a number"),
        ({"targets": "firm"}, "`targets` must be one of 'soft', 'hard', 'mixed'"),
        ({"divergence": "kl"}, "`divergence` must be one of"),
        ({"mix": 1.5}, "`mix` must be between 0 and 1"),
        ({"activation": "relu"}, "`activation` must be one of"),
        ({"activation": "sigmoid", "standardize": True}, "`standardize=True`"),
        ({"from_logits": "yes"}, "`from_logits` must be"),
        ({"teacher_layer_name": "conv"}, "Give both"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        losses.KDLoss(**arguments)


def test_bad_weights_and_empty_temperatures_are_refused():
    for make in (lambda: losses.DKDLoss(alpha=-1), lambda: losses.NKDLoss(gamma=-1), lambda: losses.DISTLoss(beta=-1)):
        with pytest.raises(ValueError, match="must not be negative"):
            make()
    with pytest.raises(ValueError, match="at least one"):
        losses.MultiLevelKDLoss([])
    with pytest.raises(TypeError, match="list of numbers"):
        losses.MultiLevelKDLoss("hot")


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"teacher \(6, 5\), student \(6, 4\)"):
        losses.KDLoss()(T, S[:, :4])


def test_a_softmax_over_one_class_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match='activation="sigmoid"'):
        losses.KDLoss()(T[:, :1], S[:, :1])


@pytest.mark.parametrize("make", [losses.DKDLoss, losses.NKDLoss])
def test_missing_labels_and_labels_of_another_shape_are_named(make):
    with pytest.raises(ValueError, match="got no labels"):
        make()(T, S)
    with pytest.raises(ValueError, match=r"labels of shape \(6, 3\)"):
        make()({"teacher": T, "labels": np.zeros((6, 3))}, S)


def test_a_loss_is_found_by_its_name():
    assert isinstance(losses.get("kd_loss"), losses.KDLoss)
    assert isinstance(losses.get("DISTLoss"), losses.DISTLoss)
    assert isinstance(losses.get("mean_squared_error"), keras.losses.MeanSquaredError)
    with pytest.raises(ValueError, match="Unknown distillation loss 'kdd'. Known: kd_loss"):
        losses.get("kdd")
    with pytest.raises(TypeError, match="Received: 3"):
        losses.get(3)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_mixed_targets_are_exact_for_a_confident_teacher(kind, mix):
    if (mix, kind) == (0.0, "reverse_kl"):
        pytest.skip("infinite")
    teacher, student = np.array([[100.0, 0.0, -20.0]]), np.array([[0.0, 1.0, 2.0]])
    loss = losses.KDLoss(1.0, "mixed", mix=mix, divergence=kind, dtype="float64")
    log_p, log_s = references.log_softmax(teacher), references.log_softmax(student)
    hard = np.array([[1.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        log_q = np.logaddexp(np.log(mix) + log_p, np.log((1 - mix) * hard))
    q, s = np.exp(log_q), np.exp(log_s)

    def kl(p, log_p, log_q):
        return np.sum(np.where(p > 0, p * (np.maximum(log_p, -1e300) - log_q), 0))

    log_m = np.logaddexp(log_q, log_s) - np.log(2)
    expected = {
        "forward_kl": kl(q, log_q, log_s),
        "reverse_kl": kl(s, log_s, log_q),
        "jensen_shannon": 0.5 * kl(q, log_q, log_m) + 0.5 * kl(s, log_s, log_m),
    }[kind]
    np.testing.assert_allclose(loss(teacher, student), expected, rtol=1e-9)


def test_python_lists_and_float32_probabilities_are_computed_in_the_losss_own_dtype():
    expected = np.mean(references.kd(T, S))
    np.testing.assert_allclose(losses.KDLoss(dtype="float64")(T.tolist(), S.tolist()), expected, rtol=1e-12)
    p_t, p_s = references.softmax(T).astype("float32"), references.softmax(S).astype("float32")
    expected = np.mean(references.kd(np.log(p_t.astype("float64")), np.log(p_s.astype("float64"))))
    np.testing.assert_allclose(losses.KDLoss(from_logits=False, dtype="float64")(p_t, p_s), expected, rtol=1e-9)


@pytest.mark.parametrize("make", [losses.DKDLoss, losses.NKDLoss])
def test_labels_may_be_lists_and_of_any_numeric_dtype(make):
    loss = make(dtype="float64")
    expected = loss({"teacher": T, "labels": LABELS}, S)
    for labels in (LABELS.tolist(), LABELS.astype("uint8"), LABELS.astype("float32"), np.eye(5, dtype="int32")[LABELS]):
        np.testing.assert_allclose(loss({"teacher": T, "labels": labels}, S), expected, rtol=1e-12)


@pytest.mark.parametrize("make", [losses.DKDLoss, losses.NKDLoss])
def test_a_class_that_does_not_exist_shows(make):
    assert np.isnan(make()({"teacher": T, "labels": np.full(6, 5)}, S))


def test_one_hot_labels_may_have_an_unknown_shape_in_a_graph():
    loss = losses.DKDLoss(dtype="float64")
    signature = [tf.TensorSpec((None, 5), "float64"), tf.TensorSpec((None, None), "float64"), tf.TensorSpec((None, 5), "float64")]
    compiled = tf.function(lambda t, y, s: loss({"teacher": t, "labels": y}, s), input_signature=signature)
    np.testing.assert_allclose(compiled(T, np.eye(5)[LABELS], S), np.mean(references.dkd(T, S, LABELS)), rtol=1e-9)


def test_temperatures_come_from_arrays_too_and_copies_are_plain_lists():
    loss = losses.MultiLevelKDLoss(np.array([1.0, 2.0]))
    assert copy.deepcopy(loss.temperatures) == loss.temperatures == [1.0, 2.0]


def test_names_and_aliases_of_keras_are_found_and_a_class_is_refused():
    for name in ("mse", "MSE", "mean_squared_error", "MeanSquaredError"):
        assert isinstance(losses.get(name), keras.losses.MeanSquaredError)
    assert isinstance(losses.get("kl_divergence"), keras.losses.KLDivergence)
    with pytest.raises(TypeError, match=r"Write KDLoss\(\) for an object"):
        losses.get(losses.KDLoss)
