"""The metrics' values against NumPy and scikit-learn, in every place where Keras updates them."""

import copy
import json

import keras
import numpy as np
import pytest
import sklearn.metrics
import tensorflow as tf

from keras_kd import metrics
from tests import references
from tests.conftest import classifier, two_devices

RNG = np.random.default_rng(11)
T, S = 2 * RNG.normal(size=(40, 5)), 2 * RNG.normal(size=(40, 5))
T[:20] = S[:20] + 0.1 * T[:20]  # so that about half agree
LABELS = RNG.integers(0, 5, size=40)
WEIGHTS = RNG.uniform(0, 3, size=40) * (RNG.uniform(size=40) > 0.2)
SEQUENCES = {"T": T.reshape(8, 5, 5), "S": S.reshape(8, 5, 5), "labels": LABELS.reshape(8, 5), "weights": WEIGHTS.reshape(8, 5)}

MAKERS = {
    "agreement": metrics.TeacherAgreement,
    "kl": metrics.TeacherKL,
    "calibration": lambda **kwargs: metrics.CalibrationError(from_logits=True, **kwargs),
}
every_metric = pytest.mark.parametrize("kind", MAKERS)


def ece(p, labels, weights=None, bins=15):
    """Guo et al. 2017, eq. 3, bin by bin."""
    weights = np.ones(len(p)) if weights is None else weights
    confidence, hit = p.max(axis=-1), p.argmax(axis=-1) == labels
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if n_m := np.sum(weights[inside]):
            gap = np.average(hit[inside], weights=weights[inside]) - np.average(confidence[inside], weights=weights[inside])
            total += n_m / np.sum(weights) * abs(gap)
    return total


def expected(kind, t=T, s=S, labels=LABELS, weights=None):
    if kind == "calibration":
        return ece(references.softmax(s), labels, weights)
    agree = t.argmax(axis=-1) == s.argmax(axis=-1)
    values = agree if kind == "agreement" else references.kd(t, s, 1.0)
    return np.average(values, weights=weights)


def first(kind, t=T, labels=LABELS):
    """What stands for y_true."""
    return labels if kind == "calibration" else t


def loss_for(kind):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True) if kind == "calibration" else "mse"


def masked(x, mask):
    tensor = tf.convert_to_tensor(x)
    tensor._keras_mask = tf.convert_to_tensor(mask)
    return tensor


# Values


@every_metric
def test_a_metric_is_its_formula_over_all_batches_and_starts_anew_after_a_reset(kind):
    metric = MAKERS[kind](dtype="float64")
    for _ in range(2):
        for rows in (slice(0, 3), slice(3, 25), slice(25, 40)):
            metric.update_state(first(kind)[rows], S[rows])
        np.testing.assert_allclose(metric.result(), expected(kind), rtol=1e-10)
        metric.reset_state()
    assert float(metric.result()) == 0.0


@every_metric
def test_sample_weights_weigh_the_samples(kind):
    metric = MAKERS[kind](dtype="float64")
    for rows in (slice(0, 17), slice(17, 40)):
        metric.update_state(first(kind)[rows], S[rows], WEIGHTS[rows])
    np.testing.assert_allclose(metric.result(), expected(kind, weights=WEIGHTS), rtol=1e-10)


