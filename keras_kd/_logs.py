"""Which logs come out of a distillation step? The trackers of its losses, and metrics that look at the teacher."""

from typing import Any

import keras
from keras import ops

from keras_kd import _distribute, _outputs, metrics


class LoggedModel(keras.Model):
    """The half of a `Distiller` that logs: its losses by name, compiled metrics, and those that compare with the teacher.

    The other half sets `student`, `_teacher`, `_terms`, and before each update of metrics `_step.pairs`.
    """

    def _make_trackers(self) -> None:
        several = self._terms if len(self._terms) > 1 else []
        self._term_names = [term.name for term in several]
        self._parts = Means(["student_loss", "distillation_loss", *self._term_names], name="parts")

    def _log(self, values: dict[str, Any], x: Any) -> None:
        """Adds the values of a batch to the means that are logged."""
        values = {name: _distribute.across_replicas(value) for name, value in values.items()}
        self._parts.update_state(values, _distribute.batch_size(x))

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the compiled metrics and returns all logs; without labels, those that need none.

        So `fit(x, validation_data=(x_val, y_val))` trains without labels and validates with metrics.

        Args:
            x: the batch's inputs.
            y: the labels.
            y_pred: the student's outputs.
            sample_weight: weights, or None.
        """
        pairs, self._step.pairs = self._step.pairs, None
        with metrics.teaching(pairs):
            if y is None and self._compile_metrics is not None and self._only_teacher_metrics():
                y = y_pred  # they look at the teacher, not at labels
            if y is not None or self._compile_metrics is None:
                return super().compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        known = self._compile_metrics.result() if getattr(self._compile_metrics, "built", False) else {}
        return {name: value for name, value in self.get_metrics_result().items() if name not in known}

    def _output_pairs(self, teacher: Any, student: Any) -> list[Any]:
        """The teacher's outputs beside the student's, and what they hold, for metrics that compare them."""
        pairs = list(_outputs.pair(teacher, student).values())
        kinds = [held if len(held) == len(pairs) else [None] * len(pairs) for held in self._kinds()]
        return [(*pair, *kind) for pair, kind in zip(pairs, zip(*kinds, strict=True), strict=True)]

    def _kinds(self) -> tuple[list[Any], list[Any]]:
        return list(self._teacher.kinds), _outputs.output_kinds(self.student)

    def _compiled_metrics(self) -> list[Any]:
        compiled = self._compile_metrics
        return [] if compiled is None else keras.tree.flatten([compiled._user_metrics, compiled._user_weighted_metrics])

    def _only_teacher_metrics(self) -> bool:
        found = [metric for metric in self._compiled_metrics() if metric is not None]
        return bool(found) and all(isinstance(metric, metrics.TeacherMetric) for metric in found)

    def _teacher_metric_names(self) -> list[str]:
        return [metric.name for metric in self._compiled_metrics() if isinstance(metric, metrics.TeacherMetric)]

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns the metrics by name; `student_loss` only where there is a supervised loss."""
        compiled = self._compile_metrics
        if compiled is not None and not compiled.built:  # no labels have come yet, and it cannot say what it would be called
            object.__setattr__(self, "_compile_metrics", None)
        try:
            results = dict(super().get_metrics_result())
        finally:
            object.__setattr__(self, "_compile_metrics", compiled)  # past Keras' tracking
        if self._compile_loss is None:
            results.pop("student_loss", None)
        return results


class Means(keras.metrics.Metric):
    """The means of several named values, in two variables: a compiled step pays for every variable that it touches.

    Args:
        names: names of the values, which are those of the logs.
        **kwargs: see `keras.metrics.Metric`.
    """

    def __init__(self, names: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.totals, self.counts = (
            self.add_variable((len(self.names),), initializer="zeros", name=name) for name in ("totals", "counts")
        )

    def update_state(self, values: dict[str, Any], count: Any) -> None:
        """Adds scalars by name, each as the mean of `count` samples; names that are not there stay as they are."""
        count = ops.cast(count, self.dtype)
        given = [ops.cast(values[name], self.dtype) * count if name in values else 0.0 for name in self.names]
        self.totals.assign_add(ops.stack(given))
        self.counts.assign_add(ops.cast([name in values for name in self.names], self.dtype) * count)

    def result(self) -> dict[str, Any]:
        """Returns the means by name; 0 for what was never given."""
        means = ops.unstack(ops.divide_no_nan(self.totals, self.counts))
        return dict(zip(self.names, means, strict=True))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "names": self.names}
