"""How do temperatures and loss weights change in the course of training? Callbacks that set them by a schedule."""

import inspect
from dataclasses import dataclass
from typing import Any

import keras

from keras_kd import schedules
from keras_kd._terms import Term, make_terms
from keras_kd._tunable import Number, Tunable


class ScheduledValue(keras.callbacks.Callback):
    """Sets one number by a schedule while `fit` runs: any `Tunable` of a Distiller or of its losses.

    ```
    value = schedule(epoch)    or    schedule(optimizer steps so far)
    ```

    Compiled steps follow without a new trace. The value of each epoch is in its `logs`, and so in the history, the progress bar
    and the callbacks that come later in the list: put it before `CSVLogger` and `TensorBoard`, as Keras' own
    `LearningRateScheduler`. After `fit` the last value stays. The same callback serves several calls of `fit`.

    Args:
        attribute: name of the attribute, a `keras_kd.Tunable`.
        schedule: a number, a schedule of `keras_kd.schedules`, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            function of the position.
        loss: the distillation loss that has the attribute, by its name in the logs or its index. None is the model itself.
        by: "epoch": the position is Keras' epoch index, from 0, so that `initial_epoch` counts. "step": it is
            `optimizer.iterations`, which goes on from one `fit` to the next and is restored by `BackupAndRestore`; with
            `steps_per_execution` above 1 the value moves between executions, not inside them.

    Raises:
        TypeError: for a schedule that is no callable and no number.
        ValueError: for another `by`; in `fit`, for a loss or attribute that is not there or that compiled steps would not see
            change, or a value that it does not take.

    Example:

    >>> class Powered(keras_kd.losses.DistillationLoss):
    ...     power = keras_kd.Tunable()
    ...
    ...     def __init__(self, power=2.0, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.power = power
    ...
    ...     def call(self, y_true, y_pred):
    ...         return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** keras_kd.Tunable.tensor(self, "power"), axis=-1)
    >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> student.compile("adam", loss=Powered())
    >>> callback = keras_kd.callbacks.ScheduledValue("power", lambda epoch: 2.0 - 0.5 * epoch, loss="powered")
    >>> history = student.fit(np.ones((8, 4)), np.ones((8, 3)), epochs=3, callbacks=[callback], verbose=0)
    >>> history.history["powered_power"]
    [2.0, 1.5, 1.0]
    """

    def __init__(self, attribute: str, schedule: Any, *, loss: str | int | None = None, by: str = "epoch") -> None:
        super().__init__()
        if not isinstance(attribute, str) or not attribute.isidentifier():
            raise ValueError(f"`attribute` must be the name of an attribute. Received: attribute={attribute!r}.")
        if isinstance(loss, bool) or not isinstance(loss, str | int | None):
            raise TypeError(
                f"`loss` must be the name of a distillation loss in the logs, its index, or None. Received: loss={loss!r} of type "
                f"{type(loss).__name__}."
            )
        if by not in ("epoch", "step"):
            raise ValueError(f"`by` must be 'epoch' or 'step'. Received: by={by!r}.")
        self.attribute = attribute
        self.schedule = schedules.get(schedule)
        self.loss = loss
        self.by = by
        self._values: list[_Value] = []

    def find(self, model: Any) -> "list[_Value]":
        """Hook: the places in `model` that the schedule sets."""
        if self.loss is None:
            return [_Value(model, self.attribute, self.attribute)]
        term = self._term(model)
        return [_Value(term.loss, self.attribute, f"{term.name}_{self.attribute}")]

    def on_train_begin(self, logs: Any = None) -> None:
        """Finds what to set, and says so if it is not there."""
        self._values = self.find(self.model)
        for value in self._values:
            value.check(self)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Sets the value of the epoch."""
        if self.by == "epoch":
            self._set(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the value of the step, which the optimizer knows: `batch` is no count of steps."""
        if self.by == "step":
            self._set(int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the value into the logs."""
        if logs is not None:
            logs.update({value.log_name: float(value.get()) for value in self._values})

    def on_train_end(self, logs: Any = None) -> None:
        """Lets go of the model."""
        self._values = []

    def _set(self, position: int) -> None:
        number = self.schedule(position)
        try:
            for value in self._values:
                value.set(float(number))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The schedule of {type(self).__name__} gives {number!r} at {self.by} {position}. {error}") from error

    def _term(self, model: Any) -> Term:
        terms = _terms(model)
        by_index = isinstance(self.loss, int) and -len(terms) <= self.loss < len(terms)
        found = terms[self.loss] if by_index else next((term for term in terms if term.name == self.loss), None)  # type: ignore[index]
        if found is None:
            raise ValueError(
                f'No distillation loss {self.loss!r} in "{model.name}". Received: loss={self.loss!r} in {type(self).__name__}. '
                f"Losses: {_listed(terms)}."
            )
        return found


class AnnealTemperature(ScheduledValue):
    """Sets the temperature of distillation losses by a schedule.

    ```
    T = schedule(epoch)    or    schedule(optimizer steps so far)
    ```

    It serves a Distiller, and a plain `student.compile(loss=KDLoss())` on stored outputs of a teacher. Compiled steps follow
    without a new trace; after `fit` the last temperature stays. It is in the logs of each epoch as `temperature`, or as
    `kd_loss_temperature` where `loss="kd_loss"` was named: see `ScheduledValue`.

    Args:
        schedule: a number, a schedule of `keras_kd.schedules`, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            function of the position.
        loss: a distillation loss, by its name in the logs or its index. None is every loss that has a temperature.
        by: "epoch" or "step" (`optimizer.iterations`; between executions if `steps_per_execution` is above 1).

    Raises:
        TypeError: for a schedule that is no callable and no number.
        ValueError: for another `by`; in `fit`, if no loss has a temperature that compiled steps would see change, or the
            schedule gives one that is not above 0.

    Example:

    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)])
    >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> distiller = keras_kd.Distiller(teacher, student, keras_kd.losses.KDLoss(temperature=4.0))
    >>> distiller.compile("adam")
    >>> annealing = keras_kd.callbacks.AnnealTemperature(keras_kd.schedules.LinearValue(4.0, 1.0, duration=3))
    >>> history = distiller.fit(np.ones((8, 4)), epochs=4, callbacks=[annealing], verbose=0)
    >>> history.history["temperature"]
    [4.0, 3.0, 2.0, 1.0]
    """

    def __init__(self, schedule: Any, *, loss: str | int | None = None, by: str = "epoch") -> None:
        super().__init__("temperature", schedule, loss=loss, by=by)

    def find(self, model: Any) -> "list[_Value]":
        """Hook: the temperatures that the schedule sets."""
        if self.loss is not None:
            return super().find(model)
        terms = _terms(model)
        found = [_Value(term.loss, "temperature", "temperature") for term in terms if hasattr(term.loss, "temperature")]
        if not found:
            raise ValueError(
                f'No loss of "{model.name}" has a temperature. Losses: {_listed(terms)}. Distil with keras_kd.losses.KDLoss, or '
                "compile with the loss object itself, compile(loss=KDLoss()): one inside a function cannot be found."
            )
        return found


class AnnealWeight(ScheduledValue):
    """Sets the share of the supervised loss, or the weight of one distillation loss, by a schedule.

    ```
    loss = student_loss_weight * supervised + (1 - student_loss_weight) * sum_i(weight_i * distillation_i)
    ```

    The warm-up of DKD and ReviewKD is `AnnealWeight(WarmUpValue(1.0, duration=20), loss="dkd_loss")`. Compiled steps follow
    without a new trace; after `fit` the last weight stays. It is in the logs of each epoch as `student_loss_weight`, or as
    `dkd_loss_weight` where `loss="dkd_loss"` was named: see `ScheduledValue`.

    Args:
        schedule: a number, a schedule of `keras_kd.schedules`, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            function of the position.
        loss: the distillation loss whose entry of `distillation_loss_weights` is set, by its name in the logs or its index.
            None sets `student_loss_weight`.
        by: "epoch" or "step" (`optimizer.iterations`; between executions if `steps_per_execution` is above 1).

    Raises:
        TypeError: for a schedule that is no callable and no number.
        ValueError: for another `by`; in `fit`, if the model is no Distiller, has no such loss, or the schedule gives a share
            outside [0, 1] or a negative weight.

    Example:

    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)])
    >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> distiller = keras_kd.Distiller(teacher, student, keras_kd.losses.DKDLoss())
    >>> distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> warm_up = keras_kd.callbacks.AnnealWeight(keras_kd.schedules.WarmUpValue(1.0, duration=4), loss="dkd_loss")
    >>> history = distiller.fit(np.ones((8, 4)), np.zeros(8), epochs=5, callbacks=[warm_up], verbose=0)
    >>> history.history["dkd_loss_weight"]
    [0.25, 0.5, 0.75, 1.0, 1.0]

    Reference:
        Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, 2022.
    """

    def __init__(self, schedule: Any, *, loss: str | int | None = None, by: str = "epoch") -> None:
        super().__init__("student_loss_weight" if loss is None else "distillation_loss_weights", schedule, loss=loss, by=by)

    def find(self, model: Any) -> "list[_Value]":
        """Hook: the weight that the schedule sets."""
        if self.loss is None:
            return super().find(model)
        if not hasattr(model, self.attribute):
            return [_Value(model, self.attribute, self.attribute)]  # whose check says what is wrong
        term = self._term(model)
        index = next(i for i, other in enumerate(_terms(model)) if other.name == term.name)
        return [_Value(model, self.attribute, f"{term.name}_weight", index)]


@dataclass
class _Value:
    """A number that a schedule sets: an attribute, or one entry of an attribute that is a list."""

    owner: Any
    attribute: str
    log_name: str
    index: int | None = None

    def check(self, callback: ScheduledValue) -> None:
        """Raises a `ValueError` if the attribute is not there, or is one whose old value compiled steps would keep."""
        if isinstance(inspect.getattr_static(type(self.owner), self.attribute, None), Tunable):
            return
        owner, name = type(self.owner).__name__, type(callback).__name__
        if not hasattr(self.owner, self.attribute):
            raise ValueError(
                f"{name} sets `{self.attribute}`, which {owner} does not have. Train a keras_kd.Distiller, or name the loss "
                f"that has it: {name}(..., loss=...)."
            )
        raise ValueError(
            f"{name} cannot change `{self.attribute}` of {owner}: compiled steps would keep its old value. Use a class of keras_kd "
            f"(or make the attribute a keras_kd.Tunable), or name another loss: {name}(..., loss=...)."
        )

    def get(self) -> Number:
        """The present number."""
        value = getattr(self.owner, self.attribute)
        return value if self.index is None else value[self.index]

    def set(self, number: float) -> None:
        """Assigns a number."""
        if self.index is None:
            setattr(self.owner, self.attribute, number)
        else:
            getattr(self.owner, self.attribute)[self.index] = number


def _terms(model: Any) -> list[Term]:
    """The distillation losses of a Distiller, or the loss objects that a plain model was compiled with, by name."""
    losses = getattr(model, "distillation_losses", None)
    if losses is None:
        losses = [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.losses.Loss)]
    return make_terms(losses)


def _listed(terms: list[Term]) -> str:
    return ", ".join(term.name for term in terms) or "none that is a loss object"