@every_metric
@pytest.mark.parametrize("shape", ["none", "sample", "sample, column", "position"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_positions_of_sequences_count_by_weights_and_masks(kind, shape, with_mask):
    t, s, labels = SEQUENCES["T"], SEQUENCES["S"], SEQUENCES["labels"]
    weights = {"none": None, "position": SEQUENCES["weights"]}.get(shape, WEIGHTS[:8].reshape(-1, *[1] * ("column" in shape)))
    mask = np.arange(5) < np.array([5, 3, 1, 5, 2, 4, 5, 3])[:, None]
    metric = MAKERS[kind](dtype="float64")
    metric.update_state(first(kind, t, labels), masked(s, mask) if with_mask else s, weights)
    full = np.ones((8, 5)) if weights is None else np.broadcast_to(weights.reshape(8, -1), (8, 5))
    full = full * mask if with_mask else full
    np.testing.assert_allclose(metric.result(), expected(kind, weights=full.ravel()), rtol=1e-10)


def test_masks_and_weights_act_as_in_the_metrics_of_keras():
    mask = np.arange(5) < np.array([5, 3, 1, 5, 2, 4, 5, 3])[:, None]
    theirs, ours = keras.metrics.SparseCategoricalAccuracy(dtype="float64"), metrics.TeacherAgreement(dtype="float64")
    theirs.update_state(SEQUENCES["T"].argmax(axis=-1), masked(SEQUENCES["S"], mask), SEQUENCES["weights"])
    ours.update_state(SEQUENCES["T"], masked(SEQUENCES["S"], mask), SEQUENCES["weights"])
    np.testing.assert_allclose(ours.result(), theirs.result(), rtol=1e-12)


def test_agreement_is_scikit_learns_accuracy():
    value = sklearn.metrics.accuracy_score(T.argmax(axis=-1), S.argmax(axis=-1), sample_weight=WEIGHTS)
    np.testing.assert_allclose(metrics.TeacherAgreement(dtype="float64")(T, S, WEIGHTS), value, rtol=1e-12)
    assert 0.3 < value < 0.9


@pytest.mark.parametrize("units", [1, 5])
@pytest.mark.parametrize("from_logits", [None, True, False])
def test_sigmoid_outputs_agree_on_the_same_side_of_the_threshold(units, from_logits):
    t, s = T[:, :units], S[:, :units]
    given = [1 / (1 + np.exp(-z)) for z in (t, s)] if from_logits is False else [t, s]
    metric = metrics.TeacherAgreement(dtype="float64", activation="sigmoid", from_logits=from_logits)
    np.testing.assert_allclose(metric(*given, WEIGHTS), np.average(np.mean((t > 0) == (s > 0), axis=-1), weights=WEIGHTS))


@pytest.mark.parametrize("from_logits", [None, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_kl_is_the_divergence_in_nats_at_its_temperature(from_logits, temperature, activation):
    reference = references.kd if activation == "softmax" else references.binary_kd
    p = references.softmax if activation == "softmax" else (lambda z: 1 / (1 + np.exp(-z)))
    given = (T, S) if from_logits is None else (p(T), p(S))
    metric = metrics.TeacherKL(temperature, dtype="float64", activation=activation, from_logits=from_logits)
    np.testing.assert_allclose(metric(*given), np.mean(reference(T, S, temperature)) / temperature**2, rtol=1e-9)
    metric.reset_state()
    np.testing.assert_allclose(metric(given[0], given[0]), 0.0, atol=1e-12)


def test_kl_stays_finite_and_right_for_extreme_logits():
    value = metrics.TeacherKL()(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]))
    assert float(value) == 1e4


@pytest.mark.parametrize("bins", [1, 5, 15, 100])
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None], np.eye(5)[LABELS], np.eye(5)[LABELS] > 0], ids=lambda x: str(x.shape))
def test_calibration_takes_indices_and_one_hot_labels_logits_and_probabilities(bins, labels):
    p = references.softmax(S)
    truth = ece(p, LABELS, WEIGHTS, bins)
    for y_pred, from_logits in ((S, True), (p, False)):
        metric = metrics.CalibrationError(bins, from_logits, dtype="float64")
        np.testing.assert_allclose(metric(labels, y_pred, WEIGHTS), truth, rtol=1e-9)


@pytest.mark.parametrize("labels", [LABELS % 2, (LABELS % 2)[:, None].astype("float32")], ids=lambda x: str(x.shape))
def test_calibration_of_a_single_unit_is_that_of_two_classes(labels):
    p = 1 / (1 + np.exp(-S[:, :1]))
    truth = ece(np.concatenate([1 - p, p], axis=-1), LABELS % 2)
    for y_pred, from_logits in ((S[:, :1], True), (p, False)):
        np.testing.assert_allclose(
            metrics.CalibrationError(from_logits=from_logits, dtype="float64")(labels, y_pred), truth, rtol=1e-9
        )


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_bin_below():
    metric = metrics.CalibrationError(num_bins=4)
    metric.update_state([0, 0, 0, 0], [[0.5, 0.5], [0.75, 0.25], [0.7501, 0.2499], [1.0, 0.0]])
    np.testing.assert_array_equal(metric.weights_per_bin, [0, 1, 1, 2])


@pytest.mark.parametrize(
    "missing", [np.where(WEIGHTS > 0, LABELS, -1), np.eye(5)[LABELS] * (WEIGHTS > 0)[:, None]], ids=["-1", "0"]
)
def test_calibration_leaves_out_rows_without_a_label(missing):
    truth = ece(references.softmax(S), LABELS, (WEIGHTS > 0).astype(float))
    np.testing.assert_allclose(metrics.CalibrationError(from_logits=True, dtype="float64")(missing, S), truth, rtol=1e-9)


