"""What a review found in files and their checks: each of these was wrong once."""

import logging
import os
import pathlib
import resource
import stat

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import _agreement, _files, _litert, callbacks, export, profile

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(300, 8)).astype("float32"), RNG.integers(0, 3, size=300)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def net(*parts, shape=(8,), **options):
    return keras.Sequential([keras.Input(shape, **options), *(parts or [layers.Dense(16, activation="relu"), layers.Dense(3)])])


def two_inputs(struct=list):
    a, b = keras.Input((8,), name="a"), keras.Input((4,), name="b")
    inputs = {"a": a, "b": b} if struct is dict else [a, b]
    return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()([a, b])))


def far_from_float(model):
    """Outputs that change much when kernels have 4 bits."""
    model.layers[0].kernel.assign(RNG.normal(size=(8, 16)) ** 3)
    return model


# What the file is compared with


@pytest.mark.filterwarnings("ignore:These stay in float")  # of the recurrent one
@pytest.mark.parametrize("how", ["after training", "trained", "recurrent"])
def test_a_plain_model_is_told_how_far_its_file_is_from_itself(how, tmp_path):
    x, options = X, {"representative_data": X, "quantization": "int4"}
    model = far_from_float(net())
    if how == "trained":
        model.compile("sgd", LOSS)
        model.fit(X, Y, verbose=0, callbacks=[callbacks.Quantization(4)])
        options = {"check_data": X}
    elif how == "recurrent":
        model, x = net(layers.LSTM(4), layers.Dense(4), shape=(8, 1)), X[:64, :, None]
        options = {"representative_data": x}
    report = export.to_litert(model, tmp_path / "m.tflite", **options)
    (found,), own = export.run_litert(report.path, x), model.predict(x, verbose=0)
    assert report.float_difference == pytest.approx(np.max(np.abs(found - own)), rel=1e-4)
    assert report.float_agreement == np.mean(found.argmax(-1) == own.argmax(-1))
    assert report.float_difference > report.max_difference


def test_where_the_file_should_equal_the_model_both_comparisons_are_one(tmp_path):
    model = net()
    report = export.to_litert(model, tmp_path / "m.tflite")
    assert (report.float_difference, report.float_agreement) == (report.max_difference, report.agreement)
    quantized = callbacks.Quantization(calibration_data=X).quantize(model)
    report = export.to_litert(quantized, tmp_path / "m.tflite")
    assert (report.float_difference, report.float_agreement) == (None, None)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_errors_of_small_outputs_are_seen_as_those_of_large_ones(scale, tmp_path, monkeypatch):
    model = net(layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(0, scale)))
    right = export.run_litert
    monkeypatch.setattr(export.litert, "run_litert", lambda *args: [output * 1.05 for output in right(*args)])
    with pytest.raises(RuntimeError, match="0.05 of them"):
        export.to_litert(model, tmp_path / "m.tflite")
    assert os.listdir(tmp_path) == []


def test_each_output_is_compared_in_its_own_scale():
    large, small = np.full((4, 3), 100.0), np.full((4, 3), 1e-3)
    with pytest.raises(RuntimeError, match="does not compute"):
        _agreement.check_close([large, small], [large, 2 * small], 0.1, "`check_data`")


@pytest.mark.parametrize("options", [{}, {"representative_data": X}, {"quantization": "float16"}])
def test_outputs_that_are_all_zero_are_no_error(options, tmp_path):
    model = net(layers.Dense(3, kernel_initializer="zeros"))
    assert export.to_litert(model, tmp_path / "m.tflite", **options).max_difference < 1e-6


def test_outputs_far_below_the_range_of_the_integers_are_compared_in_steps_of_it(tmp_path):
    model = net(layers.Dense(1, activation="sigmoid", bias_initializer=keras.initializers.Constant(-4.0)))
    quantized = callbacks.Quantization(calibration_data=X).quantize(model)
    small = np.zeros((16, 8), "float32")
    assert quantized.predict(small, verbose=0).max() < 0.03  # a few steps of 1/256
    assert export.to_litert(quantized, tmp_path / "m.tflite", check_data=small).max_difference <= 2 / 256


