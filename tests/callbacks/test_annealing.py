"""Annealing: the values that compiled steps see, where they come from under every way to train, and what is refused."""

import copy

import keras
import numpy as np
import pytest

from keras_kd import Distiller, Tunable, losses, schedules
from keras_kd.callbacks import AnnealTemperature, AnnealWeight, ScheduledValue
from tests import references
from tests.conftest import classifier, two_devices

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIONS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}, "several steps": {"steps_per_execution": 2}}


class Traced(losses.KDLoss):
    """Counts how often a step is traced (or run eagerly)."""

    traces = 0

    def call(self, y_true, y_pred):
        type(self).traces += 1
        return super().call(y_true, y_pred)


class Watch(keras.callbacks.Callback):
    """Notes a value at the end of every batch."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.read())


@pytest.fixture(autouse=True)
def _no_traces_yet():
    Traced.traces = 0


def frozen(distiller, **options):
    """Compiled so that training changes nothing: the losses of all epochs differ by the schedule alone."""
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS, **options)
    return distiller


def z(model, x):
    return np.array(model(x), "float64")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_of_compiled_steps_follows_the_temperature_without_a_new_trace(teacher, student, data, options):
    x, y = data
    distiller = frozen(Distiller(teacher, student, Traced(4.0), student_loss_weight=0.0), **options)
    schedule = schedules.LinearValue(4.0, 1.0, duration=3)
    history = distiller.fit(x, y, epochs=1, batch_size=8, callbacks=[AnnealTemperature(schedule)], verbose=0).history
    traces = Traced.traces
    again = distiller.fit(x, y, initial_epoch=1, epochs=5, batch_size=8, callbacks=[AnnealTemperature(schedule)], verbose=0)
    expected = [np.mean(references.kd(z(teacher, x), z(student, x), t)) for t in (4.0, 3.0, 2.0, 1.0, 1.0)]
    np.testing.assert_allclose(history["loss"] + again.history["loss"], expected, rtol=1e-5)
    assert again.history["temperature"] == [3.0, 2.0, 1.0, 1.0]
    if "run_eagerly" not in options:
        assert Traced.traces == traces


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_the_loss_follows_the_share_of_the_supervised_loss(teacher, student, data, options):
    distiller = frozen(Distiller(teacher, student, Traced(2.0)), **options)
    annealing = AnnealWeight(schedules.CosineValue(1.0, 0.0, duration=2))
    history = distiller.fit(*data, epochs=3, batch_size=8, callbacks=[annealing], verbose=0).history
    supervised, distilled = history["student_loss"][0], history["distillation_loss"][0]
    assert supervised != pytest.approx(distilled, rel=1e-2)
    np.testing.assert_allclose(history["loss"], [supervised, (supervised + distilled) / 2, distilled], rtol=1e-5)
    np.testing.assert_allclose(history["student_loss_weight"], [1.0, 0.5, 0.0], atol=1e-12)
    assert distiller.student_loss_weight == pytest.approx(0.0, abs=1e-12)  # the last value stays


def test_a_warm_up_weighs_one_of_several_losses(teacher, student, data):
    distiller = frozen(Distiller(teacher, student, [losses.KDLoss(), losses.DKDLoss()], [0.5, 7.0], student_loss_weight=0.0))
    warm_up = AnnealWeight(schedules.WarmUpValue(1.0, duration=4), loss="dkd_loss")
    history = distiller.fit(*data, epochs=5, callbacks=[warm_up], verbose=0).history
    factors = [min(epoch / 4, 1.0) for epoch in range(1, 6)]
    assert history["dkd_loss_weight"] == factors
    np.testing.assert_allclose(history["loss"], 0.5 * history["kd_loss"][0] + np.array(factors) * history["dkd_loss"][0], rtol=1e-5)
    assert distiller.distillation_loss_weights == [0.5, 1.0]


@pytest.mark.parametrize("which", ["kd_loss_1", 1, -1])
def test_a_loss_is_found_by_its_name_in_the_logs_or_its_index(teacher, student, data, which):
    distiller = frozen(Distiller(teacher, student, [losses.KDLoss(2.0), losses.KDLoss(3.0)]))
    callbacks = [AnnealTemperature(5.0, loss=which), AnnealWeight(0.25, loss=which)]
    history = distiller.fit(*data, callbacks=callbacks, verbose=0).history
    assert [loss.temperature for loss in distiller.distillation_losses] == [2.0, 5.0]
    assert distiller.distillation_loss_weights == [1.0, 0.25]
    assert (history["kd_loss_1_temperature"], history["kd_loss_1_weight"]) == ([5.0], [0.25])


def test_without_a_name_every_loss_that_has_a_temperature_is_annealed(teacher, student, data):
    distiller = frozen(Distiller(teacher, student, [losses.KDLoss(2.0), keras.losses.MeanSquaredError(), losses.DKDLoss()]))
    distiller.fit(*data, callbacks=[AnnealTemperature(5.0)], verbose=0)
    assert [distiller.distillation_losses[i].temperature for i in (0, 2)] == [5.0, 5.0]


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}], ids=["graph", "several steps"])
def test_a_plain_student_on_stored_teacher_outputs_is_served_too(teacher, student, data, options):
    x, stored = data[0], teacher.predict(data[0], verbose=0)
    student.compile(keras.optimizers.SGD(0.0), loss=losses.KDLoss(4.0), **options)
    annealing = AnnealTemperature(schedules.LinearValue(4.0, 1.0, duration=3))
    history = student.fit(x, stored, epochs=4, batch_size=8, callbacks=[annealing], verbose=0).history
    expected = [np.mean(references.kd(z(teacher, x), z(student, x), t)) for t in (4.0, 3.0, 2.0, 1.0)]
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("nest", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}], ids=["list", "dict"])
def test_the_losses_of_a_plain_model_with_several_outputs_are_found(data, nest):
    inputs = keras.Input((4,))
    outputs = nest(keras.layers.Dense(3, name="a")(inputs), keras.layers.Dense(3, name="b")(inputs))
    model = keras.Model(inputs, outputs)
    first, second = losses.KDLoss(2.0), losses.KDLoss(3.0, name="second")
    model.compile("sgd", loss=nest(first, second))
    stored = nest(np.ones((24, 3)), np.ones((24, 3)))
    model.fit(data[0], stored, callbacks=[AnnealTemperature(5.0, loss="second")], verbose=0)
    assert (first.temperature, second.temperature) == (2.0, 5.0)
    model.fit(data[0], stored, callbacks=[AnnealTemperature(6.0)], verbose=0)
    assert (first.temperature, second.temperature) == (6.0, 6.0)


def test_a_loaded_student_is_served_too(student, data, tmp_path):
    student.compile("sgd", loss=losses.KDLoss(4.0))
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    loaded.fit(data[0], np.ones((24, 3)), callbacks=[AnnealTemperature(2.5)], verbose=0)
    assert loaded.loss.temperature == 2.5


def test_our_loss_inside_the_distiller_of_keras_is_served_too(teacher, student, data):
    loss = losses.KDLoss(4.0)
    distiller = keras.distillation.Distiller(teacher, student, loss)
    distiller.compile("sgd", loss=FROM_LOGITS)
    distiller.fit(*data, callbacks=[AnnealTemperature(2.5)], verbose=0)
    assert loss.temperature == 2.5


# Where the position comes from


def test_epochs_are_those_of_keras_so_that_initial_epoch_counts(teacher, student, data):
    distiller = frozen(Distiller(teacher, student))
    asked = []
    annealing = AnnealTemperature(lambda epoch: asked.append(epoch) or 1.0 + epoch)
    history = distiller.fit(*data, initial_epoch=3, epochs=6, callbacks=[annealing], verbose=0).history
    assert asked == [3, 4, 5]
    assert history["temperature"] == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(("per_execution", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3]), (2, [0, 2, 4])])
def test_steps_are_those_of_the_optimizer_whatever_the_batches_of_one_execution(teacher, student, data, per_execution, expected):
    distiller = frozen(Distiller(teacher, student), steps_per_execution=per_execution)
    watch = Watch(lambda: distiller.distillation_losses[0].temperature)
    annealing = AnnealTemperature(lambda step: 1.0 + step, by="step")
    history = distiller.fit(*data, batch_size=4, callbacks=[annealing, watch], verbose=0).history
    assert watch.seen == [1.0 + step for step in expected]
    assert history["temperature"] == [1.0 + expected[-1]]
    watch.seen.clear()
    distiller.fit(*data, batch_size=4, callbacks=[annealing, watch], verbose=0)
    assert watch.seen == [7.0 + step for step in expected]  # goes on from fit to fit


def test_each_step_trains_with_the_value_of_its_own_step(teacher, student, data):
    x, y = data[0][:8], data[1][:8]
    distiller = frozen(Distiller(teacher, student, student_loss_weight=0.0))
    annealing = AnnealTemperature(schedules.LinearValue(1.0, 4.0, duration=3), by="step")
    history = distiller.fit(
        np.tile(x, (4, 1)), np.tile(y, 4), batch_size=8, shuffle=False, callbacks=[annealing], verbose=0
    ).history
    values = [np.mean(references.kd(z(teacher, x), z(student, x), t)) for t in (1.0, 2.0, 3.0, 4.0)]
    np.testing.assert_allclose(history["loss"], [np.mean(values)], rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda: keras.optimizers.SGD(0.0, gradient_accumulation_steps=2), [0, 0, 1, 1, 2, 2]),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=2.0), [0, 1, 2, 3, 4, 5]),
    ],
    ids=["gradient accumulation", "loss scaling"],
)
def test_steps_are_updates_of_the_weights(teacher, student, data, optimizer, expected):
    distiller = Distiller(teacher, student)
    distiller.compile(optimizer())
    watch = Watch(lambda: distiller.distillation_losses[0].temperature)
    distiller.fit(data[0], batch_size=4, callbacks=[AnnealTemperature(lambda step: 1.0 + step, by="step"), watch], verbose=0)
    assert watch.seen == [1.0 + step for step in expected]


@pytest.mark.parametrize("by", ["epoch", "step"])
@pytest.mark.parametrize("first", ["annealing", "backup"])
def test_training_that_was_interrupted_goes_on_where_it_stood(teacher, student, data, tmp_path, by, first):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def fit(extra):
        distiller = frozen(Distiller(teacher, copy.deepcopy(student)))
        watch = Watch(lambda: distiller.distillation_losses[0].temperature)
        annealing, backup = AnnealTemperature(lambda t: 1.0 + t, by=by), keras.callbacks.BackupAndRestore(tmp_path)
        pair = [annealing, backup] if first == "annealing" else [backup, annealing]
        try:
            distiller.fit(*data, batch_size=12, epochs=4, callbacks=[*pair, watch, *extra], verbose=0)
        except KeyboardInterrupt:
            return []
        return watch.seen

    assert fit([Interrupt()]) == []
    resumed = fit([])  # epoch 1 was not saved before the interrupt reached it, or it was: both go on from what was restored
    whole = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0] if by == "epoch" else [1.0 + step for step in range(8)]
    assert resumed == whole[-len(resumed) :]
    assert 0 < len(resumed) < 8


def test_it_works_under_a_mirrored_strategy(data):
    strategy = two_devices()
    with strategy.scope():
        distiller = Distiller(classifier(), classifier(), [losses.KDLoss(4.0), losses.DKDLoss()], student_loss_weight=0.0)
        frozen(distiller)
    callbacks = [
        AnnealTemperature(lambda step: 1.0 + step, loss="kd_loss", by="step"),
        AnnealWeight(lambda step: 0.5 * step, loss="dkd_loss", by="step"),
    ]
    history = distiller.fit(*data, batch_size=8, epochs=2, callbacks=callbacks, verbose=0).history
    assert history["kd_loss_temperature"] == [3.0, 6.0]
    assert history["dkd_loss_weight"] == [1.0, 2.5]
    x = data[0]
    first = [np.mean(references.kd(z(distiller.teacher, x), z(distiller.student, x), t)) for t in (6.0,)]
    np.testing.assert_allclose(distiller.evaluate(*data, verbose=0, return_dict=True)["kd_loss"], first, rtol=1e-5)


# What it leaves


def test_the_value_reaches_csv_logger_and_the_history_of_every_epoch(teacher, student, data, tmp_path):
    distiller = frozen(Distiller(teacher, student))
    callbacks = [AnnealTemperature(schedules.LinearValue(3.0, 1.0, duration=2)), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    distiller.fit(*data, epochs=3, callbacks=callbacks, validation_data=data, verbose=0)
    rows = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    np.testing.assert_array_equal(rows["temperature"], [3.0, 2.0, 1.0])


def test_the_value_is_shown_by_the_progress_bar(teacher, student, data, capsys):
    frozen(Distiller(teacher, student)).fit(*data, callbacks=[AnnealTemperature(2.5)], verbose=2)
    assert "temperature: 2.5" in capsys.readouterr().out


def test_one_callback_serves_several_fits_and_several_models(data):
    annealing = AnnealTemperature(schedules.LinearValue(4.0, 1.0, duration=3))
    distillers = [frozen(Distiller(classifier(), classifier())) for _ in "ab"]
    for distiller in [*distillers, distillers[0]]:
        history = distiller.fit(*data, epochs=2, callbacks=[annealing], verbose=0).history
        assert history["temperature"] == [4.0, 3.0]


def test_after_fit_the_last_value_stays(teacher, student, data):
    distiller = frozen(Distiller(teacher, student, losses.KDLoss(4.0)))
    distiller.fit(*data, epochs=3, callbacks=[AnnealTemperature(lambda epoch: 3.0 - epoch)], verbose=0)
    assert distiller.distillation_losses[0].temperature == 1.0


def test_a_learning_rate_schedule_of_keras_and_a_plain_function_are_schedules(teacher, student, data):
    distiller = frozen(Distiller(teacher, student))
    keras_schedule = keras.optimizers.schedules.PolynomialDecay(4.0, 3, end_learning_rate=1.0)
    callbacks = [AnnealTemperature(keras_schedule, by="step"), AnnealWeight(lambda epoch: 0.5)]
    history = distiller.fit(*data, batch_size=8, epochs=2, callbacks=callbacks, verbose=0).history
    np.testing.assert_allclose(history["temperature"], [2.0, 1.0])
    assert history["student_loss_weight"] == [0.5, 0.5]


def test_any_tunable_of_a_distiller_of_ones_own_can_be_scheduled(teacher, student, data):
    class Boosted(Distiller):
        boost = Tunable()

        def distillation_loss(self, *args, **kwargs):
            return Tunable.tensor(self, "boost") * super().distillation_loss(*args, **kwargs)

    distiller = frozen(Boosted(teacher, student, student_loss_weight=0.0))
    distiller.boost = 1.0
    history = distiller.fit(*data, epochs=3, callbacks=[ScheduledValue("boost", lambda epoch: 1.0 + epoch)], verbose=0).history
    assert history["boost"] == [1.0, 2.0, 3.0]
    np.testing.assert_allclose(history["loss"], history["loss"][0] * np.array([1.0, 2.0, 3.0]), rtol=1e-5)


# What is refused


@pytest.mark.parametrize("make", [AnnealTemperature, AnnealWeight])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": "linear"}, TypeError, "`schedule` must be a number or a callable"),
        ({"schedule": 1.0, "by": "batch"}, ValueError, "`by` must be 'epoch' or 'step'. Received: by='batch'"),
        ({"schedule": 1.0, "loss": losses.KDLoss()}, TypeError, r"`loss` must be the name .* index, or None. Received: loss=<"),
        ({"schedule": 1.0, "loss": True}, TypeError, "Received: loss=True of type bool"),
    ],
)
def test_constructors_refuse_what_they_cannot_use(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize("wrong", ["", "a b", None, 3])
def test_an_attribute_that_is_no_name_is_refused(wrong):
    with pytest.raises(ValueError, match="`attribute` must be the name of an attribute. Received: attribute="):
        ScheduledValue(wrong, 1.0)


@pytest.mark.parametrize("make", [AnnealTemperature, AnnealWeight])
@pytest.mark.parametrize("which", ["kd", 2, -3])
def test_a_loss_that_is_not_there_lists_those_that_are(teacher, student, data, make, which):
    distiller = frozen(Distiller(teacher, student, [losses.KDLoss(), losses.DKDLoss()]))
    with pytest.raises(ValueError, match=rf'No distillation loss {which!r} in "distiller".*Losses: kd_loss, dkd_loss'):
        distiller.fit(*data, callbacks=[make(1.0, loss=which)], verbose=0)


def test_losses_without_any_temperature_are_named(teacher, student, data):
    distiller = frozen(Distiller(teacher, student, [keras.losses.MeanSquaredError(name="mse"), losses.MultiLevelKDLoss()]))
    with pytest.raises(ValueError, match="has a temperature. Losses: mse, multi_level_kd_loss"):
        distiller.fit(*data, callbacks=[AnnealTemperature(2.0)], verbose=0)


@pytest.mark.parametrize("loss", ["mse", lambda y, p: losses.KDLoss()(y, p)], ids=["name", "function"])
def test_a_plain_model_whose_loss_object_cannot_be_found_is_told_how_to_compile(student, data, loss):
    student.compile("sgd", loss=loss)
    with pytest.raises(ValueError, match=r"none that is a loss object.*compile\(loss=KDLoss\(\)\)"):
        student.fit(data[0], np.ones((24, 3)), callbacks=[AnnealTemperature(2.0)], verbose=0)


@pytest.mark.parametrize("make", [lambda: AnnealWeight(0.5), lambda: AnnealWeight(0.5, loss="kd_loss")], ids=["share", "weight"])
def test_a_weight_of_a_plain_model_is_refused(student, data, make):
    student.compile("sgd", loss=losses.KDLoss())
    with pytest.raises(ValueError, match=r"AnnealWeight sets `.*weights?`, which Sequential does not have.*keras_kd\.Distiller"):
        student.fit(data[0], np.ones((24, 3)), callbacks=[make()], verbose=0)


@pytest.mark.parametrize("loss", [None, "logits_distillation"])
def test_a_temperature_that_compiled_steps_would_not_see_change_is_refused(teacher, student, data, loss):
    theirs = keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence())
    distiller = frozen(Distiller(teacher, student, [losses.KDLoss(), theirs]))
    with pytest.raises(ValueError, match="cannot change `temperature` of LogitsDistillation: compiled steps would keep its old"):
        distiller.fit(*data, callbacks=[AnnealTemperature(3.0, loss=loss)], verbose=0)
    assert theirs.temperature == 2.0


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (AnnealTemperature(lambda epoch: 1.0 - epoch), r"AnnealTemperature gives 0\.0 at epoch 1\. `temperature` must be greater"),
        (AnnealWeight(lambda epoch: 1 + epoch), r"AnnealWeight gives 2 at epoch 1\. `student_loss_weight` must be between 0 and 1"),
        (AnnealWeight(lambda step: -step, loss=0, by="step"), r"gives -1 at step 1\. `distillation_loss_weights\[0\]` must not be"),
        (AnnealWeight(lambda epoch: None), r"AnnealWeight gives None at epoch 0\."),
        (AnnealWeight(lambda epoch: float("nan")), r"gives nan at epoch 0\. `student_loss_weight` must be finite"),
    ],
)
def test_a_value_that_is_out_of_range_is_named_with_its_position(teacher, student, data, callback, message):
    distiller = frozen(Distiller(teacher, student))
    with pytest.raises(ValueError, match=message):
        distiller.fit(*data, batch_size=8, epochs=3, callbacks=[callback], verbose=0)
