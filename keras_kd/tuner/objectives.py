"""What is a good trial, when a model must be small as well as right? One number that any oracle learns from."""

import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine import metrics_tracking
from keras_tuner.errors import FatalValueError

from keras_kd import export, profile
from keras_kd._tunable import finite_number, non_negative, positive

OVER = "over_budget"  # the metric that says by how much a trial misses its limits
SPARSITY = "sparsity"
_OF_MODEL = ("macs", "parameters", "nonzero_parameters")  # known without a file
_OF_FILE = ("bytes", "gzip_bytes", "latency")
COSTS = (*_OF_FILE, *_OF_MODEL)


def direction_of(name: str) -> str:
    """Whether a metric is to be "min" or "max": a cost of this module, or what KerasTuner knows.

    Raises:
        ValueError: for a name that neither knows.
    """
    if name in COSTS or name == OVER:
        return "min"
    if name in ("score", SPARSITY):
        return "max"
    if name.endswith("_loss"):
        return "min"
    direction = metrics_tracking.infer_metric_direction(name)
    if direction is None:
        raise ValueError(
            f'Nobody knows whether "{name}" is to be small or large. Received: the name alone. Say it: '
            f'keras_tuner.Objective("{name}", "max").'
        )
    return str(direction)


def as_objective(given: Any) -> keras_tuner.Objective:
    """An objective, from one or from a name.

    Raises:
        TypeError: for anything else.
        ValueError: for a name of unknown direction.
    """
    if isinstance(given, keras_tuner.Objective):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"An objective must be a name or a keras_tuner.Objective. Received: {given!r} of type {type(given).__name__}."
        )
    return keras_tuner.Objective(given, direction_of(given))


