"""What do integers cost in accuracy, bytes and time, next to floats, and next to TF-MOT's `quantize_model`?

The claims: a file of integers gives the class of the model in training (agreement of 99.8 %, accuracy within 0.1 point); training
for integers costs at most 0.3 points against floats; it is at least as accurate as TF-MOT's, in no more bytes; and a step takes no
longer, relative to a plain one, than with TF-MOT's wrapper.

Three parts share one result file. The first, speed, takes two minutes. The second, `--quality`, fine-tunes one small student by ten
methods, three seeds each; every finished run is stored at once, and the next start goes on from there. TF-MOT needs Keras 2, so its
runs are in processes of their own: same architecture, starting weights, order of the data, steps, schedule and optimizer. The
third, `--keras`, trains the float students again, and lets Keras quantise them with `model.quantize("int8")`: about three minutes.
"""

import argparse
import gzip
import hashlib
import json
import pathlib
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pruning as pruning_benchmark  # its neighbours in this folder, as sizes is
import rich
import rich.table
import sizes
import tensorflow as tf

import keras_kd
from keras_kd import _litert, _tfmot, export, profile
from keras_kd.callbacks import KeepSparsity, Pruning, Quantization

steps_benchmark = pruning_benchmark.steps_benchmark
ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "quantization.json"
CACHE = ROOT / "runs" / "quantization"
SEEDS = (0, 1, 2)
SPARSITY = 0.8
QUALITY: dict[str, Any] = pruning_benchmark.QUALITY | {
    "sparsity": SPARSITY,
    "representative_images": 500,
    "two_fits": [8, 7],  # epochs: of pruning, then of quantization with the zeros kept
}
# What a run is, and which files it gives. Every run starts from the same student and takes as many steps.
METHODS = {
    "float": "fine-tuned in float",
    "ptq": "... its file quantised after training",
    "qat": "Quantization",
    "pruned": "Pruning to 80 %",
    "pruned_ptq": "... its file quantised after training",
    "pqat": "Pruning, Quantization in one fit",
    "pqat_global": '... scope="global"',
    "pqat_two": "Pruning, then KeepSparsity and Quantization",
    "distilled_qat": "Distiller, Quantization",
    "road": 'Distiller, Pruning(scope="global"), Quantization in one fit',
    "tfmot_qat": "TF-MOT quantize_model",
    "tfmot_pqat": "TF-MOT pruning, then PQAT",
}
AFTER = {"ptq": "float", "pruned_ptq": "pruned"}  # files that another run gives
TIMED = ("float", "ptq", "qat", "road")  # whose latency is measured


# Speed


def quantized_step(dataset: Any, jit_compile: Any, student: Any) -> Callable[[], Any]:
    """Starts `Quantization` on a model as `fit` does, and warms up; returns a function that does one step."""
    model = steps_benchmark.clone(student)
    model.compile(*pruning_benchmark.loss_and_optimizer(keras), jit_compile=jit_compile)
    model.fit(dataset, steps_per_epoch=1, verbose=0)
    callback = Quantization()
    callback.set_model(model)
    callback.on_train_begin()
    iterator = iter(dataset)

    def step() -> Any:
        callback.on_train_batch_begin(0)  # lends the model a step that rounds
        return model.train_function(iterator)

    before = model.train_function
    for _ in range(steps_benchmark.WARM_UP_STEPS):
        step()
    if not callback.quantized_model().rounding.is_begun or model.train_function is not before:
        raise RuntimeError("The steps do not round.")
    return step


