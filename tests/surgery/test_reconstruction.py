"""reconstruct: all layers together come nearer to the original, or everything stays."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import surgery
from keras_kd.surgery import reconstruction

L = keras.layers
rng = np.random.default_rng(0)
X = rng.normal(size=(300, 8)).astype("float32")


def dense(activation=None, dtype=None):
    """Two hidden layers, the second of which is read by two heads."""
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((8,))
    x = L.Dense(24, name="a", dtype=dtype)(x)
    x = L.ReLU(name="seen")(L.BatchNormalization(name="norm", dtype=dtype)(x))
    x = L.Dense(16, activation="tanh", name="b", dtype=dtype)(x)
    return keras.Model(inputs, [L.Dense(3, activation=activation, name="head")(x), L.Dense(1, name="other")(x)])


def thinner(model):
    return surgery.remove_channels(model, {"a": range(14), "b": [1, 5, 7]}, data=X)


def by_hand(model, original, places, x, logits=lambda y: y):
    """Mean over places and outputs of the mean squared difference relative to the variance, by Keras models of NumPy values."""

    def values(one, kept):
        tensors = [one.get_layer(name).output for name in places]
        found = [np.asarray(v) for v in keras.Model(one.inputs[0], [*tensors, *one.outputs])(x)]
        inner = [v if kept is None else v[..., kept[name]] for v, name in zip(found, places, strict=False)]
        return [*inner, logits(found[-2]), found[-1]]

    return values(model, None), values(original, surgery.kept_channels(model))


def test_the_error_is_that_of_samples_that_were_not_fitted_on_and_falls():
    model = dense()
    smaller = thinner(model)
    better, report = surgery.reconstruct(smaller, model, X, verbose=0, return_report=True)
    assert report.places == ("seen", "b")
    assert report.samples == 272
    order = np.random.default_rng(0).permutation(300)
    errors = []
    for one in (smaller, better):
        (_, wanted), (got, aim) = (
            by_hand(one, model, report.places, X[order[:272]]),
            by_hand(one, model, report.places, X[order[272:]]),
        )
        errors.append(np.mean([np.mean((g - w) ** 2) / np.mean(np.var(v, 0)) for g, w, v in zip(got, aim, wanted, strict=True)]))
    np.testing.assert_allclose([report.error_before, report.error_after], errors, rtol=1e-4)
    assert report.error_after < 0.95 * report.error_before
    assert "all layers together" in str(report)


def test_neither_model_changes_and_statistics_and_flags_stay():
    model = dense()
    model.get_layer("b").trainable = False
    smaller = thinner(model)
    before = [[np.asarray(v).copy() for v in one.variables] for one in (model, smaller)]
    better = surgery.reconstruct(smaller, model, X, epochs=2, verbose=0)
    for one, values in zip((model, smaller), before, strict=True):
        for variable, value in zip(one.variables, values, strict=True):
            np.testing.assert_array_equal(variable, value)
    norms = [one.get_layer("norm") for one in (smaller, better)]
    np.testing.assert_array_equal(norms[0].moving_mean, norms[1].moving_mean)
    np.testing.assert_array_equal(norms[0].moving_variance, norms[1].moving_variance)
    assert not better.get_layer("b").trainable
    assert np.abs(np.asarray(better.get_layer("b").kernel) - np.asarray(smaller.get_layer("b").kernel)).max() > 0
    np.testing.assert_array_equal(surgery.kept_channels(better)["a"], surgery.kept_channels(smaller)["a"])


def test_where_the_error_does_not_fall_all_weights_stay(monkeypatch):
    monkeypatch.setattr(reconstruction, "_RATE", 30.0)
    model = dense()
    smaller = thinner(model)
    same, report = surgery.reconstruct(smaller, model, X, epochs=1, verbose=0, return_report=True)
    assert report.error_after == report.error_before
    assert "nothing gained" in str(report)
    for one, other in zip(same.variables, smaller.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_probabilities_are_compared_by_their_logits():
    plain, soft = dense(), dense("softmax")
    reports = []
    for model in (plain, soft):
        smaller = surgery.remove_channels(model, {"a": range(14)})  # the same weights in both
        reports.append(surgery.reconstruct(smaller, model, X, epochs=1, verbose=0, return_report=True)[1])
    model = dense()
    smaller = surgery.remove_channels(model, {"a": range(14)})
    order = np.random.default_rng(0).permutation(300)
    pair = [
        by_hand(smaller, model, reports[0].places, X[part], lambda y: y - y.mean(-1, keepdims=True))
        for part in (order[:272], order[272:])
    ]
    error = np.mean([np.mean((g - w) ** 2) / np.mean(np.var(v, 0)) for (g, w, v) in zip(*pair[1], pair[0][1], strict=True)])
    np.testing.assert_allclose(reports[1].error_before, error, rtol=1e-3)
    assert reports[0].error_before != pytest.approx(error, rel=1e-3)


def test_nested_models_several_operations_and_half_precision():
    image = keras.Input((8, 8, 2))
    inner = keras.Sequential([keras.Input((8, 8, 2)), L.Conv2D(12, 3, activation="relu", name="one"), L.Conv2D(12, 3, name="two")])
    x = L.Dense(16, activation="relu", name="wide", dtype="mixed_bfloat16")(L.Flatten()(L.ReLU(name="last")(inner(image))))
    model = keras.Model(image, L.Dense(3, name="head")(x))
    x = rng.normal(size=(400, 8, 8, 2)).astype("float32")
    half = surgery.prune_channels(model, macs=0.5, data=x, reconstruct="layers", verbose=0)
    thin = surgery.factorize(half, macs=0.8, data=x)
    better, report = surgery.reconstruct(thin, model, x, epochs=6, verbose=0, return_report=True)
    assert set(report.places) == {"flatten", f"{inner.name}/one"}  # "wide" became two layers
    assert report.error_after < report.error_before
    assert better.count_params() == thin.count_params()
    assert better(x[:2]).shape == (2, 3)


def test_fewer_places_are_compared_where_memory_does_not_hold_all(monkeypatch):
    model = dense()
    smaller = thinner(model)
    monkeypatch.setattr(reconstruction, "_MEMORY", 272 * 4 * 15)
    _, report = surgery.reconstruct(smaller, model, X, epochs=1, verbose=0, return_report=True)
    assert report.places == ("b",)


@pytest.mark.parametrize(
    ("how", "samples", "epochs"),
    [(True, 300, 30), (True, 200, None), ("layers", 300, None), ("together", 200, 30), (False, 300, None)],
)
def test_prune_channels_does_it_by_itself_where_there_are_samples_enough(how, samples, epochs, monkeypatch):
    calls = []
    monkeypatch.setattr("keras_kd.surgery.reconstruction.fit_together", lambda *arguments: calls.append(arguments))
    model = dense()
    smaller, report = surgery.prune_channels(model, macs=0.6, data=X[:samples], reconstruct=how, verbose=0, return_report=True)
    assert bool(report.refits) == bool(how)
    assert [(one[0] is smaller, one[1] is model, one[3]) for one in calls] == ([(True, True, epochs)] if epochs else [])


def test_prune_channels_reports_it():
    _, report = surgery.prune_channels(dense(), macs=0.3, data=X, verbose=0, return_report=True)
    assert report.together.error_after < report.together.error_before
    assert str(report.together) in str(report)


def test_the_work_of_large_models_is_bounded():
    assert reconstruction.epochs_within_reason(1000, 1_000_000) == 30
    assert reconstruction.epochs_within_reason(1000, 40_000_000) == 8
    assert reconstruction.epochs_within_reason(1000, 100_000_000) == 0
    assert reconstruction.epochs_within_reason(255, 1000) == 0


def test_asking_for_the_fit_with_too_few_samples_is_refused():
    with pytest.raises(ValueError, match="`data` must have at least 64 samples that fit into memory. Received: 16"):
        surgery.prune_channels(dense(), macs=0.6, data=X[:16], reconstruct="together", verbose=0)


def test_the_work_is_counted_at_the_lengths_of_the_data(monkeypatch):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(L.Conv1D(6, 3, name="a")(inputs))))
    smaller = surgery.remove_channels(model, {"a": [0, 1]}, verbose=0)
    seen = []
    monkeypatch.setattr(reconstruction, "epochs_within_reason", lambda *given: seen.append(given) or 0)
    reconstruction.fit_where_it_pays(smaller, model, [[keras.ops.ones((300, 50, 8))]])
    assert seen == [(300, 48 * 3 * 8 * 4 + 4 * 3)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1"),
        ({"data": X[:50]}, "`data` must have at least 64 samples that fit into memory. Received: 50"),
        ({"data": X[:, :3]}, "`data` must have the shape"),
        ({"data": np.full((64, 8), np.inf, "float32")}, "`data` must be finite"),
        ({"original": dense()}, "must be the very object that surgery made from `original`"),
        ({"verbose": "loud"}, "`verbose` must be 0"),
    ],
    ids=range(6),
)
def test_bad_input_is_refused_by_name(options, told):
    model = dense()
    arguments = {"model": thinner(model), "original": model, "data": X, "verbose": 0} | options
    with pytest.raises(ValueError, match=told):
        surgery.reconstruct(**arguments)


def test_prune_channels_refuses_other_ways():
    with pytest.raises(ValueError, match="`reconstruct` must be True, False"):
        keras_kd.surgery.prune_channels(dense(), macs=0.5, data=X, reconstruct="jointly")
