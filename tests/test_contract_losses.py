"""The same demands on every public loss: adding one to `keras_kd.losses` enrols it here."""

import contextlib
import copy
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd import losses
from tests.conftest import convolutional

BASES = (losses.DistillationLoss, losses.ResponseLoss, losses.FeatureLoss, losses.RelationLoss)
PUBLIC = [
    value
    for name, value in vars(losses).items()
    if name in losses.__all__ and inspect.isclass(value) and issubclass(value, losses.DistillationLoss) and value not in BASES
]
# A student that equals its teacher has no loss, except where the loss is a cross-entropy, a likelihood, a margin or a contrast.
NOT_ZERO_AT_EQUALITY = (losses.NKDLoss, losses.VIDLoss, losses.ABLoss, losses.CRDLoss)

RNG = np.random.default_rng(5)
LABELS = RNG.integers(0, 4, size=6)
X, Y = RNG.normal(size=(12, 8, 8, 1)).astype("float32"), RNG.integers(0, 4, size=12)
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# What a loss compares: shapes of one teacher's and one student's features, and names of layers of `convolutional` that give such.
SHAPES = {
    "logits": [((6, 4), (6, 4))],
    "vector": [((6, 7), (6, 7))],
    "map": [((6, 8, 8, 5), (6, 8, 8, 5))],
    "maps": [((6, 8, 8, 5), (6, 8, 8, 5)), ((6, 4, 4, 3), (6, 4, 4, 3))],
}
LAYERS = {"logits": None, "vector": "pool", "map": "conv2", "maps": ["conv1", "conv2"]}
ONLY_MAPS = (losses.AttentionTransferLoss, losses.NSTLoss, losses.FactorTransferLoss)


class Case:
    """One public loss, and inputs of one form that it compares."""

    def __init__(self, make, form):
        self.make, self.form = make, form
        self.is_response, self.is_relation = form == "logits", issubclass(make, losses.RelationLoss)
        pairs = [(2 * RNG.normal(size=t), 2 * RNG.normal(size=s)) for t, s in SHAPES[form]]
        self.teacher, self.student = [self.one_or_several(list(side)) for side in zip(*pairs, strict=True)]

    def one_or_several(self, values):
        return values if self.form == "maps" else values[0]

    def __call__(self, **kwargs):
        return self.make(**kwargs)

    def on_layers(self, **kwargs):
        """The loss on layers of `convolutional`, or on the outputs."""
        return self.make(teacher_layer_name=LAYERS[self.form], student_layer_name=LAYERS[self.form], **kwargs)

    def models(self):
        """Teacher and student of different widths, where the loss allows it."""
        return convolutional((5, 8)), convolutional((5, 8) if self.make is losses.FSPLoss else (3, 6))

    def one_row_warns(self):
        return pytest.warns(UserWarning, match="batch of one") if self.is_relation else contextlib.nullcontext()


def forms_of(make):
    if issubclass(make, losses.ResponseLoss):
        return ["logits"]
    if make is losses.FSPLoss:
        return ["maps"]
    if make is losses.ReviewKDLoss:
        return ["map", "maps"]
    return ["map"] if make in ONLY_MAPS else ["vector", "map"]


CASES = [Case(make, form) for make in PUBLIC for form in forms_of(make)]


def parametrized(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case.make.__name__}-{case.form}")


every_loss = parametrized(CASES)
# For what takes longer: each loss once, on its largest features.
EACH_ONCE = list({case.make: case for case in CASES}.values())
each_loss_once = parametrized(EACH_ONCE)
every_response_loss = parametrized([case for case in CASES if case.is_response])
# Several layers have no place in a plain model's loss, nor in keras.distillation.
each_loss_on_one_layer = parametrized(list({case.make: case for case in CASES if case.form != "maps"}.values()))


def targets(loss, teacher):
    if not loss.uses_labels:
        return teacher
    labels = LABELS[: len(teacher)] if np.ndim(teacher) == 2 else np.zeros(np.shape(teacher)[:-1], int)
    return {"teacher": teacher, "labels": labels}


