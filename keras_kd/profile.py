"""How large and how fast is a model? Measured, not estimated."""

import contextlib
import dataclasses
import gzip
import io
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _calls, _litert, _macs, _taps
from keras_kd._outputs import shapes_agree
from keras_kd._progress import Progress, Verbose
from keras_kd.callbacks._kernels import sparsity_of
from keras_kd.export import open_litert

_TURN = 10  # inferences of one file before it is the next one's turn


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one inference of one sample, in milliseconds.

    Attributes:
        median: median over the runs.
        low: 10th percentile.
        high: 90th percentile.
        threads: threads that may work on one operation.
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
        path: path of the layer, such as `"backbone/conv1"`; `"(model)"` stands for what the model computes outside of its layers.
        kind: its class.
        output_shape: shape of its output for a batch of one; None if it gives several, or is not called.
        parameters: number of its own weights, without those of layers inside that have rows of their own.
        nonzero_parameters: how many of them are not 0.
        macs: multiply-accumulates of one sample, over all calls; None where they cannot be counted.
        activation_bytes: bytes of memory that its outputs take for one sample; 0 for views.
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
        macs: multiply-accumulates of one sample: those of matrix products, convolutions and einsums in the graph that TensorFlow
            runs, half of the float operations that its profiler gives for them; times the turns of loops, the larger branch of
            conditions. A convolution counts output positions times kernel, padding too. Additions, products by element,
            normalisations, pooling, embeddings and activation functions count nothing.
        uncounted: layers whose multiply-accumulates are not in `macs`: in loops inside functions or other loops, in Python
            functions and sparse products.
        peak_activation_bytes: the largest sum of bytes of tensors that live at the same time in one inference of one sample,
            layer by layer, each in its own type. Inputs count, outputs of layers, and what is computed between layers (`a + b`,
            scores of attention); weights and what is made inside of a layer without parts do not. A tensor lives from its making
            to its last reader, the model's outputs to the end. Views (reshape, flatten, dropout) share memory.
        layers: every layer without parts, recurrent ones as a whole, and others that compute or hold something themselves; in the
            order of the first calls.
        keras_latency: of the model's inference compiled by `tf.function`.
        size: bytes of the file.
        gzip_size: bytes of the file after gzip.
        latency: of the file in the LiteRT interpreter, for one sample, or one batch of a file with a batch size of its own.
        sparsity: share of zeros in the model's weights that `callbacks.Pruning` works on, in [0, 1]: kernels and embeddings, where
            the non-zero `nonzero_parameters` count biases and statistics, too.
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
    sparsity: float = 0.0

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
        macs = f"{'at least ' if self.uncounted else ''}{self.macs:,}"
        peak = f"{self.peak_activation_bytes:,} at once"
        made.add_row("all", "", "", f"{self.parameters:,}", f"{self.nonzero_parameters:,}", macs, peak)
        # Wide enough for any path, and without what a terminal would be given: colours, [tags] in names of layers.
        console = Console(
            file=io.StringIO(), width=1000, color_system=None, markup=False, emoji=False, highlight=False, force_jupyter=False
        )
        with console.capture() as captured:
            console.print(made)
            if self.sparsity >= 0.001:
                console.print(f"Zeros in kernels: {self.sparsity:.1%}")
            for name, latency in (("Keras", self.keras_latency), ("LiteRT", self.latency)):
                if latency is not None:
                    spread = f"{latency.low:.3f} to {latency.high:.3f}"
                    threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
                    console.print(f"{name}: {latency.median:.3f} ms ({spread}, {latency.runs} runs, {threads})")
            if self.size is not None:
                console.print(f"File: {self.size:,} bytes, {self.gzip_size:,} after gzip")
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()


