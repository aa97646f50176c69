"""What can leave a network, what can be thinner, and what takes over the work? New, smaller models; nothing is changed in place."""

from keras_kd.surgery._refit import Refit
from keras_kd.surgery.channels import SurgeryReport, remove_channels
from keras_kd.surgery.graph import ChannelGraph, Group, Pin, find_groups
from keras_kd.surgery.low_rank import Factorization, FactorizationReport, factorize
from keras_kd.surgery.transfer import Transferred, TransferReport, kept_channels, transfer_weights

__all__ = [
    "ChannelGraph",
    "Factorization",
    "FactorizationReport",
    "Group",
    "Pin",
    "Refit",
    "SurgeryReport",
    "TransferReport",
    "Transferred",
    "factorize",
    "find_groups",
    "kept_channels",
    "remove_channels",
    "transfer_weights",
]
