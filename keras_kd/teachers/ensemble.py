"""How do several teachers speak with one voice? The average of their probabilities."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_kd import _outputs
from keras_kd._outputs import LOGITS, SIGMOID, SOFTMAX
from keras_kd._tunable import finite_number
from keras_kd.teachers.frozen import FrozenTeacher, Teacher


class Ensemble(Teacher):
    """Several teachers as one: the weighted mean of their probabilities.

    ```
    z = log(sum_i w_i softmax(z_i)),   sum_i w_i = 1
    ```

    `Distiller([a, b], student)` makes one with equal weights. The mean is taken at temperature 1; a loss softens it as it softens
    a single teacher's answer. Losses that compare layers name the teacher: `"a/conv3"` by the model's name, or `"0/conv3"` by its
    place; without it, where only one teacher has a layer of that name.

    Args:
        models: built Keras models that give outputs of the same shapes.
        weights: one number per model, not negative; only their ratios count. None is equal weights.
        activation: what turns logits into probabilities, `"softmax"` or `"sigmoid"`; None averages the outputs as they are
            (regression). A list that is passed to a `Distiller` takes it from the losses. Models that end in softmax or sigmoid
            are recognised, logits and probabilities may be mixed. Outputs of unknown meaning (subclassed models) are averaged
            as they are.
        preprocessing: callable that turns the student's inputs into the teachers', or a list with one (or None) per model.

    Raises:
        ValueError: without a model, or for weights that do not fit.
        TypeError: for what is no Keras model.

    Example:

    >>> inputs = keras.Input((4,))
    >>> a, b = (keras.Model(inputs, keras.layers.Dense(3, name=f"head_{i}")(inputs)) for i in range(2))
    >>> both = keras_kd.teachers.Ensemble([a, b], weights=[2, 1])
    >>> outputs, features = both(np.ones((5, 4)))
    >>> outputs.shape
    TensorShape([5, 3])

    Reference:
        You, Xu, Xu, Tao: Learning from Multiple Teacher Networks, 2017.
    """

    def __init__(
        self, models: Iterable[keras.Model], weights: Any = None, *, activation: str | None = SOFTMAX, preprocessing: Any = None
    ) -> None:
        models = list(models)
        if not models:
            raise ValueError("An ensemble needs at least one teacher. Received: an empty list.")
        if activation not in (SOFTMAX, SIGMOID, None):
            raise ValueError(f'`activation` must be "softmax", "sigmoid" or None. Received: activation={activation!r}.')
        several = preprocessing if isinstance(preprocessing, (list, tuple)) else [preprocessing] * len(models)
        if len(several) != len(models):
            raise ValueError(f"One preprocessing per teacher, please. Received: {len(several)} for {len(models)} teachers.")
        self.members = [FrozenTeacher(model, own) for model, own in zip(models, several, strict=True)]
        self.given = self if weights is not None or activation != SOFTMAX else models
        self.weights = _shares(weights, len(models))
        # What losses must compare, where outputs are averaged as probabilities.
        ends = {kind for member in self.members for kind in member.kinds}
        self.activation = SIGMOID if activation is not None and SIGMOID in ends else activation
        self.preprocessing = preprocessing
        self.name = ", ".join(member.name for member in self.members)
        self.supports_jit = all(member.supports_jit for member in self.members)
        # The average holds logits wherever the members' kinds are known.
        self.kinds = [LOGITS if activation is not None and None not in kinds else None for kinds in self._member_kinds()]

    def _member_kinds(self) -> list[tuple[str | None, ...]]:
        return list(zip(*[member.kinds for member in self.members], strict=False))

    def __call__(self, x: Any, layer_names: Iterable[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Runs every teacher once; returns the averaged outputs and the outputs of the named layers."""
        wanted = {name: self._find(name) for name in layer_names}
        answers, features = [], {}
        for index, member in enumerate(self.members):
            own = {name: inner for name, (place, inner) in wanted.items() if place == index}
            outputs, found = member(x, own.values())
            answers.append(outputs)
            features.update({name: found[inner] for name, inner in own.items()})
        flat = [keras.tree.flatten(outputs) for outputs in answers]
        kinds = self._member_kinds() or [(None,) * len(self.members)] * len(flat[0])
        means = [self._mean(list(tensors), kind) for tensors, kind in zip(zip(*flat, strict=True), kinds, strict=True)]
        return keras.tree.pack_sequence_as(answers[0], means), features

    def _mean(self, outputs: list[Any], kinds: tuple[str | None, ...]) -> Any:
        outputs = [_outputs.convert(output, "float32") if output.dtype in ("float16", "bfloat16") else output for output in outputs]
        weights = ops.cast(self.weights, outputs[0].dtype)
        if self.activation is None or None in kinds:
            return sum(weights[index] * ops.cast(output, outputs[0].dtype) for index, output in enumerate(outputs))
        logits = [_outputs.as_logits(output, str(kind)) for output, kind in zip(outputs, kinds, strict=True)]
        z = ops.cast(ops.stack(logits), outputs[0].dtype)  # (teachers, batch, ..., classes)
        if self.activation == SOFTMAX and z.shape[-1] == 1:
            raise ValueError(
                "A softmax over a single output is always 1, so its average says nothing. Received: teachers with one output. Pass "
                'teachers.Ensemble([...], activation="sigmoid") for yes or no, activation=None for a number.'
            )
        log_w = ops.reshape(ops.log(weights), (-1,) + (1,) * (len(z.shape) - 1))
        if self.activation == SIGMOID:
            yes, no = (ops.logsumexp(log_w + ops.log_sigmoid(sign * z), axis=0) for sign in (1, -1))
            return yes - no
        return ops.logsumexp(log_w + ops.log_softmax(z), axis=0)

    def check(self, student: keras.Model, *, same_inputs: bool) -> None:
        """Raises where one of the models cannot teach this student, or they disagree on the shapes of outputs."""
        for member in self.members:
            member.check(student, same_inputs=same_inputs)
        shapes = {member.name: [tuple(t.shape) for t in getattr(member.model, "outputs", None) or []] for member in self.members}
        if len({str(shape) for shape in shapes.values() if shape}) > 1:
            raise ValueError(f"Teachers of one student must give outputs of the same shapes. Received: {shapes}.")

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises a `ValueError` for a layer that no teacher has, or several."""
        for name in names:
            self._find(name)

    def shapes(self, names: Iterable[str]) -> tuple[Any, dict[str, Any]] | None:
        """Shapes of the outputs and of the named layers; None where a model is subclassed."""
        wanted = {name: self._find(name) for name in names}
        features: dict[str, Any] = {}
        outputs: Any = None
        for index, member in enumerate(self.members):
            own = {name: inner for name, (place, inner) in wanted.items() if place == index}
            found = member.shapes(own.values())
            if found is None:
                return None
            outputs = found[0] if outputs is None else outputs
            features.update({name: found[1][inner] for name, inner in own.items()})
        return outputs, features

    def _find(self, name: str) -> tuple[int, str]:
        """Which teacher a layer's name means, and the layer's name there."""
        head, _, inner = name.partition("/")
        places = [index for index, member in enumerate(self.members) if inner and head in (member.name, str(index))]
        if len(places) == 1:
            self.members[places[0]].check_layers([inner])
            return places[0], inner
        places = [index for index, member in enumerate(self.members) if _has(member, name)]
        if len(places) == 1:
            return places[0], name
        members = ", ".join(f"{index}/... ({member.name})" for index, member in enumerate(self.members))
        problem = "several teachers have a layer of that name" if places else "no teacher has a layer of that name"
        raise ValueError(
            f'Cannot find the layer "{name}": {problem}. Received: teacher_layer_name="{name}". Put the teacher\'s place or name '
            f"before it: {members}."
        )


def _has(member: FrozenTeacher, name: str) -> bool:
    try:
        member.check_layers([name])
    except ValueError:
        return False
    return True


def _shares(weights: Any, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else [finite_number(f"weights[{i}]", w) for i, w in enumerate(weights)]
    if len(weights) != count or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            f"`weights` must hold one number per teacher, none negative and not all 0. Received: weights={weights!r} for {count} "
            "teachers."
        )
    return [weight / sum(weights) for weight in weights]
