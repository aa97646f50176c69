"""What can a network lose? One pass over data that measures how linear, how redundant and how needed each of its layers is."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _batching, _calls, _macs
from keras_kd._progress import Progress, Verbose
from keras_kd.analysis import _arguments, _flows, _places
from keras_kd.analysis._gathered import Gathered
from keras_kd.analysis._pass import Pass
from keras_kd.analysis._places import Place
from keras_kd.analysis.results import LinearReport

# Relative; below it, differences of float32 numbers are mostly rounding.
SMALLEST_NOISE = 1e-5


def linear_analysis(
    model: keras.Model,
    data: Any,
    labels: Any = None,
    *,
    noise: float | Sequence[float] = 0.01,
    layers: Sequence[str] | None = None,
    blocks: Sequence[tuple[str, str]] = (),
    loss: Any = None,
    l2: float = 1e-6,
    max_positions: int = 8,
    max_columns: int = 1024,
    batch_size: int = 256,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> LinearReport:
    """Measures, for each layer, what the network would lose without it, or without some of its channels.

    One pass over the data, whatever is asked; memory depends on widths, not on the number of samples. With f the model up to a
    layer's output, x its input and d noise of `noise` times the root mean square of each sample, drawn anew for each:

    ```
    response    (|f(x + d) - f(x)| / |f(x)|) / (|d| / |x|)      mean over samples, with its standard error
    gain        (|J d| / |f(x)|) / (|d| / |x|)                  J: the Jacobian at x, exactly
    explained   1 - sum |f(x + d) - f(x) - J d|^2 / sum |f(x + d) - f(x)|^2
    linearity   1 - sum |y - W' z - b|^2 / sum |y - mean y|^2   z: the layer's own input, y: its output; ridge regression
    bypass      1 - sum |y - x|^2 / sum |y - mean y|^2          x: the layer's input, where it has the shape of y
    redundancy  R^2 of each channel, given by a linear map of all the others
    taylor      mean |sum_positions a g|        a: a channel of the output, g: the gradient of the loss with respect to it
    fisher      1/2 mean (sum_positions a g)^2
    gradient    mean sum_positions g^2
    cost        1/2 sum_channels gradient * (variance that a linear map of the kept channels does not give)
    ```

    `linearity` and `redundancy` are adjusted for their numbers of features, as R^2 on other data would be. Where a layer has a
    window (convolution, pooling), z is what the window shows; for blocks, what all windows in it show together.
    `linearity` of layers that mix positions in other ways is that of the best map of single positions, a lower bound. What is
    between integers and floats is not differentiable: noise is added to the first floats, what embeddings of tokens give, or images
    of bytes as floats.

    Without labels, g is the gradient of the outputs' product with random signs: `fisher` is then half the expected square of the
    outputs' first-order change, and costs are in these units. With labels, costs are in those of the loss.

    Args:
        model: a built model; for a Distiller, its student.
        data: inputs nested as the model takes them, in order or by their names, or an iterable of batches `x` or `(x, y)`, such as
            a `tf.data.Dataset`. Sample weights `(x, y, sample_weight)` are not used, with a warning: all samples count alike.
        labels: what `loss` takes, `(samples, ...)`, nested as it takes them; classes (indices, or one-hot rows for several outputs)
            also give the accuracy of linear probes, up to 4096 classes.
        noise: size of the noise, relative, above 0; several give a curve. Below 1e-5 it is mostly the rounding of float32.
        layers: names of places, such as `"backbone/conv1"`; None for all that give one tensor of floats, and do more
            than arrange it.
        blocks: pairs of names, the first and the last layer of a block.
        loss: a Keras loss, its name, or a function of `(y, outputs)` that gives a number for each sample; None: cross-entropy of
            class indices, and of rows of probabilities (one-hot, say) for a last layer of softmax or logits; binary cross-entropy
            for one of sigmoids with labels in [0, 1], and for a single output with integers 0 and 1; the squared error of other
            targets.
        l2: penalty of `linearity`, the `alpha` of scikit-learn's `Ridge`.
        max_positions: positions of each sample of which rows are taken, at random, where a layer has more (pixels, steps). What is
            said of constant and duplicate channels is of all positions.
        max_columns: linear maps from more features are left out; windows are cut to their middle to stay below.
        batch_size: samples at a time, for arrays.
        seed: of noise, positions, signs, and the probes' held-out samples.
        verbose: progress on long data; 0 is silent.

    Returns:
        A `LinearReport`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built; for data without samples, or with fewer rows than a layer has channels (it is named); for
            NaN in a layer or in the gradient of the loss (it is named); for labels that are no numbers, of another length or no
            indices of the outputs; for noise that is not above 0, names that match nothing, stateful layers, and a QuantizedModel
            (pass `quantized.model`).

    Example:

    >>> hidden = keras.layers.Dense(8, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> report = keras_kd.analysis.linear_analysis(model, x, verbose=0)
    >>> report["hidden"].channels, len(report["hidden"].redundancy)
    (8, 8)

    Reference:
        He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (reconstruction); Molchanov et al.: Pruning
        Convolutional Neural Networks for Resource Efficient Inference, 2017 (Taylor); Theis et al.: Faster gaze prediction with
        dense networks and Fisher pruning, 2018; Roy, Vetterli: The effective rank, 2007.
    """
    stream = _batching.batches(data, labels, size=batch_size, required=False)
    samples = _batching.count(data, labels)
    settings = Settings(_checked_noise(noise), layers, tuple(blocks), loss, l2, max_positions, max_columns, seed)
    return analyse(_arguments.checked_model(model), stream, classes_of=labels, settings=settings, samples=samples, verbose=verbose)[
        1
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Arguments of `linear_analysis`."""

    noise: list[float] = dataclasses.field(default_factory=lambda: [0.01])
    layers: Sequence[str] | None = None
    blocks: tuple[tuple[str, str], ...] = ()
    loss: Any = None
    l2: float = 1e-6
    max_positions: int = 8
    max_columns: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_positions", "max_columns"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}.")
        if isinstance(self.l2, bool) or not isinstance(self.l2, (int, float)) or not self.l2 >= 0:
            raise ValueError(f"`l2` must be a number of at least 0. Received: l2={self.l2!r}.")
        _arguments.checked_seed(self.seed)
        _arguments.checked_names("layers", self.layers)


