"""What can leave a network, what can be thinner, and what takes over the work? New, smaller models; nothing is changed in place."""

from keras_kd.surgery._refit import Refit
from keras_kd.surgery.applying import ApplyReport, StepResult, apply
from keras_kd.surgery.channels import SurgeryReport, remove_channels
from keras_kd.surgery.depth import LinearizeReport, RemovalReport, linearize, remove_layers
from keras_kd.surgery.graph import ChannelGraph, Group, Pin, find_groups
from keras_kd.surgery.low_rank import Factorization, FactorizationReport, factorize
from keras_kd.surgery.merging import MergeReport, fold_batch_norm, merge_linear
from keras_kd.surgery.pruning import PruningReport, prune_channels
from keras_kd.surgery.reconstruction import Reconstruction, reconstruct
from keras_kd.surgery.transfer import Transferred, TransferReport, kept_channels, transfer_weights

__all__ = [
    "ApplyReport",
    "ChannelGraph",
    "Factorization",
    "FactorizationReport",
    "Group",
    "LinearizeReport",
    "MergeReport",
    "Pin",
    "PruningReport",
    "Reconstruction",
    "Refit",
    "RemovalReport",
    "StepResult",
    "SurgeryReport",
    "TransferReport",
    "Transferred",
    "apply",
    "factorize",
    "find_groups",
    "fold_batch_norm",
    "kept_channels",
    "linearize",
    "merge_linear",
    "prune_channels",
    "reconstruct",
    "remove_channels",
    "remove_layers",
    "transfer_weights",
]