def tensors(features, dtype=None):
    return keras.tree.map_structure(lambda f: tf.cast(tf.convert_to_tensor(f), dtype or tf.convert_to_tensor(f).dtype), features)


def changed(features, change):
    return keras.tree.map_structure(change, features)


def gradient(loss, y_true, student):
    student = tensors(student)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(y_true, student)
    return value, tape.gradient(value, student)


def layers_of(loss):
    return getattr(loss, "layers", [])


def take_weights(loss, other):
    """Sets the weights of the layers that `loss` owns to those of `other`, built for the same shapes."""
    for mine, theirs in zip(layers_of(loss), layers_of(other), strict=True):
        mine.set_weights(theirs.get_weights())


def test_all_public_losses_are_found():
    names = "KD DKD DIST NKD MultiLevelKD Hint AttentionTransfer NST FactorTransfer VID AB FSP ReviewKD CRD RKD SP PKT Correlation"
    assert {loss.__name__ for loss in PUBLIC} >= {f"{name}Loss" for name in names.split()}


@every_loss
def test_a_config_round_trip_keeps_every_argument_and_the_value(case):
    loss = case(name="mine", reduction="sum", dtype="float64", output_name="digit")
    if hasattr(loss, "temperature"):
        loss.temperature = 2.25  # assigned later: the config holds what is true now
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert again.get_config() == loss.get_config()
    assert set(inspect.signature(case.make.__init__).parameters) - {"self", "kwargs"} <= set(loss.get_config())
    y_true = targets(loss, case.teacher)
    for one in (loss, again):
        one(y_true, case.student)  # builds its layers
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    again(y_true, case.student)
    take_weights(again, loss)
    np.testing.assert_array_equal(again(y_true, case.student), loss(y_true, case.student))


@every_loss
def test_a_copy_is_independent_of_the_original(case):
    loss = case()
    y_true = targets(loss, case.teacher)
    before = float(loss(y_true, case.student))
    twin = copy.deepcopy(loss)
    assert float(twin(y_true, case.student)) == before
    if hasattr(twin, "temperature"):
        twin.temperature = 9.0
    for layer in layers_of(twin):
        layer.set_weights([3 * weight + 1 for weight in layer.get_weights()])
    assert float(loss(y_true, case.student)) == before


@parametrized([case for case in EACH_ONCE if hasattr(case.make(), "temperature")])
def test_a_temperature_reads_as_it_was_set_and_reaches_compiled_steps(case):
    loss = case(temperature=4, dtype="float64")
    y_true = targets(loss, case.teacher)
    assert loss.temperature == 4
    first = float(loss(y_true, case.student))
    compiled = tf.function(lambda: loss(y_true, case.student))
    np.testing.assert_allclose(compiled(), first, rtol=1e-12)
    loss.temperature = 1.75
    assert loss.temperature == 1.75
    value = float(loss(y_true, case.student))
    assert value != first
    np.testing.assert_allclose(compiled(), value, rtol=1e-12)
    with pytest.raises(ValueError, match="`temperature` must be"):
        loss.temperature = -1.0


@every_loss
def test_one_value_comes_per_sample_and_their_mean_is_the_loss(case):
    loss, per_sample = case(dtype="float64"), case(dtype="float64", reduction="none")
    y_true = targets(loss, case.teacher)
    values = per_sample(y_true, case.student)
    assert values.shape == (6,)
    loss(y_true, case.student)
    take_weights(loss, per_sample)
    np.testing.assert_allclose(loss(y_true, case.student), np.mean(values), rtol=1e-12)


@every_loss
def test_sample_weights_weigh_the_values(case):
    loss, per_sample = case(dtype="float64"), case(dtype="float64", reduction="none")
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    y_true = targets(loss, case.teacher)
    expected = np.mean(weights * np.array(per_sample(y_true, case.student)))
    loss(y_true, case.student)
    take_weights(loss, per_sample)
    np.testing.assert_allclose(loss(y_true, case.student, weights), expected, rtol=1e-12)


@every_response_loss
def test_sequences_give_one_value_per_position(case):
    loss = case(reduction="none")
    sequence = np.stack([case.teacher, case.teacher])
    assert loss(targets(loss, sequence), np.stack([case.student, case.student])).shape == (2, 6)


