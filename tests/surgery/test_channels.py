"""remove_channels: what is left computes what the whole computed with those channels counted as 0."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.surgery import _analysis, channels
from keras_kd.surgery._rebuild import Rebuilt
from tests.surgery import networks

L = keras.layers


def close(actual, expected, tolerance=1e-5):
    for a, b in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        scale = max(float(np.max(np.abs(b))), 1.0)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize("seed", [*range(12), *[pytest.param(seed, marks=THOROUGH) for seed in range(12, 40)]])
def test_a_random_network_computes_what_it_did_with_removed_channels_at_0(seed):
    model = networks.random_network(seed)
    before = [np.asarray(v).copy() for v in model.variables]
    x = networks.inputs_for(model)
    whole = model(x)
    wanted = networks.random_channels(model, seed)
    found = _analysis.analyse(model)
    gone = channels.chosen(found, wanted)
    rebuilt = Rebuilt(found, gone)
    smaller = keras_kd.surgery.remove_channels(model, wanted)
    assert smaller.count_params() < model.count_params()
    close(smaller(x), networks.masked(rebuilt, x))
    close(keras_kd.surgery.remove_channels(model, {})(x), whole, 1e-6)
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), value)


def images(samples=200, size=12, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, size, size, 3)).astype("float32")


def network(*, bias=True, norm=True, padding="same"):
    """Layers "a", "b", "c" (convolutions), "d" and "head" (Dense) on (12, 12, 3) images, with random weights."""
    image = keras.Input((12, 12, 3), name="image")
    x = image
    for name, width, strides in (("a", 8, 1), ("b", 8, 2), ("c", 6, 1)):
        x = L.Conv2D(width, 3, strides=strides, padding=padding, use_bias=bias, name=name)(x)
        x = L.BatchNormalization(name=f"{name}_norm")(x) if norm else x
        x = L.ReLU()(x)
    x = L.Dense(10, activation="relu", name="d")(L.Flatten()(x))
    return networks.randomize(keras.Model(image, L.Dense(3, name="head")(x)))


def set_channel(model, layer, channel, like=None):
    """Makes a channel 0 everywhere after its ReLU, or a copy of another one."""
    for owner in (model.get_layer(layer), *[one for one in model.layers if one.name == f"{layer}_norm"]):
        for variable in owner.variables:
            value = keras.ops.convert_to_numpy(variable).copy()
            if like is None:
                value[..., channel] = {"moving_variance": 1.0, "kernel": 0.0}.get(variable.name, 0.0)
            else:
                value[..., channel] = value[..., like]
            variable.assign(value)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_with_data_dead_and_duplicate_channels_go_without_any_change(bias, norm):
    model = network(bias=bias, norm=norm)
    for layer in "abc":
        set_channel(model, layer, 1)
        set_channel(model, layer, 4, like=2)
    x = images()
    smaller, report = keras_kd.surgery.remove_channels(model, {layer: [1, 4] for layer in "abc"}, data=x[:150], return_report=True)
    close(smaller(x), model(x), 1e-4)
    assert [one.layer for one in report.refits] == ["b", "c", "d"]
    assert all(one.error_after < 1e-8 < one.error_before for one in report.refits)


@pytest.mark.parametrize("norm", [True, False])
def test_a_constant_channel_goes_into_the_bias_or_the_normalization_that_follows(norm):
    model = network(bias=not norm, norm=norm, padding="valid")
    set_channel(model, "a", 1)
    model.get_layer("a_norm" if norm else "a").variables[1].assign([0.1, 0.9, *[0.2] * 6])  # beta, or bias
    x = images()
    smaller = keras_kd.surgery.remove_channels(model, {"a": [1]}, data=x[:150])
    close(smaller(x), model(x), 1e-4)


def test_linear_combinations_of_dense_units_go_without_any_change():
    vector = keras.Input((5,))
    hidden = L.Dense(8, name="hidden")(vector)
    model = networks.randomize(keras.Model(vector, L.Dense(2, activation="tanh")(hidden)))  # 8 units of 5 features
    x = np.random.default_rng(0).normal(size=(300, 5)).astype("float32")
    close(keras_kd.surgery.remove_channels(model, {"hidden": [3, 6]}, data=x)(x), model(x), 1e-4)


def test_where_it_cannot_be_exact_data_brings_the_outputs_closer():
    model, x = network(), images(400)
    wanted = {"a": [0, 3], "b": [1, 2], "c": [5]}
    fitted, report = keras_kd.surgery.remove_channels(model, wanted, data=x[:300], return_report=True)
    plain = keras_kd.surgery.remove_channels(model, wanted)
    truth = model(x[300:])
    errors = [float(np.mean(np.square(one(x[300:]) - truth))) for one in (fitted, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert all(one.error_after < one.error_before for one in report.refits)
    assert "error after" in str(report)


@pytest.mark.parametrize("seed", [*range(4), *[pytest.param(seed, marks=THOROUGH) for seed in range(4, 12)]])
def test_random_networks_take_data(seed):
    model = networks.random_network(seed)
    wanted = networks.random_channels(model, seed)
    x = networks.inputs_for(model, samples=120)
    smaller, report = keras_kd.surgery.remove_channels(model, wanted, data=x, return_report=True)
    for one in report.refits:
        assert one.error_after <= one.error_before
    for value in keras.tree.flatten(smaller(x)):
        assert np.all(np.isfinite(value))


def test_layers_used_several_times_are_fitted_on_all_their_uses():
    vector = keras.Input((5,))
    layer = L.Dense(7, name="shared")
    first, second = (L.Dense(6, activation="relu", name=name) for name in ("first", "second"))
    tied = L.Add()([first(vector), second(vector)])
    other = L.Add()([second(vector), first(vector * -1.0)])
    outputs = L.Dense(2)(L.Concatenate()([layer(tied), layer(other)]))
    model = networks.randomize(keras.Model(vector, outputs))
    for one in (first, second):
        kernel, bias = (keras.ops.convert_to_numpy(v).copy() for v in one.variables)
        kernel[:, 3], bias[3] = kernel[:, 0], bias[0]
        one.kernel.assign(kernel)
        one.bias.assign(bias)
    x = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    smaller, report = keras_kd.surgery.remove_channels(model, {"first": [3]}, data=x, return_report=True)
    assert [one.layer for one in report.refits] == ["shared"]
    close(smaller(x), model(x), 1e-4)


@pytest.mark.parametrize("kind", ["attention", "lstm", "gru", "rnn", "both", "einsum", "heads", "transposed", "causal"])
def test_other_readers_take_over_duplicates_too(kind):
    tokens = keras.Input((6, 4))
    x = L.Dense(6, activation="relu", name="hidden")(tokens)
    readers = {
        "attention": lambda x: L.MultiHeadAttention(2, 3)(x, x),
        "lstm": L.LSTM(4),
        "gru": L.GRU(4, return_sequences=True),
        "rnn": L.SimpleRNN(4),
        "both": L.Bidirectional(L.GRU(3)),
        "einsum": L.EinsumDense("abc,cd->abd", (6, 5), bias_axes="d"),
        "heads": L.EinsumDense("abc,cde->abde", (6, 5, 2), bias_axes="de"),
        "transposed": L.Conv1DTranspose(5, 3, strides=2),
        "causal": L.Conv1D(5, 3, dilation_rate=2, padding="causal"),
    }
    model = networks.randomize(keras.Model(tokens, L.Dense(2)(readers[kind](x))))
    set_channel(model, "hidden", 4, like=2)
    x = np.random.default_rng(0).normal(size=(200, 6, 4)).astype("float32")
    smaller, report = keras_kd.surgery.remove_channels(model, {"hidden": [4]}, data=x, return_report=True)
    assert not report.not_refitted
    close(smaller(x), model(x), 1e-4)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_few_samples_change_little(samples):
    model, x = network(), images(samples)
    fitted, report = keras_kd.surgery.remove_channels(model, {"a": [0], "c": [1]}, data=x, return_report=True)
    assert all(one.error_after <= one.error_before for one in report.refits)
    assert np.all(np.isfinite(fitted(x)))


def test_what_is_left_can_lose_more():
    model, x = network(), images(150)
    once = keras_kd.surgery.remove_channels(model, {"a": [1, 4], "d": [0, 9]})
    twice = keras_kd.surgery.remove_channels(keras_kd.surgery.remove_channels(model, {"a": [1]}), {"a": [3], "d": [0, 9]})
    close(twice(x), once(x))


def test_mixed_precision_is_fitted_in_full():
    vector = keras.Input((5,))
    x = L.Dense(8, activation="relu", dtype="mixed_float16", name="hidden")(vector)
    model = networks.randomize(keras.Model(vector, L.Dense(2, dtype="mixed_float16", name="head")(x)))
    set_channel(model, "hidden", 4, like=2)
    x = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
    smaller = keras_kd.surgery.remove_channels(model, {"hidden": [4]}, data=x)
    assert smaller.get_layer("head").kernel.dtype == "float32"
    close(smaller(x), model(x), 2e-3)


def test_tf_data_gives_what_arrays_give():
    tf = pytest.importorskip("tensorflow")
    model, x = network(), images(128)
    labels = np.zeros(128)
    stream = tf.data.Dataset.from_tensor_slices((x, labels)).batch(64)
    from_stream = keras_kd.surgery.remove_channels(model, {"a": [0]}, data=stream)
    from_arrays = keras_kd.surgery.remove_channels(model, {"a": [0]}, data=x)
    close(from_stream(x), from_arrays(x), 1e-5)


def test_indices_and_masks_mean_the_same_and_the_report_says_what_is_left():
    model = network()
    mask = np.zeros(8, bool)
    mask[[1, 6]] = True
    smaller, report = keras_kd.surgery.remove_channels(model, {"a": mask}, return_report=True)
    other = keras_kd.surgery.remove_channels(model, {"a": np.array([6, 1])})
    for one, two in zip(smaller.weights, other.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    assert report.kept["a_norm"].tolist() == [0, 2, 3, 4, 5, 7]
    assert report.removed["a"].tolist() == [1, 6]
    assert report.parameters_after == smaller.count_params()
    assert set(report.removed) == {"a", "a_norm", next(n for n in report.removed if n.startswith("re_lu"))}


def test_names_flags_and_types_of_layers_stay():
    inner = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(5, 3, name="deep"), L.BatchNormalization(name="norm")], name="inner")
    image = keras.Input((8, 8, 3), name="image")
    x = inner(L.Conv2D(4, 3, padding="same", name="a", dtype="mixed_bfloat16")(image))
    model = keras.Model({"image": image}, {"y": L.Dense(2, name="head")(L.GlobalAveragePooling2D(name="pool")(x))}, name="whole")
    inner.get_layer("norm").trainable = False
    smaller = keras_kd.surgery.remove_channels(model, {"a": [0], "inner/deep": [1, 2]})
    assert smaller.name == "whole"
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]
    assert isinstance(smaller.get_layer("inner"), keras.Sequential)
    assert smaller.get_layer("inner").get_layer("deep").kernel.shape == (3, 3, 3, 3)
    assert not smaller.get_layer("inner").get_layer("norm").trainable
    assert smaller.get_layer("inner").get_layer("deep").trainable
    assert smaller.get_layer("a").dtype_policy.name == "mixed_bfloat16"
    assert set(smaller({"image": np.zeros((1, 8, 8, 3), "float32")})) == {"y"}


def test_a_sequential_model_stays_one():
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, name="hidden"), L.Dense(2)])
    smaller = keras_kd.surgery.remove_channels(model, {"hidden": range(3)})
    assert isinstance(smaller, keras.Sequential)
    assert smaller.get_layer("hidden").units == 3


def test_initializers_that_hold_arrays_do_not_stand_in_the_way():
    words = keras.Input((3,), dtype="int32")
    table = keras.initializers.Constant(np.ones((7, 4), "float32").tolist())
    x = L.Embedding(7, 4, embeddings_initializer=table, name="words")(words)
    model = keras.Model(words, L.Dense(2)(L.Flatten()(x)))
    smaller = keras_kd.surgery.remove_channels(model, {"words": [0]})
    assert keras.models.clone_model(smaller).get_layer("words").embeddings.shape == (7, 3)


def test_what_stands_beside_comes_along():
    vector = keras.Input((5,))
    scaled = L.Normalization(name="scaled", mean=[1.0] * 5, variance=[4.0] * 5)(vector)
    x = L.Dense(6, name="hidden")(L.Lambda(lambda x: x * 2.0)(scaled))
    x = L.Dense(4, name="after")(L.Dropout(0.5)(x))
    model = networks.randomize(keras.Model(vector, L.Dense(2)(L.Lambda(keras.ops.sin)(x))))
    smaller = keras_kd.surgery.remove_channels(model, {"hidden": [0]})
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    kernel = keras.ops.convert_to_numpy(model.get_layer("after").kernel).copy()
    kernel[0] = 0
    model.get_layer("after").kernel.assign(kernel)
    close(smaller(x), model(x))


def test_both_directions_of_a_recurrent_layer_read_fewer_channels():
    words = keras.Input((6,), dtype="int32")
    x = L.Bidirectional(L.GRU(4, return_sequences=True))(L.Embedding(9, 5, mask_zero=True, name="words")(words))
    model = networks.randomize(keras.Model(words, L.Dense(2)(L.Bidirectional(L.LSTM(3))(x))))
    smaller = keras_kd.surgery.remove_channels(model, {"words": [1, 3]})
    table = keras.ops.convert_to_numpy(model.get_layer("words").embeddings).copy()
    table[:, [1, 3]] = 0
    x = np.random.default_rng(0).integers(0, 9, (7, 6))
    model.get_layer("words").embeddings.assign(table)
    close(smaller(x), model(x))


@pytest.mark.slow
def test_the_steps_of_a_plan_can_be_done_as_they_stand():
    model, x = network(), images(300)
    plan = keras_kd.analysis.linear_analysis(model, x, verbose=0).recommend(parameters=0.7)
    wanted = {step.layer: step.channels for step in plan.steps if step.action == "remove_channels"}
    smaller = keras_kd.surgery.remove_channels(model, wanted, data=x)
    assert smaller.count_params() == pytest.approx(plan.parameters_after, rel=0.05)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"a": [8]}, r'Channels of "a" must be in \[0, 7\]. Received: 8 to 8'),
        ({"a": [-1]}, r"must be in \[0, 7\]"),
        ({"a": range(8)}, r'keep at least one channel.*"a" without any of its 8'),
        ({"a": np.ones(5, bool)}, r'A mask for "a" must have the shape \(8,\)'),
        ({"a": [0.5]}, "whole numbers"),
        ({"nobody": [0]}, 'No layer "nobody" in the model.*Layers that can lose channels: a, b, c, d'),
        ({"head": [0]}, 'Channel 0 of "head" must stay: "head" gives the model'),
        ({"image": [0]}, 'No layer "image"'),
    ],
)
def test_bad_channels_are_refused_by_name(wanted, told):
    with pytest.raises(ValueError, match=told):
        keras_kd.surgery.remove_channels(network(), wanted)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match="must be a dict from names of layers"):
        keras_kd.surgery.remove_channels(network(), [1, 2])
    with pytest.raises(
        ValueError, match=r"`data` must have the shape that .* takes, \(None, 12, 12, 3\). Received: \(10, 5, 5, 3\)"
    ):
        keras_kd.surgery.remove_channels(network(), {"a": [0]}, data=np.zeros((10, 5, 5, 3)))
    with pytest.raises(ValueError, match='NaN or infinity in what "b" reads'):
        keras_kd.surgery.remove_channels(network(), {"a": [0]}, data=np.full((10, 12, 12, 3), np.nan))
    with pytest.raises(ValueError, match="at least one sample"):
        keras_kd.surgery.remove_channels(network(), {"a": [0]}, data=np.zeros((0, 12, 12, 3)))


ARCHITECTURES = [
    ("MobileNetV3Small", 32),
    pytest.param("MobileNetV2", 32, marks=THOROUGH),
    pytest.param("EfficientNetB0", 32, marks=THOROUGH),
    pytest.param("ResNet50", 32, marks=THOROUGH),
    pytest.param("DenseNet121", 32, marks=THOROUGH),
    pytest.param("ConvNeXtTiny", 32, marks=THOROUGH),
    pytest.param("InceptionV3", 75, marks=THOROUGH),
    pytest.param("Xception", 71, marks=THOROUGH),
]


@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_a_quarter_of_an_architecture_goes_and_the_rest_trains_saves_and_loads(name, size, tmp_path):
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=5)
    networks.randomize(model)
    groups = keras_kd.surgery.find_groups(model).groups
    wanted: dict = {}
    for group in groups:
        layer = group.makers[0]
        wanted.setdefault(layer, []).extend(group.members[layer][: group.channels // 4].ravel().tolist())
    found = _analysis.analyse(model)
    rebuilt = Rebuilt(found, channels.chosen(found, wanted))
    smaller, x = rebuilt.model, np.random.default_rng(0).normal(size=(4, size, size, 3)).astype("float32")
    assert smaller.count_params() < 0.8 * model.count_params()
    close(smaller(x), networks.masked(rebuilt, x), 1e-5)
    smaller.compile("sgd", "sparse_categorical_crossentropy")
    smaller.fit(x, np.arange(4), verbose=0)
    smaller.save(tmp_path / "smaller.keras")
    close(keras.models.load_model(tmp_path / "smaller.keras")(x), smaller(x), 1e-6)
