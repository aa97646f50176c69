"""What do the losses on inner layers share? Lists of layers, adapters, masks, and Keras layers that a loss owns and trains."""

import contextlib
import contextvars
import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_kd._mistakes import OF_LOSSES, refuse_keywords
from keras_kd._outputs import convert
from keras_kd.layers.projectors import Projector, pooled_to
from keras_kd.losses._channels import checked_channels, narrowed, narrowed_shapes
from keras_kd.losses._math import safe_divide
from keras_kd.losses.base import DistillationLoss

_IN_TRAINING: contextvars.ContextVar[bool] = contextvars.ContextVar("keras_kd_training", default=False)


@contextlib.contextmanager
def phase(training: bool) -> Iterator[None]:
    """Tells the layers that losses own whether this is a step of training."""
    token = _IN_TRAINING.set(bool(training))
    try:
        yield
    finally:
        _IN_TRAINING.reset(token)


def in_training() -> bool:
    """Whether a training step is under way."""
    return _IN_TRAINING.get()


@keras.saving.register_keras_serializable(package="keras_kd")
class FeatureLoss(DistillationLoss):
    """Base class of the losses that compare what inner layers give.

    A subclass implements `compare(teacher, student, index)` for one pair of layers, with features of one shape, and returns one
    value per sample; the values of several layers add up. It overrides `compare_layers` when the layers belong together. Where it
    needs trained layers of its own, it creates them in `create_layers` and puts them into `self.layers`: a `Distiller` trains
    and saves them with the student, and alone does so: in a plain `model.compile(loss=...)` or in `keras.distillation` they stay
    as they began. They see batch statistics in a Distiller's training step alone. A loss with such layers belongs to one
    Distiller.

    Features may come with a Keras mask (sequences): masked positions are set to zero on both sides, and means over positions
    leave them out.

    Args:
        teacher_channels: which of the teacher's channels stand against the student's, one index for each channel of the student,
            in its order; they are compared without a projector. For several layers, a list with indices, or None, for each. A
            dict by the teacher's layers is looked up, such as `kept` of a `SurgeryReport`. None compares all. `"auto"`: in a
            Distiller whose student surgery made from this very teacher, the channels that were kept, where both layers have
            one name, the method compares channel with channel, and no projector is given; otherwise all.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name` (a name, a path, or lists of them):
            see `DistillationLoss`.

    Raises:
        TypeError: if `teacher_channels` are no whole numbers.
        ValueError: if they do not fit the layers' names, or, when features are seen, their channels.
    """

    ranks: tuple[int, ...] = (2, 3, 4, 5)  # of the features that it can use
    min_layers = 1
    equal_sizes = True  # whether the larger map is average-pooled to the smaller before they are compared
    equal_widths = True

    def __init__(self, *, teacher_channels: Any = "auto", **kwargs: Any) -> None:
        refuse_keywords(type(self).__name__, kwargs, OF_LOSSES)
        super().__init__(**kwargs)
        self.teacher_channels = checked_channels(teacher_channels, self.teacher_layer_name)
        self._projector: Any = None
        self._adapters: list[Any] = []
        self.layers: list[keras.layers.Layer] = []
        self._build_shapes: Any = None
        self.built = False

    # The layers of a loss

    @property
    def variables(self) -> list[Any]:
        """Weights of the layers that it owns."""
        return [variable for layer in self.layers for variable in layer.variables]

    @property
    def trainable_variables(self) -> list[Any]:
        """Those that are trained with the student."""
        return [variable for layer in self.layers for variable in layer.trainable_variables]

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Creates the layers that these shapes of features need.

        Args:
            teacher_shape: shape of the teacher's feature, or a list of shapes, the batch first (None).
            student_shape: the student's.

        Raises:
            ValueError: if the method cannot compare features of these shapes.
        """
        whole, students = _shapes(teacher_shape), _shapes(student_shape)
        teachers = narrowed_shapes(self.teacher_channels, whole, students)
        self._check(teachers, students)
        if self.layers:
            self._check_built_for(whole, students)
            return
        self._adapters = []
        for index, shapes in enumerate(zip(teachers, students, strict=True)):
            self._adapters.append(None if self._channels_at(index) is not None else self._adapter(*shapes))
        self.layers = [adapter for adapter in self._adapters if adapter is not None]
        self.create_layers(teachers, [self._adapted_shape(*shapes) for shapes in zip(teachers, students, strict=True)])
        self.built = True
        self._build_shapes = [_without_batch(whole), _without_batch(students)]

    def create_layers(self, teacher_shapes: list[Any], student_shapes: list[Any]) -> None:
        """Creates, builds and appends to `self.layers` what a subclass needs beyond adapters; shapes are those after adapting."""

    def get_build_config(self) -> dict[str, Any] | None:
        """Shapes that the layers were built for; None if they are not there."""
        return {"shapes": self._build_shapes} if self.built and self.layers else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Rebuilds the loss, and its projector where it takes one."""
        if "projector" in config:
            config = {**config, "projector": keras.saving.deserialize_keras_object(config["projector"])}
        return cls(**config)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layers that a file knows."""
        self.build(*[[(None, *shape) for shape in shapes] for shapes in config["shapes"]])

    def use_projector(self, projector: Any) -> Any:
        """Takes what brings the student's features to the teacher's width: "auto", a Keras layer, or None; returns it."""
        if projector not in ("auto", None) and not isinstance(projector, keras.layers.Layer):
            raise TypeError(f'`projector` must be "auto", None or a Keras layer. Received: projector={projector!r}.')
        if isinstance(projector, keras.layers.Layer) and isinstance(self.teacher_channels, list):
            raise ValueError(
                "`teacher_channels` are compared without a projector: give one of the two. Received: "
                f"teacher_channels={self.teacher_channels!r}, projector={projector!r}."
            )
        self._projector = projector
        self._projector_config = keras.saving.serialize_keras_object(projector)  # of the layer as it came, for further copies
        return projector

    # The channels of the teacher

    def takes_kept_channels(self) -> bool:
        """Whether a Distiller shall choose the channels that surgery kept: it compares by channel, and no projector is given."""
        return self.teacher_channels == "auto" and self.equal_widths and not isinstance(self._projector, keras.layers.Layer)

    def _channels_at(self, index: int) -> list[int] | None:
        """The channels of the teacher that are compared in layer `index`; None for all."""
        return self.teacher_channels[index] if isinstance(self.teacher_channels, list) else None

    def _check_built_for(self, teachers: list[Any], students: list[Any]) -> None:
        known = [_channels(shapes, self.positions_count) for shapes in self._build_shapes]
        given = [_channels(_without_batch(shapes), self.positions_count) for shapes in (teachers, students)]
        if known != given:
            raise ValueError(
                f"This {type(self).__name__} has layers for features of other shapes. Received: teacher {teachers}, student "
                f"{students}. Built for: teacher {self._build_shapes[0]}, student {self._build_shapes[1]} (without the batch). "
                "Make a loss of its own for each pair of layers and each pair of models."
            )

    positions_count = False  # whether its layers fit one number of positions only

    def _adapter(self, teacher: Any, student: Any) -> Any:
        if self._projector is None or (self._projector == "auto" and teacher[1:] == student[1:]):
            return None
        layer = self._projector
        if layer == "auto":
            layer = Projector(teacher[-1], dtype=self.dtype)
        elif self._adapters:  # one layer, several pairs: a copy for each of the others
            layer = keras.saving.deserialize_keras_object(self._projector_config)
        shape = (None, *self._common_size(teacher, student), student[-1])
        if not layer.built:
            layer.build(shape)
        width = tuple(layer.compute_output_shape(shape))[-1]
        if width != teacher[-1]:
            raise ValueError(
                f"The projector of {type(self).__name__} must give the teacher's width, {teacher[-1]}. Received: "
                f'projector="{layer.name}", which gives {width} for the student\'s feature {student}.'
            )
        return layer

    def _common_size(self, teacher: Any, student: Any) -> tuple[int, ...]:
        if not self.equal_sizes:
            return tuple(student[1:-1])
        return tuple(a if a == b else min(a, b) for a, b in zip(teacher[1:-1], student[1:-1], strict=True))

    def _adapted_shape(self, teacher: Any, student: Any) -> tuple[Any, ...]:
        width = teacher[-1] if self._projector is not None else student[-1]
        return (None, *self._common_size(teacher, student), width) if len(teacher) == len(student) else student

    # The comparison

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Computes the weighted, reduced loss.

        Args:
            y_true: the teacher's feature, shape `(batch, ..., channels)`, or a list of features.
            y_pred: the student's.
            sample_weight: one weight per sample; weights per position are averaged.
        """
        y_true = self._unpack(y_true)
        y_true["teacher"] = [convert(feature, self.dtype) for feature in _as_list(y_true["teacher"])]
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight, dtype=self.dtype)
            if len(sample_weight.shape) > 1:
                sample_weight = ops.mean(sample_weight, axis=tuple(range(1, len(sample_weight.shape))))
        return super().__call__(y_true, [convert(feature, self.dtype) for feature in _as_list(y_pred)], sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per sample, shape `(batch,)`."""
        teachers, students = _as_list(y_true), _as_list(y_pred)
        self.build([feature.shape for feature in teachers], [feature.shape for feature in students])
        return self.compare_layers([narrowed(x, self._channels_at(index)) for index, x in enumerate(teachers)], students)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "teacher_channels": self.teacher_channels}

    def compare_layers(self, teachers: list[Any], students: list[Any]) -> Any:
        """Returns one value per sample for all layers together: by default the sum of theirs."""
        values = [self._compare_pair(index, *pair) for index, pair in enumerate(zip(teachers, students, strict=True))]
        return sum(values[1:], values[0])

    def adapt(self, index: int, teacher: Any, student: Any) -> tuple[Any, Any]:
        """Brings the features of layer `index` to one size and, by an adapter, to one width."""
        if self.equal_sizes and len(teacher.shape) > 2:
            size = self._common_size(teacher.shape, student.shape)
            teacher, student = pooled_to(teacher, size), pooled_to(student, size)
        adapter = self._adapters[index]
        return teacher, student if adapter is None else run_layer(adapter, student)

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per sample for pair `index` of layers (of any shape, where `positions` says how to reduce the rest).

        Args:
            teacher: the teacher's feature.
            student: the student's, adapted.
            index: the pair's place in the lists of layer names.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare(teacher, student, index).")

    positions: str | None = None  # "mean" or "sum" where `compare` gives values per position or channel, to be reduced here

    def _compare_pair(self, index: int, teacher: Any, student: Any) -> Any:
        mask = getattr(student, "_keras_mask", None)
        teacher, student = self.adapt(index, *self.without_masked(teacher, student))
        present = None
        # Only positions that are still those of the mask, (batch, time): pooled ones mix what is real and what is not.
        if mask is not None and len(student.shape) == 3 and student.shape[1] == mask.shape[1]:
            present = ops.cast(mask, self.dtype)  # (batch, time)
            teacher, student = teacher * present[..., None], student * present[..., None]  # adapters may have filled them
        value = self.compare(teacher, student, index)
        return value if self.positions is None else self._reduced(value, present)

    def _reduced(self, value: Any, present: Any) -> Any:
        """Sum or mean over all axes but the first, without the positions that a mask leaves out."""
        axes = tuple(range(1, len(value.shape)))
        if not axes:
            return value
        if present is not None:
            present = ops.reshape(present, (*ops.shape(present), *[1] * (len(value.shape) - 2)))  # (batch, time, 1...)
            value = value * present
        total = ops.sum(value, axis=axes)
        if self.positions == "sum":
            return total
        # A sum over a count, in one reduction: the gradient of TensorFlow's mean divides a tensor as large as the feature.
        if present is None:
            return total / ops.cast(math.prod(ops.shape(value)[1:]), total.dtype)
        return safe_divide(total, ops.sum(present, axis=axes) * math.prod(ops.shape(value)[2:]))

    def without_masked(self, teacher: Any, student: Any) -> tuple[Any, Any]:
        """Sets the positions that the student's Keras mask leaves out to zero, on each side that has as many positions."""
        mask = getattr(student, "_keras_mask", None)
        if mask is None:
            return teacher, student
        present = ops.cast(mask, self.dtype)[..., None]  # (batch, time, 1)
        masked = [x * present if len(x.shape) == 3 and x.shape[1] == mask.shape[1] else x for x in (teacher, student)]
        return masked[0], masked[1]

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Any:
        """Returns the scalar loss (the interface of `keras.distillation`)."""
        return ops.mean(self(teacher_outputs, student_outputs))

    # What it cannot compare

    def _check(self, teachers: list[Any], students: list[Any]) -> None:
        name = type(self).__name__
        if len(teachers) != len(students) or len(teachers) < self.min_layers:
            raise ValueError(
                f"{name} compares as many layers of the student as of the teacher, at least {self.min_layers}. Received: "
                f"{len(teachers)} of the teacher, {len(students)} of the student. Pass lists of the same length as "
                "`teacher_layer_name` and `student_layer_name`."
            )
        for teacher, student in zip(teachers, students, strict=True):
            received = f"Received: teacher {teacher}, student {student}."
            if len(teacher) not in self.ranks or len(student) not in self.ranks:
                wanted = "maps (batch, positions..., channels)" if 2 not in self.ranks else "features (batch, ..., channels)"
                ranks = f"{wanted} of rank {' or '.join(map(str, self.ranks))}"
                raise ValueError(f"{name} compares {ranks}. {received} Name other layers.")
            self._check_pair(teacher, student, received)

    def _check_pair(self, teacher: Any, student: Any, received: str) -> None:
        name = type(self).__name__
        if len(teacher) != len(student):
            raise ValueError(f"{name} compares features of the same rank. {received} Name layers of the same kind.")
        sizes = list(zip(teacher[1:-1], student[1:-1], strict=True)) if self.equal_sizes else []
        if None in (teacher[-1], student[-1]) or any(None in (a, b) and a != b for a, b in sizes):
            raise ValueError(
                f"{name} must know positions and channels of features of different shapes. {received} Give the models inputs of a "
                "fixed size."
            )
        if self._projector is None and self.equal_widths and teacher[-1] != student[-1]:
            raise ValueError(
                f"{name} without a projector compares features of the same width. {received} "
                'Pass projector="auto" or a Keras layer.'
            )


@keras.saving.register_keras_serializable(package="keras_kd")
class RelationLoss(FeatureLoss):
    """Base class of the losses that compare relations between the samples of a batch.

    A subclass implements `relate(teacher, student)` on features of shape `(batch, width)`, flattened; the widths may differ. It
    returns each row's share, so that the mean over the batch is the published value. A batch of one has no relations: its value
    is 0. On several devices each replica relates the samples of its own share of the batch.

    Args:
        **kwargs: `name`, `reduction`, `dtype`, layer names, `teacher_channels`: see `FeatureLoss`.
    """

    equal_sizes = False
    equal_widths = False

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns each sample's share."""
        if teacher.shape[0] == 1:
            warnings.warn(
                f"{type(self).__name__} compares the samples of a batch with each other, and got a batch of one: its value is 0. "
                "Use larger batches.",
                stacklevel=2,
            )
        return self.relate(flat(teacher), flat(student))

    def relate(self, teacher: Any, student: Any) -> Any:
        """Returns one value per row of `(batch, width)`; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} must implement relate(teacher, student).")

    def _check_pair(self, teacher: Any, student: Any, received: str) -> None:
        """Any two shapes have relations."""


def run_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer that a loss owns, in the phase of the step."""
    return layer(*args, training=in_training(), **kwargs)


def flat(x: Any) -> Any:
    """Flattens all axes but the first."""
    width: Any = 1
    for length in x.shape[1:]:
        width = None if None in (width, length) else width * length
    return ops.reshape(x, (-1, width)) if width is not None else ops.reshape(x, (ops.shape(x)[0], -1))


def _as_list(features: Any) -> list[Any]:
    return list(features) if isinstance(features, (list, tuple)) else [features]


def _shapes(shape: Any) -> list[tuple[Any, ...]]:
    several = (len(shape) > 0 and isinstance(shape[0], (list, tuple))) or hasattr(shape[0], "rank")
    return [tuple(one) for one in (shape if several else [shape])]


def _without_batch(shapes: list[Any]) -> list[list[Any]]:
    return [list(shape[1:]) for shape in shapes]


def _channels(shapes: list[Any], positions_count: bool) -> list[Any]:
    return [tuple(shape) if positions_count else shape[-1] for shape in shapes]
