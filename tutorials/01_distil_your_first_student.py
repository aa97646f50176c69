# %% [markdown]
# # Can a small student learn from a teacher what a few labels cannot tell it?
#
# You need a model for a tiny device. You have many images, and labels for only a few. Somebody else has a large model, the
# *teacher*, that does the job well, but it does not fit the device, and the images that it learned from are gone.
#
# **Knowledge distillation** (Hinton, Vinyals, Dean, 2015) trains your small model, the *student*, to give the teacher's answers:
# it has one for any image, and it is more than a label: "a 9, though it looks a bit like a 4". `model.compile` and `model.fit`
# are nearly all that you need to know.

# %%
import os
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_kd

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
SEEDS = range(1 if FAST else 3)
EPOCHS = 8 if FAST else 20
BLUE, RED = "#2e6f8e", "#bf616a"


def accuracy(model):
    """Share of test images whose largest logit is the right one."""
    return float(np.mean(np.argmax(model(test_x, training=False), axis=-1) == test_y))


def draw(panel, found):
    """Draws each seed as a dot, the mean as a diamond."""
    for place, values in enumerate(found.values()):
        panel.plot([place] * len(values), np.multiply(values, 100), "o", color=BLUE, alpha=0.4)
        panel.plot(place, 100 * np.mean(values), "D", color=BLUE, markersize=8)
    panel.set_xticks(range(len(found)), [str(name) for name in found])
    panel.margins(x=0.2)


# %% [markdown]
# ## What you have, and what you do not
#
# scikit-learn's digits, 8 x 8 pixels, in three parts that share no image: the teacher's, yours, and the test's. Of your 600 images
# 60 have a label. The others are marked -1, which the loss is told to ignore.
#
# The teacher is an ordinary network, trained on its own images. Both models end in plain numbers (*logits*), not in softmax.

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
rest_x, test_x, rest_y, test_y = train_test_split(x, y, train_size=1300, stratify=y, random_state=0)
teacher_x, images, teacher_y, truth = train_test_split(rest_x, rest_y, test_size=600, stratify=rest_y, random_state=0)
labelled, _ = train_test_split(np.arange(600), train_size=60, stratify=truth, random_state=0)
labels = np.where(np.isin(np.arange(600), labelled), truth, -1)
del truth  # nobody tells you the other labels
print(f"yours: {np.sum(labels >= 0)} images with a label, {np.sum(labels < 0)} without; for the test: {len(test_x)}")

layers = keras.layers
supervised = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)

keras.utils.set_random_seed(0)
body = []
for filters in (32, 64):
    convolution = layers.Conv2D(filters, 3, padding="same", activation="relu")
    body += [convolution, layers.BatchNormalization(momentum=0.9), layers.MaxPooling2D()]
teacher = keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Flatten(), layers.Dropout(0.4), layers.Dense(10)])
teacher.compile(keras.optimizers.Adam(2e-3), supervised)
teacher.fit(teacher_x, teacher_y, batch_size=70, epochs=EPOCHS, verbose=0)
print(f"teacher: {teacher.count_params():,} parameters, test accuracy {accuracy(teacher):.1%}")

# %% [markdown]
# ## The student, alone and with the teacher
#
# *Alone*, the student sees only the 60 labelled images, ten times an epoch: as many steps as the distilled student takes, from the
# same initial weights. *Distilled*, it sees all 600. `keras_kd.Distiller` is a Keras model that trains its student on
#
# `student_loss_weight * loss on labels + (1 - student_loss_weight) * loss against the teacher`
#
# where `KDLoss` compares the two models' probabilities.


# %%
def make_student(seed):
    """A student of two small convolutions, its initial weights given by the seed."""
    keras.utils.set_random_seed(seed)
    first, second = (layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (8, 16))
    return keras.Sequential([keras.Input((8, 8, 1)), first, second, layers.Flatten(), layers.Dense(10)])


def train_alone(seed):
    """A student that learns from the labels only."""
    student = make_student(seed)
    student.compile(keras.optimizers.Adam(0.01), supervised)
    student.fit(np.tile(images[labelled], (10, 1, 1, 1)), np.tile(labels[labelled], 10), batch_size=60, epochs=EPOCHS, verbose=0)
    return student


