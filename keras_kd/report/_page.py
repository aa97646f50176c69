"""How does a comparison look in a browser? A page with charts, a table that sorts, the layers, and curves of training."""

import html
import json
from typing import TYPE_CHECKING, Any

from keras_kd import _pages
from keras_kd.report import _charts
from keras_kd.report._assets import SCRIPT, STYLE
from keras_kd.report.results import columns_of

if TYPE_CHECKING:
    from keras_kd.report.results import Column, Comparison, LayerRow, ModelRow

_LAYER_HEADS = "".join(
    f'<th scope="col"{kind}>{name}</th>'
    for name, kind in (
        *(("layer", ' class="text"'), ("kind", ' class="text"'), ("weights", ""), ("bits", "")),
        *(("zeros", ' class="text"'), ("MACs", "")),
    )
)
_CURVES = 4  # charts of training that are open at first


def page(comparison: "Comparison") -> str:
    """The page, as text. All that users named is escaped."""
    parts = [
        _intro(comparison),
        _bubbles(comparison),
        _table(comparison),
        _layers(comparison),
        _curves(comparison),
        _meanings(comparison),
    ]
    return _pages.document("Models side by side", "\n".join(part for part in parts if part), style=STYLE, script=SCRIPT)


def _intro(comparison: "Comparison") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    count = len(comparison.rows)
    against = f", measured against {comparison.reference}" if count > 1 else ""
    told = f"{count} model{'s' * (count > 1)} on {comparison.samples:,} samples{against}. {versions}."
    found = "".join(f"<li>{html.escape(line)}</li>" for line in comparison.summary())
    notes = "".join(f"<li>{html.escape(f'{row.name}: {note}')}</li>" for row in comparison.rows for note in row.notes)
    lists = (f"<ul>{found}</ul>" if found else "") + (f"<h2>Not measured</h2><ul>{notes}</ul>" if notes else "")
    return f'<p class="soft">{html.escape(told)}</p>{lists}'


def _quality(row: "ModelRow") -> float | None:
    return row.agreement if row.accuracy is None else row.accuracy


def _bubbles(comparison: "Comparison") -> str:
    shown = [(row, index) for index, row in enumerate(comparison.rows) if row.size and _quality(row) is not None]
    if not shown:
        return ""
    timed = any(row.latency for row, _ in shown)
    what = "accuracy" if shown[0][0].accuracy is not None else f"agreement with {comparison.reference}"
    title = f"{what[0].upper()}{what[1:]} against bytes" + (", area of bubbles: latency" if timed else "")
    found = [
        _charts.Bubble(
            row.name, float(row.size or 0), _quality(row) or 0.0, row.latency if timed else None, index, _tip(row, comparison)
        )
        for row, index in shown
    ]
    chart = _charts.bubbles(
        found,
        title=title,
        x_title="bytes of the LiteRT file",
        y_title=what,
        y_form=(lambda value: f"{value:g}") if comparison.task == "numbers" else _charts.percent,
    )
    return f"<h2>{html.escape(title)}</h2>{chart}"


def _tip(row: "ModelRow", comparison: "Comparison") -> str:
    keys = ("accuracy", "agreement", "size", "latency")
    cells = [f"{c.heading} {c.shown(row)}" for c in columns_of(comparison) if c.key in keys and c.value(row) is not None]
    return f"{row.name}: {', '.join(cells)}"


