"""Every tutorial runs to its last assertion, and the notebook beside it holds its cells and nothing of the machine that ran it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

from tools.build_tutorials import shown

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.py"))
each_tutorial = pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)


def cells_of_script(path):
    """Kind and source of each cell, read without jupytext, which built the notebook."""
    _, *parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)
    for marker, text in zip(parts[::2], parts[1::2], strict=True):
        if marker.strip() == "[markdown]":
            yield "markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()
        else:
            yield "code", text.strip()


def notebook_of(path):
    return json.loads(path.with_suffix(".ipynb").read_text())


def test_there_are_tutorials_and_the_gallery_names_each():
    gallery = (FOLDER / "README.md").read_text()
    assert TUTORIALS
    for tutorial in TUTORIALS:
        assert f"({tutorial.stem}.ipynb)" in gallery


@pytest.mark.slow
@each_tutorial
def test_it_runs_to_the_end_as_a_script(tutorial, tmp_path):
    quiet = {"KERAS_KD_FAST": "1", "MPLBACKEND": "Agg", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # Without a display, as in CI: with one, Matplotlib warns that Agg has no window.
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")} | quiet
    done = subprocess.run(
        [sys.executable, str(tutorial)], capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []  # it leaves no files behind


@each_tutorial
def test_it_is_read_in_one_sitting(tutorial):
    assert len(tutorial.read_text().splitlines()) <= 250


@each_tutorial
def test_it_ends_in_assertions(tutorial):
    *_, (kind, last) = cells_of_script(tutorial)
    assert kind == "code"
    assert re.search(r"^assert ", last, flags=re.MULTILINE)


@each_tutorial
def test_the_notebook_beside_it_holds_its_cells(tutorial):
    found = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook_of(tutorial)["cells"]]
    assert found == list(cells_of_script(tutorial))


@each_tutorial
def test_the_notebook_was_executed_to_the_end_without_an_error(tutorial):
    code = [cell for cell in notebook_of(tutorial)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_tutorial
def test_what_the_notebook_prints_is_plain_text(tutorial):
    outputs = [output for cell in notebook_of(tutorial)["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if "text/html" in output.get("data", {})]  # an empty frame that rich would show
    assert "\x1b" not in "".join("".join(output.get("text", "")) for output in outputs)


def test_what_a_cell_shows_is_text_in_one_piece_and_no_log():
    picture = nbformat.v4.new_output("display_data", {"image/png": "AA=="})
    said = [("stdout", "a\nb"), ("stderr", "noise\n"), ("stdout", "c\nWARNING:tensorflow:5 out of 9 calls at 0x7f\nd\n")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in said]
    log = nbformat.v4.new_output("stream", name="stdout", text="WARNING:tensorflow:more\n")
    assert shown([*outputs, picture, log]) == [nbformat.v4.new_output("stream", name="stdout", text="a\nbc\nd\n"), picture]


def test_a_line_of_progress_that_rewrites_itself_is_not_shown():
    said = ["a\n\rexport: 1/4 steps", ", 1 s left\rexport: 4 steps, 2 s   \nb\n"]  # rates and seconds are the machine's
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in said]
    assert shown(outputs) == [nbformat.v4.new_output("stream", name="stdout", text="a\nb\n")]


@each_tutorial
def test_the_notebook_says_nothing_of_the_machine_that_ran_it(tutorial):
    text = tutorial.with_suffix(".ipynb").read_text()
    text = re.sub(r'"[A-Za-z0-9+/=\\n]{200,}"', '""', text)  # pictures: base64 holds slashes
    assert not re.findall(r"/(?:work|root|home|Users|tmp|opt|var)/\S*|[A-Z]:\\\\\S*", text)
    assert not re.findall(r"WARNING:\w+|0x[0-9a-f]{8,}", text)  # logs, and where things are in memory
    notebook = notebook_of(tutorial)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(cell["metadata"] for cell in notebook["cells"])