class Score:
    """One number for a trial: how good it is within hard budgets, and by how much it misses them.

    ```
    q     = (metric - worst) / (best - worst)                 scale = (worst, best)
    s     = q - sum_c weight_c cost_c / reference_c           within all budgets
    over  = sum_c max(0, cost_c / budget_c - 1)
    score = s             if over = 0 and s >= 0
            s / (1 - s)   if over = 0 and s < 0               in (-1, 0)
            -1 - over / (1 + over)   if over > 0              in (-2, -1)
    ```

    So every trial within the budgets is above every one that is not, and of those that miss them the nearer one is higher: any
    oracle is led towards the budgets, by numbers that are finite and of one size (of infinite ones KerasTuner's Gaussian process
    makes zeros). A training whose metric is NaN scores -2, the least. Costs are divided by what they are compared with, and the
    metric by its scale, so weights compare like with like: `weights={"bytes": 0.1}` gives up 0.1 of the metric's scale for a file
    as large as its budget.

    The costs are: "bytes" and "gzip_bytes" of the LiteRT file, "latency" of one inference in it, in milliseconds; "macs",
    "parameters" and "nonzero_parameters" of the model. `fit_trial` measures them on the weights that it saves, and leaves the
    file in the trial's folder as `student.tflite`. A trial whose MACs or parameters are over a budget is not trained at all,
    where the tuner's objective is this score.

    Args:
        metric: what is to be good: the name of a metric in the logs, or a `keras_tuner.Objective`.
        budgets: the most that costs may be, by name.
        weights: how much costs count inside the budgets, by name, not negative.
        references: what weighted costs are divided by, by name; by default their budgets.
        report: costs that are measured besides, for `pareto_front` or your own eyes.
        scale: `(worst, best)` values of the metric: 0 and 1 of its quality. None is (0, 1), or (1, 0) for a metric to be small.
        export: arguments of `keras_kd.export.to_litert`, such as `{"quantization": "int8", "representative_data": x[:100]}`.
        threads: threads of the interpreter, for the latency.
        runs: timed inferences, for the latency.

    Raises:
        TypeError: for a metric or number that is none.
        ValueError: for a cost that is not known, a number out of its range, a weight without reference, or a metric whose direction
            nobody knows.

    Example:

    >>> score = keras_kd.tuner.Score("val_accuracy", budgets={"bytes": 1000})
    >>> score({"val_accuracy": 0.8, "bytes": 900}), score({"val_accuracy": 0.9, "bytes": 2000})
    (0.8, -1.5)

    Reference:
        Deb: An efficient constraint handling method for genetic algorithms, 2000.
    """

    def __init__(
        self,
        metric: Any = "val_accuracy",
        *,
        budgets: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        references: Mapping[str, float] | None = None,
        report: Collection[str] = (),
        scale: tuple[float, float] | None = None,
        export: Mapping[str, Any] | None = None,
        threads: int = 1,
        runs: int = 50,
    ) -> None:
        self.metric = as_objective(metric)
        self.budgets = _numbers("budgets", budgets, positive)
        self.weights = _numbers("weights", weights, non_negative)
        self.references = self.budgets | _numbers("references", references, positive)
        self.report = tuple(_known("report", [report] if isinstance(report, str) else report))
        if lost := [name for name in self.weights if name not in self.references]:
            raise ValueError(
                f"A weighted cost needs a number that it is compared with. Received: weights={dict(self.weights)}, and neither a "
                f"budget nor a reference for {', '.join(lost)}. Add references={{{lost[0]!r}: ...}}, such as that of the plain "
                "student."
            )
        self.scale = _scale(scale, self.metric.direction)
        self.export = dict(export or {})
        self.threads, self.runs = threads, runs

    @property
    def objective(self) -> keras_tuner.Objective:
        """What the tuner takes as its objective: the score, to be large."""
        return keras_tuner.Objective("score", "max")

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are measured."""
        wanted = {*self.budgets, *self.weights, *self.report}
        return tuple(name for name in COSTS if name in wanted)

    def measure_model(self, model: keras.Model) -> dict[str, float]:
        """Measures those costs that need no file.

        Args:
            model: a built Keras model; for a Distiller, its student.

        Returns:
            The costs by name.

        Raises:
            ValueError: if MACs are asked for, and some layer's cannot be counted.
        """
        wanted = [name for name in self.costs if name in _OF_MODEL]
        if not wanted:
            return {}
        sample = self.export.get("check_data", self.export.get("representative_data"))
        layers = profile.layer_profiles(getattr(model, "student", model), sample)
        if "macs" in wanted and (unknown := [layer.path for layer in layers if layer.macs is None]):
            raise FatalValueError(
                f"The multiply-accumulates of some layers cannot be counted. Received: {', '.join(unknown)}. Take a budget of "
                '"latency" or "bytes" instead of "macs".'
            )
        found = {
            "macs": sum(layer.macs or 0 for layer in layers),
            "parameters": sum(layer.parameters for layer in layers),
            "nonzero_parameters": sum(layer.nonzero_parameters for layer in layers),
        }
        return {name: float(found[name]) for name in wanted}

    def measure(self, model: keras.Model, path: str | os.PathLike[str]) -> dict[str, float]:
        """Measures all costs that this score is about, and writes the model's LiteRT file if one of them needs it.

        Args:
            model: a built Keras model; for a Distiller, its student.
            path: of the file.

        Returns:
            The costs by name.

        Raises:
            RuntimeError: see `keras_kd.export.to_litert`.
        """
        found = self.measure_model(model)
        if not any(name in _OF_FILE for name in self.costs):
            return found
        report = export.to_litert(getattr(model, "student", model), path, **{"verbose": 0, **self.export})
        found |= {"bytes": float(report.size), "gzip_bytes": float(report.gzip_size)}
        if "latency" in self.costs:
            found["latency"] = profile.measure_latency(pathlib.Path(path), threads=self.threads, runs=self.runs, verbose=0).median
        return {name: found[name] for name in self.costs}

    def excesses(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By how much costs are over their budgets, as shares of these; only those that are.

        Args:
            metrics: costs by name; missing ones are within.
        """
        over = {name: metrics[name] / budget - 1 for name, budget in self.budgets.items() if name in metrics}
        return {name: share for name, share in over.items() if share > 0}

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """The score of a trial.

        Args:
            metrics: the metric and the costs, by name; `over_budget`, if it is there, is taken as it is.

        Returns:
            A finite number, large for good trials.

        Raises:
            ValueError: if the metric, or a weighted cost of a trial within its budgets, is missing.
        """
        over = metrics[OVER] if OVER in metrics else sum(self.excesses(metrics).values())
        if over > 0:
            return -1 - over / (1 + over)
        if missing := [name for name in (self.metric.name, *self.weights) if name not in metrics]:
            raise FatalValueError(f"The score needs {', '.join(missing)}. Received: {', '.join(metrics) or 'nothing'}.")
        worst, best = self.scale
        value = (metrics[self.metric.name] - worst) / (best - worst)
        value -= sum(weight * metrics[name] / self.references[name] for name, weight in self.weights.items())
        if not math.isfinite(value):
            return -2.0
        return value if value >= 0 else value / (1 - value)

    def best_trial(self, tuner: Any) -> Any:
        """The best finished trial within the budgets.

        Args:
            tuner: a tuner, or its oracle, after the search.

        Returns:
            A `keras_tuner` trial: `tuner.load_model(trial).student` is its model, and the file is in its folder.

        Raises:
            ValueError: if no trial is within the budgets; the message has the nearest one, and by how much it misses which.
        """
        trials = finished_trials(tuner)
        within = [trial for trial in trials if not last(trial, OVER, 0.0) and not math.isnan(last(trial, "score"))]
        if within:
            return max(within, key=lambda trial: last(trial, "score"))
        raise ValueError(told_of_nearest(trials, self.budgets))


