"""The Distiller's training: what it computes, under every option of `compile` and `fit`, against plain Keras training."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import Distiller, losses
from tests import references
from tests.conftest import classifier

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def twin(model):
    """A model of the same architecture and weights, sharing nothing."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def assert_same_weights(a, b, **tolerance):
    for left, right in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


OPTIONS = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 4},
    "xla and steps_per_execution": {"jit_compile": True, "steps_per_execution": 2},
}
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum and weight decay": lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01),
    "gradient accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=128.0),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pure_distillation_is_plain_training_on_the_teachers_outputs(teacher, student, data, options):
    plain, (x, _) = twin(student), data
    distiller = Distiller(teacher, student, losses.KDLoss(2.0), student_loss_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.01), loss=None, **options)
    distiller.fit(x, batch_size=8, epochs=3, shuffle=False, verbose=0)
    plain.compile(keras.optimizers.Adam(0.01), loss=losses.KDLoss(2.0), run_eagerly=True)
    plain.fit(x, np.asarray(teacher(x)), batch_size=8, epochs=3, shuffle=False, verbose=0)
    assert_same_weights(student, plain)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_option_acts_as_in_plain_training(teacher, student, data, make_optimizer):
    plain, (x, _) = twin(student), data
    distiller = Distiller(teacher, student, losses.KDLoss(2.0), student_loss_weight=0.0)
    distiller.compile(make_optimizer())
    distiller.fit(x, batch_size=8, epochs=2, shuffle=False, verbose=0)
    plain.compile(make_optimizer(), loss=losses.KDLoss(2.0), run_eagerly=True)
    plain.fit(x, np.asarray(teacher(x)), batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_same_weights(student, plain)


def test_the_total_is_its_formula_with_weights_regularisers_and_added_losses(teacher, data):
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.3))(inputs)
    hidden = layers.ActivityRegularization(l1=0.2)(hidden)
    student = keras.Model(inputs, layers.Dense(3)(hidden))
    x, y = data
    distiller = Distiller(teacher, student, [losses.KDLoss(3.0), losses.DKDLoss()], [0.7, 0.2], student_loss_weight=0.3)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    logs = distiller.train_on_batch(x, y, return_dict=True)

    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    supervised = -np.mean(references.log_softmax(z_s)[np.arange(24), y])
    kd, dkd = np.mean(references.kd(z_t, z_s, 3.0)), np.mean(references.dkd(z_t, z_s, y))
    student(x, training=True)
    added = sum(float(loss) for loss in student.losses)  # one of the kernel, one of the activity
    assert added > 0.3 * np.sum(student.layers[1].kernel.numpy() ** 2)
    distillation = 0.7 * kd + 0.2 * dkd
    expected = {
        "student_loss": supervised,
        "kd_loss": kd,
        "dkd_loss": dkd,
        "distillation_loss": distillation,
        "loss": 0.3 * supervised + 0.7 * distillation + added,
    }
    assert logs == pytest.approx(expected, rel=1e-5)


def test_sample_weights_weigh_both_parts(teacher, student, data):
    x, y = data
    weights = np.linspace(0, 2, 24).astype("float32")
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    logs = distiller.train_on_batch(x, y, sample_weight=weights, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean(weights * references.kd(z_t, z_s, 2.0)), rel=1e-5)
    supervised = -references.log_softmax(z_s)[np.arange(24), y]
    assert logs["student_loss"] == pytest.approx(np.mean(weights * supervised), rel=1e-5)


def test_class_weights_equal_the_sample_weights_that_they_stand_for(teacher, student, data):
    (x, y), other = data, twin(student)
    class_weight = {0: 0.2, 1: 1.0, 2: 4.0}
    for model, arguments in (
        (student, {"class_weight": class_weight}),
        (other, {"sample_weight": np.vectorize(class_weight.get)(y)}),
    ):
        distiller = Distiller(teacher, model)
        distiller.compile(keras.optimizers.SGD(0.1), loss=FROM_LOGITS)
        distiller.fit(x, y, batch_size=8, shuffle=False, verbose=0, **arguments)
    assert_same_weights(student, other)


def sequence_model(width):
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(9, width, mask_zero=True),
            layers.GRU(width, return_sequences=True),
            layers.Dense(4),
        ]
    )


