"""How does an analysis look? A heat map of layers and measures, and curves of responses and of removal."""

import base64
import html
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd import _pages

if TYPE_CHECKING:
    from keras_kd.analysis.results import LinearReport

_MEASURES = ("response", "explained", "linearity", "redundancy", "rank 99 %\n/ channels", "cost\n/ largest", "probe\naccuracy")


def draw(report: "LinearReport", path: str | os.PathLike[str]) -> None:
    """Writes a PNG of a report to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = len(report.layers)
    figure = Figure(figsize=(13, max(5.0, 0.28 * layers + 2)), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left, right = halves
    heat, curves = left.subplots(), right.subplots(2, 1)
    _draw_heat(heat, report)
    _draw_responses(curves[0], report)
    _draw_removals(curves[1], report)
    figure.suptitle(f"Linear analysis of {report.model}: {report.samples:,} samples", fontsize=11)
    figure.savefig(path, dpi=130)


def page(report: "LinearReport") -> str:
    """A page of HTML with the table, and the picture inside."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "picture.png"
        draw(report, file)
        picture = base64.b64encode(file.read_bytes()).decode()
    body = (
        f'<img alt="Heat map of layers and measures, responses and removal errors" src="data:image/png;base64,{picture}">\n'
        f"<pre>{html.escape(report.table())}</pre>"
    )
    return _pages.document(f"Linear analysis of {report.model}", body)


def _draw_heat(axes: Any, report: "LinearReport") -> None:
    largest = max(layer.cost for layer in report.layers) or 1.0
    values = np.full((len(report.layers), len(_MEASURES)), np.nan)
    for row, layer in enumerate(report.layers):
        response = layer.responses[0] if layer.responses else None
        found = (
            response and response.ratio,
            response and response.explained,
            layer.linearity,
            float(np.mean(layer.redundancy)),
            layer.rank_99 / layer.channels,
            layer.cost / largest,
            layer.accuracy,
        )
        values[row] = [np.nan if one is None else one for one in found]
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if np.isfinite(value):
                color = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(_MEASURES)), _MEASURES, fontsize=8)
    axes.set_yticks(range(len(report.layers)), [layer.name for layer in report.layers], fontsize=8)
    axes.xaxis.tick_top()


def _draw_responses(axes: Any, report: "LinearReport") -> None:
    shown = [layer for layer in report.layers if layer.responses]
    if len(report.noise) > 1:
        for index in np.unique(np.linspace(0, len(shown) - 1, 6).astype(int)) if shown else ():
            layer = shown[index]
            axes.plot(report.noise, [one.explained for one in layer.responses], marker="o", ms=3, label=layer.name)
        axes.set_xscale("log")
        axes.set_xlabel("noise, relative to each sample", fontsize=8)
        axes.set_ylabel("share of the change that\nthe Jacobian explains", fontsize=8)
        axes.set_ylim(max(-0.1, axes.get_ylim()[0]), 1.02)
        axes.legend(fontsize=7)
    else:
        places = range(len(shown))
        axes.errorbar(
            places,
            [one.responses[0].ratio for one in shown],
            yerr=[one.responses[0].standard_error for one in shown],
            fmt="o-",
            ms=3,
        )
        axes.plot(places, [one.gain for one in shown], "x", color="0.3", label="exact Jacobian")
        axes.set_xlabel("layers in order", fontsize=8)
        axes.set_ylabel(f"response to noise {report.noise[0]:g}", fontsize=8)
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_removals(axes: Any, report: "LinearReport") -> None:
    known = {flow.place for flow in report.flows.values() if not flow.reason}
    shown = [layer for layer in report.layers if layer.name in known] or list(report.layers)
    for layer in shown[:8]:
        errors = np.asarray(layer.removal.errors[::-1])
        axes.plot(np.arange(len(errors)) / layer.channels, np.maximum(errors, 1e-6), label=layer.name)
    axes.set_yscale("log")
    axes.set_xlabel("share of channels removed", fontsize=8)
    axes.set_ylabel("share of the variance that the kept\nones do not give", fontsize=8)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
