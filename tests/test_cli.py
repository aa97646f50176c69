"""The command line: what it prints, writes and refuses."""

import json

import keras
import numpy as np
import pytest

from keras_kd import cli, surgery
from keras_kd.surgery import _costs

L = keras.layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, one with code of its own, and data."""
    path = tmp_path_factory.mktemp("cli")
    keras.utils.set_random_seed(0)
    for name, width in (("teacher", 16), ("student", 4)):
        inputs = keras.Input((6,), name="features")
        x = L.Dense(width, activation="relu", name="hidden")(inputs)
        keras.Model(inputs, L.Dense(3, name="head")(x)).save(path / f"{name}.keras")
    keras.Sequential([keras.Input((6,)), L.Lambda(lambda x: 2 * x)]).save(path / "code.keras")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)).astype("float32"), rng.integers(0, 3, 80)
    np.savez(path / "data.npz", x=x, y=y)
    np.savez(path / "named.npz", features=x)
    np.savez(path / "other.npz", images=x)
    np.savez(path / "pickled.npz", x=np.asarray([{}], dtype=object))
    (path / "text.keras").write_text("no model")
    return path


def run(folder, capsys, *words):
    """Exit code, and what was printed; words with a dot are files of the folder."""
    code = cli.main([str(folder / word) if "." in word and not word.startswith("0") else word for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_shows_the_layers_and_with_data_what_can_go(folder, capsys):
    code, out, _ = run(folder, capsys, "inspect", "teacher.keras")
    assert code == 0
    assert all(word in out for word in ("hidden", "head", "163", "MACs"))
    code, out, _ = run(folder, capsys, "inspect", "teacher.keras", "--data", "named.npz", "--json")
    found = json.loads(out)
    assert (code, found["profile"]["macs"]) == (0, 6 * 16 + 16 * 3)
    assert [layer["name"] for layer in found["linear_analysis"]["layers"]][-1] == "head"


def test_compare_measures_keras_and_litert_files(folder, capsys):
    assert run(folder, capsys, "export", "student.keras", "student.tflite")[0] == 0
    words = ("compare", "teacher.keras", "student.keras", "student.tflite", "--data", "data.npz")
    code, out, _ = run(folder, capsys, *words, "--json", "--html", "report.html")
    found = json.loads(out)
    assert code == 0
    assert "student.tflite" in out
    assert found["reference"] == "teacher"
    assert "<html" in (folder / "report.html").read_text()


def test_prune_writes_a_model_within_the_budget(folder, capsys):
    code, out, _ = run(folder, capsys, "prune", "teacher.keras", "small.keras", "--macs", "0.5", "--data", "data.npz", "--json")
    assert code == 0
    found = json.loads(out)
    small = keras.saving.load_model(folder / "small.keras")
    teacher = keras.saving.load_model(folder / "teacher.keras")
    assert found["macs_after"] == sum(row.macs or 0 for row in _costs.count_macs(small)) <= found["macs"] / 2
    x = np.load(folder / "data.npz")["x"]
    ours = surgery.prune_channels(teacher, macs=0.5, data=x, verbose=0)
    np.testing.assert_allclose(small(x), ours(x), atol=1e-5)
    assert not list(folder.glob(".*"))


def test_export_writes_integers_where_there_are_data(folder, capsys):
    code, out, _ = run(folder, capsys, "export", "teacher.keras", "teacher.tflite", "--data", "data.npz")
    assert code == 0
    assert "int8" in out
    assert (folder / "teacher.tflite").stat().st_size > 0


def test_compress_writes_the_best_file_and_its_report(folder, capsys):
    words = ("compress", "teacher.keras", "--data", "data.npz", "--validation", "data.npz", "--budget", "5KB", "--out")
    code, out, _ = run(folder, capsys, *words, str(folder / "out"), "--max-trials", "1", "--epochs", "1", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((folder / "out" / "report.json").read_text())
    assert (folder / "out" / "model.tflite").stat().st_size == json.loads(out)["best"]["size"] <= 5000


def test_code_in_files_runs_only_where_asked_for(folder, capsys):
    code, _, err = run(folder, capsys, "inspect", "code.keras")
    assert code == 1
    assert "--unsafe" in err
    code, out, _ = run(folder, capsys, "inspect", "code.keras", "--unsafe")
    assert code == 0
    assert "Lambda" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("inspect", "none.keras"), "There is no file"),
        (("inspect", "text.keras"), "must be a .keras file"),
        (("inspect", "teacher.keras", "--data", "text.keras"), "must be an .npz file"),
        (("inspect", "teacher.keras", "--data", "pickled.npz"), "must be an .npz file"),
        (("inspect", "teacher.keras", "--data", "other.npz"), "must hold x, or features. Received: images"),
        (("prune", "teacher.keras", "out.h5", "--macs", "0.5", "--data", "data.npz"), "must end in .keras"),
        (("prune", "teacher.keras", "none/out.keras", "--macs", "0.5", "--data", "data.npz"), "There is no folder"),
        (("prune", "teacher.keras", "out.keras", "--data", "data.npz"), "A budget must be given"),
        (("export", "teacher.keras", "out.tflite", "--quantization", "int8"), "representative_data"),
        (("compress", "teacher.keras", "--data", "data.npz", "--budget", "5 bytes", "--out", "x"), "`budget` must be bytes"),
        (("compare", *["teacher.keras"] * 3, "--data", "data.npz"), "a name of its own"),
    ],
    ids=range(11),
)
def test_errors_say_what_is_wrong_without_a_traceback(words, told, folder, capsys):
    code, out, err = run(folder, capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith(f"keras-kd {words[0]}: ")
    assert told in err
    assert "Traceback" not in err
    assert not (folder / "out.keras").exists()


def test_export_writes_a_card_with_what_was_measured(folder, capsys):
    words = ("export", "teacher.keras", "carded.tflite")
    assert run(folder, capsys, *words, "--card", "card.md", "--test", "data.npz")[0] == 0
    text = (folder / "card.md").read_text()
    assert "`carded.tflite` is a LiteRT" in text
    assert "This file is `file`; agreement is with `model`." in text
    code, _, error = run(folder, capsys, *words, "--card", "card.md")
    assert (code, "is there already" in error) == (1, True)
    code, _, error = run(folder, capsys, *words, "--test", "data.npz")
    assert (code, "Add --card README.md" in error) == (1, True)


@pytest.mark.parametrize("command", ["demo", "inspect", "compare", "prune", "export", "compress"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: keras-kd {command}" in capsys.readouterr().out


def test_an_interruption_ends_with_130(folder, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_kd.profile.profile", lambda *a, **k: interrupted())
    assert run(folder, capsys, "inspect", "teacher.keras")[0] == 130
