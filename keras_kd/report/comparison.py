"""Which model is smaller, faster, as right as another? Measures several side by side, on the same samples."""

import gzip
import platform
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _batching, _files
from keras_kd._progress import Progress, Verbose, check_verbose
from keras_kd._version import __version__
from keras_kd.profile import Latency, measure_latencies
from keras_kd.report import _scores
from keras_kd.report._subjects import Subject, open_subject
from keras_kd.report.results import Comparison, ModelRow

_TASKS = ("auto", _scores.CLASSES, _scores.BINARY, _scores.NUMBERS)


def compare(
    models: Mapping[str, Any],
    data: Any,
    labels: Any = None,
    *,
    metrics: Mapping[str, Any] | None = None,
    reference: str | None = None,
    task: str = "auto",
    output: int = 0,
    latency: bool = True,
    runs: int = 100,
    batch_size: int = 256,
    histories: Mapping[str, Any] | None = None,
    verbose: Verbose = "auto",
) -> Comparison:
    """Measures models side by side: how right, how alike, how large and how fast they are.

    Every model sees the same samples in one pass, whose memory does not grow with their number. Keras models are exported to a
    temporary LiteRT file for their bytes and their latency: a `QuantizedModel` in the integers that it rounds to, others in
    float32. Latencies are taken in turn, so that a busy machine is busy for all.

    Args:
        models: by name: built Keras models, `QuantizedModel`s, Distillers (their students), and paths of `.keras` and `.tflite`
            files.
        data: arrays nested as the models take them, or batches `x` or `(x, y)` (a `tf.data.Dataset`); sample weights in it are not
            used.
        labels: an entry for each sample, where `data` are arrays: class numbers, one-hot rows, 0 and 1, or numbers. Without any,
            models are only compared with the reference.
        metrics: more to measure, by name: metrics of Keras, or functions of labels and outputs as arrays that give a value for each
            sample; their mean is shown.
        reference: name of the model that others are compared with; None is the first.
        task: what outputs are taken for: "classes" (the largest is the answer), "binary" (each is yes or no) or "numbers". "auto"
            finds it in labels and outputs.
        output: which output is compared, where models have several, in `keras.tree.flatten` order.
        latency: whether to take times.
        runs: timed inferences of each model.
        batch_size: samples in a batch, where `data` are arrays.
        histories: training curves by name of the model: what `fit` returned, or its dict.
        verbose: 0 is silent; 1 and "auto" print progress.

    Returns:
        A `Comparison`.

    Raises:
        TypeError: for names that are no strings, and models that are none.
        ValueError: for no models, data or labels that do not fit, and arguments of other values; the message names the model.
        FileNotFoundError: if there is no file at a path.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> file = keras_kd.export.to_litert(model, tmp_path / "student.tflite").path
    >>> x, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 3
    >>> comparison = keras_kd.report.compare({"student": model, "file": file}, x, y, verbose=0)
    >>> comparison["file"].agreement, comparison["student"].parameters
    (1.0, 15)
    >>> comparison.to_html(tmp_path / "report.html")
    """
    check_verbose(verbose)
    if not isinstance(models, Mapping):
        raise TypeError(f"`models` must be a dict of models by name. Received: models of type {type(models).__name__}.")
    if not models:
        raise ValueError("`models` must hold at least one model. Received: none.")
    if task not in _TASKS:
        raise ValueError(f"`task` must be one of {', '.join(_TASKS)}. Received: task={task!r}.")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"`runs` must be a whole number of at least 1. Received: runs={runs!r}.")
    subjects = [open_subject(name, value) for name, value in models.items()]
    reference = _known(subjects[0].name if reference is None else reference, models, "reference")
    curves = {_known(name, models, "histories"): _curves(name, value) for name, value in (histories or {}).items()}
    counted = _Pass(subjects, reference, task, output, _checked_metrics(metrics))
    counted.run(data, labels, batch_size, verbose)
    with Progress(len(subjects), what="models", title="Measured", verbose=verbose) as progress:
        for subject in subjects:
            subject.measure(counted.some)
            progress.advance()
    times: dict[str, Latency] = {}
    if latency:
        files = {subject.name: subject.content for subject in subjects if subject.content is not None}
        times = measure_latencies(files, data=counted.some, runs=runs, verbose=verbose)
    rows = tuple(_row(subject, counted, times.get(subject.name)) for subject in subjects)
    versions = {
        "keras_kd": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
    }
    samples = counted.scores[reference].samples
    return Comparison(rows, reference, counted.task, samples, curves, versions)


def _known(name: Any, models: Mapping[str, Any], argument: str) -> str:
    if name not in models:
        raise ValueError(f"`{argument}` must name one of the models: {', '.join(models)}. Received: {name!r}.")
    found: str = name
    return found


def _curves(name: str, value: Any) -> dict[str, tuple[float | None, ...]]:
    logged = getattr(value, "history", value)
    try:
        return {str(key): tuple(_scores.finite(float(one)) for one in curve) for key, curve in logged.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f'histories["{name}"] must be what `fit` returned, or a dict of lists of numbers. Received: {type(value).__name__}.'
        ) from error


def _checked_metrics(metrics: Any) -> dict[str, Any]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and callable(one) for name, one in metrics.items()):
        raise TypeError(
            "`metrics` must be a dict of metrics of Keras, or of functions of labels and outputs, by name. Received: "
            f"metrics={metrics!r}."
        )
    return dict(metrics)


