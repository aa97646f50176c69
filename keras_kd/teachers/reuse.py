"""Can the student end in its teacher's own classifier? The arrangement of SimKD."""

import math
from typing import Any

import keras

from keras_kd import _taps
from keras_kd.layers.projectors import pooled_to

_AFTER = (keras.layers.Activation, keras.layers.Softmax, keras.layers.Dropout)
_BEFORE = (
    keras.layers.Dropout, keras.layers.Flatten, keras.layers.GlobalAveragePooling1D, keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D, keras.layers.GlobalMaxPooling1D, keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
)  # fmt: skip
PROJECTOR = "simkd_projector"


def reuse_classifier(
    student: keras.Model,
    teacher: keras.Model,
    *,
    student_layer_name: str | None = None,
    teacher_layer_name: str | None = None,
    reduction: int = 2,
) -> keras.Model:
    """Builds a student that ends in a projector and the teacher's frozen classifier (SimKD).

    Its body is a copy of the student up to the feature before the student's classifier; the projector brings that to the width of
    the feature which feeds the teacher's classifier. Trained by `HintLoss` alone, it needs neither labels nor temperature:

    ```
    simkd = reuse_classifier(student, teacher)
    hint = HintLoss(projector=None, teacher_layer_name=classifier_input(teacher), student_layer_name="simkd_projector")
    Distiller(teacher, simkd, hint, student_loss_weight=0)
    ```

    The projector for maps is a 1x1, a 3x3 and a 1x1 convolution with batch normalisation and ReLU between, for vectors two dense
    layers; it stays in the student. It ends in ReLU where the teacher's feature does.

    Args:
        student: Functional or Sequential model with one input and one output; it is not changed.
        teacher: likewise, trained.
        student_layer_name: layer whose output is the student's feature. None: what enters its last dense layer, before pooling,
            flattening and dropout.
        teacher_layer_name: the same for the teacher.
        reduction: the projector's inner width is the teacher's width by this number, at least 1.

    Returns:
        A new Functional model whose layer `"simkd_projector"` gives the projected feature.

    Raises:
        ValueError: where no classifier is found, or something other than a chain of layers follows the named layer.

    Example:

    >>> def model(width):
    ...     conv = keras.layers.Conv2D(width, 3, activation="relu", name="conv")
    ...     return keras.Sequential([keras.Input((8, 8, 1)), conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)])
    >>> simkd = keras_kd.teachers.reuse_classifier(model(2), model(8))
    >>> simkd.get_layer("simkd_projector").output.shape
    (None, 6, 6, 8)

    Reference:
        Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier, 2022.
    """
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
        raise ValueError(f"`reduction` must be a whole number, at least 1. Received: reduction={reduction!r}.")
    body = keras.models.clone_model(student)
    body.set_weights(student.get_weights())
    feature, _ = _split(body, student_layer_name, "student")
    goal, classifier = _split(teacher, teacher_layer_name, "teacher")
    if len(feature.shape) != len(goal.shape):
        raise ValueError(
            f"The features before the classifiers must be of the same rank. Received: teacher {tuple(goal.shape)}, student "
            f"{tuple(feature.shape)}. Name other layers by `teacher_layer_name` and `student_layer_name`."
        )
    x = _projector(tuple(feature.shape), tuple(goal.shape), _ends_in_relu(goal), reduction)(feature)
    for layer in classifier:
        x = _frozen_copy(layer)(x)
    return keras.Model(body.inputs[0], x, name=f"{student.name}_simkd")


def classifier_input(teacher: keras.Model) -> str:
    """Name of the layer that feeds a model's classifier, before pooling, flattening and dropout.

    Args:
        teacher: a Functional or Sequential model.

    Returns:
        The layer's name, for `teacher_layer_name`.

    Raises:
        ValueError: where no dense layer at the end is found.

    Example:

    >>> layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, name="conv"), keras.layers.Flatten(), keras.layers.Dense(3)]
    >>> keras_kd.teachers.classifier_input(keras.Sequential(layers))
    'conv'
    """
    return str(_split(teacher, None, "teacher")[0]._keras_history[0].name)


