"""Which notebooks belong to the tutorials? Executes every `tutorials/*.py` and writes the `.ipynb` beside it.

`python tools/build_tutorials.py [--check] [--chinese] [tutorial ...]`; with `--check` nothing runs: the cells are compared only.
What is written depends on the tutorial and its results alone: no path, time, cell id by chance or message of the machine goes in.

`tutorials/zh` has the texts of some in Chinese. Their notebooks have code and outputs of the English ones, and are written after
these; `--chinese` writes nothing else, in a moment.
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
    wanted = translate(tutorial) if tutorial.suffix == ".md" else jupytext.read(tutorial)
    return notebook.exists() and cells(wanted) == cells(nbformat.read(notebook, as_version=4))


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


def shown(outputs: list[Any]) -> list[Any]:
    """What a cell shows: no standard error, log of TensorFlow or progress, and text in one piece, whatever its pace was."""
    kept: list[Any] = []
    for output in outputs:
        is_text = output.output_type == "stream"
        if is_text and kept and kept[-1].output_type == "stream" and output.name == "stdout":
            kept[-1].text += output.text
        elif not is_text or output.name == "stdout":
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = re.sub(r"^(WARNING:tensorflow:|.*\r).*\n?", "", output.text, flags=re.MULTILINE)
    return [output for output in kept if output.output_type != "stream" or output.text]


def clean(notebook: Any) -> Any:
    """Leaves what the tutorial says and shows, with fixed metadata and cell ids."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = shown(cell.outputs)
    return notebook


def translate(text: pathlib.Path) -> Any:
    """Puts a translated text in the place of the English one.

    Args:
        text: a Markdown file in a folder below that of the tutorial of the same name: its cells of text, in order, with
            `<!-- code -->` between them.

    Returns:
        The tutorial's executed notebook with that text; raises `SystemExit` where it has other cells than the tutorial.
    """
    english = text.parent.parent / text.with_suffix(".py").name
    if not same_cells(english):
        sys.exit(f"The notebook of {english.name} is missing or holds other cells. Run `make tutorials`.")
    notebook = nbformat.read(english.with_suffix(".ipynb"), as_version=4)
    places = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    sources = [part.strip() for part in text.read_text().split("<!-- code -->")]
    if len(sources) != len(places):
        sys.exit(f"{text} needs a text for each of the tutorial's {len(places)} cells of text. It has {len(sources)}.")
    for cell, source in zip(places, sources, strict=True):
        cell.source = source
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """Builds the notebooks, or compares their cells; raises `SystemExit` if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tutorials", nargs="*", type=pathlib.Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="compare cells, run and write nothing")
    parser.add_argument("--chinese", action="store_true", help="the notebooks in zh alone")
    options = parser.parse_args(arguments)
    english = [] if options.chinese else sorted(TUTORIALS.glob("*.py"))
    tutorials = options.tutorials or [*english, *sorted(CHINESE.glob("*.md"))]
    if options.check:
        if stale := [path.name for path in tutorials if not same_cells(path)]:
            sys.exit(f"The notebooks of {', '.join(stale)} are missing or hold other cells. Run `make tutorials`.")
        return
    for tutorial in tutorials:
        print(f"{tutorial.parent.name}/{tutorial.name} ...", flush=True)
        make = translate if tutorial.suffix == ".md" else execute
        nbformat.write(clean(make(tutorial)), tutorial.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
