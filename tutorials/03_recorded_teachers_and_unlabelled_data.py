# %% [markdown]
# # Must the teacher be there whenever a student trains?
#
# A large teacher is asked for the same images in every epoch, for every student and every setting that you try, and its answers
# are the same.
# `record_teacher` asks it once and keeps the answers on disk, with the data. After that the teacher may be gone.
#
# This page records a teacher on 600 images of which 40 have a label, cuts the power in the middle, checks that a recording teaches
# exactly what the teacher would have, and trains students of three sizes from it. The last part asks whether augmented views help.

# %%
import os
import pathlib
import tempfile
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_kd

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
SEEDS = range(1 if FAST else 3)
EPOCHS = 8 if FAST else 20
WIDTHS = (8,) if FAST else (4, 8, 16)
BLUE, RED = "#2e6f8e", "#bf616a"
layers = keras.layers
supervised = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
scratch = tempfile.TemporaryDirectory()
folder = pathlib.Path(scratch.name)


def accuracy(model):
    """Share of test images whose largest logit is the right one."""
    return float(np.mean(np.argmax(model(test_x, training=False), axis=-1) == test_y))


# %% [markdown]
# ## Data, of which most have no label, and a teacher
#
# The teacher learned from other images. Samples without a label are marked -1: `ignore_class=-1` of Keras' loss leaves them to the
# teacher, and the losses of this library that read labels know -1, too.

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
rest_x, test_x, rest_y, test_y = train_test_split(x, y, train_size=1200, stratify=y, random_state=0)
teacher_x, images, teacher_y, truth = train_test_split(rest_x, rest_y, test_size=600, stratify=rest_y, random_state=0)
labelled, _ = train_test_split(np.arange(600), train_size=40, stratify=truth, random_state=0)
labels = np.full(600, -1)
labels[labelled] = truth[labelled]
del truth  # nobody tells you the other labels

keras.utils.set_random_seed(0)
teacher = keras.Sequential([keras.Input((8, 8, 1))], name="teacher")
for filters in (64, 128):
    teacher.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
    teacher.add(layers.MaxPooling2D())
for layer in (layers.Flatten(), layers.Dropout(0.4), layers.Dense(10)):
    teacher.add(layer)
teacher.compile(keras.optimizers.Adam(1e-3), supervised)
teacher.fit(teacher_x, teacher_y, batch_size=50, epochs=8 if FAST else 15, verbose=0)
teacher_accuracy = accuracy(teacher)
print(f"teacher: {teacher.count_params():,} parameters, test accuracy {teacher_accuracy:.1%}")

# %% [markdown]
# ## Recording, with a power cut
#
# Data may be arrays, or batches that come from somewhere. These come from a generator that breaks down after 350 images. Called
# again, `record_teacher` goes on after the last complete file (100 images each, here), and does not ask the
# teacher again for those.


# %%
def batches(until):
    """Batches of 50 images with their labels, up to a power cut."""

    def read():
        for start in range(0, len(images), 50):
            if start >= until:
                raise RuntimeError("power cut")
            yield images[start : start + 50], labels[start : start + 50]

    shapes = (tf.TensorSpec((None, 8, 8, 1), "float32"), tf.TensorSpec((None,), "int64"))
    return tf.data.Dataset.from_generator(read, output_signature=shapes)


def record(until):
    """Records what the teacher says of all batches."""
    settings = {"dtype": "float32", "samples_per_shard": 100, "verbose": 0}
    return keras_kd.record_teacher(teacher, batches(until), folder / "recorded", **settings)


