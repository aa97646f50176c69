# %% [markdown]
# # Which parts of a trained network can go, and who takes over their work?
#
# Pruned weights still cost time: an ordinary device multiplies by zeros, too. *Surgery* takes whole channels out. A channel that
# the others give by a linear map can go without loss: the layer that read it reads the others instead, with other weights.
#
# `analysis.linear_analysis` measures that, and `surgery` acts on it, without labels or training. On this page we hide useless
# channels and see whether they are found; then we ask whether choosing well matters, and what the weights that are left are worth.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_kd
from keras_kd import surgery

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
SEEDS = range(1 if FAST else 2)
BUDGETS = (0.05,) if FAST else (0.5, 0.25, 0.1, 0.05)  # share of the multiply-accumulates that may stay
BLUE, RED, GREY = "#2e6f8e", "#bf616a", "#4c566a"
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layers = keras.layers


def accuracy(model):
    """Share of test images whose largest logit is the right one."""
    return float(np.mean(np.argmax(model(test_x, training=False), axis=-1) == test_y))


def macs(model):
    """Multiply-accumulates of one image."""
    return keras_kd.profile.profile(model).macs


# %% [markdown]
# ## The data and the network
#
# scikit-learn's digits. Surgery sees 600 of the training images, without their labels.

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
train_x, test_x, train_y, test_y = train_test_split(x, y, train_size=1200, stratify=y, random_state=0)
unlabelled = train_x[: 300 if FAST else 600]


