"""What is left of a network's accuracy when it loses channels: without training, and after a few epochs?

The claims, on a convolutional network for Fashion-MNIST (161,514 weights; three seeds), from 1,000 unlabelled images and without
any training: channels chosen and refitted by `prune_channels` cost at most 0.6 points at half of the multiply-accumulates and 2.5
at a quarter; five epochs of distillation bring a quarter to within 0.5 points of the original. What does not hold is printed.

Parts, each stored run by run in `runs/surgery`, so that the next start goes on where this one ended:

    python benchmarks/surgery.py            # accuracy over multiply-accumulates, without training: about 10 minutes
    python benchmarks/surgery.py --tuning   # fine-tuning and distillation of what is left: about an hour
    python benchmarks/surgery.py --latency  # the time of one inference of the LiteRT files, in turn
    python benchmarks/surgery.py --seconds  # the time of one prune_channels: on a machine that does nothing else
    python benchmarks/surgery.py --torch P  # Torch-Pruning on the same weights; P: a Python with what surgery_torch.py names

Every finished part is written to benchmarks/results/surgery.json, drawn to surgery.png, and its table put into docs/surgery.md.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import rich
import rich.table

import keras_kd
from keras_kd import export, profile, surgery

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "surgery.json"
PICTURE = RESULT.with_suffix(".png")
LATENCY_PICTURE = RESULT.with_name("surgery_latency.png")
PAGE = ROOT / "docs" / "surgery.md"
MARKERS = ("<!-- surgery:begin -->", "<!-- surgery:end -->")
CACHE = ROOT / "runs" / "surgery"
SEEDS = (0, 1, 2)
SHARES = (0.85, 0.7, 0.5, 0.35, 0.25)
IMAGES = 1000  # unlabelled, of the training set
TEACHER = {"epochs": 10, "batch_size": 128, "learning_rate": 2e-3}
TUNING = {"epochs": 5, "batch_size": 128, "learning_rate": 2e-3, "temperature": 4.0, "student_loss_weight": 0.3}
LABELLED = 10_000  # images with labels that the networks are tuned on, of the training set; ALL of them where the claim says so
ALL = "distilled on all images"
FITS = {"together": True, "refit": "layers", "weights": False}
METHODS: dict[str, dict[str, Any]] = {
    "redundancy": {},
    "redundancy, same share in each layer": {"scope": "layer"},
    "fisher": {"criterion": "fisher"},
    "taylor": {"criterion": "taylor"},
    "batch_norm": {"criterion": "batch_norm"},
    "magnitude": {"criterion": "magnitude"},
}
TUNED = (("redundancy", "together"), ("redundancy", "weights"), ("magnitude", "weights"))
COMPARED = {"redundancy": tuple(FITS), "magnitude": ("refit", "weights")}  # at all shares; the others, refitted, where it is tuned
TUNED_SHARES = (0.7, 0.5, 0.25)
ROAD = "channels to half, then factorize"


def load_data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST, images in [0, 1]."""
    (x, y), (test_x, test_y) = keras.datasets.fashion_mnist.load_data()
    return ((x / 255).astype("float32")[..., None], y), ((test_x / 255).astype("float32")[..., None], test_y)


def build(share: float = 1.0) -> keras.Model:
    """Five convolutions of 32, 48, 48, 96 and 96 channels, or a share of these, each with batch normalisation and ReLU."""
    layers = keras.layers
    x = image = keras.Input((28, 28, 1))
    for index, (width, strides) in enumerate([(32, 2), (48, 1), (48, 1), (0, 0), (96, 1), (96, 1)]):
        if not width:
            x = layers.MaxPooling2D(2)(x)
            continue
        x = layers.Conv2D(round(width * share), 3, strides=strides, padding="same", use_bias=False, name=f"conv{index}")(x)
        x = layers.BatchNormalization(name=f"norm{index}", momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, name="head")(x))


def optimizer(settings: dict[str, Any], samples: int) -> keras.optimizers.Optimizer:
    """Adam, its rate falling to 0 by a cosine."""
    steps = settings["epochs"] * -(-samples // settings["batch_size"])
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(settings["learning_rate"], steps))