def analyse(
    model: keras.Model,
    batches: Iterable[Any],
    *,
    classes_of: Any,
    settings: Settings,
    samples: int | None,
    verbose: Verbose,
    trace: _calls.Trace | None = None,
) -> tuple[Gathered, LinearReport]:
    """One pass over batches `(x, y, sample_weight)`: the report, and what it was made from.

    Args:
        model: a built model.
        batches: at least one.
        classes_of: all labels, where they are there.
        settings: arguments of `linear_analysis`.
        samples: their number, if it is known.
        verbose: progress.
        trace: of the model, if there is one.
    """
    stream = iter(batches)
    first = next(stream)
    specs = _places.input_specs(model, keras.tree.map_structure(tf.convert_to_tensor, first[0]))
    _arguments.fitting(model, first[0], specs)  # says what does not fit before anything is traced
    _arguments.check_numbers(first[1])
    trace = trace or _calls.trace(model, specs)
    places, skipped = _chosen(trace, settings)
    task = _arguments.task_of(model, trace.outputs, first[1], classes_of, settings.loss)
    reader = Pass(model, places, noise=settings.noise, loss=task.loss, max_positions=settings.max_positions, seed=settings.seed)
    gathered = Gathered(places, skipped, task.classes, settings.seed)
    runs = _Runs(model, reader, specs, task)
    with Progress(samples, title="linear analysis", verbose=verbose) as progress, _arguments.unchanged(model):
        for step, (x, y, weights) in enumerate(itertools.chain([first], stream)):
            if weights is not None and not step:
                warnings.warn("Sample weights are not used: all samples count alike.", UserWarning, stacklevel=3)
            x = runs.add(x, y, step, gathered)
            progress.advance(len(keras.tree.flatten(x)[0]))
    _check_masks(gathered)
    if reader.differences:
        gathered.skipped.append(f"exact products with the Jacobian, central differences instead: {reader.differences}")
    gathered.skipped.extend(f"{name}: its gradient ({reason})" for name, reason in reader.without.items())
    costs = {cost.path: cost.macs for cost in _macs.measure(model, keras.tree.map_structure(lambda t: t[:1], x))[0]}
    flows = _flows.find_flows(model, trace, gathered.moments) if getattr(model, "inputs", None) else {}
    return gathered, gathered.report(model, settings.noise, settings.l2, costs, flows)