def build(widths):
    """Convolutions of these widths, each with batch normalisation and ReLU; an average over positions; ten logits."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for number, filters in enumerate(widths, 1):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{number}"))
        model.add(layers.BatchNormalization(momentum=0.9, name=f"norm{number}"))
        model.add(layers.ReLU(name=f"relu{number}"))
        if number < len(widths):
            model.add(layers.MaxPooling2D(name=f"pool{number}"))
    model.add(layers.GlobalAveragePooling2D(name="average"))
    model.add(layers.Dense(10, name="head"))
    return model


originals = []
for seed in SEEDS:
    keras.utils.set_random_seed(seed)
    originals.append(build((32, 64, 64)))
    originals[-1].compile(keras.optimizers.Adam(2e-3), cross_entropy)
    originals[-1].fit(train_x, train_y, batch_size=64, epochs=12 if FAST else 15, verbose=0)
original = originals[0]
scores = ", ".join(f"{accuracy(model):.1%}" for model in originals)
print(f"{macs(original):,} multiply-accumulates, {original.count_params():,} weights, test accuracy of each seed {scores}")

# %% [markdown]
# ## Eight useless channels, well hidden
#
# The second convolution gets eight channels that change nothing: six are copies, with the weights that read original and copy
# halved; two are zero behind their ReLU, whatever reads them.


# %%
def widen(model, copied, idle):
    """The same function with more channels in conv2: copies of some, and some that are always zero."""
    source = np.r_[np.arange(64), copied]
    share = np.where(np.isin(source, copied), 0.5, 1.0)[:, np.newaxis]

    def wider(values, axis, fill=0.0):
        pad = [(0, idle if place == axis else 0) for place in range(values.ndim)]
        return np.pad(np.take(values, source, axis), pad, constant_values=fill)

    wide = build((32, len(source) + idle, 64))
    for old, new in zip(model.layers, wide.layers, strict=True):
        weights = old.get_weights()
        if old.name == "conv2":
            weights = [wider(weights[0], 3)]
        if old.name == "norm2":
            weights = [wider(values, 0) for values in weights]
        if old.name == "conv3":
            weights = [wider(weights[0], 2, fill=1.0)]
            weights[0][:, :, : len(source)] *= share
        new.set_weights(weights)
    return wide


copied, idle = (3, 10, 20, 30, 41, 57), 2
wide = widen(original, copied, idle)
print(f"largest change of a logit by widening: {np.max(np.abs(wide(test_x) - original(test_x))):.1e}")

# %% [markdown]
# ## A look inside
#
# One pass over the images. "Redundant" is the share of a channel's variance that a linear map of the layer's others gives, the mean
# over channels; "rank 99 %" the number of directions with 99 % of the variance; "linearity" how well a linear map stands for the
# layer; "cost" what the outputs lose if all channels became constants. What the next layers read are the rows of the ReLUs.

# %%
report = keras_kd.analysis.linear_analysis(wide, unlabelled, verbose=0)
print(report)

relus = [report[f"relu{number}"] for number in (1, 2, 3)]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for place, row in enumerate(relus):
    left.plot(place + np.linspace(-0.25, 0.25, row.channels), np.sort(row.redundancy), ".", color=BLUE)
    right.plot(np.arange(1, row.channels + 1) / row.channels, np.cumsum(row.spectrum) / np.sum(row.spectrum), label=row.name)
left.set_xticks(range(3), [row.name for row in relus])
left.set(ylabel="R² by the other channels", title="relu2 has channels that others give")
right.axhline(0.99, color=GREY, linestyle=":")
right.set(xlabel="directions / channels", ylabel="share of the variance", title="Few directions hold most of the variance")
right.legend()
plt.show()

# %% [markdown]
# A plan without a budget takes only what can go without loss: eight channels of conv2, the two, and one of each pair (either one).

# %%
plan = report.recommend()
print(plan)
named = {step.layer: step.channels for step in plan.steps if step.action == "remove_channels"}
narrow = surgery.remove_channels(wide, named, data=unlabelled)
change = float(np.max(np.abs(narrow(test_x) - original(test_x))))
print(f"removed: {named}; largest change of a logit: {change:.1e}")

# %% [markdown]
# ## How much can go, and does it matter which?
#
# Now the network as it was trained, and a budget: `prune_channels` takes the cheapest channels until it holds. `reconstruct` says
# what becomes of the layers that read them: `"layers"` fits each to what it gave before, by least squares on the unlabelled images;
# True (the default) then draws all of them to the original, by gradient descent; False leaves the weights as they are.

# %%
WAYS = {
    "redundancy, all layers fitted together": {},
    "redundancy, each layer fitted": {"reconstruct": "layers"},
    "magnitude, each layer fitted": {"criterion": "magnitude", "reconstruct": "layers"},
    "magnitude, nothing fitted": {"criterion": "magnitude", "reconstruct": False},
}
found = {way: np.zeros((len(originals), len(BUDGETS))) for way in WAYS}
for way, options in WAYS.items():
    for seed, budget in np.ndindex(len(originals), len(BUDGETS)):
        smaller = surgery.prune_channels(originals[seed], macs=BUDGETS[budget], data=unlabelled, verbose=0, **options)
        found[way][seed, budget] = accuracy(smaller)
    print(f"{way:40} " + "  ".join(f"{b:.0%}: {v:.1%}" for b, v in zip(BUDGETS, found[way].mean(axis=0), strict=True)))

figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for (way, values), color, mark in zip(found.items(), (BLUE, BLUE, RED, GREY), "os^x", strict=True):
    axes.plot(BUDGETS, 100 * values.mean(axis=0), mark + "-", color=color, label=way, fillstyle="none")
axes.axhline(100 * np.mean([accuracy(model) for model in originals]), color="black", linestyle="--", label="original")
axes.set_xscale("log")
axes.set_xticks(BUDGETS, [f"{budget:.0%}" for budget in BUDGETS])
axes.minorticks_off()
axes.set(xlabel="multiply-accumulates left", ylabel="test accuracy, %", title="What is fitted matters more than what is chosen")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# Without the fit little is left at half of the work. With it half costs next to nothing; at a twentieth it matters how one chooses.
#
# ## Smaller still, and then a training
#
# `factorize` makes a layer of low rank two thin ones. So: channels to a tenth, factorize to half of that, and `reconstruct` to draw
# all layers to the original once more. A `Distiller` trains the result on. Is what surgery left worth anything there? The control
# has the same shape and *new* weights, and is distilled in the same way, for as many steps.


# %%
def distil(teacher, student, seed, epochs):
    """Trains a student on teacher and labels; returns its test accuracy."""
    keras.utils.set_random_seed(seed)
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(keras.optimizers.Adam(2e-3), cross_entropy)
    distiller.fit(train_x, train_y, batch_size=64, epochs=epochs, verbose=0)
    return accuracy(student)


EPOCHS = (3,) if FAST else (3, 6, 12)  # one after the other: 21 in all
stages = {name: [] for name in ("a tenth", "factorized", "reconstructed")}
kept_weights, new_weights = [], []
for seed, teacher in enumerate(originals):
    tenth = surgery.prune_channels(teacher, macs=0.1, data=unlabelled, verbose=0, reconstruct="layers")
    thin, factorization = surgery.factorize(tenth, macs=0.5, data=unlabelled, return_report=True)
    small = surgery.reconstruct(thin, teacher, unlabelled, verbose=0)
    for values, model in zip(stages.values(), (tenth, thin, small), strict=True):
        values.append(accuracy(model))
    keras.utils.set_random_seed(100 + seed)
    anew = keras.models.clone_model(small)
    new_weights.append([accuracy(anew), *(distil(teacher, anew, seed, epochs) for epochs in EPOCHS)])
    kept_weights.append([accuracy(small), *(distil(teacher, small, seed, epochs) for epochs in EPOCHS)])
print(factorization)
print({name: f"{np.mean(values):.1%}" for name, values in stages.items()})
print(f"{macs(small) / macs(original):.1%} of the multiply-accumulates, {small.count_params():,} weights")

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
trained = np.cumsum((0, *EPOCHS))
for name, values, color in (("what surgery left", kept_weights, BLUE), ("new weights", new_weights, RED)):
    axes.plot(trained, 100 * np.transpose(values), ".-", color=color, alpha=0.5)
    axes.plot([], [], color=color, label=name)
    print(f"{name:18}", {f"{n} epochs": f"{v:.1%}" for n, v in zip(trained.tolist(), np.mean(values, axis=0), strict=True)})
axes.set(xlabel="epochs of distillation", ylabel="test accuracy, %", title="Training begins where surgery ended (line: seed)")
axes.legend()
plt.show()

# %% [markdown]
# Three epochs take the small network, with a twentieth of the work, to about a point below the original; with new weights they are
# not nearly enough. The longer the training, the less its beginning matters: after 21 epochs a point is left, which these test
# images and two seeds hardly tell from nothing. `factorize` brought nothing here beyond what channels alone give (the lowest budget
# of the figure before). On wider networks it does: see [what surgery costs](../docs/surgery.md#what-it-costs).
#
# ## What must hold
#
# A wrong regression fails here, and so do indices off by one, layers with slices of old weights, and a training of new ones.

# %%
together, each, by_magnitude, unfitted = (values[:, -1] for values in found.values())  # each seed, at the lowest budget
ahead = np.subtract(kept_weights, new_weights)
print(f"ahead after {EPOCHS[0]} epochs, points of each seed: {', '.join(f'{100 * value:.1f}' for value in ahead[:, 1])}")
gone = set(named.pop("conv2"))
assert (len(gone), named) == (len(copied) + idle, {})
assert {70, 71} < gone  # those that are always zero
assert all(len(gone & {old, new}) == 1 for old, new in zip(copied, range(64, 70), strict=True))
assert change < 1e-4
assert macs(small) <= 0.05 * macs(original)
assert min(each - unfitted) > 0.4
assert np.mean(together - each) > 0.02
assert np.mean(each - by_magnitude) > (0.0 if FAST else 0.02)
assert np.mean(stages["reconstructed"]) > np.mean(stages["factorized"]) + 0.01
assert min(ahead[:, 1]) > 0.08
assert min(np.max(kept_weights, axis=1)) > 0.95
print("All of it holds.")
