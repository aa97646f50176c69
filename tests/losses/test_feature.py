"""Values and gradients of the feature losses against `tests/references.py`, in float64 to 1e-9."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kd import losses
from tests import references
from tests.losses.test_response import assert_matches, value_and_gradient

RNG = np.random.default_rng(17)


def features(*shapes):
    return [RNG.normal(size=shape) for shape in shapes]


def assert_matches_for_each_layer(loss, teachers, students, reference):
    """Value and gradient for lists of layers: the gradient of each layer with the others held."""
    values = [tf.constant(s) for s in students]
    with tf.GradientTape() as tape:
        tape.watch(values)
        value = loss(teachers, values)
    np.testing.assert_allclose(value, np.mean(np.real(reference(students))), rtol=1e-9, atol=1e-12)
    for index, slope in enumerate(tape.gradient(value, values)):

        def of_one(s, index=index):
            return np.mean(reference([*students[:index], s, *students[index + 1 :]]))

        np.testing.assert_allclose(slope, references.gradient(of_one, students[index]), rtol=1e-9, atol=1e-12)


EQUAL = [((3, 6), (3, 6)), ((3, 5, 4), (3, 5, 4)), ((3, 4, 4, 3), (3, 4, 4, 3)), ((2, 2, 3, 2, 4), (2, 2, 3, 2, 4))]
MAPS = {
    "equal": ((3, 4, 4, 5), (3, 4, 4, 5)),
    "other width": ((3, 4, 4, 5), (3, 4, 4, 2)),
    "larger teacher": ((3, 8, 8, 4), (3, 4, 4, 3)),
    "larger student": ((3, 4, 4, 4), (3, 8, 8, 3)),
    "larger teacher, not divisible": ((3, 7, 7, 4), (3, 4, 4, 3)),
    "larger student, not divisible": ((3, 5, 5, 4), (3, 7, 7, 2)),
    "one pixel": ((3, 6, 6, 4), (3, 1, 1, 3)),
    "oblong": ((3, 8, 6, 4), (3, 5, 3, 3)),
    "sequences": ((3, 10, 4), (3, 7, 3)),
    "volumes": ((2, 4, 4, 3, 3), (2, 3, 2, 3, 2)),
}
every_map = pytest.mark.parametrize(("teacher_shape", "student_shape"), MAPS.values(), ids=MAPS)


@pytest.mark.parametrize(("teacher_shape", "student_shape"), EQUAL)
@pytest.mark.parametrize("projector", ["auto", None])
def test_hint_of_equal_shapes_is_the_mean_squared_error(teacher_shape, student_shape, projector):
    teacher, student = features(teacher_shape, student_shape)
    loss = losses.HintLoss(projector=projector, dtype="float64")
    assert_matches(loss, teacher, lambda s: np.mean(references.hint(teacher, s)), student)
    assert loss.layers == []
    assert loss.trainable_variables == []


@pytest.mark.parametrize(("power", "form"), [(2, "mean"), (4, "mean"), (2, "paper"), (4, "paper"), (1, "mean"), (3, "mean")])
def test_attention_transfer_equals_its_formula(power, form):
    teacher, student = features((3, 4, 4, 5), (3, 4, 4, 2))
    loss = losses.AttentionTransferLoss(power=power, form=form, dtype="float64")
    assert_matches(loss, teacher, lambda s: np.mean(references.attention_transfer(teacher, s, power, form)), student)


@pytest.mark.parametrize(("p1", "p2"), [(2, 1), (2, 2), (4, 1), (1, 1), (3, 2), (2, 3)])
def test_factor_transfer_equals_its_formula(p1, p2):
    teacher, student = features((3, 4, 4, 5), (3, 4, 4, 2))
    loss = losses.FactorTransferLoss(p1=p1, p2=p2, dtype="float64")
    assert_matches(loss, teacher, lambda s: np.mean(references.factor_transfer(teacher, s, p1, p2)), student)


@every_map
@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (losses.AttentionTransferLoss, references.attention_transfer),
        (losses.FactorTransferLoss, references.factor_transfer),
        (losses.NSTLoss, references.nst),
    ],
    ids=["attention transfer", "factor transfer", "nst"],
)
def test_maps_may_differ_in_width_and_the_larger_is_average_pooled(make, reference, teacher_shape, student_shape):
    teacher, student = features(teacher_shape, student_shape)
    assert_matches(make(dtype="float64"), teacher, lambda s: np.mean(reference(teacher, s)), student)


# Variational information distillation: the loss's own weights enter the formula.


def vid_of(loss, **kwargs):
    """The reference with the loss's weights: three kernels and the vector that makes the variances."""
    *kernels, a = [np.array(variable) for variable in loss.trainable_variables]
    assert [kernel.ndim for kernel in kernels] == [2, 2, 2]
    return lambda t, s: references.vid(t, s, kernels, a, **kwargs)


