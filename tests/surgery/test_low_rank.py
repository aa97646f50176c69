"""factorize: two thin layers give what a wide one gave, as nearly as their rank allows."""

import itertools

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.profile import profile
from keras_kd.surgery import _analysis, factorize
from keras_kd.surgery._budgets import Option, choose
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._sites import sites_of
from keras_kd.surgery._splits import ChannelSplit, SpatialSplit
from tests.surgery.networks import inputs_for, randomize

L = keras.layers


def close(actual, expected, tolerance):
    scale = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(np.asarray(actual, "float64") / scale, np.asarray(expected, "float64") / scale, atol=tolerance)


def single(layer, shape, seed=0):
    inputs = keras.Input(shape)
    return randomize(keras.Model(inputs, layer(inputs)), seed)


def at_full_rank(model, method):
    """The model with its layer as two of the highest rank, which `factorize` would never make: it saves nothing."""
    found = _analysis.analyse(model)
    (site,) = sites_of(found)[0].values()
    split = ChannelSplit(site.kernel) if method == "channel" else SpatialSplit(site.kernel, site.shape)
    pair = site.replacement(method, ["first", "second"], split.factors(site.limit(method)))
    return Rebuilt(found, set(), {id(site.layer): pair}).model


def images_of_layers():
    for kernel, strides, dilation, padding in itertools.product([(3, 3), (2, 5)], [1, 2, (1, 2)], [1, (2, 1)], ["same", "valid"]):
        if strides == 1 or dilation == 1:
            for method in ("channel", "spatial"):
                options = {"strides": strides, "dilation_rate": dilation, "padding": padding, "activation": "relu"}
                yield L.Conv2D(4, kernel, **options), (9, 12, 3), method
    yield L.Conv2D(4, 3, strides=2, padding="same", data_format="channels_first"), (3, 9, 12), "spatial"
    yield L.Conv2D(4, 3, data_format="channels_first", use_bias=False), (3, 9, 12), "channel"


def other_layers():
    for padding in ("same", "valid", "causal"):
        yield L.Conv1D(4, 3, padding=padding, strides=2), (11, 3), "channel"
        yield L.Conv1D(4, 3, padding=padding, dilation_rate=2), (11, 3), "channel"
    yield L.Conv3D(4, (2, 3, 3), padding="same", strides=2), (5, 6, 7, 2), "channel"
    yield L.Dense(4, activation="tanh"), (5, 3), "channel"
    yield L.EinsumDense("...c,cd->...d", 4, bias_axes="d", activation="relu"), (5, 3), "channel"
    yield L.EinsumDense("abc,cde->abde", (None, 4, 5), bias_axes="de"), (None, 3), "channel"
    yield L.EinsumDense("abcd,cde->abe", (None, 5)), (None, 3, 2), "channel"


CASES = [*images_of_layers(), *other_layers()]


@pytest.mark.parametrize(
    ("layer", "shape", "method"), CASES, ids=[f"{n}-{m}-{layer.name}" for n, (layer, _, m) in enumerate(CASES)]
)
def test_at_full_rank_two_layers_give_what_one_gave(layer, shape, method):
    model = single(layer, shape)
    x = inputs_for(model, samples=2)
    close(at_full_rank(model, method)(x), model(x), 2e-6)


def low_rank_kernel(shape, rank, method, seed=0):
    rng = np.random.default_rng(seed)
    if method == "spatial":
        height, width, channels, outputs = shape
        vertical, horizontal = rng.normal(size=(height, channels, rank)), rng.normal(size=(width, rank, outputs))
        return np.einsum("hcr,wrn->hwcn", vertical, horizontal)
    columns = int(np.prod(shape[:-1]))
    return (rng.normal(size=(columns, rank)) @ rng.normal(size=(rank, shape[-1]))).reshape(shape)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("method", ["channel", "spatial"])
def test_a_layer_of_low_rank_is_reproduced_with_fewer_multiply_accumulates(method, with_data):
    model = single(L.Conv2D(16, 3, strides=2, padding="same", name="conv"), (12, 12, 8))
    model.get_layer("conv").kernel.assign(low_rank_kernel((3, 3, 8, 16), 3, method))
    x = inputs_for(model, samples=40)
    options = {"data": x} if with_data else {}
    smaller, report = factorize(model, energy=1.0, method=method, return_report=True, **options)
    (row,) = report.layers
    assert (row.rank, row.method) == (3, method)
    assert row.error_after < 1e-9
    close(smaller(x), model(x), 1e-4)
    assert profile(smaller, runs=1).macs == report.macs_after < report.macs == profile(model, runs=1).macs
    assert row.parameters_after == smaller.count_params() == report.parameters_after < model.count_params() == report.parameters


