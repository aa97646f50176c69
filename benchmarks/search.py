"""Does a search over the whole road of compression find better small files than one method alone? And what does a trial cost?

The claims, on the convolutional network of surgery.py for Fashion-MNIST, by accuracy on the test images and bytes of the LiteRT
file of 8-bit integers: the front of `CompressionHyperModel` covers more than that of any single method, and within each limit of
bytes it is at least as accurate as the best of them; what a trial adds to what KerasTuner's own would take is at most 5 % of a
training. What does not hold is printed. Every training has the same number of steps, images and learning rates to choose from, and
every method as many trainings:

- "search": `CompressionHyperModel` by a `ParetoOracle`: channels, rank, learning rate;
- "QAT alone": narrower networks from the start, trained for integers on labels;
- "students distilled": the same networks, distilled from the original meanwhile;
- "pruning + QAT": zeros in the trained network. They save bytes after gzip, not before;
- "channels + QAT": the trained network without its channels of least weights, on labels.

The original was trained on all images, these among them; what is shown was chosen by accuracy on validation images. One seed.

Parts, each stored run by run in `runs/search`, so that the next start goes on where this one ended:

    python benchmarks/search.py             # the fronts
    python benchmarks/search.py --overhead  # what a trial adds to its training, in seconds: on a machine that does nothing else
    python benchmarks/search.py --smoke     # everything with tiny settings in a temporary folder; nothing is written

Every finished part is written to benchmarks/results/search.json, drawn to search.png, and its table put into docs/search.md.
"""

import argparse
import dataclasses
import gzip
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import keras_tuner
import numpy as np
import rich
import surgery as original  # the benchmark beside this one: network, data, original

import keras_kd
from keras_kd import callbacks, export, losses, schedules
from keras_kd import surgery as kd_surgery
from keras_kd import tuner as kd_tuner

