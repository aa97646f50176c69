"""Which pages has the documentation site? Assembles them, has Sphinx build them, and looks for broken links and missing names.

`python -m tools.website.build` writes to build/site. The pages of docs/, the README and others go in as they are: the folders of
the source tree are kept, so links between files hold on the site as they do in the repository. Made from something else are the
API reference (docstrings), the page of the command line (its `--help`), those of the benchmarks (scripts and committed results)
and the tutorials (executed notebooks). Any warning is an error.
"""

import ast
import base64
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

from tools.website import check, docstrings, names, tables

ROOT = pathlib.Path(__file__).parents[2]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
NAVIGATION = {
    "Start": ["Overview <README>", "tutorials/README", "中文 <README.zh-CN>"],
    "Guides": ["losses", "teachers", "pruning", "quantization", "order", "surgery", "analysis", "compress", "search"],
    "Scale": ["large_data", "distributed"],
    "Coming from": ["from_keras", "from_tfmot", "from_torchdistill", "comparison"],
    "Reference": ["api/index", "command_line", "works_with", "benchmarks/index"],
    "Project": ["design", "CHANGELOG", "CONTRIBUTING"],
}
# Described here because their docstrings are another project's.
OF_TFMOT = {
    "ConstantSparsity": "TF-MOT's schedule of one sparsity, from `begin_step` to `end_step`, every `frequency` steps.",
    "PolynomialDecay": "TF-MOT's schedule that grows from `initial_sparsity` to `final_sparsity`, fast at first: Zhu, Gupta, 2017.",
    "PruningSchedule": "TF-MOT's base class: `schedule(step)` gives whether to prune now, and the sparsity.",
}


def write(path: str, text: str) -> None:
    """Writes a page of the source."""
    target = SOURCE / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


@functools.cache
def links() -> dict[str, str]:
    """See `names.links`."""
    return names.links()


def prepared(page: pathlib.Path) -> str:
    """A page of the repository as a page of the site: notebooks have become pages, and names are links."""
    text = re.sub(r"(\]\((?:tutorials/)?(?:zh/)?[\w.-]+)\.ipynb\)", r"\1.md)", page.read_text())
    return linked(text, links(), first_column=not page.name.startswith("from_"))  # which holds the names of another library


def copy_pages() -> None:
    """Copies what is readable as it is, and what those pages link to."""
    for folder, patterns in {
        ".": ["README*.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"],
        "docs": ["*.md"],
        "benchmarks": ["*.py", "results/*"],
        "tests": ["test_keras_distillation_defects.py"],
        "tutorials": ["*.py", "*.ipynb", "*.md", "zh/*.ipynb"],
    }.items():
        for path in [path for pattern in patterns for path in sorted((ROOT / folder).glob(pattern))]:
            target = SOURCE / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                target.write_text(prepared(path))
            else:
                shutil.copy(path, target)


