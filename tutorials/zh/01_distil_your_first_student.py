# %% [markdown]
# # 寥寥几个标签没能告诉学生模型的事，它能向教师模型学到吗？
#
# 您需要一个小到能装进微型设备的模型。图像您有很多，带标签的却只有几张。别人手里有一个大模型，即*教师模型*，
# 它能把任务做好，但装不进设备，当初训练它的图像也已经没有了。
#
# **知识蒸馏**（Hinton、Vinyals、Dean，2015）让您的小模型，即*学生模型*，学着给出教师的回答。
# 无论图像有没有标签，教师都能作答，而且它的回答比标签更丰富：“这是 9，不过有点像 4”。
# 只要会用 `model.compile` 和 `model.fit`，需要知道的您几乎都已经知道了。

# %%
import os
import pathlib
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
    panel.grid(axis="y", alpha=0.3)


# %% [markdown]
# ## 数据：您有什么，没有什么
#
# scikit-learn 的手写数字，8 x 8 像素，分成互不重叠的三部分：一部分只给教师看，一部分是您的，一部分用于测试。
# 您的 600 张图像中有 60 张带标签，其余的标为 -1，下文的损失函数会按设置忽略它们。

# %%
digits = load_digits()
x, y = (digits.images[..., np.newaxis] / 16).astype("float32"), digits.target
rest_x, test_x, rest_y, test_y = train_test_split(x, y, train_size=1300, stratify=y, random_state=0)
teacher_x, images, teacher_y, truth = train_test_split(rest_x, rest_y, test_size=600, stratify=rest_y, random_state=0)
labelled, _ = train_test_split(np.arange(600), train_size=60, stratify=truth, random_state=0)
labels = np.full(600, -1)
labels[labelled] = truth[labelled]
del truth  # nobody tells you the other labels
print(f"yours: {np.sum(labels >= 0)} images with a label, {np.sum(labels < 0)} without; for the test: {len(test_x)}")

# %% [markdown]
# ## 教师模型
#
# 一个普通的网络，用它自己的图像以普通的方式训练。两个模型输出的都是未归一化的数值（*logits*），末尾没有 softmax。

# %%
layers = keras.layers
supervised = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)

keras.utils.set_random_seed(0)
teacher = keras.Sequential([keras.Input((8, 8, 1))], name="teacher")
for filters in (32, 64):
    teacher.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
    teacher.add(layers.BatchNormalization(momentum=0.9))
    teacher.add(layers.MaxPooling2D())
teacher.add(layers.Flatten())
teacher.add(layers.Dropout(0.4))
teacher.add(layers.Dense(10))
teacher.compile(keras.optimizers.Adam(2e-3), supervised)
teacher.fit(teacher_x, teacher_y, batch_size=70, epochs=8 if FAST else 20, verbose=0)
print(f"teacher: {teacher.count_params():,} parameters, test accuracy {accuracy(teacher):.1%}")

# %% [markdown]
# ## 学生模型：单独学习，跟着教师学习
#
# *单独学习*的学生只看到 60 张带标签的图像，每轮重复十遍。这样它与蒸馏的学生走同样多的步数，初始权重也相同：
# 两者的差别在于学到的内容，而不是训练的长短。
#
# *蒸馏*的学生看到全部 600 张图像。`keras_kd.Distiller` 是一个 Keras 模型，它训练学生时的损失为
#
# `student_loss_weight * 标签上的损失 + (1 - student_loss_weight) * 相对教师的损失`
#
# 其中 `KDLoss` 比较两个模型的概率。`compile` 和 `fit` 与您熟悉的完全一样。


# %%
def make_student(seed):
    """A student of two small convolutions, its initial weights given by the seed."""
    keras.utils.set_random_seed(seed)
    first, second = (layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (8, 16))
    return keras.Sequential([keras.Input((8, 8, 1)), first, second, layers.Flatten(), layers.Dense(10)], name="student")


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
# 这里同时变了两件事：蒸馏的学生看到了更多图像，*并且*看到了概率。为了把两者分开，再训练第三个学生：它看到所有图像，
# 但只知道教师最倾向的那个类别：`targets="hard"`，也就是所谓的伪标签。

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
axes.set(ylabel="test accuracy, %", xlabel="what the student learns from (dot: seed, diamond: mean)")
axes.set_title("The teacher tells the student what the labels did not")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# 大部分提升来自没有标签的图像：仅凭教师给出的标签就能得到。教师的概率又增加了多少，看右边两列之间的差距，它要小得多。
#
# ## 概率比标签多说了什么
#
# 在 softmax 之前把 logits 除以*温度* T：当 T 大于 1 时，小概率会变大，大到看得见，也学得到。
# 下面是两张没有标签的图像，一张让教师最犹豫，另一张教师和平时一样有把握。

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
    for column, temperature in ((1, 1.0), (2, 4.0)):
        bars = axes[row, column].bar(range(10), softmax(teacher_logits[index] / temperature), color=BLUE)
        axes[row, column].bar_label(bars, fmt=lambda p: f"{100 * p:.0f}" if p >= 0.005 else "", fontsize=8)
        axes[row, column].set(title=f"teacher, T = {temperature:g}", ylim=(0, 1.12), xticks=range(10), yticks=[])
        axes[row, column].set_ylabel("probability, %")
figure.suptitle("At T = 1 the teacher names a digit; at T = 4 it also says which others are close")
plt.show()

# %% [markdown]
# 若换成标签，就只剩一根柱子。旁边那些柱子正是图像太少的学生无从得知的：就在这张图像里，哪些数字彼此相像。
# `KDLoss` 是教师与学生的这两行概率之间的 KL 散度：`T² * sum(p_t * log(p_t / p_s))`，乘以 T² 是为了让梯度的量级保持不变。
#
# ## 温度和权重重要吗？
#
# 人们常说要调的就是这两个数。改变其中一个，固定另一个，再看各个种子的结果，就知道其中有多少偶然。
# （这里只是看一看，并不是据此选择：用测试图像来选，就不再有测试集了。要做选择，请另外留出一些带标签的图像。）

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
# 在这里，与有没有教师相比，即使极端的设置也相差不大；而与种子间的波动一样大的差异，不足以说明哪个更好。
# 换成别的数据，答案可能不同：请在那里试几种设置，并且不止用一个种子。
# （本页的学习率和轮数是在这一数据划分上选定的；学生之间的比较是公平的，准确率的绝对水平则不然。）
#
# ## 在训练中途改主意
#
# 温度和权重都是普通的属性。在回调里给它们赋值，已经编译好的训练步会随之改变。


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
# ## 部署到设备
#
# `distiller.student` 就是您创建的那个普通 Keras 模型：没有需要拆掉的包装。`to_litert` 把它写成 LiteRT 文件，
# 在您提供的图像上运行这个文件；若文件的计算结果与模型不一致，就拒绝写出。

# %%
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "student.tflite"
    student = distilled[0].student
    exported = keras_kd.export.to_litert(student, file, check_data=test_x)
    (logits,) = keras_kd.export.run_litert(file, test_x)
file_accuracy = float(np.mean(logits.argmax(axis=-1) == test_y))
print(f"{exported.size:,} bytes, the model's answer in {exported.agreement:.1%} of {exported.samples} images")
print(f"test accuracy of the file: {file_accuracy:.1%}")

# %% [markdown]
# ## 必须成立的结论
#
# 错误的方法通不过这些断言：没有教师的学生、什么都不懂的教师，或者没有先把 logits 变成概率就计算的 KL 散度。

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
