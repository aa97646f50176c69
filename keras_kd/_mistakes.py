"""Which mistakes would training accept in silence? Keywords of other code, and a supervised loss that takes what is not there."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_kd import _outputs
from keras_kd._outputs import LOGITS

_SHARE = "Write Distiller(..., student_loss_weight=...): the share of the supervised loss, in [0, 1]; the teacher has the rest."
_ALPHA = f"{_SHARE} Where alpha was the teacher's share, that is 1 - alpha."
_TEMPERATURE = "The temperature is the loss's: Distiller(teacher, student, keras_kd.losses.KDLoss(temperature=...))."
_LOSSES = "Write Distiller(teacher, student, distillation_losses=...): a loss of keras_kd.losses, or a list of them."
_WEIGHTS = "Write Distiller(..., distillation_loss_weights=[...]): one weight per distillation loss."
_SUPERVISED = "The supervised loss goes to distiller.compile(optimizer, loss=...)."
_COMPILED = "It goes to distiller.compile(optimizer, loss=..., metrics=[...])."
_LAYERS = "Write both `teacher_layer_name` and `student_layer_name`: a name each, or a list of them."

# What other code for distillation calls the arguments of `Distiller` and of its `compile`, and what to write here.
OF_DISTILLER = {
    "alpha": _ALPHA,
    "student_loss_weight": _SHARE,
    **dict.fromkeys(("temperature", "T", "tau"), _TEMPERATURE),
    **dict.fromkeys(("distillation_losses", "distillation_loss", "distillation_loss_fn"), _LOSSES),
    **dict.fromkeys(("distillation_loss_weights", "distillation_loss_weight"), _WEIGHTS),
    **dict.fromkeys(("student_loss", "student_loss_fn"), _SUPERVISED),
    **dict.fromkeys(("optimizer", "loss", "metrics"), _COMPILED),
}
# The same for losses; those that take `alpha` themselves never ask.
OF_LOSSES = {
    **dict.fromkeys(("weight", "loss_weight"), _WEIGHTS),
    **dict.fromkeys(("layer", "layers", "layer_name", "teacher_layer", "student_layer"), _LAYERS),
}
OF_RESPONSE_LOSSES = {
    **OF_LOSSES,
    **dict.fromkeys(("T", "tau"), "Write `temperature` (MultiLevelKDLoss: `temperatures`)."),
    "alpha": _ALPHA,
}

_BY_FUNCTION = {
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.binary_focal_crossentropy: keras.losses.BinaryFocalCrossentropy,
    keras.losses.categorical_crossentropy: keras.losses.CategoricalCrossentropy,
    keras.losses.categorical_focal_crossentropy: keras.losses.CategoricalFocalCrossentropy,
    keras.losses.sparse_categorical_crossentropy: keras.losses.SparseCategoricalCrossentropy,
}
_CROSS_ENTROPIES = tuple(_BY_FUNCTION.values())


def refuse_keywords(owner: str, given: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    """Raises a `TypeError` for a keyword that other code knows, with what to write here.

    Args:
        owner: what was called.
        given: its unknown keywords.
        instead: what to write, by keyword.
    """
    for name in given:
        if name in instead:
            raise TypeError(f"{owner} has no argument `{name}`. Received: {name}={given[name]!r}. {instead[name]}")


def warn_of_logits(student: Any, loss: Any) -> None:
    """Warns if a cross-entropy of probabilities meets logits, or one of logits meets probabilities.

    It says something only where it is sure: a cross-entropy of Keras, and an output whose last layers are Keras' own.

    Args:
        student: the student.
        loss: what `compile` got for it.
    """
    kinds, linear = _outputs.output_kinds(student), _outputs.linear_outputs(student)
    for index, label, made in _cross_entropies(student, loss):
        which = f'output "{label}"' if len(kinds) > 1 else "output"
        name = f"keras.losses.{type(made).__name__}"
        if linear[index] and not made.from_logits:
            warnings.warn(
                f"The student's {which} is logits, since no softmax or sigmoid ends it, and the loss takes probabilities: the "
                f"student would learn next to nothing from labels. Write loss={name}(from_logits=True).",
                stacklevel=3,
            )
        elif kinds[index] not in (None, LOGITS) and made.from_logits:
            warnings.warn(
                f"The student's {which} ends in a {kinds[index]}, and the loss has from_logits=True. Write loss={name}(), or end "
                "the student in logits.",
                stacklevel=3,
            )


def _cross_entropies(student: Any, loss: Any) -> Iterator[tuple[int, str, Any]]:
    """The cross-entropies among the losses of `compile`, each with the index of its output and what `compile` calls that."""
    names, count = getattr(student, "output_names", None), len(getattr(student, "outputs", None) or [])
    nested = getattr(student, "_outputs_struct", None)
    if nested is None:  # a Sequential model, or students side by side, whose outputs go by name
        nested = dict.fromkeys(names, 0) if count > 1 and names else 0
    paths = list(_outputs.flatten_outputs(nested))
    if keras.tree.is_nested(loss):
        try:
            by_path = _outputs.match(loss, paths, names)
        except ValueError:  # Keras will say so
            return
    else:
        by_path = dict.fromkeys(paths, loss)
    for index, path in enumerate(paths[:count]):
        made = _as_cross_entropy(by_path[path])
        if made is not None:
            yield index, names[index] if names and path.isdigit() else path, made


def _as_cross_entropy(loss: Any) -> Any:
    """The loss object that an identifier stands for; None for all but cross-entropies of Keras."""
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:  # Keras will say so
            return None
    if callable(loss) and getattr(loss, "__hash__", None) is not None and loss in _BY_FUNCTION:
        return _BY_FUNCTION[loss]()
    return loss if type(loss) in _CROSS_ENTROPIES else None
