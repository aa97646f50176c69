"""Pruning: TF-MOT's masks, zeros after every step however it runs, no trace afterwards, errors that help."""

import contextlib
import re
import shutil
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import _tfmot, callbacks, schedules
from keras_kd.callbacks import _masks
from tests.conftest import KillAtEpoch, KilledError, classifier, convolutional, two_devices

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 4)).astype("float32"), RNG.integers(0, 3, size=32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def polynomial(final=0.75, end=8, frequency=2):
    return schedules.PolynomialDecay(0.25, final, begin_step=2, end_step=end, frequency=frequency)


def net(width=16):
    return classifier(width)


def zeros(weight):
    return float(np.mean(np.asarray(weight) == 0))


class Watch(keras.callbacks.Callback):
    """The sparsity of a kernel after every batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(zeros(getattr(self.model, "student", self.model).layers[0].kernel))


# The masks


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_kth_value_is_that_of_a_full_sort(size, dtype, xla):
    values = np.abs(RNG.normal(size=size)).astype(dtype)
    values[RNG.random(size) < 0.3] = 0
    for ties in (values, np.round(values, 1)):
        for k in {1, size, max(1, size // 3)}:
            assert _masks.kth_largest(tf.constant(ties), k, xla=xla) == np.sort(ties)[::-1][k - 1]


def engine(weight, schedule, **options):
    """TF-MOT's own masks, at every step up to 8, beside the weights that it leaves."""
    impl = _tfmot.load_part("sparsity.keras.pruning_impl")
    variable, mask = tf.Variable(weight), tf.Variable(tf.ones_like(weight))
    step = tf.Variable(0, dtype=tf.int64)
    options = {"block_size": (1, 1), "block_pooling_type": "AVG"} | options
    pruning = impl.Pruning(lambda: step, [(variable, mask, tf.Variable(0.0))], schedule, **options)
    for now in range(9):
        step.assign(now)
        pruning.conditional_mask_update()
        pruning.weight_mask_op()
        yield now, mask.numpy()
        variable.assign(weight * (1 + 0.1 * (now + 1) * np.sign(np.sin(np.arange(weight.size)).reshape(weight.shape))))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((7, 9), {}),
        ((3, 3, 4, 6), {}),
        ((12, 10), {"block_size": (4, 1)}),
        ((11, 10), {"block_size": (4, 2), "block_pooling_type": "MAX"}),
        ((11, 10), {"block_size": (3, 4)}),
    ],
)
@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
def test_masks_equal_those_of_tf_mots_engine_at_every_step(shape, options, schedule):
    made = polynomial() if schedule == "polynomial" else schedules.ConstantSparsity(0.6, begin_step=1, frequency=3)
    weight = RNG.normal(size=shape).astype("float32")
    pruning = callbacks.Pruning(made, **options)
    ours = np.ones(shape, "float32")
    current = weight
    for step, theirs in engine(weight, made, **options):
        turn, amount = made(tf.constant(step, tf.int64))
        if turn:
            ours = pruning.make_masks([tf.constant(current)], made, amount)[0].numpy()
        np.testing.assert_array_equal(ours, theirs, err_msg=f"step {step}")
        current = weight * (1 + 0.1 * (step + 1) * np.sign(np.sin(np.arange(weight.size)).reshape(shape)))


@pytest.mark.parametrize("shape", [(8, 5), (3, 3, 8, 5), (1, 1, 6, 3)])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 5)])
def test_m_by_n_masks_equal_tf_mots(shape, pattern):
    utils = _tfmot.load_part("sparsity.keras.pruning_utils")
    weight = tf.constant(np.round(RNG.normal(size=shape), 1).astype("float32"))  # with ties
    theirs = utils.generate_m_by_n_mask(utils.weights_rearrange(weight), pattern)
    theirs = utils.m_by_n_sparsity_mask_prepare(theirs, weight.shape)
    np.testing.assert_array_equal(_masks.m_by_n_mask(weight, *pattern), theirs)


def test_blocks_of_convolution_kernels_go_or_stay_as_one():
    weight = RNG.normal(size=(3, 3, 8, 6)).astype("float32")
    options = {"block_size": (4, 2), "pooling": "AVG", "together": False, "xla": False}
    mask = _masks.magnitude_masks([tf.constant(weight)], 0.5, **options)[0].numpy()
    blocks = mask.reshape(9, 2, 4, 3, 2).transpose(0, 1, 3, 2, 4).reshape(54, 8)
    means = np.abs(weight).reshape(9, 2, 4, 3, 2).mean(axis=(2, 4)).reshape(54)
    np.testing.assert_array_equal(blocks, np.repeat((means >= np.sort(means)[27])[:, None], 8, 1))


