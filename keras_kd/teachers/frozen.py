"""Who teaches? Holders of a teacher, which keep it out of the student's weights, files and gradients."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from keras_kd import _lineage, _taps
from keras_kd._outputs import output_kinds, shapes_agree
from keras_kd.quantized._rounding import suspended
from keras_kd.teachers._folding import find_pairs, folded


class RecordedBatch(NamedTuple):
    """A batch of a recording: inputs, and what the teacher said of them.

    Args:
        inputs: the student's inputs, as the data had them.
        outputs: the teacher's outputs, nested as it gave them.
        features: outputs of the teacher's recorded layers, by name.
    """

    inputs: Any
    outputs: Any
    features: dict[str, Any]


def inputs_of(x: Any) -> Any:
    """The inputs of a batch, recorded or not."""
    return x.inputs if isinstance(x, RecordedBatch) else x


class Teacher:
    """What a `Distiller` asks of its teacher, whatever that is: the base class of all holders.

    Keras finds sub-models, and writes to weight files, whatever hangs on a model as a Keras object; a plain holder hides the
    teacher from both.
    """

    is_present = True
    given: Any = None  # what the user handed over
    name: str
    kinds: list[str | None] = []  # what each output holds: see `output_kinds`
    supports_jit = True  # whether XLA can compile it
    preprocessing: Any = None
    activation: str | None = None  # what its logits mean, where it has turned probabilities into them

    @property
    def original(self) -> Any:
        """The one model whose answers these are; None where there is none, or it is not known."""
        return getattr(self, "model", None)

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Returns the outputs for a batch, and those of the named layers."""
        raise NotImplementedError

    def answers(self, x: Any) -> bool:
        """Whether it can say anything of this batch."""
        return True

    def check(self, student: keras.Model, *, same_inputs: bool) -> None:
        """Raises a `ValueError` or `TypeError` for a teacher that cannot teach this student."""

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that it cannot be asked for."""

    def shapes(self, names: Iterable[str]) -> tuple[Any, dict[str, Any]] | None:
        """Shapes of the outputs and of the named layers; None where they are not known yet."""
        return None

    def follow(self, student: keras.Model) -> None:
        """Called in the compiled step after each update of the student."""

    def get_config(self) -> dict[str, Any] | None:
        """What a file of the Distiller holds of it."""
        return None


class FrozenTeacher(Teacher):
    """A model that is read and never changed; its `trainable` flags stay as they are.

    Args:
        model: a built Keras model.
        preprocessing: callable that turns the student's inputs into the teacher's; None hands them on.
    """

    def __init__(self, model: keras.Model, preprocessing: Any = None) -> None:
        self.model = self.given = model
        self.preprocessing = preprocessing
        self.name = str(getattr(model, "name", ""))
        self.kinds = output_kinds(model)
        self.supports_jit = all(layer.supports_jit for layer in model._flatten_layers())
        self._pairs = find_pairs(model)

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Runs the teacher in inference mode; returns its outputs and the outputs of the named layers."""
        if isinstance(x, RecordedBatch):
            raise ValueError(
                f'The batch holds recorded answers of a teacher, and this Distiller asks "{self.name}" itself. Write '
                "`distiller.teacher = recording`, or fit on the data without the recording."
            )
        if self.preprocessing is not None:
            x = self.preprocessing(x)
        names = list(layer_names)
        wanted = [_taps.find_layer(self.model, name, role="teacher") for name in names]
        with suspended(), folded(self._pairs, keep=wanted), _taps.record(self.model, names, role="teacher") as features:
            outputs = self.model(x, training=False)
        return outputs, features

    def check(self, student: keras.Model, *, same_inputs: bool) -> None:
        """Raises for a model that is not built, is the student, would change in training, or takes other inputs."""
        check_model(self.model, "teacher")
        if self.model is student:
            raise ValueError(
                "The teacher is the student: a model that follows itself learns nothing. Pass a copy, such as "
                "keras.models.clone_model(student) with the weights set, teachers.MovingAverage(), or another model."
            )
        check_untouched(self.model, student)
        if same_inputs and self.preprocessing is None:
            check_inputs(self.model, student)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that the model does not have."""
        for name in names:
            _taps.find_layer(self.model, name, role="teacher", argument="teacher_layer_name")

    def shapes(self, names: Iterable[str]) -> tuple[Any, dict[str, Any]] | None:
        """Shapes of the outputs and of the named layers; None for a subclassed model."""
        return _taps.shapes(self.model, names, role="teacher")

    def get_config(self) -> dict[str, Any] | None:
        """The architecture, without weights and without what it was compiled with; None if the model cannot be serialised."""
        try:
            config = keras.saving.serialize_keras_object(self.model)
        except NotImplementedError:  # a subclassed model without `get_config`
            return None
        return {**config, "compile_config": None}


class RecordedTeacher(Teacher):
    """A teacher whose answers come with the batches of its recording.

    Args:
        recording: a `keras_kd.Recording`.
    """

    def __init__(self, recording: Any) -> None:
        self.given = recording
        self.name = f"recording of {recording.teacher_name}"
        self.kinds = list(recording.kinds)

    @property
    def original(self) -> Any:
        """The model that was recorded, as long as it is in memory; None for a recording that was opened by its path."""
        return _lineage.speaker_of(self.given)

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Returns what was recorded for this batch."""
        if not isinstance(x, RecordedBatch):
            raise ValueError(
                "The teacher is a recording, and this batch does not come from it. Train on its own data: "
                "`distiller.fit(recording.dataset(batch_size=64, shuffle=True))`."
            )
        return x.outputs, {name: x.features[name] for name in layer_names}

    def answers(self, x: Any) -> bool:
        """Whether the batch comes from a recording; other data, such as those of validation, have no teacher."""
        return isinstance(x, RecordedBatch)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that was not recorded."""
        for name in names:
            if name not in self.given.layer_names:
                raise ValueError(
                    f'The recording holds no layer "{name}". Received: teacher_layer_name="{name}". Recorded layers: '
                    f"{', '.join(self.given.layer_names) or 'none'}. Record it: record_teacher(..., layer_names=[...])."
                )

    def shapes(self, names: Iterable[str]) -> tuple[Any, dict[str, Any]] | None:
        """Shapes of the recorded outputs and layers."""
        features = self.given.feature_structure
        return keras.tree.map_structure(lambda spec: spec.shape, self.given.output_structure), {
            name: features[name].shape for name in names
        }


class AbsentTeacher(Teacher):
    """Stands where the teacher of a loaded Distiller will be: files hold a teacher's architecture, not its weights.

    `model` is that architecture with fresh weights (None where it cannot be rebuilt): load weights into it and assign it.

    Args:
        config: the architecture that the file holds, kept for the next file.
    """

    is_present = False
    name = "absent"

    def __init__(self, config: dict[str, Any] | None, preprocessing: Any = None) -> None:
        self.config = config
        self.preprocessing = preprocessing
        self.model = self.given = self._rebuild()

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

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that the architecture, where it is known, does not have."""
        if isinstance(self.model, keras.Model):
            FrozenTeacher(self.model).check_layers(names)

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
