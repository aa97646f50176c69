"""How can a number be changed while compiled steps follow?

A Python number that a traced step reads is baked into the graph. A `Tunable` attribute reads as the Python number that it was
set to, and hands the graph a variable which every assignment writes through to.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, SupportsFloat, TypeVar, overload

import keras

Number = int | float
Kept = TypeVar("Kept")


def finite_number(name: str, value: Any) -> Number:
    """Returns `value` as a Python number; raises a `TypeError` or `ValueError` that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r} of type {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite. Received: {name}={value!r}.")
    return value if isinstance(value, int | float) else float(value)


def positive(name: str, value: Any) -> Number:
    """Returns `value` if it is a number above 0."""
    if (value := finite_number(name, value)) <= 0:
        raise ValueError(f"`{name}` must be greater than 0. Received: {name}={value!r}.")
    return value


def non_negative(name: str, value: Any) -> Number:
    """Returns `value` if it is a number that is not below 0."""
    if (value := finite_number(name, value)) < 0:
        raise ValueError(f"`{name}` must not be negative. Received: {name}={value!r}.")
    return value


def fraction(name: str, value: Any) -> Number:
    """Returns `value` if it is a number in [0, 1]."""
    if not 0 <= (value := finite_number(name, value)) <= 1:
        raise ValueError(f"`{name}` must be between 0 and 1. Received: {name}={value!r}.")
    return value


def each(check: Callable[[str, Any], Number]) -> Callable[[str, Any], list[Number]]:
    """Returns a check for a list of numbers, every one of which `check` must accept."""

    def check_all(name: str, values: Any) -> list[Number]:
        values = values.tolist() if hasattr(values, "tolist") else values  # NumPy's
        values = [values] if isinstance(values, numbers.Real) else values
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"`{name}` must be a list of numbers. Received: {name}={values!r}.")
        return [check(f"{name}[{index}]", value) for index, value in enumerate(values)]

    return check_all


class Tunable(Generic[Kept]):
    """An attribute that reads as a Python number (or a list of them) and that compiled steps see change.

    Inside a step, `Tunable.tensor(owner, name)` gives the current value as a tensor. The owner may define `dtype`, in which
    the variable is kept; a half precision is raised to float32.

    Args:
        check: function of `(name, value)` that returns the value to keep or raises. By default any finite number passes.
    """

    @overload
    def __init__(self: "Tunable[Number]") -> None: ...

    @overload
    def __init__(self, check: Callable[[str, Any], Kept]) -> None: ...

    def __init__(self, check: Callable[[str, Any], Any] = finite_number) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(self, instance: Any, owner: type | None = None) -> Kept: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            value = _slots(instance)[self.name][0]
        except KeyError:
            raise AttributeError(f"`{self.name}` is not set yet.") from None
        return _WriteThroughList(value, instance, self.name) if isinstance(value, list) else value

    def __set__(self, instance: Any, value: SupportsFloat | Sequence[SupportsFloat]) -> None:
        value = self.check(self.name, value)
        slots = _slots(instance)
        if self.name not in slots:
            variable = keras.Variable(value, dtype=at_least_float32(getattr(instance, "dtype", None)), trainable=False)
        else:
            kept, variable = slots[self.name]
            if isinstance(value, list) and len(value) != len(kept):
                raise ValueError(f"`{self.name}` must keep its length, {len(kept)}. Received: {self.name}={value!r}.")
            variable.assign(value)
        slots[self.name] = (value, variable)

    @staticmethod
    def tensor(instance: Any, name: str) -> Any:
        """The current value of `instance.name`, as a tensor that a compiled step reads anew each time."""
        return keras.ops.convert_to_tensor(_slots(instance)[name][1])


class _WriteThroughList(list):
    """A list of fixed length whose item assignment reaches the variable too."""

    def __init__(self, values: list[Number], owner: Any, name: str) -> None:
        super().__init__(values)
        self._owner, self._name = owner, name

    def __setitem__(self, index: Any, value: Any) -> None:
        changed = list(self)
        changed[index] = value
        setattr(self._owner, self._name, changed)
        super().__setitem__(index, value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"`{self._name}` has a fixed length, {len(self)}; assign its items or a list of that length.")

    def __reduce__(self) -> Any:
        return list, (list(self),)  # copies are plain lists

    append = extend = insert = pop = remove = clear = __delitem__ = __iadd__ = __imul__ = sort = reverse = _refuse


def at_least_float32(dtype: Any) -> str:
    """The name of `dtype` (None: Keras' default float), with half precisions raised to float32."""
    name = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
    return "float32" if name in ("float16", "bfloat16") else name


def _slots(instance: Any) -> dict[str, tuple[Any, Any]]:
    # In `__dict__` and in a box of its own, so that Keras does not track the variables as weights of a layer.
    return instance.__dict__.setdefault("_tunables", _Slots()).values


class _Slots:
    def __init__(self) -> None:
        self.values: dict[str, tuple[Any, Any]] = {}
