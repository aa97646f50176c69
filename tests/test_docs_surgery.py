"""docs/surgery.md says what the committed result says."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "surgery.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "surgery.json").read_text())


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("surgery")


def test_the_table_is_what_the_script_makes_of_the_committed_result(benchmark):
    begin, end = benchmark.MARKERS
    assert PAGE.split(begin)[1].split(end)[0].strip() == benchmark.section(RESULT)


def test_points_lost_and_claims_are_those_of_the_runs(benchmark):
    lost = benchmark.summary(RESULT["curves"], RESULT["tuning"], RESULT["torch_pruning"])
    assert lost == RESULT["points_lost"]
    assert benchmark.verdicts(lost, RESULT["seconds"]) == RESULT["claims"]


def test_every_method_was_run_at_every_share_for_three_seeds(benchmark):
    for share in benchmark.SHARES:
        for method, fit in benchmark.runs_at(share):
            assert RESULT["points_lost"][f"{share}/{method}/{fit}"]["seeds"] == 3