def distil(seed, *, temperature=4.0, student_loss_weight=0.1, targets="soft", callbacks=()):
    """A Distiller whose student has learned from labels and teacher."""
    loss = keras_kd.losses.KDLoss(temperature, targets)
    distiller = keras_kd.Distiller(teacher, make_student(seed), loss, student_loss_weight=student_loss_weight)
    distiller.compile(keras.optimizers.Adam(0.01), supervised)
    distiller.fit(images, labels, batch_size=60, epochs=EPOCHS, verbose=0, callbacks=list(callbacks))
    return distiller


alone = [train_alone(seed) for seed in SEEDS]
distilled = [distil(seed) for seed in SEEDS]
print(f"student: {alone[0].count_params():,} parameters, {teacher.count_params() / alone[0].count_params():.0f} times fewer")

# %% [markdown]
# One thing changed twice: the distilled student saw more images, *and* it saw probabilities. To tell the two apart, a third student
# sees all images with nothing but the class that the teacher prefers: `targets="hard"`, also called pseudo-labels.

# %%
results = {
    "60 labels": [accuracy(model) for model in alone],
    "teacher's labels": [accuracy(distil(seed, targets="hard").student) for seed in SEEDS],
    "teacher's probabilities": [accuracy(distiller.student) for distiller in distilled],
}
for name, values in results.items():
    print(f"{name:24} {np.mean(values):6.1%}   each seed: {', '.join(f'{value:.1%}' for value in values)}")
gain = keras_kd.report.Gain(np.subtract(results["teacher's probabilities"], results["60 labels"]).tolist())
print(gain)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
draw(axes, results)
axes.axhline(100 * accuracy(teacher), color="black", linestyle="--", label="the teacher itself")
axes.set(ylabel="test accuracy, %", title="What the student learns from (dot: seed, diamond: mean)")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# Most of the gain comes from the images without labels: the teacher's labels alone bring it. What its probabilities add is the
# much smaller step between the two columns on the right.
#
# ## What a probability says that a label does not
#
# Divide logits by a *temperature* T above 1 before the softmax, and small probabilities grow until they can be seen, and learned
# from. Here are the image without a label on which the teacher hesitates most, and one on which it is as sure as usual.

