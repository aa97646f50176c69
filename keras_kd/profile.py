"""How large and how fast is a model? Measured, not estimated."""

import dataclasses
import gzip
import os
import pathlib
import statistics
import time
from typing import Any

import keras
import numpy as np

from keras_kd.export import open_litert


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one inference of one sample, in milliseconds.

    Attributes:
        median: median over the runs.
        low: 10th percentile.
        high: 90th percentile.
        threads: threads of the interpreter.
        runs: number of runs.
    """

    median: float
    low: float
    high: float
    threads: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """Size and speed of a model and its LiteRT file.

    Attributes:
        parameters: number of weights.
        size: bytes of the file.
        gzip_size: bytes of the file after gzip.
        latency: see `Latency`.
    """

    parameters: int
    size: int
    gzip_size: int
    latency: Latency


def profile(model: keras.Model, path: str | os.PathLike[str], *, threads: int = 1, runs: int = 200) -> Profile:
    """Measures a model by the LiteRT file that was exported from it.

    Args:
        model: the Keras model, for its parameters.
        path: the file, as `keras_kd.export.to_litert` wrote it.
        threads: threads of the interpreter.
        runs: number of timed inferences.

    Returns:
        A `Profile`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite")
    >>> keras_kd.profile.profile(model, report.path).parameters
    15
    """
    content = pathlib.Path(path).read_bytes()
    latency = measure_latency(content, threads=threads, runs=runs)
    return Profile(model.count_params(), len(content), len(gzip.compress(content, 9)), latency)


def measure_latency(file: str | os.PathLike[str] | bytes, *, threads: int = 1, runs: int = 200, warmup: int = 20) -> Latency:
    """Times single inferences of one sample in the LiteRT interpreter.

    Args:
        file: a LiteRT file, or its content.
        threads: threads of the interpreter.
        runs: number of timed inferences, at least 1.
        warmup: inferences before that.

    Returns:
        A `Latency`, in milliseconds.
    """
    if runs < 1:
        raise ValueError(f"`runs` must be at least 1. Received: runs={runs}.")
    interpreter = open_litert(file, threads=threads)
    for detail in interpreter.get_input_details():
        interpreter.resize_tensor_input(detail["index"], [1 if n == -1 else n for n in detail["shape_signature"]])
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], _sample(detail))
    times = []
    for index in range(warmup + runs):
        start = time.perf_counter()
        interpreter.invoke()
        if index >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    low, high = np.percentile(times, [10, 90])
    return Latency(statistics.median(times), float(low), float(high), threads, runs)


def _sample(detail: dict[str, Any]) -> np.ndarray:
    shape, dtype = detail["shape"], detail["dtype"]
    if np.issubdtype(dtype, np.floating):
        return np.random.default_rng(0).normal(size=shape).astype(dtype)
    return np.ones(shape, dtype)