def test_outputs_of_another_shape_are_no_agreement():
    with pytest.raises(RuntimeError, match="outputs of shapes"):
        _agreement.compare([np.zeros((2, 3))], [np.zeros((2, 1))])


def test_four_bits_without_training_must_agree_with_the_plain_model_too(tmp_path, monkeypatch):
    model = far_from_float(net())
    options = {"representative_data": X, "quantization": "int4"}
    report = export.to_litert(model, tmp_path / "m.tflite", min_agreement=0.0, **options)
    between = (report.float_agreement + report.agreement) / 2
    assert report.float_agreement < between < report.agreement
    with pytest.raises(RuntimeError, match=f"model's class in {report.float_agreement:.1%} of 300 samples"):
        export.to_litert(model, tmp_path / "m.tflite", min_agreement=between, **options)


# Running in parts


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("count", [1, 128, 300])
def test_a_file_is_run_in_parts_that_give_the_same(count, quantized, tmp_path):
    model = net()
    path = export.to_litert(model, tmp_path / "m.tflite", representative_data=X if quantized else None).path
    rows = []
    interpreter = export.open_litert(path)
    runner = interpreter.get_signature_runner("serving_default")

    class Counting:
        def __call__(self, **given):
            rows.append(len(given["input_0"]))
            return runner(**given)

        def __getattr__(self, name):
            return getattr(runner, name)

    interpreter.get_signature_runner = lambda name: Counting()
    (found,) = _litert.run(interpreter, [X[:count]])
    (whole,) = _litert.run(export.open_litert(path), [X[:count]], rows=count)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert sum(rows) == count
    assert max(rows) <= 128


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (4, 3), (4, 8), (4, 9)])
@pytest.mark.parametrize("name", ["check_data", "representative_data"])
def test_a_fixed_batch_size_takes_any_number_of_samples(name, batch, count, tmp_path):
    def halves(tensors):
        a, b = tensors
        return keras.ops.reshape(keras.ops.concatenate([a, b], axis=-1), (batch, 12)) + keras.ops.zeros((batch, 12))

    a, b = keras.Input(batch_shape=(batch, 8), name="a"), keras.Input(batch_shape=(batch, 4), name="b")
    model = keras.Model([a, b], layers.Dense(3)(layers.Lambda(halves, output_shape=(12,))([a, b])))
    x = [X[:count], X[:count, :4]]
    report = export.to_litert(model, tmp_path / "m.tflite", **{name: x}, min_agreement=0.0)
    assert report.samples == count
    (found,) = export.run_litert(report.path, x)
    inputs = np.concatenate(x, axis=-1)
    np.testing.assert_allclose(
        found, inputs @ model.layers[-1].kernel.numpy() + model.layers[-1].bias.numpy(), atol=1e-5 if name == "check_data" else 0.1
    )


def test_a_file_of_a_fixed_batch_size_is_profiled(tmp_path):
    model = keras.Sequential([keras.Input(batch_shape=(4, 8)), layers.Dense(3)])
    report = export.to_litert(model, tmp_path / "m.tflite")
    assert export.open_litert(report.path).get_input_details()[0]["shape"].tolist() == [4, 8]
    assert profile.profile(model, report.path, runs=2).latency.median > 0


def test_a_file_says_what_it_takes(tmp_path):
    path = export.to_litert(net(), tmp_path / "m.tflite").path
    for x in (X[:0], X[:, :3], [X, X], [], 3.0):
        with pytest.raises(
            ValueError, match=r"`inputs` must be what the file takes.*1 of shapes \[\(-1, 8\)\].*Received: arrays of"
        ):
            export.run_litert(path, x)
    path = export.to_litert(two_inputs(), tmp_path / "m.tflite").path
    with pytest.raises(ValueError, match="as many samples of each"):
        export.run_litert(path, [X, X[:3, :4]])


# Data


def nan_at(row):
    x = X.copy()
    x[row] = np.nan
    return x