def _split(model: keras.Model, name: str | None, role: str) -> tuple[Any, list[keras.layers.Layer]]:
    """The feature's symbolic tensor, and the layers that follow it, in order."""
    if len(getattr(model, "outputs", None) or []) != 1 or len(model.inputs) != 1:
        raise ValueError(
            f'The {role} must be a Functional or Sequential model with one input and one output. Received: "{model.name}".'
        )
    tensor, head = model.outputs[0], []
    wanted = None if name is None else _taps.find_layer(model, name, role=role, argument=f"{role}_layer_name")
    found_dense = False
    while True:
        layer = tensor._keras_history[0]
        if layer is wanted:
            break
        is_dense = isinstance(layer, keras.layers.Dense) and not found_dense
        belongs = is_dense or isinstance(layer, _BEFORE if found_dense else _AFTER)
        if wanted is None and not belongs:
            if found_dense:
                break
            raise ValueError(
                f'No dense layer ends the {role} "{model.name}". Received: {layer.name} at its end. Name the feature by '
                f"`{role}_layer_name`."
            )
        found_dense = found_dense or is_dense
        inputs = keras.tree.flatten(layer.input) if isinstance(layer, keras.layers.Layer) and layer._inbound_nodes else []
        if len(inputs) != 1 or isinstance(layer, keras.layers.InputLayer):
            raise ValueError(f'Only a chain of layers can follow the feature in the {role} "{model.name}". Received: {layer.name}.')
        head.append(layer)
        tensor = inputs[0]
    return tensor, head[::-1]


def _projector(student: tuple[Any, ...], teacher: tuple[Any, ...], relu: bool, reduction: int) -> keras.Sequential:
    width, inner = teacher[-1], max(1, math.ceil(teacher[-1] / reduction))
    last = [keras.layers.ReLU()] if relu else []
    if len(student) == 2:
        layers = [keras.layers.Dense(inner, "relu"), keras.layers.Dense(width), *last]
        return keras.Sequential([keras.Input(student[1:]), *layers], name=PROJECTOR)
    size = tuple(map(min, student[1:-1], teacher[1:-1]))
    conv = {3: keras.layers.Conv1D, 4: keras.layers.Conv2D, 5: keras.layers.Conv3D}[len(student)]
    layers = [ShrinkTo(size)] if size != student[1:-1] else []
    for units, kernel in ((inner, 1), (inner, 3), (width, 1)):
        layers += [conv(units, kernel, padding="same", use_bias=False), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential([keras.Input(student[1:]), *layers[:-1], *last], name=PROJECTOR)


@keras.saving.register_keras_serializable(package="keras_kd")
class ShrinkTo(keras.layers.Layer):
    """Averages the positions of a map into fewer, of any number (adaptive average pooling).

    Args:
        size: positions of the result.
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, size: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = tuple(size)

    def call(self, x: Any) -> Any:
        """Returns shape `(batch, *size, channels)`."""
        return pooled_to(x, self.size)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "size": list(self.size)}


def _ends_in_relu(tensor: Any) -> bool:
    layer = tensor._keras_history[0]
    if isinstance(layer, keras.Model):
        return bool(getattr(layer, "outputs", None)) and _ends_in_relu(layer.outputs[0])
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return isinstance(layer, keras.layers.ReLU) or name in ("relu", "relu6") or _pools_relu(layer)


def _pools_relu(layer: Any) -> bool:
    """Max and average pooling keep what is not negative."""
    pools = type(layer).__name__.startswith(("MaxPooling", "AveragePooling"))
    return pools and _ends_in_relu(keras.tree.flatten(layer.input)[0])


def _frozen_copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    twin = type(layer).from_config({**layer.get_config(), "name": f"teacher_{layer.name}"})
    twin.trainable = False
    if layer.weights:
        twin.build(keras.tree.flatten(layer.input)[0].shape)
        twin.set_weights(layer.get_weights())
    return twin
