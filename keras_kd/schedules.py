"""Which value holds at an epoch or at a step? Schedules of numbers: plain callables `schedule(position) -> float`.

A function of your own and a `keras.optimizers.schedules.LearningRateSchedule` serve as well: see `get`.

The schedules of `callbacks.Pruning` are callables `schedule(step) -> (whether to prune now, sparsity)`: TF-MOT's own
`ConstantSparsity`, `PolynomialDecay` and their base `PruningSchedule`, imported when they are first asked for, and `Threshold`.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import keras

from keras_kd import _tfmot
from keras_kd._tunable import Number, finite_number, non_negative, positive

_OF_TFMOT = ("ConstantSparsity", "PolynomialDecay", "PruningSchedule")


if TYPE_CHECKING:  # TF-MOT has no types

    class PruningSchedule:
        """TF-MOT's base class."""

        def __call__(self, step: Any) -> tuple[Any, Any]:
            """Whether to prune at `step`, and the sparsity."""

        def get_config(self) -> dict[str, Any]:
            """Returns the class's name and the constructor's arguments."""

    class ConstantSparsity(PruningSchedule):
        """TF-MOT's schedule of one sparsity."""

        target_sparsity: float
        begin_step: int
        end_step: int
        frequency: int

        def __init__(self, target_sparsity: float, begin_step: int, end_step: int = -1, frequency: int = 100) -> None: ...

    class PolynomialDecay(PruningSchedule):
        """TF-MOT's schedule that grows from one sparsity to another."""

        initial_sparsity: float
        final_sparsity: float
        begin_step: int
        end_step: int
        power: float
        frequency: int

        def __init__(
            self,
            initial_sparsity: float,
            final_sparsity: float,
            begin_step: int,
            end_step: int,
            power: float = 3,
            frequency: int = 100,
        ) -> None: ...

else:

    def __getattr__(name: str) -> Any:
        if name not in _OF_TFMOT:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(_tfmot.load().sparsity.keras, name)
        return found