def test_padding_masks_reach_the_distillation_loss():
    teacher, student = sequence_model(8), sequence_model(3)
    x = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 1, 2]])
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(x, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    values = references.kd(z_t, z_s, 2.0)
    assert logs["distillation_loss"] == pytest.approx(np.mean(values[x > 0]), rel=1e-3)
    assert logs["distillation_loss"] != pytest.approx(np.mean(values), rel=1e-2)


def many_outputs(kind, width):
    inputs = keras.Input((4,))
    hidden = layers.Dense(width, activation="tanh")(inputs)
    a, b = layers.Dense(3, name="a")(hidden), layers.Dense(5, name="b")(hidden)
    outputs = {"list": [a, b], "tuple": (a, b), "dict": {"a": a, "b": b}, "nested": {"b": b, "inner": [a]}}[kind]
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "nested"])
def test_several_outputs_are_each_distilled_and_added(kind, data):
    (x, y), teacher, student = data, many_outputs(kind, 16), many_outputs(kind, 4)
    distiller = Distiller(teacher, student, [losses.KDLoss(2.0), losses.DKDLoss()])
    labels = {"list": [y, y], "tuple": (y, y), "dict": {"a": y, "b": y}, "nested": {"b": y, "inner": [y]}}[kind]
    distiller.compile(keras.optimizers.SGD(0.0), loss=keras.tree.map_structure(lambda _: FROM_LOGITS, labels))
    logs = distiller.train_on_batch(x, labels, return_dict=True)
    pairs = zip(keras.tree.flatten(teacher(x)), keras.tree.flatten(student(x)), strict=True)
    pairs = [(np.array(t, "float64"), np.array(s, "float64")) for t, s in pairs]
    assert logs["kd_loss"] == pytest.approx(sum(np.mean(references.kd(t, s, 2.0)) for t, s in pairs), rel=1e-5)
    assert logs["dkd_loss"] == pytest.approx(sum(np.mean(references.dkd(t, s, y)) for t, s in pairs), rel=1e-5)
    supervised = sum(-np.mean(references.log_softmax(s)[np.arange(24), y]) for _, s in pairs)
    assert logs["student_loss"] == pytest.approx(supervised, rel=1e-5)


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("name", ["b", 1])
def test_a_loss_may_choose_one_of_several_outputs(kind, name, data):
    if kind == "dict" and name == 1:
        name = -1
    (x, y), teacher, student = data, many_outputs(kind, 16), many_outputs(kind, 4)
    distiller = Distiller(teacher, student, losses.KDLoss(2.0, output_name=name))
    distiller.compile(keras.optimizers.SGD(0.0), loss={"a": FROM_LOGITS, "b": FROM_LOGITS})
    logs = distiller.train_on_batch(x, {"a": y, "b": y}, return_dict=True)
    t, s = (np.array(keras.tree.flatten(model(x))[1], "float64") for model in (teacher, student))
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(t, s, 2.0)), rel=1e-5)


def test_weights_of_several_outputs_reach_their_own_output(data):
    (x, y), teacher, student = data, many_outputs("dict", 16), many_outputs("dict", 4)
    weights = {"a": np.linspace(0, 2, 24), "b": np.linspace(1, 0, 24)}
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0), loss={"a": FROM_LOGITS, "b": FROM_LOGITS})
    logs = distiller.train_on_batch(x, {"a": y, "b": y}, sample_weight=weights, return_dict=True)
    expected = sum(
        np.mean(weights[name] * references.kd(np.array(teacher(x)[name], "float64"), np.array(student(x)[name], "float64"), 2.0))
        for name in ("a", "b")
    )
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-5)


def test_dicts_of_losses_and_metrics_go_by_the_students_output_names(data):
    (x, y), teacher, student = data, many_outputs("list", 16), many_outputs("list", 4)
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss={"a": FROM_LOGITS, "b": FROM_LOGITS}, metrics={"a": ["accuracy"]})
    logs = distiller.train_on_batch(x, {"a": y, "b": y}, return_dict=True)
    assert {"a_loss", "b_loss", "a_accuracy"} <= set(logs)


