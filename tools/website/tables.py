"""How does a result of a benchmark read? Any JSON as headings and Markdown tables."""

from collections.abc import Iterator
from typing import Any

_SETTING = {"data", "date", "machine", "settings", "teacher", "versions"}


def of(result: dict[str, Any]) -> str:
    """Writes a result as Markdown.

    Args:
        result: what a benchmark wrote; medians with `median_low` and `median_high` are shown as one value with its interval.

    Returns:
        Headings and tables.
    """
    return "\n".join(_section("", result, 2)) + "\n"


def _section(title: str, value: Any, level: int) -> Iterator[str]:
    if title:
        yield f"\n{'#' * min(level, 5)} {title[0].upper()}{title[1:]}\n"
    if isinstance(value, list):
        yield from _rows([(str(number), row) for number, row in enumerate(value, 1)], numbered=True)
        return
    value = dict(sorted(value.items(), key=lambda item: item[0] in _SETTING))  # what came out comes first
    flat = {key: inner for key, inner in value.items() if _is_cell(inner)}
    deep = {key: inner for key, inner in value.items() if key not in flat}
    if flat:
        yield "| | |\n|---|---|"
        yield from (f"| {_words(key)} | {_cell(inner)} |" for key, inner in flat.items())
        yield ""
    if len(deep) > 1 and all(_is_row(inner) for inner in deep.values()) and _alike(list(deep.values())):
        yield from _rows(list(deep.items()))
        return
    for key, inner in deep.items():
        yield from _section(_words(key), inner, level + 1 if title else level)


def _rows(rows: list[tuple[str, Any]], *, numbered: bool = False) -> Iterator[str]:
    if not all(isinstance(row, dict) for _, row in rows):
        yield "| | |\n|---|---|"
        yield from (f"| {name} | {_cell(row)} |" for name, row in rows)
        return
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    keys = [key for key in keys if all(_is_cell(row.get(key)) for _, row in rows)]  # what is nested stays in the file
    head = keys if numbered else ["", *keys]
    yield "| " + " | ".join(map(_words, head)) + " |\n|" + "---|" * len(head)
    for name, row in rows:
        cells = [_cell(row.get(key, "")) for key in keys]
        yield "| " + " | ".join(cells if numbered else [_words(name), *cells]) + " |"
    yield ""


def _alike(rows: list[dict[str, Any]]) -> bool:
    """Whether rows have so many keys in common that one table shows them."""
    keys = {key for row in rows for key in row}
    return len(keys) == max(map(len, rows)) or len(keys) <= 1.5 * min(map(len, rows))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_cell(inner) for inner in value.values())


def _is_cell(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or "median_low" in value or set(value) == {"mean", "std"}
    return not isinstance(value, list) or (len(value) <= 12 and not any(isinstance(inner, (dict, list)) for inner in value))


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median_low" in value:
        return f"{_cell(value['median'])} ({_cell(value['median_low'])} to {_cell(value['median_high'])})"
    if isinstance(value, dict) and "mean" in value:
        return f"{_cell(value['mean'])} ± {_cell(value['std'])}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _words(key: str) -> str:
    return key.replace("_", " ").replace("|", "\\|")