@pytest.mark.parametrize("name", ["check_data", "representative_data"])
@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (two_inputs, [X, X[:100, :4]], "as many samples in each of its arrays. Received: 300, 100"),
        (two_inputs, [X], r"arrays nested as the model takes them \(a, b\).*Received: list of ndarray"),
        (two_inputs, [X[:, :4], X], r"shapes of the inputs of .*, \[\(8,\), \(4,\)\] a sample. Received: \[\(4,\), \(8,\)\]"),
        (two_inputs, {"a": X}, "Received: a dict without b"),
        (two_inputs, {"a": X, "b": X[:, :4], "c": X}, "Received: a dict with c, which are none"),
        (lambda: two_inputs(dict), {"a": X, "B": X[:, :4]}, "a dict without b and with B, which are none"),
        (net, X[:, :5], r"\[\(8,\)\] a sample. Received: \[\(5,\)\]"),
        (net, X[:0], "at least one sample"),
        (net, iter([]), "at least one batch"),
        (net, iter([X[:4], X[:4, :3]]), "batches of the same arrays"),
        (net, tf.data.Dataset.from_tensors(X).repeat(), "end. Received: a data set that repeats"),
        (net, {}, "names of the inputs"),
        (net, [None], "at least one sample"),
        (lambda: net(layers.Embedding(9, 4), layers.Flatten(), dtype="int32"), X, "hold whole numbers of int32"),
    ],
)
def test_data_that_does_not_fit_is_named_before_anything_is_done(make, data, message, name, tmp_path, monkeypatch):
    monkeypatch.setattr(_litert, "convert", lambda *args: pytest.fail("converted"))
    with pytest.raises(ValueError, match=f"`{name}` must.*{message}"):
        export.to_litert(make(), tmp_path / "m.tflite", **{name: data})


def test_words_are_no_numbers(tmp_path):
    with pytest.raises(TypeError, match="`check_data` must hold numbers"):
        export.to_litert(net(), tmp_path / "m.tflite", check_data=np.full((4, 8), "x"))


def test_numbers_that_are_not_finite_are_named_by_their_argument(tmp_path):
    with pytest.raises(ValueError, match="`representative_data` must be finite"):
        export.to_litert(net(), tmp_path / "m.tflite", representative_data=nan_at(40))
    with pytest.raises(ValueError, match="`representative_data` must be finite"):
        export.to_litert(net(), tmp_path / "m.tflite", representative_data=np.full((4, 8), 1e300))
    with pytest.raises(RuntimeError, match="model gives NaN or infinite outputs on `check_data`"):
        export.to_litert(net(layers.Dense(3)), tmp_path / "m.tflite", check_data=nan_at(3))
    broken = net()
    broken.layers[-1].bias.assign([np.nan] * 3)
    with pytest.raises(RuntimeError, match="model gives NaN or infinite outputs on `representative_data`"):
        export.to_litert(broken, tmp_path / "m.tflite", representative_data=X)


def batches():
    return (X[i : i + 60] for i in range(0, 300, 60))


KINDS = {
    "generator": batches,
    "list": lambda: list(batches()),
    "data set": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(64),
    "numbers": X.tolist,
    "tensor": lambda: tf.constant(X),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("check_data", kind) for kind in KINDS), ("representative_data", "generator"), ("representative_data", "data set")],
)
def test_batches_are_taken_from_the_first_to_the_last(name, kind, tmp_path):
    assert export.to_litert(net(), tmp_path / "m.tflite", **{name: KINDS[kind]()}).samples == 300


def test_batches_of_several_inputs_are_joined_by_name(tmp_path):
    data = tf.data.Dataset.from_tensor_slices({"a": X, "b": X[:, :4]}).batch(64)
    for struct in (list, dict):
        assert export.to_litert(two_inputs(struct), tmp_path / "m.tflite", check_data=data).samples == 300


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, x):
        return self.out(x)


