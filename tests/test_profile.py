"""A profile counts weights, multiplications and memory as brute force does, and measures files and time."""

import contextlib
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import _taps, export, profile
from tests.conftest import classifier


def sequential(shape, *parts, **options):
    return keras.Sequential([keras.Input(shape, **options), *parts])


def macs_of(model, **options):
    return profile.profile(model, runs=1, **options).macs


def macs_by_tensorflow(model):
    """Half of the float operations of products and convolutions that TensorFlow's own profiler counts."""
    specs = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    graph = tf.function(lambda *x: model(list(x) if len(x) > 1 else x[0], training=False)).get_concrete_function(*specs).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    found = tf.compat.v1.profiler.profile(graph, options=options)
    assert not [node for node in graph.get_operations() if "Call" in node.type or "While" in node.type], "it sees no functions"
    kinds = {node.name: node.type for node in graph.get_operations()}

    def total(node):
        own = node.float_ops if kinds.get(node.name, "") in COUNTED else 0
        return own + sum(total(child) for child in node.children)

    return total(found) // 2


COUNTED = {"MatMul", "BatchMatMulV2", "Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3D"}


def built(model, *inputs):
    model(*inputs)
    return model


def adapted(model):
    model.layers[0].enable_lora(2)
    return model


def attending(layer, shape=(6, 8)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs, inputs) if isinstance(layer, ATTENTION) else layer([inputs, inputs]))


ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: sequential((7,), layers.Dense(5)), 7 * 5),
        (lambda: sequential((3, 7), layers.Dense(5)), 3 * 7 * 5),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, strides=2)), 4 * 4 * 6 * 3 * 3 * 4),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, padding="same", groups=2)), 81 * 6 * 9 * 2),
        (lambda: sequential((9, 9, 4), layers.Conv2D(6, 3, dilation_rate=2)), 25 * 6 * 9 * 4),
        (lambda: sequential((9, 4), layers.Conv1D(6, 3)), 7 * 6 * 3 * 4),
        (lambda: sequential((5, 5, 5, 2), layers.Conv3D(3, 2)), 64 * 3 * 8 * 2),
        (lambda: sequential((9, 9, 4), layers.DepthwiseConv2D(3, depth_multiplier=2)), 49 * 8 * 9),
        (lambda: sequential((9, 9, 4), layers.SeparableConv2D(6, 3)), 49 * 4 * 9 + 49 * 4 * 6),
        (lambda: sequential((5, 5, 4), layers.Conv2DTranspose(6, 3, strides=2)), 25 * 9 * 4 * 6),
        (lambda: sequential((5, 8), layers.EinsumDense("abc,cd->abd", (5, 3))), 5 * 8 * 3),
        (lambda: sequential((6, 3), layers.LSTM(4)), 6 * (3 * 16 + 4 * 16)),
        (lambda: sequential((6, 3), layers.GRU(4)), 6 * (3 * 12 + 4 * 12)),
        (lambda: sequential((6, 3), layers.Bidirectional(layers.SimpleRNN(4))), 2 * 6 * (3 * 4 + 4 * 4)),
        (lambda: sequential((9, 4), layers.Conv1D(6, 3, padding="causal", dilation_rate=2)), 9 * 6 * 3 * 4),
        (lambda: sequential((9, 4), layers.Conv1D(6, 3, groups=2)), 7 * 6 * 3 * 2),
        (lambda: sequential((4, 9, 9), layers.Conv2D(6, 3, data_format="channels_first")), 49 * 6 * 9 * 4),
        (lambda: sequential((5, 5, 5, 2), layers.Conv3D(3, 2, dilation_rate=2)), 27 * 3 * 8 * 2),
        (lambda: sequential((9, 4), layers.DepthwiseConv1D(3, strides=2)), 4 * 4 * 3),
        (lambda: sequential((9, 10, 4), layers.DepthwiseConv2D(3, dilation_rate=2, padding="same")), 90 * 4 * 9),
        (lambda: sequential((9, 4), layers.SeparableConv1D(6, 3, dilation_rate=2)), 5 * 4 * 3 + 5 * 4 * 6),
        (lambda: sequential((7, 2), layers.Conv1DTranspose(3, 4, strides=2)), 7 * 4 * 2 * 3),
        (lambda: sequential((4, 4, 4, 2), layers.Conv3DTranspose(3, 3, strides=2)), 64 * 27 * 2 * 3),
        (lambda: sequential((5, 8), layers.EinsumDense("abc,cde->abde", (5, 2, 3))), 5 * 8 * 2 * 3),
        (lambda: sequential((5, 6, 8), layers.EinsumDense("...x,xy->...y", 3)), 5 * 6 * 8 * 3),
        (lambda: sequential((6, 3), layers.GRU(4, unroll=True, reset_after=False)), 6 * (3 * 12 + 4 * 12)),
        (lambda: sequential((6, 3), layers.RNN([layers.LSTMCell(4), layers.GRUCell(2)])), 6 * (7 * 16 + (4 + 2) * 6)),
        (lambda: sequential((4, 5, 5, 1), layers.ConvLSTM2D(3, 3)), 4 * 9 * 9 * (1 + 3) * 12),
        (lambda: sequential((6, 3), layers.TimeDistributed(layers.Dense(4))), 6 * 3 * 4),
        (lambda: sequential((2, 6, 3), layers.TimeDistributed(layers.LSTM(4))), 2 * 6 * (3 * 16 + 4 * 16)),
        (lambda: sequential((8, 8, 3), layers.SpectralNormalization(layers.Conv2D(6, 3))), 36 * 9 * 3 * 6),
        (lambda: adapted(sequential((9, 9, 4), layers.Conv2D(6, 3))), 49 * 6 * 9 * 4 + 9 * 4 * 2 * 6),
        (lambda: sequential((6, 8), layers.Lambda(lambda x: x @ tf.ones((8, 2)))), 6 * 8 * 2),
        (lambda: sequential((6,), layers.Embedding(10, 4), layers.LayerNormalization(), dtype="int32"), 0),
        (lambda: sequential((8, 8, 3), layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(2)), 0),
    ],
)
def test_multiplications_are_those_of_the_formula(model, expected):
    assert macs_of(model()) == expected


