"""How much of each compression does a network bear? Channels, rank, sparsity and bits as one search space, with distillation."""

import collections
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras_tuner.errors import FailedTrialError, FatalTypeError, FatalValueError

from keras_kd import _batching, surgery
from keras_kd.surgery import _analysis, _side_by_side, reconstruction
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.tuner.hypermodels import KEYS, DistillationHyperModel

_STEPS = ("channels", "rank")


class CompressionHyperModel(DistillationHyperModel):
    """A search space of compression: the student is what is left of a trained model, fine-tuned by what the model says itself.

    A trial goes the whole road, and each step is fixed or searched, by `search` as in `DistillationHyperModel`. It is merged into
    the defaults:

    - `"channels"`: [1.0, 0.7, 0.5, 0.35, 0.25], the share of the multiply-accumulates that `surgery.prune_channels` leaves; 1 or
      None is no surgery;
    - `"rank"`: [1.0, 0.7, 0.5], the share of the rest that `surgery.factorize` leaves of that;
    - `"sparsity"`: [0.0, 0.5], by `Pruning`. It makes no LiteRT file of integers smaller, but the download: "gzip_bytes";
    - `"num_bits"`: 8, by `Quantization`; 32 is none;
    - `"temperature"`: 4.0, `"student_loss_weight"`: 0.3, `"learning_rate"`: (3e-4, 3e-3), of the distillation;

    and what else a `DistillationHyperModel` knows. So 0.5 and 0.5 are a quarter of the multiply-accumulates.

    Surgery is made once for each combination of the shares, when the first trial needs it, and is the same in all processes that
    have the same data: a worker makes its own, and so does a process that loads a trial. Every `build` begins with a new copy of
    its weights. Copies know which channels of `model` they have, so feature losses between layers of one name compare these, as
    long as `model` is the teacher.

    A trial whose shares cannot be reached fails, and the search goes on; where they are fixed, it ends.

    Args:
        model: a built Functional or Sequential model, trained; for a Distiller, its student. It is not changed.
        teacher: as in `DistillationHyperModel`. None is `model` itself.
        data: calibration inputs of the surgery, nested as the model takes them, or batches `x` or `(x, y)`; some hundreds to
            thousands of samples, without labels, of which as many are kept as fit into about 1 GB.
        search: what is searched, see above.
        reconstruct: whether what surgery leaves is fitted to what the model gave: as in `surgery.prune_channels`. What is
            factorized is fitted together by the same rule.
        surgery_options: more arguments of `surgery.prune_channels`, such as `{"round_to": 8}` or `{"criterion": "magnitude"}`.
        max_kept: how many results of surgery are kept in memory. The least recently used one goes first, and is made again when
            it is needed.
        **options: of `DistillationHyperModel`: losses, loss, metrics, optimizer, compile_options, score, teacher_preprocessing,
            record, record_options, name, tunable.

    Raises:
        TypeError: if `model` is no Keras model, and as `DistillationHyperModel`.
        ValueError: for subclassed and unbuilt models; for data of other shapes or with NaN, and iterators, which can be read once
            only; if `search` or `surgery_options` has a name that nothing is known of; for a share, fixed or of a list, that is
            not above 0, up to 1.

    Example:

    >>> import keras_tuner
    >>> hidden = keras.layers.Dense(16, activation="relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3)])
    >>> data = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> hypermodel = keras_kd.tuner.CompressionHyperModel(
    ...     model, data=data, search={"channels": [0.5, 1.0], "rank": None, "sparsity": None})
    >>> distiller = hypermodel.build(keras_tuner.HyperParameters())
    >>> distiller.student.get_layer("hidden").units, distiller.teacher is model
    (8, True)

    Reference:
        Bucila, Caruana, Niculescu-Mizil: Model compression, 2006; He, Lin, Liu, Wang, Li, Han: AMC: AutoML for Model Compression
        and Acceleration on Mobile Devices, 2018 (the search over how much each step takes).
    """

    known: ClassVar[tuple[str, ...]] = (*_STEPS, *KEYS)
    default_search: ClassVar[Mapping[str, Any]] = {
        "channels": [1.0, 0.7, 0.5, 0.35, 0.25],
        "rank": [1.0, 0.7, 0.5],
        "sparsity": [0.0, 0.5],
        "num_bits": 8,
        "temperature": 4.0,
        "student_loss_weight": 0.3,
        "learning_rate": (3e-4, 3e-3),
    }
    _hint_for_unknown = ""

    def __init__(
        self,
        model: keras.Model,
        teacher: Any = None,
        *,
        data: Any,
        search: Mapping[str, Any] | None = None,
        reconstruct: bool | str = True,
        surgery_options: Mapping[str, Any] | None = None,
        max_kept: int = 16,
        **options: Any,
    ) -> None:
        self.model = _analysis.checked(model)
        super().__init__(self._cut, self.model if teacher is None else teacher, search=search, **options)
        if isinstance(max_kept, bool) or not isinstance(max_kept, int) or max_kept < 1:
            raise ValueError(f"`max_kept` must be a whole number of at least 1. Received: max_kept={max_kept!r}.")
        if reconstruct not in (True, False, "layers", "together"):
            raise ValueError(f'`reconstruct` must be True, False, "layers" or "together". Received: reconstruct={reconstruct!r}.')
        self.surgery_options = _checked_options(surgery_options)
        for name in _STEPS:
            spec = self.search.get(name)
            for value in spec if isinstance(spec, list | tuple) else () if callable(spec) else (spec,):
                _share(name, value)
        self.reconstruct = reconstruct
        self.max_kept = max_kept
        self.data = _calibration(self.model, data)
        self._kept: collections.OrderedDict[tuple[float, float], Any] = collections.OrderedDict()

    def compressed(self, channels: float | None = None, rank: float | None = None) -> keras.Model:
        """A new model: what surgery leaves of the model, not trained and not rounded. With neither share, a copy.

        Args:
            channels: share of the multiply-accumulates that fewer channels leave, above 0, up to 1; None is 1.
            rank: share of the rest that thinner layers leave.

        Raises:
            TypeError: for a share that is no number.
            ValueError: for one that is out of range, or that cannot be reached.
        """
        return Rebuilt(self._analysed(_share("channels", channels), _share("rank", rank)), set()).model

    def _cut(self, hp: Any) -> keras.Model:
        """The student of a trial."""
        channels, rank = (_share(name, self.value(hp, name), error=(FatalTypeError, FatalValueError)) for name in _STEPS)
        try:
            return self.compressed(channels, rank)
        except ValueError as error:
            fixed = not any(isinstance(self.search.get(name), list | tuple) or callable(self.search.get(name)) for name in _STEPS)
            told = f"Surgery fails for channels={channels!r}, rank={rank!r}: {error}"
            raise (FatalValueError if fixed else FailedTrialError)(told) from error

    def _analysed(self, channels: float, rank: float) -> Any:
        """Analysis of what surgery leaves, made once."""
        key = channels, rank
        if key not in self._kept:
            self._kept[key] = _analysis.analyse(self._operated(channels, rank))
            while len(self._kept) > self.max_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _operated(self, channels: float, rank: float) -> keras.Model:
        if rank < 1:
            whole = self._analysed(channels, 1.0).model
            thin = surgery.factorize(whole, macs=rank, data=self.data, verbose=0)
            held = [x for x, _ in _side_by_side.samples_of(self.model, self.data, None)]
            reconstruction.fit_where_it_pays(thin, self.model, held, self.reconstruct)
            return thin
        if channels < 1:
            options = {"verbose": 0, "data": self.data, "reconstruct": self.reconstruct} | self.surgery_options
            return surgery.prune_channels(self.model, macs=channels, **options)
        return self.model


