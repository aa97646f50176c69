"""How many multiply-accumulates may a model have to be fast enough? Files of smaller models, measured in turn with its own."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

from keras_kd import export, profile
from keras_kd._progress import Progress, Verbose

_TRIES = 8
_NEAR = 0.97  # of the wanted share: below this a larger model is tried
_RUNS = 400


def within(
    planner: Any, orders: list[np.ndarray], curves: list[np.ndarray], latency: float, verbose: Verbose
) -> tuple[Any, tuple[int, int], float]:
    """The largest model found that is fast enough.

    Args:
        planner: a `Planner`.
        orders: in which order the channels of each group go.
        curves: what all removed ones cost.
        latency: highest share of the model's own time.
        verbose: of the progress.

    Raises:
        ValueError: if none of those that were tried is fast enough.
    """
    progress = Progress(_TRIES, what="models", title="latency", verbose=verbose)
    with tempfile.TemporaryDirectory() as folder, progress:
        whole = pathlib.Path(folder) / "whole.tflite"
        export.to_litert(planner.found.model, whole, verbose=0)
        low, high, share = 0.0, 1.0, float(latency)
        best, fastest, refused = None, np.inf, None
        for _ in range(_TRIES):
            limits = dataclasses.replace(planner.wanted, macs=min(planner.wanted.macs or np.inf, share * planner.costs.macs))
            try:
                found = planner.rebuilt(orders, curves, limits)
            except ValueError as error:  # there is no such small model
                refused = error
                low, share = share, (share + high) / 2
                continue
            ratio = _ratio(whole, found[0].model, pathlib.Path(folder) / "smaller.tflite")
            progress.advance()
            fastest = min(fastest, ratio)
            if ratio <= latency:
                low, best = share, found
                if ratio >= _NEAR * latency or share >= 0.99:
                    break
            else:
                high = share
            guess = share * latency / ratio
            share = guess if low < guess < high else (low + high) / 2
        if best is None and refused is not None and fastest == np.inf:
            raise refused
        if best is None:
            raise ValueError(
                f"No model as fast as `latency` wants was found by removing channels: the fastest takes {fastest:.2f} of the "
                f"time. Received: latency={latency}."
            )
        return best


def _ratio(whole: pathlib.Path, model: Any, path: pathlib.Path) -> float:
    export.to_litert(model, path, verbose=0)
    times = profile.measure_latencies({"whole": whole, "smaller": path}, runs=_RUNS, verbose=0)
    return times["smaller"].median / times["whole"].median
