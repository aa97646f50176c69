"""What a review found in the plan of what is rounded: each of these was wrong once. Biases and statistics are random here."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_kd import _taps, callbacks, export
from keras_kd.quantized import _forms
from keras_kd.quantized._plan import Plan, make_plan

RNG = np.random.default_rng(0)


def net(*parts, shape=(12, 12, 3)):
    return keras.Sequential([keras.Input(shape), *parts])


def randomised(model):
    """The model with biases and statistics that folding must get right."""
    rng = np.random.default_rng(0)
    draws = {"gamma": lambda shape: rng.choice([-1, 1], shape, p=[0.2, 0.8]) * rng.uniform(0.5, 1.5, shape)}
    draws |= {"moving_variance": lambda shape: rng.uniform(0.3, 2.0, shape)}
    draws |= dict.fromkeys(("bias", "beta", "moving_mean"), lambda shape: 0.3 * rng.normal(size=shape))
    for variable in model.variables:
        if variable.name in draws:
            variable.assign(draws[variable.name](variable.shape))
    return model


def quantized_file(model, tmp_path, *, shapes=None, quantization="int8", **options):
    """A quantised model of random biases, the report of its file, and how many steps of the range each output is off."""
    randomised(model)
    shapes = [tensor.shape[1:] for tensor in model.inputs] if shapes is None else shapes
    rng = np.random.default_rng(1)  # the same data whatever ran before
    arrays = [rng.normal(size=(128, *shape)).astype("float32") for shape in shapes]
    x = arrays if len(arrays) > 1 else arrays[0]
    quantized = callbacks.Quantization(calibration_data=x, **options).quantize(model)
    report = export.to_litert(quantized, tmp_path / "m.tflite", quantization=quantization, check_data=x)
    outputs = keras.tree.flatten(quantized.predict(x, verbose=0))
    found = export.run_litert(report.path, x)
    steps = [np.abs(a - b) / (np.ptp(b) / 255) for a, b in zip(found, outputs, strict=True)]
    return quantized, report, steps


def assert_integers_that_agree(model, tmp_path, **options):
    quantized, report, steps = quantized_file(model, tmp_path, **options)
    assert report.float_operators == ()
    assert quantized.plan.floats == []
    assert max(float(np.mean(one)) for one in steps) < 0.5
    assert max(float(np.max(one)) for one in steps) < 3
    assert report.agreement > 0.98
    return report


TAILS = {
    "bias": (True, None, ()),
    "bias, relu": (True, "relu", ()),
    "bias, ReLU": (True, None, (layers.ReLU,)),
    "ReLU": (False, None, (layers.ReLU,)),
    "norm, ReLU": (False, None, (layers.BatchNormalization, layers.ReLU)),
    "bias, norm": (True, None, (layers.BatchNormalization,)),
}


def followed(layer, tail, *arguments, **options):
    """A layer, with what may follow it."""
    use_bias, activation, after = TAILS[tail]
    return [layer(*arguments, use_bias=use_bias, activation=activation, **options), *(part() for part in after)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (layers.Conv1D, (4, 3)),
        (layers.Conv2D, (4, 3)),
        (layers.DepthwiseConv1D, (3,)),
        (layers.DepthwiseConv2D, (3,)),
        (layers.SeparableConv2D, (4, 3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_follows_a_dilated_convolution_is_a_part_of_it(layer, arguments, tail, tmp_path):
    padding = "valid" if "norm" in tail else "same"
    shape = (16, 3) if "1D" in layer.__name__ else (12, 12, 3)
    parts = followed(layer, tail, *arguments, dilation_rate=2, padding=padding)
    model = net(*parts, layers.Flatten(), layers.Dense(4), shape=shape)
    report = assert_integers_that_agree(model, tmp_path)
    convolutions = 2 if layer is layers.SeparableConv2D else 1
    assert report.operators["CONV_2D"] == convolutions
    assert {"SPACE_TO_BATCH_ND", "ADD", "MUL", "RELU"}.isdisjoint(report.operators)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Conv2D(6, 3, dilation_rate=(2, 3), groups=3, activation="relu"), (12, 12, 3)),
        (layers.Conv2D(4, (2, 4), dilation_rate=3, padding="same", activation="relu"), (11, 13, 3)),
        (layers.DepthwiseConv2D((2, 3), dilation_rate=2, depth_multiplier=2, padding="same"), (11, 13, 3)),
        (layers.Conv2D(4, 3, dilation_rate=2, data_format="channels_first", activation="relu"), (3, 12, 12)),
        (layers.Conv1D(4, 3, dilation_rate=2, padding="causal", activation="relu"), (16, 3)),
    ],
    ids=["groups", "even kernel", "multiplier", "channels first", "causal"],
)
def test_dilated_convolutions_of_any_kind_are_integers(layer, shape, tmp_path):
    layer = type(layer).from_config(layer.get_config())
    assert_integers_that_agree(net(layer, layers.Flatten(), layers.Dense(4), shape=shape), tmp_path)


def test_dilated_convolutions_of_four_bits_are_integers(tmp_path):
    model = net(
        layers.Conv2D(8, 3, dilation_rate=2, activation="relu"),
        layers.DepthwiseConv2D(3, dilation_rate=2),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
    )
    assert_integers_that_agree(model, tmp_path, quantization="int4", num_bits=4)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("operation", [ops.conv, ops.depthwise_conv], ids=["conv", "depthwise"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_dilated_convolutions_have_the_values_and_gradients_of_keras(operation, padding, jit_compile):
    x = tf.constant(RNG.normal(size=(2, 9, 10, 3)).astype("float32"))
    kernel = tf.constant(RNG.normal(size=(3, 2, 3, 2)).astype("float32"))
    options = {"strides": (1, 1), "padding": padding, "dilation_rate": (2, 3), "data_format": "channels_last"}

    def run(compute):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            outputs = compute(x, kernel)
            loss = tf.reduce_sum(outputs**2)
        return outputs, tape.gradient(loss, (x, kernel))

    ours = tf.function(lambda: run(lambda a, b: _forms._convolved(operation, a, b, options)), jit_compile=jit_compile)()
    truth = run(lambda a, b: operation(a, b, **options))
    for a, b in zip(keras.tree.flatten(ours), keras.tree.flatten(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("layer", [layers.Conv1DTranspose, layers.Conv2DTranspose])
def test_what_follows_a_transposed_convolution_is_integers(layer, tail, tmp_path):
    shape = (6, 3) if "1D" in layer.__name__ else (6, 6, 3)
    model = net(*followed(layer, tail, 4, 3, strides=2, padding="same"), layers.Flatten(), layers.Dense(4), shape=shape)
    assert "TRANSPOSE_CONV" in assert_integers_that_agree(model, tmp_path).operators


def test_a_transposed_convolution_whose_bias_is_still_zero_is_integers(tmp_path):
    model = net(layers.Conv2DTranspose(4, 3), layers.ReLU(), layers.Conv2DTranspose(4, 3, activation="relu"), shape=(6, 6, 3))
    x = RNG.normal(size=(32, 6, 6, 3)).astype("float32")
    quantized = callbacks.Quantization(calibration_data=x).quantize(model)
    assert export.to_litert(quantized, tmp_path / "m.tflite", quantization="int8", check_data=x).float_operators == ()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_over_an_axis_of_unknown_length_are_integers(padding, dilation, tail, tmp_path):
    parts = followed(layers.Conv1D, tail, 4, 3, padding=padding, dilation_rate=dilation)
    model = net(*parts, layers.GlobalAveragePooling1D(), layers.Dense(4), shape=(None, 3))
    assert_integers_that_agree(model, tmp_path, shapes=[(16, 3)])


@keras.saving.register_keras_serializable()
class Twins(keras.Model):
    """Layers of the same name, side by side and inside models of the same name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = layers.Dense(8, name="d", activation="relu"), layers.Dense(8, name="d")
        self.third, self.fourth = (
            keras.Sequential([layers.Dense(8, name="d", activation="relu"), layers.Dense(size, name="e")], name="inner")
            for size in (8, 4)
        )
        self.blocks = [layers.Dense(8, name="d", activation="relu") for _ in range(2)]
        self.another_name_of_the_first = self.first

    def call(self, x):
        x = self.second(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.fourth(self.third(x))

    def get_config(self):
        return {"name": self.name}


TWINS = ["d", "d#2", "d#3", "d#4", "inner", "inner#2", "inner#2/d", "inner#2/e", "inner/d", "inner/e"]


def twins():
    model = Twins()
    model(np.zeros((1, 6), "float32"))
    return model


def test_layers_of_the_same_name_are_all_found():
    model = twins()
    assert sorted(_taps.find_layers(model)) == TWINS
    assert _taps.find_layer(model, "d#2") is model.second
    assert _taps.find_layer(model, "inner#2/e") is model.fourth.layers[1]
    with pytest.raises(ValueError, match=r'"e" is the name of several layers.*inner/e, inner#2/e'):
        _taps.find_layer(model, "e")


def test_layers_of_the_same_name_are_all_rounded(tmp_path):
    quantized, report, _ = quantized_file(twins(), tmp_path, shapes=[(6,)])
    assert sorted(quantized.plan.bits) == [path for path in TWINS if path not in ("inner", "inner#2")]
    assert report.float_operators == ()
    quantized.save(tmp_path / "m.keras")
    x = RNG.normal(size=(8, 6)).astype("float32")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(x), quantized(x))


