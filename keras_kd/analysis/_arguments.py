"""What was handed in? Models, inputs and labels, checked before anything is traced, and the loss that labels call for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _batching, _outputs, _samples, _taps
from keras_kd.quantized import QuantizedModel

Loss = Callable[[Any, Any], Any]

# Beyond this number of classes, one-hot targets of probes are too much memory.
MAX_CLASSES = 4096


def checked_model(model: Any) -> keras.Model:
    """A built model; of a Distiller, its student."""
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if isinstance(model, QuantizedModel):
        raise ValueError(
            f'`model` must be a model of floats. Received: the QuantizedModel "{model.name}". Pass `quantized.model`, or '
            "`quantized.with_rounded_kernels()` for its rounded kernels."
        )
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    stateful = [path for path, layer in _taps.find_layers(model).items() if getattr(layer, "stateful", False)]
    if stateful:
        raise ValueError(
            "`model` must not keep states from batch to batch: the noise of one would be in the next. Received: the stateful "
            f"layers {', '.join(stateful)}. Build it with stateful=False and take over the weights."
        )
    return model


@contextlib.contextmanager
def unchanged(model: keras.Model) -> Iterator[None]:
    """What layers count or remember when they are called is as before afterwards."""
    layers = [model, *_taps.find_layers(model).values()]
    variables = {id(one): one for layer in layers for one in getattr(layer, "_non_trainable_variables", ())}
    former = [(one, keras.ops.convert_to_numpy(one).copy()) for one in variables.values()]
    try:
        yield
    finally:
        for one, value in former:
            if not np.array_equal(keras.ops.convert_to_numpy(one), value):
                one.assign(value)


def checked_names(argument: str, names: Any) -> list[str] | None:
    """A sequence of names, or None."""
    if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"`{argument}` must be a sequence of names, such as [{names!r}]. Received: {argument}={names!r}.")
    return None if names is None else list(names)


def checked_seed(seed: Any) -> int:
    """A whole number."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be a whole number of at least 0. Received: seed={seed!r}.")
    return int(seed)


def fitting(model: keras.Model, x: Any, specs: Any) -> Any:
    """Inputs in the model's types and nesting; arrays in other containers are taken in order, those in a dict by name."""
    known = getattr(model, "inputs", None)
    if isinstance(x, dict) and known:
        x = _samples._by_name(model, x, "data")
    values, wanted = keras.tree.flatten(x), keras.tree.flatten(specs)
    try:
        if len(values) != len(wanted):
            raise ValueError
        cast = [tf.cast(value, spec.dtype) for value, spec in zip(values, wanted, strict=True)]
    except (TypeError, ValueError, tf.errors.OpError) as error:
        names = f" ({', '.join(tensor.name for tensor in known)})" if known else ""
        told = f"{type(x).__name__} of {len(values)}" if keras.tree.is_nested(x) else type(x).__name__
        raise ValueError(
            f'`data` must be nested as "{model.name}" takes its {len(wanted)} inputs{names}, and hold numbers. Received: {told}.'
        ) from error
    for value, spec in zip(cast, wanted, strict=True):
        if not (spec if known else _of_any_length(spec)).is_compatible_with(value):
            shape = tuple(value.shape)
            raise ValueError(
                f'`data` must have the shape that "{model.name}" takes, {tuple(spec.shape)}, samples along the first axis. '
                f"Received: {shape}."
            )
    return keras.tree.pack_sequence_as(specs, cast) if keras.tree.is_nested(specs) else cast[0]


def _of_any_length(spec: tf.TensorSpec) -> tf.TensorSpec:
    """Of a subclassed model's input: steps may differ from batch to batch, the width of floats may not."""
    last = None if spec.dtype.is_integer or spec.shape.rank == 1 else spec.shape[-1]
    return tf.TensorSpec([*[None] * (spec.shape.rank - 1), last], spec.dtype) if spec.shape.rank else spec


def widened(specs: Any, values: Any) -> Any:
    """Specifications that these tensors fit, too: axes that differ are of any length."""

    def one(spec: tf.TensorSpec, value: Any) -> tf.TensorSpec:
        if spec.shape.rank != value.shape.rank:
            raise ValueError(
                f"`labels` must have the same axes in all batches. Received: shapes {tuple(spec.shape)} and {tuple(value.shape)}."
            )
        axes = [a if a == b else None for a, b in zip(spec.shape[1:], value.shape[1:], strict=True)]
        return tf.TensorSpec([None, *axes], spec.dtype)

    return keras.tree.map_structure(one, specs, values)


@dataclasses.dataclass(frozen=True)
class Task:
    """What labels are, and what follows from that.

    Attributes:
        kind: "classes": indices; "binary": 0 or 1 for a single output; "rows": one-hot or probabilities; "" for others.
        classes: number of classes that probes tell apart; None for no probes.
        loss: function of `(y, outputs)`, one number for each sample; None without labels.
        middle: where a single output's two sides meet.
        limit: labels are below it, None where a loss was given: it may take others.
    """

    kind: str = ""
    classes: int | None = None
    loss: Loss | None = None
    middle: float = 0.5
    limit: float | None = None

    def check(self, y: Any) -> None:
        """Labels of a batch, where the loss is none of the user's.

        Raises:
            ValueError: for NaN, and indices that are none.
        """
        if y is None or self.limit is None:
            return
        values = np.asarray(y)
        if not np.isfinite(values).all():
            raise ValueError("`labels` must be finite. Received: NaN or infinite values.")
        if np.isfinite(self.limit) and values.size and not (values.min() >= 0 and values.max() < self.limit):
            advice = ' For other targets of a single output pass loss="mse".' if self.kind == "binary" else ""
            raise ValueError(
                f"`labels` must be class indices from 0 to {int(self.limit) - 1}, as the model gives that many outputs. Received: "
                f"values from {values.min()} to {values.max()}.{advice}"
            )

    def indices(self, y: Any) -> Any:
        """Class indices of labels, `(samples,)`."""
        values = np.asarray(y)
        return values.argmax(-1) if self.kind == "rows" else values.reshape(-1).astype("int64")