def test_a_subclassed_model_takes_streams_and_says_what_it_does_not_take(tmp_path):
    model = Subclassed()
    model(X)
    assert export.to_litert(model, tmp_path / "m.tflite", check_data=batches()).samples == 300
    assert export.to_litert(model, tmp_path / "m.tflite", representative_data=batches()).quantization == "int8"
    with pytest.raises(ValueError, match=r"`check_data` must be inputs of .*join batches"):
        export.to_litert(model, tmp_path / "m.tflite", check_data=list(batches()))
    with pytest.raises(ValueError, match=r"`check_data` must be inputs of .*incompatible"):
        export.to_litert(model, tmp_path / "m.tflite", check_data=X[:, :5])


@pytest.mark.parametrize("dtype", ["int64", "float32", "uint8"])
def test_tokens_of_another_type_are_taken_as_the_models(dtype, tmp_path):
    model = net(layers.Embedding(9, 4), layers.Flatten(), layers.Dense(3), dtype="int32")
    tokens = RNG.integers(0, 9, size=(64, 8)).astype(dtype)
    assert export.to_litert(model, tmp_path / "m.tflite", check_data=tokens).agreement == 1.0
    assert export.to_litert(model, tmp_path / "m.tflite", representative_data=tokens).quantization == "int8"


# What is integers


def around(quantized, *after):
    inputs = keras.Input((8,))
    x = quantized(inputs)
    for layer in after:
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(("options", "mode"), [({}, "int8"), ({"num_bits": 4}, "int4")])
def test_a_model_around_a_quantised_one_becomes_integers(options, mode, tmp_path):
    model = around(callbacks.Quantization(calibration_data=X, **options).quantize(net()))
    for quantization in ("auto", mode):
        report = export.to_litert(model, tmp_path / "m.tflite", quantization=quantization, check_data=X)
        assert (report.quantization, report.float_operators) == (mode, ())
        assert report.operators == {"QUANTIZE": 1, "FULLY_CONNECTED": 2, "DEQUANTIZE": 1}
        assert report.agreement > 0.99
    assert export.to_litert(model, tmp_path / "m.tflite", quantization="float32").quantization == "float32"


def test_layers_around_a_quantised_model_stay_in_float_and_are_named(tmp_path):
    model = around(callbacks.Quantization(calibration_data=X).quantize(net()), layers.Activation("elu"), layers.Dense(3))
    report = export.to_litert(model, tmp_path / "m.tflite", check_data=X)
    assert report.quantization == "int8"
    assert set(report.float_operators) == {"ELU", "FULLY_CONNECTED"}
    with pytest.raises(RuntimeError, match="Not all of the file is integers"):
        export.to_litert(model, tmp_path / "m.tflite", quantization="int8")
    kernels = around(callbacks.Quantization(activation_bits=None).quantize(net()))
    assert export.to_litert(kernels, tmp_path / "m.tflite").quantization == "dynamic"


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
def test_a_model_of_which_nothing_can_be_integers_is_told_what_it_can_be(quantization, tmp_path):
    with pytest.raises(ValueError, match=r'`representative_data` asks for a file of integers.*lstm.*"float32", "float16"'):
        export.to_litert(
            net(layers.LSTM(3, name="lstm"), shape=(8, 1)),
            tmp_path / "m.tflite",
            quantization=quantization,
            representative_data=X[..., None],
        )
    assert os.listdir(tmp_path) == []


def test_a_file_without_integers_is_not_called_int8(tmp_path):
    with pytest.raises(RuntimeError, match="Nothing in the file is integers: ELU compute"):
        export.to_litert(net(layers.Activation("elu")), tmp_path / "m.tflite", representative_data=X)
    assert os.listdir(tmp_path) == []


# Other arguments


@pytest.mark.parametrize(
    ("name", "value", "error", "rule"),
    [
        *(("tolerance", value, ValueError, "a number of 0 or more") for value in (-0.1, np.nan)),
        *(("tolerance", value, TypeError, "a number of 0 or more") for value in ("0.1", True, [0.1], 1j)),
        *(("min_agreement", value, ValueError, "a number from 0 to 1") for value in (-0.1, 1.1, 90, np.nan)),
        *(("min_agreement", value, TypeError, "a number from 0 to 1") for value in ("0.9", None, False, np.ones(1))),
        *(("sparse", value, ValueError, "True, False or") for value in (1, None, np.ones(2), "yes")),
    ],
)
def test_bounds_that_are_none_are_named(name, value, error, rule, tmp_path):
    with pytest.raises(error, match=f"`{name}` must be {rule}.*Received: {name}="):
        export.to_litert(net(), tmp_path / "m.tflite", **{name: value})


