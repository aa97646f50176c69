"""The command line: what it prints, writes and refuses."""

import json
import socket
import sys
import time
import warnings

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


def own_loss(y, outputs):
    """A loss that no other process knows."""
    return keras.ops.mean(outputs)


def test_compress_takes_the_loss_that_the_file_names_and_says_where_it_cannot(folder, capsys, monkeypatch):
    taken = []

    def compressed(*_, loss, **__):
        taken.append(loss)
        return "found"

    monkeypatch.setattr("keras_kd.compression.compress", compressed)
    model = keras.saving.load_model(folder / "student.keras")
    words = ("--budget", "5KB", "--out", "x")

    def told(loss, *more, data="data.npz"):
        model.compile("adam", loss, metrics=[own_loss])  # of which nothing is loaded
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras', of code
            model.save(folder / "compiled.keras")
        code, _, err = run(folder, capsys, "compress", "compiled.keras", "--data", data, *words, *more)
        assert code == 0
        return err

    assert told(keras.losses.SparseCategoricalCrossentropy(from_logits=True)) == ""
    assert taken[-1].get_config()["from_logits"]
    assert told({"head": "sparse_categorical_crossentropy"}) == ""
    assert taken[-1] == {"head": "sparse_categorical_crossentropy"}
    assert told("mse", data="named.npz") == ""  # no labels
    assert taken[-1] is None
    assert "none of Keras. In Python: keras_kd.compress(" in told(own_loss)
    assert taken[-1] is None
    assert "Add --unsafe" in told(lambda y, outputs: outputs)
    assert taken[-1] is None
    assert told(lambda y, outputs: outputs, "--unsafe") == ""
    assert taken[-1](None, 7) == 7
    words = ("compress", "student.keras", "--data", "data.npz", *words)
    assert "does not say what loss" in run(folder, capsys, *words)[2]
    code, _, err = run(folder, capsys, *words, "--max-trials", "0")  # nothing is trained
    assert (code, err) == (0, "")


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
        (("export", "teacher.keras", "out.tflite", "--quantization", "int8", "--json"), "representative_data"),  # progress: silent
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


@pytest.mark.parametrize("command", ["demo", "inspect", "compare", "prune", "export", "compress", "search"])
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


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that notes what it runs in; nothing of it stays in this process."""
    for name in ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["keras-kd"])
    monkeypatch.setattr("sys.path", ["", *sys.path])
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    path = tmp_path / "search.py"
    path.write_text(
        "import json, os, sys\nimport beside\n"
        "names = [os.environ.get(f'KERASTUNER_{one}') for one in ('TUNER_ID', 'ORACLE_IP', 'ORACLE_PORT')]\n"
        "print(json.dumps([__name__, sys.argv[1:], beside.VALUE, names]))\n"
        "if sys.argv[1:] == ['fail']: raise ValueError('of the script')\n"
    )
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_search_runs_a_script_alone_or_as_the_chief(script, capsys):
    assert cli.main(["search", str(script), "--epochs", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == ["__main__", ["--epochs", "3"], 7, ["", "", ""]]
    port = free_port()
    assert cli.main(["search", "--chief", "--address", f"127.0.0.1:{port}", str(script)]) == 0
    told, noted = capsys.readouterr().out.splitlines()
    assert told == f"keras-kd search: chief at 127.0.0.1:{port}"
    assert json.loads(noted) == ["__main__", [], 7, ["chief", "127.0.0.1", str(port)]]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--timeout", "5"], ["--timeout", "5"]),
        (["--address", "here", "--epochs", "3"], None),
    ],
)
def test_a_script_may_have_options_of_the_same_names(words, given, script, capsys):
    failed = cli.main(["search", str(script), *words])
    captured = capsys.readouterr()
    if given is None:
        assert failed
        assert "Received: --address behind" in captured.err
        assert "python " in captured.err
    else:
        assert json.loads(captured.out)[1] == given


def test_a_worker_whose_chief_does_not_answer_ends_before_its_script_begins(script, capsys):
    began = time.monotonic()
    address = f"127.0.0.1:{free_port()}"
    assert cli.main(["search", "--worker", "tuner0", "--address", address, "--timeout", "0.5", str(script)]) == 1
    captured = capsys.readouterr()
    assert time.monotonic() - began < 10
    assert captured.err.startswith(f"keras-kd search: No chief answers at {address}")
    assert "__main__" not in captured.out


def test_an_error_of_the_script_keeps_its_traceback(script, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["search", str(script), "fail"])
    assert f'File "{script}", line 5' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chief", "SCRIPT"], "must be given with --chief and with --worker NAME, and with these alone. Received: no --address"),
        (["--address", "127.0.0.1:1", "SCRIPT"], "Received: --address without either"),
        (["SCRIPT", "--chief"], "must stand before the script. Received: --chief behind"),
        (["--worker", "a", "--address", "127.0.0.1", "SCRIPT"], "must be \"host:port\". Received: address='127.0.0.1'"),
        (["--worker", "mischief", "--address", "127.0.0.1:1", "SCRIPT"], 'must be a name without "chief"'),
        (["missing.py"], 'There is no file "missing.py"'),
    ],
)
def test_search_says_what_is_wrong_with_a_call(script, capsys, words, message):
    assert cli.main(["search", *(str(script) if word == "SCRIPT" else word for word in words)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
