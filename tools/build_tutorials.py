"""Which notebooks belong to the tutorials? Executes every `tutorials/*.py` and writes the `.ipynb` beside it.

`python tools/build_tutorials.py [--check] [--chinese] [tutorial.py ...]`; with `--check` nothing runs: the cells are compared only.
What is written depends on the tutorial and its results alone: no path, time, cell id by chance or message of the machine goes in.

Tutorials in `zh` have the names, the code and the outputs of the English ones, and a text of their own. They are not executed, but
brought up to date after the English ones; `--chinese` does only that, in a moment.
"""

import argparse
import os
import pathlib
import re
import sys
from typing import Any

import jupytext
import nbformat

TUTORIALS = pathlib.Path(__file__).parent.parent / "tutorials"
CHINESE = TUTORIALS / "zh"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(notebook: Any) -> list[tuple[str, str]]:
    """Returns the kind and the source of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def same_cells(tutorial: pathlib.Path) -> bool:
    """Whether the notebook beside a tutorial is there and holds its cells."""
    notebook = tutorial.with_suffix(".ipynb")
    return notebook.exists() and cells(jupytext.read(tutorial)) == cells(nbformat.read(notebook, as_version=4))


def execute(tutorial: pathlib.Path) -> Any:
    """Runs a tutorial in a fresh kernel, in full length.

    Args:
        tutorial: a Python file in Jupytext's percent format.

    Returns:
        The notebook with its outputs.
    """
    from nbclient import NotebookClient

    notebook = jupytext.read(tutorial)
    environment = {name: value for name, value in os.environ.items() if name not in ("KERAS_KD_FAST", "MPLBACKEND")}
    # `record_timing` would write the time of day into each cell.
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False)
    client.execute(env=environment | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    return notebook


def clean(notebook: Any) -> Any:
    """Leaves what the tutorial says and shows: fixed metadata and cell ids, no standard error."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def with_code_of(english: str, translation: str) -> str:
    """Returns a translation, in percent format, with the English tutorial's cells of code; raises `SystemExit` on other cells."""
    ours, theirs = (re.split(r"^(# %%.*\n)", text, flags=re.MULTILINE) for text in (english, translation))
    if ours[1::2] != theirs[1::2]:
        sys.exit(f"The translation needs the cells {ours[1::2]}; it has {theirs[1::2]}.")
    for place in range(2, len(ours), 2):
        if "[markdown]" in ours[place - 1]:
            ours[place] = theirs[place].rstrip() + ours[place][len(ours[place].rstrip()) :]
    return "".join(ours)


def follow(tutorial: pathlib.Path) -> Any:
    """Brings a translation up to date with the English tutorial.

    Args:
        tutorial: the translation, in a folder below that of the English tutorial of the same name, whose notebook is executed.

    Returns:
        The notebook: the translation's text, with code and outputs of the English one.
    """
    english = tutorial.parent.parent / tutorial.name
    if not same_cells(english):
        sys.exit(f"The notebook of {english.name} is missing or holds other cells. Run `make tutorials`.")
    tutorial.write_text(with_code_of(english.read_text(), tutorial.read_text()))
    notebook, executed = jupytext.read(tutorial), nbformat.read(english.with_suffix(".ipynb"), as_version=4)
    pairs = zip(notebook.cells, executed.cells, strict=True)
    notebook.cells = [theirs if theirs.cell_type == "code" else ours for ours, theirs in pairs]
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """Builds the notebooks, or compares their cells; raises `SystemExit` if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tutorials", nargs="*", type=pathlib.Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="compare cells, run and write nothing")
    parser.add_argument("--chinese", action="store_true", help="those in zh alone: code and outputs of the English ones")
    options = parser.parse_args(arguments)
    chinese = sorted(CHINESE.glob("*.py"))
    tutorials = options.tutorials or [*(() if options.chinese else sorted(TUTORIALS.glob("*.py"))), *chinese]
    if options.check:
        if stale := [path.name for path in tutorials if not same_cells(path)]:
            sys.exit(f"The notebooks of {', '.join(stale)} are missing or hold other cells. Run `make tutorials`.")
        return
    for tutorial in tutorials:
        print(f"{tutorial.name} ...", flush=True)
        make = follow if tutorial.resolve().parent == CHINESE.resolve() else execute
        nbformat.write(clean(make(tutorial)), tutorial.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
