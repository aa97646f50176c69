"""What a review found in quantization and export: each of these was wrong once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kd
from keras_kd import callbacks, export

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 8)).astype("float32"), RNG.integers(0, 3, size=64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def net(*parts, shape=(8,)):
    return keras.Sequential([keras.Input(shape), *parts])


def test_a_softmax_head_learns_from_a_confident_mistake():
    model = net(layers.Dense(3, activation="softmax", bias_initializer=keras.initializers.Constant([12.0, 0.0, 0.0])))
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
    history = model.fit(X, np.ones(64, int), epochs=20, verbose=0, callbacks=[callbacks.Quantization()]).history
    assert history["loss"][-1] < 0.2 * history["loss"][0]


def test_distilling_into_a_softmax_head_goes_on_under_rounding():
    keras.utils.set_random_seed(0)
    teacher = net(layers.Dense(16, activation="relu"), layers.Dense(3, kernel_initializer="random_normal"))
    student = net(layers.Dense(16, activation="relu"), layers.Dense(3, activation="softmax"))
    distiller = keras_kd.Distiller(teacher, student)
    distiller.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    history = distiller.fit(X, Y, epochs=15, verbose=0, callbacks=[callbacks.Quantization()]).history
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_layer_that_gives_nothing_but_zeros_harms_nothing(jit_compile, tmp_path):
    model = net(layers.Dense(8, activation="relu", bias_initializer=keras.initializers.Constant(-100.0)), layers.Dense(3))
    model.compile("sgd", LOSS, jit_compile=jit_compile)
    quantization = callbacks.Quantization()
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[quantization]).history
    assert np.all(np.isfinite(history["loss"]))
    report = export.to_litert(quantization.quantized_model(), tmp_path / "m.tflite", quantization="int8")
    assert report.max_difference < 0.05


def test_an_overflow_does_not_stay_in_the_ranges():
    model = net(layers.Dense(8, activation="relu"), layers.Dense(3))
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    quantization = callbacks.Quantization()
    x = X.copy()
    x[20] = np.inf
    model.fit(x, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[quantization])
    assert np.all(np.isfinite(list(quantization.activation_ranges().values())))


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_adapted_layers_are_exported_from_other_precisions(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        scale = layers.Normalization()
        scale.adapt(X * 3 + 5)
        model = net(scale, layers.Dense(3))
    finally:
        keras.config.set_dtype_policy("float32")
    report = export.to_litert(model, tmp_path / "m.tflite", check_data=X * 3 + 5)
    np.testing.assert_allclose(export.run_litert(report.path, X * 3 + 5)[0], model.predict(X * 3 + 5, verbose=0), atol=0.02)


class Standardised(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        kernel = (kernel - keras.ops.mean(kernel)) / keras.ops.std(kernel)
        return super().convolution_op(inputs, kernel)


@pytest.mark.filterwarnings("ignore:These stay in float")
def test_a_convolution_of_the_users_own_stays_as_it_is():
    model = net(Standardised(3, 3, name="own"), layers.Flatten(), layers.Dense(3), shape=(6, 6, 2))
    x = RNG.normal(size=(32, 6, 6, 2)).astype("float32")
    quantization = callbacks.Quantization(num_bits=16, activation_bits=16, calibration_data=x)
    quantized = quantization.quantize(model)
    np.testing.assert_allclose(quantized.predict(x, verbose=0), model.predict(x, verbose=0), atol=0.01)
    assert quantized.plan.floats == ["own (Standardised)"]


def test_activations_that_are_layers_do_not_keep_a_layer_in_float(tmp_path):
    model = net(layers.Dense(8, activation=layers.ReLU(), name="d"), layers.Dense(3, name="h"))
    quantized = callbacks.Quantization(calibration_data=X).quantize(model)
    assert quantized.plan.bits == {"d": 8, "h": 8}
    assert export.to_litert(quantized, tmp_path / "m.tflite", check_data=X).float_operators == ()


def test_a_dense_layer_with_a_bias_on_sequences_is_integers(tmp_path):
    bias = keras.initializers.RandomNormal(seed=0)
    model = net(layers.Dense(8, activation="relu", bias_initializer=bias), layers.Flatten(), layers.Dense(3), shape=(4, 2))
    x = X.reshape(64, 4, 2)
    quantized = callbacks.Quantization(calibration_data=x).quantize(model)
    assert export.to_litert(quantized, tmp_path / "m.tflite", quantization="int8", check_data=x).float_operators == ()


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_representative_data_may_be_of_another_type(dtype, tmp_path):
    model = net(layers.Dense(3))
    data = (X * 10).astype(dtype)
    report = export.to_litert(model, tmp_path / "m.tflite", representative_data=data, min_agreement=0.5)
    assert report.quantization == "int8"


def test_fully_convolutional_models_are_exported(tmp_path):
    model = net(layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(3), shape=(None, None, 4))
    report = export.to_litert(model, tmp_path / "m.tflite")
    assert "CONV_2D" in report.operators


def test_weights_of_a_plain_model_are_loaded_inside_a_fit_that_rounds(tmp_path):
    model = net(layers.Dense(3))
    model.compile("sgd", LOSS)
    model.save_weights(tmp_path / "plain.weights.h5")

    class Load(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.load_weights(tmp_path / "plain.weights.h5")

    quantization = callbacks.Quantization()
    model.fit(X, Y, verbose=0, callbacks=[quantization, Load()])
    assert quantization.quantized_model()(X[:2]).shape == (2, 3)


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = layers.Dense(3, name="d")

    def call(self, x):
        return self.d(inputs=tf.nn.relu(x))


@pytest.mark.filterwarnings("ignore:These stay in float")  # the ReLU of the input
def test_layers_that_are_called_with_keywords_are_rounded():
    model = Named()
    model(X)
    model.compile("sgd", LOSS)
    quantization = callbacks.Quantization()
    model.fit(X, Y, verbose=0, callbacks=[quantization])
    assert list(quantization.activation_ranges()) == ["input 0 of d", "d"]


def test_quantising_again_measures_again():
    model, quantization = net(layers.Dense(3)), callbacks.Quantization(calibration_data=X)
    quantization.quantize(model)
    model.layers[0].kernel.assign(10 * model.layers[0].kernel)
    again, fresh = quantization.quantize(model), callbacks.Quantization(calibration_data=X).quantize(model)
    np.testing.assert_array_equal(again(X), fresh(X))


def test_a_calibration_that_failed_is_not_taken_for_one():
    model, data = net(layers.Dense(3)), X.copy()
    model.compile("sgd", LOSS)
    data[40] = np.nan
    quantization = callbacks.Quantization(calibration_data=data)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be finite"):
            model.fit(X, Y, verbose=0, callbacks=[quantization])


def test_bits_and_steps_may_be_numpys_integers():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="d")])
    callback = keras_kd.callbacks.Quantization({"d": np.int64(4)}, activation_bits=np.int32(8), start_step=np.int64(0))
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[callback])
    assert callback.quantized_model().plan.bits == {"d": 4}
