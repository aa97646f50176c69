"""How does one carry out a plan? Step by step, measuring after each, and no further than a tolerance allows."""

import dataclasses
import numbers
import time
from collections.abc import Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_kd import _lineage
from keras_kd._progress import Progress
from keras_kd.analysis.plans import ACTIONS, Plan, Step
from keras_kd.surgery import _analysis, _costs, _nodes, _side_by_side
from keras_kd.surgery._reports import Report
from keras_kd.surgery.channels import remove_channels
from keras_kd.surgery.depth import linearize, remove_layers
from keras_kd.surgery.low_rank import factorize


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        step: the step.
        measure: accuracy with labels, agreement with the original without, after the step; None without data.
        macs: multiply-accumulates of one sample after it; None where the lengths of the inputs are not known.
        parameters: weights after it.
        seconds: that it took, without measuring.
        taken: whether the step is in the model that was returned.
    """

    step: Step
    measure: float | None
    macs: int | None
    parameters: int
    seconds: float
    taken: bool


@dataclasses.dataclass(frozen=True)
class ApplyReport(Report):
    """What `apply` did.

    Attributes:
        measure: of the original: accuracy with labels, else 1; None without data.
        macs: of the original.
        parameters: of the original.
        steps: those that were tried, in order.
        stopped: why not all were; "" if all were.
    """

    measure: float | None
    macs: int | None
    parameters: int
    steps: tuple[StepResult, ...]
    stopped: str = ""

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("action", "layer", "expected error", "measured", "MACs", "weights", "taken"):
            made.add_column(heading, justify="left" if heading in ("action", "layer", "taken") else "right")
        made.add_row("original", "", "", _told(self.measure), _counted(self.macs), f"{self.parameters:,}", "")
        for one in self.steps:
            where = one.step.layer + (f" to {one.step.last}" if one.step.last else "")
            numbers_ = f"{one.step.error:.2g}", _told(one.measure), _counted(one.macs), f"{one.parameters:,}"
            made.add_row(one.step.action, where, *numbers_, "yes" if one.taken else "no")
        console = Console(width=140, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            if self.stopped:
                console.print(self.stopped, highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _counted(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _told(measure: float | None) -> str:
    return "" if measure is None else f"{measure:.4f}"


@overload
def apply(
    model: Any,
    plan: Plan | Sequence[Step],
    *,
    data: Any = None,
    labels: Any = None,
    tolerance: float | None = None,
    verbose: Any = "auto",
    return_report: Literal[False] = False,
) -> keras.Model: ...


@overload
def apply(
    model: Any,
    plan: Plan | Sequence[Step],
    *,
    data: Any = None,
    labels: Any = None,
    tolerance: float | None = None,
    verbose: Any = "auto",
    return_report: Literal[True],
) -> tuple[keras.Model, ApplyReport]: ...


def apply(
    model: Any,
    plan: Plan | Sequence[Step],
    *,
    data: Any = None,
    labels: Any = None,
    tolerance: float | None = None,
    verbose: Any = "auto",
    return_report: bool = False,
) -> Any:
    """Carries out a plan: a new model, measured after each step.

    Steps that remove channels, one after the other, are done as one removal, so that the layers are fitted to what the network gave
    before the first of them, and errors do not add up. All other steps start from what the steps before left.

    Args:
        model: the Functional or Sequential model that the plan was made for. It is not changed.
        plan: of `linear_analysis(...).recommend(...)`, or steps of one's own. Channels are those of the original layers.
        data: inputs nested as the model takes them, or batches `x` or `(x, y)`: layers are fitted on them, and what a step gave is
            measured on them. `merge_block` needs them.
        labels: class indices, an entry for each sample, where `data` are arrays. With labels the measure is the accuracy; without,
            the agreement with the original: the share of samples with the same class; for outputs of other kinds one minus the
            squared change over the variance.
        tolerance: how much the measure may fall below the original's, such as 0.01. The step that falls further is not taken, and
            no other after it. None: all steps are taken.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give an `ApplyReport`, too.

    Returns:
        The new model; with `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `plan` is no plan.
        ValueError: for steps of layers that the model does not have, before anything is done; for actions that are unknown; for
            a tolerance out of range, or without data.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(16, activation="relu", name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2)(x))
    >>> data = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> plan = keras_kd.analysis.linear_analysis(model, data, verbose=0).recommend(parameters=0.5)
    >>> smaller = keras_kd.surgery.apply(model, plan, data=data, verbose=0)
    >>> smaller.count_params() == plan.parameters_after
    True
    """
    model = _analysis.checked(model)
    steps = _checked_steps(model, plan)
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real) or not 0 <= tolerance <= 1
    ):
        raise ValueError(f"`tolerance` must be in [0, 1]. Received: tolerance={tolerance!r}.")
    if tolerance is not None and data is None:
        raise ValueError("`data` must be given with `tolerance`. Received: data=None.")
    samples = None if data is None else _side_by_side.samples_of(model, data, labels)
    surgeon = _Surgeon(model, samples)
    before = surgeon.measure(model)
    results: list[StepResult] = []
    stopped = ""
    with Progress(len(steps), what="steps", title="surgery", verbose=verbose) as progress:
        for step in steps:
            began = time.monotonic()
            made = surgeon.made(step)
            seconds = time.monotonic() - began
            measure = surgeon.measure(made)
            taken = tolerance is None or measure is None or before is None or measure >= before - tolerance
            macs = _costs.macs_of(made)
            results.append(StepResult(step, measure, macs, made.count_params(), round(seconds, 3), taken))
            progress.advance()
            if not taken:
                stopped = (
                    f'stopped before {step.action} of "{step.layer}": {measure:.4f} is more than {tolerance} below {before:.4f}'
                )
                break
            surgeon.take(step, made)
    if not return_report:
        return surgeon.model
    macs = _costs.macs_of(model)
    return surgeon.model, ApplyReport(before, macs, model.count_params(), tuple(results), stopped)


def _checked_steps(model: Any, plan: Any) -> list[Step]:
    steps = list(plan.steps) if isinstance(plan, Plan) else plan
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, Step) for step in steps):
        raise TypeError(f"`plan` must be a Plan, or a list of Steps. Received: {type(plan).__name__}.")
    paths = {record.path for record in _analysis.analyse(model).records.values()}
    for step in steps:
        if step.action not in ACTIONS:
            raise ValueError(f"Actions are {', '.join(ACTIONS)}. Received: a step with action={step.action!r}.")
        missing = [name for name in (step.layer, step.last) if name and name not in paths]
        if missing:
            raise ValueError(
                f'`plan` must be one for this model. Received: a step of "{missing[0]}", which "{model.name}" does not have. '
                f"Layers: {', '.join(sorted(paths))}."
            )
    return list(steps)


class _Surgeon:
    """Knows the model so far, and where the present run of removals began.

    Args:
        model: the original.
        samples: batches of inputs and labels; None without data.
    """

    def __init__(self, model: Any, samples: Any) -> None:
        self.original = self.model = self.base = model
        self.samples = samples
        self.removed: dict[str, set[int]] = {}
        self.data: Any = None
        self._wanted: list[np.ndarray] = []
        if samples is not None:
            flat = [np.concatenate([np.asarray(x[index]) for x, _ in samples]) for index in range(len(samples[0][0]))]
            self.data = self._nested(flat)
            self._wanted = self._outputs(model)

    def made(self, step: Step) -> Any:
        """The model after another step."""
        data = self.data
        if step.action == "remove_channels":
            removed = self._with(step)
            return remove_channels(
                self.base, {name: self._local(name, gone) for name, gone in removed.items()}, data=data, verbose=0
            )
        where: Any = (step.layer, step.last) if step.last else step.layer
        if step.action == "remove_layer":
            return remove_layers(self.model, [where], data=data, verbose=0)
        if step.action == "merge_block":
            return linearize(self.model, where, data, verbose=0)
        return factorize(self.model, rank={step.layer: step.rank or 1}, data=data, verbose=0)

    def take(self, step: Step, made: Any) -> None:
        """Goes on from what a step made."""
        if step.action == "remove_channels":
            self.removed = self._with(step)
            self.model = made
        else:
            self.model = self.base = made
            self.removed = {}

    def measure(self, model: Any) -> float | None:
        """Accuracy, or agreement with the original."""
        if self.samples is None:
            return None
        found = self._outputs(model)
        labels = [y for _, y in self.samples]
        classes = len(found) == 1 and found[0].ndim == 2 and found[0].shape[1] > 1
        if classes and labels[0] is not None:
            y = np.concatenate([np.asarray(one) for one in labels])
            y = np.argmax(y, -1) if y.ndim == 2 and y.shape[1] == found[0].shape[1] else y.reshape(-1)
            return float(np.mean(np.argmax(found[0], -1) == y))
        if classes:
            return float(np.mean(np.argmax(found[0], -1) == np.argmax(self._wanted[0], -1)))
        pairs = list(zip(found, self._wanted, strict=True))
        return float(np.mean([1 - np.mean(np.square(one - other)) / (float(np.var(other)) or 1.0) for one, other in pairs]))

    def _with(self, step: Step) -> dict[str, set[int]]:
        return self.removed | {step.layer: self.removed.get(step.layer, set()) | set(step.channels)}

    def _local(self, name: str, channels: set[int]) -> list[int]:
        """Channels of the original as those of the model that the run of removals began with."""
        if self.base is self.original:
            return sorted(channels)
        mask = (_lineage.masks_between(self.base, self.original) or {}).get(name)
        return sorted(channels) if mask is None else [at for at, one in enumerate(np.flatnonzero(mask).tolist()) if one in channels]

    def _nested(self, flat: list[Any]) -> Any:
        structure = _nodes.graph_of(self.original)._inputs_struct
        return keras.tree.pack_sequence_as(structure, flat) if keras.tree.is_nested(structure) else flat[0]

    def _outputs(self, model: Any) -> list[np.ndarray]:
        given = [keras.tree.flatten(model(self._nested(x), training=False)) for x, _ in self.samples]
        parts = zip(*given, strict=True)
        return [np.concatenate([np.asarray(keras.ops.cast(one, "float32")) for one in several]) for several in parts]
