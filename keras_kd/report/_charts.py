"""How do numbers look as lines and bubbles in a page? SVG with names that a screen reader can say."""

import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

COLORS = 8  # classes c0 to c7 of the page's style
_WIDTH, _HEIGHT = 400, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 46
_LETTER = 6.7  # width of a letter


class Bubble(NamedTuple):
    """One bubble.

    Attributes:
        name: shown beside it.
        x: its place.
        y: its place.
        size: its area; None: a small one.
        color: number of its colour.
        tip: all that is known of it.
    """

    name: str
    x: float
    y: float
    size: float | None
    color: int
    tip: str


class Line(NamedTuple):
    """One line.

    Attributes:
        name: of what it shows.
        values: in order; None where there is none.
        color: number of its colour.
        is_dashed: whether it is broken.
    """

    name: str
    values: Sequence[float | None]
    color: int
    is_dashed: bool


def bubbles(found: Sequence[Bubble], *, title: str, x_title: str, y_title: str, y_form: Callable[[float], str]) -> str:
    """Bubbles over a logarithmic axis of bytes."""
    low, high = _logarithmic_range([one.x for one in found])
    bottom, top = _padded([one.y for one in found], 0.22)

    def across(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))

    def down(value: float) -> float:
        return _down(value, bottom, top)

    largest = max((one.size or 0 for one in found), default=0) or 1
    circles = [(across(one.x), down(one.y), 6 if one.size is None else max(4.0, 24 * (one.size / largest) ** 0.5)) for one in found]
    marks = [
        f'<circle class="c{one.color % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" tabindex="0" role="img" '
        f'aria-label="{html.escape(one.tip)}" data-tip="{html.escape(one.tip)}"/>'
        for one, (x, y, r) in sorted(zip(found, circles, strict=True), key=lambda pair: -pair[1][2])
    ]
    axes = _axes(
        [(across(v), bytes_text(v)) for v in logarithmic_ticks(low, high)], [(down(v), y_form(v)) for v in ticks(bottom, top)]
    )
    desc = "; ".join(one.tip for one in found)
    return _svg(title, desc, axes + _axis_titles(x_title, y_title) + "".join(marks) + "".join(_labels(found, circles)))


def lines(found: Sequence[Line], *, title: str, x_title: str, y_title: str) -> str:
    """Lines over epochs."""
    values = [value for line in found for value in line.values if value is not None]
    bottom, top = _padded(values, 0.05)
    longest = max(len(line.values) for line in found)

    def across(place: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place / (longest - 1) if longest > 1 else 0.5)

    drawn = []
    for line in found:
        points = [(across(i), _down(v, bottom, top)) for i, v in enumerate(line.values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = " dashed" if line.is_dashed else ""
        drawn.append(
            f'<polyline class="c{line.color % COLORS}{dashes}" points="{path}"><title>{html.escape(line.name)}</title></polyline>'
        )
        if len(points) == 1:
            drawn.append(f'<circle class="c{line.color % COLORS}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>')
    epochs = [(across(v - 1), f"{v:g}") for v in ticks(1, longest) if v == round(v)] or [(across(0), "1")]
    axes = _axes(epochs, [(_down(v, bottom, top), f"{v:g}") for v in ticks(bottom, top)])
    last = [(line.name, next((v for v in reversed(line.values) if v is not None), None)) for line in found]
    desc = "At the end: " + "; ".join(f"{name} {value:.4g}" for name, value in last if value is not None)
    return _svg(title, desc, axes + _axis_titles(x_title, y_title) + "".join(drawn))


def _svg(title: str, desc: str, inside: str) -> str:
    label = html.escape(f"{title}. {desc}.")
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="{label}">{inside}</svg>'


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path class="axis" d="M{_LEFT},{_TOP}V{floor}H{right}"/>']
    for y, text in y_ticks:
        parts.append(
            f'<path class="grid" d="M{_LEFT},{y:.1f}H{right}"/><text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{text}</text>'
        )
    for x, text in x_ticks:
        parts.append(
            f'<path class="grid" d="M{x:.1f},{_TOP}V{floor}"/><text x="{x:.1f}" y="{floor + 17}" class="middle">{text}</text>'
        )
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _axis_titles(x_title: str, y_title: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<g aria-hidden="true"><text x="{center}" y="{_HEIGHT - 8}" class="middle">{html.escape(x_title)}</text>'
        f'<text transform="translate(13 {middle}) rotate(-90)" class="middle">{html.escape(y_title)}</text></g>'
    )


def _labels(found: Sequence[Bubble], circles: Sequence[tuple[float, float, float]]) -> Iterator[str]:
    """A name beside each bubble, where it covers no other name; left out where there is no such place."""
    taken: list[tuple[float, float, float, float]] = []
    around = [(x - r, y - r, x + r, y + r) for x, y, r in circles]
    for index, (one, (x, y, r)) in enumerate(zip(found, circles, strict=True)):
        text = one.name if len(one.name) <= 22 else one.name[:21] + "…"
        width = _LETTER * len(text)
        steps = list(itertools.chain.from_iterable((d, -d) for d in range(8, 65, 8)))
        centred = min(max(x - width / 2, _LEFT + 2), _WIDTH - width - 2)
        corners = [(x + r + 4, y), (x - r - 4 - width, y), (centred, y - r - 10), (centred, y + r + 10)]
        corners += [(left, y + step) for step in steps for left in (x + r + 4, x - r - 4 - width)]
        boxes = [(left, middle - 7, left + width, middle + 7) for left, middle in corners]
        inside = [box for box in boxes if box[0] > _LEFT and box[2] < _WIDTH and box[1] > 0 and box[3] < _HEIGHT - _BOTTOM]
        others = taken + around[:index] + around[index + 1 :]
        free = [box for box in inside if not any(_overlap(box, other) for other in others)]
        free = free or [box for box in inside if not any(_overlap(box, other) for other in taken)]
        if free:
            taken.append(free[0])
            left, middle = free[0][0], free[0][1] + 7
            yield f'<text class="name" aria-hidden="true" x="{left:.1f}" y="{middle + 4:.1f}">{html.escape(text)}</text>'


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _down(value: float, bottom: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = share * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _logarithmic_range(values: Sequence[float]) -> tuple[float, float]:
    room = max((max(values) / min(values)) ** 0.18, 1.6)
    return min(values) / room, max(values) * room


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Round numbers, three or more where there are so many, at most nine."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 9)] if found else found


def bytes_text(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def percent(value: Any) -> str:
    """A share as a percentage."""
    return f"{round(100 * value, 6):g} %"
