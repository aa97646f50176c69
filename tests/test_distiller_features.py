"""Losses on inner layers in the Distiller: one pass of each model, layers of their own, statistics, files, names of layers."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import Distiller, losses
from tests import references
from tests.conftest import convolutional

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(23)
X = RNG.normal(size=(12, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 4, size=12)
CONV2 = {"teacher_layer_name": "conv2", "student_layer_name": "conv2"}
POOL = {"teacher_layer_name": "pool", "student_layer_name": "pool"}
BOTH = {"teacher_layer_name": ["conv1", "conv2"], "student_layer_name": ["conv1", "conv2"]}


def twin(model):
    """A model of the same architecture and weights, sharing nothing."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def output_of(model, *names):
    """What the named layers give in inference, as float64 arrays."""
    outputs = keras.Model(model.inputs[0], [model.get_layer(name).output for name in names])(X, training=False)
    arrays = [np.array(output, "float64") for output in (outputs if isinstance(outputs, list) else [outputs])]
    return arrays if len(names) > 1 else arrays[0]


def arrays_of(variables):
    return [np.array(variable) for variable in variables]


def assert_equal_arrays(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def compiled(teacher, student, loss, optimizer=None, *, student_loss_weight=0.5, **options):
    """A Distiller that runs eagerly, since a trace takes longer than these few steps, unless `options` says otherwise."""
    distiller = Distiller(teacher, student, loss, student_loss_weight=student_loss_weight)
    distiller.compile(optimizer or keras.optimizers.Adam(0.01), loss=FROM_LOGITS, **{"run_eagerly": not options, **options})
    return distiller


def distillation_loss_of(loss, teacher=None, student=None, **kwargs):
    """The value that a Distiller logs before anything was trained."""
    teacher, student = teacher or convolutional((5, 8)), student or convolutional((3, 6))
    distiller = Distiller(teacher, student, loss, **kwargs)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS, run_eagerly=True)
    return teacher, student, distiller.evaluate(X, Y, batch_size=12, verbose=0, return_dict=True)["distillation_loss"]


# What is computed


def test_a_feature_loss_compares_what_the_named_layers_give():
    teacher, student, value = distillation_loss_of(losses.AttentionTransferLoss(**CONV2))
    expected = np.mean(references.attention_transfer(output_of(teacher, "conv2"), output_of(student, "conv2")))
    assert value == pytest.approx(expected, rel=1e-5)


def test_layers_of_different_names_and_sizes_are_compared():
    loss = losses.NSTLoss(teacher_layer_name="conv1", student_layer_name="conv2")
    teacher, student, value = distillation_loss_of(loss)
    expected = np.mean(references.nst(output_of(teacher, "conv1"), output_of(student, "conv2")))
    assert value == pytest.approx(expected, rel=1e-5)


def test_relations_compare_the_final_outputs_too():
    teacher, student, value = distillation_loss_of(losses.SPLoss())
    assert value == pytest.approx(references.sp(output_of(teacher, "head"), output_of(student, "head")), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "reference"),
    [(losses.AttentionTransferLoss, references.attention_transfer), (losses.NSTLoss, references.nst)],
    ids=["attention transfer", "nst"],
)
def test_the_values_of_lists_of_layers_add_up(make, reference):
    teacher, student, value = distillation_loss_of(make(**BOTH))
    pairs = zip(output_of(teacher, "conv1", "conv2"), output_of(student, "conv1", "conv2"), strict=True)
    assert value == pytest.approx(sum(np.mean(reference(t, s)) for t, s in pairs), rel=1e-5)


def test_a_list_of_one_name_is_that_layer():
    names = {"teacher_layer_name": ["conv2"], "student_layer_name": ["conv2"]}
    teacher, student, value = distillation_loss_of(losses.NSTLoss(**names))
    expected = np.mean(references.nst(output_of(teacher, "conv2"), output_of(student, "conv2")))
    assert value == pytest.approx(expected, rel=1e-5)


def test_flows_between_layers_are_compared():
    teacher, student = convolutional((5, 8)), convolutional((5, 8))
    _, _, value = distillation_loss_of(losses.FSPLoss(**BOTH), teacher, student)
    expected = np.mean(references.fsp(output_of(teacher, "conv1", "conv2"), output_of(student, "conv1", "conv2")))
    assert value == pytest.approx(expected, rel=1e-5)


