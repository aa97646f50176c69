"""prune_channels: budgets that hold, costs that are true, and the channels that matter least."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import optimize

import keras_kd
from keras_kd.surgery import _analysis, _costs, _criteria, _curvature, _gates
from keras_kd.surgery._allocation import Allocation, Limits
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery.graph import groups_of
from tests.surgery import networks

L = keras.layers
prune = keras_kd.surgery.prune_channels


def macs_of(model):
    return sum(row.macs or 0 for row in _costs.count_macs(model))


def images(samples=64, size=12, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, size, size, 3)).astype("float32")


def network(activation=None):
    """Three convolutions, two of them tied, and a head, with random weights and statistics."""
    image = keras.Input((12, 12, 3))
    x = L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(12, 3, padding="same", use_bias=False, name="a")(image)))
    y = L.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="b")(x)
    z = L.Conv2D(16, 1, name="c")(y)
    x = L.GlobalAveragePooling2D()(L.ReLU()(L.Add()([y, z])))
    return networks.randomize(keras.Model(image, L.Dense(4, activation=activation, name="head")(x)))


# Elimination


def brute_force(precision, metric):
    """Order and costs by computing every candidate's errors from scratch."""
    covariance = [np.linalg.inv(one) for one in precision]
    n, gone, costs = len(covariance[0]), [], []

    def cost(removed):
        total = 0.0
        kept = [i for i in range(n) if i not in removed]
        for c, m in zip(covariance, metric, strict=True):
            across = c[np.ix_(removed, kept)]
            inner = np.linalg.inv(c[np.ix_(kept, kept)]) if kept else np.zeros((0, 0))
            errors = c[np.ix_(removed, removed)] - across @ inner @ across.T
            total += np.trace(m[np.ix_(removed, removed)] @ errors)
        return total

    while len(gone) < n:
        best = min((i for i in range(n) if i not in gone), key=lambda i: cost([*gone, i]))
        gone.append(best)
        costs.append(cost(gone))
    return gone, costs


def random_moments(n, points, seed=0):
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=(2, n, n + 2)) for _ in range(points)]
    return np.stack([np.linalg.inv(a @ a.T) for a, _ in made]), np.stack([b @ b.T for _, b in made])


@pytest.mark.parametrize("points", [1, 3])
def test_the_channel_goes_that_costs_least_with_those_that_have_gone(points):
    precision, metric = random_moments(7, points)
    order, costs = _curvature.eliminate(precision, metric)
    expected, values = brute_force(precision, metric)
    assert order.tolist() == expected
    np.testing.assert_allclose(costs, values, rtol=1e-8)


def test_many_channels_go_several_at_a_time_and_costs_never_fall():
    precision, metric = random_moments(600, 1)
    order, costs = _curvature.eliminate(precision, metric)
    assert sorted(order.tolist()) == list(range(600))
    assert np.all(np.diff(costs) >= -1e-6 * costs[-1])
    np.testing.assert_allclose(costs[-1], np.trace(metric[0] @ np.linalg.inv(precision[0])), rtol=1e-6)


def test_moments_are_those_of_values_and_gradients_where_channels_are_read():
    model, x = network(), tf.constant(images(8))
    found = _analysis.analyse(model)
    points = _curvature.read_points(found)
    pairs = _curvature.gradients(found, points, [x], lambda outputs: tf.reduce_sum(outputs[0][:, 1]))
    inner = keras.Model(model.input, model.get_layer("head").input)
    value = inner(x, training=False)
    kernel = np.asarray(model.get_layer("head").kernel)
    last = next((p, v, g) for p, v, g in pairs if v.shape[1:] == (1, 16))
    np.testing.assert_allclose(last[1][:, 0], value, atol=1e-5)
    np.testing.assert_allclose(last[2][:, 0], np.tile(kernel[:, 1], (8, 1)), atol=1e-6)


def test_channels_that_are_dead_or_combinations_of_others_go_first_and_cost_nothing():
    inputs = keras.Input((6,))
    hidden = L.Dense(8, name="hidden")(inputs)
    model = networks.randomize(keras.Model(inputs, L.Dense(3)(hidden)))
    kernel, bias = (np.asarray(w).copy() for w in model.get_layer("hidden").weights)
    kernel[:, 2], bias[2] = kernel[:, 0] - 2 * kernel[:, 1], 0.5
    kernel[:, 5], bias[5] = 0, 0
    model.get_layer("hidden").set_weights([kernel, bias])
    found = _analysis.analyse(model)
    x = np.random.default_rng(0).normal(size=(256, 6)).astype("float32")
    (_, roots), *_ = groups_of(found)
    order, costs = _curvature.Curvature(found, [[tf.constant(x)]], len(x)).order(roots)
    # six inputs: two of the eight channels need not be there
    assert 5 in order[:3].tolist()
    assert costs[1] < 0.05 * costs[3]  # not 0: the covariance gets a ridge of a thousandth


