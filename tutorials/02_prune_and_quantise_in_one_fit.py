# %% [markdown]
# # Can one `fit` make a model sparse and of few bits, and does the file keep both?
#
# You have a trained network and a device with little memory. Two ways to spend less: set most weights to zero (*pruning*; zeros
# compress well), and keep the others as small integers (*quantisation*). Done to a finished model, each costs accuracy; done while
# the model trains, the other weights learn to make up for it. Here both are callbacks of `model.fit`. This page tries them on
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
EPOCHS = 6 if FAST else 16
SPARSITY = 0.8
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
# Three parts of the data share no image: to train on, to choose an epoch by, and to test on once that is done.

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=573, stratify=y, random_state=0)
train_x, val_x, train_y, val_y = train_test_split(rest_x, rest_y, train_size=1024, stratify=rest_y, random_state=0)
layers = keras.layers


def build():
    """Two convolutions, each with batch normalisation and ReLU, and two dense layers: 36,202 weights."""
    body = []
    for filters in (32, 64):
        convolution = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        body += [convolution, layers.BatchNormalization(momentum=0.9), layers.ReLU(), layers.MaxPooling2D()]
    return keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(10)])


def copy(model):
    """The same model once more."""
    twin = build()
    twin.set_weights(model.get_weights())
    return twin


def train(model, seed, *callbacks, epochs=EPOCHS, validation_data=None):
    """Trains a copy of a model, from its present weights, in the ordinary way."""
    twin = copy(model)
    keras.utils.set_random_seed(seed)
    twin.compile(keras.optimizers.Adam(2e-3), cross_entropy)
    settings = {"batch_size": 64, "epochs": epochs, "validation_data": validation_data, "verbose": 0}
    twin.fit(train_x, train_y, callbacks=list(callbacks), **settings)
    return twin


dense = []
for seed in SEEDS:
    keras.utils.set_random_seed(seed)
    dense.append(train(build(), seed))
print(f"{dense[0].count_params():,} weights, test accuracy of each seed: {', '.join(f'{accuracy(m):.1%}' for m in dense)}")

# %% [markdown]
# ## Both in one `fit`
#
# `Pruning` takes a schedule: here the share of zeros grows to 80 % over the first half of the steps, and the second half is for
# the weights that are left. `scope="global"` lets one threshold decide over all kernels. `Quantization` rounds kernels and
# activations in each step as the integers of the file will, and lets gradients pass. The student stays a plain Keras model;
# `quantized_model()` computes with the rounded numbers.


# %%
def prune(sparsity):
    """A callback that prunes in the first half of a training, of 16 steps an epoch."""
    schedule = keras_kd.schedules.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=8 * EPOCHS, frequency=8)
    return Pruning(schedule, scope="global")


quantization = Quantization()  # 8 bits
student = train(dense[0], 0, prune(SPARSITY), quantization)
print(f"after fit: {zeros(student):.2%} zeros, test accuracy {accuracy(quantization.quantized_model()):.1%} rounded")

# %% [markdown]
# ## First trap: which epoch to keep
#
# `ModelCheckpoint(save_best_only=True)` keeps the best epoch, which may be one from before the pruning was done; `SparseCheckpoint`
# keeps the best of those that have their zeros. Let both watch one training, to 95 % zeros, more than this network bears well.
# (Where it recovers, both keep the same epoch: the trap is not always there.)

# %%
files = {name: folder / f"{name}.weights.h5" for name in ("ModelCheckpoint", "SparseCheckpoint")}
usual = keras.callbacks.ModelCheckpoint(files["ModelCheckpoint"], save_best_only=True, save_weights_only=True)
ours = SparseCheckpoint(files["SparseCheckpoint"], 0.95, save_weights_only=True)
rounding = Quantization()
sparser = train(dense[0], 0, prune(0.95), rounding, usual, ours, validation_data=(val_x, val_y))
curves = {name: np.array(values) for name, values in sparser.history.history.items()}

kept = {}
for name, file in files.items():
    sparser.load_weights(file)  # the ranges of that epoch come with its weights
    kept[name] = zeros(sparser), accuracy(rounding.quantized_model())
    print(f"{name:16} kept an epoch with {kept[name][0]:.1%} zeros, test accuracy {kept[name][1]:.1%}")

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
epochs, right = np.arange(1, EPOCHS + 1), axes.twinx()
axes.plot(epochs, 100 * curves["sparsity"], color=BLUE)
axes.set(xlabel="epoch", ylabel="zeros, % (blue)", ylim=(0, 100), title="The epoch of the least loss is not the one that you want")
right.plot(epochs, curves["val_loss"], color=RED)
right.set_ylabel("validation loss, rounded (red)")
sparse_loss = np.where(curves["sparsity"] > 0.95 - 1e-3, curves["val_loss"], np.inf)
for name, mark, losses in zip(kept, "xs", (curves["val_loss"], sparse_loss), strict=True):
    right.plot(epochs[np.argmin(losses)], np.min(losses), mark, color=GREY, markersize=10, label=f"kept by {name}")
right.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Second trap: zeros that come back
#
# What a callback did in one `fit` nobody guards in the next. Train the sparse model one epoch more, alone and with `KeepSparsity`.

# %%
tuned = {"alone": zeros(train(student, 0, epochs=1)), "KeepSparsity": zeros(train(student, 0, KeepSparsity(), epochs=1))}
print({name: f"{share:.1%} zeros" for name, share in tuned.items()})

