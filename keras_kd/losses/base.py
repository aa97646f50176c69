"""What is a distillation loss? The base class that every loss of this library, and of its users, is built on."""

import re
from typing import Any

import keras
from keras import ops

from keras_kd._outputs import structure
from keras_kd._tunable import at_least_float32

LayerNames = str | list[str] | tuple[str, ...] | None


@keras.saving.register_keras_serializable(package="keras_kd")
class DistillationLoss(keras.losses.Loss):
    """Base class of the distillation losses: compares what a student gives with what its teacher gives.

    A subclass implements `call(y_true, y_pred)` with `y_true` the teacher's output and `y_pred` the student's, and returns one
    value per sample, shape `(batch,)`; Keras weights and reduces them. A subclass that also needs the ground truth sets
    `uses_labels = True` and then gets `y_true={"teacher": ..., "labels": ...}`. One whose value mixes the samples of a batch
    may set `uses_mask = True`: then `y_true` is a dict too, with a "mask" (1 where a position is real) if the student's output
    has one.

    The same object works in `keras_kd.Distiller` and, if it uses no labels, in `model.compile(loss=...)` on stored teacher
    outputs and in `keras.distillation.Distiller`, which have no place for labels beside the teacher's outputs.

    Args:
        name: name in the logs. Defaults to the class name in snake case.
        reduction: as in `keras.losses.Loss`.
        dtype: dtype of the computation; a half precision is raised to float32. Defaults to `keras.config.floatx()`.
        teacher_layer_name: layer of the teacher whose output is compared: a name, a path such as `"backbone/conv4"`, or a list
            of them. None is the model's output.
        student_layer_name: the same for the student. Give both or neither.
        output_name: for models with several outputs, the one to compare (a name, or an index); None compares all of them and
            adds the values.

    Raises:
        ValueError: if only one of the two layer names is given.

    Example:

    >>> class MeanAbsoluteDistillation(keras_kd.losses.DistillationLoss):
    ...     def call(self, y_true, y_pred):
    ...         return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)
    >>> loss = MeanAbsoluteDistillation()
    >>> float(loss(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]])))
    1.0
    >>> loss.name
    'mean_absolute_distillation'

    A number that callbacks change while training is a `Tunable`: it reads and is set as a number, and `Tunable.tensor` is what
    compiled steps follow.

    >>> class Powered(keras_kd.losses.DistillationLoss):
    ...     power = keras_kd.Tunable()
    ...
    ...     def __init__(self, power=2.0, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.power = power
    ...
    ...     def call(self, y_true, y_pred):
    ...         power = keras_kd.Tunable.tensor(self, "power")
    ...         return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** power, axis=-1)
    ...
    ...     def get_config(self):
    ...         return {**super().get_config(), "power": self.power}
    >>> float(Powered(3.0)(np.zeros((1, 2)), np.array([[2.0, 2.0]])))
    8.0
    """

    uses_labels = False
    uses_mask = False

    def __init__(
        self,
        *,
        name: str | None = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
        teacher_layer_name: LayerNames = None,
        student_layer_name: LayerNames = None,
        output_name: str | int | None = None,
    ) -> None:
        super().__init__(name=name or snake_case(type(self).__name__), reduction=reduction, dtype=at_least_float32(dtype))
        check_layer_names(teacher_layer_name, student_layer_name)
        self.teacher_layer_name = teacher_layer_name
        self.student_layer_name = student_layer_name
        self.output_name = output_name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Computes the weighted, reduced loss.

        Args:
            y_true: the teacher's output; `{"teacher": output, "labels": labels}` where the loss uses labels.
            y_pred: the student's output. Its Keras mask, if it has one, is applied.
            sample_weight: one weight per sample, or per position.
        """
        y_true = self._unpack(y_true)
        mask = getattr(y_pred, "_keras_mask", None)
        if self.uses_mask and mask is not None:
            y_true["mask"] = mask
        if not (self.uses_labels or self.uses_mask):
            y_true = y_true["teacher"]
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value per sample; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} must implement call(y_true, y_pred): teacher's output, student's output.")

    def _unpack(self, y_true: Any) -> dict[str, Any]:
        packed = isinstance(y_true, dict) and "teacher" in y_true
        unpacked = y_true if packed else {"teacher": y_true}
        if self.uses_labels and unpacked.get("labels") is None:
            raise ValueError(
                f"{type(self).__name__} compares with the ground truth too and got no labels. Pass "
                f'y_true={{"teacher": teacher_output, "labels": labels}}; in a Distiller, call fit(x, y) with y.'
            )
        if not self.uses_labels:
            return {"teacher": unpacked["teacher"]}
        return {**unpacked, "labels": ops.convert_to_tensor(unpacked["labels"])}

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("teacher_layer_name", "student_layer_name", "output_name")
        return {**super().get_config(), "dtype": self.dtype, **{name: getattr(self, name) for name in names}}

    # What `keras.distillation.Distiller` asks of a loss, so that ours can stand in its list.

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Any:
        """Returns the scalar loss between nested outputs (the interface of `keras.distillation`)."""
        values = keras.tree.map_structure(self, teacher_outputs, student_outputs)
        return ops.sum(ops.stack([ops.mean(value) for value in keras.tree.flatten(values)]))

    def validate_outputs(self, teacher_outputs: Any, student_outputs: Any) -> None:
        """Raises a `ValueError` unless both have the same structure (the interface of `keras.distillation`)."""
        if structure(teacher_outputs) != structure(student_outputs):
            raise ValueError(
                f"Teacher and student give outputs of different structure. Teacher: {structure(teacher_outputs)}. "
                f"Student: {structure(student_outputs)}."
            )

    def validate_model_compatibility(self, teacher: Any, student: Any) -> None:
        """Accepts any two models (the interface of `keras.distillation`); shapes are checked when they are seen."""


def check_layer_names(teacher_layer_name: Any, student_layer_name: Any) -> None:
    """Raises a `ValueError` if only one of the two names is given, which would compare a feature with final outputs."""
    if (teacher_layer_name is None) != (student_layer_name is None):
        raise ValueError(
            "Give both `teacher_layer_name` and `student_layer_name`, or neither to compare the models' outputs. Received: "
            f"teacher_layer_name={teacher_layer_name!r}, student_layer_name={student_layer_name!r}."
        )


def snake_case(name: str) -> str:
    """`KDLoss` -> `kd_loss`, `MultiLevelKDLoss` -> `multi_level_kd_loss`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