VID_SHAPES = {"vectors": ((4, 5), (4, 3)), **MAPS}


@pytest.mark.parametrize(("teacher_shape", "student_shape"), VID_SHAPES.values(), ids=VID_SHAPES)
def test_vid_equals_its_formula(teacher_shape, student_shape):
    teacher, student = features(teacher_shape, student_shape)
    loss = losses.VIDLoss(dtype="float64")
    loss.build(teacher_shape, student_shape)
    for variable in loss.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    reference = vid_of(loss)
    assert_matches(loss, teacher, lambda s: np.mean(reference(teacher, s)), student)


@pytest.mark.parametrize(("variance", "eps"), [(5.0, 1e-5), (0.3, 1e-2)])
def test_vid_starts_from_the_variance_that_was_asked_for(variance, eps):
    loss = losses.VIDLoss(init_variance=variance, eps=eps, dtype="float64")
    loss.build((None, 4, 4, 5), (None, 4, 4, 3))
    a = np.array(loss.trainable_variables[-1])
    np.testing.assert_allclose(np.log(1 + np.exp(a)) + eps, np.full(5, variance), rtol=1e-6)
    teacher, student = features((2, 4, 4, 5), (2, 4, 4, 3))
    np.testing.assert_allclose(loss(teacher, student), np.mean(vid_of(loss, eps=eps)(teacher, student)), rtol=1e-9)


# Activation boundaries


@pytest.mark.parametrize("margin", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 4, 3)])
def test_ab_of_one_layer_equals_its_formula(shape, margin):
    teacher, student = features(shape, shape)
    loss = losses.ABLoss(margin=margin, dtype="float64")
    assert_matches(loss, teacher, lambda s: np.mean(references.ab(teacher, s, margin)), student)


def test_ab_counts_a_unit_only_on_the_wrong_side_of_its_margin():
    teacher = np.array([[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.0]])
    student = np.array([[-1.5, -0.5, 2.0, 1.5, 0.5, -2.0, 0.5]])
    expected = 0.0 + 0.5**2 + 3.0**2 + 0.0 + 0.5**2 + 3.0**2 + 1.5**2
    np.testing.assert_allclose(losses.ABLoss(dtype="float64")(teacher, student), expected / 1000 * 3, rtol=1e-12)


def test_ab_halves_each_layer_before_the_last():
    shapes = [(3, 4, 4, 2), (3, 2, 2, 3), (3, 5)]
    teachers, students = features(*shapes), features(*shapes)
    loss = losses.ABLoss(dtype="float64")
    assert_matches_for_each_layer(loss, teachers, students, lambda s: references.ab_of_several(teachers, s))


# Flow of the solution procedure


@pytest.mark.parametrize(
    ("teacher_shapes", "student_shapes"),
    [
        ([(3, 4, 4, 3), (3, 4, 4, 5)], [(3, 4, 4, 3), (3, 4, 4, 5)]),
        ([(3, 4, 4, 3), (3, 2, 2, 5)], [(3, 4, 4, 3), (3, 2, 2, 5)]),
        ([(3, 8, 8, 2), (3, 4, 4, 3)], [(3, 5, 5, 2), (3, 3, 3, 3)]),
        ([(3, 4, 4, 3), (3, 2, 2, 5), (3, 2, 2, 2)], [(3, 4, 4, 3), (3, 2, 2, 5), (3, 1, 1, 2)]),
        ([(3, 2, 2, 2), (3, 4, 4, 3)], [(3, 2, 2, 2), (3, 4, 4, 3)]),
        ([(3, 6, 3), (3, 4, 2)], [(3, 6, 3), (3, 4, 2)]),
    ],
    ids=["one size", "a smaller top", "sizes of their own", "three layers", "a larger top", "sequences"],
)
def test_fsp_equals_its_formula(teacher_shapes, student_shapes):
    teachers, students = features(*teacher_shapes), features(*student_shapes)
    loss = losses.FSPLoss(dtype="float64")
    assert_matches_for_each_layer(loss, teachers, students, lambda s: references.fsp(teachers, s))


