"""At which depth can the classes be read off linearly? Ridge probes of all layers, in one pass over the data."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _batching, _calls
from keras_kd._moments import Moments, ridge
from keras_kd._progress import Progress, Verbose
from keras_kd.analysis import _arguments
from keras_kd.analysis import _places as places
from keras_kd.layers import LinearProbe

PENALTIES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


@dataclasses.dataclass(frozen=True)
class ProbeRow:
    """What a linear probe reads at one place.

    Attributes:
        name: path of the layer; with `:0`, `:1`, ... where it is called several times.
        kind: its class.
        width: number of features after pooling.
        accuracy: share of the held-out samples whose class the probe gives, in [0, 1].
        standard_error: of that share, by its number of samples.
        l2: the penalty that generalised cross-validation chose.
    """

    name: str
    kind: str
    width: int
    accuracy: float
    standard_error: float
    l2: float


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """Accuracy of linear probes by depth.

    Attributes:
        rows: one for each place, in the order in which the model computes.
        chance: share of the most frequent class among the held-out samples.
        model_accuracy: of the model's own output on them; None if it is not one score for each class.
        trained_on: number of samples that the probes were solved on.
        tested_on: number of held-out samples.
        skipped: places that were left out, and why.
    """

    rows: tuple[ProbeRow, ...]
    chance: float
    model_accuracy: float | None
    trained_on: int
    tested_on: int
    skipped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A table with a row for each place."""
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layer", "class", "features", "accuracy, %", "l2"):
            made.add_column(heading, justify="left" if heading in ("layer", "class") else "right", no_wrap=True)
        for row in self.rows:
            accuracy = f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"
            made.add_row(row.name, row.kind, f"{row.width:,}", accuracy, f"{row.l2:g}")
        console = Console(width=160, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            own = "" if self.model_accuracy is None else f", the model itself {100 * self.model_accuracy:.1f} %"
            told = f"Solved on {self.trained_on:,} samples, tested on {self.tested_on:,}; chance {100 * self.chance:.1f} %{own}."
            console.print(told, highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws accuracy over depth; writes a PNG to `path`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.5 * len(self.rows)), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        places = range(len(self.rows))
        errors = [100 * row.standard_error for row in self.rows]
        axes.errorbar(places, [100 * row.accuracy for row in self.rows], yerr=errors, marker="o", capsize=3, label="linear probe")
        axes.axhline(100 * self.chance, ls=":", color="0.5", label="chance")
        if self.model_accuracy is not None:
            axes.axhline(100 * self.model_accuracy, ls="--", color="0.3", label="the model")
        axes.set_xticks(list(places), [row.name for row in self.rows], rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("accuracy of held-out samples, %")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=130)


def probe(
    model: keras.Model,
    data: Any,
    labels: Any = None,
    *,
    layers: Sequence[str] | None = None,
    classes: int | None = None,
    l2: Any = PENALTIES,
    pooling: str = "auto",
    test_share: float = 0.2,
    max_test_samples: int = 5000,
    max_width: int = 2048,
    batch_size: int = 256,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> ProbeReport:
    """Probes the layers of a model: how well does a linear map of each one's pooled output tell the classes apart?

    One pass over the data. A seeded share of the samples is held out; memory depends on the widths, their number up to
    `max_test_samples`, and not on the number of all samples. A probe is the ridge regression of the one-hot classes on the
    features (see `layers.LinearProbe`), with the penalty that generalised cross-validation chooses.

    Args:
        model: a built model; for a Distiller, its student.
        data: inputs nested as the model takes them, or an iterable of batches `(x, y)` without `labels`.
        labels: class indices, `(samples,)`.
        layers: names of places, such as `"backbone/conv1"`; None for all that give one tensor of floats.
        classes: number of classes; None: from `labels`, or from the width of the model's output.
        l2: penalties to choose from.
        pooling: see `layers.LinearProbe`.
        test_share: share of the samples that is held out, in (0, 1).
        max_test_samples: held-out samples beyond this number are solved on instead.
        max_width: wider places are skipped.
        batch_size: samples at a time, for arrays.
        seed: of the choice of held-out samples.
        verbose: 0 is silent; 1 or `"auto"` shows progress.

    Returns:
        A `ProbeReport`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, a name fits no place, there are too few samples, labels are of another length or no class
            indices, or a layer gives NaN (it is named).

    Example:

    >>> hidden = keras.layers.Dense(8, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> report = keras_kd.analysis.probe(model, x, (x[:, 0] > 0).astype(int), verbose=0)
    >>> report.rows[0].name, report.rows[0].accuracy > 0.8
    ('hidden', True)
    """
    model = _arguments.checked_model(model)
    _arguments.checked_names("layers", layers)
    if not 0 < test_share < 1:
        raise ValueError(f"`test_share` must be in (0, 1). Received: test_share={test_share!r}.")
    batches = ((x, y) for x, y, _ in _batching.batches(data, labels, size=batch_size))
    first = next(batches)
    specs = places.input_specs(model, keras.tree.map_structure(tf.convert_to_tensor, first[0]))
    _arguments.fitting(model, first[0], specs)  # says what does not fit before anything is traced
    names, kinds, skipped = _places(model, specs, layers, max_width, pooling)
    count = classes or _number_of_classes(model, labels)
    gathered = Gathered(names, count, test_share, max_test_samples, seed)
    reader = LinearProbe(1, pooling=pooling)
    observe = _calls.observer(model, names, lambda _, x, mask: reader.pooled(keras.tree.flatten(x)[0], mask))
    progress = Progress(_batching.count(data, labels), title="probes", verbose=verbose)
    for x, y in progress.over(_chained(first, batches), size=lambda batch: len(keras.tree.flatten(batch[0])[0])):
        features, outputs = observe(_arguments.fitting(model, x, specs))
        gathered.add({name: ops.convert_to_numpy(value) for name, value in features.items()}, checked_labels(y, count), outputs)
    return gathered.report(kinds, [float(one) for one in (l2 if isinstance(l2, (list, tuple)) else [l2])], skipped)


class Gathered:
    """Moments of the samples that probes are solved on, and features of those that are held out."""

    def __init__(self, names: list[str], classes: int, share: float, limit: int, seed: int) -> None:
        self.names, self.classes, self.share, self.limit = names, classes, share, limit
        self.chance = np.random.default_rng(seed)
        self.moments: dict[str, Moments] = {}
        self.held: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self.labels: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []
        self.kept = 0

    def add(self, features: dict[str, np.ndarray], labels: np.ndarray, outputs: Any) -> None:
        """Takes a batch in."""
        out = self.chance.random(len(labels)) < self.share
        out &= np.cumsum(out) <= self.limit - self.kept
        self.kept += int(out.sum())
        wanted = np.eye(self.classes)[labels[~out]]
        for name in self.names:
            values = features[name]
            if not np.isfinite(values).all():
                raise ValueError(f'The layer "{name}" gives NaN or infinite values on `data`.')
            self.held[name].append(values[out])
            rows = np.concatenate([values[~out].astype("float64"), wanted], axis=1)
            self.moments.setdefault(name, Moments.empty(rows.shape[1])).add(Moments.of(rows))
        self.labels.append(labels[out])
        scores = keras.tree.flatten(outputs)
        if len(scores) == 1 and tuple(scores[0].shape[1:]) == (self.classes,):
            self.predicted.append(np.argmax(scores[0], -1)[out])

    def report(self, kinds: dict[str, str], penalties: list[float], skipped: list[str]) -> ProbeReport:
        """Solves and tests."""
        labels = np.concatenate(self.labels)
        solved_on = next(iter(self.moments.values())).rows
        if not len(labels) or solved_on <= self.classes:
            raise ValueError(
                f"`data` must hold more samples than classes, and some to test on. Received: {solved_on} to solve on and "
                f"{len(labels)} held out, for {self.classes} classes."
            )
        rows = []
        for name in self.names:
            moments = self.moments[name]
            width = len(moments.mean) - self.classes
            fit = ridge(moments, width, penalties)
            right = (np.concatenate(self.held[name]) @ fit.kernel + fit.bias).argmax(-1) == labels
            error = float(np.sqrt(right.mean() * (1 - right.mean()) / len(labels)))
            rows.append(ProbeRow(name, kinds[name], width, float(right.mean()), error, fit.l2))
        own = float(np.mean(np.concatenate(self.predicted) == labels)) if self.predicted else None
        chance = float(np.bincount(labels).max() / len(labels))
        return ProbeReport(tuple(rows), chance, own, solved_on, len(labels), tuple(skipped))


def _places(
    model: keras.Model, specs: Any, layers: Sequence[str] | None, max_width: int, pooling: str
) -> tuple[list[str], dict[str, str], list[str]]:
    """Names of the places to probe, their classes, and what was left out."""
    kinds: dict[str, str] = {}
    skipped = []
    seen = set()
    for call in _calls.trace(model, specs).calls:
        output = call.outputs[0] if len(call.outputs) == 1 else None
        if output is None or not output.dtype.is_floating or output.shape.rank is None or output.shape.rank < 2:
            continue
        width = output.shape[-1] if pooling != "flatten" else output.shape[1:].num_elements()
        if width is None or width > max_width:
            skipped.append(f"{call.name} ({width} features)")
        elif id(output) not in seen:  # dropout gives what it got
            seen.add(id(output))
            kinds[call.name] = type(call.layer).__name__
    unknown = [name for name in layers or () if name not in kinds]
    if unknown:
        raise ValueError(
            f"`layers` must name places of the model that give one tensor of floats. Received: {', '.join(unknown)}. Places: "
            f"{', '.join(kinds)}."
        )
    names = list(kinds) if layers is None else [name for name in kinds if name in set(layers)]
    if not names:
        raise ValueError(f'"{model.name}" has no place to probe. Skipped: {", ".join(skipped) or "nothing"}.')
    return names, kinds, skipped if layers is None else []


def _number_of_classes(model: keras.Model, labels: Any) -> int:
    if labels is not None:
        flat = np.asarray(labels)
        if flat.dtype.kind not in "iu" or not flat.size:
            raise ValueError(f"`labels` must be class indices. Received: {flat.dtype} of shape {flat.shape}.")
        return int(flat.max()) + 1
    shape = getattr(model, "output_shape", None)
    if isinstance(shape, tuple) and len(shape) == 2 and shape[-1] and shape[-1] > 1:
        return int(shape[-1])
    raise ValueError("`classes` must be given where neither `labels` nor the width of the model's output tells it. Received: None.")


def checked_labels(labels: Any, classes: int) -> np.ndarray:
    """Class indices as a vector."""
    flat = np.asarray(labels)
    flat = flat[:, 0] if flat.ndim == 2 and flat.shape[1] == 1 else flat
    if flat.ndim != 1 or flat.dtype.kind not in "iu" or (len(flat) and not (flat.min() >= 0 and flat.max() < classes)):
        raise ValueError(f"`labels` must be class indices from 0 to {classes - 1}. Received: {flat.dtype} of shape {flat.shape}.")
    return flat


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
