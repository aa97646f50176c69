"""What does a network do, layer by layer? Linear probes."""

from keras_kd.analysis.probes import ProbeReport, ProbeRow, probe

__all__ = ["ProbeReport", "ProbeRow", "probe"]
