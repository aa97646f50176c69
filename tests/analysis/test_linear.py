"""Linear analysis: every number against NumPy, scikit-learn or TensorFlow's own Jacobians."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from sklearn.linear_model import LinearRegression, Ridge

from keras_kd import _macs, analysis
from keras_kd.analysis import LinearReport, Moments, Plan, linear_analysis
from keras_kd.analysis._pass import _Chance

X = np.random.default_rng(0).normal(size=(96, 9, 8, 3)).astype("float32")
Y = np.random.default_rng(1).integers(0, 4, 96)
ALL = 10_000  # positions


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        low = 0.5 if "variance" in weight.name else -0.5
        weight.assign(rng.uniform(low, 1.0 if low > 0 else 0.5, weight.shape))
    return model


@pytest.fixture(scope="module")
def cnn():
    inputs = keras.Input((9, 8, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="second")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomized(keras.Model(inputs, layers.Dense(4, name="head")(x)))


@pytest.fixture(scope="module")
def report(cnn):
    return linear_analysis(
        cnn,
        X,
        Y,
        noise=[1e-3, 0.3],
        blocks=[("first", "relu"), ("first", "second")],
        l2=0.5,
        max_positions=ALL,
        batch_size=40,
        verbose=0,
    )


def outputs_of(model, name, x=X):
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(name).output)(x), "float64")


def patches(x, size, stride, before, out):
    """Windows of an image, zeros around it, as rows."""
    padded = np.pad(x, ((0, 0), (before[0], 20), (before[1], 20), (0, 0)))
    rows = [
        padded[:, i * stride : i * stride + size[0], j * stride : j * stride + size[1]].reshape(len(x), -1)
        for i in range(out[0])
        for j in range(out[1])
    ]
    return np.stack(rows, 1).reshape(len(x) * out[0] * out[1], -1)


def r2(x, y, alpha):
    """Adjusted for the number of features."""
    fit = Ridge(alpha=alpha).fit(x, y)
    unexplained = np.square(y - fit.predict(x)).sum() / np.square(y - y.mean(0)).sum()
    return 1 - unexplained * (len(x) - 1) / (len(x) - 1 - x.shape[1])


def test_the_gain_is_that_of_tensorflows_jacobian(cnn, report):
    """The direction is the noise, which the seed and the number of the batch give again."""
    ratios = []
    for step, start in enumerate(range(0, 96, 40)):
        x = tf.constant(X[start : start + 40])
        delta = _Chance(0, tf.constant(step)).normal(x) * tf.sqrt(tf.reduce_mean(x**2, (1, 2, 3), keepdims=True)) * 1e-3
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = cnn(x)
        moved = tf.einsum("bohwc,bhwc->bo", tape.batch_jacobian(output, x), delta)
        norms = [np.linalg.norm(np.reshape(value, (len(x), -1)), axis=1) for value in (moved, output, delta, x)]
        ratios.extend(norms[0] / norms[1] / (norms[2] / norms[3]))
    np.testing.assert_allclose(report["head"].gain, np.mean(ratios), rtol=1e-4)


def test_small_noise_gives_the_gain_and_large_noise_does_not(report):
    small, large = report["head"].responses
    assert small.ratio == pytest.approx(report["head"].gain, rel=0.01)
    assert small.explained > 0.99 > large.explained
    assert report["first"].responses[1].explained == pytest.approx(1.0, abs=1e-6)  # linear, at any size


def test_the_response_agrees_with_a_simulation_of_ones_own(cnn, report):
    rng, ratios = np.random.default_rng(5), []
    plain = np.asarray(cnn(X))
    for _ in range(5):
        noise = rng.normal(size=X.shape) * np.sqrt(np.mean(X**2, (1, 2, 3), keepdims=True)) * 0.3
        change = np.linalg.norm(np.asarray(cnn((X + noise).astype("float32"))) - plain, axis=1) / np.linalg.norm(plain, axis=1)
        ratios.extend(change / (np.linalg.norm(noise.reshape(96, -1), axis=1) / np.linalg.norm(X.reshape(96, -1), axis=1)))
    found = report["head"].responses[1]
    assert abs(found.ratio - np.mean(ratios)) < 4 * (found.standard_error + np.std(ratios) / len(ratios) ** 0.5)
    assert found.standard_error == pytest.approx(np.std(ratios) / 96**0.5, rel=0.3)


def test_linearity_is_the_score_of_scikit_learns_ridge(cnn, report):
    norm, relu, second = (outputs_of(cnn, name) for name in ("norm", "relu", "second"))
    assert report["relu"].linearity == pytest.approx(r2(flat(norm), flat(relu), 0.5), abs=1e-6)
    windows = patches(relu, (3, 3), 1, (1, 1), (5, 4))
    assert report["second"].linearity == pytest.approx(r2(windows, flat(second), 0.5), abs=1e-6)
    assert report["second"].window == (3, 3)
    assert report["first"].linearity > 1 - 1e-4
    assert report["head"].linearity == pytest.approx(r2(outputs_of(cnn, "pool"), outputs_of(cnn, "head"), 0.5), abs=1e-6)


def flat(values):
    return values.reshape(-1, values.shape[-1])


def test_the_linearity_of_a_block_is_that_of_all_that_its_windows_show(cnn, report):
    relu, second = outputs_of(cnn, "relu"), outputs_of(cnn, "second")
    # 9 x 8 at stride 2: "same" pads one row above and below, and one column at the right alone.
    rows = patches(X, (3, 3), 2, (1, 0), (5, 4))
    assert report.blocks[0].linearity == pytest.approx(r2(rows, flat(relu), 0.5), abs=1e-6)
    rows = patches(X, (7, 7), 2, (3, 2), (5, 4))
    assert report.blocks[1].window == (7, 7)
    assert report.blocks[1].linearity == pytest.approx(r2(rows, flat(second), 0.5), abs=1e-6)


def test_redundancy_is_that_of_a_regression_for_each_channel(cnn, report):
    rows = flat(outputs_of(cnn, "second"))
    for channel in range(8):
        rest = np.delete(rows, channel, axis=1)
        score = LinearRegression().fit(rest, rows[:, channel]).score(rest, rows[:, channel])
        adjusted = 1 - (1 - score) * (len(rows) - 1) / (len(rows) - 8)
        assert report["second"].redundancy[channel] == pytest.approx(adjusted, abs=1e-5)


def test_ranks_are_those_of_the_covariance_and_of_the_kernel(cnn, report):
    rows = flat(outputs_of(cnn, "second"))
    np.testing.assert_allclose(report["second"].spectrum, np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1], rtol=1e-4, atol=1e-7)
    kernel = np.asarray(cnn.get_layer("second").kernel, "float64").reshape(-1, 8)
    values = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(report["second"].weight_spectrum, values, rtol=1e-6)
    shares = values**2 / np.sum(values**2)
    assert report["second"].weight_effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert report["second"].weight_rank_99 == 1 + np.argmax(np.cumsum(shares) >= 0.99)


def gradients(model):
    """Of the cross-entropy with respect to what the head reads, by hand."""
    pooled, kernel = outputs_of(model, "pool"), np.asarray(model.get_layer("head").kernel, "float64")
    logits = pooled @ kernel + np.asarray(model.get_layer("head").bias)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return pooled, (probabilities - np.eye(4)[Y]) @ kernel.T


def test_taylor_fisher_and_gradient_are_those_by_hand(cnn, report):
    pooled, gradient = gradients(cnn)
    np.testing.assert_allclose(report["pool"].taylor, np.abs(pooled * gradient).mean(0), rtol=1e-4)
    np.testing.assert_allclose(report["pool"].fisher, 0.5 * np.square(pooled * gradient).mean(0), rtol=1e-4)
    np.testing.assert_allclose(report["pool"].gradient, np.square(gradient).mean(0), rtol=1e-4)
    # The same through the average over 20 positions.
    second = outputs_of(cnn, "second")
    effect = np.einsum("bhwc,bc->bc", second, gradient) / 20
    np.testing.assert_allclose(report["second"].taylor, np.abs(effect).mean(0), rtol=1e-4)
    np.testing.assert_allclose(report["second"].gradient, np.square(gradient).mean(0) / 20, rtol=1e-4)


def test_without_labels_fisher_is_half_the_square_of_the_outputs_change():
    """With one output the sign does not matter, and nothing is left to chance."""
    model = randomized(keras.Sequential([keras.Input((5,)), layers.Dense(7, activation="tanh", name="hidden"), layers.Dense(1)]))
    x = np.random.default_rng(2).normal(size=(60, 5)).astype("float32")
    row = linear_analysis(model, x, verbose=0)["hidden"]
    change = outputs_of(model, "hidden", x) * np.asarray(model.layers[-1].kernel)[:, 0]
    np.testing.assert_allclose(row.fisher, 0.5 * np.square(change).mean(0), rtol=1e-4)
    np.testing.assert_allclose(row.taylor, np.abs(change).mean(0), rtol=1e-4)


def test_costs_are_what_the_kept_channels_cannot_give_weighted_by_gradients(cnn, report):
    pooled, gradient = gradients(cnn)
    weights = np.square(gradient).mean(0)
    row = report["pool"]
    assert row.cost == pytest.approx(0.5 * np.sum(weights * pooled.var(0)), rel=1e-4)
    for kept in (2, 5):
        keep = list(row.removal_by_cost.keep[:kept])
        left = pooled - LinearRegression().fit(pooled[:, keep], pooled).predict(pooled[:, keep])
        assert row.cost * row.removal_by_cost.errors[kept] == pytest.approx(
            0.5 * np.sum(weights * left.var(0)), rel=1e-3, abs=1e-12
        )


def test_dead_duplicate_and_proportional_channels_are_found_exactly():
    model = randomized(keras.Sequential([keras.Input((9, 8, 3)), layers.Conv2D(8, 3, name="conv"), layers.ReLU(name="relu")]))
    kernel, bias = (np.array(weight) for weight in model.get_layer("conv").weights)
    kernel[..., 1], bias[1] = kernel[..., 4], bias[4]
    kernel[..., 5], bias[5] = 3 * kernel[..., 4], 3 * bias[4]
    kernel[..., 2], bias[2] = 0.0, -1.0
    kernel[..., 6], bias[6] = 0.0, 1.0
    model.get_layer("conv").set_weights([kernel, bias])
    # Channel 7 is above 0 at one position of one image.
    highest = np.asarray(model.get_layer("conv")(X))[..., 7].ravel()
    bias[7] -= np.sort(highest)[-2]
    model.get_layer("conv").set_weights([kernel, bias])
    row = linear_analysis(model, X, max_positions=2, verbose=0)["relu"]
    assert row.dead == (2, 6)
    assert row.duplicates == ((1, 4),)
    assert (1, 4, 5) in row.proportional


def test_the_accuracy_is_that_of_a_probe(cnn, report):
    probed = analysis.probe(cnn, X, Y, layers=["pool"], seed=0, batch_size=40)
    assert report["pool"].accuracy == probed.rows[0].accuracy
    assert linear_analysis(cnn, X, verbose=0)["pool"].accuracy is None


def test_one_pass_over_any_kind_of_data_gives_the_same(cnn, report):
    passes = []

    def batches():
        passes.append(1)
        for start in range(0, 96, 40):
            yield X[start : start + 40], Y[start : start + 40]

    arguments = {"l2": 0.5, "max_positions": ALL, "verbose": 0}
    found = linear_analysis(cnn, batches(), **arguments)
    assert passes == [1]
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(40)
    for one in (found, linear_analysis(cnn, data, **arguments)):
        assert one["second"].linearity == pytest.approx(report["second"].linearity, abs=1e-9)
        np.testing.assert_allclose(one["second"].fisher, report["second"].fisher, rtol=1e-6)
    other = linear_analysis(cnn, X, Y, batch_size=96, **arguments)
    np.testing.assert_allclose(other["second"].redundancy, report["second"].redundancy, atol=1e-6)


def test_positions_are_sampled_with_a_seed(cnn):
    rows = [linear_analysis(cnn, X, max_positions=3, seed=seed, verbose=0)["second"] for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0].redundancy != rows[2].redundancy
    whole = linear_analysis(cnn, X, max_positions=ALL, verbose=0)["second"]
    np.testing.assert_allclose(np.log(rows[0].spectrum[:3]), np.log(whole.spectrum[:3]), atol=0.5)


def test_the_model_is_as_it_was(cnn):
    before = [np.array(weight) for weight in cnn.weights]
    calls = [vars(layer).get("call") for layer in cnn.layers]
    linear_analysis(cnn, X, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, cnn.weights, strict=True))
    assert [vars(layer).get("call") for layer in cnn.layers] == calls


class Text(keras.Model):
    """Tokens, masked, through a GRU and attention."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(30, 8, mask_zero=True, name="embed")
        self.gru = layers.GRU(6, return_sequences=True, name="gru")
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.head = layers.Dense(3, name="head")

    def call(self, tokens):
        x = self.gru(self.embed(tokens))
        return self.head(keras.ops.mean(x + self.attention(x, x), axis=1))


