"""How does one remove channels? A new model without them, and, with data, the work of the removed ones done by the kept ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from keras_kd._progress import Verbose, check_verbose
from keras_kd.surgery import _analysis, _heads, _side_by_side
from keras_kd.surgery._analysis import Analysis
from keras_kd.surgery._rebuild import Rebuilt
from keras_kd.surgery._refit import Refit, refit
from keras_kd.surgery._reports import Report


@dataclasses.dataclass(frozen=True)
class SurgeryReport(Report):
    """What `remove_channels` did.

    Attributes:
        kept: for each layer of the old model through which channels pass, the indices of its output's channels that are still
            there, in order: channel i of the new layer is channel `kept[layer][i]` of the old one. Heads of "attention" are under
            "attention:heads".
        removed: for each layer that lost channels, their indices in the old layer's output; those that were asked for and those
            that are tied to them. Heads as in `kept`.
        parameters: number of weights before.
        parameters_after: and after.
        refits: with data, what was done with the weights of each layer that read removed channels.
        not_refitted: layers that read removed channels and keep slices of their old weights, and why.
    """

    kept: dict[str, np.ndarray]
    removed: dict[str, np.ndarray]
    parameters: int
    parameters_after: int
    refits: tuple[Refit, ...] = ()
    not_refitted: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        lost, fitted = table.Table(box=None, pad_edge=False), table.Table(box=None, pad_edge=False)
        for made, headings in (
            (lost, ("layer", "channels", "kept")),
            (fitted, ("refitted", "error before", "error after", "rows")),
        ):
            for heading in headings:
                made.add_column(heading, justify="left" if heading == headings[0] else "right")
        for name, gone in self.removed.items():
            lost.add_row(name, str(len(gone) + len(self.kept[name])), str(len(self.kept[name])))
        for one in self.refits:
            fitted.add_row(one.layer, f"{one.error_before:.2g}", f"{one.error_after:.2g}", f"{one.rows:,}")
        console = Console(width=140, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(lost)
            if self.refits:
                console.print(fitted)
            for layer, reason in self.not_refitted.items():
                console.print(f"not refitted: {layer}: {reason}", highlight=False, markup=False)
            console.print(f"weights {self.parameters:,} -> {self.parameters_after:,}", highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


Removals = Mapping[str, Any]


@overload
def remove_channels(
    model: Any, channels: Removals, *, data: Any = None, verbose: Verbose = "auto", return_report: Literal[False] = False
) -> keras.Model: ...


@overload
def remove_channels(
    model: Any, channels: Removals, *, data: Any = None, verbose: Verbose = "auto", return_report: Literal[True]
) -> tuple[keras.Model, SurgeryReport]: ...


def remove_channels(
    model: Any, channels: Removals, *, data: Any = None, verbose: Verbose = "auto", return_report: bool = False
) -> Any:
    """Removes channels from layers, and heads from attention, with all that is tied to them: a new, smaller model.

    Without data the kept weights stay as they are: what the layers read of a removed channel counts as 0 from then on. With data
    the layers that read removed channels are fitted, one after the other, to what they gave before:

    ```
    min over W, b of  sum_i |z_i - W' a_i - b|^2 + l2 |W - W_old|^2
    ```

    with z the old network's values before the layer's activation, and a what the layer reads in the new network: the kept channels,
    for a convolution in its whole window with the zeros beyond the border. Where the removed channels are linear combinations of
    the kept ones, or 0, nothing changes. What is constant but not 0 goes into the bias, or into the batch normalisation that
    follows a layer without one; this is exact but for borders that are padded with zeros. The penalty is chosen on a quarter of the
    samples, and the old weights stay where no fit is better there. All of this needs no labels and no gradients.

    Fitted are Dense, EinsumDense with equations like `"abc,cde->abde"`, convolutions, the pointwise half of separable ones, the
    projections of attention with heads, and what recurrent layers read of their inputs. Where heads go, z is what attention gives,
    and a is what the kept heads give to its output projection. Transposed convolutions are fitted
    position by position, without their bias. Layers that are used several times are fitted on all their uses, on what the old
    network gives them.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        channels: for names of layers, such as `"conv1"` or `"backbone/conv1"`, which channels of their output shall go: indices, or
            a boolean mask that is True for them. Those that are tied to them (`find_groups`) go, too. For attention with heads the
            indices are those of heads, or, where only these can go, of channels of its output; where both can,
            `"attention:heads"` and `"attention:output"` say which.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`, such as a `tf.data.Dataset`; some
            hundreds to thousands of samples. What both networks hold of them at a time takes at most about 1 GB: further samples
            are not read.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `SurgeryReport`, too.

    Returns:
        The new model, not compiled: its layers have the names, types, `trainable` flags and dtype policies of the old ones; nested
        models stay nested. A graph of a class of one's own becomes a plain `keras.Model`. With `return_report=True` a tuple of it
        and the report.

    Raises:
        TypeError: if `model` is no Keras model, or `channels` no dict.
        ValueError: for subclassed and unbuilt models; for names that fit no layer, indices out of range, channels that must stay
            (the message says why), layers left without any channel, and data of other shapes or with NaN.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(6, activation="relu", name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    >>> data = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> smaller, report = keras_kd.surgery.remove_channels(model, {"hidden": [0, 3]}, data=data, verbose=0, return_report=True)
    >>> smaller.get_layer("hidden").units, report.kept["hidden"].tolist()
    (4, [1, 2, 4, 5])
    >>> report.refits[0].error_after <= report.refits[0].error_before
    True
    >>> tokens = keras.Input((5, 8))
    >>> x = keras.layers.MultiHeadAttention(4, 2, name="attention")(tokens, tokens)
    >>> model = keras.Model(tokens, keras.layers.LayerNormalization()(x))
    >>> keras_kd.surgery.remove_channels(model, {"attention": [1]}).get_layer("attention").num_heads
    3

    Reference:
        He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017; Luo, Wu, Lin: ThiNet, 2017.
    """
    check_verbose(verbose)
    model = _analysis.checked(model)
    found = _analysis.analyse(model)
    gone = chosen(found, channels)
    stream = None if data is None else _side_by_side.checked_batches(model, data)
    rebuilt = Rebuilt(found, gone)
    refits, skipped = ([], {}) if stream is None else refit(rebuilt, stream, verbose)
    if not return_report:
        return rebuilt.model
    return rebuilt.model, report_of(rebuilt, refits, skipped)


def report_of(rebuilt: Rebuilt, refits: Sequence[Refit], skipped: Mapping[str, str]) -> SurgeryReport:
    """What is left, what went, and what was fitted."""
    found = rebuilt.found
    kept, removed = {}, {}
    for name, (_, channels) in found.places().items():
        keep = rebuilt.keep[channels]
        kept[name] = np.flatnonzero(keep)
        if not keep.all():
            removed[name] = np.flatnonzero(~keep)
    return SurgeryReport(kept, removed, found.model.count_params(), rebuilt.model.count_params(), tuple(refits), dict(skipped))


def chosen(found: Analysis, channels: Removals) -> set[int]:
    """Roots of the channels that a user named.

    Raises:
        TypeError: if `channels` is no dict.
        ValueError: for layers and indices that are not there, channels that must stay, and layers left without any.
    """
    if not isinstance(channels, Mapping):
        raise TypeError(
            "`channels` must be a dict from names of layers to indices or boolean masks. Received: "
            f"channels={channels!r} of type {type(channels).__name__}."
        )
    places = found.places()
    gone: set[int] = set()
    for name, wanted in channels.items():
        atoms = places[_meant(found, places, name)][1]
        indices = _indices(name, wanted, len(atoms))
        roots = found.roots[atoms[indices]]
        for index, root in zip(indices.tolist(), roots.tolist(), strict=True):
            if root in found.pinned:
                raise ValueError(
                    f'Channel {index} of "{name}" must stay: {found.pinned[root]}. Received: channels={{"{name}": ...}}. '
                    f"Layers that can lose channels: {_removable(found)}."
                )
        gone |= set(roots.tolist())
    _check_left(found, gone)
    return gone


def _removable(found: Analysis) -> str:
    names = [
        record.path
        for record in found.records.values()
        if any(root not in found.pinned for one in record.made.values() for root in found.roots[one].tolist())
    ]
    return ", ".join(names) or "none"


def _meant(found: Analysis, places: Mapping[str, Any], name: Any) -> str:
    """The place that a name means; of an attention layer its heads or its output, whichever can lose something.

    Raises:
        ValueError: for names that fit no place, or several.
    """
    asked = str(name).removesuffix(":output")
    paths = [record.path for record in found.records.values() if _heads.heads_of(record) is not None]
    several = [path for path in (*paths, *places) if path == asked] or [p for p in (*paths, *places) if p.split("/")[-1] == asked]
    if len(set(several)) != 1 or several[0] not in paths:
        return _resolved(found, places, name)
    path = several[0]
    if asked != name:
        return _resolved(found, places, path)
    both = [one for one in (_heads.place_of(path), path) if one in places]
    free = [one for one in both if not found.pinned.keys() >= set(found.roots[places[one][1]].tolist())]
    if len(free) > 1:
        raise ValueError(
            f'`channels` must say what of an attention layer goes. Received: "{name}", which may be "{name}:heads", or '
            f'"{name}:output" for channels of what it gives.'
        )
    return (free or both)[0]


def _resolved(found: Analysis, places: Mapping[str, Any], name: Any) -> str:
    """The place that a name means: its path, or the last part of one."""
    if name in places:
        return str(name)
    short = [place for place in places if place.split("/")[-1] == name]
    if len(short) == 1:
        return short[0]
    several = short or [place for place in places if place.rsplit(":", 1)[0] == name]
    if several:
        raise ValueError(f'`channels` must name one layer each. Received: "{name}", which may be {", ".join(several)}.')
    if name in found.unknown:
        raise ValueError(f'Nothing can be removed from "{name}": {found.unknown[name]}. Layers that can: {_removable(found)}.')
    known = any(record.path == name for record in found.records.values())
    told = f'"{name}" makes no channels, and none pass through it' if known else f'No layer "{name}" in the model'
    raise ValueError(f'{told}. Received: channels={{"{name}": ...}}. Layers that can lose channels: {_removable(found)}.')


def _indices(name: str, wanted: Any, width: int) -> np.ndarray:
    given = np.asarray(wanted)
    if given.dtype == bool:
        if given.shape != (width,):
            raise ValueError(f'A mask for "{name}" must have the shape ({width},). Received: shape {given.shape}.')
        return np.flatnonzero(given)
    if given.size == 0:
        return np.zeros(0, "int64")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(
            f'Channels of "{name}" must be a sequence of whole numbers, or a boolean mask. Received: {given.dtype} of shape '
            f"{given.shape}."
        )
    if given.min() < 0 or given.max() >= width:
        raise ValueError(f'Channels of "{name}" must be in [0, {width - 1}]. Received: {given.min()} to {given.max()}.')
    return np.unique(given)


def _check_left(found: Analysis, gone: set[int]) -> None:
    """No layer may be left without channels."""
    for record in found.records.values():
        for one in record.vectors():
            if gone.issuperset(found.roots[one].tolist()):
                raise ValueError(
                    f'Every layer must keep at least one channel. Received: channels that leave "{record.path}" without any of its '
                    f"{len(one)}."
                )
