"""Who teaches? Holders of a teacher, which keep it out of the student's weights, files and gradients."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_kd import _taps
from keras_kd._outputs import output_kinds, shapes_agree


class FrozenTeacher:
    """A model that is read and never changed.

    Keras finds sub-models, and writes to weight files, whatever hangs on a model as a Keras object; a plain holder hides the
    teacher from both. The teacher's `trainable` flags stay as they are.

    Args:
        model: a built Keras model.
        preprocessing: callable that turns the student's inputs into the teacher's; None hands them on.
    """

    is_present = True

    def __init__(self, model: keras.Model, preprocessing: Any = None) -> None:
        self.model = model
        self.preprocessing = preprocessing

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.model.name)

    @property
    def kinds(self) -> list[str | None]:
        """What each output holds: see `output_kinds`."""
        return output_kinds(self.model)

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile every layer."""
        return all(layer.supports_jit for layer in self.model._flatten_layers())

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Runs the teacher in inference mode; returns its outputs and the outputs of the named layers."""
        if self.preprocessing is not None:
            x = self.preprocessing(x)
        with _taps.record(self.model, layer_names, role="teacher") as features:
            outputs = self.model(x, training=False)
        return outputs, features

    def get_config(self) -> dict[str, Any] | None:
        """The architecture, without weights and without what it was compiled with; None if the model cannot be serialised."""
        try:
            config = keras.saving.serialize_keras_object(self.model)
        except NotImplementedError:  # a subclassed model without `get_config`
            return None
        return {**config, "compile_config": None}


class AbsentTeacher:
    """Stands where the teacher of a loaded Distiller will be: files hold a teacher's architecture, not its weights.

    `model` is that architecture with fresh weights (None where it cannot be rebuilt): load weights into it and assign it.

    Args:
        config: the architecture that the file holds, kept for the next file.
    """

    is_present = False
    name = "absent"
    kinds: list[str | None] = []
    supports_jit = True
    preprocessing: Any = None

    def __init__(self, config: dict[str, Any] | None, preprocessing: Any = None) -> None:
        self.config = config
        self.preprocessing = preprocessing
        self.model = self._rebuild()

    def _rebuild(self) -> keras.Model | None:
        try:
            return None if self.config is None else keras.saving.deserialize_keras_object(self.config)
        except Exception:  # custom objects that are not known here, unsafe code, ...: the student still loads
            return None

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Raises: there is nobody to teach."""
        raise ValueError(
            "This Distiller was loaded, and its file holds no weights of the teacher. Write `distiller.teacher = your_teacher` "
            "before `fit`; to evaluate the student alone, `distiller.evaluate_teacher = False`."
        )

    def get_config(self) -> dict[str, Any] | None:
        """The architecture as it was loaded."""
        return self.config


def check_model(model: Any, role: str) -> None:
    """Raises a `TypeError` or `ValueError` for what is no built Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`{role}` must be a keras.Model. Received: {role}={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f'`{role}` must be built, so that its layers and weights are known. Received: the unbuilt model "{model.name}". '
            f"Call it on a batch, give it a keras.Input, or use {role}.build(input_shape)."
        )


def check_inputs(teacher: keras.Model, student: keras.Model) -> None:
    """Raises a `ValueError` for models that cannot take the same inputs."""
    shapes = [[tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or []] for model in (teacher, student)]
    if all(shapes) and not (len(shapes[0]) == len(shapes[1]) and all(map(shapes_agree, *shapes))):
        raise ValueError(
            f"Teacher and student take inputs of different shapes. Received: teacher {shapes[0]}, student {shapes[1]}. Pass "
            "teacher_preprocessing=, a layer or function that turns the student's inputs into the teacher's."
        )


def check_untouched(teacher: keras.Model, student: keras.Model) -> None:
    """Raises a `ValueError` for a teacher that training would change."""
    shared = {id(variable) for variable in teacher.variables}
    if paths := [variable.path for variable in student.trainable_variables if id(variable) in shared]:
        raise ValueError(
            f"Training the student would change its teacher: they share the weights {', '.join(paths[:4])}"
            f"{', ...' if len(paths) > 4 else ''}. Give the student layers of its own (keras.models.clone_model), or set "
            "`trainable = False` on those that they share."
        )
    if stateful := [layer.name for layer in teacher._flatten_layers() if getattr(layer, "stateful", False)]:
        raise ValueError(
            f"The teacher's layers {', '.join(stateful)} are stateful: what they say depends on the batches before, and every pass "
            "changes them. Rebuild them with stateful=False."
        )