def test_sample_weights_weigh_features_and_relations():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    distiller = compiled(teacher, student, [losses.NSTLoss(**CONV2), losses.KDLoss()])
    weights = np.arange(12.0)
    logs = distiller.evaluate(X, Y, batch_size=12, sample_weight=weights, verbose=0, return_dict=True)
    values = references.nst(output_of(teacher, "conv2"), output_of(student, "conv2"))
    assert logs["nst_loss"] == pytest.approx(np.mean(weights * values), rel=1e-5)


def test_teacher_and_student_may_see_images_of_different_sizes():
    teacher, student = convolutional((5, 8), size=16), convolutional((3, 6))
    loss = losses.AttentionTransferLoss(**CONV2)
    _, _, value = distillation_loss_of(loss, teacher, student, teacher_preprocessing=layers.Resizing(16, 16))
    feature = keras.Model(teacher.inputs[0], teacher.get_layer("conv2").output)(layers.Resizing(16, 16)(X))
    expected = np.mean(references.attention_transfer(np.array(feature, "float64"), output_of(student, "conv2")))
    assert feature.shape == (12, 8, 8, 8)
    assert value == pytest.approx(expected, rel=1e-4)


# One pass of each model


class Counting(layers.Layer):
    """Hands on what it gets and writes down every call."""

    def __init__(self, calls, **kwargs):
        super().__init__(**kwargs)
        self.calls = lambda training: calls.append(training)

    def call(self, x, training=None):
        self.calls(training)
        return x


def counted(model, calls):
    return keras.Sequential([keras.Input((8, 8, 1)), Counting(calls), *model.layers])


def test_each_model_runs_once_a_step_whatever_the_number_of_losses():
    of_teacher, of_student = [], []
    teacher, student = counted(convolutional((5, 8)), of_teacher), counted(convolutional((3, 6)), of_student)
    several = [
        losses.KDLoss(),
        losses.HintLoss(**CONV2),
        losses.AttentionTransferLoss(**BOTH),
        losses.RKDLoss(**POOL),
        losses.ReviewKDLoss(**BOTH),
        losses.CRDLoss(dim=4, queue=8, **POOL),
    ]
    distiller = compiled(teacher, student, several)
    of_teacher.clear(), of_student.clear()
    distiller.train_on_batch(X, Y)
    assert (of_teacher, of_student) == ([False], [True])
    of_teacher.clear(), of_student.clear()
    distiller.test_on_batch(X, Y)
    assert (of_teacher, of_student) == ([False], [False])


def test_evaluation_leaves_the_statistics_of_student_projectors_and_queues_untouched():
    teacher, student = convolutional((5, 8), norm=True), convolutional((3, 6), norm=True)
    several = [losses.HintLoss(**CONV2), losses.ReviewKDLoss(**BOTH), losses.CRDLoss(dim=4, queue=8, **POOL)]
    distiller = compiled(teacher, student, several)
    distiller.fit(X, Y, verbose=0)

    def weights():
        return arrays_of([*student.variables, *teacher.variables, *(v for loss in several for v in loss.variables)])

    before = weights()
    first = distiller.evaluate(X, Y, verbose=0)
    assert_equal_arrays(before, weights())
    assert distiller.evaluate(X, Y, verbose=0) == first
    distiller.predict(X, verbose=0)
    distiller(X)
    assert_equal_arrays(before, weights())


