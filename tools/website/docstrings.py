"""How do docstrings written in Markdown become what Sphinx reads? Fences, code in backticks and lists, line by line."""

import itertools
import re
from collections.abc import Callable, Iterator

_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
# What stays as it is or becomes a literal: code in backticks, and words between stars.
_KEPT = re.compile(r"(``.+?``|`[^`]+`|(?<![\w*])(?:\*\w[\w ]*\*|\*\*\w[\w ]*\*\*)(?![\w*]))", flags=re.DOTALL)
_ROW = re.compile(r"^\s*\|.*\|\s*$")
_ITEM = re.compile(r"^\s*(-|\d+\.) ")


def to_rst(lines: list[str], reference: Callable[[str], str | None]) -> list[str]:
    """Turns a docstring into reStructuredText with Google's sections, which `sphinx.ext.napoleon` takes from there.

    Args:
        lines: of a docstring, without its indentation.
        reference: what a name in backticks links to, as a full name; None for no link.

    Returns:
        Lines of reStructuredText.
    """
    written: list[str] = []
    for kind, block in _blocks(lines):
        if kind == "fence":
            margin, language = _FENCE.match(block[0]).groups()  # type: ignore[union-attr]
            written += ["", f"{margin}.. code-block:: {language or 'text'}", ""]
            written += ["    " + line if line.strip() else "" for line in block[1:]] + [""]
        elif kind == "doctest":
            written += block
        elif kind == "table":
            written += _table(block, reference)
        else:
            written += _text("\n".join(_apart(block)), reference).split("\n")
    return written


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Parts of a docstring: fences without their last line, doctests with what they print, tables, and text."""
    text: list[str] = []
    rest = iter(lines)
    for line in rest:
        if _ROW.match(line):
            yield "text", text
            yield "table", [line, *itertools.takewhile(_ROW.match, rest)]
            text = [""]
            continue
        if not _FENCE.match(line) and not line.lstrip().startswith(">>>"):
            text.append(line)
            continue
        yield "text", text
        text, block, fenced = [], [line], bool(_FENCE.match(line))
        for inner in rest:
            if fenced and _FENCE.match(inner):
                break
            block.append(inner)
            if not fenced and not inner.strip():
                break
        yield ("fence" if fenced else "doctest"), block
    yield "text", text


def _table(rows: list[str], reference: Callable[[str], str | None]) -> Iterator[str]:
    """A table of Markdown, whose second row is the line under its head, as a list-table."""
    margin = rows[0][: len(rows[0]) - len(rows[0].lstrip())]
    yield from ("", f"{margin}.. list-table::", f"{margin}   :header-rows: 1", "")
    for row in [rows[0], *rows[2:]]:
        cells = [_text(cell.strip(), reference) for cell in row.strip().strip("|").split("|")]
        yield from (f"{margin}   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(cells))
    yield ""


def _apart(lines: list[str]) -> Iterator[str]:
    """Puts the empty line before a list, which Markdown can do without."""
    before = ""
    for line in lines:
        indented = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
        if _ITEM.match(line) and before.strip() and not _ITEM.match(before) and not indented:
            in_list = before.startswith("  ") and not line.startswith(" ")  # the second line of the item above
            if not in_list:
                yield ""
        before = line
        yield line


def _text(text: str, reference: Callable[[str], str | None]) -> str:
    parts = _KEPT.split(text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = re.sub(r"([*|])", r"\\\1", re.sub(r"(?<=\w)_(?!\w)", r"\\_", part))
            continue
        if part[0] == "*":
            continue
        code = " ".join(part.strip("`").split())
        target = reference(code)
        parts[index] = f":py:obj:`{code} <{target}>`" if target else f"``{code}``"
        if index + 1 < len(parts) and parts[index + 1][:1].isalnum():
            parts[index + 1] = "\\ " + parts[index + 1]  # what follows at once: `Dense`s
    return "".join(parts)
