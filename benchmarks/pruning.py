"""What do pruning's masks cost in training, in bytes and in accuracy, next to plain training and to TF-MOT's `prune_low_magnitude`?

The claims: training with `keras_kd.callbacks.Pruning` takes at most 1.05 times plain training; a mask update of a 5000x5000 kernel
is at least 8 times faster than TF-MOT's, and gives the same mask; every run of the quality part reaches its sparsity.

Two parts share one result file. The first (speed, mask update, size) takes a minute or two. The second, `--quality`, fine-tunes
one small student at four sparsities by five methods, three seeds each; every finished run is stored at once, and the next start
goes on from there. TF-MOT's wrapper needs Keras 2, so its runs are in processes of their own (`TF_USE_LEGACY_KERAS=1`): same
architecture, starting weights, order of the data, schedule and optimizer.
"""

import argparse
import contextlib
import datetime
import gzip
import importlib
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import distiller as steps_benchmark  # its neighbour in this folder
import keras
import numpy as np
import rich
import rich.table
import tensorflow as tf

import keras_kd
from keras_kd import _tfmot
from keras_kd.callbacks import _masks

RESULT = pathlib.Path(__file__).parent / "results" / "pruning.json"
WIDTHS = (16, 32, 32)
TEACHER_WIDTHS = (48, 96, 96)
LEARNING_RATE = 2e-3
FREQUENCY = 100  # of the speed part: a round of 100 steps has one update of the masks
SIDE = 5000
SIZE_SPARSITY = 0.8
CLAIMS = {"step": 1.05, "mask_update": 8.0}

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SEEDS = (0, 1, 2)
METHODS = {
    "layer": "Pruning",
    "global": 'Pruning, scope="global"',
    "distilled": "Pruning and distilling",
    "distilled_global": 'Pruning and distilling, scope="global"',
    "tfmot": "TF-MOT prune_low_magnitude",
}
UNPRUNED = {"dense": "not pruned", "dense_distilled": "not pruned, distilling"}
QUALITY: dict[str, Any] = {
    "images": 6000,
    "teacher_images": 60000,
    "batch_size": 64,
    "teacher_epochs": 8,
    "start_epochs": 20,
    "epochs": 15,
    "frequency": 20,
    "temperature": 1.0,  # the best of 1, 2 and 4, by training images beyond the first 50,000 and a seed that is none of these
    "student_loss_weight": 0.1,
    "optimizer": "adam, 2e-3 with cosine decay to 0, in every training",
    "student": list(WIDTHS),
    "teacher": list(TEACHER_WIDTHS),
}


def loss_and_optimizer(kind: Any, steps: int | None = None) -> tuple[Any, Any]:
    """Of Keras 3 or of `tf.keras`; with `steps` the learning rate falls to 0 in them."""
    rate = LEARNING_RATE if steps is None else kind.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    return kind.optimizers.Adam(rate), kind.losses.SparseCategoricalCrossentropy(from_logits=True)


# Speed


def pruned_step(dataset: Any, jit_compile: Any, schedule: Any, student: Any) -> tuple[Callable[[], Any], Any]:
    """Starts `Pruning` on a model as `fit` does, and warms up; returns a function that does one step, and the callback."""
    model = steps_benchmark.clone(student)
    model.compile(*loss_and_optimizer(keras), jit_compile=jit_compile)
    model.fit(dataset, steps_per_epoch=1, verbose=0)
    callback = keras_kd.callbacks.Pruning(schedule)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_train_batch_begin(0)
    iterator = iter(dataset)
    for _ in range(steps_benchmark.WARM_UP_STEPS):
        model.train_function(iterator)
    return lambda: model.train_function(iterator), callback