@pytest.mark.parametrize(
    ("layer", "projections", "products"),
    [
        (lambda: layers.MultiHeadAttention(2, 4), 4 * 6 * 8 * 8, 2 * (6 * 6 * 2 * 4)),
        (lambda: layers.GroupQueryAttention(4, 4, 2), 2 * 6 * 8 * 16 + 2 * 6 * 8 * 8, 2 * (6 * 6 * 4 * 4)),
        (lambda: layers.Attention(), 0, 2 * (6 * 6 * 8)),
    ],
)
def test_attention_counts_its_products_with_the_scores(layer, projections, products):
    assert macs_of(attending(layer())) == projections + products


def test_what_attention_multiplies_itself_stands_in_its_row_and_its_projections_in_theirs():
    found = profile.profile(attending(layers.MultiHeadAttention(2, 4, name="mha")), runs=1)
    rows = {layer.path: layer.macs for layer in found.layers}
    projections = dict.fromkeys(("mha/query", "mha/key", "mha/value", "mha/attention_output"), 6 * 8 * 8)
    assert rows == {"mha": 2 * (6 * 6 * 2 * 4), **projections}


def convolutional():
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="first")(inputs)
    y = layers.DepthwiseConv2D(3, padding="same", name="spatial")(x)
    x = layers.Add(name="add")([x, layers.Conv2D(8, 1, name="point")(layers.ReLU(name="relu")(y))])
    return keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten(name="flat")(x)))


