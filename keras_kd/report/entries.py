"""What did training over several seeds give? A table and a picture of models side by side."""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Sequence
from typing import Any

_COLORS = ("#4c566a", "#bf616a", "#2e7d6b", "#5e81ac", "#b48ead")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model, or one way of training measured over several seeds.

    Attributes:
        name: what it is.
        accuracies: accuracy of each seed, in [0, 1].
        parameters: number of weights that are not 0.
        size: bytes of the LiteRT file.
        gzip_size: bytes of that file after gzip.
        latency: median milliseconds of one inference.
    """

    name: str
    accuracies: Sequence[float]
    parameters: int | None = None
    size: int | None = None
    gzip_size: int | None = None
    latency: float | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1); 0 for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Gain:
    """What one way of training gives over another, seed by seed.

    Attributes:
        differences: accuracy with minus accuracy without, per seed.
    """

    differences: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.fmean(self.differences)

    @property
    def spread(self) -> float:
        """Standard deviation of the differences (n - 1)."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else 0.0

    @property
    def is_clear(self) -> bool:
        """Whether there are several seeds, every one gains, and the mean is above twice its standard error."""
        error = self.spread / len(self.differences) ** 0.5
        return len(self.differences) > 1 and min(self.differences) > 0 and self.mean > 2 * error

    def __str__(self) -> str:
        points = f"{100 * self.mean:+.1f} ± {100 * self.spread:.1f} points over {len(self.differences)} seeds"
        if len(self.differences) == 1:
            return f"One seed tells little: {100 * self.mean:+.1f} points."
        each = ", ".join(f"{100 * difference:+.1f}" for difference in self.differences)
        if self.is_clear:
            return f"Distillation helps here: {points} ({each})."
        return f"Distillation shows no clear gain here: {points} ({each})."


def table(entries: Sequence[Entry], *, title: str = "") -> Any:
    """Returns a `rich.table.Table` of the entries.

    Example:

    >>> rows = keras_kd.report.table([keras_kd.report.Entry("student", [0.9, 0.92], parameters=1386)])
    >>> rows.row_count
    1
    """
    from rich.table import Table

    result = Table(title=title or None, title_justify="left")
    for heading in ("model", "accuracy\n%", "weights\nnot 0", "LiteRT\nbytes", "gzip\nbytes", "latency\nms"):
        result.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for entry in entries:
        accuracy = f"{100 * entry.mean:.1f}" + (f" ± {100 * entry.spread:.1f}" if len(entry.accuracies) > 1 else "")
        latency = "" if entry.latency is None else f"{entry.latency:.3f}"
        numbers = ("" if n is None else f"{n:,}" for n in (entry.parameters, entry.size, entry.gzip_size))
        result.add_row(entry.name, accuracy, *numbers, latency)
    return result


def plot(entries: Sequence[Entry], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws accuracies, with a dot per seed, and accuracy over file size; writes a PNG to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: drawing a report changes no backend and no global state.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (entry, color) in enumerate(zip(entries, itertools.cycle(_COLORS), strict=False)):
        # Points, not bars: a bar that does not start at 0 shows a wrong ratio.
        left.errorbar(100 * entry.mean, index, xerr=100 * entry.spread or None, fmt="D", ms=9, capsize=5, color=color)
        left.plot([100 * a for a in entry.accuracies], [index + 0.22] * len(entry.accuracies), "o", color=color, ms=4, alpha=0.6)
        left.annotate(f"{100 * entry.mean:.1f}", (100 * entry.mean, index), (0, 9), textcoords="offset points", ha="center")
    left.set_yticks(range(len(entries)), [entry.name for entry in entries])
    left.set_ylim(len(entries) - 0.4, -0.6)
    left.set_xlim(100 * min(min(entry.accuracies) for entry in entries) - 5, 102)
    left.set_xlabel("test accuracy, %\ndiamond: mean, whisker: standard deviation, dot: seed", fontsize=9)
    left.grid(axis="x", alpha=0.3)
    _plot_sizes(right, entries)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _plot_sizes(axes: Any, entries: Sequence[Entry]) -> None:
    sized = [(e, color) for e, color in zip(entries, itertools.cycle(_COLORS), strict=False) if e.size is not None]
    means = [100 * entry.mean for entry, _ in sized]
    lowest, gap = 200.0, 0.07 * (max(means) - min(means) + 1e-6)
    for entry, color in sorted(sized, key=lambda pair: -pair[0].mean):
        point = (entry.size / 1024, 100 * entry.mean)  # type: ignore[operator]
        lowest = min(point[1], lowest - gap)  # labels of close points stand below each other
        axes.plot(*point, "D", color=color, ms=9)
        axes.annotate(entry.name, point, (point[0] * 1.3, lowest), va="center", fontsize=9, color=color)
    axes.set_xscale("log")
    axes.margins(x=0.45, y=0.15)
    axes.set_xlabel("LiteRT file, KiB", fontsize=9)
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.grid(alpha=0.3)
