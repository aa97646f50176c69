"""The small programs of introductions to this subject, in a few lines each: do they do what they say?"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import callbacks
from tests import references


def images(samples=256, *, classes=10, seed=0):
    """Images of 32 x 32 pixels in three colours: a coarse pattern for each class, and noise."""
    patterns = np.random.default_rng(99).normal(size=(classes, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    return (patterns[labels] + 1.5 * rng.normal(size=(samples, 32, 32, 3))).astype("float32"), labels


def vectors(samples=960, *, classes=5, readout=6, seed=0):
    """Vectors of 20 numbers, of which four decide on the class; tasks with another `readout` share what is between."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 20)).astype("float32")
    hidden = np.tanh(x[:, :4] @ np.random.default_rng(5).normal(size=(4, 8)))
    return x, np.argmax(hidden @ np.random.default_rng(readout).normal(size=(8, classes)), axis=1)


def network():
    keras.utils.set_random_seed(0)
    first = layers.Conv2D(8, 3, padding="same", name="conv1"), layers.ReLU(name="relu1"), layers.MaxPooling2D(8)
    rest = layers.Conv2D(16, 3, activation="relu", name="conv2"), layers.Flatten(), layers.Dense(10, "softmax", name="head")
    return keras.Sequential([keras.Input((32, 32, 3)), *first, *rest])


def perceptron(classes=5, *, seed=0, regularizer=None):
    keras.utils.set_random_seed(seed)
    body = [layers.Dense(32, "relu", kernel_regularizer=regularizer, name=name) for name in ("body1", "body2")]
    return keras.Sequential([keras.Input((20,)), *body, layers.Dense(classes, "softmax", name="head")])


def kernels_of(model):
    return [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]


def fitted(model, x, y, *, epochs, learning_rate=5e-3, batch_size=32, **kwargs):
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy")
    return model.fit(x, y, epochs=epochs, batch_size=batch_size, verbose=0, **kwargs)


def accuracy(model, x, y):
    return np.mean(np.argmax(model.predict(x, verbose=0), axis=1) == y)


# A network, some noise on its input, and how much of it comes out


@pytest.fixture(scope="module")
def analysed():
    """A CNN that has learned a little, and what the analysis says of it, for little and for much noise."""
    model, (x, y) = network(), images()
    fitted(model, x, y, epochs=6, learning_rate=2e-3)
    assert accuracy(model, x, y) > 0.7
    return model, keras_kd.analysis.linear_analysis(model, x, y, noise=(0.01, 1.0), verbose=0)


def noise_on(x, size):
    """As the analysis says: relative to the root mean square of each image."""
    return size * np.sqrt(np.mean(x**2, axis=(1, 2, 3), keepdims=True)) * np.random.default_rng(11).normal(size=x.shape)


def norms(x):
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def test_a_convolution_is_linear_and_its_relu_is_not(analysed):
    conv, relu = (analysed[1][name] for name in ("conv1", "relu1"))
    assert conv.linearity == pytest.approx(1, abs=1e-6)
    assert [one.explained for one in conv.responses] == pytest.approx([1, 1], abs=1e-6)
    assert relu.linearity < 0.95
    assert relu.responses[1].explained < relu.responses[0].explained < 1


def test_the_response_of_the_first_convolution_is_the_mean_ratio_found_by_hand(analysed):
    model, report = analysed
    kernel, bias = (weight.astype("float64") for weight in model.get_layer("conv1").get_weights())

    def convolve(x):
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        return bias + sum(padded[:, i : i + 32, j : j + 32] @ kernel[i, j] for i in range(3) for j in range(3))

    x, response = images()[0].astype("float64"), report["conv1"].responses[0]
    dx = noise_on(x, 0.01)
    ratios = (norms(convolve(x + dx) - convolve(x)) / norms(convolve(x))) / (norms(dx) / norms(x))
    error = np.std(ratios, ddof=1) / np.sqrt(len(ratios))
    assert response.ratio == pytest.approx(ratios.mean(), abs=4 * error)
    assert response.standard_error == pytest.approx(error, rel=0.3)
    assert 4 * error < 0.1 * ratios.mean()  # or the comparison would say nothing