def test_a_step_of_training_updates_the_students_statistics_as_plain_training_does():
    options = {"run_eagerly": False}
    teacher, student = convolutional((5, 8)), convolutional((3, 6), norm=True)
    plain = twin(student)
    distiller = compiled(teacher, student, losses.AttentionTransferLoss(**CONV2), student_loss_weight=1.0, **options)
    plain.compile(keras.optimizers.Adam(0.01), loss=FROM_LOGITS, **options)
    for model in (distiller, plain):
        model.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(student.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not np.allclose(student.get_layer("norm").moving_mean, 0)


def test_training_moves_the_statistics_of_projectors_once_a_step():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    loss = losses.HintLoss(**CONV2)
    distiller = compiled(teacher, student, loss, keras.optimizers.SGD(0.0))
    feature = output_of(student, "conv2")
    projector = loss.layers[0]
    kernel, _, _, mean, _ = projector.get_weights()
    np.testing.assert_array_equal(mean, 0)
    distiller.fit(X, Y, batch_size=12, verbose=0)
    expected = 0.01 * np.mean(feature @ kernel, axis=(0, 1, 2))  # momentum 0.99
    np.testing.assert_allclose(projector.get_weights()[3], expected, rtol=1e-4, atol=1e-7)


def test_a_training_step_normalises_projections_by_the_batch():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    loss = losses.HintLoss(**CONV2)
    distiller = compiled(teacher, student, loss, keras.optimizers.SGD(0.0))
    kernel = loss.layers[0].get_weights()[0]
    projected = output_of(student, "conv2") @ kernel
    deviation = projected - np.mean(projected, axis=(0, 1, 2))
    normalized = deviation / np.sqrt(np.mean(deviation**2, axis=(0, 1, 2)) + 1e-3)
    logs = distiller.train_on_batch(X, Y, return_dict=True)
    expected = np.mean(references.hint(output_of(teacher, "conv2"), normalized))
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-4)


# CRD's memory


@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=lambda options: next(iter(options))
)
def test_crd_remembers_the_teacher_and_keeps_the_constant_of_the_first_batch(options):
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    loss = losses.CRDLoss(dim=4, queue=20, **POOL)
    distiller = compiled(teacher, student, loss, keras.optimizers.SGD(0.0), **options)
    (head_t, head_s, memory), start = loss.layers, np.array(loss.layers[2].embeddings)
    t, s = (
        references.l2_normalize(output_of(model, "pool") @ head.get_weights()[0] + head.get_weights()[1])
        for model, head in ((teacher, head_t), (student, head_s))
    )
    history = distiller.fit(X, Y, batch_size=6, shuffle=False, verbose=0).history["distillation_loss"]
    queue = np.array(memory.embeddings)
    np.testing.assert_allclose(queue[12:], start[:8], rtol=1e-6)
    newest_first = queue[:12].reshape(2, 6, 4)
    np.testing.assert_allclose(newest_first[0], t[6:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(newest_first[1], t[:6], rtol=1e-4, atol=1e-6)
    first = np.concatenate([np.sum(s[:6] * t[:6], axis=-1, keepdims=True), s[:6] @ start.T], axis=-1) / loss.temperature
    constant = np.mean(np.exp(first))
    assert np.exp(float(memory.known_log_scale)) == pytest.approx(constant, rel=1e-4)
    second_queue = np.concatenate([t[:6], start])[:20]
    expected = [
        np.mean(references.crd(t[:6], s[:6], start, constant=constant)),
        np.mean(references.crd(t[6:], s[6:], second_queue, constant=constant)),
    ]
    assert history[0] == pytest.approx(np.mean(expected), rel=1e-4)


# Layers of the losses


def test_the_layers_of_losses_train_with_the_student_and_do_not_belong_to_it():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    count, plain = len(student.weights), [weight.path for weight in student.trainable_weights]
    several = [losses.HintLoss(**CONV2), losses.VIDLoss(**POOL), losses.ReviewKDLoss(**BOTH)]
    distiller = compiled(teacher, student, several)
    owned = [variable for loss in several for variable in loss.trainable_variables]
    before = arrays_of(owned)
    assert len(owned) > 10
    in_distiller = {id(variable) for variable in distiller.trainable_variables}
    assert {id(variable) for variable in owned} <= in_distiller
    assert len(distiller.trainable_variables) == len(owned) + len(plain)
    distiller.fit(X, Y, epochs=3, verbose=0)
    for variable, then in zip(owned, before, strict=True):
        assert not np.array_equal(variable, then), variable.path
    assert len(student.weights) == count
    assert [weight.path for weight in student.trainable_weights] == plain
    assert distiller.predict(X, verbose=0).shape == (12, 4)
    np.testing.assert_allclose(distiller.predict(X, verbose=0), student.predict(X, verbose=0), rtol=1e-5)


def test_a_projectors_training_lowers_the_loss_of_a_frozen_student():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    student.trainable = False
    distiller = compiled(teacher, student, losses.HintLoss(**CONV2), student_loss_weight=0.0)
    history = distiller.fit(X, Y, batch_size=12, epochs=10, verbose=0).history["distillation_loss"]
    assert history[-1] < history[0]


def test_a_layer_of_ones_own_projects_and_is_trained():
    layer = layers.Conv2D(8, 3, padding="same", name="mine")
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    distiller = compiled(teacher, student, losses.HintLoss(projector=layer, **CONV2))
    kernel, bias = before = layer.get_weights()
    value = distiller.evaluate(X, Y, batch_size=12, verbose=0, return_dict=True)["distillation_loss"]
    projected = references.convolve(output_of(student, "conv2"), kernel, bias)
    assert value == pytest.approx(np.mean(references.hint(output_of(teacher, "conv2"), projected)), rel=1e-4)
    distiller.fit(X, Y, verbose=0)
    assert not np.array_equal(layer.get_weights()[0], before[0])


def test_a_projector_may_be_a_model():
    projector = keras.Sequential([layers.Conv2D(7, 1, activation="relu"), layers.Conv2D(8, 1)])
    loss = losses.HintLoss(projector=projector, **CONV2)
    distiller = compiled(convolutional((5, 8)), convolutional((3, 6)), loss)
    history = distiller.fit(X, Y, epochs=5, verbose=0).history["distillation_loss"]
    assert history[-1] < history[0]
    assert len(loss.trainable_variables) == 4


def test_without_a_projector_unequal_shapes_are_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"HintLoss.*\(None, 4, 4, 8\).*\(None, 4, 4, 6\)"):
        Distiller(convolutional((5, 8)), convolutional((3, 6)), losses.HintLoss(projector=None, **CONV2))


# Files


def several_losses():
    return [losses.HintLoss(**CONV2), losses.VIDLoss(**POOL), losses.ReviewKDLoss(**BOTH), losses.CRDLoss(dim=4, queue=8, **POOL)]


def owned_by(distiller):
    return arrays_of(variable for loss in distiller.distillation_losses for variable in loss.variables)


def test_a_loaded_distiller_goes_on_exactly_where_the_saved_one_stopped(tmp_path):
    teacher = convolutional((5, 8))
    distiller = compiled(teacher, convolutional((3, 6)), several_losses())
    distiller.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    distiller.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    loaded.teacher = teacher
    assert_equal_arrays(owned_by(loaded), owned_by(distiller))
    assert_equal_arrays(arrays_of(loaded.optimizer.variables), arrays_of(distiller.optimizer.variables))
    assert loaded.evaluate(X, Y, verbose=0) == distiller.evaluate(X, Y, verbose=0)
    histories = [model.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0).history["loss"] for model in (loaded, distiller)]
    np.testing.assert_allclose(*histories, rtol=1e-6)
    assert_equal_arrays(loaded.student.get_weights(), distiller.student.get_weights())


