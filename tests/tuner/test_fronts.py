"""Fronts and volumes against brute force, and what is shown of them."""

import itertools
import json
import types

import keras_tuner
import numpy as np
import pytest

from keras_kd.tuner import hypervolume, pareto_front, resume
from keras_kd.tuner._dominance import crowding, front_indices


def oracle_of(rows, objective="val_accuracy"):
    """An oracle whose finished trials have these metrics."""
    oracle = keras_tuner.oracles.RandomSearchOracle(objective=objective)
    for index, row in enumerate(rows):
        trial = types.SimpleNamespace(trial_id=f"{index:02}", status="COMPLETED", message=None)
        trial.hyperparameters = types.SimpleNamespace(values={"width": 2**index, "same": 1, "tuner/epochs": index})
        metrics = {name: types.SimpleNamespace(value=value) for name, value in row.items()}
        trial.metrics = types.SimpleNamespace(
            metrics=metrics, exists=metrics.__contains__, get_last_value=lambda name, metrics=metrics: metrics[name].value
        )
        oracle.trials[trial.trial_id] = trial
    return oracle


ROWS = [
    {"val_accuracy": 0.9, "bytes": 400.0},
    {"val_accuracy": 0.8, "bytes": 100.0},
    {"val_accuracy": 0.7, "bytes": 300.0},  # beaten by the second
    {"val_accuracy": 0.95, "bytes": 900.0, "over_budget": 0.5},
]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_hypervolume_is_that_of_counted_cells(objectives):
    rng = np.random.default_rng(objectives)
    for count in (0, 1, 7):
        points = rng.integers(0, 6, size=(count, objectives))
        cells = np.array(list(itertools.product(range(5), repeat=objectives)))  # [c, c + 1) in each direction, up to 5
        dominated = (points[:, None] <= cells[None]).all(-1).any(0) if count else np.zeros(len(cells), bool)
        assert hypervolume(points, [5] * objectives) == pytest.approx(dominated.sum())


def test_directions_turn_objectives_around():
    points = np.random.default_rng(0).uniform(size=(9, 3))
    turned = points * [1, -1, 1]
    assert hypervolume(turned, [1, -1, 1], directions=["min", "max", "min"]) == pytest.approx(hypervolume(points, [1, 1, 1]))


def test_fronts_are_those_of_pairwise_comparison():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 5, size=(40, 3)).astype(float)
    violations = rng.choice([0.0, 0.0, 1.0, 2.0], size=40)

    def beats(i, j):
        if violations[i] != violations[j]:
            return violations[i] < violations[j]
        return all(values[i] <= values[j]) and any(values[i] < values[j])

    left, expected, front = set(range(40)), {}, 0
    while left:
        best = {j for j in left if not any(beats(i, j) for i in left)}
        expected |= dict.fromkeys(best, front)
        left, front = left - best, front + 1
    assert front > 3
    assert list(front_indices(values, violations)) == [expected[i] for i in range(40)]


def test_crowding_is_the_room_between_neighbours():
    assert list(crowding(np.array([[0.0, 4.0], [1.0, 3.0], [4.0, 0.0]]))) == [np.inf, 1.0 + 1.0, np.inf]


def test_a_front_has_the_unbeaten_trials_within_the_budgets():
    front = pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"], reference={"val_accuracy": 0.5, "bytes": 500})
    assert [one.trial_id for one in front] == ["01", "00"]
    assert len(front) == 2
    assert (len(front.candidates), front.left_out) == (3, 1)
    assert front.hypervolume == pytest.approx(0.3 * 400 + 0.1 * 100)
    assert pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"]).reference == {"val_accuracy": 0.7, "bytes": 400.0}


def test_a_front_is_made_of_types_that_json_knows():
    found = pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"]).as_dict()
    assert json.loads(json.dumps(found))["candidates"][1]["values"] == {"val_accuracy": 0.8, "bytes": 100.0}


def test_the_table_shows_objectives_and_the_hyperparameters_that_differ():
    lines = str(pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"])).splitlines()
    assert lines[0].split() == ["trial", "val_accuracy", "bytes", "width"]
    assert lines[1].split() == ["01", "0.8", "100", "2"]
    assert "2 of 3 trials are on the front, 1 left out" in lines[3]
    assert lines[4].startswith("Hypervolume 30 from val_accuracy 0.7, bytes 400")


def test_the_plot_is_a_picture_and_needs_objectives(tmp_path):
    front = pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"])
    front.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must be objectives: val_accuracy, bytes. Received: macs"):
        front.plot(tmp_path / "front.png", x="macs")


def test_budgets_that_nothing_meets_name_the_nearest_trial():
    rows = [{"val_accuracy": 0.9, "bytes": 900.0, "over_budget": 0.8}, {"val_accuracy": 0.8, "bytes": 550.0, "over_budget": 0.1}]
    with pytest.raises(
        ValueError, match="No trial is within the budgets. Received: 2 trials, of which 01 is the nearest: 10.0% over"
    ):
        pareto_front(oracle_of(rows), ["val_accuracy", "bytes"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto_front(oracle_of(ROWS)), "needs two objectives or more. Received: val_accuracy"),
        (lambda: pareto_front(oracle_of(ROWS), ["val_accuracy", "macs"]), "No trial has the metric macs. Received metrics: bytes"),
        (lambda: pareto_front(oracle_of([]), ["val_accuracy", "bytes"]), "has no finished trial. Received: 0 trials"),
        (lambda: resume(3), "must be a keras_tuner tuner or oracle"),
        (lambda: pareto_front(3, ["val_accuracy", "bytes"]), "must be a keras_tuner tuner or oracle"),
        (lambda: pareto_front(oracle_of(ROWS), ["val_accuracy", "bytes"], reference={"size": 3}), "by objective.*Received: size"),
        (lambda: hypervolume([[1.0, 2.0]], [1.0]), "shapes \\(1, 2\\) and \\(1,\\)"),
        (lambda: hypervolume([[np.nan]], [1.0]), "must be finite"),
        (lambda: hypervolume([[1.0]], [1.0], directions=["up"]), 'must be "min" or "max"'),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