def test_global_scope_ranks_all_weights_together():
    model = net()
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    values = np.concatenate([np.abs(layer.kernel.numpy()).ravel() for layer in model.layers])
    limit = np.sort(values)[::-1][round(0.3 * values.size) - 1]
    expected = [np.abs(layer.kernel.numpy()) >= limit for layer in model.layers]
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.7, scope="global")])
    for layer, kept in zip(model.layers, expected, strict=True):
        np.testing.assert_array_equal(layer.kernel.numpy() != 0, kept)


# Training


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ({}, {"run_eagerly": True}),
        ({}, {"steps_per_execution": 4}),
        ({"weight_decay": 0.1}, {"steps_per_execution": 16, "jit_compile": True}),
        ({"use_ema": True, "ema_momentum": 0.9}, {}),
        ({"use_ema": True, "ema_momentum": 0.9}, {"steps_per_execution": 16}),
        ({"use_ema": True, "ema_overwrite_frequency": 3}, {}),
        ({"weight_decay": 0.1}, {}),
        ({"gradient_accumulation_steps": 2}, {}),
        ({"global_clipnorm": 0.1}, {"jit_compile": True}),
    ],
    ids=str,
)
def test_zeros_are_exact_after_every_step_and_after_fit(optimizer, options):
    model, watch = net(), Watch()
    model.compile(keras.optimizers.AdamW(0.05, **optimizer), LOSS, **options)
    accumulated = optimizer.get("gradient_accumulation_steps", 1)
    history = model.fit(X, Y, batch_size=4, epochs=2 * accumulated, verbose=0, callbacks=[callbacks.Pruning(polynomial()), watch])
    steps = np.arange(1, len(watch.seen) + 1) * options.get("steps_per_execution", 1) // accumulated
    updates = np.minimum(steps // 2 * 2, 8)
    share = np.clip((updates - 2) / 6, 0, 1)
    expected = np.where(updates >= 2, 0.75 - 0.5 * (1 - share) ** 3, 0)
    np.testing.assert_allclose(watch.seen, np.round(64 * expected) / 64, atol=1e-6)
    assert [zeros(layer.kernel) for layer in model.layers] == [0.75, 0.75]
    assert history.history["sparsity"][-1] == history.history["dense_sparsity" if "dense_sparsity" in history.history else
        next(name for name in history.history if name.endswith("_sparsity"))][-1] == 0.75  # fmt: skip


def test_momentum_does_not_bring_zeros_back():
    model, watch = net(), Watch()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True), LOSS)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[callbacks.Pruning(0.5), watch])
    assert watch.seen == [0.5] * 16


def test_a_fit_that_begins_at_a_later_epoch_goes_on_in_the_schedule():
    whole, parts = net(), net()
    parts.set_weights(whole.get_weights())
    for model, ends in ((whole, (4,)), (parts, (2, 4))):
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), LOSS)
        begin = 0
        for end in ends:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The pruning schedule ends")  # it does so in the second part
                pruning = callbacks.Pruning(polynomial(end=14))
                options = {"initial_epoch": begin, "epochs": end, "shuffle": False, "verbose": 0}
                model.fit(X, Y, batch_size=8, callbacks=[pruning], **options)
            begin = end
    assert zeros(whole.layers[0].kernel) == 0.75
    np.testing.assert_allclose(parts.layers[0].kernel, whole.layers[0].kernel, atol=1e-6)


def test_a_loop_of_ones_own_prunes_through_keras_callback_list():
    model = net()
    model.compile(keras.optimizers.AdamW(0.05), LOSS)
    listed = keras.callbacks.CallbackList([callbacks.Pruning(polynomial())], model=model)
    listed.on_train_begin()
    seen = []
    for step in range(9):
        listed.on_train_batch_begin(step)
        model.train_on_batch(X, Y)
        listed.on_train_batch_end(step)
        seen.append(zeros(model.layers[0].kernel))
    listed.on_train_end()
    assert seen[0] == 0
    assert seen[7:] == [0.75, 0.75]
    assert model.layers[0].kernel.constraint is None


