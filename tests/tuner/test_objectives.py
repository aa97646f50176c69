"""A score is one finite number by which any oracle finds its way into the budgets."""

import math

import keras
import keras_tuner
import numpy as np
import pytest

from keras_kd.tuner import Score
from tests.conftest import classifier


def test_within_the_budgets_the_score_is_the_metric():
    score = Score("val_accuracy", budgets={"bytes": 100, "macs": 10})
    assert score({"val_accuracy": 0.75, "bytes": 100, "macs": 9}) == 0.75


@pytest.mark.parametrize("metric", ["val_accuracy", "val_student_loss"])
def test_every_trial_within_is_above_every_one_over_and_of_these_the_nearer_is_higher(metric):
    rng = np.random.default_rng(0)
    score = Score(metric, budgets={"bytes": 100, "latency": 2.0}, weights={"bytes": 3.0})
    values = 10 ** rng.uniform(-3, 3, 200) * (1 if metric == "val_accuracy" else rng.choice([-1, 1], 200))
    trials = [
        {metric: value, "bytes": size, "latency": latency}
        for value, size, latency in zip(values, rng.uniform(1, 200, 200), rng.uniform(0.1, 4, 200), strict=True)
    ]
    over = [max(0, trial["bytes"] / 100 - 1) + max(0, trial["latency"] / 2 - 1) for trial in trials]
    scores = [score(trial) for trial in trials]
    within = [number for number, miss in zip(scores, over, strict=True) if not miss]
    outside = sorted((miss, number) for miss, number in zip(over, scores, strict=True) if miss)
    assert len(within) > 20
    assert min(within) > -1 > max(number for _, number in outside)
    assert [number for _, number in outside] == sorted((number for _, number in outside), reverse=True)
    assert all(math.isfinite(number) and number > -2 for number in scores)


def test_weighted_costs_are_shares_of_their_references():
    score = Score("val_accuracy", budgets={"bytes": 200}, weights={"bytes": 0.1, "macs": 0.5}, references={"macs": 1000})
    assert score({"val_accuracy": 0.9, "bytes": 100, "macs": 400}) == pytest.approx(0.9 - 0.1 * 0.5 - 0.5 * 0.4)


def test_a_scale_makes_a_loss_comparable_and_order_is_kept_below_its_worst():
    score = Score(keras_tuner.Objective("val_loss", "min"), scale=(2.0, 0.0))
    assert score({"val_loss": 0.5}) == pytest.approx(0.75)
    assert -1 < score({"val_loss": 50.0}) < score({"val_loss": 5.0}) < 0


def test_a_training_that_diverged_has_the_lowest_score():
    score = Score("val_accuracy", budgets={"bytes": 1})
    assert score({"val_accuracy": math.nan, "bytes": 1}) == -2.0 < score({"val_accuracy": 1.0, "bytes": 10**9})


def test_costs_are_those_of_the_model_and_of_the_file(tmp_path):
    student = classifier(4)
    kernel = keras.ops.convert_to_numpy(student.layers[0].kernel)
    kernel[:2] = 0.0
    student.layers[0].kernel.assign(kernel)
    score = Score(budgets={"bytes": 10**6}, report=["macs", "parameters", "nonzero_parameters"])
    found = score.measure(student, tmp_path / "model.tflite")
    zeros = sum(int((keras.ops.convert_to_numpy(weight) == 0).sum()) for weight in student.weights)
    assert found == {
        "bytes": (tmp_path / "model.tflite").stat().st_size,
        "macs": 4 * 4 + 4 * 3,
        "parameters": 4 * 4 + 4 + 4 * 3 + 3,
        "nonzero_parameters": 4 * 4 + 4 + 4 * 3 + 3 - zeros,
    }


def test_the_latency_of_the_file_is_measured_in_milliseconds(tmp_path):
    found = Score(budgets={"latency": 1.0}, runs=5).measure(classifier(4), tmp_path / "model.tflite")
    assert 0 < found["latency"] < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"budgets": {"weight": 3}},
            "names costs: bytes, gzip_bytes, latency, macs, parameters, nonzero_parameters. Received: weight",
        ),
        ({"budgets": {"bytes": 0}}, "budgets\\['bytes'\\]` must be greater than 0"),
        ({"budgets": [3]}, "`budgets` must be a dict"),
        ({"weights": {"macs": 1.0}}, "neither a budget nor a reference for macs"),
        ({"metric": "val_fun"}, 'whether "val_fun" is to be small or large'),
        ({"metric": 3}, "a name or a keras_tuner.Objective"),
        ({"scale": (1, 0)}, 'the metric is to be "max"'),
        ({"scale": 3}, "must be \\(worst, best\\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Score(**arguments)


def test_a_metric_that_is_missing_is_named():
    with pytest.raises(ValueError, match="The score needs val_accuracy, bytes. Received: loss"):
        Score(weights={"bytes": 1.0}, references={"bytes": 1})({"loss": 1.0})
