"""What did the analysis find? Numbers for each layer, as a table, a picture and JSON; and a plan from them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd import _files
from keras_kd.analysis.statistics import RemovalOrder

if TYPE_CHECKING:
    from keras_kd.analysis.plans import Plan


@dataclasses.dataclass(frozen=True)
class Response:
    """How a layer's output answers to noise on the model's input.

    Attributes:
        noise: size of the noise, relative to the root mean square of each sample.
        ratio: relative change of the output for a relative change of the input; 1: it changes as much as the input does.
        standard_error: of that mean over samples.
        explained: share of the change that the Jacobian predicts; 1 where the network is linear around its data; below 0 where the
            prediction is worse than none.
    """

    noise: float
    ratio: float
    standard_error: float
    explained: float


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """What was measured at the output of one layer; formulas in `linear_analysis`.

    Attributes:
        name: path of the layer; with `:0`, `:1`, ... where it is called several times.
        path: path of the layer.
        kind: its class.
        channels: width of its output's last axis.
        positions: other elements of its output, None where their number varies.
        macs: multiply-accumulates of all its calls for a sample, None where they are not known.
        parameters: number of its weights.
        responses: to each level of noise.
        gain: the response by the exact Jacobian.
        calls: how often the layer is called in a pass.
        fan_in: features that each position of a layer with a kernel reads; None without one, and where it has groups.
        linear: whether it is a linear map by what it is: a convolution without groups, or Dense, without activation.
        rows: number of rows that its moments are of.
        linearity: share of the output's variance that a linear map of the layer's input gives, adjusted for the number of features;
            None: not measured.
        linearity_cost: expected increase of the loss if that map stood for the layer.
        bypass: share of the output's variance that the layer's input gives as it is, where both have one shape: 1 for a layer that
            does nothing, below 0 where leaving it out is worse than a constant. None for others.
        bypass_cost: expected increase of the loss without the layer.
        window: positions that the map of `linearity` reads along each inner axis.
        linearity_reason: why it was not measured, or why it is a lower bound.
        redundancy: R^2 of each channel by the others, adjusted for their number.
        removal: in which order channels can go, by the variance that is lost.
        removal_by_cost: the same, each channel's variance multiplied by its `gradient`. Where layers that read the channels see
            zeros beyond the border, the square of their mean counts, too, by the share of such windows: it has no stand-in there.
        removal_by_cost_variance: the share of the variance that is lost in that order, as `removal.errors`.
        cost: expected loss without any of this information: all channels replaced by their means.
        spectrum: eigenvalues of the channels' covariance, falling.
        spectrum_cost: expected increase of the loss if each of these directions became its mean.
        effective_rank: of it.
        rank_99: number of directions with 99 % of the variance.
        weight_spectrum: singular values of the kernel, falling; None without one.
        weight_effective_rank: of their squares.
        weight_rank_99: number of directions with 99 % of the squares.
        taylor: of each channel.
        fisher: of each channel.
        gradient: of each channel.
        dead: channels that gave one and the same value at all positions of all samples.
        duplicates: groups of channels that are equal to the last bit, everywhere.
        proportional: groups of channels that are multiples of each other, up to a constant.
        accuracy: of a linear probe of the averaged output on held-out samples.
        accuracy_error: its standard error.
    """

    name: str
    path: str
    kind: str
    channels: int
    positions: int | None
    macs: int | None
    parameters: int
    responses: tuple[Response, ...]
    gain: float | None
    calls: int
    fan_in: int | None
    linear: bool
    rows: int
    linearity: float | None
    linearity_cost: float | None
    bypass: float | None
    bypass_cost: float | None
    window: tuple[int, ...] | None
    linearity_reason: str
    redundancy: tuple[float, ...]
    removal: RemovalOrder
    removal_by_cost: RemovalOrder
    removal_by_cost_variance: tuple[float, ...]
    cost: float
    spectrum: tuple[float, ...]
    spectrum_cost: tuple[float, ...]
    effective_rank: float
    rank_99: int
    weight_spectrum: tuple[float, ...] | None
    weight_effective_rank: float | None
    weight_rank_99: int | None
    taylor: tuple[float, ...]
    fisher: tuple[float, ...]
    gradient: tuple[float, ...]
    dead: tuple[int, ...]
    duplicates: tuple[tuple[int, ...], ...]
    proportional: tuple[tuple[int, ...], ...]
    accuracy: float | None
    accuracy_error: float | None


@dataclasses.dataclass(frozen=True)
class BlockAnalysis:
    """How linear a block of layers is.

    Attributes:
        first: its first layer.
        last: its last layer.
        linearity: share of the variance of the last one's output that a linear map of the first one's input gives.
        linearity_cost: expected increase of the loss if that map stood for the block.
        bypass: share of it that the first one's input gives as it is, where both have one shape.
        bypass_cost: expected increase of the loss without the block.
        rows: number of rows that its moments are of.
        members: paths of the layers in it.
        escapes: which layer outside reads what is inside of it, "" if none does.
        columns: number of features that the map of `linearity` reads.
        window: positions that it reads along each inner axis.
        reason: why it was not measured, or why it is a lower bound.
    """

    first: str
    last: str
    linearity: float | None
    linearity_cost: float | None
    bypass: float | None
    bypass_cost: float | None
    rows: int
    members: tuple[str, ...]
    escapes: str
    columns: int
    window: tuple[int, ...] | None
    reason: str


@dataclasses.dataclass(frozen=True)
class FlowAnalysis:
    """Who reads the channels of a convolution or Dense layer.

    Attributes:
        place: the last place before other layers mix them.
        readers: the layers that mix them.
        between: layers on the way with weights for each channel.
        padded: share of the readers' windows that show zeros beyond the border, where no constant stands for a channel.
        reason: why its channels cannot go alone, "" if they can.
    """

    place: str
    readers: tuple[str, ...]
    between: tuple[str, ...]
    padded: float
    reason: str


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """What `linear_analysis` found. `report["conv1"]` is the row of a layer.

    Attributes:
        model: name of the model.
        kind: "functional" (Sequential, too) or "subclassed".
        samples: number of samples that were seen.
        noise: levels of noise.
        layers: a row for each place, in the order in which the model computes.
        blocks: a row for each block that was asked for.
        flows: by the name of a layer with a kernel, where its channels go.
        macs: multiply-accumulates of the whole model for a sample, as far as they are known.
        parameters: number of weights of the whole model.
        skipped: what was left out, and why.
    """

    model: str
    kind: str
    samples: int
    noise: tuple[float, ...]
    layers: tuple[LayerAnalysis, ...]
    blocks: tuple[BlockAnalysis, ...]
    flows: dict[str, FlowAnalysis]
    macs: int
    parameters: int
    skipped: tuple[str, ...]

    def __getitem__(self, name: str) -> LayerAnalysis:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f'No layer "{name}" in the report. Layers: {", ".join(layer.name for layer in self.layers)}.')

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns everything as JSON, and writes it to `path` if there is one."""
        return write_json(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "LinearReport":
        """The report that `to_json` wrote.

        Args:
            source: its text, or the path of its file.

        Raises:
            ValueError: if it is not such a report.
        """
        report: LinearReport = read_json(source, "LinearReport", _as_report)
        return report

    def recommend(self, *, macs: float | None = None, parameters: float | None = None, tolerance: float | None = None) -> "Plan":
        """A plan: what to remove, in which order, at which expected cost. See `analysis.recommend`."""
        from keras_kd.analysis.plans import recommend

        return recommend(self, macs=macs, parameters=parameters, tolerance=tolerance)

    def table(self) -> str:
        """A table with a row for each layer and each block."""
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        headings = (
            "layer",
            "class",
            "channels",
            "response",
            "explained",
            "linearity",
            "redundant",
            "rank 99 %",
            "rank W",
            "dead",
            "equal",
            "cost",
        )
        for heading in (*headings, "probe, %") if self._has_probes else headings:
            made.add_column(heading, justify="left" if heading in ("layer", "class") else "right", no_wrap=True)
        for layer in self.layers:
            made.add_row(*self._cells(layer))
        for block in self.blocks:
            linearity = _shown(block.linearity, ".3f")
            made.add_row(f"{block.first} .. {block.last}", "block", "", "", "", linearity)
        console = Console(width=200, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            told = f"{self.samples:,} samples; noise {self.noise[0]:g}; response: output change for input change, both relative."
            console.print(told, highlight=False)
            if self.skipped:
                console.print(f"Left out: {'; '.join(self.skipped)}.", highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    @property
    def _has_probes(self) -> bool:
        return any(layer.accuracy is not None for layer in self.layers)

    def _cells(self, layer: LayerAnalysis) -> list[str]:
        response = layer.responses[0] if layer.responses else None
        cells = [
            layer.name,
            layer.kind,
            f"{layer.channels:,}",
            f"{response.ratio:.3f} ± {response.standard_error:.3f}" if response else "-",
            f"{response.explained:.3f}" if response else "-",
            ("≥ " if layer.linearity is not None and layer.linearity_reason else "") + _shown(layer.linearity, ".3f"),
            f"{np.mean(layer.redundancy):.3f}",
            str(layer.rank_99),
            _shown(layer.weight_rank_99, "d"),
            str(len(layer.dead)),
            str(sum(len(group) - 1 for group in layer.duplicates)),
            f"{layer.cost:.2g}",
        ]
        return [*cells, f"{100 * layer.accuracy:.1f}" if layer.accuracy is not None else "-"] if self._has_probes else cells

    def __str__(self) -> str:
        return self.table()

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the table and the picture as one page that needs nothing else."""
        from keras_kd.analysis.pictures import page

        _files.write_atomically(_files.checked_path(path), page(self).encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws a heat map of layers and measures, responses over noise, and errors over removed channels; writes a PNG."""
        from keras_kd.analysis.pictures import draw

        draw(self, path)


def write_json(report: Any, path: str | os.PathLike[str] | None) -> str:
    """A report or a plan as JSON, which is also written to `path` if there is one."""
    text = json.dumps(dataclasses.asdict(report), indent=1, allow_nan=False)
    if path is not None:
        _files.write_atomically(_files.checked_path(path), f"{text}\n".encode())
    return text


def read_json(source: Any, kind: str, make: Callable[[Any], Any]) -> Any:
    """What a report or a plan wrote: its text, or the path of its file."""
    is_path = isinstance(source, os.PathLike) or (isinstance(source, str) and source.strip()[:1] not in ("{", "[", ""))
    try:
        return make(json.loads(pathlib.Path(source).read_text() if is_path else source))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        message = f"`source` must be what `{kind}.to_json` wrote, or the path of its file. Received: what does not fit ({error})."
        raise ValueError(message) from error


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _as_report(found: dict[str, Any]) -> LinearReport:
    def order(one: dict[str, Any]) -> RemovalOrder:
        return RemovalOrder(tuple(one["keep"]), tuple(one["errors"]))

    def layer(one: dict[str, Any]) -> LayerAnalysis:
        values = {key: _tuples(value) for key, value in one.items()}
        values["responses"] = tuple(Response(**each) for each in one["responses"])
        values |= {key: order(one[key]) for key in ("removal", "removal_by_cost")}
        return LayerAnalysis(**values)

    values = {key: _tuples(value) for key, value in found.items()}
    values["layers"] = tuple(layer(one) for one in found["layers"])
    values["blocks"] = tuple(BlockAnalysis(**{key: _tuples(v) for key, v in one.items()}) for one in found["blocks"])
    values["flows"] = {name: FlowAnalysis(**{key: _tuples(v) for key, v in one.items()}) for name, one in found["flows"].items()}
    return LinearReport(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
