"""The pages in docs/ say what the committed results say: no table was edited by hand, and no loss is left out."""

import importlib
import json
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import losses
from tests.conftest import convolutional

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "losses.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("zoo")


def test_the_table_of_losses_is_what_the_script_makes_of_the_committed_result(zoo):
    begin, end = zoo.MARKERS
    assert PAGE.split(begin)[1].split(end)[0].strip() == zoo.section(RESULT)


def test_writing_the_table_again_changes_nothing(zoo, tmp_path):
    page = tmp_path / "losses.md"
    page.write_text(PAGE)
    zoo.write_table(RESULT, page)
    assert page.read_text() == PAGE


def test_every_public_loss_has_a_row_and_is_described(zoo):
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    public = classes - zoo.BASES
    assert {row["loss"] for row in RESULT["rows"]} == public | {zoo.ALONE}
    assert {name for name in public if f"`{name}`" not in PAGE.split(zoo.MARKERS[0])[0]} == set()


def test_every_row_was_trained_with_the_present_defaults_and_weights(zoo):
    for row in RESULT["rows"]:
        planned = zoo.plan(row["loss"], RESULT["settings"])
        assert {name: row[name] for name in planned} == planned


def test_the_numbers_of_a_row_are_those_of_its_seeds(zoo):
    baseline = next(row for row in RESULT["rows"] if row["loss"] == zoo.ALONE)
    for row in RESULT["rows"]:
        assert len(row["accuracies"]) == RESULT["settings"]["seeds"] >= 3
        differences = np.subtract(row["accuracies"], baseline["accuracies"])
        for name, values in (("accuracy", row["accuracies"]), ("agreement", row["agreements"]), ("difference", differences)):
            assert row[name]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
            assert row[name]["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)


def test_every_row_was_timed(zoo):
    assert set(RESULT["timing"]["seconds_a_step"]) == {row["loss"] for row in RESULT["rows"]} | {"teacher"}


def test_every_file_and_name_on_the_page_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for dotted in set(re.findall(r"keras_kd\.([A-Za-z_.]+)", PAGE)):
        value = keras_kd
        for part in dotted.strip(".").split("."):
            value = getattr(value, part)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_the_code_on_the_page_runs():
    rng = np.random.default_rng(0)
    names = {"keras": keras, "keras_kd": keras_kd, "teacher": convolutional((8, 12)), "student": convolutional()}
    names |= {"x": rng.normal(size=(64, 8, 8, 1)).astype("float32"), "y": rng.integers(0, 4, size=64)}
    keras.utils.disable_interactive_logging()
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "losses.md", "exec"), names)
    assert isinstance(names["warm_up"], keras.callbacks.Callback)
    assert names["distiller"].distillation_loss_weights == [3000.0]


def test_the_tables_of_the_analysis_are_those_of_its_result():
    text = (ROOT / "docs" / "analysis.md").read_text()
    evidence = json.loads((ROOT / "benchmarks" / "results" / "analysis.json").read_text())["evidence"]
    rows = {(one["criterion"], one["reconstructed"]): one["accuracy_loss"] for one in evidence["criteria"]}
    table = text.split("<!-- criteria:begin -->")[1].split("<!-- criteria:end -->")[0].strip().splitlines()[2:]
    assert len(table) == len(rows) // 2
    for line in table:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = name.split(" ")[0].strip("`")
        found = [*rows[name, True].values(), *rows[name, False].values()]
        assert [float(cell) for cell in cells] == [pytest.approx(100 * one, abs=0.0501) for one in found]
    order = ("cost", "variance", "taylor", "fisher", "l1", "l2", "taylor, labels", "fisher, labels")
    single = text.split("<!-- single:begin -->")[1].split("<!-- single:end -->")[0].strip().splitlines()[2:]
    for line, kind in zip(single, ("reconstructed", "zeroed"), strict=True):
        cells = [float(cell) for cell in line.replace(",", "|").strip("|").split("|")[1:]]
        assert cells == [evidence[f"single_channels_{kind}"][name]["loss"] for name in order]
