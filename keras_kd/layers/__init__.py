"""Layers: adapters between the widths of a student and its teacher."""

from keras_kd.layers.projectors import Projector

__all__ = ["Projector"]