def measure_steps(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of plain and of quantization-aware training in Keras 3, without XLA and with it."""
    dataset, data = steps_benchmark.load_data(64, batches=20)
    keras.utils.set_random_seed(0)
    student = steps_benchmark.conv_net(pruning_benchmark.WIDTHS, "student")
    found: dict[str, Any] = {"data": data, "batch_size": 64, "steps_a_round": steps, "rounds": rounds}
    for name, jit_compile in {"no_xla": False, "xla": True}.items():
        plain = steps_benchmark.make_step(steps_benchmark.clone(student), dataset, jit_compile)
        functions = {"plain": plain, "quantized": quantized_step(dataset, jit_compile, student)}
        found[name] = step_numbers(steps_benchmark.interleave(functions, rounds, steps))
    return found


def step_numbers(times: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds and ratios of rounds."""
    seconds = {name: steps_benchmark.summarize([one[name] for one in times]) for name in ("plain", "quantized")}
    return {"seconds_a_step": seconds, "ratio": steps_benchmark.summarize([one["quantized"] / one["plain"] for one in times])}


def tfmot_steps(rounds: int, steps: int) -> dict[str, Any]:
    """The same in Keras 2, by TF-MOT's wrapper."""
    dataset, _ = steps_benchmark.load_data(64, batches=20)
    plain = pruning_benchmark.legacy_net()
    quantized = _tfmot.load().quantization.keras.quantize_model(plain)
    functions = {}
    for name, model in {"plain": plain, "quantized": quantized}.items():
        model.compile(*pruning_benchmark.loss_and_optimizer(tf.keras))
        step, iterator = model.make_train_function(), iter(dataset)
        functions[name] = lambda step=step, iterator=iterator: step(iterator)
        for _ in range(steps_benchmark.WARM_UP_STEPS):
            functions[name]()
    return step_numbers(steps_benchmark.interleave(functions, rounds, steps))


# Quality


def cached(name: str) -> pathlib.Path:
    """Where a file of the present settings is kept; those of `--quick` have a folder of their own."""
    key = hashlib.sha256(json.dumps(QUALITY, sort_keys=True).encode()).hexdigest()[:12]
    (CACHE / key).mkdir(parents=True, exist_ok=True)
    return CACHE / key / name


def classes_of(content: bytes, x: Any) -> np.ndarray:
    """The class that a file gives each image."""
    interpreter = export.open_litert(content)
    entrance, exit_ = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(entrance, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(entrance, x)
    interpreter.invoke()
    return np.argmax(interpreter.get_tensor(exit_), axis=-1)


def classes_of_model(model: Any, x: Any) -> np.ndarray:
    """The class that a model gives each image."""
    return np.argmax(model.predict(x, batch_size=1000, verbose=0), axis=-1)


def record(method: str, seed: int, model: Any, content: bytes, sparsity: float, test: Any, start: float) -> dict[str, Any]:
    """What is stored of a run; `model` is the one whose computation the file shall have."""
    x, y = test
    of_model, of_file = classes_of_model(model, x), classes_of(content, x)
    return {
        "method": method,
        "seed": seed,
        "accuracy_model": float(np.mean(of_model == y)),
        "accuracy": float(np.mean(of_file == y)),
        "agreement": float(np.mean(of_model == of_file)),
        "bytes": len(content),
        "gzip": len(gzip.compress(content, 9)),
        "sparsity": sparsity,
        "float_operators": list(_litert.operators(content)[1]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def exported(model: Any, x: Any, folder: pathlib.Path, **options: Any) -> bytes:
    """The content of a file of the model."""
    report = export.to_litert(model, folder / "model.tflite", check_data=x[:500], tolerance=1.0, min_agreement=0.5, **options)
    return report.path.read_bytes()


def fine_tune(method: str, seed: int, student: Any, teacher: Any, data: Any, folder: pathlib.Path) -> Any:
    """Trains by one method; returns the student and, where it rounds, the callback."""
    model = trained = steps_benchmark.clone(student)
    epochs = QUALITY["epochs"]
    if method in ("distilled_qat", "road"):
        loss = keras_kd.losses.KDLoss(QUALITY["temperature"])
        trained = keras_kd.Distiller(teacher, model, loss, student_loss_weight=QUALITY["student_loss_weight"])
    quantization = None if method in ("float", "pruned") else Quantization()
    callbacks: list[Any] = []
    if method in ("pruned", "pqat", "pqat_global", "road"):
        schedule = pruning_benchmark.schedule_of(keras_kd.schedules, SPARSITY, epochs)
        callbacks.append(Pruning(schedule, scope="global" if method in ("pqat_global", "road") else "layer"))
    if method == "pqat_two":
        first, epochs = QUALITY["two_fits"]
        schedule = pruning_benchmark.schedule_of(keras_kd.schedules, SPARSITY, first)
        pruning_benchmark.train(trained, keras, *data, first, 100 + seed, [Pruning(schedule)])
        callbacks.append(KeepSparsity())
    pruning_benchmark.train(trained, keras, *data, epochs, 100 + seed, [*callbacks, *([quantization] if quantization else [])])
    return model, quantization


def run_method(method: str, seed: int, student: Any, teacher: Any, data: Any, test: Any) -> Iterator[dict[str, Any]]:
    """Trains by one method, and gives the records of its files."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, quantization = fine_tune(method, seed, student, teacher, data, folder)
        sparsity, costs = pruning_benchmark.sparsity_of(model)[0], profile.profile(model, runs=1)
        numbers = {name: getattr(costs, name) for name in ("parameters", "nonzero_parameters", "macs")}
        if quantization is not None:
            quantized = quantization.quantized_model()
            content = exported(quantized, data[0], folder, quantization="int8")
            cached(f"{method}.tflite").write_bytes(content)
            yield record(method, seed, quantized, content, sparsity, test, start) | numbers
            return
        content = exported(model, data[0], folder, quantization="float32")
        cached(f"{method}.tflite").write_bytes(content)
        yield record(method, seed, model, content, sparsity, test, start) | numbers
        after = next(name for name, source in AFTER.items() if source == method)
        images = data[0][: QUALITY["representative_images"]]
        content = exported(model, data[0], folder, quantization="int8", representative_data=images)
        cached(f"{after}.tflite").write_bytes(content)
        yield record(after, seed, model, content, sparsity, test, start) | numbers


def tfmot_quality(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """TF-MOT's runs, in a process with Keras 2."""
    tfmot = _tfmot.load()
    data, test = pruning_benchmark.load_images()
    with np.load(job["start"]) as file:
        weights = [file[f"arr_{index}"] for index in range(len(file.files))]
    for method in job["methods"]:
        begun = time.perf_counter()
        net = pruning_benchmark.legacy_net()
        net.set_weights(weights)
        if method == "tfmot_qat":
            model, epochs = tfmot.quantization.keras.quantize_model(net), QUALITY["epochs"]
        else:
            first, epochs = QUALITY["two_fits"]
            kind = tfmot.sparsity.keras
            pruned = kind.prune_low_magnitude(net, pruning_schedule=pruning_benchmark.schedule_of(kind, SPARSITY, first))
            pruning_benchmark.train(pruned, tf.keras, *data, first, 100 + job["seed"], [kind.UpdatePruningStep()])
            scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
            annotated = tfmot.quantization.keras.quantize_annotate_model(kind.strip_pruning(pruned))
            model = tfmot.quantization.keras.quantize_apply(annotated, scheme)
        pruning_benchmark.train(model, tf.keras, *data, epochs, 100 + job["seed"], [])
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        with _litert.quiet_tensorflow():
            content = converter.convert()
        yield record(method, job["seed"], model, content, legacy_sparsity(model), test, begun)


def legacy_sparsity(model: Any) -> float:
    """Share of zeros in the kernels of TF-MOT's wrapped layers."""
    kernels = [weight.numpy() for weight in model.weights if weight.name.endswith("/kernel:0")]  # not kernel_min, kernel_max
    return sum(int(np.sum(kernel == 0)) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def load_teacher(settings: dict[str, Any]) -> Any:
    """The teacher, from the cache if it was trained with these settings."""
    keras.utils.set_random_seed(1000)
    teacher = steps_benchmark.conv_net(pruning_benchmark.TEACHER_WIDTHS, "teacher")
    path = cached("teacher.weights.h5")
    if path.exists():
        teacher.load_weights(path)
    else:
        data = pruning_benchmark.load_images(settings["teacher_images"])[0]
        pruning_benchmark.train(teacher, keras, *data, settings["teacher_epochs"], 1000, [])
        teacher.save_weights(path)
    return teacher


def started(seed: int, data: Any) -> Any:
    """The student that every method of a seed begins with."""
    keras.utils.set_random_seed(seed)
    student = steps_benchmark.conv_net(pruning_benchmark.WIDTHS, "student")
    pruning_benchmark.train(student, keras, *data, QUALITY["start_epochs"], seed, [])
    return student


def run_quality(stored: dict[str, Any], quick: bool, store: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains whatever is missing in `stored`."""
    if quick:
        QUALITY.update(epochs=1, start_epochs=1, teacher_epochs=1, teacher_images=6000, two_fits=[1, 1])
    settings = json.loads(json.dumps(QUALITY))
    quality = stored if stored.get("settings") == settings else {"settings": settings, "start": {}, "runs": []}
    seeds = SEEDS[:1] if quick else SEEDS
    done = {(run["seed"], run["method"]) for run in quality["runs"]}
    plan = {(seed, method) for seed in seeds for method in METHODS} - done
    if not plan and "latency" in quality:
        return quality
    plan |= {(seeds[-1], name) for name in TIMED if not cached(f"{name}.tflite").exists()}  # on another machine
    data, test = pruning_benchmark.load_images()
    teacher = load_teacher(settings)
    quality["teacher"] = {"accuracy": pruning_benchmark.accuracy_of(teacher, *test)}

    def keep(found: dict[str, Any]) -> None:
        others = [run for run in quality["runs"] if (run["seed"], run["method"]) != (found["seed"], found["method"])]
        quality["runs"] = [*others, found]
        store(quality)
        print(json.dumps(found), flush=True)

    for seed in seeds:
        missing = [method for method in METHODS if (seed, method) in plan]
        if not missing:
            continue
        student = started(seed, data)
        quality["start"][str(seed)] = pruning_benchmark.accuracy_of(student, *test)
        for method in dict.fromkeys(AFTER.get(method, method) for method in missing if not method.startswith("tfmot")):
            for found in run_method(method, seed, student, teacher, data, test):
                if found["method"] in missing:
                    keep(found)
        theirs = [method for method in missing if method.startswith("tfmot")]
        if theirs:
            path = cached("start.npz")
            np.savez(path, *student.get_weights())
            job = {"part": "quality", "start": str(path), "methods": theirs, "seed": seed, "settings": settings}
            for found in pruning_benchmark.legacy(job, __file__):
                keep(found)
    quality["latency"] = measure_latencies(teacher, data)
    return quality


def run_keras(quick: bool) -> dict[str, Any]:
    """Keras' own quantization after training, of the float students."""
    if quick:
        QUALITY.update(epochs=1, start_epochs=1)
    data, test = pruning_benchmark.load_images()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS[:1] if quick else SEEDS:
            student, _ = fine_tune("float", seed, started(seed, data), None, data, pathlib.Path(folder))
            found.append({"seed": seed} | keras_record(student, test, pathlib.Path(folder)))
            print(json.dumps(found[-1]), flush=True)
    return {"settings": {name: QUALITY[name] for name in ("images", "epochs", "start_epochs")}, "runs": found}


def keras_record(student: Any, test: tuple[Any, Any], folder: pathlib.Path) -> dict[str, Any]:
    """What `quantize("int8")` makes of a student; the bytes of its weights are a lower bound for those of any file."""
    quantized = steps_benchmark.clone(student)  # without an optimizer, which the file would hold
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Layer .* does not have a `quantize` method")  # convolutions, among others
        quantized.quantize("int8")
    quantized.save(folder / "int8.keras")
    try:
        quantized.export(folder / "int8.tflite", format="litert", verbose=False)
        error = None
    except Exception as refused:  # TensorFlow's converter has classes of its own
        text = str(refused)
        error = str((re.findall(r"'tfl\.[^\n]*", text) or text.splitlines() or [repr(refused)])[0])
    classes = [classes_of_model(model, test[0]) for model in (student, quantized)]
    return {
        "float_accuracy": float(np.mean(classes[0] == test[1])),
        "accuracy": float(np.mean(classes[1] == test[1])),
        "agreement": float(np.mean(classes[0] == classes[1])),
        "integer_layers": [layer.name for layer in quantized.layers if getattr(layer, "quantization_mode", None)],
        "weight_bytes": sum(weight.value.numpy().nbytes for weight in quantized.weights),
        "keras_bytes": (folder / "int8.keras").stat().st_size,
        "litert_error": error,
    }


def measure_latencies(teacher: Any, data: Any) -> dict[str, Any]:
    """Milliseconds of one image in LiteRT, one thread: files of the last seed, in turns; with multiplications and weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "teacher.tflite"
        export.to_litert(teacher, path, check_data=data[0][:64])
        files = {"teacher": path.read_bytes()}
    for name in TIMED:
        files[name] = cached(f"{name}.tflite").read_bytes()
    rounds = [{name: profile.measure_latency(content, runs=300).median for name, content in files.items()} for _ in range(9)]
    found: dict[str, Any] = {
        name: {"milliseconds": steps_benchmark.summarize([one[name] for one in rounds]), "bytes": len(content)}
        for name, content in files.items()
    }
    student = steps_benchmark.conv_net(pruning_benchmark.WIDTHS, "student")
    for name, model in (("teacher", teacher), ("student", student)):
        measured = profile.profile(model, runs=1)
        found[f"{name}_parameters"], found[f"{name}_macs"] = measured.parameters, measured.macs
    return found


def summary_of(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over the seeds, of the runs there are."""
    rows = []
    for method in METHODS:
        runs = [run for run in quality["runs"] if run["method"] == method]
        if not runs:
            continue
        row: dict[str, Any] = {"method": method, "seeds": len(runs)}
        for name in ("accuracy", "accuracy_model", "agreement", "bytes", "gzip", "sparsity"):
            row[name] = round(float(np.mean([run[name] for run in runs])), 5)
        row["accuracy_std"] = round(float(np.std([run["accuracy"] for run in runs], ddof=1)), 5) if len(runs) > 1 else None
        rows.append(row)
    return rows


# Together


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim about what has been measured, and whether it holds."""
    claims = []

    def claim(text: str, found: float, limit: float, at_least: bool) -> None:
        holds = found >= limit if at_least else found <= limit
        bound = f"{'>=' if at_least else '<='} {round(limit, 6)}"
        claims.append({"claim": text, "limit": bound, "found": round(found, 6), "holds": bool(holds)})

    if "speed" in result:
        ours, theirs = (result["speed"][name]["ratio"]["median"] for name in ("no_xla", "tfmot"))
        claim("step with Quantization / plain step, against TF-MOT's ratio", ours, theirs, False)
    rows = {row["method"]: row for row in result.get("quality", {}).get("summary", [])}
    if set(METHODS) <= rows.keys():
        mine = [run for run in result["quality"]["runs"] if run["method"] in METHODS and not run["method"].startswith("tfmot")]
        mine = [run for run in mine if run["method"] not in ("float", "pruned", *AFTER)]
        claim("agreement of file and model in training, lowest run", min(run["agreement"] for run in mine), 0.998, True)
        gaps = [abs(run["accuracy"] - run["accuracy_model"]) for run in mine]
        claim("accuracy of file and model, mean gap", float(np.mean(gaps)), 0.001, False)
        claim("accuracy of file and model, largest gap", max(gaps), 0.001, False)
        claim(
            "Quantization's accuracy, against floats less 0.3 points",
            rows["qat"]["accuracy"],
            rows["float"]["accuracy"] - 0.003,
            True,
        )
        for name, other in (("qat", "tfmot_qat"), ("pqat_two", "tfmot_pqat")):
            claim(f"accuracy of {name}, against {other}", rows[name]["accuracy"], rows[other]["accuracy"], True)
            claim(f"bytes of {name}, against {other}", rows[name]["bytes"], rows[other]["bytes"], False)
            claim(f"gzip bytes of {name}, against {other}", rows[name]["gzip"], rows[other]["gzip"], False)
    return claims


def show(result: dict[str, Any]) -> None:
    """Prints what there is."""
    if "speed" in result:
        for name in ("no_xla", "xla", "tfmot"):
            ratio = result["speed"][name]["ratio"]
            rich.print(
                f"Step / plain step, {name}: {ratio['median']:.3f} ({ratio['median_low']:.3f} to {ratio['median_high']:.3f})"
            )
    if result.get("quality", {}).get("summary"):
        table = rich.table.Table(
            "", "file", "model", "agreement", "bytes", "gzip", "zeros", title="Means of the seeds, accuracy in %"
        )
        for row in result["quality"]["summary"]:
            accuracy = f"{100 * row['accuracy']:.2f} ± {100 * (row['accuracy_std'] or 0):.2f}"
            numbers = (f"{row['bytes']:,.0f}", f"{row['gzip']:,.0f}", f"{row['sparsity']:.0%}")
            shares = (f"{100 * row['accuracy_model']:.2f}", f"{100 * row['agreement']:.2f}")
            table.add_row(METHODS[row["method"]], accuracy, *shares, *numbers)
        rich.print(table)


def main() -> int:
    """Measures, shows, writes; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quality", action="store_true", help="accuracies, about half an hour; goes on where it was stopped")
    parser.add_argument("--keras", action="store_true", help="Keras' own quantization after training, about three minutes")
    parser.add_argument("--quick", action="store_true", help="smoke test of the part: nothing is written, no claim enforced")
    parser.add_argument("--legacy", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.legacy:
        QUALITY.update(options.legacy.get("settings", {}))
        found = tfmot_quality(options.legacy) if options.legacy["part"] == "quality" else [tfmot_steps(**options.legacy["speed"])]
        for one in found:
            print(json.dumps(one), flush=True)
        return 0
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() and not options.quick else {}

    def store(part: str, numbers: dict[str, Any]) -> None:
        if part == "quality":
            numbers["summary"] = summary_of(numbers)
        path = None if options.quick else RESULT
        pruning_benchmark.store_part(result, part, numbers, verdicts, path, is_timed=part != "keras")
        if not options.quick and {"quality", "keras"} <= result.keys() and "latency" in result["quality"]:
            sizes.draw(result)

    if options.quality:
        store("quality", run_quality(result.get("quality", {}), options.quick, lambda numbers: store("quality", numbers)))
    elif options.keras:
        store("keras", run_keras(options.quick))
    else:
        rounds = {"rounds": 2 if options.quick else 20, "steps": 50}
        theirs = next(pruning_benchmark.legacy({"part": "speed", "speed": rounds}, __file__))
        store("speed", measure_steps(**rounds) | {"tfmot": theirs})
    show(result)
    return pruning_benchmark.exit_code(result, options.quick)


if __name__ == "__main__":
    sys.exit(main())
