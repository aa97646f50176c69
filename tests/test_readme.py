"""The README says what is true: its snippet runs, its files exist, its numbers are those of the committed results."""

import json
import pathlib
import re

import keras
import numpy as np

from keras_kd import _litert

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
    assert np.mean(np.asarray(names["student"].layers[0].kernel) == 0) == 0.8
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
    pruning, quantization = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("pruning", "quantization")
    )
    rows = {row["method"]: row for row in quantization["quality"]["summary"]}
    speed = quantization["speed"]
    for found in (pruning["speed"]["no_xla"], pruning["speed"]["tfmot"]):
        assert f"{found['ratio']['median']:.2f} ({found['ratio']['median_low']:.2f} to" in section
    for text in texts:
        for name in ("no_xla", "tfmot"):
            ratio = speed[name]["ratio"]
            assert f"{ratio['median']:.2f} ({ratio['median_low']:.2f} to {ratio['median_high']:.2f})" in text, name
        assert f"XLA {speed['xla']['ratio']['median']:.2f}" in text
        for method in ("qat", "tfmot_qat"):
            assert f"{rows[method]['bytes']:,.0f}" in text, method
        for method in ("float", "qat", "pqat_two", "pqat_global", "road", "tfmot_pqat"):
            assert f"{100 * rows[method]['accuracy']:.1f}" in text, method
    for row in rows.values():
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f}"
        assert any(accuracy in line and f"{row['gzip']:,.0f}" in line for line in page.splitlines()), row["method"]
    assert all(claim["holds"] for claim in pruning["claims"] + quantization["claims"])
