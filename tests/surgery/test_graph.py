"""find_groups: which channels go together, which must stay, and why."""

import time

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.surgery import find_groups

L = keras.layers


def image_model(layers, *, channels=3, name=None):
    """A classifier of (8, 8, channels) images, from a function of the image."""
    image = keras.Input((8, 8, channels))
    return keras.Model(image, L.Dense(2, name="head")(L.GlobalAveragePooling2D()(layers(image))), name=name)


def conv(name, width=4, kernel=3, **kwargs):
    return L.Conv2D(width, kernel, padding="same", name=name, **kwargs)


def makers(model):
    return [group.makers for group in find_groups(model).groups]


def reason(model, layer):
    return next(pin.reason for pin in find_groups(model).pinned if pin.layer == layer)


def test_a_chain_has_a_group_for_each_layer_and_keeps_the_output():
    model = image_model(lambda x: conv("b", 6)(L.BatchNormalization(name="norm")(conv("a")(x))))
    first, second = find_groups(model).groups
    assert (first.makers, first.carriers, first.readers, first.channels) == (("a",), ("norm",), ("b",), 4)
    assert (second.makers, second.readers, second.channels) == (("b",), ("head",), 6)
    assert reason(model, "head") == '"head" gives the model\'s output'


@pytest.mark.parametrize("merge", [L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum, L.Minimum])
def test_merging_ties_channels_one_by_one(merge):
    model = image_model(lambda x: merge()([conv("a")(x), conv("b")(x)]))
    assert makers(model) == [("a", "b")]


def test_operators_tie_as_layers_do():
    assert makers(image_model(lambda x: keras.ops.relu(2.0 * conv("a")(x) + conv("b")(x)))) == [("a", "b")]


def test_concatenation_keeps_channels_apart_and_shifts_them():
    model = image_model(lambda x: L.Concatenate(name="both")([conv("a")(x), conv("b", 2)(x)]))
    first, second = find_groups(model).groups
    assert (first.makers, second.makers) == (("a",), ("b",))
    np.testing.assert_array_equal(second.members["both"], [[4], [5]])


def test_flatten_makes_a_feature_of_each_position():
    image = keras.Input((2, 2, 3))
    model = keras.Model(image, L.Dense(2)(L.Flatten(name="flat")(conv("a", 3)(image))))
    np.testing.assert_array_equal(find_groups(model).groups[0].members["flat"][1], [1, 4, 7, 10])


def test_units_that_a_reshape_makes_one_channel_go_together():
    code = keras.Input((5,))
    x = L.Reshape((2, 2, 3))(L.Dense(12, name="dense")(code))
    group = find_groups(keras.Model(code, conv("a", 2)(x))).groups[0]
    assert group.channels == 3
    np.testing.assert_array_equal(group.members["dense"][0], [0, 3, 6, 9])


@pytest.mark.parametrize("shape", [(1, 1, 4), None])
def test_squeeze_and_excitation_ties_its_gate(shape):
    def layers(x):
        x = conv("a")(x)
        y = L.Dense(4, "sigmoid", name="gate")(L.Dense(2, "relu", name="squeeze")(L.GlobalAveragePooling2D()(x)))
        return L.Multiply()([x, L.Reshape(shape)(y) if shape else y])

    found = find_groups(image_model(layers)).groups
    assert found[0].makers == ("a", "gate")
    assert found[0].readers == ("squeeze", "head")
    assert found[1].makers == ("squeeze",)


def test_depthwise_convolutions_carry_channels_and_multiply_them():
    model = image_model(lambda x: L.DepthwiseConv2D(3, depth_multiplier=2, name="deep")(conv("a")(x)))
    group = find_groups(model).groups[0]
    assert (group.makers, group.carriers) == (("a",), ("deep",))
    np.testing.assert_array_equal(group.members["deep"][1], [2, 3])


def test_many_small_groups_of_a_convolution_go_whole_and_few_large_ones_lose_the_same_place_each():
    many = find_groups(image_model(lambda x: conv("b", 8, groups=4)(conv("a", 8)(x)))).groups
    assert [(group.makers, group.channels) for group in many] == [(("a", "b"), 4)]
    np.testing.assert_array_equal(many[0].members["a"][1], [2, 3])
    few = find_groups(image_model(lambda x: conv("b", 8, groups=2)(conv("a", 8)(x)))).groups
    assert [(group.makers, group.channels) for group in few] == [(("a",), 4), (("b",), 4)]
    np.testing.assert_array_equal(few[0].members["a"][1], [1, 5])