@keras.saving.register_keras_serializable(package="keras_kd")
class ValueSchedule:
    """Base class of the schedules: a subclass implements `__call__(position)` and `get_config()`.

    Call arguments:
        position: an epoch or a step, counted from 0.

    Returns:
        The value, a Python float.

    Example:

    >>> class Halving(keras_kd.schedules.ValueSchedule):
    ...     def __call__(self, position):
    ...         return 0.5**position
    ...
    ...     def get_config(self):
    ...         return {}
    >>> Halving()(3)
    0.125
    """

    def __call__(self, position: Number) -> float:
        """Returns the value at `position`."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(position): epoch or step, counted from 0.")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        raise NotImplementedError(f"{type(self).__name__} must implement get_config().")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ValueSchedule":
        """Builds a schedule from what `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_kd")
class ConstantValue(ValueSchedule):
    """The same value at every position.

    ```
    v(t) = value
    ```

    Args:
        value: a finite number.

    Call arguments:
        position: an epoch or a step, counted from 0.

    Returns:
        The value, a Python float.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number that is not finite.

    Example:

    >>> keras_kd.schedules.ConstantValue(0.5)(17)
    0.5
    """

    def __init__(self, value: float) -> None:
        self.value = finite_number("value", value)

    def __call__(self, position: Number) -> float:
        """Returns the value."""
        return float(self.value)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"value": self.value}


class _Passage(ValueSchedule):
    """From `start` to `end`, as a function of the share of `duration` that has passed."""

    def __init__(self, start: float, end: float, *, begin: float = 0, duration: float) -> None:
        self.start = finite_number("start", start)
        self.end = finite_number("end", end)
        self.begin = non_negative("begin", begin)
        self.duration = positive("duration", duration)

    def _share(self, position: Number) -> float:
        return min(max((position - self.begin) / self.duration, 0.0), 1.0)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {name: getattr(self, name) for name in ("start", "end", "begin", "duration")}


@keras.saving.register_keras_serializable(package="keras_kd")
class LinearValue(_Passage):
    """A straight line from `start` to `end`.

    ```
    v(t) = start + c * (end - start),    c = min(max((t - begin) / duration, 0), 1)
    ```

    So `start` holds up to `begin`, and `end` from `begin + duration` on.

    Args:
        start: first value.
        end: last value.
        begin: position where the passage begins, not negative.
        duration: how many epochs or steps it takes, above 0.

    Call arguments:
        position: an epoch or a step, counted from 0.

    Returns:
        The value, a Python float.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number that is not finite or out of its range.

    Example:

    >>> schedule = keras_kd.schedules.LinearValue(8.0, 2.0, begin=5, duration=10)
    >>> [schedule(epoch) for epoch in (0, 5, 10, 15, 99)]
    [8.0, 8.0, 5.0, 2.0, 2.0]
    """

    def __call__(self, position: Number) -> float:
        """Returns the value at `position`."""
        return _between(self.start, self.end, self._share(position))


@keras.saving.register_keras_serializable(package="keras_kd")
class CosineValue(_Passage):
    """Half a cosine wave from `start` to `end`: slow at both ends.

    ```
    v(t) = start + s * (end - start),    s = (1 - cos(pi * c)) / 2,    c = min(max((t - begin) / duration, 0), 1)
    ```

    So `start` holds up to `begin`, and `end` from `begin + duration` on.

    Args:
        start: first value.
        end: last value.
        begin: position where the passage begins, not negative.
        duration: how many epochs or steps it takes, above 0.

    Call arguments:
        position: an epoch or a step, counted from 0.

    Returns:
        The value, a Python float.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number that is not finite or out of its range.

    Example:

    >>> schedule = keras_kd.schedules.CosineValue(1.0, 0.0, duration=8)
    >>> [round(schedule(epoch), 3) for epoch in (0, 2, 4, 6, 8)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __call__(self, position: Number) -> float:
        """Returns the value at `position`."""
        return _between(self.start, self.end, (1 - math.cos(math.pi * self._share(position))) / 2)


@keras.saving.register_keras_serializable(package="keras_kd")
class WarmUpValue(ValueSchedule):
    """A linear warm-up to `target`, then `target` or another schedule.

    ```
    v(t) = start + c * (target - start),    c = min((t + 1) / duration, 1)    for t < duration
    v(t) = after(t - duration), or target                                     from t = duration on
    ```

    With `start=0` this is the factor `min(epoch / warmup, 1)` of DKD and ReviewKD, whose code counts epochs from 1: the first
    epoch has `target / duration` already, and epoch `duration - 1`, counted from 0, is the first at `target`.

    Args:
        target: the value that is reached.
        duration: how many epochs or steps that takes, above 0. DKD and ReviewKD take 20 epochs on CIFAR-100.
        start: where the line comes from; it is the value at position -1.
        after: a schedule, counted from the end of the warm-up, or a number. None keeps `target`.

    Call arguments:
        position: an epoch or a step, counted from 0.

    Returns:
        The value, a Python float.

    Raises:
        TypeError: for what is no number, or an `after` that is no schedule.
        ValueError: for a number that is not finite or out of its range.

    Example:

    >>> schedule = keras_kd.schedules.WarmUpValue(1.0, duration=4)
    >>> [schedule(epoch) for epoch in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    Reference:
        Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, 2022. Chen, Liu, Zhao, Jia: Distilling Knowledge via
        Knowledge Review, 2021. Both by the code of mdistiller.
    """

    def __init__(self, target: float, *, duration: float, start: float = 0.0, after: Any = None) -> None:
        self.target = finite_number("target", target)
        self.duration = positive("duration", duration)
        self.start = finite_number("start", start)
        self.after = None if after is None else _get("after", after)

    def __call__(self, position: Number) -> float:
        """Returns the value at `position`."""
        if position < self.duration:
            return _between(self.start, self.target, min(max((position + 1) / self.duration, 0.0), 1.0))
        return float(self.target if self.after is None else self.after(position - self.duration))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        after = self.after and keras.saving.serialize_keras_object(self.after)
        return {"target": self.target, "duration": self.duration, "start": self.start, "after": after}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmUpValue":
        """Builds a schedule from what `get_config` returned."""
        after = config.get("after")
        return cls(**{**config, "after": keras.saving.deserialize_keras_object(after) if isinstance(after, dict) else after})


@keras.saving.register_keras_serializable(package="keras_kd")
class Threshold:
    """Pruning by a fixed threshold: every weight of smaller magnitude is set to zero, as many as there are.

    ```
    mask = |w| >= value
    ```

    Args:
        value: the threshold, not negative, in the units of the weights.
        begin_step: optimizer step of the first update of the masks.
        end_step: step of the last; -1 goes on for ever.
        frequency: steps from one update to the next.

    Call arguments:
        step: an optimizer step, a number or a tensor.

    Returns:
        Whether the masks are updated at this step, and the threshold.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number out of its range.

    Example:

    >>> keras_kd.schedules.Threshold(0.05, begin_step=100, frequency=10)(110)
    (True, 0.05)
    """

    def __init__(self, value: float, *, begin_step: int = 0, end_step: int = -1, frequency: int = 1) -> None:
        self.value = non_negative("value", value)
        self.begin_step = non_negative("begin_step", begin_step)
        self.end_step = finite_number("end_step", end_step)
        self.frequency = positive("frequency", frequency)
        if end_step != -1 and end_step < begin_step:
            raise ValueError(
                f"`end_step` must be -1 or not before `begin_step`. Received: begin_step={begin_step}, end_step={end_step}."
            )

    def __call__(self, step: Any) -> tuple[Any, float]:
        """Returns whether the masks are updated at `step`, and the threshold."""
        turn = (step >= self.begin_step) & ((step - self.begin_step) % self.frequency == 0)
        return turn if self.end_step == -1 else turn & (step <= self.end_step), self.value

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {name: getattr(self, name) for name in ("value", "begin_step", "end_step", "frequency")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Threshold":
        """Builds a schedule from what `get_config` returned."""
        return cls(**config)


def get(identifier: Any) -> Callable[[Any], Any]:
    """Finds a schedule.

    Args:
        identifier: a number, which is held constant; or a callable of the position, which is returned as it is: a schedule of
            this module, a `keras.optimizers.schedules.LearningRateSchedule`, a function.

    Returns:
        A callable `schedule(position)`.

    Raises:
        TypeError: for anything else.
        ValueError: for a number that is not finite.

    Example:

    >>> keras_kd.schedules.get(4.0)(10)
    4.0
    >>> keras_kd.schedules.get(lambda epoch: 1.0 / (1 + epoch))(3)
    0.25
    """
    return _get("schedule", identifier)


def _get(name: str, identifier: Any) -> Callable[[Any], Any]:
    if isinstance(identifier, Real) and not isinstance(identifier, bool):
        return ConstantValue(finite_number(name, identifier))
    if callable(identifier) and not isinstance(identifier, type):
        return identifier
    raise TypeError(
        f"`{name}` must be a number or a callable of the position, such as keras_kd.schedules.LinearValue(8.0, 1.0, duration=20). "
        f"Received: {name}={identifier!r} of type {type(identifier).__name__}."
        + (f" Write {identifier.__name__}(...) for an object of the class." if isinstance(identifier, type) else "")
    )


def _between(start: Number, end: Number, share: float) -> float:
    return float(end if share == 1 else start + share * (end - start))  # exact at both ends