@pytest.mark.parametrize(
    "make",
    [
        convolutional,
        lambda: classifier(9),
        lambda: sequential((6, 4), layers.Conv1D(3, 2), layers.Dense(5)),
        lambda: sequential((6, 6, 4), layers.SeparableConv2D(3, 2), layers.Conv2DTranspose(2, 3, padding="same", strides=2)),
        lambda: sequential((6, 6, 6, 2), layers.Conv3D(3, 2, strides=2), layers.Flatten(), layers.Dense(3)),
        lambda: sequential((6, 4), layers.GRU(3, unroll=True)),
        lambda: sequential((6, 8), layers.EinsumDense("abc,cd->abd", (6, 3))),
        lambda: attending(layers.Attention()),
        lambda: keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=5),
    ],
)
def test_multiplications_are_those_of_tensorflows_profiler(make):
    model = make()
    assert macs_of(model) == macs_by_tensorflow(model) > 0


class Own(keras.Model):
    """A model whose `call` is a function of itself and its inputs, with a layer "dense" of 4 units."""

    def __init__(self, function):
        super().__init__()
        self.dense = layers.Dense(4, name="dense")
        self.function = function

    def call(self, x):
        return self.function(self, x)


def repeated(model, x, turns):
    return tf.while_loop(lambda i, x: i < turns, lambda i, x: (i + 1, model.dense(x)), (0, x))[1]


def until_ten(model, x):
    """Adds 1 until the first value is 10: how often, only the values tell."""
    return tf.while_loop(lambda x: x[0, 0] < 10, lambda x: (x + 1 + 0 * model.dense(x),), (x,))[0]


def test_shared_nested_and_subclassed_layers_are_counted_at_every_call():
    shared, inputs = layers.Dense(4, name="shared"), keras.Input((4,))
    inner = keras.Model(inputs, shared(shared(inputs)), name="inner")

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = inner
            self.scale = self.add_weight(shape=(4, 2), name="scale")

        def call(self, x):
            return tf.matmul(self.inner(x), self.scale)

    found = profile.profile(built(Outer(), np.ones((2, 4), "float32")), runs=1)
    rows = {layer.path: layer for layer in found.layers}
    assert rows["inner/shared"].macs == 2 * 16
    assert (rows["(model)"].macs, rows["(model)"].parameters) == (8, 8)
    assert found.macs == 40
    assert sum(layer.parameters for layer in found.layers) == found.parameters == 28


X = np.full((2, 4), 3, "float32")


@pytest.mark.parametrize(
    ("function", "turns"),
    [
        (lambda model, x: repeated(model, x, 7), 7),
        (until_ten, 7),
        (lambda model, x: repeated(model, x, 0), 0),
        (lambda model, x: tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: model.dense(x)), 1),
        (lambda model, x: tf.function(model.dense)(x), 1),
    ],
)
def test_loops_count_their_turns_conditions_their_larger_branch_and_functions_what_is_in_them(function, turns):
    found = profile.profile(built(Own(function), X), data=X, runs=1)
    assert (found.macs, found.uncounted) == (turns * 16, ())


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: tf.function(lambda x: repeated(model, x, 7))(x),
        lambda model, x: tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, repeated(model, x, 7)), (0, x))[1],
        lambda model, x: tf.ensure_shape(tf.numpy_function(np.sin, [model.dense(x)], tf.float32), (None, 4)),
    ],
)
def test_what_cannot_be_counted_is_named(function):
    found = profile.profile(built(Own(function), X), data=X, runs=1)
    assert found.uncounted == ("(model)",)
    assert "not counted" in found.table()
    assert f"at least {found.macs}" in found.table()


def test_what_the_outputs_do_not_need_is_not_counted():
    def twice(model, x):
        model.dense(x + 1)
        return model.dense(x)

    assert macs_of(built(Own(twice), X)) == 16


def test_layers_that_are_never_called_have_rows_with_their_weights():
    model = Own(lambda model, x: model.dense(x))
    model.spare = layers.Dense(3, name="spare")
    model.spare.build((None, 5))
    found = profile.profile(built(model, X), runs=1)
    rows = {layer.path: (layer.output_shape, layer.parameters, layer.macs) for layer in found.layers}
    assert rows == {"dense": ((1, 4), 20, 16), "spare": (None, 18, 0)}