# %%
unlabelled = images[labels < 0]
teacher_logits = np.asarray(teacher(unlabelled, training=False))
second_choice = np.sort(softmax(teacher_logits, axis=-1))[:, -2]
order = np.argsort(second_choice)
chosen = {"the hardest": order[-1], "an ordinary one": order[len(order) // 2]}

figure, axes = plt.subplots(2, 3, figsize=(9, 4.4), layout="constrained", width_ratios=(1, 2, 2))
for row, (name, index) in enumerate(chosen.items()):
    axes[row, 0].imshow(unlabelled[index, ..., 0], cmap="gray_r")
    axes[row, 0].set(title=name, xticks=[], yticks=[])
    for panel, temperature in zip(axes[row, 1:], (1.0, 4.0), strict=True):
        bars = panel.bar(range(10), softmax(teacher_logits[index] / temperature), color=BLUE)
        panel.bar_label(bars, fmt=lambda p: f"{100 * p:.0f}" if p >= 0.005 else "", fontsize=8)
        panel.set(title=f"teacher, T = {temperature:g}", ylabel="probability, %", ylim=(0, 1.12), xticks=range(10), yticks=[])
figure.suptitle("At T = 1 the teacher names a digit; at T = 4 it also says which others are close")
plt.show()

# %% [markdown]
# A label would be one bar; the others tell which digits resemble each other in this very image. `KDLoss` is the KL divergence
# between such rows, teacher's and student's: `T² * sum(p_t * log(p_t / p_s))`, with T² so that its gradients keep their size.
#
# ## Do temperature and weight matter?
#
# Change one, keep the other, and let the seeds show how much chance there is. (This is to look, not to choose: whoever chooses by
# the test images no longer has a test. Keep some labelled ones apart for it.)

# %%
default = results["teacher's probabilities"]
by_temperature = {t: [accuracy(distil(s, temperature=t).student) for s in SEEDS] for t in ((16.0,) if FAST else (1.0, 16.0))}
by_weight = {w: [accuracy(distil(s, student_loss_weight=w).student) for s in SEEDS] for w in (() if FAST else (0.0, 0.9))}
by_temperature, by_weight = (dict(sorted(found.items())) for found in (by_temperature | {4.0: default}, by_weight | {0.1: default}))

figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for panel, found, name in zip(panels, (by_temperature, by_weight), ("temperature", "student_loss_weight"), strict=True):
    draw(panel, found)
    panel.axhline(100 * np.mean(results["60 labels"]), color=RED, linestyle="--", label="60 labels, no teacher")
    panel.set_xlabel(name)
    print(name, {value: f"{np.mean(values):.1%}" for value, values in found.items()})
panels[0].set_ylabel("test accuracy, %")
panels[0].legend(loc="center")
figure.suptitle("Having a teacher matters more than how its words are weighed")
plt.show()

# %% [markdown]
# Here even extreme settings differ little beside what having a teacher gives; other data may answer differently. (The learning
# rate and the epochs of this page were chosen on this split: the comparison of the students is fair, its level is not.)
#
# ## Changing your mind while training
#
# Temperature and weights are plain attributes. Assign them in a callback, and the step that is already compiled follows.


# %%
class CoolDown(keras.callbacks.Callback):
    """From T = 8 and no labels to T = 2 and an equal share of both."""

    def on_epoch_begin(self, epoch, logs=None):
        """Sets both for the coming epoch."""
        progress = epoch / (self.params["epochs"] - 1)
        self.model.distillation_losses[0].temperature = 8.0 - 6.0 * progress
        self.model.student_loss_weight = 0.5 * progress


cooled = distil(0, callbacks=[CoolDown()])
temperature = cooled.distillation_losses[0].temperature
print(f"cooled from T = 8 to {temperature:g}: {accuracy(cooled.student):.1%}, constant: {default[0]:.1%}")

# %% [markdown]
# ## To the device
#
# `distiller.student` is the plain Keras model that you made. `to_litert` writes it as a LiteRT file, runs the file on images that
# you give it, and refuses to write one that does not compute what the model computes.

# %%
with tempfile.TemporaryDirectory() as folder:
    file, student = f"{folder}/student.tflite", distilled[0].student
    exported = keras_kd.export.to_litert(student, file, check_data=test_x)
    (logits,) = keras_kd.export.run_litert(file, test_x)
file_accuracy = float(np.mean(logits.argmax(axis=-1) == test_y))
print(f"{exported.size:,} bytes, the model's answer in {exported.agreement:.1%} of images, test accuracy {file_accuracy:.1%}")

# %% [markdown]
# ## What must hold
#
# Claims that a wrong method does not survive: a student without its teacher, a teacher that knows nothing, or a KL divergence of
# logits that nobody turned into probabilities.

# %%
kl_to_teacher = keras_kd.losses.KDLoss(4.0)
distance_alone, distance = (float(kl_to_teacher(teacher(test_x), model(test_x))) for model in (alone[0], student))
print(f"distance to the teacher on test images: alone {distance_alone:.2f}, distilled {distance:.2f}")

swept = [np.mean(values) for values in (*by_temperature.values(), *by_weight.values())]
assert accuracy(teacher) > 0.95
assert min(gain.differences) > (0.03 if FAST else 0.08), gain  # every seed
assert distance < (0.45 if FAST else 0.3) * distance_alone  # it learned the teacher's probabilities, not only its classes
assert min(swept) > np.mean(results["60 labels"])  # any setting beats no teacher
assert FAST or max(swept) - min(swept) < gain.mean / 2  # and they differ less than that
assert temperature == 2.0
assert accuracy(cooled.student) > results["60 labels"][0]
assert exported.agreement == 1.0
assert np.isclose(file_accuracy, accuracy(student))
print("All of it holds.")
