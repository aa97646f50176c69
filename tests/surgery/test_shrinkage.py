"""The covariance of few samples: that of scikit-learn, and none of it with many."""

import numpy as np
import pytest
from sklearn import covariance as sklearn_covariance

from keras_kd.surgery._shrinkage import Covariance


def streamed(rows, parts, shift=None):
    """Takes in `(samples, rows, n)` part by part."""
    found = Covariance(rows.mean((0, 1)).astype("float32") if shift is None else shift)
    for part in np.array_split(rows, parts):
        found.add(part)
    return found


def correlated(samples, n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(samples, n)) @ rng.normal(size=(n, n)) + 3 * rng.normal(size=n)).astype("float32")


@pytest.mark.parametrize(("samples", "n"), [(10, 30), (30, 30), (5, 40)])
@pytest.mark.parametrize("parts", [1, 3])
def test_with_one_row_a_sample_it_is_the_estimate_of_ledoit_and_wolf(samples, n, parts):
    x = correlated(samples, n)
    expected, share = sklearn_covariance.ledoit_wolf(x.astype("float64"))
    found = streamed(x[:, None], parts)
    np.testing.assert_allclose(found.shrinkage(np.cov(x.T, bias=True)), share, rtol=1e-4)
    assert 0.02 < share < 1
    np.testing.assert_allclose(found.shrunk(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_share_of_the_identity_falls_faster_than_theirs_where_there_are_more_samples_than_columns():
    x = correlated(400, 10)
    plain, (_, share) = np.cov(x.T, bias=True), sklearn_covariance.ledoit_wolf(x.astype("float64"))
    found = streamed(x[:, None], 2).shrunk()
    level = np.trace(plain) / 10
    expected = (1 - share / 40) * plain + share / 40 * level * np.eye(10)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * level)


def test_positions_that_repeat_a_sample_say_nothing_new():
    x = correlated(12, 8)
    once, often = streamed(x[:, None], 1), streamed(np.repeat(x[:, None], 9, axis=1), 2)
    np.testing.assert_allclose(once.shrunk(), often.shrunk(), rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 20])
def test_the_chance_is_that_of_sums_over_the_rows_of_each_sample(rows):
    x = np.random.default_rng(0).normal(size=(9, rows, 6)).astype("float32")
    x = x - x.mean((0, 1))
    second = np.stack([one.T @ one / rows for one in x])
    mean = second.mean(0)
    chance = np.sum(np.square(second - mean)) / 9**2
    expected = chance / np.sum(np.square(mean - np.trace(mean) / 6 * np.eye(6)))
    assert expected < 1
    np.testing.assert_allclose(streamed(x, 4, np.zeros(6, "float32")).shrinkage(mean), expected, rtol=1e-3)


def test_one_sample_and_constant_channels_are_no_numbers_by_zero():
    one, still = correlated(1, 5), np.ones((7, 5), "float32")
    assert np.isfinite(streamed(one[:, None], 1).shrunk()).all()
    np.testing.assert_array_equal(streamed(still[:, None], 1).shrunk(), np.zeros((5, 5)))
