"""What can a network lose? One pass over data that measures how linear, how redundant and how needed each of its layers is."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _batching, _calls, _macs, _outputs
from keras_kd._progress import Progress, Verbose
from keras_kd.analysis import _flows, _places
from keras_kd.analysis._gathered import Gathered
from keras_kd.analysis._pass import Pass
from keras_kd.analysis._places import Place
from keras_kd.analysis.results import LinearReport


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
    bypass      1 - sum |(y - x) - mean(y - x)|^2 / sum |y - mean y|^2       x: the layer's input, where it has the shape of y
    redundancy  R^2 of each channel, given by a linear map of all the others
    taylor      mean |sum_positions a g|        a: a channel of the output, g: the gradient of the loss with respect to it
    fisher      1/2 mean (sum_positions a g)^2
    gradient    mean sum_positions g^2
    cost        1/2 sum_channels gradient * (variance that a linear map of the kept channels does not give)
    ```

    Where a layer has a window (convolution, pooling), z is what the window shows; for blocks, what all windows in it show together.
    `linearity` of layers that mix positions in other ways is that of the best map of single positions, a lower bound. What is
    between integers (tokens) and floats is not differentiable: noise is added to what the embeddings give.

    Without labels, g is the gradient of the outputs' product with random signs: `fisher` is then half the expected square of the
    outputs' first-order change, and costs are in these units. With labels, costs are in those of the loss.

    Args:
        model: a built model; for a Distiller, its student.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`, such as a `tf.data.Dataset`.
        labels: what `loss` takes, `(samples, ...)`; class indices also give the accuracy of linear probes.
        noise: size of the noise, relative, above 0; several give a curve.
        layers: names of places, such as `"backbone/conv1"`; None for all that give one tensor of floats, and do more
            than arrange it.
        blocks: pairs of names, the first and the last layer of a block.
        loss: a Keras loss, its name, or a function of `(y, outputs)` that gives a number for each sample; None: cross-entropy of
            class indices, or the squared error of real targets.
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
            NaN in a layer (it is named); for labels of another length, noise that is not above 0, and names that match nothing.

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
    return analyse(checked_model(model), stream, classes_of=labels, settings=settings, samples=samples, verbose=verbose)[1]


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


def analyse(
    model: keras.Model, batches: Iterable[Any], *, classes_of: Any, settings: Settings, samples: int | None, verbose: Verbose
) -> tuple[Gathered, LinearReport]:
    """One pass over batches `(x, y, sample_weight)`: the report, and what it was made from.

    Args:
        model: a built model.
        batches: at least one.
        classes_of: all labels, where they are there.
        settings: arguments of `linear_analysis`.
        samples: their number, if it is known.
        verbose: progress.
    """
    stream = iter(batches)
    first = next(stream)
    specs = _places.input_specs(model, keras.tree.map_structure(tf.convert_to_tensor, first[0]))
    trace = _calls.trace(model, specs)
    places, skipped = _chosen(trace, settings)
    loss = None if first[1] is None and settings.loss is None else loss_of(model, first[1], settings.loss)
    reader = Pass(model, places, noise=settings.noise, loss=loss, max_positions=settings.max_positions, seed=settings.seed)
    gathered = Gathered(places, skipped, classes_of_labels(model, classes_of, first[1]), settings.seed)
    run = None
    with Progress(samples, title="linear analysis", verbose=verbose) as progress:
        for step, (x, y, _) in enumerate(itertools.chain([first], stream)):
            x = _fitting(model, x, specs)
            y = None if loss is None else keras.tree.map_structure(tf.convert_to_tensor, y)
            run = run or reader.compiled(specs, keras.tree.map_structure(_any_length, y) if y is not None else None)
            gathered.add(run(x, y, tf.constant(step)), y)
            progress.advance(len(keras.tree.flatten(x)[0]))
    costs = {cost.path: cost.macs for cost in _macs.measure(model, keras.tree.map_structure(lambda t: t[:1], x))[0]}
    flows = _flows.find_flows(model, trace, gathered.moments) if getattr(model, "inputs", None) else {}
    return gathered, gathered.report(model, settings.noise, settings.l2, costs, flows)


def _fitting(model: keras.Model, x: Any, specs: Any) -> Any:
    """Inputs in the model's types."""
    try:
        made = keras.tree.map_structure(lambda value, spec: tf.cast(value, spec.dtype), x, specs)
    except (TypeError, ValueError) as error:
        raise ValueError(f'`data` must be nested as "{model.name}" takes its inputs. Received: {type(x).__name__}.') from error
    for value, spec in zip(keras.tree.flatten(made), keras.tree.flatten(specs), strict=True):
        if not spec.is_compatible_with(value):
            shape = tuple(value.shape)
            raise ValueError(f'`data` must have the shape that "{model.name}" takes, {tuple(spec.shape)}. Received: {shape}.')
    return made