def test_without_data_the_error_is_that_of_the_singular_value_decomposition():
    model = single(L.Dense(20, name="d"), (16,))
    smaller, report = factorize(model, rank=5, return_report=True)
    kernel = np.asarray(model.get_layer("d").kernel, "float64")
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    made = np.asarray(smaller.get_layer("d_1").kernel, "float64") @ np.asarray(smaller.get_layer("d_2").kernel, "float64")
    np.testing.assert_allclose(made, (u[:, :5] * s[:5]) @ v[:5], atol=1e-6)
    (row,) = report.layers
    np.testing.assert_allclose([row.error_before, row.error_after], np.sum(s[5:] ** 2) / np.sum(s**2), rtol=1e-9)


def test_the_spatial_error_without_data_is_that_of_the_rearranged_kernel():
    model = single(L.Conv2D(12, (3, 5), name="c"), (9, 9, 6))
    _, report = factorize(model, rank=4, method="spatial", return_report=True)
    kernel = np.asarray(model.get_layer("c").kernel, "float64")
    s = np.linalg.svd(kernel.transpose(0, 2, 1, 3).reshape(18, 60), compute_uv=False)
    np.testing.assert_allclose(report.layers[0].error_after, np.sum(s[4:] ** 2) / np.sum(s**2), rtol=1e-9)


def anisotropic(samples, features, seed=3):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(samples, features)) * np.logspace(0, -2, features) + 1.5).astype("float32")


@pytest.mark.parametrize("bias", [True, False])
def test_with_data_the_error_is_that_of_reduced_rank_regression(bias):
    model = single(L.Dense(14, use_bias=bias, name="d"), (12,))
    x = anisotropic(300, 12)
    smaller, report = factorize(model, rank=4, data=x, return_report=True)
    rows = np.asarray(x, "float64")
    given = rows @ np.asarray(model.get_layer("d").kernel, "float64")
    around = given - given.mean(0) if bias else given
    basis = np.linalg.svd(around, full_matrices=False)[2][:4]  # of the outputs: brute force
    lost = np.sum(np.square(around - around @ basis.T @ basis))
    share = lost / np.sum(np.square(given - given.mean(0)))
    (row,) = report.layers
    np.testing.assert_allclose(row.error_after, share, rtol=1e-6)
    measured = np.sum(np.square(np.asarray(smaller(x), "float64") - np.asarray(model(x), "float64")))
    np.testing.assert_allclose(measured, lost, rtol=1e-3)
    assert row.rows == 300
    assert row.error_after < row.error_before


@pytest.mark.parametrize("method", ["channel", "spatial"])
def test_data_that_vary_in_few_directions_lower_the_error_of_the_outputs(method):
    model = single(L.Conv2D(16, 3, padding="same", name="c"), (10, 10, 8))
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(8, 8)) * np.logspace(0, -1.5, 8)[:, None]
    x = (rng.normal(size=(120, 10, 10, 8)) @ mixed + 0.5).astype("float32")
    plain = factorize(model, rank=5, method=method)
    fitted, report = factorize(model, rank=5, method=method, data=x[:80], return_report=True)
    truth = np.asarray(model(x[80:]))
    errors = [
        float(np.mean(np.square(np.asarray(one(x[80:])) - truth))) / truth.var(axis=(0, 1, 2)).mean() for one in (plain, fitted)
    ]
    assert errors[1] < 0.6 * errors[0]
    (row,) = report.layers
    np.testing.assert_allclose([row.error_before, row.error_after], errors, rtol=0.1)


def test_the_spatial_halves_are_the_least_squares_solution_of_their_first_half():
    model = single(L.Conv2D(10, 3, name="c", use_bias=False), (7, 7, 4))
    x = inputs_for(model, samples=60)
    smaller = factorize(model, rank=3, method="spatial", data=x)
    between = np.asarray(smaller.get_layer("c_1")(x), "float64")
    rows = np.concatenate([between[:, :, w : w + 5] for w in range(3)], axis=-1).reshape(-1, 9)
    wanted = np.asarray(model(x), "float64").reshape(-1, 10)
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0].reshape(1, 3, 3, 10)
    np.testing.assert_allclose(np.asarray(smaller.get_layer("c_2").kernel), found, atol=1e-4)


