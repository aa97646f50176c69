"""What does a step of online distillation cost, next to its parts and next to `keras.distillation`?

The claims: at most 1.05 times a plain student step plus a teacher forward pass, and not more than `keras.distillation` takes. The
second is a claim that two things take the same time or ours less: it is broken when the whole 95 % interval of the median lies
above 1 (two identical copies of one Distiller differ by 1 % here).
"""

import argparse
import datetime
import gc
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import rich
import rich.table
import tensorflow as tf

import keras_kd

RESULT = pathlib.Path(__file__).parent / "results" / "distiller.json"
FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TEMPERATURE = 4.0
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 10

# Channels of the 3x3 convolutions, the first two of stride 2; a teacher has some 5 times the multiplications of its student.
# Few steps a round and many rounds: a round should pass before other work on the machine comes or goes.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"student": (16, 32, 32), "teacher": (36, 72, 72), "steps": 12},
    "middle": {"student": (32, 64, 96, 128), "teacher": (72, 144, 216, 288), "steps": 4},
}
VARIANTS = {
    "student": "(a) plain student step",
    "teacher": "(b) teacher forward pass",
    "keras_kd": "(c) keras_kd.Distiller",
    "keras": "(d) keras.distillation.Distiller",
    "nothing": "(e) a step that computes nothing",
}
RATIOS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "r1": ("c / (a + b)", lambda t: t["keras_kd"] / (t["student"] + t["teacher"])),
    "r2": ("c / d", lambda t: t["keras_kd"] / t["keras"]),
    # (a) and (b) each fetch a batch and enter a compiled function, (c) does so once: this one counts it once on both sides.
    "r1_net": ("c / (a + b - e)", lambda t: t["keras_kd"] / (t["student"] + t["teacher"] - t["nothing"])),
}
CLAIMS = {"r1": 1.05, "r2": 1.00}


class Probe(keras.Model):
    """Runs a function of a batch as a training step that trains nothing, through Keras' own compiled loop."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function

    def train_step(self, data: Any) -> dict[str, Any]:
        """Returns what the function gives."""
        return {"output": self.function(*data)}


def load_data(batch_size: int, batches: int) -> tuple[tf.data.Dataset, str]:
    """Batches without end, held in memory, and the name of what they hold; downloads nothing."""
    home = pathlib.Path(os.environ.get("KERAS_HOME", pathlib.Path.home() / ".keras"))
    size = batch_size * batches
    if all((home / "datasets" / "fashion-mnist" / name).exists() for name in FILES):
        (x, y), _ = keras.datasets.fashion_mnist.load_data()
        x, y, name = x[:size, ..., None] / 255.0, y[:size], "Fashion-MNIST"
    else:
        generator = np.random.default_rng(0)
        x, y, name = generator.random((size, 28, 28, 1)), generator.integers(0, 10, size), "noise in the shape of Fashion-MNIST"
    dataset = tf.data.Dataset.from_tensor_slices((x.astype("float32"), y.astype("int64")))
    return dataset.batch(batch_size, drop_remainder=True).cache().repeat(), name


def conv_net(widths: tuple[int, ...], name: str) -> keras.Model:
    """A convolutional net for 28x28x1 images and 10 classes, ending in logits."""
    model = keras.Sequential([keras.Input((28, 28, 1))], name=name)
    for index, width in enumerate(widths):
        model.add(keras.layers.Conv2D(width, 3, strides=2 if index < 2 else 1, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10))
    return model


def multiplications(model: keras.Model) -> int:
    """Of one forward pass of one image, convolutions only."""
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return sum(int(np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:3])) for layer in layers)


def clone(model: keras.Model) -> keras.Model:
    """A copy with the same weights: every variant trains, or freezes, its own."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def make_models(student: keras.Model, teacher: keras.Model) -> dict[str, keras.Model]:
    """One model to train per variant, not compiled yet."""
    kd_loss = keras_kd.losses.KDLoss(temperature=TEMPERATURE)
    logits_distillation = keras.distillation.LogitsDistillation(temperature=TEMPERATURE, loss=keras.losses.KLDivergence())
    frozen = clone(teacher)
    return {
        "student": clone(student),
        "teacher": Probe(lambda x, y: frozen(x, training=False)),
        "keras_kd": keras_kd.Distiller(clone(teacher), clone(student), kd_loss, student_loss_weight=0.5),
        "keras": keras.distillation.Distiller(clone(teacher), clone(student), logits_distillation, student_loss_weight=0.5),
        "nothing": Probe(lambda x, y: y),
    }