# Costs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_costs_are_those_of_models_that_are_really_rebuilt(seed):
    model = networks.random_network(seed)
    found = _analysis.analyse(model)
    groups = groups_of(found)
    costs = _costs.Costs(found, groups)
    assert costs.of([len(roots) for _, roots in groups]) == (macs_of(model), model.count_params())
    rng = np.random.default_rng(seed)
    kept = [int(rng.integers(1, len(roots) + 1)) for _, roots in groups]
    gone = {root for (_, roots), count in zip(groups, kept, strict=True) for root in roots[count:].tolist()}
    rebuilt = Rebuilt(found, gone).model
    macs, parameters = costs.of(kept)
    assert parameters == rebuilt.count_params()
    assert macs == pytest.approx(macs_of(rebuilt), rel=0.02)  # products of attention are taken as proportional to its kernels


class _Products:
    """Costs of two groups, the product and the sum of what they keep."""

    macs, parameters, neighbours = 400, 40, [{0, 1}, {0, 1}]

    def of(self, kept):
        return float(kept[0] * kept[1]), float(sum(kept))

    def saving(self, kept, group, count):
        after = [count if index == group else one for index, one in enumerate(kept)]
        return tuple(b - a for b, a in zip(self.of(kept), self.of(after), strict=True))


def test_the_allocation_is_near_the_best_one_and_uses_the_budget():
    curves = [np.arange(1, 21) ** 2 / 30, np.arange(1, 21) ** 3 / 500]
    made = Allocation(_Products(), [20, 20], curves, Limits(180.0, None), [1, 1])
    assert made.greedy()
    lost = [0.0, *curves[0]], [0.0, *curves[1]]
    best = min(lost[0][20 - a] + lost[1][20 - b] for a, b in itertools.product(range(1, 21), repeat=2) if a * b <= 180)
    found = lost[0][20 - made.kept[0]] + lost[1][20 - made.kept[1]]
    assert 0.99 * 180 <= made.now[0] <= 180
    assert found <= 1.05 * best


def test_the_same_share_of_each_group_goes_by_layer():
    made = Allocation(_Products(), [20, 20], [np.ones(20)] * 2, Limits(100.0, None), [1, 1])
    assert made.even()
    assert made.kept == [10, 10]


def test_a_budget_below_the_smallest_model_is_not_met():
    made = Allocation(_Products(), [20, 20], [np.ones(20)] * 2, Limits(5.0, None), [3, 3])
    assert not made.greedy()
    assert made.smallest() == (9.0, 6.0)


# Criteria


def test_magnitude_is_the_norm_of_all_kernels_that_make_a_channel():
    model = network()
    found = _analysis.analyse(model)
    groups = groups_of(found)
    scores = _criteria.magnitudes(found, groups)
    kernels = [np.asarray(model.get_layer(name).kernel, "float64") for name in "bc"]
    index = next(i for i, (group, _) in enumerate(groups) if set(group.makers) == {"b", "c"})
    norms = np.sqrt(sum(np.square(kernel).sum((0, 1, 2)) for kernel in kernels))
    np.testing.assert_allclose(scores[index], norms / norms.mean(), rtol=1e-9)


