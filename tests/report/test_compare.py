"""Models side by side: what stands in the rows is what NumPy, Keras and the files themselves say."""

import gzip
import itertools
import math
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd.callbacks import Quantization
from keras_kd.report import Comparison, _scores, _weights, compare
from tests.conftest import classifier, convolutional

HOSTILE = "<script>alert('x')</script> & \"co\" $a_b$"


def samples(count=60, features=4, classes=3):
    rng = np.random.default_rng(5)
    return rng.normal(size=(count, features)).astype("float32"), rng.integers(0, classes, count)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A comparison of every kind of model, and what it was made of."""
    keras.utils.set_random_seed(3)
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(90, 8, 8, 1)).astype("float32"), rng.integers(0, 4, 90)
    teacher, student = convolutional((8, 10)), convolutional(norm=True)
    kernel = student.get_layer("conv2").kernel
    kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, kernel))
    quantized = Quantization(calibration_data=x[:32]).quantize(student)
    student.save(folder / "student.keras")
    keras_kd.export.to_litert(quantized, folder / "student.tflite", check_data=x[:32])
    distiller = keras_kd.Distiller(teacher, student)
    models = {
        "teacher": teacher,
        HOSTILE: distiller,
        "int8": quantized,
        "saved": folder / "student.keras",
        "file": str(folder / "student.tflite"),
    }
    curves = {"teacher": {"loss": [3.0, 2.0, math.nan], "val_loss": [3.5, 2.5, 2.0]}, "int8": {"loss": [1.0]}}
    comparison = compare(models, x, y, histories=curves, runs=3, batch_size=40, verbose=0)
    return comparison, {"x": x, "y": y, "teacher": teacher, "student": student, "quantized": quantized, "folder": folder}


def test_accuracy_agreement_and_loss_are_those_of_predict_and_numpy(found):
    comparison, made = found
    logits = {name: made[model].predict(made["x"], verbose=0) for name, model in (("teacher", "teacher"), (HOSTILE, "student"))}
    right = {name: values.argmax(-1) == made["y"] for name, values in logits.items()}
    for name, values in logits.items():
        row, shifted = comparison[name], values - values.max(-1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(90), made["y"]]
        assert row.accuracy == right[name].mean()
        assert row.agreement == np.mean(values.argmax(-1) == logits["teacher"].argmax(-1))
        assert row.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert comparison[HOSTILE].gained == np.sum(right[HOSTILE] & ~right["teacher"])
    assert comparison[HOSTILE].lost == np.sum(~right[HOSTILE] & right["teacher"])
    assert comparison["teacher"].p_value is None


def test_the_row_of_a_file_is_what_the_file_gives(found):
    comparison, made = found
    path = made["folder"] / "student.tflite"
    given = keras_kd.export.run_litert(path, made["x"])[0].argmax(-1)
    assert comparison["file"].accuracy == np.mean(given == made["y"])
    assert comparison["file"].size == os.path.getsize(path)
    assert comparison["file"].gzip_size == len(gzip.compress(path.read_bytes(), 9))
    assert comparison["file"].macs is None


def test_bytes_are_those_of_an_export_in_float_and_of_a_quantized_model_in_integers(found, tmp_path):
    comparison, made = found
    keras_kd.export.to_litert(made["student"], tmp_path / "float.tflite", quantization="float32")
    keras_kd.export.to_litert(made["quantized"], tmp_path / "int8.tflite")
    assert comparison[HOSTILE].size == comparison["saved"].size == os.path.getsize(tmp_path / "float.tflite")
    assert comparison["int8"].size == os.path.getsize(tmp_path / "int8.tflite")
    assert comparison[HOSTILE].bits == 32
    assert 8 < comparison["int8"].bits < 16  # kernels of 8, biases of 32


def test_weights_zeros_and_multiply_accumulates_are_those_of_the_model(found):
    comparison, made = found
    arrays = made["student"].get_weights()
    row = comparison[HOSTILE]
    assert row.parameters == sum(array.size for array in arrays)
    assert row.nonzero_parameters == sum(np.count_nonzero(array) for array in arrays)
    assert row.macs == 64 * 9 * 4 + 16 * 9 * 4 * 6 + 6 * 4
    kernel, bias = made["student"].get_layer("conv2").get_weights()
    layer = next(layer for layer in row.layers if layer.name == "conv2")
    assert layer.sparsity == pytest.approx(1 - (np.count_nonzero(kernel) + np.count_nonzero(bias)) / (kernel.size + bias.size))
    assert {layer.bits for layer in comparison["int8"].layers if layer.kind == "Conv2D"} == {8}


def test_a_saved_model_and_the_one_in_memory_have_one_row_but_for_the_time(found):
    comparison, _ = found
    timed = {"name": "", "latency": None, "latency_range": None}
    rows = [vars(comparison[name]) | timed for name in (HOSTILE, "saved")]
    assert rows[0] == rows[1]


def test_latency_lies_between_its_percentiles(found):
    for row in found[0].rows:
        assert 0 < row.latency_range[0] <= row.latency <= row.latency_range[1]


def test_json_brings_back_the_same_comparison(found, tmp_path):
    comparison, _ = found
    text = comparison.to_json(tmp_path / "c.json")
    assert Comparison.from_json(text) == Comparison.from_json(tmp_path / "c.json") == comparison
    assert comparison.histories["teacher"]["loss"] == (3.0, 2.0, None)
    with pytest.raises(ValueError, match="must be what `Comparison.to_json` wrote"):
        Comparison.from_json("{}")


def test_records_are_flat_and_of_the_same_keys(found):
    records = found[0].records()
    assert len({tuple(record) for record in records}) == 1
    assert all(isinstance(value, str | int | float | None) for record in records for value in record.values())
    assert records[0]["accuracy_low"] < records[0]["accuracy"] < records[0]["accuracy_high"]


def test_the_table_names_every_model_as_it_stands(found):
    lines = str(found[0]).splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == ["teacher", HOSTILE, "int8", "saved", "file"]
    assert len(found[0].summary()) == 4


def test_the_picture_is_a_png_and_draws_names_that_are_no_formulas(found, tmp_path):
    found[0].plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_wilson_and_mcnemar_are_those_of_the_books():
    low, high = _scores.wilson(8, 10)
    for bound in (low, high):  # where the score test just rejects: |p - q| = z sqrt(q (1 - q) / n)
        assert abs(0.8 - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / 10))
    for gained, lost in ((0, 0), (3, 3), (1, 7), (9, 2)):
        splits = list(itertools.product((0, 1), repeat=gained + lost))  # each pair is a fair coin
        extreme = [split for split in splits if min(sum(split), len(split) - sum(split)) <= min(gained, lost)]
        assert _scores.mcnemar(gained, lost) == pytest.approx(len(extreme) / len(splits))


def test_data_in_batches_and_in_arrays_gives_one_result():
    x, y = samples()
    models = {"a": classifier(), "b": classifier(5)}
    options = {"latency": False, "verbose": 0}
    arrays = compare(models, x, y, batch_size=7, **options)
    batches = compare(models, tf.data.Dataset.from_tensor_slices((x, y)).batch(16), **options)
    generated = compare(models, ((x[i : i + 20], y[i : i + 20]) for i in range(0, 60, 20)), **options)
    for other in (batches, generated):
        for row, twin in zip(arrays.rows, other.rows, strict=True):
            assert vars(row) | {"loss": 0} == vars(twin) | {"loss": 0}
            assert row.loss == pytest.approx(twin.loss)


def test_one_hot_labels_and_class_numbers_give_one_result():
    x, y = samples()
    models = {"a": classifier(activation="softmax")}
    numbers, columns = (compare(models, x, labels, latency=False, verbose=0)["a"] for labels in (y[:, None], np.eye(3)[y]))
    assert numbers.accuracy == columns.accuracy
    assert numbers.loss == pytest.approx(columns.loss)


def test_without_labels_there_is_agreement_with_the_chosen_reference_alone():
    x, _ = samples()
    models = {"a": classifier(), "b": classifier(5)}
    found = compare(models, x, reference="b", latency=False, verbose=0)
    a, b = (models[name].predict(x, verbose=0).argmax(-1) for name in "ab")
    assert (found["a"].accuracy, found["a"].loss, found["a"].p_value) == (None, None, None)
    assert found["a"].agreement == np.mean(a == b)
    assert found["b"].agreement == 1


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_single_outputs_with_labels_of_0_and_1_are_decisions(activation):
    x, _ = samples()
    y = (np.arange(60) % 2).astype("float32")
    model = classifier(classes=1, activation=activation)
    row = compare({"a": model}, x, y, latency=False, verbose=0)["a"]
    said = model.predict(x, verbose=0)[:, 0] > (0.5 if activation else 0)
    assert row.accuracy == np.mean(said == y)
    assert row.accuracy_interval is not None


def test_numbers_have_a_squared_error_and_r2_with_the_reference():
    x, _ = samples()
    y = x[:, :1] * 2.5
    models = {"a": classifier(classes=1), "b": classifier(5, classes=1)}
    found = compare(models, x, y, latency=False, batch_size=11, verbose=0)
    a, b = (model.predict(x, verbose=0) for model in models.values())
    assert (found.task, found["b"].accuracy) == ("numbers", None)
    assert found["b"].loss == pytest.approx(np.mean((b - y) ** 2), rel=1e-5)
    assert found["b"].agreement == pytest.approx(1 - np.sum((b - a) ** 2) / np.sum((a - a.mean()) ** 2), rel=1e-5)


def test_metrics_of_keras_and_functions_are_measured_and_left_as_they_were():
    x, y = samples()
    model, top = classifier(), keras.metrics.SparseTopKCategoricalAccuracy(2)
    metrics = {"top 2": top, "class 0": lambda labels, outputs: outputs.argmax(-1) == 0}
    row = compare({"a": model}, x, y, metrics=metrics, latency=False, batch_size=13, verbose=0)["a"]
    ranks = np.argsort(-model.predict(x, verbose=0))
    assert row.metrics["top 2"] == pytest.approx(np.mean((ranks[:, :2] == y[:, None]).any(-1)))
    assert row.metrics["class 0"] == pytest.approx(np.mean(ranks[:, 0] == 0))
    assert float(top.result()) == 0


def test_another_output_can_be_compared():
    x, y = samples()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(3)(inputs)])
    row = compare({"a": model}, x, [np.zeros(60, int), y], output=1, latency=False, verbose=0)["a"]
    assert row.accuracy == np.mean(model.predict(x, verbose=0)[1].argmax(-1) == y)


@pytest.mark.skipif(keras.__version__ < "3.13", reason="Keras 3.12 exports no LiteRT files")
def test_files_that_keras_wrote_itself_can_be_compared(tmp_path):
    x, y = samples()
    model = classifier()
    for layer in model.layers:
        layer.bias.assign(np.full(layer.bias.shape, 0.1))  # files leave out biases of 0
    model.export(tmp_path / "keras.tflite", format="litert", verbose=False)
    found = compare({"a": model, "b": tmp_path / "keras.tflite"}, x, y, runs=2, verbose=0)
    assert found["b"].agreement == 1
    assert found["b"].parameters == model.count_params()
    assert found["b"].latency > 0


def test_what_cannot_be_exported_has_a_note_and_no_bytes():
    @keras.saving.register_keras_serializable("test_report")
    class Inverse(keras.layers.Layer):
        def call(self, x):
            return keras.ops.real(tf.signal.fft(tf.cast(x, "complex64")))

    model = keras.Sequential([keras.Input((4,)), Inverse(), keras.layers.Dense(3)])
    x, y = samples()
    found = compare({"a": model, "b": classifier()}, x, y, runs=2, verbose=0)
    assert (found["a"].size, found["a"].latency) == (None, None)
    assert "No LiteRT file" in found["a"].notes[0]
    assert "No LiteRT file" in str(found)
    assert found["b"].latency > 0


@pytest.mark.parametrize("mode", ["float32", "float16", "dynamic", "int8", "int4"])
def test_weights_of_a_file_are_those_of_the_model(mode, tmp_path):
    model, rng = convolutional(), np.random.default_rng(1)
    for layer in ("conv1", "conv2", "head"):
        kernel = model.get_layer(layer).kernel
        large = np.sign(kernel) * (0.5 + np.abs(kernel))  # nothing that rounding makes 0
        kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, large))
        model.get_layer(layer).bias.assign(rng.uniform(1, 2, model.get_layer(layer).bias.shape))
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype("float32")
    data = {"representative_data": x, "tolerance": 9, "min_agreement": 0} if "int" in mode else {}
    keras_kd.export.to_litert(model, tmp_path / "m.tflite", quantization=mode, **data)
    found = _weights.weights_of((tmp_path / "m.tflite").read_bytes())
    assert sum(one.parameters for one in found) == model.count_params()
    assert sum(one.nonzero for one in found) == sum(np.count_nonzero(array) for array in model.get_weights())


def test_models_stay_as_they_were():
    x, y = samples()
    model = classifier()
    model.compile("adam", "mse")
    before = [array.copy() for array in model.get_weights()]
    compare({"a": model}, x, y, latency=False, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert (model.optimizer.iterations.numpy(), model.loss) == (0, "mse")


def test_states_of_recurrent_layers_stay_as_they_were_and_what_cannot_be_traced_has_a_note():
    lstm = keras.layers.LSTM(4, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(10, 6, 3)), lstm, keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(20, 6, 3)).astype("float32")
    row = compare({"a": model}, x, np.arange(20) % 3, latency=False, verbose=0)["a"]
    assert not any(np.any(state) for state in lstm.states)
    assert "no multiply-accumulates" in " ".join(row.notes)
    assert (row.macs, row.parameters) == (None, model.count_params())


def test_nan_is_no_answer():
    x, y = samples()
    broken = classifier()
    broken.set_weights([array * np.nan for array in broken.get_weights()])
    row = compare({"a": classifier(), "b": broken}, x, y, latency=False, verbose=0)["b"]
    assert (row.accuracy, row.agreement, row.loss) == (0, 0, None)
    assert "NaN" in row.notes[0]


def test_it_is_silent_where_it_is_asked_to_be(capsys):
    x, y = samples()
    compare({"a": classifier()}, x, y, runs=1, verbose=0)
    assert capsys.readouterr().out == ""
    compare({"a": classifier()}, x, y, runs=1, verbose=1)
    assert "60 samples" in capsys.readouterr().out


X, Y = samples()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "`models` must hold at least one model"),
        ({"models": [1]}, "`models` must be a dict of models by name"),
        ({"models": {3: None}}, "`models` must have strings as names. Received: 3"),
        ({"models": {"a": 3}}, r'models\["a"\] must be a Keras model'),
        ({"models": {"a": "nothing.tflite"}}, r'models\["a"\] must be a file that exists'),
        ({"models": {"a": __file__}}, r'models\["a"\] must be a file of the kind .keras or .tflite'),
        ({"models": {"a": keras.Sequential([keras.layers.Dense(3)])}}, r'models\["a"\] must be built'),
        ({"data": X[:, :3]}, r'models\["good"\] does not take `data`'),
        ({"labels": Y[:9]}, "`labels` must hold one entry for each sample. Received: 9 for 60"),
        ({"labels": Y + 2}, "`labels` must be whole numbers from 0 to 2"),
        ({"labels": np.array(["a"] * 60)}, "`labels` must hold numbers"),
        ({"reference": "other"}, "`reference` must name one of the models: good"),
        ({"histories": {"other": {}}}, "`histories` must name one of the models: good"),
        ({"histories": {"good": 3}}, r'histories\["good"\] must be what `fit` returned'),
        ({"metrics": ["accuracy"]}, "`metrics` must be a dict"),
        ({"labels": None, "metrics": {"a": abs}}, "`metrics` need `labels`"),
        ({"task": "other"}, "`task` must be one of auto, classes, binary, numbers"),
        ({"output": 1}, r'`output` must be a number from 0 to 0, the outputs of models\["good"\]'),
        ({"runs": 0}, "`runs` must be a whole number of at least 1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number"),
        ({"verbose": 7}, "`verbose` must be 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_with_the_rule(change, message):
    arguments = {"models": {"good": classifier()}, "data": X, "labels": Y, "latency": False, "verbose": 0} | change
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        compare(arguments.pop("models"), arguments.pop("data"), **arguments)


def test_a_file_of_other_inputs_or_outputs_and_one_that_is_none_are_named(tmp_path):
    keras_kd.export.to_litert(classifier(features=5), tmp_path / "other.tflite")
    keras_kd.export.to_litert(classifier(classes=2), tmp_path / "fewer.tflite")
    (tmp_path / "none.tflite").write_bytes(b"nothing that LiteRT knows")
    for name, message in (
        ("other", r'models\["b"\] does not take `data`.*must be what the file takes'),
        ("fewer", r'models\["b"\] gives \(60, 2\), the reference models\["a"\] \(60, 3\)'),
        ("none", r'models\["b"\] must be a LiteRT file'),
    ):
        with pytest.raises(ValueError, match=message):
            compare({"a": classifier(), "b": tmp_path / f"{name}.tflite"}, X, Y, verbose=0)


def test_a_page_that_cannot_be_written_leaves_what_was_there(found, tmp_path):
    with pytest.raises(FileNotFoundError, match="must lie in a folder that exists"):
        found[0].to_html(tmp_path / "missing" / "c.html")
    with pytest.raises(IsADirectoryError):
        found[0].plot(tmp_path)