@pytest.mark.parametrize(("labels", "y_pred"), [(LABELS, S), (LABELS + 1, references.softmax(S))], ids=["logits", "labels"])
def test_calibration_of_what_cannot_be_is_nan_unless_it_weighs_nothing(labels, y_pred):
    assert np.isnan(metrics.CalibrationError()(labels, y_pred))
    impossible = (labels >= 5) | (y_pred.min(axis=-1) < 0) | (y_pred.max(axis=-1) > 1)
    assert np.isfinite(metrics.CalibrationError()(labels, y_pred, (~impossible).astype(float)))


# Ways to compute


@every_metric
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_graphs_and_xla_give_what_eager_code_gives(kind, jit):
    metric = MAKERS[kind]()

    @tf.function(jit_compile=jit)
    def update(y_true, y_pred, weights):
        metric.update_state(y_true, y_pred, weights)

    for rows in (slice(0, 20), slice(20, 40)):
        update(tf.constant(first(kind)[rows]), tf.constant(S[rows], "float32"), tf.constant(WEIGHTS[rows], "float32"))
    np.testing.assert_allclose(metric.result(), expected(kind, weights=WEIGHTS), rtol=1e-5)


@every_metric
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_outputs_are_measured_in_float32(kind, dtype):
    t, s = tf.cast(T, dtype), tf.cast(S, dtype)
    metric = MAKERS[kind](dtype=dtype)
    assert metric.dtype == "float32"
    t32, s32 = (np.array(tf.cast(z, "float32"), "float64") for z in (t, s))
    np.testing.assert_allclose(metric(LABELS if kind == "calibration" else t, s), expected(kind, t32, s32), rtol=1e-5)


@every_metric
def test_it_trains_under_mixed_precision(kind, data):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = classifier()
        model.compile("sgd", loss=loss_for(kind), metrics=[MAKERS[kind]()])
        y = data[1] if kind == "calibration" else np.array(classifier(9)(data[0]))
        logs = model.fit(data[0], y, verbose=0).history
        assert model(data[0]).dtype == tf.float16
        assert 0 < logs[MAKERS[kind]().name][0] < 10
    finally:
        keras.config.set_dtype_policy("float32")


@every_metric
def test_replicas_add_up(kind):
    strategy = two_devices()
    with strategy.scope():
        metric = MAKERS[kind]()

    @tf.function
    def update(batch):
        strategy.run(lambda y, z: metric.update_state(y, z), args=batch)

    batches = tf.data.Dataset.from_tensor_slices((first(kind), S.astype("float32"))).batch(10)
    for batch in strategy.experimental_distribute_dataset(batches):
        update(batch)
    np.testing.assert_allclose(metric.result(), expected(kind), rtol=1e-5)


CONFIGURED = {
    "agreement": lambda: metrics.TeacherAgreement("mine", "float64", activation="sigmoid", from_logits=False),
    "kl": lambda: metrics.TeacherKL(3.0, "mine", "float64", activation="sigmoid", from_logits=True),
    "calibration": lambda: metrics.CalibrationError(7, True, "mine", "float64"),
}


@every_metric
def test_a_config_round_trip_and_a_copy_keep_every_argument(kind):
    metric = CONFIGURED[kind]()
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(metric))))
    p = 1 / (1 + np.exp(-S))
    for twin in (again, copy.deepcopy(metric)):
        assert type(twin) is type(metric)
        assert twin.get_config() == metric.get_config()
        assert float(twin(first(kind, 1 / (1 + np.exp(-T))), p)) == float(metric(first(kind, 1 / (1 + np.exp(-T))), p))
        metric.reset_state()
    assert metric.get_config()["name"] == "mine"


@pytest.mark.parametrize(("kind", "best"), [("agreement", max), ("kl", min), ("calibration", min)])
def test_keras_knows_which_way_is_better(kind, best):
    callback = keras.callbacks.EarlyStopping(monitor=MAKERS[kind]().name, mode="auto")
    model = classifier(classes=5)
    model.compile("sgd", loss_for(kind), metrics=[MAKERS[kind]()])
    model.evaluate(np.zeros((40, 4)), first(kind), verbose=0)
    callback.set_model(model)
    callback._set_monitor_op()
    assert callback._is_improvement(best(0.2, 0.4), max(0.2, 0.4) if best is min else min(0.2, 0.4))


# Inside a training step


class Pupil(keras.Model):
    """The least that a model must do to hand its teacher's outputs to the metrics."""

    def __init__(self, student, teacher, kinds):
        super().__init__()
        self.student, self.kinds = student, kinds
        object.__setattr__(self, "teacher", teacher)
        self.taught = True

    def call(self, x, training=None):
        return self.student(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) if self._compile_loss else keras.ops.zeros(())

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        teachers = keras.tree.flatten(self.teacher(x)) if self.taught else []
        pairs = [(t, s, *kinds) for t, s, kinds in zip(teachers, keras.tree.flatten(y_pred), self.kinds, strict=False)]
        with metrics.teaching(pairs[::-1]):  # found by identity, not by position
            return super().compute_metrics(x, y, y_pred, sample_weight)


