"""Can all layers together do better than each for itself? A smaller network is drawn to what its original gives, layer by layer."""

import dataclasses
import numbers
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, overload

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_kd import _lineage, _macs, _outputs
from keras_kd._progress import Progress
from keras_kd.surgery import _analysis, _nodes, _side_by_side
from keras_kd.surgery._curvature import as_logits
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._reports import Report

EPOCHS = 30
_BATCH = 16
_FEWEST = 64  # samples
_RATE = 0.02  # of the root mean square of a variable, and how far it goes in a step at first
_FIRST, _SECOND = 0.9, 0.999  # decay of the means of gradients and of their squares
_LEAST = 1e-3  # root mean square of a variable that is 0
_HELD_OUT = 16  # one sample in so many is not fitted on
_MEMORY = 1 << 29  # bytes for what the original gives
_AUTO_EPOCHS, _AUTO_SAMPLES = 5, 256
_AUTO_WORK = 1e12  # multiply-accumulates


@dataclasses.dataclass(frozen=True)
class Reconstruction(Report):
    """What `reconstruct` did.

    Attributes:
        places: layers whose outputs were compared, besides the model's own.
        samples: number of samples that it was fitted on.
        epochs: how often these were seen.
        error_before: mean over the places and outputs of the squared difference to the original, relative to the original's
            variance there, of samples that were not fitted on.
        error_after: and after; the same where nothing was gained, and all weights stayed.
    """

    places: tuple[str, ...]
    samples: int
    epochs: int
    error_before: float
    error_after: float

    def __str__(self) -> str:
        gained = f"error {self.error_before:.3g} -> {self.error_after:.3g}"
        if self.error_after >= self.error_before:
            gained = f"error {self.error_before:.3g}: nothing gained, the weights are as they were"
        return f"all layers together: {gained} ({self.samples:,} samples, {self.epochs} epochs, {len(self.places)} places)"


@overload
def reconstruct(
    model: Any, original: Any, data: Any, *, epochs: int = EPOCHS, verbose: Any = "auto", return_report: Literal[False] = False
) -> keras.Model: ...


@overload
def reconstruct(
    model: Any, original: Any, data: Any, *, epochs: int = EPOCHS, verbose: Any = "auto", return_report: Literal[True]
) -> tuple[keras.Model, Reconstruction]: ...


def reconstruct(
    model: Any, original: Any, data: Any, *, epochs: int = EPOCHS, verbose: Any = "auto", return_report: bool = False
) -> Any:
    """Fits all layers of a model that surgery made, together, to what the original gives. No labels are needed.

    The fits of the other operations are exact, but each is of one layer; what a layer cannot give, no later one knows of. Here all
    weights take steps of gradient descent on

    ```
    sum over places p of  E |x_p - X_p|^2 / Var X_p  +  E |y - Y|^2 / Var Y
    ```

    with x what the model's layers give where others read it, X the same channels of the original, and y and Y the outputs (the
    logits, where these are probabilities). Batch normalisation uses, and keeps, its moving statistics. The steps are Adam's,
    relative to the size of each variable. One sample in 16 is not fitted on: where the error of these does not fall, all weights
    stay.

    `prune_channels` does this by itself. It is of use once more after several operations one after the other.

    Args:
        model: a model that surgery made, however often, from `original`. It is not changed.
        original: what it shall be like.
        data: inputs nested as the models take them, or an iterable of batches `x` or `(x, y)`; at least 64 samples, better 1,000.
        epochs: how often the samples are seen.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `Reconstruction`, too.

    Returns:
        A new model; with `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if one of the models is no Keras model.
        ValueError: if surgery did not make `model` from `original`; for subclassed models; for fewer than 64 samples, data of other
            shapes or with NaN; for `epochs` below 1.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(32, activation="relu", name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    >>> data = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")
    >>> smaller = keras_kd.surgery.remove_channels(model, {"hidden": range(20)}, data=data, verbose=0)
    >>> better, report = keras_kd.surgery.reconstruct(smaller, model, data, verbose=0, return_report=True)
    >>> report.error_after < report.error_before
    True

    Reference:
        Li et al.: BRECQ, 2021, for reconstruction beyond single layers; Romero et al.: FitNets, 2015, for what is compared inside.
    """
    model, original = _analysis.checked(model), _analysis.checked(original)
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Integral) or epochs < 1:
        raise ValueError(f"`epochs` must be a whole number of at least 1. Received: epochs={epochs!r}.")
    if _lineage.masks_between(model, original) is None:
        raise ValueError(
            f'`model` must be the very object that surgery made from `original`. Received: model="{model.name}", '
            f'original="{original.name}". Nobody knows this of loaded and cloned models.'
        )
    batches = [x for x, _ in _side_by_side.samples_of(original, data, None)]
    check_enough(batches)
    new = Rebuilt(_analysis.analyse(model), set()).model
    report = fit_together(new, original, batches, epochs, verbose)
    return (new, report) if return_report else new


