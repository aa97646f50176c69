"""What does a step with logits and two feature losses cost, and how does it grow with batch size and number of losses?

The claims: at most 0.8 times `keras.distillation` doing the same, and at most 1.08 times (plain student step + teacher forward
pass). Both libraries compare two maps by mean squared error, between stages of the same shapes: `keras.distillation` has no
adapters.
"""

import argparse
import datetime
import json
import pathlib
import sys
from typing import Any

import distiller as steps_benchmark  # its neighbour in this folder
import keras
import matplotlib.pyplot as plt
import numpy as np
import rich
import tensorflow as tf

import keras_kd
from keras_kd import losses

RESULT = pathlib.Path(__file__).parent / "results" / "features.json"
PICTURE = pathlib.Path(__file__).parent / "results" / "features.png"
# The ends of the stages have these channels in both models; the teacher is wider and deeper within.
STAGES = (16, 32)
WIDE = (20, 36)
CLAIMS = {"c / d": 0.8, "c / (a + b)": 1.08}
BATCH_SIZES = (16, 32, 64, 128, 256)
COUNTS = (1, 2, 3, 5, 7)


def conv_net(name: str, *, inner: tuple[int, ...] | None = None) -> keras.Model:
    """A net for 28x28x1 images whose stages end in ReLU layers "stage0" and "stage1"."""
    model = keras.Sequential([keras.Input((28, 28, 1))], name=name)
    for stage, width in enumerate(STAGES):
        for place, channels in enumerate([width] if inner is None else [inner[stage], width]):
            strides = 2 if place == 0 else 1
            model.add(keras.layers.Conv2D(channels, 3, strides=strides, padding="same", use_bias=False))
            model.add(keras.layers.BatchNormalization())
            last = inner is None or place == 1
            model.add(keras.layers.ReLU(name=f"stage{stage}" if last else f"stage{stage}_inner"))
    model.add(keras.layers.GlobalAveragePooling2D(name="pool"))
    model.add(keras.layers.Dense(10))
    return model


def ours(count: int = 3) -> list[Any]:
    """The first `count` losses of a list that begins with logits and two maps."""
    stages = [{"teacher_layer_name": f"stage{i}", "student_layer_name": f"stage{i}"} for i in range(2)]
    pool = {"teacher_layer_name": "pool", "student_layer_name": "pool"}
    made = [
        losses.KDLoss(),
        losses.HintLoss(**stages[0]),
        losses.HintLoss(**stages[1]),
        losses.SPLoss(**pool),
        losses.PKTLoss(**pool),
    ]
    made += [losses.AttentionTransferLoss(**stage) for stage in stages]
    return made[:count]


def theirs() -> list[Any]:
    """The same three losses of `keras.distillation`."""
    kind = keras.distillation
    made = [kind.LogitsDistillation(temperature=4.0, loss=keras.losses.KLDivergence())]
    return made + [
        kind.FeatureDistillation("mse", teacher_layer_name=f"stage{i}", student_layer_name=f"stage{i}") for i in range(2)
    ]


def make_models(student: keras.Model, teacher: keras.Model) -> dict[str, keras.Model]:
    """One model to train per variant."""
    clone = steps_benchmark.clone
    frozen = clone(teacher)
    return {
        "student": clone(student),
        "teacher": steps_benchmark.Probe(lambda x, y: frozen(x, training=False)),
        "keras_kd": keras_kd.Distiller(clone(teacher), clone(student), ours()),
        "keras": keras.distillation.Distiller(clone(teacher), clone(student), theirs()),
    }


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Of one round."""
    return {"c / d": times["keras_kd"] / times["keras"], "c / (a + b)": times["keras_kd"] / (times["student"] + times["teacher"])}


def compare(student: keras.Model, teacher: keras.Model, rounds: int) -> dict[str, Any]:
    """The two claims, at a batch of 64."""
    dataset, data = steps_benchmark.load_data(64, batches=20)
    models = make_models(student, teacher)
    steps = {name: steps_benchmark.make_step(model, dataset, "auto") for name, model in models.items()}
    measured = steps_benchmark.interleave(steps, rounds, 10)
    found = [ratios(times) for times in measured]
    return {
        "data": data,
        "batch_size": 64,
        "seconds_a_step": {name: steps_benchmark.summarize([times[name] for times in measured]) for name in models},
        "ratios": {name: steps_benchmark.summarize([ratio[name] for ratio in found]) for name in CLAIMS},
    }


def grow_with_batch(student: keras.Model, teacher: keras.Model, rounds: int) -> list[dict[str, Any]]:
    """Seconds a step by batch size."""
    rows = []
    for batch_size in BATCH_SIZES:
        dataset, _ = steps_benchmark.load_data(batch_size, batches=12)
        models = make_models(student, teacher)
        steps = {name: steps_benchmark.make_step(model, dataset, "auto") for name, model in models.items()}
        measured = steps_benchmark.interleave(steps, rounds, 4)
        rows.append({"batch_size": batch_size} | {name: float(np.median([t[name] for t in measured])) for name in models})
    return rows


def grow_with_losses(student: keras.Model, teacher: keras.Model, rounds: int) -> list[dict[str, Any]]:
    """Seconds a step by number of losses, at a batch of 64."""
    dataset, _ = steps_benchmark.load_data(64, batches=12)
    clone = steps_benchmark.clone
    models = {count: keras_kd.Distiller(clone(teacher), clone(student), ours(count)) for count in COUNTS}
    steps = {count: steps_benchmark.make_step(model, dataset, "auto") for count, model in models.items()}
    measured = steps_benchmark.interleave(steps, rounds, 4)
    return [{"losses": count, "keras_kd": float(np.median([times[count] for times in measured]))} for count in COUNTS]


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """The two curves side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = result["by_batch_size"]
    names = {
        "keras_kd": "keras_kd",
        "keras": "keras.distillation",
        "student": "plain student step",
        "teacher": "teacher forward pass",
    }
    for name, label in names.items():
        axes[0].plot([row["batch_size"] for row in rows], [1e3 * row[name] for row in rows], marker="o", label=label)
    axes[0].set(xlabel="batch size", ylabel="ms a step", title="Logits and two feature losses", xscale="log", yscale="log")
    axes[0].set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes[0].set_yticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes[0].minorticks_off()
    axes[0].legend()
    rows = result["by_losses"]
    axes[1].plot([row["losses"] for row in rows], [1e3 * row["keras_kd"] for row in rows], marker="o")
    axes[1].set(xlabel="number of distillation losses", ylabel="ms a step", title="keras_kd, batch of 64", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measures, shows, writes; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    student, teacher = conv_net("student"), conv_net("teacher", inner=WIDE)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (tf, keras, keras_kd)},
        "machine": steps_benchmark.describe_machine(),
        "parameters": {"student": student.count_params(), "teacher": teacher.count_params()},
        "claims": CLAIMS,
        **compare(student, teacher, 3 if options.quick else 40),
        "by_batch_size": grow_with_batch(student, teacher, 2 if options.quick else 9),
        "by_losses": grow_with_losses(student, teacher, 2 if options.quick else 9),
    }
    rich.print(result["ratios"], result["by_batch_size"], result["by_losses"])
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        draw(result, PICTURE)
    broken = [name for name, limit in CLAIMS.items() if result["ratios"][name]["median"] > limit]
    for name in broken:
        rich.print(f"Does not hold: {name} = {result['ratios'][name]['median']:.3f} > {CLAIMS[name]}")
    return int(bool(broken) and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