OPTIONS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}, "several steps": {"steps_per_execution": 2}}


def kl(teacher, student, x, weights=None):
    z_t, z_s = (np.array(model(x), "float64") for model in (teacher, student))
    return np.average(references.kd(z_t, z_s, 1.0), weights=weights)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_metrics_compare_with_the_teacher_and_leave_the_labels_alone(data, options):
    (x, y), teacher, student = data, classifier(9), classifier()
    model = Pupil(student, teacher, [("logits", "logits")])
    compiled = [metrics.TeacherAgreement(), metrics.TeacherKL(), "accuracy"]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(0.0), loss, metrics=compiled, weighted_metrics=[metrics.TeacherKL(name="weighted")], **options
    )
    weights = np.linspace(0, 2, 24)
    history = model.fit(x, y, batch_size=6, sample_weight=weights, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["teacher_kl"], kl(teacher, student, x), rtol=1e-5)
    np.testing.assert_allclose(history["weighted"], kl(teacher, student, x, weights), rtol=1e-5)
    agree = np.mean(np.argmax(teacher(x), -1) == np.argmax(student(x), -1))
    np.testing.assert_allclose(history["teacher_agreement"], agree, rtol=1e-6)
    assert model.evaluate(x, y, verbose=0, return_dict=True)["teacher_kl"] == pytest.approx(history["teacher_kl"][0])


@pytest.mark.parametrize("nest", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}], ids=["list", "dict"])
@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_each_of_several_outputs_meets_its_own_teacher_output(data, nest, options):
    def two_outputs(activation=None):
        inputs = keras.Input((4,))
        a, b = keras.layers.Dense(3, activation, name="a")(inputs), keras.layers.Dense(3, name="b")(inputs)
        return keras.Model(inputs, nest(a, b))

    teacher, student = two_outputs(), two_outputs("softmax")  # the softmax leaves its logits on the tensor
    model = Pupil(student, teacher, [("logits", "softmax"), ("logits", "logits")])
    model.output_names = ["a", "b"]
    model.compile(metrics=nest([metrics.TeacherKL()], [metrics.TeacherKL()]), **options)
    logs = model.evaluate(data[0], nest(data[1], data[1]), verbose=0, return_dict=True)
    for key, index in (("a", 0), ("b", 1)):
        z_t, z_s = (np.array(keras.tree.flatten(m(data[0]))[index], "float64") for m in (teacher, student))
        z_s = np.log(z_s) if key == "a" else z_s
        assert logs[f"{key}_teacher_kl"] == pytest.approx(np.mean(references.kd(z_t, z_s, 1.0)), rel=1e-4)


def test_a_step_without_teacher_outputs_leaves_the_metrics_as_they_are(data):
    model = Pupil(classifier(), classifier(), [("logits", "logits")])
    model.taught = False
    model.compile(metrics=[metrics.TeacherKL(), metrics.TeacherAgreement()])
    logs = model.evaluate(*data, verbose=0, return_dict=True)
    assert (logs["teacher_kl"], logs["teacher_agreement"]) == (0.0, 0.0)
    metric = metrics.TeacherKL()
    value = float(metric(T, S))
    for nothing in (None, []):
        with metrics.teaching(nothing):
            metric.update_state(LABELS, S)
    assert float(metric.result()) == value


def test_contexts_nest_and_end_even_after_an_error():
    metric = metrics.TeacherAgreement()

    def interrupted():
        with metrics.teaching([(S, S, "logits", "logits")]):
            with metrics.teaching(None):
                metric.update_state(LABELS, S)
            metric.update_state(LABELS, S)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert float(metric.result()) == 1.0
    metric.reset_state()
    np.testing.assert_allclose(metric(T, S), expected("agreement"), rtol=1e-6)  # y_true is the teacher's output again


@pytest.mark.parametrize("kind", ["agreement", "kl"])
def test_outputs_of_different_kinds_are_brought_to_logits(kind):
    for teacher, teacher_kind in ((T, "logits"), (references.softmax(T), "softmax")):
        for student, student_kind in ((S, "logits"), (references.softmax(S), "softmax")):
            metric = MAKERS[kind](dtype="float64")
            with metrics.teaching([(teacher, student, teacher_kind, student_kind)]):
                metric.update_state(LABELS, student)
            np.testing.assert_allclose(metric.result(), expected(kind), rtol=1e-9)


