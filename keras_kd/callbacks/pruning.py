"""How does a model become sparse while it trains? Magnitude pruning as a plain callback, by TF-MOT's schedules and mask rules."""

import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import keras
import tensorflow as tf

from keras_kd import schedules
from keras_kd.callbacks import _masks
from keras_kd.callbacks._kernels import Kernel, choose_kernels, count_zeros
from keras_kd.callbacks._masking import Group, clear_stale, masking_groups
from keras_kd.callbacks._planned import Planned, planned_steps

_NEAR = 0.005  # of the last update to the sparsity that a schedule ends at


class KeepSparsity(keras.callbacks.Callback):
    """Whatever is zero when training begins stays zero: fine-tuning after pruning.

    ```
    w <- w * (w_0 != 0)    after every optimizer step
    ```

    It works on a plain model, and on the student of a `Distiller`. The logs of each epoch have the share of zeros in the chosen
    kernels as `sparsity`, and of each layer as `<layer>_sparsity`.

    Args:
        layers: which layers: None for all that have a kernel; a name or path, a layer class, a function of a layer, or a list of
            these.

    A `fit` whose chosen kernels have no zero gets a warning.

    Raises:
        ValueError: in `fit`, if no layer has a kernel, or a choice matches none.
        TypeError: in `fit`, for another kind of choice.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer="zeros")])
    >>> model.compile("adam", "mse")
    >>> keep = keras_kd.callbacks.KeepSparsity()
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=2, callbacks=[keep], verbose=0)
    >>> history.history["sparsity"]
    [1.0, 1.0]
    """

    def __init__(self, *, layers: Any = None) -> None:
        super().__init__()
        self.layers = layers
        self._groups: list[Group] = []
        self._begun = False

    def make_groups(self, model: keras.Model) -> list[Group]:
        """Hook: what is masked in `model`."""
        return [Group(choose_kernels(model, self.layers), None)]

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts masks on the weights."""
        for group in self._groups:  # of a `fit` that ended in an error
            group.detach()
        student = getattr(self.model, "student", self.model)
        clear_stale(student, self.params)
        self._groups = self.make_groups(student)
        for group in self._groups:
            group.attach(self.model, self.params)
        self._begun = False
        self.model.make_train_function(force=True)  # Keras has traced one without the masks already

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the first masks, now that every other callback (BackupAndRestore) has given the weights their values."""
        first, self._begun = not self._begun, True
        for group in self._groups:
            group.begin()
        if first:
            self._warn_if_nothing_is_kept()

    def on_test_begin(self, logs: Any = None) -> None:
        """Lets validation see the zeros, also where averaged weights were put in for it, or a kernel has had no gradient."""
        self._apply()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the sparsity into the logs."""
        self._apply()
        if logs is not None:
            logs.update(self.sparsities())

    def on_train_end(self, logs: Any = None) -> None:
        """Zeroes a last time, since Keras may have put averaged weights in, and leaves no trace on the model."""
        self._apply()
        for group in self._groups:
            group.detach()
        self._groups = []

    def _warn_if_nothing_is_kept(self) -> None:
        """Says so if there is no zero to keep, and nothing in this `fit` that makes some."""
        masking = [group for one in self._groups for kernel in one.kernels for group in masking_groups(kernel.variable)]
        if all(group.update is None for group in masking) and not self.sparsities()["sparsity"]:
            warnings.warn(
                f"{type(self).__name__} keeps zeros, and the chosen kernels of the model have none: this `fit` trains as without "
                "it. Prune first, with keras_kd.callbacks.Pruning, or load the pruned weights before `fit`.",
                stacklevel=3,
            )

    def _apply(self) -> None:
        for group in self._groups:
            if group.begun:
                group.apply()

    def sparsities(self) -> dict[str, float]:
        """The share of zeros in all chosen kernels, and in each layer's."""
        counts: dict[str, list[int]] = {}
        for kernel in [kernel for group in self._groups for kernel in group.kernels]:
            zeros, size = count_zeros([kernel])
            former = counts.get(kernel.path, (0, 0))
            counts[kernel.path] = [former[0] + zeros, former[1] + size]
        totals = [sum(column) for column in zip(*counts.values(), strict=True)]
        layers = {f"{path}_sparsity": zeros / size for path, (zeros, size) in counts.items()}
        return {"sparsity": totals[0] / totals[1]} | layers


