"""Quantization: TF-MOT's rounding, training sees what the quantised model computes, however it runs, and no trace afterwards."""

import functools
import shutil
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import _tfmot, callbacks
from keras_kd.quantized import QuantizedModel, _quantizers
from tests.conftest import KillAtEpoch, KilledError, classifier, two_devices
from tests.references import fake_quantize

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8, 8, 2)).astype("float32"), RNG.integers(0, 3, size=64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def conv_net(**options):
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, use_bias=False, name="conv", **options),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )


def compiled(model=None, optimizer=None, **options):
    model = conv_net() if model is None else model
    model.compile(optimizer or keras.optimizers.SGD(0.05), LOSS, **options)
    return model


def fit(model, *given, **options):
    return model.fit(
        X, Y, **{"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0} | options, callbacks=list(given)
    ).history


# The rounding


def real_variables(quantizer, shape):
    class Layer:
        def add_weight(self, name, initializer, trainable, shape=None):
            return tf.Variable(tf.zeros(() if shape is None else shape), trainable=trainable)

    return quantizer.build(shape, "x", Layer())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("shape", "mode"), [((5, 6), "tensor"), ((3, 3, 2, 6), "channel"), ((3, 4, 2), "tensor")])
def test_kernels_and_their_gradients_are_rounded_as_by_tf_mot(shape, mode, bits):
    quantizers = _tfmot.load_part("quantization.keras.quantizers")
    theirs = quantizers.LastValueQuantizer(bits, per_axis=mode == "channel", symmetric=True, narrow_range=True)
    weights = real_variables(theirs, shape)
    kernel, upstream = tf.constant(RNG.normal(size=shape).astype("float32")), RNG.normal(size=shape).astype("float32")
    found = []
    for function in (lambda x: _quantizers.round_kernel(x, bits, mode), lambda x: theirs(x, True, weights)):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            rounded = function(kernel)
            loss = tf.reduce_sum(rounded * upstream)
        found.append((rounded.numpy(), tape.gradient(loss, kernel).numpy()))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    limit = np.abs(kernel.numpy()).max() if mode == "tensor" else np.abs(kernel.numpy()).max((0, 1, 2))
    inner = np.abs(kernel.numpy()) < limit  # at the limit itself, TF-MOT's may see a clipped weight
    np.testing.assert_array_equal(found[1][1][inner], upstream[inner])
    np.testing.assert_array_equal(found[0][1], upstream)  # straight through


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_as_by_tf_mot_and_as_the_formula_says(bits):
    x = tf.constant(RNG.normal(size=(50,)).astype("float32") * 3)
    quantizers = _tfmot.load_part("quantization.keras.quantizers")
    theirs = quantizers.MovingAverageQuantizer(bits, per_axis=False, symmetric=False, narrow_range=False)
    limits = {"min_var": tf.Variable(-1.3), "max_var": tf.Variable(2.9)}
    found = _quantizers.round_tensor(x, tf.constant(-1.3), tf.constant(2.9), bits)
    np.testing.assert_array_equal(found, theirs(x, False, limits))
    np.testing.assert_allclose(found, fake_quantize(x.numpy(), -1.3, 2.9, bits), atol=1e-6)


def test_equal_ranges_are_one_range_written_for_every_channel():
    kernel = tf.constant(RNG.normal(size=(3, 3, 2, 4)).astype("float32"))
    np.testing.assert_array_equal(_quantizers.round_kernel(kernel, 8, "equal"), _quantizers.round_kernel(kernel, 8, "tensor"))


def test_a_kernel_or_channel_of_zeros_stays_zero():
    kernel = RNG.normal(size=(3, 3, 2, 4)).astype("float32")
    kernel[..., 1] = 0
    for mode in ("tensor", "channel", "equal"):
        rounded = _quantizers.round_kernel(tf.constant(kernel), 8, mode).numpy()
        assert np.all(rounded[..., 1] == 0)
        assert np.all(np.isfinite(rounded))
        assert np.all(_quantizers.round_kernel(tf.zeros((3, 3, 2, 4)), 8, mode) == 0)


