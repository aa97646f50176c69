"""The comparison of commits finds the slower one, on a repository whose library only sleeps; and its own benchmarks run."""

import io
import json
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = "import time\n\n\ndef work():\n    time.sleep({seconds})\n"
SCRIPT = "import keras_kd\n\n\ndef prepare():\n    return keras_kd.work\n"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_commits

    return compare_commits


@pytest.fixture
def repository(tmp_path, benchmark, monkeypatch):
    """Three commits, tagged: one that sleeps, one that sleeps twice as long, one that fails."""
    folder = tmp_path / "repository"
    (folder / "keras_kd").mkdir(parents=True)

    def git(*words):
        subprocess.run(
            ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True
        )

    git("init")
    for tag, text in (
        ("fast", LIBRARY.format(seconds=0.002)),
        ("slow", LIBRARY.format(seconds=0.04)),
        ("broken", "raise ValueError('cannot')\n"),
    ):
        (folder / "keras_kd" / "__init__.py").write_text(text)
        git("add", ".")
        git("commit", "-m", tag)
        git("tag", tag)
    (tmp_path / "sleep.py").write_text(SCRIPT)
    monkeypatch.setattr(benchmark, "ROOT", folder)
    return folder


def run(benchmark, tmp_path, capsys, *words):
    settings = ["--script", str(tmp_path / "sleep.py"), "--rounds", "6", "--steps", "2", "--pairs", "2", "--json"]
    code = benchmark.main([*words, *settings])
    return code, json.loads(capsys.readouterr().out)["sleep"]


def test_the_slower_commit_is_found_and_ends_with_1(benchmark, repository, tmp_path, capsys):
    code, found = run(benchmark, tmp_path, capsys, "fast", "slow")
    assert code == 1
    assert 1.5 < found["low"] <= found["ratio"] <= found["high"]
    code, found = run(benchmark, tmp_path, capsys, "slow", "fast")
    assert (code, found["ratio"] < 0.7) == (0, True)
    worktrees = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], check=True, capture_output=True, text=True
    ).stdout
    assert len(worktrees.splitlines()) == 1  # those of the comparison are gone


def test_the_files_as_they_are_can_be_compared(benchmark, repository, tmp_path, capsys):
    (repository / "keras_kd" / "__init__.py").write_text(LIBRARY.format(seconds=0.04))
    assert run(benchmark, tmp_path, capsys, "fast", ".")[0] == 1
    assert (repository / "keras_kd" / "__init__.py").exists()


def test_what_a_revision_cannot_run_is_named(benchmark, repository, tmp_path, capsys):
    code, found = run(benchmark, tmp_path, capsys, "fast", "broken")
    assert (code, found) == (2, "new revision: ValueError: cannot")


def test_a_revision_that_is_not_there_is_no_slower_one(benchmark, repository, capsys):
    assert benchmark.main(["nothing", "fast"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("compare_commits.py: git rev-parse")
    assert "nothing^{commit}" in captured.err


def test_a_process_that_dies_is_no_slower_revision(benchmark, repository, tmp_path, capsys):
    (repository / "keras_kd" / "__init__.py").write_text("import os\nos._exit(3)\n")
    assert benchmark.main(["fast", ".", "--script", str(tmp_path / "sleep.py"), "--rounds", "6"]) == 2
    assert "A process ended" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["distiller", "quantization", "prune_channels"])  # the others are like these
def test_its_own_benchmarks_run(benchmark, name, monkeypatch):
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    monkeypatch.setattr(benchmark, "SAMPLES", 64)
    said = []
    benchmark.BENCHMARKS[name](benchmark.Turns(io.StringIO("go\nenough\n"), said.append, 2))
    assert said[0] == {"ready": True}
    assert [one["seconds"] > 0 for one in said[1:]] == [True]


def test_slower_is_what_is_surely_slower_by_more_than_the_limit(benchmark):
    times = [[1.0, 1.2], [1.0, 1.19], [2.0, 2.42], [1.0, 1.21], [1.0, 1.15], [1.0, 1.3]]
    found = benchmark.summary(times)
    assert found["ratio"] == pytest.approx(1.205)
    assert (found["old_ms"], found["new_ms"]) == (1000.0, pytest.approx(1205))
    assert benchmark.is_slower(found, 1.1)
    assert not benchmark.is_slower(found, 1.3)
    assert not benchmark.is_slower(benchmark.summary(times[:5]), 1.1)  # one time in 16 all five are on one side by chance
    assert not benchmark.is_slower(benchmark.summary([[1.0, 0.9], [1.0, 1.2], [1.0, 1.3]] * 2), 1.1)  # the interval holds 1