def test_mixed_precision_with_loss_scaling_keeps_the_zeros():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, watch = net(), Watch()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", LOSS)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[callbacks.Pruning(0.5), watch])
    assert watch.seen == [0.5] * 16


def test_two_devices_prune_as_one():
    weights = {}
    for name, strategy in (("one", tf.distribute.get_strategy()), ("two", two_devices())):
        with strategy.scope():
            keras.utils.set_random_seed(3)
            model = net()
            model.compile(keras.optimizers.SGD(0.1), LOSS)
            model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[callbacks.Pruning(polynomial())])
        weights[name] = model.layers[0].kernel.numpy()
    assert zeros(weights["two"]) == 0.75
    np.testing.assert_allclose(weights["two"], weights["one"], atol=1e-6)


def test_a_kernels_own_constraint_still_holds_and_is_all_that_is_left():
    limit = keras.constraints.MaxNorm(0.5, axis=0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(16, kernel_constraint=limit), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(1.0), LOSS)
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.5), callbacks.KeepSparsity(), callbacks.Pruning(0.5)])
    kernel = model.layers[0].kernel
    assert kernel.constraint is limit
    assert model.layers[1].kernel.constraint is None
    assert np.linalg.norm(kernel.numpy(), axis=0).max() <= 0.5 + 1e-6
    assert zeros(kernel) >= 0.5


def test_zeros_stay_in_a_later_fit_with_keep_sparsity_and_drift_without():
    model = net()
    model.compile("adam", LOSS)
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.75)])
    mask = model.layers[0].kernel.numpy() != 0
    model.fit(X, Y, verbose=0, epochs=2, callbacks=[callbacks.KeepSparsity()])
    np.testing.assert_array_equal(model.layers[0].kernel.numpy() != 0, mask)
    model.fit(X, Y, verbose=0)
    assert zeros(model.layers[0].kernel) < 0.5


def test_keep_sparsity_says_once_that_there_is_no_zero_to_keep():
    model = net()
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match=r"have none: this `fit` trains as without it\. Prune first") as caught:
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callbacks.KeepSparsity()])
    assert len([one for one in caught if "KeepSparsity keeps zeros" in str(one.message)]) == 1


def test_keep_sparsity_is_silent_where_there_are_zeros_or_will_be(tmp_path):
    """One zero is enough; `Pruning` beside it makes them in this `fit`; `BackupAndRestore` brings them before the first step."""
    model = net()
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.layers[0].kernel.assign(np.where(np.arange(16) == 3, 0, model.layers[0].kernel))
    model.fit(X, Y, verbose=0, callbacks=[callbacks.KeepSparsity()])
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KilledError):
        model.fit(X, Y, verbose=0, epochs=4, callbacks=[callbacks.KeepSparsity(), backup, KillAtEpoch()])
    dense = net()
    dense.compile(keras.optimizers.SGD(0.1), LOSS)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    dense.fit(X, Y, verbose=0, epochs=4, callbacks=[callbacks.KeepSparsity(), backup])
    dense = net()
    dense.compile(keras.optimizers.SGD(0.1), LOSS)
    dense.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callbacks.KeepSparsity(), callbacks.Pruning(polynomial())])


@pytest.mark.parametrize("first", ["pruning", "backup"])
def test_training_that_was_killed_and_resumed_ends_with_the_same_masks(tmp_path, first):
    def run(kill):
        keras.utils.set_random_seed(5)
        model = net()
        model.compile(keras.optimizers.Adam(0.05), LOSS)
        both = [callbacks.Pruning(polynomial(end=14, frequency=3)), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
        both = both if first == "pruning" else both[::-1]
        model.fit(X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0, callbacks=[*both, *([KillAtEpoch()] if kill else [])])
        return model.layers[0].kernel.numpy()

    whole = run(kill=False)
    shutil.rmtree(tmp_path / "backup", ignore_errors=True)
    with pytest.raises(KilledError):
        run(kill=True)
    np.testing.assert_allclose(run(kill=False), whole, atol=1e-6)
    assert 0.6 < zeros(whole) <= 0.75


def test_a_threshold_empties_what_is_below_it():
    model = net()
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    before = model.layers[0].kernel.numpy()
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(schedules.Threshold(0.2))])
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), np.where(np.abs(before) >= 0.2, before, 0))


