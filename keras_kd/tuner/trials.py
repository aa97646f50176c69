"""How is one trial trained, so that what is reported is what was saved? One `fit`, and the best epoch that reached its target."""

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import keras_tuner
from keras_tuner.errors import FailedTrialError, FatalTypeError, FatalValueError

from keras_kd import callbacks as kd_callbacks
from keras_kd import schedules
from keras_kd._tunable import fraction
from keras_kd.tuner.objectives import COSTS, OVER, SPARSITY, Score, as_objective
from keras_kd.tuner.resuming import keep_copy

_TOLERANCE = 0.005  # as in SparseCheckpoint
FILE = "student.tflite"


def fit_trial(
    model: keras.Model,
    *args: Any,
    callbacks: Sequence[Any] = (),
    trial_callbacks: Sequence[Any] = (),
    score: Score | None = None,
    sparsity: float | None = None,
    monitor: Any = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Trains the model of a trial, and reports the epoch that it saves: the best of those that reached their target.

    Call it in the `fit` of your own `keras_tuner.HyperModel`; `DistillationHyperModel` does. KerasTuner alone saves the epoch
    with the best objective, which in pruning is one from before the zeros were there. Here

    - an epoch counts only if it has the sparsity, and `Quantization` has begun to round;
    - after `fit` the model has the weights of the best such epoch, on which costs are measured, and which the trial's file holds;
    - all metrics are those of this epoch, with `best_epoch`, its index from 0.

    If no epoch counts, a trial with a `score` is scored like one that is over its budgets (`over_budget` has what is missing from
    the sparsity), and one without fails.

    Args:
        model: a compiled model, a Distiller or any other.
        *args: of `model.fit`.
        callbacks: those that KerasTuner passes to `HyperModel.fit`: hand them on. Copies of what was given to `search` are among
            them.
        trial_callbacks: callbacks of this trial alone, made here and now: Pruning, Quantization, Clustering, AnnealTemperature.
            They come after the others and are not copied.
        score: measures costs on the saved weights, and adds the metrics `score` and `over_budget`.
        sparsity: the share of zeros that an epoch must have. None takes it from a `Pruning` among the callbacks.
        monitor: what epochs are compared by: a name or `keras_tuner.Objective`. None is the score's metric, or the tuner's
            objective, as far as it is in the logs.
        **kwargs: of `model.fit`.

    Returns:
        The metrics of the saved epoch, for `HyperModel.fit` to return; with the key `multi_objective` if the tuner has several.

    Raises:
        ValueError: at once, and ending the search, if the objective is no metric, or a Score with budgets is not the objective.
        keras_tuner.errors.FailedTrialError: if no epoch reached the sparsity, and there is no score.

    Example:

    >>> student = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), keras.layers.Dense(1)])
    >>> student.compile("adam", "mse")
    >>> pruning = keras_kd.callbacks.Pruning(0.5)
    >>> score = keras_kd.tuner.Score("loss", report=["nonzero_parameters"])
    >>> found = keras_kd.tuner.fit_trial(
    ...     student, np.ones((32, 10)), np.ones((32, 1)), epochs=2, verbose=0, trial_callbacks=[pruning], score=score)
    >>> found["sparsity"], found["best_epoch"] in (0.0, 1.0)
    (0.5, True)
    """
    if score is not None and not isinstance(score, Score):
        raise FatalTypeError(f"`score` must be a keras_kd.tuner.Score. Received: score={score!r} of type {type(score).__name__}.")
    checkpoint = next((one for one in callbacks if _is_checkpoint(one)), None)
    objective = None if checkpoint is None else checkpoint.objective
    _check_objective(objective, score)
    others = [one for one in callbacks if one is not checkpoint]
    with _folder(checkpoint) as folder:
        files = _Files(folder / "execution.weights.h5", folder / f"execution.{FILE}")
        found = _measured_untrained(model, score, objective, files)
        if found is None:
            target = _target(trial_callbacks, others) if sparsity is None else float(fraction("sparsity", sparsity))
            rounding = [one for one in [*others, *trial_callbacks] if isinstance(one, kd_callbacks.Quantization)]
            rules = _Rules(target, max([one.start_step for one in rounding], default=0), _tolerance(model))
            best = _BestEpoch(files.weights, _comparison(monitor, score, objective), rules, _wanted(objective, score))
            model.fit(*args, callbacks=[*others, *trial_callbacks, best], **kwargs)
            found = _report(model, best, score, files)
        if isinstance(objective, keras_tuner.Objective):
            _finish(found, objective)
        if checkpoint is not None:
            _keep(found, checkpoint, files)
    return found


class _Files(NamedTuple):
    weights: pathlib.Path
    model: pathlib.Path


class _Rules(NamedTuple):
    """What an epoch must have to count."""

    sparsity: float | None
    start_step: int
    tolerance: float

    def missing(self, logs: Mapping[str, float], optimizer: Any) -> float:
        """0 for an epoch that counts; else what it lacks, as a share."""
        lacks = 0.0
        if self.sparsity:
            if SPARSITY not in logs:
                raise FatalValueError(
                    f"An epoch must have a sparsity of {self.sparsity}, and nothing logs it. Received logs: {', '.join(logs)}. Put "
                    "Pruning or KeepSparsity into `trial_callbacks`."
                )
            lacks = max(0.0, self.sparsity - self.tolerance - logs[SPARSITY]) / self.sparsity
        if self.start_step > 0 and int(keras.ops.convert_to_numpy(optimizer.iterations)) <= self.start_step:
            lacks += 1.0
        return lacks


class _BestEpoch(keras.callbacks.Callback):
    """Saves the weights of the best epoch that counts; until there is one, those of the latest."""

    def __init__(
        self, path: pathlib.Path, compare: "Callable[[Mapping[str, float]], float]", rules: _Rules, wanted: Sequence[str]
    ) -> None:
        super().__init__()
        self.path, self.compare, self.rules, self.wanted = path, compare, rules, wanted
        self.logs: dict[str, float] = {}
        self.epoch = -1
        self.value = math.nan
        self.missing = math.inf

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Compares the epoch with the best one so far."""
        logs = {name: float(value) for name, value in (logs or {}).items()}
        if self.epoch < 0 and (lost := [name for name in self.wanted if name not in logs]):
            raise FatalValueError(
                f"The objective {', '.join(lost)} is no metric of this training. Received logs: {', '.join(logs)}. Name one of "
                "these as the tuner's objective, compile with that metric, or give `search` the validation_data that `val_` needs."
            )
        missing, value = self.rules.missing(logs, self.model.optimizer), self.compare(logs)
        is_better = math.isnan(self.value) or value > self.value
        if (missing > 0 and self.missing > 0) or (missing == 0 and (self.missing > 0 or is_better)):
            self.logs, self.epoch, self.value, self.missing = logs, epoch, value, missing
            self.model.save_weights(self.path)


