"""A model and a limit: what is the best file within it? The automatic road, by measurement."""

from keras_kd.compression.automatic import compress
from keras_kd.compression.results import Attempt, Compression

__all__ = ["Attempt", "Compression", "compress"]
