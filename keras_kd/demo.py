"""Does compression work, here and now? The main job from end to end: teacher, students alone, distilled and compressed, file.

A teacher has learned from labelled images that its user does not hand on. The user has other images, only a few of them with
labels. The student alone learns from those few. The distilled student also learns what the teacher says of all the images, for
the same number of steps, from the same initial weights, in the same order. The compressed student is distilled, pruned and trained
for integers in one such `fit`, and becomes a file of integers. The teacher never saw the user's labels, and nobody sees the test
images.
"""

import dataclasses
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_kd import callbacks as compression
from keras_kd import export, losses, report, schedules
from keras_kd._version import __version__
from keras_kd.distiller import Distiller
from keras_kd.profile import Profile, profile

DATASETS = ("digits", "fashion_mnist", "mnist", "cifar10")
NO_LABEL = -1
KINDS = ("alone", "distilled", "compressed")
WRITTEN = ("report.png", "results.json", "student.tflite", "student_float.tflite", "teacher.tflite")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo does; the numbers for digits were chosen once, by trials on other splits too, and hold for every run.

    Attributes:
        dataset: one of `DATASETS`.
        epochs: epochs of each student.
        teacher_epochs: epochs of the teacher.
        seeds: number of seeds, each with a student alone, a distilled one and a compressed one.
        seed: the first seed.
        temperature: of the distillation.
        student_loss_weight: share of the labels in the distilled student's loss.
        sparsity: share of zeros in the compressed student.
    """

    dataset: str = "digits"
    epochs: int = 60
    teacher_epochs: int = 25
    seeds: int = 3
    seed: int = 0
    temperature: float = 4.0
    student_loss_weight: float = 0.1
    sparsity: float = 0.5


@dataclasses.dataclass(frozen=True)
class Data:
    """Three disjoint parts of one data set; images in [0, 1], shape `(samples, height, width, channels)`."""

    teacher: tuple[np.ndarray, np.ndarray]
    images: np.ndarray  # the user's
    labels: np.ndarray  # theirs, NO_LABEL where there is none
    test: tuple[np.ndarray, np.ndarray]
    classes: int

    @property
    def labelled(self) -> np.ndarray:
        """Indices of the user's labelled images."""
        return np.flatnonzero(self.labels != NO_LABEL)


def load(dataset: str, seed: int = 0) -> Data:
    """Loads and splits a data set, stratified by class.

    Args:
        dataset: `"digits"` comes with scikit-learn, the others with `keras.datasets`.
        seed: seed of the split.
    """
    from sklearn.model_selection import train_test_split

    if dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}. Received: dataset={dataset!r}.")
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = (digits.images[..., None] / 16).astype("float32"), digits.target
        teacher, user, labelled = 700, 600, 60
        rest_x, test_x, rest_y, test_y = train_test_split(x, y, train_size=teacher + user, stratify=y, random_state=seed)
    else:
        try:
            (rest_x, rest_y), (test_x, test_y) = getattr(keras.datasets, dataset).load_data()
        except Exception as error:  # Keras raises a bare Exception
            raise OSError(f"{dataset} cannot be loaded ({error}). Without a network: --dataset digits needs none.") from error
        rest_x, test_x = (_as_images(x) for x in (rest_x, test_x))
        rest_y, test_y = rest_y.ravel().astype("int64"), test_y.ravel().astype("int64")
        teacher, user, labelled = 20_000, 6_000, 300
        rest_x, _, rest_y, _ = train_test_split(rest_x, rest_y, train_size=teacher + user, stratify=rest_y, random_state=seed)
    teacher_x, user_x, teacher_y, user_y = train_test_split(rest_x, rest_y, test_size=user, stratify=rest_y, random_state=seed)
    with_label, _ = train_test_split(np.arange(user), train_size=labelled, stratify=user_y, random_state=seed)
    labels = np.full(user, NO_LABEL)
    labels[with_label] = user_y[with_label]
    return Data((teacher_x, teacher_y), user_x, labels, (test_x, test_y), int(test_y.max()) + 1)


def _as_images(x: np.ndarray) -> np.ndarray:
    x = x.astype("float32") / 255
    return x if x.ndim == 4 else x[..., None]


