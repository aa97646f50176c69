"""What should go, in which order, and what will it cost? A plan from a report, cheapest steps first."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable

from keras_kd.analysis.results import BlockAnalysis, LayerAnalysis, LinearReport

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
        error: share of the variance that is lost where the next layers read, in [0, 1].
        cost: expected increase of the loss, `error` weighted by gradients; without labels half the squared change of the outputs.
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
        text = json.dumps(dataclasses.asdict(self), indent=1)
        if path is not None:
            pathlib.Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Plan":
        """The plan that `to_json` wrote: its text, or the path of its file."""
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else pathlib.Path(source).read_text()
        try:
            found = json.loads(text)
            steps = tuple(Step(**one | {"channels": tuple(one["channels"])}) for one in found["steps"])
            return cls(**found | {"steps": steps})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"`source` must be what `Plan.to_json` wrote. Received: JSON that does not fit ({error}).") from error

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
        console = Console(width=160)
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
    ones take over what they can give by a linear map. Layers that a linear map explains can go, or be factorized, where that costs
    less. Costs add up in the plan; what steps do to each other is not known before they are done.

    Args:
        report: of a Functional or Sequential model.
        macs: at most this many multiply-accumulates, or this share of them, in (0, 1).
        parameters: at most this many weights, or this share of them, in (0, 1).
        tolerance: no step's `error` above this, in [0, 1]; 1e-6 where there is no budget at all, which takes what is lost without
            any loss.

    Returns:
        A `Plan`.

    Raises:
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
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise ValueError(f"`tolerance` must be in [0, 1]. Received: tolerance={tolerance!r}.")
    limits = _Limits(_budget("macs", macs, report.macs), _budget("parameters", parameters, report.parameters))
    if tolerance is None:
        tolerance = 1.0 if limits.wanted else 1e-6
    return _Planner(report, limits, tolerance).plan()


def _budget(name: str, value: float | None, whole: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not value > 0:
        raise ValueError(f"`{name}` must be above 0: a number, or a share below 1. Received: {name}={value!r}.")
    return value * whole if value < 1 else float(value)


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
    """A step that could be next."""

    price: float
    worth: float
    take: Callable[[], Step]


class _Planner:
    """Removes one channel at a time, on paper.

    Args:
        report: what was measured.
        limits: budgets.
        tolerance: highest error of a step.
    """

    def __init__(self, report: LinearReport, limits: _Limits, tolerance: float) -> None:
        self.report, self.limits, self.tolerance = report, limits, tolerance
        self.rows = {layer.name: layer for layer in report.layers}
        self.by_path = {layer.path: layer for layer in report.layers}
        self.flows = {
            n: f
            for n, f in report.flows.items()
            if not f.reason and f.place in self.rows and self.rows[f.place].channels == self.rows[n].channels
        }
        self.removed = dict.fromkeys(self.flows, 0)
        self.ranks: dict[str, int] = {}
        self.gone: dict[str, tuple[float, float]] = {}
        self.reads: dict[str, list[str]] = {}
        for name, flow in self.flows.items():
            for path in (*flow.readers, *flow.between):
                self.reads.setdefault(path, []).append(name)

    def plan(self) -> Plan:
        """Chooses."""
        steps: list[Step] = []
        while not self.limits.hold(*self._now()):
            best = min(self._candidates(), key=lambda one: (one.price, -one.worth), default=None)
            if best is None:
                break
            steps.append(best.take())
        macs, parameters = self._now()
        untouched = {n: f.reason or "it was not analysed" for n, f in self.report.flows.items() if n not in self.flows}
        reached = self.limits.hold(macs, parameters) or not self.limits.wanted
        report = self.report
        return Plan(tuple(_joined(steps)), report.macs, round(macs), report.parameters, round(parameters), reached, untouched)

    def _candidates(self) -> list[_Candidate]:
        found = []
        before = self._now()
        for name in self.flows:
            row = self.rows[self.flows[name].place]
            kept = row.channels - self.removed[name]
            errors = row.removal_by_cost.errors
            free = self.rows[name].path not in self.ranks and self.rows[name].path not in self.gone
            if kept > 1 and free and errors[kept - 1] <= self.tolerance:
                self.removed[name] += 1
                after = self._now()
                self.removed[name] -= 1
                saved = (before[0] - after[0], before[1] - after[1])
                cost = row.cost * (errors[kept - 1] - errors[kept])
                worth = self.limits.worth(*saved, self.report)
                found.append(_Candidate(_price(cost, row.cost, worth), worth, self._removal(name, cost, saved)))
        for layer in self.report.layers:
            found += self._factorization(layer, before)
            found += self._departure("remove_layer", [layer], layer.bypass, before)
        for block in self.report.blocks:
            rows = self._rows_of(block)
            if rows and block.bypass is not None and 1 - block.bypass <= self._limit:
                found += self._departure("remove_layer", rows, block.bypass, before)
            elif rows:
                found += self._departure("merge_block", rows, block.linearity, before, self._merged(block, rows))
        return found

    @property
    def _limit(self) -> float:
        """Layers and ranks go only where nearly nothing is lost: what comes after them does not adapt by itself."""
        return min(self.tolerance, 0.01)

    def _rows_of(self, block: BlockAnalysis) -> list[LayerAnalysis]:
        names = list(self.rows)
        if block.first not in self.rows or block.last not in self.rows:
            return []
        return [self.rows[name] for name in names[names.index(block.first) : names.index(block.last) + 1]]

    def _merged(self, block: BlockAnalysis, rows: list[LayerAnalysis]) -> tuple[float, float]:
        """Multiply-accumulates and weights of the one map that stands for a block."""
        weights = float(block.columns * rows[-1].channels)
        return weights * (rows[-1].positions or 1), weights + rows[-1].channels

    def _departure(
        self,
        action: str,
        rows: list[LayerAnalysis],
        given: float | None,
        before: tuple[float, float],
        left: tuple[float, float] = (0.0, 0.0),
    ) -> list[_Candidate]:
        """A layer, or a block, that a linear map can stand for."""
        error = 1.0 if given is None else max(1 - given, 0.0)
        busy = any(row.path in self.gone or row.path in self.ranks or self.removed.get(row.name) for row in rows)
        if error > self._limit or busy:
            return []
        gone = {row.path: (0.0, 0.0) for row in rows} | {rows[0].path: left}
        self.gone |= gone
        after = self._now()
        self.gone = {path: one for path, one in self.gone.items() if path not in gone}
        saved = (before[0] - after[0], before[1] - after[1])
        worth = self.limits.worth(*saved, self.report)
        if worth <= 0:
            return []
        cost = rows[-1].cost * error

        def take() -> Step:
            self.gone |= gone
            last = rows[-1].path if len(rows) > 1 else ""
            return Step(action, rows[0].path, last, (), None, error, cost, round(saved[0]), round(saved[1]))

        return [_Candidate(_price(cost, rows[-1].cost, worth), worth, take)]

    def _removal(self, name: str, cost: float, saved: tuple[float, float]) -> Callable[[], Step]:
        row = self.rows[self.flows[name].place]

        def take() -> Step:
            self.removed[name] += 1
            kept = row.channels - self.removed[name]
            channel = row.removal_by_cost.keep[kept]
            error = row.removal_by_cost.errors[kept]
            return Step(
                "remove_channels", self.rows[name].path, "", (channel,), None, error, cost, round(saved[0]), round(saved[1])
            )

        return take

    def _factorization(self, layer: LayerAnalysis, before: tuple[float, float]) -> list[_Candidate]:
        """A linear layer into two, as far as its output's variance allows."""
        spectrum, total = layer.spectrum, sum(layer.spectrum)
        fan_in = self._fan_in(layer)
        linear = (
            layer.linearity is not None and layer.linearity > 1 - 1e-3 and layer.kind in ("Dense", "Conv1D", "Conv2D", "Conv3D")
        )
        if not linear or layer.path in {*self.ranks, *self.gone} or not total or self.removed.get(layer.name) or not fan_in:
            return []
        saving = layer.channels * fan_in / (layer.channels + fan_in)
        rank = math.ceil(saving) - 1
        while rank > 1 and sum(spectrum[rank - 1 :]) / total <= self._limit:
            rank -= 1
        error = sum(spectrum[rank:]) / total
        if rank < 1 or error > self._limit:
            return []
        self.ranks[layer.path] = rank
        after = self._now()
        del self.ranks[layer.path]
        saved = (before[0] - after[0], before[1] - after[1])
        worth = self.limits.worth(*saved, self.report)
        if worth <= 0:
            return []

        def take() -> Step:
            self.ranks[layer.path] = rank
            return Step("factorize", layer.path, "", (), rank, error, layer.cost * error, round(saved[0]), round(saved[1]))

        return [_Candidate(_price(layer.cost * error, layer.cost, worth), worth, take)]

    def _fan_in(self, layer: LayerAnalysis) -> int:
        return max(layer.parameters // layer.channels, 0)

    def _now(self) -> tuple[float, float]:
        """Multiply-accumulates and weights, as things stand."""
        macs, parameters = float(self.report.macs), float(self.report.parameters)
        seen = set()
        for row in self.report.layers:
            if row.path in seen:
                continue
            seen.add(row.path)
            if row.path in self.gone:
                macs += self.gone[row.path][0] - (row.macs or 0)
                parameters += self.gone[row.path][1] - row.parameters
                continue
            share = self._share(row)
            macs -= (row.macs or 0) * (1 - share)
            parameters -= row.parameters * (1 - share)
        return macs, parameters

    def _share(self, row: LayerAnalysis) -> float:
        """How much of a layer is left."""
        left = 1.0
        if row.name in self.flows:
            left *= 1 - self.removed[row.name] / row.channels
        for name in self.reads.get(row.path, ()):
            left *= 1 - self.removed[name] / self.rows[name].channels
        if row.path in self.ranks:
            fan_in = self._fan_in(row)
            left *= self.ranks[row.path] * (fan_in + row.channels) / (fan_in * row.channels)
        return left


def _price(cost: float, whole: float, worth: float) -> float:
    """Cost of a saving; what is lost in rounding alone costs nothing."""
    if cost <= 1e-9 * whole:
        return 0.0
    return cost / worth if worth > 0 else math.inf


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
