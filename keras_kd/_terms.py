"""How does one distillation loss meet the models' outputs? Picks what it compares, brings it to the right form, gives a scalar."""

import contextlib
import numbers
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _lineage, _outputs, _taps
from keras_kd._outputs import LOGITS, SIGMOID, SOFTMAX
from keras_kd.losses import get as get_loss
from keras_kd.losses._channels import narrowed
from keras_kd.losses._features import FeatureLoss
from keras_kd.losses.base import DistillationLoss, check_layer_names, snake_case
from keras_kd.losses.response import KDLoss, ResponseLoss

# Losses of Keras that compare probabilities: their targets must not be logits.
_CATEGORICAL = (keras.losses.KLDivergence, keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy)
_BINARY = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)


class Term:
    """One distillation loss and the outputs or layers that it compares.

    Args:
        loss: a loss of this library, a `keras.losses.Loss`, or a loss of `keras.distillation`.
        name: its name in the logs.
    """

    def __init__(self, loss: Any, name: str) -> None:
        self.loss = loss
        self.name = name
        self.teacher_layers = getattr(loss, "teacher_layer_name", None)
        self.student_layers = getattr(loss, "student_layer_name", None)
        check_layer_names(self.teacher_layers, self.student_layers)
        self.teacher_kinds: list[str | None] = []
        self.student_kinds: list[str | None] = []
        self.kept: list[list[int] | None] = []  # for each layer, the channels of the teacher that surgery kept in the student

    @property
    def compares_outputs(self) -> bool:
        """Whether it compares final outputs, rather than layers."""
        return self.teacher_layers is None

    def check(self, teacher: Any, student: keras.Model) -> None:
        """Raises a `ValueError` for models whose outputs this loss cannot compare; remembers what the outputs hold.

        Args:
            teacher: holder of the teacher: see `keras_kd.teachers`.
            student: the student.
        """
        if isinstance(self.loss, ResponseLoss) and not isinstance(self.teacher_layers, str | None):
            raise ValueError(
                f"{self.name} compares one layer. Received: teacher_layer_name={self.teacher_layers!r}. Pass one loss for each."
            )
        if isinstance(self.loss, ResponseLoss) and self.compares_outputs and teacher.activation not in (None, self.loss.activation):
            raise ValueError(
                f"{self.name} compares {self.loss.activation} distributions, and the teachers' are averaged as "
                f'{teacher.activation}. Pass teachers.Ensemble([...], activation="{self.loss.activation}").'
            )
        self.teacher_kinds, self.student_kinds = teacher.kinds, _outputs.output_kinds(student)
        if not (self.compares_outputs and teacher.is_present) or isinstance(self.loss, FeatureLoss):
            return
        models = getattr(teacher, "model", None), student
        shapes = [[tuple(t.shape) for t in getattr(model, "outputs", None) or []] for model in models]
        if all(shapes):
            wrong = len(shapes[0]) != len(shapes[1]) or not all(map(_outputs.shapes_agree, *shapes))
            if wrong and getattr(self.loss, "output_name", None) is None:
                raise ValueError(
                    f"Teacher and student must give outputs of the same shapes for {self.name}. Received: teacher {shapes[0]}, "
                    f"student {shapes[1]}."
                )
        if isinstance(self.loss, ResponseLoss) and self.loss.from_logits is None and self.loss.output_name is None:
            found = {*self.teacher_kinds, *self.student_kinds}
            if {SOFTMAX, SIGMOID} <= found and len(self.teacher_kinds) == len(self.student_kinds) == 1:
                raise ValueError(
                    "Teacher and student must mean the same by their outputs. Received: a teacher that ends in "
                    f"{self.teacher_kinds[0]}, a student that ends in {self.student_kinds[0]}. For one class of several end both "
                    "in softmax (or logits), for independent yes-or-no labels both in sigmoid (or logits)."
                )
            for kinds, role in ((self.teacher_kinds, "teacher"), (self.student_kinds, "student")):
                for kind in kinds or [None]:
                    self._known(kind, role)

    def __call__(self, teacher: Any, student: Any, labels: Any, sample_weight: Any, *, output_names: Any, features: Any) -> Any:
        """Computes the unweighted, reduced value of the loss.

        Args:
            teacher: the teacher's outputs, nested as the model gives them.
            student: the student's.
            labels: ground truth, or None.
            sample_weight: weights, or None.
            output_names: names of the student's outputs, or None.
            features: `(teacher's, student's)` outputs of layers, by name.

        Returns:
            A scalar tensor.
        """
        if not self.compares_outputs:
            given, learned = self.kept_of(_pick(features[0], self.teacher_layers)), _pick(features[1], self.student_layers)
            return self._compare({"": (given, learned)}, labels, sample_weight, None)
        return self._compare(_outputs.pair(teacher, student), labels, sample_weight, output_names)

    def kept_of(self, features: Any) -> Any:
        """What the teacher's layers give, or shapes of it, with the channels alone that surgery kept in the student."""
        if not any(self.kept):
            return features
        if isinstance(self.teacher_layers, str):
            return _kept_of(features, self.kept[0])
        return [_kept_of(feature, channels) for feature, channels in zip(features, self.kept, strict=True)]

    def get_config(self) -> dict[str, Any]:
        """The loss as Keras serialises it, with the channels that surgery kept: loaded models do not know them."""
        serialized: dict[str, Any] = keras.saving.serialize_keras_object(self.loss)
        if any(self.kept):
            serialized["config"]["teacher_channels"] = self.kept
        return serialized

    @contextlib.contextmanager
    def naming_itself(self) -> Iterator[None]:
        """Adds the names of the layers to an error about their features."""
        try:
            yield
        except ValueError as error:
            where = f' In "{self.name}": teacher_layer_name={self.teacher_layers!r}, student_layer_name={self.student_layers!r}.'
            raise ValueError(f"{error}{where}") from None

    def _compare(self, pairs: dict[str, tuple[Any, Any]], labels: Any, sample_weight: Any, names: Any) -> Any:
        if not isinstance(self.loss, keras.losses.Loss):
            return self._compare_by_keras_distillation(pairs, sample_weight)
        paths = list(pairs)
        chosen = self._chosen(paths, names)
        labels = _outputs.match(labels, paths, names) if getattr(self.loss, "uses_labels", False) else dict.fromkeys(paths)
        nested = keras.tree.is_nested(sample_weight)
        if nested and not self.compares_outputs:
            raise ValueError(
                f"{self.name} compares layers, which have no sample weights of their own. Received: nested sample weights, "
                f"{_outputs.structure(sample_weight)}. Pass one weight per sample."
            )
        weights = _outputs.match(sample_weight, paths, names) if nested else dict.fromkeys(paths, sample_weight)
        values = []
        for path in chosen:
            teacher, student = self._prepare(*pairs[path], self._kinds_at(paths, path))
            y_true = {"teacher": teacher, "labels": labels[path]} if getattr(self.loss, "uses_labels", False) else teacher
            values.append(self.loss(y_true, student, weights[path]))
        return sum(values[1:], values[0])

    def _chosen(self, paths: list[str], names: Any) -> list[str]:
        wanted = getattr(self.loss, "output_name", None)
        if wanted is None:
            return paths
        if isinstance(wanted, int) and -len(paths) <= wanted < len(paths):
            return [paths[wanted]]
        if wanted in paths:
            return [wanted]
        if names is not None and wanted in names and len(names) == len(paths):
            return [paths[list(names).index(wanted)]]
        raise ValueError(f"No output {wanted!r}. Received: output_name={wanted!r} in {self.name}. Outputs: {names or paths}.")

    def _kinds_at(self, paths: list[str], path: str) -> tuple[str | None, str | None]:
        index = paths.index(path)
        teacher, student = (
            kinds[index] if self.compares_outputs and len(kinds) == len(paths) else None
            for kinds in (self.teacher_kinds, self.student_kinds)
        )
        return teacher, student

    def _prepare(self, teacher: Any, student: Any, kinds: tuple[str | None, str | None]) -> tuple[Any, Any]:
        """Brings both sides to what the loss takes: logits for ours, probabilities for Keras' probabilistic losses."""
        loss = self.loss
        if isinstance(loss, ResponseLoss):
            if loss.from_logits is None and self.compares_outputs:
                teacher = _outputs.as_logits(teacher, self._known(kinds[0], "teacher"))
                student = _outputs.as_logits(student, self._known(kinds[1], "student"))
        elif isinstance(loss, DistillationLoss):
            pass
        elif self.compares_outputs and isinstance(loss, (*_CATEGORICAL, *_BINARY)):
            activation = SOFTMAX if isinstance(loss, _CATEGORICAL) else SIGMOID
            if kinds[0] is not None:
                teacher = _outputs.as_probabilities(teacher, kinds[0], activation=activation)
            if kinds[1] is not None and not getattr(loss, "from_logits", False):
                student = _outputs.as_probabilities(student, kinds[1], activation=activation)
            elif kinds[1] is not None:
                student = _outputs.as_logits(student, kinds[1])
        return teacher, student

    def _known(self, kind: str | None, role: str) -> str:
        activation = self.loss.activation
        if kind is None:
            raise ValueError(
                f"{self.name} cannot find out whether the {role} gives logits or probabilities, since its last layer is not one of "
                f"Keras' own in a Functional or Sequential model. Pass from_logits=True (logits) or from_logits=False "
                f"(probabilities) to {type(self.loss).__name__}."
            )
        if kind not in (LOGITS, activation):
            raise ValueError(
                f'{self.name} compares {activation} distributions; the {role} ends in a {kind}. Use KDLoss(activation="{kind}").'
            )
        return kind

    def _compare_by_keras_distillation(self, pairs: dict[str, tuple[Any, Any]], sample_weight: Any) -> Any:
        """A loss of `keras.distillation` gives a scalar of its own; it knows no sample weights and no replicas."""
        if sample_weight is not None:
            warnings.warn(
                f"{type(self.loss).__name__} of keras.distillation takes no sample weights: they are left out of {self.name}. "
                "The losses of keras_kd.losses apply them.",
                stacklevel=2,
            )
        paths = list(pairs)
        teachers, students = [list(side) for side in zip(*pairs.values(), strict=True)]
        if isinstance(self.loss, keras.distillation.LogitsDistillation):  # it takes its inputs for logits
            kinds = [self._kinds_at(paths, path) for path in paths]
            teachers = [_outputs.as_logits(t, kind or LOGITS) for t, (kind, _) in zip(teachers, kinds, strict=True)]
            students = [_outputs.as_logits(s, kind or LOGITS) for s, (_, kind) in zip(students, kinds, strict=True)]
        for given, learned in zip(teachers, students, strict=True):
            if not self.compares_outputs and not _outputs.shapes_agree(tuple(given.shape), tuple(learned.shape)):
                raise ValueError(
                    f"{type(self.loss).__name__} of keras.distillation has no adapters: it would fail, or broadcast in silence. "
                    f"Received: teacher {tuple(given.shape)}, student {tuple(learned.shape)} in {self.name}. Use "
                    "keras_kd.losses.HintLoss, which projects the student's feature."
                )
        teacher, student = (_outputs.packed(paths, side) for side in (teachers, students))
        try:
            self.loss.validate_outputs(teacher, student)
        except AttributeError:  # Keras 3.15 stumbles over its own error message
            raise ValueError(
                f"The structure of losses in {self.name} does not match the outputs. Losses: {_outputs.structure(self.loss.loss)}. "
                f"Outputs: {_outputs.structure(student)}."
            ) from None
        value = self.loss.compute_loss(teacher, student)
        scaled = all(isinstance(loss, keras.losses.Loss) for loss in keras.tree.flatten(getattr(self.loss, "loss", self.loss)))
        return value if scaled else value / tf.distribute.get_strategy().num_replicas_in_sync


