"""What does an epoch on a recorded teacher cost, next to a plain student epoch, and what does recording itself cost?

The claim: at most 1.10 times a plain student epoch, whatever the teacher. Reported beside it: the speed-up over
`keras.distillation`, which runs the teacher in every epoch, and recording's cost over a bare `teacher.predict`. All on the same
shuffled images; the plain student and `keras.distillation` read them from memory, the recording comes from disk.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import distiller as steps_benchmark  # its neighbour in this folder
import keras
import numpy as np
import rich
import tensorflow as tf

import keras_kd

RESULT = pathlib.Path(__file__).parent / "results" / "recorded.json"
IMAGES, BATCH_SIZE, LIMIT = 12_800, 64, 1.10
STUDENT, TEACHERS = (16, 32, 32), {"5 times": (36, 72, 72), "10 times": (48, 104, 104)}


def load_images() -> tuple[np.ndarray, np.ndarray, str]:
    """Images, labels, and what they are."""
    dataset, name = steps_benchmark.load_data(IMAGES, batches=1)
    x, y = next(iter(dataset))
    return x.numpy(), y.numpy(), name


def in_memory(x: np.ndarray, y: np.ndarray) -> tf.data.Dataset:
    """The data as a user would feed them."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), reshuffle_each_iteration=True)
    return dataset.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)


def compiled(model: keras.Model) -> keras.Model:
    """Ready for `fit`."""
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def seconds(function: Any) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def record(teacher: keras.Model, x: np.ndarray, y: np.ndarray, folder: pathlib.Path, rounds: int) -> tuple[Any, dict[str, Any]]:
    """Records the teacher several times, in turns with `teacher.predict`; returns the last recording."""
    teacher.predict(x[:BATCH_SIZE], batch_size=BATCH_SIZE, verbose=0)
    recorded, predicted = [], []
    for index in range(rounds):
        predicted.append(seconds(lambda: teacher.predict(x, batch_size=BATCH_SIZE, verbose=0)))
        start = time.perf_counter()
        recording = keras_kd.record_teacher(teacher, (x, y), folder / str(index), batch_size=BATCH_SIZE, verbose=0)
        recorded.append(time.perf_counter() - start)
    costs = {"predict_seconds": float(np.median(predicted)), "record_seconds": float(np.median(recorded)), "bytes": recording.bytes}
    return recording, costs | {"record / predict": float(np.median([r / p for r, p in zip(recorded, predicted, strict=True)]))}


def measure(name: str, widths: tuple[int, ...], x: np.ndarray, y: np.ndarray, rounds: int, folder: pathlib.Path) -> dict[str, Any]:
    """Epochs in turns, for one teacher."""
    clone = steps_benchmark.clone
    student, teacher = steps_benchmark.conv_net(STUDENT, "student"), steps_benchmark.conv_net(widths, "teacher")
    recording, costs = record(teacher, x, y, folder / name.replace(" ", "_"), max(2, rounds // 3))
    kd, logits = keras_kd.losses.KDLoss(), keras.distillation.LogitsDistillation(4.0, loss=keras.losses.KLDivergence())
    variants = {
        "plain": (compiled(clone(student)), in_memory(x, y)),
        "recorded": (
            compiled(keras_kd.Distiller(recording, clone(student), kd)),
            recording.dataset(BATCH_SIZE, shuffle=True),
        ),
        "online": (compiled(keras_kd.Distiller(clone(teacher), clone(student), kd)), in_memory(x, y)),
        "keras": (compiled(keras.distillation.Distiller(clone(teacher), clone(student), logits)), in_memory(x, y)),
    }
    for model, dataset in variants.values():
        model.fit(dataset, verbose=0)  # traces; the first epoch is not counted
    names, measured = list(variants), []
    for index in range(rounds):
        order = [names[(index + offset) % len(names)] for offset in range(len(names))]
        measured.append({key: seconds(lambda pair=variants[key]: pair[0].fit(pair[1], verbose=0)) for key in order})
    pairs = {
        "recorded / plain": ("recorded", "plain"),
        "keras / recorded": ("keras", "recorded"),
        "online / plain": ("online", "plain"),
    }
    cost = steps_benchmark.multiplications(teacher) / steps_benchmark.multiplications(student)
    return {
        "teacher_multiplications_per_student_multiplication": round(cost, 2),
        "seconds_an_epoch": {key: steps_benchmark.summarize([times[key] for times in measured]) for key in variants},
        "ratios": {key: steps_benchmark.summarize([t[a] / t[b] for t in measured]) for key, (a, b) in pairs.items()},
        "recording": costs,
    }


def main() -> int:
    """Measures, shows, writes; returns 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    x, y, data = load_images()
    with tempfile.TemporaryDirectory() as folder:
        rounds = 3 if options.quick else 12
        sizes = {name: measure(name, widths, x, y, rounds, pathlib.Path(folder)) for name, widths in TEACHERS.items()}
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (tf, keras, keras_kd)},
        "machine": steps_benchmark.describe_machine(),
        "settings": {"data": data, "images": IMAGES, "batch_size": BATCH_SIZE, "rounds": rounds, "limit": LIMIT},
        "teachers": sizes,
    }
    rich.print(sizes)
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    broken = [name for name, size in sizes.items() if size["ratios"]["recorded / plain"]["median"] > LIMIT]
    for name in broken:
        rich.print(f"Does not hold, teacher of {name}: {sizes[name]['ratios']['recorded / plain']['median']:.3f} > {LIMIT}")
    return int(bool(broken) and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
