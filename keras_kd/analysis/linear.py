"""What can a network lose? One pass over data that measures how linear, how redundant and how needed each of its layers is."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _batching, _calls, _macs, _outputs
from keras_kd._moments import Moments, ridge
from keras_kd._progress import Progress, Verbose
from keras_kd.analysis import _places, probes
from keras_kd.analysis._pass import Pass
from keras_kd.analysis._places import Place
from keras_kd.analysis.results import BlockAnalysis, FlowAnalysis, LayerAnalysis, LinearReport, Response
from keras_kd.analysis.statistics import (
    duplicate_channels,
    effective_rank,
    rank_at,
    redundancy,
    removal_order,
)


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
        layers: names of places, such as `"backbone/conv1"`; None for all that give one tensor of floats.
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
    model = _checked_model(model)
    levels = _checked_noise(noise)
    for name, value in (("max_positions", max_positions), ("max_columns", max_columns)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1. Received: {name}={value!r}.")
    if isinstance(l2, bool) or not isinstance(l2, (int, float)) or not l2 >= 0:
        raise ValueError(f"`l2` must be a number of at least 0. Received: l2={l2!r}.")
    stream = _batching.batches(data, labels, size=batch_size, required=False)
    first = next(stream)
    specs = _places.input_specs(model, keras.tree.map_structure(tf.convert_to_tensor, first[0]))
    trace = _calls.trace(model, specs)
    places, skipped = _chosen(trace, layers, blocks, max_columns)
    loss = _loss_of(model, first[1], loss)
    reader = Pass(model, places, noise=levels, loss=loss, max_positions=max_positions, seed=seed)
    gathered = _Gathered(places, skipped, _classes(model, labels, first[1]), seed)
    run = None
    with Progress(_batching.count(data, labels), title="linear analysis", verbose=verbose) as progress:
        for step, (x, y, _) in enumerate(_chained(first, stream)):
            x = keras.tree.map_structure(lambda value, spec: tf.cast(value, spec.dtype), x, specs)
            y = None if loss is None else keras.tree.map_structure(tf.convert_to_tensor, y)
            run = run or reader.compiled(specs, keras.tree.map_structure(_any_length, y) if y is not None else None)
            gathered.add(run(x, y, tf.constant(step)), y)
            progress.advance(len(keras.tree.flatten(x)[0]))
    costs = {cost.path: cost.macs for cost in _macs.measure(model, keras.tree.map_structure(lambda t: t[:1], x))[0]}
    flows = _places.find_flows(trace, gathered.moments) if getattr(model, "inputs", None) else {}
    return gathered.report(model, levels, l2, costs, flows)


class _Gathered:
    """What all batches showed."""

    def __init__(self, places: list[Place], skipped: list[str], classes: int | None, seed: int) -> None:
        self.places, self.skipped, self.samples = places, skipped, 0
        self.moments: dict[str, Moments] = {}
        self.sums: dict[str, dict[str, Any]] = {place.name: {} for place in places}
        self.names = [place.name for place in places if " .. " not in place.name]
        self.probes = None if classes is None else probes.Gathered(self.names, classes, 0.2, 5000, seed)

    def add(self, found: dict[str, Any], labels: Any) -> None:
        """Takes a batch in."""
        final = found.pop("")["output"]
        found = {name: {key: _numpy(value) for key, value in one.items()} for name, one in found.items()}
        for place in self.places:
            one = found[place.name]
            rows = one.pop("rows")
            if not (np.isfinite(rows).all() and np.isfinite(one.pop("norm", 0.0)).all()):
                raise ValueError(f'The layer "{place.name}" gives or reads NaN or infinite values on `data`.')
            moments = self.moments.setdefault(place.name, Moments.empty(rows.shape[1]))
            moments.add(Moments.of(rows, one.pop("weights", None)))
            _take(self.sums[place.name], {key: value for key, value in one.items() if key != "pooled"})
        self.samples += len(next(iter(found.values()))["pooled"]) if self.names else 0
        if self.probes is not None:
            features = {name: found[name]["pooled"] for name in self.names}
            self.probes.add(features, probes.checked_labels(labels, self.probes.classes), final)

    def report(
        self, model: keras.Model, levels: list[float], l2: float, costs: dict[str, Any], flows: dict[str, Any]
    ) -> LinearReport:
        """Solves."""
        for place in self.places:
            number = self.moments[place.name].rows
            if number <= place.channels:
                raise ValueError(
                    f'`data` must give more rows than the layer "{place.name}" has channels, {place.channels}. Received: {number}. '
                    "Give more samples, raise `max_positions`, or name other `layers`."
                )
        rows = self._probed()
        made = [self._layer(place, levels, l2, costs, rows) for place in self.places if " .. " not in place.name]
        blocks = [self._block(place, l2) for place in self.places if " .. " in place.name]
        routes = {name: FlowAnalysis(f.place, f.readers, f.between, f.reason) for name, f in flows.items() if name in self.sums}
        return LinearReport(
            model=model.name,
            kind="functional" if getattr(model, "inputs", None) else "subclassed",
            samples=self.samples,
            noise=tuple(levels),
            layers=tuple(made),
            blocks=tuple(blocks),
            flows=routes,
            macs=int(sum(value or 0 for value in costs.values())),
            parameters=int(sum(np.prod(weight.shape) for weight in model.weights)),
            skipped=tuple(self.skipped),
        )

    def _probed(self) -> dict[str, Any]:
        if self.probes is None:
            return {}
        solved = next(iter(self.probes.moments.values())).rows if self.probes.moments else 0
        if solved <= self.probes.classes or not self.probes.kept:
            self.skipped.append("probes: too few samples")
            return {}
        return {row.name: row for row in self.probes.report(dict.fromkeys(self.names, ""), list(probes.PENALTIES), []).rows}

    def _linearity(self, place: Place, l2: float) -> tuple[float | None, str]:
        moments = self.moments[place.name]
        columns = len(moments.mean) - place.channels
        if not place.readings:
            return None, place.reason
        if moments.rows <= columns:
            return None, f"{moments.rows} rows do not do for {columns} features"
        fit = ridge(moments, columns, [l2])
        spread = np.diag(moments.scatter)[columns:]
        return (float(np.sum(fit.r2 * spread) / spread.sum()), "") if spread.sum() else (None, "its output is constant")

    def _block(self, place: Place, l2: float) -> BlockAnalysis:
        first, last = place.name.split(" .. ")
        linearity, reason = self._linearity(place, l2)
        return BlockAnalysis(
            first, last, linearity, self._bypass(place, l2), sum(r.columns for r in place.readings), _window(place), reason
        )

    def _bypass(self, place: Place, l2: float) -> float | None:
        """What a linear map of the input at the same position gives, where input and output have the same shape."""
        at = _places.middle(place)
        moments = self.moments[place.name]
        if at is None or moments.rows <= place.channels:
            return None
        columns = np.r_[at : at + place.channels, len(moments.mean) - place.channels : len(moments.mean)]
        spread = np.diag(moments.scatter)[-place.channels :]
        fit = ridge(moments.part(columns), place.channels, [l2])
        return float(np.sum(fit.r2 * spread) / spread.sum()) if spread.sum() else None

    def _layer(self, place: Place, levels: list[float], l2: float, costs: dict[str, Any], probed: dict[str, Any]) -> LayerAnalysis:
        joint, sums = self.moments[place.name], self.sums[place.name]
        moments = joint.part(slice(len(joint.mean) - place.channels, None))
        linearity, reason = self._linearity(place, l2)
        spectrum = np.maximum(np.linalg.eigvalsh(moments.scatter)[::-1], 0.0) / moments.weight
        gradient = sums.get("gradients", np.zeros(place.channels)) / self.samples
        importance = np.sqrt(gradient)
        weighted = Moments(
            moments.weight, moments.rows, moments.mean * importance, moments.scatter * np.outer(importance, importance)
        )
        singular = _weight_spectrum(place.layer)
        constant = np.flatnonzero(sums["low"] == sums["high"])
        row = probed.get(place.name)
        n = self.samples
        return LayerAnalysis(
            name=place.name,
            path=place.path,
            kind=type(place.layer).__name__,
            channels=place.channels,
            positions=place.positions,
            macs=costs.get(place.path),
            parameters=int(sum(np.prod(w.shape) for w in getattr(place.layer, "weights", ()))),
            responses=tuple(_response(sums, index, level, n) for index, level in enumerate(levels)) if "gain" in sums else (),
            gain=float(sums["gain"][0] / n) if "gain" in sums else None,
            linearity=linearity,
            bypass=self._bypass(place, l2),
            window=_window(place),
            linearity_reason=reason,
            redundancy=_floats(redundancy(moments)),
            removal=removal_order(moments),
            removal_by_cost=removal_order(weighted),
            cost=float(0.5 * np.sum(gradient * np.diag(moments.scatter)) / moments.weight),
            spectrum=_floats(spectrum),
            effective_rank=effective_rank(spectrum),
            rank_99=rank_at(spectrum),
            weight_spectrum=_floats(singular) if singular is not None else None,
            weight_effective_rank=effective_rank(singular**2) if singular is not None else None,
            weight_rank_99=rank_at(singular**2) if singular is not None else None,
            taylor=_floats(sums["removed"][0] / n) if "removed" in sums else (),
            fisher=_floats(sums["removed"][1] / n / 2) if "removed" in sums else (),
            gradient=_floats(gradient),
            dead=tuple(int(c) for c in constant),
            duplicates=_equal(sums["bits"], constant),
            proportional=duplicate_channels(moments),
            accuracy=row.accuracy if row else None,
            accuracy_error=row.standard_error if row else None,
        )


def _take(sums: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds what a batch gave: sums of values and squares of what is there for each sample."""
    for key, value in found.items():
        if key in ("low", "high"):
            choose = np.minimum if key == "low" else np.maximum
            sums[key] = choose(sums.get(key, value), value)
            continue
        if key == "bits":
            value = value.astype("int64")
        elif key == "removed":
            value = np.stack([np.abs(value, dtype="float64").sum(0), np.square(value, dtype="float64").sum(0)])
        elif key in ("gain", "gains"):
            value = np.asarray(value, "float64")
            value = np.stack([value.sum(-1), np.square(value).sum(-1)])
        else:
            value = np.asarray(value, "float64")
        sums[key] = sums.get(key, 0) + value


