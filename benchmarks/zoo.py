"""What does each distillation loss bring on Fashion-MNIST, beside cross-entropy alone, and what does a step with it cost?

One teacher and one student for all; per seed the same initial weights, images, order of images and number of steps. Every loss has
its recommended weight and its defaults: nothing was tuned, per loss or in all. Test images are looked at once, after the last
step. Every (loss, seed) is recorded in `runs/zoo` when it is done, and not run again while its settings and the teacher stay the
same; a change of a formula is not seen: `--fresh --losses ...`. Seconds a step are measured by themselves, in turns (`--timing`).
"""

import argparse
import datetime
import gc
import hashlib
import json
import os
import pathlib
import platform
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import distiller as steps_benchmark  # its neighbour in this folder
import keras
import numpy as np
import tensorflow as tf

import keras_kd
from keras_kd import losses

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "losses.md"
CACHE = ROOT / "runs" / "zoo"
MARKERS = ("<!-- zoo:begin -->", "<!-- zoo:end -->")
ALONE = "cross-entropy alone"

# Channels of the 3x3 convolutions by stage: maps of 14x14, 7x7 and 7x7. FSPLoss needs equal widths: the first stage has them.
WIDTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "teacher": ((16, 16), (80, 80), (112,)),
    "student": ((16, 16), (24,), (32,)),
}
SETTINGS: dict[str, Any] = {
    "data": "Fashion-MNIST",
    "labelled_images": 6000,
    "test_images": 10000,
    "epochs": 30,
    "batch_size": 64,
    "optimizer": "adam, cosine decay to 0",
    "learning_rate": 2e-3,
    "widths": WIDTHS,
    "teacher_in_training": "recorded once in float32: without augmentation its answers do not change",
    "teacher_images": 60000,
    "teacher_epochs": 8,
    "teacher_batch_size": 128,
}
QUICK = {"labelled_images": 640, "test_images": 1000, "epochs": 1, "teacher_images": 6400, "teacher_epochs": 1}
SEEDS = 3

BASES = {"DistillationLoss", "ResponseLoss", "FeatureLoss", "RelationLoss"}
# What a loss compares, by family: final outputs, the ReLU output of the last stage, the pooled features before the classifier.
FAMILIES: dict[type, str | None] = {losses.ResponseLoss: None, losses.RelationLoss: "pool", losses.FeatureLoss: "stage3"}
# Losses that want other layers than their family, or other arguments.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ABLoss": {"layers": "stage3_norm"},  # before the ReLU
    "FSPLoss": {"layers": ["stage1_1", "stage1"]},  # the flow through the stage of equal widths
    "ReviewKDLoss": {"layers": ["stage1", "stage2", "stage3"]},
    "CRDLoss": {"layers": "pool", "queue": 4096},  # its default, 16384, is more than all images here
}
SHARES = {"KDLoss": (0.1, 1.0)}  # student_loss_weight and weight where they are not 0.5 and the recommended one: 0.9 / 0.1
WARM_UPS = {"DKDLoss", "ReviewKDLoss"}  # published with 20 of 240 epochs


# Who takes part


def public_losses() -> list[str]:
    """Names of all public losses but the base classes: a new one takes part by itself."""
    classes = {name: getattr(losses, name) for name in losses.__all__}
    kinds = (name for name, kind in classes.items() if isinstance(kind, type) and issubclass(kind, losses.DistillationLoss))
    families = list(FAMILIES)
    return sorted(set(kinds) - BASES, key=lambda name: (families.index(_family(classes[name])), name))


def _family(kind: type) -> type:
    for family in FAMILIES:
        if issubclass(kind, family):
            return family
    raise ValueError(f"{kind.__name__} belongs to no family of FAMILIES: say there which layers it compares.")


def make_loss(name: str) -> Any:
    """A loss object with its defaults and the layers that it compares."""
    kind = getattr(losses, name)
    arguments = dict(ARGUMENTS.get(name, {}))
    layers = arguments.pop("layers", FAMILIES[_family(kind)])
    return kind(teacher_layer_name=layers, student_layer_name=layers, **arguments)


