"""How large and how fast is a model? Measured, not estimated."""

import dataclasses
import gzip
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _macs, _taps
from keras_kd.export import open_litert


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one inference of one sample, in milliseconds.

    Attributes:
        median: median over the runs.
        low: 10th percentile.
        high: 90th percentile.
        threads: threads of the interpreter; 0 where TensorFlow decides.
        runs: number of runs.
    """

    median: float
    low: float
    high: float
    threads: int
    runs: int


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """What one layer holds and costs.

    Attributes:
        path: path of the layer, such as `"backbone/conv1"`; `"(between layers)"` stands for operations outside of layers.
        kind: its class.
        output_shape: shape of its output for one sample; None if it gives several.
        parameters: number of its own weights.
        nonzero_parameters: how many of them are not 0.
        macs: multiply-accumulates of one sample, over all calls; None where a loop hides them.
        activation_bytes: bytes of its outputs for one sample.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...] | None
    parameters: int
    nonzero_parameters: int
    macs: int | None
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """Size and speed of a model, and of its LiteRT file if there is one.

    Attributes:
        parameters: number of weights.
        nonzero_parameters: how many of them are not 0.
        macs: multiply-accumulates of one sample in convolutions, dense layers, attention and recurrent layers, as TensorFlow's
            profiler counts them (half of its float operations); additions, normalisations and activations count nothing.
        uncounted: layers whose multiply-accumulates are not in `macs`, since a loop hides them.
        peak_activation_bytes: the largest sum of bytes of inputs and outputs of layers that live at the same time in one inference
            of one sample, layer by layer: an output lives until its last reader is done. Views (reshape, flatten) share memory.
        layers: every layer that computes, in the order of the first calls.
        keras_latency: of the model's inference compiled by `tf.function`.
        size: bytes of the file.
        gzip_size: bytes of the file after gzip.
        latency: of the file in the LiteRT interpreter.
    """

    parameters: int
    nonzero_parameters: int
    macs: int
    uncounted: tuple[str, ...]
    peak_activation_bytes: int
    layers: tuple[LayerProfile, ...]
    keras_latency: Latency
    size: int | None = None
    gzip_size: int | None = None
    latency: Latency | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A table with a row for each layer and one for the sum."""
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layer", "class", "output", "parameters", "non-zero", "MACs", "activations, bytes"):
            made.add_column(heading, justify="left" if heading in ("layer", "class", "output") else "right", no_wrap=True)
        for layer in self.layers:
            shape = "" if layer.output_shape is None else str(layer.output_shape[1:])
            macs = "not counted" if layer.macs is None else f"{layer.macs:,}"
            numbers = (f"{layer.parameters:,}", f"{layer.nonzero_parameters:,}", macs, f"{layer.activation_bytes:,}")
            made.add_row(layer.path, layer.kind, shape, *numbers)
        total = (
            f"{self.parameters:,}",
            f"{self.nonzero_parameters:,}",
            f"{self.macs:,}",
            f"{self.peak_activation_bytes:,} at once",
        )
        made.add_row("all", "", "", *total)
        console = Console(width=200)
        with console.capture() as captured:
            console.print(made)
            for name, latency in (("Keras", self.keras_latency), ("LiteRT", self.latency)):
                if latency is not None:
                    threads = f"{latency.threads} threads" if latency.threads else "TensorFlow's threads"
                    spread = f"{latency.low:.3f} to {latency.high:.3f}"
                    console.print(f"{name}: {latency.median:.3f} ms ({spread}, {latency.runs} runs, {threads})", highlight=False)
            if self.size is not None:
                console.print(f"File: {self.size:,} bytes, {self.gzip_size:,} after gzip", highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()


def profile(
    model: keras.Model, path: str | os.PathLike[str] | None = None, *, data: Any = None, threads: int = 1, runs: int = 200
) -> Profile:
    """Measures a model, and the LiteRT file that was exported from it.

    Args:
        model: a built Keras model; for a Distiller, its student.
        path: the file, as `keras_kd.export.to_litert` wrote it; None: the model alone.
        data: a sample or more of the inputs, nested as the model takes them, for models whose input shapes have unknown lengths.
        threads: threads of the LiteRT interpreter.
        runs: number of timed inferences.

    Returns:
        A `Profile`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, `runs` is not positive, or input shapes have unknown lengths and there is no `data`.
        FileNotFoundError: if there is no file at `path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite")
    >>> found = keras_kd.profile.profile(model, report.path)
    >>> found.parameters, found.macs
    (15, 12)
    """
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    if path is not None and not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'`path` must be a LiteRT file. Received: path="{path}", where there is none.')
    specs = _specs_of_one(model, data)
    costs, peak = _macs.measure(model, specs)
    layers = _layer_profiles(model, costs)
    nonzero = sum(int(np.count_nonzero(weight)) for weight in model.get_weights())
    uncounted = tuple(cost.path for cost in costs if cost.macs is None)
    macs = sum(cost.macs or 0 for cost in costs)
    numbers = (model.count_params(), nonzero, macs, uncounted, peak, layers, _keras_latency(model, specs, runs))
    if path is None:
        return Profile(*numbers)
    content = pathlib.Path(path).read_bytes()
    return Profile(*numbers, len(content), len(gzip.compress(content, 9)), measure_latency(content, threads=threads, runs=runs))


def _specs_of_one(model: keras.Model, data: Any) -> Any:
    """Specs of one sample."""
    if data is not None:
        return keras.tree.map_structure(lambda x: tf.TensorSpec((1, *np.shape(x)[1:]), tf.as_dtype(np.asarray(x).dtype)), data)
    specs = _taps.input_specs(model)
    known = specs is not None and all(None not in tuple(spec.shape)[1:] for spec in keras.tree.flatten(specs))
    if not known:
        raise ValueError(
            f'The input shapes of "{model.name}" have unknown lengths. Received: data=None. Pass `data`, a sample of its inputs.'
        )
    return keras.tree.map_structure(lambda spec: tf.TensorSpec((1, *spec.shape[1:]), spec.dtype), specs)


def _layer_profiles(model: keras.Model, costs: list[_macs.LayerCost]) -> tuple[LayerProfile, ...]:
    """Costs with each layer's weights; layers that hold weights, and leave the computing to their parts, come last."""
    holders = _taps.find_layers(model) | {"(model)": model}
    seen: set[int] = set()

    def weights_of(path: str) -> tuple[int, int]:
        own = [weight for weight in holders[path].weights if id(weight) not in seen] if path in holders else []
        seen.update(id(weight) for weight in own)
        arrays = [keras.ops.convert_to_numpy(weight) for weight in own]
        return sum(array.size for array in arrays), sum(int(np.count_nonzero(array)) for array in arrays)

    found = [
        LayerProfile(cost.path, cost.kind, cost.output_shape, *weights_of(cost.path), cost.macs, cost.activation_bytes)
        for cost in costs
    ]
    for path in sorted(holders, key=lambda path: -path.count("/")):  # what a part holds is not counted for the whole, too
        parameters, nonzero = weights_of(path)
        if parameters:
            found.append(LayerProfile(path, type(holders[path]).__name__, None, parameters, nonzero, 0, 0))
    return tuple(found)


def _keras_latency(model: keras.Model, specs: Any, runs: int, warmup: int = 20) -> Latency:
    x = keras.tree.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), specs)

    @tf.function
    def infer(x: Any) -> Any:
        return model(x, training=False)

    return _timed(lambda: keras.tree.map_structure(lambda y: y.numpy(), infer(x)), 0, runs, warmup)


def _timed(once: Callable[[], Any], threads: int, runs: int, warmup: int) -> Latency:
    if runs < 1:
        raise ValueError(f"`runs` must be at least 1. Received: runs={runs}.")
    times = []
    for index in range(warmup + runs):
        start = time.perf_counter()
        once()
        if index >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    low, high = np.percentile(times, [10, 90])
    return Latency(statistics.median(times), float(low), float(high), threads, runs)


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
    return _timed(interpreter.invoke, threads, runs, warmup)


def _sample(detail: dict[str, Any]) -> np.ndarray:
    shape, dtype = detail["shape"], detail["dtype"]
    if np.issubdtype(dtype, np.floating):
        return np.random.default_rng(0).normal(size=shape).astype(dtype)
    return np.ones(shape, dtype)
