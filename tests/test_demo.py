"""The main job from end to end on small settings, its report, and the command line."""

import json

import numpy as np
import pytest

from keras_kd import cli, demo, export, report

FASHION = "Fashion-MNIST is not in ~/.keras/datasets/fashion-mnist (.ci/run installs it)"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = demo.Settings(epochs=25, teacher_epochs=12, seeds=2)
    return demo.run(settings, folder, verbose=False), folder


@pytest.mark.slow
def test_the_distilled_student_gains_and_the_numbers_are_those_of_the_runs(finished):
    results, folder = finished
    teacher, alone, distilled, compressed, file = results["entries"]
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert teacher["mean"] > 0.9
    assert len(alone["accuracies"]) == len(distilled["accuracies"]) == 2
    np.testing.assert_allclose(
        results["gain"]["differences"], np.subtract(distilled["accuracies"], alone["accuracies"]), atol=1e-12
    )
    assert results["gain"]["mean"] > 0.02
    assert (teacher["parameters"], distilled["parameters"]) == (82_666, pytest.approx(3_530, abs=20))  # a bias may be 0
    assert compressed["mean"] > alone["mean"]
    assert any(file["mean"] == pytest.approx(a, abs=0.003) for a in compressed["accuracies"])


@pytest.mark.slow
@pytest.mark.slow
def test_the_compressed_student_has_its_zeros(finished):
    results, _ = finished
    _, _, distilled, compressed, _ = results["entries"]
    kernels = distilled["parameters"] - 16 - 2 * 32 - 2 * 32 - 10 - 16  # without biases
    assert compressed["parameters"] == pytest.approx(distilled["parameters"] - 0.5 * kernels, abs=40)


def test_the_file_agrees_with_the_model_and_the_report_is_a_picture(finished):
    results, folder = finished
    assert results["file"]["agreement"] > 0.99
    assert results["file"]["quantization"] == "int8"
    assert results["file"]["float_operators"] == []
    assert (folder / "student_float.tflite").stat().st_size == results["entries"][2]["size"]
    assert (folder / "student.tflite").stat().st_size == results["entries"][3]["size"]
    assert results["entries"][3]["gzip_size"] < 0.5 * results["entries"][2]["gzip_size"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.png").stat().st_size > 20_000


def test_the_parts_of_the_data_are_disjoint_and_labels_are_few():
    data = demo.load("digits")
    parts = [data.teacher[0], data.images, data.test[0]]
    assert [len(part) for part in parts] == [700, 600, 497]
    rows = np.concatenate([part.reshape(len(part), -1) for part in parts])
    assert len(np.unique(rows, axis=0)) == len(rows) == 1797
    assert len(data.labelled) == 60
    assert np.bincount(data.labels[data.labelled]).min() >= 5
    assert set(np.unique(data.labels)) == {-1, *range(10)}


def test_both_students_start_from_the_same_weights_and_take_the_same_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "_optimizer", lambda rate, steps: seen.append(steps) or "sgd")
    data, settings = demo.load("digits"), demo.Settings(epochs=1)
    teacher = demo.make_teacher((8, 8, 1), 10)
    starts = []
    original = demo.make_student
    monkeypatch.setattr(demo, "make_student", lambda *a: starts.append(original(*a)) or starts[-1])
    monkeypatch.setattr(demo.Distiller, "fit", lambda self, *a, **k: None)
    monkeypatch.setattr(demo.keras.Sequential, "fit", lambda self, *a, **k: None)
    demo.train_student(data, settings, 3, "alone", teacher, [])
    demo.train_student(data, settings, 3, "distilled", teacher, [])
    monkeypatch.setattr(demo.compression.Quantization, "quantized_model", lambda self: None)
    demo.train_student(data, settings, 3, "compressed", teacher, [])
    assert seen == [10, 10, 10]
    for weights in zip(*(model.get_weights() for model in starts), strict=True):
        np.testing.assert_array_equal(weights[0], weights[1])
        np.testing.assert_array_equal(weights[0], weights[2])