def _response(sums: dict[str, Any], index: int, level: float, n: int) -> Response:
    total, squares = sums["gains"][0][index], sums["gains"][1][index]
    mean = total / n
    error = np.sqrt(max(squares / n - mean**2, 0.0) / (n - 1)) if n > 1 else 0.0
    changed = sums["changed"][index]
    return Response(level, float(mean), float(error), float(1 - sums["left"][index] / changed) if changed else 1.0)


def _numpy(value: Any) -> Any:
    return [ops.convert_to_numpy(one) for one in value] if isinstance(value, list) else ops.convert_to_numpy(value)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(one) for one in values)


def _window(place: Place) -> tuple[int, ...] | None:
    windows = [reading.window for reading in place.readings if reading.window is not None]
    return windows[0].size if windows else None


def _equal(bits: np.ndarray, constant: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Groups of channels whose sums of bits are the same."""
    groups: dict[int, list[int]] = {}
    for channel, value in enumerate(bits):
        if channel not in set(constant):
            groups.setdefault(int(value), []).append(channel)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _weight_spectrum(layer: Any) -> np.ndarray | None:
    """Singular values of a layer's kernel as the matrix from what it reads to its channels."""
    kernel = getattr(layer, "kernel", getattr(layer, "embeddings", None))
    if kernel is None or len(kernel.shape) < 2 or isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return None
    matrix = ops.convert_to_numpy(kernel).astype("float64").reshape(-1, kernel.shape[-1])
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)))