def _share(name: str, given: Any, error: tuple[Any, Any] = (TypeError, ValueError)) -> float:
    """A share above 0, up to 1; None is 1."""
    if given is None:
        return 1.0
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise error[0](f"`{name}` must be a share, a number. Received: {name}={given!r} of type {type(given).__name__}.")
    share = float(given)
    if not 0 < share <= 1:  # nor NaN
        raise error[1](f"`{name}` must be a share above 0, up to 1. Received: {name}={given!r}. 1 leaves the step out.")
    return share


def _checked_options(given: Any) -> dict[str, Any]:
    allowed = ("criterion", "scope", "round_to", "min_channels")
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"`surgery_options` must be a dict. Received: surgery_options={given!r} of type {type(given).__name__}.")
    if unknown := [name for name in given or {} if name not in allowed]:
        raise ValueError(f"`surgery_options` knows {', '.join(allowed)}. Received: {', '.join(map(str, unknown))}.")
    return dict(given or {})


def _calibration(model: keras.Model, data: Any) -> Any:
    """Inputs as arrays, nested flat: as many samples as surgery can hold."""
    data = _batching.as_arrays(data)
    if data is None or isinstance(data, str):
        raise TypeError(f"`data` must be inputs of the model, or batches of them. Received: data={data!r}.")
    if not hasattr(data, "__len__") and hasattr(data, "__iter__") and iter(data) is data:
        raise ValueError(
            "`data` must be arrays, or batches that can be read again, such as a tf.data.Dataset. Received: an iterator."
        )
    batches = [x for x, _ in _side_by_side.samples_of(model, data, None)]
    flat = [np.concatenate([np.asarray(batch[index]) for batch in batches]) for index in range(len(batches[0]))]
    return flat[0] if len(flat) == 1 else flat