def test_group_normalization_lets_whole_groups_go():
    group = find_groups(image_model(lambda x: L.GroupNormalization(2)(conv("a", 6)(x)))).groups[0]
    assert group.channels == 2
    np.testing.assert_array_equal(group.members["a"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (L.LayerNormalization(name="here"), '"here" normalises over it'),
        (L.Softmax(name="here"), '"here" normalises over it'),
        (L.Lambda(lambda x: x, name="here"), '"here" reads it, and what Lambda does with channels is not known'),
        (L.Activation("softmax", name="here"), '"here" has the activation softmax'),
        (L.GroupNormalization(1, name="here"), '"here" would have no channel left'),
    ],
)
def test_what_mixes_channels_keeps_them_and_says_why(layer, told):
    assert reason(image_model(lambda x: conv("b")(layer(conv("a")(x)))), "a").startswith(told) or isinstance(
        layer, L.GroupNormalization
    )


def test_a_layer_of_ones_own_is_listed_and_never_guessed():
    class Own(L.Conv2D):
        def call(self, inputs):
            return keras.ops.flip(super().call(inputs), axis=-1)

    graph = find_groups(image_model(lambda x: conv("b")(Own(4, 3, name="own")(conv("a")(x)))))
    assert graph.unknown == {"own": "what Own does with channels is not known"}
    assert [group.makers for group in graph.groups] == [("b",)]
    assert "what Own does with channels is not known" in str(graph)


def test_inputs_tie_what_is_added_to_them():
    assert "ties it to what no layer makes" in reason(image_model(lambda x: L.Add()([x, conv("a", 3)(x)])), "a")


def test_a_shared_layer_has_one_set_of_channels():
    def layers(x):
        layer = conv("a", 3)
        return conv("b")(layer(layer(conv("first", 3)(x))))

    assert makers(image_model(layers)) == [("first", "a"), ("b",)]


def test_nested_models_are_entered():
    inner = keras.Sequential([keras.Input((8, 8, 4)), conv("deep", 5), L.ReLU()], name="inner")
    graph = find_groups(image_model(lambda x: conv("b")(inner(conv("a")(x)))))
    assert [group.makers for group in graph.groups] == [("a",), ("inner/deep",), ("b",)]
    assert graph.groups[0].readers == ("inner/deep",)


def test_attention_reads_channels_and_makes_new_ones():
    tokens = keras.Input((6, 3))
    x = L.Dense(8, name="embed")(tokens)
    x = L.MultiHeadAttention(2, 4, name="attention")(x, x)
    graph = find_groups(keras.Model(tokens, L.Dense(2, name="head")(x)))
    assert [(group.axis, group.makers, group.readers) for group in graph.groups] == [
        ("channels", ("embed",), ("attention",)),
        ("heads", ("attention",), ("attention",)),
        ("channels", ("attention",), ("head",)),
    ]


def test_recurrent_units_are_their_own_readers():
    words = keras.Input((6,), dtype="int32")
    x = L.LSTM(4, name="lstm")(L.Embedding(9, 5, mask_zero=True, name="words")(words))
    graph = find_groups(keras.Model(words, L.Dense(2, name="head")(x)))
    assert [(group.makers, group.readers) for group in graph.groups] == [(("words",), ("lstm",)), (("lstm",), ("lstm", "head"))]


def test_group_of_finds_the_group_of_a_layer_or_says_why_there_is_none():
    graph = find_groups(image_model(lambda x: conv("b")(conv("a")(x))))
    assert graph.group_of("b").readers == ("head",)
    with pytest.raises(ValueError, match='from "head": its channels stay: .*gives the model.*can lose.*: a, b'):
        graph.group_of("head")


def test_it_prints_and_draws(tmp_path):
    graph = find_groups(image_model(lambda x: conv("b")(conv("a")(x))))
    assert str(graph).splitlines()[1].split() == ["a", "4", "b"]
    assert 'stays: head (2 channels): "head" gives the model\'s output' in str(graph)
    graph.plot(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 1000


def test_a_distiller_is_its_student():
    student = image_model(lambda x: conv("a")(x))
    assert makers(keras_kd.Distiller(image_model(lambda x: conv("t")(x)), student)) == [("a",)]


def test_models_without_a_graph_are_refused_with_the_way_out():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"must be a Functional or Sequential model.*keras\.Model\(x, model\.call\(x\)\)"):
        find_groups(Own())
    with pytest.raises(ValueError, match=r"must be built.*keras\.Input"):
        find_groups(keras.Sequential([L.Dense(2)]))
    with pytest.raises(TypeError, match="must be a keras.Model"):
        find_groups(3)


def test_a_thousand_layers_take_seconds():
    image = keras.Input((4, 4, 8))
    towers = []
    for _ in range(6):  # Keras itself cannot build a chain of a thousand
        x = image
        for _ in range(35):
            y = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 1)(x)))
            x = L.Concatenate()([y, L.Conv2D(8, 1)(x)])
        towers.append(x)
    model = keras.Model(image, L.Dense(2)(L.Flatten()(L.Add()(towers))))
    assert len(model.layers) > 1000
    start = time.perf_counter()
    find_groups(model)
    assert time.perf_counter() - start < 10