def test_a_subclassed_model_of_tokens_is_analysed_without_a_graph():
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(0).integers(1, 30, (80, 11))
    model = Text()
    model(tokens[:2])
    report = linear_analysis(model, tokens, verbose=0)
    assert report.kind == "subclassed"
    embed, gru, head = (report[name] for name in ("embed", "gru", "head"))
    assert embed.gain == pytest.approx(1.0, rel=1e-5)  # the noise enters here
    assert 0 < gru.responses[0].explained <= 1
    assert head.linearity > 1 - 1e-4
    assert embed.linearity is None
    assert "floats" in embed.linearity_reason
    with pytest.raises(ValueError, match="A plan needs the graph"):
        report.recommend(macs=0.5)


def test_masked_steps_are_not_among_the_rows():
    tokens = np.random.default_rng(0).integers(1, 30, (60, 7))
    tokens[:, 4:] = 0
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(30, 5, mask_zero=True, name="embed")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(4, name="lstm")(x)))
    row = linear_analysis(model, tokens, max_positions=ALL, verbose=0)["embed"]
    rows = np.asarray(model.get_layer("embed")(tokens))[:, :4].reshape(-1, 5).astype("float64")
    np.testing.assert_allclose(row.spectrum, np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1], rtol=1e-4)


def test_a_layer_that_its_input_can_stand_for_has_a_bypass():
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, padding="same", name="branch")(inputs)
    model = randomized(keras.Model(inputs, layers.Add(name="add")([inputs, x])))
    model.get_layer("branch").set_weights([0.01 * w for w in model.get_layer("branch").get_weights()])
    x = np.random.default_rng(0).normal(size=(64, 6, 6, 4)).astype("float32")
    report = linear_analysis(model, x, blocks=[("branch", "add")], max_positions=ALL, l2=1e-3, verbose=0)
    added = np.asarray(model(x), "float64")
    change = flat(added) - flat(x)
    expected = 1 - np.square(change).mean(0).sum() / flat(added).var(0).sum()
    assert report.blocks[0].bypass == pytest.approx(expected, abs=1e-6)
    assert report.blocks[0].bypass > 0.95 > report["branch"].bypass