# What training sees


def by_channel(kernel, axis):
    parts = [(part, np.abs(part).max()) for part in np.moveaxis(kernel, axis, 0)]
    return np.stack([fake_quantize(part, -high, high, 8, narrow=True) for part, high in parts], axis)


def reference(model, x, ranges):
    """The quantised network by hand, from NumPy's rounding and Keras' float operations."""
    conv, norm, depthwise, head = (model.get_layer(name) for name in ("conv", "norm", "depthwise", "head"))
    kernels = [np.asarray(layer.kernel) for layer in (conv, depthwise, head)]
    first = by_channel(kernels[0], 3)
    second = by_channel(kernels[1], 2)
    h = np.abs(kernels[2]).max()
    third = fake_quantize(kernels[2], -h, h, 8, narrow=True)
    x = fake_quantize(x, *ranges["input 0 of conv"], 8)
    x = norm(keras.ops.conv(x.astype("float32"), first.astype("float32")), training=False)
    x = fake_quantize(np.maximum(x, 0), *ranges["relu"], 8)
    x = keras.ops.depthwise_conv(x.astype("float32"), second.astype("float32")) + depthwise.bias
    x = fake_quantize(np.asarray(x), *ranges["depthwise"], 8).reshape(len(x), -1)
    return fake_quantize(x @ third + np.asarray(head.bias), *ranges["head"], 8)


def test_the_quantised_model_computes_the_formula():
    model, quantization = compiled(), callbacks.Quantization()
    fit(model, quantization)
    ranges = quantization.activation_ranges()
    assert list(ranges) == ["input 0 of conv", "relu", "depthwise", "head"]
    expected, step = reference(model, X, ranges), (ranges["head"][1] - ranges["head"][0]) / 255
    found = quantization.quantized_model().predict(X, verbose=0)
    assert np.mean(np.abs(found - expected) > 0.01 * step) < 0.02  # where a value lies between two integers, float32 may decide
    assert np.abs(found - expected).max() < 1.5 * step + 0.02


def test_ranges_are_means_of_the_first_batches_and_then_moving_averages():
    model, quantization = compiled(optimizer=keras.optimizers.SGD(0.0)), callbacks.Quantization(momentum=0.75)
    fit(model, quantization, epochs=2)
    low, high = 0.0, 0.0
    for step in range(8):
        batch = X[16 * (step % 4) : 16 * (step % 4) + 16]
        rate = max(0.25, 1 / (step + 1))
        low, high = low + (min(batch.min(), 0) - low) * rate, high + (max(batch.max(), 0) - high) * rate
    np.testing.assert_allclose(quantization.activation_ranges()["input 0 of conv"], (low, high), rtol=1e-5)


def test_validation_sees_what_the_quantised_model_computes_and_the_model_itself_stays_plain():
    model, quantization = compiled(metrics=["accuracy"]), callbacks.Quantization(num_bits=3, activation_bits=4)
    history = fit(model, quantization, validation_data=(X, Y))
    quantized = quantization.quantized_model()
    quantized.compile("sgd", LOSS, metrics=["accuracy"])
    loss, accuracy = quantized.evaluate(X, Y, batch_size=16, verbose=0)
    assert loss == pytest.approx(history["val_loss"][-1], rel=1e-6)
    assert accuracy == history["val_accuracy"][-1]
    plain = model.evaluate(X, Y, verbose=0, return_dict=True)["loss"]
    assert plain != pytest.approx(loss, rel=1e-4)
    np.testing.assert_array_equal(model(X), conv_like(model)(X))


def conv_like(model):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


