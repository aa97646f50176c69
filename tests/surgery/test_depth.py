"""linearize and remove_layers: fewer layers, and how far the result is from the original."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.analysis import Step, linear_analysis
from keras_kd.surgery import linearize, remove_layers
from tests.surgery import networks
from tests.surgery.test_merging import close, model_of, names

L = keras.layers


def data_for(model, samples=240, seed=3):
    return networks.inputs_for(model, samples, seed)


def mean_error(model, other, x):
    return float(np.mean(np.square(np.asarray(model(x)) - np.asarray(other(x)))))


def wrapped(layers):
    """The middle of a network, between a layer "before" and a layer "after"."""

    def whole(x):
        y = layers(L.Conv2D(3, 3, padding="same", activation="tanh", name="before")(x))
        y = L.Flatten()(y) if len(y.shape) > 2 else y
        return L.Dense(2, activation="tanh", name="after")(y)

    return whole


def two_convs(x):
    return L.Conv2D(3, 2, strides=2, name="last")(L.Conv2D(5, 3, name="first")(x))


def strided_twice(x):
    x = L.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="first")(x)
    return L.AveragePooling2D(2, name="last")(L.BatchNormalization(center=False)(x))


def padded(x):
    return L.Conv2D(3, 3, name="last")(L.ZeroPadding2D(((1, 0), (2, 1)), name="first")(x))


def cropped(x):
    return L.Conv2D(3, 2, name="last")(L.Cropping2D(((1, 2), (0, 1)), name="first")(x))


def residual(x):
    y = L.Conv2D(3, 1)(L.Conv2D(4, 3, padding="same", name="first")(x))
    return L.Add(name="last")([x, y])


LINEAR = {
    "strided": (two_convs, ["Conv2D"]),
    "pooled": (strided_twice, ["Conv2D"]),
    "padded": (padded, ["ZeroPadding2D", "Conv2D"]),
    "cropped": (cropped, ["Cropping2D", "Conv2D"]),
    "residual": (residual, ["Conv2D"]),
    "pointwise": (lambda x: L.Conv2D(4, 1, name="last")(L.BatchNormalization(name="first")(x)), ["Conv2D"]),
    "to a vector": (lambda x: L.Dense(4, name="last")(L.Flatten(name="first")(x)), ["Flatten", "Dense"]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_block_that_is_linear_is_given_exactly(name):
    layers, kinds = LINEAR[name]
    model = model_of(wrapped(layers), (8, 8, 2))
    x = data_for(model, 400)
    linear, report = linearize(model, ("first", "last"), x, return_report=True)
    close(linear(x), model(x), 1e-4)
    assert report.r2 > 1 - 1e-6
    assert report.error < 1e-3
    at = names(linear).index("before") + 1
    assert [type(layer).__name__ for layer in linear.layers[1:][at : at + len(kinds)]] == kinds
    assert "first" not in names(linear)
    assert names(linear)[at + len(kinds) - 1] == "last"


def test_the_map_of_two_dense_layers_is_the_product_of_their_kernels():
    model = networks.randomize(keras.Sequential([keras.Input((5,)), L.Dense(9, name="a"), L.Dense(7, name="b"), L.ReLU()]))
    linear, report = linearize(model, ("a", "b"), data_for(model), return_report=True)
    (ka, ba), (kb, bb) = (layer.get_weights() for layer in model.layers[:2])
    kernel, bias = linear.layers[0].get_weights()
    np.testing.assert_allclose(kernel, ka @ kb, atol=1e-4)
    np.testing.assert_allclose(bias, ba @ kb + bb, atol=1e-4)
    assert (report.layers, report.made, report.columns, report.rows) == (("a", "b"), ("Dense",), 5, 240)
    assert (report.macs, report.macs_after, report.parameters_after) == (45 + 63, 35, 42)
    assert "a, b" in str(report)
    assert "Dense" in str(report)


def test_r2_and_error_are_those_on_samples_that_the_fit_did_not_see():
    model = networks.randomize(
        keras.Sequential([keras.Input((5,)), L.Dense(30, "relu", name="a"), L.Dense(2, name="b")]),
    )
    x = data_for(model, 80)
    _, report = linearize(model, ("a", "b"), x, return_report=True)
    unseen = np.arange(80) % 4 == 3
    y = np.asarray(model(x))
    rows = np.concatenate([x, np.ones((80, 1))], axis=1)
    fit = np.linalg.lstsq(rows[~unseen], y[~unseen], rcond=None)[0]
    off = y[unseen] - rows[unseen] @ fit
    r2 = 1 - np.sum(off**2) / np.sum((y[unseen] - y[unseen].mean(0)) ** 2)
    assert report.r2 == pytest.approx(r2, abs=0.03)
    assert report.error == pytest.approx(np.sqrt(np.mean(off**2)), rel=0.1)
    assert report.r2 < 0.99


def test_sequences_get_a_dense_layer_or_a_convolution_over_steps():
    model = model_of(lambda x: L.Conv1D(3, 3, padding="causal", name="conv")(L.Dense(6, name="dense")(x)), (9, 4))
    x = data_for(model)
    steps, report = linearize(model, ("dense", "conv"), x, return_report=True)
    assert (report.made, report.columns, steps.layers[1].padding) == (("Conv1D 3",), 12, "causal")
    close(steps(x)[:, 2:], model(x)[:, 2:], 0.2)  # the dense layer's bias is not there beyond the border
    point = linearize(model, "dense", x)
    assert type(point.layers[1]) is L.Dense
    close(point(x), model(x), 1e-4)


def test_inputs_of_unknown_size_are_convolved_as_the_block_does():
    model = model_of(lambda x: L.Conv2D(3, 1)(L.Conv2D(4, 5, strides=2, padding="same")(x)), (None, None, 2))
    first, last = names(model)
    linear, report = linearize(model, (first, last), data_for(model), return_report=True)
    assert (report.macs, report.macs_after) == (None, None)
    assert "MACs unknown -> unknown, weights" in str(report)
    layer = linear.layers[1]
    assert (layer.kernel_size, layer.strides, layer.padding) == ((5, 5), (2, 2), "same")
    x = np.random.default_rng(0).normal(size=(2, 13, 11, 2)).astype("float32")
    close(linear(x), model(x), 1e-4)


def small_network():
    def layers(x):
        x = L.Conv2D(6, 3, padding="same", activation="relu", name="stem")(x)
        y = L.Conv2D(8, 3, padding="same", activation="softplus", name="one")(x)
        y = L.Conv2D(6, 1, name="two")(y)
        x = L.Add(name="add")([x, L.Rescaling(0.05, name="scale")(y)])
        x = L.Conv2D(5, 3, strides=2, activation="relu", name="next")(x)
        return L.Dense(3, name="head")(L.GlobalAveragePooling2D(name="pool")(x))

    return model_of(layers, (10, 10, 2))


def test_a_plans_merge_block_saves_what_the_plan_says():
    model = small_network()
    x = data_for(model, 300)
    report = linear_analysis(model, x, blocks=[("one", "two")], noise=0.01, verbose=0)
    plan = report.recommend(tolerance=0.5)
    step = next(step for step in plan.steps if step.action == "merge_block")
    assert (step.layer, step.last) == ("one", "two")
    linear, done = linearize(model, step, x, return_report=True)
    assert step.macs == done.macs - done.macs_after
    assert step.parameters == done.parameters - done.parameters_after
    assert done.r2 == pytest.approx(report.blocks[0].linearity, abs=0.05)
    same = linearize(model, report.blocks[0], x)
    close(same(x), linear(x), 1e-5)


def test_a_plans_remove_layer_saves_what_the_plan_says():
    model = small_network()
    for variable in model.get_layer("two").variables:
        variable.assign(variable * 0.0)
    x = data_for(model, 300)
    plan = linear_analysis(model, x, blocks=[("one", "add")], verbose=0).recommend(tolerance=1e-6)
    step = next(step for step in plan.steps if step.action == "remove_layer" and step.last)
    smaller, done = remove_layers(model, [step], return_report=True)
    assert step.macs == done.macs - done.macs_after
    assert step.parameters == done.parameters - done.parameters_after
    close(smaller(x), model(x), 1e-6)


@pytest.mark.parametrize("name", ["add", "one", "two", ("one", "add")])
def test_a_residual_branch_goes_whole(name):
    model = small_network()
    x = data_for(model)
    before = [np.asarray(v).copy() for v in model.variables]
    smaller, report = remove_layers(model, [name], return_report=True)
    assert names(smaller) == ["stem", "next", "pool", "head"]
    assert list(report.removed.values()) == [("one", "two", "scale", "add")]
    hand = keras.Model(model.input, model.get_layer("stem").output)(x)
    for layer in ("next", "pool", "head"):
        hand = model.get_layer(layer)(hand)
    close(smaller(x), hand, 1e-6)
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), value)


def test_data_brings_the_outputs_closer_on_other_samples():
    model = small_network()
    x = data_for(model, 300)
    plain = remove_layers(model, ["add"])
    fitted, report = remove_layers(model, ["add"], data=x[:200], return_report=True)
    (refit,) = report.refits
    assert refit.layer == "next"
    assert refit.error_after < 0.5 * refit.error_before
    assert mean_error(fitted, model, x[200:]) < 0.5 * mean_error(plain, model, x[200:])
    assert "next" in str(report)
    assert "one, two, scale, add" in str(report)
    np.testing.assert_array_equal(fitted.get_layer("stem").kernel, model.get_layer("stem").kernel)


def test_a_branch_that_is_nearly_0_leaves_nearly_nothing_behind():
    model = small_network()
    for variable in model.get_layer("two").variables:
        variable.assign(variable * 1e-4)
    x = data_for(model)
    close(remove_layers(model, ["add"])(x), model(x), 1e-3)


def test_a_linear_layer_goes_into_the_next_one_without_loss():
    model = networks.randomize(
        keras.Sequential(
            [keras.Input((5,)), L.Dense(6, "tanh", name="a"), L.Dense(6, name="b"), L.Dropout(0.5), L.Dense(3, "tanh", name="c")]
        )
    )
    x = data_for(model)
    smaller = remove_layers(model, ["b"], data=x)
    assert isinstance(smaller, keras.Sequential)
    assert "b" not in names(smaller)
    close(smaller(x), model(x), 1e-3)
    kb, bb = model.get_layer("b").get_weights()
    kc, bc = model.get_layer("c").get_weights()
    np.testing.assert_allclose(smaller.get_layer("c").kernel, kb @ kc, atol=1e-3)
    np.testing.assert_allclose(smaller.get_layer("c").bias, bb @ kc + bc, atol=1e-3)


def test_all_the_next_layers_are_fitted():
    def layers(x):
        y = L.Dense(5, name="gone")(L.Dense(5, "tanh", name="first")(x))
        left, right = L.Dense(3, "tanh", name="left")(y), L.Dense(4, name="right")(L.ReLU()(y))
        return L.Dense(2, name="head")(L.Concatenate()([left, right, y]))

    model = model_of(layers, (5,))
    x = data_for(model, 400)
    smaller, report = remove_layers(model, ["gone"], data=x[:300], return_report=True)
    assert {one.layer for one in report.refits} == {"left", "right", "head"}
    assert mean_error(smaller, model, x[300:]) < mean_error(remove_layers(model, ["gone"]), model, x[300:])


def test_several_go_at_once_and_overlap_as_they_like():
    def layers(x):
        for index in range(3):
            y = L.Dense(6, "relu", name=f"up{index}")(x)
            x = L.Add(name=f"add{index}")([x, L.Dense(4, name=f"down{index}")(y)])
        return L.Dense(2, name="head")(x)

    model = model_of(layers, (4,))
    x = data_for(model)
    smaller, report = remove_layers(model, ["add0", "up1", ("up1", "add2")], data=x, return_report=True)
    assert names(smaller) == ["head"]
    assert [one.layer for one in report.refits] == ["head"]
    one = remove_layers(model, ["add0", "add2"])
    assert names(one) == ["up1", "down1", "add1", "head"]
    kernel, bias = (model.get_layer(name).get_weights() for name in ("up1", "down1"))
    hidden = np.maximum(x @ kernel[0] + kernel[1], 0) @ bias[0] + bias[1] + x
    close(one(x), hidden @ model.get_layer("head").get_weights()[0] + model.get_layer("head").get_weights()[1])


def test_a_subtracted_branch_goes_but_not_what_it_is_subtracted_from():
    model = model_of(lambda x: L.Dense(2)(L.Subtract(name="sub")([x, L.Dense(4, name="branch")(x)])), (4,))
    assert len(remove_layers(model, ["sub"]).layers) == 2
    turned = model_of(lambda x: L.Dense(2)(L.Subtract(name="sub")([L.Dense(4, name="branch")(x), x])), (4,))
    with pytest.raises(ValueError, match="must read and give the same shape"):
        remove_layers(turned, ["sub"])


def test_a_gate_goes_and_what_it_was_made_of():
    def layers(x):
        x = L.Conv2D(4, 1, name="conv")(x)
        gate = L.Dense(4, "sigmoid", name="gate")(L.GlobalAveragePooling2D(keepdims=True)(x))
        return L.Dense(2, name="head")(L.Flatten(name="flat")(L.Multiply(name="excite")([x, gate])))

    assert names(remove_layers(model_of(layers), ["excite"])) == ["conv", "flat", "head"]


def test_operators_and_attention_are_branches_like_others():
    def layers(x):
        y = keras.ops.add(x, L.MultiHeadAttention(2, 3, name="heads")(L.LayerNormalization(name="norm")(x), x))
        y = L.Add(name="feed")([y, L.Dense(4, name="down")(L.Dense(8, "gelu", name="up")(L.LayerNormalization()(y)))])
        y = L.Add(name="last")([y, L.MultiHeadAttention(2, 3, name="more")(y, y)])
        return L.Dense(2, name="head")(y)

    model = model_of(layers, (5, 4))
    x = data_for(model)
    smaller, report = remove_layers(model, ["up"], data=x, return_report=True)
    assert {"up", "down", "feed"} < set(report.removed["up"])
    assert "heads" in names(smaller)
    assert {one.layer for one in report.refits} == {"more", "head"}
    assert all(one.error_after <= one.error_before for one in report.refits)
    operator = next(operation.name for operation in model.operations if type(operation).__module__.startswith("keras.src.ops"))
    smaller, report = remove_layers(model, [operator], data=x, return_report=True)
    assert report.removed == {operator: ("norm", "heads", operator)}
    assert "heads" not in names(smaller)
    assert {one.layer for one in report.refits} == {"up", "more", "head"}
    assert all(one.error_after <= one.error_before for one in report.refits)


def test_nested_models_lose_layers_and_are_layers():
    a = keras.Input((6, 6, 4))
    x = L.Conv2D(4, 3, padding="same", activation="relu", name="same")(a)
    inner = keras.Model(a, L.Conv2D(4, 3, padding="same", name="next")(x), name="inner")
    model = model_of(lambda x: L.Dense(2, name="head")(L.Flatten()(inner(L.ReLU()(x)))), (6, 6, 4))
    x = data_for(model)
    smaller, report = remove_layers(model, ["same"], data=x, return_report=True)
    assert names(smaller.get_layer("inner")) == ["next"]
    assert report.removed == {"same": ("inner/same",)}
    assert [one.layer for one in report.refits] == ["inner/next"]
    without, report = remove_layers(model, ["inner"], data=x, return_report=True)
    assert "inner" not in names(without)
    assert [one.layer for one in report.refits] == ["head"]
    linear, report = linearize(model, ("inner/same", "inner/next"), x, return_report=True)
    assert names(linear.get_layer("inner")) == ["next"]
    assert report.made == ("Conv2D 5x5",)
    whole, report = linearize(model, "inner", x, return_report=True)
    assert report.made == ("Conv2D 5x5",)
    assert whole.get_layer("inner").kernel_size == (5, 5)
    close(whole(x), linear(x), 1e-4)


def test_a_nested_model_that_is_used_twice_is_fitted_on_both_uses():
    a = keras.Input((4,))
    inner = keras.Model(a, L.Dense(4, name="b")(L.Dense(6, name="a")(a)), name="inner")
    model = model_of(lambda x: L.Dense(2)(L.Add()([inner(x), inner(x * 3.0 + 1.0)])), (4,))
    x = data_for(model, 60)
    linear, report = linearize(model, ("a", "b"), x, return_report=True)
    assert report.rows == 120
    close(linear(x), model(x), 1e-4)


def test_layers_that_are_used_several_times_go_everywhere():
    shared = L.Dense(4, "relu", name="shared")
    model = model_of(lambda x: L.Dense(2, name="head")(shared(L.Dense(4, "tanh", name="mid")(shared(x)))), (4,))
    x = data_for(model)
    smaller, report = remove_layers(model, ["shared"], data=x, return_report=True)
    assert names(smaller) == ["mid", "head"]
    assert len(report.refits) == 2
    with pytest.raises(ValueError, match='"shared" is used 2 times'):
        linearize(model, "shared", x)


def test_a_merging_layer_that_is_used_several_times_stays():
    add = L.Add(name="add")

    def layers(x):
        x = add([x, L.Dense(4, name="one")(x)])
        return L.Dense(2, name="head")(add([L.Dense(4, name="two")(x), x]))

    with pytest.raises(ValueError, match="must read and give the same shape, or belong to a residual branch"):
        remove_layers(model_of(layers, (4,)), ["add"])


def test_readers_that_are_used_several_times_keep_their_weights_and_say_so():
    shared = L.Dense(4, "relu", name="shared")
    model = model_of(lambda x: L.Dense(2, name="head")(shared(L.Dense(4, "tanh", name="mid")(shared(x)))), (4,))
    _, report = remove_layers(model, ["mid"], data=data_for(model), return_report=True)
    assert report.not_refitted == {"shared": "it is used several times"}
    assert [one.layer for one in report.refits] == ["head"]
    assert "not refitted: shared" in str(report)


def test_what_is_read_from_outside_stays():
    def layers(x):
        y = L.Dense(6, "relu", name="one")(x)
        z = L.Dense(4, name="two")(y)
        return L.Dense(2, name="head")(L.Concatenate()([L.Add(name="add")([x, z]), y]))

    model = model_of(layers, (4,))
    x = data_for(model)
    smaller, report = remove_layers(model, ["add"], return_report=True)
    assert report.removed == {"add": ("two", "add")}
    assert report.staying == ("one",)
    assert "one" in names(smaller)
    assert "two" not in names(smaller)
    assert "still there: one" in str(report)
    _, report = linearize(model, ("one", "two"), x, return_report=True)
    assert (report.layers, report.staying) == (("two",), ("one",))
    assert "still there" in str(report)


def test_batches_of_any_size_do():
    model = small_network()
    x = data_for(model, 120)
    whole, report = linearize(model, ("one", "two"), x, return_report=True)
    ones, other = linearize(model, ("one", "two"), [(x[i : i + 1], None) for i in range(120)], return_report=True)
    assert other.r2 == pytest.approx(report.r2, abs=0.01)
    close(ones(x), whole(x), 0.05)


def test_in_mixed_precision_both_give_finite_models_that_save_and_train(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_network()
    finally:
        keras.config.set_dtype_policy("float32")
    x = data_for(model)
    for index, made in enumerate([linearize(model, ("one", "two"), x), remove_layers(model, ["add"], data=x)]):
        assert made.get_layer("next").compute_dtype == "float16"
        assert made.get_layer("next").kernel.dtype == "float32"
        close(made(x), model(x), 0.2)
        made.save(tmp_path / f"{index}.keras")
        close(keras.models.load_model(tmp_path / f"{index}.keras")(x), made(x), 1e-6)
        made.compile("sgd", "mse")
        assert np.isfinite(made.fit(x, np.zeros((240, 3)), verbose=0).history["loss"][0])
    linear = linearize(model, ("one", "two"), x)
    assert linear.get_layer("two").compute_dtype == "float16"


def test_wrong_blocks_are_told():
    model, other = small_network(), Step("remove_layer", "one")
    x = data_for(model)
    for block, error, message in [
        (3, TypeError, "`block` must be the path of a layer, a pair"),
        (("one", 3), TypeError, "`block` must name layers as strings. Received: 3"),
        (other, ValueError, '`block` must be a step with the action "merge_block"'),
        ("nine", ValueError, 'No layer "nine" in the model. Received: block="nine". Layers: stem, '),
        (("two", "one"), ValueError, '"one" also reads something else, or does not follow from it'),
        (("two", "add"), ValueError, '"add" also reads something else'),
        ("add", ValueError, "A block must read one tensor and give one. .* which reads 2 and gives 1"),
    ]:
        with pytest.raises(error, match=message):
            linearize(model, block, x)
    with pytest.raises(ValueError, match="`data` must give more rows than the linear map has features, 54"):
        linearize(model, "one", data_for(model, 1))
    with pytest.raises(ValueError, match="`data` must have the shape that"):
        linearize(model, "one", x[:, :4])
    with pytest.raises(ValueError, match="`data` must give finite numbers everywhere"):
        linearize(model, "one", x * np.nan)
    with pytest.raises(ValueError, match="`max_columns` must be a whole number of at least 1. Received: max_columns=0"):
        linearize(model, "one", x, max_columns=0)


def test_maps_that_are_not_known_are_told():
    model = model_of(lambda x: L.UpSampling2D(name="up")(x))
    with pytest.raises(ValueError, match='The block up to "up" has no linear map that is known: it is not known what each'):
        linearize(model, "up", data_for(model, 8))
    words = model_of(lambda x: L.Embedding(9, 3, name="words")(x), (4,), dtype="int32")
    with pytest.raises(ValueError, match=r"must read and give floats .* Received: int32 of shape \(None, 4\), float32 of shape"):
        linearize(words, "words", data_for(words, 8))


def test_wrong_names_are_told():
    model = small_network()
    for given, error, message in [
        (3, TypeError, "`names` must be a sequence of names and pairs. Received: 3"),
        ([3], TypeError, "`names` must be the path of a layer, a pair"),
        (["nine"], ValueError, 'No layer "nine" in the model. Received: names="nine". Layers: stem, '),
        (["next"], ValueError, r'Received: "next", which gives \(None, 4, 4, 5\) from \(None, 10, 10, 6\)\. .*`linearize`'),
        ([("one", "two"), ("stem", "two")], ValueError, r'Received: \("stem", "two"\), which gives'),
        ([Step("merge_block", "one", "two")], ValueError, '`names` must hold steps with the action "remove_layer"'),
        (["pool"], ValueError, "must read and give the same shape"),
    ]:
        with pytest.raises(error, match=message):
            remove_layers(model, given)
    with pytest.raises(ValueError, match="`data` must have the shape that"):
        remove_layers(model, ["add"], data=np.zeros((4, 3)))
    single = keras.Sequential([keras.Input((4,)), L.Dense(4, name="a"), L.ReLU(name="b")], name="single")
    with pytest.raises(ValueError, match='"single" must keep at least one layer. Received: names that leave none of a, b'):
        remove_layers(single, ["a", "b"])
    with pytest.raises(TypeError, match="`model` must be a keras.Model"):
        remove_layers(None, ["a"])


def test_without_names_it_is_a_copy():
    model = small_network()
    x = data_for(model)
    copy = remove_layers(model, [])
    assert copy is not model
    assert names(copy) == names(model)
    close(copy(x), model(x), 1e-6)


def test_a_distiller_gives_its_student():
    model = small_network()
    distiller = keras_kd.Distiller(small_network(), model)
    assert "add" not in names(remove_layers(distiller, ["add"]))
