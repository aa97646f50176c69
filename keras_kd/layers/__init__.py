"""Layers: adapters between the widths of a student and its teacher, and linear probes."""

from keras_kd.layers.linear_probe import LinearProbe
from keras_kd.layers.projectors import Projector

__all__ = ["LinearProbe", "Projector"]