def test_training_goes_down_the_straight_through_gradient():
    model = compiled(keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)]))
    model.optimizer.learning_rate = 1.0
    x, y, before = X[:16, 0, :2].reshape(16, 4), Y[:16], model.layers[0].kernel.numpy()
    quantization = callbacks.Quantization(momentum=0.0)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[quantization])
    high = np.abs(before).max()
    kernel = fake_quantize(before, -high, high, 8, narrow=True)
    inputs = fake_quantize(x, min(x.min(), 0), max(x.max(), 0), 8)
    linear = inputs @ kernel
    logits = fake_quantize(linear, min(linear.min(), 0), max(linear.max(), 0), 8)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    upstream = (probabilities - np.eye(3)[y]) / 16
    low, top = nudged(min(linear.min(), 0), max(linear.max(), 0), 8)
    upstream = np.where((linear >= low) & (linear <= top), upstream, 0)  # TensorFlow's op gives clipped values no gradient
    np.testing.assert_allclose(model.layers[0].kernel, before - inputs.T @ upstream, atol=2e-3)


def nudged(low, high, bits):
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return -zero * step, (2**bits - 1 - zero) * step


@functools.cache
def trained_by(optimizer, options=()):
    """What training with these options of an optimizer and of `compile` ends in: weights, ranges, loss."""
    keras.utils.set_random_seed(1)
    model, quantization = compiled(None, keras.optimizers.SGD(0.05, **dict(optimizer)), **dict(options)), callbacks.Quantization()
    history = fit(model, quantization, validation_data=(X, Y))
    return model.get_weights(), list(quantization.activation_ranges().values()), history["val_loss"][-1]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ({}, {"run_eagerly": True}),
        ({}, {"jit_compile": True}),
        ({}, {"steps_per_execution": 4}),
        ({"gradient_accumulation_steps": 2}, {}),
        ({"use_ema": True}, {"steps_per_execution": 16}),
        ({"weight_decay": 0.01, "global_clipnorm": 1.0}, {}),
    ],
    ids=str,
)
def test_every_way_to_run_a_step_gives_the_same_ranges_and_weights(optimizer, options):
    found = [trained_by(tuple(optimizer.items())), trained_by(tuple(optimizer.items()), tuple(options.items()))]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2)  # a value between two integers may go either way
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-2)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_rounds_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = conv_net()
    finally:
        keras.config.set_dtype_policy("float32")
    quantization = callbacks.Quantization()
    fit(compiled(model), quantization)
    assert [len(calls) for calls in quantization._rounding.plan.spots.values()] == [1] * 6
    assert list(quantization.activation_ranges()) == ["input 0 of conv", "relu", "depthwise", "head"]
    assert quantization._rounding.ranges.limits.dtype == "float32"


def test_two_devices_train_with_rounding_and_keep_one_set_of_ranges():
    with two_devices().scope():
        model = compiled()
    quantization = callbacks.Quantization()
    history = fit(model, quantization, epochs=4)
    assert history["loss"][-1] < history["loss"][0]
    halves = [(min(X[i : i + 8].min(), 0), X[i : i + 8].max()) for i in range(0, 64, 8)]
    found = quantization.activation_ranges()["input 0 of conv"]
    np.testing.assert_allclose(found, np.mean(halves, 0), rtol=1e-3)
    assert quantization.quantized_model()(X[:2]).shape == (2, 3)


# When


class Look(keras.callbacks.Callback):
    """The loss of each batch, the moving mean and the ranges after it."""

    def __init__(self, quantization):
        super().__init__()
        self.quantization, self.means, self.ranges = quantization, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(self.model.get_layer("norm").moving_mean.numpy())
        self.ranges.append(np.array(self.quantization._rounding.ranges.limits))


