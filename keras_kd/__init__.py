"""Model compression for Keras 3 on the TensorFlow backend, inside ordinary `model.fit`."""

# isort: off
from keras_kd import _backend  # noqa: F401  # first: says clearly when the backend is not TensorFlow

# isort: on
from keras_kd import export, losses, profile, report, teachers
from keras_kd._tunable import Tunable
from keras_kd._version import __version__
from keras_kd.distiller import Distiller

__all__ = ["Distiller", "Tunable", "__version__", "export", "losses", "profile", "report", "teachers"]
