"""Schedules of values: what they give where, what they refuse, and that they survive serialisation."""

import copy
import json
import math

import keras
import numpy as np
import pytest

from keras_kd import schedules

ALL = {
    "constant": schedules.ConstantValue(0.3),
    "linear": schedules.LinearValue(8.0, 2.0, begin=3, duration=7),
    "cosine": schedules.CosineValue(1, 0.25, begin=2, duration=9.5),
    "warm-up": schedules.WarmUpValue(2.0, duration=4, start=0.5),
    "warm-up, then another": schedules.WarmUpValue(2.0, duration=4, after=schedules.CosineValue(2.0, 1.0, duration=10)),
    "warm-up, then Keras' own": schedules.WarmUpValue(
        1.0, duration=4, after=keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5)
    ),
}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


@every_schedule
def test_a_schedule_gives_python_floats_for_epochs_and_steps_of_any_kind_of_number(schedule):
    for position in (0, 5, 5.5, 10**9, np.int64(5), np.float32(5.5)):
        assert type(schedule(position)) is float
        assert math.isfinite(schedule(position))
    assert schedule(np.int64(5)) == schedule(5)


@every_schedule
def test_a_schedule_survives_serialisation_to_json_and_copying(schedule):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(schedule)
    for other in (again, type(schedule).from_config(schedule.get_config()), copy.deepcopy(schedule)):
        assert [other(t) for t in range(20)] == [schedule(t) for t in range(20)]


def test_linear_runs_straight_between_its_ends_and_stays_there():
    schedule = schedules.LinearValue(1.0, 0.1, begin=10, duration=90)
    t = np.arange(0, 200)
    expected = np.interp(t, [10, 100], [1.0, 0.1])
    np.testing.assert_allclose([schedule(i) for i in t], expected, rtol=1e-12)
    assert schedule(0) == schedule(10) == 1.0
    assert schedule(100) == schedule(10**7) == 0.1  # exactly


def test_cosine_is_half_a_wave_between_its_ends_and_stays_there():
    schedule = schedules.CosineValue(4.0, 1.0, begin=5, duration=20)
    t = np.arange(5, 26)
    np.testing.assert_allclose([schedule(i) for i in t], 1.0 + 3.0 * (1 + np.cos(np.pi * (t - 5) / 20)) / 2, rtol=1e-12)
    assert schedule(0) == schedule(5) == 4.0
    assert schedule(15) == pytest.approx(2.5)
    assert schedule(25) == schedule(1000) == 1.0


def test_cosine_is_keras_cosine_decay():
    keras_decay = keras.optimizers.schedules.CosineDecay(2.0, 30, alpha=0.25)
    schedule = schedules.CosineValue(2.0, 0.5, duration=30)
    np.testing.assert_allclose([schedule(t) for t in range(40)], [float(keras_decay(t)) for t in range(40)], rtol=1e-5)


@pytest.mark.parametrize("warmup", [1, 3, 20])
def test_a_warm_up_is_the_factor_of_dkd_and_reviewkd_whose_epochs_count_from_1(warmup):
    schedule = schedules.WarmUpValue(1.0, duration=warmup)
    assert [schedule(epoch - 1) for epoch in range(1, 31)] == [min(epoch / warmup, 1.0) for epoch in range(1, 31)]
    scaled = schedules.WarmUpValue(5.0, duration=warmup, start=1.0)
    expected = [1 + 4 * min(epoch / warmup, 1.0) for epoch in range(1, 31)]
    np.testing.assert_allclose([scaled(epoch - 1) for epoch in range(1, 31)], expected, rtol=1e-12)


def test_what_comes_after_a_warm_up_counts_from_its_end():
    schedule = schedules.WarmUpValue(1.0, duration=2, after=schedules.LinearValue(1.0, 0.0, duration=4))
    assert [schedule(t) for t in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert schedules.WarmUpValue(1.0, duration=2, after=0.25)(2) == 0.25


def test_get_holds_numbers_constant_and_returns_callables_as_they_are():
    assert schedules.get(3)(99) == 3.0
    assert schedules.get(np.float32(0.5))(0) == 0.5
    for schedule in (schedules.LinearValue(0, 1, duration=2), keras.optimizers.schedules.CosineDecay(0.1, 9), lambda epoch: epoch):
        assert schedules.get(schedule) is schedule


@pytest.mark.parametrize("wrong", ["linear", None, True, [1.0], {"value": 1.0}])
def test_get_refuses_what_is_no_schedule(wrong):
    with pytest.raises(TypeError, match=r"`schedule` must be a number or a callable.*LinearValue\(.*Received: schedule="):
        schedules.get(wrong)


def test_get_refuses_a_class_and_says_how_to_write_it():
    with pytest.raises(TypeError, match=r"Write LinearValue\(\.\.\.\)"):
        schedules.get(schedules.LinearValue)
    with pytest.raises(ValueError, match="`schedule` must be finite"):
        schedules.get(float("nan"))


@pytest.mark.parametrize("make", [schedules.LinearValue, schedules.CosineValue])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"duration": 0}, ValueError, r"`duration` must be greater than 0. Received: duration=0"),
        ({"duration": -3}, ValueError, r"`duration` must be greater than 0"),
        ({"begin": -1}, ValueError, r"`begin` must not be negative. Received: begin=-1"),
        ({"start": float("inf")}, ValueError, r"`start` must be finite"),
        ({"end": "2"}, TypeError, r"`end` must be a number. Received: end='2' of type str"),
    ],
)
def test_a_passage_refuses_what_is_out_of_range(make, changed, error, message):
    with pytest.raises(error, match=message):
        make(**{"start": 1.0, "end": 0.0, "duration": 5} | changed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": None, "duration": 3}, TypeError, "`target` must be a number"),
        ({"target": 1.0, "duration": 0}, ValueError, "`duration` must be greater than 0"),
        ({"target": 1.0, "duration": 3, "start": float("nan")}, ValueError, "`start` must be finite"),
        ({"target": 1.0, "duration": 3, "after": "cosine"}, TypeError, "`after` must be a number or a callable"),
    ],
)
def test_a_warm_up_refuses_what_is_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        schedules.WarmUpValue(**arguments)


def test_constant_refuses_what_is_no_number():
    with pytest.raises(TypeError, match="`value` must be a number"):
        schedules.ConstantValue("4")


def test_a_subclass_that_forgets_something_is_told_what():
    class Empty(schedules.ValueSchedule):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must implement __call__\(position\)"):
        Empty()(0)
    with pytest.raises(NotImplementedError, match="Empty must implement get_config"):
        Empty().get_config()
