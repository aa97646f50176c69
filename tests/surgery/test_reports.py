"""Reports of surgery as JSON: all that they hold, in plain types."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from keras_kd import surgery
from keras_kd.surgery._refit import Refit
from keras_kd.surgery._reports import Report
from keras_kd.surgery.channels import SurgeryReport

L = keras.layers


@pytest.fixture(scope="module")
def reports():
    """One of each kind but `ApplyReport`, which holds what a plan and the others give."""
    inputs = keras.Input((8,))
    x = L.BatchNormalization(name="norm")(L.Dense(8, name="a")(inputs))
    x = L.Dense(8, name="c")(L.Dense(8, activation="relu", name="b")(x))
    model = keras.Model(inputs, L.Dense(2, name="head")(x))
    data = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    options = {"data": data, "return_report": True}
    smaller, report = surgery.prune_channels(model, macs=0.5, verbose=0, **options)
    found = [
        surgery.remove_channels(model, {"a": [0, 3]}, **options)[1],
        report,
        surgery.factorize(model, rank=2, **options)[1],
        surgery.linearize(model, "b", **options)[1],
        surgery.remove_layers(model, ["b"], **options)[1],
        surgery.fold_batch_norm(model, return_report=True)[1],
        surgery.transfer_weights(model, keras.models.clone_model(model)),
    ]
    found.append(surgery.reconstruct(smaller, model, data, epochs=1, verbose=0, return_report=True)[1])
    return {type(one).__name__: one for one in found}


def test_json_holds_every_field_of_every_report(reports, tmp_path):
    assert {one.__name__ for one in (*Report.__subclasses__(), *SurgeryReport.__subclasses__())} == {*reports, "ApplyReport"}
    for name, report in reports.items():
        path = tmp_path / f"{name}.json"
        text = report.to_json(path)
        assert json.loads(text) == json.loads(path.read_text())
        assert list(json.loads(text)) == [field.name for field in dataclasses.fields(report)]


def test_arrays_are_lists_and_numbers_stay_what_they_are(reports):
    report = reports["PruningReport"]
    found = json.loads(report.to_json())
    assert found["kept"] == {name: kept.tolist() for name, kept in report.kept.items()}
    assert found["refits"] == [dataclasses.asdict(one) | {"l2": one.l2 if one.l2 != np.inf else "inf"} for one in report.refits]
    assert (found["macs_after"], found["cost"], found["note"]) == (report.macs_after, report.cost, report.note)


def test_numbers_that_are_not_finite_are_strings():
    report = SurgeryReport({}, {}, 1, 1, (Refit("a", 1, np.int64(2), np.float32(0.5), 0.25, np.inf),))
    assert json.loads(report.to_json())["refits"][0] == {
        "layer": "a",
        "columns": 1,
        "rows": 2,
        "error_before": 0.5,
        "error_after": 0.25,
        "l2": "inf",
    }
