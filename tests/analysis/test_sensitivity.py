"""What one layer alone costs: the same losses as those of models changed by hand, and measures as their formulas say."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from keras import layers

from keras_kd.analysis import SensitivityReport, sensitivity
from tests.analysis.test_linear import randomized

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 6, 6, 3)).astype("float32")


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(5, activation="relu", name="dense")(layers.Flatten()(x))
    return randomized(keras.Model(inputs, layers.Dense(3, name="head")(x)))


@pytest.fixture(scope="module")
def labels(model):
    return np.asarray(model(X)).argmax(-1)


def losses(model, labels):
    logits = np.asarray(model(X), "float64")
    logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    return -logs[np.arange(300), labels].mean(), np.mean(logits.argmax(-1) == labels)


def changed(model, name, function):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    kernel, bias = copy.get_layer(name).get_weights()
    copy.get_layer(name).set_weights(function(kernel, bias))
    return copy


def test_channels_set_to_zero_cost_what_a_kernel_without_them_costs(model, labels):
    report = sensitivity(model, X, labels, [0.25, 0.5], reconstruct=False, criterion="l1", verbose=0)
    base = losses(model, labels)
    assert (report.loss, report.accuracy) == (pytest.approx(base[0], rel=1e-5), base[1])
    assert {cell.layer for cell in report.cells} == {"conv", "dense"}
    for cell in report.cells:

        def without(kernel, bias, gone=cell.channels):
            kernel[..., list(gone)], bias[list(gone)] = 0.0, 0.0
            return kernel, bias

        loss, accuracy = losses(changed(model, cell.layer, without), labels)
        assert cell.loss_increase == pytest.approx(loss - base[0], abs=1e-5)
        assert cell.accuracy_loss == pytest.approx(base[1] - accuracy)
        kernel = np.abs(model.get_layer(cell.layer).get_weights()[0]).reshape(-1, 8 if cell.layer == "conv" else 5).sum(0)
        lowest = np.argsort(kernel)[: len(cell.channels)]
        assert set(cell.channels) == set(lowest)
        assert cell.predicted["l1"] == pytest.approx(kernel[lowest].sum() / kernel.sum())


def test_channels_that_others_give_cost_nothing(model, labels):
    def doubled(kernel, bias):
        kernel[..., 6], bias[6] = 2 * kernel[..., 1], 2 * bias[1]
        return kernel, bias

    twin = changed(model, "conv", doubled)
    report = sensitivity(twin, X, labels, each=True, layers=["conv"], verbose=0)
    cells = {cell.channels[0]: cell for cell in report.cells}
    assert sorted(cells) == list(range(8))
    for channel in (1, 6):
        assert abs(cells[channel].loss_increase) < 1e-5
        assert cells[channel].predicted["cost"] < 1e-6
    assert abs(cells[0].loss_increase) > 1e-3
    plain = sensitivity(twin, X, labels, each=True, layers=["conv"], reconstruct=False, verbose=0)
    assert abs(plain.cells[6].loss_increase) > 1e-3


@pytest.mark.parametrize("what", ["weights", "bits", "rank"])
def test_changed_kernels_cost_what_they_cost_by_hand(model, labels, what):
    ratios = {"weights": [0.6], "bits": [3], "rank": [0.5]}[what]

    def by_hand(kernel, bias):
        if what == "weights":
            limit = np.sort(np.abs(kernel), axis=None)[round(0.6 * kernel.size) - 1]
            return np.where(np.abs(kernel) <= limit, 0.0, kernel), bias
        flat = kernel.reshape(-1, kernel.shape[-1])
        if what == "bits":
            step = np.abs(flat).max(0) / 3  # 3 bits: -3 .. 3 steps
            return (np.round(flat / step) * step).reshape(kernel.shape), bias
        u, s, v = np.linalg.svd(flat, full_matrices=False)
        s[len(s) - round(0.5 * len(s)) :] = 0.0
        return ((u * s) @ v).reshape(kernel.shape), bias

    report = sensitivity(model, X, labels, ratios, what=what, verbose=0)
    assert [cell.layer for cell in report.cells] == ["conv", "dense", "head"]
    for cell in report.cells:
        loss, _ = losses(changed(model, cell.layer, by_hand), labels)
        assert cell.loss_increase == pytest.approx(loss - report.loss, abs=1e-4)
        kernel = model.get_layer(cell.layer).get_weights()[0]
        delta = by_hand(kernel.copy(), None)[0] - kernel
        assert cell.predicted["l2"] == pytest.approx(np.square(delta).sum() / np.square(kernel).sum(), rel=1e-4)
    # What the head reads is known: the mean square of what changes in each output, times half its squared gradient.
    kernel = model.get_layer("head").get_weights()[0]
    read = np.asarray(keras.Model(model.input, model.get_layer("dense").output)(X), "float64")
    logits = np.asarray(model(X), "float64")
    gradient = tf.nn.softmax(logits).numpy() - np.eye(3)[labels]
    errors = np.square(read @ (by_hand(kernel.copy(), None)[0] - kernel)).mean(0)
    assert report.cells[-1].predicted["cost"] == pytest.approx(0.5 * np.sum(np.square(gradient).mean(0) * errors), rel=1e-3)


def test_the_model_is_as_it_was_even_after_an_error(model, labels):
    before = [np.array(weight) for weight in model.weights]
    sensitivity(model, X, labels, what="weights", verbose=0)

    calls = []

    def failing(y, outputs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("stop")
        return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)

    with pytest.raises(RuntimeError, match="stop"):
        sensitivity(model, X, labels, what="channels", loss=failing, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    assert all("call" not in vars(layer) for layer in model.layers)


def test_rank_correlations_are_scipys(model, labels):
    report = sensitivity(model, X, labels, [0.25, 0.5, 0.75], verbose=0)
    losses = [cell.loss_increase for cell in report.cells]
    for measure, found in report.correlations.items():
        assert found == pytest.approx(scipy.stats.spearmanr([cell.predicted[measure] for cell in report.cells], losses)[0])
    groups = [[c for c in report.cells if c.layer == layer] for layer in ("conv", "dense")]
    mean = np.mean([scipy.stats.spearmanr([c.predicted["cost"] for c in g], [c.loss_increase for c in g])[0] for g in groups])
    assert report.within_layers["cost"] == pytest.approx(mean)


def test_subclassed_models_real_targets_and_json(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(6, activation="tanh", name="a"), layers.Dense(2, name="b")

        def call(self, x):
            return self.b(self.a(x))

    net, x = Net(), X[:, 0, 0]
    targets = np.asarray(net(x))
    report = sensitivity(net, x, targets, [0.5], loss="mse", verbose=0)
    assert [cell.layer for cell in report.cells] == ["a"]
    assert report.accuracy is None
    assert report.cells[0].loss_increase > 0
    path = tmp_path / "report.json"
    assert SensitivityReport.from_json(report.to_json(path)) == report == SensitivityReport.from_json(path)
    assert "rank correlation" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "layers"}, "`what` must be one of channels, weights, bits, rank"),
        ({"criterion": "entropy"}, "`criterion` must be one of"),
        ({"ratios": [0.0]}, r"`ratios` must be in \(0, 1\)"),
        ({"ratios": [1.0], "what": "rank"}, r"`ratios` must be in \(0, 1\)"),
        ({"ratios": [1], "what": "bits"}, "`ratios` must be numbers of bits from 2 to 16"),
        ({"layers": ["relu"]}, "Received: relu. Layers: conv, dense"),
        ({"labels": None}, "`labels` must be given"),
        ({"labels": np.zeros(4, int)}, "Received: 4 for 300"),
    ],
)
def test_bad_input_is_named(model, labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(model, X, **{"labels": labels, "verbose": 0} | arguments)