def test_batch_norm_is_its_scale_and_groups_without_one_count_as_average():
    model = network()
    found = _analysis.analyse(model)
    groups = groups_of(found)
    scores = _criteria.scales(found, groups)
    gamma = np.abs(np.asarray(model.get_layer("norm").gamma, "float64"))
    by_maker = {group.makers[0]: score for (group, _), score in zip(groups, scores, strict=True)}
    np.testing.assert_allclose(by_maker["a"], gamma / gamma.mean(), rtol=1e-6)
    np.testing.assert_array_equal(by_maker["b"], np.ones(16))


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_first_order_scores_are_products_of_value_and_gradient_sample_by_sample(kind):
    model, x, y = network(), images(6), np.arange(6) % 4
    found = _analysis.analyse(model)
    groups = groups_of(found)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    batches = [[tf.constant(x[:4])], [tf.constant(x[4:])]]
    losses = [lambda outputs, y=part: loss(y, outputs[0]) for part in (y[:4], y[4:])]
    scores = _criteria.first_order(found, groups, batches, losses, kind)
    index = next(i for i, (group, _) in enumerate(groups) if group.makers == ("a",))
    rest = keras.Model(model.get_layer("b").input, model.output)
    front = keras.Model(model.input, model.get_layer("b").input)
    changes = []
    for one, label in zip(x, y, strict=True):
        value = tf.convert_to_tensor(front(one[None], training=False))
        with tf.GradientTape() as tape:
            tape.watch(value)
            total = loss(np.asarray([label]), rest(value, training=False))
        changes.append(np.sum(np.asarray(value * tape.gradient(total, value)), (0, 1, 2)))
    changes = np.asarray(changes)
    expected = np.abs(changes).mean(0) if kind == "taylor" else np.square(changes).mean(0) / 2
    np.testing.assert_allclose(scores[index], expected, rtol=2e-3, atol=1e-6)


# Fits through a ReLU


def test_a_fit_through_a_relu_finds_the_least_of_what_is_seen(monkeypatch):
    monkeypatch.setattr(_gates, "_STEPS", 60)
    rng = np.random.default_rng(0)
    read = rng.normal(size=(4000, 5)).astype("float32")
    wanted = (read @ rng.normal(size=(5, 3)) + 0.7 * rng.normal(size=(4000, 3)) ** 3 - 1.0).astype("float32")
    gate = _gates.Gate(np.asarray([1.0, -0.5, 2.0]), np.asarray([0.0, 0.2, -0.1]), np.inf)
    start = np.linalg.lstsq(np.concatenate([read, np.ones((4000, 1))], 1), wanted, rcond=None)[0]

    def loss(weights, output):
        aim, seen = (z * gate.scale[output] + gate.offset[output] for z in (wanted[:, output], read @ weights[:-1] + weights[-1]))
        return np.square(np.where(aim > 0, aim - seen, np.maximum(seen, 0))).sum()

    kernel, bias = _gates.through_gate(gate, (read, wanted), (start[:-1], start[-1]), (np.zeros((5, 3)), np.zeros(3)), 1e-9, True)
    for output in range(3):
        best = optimize.minimize(loss, start[:, output], (output,), method="Powell", options={"xtol": 1e-7, "ftol": 1e-10}).fun
        assert loss(np.append(kernel[:, output], bias[output]), output) == pytest.approx(best, rel=1e-4)
        assert best < 0.97 * loss(start[:, output], output)


def test_what_a_relu_hides_is_no_error():
    gate = _gates.Gate(np.ones(1), np.zeros(1), 6.0)
    wanted, now = np.asarray([[-2.0], [-2.0], [3.0], [9.0], [9.0]]), np.asarray([[-5.0], [1.0], [-1.0], [7.0], [4.0]])
    np.testing.assert_array_equal(gate.missing(wanted, now).ravel(), [0, -1, 4, 0, 2])


# The whole


@pytest.mark.parametrize(
    "options",
    [
        {"macs": 0.5},
        {"parameters": 0.6, "scope": "layer"},
        {"macs": 0.6, "parameters": 0.7, "criterion": "fisher"},
        {"macs": 0.5, "criterion": "magnitude", "reconstruct": False},
        {"macs": 0.7, "round_to": 4, "criterion": "taylor"},
        {"macs": 0.7, "criterion": "batch_norm", "min_channels": 5},
        {"parameters": 0.8, "criterion": lambda model, group: np.arange(group.channels)},
    ],
    ids=["macs", "by layer", "both budgets", "magnitude", "multiples of 4", "at least 5", "own criterion"],
)
def test_budgets_hold_and_the_original_stays(options):
    model, x = network(), images()
    before = [np.asarray(v).copy() for v in model.variables]
    smaller, report = prune(model, data=x, verbose=0, return_report=True, **options)
    got = {"macs": macs_of(smaller) / macs_of(model), "parameters": smaller.count_params() / model.count_params()}
    limits = {name: options[name] for name in got if name in options}
    assert all(got[name] <= limit for name, limit in limits.items())
    assert report.note or any(got[name] >= 0.99 * limit for name, limit in limits.items())
    assert (report.macs_after, report.parameters_after) == (macs_of(smaller), smaller.count_params())
    widths = [smaller.get_layer(name).filters for name in "abc"]
    whole = [12, 16, 16]
    step, least = options.get("round_to", 1), options.get("min_channels", 1)
    assert all(width >= least and (width % step == 0 or width == most) for width, most in zip(widths, whole, strict=True))
    assert str(report).count("MACs") == 1
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), value)