def test_layers_of_the_same_name_are_all_pruned_and_clustered():
    x, y = RNG.normal(size=(32, 6)).astype("float32"), RNG.integers(0, 4, size=32)
    for callback in (callbacks.Pruning(0.5), callbacks.Clustering(4)):
        model = twins()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, verbose=0, callbacks=[callback])
        kernels = [weight.numpy() for weight in model.weights if weight.name == "kernel"]
        assert len(kernels) == 8
        for kernel in kernels:
            assert np.mean(kernel == 0) == 0.5 if isinstance(callback, callbacks.Pruning) else len(np.unique(kernel)) <= 4


def test_a_plan_of_numpy_bits_can_be_written_as_json():
    model = net(layers.Dense(4, name="d"), shape=(6,))
    plan = make_plan(model, lambda path, layer: np.int64(4), np.int64(8), tf.TensorSpec((None, 6)))
    assert Plan.from_config(json.loads(json.dumps(plan.get_config()))) == plan
    assert plan.bits == {"d": 4}


OPERATIONS = {
    "relu": tf.nn.relu,
    "clip": lambda x: ops.clip(x, -1.0, 1.0),
    "uneven clip": lambda x: ops.clip(x, -0.7, 1.9),
    "pad": lambda x: ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]),
    "slice": lambda x: x[:, 1:-1, ::2],
    "concatenate": lambda x: ops.concatenate([x, x], -1),
    "flip": lambda x: ops.flip(x, 1),
    "roll": lambda x: ops.roll(x, 1, 1),
    "split": lambda x: ops.split(x, 2, -1)[1],
    "maximum": lambda x: ops.max(x, (1, 2), keepdims=True),
    "mean": lambda x: ops.mean(x, (1, 2), keepdims=True),
    "silu": tf.nn.silu,
    "sigmoid": ops.sigmoid,
    "sum": lambda x: x + 1.0,
    "pad and relu": lambda x: tf.nn.relu(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])),
    "relu and concatenation": lambda x: tf.concat([x, tf.nn.relu(x)], -1),
    "square root": lambda x: ops.sqrt(ops.abs(x)),
}


