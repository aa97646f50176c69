"""What should go, in which order, and what will it cost? A plan from a report, cheapest steps first."""

import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_kd.analysis.results import BlockAnalysis, FlowAnalysis, LayerAnalysis, LinearReport, read_json, write_json

ACTIONS = ("remove_channels", "remove_layer", "merge_block", "factorize")


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        action: "remove_channels", "remove_layer", "merge_block" or "factorize".
        layer: path of the layer; the first one of a block.
        last: the last layer of a block, "" otherwise.
        channels: what to remove of the layer's output, in ascending order.
        rank: what to factorize to.
        error: share of the variance that is lost where the next layers read (factorize: of the layer's output), in [0, 1]; of
            channels, with all those that went before.
        cost: expected increase of the loss: what is lost of each channel times half its squared gradient; without labels half the
            squared change of the outputs.
        macs: multiply-accumulates of the model that it saves for a sample, the steps before it done.
        parameters: weights that it saves.
    """

    action: str
    layer: str
    last: str = ""
    channels: tuple[int, ...] = ()
    rank: int | None = None
    error: float = 0.0
    cost: float = 0.0
    macs: int = 0
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in order.

    Attributes:
        steps: what to do.
        macs: of the model before.
        macs_after: expected after the last step.
        parameters: of the model before.
        parameters_after: expected after the last step.
        reached: whether the budgets hold then.
        untouched: layers whose channels stay, and why.
    """

    steps: tuple[Step, ...]
    macs: int
    macs_after: int
    parameters: int
    parameters_after: int
    reached: bool
    untouched: dict[str, str]

    @property
    def cost(self) -> float:
        """Expected cost of all steps."""
        return sum(step.cost for step in self.steps)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns the plan as JSON, and writes it to `path` if there is one."""
        return write_json(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Plan":
        """The plan that `to_json` wrote: its text, or the path of its file."""

        def make(found: dict[str, Any]) -> "Plan":
            steps = tuple(Step(**one | {"channels": tuple(one["channels"])}) for one in found["steps"])
            return cls(**found | {"steps": steps})

        plan: Plan = read_json(source, "Plan", make)
        return plan

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("action", "layer", "what", "error", "cost", "MACs saved", "weights saved"):
            made.add_column(heading, justify="left" if heading in ("action", "layer", "what") else "right", no_wrap=True)
        for step in self.steps:
            what = (
                f"to {step.last}"
                if step.last
                else f"rank {step.rank}"
                if step.rank
                else f"{len(step.channels)} channels" * bool(step.channels)
            )
            made.add_row(
                step.action, step.layer, what, f"{step.error:.2g}", f"{step.cost:.2g}", f"{step.macs:,}", f"{step.parameters:,}"
            )
        console = Console(width=160, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            told = f"MACs {self.macs:,} -> {self.macs_after:,}, weights {self.parameters:,} -> {self.parameters_after:,}"
            console.print(told + ("" if self.reached else "; the budget is NOT reached"), highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def recommend(
    report: LinearReport, *, macs: float | None = None, parameters: float | None = None, tolerance: float | None = None
) -> Plan:
    """Chooses what to remove until budgets hold, or for as long as each step loses little.

    Channels are removed one after the other, from the layer where that has the lowest expected cost for what it saves; the kept
    ones take over what they can give by a linear map. Layers and blocks that do nothing, blocks that a linear map gives and kernels
    of low rank are in the plan where that is cheaper, if they lose at most 1 % of the variance (or `tolerance`), and if the
    analysis had at least five rows for each feature. Costs add up in the plan; what steps do to each other is known only after
    they are done.

    Args:
        report: of a Functional or Sequential model.
        macs: at most this many multiply-accumulates, or this share of them, up to 1.
        parameters: at most this many weights, or this share of them, up to 1.
        tolerance: no step's `error` above this, in [0, 1]. None: any error for channels where there is a budget; 1e-6 where there
            is none, which takes what goes without loss.

    Returns:
        A `Plan`.

    Raises:
        TypeError: for budgets that are no numbers.
        ValueError: for a report of a subclassed model, and for budgets out of range.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(16, activation="relu", name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2)(x))
    >>> data = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> plan = keras_kd.analysis.linear_analysis(model, data, verbose=0).recommend(parameters=0.5)
    >>> plan.steps[0].action, plan.steps[0].layer, plan.reached
    ('remove_channels', 'hidden', True)
    """
    if report.kind != "functional":
        raise ValueError(
            f"A plan needs the graph of a Functional or Sequential model. Received: a report of the {report.kind} model "
            f'"{report.model}", whose measures stand in the report all the same.'
        )
    for name, value in (("macs", macs), ("parameters", parameters), ("tolerance", tolerance)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}.")
        if value is not None and name != "tolerance" and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be above 0: a number, or a share up to 1. Received: {name}={value!r}.")
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise ValueError(f"`tolerance` must be in [0, 1]. Received: tolerance={tolerance!r}.")
    limits = _Limits(_budget(macs, report.macs), _budget(parameters, report.parameters))
    for_channels = tolerance if tolerance is not None else 1.0 if limits.wanted else 1e-6
    for_others = tolerance if tolerance is not None else 0.01 if limits.wanted else 1e-6
    plan = _Planner(report, limits, for_channels, for_others).plan()
    if plan.reached:
        return plan
    of_channels = _Planner(report, limits, for_channels, -1.0).plan()  # what was replaced keeps its channels
    return of_channels if limits.excess(of_channels) < limits.excess(plan) else plan


def _budget(value: float | None, whole: int) -> float | None:
    return value * whole if value is not None and value <= 1 else value


@dataclasses.dataclass(frozen=True)
class _Limits:
    macs: float | None
    parameters: float | None

    @property
    def wanted(self) -> bool:
        return self.macs is not None or self.parameters is not None

    def hold(self, macs: float, parameters: float) -> bool:
        """Whether the budgets hold; never without any."""
        fits = (self.macs is None or macs <= self.macs) and (self.parameters is None or parameters <= self.parameters)
        return self.wanted and fits

    def excess(self, plan: Plan) -> float:
        """How far a plan stays from the budgets."""
        over = [plan.macs_after / self.macs - 1] if self.macs is not None else []
        over += [plan.parameters_after / self.parameters - 1] if self.parameters is not None else []
        return max([0.0, *over])

    def worth(self, macs: float, parameters: float, report: LinearReport) -> float:
        """What a saving counts: shares of those that have a budget, of both without any."""
        shares = []
        if self.macs is not None or not self.wanted:
            shares.append(macs / max(report.macs, 1))
        if self.parameters is not None or not self.wanted:
            shares.append(parameters / max(report.parameters, 1))
        return sum(shares)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A step that could be next, what it costs for what it saves, and how to take it."""

    step: Step
    price: float
    worth: float
    take: Callable[[], None]


