# %% [markdown]
# # The device has room for 9,000 bytes. Which student goes there?
#
# Wide in integers of 8 bits, or narrow in float? At which temperature, which learning rate? `keras_kd.tuner` tries combinations, in
# a search of KerasTuner in which a trial ends with what counts: the accuracy of a student, and the bytes of its LiteRT file.
#
# **The problem.** You have a teacher, 600 images that nobody labelled, and 120 labelled ones to choose by. This page searches below
# a limit of bytes, cuts the power meanwhile, looks at the front of accuracy and bytes, and asks whether the search was needed.

# %%
import contextlib
import io
import os
import pathlib
import tempfile

import keras
import keras_tuner
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_kd

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
BUDGET = 9000  # bytes
TRIALS = 5 if FAST else 10
EPOCHS = 15 if FAST else 30
SEEDS = range(1 if FAST else 2)
BLUE, RED, GREY = "#2e6f8e", "#bf616a", "#4c566a"
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layers = keras.layers
scratch = tempfile.TemporaryDirectory()
folder = pathlib.Path(scratch.name)


def accuracy(file, x, y):
    """Share of images that a LiteRT file gets right, in the interpreter."""
    return float(np.mean(np.argmax(keras_kd.export.run_litert(file, x)[0], axis=-1) == y))


digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
teacher_x, rest_x, teacher_y, rest_y = train_test_split(x, y, train_size=600, stratify=y, random_state=0)
images, rest_x, _, rest_y = train_test_split(rest_x, rest_y, train_size=600, stratify=rest_y, random_state=0)
choose_x, test_x, choose_y, test_y = train_test_split(rest_x, rest_y, train_size=120, stratify=rest_y, random_state=0)

keras.utils.set_random_seed(0)
body = []
for filters in (24, 48):
    body += [layers.Conv2D(filters, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
teacher = keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Flatten(), layers.Dropout(0.3), layers.Dense(10)])
teacher.compile(keras.optimizers.Adam(2e-3), cross_entropy)
teacher.fit(teacher_x, teacher_y, batch_size=50, epochs=25, verbose=0)
written = keras_kd.export.to_litert(teacher, folder / "teacher.tflite", check_data=choose_x)
teacher_accuracy = accuracy(folder / "teacher.tflite", test_x, test_y)
print(f"teacher: {written.size:,} bytes, test accuracy {teacher_accuracy:.1%}")

# %% [markdown]
# ## What is searched, and what is good
#
# `build_student(hp)` asks for what the student has; `search` says the rest. A list is a choice, a pair a range, a number is fixed.
#
# The `Score` measures the file of each trial. Over the budget it is below -1, the less the more is missed, so that any oracle is
# led to where the budget holds. Bytes are not estimated: what there is besides weights, only the converter knows.


# %%
def build_student(hp):
    """Two convolutions with stride 2, as wide as the search says, and ten logits."""
    width = hp.Choice("width", [2, 4, 6, 8, 12, 16])
    convolutions = [layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (width, 2 * width)]
    return keras.Sequential([keras.Input((8, 8, 1)), *convolutions, layers.Flatten(), layers.Dense(10)])


def tuner(kind):
    """The search. The same call goes on with what is in the folder."""
    hypermodel = kind(
        build_student,
        teacher,
        search={"num_bits": [32, 8], "temperature": [1.0, 2.0, 4.0], "learning_rate": (2e-3, 2e-2)},
        score=keras_kd.tuner.Score("val_accuracy", budgets={"bytes": BUDGET}),
    )
    oracle = keras_kd.tuner.ParetoOracle(["val_accuracy", "bytes"], TRIALS, num_initial_points=6, seed=1)
    with contextlib.redirect_stdout(io.StringIO()):  # it says which folder it goes on with
        return keras_tuner.Tuner(oracle=oracle, hypermodel=hypermodel, directory=folder, project_name="search")


def run(search):
    """Trains the trials that are missing: without labels, so the teacher alone is learned from; 120 labelled images choose."""
    search.search(images, validation_data=(choose_x, choose_y), epochs=EPOCHS, batch_size=50, verbose=0)


def finished(search):
    """The metrics of the completed trials, in the order in which they began."""
    trials, names = search.oracle.trials, ("val_accuracy", "bytes", "over_budget")
    done = [trials[place] for place in search.oracle.start_order if trials[place].status == "COMPLETED"]
    return {trial.trial_id: {name: float(trial.metrics.get_last_value(name)) for name in names} for trial in done}


# %% [markdown]
# ## Searching, with a power cut
#
# `ParetoOracle` looks for students that no other beats in accuracy and bytes at once, and tries changes of those that it has. The
# first trial asks the teacher; the others read what it said. In the fourth the power goes. The same script, run again, goes on.


# %%
class Cut(keras_kd.tuner.DistillationHyperModel):
    """A search whose power is cut in its fourth trial."""

    begun = 0

    def callbacks(self, hp, distiller, epochs, steps):
        """Hook: the callbacks of a trial."""
        self.begun += 1
        if self.begun == 4:
            raise KeyboardInterrupt
        return super().callbacks(hp, distiller, epochs, steps)


