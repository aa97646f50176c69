"""What accuracy does a file of so many bytes have? Draws quantization.png from quantization.json, and trains nothing.

`python benchmarks/sizes.py`; `quantization.py` does it, too, after each of its parts. Every mark is the mean of the seeds, its line
goes from the worst seed to the best. What Keras' `quantize("int8")` gives has no LiteRT file: its mark is at the bytes of its
weights, the least that any file of it could have.
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

RESULT = pathlib.Path(__file__).parent / "results" / "quantization.json"
PICTURE = RESULT.with_suffix(".png")
OURS, OURS_ALONE, TFMOT, KERAS, GREY = "#1b6b58", "#69ac9c", "#cf6a3a", "#5e5ba8", "#4c566a"
# How each is drawn: name, colour, mark, size. A square has 80 % zeros; ours are filled, and smaller than what they may lie upon.
SHOWN = {
    "teacher": ("teacher, float", GREY, "*", 11),
    "float": ("student, float", GREY, "x", 8),
    "keras": ('Keras quantize("int8"): weights, no file', KERAS, "D", 8),
    "ptq": ("LiteRT: int8 after training", KERAS, "o", 13),
    "tfmot_qat": ("TF-MOT: QAT", TFMOT, "o", 9),
    "tfmot_pqat": ("TF-MOT: 80 % zeros, QAT", TFMOT, "s", 9),
    "qat": ("ours: QAT", OURS_ALONE, "o", 5),
    "pqat_two": ("ours: 80 % zeros, QAT", OURS_ALONE, "s", 5),
    "distilled_qat": ("ours: distilled, QAT", OURS, "o", 8),
    "road": ("ours: distilled, 80 % zeros, QAT, one fit", OURS, "s", 8),
}
FILLED = ("teacher", "qat", "pqat_two", "distilled_qat", "road")


class Point(NamedTuple):
    """One mark; accuracies in %.

    Attributes:
        accuracy: mean of the seeds.
        worst: the lowest of them.
        best: the highest.
        bytes: mean size of the file.
        gzip: mean size after `gzip -9`; None where it was not measured.
    """

    accuracy: float
    worst: float
    best: float
    bytes: float
    gzip: float | None


def points(result: dict[str, Any]) -> dict[str, Point]:
    """What is drawn of a result, by the names of `SHOWN`."""
    quality, found = result["quality"], {}
    teacher = 100 * quality["teacher"]["accuracy"]
    found["teacher"] = Point(teacher, teacher, teacher, quality["latency"]["teacher"]["bytes"], None)
    runs = [*quality["runs"], *({"method": "keras", "bytes": run["weight_bytes"]} | run for run in result["keras"]["runs"])]
    for method in SHOWN:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        accuracies = [100 * run["accuracy"] for run in mine]
        sizes, zipped = ([run[name] for run in mine if name in run] for name in ("bytes", "gzip"))
        mean = sum(accuracies) / len(mine)
        after = sum(zipped) / len(mine) if zipped else None
        found[method] = Point(mean, min(accuracies), max(accuracies), sum(sizes) / len(mine), after)
    return found


def fingerprint(found: dict[str, Point]) -> str:
    """Tells whether a picture shows these points: it is in the picture's metadata."""
    return hashlib.sha256(json.dumps([SHOWN, found]).encode()).hexdigest()


def draw(result: dict[str, Any], path: pathlib.Path = PICTURE) -> None:
    """Accuracy over bytes, of the files as they are and after gzip; on white, so that it reads on dark pages, too."""
    from matplotlib import figure, ticker

    found = points(result)
    drawing = figure.Figure((8.6, 3.7), layout="constrained", facecolor="white")
    panels = drawing.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for panel, size, ticks in zip(panels, ("bytes", "gzip"), ((10, 20, 50, 100, 200, 500), (5, 10, 20, 50)), strict=True):
        for method, point in found.items():
            name, color, mark, width = SHOWN[method]
            if (place := getattr(point, size)) is None:
                continue
            panel.vlines(place / 1000, point.worst, point.best, color=color, linewidth=1.2)
            face = color if method in FILLED else "none"
            style = {"color": color, "markerfacecolor": face, "markersize": width, "linestyle": "none"}
            panel.plot(place / 1000, point.accuracy, mark, label=name, **style)
        panel.set(xscale="log", xticks=ticks, xlim=(0.7 * ticks[0], 1.4 * ticks[-1]), ylim=(79, 93))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set(xlabel="file, 1,000 bytes (logarithmic)", ylabel="test accuracy, % (from 79)")
    panels[1].set(xlabel="after gzip, 1,000 bytes (logarithmic)")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    drawing.suptitle("Fashion-MNIST; one teacher, students of 3 seeds: their mean, and a line from worst to best", fontsize=10)
    drawing.savefig(path, dpi=110, metadata={"Description": fingerprint(found), "Software": None})


if __name__ == "__main__":
    draw(json.loads(RESULT.read_text()))