def test_m_by_n_follows_its_schedule():
    model, watch = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(3)]), Watch()
    model.compile("adam", LOSS)
    schedule = schedules.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=6, power=1, frequency=1)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callbacks.Pruning(schedule, sparsity_m_by_n=(2, 4)), watch])
    assert watch.seen == [0.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert (np.count_nonzero(model.layers[0].kernel.numpy(), axis=0) == 2).all()


# What it works on


def _text_model():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(10, 8, name="embed")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.GRU(6, return_sequences=True, name="gru")(x)
    x = layers.LSTM(6, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def test_attention_recurrent_and_embedding_kernels_are_pruned():
    model = _text_model()
    model.compile("sgd", LOSS)
    history = model.fit(RNG.integers(0, 10, size=(16, 6)), Y[:16], verbose=0, callbacks=[callbacks.Pruning(0.5)]).history
    named = {"embeddings", "kernel", "recurrent_kernel"}
    found = [v for v in model.trainable_variables if v.name in named]
    assert len(found) == 1 + 4 + 2 + 2 + 1
    for variable in found:
        assert zeros(variable) == pytest.approx(0.5, abs=0.02), variable.path
    assert {"sparsity", "embed_sparsity", "lstm/lstm_cell_sparsity"} <= set(history)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (layers.Conv1D(4, 3), 1),
        (layers.SeparableConv1D(4, 3), 2),
        (layers.Conv1DTranspose(4, 3), 1),
        (layers.DepthwiseConv1D(3), 1),
        (layers.EinsumDense("abc,cd->abd", output_shape=(8, 8)), 1),
        (layers.Bidirectional(layers.LSTM(4)), 4),
        (layers.TimeDistributed(layers.Dense(8)), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_layer_with_a_kernel_is_pruned(layer, count):
    twin = type(layer).from_config(layer.get_config())
    model = keras.Sequential([keras.Input((8, 6)), twin, layers.Flatten(), layers.Dense(1, name="head")])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(np.ones((4, 8, 6)), np.ones((4, 1)), verbose=0, callbacks=[callbacks.Pruning(0.5, layers=twin.name)])
    pruned = [v for v in twin.trainable_variables if zeros(v) == pytest.approx(0.5, abs=0.1) and "bias" not in v.name]
    assert len(pruned) == count
    assert zeros(model.get_layer("head").kernel) == 0


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.backbone = net()
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, [0.5, 0.5, 0.5]),
        ("head", [0, 0, 0.5]),
        (lambda layer: layer.name != "head", [0.5, 0.5, 0]),
        (layers.Dense, [0.5, 0.5, 0.5]),
    ],
)
def test_layers_of_nested_and_subclassed_models_are_chosen(choice, expected):
    model = Subclassed()
    model(X)
    model.compile("sgd", LOSS, run_eagerly=True)
    model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.5, layers=choice)])
    found = [zeros(v) for v in model.trainable_variables if v.name == "kernel"]
    np.testing.assert_allclose(found, expected, atol=0.06)  # 4 of 9 weights stay where 4.5 should


def test_each_layer_may_have_a_schedule_of_its_own():
    model = convolutional()
    model.compile("sgd", LOSS)
    pruning = callbacks.Pruning({"conv1": 0.5, layers.Conv2D: schedules.ConstantSparsity(0.75, begin_step=0)})
    model.fit(RNG.normal(size=(8, 8, 8, 1)), Y[:8], verbose=0, callbacks=[pruning])
    assert [zeros(model.get_layer(name).kernel) for name in ("conv1", "conv2", "head")] == [0.5, 0.75, 0]


