"""How do zeros hold after every optimizer step? Masks as constraints of the weights, inside the compiled step, for one `fit`.

Keras applies `variable.constraint` at the end of the optimizer's update, whatever its options: momentum, weight decay, averaging.
"""

import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kd.callbacks._kernels import Kernel

# Zeros of an earlier fit count as those of the schedule up to here: with a threshold, weights may have shrunk below it since then.
_NEARLY_DONE = 1.05

Update = Callable[[Any, list[Any]], tuple[Any, Callable[[], list[Any]]]]


class Group:
    """Kernels whose masks are updated together.

    Args:
        kernels: what is masked.
        update: function of `(step, weights)` that returns whether the masks change at this step, and a function that makes them.
            None: they stay as they began.
        begin_step: the step before which nothing is masked; from then on, weights that are zero when a `fit` begins stay zero.
        settled_step: the step from which on there are zeros if this pruned before: where many of them are missing, the first masks
            are made at once, and not at the schedule's next turn, if there is one. None: never.
    """

    def __init__(self, kernels: list[Kernel], update: Update | None, begin_step: int = 0, settled_step: int | None = None) -> None:
        self.kernels = kernels
        self.update = update
        self.begin_step = begin_step
        self.settled_step = settled_step
        self.begun = False
        self._here = _Here()

    def attach(self, model: keras.Model, fit: Any) -> None:
        """Puts masks on the kernels for the training of `model`; `fit` is an object that stands for this call of `fit`."""
        self.model = model
        self.optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        self.strategy = model.distribute_strategy
        with self.strategy.scope():
            self.masks = [
                tf.Variable(
                    tf.ones(kernel.variable.shape, kernel.variable.dtype),
                    trainable=False,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
                for kernel in self.kernels
            ]
        for index, kernel in enumerate(self.kernels):
            MaskConstraint(self, index, fit).link(kernel.variable)

    def detach(self) -> None:
        """Takes the masks off: every weight has the constraint again that it had."""
        for kernel in self.kernels:
            unlink(kernel.variable, self)
        self.model.train_function = None  # the masks are in it

    def begin(self) -> None:
        """Sets the first masks, once: by the schedule, or as the zeros of an earlier `fit` (or of one that was killed) say."""
        if self.begun:
            return
        self.begun = True
        step = int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        weights = self._weights()
        turn, make = (False, None) if self.update is None else self.update(tf.constant(step, tf.int64), weights)
        with self.strategy.scope():
            overdue = self.settled_step is not None and step >= self.settled_step
            made = make() if make is not None and (bool(turn) or overdue) else None
            if made is not None and (bool(turn) or _zeros(made) > _NEARLY_DONE * _zeros(weights)):
                masks = made
            elif step > self.begin_step or self.update is None:
                masks = [tf.cast(tf.not_equal(weight, 0), weight.dtype) for weight in weights]
            else:
                masks = [tf.ones_like(weight) for weight in weights]
            for mask, value in zip(self.masks, masks, strict=True):
                mask.assign(value)
        self.apply()

    def apply(self) -> None:
        """Zeroes what the masks leave out."""
        with self.strategy.scope():
            for kernel, mask in zip(self.kernels, self.masks, strict=True):
                kernel.variable.assign(keras.ops.convert_to_tensor(kernel.variable) * tf.convert_to_tensor(mask))

    def masked(self, index: int, weight: Any) -> Any:
        """A weight times its mask, in a step of the optimizer; the first weight of a step brings all masks up to date."""
        called = self._here.called
        if self.update is not None and (not called or index in called):
            called.clear()
            self._step()
        called.add(index)
        return weight * tf.convert_to_tensor(self.masks[index])

    def _step(self) -> None:
        # The optimizer counts only after the constraints, and micro-steps where it accumulates gradients.
        step = (tf.cast(self.optimizer._iterations.value, tf.int64) + 1) // (self.optimizer.gradient_accumulation_steps or 1)
        turn, make = self.update(step, self._weights())  # type: ignore[misc]
        if self.strategy.num_replicas_in_sync > 1:  # variables of replicas cannot be assigned inside a branch
            for mask, value in zip(self.masks, tf.cond(turn, make, lambda: [tf.identity(m) for m in self.masks]), strict=True):
                mask.assign(value)
            return

        def assign() -> Any:
            for mask, value in zip(self.masks, make(), strict=True):
                mask.assign(value)
            return tf.constant(True)

        tf.cond(turn, assign, lambda: tf.constant(False))

    def _weights(self) -> list[Any]:
        return [keras.ops.convert_to_tensor(kernel.variable) for kernel in self.kernels]


class Link(keras.constraints.Constraint):
    """One of several constraints on a weight: what was there first, then this one.

    Args:
        owner: what takes it off again: see `unlink`.
        index: the weight's place among those of the owner.
        fit: an object that stands for the call of `fit` that it is for: the `params` that Keras gives to all callbacks.
    """

    innermost = False  # whether it comes right after the weight's own constraint, whoever was there before

    def __init__(self, owner: Any, index: int, fit: Any) -> None:
        self.owner, self.index, self.fit = owner, index, fit
        self.former: Any = None

    def link(self, variable: Any) -> None:
        """Puts it on a weight."""
        outer, inner = None, variable.constraint
        while self.innermost and isinstance(inner, Link):
            outer, inner = inner, inner.former
        self.former = inner
        if outer is None:
            variable.constraint = self
        else:
            outer.former = self

    def value(self, weight: Any) -> Any:
        """The weight under the constraints that come before this one."""
        return keras.ops.convert_to_tensor(weight if self.former is None else self.former(weight))

    def __call__(self, weight: Any) -> Any:
        """Returns the weight's new value."""
        raise NotImplementedError


class MaskConstraint(Link):
    """Zeroes what the mask of a group leaves out."""

    innermost = True

    def __call__(self, weight: Any) -> Any:
        """Returns the weight's new value."""
        return self.owner.masked(self.index, self.value(weight))


class _Here(threading.local):
    """Which weights of the present step were seen, in each replica's thread."""

    def __init__(self) -> None:
        self.called: set[int] = set()


def unlink(variable: Any, owner: Any) -> None:
    """Takes the constraint of `owner` off a weight, wherever it stands in the chain: callbacks may end in any order."""
    outer, constraint = None, variable.constraint
    while isinstance(constraint, Link) and constraint.owner is not owner:
        outer, constraint = constraint, constraint.former
    if not isinstance(constraint, Link):
        return
    if outer is None:
        variable.constraint = constraint.former
    else:
        outer.former = constraint.former


def clear_stale(model: keras.Model, fit: Any) -> None:
    """Takes off what an earlier `fit` has left: Keras tells no callback when `fit` ends in an error."""
    for variable in model.trainable_variables:
        constraint = variable.constraint
        while isinstance(constraint, Link):
            if constraint.fit is not fit:
                unlink(variable, constraint.owner)
            constraint = constraint.former


def _zeros(tensors: list[Any]) -> int:
    return sum(int(tf.math.count_nonzero(tf.equal(tensor, 0))) for tensor in tensors)


def masking_groups(variable: Any) -> list[Group]:
    """The groups of other callbacks that mask this weight."""
    found, constraint = [], variable.constraint
    while isinstance(constraint, Link):
        found += [constraint.owner] if isinstance(constraint, MaskConstraint) else []
        constraint = constraint.former
    return found
