"""Which channels go so that a budget holds? Criteria, allocation, and the work of the removed ones taken over."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_kd._progress import Progress
from keras_kd.analysis import _arguments
from keras_kd.surgery import _analysis, _costs, _criteria, _curvature, _latency, _nodes, _side_by_side
from keras_kd.surgery._allocation import Allocation, Limits
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._refit import refit
from keras_kd.surgery.channels import SurgeryReport, report_of
from keras_kd.surgery.graph import Group, groups_of
from keras_kd.surgery.reconstruction import Reconstruction, check_enough, fit_where_it_pays

CRITERIA = ("redundancy", "magnitude", "taylor", "fisher", "batch_norm")
Criterion = str | Callable[[Any, Group], Any]


@dataclasses.dataclass(frozen=True)
class PruningReport(SurgeryReport):
    """What `prune_channels` did; the attributes of `SurgeryReport`, and these.

    Attributes:
        macs: multiply-accumulates of one sample before.
        macs_after: and after.
        cost: what the criterion says that the outputs lost. For `"redundancy"` a share of the outputs' variance, as estimated.
        note: what was not as asked for; "" where all was.
        together: what the fit of all layers together did; None without it.
    """

    macs: int = 0
    macs_after: int = 0
    cost: float = 0.0
    note: str = ""
    together: Reconstruction | None = None

    def __str__(self) -> str:
        fitted = [] if self.together is None else [str(self.together)]
        lines = [
            super().__str__(),
            *fitted,
            f"MACs {self.macs:,} -> {self.macs_after:,} ({self.macs_after / max(self.macs, 1):.1%})",
        ]
        return "\n".join([*lines, f"note: {self.note}"] if self.note else lines)


@overload
def prune_channels(
    model: Any,
    *,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    data: Any = None,
    labels: Any = None,
    criterion: Criterion = "redundancy",
    scope: str = "global",
    reconstruct: bool | str = True,
    round_to: int = 1,
    min_channels: int = 1,
    loss: Any = None,
    verbose: Any = "auto",
    return_report: Literal[False] = False,
) -> keras.Model: ...


@overload
def prune_channels(
    model: Any,
    *,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    data: Any = None,
    labels: Any = None,
    criterion: Criterion = "redundancy",
    scope: str = "global",
    reconstruct: bool | str = True,
    round_to: int = 1,
    min_channels: int = 1,
    loss: Any = None,
    verbose: Any = "auto",
    return_report: Literal[True],
) -> tuple[keras.Model, PruningReport]: ...


def prune_channels(
    model: Any,
    *,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    data: Any = None,
    labels: Any = None,
    criterion: Criterion = "redundancy",
    scope: str = "global",
    reconstruct: bool | str = True,
    round_to: int = 1,
    min_channels: int = 1,
    loss: Any = None,
    verbose: Any = "auto",
    return_report: bool = False,
) -> Any:
    """Removes channels, and heads of attention, until a budget holds: a new, smaller model.

    Channels that are tied to each other (`find_groups`) go together; of attention, whole heads, of which all that follows holds as
    well. With `criterion="redundancy"` a channel costs what the outputs lose when the kept channels stand for it as well as a
    linear map can, wherever it is read:

    ```
    cost of removing R = tr(E[g g'] Cov(x_R given the others))
    ```

    with x what a layer reads, g the gradient there of a random sum of the outputs (of the logits, where they are probabilities).
    In each group the channel goes that costs least, given those that have gone; over all groups, the one that costs least for what
    it saves. No labels are needed. Then the layers that read removed channels are fitted, as in `remove_channels`, and then all
    layers together, as in `surgery.reconstruct`.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        macs: at most this many multiply-accumulates for a sample, or, up to 1, this share of the model's.
        parameters: at most this many weights, or this share.
        latency: at most this share, up to 1, of the time that the model's LiteRT file takes for one inference on one thread.
            Files of smaller models are measured, in turn with the model's own, until this holds on this machine.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`; some hundreds to thousands of
            samples. The criteria `"redundancy"`, `"taylor"` and `"fisher"` need them, and so does `reconstruct`.
        labels: an entry for each sample, where `data` are arrays. `"taylor"` and `"fisher"` then take the gradients of the loss;
            without labels, and for `"redundancy"`, those of the outputs.
        criterion: `"redundancy"`; `"magnitude"`: the L2 norm of the weights that make a channel, or of all weights of a head;
            `"batch_norm"`: the scale of its batch normalisation; `"taylor"`, `"fisher"`: first-order change of the loss when the
            channel is 0; or a function of the model and a `Group` that gives a number for each of its channels, high ones to be
            kept.
        scope: `"global"`: groups lose different shares. `"layer"`: all lose the same.
        reconstruct: where there are data, `"layers"`: layers that read removed channels are fitted to what they gave before, each
            by least squares; `"together"`: and then all layers take 30 epochs of gradient descent, on at least 64 samples;
            True: for as many epochs, 5 to 30, as 1e12 multiply-accumulates allow (some seconds to a minute), and for none with
            fewer than 256 samples, of which as many count as fit into memory; False: no fit.
        round_to: the number of channels that a group keeps is a multiple of this, such as 8, if it loses any. A head of attention
            is as many as its values have.
        min_channels: each group keeps at least this many, counted in the same way.
        loss: function or name, where `labels` are given and the usual one for them is not meant.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `PruningReport`, too.

    Returns:
        The new model, as `remove_channels` gives it; with `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `model` is no Keras model, or a budget no number.
        ValueError: for subclassed and unbuilt models; for options out of range; where the criterion needs data and there are none;
            for data of other shapes or with NaN; for fewer than 64 samples with `reconstruct="together"`; for a budget that cannot
            be met: the message names the smallest that can.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(16, activation="relu", name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    >>> data = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> smaller, report = keras_kd.surgery.prune_channels(model, macs=0.5, data=data, verbose=0, return_report=True)
    >>> smaller.get_layer("hidden").units, report.macs, report.macs_after
    (8, 96, 48)

    Reference:
        Martens, Grosse: Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015; Wang et al.: EigenDamage,
        2019; He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017; Michel, Levy, Neubig: Are Sixteen
        Heads Really Better than One?, 2019 (`"taylor"` of heads).
    """
    model = _analysis.checked(model)
    _check_states(model)
    budgets = {"macs": macs, "parameters": parameters, "latency": latency}
    _check(budgets, criterion, scope, round_to, min_channels)
    if reconstruct not in (True, False, "layers", "together"):
        raise ValueError(f'`reconstruct` must be True, False, "layers" or "together". Received: reconstruct={reconstruct!r}.')
    found = _analysis.analyse(model)
    groups = groups_of(found)
    costs = _costs.Costs(found, groups)
    wanted = Limits(_number(macs, costs.macs), _number(parameters, costs.parameters))
    if data is None and criterion in ("redundancy", "taylor", "fisher"):
        raise ValueError(
            f'`data` must be given with criterion="{criterion}": some hundreds of inputs, without labels. Received: data=None. '
            'Without any: criterion="magnitude".'
        )
    samples = None if data is None else _side_by_side.samples_of(model, data, labels)
    if reconstruct == "together" and samples is not None:
        check_enough([x for x, _ in samples])
    orders, curves = _orders(found, groups, criterion, samples, loss, verbose)
    by_worth = criterion in ("redundancy", "taylor", "fisher")
    planner = Planner(found, groups, costs, wanted, (scope, round_to, min_channels, by_worth))
    if latency is None:
        rebuilt, after, cost = planner.rebuilt(orders, curves)
    else:
        rebuilt, after, cost = _latency.within(planner, orders, curves, latency, verbose)
    batches = None if samples is None or not reconstruct else [x for x, _ in samples]
    refits, skipped = ([], {}) if batches is None else refit(rebuilt, batches, verbose)
    together = None if batches is None else fit_where_it_pays(rebuilt.model, model, batches, reconstruct, verbose)
    if not return_report:
        return rebuilt.model
    plain = report_of(rebuilt, refits, skipped)
    note = _note(wanted, after, (costs.macs, costs.parameters))
    return rebuilt.model, PruningReport(
        **vars(plain), macs=costs.macs, macs_after=after[0], cost=cost, note=note, together=together
    )


def _check(budgets: dict[str, Any], criterion: Any, scope: Any, round_to: Any, min_channels: Any) -> None:
    for name, value in budgets.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}.")
        if value is not None and not 0 < float(value) < np.inf:
            raise ValueError(f"`{name}` must be above 0: a number, or a share up to 1. Received: {name}={value!r}.")
    if all(value is None for value in budgets.values()):
        raise ValueError("A budget must be given: `macs`, `parameters` or `latency`. Received: none. For half the work: macs=0.5.")
    if budgets["latency"] is not None and budgets["latency"] > 1:
        raise ValueError(f"`latency` must be a share of the model's own, up to 1. Received: latency={budgets['latency']!r}.")
    if not callable(criterion) and criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, or a function. Received: criterion={criterion!r}.")
    if scope not in ("global", "layer"):
        raise ValueError(f'`scope` must be "global" or "layer". Received: scope={scope!r}.')
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}.")


def _number(value: float | None, whole: int) -> float | None:
    return None if value is None else float(value * whole if value <= 1 else value)


def _orders(
    found: Analysis, groups: _criteria.Groups, criterion: Criterion, samples: _side_by_side.Samples | None, loss: Any, verbose: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each group, in which order its channels go, and what all removed ones cost after each."""
    batches = [x for x, _ in samples or ()]
    if criterion == "redundancy":
        with Progress(sum(len(x[0]) for x in batches), title="moments", verbose=verbose) as progress:
            curvature = _curvature.Curvature(found, _counted(batches, progress), sum(len(x[0]) for x in batches))
        pairs = curvature.orders([roots for _, roots in groups])
        return [order for order, _ in pairs], [curve for _, curve in pairs]
    if criterion in ("taylor", "fisher"):
        parts = list(_curvature.parted(samples or [], _curvature.samples_at_once(found.model)))
        losses = _losses(found.model, parts, loss)
        progress = Progress(sum(len(x[0]) for x, _ in parts), title="gradients", verbose=verbose)
        stream = progress.over((x for x, _ in parts), size=lambda batch: len(batch[0]))
        scores = _criteria.first_order(found, groups, stream, losses, str(criterion))
    elif criterion == "magnitude":
        scores = _criteria.magnitudes(found, groups)
    elif criterion == "batch_norm":
        scores = _criteria.scales(found, groups)
    else:
        scores = _criteria.of_user(criterion, found.model, groups)  # type: ignore[arg-type]
    orders = [np.argsort(one, kind="stable") for one in scores]
    lowest = min((float(one.min()) for one in scores if len(one)), default=0.0)  # prices are of what is lost, never below 0
    return orders, [np.cumsum(one[order] - min(lowest, 0.0)) for one, order in zip(scores, orders, strict=True)]


def _counted(batches: Sequence[list[Any]], progress: Progress) -> Iterator[list[Any]]:
    for batch in batches:
        yield batch
        progress.advance(len(batch[0]))


def _losses(model: Any, samples: _side_by_side.Samples, loss: Any) -> list[Callable[[list[Any]], Any]]:
    """For each batch, the sum of the samples' losses; of a random sum of the outputs where there are no labels."""
    if samples[0][1] is None:
        if loss is not None:
            raise ValueError("`labels` must be given with `loss`. Received: labels=None.")
        chance = _curvature.Chance(model)
        return [chance] * len(samples)
    graph = _nodes.graph_of(model)
    outputs = _nodes.run(model, samples[0][0], lambda node, values: _nodes.called(node.operation, node, values))
    task = _arguments.task_of(model, outputs, samples[0][1], None, loss)

    def made(y: Any) -> Callable[[list[Any]], Any]:
        labels = keras.tree.map_structure(keras.ops.convert_to_tensor, y)

        def function(values: list[Any]) -> Any:
            nested = keras.tree.pack_sequence_as(graph._outputs_struct, values)
            return keras.ops.sum(task.loss(labels, nested))  # type: ignore[misc]

        return function

    for _, y in samples:
        _arguments.check_numbers(y)
        task.check(y)
    return [made(y) for _, y in samples]


def _check_states(model: Any) -> None:
    stateful = [layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    if stateful:
        raise ValueError(
            "`model` must not keep states from batch to batch. Received: the stateful layers "
            f"{', '.join(stateful)}. Build it with stateful=False and take over the weights."
        )


class Planner:
    """Makes the model that keeps what a budget allows.

    Args:
        found: analysis of the old model.
        groups: its groups.
        costs: of the model by the channels kept.
        wanted: budgets.
        options: scope, round_to, min_channels, and whether prices are relative to what is saved.
    """

    def __init__(
        self,
        found: Analysis,
        groups: _criteria.Groups,
        costs: _costs.Costs,
        wanted: Limits,
        options: tuple[str, int, int, bool],
    ) -> None:
        self.found, self.groups, self.costs, self.wanted = found, groups, costs, wanted
        self.scope, self.round_to, self.min_channels, self.by_worth = options

    def rebuilt(
        self, orders: list[np.ndarray], curves: list[np.ndarray], limits: Limits | None = None
    ) -> tuple[Rebuilt, tuple[int, int], float]:
        """The new model without its fit, its multiply-accumulates and weights, and the cost; `limits` may be tighter ones."""
        limits = self.wanted if limits is None else limits
        while True:
            allocation = self._allocation(curves, limits)
            gone: set[int] = set()
            cost = 0.0
            for (_, roots), order, curve, kept in zip(self.groups, orders, curves, allocation.kept, strict=True):
                lost = len(roots) - kept
                gone |= set(roots[order[:lost]].tolist())
                cost += float(curve[lost - 1]) if lost else 0.0
            rebuilt = Rebuilt(self.found, gone)
            macs = sum(row.macs or 0 for row in _costs.count_macs(rebuilt.model)) if gone else self.costs.macs
            after = int(macs), int(rebuilt.model.count_params())
            if self.wanted.hold(*after):
                return rebuilt, after, cost
            limits = self._tighter(limits, after)  # what goes with a product of channels, such as attention, is not in the costs

    def _allocation(self, curves: list[np.ndarray], limits: Limits) -> Allocation:
        sizes = [len(roots) for _, roots in self.groups]
        widths = [group.width for group, _ in self.groups]
        least = [min(-(-self.min_channels // width), size) for width, size in zip(widths, sizes, strict=True)]
        steps = [self.round_to // math.gcd(self.round_to, width) for width in widths]
        made = Allocation(self.costs, sizes, curves, limits, least, steps=steps, by_worth=self.by_worth)
        if not (made.greedy() if self.scope == "global" else made.even()):
            macs, parameters = made.smallest()
            known = [
                (name, value, least, whole)
                for name, value, least, whole in (
                    ("macs", self.wanted.macs, macs, self.costs.macs),
                    ("parameters", self.wanted.parameters, parameters, self.costs.parameters),
                )
                if value is not None
            ]
            told = " and ".join(f"{name}={round(least):,} ({least / max(whole, 1):.1%})" for name, _, least, whole in known)
            given = ", ".join(f"{name}={round(value):,}" for name, value, _, _ in known)
            given += f", round_to={self.round_to}" * (self.round_to > 1)
            raise ValueError(
                f"The budget cannot be met by removing channels: with {self.min_channels} left in each group the smallest is "
                f"{told}. Received: {given}. `find_groups(model)` says which channels stay and why."
            )
        return made

    def _tighter(self, limits: Limits, after: tuple[int, int]) -> Limits:
        """Budgets that make up for what the costs did not know."""
        pairs = ((limits.macs, self.wanted.macs, after[0]), (limits.parameters, self.wanted.parameters, after[1]))
        found = [None if now is None or aim is None else now * min(aim / got, 1.0) for now, aim, got in pairs]
        return Limits(*found)


def _note(wanted: Limits, after: tuple[int, int], before: tuple[int, int]) -> str:
    """Why a model is more than 1 % below its budgets."""
    pairs = (("macs", wanted.macs, after[0], before[0]), ("parameters", wanted.parameters, after[1], before[1]))
    known = [(name, limit, got, whole) for name, limit, got, whole in pairs if limit is not None]
    if not known or any(got >= 0.99 * min(limit, whole) for _, limit, got, whole in known):
        return ""
    told = ", ".join(f"{name} {got:,} of {round(limit):,}" for name, limit, got, _ in known)
    return f"more than 1 % below the budget ({told}): one more channel, or `round_to` of them, would exceed it"
