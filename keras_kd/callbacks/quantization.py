"""How does a model learn to live with integers? Quantization-aware training as a plain callback, on TF-MOT's fake quantisation."""

import enum
import numbers
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kd import _taps
from keras_kd._calls import find_leaves
from keras_kd.callbacks import _calibration, _quantizable
from keras_kd.callbacks._kernels import Kernel, find_kernels, matcher
from keras_kd.callbacks._planned import planned_steps
from keras_kd.callbacks._presence import Last, is_running, leave, running_lists, take_back
from keras_kd.callbacks.clustering import is_clustered
from keras_kd.quantized import _kinds
from keras_kd.quantized import model as quantized_models
from keras_kd.quantized._copying import attribute_of
from keras_kd.quantized._epochs import Epochs
from keras_kd.quantized._plan import make_plan
from keras_kd.quantized._rounding import Ranges, Rounding

_RANGES = "_keras_kd_ranges"  # the attribute of a model in training under which savers find the ranges


class _Phase(enum.Enum):
    """Where a training stands."""

    OUTSIDE = "not in a fit"
    BEGUN = "in a fit, before its first batch"
    FLOAT = "before start_step"
    ROUNDED = "ranges follow the activations"
    FROZEN = "from freeze_step on"


class Quantization(keras.callbacks.Callback):
    """Quantization-aware training inside `fit`: on any Keras 3 model, with nothing to wrap and nothing to strip.

    ```
    w' = round(w / s) s,  s = max|w| / (2^(bits - 1) - 1)           kernels
    x' = (clip(round(x / s) + z, 0, 2^bits - 1) - z) s              activations, s and z from the range [low, high]
    low <- low + (1 - momentum) (min(x, 0) - low),  high likewise   at each step; the first steps are plain means
    ```

    Gradients pass the rounding as if it were not there. Kernels of convolutions have a range for each output channel, others one
    (the converter's rule). Rounded are the inputs and outputs of layers with kernels, and of what stands between them, except
    where the converter computes layers as one: nothing between a convolution, its batch normalisation and its ReLU. Layers that
    integers cannot compute stay in float; one warning names them.

    Training, and validation inside it, compute with rounding; `model(x)` is the plain model at any time, and nothing of the
    callback is left on it after `fit`. `quantized_model()` gives a model that computes what training saw. On a `Distiller` it works
    on the student. Zeros of `Pruning` and `KeepSparsity` stay zeros; beside `Clustering` the channels of a kernel share one range,
    so that its values stay few. Keras' `TensorBoard` beside it shows the ranges.

    Args:
        num_bits: bits of the kernels, 2 to 16; or a dict of bits by choice of layers, in place of `layers`, of which the first that
            takes a layer counts. LiteRT files have 8, or 4.
        layers: which layers with kernels: None for all; a name or path, a layer class, a function of a layer, or a list of these.
        activation_bits: bits of the activations, 2 to 16; None rounds kernels alone.
        calibration_data: inputs that ranges are measured on before the first step: an array, or arrays nested as the model takes
            them, or an iterable of batches (a `tf.data.Dataset`; of tuples the first entry counts). None: the ranges begin as
            those of the first batch that is trained on.
        start_step: the optimizer step from which on it rounds; training is plain before. For a model that is trained from the
            beginning, half of all steps is a good choice: rounding hinders weights that still have far to go.
        freeze_step: the optimizer step from which on ranges and the statistics of batch normalisation stay what they are.
        momentum: of the ranges, in [0, 1). Ranges that lag behind growing activations clip them.

    Raises:
        TypeError: for choices or data of another kind.
        ValueError: for an argument out of its range; in `fit`, for layers that match nothing, a model without layers that can be
            rounded or of unknown input shapes, a quantised model, several students (`MutualDistiller`), steps to count without an
            optimizer, or calibration data that is empty, not finite or of another shape.

    Example:

    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10, activation="relu"), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> quantization = keras_kd.callbacks.Quantization()
    >>> history = model.fit(np.ones((32, 10)), np.ones((32, 1)), epochs=2, callbacks=[quantization], verbose=0)
    >>> report = keras_kd.export.to_litert(quantization.quantized_model(), tmp_path / "model.tflite")

    Reference:
        Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
    """

    def __init__(
        self,
        num_bits: Any = 8,
        *,
        layers: Any = None,
        activation_bits: int | None = 8,
        calibration_data: Any = None,
        start_step: int = 0,
        freeze_step: int | None = None,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if isinstance(num_bits, dict) and (layers is not None or not num_bits):
            raise ValueError(
                "A dict of bits chooses the layers itself and holds at least one. Received: "
                f"num_bits={num_bits!r}, layers={layers!r}."
            )
        if isinstance(layers, list | tuple | set) and not layers:
            raise ValueError(f"`layers` must choose at least one layer; None chooses all. Received: layers={layers!r}.")
        for bits in num_bits.values() if isinstance(num_bits, dict) else [num_bits]:
            _quantizable.check_bits("num_bits", bits)
        if activation_bits is not None:
            _quantizable.check_bits("activation_bits", activation_bits)
        for name, step in (("start_step", start_step), ("freeze_step", freeze_step)):
            if step is not None and (isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0):
                raise ValueError(f"`{name}` must be a whole number of steps, 0 or more. Received: {name}={step!r}.")
        if freeze_step is not None and freeze_step < start_step:
            raise ValueError(
                f"`freeze_step` must not come before `start_step`. Received: start_step={start_step}, freeze_step={freeze_step}."
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1). Received: momentum={momentum!r}.")
        self.num_bits = num_bits
        self.layers = layers
        self.activation_bits = activation_bits
        self.calibration_data = calibration_data
        self.start_step = start_step
        self.freeze_step = freeze_step
        self.momentum = momentum
        self._rounding: Any = None  # a `Rounding`
        self._epochs = Epochs()
        self._functions: dict[str, Any] = {}
        self._phase = _Phase.OUTSIDE
        self._calls: Any = None  # weak reference to the list of callbacks of the `fit`, `evaluate` or `predict` that it is in
        self._farewell: Any = None  # what happens when that list goes
        self._noted = False
        self._warned = False

    # What Keras calls

    def set_model(self, model: keras.Model) -> None:
        """Finds what to round, and puts the ranges where checkpoints, written or read in this `fit`, find them."""
        super().set_model(model)
        self._enter()
        if getattr(model, "student", model).built:
            self._prepare()

    def on_train_begin(self, logs: Any = None) -> None:
        """Measures ranges on the calibration data."""
        if sum(isinstance(one, Quantization) for one in getattr(self._list(), "callbacks", [])) > 1:
            raise ValueError(
                "There can be one Quantization in a `fit`. Received: several in the list of callbacks. A dict gives layers bits of "
                'their own: Quantization(num_bits={"conv1": 8, keras.layers.Dense: 4}).'
            )
        rounding = self._prepare()
        if (self.start_step or self.freeze_step is not None) and getattr(self.model.optimizer, "iterations", None) is None:
            raise ValueError(
                "`start_step` and `freeze_step` count the steps of the model's optimizer, and it was compiled without one. "
                f"Received: start_step={self.start_step}, freeze_step={self.freeze_step}. Give `compile` an optimizer, or leave "
                "both out."
            )
        if not self._warned:
            self._warned = True
            self._warn(rounding)
        if self.calibration_data is not None and not rounding.is_begun:
            self._calibrate(rounding)
        self._phase = _Phase.BEGUN  # the next is found before the first batch, when others have given the weights their values
        if (calls := self._list()) is not None and not any(isinstance(one, Last) for one in calls.callbacks):
            calls.callbacks.append(Last(self.finish, calls.callbacks))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Says so if `start_step` lies behind the end of this `fit`."""
        if self._phase is not _Phase.BEGUN or not self.start_step or (planned := planned_steps(self, epoch)) is None:
            return
        if self.start_step > planned.last:
            outcome = "it trains without rounding" if self._has_ranges() else "nothing is quantised"
            warnings.warn(
                f"Quantization begins to round at optimizer step {self.start_step}, and this fit ends at step {planned.end} "
                f"({planned.arithmetic}): {outcome}. Set start_step={(planned.done + planned.end) // 2} or less (half of this "
                "fit), or train longer.",
                stacklevel=2,
            )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts rounding into the step when its time has come."""
        phase = self._next_phase()
        if phase != self._phase:
            self._phase = phase
            if phase != _Phase.FLOAT:
                self._rounding.equal = self._clustered_layers()
            self._functions = {}
        self._lend("train", update=phase == _Phase.ROUNDED, freeze=phase == _Phase.FROZEN)

    def on_test_begin(self, logs: Any = None) -> None:
        """See `on_test_batch_begin`."""
        self._noted = False

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Validation computes as training does; the weights that it sees are those that an epoch is known by."""
        if not self._noted:  # not in `on_test_begin`, after which others may put averaged weights in
            self._noted = True
            self._note()
        self._lend("test")

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        """So do predictions inside `fit`."""
        self._lend("predict")

    def on_test_end(self, logs: Any = None) -> None:
        """Leaves no trace after an `evaluate` of its own."""
        if self._phase is _Phase.OUTSIDE:
            self._detach()

    def on_predict_end(self, logs: Any = None) -> None:
        """The same for `predict`."""
        self.on_test_end()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Notes which ranges the weights of this epoch have, and hands them to a TensorBoard callback beside it."""
        self._note()
        for other in getattr(self._list(), "callbacks", ()):
            if isinstance(other, keras.callbacks.TensorBoard) and self._has_ranges():
                self._show(other, epoch)

    def _show(self, board: Any, epoch: int) -> None:
        """Writes ranges where TensorBoard has its scalars; in the logs, hundreds of them would fill the progress bar."""
        with board._train_writer.as_default():
            for name, limits in self.activation_ranges().items():
                for end, value in zip(("low", "high"), limits, strict=True):
                    tf.summary.scalar(f"range/{name}/{end}", value, step=epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves a plain model."""
        if self._list() is None:
            self.finish()  # else when all other callbacks are done with the weights

    def finish(self) -> None:
        """Ends a `fit`: ranges become those of the weights that it leaves, and `quantized_model` and the export know them."""
        self._phase, self._functions = _Phase.OUTSIDE, {}
        self._detach()
        if not self._has_ranges():
            return
        rounding = self._rounding
        epoch = self._epochs.nearest(rounding.model)  # EarlyStopping may have put weights of an earlier one back
        if epoch is not None:
            rounding.ranges.limits.assign(epoch.limits)
            rounding.equal = set(epoch.equal)
        self._epochs.note(rounding.model, rounding.ranges.limits, rounding.equal)
        quantized_models.remember(rounding.model, rounding.plan, self._epochs)

    # What users call

    def quantized_model(self) -> quantized_models.QuantizedModel:
        """Makes a new model of the present weights, which computes exactly what training sees.

        Returns:
            A `keras_kd.quantized.QuantizedModel`, independent of the one in training.

        Raises:
            RuntimeError: if there are no ranges yet.
            ValueError: if the model cannot be made again from its config.
        """
        rounding = self._rounding
        if not self._has_ranges():
            raise RuntimeError("There are no ranges yet: call `quantized_model` when `fit` with this callback has rounded a step.")
        epoch = self._epochs.find(rounding.model)  # weights of an earlier one may have been loaded
        equal, limits = (rounding.equal, rounding.ranges.limits) if epoch is None else (epoch.equal, epoch.limits)
        return quantized_models.QuantizedModel(quantized_models.copy_model(rounding.model), rounding.plan, equal, limits)

    def quantize(self, model: keras.Model) -> quantized_models.QuantizedModel:
        """Quantises a model after its training, by ranges of the calibration data alone.

        Args:
            model: a built model; it is not touched.

        Returns:
            A `keras_kd.quantized.QuantizedModel`.

        Raises:
            ValueError: if there is no `calibration_data`, or as `fit` does.
        """
        if self.calibration_data is None and self.activation_bits is not None:
            raise ValueError(
                "`calibration_data` must be given to measure ranges without training. Received: calibration_data=None."
            )
        self._rounding = None  # ranges of an earlier model, or of other weights, say nothing here
        self.set_model(model)
        rounding = self._prepare()
        _quantizable.warn_of_floats(rounding)
        try:
            if self.calibration_data is not None:
                self._calibrate(rounding)
            return self.quantized_model()
        finally:
            self._detach()

    def activation_ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each range, by the layer that gives it."""
        rounding = self._rounding
        if rounding is None:
            return {}
        limits = [(float(low), float(high)) for low, high in keras.ops.convert_to_numpy(rounding.ranges.limits)]
        return {name: rounding.plan.fixed.get(i, limits[i]) for i, name in enumerate(rounding.plan.names)}

    # How

    def _prepare(self) -> Rounding:
        student: Any = getattr(self.model, "student", self.model)
        _quantizable.check_model(self.model, student)
        if self._rounding is None or self._rounding.model is not student:
            plan = make_plan(student, self._bits_of(student), self.activation_bits, self._specs(student))
            _quantizable.check_plan(student, plan)
            with self.model.distribute_strategy.scope():
                self._rounding = Rounding(student, plan, Ranges(len(plan.names)), self.momentum)
            self._epochs, self._warned = Epochs(), False
        self._attach()
        return self._rounding

    def _enter(self) -> None:
        """Notices a `fit`, `evaluate` or `predict` that is not inside the one before: that has ended, perhaps in an error."""
        running = running_lists(self)
        outermost = running[-1] if running else None
        if outermost is None or outermost is not self._list():
            self._phase, self._functions = _Phase.OUTSIDE, {}
            self._calls = None if outermost is None else weakref.ref(outermost)
            take_back(self.model)

    def _list(self) -> Any:
        return None if self._calls is None else self._calls()

    def _attach(self) -> None:
        ranges, calls = self._rounding.ranges, self._list()
        object.__setattr__(self.model, _RANGES, ranges)  # savers find it, Keras does not track it
        if self._farewell is not None:
            self._farewell.detach()
        if calls is not None:
            self._farewell = weakref.finalize(calls, leave, weakref.ref(self.model), _RANGES, ranges)
            self._farewell.atexit = False

    def _detach(self) -> None:
        self.model.__dict__.pop(_RANGES, None)

    def _note(self) -> None:
        if self._phase in (_Phase.ROUNDED, _Phase.FROZEN) and self._has_ranges():
            self._epochs.note(self._rounding.model, self._rounding.ranges.limits, self._rounding.equal)

    def _specs(self, student: keras.Model) -> Any:
        specs = _taps.input_specs(student)
        if specs is None and self.calibration_data is not None:
            batch = next(iter(_calibration.batches(self.calibration_data, None)))
            specs = keras.tree.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), batch)
        if specs is None:
            raise ValueError(
                f'The input shapes of the subclassed model "{student.name}" are not known. Pass calibration_data=: samples of its '
                "inputs."
            )
        return specs

    def _bits_of(self, student: keras.Model) -> Callable[[str, Any], int | None]:
        """A function that gives the bits of a layer's kernels."""
        choices: dict[Any, int] = self.num_bits if isinstance(self.num_bits, dict) else {}
        if not choices:
            listed = self.layers if isinstance(self.layers, (list, tuple, set)) else [self.layers]
            choices = dict.fromkeys(listed, self.num_bits) if self.layers is not None else {None: self.num_bits}
        leaves = {path: layer for path, layer in find_leaves(student).items() if _kinds.kind_of(layer) == _kinds.KERNEL}
        found: dict[str, int] = {}
        for choice, bits in choices.items():
            matches = [path for path, layer in leaves.items() if choice is None or matcher(choice)(Kernel(path, layer, None))]
            if not matches and choice is not None:
                raise ValueError(
                    f"`layers` must match layers that can be rounded. Received: {choice!r}, which matches none. Layers: "
                    f"{', '.join(leaves)}."
                )
            found = dict.fromkeys(matches, bits) | found
        return lambda path, layer: found.get(path)

    def _calibrate(self, rounding: Rounding) -> None:
        specs = keras.tree.flatten(self._specs(rounding.model))
        batches = 0
        self._rounding = None  # until it is done: half of the data is no calibration
        for batch in _calibration.batches(self.calibration_data, len(specs)):
            _calibration.check_batch(batch, specs)
            with self.model.distribute_strategy.scope(), rounding.active(update=True):
                rounding.model(keras.tree.map_structure(tf.convert_to_tensor, batch), training=False)
            batches += 1
        if not batches:
            raise ValueError("`calibration_data` must hold at least one sample. Received: none.")
        self._rounding = rounding

    def _next_phase(self) -> _Phase:
        if self._phase is _Phase.FROZEN or (self._phase is _Phase.ROUNDED and self.freeze_step is None):
            return self._phase
        step = 0
        if self.start_step or self.freeze_step is not None:
            step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        if step < self.start_step:
            return _Phase.FLOAT
        frozen = self.freeze_step is not None and step >= self.freeze_step
        return _Phase.FROZEN if frozen and self._has_ranges() else _Phase.ROUNDED  # without ranges, one step measures them first

    def _warn(self, rounding: Rounding) -> None:
        """Says what will not be as one may think, before the training and not after it."""
        _quantizable.warn_of_floats(rounding)
        try:
            quantized_models.QuantizedModel(quantized_models.copy_model(rounding.model), rounding.plan)
        except ValueError as error:
            plain = self.activation_bits is not None and rounding.model.dtype_policy.name == "float32"  # other files need a copy
            hint = ", and `export.to_litert(model)` will work" if plain else ""
            warnings.warn(f"After this training `quantized_model()` will fail{hint}: {error}", stacklevel=3)

    def _has_ranges(self) -> bool:
        return self._rounding is not None and (not self._rounding.plan.names or self._rounding.is_begun)

    def _clustered_layers(self) -> set[str]:
        """Layers with kernels that another callback lets have few values."""
        return {kernel.path for kernel in find_kernels(self._rounding.model) if is_clustered(kernel.variable)}

    def _lend(self, kind: str, **options: bool) -> None:
        """Lends the model a compiled function that rounds, for one call: when `fit` fails in it, the model has its own already."""
        if self._phase in (_Phase.OUTSIDE, _Phase.FLOAT):
            return
        attribute = f"{kind}_function"
        getattr(self.model, f"make_{attribute}")()  # unless it has one
        own, (known, function) = getattr(self.model, attribute), self._functions.get(kind, (None, None))
        if own is not known:  # the first time, or somebody else has changed what the step is
            function = self._compiled(kind, own, **options)
            self._functions[kind] = (own, function)
        setattr(self.model, attribute, function)

    def _compiled(self, kind: str, own: Any, **options: bool) -> Any:
        """A function in the place of a model's own one, which it puts back when it is called."""
        model, rounding, attribute, step = self.model, self._rounding, f"{kind}_function", getattr(self.model, f"{kind}_step")

        def rounded(*args: Any, **kwargs: Any) -> Any:
            with rounding.active(**options):
                return step(*args, **kwargs)

        with attribute_of(model, f"{kind}_step", rounded):
            getattr(model, f"make_{attribute}")(force=True)
        compiled, calls = getattr(model, attribute), self._calls

        def function(*args: Any, **kwargs: Any) -> Any:
            setattr(model, attribute, own)
            if not is_running(calls):  # another callback failed when this was lent already, and this is a later `fit`
                return own(*args, **kwargs)
            with attribute_of(model, f"{kind}_step", rounded):  # Keras may look it up when it traces
                return compiled(*args, **kwargs)

        function.lent_for = own  # type: ignore[attr-defined]
        return function