def linked(text: str, links: dict[str, str], *, first_column: bool = True) -> str:
    """Makes names in the text of a page, not in its code, links to the API reference; `first_column`: in that of tables, too."""

    def role(match: re.Match[str]) -> str:
        target = names.target(match[1], links)
        return f"{{py:obj}}`{match[1]} <{target}>`" if target else match[0]

    kept = r"^```.*?^```$|<!--.*?-->|\[[^\]\n]*`[^\]\n]*\]\(" + ("" if first_column else r"|^\|[^|\n]*\|")
    parts = re.split(f"({kept})", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(re.sub(r"(?<!`)`([^`\n]+)`(?!`)", role, part) if index % 2 == 0 else part for index, part in enumerate(parts))


def find(page: str) -> str:
    """A page's place in the source: guides are in docs."""
    there = "<" in page or (SOURCE / f"{page}.md").exists() or (SOURCE / f"{page}.rst").exists()
    return page if there else f"docs/{page}"


def write_index() -> None:
    """Writes the first page: what the README begins with, and where to go."""
    begin = prepared(ROOT / "README.md").split("\n## ")[0]
    trees = "\n".join(
        f":::{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(find(page) for page in pages) + "\n:::\n"
        for caption, pages in NAVIGATION.items()
    )
    listed = "\n".join(
        f"**{caption}:** " + ", ".join(re.sub("`/(.*) <", r"`\1 </", f"{{doc}}`/{find(page)}`") for page in pages) + "\n"
        for caption, pages in NAVIGATION.items()
    )
    write("index.md", f"{begin}\n\n{listed}\n\n{trees}")


def rst(text: str) -> str:
    """One line of Markdown as reStructuredText."""
    return "\n".join(docstrings.to_rst([text], lambda code: None))


def first_line(value: Any) -> str:
    """What the docstring says first, as reStructuredText."""
    return rst((inspect.getdoc(value) or "").split("\n")[0])


def described(name: str, value: Any, home: str) -> str:
    """The reStructuredText that describes one public name."""
    kind = "class" if inspect.isclass(value) else "function"
    short = name.rsplit(".", 1)[1]
    if home != name:
        return f".. py:{kind}:: {short}\n\n   The same as :py:obj:`{home}`.\n"
    if value.__module__.startswith("tensorflow_model_optimization"):
        signature = inspect.signature(value) if short != "PruningSchedule" else "()"
        return f".. py:class:: {short}{signature}\n\n   {rst(OF_TFMOT[short])}\n"
    return f".. auto{kind}:: {name}\n"


def write_reference() -> None:
    """Writes a page of the API reference for each public module."""
    homes, pages = names.homes(), []
    for module_name, module in names.modules().items():
        lines = [module_name, "=" * len(module_name), "", first_line(module), "", f".. py:module:: {module_name}", ""]
        public = {f"{module_name}.{name}": getattr(module, name) for name in names.names_of(module)}
        lines += [".. list-table::", "   :class: summary", ""]
        for name, value in public.items():
            short = name.rsplit(".", 1)[1]
            line = rst(OF_TFMOT[short]) if short in OF_TFMOT else first_line(value)
            lines += [f"   * - :py:obj:`{short} <{name}>`", f"     - {line}"]
        lines += ["", *(described(name, value, homes[id(value)]) for name, value in public.items())]
        write(f"api/{module_name}.rst", "\n".join(lines))
        pages.append(module_name)
    title = "API reference\n=============\n\nEvery public name, by module. All examples are run by the tests.\n\n"
    rows = [f"   * - :doc:`{name}`\n     - {first_line(names.modules()[name])}\n" for name in pages]
    tree = "\n.. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in pages)
    write("api/index.rst", f"{title}.. list-table::\n   :class: summary\n\n{''.join(rows)}{tree}")


def write_command_line() -> None:
    """Writes what `keras-kd --help` says, for it and its commands."""
    cli = importlib.import_module("keras_kd.cli")
    os.environ["COLUMNS"] = "88"

    def helped(*words: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
        return shown.getvalue().strip()

    text = helped()
    found = re.findall(r"^    (\w[\w-]*) ", text, flags=re.MULTILINE)  # commands are indented by four
    if not found:
        sys.exit("keras-kd --help lists no commands")
    parts = [f"## keras-kd {name}\n\n```text\n{helped(name)}\n```\n" for name in found]
    write("command_line.md", "# Command line\n\n```text\n" + text + "\n```\n\n" + "\n".join(parts))


def write_benchmarks() -> None:
    """Writes a page for each committed result: what was asked, what came out, and the script."""
    pages = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        name, script = path.stem, (ROOT / "benchmarks" / f"{path.stem}.py").read_text()
        question, *rest = (ast.get_docstring(ast.parse(script)) or "").split("\n\n")
        picture = f"![{name}](results/{name}.png)\n\n" if path.with_suffix(".png").exists() else ""
        links = f"[The script]({name}.py), [the result](results/{name}.json).\n\n"
        shown = tables.of(json.loads(path.read_text()))
        title = " ".join(question.split())
        write(f"benchmarks/{name}.md", f"# {name.capitalize()}\n\n{title}\n\n" + "\n\n".join(rest) + f"\n\n{links}{picture}{shown}")
        pages.append((name, title))
    rows = "\n".join(f"- [{name.capitalize()}]({name}.md): {title}" for name, title in pages)
    tree = ":::{toctree}\n:hidden:\n\n" + "\n".join(name for name, _ in pages) + "\n:::\n"
    text = "Each answers one question by a script; the tables are made from the committed results."
    write("benchmarks/index.md", f"# Benchmarks\n\n{text}\n\n{rows}\n\n{tree}")


def write_tutorials() -> None:
    """Writes the executed notebooks as pages, pictures included: the English ones, then the Chinese ones."""
    pages, folder = [], ROOT / "tutorials"
    for path in [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("zh/*.ipynb"))]:
        parts, page = [], path.relative_to(folder).with_suffix("").as_posix()
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            parts += [shown(output, page, f"{number}-{index}") for index, output in enumerate(cell.get("outputs", []))]
        write(f"tutorials/{page}.md", "\n\n".join(parts) + f"\n\n[This notebook](/tutorials/{page}.ipynb)\n")
        pages.append(page)
    texts = [path.stem for path in sorted((ROOT / "tutorials").glob("*.md")) if path.stem not in [*pages, "README"]]
    with (SOURCE / "tutorials" / "README.md").open("a") as readme:
        readme.write("\n:::{toctree}\n:hidden:\n\n" + "\n".join(pages + texts) + "\n:::\n")


def shown(output: dict[str, Any], notebook: str, number: str) -> str:
    """What a cell gave, as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = SOURCE / "tutorials" / f"{notebook}-{number}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![what the cell above draws]({picture.name})"
    return f"```text\n{''.join(output.get('text', data.get('text/plain', '')))}\n```"


def main() -> int:
    """Builds the site; returns 0, or 1 where something is wrong with it."""
    from sphinx.cmd.build import build_main

    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    copy_pages()
    for write_pages in (write_tutorials, write_reference, write_command_line, write_benchmarks, write_index):
        write_pages()
    here = str(pathlib.Path(__file__).parent)
    code: int = build_main(
        ["-c", here, "-b", "html", "-d", str(SITE) + "-doctrees", "-W", "--keep-going", "-q", str(SOURCE), str(SITE)]
    )
    return code or check.main(SITE, names.documented())


if __name__ == "__main__":
    sys.exit(main())