def _table(comparison: "Comparison") -> str:
    columns = columns_of(comparison)
    heads = "".join(_head(column, index) for index, column in enumerate(columns))
    rows = "".join(_row(row, index, columns) for index, row in enumerate(comparison.rows))
    return (
        '<h2 id="table-title">All numbers</h2><p class="soft">Headings sort.</p>'
        '<p id="sorted" class="hidden" role="status"></p>'
        '<div class="scroll" role="region" aria-labelledby="table-title" tabindex="0">'
        f'<table id="models"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _head(column: "Column", index: int) -> str:
    kind = ' class="text"' if column.is_text else ""
    return (
        f'<th scope="col" aria-sort="none" data-key="{html.escape(column.key)}"{kind}><button type="button" '
        f'aria-describedby="tip{index}" data-tip="{html.escape(column.tip)}">{html.escape(column.heading)}</button></th>'
    )


def _row(row: "ModelRow", index: int, columns: list["Column"]) -> str:
    swatch = f'<span class="swatch c{index % _charts.COLORS}"></span>'
    cells = [f'<th scope="row" data-value="{html.escape(row.name)}">{swatch}{html.escape(row.name)}</th>']
    for column in columns[1:]:
        value = column.value(row)
        kept = "" if value is None else value if column.is_text else json.dumps(value)
        kind = ' class="text"' if column.is_text else ""
        cells.append(f'<td data-value="{html.escape(str(kept))}"{kind}>{html.escape(column.shown(row))}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _layers(comparison: "Comparison") -> str:
    parts = []
    for index, row in enumerate(comparison.rows):
        if not row.layers:
            continue
        lines = "".join(_layer(layer, index) for layer in row.layers)
        name = html.escape(row.name)
        parts.append(
            f'<details><summary><span class="swatch c{index % _charts.COLORS}"></span>{name}: {len(row.layers)} layers with '
            f'weights</summary><div class="scroll" role="region" tabindex="0" aria-label="Layers of {name}"><table>'
            f"<thead><tr>{_LAYER_HEADS}</tr></thead><tbody>{lines}</tbody></table></div></details>"
        )
    return f"<h2>Layers</h2>{''.join(parts)}" if parts else ""


def _layer(layer: "LayerRow", index: int) -> str:
    share = f"{100 * layer.sparsity:.1f}"
    macs = "-" if layer.macs is None else f"{layer.macs:,}"
    return (
        f'<tr><th scope="row">{html.escape(layer.name)}</th><td class="text">{html.escape(layer.kind)}</td>'
        f'<td>{layer.parameters:,}</td><td>{layer.bits:.3g}</td><td class="zeros"><span class="bar c{index % _charts.COLORS}">'
        f'<span style="width:{share}%"></span></span>{share} %</td><td>{macs}</td></tr>'
    )


def _curves(comparison: "Comparison") -> str:
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    logged = dict.fromkeys(key.removeprefix("val_") for curves in comparison.histories.values() for key in curves)
    charts = [chart for key in logged if (chart := _curve(comparison, key, places))]
    if not charts:
        return ""
    rest = "".join(charts[_CURVES:])
    more = f'<details><summary>More curves</summary><div class="charts">{rest}</div></details>' if rest else ""
    legend = "".join(
        f'<li><span class="swatch c{places[name] % _charts.COLORS}"></span>{html.escape(name)}</li>'
        for name in comparison.histories
    )
    return (
        '<h2>Training</h2><p class="soft">Solid: validation data. Dashed: training data.</p>'
        f'<ul class="legend">{legend}</ul><div class="charts">{"".join(charts[:_CURVES])}</div>{more}'
    )


def _curve(comparison: "Comparison", key: str, places: dict[str, int]) -> str:
    found: list[Any] = []
    for name, curves in comparison.histories.items():
        for logged, told in ((key, "training"), (f"val_{key}", "validation")):
            if any(value is not None for value in curves.get(logged, ())):
                found.append(_charts.Line(f"{name}, {told}", curves[logged], places[name], told == "training"))
    if not found:
        return ""
    chart = _charts.lines(found, title=f"{key} by epoch", x_title="epoch", y_title=key)
    return f"<section><h3>{html.escape(key)}</h3>{chart}</section>"


def _meanings(comparison: "Comparison") -> str:
    entries = "".join(
        f'<dt>{html.escape(column.heading)}</dt><dd id="tip{index}">{html.escape(column.tip)}</dd>'
        for index, column in enumerate(columns_of(comparison))
    )
    return f"<h2>What the columns mean</h2><dl>{entries}</dl>"