def test_rounding_starts_at_its_step_and_freezes_at_its_step():
    model, quantization = compiled(), callbacks.Quantization(start_step=3, freeze_step=5)
    look, plain = Look(quantization), compiled(conv_like(model))
    plain.set_weights(model.get_weights())
    means = Look(callbacks.Quantization())
    means.quantization._rounding = type("", (), {"ranges": type("", (), {"limits": 0})})
    fit(plain, means)
    fit(model, quantization, look)
    assert np.all(look.ranges[2] == 0)
    assert np.any(look.ranges[3] != 0)
    np.testing.assert_array_equal(look.means[2], means.means[2])  # trained as ever
    assert np.any(look.ranges[4] != look.ranges[3])
    for later in range(5, 8):
        np.testing.assert_array_equal(look.ranges[later], look.ranges[4])
        np.testing.assert_array_equal(look.means[later], look.means[4])


def test_a_freeze_step_that_is_over_already_measures_ranges_in_one_step_first():
    model, quantization = compiled(), callbacks.Quantization(freeze_step=0)
    look = Look(quantization)
    fit(model, callbacks.Clustering(4), quantization, look)
    assert np.any(look.ranges[0] != 0)
    for later in look.ranges[1:]:
        np.testing.assert_array_equal(later, look.ranges[0])
    assert quantization.quantized_model().channels_together == ["conv", "depthwise", "head"]


def test_a_fit_that_never_came_to_rounding_is_not_taken_for_one(tmp_path):
    model, quantization = compiled(), callbacks.Quantization(start_step=1000)
    with pytest.warns(UserWarning, match="begins to round at optimizer step 1000"):
        fit(model, quantization)
    with pytest.raises(RuntimeError, match="There are no ranges yet"):
        quantization.quantized_model()
    assert keras_kd.export.to_litert(model, tmp_path / "m.tflite").quantization == "float32"


def dense(accumulated=None, **options):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulated), "mse", run_eagerly=True, **options)
    return model


