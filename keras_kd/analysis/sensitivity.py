"""What does each layer alone cost when something of it goes, and do the cheap measures tell the truth about it?"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _batching, _calls
from keras_kd._moments import Moments
from keras_kd._progress import Progress, Verbose
from keras_kd.analysis import _arguments, _places, linear
from keras_kd.analysis._targets import Target, find_targets
from keras_kd.analysis._trial import Trial
from keras_kd.analysis.results import LayerAnalysis, LinearReport, read_json, write_json
from keras_kd.quantized._quantizers import round_kernel

What = Literal["channels", "weights", "bits", "rank"]
RATIOS: dict[str, tuple[float, ...]] = {
    "channels": (0.125, 0.25, 0.5, 0.75),
    "weights": (0.5, 0.75, 0.9, 0.95),
    "bits": (8, 6, 4, 3, 2),
    "rank": (0.25, 0.5, 0.75, 0.9),
}
CRITERIA = ("cost", "redundancy", "l1", "l2", "taylor", "fisher", "random")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer changed in one way, all others as they were.

    Attributes:
        layer: path of the layer.
        ratio: share of its channels, weights or ranks that went, or its number of bits.
        channels: which channels went.
        accuracy_loss: accuracy before, minus after; None without class indices.
        loss_increase: mean loss after, minus before.
        predicted: what each cheap measure says.
    """

    layer: str
    ratio: float
    channels: tuple[int, ...]
    accuracy_loss: float | None
    loss_increase: float
    predicted: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SensitivityReport:
    """What each layer alone costs.

    Attributes:
        what: "channels", "weights", "bits" or "rank".
        criterion: by which channels were chosen; "" for others.
        reconstructed: whether the channels that went were given by the best linear map of the kept ones.
        accuracy: of the model as it is; None without class indices.
        loss: of the model as it is.
        samples: number of samples.
        cells: what was tried.
        correlations: for each measure, Spearman's rank correlation of its prediction with the increase of the loss, over all cells.
        within_layers: the same inside of each layer, the mean over layers.
    """

    what: str
    criterion: str
    reconstructed: bool
    accuracy: float | None
    loss: float
    samples: int
    cells: tuple[Cell, ...]
    correlations: dict[str, float]
    within_layers: dict[str, float]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns everything as JSON, and writes it to `path` if there is one."""
        return write_json(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "SensitivityReport":
        """The report that `to_json` wrote: its text, or the path of its file."""

        def make(found: dict[str, Any]) -> "SensitivityReport":
            cells = tuple(Cell(**one | {"channels": tuple(one["channels"])}) for one in found["cells"])
            return cls(**found | {"cells": cells})

        report: SensitivityReport = read_json(source, "SensitivityReport", make)
        return report

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        measures = list(self.correlations)
        for heading in ("layer", "bits" if self.what == "bits" else "ratio", "accuracy loss", "loss increase", *measures):
            made.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
        for cell in self.cells:
            lost = "-" if cell.accuracy_loss is None else f"{100 * cell.accuracy_loss:.2f}"
            predicted = (f"{cell.predicted[one]:.2g}" if one in cell.predicted else "-" for one in measures)
            made.add_row(cell.layer, f"{cell.ratio:g}", lost, f"{cell.loss_increase:.3g}", *predicted)
        made.add_row("rank correlation", "", "", "", *(f"{self.correlations[one]:.2f}" for one in measures))
        console = Console(width=180, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def sensitivity(
    model: keras.Model,
    data: Any,
    labels: Any = None,
    ratios: Sequence[float] | None = None,
    *,
    what: What = "channels",
    each: bool = False,
    layers: Sequence[str] | None = None,
    criterion: str = "cost",
    reconstruct: bool = True,
    analysis_data: Any = None,
    loss: Any = None,
    max_positions: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> SensitivityReport:
    """Changes one layer at a time and measures what that costs, with what the cheap measures said before beside it.

    "channels": the share `ratio` of a layer's channels goes, where the next layers read them; with `reconstruct` the kept ones give
    them by their best linear map, as surgery with data does, otherwise they become 0. "weights": the share with the smallest
    magnitudes becomes 0. "bits": the kernel is rounded, a range for each channel. "rank": the share of the smallest singular values
    becomes 0. The model is as before afterwards, to the last bit.

    The measures, for what goes (z: what the layer reads, D: change of the kernel, g: gradient with respect to its output):

    ```
    cost        1/2 sum_channels mean(sum g^2) e      e: channels: mean square of what is lost of each; kernels: mean (D' z)^2
    variance    sum_channels e / sum_channels variance                          (channels)
    l1, l2      share of the kernel's absolute values, or of its squares
    taylor, fisher   sum over the channels (see `linear_analysis`)              (channels)
    ```

    Args:
        model: a built model.
        data: as in `linear_analysis`. It is kept in memory.
        labels: what `loss` takes; with classes (indices, 0 and 1 for a single output, or one-hot rows) accuracies are measured.
        ratios: shares in (0, 1), or bits from 2 to 16; None for four or five usual ones. Each gives a cell, of one channel at least
            and all but one at most.
        what: "channels", "weights", "bits" or "rank".
        each: for channels: every channel alone instead of ratios.
        layers: names of layers, of which alone the measures are taken; None for all convolutions and Dense layers (without those
            whose channels the output needs, or that are called several times, for channels).
        criterion: by which channels are chosen: "cost", "redundancy", "l1", "l2", "taylor", "fisher", or "random" for comparison.
        reconstruct: whether kept channels stand in for those that went.
        analysis_data: what the measures and the linear maps are taken from, as `data`, without labels or as an iterable of
            batches with them; None: from `data` and `labels`. Other data than what the losses are measured on is the honest test.
        loss: as in `linear_analysis`.
        max_positions: as in `linear_analysis`.
        batch_size: samples at a time, for arrays.
        seed: of what is drawn.
        verbose: progress; 0 is silent.

    Returns:
        A `SensitivityReport`.

    Raises:
        ValueError: for arguments out of range, names that match nothing, missing labels, and data as in `linear_analysis`.

    Example:

    >>> hidden = keras.layers.Dense(8, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> report = keras_kd.analysis.sensitivity(model, x, (x[:, 0] > 0).astype(int), [0.25, 0.5], verbose=0)
    >>> [(cell.layer, cell.ratio) for cell in report.cells]
    [('hidden', 0.25), ('hidden', 0.5)]
    """
    if what not in RATIOS:
        raise ValueError(f"`what` must be one of {', '.join(RATIOS)}. Received: what={what!r}.")
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}. Received: criterion={criterion!r}.")
    chosen = _checked_ratios(ratios, what)
    settings = linear.Settings(layers=layers, loss=loss, max_positions=max_positions, seed=seed)
    model = _arguments.checked_model(model)
    batches = list(_batching.batches(data, labels, size=batch_size))
    specs = _places.input_specs(model, keras.tree.map_structure(tf.convert_to_tensor, batches[0][0]))
    _arguments.check_numbers(batches[0][1])
    batches = [(_arguments.fitting(model, x, specs), y, w) for x, y, w in batches]
    trace = _calls.trace(model, specs)
    targets = find_targets(model, trace, layers, what, settings.max_columns)
    settings = dataclasses.replace(settings, layers=[name for target in targets for name in target.places])
    with _arguments.unchanged(model):
        gathered, report = _analysed(model, batches, labels, analysis_data, settings, batch_size, trace, verbose)
        trial = Trial(model, batches, _arguments.task_of(model, trace.outputs, batches[0][1], labels, loss))
        jobs: list[_Job] = []
        for target in targets:
            rows = [report[name] for name in target.places]
            if what == "channels":
                jobs += _channel_jobs(target, rows[0], gathered, chosen, each, criterion, reconstruct, seed)
            else:
                jobs += _kernel_jobs(target, rows, gathered, chosen, what)
        cells = []
        with Progress(len(jobs), what="trials", title=f"sensitivity of {what}", verbose=verbose) as progress:
            for job in jobs:
                accuracy, mean = job.run(trial)
                lost = None if accuracy is None or trial.accuracy is None else trial.accuracy - accuracy
                cells.append(Cell(job.layer, job.ratio, job.channels, lost, mean - trial.mean, job.predicted))
                progress.advance()
    by = criterion if what == "channels" and not each else ""
    overall, within = _correlations(cells)
    return SensitivityReport(
        what, by, reconstruct and what == "channels", trial.accuracy, trial.mean, trial.samples, tuple(cells), overall, within
    )


def _analysed(
    model: keras.Model,
    batches: list[Any],
    labels: Any,
    other: Any,
    settings: linear.Settings,
    batch_size: int,
    trace: _calls.Trace,
    verbose: Verbose,
) -> tuple[Any, LinearReport]:
    """What the measures are taken from."""
    if other is None:
        return linear.analyse(model, batches, classes_of=labels, settings=settings, samples=None, verbose=verbose, trace=trace)
    batches = list(_batching.batches(other, size=batch_size, required=False))
    if batches[0][1] is None:
        settings = dataclasses.replace(settings, loss=None)
    return linear.analyse(model, batches, classes_of=None, settings=settings, samples=None, verbose=verbose)


@dataclasses.dataclass(frozen=True)
class _Job:
    layer: str
    ratio: float
    channels: tuple[int, ...]
    predicted: dict[str, float]
    run: Callable[[Trial], tuple[float | None, float]]


def _checked_ratios(ratios: Any, what: str) -> tuple[float, ...]:
    if ratios is None:
        return RATIOS[what]
    values = tuple(ratios) if isinstance(ratios, (list, tuple, np.ndarray)) else (ratios,)
    if what == "bits":
        if not values or any(isinstance(one, bool) or one not in range(2, 17) for one in values):
            raise ValueError(f"`ratios` must be numbers of bits from 2 to 16. Received: ratios={ratios!r}.")
    elif not values or any(
        isinstance(one, bool) or not isinstance(one, (int, float, np.number)) or not 0 < one < 1 for one in values
    ):
        raise ValueError(f"`ratios` must be in (0, 1): shares of what goes. Received: ratios={ratios!r}.")
    return tuple(float(one) for one in values) if what != "bits" else tuple(int(one) for one in values)


def _channel_jobs(
    target: Target,
    place: LayerAnalysis,
    gathered: Any,
    ratios: tuple[float, ...],
    each: bool,
    criterion: str,
    reconstruct: bool,
    seed: int,
) -> Iterator[_Job]:
    count = place.channels
    moments = gathered.output_moments(place.name)
    norms = _norms(target.layer)
    order = _order(place, norms, criterion, seed)
    sets: list[tuple[tuple[int, ...], float]]
    if each:
        sets = [((channel,), 1 / count) for channel in range(count)]
    else:
        numbers = [(min(max(round(ratio * count), 1), count - 1), ratio) for ratio in ratios]
        sets = [(tuple(sorted(order[count - number :])), ratio) for number, ratio in numbers if number]
    for channels, ratio in sets:
        matrix, shift, lost = _stand_in(moments, channels, reconstruct)
        gone = list(channels)
        gradient = np.asarray(place.gradient)
        predicted = {
            "cost": float(0.5 * np.sum(gradient[gone] * lost)),
            "variance": float(lost.sum() / max(np.trace(moments.scatter) / moments.weight, 1e-30)),
            "l1": float(norms["l1"][gone].sum() / norms["l1"].sum()),
            "l2": float(norms["l2"][gone].sum() / norms["l2"].sum()),
            "taylor": float(np.sum(_of_channels(place.taylor, count)[gone])),
            "fisher": float(np.sum(_of_channels(place.fisher, count)[gone])),
        }

        def run(trial: Trial, matrix: Any = matrix, shift: Any = shift) -> tuple[float | None, float]:
            return trial.with_channels(place.name, matrix, shift)

        yield _Job(target.path, ratio, channels, predicted, run)


def _norms(layer: Any) -> dict[str, np.ndarray]:
    """Of the kernel, by channel."""
    flat = ops.convert_to_numpy(layer.kernel).astype("float64").reshape(-1, layer.kernel.shape[-1])
    return {"l1": np.abs(flat).sum(0), "l2": np.square(flat).sum(0)}


def _order(place: LayerAnalysis, norms: dict[str, np.ndarray], criterion: str, seed: int) -> list[int]:
    """Channels, the ones to keep longest first."""
    if criterion == "cost":
        return list(place.removal_by_cost.keep)
    if criterion == "redundancy":
        return list(place.removal.keep)
    if criterion == "random":
        return [int(channel) for channel in np.random.default_rng(seed).permutation(place.channels)]
    scores = norms[criterion] if criterion in norms else _of_channels(getattr(place, criterion), place.channels)
    return [int(channel) for channel in np.argsort(-scores, kind="stable")]


def _of_channels(values: Sequence[float], count: int) -> np.ndarray:
    """What was measured of each channel; 0 where the loss does not depend on them."""
    return np.asarray(values) if len(values) else np.zeros(count)


def _stand_in(moments: Moments, channels: tuple[int, ...], reconstruct: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map that gives what is left of all channels, and the mean square of what is lost of those that went."""
    count, gone = len(moments.mean), list(channels)
    kept = [channel for channel in range(count) if channel not in set(gone)]
    covariance = moments.scatter / moments.weight
    matrix, shift = np.eye(count), np.zeros(count)
    matrix[:, gone] = 0.0
    if not reconstruct:
        return matrix, shift, np.diag(covariance)[gone] + moments.mean[gone] ** 2
    inner = covariance[np.ix_(kept, kept)]
    given = np.linalg.pinv(inner, rcond=1e-10, hermitian=True) @ covariance[np.ix_(kept, gone)]
    matrix[np.ix_(kept, gone)] = given
    shift[gone] = moments.mean[gone] - moments.mean[kept] @ given
    lost = np.diag(covariance)[gone] - np.sum(given * covariance[np.ix_(kept, gone)], axis=0)
    return matrix, shift, np.maximum(lost, 0.0)


def _kernel_jobs(target: Target, rows: list[LayerAnalysis], gathered: Any, ratios: tuple[float, ...], what: str) -> Iterator[_Job]:
    layer = target.layer
    kernel = ops.convert_to_numpy(layer.kernel).astype("float64")
    seconds = [gathered.input_second_moment(row.name) for row in rows]
    for ratio in ratios:
        changed = _changed(kernel, ratio, what)
        delta = (changed - kernel).reshape(-1, kernel.shape[-1])
        squares = float(np.square(kernel).sum()) or 1.0
        predicted = {
            "l1": float(np.abs(delta).sum() / (np.abs(kernel).sum() or 1.0)),
            "l2": float(np.square(delta).sum() / squares),
        }
        if all(second is not None and len(second) == len(delta) for second in seconds):
            errors = [np.sum(delta * (second @ delta), axis=0) for second in seconds]  # a call after the other
            cost = sum(float(0.5 * np.sum(np.asarray(row.gradient) * one)) for row, one in zip(rows, errors, strict=True))
            predicted = {"cost": cost} | predicted

        def run(trial: Trial, changed: np.ndarray = changed) -> tuple[float | None, float]:
            return trial.with_kernel(layer, changed)

        yield _Job(target.path, ratio, (), predicted, run)


def _changed(kernel: np.ndarray, ratio: float, what: str) -> np.ndarray:
    if what == "bits":
        flat = kernel.reshape(-1, kernel.shape[-1]).astype("float32")
        rounded: Any = round_kernel(tf.convert_to_tensor(flat), int(ratio), "channel")
        return np.asarray(rounded, "float64").reshape(kernel.shape)
    if what == "weights":
        number = round(ratio * kernel.size)
        changed = kernel.copy().ravel()
        changed[np.argsort(np.abs(changed), kind="stable")[:number]] = 0.0
        return changed.reshape(kernel.shape)
    left, values, right = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
    rank = max(len(values) - round(ratio * len(values)), 1)
    product: np.ndarray = (left[:, :rank] * values[:rank]) @ right[:rank]
    return product.reshape(kernel.shape)


def _correlations(cells: list[Cell]) -> tuple[dict[str, float], dict[str, float]]:
    measures = list(dict.fromkeys(measure for cell in cells for measure in cell.predicted))
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    overall, within = {}, {}
    for measure in measures:
        having = [cell for cell in cells if measure in cell.predicted]
        overall[measure] = _spearman(having, measure)
        groups = [[cell for cell in having if cell.layer == layer] for layer in layers]
        within[measure] = float(np.mean([_spearman(group, measure) for group in groups if len(group) > 1] or [0.0]))
    return overall, within


def _spearman(cells: list[Cell], measure: str) -> float:
    """Rank correlation of a prediction with the increase of the loss; 0 where one of them is constant."""
    a = _ranks([cell.predicted[measure] for cell in cells])
    b = _ranks([cell.loss_increase for cell in cells])
    if len(cells) < 2 or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])