def test_a_plan_holds_its_budget_and_counts_what_a_smaller_model_really_has(cnn, report):
    plan = report.recommend(macs=0.6)
    assert plan.reached
    assert plan.macs_after <= 0.6 * plan.macs
    removed = {step.layer: len(step.channels) for step in plan.steps if step.action == "remove_channels"}
    assert removed
    inputs = keras.Input((9, 8, 3))
    x = layers.Conv2D(6 - removed.get("first", 0), 3, strides=2, padding="same")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(8 - removed.get("second", 0), 3, padding="same", activation="relu")(x)
    smaller = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    counted = sum(cost.macs or 0 for cost in _macs.measure(smaller, tf.constant(X[:1]))[0])
    assert {step.action for step in plan.steps} == {"remove_channels"}
    assert plan.macs_after == pytest.approx(counted, rel=0.01)
    assert plan.parameters_after == pytest.approx(smaller.count_params(), rel=0.02)
    assert report.macs == plan.macs == sum(cost.macs or 0 for cost in _macs.measure(cnn, tf.constant(X[:1]))[0])


def test_a_plan_without_budget_takes_what_nothing_is_lost_with():
    inputs = keras.Input((9, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    model = randomized(keras.Model(inputs, layers.Conv2D(4, 3, name="last")(x)))
    kernel, bias = (np.array(weight) for weight in model.get_layer("conv").weights)
    kernel[..., 3], bias[3] = 0.0, -1.0
    kernel[..., 6], bias[6] = kernel[..., 0], bias[0]
    model.get_layer("conv").set_weights([kernel, bias])
    plan = linear_analysis(model, X, Y[:, None, None] * np.ones((96, 5, 4), int), verbose=0).recommend()
    (step,) = [step for step in plan.steps if step.action == "remove_channels"]
    assert step.layer == "conv"
    assert 3 in step.channels
    assert len(step.channels) == 2
    assert set(step.channels) & {0, 6}
    assert step.cost == pytest.approx(0.0, abs=1e-9)
    assert plan.untouched == {"last": "it gives the model's output"}


def test_a_budget_that_cannot_be_reached_is_said(report):
    plan = report.recommend(macs=10)
    assert not plan.reached
    assert "NOT reached" in str(plan)


def test_a_linear_block_and_a_layer_of_low_rank_are_in_the_plan():
    rng = np.random.default_rng(0)
    inputs = keras.Input((12,))
    x = layers.Dense(40, name="a")(inputs)
    x = layers.Dense(40, name="b")(x)
    model = randomized(keras.Model(inputs, layers.Dense(3, name="c")(layers.ReLU(name="relu")(x))))
    x = rng.normal(size=(500, 12)).astype("float32")
    merged = linear_analysis(model, x, blocks=[("a", "b")], verbose=0).recommend(parameters=0.5)
    assert any(step.action == "merge_block" and (step.layer, step.last) == ("a", "b") for step in merged.steps)
    single = linear_analysis(model, x, verbose=0).recommend(parameters=0.7, tolerance=1e-4)
    assert any(step.action in ("factorize", "remove_channels") and step.layer in ("a", "b") for step in single.steps)


def test_reports_and_plans_survive_json_and_are_drawn(report, tmp_path):
    path = tmp_path / "report.json"
    assert LinearReport.from_json(report.to_json(path)) == report == LinearReport.from_json(path)
    plan = report.recommend(macs=0.6)
    assert Plan.from_json(plan.to_json(tmp_path / "plan.json")) == plan == Plan.from_json(tmp_path / "plan.json")
    for name, one in (
        ("curve", report),
        ("single", linear_analysis(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), X[:, 0, 0], verbose=0)),
    ):
        one.plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    text = str(report)
    assert all(layer.name in text for layer in report.layers)
    assert "first .. second" in text
    assert re.search(r"remove_channels\s+\w+\s+\d+ channels", str(plan))
    with pytest.raises(ValueError, match="what `LinearReport.to_json` wrote"):
        LinearReport.from_json("{}")


def test_mixed_precision_is_analysed_in_float32():
    with_policy = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu", dtype="mixed_float16", name="d"), layers.Dense(2)]
    )
    row = linear_analysis(with_policy, X[:, 0, :2].reshape(96, 6), noise=0.1, verbose=0)["d"]
    assert np.isfinite(row.redundancy).all()
    assert 0.5 < row.responses[0].ratio < 2


