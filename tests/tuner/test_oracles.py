"""An oracle for several objectives finds their front, keeps budgets, and goes on after a kill."""

import keras_tuner
import numpy as np
import pytest

from keras_kd.tuner import ParetoOracle, hypervolume, pareto_front


def error_and_size(hp):
    """Two objectives in conflict: their front is where `a` alone varies."""
    a, b = hp.Float("a", 0.0, 1.0), hp.Float("b", 0.0, 1.0)
    kind = hp.Choice("kind", ["good", "bad", "worse"])
    waste = 2 * b + {"good": 0.0, "bad": 0.5, "worse": 1.0}[kind]
    return {"error": (1 - a) ** 2 + waste, "size": a**2 + waste}


def objectives():
    return [keras_tuner.Objective("error", "min"), keras_tuner.Objective("size", "min")]


class Tuner(keras_tuner.Tuner):
    """Asks a formula in place of a training."""

    limit = killed_at = None

    def run_trial(self, trial, *args, **kwargs):
        if self.killed_at == int(trial.trial_id):
            raise KilledError
        found = error_and_size(trial.hyperparameters)
        if self.limit is not None:
            found["over_budget"] = max(0.0, found["size"] / self.limit - 1)
        return found | {"multi_objective": sum(found.values())}


class KilledError(BaseException):
    """Nothing that a tuner would take for a failed trial."""


def search(folder, oracle, name="search", *, on_disk=False, **attributes):
    tuner = Tuner(oracle, directory=folder, project_name=name)
    if not on_disk:  # three files a trial take longer than the trial
        oracle.save = oracle._save_trial = lambda *args: None
    vars(tuner).update(attributes)
    error_and_size(oracle.hyperparameters)
    tuner.search(verbose=0)
    return tuner


def test_it_covers_more_of_the_front_than_random_search(tmp_path):
    covered = {}
    for seed in (1, 2, 3):
        for make in (ParetoOracle, keras_tuner.oracles.RandomSearchOracle):
            tuner = search(tmp_path, make(objectives(), max_trials=60, seed=seed), f"{make.__name__}{seed}")
            front = pareto_front(tuner, objectives(), reference={"error": 2.0, "size": 2.0})
            covered.setdefault(make, []).append(front.hypervolume)
    a = np.linspace(0, 1, 2001)
    best = hypervolume(np.stack([(1 - a) ** 2, a**2], 1), [2.0, 2.0])
    assert all(np.array(covered[ParetoOracle]) > covered[keras_tuner.oracles.RandomSearchOracle])
    assert min(covered[ParetoOracle]) > 0.85 * best


def test_scores_are_fronts_and_the_best_trials_those_of_the_first(tmp_path):
    tuner = search(tmp_path, ParetoOracle(objectives(), max_trials=12, seed=1))
    front = {one.trial_id for one in pareto_front(tuner)}
    assert {trial.trial_id for trial in tuner.oracle.trials.values() if trial.score == 0.0} == front
    assert {trial.trial_id for trial in tuner.oracle.get_best_trials(len(front))} == front


def test_it_searches_within_the_budget(tmp_path):
    tuner = search(tmp_path, ParetoOracle(objectives(), max_trials=60, seed=1), limit=0.25)
    later = [trial for trial in tuner.oracle.trials.values() if int(trial.trial_id) >= 30]
    within = [trial for trial in later if trial.metrics.get_last_value("over_budget") == 0]
    random = np.random.default_rng(0)
    a, b, waste = random.uniform(size=10000), random.uniform(size=10000), random.choice([0.0, 0.5, 1.0], size=10000)
    chance = np.mean(a**2 + 2 * b + waste <= 0.25)
    assert len(within) / len(later) > 8 * chance
    assert all(one.values["size"] <= 0.25 for one in pareto_front(tuner))


def test_it_goes_on_where_it_was_stopped_with_the_same_proposals(tmp_path):
    whole = search(tmp_path, ParetoOracle(objectives(), max_trials=14, seed=5), "whole")
    with pytest.raises(KilledError):
        search(tmp_path, ParetoOracle(objectives(), max_trials=14, seed=5), "parts", on_disk=True, killed_at=9)
    resumed = search(tmp_path, ParetoOracle(objectives(), max_trials=14, seed=5), "parts", on_disk=True)
    assert len(resumed.oracle.trials) == 14
    found = [sorted(tuner.oracle.trials.values(), key=lambda trial: trial.trial_id) for tuner in (whole, resumed)]
    assert [trial.hyperparameters.values for trial in found[0]] == [trial.hyperparameters.values for trial in found[1]]
    assert [trial.score for trial in found[0]] == [trial.score for trial in found[1]]


def test_it_stops_when_all_values_have_been_tried(tmp_path):
    class Three(keras_tuner.Tuner):
        def run_trial(self, trial, *args, **kwargs):
            place = ["good", "bad", "worse"].index(trial.hyperparameters.get("kind"))
            return {"error": place, "size": -place, "multi_objective": 0.0}

    oracle = ParetoOracle(objectives(), max_trials=50, seed=1)
    oracle.hyperparameters.Choice("kind", ["good", "bad", "worse"])
    Three(oracle, directory=tmp_path, project_name="small").search(verbose=0)
    assert sorted(trial.hyperparameters.values["kind"] for trial in oracle.trials.values()) == ["bad", "good", "worse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objectives": ["val_accuracy"]}, "two or more different ones"),
        ({"objectives": ["bytes", "bytes"]}, "two or more different ones"),
        ({"objectives": ["bytes", "fun"]}, 'whether "fun" is to be small or large'),
        ({"objectives": ["bytes", "macs"], "max_trials": 0}, "`max_trials` must be a whole number of at least 1"),
        ({"objectives": ["bytes", "macs"], "spread": 2}, "`spread` must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParetoOracle(**arguments)
