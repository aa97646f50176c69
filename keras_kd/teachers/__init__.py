"""Who teaches: one frozen model, several, a recording, a moving average of the student."""

from typing import Any

import keras

from keras_kd.teachers.ensemble import Ensemble
from keras_kd.teachers.frozen import AbsentTeacher, FrozenTeacher, RecordedBatch, RecordedTeacher, Teacher, check_model, inputs_of
from keras_kd.teachers.moving_average import AveragedStudent, MovingAverage
from keras_kd.teachers.reuse import classifier_input, reuse_classifier


def hold(
    teacher: Any, student: keras.Model, *, preprocessing: Any = None, weights: Any = None, activation: str | None = None
) -> Teacher:
    """Makes the holder for whatever a user passes as `teacher`.

    Args:
        teacher: a model, a list of models, a `Recording`, a `MovingAverage`, or a holder.
        student: the student.
        preprocessing: what turns the student's inputs into the teacher's.
        weights: of several teachers.
        activation: what turns logits of several teachers into probabilities; None averages their outputs as they are.

    Raises:
        TypeError: for anything else.
        ValueError: for weights without several teachers, or a preprocessing that would not be used.
    """
    if isinstance(teacher, (list, tuple)):
        return Ensemble(teacher, weights, activation=activation, preprocessing=preprocessing)
    if weights is not None:
        raise ValueError(f"`teacher_weights` are for a list of teachers. Received: teacher_weights={weights!r} and one teacher.")
    is_model = isinstance(teacher, (keras.Model, AbsentTeacher))
    if preprocessing is not None and not is_model:
        raise ValueError(
            "`teacher_preprocessing` is for models that a Distiller asks itself. Received: teacher_preprocessing="
            f"{preprocessing!r} and {type(teacher).__name__}. A recording takes it in record_teacher, an Ensemble as "
            "`preprocessing`; the student's average sees what the student sees."
        )
    if isinstance(preprocessing, (list, tuple)) and isinstance(teacher, keras.Model):
        raise ValueError(
            f"One preprocessing per teacher is for a list of teachers. Received: {len(preprocessing)} and one teacher. Make "
            "another Distiller for it."
        )
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, MovingAverage):
        return AveragedStudent(teacher, student)
    if callable(getattr(teacher, "dataset", None)) and hasattr(teacher, "teacher_name"):
        return RecordedTeacher(teacher)
    check_model(teacher, "teacher")
    return FrozenTeacher(teacher, preprocessing)


__all__ = [
    "AbsentTeacher",
    "AveragedStudent",
    "Ensemble",
    "FrozenTeacher",
    "MovingAverage",
    "RecordedBatch",
    "RecordedTeacher",
    "Teacher",
    "check_model",
    "classifier_input",
    "hold",
    "inputs_of",
    "reuse_classifier",
]