def _pick(features: dict[str, Any], names: Any) -> Any:
    return features[names] if isinstance(names, str) else [features[name] for name in names]


def make_terms(losses: Iterable[Any]) -> list[Term]:
    """Gives each loss a name of its own: `kd_loss`, `kd_loss_1`."""
    taken = {"loss", "student_loss", "distillation_loss"}
    terms = []
    for loss in losses:
        base = name = getattr(loss, "name", None) or snake_case(type(loss).__name__)
        count = 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        terms.append(Term(loss, name))
    return terms


def check_layers(term: Term, teacher: Any, student: keras.Model) -> None:
    """Raises a `ValueError` for a layer name that the models do not have; finds the channels that surgery kept."""
    teacher.check_layers(flat_names([term.teacher_layers]))
    for name in flat_names([term.student_layers]):
        _taps.find_layer(student, name, role="student", argument="student_layer_name")
    takes = isinstance(term.loss, FeatureLoss) and term.loss.takes_kept_channels()
    if takes and (any(term.kept) or not term.loss.layers):  # layers that are there already were built for all channels
        term.kept = _kept_channels(term, teacher, student)


def _kept_channels(term: Term, teacher: Any, student: keras.Model) -> list[list[int] | None]:
    """For each pair of layers of one path, the teacher's channels that a student made from it has; None where it has all."""
    original = teacher.original
    masks = _lineage.masks_between(student, original)
    if masks is None:
        return []
    kept = []
    for names in zip(flat_names([term.teacher_layers]), flat_names([term.student_layers]), strict=False):
        (path, call), other = (_path_of(model, name) for model, name in zip((original, student), names, strict=True))
        mask = masks.get(f"{path}:{call}", masks.get(path)) if (path, call) == other else None
        kept.append(None if mask is None or mask.all() else np.flatnonzero(mask).tolist())
    return kept