def make_teacher(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A convolutional teacher: 82,666 parameters on 8x8 digits."""

    def block(filters: int) -> list[keras.layers.Layer]:
        # BatchNorm forgets faster than by default: the training is a few hundred steps long.
        convolution = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        return [convolution, layers.BatchNormalization(momentum=0.9), layers.ReLU()]

    body = [*block(32), *block(32), layers.MaxPooling2D(), *block(64), *block(64), layers.MaxPooling2D(), layers.Flatten()]
    head = [layers.Dropout(0.4), layers.Dense(64, activation="relu"), layers.Dropout(0.4), layers.Dense(classes)]
    return keras.Sequential([keras.Input(shape), *body, *head], name="teacher")


def make_student(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A student for a microcontroller: 3,530 parameters on 8x8 digits."""

    def depthwise(filters: int, strides: int) -> list[keras.layers.Layer]:
        spatial = layers.DepthwiseConv2D(3, strides=strides, padding="same", activation="relu")
        return [spatial, layers.Conv2D(filters, 1, activation="relu")]

    first = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")
    body = [keras.Input(shape), first, *depthwise(32, 1), *depthwise(32, 2), layers.Flatten(), layers.Dense(classes)]
    return keras.Sequential(body, name="student")


def train_teacher(data: Data, settings: Settings, callbacks: Sequence[Any]) -> keras.Model:
    """Trains the teacher on its own labelled images."""
    keras.utils.set_random_seed(settings.seed)
    x, y = data.teacher
    teacher = make_teacher(x.shape[1:], data.classes)
    batch = 70 if settings.dataset == "digits" else 128
    teacher.compile(_optimizer(2e-3, settings.teacher_epochs * math.ceil(len(x) / batch)), _supervised())
    teacher.fit(x, y, batch_size=batch, epochs=settings.teacher_epochs, verbose=0, callbacks=list(callbacks))
    return teacher


def train_student(
    data: Data, settings: Settings, seed: int, kind: str, teacher: keras.Model, callbacks: Sequence[Any]
) -> keras.Model:
    """Trains a student: alone on the labelled images, or distilled on all of the user's images, or compressed meanwhile.

    Steps, batch size, initial weights and the order of positions are the same for all: the labelled images are repeated until
    they are as many as all images.

    Args:
        data: see `Data`.
        settings: see `Settings`.
        seed: of initial weights and order.
        kind: one of `KINDS`.
        teacher: asked by the kinds that are distilled.
        callbacks: of `fit`.

    Returns:
        The student; for the kind "compressed", the model that computes what its integers will.
    """
    keras.utils.set_random_seed(seed)
    student = make_student(data.images.shape[1:], data.classes)
    shown = np.resize(data.labelled, len(data.images)) if kind == "alone" else np.arange(len(data.images))
    batch = 60 if settings.dataset == "digits" else 100
    steps = len(shown) // batch
    rng = np.random.default_rng(seed)
    order = np.concatenate([shown[rng.permutation(len(shown))[: steps * batch]] for _ in range(settings.epochs)])
    images, labels = tf.constant(data.images), tf.constant(data.labels)
    dataset = tf.data.Dataset.from_tensor_slices(order).batch(batch, drop_remainder=True)
    dataset = dataset.map(lambda indices: (tf.gather(images, indices), tf.gather(labels, indices))).prefetch(4)
    model: keras.Model = student
    if kind != "alone":
        loss = losses.KDLoss(temperature=settings.temperature)
        model = Distiller(teacher, student, loss, student_loss_weight=settings.student_loss_weight)
    total = steps * settings.epochs
    half = max(total // 2 // steps, 1) * steps  # zeros come in the first half, integers with the second
    quantization = compression.Quantization(start_step=half)
    if kind == "compressed":
        schedule = schedules.PolynomialDecay(0.0, settings.sparsity, begin_step=0, end_step=half, frequency=steps)
        callbacks = [*callbacks, compression.Pruning(schedule), quantization]
    model.compile(_optimizer(5e-3, total), _supervised(), steps_per_execution=steps)
    model.fit(dataset, epochs=settings.epochs, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=list(callbacks))
    return quantization.quantized_model() if kind == "compressed" else student


def _optimizer(rate: float, steps: int) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))