def test_weight_files_carry_the_layers_of_losses_into_a_fresh_distiller(tmp_path):
    teacher = convolutional((5, 8))
    distiller = compiled(teacher, convolutional((3, 6)), several_losses())
    distiller.fit(X, Y, verbose=0)
    distiller.save_weights(tmp_path / "a.weights.h5")
    fresh = compiled(teacher, convolutional((3, 6)), several_losses())
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "a.weights.h5")
    assert_equal_arrays(owned_by(fresh), owned_by(distiller))
    assert_equal_arrays(fresh.student.get_weights(), distiller.student.get_weights())
    assert fresh.evaluate(X, Y, verbose=0) == distiller.evaluate(X, Y, verbose=0)


def test_weight_files_hold_nothing_of_the_teacher(tmp_path):
    distiller = compiled(convolutional((61, 8)), convolutional((3, 6)), [losses.HintLoss(**CONV2), losses.RKDLoss(**POOL)])
    distiller.fit(X, Y, verbose=0)
    distiller.save_weights(tmp_path / "a.weights.h5")
    shapes = []
    with h5py.File(tmp_path / "a.weights.h5") as file:
        file.visititems(lambda _, item: shapes.append(item.shape) if isinstance(item, h5py.Dataset) else None)
    assert (6, 8) in shapes  # the projector
    assert not [shape for shape in shapes if 61 in shape]