def test_df_is_the_sum_of_derivatives_times_dx_for_little_noise_only(analysed):
    model, report = analysed
    x, found = tf.constant(images()[0]), {}
    for response in report["head"].responses:
        dx = tf.constant(noise_on(x.numpy(), response.noise), "float32")
        with tf.autodiff.ForwardAccumulator(x, dx) as accumulator:
            y = model(x)
        df, predicted = model(x + dx) - y, accumulator.jvp(y)
        found[response.noise] = [response.explained, 1 - np.sum((df - predicted) ** 2) / np.sum(df**2)]
    assert found[0.01][0] == pytest.approx(found[0.01][1], abs=0.02)
    assert min(found[0.01]) > 0.9
    assert max(found[1.0]) < 0.5


# A student and its teacher, both with a `call` of their own


class Classifier(keras.Model):
    def __init__(self, width, name=None):
        super().__init__(name=name)
        self.hidden = layers.Dense(width, activation="relu")
        self.head = layers.Dense(5, activation="softmax")

    def call(self, x):
        return self.head(self.hidden(x))


def new_student():
    keras.utils.set_random_seed(1)
    student = Classifier(16, name="student")
    student(np.zeros((1, 20)))  # a Distiller wants models that are built
    return student


@pytest.fixture(scope="module")
def lesson():
    """A teacher; what it says of vectors that no student sees; and how often a student agrees that had 60 labels alone."""
    (x, y), (unseen, _) = vectors(), vectors(seed=1)
    keras.utils.set_random_seed(0)
    teacher, alone = Classifier(64, name="teacher"), new_student()
    fitted(teacher, x, y, epochs=10, learning_rate=1e-2)
    fitted(alone, np.tile(x[:60], (16, 1)), np.tile(y[:60], 16), epochs=6, learning_rate=1e-2)  # as many steps as the others
    answers = np.argmax(teacher(unseen), axis=1)
    return teacher, unseen, answers, accuracy(alone, unseen, answers)


@pytest.mark.parametrize(("targets", "share"), [("soft", 0.0), ("hard", 0.0), ("soft", 0.3)], ids=["soft", "hard", "with_labels"])
def test_a_student_comes_to_agree_with_its_teacher(lesson, targets, share):
    (teacher, unseen, answers, agreement_alone), (x, y) = lesson, vectors()
    y = np.where(np.arange(len(y)) < 60, y, -1)  # few labels, many vectors
    student = new_student()
    before = accuracy(student, unseen, answers)
    z_t, z_s = (np.log(model.predict(x[:32], verbose=0).astype("float64")) for model in (teacher, student))
    loss = keras_kd.losses.KDLoss(temperature=2.0, targets=targets, from_logits=False)  # both end in softmax
    distiller = keras_kd.Distiller(teacher, student, loss, student_loss_weight=share)
    distiller.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(ignore_class=-1) if share else None)
    first = distiller.fit(x[:32], y[:32] if share else None, batch_size=32, verbose=0).history
    distiller.fit(x, y if share else None, epochs=6, verbose=0)
    supervised = -np.mean(references.log_softmax(z_s)[np.arange(32), y[:32]])
    expected = share * supervised + (1 - share) * np.mean(references.kd(z_t, z_s, 2.0, targets))
    assert first["loss"] == pytest.approx([expected], rel=1e-5)
    assert accuracy(student, unseen, answers) > agreement_alone + 0.1 > before


# w = 0 where |w| < eps


@pytest.mark.parametrize("by_hand", [True, False], ids=["by_hand", "by_callback"])
def test_a_threshold_zeroes_small_weights_and_training_keeps_exactly_these_zeros(analysed, by_hand):
    model, eps = keras.models.clone_model(analysed[0]), 0.05
    model.set_weights(analysed[0].get_weights())
    before = [kernel.numpy() for kernel in kernels_of(model)]
    small = [np.abs(w) < eps for w in before]
    for kernel in kernels_of(model) if by_hand else ():
        kernel.assign(np.where(np.abs(kernel) < eps, 0, kernel))
    keeper = callbacks.KeepSparsity() if by_hand else callbacks.Pruning(keras_kd.schedules.Threshold(eps, end_step=0))
    zeros = []  # after each step
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: zeros.append(np.sum(kernels_of(model)[0] == 0)))
    history = fitted(model, *images(), epochs=3, callbacks=[keeper, watch]).history
    for w, kernel, zero in zip(before, kernels_of(model), small, strict=True):
        np.testing.assert_array_equal(kernel.numpy() == 0, zero)
        assert np.mean(kernel.numpy()[~zero] != w[~zero]) > 0.5  # the others learned on
    assert zeros == [np.sum(small[0])] * 24
    share = sum(map(np.sum, small)) / sum(map(np.size, small))
    assert 0.1 < share < 0.9
    assert history["sparsity"] == pytest.approx([share] * 3)