class _Runs:
    """Batches through the compiled pass, which is traced anew where an axis has another length than before."""

    def __init__(self, model: keras.Model, reader: Pass, specs: Any, task: _arguments.Task) -> None:
        self.model, self.reader, self.task = model, reader, task
        self.x, self.y = specs, None
        self.given, self.exact = specs, False
        self.run: Callable[..., Any] | None = None

    def add(self, x: Any, y: Any, step: int, gathered: Gathered) -> Any:
        """Runs a batch; returns its inputs as tensors."""
        x = _arguments.fitting(self.model, x, self.given)
        self.task.check(y)
        y = None if self.task.loss is None or y is None else keras.tree.map_structure(tf.convert_to_tensor, y)
        self._fit(x, y, gathered)
        found = self._first(x, y, gathered) if step == 0 else self._call(x, y, step)
        gathered.add(found, self.task.indices(y) if self.task.classes is not None else None)
        for name, one in found.items():
            if not all(np.isfinite(one[key]).all() for key in ("removed", "gradients") if key in one):
                raise ValueError(
                    f'The gradient of the loss must be finite. Received: NaN or infinite values at the layer "{name}". Look at '
                    "`labels` and `loss`: what layers give is finite."
                )
        return x

    def _first(self, x: Any, y: Any, gathered: Gathered) -> Any:
        """The first batch, which shows what TensorFlow cannot do: lengths that are not known, or a second derivative."""
        try:
            return self._call(x, y, 0)
        except tf.errors.InvalidArgumentError as error:
            self.exact = True  # TimeDistributed fails in loops over steps of unknown number
            self._fit(x, y, gathered)
            message = error.message
        try:
            return self._call(x, y, 0)
        except tf.errors.InvalidArgumentError:
            if self.reader.differences:
                raise
            self.reader.differences = message.split("\n")[0][-160:]
            self.run = None
            return self._call(x, y, 0)

    def _call(self, x: Any, y: Any, step: int) -> Any:
        self.run = self.run or self.reader.compiled(self.x, self.y)
        return self.run(x, y, tf.constant(step))

    def _fit(self, x: Any, y: Any, gathered: Gathered) -> None:
        if y is not None and self.y is None:
            self.y = keras.tree.map_structure(lambda one: tf.TensorSpec((None, *one.shape[1:]), one.dtype), y)
        known = getattr(self.model, "inputs", None)
        specs = self.x if known else _arguments.widened(self.x, x)
        if self.exact:
            specs = keras.tree.map_structure(lambda one: tf.TensorSpec((None, *one.shape[1:]), one.dtype), x)
        labels = None if y is None else _arguments.widened(self.y, y)
        if specs != self.x and not known:
            _forget_lengths(gathered)
        if specs != self.x or labels != self.y:
            self.run = None
        self.x, self.y = specs, labels


def _forget_lengths(gathered: Gathered) -> None:
    """Batches differ in length: places have no fixed number of positions, and none reads a whole sample of one size."""
    for place in gathered.places:
        place.positions = 1 if place.positions == 1 else None
        if any(reading.window is None for reading in place.readings):
            gathered.moments[place.name] = gathered.output_moments(place.name)
            place.readings, place.reason = [], "batches differ in length"


def _check_masks(gathered: Gathered) -> None:
    for name, moments in gathered.moments.items():
        if not moments.weight:
            raise ValueError(
                f'`data` must show at least one step. Received: all steps of all samples are masked at the layer "{name}". Is it '
                "all padding?"
            )


# Layers that give what they got, in another shape.
_ARRANGING = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Permute, keras.layers.RepeatVector)


# Layers that give what they got, in another shape.
_ARRANGING = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Permute, keras.layers.RepeatVector)


def _chosen(trace: _calls.Trace, settings: Settings) -> tuple[list[Place], list[str]]:
    layers, blocks, max_columns = settings.layers, settings.blocks, settings.max_columns
    calls = _places.find_places(trace)
    widths = {name: int(call.outputs[0].shape[-1]) for name, call in calls.items()}
    skipped = [f"{name} ({width} channels, more than `max_columns`)" for name, width in widths.items() if width > max_columns]
    fitting = [name for name, width in widths.items() if width <= max_columns]
    pairs = list(blocks)
    if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"`blocks` must be pairs (first, last) of names. Received: blocks={blocks!r}.")
    for argument, names in (("layers", list(layers or ())), ("blocks", [name for pair in pairs for name in pair])):
        unknown = [name for name in names if name not in (calls if argument == "blocks" else fitting)]
        if unknown:
            raise ValueError(
                f"`{argument}` must name places of the model that give one tensor of floats with at most {max_columns} channels. "
                f"Received: {', '.join(unknown)}. Places: {', '.join(fitting)}."
            )
    ends = {name for pair in pairs for name in pair}
    if layers is None:
        names = [name for name in fitting if name in ends or not isinstance(calls[name].layer, _ARRANGING)]
    else:
        names = [name for name in fitting if name in ends.union(layers)]
    if not names:
        raise ValueError(
            f"`layers` must name at least one place. Received: layers={layers!r}. Places: {', '.join(fitting) or 'none'}."
        )
    made = [_places.make_place(calls[name], max_columns) for name in names]
    return made + [_places.make_block(trace, calls[a], calls[b], max_columns) for a, b in pairs], skipped if layers is None else []


def _checked_noise(noise: Any) -> list[float]:
    levels = list(noise) if isinstance(noise, (list, tuple, np.ndarray)) else [noise]
    if not levels or any(
        isinstance(one, bool) or not isinstance(one, (int, float, np.number)) or not 0 < one < np.inf for one in levels
    ):
        raise ValueError(f"`noise` must be a number above 0, or a sequence of such. Received: noise={noise!r}.")
    if min(levels) < SMALLEST_NOISE:
        warnings.warn(
            f"Noise below {SMALLEST_NOISE:g} drowns in the rounding of float32. Received: noise={noise!r}.",
            UserWarning,
            stacklevel=3,
        )
    return [float(one) for one in levels]
