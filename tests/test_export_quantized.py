"""Files of integers: what can be quantised becomes integers that give what training saw; a file is as asked for, or not there."""

import dataclasses
import os
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import _litert, callbacks, export

RNG = np.random.default_rng(0)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def image_net(*parts, shape=(12, 12, 3)):
    return keras.Sequential([keras.Input(shape), *parts, layers.Flatten(), layers.Dense(4, name="head")])


def conv(x, filters, size=3, relu=True, **options):
    x = layers.Conv2D(filters, size, padding="same", use_bias=False, **options)(x)
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x) if relu else x


def residual():
    inputs = keras.Input((12, 12, 3))
    x = conv(inputs, 8, strides=2)
    x = layers.ReLU()(layers.Add()([x, conv(conv(x, 8), 8, relu=False)]))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = conv(layers.ReLU(6.0)(layers.BatchNormalization()(x)), 12, size=1)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def branches():
    inputs = keras.Input((12, 12, 3))
    pooled = layers.MaxPooling2D(3, 1, "same")(inputs)
    x = layers.Concatenate()([conv(inputs, 8), conv(inputs, 8, size=1), pooled])
    x = layers.AveragePooling2D(2)(x)
    x = layers.Flatten()(x + conv(x, 19))
    return keras.Model(inputs, layers.Dense(4, activation="softmax")(layers.Dropout(0.3)(x)))


def dense_net():
    inputs = keras.Input((8, 8, 3))
    x = conv(inputs, 4)
    x = layers.Concatenate()([x, conv(x, 4)])
    x = layers.Concatenate()([x, conv(x, 4)])
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def squeeze_and_excitation():
    inputs = keras.Input((12, 12, 3))
    x = conv(inputs, 8)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(4, 1, activation="silu")(gate))
    x = layers.LeakyReLU()(layers.BatchNormalization()(layers.Multiply()([x, gate])))
    x = layers.UpSampling2D(2)(layers.SeparableConv2D(8, 3, activation="hard_silu")(x))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2DTranspose(6, 3, strides=2)(x)))
    x = layers.Activation("gelu")(layers.BatchNormalization()(layers.Dense(8)(layers.GlobalMaxPooling2D()(x))))
    return keras.Model(inputs, layers.Dense(4)(x))


def one_axis():
    return image_net(
        layers.Conv1D(8, 3, padding="causal", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.SeparableConv1D(8, 3, padding="same", dilation_rate=2),
        layers.BatchNormalization(),
        layers.Activation("tanh"),
        layers.DepthwiseConv1D(3, strides=2),
        layers.Conv1DTranspose(4, 3, strides=2),
        layers.AveragePooling1D(2),
        shape=(16, 3),
    )


def several_inputs():
    shared, a, b = layers.Dense(8, activation="relu"), keras.Input((8,), name="a"), keras.Input((5,), name="b")
    x = layers.Maximum()([shared(shared(a)), layers.Dense(8, activation="tanh")(b)])
    return keras.Model([a, b], layers.Dense(4)(layers.EinsumDense("ab,bc->ac", 6, bias_axes="c", activation="relu")(x)))


def nested():
    inner = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU()])
    return image_net(layers.Rescaling(0.5, offset=0.1), inner, layers.Conv2D(8, 3, 2), layers.PReLU(shared_axes=[1, 2]))


NETS = [residual, branches, dense_net, squeeze_and_excitation, one_axis, several_inputs, nested]