def task_of(model: keras.Model, outputs: Sequence[Any], y: Any, labels: Any, loss: Any) -> Task:
    """What the labels of the first batch, or all of them where they are known, call for.

    Args:
        model: a built model.
        outputs: what it gives, as a trace shows it.
        y: labels of the first batch.
        labels: all labels, or None.
        loss: what the user wants; None for the usual.
    """
    if y is None:
        if loss is not None:
            raise ValueError("`labels` must be given with `loss`. Received: labels=None.")
        return Task()
    known = keras.tree.map_structure(np.asarray, y if labels is None else _batching.as_arrays(labels))
    kind = _kind_of(known, outputs)
    made = keras.losses.get(_default_loss(model, outputs, known, kind) if loss is None else loss)
    kinds = _outputs.output_kinds(model)
    logits = kinds[:1] == [_outputs.LOGITS] or (kinds[:1] in ([], [None]) and getattr(made, "from_logits", False))
    limit = np.inf if loss is None else None
    if loss is None and isinstance(made, keras.losses.SparseCategoricalCrossentropy):
        limit = outputs[0].shape[-1] or np.inf
    elif loss is None and kind == "binary":
        limit = 2
    function: Any = made.call if isinstance(made, keras.losses.Loss) else made
    return Task(kind, _number(kind, known, outputs, labels is not None), function, 0.0 if logits else 0.5, limit)


def check_numbers(y: Any) -> None:
    """Labels are numbers."""
    for one in [] if y is None else keras.tree.flatten(y):
        dtype = getattr(one, "dtype", None) or np.asarray(one).dtype
        if np.dtype(getattr(dtype, "as_numpy_dtype", dtype)).kind not in "biuf":
            raise ValueError(
                f"`labels` must be numbers. Received: {getattr(dtype, 'name', dtype)}. Turn names of classes into indices: "
                "labels=np.unique(labels, return_inverse=True)[1]."
            )


def _kind_of(y: Any, outputs: Sequence[Any]) -> str:
    if keras.tree.is_nested(y) or len(outputs) != 1 or not y.size:
        return ""
    width = outputs[0].shape[-1] if outputs[0].shape.rank == 2 else None
    if y.ndim == 2 and y.shape[1] == width and width > 1:
        return "rows" if np.all(y >= 0) and np.allclose(y.sum(-1, dtype="float64"), 1.0, atol=1e-3) else ""
    if y.dtype.kind not in "biu" or y.ndim > 2 or y.ndim == 0 or (y.ndim == 2 and y.shape[1] != 1) or y.min() < 0:
        return ""
    if width == 1:
        return "binary" if y.max() <= 1 else ""
    return "classes"


def _number(kind: str, y: Any, outputs: Sequence[Any], are_all: bool) -> int | None:
    """Of classes that probes tell apart."""
    if kind in ("", "binary"):
        return 2 if kind else None
    width = outputs[0].shape[-1] if outputs[0].shape.rank == 2 else None
    if width is None and not are_all:
        return None
    number = max(int(y.max()) + 1 if kind == "classes" else 0, width or 2)
    return number if number <= MAX_CLASSES else None


def _default_loss(model: keras.Model, outputs: Sequence[Any], y: Any, kind: str) -> Any:
    if keras.tree.is_nested(y) or len(outputs) > 1:
        raise ValueError("`loss` must be given for a model with several outputs. Received: loss=None.")
    given = (_outputs.output_kinds(model) or [None])[0]
    shape, logits, width = outputs[0].shape, given == _outputs.LOGITS, outputs[0].shape[-1]
    same = _outputs.shapes_agree(y.shape[1:], shape[1:]) or (y.ndim == 1 and shape.rank == 2 and width == 1)
    if y.dtype.kind == "f":
        if kind == "rows" and given in (_outputs.LOGITS, _outputs.SOFTMAX):
            return keras.losses.CategoricalCrossentropy(from_logits=logits)
        if not same:
            raise _misfit(y, shape)
        if given == _outputs.SIGMOID and np.all((y >= 0) & (y <= 1)):
            return keras.losses.BinaryCrossentropy()
        return keras.losses.MeanSquaredError()
    if given is None:
        compiled = getattr(model, "loss", None)
        if compiled is None:
            raise ValueError(
                "`loss` must be given where the model's last layer does not tell whether it gives logits. Received: loss=None. For "
                "logits: loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        return compiled
    if width == 1 or given == _outputs.SIGMOID:
        binary = same and bool(np.all((y == 0) | (y == 1)))
        if not binary and (given == _outputs.SIGMOID or not same):
            raise _misfit(y, shape, " and be 0 or 1" if same else "")
        return keras.losses.BinaryCrossentropy(from_logits=logits) if binary else keras.losses.MeanSquaredError()
    if kind == "rows":
        return keras.losses.CategoricalCrossentropy(from_logits=logits)
    if not (_outputs.shapes_agree(y.shape[1:], shape[1:-1]) or _outputs.shapes_agree(y.shape[1:], (*shape[1:-1], 1))):
        raise _misfit(y, shape[:-1], " of class indices, or have one-hot rows of the outputs' shape")
    return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)


def _misfit(y: Any, shape: Any, more: str = "") -> ValueError:
    return ValueError(
        f"`labels` must have the shape {tuple(shape)}{more}, as the model's outputs, where `loss` is not given. Received: "
        f"{y.dtype} of shape {y.shape}."
    )
