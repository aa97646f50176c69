"""What does the analysis cost, and does it tell the truth?

The claims: `LinearProbe.adapt` on 60,000 rows of 512 features takes at most 3 times the product of the centred float64 features
with themselves; the whole analysis of the demo's teacher on 10,000 Fashion-MNIST images takes at most 4 times the passes that it
needs (a clean one, a noisy one, a Jacobian-vector product and a gradient); and both grow in proportion to the number of samples.

The evidence claims nothing beforehand: it puts what the cheap measures say of each channel and layer beside what removing it costs
on images that neither the teacher nor the measures have seen.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import distiller as steps_benchmark  # its neighbours in this folder
import keras
import numpy as np
import pruning as pruning_benchmark
import rich
import rich.table
import scipy.stats
import tensorflow as tf
from sklearn.linear_model import LogisticRegression, Ridge

import keras_kd
from keras_kd import analysis, demo
from keras_kd._moments import Moments, ridge

ROOT = pathlib.Path(__file__).parents[1]
RESULT = pathlib.Path(__file__).parent / "results" / "analysis.json"
TEACHER = ROOT / "runs" / "analysis" / "teacher.keras"
LIMITS = {"probe": 3.0, "analysis": 4.0}
SIZES = [(15000, 512), (30000, 512), (60000, 512), (60000, 128), (60000, 256), (60000, 1024)]
CLASSES = 10
IMAGES = (2500, 5000, 10000)
TEACHER_EPOCHS = 10
CRITERIA = ("cost", "redundancy", "taylor", "fisher", "l1", "l2", "random")
RATIOS = (0.25, 0.5, 0.75)


def make_data(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features in which ten classes are centres in noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, rows)
    centres = rng.normal(size=(CLASSES, width))
    return (centres[labels] + 5 * rng.normal(size=(rows, width))).astype("float32"), labels


def product(x: np.ndarray) -> np.ndarray:
    """The scatter matrix, as one product."""
    centred = x.astype("float64") - x.mean(0, dtype="float64")
    return centred.T @ centred


def seconds(function: Callable[[], Any]) -> float:
    """Time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_probe(rows: int, width: int, rounds: int) -> dict[str, Any]:
    """Times of one size, in turns."""
    x, y = make_data(rows, width)
    probe = keras_kd.layers.LinearProbe(CLASSES)
    functions = {
        "probe": lambda: probe.adapt(x, y),
        "product": lambda: product(x),
        "ridge": lambda: Ridge(alpha=1e-3).fit(x, np.eye(CLASSES)[y]),
    }
    for function in functions.values():
        function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(rounds)]
    found: dict[str, Any] = {"rows": rows, "width": width}
    found |= {name: steps_benchmark.summarize([one[name] for one in times]) for name in functions}
    return found | {"probe / product": steps_benchmark.summarize([one["probe"] / one["product"] for one in times])}


def run_probe(quick: bool) -> dict[str, Any]:
    """The probe over rows and widths, and scikit-learn's solvers."""
    sizes, rounds = ([(2000, 64)], 2) if quick else (SIZES, 7)
    found = [measure_probe(rows, width, rounds) for rows, width in sizes]
    x, y = make_data(*sizes[0])
    logistic = seconds(lambda: LogisticRegression(max_iter=50).fit(x, y))
    rows, width = sizes[0]
    return {"sizes": found, "logistic_regression": {"rows": rows, "width": width, "max_iter": 50, "seconds": round(logistic, 3)}}


def load_teacher(data: demo.Data, quick: bool) -> keras.Model:
    """The demo's teacher, trained once on this machine."""
    if TEACHER.exists() and not quick:
        return keras.saving.load_model(TEACHER)
    epochs = 1 if quick else TEACHER_EPOCHS
    if quick:
        data = demo.Data((data.teacher[0][:1000], data.teacher[1][:1000]), data.images, data.labels, data.test, data.classes)
    teacher = demo.train_teacher(data, demo.Settings(dataset="fashion_mnist", teacher_epochs=epochs), [])
    if not quick:
        TEACHER.parent.mkdir(parents=True, exist_ok=True)
        teacher.save(TEACHER)
    return teacher


