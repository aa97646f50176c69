"""What a second review found in the callback `Quantization` and its models: each of these was wrong once."""

import contextlib
import gc
import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import callbacks, export
from keras_kd.quantized.model import copy_model, quantized_parts
from tests.conftest import KilledError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8)).astype("float32"), RNG.integers(0, 3, size=64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def net(*parts, shape=(8,)):
    return keras.Sequential([keras.Input(shape), *(parts or (layers.Dense(8, activation="relu"), layers.Dense(3)))])


def compiled(model=None, rate=0.1, **options):
    model = net() if model is None else model
    model.compile(keras.optimizers.SGD(rate, **options), LOSS)
    return model


def fit(model, *given, x=X, **options):
    return model.fit(x, Y, **{"batch_size": 16, "shuffle": False, "verbose": 0} | options, callbacks=list(given)).history


def loss_of(quantized, x=X):
    quantized.compile("sgd", LOSS)
    return quantized.evaluate(x, Y, batch_size=16, verbose=0)


class Raise(keras.callbacks.Callback):
    """Fails in one hook, once."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.fail)

    def fail(self, *_, **__):
        raise KilledError


# A fit that ended in an error


@pytest.mark.parametrize(
    "hook", ["on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_epoch_end", "on_train_end"]
)
def test_a_fit_that_failed_leaves_nothing_on_the_model(hook):
    model, quantization = compiled(), callbacks.Quantization()
    fit(model, validation_data=(X, Y))
    before = set(vars(model))
    with contextlib.suppress(KilledError):
        fit(model, quantization, Raise(hook), validation_data=(X, Y))
    gc.collect()  # a step that TensorFlow has just traced leaves a cycle of frames, that of `fit` among them
    assert set(vars(model)) - {"_eval_epoch_iterator"} <= before


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_test_batch_begin", "on_epoch_end"])
def test_after_a_fit_that_failed_others_compute_plainly_even_while_its_error_is_held(hook):
    model, twin = compiled(rate=0.0), compiled(rate=0.0)
    twin.set_weights(model.get_weights())
    quantization = callbacks.Quantization(2, activation_bits=2)
    with pytest.raises(KilledError) as held:
        fit(model, quantization, Raise(hook), validation_data=(X, Y))
    model.__dict__.pop("_eval_epoch_iterator", None)  # Keras' own
    plain = fit(twin, validation_data=(X, Y))
    assert fit(model, validation_data=(X, Y)) == plain
    assert model.evaluate(X, Y, batch_size=16, verbose=0, callbacks=[quantization]) == plain["val_loss"][0]
    assert held is not None


def test_an_error_that_is_let_go_late_does_not_disturb_the_next_fit(tmp_path):
    model, quantization = compiled(), callbacks.Quantization()
    with pytest.raises(KilledError) as held:
        fit(model, quantization, Raise("on_epoch_end"))

    class LetGo(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            nonlocal held
            held = None
            gc.collect()
            self.seen = "_keras_kd_ranges" in vars(self.model)

    look = LetGo()
    fit(model, quantization, look)
    assert look.seen
    assert "_keras_kd_ranges" not in vars(model)


def test_another_callback_starts_afresh_after_a_fit_that_failed():
    model, second = compiled(rate=0.0), callbacks.Quantization()
    with pytest.raises(KilledError):
        fit(model, callbacks.Quantization(), Raise("on_epoch_end"), x=100 * X)
    fit(model, second)
    assert second.activation_ranges()["input 0 of " + model.layers[0].name][1] < 10


def test_evaluating_inside_a_fit_rounds_as_validation_does():
    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.found = self.model.evaluate(X, Y, batch_size=16, verbose=0, callbacks=[quantization])
            self.attached = "_keras_kd_ranges" in vars(self.model)

    model, quantization, look = compiled(), callbacks.Quantization(3, activation_bits=3), Evaluate()
    history = fit(model, quantization, look, validation_data=(X, Y), epochs=2)
    assert look.found == history["val_loss"][-1]
    assert look.attached


def test_two_quantizations_in_one_fit_are_refused():
    with pytest.raises(ValueError, match="one Quantization in a `fit`"):
        fit(compiled(), callbacks.Quantization(), callbacks.Quantization(4))


# Ranges follow the weights


class Drift(keras.callbacks.Callback):
    """Changes the weights and the ranges with the epochs; the first one is the best."""

    def on_epoch_begin(self, epoch, logs=None):
        for variable in self.model.trainable_variables:
            variable.assign(variable * (1 + epoch))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("pruning", [False, True])
def test_restored_weights_get_the_ranges_of_their_epoch(order, pruning, tmp_path):
    model, quantization = compiled(rate=1e-3), callbacks.Quantization(momentum=0.0)
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, mode="min", restore_best_weights=True)
    given = [quantization, stop, Drift()][::order]
    given += [callbacks.Pruning(keras_kd.schedules.ConstantSparsity(0.5, begin_step=10, frequency=1))] if pruning else []
    history = fit(model, *given, validation_data=(X, Y), epochs=6)
    best, quantized = int(np.argmin(history["val_loss"])), quantization.quantized_model()
    assert best < len(history["val_loss"]) - 1
    if not pruning:
        assert loss_of(quantized) == pytest.approx(history["val_loss"][best], rel=1e-6)
    assert list(quantization.activation_ranges().values())[-1][1] == pytest.approx(float(quantized.ranges.limits[-1][1]))
    plain = export.to_litert(model, tmp_path / "plain.tflite", check_data=X)
    own = export.to_litert(quantized, tmp_path / "own.tflite", check_data=X)
    assert plain.quantization == own.quantization == "int8"
    assert plain.path.read_bytes() == own.path.read_bytes()


def test_weights_of_an_earlier_epoch_that_are_loaded_later_get_their_ranges(tmp_path):
    model, quantization = compiled(rate=1e-3), callbacks.Quantization(momentum=0.0)
    path = str(tmp_path / "{epoch}.weights.h5")
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    history = fit(model, save, quantization, Drift(), validation_data=(X, Y), epochs=3)
    model.load_weights(path.format(epoch=1))
    assert loss_of(quantization.quantized_model()) == pytest.approx(history["val_loss"][0], rel=1e-6)
    assert export.to_litert(model, tmp_path / "m.tflite").quantization == "int8"


class Assign(keras.callbacks.Callback):
    """Does something of its own to the weights when `fit` ends."""

    def on_train_end(self, logs=None):
        self.model.layers[0].kernel.assign(0.5 * self.model.layers[0].kernel)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "other", [lambda: callbacks.Pruning(0.5), lambda: callbacks.Clustering(4), Assign], ids=["pruning", "clustering", "assign"]
)
def test_the_plain_model_is_known_whatever_others_do_to_it_when_fit_ends(order, other, tmp_path):
    model, quantization = compiled(use_ema=True), callbacks.Quantization()
    fit(model, *[quantization, other()][::order], epochs=2)
    assert export.to_litert(model, tmp_path / "m.tflite", quantization="int8").quantization == "int8"


def test_a_list_of_callbacks_of_the_users_own_stays_as_it_was():
    model, quantization = compiled(), callbacks.Quantization()
    given = keras.callbacks.CallbackList([quantization], model=model, add_history=True, epochs=1, steps=4)
    for _ in range(2):
        model.fit(X, Y, batch_size=16, verbose=0, callbacks=given)
        assert given.callbacks == [quantization, model.history]
    assert quantization.quantized_model()(X).shape == (64, 3)


def test_a_loop_of_ones_own_may_call_the_hooks_without_a_list(tmp_path):
    model, quantization = compiled(), callbacks.Quantization()
    quantization.set_model(model)
    quantization.on_train_begin()
    quantization.on_epoch_begin(0)
    for step in range(2):
        quantization.on_train_batch_begin(step)
        model.train_function(iter(tf.data.Dataset.from_tensors((X, Y))))
        quantization.on_train_batch_end(step)
    quantization.on_epoch_end(0)
    quantization.on_train_end()
    assert export.to_litert(model, tmp_path / "m.tflite").quantization == "int8"


# Copies


def scaled_tanh(x):
    return 2 * keras.ops.tanh(x)


class OwnConstraint(keras.constraints.Constraint):
    def __call__(self, w):
        return w


@pytest.mark.parametrize("kind", ["function", "lambda", "Lambda", "same names", "constraint", "loss", "shared", "loaded"])
def test_models_of_unregistered_parts_are_copied(kind):
    factor = tf.constant(3.0)  # what a lambda refers to is lost in a file

    def other(x):
        return keras.ops.relu(x) * 0.5

    other.__name__ = "scaled_tanh"
    activation = {"function": scaled_tanh, "lambda": lambda x: factor * tf.nn.tanh(x), "same names": other}.get(kind, "relu")
    options = {"kernel_constraint": OwnConstraint()} if kind == "constraint" else {}
    parts = [layers.Dense(8, activation=activation, **options), layers.Dense(8, activation=scaled_tanh), layers.Dense(3)]
    model = net(*([layers.Lambda(lambda x: factor * x)] if kind == "Lambda" else []), *parts)
    if kind == "shared":
        inner = net(layers.Dense(8, activation=scaled_tanh))
        inputs = keras.Input((8,))
        left, right = keras.Model(inputs, inner(inputs), name="left"), keras.Model(inputs, inner(inputs) + 1, name="right")
        model = keras.Model(inputs, layers.Dense(3)(left(inputs) + right(inputs)))
    model.compile("sgd", (lambda y, p: LOSS(y, p)) if kind == "loss" else LOSS)
    quantization = callbacks.Quantization()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These stay in float")
        history = fit(model, quantization, validation_data=(X, Y))
        quantized = quantization.quantized_model()
    assert loss_of(quantized) == pytest.approx(history["val_loss"][0], rel=1e-6)
    assert scaled_tanh.__name__ == other.__name__ == "scaled_tanh"
    first = next(layer for layer in quantized.model._flatten_layers() if isinstance(layer, layers.Dense))
    assert kind not in ("function", "lambda", "same names") or first.activation is activation


class Without(keras.Model):
    """Has no config."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_a_model_that_cannot_be_copied_is_noticed_before_the_training_and_can_be_exported(tmp_path):
    model, quantization = Without([layers.Dense(8, activation="relu"), layers.Dense(3)]), callbacks.Quantization()
    model(X)
    compiled(model)
    with pytest.warns(UserWarning, match=r"`quantized_model\(\)` will fail.*cannot be made again.*`get_config`"):
        fit(model, quantization)
    fit(model, quantization)  # once
    with pytest.raises(ValueError, match="cannot be made again from its config"):
        quantization.quantized_model()
    assert export.to_litert(model, tmp_path / "m.tflite", quantization="int8", check_data=X).agreement > 0.9


class Plain(keras.Model):
    """As many people write it: `__init__` takes no name."""

    def __init__(self):
        super().__init__()
        self.first, self.head = layers.Dense(4, activation="relu"), layers.Dense(3)

    def call(self, x):
        return self.head(self.first(x))


class Sloped(Plain):
    """Keras takes the default of the argument for its value."""

    def __init__(self, slope=0.1, **kwargs):
        super().__init__()
        self.slope = slope

    def call(self, x):
        return self.head(keras.ops.leaky_relu(self.first(x), self.slope))


def test_models_whose_constructor_takes_no_name_are_copied():
    model, quantization = Plain(), callbacks.Quantization()
    model(X)
    history = fit(compiled(model), quantization, validation_data=(X, Y))
    assert loss_of(quantization.quantized_model()) == pytest.approx(history["val_loss"][0], rel=1e-6)


def test_a_copy_of_other_arguments_is_none():
    model = Sloped(slope=0.5)
    model(X)
    with pytest.raises(ValueError, match="The argument slope=0.5 is not in the config. Give its classes a `get_config`"):
        copy_model(model)


def test_copies_may_be_of_another_precision_and_draw_no_seeds():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = net(layers.Dense(8, activation="relu"), layers.Dropout(0.5), layers.Dense(3))
    finally:
        keras.config.set_dtype_policy("float32")
    state = random.getstate()
    twin = copy_model(model, dtype="float32")
    assert random.getstate() == state
    assert {layer.compute_dtype for layer in twin._flatten_layers()} == {"float32"}
    np.testing.assert_allclose(twin(X), model(X), atol=0.05)
    assert copy_model(model).layers[0].dtype_policy.name == "mixed_bfloat16"


def test_quantising_after_training_names_the_floats_and_every_model_has_its_warning():
    model = net(layers.Dense(8, name="d"), layers.LayerNormalization(name="ln"), layers.Dense(3))
    quantization = callbacks.Quantization(calibration_data=X)
    with pytest.warns(UserWarning, match=r"stay in float: ln \(LayerNormalization\)"):
        quantization.quantize(model)
    for name in ("a", "b"):
        model = compiled(net(layers.Dense(8), layers.LayerNormalization(name=name), layers.Dense(3)))
        with pytest.warns(UserWarning, match=rf"stay in float: {name} \(LayerNormalization\)"):
            fit(model, quantization)


# What is rounded, and what is not


def test_a_backbone_that_teacher_and_student_share_is_not_rounded_for_the_teacher():
    hidden, inputs = layers.Dense(8, activation="relu", trainable=False), keras.Input((8,))
    teacher, student = (keras.Model(inputs, layers.Dense(3)(hidden(inputs)), name=name) for name in ("teacher", "student"))
    head, seen = teacher.layers[-1], []

    class Seen(keras_kd.Distiller):
        def teacher_outputs(self, x):
            outputs = super().teacher_outputs(x)
            plain = keras.ops.relu(x @ hidden.kernel + hidden.bias) @ head.kernel + head.bias
            seen.append(float(keras.ops.max(keras.ops.abs(outputs - plain))))
            return outputs

    distiller = Seen(teacher, student)
    distiller.compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=True)
    quantization = callbacks.Quantization(2, activation_bits=2)
    history = fit(distiller, quantization, validation_data=(X, Y))
    assert max(seen) < 1e-5
    assert len(quantization.quantized_model().plan.bits) == 2  # of the student, the backbone is rounded
    assert loss_of(quantization.quantized_model()) == pytest.approx(history["val_student_loss"][0], rel=1e-6)


