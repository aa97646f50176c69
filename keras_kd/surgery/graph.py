"""Which channels of a network belong together, and which must stay?"""

import dataclasses
import os
from typing import Any

import numpy as np

from keras_kd.surgery import _analysis, _heads
from keras_kd.surgery._analysis import Analysis


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels, or heads of attention, that can be removed one by one, each together with what is tied to it.

    Attributes:
        channels: their number.
        makers: paths of the layers that make them: removing one makes each of these narrower.
        carriers: paths of layers between with weights for each of them, such as normalisation and depthwise convolution.
        readers: paths of the layers that read them with a kernel, which becomes smaller.
        members: for each layer through which they pass, `(channels, n)`: which channels of its output each one is. n is above 1
            where one becomes several (a Flatten after images) or several are tied. Heads of "attention" are under
            "attention:heads".
        axis: `"channels"`, or `"heads"`.
        width: of heads, how many channels each of them gives to the output projection; 1 for channels.
    """

    channels: int
    makers: tuple[str, ...]
    carriers: tuple[str, ...]
    readers: tuple[str, ...]
    members: dict[str, np.ndarray]
    axis: str = "channels"
    width: int = 1


@dataclasses.dataclass(frozen=True)
class Pin:
    """Channels, or heads of attention, that must stay.

    Attributes:
        layer: path of the layer that makes them; of heads, with `:heads`.
        channels: their indices in its output.
        reason: why.
    """

    layer: str
    channels: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class ChannelGraph:
    """What `find_groups` found.

    Attributes:
        groups: channels that can go, by the layers that make them.
        pinned: channels that must stay, by the layer that makes them.
        unknown: layers that surgery does not know, by path, and the reason; what they read and give stays.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pin, ...]
    unknown: dict[str, str]

    def group_of(self, layer: str) -> Group:
        """The first group whose channels a layer makes, or hands on; of attention, its heads.

        Args:
            layer: its path; with `:heads` or `:output` what of an attention layer is meant.

        Raises:
            ValueError: if none of its channels can go; the message says why.
        """
        if layer.endswith(":output"):
            layer, found = layer.removesuffix(":output"), [group for group in self.groups if group.axis == "channels"]
        else:
            found = list(self.groups)
        for where in ("makers", "members"):
            for group in found:
                if layer in getattr(group, where):
                    return group
        reason = next((pin.reason for pin in self.pinned if pin.layer == layer), "")
        known = ", ".join(dict.fromkeys(name for group in self.groups for name in group.makers))
        told = f"its channels stay: {reason}" if reason else "it has no channels"
        raise ValueError(f'Nothing can be removed from "{layer}": {told}. Layers that can lose channels: {known or "none"}.')

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layers that make them", "channels", "carried by", "read by"):
            made.add_column(heading, justify="right" if heading == "channels" else "left", overflow="fold")
        for group in self.groups:
            count = f"{group.channels:,}" + " heads" * (group.axis == "heads")
            made.add_row(_shortened(group.makers), count, _shortened(group.carriers), _shortened(group.readers))
        console = Console(width=160, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            for pin in self.pinned:
                what = "heads" if pin.layer.endswith(":heads") else "channels"
                console.print(f"stays: {pin.layer} ({len(pin.channels)} {what}): {pin.reason}", highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a PNG to `path`: for each layer that makes channels, how many can go and with which layers they are tied."""
        from keras_kd.surgery import pictures

        pictures.draw(self, path)


def find_groups(model: Any) -> ChannelGraph:
    r"""Finds the channels of a model that go together, and those that must stay.

    A channel is followed from the layer that makes it through everything that hands it on: normalisation, activations, pooling,
    sums and products (which tie channels of several layers), concatenation, reshaping (which makes one channel many features) up
    to the kernels that read it. Nested models are entered; a layer that is used several times has the same channels in all its
    calls. The heads of an attention layer are a group of their own. What a layer does that is not one of Keras' own is never
    guessed: its channels stay, and it is listed.

    Args:
        model: a built Functional or Sequential model; for a Distiller, its student.

    Returns:
        A `ChannelGraph`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, or a subclassed model, whose graph nobody can see.

    Example:

    >>> inputs = keras.Input((8, 8, 3))
    >>> x = keras.layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    >>> y = keras.layers.Conv2D(6, 3, padding="same", name="branch")(keras.layers.ReLU()(x))
    >>> x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([x, y]))
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    >>> graph = keras_kd.surgery.find_groups(model)
    >>> graph.groups[0].makers, graph.groups[0].channels, graph.groups[0].readers
    (('stem', 'branch'), 6, ('branch', 'head'))
    >>> graph.pinned[0].layer, graph.pinned[0].reason
    ('head', '"head" gives the model\'s output')

    Reference:
        Fang et al.: DepGraph: Towards Any Structural Pruning, 2023.
    """
    return describe(_analysis.analyse(_analysis.checked(model)))


def describe(found: Analysis) -> ChannelGraph:
    """The groups of an analysis."""
    pins = []
    for record in found.records.values():
        heads = _heads.heads_of(record)
        others = [root for one in record.made.values() if one is not heads for root in found.roots[one].tolist()]
        for name, roots in ((_heads.place_of(record.path), found.rooted(heads).tolist()), (record.path, others)):
            reasons: dict[str, list[int]] = {}
            for index, root in enumerate(roots):
                if root in found.pinned:
                    reasons.setdefault(found.pinned[root], []).append(index)
            pins += [Pin(name, tuple(indices), reason) for reason, indices in reasons.items()]
    return ChannelGraph(tuple(group for group, _ in groups_of(found)), tuple(pins), dict(found.unknown))


def groups_of(found: Analysis) -> list[tuple[Group, np.ndarray]]:
    """The groups of an analysis, and for each of their channels the root that stands for it."""
    places = {name: found.roots[channels] for name, (_, channels) in found.places().items()}
    made = [root for record in found.records.values() for one in record.made.values() for root in found.roots[one].tolist()]
    roles = _roles(found)
    occurrences: dict[int, list[tuple[str, int]]] = {}
    for name, roots in places.items():
        for root, count in zip(*(x.tolist() for x in np.unique(roots, return_counts=True)), strict=True):
            occurrences.setdefault(root, []).append((name, count))
    families: dict[Any, list[int]] = {}
    for root in dict.fromkeys(made):
        if root not in found.pinned:
            families.setdefault((tuple(occurrences.get(root, ())), *(roles[role].get(root, ()) for role in roles)), []).append(root)
    widths = _widths(found)
    groups = []
    for (where, makers, carriers, readers), members in families.items():
        table = {name: _indices(places[name], members, count) for name, count in where}
        kind = ("heads", widths[members[0]]) if members[0] in widths else ("channels", 1)
        groups.append((Group(len(members), makers, carriers, readers, table, *kind), np.asarray(members)))
    return groups


def _widths(found: Analysis) -> dict[int, int]:
    """For the roots of heads, how many channels each of them gives."""
    widths = {}
    for record in found.records.values():
        roots, counts = np.unique(found.rooted(_heads.heads_of(record)), return_counts=True)
        for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
            widths[root] = int(count * record.operation._output_dense.kernel.shape[1])
    return widths


def _roles(found: Analysis) -> dict[str, dict[int, tuple[str, ...]]]:
    """For each root, paths of the layers that make, carry and read it."""
    roles: dict[str, dict[int, tuple[str, ...]]] = {"makers": {}, "carriers": {}, "readers": {}}
    for record in found.records.values():
        made = _roots_in(found, record.made.values())
        given = _roots_in(found, [one for labels in record.outputs for one in labels])
        for root in made:
            roles["makers"][root] = (*roles["makers"].get(root, ()), record.path)
        for axes in record.weights.values():
            read, last = _roots_in(found, axes[:-1]), _roots_in(found, axes[-1:])
            for root in read | last:
                reads = len(axes) > 1 and (root not in given or (root in made and root in read and root in last))
                role = "readers" if reads else "carriers"
                if (reads or root not in made) and record.path not in roles[role].get(root, ()):
                    roles[role][root] = (*roles[role].get(root, ()), record.path)
    return roles


def _roots_in(found: Analysis, vectors: Any) -> set[int]:
    return {root for one in vectors if one is not None for root in found.roots[one].tolist()}


def _indices(roots: np.ndarray, members: list[int], count: int) -> np.ndarray:
    """Where each member stands, `(members, count)`."""
    order = np.argsort(roots, kind="stable")
    starts = np.searchsorted(roots[order], members)
    return np.sort(order[starts[:, None] + np.arange(count)], axis=1)


def _shortened(names: tuple[str, ...], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
