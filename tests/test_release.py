"""Habits of releases: one place for the version, a changelog that tools can read, lower bounds that a script can install."""

import pathlib
import re
import subprocess
import tomllib

import pytest

import keras_kd
from tools import check_oldest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
TEXT = {"check": True, "capture_output": True, "text": True}
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def numbers(version):
    return tuple(int(one) for one in version.split("."))


def test_the_version_stands_in_one_file():
    version = keras_kd.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "keras_kd", "tools", "deploy", "*.toml", "*.cfg", "Makefile"], **TEXT
    )
    places = [name for name in listed.stdout.split() if f'"{version}"' in (ROOT / name).read_text(errors="ignore")]
    assert places == ["keras_kd/_version.py"]


def test_the_changelog_is_one_that_tools_can_read():
    headings = re.findall(r"^## (.*)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", one) for one in headings[1:]]
    assert all(released), headings
    versions = [numbers(one[1]) for one in released]
    dates = [one[2] for one in released]
    assert (versions, dates) == (sorted(versions, reverse=True), sorted(dates, reverse=True))
    assert not versions or versions[0] <= numbers(keras_kd.__version__)
    for section in re.split(r"^## .*$", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, flags=re.MULTILINE)
        assert set(kinds) <= set(KINDS)
        assert kinds == sorted(set(kinds), key=KINDS.index)


def test_every_direct_dependency_with_a_lower_bound_is_installed_by_it():
    project = {
        "dependencies": ["keras>=3.12", "setuptools; python_version >= '3.12'", "numpy >= 1.26; python_version < '3.14'"],
        "optional-dependencies": {"tuner": ["keras-tuner>=1.4.8", "tensorboard"], "onnx": ["keras>=3.12"], "dev": ["ruff>=0.9"]},
    }
    assert check_oldest.bounds(project) == ["keras==3.12", "numpy==1.26 ; python_version < '3.14'", "keras-tuner==1.4.8"]
    project["optional-dependencies"]["onnx"] = ["keras>=3.13"]
    with pytest.raises(ValueError, match="keras must have one lower bound. Received: keras==3.12 and keras==3.13"):
        check_oldest.bounds(project)
    found = check_oldest.bounds(PROJECT)
    assert {one.split("==")[0] for one in found} >= {"keras", "numpy", "tensorflow", "ai-edge-litert", "keras-tuner"}


def test_the_files_that_the_oldest_versions_are_tried_on_are_there():
    assert [path for path in check_oldest.chosen() if not (ROOT / path).is_file()] == []
