"""Where will a `fit` end? Counts the optimizer steps that are done and that are to come, as schedules count them."""

from typing import NamedTuple

import keras


class Planned(NamedTuple):
    """The optimizer steps of a `fit`.

    Attributes:
        done: steps before it.
        last: the step that its last batch begins at.
        end: the step that it ends at.
        arithmetic: how `end` comes about, in words.
    """

    done: int
    last: int
    end: int
    arithmetic: str


def planned_steps(callback: keras.callbacks.Callback, epoch: int) -> Planned | None:
    """Counts from the beginning of an epoch, when every callback has given the optimizer its steps.

    Args:
        callback: in the `fit`, with its `params` and its model.
        epoch: the one that begins.

    Returns:
        None for data of unknown length.
    """
    steps = callback.params.get("steps")
    if not steps:
        return None
    optimizer = callback.model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    accumulated = getattr(inner, "gradient_accumulation_steps", None) or 1
    # Batches: `iterations` is whole steps, and would lose those that an accumulation has begun with.
    before = int(keras.ops.convert_to_numpy(getattr(inner, "_iterations", inner.iterations)))
    epochs = callback.params["epochs"] - epoch
    after, micro = before + epochs * steps, f" / {accumulated} accumulated" if accumulated > 1 else ""
    done = before // accumulated
    return Planned(
        done, (after - 1) // accumulated, after // accumulated, f"{done} done + {epochs} epochs of {steps} batches{micro}"
    )