def test_lengths_that_values_decide_are_those_of_the_sample():
    def positive(model, x):
        return model.dense(tf.boolean_mask(x, x[..., 0] > 0))

    data = np.array([[1] * 4, [-1] * 4, [2] * 4, [0] * 4, [3] * 4], "float32")[None]
    found = profile.profile(built(Own(positive), data), data=data, runs=1)
    assert (found.macs, found.layers[0].output_shape) == (3 * 16, (3, 4))


def test_zeros_are_not_counted_among_the_nonzero_weights():
    model = classifier(5)
    kernel = model.layers[0].kernel.numpy()
    kernel[:2] = 0
    model.layers[0].kernel.assign(kernel)
    found = profile.profile(model, runs=1)
    expected = sum(np.count_nonzero(weight) for weight in model.get_weights())
    assert found.nonzero_parameters == sum(layer.nonzero_parameters for layer in found.layers) == expected
    assert found.parameters == model.count_params()


def peak_of(model, **options):
    return profile.profile(model, runs=1, **options).peak_activation_bytes


def test_memory_is_the_largest_sum_of_tensors_that_live_together():
    image, map_ = 12 * 12 * 3 * 4, 6 * 6 * 8 * 4
    # first: image and map. spatial: its output beside the map, which the sum needs later; relu and point: one more at a time.
    assert peak_of(convolutional()) == max(image + map_, 3 * map_)