def files():
    """The files with samples in the recording, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "recorded").glob("*.tfrecord"))}


try:
    record(until=350)
except Exception as error:
    print(f"{type(error).__name__}; on disk by then: {len(files())} files")
before = files()
recording = record(until=10**9)
after = files()
kept = [name for name in before if after.get(name) == before[name]]
print(f"{recording.num_samples} images, {recording.bytes:,} bytes; {len(kept)} of {len(after)} files are from before the power cut")

# %% [markdown]
# ## Does a recording teach what the teacher teaches?
#
# Two students from the same weights, the same batches in the same order: one asks the teacher, the other reads. A recording takes
# the teacher's place in the `Distiller`, and its `dataset` the place of the data. (Without `shuffle=False` both would be shuffled,
# each in its own way.)


# %%
def make_student(width, seed):
    """A student of two small convolutions."""
    keras.utils.set_random_seed(seed)
    first, second = (layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (width, 2 * width))
    return keras.Sequential([keras.Input((8, 8, 1)), first, second, layers.Flatten(), layers.Dense(10)], name="student")


def distil(source, width, seed, data, epochs=EPOCHS):
    """A student that learned from labels where there are any, and from a teacher or a recording; and its seconds an epoch."""
    student = make_student(width, seed)
    distiller = keras_kd.Distiller(source, student, student_loss_weight=0.1)
    distiller.compile(keras.optimizers.Adam(0.01), supervised)
    distiller.fit(**data, epochs=1, verbose=0)  # with the time to compile
    start = time.perf_counter()
    distiller.fit(**data, epochs=epochs - 1, verbose=0)
    return student, (time.perf_counter() - start) / (epochs - 1)


def from_disk(recorded, shuffle=True):
    """What `fit` takes to learn from a recording."""
    return {"x": recorded.dataset(batch_size=60, shuffle=shuffle), "shuffle": False}  # it has shuffled by itself


in_order = {"x": images, "y": labels, "batch_size": 60, "shuffle": False}
live, live_seconds = distil(teacher, 8, 0, in_order, epochs=5)
read, read_seconds = distil(recording, 8, 0, from_disk(recording, shuffle=False), epochs=5)
difference = float(np.max(np.abs(live(test_x) - read(test_x))))
scale = float(np.std(live(test_x)))
print(f"largest difference of a logit: {difference:.1e}, where logits have a spread of {scale:.1f}")
print(f"seconds an epoch: {live_seconds:.2f} with the teacher, {read_seconds:.2f} from disk")

# %% [markdown]
# No difference but rounding. (With `dtype="float16"`, the default, the answers take half the room, and logits are rounded in the
# fourth digit.) Do not expect the time of an epoch to fall with a teacher as small as this one: reading costs, too. What a
# recording saves is the teacher's forward pass, so it pays for teachers that are large, or far away.
#
# ## Views
#
# Augmentation has a catch: the teacher must answer for the image that the student sees, not for the one that it came from.
# `augment` is applied before the teacher sees a sample; stored are the seeds, and reading replays them. Check that, as long as the
# teacher is there: what it says of each view that is read against what was recorded, and against what it says of other views.

# %%
VIEWS = 4


def jitter(image, seed):
    """One image, moved by up to a pixel each way and with noise, as the seed says."""
    row, column = tf.unstack(tf.random.stateless_uniform((2,), seed, 0, 3, dtype="int32"))
    moved = tf.pad(image, ((1, 1), (1, 1), (0, 0)))[row : row + 8, column : column + 8]
    return tf.ensure_shape(moved + tf.random.stateless_normal((8, 8, 1), seed, stddev=0.1), (8, 8, 1))


views = keras_kd.record_teacher(
    teacher, (images, labels), folder / "views", augment=jitter, views=VIEWS, dtype="float32", verbose=0
)
consistent = other = 0.0
for seen, said in views.dataset(batch_size=60, targets="teacher"):
    answer = teacher(seen, training=False)
    consistent = max(consistent, float(np.max(np.abs(answer - said))))
    other = max(other, float(np.mean(np.abs(np.roll(answer, 1, axis=0) - said))))
print(f"{len(views)} views; the recorded answers are those for what the student sees, to {consistent:.1e}")

# %% [markdown]
# ## Three students, no teacher
#
# The teacher goes. Each student learns twice: from the 40 labels alone, in as many steps; and from the recording, all 600 images.

# %%
size, teacher = teacher.count_params(), None
recording = keras_kd.Recording(folder / "recorded")  # as another process, or another machine, would open it
alone, taught = np.zeros((2, len(WIDTHS), len(SEEDS)))
parameters = []
for row, width in enumerate(WIDTHS):
    for seed in SEEDS:
        student = make_student(width, seed)
        student.compile(keras.optimizers.Adam(0.01), supervised)
        few = np.tile(labelled, 15)  # as many images an epoch
        student.fit(images[few], labels[few], batch_size=60, epochs=EPOCHS, verbose=0)
        alone[row, seed] = accuracy(student)
        taught[row, seed] = accuracy(distil(recording, width, seed, from_disk(recording))[0])
    parameters.append(student.count_params())
    print(f"{parameters[-1]:6,} parameters: 40 labels {alone[row].mean():.1%}, recording {taught[row].mean():.1%}")

figure, axes = plt.subplots(figsize=(6.2, 3.5), layout="constrained")
for values, color, name in ((taught, BLUE, "recorded teacher, 600 images"), (alone, RED, "40 labels")):
    axes.plot(parameters, 100 * values, "o", color=color, alpha=0.35)
    axes.plot(parameters, 100 * values.mean(axis=1), "D-", color=color, label=name)
axes.axhline(100 * teacher_accuracy, color="black", linestyle="--", label=f"the teacher, {size:,} parameters")
axes.set_xscale("log")
axes.set_xticks(parameters, [f"{number:,}" for number in parameters])
axes.minorticks_off()
axes.set(xlabel="parameters of the student", ylabel="test accuracy, %", title="One recording teaches students of any size")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Do the views help?
#
# The same student, the same number of steps; four views of each image in the place of one.

# %%
seen_views = [accuracy(distil(views, 8, seed, from_disk(views), epochs=max(2, EPOCHS // VIEWS))[0]) for seed in SEEDS]
plain = taught[WIDTHS.index(8)]
print(f"one view {plain.mean():.1%}, {VIEWS} views {np.mean(seen_views):.1%}")
print(f"views against none, points of each seed: {', '.join(f'{100 * change:+.1f}' for change in seen_views - plain)}")

# %% [markdown]
# They do not: with every seed the student is *worse*. It has the same number of steps for four times as many pictures, and a digit
# of 8 x 8 pixels that is moved by one is another picture, which the test does not ask for. Views are for data where what `augment`
# does also happens in use, and for longer trainings. What holds in any case is that student and teacher saw the same.
#
# ## What must hold
#
# Claims that a wrong method does not survive: a recording that mixes samples up, that stores the answer for another view, that
# begins again after a power cut, or a -1 that is taken for a class.

# %%
assert len(kept) >= 3
assert recording.num_samples == 600
assert difference < 1e-3 * scale
assert consistent < 1e-3 < 0.5 < other
assert np.all(np.mean(taught - alone, axis=1) > 0.04)
assert min(taught[WIDTHS.index(8)]) > (0.75 if FAST else 0.85)
scratch.cleanup()
print("All of it holds.")
