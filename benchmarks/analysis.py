"""What does a linear probe cost, next to the matrix product that it needs, and next to scikit-learn?

The claim: `LinearProbe.adapt` on 60,000 rows of 512 features takes at most 3 times the product of the centred float64 features with
themselves, and its time grows in proportion to the rows.
"""

import argparse
import datetime
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import distiller as steps_benchmark  # its neighbour in this folder
import keras
import numpy as np
import rich
import rich.table
import sklearn
from sklearn.linear_model import LogisticRegression, Ridge

import keras_kd

RESULT = pathlib.Path(__file__).parent / "results" / "analysis.json"
LIMIT = 3.0
SIZES = [(15000, 512), (30000, 512), (60000, 512), (60000, 128), (60000, 256), (60000, 1024)]
CLASSES = 10


def make_data(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features in which ten classes are centres in noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, rows)
    centres = rng.normal(size=(CLASSES, width))
    return (centres[labels] + 5 * rng.normal(size=(rows, width))).astype("float32"), labels


def product(x: np.ndarray) -> np.ndarray:
    """The scatter matrix, as one product."""
    centred = x.astype("float64") - x.mean(0, dtype="float64")
    return centred.T @ centred


def seconds(function: Callable[[], Any]) -> float:
    """Time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(rows: int, width: int, rounds: int) -> dict[str, Any]:
    """Times of one size, in turns."""
    x, y = make_data(rows, width)
    probe = keras_kd.layers.LinearProbe(CLASSES)
    functions = {
        "probe": lambda: probe.adapt(x, y),
        "product": lambda: product(x),
        "ridge": lambda: Ridge(alpha=1e-3).fit(x, np.eye(CLASSES)[y]),
    }
    for function in functions.values():
        function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(rounds)]
    found: dict[str, Any] = {"rows": rows, "width": width}
    found |= {name: steps_benchmark.summarize([one[name] for one in times]) for name in functions}
    return found | {"probe / product": steps_benchmark.summarize([one["probe"] / one["product"] for one in times])}


def main() -> int:
    """Measures, shows, writes; returns 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="smoke test: nothing is written, no claim enforced")
    quick = parser.parse_args().quick
    sizes, rounds = ([(2000, 64)], 2) if quick else (SIZES, 7)
    found = [measure(rows, width, rounds) for rows, width in sizes]
    x, y = make_data(*sizes[0])
    logistic = seconds(lambda: LogisticRegression(max_iter=50).fit(x, y))
    main_size = next((one for one in found if (one["rows"], one["width"]) == (60000, 512)), found[0])
    ratio = main_size["probe / product"]["median"]
    claim = {"claim": "probe / product, 60,000 x 512", "limit": f"<= {LIMIT}", "found": ratio, "holds": ratio <= LIMIT}
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (np, keras, sklearn, keras_kd)}
        | {"python": platform.python_version()},
        "machine": steps_benchmark.describe_machine(),
        "sizes": found,
        "logistic_regression": {"rows": sizes[0][0], "width": sizes[0][1], "max_iter": 50, "seconds": round(logistic, 3)},
        "claims": [claim],
    }
    table = rich.table.Table("rows", "features", "probe, s", "product, s", "Ridge (float32), s", "probe / product")
    for one in found:
        times = (f"{one[name]['median']:.3f}" for name in ("probe", "product", "ridge"))
        table.add_row(f"{one['rows']:,}", f"{one['width']:,}", *times, f"{one['probe / product']['median']:.2f}")
    rich.print(table)
    rich.print(f"LogisticRegression, 50 iterations, {sizes[0]}: {logistic:.2f} s")
    if not quick:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return int(not claim["holds"] and not quick)


if __name__ == "__main__":
    sys.exit(main())
