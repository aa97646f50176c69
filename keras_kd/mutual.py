"""Can students teach each other, without a teacher? Deep mutual learning of several models in one `fit`."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from keras_kd import _outputs
from keras_kd._outputs import LOGITS
from keras_kd.distiller import Distiller
from keras_kd.teachers import Teacher, check_model


@keras.saving.register_keras_serializable(package="keras_kd")
class MutualDistiller(Distiller):
    """Trains several students that learn from the labels and from each other.

    ```
    loss = sum_k [ student_loss_weight * supervised_k
                   + (1 - student_loss_weight) * mean over l != k of sum_i(weight_i * distillation_i(output_l, output_k)) ]
    ```

    plus the students' regularisers. What a student says to another is a constant for the gradient. Each of `distiller.students`
    stays the plain Keras model that it was. Outputs, losses and metrics are named by the students: `predict` gives a dict, the
    logs hold `a_accuracy`, `b_accuracy`.

    Args:
        students: at least two built models of different names, with the same inputs and one output of the same shape each.
        distillation_losses: losses that compare outputs, as for `Distiller`. None is `KDLoss(temperature=1)`, as in the paper.
        distillation_loss_weights: one number, not negative, per distillation loss. None is 1 for each.
        student_loss_weight: share of the supervised losses, in [0, 1].
        name: name of the model.
        **kwargs: as for `Distiller`.

    Raises:
        TypeError: for what is no Keras model.
        ValueError: for fewer than two students, names that are not unique, students with several outputs, or losses that name
            layers.

    Example:

    >>> inputs = keras.Input((4,))
    >>> students = [keras.Model(inputs, keras.layers.Dense(3)(inputs), name=name) for name in ("a", "b")]
    >>> distiller = keras_kd.MutualDistiller(students)
    >>> distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = distiller.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
    >>> sorted(name for name in history.history if name.endswith("accuracy"))
    ['a_accuracy', 'b_accuracy']

    Reference:
        Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, 2018.
    """

    def __init__(
        self,
        students: Any,
        distillation_losses: Any = None,
        distillation_loss_weights: Any = None,
        student_loss_weight: float = 0.5,
        name: str = "mutual_distiller",
        **kwargs: Any,
    ) -> None:
        cohort = students if isinstance(students, Cohort) else Cohort(students)
        if distillation_losses is None:
            from keras_kd.losses import KDLoss

            distillation_losses = KDLoss(temperature=1.0)
        super().__init__(
            _Peers(cohort), cohort, distillation_losses, distillation_loss_weights, student_loss_weight, name=name, **kwargs
        )
        for term in self._terms:
            if not term.compares_outputs:
                raise ValueError(
                    f"Students that teach each other compare outputs. Received: {term.name} with student_layer_name="
                    f"{term.student_layers!r}. Leave the layer names out."
                )

    @property
    def students(self) -> list[keras.Model]:
        """The students, as they were handed over."""
        return list(self.student.students)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, metrics: Any = None,
                weighted_metrics: Any = None, **kwargs: Any) -> None:  # fmt: skip
        """Configures training; one loss, and one list of metrics, is taken for each student.

        Args:
            optimizer: name or optimizer, for all students.
            loss: the supervised loss; a dict by student for different ones; None to learn from each other alone.
            loss_weights: weights of the students' losses, by name.
            metrics: metrics of each student's output.
            weighted_metrics: metrics that sample weights apply to.
            **kwargs: see `Distiller.compile`.
        """
        super().compile(
            optimizer, self._for_each(loss), loss_weights, self._for_each(metrics), self._for_each(weighted_metrics), **kwargs
        )

    def _for_each(self, given: Any) -> Any:
        """A copy for each student: metrics keep a state of their own."""
        if given is None or isinstance(given, dict):
            return given
        return {name: keras.tree.map_structure(_copied, given) for name in self.student.output_names}

    def _frozen_outputs(self, x: Any) -> Any:
        return ()  # they have not spoken yet: see `compute_loss`

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
                     training: bool = True, teacher: Any = None) -> Any:  # fmt: skip
        """Computes the total loss: see `Distiller`. Labels are the same for all students, or a dict by student."""
        said = {}
        kinds = _outputs.output_kinds(self.student) or [None] * len(y_pred)
        for name, kind in zip(self.student.output_names, kinds, strict=True):
            output = y_pred[name] if kind is None else _outputs.as_logits(y_pred[name], kind)
            said[name] = tf.stop_gradient(output)
        return super().compute_loss(x, self._labels(y), y_pred, sample_weight, training=training, teacher=said)

    def distillation_loss(self, x: Any, y: Any, student: Any, teacher: Any, sample_weight: Any) -> Any:
        """The distillation part of the loss: each student learns from each of the others."""
        heard = [_rolled(teacher, by) for by in range(1, len(student))]
        return sum(super(MutualDistiller, self).distillation_loss(x, y, student, said, sample_weight) for said in heard) / len(
            heard
        )

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the metrics of all students and returns the logs."""
        return super().compute_metrics(x, self._labels(y), y_pred, sample_weight=sample_weight)

    def _output_pairs(self, teacher: Any, student: Any) -> list[Any]:
        return super()._output_pairs(_rolled(teacher, 1), student)  # agreement with the next student

    def _labels(self, y: Any) -> Any:
        names = self.student.output_names
        return y if y is None or (isinstance(y, dict) and set(y) <= set(names)) else dict.fromkeys(names, y)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Raises: which of the students?"""
        raise ValueError("Export one of the students: `distiller.students[0].export(...)`.")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = super().get_config()
        config["students"] = config.pop("student")
        for name in ("teacher", "teacher_preprocessing"):
            config.pop(name)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "MutualDistiller":
        """Rebuilds the students and their Distiller."""
        # A scope of Keras replaces the one around it, such as that of load_model(custom_objects=): open none without need.
        with keras.saving.custom_object_scope(custom_objects) if custom_objects else contextlib.nullcontext():
            for key in ("students", "distillation_losses"):
                config = {**config, key: keras.saving.deserialize_keras_object(config[key])}
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_kd")
class Cohort(keras.Model):
    """Several models side by side on the same inputs; its output is a dict by their names.

    Args:
        students: built models of different names, one output each.
        **kwargs: see `keras.Model`.
    """

    def __init__(self, students: Any, **kwargs: Any) -> None:
        students = list(students)
        for index, student in enumerate(students):
            check_model(student, f"students[{index}]")
            if len(getattr(student, "outputs", None) or [None]) != 1:
                raise ValueError(f'Each student must have one output. Received: "{student.name}" with {len(student.outputs)}.')
        names = [student.name for student in students]
        if len(students) < 2 or len(set(names)) < len(names):
            raise ValueError(f"`students` must be at least two models of different names. Received: students named {names}.")
        kwargs.setdefault("dtype", students[0].dtype_policy)
        super().__init__(**kwargs)
        self.students = students
        self.built = True

    @property
    def output_names(self) -> list[str]:
        """The students' names, sorted, as Keras flattens dicts."""
        return [student.name for student in self._ordered()]

    def _ordered(self) -> list[keras.Model]:
        return sorted(self.students, key=lambda student: student.name)

    @property
    def outputs(self) -> list[Any]:
        """The students' symbolic outputs, where all have a graph."""
        outputs = [getattr(student, "outputs", None) or [None] for student in self._ordered()]
        return [] if [None] in outputs else [output[0] for output in outputs]

    @property
    def inputs(self) -> list[Any]:
        """The students' symbolic inputs, where all have a graph."""
        inputs = [getattr(student, "inputs", None) or [None] for student in self._ordered()]
        return [] if [None] in inputs else [tensor for tensors in inputs for tensor in tensors]

    def call(self, inputs: Any, training: Any = None) -> dict[str, Any]:
        """Calls every student."""
        return {student.name: student(inputs, training=training) for student in self._ordered()}

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"students": [keras.saving.serialize_keras_object(student) for student in self.students], "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Cohort":
        """Rebuilds the students."""
        return cls(**{**config, "students": keras.saving.deserialize_keras_object(config["students"])})


class _Peers(Teacher):
    """Each student's teachers are the others."""

    name = "the other students"

    def __init__(self, cohort: Cohort) -> None:
        self.kinds = [None if kind is None else LOGITS for kind in _outputs.output_kinds(cohort)]


def _rolled(said: dict[str, Any], by: int) -> dict[str, Any]:
    """What the student `by` places further said, for each student."""
    names = list(said)
    return {name: said[names[(index + by) % len(names)]] for index, name in enumerate(names)}


def _copied(given: Any) -> Any:
    return type(given).from_config(given.get_config()) if isinstance(given, keras.metrics.Metric) else given
