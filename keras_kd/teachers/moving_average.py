"""Can a student teach itself? A moving average of its own weights is a steadier model than the student."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_kd import _taps
from keras_kd._outputs import output_kinds
from keras_kd._tunable import Tunable, fraction
from keras_kd.teachers.frozen import Teacher, inputs_of


@keras.saving.register_keras_serializable(package="keras_kd")
class MovingAverage:
    """Self-distillation: the teacher is the exponential moving average of the student's own weights.

    ```
    after each training step    w_teacher <- momentum * w_teacher + (1 - momentum) * w_student
    ```

    It starts as a copy of the student; statistics of batch normalisation are averaged likewise. Pass it as the teacher:
    `Distiller(teachers.MovingAverage(0.99), student, KDLoss())`. Unlike other teachers it belongs to the training, so files of the
    Distiller hold it, and training goes on from them as it was. After `fit`, `distiller.teacher.model` is the averaged model.

    Args:
        momentum: share of the average that stays, in [0, 1]. Readable and assignable: compiled steps follow.

    Raises:
        ValueError: for a momentum outside [0, 1].

    Example:

    >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> distiller = keras_kd.Distiller(keras_kd.teachers.MovingAverage(momentum=0.9), student)
    >>> distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = distiller.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
    >>> distiller.teacher.model.count_params() == student.count_params()
    True

    Reference:
        Tarvainen, Valpola: Mean Teachers Are Better Role Models, 2017.
    """

    momentum = Tunable(fraction)

    def __init__(self, momentum: float = 0.999) -> None:
        self.momentum = momentum
        self.model: keras.Model | None = None

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"momentum": self.momentum}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MovingAverage":
        """Rebuilds it; a Distiller fills in the model."""
        return cls(**config)


class AveragedStudent(Teacher):
    """Holds the average of a student.

    Args:
        average: what the user asked for.
        student: the model whose weights are averaged.
    """

    name = "moving average of the student"

    def __init__(self, average: MovingAverage, student: keras.Model) -> None:
        if average.model is not None:
            raise ValueError(
                "This MovingAverage already follows a student: it belongs to one Distiller. Make another, "
                f"teachers.MovingAverage({average.momentum})."
            )
        self.given = average
        self.model = average.model = copy_of(student)
        self.kinds = output_kinds(self.model)
        self.supports_jit = all(layer.supports_jit for layer in self.model._flatten_layers())

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Runs the average in inference mode."""
        with _taps.record(self.model, layer_names, role="teacher") as features:
            outputs = self.model(inputs_of(x), training=False)
        return outputs, features

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that the student does not have."""
        for name in names:
            _taps.find_layer(self.model, name, role="teacher", argument="teacher_layer_name")

    def shapes(self, names: Iterable[str]) -> tuple[Any, dict[str, Any]] | None:
        """Shapes of the outputs and of the named layers."""
        return _taps.shapes(self.model, names, role="teacher")

    def follow(self, student: keras.Model) -> None:
        """Moves the average towards the student."""
        momentum = Tunable.tensor(self.given, "momentum")
        for kept, new in zip(self.model.variables, student.variables, strict=True):
            if "float" in keras.backend.standardize_dtype(kept.dtype):
                share = keras.ops.cast(momentum, kept.dtype)
                kept.assign(share * kept + (1 - share) * keras.ops.convert_to_tensor(new))
            else:  # states of random generators
                kept.assign(new)

    def get_config(self) -> dict[str, Any] | None:
        """What was asked for; the average itself is among the Distiller's weights."""
        return keras.saving.serialize_keras_object(self.given)


def copy_of(model: keras.Model) -> keras.Model:
    """A copy of a model with the same weights, not trainable and not compiled."""
    config = {**keras.saving.serialize_keras_object(model), "compile_config": None}
    known = {type(layer).__name__: type(layer) for layer in [model, *model._flatten_layers()]}
    # Code that is in memory already is no risk.
    twin: keras.Model = keras.saving.deserialize_keras_object(config, custom_objects=known, safe_mode=False)
    twin.set_weights(model.get_weights())
    twin.trainable = False
    return twin