def test_weights_and_temperatures_change_between_compiled_steps(teacher, student, data):
    x, y = data
    loss = losses.KDLoss(4.0)
    distiller = Distiller(teacher, student, [loss, losses.DISTLoss()], [1.0, 0.5], student_loss_weight=0.5)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    distiller.train_on_batch(x, y)
    traces = distiller.train_function
    distiller.student_loss_weight = 0.25
    distiller.distillation_loss_weights = [2.0, 0.0]
    distiller.distillation_loss_weights[1] = 3.0
    loss.temperature = 1.5
    assert (distiller.student_loss_weight, distiller.distillation_loss_weights, loss.temperature) == (0.25, [2.0, 3.0], 1.5)
    distiller.reset_metrics()  # which later versions of Keras do by themselves
    logs = distiller.train_on_batch(x, y, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    distillation = 2.0 * np.mean(references.kd(z_t, z_s, 1.5)) + 3.0 * references.dist(z_t, z_s)
    supervised = -np.mean(references.log_softmax(z_s)[np.arange(24), y])
    assert logs["loss"] == pytest.approx(0.25 * supervised + 0.75 * distillation, rel=1e-4)
    assert distiller.train_function is traces


def test_a_callback_can_schedule_the_share_of_the_supervised_loss(teacher, student, data):
    class Shift(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.student_loss_weight = 1.0 if epoch == 0 else 0.0

    x, y = data
    distiller = Distiller(teacher, student)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    history = distiller.fit(x, y, epochs=2, batch_size=24, verbose=0, callbacks=[Shift()]).history
    assert history["loss"] == pytest.approx([history["student_loss"][0], history["distillation_loss"][1]], rel=1e-6)


def test_logs_name_every_loss_and_validation_has_the_same(teacher, student, data):
    distiller = Distiller(teacher, student, [losses.KDLoss(), losses.KDLoss(2.0), "dist_loss"])
    distiller.compile("sgd", loss=FROM_LOGITS, metrics=["accuracy"])
    history = distiller.fit(*data, validation_data=data, verbose=0).history
    names = {"loss", "student_loss", "distillation_loss", "kd_loss", "kd_loss_1", "dist_loss", "accuracy"}
    assert set(history) == names | {f"val_{name}" for name in names}


def test_without_a_supervised_loss_no_student_loss_is_logged(teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd")
    assert set(distiller.fit(data[0], verbose=0).history) == {"loss", "distillation_loss"}


def test_validation_can_leave_the_teacher_out(teacher, student, data):
    calls = []

    class Counting(Distiller):
        def teacher_outputs(self, x):
            calls.append(1)
            return super().teacher_outputs(x)

    distiller = Counting(teacher, student, [losses.KDLoss(), losses.DISTLoss()])
    distiller.compile("sgd", loss=FROM_LOGITS, metrics=["accuracy"], run_eagerly=True)
    distiller.evaluate(*data, verbose=0)
    assert len(calls) > 0
    distiller.evaluate_teacher = False
    calls.clear()
    assert set(distiller.evaluate(*data, verbose=0, return_dict=True)) == {"loss", "student_loss", "accuracy"}
    assert calls == []
    history = distiller.fit(*data, validation_data=data, verbose=0).history
    assert {"distillation_loss", "kd_loss", "val_student_loss"} <= set(history)
    assert "val_distillation_loss" not in history


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_teacher_comes_out_as_it_went_in(options, student, data):
    teacher = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)]
    )
    teacher.layers[0].trainable = False
    before = [w.copy() for w in teacher.get_weights()]
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS, **options)
    distiller.fit(*data, verbose=0)
    distiller.evaluate(*data, verbose=0)
    for was, now in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert teacher.trainable
    assert [layer.trainable for layer in teacher.layers] == [False, True, True, True]
    assert not hasattr(teacher, "optimizer") or teacher.optimizer is None


def test_the_teacher_runs_in_inference_mode(student, data):
    x, _ = data
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(64), layers.Dropout(0.9), layers.Dense(3)])
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(x, return_dict=True)
    expected = np.mean(references.kd(np.array(teacher(x), "float64"), np.array(student(x), "float64"), 2.0))
    assert logs["distillation_loss"] == pytest.approx(expected, rel=1e-5)


def test_calling_and_predicting_is_the_student(teacher, student, data):
    x, _ = data
    distiller = Distiller(teacher, student)
    distiller.compile("sgd")
    np.testing.assert_array_equal(distiller(x), student(x))
    np.testing.assert_allclose(distiller.predict(x, verbose=0), student.predict(x, verbose=0), rtol=1e-6)
    assert distiller.student is student
    assert [w.path for w in distiller.weights] == [w.path for w in student.weights]


