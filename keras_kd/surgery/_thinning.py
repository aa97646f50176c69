"""What do two thin layers lose, and which ones lose least? Curves of all ranks, and fits to what the old network gives."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_kd._moments import Moments
from keras_kd._progress import Verbose
from keras_kd.surgery import _reading
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._ridge import about, solve, squares
from keras_kd.surgery._side_by_side import Walk
from keras_kd.surgery._sites import Site
from keras_kd.surgery._splits import ChannelSplit, SpatialSplit
from keras_kd.surgery._visits import Record

MAX_WINDOW = 5000  # columns of which second moments are taken: 200 MB


@dataclasses.dataclass
class Sums:
    """Moments of rows `[f, r]`: what is looked at of a layer's inputs, and what its old weights are off by.

    Attributes:
        site: the layer.
        wide: whether f is what the layer reads; else it is what its kernel makes of that, without bias.
        seen: on samples to fit.
        unseen: on others.
    """

    site: Site
    wide: bool
    seen: Moments
    unseen: Moments

    @classmethod
    def empty(cls, site: Site, wide: bool) -> "Sums":
        """Those of no rows."""
        columns = site.kernel.shape[1] + site.kernel.shape[not wide]
        return cls(site, wide, Moments.empty(columns), Moments.empty(columns))

    def narrow(self) -> "Sums":
        """The same of what the kernel makes of the inputs."""
        if not self.wide:
            return self
        return dataclasses.replace(self, wide=False, seen=self._mapped(self.seen), unseen=self._mapped(self.unseen))

    def _mapped(self, moments: Moments) -> Moments:
        kernel = self.site.kernel
        columns, outputs = kernel.shape
        mapping = np.zeros((columns + outputs, 2 * outputs))
        mapping[:columns, :outputs], mapping[columns:, outputs:] = kernel, np.eye(outputs)
        scatter = mapping.T @ moments.scatter @ mapping
        return dataclasses.replace(moments, mean=moments.mean @ mapping, scatter=scatter)

    def whole(self) -> Moments:
        """Of all rows."""
        moments = dataclasses.replace(self.seen, scatter=self.seen.scatter.copy())
        moments.add(self.unseen)
        return moments


@dataclasses.dataclass(frozen=True)
class Fit:
    """Two thin maps for a layer.

    Attributes:
        factors: of its kernel.
        bias: of the second one, or None.
        before: share of the variance of the layer's outputs that the weights' own decomposition is off by.
        after: what these factors are off by.
        rows: number of positions.
    """

    factors: tuple[np.ndarray, np.ndarray]
    bias: np.ndarray | None
    before: float
    after: float
    rows: int


def lost_of_weights(site: Site, method: str) -> np.ndarray:
    """Share of the sum of squared weights that ranks 0, 1, ... lose."""
    return site.split(method).lost / (float(np.sum(np.square(site.kernel))) or 1.0)


def lost_of_data(sums: Sums, method: str) -> np.ndarray:
    """Share of the variance of the outputs that ranks 0, 1, ... lose."""
    outputs = sums.site.kernel.shape[1]
    free = sums.site.bias is not None
    whole = sums.narrow().whole()
    energy = _energy(whole, outputs)
    if method == "channel":
        return ChannelSplit(np.eye(outputs), about(whole, free)[:outputs, :outputs]).lost[: sums.site.limit(method) + 1] / energy
    columns = len(sums.site.kernel)
    return SpatialSplit(sums.site.kernel, sums.site.shape, about(sums.whole(), free)[:columns, :columns]).lost / energy


def fit(sums: Sums, method: str, rank: int) -> Fit:
    """The two maps that are nearest to what the old network gives (reduced rank regression).

    ```
    min over D of  E |r - D'y|^2 + l2 |D|^2          y: what the old kernel makes of the inputs, r: what that is off by
    min over A, B of  E |(C - A B)'(x - mean x)|^2   C = W (1 + D); the means go into the bias where there is one
    ```

    Args:
        sums: of the layer; wide for the spatial method.
        method: "channel" or "spatial".
        rank: of the two.
    """
    site, narrow = sums.site, sums.narrow()
    outputs, free = site.kernel.shape[1], site.bias is not None
    moved = np.eye(outputs) + solve(narrow.seen, narrow.unseen, outputs, free).kernel
    if method == "channel":
        whole = narrow.whole()
        split: Any = ChannelSplit(moved, about(whole, free)[:outputs, :outputs])
        base, plain = np.eye(outputs), np.linalg.qr(site.split(method).factors(rank)[1].T)[0]
        old = plain @ plain.T
        first, second = split.factors(rank)
        factors = site.kernel @ first, second
    else:
        whole, columns = sums.whole(), len(site.kernel)
        split = SpatialSplit(site.kernel @ moved, site.shape, about(whole, free)[:columns, :columns])
        old, base = site.split(method).product(rank), site.kernel
        factors = split.factors(rank)
    change = split.product(rank) - base
    columns = len(base)
    shift = whole.mean[columns:] - whole.mean[:columns] @ change if free else np.zeros(outputs)
    bias = None if site.bias is None else site.bias + shift
    energy = _energy(narrow.whole(), outputs)
    second_moments = about(whole, False)
    errors = [
        squares(whole, second_moments, columns, one, offset) / energy
        for one, offset in ((old - base, np.zeros(outputs)), (change, shift))
    ]
    return Fit(factors, bias, errors[0], errors[1], whole.rows)


def _energy(whole: Moments, outputs: int) -> float:
    """Sum of squares of the wanted outputs about their mean, or about 0 if they are constant; from moments of `[y, r]`."""
    about_mean, about_zero = (
        float(np.trace(one[:outputs, :outputs]) + 2 * np.trace(one[:outputs, outputs:]) + np.trace(one[outputs:, outputs:]))
        for one in (whole.scatter, about(whole, False))
    )
    return about_mean if about_mean > 1e-12 * about_zero else about_zero or 1.0


class Gathering(Walk):
    """Takes moments at layers, all their calls together.

    Args:
        found: analysis of the model.
        wide: the layers, and whether their inputs are looked at, too.
        rebuilt: the new model beside it.
        verbose: of the progress.
    """

    def __init__(self, found: Analysis, wide: Mapping[Site, bool], rebuilt: Rebuilt | None = None, verbose: Verbose = 0) -> None:
        super().__init__(found, rebuilt, verbose)
        self.sites = {id(site.layer): site for site in wide}
        self.wide = wide
        self.sums: dict[str, Sums] = {}

    def visit(
        self, node: Any, record: Record, values: list[dict[int, Any]], calls: int, nodes: list[Any], outputs: set[int]
    ) -> None:
        """Takes in what a layer reads."""
        site = self.sites.get(id(record.operation))
        if site is None:
            return
        sums = self.sums.setdefault(site.path, Sums.empty(site, self.wide[site]))
        self.gather(node, sums, values)
        self.seen(site, sums)

    def seen(self, site: Site, sums: Sums) -> None:
        """What to do with the moments after each call."""

    def gather(self, node: Any, sums: Sums, values: list[dict[int, Any]]) -> None:
        """Takes in rows of all batches."""
        site = sums.site
        source, positions, rows = _reading.reader_of(site.layer, node)
        for before, after in zip(values[0][id(source)], values[1][id(source)], strict=True):
            columns = len(sums.seen.mean)
            chosen, fits = self.sampled(positions(after), len(after), len(values[0][id(source)]), columns)
            read = rows(after, chosen)
            given = read @ site.kernel
            missing = np.zeros_like(given) if before is after else rows(before, chosen) @ site.kernel - given
            pairs = np.concatenate([read if sums.wide else given, missing], axis=1)
            sums.seen.add(Moments.of(pairs[fits]))
            sums.unseen.add(Moments.of(pairs[~fits]))
        if not np.isfinite(sums.whole().mean).all():
            raise ValueError(f'`data` must give finite numbers everywhere. Received: NaN or infinity in what "{site.path}" reads.')


class Curves(Gathering):
    """Curves of what ranks lose, by path and method; the moments of layers with several calls stay.

    Args:
        found: analysis of the model.
        methods: the layers, and the methods that are looked at.
        verbose: of the progress.
    """

    title = "ranks"

    def __init__(self, found: Analysis, methods: Mapping[Site, tuple[str, ...]], verbose: Verbose = 0) -> None:
        super().__init__(found, {site: "spatial" in some for site, some in methods.items()}, verbose=verbose)
        self.methods = methods
        self.calls: dict[str, int] = {}
        self.lost: dict[str, dict[str, np.ndarray]] = {}

    def seen(self, site: Site, sums: Sums) -> None:
        """After the last call."""
        self.calls[site.path] = self.calls.get(site.path, 0) + 1
        if self.calls[site.path] < len(site.nodes):
            return
        self.lost[site.path] = {method: lost_of_data(sums, method) for method in self.methods[site]}
        if len(site.nodes) == 1:
            del self.sums[site.path]


class Fitting(Gathering):
    """Fits the two layers in the place of each with one call, in order, on what the new network gives them.

    Args:
        rebuilt: both models.
        picks: method and rank of the layers.
        verbose: of the progress.
    """

    title = "fit"

    def __init__(self, rebuilt: Rebuilt, picks: Mapping[Site, tuple[str, int]], verbose: Verbose = 0) -> None:
        single = {site: method == "spatial" for site, (method, _) in picks.items() if len(site.nodes) == 1}
        super().__init__(rebuilt.found, single, rebuilt, verbose)
        self.rebuilt = rebuilt
        self.picks = picks
        self.fits: dict[str, Fit] = {}

    def seen(self, site: Site, sums: Sums) -> None:
        """Fits, and forgets the moments."""
        self.write(site, sums, *self.picks[site])
        del self.sums[site.path]

    def write(self, site: Site, sums: Sums, method: str, rank: int) -> None:
        """Fits a layer, and writes the weights to the new model."""
        found = self.fits[site.path] = fit(sums, method, rank)
        layers = self.rebuilt.replacements[id(site.layer)].layers
        for layer, weights in zip(layers, site.weights(method, found.factors, found.bias), strict=True):
            layer.set_weights(weights)