class Pruning(KeepSparsity):
    """Magnitude pruning inside `fit`: on any Keras 3 model, with nothing to wrap and nothing to strip.

    ```
    every `frequency` steps:  mask = |w| >= (the k-th largest |w|),   k = max(round((1 - sparsity(step)) * size), 1)
    after every step:         w <- w * mask
    ```

    For equal weights and step the masks are those of TF-MOT. The zeros are exact after every optimizer step, with momentum,
    weight decay, `use_ema`, `steps_per_execution`, `jit_compile`, gradient accumulation and loss scaling, and a constraint that a
    layer has of its own still holds; a kernel that gets no gradient is masked at the end of each epoch. The schedule counts
    optimizer steps (`optimizer.iterations`), so it goes on from one `fit` to the next and after `BackupAndRestore`; a dense model
    that is past its end, or past the beginning of a constant sparsity, is pruned in the first step. After `fit` the model carries
    no trace; `KeepSparsity` keeps the zeros in a later one. On a `Distiller` it works on the student. The logs have `sparsity` and
    `<layer>_sparsity`. Put it after callbacks that assign weights, such as `EarlyStopping(restore_best_weights=True)`.

    Args:
        pruning_schedule: `keras_kd.schedules.PolynomialDecay`, `ConstantSparsity` (both TF-MOT's) or `Threshold`; a number in
            [0, 1), a constant sparsity from the first step on, with masks updated every 100 steps; or a dict of schedules by
            choice of layers, in place of `layers`.
        layers: which layers: None for all that have a kernel (dense, convolutional, recurrent, attention, embedding); a name or
            path, a layer class, a function of a layer, or a list of these.
        scope: "layer": every kernel has the sparsity of the schedule. "global": all chosen kernels together have it, by one
            threshold.
        block_size: `(rows, columns)` of blocks that go or stay as one, over a kernel's last two axes: inputs and outputs, at each
            position of a convolution.
        block_pooling_type: "AVG" or "MAX": what a block's magnitude is.
        sparsity_m_by_n: `(m, n)`: m zeros in every n consecutive weights along the input channels. A schedule below m / n leads
            there: round(sparsity * n) zeros at each step, m at most.

    Raises:
        TypeError: for a schedule that is none.
        ValueError: for an argument out of its range; in `fit`, for layers that match nothing, or a block or m:n pattern that does
            not fit a chosen kernel.

    Example:

    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> schedule = keras_kd.schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=6, frequency=2)
    >>> pruning = keras_kd.callbacks.Pruning(schedule)
    >>> history = model.fit(np.ones((32, 10)), np.ones((32, 1)), batch_size=8, epochs=2, callbacks=[pruning], verbose=0)
    >>> round(history.history["sparsity"][-1], 3)
    0.8

    Reference:
        Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017.
    """

    def __init__(
        self,
        pruning_schedule: Any,
        *,
        layers: Any = None,
        scope: str = "layer",
        block_size: tuple[int, int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        if isinstance(pruning_schedule, dict):
            if layers is not None or not pruning_schedule:
                raise ValueError(
                    "A dict of schedules chooses the layers itself and holds at least one. Received: "
                    f"pruning_schedule={pruning_schedule!r}, layers={layers!r}."
                )
            self.pruning_schedule: Any = {choice: _schedule(given) for choice, given in pruning_schedule.items()}
        else:
            self.pruning_schedule = _schedule(pruning_schedule)
        if scope not in ("layer", "global"):
            raise ValueError(f'`scope` must be "layer" or "global". Received: scope={scope!r}.')
        if block_pooling_type not in ("AVG", "MAX"):
            raise ValueError(f'`block_pooling_type` must be "AVG" or "MAX". Received: block_pooling_type={block_pooling_type!r}.')
        self.scope = scope
        self.block_size = _pair_of_whole_numbers("block_size", block_size)
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = None
        if sparsity_m_by_n is not None:
            self.sparsity_m_by_n = _pair_of_whole_numbers("sparsity_m_by_n", sparsity_m_by_n)
            if self.sparsity_m_by_n[0] >= self.sparsity_m_by_n[1]:
                raise ValueError(f"`sparsity_m_by_n` must be (m, n) with m < n. Received: sparsity_m_by_n={sparsity_m_by_n!r}.")
            if scope == "global" or self.block_size != (1, 1) or self._has_threshold():
                raise ValueError(
                    "`sparsity_m_by_n` fixes the pattern in each group of weights; it goes with neither scope='global', blocks nor "
                    f"a Threshold. Received: scope={scope!r}, block_size={block_size!r}, pruning_schedule={pruning_schedule!r}."
                )

    def _has_threshold(self) -> bool:
        given = self.pruning_schedule
        return any(isinstance(one, schedules.Threshold) for one in (given.values() if isinstance(given, dict) else [given]))

    def make_groups(self, model: keras.Model) -> list[Group]:
        """Hook: what is masked in `model`, by which schedule."""
        given = self.pruning_schedule
        pairs = list(given.items()) if isinstance(given, dict) else [(self.layers, given)]
        groups, taken = [], set()
        for choice, schedule in pairs:
            kernels = [
                kernel for kernel in self._fitting(choose_kernels(model, choice), choice) if id(kernel.variable) not in taken
            ]
            taken |= {id(kernel.variable) for kernel in kernels}
            if kernels:
                begin = getattr(schedule, "begin_step", 0)
                grows = not isinstance(schedule, schedules.Threshold | schedules.ConstantSparsity)
                settled = getattr(schedule, "end_step", None) if grows else begin
                groups.append(Group(kernels, self._update_by(schedule), begin, settled))
        return groups

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Says so if the schedules will not be at their end when `fit` is."""
        if not self._begun and (planned := planned_steps(self, epoch)) is not None:
            self._warn_if_too_short(planned)

    def _warn_if_too_short(self, planned: Planned) -> None:
        found = self.pruning_schedule.values() if isinstance(self.pruning_schedule, dict) else [self.pruning_schedule]
        for schedule in found:
            if not isinstance(schedule, schedules.PolynomialDecay):
                continue
            if schedule.end_step <= planned.end:
                if planned.done < schedule.end_step:  # past it, all is done at once
                    _warn_of_frequency(schedule)
                continue
            warnings.warn(
                f"The pruning schedule ends at optimizer step {schedule.end_step}, and this fit at step {planned.end} "
                f"({planned.arithmetic}): the model will not reach a sparsity of {schedule.final_sparsity}. "
                f"Set end_step={planned.end} or less, or train longer.",
                stacklevel=2,
            )

    def _update_by(self, schedule: Any) -> Callable[[Any, list[Any]], Any]:
        """A function of step and weights, for the groups of kernels."""

        def update(step: Any, weights: list[Any]) -> tuple[Any, Callable[[], list[Any]]]:
            turn, amount = schedule(step)
            return turn, lambda: self.make_masks(weights, schedule, amount)

        return update

    def make_masks(self, weights: list[Any], schedule: Any, amount: Any) -> list[Any]:
        """Hook: the masks of weights at a sparsity (or threshold) that the schedule has given."""
        blocks: dict[str, Any] = {"block_size": self.block_size, "pooling": self.block_pooling_type}
        if isinstance(schedule, schedules.Threshold):
            return _masks.threshold_masks(weights, amount, **blocks)
        if self.sparsity_m_by_n is not None:
            most, size = self.sparsity_m_by_n
            zeros = tf.minimum(tf.cast(tf.round(tf.cast(amount, tf.float32) * size), tf.int32), most)
            return [_masks.m_by_n_mask(weight, zeros, size) for weight in weights]
        xla = bool(getattr(self.model, "jit_compile", False)) and not tf.executing_eagerly()
        return _masks.magnitude_masks(weights, amount, together=self.scope == "global", xla=xla, **blocks)

    def _fitting(self, kernels: list[Kernel], choice: Any) -> list[Kernel]:
        """The kernels that the blocks or groups fit; where the user chose the others by name, that is an error."""
        misfits = [kernel for kernel in kernels if not self._fits(kernel)]
        if not misfits:
            return kernels
        wanted = (
            f"sparsity_m_by_n={self.sparsity_m_by_n} needs kernels with at least {self.sparsity_m_by_n[1]} input channels"
            if self.sparsity_m_by_n
            else f"block_size={self.block_size} is larger than the last two axes"
        )
        message = f"{wanted}. Received: {', '.join(kernel.label for kernel in misfits)}."
        if choice is not None or len(misfits) == len(kernels):
            raise ValueError(f"{message} Choose other layers with `layers=`.")
        warnings.warn(f"{message} They stay dense; `layers=` chooses layers without this warning.", stacklevel=2)
        return [kernel for kernel in kernels if self._fits(kernel)]

    def _fits(self, kernel: Kernel) -> bool:
        inputs, outputs = tuple(kernel.variable.shape)[-2:]
        if self.sparsity_m_by_n:
            has_inputs = kernel.variable.name != "embeddings" and "depthwise" not in type(kernel.layer).__name__.lower()
            return has_inputs and kernel.variable.name != "depthwise_kernel" and inputs >= self.sparsity_m_by_n[1]
        return inputs >= self.block_size[0] and outputs >= self.block_size[1]


def _warn_of_frequency(schedule: Any) -> None:
    """Says so if the last update of the masks comes before the schedule is near its end."""
    begin, length = schedule.begin_step, schedule.end_step - schedule.begin_step
    last = begin + length // schedule.frequency * schedule.frequency
    reached = float(schedule(tf.constant(last, tf.int64))[1])
    if reached < schedule.final_sparsity - _NEAR:
        fitting = max(length // 20, 1)
        warnings.warn(
            f"The pruning schedule updates the masks every {schedule.frequency} steps from step {begin} to {schedule.end_step}: "
            f"the last update, at step {last}, asks for a sparsity of {reached:.3f}, not {schedule.final_sparsity}. Set "
            f"frequency={fitting} and end_step={begin + length // fitting * fitting}, where an update is.",
            stacklevel=3,
        )


def _schedule(given: Any) -> Any:
    if isinstance(given, Real) and not isinstance(given, bool):
        if not 0 <= float(given) < 1:
            raise ValueError(f"`pruning_schedule` as a number is a sparsity in [0, 1). Received: pruning_schedule={given!r}.")
        return schedules.ConstantSparsity(float(given), begin_step=0, frequency=100)
    if isinstance(given, schedules.Threshold | schedules.PruningSchedule):
        return given
    raise TypeError(
        "`pruning_schedule` must be a number in [0, 1), keras_kd.schedules.PolynomialDecay, ConstantSparsity or Threshold, or a "
        f"dict of these by layer. Received: pruning_schedule={given!r} of type {type(given).__name__}."
    )


def _pair_of_whole_numbers(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"`{name}` must be two whole numbers above 0. Received: {name}={value!r}.")
    return pair
