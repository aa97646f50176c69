"""Model compression for Keras 3 on the TensorFlow backend, inside ordinary `model.fit`."""

# isort: off
from keras_kd import _backend  # noqa: F401  # first: says clearly when the backend is not TensorFlow

# isort: on
from keras_kd import (
    analysis,
    callbacks,
    export,
    layers,
    losses,
    metrics,
    profile,
    quantized,
    regularizers,
    report,
    schedules,
    surgery,
    teachers,
)
from keras_kd._tunable import Tunable
from keras_kd._version import __version__
from keras_kd.distiller import Distiller
from keras_kd.mutual import MutualDistiller
from keras_kd.recording import Recording, record_teacher

__all__ = [
    "Distiller",
    "MutualDistiller",
    "Recording",
    "Tunable",
    "__version__",
    "analysis",
    "callbacks",
    "export",
    "layers",
    "losses",
    "metrics",
    "profile",
    "quantized",
    "record_teacher",
    "regularizers",
    "report",
    "schedules",
    "surgery",
    "teachers",
]
