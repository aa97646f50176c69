"""transfer_weights: what a target takes over, and that nothing is written where anything is wrong; kept_channels."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import surgery
from keras_kd.surgery import _analysis
from keras_kd.surgery._rebuild import Rebuilt, Replacement
from tests.surgery import networks

L = keras.layers


def network(widths=(6, 8, 5), *, classes=3, inputs=3, names="abcd", norm=True):
    """Convolutions "a", "b" with a sum of "b" and "c", then a Dense layer "d"."""
    image = keras.Input((6, 6, inputs))
    first, second, hidden = widths
    x = L.Conv2D(first, 3, padding="same", name=names[0])(image)
    x = L.ReLU()(L.BatchNormalization(name=f"{names[0]}_norm")(x) if norm else x)
    x = L.Add()([L.Conv2D(second, 1, name=names[1])(x), L.Conv2D(second, 3, padding="same", name=names[2])(x)])
    x = L.Dense(hidden, activation="relu", name=names[3])(L.Flatten()(L.MaxPooling2D(2)(x)))
    return keras.Model(image, L.Dense(classes, name="head")(x))


def randomized(*args, seed=0, **kwargs):
    return networks.randomize(network(*args, **kwargs), seed)


def copy_of(model, seed=5):
    """The same architecture with other weights."""
    return networks.randomize(keras.models.clone_model(model), seed)


def outcomes(report):
    return {one.layer: one.outcome for one in report.layers}


def weights_of(model):
    return [np.array(variable) for variable in model.variables]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_copy_of_what_surgery_made_gets_exactly_its_weights_by_the_channels_of_the_report():
    model = randomized()
    smaller, report = surgery.remove_channels(model, {"a": [1, 4], "b": [0, 7], "d": [2]}, data=None, return_report=True)
    twin = copy_of(smaller)
    before = weights_of(model)
    transferred = surgery.transfer_weights(model, twin, channels=report.kept)
    assert_same(weights_of(twin), weights_of(smaller))
    assert_same(weights_of(model), before)
    x = networks.inputs_for(model)
    np.testing.assert_array_equal(twin(x), smaller(x))
    assert outcomes(transferred) == dict.fromkeys(["a", "a_norm", "b", "c", "d", "head"], "sliced")
    assert transferred.taken == transferred.weights == twin.count_params()
    table = str(transferred)
    assert "kernel (3, 3, 3, 4) of (3, 3, 3, 6), bias (4,) of (6,)" in table
    assert table.endswith(f"{twin.count_params():,} of {twin.count_params():,} weights taken over")


@pytest.mark.parametrize("seed", [*range(6), *[pytest.param(seed, marks=pytest.mark.thorough) for seed in range(6, 40)]])
def test_random_networks_without_some_channels_get_their_weights_back_exactly(seed):
    model = networks.random_network(seed)
    smaller, report = surgery.remove_channels(model, networks.random_channels(model, seed), return_report=True)
    wanted = [np.array(variable) for variable in smaller.weights]
    twin = keras.models.clone_model(smaller)
    networks.randomize(smaller, 9)
    for target, options in ((smaller, {}), (twin, {"channels": report.kept})):
        surgery.transfer_weights(model, target, **options)
        assert_same([np.array(variable) for variable in target.weights], wanted)


def test_slices_take_the_channels_with_the_largest_kernels_and_the_next_layer_reads_these():
    source, target = randomized(seed=1), network((4, 5, 3))
    report = surgery.transfer_weights(source, target)
    a, b, c, d = (np.array(source.get_layer(name).kernel) for name in "abcd")

    def largest(size, count):
        return np.sort(np.argsort(-size)[:count])

    first = largest(np.square(a).sum((0, 1, 2)), 4)
    second = largest(np.square(b).sum((0, 1, 2)) + np.square(c).sum((0, 1, 2)), 5)  # tied by the sum
    hidden = largest(np.square(d).sum(0), 3)
    np.testing.assert_array_equal(target.get_layer("a").kernel, a[..., first])
    np.testing.assert_array_equal(
        target.get_layer("a_norm").moving_variance, np.array(source.get_layer("a_norm").moving_variance)[first]
    )
    np.testing.assert_array_equal(target.get_layer("b").kernel, b[:, :, first][..., second])
    np.testing.assert_array_equal(target.get_layer("c").kernel, c[:, :, first][..., second])
    rows = d.reshape(3, 3, 8, 5)[:, :, second].reshape(-1, 5)  # what Flatten gives of the channels
    np.testing.assert_array_equal(target.get_layer("d").kernel, rows[:, hidden])
    np.testing.assert_array_equal(target.get_layer("head").kernel, np.array(source.get_layer("head").kernel)[hidden])
    assert report.taken == target.count_params()


def test_a_concatenation_is_read_as_its_parts_were_taken():
    def concatenated(one, other):
        vector = keras.Input((4,))
        parts = [L.Dense(one, name="one")(vector), L.Dense(other, name="other")(vector)]
        return networks.randomize(keras.Model(vector, L.Dense(2, name="head")(L.Concatenate()(parts))))

    source, target = concatenated(6, 4), concatenated(3, 3)
    surgery.transfer_weights(source, target, channels={"one": [0, 2, 5], "other": [1, 2, 3]})
    head = np.array(source.get_layer("head").kernel)
    np.testing.assert_array_equal(target.get_layer("head").kernel, head[[0, 2, 5, 7, 8, 9]])


def test_outputs_and_wider_layers_are_left_and_the_report_says_why():
    source, target = randomized(), randomized((6, 8, 9), classes=2, seed=3)
    before = {name: target.get_layer(name).get_weights() for name in ("d", "head")}
    report = surgery.transfer_weights(source, target)
    assert outcomes(report) == {"a": "copied", "a_norm": "copied", "b": "copied", "c": "copied", "d": "left", "head": "left"}
    for name, weights in before.items():
        assert_same(target.get_layer(name).get_weights(), weights)
    details = {one.layer: one.detail for one in report.layers}
    assert details["d"] == "kernel (72, 9), the source's (72, 5)"
    source, target = randomized(), randomized(classes=2)
    detail = surgery.transfer_weights(source, target).layers[-1].detail
    assert '"head" gives the model\'s output' in detail
    surgery.transfer_weights(source, target, channels={"head": [0, 2]})  # unless told which classes
    np.testing.assert_array_equal(target.get_layer("head").bias, np.array(source.get_layer("head").bias)[[0, 2]])


def test_by_name_takes_equal_shapes_of_the_same_path_alone():
    source, target = randomized(), randomized((6, 8, 4), names="abxd", seed=3)
    report = surgery.transfer_weights(source, target, by="name")
    assert outcomes(report) == {"a": "copied", "a_norm": "copied", "b": "copied", "x": "left", "d": "left", "head": "left"}
    np.testing.assert_array_equal(target.get_layer("b").kernel, source.get_layer("b").kernel)
    assert report.taken == sum(target.get_layer(name).count_params() for name in ("a", "a_norm", "b"))


def test_by_shape_takes_layers_of_other_names_in_their_order():
    def dense(*widths):
        return networks.randomize(keras.Sequential([keras.Input((4,)), *[L.Dense(width) for width in widths]]))

    source, target = dense(5, 4, 5, 4), dense(5, 6, 5, 4)
    report = surgery.transfer_weights(source, target, by="shape")
    assert [one.outcome for one in report.layers] == ["copied", "left", "left", "copied"]
    np.testing.assert_array_equal(target.layers[0].kernel, source.layers[0].kernel)
    np.testing.assert_array_equal(target.layers[3].kernel, source.layers[1].kernel)


def test_numbers_that_keras_gave_to_names_by_chance_pair_no_layers():
    def stack(first):
        keras.utils.clear_session()
        for _ in range(first):
            L.Dense(1)
        return networks.randomize(keras.Sequential([keras.Input((4,)), *[L.Dense(4) for _ in range(3)]]), first)

    source, target = stack(0), stack(1)
    assert target.layers[0].name == source.layers[1].name
    surgery.transfer_weights(source, target)
    assert_same(target.get_weights(), source.get_weights())


class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.head = L.Dense(width, name="hidden"), L.Dense(2, name="head")
        self.scale = self.add_weight(shape=(), name="scale")
        self(np.zeros((1, 4)))

    def call(self, x):
        return self.head(self.hidden(x)) * self.scale


@pytest.mark.parametrize("by", ["auto", "name", "shape"])
def test_subclassed_models_give_and_take_equal_shapes(by):
    source, target = Subclassed(5), Subclassed(5)
    networks.randomize(source)
    networks.randomize(target, 1)
    report = surgery.transfer_weights(source, target, by=by)
    assert_same(target.get_weights(), source.get_weights())
    assert set(outcomes(report).values()) == {"copied"}


def test_what_needs_the_graph_of_a_subclassed_source_is_left_or_refused():
    source, target = Subclassed(5), Subclassed(3)
    assert outcomes(surgery.transfer_weights(source, target))["hidden"] == "left"
    with pytest.raises(ValueError, match="`source` must be a Functional or Sequential model"):
        surgery.transfer_weights(source, target, by="channels")


def test_nested_models_of_other_names_are_paired_by_layers():
    def nested(name, width, seed):
        inner = keras.Sequential([keras.Input((4,)), L.Dense(width, name="x"), L.Dense(width, name="y")], name=name)
        vector = keras.Input((4,))
        return networks.randomize(keras.Model(vector, L.Dense(2, name="head")(inner(vector))), seed)

    source, target = nested("backbone", 6, 0), nested("trunk", 4, 1)
    report = surgery.transfer_weights(source, target, by="channels", layers={"trunk": "backbone"})
    assert [(one.layer, one.source) for one in report.layers][:2] == [("trunk/x", "backbone/x"), ("trunk/y", "backbone/y")]
    assert set(outcomes(report).values()) == {"sliced"}


@pytest.mark.parametrize("policies", [("float32", "mixed_float16"), ("float16", "bfloat16")])
def test_dtypes_may_differ(policies):
    models = []
    for policy in policies:
        keras.config.set_dtype_policy(policy)
        try:
            models.append(randomized((6, 8, 5) if not models else (4, 6, 3), seed=len(models)))
        finally:
            keras.config.set_dtype_policy("float32")
    surgery.transfer_weights(*models)
    kernel = models[1].get_layer("d").kernel
    assert kernel.dtype == {"mixed_float16": "float32", "bfloat16": "bfloat16"}[policies[1]]
    norms = [np.square(np.array(model.get_layer("d").kernel).astype("float32")).sum() for model in models]
    assert 0 < norms[1] < norms[0]


def test_statistics_of_preprocessing_layers_count_at_once():
    def model():
        return keras.Sequential([keras.Input((3,)), L.Normalization(name="norm"), L.Dense(2, name="head")])

    source, target = model(), model()
    x = np.random.default_rng(0).normal(3.0, 2.0, (50, 3)).astype("float32")
    source.get_layer("norm").adapt(x)
    surgery.transfer_weights(source, target)
    np.testing.assert_array_equal(target(x), source(x))


def test_a_distiller_stands_for_its_student():
    teacher, student = randomized(), randomized((4, 6, 3), seed=1)
    distiller = keras_kd.Distiller(teacher, student)
    surgery.transfer_weights(teacher, distiller)
    surgery.transfer_weights(teacher, (twin := copy_of(student)))
    assert_same(student.get_weights(), twin.get_weights())


def test_layers_that_both_models_share_are_not_touched():
    source = randomized()
    shared = source.get_layer("a")
    image = keras.Input((6, 6, 3))
    target = keras.Model(image, L.Dense(5, name="d")(L.Flatten()(L.Conv2D(2, 1, name="b")(shared(image)))))
    before = source.get_weights()
    report = surgery.transfer_weights(source, target)
    assert outcomes(report)["a"] == "left"
    assert_same(source.get_weights(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "size"}, "`by` must be one of auto, name, shape, channels. Received: by='size'"),
        ({"layers": {"e": "a"}}, 'No layer "e" in the target. Received: layers="e"'),
        ({"layers": {"a": "e"}}, 'No layer "e" in the source. Received: layers="e"'),
        ({"layers": {"a": "d"}}, r'`layers` must name layers that fit. Received: {"a": "d"}'),
        ({"layers": {"a": "max_pooling"}}, "`layers` must name layers with weights"),
        ({"channels": {"z": [0]}}, '`channels` must name layers of the source that give channels. Received: "z"'),
        ({"channels": {"a": [0, 6, 7, 8]}}, r'`channels` of "a" must be ascending whole numbers in \[0, 5\]'),
        ({"channels": {"a": [3, 2, 1, 0]}}, r'`channels` of "a" must be ascending'),
        ({"channels": {"a": [0.5]}}, r'`channels` of "a" must be ascending'),
        ({"channels": {"a": []}}, r'`channels` of "a" must be ascending'),
        ({"channels": {"a": [0, 1]}}, '`channels` of "a" must fit the target\'s "a"'),
        ({"channels": {"b": [0, 1, 2, 3, 4], "c": [1, 2, 3, 4, 5]}}, 'must agree on channels that are tied.*"c"'),
        ({"channels": {"a": [0, 1, 2, 3]}, "by": "name"}, '`channels` are taken with by="auto"'),
    ],
)
def test_nothing_is_written_where_anything_is_wrong(options, message):
    source, target = randomized(), randomized((4, 5, 3), seed=1)
    source.layers[-4].name = "max_pooling"
    before = weights_of(target)
    with pytest.raises(ValueError, match=message):
        surgery.transfer_weights(source, target, **options)
    assert_same(weights_of(target), before)


def test_what_is_no_pair_of_models_is_refused():
    model = network()
    with pytest.raises(TypeError, match="`source` must be a keras.Model"):
        surgery.transfer_weights("model", model)
    with pytest.raises(ValueError, match="`source` and `target` must be two models"):
        surgery.transfer_weights(model, model)
    with pytest.raises(ValueError, match="`target` must be built"):
        surgery.transfer_weights(model, keras.Sequential([L.Dense(2)]))
    with pytest.raises(TypeError, match="`layers` must be a dict"):
        surgery.transfer_weights(model, copy_of(model), layers=["a"])
    with pytest.raises(ValueError, match="Nothing of `source` fits `target`"):
        surgery.transfer_weights(model, keras.Sequential([keras.Input((3, 2)), L.LSTM(4)]))


def test_kept_channels_are_those_of_the_original_after_several_surgeries():
    model = randomized()
    once = surgery.remove_channels(model, {"a": [1, 4], "d": [0]})
    twice, report = surgery.remove_channels(once, {"a": [0], "b": [2, 3]}, return_report=True)
    kept = surgery.kept_channels(twice)
    assert kept["a"].tolist() == [2, 3, 5]
    assert kept["d"].tolist() == [1, 2, 3, 4]
    assert kept["b"].tolist() == kept["c"].tolist() == [0, 1, 4, 5, 6, 7]
    assert report.kept["a"].tolist() == [1, 2, 3]
    for name in "abc":
        np.testing.assert_array_equal(twice.get_layer(name).bias, np.array(model.get_layer(name).bias)[kept[name]])
    with pytest.raises(ValueError, match="`model` must be the very object that surgery made"):
        surgery.kept_channels(keras.models.clone_model(twice))


def test_layers_in_the_place_of_others_have_no_channels_of_the_original_and_the_rest_keeps_theirs():
    model = surgery.remove_channels(randomized(), {"a": [1], "b": [0]})
    found = _analysis.analyse(model)
    old, kernel = model.get_layer("b"), np.zeros((1, 1, 5, 2), "float32")
    stand_ins = [L.Conv2D(2, 1, use_bias=False, name="b_first"), L.Conv2D(7, 1, name="b_second")]
    weights = [[kernel], [np.zeros((1, 1, 2, 7)), np.zeros(7)]]
    kept = surgery.kept_channels(Rebuilt(found, set(), {id(old): Replacement(stand_ins, weights)}).model)
    assert {"b", "b_first", "b_second"}.isdisjoint(kept)
    assert kept["a"].tolist() == [0, 2, 3, 4, 5]
    assert kept["c"].tolist() == [1, 2, 3, 4, 5, 6, 7]
