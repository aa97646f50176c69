"""How does a student learn from a teacher in `model.fit`? The Distiller: a Keras model with its own training step."""

import contextlib
import threading
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_kd import _distribute, _mistakes, _outputs, _taps
from keras_kd._finite import FiniteCheck
from keras_kd._logs import LoggedModel
from keras_kd._terms import activation_of, as_losses, as_weights, build_losses, check_layers, claim, flat_names, make_terms
from keras_kd._tunable import Tunable, each, fraction, non_negative
from keras_kd.losses._features import phase
from keras_kd.metrics import TeacherMetric
from keras_kd.teachers import AbsentTeacher, AveragedStudent, MovingAverage, check_model, hold, inputs_of


@keras.saving.register_keras_serializable(package="keras_kd")
class Distiller(LoggedModel):
    """Trains a student to follow a teacher, inside ordinary `compile` and `fit`.

    ```
    loss = student_loss_weight * supervised + (1 - student_loss_weight) * sum_i(weight_i * distillation_i)
           + the student's regularisers and added losses
    ```

    As a model the Distiller *is* its student: calling it and `predict` are the student's, and `distiller.student` stays the plain
    Keras model that it was. Its weights are the student's and those of layers that losses own (projectors), which are trained
    beside it. The teacher runs in inference mode outside the gradient tape. It is never changed, not even its `trainable` flags,
    and its weights go into no file.

    `student_loss_weight`, `distillation_loss_weights` and the losses' temperatures can be assigned at any time, in a callback
    too: compiled steps follow without a new trace.

    To subclass, override one of three hooks: `teacher_outputs(x)`, `distillation_loss(x, y, student, teacher, sample_weight)`,
    or `train_step(data)`, which may call `compute_loss`.

    Args:
        teacher: a trained, built Keras model; a list of them, whose probabilities are averaged; a `keras_kd.Recording` of one; or
            `keras_kd.teachers.MovingAverage()`, the student's own average.
        student: the model to train, built.
        distillation_losses: a loss of `keras_kd.losses`, a `keras.losses.Loss`, a loss of `keras.distillation`, a name, or a
            list of these. None is `KDLoss()`.
        distillation_loss_weights: one number, not negative, per distillation loss. None is 1 for each.
        student_loss_weight: share of the supervised loss, in [0, 1].
        name: name of the model.
        teacher_preprocessing: callable that turns the student's inputs into the teacher's (other size, scale or dtype).
        teacher_weights: one number per teacher of a list; None is equal weights.
        evaluate_teacher: whether validation and `evaluate` run the teacher and log distillation losses. Can be assigned.
        **kwargs: passed to `keras.Model`.

    Raises:
        TypeError: if teacher or student is no Keras model, a loss is no loss, or a keyword is one of other code (`alpha`).
        ValueError: if a model is not built, teacher and student are one object, their outputs do not fit the losses, or a weight
            is out of its range.

    Example:

    >>> teacher = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)])
    >>> student = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> distiller = keras_kd.Distiller(teacher, student, keras_kd.losses.KDLoss(temperature=2.0))
    >>> distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = distiller.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
    >>> sorted(history.history)
    ['distillation_loss', 'loss', 'student_loss']

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.
    """

    student_loss_weight = Tunable(fraction)
    distillation_loss_weights = Tunable(each(non_negative))

    def __init__(
        self,
        teacher: Any,
        student: keras.Model,
        distillation_losses: Any = None,
        distillation_loss_weights: Any = None,
        student_loss_weight: float = 0.5,
        name: str = "distiller",
        *,
        teacher_preprocessing: Any = None,
        teacher_weights: Any = None,
        evaluate_teacher: bool = True,
        **kwargs: Any,
    ) -> None:
        _mistakes.refuse_keywords(type(self).__name__, kwargs, _mistakes.OF_DISTILLER)
        check_model(student, "student")
        # The student's policy decides on loss scaling; inputs reach it as they are, since it casts them itself.
        super().__init__(name=name, dtype=kwargs.pop("dtype", student.dtype_policy), autocast=False, **kwargs)
        self.student = student
        self._step = _Step()
        self.distillation_losses = as_losses(distillation_losses)
        self._terms = make_terms(self.distillation_losses)
        self.distillation_loss_weights = as_weights(distillation_loss_weights, self.distillation_losses)
        self.student_loss_weight = student_loss_weight
        self._evaluate_teacher = bool(evaluate_teacher)
        self._loss_layers: list[keras.layers.Layer] = []
        self._needs_compile = self._said_unread = False
        self._set_teacher(teacher, teacher_preprocessing, teacher_weights)
        self._make_trackers()
        self._finite_check = FiniteCheck()
        self.built = True

    # The teacher

    @property
    def teacher(self) -> Any:
        """The teacher, as it was handed over. Assign another one at any time between two calls of `fit`."""
        return self._teacher.given

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        asked = isinstance(teacher, (keras.Model, list, tuple))  # those that a preprocessing is for
        self._set_teacher(teacher, self._teacher.preprocessing if asked else None)

    @property
    def teacher_name(self) -> str:
        """What messages call the teacher."""
        return self._teacher.name

    def _set_teacher(self, teacher: Any, preprocessing: Any, weights: Any = None) -> None:
        activation = activation_of(self._terms)
        holder = hold(teacher, self.student, preprocessing=preprocessing, weights=weights, activation=activation)
        holder.check(self.student, same_inputs=type(self).teacher_outputs is Distiller.teacher_outputs)
        try:
            for term in self._terms:
                term.check(holder, self.student)
                check_layers(term, holder, self.student)
            build_losses(self._terms, holder, self.student)
        except Exception:  # the former teacher stays, with all that the losses know of it
            for term in self._terms if hasattr(self, "_teacher") else []:
                term.check(self._teacher, self.student)
                check_layers(term, self._teacher, self.student)
            raise
        self._teacher: Any = holder
        # The student's average belongs to the training and to its files; any other teacher stays out of them.
        self._moving_average = holder.model if isinstance(holder, AveragedStudent) else None
        known = len(self._loss_layers)
        self._track_loss_layers()
        if self.compiled and len(self._loss_layers) > known:
            self._needs_compile = True  # the optimizer does not know them
        self.supports_jit = holder.supports_jit
        self.train_function = self.test_function = None  # compiled steps hold the former teacher

    def _track_loss_layers(self) -> None:
        """Makes the layers that losses own, and may just have built, layers of this model."""
        known = {id(layer) for layer in self._loss_layers}
        for term in self._terms:
            claim(term.loss, self)
            self._loss_layers.extend(layer for layer in getattr(term.loss, "layers", []) if id(layer) not in known)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # past Keras' tracking, which would make it a layer of ours
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        # Keras writes to weight files what it finds on `dir(model)`, whether tracked or not.
        return [name for name in super().__dir__() if name != "teacher"]

    @property
    def evaluate_teacher(self) -> bool:
        """Whether validation and `evaluate` run the teacher. Without it they log the student's loss and metrics only."""
        return self._evaluate_teacher

    @evaluate_teacher.setter
    def evaluate_teacher(self, value: bool) -> None:
        if bool(value) != self._evaluate_teacher:
            self.test_function = None
        self._evaluate_teacher = bool(value)

    # What subclasses may override

    def teacher_outputs(self, x: Any) -> Any:
        """Hook: what the teacher says of a batch, nested as the student's outputs.

        It runs outside the gradient tape. Override it to blend, correct or replace the teacher's answers.

        Args:
            x: the batch's inputs, as `fit` received them.

        Returns:
            The teacher's outputs in inference mode.
        """
        outputs, features = self._teacher(x, flat_names(term.teacher_layers for term in self._terms))
        self._step.teacher_features = features
        return outputs

    def distillation_loss(self, x: Any, y: Any, student: Any, teacher: Any, sample_weight: Any) -> Any:
        """Hook: the distillation part of the loss, a scalar.

        Args:
            x: the batch's inputs.
            y: the labels, or None.
            student: the student's outputs.
            teacher: the teacher's outputs.
            sample_weight: weights, or None.

        Returns:
            The weighted sum of the distillation losses.
        """
        weights = Tunable.tensor(self, "distillation_loss_weights")
        features = (self._step.teacher_features, self._step.student_features)
        names = self._student_output_names()
        values = [term(teacher, student, y, sample_weight, output_names=names, features=features) for term in self._terms]
        self._track_loss_layers()  # those of models whose shapes show only now
        self._log(dict(zip(self._term_names, values, strict=False)), x)
        return sum(weights[index] * keras.ops.cast(value, weights.dtype) for index, value in enumerate(values))

    def train_step(self, data: Any) -> dict[str, Any]:
        """Hook: one step of training: teacher, student, gradients of the total loss, metrics.

        Args:
            data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is not None and sample_weight is None:  # weights may be those of classes, which Keras has read from labels
            self._warn_of_unread_labels()
        teacher = self._frozen_outputs(x)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True, teacher=teacher)
            self._loss_tracker.update_state(_distribute.across_replicas(loss), sample_weight=_distribute.batch_size(x))
            scaled_loss = self.optimizer.scale_loss(loss)
        if variables := self.trainable_variables:
            _distribute.build_optimizer(self.optimizer, variables)
            self.optimizer.apply_gradients(zip(tape.gradient(scaled_loss, variables), variables, strict=True))
        else:
            warnings.warn("The student has no trainable weights: this step changes nothing.", stacklevel=2)
        self._teacher.follow(self.student)
        return self._logs_of_step(self.compute_metrics(x, y, y_pred, sample_weight=sample_weight))

    def _warn_of_unread_labels(self) -> None:
        """Says once if `fit` has labels for a supervised loss that is not there, and nothing else reads them."""
        hooks = (getattr(type(self), name) for name in ("train_step", "compute_loss", "compute_metrics", "distillation_loss"))
        overridden = any(not hook.__module__.startswith("keras_kd.") for hook in hooks)
        reads = self._compile_loss is not None or any(getattr(term.loss, "uses_labels", False) for term in self._terms)
        reads = reads or any(not isinstance(metric, TeacherMetric) for metric in self._compiled_metrics() if metric is not None)
        if self._said_unread or reads or overridden or self.student_loss_weight == 0:
            return
        self._said_unread = True
        warnings.warn(
            "`fit` got labels, and nothing reads them: `compile` got neither a loss nor a metric of labels, and no distillation "
            f"loss takes them. Received: y, student_loss_weight={self.student_loss_weight}. To learn from labels too, pass loss= "
            "to `compile`; to learn from the teacher alone, leave y away or set student_loss_weight=0.0.",
            stacklevel=3,
        )

    # The steps

    def call(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        """Calls the student."""
        with _taps.record(self.student, flat_names(term.student_layers for term in self._terms), role="student") as features:
            outputs = self.student(inputs_of(inputs), training=training, **kwargs)
        self._step.student_features = features
        return outputs

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of evaluation: as in training, with the student in inference mode and nothing changed.

        Args:
            data: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Returns:
            The logs.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self(x, training=False)
        loss = self.compute_loss(x, y, y_pred, sample_weight, training=False)
        self._loss_tracker.update_state(_distribute.across_replicas(loss), sample_weight=_distribute.batch_size(x))
        logs = self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        if not self._is_taught(x):
            unknown = {"distillation_loss", *self._term_names}
            for name in self._teacher_metric_names():
                unknown |= {name, *(f"{output}_{name}" for output in self.output_names or [])}  # `digit_teacher_agreement`
            logs = {name: value for name, value in logs.items() if name not in unknown}
        return self._logs_of_step(logs)

    def _is_taught(self, x: Any) -> bool:
        """Whether evaluation on this batch has a teacher."""
        return self.evaluate_teacher and self._teacher.answers(x)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
        teacher: Any = None,
    ) -> Any:
        """Computes the total loss and updates the trackers of its parts.

        Args:
            x: the batch's inputs.
            y: the labels, or None for pure distillation.
            y_pred: the student's outputs: `distiller(x, training=training)`.
            sample_weight: weights of the samples, for supervised and distillation losses alike.
            training: whether this is a training step.
            teacher: the teacher's outputs, if they are already there; None runs the teacher.

        Returns:
            The total, a scalar tensor. Without a teacher (`evaluate_teacher = False` outside training) the total lacks the
            distillation losses.
        """
        share = Tunable.tensor(self, "student_loss_weight")
        added_before = None if self._moving_average is None else list(self.losses)  # without the average's, which may run next
        total = keras.ops.zeros((), dtype=share.dtype)
        if self._compile_loss is not None:
            if y is None:
                raise ValueError(
                    "compile(loss=...) compares with labels, and there are none. Pass y to fit (or a dataset of (x, y)), or "
                    "compile with loss=None to learn from the teacher alone."
                )
            student_loss = self._compile_loss(y, y_pred, sample_weight)
            self._log({"student_loss": student_loss}, x)
            total = total + share * keras.ops.cast(student_loss, share.dtype)
        if training or self._is_taught(x):
            teacher = self._frozen_outputs(x) if teacher is None else teacher
            self._step.pairs = self._output_pairs(teacher, y_pred) if self._teacher_metric_names() else None
            with phase(training):
                distillation_loss = keras.ops.cast(self.distillation_loss(x, y, y_pred, teacher, sample_weight), share.dtype)
            self._log({"distillation_loss": distillation_loss}, x)
            total = total + (1 - share) * distillation_loss
        for added in self.losses if added_before is None else added_before:
            total = total + keras.ops.cast(self._aggregate_additional_loss(added), share.dtype)
        self._step.clear_features()
        return total

    def _frozen_outputs(self, x: Any) -> Any:
        """The teacher's outputs, cut off from any gradient and checked: a NaN would silently ruin the student."""
        outputs = _outputs.map_outputs(tf.stop_gradient, self.teacher_outputs(x))
        self._step.teacher_features = keras.tree.map_structure(tf.stop_gradient, self._step.teacher_features)
        return self._finite_check.apply(outputs, name=self.teacher_name, jit_compile=self.jit_compile)

    def make_train_function(self, force: bool = False) -> None:
        """Builds the compiled training step."""
        if self._needs_compile:
            raise ValueError(
                "The new teacher needs layers in the losses (projectors) that the optimizer does not know. Call "
                "`distiller.compile(...)` again after `distiller.teacher = ...`."
            )
        if self.train_function is None or force:
            super().make_train_function(force=force)
            self.train_function = self._finite_check.watched(self.train_function, self)

    def make_test_function(self, force: bool = False) -> None:
        """Builds the compiled evaluation step."""
        if self.test_function is None or force:
            super().make_test_function(force=force)
            self.test_function = self._finite_check.watched(self.test_function, self)

    def _logs_of_step(self, logs: dict[str, Any]) -> dict[str, Any]:
        return _distribute.logs_of_step(logs)

    def _get_metrics_result_or_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        logs = super()._get_metrics_result_or_logs(logs)
        own_steps = (type(self).train_step, type(self).test_step) == (Distiller.train_step, Distiller.test_step)
        if own_steps and self.distribute_strategy.num_replicas_in_sync > 1:
            # Evaluation without a teacher logs less than there are metrics, and Keras then averages over replicas as if all had
            # equal shares of the data.
            known = self.get_metrics_result()
            logs = {name: known[name] for name in logs}
        return logs

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if not _distribute.symbolic_build(self, iterator, data_batch):
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

    # Being a Keras model

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configures training, as for any Keras model; `loss=None` learns from the teacher alone.

        Args:
            optimizer: name or optimizer.
            loss: the supervised loss, or None.
            loss_weights: weights of the supervised losses of several outputs.
            metrics: metrics of the student's outputs.
            weighted_metrics: metrics that sample weights apply to.
            **kwargs: `run_eagerly`, `steps_per_execution`, `jit_compile`, `auto_scale_loss`: see `keras.Model.compile`.

        Raises:
            TypeError: for a keyword that other code for distillation knows, such as `alpha`; it says what to write here.
        """
        _mistakes.refuse_keywords(f"{type(self).__name__}.compile", kwargs, _mistakes.OF_DISTILLER)
        if self.student_loss_weight != 0:
            _mistakes.warn_of_logits(self.student, loss)
        self._compile_loss = self._compile_metrics = None  # Keras would keep those of an earlier call
        self.supports_jit = self._teacher.supports_jit
        self._needs_compile = self._said_unread = False
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs)
        _distribute.check_scope(self)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned, and builds the optimizer for its state to be loaded."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Exports the student: see `keras.Model.export`."""
        self.student.export(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        reduced: Any = self.__reduce__()
        twin: Distiller = reduced[0](*reduced[1])
        if self._teacher.is_present and self._teacher.given is not None and self._moving_average is None:
            twin.teacher = self._teacher  # shared: it is read only, and no file holds its weights
        return twin

    @property
    def input_shape(self) -> Any:
        """The student's, where it knows it: MLflow asks models for theirs."""
        return self.student.input_shape

    @property
    def output_shape(self) -> Any:
        """The student's, where it knows it."""
        return self.student.output_shape

    @property
    def output_names(self) -> Any:
        """The student's output names, so that dicts of losses and metrics read as for the student."""
        return self._student_output_names()

    def _student_output_names(self) -> list[str] | None:
        return getattr(self.student, "output_names", None)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; the teacher as an architecture without weights."""
        preprocessing = self._teacher.preprocessing
        return {
            "teacher": self._teacher.get_config(),
            "student": keras.saving.serialize_keras_object(self.student),
            "distillation_losses": [term.get_config() for term in self._terms],
            "distillation_loss_weights": list(self.distillation_loss_weights),
            "student_loss_weight": self.student_loss_weight,
            "name": self.name,
            "teacher_preprocessing": preprocessing and keras.saving.serialize_keras_object(preprocessing),
            "evaluate_teacher": self.evaluate_teacher,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Distiller":
        """Rebuilds a Distiller without its teacher's weights: `fit` asks for `distiller.teacher = your_teacher`."""
        config = dict(config)
        # A scope of Keras replaces the one around it, such as that of load_model(custom_objects=): open none without need.
        with keras.saving.custom_object_scope(custom_objects) if custom_objects else contextlib.nullcontext():
            for key in ("student", "distillation_losses", "teacher_preprocessing"):
                config[key] = keras.saving.deserialize_keras_object(config[key]) if config.get(key) else None
            teacher: Any = AbsentTeacher(config.pop("teacher"), config["teacher_preprocessing"])
        return cls(teacher.model if isinstance(teacher.model, MovingAverage) else teacher, **config)


class _Step(threading.local):
    """Outputs of layers on their way from the forward passes to the losses of one step, per replica thread."""

    pairs: Any = None  # outputs of teacher and student, for metrics

    def __init__(self) -> None:
        self.clear_features()

    def clear_features(self) -> None:
        """Lets go of the tensors."""
        self.student_features: dict[str, Any] = {}
        self.teacher_features: dict[str, Any] = {}