def executed(model, parts):
    """Indices of the layers in the order in which Keras calls them."""
    order = []

    def note(index):
        return lambda call, *args, **kwargs: order.append(index) or call(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(parts[1:], 1):
            stack.enter_context(_taps.replace(layer, note(index)))
        model(np.ones((1, *model.input_shape[1:])))
    return order


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_that_of_a_simulation_that_frees_what_nobody_reads_any_more(seed):
    rng = np.random.default_rng(seed)
    tensors, sizes, reads = [keras.Input((5,))], [5], []
    for _ in range(12):
        chosen = sorted({int(i) for i in rng.integers(0, len(tensors), 2)})
        units = int(rng.integers(1, 40))
        merged = layers.Concatenate()([tensors[i] for i in chosen]) if len(chosen) > 1 else None
        if merged is not None:
            reads.append(chosen)
            tensors.append(merged)
            sizes.append(sum(sizes[i] for i in chosen))
            chosen = [len(tensors) - 1]
        tensors.append(layers.Dense(units)(tensors[chosen[0]]))
        sizes.append(units)
        reads.append(chosen)
    unread = [i for i in range(len(tensors)) if not any(i in read for read in reads)]
    model = keras.Model(tensors[0], [tensors[i] for i in unread])
    order = executed(model, [tensor._keras_history.operation for tensor in tensors])
    made, peak = {0}, 0
    for step, i in enumerate(order):
        later = {j for k in order[step:] for j in reads[k - 1]}
        made = {j for j in made if j in later or j in unread} | {i}
        peak = max(peak, 4 * sum(sizes[j] for j in made))
    assert peak_of(model) == peak


def test_views_share_the_memory_of_what_they_show():
    model = sequential((100,), layers.Reshape((10, 10)), layers.Flatten(), layers.Dropout(0.5), layers.Dense(1))
    found = profile.profile(model, runs=1)
    assert found.peak_activation_bytes == 4 * (100 + 1)
    assert [layer.activation_bytes for layer in found.layers] == [0, 0, 0, 4]


def test_sums_between_layers_take_memory_as_layers_of_sums_do():
    inputs = keras.Input((50,))
    hidden = layers.Dense(50)(inputs)
    by_layer = keras.Model(inputs, layers.Dense(1)(layers.Add()([layers.Dense(50)(hidden), hidden])))
    by_operator = keras.Model(inputs, layers.Dense(1)(layers.Dense(50)(hidden) + hidden))

    class Residual(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(50), layers.Dense(50), layers.Dense(1)]

        def call(self, x):
            x = self.parts[0](x)
            return self.parts[2](self.parts[1](x) + x)

    models = (by_layer, by_operator, built(Residual(), np.ones((1, 50), "float32")))
    assert [peak_of(model) for model in models] == [3 * 50 * 4] * 3


def test_the_scores_of_attention_take_memory():
    scores, inputs, values = 2 * 30 * 30 * 4, 30 * 8 * 4, 30 * 8 * 4
    model = attending(layers.MultiHeadAttention(2, 4), (30, 8))  # the softmax reads scores and gives as many
    assert peak_of(model) == 2 * scores + values
    summed = keras.Model(model.inputs, layers.Add()([model.outputs[0], model.inputs[0]]))
    assert peak_of(summed) == 2 * scores + values + inputs


def test_memory_is_counted_in_the_types_that_flow():
    model = keras.Sequential([keras.Input((100,)), *(layers.Dense(100, dtype="mixed_float16") for _ in range(3))])
    assert peak_of(model) == 100 * (4 + 2)  # the inputs and their copy in half precision
    assert [layer.activation_bytes for layer in profile.profile(model, runs=1).layers][:3] == [200] * 3


def test_the_states_of_a_stateful_layer_are_put_back():
    model = keras.Sequential([keras.Input(batch_shape=(1, 5, 3)), layers.LSTM(4, stateful=True)])
    model(np.ones((1, 5, 3), "float32"))
    former = [variable.numpy() for variable in model.variables]
    assert macs_of(model) == 5 * (3 * 16 + 4 * 16)
    for before, variable in zip(former, model.variables, strict=True):
        np.testing.assert_array_equal(before, variable.numpy())


def test_one_call_gives_a_dict_for_json_and_a_table_with_a_row_for_each_layer(tmp_path):
    model = convolutional()
    report = export.to_litert(model, tmp_path / "m.tflite")
    found = profile.profile(keras_kd.Distiller(convolutional(), model), report.path, runs=5, threads=2)
    loaded = json.loads(json.dumps(found.as_dict()))
    assert loaded["size"] == report.size
    assert loaded["gzip_size"] == report.gzip_size
    assert loaded["latency"]["threads"] == 2
    assert loaded["latency"]["runs"] == loaded["keras_latency"]["runs"] == 5
    assert [layer["path"] for layer in loaded["layers"]][:2] == ["first", "spatial"]
    lines = found.table().splitlines()
    for path in ("first", "spatial", "relu", "point", "add", "flat", "head"):
        assert any(line.startswith(path) for line in lines)
    assert f"{found.macs:,}" in next(line for line in lines if line.startswith("all"))
    assert "2 threads" in lines[-2]
    assert str(found) == found.table()


def test_the_table_is_plain_text_on_terminals_too(monkeypatch):
    model = sequential((4,), layers.Dense(3, name="a_long_name" * 20))
    plain = profile.profile(model, runs=1)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert plain.table().isprintable() is False  # lines
    assert "\x1b" not in plain.table()
    assert "a_long_name" * 20 in plain.table()


def test_without_a_file_there_are_no_numbers_of_one():
    found = profile.profile(classifier(3), runs=1)
    assert (found.size, found.gzip_size, found.latency) == (None, None, None)
    assert 0 < found.keras_latency.low <= found.keras_latency.median <= found.keras_latency.high


def test_unknown_lengths_are_taken_from_data_and_asked_for_without():
    model = sequential((None, 3), layers.Conv1D(2, 2, padding="same"), layers.GlobalAveragePooling1D())
    with pytest.raises(ValueError, match=r"unknown lengths. Received: data=None, inputs of shapes \(None, None, 3\). Pass `data`"):
        profile.profile(model)
    assert macs_of(model, data=np.zeros((4, 7, 3), "float32")) == 7 * 2 * 2 * 3


def test_a_file_of_unknown_lengths_is_timed_on_those_of_the_data(tmp_path, monkeypatch):
    tokens, numbers = keras.Input((None,), dtype="int32", name="z"), keras.Input((None, 3), name="a")
    pooled = [layers.GlobalAveragePooling1D()(x) for x in (layers.Embedding(9, 2)(tokens), numbers)]
    model = keras.Model([tokens, numbers], layers.Dense(2)(layers.Concatenate()(pooled)))
    data = {"a": np.ones((2, 5, 3)), "z": np.arange(14).reshape(2, 7) % 9}
    given = [data["z"], data["a"]]
    report = export.to_litert(model, tmp_path / "m.tflite", check_data=given)
    seen = []
    times = profile._times
    monkeypatch.setattr(profile, "_times", lambda once, *args: seen.append(once) or times(once, *args))
    profile.profile(model, report.path, data=data, runs=1)
    interpreter = seen[-1].__self__
    arrays = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_input_details()]
    by_rank = sorted(arrays, key=lambda array: array.ndim)
    for array, expected in zip(by_rank, given, strict=True):
        np.testing.assert_array_equal(array, expected[:1])