def data_for(model, count=256):
    arrays = [RNG.normal(size=(count, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def trained(model, x, **options):
    logits = (
        LOSS
        if getattr(model.layers[-1], "activation", None) is not keras.activations.softmax
        else "sparse_categorical_crossentropy"
    )
    model.compile(keras.optimizers.Adam(3e-3), logits)
    quantization = callbacks.Quantization(**options)
    y = np.abs(keras.tree.flatten(x)[0].reshape(256, -1)[:, :4]).argmax(-1)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[quantization])
    return quantization


@pytest.mark.parametrize("make", NETS)
def test_a_trained_net_becomes_a_file_of_integers_that_computes_the_same(make, tmp_path):
    keras.utils.set_random_seed(0)
    model = make()
    x = data_for(model)
    quantized = trained(model, x).quantized_model()
    report = export.to_litert(quantized, tmp_path / "m.tflite", quantization="int8", check_data=x)
    assert report.float_operators == ()
    assert report.quantization == "int8"
    outputs = quantized.predict(x, verbose=0)
    (found,) = export.run_litert(report.path, x)
    steps = np.abs(found - outputs) / (np.ptp(outputs) / 255)
    assert np.mean(steps) < 2
    assert report.agreement > 0.97
    assert {"BATCH_NORM", "RSQRT", "SUB"}.isdisjoint(report.operators)


def test_batch_normalisation_and_relu_disappear_into_the_convolution(tmp_path):
    model = residual()
    x = data_for(model)
    report = export.to_litert(trained(model, x).quantized_model(), tmp_path / "m.tflite", check_data=x)
    assert report.operators == {
        "QUANTIZE": 1,
        "DEQUANTIZE": 1,
        "CONV_2D": 4,
        "DEPTHWISE_CONV_2D": 1,
        "ADD": 1,
        "MEAN": 1,
        "FULLY_CONNECTED": 1,
    }


@pytest.mark.parametrize("layer", [layers.DepthwiseConv2D(3), layers.Conv2D(3, 3)], ids=lambda layer: type(layer).__name__)
def test_a_channel_without_weights_keeps_its_bias(layer, tmp_path):
    model = image_net(type(layer).from_config(layer.get_config()), layers.ReLU())
    x = data_for(model)
    kernel = model.layers[0].kernel.numpy()
    kernel[:, :, 1 if kernel.shape[-1] == 1 else slice(None), 1 if kernel.shape[-1] > 1 else slice(None)] = 0
    model.layers[0].kernel.assign(kernel)
    model.layers[0].bias.assign([0.1, 0.7, 0.2])
    quantized = callbacks.Quantization(calibration_data=x).quantize(model)
    report = export.to_litert(quantized, tmp_path / "m.tflite", check_data=x)
    assert report.max_difference < 2.5 * np.ptp(quantized.predict(x, verbose=0)) / 255


def test_the_plain_student_is_exported_with_the_ranges_it_was_trained_with_until_it_changes(tmp_path):
    model = image_net(layers.Conv2D(4, 3, activation="relu"))
    x = data_for(model)
    quantized = trained(model, x).quantized_model()
    report = export.to_litert(keras_kd.Distiller(image_net(), model), tmp_path / "m.tflite", check_data=x)
    assert report.quantization == "int8"
    (found,) = export.run_litert(report.path, x)
    np.testing.assert_allclose(found, quantized.predict(x, verbose=0), atol=2 * np.ptp(found) / 255)
    model.get_layer("head").bias.assign_add([1.0, 0, 0, 0])
    assert export.to_litert(model, tmp_path / "m.tflite").quantization == "float32"


@pytest.mark.parametrize("io_dtype", ["int8", "uint8"])
def test_inputs_and_outputs_may_be_integers(io_dtype, tmp_path):
    model = image_net(layers.Conv2D(4, 3, activation="relu"))
    x = data_for(model)
    quantized = trained(model, x).quantized_model()
    report = export.to_litert(quantized, tmp_path / "m.tflite", io_dtype=io_dtype, check_data=x)
    assert report.input_dtypes == report.output_dtypes == (io_dtype,)
    assert set(report.operators) <= {"CONV_2D", "SHAPE", "STRIDED_SLICE", "PACK", "RESHAPE", "FULLY_CONNECTED", "QUANTIZE"}
    assert report.agreement > 0.98


@pytest.mark.parametrize(("quantization", "largest"), [("float16", 0.6), ("dynamic", 0.4), ("int8", 0.4), ("int4", 0.25)])
def test_a_plain_model_is_quantised_after_training(quantization, largest, tmp_path):
    model = image_net(layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu"))
    x = data_for(model)
    whole = export.to_litert(model, tmp_path / "m.tflite").size
    data = {"representative_data": x} if quantization.startswith("int") else {"check_data": x}
    report = export.to_litert(model, tmp_path / "q.tflite", quantization=quantization, min_agreement=0.5, **data)
    assert report.quantization == quantization
    assert report.size < largest * whole
    assert report.samples == 256
    assert export.to_litert(model, tmp_path / "a.tflite", representative_data=x).quantization == "int8"


def test_kernels_of_4_bits_with_many_zeros_stay_whole(tmp_path):
    model = image_net(layers.Conv2D(8, 3, activation="relu"))
    x = data_for(model)
    kernel = model.layers[0].kernel
    kernel.assign(np.where(np.abs(kernel) < 0.1, 0, kernel))
    head = model.get_layer("head").kernel
    head.assign(np.where(np.abs(head) < 0.05, 0, head))
    options = {"quantization": "int4", "representative_data": x, "min_agreement": 0.0, "tolerance": 9}
    report = export.to_litert(model, tmp_path / "m.tflite", **options)  # the converter would end the process
    assert (report.sparse, report.quantization) == (False, "int4")
    with pytest.raises(ValueError, match='`sparse` must be False or "auto" for kernels of 4 bits'):
        export.to_litert(model, tmp_path / "m.tflite", sparse=True, **options)


@pytest.mark.filterwarnings("ignore:These stay in float")
def test_recurrent_layers_stay_in_float_in_a_file_that_is_quantised_after_training(tmp_path):
    model = keras.Sequential([keras.Input((6, 3)), layers.LSTM(4), layers.Dense(4)])
    x = RNG.normal(size=(64, 6, 3)).astype("float32")
    report = export.to_litert(model, tmp_path / "m.tflite", representative_data=x, min_agreement=0.5)
    assert report.quantization == "int8"
    assert "FULLY_CONNECTED" in report.operators
    assert report.float_operators
    with pytest.raises(RuntimeError, match="Not all of the file is integers"):
        export.to_litert(model, tmp_path / "m.tflite", quantization="int8", representative_data=x)


def test_four_bits_and_kernels_alone(tmp_path):
    sizes = {}
    for name, options in {"8": {}, "4": {"num_bits": 4}, "kernels": {"activation_bits": None}}.items():
        model = image_net(layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(32, 3, activation="relu"))
        x = data_for(model)
        quantized = trained(model, x, **options).quantized_model()
        report = export.to_litert(quantized, tmp_path / "m.tflite", check_data=x)
        sizes[name] = report.size
        assert report.quantization == {"8": "int8", "4": "int4", "kernels": "dynamic"}[name]
        assert report.agreement > 0.95
    assert sizes["4"] < 0.65 * sizes["8"]
    assert sizes["kernels"] < 1.2 * sizes["8"]


def test_zeros_make_a_float_file_smaller_and_are_counted(tmp_path):
    model = image_net(layers.Dense(200), layers.Dense(200), shape=(40,))
    model.compile("adam", LOSS)
    x = RNG.normal(size=(64, 40)).astype("float32")
    logged = model.fit(x, np.arange(64) % 4, verbose=0, callbacks=[callbacks.Pruning(0.9)]).history["sparsity"][-1]
    dense = export.to_litert(model, tmp_path / "d.tflite", sparse=False)
    auto = export.to_litert(model, tmp_path / "s.tflite", check_data=x)
    assert (dense.sparse, auto.sparse) == (False, True)
    assert auto.size < 0.6 * dense.size
    assert auto.agreement == 1.0
    assert auto.sparsity == dense.sparsity == logged == pytest.approx(0.9, abs=0.01)
    assert str(dense).endswith(f"; zeros in kernels: {logged:.1%}, stored like other weights: they help after gzip only")
    assert str(auto).endswith(f"; zeros in kernels: {logged:.1%}")
    assert str(dataclasses.replace(dense, sparsity=0.3)).endswith("; zeros in kernels: 30.0%")
    quantized = callbacks.Quantization(calibration_data=x).quantize(model)
    assert export.to_litert(quantized, tmp_path / "q.tflite", check_data=x).sparsity == logged
    never_pruned = export.to_litert(image_net(layers.Dense(200), shape=(40,)), tmp_path / "f.tflite")
    assert (never_pruned.sparsity, "zeros" in str(never_pruned)) == (0.0, False)


def test_integers_without_a_sparse_kernel_are_refused_by_sparse(tmp_path):
    model = image_net(layers.Dense(64, activation="relu"), shape=(32,))
    kernel = model.layers[0].kernel
    kernel.assign(np.where(RNG.random(kernel.shape) < 0.8, 0, kernel))
    x = RNG.normal(size=(64, 32)).astype("float32")
    options = {"quantization": "int8", "representative_data": x}
    with pytest.raises(RuntimeError, match='`sparse` must be "auto" or False.*Received: sparse=True') as caught:
        export.to_litert(model, tmp_path / "m.tflite", sparse=True, **options)
    assert "failed to" in str(caught.value.__cause__)
    assert os.listdir(tmp_path) == []
    assert not export.to_litert(model, tmp_path / "m.tflite", **options).sparse


def test_a_file_that_fails_with_its_zeros_too_is_not_laid_to_sparse(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no kernel at all")

    monkeypatch.setattr(export.litert, "run_litert", fails)
    with pytest.raises(RuntimeError, match=r"^no kernel at all"):
        export.to_litert(image_net(layers.Dense(8), shape=(4,)), tmp_path / "m.tflite", sparse=True)


def test_ranges_that_saving_has_lost_are_said(tmp_path):
    model = image_net(layers.Dense(8), shape=(6,))
    trained(model, RNG.normal(size=(256, 6)).astype("float32"))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"`model.save` writes has no ranges.*Save `quantization.quantized_model\(\)` instead"):
        export.to_litert(keras.models.load_model(tmp_path / "m.keras"), tmp_path / "m.tflite", quantization="int8")
    with pytest.raises(ValueError, match='callbacks.Quantization. Received: the plain model "[^"]*".$'):
        export.to_litert(model, tmp_path / "m.tflite", quantization="int4")  # which has its ranges, for 8 bits


def test_layers_that_stay_in_float_are_allowed_by_auto_and_refused_by_int8(tmp_path):
    model = image_net(layers.Dense(8, activation="elu"), shape=(6,))
    x = RNG.normal(size=(256, 6)).astype("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = trained(model, x).quantized_model()
    assert export.to_litert(quantized, tmp_path / "m.tflite", check_data=x).float_operators == ("ELU",)
    with pytest.raises(RuntimeError, match="Not all of the file is integers: ELU compute on floats"):
        export.to_litert(quantized, tmp_path / "n.tflite", quantization="int8")
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_a_file_that_agrees_too_rarely_is_refused(tmp_path, monkeypatch):
    model = image_net(layers.Conv2D(4, 3))
    x = data_for(model)
    quantized = trained(model, x, num_bits=4).quantized_model()
    right = export.run_litert
    monkeypatch.setattr(export.litert, "run_litert", lambda *args: [-output for output in right(*args)])
    with pytest.raises(RuntimeError, match="min_agreement=0.8"):
        export.to_litert(quantized, tmp_path / "m.tflite", check_data=x, min_agreement=0.8, tolerance=10)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int7"}, "`quantization` must be one of auto, float32"),
        ({"io_dtype": "int16"}, "`io_dtype` must be one of float32, int8, uint8"),
        ({"io_dtype": "int8"}, '`io_dtype` must be "float32" for a file of floats'),
        ({"sparse": 3}, '`sparse` must be True, False or "auto"'),
        ({"quantization": "int8"}, 'quantization="int8" needs `representative_data`'),
        ({"quantization": "int4"}, 'quantization="int4" needs `representative_data`'),
        ({"representative_data": np.empty((0, 12, 12, 3))}, "`representative_data` must be an array"),
    ],
)
def test_bad_arguments_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.to_litert(image_net(layers.Conv2D(4, 3)), tmp_path / "m.tflite", **options)
    assert os.listdir(tmp_path) == []


def test_bits_that_litert_does_not_have_are_named(tmp_path):
    model = image_net(layers.Conv2D(4, 3))
    x = data_for(model)
    with pytest.raises(ValueError, match="kernels of 12 bits and activations of 8"):
        export.to_litert(trained(model, x, num_bits=12).quantized_model(), tmp_path / "m.tflite")
    model = image_net(layers.Conv2D(4, 3))
    with pytest.raises(ValueError, match=r'makes a file of int8. Received: quantization="int4"'):
        export.to_litert(trained(model, x).quantized_model(), tmp_path / "m.tflite", quantization="int4")


def test_mixed_precision_is_exported_in_integers(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = image_net(layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU())
    finally:
        keras.config.set_dtype_policy("float32")
    x = data_for(model)
    report = export.to_litert(trained(model, x).quantized_model(), tmp_path / "m.tflite", quantization="int8", check_data=x)
    assert report.agreement > 0.95


@pytest.mark.parametrize("make", [lambda: image_net(layers.Conv2D(4, 3, activation="relu")), several_inputs])
def test_keras_own_export_takes_a_quantised_model(make, tmp_path):
    model = make()
    x = data_for(model)
    quantized = callbacks.Quantization(calibration_data=x).quantize(model)
    quantized.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(x), quantized.predict(x, verbose=0), atol=1e-5)


@pytest.mark.skipif(keras.__version__ < "3.13", reason="Keras 3.12 exports no LiteRT files")
def test_keras_own_export_to_litert_takes_a_quantised_model(tmp_path):
    model = image_net(layers.Conv2D(4, 3, activation="relu"))
    quantized = callbacks.Quantization(calibration_data=data_for(model)).quantize(model)
    quantized.export(tmp_path / "m.tflite", format="litert", verbose=False, optimizations=[tf.lite.Optimize.DEFAULT])
    assert _litert.operators((tmp_path / "m.tflite").read_bytes())[1] == ()


@pytest.mark.parametrize("quantized", [False, True])
def test_onnx_files_compute_what_the_model_computes(quantized, tmp_path):
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    model = image_net(layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU())
    x = data_for(model)
    model = trained(model, x).quantized_model() if quantized else model
    report = export.to_onnx(model, tmp_path / "m.onnx", check_data=x, tolerance=0.1 if quantized else 1e-3)
    assert report.agreement > 0.95
    assert ("QuantizeLinear" in report.operators) == quantized
