"""Values and gradients of the relation losses against `tests/references.py`, in float64 to 1e-9."""

import numpy as np
import pytest

from keras_kd import losses
from tests import references
from tests.losses.test_response import assert_matches, value_and_gradient

RNG = np.random.default_rng(19)
SHAPES = {
    "vectors": ((5, 7), (5, 7)),
    "other width": ((5, 7), (5, 4)),
    "maps": ((4, 3, 3, 3), (4, 2, 2, 2)),
    "sequences": ((4, 3, 2), (4, 6)),
    "two rows": ((2, 3), (2, 4)),
}
every_shape = pytest.mark.parametrize(("teacher_shape", "student_shape"), SHAPES.values(), ids=SHAPES)


def features(*shapes):
    return [RNG.normal(size=shape) for shape in shapes]


@every_shape
@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)], ids=["both", "distance", "angle"])
def test_rkd_equals_its_formula(teacher_shape, student_shape, distance, angle):
    teacher, student = features(teacher_shape, student_shape)
    loss = losses.RKDLoss(distance_weight=distance, angle_weight=angle, dtype="float64")
    assert_matches(loss, teacher, lambda s: references.rkd(teacher, s, distance, angle), student)


def test_rkd_turns_linear_for_distances_that_differ_by_more_than_one():
    teacher, student = features((5, 3), (5, 3))
    student[0] += 50  # one far row: its normalised distances exceed 2, the others' are near 0
    teacher[4] += 50
    assert np.max(np.abs(references.flat(student)[0] - references.flat(student)[1])) > 10
    assert_matches(losses.RKDLoss(dtype="float64"), teacher, lambda s: references.rkd(teacher, s), student)


def test_rkd_takes_the_mean_over_positive_distances_only():
    teacher, student = features((5, 3), (5, 4))
    student[1] = student[0]
    teacher[3] = teacher[2]
    value, gradient = value_and_gradient(losses.RKDLoss(dtype="float64"), teacher, student)
    np.testing.assert_allclose(value, references.rkd(teacher, student), rtol=1e-9)
    assert np.all(np.isfinite(gradient))


@every_shape
def test_sp_equals_its_formula(teacher_shape, student_shape):
    teacher, student = features(teacher_shape, student_shape)
    assert_matches(losses.SPLoss(dtype="float64"), teacher, lambda s: references.sp(teacher, s), student)


@every_shape
@pytest.mark.parametrize("eps", [1e-7, 1e-3])
def test_pkt_equals_its_formula(teacher_shape, student_shape, eps):
    teacher, student = features(teacher_shape, student_shape)
    assert_matches(losses.PKTLoss(eps=eps, dtype="float64"), teacher, lambda s: references.pkt(teacher, s, eps), student)


@pytest.mark.parametrize("shape", [(5, 7), (4, 2, 2, 3), (2, 3)])
def test_correlation_without_a_kernel_equals_its_formula(shape):
    teacher, student = features(shape, shape)
    assert_matches(losses.CorrelationLoss(dtype="float64"), teacher, lambda s: references.correlation(teacher, s), student)


@every_shape
@pytest.mark.parametrize(
    ("kernel", "gamma", "order"), [("bilinear", 0.4, 2), ("gaussian", 0.4, 2), ("gaussian", 0.1, 3), ("gaussian", 0.7, 1)]
)
def test_correlation_with_a_kernel_equals_its_formula(teacher_shape, student_shape, kernel, gamma, order):
    teacher, student = features(teacher_shape, student_shape)
    loss = losses.CorrelationLoss(kernel, gamma=gamma, order=order, dtype="float64")
    assert_matches(loss, teacher, lambda s: references.correlation(teacher, s, kernel, gamma, order), student)


def test_the_defaults_are_the_published_ones():
    teacher, student = features((5, 4), (5, 4))
    for loss, reference in [
        (losses.RKDLoss, references.rkd),
        (losses.SPLoss, references.sp),
        (losses.PKTLoss, references.pkt),
        (losses.CorrelationLoss, references.correlation),
    ]:
        np.testing.assert_allclose(loss(dtype="float64")(teacher, student), reference(teacher, student), rtol=1e-9)


def test_correlation_without_a_kernel_projects_to_the_teachers_width():
    teacher, student = features((5, 2, 2, 2), (5, 3))
    loss = losses.CorrelationLoss(dtype="float64")
    loss.build(teacher.shape, student.shape)
    kernel, bias = [RNG.normal(size=variable.shape) for variable in loss.trainable_variables]
    for variable, value in zip(loss.trainable_variables, (kernel, bias), strict=True):
        variable.assign(value)
    assert kernel.shape == (3, 8)
    assert_matches(loss, teacher, lambda s: references.correlation(teacher, s @ kernel + bias), student)


RELATIONS = [losses.RKDLoss, losses.SPLoss, losses.PKTLoss, losses.CorrelationLoss]


@pytest.mark.parametrize("make", RELATIONS)
def test_each_row_has_its_share_and_their_mean_is_the_published_value(make):
    teacher, student = features((5, 4), (5, 4))
    shares = make(dtype="float64", reduction="none")(teacher, student)
    assert shares.shape == (5,)
    np.testing.assert_allclose(np.mean(shares), make(dtype="float64")(teacher, student), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["bilinear", "gaussian"])
def test_a_value_of_the_batch_that_is_no_sum_over_rows_goes_to_every_row(kernel):
    teacher, student = features((5, 4), (5, 3))
    shares = losses.CorrelationLoss(kernel, dtype="float64", reduction="none")(teacher, student)
    np.testing.assert_allclose(shares, np.full(5, references.correlation(teacher, student, kernel)), rtol=1e-9)


@pytest.mark.parametrize("make", RELATIONS)
def test_a_batch_of_one_has_no_relations_and_says_so(make):
    teacher, student = features((1, 4), (1, 4))
    with pytest.warns(UserWarning, match="batch of one"):
        value, gradient = value_and_gradient(make(dtype="float64"), teacher, student)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("make", RELATIONS)
def test_values_of_several_layers_add_up(make):
    teachers, students = features((5, 4), (5, 2, 2, 3)), features((5, 4), (5, 2, 2, 3))
    expected = sum(np.array(make(dtype="float64", reduction="none")(t, s)) for t, s in zip(teachers, students, strict=True))
    np.testing.assert_allclose(make(dtype="float64", reduction="none")(teachers, students), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
@pytest.mark.parametrize("make", [losses.RKDLoss, losses.SPLoss, losses.PKTLoss])
def test_relations_that_ignore_the_scale_do_so_at_every_scale_in_float32(make, scale):
    teacher, student = features((5, 40), (5, 30))
    expected = make(dtype="float64")(teacher, student)
    np.testing.assert_allclose(make()(scale * teacher, scale * student), expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (losses.RKDLoss, {"distance_weight": -1.0}, "`distance_weight` must not be negative"),
        (losses.RKDLoss, {"angle_weight": -1.0}, "`angle_weight` must not be negative"),
        (losses.PKTLoss, {"eps": 0.0}, "`eps` must be greater than 0"),
        (losses.CorrelationLoss, {"kernel": "cubic"}, "`kernel` must be None"),
        (losses.CorrelationLoss, {"gamma": 0.0}, "`gamma` must be greater than 0"),
        (losses.CorrelationLoss, {"order": -1}, "`order` must be"),
        (losses.CorrelationLoss, {"order": 1.5}, "`order` must be"),
        (losses.SPLoss, {"teacher_layer_name": "conv"}, "Give both"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**arguments)