@every_loss
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(case):
    if case.make in NOT_ZERO_AT_EQUALITY:
        pytest.skip("not zero at equality")
    if case.make is losses.ReviewKDLoss and case.form == "maps":
        pytest.skip("the layers between have weights")
    loss = case(dtype="float64")
    value, slopes = gradient(loss, targets(loss, case.teacher), case.teacher)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    for slope in keras.tree.flatten(slopes):
        # eps of PKT's logarithm moves its minimum by as much
        np.testing.assert_allclose(slope, 0, atol=1e-7 if case.make is losses.PKTLoss else 1e-12)


@each_loss_once
def test_eager_graph_and_xla_agree(case):
    loss = case()
    y_true, student = targets(loss, case.teacher), tensors(case.student, tf.float32)
    loss(y_true, student)  # builds its layers
    expected = keras.tree.flatten(gradient(loss, y_true, student))
    for jit in (False, True):
        compiled = tf.function(lambda s: gradient(loss, y_true, s), jit_compile=jit)
        for got, want in zip(keras.tree.flatten(compiled(student)), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@every_loss
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_outputs_are_computed_in_float32(case, dtype):
    loss = case(dtype=dtype)
    assert loss.dtype == "float32"
    teacher, student = tensors(case.teacher, dtype), tensors(case.student, dtype)
    loss(targets(loss, teacher), student)
    expected = loss(targets(loss, tensors(teacher, "float32")), tensors(student, "float32"))
    value = loss(targets(loss, teacher), student)
    assert value.dtype == tf.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@each_loss_once
@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        (lambda t: 1e4 * np.sign(t), lambda s: -1e4 * np.sign(s)),
        (lambda t: 1e4 * t, lambda s: 1e4 * s),
        (np.zeros_like, np.zeros_like),
        (np.ones_like, lambda s: 7 * np.ones_like(s)),
        (lambda t: np.full_like(t, 0.1), lambda s: np.full_like(s, -0.3)),
        (lambda t: t[:1], lambda s: s[:1]),
        (lambda t: np.zeros_like(t[:1]), lambda s: np.zeros_like(s[:1])),
        (lambda t: t[..., :2], lambda s: s[..., :2]),
        (lambda t: t, np.zeros_like),
        (np.zeros_like, lambda s: s),
        (lambda t: 1e-20 * t, lambda s: 1e-20 * s),
    ],
    ids=[
        "opposite extremes",
        "extremes",
        "zeros",
        "constants",
        "rounded constants",
        "one sample",
        "one zero sample",
        "two classes",
        "a dead student",
        "a dead teacher",
        "tiny",
    ],
)
def test_values_and_gradients_stay_finite(case, of_teacher, of_student):
    loss = case()
    teacher = changed(case.teacher, lambda t: of_teacher(t).astype("float32"))
    student = changed(case.student, lambda s: of_student(s).astype("float32"))
    y_true = targets(loss, teacher)
    if loss.uses_labels:
        y_true["labels"] = y_true["labels"] % teacher.shape[-1]
    with case.one_row_warns() if len(keras.tree.flatten(teacher)[0]) == 1 else contextlib.nullcontext():
        value, slopes = gradient(loss, y_true, student)
    assert np.isfinite(value)
    for slope in keras.tree.flatten(slopes):
        assert np.all(np.isfinite(slope))
        if case.is_response:
            assert np.max(np.abs(slope)) < 1e3  # and not just below overflow


@parametrized([case for case in CASES if case.is_relation])
def test_a_batch_of_one_has_no_relations(case):
    loss = case()
    with pytest.warns(UserWarning, match="batch of one"):
        value, slope = gradient(loss, case.teacher[:1], case.student[:1])
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