def _own(metrics: dict[str, Any]) -> dict[str, Any]:
    """Copies of metrics that have a state."""
    return {
        name: type(one).from_config(one.get_config()) if isinstance(one, keras.metrics.Metric) else one
        for name, one in metrics.items()
    }


class _Pass:
    """One pass over the data with all models."""

    def __init__(self, subjects: list[Subject], reference: str, task: str, output: int, metrics: dict[str, Any]) -> None:
        self.subjects, self.reference, self.task, self.output = subjects, reference, task, output
        self.metrics = metrics
        self.scores = {one.name: _scores.Score(_own(metrics)) for one in subjects}
        self.spread = _scores.Spread()
        self.has_labels = False
        self.some: Any = None  # samples of the first batch

    def run(self, data: Any, labels: Any, batch_size: int, verbose: Verbose) -> None:
        """Counts."""
        total = _batching.count(data, labels)
        with Progress(total, what="samples", title="Outputs", verbose=verbose) as progress:
            for x, y, _ in _batching.batches(data, labels, size=batch_size, required=False):
                x = keras.tree.map_structure(np.asarray, x)
                found = {one.name: self._of(one, x) for one in self.subjects}
                if self.some is None:
                    self._begin(x, y, found[self.reference])
                self._add(found, y)
                progress.advance(len(found[self.reference]))

    def _of(self, subject: Subject, x: Any) -> np.ndarray:
        outputs = subject.outputs(x)
        if isinstance(self.output, bool) or not isinstance(self.output, int) or not 0 <= self.output < len(outputs):
            raise ValueError(
                f'`output` must be a number from 0 to {len(outputs) - 1}, the outputs of models["{subject.name}"]. Received: '
                f"output={self.output!r}."
            )
        return outputs[self.output]

    def _begin(self, x: Any, y: Any, outputs: np.ndarray) -> None:
        self.some = keras.tree.map_structure(lambda array: array[:256], x)
        self.has_labels = y is not None
        if self.metrics and not self.has_labels:
            raise ValueError(f"`metrics` need `labels`. Received: metrics={', '.join(self.metrics)}, without labels.")
        reference = next(one for one in self.subjects if one.name == self.reference)
        if self.task == "auto":
            labels = self._labels(y) if self.has_labels else None
            self.task = _scores.find_task(outputs, labels, reference.output_kind(self.output))
        for subject in self.subjects:
            kind = subject.output_kind(self.output)
            self.scores[subject.name].kind = kind

    def _labels(self, y: Any) -> np.ndarray:
        leaves = keras.tree.flatten(y)
        if len(leaves) > 1 and self.output >= len(leaves):
            raise ValueError(f"`labels` must have an entry for output {self.output}. Received: {len(leaves)} arrays.")
        labels = np.asarray(leaves[self.output if len(leaves) > 1 else 0])
        if labels.dtype.kind not in "biuf":
            raise TypeError(f"`labels` must hold numbers. Received: an array of {labels.dtype.name}.")
        return labels

    def _add(self, found: dict[str, np.ndarray], y: Any) -> None:
        base = found[self.reference]
        for name, outputs in found.items():
            if outputs.shape != base.shape:
                raise ValueError(
                    f'All models must give outputs of one shape. Received: models["{name}"] gives {outputs.shape}, the reference '
                    f'models["{self.reference}"] {base.shape}.'
                )
        labels = _scores.shaped_as(self._labels(y), base, self.task) if self.has_labels else None
        if self.task == _scores.NUMBERS:
            self.spread.add(base)
        kind = self.scores[self.reference].kind or _scores.find_kind(base, self.task)
        for name, outputs in found.items():
            self.scores[name].add(outputs, base, kind, labels, self.task)


def _row(subject: Subject, counted: _Pass, latency: Latency | None) -> ModelRow:
    score = counted.scores[subject.name]
    decides, is_reference = counted.task != _scores.NUMBERS, subject.name == counted.reference
    judged = decides and counted.has_labels
    paired = judged and score.is_one_each and not is_reference
    content = subject.content
    return ModelRow(
        name=subject.name,
        kind=subject.kind,
        accuracy=score.right / score.decisions if judged else None,
        accuracy_interval=_scores.wilson(score.right, score.decisions) if judged and score.is_one_each else None,
        loss=_scores.finite(score.loss / score.losses) if counted.has_labels else None,
        agreement=score.same / score.decisions if decides else _r2(score.squares, counted.spread.value),
        gained=score.gained if paired else None,
        lost=score.lost if paired else None,
        p_value=_scores.mcnemar(score.gained, score.lost) if paired else None,
        metrics={name: score.metric(name) for name in counted.metrics},
        parameters=subject.parameters,
        nonzero_parameters=subject.nonzero_parameters,
        bits=subject.bits,
        macs=subject.macs,
        size=None if content is None else len(content),
        gzip_size=None if content is None else len(gzip.compress(content, 9)),
        latency=None if latency is None else latency.median,
        latency_range=None if latency is None else (latency.low, latency.high),
        layers=subject.layers,
        notes=tuple(subject.notes),
        sha256=None if content is None else _files.digest(content),
    )


def _r2(squares: float, spread: float) -> float | None:
    return _scores.finite(1 - squares / spread) if spread > 0 else None