def test_fsp_adds_the_values_of_consecutive_pairs():
    shapes = [(3, 4, 4, 3), (3, 4, 4, 2), (3, 2, 2, 5)]
    teachers, students = features(*shapes), features(*shapes)
    loss = losses.FSPLoss(dtype="float64", reduction="none")
    pairs = loss(teachers[:2], students[:2]) + loss(teachers[1:], students[1:])
    np.testing.assert_allclose(loss(teachers, students), pairs, rtol=1e-12)


# Review


@pytest.mark.parametrize("size", [8, 5, 4, 3, 2, 1])
def test_review_of_one_layer_is_the_hierarchical_context(size):
    teacher, student = features((2, size, size, 3), (2, size, size, 3))
    loss = losses.ReviewKDLoss(dtype="float64")
    assert_matches(loss, teacher, lambda s: np.mean(references.hierarchical_context(teacher, s)), student)


@pytest.mark.parametrize("levels", [(2,), (4, 1), (1, 2, 4), ()])
def test_review_weighs_its_levels_in_the_order_of_those_used(levels):
    teacher, student = features((2, 4, 4, 3), (2, 4, 4, 3))
    loss = losses.ReviewKDLoss(levels=levels, dtype="float64")
    expected = np.mean(references.hierarchical_context(teacher, student, levels))
    np.testing.assert_allclose(loss(teacher, student), expected, rtol=1e-9)


def of_weights(convolution, normalization=None):
    """NumPy's version of a Keras convolution, without its activation, and of the batch normalisation after it in inference."""
    kernel, *bias = convolution.get_weights()

    def run(f):
        f = references.convolve(f, kernel, *bias)
        return f if normalization is None else references.normalize_by_statistics(f, *normalization.get_weights(), 1e-3)

    return run


def review_of(loss, teachers):
    stages = [
        {
            "narrow": of_weights(fusion.reduce, fusion.reduce_norm),
            "widen": of_weights(fusion.expand, fusion.expand_norm),
            "gate": of_weights(fusion.gate) if fusion.gate is not None else None,
        }
        for fusion in loss.layers
    ]
    return lambda students: references.review(teachers, students, stages, loss.levels)


CASCADES = {
    "one layer of another width": ([(2, 4, 4, 5)], [(2, 4, 4, 3)]),
    "one layer of another size": ([(2, 6, 6, 3)], [(2, 4, 4, 3)]),
    "two layers": ([(2, 4, 4, 3), (2, 2, 2, 4)], [(2, 4, 4, 2), (2, 2, 2, 3)]),
    "three layers": ([(2, 8, 8, 2), (2, 4, 4, 3), (2, 2, 2, 4)], [(2, 8, 8, 2), (2, 4, 4, 2), (2, 2, 2, 3)]),
    "sizes of their own": ([(2, 8, 8, 2), (2, 5, 5, 3), (2, 1, 1, 4)], [(2, 6, 6, 2), (2, 4, 4, 2), (2, 2, 2, 3)]),
    "layers of one size": ([(2, 4, 4, 3), (2, 4, 4, 3)], [(2, 4, 4, 3), (2, 4, 4, 3)]),
}


@pytest.mark.parametrize(("teacher_shapes", "student_shapes"), CASCADES.values(), ids=CASCADES)
def test_review_of_several_layers_runs_the_fusion_cascade(teacher_shapes, student_shapes):
    teachers, students = features(*teacher_shapes), features(*student_shapes)
    loss = with_random_weights(losses.ReviewKDLoss(dtype="float64"), teacher_shapes, student_shapes)
    assert_matches_for_each_layer(loss, teachers, students, review_of(loss, teachers))
    assert [fusion.gate is not None for fusion in loss.layers] == [True] * (len(teachers) - 1) + [False]


