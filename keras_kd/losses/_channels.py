"""Which of the teacher's channels does a loss compare? The argument `teacher_channels`, checked, and what it leaves of features."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops


def checked_channels(channels: Any, layer_names: Any) -> Any:
    """`teacher_channels` as "auto", None, or a list with the indices, or None, for each layer.

    Raises:
        TypeError: if they are no whole numbers.
        ValueError: if they are negative, empty, or do not fit the names.
    """
    if channels is None or (isinstance(channels, str) and channels == "auto"):
        return channels
    names = [layer_names] if isinstance(layer_names, str) else list(layer_names or [])
    if isinstance(channels, Mapping):
        if not names:
            raise ValueError(
                "A dict for `teacher_channels` is looked up by `teacher_layer_name`. Received: teacher_layer_name=None."
            )
        channels = [_looked_up(channels, name) for name in names]
    elif isinstance(channels, str) or not isinstance(channels, Sequence | np.ndarray):
        raise TypeError(
            '`teacher_channels` must be "auto", None, indices, a list of them for several layers, or a dict by layer. Received: '
            f"teacher_channels={channels!r}."
        )
    elif not any(one is None or np.ndim(one) for one in channels):
        channels = [channels]
    if names:
        _check_number(len(channels), len(names))
    return [None if one is None else _whole_numbers(one) for one in channels]


def _check_number(given: int, layers: int) -> None:
    if given != layers:
        raise ValueError(f"`teacher_channels` must hold indices, or None, for each of {layers} layers. Received: {given} lists.")


def _looked_up(channels: Mapping[str, Any], name: str) -> Any:
    found = next((one for one in (name, name.split(":")[0]) if one in channels), None)
    if found is None:
        raise ValueError(
            f'`teacher_channels` must know the layer "{name}" of `teacher_layer_name`. Received: {", ".join(channels) or "none"}.'
        )
    return channels[found]


def _whole_numbers(channels: Any) -> list[int]:
    given = np.asarray(channels)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"`teacher_channels` must be whole numbers. Received: {given.dtype}.")
    if given.ndim != 1 or given.size == 0 or given.min() < 0:
        raise ValueError(
            f"`teacher_channels` must hold one index or more for each layer, none below 0. Received: teacher_channels={channels!r}."
        )
    return [int(one) for one in given]


def narrowed(feature: Any, channels: list[int] | None) -> Any:
    """A feature with these channels alone; None leaves all."""
    return feature if channels is None else ops.take(feature, np.asarray(channels, "int32"), axis=-1)


def narrowed_shapes(channels: Any, teachers: list[Any], students: list[Any]) -> list[Any]:
    """Shapes of the teacher's features with the chosen channels alone.

    Raises:
        ValueError: if the channels are not as many as the student's, or not there.
    """
    if not isinstance(channels, list):
        return teachers
    _check_number(len(channels), len(teachers))
    shapes = list(teachers)
    for index, (chosen, teacher, student) in enumerate(zip(channels, teachers, students, strict=False)):
        if chosen is None:
            continue
        if len(chosen) != student[-1]:
            raise ValueError(
                f"`teacher_channels` must hold one index for each channel of the student. Received: {len(chosen)} indices for the "
                f"student's feature {student}."
            )
        if teacher[-1] is not None and max(chosen) >= teacher[-1]:
            raise ValueError(
                f"`teacher_channels` must be below the teacher's number of channels. Received: index {max(chosen)} for its feature "
                f"{teacher}."
            )
        shapes[index] = (*teacher[:-1], len(chosen))
    return shapes
