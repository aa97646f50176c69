"""Probes of all layers in one pass: scikit-learn's accuracies, on any model, and errors that name what is wrong."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sklearn.linear_model import Ridge

import keras_kd
from keras_kd import analysis
from tests.conftest import classifier

RNG = np.random.default_rng(0)
X = RNG.normal(size=(600, 8, 8, 2)).astype("float32")
Y = (X[:, :4].sum((1, 2, 3)) > 0).astype(int) + 2 * (X[:, 4:].sum((1, 2, 3)) > 0).astype(int)


def conv_net():
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(6, 3, name="conv")(inputs)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    x = layers.Flatten(name="flat")(x + 1.0)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def test_accuracies_are_those_of_scikit_learn_on_the_same_split():
    model = conv_net()
    report = analysis.probe(model, X, Y, l2=0.5, batch_size=64)
    rng = np.random.default_rng(0)
    held = np.concatenate([rng.random(len(X[i : i + 64])) < 0.2 for i in range(0, 600, 64)])
    assert report.tested_on == held.sum()
    assert report.trained_on == (~held).sum()
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["conv", "relu", "add", "flat", "head"]
    for name in ("conv", "relu", "flat", "head"):
        features = keras.Model(model.input, model.get_layer(name).output).predict(X, verbose=0)
        features = features.mean((1, 2)) if features.ndim == 4 else features
        truth = Ridge(alpha=0.5).fit(features[~held], np.eye(4)[Y[~held]])
        expected = np.mean(truth.predict(features[held]).argmax(-1) == Y[held])
        assert rows[name].accuracy == pytest.approx(expected, abs=1.5 / held.sum()), name
        assert rows[name].width == features.shape[1]
    assert report.chance == np.bincount(Y[held]).max() / held.sum()
    assert report.model_accuracy == np.mean(model.predict(X, verbose=0).argmax(-1)[held] == Y[held])


def test_depth_shows_where_the_classes_become_linear():
    """Classes by the sign of a product cannot be read off the inputs, and can after two trained layers."""
    x = RNG.normal(size=(2000, 2)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    hidden = [layers.Dense(32, activation="relu", name=f"hidden{i}") for i in range(2)]
    model = keras.Sequential([keras.Input((2,)), layers.Activation("linear", name="same"), *hidden, layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=15, verbose=0)
    found = {row.name: row.accuracy for row in analysis.probe(model, x, y).rows}
    assert found["same"] < 0.6
    assert found["hidden1"] > 0.93
    assert found["same"] < found["hidden0"] <= found["hidden1"] + 0.02


def test_sequence_models_are_probed_with_their_masks():
    tokens = RNG.integers(1, 10, size=(400, 6))
    lengths = RNG.integers(1, 7, size=400)
    tokens[np.arange(6) >= lengths[:, None]] = 0
    y = (tokens[:, 0] > 4).astype(int)
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(10, 8, mask_zero=True, name="embed")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.GRU(6, return_sequences=True, name="gru")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.LSTM(5, name="lstm")(x)))
    report = analysis.probe(model, tokens, y, l2=1.0, batch_size=400)
    assert {"embed", "attention/query", "gru", "lstm", "head"} <= {row.name for row in report.rows}
    embedded = np.asarray(model.get_layer("embed").embeddings)[tokens]
    mask = (tokens != 0)[..., None]
    pooled = (embedded * mask).sum(1) / mask.sum(1)
    held = np.random.default_rng(0).random(400) < 0.2
    truth = Ridge(alpha=1.0).fit(pooled[~held], np.eye(2)[y[~held]]).predict(pooled[held]).argmax(-1)
    assert next(row for row in report.rows if row.name == "embed").accuracy == np.mean(truth == y[held])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.backbone = classifier(8)
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        return self.head(tf.nn.relu(self.backbone(self.backbone(x)[:, :1] * x)))


def test_subclassed_models_and_shared_layers_are_probed_call_by_call():
    model = Subclassed()
    x = RNG.normal(size=(200, 4)).astype("float32")
    model(x)
    report = analysis.probe(model, tf.data.Dataset.from_tensor_slices((x, Y[:200])).batch(50), classes=4)
    names = [row.name for row in report.rows]
    first = model.backbone.layers[0].name
    assert names[0] == f"{model.backbone.name}/{first}:0"
    assert f"{model.backbone.name}/{first}:1" in names
    assert names[-1] == "head"
    assert report.model_accuracy is None


def test_one_pass_over_a_data_set_is_all_it_takes_and_the_cap_holds():
    seen = []

    def stream():
        for start in range(0, 600, 50):
            seen.append(start)
            yield X[start : start + 50], Y[start : start + 50]

    report = analysis.probe(conv_net(), stream(), classes=4, max_test_samples=30)
    assert seen == list(range(0, 600, 50))
    assert report.tested_on == 30
    assert report.trained_on == 570


def test_named_places_skipped_places_table_dict_and_picture(tmp_path):
    student = conv_net()
    report = analysis.probe(keras_kd.Distiller(conv_net(), student), X, Y, max_width=100)
    assert report.skipped == ("flat (216 features)",)
    named = analysis.probe(student, X, Y, layers=["head", "conv"])
    assert [row.name for row in named.rows] == ["conv", "head"]
    assert named.skipped == ()
    lines = report.table().splitlines()
    assert lines[1].startswith("conv")
    assert "chance" in lines[-1]
    assert json.loads(json.dumps(report.as_dict()))["tested_on"] == report.tested_on
    report.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: analysis.probe("model", X, Y), TypeError, "`model` must be a keras.Model"),
        (lambda m: analysis.probe(keras.Sequential([layers.Dense(2)]), X, Y), ValueError, "`model` must be built"),
        (lambda m: analysis.probe(m, X, Y[:5]), ValueError, "one entry for each sample. Received: 5 for 600"),
        (lambda m: analysis.probe(m, X[:0], Y[:0]), ValueError, "at least one sample"),
        (lambda m: analysis.probe(m, X[:4], Y[:4]), ValueError, "more samples than classes"),
        (lambda m: analysis.probe(m, X, Y, layers=["conv9"]), ValueError, "Received: conv9. Places: conv, relu"),
        (lambda m: analysis.probe(m, X, Y * 0.5), ValueError, "class indices. Received: float64"),
        (lambda m: analysis.probe(m, X, Y, classes=2), ValueError, "class indices from 0 to 1"),
        (lambda m: analysis.probe(m, X, Y, test_share=1.0), ValueError, r"`test_share` must be in \(0, 1\)"),
        (lambda m: analysis.probe(m, X), ValueError, "`labels` must be given: with arrays"),
        (lambda m: analysis.probe(m, X * np.nan, Y), ValueError, 'The layer "conv" gives NaN'),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(conv_net())