def test_fashion_mnist_is_split_the_same_way():
    import pathlib

    if not (pathlib.Path.home() / ".keras/datasets/fashion-mnist/train-images-idx3-ubyte.gz").exists():
        pytest.skip(FASHION)
    data = demo.load("fashion_mnist")
    assert data.teacher[0].shape == (20_000, 28, 28, 1)
    assert (len(data.images), len(data.labelled), len(data.test[0])) == (6_000, 300, 10_000)
    assert 0.99 < data.images.max() <= 1


def test_a_gain_that_is_none_is_called_none():
    assert "helps here: +5.0 ± 1.0 points over 3 seeds (+4.0, +5.0, +6.0)" in str(report.Gain([0.04, 0.05, 0.06]))
    for differences in ([0.05, -0.01, 0.02], [-0.02, -0.03, -0.01], [0.001, 0.2, 0.001]):
        assert "no clear gain" in str(report.Gain(differences))
    assert str(report.Gain([0.2])) == "One seed tells little: +20.0 points."
    assert not report.Gain([0.2]).is_clear


def test_an_entry_has_mean_and_sample_deviation():
    entry = report.Entry("x", [0.8, 0.9, 1.0])
    assert entry.mean == pytest.approx(0.9)
    assert entry.spread == pytest.approx(0.1)
    assert report.Entry("x", [0.8]).spread == 0.0


def test_the_table_shows_every_number():
    import io

    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table([report.Entry("small", [0.8, 0.9], 1386, 10716, 7025, 0.0021), report.Entry("bare", [0.5])]))
    text = console.export_text()
    for part in ("small", "85.0 ± 7.1", "1,386", "10,716", "7,025", "0.002", "bare", "50.0"):
        assert part in text


def test_the_command_line_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "run", lambda settings, out, verbose: calls.append((settings, out, verbose)))
    arguments = ["demo", "--dataset", "mnist", "--epochs", "4", "--seed", "9", "--seeds", "2", "--out", "x", "--quiet"]
    assert cli.main(arguments) == 0
    ((settings, out, verbose),) = calls
    assert (settings.dataset, settings.epochs, settings.seed, settings.seeds) == ("mnist", 4, 9, 2)
    assert (out, verbose) == ("x", False)


def test_the_command_line_explains_errors_without_a_traceback(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("keras-kd demo: ")
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--epochs", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--epochs", "many"])
    assert "must be a whole number, at least 1, not many" in capsys.readouterr().err

    def offline():
        raise Exception("no network")

    monkeypatch.setattr(demo.keras.datasets.mnist, "load_data", offline)
    assert cli.main(["demo", "--dataset", "mnist", "--out", str(tmp_path / "x")]) == 1
    assert "mnist cannot be loaded (no network). Without a network: --dataset digits" in capsys.readouterr().err


def small_teacher(shape, classes):
    layers = demo.layers
    body = [layers.Conv2D(8, 3, strides=2, activation="relu"), layers.Flatten(), layers.Dense(24, activation="relu")]
    return demo.keras.Sequential([demo.keras.Input(shape), *body, layers.Dense(classes)], name="teacher")


def test_the_search_shows_the_front_of_its_trials_and_of_their_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "make_teacher", small_teacher)
    settings = demo.Settings(epochs=1, teacher_epochs=1)
    results = demo.search(settings, tmp_path, trials=2)
    assert json.loads((tmp_path / "search.json").read_text()) == json.loads(json.dumps(results))
    assert results["trials"] == 2
    assert 1 <= len(results["front"]) <= 2
    told = capsys.readouterr().out
    data = demo.load("digits")
    for one in results["front"]:
        logits = export.run_litert(one["file"], data.test[0])[0]
        assert one["accuracy"] == np.mean(logits.argmax(-1) == data.test[1])
        assert one["bytes"] < results["teacher"]["bytes"]
        assert f"{one['bytes']:,}" in told
        assert set(one["hyperparameters"]) == {"channels", "rank", "learning_rate"}
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_passes_the_options_of_a_search_on(monkeypatch):
    calls = []
    monkeypatch.setattr(
        demo, "search", lambda settings, out, trials, verbose: calls.append((settings.epochs, out, trials, verbose))
    )
    assert cli.main(["demo", "--search", "--trials", "3", "--out", "x"]) == 0
    assert cli.main(["demo", "--search", "--epochs", "2", "--quiet"]) == 0
    assert calls == [(15, "x", 3, True), (2, "runs/demo", 8, False)]