def test_every_weight_of_the_cascade_gets_a_gradient():
    teachers, students = features((2, 4, 4, 3), (2, 2, 2, 4)), features((2, 4, 4, 2), (2, 2, 2, 3))
    loss = losses.ReviewKDLoss(mid_channels=5)
    with tf.GradientTape() as tape:
        value = loss(teachers, students)
    assert {variable.shape[-1] for variable in loss.trainable_variables} == {2, 3, 4, 5}
    for variable, slope in zip(loss.trainable_variables, tape.gradient(value, loss.trainable_variables), strict=True):
        assert slope is not None, variable.path
        assert np.any(slope != 0), variable.path


# Contrast


def crd_of(loss, teacher, index=0, constant=None):
    head_t, head_s, memory = loss.layers[3 * index : 3 * index + 3]

    def embedded(head, f):
        kernel, bias = head.get_weights()
        return references.l2_normalize(references.flat(f) @ kernel + bias)

    queue = np.array(memory.embeddings)
    return lambda s: references.crd(embedded(head_t, teacher), embedded(head_s, s), queue, loss.temperature, constant)


@pytest.mark.parametrize("constant", [None, 3.5], ids=["first batch", "later batches"])
@pytest.mark.parametrize(
    ("teacher_shape", "student_shape", "temperature"),
    [((4, 6), (4, 3), 0.07), ((4, 3, 3, 2), (4, 2, 2, 3), 0.5)],
    ids=["vectors", "maps"],
)
def test_crd_equals_its_formula(teacher_shape, student_shape, temperature, constant):
    teacher, student = features(teacher_shape, student_shape)
    loss = losses.CRDLoss(dim=5, temperature=temperature, queue=7, dtype="float64")
    loss.build(teacher_shape, student_shape)
    if constant is not None:
        loss.layers[2].known_log_scale.assign(np.log(constant))
    reference = crd_of(loss, teacher, constant=constant)
    assert_matches(loss, teacher, lambda s: np.mean(reference(s)), student)


def test_crd_learns_the_students_embedding_and_neither_the_teachers_nor_the_queue():
    teacher, student = features((4, 6), (4, 3))
    loss = losses.CRDLoss(dim=5, queue=7)
    with tf.GradientTape() as tape:
        value = loss(teacher, student)
    assert [tuple(variable.shape) for variable in loss.trainable_variables] == [(3, 5), (5,)]
    assert all(np.any(slope != 0) for slope in tape.gradient(value, loss.trainable_variables))
    norms = np.linalg.norm(np.array(loss.layers[2].embeddings), axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_crd_of_several_layers_adds_up():
    teachers, students = features((4, 6), (4, 2, 2, 3)), features((4, 3), (4, 5))
    loss = losses.CRDLoss(dim=5, queue=7, dtype="float64")
    loss.build([t.shape for t in teachers], [s.shape for s in students])
    expected = sum(crd_of(loss, t, index)(s) for index, (t, s) in enumerate(zip(teachers, students, strict=True)))
    np.testing.assert_allclose(loss(teachers, students), np.mean(expected), rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 100.0])
