# %% [markdown]
# # Can one `fit` make a model sparse and of few bits, and does the file keep both?
#
# You have a trained network and a device with little memory. Two ways to spend less: set most weights to zero (*pruning*; zeros
# compress well), and keep the others as small integers (*quantisation*). Each costs accuracy when it is simply done to a finished
# model. Done while the model trains, the other weights learn to make up for it.
#
# In this library both are callbacks of `model.fit`: nothing to wrap before, nothing to strip afterwards. This page tries them on
# scikit-learn's digits, shows two traps, and asks of each part whether it is worth its time.

# %%
import os
import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_kd
from keras_kd.callbacks import KeepSparsity, Pruning, Quantization, SparseCheckpoint

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
SEEDS = range(1 if FAST else 3)
EPOCHS, STEPS_PER_EPOCH = 6 if FAST else 16, 16
SPARSITY = 0.8
WAYS = ("pruned in fit, then rounded", "both in one fit")
BLUE, RED, GREY = "#2e6f8e", "#bf616a", "#4c566a"
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
scratch = tempfile.TemporaryDirectory()
folder = pathlib.Path(scratch.name)


def accuracy(model):
    """Share of test images whose largest logit is the right one."""
    return float(np.mean(np.argmax(model(test_x, training=False), axis=-1) == test_y))


def kernels(model):
    """The weights that can be pruned: kernels, not biases or batch normalisation."""
    return [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]


def zeros(model):
    """Share of zeros in all kernels together."""
    return float(np.mean(np.concatenate([np.ravel(kernel) for kernel in kernels(model)]) == 0))


# %% [markdown]
# ## A trained network
#
# Three parts that share no image: to train on, to choose an epoch by, and to test on once that is done.

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=573, stratify=y, random_state=0)
train_x, val_x, train_y, val_y = train_test_split(rest_x, rest_y, train_size=1024, stratify=rest_y, random_state=0)
layers = keras.layers


