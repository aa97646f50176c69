"""Which layers compute together what one could? Consecutive linear maps as one, exactly."""

import dataclasses
from typing import Any, Literal, overload

import keras

from keras_kd.surgery import _analysis, _costs, _pairs, _places
from keras_kd.surgery._places import Graph
from keras_kd.surgery._rebuild import Rebuilt, Replacement
from keras_kd.surgery._reports import Report


@dataclasses.dataclass(frozen=True)
class MergeReport(Report):
    """What `merge_linear` or `fold_batch_norm` did.

    Attributes:
        merged: for each new layer that stands for several, the paths of these, in order.
        kept: batch normalisations, and pairs of linear layers, that stay as they are, and why: by the path of the last of them.
        macs: multiply-accumulates of a sample before; None where the lengths of the inputs are not known.
        macs_after: and after.
        parameters: number of weights before.
        parameters_after: and after.
    """

    merged: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    macs: int | None
    macs_after: int | None
    parameters: int
    parameters_after: int

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("layer", "stands for"):
            made.add_column(heading, overflow="fold")
        for name, layers in self.merged.items():
            made.add_row(name, ", ".join(layers))
        console = Console(width=140, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
            for layer, reason in self.kept.items():
                console.print(f"kept: {layer}: {reason}", highlight=False, markup=False)
            console.print(told_costs(self), highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def told_costs(report: Any) -> str:
    """What a report says of costs before and after."""
    macs = ["unknown" if number is None else f"{number:,}" for number in (report.macs, report.macs_after)]
    return f"MACs {' -> '.join(macs)}, weights {report.parameters:,} -> {report.parameters_after:,}"


@overload
def fold_batch_norm(model: Any, *, return_report: Literal[False] = False) -> keras.Model: ...


@overload
def fold_batch_norm(model: Any, *, return_report: Literal[True]) -> tuple[keras.Model, MergeReport]: ...


def fold_batch_norm(model: Any, *, return_report: bool = False) -> Any:
    """Folds batch normalisation into the layer before it: a new model without it, which gives the same in inference.

    ```
    gamma (w x + b - mean) / sqrt(var + eps) + beta = (w s) x + (b - mean) s + beta,    s = gamma / sqrt(var + eps)
    ```

    Folded is what alone reads the output of a Dense, EinsumDense or convolutional layer (depthwise, separable and transposed ones
    too) that has no activation; that layer gets a bias. What is shared stays, and so does what normalises another axis. The new
    model is for inference: in training, batch statistics no longer play a part.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        return_report: whether to give a `MergeReport`, too.

    Returns:
        The new model, not compiled: what was folded into keeps its name. With `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: for subclassed and unbuilt models.

    Example:

    >>> inputs = keras.Input((8, 8, 3))
    >>> x = keras.layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    >>> model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(x))
    >>> folded, report = keras_kd.surgery.fold_batch_norm(model, return_report=True)
    >>> [layer.name for layer in folded.layers[1:]], report.merged
    (['conv'], {'conv': ('conv', 'norm')})

    Reference:
        Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
    """
    return _merge(model, _Rules(), return_report)


@overload
def merge_linear(model: Any, *, if_larger: bool = False, return_report: Literal[False] = False) -> keras.Model: ...


@overload
def merge_linear(model: Any, *, if_larger: bool = False, return_report: Literal[True]) -> tuple[keras.Model, MergeReport]: ...


def merge_linear(model: Any, *, if_larger: bool = False, return_report: bool = False) -> Any:
    """Makes one layer of consecutive linear ones, as long as there are any: a new model, which gives the same in inference.

    ```
    (x W_1 + b_1) W_2 + b_2 = x (W_1 W_2) + (b_1 W_2 + b_2)
    ```

    Merged are

    - batch normalisation into the layer before it, as `fold_batch_norm` does, or into the Dense layer or convolution after it;
    - two Dense layers;
    - a convolution and the 1x1 convolution, or the Dense layer, that maps its channels;
    - a 1x1 convolution and the convolution after it.

    The first one must have no activation, and the second one alone must read its output. What would not be exact stays: a shift or
    a bias before a convolution that pads with zeros. Nothing may stand between them but `Identity`: dropout is nothing in
    inference, but training would miss it.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        if_larger: whether to merge two layers also where the one takes more multiply-accumulates than both, as it does for a
            bottleneck, which is a kernel of low rank in two factors.
        return_report: whether to give a `MergeReport`, too.

    Returns:
        The new model, not compiled: a merged layer has the name and the activation of the last one with a kernel. With
        `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: for subclassed and unbuilt models.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(2, name="b")])
    >>> merged, report = keras_kd.surgery.merge_linear(model, return_report=True)
    >>> report.merged, report.macs, report.macs_after
    ({'b': ('a', 'b')}, 48, 8)

    Reference:
        Ding et al.: RepVGG: Making VGG-style ConvNets Great Again, 2021.
    """
    if not isinstance(if_larger, bool):
        raise TypeError(f"`if_larger` must be True or False. Received: if_larger={if_larger!r}.")
    return _merge(model, _Rules(True, if_larger), return_report)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What may be merged: besides batch normalisation into what stands before it."""

    all_linear: bool = False
    if_larger: bool = False


def _merge(model: Any, rules: _Rules, return_report: bool) -> Any:
    """Merges pairs until there are none."""
    old = _analysis.checked(model)
    new = old
    merged: dict[str, tuple[str, ...]] = {}
    while True:
        found = _analysis.analyse(new)
        replacements, pairs, kept = _pairs_of(found, rules)
        if not replacements and new is not old:
            break
        new = Rebuilt(found, set(), replacements).model
        for name, paths in pairs.items():
            merged[name] = tuple(one for path in paths for one in merged.pop(path, (path,)))
        if not replacements:
            break
    if not return_report:
        return new
    return new, MergeReport(merged, kept, _costs.macs_of(old), _costs.macs_of(new), old.count_params(), new.count_params())


def _pairs_of(
    found: _analysis.Analysis, rules: _Rules
) -> tuple[dict[int, Replacement], dict[str, tuple[str, ...]], dict[str, str]]:
    """Replacements for the last layers of pairs, what they stand for, and why others stay; no layer is in two pairs."""
    replacements: dict[int, Replacement] = {}
    merged: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    taken: set[int] = set()
    for graph in _places.graphs_of(found.model):
        for node in graph.nodes:
            made = _pair(found, graph, node, rules)
            path = found.records[id(node.operation)].path
            if isinstance(made, str):
                kept[path] = made
            if made is None or isinstance(made, str):
                continue
            first, replacement = made
            if taken & {id(first.operation), id(node.operation)}:
                continue
            taken |= {id(first.operation), id(node.operation)}
            replacements[id(node.operation)] = dataclasses.replace(replacement, reads=_places.inputs_of(first)[0])
            before = path.rpartition("/")[0]
            name = f"{before}/{replacement.layers[0].name}" if before else replacement.layers[0].name
            merged[name] = (found.records[id(first.operation)].path, path)
    return replacements, merged, kept


def _pair(found: _analysis.Analysis, graph: Graph, node: Any, rules: _Rules) -> tuple[Any, Replacement] | str | None:
    """The call before a call, and what stands for both; or why nothing does; None for what is no such pair."""
    kind = _pairs.kind_of(node.operation)
    if kind not in ("norm", "kernel") or (kind == "kernel" and not rules.all_linear):
        return None
    first, tensor, shared = _before(graph, node)
    before = "" if first is None else _pairs.kind_of(first.operation)
    if before not in ("norm", "kernel") or (before == "norm" and not (rules.all_linear and kind == "kernel")):
        return "it reads what no layer with a kernel gives" if kind == "norm" else None
    if before == kind == "kernel" and not _pairs.can_be_one(first.operation, node.operation):
        return None
    if shared:
        return f'"{first.operation.name}" is read by others, too'
    for one in (first, node):
        if len(found.records[id(one.operation)].outputs) > 1:
            return f'"{one.operation.name}" is used several times'
        if one.arguments.kwargs.get("training"):
            return f'"{one.operation.name}" is called with training=True'
    rank = len(tensor.shape)
    if kind == "norm":
        made = _pairs.with_norm_after(first.operation, node.operation, rank)
    elif before == "norm":
        made = _pairs.with_norm_before(first.operation, node.operation, rank)
    else:
        made = _pairs.as_one(first.operation, node.operation, tensor, node.outputs[0], rules.if_larger)
    return made if isinstance(made, str) else (first, made)


def _before(graph: Graph, node: Any) -> tuple[Any, Any, bool]:
    """The call that a call reads, through identities, what it gives, and whether others read that or what is between."""
    tensor = _places.inputs_of(node)[0]
    shared = graph.only_reader(tensor) is None
    first = graph.giver.get(id(tensor))
    while first is not None and _pairs.kind_of(first.operation) == "identity":
        tensor = _places.inputs_of(first)[0]
        shared |= graph.only_reader(tensor) is None
        first = graph.giver.get(id(tensor))
    return first, tensor, shared
