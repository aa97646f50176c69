"""How does a comparison look on paper? Accuracy over bytes, the layers of each model, and curves of training."""

import io
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd import _files
from keras_kd.report import _charts

if TYPE_CHECKING:
    from keras_kd.report.results import Comparison, ModelRow

_COLORS = ("#3a6fb0", "#b5482f", "#2e7d5b", "#8a5aa8", "#8f6b00", "#b03a78", "#1f7a8c", "#5f6672")
_CURVES = 2


def draw(comparison: "Comparison", path: pathlib.Path) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = _logged(comparison)
    figure = Figure(figsize=(13, 9.5 if logged else 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper: Any = figure.subfigures(2, 1, height_ratios=(5.2, 4.3)) if logged else [figure]
    bubbles, sparsity, bits = upper[0].subplots(1, 3, width_ratios=(1.5, 1, 1))
    _draw_bubbles(bubbles, comparison)
    _draw_layers(sparsity, comparison, "share of weights that are 0, %", lambda layer: 100 * layer.sparsity)
    _draw_layers(bits, comparison, "bits of a weight", lambda layer: layer.bits)
    if logged:
        for axes, key in zip(np.atleast_1d(upper[1].subplots(1, len(logged))), logged, strict=True):
            _draw_curve(axes, comparison, key)
    handles, names = bubbles.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside upper center", ncols=min(4, len(names)), fontsize=9, markerscale=0.5, frameon=False
        )
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    _files.write_atomically(path, content.getvalue())


def _plain(name: str) -> str:
    """A name as it is: matplotlib reads `$...$` as formulas, and leaves names with `_` before them out of legends."""
    text = name.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _quality(row: "ModelRow") -> float | None:
    return row.agreement if row.accuracy is None else row.accuracy


def _draw_bubbles(axes: Any, comparison: "Comparison") -> None:
    largest = max((row.latency or 0 for row in comparison.rows), default=0)
    scale = 1 if comparison.task == "numbers" else 100
    for index, row in enumerate(comparison.rows):
        quality = _quality(row)
        if row.size is None or quality is None:
            continue
        area = max(30.0, 900 * row.latency / largest) if row.latency and largest else 90.0
        axes.scatter([row.size], [scale * quality], s=area, color=_color(index), alpha=0.6, label=_plain(row.name))
        if row.accuracy_interval is not None:
            axes.vlines(row.size, *(scale * bound for bound in row.accuracy_interval), color=_color(index), lw=1)
    axes.set_xscale("log")
    axes.margins(0.2)
    places = _charts.logarithmic_ticks(*axes.get_xlim())
    axes.set_xticks(places, [_charts.bytes_text(place) for place in places], fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("bytes of the LiteRT file" + ("; area: latency" if largest else ""))
    known = any(row.accuracy is not None for row in comparison.rows)
    axes.set_ylabel("accuracy, %; line: 95 % interval" if known else f"agreement with {_plain(comparison.reference)}")
    axes.grid(alpha=0.3)


def _draw_layers(axes: Any, comparison: "Comparison", title: str, value: Any) -> None:
    """Layers from the first (0) to the last (1), as models have other numbers of them; the first model's line is the widest."""
    for index, row in enumerate(comparison.rows):
        places = np.linspace(0, 1, len(row.layers)) if len(row.layers) > 1 else np.array([0.5] * len(row.layers))
        axes.plot(
            places, [value(layer) for layer in row.layers], "o-", ms=4, lw=max(1.5, 6 - index), color=_color(index), alpha=0.8
        )
    axes.set_xticks([0, 1], ["first layer", "last"])
    axes.set_ylabel(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _logged(comparison: "Comparison") -> list[str]:
    """What curves are drawn of: the first two things that were logged."""
    keys = dict.fromkeys(key.removeprefix("val_") for curves in comparison.histories.values() for key in curves)
    return list(keys)[:_CURVES]


def _draw_curve(axes: Any, comparison: "Comparison", key: str) -> None:
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    for name, curves in comparison.histories.items():
        for logged, style in ((key, "--"), (f"val_{key}", "-")):
            values = [np.nan if value is None else value for value in curves.get(logged, ())]
            axes.plot(range(1, len(values) + 1), values, style, color=_color(places[name]), lw=1 if style == "--" else 2)
    axes.set_xlabel("epoch; solid: validation data, dashed: training data")
    axes.set_ylabel(_plain(key))
    axes.grid(alpha=0.3)
