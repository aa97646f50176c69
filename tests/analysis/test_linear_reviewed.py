"""What a review of the linear analysis found: data of all kinds, labels of all kinds, and layers of all kinds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from sklearn.linear_model import Ridge

from keras_kd import _batching, callbacks
from keras_kd._moments import Moments, _decomposed, _inverted, ridge
from keras_kd.analysis import linear_analysis, probe, sensitivity
from keras_kd.layers import LinearProbe
from tests.analysis.test_linear import randomized

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 6)).astype("float32")
Y = np.argmax(X[:, :3], -1)


def moments_of(rows=300, width=20, *, weights=None):
    x = RNG.normal(size=(rows, width)) * np.logspace(-1, 1, width) + 3
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
    assert (joined.rows, joined.effective_rows) == (10, 10)


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


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def analysed(model, *data, **settings):
    return linear_analysis(model, *data, verbose=0, **settings)


def classifier(units=3, activation=None, **settings):
    hidden = layers.Dense(5, activation="tanh", name="hidden", **settings)
    head = layers.Dense(units, activation=activation, name="head", **settings)
    return randomized(keras.Sequential([keras.Input((6,)), hidden, head]))


def with_layers(*middle, shape=(6, 6, 3), dtype=None):
    inputs = keras.Input(shape, dtype=dtype)
    x = inputs
    for layer in middle:
        x = layer(x)
    return randomized(keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D(name="pool")(x))))


@pytest.fixture(scope="module")
def two():
    a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
    hidden = layers.Concatenate()([layers.Dense(5, name="left")(a), layers.Dense(4, name="right")(b)])
    return randomized(keras.Model([a, b], [layers.Dense(3, name="class")(hidden), layers.Dense(1, name="sum")(hidden)]))


def both(y, outputs):
    return SPARSE.call(y[0], outputs[0]) + ops.square(outputs[1][:, 0] - y[1])


TWO, TARGETS = (X, X[:, :2]), (Y, X.sum(-1))


@pytest.fixture(scope="module")
def of_two(two):
    return analysed(two, list(TWO), TARGETS, loss=both)


@pytest.mark.parametrize(
    "data",
    [
        (list(TWO), list(TARGETS)),
        (TWO, TARGETS),
        ({"b": TWO[1], "a": TWO[0]}, TARGETS),
        (tf.data.Dataset.from_tensor_slices((TWO, TARGETS)).batch(256),),
        (tf.data.Dataset.from_tensor_slices(({"a": TWO[0], "b": TWO[1]}, TARGETS)).batch(256),),
    ],
)
def test_several_inputs_come_in_order_or_by_name_and_labels_as_the_loss_takes_them(two, of_two, data):
    report = analysed(two, *data, loss=both)
    assert report == of_two
    assert report["class"].accuracy is None
    data = [*data, None][:2]
    loss = sensitivity(two, *data, [4], what="bits", loss=both, verbose=0).loss
    assert loss == pytest.approx(np.mean(both(TARGETS, two(list(TWO)))), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "activation", "loss"),
    [
        (np.eye(3, dtype=int)[Y], None, "categorical"),
        (np.eye(3, dtype="float32")[Y], None, "categorical"),
        (np.eye(3, dtype="float32")[Y], "softmax", "categorical"),
        (0.8 * np.eye(3, dtype="float32")[Y] + 0.2 / 3, "softmax", "categorical"),
        (Y[:, None], None, "sparse"),
        (X[:, :3], None, "squares"),
        (np.eye(3, dtype="float32")[Y], "sigmoid", "binary"),
    ],
)
def test_labels_call_for_their_loss_and_accuracy(labels, activation, loss):
    model = classifier(activation=activation)
    report = sensitivity(model, X, labels, [0.5], verbose=0)
    outputs, logits = np.asarray(model(X)), activation is None
    truth = {
        "categorical": keras.losses.CategoricalCrossentropy(from_logits=logits),
        "sparse": keras.losses.SparseCategoricalCrossentropy(from_logits=logits),
        "binary": keras.losses.BinaryCrossentropy(from_logits=logits),
        "squares": keras.losses.MeanSquaredError(),
    }[loss]
    assert report.loss == pytest.approx(float(truth(labels, outputs)), rel=1e-5)
    assert report.accuracy == (None if loss == "squares" else pytest.approx(np.mean(outputs.argmax(-1) == Y)))
    assert (analysed(model, X, labels)["hidden"].accuracy is None) == (loss == "squares")


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_binary_classifiers_have_an_accuracy(activation):
    model, labels = classifier(1, activation), (X[:, 0] > 0).astype(int)
    report = sensitivity(model, X, labels, [0.5], verbose=0)
    right = (np.asarray(model(X))[:, 0] > (0.5 if activation else 0)) == labels
    assert report.accuracy == pytest.approx(right.mean())
    batches = [(X[:60], labels[:60]), (X[60:], labels[60:])]
    assert analysed(model, batches)["hidden"].accuracy == analysed(model, X, labels, batch_size=60)["hidden"].accuracy is not None


def test_whole_numbers_are_targets_of_a_regression_where_they_are_many():
    model, labels = classifier(1), RNG.integers(100_000, 500_000, 120)
    report = sensitivity(model, X, labels, [0.5], verbose=0)
    assert report.accuracy is None
    assert report.loss == pytest.approx(np.mean((np.asarray(model(X), "float64")[:, 0] - labels) ** 2), rel=1e-5)
    assert analysed(model, X, labels)["hidden"].accuracy is None
    assert analysed(classifier(3), X, labels, loss=lambda y, z: ops.sum(z, -1))["hidden"].accuracy is None  # too many classes


class Net(keras.Model):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.shared, self.last = (layers.Dense(n, name=f"d{i}") for i, n in enumerate((4, width, 2)))
        self.aux = layers.Dense(3, name="aux")

    def call(self, x):
        result = self.last(ops.tanh(self.shared(self.shared(self.first(x)))))
        self.aux(x)
        return result


def test_subclassed_models_have_accuracies_and_their_last_layer_is_found():
    net, labels = Net(), (X[:, 0] > 0).astype(int)
    net(X[:1])
    report = sensitivity(net, X, labels, [0.5], loss=SPARSE, verbose=0)
    assert report.accuracy == pytest.approx(np.mean(np.asarray(net(X)).argmax(-1) == labels))
    assert [cell.layer for cell in report.cells] == ["d0", "aux"]
    assert report.cells[1].loss_increase == pytest.approx(0.0, abs=1e-6)
    assert analysed(net, [(X, labels)], loss=SPARSE)["d0"].accuracy is not None
    for name, reason in (("d1", "it is called several times"), ("d2", "it gives the model's output")):
        with pytest.raises(ValueError, match=rf"Received: {name} \({reason}\)"):
            sensitivity(net, X, labels, layers=[name], loss=SPARSE, verbose=0)


def test_the_cost_of_a_shared_kernel_is_the_sum_over_its_calls():
    net, labels = Net(), (X[:, 0] > 0).astype(int)
    net(X[:1])
    cell = sensitivity(net, X, labels, [3], what="bits", layers=["d1"], loss=SPARSE, verbose=0).cells[0]
    report = analysed(net, X, labels, loss=SPARSE)
    kernel = np.asarray(net.shared.kernel, "float64")
    step = np.abs(kernel).max(0) / 3
    delta = np.round(kernel / step) * step - kernel
    inputs = [np.asarray(net.first(X), "float64")]
    inputs.append(np.asarray(net.shared(inputs[0]), "float64"))
    costs = [0.5 * np.sum(report[f"d1:{call}"].gradient * np.mean((inputs[call] @ delta) ** 2, 0)) for call in (0, 1)]
    assert min(costs) > 0
    assert cell.predicted["cost"] == pytest.approx(sum(costs), rel=1e-3)


def test_sensitivity_of_some_layers_needs_rows_for_these_alone():
    hidden = [layers.Dense(8, activation="relu", name="narrow"), layers.Dense(400, activation="relu", name="wide")]
    model = keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)])
    assert {cell.layer for cell in sensitivity(model, X, Y, [0.5], layers=["narrow"], verbose=0).cells} == {"narrow"}
    assert len(sensitivity(model, X, Y, [4], what="bits", layers=["narrow"], verbose=0).cells) == 1
    with pytest.raises(ValueError, match="`data` must give more rows"):
        sensitivity(model, X, Y, verbose=0)


def test_each_ratio_has_its_cell():
    cells = sensitivity(classifier(), X, Y, [0.01, 0.05, 0.5, 0.99], verbose=0).cells
    assert [(cell.ratio, len(cell.channels)) for cell in cells] == [(0.01, 1), (0.05, 1), (0.5, 2), (0.99, 4)]


@pytest.mark.parametrize("middle", [layers.Activation("softsign"), layers.Resizing(4, 5, interpolation="bicubic")])
def test_layers_without_a_second_derivative_have_products_by_differences(middle):
    images = RNG.normal(size=(80, 6, 6, 3)).astype("float32")
    model = with_layers(layers.Conv2D(4, 3, padding="same", name="conv"), middle)
    report = analysed(model, images)
    assert "central differences instead" in report.skipped[-1]
    assert report["conv"].gain == pytest.approx(report["conv"].responses[0].ratio, rel=1e-3)  # it is linear
    assert report["conv"].responses[0].explained == pytest.approx(1.0, abs=1e-5)
    assert 0.99 < report["head"].responses[0].explained <= 1


def test_differences_are_as_good_as_exact_products(monkeypatch):
    exact = analysed(classifier(), X, noise=[0.01, 0.3])
    import keras_kd.analysis._pass as module

    former = module.Pass.__init__

    def without(self, *args, **kwargs):
        former(self, *args, **kwargs)
        self.differences = "for comparison"

    monkeypatch.setattr(module.Pass, "__init__", without)
    near = analysed(classifier(), X, noise=[0.01, 0.3])
    for one, other in zip(exact.layers, near.layers, strict=True):
        assert other.gain == pytest.approx(one.gain, rel=1e-4)
        for a, b in zip(one.responses, other.responses, strict=True):
            assert b.explained == pytest.approx(a.explained, abs=1e-3)


def test_models_of_float64_are_measured_in_it():
    model, other = classifier(dtype="float64"), classifier()
    report, truth = analysed(model, X.astype("float64"), Y), analysed(other, X, Y)
    assert report["hidden"].linearity == pytest.approx(truth["hidden"].linearity, abs=1e-5)
    np.testing.assert_allclose(report["hidden"].fisher, truth["hidden"].fisher, rtol=1e-4)
    assert sensitivity(model, X.astype("float64"), Y, [0.5], verbose=0).loss == pytest.approx(
        sensitivity(other, X, Y, [0.5], verbose=0).loss, rel=1e-5
    )


class Wrapped(layers.Layer):
    def call(self, x):
        return {"y": x * 2}


def test_layers_that_give_a_dict_of_one_tensor_are_places():
    inputs = keras.Input((6,))
    hidden = Wrapped(name="wrapped")(layers.Dense(5, name="hidden")(inputs))["y"]
    model = keras.Model(inputs, layers.Dense(3)(hidden))
    assert analysed(model, X)["wrapped"].linearity == pytest.approx(1.0)
    assert "wrapped" in [row.name for row in probe(model, X, Y).rows]


class Tokens(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = layers.Embedding(20, 4, name="embedding"), layers.Dense(3, name="head")

    def call(self, x):
        return self.head(ops.mean(self.embedding(x), 1))


T = RNG.integers(1, 20, (120, 7))


def test_batches_may_differ_in_length():
    model = Tokens()
    model(T[:1])
    batches = [(T[:60], Y[:60]), (T[60:, :5], Y[60:])]
    report = analysed(model, batches, loss=SPARSE)
    assert (report.samples, report["embedding"].positions) == (120, None)
    assert report["head"].linearity == pytest.approx(1.0)
    inputs = keras.Input((None,), dtype="int32")
    tagger = keras.Model(inputs, layers.Dense(20, name="tags")(layers.Embedding(20, 4, name="embedding")(inputs)))
    assert analysed(tagger, [(T[:60], T[:60]), (T[60:, :5], T[60:, :5])])["tags"].fisher


def test_noise_enters_images_of_bytes_after_they_became_floats():
    images = RNG.integers(0, 256, (80, 6, 6, 3)).astype("uint8")
    middle = [layers.Rescaling(1 / 255.0, name="scale"), layers.Conv2D(4, 3, use_bias=False, name="conv")]
    bytes_, floats = (with_layers(*middle, dtype=dtype) for dtype in ("uint8", "float32"))
    report, truth = analysed(bytes_, images), analysed(floats, images.astype("float32"))
    assert report["scale"].gain == pytest.approx(1.0, rel=1e-5)
    assert report["conv"].gain == pytest.approx(truth["conv"].gain, rel=0.05)
    assert report["head"].responses[0].explained == pytest.approx(1.0, abs=1e-4)


def masked(shape=(None,), wrapper=layers.TimeDistributed):
    inputs = keras.Input(shape, dtype="int32")
    x = layers.Embedding(20, 6, mask_zero=True, name="embedding")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.GRU(3)(wrapper(layers.Dense(4), name="wide")(x))))


def test_loops_over_unknown_steps_run():
    report = analysed(masked(), T[:, :3])
    assert report["wide"].gain is not None
    assert report.samples == 120


def test_what_layers_count_is_as_before():
    class Counting(layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.count.assign_add(1.0)
            return x + 0.0

    counting = Counting()
    model = keras.Sequential([keras.Input((6,)), counting, layers.Dense(3)])
    counting.count.assign(5.0)
    analysed(model, X, Y)
    assert float(counting.count) == 5.0


def quantized():
    model = classifier()
    model.compile("sgd", SPARSE)
    rounding = callbacks.Quantization()
    model.fit(X, Y, callbacks=[rounding], verbose=0)
    return rounding.quantized_model()


def stateful():
    gru = layers.GRU(3, stateful=True, name="gru")
    return keras.Sequential([keras.Input(batch_shape=(60, 6, 1)), gru, layers.Dense(3)])


@pytest.mark.parametrize("analysis", [analysed, lambda *a: sensitivity(*a, verbose=0), probe])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (quantized, "Pass `quantized.model`"),
        (stateful, "Received: the stateful layers gru"),
    ],
)
def test_models_that_cannot_be_analysed_are_named(analysis, model, message):
    with pytest.raises(ValueError, match=message):
        analysis(model(), X, Y)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.asarray(["a", "b", "c"])[Y], "`labels` must be numbers"),
        (np.where(Y == 2, 7, Y), "`labels` must be class indices from 0 to 2.* Received: values from 0 to 7"),
        (np.where(Y == 2, -1, Y), "Received: values from -1 to 1"),
        (np.full((120, 3), np.nan, "float32"), "`labels` must be finite"),
        (np.ones((120, 2)), "`labels` must have the shape"),
        (np.ones((120, 3), int), "or have one-hot rows of the outputs' shape"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    for analysis in (analysed, lambda *a: sensitivity(*a, [0.5], verbose=0)):
        with pytest.raises(ValueError, match=message):
            analysis(classifier(), X, labels)


def test_other_targets_in_a_later_batch_are_named():
    with pytest.raises(ValueError, match='pass loss="mse"'):
        analysed(classifier(1), [(X[:60], Y[:60] > 0), (X[60:], Y[60:] + 5)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "head"}, "`layers` must be a sequence of names"),
        ({"seed": None}, "`seed` must be a whole number of at least 0"),
        ({"loss": lambda y, z: ops.sum(z, -1) * np.nan}, "The gradient of the loss must be finite"),
    ],
)
def test_arguments_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        analysed(classifier(), X, Y, **settings)
    with pytest.raises(ValueError, match=message):
        sensitivity(classifier(), X, Y, [0.5], verbose=0, **settings)


@pytest.mark.parametrize("ratios", [["a"], "abc", [None]])
def test_ratios_that_are_no_numbers_are_named(ratios):
    with pytest.raises(ValueError, match="`ratios` must be in"):
        sensitivity(classifier(), X, Y, ratios, verbose=0)


def test_data_that_are_all_padding_are_named():
    with pytest.raises(ValueError, match='all samples are masked at the layer "embedding"'):
        analysed(masked((2,)), T[:, :2] * 0)


@pytest.mark.parametrize("data", [[X], {"a": X}, {"a": X, "c": X}, [X, np.asarray([["a"] * 2] * 120)], [X, X]])
def test_inputs_that_do_not_fit_are_named(two, data):
    for analysis in (lambda *a: analysed(*a, loss=both), lambda *a: sensitivity(*a, [0.5], loss=both, verbose=0)):
        with pytest.raises(ValueError, match="`data` must have|`data` must be nested"):
            analysis(two, data, TARGETS)


def test_tiny_noise_and_unused_weights_are_told():
    with pytest.warns(UserWarning, match="Noise below 1e-05 drowns in the rounding"):
        analysed(classifier(), X, noise=1e-7)
    model, weighted = classifier(), [(X, Y, np.ones(120))]
    with pytest.warns(UserWarning, match="Sample weights are not used"):
        assert analysed(model, weighted) == analysed(model, X, Y)
