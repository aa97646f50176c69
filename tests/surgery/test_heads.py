"""Whole heads of attention: which can go, what is left then, and what the kept ones take over."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd.surgery import _analysis, _costs, _criteria, _curvature, _heads, _nodes, _side_by_side, channels
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery.graph import groups_of
from tests.surgery import networks

L = keras.layers
remove = keras_kd.surgery.remove_channels
prune = keras_kd.surgery.prune_channels


def close(actual, expected, tolerance=1e-5):
    scale = max(float(np.max(np.abs(expected))), 1.0)
    np.testing.assert_allclose(np.asarray(actual) / scale, np.asarray(expected) / scale, atol=tolerance)


def transformer(layer=None, call=None, steps=6, width=8):
    """A block with "attention", a feed-forward part and a head, with random weights; normalisation keeps the width."""
    tokens = keras.Input((steps, width), name="tokens")
    layer = layer or L.MultiHeadAttention(4, 3, name="attention")
    x = L.LayerNormalization()(tokens)
    x = L.Add()([tokens, (call or (lambda layer, x: layer(x, x)))(layer, x)])
    y = L.Dense(12, activation="gelu", name="inner")(L.LayerNormalization()(x))
    x = L.Add()([x, L.Dense(width, name="outer")(y)])
    return networks.randomize(keras.Model(tokens, L.Dense(3, name="head")(L.GlobalAveragePooling1D()(x))))


def tokens(samples=5, steps=6, width=8, seed=1):
    return np.random.default_rng(seed).normal(size=(samples, steps, width)).astype("float32")


def with_rows_at_0(layer, heads):
    """Makes what the output projection reads of some heads count as 0."""
    kernel = np.array(layer._output_dense.kernel)
    kernel[heads] = 0
    layer._output_dense.kernel.assign(kernel)


def copy_head(layer, source, target):
    """Makes one head compute what another one does; its rows of the output projection stay."""
    for name, part in _heads.parts_of(layer).items():
        for variable in part.variables if name != "output" else ():
            value = np.array(variable)
            axis = value.ndim - 2
            at = [slice(None)] * value.ndim
            at[axis] = target
            value[tuple(at)] = np.take(value, source, axis)
            variable.assign(value)


CALLS = {
    "self": (lambda: L.MultiHeadAttention(4, 3, name="attention"), None),
    "values of another width": (lambda: L.MultiHeadAttention(4, 3, value_dim=5, name="attention"), None),
    "no bias": (lambda: L.MultiHeadAttention(4, 3, use_bias=False, name="attention"), None),
    "dropout": (lambda: L.MultiHeadAttention(4, 3, dropout=0.2, seed=3, name="attention"), None),
    "a gate": (lambda: L.MultiHeadAttention(4, 3, use_gate=True, name="attention"), None),
    "a window": (lambda: L.MultiHeadAttention(4, 3, sliding_window=2, name="attention"), None),
    "causal": (
        lambda: L.MultiHeadAttention(4, 3, name="attention"),
        lambda layer, x: layer(x, x, use_causal_mask=True),
    ),
    "causal and dropout": (
        lambda: L.MultiHeadAttention(4, 3, dropout=0.1, name="attention"),
        lambda layer, x: layer(x, x, use_causal_mask=True),
    ),
    "a mask": (
        lambda: L.MultiHeadAttention(4, 3, name="attention"),
        lambda layer, x: layer(x, x, attention_mask=keras.ops.abs(keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1)))) > 0.5),
    ),
    "one mask for all heads": (
        lambda: L.MultiHeadAttention(4, 3, name="attention"),
        lambda layer, x: layer(x, x, attention_mask=np.tril(np.ones((1, 1, 6, 6), bool))),
    ),
    "another key": (lambda: L.MultiHeadAttention(4, 3, name="attention"), lambda layer, x: layer(x, L.Dense(5)(x), L.Dense(4)(x))),
    "shared keys": (lambda: L.GroupQueryAttention(3, 8, 4, name="attention"), None),
    "one key": (lambda: L.GroupQueryAttention(3, 4, 1, name="attention"), lambda layer, x: layer(x, x, use_causal_mask=True)),
    "few keys": (lambda: L.GroupQueryAttention(3, 8, 2, use_bias=False, name="attention"), None),
}
for _kind, _option in (("a gate", "use_gate"), ("a window", "sliding_window")):  # not in all versions of Keras
    if _option not in inspect.signature(L.MultiHeadAttention.__init__).parameters:
        del CALLS[_kind]


@pytest.mark.parametrize("kind", CALLS)
def test_without_heads_it_computes_what_it_did_with_their_rows_of_the_output_projection_at_0(kind):
    make, call = CALLS[kind]
    model, x = transformer(make(), call), tokens()
    smaller, report = remove(model, {"attention": [1]}, return_report=True)
    gone = report.removed["attention:heads"]
    layer, left = model.get_layer("attention"), smaller.get_layer("attention")
    count = layer._output_dense.kernel.shape[0]
    assert 1 in gone
    assert left._output_dense.kernel.shape[0] == count - len(gone)
    assert smaller.count_params() < model.count_params()
    assert left.get_config()["dropout"] == layer.get_config()["dropout"]
    with_rows_at_0(layer, gone)
    close(smaller(x), model(x))


@pytest.mark.parametrize("seed", [*range(6), *[pytest.param(seed, marks=pytest.mark.thorough) for seed in range(6, 40)]])
def test_a_random_transformer_computes_what_it_did_with_removed_heads_and_channels_at_0(seed):
    model = networks.random_transformer(seed)
    wanted, x = networks.random_channels(model, seed), networks.inputs_for(model, samples=40)
    assert any(name.endswith(":heads") for name in wanted)
    found = _analysis.analyse(model)
    rebuilt = Rebuilt(found, channels.chosen(found, wanted))
    assert rebuilt.model.count_params() < model.count_params()
    close(rebuilt.model(x), networks.masked(rebuilt, x)[0])
    _, report = remove(model, wanted, data=x, return_report=True)
    assert all(one.error_after <= one.error_before for one in report.refits)
    assert not report.not_refitted


def inside_and_out(model, x, name="attention"):
    """What an output projection should read, and what the layer gives."""
    seen = []

    def call(node, values):
        inside = _heads.context_of(node.operation, node, values) if node.operation.name == name else None
        given = _nodes.called(node.operation, node, values)
        if inside is not None:
            seen.extend([inside, given[0]])
        return given

    _nodes.run(model, [tf.constant(x)], call)
    return seen


@pytest.mark.parametrize("kind", CALLS)
def test_what_the_output_projection_reads_is_what_the_layer_makes_its_output_of(kind):
    make, call = CALLS[kind]
    model = transformer(make(), call)
    inside, given = inside_and_out(model, tokens())
    close(model.get_layer("attention")._output_dense(inside), given, 1e-6)


@pytest.mark.parametrize("kind", ["self", "no bias", "causal", "another key", "shared keys", "one key"])
def test_with_data_a_copy_of_a_head_goes_without_any_change(kind):
    make, call = CALLS[kind]
    model, x = transformer(make(), call), tokens(60)
    layer = model.get_layer("attention")
    if kind == "shared keys":  # of two heads with one key and value: both, by the heads that share their key
        for part in (layer._query_dense, layer._key_dense, layer._value_dense):
            for variable in part.variables:
                value = np.moveaxis(np.array(variable), -2, 0)
                half = len(value) // 4
                value[half : 2 * half] = value[:half]
                variable.assign(np.moveaxis(value, 0, -2))
    elif kind == "one key":
        for variable in layer._query_dense.variables:
            value = np.moveaxis(np.array(variable), -2, 0)
            value[2] = value[0]
            variable.assign(np.moveaxis(value, 0, -2))
    else:
        copy_head(layer, 0, 2)
    plain = remove(model, {"attention": [2]})
    smaller, report = remove(model, {"attention": [2]}, data=x, return_report=True)
    assert [(one.layer, one.error_after < 1e-8 < one.error_before) for one in report.refits] == [("attention", True)]
    assert not report.not_refitted
    assert "attention:heads" in str(report)
    close(smaller(x), model(x), 1e-4)
    assert float(np.max(np.abs(plain(x) - model(x)))) > 1e-2


def masked():
    """Embedded words, of which 0 is none, two attention layers, and inputs."""
    words = keras.Input((6,), dtype="int32")
    x = L.Embedding(9, 8, mask_zero=True, name="words")(words)
    x = L.LayerNormalization()(L.MultiHeadAttention(4, 3, name="attention")(x, x))
    x = L.Add()([x, L.MultiHeadAttention(2, 4, name="more")(x, x, use_causal_mask=True)])
    x = L.GlobalAveragePooling1D()(L.Dense(5, name="last")(x))
    rng = np.random.default_rng(0)
    given = rng.integers(0, 9, (80, 6))
    given[:, 3:] *= rng.integers(0, 2, (80, 3))
    return networks.randomize(keras.Model(words, x)), given


def test_words_that_are_not_there_do_not_count_in_the_fit():
    model, x = masked()
    inside, given = inside_and_out(model, x)
    close(model.get_layer("attention")._output_dense(inside), given, 1e-6)
    copy_head(model.get_layer("attention"), 3, 1)
    smaller, report = remove(model, {"attention": [1]}, data=x, return_report=True)
    assert report.refits[0].error_after < 1e-8
    close(smaller(x), model(x), 1e-4)


class _Watching(_side_by_side.Walk):
    def visit(self, *args):
        """Fits nothing."""


def test_words_that_are_not_there_do_not_count_where_two_networks_run_side_by_side():
    model, x = masked()
    found = _analysis.analyse(model)
    rebuilt = Rebuilt(found, {int(found.places()["attention:heads"][1][2])})
    inputs = _side_by_side.held(model, [[tf.constant(x, tf.int32)]])
    old, new = _Watching(found, rebuilt)._through(model, inputs, inputs, 1)
    close(np.concatenate(old[0]), model(x), 1e-6)
    close(np.concatenate(new[0]), rebuilt.model(x), 1e-6)


def test_words_that_are_not_there_do_not_count_in_the_criteria():
    model, x = masked()
    found = _analysis.analyse(model)
    seen = []
    points = _curvature.read_points(found)
    list(_curvature.gradients(found, points, [tf.constant(x)], lambda given: seen.append(given[0]) or tf.reduce_sum(given[0])))
    close(seen[0], model(x), 1e-6)


def test_several_calls_of_a_layer_lose_the_same_heads_and_are_fitted_together():
    inputs = keras.Input((6, 8))
    layer = L.MultiHeadAttention(4, 3, name="attention")
    x = L.LayerNormalization()(L.Add()([inputs, layer(inputs, inputs)]))
    x = L.LayerNormalization()(L.Add()([x, layer(x, inputs)]))
    model, x = networks.randomize(keras.Model(inputs, L.Dense(2)(x))), tokens(60)
    copy_head(layer, 3, 0)
    smaller, report = remove(model, {"attention": [0]}, data=x, return_report=True)
    assert [one.layer for one in report.refits] == ["attention"]
    close(smaller(x), model(x), 1e-4)


def test_heads_and_what_attention_reads_go_together_and_both_are_fitted():
    inputs = keras.Input((6, 5))
    hidden = L.Dense(7, activation="relu", name="hidden")(inputs)
    x = L.MultiHeadAttention(4, 3, name="attention")(hidden, hidden)
    model, x = networks.randomize(keras.Model(inputs, L.Dense(2)(x))), tokens(80, width=5)
    copy_head(model.get_layer("attention"), 3, 0)
    kernel, bias = (np.array(one) for one in model.get_layer("hidden").variables)
    kernel[:, 4], bias[4] = kernel[:, 2], bias[2]
    model.get_layer("hidden").set_weights([kernel, bias])
    smaller = remove(model, {"attention:heads": [0], "hidden": [4]}, data=x)
    close(smaller(x), model(x), 1e-4)


def test_nested_models_and_several_axes_have_heads_too():
    images = keras.Input((3, 4, 6))
    a = keras.Input((3, 4, 6))
    inner = keras.Model(a, L.MultiHeadAttention(3, 2, attention_axes=(2,), output_shape=(2, 5), name="rows")(a, a), name="inner")
    x = L.LayerNormalization()(L.MultiHeadAttention(4, 2, name="whole")(images, images))
    model = networks.randomize(keras.Model(images, L.Flatten()(inner(x))))
    x = np.random.default_rng(0).normal(size=(40, 3, 4, 6)).astype("float32")
    smaller = remove(model, {"whole": [0, 3], "rows": [1]})
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    with_rows_at_0(copy.get_layer("whole"), [0, 3])
    with_rows_at_0(copy.get_layer("inner").get_layer("rows"), [1])
    close(smaller(x), copy(x))
    copy_head(model.get_layer("whole"), 1, 0)
    copy_head(model.get_layer("inner").get_layer("rows"), 0, 2)
    close(remove(model, {"whole": [0], "inner/rows:heads": [2]}, data=x)(x), model(x), 1e-4)


class OwnAttention(L.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        output, scores = super()._compute_attention(*args, **kwargs)
        return keras.ops.flip(output, axis=-2), scores


@pytest.mark.parametrize(
    ("make", "call", "told"),
    [
        (None, lambda layer, x: layer(x, x, return_attention_scores=True)[0], '"attention" gives its scores, head by head'),
        (None, lambda layer, x: layer(x, x, attention_mask=np.ones((1, 4, 6, 6), bool)), "has a mask for each head"),
        (lambda: OwnAttention(4, 3, name="attention"), None, "computes attention in a way of its own"),
        (lambda: L.MultiHeadAttention(1, 3, name="attention"), None, "would have no channel left"),
    ],
)
def test_heads_that_cannot_go_are_listed_with_the_reason(make, call, told):
    model = transformer(None if make is None else make(), call)
    graph = keras_kd.surgery.find_groups(model)
    assert all(group.axis == "channels" for group in graph.groups)
    (pin,) = [pin for pin in graph.pinned if pin.layer == "attention:heads"]
    assert told in pin.reason
    assert f"stays: attention:heads ({len(pin.channels)} heads)" in str(graph)
    with pytest.raises(ValueError, match=f'Channel 0 of "attention" must stay: .*{told}'):
        remove(model, {"attention": [0]})


def test_vectors_without_steps_keep_their_heads():
    inputs = keras.Input((8,))
    graph = keras_kd.surgery.find_groups(keras.Model(inputs, L.MultiHeadAttention(4, 3, name="attention")(inputs, inputs)))
    assert [pin.reason for pin in graph.pinned if pin.layer == "attention:heads"] == ['"attention" attends along no axis']


def test_the_graph_has_a_group_of_heads_and_prints_it():
    graph = keras_kd.surgery.find_groups(transformer())
    group = graph.group_of("attention")
    assert (group.axis, group.channels, group.width) == ("heads", 4, 3)
    assert (group.makers, group.readers) == (("attention",), ("attention",))
    np.testing.assert_array_equal(group.members["attention:heads"], [[0], [1], [2], [3]])
    assert str(graph).splitlines()[1].split() == ["attention", "4", "heads", "attention"]
    shared = keras_kd.surgery.find_groups(transformer(L.GroupQueryAttention(3, 6, 3, name="attention"))).group_of("attention")
    assert (shared.channels, shared.width) == (3, 6)
    np.testing.assert_array_equal(shared.members["attention:heads"], [[0, 1], [2, 3], [4, 5]])


def test_where_heads_and_outputs_can_go_the_name_says_which():
    inputs = keras.Input((6, 5))
    x = L.MultiHeadAttention(4, 3, output_shape=7, name="attention")(inputs, inputs)
    model = networks.randomize(keras.Model(inputs, L.Dense(2, name="head")(x)))
    with pytest.raises(ValueError, match='"attention", which may be "attention:heads", or "attention:output"'):
        remove(model, {"attention": [0]})
    smaller, report = remove(model, {"attention:heads": [0], "attention:output": [1, 6]}, return_report=True)
    assert smaller.get_layer("attention").num_heads == 3
    assert smaller.get_layer("head").kernel.shape == (5, 2)
    assert report.kept["attention"].tolist() == [0, 2, 3, 4, 5]
    assert report.kept["attention:heads"].tolist() == [1, 2, 3]
    graph = keras_kd.surgery.find_groups(model)
    assert graph.group_of("attention:output").readers == ("head",)
    with pytest.raises(ValueError, match="keep at least one channel.*without any of its 4"):
        remove(model, {"attention:heads": range(4)})
    with pytest.raises(ValueError, match=r'Channels of "attention:heads" must be in \[0, 3\]'):
        remove(model, {"attention:heads": [4]})


@pytest.mark.parametrize("kind", ["values of another width", "another key", "shared keys"])
def test_costs_are_exactly_those_of_models_that_are_really_rebuilt(kind):
    model = transformer(CALLS[kind][0](), steps=5)
    found = _analysis.analyse(model)
    groups = groups_of(found)
    costs = _costs.Costs(found, groups)
    kept = [len(roots) // 2 for _, roots in groups]
    gone = {root for (_, roots), count in zip(groups, kept, strict=True) for root in roots[count:].tolist()}
    rebuilt = Rebuilt(found, gone).model
    assert costs.of(kept) == pytest.approx((_costs.macs_of(rebuilt), rebuilt.count_params()), rel=1e-9)


# Which heads go


def test_the_block_goes_that_costs_least_with_those_that_have_gone():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8, 10))
    covariance, metric = a @ a.T, b @ b.T
    order, costs = _curvature.eliminate([np.linalg.inv(covariance)], [metric], [2])
    gone, values = [], []

    def cost(removed):
        at = [2 * i + j for i in removed for j in (0, 1)]
        kept = [i for i in range(8) if i not in at]
        across = covariance[np.ix_(at, kept)]
        inner = np.linalg.inv(covariance[np.ix_(kept, kept)]) if kept else np.zeros((0, 0))
        return np.trace(metric[np.ix_(at, at)] @ (covariance[np.ix_(at, at)] - across @ inner @ across.T))

    while len(gone) < 4:
        gone.append(min((i for i in range(4) if i not in gone), key=lambda i: cost([*gone, i])))
        values.append(cost(gone))
    assert order.tolist() == gone
    np.testing.assert_allclose(costs, values, rtol=1e-8)


@pytest.mark.parametrize("make", [lambda: L.MultiHeadAttention(4, 3, name="attention"), CALLS["few keys"][0]])
def test_moments_are_those_of_values_and_gradients_inside_of_attention_and_of_their_means(make):
    inputs = keras.Input((6, 8))
    model, x = networks.randomize(keras.Model(inputs, make()(inputs, inputs))), tokens()
    found = _analysis.analyse(model)
    points = _curvature.read_points(found)
    (mean, steady, total), (point, values, slopes) = _curvature.gradients(
        found, points, [tf.constant(x)], lambda outputs: tf.reduce_sum(outputs[0][:, 2, 1] * 3.0)
    )
    inside, _ = inside_and_out(model, x)
    kernel = np.array(model.get_layer("attention")._output_dense.kernel)
    order = [0, 1, 2, 3] if len(kernel) == 4 else [0, 4, 1, 5, 2, 6, 3, 7]  # of few keys, the same place of each goes
    close((values + steady), np.asarray(inside)[..., order, :].reshape(5, 6, -1))
    close(np.asarray(steady)[:, 0], np.asarray(values + steady).mean(1))
    expected = np.zeros((5, 6, kernel[..., 0].size))
    expected[:, 2] = 3.0 * kernel[order, :, 1].ravel()
    close(np.asarray(slopes) + np.asarray(total) / 6, expected)
    close(np.asarray(total)[:, 0], expected.sum(1))
    assert mean.roots.tolist() == point.roots.tolist()
    assert mean.features == point.features == kernel[..., 0].size // 4


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_first_order_scores_of_heads_are_those_of_a_gate_on_each(kind):
    """The change of the loss with a factor for each head (Michel et al. 2019), by differences."""
    model, x = transformer(), tokens(4)
    found = _analysis.analyse(model)
    groups = groups_of(found)
    scores = _criteria.first_order(found, groups, [[tf.constant(x)]], [lambda outputs: tf.reduce_sum(outputs[0][:, 1])], kind)
    found_scores = next(score for (group, _), score in zip(groups, scores, strict=True) if group.axis == "heads")
    kernel = model.get_layer("attention")._output_dense.kernel
    whole = np.array(kernel)
    for head in range(4):
        given = []
        for factor in (1.01, 0.99):
            changed = whole.copy()
            changed[head] *= factor
            kernel.assign(changed)
            given.append(np.asarray(model(x)[:, 1], "float64"))
        kernel.assign(whole)
        slopes = (given[0] - given[1]) / 0.02
        expected = np.abs(slopes).mean() if kind == "taylor" else np.square(slopes).mean() / 2
        assert found_scores[head] == pytest.approx(expected, rel=0.01)


def test_magnitude_of_a_head_is_that_of_all_its_weights():
    model = transformer()
    found = _analysis.analyse(model)
    groups = groups_of(found)
    scores = _criteria.magnitudes(found, groups)
    score = next(score for (group, _), score in zip(groups, scores, strict=True) if group.axis == "heads")
    parts = _heads.parts_of(model.get_layer("attention"))
    squares = sum(np.square(np.array(parts[name].kernel)).sum((0, 2)) for name in ("query", "key", "value"))
    norms = np.sqrt(squares + np.square(np.array(parts["output"].kernel)).sum((1, 2)))
    np.testing.assert_allclose(score, norms / norms.mean(), rtol=1e-6)


def test_redundancy_removes_a_head_that_others_can_stand_for():
    model, x = transformer(), tokens(1000)
    layer = model.get_layer("attention")
    copy_head(layer, 3, 1)
    value = np.array(layer._value_dense.kernel)
    value[:, 1] = value[:, 3] @ np.random.default_rng(0).normal(size=(3, 3))  # the same looks, other mixtures of its channels
    layer._value_dense.kernel.assign(value)
    found = _analysis.analyse(model)
    (roots,) = (roots for group, roots in groups_of(found) if group.axis == "heads")
    order, costs = _curvature.Curvature(found, [[tf.constant(x)]], len(x)).order(roots)
    assert order[0] in (1, 3)
    assert costs[0] < 0.05 * costs[1]


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_a_budget_takes_heads_and_channels(criterion):
    model, x = transformer(), tokens(64)
    smaller, report = prune(model, macs=0.45, data=x, criterion=criterion, verbose=0, return_report=True)
    assert 0.4 * report.macs < report.macs_after == _costs.macs_of(smaller) <= 0.45 * report.macs
    assert smaller.get_layer("attention").num_heads == len(report.kept["attention:heads"]) < 4


def test_what_is_left_of_a_budget_trains_saves_loads_and_exports(tmp_path):
    model, x = transformer(), tokens(64)
    smaller = prune(model, macs=0.45, data=x, verbose=0)
    heads = smaller.get_layer("attention").num_heads
    assert heads < 4
    smaller.compile("sgd", "mse")
    smaller.fit(x, np.zeros((64, 3)), verbose=0, batch_size=64)
    smaller.save(tmp_path / "smaller.keras")
    loaded = keras.models.load_model(tmp_path / "smaller.keras")
    assert loaded.get_layer("attention").num_heads == heads
    close(loaded(x), smaller(x), 1e-6)
    keras_kd.export.to_litert(smaller, tmp_path / "smaller.tflite")  # compares what it computes with the model
    assert len(keras_kd.surgery.kept_channels(smaller)["attention:heads"]) == heads


def test_heads_count_as_their_channels_where_numbers_are_rounded():
    model = transformer(L.MultiHeadAttention(8, 4, name="attention"))
    smaller = prune(model, parameters=0.61, criterion="magnitude", verbose=0, round_to=8, min_channels=16)
    assert smaller.get_layer("attention").num_heads == 4
    with pytest.raises(ValueError, match="with 16 left in each group the smallest is parameters="):
        prune(model, parameters=0.55, criterion="magnitude", verbose=0, round_to=8, min_channels=16)
    smaller = prune(model, parameters=0.8, criterion="magnitude", verbose=0, round_to=8, scope="layer")
    assert smaller.get_layer("attention").num_heads == 6


# With the rest of surgery


def test_a_copy_gets_the_weights_of_the_heads_that_were_kept():
    model = transformer()
    smaller, report = remove(model, {"attention": [0, 2]}, return_report=True)
    copy = keras.models.clone_model(smaller)
    networks.randomize(copy, 3)
    keras_kd.surgery.transfer_weights(model, copy, channels=report.kept)
    close(copy(tokens()), smaller(tokens()), 1e-6)
    networks.randomize(smaller, 4)
    keras_kd.surgery.transfer_weights(model, smaller)
    close(copy(tokens()), smaller(tokens()), 1e-6)


def test_a_student_of_fewer_heads_begins_with_the_largest_ones_of_its_teacher():
    teacher, student = transformer(), transformer(L.MultiHeadAttention(2, 3, name="attention"))
    layer = teacher.get_layer("attention")
    for part in _heads.parts_of(layer).values():
        scale = np.asarray([0.1, 1.0, 0.1, 1.0]).reshape([4, 1, 1] if part is layer._output_dense else [1, 4, 1])
        part.kernel.assign(np.array(part.kernel) * scale)
    keras_kd.surgery.transfer_weights(teacher, student)
    close(student(tokens()), remove(teacher, {"attention": [0, 2]})(tokens()), 1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_fitted_and_judged(policy):
    model, x = transformer(L.MultiHeadAttention(4, 3, dtype=policy, name="attention")), tokens(60)
    copy_head(model.get_layer("attention"), 0, 2)
    smaller, report = remove(model, {"attention": [2]}, data=x, return_report=True)
    assert smaller.get_layer("attention").query_dense.kernel.dtype == "float32"
    assert report.refits[0].error_after < 0.01 * report.refits[0].error_before
    assert prune(model, macs=0.6, data=x, verbose=0).get_layer("attention").num_heads < 4


def test_projections_that_are_not_plain_keep_their_heads_and_what_they_read():
    model = transformer(call=lambda layer, x: layer(x, L.Dense(5, name="before")(x)))
    model.get_layer("attention")._key_dense.enable_lora(2)
    pinned = {pin.layer: pin.reason for pin in keras_kd.surgery.find_groups(model).pinned}
    assert pinned["attention:heads"] == pinned["before"] == '"attention" has projections that are not known'


def test_what_stands_for_attention_has_no_heads():
    tokens_in = keras.Input((6, 8))
    x = L.MultiHeadAttention(4, 3, name="attention")(tokens_in, tokens_in)
    model = networks.randomize(keras.Model(tokens_in, L.Dense(3)(L.LayerNormalization()(x))))
    smaller = keras_kd.surgery.linearize(remove(model, {"attention": [0]}), "attention", tokens(60))
    assert "attention:heads" not in keras_kd.surgery.kept_channels(smaller)


def test_features_of_attention_are_compared_channel_by_channel_whatever_its_heads():
    inputs = keras.Input((6, 8))
    x = L.MultiHeadAttention(4, 3, name="attention")(inputs, inputs)
    model = networks.randomize(keras.Model(inputs, L.Dense(2, name="head")(x)))
    with_rows_at_0(model.get_layer("attention"), [1])
    smaller = remove(model, {"attention:heads": [1], "attention:output": [0, 5]})
    loss = keras_kd.losses.HintLoss(teacher_layer_name="attention", student_layer_name="attention")
    distiller = keras_kd.Distiller(model, smaller, loss)
    distiller.compile(loss="mse")
    assert distiller.evaluate(tokens(8), np.zeros((8, 6, 2)), verbose=0, return_dict=True)["distillation_loss"] < 1e-9


def test_what_a_configuration_leaves_out_is_kept():
    model = transformer(L.MultiHeadAttention(4, 3, flash_attention=True, name="attention"))
    assert remove(model, {"attention": [1]}).get_layer("attention")._flash_attention is True
    assert remove(model, {"inner": [1]}).get_layer("attention")._flash_attention is True