def profile(
    model: keras.Model,
    path: str | os.PathLike[str] | None = None,
    *,
    data: Any = None,
    threads: int = 1,
    runs: int = 200,
    verbose: Verbose = "auto",
) -> Profile:
    """Measures a model, and the LiteRT file that was exported from it.

    Args:
        model: a built Keras model; for a Distiller, its student.
        path: the file, as `keras_kd.export.to_litert` wrote it; None: the model alone.
        data: inputs of one sample or more, nested as the model takes them, for models whose input shapes are not known; the first
            sample is measured. None: random numbers, ones for integers.
        threads: threads of the LiteRT interpreter.
        runs: number of timed inferences, in Keras and in LiteRT.
        verbose: 0 is silent; 1 or `"auto"` shows progress.

    Returns:
        A `Profile`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, `runs` is not positive, `data` holds no sample, or input shapes are not known and there is
            no `data`.
        FileNotFoundError: if there is no file at `path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite", verbose=0)
    >>> found = keras_kd.profile.profile(model, report.path, verbose=0)
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
    _check_runs(runs)
    sample = _sample_of(model, data)
    with unchanged(model):
        costs, peak = _macs.measure(model, sample)
        keras_latency = _keras_latency(model, sample, runs, verbose)
    layers = _layer_profiles(model, costs)
    nonzero = sum(layer.nonzero_parameters for layer in layers)
    uncounted = tuple(cost.path for cost in costs if cost.macs is None)
    macs = sum(cost.macs or 0 for cost in costs)
    numbers = (model.count_params(), nonzero, macs, uncounted, peak, layers, keras_latency)
    if path is None:
        return Profile(*numbers, sparsity=sparsity_of(model))
    content = pathlib.Path(path).read_bytes()
    latency = measure_latency(content, data=sample, threads=threads, runs=runs, verbose=verbose)
    return Profile(*numbers, len(content), len(gzip.compress(content, 9)), latency, sparsity_of(model))


def layer_profiles(model: keras.Model, data: Any = None) -> tuple[LayerProfile, ...]:
    """What the layers of a model hold and cost, without the time that it takes.

    Args:
        model: a built Keras model.
        data: as for `profile`.

    Returns:
        `Profile.layers`.

    Raises:
        ValueError: if `data` holds no sample or does not fit, or input shapes are not known and there is no `data`.
    """
    with unchanged(model):
        costs, _ = _macs.measure(model, _sample_of(model, data))
    return _layer_profiles(model, costs)


def _sample_of(model: keras.Model, data: Any) -> Any:
    """Arrays of one sample, in the types of the model's inputs."""
    specs = _taps.input_specs(model)
    if data is None:
        shapes = None if specs is None else [tuple(spec.shape) for spec in keras.tree.flatten(specs)]
        if shapes is None or any(None in shape[1:] for shape in shapes):
            received = "a subclassed model" if shapes is None else f"inputs of shapes {', '.join(map(str, shapes))}"
            raise ValueError(
                f'The input shapes of "{model.name}" have unknown lengths. Received: data=None, {received}. '
                "Pass `data`, a sample of its inputs."
            )
        return keras.tree.map_structure(lambda spec: _random((1, *spec.shape[1:]), spec.dtype.as_numpy_dtype), specs)
    if isinstance(data, dict) and isinstance(specs, list | tuple):  # by the names of the inputs
        data = [data.get(tensor.name) for tensor in model.inputs]
    arrays = _first_of(data)
    flat, known = keras.tree.flatten(arrays), keras.tree.flatten(specs) if specs is not None else []
    if known:
        wanted = [tuple(spec.shape)[1:] for spec in known]
        if not _fit([array.shape[1:] for array in flat], wanted):
            raise ValueError(
                f'`data` must be inputs of "{model.name}": of shapes {wanted} a sample. Received: {[a.shape[1:] for a in flat]}.'
            )
        types = [spec.dtype.as_numpy_dtype for spec in known]
    else:
        types = [keras.config.floatx() if array.dtype.kind == "f" else array.dtype for array in flat]
    return keras.tree.pack_sequence_as(arrays, [array.astype(kind) for array, kind in zip(flat, types, strict=True)])


def _first_of(data: Any) -> Any:
    """The first sample, as a batch of one."""
    try:
        arrays = keras.tree.map_structure(np.asarray, data)
    except Exception:
        arrays = []
    flat = keras.tree.flatten(arrays)
    if not flat or any(array.ndim == 0 or len(array) == 0 or array.dtype == object for array in flat):
        raise ValueError(
            "`data` must be an array of samples, or arrays nested as the model takes them, with at least one sample. "
            f"Received: {type(data).__name__} of shapes {[array.shape for array in flat]}."
        )
    return keras.tree.map_structure(lambda array: array[:1], arrays)