class _Planner:
    """Takes one step after the other, on paper.

    A layer is cut, or it is replaced: where something was replaced, removed or factorized, the channels around stay as they are,
    and what lost channels is not replaced. So no step needs to know another one.

    Args:
        report: what was measured.
        limits: budgets.
        for_channels: highest error of channels.
        for_others: highest error of other steps.
    """

    def __init__(self, report: LinearReport, limits: _Limits, for_channels: float, for_others: float) -> None:
        self.report, self.limits, self.for_channels, self.for_others = report, limits, for_channels, for_others
        self.rows = {layer.name: layer for layer in report.layers}
        self.paths = {layer.path: layer for layer in report.layers}
        self.flows = {name: flow for name, flow in report.flows.items() if self._can_go_alone(name, flow)}
        self.removed = dict.fromkeys(self.flows, 0)
        self.left = {layer.path: (float(layer.macs or 0), float(layer.parameters)) for layer in self.paths.values()}
        self.given_by: dict[str, list[str]] = {}  # whose channels a layer reads
        for name, flow in self.flows.items():
            for path in (*flow.readers, *flow.between):
                self.given_by.setdefault(path, []).append(name)
        self.replaced: set[str] = set()
        self.macs, self.parameters = float(report.macs), float(report.parameters)

    def _can_go_alone(self, name: str, flow: FlowAnalysis) -> bool:
        known = not flow.reason and name in self.rows and flow.place in self.rows
        return known and self.rows[flow.place].channels == self.rows[name].channels

    def plan(self) -> Plan:
        """Chooses."""
        steps: list[Step] = []
        while not self.limits.hold(self.macs, self.parameters):
            candidates = [one for one in [*self._removals(), *self._replacements()] if one.worth > 0]
            if not candidates:
                break
            best = min(candidates, key=lambda one: (one.price, -one.worth))
            best.take()
            self.macs -= best.step.macs
            self.parameters -= best.step.parameters
            steps.append(best.step)
        report = self.report
        untouched = {name: flow.reason or "it was not analysed" for name, flow in report.flows.items() if name not in self.flows}
        reached = self.limits.hold(self.macs, self.parameters) or not self.limits.wanted
        after = round(self.macs), round(self.parameters)
        return Plan(tuple(_joined(steps)), report.macs, after[0], report.parameters, after[1], reached, untouched)

    def _removals(self) -> Iterator[_Candidate]:
        for name, flow in self.flows.items():
            row, layer = self.rows[flow.place], self.rows[name]
            kept = row.channels - self.removed[name]
            around = {layer.path, *flow.readers, *flow.between}
            if kept < 2 or around & self.replaced:
                continue
            order, dof = row.removal_by_cost, (row.rows - 1) / max(row.rows - kept, 1)
            error = min(row.removal_by_cost_variance[kept - 1] * dof, 1.0)
            if error > self.for_channels:
                continue
            saved = self._saving(name, around)
            cost = row.cost * (order.errors[kept - 1] - order.errors[kept])
            step = Step("remove_channels", layer.path, "", (order.keep[kept - 1],), None, error, cost, *saved)
            yield self._candidate(step, row.cost, functools.partial(self._remove, name, around))

    def _saving(self, name: str, around: set[str]) -> tuple[int, int]:
        before = [self._cost_of(path) for path in around]
        self.removed[name] += 1
        after = [self._cost_of(path) for path in around]
        self.removed[name] -= 1
        return tuple(round(sum(a[at] - b[at] for a, b in zip(before, after, strict=True))) for at in (0, 1))  # type: ignore[return-value]

    def _remove(self, name: str, around: set[str]) -> None:
        self.removed[name] += 1
        self.left |= {path: self._cost_of(path) for path in around if path in self.left}

    def _cost_of(self, path: str) -> tuple[float, float]:
        """Multiply-accumulates and weights of a layer with the channels that are left."""
        row = self.paths.get(path)
        if row is None:
            return 0.0, 0.0
        kept = 1.0 - self.removed.get(row.name, 0) / row.channels
        read = 1.0
        for name in self.given_by.get(path, ()):
            read *= 1 - self.removed[name] / self.rows[name].channels
        bias = row.channels if row.fan_in is not None and row.parameters > row.fan_in * row.channels else 0
        return (row.macs or 0) * kept * read, (row.parameters - bias) * kept * read + bias * kept

    def _replacements(self) -> Iterator[_Candidate]:
        """Layers and blocks for which less can stand."""
        for row in self.paths.values():
            if row.calls > 1 or not self._is_whole([row.path]):
                continue
            if row.bypass is not None and row.bypass_cost is not None and 1 - row.bypass <= self.for_others:
                lost = 1 - row.bypass, row.bypass_cost
                yield self._replacement("remove_layer", row.path, "", (row.path,), *lost, (0.0, 0.0), row.cost)
            yield from self._factorization(row)
        for block in self.report.blocks:
            yield from self._of_block(block)

    def _of_block(self, block: BlockAnalysis) -> Iterator[_Candidate]:
        last = self.rows.get(block.last)
        known = last is not None and all(self.paths[path].calls == 1 for path in block.members if path in self.paths)
        if last is None or not known or block.escapes or not self._is_whole(block.members):
            return
        if block.bypass is not None and block.bypass_cost is not None and 1 - block.bypass <= self.for_others:
            left, error, cost, action = (0.0, 0.0), 1 - block.bypass, block.bypass_cost, "remove_layer"
        else:
            enough = block.rows >= 5 * block.columns and not block.reason
            if not enough or block.linearity is None or block.linearity_cost is None or last.positions is None:
                return
            weights = float(block.columns * last.channels)
            left, action = (weights * last.positions, weights + last.channels), "merge_block"
            error, cost = 1 - block.linearity, block.linearity_cost
        if error <= self.for_others:
            yield self._replacement(action, block.first, block.last, block.members, error, cost, left, last.cost)

    def _factorization(self, row: LayerAnalysis) -> Iterator[_Candidate]:
        """A linear layer into two, as far as its output's variance allows."""
        total = sum(row.spectrum)
        if not row.linear or not row.fan_in or not total or row.rows < 5 * row.channels:
            return
        rank = math.ceil(row.channels * row.fan_in / (row.channels + row.fan_in)) - 1
        while rank > 1 and sum(row.spectrum[rank - 1 :]) / total <= self.for_others:
            rank -= 1
        error, cost = sum(row.spectrum[rank:]) / total, sum(row.spectrum_cost[rank:])
        if rank < 1 or error > self.for_others:
            return
        macs, parameters = self.left[row.path]
        share = rank * (row.fan_in + row.channels) / (row.fan_in * row.channels)
        bias = max(row.parameters - row.fan_in * row.channels, 0)
        left = macs * share, (parameters - bias) * share + bias
        step = self._replacement("factorize", row.path, "", (row.path,), error, cost, left, row.cost)
        yield dataclasses.replace(step, step=dataclasses.replace(step.step, rank=rank))

    def _is_whole(self, paths: Sequence[str]) -> bool:
        """Whether nothing was replaced here, or lost channels that these layers give, read or pass on."""
        if self.replaced & set(paths):
            return False
        names = {name for path in paths for name in self.given_by.get(path, ())}
        names |= {self.paths[path].name for path in paths if path in self.paths}
        return not any(self.removed.get(name) for name in names)

    def _replacement(
        self,
        action: str,
        first: str,
        last: str,
        paths: Sequence[str],
        error: float,
        cost: float,
        left: tuple[float, float],
        whole: float,
    ) -> _Candidate:
        now = [self.left[path] for path in paths if path in self.left]
        saved = [round(sum(one[at] for one in now) - left[at]) for at in (0, 1)]
        if self.limits.wanted and min(saved) < 0:
            saved = [min(saved)] * 2  # what saves one and adds to the other is no saving
        step = Step(action, first, last, (), None, max(error, 0.0), cost, *saved)

        def take() -> None:
            self.replaced |= set(paths)
            self.left |= {path: (0.0, 0.0) for path in paths if path in self.left}
            self.left[paths[0]] = left

        return self._candidate(step, whole, take)

    def _candidate(self, step: Step, whole: float, take: Callable[[], None]) -> _Candidate:
        worth = self.limits.worth(step.macs, step.parameters, self.report)
        free = step.cost <= 1e-9 * whole  # lost in rounding
        return _Candidate(step, 0.0 if free else step.cost / worth if worth > 0 else math.inf, worth, take)


def _joined(steps: list[Step]) -> list[Step]:
    """One step for all channels of a layer, where the first of them stood; cheapest layers first, as they were taken."""
    joined: dict[tuple[str, str], Step] = {}
    for step in steps:
        former = joined.get((step.action, step.layer))
        if former is None:
            joined[step.action, step.layer] = step
            continue
        joined[step.action, step.layer] = dataclasses.replace(
            step,
            channels=tuple(sorted(former.channels + step.channels)),
            cost=former.cost + step.cost,
            macs=former.macs + step.macs,
            parameters=former.parameters + step.parameters,
        )
    return list(joined.values())
