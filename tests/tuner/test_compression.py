"""The whole road of compression as a search space: surgery made once, fresh copies for trials, and channels that losses know."""

import pathlib
import weakref
from gc import collect

import keras
import keras_tuner
import numpy as np
import pytest

import keras_kd
from keras_kd import losses, surgery
from keras_kd.surgery import reconstruction
from keras_kd.tuner import CompressionHyperModel, Score
from tests.conftest import classifier
from tests.tuner.common import CROSS_ENTROPY, EAGER, data, metrics_of

X, Y = data(64)
FIXED = {"channels": None, "rank": None, "sparsity": None, "num_bits": 32, "learning_rate": 0.01}


def model_of(width=12, features=4):
    """Dense layers "first", "second" and "head"."""
    dense = keras.layers.Dense
    return keras.Sequential(
        [
            keras.Input((features,)),
            dense(width, activation="relu", name="first"),
            dense(width, activation="relu", name="second"),
            dense(3, name="head"),
        ],
        name="model",
    )


def hypermodel(model=None, search=None, **arguments):
    arguments = {"loss": CROSS_ENTROPY, "compile_options": EAGER, "data": X} | arguments
    return CompressionHyperModel(model or model_of(), search=FIXED | (search or {}), **arguments)


def built(made, **values):
    hp = keras_tuner.HyperParameters()
    made.build(hp)
    hp.values.update(values)
    return made.build(hp)


def macs(model):
    return sum(int(np.prod(weight.shape)) for weight in model.weights if len(weight.shape) == 2)


@pytest.mark.parametrize(
    ("samples", "work", "how", "epochs"), [(300, 1e12, True, 30), (300, 1e5, True, 0), (64, 1.0, "together", 30)]
)
def test_what_is_factorized_is_fitted_together_by_the_rule_of_pruning(samples, work, how, epochs, monkeypatch):
    calls = []
    monkeypatch.setattr(reconstruction, "_AUTO_WORK", work)
    monkeypatch.setattr(reconstruction, "fit_together", lambda *given: calls.append(given[3]))
    hypermodel(data=data(samples)[0], reconstruct=how).compressed(rank=0.6)
    assert calls == [epochs] * (epochs > 0)


def trained(tuner, epochs=1, **arguments):
    tuner.search(X, Y, validation_data=data(16, seed=4), epochs=epochs, batch_size=16, verbose=0, **arguments)
    return tuner


@pytest.fixture
def operations(monkeypatch):
    """Names of the operations of surgery that were made."""
    made = []
    for name in ("prune_channels", "factorize"):
        real = getattr(surgery, name)
        monkeypatch.setattr(surgery, name, lambda *a, _name=name, _real=real, **k: made.append(_name) or _real(*a, **k))
    return made


def test_shares_are_those_of_the_multiply_accumulates_one_after_the_other():
    model = model_of(24)
    made = hypermodel(model, {"channels": [0.5, 1.0], "rank": [0.6, 1.0]})
    sizes = {shares: macs(made.compressed(*shares)) for shares in [(1, 1), (0.5, 1), (1, 0.6), (0.5, 0.6)]}
    assert sizes[1, 1] == macs(model)
    assert 0.4 * sizes[1, 1] < sizes[0.5, 1] <= 0.5 * sizes[1, 1]
    assert 0.4 * sizes[1, 1] < sizes[1, 0.6] <= 0.6 * sizes[1, 1]
    assert 0.4 * sizes[0.5, 1] < sizes[0.5, 0.6] <= 0.6 * sizes[0.5, 1]
    for values in ({"channels": 0.5, "rank": 1.0}, {"channels": 0.5, "rank": 0.6}):
        assert macs(built(made, **values).student) == sizes[tuple(values.values())]


def test_without_surgery_the_student_says_what_the_model_says():
    model = model_of()
    made = hypermodel(model)
    np.testing.assert_array_equal(made.compressed()(X), model(X))
    distiller = built(made)
    assert distiller.teacher is model
    assert distiller.student is not model
    other = classifier(4)
    assert built(hypermodel(model, teacher=other)).teacher is other


