"""The ridge regressions of surgery against least squares with rows for the penalty."""

import numpy as np
import pytest

from keras_kd._moments import Moments
from keras_kd.surgery import _ridge


def made(rows, columns, outputs=3, noise=0.1, seed=0):
    """What is read, far from the mean 0, and residuals that a linear map gives in part."""
    rng = np.random.default_rng(seed)
    read = rng.normal(size=(rows, columns)) + 3 * rng.normal(size=columns)
    return read, read @ rng.normal(size=(columns, outputs)) + noise * rng.normal(size=(rows, outputs)) + 2


def by_rows(read, missing, l2, intercept):
    """`min sum |r - D' x - b|^2 + l2 |D|^2` with a row for each weight."""
    mean, level = (one.mean(0) if intercept else np.zeros(one.shape[1]) for one in (read, missing))
    columns = read.shape[1]
    rows = np.concatenate([read - mean, np.sqrt(l2) * np.eye(columns)])
    kernel = np.linalg.lstsq(rows, np.concatenate([missing - level, np.zeros((columns, missing.shape[1]))]), rcond=None)[0]
    return kernel, level - mean @ kernel


def scale_of(read, intercept):
    return np.square(read - (read.mean(0) if intercept else 0.0)).sum() / read.shape[1]


def best_of_all(read, missing, fits, intercept):
    """The penalty, of all of them, that is best on the rows that are not fitted, and the fit of all rows with it."""

    def error(l2):
        kernel, bias = by_rows(read[fits], missing[fits], l2 * scale_of(read[fits], intercept), intercept)
        return np.square(missing[~fits] - read[~fits] @ kernel - bias).sum()

    l2 = min(_ridge.PENALTIES, key=error)
    return l2, error(l2), *by_rows(read, missing, l2 * scale_of(read, intercept), intercept)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 5.0])
def test_fits_are_those_of_least_squares_with_the_penalty_that_is_best_on_other_rows(few, intercept, noise):
    read, missing = made(24 if few else 90, 30, noise=noise)
    fits = np.arange(len(read)) < len(read) * 3 // 4
    l2, after, kernel, bias = best_of_all(read, missing, fits, intercept)
    if few:
        found = _ridge.solve_few(read, missing, fits, intercept)
    else:
        sums = [Moments.of(np.concatenate([read, missing], 1)[one]) for one in (fits, ~fits)]
        found = _ridge.solve(*sums, 30, intercept)
    assert found.l2 == l2
    np.testing.assert_allclose(found.after, after, rtol=1e-5)
    np.testing.assert_allclose(found.before, np.square(missing[~fits]).sum(), rtol=1e-9)
    np.testing.assert_allclose(found.kernel, kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-5, atol=1e-5)


def test_both_forms_start_from_the_better_origin():
    read, missing = made(24, 30, noise=0.0)
    fits = np.arange(24) < 18
    right = np.linalg.lstsq(read, missing, rcond=None)[0]
    origins = [np.zeros_like(right) + 9.0, right + 1e-3]
    sums = [Moments.of(np.concatenate([read, missing], 1)[one]) for one in (fits, ~fits)]
    few, whole = _ridge.solve_few(read, missing, fits, False, origins), _ridge.solve(*sums, 30, False, origins)
    assert few.after < _ridge.solve_few(read, missing, fits, False).after / 100
    np.testing.assert_allclose(few.kernel, whole.kernel, atol=1e-6)


def test_without_rows_for_the_choice_nothing_is_changed():
    read, missing = made(10, 30)
    for fits in (np.ones(10, bool), np.zeros(10, bool)):
        found = _ridge.solve_few(read, missing, fits, True)
        assert found.l2 is None
        assert not found.kernel.any()


def test_most_penalties_are_not_tried():
    tried = []

    def fit(l2):
        tried.append(l2)
        return l2

    target = _ridge.PENALTIES[5]
    errors = {l2: abs(np.log(l2 / target)) for l2 in _ridge.PENALTIES}
    found = min(_ridge._descent(fit, errors.__getitem__), key=lambda one: one[2])
    assert found[0] == target
    assert len(tried) == 3