def make_step(model: keras.Model, dataset: tf.data.Dataset, jit_compile: Any) -> Callable[[], Any]:
    """Compiles, traces and warms up one variant; returns a function that does one step on the next batch."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss, jit_compile=jit_compile)
    if isinstance(model, Probe):
        model.make_train_function()
    else:
        model.fit(dataset, steps_per_epoch=1, verbose=0)
    iterator = iter(dataset)
    for _ in range(WARM_UP_STEPS):
        model.train_function(iterator)
    return lambda: model.train_function(iterator)


def check_same_task(models: dict[str, keras.Model]) -> None:
    """Raises unless both distillers report the same losses after the same steps: else their times could not be compared."""
    ours, theirs = (models[name].get_metrics_result() for name in ("keras_kd", "keras"))
    for name in ("loss", "student_loss", "distillation_loss"):
        if not np.isclose(float(ours[name]), float(theirs[name]), rtol=0.02):
            raise RuntimeError(f"{name} differs: {float(ours[name])} in keras_kd, {float(theirs[name])} in keras.distillation.")


def seconds_a_step(step: Callable[[], Any], steps: int) -> float:
    """Mean time of `steps` steps, up to the moment when the last one's logs can be read."""
    start = time.perf_counter()
    for _ in range(steps):
        logs = step()
    for value in logs.values():
        np.asarray(value)
    return (time.perf_counter() - start) / steps


def interleave(steps: dict[str, Callable[[], Any]], rounds: int, steps_a_round: int) -> list[dict[str, float]]:
    """Seconds a step by variant, one dict per round; the variant that begins changes from round to round."""
    gc.collect()
    gc.freeze()  # what tracing left behind is not collected again during the rounds
    names = list(steps)
    measured = []
    for index in range(rounds):
        order = [names[(index + offset) % len(names)] for offset in range(len(names))]
        measured.append({name: seconds_a_step(steps[name], steps_a_round) for name in order})
    return measured


def summarize(values: list[float]) -> dict[str, float]:
    """Median with its 95 % interval, quartiles and extremes."""
    names = ("min", "quartile_1", "median", "quartile_3", "max")
    found = dict(zip(names, np.percentile(values, (0, 25, 50, 75, 100)), strict=True))
    resampled = np.random.default_rng(0).choice(values, (2000, len(values)))  # the bootstrap
    found["median_low"], found["median_high"] = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
    return {name: round(float(value), 6) for name, value in found.items()}


def measure(size: str, options: argparse.Namespace, dataset: tf.data.Dataset) -> dict[str, Any]:
    """All numbers of one size."""
    keras.utils.set_random_seed(0)
    student, teacher = (conv_net(SIZES[size][role], f"{size}_{role}") for role in ("student", "teacher"))
    models = make_models(student, teacher)
    jit_compile = {"auto": "auto", "on": True, "off": False}[options.jit]
    steps = {name: make_step(model, dataset, jit_compile) for name, model in models.items()}
    check_same_task(models)
    count = options.steps or SIZES[size]["steps"]
    measured = interleave(steps, options.rounds, count)
    return {
        "student": {"widths": SIZES[size]["student"], "parameters": student.count_params()},
        "teacher": {"widths": SIZES[size]["teacher"], "parameters": teacher.count_params()},
        "teacher_multiplications_per_student_multiplication": round(multiplications(teacher) / multiplications(student), 2),
        "steps_a_round": count,
        "xla": {name: bool(model.jit_compile) for name, model in models.items()},
        "seconds_a_step": {name: summarize([times[name] for times in measured]) for name in VARIANTS},
        "ratios": {name: summarize([ratio(times) for times in measured]) for name, (_, ratio) in RATIOS.items()},
    }


