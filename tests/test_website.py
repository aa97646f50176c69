"""The parts of the documentation site: docstrings become what Sphinx reads, nothing public is missing, broken links are found."""

import ast
import importlib
import pathlib
import re

import pytest

import keras_kd
from tools.website import check, docstrings, names, tables

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(keras_kd.__file__).parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def rst(text, links=None):
    return "\n".join(docstrings.to_rst(text.split("\n"), (links or {}).get))


def test_no_public_name_is_missing():
    """What each public module lists in its source, read without the code that writes the reference."""
    expected = {f"keras_kd.{name}" for name in keras_kd.__all__ if not name.startswith("_") and (PACKAGE / name) not in folders()}
    for folder in folders():
        for node in ast.parse((folder / "__init__.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                expected |= {f"keras_kd.{folder.name}.{name}" for name in ast.literal_eval(node.value)}
    modules = {f"keras_kd.{path.stem}" for path in PACKAGE.glob("*.py")}
    assert len(expected) > 120
    assert expected - modules - set(names.documented()) == set()


def folders():
    return [path.parent for path in PACKAGE.glob("*/__init__.py") if not path.parent.name.startswith("_")]


def test_functions_and_classes_of_modules_without_a_list_are_found():
    found = set(names.documented())
    assert {"keras_kd.export.to_litert", "keras_kd.metrics.TeacherKL", "keras_kd.schedules.PolynomialDecay"} <= found
    assert not [name for name in found if "._" in name or name.startswith("keras_kd.demo")]


def test_what_has_two_names_is_described_once():
    homes = names.homes()
    assert homes[id(keras_kd.Recording)] == "keras_kd.Recording"
    assert "keras_kd.recording.Recording" in names.documented()


def test_names_in_texts_lead_to_one_thing():
    links = names.links()
    assert links["KDLoss"] == links["losses.KDLoss"] == links["keras_kd.losses.KDLoss"] == "keras_kd.losses.KDLoss"
    assert "get" not in links  # of losses or of schedules
    assert names.target("KDLoss(temperature=4.0)", links) == "keras_kd.losses.KDLoss"
    assert names.target("compress", links) is None  # a word, as likely as the function


def test_code_in_backticks_becomes_a_literal_or_a_link():
    assert rst("A `x_`, a `KDLoss`.", {"KDLoss": "keras_kd.losses.KDLoss"}) == (
        "A ``x_``, a :py:obj:`KDLoss <keras_kd.losses.KDLoss>`."
    )


def test_what_restructuredtext_would_read_as_markup_is_escaped():
    assert rst("|w| * 2 and `a * b`, of w_ and a_b") == r"\|w\| \* 2 and ``a * b``, of w\_ and a_b"
    assert rst("A star is *kept* here, and **here too**.") == "A star is *kept* here, and **here too**."
    assert rst("**kwargs: a * b * c") == r"\*\*kwargs: a \* b \* c"


def test_fences_and_tables_become_directives_and_examples_stay():
    text = "One line.\n\n```\nw * mask\n```\n\n| a | b |\n|---|---|\n| `1` | 2 |\n\nExample:\n\n>>> f(`1`)\n2"
    assert re.findall(r"^\.\. .*", rst(text), flags=re.MULTILINE) == [".. code-block:: text", ".. list-table::"]
    assert "    w * mask" in rst(text)
    assert "   * - ``1``\n     - 2" in rst(text)
    assert rst(text).rstrip().endswith("Example:\n\n>>> f(`1`)\n2")


def test_a_list_gets_the_empty_line_before_it():
    assert rst("Two:\n- one\n- two") == "Two:\n\n- one\n- two"


def test_results_become_tables_with_intervals():
    shown = tables.of(
        {
            "machine": {"cores": 2},
            "ratio": {"median": 1.02345, "median_low": 1.0, "median_high": 1.1},
            "runs": [{"a": 1, "b": {"c": {}}}],
        }
    )
    assert "| ratio | 1.023 (1 to 1.1) |" in shown
    assert "| a |\n|---|\n| 1 |" in shown  # without what is nested in it
    assert shown.index("## Runs") < shown.index("## Machine")


@pytest.fixture
def site(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "index.html").write_text('<a href="api/losses.html#keras_kd.KDLoss">x</a><a href="https://keras.io">y</a>')
    (tmp_path / "api" / "losses.html").write_text('<dt id="keras_kd.KDLoss"></dt><a href="../index.html">z</a><img src="data:,">')
    return tmp_path


def test_a_whole_site_has_no_problems(site):
    assert check.problems(site, ["keras_kd.KDLoss"]) == []


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('<a href="gone.html">', "links to gone.html, which is not there"),
        ('<img src="gone.png">', "links to gone.png, which is not there"),
        ('<a href="index.html#gone">', "no such place"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "fetches //fonts.example/x.css"),
    ],
    ids=["page", "picture", "place", "script", "style"],
)
def test_what_is_broken_is_said(site, added, said):
    (site / "other.html").write_text(added)
    (problem,) = check.problems(site)
    assert said in problem


def test_a_name_that_is_missing_is_said(site):
    assert check.problems(site, ["keras_kd.Other"]) == ["keras_kd.Other is not in the API reference"]


def prose(page):
    return re.sub(r"```.*?```|`[^`\n]*\]\([^`\n]*`", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives to headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_hold_in_the_repository(page):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation():
    build = importlib.import_module("tools.website.build")
    listed = {name for pages in build.NAVIGATION.values() for name in pages}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - listed == set()
