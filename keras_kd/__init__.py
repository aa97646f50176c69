"""Model compression for Keras 3 on the TensorFlow backend, inside ordinary `model.fit`."""

# isort: off
from keras_kd import _backend  # noqa: F401  # first: says clearly when the backend is not TensorFlow

# isort: on
import importlib
from typing import TYPE_CHECKING, Any

from keras_kd import (
    callbacks,
    export,
    layers,
    losses,
    metrics,
    profile,
    quantized,
    regularizers,
    schedules,
    teachers,
)
from keras_kd._tunable import Tunable
from keras_kd._version import __version__
from keras_kd.distiller import Distiller
from keras_kd.mutual import MutualDistiller
from keras_kd.recording import Recording, record_teacher

if TYPE_CHECKING:
    from keras_kd import analysis, compression, report, surgery, tuner
    from keras_kd.compression import compress

__all__ = [
    "Distiller",
    "MutualDistiller",
    "Recording",
    "Tunable",
    "__version__",
    "analysis",
    "callbacks",
    "compress",
    "compression",
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
    "tuner",
]

_ON_DEMAND = ("analysis", "compression", "report", "surgery", "tuner")  # imported when first used: training needs none of them


if not TYPE_CHECKING:  # type checkers know all names from above, and with it would take any other for one

    def __getattr__(name: str) -> Any:
        if name in _ON_DEMAND:
            return importlib.import_module(f"keras_kd.{name}")
        if name == "compress":
            return importlib.import_module("keras_kd.compression").compress
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND, "compress"})