def test_a_distiller_prunes_its_student_alone(teacher):
    student = net()
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(keras.optimizers.Adam(0.05), LOSS)
    watch, before = Watch(), teacher.get_weights()
    distiller.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[callbacks.Pruning(0.75), watch])
    assert watch.seen == [0.75] * 12
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: callbacks.Pruning(1.0), r"in \[0, 1\).*Received: pruning_schedule=1.0"),
        (lambda: callbacks.Pruning("much"), "must be a number in .* Received: pruning_schedule='much'"),
        (lambda: schedules.PolynomialDecay(0.0, 1.5, 0, 10), r"final_sparsity must be in range \[0,1\)"),
        (lambda: schedules.PolynomialDecay(0.0, 0.5, 10, 5), "begin_step should be <= end_step"),
        (lambda: schedules.Threshold(-1.0), "must not be negative"),
        (lambda: schedules.Threshold(0.1, begin_step=5, end_step=3), "begin_step=5, end_step=3"),
        (lambda: callbacks.Pruning(0.5, scope="all"), "Received: scope='all'"),
        (lambda: callbacks.Pruning(0.5, block_size=(0, 1)), "two whole numbers above 0"),
        (lambda: callbacks.Pruning(0.5, block_pooling_type="MIN"), "Received: block_pooling_type='MIN'"),
        (lambda: callbacks.Pruning(0.5, sparsity_m_by_n=(4, 4)), "m < n"),
        (lambda: callbacks.Pruning(0.5, sparsity_m_by_n=(2, 4), scope="global"), "goes with neither"),
        (lambda: callbacks.Pruning({"a": 0.5}, layers="b"), "chooses the layers itself"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (lambda: callbacks.Pruning(0.5, layers="nothing"), "'nothing', which matches none. Layers: dense"),
        (lambda: callbacks.Pruning(0.5, layers=3), "layers.* Received: 3 of type int"),
        (lambda: callbacks.Pruning(0.5, sparsity_m_by_n=(2, 32)), "at least 32 input channels"),
        (lambda: callbacks.Pruning(0.5, block_size=(64, 1)), "block_size=.* is larger"),
    ],
)
def test_what_does_not_fit_the_model_is_named_and_nothing_is_changed(pruning, message):
    model = net()
    model.compile("sgd", LOSS)
    with pytest.raises((ValueError, TypeError), match=message):
        model.fit(X, Y, verbose=0, callbacks=[pruning()])
    assert all(layer.kernel.constraint is None for layer in model.layers)


def test_a_model_without_kernels_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no trainable kernels"):
        model.fit(X, X, verbose=0, callbacks=[callbacks.Pruning(0.5)])


def test_kernels_that_a_pattern_does_not_fit_stay_dense_with_a_warning():
    model = convolutional((8, 8))
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="conv1 .kernel, shape .3, 3, 1, 8.*stay dense"):
        model.fit(RNG.normal(size=(8, 8, 8, 1)), Y[:8], verbose=0, callbacks=[callbacks.Pruning(0.5, sparsity_m_by_n=(2, 4))])
    assert [zeros(model.get_layer(name).kernel) for name in ("conv1", "conv2")] == [0, 0.5]


def test_a_schedule_that_cannot_reach_its_end_is_said_with_the_arithmetic():
    model = net()
    model.compile("sgd", LOSS)
    with pytest.warns(
        UserWarning, match=r"ends at optimizer step 100, and this fit at step 16 \(0 done \+ 2 epochs of 8 batches\)"
    ):
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[callbacks.Pruning(polynomial(end=100))])


def test_a_schedule_whose_last_update_is_early_is_said():
    model = net()
    model.compile("sgd", LOSS)
    schedule = polynomial(end=16, frequency=10)  # updates at steps 2 and 12
    reached = float(schedule(12)[1])
    with pytest.warns(UserWarning, match=rf"the last update, at step 12, asks for a sparsity of {reached:.3f}, not 0.75"):
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[callbacks.Pruning(schedule)])
    assert zeros(model.layers[0].kernel) == pytest.approx(reached, abs=0.01)