def _is_checkpoint(callback: Any) -> bool:
    """Whether it is KerasTuner's own saver of the best epoch, whose place `fit_trial` takes."""
    return type(callback).__name__ == "SaveBestEpoch" and hasattr(callback, "objective") and hasattr(callback, "filepath")


def _several(objective: Any) -> list[keras_tuner.Objective]:
    """The objectives inside of KerasTuner's sum of several; else the one."""
    return list(getattr(objective, "objectives", [objective]))


def _check_objective(objective: Any, score: Score | None) -> None:
    if objective is None:
        return
    if objective.name == "default_objective":
        raise FatalValueError(
            "The tuner must have an objective. Received: objective=None. Give it the name of a metric, such as "
            'objective="val_accuracy", or `score.objective`.'
        )
    names = [one.name for one in _several(objective)]
    if "score" in names and score is None:
        raise FatalValueError('The objective "score" needs `score`: a keras_kd.tuner.Score. Received: score=None.')
    if score is not None and score.budgets and len(names) == 1 and names != ["score"]:
        raise FatalValueError(
            f'A Score with budgets must be the tuner\'s objective, or it knows nothing of them. Received: objective="{names[0]}", '
            f"budgets={score.budgets}. Give the tuner objective=score.objective, or a ParetoOracle of several objectives."
        )
    if lost := [name for name in names if name in COSTS and (score is None or name not in score.costs)]:
        raise FatalValueError(
            f"The objective {', '.join(lost)} is a cost that nothing measures. Received: score="
            f"{None if score is None else f'a Score of {score.costs}'}. Pass score=Score(..., report={lost!r})."
        )


def _wanted(objective: Any, score: Score | None) -> list[str]:
    """Names that must be in the logs of an epoch."""
    made = {*COSTS, OVER, "score", "best_epoch", SPARSITY}
    names = [] if objective is None else [one.name for one in _several(objective) if one.name not in made]
    return names if score is None else [*dict.fromkeys([*names, score.metric.name])]