def test_the_students_own_file_holds_no_layers_of_losses(tmp_path):
    distiller = compiled(convolutional((5, 8)), convolutional((3, 6)), several_losses())
    distiller.fit(X, Y, verbose=0)
    distiller.student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert [tuple(w.shape) for w in loaded.weights] == [tuple(w.shape) for w in convolutional((3, 6)).weights]


def test_training_that_was_killed_resumes_with_the_layers_of_losses(tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    teacher, weights = convolutional((5, 8)), convolutional((3, 6)).get_weights()
    chosen = [losses.HintLoss(**CONV2), losses.VIDLoss(**POOL)]
    start = None

    def distiller():
        nonlocal start
        student = convolutional((3, 6))
        student.set_weights(weights)
        made = compiled(teacher, student, [type(loss).from_config(loss.get_config()) for loss in chosen])
        made.optimizer.build(made.trainable_variables)
        if start is None:
            start = [layer.get_weights() for loss in made.distillation_losses for layer in loss.layers]
        for layer, values in zip((layer for loss in made.distillation_losses for layer in loss.layers), start, strict=True):
            layer.set_weights(values)
        return made

    whole, killed, resumed = distiller(), distiller(), distiller()
    whole.fit(X, Y, epochs=4, shuffle=False, verbose=0)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        killed.fit(X, Y, epochs=4, shuffle=False, verbose=0, callbacks=[backup, Kill()])
    history = resumed.fit(
        X, Y, epochs=4, shuffle=False, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")]
    )
    assert history.epoch[-1] == 3
    assert history.epoch[0] > 0
    for a, b in zip(owned_by(whole) + whole.student.get_weights(), owned_by(resumed) + resumed.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_projector_of_ones_own_is_saved_and_loaded(tmp_path):
    teacher = convolutional((5, 8))
    loss = losses.HintLoss(projector=layers.Conv2D(8, 3, padding="same", name="mine"), **CONV2)
    distiller = compiled(teacher, convolutional((3, 6)), loss)
    distiller.fit(X, Y, verbose=0)
    distiller.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    loaded.teacher = teacher
    assert isinstance(loaded.distillation_losses[0].layers[0], layers.Conv2D)
    assert loaded.evaluate(X, Y, verbose=0) == distiller.evaluate(X, Y, verbose=0)


# Models and names of layers


def functional(width, name=None):
    """A nested model: "backbone/conv", then "head"."""
    inputs = keras.Input((8, 8, 1))
    backbone = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Conv2D(width, 3, name="conv"), layers.ReLU(name="relu")], name="backbone"
    )
    x = layers.GlobalAveragePooling2D(name="pool")(backbone(inputs))
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name=name)


@pytest.mark.parametrize("name", ["backbone/conv", "conv"])
def test_layers_of_nested_models_are_named_by_path(name):
    teacher, student = functional(8), functional(5)
    loss = losses.AttentionTransferLoss(teacher_layer_name=name, student_layer_name="backbone/conv")
    _, _, value = distillation_loss_of(loss, teacher, student)
    maps = [np.array(model.get_layer("backbone").get_layer("conv")(X), "float64") for model in (teacher, student)]
    assert value == pytest.approx(np.mean(references.attention_transfer(*maps)), rel=1e-5)


class Subclassed(keras.Model):
    """Calls "shared" twice."""

    def __init__(self, width):
        super().__init__()
        self.conv = layers.Conv2D(width, 3, name="conv")
        self.shared = layers.Conv2D(width, 3, padding="same", activation="tanh", name="shared")
        self.pool = layers.GlobalAveragePooling2D()
        self.head = layers.Dense(4, name="head")

    def call(self, x):
        return self.head(self.pool(self.shared(self.shared(self.conv(x)))))