RESULT = original.RESULT.with_name("search.json")
PICTURE = RESULT.with_suffix(".png")
PAGE = original.ROOT / "docs" / "search.md"
MARKERS = ("<!-- search:begin -->", "<!-- search:end -->")
CACHE = original.ROOT / "runs" / "search"
BATCH = 128
WEIGHT, TEMPERATURE = 0.3, 4.0
LIMITS = (0.6, 0.4, 0.25, 0.15)  # shares of the original's bytes
LEAST = 70.0  # percent of accuracy that counts for the covered area
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SIZES = {
    "QAT alone": (0.75, 0.55, 0.4, 0.25),  # of the widths
    "students distilled": (0.75, 0.55, 0.4, 0.25),
    "pruning + QAT": (0.5, 0.7, 0.8, 0.9),  # zeros
    "channels + QAT": (0.7, 0.5, 0.35, 0.25),  # of the multiply-accumulates
}
COLORS = {
    "search": "#2e7d6b",
    "QAT alone": "#bf616a",
    "students distilled": "#5e81ac",
    "pruning + QAT": "#d08770",
    "channels + QAT": "#b48ead",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run; the numbers of trainings are those of each method.

    Attributes:
        images: for the training, the first ones of the training set.
        validation: for the choice, its last ones.
        calibration: unlabelled images for the surgery, the first ones.
        test: test images.
        epochs: of each training.
        rates: learning rates to choose from.
        sizes: how many sizes of each single method; trials of the search are as many trainings as these times the rates.
        rounds: of the overhead.
        timed_images: for the trainings of the overhead: what is added does not grow with them, but noise does.
        folder: where runs are stored.
    """

    images: int = 10_000
    validation: int = 2_000
    calibration: int = 1_000
    test: int = 10_000
    epochs: int = 3
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    sizes: int = 4
    rounds: int = 15
    timed_images: int = 1280
    folder: pathlib.Path = CACHE

    @property
    def trainings(self) -> int:
        """Of each method."""
        return self.sizes * len(self.rates)

    @property
    def steps(self) -> int:
        """Of each training."""
        return self.epochs * -(-self.images // BATCH)


class Store(original.Store):
    """Results of runs, written after each."""

    def __init__(self, folder: pathlib.Path, name: str, known: dict[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / name, known)


class Data:
    """Images and labels by what they are for, and the original network."""

    def __init__(self, settings: Settings) -> None:
        (x, y), (test_x, test_y) = original.load_data()
        self.teacher = original.load_teacher(0, (x, y))
        self.train = x[: settings.images], y[: settings.images]
        self.validation = x[-settings.validation :], y[-settings.validation :]
        self.test = test_x[: settings.test], test_y[: settings.test]
        self.calibration = x[: settings.calibration]

    def fit_arguments(self, settings: Settings) -> dict[str, Any]:
        """What every training is given."""
        x, y = self.train
        return {
            "x": x,
            "y": y,
            "validation_data": self.validation,
            "epochs": settings.epochs,
            "batch_size": BATCH,
            "verbose": 0,
        }


def optimizer(rate: float, settings: Settings) -> keras.optimizers.Optimizer:
    """Adam, its rate falling to 0 by a cosine."""
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, settings.steps))


def of_file(path: pathlib.Path, data: Data) -> dict[str, Any]:
    """Accuracy of a LiteRT file on the test images in percent, and its sizes."""
    content = path.read_bytes()
    right = np.mean(export.run_litert(path, data.test[0])[0].argmax(-1) == data.test[1])
    return {"accuracy": round(100 * float(right), 2), "bytes": len(content), "gzip_bytes": len(gzip.compress(content, 9, mtime=0))}


def measured(student: keras.Model, data: Data) -> dict[str, Any]:
    """The same of a model, by its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "student.tflite"
        export.to_litert(student, path, check_data=data.calibration[:100], min_agreement=0.0)
        return of_file(path, data)


def space(data: Data, settings: Settings, **options: Any) -> kd_tuner.CompressionHyperModel:
    """The space of the search."""
    return kd_tuner.CompressionHyperModel(
        data.teacher,
        data=data.calibration,
        search={
            "channels": [0.7, 0.5, 0.35, 0.25],
            "rank": [1.0, 0.7, 0.5],
            "sparsity": None,
            "num_bits": 8,
            "temperature": TEMPERATURE,
            "student_loss_weight": WEIGHT,
        },
        loss=CROSS_ENTROPY,
        optimizer=lambda hp: optimizer(hp.Choice("learning_rate", list(settings.rates)), settings),
        score=kd_tuner.Score("val_accuracy", report=["bytes"]),
        record=settings.folder / "teacher",
        max_kept=100,
        **options,
    )


def run_search(data: Data, settings: Settings, store: Store) -> None:
    """All trials; KerasTuner itself goes on with those of an earlier start."""
    keys = [f"search/{index}" for index in range(settings.trainings)]
    if all(key in store.found for key in keys):
        return
    keras.utils.set_random_seed(0)
    oracle = kd_tuner.ParetoOracle(
        ["val_accuracy", "bytes"], settings.trainings, num_initial_points=settings.trainings // 2, seed=0
    )
    began = time.perf_counter()
    tuner = keras_tuner.Tuner(oracle, space(data, settings), directory=settings.folder, project_name="road")
    tuner.search(**data.fit_arguments(settings))
    seconds = (time.perf_counter() - began) / settings.trainings
    trials = [trial for trial in tuner.oracle.trials.values() if trial.status == "COMPLETED"]
    if len(trials) < settings.trainings:
        raise RuntimeError(f"{len(trials)} of {settings.trainings} trials were completed: see {settings.folder / 'road'}.")
    for key, trial in zip(keys, trials, strict=True):

        def run(trial: Any = trial) -> dict[str, Any]:
            found = of_file(pathlib.Path(tuner.get_trial_dir(trial.trial_id)) / "student.tflite", data)
            value = trial.metrics.get_last_value("val_accuracy")
            return described("search", trial.hyperparameters.values, float(value), found, seconds)

        store.get(key, run)


def described(method: str, values: Mapping[str, Any], chosen_by: float, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A run as it is stored."""
    return {"method": method, **values, "val_accuracy": round(100 * chosen_by, 2), **found, "seconds": round(seconds, 1)}


def train_single(method: str, size: float, rate: float, data: Data, settings: Settings) -> dict[str, Any]:
    """One training of a single method."""
    keras.utils.set_random_seed(0)
    began = time.perf_counter()
    call = data.fit_arguments(settings)
    if method == "students distilled":
        hypermodel = kd_tuner.DistillationHyperModel(
            lambda hp: original.build(size),
            data.teacher,
            search={"temperature": TEMPERATURE, "student_loss_weight": WEIGHT, "num_bits": 8},
            loss=CROSS_ENTROPY,
            optimizer=lambda hp: optimizer(rate, settings),
            record=settings.folder / "teacher",
        )
        hp = keras_tuner.HyperParameters()
        distiller = hypermodel.build(hp)
        metrics, student = hypermodel.fit(hp, distiller, **call), distiller.student
    else:
        student = started(method, size, data)
        student.compile(optimizer(rate, settings), CROSS_ENTROPY, metrics=["accuracy"])
        made: list[Any] = [callbacks.Quantization()]
        if method == "pruning + QAT":
            often = max(1, settings.steps * 6 // 200)
            zeros = schedules.PolynomialDecay(0.0, size, begin_step=0, end_step=min(20 * often, settings.steps), frequency=often)
            made.insert(0, callbacks.Pruning(zeros))
        metrics = kd_tuner.fit_trial(student, trial_callbacks=made, monitor="val_accuracy", **call)
    values = {"size": size, "learning_rate": rate}
    return described(method, values, metrics["val_accuracy"], measured(student, data), time.perf_counter() - began)


def started(method: str, size: float, data: Data) -> keras.Model:
    """What a single method that learns from labels begins with."""
    if method == "QAT alone":
        return original.build(size)
    if method == "channels + QAT":
        return kd_surgery.prune_channels(data.teacher, macs=size, criterion="magnitude", reconstruct=False, verbose=0)
    student = keras.models.clone_model(data.teacher)
    student.set_weights(data.teacher.get_weights())
    return student


def run_fronts(data: Data, settings: Settings) -> dict[str, Any]:
    """All trainings of all methods."""
    store = Store(settings.folder, "fronts")

    def whole() -> dict[str, Any]:
        quantized = callbacks.Quantization(calibration_data=data.calibration).quantize(data.teacher)
        return {"method": "original", **measured(quantized, data)}

    store.get("original", whole)
    run_search(data, settings, store)
    for method, sizes in SIZES.items():
        for size in sizes[: settings.sizes]:
            for rate in settings.rates:
                key = f"{method}/{size}/{rate}"
                store.get(key, lambda m=method, s=size, r=rate: train_single(m, s, r, data, settings))
    return store.found


def run_overhead(data: Data, settings: Settings) -> dict[str, Any]:
    """Seconds of a short training alone, in KerasTuner alone, as a trial and as one with its file, in turn; and of a whole one.

    The first ones of each kind are not counted.
    """
    call = data.fit_arguments(settings)
    short = call | {name: call[name][: settings.timed_images] for name in "xy"}
    spaces = {
        kind: kd_tuner.CompressionHyperModel(
            data.teacher,
            data=data.calibration,
            search={"channels": 0.5, "rank": None, "sparsity": None, "learning_rate": (1e-3, 1.1e-3)},
            loss=CROSS_ENTROPY,
            score=score,
            record=settings.folder / "teacher",
        )
        for kind, score in {"a trial": None, "a trial with its file": kd_tuner.Score("val_accuracy", report=["bytes"])}.items()
    }
    students = spaces["a trial"]
    students.compressed(0.5)  # once for all trials
    with tempfile.TemporaryDirectory() as folder:
        recordings = {
            name: keras_kd.record_teacher(data.teacher, (one["x"], one["y"]), pathlib.Path(folder) / name, verbose=0)
            for name, one in {"short": short, "whole": call}.items()
        }
        alone, whole = (Alone(students, recording, call) for recording in recordings.values())
        kinds: dict[str, Callable[[], Any]] = {"a training alone": lambda: alone.fit(None, alone.made())}
        for kind, hypermodel in {"in KerasTuner alone": alone, **spaces}.items():
            tuner = keras_tuner.RandomSearch(
                hypermodel, "val_accuracy", max_trials=1, seed=0, directory=folder, project_name=kind.replace(" ", "_")
            )

            def another(tuner: Any = tuner) -> None:
                tuner.search(**short)
                tuner.oracle.max_trials += 1

            kinds[kind] = another
        seconds: dict[str, list[float]] = {kind: [] for kind in (*kinds, "a training of the fronts")}
        for _ in range(settings.rounds + 1):
            for kind, run in kinds.items():
                seconds[kind].append(_seconds(run))
        for _ in range(4):
            seconds["a training of the fronts"].append(_seconds(lambda: whole.fit(None, whole.made())))
    return {
        "load": round(os.getloadavg()[0], 2),
        "seconds": {kind: [round(s, 2) for s in all_[1:]] for kind, all_ in seconds.items()},
    }


class Alone(keras_tuner.HyperModel):
    """What a trial trains, by nothing but KerasTuner and `fit`."""

    def __init__(self, students: kd_tuner.CompressionHyperModel, recording: keras_kd.Recording, call: Mapping[str, Any]) -> None:
        super().__init__()
        self.students, self.recording = students, recording
        self.rest = {name: call[name] for name in ("validation_data", "epochs", "verbose")}

    def build(self, hp: keras_tuner.HyperParameters) -> keras_kd.Distiller:
        """A compiled Distiller."""
        return self.made(hp.Float("learning_rate", 1e-3, 1.1e-3))

    def made(self, rate: float = 1e-3) -> keras_kd.Distiller:
        """The same without KerasTuner."""
        kd = losses.KDLoss(TEMPERATURE)
        distiller = keras_kd.Distiller(self.recording, self.students.compressed(0.5), kd, student_loss_weight=WEIGHT)
        distiller.compile(keras.optimizers.Adam(rate), CROSS_ENTROPY, metrics=["accuracy"])
        return distiller

    def fit(self, hp: Any, model: keras.Model, *_: Any, callbacks: Iterable[Any] = (), **__: Any) -> Any:
        """Trains it."""
        every = [*callbacks, keras_kd.callbacks.Quantization()]
        return model.fit(self.recording.dataset(BATCH, shuffle=True), shuffle=False, callbacks=every, **self.rest)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def front(runs: Iterable[Mapping[str, Any]], cost: str = "bytes") -> list[Mapping[str, Any]]:
    """The runs that no other beats on the validation images and in a cost, the smallest first."""
    found: list[Mapping[str, Any]] = []
    for run in sorted(runs, key=lambda one: (one[cost], -one["val_accuracy"])):
        if not found or run["val_accuracy"] > found[-1]["val_accuracy"]:
            found.append(run)
    return found


def covered(runs: Iterable[Mapping[str, Any]], whole: Mapping[str, Any], cost: str = "bytes") -> float:
    """The area that a front dominates on the test images, as a share of that from 70 % accuracy at the original's cost."""
    points = [(run["accuracy"], run[cost]) for run in front(runs, cost)]
    area = kd_tuner.hypervolume(points, (LEAST, whole[cost]), directions=["max", "min"])
    return round(area / ((100 - LEAST) * whole[cost]), 4)


def within(runs: Iterable[Mapping[str, Any]], limit: float) -> float | None:
    """Test accuracy of the run of the highest validation accuracy within so many bytes; None if there is none."""
    fitting = [run for run in runs if run["bytes"] <= limit]
    return max(fitting, key=lambda run: (run["val_accuracy"], -run["bytes"]))["accuracy"] if fitting else None


def summary(fronts: Mapping[str, Any]) -> dict[str, Any]:
    """What each method reached, by the limits of bytes and by the area that it covers."""
    whole = fronts["original"]
    methods: dict[str, list[Any]] = {}
    for run in fronts.values():
        if run["method"] != "original":
            methods.setdefault(run["method"], []).append(run)
    return {
        method: {
            "trainings": len(runs),
            "within": {str(share): within(runs, share * whole["bytes"]) for share in LIMITS},
            "covered": covered(runs, whole),
            "covered_gzip": covered(runs, whole, "gzip_bytes"),
            "seconds": round(statistics.median(run["seconds"] for run in runs), 1),
        }
        for method, runs in methods.items()
    }


def verdicts(found: Mapping[str, Any], overhead: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims, each with what was found."""
    claims = []
    if "search" in found and len(found) > 1:
        others = {method: one for method, one in found.items() if method != "search"}
        best = max(others, key=lambda method: others[method]["covered"])
        gain = round(found["search"]["covered"] - others[best]["covered"], 4)
        claims.append({"claim": f"covered area, more than {best}", "found": gain, "limit": "more than 0", "holds": gain > 0})
        for share in map(str, LIMITS):
            known = {method: one["within"][share] for method, one in others.items() if one["within"][share] is not None}
            mine = found["search"]["within"][share]
            if known and mine is not None:
                rival = max(known, key=lambda method: known[method])
                points = round(mine - known[rival], 2)
                text = f"points of accuracy within {float(share):.0%} of the bytes, more than {rival}"
                claims.append({"claim": text, "found": points, "limit": "at least 0", "holds": points >= 0})
    if overhead:
        more, length = added(overhead), statistics.median(overhead["seconds"]["a training of the fronts"])
        share = round((more["a trial"] - more["in KerasTuner alone"]) / length, 4)
        text = f"a trial: time over that of KerasTuner alone, as a share of a training of {length:.0f} s"
        claims.append({"claim": text, "found": share, "limit": "at most 0.05", "holds": share <= 0.05})
    return claims


def added(overhead: Mapping[str, Any]) -> dict[str, float]:
    """Seconds more than those of the short training alone, medians."""
    alone = overhead["seconds"]["a training alone"]
    return {
        kind: statistics.median(a - b for a, b in zip(times, alone, strict=True))
        for kind, times in overhead["seconds"].items()
        if kind not in ("a training alone", "a training of the fronts")
    }


def section(result: Mapping[str, Any]) -> str:
    """The tables of docs/search.md."""
    heads = [f"{share:.0%} of the bytes" for share in LIMITS]
    lines = [
        f"| best accuracy of the file within | {' | '.join(heads)} | covered | after gzip |",
        "|---|" + "---|" * (len(LIMITS) + 2),
    ]
    for method, one in result["summary"].items():
        cells = ["none" if value is None else f"{value:.1f} %" for value in one["within"].values()]
        lines.append(f"| {method} | {' | '.join(cells)} | {one['covered']:.3f} | {one['covered_gzip']:.3f} |")
    claims = [
        f"- {one['claim']}: {one['found']} ({one['limit']}){'' if one['holds'] else ': does not hold'}" for one in result["claims"]
    ]
    more = added(result["overhead"]) if result["overhead"] else {}
    seconds = [f"- {kind}: {value:.1f} s more than the training alone" for kind, value in more.items()]
    return "\n".join([*lines, "", *claims, *seconds])


def write_table(result: Mapping[str, Any], page: pathlib.Path = PAGE) -> None:
    """Puts the table into the page."""
    before, rest = page.read_text().split(MARKERS[0])
    page.write_text(f"{before}{MARKERS[0]}\n{section(result)}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def draw(fronts: Mapping[str, Any], path: pathlib.Path) -> None:
    """All runs, and each method's front."""
    from matplotlib import figure

    drawing = figure.Figure((7.2, 4.4), layout="constrained")
    axes = drawing.add_subplot()
    for method, color in COLORS.items():
        runs = [run for run in fronts.values() if run["method"] == method]
        chosen = front(runs)
        axes.scatter([run["bytes"] / 1000 for run in runs], [run["accuracy"] for run in runs], s=9, color=color, alpha=0.35)
        axes.plot(
            [run["bytes"] / 1000 for run in chosen],
            [run["accuracy"] for run in chosen],
            "-o",
            markersize=4,
            color=color,
            label=method,
        )
    whole = fronts["original"]
    axes.scatter(
        [whole["bytes"] / 1000], [whole["accuracy"]], marker="*", s=90, color="black", label="original, not trained again", zorder=3
    )
    axes.set(xlabel="LiteRT file of 8-bit integers, kB", ylabel="test accuracy, %", ylim=(LEAST, None))
    axes.set_title("Fashion-MNIST: fronts by validation accuracy, equal training steps", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    drawing.savefig(path, dpi=150)


def made_of(fronts: Mapping[str, Any], overhead: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What is committed."""
    found = summary(fronts)
    shown = {name: value for name, value in dataclasses.asdict(settings).items() if name != "folder"}
    return {
        "versions": {
            "keras": keras.__version__,
            "keras_tuner": keras_tuner.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        },
        "settings": shown | {"batch_size": BATCH, "steps": settings.steps, "trainings": settings.trainings},
        "fronts": fronts,
        "overhead": overhead,
        "summary": found,
        "claims": verdicts(found, overhead),
    }


def show(result: Mapping[str, Any]) -> None:
    """The tables, and the verdicts."""
    rich.print(section(result))


def smoke() -> int:
    """Every part with tiny settings, where nothing is left of it."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = {
            "images": 256,
            "timed_images": 128,
            "validation": 128,
            "calibration": 128,
            "test": 200,
            "epochs": 1,
            "rates": (1e-3,),
            "sizes": 2,
        }
        settings = Settings(**tiny, rounds=1, folder=pathlib.Path(folder))
        data = Data(settings)
        fronts = run_fronts(data, settings)
        if run_fronts(data, settings) != fronts:
            raise RuntimeError("A second start did not find what the first one stored.")
        show(json.loads(json.dumps(made_of(fronts, run_overhead(data, settings), settings))))
        draw(fronts, pathlib.Path(folder) / "search.png")
    return 0


def main() -> int:
    """Runs a part, and writes what is known so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--overhead", action="store_true", help="what a trial adds to its training, in seconds")
    parser.add_argument("--smoke", action="store_true", help="every part with tiny settings; nothing is written")
    options = parser.parse_args()
    if options.smoke:
        return smoke()
    settings = Settings()
    data = Data(settings)
    committed = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    times = Store(settings.folder, "overhead", None if options.overhead else {"overhead": committed.get("overhead", {})})
    if options.overhead:
        times.get("overhead", lambda: run_overhead(data, settings))
        fronts = Store(settings.folder, "fronts", committed.get("fronts")).found
    else:
        fronts = run_fronts(data, settings)
    if len(fronts) < 1 + (1 + len(SIZES)) * settings.trainings:
        rich.print("The part is stored. Nothing is written before the fronts are there: start the script without options.")
        return 0
    result = json.loads(json.dumps(made_of(fronts, times.found.get("overhead", {}), settings)))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(fronts, PICTURE)
    write_table(result)
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
