"""merge_linear and fold_batch_norm: fewer layers that give the same."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.surgery import fold_batch_norm, merge_linear
from tests.surgery import networks

L = keras.layers


def close(actual, expected, tolerance=1e-5):
    for a, b in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        scale = max(float(np.max(np.abs(b))), 1e-3)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


def model_of(layers, shape=(8, 8, 4), **options):
    """A model with random weights, from a function of its input."""
    inputs = keras.Input(shape, **options)
    return networks.randomize(keras.Model(inputs, layers(inputs)))


def names(model):
    return [layer.name for layer in model.layers if not isinstance(layer, L.InputLayer)]


def norms(model):
    return sum(isinstance(layer, L.BatchNormalization) for layer in model._flatten_layers())


FOLDABLE = {
    "dense": (lambda: L.Dense(5), (4,)),
    "dense on images": (lambda: L.Dense(5, use_bias=False), (3, 3, 4)),
    "conv1d": (lambda: L.Conv1D(5, 3, padding="causal", dilation_rate=2), (7, 4)),
    "conv2d": (lambda: L.Conv2D(6, 3, strides=2, padding="same", use_bias=False), (8, 8, 4)),
    "groups": (lambda: L.Conv2D(6, 3, groups=2), (6, 6, 4)),
    "conv3d": (lambda: L.Conv3D(3, 2), (4, 4, 4, 2)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=3, padding="same"), (6, 6, 2)),
    "depthwise1d": (lambda: L.DepthwiseConv1D(3, depth_multiplier=2, use_bias=False), (6, 3)),
    "separable": (lambda: L.SeparableConv2D(5, 3, depth_multiplier=2), (6, 6, 3)),
    "separable1d": (lambda: L.SeparableConv1D(5, 3, use_bias=False), (6, 3)),
    "transposed": (lambda: L.Conv2DTranspose(5, 3, strides=2), (4, 4, 3)),
    "einsum": (lambda: L.EinsumDense("bsc,chd->bshd", (4, 2, 5), bias_axes="hd"), (4, 3)),
    "einsum without bias": (lambda: L.EinsumDense("bsc,cd->bsd", (4, 5)), (4, 3)),
    "einsum, no bias, inner axis": (lambda: L.EinsumDense("bsc,chd->bsdh", (4, 2, 5)), (4, 3)),
    "einsum, bias between": (lambda: L.EinsumDense("bsc,csd->bsd", (4, 5), bias_axes="sd"), (4, 3)),
}


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize(
    "options", [{}, {"scale": False, "epsilon": 0.1}, {"center": False}], ids=["plain", "no scale", "no shift"]
)
def test_batch_normalization_goes_into_what_stands_before_it(name, options):
    make, shape = FOLDABLE[name]
    model = model_of(lambda x: L.ReLU()(L.BatchNormalization(name="norm", **options)(make()(x))), shape)
    x = networks.inputs_for(model)
    folded, report = fold_batch_norm(model, return_report=True)
    assert norms(folded) == 0
    assert len(folded.layers) == 3
    close(folded(x), model(x))
    first = model.layers[1].name
    assert report.merged == {first: (first, "norm")}
    assert report.kept == {}


def test_the_folded_kernel_is_that_of_the_formula():
    model = model_of(lambda x: L.BatchNormalization(epsilon=0.01, name="norm")(L.Conv2D(5, 3, name="conv")(x)))
    kernel, bias = fold_batch_norm(model).get_layer("conv").get_weights()
    w, b = model.get_layer("conv").get_weights()
    gamma, beta, mean, variance = model.get_layer("norm").get_weights()
    s = gamma / np.sqrt(variance + 0.01)
    np.testing.assert_allclose(kernel, w * s, rtol=1e-6)
    np.testing.assert_allclose(bias, (b - mean) * s + beta, rtol=1e-5)


def shared_norm(x):
    norm = L.BatchNormalization(name="norm")
    return L.Add()([norm(L.Conv2D(4, 1)(x)), norm(L.Conv2D(4, 1)(x))])


def shared_layer(x):
    layer = L.Conv2D(4, 1, name="layer")
    return L.Add()([L.BatchNormalization(name="norm")(layer(x)), layer(L.ReLU()(x))])


def read_twice(x):
    y = L.Conv2D(4, 1, name="layer")(x)
    return L.Add()([L.BatchNormalization(name="norm")(y), y])


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (shared_norm, '"norm" is used several times'),
        (shared_layer, '"layer" is used several times'),
        (read_twice, '"layer" is read by others, too'),
        (lambda x: L.BatchNormalization(name="norm")(L.Dense(4, "relu", name="layer")(x)), '"layer" has an activation'),
        (lambda x: L.BatchNormalization(name="norm", axis=1)(L.Conv2D(8, 1)(x)), "it normalises another axis"),
        (lambda x: L.BatchNormalization(name="norm")(L.ReLU()(x)), "it reads what no layer with a kernel gives"),
        (lambda x: L.BatchNormalization(name="norm")(x), "it reads what no layer with a kernel gives"),
        (
            lambda x: L.BatchNormalization(name="norm")(L.Conv2D(4, 1)(x), training=True),
            '"norm" is called with training=True',
        ),
    ],
    ids=["norm shared", "layer shared", "read twice", "activation", "axis", "no kernel", "input", "training"],
)
def test_what_cannot_be_folded_stays_and_says_why(layers, reason):
    model = model_of(layers)
    folded, report = fold_batch_norm(model, return_report=True)
    assert report.merged == {}
    assert report.kept["norm"] == reason
    assert names(folded) == names(model)
    assert folded is not model
    x = networks.inputs_for(model)
    if "training" not in reason:
        close(folded(x), model(x), 1e-6)


def test_a_model_output_before_the_norm_is_still_there():
    inputs = keras.Input((4,))
    y = L.Dense(3)(inputs)
    model = networks.randomize(keras.Model(inputs, [y, L.BatchNormalization()(y)]))
    folded = fold_batch_norm(model)
    assert norms(folded) == 1
    x = networks.inputs_for(model)
    close(folded(x), model(x), 1e-6)


def lively_mobile_net():
    """MobileNetV2 with random weights and statistics, whose outputs depend on the image, and much on each rounding."""
    model = networks.randomize(keras.applications.MobileNetV2((64, 64, 3), weights=None, classes=10, classifier_activation=None))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            count = layer.gamma.shape
            layer.set_weights([rng.uniform(1, 2, count), *rng.normal(0, 0.3, (2, *count)), rng.uniform(0.5, 1.5, count)])
        elif isinstance(layer, L.DepthwiseConv2D):
            layer.set_weights([rng.normal(0, 0.5, layer.kernel.shape)])
    return model


@pytest.fixture
def _float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # another test may have set one
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_mobile_net_has_no_norm_left_and_gives_the_same():
    model = lively_mobile_net()
    x = networks.inputs_for(model, samples=4)
    folded, report = fold_batch_norm(model, return_report=True)
    assert norms(model) == len(report.merged) == 52
    assert norms(folded) == 0
    given = np.asarray(model(x))
    assert np.min(np.std(given, axis=0)) > 0.01 * np.max(np.abs(given))
    close(folded(x), given, 1e-9)
    assert report.macs_after == report.macs
    assert report.parameters_after < report.parameters


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_give_the_same(seed):
    model = networks.random_network(seed)
    before = [np.asarray(v).copy() for v in model.variables]
    x = networks.inputs_for(model)
    close((fold_batch_norm if seed % 2 else merge_linear)(model)(x), model(x))
    for one, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), value)


def test_dense_layers_become_the_product_of_their_kernels():
    model = networks.randomize(
        keras.Sequential([keras.Input((4,)), L.Dense(8, name="a"), L.Dense(6, name="b"), L.Dense(3, "tanh", name="c")])
    )
    merged, report = merge_linear(model, return_report=True)
    a, b, c = (layer.get_weights() for layer in model.layers)
    (layer,) = merged.layers
    assert (layer.name, layer.activation.__name__) == ("c", "tanh")
    np.testing.assert_allclose(layer.get_weights()[0], a[0] @ b[0] @ c[0], atol=1e-6)
    np.testing.assert_allclose(layer.get_weights()[1], (a[1] @ b[0] + b[1]) @ c[0] + c[1], atol=1e-6)
    assert report.merged == {"c": ("a", "b", "c")}
    assert (report.macs, report.macs_after) == (32 + 48 + 18, 12)
    assert (report.parameters, report.parameters_after) == (model.count_params(), 15)
    assert "a, b, c" in str(report)
    assert "MACs 98 -> 12" in str(report)


MERGED = {
    "conv, 1x1": (lambda x: L.Conv2D(3, 1, use_bias=False)(L.Conv2D(8, 3, strides=2, padding="same")(x)), "Conv2D", (3, 3)),
    "conv, dense": (lambda x: L.Dense(3, "relu")(L.Conv2D(8, 3)(x)), "Conv2D", (3, 3)),
    "1x1, conv": (lambda x: L.Conv2D(3, 3, activation="relu")(L.Conv2D(8, 1)(x)), "Conv2D", (3, 3)),
    "1x1 without bias, padded": (lambda x: L.Conv2D(3, 3, padding="same")(L.Conv2D(8, 1, use_bias=False)(x)), "Conv2D", (3, 3)),
    "dense, dilated": (lambda x: L.Conv2D(3, 3, dilation_rate=2, use_bias=False)(L.Dense(8)(x)), "Conv2D", (3, 3)),
    "dense, 1x1": (lambda x: L.Conv2D(3, 1)(L.Dense(8)(x)), "Conv2D", (1, 1)),
    "1x1, dense": (lambda x: L.Dense(3)(L.Conv2D(8, 1)(x)), "Dense", None),
    "identity between": (lambda x: L.Dense(3)(L.Identity()(L.Activation("linear")(L.Dense(8)(x)))), "Dense", None),
    "norm, conv": (lambda x: L.Conv2D(6, 3, groups=2, activation="relu")(L.BatchNormalization()(x)), "Conv2D", (3, 3)),
    "norm, depthwise": (lambda x: L.DepthwiseConv2D(3, depth_multiplier=2)(L.BatchNormalization()(x)), "DepthwiseConv2D", (3, 3)),
    "norm, separable": (
        lambda x: L.SeparableConv2D(5, 3, depth_multiplier=2)(L.BatchNormalization()(x)),
        "SeparableConv2D",
        (3, 3),
    ),
    "norm, dense": (lambda x: L.Dense(3, use_bias=False)(L.BatchNormalization()(x)), "Dense", None),
    "norm, strided 1x1": (lambda x: L.Conv2D(3, 1, strides=2, padding="same")(L.BatchNormalization()(x)), "Conv2D", (1, 1)),
    "all of it": (
        lambda x: L.BatchNormalization()(L.Dense(3)(L.Conv2D(8, 3)(L.Conv2D(6, 1)(L.BatchNormalization()(x))))),
        "Conv2D",
        (3, 3),
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_consecutive_linear_layers_become_one(name):
    layers, kind, window = MERGED[name]
    model = model_of(layers)
    merged = merge_linear(model)
    (layer,) = merged.layers[1:]
    assert (type(layer).__name__, getattr(layer, "kernel_size", None)) == (kind, window)
    x = networks.inputs_for(model)
    close(merged(x), model(x))


STAYING = {
    "activation": lambda x: L.Dense(3)(L.Dense(8, "relu")(x)),
    "dropout": lambda x: L.Dense(3)(L.Dropout(0.5)(L.Dense(8)(x))),
    "padded": lambda x: L.Conv2D(3, 3, padding="same")(L.Conv2D(8, 1)(x)),
    "norm, padded": lambda x: L.Conv2D(3, 3, padding="same")(L.BatchNormalization()(x)),
    "strided 1x1": lambda x: L.Conv2D(3, 1, strides=2)(L.Conv2D(8, 3)(x)),
    "two windows": lambda x: L.Conv2D(3, 3)(L.Conv2D(8, 3)(x)),
    "groups": lambda x: L.Conv2D(4, 1, groups=2)(L.Conv2D(8, 3)(x)),
    "flatten": lambda x: L.Dense(3)(L.Flatten()(L.Conv2D(2, 1)(x))),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_would_not_be_the_same_stays(name):
    model = model_of(STAYING[name])
    merged, report = merge_linear(model, return_report=True)
    assert [type(layer) for layer in merged.layers] == [type(layer) for layer in model.layers]
    assert report.merged == {}
    x = networks.inputs_for(model)
    close(merged(x), model(x), 1e-6)


def test_a_norm_without_shift_goes_into_a_padded_convolution():
    model = model_of(lambda x: L.Conv2D(3, 3, padding="same", use_bias=False, name="conv")(L.BatchNormalization(name="norm")(x)))
    norm = model.get_layer("norm")
    norm.moving_mean.assign(np.zeros(4))
    norm.beta.assign(np.zeros(4))
    merged = merge_linear(model)
    assert names(merged) == ["conv"]
    assert not merged.get_layer("conv").use_bias
    x = networks.inputs_for(model)
    close(merged(x), model(x))


def test_a_bottleneck_stays_unless_one_asks():
    model = model_of(lambda x: L.Dense(12, name="out")(L.Dense(2, name="narrow")(x)), (10,))
    merged, report = merge_linear(model, return_report=True)
    assert names(merged) == ["narrow", "out"]
    assert report.kept == {"out": "one layer would take 120 multiply-accumulates, both take 44"}
    large = merge_linear(model, if_larger=True)
    assert names(large) == ["out"]
    x = networks.inputs_for(model)
    close(large(x), model(x))


def test_the_saving_counts_positions():
    """A strided convolution after a wide 1x1 one: fewer weights apart, fewer multiply-accumulates together."""
    model = model_of(lambda x: L.Conv2D(2, 2, strides=2, name="b")(L.Conv2D(3, 1, name="a")(x)), (8, 8, 6))
    merged, report = merge_linear(model, return_report=True)
    assert (report.macs, report.macs_after) == (64 * 18 + 16 * 24, 16 * 48)
    x = networks.inputs_for(model)
    close(merged(x), model(x))


def test_nested_models_are_merged_inside_and_stay_nested():
    a = keras.Input((6, 6, 4))
    inner = keras.Model(a, L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(5, 3, name="conv")(a))), name="inner")
    chain = keras.Sequential([keras.Input((4, 4, 5)), L.Dense(9, name="wide"), L.Dense(2, name="out")], name="chain")
    model = model_of(lambda x: L.Add()([chain(inner(x)), chain(inner(L.ReLU()(x)))]), (6, 6, 4))
    merged, report = merge_linear(model, return_report=True)
    assert report.merged == {"inner/conv": ("inner/conv", "inner/norm"), "chain/out": ("chain/wide", "chain/out")}
    assert names(merged.get_layer("inner")) == [name for name in names(inner) if name != "norm"]
    assert names(merged.get_layer("chain")) == ["out"]
    x = networks.inputs_for(model)
    close(merged(x), model(x))


def test_in_mixed_precision_the_weights_are_computed_in_full():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = model_of(lambda x: L.Dense(3, dtype="float32")(L.ReLU()(L.BatchNormalization()(L.Conv2D(5, 3)(x)))))
    finally:
        keras.config.set_dtype_policy("float32")
    folded = fold_batch_norm(model)
    layer = folded.layers[1]
    assert (layer.compute_dtype, layer.kernel.dtype) == ("float16", "float32")
    norm = model.layers[2]
    s = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance, "float64") + norm.epsilon)
    np.testing.assert_allclose(np.asarray(layer.kernel), np.asarray(model.layers[1].kernel) * s, rtol=1e-6)
    x = networks.inputs_for(model)
    close(folded(x), model(x), 1e-2)


def test_the_result_saves_loads_and_trains(tmp_path):
    model = model_of(lambda x: L.Dense(2, name="head")(L.Flatten()(L.BatchNormalization()(L.Conv2D(3, 3, name="conv")(x)))))
    model.get_layer("conv").trainable = False
    folded = fold_batch_norm(model)
    assert [layer.trainable for layer in folded.layers[1:]] == [False, True, True]
    x = networks.inputs_for(model)
    folded.save(tmp_path / "folded.keras")
    close(keras.models.load_model(tmp_path / "folded.keras")(x), model(x))
    folded.compile("sgd", "mse")
    kernel = np.asarray(folded.get_layer("head").kernel).copy()
    folded.fit(x, np.zeros((5, 2)), verbose=0)
    assert np.any(np.asarray(folded.get_layer("head").kernel) != kernel)


def test_a_distiller_gives_its_student():
    model = model_of(lambda x: L.BatchNormalization()(L.Dense(3)(x)), (4,))
    distiller = keras_kd.Distiller(model_of(lambda x: L.Dense(3)(x), (4,)), model)
    assert norms(fold_batch_norm(distiller)) == 0


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: model=3"):
        fold_batch_norm(3)
    with pytest.raises(ValueError, match="`model` must be built"):
        merge_linear(keras.Sequential([L.Dense(3)]))
    with pytest.raises(TypeError, match="`if_larger` must be True or False. Received: if_larger='yes'"):
        merge_linear(model_of(lambda x: L.Dense(3)(x), (4,)), if_larger="yes")