def _kept_of(feature: Any, channels: list[int] | None) -> Any:
    if channels is not None and not hasattr(feature, "dtype"):  # a shape
        return (*feature[:-1], len(channels))
    return narrowed(feature, channels)


def _path_of(model: Any, name: str) -> tuple[str, str]:
    """Path of a layer that a name means, and which of its calls."""
    return _taps.find_path(model, name), name.split(":")[1] if ":" in name else "0"


def build_losses(terms: list[Term], teacher: Any, student: keras.Model) -> None:
    """Lets losses check the shapes that they will see and create the layers that they own, where the shapes are known.

    Where they are not (subclassed models), that happens in the first step.
    """
    waiting = [term for term in terms if isinstance(term.loss, FeatureLoss)]
    if not waiting:
        return
    given = teacher.shapes(flat_names(term.teacher_layers for term in waiting))
    learned = _taps.shapes(student, flat_names(term.student_layers for term in waiting), role="student")
    if given is None or learned is None:
        return
    for term in waiting:
        if term.compares_outputs:
            pairs = [(given[0], learned[0])] if not keras.tree.is_nested(learned[0]) else []
        else:
            pairs = [(term.kept_of(_pick(given[1], term.teacher_layers)), _pick(learned[1], term.student_layers))]
        for pair in pairs:
            if _is_known(pair):
                with term.naming_itself():
                    term.loss.build(*pair)