@each_loss_on_one_layer
def test_it_trains_a_plain_model_on_stored_teacher_outputs(case):
    loss = case()
    student = keras.Sequential([keras.Input(case.student.shape[1:]), keras.layers.Dense(case.student.shape[-1])])
    student.compile(
        "adam",
        loss=loss if not loss.uses_labels else lambda y, p: loss({"teacher": y, "labels": LABELS}, p),
        run_eagerly=not case.is_response,
    )
    history = student.fit(case.student, case.teacher, epochs=4, shuffle=False, verbose=0).history["loss"]
    assert history[-1] < history[0]


@each_loss_on_one_layer
def test_it_stands_in_a_keras_distillation_distiller(case):
    loss = case.on_layers()
    if loss.uses_labels:
        pytest.skip("keras.distillation hands no labels to its losses")
    teacher, student = case.models()
    distiller = keras.distillation.Distiller(teacher, student, loss)
    distiller.compile(keras.optimizers.SGD(0.0), loss=FROM_LOGITS)
    x = RNG.normal(size=(6, 8, 8, 1)).astype("float32")
    logs = distiller.train_on_batch(x, LABELS, return_dict=True)
    given, learned = [inner(model, LAYERS[case.form], x) for model in (teacher, student)]
    np.testing.assert_allclose(logs["distillation_loss"], loss(given, learned), rtol=1e-5)


def inner(model, names, x):
    """What the named layers of a model give, or the model itself."""
    if names is None:
        return model(x)
    outputs = [model.get_layer(name).output for name in ([names] if isinstance(names, str) else names)]
    return keras.Model(model.inputs[0], outputs[0] if isinstance(names, str) else outputs)(x)


@parametrized([case for case in EACH_ONCE if not case.is_response])
def test_a_distiller_trains_with_it_and_every_layer_that_it_owns(case):
    loss = case.on_layers()
    distiller = keras_kd.Distiller(*case.models(), loss, student_loss_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.01), loss=FROM_LOGITS, run_eagerly=True)
    before = [layer.get_weights() for layer in layers_of(loss)]
    history = [distiller.train_on_batch(X, Y, return_dict=True)["distillation_loss"] for _ in range(5)]
    assert history[-1] < history[0]
    if case.make is losses.CRDLoss:
        return  # the embeddings move; the constant of the first batch and the queue are no weights
    for layer, weights in zip(layers_of(loss), before, strict=True):
        for now, then in zip(layer.get_weights(), weights, strict=True):
            assert not np.array_equal(now, then), layer.name


@each_loss_once
def test_it_survives_saving_a_compiled_distiller_with_its_own_layers(case, tmp_path):
    loss = case.on_layers()
    teacher, student = case.models()
    distiller = keras_kd.Distiller(teacher, student, loss)
    distiller.compile("sgd", loss=FROM_LOGITS, run_eagerly=True)
    distiller.train_on_batch(X, Y)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.teacher = teacher
    (again,) = loaded.distillation_losses
    assert len(layers_of(again)) == len(layers_of(loss))
    for mine, theirs in zip(layers_of(again), layers_of(loss), strict=True):
        for now, then in zip(mine.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(now, then)
    assert loaded.evaluate(X, Y, verbose=0) == distiller.evaluate(X, Y, verbose=0)


@pytest.mark.slow
@each_loss_once
def test_it_trains_in_mixed_precision_with_loss_scaling(case):
    loss = case.on_layers()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        teacher, student = case.models()
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = keras_kd.Distiller(teacher, student, loss)
    distiller.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), loss=FROM_LOGITS)
    history = distiller.fit(np.tile(X, (50, 1, 1, 1)), np.tile(Y, 50), batch_size=6, verbose=0).history  # 100 steps
    assert np.all(np.isfinite(history["loss"]))  # a mean: one step that was not would show
    for variable in [*distiller.student.variables, *(v for layer in layers_of(loss) for v in layer.variables)]:
        assert np.all(np.isfinite(variable)), variable.path
    assert {v.dtype for layer in layers_of(loss) for v in layer.variables if "float" in v.dtype} <= {"float32"}


@each_loss_once
def test_its_docstring_has_an_equation_an_example_and_a_reference(case):
    doc = inspect.getdoc(case.make)
    for part in ("```", "Args:", "Call arguments:", "Returns:", "Raises:", "Example:", ">>> ", "Reference:"):
        assert part in doc, part
