"""LinearProbe: scikit-learn's Ridge in one pass, nothing disturbed, whatever the features are like."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sklearn.linear_model import Ridge

from keras_kd._moments import Moments, ridge
from keras_kd.layers import LinearProbe

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 7)) * RNG.uniform(0.1, 5, 7) + RNG.normal(size=7) * 10
Y = X @ RNG.normal(size=(7, 3)) + RNG.normal(size=(300, 3)) + 4
LABELS = Y.argmax(-1)
WEIGHTS = RNG.uniform(0, 2, 300)


def adapted(x, y, units=3, dtype="float64", **options):
    weights = options.pop("sample_weight", None)
    probe = LinearProbe(units, dtype=dtype, **options)
    probe.adapt(x, y, sample_weight=weights, batch_size=64)
    return probe


@pytest.mark.parametrize("l2", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("targets", ["real", "one-hot", "indices"])
def test_it_equals_scikit_learns_ridge(l2, weights, targets):
    wanted = Y if targets == "real" else np.eye(3)[LABELS]
    truth = Ridge(alpha=l2).fit(X, wanted, sample_weight=weights)
    probe = adapted(X, LABELS if targets == "indices" else wanted, l2=l2, sample_weight=weights)
    np.testing.assert_allclose(probe.kernel, truth.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(probe.bias, truth.intercept_, rtol=1e-6, atol=1e-8)
    residual = wanted - truth.predict(X)
    if weights is None:
        np.testing.assert_allclose(probe.solution.r2, 1 - (residual**2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0), rtol=1e-6)


def test_data_sets_and_batch_sizes_give_the_same():
    truth = adapted(X, Y)
    sets = tf.data.Dataset.from_tensor_slices((X, Y)).batch(17)
    streamed = LinearProbe(3, dtype="float64")
    streamed.adapt(sets)
    np.testing.assert_allclose(streamed.kernel, truth.kernel, rtol=1e-9)
    weighted = LinearProbe(3, dtype="float64")
    weighted.adapt(tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(17))
    np.testing.assert_allclose(weighted.kernel, adapted(X, Y, sample_weight=WEIGHTS).kernel, rtol=1e-9)


def test_two_halves_merged_are_one_pass_over_all():
    first, second = adapted(X[:100], Y[:100]), adapted(X[100:] + 0.0, Y[100:])
    first.merge(second)
    np.testing.assert_allclose(first.kernel, adapted(X, Y).kernel, rtol=1e-10)
    np.testing.assert_allclose(first.bias, adapted(X, Y).bias, rtol=1e-10)


def test_moments_are_those_of_numpy_far_from_zero():
    rows = RNG.normal(size=(1000, 5)) + 1e6
    moments = Moments.empty(5)
    for start in range(0, 1000, 33):
        moments.add(Moments.of(rows[start : start + 33]))
    centered = rows - rows.mean(0)
    np.testing.assert_allclose(moments.scatter, centered.T @ centered, rtol=1e-8, atol=1e-6)
    assert (moments.rows, moments.weight) == (1000, 1000.0)


@pytest.mark.parametrize("kind", ["collinear", "constant", "few rows", "all constant"])
def test_features_without_variance_of_their_own_are_handled(kind):
    x, y = X.copy(), Y
    if kind == "collinear":
        x[:, 3] = 2 * x[:, 0] - x[:, 1]
    elif kind == "constant":
        x[:, 3] = 5.0
    elif kind == "few rows":
        x, y = X[:4], Y[:4]
    else:
        x[:] = 3.0
    for l2 in (0.0, 1e-3):
        probe = adapted(x, y, l2=l2)
        predicted = np.asarray(probe(x))
        assert np.all(np.isfinite(predicted))
        truth = np.c_[x, np.ones(len(x))] @ np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        np.testing.assert_allclose(predicted, truth, atol=0.01)


def test_of_several_penalties_the_best_by_generalised_cross_validation_is_taken():
    x, y = X[:30], Y[:30] + 5 * RNG.normal(size=(30, 3))
    penalties = [1e-4, 1e-1, 10.0, 1e3, 1e5]

    def score(l2):
        centered, wanted = x - x.mean(0), y - y.mean(0)
        hat = centered @ np.linalg.solve(centered.T @ centered + l2 * np.eye(7), centered.T)
        return 30 * ((wanted - hat @ wanted) ** 2).sum() / (30 - 1 - np.trace(hat)) ** 2

    probe = adapted(x, y, l2=penalties)
    best = min(penalties, key=score)
    assert probe.solution.l2 == best
    assert probe.solution.gcv == pytest.approx(score(best), rel=1e-8)
    np.testing.assert_allclose(probe.kernel, Ridge(alpha=best).fit(x, y).coef_.T, rtol=1e-6)


def test_in_fit_it_never_changes_the_gradients_of_what_it_reads():
    inputs = keras.Input((7,))
    hidden = layers.Dense(5, activation="relu", name="hidden")(inputs)
    head, read = layers.Dense(3, name="head")(hidden), LinearProbe(3, name="probe")(hidden)
    model = keras.Model(inputs, [head, read])
    plain = keras.Model(inputs, head)
    gradients = []
    for net, pick in ((plain, lambda out: out), (model, lambda out: out[0] + 7.0 * out[1])):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(pick(net(X.astype("float32"))) ** 1)
        gradients.append(tape.gradient(loss, [v.value for v in model.get_layer("hidden").trainable_variables]))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, other)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(X.astype("float32"))[1])
    kernel = model.get_layer("probe").kernel.value
    assert np.any(tape.gradient(loss, kernel) != 0)


def test_without_stop_gradient_it_is_a_layer_like_any_other():
    probe = LinearProbe(2, stop_gradient=False)
    x = tf.constant(X[:4].astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(probe(x))
    np.testing.assert_allclose(tape.gradient(loss, x), np.tile(np.asarray(probe.kernel).sum(-1), (4, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "shape", "reference"),
    [
        ("auto", (5, 4, 3), lambda x: x.mean((1, 2))),
        ("max", (5, 4, 3), lambda x: x.max((1, 2))),
        ("flatten", (5, 4, 3), lambda x: x.reshape(len(x), -1)),
        ("none", (3,), lambda x: x),
        ("auto", (3,), lambda x: x),
        ("average", (6, 3), lambda x: x.mean(1)),
    ],
)
def test_pooling(pooling, shape, reference):
    x = RNG.normal(size=(8, *shape)).astype("float32")
    np.testing.assert_allclose(LinearProbe(2, pooling=pooling).pooled(tf.constant(x)), reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pooling", "reference"), [("auto", np.mean), ("max", np.max)])
def test_masked_steps_are_left_out(pooling, reference):
    x, lengths = RNG.normal(size=(4, 6, 3)).astype("float32"), [1, 3, 6, 2]
    mask = np.arange(6) < np.array(lengths)[:, None]
    found = LinearProbe(2, pooling=pooling).pooled(tf.constant(x), tf.constant(mask))
    expected = [reference(x[i, :length], axis=0) for i, length in enumerate(lengths)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_it_is_saved_with_what_it_has_solved(tmp_path):
    model = keras.Sequential([keras.Input((7,)), LinearProbe(3, l2=[1e-3, 1.0], pooling="flatten", activation="softmax")])
    model.layers[0].adapt(X, LABELS)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded.layers[0].get_config() == model.layers[0].get_config()


def test_it_trains_in_fit():
    model = keras.Sequential([keras.Input((7,)), layers.Normalization(), LinearProbe(3)])
    model.layers[0].adapt(X)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], jit_compile=True)
    history = model.fit(X, LABELS, epochs=20, verbose=0).history
    assert history["accuracy"][-1] > history["accuracy"][0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearProbe(0), "`units` must be a whole number of at least 1. Received: units=0"),
        (lambda: LinearProbe(2, l2=-1.0), "`l2` must be a number of at least 0"),
        (lambda: LinearProbe(2, l2=[]), "`l2` must be a number of at least 0"),
        (lambda: LinearProbe(2, pooling="sum"), "`pooling` must be one of auto"),
        (lambda: adapted(X[:0], Y[:0]), "at least one sample"),
        (lambda: adapted(X, Y[:5]), "one entry for each sample. Received: 5 for 300"),
        (lambda: adapted(X, LABELS, units=2), "class indices from 0 to 1"),
        (lambda: adapted(X, Y, units=2), r"shape \(samples, 2\). Received: a batch of shape \(64, 3\)"),
        (lambda: adapted(X * np.nan, Y), "must be finite"),
        (lambda: adapted(X, Y, sample_weight=WEIGHTS[:3]), r"`sample_weight` must have shape \(300,\)"),
        (lambda: adapted(X, Y, sample_weight=-WEIGHTS), "at least 0 for each sample"),
        (lambda: LinearProbe(2).adapt(X), "`targets` must be given"),
        (lambda: adapted(X, Y).adapt(X[:, :4], Y), "must have the width .* 7. Received: shape"),
        (lambda: adapted(X, Y).merge(LinearProbe(3)), "must be adapted before"),
        (lambda: adapted(X, Y).merge(adapted(X[:, :4], Y)), "7 to 3, and 4 to 3"),
        (lambda: LinearProbe(2, pooling="none").build((None, 4, 3)), "known width"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ridge_wants_a_penalty():
    with pytest.raises(ValueError, match="at least one penalty"):
        ridge(Moments.of(np.c_[X, Y]), 7, [])
