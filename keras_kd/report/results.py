"""What did the comparison find? A row for each model, as a table, a picture, JSON and a page."""

import dataclasses
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from keras_kd import _files
from keras_kd.analysis.results import read_json, write_json


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """What one layer of a model, or one operator of a LiteRT file, holds.

    Attributes:
        name: path of the layer; for files, what they say of it.
        kind: its class, or the operator.
        parameters: number of its weights.
        nonzero_parameters: how many of them are not 0.
        bits: mean bits of its kernels' weights; for files, of all its weights.
        macs: multiply-accumulates of one sample; None where they are not known.
    """

    name: str
    kind: str
    parameters: int
    nonzero_parameters: int
    bits: float
    macs: int | None

    @property
    def sparsity(self) -> float:
        """Share of its weights that are 0, in [0, 1]; biases count, too."""
        return 1 - self.nonzero_parameters / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """What was measured of one model; None stands for what is not known.

    Attributes:
        name: as it was handed over.
        kind: "Keras", "quantized Keras" or "LiteRT".
        accuracy: share of right classes, in [0, 1].
        accuracy_interval: its 95 % interval (Wilson), for one decision a sample.
        loss: mean cross-entropy; mean squared error where outputs are numbers.
        agreement: share of the reference's classes; where outputs are numbers, R^2: 1 - sum (y - r)^2 / sum (r - mean r)^2.
        gained: samples that are right here, and wrong in the reference.
        lost: samples that are wrong here, and right in the reference.
        p_value: of McNemar's exact test: how likely so uneven a split of `gained` and `lost` is between equally good models.
        metrics: what was asked for besides, by name.
        parameters: number of weights.
        nonzero_parameters: how many of them are not 0.
        bits: mean bits of a weight in the LiteRT file.
        macs: multiply-accumulates of one sample.
        size: bytes of the LiteRT file.
        gzip_size: bytes of that file after gzip.
        latency: median milliseconds of one inference of one sample in LiteRT, on one thread.
        latency_range: its 10th and 90th percentiles.
        layers: those that hold weights.
        notes: what could not be measured, and why.
        sha256: digest of the LiteRT file's content.
    """

    name: str
    kind: str
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    loss: float | None
    agreement: float | None
    gained: int | None
    lost: int | None
    p_value: float | None
    metrics: dict[str, float | None]
    parameters: int
    nonzero_parameters: int
    bits: float | None
    macs: int | None
    size: int | None
    gzip_size: int | None
    latency: float | None
    latency_range: tuple[float, float] | None
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    sha256: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of weights that are 0, in [0, 1]."""
        return 1 - self.nonzero_parameters / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models side by side. `comparison["student"]` is the row of a model.

    Attributes:
        rows: one for each model, in the order in which they were handed over.
        reference: name of the model that the others are measured against.
        task: "classes", "binary" or "numbers": what outputs are taken for.
        samples: number of samples that were seen.
        histories: training curves, by model and by what was logged.
        versions: of the libraries.
    """

    rows: tuple[ModelRow, ...]
    reference: str
    task: str
    samples: int
    histories: dict[str, dict[str, tuple[float | None, ...]]]
    versions: dict[str, str]

    def __getitem__(self, name: str) -> ModelRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f'No model "{name}" in the comparison. Models: {", ".join(row.name for row in self.rows)}.')

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows."""
        return dataclasses.asdict(self)

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each model, as `pandas.DataFrame` takes them."""
        found = []
        for row in self.rows:
            values = {key: value for key, value in vars(row).items() if key not in ("layers", "metrics", "notes")}
            low, high = values.pop("accuracy_interval") or (None, None)
            fast, slow = values.pop("latency_range") or (None, None)
            values |= {"accuracy_low": low, "accuracy_high": high, "latency_low": fast, "latency_high": slow}
            found.append(values | {"sparsity": row.sparsity} | row.metrics)
        return found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns everything as JSON, and writes it to `path` if there is one."""
        return write_json(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Comparison":
        """The comparison that `to_json` wrote.

        Args:
            source: its text, or the path of its file.

        Raises:
            ValueError: if it is not such a comparison.
        """
        comparison: Comparison = read_json(source, "Comparison", _as_comparison)
        return comparison

    def summary(self) -> list[str]:
        """A sentence for each model but the reference: how much smaller, faster and less right it is."""
        base = self[self.reference]
        return [_sentence(row, base) for row in self.rows if row.name != self.reference]

    def table(self) -> str:
        """A table with a row for each model, and what follows from it."""
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        columns = columns_of(self)
        for column in columns:
            made.add_column(column.heading, justify="left" if column.is_text else "right", no_wrap=True)
        for row in self.rows:
            made.add_row(*(column.shown(row) for column in columns))
        # Wide enough for any name, and without what a terminal would be given: colours, [tags] in names.
        console = Console(
            file=io.StringIO(), width=1000, color_system=None, markup=False, emoji=False, highlight=False, force_jupyter=False
        )
        with console.capture() as captured:
            console.print(made)
            console.print(f"{self.samples:,} sample{'s' * (self.samples > 1)}; agreement with {self.reference}.")
            for line in [*self.summary(), *(f"{row.name}: {note}" for row in self.rows for note in row.notes)]:
                console.print(line)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that needs nothing else: charts, a table that sorts, the layers of each model, training curves."""
        from keras_kd.report._page import page

        _files.write_atomically(_files.checked_path(path), page(self).encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws accuracy over bytes with latencies, sparsity and bits of layers, and training curves; writes a PNG."""
        from keras_kd.report._pictures import draw

        draw(self, _files.checked_path(path))


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        key: for permanent links.
        heading: short.
        tip: what it means, in a sentence.
        value: what rows are sorted by; None where there is nothing.
        form: what is shown of it.
        is_text: whether it is text, which stands at the left.
    """

    key: str
    heading: str
    tip: str
    value: Callable[[ModelRow], Any]
    form: Callable[[ModelRow], str]
    is_text: bool = False

    def shown(self, row: ModelRow) -> str:
        """The text of a cell; a dash where nothing is known."""
        return "-" if self.value(row) is None else self.form(row)


def columns_of(comparison: Comparison) -> list[Column]:
    """The columns for which there is something to show."""
    reference = comparison.reference
    numbers = comparison.task == "numbers"
    agreed = "R² of the outputs against those of" if numbers else "Share of samples with the same class as"
    named = [_named(name) for name in comparison.rows[0].metrics]
    columns = [
        Column("model", "model", "Name of the model.", lambda r: r.name, lambda r: r.name, True),
        Column(
            "kind",
            "kind",
            "What was handed over: a Keras model, one that rounds, or a LiteRT file.",
            lambda r: r.kind,
            lambda r: r.kind,
            True,
        ),
        Column(
            "accuracy", "accuracy, %", "Share of right classes, with its 95 % interval (Wilson).", lambda r: r.accuracy, _accuracy
        ),
        Column(
            "loss",
            "loss",
            f"Mean {'squared error' if numbers else 'cross-entropy'} against the labels.",
            lambda r: r.loss,
            lambda r: f"{r.loss:.4g}",
        ),
        *named,
        Column(
            "agreement",
            "agreement" if numbers else "agreement, %",
            f"{agreed} {reference}.",
            lambda r: r.agreement,
            lambda r: f"{r.agreement:.4f}" if numbers else f"{100 * (r.agreement or 0):.1f}",
        ),
        Column(
            "p",
            "p",
            f"McNemar's exact test against {reference}: small where the difference in accuracy is no chance.",
            lambda r: r.p_value,
            lambda r: f"{r.p_value:.2g}",
        ),
        Column("parameters", "weights", "Number of weights.", lambda r: r.parameters, lambda r: f"{r.parameters:,}"),
        Column("sparsity", "zeros, %", "Share of weights that are 0.", lambda r: r.sparsity, lambda r: f"{100 * r.sparsity:.1f}"),
        Column("bits", "bits", "Mean bits of a weight in the LiteRT file.", lambda r: r.bits, lambda r: f"{r.bits:.3g}"),
        Column("macs", "MACs", "Multiply-accumulates of one sample.", lambda r: r.macs, lambda r: f"{r.macs:,}"),
        Column("size", "bytes", "Bytes of the LiteRT file.", lambda r: r.size, lambda r: f"{r.size:,}"),
        Column("gzip", "gzip", "Bytes of the LiteRT file after gzip.", lambda r: r.gzip_size, lambda r: f"{r.gzip_size:,}"),
        Column(
            "latency",
            "latency, ms",
            "Median time of one inference of one sample in LiteRT, on one thread.",
            lambda r: r.latency,
            lambda r: f"{r.latency:.3g}",
        ),
    ]
    return [column for column in columns if any(column.value(row) is not None for row in comparison.rows)]


def _named(name: str) -> Column:
    def value(row: ModelRow) -> float | None:
        return row.metrics[name]

    return Column(name, name, f"{name}: what was asked for in metrics.", value, lambda row: f"{row.metrics[name]:.4g}")


def _accuracy(row: ModelRow) -> str:
    text = f"{100 * (row.accuracy or 0):.1f}"
    if row.accuracy_interval is None:
        return text
    low, high = row.accuracy_interval
    return f"{text} ({100 * low:.1f} to {100 * high:.1f})"


def _sentence(row: ModelRow, base: ModelRow) -> str:
    parts = [_ratio(row.size, base.size, "smaller", "larger"), _ratio(row.latency, base.latency, "faster", "slower")]
    if row.accuracy is not None and base.accuracy is not None:
        points = 100 * (row.accuracy - base.accuracy)
        change = "as accurate" if round(points, 1) == 0 else f"{abs(points):.1f} points {'more' if points > 0 else 'less'} accurate"
        test = "" if row.p_value is None else f" ({row.gained} samples gained, {row.lost} lost, p = {row.p_value:.2g})"
        parts.append(change + test)
    elif row.agreement is not None:
        parts.append(f"agreement {row.agreement:.3f}")
    return f"{row.name} against {base.name}: {', '.join(part for part in parts if part)}."


def _ratio(value: float | None, base: float | None, less: str, more: str) -> str:
    if not value or not base:
        return ""
    if max(value / base, base / value) < 1.005:
        return f"neither {less} nor {more}"
    return f"{base / value:.3g} times {less}" if value < base else f"{value / base:.3g} times {more}"


def _as_comparison(found: dict[str, Any]) -> Comparison:
    def row(one: dict[str, Any]) -> ModelRow:
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}
        return ModelRow(**values | {"layers": tuple(LayerRow(**layer) for layer in one["layers"])})

    histories = {name: {key: tuple(curve) for key, curve in curves.items()} for name, curves in found["histories"].items()}
    return Comparison(**found | {"rows": tuple(row(one) for one in found["rows"]), "histories": histories})
