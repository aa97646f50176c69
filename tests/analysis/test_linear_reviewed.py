"""What a review of the linear analysis found: data of all kinds, labels of all kinds, and layers of all kinds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import Ridge

from keras_kd import _batching
from keras_kd._moments import Moments, _decomposed, _inverted, ridge
from keras_kd.layers import LinearProbe

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)).astype("float32")
Y = np.argmax(X[:, :3], -1)


def moments_of(rows=300, width=20, *, weights=None):
    x = RNG.normal(size=(rows, width)) * np.logspace(-2, 2, width) + 3
    y = x @ RNG.normal(size=(width, 4)) + RNG.normal(size=(rows, 4))
    return Moments.of(np.c_[x, y], weights), x, y


@pytest.mark.parametrize("l2", [0.0, 1e-6, 1.0, 1e4])
def test_a_single_penalty_is_solved_as_several_are(l2):
    moments, x, y = moments_of()
    kernel, residual, freedom = _inverted(moments, 20, l2)
    other = _decomposed(moments, 20, [l2])[0]
    np.testing.assert_allclose(kernel, other[0], rtol=1e-8, atol=1e-9 * np.abs(other[0]).max())
    np.testing.assert_allclose(residual, other[1], rtol=1e-9)
    assert freedom == pytest.approx(other[2], rel=1e-9)
    truth = Ridge(alpha=l2).fit(x, y)
    np.testing.assert_allclose(ridge(moments, 20, [l2]).kernel, truth.coef_.T, rtol=1e-6, atol=1e-8)


def test_a_singular_scatter_is_left_to_the_eigendecomposition():
    x = RNG.normal(size=(50, 3))
    moments = Moments.of(np.c_[x, x[:, :1], x @ np.ones(3)])
    assert _inverted(moments, 4, 0.0) is None
    assert _inverted(moments, 4, 1e-12) is None
    assert ridge(moments, 4, [0.0]).r2 == pytest.approx(1.0)
    assert ridge(Moments.of(np.c_[x, np.ones(50), x @ np.ones(3)]), 4, [0.0]).r2 == pytest.approx(1.0)  # a constant column


@pytest.mark.parametrize("scale", [1 / 300, 1.0, 50.0])
@pytest.mark.parametrize("even", [True, False])
def test_the_scale_of_weights_does_not_change_which_penalty_is_chosen(scale, even):
    weights = np.ones(300) if even else RNG.uniform(0, 2, 300)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 30))
    rows = np.c_[x, 0.1 * x[:, :1] + rng.normal(size=(300, 1))]
    penalties = np.asarray([1e-6, 1.0, 1e2, 1e6])
    base, other = (ridge(Moments.of(rows, weights * c), 30, penalties * c) for c in (1.0, scale))
    assert other.l2 == pytest.approx(base.l2 * scale)
    assert other.gcv == pytest.approx(base.gcv)
    assert np.isfinite(base.gcv)
    np.testing.assert_allclose(other.kernel, base.kernel)


def test_effective_rows_are_the_rows_of_one_weight_and_those_shown_by_a_mask():
    values = RNG.normal(size=(10, 2))
    assert Moments.of(values).effective_rows == Moments.of(values, np.full(10, 3.0)).effective_rows == 10
    assert Moments.of(values, np.arange(10) < 4).effective_rows == 4
    joined = Moments.empty(2)
    for part, weight in ((values[:4], None), (values[4:], np.full(6, 1.0))):
        joined.add(Moments.of(part, weight))
    assert joined.effective_rows == joined.part(slice(1)).effective_rows == 10
    joined.add(Moments.of(values, np.zeros(10)))
    assert (joined.rows, joined.effective_rows) == (20, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": np.asarray(["a", "b", "c"])[Y]}, "`targets` must be numbers. Received: <U1"),
        ({"sample_weight": np.full(120, np.nan)}, "`sample_weight` must hold one finite number of at least 0"),
        ({"sample_weight": -np.ones(120)}, "Received: float64 of shape .120,., the lowest -1.0"),
        ({"sample_weight": np.full(120, "a")}, "`sample_weight` must hold one finite number"),
    ],
)
def test_the_probe_names_what_it_cannot_adapt_to(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(3).adapt(X, **{"targets": Y} | arguments)


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[index * 40 : index * 40 + 40], Y[index * 40 : index * 40 + 40]


def joined(data, *others, **settings):
    batches = list(_batching.batches(data, *others, **settings))
    return [np.concatenate([np.asarray(batch[part]) for batch in batches]) for part in (0, 1)]


@pytest.mark.parametrize(
    "data",
    [
        (Sequence(),),
        (X, Y),
        (X.tolist(), Y.tolist()),
        (tf.data.Dataset.from_tensor_slices((X, Y)).batch(50),),
        ([(X[:50], Y[:50]), (X[50:], Y[50:])],),
        (((X[i : i + 40].tolist(), Y[i : i + 40].tolist()) for i in (0, 40, 80)),),
    ],
)
def test_all_kinds_of_data_give_the_same_batches(data):
    x, y = joined(*data, size=32)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_targets_are_nested_as_they_come():
    batches = list(_batching.batches([X, X[:, :2]], {"class": Y, "sum": X.sum(-1)}, size=50))
    assert [len(x[1]) for x, _, _ in batches] == [len(y["sum"]) for _, y, _ in batches] == [50, 50, 20]
    np.testing.assert_array_equal(np.concatenate([y["class"] for _, y, _ in batches]), Y)


@pytest.mark.parametrize(
    ("data", "targets", "message"),
    [
        (tf.data.Dataset.from_tensor_slices((X, Y)), None, "Batch the data set first"),
        (tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).repeat(), None, "`data` must end"),
        ([[1.0, 2.0], [3.0]], [0, 1], "`data` must be arrays of samples"),
        ([{"a": "b"}], None, "Batches must hold arrays"),
        ([X, X], [Y, Y[:3]], "`labels` must hold one entry for each sample. Received: 3 for 120"),
    ],
)
def test_what_are_no_batches_is_named(data, targets, message):
    with pytest.raises(ValueError, match=message):
        list(_batching.batches(data, targets))
