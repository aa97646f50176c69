"""Mistakes that training would accept in silence: each is named, and what is no mistake gets no warning."""

import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import Distiller, MutualDistiller, losses, metrics
from tests.conftest import classifier

SPARSE = keras.losses.SparseCategoricalCrossentropy


def two_heads(first=None, second=None, container=list):
    inputs = keras.Input((4,))
    heads = layers.Dense(3, activation=first, name="a")(inputs), layers.Dense(2, activation=second, name="b")(inputs)
    return keras.Model(inputs, dict(zip(("left", "right"), heads, strict=True)) if container is dict else container(heads))


def functional(build):
    inputs = keras.Input((4,))
    return keras.Model(inputs, build(inputs))


def distiller_of(student, loss, teacher=None):
    teacher = keras.models.clone_model(student) if teacher is None else teacher
    distiller = Distiller(teacher, student, keras.losses.MeanSquaredError())
    distiller.compile("sgd", loss)
    return distiller


# A supervised loss of the other kind than the output


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy"),
        ("SparseCategoricalCrossentropy", "SparseCategoricalCrossentropy"),
        ("categorical_crossentropy", "CategoricalCrossentropy"),
        ("binary_crossentropy", "BinaryCrossentropy"),
        (keras.losses.categorical_focal_crossentropy, "CategoricalFocalCrossentropy"),
        (keras.losses.BinaryFocalCrossentropy(), "BinaryFocalCrossentropy"),
        (SPARSE(), "SparseCategoricalCrossentropy"),
        ([SPARSE()], "SparseCategoricalCrossentropy"),
    ],
)
def test_a_loss_of_probabilities_on_logits_gets_a_warning_with_the_fix(loss, name):
    with pytest.warns(UserWarning, match=rf"student's output is logits.*loss=keras\.losses\.{name}\(from_logits=True\)") as caught:
        distiller_of(classifier(), loss)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "build",
    [
        lambda x: layers.Activation("linear", dtype="float32")(layers.Dense(3)(x)),
        lambda x: layers.BatchNormalization()(layers.Dense(3)(x)),
        lambda x: layers.Dropout(0.5)(layers.Dense(3)(x)),
        lambda x: layers.Add()([layers.Dense(3)(x), layers.Dense(3)(x)]),
        lambda x: layers.GlobalAveragePooling1D()(layers.Conv1D(3, 1)(layers.Reshape((2, 2))(x))),
        lambda x: layers.TimeDistributed(layers.Dense(3))(layers.Reshape((2, 2))(x)),
        lambda x: classifier()(x),
    ],
    ids=["linear activation", "batch normalisation", "dropout", "sum", "pooled", "per time step", "nested"],
)
def test_logits_are_known_behind_layers_that_keep_them(build):
    with pytest.warns(UserWarning, match="output is logits"):
        distiller_of(functional(build), "sparse_categorical_crossentropy")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("loss", [SPARSE(from_logits=True), keras.losses.BinaryCrossentropy(from_logits=True)])
def test_a_loss_of_logits_on_probabilities_gets_a_warning_with_the_fix(activation, loss):
    name = type(loss).__name__
    with pytest.warns(UserWarning, match=rf"ends in a {activation}.*from_logits=True\. Write loss=keras\.losses\.{name}\(\)"):
        distiller_of(classifier(activation=activation), loss)


def own_loss(y, p):
    return keras.losses.sparse_categorical_crossentropy(y, keras.ops.softmax(p))


class OwnLoss(SPARSE):
    def call(self, y_true, y_pred):
        return super().call(y_true, keras.ops.softmax(y_pred))


class Custom(layers.Layer):
    def call(self, x):
        return keras.ops.softmax(x)


class Softly(layers.Wrapper):
    def call(self, x):
        return keras.ops.softmax(self.layer(x))


