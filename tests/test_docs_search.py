"""docs/search.md says what the committed result says, and the script that makes it counts as it claims to."""

import importlib
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "search.md").read_text()
PATH = ROOT / "benchmarks" / "results" / "search.json"
RESULT = json.loads(PATH.read_text()) if PATH.exists() else None


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("search")


def some_runs(count=12, method="search", seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "method": method,
            "val_accuracy": round(float(rng.uniform(60, 95)), 2),
            "accuracy": round(float(rng.uniform(60, 95)), 2),
            "bytes": int(rng.integers(20, 100)),
            "gzip_bytes": int(rng.integers(20, 100)),
            "seconds": 1.0,
        }
        for _ in range(count)
    ]


def test_the_page_has_the_table_of_the_committed_result_and_none_without(benchmark):
    begin, end = benchmark.MARKERS
    shown = PAGE.split(begin)[1].split(end)[0].strip()
    assert shown == ("" if RESULT is None else benchmark.section(RESULT))


@pytest.mark.skipif(RESULT is None, reason="there is no committed result")
def test_summary_and_claims_are_those_of_the_runs(benchmark):
    assert benchmark.summary(RESULT["fronts"]) == RESULT["summary"]
    assert benchmark.verdicts(RESULT["summary"], RESULT["overhead"]) == RESULT["claims"]
    assert {one["trainings"] for one in RESULT["summary"].values()} == {RESULT["settings"]["trainings"]}


def test_a_front_is_what_no_other_run_beats_on_the_validation_images(benchmark):
    runs = some_runs()
    points = [(run["bytes"], -run["val_accuracy"]) for run in runs]
    expected = [
        run
        for run, point in zip(runs, points, strict=True)
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    ]
    assert 1 < len(expected) < len(runs)
    assert benchmark.front(runs) == sorted(expected, key=lambda run: run["bytes"])


def test_the_covered_area_is_counted_on_the_test_images(benchmark):
    runs = some_runs()
    chosen = benchmark.front(runs)
    size, low, steps = 90, benchmark.LEAST, 2000
    heights = low + (np.arange(steps) + 0.5) * (100 - low) / steps
    widths = [
        max([size - run["bytes"] for run in chosen if run["accuracy"] >= height and run["bytes"] < size], default=0)
        for height in heights
    ]
    assert benchmark.covered(runs, {"bytes": size}) == pytest.approx(np.mean(widths) / size, abs=2e-3)


def test_claims_compare_the_search_with_the_best_single_method(benchmark):
    low, mid, high = ({"val_accuracy": v, "accuracy": v, "gzip_bytes": 10, "seconds": 1.0} for v in (80.0, 85.0, 90.0))
    fronts = {
        "original": {"method": "original", "accuracy": 92.0, "bytes": 100, "gzip_bytes": 90},
        "search/0": {"method": "search", "bytes": 20, **high},
        "a/0": {"method": "a", "bytes": 20, **low},
        "b/0": {"method": "b", "bytes": 50, **mid},
    }
    times = {"a training alone": [10, 20, 10], "in KerasTuner alone": [10.5, 21, 30], "a trial": [11.5, 21.5, 30]}
    overhead = {"seconds": times | {"a training of the fronts": [9, 20, 30]}}
    claims = {one["claim"]: one for one in benchmark.verdicts(benchmark.summary(fronts), overhead)}
    area = claims["covered area, more than a"]  # (100 - 20) * 10 of 100 * 30; b: 50 * 15
    assert area["found"] == pytest.approx(80 * 20 / 3000 - 80 * 10 / 3000, abs=1e-4)
    assert claims["points of accuracy within 60% of the bytes, more than b"]["found"] == 5.0
    assert claims["points of accuracy within 25% of the bytes, more than a"]["found"] == 10.0
    assert not any("15%" in claim for claim in claims)  # none is as small
    text = "a trial: time over that of KerasTuner alone, as a share of a training of 20 s"
    assert claims[text] == {
        "claim": text,
        "found": 0.025,
        "limit": "at most 0.05",
        "holds": True,
    }
    assert benchmark.added(overhead) == {"in KerasTuner alone": 1, "a trial": 1.5}
    fronts["search/0"]["accuracy"] = 79.0
    worse = {one["claim"]: one["holds"] for one in benchmark.verdicts(benchmark.summary(fronts), {})}
    assert set(worse.values()) == {False}


def test_every_method_has_as_many_trainings_of_as_many_steps(benchmark):
    settings = benchmark.Settings()
    assert {len(sizes) for sizes in benchmark.SIZES.values()} == {settings.sizes}
    assert (settings.trainings, settings.steps) == (12, 3 * 79)