@contextlib.contextmanager
def unchanged(model: keras.Model) -> Iterator[None]:
    """Puts back what an inference may change: states of stateful layers, seeds."""
    recurrent = [
        layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN)
    ]  # states are no weights in Keras
    states = [state for layer in recurrent for state in keras.tree.flatten(layer.states) if isinstance(state, keras.Variable)]
    former = [(variable, variable.numpy()) for variable in [*model.non_trainable_variables, *states]]
    try:
        yield
    finally:
        for variable, value in former:
            variable.assign(value)


def _layer_profiles(model: keras.Model, costs: list[_macs.LayerCost]) -> tuple[LayerProfile, ...]:
    """Costs with each layer's own weights; layers that hold weights, and leave the computing to their parts, come last."""
    holders = _taps.find_layers(model) | {_macs.ROOT: model}
    leaves = _calls.find_leaves(model)
    own = _own_weights(holders, [cost.path for cost in costs if cost.path in leaves])
    found = [
        LayerProfile(cost.path, cost.kind, cost.output_shape, *own.pop(cost.path, (0, 0)), cost.macs, cost.activation_bytes)
        for cost in costs
    ]
    rest = [path for path in holders if own.get(path, (0, 0))[0]]
    return (*found, *(LayerProfile(path, type(holders[path]).__name__, None, *own[path], 0, 0) for path in rest))


def _own_weights(holders: dict[str, Any], first: list[str]) -> dict[str, tuple[int, int]]:
    """Numbers of weights and of those that are not 0; what a part holds is not counted for the whole, too.

    Args:
        holders: layers by path.
        first: paths of those that come first where a layer has several paths.
    """
    deepest_first = sorted(holders, key=lambda path: -1 if path == _macs.ROOT else path.count("/"), reverse=True)
    seen: set[int] = set()
    found: dict[str, tuple[int, int]] = {}
    for path in dict.fromkeys([path for path in first if path in holders] + deepest_first):
        weights = [weight for weight in holders[path].weights if id(weight) not in seen]
        seen.update(id(weight) for weight in weights)
        arrays = [keras.ops.convert_to_numpy(weight) for weight in weights]
        found[path] = sum(array.size for array in arrays), sum(int(np.count_nonzero(array)) for array in arrays)
    return found


def _keras_latency(model: keras.Model, sample: Any, runs: int, verbose: Verbose, warmup: int = 20) -> Latency:
    x = keras.tree.map_structure(tf.convert_to_tensor, sample)

    @tf.function
    def infer(x: Any) -> Any:
        return tf.nest.flatten(model(x, training=False), expand_composites=True)

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = tf.config.threading.get_intra_op_parallelism_threads() or processors  # 0: as many as there are processors
    _times(lambda: [y.numpy() for y in infer(x)], warmup)
    times: list[float] = []
    with Progress(runs, what="inferences", title="latency in Keras", verbose=verbose) as progress:
        while len(times) < runs:
            times += _times(lambda: [y.numpy() for y in infer(x)], min(_TURN, runs - len(times)))
            progress.advance(len(times) - progress.done)
    return _latency(times, threads)


def _check_runs(runs: int) -> None:
    if runs < 1:
        raise ValueError(f"`runs` must be at least 1. Received: runs={runs}.")


