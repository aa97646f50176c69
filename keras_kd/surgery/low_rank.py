"""Which layers can be two thinner ones? Dense layers and convolutions of low rank, and what the network loses by it."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_kd import _taps
from keras_kd._progress import Verbose, check_verbose
from keras_kd.surgery import _analysis, _costs, _side_by_side
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._budgets import Option, choose
from keras_kd.surgery._rebuild import Rebuilt, Replacement
from keras_kd.surgery._reports import Report
from keras_kd.surgery._sites import METHODS, Site, sites_of
from keras_kd.surgery._thinning import MAX_WINDOW, Curves, Fit, Fitting, lost_of_weights

_ROUNDING = 1e-9  # share of the output that counts as nothing


@dataclasses.dataclass(frozen=True)
class Factorization:
    """A layer that became two.

    Attributes:
        layer: path of the old layer.
        names: of the two new ones.
        method: "channel" or "spatial".
        rank: channels between them.
        error_before: with data, what the outputs before the activation would be off by with the decomposition of the weights alone,
            as a share of their variance; without, the share of the squared weights that is lost.
        error_after: the same with the weights that the new layers have.
        rows: number of positions that they were fitted on; 0 without data.
        macs: multiply-accumulates of the old layer for a sample, all calls; None where its number of positions is not known.
        macs_after: of the new ones.
        parameters: weights of the old layer.
        parameters_after: of the new ones.
    """

    layer: str
    names: tuple[str, str]
    method: str
    rank: int
    error_before: float
    error_after: float
    rows: int
    macs: int | None
    macs_after: int | None
    parameters: int
    parameters_after: int


@dataclasses.dataclass(frozen=True)
class FactorizationReport(Report):
    """What `factorize` did.

    Attributes:
        layers: what became two.
        left: other layers with a kernel, and why they stay.
        macs: multiply-accumulates of the model before; None where the number of positions of a layer is not known.
        macs_after: and after.
        parameters: weights of the model before.
        parameters_after: and after.
    """

    layers: tuple[Factorization, ...]
    left: dict[str, str]
    macs: int | None
    macs_after: int | None
    parameters: int
    parameters_after: int

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layer", "method", "rank", "error before", "error after", "MACs", "after", "weights", "after"):
            made.add_column(heading, justify="left" if heading in ("layer", "method") else "right", no_wrap=True)
        for one in self.layers:
            errors = f"{one.error_before:.2g}", f"{one.error_after:.2g}"
            sizes = one.macs, one.macs_after, one.parameters, one.parameters_after
            made.add_row(one.layer, one.method, str(one.rank), *errors, *map(_told, sizes))
        console = Console(width=160, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            for layer, reason in self.left.items():
                console.print(f"left: {layer}: {reason}", highlight=False, markup=False)
            counted = f"MACs {_told(self.macs)} -> {_told(self.macs_after)}, " if self.macs is not None else ""
            console.print(f"{counted}weights {self.parameters:,} -> {self.parameters_after:,}", highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _told(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


@overload
def factorize(
    model: Any,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    macs: float | None = None,
    data: Any = None,
    layers: Collection[str] | None = None,
    method: str = "auto",
    verbose: Verbose = "auto",
    return_report: Literal[False] = False,
) -> keras.Model: ...


@overload
def factorize(
    model: Any,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    macs: float | None = None,
    data: Any = None,
    layers: Collection[str] | None = None,
    method: str = "auto",
    verbose: Verbose = "auto",
    return_report: Literal[True],
) -> tuple[keras.Model, FactorizationReport]: ...


def factorize(
    model: Any,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    macs: float | None = None,
    data: Any = None,
    layers: Collection[str] | None = None,
    method: str = "auto",
    verbose: Verbose = "auto",
    return_report: bool = False,
) -> Any:
    """Makes two thin layers of wide ones, where that saves: a new model, which gives nearly the same.

    A kernel W of low rank is a product. With V the first eigenvectors of the outputs' covariance, `W' E[x x'] W`,

    ```
    W'x + b  =  V (W V)'x + b'      least squares of the outputs among all maps of this rank
    ```

    "channel" (Zhang 2015): a Dense layer, an EinsumDense like `"abc,cd->abd"` or a convolution to `rank` channels, without bias and
    activation, then a Dense layer or a 1 x 1 convolution with both. "spatial" (Jaderberg 2014): a Conv2D of k x k becomes one of
    k x 1 to `rank` channels and one of 1 x k. At full rank both give what the old layer gave, for all strides, paddings and
    dilations.

    Without data the weights count all the same: V is that of the singular value decomposition. With data, each pair is fitted, in
    order, to what the old layer gave, on what the new network in front of it gives; its means go into the bias, where there is one.
    For the spatial method the k x 1 half is the decomposition weighted by the moments of columns, the 1 x k half least squares.
    Layers that are used several times are fitted on all their uses, on what the old network gives them.

    Layers stay that would not have fewer multiply-accumulates, or would have more weights, and those with groups, depthwise and
    transposed ones, those of other classes. Names get `_1` and `_2`. Kernel regularizers go to both layers; kernel constraints
    are dropped, because they hold for the product, not for its factors.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        rank: for all layers, or for each layer in a dict: then only these change. `method="auto"` is "channel" here.
        energy: share of what each layer gives that is kept, in (0, 1]: of the variance of its outputs with data, else of its
            squared weights. Each layer gets the smallest rank that keeps it.
        macs: at most this many multiply-accumulates of the whole model, or this share of them, up to 1. Ranks of all layers are
            chosen together, with the smallest sum of what the layers lose, each as a share of its own output.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`, such as a `tf.data.Dataset`; some
            hundreds to thousands of samples. What both networks hold of them at a time takes at most about 1 GB: further samples
            are not read.
        layers: names or paths of the layers to look at; None: all.
        method: "channel", "spatial" (Conv2D alone) or "auto", the better one of each layer.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `FactorizationReport`, too.

    Returns:
        The new model, not compiled. With `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `model` is no Keras model, and for arguments of other types.
        ValueError: if not exactly one of `rank`, `energy` and `macs` is given; for values out of range, names that fit no layer,
            a budget that cannot be reached (the message says what can), subclassed and unbuilt models, and data of other shapes
            or with NaN.

    Example:

    >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(64, activation="relu", name="wide")])
    >>> smaller, report = keras_kd.surgery.factorize(model, rank=4, return_report=True)
    >>> [layer.name for layer in smaller.layers], report.macs, report.macs_after
    (['wide_1', 'wide_2'], 2048, 384)

    Reference:
        Zhang, Zou, He, Sun: Accelerating Very Deep Convolutional Networks for Classification and Detection, 2015; Jaderberg,
        Vedaldi, Zisserman: Speeding up Convolutional Neural Networks with Low Rank Expansions, 2014.
    """
    _check(rank, energy, macs, method)
    check_verbose(verbose)
    model = _analysis.checked(model)
    found = _analysis.analyse(model)
    sites, left = sites_of(found)
    ranks = _ranks(model, sites, rank)
    wanted = _wanted(sites, left, _asked(found, {*sites, *left}, layers, rank), method, rank is not None, data is not None)
    batches = None if data is None else _side_by_side.checked_batches(model, data)
    inputs = None if batches is None else _side_by_side.held(model, batches)
    whole = _macs_of(model, sites) if macs is not None or return_report else None
    curves = _curves(found, wanted, inputs, rank is None, verbose)
    if rank is not None:
        picks = _by_rank(wanted, ranks, left)
    elif energy is not None:
        picks = _by_energy(wanted, energy, curves.lost, left)
    else:
        picks = _by_macs(wanted, float(macs or 0), whole, curves.lost, left)
    rebuilt = Rebuilt(found, set(), _replacements(found, picks))
    fits = {} if inputs is None else _fitted(rebuilt, picks, curves, inputs, verbose)
    for site in picks:
        for layer in rebuilt.replacements[id(site.layer)].layers:
            layer.trainable = site.layer.trainable
    return (rebuilt.model, _report(rebuilt, picks, fits, left, whole)) if return_report else rebuilt.model


def _check(rank: Any, energy: Any, macs: Any, method: Any) -> None:
    given = {"rank": rank, "energy": energy, "macs": macs}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"Exactly one of `rank`, `energy` and `macs` must be given. Received: {', '.join(named) or 'none'}.")
    if method not in ("auto", *METHODS):
        raise ValueError(f'`method` must be "auto", "channel" or "spatial". Received: method={method!r}.')
    if isinstance(rank, Mapping):
        for name, value in rank.items():
            _check_rank(value, f'{{"{name}": {value!r}}}')
    elif rank is not None:
        _check_rank(rank, repr(rank))
    for name, number in (("energy", energy), ("macs", macs)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, numbers.Real)):
            raise TypeError(f"`{name}` must be a number. Received: {name}={number!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must be a share above 0, up to 1. Received: energy={energy!r}.")
    if macs is not None and not 0 < macs < math.inf:
        raise ValueError(f"`macs` must be above 0: a number, or a share up to 1. Received: macs={macs!r}.")


def _check_rank(value: Any, told: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`rank` must be a whole number, or a dict from names of layers to such. Received: rank={told}.")
    if value < 1:
        raise ValueError(f"`rank` must be at least 1. Received: rank={told}.")


def _ranks(model: Any, sites: Mapping[str, Site], rank: Any) -> dict[int, int]:
    """The rank of each layer by `id`."""
    if isinstance(rank, Mapping):
        return {id(_taps.find_layer(model, name, argument="rank")): int(value) for name, value in rank.items()}
    return {} if rank is None else {id(site.layer): int(rank) for site in sites.values()}


def _asked(found: Analysis, kernels: set[str], layers: Any, rank: Any) -> set[int] | None:
    """Layers that a user named, by `id`; None for all."""
    if isinstance(rank, Mapping):
        if layers is not None:
            raise ValueError("`layers` must be None where `rank` is a dict, which names its layers. Received: both.")
        layers = rank
    if layers is None:
        return None
    if isinstance(layers, str) or not isinstance(layers, Collection) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"`layers` must be a list of names. Received: layers={layers!r}.")
    asked = set()
    for name in layers:
        layer = _taps.find_layer(found.model, name, argument="layers")
        if id(layer) not in found.records or found.records[id(layer)].path not in kernels:
            raise ValueError(
                f'`layers` and `rank` must name layers with a kernel. Received: "{name}", a {type(layer).__name__}. Layers that '
                f"have one: {', '.join(record.path for record in found.records.values() if record.path in kernels)}."
            )
        asked.add(id(layer))
    return asked


def _wanted(
    sites: Mapping[str, Site], left: dict[str, str], asked: set[int] | None, method: str, by_rank: bool, with_data: bool
) -> dict[Site, tuple[str, ...]]:
    """The layers to look at, and by which methods; notes why others stay."""
    wanted = {}
    for path, site in sites.items():
        chosen = METHODS[:1] if by_rank and method == "auto" else METHODS if method == "auto" else (method,)
        methods = tuple(one for one in chosen if one in site.methods)
        if with_data and site.kernel.shape[0] > MAX_WINDOW:
            methods = tuple(one for one in methods if one == "channel")
        if asked is not None and id(site.layer) not in asked:
            left[path] = "it was not asked for"
        elif not methods:
            left[path] = "there is no spatial factorization of it"
        elif not any(site.ranks(one) for one in methods):
            left[path] = "no rank would save"
        else:
            wanted[site] = methods
    return wanted


def _macs_of(model: Any, sites: Mapping[str, Site]) -> int | None:
    """Multiply-accumulates of a model; None where the lengths of its inputs are not known."""
    return _costs.macs_of(model) if all(site.is_known for site in sites.values()) else None


def _curves(found: Analysis, wanted: Mapping[Site, tuple[str, ...]], inputs: Any, all_of_them: bool, verbose: Verbose) -> Curves:
    """What each rank loses, of the weights or, with data, of the outputs; with data also the moments of shared layers."""
    if inputs is not None:
        curves = Curves(found, {site: methods for site, methods in wanted.items() if all_of_them or len(site.nodes) > 1}, verbose)
        if curves.methods:
            curves.through(inputs)
        return curves
    curves = Curves(found, {})
    for site, methods in wanted.items() if all_of_them else ():
        curves.lost[site.path] = {method: lost_of_weights(site, method) for method in methods}
    return curves


_Picks = dict[Site, tuple[str, int]]  # method and rank
_Lost = Mapping[str, Mapping[str, np.ndarray]]  # by path and method, for rank 0, 1, ...


def _by_rank(wanted: Mapping[Site, tuple[str, ...]], ranks: Mapping[int, int], left: dict[str, str]) -> _Picks:
    """The rank that was asked for, where it saves."""
    picks = {}
    for site, (method, *_) in wanted.items():
        rank = ranks[id(site.layer)]
        if rank in site.ranks(method):
            picks[site] = method, rank
        else:
            left[site.path] = f"rank {rank} would not save"
    return picks


def _by_energy(wanted: Mapping[Site, tuple[str, ...]], energy: float, lost: _Lost, left: dict[str, str]) -> _Picks:
    """The smallest rank that keeps enough, by the method that costs less."""
    picks = {}
    for site, methods in wanted.items():
        options = []
        for method in methods:
            enough = np.flatnonzero(lost[site.path][method] <= 1 - energy + _ROUNDING)
            options.append((method, max(int(enough[0]), 1) if len(enough) else site.limit(method)))
        saving = [(method, rank) for method, rank in options if rank in site.ranks(method)]
        if saving:
            picks[site] = min(saving, key=lambda option: site.macs(*option))
        else:
            needed = " or ".join(f"rank {rank} ({method})" for method, rank in options)
            left[site.path] = f"it would need {needed}, which would not save"
    return picks


def _by_macs(wanted: Mapping[Site, tuple[str, ...]], macs: float, whole: int | None, lost: _Lost, left: dict[str, str]) -> _Picks:
    """The ranks that lose least together within a budget."""
    if whole is None:
        raise ValueError(
            f"`macs` needs inputs of known lengths. Received: macs={macs!r} for a model with unknown ones. Give `rank` or `energy`."
        )
    budget = macs * whole if macs <= 1 else macs
    sites = {site.path: site for site in wanted}
    options = {
        site.path: [
            Option("", 0, site.macs(), 0.0),
            *(Option(m, rank, site.macs(m, rank), float(lost[site.path][m][rank])) for m in methods for rank in site.ranks(m)),
        ]
        for site, methods in wanted.items()
    }
    others = whole - sum(site.macs() for site in wanted)
    least = others + sum(min(one.macs for one in several) for several in options.values())
    if least > budget:
        raise ValueError(
            f"`macs` cannot be reached by factorization: the least is {least:,} multiply-accumulates, {least / whole:.3f} of "
            f"its {whole:,}. Received: macs={macs!r}."
        )
    chosen = choose(options, budget - others)
    left |= {path: "the budget holds without it" for path, one in chosen.items() if not one.method}
    return {site: (chosen[path].method, chosen[path].rank) for path, site in sites.items() if chosen[path].method}


def _replacements(found: Analysis, picks: _Picks) -> dict[int, Replacement]:
    """Two layers for each, by names that nobody has, with the factors of the weights alone."""
    taken = {record.operation.name for record in found.records.values()} | {tensor.name for tensor in found.model.inputs}
    made = {}
    for site, (method, rank) in picks.items():
        numbered = ([f"{site.layer.name}_{n}", f"{site.layer.name}_{n + 1}"] for n in itertools.count(1))
        names = next(two for two in numbered if taken.isdisjoint(two))
        taken.update(names)
        made[id(site.layer)] = site.replacement(method, names, site.split(method).factors(rank))
    return made


def _fitted(rebuilt: Rebuilt, picks: _Picks, curves: Curves, inputs: list[Any], verbose: Verbose) -> dict[str, Fit]:
    """Fits the new layers, those that are used several times first."""
    walk = Fitting(rebuilt, picks, verbose)
    for site, (method, rank) in picks.items():
        if len(site.nodes) > 1:
            walk.write(site, curves.sums[site.path], method, rank)
    if any(len(site.nodes) == 1 for site in picks):
        walk.through(inputs)
    return walk.fits


def _report(
    rebuilt: Rebuilt, picks: _Picks, fits: Mapping[str, Fit], left: Mapping[str, str], whole: int | None
) -> FactorizationReport:
    rows = []
    for site, (method, rank) in picks.items():
        names = [layer.name for layer in rebuilt.replacements[id(site.layer)].layers]
        one = fits.get(site.path)
        lost = float(lost_of_weights(site, method)[rank]) if one is None else 0.0
        before, after, count = (lost, lost, 0) if one is None else (one.before, one.after, one.rows)
        macs = (site.macs(), site.macs(method, rank)) if site.is_known else (None, None)
        bias = 0 if site.bias is None else len(site.bias)
        made = (site.path, (names[0], names[1]), method, rank, before, after, count, macs[0], macs[1])
        rows.append(Factorization(*made, site.parameters() + bias, site.parameters(method, rank) + bias))
    left_over = None if whole is None else whole - sum(site.macs() - site.macs(*pick) for site, pick in picks.items())
    weights = [model.count_params() for model in (rebuilt.found.model, rebuilt.model)]
    order = [record.path for record in rebuilt.found.records.values()]
    sorted_left = {path: left[path] for path in order if path in left}
    return FactorizationReport(tuple(rows), sorted_left, whole, left_over, weights[0], weights[1])