def recorded():
    """The files of the recorded teacher, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.tfrecord")}


keras.utils.set_random_seed(0)
try:
    run(tuner(Cut))
except KeyboardInterrupt:
    print("power cut")

# %%
search = tuner(keras_kd.tuner.DistillationHyperModel)
before, recorded_before = finished(search), recorded()
print(f"finished trials that it knows: {len(before)}")
run(search)
found = finished(search)
values = {name: search.oracle.trials[name].hyperparameters.values for name in found}
for name, metrics in found.items():
    told = f"width {values[name]['width']:2}, {values[name]['num_bits']:2} bits, {metrics['bytes']:6,.0f} bytes"
    print(f"trial {name:>2}: {told}, accuracy {metrics['val_accuracy']:.1%}{' (over)' * (metrics['over_budget'] > 0)}")

# %% [markdown]
# ## The front, and the best
#
# `pareto_front` gives the trials within the budget that no other one beats, `Score.best_trial` the most accurate of them. The
# hypervolume, the area below the front, is one number to compare searches by.

# %%
print(front := keras_kd.tuner.pareto_front(search, reference={"val_accuracy": 0.5, "bytes": BUDGET}))
best = search.hypermodel.score.best_trial(search)
file = pathlib.Path(search.get_trial_dir(best.trial_id)) / "student.tflite"
best_test = accuracy(file, test_x, test_y)
print(f"best: trial {best.trial_id}, {file.stat().st_size:,} bytes, test accuracy {best_test:.1%}")

figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for number, color, mark in ((32, RED, "s"), (8, BLUE, "o")):
    shown = [metrics for name, metrics in found.items() if values[name]["num_bits"] == number]
    axes.plot(
        [one["bytes"] for one in shown], [100 * one["val_accuracy"] for one in shown], mark, color=color, label=f"{number} bits"
    )
points = sorted((one.values["bytes"], one.values["val_accuracy"]) for one in front)
axes.step([at for at, _ in points] + [BUDGET], [100 * v for _, v in points] + [100 * points[-1][1]], where="post", color=GREY)
axes.axvline(BUDGET, color="black", linestyle="--", label="budget")
axes.set(
    xlabel="bytes of the file", ylabel="accuracy on 120 images, %", title="Eight bits make room for wider students (line: front)"
)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Was that needed?
#
# *Was it the distillation?* The same network in as many bits learns from the 120 labels instead, in as many steps. *Was it the
# search?* `keras_kd.compress` has no space to search: it takes the teacher and the number of bytes, cuts the teacher itself to fit,
# and measures files as the search did.


# %%
def from_labels(hp, seed):
    """Test accuracy and bytes of the file of a student that learned from the 120 labels alone."""
    keras.utils.set_random_seed(seed)
    student = build_student(hp)
    student.compile(keras.optimizers.Adam(hp.get("learning_rate")), cross_entropy)
    bits = [] if hp.get("num_bits") == 32 else [keras_kd.callbacks.Quantization(hp.get("num_bits"))]
    epochs = 4 * EPOCHS  # of 3 steps, not of 12
    student.fit(choose_x, choose_y, batch_size=50, epochs=epochs, callbacks=bits, verbose=0)
    written = keras_kd.export.to_litert(student, folder / "labels.tflite")
    return accuracy(folder / "labels.tflite", test_x, test_y), written.size


controls = [from_labels(best.hyperparameters, seed) for seed in SEEDS]
compressed = keras_kd.compress(
    teacher,
    images,
    budget=BUDGET,
    validation_data=(choose_x, choose_y),
    max_trials=0 if FAST else 1,
    max_minutes=1e-3 if FAST else None,
    epochs=EPOCHS,
    folder=folder / "small",
    verbose=0,
)
for attempt in compressed.attempts:
    if not attempt.note:  # which says why there is no file
        print(f"compress, {attempt.name:30} {attempt.size:6,} bytes, accuracy {attempt.score:.1%}")
compressed_test = accuracy(compressed.path, test_x, test_y)
print(f"test accuracy: search {best_test:.1%}, compress {compressed_test:.1%}, teacher {teacher_accuracy:.1%}")
print(f"the same student from labels: {', '.join(f'{value:.1%}' for value, _ in controls)}")

# %% [markdown]
# Distillation was needed; the search was not, for accuracy: `compress` is as good, within what these test images can tell. The
# search found a file a quarter smaller, and shows what else there is. The 120 images flatter what they chose.
#
# ## What must hold
#
# A front with beaten trials fails here, as do wrong bytes, and a search that begins anew or asks the teacher again.

# %%
within = {name: (one["val_accuracy"], one["bytes"]) for name, one in found.items() if one["bytes"] <= BUDGET}
unbeaten = {
    name
    for name, (value, size) in within.items()
    if not any(v >= value and b <= size and (v, b) != (value, size) for v, b in within.values())
}
ends = [size for size, _ in points[1:]] + [BUDGET]
area = sum(max(value - 0.5, 0.0) * (end - size) for (size, value), end in zip(points, ends, strict=True))

assert list(before) == list(found)[:3]
assert before == {name: found[name] for name in before}
assert len(found) == TRIALS
assert recorded_before == recorded()  # the teacher was not asked again
assert all((one["over_budget"] > 0) == (one["bytes"] > BUDGET) for one in found.values())
assert file.stat().st_size == found[best.trial_id]["bytes"] <= BUDGET
assert abs(accuracy(file, choose_x, choose_y) - found[best.trial_id]["val_accuracy"]) < 0.04
assert {one.trial_id for one in front} == unbeaten
assert abs(front.hypervolume / area - 1) < 1e-6
assert max(size for _, size in controls) <= BUDGET
assert best_test - max(value for value, _ in controls) > 0.01
assert compressed.path.stat().st_size == compressed.best.size <= BUDGET
assert compressed_test > best_test - 0.06
scratch.cleanup()
print("All of it holds.")
