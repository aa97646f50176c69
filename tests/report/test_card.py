"""The card of a file: metadata that YAML and the Hub read, numbers that were measured, code that runs."""

import math
import re

import keras
import numpy as np
import pytest
import yaml

from keras_kd import export, report
from keras_kd.report._front_matter import front_matter

L = keras.layers
rng = np.random.default_rng(0)
X = rng.normal(size=(80, 6)).astype("float32")
Y = rng.integers(0, 3, 80)


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6,)), L.Dense(16, activation="relu"), L.Dense(3, activation="softmax")], name="net")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("card")


@pytest.fixture(scope="module")
def integers(folder):
    """A file of integers, also at its border, and what was measured of it."""
    model = build()
    exported = export.to_litert(model, folder / "student.tflite", quantization="int8", representative_data=X, io_dtype="int8")
    return exported, report.compare({"teacher": model, "small": exported.path}, X, Y, runs=5, verbose=0)


def parts(card):
    """Metadata and text."""
    _, head, text = card.read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def outputs_of_code(text, monkeypatch, folder, *arrays):
    """What the block of code gives, with other samples than its zeros."""
    (code,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    for index in range(len(arrays)):
        code, replaced = re.subn(rf"x{index} = np\.zeros\(.*?\)  # your samples", f"x{index} = given[{index}]", code)
        assert replaced == 1
    exec(compile(code, "card", "exec"), names | {"given": arrays}, names)
    return [names[f"y{index}"] for index in range(sum(name.startswith("y") for name in names))]


def test_the_metadata_hold_what_was_measured_and_said_and_nothing_else(integers, folder):
    exported, comparison = integers
    card = report.model_card(
        exported,
        comparison=comparison,
        description="Tells *three* kinds apart.",
        made=["Distilled from `teacher`.", "Quantised."],
        limits=["Not for medicine."],
        task="tabular-classification",
        dataset="owner/three",
        license="apache-2.0",
        metadata={"language": "en", "base_model": ["owner/teacher"]},
    )
    assert card == folder / "README.md"
    found, text = parts(card)
    right = float(np.mean(export.run_litert(exported.path, X)[0].argmax(-1) == Y))
    results = {
        "task": {"type": "tabular-classification"},
        "dataset": {"type": "owner/three", "name": "owner/three"},
        "metrics": [{"type": "accuracy", "value": pytest.approx(right)}],
    }
    assert found == {
        "library_name": "tflite",
        "license": "apache-2.0",
        "pipeline_tag": "tabular-classification",
        "tags": ["keras", "keras-kd", "litert", "tflite", "int8"],
        "datasets": ["owner/three"],
        "metrics": ["accuracy"],
        "model-index": [{"name": "student", "results": [results]}],
        "language": "en",
        "base_model": ["owner/teacher"],
    }
    for line in ("Tells *three* kinds apart.", "- Distilled from `teacher`.\n- Quantised.", "- Not for medicine."):
        assert line in text
    assert f"It has {exported.path.stat().st_size:,} bytes, {exported.gzip_size:,} after gzip." in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| model |", "| small |"))]
    row = dict(zip(*rows, strict=True))
    assert row["accuracy, %"].startswith(f"{100 * right:.1f} (")
    assert row["latency, ms"] == f"{comparison['small'].latency:.3g}"
    assert "On 80 samples of owner/three. This file is `small`; agreement is with `teacher`." in text


def test_the_hub_reads_the_results(integers, folder):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    exported, comparison = integers
    metadata = {"task": "tabular-classification", "dataset": "owner/three", "license": "mit"}
    card = report.model_card(exported, folder / "hub.md", comparison=comparison, **metadata)
    loaded = hub.ModelCard.load(card, ignore_metadata_errors=False)
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", comparison["small"].accuracy)
    assert (loaded.data.model_name, loaded.data.license, loaded.data.library_name) == ("student", "mit", "tflite")


def test_what_nobody_measured_or_said_is_left_out(integers, folder):
    exported, _ = integers
    found, text = parts(report.model_card(exported.path, folder / "bare.md"))
    assert found == {"library_name": "tflite", "tags": ["keras", "keras-kd", "litert", "tflite"]}
    assert "## Measured" not in text
    assert "## How it was made" not in text
    assert "- How often it is right was not measured." in text
    alone = report.compare({"a": exported.path}, X, latency=False, verbose=0)
    found, text = parts(report.model_card(exported, folder / "bare.md", comparison=alone, task="t", dataset="d", overwrite=True))
    assert "model-index" not in found
    assert "metrics" not in found
    assert "- It was measured without labels: how often it is right is not known." in text


def test_no_heading_stands_above_nothing(folder):
    model = build()
    exported = export.to_litert(model, folder / "floats.tflite", verbose=0)
    comparison = report.compare({"teacher": model, "floats": exported.path}, X, Y, latency=False, verbose=0)
    _, text = parts(report.model_card(exported, folder / "floats.md", comparison=comparison))
    assert not re.search(r"^## [^\n]*\s*(## |\Z)", text, flags=re.MULTILINE)
    assert "## Limits" not in text


def test_another_file_of_as_many_bytes_is_not_taken_for_this_one(folder):
    paths = []
    for seed in (1, 2):
        model = build()
        model.set_weights([np.random.default_rng(seed).normal(size=weight.shape) for weight in model.get_weights()])
        paths.append(export.to_litert(model, folder / f"seed{seed}.tflite", verbose=0).path)
    assert paths[0].stat().st_size == paths[1].stat().st_size
    comparison = report.compare({"one": paths[0]}, X, Y, latency=False, verbose=0)
    for name in (None, "one"):
        with pytest.raises(ValueError, match="must have one row of this very file.*rows of this file: none, of .one. .LiteRT"):
            report.model_card(paths[1], folder / "other.md", comparison=comparison, name=name)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_at_the_border_have_the_scale_of_the_border(dtype, folder, monkeypatch):
    exported = export.to_litert(
        build(), folder / f"{dtype}.tflite", quantization="int8", representative_data=X, io_dtype=dtype, verbose=0
    )
    _, text = parts(report.model_card(exported, folder / f"{dtype}.md"))
    (detail,) = export.open_litert(exported.path).get_input_details()
    scale, zero = detail["quantization"]
    assert re.search(rf"\| input \|.*\| {dtype} \| {dtype} \| {scale:.9g} \| {zero} \|", text)
    (given,) = outputs_of_code(text, monkeypatch, folder, X)
    np.testing.assert_allclose(given, export.run_litert(exported.path, X)[0], rtol=1e-6)


def test_the_code_runs_a_file_of_integers_and_the_scales_are_those_of_the_interpreter(integers, folder, monkeypatch):
    exported, _ = integers
    _, text = parts(report.model_card(exported, folder / "code.md"))
    (given,) = outputs_of_code(text, monkeypatch, folder, X)
    (expected,) = export.run_litert(exported.path, X)
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    interpreter = export.open_litert(exported.path)
    (taken,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    for detail, what in ((taken, "input"), (made, "output")):
        (row,) = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {what} |"))
        assert row[2:5] == [str(tuple(map(int, detail["shape_signature"]))), "int8", "int8"]
        assert float(row[5]) == pytest.approx(detail["quantization"][0])
        assert int(row[6]) == detail["quantization"][1]
    scale, zero = taken["quantization"]
    assert f"below {scale * (-128 - zero):.4g} count as" in text


def test_the_code_runs_several_inputs_and_outputs_and_any_length(folder, monkeypatch):
    tokens, numbers = keras.Input((None,), dtype="int32"), keras.Input((4,))
    x = L.GlobalAveragePooling1D()(L.Conv1D(3, 5)(L.Embedding(7, 2)(tokens)))
    x = L.Concatenate()([x, numbers])
    model = keras.Model([tokens, numbers], [L.Dense(2)(x), L.Dense(1)(x)])
    arrays = [rng.integers(0, 7, (5, 9)).astype("int32"), rng.normal(size=(5, 4)).astype("float32")]
    exported = export.to_litert(model, folder / "two.tflite", check_data=arrays)
    _, text = parts(report.model_card(exported, folder / "two.md"))
    assert "| input | `input_0` | (-1, -1) | int32 |" in text
    for given, expected in zip(outputs_of_code(text, monkeypatch, folder, *arrays), model(arrays), strict=True):
        np.testing.assert_allclose(given, expected, atol=1e-5)
    outputs_of_code(text, monkeypatch, folder)  # as it stands


def test_a_float_border_names_the_integers_behind_it_and_a_fixed_batch_is_a_limit(folder):
    inputs = keras.Input((6,), batch_size=2)
    model = keras.Model(inputs, L.Dense(3)(inputs))
    exported = export.to_litert(model, folder / "fixed.tflite", quantization="int8", representative_data=X)
    _, text = parts(report.model_card(exported, folder / "fixed.md"))
    assert re.search(r"\| input \| `input_0` \| \(2, 6\) \| float32 \| int8 \| [0-9.e-]+ \| -?\d+ \|", text)
    assert "- `input_0` takes 2 samples at a time, no other number." in text
    assert "np.zeros((2, 6)" in text


def test_numbers_and_metrics_of_ones_own_are_results_too(folder):
    model = keras.Sequential([keras.Input((6,)), L.Dense(1)])
    exported = export.to_litert(model, folder / "numbers.tflite")
    wanted = X[:, :1]
    metrics = {"mae": keras.losses.mean_absolute_error}
    comparison = report.compare({"a|b": exported.path}, X, wanted, metrics=metrics, latency=False, verbose=0)
    found, text = parts(report.model_card(exported, folder / "numbers.md", comparison=comparison, task="r", dataset="d"))
    difference = model.predict(X, verbose=0) - wanted
    results = {one["type"]: one["value"] for one in found["model-index"][0]["results"][0]["metrics"]}
    assert results == pytest.approx({"mse": np.mean(difference**2), "mae": np.mean(np.abs(difference))}, rel=1e-4)
    assert r"| a\|b |" in text


def test_a_card_of_another_file_or_over_another_one_is_refused(integers, folder):
    exported, comparison = integers
    card = report.model_card(exported, folder / "once.md", comparison=comparison)
    card.write_text("edited")
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        report.model_card(exported, card, comparison=comparison)
    assert card.read_text() == "edited"
    assert report.model_card(exported, card, comparison=comparison, name="small", overwrite=True).read_text() != "edited"
    other = export.to_litert(build(), folder / "other.tflite")
    free = folder / "free.md"
    with pytest.raises(
        ValueError, match="`comparison` must have one row of this very file.*rows of this file: none, of .teacher. .Keras.,"
    ):
        report.model_card(other, free, comparison=comparison)
    with pytest.raises(ValueError, match="name='teacher', rows of this file: small"):
        report.model_card(exported, free, comparison=comparison, name="teacher")
    (folder / "other.tflite").write_bytes(exported.path.read_bytes())
    with pytest.raises(ValueError, match=r"must be the report of the file that is there"):
        report.model_card(other, free)
    assert not free.exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"file": 3}, TypeError, "`file` must be a path"),
        ({"file": "missing.tflite"}, FileNotFoundError, "must be a file that exists"),
        ({"file": __file__}, ValueError, "must be a LiteRT file"),
        ({"license": 2}, TypeError, "`license` must be text"),
        ({"made": "one line"}, TypeError, "`made` must be a list of lines"),
        ({"limits": [1]}, TypeError, "`limits` must be a list of lines"),
        ({"metadata": []}, TypeError, "`metadata` must be a dict"),
        ({"metadata": {"date": {"day": object()}}}, TypeError, r'`metadata\["date"\]\["day"\]` must be text'),
        ({"comparison": 1}, TypeError, "`comparison` must be what `compare` returned"),
    ],
)
def test_wrong_arguments_are_named(integers, folder, arguments, error, message):
    with pytest.raises(error, match=message):
        report.model_card(**{"file": integers[0], "path": folder / "never.md"} | arguments)
    assert not (folder / "never.md").exists()


def test_any_text_and_number_survives_the_metadata():
    values = {
        "plain": "a: b # c",
        "no": ["yes", "1.0", "null", "", " x ", 'quote " and \\', "two\nlines", "Ünï 中文 🙂", "\x85\u2028\x7f\x00"],
        "2020-01-01": {"deep": [{"a": 1, "b": [True, None, 2.5, 1e-7, 1e22, -3, math.inf]}, [], {}, [[1], [2]]]},
        "nothing": None,
    }
    text = front_matter(values)
    assert text.startswith("---\n")
    assert text.endswith("\n---\n")
    assert yaml.safe_load(text.strip("-\n")) == values
