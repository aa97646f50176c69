"""Which trial comes next, when there are several objectives and no weights between them? An evolutionary search along the front."""

from collections.abc import Sequence
from typing import Any

import keras_tuner
import numpy as np

from keras_kd._tunable import fraction
from keras_kd.tuner import _dominance
from keras_kd.tuner.objectives import OVER, as_objective, last


class ParetoOracle(keras_tuner.Oracle):
    """Searches the whole front of several objectives, where KerasTuner's list of objectives minimises their plain sum.

    The first trials are random. Then each is a child of two of the best so many trials, by their front and, within one, by how
    much room is around them; each parent is the better of two that are drawn. The child takes each hyperparameter from either
    parent, and changes it with a probability of one in the number of hyperparameters. This is NSGA-II, one trial at a time, which
    suits chief and workers: nobody waits for a generation. Trials that miss the budgets of a `Score` (`over_budget` above 0) come
    after all that keep them, the nearer ones first.

    The `score` of a trial, which KerasTuner shows and sorts by, is the index of its front among those known so far, 0 for the
    trials that no other dominates; `pareto_front(tuner)` gives these. Hand the oracle to `keras_tuner.Tuner(oracle=...,
    hypermodel=...)`.

    Args:
        objectives: at least two names of metrics or `keras_tuner.Objective`s; a cost such as "bytes" needs a `Score` that reports
            it.
        max_trials: number of trials.
        num_initial_points: how many of them are random, and how many of the best can be parents. None is a seventh of all, at
            least 4.
        spread: largest standard deviation of a change, as a share of a hyperparameter's range; it is drawn from a thirtieth of this
            up to this. Categories change to any other.
        seed: of all random choices.
        **kwargs: of `keras_tuner.Oracle`: `hyperparameters`, `allow_new_entries`, `tune_new_entries`, `max_retries_per_trial`,
            `max_consecutive_failed_trials`.

    Raises:
        ValueError: for fewer than two objectives, one that is given twice, or a number out of its range.

    Example:

    >>> oracle = keras_kd.tuner.ParetoOracle(["val_accuracy", "bytes"], max_trials=20, seed=1)
    >>> [(objective.name, objective.direction) for objective in oracle.objectives]
    [('val_accuracy', 'max'), ('bytes', 'min')]

    Reference:
        Deb, Pratap, Agarwal, Meyarivan: A fast and elitist multiobjective genetic algorithm: NSGA-II, 2002.
    """

    def __init__(
        self,
        objectives: Sequence[Any],
        max_trials: int = 10,
        *,
        num_initial_points: int | None = None,
        spread: float = 0.4,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = list(objectives) if isinstance(objectives, list | tuple) else [objectives]
        self.objectives = [as_objective(one) for one in given]
        names = [one.name for one in self.objectives]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"`objectives` must be two or more different ones. Received: objectives={names}.")
        for name, value in (("max_trials", max_trials), ("num_initial_points", num_initial_points)):
            optional = name == "num_initial_points" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}.")
        super().__init__(objective=self.objectives, max_trials=max_trials, seed=seed, **kwargs)
        self.num_initial_points = max(4, max_trials // 7) if num_initial_points is None else num_initial_points
        self.spread = float(fraction("spread", spread))

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Values for the next trial.

        Args:
            trial_id: its name.

        Returns:
            `{"status": "RUNNING", "values": ...}`, or `{"status": "STOPPED"}` when all values have been tried.
        """
        done = self._completed()
        values = None
        if len(done) >= 2 and len(self.trials) >= self.num_initial_points:
            values = self._child(done)
        if values is None:
            values = self._random_values()
        return {"status": "STOPPED", "values": None} if values is None else {"status": "RUNNING", "values": values}

    def score_trial(self, trial: Any) -> None:
        """Gives all completed trials the index of their front.

        Args:
            trial: the one that has just ended.
        """
        trial.best_step = 0
        trial.score = 0.0 if np.isfinite(self._values(trial)).all() else np.nan  # KerasTuner fails a trial of NaN
        self._rank()

    def get_best_trials(self, num_trials: int = 1) -> list[Any]:
        """The trials of the first fronts; within a front those with most space around them come first.

        Args:
            num_trials: how many.
        """
        done = self._completed()
        rest = [trial for trial in self.trials.values() if trial.status != "COMPLETED"]
        return [*(done[index] for index in self._order(done)), *rest][:num_trials]

    def reload(self) -> None:
        """Goes on from the project's files, whose scores are of different times."""
        super().reload()
        self._rank()

    def _completed(self) -> list[Any]:
        """Its trials in the order in which they began, whatever that of the files is: random choices go by place."""
        done = [trial for trial in self.trials.values() if trial.status == "COMPLETED" and np.isfinite(self._values(trial)).all()]
        places = {trial_id: place for place, trial_id in enumerate(self.start_order)}
        return sorted(done, key=lambda trial: (places.get(trial.trial_id, len(places)), trial.trial_id))

    def _values(self, trial: Any) -> np.ndarray:
        """Its objectives, all to be small."""
        return np.array([last(trial, one.name) * (-1 if one.direction == "max" else 1) for one in self.objectives])

    def _rank(self) -> None:
        done = self._completed()
        if done:
            violations = np.array([last(trial, OVER, 0.0) for trial in done])
            fronts = _dominance.front_indices(np.array([self._values(trial) for trial in done]), violations)
            for trial, front in zip(done, fronts, strict=True):
                trial.score = float(front)

    def _order(self, done: list[Any]) -> list[int]:
        """From the best to the worst: by front, and within one by the room around."""
        return [int(index) for index in np.lexsort((-self._crowding(done), [trial.score for trial in done]))] if done else []

    def _crowding(self, trials: list[Any]) -> np.ndarray:
        """Of each trial, within its own front."""
        found = np.zeros(len(trials))
        fronts = np.array([trial.score for trial in trials])
        for front in np.unique(fronts):
            members = np.flatnonzero(fronts == front)
            found[members] = _dominance.crowding(np.array([self._values(trials[index]) for index in members]))
        return found

    def _child(self, done: list[Any]) -> dict[str, Any] | None:
        """New values from two parents; None if all that it finds have been tried."""
        space = [one for one in self.hyperparameters.space if type(one).__name__ != "Fixed"]
        population = [done[index] for index in self._order(done)[: max(2, self.num_initial_points)]]
        for _ in range(self._max_collisions if space else 0):
            rng = np.random.default_rng(self._seed_state)
            self._seed_state += 1
            parents = [population[rng.integers(len(population), size=2).min()] for _ in range(2)]  # the better of two
            values = self._mixed(rng, parents, 1 / len(space))
            if not self._duplicate(values):
                return values
        return None

    def _mixed(self, rng: np.random.Generator, parents: list[Any], rate: float) -> dict[str, Any]:
        made = keras_tuner.HyperParameters()
        for parameter in self.hyperparameters.space:
            made.merge([parameter])
            if not made.is_active(parameter):
                continue
            known = parents[rng.integers(2)].hyperparameters.values
            value = known.get(parameter.name, parameter.default)
            if type(parameter).__name__ != "Fixed" and rng.random() < rate:
                value = self._changed(rng, parameter, value)
            made.values[parameter.name] = value
        return dict(made.values)

    def _changed(self, rng: np.random.Generator, parameter: Any, value: Any) -> Any:
        kind = type(parameter).__name__
        if kind == "Boolean" or (kind == "Choice" and not parameter.ordered):
            return parameter.prob_to_value(rng.random())  # categories have no neighbours
        place = parameter.value_to_prob(value) + rng.normal(0.0, self.spread * 10 ** rng.uniform(-1.5, 0.0))
        place = abs(place) % 2
        place = min(place, 2 - place)  # reflected at the ends
        return parameter.prob_to_value(float(np.clip(place, 0.0, 1.0)))