class Reworked(keras.Model):
    @classmethod
    def of(cls, model):
        return cls(model.inputs, model.outputs)

    def call(self, x):
        return keras.ops.softmax(super().call(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, activation="softmax")
        self(np.zeros((1, 4)))

    def call(self, x):
        return self.head(x)

    def get_config(self):
        return {}


NO_MISTAKES = {
    "logits": (lambda: classifier(), SPARSE(from_logits=True)),
    "probabilities": (lambda: classifier(activation="softmax"), "sparse_categorical_crossentropy"),
    "regression": (lambda: classifier(), "mse"),
    "no loss": (lambda: classifier(), None),
    "no such loss, which fit tells": (lambda: classifier(), "no_such_loss"),
    "a function of one's own": (lambda: classifier(), own_loss),
    "a class of one's own": (lambda: classifier(), OwnLoss()),
    "hinge, which takes either": (lambda: classifier(), "categorical_hinge"),
    "positive scores": (lambda: classifier(activation="softplus"), "categorical_crossentropy"),
    "a custom last layer": (lambda: functional(lambda x: Custom()(layers.Dense(3)(x))), SPARSE()),
    "an activation of one's own": (lambda: classifier(activation=lambda z: keras.ops.softmax(z)), SPARSE()),
    "a subclassed student": (Subclassed, "sparse_categorical_crossentropy"),
    "a kernel under a constraint": (lambda: classifier(kernel_constraint="non_neg"), "categorical_crossentropy"),
    "a matrix of label noise": (
        lambda: functional(lambda x: layers.Dense(3, use_bias=False)(layers.Dense(3, activation="softmax")(x))),
        "sparse_categorical_crossentropy",
    ),
    "a mixture of probabilities": (
        lambda: functional(
            lambda x: layers.Dense(3)(layers.Concatenate()([layers.Dense(3, activation="softmax")(x) for _ in range(2)]))
        ),
        "categorical_crossentropy",
    ),
    "a wrapper of one's own": (lambda: functional(lambda x: Softly(layers.Dense(3))(x)), SPARSE()),
    "a graph that is not all": (lambda: Reworked.of(classifier()), SPARSE()),
    "a matrix of label noise in a wrapper": (
        lambda: functional(
            lambda x: layers.TimeDistributed(layers.Dense(2, use_bias=False))(
                layers.Dense(2, activation="softmax")(layers.Reshape((2, 2))(x))
            )
        ),
        SPARSE(),
    ),
    "a matrix of label noise in an inner model": (
        lambda: functional(
            lambda x: keras.Sequential([keras.Input((3,)), layers.Dense(3, use_bias=False)])(
                layers.Dense(3, activation="softmax")(x)
            )
        ),
        SPARSE(),
    ),
}


@pytest.mark.parametrize(("build", "loss"), NO_MISTAKES.values(), ids=NO_MISTAKES)
def test_what_may_be_meant_so_gets_no_warning(build, loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller_of(build(), loss, teacher=build())


@pytest.mark.parametrize("container", [list, dict])
@pytest.mark.parametrize("by_name", [True, False])
def test_with_several_outputs_the_one_that_is_meant_is_named(container, by_name):
    names = ("left", "right") if container is dict else ("a", "b")
    found = [SPARSE(from_logits=True), SPARSE()]
    student = two_heads(container=container)
    with pytest.warns(UserWarning, match=f'output "{names[1]}" is logits') as caught:
        distiller_of(student, dict(zip(names, found, strict=True)) if by_name else found)
    assert len(caught) == 1


@pytest.mark.parametrize("container", [list, dict])
def test_one_loss_is_that_of_each_output(container):
    with pytest.warns(UserWarning, match="is logits") as caught:
        distiller_of(two_heads(container=container), "sparse_categorical_crossentropy")
    assert len(caught) == 2


def test_a_supervised_loss_of_no_weight_gets_no_warning():
    distiller = Distiller(classifier(), classifier(), keras.losses.MeanSquaredError(), student_loss_weight=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.compile("sgd", "sparse_categorical_crossentropy")


def test_sums_of_sums_take_no_time():
    def build(x):
        for _ in range(60):
            x = layers.Add()([x, layers.Dropout(0.1)(x)])
        return layers.Dense(3)(x)

    began = time.monotonic()
    with pytest.warns(UserWarning, match="is logits"):
        distiller_of(functional(build), SPARSE())
    assert time.monotonic() - began < 10


def test_a_refused_compile_leaves_the_former_one(data):
    distiller = distiller_of(classifier(), SPARSE(from_logits=True))
    with pytest.raises(TypeError, match="alpha"):
        distiller.compile("sgd", "mse", alpha=0.5)
    assert "student_loss" in distiller.fit(*data, verbose=0).history


def test_students_that_teach_each_other_are_each_named():
    with pytest.warns(UserWarning, match="is logits") as caught:
        MutualDistiller([classifier(name="first"), classifier(name="second")]).compile("sgd", "sparse_categorical_crossentropy")
    assert [str(one.message).split('"')[1] for one in caught] == ["first", "second"]


# Losses by output, as in a plain Keras model


@pytest.mark.parametrize("container", [list, tuple, dict])
@pytest.mark.parametrize("by_name", [True, False])
def test_losses_and_weights_by_output_train_as_in_a_plain_model(container, by_name, data):
    x, y = data
    names = ("left", "right") if container is dict else ("a", "b")
    labels = y, np.eye(2, dtype="float32")[y % 2]
    found = SPARSE(from_logits=True), "categorical_crossentropy"
    given = [(dict(zip(names, each, strict=True)) if by_name else list(each)) for each in (found, labels, (2.0, 0.25))]
    student, teacher = (two_heads(second="softmax", container=container) for _ in range(2))
    plain = keras.models.clone_model(student)
    plain.set_weights(student.get_weights())
    distiller = Distiller(teacher, student, "mean_squared_error", student_loss_weight=1.0)
    logs = []
    for model in (distiller, plain):
        model.compile(keras.optimizers.SGD(0.1), loss=given[0], loss_weights=given[2])
        logs.append(model.fit(x, given[1], batch_size=8, epochs=2, shuffle=False, verbose=0).history)
    for left, right in zip(student.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert set(logs[1]) <= set(logs[0])
    for name, values in logs[1].items():
        assert logs[0][name] == pytest.approx(values, rel=1e-5), name


def test_one_of_several_outputs_alone_may_have_a_loss(data):
    x, y = data
    student = two_heads()
    distiller = Distiller(two_heads(), student, losses.KDLoss())
    distiller.compile("sgd", loss=[SPARSE(from_logits=True), None])
    logs = distiller.train_on_batch(x, [y, y], return_dict=True)
    expected = float(SPARSE(from_logits=True)(y, student(x)[0]))
    assert logs["student_loss"] == pytest.approx(expected, rel=0.2)


# Labels that nothing reads


OPTIONS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_labels_that_nothing_reads_get_one_warning_for_each_compile(options, teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", **options)
    with pytest.warns(UserWarning, match=r"nothing reads them.*pass loss= to `compile`.*student_loss_weight=0\.0") as caught:
        distiller.fit(*data, batch_size=8, epochs=2, verbose=0)
    assert len([one for one in caught if "nothing reads them" in str(one.message)]) == 1
    distiller.fit(*data, verbose=0)
    distiller.compile("sgd", **options)
    with pytest.warns(UserWarning, match="nothing reads them"):
        distiller.fit(*data, verbose=0)


def test_labels_of_a_data_set_beside_metrics_of_the_teacher_are_not_read_either(teacher, student, data):
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", metrics=[metrics.TeacherAgreement()])
    with pytest.warns(UserWarning, match="nothing reads them"):
        distiller.fit(tf.data.Dataset.from_tensor_slices(data).batch(8), shuffle=False, verbose=0)


class Noting(Distiller):
    def distillation_loss(self, x, y, student, teacher, sample_weight):
        return super().distillation_loss(x, y, student, teacher, sample_weight)


READERS = {
    "a loss": (Distiller, {}, {"loss": SPARSE(from_logits=True)}, {}),
    "a metric": (Distiller, {}, {"metrics": ["accuracy"]}, {}),
    "a weighted metric": (Distiller, {}, {"weighted_metrics": ["accuracy"]}, {}),
    "a distillation loss": (Distiller, {"distillation_losses": losses.DKDLoss()}, {}, {}),
    "class weights": (Distiller, {}, {}, {"class_weight": {0: 1.0, 1: 2.0, 2: 3.0}}),
    "a hook of a subclass": (Noting, {}, {}, {}),
    "nobody, as the user says": (Distiller, {"student_loss_weight": 0.0}, {}, {}),
}


@pytest.mark.parametrize(("cls", "made", "compiled", "fitted"), READERS.values(), ids=READERS)
def test_labels_that_are_read_get_no_warning(cls, made, compiled, fitted, teacher, student, data):
    distiller = cls(teacher, student, **made)
    distiller.compile("sgd", **compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.fit(*data, verbose=0, **fitted)


# Keywords of other code


@pytest.mark.parametrize(
    ("keyword", "fix"),
    [
        ("alpha", r"Distiller\(\.\.\., student_loss_weight=\.\.\.\).*1 - alpha"),
        ("temperature", r"KDLoss\(temperature=\.\.\.\)"),
        ("T", r"KDLoss\(temperature=\.\.\.\)"),
        ("distillation_loss", r"distillation_losses=\.\.\."),
        ("distillation_loss_fn", r"distillation_losses=\.\.\."),
        ("student_loss_fn", r"compile\(optimizer, loss=\.\.\.\)"),
    ],
)
def test_keywords_of_other_code_are_refused_with_what_to_write(keyword, fix):
    with pytest.raises(TypeError, match=rf"Distiller has no argument `{keyword}`\. Received: {keyword}=0\.5\. .*{fix}"):
        Distiller(classifier(), classifier(), **{keyword: 0.5})
    distiller = Distiller(classifier(), classifier())
    with pytest.raises(TypeError, match=rf"Distiller\.compile has no argument `{keyword}`.*{fix}"):
        distiller.compile("sgd", **{keyword: 0.5})


def test_arguments_in_the_wrong_one_of_constructor_and_compile_are_refused():
    for keyword in ("optimizer", "loss", "metrics"):
        with pytest.raises(TypeError, match=rf"no argument `{keyword}`.*goes to distiller\.compile"):
            Distiller(classifier(), classifier(), **{keyword: "mse"})
    distiller = Distiller(classifier(), classifier())
    for keyword in ("distillation_losses", "distillation_loss_weights", "student_loss_weight"):
        with pytest.raises(TypeError, match=rf"no argument `{keyword}`.*Write Distiller\(.*{keyword}="):
            distiller.compile("sgd", **{keyword: 0.5})
    with pytest.raises(TypeError, match="MutualDistiller has no argument `alpha`"):
        MutualDistiller([classifier(name="a"), classifier(name="b")], alpha=0.5)


def test_other_unknown_keywords_are_refused_as_ever():
    with pytest.raises(ValueError, match="colour"):
        Distiller(classifier(), classifier(), colour="red")
    with pytest.raises(TypeError, match="colour"):
        Distiller(classifier(), classifier()).compile("sgd", colour="red")
    with pytest.raises(TypeError, match="colour"):
        losses.KDLoss(colour="red")


@pytest.mark.parametrize(
    ("make", "keyword", "fix"),
    [
        (losses.KDLoss, "T", "Write `temperature`"),
        (losses.MultiLevelKDLoss, "tau", "`temperatures`"),
        (losses.KDLoss, "alpha", r"student_loss_weight=\.\.\."),
        (losses.DKDLoss, "weight", "distillation_loss_weights"),
        (losses.HintLoss, "weight", "distillation_loss_weights"),
        (losses.RKDLoss, "layer_name", "`teacher_layer_name` and `student_layer_name`"),
        (losses.HintLoss, "teacher_layer", "`teacher_layer_name` and `student_layer_name`"),
    ],
)
def test_losses_refuse_keywords_of_other_code_with_what_to_write(make, keyword, fix):
    with pytest.raises(TypeError, match=rf"{make.__name__} has no argument `{keyword}`\. Received: {keyword}=2\. .*{fix}"):
        make(**{keyword: 2})


def test_losses_that_take_alpha_themselves_still_do():
    assert losses.DKDLoss(alpha=2.0).alpha == 2.0