def build():
    """Two convolutions, each with batch normalisation and ReLU, and two dense layers: 36,202 weights."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (32, 64):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D())
    for layer in (layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10)):
        model.add(layer)
    return model


def train(model, seed, callbacks=(), epochs=EPOCHS, validation_data=None):
    """Trains a model, from its present weights, in the ordinary way; returns what was logged."""
    keras.utils.set_random_seed(seed)
    model.compile(keras.optimizers.Adam(2e-3), cross_entropy)
    settings = {"batch_size": 64, "epochs": epochs, "validation_data": validation_data, "verbose": 0}
    return model.fit(train_x, train_y, callbacks=list(callbacks), **settings).history


def copy(model):
    """The same model once more."""
    twin = build()
    twin.set_weights(model.get_weights())
    return twin


dense = []
for seed in SEEDS:
    keras.utils.set_random_seed(seed)
    dense.append(build())
    train(dense[-1], seed)
print(f"{dense[0].count_params():,} weights, test accuracy of each seed: {', '.join(f'{accuracy(m):.1%}' for m in dense)}")

# %% [markdown]
# ## Cutting without training
#
# Set the smallest 80 % of all kernels' weights to zero, and look.


# %%
def cut(model, sparsity):
    """A copy whose smallest weights, over all kernels together, are zero."""
    twin = copy(model)
    threshold = np.quantile(np.concatenate([np.abs(np.ravel(kernel)) for kernel in kernels(twin)]), sparsity)
    for kernel in kernels(twin):
        kernel.assign(np.where(np.abs(kernel) > threshold, kernel, 0))
    return twin


shares = (0.2, 0.4, 0.6, SPARSITY)
one_shot = {share: [accuracy(cut(model, share)) for model in dense] for share in shares}
print({f"{share:.0%} zeros": f"{np.mean(values):.1%}" for share, values in one_shot.items()})

# %% [markdown]
# ## Both in one `fit`
#
# `Pruning` takes a schedule: here the share of zeros grows to 80 % over the first half of the steps, and the second half is for
# the weights that are left. `scope="global"` lets one threshold decide over all kernels. `Quantization` rounds kernels and
# activations in each step as the integers of the file will, and lets gradients pass.


# %%
def prune(sparsity):
    """A callback that prunes in the first half of a training."""
    half = EPOCHS * STEPS_PER_EPOCH // 2
    schedule = keras_kd.schedules.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=half, frequency=8)
    return Pruning(schedule, scope="global")


def compress(model, seed, num_bits=8):
    """Prunes and quantises a copy in one fit; returns the copy, and its Quantization callback."""
    twin, quantization = copy(model), Quantization(num_bits=num_bits)
    train(twin, seed, [prune(SPARSITY), quantization])
    return twin, quantization


compressed = [compress(model, seed) for seed, model in zip(SEEDS, dense, strict=True)]
student, quantization = compressed[0]
print(f"after fit: {zeros(student):.2%} zeros, test accuracy {accuracy(quantization.quantized_model()):.1%} rounded")

# %% [markdown]
# The model is still a plain Keras model, with its zeros in place; `quantized_model()` computes with the
# rounded numbers.
#
# ## First trap: which epoch to keep
#
# `ModelCheckpoint(save_best_only=True)` keeps the best epoch, and that may be one from before the pruning was done.
# `SparseCheckpoint` keeps the best of those that have their zeros. Let both watch one training, to 95 % zeros this time,
# more than this network bears well. (To 80 or 90 % it recovers so far that both keep the same epoch: the trap is not always there.)

# %%
files = {name: folder / f"{name}.weights.h5" for name in ("ModelCheckpoint", "SparseCheckpoint")}
usual = keras.callbacks.ModelCheckpoint(files["ModelCheckpoint"], save_best_only=True, save_weights_only=True)
ours = SparseCheckpoint(files["SparseCheckpoint"], 0.95, save_weights_only=True)
sparser, rounding = copy(dense[0]), Quantization()
curves = train(sparser, 0, [prune(0.95), rounding, usual, ours], validation_data=(val_x, val_y))

kept = {}
for name, file in files.items():
    sparser.load_weights(file)  # the ranges of that epoch come with its weights
    kept[name] = zeros(sparser), accuracy(rounding.quantized_model())
    print(f"{name:16} kept an epoch with {kept[name][0]:.1%} zeros, test accuracy {kept[name][1]:.1%}")

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
axes.plot(epochs, 100 * np.array(curves["sparsity"]), color=BLUE)
axes.set_ylabel("zeros in the kernels, %", color=BLUE)
axes.set(xlabel="epoch", ylim=(0, 100), title="The epoch of the least loss is not the one that you want")
right = axes.twinx()
right.plot(epochs, curves["val_loss"], color=RED)
right.set_ylabel("validation loss (rounded)", color=RED)
reached = np.array(curves["sparsity"]) > 0.95 - 1e-3
for name, mark, losses in zip(kept, "xo", (curves["val_loss"], np.where(reached, curves["val_loss"], np.inf)), strict=True):
    right.plot(
        epochs[np.argmin(losses)], np.min(losses), mark, color=GREY, markersize=10, fillstyle="none", label=f"kept by {name}"
    )
right.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Second trap: zeros that come back
#
# What a callback did in one `fit` nobody guards in the next. Train the sparse model one epoch more, alone and with
# `KeepSparsity`.

# %%
tuned = {}
for name, callbacks in {"alone": [], "KeepSparsity": [KeepSparsity()]}.items():
    twin = copy(student)
    train(twin, 0, callbacks, epochs=1)
    tuned[name] = zeros(twin)
print({name: f"{share:.1%} zeros" for name, share in tuned.items()})

# %% [markdown]
# ## Is training for it worth its time?
#
# Three ways to the same 80 % and the same integers, each from the same weights: both in one `fit`; `Pruning` in the same number of
# steps, rounded afterwards; and no training at all. Also the dense model, trained for as many steps more. With 8 bits, and with 2.


# %%
def rounded(model, num_bits):
    """What a finished model computes with kernels of so many bits; ranges come from the training images."""
    return Quantization(num_bits=num_bits, calibration_data=train_x).quantize(model)


results = {"dense, float": [], "pruned in fit, float": [], "cut, 8 bits": []}
results |= {f"{way}, {bits} bits": [] for bits in (8, 2) for way in WAYS}
for seed, model in zip(SEEDS, dense, strict=True):
    longer, pruned = copy(model), copy(model)
    if not FAST:
        train(longer, seed)
    train(pruned, seed, [prune(SPARSITY)])
    results["dense, float"].append(accuracy(longer))
    results["pruned in fit, float"].append(accuracy(pruned))
    results["cut, 8 bits"].append(accuracy(rounded(cut(model, SPARSITY), 8)))
    for bits, (_, trained) in {8: compressed[seed], 2: compress(model, seed, 2)}.items():
        results[f"pruned in fit, then rounded, {bits} bits"].append(accuracy(rounded(pruned, bits)))
        results[f"both in one fit, {bits} bits"].append(accuracy(trained.quantized_model()))
for name, values in results.items():
    print(f"{name:36} {np.mean(values):6.1%}   each seed: {', '.join(f'{value:.1%}' for value in values)}")

figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
for place, values in enumerate(results.values()):
    axes.plot(np.multiply(values, 100), [place] * len(values), "o", color=BLUE, alpha=0.4)
    axes.plot(100 * np.mean(values), place, "D", color=BLUE, markersize=8)
axes.set_yticks(range(len(results)), list(results))
axes.invert_yaxis()
axes.grid(axis="x", alpha=0.3)
axes.set(
    xlabel="test accuracy, % (dot: seed, diamond: mean)", title="Pruning must be trained for; rounding only where it is coarse"
)
plt.show()

# %% [markdown]
# Pruning without training is out of the question. Rounding to 8 bits is not worth training for on this network, as far as
# accuracy goes: rounded afterwards it is as good, and differences of a point are within what 573 images can tell. At 2 bits it is
# another matter. Does *your* network stand 8 bits without training? To round a finished model takes one line: try that first.
#
# What training with rounding gives at 8 bits, too: validation measures the model that goes into the file, before there is a file.
#
# ## The files
#
# `to_litert` writes a file, runs it, and compares it with the model. Three of them: the dense model in float; the dense model in
# integers, by ranges of training images; and what one `fit` gave. A zero of 8 bits takes as much room as any other number, so look
# at the bytes after gzip: what is sent or kept in flash is compressed.

# %%
names = ("dense, float", "dense, int8", "one fit")
paths = {name: folder / f"{name.replace(', ', '_')}.tflite" for name in names}
written = {
    "dense, float": keras_kd.export.to_litert(dense[0], paths["dense, float"], check_data=test_x),
    "dense, int8": keras_kd.export.to_litert(dense[0], paths["dense, int8"], representative_data=train_x, check_data=test_x),
    "one fit": keras_kd.export.to_litert(quantization.quantized_model(), paths["one fit"], check_data=test_x),
}
for name, report in written.items():
    print(f"{name:12}  the model's class in {report.agreement:.1%}, float operators: {list(report.float_operators)}")
comparison = keras_kd.report.compare(paths, test_x, test_y, latency=False, verbose=0)
print(comparison)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
rows = comparison.rows
left.bar([row.name for row in rows], [row.size / 1000 for row in rows], color=GREY, alpha=0.35, label="file")
bars = left.bar([row.name for row in rows], [row.gzip_size / 1000 for row in rows], color=BLUE, width=0.5, label="after gzip")
left.bar_label(bars, fmt="%.0f")
left.set(ylabel="kilobytes", title="Integers shrink the file, zeros what gzip makes of it")
left.legend()
low, high = np.array([row.accuracy_interval for row in rows]).T * 100
middle = np.array([row.accuracy for row in rows]) * 100
right.errorbar([row.gzip_size / 1000 for row in rows], middle, yerr=(middle - low, high - middle), fmt="D", color=BLUE, capsize=4)
for row in rows:
    right.annotate(row.name, (row.gzip_size / 1000, 100 * row.accuracy), (6, 6), textcoords="offset points")
right.set(xlabel="kilobytes after gzip", ylabel="test accuracy, % (95 % interval)", title="What it costs")
right.margins(x=0.2)
plt.show()

# %% [markdown]
# ## What must hold
#
# Claims that a wrong method does not survive: a mask that the optimizer breaks, a checkpoint that looks at the loss alone, rounding
# that training does not see, or a file that computes something else.

# %%
weights = sum(int(np.size(kernel)) for kernel in kernels(student))
one_fit, afterwards = ({bits: np.array(results[f"{way}, {bits} bits"]) for bits in (8, 2)} for way in WAYS[::-1])
print(f"one fit over rounding afterwards, points: {', '.join(f'{d:+.1f}' for d in 100 * (one_fit[2] - afterwards[2]))} (2 bits)")

assert abs(zeros(student) - SPARSITY) <= 1 / weights  # exact, to the weight
assert kept["ModelCheckpoint"][0] < 0.9 < 0.95 - 1e-3 < kept["SparseCheckpoint"][0]
assert tuned["alone"] < 0.3
assert tuned["KeepSparsity"] == zeros(student)
assert max(one_shot[SPARSITY]) < 0.5 < 0.93 < min(one_fit[8])
assert abs(np.mean(one_fit[8] - afterwards[8])) < (0.05 if FAST else 0.03)
assert np.mean(one_fit[2] - afterwards[2]) > 0.15
assert all(report.agreement > 0.98 for report in written.values())
assert not written["one fit"].float_operators
assert comparison["one fit"].sparsity > 0.75  # of all numbers in the file, biases too
assert comparison["one fit"].gzip_size * 8 < comparison["dense, float"].gzip_size
assert comparison["one fit"].gzip_size * 2 < comparison["dense, int8"].gzip_size
scratch.cleanup()
print("All of it holds.")
