"""Which trials are worth choosing between? Those that no other beats in every objective, with the space that they cover."""

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_kd._tunable import finite_number
from keras_kd.tuner import _dominance
from keras_kd.tuner.objectives import OVER, as_objective, finished_trials, last, told_of_nearest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A finished trial, as a point.

    Attributes:
        trial_id: its name.
        values: its objectives by name.
        hyperparameters: its values.
        folder: where its weights are, and its `student.tflite` if a `Score` made one; None if that is not known.
        on_front: whether no other trial dominates it.
    """

    trial_id: str
    values: dict[str, float]
    hyperparameters: dict[str, Any]
    folder: str | None
    on_front: bool


@dataclasses.dataclass(frozen=True)
class ParetoFront:
    """The trials that no other trial beats, and the others. Iterating gives the front, in the order of the first objective.

    Attributes:
        objectives: `(name, "min" or "max")` of each.
        candidates: all finished trials within the budgets.
        reference: the point that the hypervolume is measured from, by objective.
        hypervolume: what the front dominates, up to the reference; in the product of the objectives' units.
        left_out: how many finished trials are not among the candidates: over their budgets, or without a number for an objective.
    """

    objectives: tuple[tuple[str, str], ...]
    candidates: tuple[Candidate, ...]
    reference: dict[str, float]
    hypervolume: float
    left_out: int = 0

    def __iter__(self) -> Iterator[Candidate]:
        name = self.objectives[0][0]
        return iter(sorted((one for one in self.candidates if one.on_front), key=lambda one: one.values[name]))

    def __len__(self) -> int:
        return sum(one.on_front for one in self.candidates)

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A table with a row for each trial of the front: its objectives, and the hyperparameters that differ."""
        from rich import table
        from rich.console import Console

        front = list(self)
        names = list(dict.fromkeys(name for one in front for name in one.hyperparameters if not name.startswith("tuner/")))
        names = [name for name in names if len({str(one.hyperparameters.get(name, "")) for one in front}) > 1]
        made = table.Table(box=None, pad_edge=False)
        made.add_column("trial", no_wrap=True)
        for name in [*(name for name, _ in self.objectives), *names]:
            made.add_column(name, justify="right", no_wrap=True)
        for one in front:
            numbers = [_shown(one.values[name]) for name, _ in self.objectives]
            made.add_row(one.trial_id, *numbers, *(_shown(one.hyperparameters.get(name, "")) for name in names))
        console = Console(
            file=io.StringIO(), width=1000, color_system=None, markup=False, emoji=False, highlight=False, force_jupyter=False
        )
        with console.capture() as captured:
            console.print(made)
            others = f", {self.left_out} left out (over budget, or not finite)" if self.left_out else ""
            console.print(f"{len(front)} of {len(self.candidates)} trials are on the front{others}")
            point = ", ".join(f"{name} {_shown(value)}" for name, value in self.reference.items())
            console.print(f"Hypervolume {self.hypervolume:.6g} from {point}")
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | os.PathLike[str], *, x: str | None = None, y: str | None = None) -> None:
        """Writes a PNG of all trials over two of the objectives, with the front as a line of steps where there are but these two.

        Args:
            path: where to.
            x: objective along the horizontal axis; None is the second one.
            y: objective along the vertical axis; None is the first.

        Raises:
            ValueError: for a name that is no objective.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        known = dict(self.objectives)
        x, y = x or self.objectives[1][0], y or self.objectives[0][0]
        if unknown := [name for name in (x, y) if name not in known]:
            raise ValueError(f"`x` and `y` must be objectives: {', '.join(known)}. Received: {', '.join(unknown)}.")
        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        for label, color, on_front in (("other trials", "0.7", False), ("front", "tab:blue", True)):
            shown = sorted((one.values[x], one.values[y], one.trial_id) for one in self.candidates if one.on_front is on_front)
            axes.scatter([one[0] for one in shown], [one[1] for one in shown], color=color, label=label, zorder=2)
            for place, height, name in shown if on_front else ():
                axes.annotate(name, (place, height), xytext=(4, 4), textcoords="offset points", fontsize=7)
            if on_front and len(self.objectives) == 2:
                # Between two trials of the front the better value in x has the worse one in y.
                where = "post" if known[x] == "min" else "pre"
                axes.step([one[0] for one in shown], [one[1] for one in shown], where=where, color=color, zorder=1)
        axes.set_xlabel(f"{x} ({'less' if known[x] == 'min' else 'more'} is better)")
        axes.set_ylabel(f"{y} ({'less' if known[y] == 'min' else 'more'} is better)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=130)


def pareto_front(
    tuner: Any, objectives: Sequence[Any] | None = None, *, reference: Mapping[str, float] | None = None
) -> ParetoFront:
    """The trials of a search that no other trial beats in all objectives.

    Args:
        tuner: a tuner of KerasTuner, or its oracle, during or after a search or made again with `overwrite=False`.
        objectives: names of metrics that the trials report, or `keras_tuner.Objective`s; at least two. None takes the tuner's, if
            it has several.
        reference: the worst values that count for the hypervolume, by objective; missing ones are the worst of all candidates. To
            compare searches, give all of them the same.

    Returns:
        A `ParetoFront`, without trials that are over the budgets of their `Score`.

    Raises:
        ValueError: if there are fewer than two objectives, one is no metric of any trial, no trial is finished, or none is within
            the budgets (the message has the nearest one).
        TypeError: if `tuner` is none.

    Example:

    >>> import keras_tuner
    >>> class Halves(keras_tuner.HyperModel):
    ...     def build(self, hp):
    ...         hp.Choice("units", [1, 2, 4])
    ...         return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...
    ...     def fit(self, hp, model, *args, **kwargs):
    ...         units = hp.get("units")
    ...         return {"error": 1 / units, "size": units}
    >>> error, size = keras_tuner.Objective("error", "min"), keras_tuner.Objective("size", "min")
    >>> tuner = keras_tuner.GridSearch(Halves(), objective=error, directory=tmp_path)
    >>> tuner.search(verbose=0)
    >>> front = keras_kd.tuner.pareto_front(tuner, [error, size], reference={"error": 1.5, "size": 5})
    >>> [one.values for one in front], front.hypervolume
    ([{'error': 0.25, 'size': 4.0}, {'error': 0.5, 'size': 2.0}, {'error': 1.0, 'size': 1.0}], 3.75)
    """
    trials = finished_trials(tuner)
    chosen = _objectives(tuner, objectives)
    names = [one.name for one in chosen]
    if unknown := [name for name in names if not any(trial.metrics.exists(name) for trial in trials)]:
        known = sorted({name for trial in trials for name in trial.metrics.metrics})
        raise ValueError(f"No trial has the metric {', '.join(unknown)}. Received metrics: {', '.join(known)}.")
    within = [trial for trial in trials if not last(trial, OVER, 0.0)]
    if not within:
        raise ValueError(told_of_nearest(trials, getattr(_score_of(tuner), "budgets", {})))
    kept = [trial for trial in within if all(np.isfinite(last(trial, name)) for name in names)]
    if not kept:
        raise ValueError(f"No trial has a finite number for each of {', '.join(names)}. Received: {len(within)} trials.")
    signs = np.array([-1.0 if one.direction == "max" else 1.0 for one in chosen])
    values = np.array([[last(trial, name) for name in names] for trial in kept])
    fronts = _dominance.front_indices(values * signs, np.zeros(len(kept)))
    point = _reference(reference, names, values, signs)
    candidates = tuple(
        Candidate(
            trial.trial_id,
            dict(zip(names, map(float, row), strict=True)),
            dict(trial.hyperparameters.values),
            _trial_folder(tuner, trial.trial_id),
            bool(front == 0),
        )
        for trial, row, front in zip(kept, values, fronts, strict=True)
    )
    return ParetoFront(
        tuple((one.name, one.direction) for one in chosen),
        candidates,
        dict(zip(names, map(float, point), strict=True)),
        _dominance.volume(values * signs, point * signs),
        len(trials) - len(kept),
    )


def hypervolume(points: Any, reference: Any, *, directions: Sequence[str] | None = None) -> float:
    """The volume of the space that points dominate, up to a reference: one number for how good a front is.

    ```
    volume of the union over i of { z : point_i <= z <= reference }        for objectives to be small
    ```

    It is exact, by slices along one objective after the other: fast for two and three objectives, slow for a hundred points in
    six.

    Args:
        points: shape `(points, objectives)`.
        reference: shape `(objectives,)`: the worst values that count. A point that is not better in all of them adds nothing.
        directions: "min" or "max" of each objective; None is "min" for all.

    Returns:
        The volume, in the product of the objectives' units.

    Raises:
        ValueError: for shapes that do not fit, numbers that are not finite, or other directions.

    Example:

    >>> keras_kd.tuner.hypervolume([[0.9, 2.0], [0.8, 1.0]], [0.5, 4.0], directions=["max", "min"])
    1.1

    Reference:
        Zitzler, Thiele: Multiobjective Evolutionary Algorithms: A Comparative Case Study and the Strength Pareto Approach, 1999.
    """
    point = np.asarray(reference, "float64")
    values = np.asarray(points, "float64")
    values = values.reshape(0, point.size) if values.size == 0 else values
    if point.ndim != 1 or not point.size or values.ndim != 2 or values.shape[1] != point.size:
        raise ValueError(
            "`points` must be of shape (points, objectives), and `reference` of shape (objectives,). Received: shapes "
            f"{values.shape} and {point.shape}."
        )
    if not (np.isfinite(values).all() and np.isfinite(point).all()):
        raise ValueError("`points` and `reference` must be finite. Received: NaN or infinite numbers among them.")
    given = ["min"] * point.size if directions is None else list(directions)
    if len(given) != point.size or any(one not in ("min", "max") for one in given):
        raise ValueError(f'`directions` must be "min" or "max" for each of {point.size} objectives. Received: directions={given}.')
    signs = np.array([-1.0 if one == "max" else 1.0 for one in given])
    return _dominance.volume(values * signs, point * signs)


def _objectives(tuner: Any, given: Any) -> list[Any]:
    if given is None:
        objective = getattr(tuner, "oracle", tuner).objective
        given = getattr(objective, "objectives", [objective])
    given = list(given) if isinstance(given, list | tuple) else [given]
    chosen = [as_objective(one) for one in given]
    if len({one.name for one in chosen}) < 2:
        raise ValueError(
            f"A front needs two objectives or more. Received: {', '.join(one.name for one in chosen)}. Pass objectives=, such as "
            '["val_accuracy", "bytes"].'
        )
    return chosen


def _score_of(tuner: Any) -> Any:
    return getattr(getattr(tuner, "hypermodel", None), "score", None)


def _trial_folder(tuner: Any, trial_id: str) -> str | None:
    return os.fspath(tuner.get_trial_dir(trial_id)) if hasattr(tuner, "get_trial_dir") else None


def _reference(given: Any, names: list[str], values: np.ndarray, signs: np.ndarray) -> np.ndarray:
    given = dict(given or {})
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"`reference` is by objective: {', '.join(names)}. Received: {', '.join(map(str, unknown))}.")
    worst = (values * signs).max(0) * signs
    return np.array(
        [finite_number(f"reference[{name!r}]", given.get(name, float(at))) for name, at in zip(names, worst, strict=True)]
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.5g}"
    return str(value)