def plan(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides how a row is trained, beside the common settings; it goes into the key of its runs."""
    if name == ALONE:
        return {"loss": name, "layers": None, "weight": None, "student_loss_weight": 1.0, "warm_up_steps": 0, "config": {}}
    loss = make_loss(name)
    share, weight = SHARES.get(name, (0.5, losses.recommended_weight(loss)))
    steps = settings["epochs"] * (settings["labelled_images"] // settings["batch_size"])
    config = {key: value for key, value in loss.get_config().items() if key != "teacher_channels"}  # no surgery here
    return {
        "loss": name,
        "layers": loss.student_layer_name,
        "weight": weight,
        "student_loss_weight": share,
        "warm_up_steps": steps * 20 // 240 if name in WARM_UPS else 0,
        "config": json.loads(json.dumps(config, default=str)),
    }


def digest(value: Any) -> str:
    """Short name of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# Data and models


def load_data(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Images for teacher and student with their labels, and test images; the student's are as many of each class."""
    (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    x, x_test = (images[..., None].astype("float32") / 255.0 for images in (x, x_test))
    y, y_test = y.astype("int64"), y_test.astype("int64")
    order = np.random.default_rng(0).permutation(len(x))
    per_class = settings["labelled_images"] // 10
    chosen = np.sort(np.concatenate([order[y[order] == label][:per_class] for label in range(10)]))
    taught, tested = settings["teacher_images"], settings["test_images"]
    return {"x": x[chosen], "y": y[chosen], "x_teacher": x[:taught], "y_teacher": y[:taught]} | {
        "x_test": x_test[:tested],
        "y_test": y_test[:tested],
    }


def conv_net(role: str) -> keras.Model:
    """Conv-BatchNorm-ReLU in stages, global average pooling, logits. The last ReLU of stage 2 is called "stage2"."""
    inputs = x = keras.Input((28, 28, 1))
    for stage, widths in enumerate(WIDTHS[role], start=1):
        for index, width in enumerate(widths, start=1):
            name = f"stage{stage}" if index == len(widths) else f"stage{stage}_{index}"
            strides = 2 if index == 1 and stage < 3 else 1
            x = keras.layers.Conv2D(width, 3, strides, "same", use_bias=False, name=f"{name}_conv")(x)
            x = keras.layers.BatchNormalization(name=f"{name}_norm")(x)
            x = keras.layers.ReLU(name=name)(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name=role)


def batches(samples: tf.data.Dataset, batch_size: int, seed: int) -> tf.data.Dataset:
    """Whole batches in an order that the seed decides, another one in every epoch, the same for all data sets of one length."""
    return samples.shuffle(len(samples), seed=seed).batch(batch_size, drop_remainder=True).prefetch(2)


def train(model: keras.Model, dataset: tf.data.Dataset, epochs: int, learning_rate: float, callbacks: Any = None) -> dict[str, Any]:
    """Trains by Adam with cosine decay; returns the history."""
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * len(dataset))
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(dataset, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0).history
    if not np.isfinite(history["loss"]).all():
        raise RuntimeError(f"The loss of {model.name} is not finite: {history}")
    return history


def get_teacher(settings: dict[str, Any], data: dict[str, np.ndarray], cache: pathlib.Path) -> keras.Model:
    """The teacher of these settings, trained once."""
    decisive = {name: value for name, value in settings.items() if name.startswith("teacher")}
    path = cache / f"teacher-{digest([decisive, WIDTHS['teacher'], settings['learning_rate']])}.keras"
    if not path.exists():
        print("training the teacher", flush=True)
        keras.utils.set_random_seed(0)
        teacher = conv_net("teacher")
        samples = tf.data.Dataset.from_tensor_slices((data["x_teacher"], data["y_teacher"]))
        dataset = batches(samples, settings["teacher_batch_size"], seed=0)
        train(teacher, dataset, settings["teacher_epochs"], settings["learning_rate"])
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher.save(path.with_suffix(".part.keras"))
        path.with_suffix(".part.keras").replace(path)
    return keras.models.load_model(path, compile=False)


def answers(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """The class that a model sees in each image."""
    return model.predict(x, batch_size=500, verbose=0).argmax(axis=-1)


# The runs


def record_answers(recipe: dict[str, Any], data: dict[str, np.ndarray], teacher: Any, cache: pathlib.Path) -> keras_kd.Recording:
    """What the teacher says of the student's images, in the layers that a loss needs."""
    layers = [recipe["layers"]] if isinstance(recipe["layers"], str) else recipe["layers"] or []
    path = cache / f"recording-{digest([teacher['fingerprint'], layers, len(data['x'])])}"
    return keras_kd.record_teacher(teacher["model"], (data["x"], data["y"]), path, layer_names=layers, dtype="float32", verbose=0)


def make_distiller(recipe: dict[str, Any], teacher: Any, student: keras.Model) -> tuple[keras_kd.Distiller, list[Any]]:
    """A distiller and its callbacks as the plan wants them."""
    loss = make_loss(recipe["loss"])
    model = keras_kd.Distiller(
        teacher, student, loss, [recipe["weight"]], student_loss_weight=recipe["student_loss_weight"], name=recipe["loss"]
    )
    if not recipe["warm_up_steps"]:
        return model, []
    schedule = keras_kd.schedules.WarmUpValue(recipe["weight"], duration=recipe["warm_up_steps"])
    return model, [keras_kd.callbacks.AnnealWeight(schedule, loss=0, by="step")]


def run_once(
    recipe: dict[str, Any], seed: int, settings: dict[str, Any], data: dict[str, np.ndarray], teacher: Any, cache: pathlib.Path
) -> dict[str, Any]:
    """Trains one student and tests it once."""
    keras.utils.set_random_seed(seed)
    model = student = conv_net("student")
    callbacks: list[Any] = []
    samples = tf.data.Dataset.from_tensor_slices((data["x"], data["y"]))
    if recipe["loss"] != ALONE:
        recording = record_answers(recipe, data, teacher, cache)
        keras.utils.set_random_seed(seed)
        model, callbacks = make_distiller(recipe, recording, student)
        samples = recording.dataset().cache()
    keras.utils.set_random_seed(seed)
    dataset = batches(samples, settings["batch_size"], seed)
    start = time.perf_counter()
    history = train(model, dataset, settings["epochs"], settings["learning_rate"], callbacks)
    seconds = time.perf_counter() - start
    found = answers(student, data["x_test"])
    parts = {name: [round(float(values[i]), 6) for i in (0, -1)] for name, values in history.items() if name.endswith("_loss")}
    return {
        "accuracy": float(np.mean(found == data["y_test"])),
        "agreement": float(np.mean(found == teacher["answers"])),
        "first_and_last_epoch": parts,
        "training_seconds": round(seconds, 1),
    }


def recorded(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Results by key; a line that was cut off is no result."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry
    return found


def record(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Appends one result in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" * (path.stat().st_size > 0) + json.dumps(entry))  # first the end of a line that was cut off
        file.flush()
        os.fsync(file.fileno())


def key_of(recipe: dict[str, Any], seed: int, settings: dict[str, Any], teacher: dict[str, Any]) -> str:
    """The name under which a run is recorded: everything that decides its result but the library's code."""
    common = {name: value for name, value in settings.items() if name != "seeds"}
    return digest([common, recipe, seed, teacher["fingerprint"]])


def describe_teacher(settings: dict[str, Any], data: dict[str, np.ndarray], cache: pathlib.Path) -> dict[str, Any]:
    """The teacher, its answers to the test images, and what identifies its weights."""
    model = get_teacher(settings, data, cache)
    found = answers(model, data["x_test"])
    weights = b"".join(array.tobytes() for array in model.get_weights())
    return {
        "model": model,
        "answers": found,
        "accuracy": float(np.mean(found == data["y_test"])),
        "parameters": model.count_params(),
        "fingerprint": hashlib.sha256(weights).hexdigest()[:16],
    }


def run_all(options: argparse.Namespace) -> dict[str, Any] | None:
    """Does the runs that are not there yet; returns the result once those of all losses are, else None."""
    settings = options.settings
    data = load_data(settings)
    teacher = describe_teacher(settings, data, options.cache)
    print(f"teacher: {teacher['parameters']:,} parameters, accuracy {teacher['accuracy']:.4f}", flush=True)
    store = options.cache / "runs.jsonl"
    done = {} if options.fresh else recorded(store)
    for seed in range(options.seeds):  # a whole seed first: an interrupted run still compares all losses
        for name in options.losses:
            recipe = plan(name, settings)
            key = key_of(recipe, seed, settings, teacher)
            if key in done:
                continue
            entry = {"key": key, "loss": name, "seed": seed} | run_once(recipe, seed, settings, data, teacher, options.cache)
            record(store, entry)
            print(f"{name}, seed {seed}: {entry['accuracy']:.4f}, {entry['training_seconds']:.0f} s", flush=True)
            gc.collect()
    return collect(options, teacher, recorded(store))


# The result


def collect(options: argparse.Namespace, teacher: dict[str, Any], done: dict[str, Any]) -> dict[str, Any] | None:
    """Puts the recorded runs of all losses together; None, and a word, if some are missing."""
    rows, missing = [], []
    for name in [ALONE, *public_losses()]:
        recipe = plan(name, options.settings)
        runs = [done.get(key_of(recipe, seed, options.settings, teacher)) for seed in range(options.seeds)]
        missing += [f"{name}, seed {seed}" for seed, run in enumerate(runs) if run is None]
        if all(runs):
            rows.append(_row(recipe, runs))
    if missing:
        print(f"Not run yet: {'; '.join(missing)}. Nothing is written before all are there.")
        return None
    for row in rows:
        row["difference"] = _spread(np.subtract(row["accuracies"], rows[0]["accuracies"]))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (tf, keras, keras_kd)}
        | {"python": platform.python_version()},
        "machine": steps_benchmark.describe_machine(),
        "settings": options.settings | {"seeds": options.seeds},
        "teacher": {name: teacher[name] for name in ("parameters", "accuracy", "fingerprint")},
        "student": {"parameters": conv_net("student").count_params()},
        "rows": rows,
    }


def _row(recipe: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies, agreements = ([run[name] for run in runs] for name in ("accuracy", "agreement"))
    measured = {"accuracy": _spread(accuracies), "agreement": _spread(agreements)}
    parts = {"accuracies": accuracies, "agreements": agreements, "first_and_last_epoch": runs[0]["first_and_last_epoch"]}
    return recipe | measured | parts | {"training_seconds": [run["training_seconds"] for run in runs]}


def _spread(values: Any) -> dict[str, float]:
    """Mean and standard deviation over the seeds."""
    return {"mean": round(float(np.mean(values)), 5), "std": round(float(np.std(values, ddof=1)), 5)}


# Seconds a step


def timed_models(settings: dict[str, Any]) -> dict[str, keras.Model]:
    """One model per row, and the teacher's forward pass; weights do not matter here."""
    keras.utils.set_random_seed(0)
    teacher = conv_net("teacher")
    models = {ALONE: conv_net("student"), "teacher": steps_benchmark.Probe(lambda x, y: teacher(x, training=False))}
    for name in public_losses():
        models[name], _ = make_distiller(plan(name, settings), teacher, conv_net("student"))
    return models


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every row, in turns; ratios to the student's step alone plus the teacher's forward pass."""
    dataset, _ = steps_benchmark.load_data(options.settings["batch_size"], batches=20)
    models = timed_models(options.settings)
    steps: dict[str, Callable[[], Any]] = {
        name: steps_benchmark.make_step(model, dataset, "auto") for name, model in models.items()
    }
    measured = steps_benchmark.interleave(steps, options.rounds, options.steps)
    ratios = {name: [times[name] / (times[ALONE] + times["teacher"]) for times in measured] for name in steps}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": steps_benchmark.describe_machine(),
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "seconds_a_step": {name: steps_benchmark.summarize([times[name] for times in measured]) for name in steps},
        "ratio": {name: steps_benchmark.summarize(values) for name, values in ratios.items()},
    }


# The table


def table(result: dict[str, Any]) -> str:
    """The table of the documentation, as Markdown."""
    head = ["loss", "compares", "weight", "accuracy, %", "difference, points", "agreement, %", "ms a step", "ratio"]
    lines = [head, ["---"] * 3 + ["---:"] * 5]
    lines += [_cells(row, result.get("timing")) for row in result["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: dict[str, Any], timing: dict[str, Any] | None) -> list[str]:
    alone = row["loss"] == ALONE
    name, layers = row["loss"], row["layers"]
    compared = "labels only" if alone else "logits" if layers is None else ", ".join(np.atleast_1d(layers))
    weight = "" if alone else f"{row['weight']:g}" + (", 0.1 CE" if name in SHARES else "") + (" *" if row["warm_up_steps"] else "")
    accuracy, agreement, difference = (row[key] for key in ("accuracy", "agreement", "difference"))
    seconds = timing["seconds_a_step"][name]["median"] if timing else None
    return [
        name if alone else f"`{name}`",
        compared,
        weight,
        f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f}",
        "" if alone else f"{100 * difference['mean']:+.2f} ± {100 * difference['std']:.2f}",
        f"{100 * agreement['mean']:.2f}",
        f"{1000 * seconds:.1f}" if seconds else "",
        f"{timing['ratio'][name]['median']:.2f}" if timing else "",
    ]


def section(result: dict[str, Any]) -> str:
    """What the page says of the result: how it was measured, the table, and what differs from cross-entropy alone."""
    settings, teacher = result["settings"], result["teacher"]
    steps = settings["epochs"] * (settings["labelled_images"] // settings["batch_size"])
    how = (
        f"A student of {result['student']['parameters']:,} parameters learned from {settings['labelled_images']:,} labelled images "
        f"in {steps} steps of {settings['batch_size']} (Adam), beside a teacher of {teacher['parameters']:,} parameters and "
        f"{100 * teacher['accuracy']:.1f} % accuracy, which had learned from {settings['teacher_images']:,}. Means and standard "
        f"deviations over {settings['seeds']} seeds, on {settings['test_images']:,} test images after the last step; the "
        "difference is taken seed by seed, from the same initial weights and the same order of images. Agreement: the same class "
        "as the teacher. Ratio: time of a step / (student's step alone + teacher's forward pass). A star: the weight rose from 0 "
        "over the first twelfth of the steps."
    )
    found = _verdicts(result["rows"])
    lists = [f"- {title}: {', '.join(f'`{name}`' for name in names) or 'none'}." for title, names in found.items()]
    return "\n\n".join([textwrap.fill(how, 130), table(result), "\n".join(textwrap.fill(line, 130) for line in lists)])


def _verdicts(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Who differs from cross-entropy alone by a point or more, the same way with every seed."""
    titles = (
        "A point or more above cross-entropy alone, and above it with every seed",
        "A point or more below, and below with every seed",
    )
    found: dict[str, list[str]] = {title: [] for title in (*titles, "No difference that this run can show")}
    for row in rows[1:]:
        gains = np.subtract(row["accuracies"], rows[0]["accuracies"])
        up, down = (sign * gains.mean() >= 0.01 and (sign * gains > 0).all() for sign in (1, -1))
        found[titles[0] if up else titles[1] if down else list(found)[2]].append(row["loss"])
    return found


def write_table(result: dict[str, Any], page: pathlib.Path = PAGE) -> None:
    """Puts the section between the markers of the page."""
    text = page.read_text()
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    page.write_text(f"{before}{MARKERS[0]}\n{section(result)}\n{MARKERS[1]}{after}")


def write(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the JSON at once and whole, and the page's table if it is the committed result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(out)
    if out == RESULT and PAGE.exists():
        write_table(result)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--timing", action="store_true", help="measure seconds a step only, and put them into the result")
    only.add_argument("--table", action="store_true", help="write the page's table from the result only")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help="only these; cross-entropy alone always takes part")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, at least 2")
    parser.add_argument("--epochs", type=int, help=f"default: {SETTINGS['epochs']}")
    parser.add_argument("--fresh", action="store_true", help="run again what is recorded")
    parser.add_argument("--rounds", type=int, help="rounds of the timing; default: 30, and 3 with --quick")
    parser.add_argument("--steps", type=int, default=6, help="steps of a variant in a round of the timing")
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes; default: results/, and the cache with --quick")
    parser.add_argument("--quick", action="store_true", help="smoke test: few images, one epoch; the committed result stays")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a spread.")
    if unknown := set(options.losses or []) - set(public_losses()):
        parser.error(f"No such loss: {', '.join(unknown)}. Known: {', '.join(public_losses())}.")
    return _completed(options)


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """Adds what follows from the command line."""
    options.losses = [ALONE, *(options.losses or public_losses())]
    options.settings = SETTINGS | (QUICK if options.quick else {}) | ({"epochs": options.epochs} if options.epochs else {})
    options.cache = CACHE / "quick" if options.quick else CACHE
    options.out = (options.out or (options.cache / "zoo.json" if options.quick else RESULT)).absolute()
    options.rounds = options.rounds or (3 if options.quick else 30)
    return options


def main() -> int:
    """Runs what is missing, measures the steps, writes result and table."""
    options = parse()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not (options.timing or options.table):
        found = run_all(options)
        if found is None:
            return 1
        result = found | ({"timing": result["timing"]} if "timing" in result else {})
        write(result, options.out)
    elif not result:
        raise FileNotFoundError(f"{options.out} is not there: run without --timing and --table first.")
    if not options.table:
        result["timing"] = measure_steps(options)
    write(result, options.out)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
