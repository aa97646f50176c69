# %% [markdown]
# # What changes when the model reads text, and each position has an answer of its own?
#
# A language model gives a distribution for every position of a text: what comes next? A teacher then says a lot. From "the val" a
# label says "u"; the teacher says that "u" is likely, "i" is possible, and "x" is not. That is said for each letter, and for
# padding too, which means nothing: sequences of a batch are filled up to one length, and a loss that counts those positions learns
# to predict filling.
#
# On this page a Transformer that has read thousands of phrases teaches a small recurrent network that has 300. We check with NumPy
# that padding counts for nothing, store the teacher's eight likeliest letters of each position, compare the student with one that
# learns from the text alone, and write a file that completes words.

# %%
import os
import pathlib
import pydoc_data.topics
import re
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import log_softmax

import keras_kd

FAST = os.environ.get("KERAS_KD_FAST") == "1"  # the tests of this repository run a short version
SEEDS = range(1 if FAST else 2)
EPOCHS = 20 if FAST else 40
LENGTH = 32
BLUE, RED, GREY = "#2e6f8e", "#bf616a", "#4c566a"
LETTERS = " abcdefghijklmnopqrstuvwxyz,.'()-"  # codes 1, 2, ...; 0 is padding
CLASSES = len(LETTERS) + 1
layers = keras.layers
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
scratch = tempfile.TemporaryDirectory()
folder = pathlib.Path(scratch.name)

# %% [markdown]
# ## The text
#
# Python comes with the text of its own manual, for `help()`. We take phrases of 12 to 33 characters, each once. What is read is a
# phrase without its last character; what is asked is the same without its first one. Teacher, student and test have different ones.


# %%
def phrases():
    """Pieces of the manual, each once, in an order by chance."""
    pages = [re.sub(r"\s+", " ", page).lower() for _, page in sorted(pydoc_data.topics.topics.items())]
    found = (piece.strip() for page in pages for piece in re.findall(r"[a-z][a-z ,.'()-]{11,32}(?![a-z])", page))
    return np.random.default_rng(0).permutation(list(dict.fromkeys(found)))


def encode(texts):
    """Codes, filled up with 0: shape `(texts, LENGTH + 1)`."""
    codes = np.zeros((len(texts), LENGTH + 1), "int32")
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = [LETTERS.index(letter) + 1 for letter in text]
    return codes


codes = encode(phrases())
x, y = np.where(codes[:, 1:] > 0, codes[:, :-1], 0), codes[:, 1:]
test_x, test_y = x[:500], y[:500]
train_x, train_y = x[500:800], y[500:800]
teacher_x, teacher_y = x[800:4800], y[800:4800]
print(f"{len(x):,} phrases; {np.mean(x == 0):.0%} of the positions are padding")
print(f"the student's: {len(train_x)}, {np.sum(train_x > 0):,} characters")
for row in train_x[:3]:
    print("  " + "".join(LETTERS[code - 1] for code in row if code))

# %% [markdown]
# ## Two models that have nothing in common but their ends
#
# `mask_zero=True` of the embedding is all that says which positions are real. Keras hands that mask from layer to layer, up to the
# output; the `Distiller` takes it from there. Teacher and student may be of any kind, as long as they read and answer alike.


# %%
def transformer(width=48, heads=3, blocks=2):
    """Reads all characters up to a position at once."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = layers.Embedding(LENGTH, width)(keras.ops.zeros_like(inputs) + keras.ops.arange(LENGTH))
    h = layers.Add()([layers.Embedding(CLASSES, width, mask_zero=True)(inputs), positions])
    for _ in range(blocks):
        normed = layers.LayerNormalization()(h)
        h = layers.Add()([h, layers.MultiHeadAttention(heads, width // heads)(normed, normed, use_causal_mask=True)])
        wide = layers.Dense(4 * width, activation="relu")(layers.LayerNormalization()(h))
        h = layers.Add()([h, layers.Dense(width)(wide)])
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.LayerNormalization()(h)))


def recurrent(seed, units=48, mask_zero=True):
    """Reads a character after the other, and keeps a state."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((LENGTH,), dtype="int32")
    embedded = layers.Embedding(CLASSES, 16, mask_zero=mask_zero)(inputs)
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GRU(units, return_sequences=True)(embedded)))