@pytest.mark.parametrize("options", [{"run_eagerly": False}, {}], ids=["graph", "eager"])
def test_subclassed_models_and_calls_of_shared_layers(options):
    teacher, student = Subclassed(8), Subclassed(5)
    for model in (teacher, student):
        model(X)
    several = [
        losses.HintLoss(teacher_layer_name="shared:1", student_layer_name="shared:0"),
        losses.NSTLoss(teacher_layer_name="conv", student_layer_name="conv"),
    ]
    distiller = compiled(teacher, student, several, **options)
    maps = [np.array(model.conv(X), "float64") for model in (teacher, student)]
    logs = distiller.evaluate(X, Y, batch_size=12, verbose=0, return_dict=True)
    assert logs["nst_loss"] == pytest.approx(np.mean(references.nst(*maps)), rel=1e-5)
    history = distiller.fit(X, Y, batch_size=6, epochs=4, verbose=0).history
    assert history["hint_loss"][-1] < history["hint_loss"][0]
    (projector,) = several[0].layers
    given = np.array(teacher.shared(teacher.shared(teacher.conv(X))), "float64")
    learned = np.array(projector(student.shared(student.conv(X))), "float64")
    logs = distiller.evaluate(X, Y, batch_size=12, verbose=0, return_dict=True)
    assert logs["hint_loss"] == pytest.approx(np.mean(references.hint(given, learned)), rel=1e-4)


def test_the_layers_of_losses_on_subclassed_models_are_trained_from_the_first_step():
    teacher, student = Subclassed(8), Subclassed(5)
    for model in (teacher, student):
        model(X)
    loss = losses.HintLoss(teacher_layer_name="conv", student_layer_name="conv")
    distiller = compiled(teacher, student, loss, keras.optimizers.SGD(0.1))
    distiller.train_on_batch(X, Y)
    assert len(loss.trainable_variables) == 3
    assert {id(v) for v in loss.trainable_variables} <= {id(v) for v in distiller.trainable_variables}
    before = arrays_of(loss.trainable_variables)
    distiller.train_on_batch(X, Y)
    assert not np.array_equal(before[0], loss.trainable_variables[0])


@pytest.mark.slow
def test_a_layer_inside_a_keras_application_teaches():
    teacher = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35, classes=4)
    student = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, strides=4, padding="same", name="conv"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, activation="softmax"),
        ]
    )
    x = RNG.normal(size=(8, 32, 32, 3)).astype("float32")
    loss = losses.HintLoss(teacher_layer_name="block_6_expand", student_layer_name="conv")
    distiller = Distiller(teacher, student, loss)
    distiller.compile("adam", loss="sparse_categorical_crossentropy", run_eagerly=True)
    before = teacher.get_weights()
    history = distiller.fit(x, Y[:8], epochs=5, verbose=0).history["distillation_loss"]
    assert history[-1] < history[0]
    assert loss.layers[0].units == teacher.get_layer("block_6_expand").output.shape[-1]
    assert_equal_arrays(teacher.get_weights(), before)


def test_missing_and_ambiguous_names_list_the_candidates():
    teacher, student = convolutional((5, 8)), functional(5)
    with pytest.raises(ValueError, match=r'No layer "conv9" in the teacher.*teacher_layer_name="conv9".*conv1, conv2, pool, head'):
        Distiller(teacher, student, losses.HintLoss(teacher_layer_name="conv9", student_layer_name="conv"))
    with pytest.raises(ValueError, match=r'No layer "nine" in the student.*Layers: backbone, backbone/conv'):
        Distiller(teacher, student, losses.HintLoss(teacher_layer_name=["conv1", "conv2"], student_layer_name=["conv", "nine"]))
    nested = keras.Sequential(
        [keras.Input((8, 8, 1)), *(keras.Sequential([layers.Conv2D(2, 1, name="same")], name=name) for name in ("one", "two"))]
    )
    with pytest.raises(ValueError, match=r'"same" is the name of several layers of the teacher.*one/same, two/same'):
        Distiller(nested, twin(nested), losses.HintLoss(teacher_layer_name="same", student_layer_name="one/same"))


def test_features_of_a_wrong_rank_name_the_loss_the_rank_and_the_shapes():
    teacher, student = convolutional((5, 8)), convolutional((3, 6))
    with pytest.raises(ValueError, match=r"NSTLoss.*maps.*rank 3 or 4 or 5.*\(None, 8\).*\(None, 6\)"):
        Distiller(teacher, student, losses.NSTLoss(**POOL))
    with pytest.raises(ValueError, match=r"ReviewKDLoss.*rank 4.*\(None, 4\).*\(None, 4\)"):
        Distiller(teacher, student, losses.ReviewKDLoss())
    with pytest.raises(ValueError, match=r"HintLoss.*same rank.*\(None, 4, 4, 8\).*\(None, 6\)"):
        Distiller(teacher, student, losses.HintLoss(teacher_layer_name="conv2", student_layer_name="pool"))