def passes(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """What the analysis cannot do without: a clean pass, a noisy pass, a Jacobian-vector product and a gradient, nothing kept."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    @tf.function(input_signature=[tf.TensorSpec((None, *x.shape[1:])), tf.TensorSpec((None,), "int64")])
    def run(images: Any, labels: Any) -> Any:
        noise = 0.01 * tf.random.stateless_normal(tf.shape(images), [0, 0])
        outputs = model(images, training=False)
        feed = tf.zeros_like(outputs)
        (back,) = tf.gradients(outputs, [images], grad_ys=[feed])
        (moved,) = tf.gradients(back, [feed], grad_ys=[noise])
        (gradient,) = tf.gradients(loss(labels, outputs), [images])
        return [tf.reduce_sum(one) for one in (model(images + noise, training=False), moved, gradient)]

    def all_batches() -> None:
        for start in range(0, len(x), 256):
            run(tf.constant(x[start : start + 256]), tf.constant(y[start : start + 256], "int64"))

    run(tf.constant(x[:256]), tf.constant(y[:256], "int64"))
    return all_batches


def run_speed(quick: bool) -> dict[str, Any]:
    """The whole analysis, and the passes it needs, in turns."""
    data = demo.load("fashion_mnist")
    teacher = load_teacher(data, quick)
    sizes, rounds = ((300,), 1) if quick else (IMAGES, 3)
    found = []
    for count in sizes:
        x, y = data.test[0][:count], data.test[1][:count]
        needed = passes(teacher, x, y)
        times = []
        for _ in range(rounds):
            one = {"passes": seconds(needed)}
            one["analysis"] = seconds(lambda x=x, y=y: analysis.linear_analysis(teacher, x, y, verbose=0))
            times.append(one)
        numbers: dict[str, Any] = {"images": count}
        numbers |= {name: steps_benchmark.summarize([one[name] for one in times]) for name in times[0]}
        found.append(numbers | {"ratio": steps_benchmark.summarize([one["analysis"] / one["passes"] for one in times])})
        print(count, found[-1]["ratio"]["median"], flush=True)
    return {"sizes": found}


def run_evidence(quick: bool) -> dict[str, Any]:
    """What measures say, and what happens."""
    data = demo.load("fashion_mnist")
    teacher = load_teacher(data, quick)
    count = 200 if quick else 2000
    unlabelled = data.images[: 2 * count]
    test = data.test[0][:count], data.test[1][:count]
    arguments: dict[str, Any] = {"analysis_data": unlabelled, "verbose": 0}
    result: dict[str, Any] = {
        "teacher": {"epochs": TEACHER_EPOCHS, "accuracy": demo.accuracy(teacher, *data.test), "parameters": teacher.count_params()},
        "test_images": count,
        "unlabelled_images": len(unlabelled),
    }
    layers = ["conv2d"] if quick else None
    labelled = analysis.linear_analysis(teacher, data.teacher[0][: 2 * count], data.teacher[1][: 2 * count], verbose=0)
    for kind, reconstruct in (("reconstructed", True), ("zeroed", False)):
        report = analysis.sensitivity(teacher, *test, each=True, layers=layers, reconstruct=reconstruct, **arguments)
        result[f"single_channels_{kind}"] = single_channels(report, labelled)
        print(kind, result[f"single_channels_{kind}"], flush=True)
    result["criteria"] = []
    for criterion in CRITERIA[:2] if quick else CRITERIA:
        for reconstruct in (True, False):
            report = analysis.sensitivity(
                teacher, *test, list(RATIOS), layers=layers, criterion=criterion, reconstruct=reconstruct, **arguments
            )
            result["criteria"].append(by_criterion(report, criterion))
            print(result["criteria"][-1], flush=True)
    for what in ("weights", "bits", "rank"):
        report = analysis.sensitivity(teacher, *test, what=what, layers=layers, **arguments)  # type: ignore[arg-type]
        result[what] = {"overall": rounded(report.correlations), "within_layers": rounded(report.within_layers)}
    result["linear_layers"] = replaced_layers(teacher, labelled, unlabelled, test)
    return result


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    """To two digits."""
    return {name: round(number, 2) for name, number in numbers.items()}


def single_channels(report: analysis.SensitivityReport, labelled: analysis.LinearReport) -> dict[str, Any]:
    """Rank correlations over all channels, also of measures that were taken with the training labels."""
    truth = [cell.loss_increase for cell in report.cells]
    accuracy = [cell.accuracy_loss for cell in report.cells]
    measures = {name: [cell.predicted[name] for cell in report.cells] for name in report.correlations}
    for name in ("taylor", "fisher"):
        rows = {cell.layer: getattr(labelled[labelled.flows[cell.layer].place], name) for cell in report.cells}
        measures[f"{name}, labels"] = [rows[cell.layer][cell.channels[0]] for cell in report.cells]
    groups = [[i for i, cell in enumerate(report.cells) if cell.layer == layer] for layer in {c.layer: 0 for c in report.cells}]

    def correlation(values: Any, wanted: Any, of: list[int]) -> float:
        return float(np.nan_to_num(scipy.stats.spearmanr([values[i] for i in of], [wanted[i] for i in of])[0]))

    everything = list(range(len(truth)))
    found: dict[str, Any] = {"channels": len(truth), "mean_accuracy_loss": round(float(np.mean(accuracy)), 6)}
    for name, values in measures.items():
        found[name] = {
            "loss": round(correlation(values, truth, everything), 2),
            "absolute_loss": round(correlation(values, np.abs(truth), everything), 2),
            "accuracy": round(correlation(values, accuracy, everything), 2),
            "within_layers": round(float(np.mean([correlation(values, truth, group) for group in groups])), 2),
        }
    return found


def by_criterion(report: analysis.SensitivityReport, criterion: str) -> dict[str, Any]:
    """What a criterion's choice costs, the mean over layers, for each share."""
    lost = {
        str(ratio): round(float(np.mean([cell.accuracy_loss for cell in report.cells if cell.ratio == ratio])), 5)
        for ratio in RATIOS
    }
    return {
        "criterion": criterion,
        "reconstructed": report.reconstructed,
        "accuracy_loss": lost,
        "correlations": rounded(report.correlations),
    }


def replaced_layers(
    teacher: keras.Model, report: analysis.LinearReport, images: np.ndarray, test: tuple[np.ndarray, np.ndarray]
) -> list[dict[str, Any]]:
    """Each ReLU, and each convolution with its normalisation and ReLU, as its best linear map: what that costs."""
    whole = demo.accuracy(teacher, *test)
    found = []
    for index, layer in enumerate(teacher.layers):
        if not isinstance(layer, keras.layers.ReLU):
            continue
        for kind, first, size in (("ReLU", index, 1), ("convolution to ReLU", index - 2, 3)):
            mapped, score = best_map(teacher, first, index, size, images)
            left = keras.Sequential(
                [keras.Input(teacher.input_shape[1:]), *teacher.layers[:first], mapped, *teacher.layers[index + 1 :]]
            )
            found.append(
                {
                    "layer": layer.name,
                    "replaced": kind,
                    "linearity": round(score, 4),
                    "accuracy_loss": round(whole - demo.accuracy(left, *test), 4),
                    "response": round(report[layer.name].responses[0].ratio, 3),
                    "explained": round(report[layer.name].responses[0].explained, 3),
                }
            )
    return found


def best_map(teacher: keras.Model, first: int, last: int, size: int, images: np.ndarray) -> tuple[keras.layers.Layer, float]:
    """A convolution from what one layer reads to what another gives, fitted on rows of both."""
    read = teacher.layers[first].input
    both = keras.Model(teacher.inputs[0], [read, teacher.layers[last].output])
    moments: Moments | None = None
    rng = np.random.default_rng(0)
    for start in range(0, len(images), 100):
        x, y = both(images[start : start + 100])
        windows = tf.image.extract_patches(x, [1, size, size, 1], [1] * 4, [1] * 4, "SAME")
        rows = np.concatenate([np.reshape(one, (-1, one.shape[-1])) for one in (windows, y)], axis=1)
        part = Moments.of(rows[rng.choice(len(rows), min(800, len(rows)), replace=False)])
        moments = moments or Moments.empty(rows.shape[1])
        moments.add(part)
    if moments is None:
        raise ValueError("no images")
    channels = y.shape[-1]
    fit = ridge(moments, len(moments.mean) - channels, [1e-6])
    spread = np.diag(moments.scatter)[-channels:]
    made = keras.layers.Conv2D(channels, size, padding="same", name=f"map_of_{teacher.layers[last].name}_{size}")
    made.build((None, *read.shape[1:]))
    made.set_weights([fit.kernel.reshape(size, size, -1, channels), fit.bias])
    return made, float(np.sum(fit.r2 * spread) / spread.sum())


def verdicts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims, and what was found."""
    claims = []

    def claim(text: str, found: float, limit: float) -> None:
        claims.append({"claim": text, "limit": f"<= {limit}", "found": round(found, 3), "holds": bool(found <= limit)})

    if "probe" in result:
        sizes = {(one["rows"], one["width"]): one for one in result["probe"]["sizes"]}
        if (60000, 512) in sizes:
            claim("probe / product, 60,000 x 512", sizes[60000, 512]["probe / product"]["median"], LIMITS["probe"])
            growth = sizes[60000, 512]["probe"]["median"] / sizes[15000, 512]["probe"]["median"]
            claim("time of the probe, 60,000 rows / 15,000 rows", growth, 5.0)
    if "speed" in result:
        largest, smallest = result["speed"]["sizes"][-1], result["speed"]["sizes"][0]
        claim(f"analysis / passes, {largest['images']:,} images", largest["ratio"]["median"], LIMITS["analysis"])
        growth = largest["analysis"]["median"] / smallest["analysis"]["median"]
        claim("time of the analysis, 10,000 images / 2,500 images", growth, 4.4)
    return claims


def show(result: dict[str, Any]) -> None:
    """Prints what there is."""
    if "probe" in result:
        table = rich.table.Table("rows", "features", "probe, s", "product, s", "Ridge (float32), s", "probe / product")
        for one in result["probe"]["sizes"]:
            times = (f"{one[name]['median']:.3f}" for name in ("probe", "product", "ridge"))
            table.add_row(f"{one['rows']:,}", f"{one['width']:,}", *times, f"{one['probe / product']['median']:.2f}")
        rich.print(table)
    if "speed" in result:
        for one in result["speed"]["sizes"]:
            rich.print(f"{one['images']:,} images: {one['analysis']['median']:.1f} s, passes {one['passes']['median']:.1f} s")
    if "evidence" in result:
        rich.print(result["evidence"])


def main() -> int:
    """Measures, shows, writes; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="smoke test: nothing is written, no claim enforced")
    for part in ("probe", "speed", "evidence"):
        parser.add_argument(f"--{part}", action="store_true", help=f"only this part ({part})")
    arguments = parser.parse_args()
    parts = {"probe": run_probe, "speed": run_speed, "evidence": run_evidence}
    chosen = [part for part in parts if getattr(arguments, part)] or list(parts)
    result = {} if arguments.quick or not RESULT.exists() else json.loads(RESULT.read_text())
    for part in chosen:
        numbers = parts[part](arguments.quick)
        pruning_benchmark.store_part(result, part, numbers, verdicts, None if arguments.quick else RESULT)
    show(result)
    return pruning_benchmark.exit_code(result, arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