@keras.saving.register_keras_serializable()
class Own(layers.Layer):
    def __init__(self, operation, **kwargs):
        super().__init__(**kwargs)
        self.operation = operation

    def call(self, x):
        return OPERATIONS[self.operation](x)

    def get_config(self):
        return super().get_config() | {"operation": self.operation}


@keras.saving.register_keras_serializable()
class Between(keras.Model):
    def __init__(self, operation, **kwargs):
        super().__init__(**kwargs)
        self.operation = operation
        self.first, self.second, self.head = layers.Conv2D(4, 3), layers.Conv2D(4, 1), layers.Dense(4)

    def call(self, x):
        x = self.second(OPERATIONS[self.operation](self.first(x)))
        return self.head(tf.reduce_mean(x, (1, 2)))

    def get_config(self):
        return {"name": self.name, "operation": self.operation}


def made(where, operation):
    if where == "between layers":
        model = Between(operation)
        model(np.zeros((1, 12, 12, 3), "float32"))
        return model
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(4, 3)(inputs)
    x = Own(operation, name="own")(x) if where == "layer" else OPERATIONS[operation](x)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(x))))


@pytest.mark.filterwarnings("ignore:These stay in float")  # the names are looked at
@pytest.mark.parametrize("where", ["layer", "between layers", "node"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_plan_names_operations_exactly_where_the_file_computes_them_in_float(operation, where, tmp_path):
    if where == "node" and (operation in ("relu", "silu") or " and " in operation):
        pytest.skip("TensorFlow's own functions make no nodes")
    quantized, report, steps = quantized_file(made(where, operation), tmp_path, shapes=[(12, 12, 3)], quantization="auto")
    assert bool(quantized.plan.floats) == bool(report.float_operators) == (operation == "square root")
    if operation == "square root":
        names = {"layer": ["own (Own)"], "between layers": ["Abs (between layers)", "Sqrt (between layers)"]}
        assert quantized.plan.floats == names.get(where, ["absolute (Absolute)", "sqrt (Sqrt)"])
    assert np.mean(steps[0]) < 0.8
    assert np.max(steps[0]) < 4
    assert report.agreement > 0.97


@keras.saving.register_keras_serializable()
class Residual(keras.Model):
    """A block that is written in TensorFlow, but for its layers; its output is a function's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Conv2D(4, 3, padding="same") for _ in range(2)]
        self.head = layers.Dense(4)

    def call(self, x):
        x = self.parts[0](x[:, ::-1])
        x = tf.nn.relu(x + self.parts[1](tf.nn.relu(x)))
        return tf.nn.softmax(self.head(tf.reshape(x, (-1, 12 * 12 * 4))))

    def get_config(self):
        return {"name": self.name}


def test_a_residual_block_of_tensorflow_s_operations_is_integers(tmp_path):
    model = Residual()
    model(np.zeros((1, 12, 12, 3), "float32"))
    quantized, report, _ = quantized_file(model, tmp_path, shapes=[(12, 12, 3)])
    assert quantized.plan.floats == []
    assert report.max_difference < 0.05


@pytest.mark.filterwarnings("ignore:These stay in float")  # the names are looked at
def test_operations_on_the_raw_input_and_on_the_output_are_named(tmp_path):
    @keras.saving.register_keras_serializable()
    class Raw(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.head = layers.Dense(4)

        def call(self, x):
            return tf.nn.relu(self.head(x * 0.5))

        def get_config(self):
            return {"name": self.name}

    model = Raw()
    model(np.zeros((1, 6), "float32"))
    quantized, report, _ = quantized_file(model, tmp_path, shapes=[(6,)], quantization="auto")
    assert quantized.plan.floats == ["Mul (between layers)", "Relu (between layers)"]
    assert report.float_operators == ("MUL", "RELU")


@pytest.mark.filterwarnings("ignore:These stay in float")  # TimeDistributed
def test_a_batch_normalisation_inside_of_another_layer_is_frozen_too():
    norm = layers.BatchNormalization()
    model = net(layers.TimeDistributed(norm), layers.Flatten(), layers.Dense(3), shape=(4, 2))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = 3 + RNG.normal(size=(64, 4, 2)).astype("float32"), np.arange(64) % 3
    means = []
    for freeze_step in (None, 0):
        for _ in range(2):
            model.fit(x[:16], y[:16], verbose=0, callbacks=[callbacks.Quantization(freeze_step=freeze_step, calibration_data=x)])
            means.append(norm.moving_mean.numpy())
    assert not np.array_equal(means[0], means[1])
    np.testing.assert_array_equal(means[1], means[2])
    np.testing.assert_array_equal(means[2], means[3])


def test_outputs_that_other_layers_read_too_are_integers(tmp_path):
    inputs = keras.Input((12, 12, 3))
    first = layers.Conv2D(4, 3)(inputs)
    second = layers.BatchNormalization()(first)
    head = layers.Dense(4)(layers.GlobalAveragePooling2D()(layers.ReLU()(second)))
    quantized, report, steps = quantized_file(keras.Model(inputs, [head, first, second]), tmp_path)
    assert report.float_operators == ()
    assert quantized.plan.floats == []
    assert max(float(np.mean(one)) for one in steps) < 0.5