def _comparison(monitor: Any, score: Score | None, objective: Any) -> "Callable[[Mapping[str, float]], float]":
    """A function of an epoch's logs, large for good epochs."""
    given = monitor if monitor is not None else score.metric if score is not None else objective
    if given is None:
        return lambda logs: -logs.get("val_loss", logs.get("loss", math.nan))
    objectives = [as_objective(one) for one in _several(given)]

    def value(logs: Mapping[str, float]) -> float:
        known = [one for one in objectives if one.name in logs]
        if monitor is not None and not known:
            raise FatalValueError(f"`monitor` must be in the logs. Received: monitor={monitor!r}, logs {', '.join(logs)}.")
        return sum((1 if one.direction == "max" else -1) * logs[one.name] for one in known)

    return value


def _target(*lists: Sequence[Any]) -> float | None:
    """The sparsity that a `Pruning` among the callbacks leads to, where that is one number."""
    for callback in [one for callbacks in lists for one in callbacks if isinstance(one, kd_callbacks.Pruning)]:
        schedule = callback.pruning_schedule
        if callback.sparsity_m_by_n is not None:
            return callback.sparsity_m_by_n[0] / callback.sparsity_m_by_n[1] if not isinstance(schedule, dict) else None
        if isinstance(schedule, schedules.PruningSchedule):
            target = getattr(schedule, "final_sparsity", getattr(schedule, "target_sparsity", None))
            return None if target is None else float(target)
    return None


def _tolerance(model: Any) -> float:
    """How far below its sparsity a model may be, since each kernel has a whole number of zeros."""
    sizes = [math.prod(weight.shape) for weight in getattr(model, "student", model).weights if len(weight.shape) > 1]
    return max(_TOLERANCE, len(sizes) / max(1, sum(sizes)))


def _measured_untrained(model: Any, score: Score | None, objective: Any, files: _Files) -> dict[str, float] | None:
    """What is known of a model that is over its budgets before it is trained; None for others."""
    if score is None or objective is None or objective.name != "score" or not score.budgets.keys() & {"macs", "parameters"}:
        return None
    costs = score.measure_model(model)
    over = sum(excess for name, excess in score.excesses(costs).items() if name != "nonzero_parameters")
    if not over:
        return None
    model.save_weights(files.weights)  # a tuner may load the trial
    return costs | {OVER: over, "score": score({OVER: over})}


def _report(model: Any, best: _BestEpoch, score: Score | None, files: _Files) -> dict[str, float]:
    """The metrics of the saved epoch, whose weights the model has afterwards."""
    if best.epoch < 0:
        raise FatalValueError("A trial must train for one epoch at least. Received: none. Set `epochs` in `search`.")
    model.load_weights(files.weights)
    found = best.logs | {"best_epoch": float(best.epoch)}
    if score is None:
        if best.missing > 0:
            raise FailedTrialError(
                f"No epoch reached its target: the last one has a sparsity of {best.logs.get(SPARSITY, 0.0):.3f}, wanted is "
                f"{best.rules.sparsity}, with rounding from step {best.rules.start_step} on. Let the schedule end before "
                "the training does."
            )
        return found
    found |= score.measure(model, files.model)
    found[OVER] = sum(score.excesses(found).values()) + best.missing
    found["score"] = score(found)
    return found


def _finish(found: dict[str, float], objective: Any) -> None:
    """Adds KerasTuner's sum of several objectives, and takes out what is no number, of which it makes warnings."""
    several = _several(objective)
    if lost := [one.name for one in several if one.name not in found]:
        raise FatalValueError(f"The objective {', '.join(lost)} is no metric of this trial. Received: {', '.join(found)}.")
    if len(several) > 1 or objective.name == "multi_objective":
        found[objective.name] = objective.get_value(found)
    for name in [name for name, value in found.items() if not math.isfinite(value) and name != objective.name]:
        del found[name]


def _keep(found: Mapping[str, float], checkpoint: Any, files: _Files) -> None:
    """Makes the files of this training those of the trial, if it is the best of the trial's executions."""
    value = found[checkpoint.objective.name]
    if checkpoint.objective.better_than(value, checkpoint.best_value) or not os.path.exists(checkpoint.filepath):
        checkpoint.best_value = value
        os.replace(files.weights, checkpoint.filepath)
        if files.model.exists():
            os.replace(files.model, files.model.parent / FILE)
    for file in files:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _folder(checkpoint: Any) -> Iterator[pathlib.Path]:
    """The folder of the trial; outside of a search one that goes afterwards."""
    if checkpoint is not None:
        folder = pathlib.Path(checkpoint.filepath).parent
        folder.mkdir(parents=True, exist_ok=True)
        keep_copy(folder.parent)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as made:
            yield pathlib.Path(made)