def load_teacher(seed: int, train: tuple[np.ndarray, np.ndarray]) -> keras.Model:
    """Trained once for each seed."""
    path = CACHE / f"teacher{seed}.keras"
    if path.exists():
        return keras.models.load_model(path)
    keras.utils.set_random_seed(seed)
    model = build()
    model.compile(optimizer(TEACHER, len(train[0])), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*train, batch_size=TEACHER["batch_size"], epochs=TEACHER["epochs"], verbose=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return model


def accuracy(model: keras.Model, test: tuple[np.ndarray, np.ndarray]) -> float:
    """In percent."""
    return round(100 * float(np.mean(np.argmax(model.predict(test[0], batch_size=1000, verbose=0), -1) == test[1])), 3)


def known() -> dict[str, Any]:
    """The committed result."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


class Store:
    """Results of runs, written after each.

    Args:
        name: of the file in the cache, or its path without `.json`.
        known: results of earlier runs, where the file is not there.
    """

    def __init__(self, name: str | pathlib.Path, known: dict[str, Any] | None = None) -> None:
        self.path = CACHE / f"{name}.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else dict(known or {})

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a run, made if it is not there."""
        if key not in self.found:
            self.found[key] = make()
            self.path.write_text(json.dumps(self.found, indent=1))
            rich.print(f"{key}: {self.found[key]}")
        return self.found[key]


def cut(teacher: keras.Model, method: str, share: float, fit: str, images: np.ndarray) -> tuple[keras.Model, float, float]:
    """The smaller model, its share of the multiply-accumulates, and the seconds it took."""
    began = time.perf_counter()
    if method == ROAD:
        half = surgery.prune_channels(teacher, macs=0.5, data=images, reconstruct=FITS[fit], verbose=0)
        whole = profile.profile(teacher, runs=1).macs
        model = surgery.factorize(half, macs=share * whole, data=images)
        if fit == "together":
            model = surgery.reconstruct(model, teacher, images, verbose=0)
    else:
        model = surgery.prune_channels(teacher, macs=share, data=images, reconstruct=FITS[fit], verbose=0, **METHODS[method])
    seconds = time.perf_counter() - began
    macs = [profile.profile(one, runs=1).macs for one in (model, teacher)]
    return model, macs[0] / macs[1], seconds


def runs_at(share: float) -> list[tuple[str, str]]:
    """Which methods are tried, and how their channels are fitted, at a share of the multiply-accumulates."""
    runs = [(method, fit) for method, fits in COMPARED.items() for fit in fits]
    if share in TUNED_SHARES:
        runs += [("magnitude", "together"), *((method, "refit") for method in METHODS if method not in COMPARED)]
    return runs + [(ROAD, fit) for fit in ("together", "refit")] * (share < 0.5)


def is_complete(curves: dict[str, Any]) -> bool:
    """Whether all runs without training are there."""
    return all(f"{seed}/{share}/{method}/{fit}" in curves for seed in SEEDS for share in SHARES for method, fit in runs_at(share))


def run_curves() -> dict[str, Any]:
    """Accuracy without any training."""
    train, test = load_data()
    images, store = train[0][:IMAGES], Store("curves")
    for seed in SEEDS:
        teacher = load_teacher(seed, train)
        store.get(f"{seed}/original", lambda model=teacher: {"accuracy": accuracy(model, test), "parameters": model.count_params()})
        for share in SHARES:
            for method, fit in runs_at(share):

                def run(method: str = method, fit: str = fit, share: float = share, model: keras.Model = teacher) -> dict[str, Any]:
                    smaller, macs, seconds = cut(model, method, share, fit, images)
                    return {
                        "accuracy": accuracy(smaller, test),
                        "macs": round(macs, 5),
                        "parameters": smaller.count_params(),
                        "seconds": round(seconds, 1),
                    }

                store.get(f"{seed}/{share}/{method}/{fit}", run)
    return store.found


def tune(model: keras.Model, teacher: keras.Model, how: str, data: Any, test: Any, seed: int) -> dict[str, Any]:
    """A few epochs: of fine-tuning on labels, or of distillation from the original."""
    keras.utils.set_random_seed(seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained: Any = model
    if how != "fine-tuned":
        kd = keras_kd.losses.KDLoss(temperature=TUNING["temperature"])
        trained = keras_kd.Distiller(teacher, model, kd, student_loss_weight=TUNING["student_loss_weight"])
    if how != ALL:
        data = tuple(one[:LABELLED] for one in data)
    trained.compile(optimizer(TUNING, len(data[0])), loss)
    began = time.perf_counter()
    trained.fit(*data, batch_size=TUNING["batch_size"], epochs=TUNING["epochs"], verbose=0)
    return {
        "accuracy": accuracy(model, test),
        "original": accuracy(teacher, test),
        "seconds": round(time.perf_counter() - began),
        "parameters": model.count_params(),
    }


def tuned_runs() -> list[tuple[float, str, str, str]]:
    """Which networks are tuned, and how: what is claimed first."""
    order = [(0.25, *TUNED[0], ALL)]
    return order + [(share, *one, how) for one in TUNED for share in sorted(TUNED_SHARES) for how in ("distilled", "fine-tuned")]


def run_tuning(seeds: Iterable[int] = SEEDS) -> dict[str, Any]:
    """Accuracy after a few epochs."""
    train, test = load_data()
    images, store = train[0][:IMAGES], Store("tuning", known().get("tuning"))
    for share, method, fit, how in tuned_runs():
        for seed in seeds:
            teacher = load_teacher(seed, train)

            def run(
                t: Any = teacher, m: str = method, s: float = share, f: str = fit, h: str = how, n: int = seed
            ) -> dict[str, Any]:
                return tune(cut(t, m, s, f, images)[0], t, h, train, test, n)

            store.get(f"{seed}/{share}/{method}/{fit}/{how}", run)
    return store.found


def run_latency(rounds: int = 5) -> dict[str, Any]:
    """Single-thread latency of LiteRT files by their multiply-accumulates, measured in turn."""
    train, _ = load_data()
    teacher = load_teacher(0, train)
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for share in (1.0, *SHARES):
            model = teacher if share == 1 else cut(teacher, "redundancy", share, "refit", train[0][:IMAGES])[0]
            paths[share] = pathlib.Path(folder) / f"{share}.tflite"
            export.to_litert(model, paths[share])
        times: dict[float, list[float]] = {share: [] for share in paths}
        for _ in range(rounds):
            for share, path in paths.items():
                times[share].append(profile.measure_latency(path, threads=1).median)
    medians = {share: statistics.median(values) for share, values in times.items()}
    return {
        str(share): {"milliseconds": round(value, 4), "ratio": round(value / medians[1.0], 3)} for share, value in medians.items()
    }


def run_seconds() -> dict[str, float]:
    """Seconds of one prune_channels at each share, the first call of the process among them; and the machine's load before."""
    train, _ = load_data()
    teacher = load_teacher(0, train)
    found = {"load": round(os.getloadavg()[0], 2)}
    for share in TUNED_SHARES:
        found[str(share)] = round(cut(teacher, "redundancy", share, "together", train[0][:IMAGES])[2], 1)
    return found


def run_torch(python: str) -> dict[str, Any]:
    """Torch-Pruning on the same networks, in a Python of its own: accuracy without training."""
    train, test = load_data()
    store = Store("torch")
    for seed in SEEDS:
        teacher = load_teacher(seed, train)

        def run(teacher: keras.Model = teacher) -> dict[str, Any]:
            weights = {f"{layer.name}/{n}": value for layer in teacher.layers for n, value in enumerate(layer.get_weights())}
            images = test[0].transpose(0, 3, 1, 2)
            outputs = teacher.predict(test[0][:200], verbose=0)
            with tempfile.TemporaryDirectory() as folder:
                source, target = (pathlib.Path(folder) / name for name in ("in.npz", "out.json"))
                np.savez(source, images=images, labels=test[1], outputs=outputs, shares=SHARES, **weights)
                script = pathlib.Path(__file__).with_name("surgery_torch.py")
                subprocess.run([python, script, source, target], check=True)
                return json.loads(target.read_text())

        store.get(str(seed), run)
    return store.found


def summary(curves: dict[str, Any], tuning: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Points lost, mean and largest over the seeds."""
    originals = {seed: curves[f"{seed}/original"]["accuracy"] for seed in SEEDS}
    found: dict[str, Any] = {}
    theirs = {f"{seed}/{name}": one for seed, runs in others.items() for name, one in runs.items() if isinstance(one, dict)}
    for runs in (curves, tuning, theirs):
        for key, run in runs.items():
            seed, _, name = key.partition("/")
            if name != "original":
                found.setdefault(name, []).append(run.get("original", originals[int(seed)]) - run["accuracy"])
    return {
        name: {"points_lost": round(statistics.fmean(lost), 2), "most": round(max(lost), 2), "seeds": len(lost)}
        for name, lost in found.items()
    }


def verdicts(lost: dict[str, Any], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The claims, each with what was found."""
    claims = [
        ("at 70 % of the MACs, without training, points lost", "0.7/redundancy/together", 0.3),
        ("at 50 %", "0.5/redundancy/together", 0.6),
        ("at 25 %", "0.25/redundancy/together", 2.5),
        (f"at 25 %, {ROAD}", f"0.25/{ROAD}/together", 2.5),
        ("at 25 %, after five epochs of distillation", f"0.25/redundancy/together/{ALL}", 0.5),
    ]
    found = [
        {"claim": text, "found": lost[key]["points_lost"], "limit": limit, "holds": lost[key]["points_lost"] <= limit}
        for text, key, limit in claims
        if key in lost
    ]
    if seconds:
        most = max(value for key, value in seconds.items() if key != "load")
        found.append({"claim": "seconds of one prune_channels, at most", "found": most, "limit": 30, "holds": most <= 30})
    return found


LABELS = {"together": ", refitted together", "refit": ", refitted layer by layer", "weights": ", not refitted"}


def section(result: dict[str, Any]) -> str:
    """The tables of docs/surgery.md."""
    runs = dict.fromkeys(run for share in SHARES for run in runs_at(share))
    rows = {f"{method}{LABELS[fit]}": f"{method}/{fit}" for one in FITS for method, fit in runs if fit == one}
    theirs = [name.partition("/")[2] for name, one in result["torch_pruning"].get("0", {}).items() if isinstance(one, dict)]
    text = table("points lost, mean (most) of three seeds", SHARES, rows | {name: name for name in theirs}, result)
    tuned = {f"{method}{LABELS[fit]}, {how}": f"{method}/{fit}/{how}" for _, method, fit, how in tuned_runs()}
    title = f"points lost after five epochs on {LABELLED:,} images: mean (most)"
    return text + "\n\n" + table(title, TUNED_SHARES, tuned, result) if result["tuning"] else text


def table(title: str, shares: tuple[float, ...], rows: dict[str, str], result: dict[str, Any]) -> str:
    """Points lost of runs by their share; runs that were not made leave a gap."""
    lines = [f"| {title} | " + " | ".join(f"{share:.0%} of the MACs" for share in shares) + " |", "|---|" + "---|" * len(shares)]
    for label, key in rows.items():
        found = [result["points_lost"].get(f"{share}/{key}") for share in shares]
        if any(found):
            cells = ["" if one is None else cell(one) for one in found]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(one: dict[str, Any]) -> str:
    """Mean and most, and of how many seeds, where these are not all."""
    few = "" if one["seeds"] == len(SEEDS) else f", {one['seeds']} of {len(SEEDS)} seeds"
    return f"{one['points_lost']:.1f} ({one['most']:.1f}){few}"


def write_table(result: dict[str, Any], page: pathlib.Path = PAGE) -> None:
    """Puts the table into the page."""
    before, rest = page.read_text().split(MARKERS[0])
    page.write_text(f"{before}{MARKERS[0]}\n{section(result)}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def draw(curves: dict[str, Any], lost: dict[str, Any]) -> None:
    """Accuracy over multiply-accumulates, without any training."""
    from matplotlib import figure

    drawing = figure.Figure((7.2, 4.2), layout="constrained")
    axes = drawing.add_subplot()
    shown = [
        ("redundancy/together", "#2e7d6b", "-", "ours: redundancy, refitted together"),
        ("redundancy/refit", "#8fbcbb", "-", "redundancy, refitted layer by layer"),
        ("magnitude/refit", "#5e81ac", "-", "magnitude, refitted layer by layer"),
        ("magnitude/weights", "#bf616a", "--", "magnitude"),
        ("Torch-Pruning, group norm, same share in each layer", "#d08770", ":", "Torch-Pruning, group norm"),
    ]
    whole = statistics.fmean(curves[f"{seed}/original"]["accuracy"] for seed in SEEDS)
    for key, color, style, label in shown:
        if f"{SHARES[0]}/{key}" not in lost:
            continue
        means = [whole - lost[f"{share}/{key}"]["points_lost"] for share in SHARES]
        axes.plot(
            [100, *[100 * share for share in SHARES]], [whole, *means], style, marker="o", markersize=4, color=color, label=label
        )
    axes.set(xlabel="multiply-accumulates left, %", ylabel="test accuracy, %", ylim=(0, 100))
    axes.invert_xaxis()
    axes.set_title("Fashion-MNIST, 1,000 unlabelled images, no training", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    drawing.savefig(PICTURE, dpi=150)


def draw_latency(latency: dict[str, dict[str, float]]) -> None:
    """Time of one inference over multiply-accumulates, both as shares of the original's."""
    from matplotlib import figure

    drawing = figure.Figure((4.8, 4.2), layout="constrained")
    axes = drawing.add_subplot()
    shares = [100 * float(share) for share in latency]
    axes.plot([0, 100], [0, 100], "--", color="#4c566a", linewidth=1, label="in proportion")
    axes.plot(shares, [100 * one["ratio"] for one in latency.values()], "-o", color="#2e7d6b", markersize=4, label="measured")
    axes.set(xlabel="multiply-accumulates left, %", ylabel="time of one inference, %", xlim=(0, 105), ylim=(0, 105))
    axes.set_title(f"LiteRT, float32, 1 thread; all is {latency['1.0']['milliseconds']:.2f} ms", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    drawing.savefig(LATENCY_PICTURE, dpi=150)


def show(result: dict[str, Any]) -> None:
    """A table of the points lost, and the verdicts."""
    table = rich.table.Table("run", "points lost", "most", "seeds")
    for name, one in result["points_lost"].items():
        table.add_row(name, str(one["points_lost"]), str(one["most"]), str(one["seeds"]))
    rich.print(table)
    for one in result["claims"]:
        rich.print(f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['claim']}: {one['found']} (at most {one['limit']})")


def main() -> int:
    """Runs a part, and writes what is known so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tuning", action="store_true", help="fine-tuning and distillation")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="those that are tuned (all)")
    parser.add_argument("--torch", metavar="PYTHON", help="Torch-Pruning, run by this Python")
    parser.add_argument("--latency", action="store_true", help="latency of the LiteRT files")
    parser.add_argument("--seconds", action="store_true", help="time of one prune_channels")
    options = parser.parse_args()
    a_part = options.tuning or options.latency or options.seconds or options.torch
    old = known()
    curves = Store("curves", old.get("curves")).found if a_part else run_curves()
    tuning = run_tuning(options.seeds) if options.tuning else Store("tuning", old.get("tuning")).found
    others = run_torch(options.torch) if options.torch else Store("torch", old.get("torch_pruning")).found
    latency = run_latency() if options.latency else old.get("latency", {})
    seconds = run_seconds() if options.seconds else old.get("seconds", {})
    if not is_complete(curves):
        rich.print("The part is stored. Nothing is written before the curves are there: start the script without options.")
        return 0
    lost = summary(curves, tuning, others)
    result = {
        "versions": {
            "keras": keras.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, 2 cores, shared",
        },
        "teacher": TEACHER,
        "tuning_settings": {**TUNING, "images": LABELLED},
        "images": IMAGES,
        "curves": curves,
        "tuning": tuning,
        "torch_pruning": others,
        "latency": latency,
        "seconds": seconds,
        "points_lost": lost,
        "claims": verdicts(lost, seconds),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, lost)
    if latency:
        draw_latency(latency)
    write_table(result)
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