def fit(model, rate, data, epochs, **options):
    """Trains with a learning rate that falls along a cosine."""
    steps = len(data[0]) // data[2] if len(data) == 3 else len(data[0])
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, epochs * steps)), cross_entropy)
    model.fit(*data, epochs=epochs, verbose=0, **options)


def bits(logits, y):
    """Bits for each real character: what a code made of these distributions would need."""
    log_p = np.take_along_axis(log_softmax(logits, axis=-1), y[..., np.newaxis], axis=-1)[..., 0]
    return float(-np.mean(log_p[y > 0]) / np.log(2))


keras.utils.set_random_seed(0)
teacher = transformer()
fit(teacher, 4e-3, (teacher_x, teacher_y, 50), epochs=6)
teacher_bits = bits(teacher.predict(test_x, verbose=0), test_y)
print(f"teacher: {teacher.count_params():,} weights, {teacher_bits:.2f} bits for each character of the test")

# %% [markdown]
# ## Does padding count?
#
# The truth in NumPy: the divergence of student from teacher, as a mean over real positions, and over all of them. Then what the
# `Distiller` says: of the same student; with other labels where there is padding; and of a student whose embedding has forgotten
# `mask_zero`. That is how it goes wrong in practice: nothing fails, and the number is another.


# %%
def evaluated(student, y):
    """The losses of a student on the test phrases, in one batch."""
    distiller = keras_kd.Distiller(teacher, student, keras_kd.losses.KDLoss(temperature=2.0))
    distiller.compile(loss=cross_entropy)
    return distiller.evaluate(test_x, y, batch_size=len(test_x), verbose=0, return_dict=True)


student, forgetful = recurrent(0), recurrent(0, mask_zero=False)
log_p_t, log_p_s = (log_softmax(model.predict(test_x, verbose=0) / 2.0, axis=-1) for model in (teacher, student))
divergence = 2.0**2 * np.sum(np.exp(log_p_t) * (log_p_t - log_p_s), axis=-1)  # a value for each position
real = float(np.mean(divergence[test_x > 0]))
everywhere = float(np.mean(divergence))
noise = np.random.default_rng(1).integers(CLASSES, size=test_y.shape)
masked, disturbed = evaluated(student, test_y), evaluated(student, np.where(test_x > 0, test_y, noise))
unmasked = evaluated(forgetful, test_y)
print(f"NumPy: real positions {real:.5f}, all positions {everywhere:.5f}")
print(f"Distiller: with a mask {masked['distillation_loss']:.5f}, without one {unmasked['distillation_loss']:.5f}")

# %% [markdown]
# ## The teacher's likeliest letters, on disk
#
# A vocabulary is large, and most of it is unlikely. `top_k=8` keeps the eight likeliest classes of each position, and what is left
# for all others together. The recording holds the student's phrases, too: a step costs what a plain step does, and one pass of the
# teacher serves all students below.

# %%
recording = keras_kd.record_teacher(teacher, (train_x, train_y), folder / "recording", top_k=8, verbose=0)
probabilities = np.sort(np.exp(log_softmax(teacher.predict(train_x, verbose=0), axis=-1)), axis=-1)[train_x > 0]
kept = float(np.mean(np.sum(probabilities[:, -8:], axis=-1)))
print(f"eight of {CLASSES} classes hold {kept:.1%} of the probability")

# %% [markdown]
# ## Does the teacher help?
#
# The same student from the same weights, for as many steps: from the text alone, and from text and teacher. The temperature is 1,
# since what is learned is the distribution itself. With so little text a student learns it by heart, so the text alone gets a
# second chance: its best epoch, chosen by the test phrases themselves, which flatters it.

