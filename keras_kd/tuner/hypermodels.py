"""What can be searched? Students, losses, temperatures, weights, optimizers, sparsity and bits, as one model of KerasTuner."""

import copy
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
import keras_tuner
from keras_tuner.errors import FatalTypeError, FatalValueError

from keras_kd import callbacks, losses, schedules
from keras_kd._terms import flat_names
from keras_kd.distiller import Distiller
from keras_kd.recording import Recording
from keras_kd.teachers import AveragedStudent, MovingAverage, RecordedTeacher
from keras_kd.tuner._recordings import Recordings, bound, steps_per_epoch
from keras_kd.tuner.objectives import Score
from keras_kd.tuner.trials import _is_checkpoint, fit_trial

DEFAULT_SEARCH: dict[str, Any] = {
    "temperature": [1.0, 2.0, 4.0, 8.0],
    "student_loss_weight": (0.0, 0.9, 0.1),
    "learning_rate": (1e-4, 1e-2),
}
_LOGARITHMIC = ("learning_rate",)
_WHOLE = ("num_bits", "number_of_clusters")
KEYS = (*DEFAULT_SEARCH, "distillation_loss_weight", "final_temperature", "sparsity", "num_bits", "number_of_clusters")
_FLOAT_BITS = 32
_SETTLED = 0.6  # share of the training after which the sparsity is reached: the rest is fine-tuning


