"""What can a network lose, layer by layer? Linear analysis, probes, sensitivity, and a plan from them."""

from keras_kd._moments import Moments
from keras_kd.analysis.linear import linear_analysis
from keras_kd.analysis.plans import Plan, Step, recommend
from keras_kd.analysis.probes import ProbeReport, ProbeRow, probe
from keras_kd.analysis.results import LayerAnalysis, LinearReport, Response
from keras_kd.analysis.sensitivity import Cell, SensitivityReport, sensitivity
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
    "Cell",
    "LayerAnalysis",
    "LinearReport",
    "Moments",
    "Plan",
    "ProbeReport",
    "ProbeRow",
    "RemovalOrder",
    "Response",
    "SensitivityReport",
    "Step",
    "dead_channels",
    "duplicate_channels",
    "effective_rank",
    "linear_analysis",
    "probe",
    "rank_at",
    "recommend",
    "redundancy",
    "removal_order",
    "sensitivity",
]