# %% [markdown]
# ## Is training for it worth its time?
#
# Three ways to the same 80 % and the same integers, each from the same weights: both in one `fit`; `Pruning` in the same number of
# steps, rounded afterwards; and no training at all: the smallest weights are set to zero. Also the dense model, trained for as many
# steps more. With 8 bits, and with 2.


# %%
def cut(model):
    """A copy whose smallest weights, over all kernels together, are zero."""
    twin = copy(model)
    threshold = np.quantile(np.concatenate([np.abs(np.ravel(kernel)) for kernel in kernels(twin)]), SPARSITY)
    for kernel in kernels(twin):
        kernel.assign(np.where(np.abs(kernel) > threshold, kernel, 0))
    return twin


def ways(model, seed):
    """Name and test accuracy of each way."""
    yield "dense, float", accuracy(train(model, seed))
    yield "cut, 8 bits", accuracy(Quantization(calibration_data=train_x).quantize(cut(model)))
    pruned = train(model, seed, prune(SPARSITY))
    for bits in (8, 2):
        afterwards, both = Quantization(num_bits=bits, calibration_data=train_x), Quantization(num_bits=bits)
        train(model, seed, prune(SPARSITY), both)
        yield f"pruned in fit, then rounded, {bits} bits", accuracy(afterwards.quantize(pruned))
        yield f"both in one fit, {bits} bits", accuracy(both.quantized_model())


found = [dict(ways(model, seed)) for seed, model in zip(SEEDS, dense, strict=True)]
results = {name: np.array([one[name] for one in found]) for name in found[0]}
for name, values in results.items():
    print(f"{name:36} {np.mean(values):6.1%}   each seed: {', '.join(f'{value:.1%}' for value in values)}")

figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
for place, values in enumerate(results.values()):
    axes.plot(100 * values, [place] * len(values), "o", color=BLUE, alpha=0.4)
    axes.plot(100 * np.mean(values), place, "D", color=BLUE, markersize=8)
axes.set_yticks(range(len(results)), list(results))
axes.invert_yaxis()
axes.set(xlabel="test accuracy, % (dot: seed, diamond: mean)", title="Train for pruning, and for coarse rounding")
plt.show()

# %% [markdown]
# Pruning without training is out of the question. Rounding to 8 bits is not worth training for here: rounded afterwards it is as
# good, within what 573 images can tell. At 2 bits it is another matter. To round a finished model takes one line: try that first.
#
# ## The files
#
# `to_litert` writes a file, runs it, and compares it with the model. A zero of 8 bits takes as much room as any other number, so
# look at the bytes after gzip: what is sent or kept in flash is compressed.

# %%
# The model, and the images that give ranges to integers: what was trained with rounding has its own.
models = {"dense, float": (dense[0], None), "dense, int8": (dense[0], train_x), "one fit": (quantization.quantized_model(), None)}
paths = {name: folder / f"{name}.tflite" for name in models}
written = {}
for name, (model, ranges) in models.items():
    written[name] = keras_kd.export.to_litert(model, paths[name], representative_data=ranges, check_data=test_x)
    print(f"{name:12}  the model's class in {written[name].agreement:.1%}, float operators: {written[name].float_operators}")
comparison = keras_kd.report.compare(paths, test_x, test_y, latency=False, verbose=0)
print(comparison)

figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
axes.bar(list(models), [row.size / 1000 for row in comparison.rows], color=GREY, alpha=0.35, label="file")
bars = axes.bar(list(models), [row.gzip_size / 1000 for row in comparison.rows], color=BLUE, width=0.5, label="after gzip")
axes.bar_label(bars, fmt="%.0f")
axes.set(ylabel="kilobytes", title="Integers shrink the file, zeros what gzip makes of it")
axes.legend()
plt.show()

# %% [markdown]
# ## What must hold
#
# A mask that the optimizer breaks fails here, as does a checkpoint that looks at the loss alone, rounding that training does not
# see, or a file that computes something else.

# %%
gains = {bits: results[f"both in one fit, {bits} bits"] - results[f"pruned in fit, then rounded, {bits} bits"] for bits in (8, 2)}
print(f"one fit over rounding afterwards, points: {', '.join(f'{gain:+.1f}' for gain in 100 * gains[2])} (2 bits)")

assert abs(zeros(student) - SPARSITY) <= 1 / sum(np.size(kernel) for kernel in kernels(student))  # exact, to the weight
assert kept["ModelCheckpoint"][0] < 0.9 < 0.95 - 1e-3 < kept["SparseCheckpoint"][0]
assert tuned["alone"] < 0.3 < tuned["KeepSparsity"] == zeros(student)
assert max(results["cut, 8 bits"]) < 0.5 < 0.93 < min(results["both in one fit, 8 bits"])
assert abs(np.mean(gains[8])) < (0.05 if FAST else 0.03)
assert np.mean(gains[2]) > 0.15
assert all(report.agreement > 0.98 for report in written.values())
assert not written["one fit"].float_operators
assert comparison["one fit"].sparsity > 0.75  # of all numbers in the file, biases too
dense_float, dense_int8, one_fit = (row.gzip_size for row in comparison.rows)
assert one_fit < min(dense_float / 8, dense_int8 / 2)
scratch.cleanup()
print("All of it holds.")