# L1 and L2


PENALTIES = {
    keras.regularizers.L1(2e-3): lambda w: np.sum(np.abs(w)),
    keras.regularizers.L2(2e-3): lambda w: np.sum(w**2),
    keras_kd.regularizers.GroupLasso(2e-3): lambda w: sum(np.sqrt(len(group)) * np.linalg.norm(group) for group in w.T),
}


@pytest.mark.parametrize(("regularizer", "formula"), PENALTIES.items(), ids=["l1", "l2", "group_lasso"])
def test_the_penalty_in_the_loss_is_its_formula(regularizer, formula):
    model, (x, y) = perceptron(regularizer=regularizer), vectors(32)
    penalty = 2e-3 * sum(formula(np.float64(kernel)) for kernel in kernels_of(model)[:2])
    cross_entropy = -np.mean(np.log(model.predict(x, verbose=0)[np.arange(32), y]))
    assert fitted(model, x, y, epochs=1).history["loss"] == pytest.approx([cross_entropy + penalty], rel=1e-5)
    assert penalty > 0.01 * cross_entropy


def test_l1_leaves_more_weights_near_zero_than_l2_or_nothing_and_l2_shorter_ones():
    found = {}
    for name, regularizer in {"none": None, "l1": "l1", "l2": "l2"}.items():  # of strength 0.01
        model = perceptron(regularizer=regularizer)
        fitted(model, *vectors(6400), epochs=1, learning_rate=1e-2, batch_size=64)
        found[name] = kernels_of(model)[0].numpy()
    near_zero = {name: np.mean(np.abs(w) < 1e-2) for name, w in found.items()}
    assert near_zero["l1"] > 2 * max(near_zero["none"], near_zero["l2"])
    assert np.sum(found["l2"] ** 2) < 0.8 * np.sum(found["none"] ** 2)


# Weights of b bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_rounding_to_b_bits_moves_weights_by_half_a_step_at_most(bits):
    model, (x, y) = network(), images(64)
    quantization = callbacks.Quantization(num_bits=bits, activation_bits=None)
    fitted(model, x, y, epochs=1, callbacks=[quantization])
    rounded = quantization.quantized_model().with_rounded_kernels()

    for kernel, rounded_kernel in zip(kernels_of(model), kernels_of(rounded), strict=True):
        ranges = kernel.shape[-1] if len(kernel.shape) == 4 else 1  # one for each channel of a convolution, one for a Dense layer
        w, r = np.float64(kernel).reshape(-1, ranges), np.float64(rounded_kernel).reshape(-1, ranges)
        step = np.abs(w).max(axis=0) / (2 ** (bits - 1) - 1)
        assert all(len(np.unique(channel)) <= 2**bits for channel in r.T)
        assert np.all(np.abs(r - w) <= step / 2 * (1 + 1e-4))
        assert np.abs(r - w).max() > step.max() / 4  # they were rounded
    np.testing.assert_allclose(rounded.predict(x, verbose=0), quantization.quantized_model().predict(x, verbose=0), atol=1e-5)


# w_target = w_source + dw


def test_a_target_that_begins_as_its_source_learns_faster_and_moves_little():
    source = perceptron()
    fitted(source, *vectors(), epochs=6)
    (x, y), unseen = (vectors(n, classes=3, readout=8, seed=n) for n in (120, 500))  # another task
    losses, moved = {}, {}
    for start in ("source", "scratch"):
        target = perceptron(3, seed=4)
        if start == "source":
            for ours, theirs in zip(source.layers[:-1], target.layers[:-1], strict=True):
                theirs.set_weights(ours.get_weights())
        fitted(target, x, y, epochs=10, learning_rate=2e-3, shuffle=False)
        losses[start] = target.evaluate(*unseen, verbose=0)
        pairs = list(zip(kernels_of(source), kernels_of(target), strict=True))[:-1]
        moved[start] = [np.linalg.norm(w_target - w_source) / np.linalg.norm(w_source) for w_source, w_target in pairs]
    assert losses["source"] < 0.75 * losses["scratch"]
    assert all(0.01 < dw < 0.4 for dw in moved["source"])
    assert all(dw > 1 for dw in moved["scratch"])  # what is far
