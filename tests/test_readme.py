"""The README says what is true: its snippet runs, its files exist, its numbers are those of the committed results."""

import importlib
import json
import pathlib
import re

import keras
import numpy as np
import pytest

from keras_kd import _litert

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUANTIZATION = json.loads((ROOT / "benchmarks/results/quantization.json").read_text())


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("sizes")


def test_the_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3200, 4)).astype("float32"), rng.integers(0, 3, size=3200)

    def model(width):
        hidden = keras.layers.Dense(width, activation="relu")
        return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3, activation="softmax")])

    names = {"teacher": model(16), "student": model(10), "x": x, "y": y, "x_val": x[:64], "y_val": y[:64]}
    exec(compile(snippet.replace("epochs=20", "epochs=20, verbose=0"), "README.md", "exec"), names)
    kernels = np.concatenate([np.ravel(layer.kernel) for layer in names["student"].layers])
    assert np.mean(kernels == 0) == pytest.approx(0.8, abs=1 / kernels.size)  # by one threshold over all layers
    _, floats = _litert.operators((tmp_path / "student.tflite").read_bytes())
    assert floats == ()


def test_it_is_not_longer_than_150_lines():
    assert len(README.splitlines()) <= 150


def test_every_file_that_it_names_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"`((?:tests|benchmarks|keras_kd)/[^`]+)`", README):
        assert (ROOT / target).exists(), target


def test_every_name_of_the_library_that_it_mentions_exists():
    import keras_kd

    for dotted in set(re.findall(r"keras_kd\.([A-Za-z_.]+)", README)):
        value = keras_kd
        for part in dotted.strip(".").split("."):
            value = getattr(value, part)
    for name in set(re.findall(r"`([A-Z][A-Za-z]*Loss)\b", README)):
        assert hasattr(keras_kd.losses, name), name


def test_its_speed_figures_are_those_of_the_committed_result():
    results = json.loads((ROOT / "benchmarks/results/distiller.json").read_text())
    section = README.split("<!-- speed:begin -->")[1].split("<!-- speed:end -->")[0]
    for size, found in results["sizes"].items():
        for ratio in ("r1", "r2"):
            assert f"{found['ratios'][ratio]['median']:.2f}" in section, (size, ratio)


def test_its_figures_of_features_and_recordings_are_those_of_the_committed_results():
    section = README.split("<!-- speed:begin -->")[1].split("<!-- speed:end -->")[0]
    features = json.loads((ROOT / "benchmarks/results/features.json").read_text())["ratios"]
    for found in features.values():
        assert f"{found['median']:.2f}" in section
    for teacher in json.loads((ROOT / "benchmarks/results/recorded.json").read_text())["teachers"].values():
        for ratio in ("recorded / plain", "keras / recorded"):
            assert f"{teacher['ratios'][ratio]['median']:.2f}" in section
        assert f"{teacher['recording']['record / predict']:.2f}" in section


def test_its_figures_of_pruning_and_quantization_are_those_of_the_committed_results():
    section = README.split("<!-- speed:begin -->")[1].split("<!-- speed:end -->")[0]
    page = (ROOT / "docs/quantization.md").read_text()
    texts = [" ".join(text.split()) for text in (section, page)]
    pruning = json.loads((ROOT / "benchmarks/results/pruning.json").read_text())
    rows = {row["method"]: row for row in QUANTIZATION["quality"]["summary"]}
    speed = QUANTIZATION["speed"]
    for found in (pruning["speed"]["no_xla"], pruning["speed"]["tfmot"]):
        assert f"{found['ratio']['median']:.2f} ({found['ratio']['median_low']:.2f} to" in section
    for text in texts:
        for name in ("no_xla", "tfmot"):
            ratio = speed[name]["ratio"]
            assert f"{ratio['median']:.2f} ({ratio['median_low']:.2f} to {ratio['median_high']:.2f})" in text, name
        assert f"XLA {speed['xla']['ratio']['median']:.2f}" in text
    for row in rows.values():
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f}"
        sizes = (f"{row[name]:,.0f}" for name in ("bytes", "gzip"))
        assert any(all(one in line for one in (accuracy, *sizes)) for line in page.splitlines()), row["method"]
    assert all(claim["holds"] for claim in pruning["claims"] + QUANTIZATION["claims"])


