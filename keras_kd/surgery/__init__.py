"""Which channels can leave a network, and what takes over their work? New, smaller Keras models; nothing is changed in place."""

from keras_kd.surgery._refit import Refit
from keras_kd.surgery.channels import SurgeryReport, remove_channels
from keras_kd.surgery.graph import ChannelGraph, Group, Pin, find_groups
from keras_kd.surgery.transfer import Transferred, TransferReport, kept_channels, transfer_weights

__all__ = [
    "ChannelGraph",
    "Group",
    "Pin",
    "Refit",
    "SurgeryReport",
    "TransferReport",
    "Transferred",
    "find_groups",
    "kept_channels",
    "remove_channels",
    "transfer_weights",
]