def test_crd_is_finite_at_any_temperature_in_float32(temperature):
    teacher, student = features((4, 6), (4, 3))
    value, gradient = value_and_gradient(losses.CRDLoss(dim=5, temperature=temperature, queue=7), teacher, student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


# Several layers


@pytest.mark.parametrize(
    "make",
    [losses.HintLoss, losses.AttentionTransferLoss, losses.NSTLoss, losses.FactorTransferLoss],
    ids=lambda loss: loss.__name__,
)
def test_values_of_several_layers_add_up(make):
    shapes = [(3, 4, 4, 2), (3, 2, 2, 3), (3, 5, 4)]
    teachers, students = features(*shapes), features(*shapes)
    expected = sum(np.array(make(dtype="float64", reduction="none")(t, s)) for t, s in zip(teachers, students, strict=True))
    np.testing.assert_allclose(make(dtype="float64", reduction="none")(teachers, students), expected, rtol=1e-12)


def test_vid_of_several_layers_has_weights_for_each_and_adds_up():
    teachers, students = features((3, 4, 4, 2), (3, 5)), features((3, 4, 4, 3), (3, 4))
    loss = losses.VIDLoss(dtype="float64")
    loss.build([t.shape for t in teachers], [s.shape for s in students])
    weights = [RNG.normal(size=variable.shape) for variable in loss.trainable_variables]
    for variable, value in zip(loss.trainable_variables, weights, strict=True):
        variable.assign(value)
    assert len(weights) == 8

    def reference(s):
        first, last = weights[:4], weights[4:]
        return references.vid(teachers[0], s[0], first[:3], first[3]) + references.vid(teachers[1], s[1], last[:3], last[3])

    assert_matches_for_each_layer(loss, teachers, students, reference)


# Projectors


def projected(loss, f, index=0):
    """What NumPy makes of the loss's own `Projector`: a linear map, and for maps batch normalisation in inference."""
    kernel, *rest = [np.array(variable) for variable in loss.layers[index].get_weights()]
    if f.ndim == 2:
        return f @ kernel + rest[0]
    gamma, beta, mean, variance = rest
    return references.normalize_by_statistics(f @ kernel, gamma, beta, mean, variance, 1e-3)


def with_random_weights(loss, teacher_shape, student_shape):
    loss.build(teacher_shape, student_shape)
    for layer in loss.layers:
        layer.set_weights([RNG.uniform(0.5, 1.5, size=weight.shape) for weight in layer.get_weights()])
    return loss


PROJECTED = {
    "vectors": ((4, 6), (4, 3)),
    "sequences": ((3, 5, 4), (3, 5, 2)),
    "maps": ((3, 4, 4, 4), (3, 4, 4, 2)),
    "larger teacher": ((2, 4, 4, 4), (2, 2, 2, 3)),
    "larger student": ((2, 3, 3, 4), (2, 5, 5, 2)),
    "same width, other size": ((2, 4, 4, 3), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("make", [losses.HintLoss, losses.ABLoss], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("teacher_shape", "student_shape"), PROJECTED.values(), ids=PROJECTED)
def test_a_student_of_another_shape_is_projected_to_the_teachers(make, teacher_shape, student_shape):
    teacher, student = features(teacher_shape, student_shape)
    loss = with_random_weights(make(dtype="float64"), teacher_shape, student_shape)
    compare = references.hint if make is losses.HintLoss else references.ab

    def reference(s):
        t, s = references.to_the_smaller(teacher, s)
        return np.mean(compare(t, projected(loss, s)))

    assert_matches(loss, teacher, reference, student)


@pytest.mark.parametrize("make", [losses.HintLoss, losses.ABLoss], ids=lambda loss: loss.__name__)
def test_a_layer_of_ones_own_can_project(make):
    teacher, student = features((3, 4, 4, 4), (3, 4, 4, 2))
    layer = keras.layers.Conv2D(4, 3, padding="same", dtype="float64")
    loss = make(projector=layer, dtype="float64")
    loss(teacher, student)
    assert loss.layers == [layer]
    kernel, bias = layer.get_weights()
    compare = references.hint if make is losses.HintLoss else references.ab
    assert_matches(loss, teacher, lambda s: np.mean(compare(teacher, references.convolve(s, kernel, bias))), student)


def test_a_layer_of_ones_own_is_copied_for_every_further_layer():
    teachers, students = features((3, 4, 4, 4), (3, 4, 4, 4)), features((3, 4, 4, 2), (3, 4, 4, 3))
    layer = keras.layers.Dense(4, dtype="float64")
    loss = losses.HintLoss(projector=layer, dtype="float64")
    value = loss(teachers, students)
    assert loss.layers[0] is layer
    assert len(loss.trainable_variables) == 4
    expected = sum(
        np.mean(references.hint(t, s @ kernel.get_weights()[0] + kernel.get_weights()[1]))
        for t, s, kernel in zip(teachers, students, loss.layers, strict=True)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_a_loss_without_layers_takes_other_shapes_and_never_broadcasts():
    loss = losses.HintLoss(dtype="float64")
    loss(*features((3, 4), (3, 4)))
    teacher, student = features((3, 1), (3, 4))
    value = loss(teacher, student)
    np.testing.assert_allclose(value, np.mean(references.hint(teacher, projected(loss, student))), rtol=1e-9)
    nst, pair = losses.NSTLoss(dtype="float64"), features((3, 4, 4, 2), (3, 4, 4, 2))
    once = nst(*pair)
    np.testing.assert_allclose(nst(*[[f, f] for f in pair]), 2 * once, rtol=1e-12)


def test_a_loss_with_layers_refuses_other_shapes():
    loss = losses.HintLoss()
    loss(*features((3, 4), (3, 2)))
    with pytest.raises(ValueError, match=r"HintLoss.*other shapes.*\(3, 5\).*\(3, 2\)"):
        loss(*features((3, 5), (3, 2)))
    with pytest.raises(ValueError, match="HintLoss.*other shapes"):
        loss(features((3, 4), (3, 4)), features((3, 2), (3, 2)))


# What cannot be compared


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (losses.HintLoss, {"projector": "conv"}, "`projector` must be"),
        (losses.HintLoss, {"teacher_layer_name": "conv"}, "Give both"),
        (losses.AttentionTransferLoss, {"power": 0}, "`power` must be greater than 0"),
        (losses.AttentionTransferLoss, {"form": "sum"}, '`form` must be "mean" or "paper"'),
        (losses.FactorTransferLoss, {"p1": 0}, "`p1` must be"),
        (losses.FactorTransferLoss, {"p2": -1}, "`p2` must be"),
        (losses.VIDLoss, {"init_variance": 0.0}, "`init_variance` must be"),
        (losses.VIDLoss, {"eps": 0.0}, "`eps` must be"),
        (losses.ABLoss, {"margin": -1.0}, "`margin` must not be negative"),
        (losses.ReviewKDLoss, {"levels": (4, 0)}, "`levels"),
        (losses.CRDLoss, {"temperature": 0.0}, "`temperature` must be greater than 0"),
        (losses.CRDLoss, {"dim": 0}, "`dim` must be"),
        (losses.CRDLoss, {"queue": 0}, "`queue` must be"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**arguments)


def test_without_a_projector_unequal_shapes_are_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"HintLoss.*\(3, 4, 4, 5\).*\(3, 4, 4, 2\)"):
        losses.HintLoss(projector=None)(*features((3, 4, 4, 5), (3, 4, 4, 2)))


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (losses.AttentionTransferLoss, 2),
        (losses.NSTLoss, 2),
        (losses.FactorTransferLoss, 2),
        (losses.ReviewKDLoss, 3),
        (losses.HintLoss, 1),
        (losses.VIDLoss, 1),
        (losses.RKDLoss, 1),
    ],
)
def test_features_of_a_wrong_rank_are_an_error_that_names_loss_ranks_and_shapes(make, rank):
    shape = (3, 4, 4, 2)[:rank]
    with pytest.raises(ValueError, match=rf"{make.__name__}.*rank.*{re.escape(str(shape))}"):
        make()(*features(shape, shape))


def test_teacher_and_student_of_different_rank_are_an_error():
    for make in (losses.HintLoss, losses.VIDLoss, losses.AttentionTransferLoss):
        with pytest.raises(ValueError, match=rf"{make.__name__}.*same rank.*\(3, 4, 4, 2\).*\(3, 16, 2\)"):
            make()(*features((3, 4, 4, 2), (3, 16, 2)))


def test_fsp_needs_two_layers_and_equal_widths():
    maps = features((3, 4, 4, 2), (3, 4, 4, 3))
    with pytest.raises(ValueError, match="FSPLoss.*at least 2"):
        losses.FSPLoss()(maps[:1], maps[:1])
    with pytest.raises(ValueError, match=r"FSPLoss.*channels.*\(3, 4, 4, 2\).*\(3, 4, 4, 3\)"):
        losses.FSPLoss()(maps, maps[::-1])


def test_lists_of_different_length_are_an_error_that_counts_them():
    maps = features((3, 4, 4, 2), (3, 4, 4, 3))
    with pytest.raises(ValueError, match="HintLoss.*2 of the teacher, 1 of the student"):
        losses.HintLoss()(maps, maps[:1])


def test_attention_of_a_high_power_stays_finite_on_large_features_in_float32():
    teacher, student = features((2, 8, 8, 5), (2, 8, 8, 3))
    for loss in (losses.AttentionTransferLoss(power=4), losses.FactorTransferLoss(p1=4)):
        value, gradient = value_and_gradient(loss, 1e4 * teacher, 1e4 * student)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