def test_every_build_has_weights_of_its_own():
    model = model_of()
    made = hypermodel(model, {"channels": [0.5]})
    before = model.get_weights()
    first, second = built(made), built(made)
    fresh = second.student.get_weights()
    first.fit(X, Y, epochs=1, verbose=0)
    assert any((one != other).any() for one, other in zip(first.student.get_weights(), fresh, strict=True))
    for student in (second.student, built(made).student):
        for one, other in zip(student.get_weights(), fresh, strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_surgery_is_made_once_for_each_combination_of_a_search(operations, tmp_path):
    made = hypermodel(search={"channels": [0.5, 1.0], "rank": [0.7, 1.0]})
    tuner = trained(keras_tuner.GridSearch(made, objective="val_accuracy", directory=tmp_path))
    assert [trial.status for trial in tuner.oracle.trials.values()] == ["COMPLETED"] * 4
    assert sorted(operations) == ["factorize", "factorize", "prune_channels"]
    tuner.get_best_models(2)
    assert len(operations) == 3


def test_no_more_results_are_held_than_asked_for(operations):
    made = hypermodel(max_kept=2)
    first = made.compressed(0.5)
    kept = weakref.ref(made._kept[0.5, 1.0].model)
    for share in (0.6, 0.7, 0.8):
        made.compressed(share)
    assert list(made._kept) == [(0.7, 1.0), (0.8, 1.0)]
    collect()
    assert kept() is None
    again = made.compressed(0.5)
    assert len(operations) == 5
    np.testing.assert_array_equal(again(X), first(X))
    np.testing.assert_array_equal(surgery.kept_channels(again)["first"], surgery.kept_channels(first)["first"])
    made.compressed(0.8)
    made.compressed(0.6)
    assert list(made._kept) == [(0.8, 1.0), (0.6, 1.0)]  # the least recently used one went


@pytest.mark.parametrize("record", [True, False])
def test_feature_losses_compare_the_channels_that_are_left(record):
    model = model_of()
    hint = losses.HintLoss(teacher_layer_name="second", student_layer_name="second")
    made = hypermodel(model, {"channels": 0.5, "student_loss_weight": 0.0, "learning_rate": 0.0}, losses=hint, record=record)
    hp = keras_tuner.HyperParameters()
    distiller = made.build(hp)
    kept = surgery.kept_channels(distiller.student)["second"]
    assert 0 < len(kept) < 12
    found = made.fit(hp, distiller, X, Y, epochs=1, batch_size=64, verbose=0)
    assert distiller.distillation_losses[0].layers == []
    teacher, student = (keras.Model(one.inputs[0], one.get_layer("second").output)(X) for one in (model, distiller.student))
    expected = np.mean(np.square(np.asarray(student) - np.asarray(teacher)[:, kept]))
    assert found["loss"] == pytest.approx(expected, rel=2e-3)  # recordings are of half precision


def test_a_trial_is_pruned_rounded_and_measured_as_a_file(tmp_path):
    score = Score("val_accuracy", report=["bytes", "macs"])
    model = model_of()
    made = hypermodel(model, {"channels": [0.4], "sparsity": 0.5, "num_bits": 8}, score=score)
    tuner = trained(keras_tuner.GridSearch(made, objective=score.objective, directory=tmp_path), epochs=2)
    found = metrics_of(tuner.oracle.trials["0000"])
    assert found["macs"] <= 0.4 * macs(model)
    assert found["sparsity"] >= 0.45
    file = pathlib.Path(tuner.get_trial_dir("0000")) / "student.tflite"
    assert found["bytes"] == file.stat().st_size
    many = np.random.default_rng(0).normal(size=(512, 4)).astype("float32")
    logits = keras_kd.export.run_litert(file, many)[0]
    assert len(np.unique(logits)) <= 256  # values of 8 bits


def test_the_defaults_search_the_whole_road():
    made = CompressionHyperModel(model_of(), data=X, loss=CROSS_ENTROPY)
    hp = keras_tuner.HyperParameters()
    made.build(hp)
    assert {one.name for one in hp.space} == {"channels", "rank", "sparsity", "learning_rate"}
    assert hp.get("channels") == hp.get("rank") == 1.0
    assert [type(one).__name__ for one in made.callbacks(hp, made.build(hp), 1, 10)] == ["Quantization"]


def test_a_share_out_of_reach_fails_its_trial_and_ends_a_search_where_it_is_fixed(tmp_path):
    made = hypermodel(search={"channels": [0.7, 0.0001]}, surgery_options={"min_channels": 4})
    tuner = trained(keras_tuner.GridSearch(made, objective="val_accuracy", directory=tmp_path))
    assert [trial.status for trial in tuner.oracle.trials.values()] == ["COMPLETED", "FAILED"]
    assert "Surgery fails for channels=0.0001, rank=1.0: The budget cannot be met" in tuner.oracle.trials["0001"].message
    with pytest.raises(ValueError, match="Surgery fails for channels=0.0001"):
        keras_tuner.RandomSearch(hypermodel(search={"channels": 0.0001}), objective="val_accuracy", directory=tmp_path / "fixed")


def test_batches_and_several_inputs_are_calibration_data():
    import tensorflow as tf

    model = model_of()
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(10)
    np.testing.assert_array_equal(hypermodel(model, data=batches).data, X)
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    hidden = keras.layers.Dense(12, activation="relu", name="hidden")(keras.layers.Concatenate()([left, right]))
    model = keras.Model({"left": left, "right": right}, keras.layers.Dense(3)(hidden))
    student = hypermodel(model, data={"right": X, "left": -X}).compressed(0.5)
    assert student.get_layer("hidden").units == 6
    told = student({"left": -X, "right": X}) - model({"left": -X, "right": X})
    assert np.mean(np.square(told)) < 0.1 * np.var(model({"left": -X, "right": X}))


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "model"}, TypeError, "`model` must be a keras.Model. Received: model='model'"),
        ({"model": Subclassed()}, ValueError, "must be a Functional or Sequential model"),
        ({"data": None}, TypeError, "`data` must be inputs of the model, or batches of them. Received: data=None"),
        ({"data": X[:, :3]}, ValueError, r"`data` must have the shape that \"model\" takes, \(None, 4\). Received: \(64, 3\)"),
        ({"data": X * np.nan}, ValueError, "`data` must be finite"),
        ({"data": X[:0]}, ValueError, "must hold at least one sample"),
        ({"data": iter([X])}, ValueError, "batches that can be read again, .* Received: an iterator"),
        ({"search": {"chanels": 0.5}}, ValueError, "`search` knows channels, rank, temperature, .* Received: chanels.$"),
        ({"search": {"channels": [0.5, 1.5]}}, ValueError, "`channels` must be a share above 0, up to 1. Received: channels=1.5"),
        ({"search": {"channels": (0.0, 1.0)}}, ValueError, "Received: channels=0.0"),
        ({"search": {"rank": "half"}}, TypeError, "`rank` must be a share, a number. Received: rank='half'"),
        ({"search": {"rank": lambda hp: 0}}, ValueError, "`rank` must be a share above 0"),
        ({"max_kept": 0}, ValueError, "`max_kept` must be a whole number of at least 1. Received: max_kept=0"),
        ({"reconstruct": "none"}, ValueError, '`reconstruct` must be True, False, "layers" or "together"'),
        ({"surgery_options": {"macs": 1}}, ValueError, "`surgery_options` knows criterion, scope, .* Received: macs"),
        ({"surgery_options": 8}, TypeError, "`surgery_options` must be a dict"),
        ({"losses": losses.PKTLoss(), "search": {"temperature": 2.0}}, ValueError, 'has a "temperature", and no loss has one'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        hypermodel(**arguments).build(keras_tuner.HyperParameters())