@pytest.mark.parametrize("tolerance", [0.5, np.float32(0.5), 1, np.inf])
def test_bounds_may_be_any_numbers(tolerance, tmp_path):
    assert export.to_litert(net(), tmp_path / "m.tflite", tolerance=tolerance, min_agreement=1).agreement == 1.0


# Places


def test_places_where_no_file_can_be_are_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(_litert, "convert", lambda *args: pytest.fail("converted"))
    (tmp_path / "file").touch()
    (tmp_path / "away").symlink_to(tmp_path / "nowhere" / "m.tflite")
    os.mkfifo(tmp_path / "pipe")
    for path, error in {
        tmp_path / "nowhere" / "m.tflite": FileNotFoundError,
        tmp_path / "file" / "m.tflite": FileNotFoundError,
        tmp_path / "away": FileNotFoundError,
        tmp_path: IsADirectoryError,
        "": IsADirectoryError,
        tmp_path / "pipe": ValueError,
        "/dev/null": ValueError,
        3: TypeError,
        None: TypeError,
        b"m.tflite": TypeError,
    }.items():
        with pytest.raises(error, match="`path` must"):
            export.to_litert(net(), path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="`path` must lie in a folder that can be written to"):
        export.to_litert(net(), tmp_path / "m.tflite")


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="100,000 bytes were not written") as caught:
            _files.write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.tflite"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(tmp_path / "m.tflite", b"new")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_one_and_new_files_have_the_rights_of_other_files(tmp_path):
    (tmp_path / "link").symlink_to("there.tflite")
    export.to_litert(net(), tmp_path / "link")
    (tmp_path / "other").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there.tflite").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["link", "other", "there.tflite"]
    assert export.to_litert(net(), pathlib.Path(tmp_path, "x" * 250)).size


# What is left behind


def test_logging_is_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    before = (tf.get_logger().level, logging.root.level)
    export.to_litert(net(), tmp_path / "m.tflite")
    assert logging.root.handlers == []  # else a `logging.basicConfig` of the user's does nothing
    assert (tf.get_logger().level, logging.root.level) == before


# ONNX


def onnx_net():
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    return net()


@pytest.mark.parametrize("path", ["", "/dev/null", "/nowhere/m.onnx", None])
def test_onnx_files_have_the_same_places(path):
    with pytest.raises((OSError, TypeError, ValueError), match="`path` must"):
        export.to_onnx(onnx_net(), path)


@pytest.mark.parametrize("opset", [3, "17", True, 17.5])
def test_an_opset_that_is_none_is_named(opset, tmp_path):
    with pytest.raises(ValueError, match="`opset` must be a whole number"):
        export.to_onnx(onnx_net(), tmp_path / "m.onnx", opset=opset)


@pytest.mark.filterwarnings("ignore")
def test_onnx_files_are_run_in_parts_and_refused_in_whole(tmp_path):
    model = onnx_net()
    report = export.to_onnx(model, tmp_path / "m.onnx", check_data=X)
    assert (report.samples, report.agreement) == (300, 1.0)
    assert report.float_difference == report.max_difference
    fixed = keras.Sequential([keras.Input(batch_shape=(4, 8)), layers.Dense(3)])
    assert export.to_onnx(fixed, tmp_path / "m.onnx", check_data=X[:6]).samples == 6
    with pytest.raises(ValueError, match="`check_data` must have the shapes"):
        export.to_onnx(model, tmp_path / "n.onnx", check_data=X[:, :3])
    with pytest.raises(RuntimeError, match="tf2onnx refuses"):
        export.to_onnx(model, tmp_path / "n.onnx", opset=99)
    assert os.listdir(tmp_path) == ["m.onnx"]