def test_a_file_of_another_model_is_named(tmp_path):
    report = export.to_litert(classifier(3), tmp_path / "m.tflite")
    with pytest.raises(ValueError, match=r"must take the model's inputs. Received: inputs of shapes \[\(1, 5\)\]"):
        profile.profile(classifier(3, features=5), report.path, runs=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3.0, r"`data` must be an array of samples.* Received: float of shapes \[\(\)\]"),
        ("x", "`data` must be an array of samples"),
        ([], "`data` must be an array of samples"),
        (np.empty((0, 4)), "`data` must be an array of samples"),
        (np.ones((2, 5)), r"`data` must be inputs of .*: of shapes \[\(4,\)\] a sample. Received: \[\(5,\)\]"),
        ([np.ones((2, 4)), np.ones((2, 4))], "`data` must be inputs of"),
    ],
)
def test_data_that_are_no_inputs_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        profile.profile(classifier(3), data=data, runs=1)


def test_a_subclassed_model_of_several_inputs_is_measured_on_data():
    model = Own(lambda model, x: {"y": model.dense(x["a"]) + model.dense(x["b"])})
    data = {"a": np.ones((2, 3)), "b": np.ones((2, 3))}
    built(model, data)
    with pytest.raises(ValueError, match="Received: data=None, a subclassed model. Pass `data`"):
        profile.profile(model)
    assert macs_of(model, data=data) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: profile.profile("model"), TypeError, "`model` must be a keras.Model"),
        (lambda: profile.profile(keras.Sequential([layers.Dense(3)])), ValueError, "`model` must be built"),
        (lambda: profile.profile(classifier(3), runs=0), ValueError, "`runs` must be at least 1. Received: runs=0"),
        (lambda: profile.profile(classifier(3), "nowhere.tflite"), FileNotFoundError, 'Received: path="nowhere.tflite"'),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_zeros_are_counted_in_the_weights_that_pruning_works_on(tmp_path):
    model = sequential((12,), layers.Dense(16), layers.BatchNormalization(), layers.Dense(3))
    model.compile("sgd", "mse")
    logged = model.fit(np.ones((8, 12)), np.ones((8, 3)), verbose=0, callbacks=[keras_kd.callbacks.Pruning(0.5)]).history
    model.trainable = False  # frozen, as a teacher is: its zeros are there all the same
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras"), keras.Sequential([keras.Input((12,)), model])):
        found = profile.profile(each, runs=1, verbose=0)
        assert found.sparsity == found.as_dict()["sparsity"] == logged["sparsity"][-1] == 0.5
        assert "Zeros in kernels: 50.0%" in str(found)


def test_biases_that_are_0_are_no_sparsity():
    found = profile.profile(sequential((4,), layers.Dense(3), layers.BatchNormalization()), runs=1, verbose=0)
    assert found.nonzero_parameters < found.parameters
    assert found.sparsity == 0.0
    assert "Zeros" not in str(found)
    assert profile.profile(sequential((4,), layers.ReLU()), runs=1, verbose=0).sparsity == 0.0