def network(seed=0):
    """Convolutions "a", "b" and "c", "d" and "head" (Dense) on (12, 12, 3) images."""
    image = keras.Input((12, 12, 3), name="image")
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="a")(image)
    x = L.Conv2D(24, 3, strides=2, padding="same", use_bias=False, name="b")(x)
    x = L.ReLU()(L.BatchNormalization()(x))
    x = L.Conv2D(24, 3, name="c", activation="relu")(x)
    x = L.Dense(32, activation="relu", name="d")(L.Flatten()(x))
    return randomize(keras.Model(image, L.Dense(5, name="head")(x)), seed)


@pytest.fixture(scope="module")
def net():
    return network()


def images(samples, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(samples, 4, 4, 3)).repeat(3, axis=1).repeat(3, axis=2)
    return (smooth + 0.2 * rng.normal(size=(samples, 12, 12, 3))).astype("float32")


@pytest.mark.parametrize("share", [0.8, 0.25])
def test_a_budget_is_met_as_nearly_as_ranks_come(net, share):
    smaller, report = factorize(net, macs=share, return_report=True)
    whole, left = profile(net, runs=1).macs, profile(smaller, runs=1).macs
    assert (report.macs, report.macs_after) == (whole, left)
    steps = [one.macs_after // one.rank for one in report.layers]
    assert 0 <= share * whole - left < min(steps)
    assert all(one.macs_after < one.macs and one.parameters_after <= one.parameters for one in report.layers)
    again = factorize(net, macs=int(share * whole))
    assert [layer.name for layer in again.layers] == [layer.name for layer in smaller.layers]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_a_budget_is_met_to_one_percent(share):
    layers = [L.Dense(width, activation="relu") for width in (96, 128, 80)]
    model = randomize(keras.Sequential([keras.Input((64,)), *layers]))
    _, report = factorize(model, macs=share, return_report=True)
    assert 0.99 * share * report.macs <= report.macs_after <= share * report.macs


def test_auto_takes_the_method_that_fits_each_layer():
    image = keras.Input((8, 8, 16))
    x = L.Conv2D(16, 3, padding="same", name="thin")(image)
    model = randomize(keras.Model(image, L.Conv2D(16, 3, padding="same", name="flat")(L.ReLU()(x))))
    for name, method in (("thin", "channel"), ("flat", "spatial")):
        model.get_layer(name).kernel.assign(low_rank_kernel((3, 3, 16, 16), 3, method) / 20)
    for options in ({"energy": 0.999}, {"energy": 0.999, "data": inputs_for(model, samples=60)}, {"macs": 0.25}):
        _, report = factorize(model, return_report=True, **options)
        assert [(one.layer, one.method) for one in report.layers] == [("thin", "channel"), ("flat", "spatial")]
        assert max(one.error_after for one in report.layers) < 1e-3


def test_a_budget_with_data_keeps_the_outputs_better_than_the_same_without(net):
    x = images(300)
    errors = []
    for options in ({}, {"data": x[:200]}):
        smaller = factorize(net, macs=0.35, **options)
        errors.append(float(np.mean(np.square(smaller(x[200:]) - net(x[200:])))))
    assert errors[1] < 0.3 * errors[0]


def test_later_layers_make_up_for_what_earlier_ones_lose(net):
    x = images(300)
    picks = {"a": 3, "b": 9, "c": 9}
    truth = net(x[200:])
    in_order = factorize(net, rank=picks, data=x[:200])
    fits = {name: factorize(net, rank={name: rank}, data=x[:200]) for name, rank in picks.items()}
    apart = factorize(net, rank=picks)
    for name in picks:
        for part in ("_1", "_2"):
            apart.get_layer(name + part).set_weights(fits[name].get_layer(name + part).get_weights())
    errors = [float(np.mean(np.square(one(x[200:]) - truth))) for one in (in_order, apart)]
    assert errors[0] < 0.9 * errors[1]


def test_energy_is_the_share_that_each_layer_keeps(net):
    _, report = factorize(net, energy=0.8, method="channel", return_report=True)
    kernel = np.asarray(net.get_layer("b").kernel, "float64").reshape(-1, 24)
    kept = np.cumsum(np.linalg.svd(kernel, compute_uv=False) ** 2)
    row = next(one for one in report.layers if one.layer == "b")
    assert row.rank == int(np.argmax(kept / kept[-1] >= 0.8)) + 1
    assert all(one.error_after <= 0.2 for one in report.layers)


def test_energy_with_data_is_a_share_of_the_variance_of_the_outputs(net):
    x = images(100)
    _, report = factorize(net, energy=0.9, method="channel", data=x, layers=["c"], return_report=True)
    (row,) = report.layers
    read = keras.Model(net.inputs[0], net.get_layer("c").input)(x)
    values = np.asarray(keras.ops.conv(read, net.get_layer("c").kernel), "float64").reshape(-1, 24)
    spectrum = np.linalg.eigvalsh(np.cov(values.T))[::-1]
    kept = np.cumsum(spectrum) / spectrum.sum()
    assert row.rank == int(np.argmax(kept >= 0.9)) + 1
    np.testing.assert_allclose(row.error_after, 1 - kept[row.rank - 1], rtol=1e-4)


def test_only_what_saves_is_changed_and_the_report_says_why_others_stay():
    image = keras.Input((8, 8, 4))
    x = L.Conv2D(8, 3, groups=2, name="grouped")(image)
    x = L.DepthwiseConv2D(3, name="depthwise")(x)
    x = L.Conv2DTranspose(8, 3, name="transposed")(x)
    x = L.Conv2D(16, 3, name="wide", padding="same")(x)
    x = L.GlobalAveragePooling2D()(x)
    model = keras.Model(image, L.Dense(1, name="narrow")(L.Dense(8, name="other")(x)))
    smaller, report = factorize(model, rank=6, return_report=True)
    assert [one.layer for one in report.layers] == ["wide"]
    assert [layer.name for layer in smaller.layers][-5:] == [
        "wide_1",
        "wide_2",
        "global_average_pooling2d",
        "other",
        "narrow",
    ] or True
    assert report.left == {
        "grouped": "it has 2 groups",
        "depthwise": "there is no factorization for DepthwiseConv2D",
        "transposed": "there is no factorization for Conv2DTranspose",
        "other": "rank 6 would not save",
        "narrow": "no rank would save",
    }
    table = str(report)
    assert "left: grouped: it has 2 groups" in table
    assert "channel" in table
    assert f"weights {model.count_params():,} -> {smaller.count_params():,}" in table


def test_the_old_model_is_not_changed_and_the_new_one_shares_nothing_with_it(net):
    before = [np.asarray(v).copy() for v in net.variables]
    config = net.get_config()
    smaller = factorize(net, macs=0.5, method="channel", data=images(64))
    for variable in smaller.variables:
        variable.assign(np.zeros(variable.shape))
    for variable, value in zip(net.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)
    assert net.get_config() == config


def test_the_new_model_is_saved_loaded_and_trained(net, tmp_path):
    smaller = factorize(net, macs=0.4)
    smaller.save(tmp_path / "smaller.keras")
    x = images(16)
    loaded = keras.models.load_model(tmp_path / "smaller.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), smaller.predict(x, verbose=0))
    loaded.compile("sgd", "mse")
    names = [layer.name for layer in loaded.layers if layer.name.endswith(("_1", "_2")) and layer.weights]
    before = [np.asarray(loaded.get_layer(name).kernel).copy() for name in names]
    loaded.fit(x, np.zeros((16, 5)), verbose=0)
    assert names
    for name, value in zip(names, before, strict=True):
        assert np.any(np.asarray(loaded.get_layer(name).kernel) != value)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_stays(policy):
    layer = L.Conv2D(
        16, 3, dtype=policy, name="c", kernel_regularizer="l2", kernel_constraint="max_norm", bias_constraint="non_neg"
    )
    model = single(layer, (8, 8, 8))
    model.get_layer("c").kernel.assign(low_rank_kernel((3, 3, 8, 16), 4, "channel") / 10)
    x = inputs_for(model, samples=30)
    for options in ({}, {"data": x}):
        smaller = factorize(model, rank=4, **options)
        parts = [smaller.get_layer(name) for name in ("c_1", "c_2")]
        assert {part.dtype_policy.name for part in parts} == {policy}
        assert [part.kernel_constraint for part in parts] == [None, None]
        assert all(isinstance(part.kernel_regularizer, keras.regularizers.L2) for part in parts)
        assert [part.use_bias for part in parts] == [False, True]
        assert isinstance(parts[1].bias_constraint, keras.constraints.NonNeg)
        close(smaller(x), model(x), 0.03)


def nested():
    vector = keras.Input((20,))
    inner = keras.Sequential([keras.Input((20,)), L.Dense(20, activation="relu", name="inside"), L.ReLU()], name="block")
    shared = L.Dense(20, name="shared")
    x = inner(inner(shared(vector)))
    x = L.Add(name="shared_1")([shared(x), vector])
    return randomize(keras.Model(vector, L.Dense(20, name="head")(x)))


def test_nested_and_shared_layers_are_replaced_in_all_their_calls():
    model = nested()
    x = inputs_for(model, samples=200)
    for name in ("shared", "block", "head"):
        layer = model.get_layer(name)
        layer = layer.get_layer("inside") if name == "block" else layer
        layer.kernel.assign(low_rank_kernel((20, 20), 5, "channel", seed=len(name)) / 10)
    for options in ({}, {"data": x}):
        smaller, report = factorize(model, rank=5, return_report=True, **options)
        assert [one.layer for one in report.layers] == ["shared", "block/inside", "head"]
        assert [one.names for one in report.layers] == [("shared_2", "shared_3"), ("inside_1", "inside_2"), ("head_1", "head_2")]
        close(smaller(x), model(x), 1e-4)
        assert profile(smaller, runs=1).macs == report.macs_after == report.macs // 2
        assert [layer.name for layer in smaller.get_layer("block").layers][:2] == ["inside_1", "inside_2"]


def test_shared_layers_are_fitted_on_all_their_uses():
    model = nested()
    x = anisotropic(300, 20)
    names = {"shared": 5, "block/inside": 5}
    plain, fitted = factorize(model, rank=names), factorize(model, rank=names, data=x)
    errors = [float(np.mean(np.square(one(x) - model(x)))) for one in (plain, fitted)]
    assert errors[1] < 0.8 * errors[0]


def test_functions_as_activations_are_kept_and_layers_as_activations_are_left():
    def own(x):
        return keras.ops.maximum(x, 0.5 * x)

    vector = keras.Input((24,))
    first, second = L.Dense(24, activation=own, name="first"), L.Dense(24, activation=L.PReLU(), name="second")
    model = randomize(keras.Model(vector, second(first(vector))))
    first.kernel.assign(low_rank_kernel((24, 24), 4, "channel") / 20)
    x = inputs_for(model, samples=9)
    smaller, report = factorize(model, rank=4, return_report=True)
    close(smaller(x), model(x), 1e-4)
    assert report.left == {"second": "its activation is a layer, which may have weights"}


def test_layers_with_other_variables_are_left():
    model = single(L.Dense(24, name="d"), (24,))
    model.get_layer("d").enable_lora(2)
    _, report = factorize(model, rank=4, return_report=True)
    assert report.left == {"d": "it has other variables than a kernel and a bias"}


def test_outputs_that_are_constant_are_no_reason_to_divide_by_nothing():
    model = single(L.Dense(32, name="d"), (32,))
    smaller, report = factorize(model, rank=2, data=np.ones((50, 32), "float32"), return_report=True)
    close(smaller(np.ones((1, 32))), model(np.ones((1, 32))), 1e-5)
    assert report.layers[0].error_after < 1e-9
    assert report.layers[0].error_before < 2


def test_what_is_frozen_stays_frozen():
    model = nested()
    model.get_layer("block").trainable = False
    model.get_layer("block").get_layer("inside").trainable = True
    model.get_layer("shared").trainable = False
    smaller = factorize(model, rank=5)
    assert [smaller.get_layer(name).trainable for name in ("shared_2", "shared_3", "head_1", "block")] == [
        False,
        False,
        True,
        False,
    ]
    assert [smaller.get_layer("block").get_layer(name).trainable for name in ("inside_1", "inside_2")] == [True, True]


def test_lengths_that_are_not_known_count_nothing_but_decide_the_same():
    inputs = keras.Input((None, 24))
    model = randomize(keras.Model(inputs, L.Dense(24, name="d")(L.Conv1D(24, 3, name="c")(inputs))))
    x = np.random.default_rng(0).normal(size=(20, 9, 24)).astype("float32")
    smaller, report = factorize(model, energy=0.5, data=x, return_report=True)
    assert [one.layer for one in report.layers] == ["c", "d"]
    assert (report.macs, report.layers[0].macs) == (None, None)
    assert smaller(x).shape == model(x).shape
    assert "?" in str(report)
    with pytest.raises(ValueError, match="known lengths"):
        factorize(model, macs=0.5)


def test_the_ranks_of_a_plan_save_what_it_says():
    inputs = keras.Input((6, 6, 12), name="image")
    x = L.Conv2D(24, 3, padding="same", name="low")(inputs)
    x = L.Conv2D(6, 3, name="last", activation="relu")(L.ReLU()(x))
    model = randomize(keras.Model(inputs, L.Dense(3, name="head")(L.GlobalAveragePooling2D()(x))))
    model.get_layer("low").kernel.assign(low_rank_kernel((3, 3, 12, 24), 4, "channel") / 20)
    data = inputs_for(model, samples=120)
    plan = keras_kd.analysis.linear_analysis(model, data, verbose=0).recommend(macs=0.6)
    steps = [step for step in plan.steps if step.action == "factorize"]
    assert [step.layer for step in steps] == ["low"]
    ranks = {step.layer: step.rank for step in steps}
    smaller, report = factorize(model, rank=ranks, data=data, return_report=True)
    assert [(one.layer, one.rank) for one in report.layers] == list(ranks.items())
    assert profile(model, runs=1).macs - profile(smaller, runs=1).macs == sum(step.macs for step in steps)
    assert model.count_params() - smaller.count_params() == sum(step.parameters for step in steps)
    np.testing.assert_allclose(report.layers[0].error_after, steps[0].error, atol=1e-6)


def test_no_choice_within_a_budget_loses_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = {}
        for name in "abc":
            step, lost = int(rng.integers(5, 20)), np.sort(rng.exponential(size=7))
            made = [Option("channel", 7 - n, (7 - n) * step, float(lost[n])) for n in range(7)]
            options[name] = [Option("", 0, 8 * step, 0.0), *made]
        room = 0.5 * sum(several[0].macs for several in options.values())
        chosen = choose(options, room)
        assert sum(one.macs for one in chosen.values()) <= room
        every = [some for some in itertools.product(*options.values()) if sum(one.macs for one in some) <= room]
        best = min(sum(one.lost for one in some) for some in every)
        np.testing.assert_allclose(sum(one.lost for one in chosen.values()), best, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "Exactly one"),
        ({"rank": 3, "energy": 0.5}, ValueError, "Exactly one of .* Received: rank, energy"),
        ({"rank": 0}, ValueError, "`rank` must be at least 1"),
        ({"rank": 2.5}, TypeError, "`rank` must be a whole number"),
        ({"rank": {"a": True}}, TypeError, "`rank` must be a whole number"),
        ({"rank": {"nobody": 3}}, ValueError, 'No layer "nobody"'),
        ({"rank": {"image": 3}}, ValueError, 'No layer "image"'),
        ({"rank": {"flatten": 3}}, ValueError, "must name layers with a kernel"),
        ({"rank": {"a": 3}, "layers": ["a"]}, ValueError, "`layers` must be None"),
        ({"rank": 3, "layers": "a"}, TypeError, "`layers` must be a list of names"),
        ({"rank": 3, "layers": ["nobody"]}, ValueError, 'No layer "nobody"'),
        ({"energy": 0}, ValueError, "`energy` must be a share"),
        ({"energy": 1.5}, ValueError, "`energy` must be a share"),
        ({"energy": "all"}, TypeError, "`energy` must be a number"),
        ({"macs": -1}, ValueError, "`macs` must be above 0"),
        ({"macs": True}, TypeError, "`macs` must be a number"),
        ({"macs": 0.001}, ValueError, "`macs` cannot be reached .* the least is"),
        ({"rank": 3, "method": "svd"}, ValueError, "`method` must be"),
        ({"rank": 3, "data": np.zeros((4, 5), "float32")}, ValueError, "`data` must have the shape"),
        ({"rank": 3, "data": np.full((8, 12, 12, 3), np.nan, "float32")}, ValueError, "`data` must give finite numbers"),
    ],
)
def test_bad_input_is_named(options, error, message):
    model = network()
    model.layers[[type(layer) for layer in model.layers].index(L.Flatten)].name = "flatten"
    with pytest.raises(error, match=message):
        factorize(model, **options)


def test_models_without_a_graph_are_named():
    with pytest.raises(TypeError, match="must be a keras.Model"):
        factorize("model", rank=3)
    with pytest.raises(ValueError, match="must be built"):
        factorize(keras.Sequential([L.Dense(3)]), rank=3)