@pytest.mark.parametrize("length", [14, 97, 395, 1000])
def test_the_frequency_that_the_warning_names_ends_it(length):
    def warned(frequency, end):
        model = net()
        model.compile("sgd", LOSS)
        schedule = schedules.PolynomialDecay(0.0, 0.8, 0, end, power=1, frequency=frequency)
        pruning = callbacks.Pruning(schedule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(X, Y, batch_size=1, epochs=length // len(X) + 1, verbose=0, callbacks=[pruning])
        return [str(one.message) for one in caught if "The pruning schedule updates" in str(one.message)]

    (text,) = warned(length - 1 - length // 3, length)
    frequency, end = map(int, re.search(r"Set frequency=(\d+) and end_step=(\d+)", text).groups())
    assert length - length // 20 <= end <= length
    assert warned(frequency, end) == []


# What a review found


class _Break(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KilledError


@pytest.mark.parametrize("later", [lambda: callbacks.Pruning(0.25), lambda: callbacks.KeepSparsity(layers=layers.Dense)])
def test_masks_of_a_fit_that_ended_in_an_error_do_not_reach_into_a_later_one(later):
    model = net()
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    with pytest.raises(KilledError):
        model.fit(X, Y, verbose=0, callbacks=[callbacks.Pruning(0.9), _Break()])
    for layer in model.layers:
        layer.kernel.assign(keras.ops.ones(layer.kernel.shape) + keras.ops.arange(layer.kernel.shape[1], dtype="float32"))
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    callback = later()
    dense = not isinstance(callback, callbacks.Pruning)
    with pytest.warns(UserWarning, match="KeepSparsity keeps zeros") if dense else contextlib.nullcontext():
        model.fit(X, Y, verbose=0, callbacks=[callback])
    assert zeros(model.layers[0].kernel) == (0.25 if isinstance(callback, callbacks.Pruning) else 0)
    assert model.layers[0].kernel.constraint is None


@pytest.mark.parametrize(
    "schedule", [lambda: polynomial(), lambda: 0.75, lambda: schedules.Threshold(0.2, begin_step=3, frequency=50)]
)
def test_a_dense_model_that_is_past_the_schedule_is_pruned_at_once(schedule):
    model, watch = net(), Watch()
    model.compile("sgd", LOSS)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)  # 24 steps
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callbacks.Pruning(schedule()), watch])
    assert min(watch.seen) > 0.1
    assert isinstance(schedule(), schedules.Threshold) or watch.seen == [0.75] * 8


@pytest.mark.parametrize("end", [24, 23])
def test_a_dense_model_that_is_at_or_past_the_end_without_a_turn_there_is_pruned_at_once(end):
    model, watch = net(), Watch()
    model.compile("sgd", LOSS)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)  # 24 steps
    schedule = schedules.PolynomialDecay(0.0, 0.75, begin_step=1, end_step=end, frequency=4)  # turns at 21 and not after it
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callbacks.Pruning(schedule), watch])
    assert watch.seen == [0.75] * 8


def test_a_kernel_without_a_gradient_is_sparse_at_the_end_of_each_epoch():
    inputs = keras.Input((4,))
    used, unused = layers.Dense(3, name="used"), layers.Dense(8, name="unused")
    model = keras.Model(inputs, {"used": used(inputs), "unused": unused(inputs)})
    model.compile("adam", {"used": LOSS})
    pruning = callbacks.Pruning(schedules.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=4, frequency=1))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        history = model.fit(X, {"used": Y}, batch_size=8, epochs=2, verbose=0, callbacks=[pruning]).history
    assert history["unused_sparsity"] == history["used_sparsity"] == [0.5, 0.5]


def test_validation_with_averaged_weights_sees_the_zeros():
    model, seen = net(), []

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(zeros(model.layers[0].kernel))

    model.compile(keras.optimizers.Adam(0.05, use_ema=True), LOSS)
    swap = keras.callbacks.SwapEMAWeights()
    model.fit(X, Y, validation_data=(X, Y), epochs=2, verbose=0, callbacks=[swap, callbacks.Pruning(0.5), Look()])
    assert seen == [0.5, 0.5]


def test_a_threshold_in_a_dict_is_no_pattern_either():
    with pytest.raises(ValueError, match="goes with neither"):
        callbacks.Pruning({layers.Dense: schedules.Threshold(0.1)}, sparsity_m_by_n=(2, 4))


@pytest.mark.parametrize(
    "schedule",
    [schedules.Threshold(0.1, end_step=0), schedules.PolynomialDecay(0.0, 0.5, 0, 2), schedules.ConstantSparsity(0.5, 0, 2)],
)
def test_a_few_zeros_do_not_pass_for_a_schedule_that_ended_before_the_fit(schedule):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(40, name="d"), keras.layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    x, y = np.zeros((32, 6), "float32"), np.zeros((32, 2), "float32")
    model.fit(x, y, batch_size=4, verbose=0)
    kernel, bias = model.get_layer("d").get_weights()
    kernel[0, 0] = 0.0
    model.get_layer("d").set_weights([kernel, bias])
    model.fit(x, y, verbose=0, callbacks=[keras_kd.callbacks.Pruning(schedule, layers="d")])
    after = np.asarray(model.get_layer("d").kernel)
    assert np.mean(after == 0) > 0.25
    model.fit(x, y, verbose=0, callbacks=[keras_kd.callbacks.Pruning(schedule, layers="d")])
    assert np.array_equal(np.asarray(model.get_layer("d").kernel) == 0, after == 0)