def short_fit(model, quantization, samples=32, **options):
    """Batches of 4; gives the warnings and whether something was rounded."""
    x, y = np.ones((samples, 4), "float32"), np.ones((samples, 2), "float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, **{"batch_size": 4, "verbose": 0, "callbacks": [quantization]} | options)
    return [str(one.message) for one in caught if "Quantization begins" in str(one.message)], quantization._has_ranges()


@pytest.mark.parametrize(
    ("accumulated", "start", "end", "arithmetic"),
    [
        (None, 7, None, ""),
        (None, 8, 8, "0 done + 1 epochs of 8 batches"),
        (3, 2, None, ""),  # of the third step there are two batches
        (3, 3, 2, "0 done + 1 epochs of 8 batches / 3 accumulated"),
    ],
)
def test_a_fit_that_ends_before_rounding_begins_is_said_and_no_other(accumulated, start, end, arithmetic):
    warned, has_rounded = short_fit(dense(accumulated), callbacks.Quantization(start_step=start))
    assert has_rounded == (end is None)
    assert len(warned) == (end is not None)
    for text in warned:
        assert f"round at optimizer step {start}, and this fit ends at step {end} ({arithmetic}): nothing is quantised." in text
        assert f"Set start_step={end // 2} or less" in text


def test_steps_that_are_done_count_towards_the_start_of_rounding():
    model = dense()
    assert short_fit(model, callbacks.Quantization(start_step=12)) == (
        [
            "Quantization begins to round at optimizer step 12, and this fit ends at step 8 (0 done + 1 epochs of 8 batches): "
            "nothing is quantised. Set start_step=4 or less (half of this fit), or train longer."
        ],
        False,
    )
    assert short_fit(model, callbacks.Quantization(start_step=12)) == ([], True)
    again = dense(accumulated=3)
    again.fit(np.ones((28, 4)), np.ones((28, 2)), batch_size=4, verbose=0)
    assert short_fit(again, callbacks.Quantization(start_step=4), samples=24) == ([], True)  # 7 + 6 batches: one of the fifth step


def test_a_resumed_fit_that_comes_to_rounding_is_not_warned_of(tmp_path):
    def resume(*others):
        quantization = callbacks.Quantization(start_step=20)
        given = [quantization, keras.callbacks.BackupAndRestore(tmp_path / "backup"), *others]
        return short_fit(dense(), quantization, epochs=4, callbacks=given)

    with pytest.raises(KilledError):
        resume(KillAtEpoch())
    assert resume() == ([], True)


def test_calibrated_ranges_and_unknown_lengths_are_told_apart():
    calibrated = callbacks.Quantization(start_step=99, calibration_data=np.ones((4, 4), "float32"))
    ((text,), has_ranges) = short_fit(dense(), calibrated)
    assert has_ranges
    assert "it trains without rounding" in text
    unknown = tf.data.Dataset.from_tensors((np.ones((4, 4)), np.ones((4, 2)))).filter(lambda x, y: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense().fit(unknown, verbose=0, callbacks=[callbacks.Quantization(start_step=99)])
    assert not [one for one in caught if "Quantization" in str(one.message)]


def test_a_step_that_somebody_renews_in_the_middle_still_rounds():
    class Renew(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.train_function = None

    model, quantization = compiled(optimizer=keras.optimizers.SGD(0.0)), callbacks.Quantization()
    look = Look(quantization)
    fit(model, quantization, Renew(), look, shuffle=True)
    assert float(quantization._rounding.ranges.updates) == 8


def test_calibration_measures_ranges_before_the_first_step():
    for data in (X, tf.data.Dataset.from_tensor_slices((X, Y)).batch(32), [X[:32], X[32:]]):
        model, quantization = (
            compiled(optimizer=keras.optimizers.SGD(0.0)),
            callbacks.Quantization(calibration_data=data, freeze_step=0),
        )
        mean = model.get_layer("norm").moving_mean.numpy()
        fit(model, quantization)
        expected = np.mean([(half.min(), half.max()) for half in (X[:32], X[32:])], 0)
        np.testing.assert_allclose(quantization.activation_ranges()["input 0 of conv"], expected, rtol=1e-5)
        np.testing.assert_array_equal(model.get_layer("norm").moving_mean, mean)


@pytest.mark.parametrize("first", ["quantization", "backup"])
def test_training_that_was_killed_and_resumed_ends_with_the_same_ranges_and_weights(tmp_path, first):
    def run(kill):
        keras.utils.set_random_seed(5)
        model, quantization = compiled(), callbacks.Quantization()
        both = [quantization, keras.callbacks.BackupAndRestore(tmp_path / "backup")][:: 1 if first == "quantization" else -1]
        fit(model, *both, *([KillAtEpoch()] if kill else []), epochs=4)
        return [*model.get_weights(), np.array(quantization._rounding.ranges.limits)]

    whole = run(kill=False)
    shutil.rmtree(tmp_path / "backup", ignore_errors=True)
    with pytest.raises(KilledError):
        run(kill=True)
    for one, other in zip(whole, run(kill=False), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_checkpoint_from_within_fit_is_that_of_the_plain_model(tmp_path):
    model = compiled()
    paths = [tmp_path / "whole.keras", tmp_path / "part.weights.h5"]
    fit(model, callbacks.Quantization(), keras.callbacks.ModelCheckpoint(paths[0]),
        keras.callbacks.ModelCheckpoint(paths[1], save_weights_only=True))  # fmt: skip
    np.testing.assert_array_equal(keras.saving.load_model(paths[0])(X), model(X))
    twin = conv_net()
    twin.load_weights(paths[1])
    np.testing.assert_array_equal(twin(X), model(X))


def test_a_second_fit_goes_on_from_the_ranges_of_the_first():
    model, quantization = compiled(optimizer=keras.optimizers.SGD(0.0)), callbacks.Quantization(freeze_step=8)
    fit(model, quantization)
    ranges = quantization.activation_ranges()
    fit(model, quantization)
    assert quantization.activation_ranges() == ranges
    assert vars(model).get("_keras_kd_ranges") is None


def test_evaluating_with_the_callback_leaves_no_trace_either():
    model, quantization = compiled(), callbacks.Quantization()
    model.evaluate(X, Y, verbose=0, callbacks=[quantization])
    model.predict(X, verbose=0, callbacks=[quantization])
    assert "_keras_kd_ranges" not in vars(model)


# The quantised model


def test_a_quantised_model_is_independent_saves_and_loads(tmp_path):  # in another process: tests/test_distiller_saving.py
    model, quantization = compiled(), callbacks.Quantization()
    fit(model, quantization)
    quantized = quantization.quantized_model()
    expected = quantized.predict(X, verbose=0)
    quantized.save(tmp_path / "q.keras")
    fit(model, epochs=1)
    np.testing.assert_array_equal(quantized.predict(X, verbose=0), expected)
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "q.keras").predict(X, verbose=0), expected, atol=1e-6)


def test_a_quantised_model_trains_on_with_fixed_ranges():
    model, quantization = compiled(), callbacks.Quantization()
    fit(model, quantization)
    quantized = quantization.quantized_model()
    quantized.compile(keras.optimizers.SGD(0.05), LOSS)
    ranges = np.array(quantized.ranges.limits)
    history = quantized.fit(X, Y, epochs=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_array_equal(quantized.ranges.limits, ranges)
    assert isinstance(quantized, QuantizedModel)


class Subclassed(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.conv = layers.Conv2D(4, 3, name="conv")
        self.norm = layers.BatchNormalization(name="norm")
        self.head = layers.Dense(units, name="head")

    def call(self, x, training=None):
        x = tf.nn.relu(self.norm(self.conv(x), training=training))
        return self.head(tf.reduce_mean(x + 0.5 * x, (1, 2)))

    def get_config(self):
        return super().get_config() | {"units": self.units}


@pytest.mark.filterwarnings("ignore:These stay in float")  # operations between the layers
def test_subclassed_models_are_rounded_where_their_layers_stand():
    model = Subclassed()
    model(X)
    quantization = callbacks.Quantization()
    history = fit(compiled(model), quantization, validation_data=(X, Y))
    assert list(quantization.activation_ranges()) == ["input 0 of conv", "norm", "input 0 of head", "head"]
    quantized = quantization.quantized_model()
    quantized.compile("sgd", LOSS)
    assert quantized.evaluate(X, Y, batch_size=16, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)


def test_shared_layers_have_a_range_for_each_call():
    shared, inputs = layers.Dense(4, activation="relu", name="shared"), keras.Input((4,))
    model = compiled(keras.Model(inputs, layers.Dense(3, name="head")(shared(shared(inputs)))))
    quantization = callbacks.Quantization()
    model.fit(X[:, 0, :2].reshape(64, 4), Y, epochs=2, verbose=0, callbacks=[quantization])
    assert list(quantization.activation_ranges()) == ["input 0 of shared:0", "shared:0", "shared:1", "head"]


def test_bits_by_layer_and_kernels_alone():
    model, quantization = compiled(), callbacks.Quantization({"conv": 2, layers.Dense: 5}, activation_bits=None)
    fit(model, quantization)
    assert quantization._rounding.plan.bits == {"conv": 2, "head": 5}
    assert quantization.activation_ranges() == {}
    seen = quantization.quantized_model()
    with seen.rounding.active():
        rounded = seen.model.get_layer("conv")(np.eye(18, dtype="float32").reshape(18, 3, 3, 2))  # one weight at a time
    assert all(len(np.unique(np.round(np.asarray(rounded)[..., i], 5))) <= 3 for i in range(4))  # -1, 0, 1
    assert len(np.unique(np.asarray(seen.model.get_layer("depthwise").kernel))) > 5


class Composite(layers.Layer):
    """A layer with parts that have no names of their own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(8)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return tf.nn.relu(self.inner(x)) * 2.0


class Listed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(8, activation="relu") for _ in range(2)]
        self.head = layers.Dense(3)

    def call(self, inputs):
        x = inputs["x"]
        for part in self.parts:
            x = part(x) + x
        return self.head(x)


@pytest.mark.filterwarnings("ignore:These stay in float")  # operations between the layers
@pytest.mark.parametrize("kind", ["composite", "listed"])
def test_layers_whose_names_differ_in_a_copy_are_found_again(kind, tmp_path):
    x = X[:, :2, :2].reshape(64, 8)
    if kind == "composite":
        model, data = keras.Sequential([keras.Input((8,)), Composite(), layers.Dense(3)]), x
    else:
        model, data = Listed(), {"x": x}
        model(data)
    model.compile("adam", LOSS)
    quantization = callbacks.Quantization(calibration_data=data)
    history = model.fit(data, Y, epochs=2, verbose=0, callbacks=[quantization], validation_data=(data, Y)).history
    quantized = quantization.quantized_model()
    quantized.compile("sgd", LOSS)
    assert quantized.evaluate(data, Y, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)
    quantized.save(tmp_path / "q.keras")
    custom = {"Composite": Composite, "Listed": Listed}
    loaded = keras.saving.load_model(tmp_path / "q.keras", custom_objects=custom)
    np.testing.assert_allclose(loaded.predict(data, verbose=0), quantized.predict(data, verbose=0), atol=1e-5)


def test_adapted_layers_keep_their_statistics_in_the_quantised_model():
    scale = layers.Normalization()
    scale.adapt(X * 3 + 1)
    model = compiled(keras.Sequential([keras.Input((8, 8, 2)), scale, layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]))
    quantization = callbacks.Quantization()
    with pytest.warns(UserWarning, match=r"stay in float: normalization\w* \(Normalization\)"):
        history = fit(model, quantization, validation_data=(X, Y))
    quantized = quantization.quantized_model()
    quantized.compile("sgd", LOSS)
    assert quantized.evaluate(X, Y, batch_size=16, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)


def test_after_a_fit_that_failed_the_model_trains_plainly():  # from other hooks: tests/test_quantization_callback_reviewed.py
    def fail(*_, **__):
        raise KilledError

    stop = keras.callbacks.LambdaCallback()
    stop.on_train_batch_end = fail
    model, twin = compiled(), compiled(conv_net())
    twin.set_weights(model.get_weights())
    with pytest.raises(KilledError):
        fit(model, callbacks.Quantization(num_bits=2, activation_bits=2), stop, validation_data=(X, Y))
    model.set_weights(twin.get_weights())
    model.optimizer.learning_rate = 0.0
    twin.optimizer.learning_rate = 0.0
    assert fit(model, validation_data=(X, Y)) == fit(twin, validation_data=(X, Y))


# Together


@pytest.mark.parametrize("distilling", [False, True])
def test_zeros_and_clusters_survive_together_with_rounding(distilling):
    student = conv_net()
    model = compiled(keras_kd.Distiller(conv_net(), student) if distilling else student, keras.optimizers.Adam(0.01))
    quantization = callbacks.Quantization()
    three = [callbacks.Pruning(0.5), callbacks.Clustering(6, preserve_sparsity=True), quantization]
    fit(model, *three, epochs=3)
    quantized = quantization.quantized_model()
    assert quantized.channels_together == ["conv", "depthwise", "head"]
    for name, mode in (("conv", "equal"), ("head", "tensor")):
        kernel = tf.convert_to_tensor(quantized.model.get_layer(name).kernel)
        rounded = _quantizers.round_kernel(kernel, 8, mode).numpy()
        assert np.mean(rounded == 0) >= 0.49
        assert len(np.unique(rounded)) <= 6
        assert len(np.unique(kernel)) <= 6


def test_pruning_first_and_keeping_the_zeros_while_rounding():
    model = compiled(None, keras.optimizers.Adam(0.01))
    fit(model, callbacks.Pruning(0.75))
    zeros = {name: model.get_layer(name).kernel.numpy() == 0 for name in ("conv", "depthwise", "head")}
    quantization = callbacks.Quantization()
    fit(model, callbacks.KeepSparsity(), quantization)
    for name, mask in zeros.items():
        np.testing.assert_array_equal(quantization.quantized_model().model.get_layer(name).kernel.numpy() == 0, mask)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_callbacks_does_not_matter(order):
    found = []
    for turn in (1, order):
        keras.utils.set_random_seed(2)
        model = compiled()
        fit(model, *[callbacks.Pruning(0.5), callbacks.Quantization()][::turn])
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# What stays in float, and bad input


def test_what_cannot_be_rounded_is_named_in_one_warning():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(10, 8, name="embed")(inputs)
    x = layers.LSTM(4, name="lstm")(layers.LayerNormalization(name="ln")(x))
    model = compiled(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    quantization = callbacks.Quantization()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            model.fit(RNG.integers(0, 10, size=(16, 6)), Y[:16], verbose=0, callbacks=[quantization])
    messages = [str(one.message) for one in found if "stay in float" in str(one.message)]
    assert messages == ["These stay in float: ln (LayerNormalization), lstm (LSTM)."]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: callbacks.Quantization(1), ValueError, "`num_bits` must be a whole number from 2 to 16. Received: num_bits=1"),
        (lambda: callbacks.Quantization({"conv": 17}), ValueError, "Received: num_bits=17"),
        (lambda: callbacks.Quantization(8.0), ValueError, "Received: num_bits=8.0"),
        (lambda: callbacks.Quantization(activation_bits=0), ValueError, "Received: activation_bits=0"),
        (lambda: callbacks.Quantization({}), ValueError, "A dict of bits chooses"),
        (lambda: callbacks.Quantization({"conv": 8}, layers="conv"), ValueError, "A dict of bits chooses"),
        (lambda: callbacks.Quantization(start_step=-1), ValueError, "Received: start_step=-1"),
        (lambda: callbacks.Quantization(start_step=5, freeze_step=4), ValueError, "must not come before"),
        (lambda: callbacks.Quantization(momentum=1.0), ValueError, r"in \[0, 1\). Received: momentum=1.0"),
    ],
)
def test_a_wrong_argument_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "conv9"}, ValueError, "Received: 'conv9', which matches none. Layers: conv, depthwise, head"),
        ({"layers": 3}, TypeError, "`layers` must be"),
        ({"calibration_data": X[:0]}, ValueError, "at least one sample"),
        ({"calibration_data": []}, ValueError, "at least one sample"),
        ({"calibration_data": X[:, :4]}, ValueError, r"shapes of the model's inputs.*Received: \[\(32, 4, 8, 2\)\]"),
        ({"calibration_data": X * np.nan}, ValueError, "must be finite"),
        ({"calibration_data": 3}, TypeError, "`calibration_data` must be an array"),
    ],
)
def test_bad_layers_and_data_are_named_and_leave_no_trace(options, error, message):
    model = compiled()
    with pytest.raises(error, match=message):
        fit(model, callbacks.Quantization(**options))
    assert "train_step" not in vars(model)
    plain = fit(model)["loss"]
    assert np.all(np.isfinite(plain))


def test_a_model_without_layers_to_round_and_ranges_that_are_not_there_are_named():
    model = compiled(keras.Sequential([keras.Input((6, 2)), layers.LSTM(3)]))
    with pytest.raises(ValueError, match=r"no layers that can be rounded. It has: lstm\w* \(LSTM\)"):
        model.fit(X[:, :6, 0], Y, verbose=0, callbacks=[callbacks.Quantization()])
    with pytest.raises(RuntimeError, match="There are no ranges yet"):
        callbacks.Quantization().quantized_model()
    with pytest.raises(ValueError, match="has no layers conv"):
        QuantizedModel(
            classifier(3), {"spots": {"conv": []}, "bits": {}, "fixed": [], "names": [], "activation_bits": 8, "floats": []}
        )