def _chosen(
    trace: _calls.Trace, layers: Sequence[str] | None, blocks: Sequence[tuple[str, str]], max_columns: int
) -> tuple[list[Place], list[str]]:
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
    names = fitting if layers is None else [name for name in fitting if name in set(layers)]
    if not names:
        raise ValueError(
            f"`layers` must name at least one place. Received: layers={layers!r}. Places: {', '.join(fitting) or 'none'}."
        )
    made = [_places.make_place(calls[name], max_columns) for name in names]
    return made + [_places.make_block(trace, calls[a], calls[b], max_columns) for a, b in pairs], skipped if layers is None else []


def _checked_model(model: Any) -> keras.Model:
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


def _chained(first: Any, rest: Any) -> Any:
    yield first
    yield from rest


def _classes(model: keras.Model, labels: Any, first: Any) -> int | None:
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


def _loss_of(model: keras.Model, y: Any, loss: Any) -> Callable[[Any, Any], Any] | None:
    """One number for each sample, from labels and outputs; None where there are no labels."""
    if y is None:
        if loss is not None:
            raise ValueError("`labels` must be given with `loss`. Received: labels=None.")
        return None
    if loss is None:
        loss = _default_loss(model, y)
    made = keras.losses.get(loss)
    return made.call if isinstance(made, keras.losses.Loss) else made


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