def test_the_figures_under_its_picture_are_those_of_the_committed_result():
    caption = " ".join(README.split("results/quantization.png)")[1].split("```")[0].split())
    quality, keras_runs = QUANTIZATION["quality"], QUANTIZATION["keras"]["runs"]
    rows = {row["method"]: row for row in quality["summary"]}
    shown = [(quality["teacher"]["accuracy"], quality["latency"]["teacher"]["bytes"])]
    shown += [(rows[name]["accuracy"], rows[name]["bytes"]) for name in ("float", "distilled_qat", "road", "tfmot_qat", "qat")]
    found = re.findall(r"([\d.]+) % in (\d+,\d+)", caption)
    assert found == [(f"{100 * accuracy:.1f}", f"{size:,.0f}") for accuracy, size in shown]
    zeros = [f"{100 * rows[name]['accuracy']:.1f}" for name in ("tfmot_pqat", "pqat_two", "pqat_global")]
    assert f"zeros {zeros[0]} % (here {zeros[1]} %, global {zeros[2]} %)" in caption
    assert f"int8 after training: {100 * rows['ptq']['accuracy']:.1f} %" in caption
    measured = ("weight_bytes", "accuracy", "float_accuracy")
    weights, accuracy, before = (np.mean([run[name] for run in keras_runs]) for name in measured)
    assert f"{weights:,.0f} bytes of weights remain ({100 * accuracy:.1f} %)" in " ".join(README.split())
    page = " ".join((ROOT / "docs/quantization.md").read_text().split())
    assert f"{weights:,.0f} bytes of weights were left, with {100 * accuracy:.1f} % ({100 * before:.1f} % before)" in page
    assert all(len(run["integer_layers"]) == 1 and run["litert_error"] for run in keras_runs)  # the Dense layer


def test_what_its_picture_shows_are_means_and_extremes_of_the_runs(sizes):
    found = sizes.points(QUANTIZATION)
    assert set(found) == set(sizes.SHOWN)
    for method, point in found.items():
        if method == "teacher":
            assert point.bytes == QUANTIZATION["quality"]["latency"]["teacher"]["bytes"]
            continue
        keras_alone = method == "keras"
        runs = QUANTIZATION["keras"]["runs"] if keras_alone else QUANTIZATION["quality"]["runs"]
        runs = [run for run in runs if run.get("method", "keras") == method]
        accuracies = 100 * np.array([run["accuracy"] for run in runs])
        assert len(runs) == 3
        assert point[:3] == pytest.approx((np.mean(accuracies), np.min(accuracies), np.max(accuracies)))
        assert point.bytes == pytest.approx(np.mean([run["weight_bytes" if keras_alone else "bytes"] for run in runs]))
        assert point.gzip == (None if keras_alone else pytest.approx(np.mean([run["gzip"] for run in runs])))


def test_its_picture_was_drawn_from_the_committed_result(sizes, tmp_path):
    mark = sizes.fingerprint(sizes.points(QUANTIZATION)).encode()
    assert mark in sizes.PICTURE.read_bytes()  # else: python benchmarks/sizes.py
    changed = json.loads(json.dumps(QUANTIZATION))
    changed["quality"]["runs"][0]["accuracy"] += 0.01
    sizes.draw(changed, tmp_path / "changed.png")
    assert mark not in (tmp_path / "changed.png").read_bytes()


def test_every_public_name_has_a_status():
    import keras_kd

    status = README.split("Stable (")[1]
    for name in set(keras_kd.__all__) - {"__version__", "compression"}:  # `compress`'s module
        assert re.search(rf"`{name}[`.]", status), name