@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
def test_two_calls_give_the_same_model(activation):
    model, x = network(activation), images()
    first, second = (prune(model, macs=0.6, data=tf.data.Dataset.from_tensor_slices(x).batch(16), verbose=0) for _ in range(2))
    np.testing.assert_array_equal(first(x), second(x))


@pytest.mark.parametrize("labels", [np.arange(64) % 4, np.eye(4, dtype="float32")[np.arange(64) % 4]], ids=["classes", "rows"])
def test_labels_make_the_gradients_those_of_the_loss(labels):
    model, x = network("softmax"), images()
    smaller = prune(model, macs=0.6, data=x, labels=labels, criterion="fisher", verbose=0)
    assert smaller.count_params() < model.count_params()


def test_labels_of_several_outputs_are_nested_as_these_are():
    inputs = keras.Input((4,))
    x = L.Dense(8, activation="relu")(inputs)
    model = networks.randomize(keras.Model(inputs, {"kind": L.Dense(3)(x), "size": L.Dense(2)(x)}))
    data = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    labels = {"kind": np.arange(32) % 3, "size": data[:, :2]}

    def loss(y, given):
        kinds = keras.losses.sparse_categorical_crossentropy(y["kind"], given["kind"], from_logits=True)
        return kinds + keras.ops.mean((y["size"] - given["size"]) ** 2, -1)

    smaller = prune(model, macs=0.5, data=data, labels=labels, criterion="fisher", loss=loss, verbose=0)
    assert smaller.count_params() < model.count_params()


@pytest.mark.parametrize("seed", [3, 4, *[pytest.param(seed, marks=pytest.mark.thorough) for seed in range(5, 15)]])
def test_random_networks_lose_a_fifth_of_their_weights(seed, tmp_path):
    model = networks.random_network(seed)
    x = networks.inputs_for(model)
    smaller = prune(model, parameters=0.8, data=x, verbose=0)
    assert smaller.count_params() <= 0.8 * model.count_params()
    smaller.save(tmp_path / "smaller.keras")
    again = keras.models.load_model(tmp_path / "smaller.keras", safe_mode=False)
    for a, b in zip(keras.tree.flatten(again(x)), keras.tree.flatten(smaller(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_on_a_trained_network_refitted_channels_lose_least():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target
    keras.utils.set_random_seed(0)
    layers = []
    for width in (16, 24, 24):
        layers += [L.Conv2D(width, 3, padding="same", use_bias=False), L.BatchNormalization(momentum=0.9), L.ReLU()]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers, L.GlobalAveragePooling2D(), L.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(x[:1300], y[:1300], epochs=12, batch_size=64, verbose=0)

    def accuracy(one):
        return float(np.mean(np.argmax(one.predict(x[1300:], verbose=0), -1) == y[1300:]))

    ways = {
        "ours": {},
        "not refitted": {"reconstruct": False},
        "magnitude": {"criterion": "magnitude", "reconstruct": False},
    }
    found = {name: accuracy(prune(model, macs=0.5, data=x[:500], verbose=0, **options)) for name, options in ways.items()}
    assert accuracy(model) > 0.93
    assert found["ours"] > accuracy(model) - 0.06
    assert found["ours"] > max(found["not refitted"], found["magnitude"]) + 0.1


@pytest.mark.thorough
def test_a_file_of_a_faster_model_takes_at_most_the_wanted_time():
    image = keras.Input((32, 32, 16))
    x = L.Conv2D(64, 3, activation="relu")(image)
    model = keras.Model(image, L.GlobalAveragePooling2D()(L.Conv2D(64, 3, activation="relu", name="b")(L.Conv2D(64, 3)(x))))
    _, report = prune(model, latency=0.6, criterion="magnitude", return_report=True, verbose=0)
    assert 0.2 < report.macs_after / report.macs < 0.75  # about proportional; the time itself was measured, on a busy machine


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "A budget must be given"),
        ({"macs": 0}, "`macs` must be above 0"),
        ({"macs": "half"}, "`macs` must be a number"),
        ({"macs": True}, "`macs` must be a number"),
        ({"latency": 3.0}, "`latency` must be a share"),
        ({"macs": 0.5, "criterion": "l1"}, "`criterion` must be one of redundancy"),
        ({"macs": 0.5, "scope": "all"}, "`scope` must be"),
        ({"macs": 0.5, "round_to": 0}, "`round_to` must be a whole number"),
        ({"macs": 0.5, "min_channels": 1.5}, "`min_channels` must be a whole number"),
        ({"macs": 0.5, "data": None}, "`data` must be given"),
        ({"macs": 0.5, "data": images(4, 10)}, "`data` must have the shape"),
        ({"macs": 0.5, "data": np.full((4, 12, 12, 3), np.nan, "float32")}, "`data` must be finite"),
        ({"macs": 0.5, "labels": np.zeros(3, int), "criterion": "fisher"}, "`labels` must hold one entry"),
        ({"macs": 0.5, "criterion": "fisher", "loss": "mse"}, "`labels` must be given"),
        ({"macs": 0.5, "criterion": lambda model, group: [1.0]}, "`criterion` must give a finite number"),
        ({"macs": 0.5, "criterion": lambda model, group: ["high"] * group.channels}, "`criterion` must give a finite number"),
        ({"macs": 0.5, "criterion": lambda model, group: [[1], [1, 2]]}, "`criterion` must give a finite number"),
        ({"macs": 0.001}, r"the smallest is macs=[\d,]+ \("),
        ({"macs": 0.5, "round_to": 32}, r"Received: macs=[\d,]+, round_to=32\."),
    ],
    ids=range(19),
)
def test_bad_input_is_refused_by_name(options, told):
    model = network()
    with pytest.raises((ValueError, TypeError), match=told):
        prune(model, **{"data": images(8), "verbose": 0} | options)


