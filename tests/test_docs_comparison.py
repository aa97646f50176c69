"""The page on keras.distillation says what is true: its tests exist, and its figures are those of the committed result."""

import json
import pathlib
import re

import pytest

from tests import test_keras_distillation_defects as defects

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / "docs" / "comparison.md"
PAGE = PATH.read_text()
RESULT = json.loads((ROOT / "benchmarks/results/comparison.json").read_text())
NUMBERS = [f"{number:02}" for number in range(1, 25)]
FIGURES, ONE_BY_ONE = (PAGE.split(f"## {title}")[1].split("\n## ")[0] for title in ("Figures", "One by one"))
MARKS = re.findall(r"(`[^`]+`|[\d,.]*\d)<!--([\w.]+)-->", PAGE)


def measured(place):
    value = RESULT["figures"] | RESULT
    for key in place.split("."):
        value = value[key]
    return value


def agrees(written, value):
    if written.startswith("`"):
        return written == f"`{value}`"
    decimals = len(written.partition(".")[2])
    return float(written.replace(",", "")) == pytest.approx(value, abs=0.5001 * 10**-decimals)


def test_every_figure_is_that_of_the_result():
    assert len(MARKS) > 100
    assert [(written, place) for written, place in MARKS if not agrees(written, measured(place))] == []


def test_no_mark_is_left_without_its_figure():
    assert PAGE.count("<!--") == len(MARKS)


def test_both_columns_of_the_table_hold_marked_figures_only():
    rows = [line.split(" | ") for line in FIGURES.splitlines() if line.startswith("| ") and "<!--" in line]
    for *_, theirs, ours in rows:
        for cell in (theirs, ours):
            rest = re.sub(r"(`[^`]+`|[\d,.]*\d)<!--[\w.]+-->", "", cell, count=1)
            assert rest.strip(" |%") == "", cell
            assert rest != cell
    assert {row[0].strip("| ") for row in rows} - {""} == {str(int(number)) for number in NUMBERS}


def test_every_defect_has_tests_that_exist():
    items = dict(re.findall(r"^\*\*(\d+)\. (.*?)(?=^\*\*\d|\Z)", ONE_BY_ONE, flags=re.DOTALL | re.MULTILINE))
    assert [f"{int(number):02}" for number in items] == NUMBERS
    for number, item in zip(NUMBERS, items.values(), strict=True):
        named = re.findall(r"`(test_\w+)`", item)
        assert named, number
        assert all(name.startswith(f"test_{number}_") and callable(getattr(defects, name)) for name in named), named


def test_every_test_of_a_defect_is_named():
    assert set(re.findall(r"`(test_\w+)`", PAGE)) == {name for name in vars(defects) if re.match(r"test_\d\d_", name)}


def test_every_defect_was_measured_on_the_version_that_the_tests_are_for():
    assert sorted(RESULT["figures"]) == NUMBERS
    assert RESULT["versions"]["keras"] == defects.MEASURED
    assert f"`{defects.MEASURED}`<!--versions.keras-->" in PAGE


def test_every_file_that_it_links_to_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGE)
    assert len(targets) >= 3
    for target in targets:
        assert (PATH.parent / target).exists(), target
