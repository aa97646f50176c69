"""Redundancy, rank and removal are those of brute-force regressions."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from keras_kd import analysis
from keras_kd.analysis import Moments

RNG = np.random.default_rng(0)


def channels(kind="correlated", rows=400):
    x = RNG.normal(size=(rows, 6)) @ RNG.normal(size=(6, 6)) + 5
    x[:, 2] *= 1e-4
    if kind == "exact":
        x[:, 5] = 2 * x[:, 0] - 3 * x[:, 1] + 1
    elif kind == "dead":
        x[:, 3] = 7.0
    elif kind == "duplicate":
        x[:, 4] = -2 * x[:, 1] + 3
        x[:, 5] = x[:, 1]
    return x


@pytest.mark.parametrize("kind", ["correlated", "exact", "dead", "duplicate"])
def test_redundancy_is_the_r2_of_a_regression_on_all_others(kind):
    x = channels(kind)
    found = analysis.redundancy(Moments.of(x))
    for j in range(6):
        others = np.delete(x, j, 1)
        truth = LinearRegression().fit(others, x[:, j]).score(others, x[:, j]) if x[:, j].std() else 1.0
        assert found[j] == pytest.approx(truth, abs=1e-6), j
    assert np.all((found >= 0) & (found <= 1))


def test_independent_channels_are_not_redundant():
    x = np.linalg.qr(RNG.normal(size=(50, 4)) - 0.0)[0]
    x = np.linalg.qr(x - x.mean(0))[0]
    np.testing.assert_allclose(analysis.redundancy(Moments.of(x)), 0, atol=1e-10)


def unexplained(x, kept):
    """Share of the variance of all channels that a regression on some does not give."""
    centered = x - x.mean(0)
    if not kept:
        return 1.0
    fit = centered[:, kept] @ np.linalg.lstsq(centered[:, kept], centered, rcond=None)[0]
    return ((centered - fit) ** 2).sum() / (centered**2).sum()


@pytest.mark.parametrize("kind", ["correlated", "exact", "dead", "duplicate"])
def test_every_step_of_the_order_is_the_best_next_channel_and_has_the_error_of_a_regression(kind):
    x = channels(kind)
    order = analysis.removal_order(Moments.of(x))
    assert sorted(order.keep) == list(range(6))
    for k in range(7):
        assert order.errors[k] == pytest.approx(unexplained(x, list(order.keep[:k])), abs=1e-9)
    for k in range(6):
        rest = [j for j in range(6) if j not in order.keep[:k]]
        best = min(unexplained(x, [*order.keep[:k], j]) for j in rest)
        assert order.errors[k + 1] == pytest.approx(best, abs=1e-9)


def test_what_can_be_removed_at_a_tolerance():
    x = channels("exact")
    order = analysis.removal_order(Moments.of(x))
    assert len(order.removable(1e-14)) == 1
    assert unexplained(x, [j for j in range(6) if j not in order.removable(0.2)]) <= 0.2
    assert order.removable(1.0) == order.keep
    assert order.removable(-1.0) == ()


def test_dead_and_duplicate_channels_are_found_exactly():
    assert analysis.dead_channels(Moments.of(channels("dead"))) == (3,)
    assert analysis.duplicate_channels(Moments.of(channels("duplicate"))) == ((1, 4, 5),)
    assert analysis.duplicate_channels(Moments.of(channels())) == ()
    almost = channels()
    almost[:, 5] = almost[:, 1] + 1e-3 * almost[:, 0]
    assert analysis.duplicate_channels(Moments.of(almost)) == ()


def test_results_do_not_depend_on_how_the_rows_came():
    x = channels()
    streamed = Moments.empty(6)
    for part in np.array_split(x, 7):
        streamed.add(Moments.of(part))
    np.testing.assert_allclose(analysis.redundancy(streamed), analysis.redundancy(Moments.of(x)), rtol=1e-8)
    assert analysis.removal_order(streamed).keep == analysis.removal_order(Moments.of(x)).keep


def test_effective_rank_and_rank_at_energy():
    assert analysis.effective_rank(np.ones(5)) == pytest.approx(5)
    assert analysis.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert analysis.effective_rank(np.zeros(3)) == 0
    shares = np.array([0.7, 0.2, 0.1])
    assert analysis.effective_rank(10 * shares) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    for energy, rank in [(0.5, 1), (0.7, 1), (0.71, 2), (0.9, 2), (1.0, 3)]:
        assert analysis.rank_at(shares[::-1], energy) == rank
    assert analysis.rank_at(np.zeros(3)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.redundancy(Moments.empty(3)), "at least one row"),
        (lambda: analysis.removal_order(Moments.empty(3)), "at least one row"),
        (lambda: analysis.effective_rank(np.array([1.0, -1.0])), "at least 0"),
        (lambda: analysis.effective_rank(np.array([1.0, np.nan])), "finite"),
        (lambda: analysis.rank_at(np.ones(2), 0.0), r"in \(0, 1\]. Received: energy=0.0"),
        (lambda: Moments.empty(3).add(Moments.of(np.ones((2, 4)))), "3 columns do not go with moments of 4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_greedy_is_close_to_the_best_subset_here():
    x = channels()
    order = analysis.removal_order(Moments.of(x))
    for k in (2, 3, 4):
        best = min(unexplained(x, list(kept)) for kept in itertools.combinations(range(6), k))
        assert order.errors[k] <= 1.5 * best + 1e-9


def test_rows_without_a_weight_do_not_count():
    rows = np.random.default_rng(0).normal(size=(20, 3))
    weights = np.arange(20) % 2
    weighted, chosen = Moments.of(rows, weights), Moments.of(rows[weights == 1])
    assert (weighted.rows, weighted.weight) == (chosen.rows, chosen.weight) == (10, 10.0)
    np.testing.assert_allclose(weighted.scatter, chosen.scatter)