class DistillationHyperModel(keras_tuner.HyperModel):
    """A search space of distillation: `build` makes a compiled `Distiller`, `fit` trains it with callbacks made for the trial.

    What is searched is named in `search`, by a value for each name: a list is a choice, a tuple `(low, high)` or `(low, high,
    step)` a range, a number or None is fixed, and a function of `hp` does as it likes. It is merged into the defaults:

    - `"temperature"`: [1, 2, 4, 8], of all losses that have one;
    - `"student_loss_weight"`: (0.0, 0.9, 0.1), the share of the supervised loss; 0 where there is none;
    - `"learning_rate"`: (1e-4, 1e-2), on a logarithmic scale;

    and the following, which are off unless they are given:

    - `"distillation_loss_weight"`: of each loss but the first, where there are several, as `<loss>_weight`;
    - `"final_temperature"`: the temperature falls to it over the training, along a cosine (`AnnealTemperature`);
    - `"sparsity"`: `Pruning` up to it, reached after 0.6 of the training; 0 is none;
    - `"num_bits"`: `Quantization` of so many bits; 32 is none;
    - `"number_of_clusters"`: `Clustering`; 0 is none.

    The teacher is recorded once, when the first trial trains: every later epoch, trial and worker reads what it said. The
    recording is found by the content of data and teacher, so another data set gets another one. It is in no checkpoint.
    Validation data have no teacher then: `val_loss` is the student's. Data that come in another order each time, and generators,
    are not recorded; nor are teachers that are no models.

    To change more, override a method: `student`, `distillation_losses`, `make_optimizer`, `make_distiller`, `callbacks`,
    `sparsity`. A HyperModel of your own that builds a Distiller, or any model, works as well: call `fit_trial` in its `fit`.

    Args:
        build_student: function of `hp` (`keras_tuner.HyperParameters`) that returns a new built Keras model.
        teacher: a trained model, a list of them, a `keras_kd.Recording`, or `keras_kd.teachers.MovingAverage()`.
        losses: distillation losses: what a `Distiller` takes (copied for each trial, so that no state is shared); a function of
            `hp` that returns that; or a dict of these by name, of which the search chooses one as `"distillation_loss"`. None is
            `KDLoss()`. A function sets its temperatures itself, unless `search` has one.
        search: what is searched, see above.
        loss: the supervised loss, as in `compile`; None learns from the teacher alone.
        metrics: names, functions or metrics, as in `compile`.
        optimizer: name, optimizer (copied for each trial), or function of `hp` that returns one.
        compile_options: more arguments of `compile`, such as `{"jit_compile": True, "steps_per_execution": 16}`.
        score: a `Score`, which measures costs: then the tuner's objective is `score.objective`, or a list of objectives.
        teacher_preprocessing: see `Distiller`.
        record: whether to record the teacher: True does so in the folder `teacher` of the tuner's project, a path there. Workers
            must share it, or each of them records.
        record_options: of `keras_kd.record_teacher`, such as `{"top_k": 10}` or `{"augment": function, "views": 4}`.
        name: see `keras_tuner.HyperModel`.
        tunable: see `keras_tuner.HyperModel`.

    Raises:
        TypeError: if `build_student` is no function, `search` no dict, or `score` no Score.
        ValueError: if `search` has a name that nothing is known of.

    Example:

    >>> import keras_tuner
    >>> def build_student(hp):
    ...     hidden = keras.layers.Dense(hp.Choice("width", [4, 8]), activation="relu")
    ...     return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3)])
    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> hypermodel = keras_kd.tuner.DistillationHyperModel(
    ...     build_student, teacher, loss=cross_entropy, search={"temperature": [2.0, 4.0]})
    >>> distiller = hypermodel.build(keras_tuner.HyperParameters())
    >>> distiller.distillation_losses[0].temperature, distiller.student.layers[0].units
    (2.0, 4)
    """

    known: ClassVar[tuple[str, ...]] = KEYS  # what `search` may name; a subclass adds its own
    default_search: ClassVar[Mapping[str, Any]] = DEFAULT_SEARCH
    _hint_for_unknown = " What the student has, `build_student` takes from `hp`."

    def __init__(
        self,
        build_student: Callable[[Any], keras.Model],
        teacher: Any,
        *,
        losses: Any = None,
        search: Mapping[str, Any] | None = None,
        loss: Any = None,
        metrics: Any = ("accuracy",),
        optimizer: Any = "adam",
        compile_options: Mapping[str, Any] | None = None,
        score: Score | None = None,
        teacher_preprocessing: Any = None,
        record: bool | str | pathlib.Path = True,
        record_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        tunable: bool = True,
    ) -> None:
        super().__init__(name=name, tunable=tunable)
        if not callable(build_student) or isinstance(build_student, keras.Model):
            raise TypeError(
                "`build_student` must be a function of `hp` that returns a new model. Received: "
                f"build_student={build_student!r} of type {type(build_student).__name__}."
            )
        if score is not None and not isinstance(score, Score):
            raise TypeError(f"`score` must be a keras_kd.tuner.Score. Received: score={score!r} of type {type(score).__name__}.")
        self.build_student = build_student
        self.teacher = teacher
        self.losses = losses
        self.given = self._checked_search(search)
        defaults = dict(self.default_search)
        self.search = (_without(defaults, "temperature") if _is_factory(losses) else defaults) | self.given
        self.loss, self.metrics, self.optimizer = loss, metrics, optimizer
        self.compile_options = dict(compile_options or {})
        self.score = score
        self.teacher_preprocessing = teacher_preprocessing
        self.record = record
        self._own_folder: pathlib.Path | None = None
        self._recordings = Recordings(teacher, teacher_preprocessing, record_options or {})

    # What a trial is made of

    def value(self, hp: Any, key: str) -> Any:
        """What `search` says of a key: the trial's value, or None.

        Args:
            hp: the trial's hyperparameters.
            key: such as `"temperature"`.
        """
        return _choose(hp, key, self.search.get(key))

    def student(self, hp: Any) -> keras.Model:
        """Hook: the student of a trial.

        Args:
            hp: the trial's hyperparameters.

        Raises:
            TypeError: if `build_student` returns something else than a Keras model. It ends the search, as the next does.
            ValueError: if the model is not built.
        """
        made = self.build_student(hp)
        if not isinstance(made, keras.Model):
            raise FatalTypeError(
                f"`build_student` must return a keras.Model. Received: {made!r} of type {type(made).__name__}. Does it lack a "
                "`return`?"
            )
        if not made.built:
            raise FatalValueError(
                f'`build_student` must return a built model. Received: the unbuilt model "{made.name}". Give it a keras.Input.'
            )
        return made

    def distillation_losses(self, hp: Any) -> Any:
        """Hook: new losses for a trial, as a `Distiller` takes them.

        Args:
            hp: the trial's hyperparameters.
        """
        given = self.losses
        if isinstance(given, Mapping):
            name = hp.Choice("distillation_loss", list(given))
            given = given[name]
        if _is_factory(given):
            given = given(hp)
        given = losses.KDLoss() if given is None else given
        return [_fresh(one) for one in given] if isinstance(given, list | tuple) else [_fresh(given)]

    def make_optimizer(self, hp: Any) -> keras.optimizers.Optimizer:
        """Hook: a new optimizer for a trial.

        Args:
            hp: the trial's hyperparameters.
        """
        made = self.optimizer(hp) if _is_factory(self.optimizer) else self.optimizer
        made = keras.optimizers.get(made if isinstance(made, str) else keras.optimizers.serialize(made))
        rate = self.value(hp, "learning_rate") if not _is_factory(self.optimizer) or "learning_rate" in self.given else None
        if rate is not None:
            made.learning_rate = rate
        return made

    def make_distiller(self, hp: Any) -> Distiller:
        """Hook: the Distiller of a trial, not compiled.

        Args:
            hp: the trial's hyperparameters.
        """
        made = self.distillation_losses(hp)
        teacher = self.teacher
        if isinstance(teacher, MovingAverage):
            teacher = MovingAverage.from_config(teacher.get_config())  # of this student alone
        share = 0.0 if self.loss is None else self.value(hp, "student_loss_weight")
        distiller = Distiller(
            teacher,
            self.student(hp),
            made,
            student_loss_weight=0.5 if share is None else share,
            teacher_preprocessing=self.teacher_preprocessing,
        )
        self._set_weights(hp, distiller)
        self._set_temperatures(hp, distiller)
        return distiller

    def build(self, hp: Any) -> Distiller:
        """A compiled Distiller, for KerasTuner.

        Args:
            hp: the trial's hyperparameters.
        """
        distiller = self.make_distiller(hp)
        for key in ("final_temperature", "sparsity", "num_bits", "number_of_clusters"):
            self.value(hp, key)  # known from the first `build` on, which oracles that count the space rely on
        metrics = None if self.metrics is None else [_fresh(one) for one in self.metrics]
        distiller.compile(self.make_optimizer(hp), self.loss, metrics=metrics, **self.compile_options)
        distiller.optimizer.build(distiller.trainable_variables)  # so that a trial which goes on from another finds its state
        return distiller

    def sparsity(self, hp: Any) -> float | None:
        """Hook: the share of zeros that the saved epoch must have; None or 0 for none.

        Args:
            hp: the trial's hyperparameters.
        """
        return self.value(hp, "sparsity") or None

    def callbacks(self, hp: Any, distiller: Distiller, epochs: int, steps: int) -> list[Any]:
        """Hook: the callbacks of a trial, made anew for it, so that nothing is copied.

        Args:
            hp: the trial's hyperparameters.
            distiller: the trial's.
            epochs: how many epochs this training has.
            steps: how many optimizer steps; 0 if that is not known, and no sparsity is searched.
        """
        made: list[Any] = []
        final = self.value(hp, "final_temperature")
        start = next((loss.temperature for loss in distiller.distillation_losses if hasattr(loss, "temperature")), None)
        if final is not None and start is not None:
            made.append(callbacks.AnnealTemperature(schedules.CosineValue(start, final, duration=max(1, epochs - 1))))
        if sparsity := self.sparsity(hp):
            made.append(callbacks.Pruning(_pruning_schedule(distiller, sparsity, steps)))
        if clusters := self.value(hp, "number_of_clusters"):
            made.append(callbacks.Clustering(clusters, preserve_sparsity=bool(sparsity)))
        bits = self.value(hp, "num_bits")
        if bits is not None and bits != _FLOAT_BITS:
            made.append(callbacks.Quantization(bits))
        return made

    # What a trial does

    def fit(self, hp: Any, model: Distiller, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trains a trial, for KerasTuner: see `fit_trial`.

        Args:
            hp: the trial's hyperparameters.
            model: what `build` made.
            *args: those of `search`, for `model.fit`.
            **kwargs: those of `search`, for `model.fit`, and KerasTuner's callbacks.

        Returns:
            The metrics of the epoch that was saved.
        """
        self._check_objective(kwargs.get("callbacks") or ())
        call = self.taught(model, bound(model, args, kwargs))
        epochs = call.get("epochs", 1) - call.get("initial_epoch", 0)
        accumulated = getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
        batches = steps_per_epoch(call, needed=self.search.get("sparsity") is not None)
        made = self.callbacks(hp, model, epochs, epochs * batches // accumulated)
        return fit_trial(model, trial_callbacks=made, score=self.score, sparsity=self.sparsity(hp), **call)

    def taught(self, model: Distiller, call: dict[str, Any]) -> dict[str, Any]:
        """Hook: puts the teacher's recording in the teacher's place.

        Args:
            model: the trial's Distiller.
            call: the arguments of `fit`, by name.

        Returns:
            The arguments with which the trial is trained.
        """
        if isinstance(self.teacher, Recording | RecordedTeacher):
            recording: Any = getattr(self.teacher, "given", self.teacher)
            if call.get("x") is None:
                call = call | {"x": recording.dataset(call.get("batch_size") or 32, shuffle=True), "shuffle": False}
                call.pop("batch_size", None)
            return call
        own = type(model).teacher_outputs is not Distiller.teacher_outputs
        if self.record is False or own or isinstance(self.teacher, MovingAverage | AveragedStudent):
            return call
        layers = flat_names(term.teacher_layers for term in model._terms)
        found = self._recordings(call, self._folder(call.get("callbacks") or ()), layers)
        if found is None:
            return call
        model.teacher, call = found
        return call

    def _checked_search(self, search: Any) -> dict[str, Any]:
        if search is not None and not isinstance(search, Mapping):
            raise TypeError(
                f"`search` must be a dict of what is searched. Received: search={search!r} of type {type(search).__name__}."
            )
        if unknown := [key for key in search or {} if key not in self.known]:
            raise ValueError(
                f"`search` knows {', '.join(self.known)}. Received: {', '.join(map(str, unknown))}.{self._hint_for_unknown}"
            )
        return dict(search or {})

    def _check_objective(self, tuner_callbacks: Any) -> None:
        """Raises where trials would be compared by a loss that the search itself scales."""
        checkpoint = next((one for one in tuner_callbacks if _is_checkpoint(one)), None)
        objective = None if checkpoint is None else checkpoint.objective
        names = [one.name for one in getattr(objective, "objectives", [objective]) if one is not None]
        names += [] if self.score is None else [self.score.metric.name]
        searched = [key for key in ("student_loss_weight", "temperature") if isinstance(self.search.get(key), list | tuple)]
        if (scaled := {"loss", "val_loss"} & {*names}) and searched and self.loss is not None:
            raise FatalValueError(
                f"Trials must be compared by what the search does not scale. Received: the objective {', '.join(sorted(scaled))}, "
                f'which changes with {" and ".join(searched)}. Take a metric ("val_accuracy"), or '
                'keras_tuner.Objective("val_student_loss", "min").'
            )

    def _folder(self, tuner_callbacks: Any) -> pathlib.Path:
        """Where the recordings are."""
        if not isinstance(self.record, bool):
            return pathlib.Path(self.record)
        checkpoint = next((one for one in tuner_callbacks if _is_checkpoint(one)), None)
        if checkpoint is not None:
            return pathlib.Path(checkpoint.filepath).parent.parent / "teacher"
        if self._own_folder is None:  # outside of a search
            self._own_folder = pathlib.Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._own_folder, ignore_errors=True)
        return self._own_folder

    def _set_weights(self, hp: Any, distiller: Distiller) -> None:
        if (spec := self.search.get("distillation_loss_weight")) is None:
            return
        for index, term in enumerate(distiller._terms[1:], 1):
            distiller.distillation_loss_weights[index] = _choose(hp, f"{term.name}_weight", spec, key="distillation_loss_weight")

    def _set_temperatures(self, hp: Any, distiller: Distiller) -> None:
        softened = [loss for loss in distiller.distillation_losses if hasattr(loss, "temperature")]
        asked = [key for key in ("temperature", "final_temperature") if self.given.get(key) is not None]
        if asked and not softened and not isinstance(self.losses, Mapping):
            names = ", ".join(type(loss).__name__ for loss in distiller.distillation_losses)
            raise ValueError(f'`search` has a "{asked[0]}", and no loss has one. Received: losses {names}. Leave it out.')
        value = self.value(hp, "temperature") if softened or isinstance(self.losses, Mapping) else None
        for loss in softened if value is not None else ():
            loss.temperature = value


def _choose(hp: Any, name: str, spec: Any, *, key: str | None = None) -> Any:
    """The value of a hyperparameter: a choice of a list, a number of a range, or what is fixed."""
    key = key or name
    if callable(spec):
        return spec(hp)
    if isinstance(spec, list):
        return hp.Choice(name, spec)
    if not isinstance(spec, tuple):
        return spec
    if len(spec) not in (2, 3) or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in spec):
        raise FatalValueError(
            f'`search["{key}"]` must be a list, (low, high), (low, high, step), a number or a function. Received: {spec!r}.'
        )
    low, high = spec[:2]
    step = spec[2] if len(spec) == 3 else None
    if low >= high:
        raise FatalValueError(f'`search["{key}"]` must be (low, high) with low < high. Received: {spec!r}.')
    if key in _WHOLE:
        return hp.Int(name, int(low), int(high), step=int(step or 1))
    if key in _LOGARITHMIC and step is None:
        return hp.Float(name, float(low), float(high), sampling="log")
    return hp.Float(name, float(low), float(high), step=None if step is None else float(step))


def _pruning_schedule(distiller: Distiller, sparsity: float, steps: int) -> Any:
    """From where the student is to the sparsity; a student that has it already, of an earlier trial, keeps to it."""
    begin = int(keras.ops.convert_to_numpy(distiller.optimizer.iterations))
    if begin > 0:
        return schedules.ConstantSparsity(sparsity, begin_step=0, frequency=100)
    end = max(1, int(steps * _SETTLED))
    return schedules.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=end, frequency=max(1, end // 20))


def _fresh(given: Any) -> Any:
    """A copy of a loss or metric without its state; names and functions as they are."""
    if isinstance(given, keras.losses.Loss | keras.metrics.Metric):
        return type(given).from_config(given.get_config())
    return given if isinstance(given, str) or callable(given) else copy.deepcopy(given)


def _is_factory(given: Any) -> bool:
    """Whether it is a function of `hp`, and not what such a function returns."""
    return callable(given) and not isinstance(given, keras.losses.Loss | keras.optimizers.Optimizer | type)


def _without(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != key}