def test_agreement_on_the_largest_output_needs_no_known_kind():
    metric = metrics.TeacherAgreement()
    with metrics.teaching([(T, references.softmax(S), None, None)]):
        metric.update_state(LABELS, S)
    np.testing.assert_allclose(metric.result(), expected("agreement"), rtol=1e-6)


# What is refused


def test_outputs_that_may_be_logits_or_probabilities_ask_for_from_logits():
    for kinds, role in (((None, "logits"), "teacher"), (("logits", None), "student")):
        with metrics.teaching([(T, S, *kinds)]):
            with pytest.raises(ValueError, match=rf"teacher_kl cannot find out whether the {role}.*from_logits=True"):
                metrics.TeacherKL()(LABELS, S)
            assert float(metrics.TeacherKL(from_logits=True)(LABELS, S)) == pytest.approx(expected("kl"), rel=1e-5)
    with pytest.raises(ValueError, match="cannot find out"):
        metrics.TeacherKL()(T[:, :3], classifier(activation="softmax")(np.zeros((40, 4))))


def test_a_sigmoid_is_no_softmax():
    with metrics.teaching([(T, S, "logits", "sigmoid")]):
        with pytest.raises(ValueError, match=r'the student ends in a sigmoid. Use TeacherKL\(activation="sigmoid"\)'):
            metrics.TeacherKL()(LABELS, S)
    for metric in (metrics.TeacherKL(), metrics.TeacherAgreement()):
        with pytest.raises(ValueError, match=r'one unit says nothing.*\(40, 1\).*activation="sigmoid"'):
            metric(T[:, :1], S[:, :1])


def test_labels_where_the_teachers_outputs_belong_are_refused():
    with pytest.raises(ValueError, match=r"teacher \(40,\), student \(40, 5\). Outside a keras_kd.Distiller `y_true` must be"):
        metrics.TeacherAgreement()(LABELS, S)
    with pytest.raises(ValueError, match=r"teacher \(40, 4\), student \(40, 5\)"):
        metrics.TeacherKL()(T[:, :4], S)


def test_a_copy_of_one_of_several_outputs_is_refused():
    with metrics.teaching([(T, S, "logits", "logits"), (T, T, "logits", "logits")]):
        with pytest.raises(ValueError, match="none of the 2 student outputs of this step"):
            metrics.TeacherKL()(LABELS, S.copy())


@pytest.mark.parametrize("make", [metrics.TeacherAgreement, metrics.TeacherKL])
def test_teacher_metrics_refuse_arguments_they_do_not_know(make):
    with pytest.raises(ValueError, match="`activation` must be 'softmax' or 'sigmoid'. Received: activation='tanh'"):
        make(activation="tanh")
    with pytest.raises(ValueError, match="`from_logits` must be True, False or None. Received: from_logits='yes'"):
        make(from_logits="yes")


def test_kl_refuses_a_temperature_that_is_not_above_0():
    with pytest.raises(ValueError, match="`temperature` must be greater than 0. Received: temperature=0"):
        metrics.TeacherKL(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_bins": 0}, ValueError, "`num_bins` must be greater than 0. Received: num_bins=0"),
        ({"num_bins": 2.5}, TypeError, "`num_bins` must be an integer. Received: num_bins=2.5"),
        ({"num_bins": "15"}, TypeError, "`num_bins` must be a number"),
        ({"from_logits": None}, ValueError, "`from_logits` must be True or False. Received: from_logits=None"),
    ],
)
def test_calibration_refuses_arguments_it_cannot_use(arguments, error, message):
    with pytest.raises(error, match=message):
        metrics.CalibrationError(**arguments)


def test_calibration_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"class indices of shape \(40,\) or one-hot of shape \(40, 5\).*\(40, 3\)"):
        metrics.CalibrationError()(np.zeros((40, 3)), S)
    with pytest.raises(ValueError, match=r"`y_pred` must have the shape \(batch, ..., classes\). Received: \(40,\)"):
        metrics.CalibrationError()(LABELS, S[:, 0])


def test_calibration_refuses_logits_that_come_out_of_a_softmax():
    with pytest.raises(ValueError, match="got from_logits=True, and `y_pred` comes out of a softmax"):
        metrics.CalibrationError(from_logits=True)(LABELS, classifier(classes=5, activation="softmax")(np.zeros((40, 4))))


def test_a_metric_without_compare_says_what_to_implement():
    class Empty(metrics.TeacherMetric):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must implement compare\(teacher, student\)"):
        Empty()(T, S)