@pytest.mark.filterwarnings("ignore:These stay in float")
def test_batch_normalisation_inside_other_layers_is_frozen_too():
    norm = layers.BatchNormalization()
    model = net(layers.TimeDistributed(norm), layers.Flatten(), layers.Dense(3), shape=(4, 2))
    x = 5 + X.reshape(64, 4, 2)
    seen = []
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(norm.moving_mean.numpy()))
    fit(compiled(model), callbacks.Quantization(freeze_step=2), look, x=x)
    assert np.all(seen[0] != seen[1])
    np.testing.assert_array_equal(seen[1], seen[3])


# Quantised models


def test_a_clone_of_a_quantised_model_has_its_ranges(tmp_path):
    quantized = callbacks.Quantization(calibration_data=X).quantize(net())
    clone = keras.models.clone_model(quantized)
    np.testing.assert_array_equal(clone.ranges.limits, quantized.ranges.limits)
    assert np.std(clone(X)) > 0.1
    clone.set_weights(quantized.get_weights())
    np.testing.assert_array_equal(clone(X), quantized(X))
    quantized.save(tmp_path / "q.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "q.keras")(X), quantized(X), atol=1e-6)
    kernels = callbacks.Quantization(activation_bits=None).quantize(net())
    assert keras.models.clone_model(kernels)(X).shape == (64, 3)


class Compiled(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = layers.Dense(3)

    @tf.function
    def call(self, x):
        return self.d(x)


def mutual():
    inputs = keras.Input((8,))
    return keras_kd.MutualDistiller([keras.Model(inputs, layers.Dense(3)(inputs), name=name) for name in ("a", "b")])


def quantised():
    return callbacks.Quantization(calibration_data=X).quantize(net(layers.Dense(3)))


def with_quantised_part():
    return net(quantised(), layers.Dense(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Compiled, r"No layer of \"compiled\" was seen at work.*Take `@tf.function` off"),
        (lambda: net(layers.Flatten(name="flat")), r"no layers that can be rounded. It has: flat \(Flatten\)\."),
        (lambda: net(layers.Lambda(keras.ops.abs, name="abs")), r"It has: abs \(Lambda\)\."),
        (quantised, r"_quantized\" is quantised already.*Leave Quantization out"),
        (with_quantised_part, r"the QuantizedModel \w+ inside. Leave Quantization out"),
        (mutual, "a MutualDistiller of the students a, b. Let them teach each other first"),
    ],
    ids=["tf.function", "carriers", "floats", "quantised", "quantised part", "mutual"],
)
def test_what_the_callback_cannot_train_is_named_with_a_way_out(make, message):
    model = make()
    if not model.built:
        model(X)
    with pytest.raises(ValueError, match=message):
        fit(compiled(model), callbacks.Quantization())


def test_no_layers_are_no_choice():
    with pytest.raises(ValueError, match=r"`layers` must choose at least one layer; None chooses all. Received: layers=\[\]"):
        callbacks.Quantization(layers=[])


class OwnOptimizer(keras.Sequential):
    """Compiled without an optimizer: it has one of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = LOSS(y, self(x, training=True))
        self.own.apply_gradients(zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True))
        return {"loss": loss}


@pytest.mark.parametrize("options", [{"start_step": 2}, {"freeze_step": 2}, {}])
def test_steps_of_an_optimizer_that_is_not_there_are_not_counted(options):
    model = OwnOptimizer([keras.Input((8,)), layers.Dense(3)])
    model.compile(optimizer=None)
    model.own = keras.optimizers.SGD(0.1)
    quantization = callbacks.Quantization(**options)
    if options:
        with pytest.raises(ValueError, match="count the steps of the model's optimizer, and it was compiled without one"):
            fit(model, quantization)
    else:
        fit(model, quantization)
        assert quantization.activation_ranges()


def test_a_quantised_model_trains_on_without_the_callback_and_as_a_part_of_another():
    part = quantised()
    model = compiled(net(part, layers.Dense(3)))
    ranges = np.array(part.ranges.limits)
    history = fit(model, epochs=3)
    assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_array_equal(part.ranges.limits, ranges)
    assert quantized_parts(model) == [part]