def tiny():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="relu", name="d"), layers.Dense(2, name="e")])


VECTORS = X[:, 0, 0]


def broken(model):
    model.get_layer("e").set_weights([np.full((4, 2), np.nan), np.zeros(2)])
    return model


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: linear_analysis("model", VECTORS), TypeError, "`model` must be a keras.Model"),
        (lambda: linear_analysis(keras.Sequential([layers.Dense(2)]), VECTORS), ValueError, "`model` must be built"),
        (lambda: linear_analysis(tiny(), VECTORS[:0]), ValueError, "`data` must hold at least one sample"),
        (lambda: linear_analysis(tiny(), VECTORS[:4]), ValueError, 'more rows than the layer "d" has channels, 4. Received: 4'),
        (lambda: linear_analysis(tiny(), VECTORS, Y[:5]), ValueError, "one entry for each sample. Received: 5 for 96"),
        (lambda: linear_analysis(tiny(), VECTORS, noise=0), ValueError, "`noise` must be a number above 0"),
        (lambda: linear_analysis(tiny(), VECTORS, noise=[0.1, -1]), ValueError, "`noise` must be a number above 0"),
        (lambda: linear_analysis(tiny(), VECTORS, noise=float("nan")), ValueError, "`noise` must be a number above 0"),
        (lambda: linear_analysis(tiny(), VECTORS, layers=["f"]), ValueError, "Received: f. Places: d, e"),
        (lambda: linear_analysis(tiny(), VECTORS, layers="d"), ValueError, "`layers` must be a sequence of names"),
        (lambda: linear_analysis(tiny(), VECTORS, layers=[]), ValueError, "at least one place"),
        (lambda: linear_analysis(tiny(), VECTORS, blocks=[("d", "f")]), ValueError, "`blocks` must name places"),
        (lambda: linear_analysis(tiny(), VECTORS, blocks=[("e", "d")]), ValueError, "the last follows from the first"),
        (lambda: linear_analysis(tiny(), VECTORS, blocks=["de"]), ValueError, "`blocks` must be pairs"),
        (lambda: linear_analysis(broken(tiny()), VECTORS), ValueError, 'layer "e" gives or reads NaN'),
        (lambda: linear_analysis(tiny(), VECTORS * np.nan), ValueError, 'layer "d" gives or reads NaN'),
        (lambda: linear_analysis(tiny(), X), ValueError, "`data` must have the shape"),
        (lambda: linear_analysis(tiny(), VECTORS, max_positions=0), ValueError, "`max_positions` must be a whole number"),
        (lambda: linear_analysis(tiny(), VECTORS, l2=-1), ValueError, "`l2` must be a number of at least 0"),
        (lambda: linear_analysis(tiny(), VECTORS, loss="mse"), ValueError, "`labels` must be given with `loss`"),
        (lambda: linear_analysis(tiny(), VECTORS, batch_size=0), ValueError, "`batch_size` must be a whole number"),
        (lambda: linear_analysis(tiny(), VECTORS, verbose=0).recommend(macs=0), ValueError, "`macs` must be above 0"),
        (
            lambda: linear_analysis(tiny(), VECTORS, verbose=0).recommend(tolerance=2),
            ValueError,
            r"`tolerance` must be in \[0, 1\]",
        ),
        (lambda: linear_analysis(tiny(), VECTORS, verbose=0)["f"], KeyError, 'No layer "f" in the report. Layers: d, e'),
    ],
)
def test_bad_input_is_named(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_moments_of_a_part_are_those_of_the_columns():
    whole = Moments.of(VECTORS)
    np.testing.assert_allclose(whole.part(slice(1, None)).scatter, Moments.of(VECTORS[:, 1:]).scatter)
