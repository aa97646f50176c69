"""What can a network lose, layer by layer? Linear probes, and the statistics of redundancy and rank."""

from keras_kd._moments import Moments
from keras_kd.analysis.probes import ProbeReport, ProbeRow, probe
from keras_kd.analysis.statistics import (
    RemovalOrder,
    dead_channels,
    duplicate_channels,
    effective_rank,
    rank_at,
    redundancy,
    removal_order,
)

__all__ = [
    "Moments",
    "ProbeReport",
    "ProbeRow",
    "RemovalOrder",
    "dead_channels",
    "duplicate_channels",
    "effective_rank",
    "probe",
    "rank_at",
    "redundancy",
    "removal_order",
]
