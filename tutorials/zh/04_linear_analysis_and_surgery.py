# %% [markdown]
# # 训练好的网络里，哪些部分可以去掉？它们的工作由谁接手？
#
# 逐个权重剪枝之后，网络仍与原来一样宽：零能节省字节，但普通设备照样要拿它们做乘法。
# *结构手术*（surgery）去掉的是整个通道，得到的是一个更小的普通网络。去掉哪些呢？
# 如果一个通道可以由其他通道经线性映射得到，去掉它就没有损失：原来读取它的层改为读取其他通道，只是换一组权重。
#
# `analysis.linear_analysis` 对每一层做这样的线性分析，`surgery` 则据此动手。两者都不需要标签，也不需要训练。
# 在本页中，我们先藏进一些无用的通道，看能否找出来；然后再问：选得好不好是否重要，留下的权重是否有价值，还是不如从头训练。

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
# ## 数据与网络
#
# scikit-learn 的手写数字。结构手术只看 600 张训练图像，不看它们的标签。

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
print(f"{macs(original):,} multiply-accumulates, {original.count_params():,} weights")
print(f"test accuracy of each seed: {', '.join(f'{accuracy(model):.1%}' for model in originals)}")

# %% [markdown]
# ## 八个藏得很好的无用通道
#
# 一场我们知道答案的测验。给第二个卷积层加上八个什么也不改变的通道：六个是副本，下一层读取原通道和副本的权重各减半；
# 另外两个在 ReLU 之后恒为零，无论读取它们的权重是多少。


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
# ## 看看内部
#
# 把图像过一遍。“redundant”（冗余度）是一个通道的方差中，能由同层其他通道经线性映射得到的比例，取各通道的平均；
# “rank 99 %”（秩）是包含 99 % 方差的方向的个数；“linearity”（线性度）是用一个线性映射代替该层的效果；
# “cost”（代价）是所有通道都变成常数时输出的损失。ReLU 那几行就是下一层读到的内容。

# %%
report = keras_kd.analysis.linear_analysis(wide, unlabelled, verbose=0)
print(report)

relus = [report[f"relu{number}"] for number in (1, 2, 3)]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for place, row in enumerate(relus):
    left.plot(place + np.linspace(-0.25, 0.25, row.channels), np.sort(row.redundancy), ".", color=BLUE)
    right.plot(np.arange(1, row.channels + 1) / row.channels, np.cumsum(row.spectrum) / np.sum(row.spectrum), label=row.name)
left.set_xticks(range(3), [row.name for row in relus])
left.set(ylabel="R² by the other channels")
left.set_title("relu2 has channels that others give (dot: channel)", fontsize=10)
right.axhline(0.99, color=GREY, linestyle=":")
right.set(xlabel="directions, as a share of the channels", ylabel="share of the variance")
right.set_title("Fewer directions than channels hold most of the variance", fontsize=10)
right.legend()
plt.show()

# %% [markdown]
# 没有预算的计划只去掉可以无损去掉的部分。它应当指出 conv2 的八个通道：那两个恒为零的，以及每对相同通道中的一个。
# （不一定是副本本身：两个相同的通道，去掉哪一个都可以。）

# %%
plan = report.recommend()
print(plan)
named = {step.layer: step.channels for step in plan.steps if step.action == "remove_channels"}
narrow = surgery.remove_channels(wide, named, data=unlabelled)
change = float(np.max(np.abs(narrow(test_x) - original(test_x))))
print(f"removed: {named}; largest change of a logit: {change:.1e}")

# %% [markdown]
# ## 能去掉多少？去掉哪些重要吗？
#
# 现在换成训练好的原网络，并给定预算：`prune_channels` 先去掉代价最小的通道，直到满足预算。
# 接着由 `reconstruct` 决定如何处理读取这些通道的层：`"layers"` 在无标签图像上用最小二乘法把每一层拟合到它原来的输出；
# True（默认）随后还在同样的图像上用梯度下降，让所有层一起逼近原网络；False 则保持权重不变。整个过程都不看标签。

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
axes.set_xticks(BUDGETS, [f"{budget:.0%}" for budget in BUDGETS], minor=False)
axes.minorticks_off()
axes.set(xlabel="multiply-accumulates left", ylabel="test accuracy, %", title="What is fitted matters more than what is chosen")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# 没有拟合，计算量减到一半时就所剩无几了。有了拟合，无论用哪种标准来选，减半几乎没有损失；
# 到了二十分之一，用什么标准来选、各层是否一起拟合，就都有影响了。
#
# ## 再小一些，然后训练
#
# 除了宽度，秩也有压缩的余地：`factorize` 把一个低秩的层变成两个薄层。于是：先把通道减到十分之一的计算量，
# 再用 `factorize` 减去其中的一半，然后用 `reconstruct` 让所有层再次逼近原网络。得到的正是原网络自己的学生模型，
# 由 `Distiller` 继续训练。结构手术留下的权重在这里还有价值吗？对照组形状相同，但权重是*新的*，以同样的方式蒸馏同样多的步数。


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
    for name, model in zip(stages, (tenth, thin, small), strict=True):
        stages[name].append(accuracy(model))
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
# 小网络的计算量只有二十分之一，三轮训练就让它与原网络只差一个百分点左右；换成新权重，三轮远远不够。
# 训练越久，起点就越不重要：21 轮之后只差一个百分点，凭这些测试图像和两个种子，几乎无法断定这不是零。
# 结构手术节省训练，训练越少，它越有价值。
#
# 在这里，`factorize` 与“计算量相同、只去通道、所有层一起拟合”（上一幅图中最低的预算）相比，并没有带来更多好处。
# 在更宽的网络上则有：见[结构手术的代价](../../docs/surgery.md#what-it-costs)（英文）。
#
# ## 必须成立的结论
#
# 错误的方法通不过这些断言：算错的回归、错开一位的下标、只截取旧权重而不重新拟合的层，或者从新权重开始的蒸馏。

# %%
least = {way: values[:, -1] for way, values in found.items()}  # each seed, at the lowest budget
together, each, by_magnitude, unfitted = least.values()
ahead = np.subtract(kept_weights, new_weights)
print(f"ahead after {EPOCHS[0]} epochs, points of each seed: {', '.join(f'{100 * value:.1f}' for value in ahead[:, 1])}")

gone = set(named["conv2"])
assert list(named) == ["conv2"]
assert len(gone) == len(copied) + idle
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