@pytest.mark.parametrize("criterion", ["redundancy", "taylor"])
def test_outputs_without_gradients_are_refused(criterion):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.argmax(L.Dense(3)(L.Dense(8)(inputs)), -1))
    with pytest.raises(ValueError, match=r"outputs must change smoothly.*magnitude"):
        prune(model, macs=0.5, data=np.ones((4, 4), "float32"), criterion=criterion, verbose=0)


def test_a_network_with_states_is_refused():
    inputs = keras.Input(batch_shape=(2, 3, 4))
    model = keras.Model(inputs, L.Dense(2)(L.LSTM(4, stateful=True, name="memory")(inputs)))
    with pytest.raises(ValueError, match="the stateful layers memory"):
        prune(model, macs=0.5, criterion="magnitude", verbose=0)


def test_inputs_of_other_names_are_refused_and_known_ones_may_come_in_any_order():
    image, words = keras.Input((4,), name="image"), keras.Input((4,), name="words")
    model = networks.randomize(keras.Model([words, image], L.Dense(2)(L.Concatenate()([L.Dense(6)(words), L.Dense(6)(image)]))))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 64, 4)).astype("float32")
    with pytest.raises(ValueError, match="must have the names.*image, words. Received: images, words"):
        prune(model, macs=0.5, data={"images": x, "words": y}, verbose=0)
    by_name, in_order = (prune(model, macs=0.5, data=data, verbose=0) for data in ({"image": x, "words": y}, [y, x]))
    for one, other in zip(by_name.weights, in_order.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_single_sample_of_a_single_output_gives_costs_of_its_own_size():
    inputs = keras.Input((4,))
    model = networks.randomize(keras.Model(inputs, L.Dense(1)(L.Dense(8, activation="relu")(inputs))))
    _, report = prune(model, macs=np.float32(0.5), round_to=np.int64(1), data=np.ones((1, 4)), verbose=0, return_report=True)
    assert 0 <= report.cost < 1e3


def test_what_two_layers_read_of_one_tensor_counts_for_both_with_one_covariance():
    inputs = keras.Input((5,))
    x = L.Dense(6, name="a")(inputs)
    model = networks.randomize(keras.Model(inputs, L.Concatenate()([L.Dense(2, name="b")(x), L.Dense(3, name="c")(x)])))
    found = _analysis.analyse(model)
    (_, roots), *_ = groups_of(found)
    data = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    curvature = _curvature.Curvature(found, [[tf.constant(data)]], len(data))
    (point,) = curvature.points
    # outputs in units of their spread: E (g' d)^2 for signs at random is the sum of the squares of what each output changes by
    outputs = np.asarray(model(data))
    kernels = [np.asarray(model.get_layer(name).kernel, "float64") for name in "bc"]
    expected = sum(kernel @ kernel.T for kernel in kernels) / np.var(outputs) / 5
    (order, costs), *_ = curvature.orders([roots])
    assert costs[-1] == pytest.approx(np.trace(expected @ np.cov(np.asarray(model.get_layer("a")(data)).T, bias=True)), rel=0.1)
    assert sorted(order.tolist()) == list(range(6))
    assert point.roots.tolist() == roots.tolist()


def test_what_is_read_for_the_last_time_is_forgotten_and_orders_are_those_of_one_by_one():
    model, x = network(), tf.constant(images(16))
    found = _analysis.analyse(model)
    several = [roots for _, roots in groups_of(found)]
    one, all_ = (_curvature.Curvature(found, [[x]], 16) for _ in range(2))
    for (order, costs), roots in zip(all_.orders(several), several, strict=True):
        expected, values = one.order(roots)
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_allclose(costs, values)
    assert not all_._metrics
    assert not all_._precisions
    assert one._metrics


@pytest.mark.parametrize("criterion", ["redundancy", "taylor", "fisher"])
def test_passes_with_gradients_hold_few_samples_and_sum_up_to_the_same(criterion, monkeypatch):
    model, x, y = network("softmax"), images(24), np.arange(24) % 4
    sizes, scores, plain = [], [], _curvature.gradients

    def gradients(found, points, inputs, loss):
        sizes[-1].append(len(inputs[0]))
        return plain(found, points, inputs, loss)

    monkeypatch.setattr(_curvature, "gradients", gradients)
    for memory in (1 << 27, 1):
        monkeypatch.setattr(_curvature, "_MEMORY", memory)
        sizes.append([])
        smaller, report = prune(
            model, macs=0.6, data=x, labels=y, criterion=criterion, reconstruct=False, verbose=0, return_report=True
        )
        scores.append((report.cost, [v.shape for v in smaller.weights]))
    assert sizes == [[24], [1] * 24]
    if criterion != "redundancy":  # signs are drawn at random, part by part
        assert scores[0][0] == pytest.approx(scores[1][0], rel=1e-3)
        assert scores[0][1] == scores[1][1]


def test_a_budget_of_time_that_no_model_can_be_made_for_is_told_as_that(monkeypatch):
    monkeypatch.setattr("keras_kd.export.to_litert", lambda *_, **__: None)
    with pytest.raises(ValueError, match="The budget cannot be met by removing channels"):
        prune(network(), latency=0.5, min_channels=100, criterion="magnitude", verbose=0)


@pytest.mark.parametrize("samples", [16, 400])
def test_few_samples_make_a_wide_layer_dearer_and_many_leave_it(samples, monkeypatch):
    inputs = keras.Input((40,))
    model = networks.randomize(keras.Model(inputs, L.Dense(4)(L.Dense(40)(inputs))))
    found = _analysis.analyse(model)
    (_, roots), *_ = groups_of(found)
    data = tf.constant(np.random.default_rng(0).normal(size=(samples, 40)).astype("float32"))
    costs = {}
    for name in ("shrunk", "plain"):
        if name == "plain":
            monkeypatch.setattr("keras_kd.surgery._shrinkage.Covariance.shrinkage", lambda *_: 0.0)
        costs[name] = _curvature.Curvature(found, [[data]], samples).order(roots)[1][10]
    ratio = costs["shrunk"] / costs["plain"]
    assert ratio > 10 if samples == 16 else 1 <= ratio < 1.25


@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-21])
def test_values_whose_squares_few_digits_hold_leave_costs_finite(scale):
    inputs = keras.Input((8,))
    model = networks.randomize(keras.Model(inputs, L.Dense(4)(L.Dense(40, use_bias=False)(inputs))))
    found = _analysis.analyse(model)
    (_, roots), *_ = groups_of(found)
    data = np.random.default_rng(0).normal(size=(300, 8)) * scale
    order, costs = _curvature.Curvature(found, [[tf.constant(data, "float32")]], 300).order(roots)
    assert sorted(order) == list(range(40))
    assert np.isfinite(costs).all()


def test_the_smallest_budget_that_an_error_names_can_be_met():
    model = network()
    with pytest.raises(ValueError, match="cannot be met") as caught:
        prune(model, macs=0.001, criterion="magnitude", verbose=0)
    least = int(str(caught.value).split("macs=")[1].split(" ")[0].replace(",", ""))
    assert macs_of(prune(model, macs=least, criterion="magnitude", verbose=0)) == least


def test_a_subclassed_model_is_told_the_way_out():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"Functional or Sequential model.*keras.Model\(x, model.call\(x\)\)"):
        prune(Own(), macs=0.5)