def _count(batches: list[list[Any]]) -> int:
    return sum(len(batch[0]) for batch in batches)


def check_enough(batches: list[list[Any]]) -> None:
    """Raises a ValueError for fewer than 64 samples."""
    count = _count(batches)
    if count < _FEWEST:
        raise ValueError(f"`data` must have at least {_FEWEST} samples that fit into memory. Received: {count}. Better are 1,000.")


def fit_where_it_pays(
    model: Any, original: Any, batches: list[list[Any]], how: bool | str = True, verbose: Any = 0
) -> Reconstruction | None:
    """Fits a new model to the one that it was made from, in place, where that was asked for: the one rule of all that do so.

    Args:
        model: made by surgery from `original`, and nobody else's yet.
        original: what it shall be like.
        batches: flat inputs, as many as are held.
        how: True: for as many epochs as are within reason, perhaps none; `"together"`: for 30; else for none.
        verbose: of the progress.

    Returns:
        What was done; None where nothing was, or nothing is to be done, as nothing was removed.

    Raises:
        ValueError: for fewer than 64 samples with `"together"`.
    """
    if how not in (True, "together") or model.count_params() == original.count_params():
        return None
    epochs, count = EPOCHS, _count(batches)
    if how == "together":
        check_enough(batches)
    else:
        epochs = epochs_within_reason(count, _macs_of(model, batches[0])) if count >= _AUTO_SAMPLES else 0
    return fit_together(model, original, batches, epochs, verbose) if epochs else None


def _macs_of(model: Any, batch: list[Any]) -> int:
    """Multiply-accumulates of a sample of the lengths that the data have."""
    sample = keras.tree.pack_sequence_as(_nodes.graph_of(model)._inputs_struct, [np.asarray(x[:1]) for x in batch])
    return int(sum(row.macs or 0 for row in _macs.measure(model, sample)[0]))


def epochs_within_reason(samples: int, macs: int) -> int:
    """How many epochs are taken without being asked for: none for few samples, and where they would take minutes.

    Args:
        samples: their number.
        macs: multiply-accumulates of the smaller model for a sample.
    """
    epochs = int(_AUTO_WORK / max(3 * macs * samples, 1))  # a pass back takes twice a pass forward
    return min(epochs, EPOCHS) if samples >= _AUTO_SAMPLES and epochs >= _AUTO_EPOCHS else 0