_OWNERS: Any = weakref.WeakKeyDictionary()


def claim(loss: Any, owner: Any) -> None:
    """Raises a `ValueError` for a loss whose trained layers belong to another Distiller: each would train the other's."""
    if not getattr(loss, "layers", None):
        return
    known = _OWNERS.setdefault(loss, weakref.ref(owner))
    if known() is not owner:
        raise ValueError(
            f"This {type(loss).__name__} has trained layers, and belongs to another Distiller. Make a loss of its own for each "
            "Distiller."
        )


def _is_known(shapes: Any) -> bool:
    """Whether all lengths but the batch's are known: images of any size, say, show theirs in the first step."""
    flat = [shape for one in shapes for shape in (one if isinstance(one, list) else [one])]
    return None not in [length for shape in flat for length in tuple(shape)[1:]]


def activation_of(terms: list[Term]) -> str | None:
    """What turns logits into probabilities for the losses that compare outputs; None where these compare numbers."""
    losses = [term.loss for term in terms if term.compares_outputs]
    if any(isinstance(loss, _BINARY) or getattr(loss, "activation", None) == SIGMOID for loss in losses):
        return SIGMOID
    probabilistic = (ResponseLoss, keras.distillation.LogitsDistillation, *_CATEGORICAL)
    return SOFTMAX if not losses or any(isinstance(loss, probabilistic) for loss in losses) else None


def as_losses(identifiers: Any) -> list[Any]:
    """Turns what a user gives for `distillation_losses` into a list of losses."""
    if identifiers is None:
        return [KDLoss()]
    found = [get_loss(loss) for loss in (identifiers if isinstance(identifiers, (list, tuple)) else [identifiers])]
    if not found:
        raise ValueError("`distillation_losses` must hold at least one loss; None is KDLoss(). Received: an empty list.")
    for loss in found:
        _warn_about_raw_divergence(loss)
    return found


def as_weights(weights: Any, found: list[Any]) -> Any:
    """Turns what a user gives for `distillation_loss_weights` into a list with one weight per loss."""
    if weights is None:
        return [1.0] * len(found)
    weights = np.atleast_1d(np.asarray(weights)).tolist() if isinstance(weights, numbers.Real | np.ndarray) else weights
    if len(weights) != len(found):
        raise ValueError(
            f"`distillation_loss_weights` must hold one number per distillation loss. Received: {len(weights)} weights, "
            f"{weights!r}, for {len(found)} losses."
        )
    return list(weights)


def flat_names(groups: Any) -> list[str]:
    """Flattens layer names: None, one name, or a list of them."""
    return [name for group in groups if group is not None for name in ([group] if isinstance(group, str) else group)]


def _warn_about_raw_divergence(loss: Any) -> None:
    """Says once that the default of `keras.distillation.LogitsDistillation` is no distillation: it has no softmax."""
    if isinstance(loss, keras.distillation.LogitsDistillation) and getattr(loss.loss, "__name__", "") == "kl_divergence":
        warnings.warn(
            'keras.distillation.LogitsDistillation(loss="kl_divergence") compares raw logits, without softmax and without T^2. '
            f"Use keras_kd.losses.KDLoss(temperature={loss.temperature}), or pass loss=keras.losses.KLDivergence().",
            stacklevel=3,
        )
