"""compress: the best file within a budget, measured, kept, and gone on with."""

import dataclasses
import json
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd import export, surgery
from keras_kd.compression import _card, _settings, _strategies, _work, automatic
from keras_kd.compression._data import Data
from keras_kd.compression.results import Attempt, Compression
from keras_kd.surgery import _side_by_side

L = keras.layers
rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(4, 10))
Y = rng.integers(0, 4, 400)
X = (CENTRES[Y] + rng.normal(size=(400, 10)) * 0.9).astype("float32")
BUDGET = 3200


def build(outputs=4):
    keras.utils.set_random_seed(0)
    layers = [L.Dense(64, activation="relu", name="a", bias_initializer="random_normal"), L.Dense(16, activation="relu", name="b")]
    return keras.Sequential([keras.Input((10,)), *layers, L.Dense(outputs, name="head")])


@pytest.fixture(scope="module")
def model():
    made = build()
    made.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made.fit(X, Y, epochs=3, batch_size=50, verbose=0)
    return made


@pytest.fixture(autouse=True)
def one_way(monkeypatch):
    monkeypatch.setattr(_work, "WAYS", {"channels": _work.WAYS["channels"]})


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A compression in a folder, with the calls of `fit` counted."""
    folder = tmp_path_factory.mktemp("kept")
    before = [w.copy() for w in model.get_weights()]
    arguments = {"budget": BUDGET, "validation_data": (X[:150], Y[:150]), "epochs": 1, "folder": folder, "verbose": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_work, "WAYS", {"channels": _work.WAYS["channels"]})
        found = keras_kd.compress(model, X, Y, max_trials=1, **arguments)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    return found, folder, arguments


def test_the_file_is_the_best_within_the_budget_and_computes_what_the_model_does(done):
    found, folder, _ = done
    assert found.path.stat().st_size == found.best.size <= BUDGET
    assert found.best.score == max(one.score for one in found.attempts if one.fits)
    (outputs,) = export.run_litert(found.path, X[:150])
    assert found.best.score == pytest.approx(np.mean(outputs.argmax(-1) == Y[:150]))
    np.testing.assert_array_equal(np.asarray(found.model(X[:150])).argmax(-1), outputs.argmax(-1))
    assert found.what == "accuracy"
    assert not any(one.fits for one in found.attempts if one.name == "int8")
    assert json.loads((folder / "report.json").read_text()) == found.as_dict()
    assert "chosen" in str(found)
    assert found.best.size > 0.85 * BUDGET


def test_weights_of_4_bits_are_tried(done):
    found = done[0]
    made = {one.name: one for one in found.attempts}
    whole, fine, cut = made["int8"], made["weights of 4 bits"], made["channels, 4 bits"]
    assert (whole.bits, fine.bits, cut.bits) == (8, 4, 4)
    assert fine.size < whole.size - 0.4 * whole.parameters
    assert cut.parameters > made["channels"].parameters


def test_the_card_of_the_folder_says_what_was_done_and_measured_and_an_edited_one_stays(done, model, monkeypatch, capsys):
    found, folder, arguments = done
    card = folder / "README.md"
    text = card.read_text()
    assert f"keras_kd.compress, with a limit of {BUDGET:,} bytes" in text
    assert f'was "{found.best.name}"' in text
    assert ("without training" in text) == (found.best.epochs == 0)
    (row,) = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| compressed |")]
    assert f"{100 * found.best.score:.1f}" == row[2].split(" (")[0]
    assert f"{found.best.size:,}" in row
    assert "On 150 samples." in text
    assert _card._SEEN not in text
    monkeypatch.setattr(_work.Work, "_train", lambda *a, **k: pytest.fail("nothing is left to train"))
    card.unlink()
    keras_kd.compress(model, X, Y, max_trials=1, **arguments)
    assert "| compressed |" in card.read_text()
    card.write_text("edited")
    keras_kd.compress(model, X, Y, max_trials=1, **arguments | {"verbose": 1})
    assert card.read_text() == "edited"
    assert "README.md was edited, and stays as it is" in capsys.readouterr().out
    card.write_text(text)


def test_the_same_call_goes_on_where_it_ended(done, model, monkeypatch):
    found, _, arguments = done
    monkeypatch.setattr(_work.Work, "_train", lambda *a, **k: pytest.fail("nothing is left to train"))
    again = keras_kd.compress(model, X, Y, max_trials=1, **arguments)
    assert again.attempts == found.attempts
    assert again.path.read_bytes() == found.path.read_bytes()


def test_an_interruption_loses_the_running_trial_alone(done, model, monkeypatch, capsys):
    found, folder, arguments = done

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_work.Work, "_fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keras_kd.compress(model, X, Y, max_trials=2, **arguments | {"verbose": 1})
    told = capsys.readouterr().out
    assert "the best file so far as model.tflite, and the same call goes on from there" in told
    assert f"on 150 validation samples; the budget is {BUDGET:,} bytes" in told
    assert (folder / "model.tflite").read_bytes() == found.path.read_bytes()
    more = keras_kd.compress(model, X, Y, max_trials=2, **arguments)
    assert more.attempts[: len(found.attempts)] == found.attempts
    assert len(more.attempts) == len(found.attempts) + 1
    assert more.attempts[-1].name == "channels, 4 bits, trained"  # the next of those that were not trained
    assert more.best.score >= found.best.score
    with pytest.raises(ValueError, match=rf"`folder` must be new.*begun with budget={BUDGET}, now budget={BUDGET + 1}\. Take"):
        keras_kd.compress(model, X, Y, **arguments | {"budget": BUDGET + 1})
    with pytest.raises(ValueError, match=r"begun with another model or other data"):
        keras_kd.compress(build(), X, Y, **arguments)
    assert (folder / "compression.json").exists()


def test_a_share_of_the_float_file_is_a_budget_and_time_that_is_over_ends_the_search_for_ways(model, monkeypatch, capsys):
    ways = dict.fromkeys(("channels", "other"), _work.WAYS["channels"])
    monkeypatch.setattr(_work, "WAYS", ways)
    arguments = {"validation_data": (X[:150], Y[:150]), "max_trials": 3, "max_minutes": 1e-5}
    found = keras_kd.compress(model, X, Y, budget="35%", **arguments, verbose=1)
    assert found.budget == int(0.35 * found.original_size)
    fitting = [index for index, one in enumerate(found.attempts) if one.fits]
    assert fitting == [len(found.attempts) - 1]  # the first that fits is the last
    assert not any(one.epochs for one in found.attempts)
    told = capsys.readouterr().out
    assert "other: not tried, the time is over" in told
    assert re.search(r"channels: [0-9.]+% of the work, [0-9,]+ bytes", told)
    assert "before any training" in told


def test_without_labels_the_agreement_counts_and_a_held_out_tenth_is_measured(model, capsys):
    found = keras_kd.compress(model, X, budget="9KB", max_trials=0, verbose=1)
    assert found.what == "agreement"
    assert found.best.name == "int8"
    order = np.random.default_rng(0).permutation(400)
    held = X[np.sort(order[:40])]
    (outputs,) = export.run_litert(found.path, held)
    assert found.best.score == pytest.approx(np.mean(outputs.argmax(-1) == model.predict(held, verbose=0).argmax(-1)))
    assert "chosen: int8" in capsys.readouterr().out


def test_samples_that_the_model_may_know_are_said_and_a_model_that_knows_nothing_is_warned_of(model, tmp_path, capsys):
    arguments = {"budget": "9KB", "max_trials": 0, "verbose": 1}
    keras_kd.compress(model, X, Y, folder=tmp_path, **arguments)
    told = capsys.readouterr().out
    assert "no validation data were given: 40 samples" in told
    assert "most frequent class" not in told
    assert _card._SEEN in (tmp_path / "README.md").read_text()
    y = np.where(np.arange(400) % 5, np.argmin(model.predict(X, verbose=0), -1), 0)  # nearly always wrong
    keras_kd.compress(model, X, Y, validation_data=(X, y), **arguments)
    told = capsys.readouterr().out
    assert "no validation data" not in told
    share = np.bincount(y).max() / 400
    assert f"warning: no better than the most frequent class ({share:.1%}): was the model trained" in told


@pytest.mark.parametrize(
    ("labels", "output", "share"),
    [
        ([0, 1, 1, 2], (None, 3), 0.5),
        ([[0], [1], [1], [1]], (None, 3), 0.75),
        (np.eye(3)[[0, 1, 1, 2]], (None, 3), 0.5),
        ([[0, 1], [1, 1]], (None, 2, 3), 0.75),
        ([[0], [0], [1.0]], (None, 1), 2 / 3),
        ([0, 1, 0], (None,), 2 / 3),
        ([1, 1, 1], (None, 3), None),
        ([[0, 0, 1], [1, 1, 0]], (None, 3), None),
        ({"first": [0, 1, 1, 2], "second": [1, 1, 1, 1]}, (None, 3), 0.5),
        (None, (None, 3), None),
    ],
    ids=range(10),
)
def test_the_share_of_the_most_frequent_class_is_that_of_a_constant_answer(labels, output, share):
    if labels is not None:
        labels = {k: np.asarray(v) for k, v in labels.items()} if isinstance(labels, dict) else np.asarray(labels)
    data = Data(X, None, X[:4], 8, 0)
    data.validation = (X[:4], labels)
    assert data.share_of_most_frequent(output) == (share if share is None else pytest.approx(share))


def test_the_loss_of_a_distiller_is_that_of_the_labels(model, monkeypatch):
    distiller = keras_kd.Distiller(model, build(), keras_kd.losses.KDLoss())
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    taken = []
    monkeypatch.setattr(automatic, "Work", lambda *arguments: taken.append(arguments[3]) or None)
    for one, loss in ((distiller, None), (distiller, "mse"), (build(), None), (model, None)):
        with pytest.raises((AttributeError, TypeError)):
            keras_kd.compress(one, X, Y, budget=9000, loss=loss, verbose=0)
    assert taken == [distiller.loss, "mse", None, model.loss]


def test_numbers_are_learned_from_batches_and_time_is_kept():
    model = build(1)
    data = tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(50)
    found = keras_kd.compress(model, data, validation_data=data, budget=9000, max_trials=1, epochs=1, max_minutes=1e-4, verbose=0)
    assert found.what == "minus the mean squared error"
    assert [one.epochs for one in found.attempts] == [0]
    (outputs,) = export.run_litert(found.path, X)
    assert found.best.score == pytest.approx(-np.mean((outputs - X[:, :1]) ** 2), rel=1e-4)


def test_a_budget_that_nothing_meets_is_told_the_smallest_file(model):
    with pytest.raises(
        ValueError, match=r"`budget` must be one that can be met. Received: 300 bytes. The smallest file .* too many"
    ):
        keras_kd.compress(model, X, budget=300, verbose=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": "many"}, "`budget` must be bytes"),
        ({"budget": None}, "`budget` must be a number of bytes"),
        ({"budget": 0}, "`budget` must be at least 1"),
        ({"budget": "0.2"}, '"20%" is a share'),
        ({"budget": "120%"}, "or a share up to"),
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1"),
        ({"max_trials": -1}, "`max_trials` must be a whole number of at least 0"),
        ({"max_minutes": 0}, "`max_minutes` must be a number above 0"),
        ({"loss": "mse"}, "`labels` must be given with `loss`"),
        ({"data": iter([X])}, "must be arrays, or batches that can be read again"),
        ({"data": [X[:50], X[50:100]]}, "takes|must"),
        ({"data": tf.data.Dataset.from_tensor_slices(X).batch(9)}, "`validation_data` must be given"),
        ({"data": X[:20]}, "`data` must have at least 64 samples"),
        ({"model": "resnet"}, "`model` must be"),
        ({"seed": 1.5}, "`seed` must be a whole number of at least 0"),
        ({"labels": np.where(Y == 1, np.nan, Y)}, r"`labels` must have finite labels.*for [0-9]+ of 400 samples"),
        ({"validation_data": (X[:9], [0.0] * 8 + [np.inf])}, "`validation_data` must have finite labels.*1 of 9.*sample 8"),
    ],
    ids=range(17),
)
def test_bad_input_is_refused_by_name(options, told, model):
    with pytest.raises((ValueError, TypeError), match=told):
        keras_kd.compress(**{"model": model, "data": X, "budget": 9000, "verbose": 0} | options)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("100KB", 100_000),
        ("1.5 MB", 1_500_000),
        ("2KiB", 2048),
        ("12b", 12),
        (7.9, 7),
        ("64", 64),
        ("20 %", "20%"),
        ("020.0%", "20%"),
        ("33.3333333%", "33.3333333%"),
    ],
)
def test_budgets_may_have_units(given, count):
    assert _settings.bytes_of(given) == count


class Unregistered(L.Dense):
    """A layer that no file brings back."""


def test_a_model_that_no_file_brings_back_is_refused_before_the_work(tmp_path):
    model = keras.Sequential([keras.Input((10,)), Unregistered(4)])
    with pytest.raises(ValueError, match=r"`model` must be one that Keras can save and load.*register_keras_serializable"):
        keras_kd.compress(model, X, budget=9000, folder=tmp_path, verbose=0)
    assert not list(tmp_path.glob("original*"))


def test_labels_without_a_loss_are_for_the_scores_alone(capsys):
    found = keras_kd.compress(build(), X, Y, budget=9000, max_trials=1, epochs=2, verbose=1)
    assert (found.what, found.attempts[-1].epochs) == ("accuracy", 2)
    assert "epoch 2/2, loss" in capsys.readouterr().out


def test_numpy_numbers_and_other_spellings_go_on_in_the_folder_and_an_unchanged_result_leaves_the_card(tmp_path, monkeypatch):
    model = build()
    arguments = {"validation_data": (X[:50], Y[:50]), "max_trials": np.int64(0), "folder": tmp_path, "verbose": 0}
    numbers = {"learning_rate": np.float32(1e-3), "seed": np.int64(3), "batch_size": np.int32(64), "epochs": np.int8(1)}
    found = keras_kd.compress(model, X, Y, budget="99.0%", **arguments, **numbers)
    before = (tmp_path / "README.md").stat().st_mtime_ns
    written, copy = [], _work.shutil.copyfile
    monkeypatch.setattr(_work.shutil, "copyfile", lambda source, target: written.append(target) or copy(source, target))
    again = keras_kd.compress(model, X, Y, budget="099%", **arguments, **numbers)
    assert again.attempts == found.attempts
    assert (tmp_path / "README.md").stat().st_mtime_ns == before
    assert {path.suffix for path in written} == {".part"}  # a file is whole at its place, or not there


def test_a_training_that_the_time_ended_tells_the_epochs_it_began_and_a_failed_one_keeps_the_sum(tmp_path, monkeypatch):
    def train(work, *_):
        work._train("whole", again=False, deadline=0.0)
        monkeypatch.setattr(_work.Quantization, "quantized_model", failing)
        work._train("whole_trained", again=True, deadline=np.inf)

    def failing(_):
        raise ValueError("no file of this")

    monkeypatch.setattr(_work.Work, "train", train)
    monkeypatch.setattr(_work.Work, "_measured", lambda _, path: (float("trained" in path.name), "accuracy", "classes"))
    found = keras_kd.compress(build(), X, Y, budget=9000, validation_data=(X[:50], Y[:50]), epochs=3, folder=tmp_path, verbose=0)
    _, trained, again = found.attempts
    assert (trained.epochs, trained.stopped) == (1, True)
    assert (again.epochs, again.size, again.note) == (4, 0, "no file of this")
    assert "chosen, stopped by the time limit" in str(found)
    card = (tmp_path / "README.md").read_text()
    assert "for 1 epoch in" in card
    assert "0.001 that was to fall to 0; stopped by the time limit." in card


def test_a_file_that_gives_no_finite_numbers_is_none(monkeypatch):
    class Broken(dict):
        task = "numbers"
        rows = ()

    real = _work.report.compare

    def compare(files, *given, **options):
        row = types.SimpleNamespace(accuracy=None, loss=None, agreement=1.0)
        return Broken(this=row) if "whole" in files["this"].name else real(files, *given, **options)

    monkeypatch.setattr(_work.report, "compare", compare)
    with pytest.raises(ValueError, match=r"No file could be made: `model` must give finite numbers.*whole.tflite"):
        keras_kd.compress(build(1), X, X[:, :1], budget=9000, verbose=0)


def test_of_equal_scores_the_smaller_file_is_published_and_then_the_earlier(tmp_path, monkeypatch):
    monkeypatch.setattr(_work.Work, "_measured", lambda *_: (0.5, "accuracy", "classes"))
    work = object.__new__(_work.Work)
    work.folder, work.budget, work.verbose, work.state = tmp_path, 100, 0, {"attempts": {}, "what": "accuracy"}
    published = []
    for key, size in (("a", 90), ("b", 90), ("c", 80), ("d", 85), ("e", 101)):
        for suffix in ("tflite", "int8.keras"):
            (tmp_path / f"{key}.{suffix}").write_text(key)
        work._record(key, Attempt(key, 1.0, 0, size, 0.0, 1, 0.0, False), 0.0)
        published.append((tmp_path / "model.tflite").read_text())
    assert published == ["a", "a", "c", "c", "c"]
    assert work._ranked() == ["c", "d", "a", "b"]


def made(folder, **changes):
    best = dataclasses.replace(Attempt("int8", 1.0, 0, 9, 0.5, 1, 0.0, True), **changes)
    return Compression(None, folder / "model.tflite", best, (best,), 10, 0.6, 20, "accuracy")


@pytest.mark.parametrize(("bits", "epochs"), [(8, 0), (4, 0), (4, 2)])
def test_the_card_says_of_how_many_bits_the_integers_are(bits, epochs, tmp_path):
    (step,) = [one for one in _card._steps(made(tmp_path, bits=bits, epochs=epochs), 1e-3) if "bits" in one]
    assert f"weights of {bits} bits, activations of 8" in step
    assert ("that falls to 0." in step) == bool(epochs)


def test_an_interruption_at_the_card_does_not_make_it_that_of_somebody_else(tmp_path, monkeypatch):
    calls, state = [], [None]
    monkeypatch.setattr(_card.report, "compare", lambda *_, **__: None)

    def model_card(file, path, made, **_):
        calls.append(path)
        path.write_text("\n".join(made))
        return path

    def write(**changes):
        return _card.write_card(made(tmp_path, **changes), (None, None), 1e-3, state[0], lambda one: state.__setitem__(0, one))

    monkeypatch.setattr(_card.report, "model_card", model_card)
    card = tmp_path / "README.md"
    assert write()
    assert write()
    assert len(calls) == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(card), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(bits=4)
    assert "of 8 bits" in card.read_text()
    assert write(bits=4)
    assert "of 4 bits" in card.read_text()
    card.write_text("edited")
    assert not write(bits=4)
    assert card.read_text() == "edited"


def test_what_does_not_fit_into_memory_does_not_count_for_the_fit_of_all_layers(monkeypatch):
    model = build()
    cut = surgery.remove_channels(model, {"a": range(32)}, data=X, verbose=0)
    before = [weight.copy() for weight in cut.get_weights()]
    monkeypatch.setattr(_side_by_side, "samples_that_fit", lambda _: 31)
    assert _strategies.fitted(cut, model, X) is cut
    for one, other in zip(cut.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.undo()
    fitted = _strategies.fitted(cut, model, X).get_weights()
    assert any(not np.array_equal(one, other) for one, other in zip(fitted, before, strict=True))