def test_the_student_runs_once_a_step_and_in_training_mode(teacher, data):
    modes = []

    class Watching(layers.Layer):
        def call(self, x, training=None):
            modes.append(training)
            return x

    student = keras.Sequential([keras.Input((4,)), Watching(), layers.Dense(3, name="out")])
    teacher_layer = teacher.layers[-1].name
    feature = keras.distillation.FeatureDistillation("mse", teacher_layer_name=teacher_layer, student_layer_name="out")
    distiller = Distiller(teacher, student, [losses.KDLoss(), losses.DKDLoss(), feature])
    distiller.compile("sgd", loss=FROM_LOGITS, run_eagerly=True)
    distiller.train_on_batch(*data)
    modes.clear()
    distiller.train_on_batch(*data)
    assert modes == [True]
    modes.clear()
    distiller.test_on_batch(*data)
    assert modes == [False]


def test_mixed_precision_students_get_loss_scaling_and_train_in_float32_losses(teacher, data):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        student = classifier(5, activation="softmax")
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = Distiller(teacher, student, [losses.KDLoss(), losses.DKDLoss(), losses.DISTLoss()])
    distiller.compile(keras.optimizers.Adam(0.01), loss="sparse_categorical_crossentropy")
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    history = distiller.fit(*data, epochs=12, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_a_teacher_may_have_another_dtype(half, student, data):
    teacher = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype=half)])
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(data[0], return_dict=True)
    z_t, z_s = np.array(tf.cast(teacher(data[0]), "float64")), np.array(student(data[0]), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(z_t, z_s, 2.0)), rel=1e-5)


def test_a_teacher_may_want_its_inputs_in_another_size_and_range(data):
    teacher = keras.Sequential([keras.Input((16, 16, 1), dtype="float32"), layers.Flatten(), layers.Dense(3)])
    student = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3)])
    preprocess = keras.Sequential([layers.Resizing(16, 16), layers.Rescaling(1 / 255.0)])
    x = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 1)).astype("float32")
    preprocess(x)
    distiller = Distiller(teacher, student, losses.KDLoss(2.0), teacher_preprocessing=preprocess)
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(x, return_dict=True)
    z_t, z_s = np.array(teacher(preprocess(x)), "float64"), np.array(student(x), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(z_t, z_s, 2.0)), rel=1e-4)


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden, self.out = layers.Dense(width, activation="tanh"), layers.Dense(3)

    def build(self, input_shape):
        self.hidden.build(input_shape)
        self.out.build((None, self.width))
        super().build(input_shape)

    def call(self, x):
        return self.out(self.hidden(x))

    def get_config(self):
        return {"width": self.width, "name": self.name}


def subclassed(width):
    model = Subclassed(width)
    model.build((None, 4))
    return model


def test_subclassed_models_are_distilled_once_from_logits_is_given(data):
    teacher, student = subclassed(16), subclassed(4)
    with pytest.raises(ValueError, match="from_logits=True"):
        Distiller(teacher, student)
    distiller = Distiller(teacher, student, losses.KDLoss(2.0, from_logits=True))
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    logs = distiller.train_on_batch(*data, return_dict=True)
    z_t, z_s = (np.array(model(data[0]), "float64") for model in (teacher, student))
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(z_t, z_s, 2.0)), rel=1e-5)


@pytest.mark.parametrize("t", [None, "softmax"])
@pytest.mark.parametrize("s", [None, "softmax"])
def test_softmax_models_are_distilled_through_their_logits(t, s, data):
    teacher, student = classifier(16, activation=t), classifier(5, activation=s)
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(data[0], return_dict=True)
    z_t, z_s = (np.array(model(data[0]), "float64") for model in (teacher, student))
    z_t, z_s = (np.log(z) if kind else z for z, kind in ((z_t, t), (z_s, s)))
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(z_t, z_s, 2.0)), rel=1e-5)


def test_binary_models_are_distilled_through_their_logits(data):
    teacher, student = classifier(16, classes=1, activation="sigmoid"), classifier(5, classes=1, activation="sigmoid")
    distiller = Distiller(teacher, student, losses.KDLoss(2.0, activation="sigmoid"))
    distiller.compile(keras.optimizers.SGD(0.0), loss="binary_crossentropy")
    logs = distiller.train_on_batch(data[0], data[1] % 2, return_dict=True)
    p_t, p_s = (np.array(model(data[0]), "float64") for model in (teacher, student))
    z_t, z_s = (np.log(p) - np.log(1 - p) for p in (p_t, p_s))
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.binary_kd(z_t, z_s, 2.0)), rel=1e-4)