def test_one_name_without_the_other_is_an_error():
    for names in ({"teacher_layer_name": "conv2"}, {"student_layer_name": "conv2"}):
        with pytest.raises(ValueError, match="Give both"):
            losses.RKDLoss(**names)


def test_as_many_layers_of_the_student_as_of_the_teacher_are_compared():
    loss = losses.HintLoss(teacher_layer_name=["conv1", "conv2"], student_layer_name="conv2")
    with pytest.raises(ValueError, match=r"HintLoss.*2 of the teacher, 1 of the student"):
        Distiller(convolutional((5, 8)), convolutional((3, 6)), loss)


def test_another_teacher_of_the_same_shapes_can_take_over_and_one_of_others_is_an_error():
    distiller = compiled(convolutional((5, 8)), convolutional((3, 6)), losses.HintLoss(**CONV2))
    distiller.fit(X, Y, verbose=0)
    distiller.teacher = convolutional((9, 8))
    distiller.fit(X, Y, verbose=0)
    other = convolutional((5, 9))
    with pytest.raises(ValueError, match="HintLoss"):
        distiller.teacher = other


# Options of compile


OPTIONS = {
    "graph": {"run_eagerly": False},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 4},
}


def test_every_option_of_compile_gives_the_same_training():
    teacher, weights, start = convolutional((5, 8)), convolutional((3, 6)).get_weights(), None
    results = {}
    for name, options in OPTIONS.items():
        student = convolutional((3, 6))
        student.set_weights(weights)
        several = [losses.HintLoss(**CONV2), losses.RKDLoss(**POOL)]
        distiller = compiled(teacher, student, several, keras.optimizers.SGD(0.01), **options)
        projector = several[0].layers[0]
        start = start or projector.get_weights()
        projector.set_weights(start)
        history = distiller.fit(X, Y, batch_size=3, epochs=2, shuffle=False, verbose=0).history
        results[name] = [history["loss"], history["hint_loss"], *projector.get_weights(), *student.get_weights()]
    for name in OPTIONS:
        for got, want in zip(results[name], results["graph"], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_half_precision_students_learn_features_in_float32():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        student = convolutional((3, 6), norm=True)
    finally:
        keras.config.set_dtype_policy("float32")
    several = [losses.HintLoss(**CONV2), losses.SPLoss(**POOL)]
    distiller = compiled(convolutional((5, 8)), student, several, run_eagerly=False)
    history = distiller.fit(X, Y, batch_size=6, epochs=6, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]
    assert {variable.dtype for loss in several for variable in loss.variables} == {"float32"}


def test_batches_of_unknown_size_and_a_smaller_last_one_are_fine():
    several = [
        losses.RKDLoss(**POOL),
        losses.CorrelationLoss(**POOL),
        losses.PKTLoss(**POOL),
        losses.CRDLoss(dim=4, queue=8, **POOL),
    ]
    distiller = compiled(convolutional((5, 8)), convolutional((3, 6)), several, run_eagerly=False)
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)  # 5, 5, 2
    history = distiller.fit(dataset, epochs=2, shuffle=False, verbose=0, validation_data=dataset).history
    assert all(np.all(np.isfinite(values)) for values in history.values())


def test_every_loss_has_a_name_of_its_own_in_the_logs_and_their_sum_is_the_distillation_loss():
    several = [losses.HintLoss(**CONV2), losses.HintLoss(**POOL), losses.SPLoss(**POOL)]
    distiller = compiled(convolutional((5, 8)), convolutional((3, 6)), several)
    history = distiller.fit(X, Y, verbose=0).history
    assert set(history) == {"loss", "student_loss", "distillation_loss", "hint_loss", "hint_loss_1", "sp_loss"}
    total = sum(history[name][0] for name in ("hint_loss", "hint_loss_1", "sp_loss"))
    assert history["distillation_loss"][0] == pytest.approx(total, rel=1e-5)