# Layers that give what they got, in another shape.
_ARRANGING = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Permute, keras.layers.RepeatVector)


def _chosen(trace: _calls.Trace, settings: Settings) -> tuple[list[Place], list[str]]:
    layers, blocks, max_columns = settings.layers, settings.blocks, settings.max_columns
    calls = _places.find_places(trace)
    skipped = [
        f"{name} ({call.outputs[0].shape[-1]} channels)" for name, call in calls.items() if call.outputs[0].shape[-1] > max_columns
    ]
    fitting = [name for name, call in calls.items() if call.outputs[0].shape[-1] <= max_columns]
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
    if layers is not None and isinstance(layers, str):
        raise ValueError(f"`layers` must be a sequence of names. Received: layers={layers!r}.")
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


def checked_model(model: Any) -> keras.Model:
    """A built model; of a Distiller, its student."""
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    return model


def _checked_noise(noise: Any) -> list[float]:
    levels = list(noise) if isinstance(noise, (list, tuple, np.ndarray)) else [noise]
    if not levels or any(
        isinstance(one, bool) or not isinstance(one, (int, float, np.number)) or not 0 < one < np.inf for one in levels
    ):
        raise ValueError(f"`noise` must be a number above 0, or a sequence of such. Received: noise={noise!r}.")
    return [float(one) for one in levels]


def _any_length(y: Any) -> Any:
    return tf.TensorSpec((None, *y.shape[1:]), y.dtype)


def classes_of_labels(model: keras.Model, labels: Any, first: Any) -> int | None:
    """Number of classes, if labels are their indices."""
    if first is None or keras.tree.is_nested(first):
        return None
    y = np.asarray(first)
    if y.dtype.kind not in "iu" or y.ndim > 2 or (y.ndim == 2 and y.shape[1] != 1):
        return None
    shape = getattr(model, "output_shape", None)
    wide = shape[-1] if isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[-1], int) and shape[-1] > 1 else None
    if labels is None:
        return wide
    return max(int(np.asarray(labels).max()) + 1, wide or 2)


def loss_of(model: keras.Model, y: Any, loss: Any) -> Callable[[Any, Any], Any]:
    """One number for each sample, from labels and outputs."""
    if y is None:
        raise ValueError("`labels` must be given with `loss`. Received: labels=None.")
    if loss is None:
        loss = _default_loss(model, y)
    made = keras.losses.get(loss)
    function: Callable[[Any, Any], Any] = made.call if isinstance(made, keras.losses.Loss) else made
    return function


def _default_loss(model: keras.Model, y: Any) -> Any:
    kinds = _outputs.output_kinds(model)
    if keras.tree.is_nested(y) or len(kinds) > 1:
        raise ValueError("`loss` must be given for a model with several outputs. Received: loss=None.")
    if np.asarray(y).dtype.kind == "f":
        return keras.losses.MeanSquaredError()
    if not kinds or kinds[0] is None:
        compiled = getattr(model, "loss", None)
        if compiled is None:
            raise ValueError(
                "`loss` must be given where the model's last layer does not tell whether it gives logits. Received: loss=None. For "
                "logits: loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        return compiled
    logits = kinds[0] == _outputs.LOGITS
    if kinds[0] == "sigmoid" or model.output_shape[-1] == 1:
        return keras.losses.BinaryCrossentropy(from_logits=logits)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