def finished_trials(tuner: Any) -> list[Any]:
    """The completed trials of a tuner or oracle.

    Raises:
        ValueError: in a worker, which knows its own trial only, or if there is none.
        TypeError: for anything else.
    """
    oracle = getattr(tuner, "oracle", tuner)
    if not isinstance(oracle, keras_tuner.Oracle):
        if hasattr(oracle, "get_best_trials"):
            raise ValueError(
                "A worker does not know all trials. Received: a tuner that asks its chief. Call this where the environment "
                "variables of KerasTuner are not set, for a tuner of the same directory and project_name with overwrite=False."
            )
        raise TypeError(f"`tuner` must be a keras_tuner tuner or oracle. Received: tuner={tuner!r} of type {type(tuner).__name__}.")
    trials = [trial for trial in oracle.trials.values() if trial.status == "COMPLETED"]
    if not trials:
        failed = [trial for trial in oracle.trials.values() if trial.status in ("FAILED", "INVALID")]
        reason = ((failed[-1].message or "").strip().splitlines() or ["no reason is known"])[-1] if failed else ""
        raise ValueError(
            f"The search has no finished trial. Received: {len(oracle.trials)} trials, {len(failed)} failed"
            f"{f', the last one by: {reason}' if failed else ''}. Call `tuner.search(...)` first."
        )
    return trials


def last(trial: Any, name: str, default: float = math.nan) -> float:
    """The value of a metric of a trial."""
    value = trial.metrics.get_last_value(name) if trial.metrics.exists(name) else None
    return default if value is None else float(value)


def told_of_nearest(trials: list[Any], budgets: Mapping[str, float]) -> str:
    """Says which trial misses the budgets least, and by how much."""
    nearest = min(trials, key=lambda trial: last(trial, OVER, math.inf))
    missed = []
    for name, budget in budgets.items():
        value = last(nearest, name)
        if value > budget:
            missed.append(f"{name} {value:,.6g}, {value / budget - 1:.1%} over {budget:,.6g}")
    told = "; ".join(missed) or f"{last(nearest, OVER):.1%} over its limits"
    return (
        f"No trial is within the budgets. Received: {len(trials)} trials, of which {nearest.trial_id} is the nearest: {told}. "
        "Search smaller students or stronger compression, or raise the budget."
    )


def _numbers(name: str, given: Any, check: Any) -> dict[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`{name}` must be a dict of numbers by cost. Received: {name}={given!r} of type {type(given).__name__}.")
    return {cost: float(check(f"{name}[{cost!r}]", (given or {})[cost])) for cost in _known(name, given or {})}


def _known(name: str, costs: Any) -> list[str]:
    if unknown := [cost for cost in costs if cost not in COSTS]:
        raise ValueError(f"`{name}` names costs: {', '.join(COSTS)}. Received: {', '.join(map(str, unknown))}.")
    return list(costs)


def _scale(given: Any, direction: str) -> tuple[float, float]:
    if given is None:
        return (0.0, 1.0) if direction == "max" else (1.0, 0.0)
    pair = tuple(given) if isinstance(given, list | tuple) else ()
    if len(pair) != 2:
        raise ValueError(f"`scale` must be (worst, best). Received: scale={given!r}.")
    worst, best = (float(finite_number("scale", value)) for value in pair)
    if worst == best or (best > worst) != (direction == "max"):
        raise ValueError(f'`scale` must be (worst, best), and the metric is to be "{direction}". Received: scale={given!r}.')
    return worst, best
