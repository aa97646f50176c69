"""Which layers can be two thinner ones, what would these cost, and how are they made?"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.surgery import _nodes, _reading
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Replacement
from keras_kd.surgery._rules import letters
from keras_kd.surgery._splits import ChannelSplit, SpatialSplit, balanced

_L = keras.layers
_CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)
_LENGTH = 64  # of axes whose length is not known: only ratios of them matter
METHODS = ("channel", "spatial")


@dataclasses.dataclass(eq=False)
class Site:
    """A layer that can be two.

    Attributes:
        path: of the layer.
        layer: the layer.
        nodes: its calls in a pass; those inside nested models as often as these are called.
        inputs: number of the kernel's first axes that are read.
    """

    path: str
    layer: Any
    nodes: list[Any]
    inputs: int

    @functools.cached_property
    def kernel(self) -> np.ndarray:
        """`(columns, outputs)`."""
        values = np.asarray(ops.convert_to_numpy(self.layer.kernel), "float64")
        return values.reshape(math.prod(values.shape[: self.inputs]), -1)

    @functools.cached_property
    def bias(self) -> np.ndarray | None:
        """`(outputs,)`, or None."""
        bias = self.layer.bias
        return None if bias is None else np.asarray(ops.convert_to_numpy(bias), "float64").reshape(-1)

    @functools.cached_property
    def _splits(self) -> dict[str, ChannelSplit | SpatialSplit]:
        return {}

    def split(self, method: str) -> ChannelSplit | SpatialSplit:
        """The decomposition of its weights alone."""
        if method not in self._splits:
            self._splits[method] = ChannelSplit(self.kernel) if method == "channel" else SpatialSplit(self.kernel, self.shape)
        return self._splits[method]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return tuple(self.layer.kernel.shape)

    @property
    def methods(self) -> tuple[str, ...]:
        """How it can be factorized."""
        spatial = type(self.layer) is _L.Conv2D and min(self.layer.kernel_size) > 1
        return METHODS if spatial else METHODS[:1]

    @property
    def is_known(self) -> bool:
        """Whether its number of positions is known."""
        return all(None not in tensor.shape[1:] for node in self.nodes for tensor in (node.outputs[0], _source(node)))

    def limit(self, method: str) -> int:
        """The rank at which nothing is lost."""
        if method == "channel":
            return min(math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :]))
        height, width, channels, outputs = self.shape
        return min(height * channels, width * outputs)

    def parameters(self, method: str | None = None, rank: int = 0) -> int:
        """Weights of its kernel, or of two of a rank in its place."""
        columns, outputs = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])
        if method is None:
            return columns * outputs
        if method == "channel":
            return rank * (columns + outputs)
        height, width, channels, _ = self.shape
        return rank * (height * channels + width * outputs)

    def macs(self, method: str | None = None, rank: int = 0) -> int:
        """Multiply-accumulates of all its calls for a sample: positions times kernel."""
        positions = sum(math.prod(self._inner(node.outputs[0])) for node in self.nodes)
        if method != "spatial":
            return positions * self.parameters(method, rank)
        height, width, channels, outputs = self.shape
        first = sum(self._inner(node.outputs[0])[0] * self._inner(_source(node))[1] for node in self.nodes)
        return rank * (first * height * channels + positions * width * outputs)

    def saves(self, method: str, rank: int) -> bool:
        """Whether two of this rank have fewer multiply-accumulates and no more weights."""
        return self.macs(method, rank) < self.macs() and self.parameters(method, rank) <= self.parameters()

    def ranks(self, method: str) -> range:
        """Those that save."""
        most = next((rank for rank in range(self.limit(method), 0, -1) if self.saves(method, rank)), 0)
        return range(1, most + 1)

    def replacement(self, method: str, names: Sequence[str], factors: tuple[np.ndarray, np.ndarray]) -> Replacement:
        """Two layers with these factors and the old bias."""
        rank = factors[0].shape[-1]
        if isinstance(self.layer, _L.EinsumDense):
            changes = self._einsum(rank)
        elif isinstance(self.layer, _L.Dense):
            changes = {"units": rank}, {}
        elif method == "channel":
            ones = (1,) * len(self.layer.kernel_size)
            changes = {"filters": rank}, {"kernel_size": ones, "strides": ones, "dilation_rate": ones, "padding": "valid"}
        else:
            axes = ("kernel_size", "strides", "dilation_rate")
            changes = (
                {"filters": rank} | {key: (getattr(self.layer, key)[0], 1) for key in axes},
                {key: (1, getattr(self.layer, key)[1]) for key in axes},
            )
        made = [type(self.layer).from_config(self._config(name, change)) for name, change in zip(names, changes, strict=True)]
        return Replacement(made, self.weights(method, factors, self.bias))

    def weights(self, method: str, factors: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None) -> list[list[np.ndarray]]:
        """What the two layers' `set_weights` takes."""
        first, second = balanced(*factors, 0 if method == "channel" else 1)
        if method == "channel":
            first = first.reshape(*self.shape[: self.inputs], -1)
            ones = (1,) * len(getattr(self.layer, "kernel_size", ()))
            second = second.reshape(*ones, -1, *self.shape[self.inputs :])
        else:
            first, second = first[:, None], second[None]
        return [[first], [second] if bias is None else [second, bias.reshape(self.layer.bias.shape)]]

    def _config(self, name: str, change: dict[str, Any]) -> dict[str, Any]:
        """Configuration of one of the two: the first has neither bias nor activation."""
        config = self.layer.get_config() | {"name": name, "kernel_constraint": None, "kernel_initializer": "glorot_uniform"}
        config["activation"] = self.layer.activation  # a function of one's own need not be registered
        if "filters" in change or "units" in change or change.get("bias_axes", "") is None:
            config |= {"activation": None, "activity_regularizer": None, "bias_regularizer": None, "bias_constraint": None}
            config |= {} if "bias_axes" in change else {"use_bias": False}
        return config | change

    def _einsum(self, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        given = self.nodes[0].outputs[0].shape
        read, weights, wanted = letters(self.layer.equation, len(_source(self.nodes[0]).shape))
        beside, summed = read[: len(read) - self.inputs], read[len(read) - self.inputs :]
        between = next(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in read + weights)
        made = weights[self.inputs :]
        first = {"equation": f"{read},{summed}{between}->{beside}{between}", "output_shape": (*given[1 : len(beside)], rank)}
        second = {"equation": f"{beside}{between},{between}{made}->{wanted}", "output_shape": tuple(given[1:])}
        return first | {"bias_axes": None}, second | {"bias_axes": None if self.bias is None else made}

    def _inner(self, tensor: Any) -> list[int]:
        """Lengths of the axes that positions are counted along."""
        if isinstance(self.layer, _L.EinsumDense):
            lengths = tensor.shape[1 : 1 + len(tensor.shape) - 1 - (len(self.shape) - self.inputs)]
        elif getattr(self.layer, "data_format", "channels_last") == "channels_first":
            lengths = tensor.shape[2:]
        else:
            lengths = tensor.shape[1:-1]
        return [_LENGTH if n is None else n for n in lengths]


def _source(node: Any) -> Any:
    return node.arguments.keras_tensors[0]


def sites_of(found: Analysis) -> tuple[dict[str, Site], dict[str, str]]:
    """The layers of a model that can be two, and why others with a kernel cannot, by path."""
    nodes: dict[int, list[Any]] = {}
    for node in _nodes.calls_of(found.model):
        nodes.setdefault(id(node.operation), []).append(node)
    sites, left = {}, {}
    for record in found.records.values():
        layer = record.operation
        if not any(len(variable.shape) > 1 for variable in getattr(layer, "variables", ())) or _nodes.is_open(layer):
            continue
        inputs = _inputs_of(layer, nodes[id(layer)])
        if isinstance(inputs, str):
            left[record.path] = inputs
        else:
            sites[record.path] = Site(record.path, layer, nodes[id(layer)], inputs)
    return sites, left


def _inputs_of(layer: Any, nodes: list[Any]) -> int | str:
    """How many axes of a layer's kernel are read, or why it stays."""
    if type(layer) not in (_L.Dense, _L.EinsumDense, *_CONVOLUTIONS):
        return f"there is no factorization for {type(layer).__name__}"
    if getattr(layer, "groups", 1) != 1:
        return f"it has {layer.groups} groups"
    if isinstance(layer.activation, keras.layers.Layer):
        return "its activation is a layer, which may have weights"  # Keras builds it when numbers come, not with the graph
    if len(layer.weights) != 1 + (layer.bias is not None) or getattr(layer, "quantization_mode", None):
        return "it has other variables than a kernel and a bias"
    if isinstance(layer, _L.EinsumDense):
        ranks = {len(_source(node).shape) for node in nodes}
        return _reading.summed_axes(layer, ranks.pop()) if len(ranks) == 1 else "its calls read tensors of several ranks"
    return len(layer.kernel.shape) - 1