def _supervised() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=NO_LABEL)


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is their label."""
    return float(np.mean(_predicted(model, images) == labels))


def _predicted(model: keras.Model, images: np.ndarray) -> np.ndarray:
    # Called directly: `predict` would trace a graph for each of the many models.
    logits = [np.asarray(model(images[start : start + 1000], training=False)) for start in range(0, len(images), 1000)]
    return np.concatenate(logits).argmax(-1)


def run(settings: Settings, out: str | os.PathLike[str] = "runs/demo", *, verbose: bool = True) -> dict[str, Any]:
    """Runs the demo; writes `report.png`, `results.json` and `student.tflite` to `out`.

    Args:
        settings: see `Settings`.
        out: folder for the results, made if it is missing.
        verbose: whether to print progress and the table.

    Returns:
        The content of `results.json`.
    """
    start = time.perf_counter()
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data = load(settings.dataset)
    with _Progress(settings.teacher_epochs + len(KINDS) * settings.seeds * settings.epochs, verbose) as progress:
        teacher = train_teacher(data, settings, progress.of("teacher", settings.teacher_epochs))
        students: dict[str, list[keras.Model]] = {kind: [] for kind in KINDS}
        for seed in range(settings.seed, settings.seed + settings.seeds):
            for kind, trained in students.items():
                callbacks = progress.of(f"student {kind}, seed {seed}", settings.epochs)
                trained.append(train_student(data, settings, seed, kind, teacher, callbacks))
    best = _most_agreeing(students["compressed"], teacher, data.images)
    profiles = {
        "teacher": _export(teacher, folder / "teacher.tflite", data)[0],
        "float": _export(students["distilled"][0], folder / "student_float.tflite", data)[0],
    }
    profiles["int8"], exported = _export(best, folder / "student.tflite", data)
    shipped = f"tflite of seed {settings.seed + students['compressed'].index(best)}"
    entries = _entries(data, teacher, students, exported.path, profiles, shipped)
    gain = report.Gain([b - a for a, b in zip(entries[1].accuracies, entries[2].accuracies, strict=True)])
    results = _results(settings, data, entries, gain, exported, time.perf_counter() - start)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.plot(entries, folder / "report.png", title=f"{settings.dataset}. {gain}")
    if verbose:
        _print(data, settings, entries, gain, exported, folder)
    return results


def _most_agreeing(students: Sequence[keras.Model], teacher: keras.Model, images: np.ndarray) -> keras.Model:
    """The student to ship, chosen without labels and without the test images: by agreement with the teacher."""
    wanted = _predicted(teacher, images)
    return max(students, key=lambda student: accuracy(student, images, wanted))


def _export(model: keras.Model, path: pathlib.Path, data: Data) -> tuple[Profile, export.ExportReport]:
    exported = export.to_litert(model, path, check_data=data.test[0][:500], verbose=0)
    return profile(model, path), exported


def _entries(
    data: Data, teacher: keras.Model, students: dict[str, list[keras.Model]], path: Any, profiles: dict[str, Profile], shipped: str
) -> list[report.Entry]:
    def entry(name: str, accuracies: list[float], kind: str) -> report.Entry:
        measured = profiles[kind]
        size, gzip_size, latency = measured.size, measured.gzip_size, measured.latency
        return report.Entry(
            name,
            accuracies,
            measured.nonzero_parameters,
            size,
            gzip_size,
            latency.median if latency else None,
        )

    found = {kind: [accuracy(model, *data.test) for model in models] for kind, models in students.items()}
    of_file = float(np.mean(export.run_litert(path, data.test[0])[0].argmax(-1) == data.test[1]))
    return [
        entry("teacher", [accuracy(teacher, *data.test)], "teacher"),
        entry("student alone", found["alone"], "float"),
        entry("student distilled", found["distilled"], "float"),
        entry("distilled, pruned, int8", found["compressed"], "int8"),
        entry(shipped, [of_file], "int8"),
    ]


def _results(
    settings: Settings,
    data: Data,
    entries: Sequence[report.Entry],
    gain: report.Gain,
    exported: export.ExportReport,
    seconds: float,
) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings),
        "images": {
            "teacher": len(data.teacher[0]),
            "student": len(data.images),
            "student with label": len(data.labelled),
            "test": len(data.test[0]),
        },
        "entries": [{**dataclasses.asdict(e), "mean": e.mean, "spread": e.spread} for e in entries],
        "gain": {"differences": list(gain.differences), "mean": gain.mean, "spread": gain.spread, "is_clear": gain.is_clear},
        "file": {
            "agreement": exported.agreement,
            "max_difference": exported.max_difference,
            "samples": exported.samples,
            "quantization": exported.quantization,
            "operators": exported.operators,
            "float_operators": list(exported.float_operators),
        },
        "latency": "median of single inferences in LiteRT, one thread",
        "seconds": round(seconds, 1),
        "versions": {
            "keras_kd": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "python": platform.python_version(),
        },
    }


def _print(data: Data, settings: Settings, entries: Any, gain: Any, exported: export.ExportReport, folder: pathlib.Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    labelled, unlabelled = len(data.labelled), len(data.images) - len(data.labelled)
    console.print(
        f"{settings.dataset}: the teacher learned from {len(data.teacher[0]):,} labelled images of its own, the student alone from "
        f"{labelled} others, the distilled student from the same {labelled} and {unlabelled:,} more without labels. The compressed "
        f"one is pruned to {settings.sparsity:.0%} zeros and trained for 8-bit integers in the same fit. Accuracy on "
        f"{len(data.test[0]):,} test images, {settings.seeds} seeds; latency in LiteRT, one thread, median."
    )
    console.print(report.table(entries))
    console.print(f"[bold]{gain}[/bold]")
    if max(entry.mean for entry in entries[1:3]) < 0.5:
        console.print("Both students are far from trained: this says nothing yet. More --epochs.")
    cost = report.Gain([b - a for a, b in zip(entries[2].accuracies, entries[3].accuracies, strict=True)])
    console.print(
        f"Pruning and integers: {100 * cost.mean:+.1f} ± {100 * cost.spread:.1f} points against the distilled student, "
        f"{entries[2].size:,} to {entries[3].size:,} bytes ({entries[2].gzip_size:,} to {entries[3].gzip_size:,} after gzip)."
    )
    console.print(
        f"student.tflite ({exported.quantization}) gives the class of its Keras model on {exported.agreement:.1%} of "
        f"{exported.samples} images."
    )
    console.print(f"Written: {', '.join(str(folder / name) for name in WRITTEN)}")


def search(
    settings: Settings, out: str | os.PathLike[str] = "runs/demo", *, trials: int = 8, verbose: bool = True
) -> dict[str, Any]:
    """Searches how far the teacher itself can be compressed: fewer channels, thinner layers, integers, tuned by what it says.

    No label is needed but the user's few: trials are compared by how often they agree with the teacher on a quarter of the user's
    images, which they do not learn from, and by the bytes of their files.

    Args:
        settings: dataset, epochs of the teacher and of each trial, seed and temperature are used.
        out: folder for `front.png`, `search.json`, and `search` with the files of all trials; an earlier search there is deleted.
        trials: how many.
        verbose: whether to print progress and the table of the front.

    Returns:
        The content of `search.json`.
    """
    from keras_kd import tuner as kd_tuner  # first: says how to install what is missing

    start = time.perf_counter()
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data = load(settings.dataset)
    with _Progress(settings.teacher_epochs + trials * settings.epochs, verbose) as progress:
        teacher = train_teacher(data, settings, progress.of("teacher", settings.teacher_epochs))
        tuner = _search(data, teacher, settings, folder, trials, progress.of(f"search, {trials} trials", trials * settings.epochs))
    front = kd_tuner.pareto_front(tuner, ["val_accuracy", "bytes"])
    front.plot(folder / "front.png")
    quantized = compression.Quantization(calibration_data=data.images).quantize(teacher)
    whole = _export(quantized, folder / "teacher.tflite", data)[1].path
    found = [
        {"name": one.trial_id, "agreement": one.values["val_accuracy"], "hyperparameters": one.hyperparameters}
        | _of_file(pathlib.Path(one.folder or "") / "student.tflite", data)
        for one in front
    ]
    results = {
        "settings": dataclasses.asdict(settings),
        "trials": len(front.candidates),
        "teacher": _of_file(pathlib.Path(whole), data),
        "front": found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / "search.json").write_text(json.dumps(results, indent=2) + "\n")
    if verbose:
        _print_front(results, folder)
    return results


def _search(data: Data, teacher: keras.Model, settings: Settings, folder: pathlib.Path, trials: int, shown: list[Any]) -> Any:
    """The tuner, after its search."""
    import keras_tuner

    from keras_kd import tuner as kd_tuner

    space = {"channels": [0.4, 0.2, 0.1, 0.05, 0.025], "rank": [1.0, 0.6], "learning_rate": [1e-3, 3e-3], "sparsity": None}
    hypermodel = kd_tuner.CompressionHyperModel(
        teacher,
        data=data.images,
        search=space | {"temperature": settings.temperature, "student_loss_weight": settings.student_loss_weight},
        loss=_supervised(),
        score=kd_tuner.Score("val_accuracy", report=["bytes"]),
        reconstruct="layers",  # seconds; the training fits all together
    )
    oracle = kd_tuner.ParetoOracle(["val_accuracy", "bytes"], trials, seed=settings.seed)
    tuner = keras_tuner.Tuner(oracle, hypermodel, directory=folder, project_name="search", overwrite=True)
    count = len(data.images) * 3 // 4
    held = data.images[count:], _predicted(teacher, data.images[count:])
    keras.utils.set_random_seed(settings.seed)
    batch = 50 if settings.dataset == "digits" else 100
    learned = data.images[:count], data.labels[:count]
    tuner.search(*learned, validation_data=held, batch_size=batch, epochs=settings.epochs, verbose=0, callbacks=shown)
    return tuner


def _of_file(path: pathlib.Path, data: Data) -> dict[str, Any]:
    right = np.mean(export.run_litert(path, data.test[0])[0].argmax(-1) == data.test[1])
    return {"accuracy": float(right), "bytes": path.stat().st_size, "file": str(path)}


def _print_front(results: dict[str, Any], folder: pathlib.Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("trial", box=None, pad_edge=False)
    for heading in ("bytes", "accuracy", "agreement", "channels", "rank", "learning rate"):
        table.add_column(heading, justify="right")
    for one in results["front"]:
        values = one["hyperparameters"]
        told = [f"{values[name]:g}" for name in ("channels", "rank", "learning_rate")]
        table.add_row(one["name"], f"{one['bytes']:,}", f"{one['accuracy']:.1%}", f"{one['agreement']:.1%}", *told)
    teacher = results["teacher"]
    table.add_row("teacher", f"{teacher['bytes']:,}", f"{teacher['accuracy']:.1%}", "", "1", "1", "")
    console = Console(highlight=False)
    console.print(
        "Files of 8-bit integers on the test images. The front: no trial agrees more with the teacher, on images that none learned "
        "from, in fewer bytes. Channels and rank are shares of multiply-accumulates that stay; the teacher is not trained again."
    )
    console.print(table)
    console.print(f"{len(results['front'])} of {results['trials']} trials are on the front. {results['seconds']:.0f} seconds.")
    console.print(f"Written: {', '.join(str(folder / name) for name in ('front.png', 'search.json', 'search/'))}")


class _Progress:
    """A rich progress bar over all epochs of all trainings, with rate and time left; silent unless verbose."""

    def __init__(self, epochs: int, verbose: bool) -> None:
        from rich import progress

        columns = (
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self.bar = progress.Progress(progress.TextColumn("{task.description:<28}"), *columns, disable=not verbose)
        self.task = self.bar.add_task("epochs", total=epochs)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def of(self, name: str, epochs: int) -> list[keras.callbacks.Callback]:
        """Callbacks that move the bar during one training."""
        self.bar.update(self.task, description=name)
        advance: Callable[..., None] = lambda epoch, logs=None: self.bar.advance(self.task)  # noqa: E731
        return [keras.callbacks.LambdaCallback(on_epoch_end=advance)]