def describe_machine() -> dict[str, Any]:
    """Processor, cores and memory; no names and no paths."""
    model = platform.machine()
    cpuinfo, meminfo = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    memory = int(meminfo.read_text().split()[1]) / 2**20 if meminfo.exists() else None  # its first line is MemTotal, in kB
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory and round(memory, 1)}


def verdicts(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim for every size, and whether it holds: r1 by its median, r2 by the lower end of the median's interval."""
    deciding = {"r1": "median", "r2": "median_low"}
    return [
        {"size": size, "ratio": name, "limit": limit, "median": numbers["ratios"][name]["median"]}
        | {"holds": numbers["ratios"][name][deciding[name]] <= limit}
        for size, numbers in sizes.items()
        for name, limit in CLAIMS.items()
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every size and puts the result together."""
    dataset, data = load_data(options.batch_size, batches=20)
    sizes = {size: measure(size, options, dataset) for size in SIZES}
    versions = {module.__name__: module.__version__ for module in (tf, keras, keras_kd)}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions | {"python": platform.python_version()},
        "machine": describe_machine(),
        "settings": {"data": data, "batch_size": options.batch_size, "rounds": options.rounds, "jit_compile": options.jit}
        | {"temperature": TEMPERATURE, "student_loss_weight": 0.5, "optimizer": "adam", "warm_up_steps": WARM_UP_STEPS},
        "variants": VARIANTS,
        "ratios": {name: formula for name, (formula, _) in RATIOS.items()},
        "sizes": sizes,
        "claims": verdicts(sizes),
    }


def show(result: dict[str, Any]) -> None:
    """Prints times and ratios."""
    table = rich.table.Table(title=f"A training step, batch {result['settings']['batch_size']}, {result['settings']['data']}")
    table.add_column("")
    for size, numbers in result["sizes"].items():
        table.add_column(f"{size} ({numbers['student']['parameters']:,} parameters)", justify="right")
    for name, title in VARIANTS.items():
        medians = (numbers["seconds_a_step"][name]["median"] for numbers in result["sizes"].values())
        table.add_row(title, *(f"{1000 * median:.2f} ms" for median in medians))
    table.add_section()
    for name, (formula, _) in RATIOS.items():
        claim = f", claim: <= {CLAIMS[name]:.2f}" if name in CLAIMS else ""
        spreads = (numbers["ratios"][name] for numbers in result["sizes"].values())
        cells = (f"{s['median']:.3f} ({s['median_low']:.3f} to {s['median_high']:.3f})" for s in spreads)
        table.add_row(f"{name} = {formula}{claim}", *cells)
    rich.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes; default: results/, and nowhere with --quick")
    parser.add_argument("--rounds", type=int, help="rounds in which all variants take turns; default: 50, and 3 with --quick")
    parser.add_argument("--steps", type=int, help="steps of a variant in a round; default: 12 for small, 4 for middle models")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jit", choices=("auto", "on", "off"), default="auto", help="jit_compile= of all variants")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 even if a claim does not hold")
    parser.add_argument("--quick", action="store_true", help="smoke test: few steps, claims are shown but not enforced")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 50)
    options.out = options.out or (None if options.quick else RESULT)
    return options


def main() -> int:
    """Measures, shows, writes, and returns the exit status: 1 if a claim does not hold."""
    options = parse()
    result = run(options)
    show(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    broken = [claim for claim in result["claims"] if not claim["holds"]]
    for claim in broken:
        rich.print(f"Does not hold, {claim['size']} student: {claim['ratio']} = {claim['median']:.3f} > {claim['limit']:.2f}")
    return int(bool(broken) and not (options.no_check or options.quick))


if __name__ == "__main__":
    sys.exit(main())