def test_losses_of_keras_stand_in_the_list_and_get_probabilities_where_they_compare_them(teacher, student, data):
    x, _ = data
    found = [keras.losses.MeanSquaredError(), keras.losses.KLDivergence(), keras.losses.CategoricalCrossentropy(from_logits=True)]
    distiller = Distiller(teacher, student, found)
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(x, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    p_t = references.softmax(z_t)
    assert logs["mean_squared_error"] == pytest.approx(np.mean((z_t - z_s) ** 2), rel=1e-5)
    assert logs["kl_divergence"] == pytest.approx(np.mean(references.kd(z_t, z_s, 1.0)), rel=1e-4)
    cross_entropy = -np.mean(np.sum(p_t * references.log_softmax(z_s), axis=-1))
    assert logs["categorical_crossentropy"] == pytest.approx(cross_entropy, rel=1e-5)


def test_losses_of_keras_distillation_stand_in_the_list(teacher, student, data):
    x, _ = data
    layer = student.layers[0].name
    found = [
        keras.distillation.LogitsDistillation(3.0, loss=keras.losses.KLDivergence()),
        keras.distillation.FeatureDistillation("mse", teacher_layer_name=teacher.layers[-1].name, student_layer_name="out"),
    ]
    student = keras.Sequential([keras.Input((4,)), layers.Dense(3, name=layer), layers.Dense(3, name="out")])
    distiller = Distiller(teacher, student, found)
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(x, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    assert logs["logits_distillation"] == pytest.approx(np.mean(references.kd(z_t, z_s, 3.0)), rel=1e-4)
    assert logs["feature_distillation"] == pytest.approx(np.mean((z_t - z_s) ** 2), rel=1e-5)


def test_unlabelled_rows_can_be_distilled_beside_labelled_ones(teacher, student, data):
    x, y = data
    y = np.where(np.arange(24) < 6, y, -1)
    distiller = Distiller(teacher, student, losses.KDLoss(2.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    distiller.compile(keras.optimizers.SGD(0.0), loss=loss)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    z_t, z_s = np.array(teacher(x), "float64"), np.array(student(x), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(z_t, z_s, 2.0)), rel=1e-5)
    assert logs["student_loss"] == pytest.approx(-np.mean(references.log_softmax(z_s)[np.arange(6), y[:6]]), rel=1e-5)


def test_it_reads_tf_data_and_python_datasets(teacher, student, data):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return data[0][8 * index : 8 * index + 8], data[1][8 * index : 8 * index + 8]

    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS)
    for source in (tf.data.Dataset.from_tensor_slices(data).batch(8), Batches()):
        assert np.isfinite(distiller.fit(source, shuffle=False, verbose=0).history["loss"][0])


# Hooks


def test_a_subclass_can_correct_the_teachers_outputs(teacher, student, data):
    class Doubled(Distiller):
        def teacher_outputs(self, x):
            return 2.0 * super().teacher_outputs(x)

    distiller = Doubled(teacher, student, losses.KDLoss(2.0))
    distiller.compile(keras.optimizers.SGD(0.0))
    logs = distiller.train_on_batch(data[0], return_dict=True)
    z_t, z_s = np.array(teacher(data[0]), "float64"), np.array(student(data[0]), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean(references.kd(2 * z_t, z_s, 2.0)), rel=1e-5)


def test_a_subclass_can_replace_the_distillation_loss(teacher, student, data):
    seen = {}

    class Squared(Distiller):
        def distillation_loss(self, x, y, student, teacher, sample_weight):
            seen.update(x=x.shape, y=y.shape, weight=sample_weight.shape)
            return keras.ops.mean((student - teacher) ** 2)

    distiller = Squared(teacher, student)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    logs = distiller.train_on_batch(*data, sample_weight=np.ones(24), return_dict=True)
    z_t, z_s = np.array(teacher(data[0]), "float64"), np.array(student(data[0]), "float64")
    assert logs["distillation_loss"] == pytest.approx(np.mean((z_s - z_t) ** 2), rel=1e-5)
    assert logs["loss"] == pytest.approx(0.5 * logs["student_loss"] + 0.5 * logs["distillation_loss"], rel=1e-5)
    assert seen["x"][1:] == (4,)


def test_a_subclass_can_write_its_own_training_step(teacher, student, data):
    class SignDescent(Distiller):
        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred, sample_weight)
            variables = self.trainable_variables
            for variable, slope in zip(variables, tape.gradient(loss, variables), strict=True):
                variable.assign_sub(0.125 * tf.sign(slope))
            return self.compute_metrics(x, y, y_pred, sample_weight)

    before = [w.copy() for w in student.get_weights()]
    distiller = SignDescent(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS, metrics=["accuracy"])
    history = distiller.fit(*data, batch_size=24, verbose=0).history
    assert {"accuracy", "student_loss", "distillation_loss"} <= set(history)
    for was, now in zip(before, student.get_weights(), strict=True):
        np.testing.assert_allclose(np.abs(now - was), 0.125, rtol=1e-4)


def test_the_tape_does_not_watch_the_teacher(teacher, student, data):
    x, y = data
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS)
    with tf.GradientTape() as tape:
        loss = distiller.compute_loss(x, y, distiller(x, training=True))
    slopes = tape.gradient(loss, [v.value for v in teacher.trainable_variables])
    assert slopes == [None] * len(slopes)
    watched = []

    class Spy(tf.GradientTape):
        def __exit__(self, *args):
            watched.extend(id(v) for v in self.watched_variables())
            return super().__exit__(*args)

    original, tf.GradientTape = tf.GradientTape, Spy
    try:
        distiller.train_on_batch(x, y)
    finally:
        tf.GradientTape = original
    assert watched
    assert not {id(v.value) for v in teacher.variables} & set(watched)


