"""How do the groups of channels look? One row for each, with what makes them, how many there are, and who reads them."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_kd.surgery.graph import ChannelGraph


def draw(graph: "ChannelGraph", path: str | os.PathLike[str]) -> None:
    """Writes a PNG of a graph of channels to `path`: layers from top to bottom, groups from left to right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in graph.groups for name in (*group.makers, *group.carriers, *group.readers)))
    stay = list(dict.fromkeys(pin.layer.removesuffix(":heads") for pin in graph.pinned))
    names += [name for name in stay if name not in names]
    rows = {name: row for row, name in enumerate(names)}
    figure = Figure(figsize=(max(6.0, 0.3 * len(graph.groups) + 4), max(3.0, 0.22 * len(names) + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for column, group in enumerate(graph.groups):
        used = [rows[name] for name in (*group.makers, *group.carriers, *group.readers)]
        axes.plot([column, column], [min(used), max(used)], color="0.8", zorder=1)
        for role, color, marker in (("makers", "tab:blue", "s"), ("carriers", "0.5", "."), ("readers", "tab:orange", "v")):
            where = [rows[name] for name in getattr(group, role)]
            axes.scatter([column] * len(where), where, color=color, marker=marker, s=28, zorder=2)
    for name in stay:
        axes.scatter([-1], [rows[name]], color="tab:red", marker="x", s=28, zorder=2)
    for label, color, marker in (
        ("makes them", "tab:blue", "s"),
        ("carries them", "0.5", "."),
        ("reads them", "tab:orange", "v"),
        ("must stay", "tab:red", "x"),
    ):
        axes.scatter([], [], color=color, marker=marker, label=label)
    axes.set_xticks(range(len(graph.groups)), [f"{group.channels}" for group in graph.groups], fontsize=7, rotation=90)
    axes.set_xlabel("groups, by the number of channels that can go", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, -0.04), ncols=4)
    figure.savefig(path, dpi=110)