def measure_steps(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of plain and of pruned training in Keras 3, without XLA and with it."""
    dataset, data = steps_benchmark.load_data(64, batches=20)
    keras.utils.set_random_seed(0)
    student = steps_benchmark.conv_net(WIDTHS, "student")
    found: dict[str, Any] = {"data": data, "batch_size": 64, "steps_a_round": steps, "parameters": student.count_params()}
    for name, jit_compile in {"no_xla": False, "xla": True}.items():
        schedule = keras_kd.schedules.PolynomialDecay(0.0, 0.8, 0, (rounds + 1) * steps, frequency=FREQUENCY)
        pruned, callback = pruned_step(dataset, jit_compile, schedule, student)
        plain = steps_benchmark.make_step(steps_benchmark.clone(student), dataset, jit_compile)
        times = steps_benchmark.interleave({"plain": plain, "pruned": pruned}, rounds, steps)
        found[name] = step_numbers(times) | {"sparsity": round(callback.sparsities()["sparsity"], 3)}
    return found


def step_numbers(times: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds and ratios of rounds."""
    seconds = {name: steps_benchmark.summarize([one[name] for one in times]) for name in ("plain", "pruned")}
    return {"seconds_a_step": seconds, "ratio": steps_benchmark.summarize([one["pruned"] / one["plain"] for one in times])}


def tfmot_steps(rounds: int, steps: int) -> dict[str, Any]:
    """The same in Keras 2, by TF-MOT's wrapper and its callback, which sets each layer's step before every batch."""
    pruning = _tfmot.load().sparsity.keras
    dataset, _ = steps_benchmark.load_data(64, batches=20)
    plain, inner = legacy_net(), legacy_net()
    inner.set_weights(plain.get_weights())
    pruned = pruning.prune_low_magnitude(
        inner, pruning_schedule=pruning.PolynomialDecay(0.0, 0.8, 0, (rounds + 1) * steps, frequency=FREQUENCY)
    )
    functions = {}
    for name, model in {"plain": plain, "pruned": pruned}.items():
        model.compile(*loss_and_optimizer(tf.keras))
        functions[name] = model.make_train_function()
    callback = pruning.UpdatePruningStep()
    callback.set_model(pruned)
    callback.on_train_begin()
    iterators = {name: iter(dataset) for name in functions}

    def plain_step() -> Any:
        return functions["plain"](iterators["plain"])

    def pruned_step() -> Any:
        callback.on_train_batch_begin(0)
        return functions["pruned"](iterators["pruned"])

    for _ in range(steps_benchmark.WARM_UP_STEPS):
        plain_step(), pruned_step()
    times = steps_benchmark.interleave({"plain": plain_step, "pruned": pruned_step}, rounds, steps)
    callback.on_epoch_end(0)
    return step_numbers(times) | {"sparsity": round(sparsity_of(pruning.strip_pruning(pruned))[0], 3)}


def legacy_net() -> Any:
    """The student in Keras 2 (`tf.keras`, in a process with TF_USE_LEGACY_KERAS=1)."""
    layers = tf.keras.layers
    model = tf.keras.Sequential([tf.keras.Input((28, 28, 1))])
    for index, width in enumerate(WIDTHS):
        model.add(layers.Conv2D(width, 3, strides=2 if index < 2 else 1, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model


# Mask update


def measure_masks(rounds: int, side: int) -> dict[str, Any]:
    """Seconds of one mask update of a square kernel; raises if the masks differ."""
    _tfmot.load()
    implementation = importlib.import_module("tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl")
    schedule = keras_kd.schedules.ConstantSparsity(0.8, begin_step=0, frequency=1)
    theirs = implementation.Pruning(lambda: tf.constant(1), [], schedule, (1, 1), "AVG")
    kernel = tf.Variable(tf.random.stateless_normal((side, side), seed=(0, 0)))
    options: dict[str, Any] = {"block_size": (1, 1), "pooling": "AVG", "together": False, "xla": False}
    functions = {
        "keras_kd": tf.function(lambda: _masks.magnitude_masks([kernel.value()], 0.8, **options)[0]),
        "tfmot": tf.function(lambda: theirs._update_mask(kernel.value())[1]),
    }
    if not np.array_equal(functions["keras_kd"]().numpy(), functions["tfmot"]().numpy()):  # the warm-up, too
        raise RuntimeError("The masks of keras_kd and of TF-MOT differ.")
    times = []
    for index in range(rounds):
        names = list(functions)[:: 1 if index % 2 else -1]
        times.append({name: seconds(functions[name]) for name in names})
    return {
        "shape": [side, side],
        "rounds": rounds,
        "seconds": {name: steps_benchmark.summarize([one[name] for one in times]) for name in functions},
        "ratio": steps_benchmark.summarize([one["tfmot"] / one["keras_kd"] for one in times]),
    }


def seconds(function: Callable[[], Any]) -> float:
    """Time of one call, up to the moment when its result can be read."""
    start = time.perf_counter()
    function()[:1, :1].numpy()
    return time.perf_counter() - start


# Size


def measure_sizes(epochs: int) -> dict[str, Any]:
    """Bytes of a dense student, and of one pruned while it trained, as they are, after gzip, and in the converter's sparse form."""
    (x, y), _ = load_images()
    batches = len(x) // QUALITY["batch_size"]
    found: dict[str, Any] = {"epochs": epochs, "sparsity": SIZE_SPARSITY}
    for name in ("dense", "sparse"):
        keras.utils.set_random_seed(0)
        student = steps_benchmark.conv_net(WIDTHS, "student")
        end = epochs * batches * 2 // 3 // 20 * 20
        schedule = keras_kd.schedules.PolynomialDecay(0.0, SIZE_SPARSITY, 0, end, frequency=20)
        callbacks = [] if name == "dense" else [keras_kd.callbacks.Pruning(schedule)]
        student.compile(*loss_and_optimizer(keras), jit_compile=False)
        student.fit(
            order(x, y, epochs, seed=0), epochs=epochs, steps_per_epoch=batches, callbacks=callbacks, shuffle=False, verbose=0
        )
        with tempfile.TemporaryDirectory() as folder:
            report = keras_kd.export.to_litert(student, pathlib.Path(folder) / "student.tflite", check_data=x[:64])
        numbers: dict[str, Any] = {"reached_sparsity": sparsity_of(student)[0], "bytes": report.size, "gzip": report.gzip_size}
        converter = tf.lite.TFLiteConverter.from_keras_model(student)
        converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        with contextlib.redirect_stdout(io.StringIO()):  # the signatures
            content = converter.convert()
        found[name] = numbers | {
            "experimental_sparsity_bytes": len(content),
            "experimental_sparsity_gzip": len(gzip.compress(content, 9)),
            "experimental_sparsity_max_difference": difference(content, student, x[:16]),
        }
    return found


def difference(content: bytes, model: Any, x: Any) -> float:
    """How far a file's outputs are from the model's, at most; raises if LiteRT cannot run it."""
    interpreter = tf.lite.Interpreter(model_content=content)
    entrance, exit_ = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(entrance, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(entrance, x)
    interpreter.invoke()
    return float(np.max(np.abs(interpreter.get_tensor(exit_) - model.predict(x, verbose=0))))


# Quality


def load_images(count: int = QUALITY["images"]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Fashion-MNIST: the first training images, and all test images."""
    (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    scaled = [(images[..., None] / 255.0).astype("float32") for images in (x[:count], x_test)]
    return (scaled[0], y[:count].astype("int64")), (scaled[1], y_test.astype("int64"))


def order(x: Any, y: Any, epochs: int, seed: int) -> tf.data.Dataset:
    """Batches of all epochs, each epoch in an order of its own; the same in every process."""
    generator, size = np.random.default_rng(seed), QUALITY["batch_size"]
    steps = len(x) // size
    places = np.concatenate([generator.permutation(len(x))[: steps * size].reshape(steps, size) for _ in range(epochs)])
    images, labels = tf.constant(x), tf.constant(y)
    return tf.data.Dataset.from_tensor_slices(places).map(lambda i: (tf.gather(images, i), tf.gather(labels, i))).prefetch(2)


def train(model: Any, kind: Any, x: Any, y: Any, epochs: int, seed: int, callbacks: list[Any]) -> None:
    """Every training of this part, in Keras 3 and in Keras 2."""
    steps = len(x) // QUALITY["batch_size"]
    model.compile(*loss_and_optimizer(kind, epochs * steps), jit_compile=False)
    model.fit(order(x, y, epochs, seed), epochs=epochs, steps_per_epoch=steps, callbacks=callbacks, shuffle=False, verbose=0)


def accuracy_of(model: Any, x: Any, y: Any) -> float:
    """Share of the test images."""
    return float(np.mean(np.argmax(model.predict(x, batch_size=1000, verbose=0), axis=-1) == y))


def sparsity_of(model: Any) -> tuple[float, float]:
    """Share of zeros in all kernels, and how far rounding may move it: half a weight for each kernel."""
    kernels = [np.asarray(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")]
    total = sum(kernel.size for kernel in kernels)
    return sum(int(np.sum(kernel == 0)) for kernel in kernels) / total, 0.5 * len(kernels) / total


def schedule_of(kind: Any, sparsity: float, epochs: int) -> Any:
    """From 0 to the sparsity in two thirds of the steps; the last update is at the end, a multiple of the frequency."""
    steps, frequency = epochs * (QUALITY["images"] // QUALITY["batch_size"]), QUALITY["frequency"]
    end = max(steps * 2 // 3 // frequency, 1) * frequency
    return kind.PolynomialDecay(0.0, sparsity, 0, end, frequency=frequency)


def finish(method: str, sparsity: float, seed: int, model: Any, test: tuple[Any, Any], start: float) -> dict[str, Any]:
    """The record of one run."""
    reached, rounding = sparsity_of(model)
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": accuracy_of(model, *test),
        "reached_sparsity": reached,
        "sparsity_holds": abs(reached - sparsity) <= rounding + 1e-9,
        "seconds": round(time.perf_counter() - start, 1),
    }


def fine_tune(
    method: str, sparsity: float, seed: int, student: Any, teacher: Any, train_data: Any, test: Any, epochs: int
) -> dict[str, Any]:
    """One run of keras_kd's methods."""
    begun = time.perf_counter()
    model = trained = steps_benchmark.clone(student)
    if "distilled" in method:
        loss = keras_kd.losses.KDLoss(QUALITY["temperature"])
        trained = keras_kd.Distiller(teacher, model, loss, student_loss_weight=QUALITY["student_loss_weight"])
    callbacks = []
    if method in METHODS:
        scope = "global" if "global" in method else "layer"
        callbacks = [keras_kd.callbacks.Pruning(schedule_of(keras_kd.schedules, sparsity, epochs), scope=scope)]
    train(trained, keras, *train_data, epochs, 100 + seed, callbacks)
    return finish(method, sparsity, seed, model, test, begun)


def tfmot_quality(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """TF-MOT's runs, in a process with Keras 2."""
    pruning = _tfmot.load().sparsity.keras
    train_data, test = load_images()
    with np.load(job["start"]) as file:
        weights = [file[f"arr_{index}"] for index in range(len(file.files))]
    for sparsity in job["sparsities"]:
        begun = time.perf_counter()
        inner = legacy_net()
        inner.set_weights(weights)
        model = pruning.prune_low_magnitude(inner, pruning_schedule=schedule_of(pruning, sparsity, job["epochs"]))
        train(model, tf.keras, *train_data, job["epochs"], 100 + job["seed"], [pruning.UpdatePruningStep()])
        stripped = pruning.strip_pruning(model)
        yield finish("tfmot", sparsity, job["seed"], stripped, test, begun)


def legacy(job: dict[str, Any], script: str = __file__) -> Iterator[dict[str, Any]]:
    """Runs a script again, with Keras 2 as `tf.keras`, and gives what it prints, at once."""
    command = [sys.executable, str(pathlib.Path(script).resolve()), "--legacy", json.dumps(job)]
    environment = os.environ | {"TF_USE_LEGACY_KERAS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or []:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"The process with TF-MOT ended with {process.returncode}.")


def legacy_main(job: dict[str, Any]) -> int:
    """What the process with Keras 2 does."""
    found = tfmot_quality(job) if job["part"] == "quality" else [tfmot_steps(job["rounds"], job["steps"])]
    for record in found:
        print(json.dumps(record), flush=True)
    return 0


def run_quality(stored: dict[str, Any], quick: bool, store: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains whatever is missing in `stored`."""
    settings = QUALITY | ({"epochs": 1, "start_epochs": 1, "teacher_epochs": 1} if quick else {})
    quality = stored if stored.get("settings") == settings else {"settings": settings, "teacher": {}, "start": {}, "runs": []}
    seeds, sparsities = (SEEDS[:1], SPARSITIES[1:2]) if quick else (SEEDS, SPARSITIES)
    plan = [(seed, method, 0.0) for seed in seeds for method in UNPRUNED]
    plan += [(seed, method, sparsity) for seed in seeds for sparsity in sparsities for method in METHODS]
    done = {(run["seed"], run["method"], run["sparsity"]) for run in quality["runs"]}
    missing = [item for item in plan if item not in done]
    if not missing:
        return quality
    train_data, test = load_images()

    def keep(record: dict[str, Any]) -> None:
        quality["runs"].append(record)
        store(quality)
        print(json.dumps(record), flush=True)

    keras.utils.set_random_seed(1000)
    teacher = steps_benchmark.conv_net(TEACHER_WIDTHS, "teacher")
    train(teacher, keras, *load_images(settings["teacher_images"])[0], settings["teacher_epochs"], 1000, [])
    quality["teacher"] = {"parameters": teacher.count_params(), "accuracy": accuracy_of(teacher, *test)}
    for seed in dict.fromkeys(seed for seed, _, _ in missing):
        keras.utils.set_random_seed(seed)
        student = steps_benchmark.conv_net(WIDTHS, "student")
        train(student, keras, *train_data, settings["start_epochs"], seed, [])
        quality["start"][str(seed)] = accuracy_of(student, *test)
        print(f"seed {seed}: start {quality['start'][str(seed)]:.4f}, teacher {quality['teacher']['accuracy']:.4f}", flush=True)
        mine = [(method, sparsity) for its, method, sparsity in missing if its == seed]
        for method, sparsity in mine:
            if method != "tfmot":
                keep(fine_tune(method, sparsity, seed, student, teacher, train_data, test, settings["epochs"]))
        theirs = [sparsity for method, sparsity in mine if method == "tfmot"]
        if theirs:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "start.npz"
                np.savez(path, *student.get_weights())
                job = {"part": "quality", "start": str(path), "sparsities": theirs, "seed": seed, "epochs": settings["epochs"]}
                for record in legacy(job):
                    keep(record)
    return quality


def summary_of(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and standard deviation by method and sparsity, of the runs there are."""
    rows = []
    for method in (*UNPRUNED, *METHODS):
        for sparsity in (0.0, *SPARSITIES):
            found = [run["accuracy"] for run in quality["runs"] if (run["method"], run["sparsity"]) == (method, sparsity)]
            if found:
                spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
                row = {"method": method, "sparsity": sparsity, "mean": round(float(np.mean(found)), 5)}
                rows.append(row | {"std": spread and round(spread, 5), "seeds": len(found)})
    return rows


# Together


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim about what has been measured, and whether it holds."""
    claims = []
    for name in ("no_xla", "xla") if "speed" in result else ():
        ratio = result["speed"][name]["ratio"]["median"]
        claim = {"claim": f"pruned step / plain step, {name}", "limit": f"<= {CLAIMS['step']}", "found": ratio}
        claims.append(claim | {"holds": ratio <= CLAIMS["step"]})
    if "mask_update" in result:
        ratio = result["mask_update"]["ratio"]["median"]
        claim = {"claim": "TF-MOT's mask update / ours", "limit": f">= {CLAIMS['mask_update']}", "found": ratio}
        claims.append(claim | {"holds": ratio >= CLAIMS["mask_update"]})
    runs = [run for run in result.get("quality", {}).get("runs", []) if run["sparsity"]]
    if runs:
        reached = sum(run["sparsity_holds"] for run in runs)
        claim = {"claim": "runs that reach their sparsity", "limit": f">= {len(runs)}", "found": reached}
        claims.append(claim | {"holds": reached == len(runs)})
    return claims


def store_part(
    result: dict[str, Any], part: str, numbers: dict[str, Any], judge: Any, path: pathlib.Path | None, *, is_timed: bool = True
) -> None:
    """Puts a part into the results, with versions, claims and, where it is timed, the machine; writes them if there is a path."""
    result["versions"] = {module.__name__: module.__version__ for module in (tf, keras, keras_kd, _tfmot.load())}
    result["versions"]["python"] = platform.python_version()
    if is_timed or "machine" not in result:
        result["machine"] = steps_benchmark.describe_machine()
    result[part] = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()} | numbers
    result["claims"] = judge(result)
    if path is not None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(result, indent=2) + "\n")
        new.replace(path)


def exit_code(result: dict[str, Any], quick: bool) -> int:
    """1 if a claim does not hold, after saying which."""
    broken = [claim for claim in result["claims"] if not claim["holds"]]
    for claim in broken:
        rich.print(f"Does not hold: {claim['claim']} = {claim['found']}, claimed: {claim['limit']}")
    return int(bool(broken) and not quick)


def show(result: dict[str, Any]) -> None:
    """Prints what there is."""
    if "speed" in result:
        table = rich.table.Table("", "plain", "pruned", "ratio", title="A training step, batch 64")
        names = {"no_xla": "keras_kd Pruning", "xla": "keras_kd Pruning, XLA", "tfmot": "TF-MOT, Keras 2"}
        for name, title in names.items():
            numbers = result["speed"][name]
            times = (f"{1e3 * numbers['seconds_a_step'][kind]['median']:.2f} ms" for kind in ("plain", "pruned"))
            ratio = numbers["ratio"]
            table.add_row(title, *times, f"{ratio['median']:.3f} ({ratio['median_low']:.3f} to {ratio['median_high']:.3f})")
        rich.print(table)
    if "mask_update" in result:
        numbers = result["mask_update"]
        times = ", ".join(f"{name} {1e3 * spread['median']:.0f} ms" for name, spread in numbers["seconds"].items())
        rich.print(f"Mask update of {numbers['shape']}: {times}, ratio {numbers['ratio']['median']:.1f}")
    if "size" in result:
        rich.print("Bytes:", {name: result["size"][name] for name in ("dense", "sparse")})
    if result.get("quality", {}).get("summary"):
        quality = result["quality"]
        found = {(row["method"], row["sparsity"]): row for row in quality["summary"]}
        columns = ("0 %", *(f"{100 * sparsity:.0f} %" for sparsity in SPARSITIES))
        table = rich.table.Table("", *columns, title="Accuracy in %, mean and deviation of the seeds")
        for method, title in (UNPRUNED | METHODS).items():
            rows = (found.get((method, sparsity)) for sparsity in (0.0, *SPARSITIES))
            table.add_row(title, *(f"{100 * row['mean']:.2f} ± {100 * (row['std'] or 0):.2f}" if row else "" for row in rows))
        rich.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quality", action="store_true", help="the accuracies, about half an hour; goes on where it was stopped")
    parser.add_argument("--quick", action="store_true", help="smoke test of the part: nothing is written, no claim enforced")
    parser.add_argument("--legacy", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Measures, shows, writes; returns 1 if a claim does not hold."""
    options = parse()
    if options.legacy:
        return legacy_main(options.legacy)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() and not options.quick else {}

    def store(part: str, numbers: dict[str, Any]) -> None:
        if part == "quality":
            numbers["summary"] = summary_of(numbers)
        store_part(result, part, numbers, verdicts, None if options.quick else RESULT)

    if options.quality:
        store("quality", run_quality(result.get("quality", {}), options.quick, lambda numbers: store("quality", numbers)))
    else:
        rounds, steps = (2, 100) if options.quick else (20, FREQUENCY)
        theirs = next(legacy({"part": "speed", "rounds": rounds, "steps": steps}))
        store("speed", measure_steps(rounds, steps) | {"rounds": rounds, "tfmot": theirs})
        store("mask_update", measure_masks(1, 500) if options.quick else measure_masks(5, SIDE))
        store("size", measure_sizes(1 if options.quick else 4))
    show(result)
    return exit_code(result, options.quick)


if __name__ == "__main__":
    sys.exit(main())