def test_compiling_again_forgets_the_former_loss_and_metrics(teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS, metrics=["accuracy"])
    distiller.fit(*data, verbose=0)
    distiller.compile("sgd", loss=None)
    assert set(distiller.fit(data[0], verbose=0).history) == {"loss", "distillation_loss"}


def test_a_frozen_student_gets_a_warning_as_in_keras(teacher, student, data):
    student.trainable = False
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS)
    with pytest.warns(UserWarning, match="no trainable weights"):
        distiller.fit(*data, verbose=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_that_are_no_floats_pass_through(options, data):
    def model():
        inputs = keras.Input((4,))
        logits = layers.Dense(3)(inputs)
        return keras.Model(inputs, [logits, keras.ops.argmax(logits, axis=-1)])

    distiller = Distiller(model(), model(), losses.KDLoss(output_name=0))
    distiller.compile("sgd", **options)
    assert np.isfinite(distiller.fit(data[0], verbose=0).history["loss"][0])


def test_a_copy_has_the_teacher_and_a_student_of_its_own(teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=FROM_LOGITS)
    distiller.fit(*data, verbose=0)
    twin_of_it = copy.deepcopy(distiller)
    assert twin_of_it.teacher is teacher
    assert twin_of_it.student is not student
    before = student.get_weights()
    assert np.isfinite(twin_of_it.fit(*data, verbose=0).history["loss"][0])
    for a, b in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_its_own_export_is_the_students(teacher, student, data, tmp_path):
    distiller = Distiller(teacher, student)
    distiller.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(data[0]), student(data[0]), rtol=1e-5)


def test_training_without_labels_can_be_validated_with_metrics(teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", loss=None, metrics=["accuracy"])
    history = distiller.fit(data[0], validation_data=data, epochs=2, verbose=0).history
    assert set(history) == {"loss", "distillation_loss", "val_loss", "val_distillation_loss", "val_accuracy"}
    accuracy = np.mean(np.argmax(student(data[0]), axis=-1) == data[1])
    assert history["val_accuracy"][-1] == pytest.approx(accuracy)


def test_the_optimizer_makes_its_slots_outside_the_graph_of_the_step(teacher, student, data):
    eagerly = []

    class Noting(keras.optimizers.Adam):
        def build(self, variables):
            if not self.built:
                eagerly.append(tf.executing_eagerly())
            super().build(variables)

    distiller = Distiller(teacher, student)
    distiller.compile(Noting(), loss=FROM_LOGITS)
    distiller.fit(*data, verbose=0)
    assert eagerly == [True]
    assert [v.path for v in distiller.optimizer.variables][2].startswith(f"{distiller.optimizer.name}/")
