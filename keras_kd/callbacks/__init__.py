"""What can be changed while `fit` runs? Callbacks for a Distiller or a plain Keras model."""

from keras_kd.callbacks.checkpoint import SparseCheckpoint
from keras_kd.callbacks.clustering import Clustering
from keras_kd.callbacks.pruning import KeepSparsity, Pruning
from keras_kd.callbacks.quantization import Quantization
from keras_kd.callbacks.schedules import AnnealTemperature, AnnealWeight, ScheduledValue

__all__ = [
    "AnnealTemperature",
    "AnnealWeight",
    "Clustering",
    "KeepSparsity",
    "Pruning",
    "Quantization",
    "ScheduledValue",
    "SparseCheckpoint",
]