def _times(once: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        once()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _latency(times: list[float], threads: int) -> Latency:
    low, high = np.percentile(times, [10, 90])
    return Latency(statistics.median(times), float(low), float(high), threads, len(times))


def measure_latency(
    file: str | os.PathLike[str] | bytes,
    *,
    data: Any = None,
    threads: int = 1,
    runs: int = 200,
    warmup: int = 20,
    verbose: Verbose = "auto",
) -> Latency:
    """Times single inferences of one sample in the LiteRT interpreter; of one batch, if the file has a batch size of its own.

    Args:
        file: a LiteRT file, or its content.
        data: inputs of one sample or more, nested as the Keras model takes them, of which the first is measured; the file must be
            one of `keras_kd.export`. None: random numbers, with 1 for unknown lengths.
        threads: threads of the interpreter.
        runs: number of timed inferences, at least 1.
        warmup: inferences before that.
        verbose: 0 is silent; 1 or `"auto"` shows progress.

    Returns:
        A `Latency`, in milliseconds.

    Raises:
        ValueError: if `runs` is not positive, or `data` does not fit the file.
    """
    return measure_latencies({"": file}, data=data, threads=threads, runs=runs, warmup=warmup, verbose=verbose)[""]


def measure_latencies(
    files: Mapping[str, str | os.PathLike[str] | bytes],
    *,
    data: Any = None,
    threads: int = 1,
    runs: int = 200,
    warmup: int = 20,
    verbose: Verbose = "auto",
) -> dict[str, Latency]:
    """Times several LiteRT files side by side: some inferences of each in turn, so that a busy moment meets all of them.

    Args:
        files: LiteRT files, or their contents, by name.
        data: as for `measure_latency`; all files take the same.
        threads: threads of the interpreters.
        runs: number of timed inferences of each, at least 1.
        warmup: inferences of each before that.
        verbose: 0 is silent; 1 or `"auto"` shows progress.

    Returns:
        A `Latency` for each file, in milliseconds.

    Raises:
        ValueError: if `runs` is not positive, or `data` does not fit a file.
    """
    _check_runs(runs)
    ready = {name: _ready(file, data, threads) for name, file in files.items()}
    for invoke in ready.values():
        _times(invoke, warmup)
    times: dict[str, list[float]] = {name: [] for name in files}
    with Progress(runs * len(ready), what="inferences", title="latency", verbose=verbose) as progress:
        for start in range(0, runs, _TURN):
            for name, invoke in ready.items():
                turn = min(_TURN, runs - start)
                invoke()  # what the others left in the caches is not this one's time
                times[name] += _times(invoke, turn)
                progress.advance(turn)
    return {name: _latency(found, threads) for name, found in times.items()}


def _ready(file: str | os.PathLike[str] | bytes, data: Any, threads: int) -> Callable[[], Any]:
    """One inference of a file whose inputs are set."""
    interpreter = open_litert(file, threads=threads)
    details = interpreter.get_input_details()
    if data is None:
        arrays = [_random([1 if n == -1 else n for n in detail["shape_signature"]], detail["dtype"]) for detail in details]
    else:
        arrays = _border_arrays(interpreter, details, keras.tree.flatten(_first_of(data)))
    for detail, array in zip(details, arrays, strict=True):
        interpreter.resize_tensor_input(detail["index"], array.shape)
    interpreter.allocate_tensors()
    for detail, array in zip(details, arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)
    return interpreter.invoke


def _border_arrays(interpreter: Any, details: list[dict[str, Any]], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What the file takes, in its order and types; the sample as often as a batch size of its own asks for."""
    runner = interpreter.get_signature_runner(_litert.signature_of(interpreter))
    named = _litert.in_order(runner.get_input_details(), "input")
    by_index = {detail["index"]: array for detail, array in zip(named.values(), arrays, strict=False)}
    wanted = [tuple(None if n == -1 else int(n) for n in detail["shape_signature"]) for detail in details]
    given = [by_index.get(detail["index"], np.empty(0)) for detail in details]
    given = [np.repeat(array, shape[0] or 1, axis=0) if shape else array for array, shape in zip(given, wanted, strict=True)]
    if len(arrays) != len(details) or not _fit([array.shape for array in given], wanted):
        raise ValueError(
            f"The LiteRT file must take the model's inputs. Received: inputs of shapes {[array.shape for array in arrays]}, a file "
            f"of shapes {wanted}. Export the model again."
        )
    return [_litert._to_border(array, detail) for array, detail in zip(given, details, strict=True)]


def _fit(shapes: list[tuple[int, ...]], wanted: list[tuple[int | None, ...]]) -> bool:
    """Whether each shape is the wanted one, where None stands for any length."""
    return len(shapes) == len(wanted) and all(map(shapes_agree, shapes, wanted))


def _random(shape: Any, dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.floating):
        return np.random.default_rng(0).normal(size=shape).astype(dtype)
    return np.ones(shape, dtype)
