"""Every long job says how far it is with verbose=1, says nothing with verbose=0, and by itself only if it takes its time."""

import inspect
import pathlib
import re
import tempfile

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import analysis, export, profile, report, surgery

X = np.random.default_rng(0).normal(size=(160, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int64")
FOLDER = pathlib.Path(tempfile.mkdtemp())


def make_network():
    """With a residual branch, so that layers can go."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(12, activation="relu", name="first")(inputs)
    y = keras.layers.Dense(12, activation="relu", name="second")(x)
    x = keras.layers.Add(name="add")([x, y])
    x = keras.layers.Dense(12, activation="relu", name="third")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


MODEL = make_network()


@pytest.fixture(autouse=True, scope="module")
def _delegate():
    """LiteRT says on stderr, once a process, that it made a delegate."""
    export.run_litert(file(), X)


def file():
    path = FOLDER / "model.tflite"
    if not path.exists():
        export.to_litert(MODEL, path, verbose=0)
    return path


def reconstruct(verbose):
    smaller = surgery.remove_channels(MODEL, {"second": [0, 3]}, verbose=0)
    surgery.reconstruct(smaller, MODEL, X, epochs=1, verbose=verbose)


# One short call of each public function that has the argument.
EXAMPLES = {
    "record_teacher": lambda v: keras_kd.record_teacher(MODEL, X, FOLDER / f"recording{v}", verbose=v),
    "analysis.linear_analysis": lambda v: analysis.linear_analysis(MODEL, X, verbose=v),
    "analysis.probe": lambda v: analysis.probe(MODEL, X, Y, verbose=v),
    "analysis.sensitivity": lambda v: analysis.sensitivity(MODEL, X, Y, [0.5], layers=["third"], verbose=v),
    "export.to_litert": lambda v: export.to_litert(MODEL, FOLDER / "other.tflite", verbose=v),
    "export.to_onnx": lambda v: export.to_onnx(MODEL, FOLDER / "other.onnx", verbose=v),
    "profile.measure_latencies": lambda v: profile.measure_latencies({"one": file()}, runs=15, verbose=v),
    "profile.measure_latency": lambda v: profile.measure_latency(file(), runs=15, verbose=v),
    "profile.profile": lambda v: profile.profile(MODEL, file(), runs=15, verbose=v),
    "report.compare": lambda v: report.compare({"model": MODEL, "file": file()}, X, Y, runs=15, verbose=v),
    "surgery.apply": lambda v: surgery.apply(MODEL, [analysis.Step("remove_layer", "add")], data=X, verbose=v),
    "surgery.factorize": lambda v: surgery.factorize(MODEL, rank=2, data=X, verbose=v),
    "surgery.linearize": lambda v: surgery.linearize(MODEL, "first", X, verbose=v),
    "surgery.prune_channels": lambda v: surgery.prune_channels(MODEL, macs=0.5, data=X, verbose=v),
    "surgery.reconstruct": reconstruct,
    "surgery.remove_channels": lambda v: surgery.remove_channels(MODEL, {"second": [0, 3]}, data=X, verbose=v),
    "surgery.remove_layers": lambda v: surgery.remove_layers(MODEL, ["add"], data=X, verbose=v),
}
# Trainings of minutes, whose tests look at what they print: tests/compression and tests/test_demo.py.
ELSEWHERE = {"compress", "compression.compress"}


def public_functions(module=keras_kd, prefix=""):
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from public_functions(value, f"{name}.") if hasattr(value, "__all__") else members(value, f"{name}.")
        elif inspect.isfunction(value):
            yield prefix + name, value


def members(module, prefix):
    for name, value in vars(module).items():
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__:
            yield prefix + name, value


def test_every_function_with_the_argument_is_tried_here():
    found = {name for name, value in public_functions() if "verbose" in inspect.signature(value).parameters}
    assert found - ELSEWHERE == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_shows_progress_with_1_and_nothing_with_0(name, capfd):
    EXAMPLES[name](0)
    assert "".join(capfd.readouterr()) == ""
    EXAMPLES[name](1)
    shown = capfd.readouterr()
    assert re.search(r"^(.*: )?[\d,]+ \w+, [\d,.e+]+/s, .* s$", shown.out, flags=re.MULTILINE), shown.out
    assert shown.err == ""


def test_all_phases_of_pruning_show_themselves(capfd):
    EXAMPLES["surgery.prune_channels"](1)
    titles = [line.split(":")[0] for line in capfd.readouterr().out.splitlines()]
    assert titles[:2] == ["moments", "refit"]
    surgery.prune_channels(MODEL, macs=0.5, data=X, labels=Y, criterion="taylor", verbose=1)
    assert capfd.readouterr().out.startswith("gradients: 160 samples")
    surgery.factorize(MODEL, macs=0.6, data=X, verbose=1)
    titles = [line.split(":")[0] for line in capfd.readouterr().out.splitlines()]
    assert titles == ["ranks", "fit"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_another_verbosity_is_refused(name):
    with pytest.raises(ValueError, match=r"`verbose` must be 0 \(silent\), 1 or \"auto\""):
        EXAMPLES[name]("loud")