def fit_together(model: Any, original: Any, batches: list[list[Any]], epochs: int, verbose: Any) -> Reconstruction:
    """Fits a model to the one that it was made from, in place.

    Args:
        model: made by surgery from `original`.
        original: what it shall be like.
        batches: flat inputs.
        epochs: how often they are seen.
        verbose: of the progress.
    """
    inputs = [ops.concatenate([batch[index] for batch in batches]) for index in range(len(batches[0]))]
    count = len(inputs[0])
    order = np.random.default_rng(0).permutation(count)
    steps = max((count - max(count // _HELD_OUT, 1)) // _BATCH, 1)
    parts = np.split(order, [_BATCH * (n + 1) for n in range(steps)])
    fitted, unseen = parts[:-1], [part for part in np.split(parts[-1], range(_BATCH, len(parts[-1]), _BATCH)) if len(part)]
    compared = _Compared(model, original, _BATCH * steps)
    read = [compared.wanted([ops.take(x, part, axis=0) for x in inputs]) for part in fitted]
    check = [compared.wanted([ops.take(x, part, axis=0) for x in inputs]) for part in unseen]
    compared.measure(read)
    variables = _variables(model)
    held = [variable.numpy() for variable in variables]
    before = _error(compared, check)
    if before > 0:
        _descend(compared, variables, read, epochs, verbose)
    after = _error(compared, check)
    if not after < before:  # so that NaN counts as a loss
        for variable, value in zip(variables, held, strict=True):
            variable.assign(value)
        after = before
    return Reconstruction(tuple(compared.places), _BATCH * steps, epochs, before, after)


_Pair = tuple[list[Any], list[Any]]  # flat inputs, and what the original gives for them


class _Compared:
    """What of two models is compared, and how far it is apart.

    Args:
        model: made by surgery from the other.
        original: the other.
        samples: how many are held.

    Attributes:
        places: what is compared inside, by path.
    """

    def __init__(self, model: Any, original: Any, samples: int) -> None:
        self.model, self.original = model, original
        self.kinds = _outputs.output_kinds(model)
        masks = _lineage.masks_between(model, original) or {}
        self.places = _thinned(_places(model, original, masks), model, samples)
        self.scales: list[float] = []

    def wanted(self, inputs: list[Any]) -> _Pair:
        """What the original gives, of the channels that are still there."""
        found, outputs = _given(self.original, inputs, self.places)
        inner = [ops.take(found[path], kept, axis=axis) for path, (axis, kept) in self.places.items()]
        return inputs, [*(ops.cast(one, "float32") for one in inner), *self._logits(outputs)]

    def measure(self, pairs: list[_Pair]) -> None:
        """Finds the variances that differences are relative to."""
        for several in zip(*(wanted for _, wanted in pairs), strict=True):
            values = ops.concatenate(several)
            spread = ops.mean(ops.var(values, axis=tuple(range(len(values.shape) - 1))))
            self.scales.append(1 / max(float(spread), 1e-12))

    def error(self, inputs: list[Any], wanted: list[Any]) -> Any:
        """Sum over the places and outputs, for a batch."""
        found, outputs = _given(self.model, inputs, self.places)
        given = [*(ops.cast(found[path], "float32") for path in self.places), *self._logits(outputs)]
        return sum(scale * ops.mean(ops.square(one - other)) for scale, one, other in zip(self.scales, given, wanted, strict=True))

    def _logits(self, outputs: list[Any]) -> list[Any]:
        values = []
        for value, kind in zip(outputs, self.kinds, strict=True):
            one = as_logits(value, kind)
            values.append(one - ops.mean(one, axis=-1, keepdims=True) if kind == _outputs.SOFTMAX else one)
        return values


_Place = tuple[int, np.ndarray]  # the axis of the channels, and which of the original's are still there


def _places(model: Any, original: Any, masks: _lineage.Masks) -> dict[str, _Place]:
    """Outputs of layers that layers with kernels read, and that both models have, once."""
    olds, news = _shapes(original), _shapes(model)
    read = {
        id(tensor)
        for node in _nodes.calls_of(original)
        if any(len(variable.shape) > 1 for variable in getattr(node.operation, "weights", ()))
        for tensor in node.arguments.keras_tensors
    }
    found: dict[str, _Place] = {}
    for path, (tensor, shape) in olds.items():
        mask, new = masks.get(path), news.get(path)
        if mask is None or new is None or id(tensor) not in read or len(new[1]) != len(shape):
            continue
        for axis in reversed(range(1, len(shape))):
            if shape[axis] == len(mask) and new[1] == (*shape[:axis], int(mask.sum()), *shape[axis + 1 :]):
                found[path] = axis, np.flatnonzero(mask)
                break
    return found


def _shapes(model: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """First output of each layer that is called once, by path: its tensor and its shape."""
    calls = Counter(path for path, _ in _named(model, ""))
    return {path: (node.outputs[0], tuple(node.outputs[0].shape)) for path, node in _named(model, "") if calls[path] == 1}


def _named(model: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for node in _nodes.nodes_of(model):
        path = prefix + node.operation.name
        is_entered = _nodes.is_open(node.operation) and _nodes.inner_inputs(node) is not None
        found += _named(node.operation, path + "/") if is_entered else [(path, node)]
    return found


def _thinned(places: dict[str, _Place], model: Any, samples: int) -> dict[str, _Place]:
    """Fewer places, evenly and with the last one, where memory does not hold what they all give."""
    news, paths = _shapes(model), list(places)
    sizes = [samples * int(np.prod([n or 64 for n in news[path][1][1:]], initial=4.0)) for path in paths]
    every = 1
    while every < len(paths) and sum(sizes[::-1][::every]) > _MEMORY:
        every += 1
    return {path: places[path] for path in reversed(paths[::-1][::every])}


def _given(model: Any, inputs: list[Any], places: Mapping[str, _Place]) -> tuple[dict[str, Any], list[Any]]:
    """What a model gives in inference at the places, and its outputs."""
    paths = {id(node): path for path, node in _named(model, "") if path in places}
    found: dict[str, Any] = {}

    def call(node: Any, values: dict[int, Any]) -> list[Any]:
        given = _nodes.called(node.operation, node, values)
        if id(node) in paths:
            found[paths[id(node)]] = given[0]
        return given

    outputs = _nodes.run(model, inputs, call)
    return found, outputs


def _variables(model: Any) -> list[Any]:
    """All weights, also those that a user froze; no statistics, which are variables that nothing trains."""
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables:
            if keras.backend.is_float_dtype(variable.dtype):
                found[id(variable)] = variable.value
    return list(found.values())


def _error(compared: _Compared, pairs: list[_Pair]) -> float:
    """Mean over the places, outputs and samples."""
    sizes = [len(inputs[0]) for inputs, _ in pairs]
    errors = [float(compared.error(*pair)) for pair in pairs]
    return float(np.average(errors, weights=sizes)) / len(compared.scales)


def _descend(compared: _Compared, variables: list[Any], pairs: list[_Pair], epochs: int, verbose: Any) -> None:
    """Adam, with steps relative to the size of each variable, that shrink to 0 by a cosine."""
    sizes = [tf.maximum(tf.sqrt(tf.reduce_mean(tf.square(one))), _LEAST) for one in variables]
    first, second = ([tf.Variable(tf.zeros_like(one)) for one in variables] for _ in range(2))

    @tf.function(jit_compile=False)
    def step(inputs: list[Any], wanted: list[Any], rate: Any, number: Any) -> None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            error = compared.error(inputs, wanted)
        gradients = tape.gradient(error, variables, unconnected_gradients="zero")
        for variable, size, mean, square, gradient in zip(variables, sizes, first, second, gradients, strict=True):
            gradient = tf.convert_to_tensor(gradient)
            mean.assign(_FIRST * mean + (1 - _FIRST) * gradient)
            square.assign(_SECOND * square + (1 - _SECOND) * tf.square(gradient))
            spread = tf.sqrt(square / (1 - _SECOND**number))
            variable.assign_sub(rate * size * tf.math.divide_no_nan(mean / (1 - _FIRST**number), spread))

    rng, steps, number = np.random.default_rng(0), epochs * len(pairs), 0
    with Progress(steps * _BATCH, title="all layers together", verbose=verbose) as progress:
        for _ in range(epochs):
            for index in rng.permutation(len(pairs)):
                rate = _RATE * (1 + np.cos(np.pi * number / steps)) / 2
                number += 1
                step(*pairs[index], tf.constant(rate, "float32"), tf.constant(number, "float32"))
                progress.advance(_BATCH)