# %%
ways = {"text alone": [], "text alone, best epoch": [], "text and teacher": []}
for seed in SEEDS:
    for way, students in ways.items():
        student, data, options = recurrent(seed), (train_x, train_y, 25), {}
        trained = student
        if way == "text alone, best epoch":
            best = keras.callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True)
            options = {"validation_data": (test_x, test_y), "validation_batch_size": 250, "callbacks": [best]}
        if way == "text and teacher":
            data, options = (recording.dataset(25, shuffle=True, seed=seed),), {"shuffle": False}  # it shuffles by itself
            trained = keras_kd.Distiller(recording, student, keras_kd.losses.KDLoss(1.0), student_loss_weight=0.1)
        fit(trained, 1e-2, data, EPOCHS, **options)
        students.append(student)
own, new = (
    {way: np.array([bits(student.predict(x, verbose=0), y) for student in students]) for way, students in ways.items()}
    for x, y in ((train_x, train_y), (test_x, test_y))
)
for way in ways:
    print(f"{way:23} bits for a character: own phrases {np.mean(own[way]):.2f}, new phrases {np.mean(new[way]):.2f}")

figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
for values, color, name in ((own, GREY, "its 300 phrases"), (new, BLUE, "new phrases")):
    for place, way in enumerate(ways):
        axes.plot(values[way], [place] * len(values[way]), "o", color=color, alpha=0.6, label=None if place else name)
axes.axvline(teacher_bits, color=RED, linestyle="--", label="teacher, new phrases")
axes.set_yticks(range(len(ways)), list(ways))
axes.set(
    xlabel="bits for a character (less is better)", title="With a teacher it learns the language, not its phrases", ylim=(2.6, -0.6)
)
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# 300 phrases are learned by heart: their own letters cost ever less, and new ones more again after the best epoch. What the teacher
# says of each position cannot be learned by heart so easily. The gain over the best epoch is small, the same with both seeds, and
# takes no choice of an epoch. The teacher itself, which has read thirteen times as much, is ahead by twice that.
#
# ## A file that completes words
#
# Recurrent layers stay in float in a file of integers, so `"dynamic"` is what there is to gain here: weights of 8 bits, activations
# in float. The file reads 32 characters at a time; padding comes last and the model does not look ahead, so the beginning of a
# text can be asked for as it is. Below, the file writes the likeliest letter, again and again.


# %%
def complete(beginning, letters=12):
    """The beginning, and what the file goes on with."""
    text = beginning
    for _ in range(letters):
        logits = keras_kd.export.run_litert(file, encode([text])[:, :LENGTH])[0][0, len(text) - 1]
        text += LETTERS[int(np.argmax(logits[1:]))]
    return text


file = folder / "student.tflite"
student = ways["text and teacher"][0]
plain = keras_kd.export.to_litert(student, folder / "float.tflite", check_data=test_x[:50])
written = keras_kd.export.to_litert(student, file, quantization="dynamic", check_data=test_x[:50])
file_bits, model_bits = bits(keras_kd.export.run_litert(file, test_x)[0], test_y), bits(student.predict(test_x, verbose=0), test_y)
print(f"{plain.size:,} bytes in float, {written.size:,} in 8 bits: {file_bits:.3f} bits a character, the model {model_bits:.3f}")
print(*(complete(beginning) for beginning in ("the val", "is called w", "an attrib")), sep="\n")

# %% [markdown]
# ## What must hold
#
# Claims that a wrong method does not survive: a loss that counts padding, a mask that is lost on the way, a recording of other
# positions than those of the text, a teacher that knows no more than the phrases do, or a file that computes something else.

# %%
gain = np.minimum(new["text alone"], new["text alone, best epoch"]) - new["text and teacher"]
print(f"gained by the teacher, bits of each seed: {', '.join(f'{value:.2f}' for value in gain)}")

assert abs(masked["distillation_loss"] / real - 1) < 1e-3
assert abs(unmasked["distillation_loss"] / real - 1) > 0.02
assert abs(masked["student_loss"] - disturbed["student_loss"]) < 1e-5  # labels of padding are not read
assert 0.8 < kept < 1
assert teacher_bits < min(new["text and teacher"])
assert FAST or min(gain) > 0.05  # half of the epochs are too few for it
assert abs(file_bits - model_bits) < 0.05
assert written.size < plain.size
scratch.cleanup()
print("All of it holds.")
