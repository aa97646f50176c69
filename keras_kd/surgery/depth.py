"""How does a network lose layers? Blocks become their best linear map; layers and residual branches go, and their readers adapt."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import keras

from keras_kd import _batching
from keras_kd._progress import Progress, Verbose, check_verbose
from keras_kd.analysis.plans import Step
from keras_kd.analysis.results import BlockAnalysis
from keras_kd.surgery import _analysis, _costs, _linear_map, _nodes, _places, _removals
from keras_kd.surgery._places import Block, Place
from keras_kd.surgery._rebuild import Rebuilt, Replacement
from keras_kd.surgery._refit import Refit
from keras_kd.surgery._removals import Removal
from keras_kd.surgery._reports import Report
from keras_kd.surgery._side_by_side import checked_batches
from keras_kd.surgery.merging import told_costs


@dataclasses.dataclass(frozen=True)
class LinearizeReport(Report):
    """What `linearize` did.

    Attributes:
        layers: paths of the layers that went.
        staying: paths of layers of the block that are read from outside, or used elsewhere, and are still there.
        made: the new layers, in order.
        columns: number of features that each output reads.
        rows: number of positions that the map was fitted on.
        l2: penalty that was chosen, relative to the mean variance of the features.
        r2: share of the variance of the block's output that the map gives, on samples that the fit did not see.
        error: root mean square of what it is off by on these.
        macs: multiply-accumulates of a sample before; None where the lengths of the inputs are not known.
        macs_after: and after.
        parameters: number of weights before.
        parameters_after: and after.
    """

    layers: tuple[str, ...]
    staying: tuple[str, ...]
    made: tuple[str, ...]
    columns: int
    rows: int
    l2: float
    r2: float
    error: float
    macs: int | None
    macs_after: int | None
    parameters: int
    parameters_after: int

    def __str__(self) -> str:
        rows = [
            ("instead of", ", ".join(self.layers)),
            *([("still there", ", ".join(self.staying))] if self.staying else []),
            ("stands", ", ".join(self.made)),
            ("R2 on unseen samples", f"{self.r2:.4f}"),
            ("error on unseen samples", f"{self.error:.2g}"),
            ("fitted on", f"{self.rows:,} rows of {self.columns:,} features, l2 {self.l2:.0e}"),
        ]
        return _shown((("linearize", "left"), ("", "left")), rows) + "\n" + told_costs(self)


@dataclasses.dataclass(frozen=True)
class RemovalReport(Report):
    """What `remove_layers` did.

    Attributes:
        removed: for each name that was given, the paths of the layers that went.
        staying: paths of layers of removed blocks that are read from outside, or used elsewhere, and are still there.
        macs: multiply-accumulates of a sample before; None where the lengths of the inputs are not known.
        macs_after: and after.
        parameters: number of weights before.
        parameters_after: and after.
        refits: with data, what was done with the weights of each layer that reads what was handed on.
        not_refitted: such layers that keep their old weights, and why.
    """

    removed: dict[str, tuple[str, ...]]
    staying: tuple[str, ...]
    macs: int | None
    macs_after: int | None
    parameters: int
    parameters_after: int
    refits: tuple[Refit, ...] = ()
    not_refitted: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        gone = [(name, ", ".join(layers)) for name, layers in self.removed.items()]
        fitted = [(one.layer, f"{one.error_before:.2g}", f"{one.error_after:.2g}", f"{one.rows:,}") for one in self.refits]
        text = _shown((("removed", "left"), ("layers that went", "left")), gone)
        if fitted:
            headings = (("refitted", "left"), ("error before", "right"), ("error after", "right"), ("rows", "right"))
            text += "\n" + _shown(headings, fitted)
        lines = [f"not refitted: {layer}: {reason}" for layer, reason in self.not_refitted.items()]
        lines += [f"still there: {', '.join(self.staying)}"] if self.staying else []
        return "\n".join([text, *lines, told_costs(self)])


def _shown(headings: Sequence[tuple[str, Any]], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, with the sides that its columns stand on."""
    from rich import table
    from rich.console import Console

    console = Console(width=140, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        made = table.Table(box=None, pad_edge=False)
        for heading, side in headings:
            made.add_column(heading, justify=side, overflow="fold")
        for row in rows:
            made.add_row(*row)
        console.print(made, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@overload
def linearize(
    model: Any, block: Any, data: Any, *, max_columns: int = 1024, verbose: Verbose = "auto", return_report: Literal[False] = False
) -> keras.Model: ...


@overload
def linearize(
    model: Any, block: Any, data: Any, *, max_columns: int = 1024, verbose: Verbose = "auto", return_report: Literal[True]
) -> tuple[keras.Model, LinearizeReport]: ...


def linearize(
    model: Any, block: Any, data: Any, *, max_columns: int = 1024, verbose: Verbose = "auto", return_report: bool = False
) -> Any:
    """Puts the best linear map in the place of a block: a new model, in which one layer stands for several.

    ```
    min over W, b of  sum_i |y_i - W' x_i - b|^2 + l2 |W|^2
    ```

    with x what a position of the block's output reads of its input, and y what it gives there. For vectors and sequences the map is
    a Dense layer. For images, and for sequences where the block looks at several steps, it is a convolution with the block's
    window, stride and padding; 1x1 where the window is not known. Where a block makes a vector of all of an image, it is a Dense
    layer on all of that. Three quarters of the samples are fitted, the last quarter tells how good that is; then all are fitted.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        block: the path of a layer or a nested model, such as `"conv1"` or `"backbone/conv1"`; a pair of paths `(first, last)` for
            all between the input of the first and the output of the last; a `BlockAnalysis`, or a `Step` of a plan with the action
            `"merge_block"`. What is inside of it and read from outside stays for these readers.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`, such as a `tf.data.Dataset`. They
            are read in one pass.
        max_columns: most features that each output may read; windows are cut to their middle to stay below. As in
            `linear_analysis`.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `LinearizeReport`, too.

    Returns:
        The new model, not compiled; the new layer has the name of the block's last one. With `return_report=True` a tuple of it and
        the report.

    Raises:
        TypeError: if `model` is no Keras model, or `block` none of these.
        ValueError: for subclassed and unbuilt models; for names that fit no layer; for blocks that read or give several tensors, or
            whose last layer is used several times; for blocks of which no linear map is known; for data of other shapes, too few or
            not finite.

    Example:

    >>> inputs = keras.Input((4,))
    >>> x = keras.layers.Dense(16, activation="softplus", name="first")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="last")(x))
    >>> data = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    >>> linear, report = keras_kd.surgery.linearize(model, ("first", "last"), data, verbose=0, return_report=True)
    >>> [layer.name for layer in linear.layers[1:]], report.layers, report.r2 > 0.8
    (['last'], ('first', 'last'), True)

    Reference:
        Dror, Zehavi, Belkin: Layer Folding: Neural Network Depth Reduction using Activation Linearization, 2021.
    """
    model = _analysis.checked(model)
    if isinstance(max_columns, bool) or not isinstance(max_columns, int) or max_columns < 1:
        raise ValueError(f"`max_columns` must be a whole number of at least 1. Received: max_columns={max_columns!r}.")
    found = _analysis.analyse(model)
    wanted = _block(found, block)
    progress = Progress(_batching.count(data), title="linearize", verbose=verbose)
    stream = progress.over(checked_batches(model, data), size=lambda batch: len(batch[0]))
    fitted = _linear_map.fit(found, wanted, stream, max_columns)
    replacement = dataclasses.replace(fitted.replacement, reads=wanted.start)
    new = Rebuilt(found, set(), {id(wanted.last.operation): replacement}).model
    if not return_report:
        return new
    made = tuple(_told(layer) for layer in replacement.layers)
    numbers = (fitted.columns, fitted.rows, fitted.l2, fitted.r2, fitted.error)
    costs = (_costs.macs_of(model), _costs.macs_of(new), model.count_params(), new.count_params())
    return new, LinearizeReport(wanted.members, wanted.staying, made, *numbers, *costs)


def _told(layer: Any) -> str:
    size = getattr(layer, "kernel_size", ())
    return f"{type(layer).__name__} {'x'.join(map(str, size))}".strip()


def _block(found: _analysis.Analysis, block: Any) -> Block:
    """What a user means by a block."""
    action = "merge_block"
    if isinstance(block, Step) and block.action != action:
        raise ValueError(f'`block` must be a step with the action "{action}". Received: {block}.')
    first, last = _ends(block, "block")
    places = _places.find_places(found)
    return _between(found, places, first, last, "block")


def _ends(given: Any, argument: str) -> tuple[Any, Any]:
    """The first and the last layer that are meant."""
    if isinstance(given, Step):
        return given.layer, given.last or given.layer
    if isinstance(given, BlockAnalysis):
        return given.first, given.last
    if isinstance(given, str):
        return given, given
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return given[0], given[1]
    raise TypeError(
        f"`{argument}` must be the path of a layer, a pair (first, last), a BlockAnalysis or a Step. Received: {given!r} of type "
        f"{type(given).__name__}."
    )


def _between(found: _analysis.Analysis, places: dict[str, Place], first: Any, last: Any, argument: str) -> Block:
    begin, end = (_places.resolved(places, name, argument) for name in (first, last))
    return _places.block_of(found, begin, end, argument)


@overload
def remove_layers(
    model: Any, names: Any, *, data: Any = None, verbose: Verbose = "auto", return_report: Literal[False] = False
) -> keras.Model: ...


@overload
def remove_layers(
    model: Any, names: Any, *, data: Any = None, verbose: Verbose = "auto", return_report: Literal[True]
) -> tuple[keras.Model, RemovalReport]: ...


def remove_layers(model: Any, names: Any, *, data: Any = None, verbose: Verbose = "auto", return_report: bool = False) -> Any:
    """Removes layers, blocks and residual branches: a new model, in which their input is handed on instead of their output.

    What a name means:

    - A layer whose input and output have one shape is left out. So is a layer that puts several tensors together of which one has
      the shape of its output, such as the gate of a squeeze-and-excitation block.
    - An `Add` or `Subtract` of a tensor and a branch that begins at this same tensor: the branch goes.
    - Another layer of such a branch: the branch goes, the smallest one if there are several.
    - A pair `(first, last)`: all between the input of the first and the output of the last, which must have one shape.

    A layer that is used several times is left out everywhere. What other layers read of a removed block stays.

    Without data all weights stay as they are. With data the next layers with a kernel that read what changed are fitted to what
    they gave before, as in `remove_channels`:

    ```
    min over W, b of  sum_i |z_i - W' a_i - b|^2 + l2 |W - W_old|^2
    ```

    with z the old network's values before the layer's activation, and a what the layer reads in the new network. The penalty is
    chosen on a quarter of the samples, and the old weights stay where no fit is better there.

    Args:
        model: a built Functional or Sequential model, nested ones included; for a Distiller, its student. It is not changed.
        names: paths of layers, such as `"block3_add"` or `"backbone/block3_add"`, pairs of them, and a plan's `Step`s with the
            action `"remove_layer"`.
        data: inputs nested as the model takes them, or an iterable of batches `x` or `(x, y)`, such as a `tf.data.Dataset`; some
            hundreds to thousands of samples. What both networks hold of them at a time takes at most about 1 GB: further samples
            are not read.
        verbose: 0 is silent; 1 or `"auto"` shows progress.
        return_report: whether to give a `RemovalReport`, too.

    Returns:
        The new model, not compiled. With `return_report=True` a tuple of it and the report.

    Raises:
        TypeError: if `model` is no Keras model, or `names` hold something else.
        ValueError: for subclassed and unbuilt models; for names that fit no layer; for layers that read and give other shapes and
            belong to no residual branch; if no layer would be left; for data of other shapes or with NaN.

    Example:

    >>> inputs = keras.Input((6,))
    >>> x = keras.layers.Dense(8, activation="relu", name="branch")(inputs)
    >>> x = keras.layers.Add(name="add")([inputs, keras.layers.Dense(6, name="back")(x)])
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    >>> smaller, report = keras_kd.surgery.remove_layers(model, ["add"], return_report=True)
    >>> [layer.name for layer in smaller.layers[1:]], report.removed
    (['head'], {'add': ('branch', 'back', 'add')})

    Reference:
        Veit, Wilber, Belongie: Residual Networks Behave Like Ensembles of Relatively Shallow Networks, 2016.
    """
    check_verbose(verbose)
    model = _analysis.checked(model)
    found = _analysis.analyse(model)
    removals = _removals_of(found, names)
    replacements = {id(one.operation): one.replacement for one in removals.values()}
    _check_left(model, replacements)
    stream = None if data is None else checked_batches(model, data)
    rebuilt = Rebuilt(found, set(), replacements)
    refits, skipped = ([], {}) if stream is None else _removals.refit(rebuilt, stream, verbose)
    if not return_report:
        return rebuilt.model
    staying = tuple(dict.fromkeys(path for one in removals.values() for path in one.staying))
    costs = (_costs.macs_of(model), _costs.macs_of(rebuilt.model), model.count_params(), rebuilt.model.count_params())
    removed = {name: one.layers for name, one in removals.items()}
    return rebuilt.model, RemovalReport(removed, staying, *costs, tuple(refits), dict(skipped))


def _removals_of(found: _analysis.Analysis, names: Any) -> dict[str, Removal]:
    """What each of the names means, by what it was called."""
    if isinstance(names, (str, Step, BlockAnalysis)):
        names = [names]
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise TypeError(f"`names` must be a sequence of names and pairs. Received: {names!r} of type {type(names).__name__}.")
    places = _places.find_places(found)
    removals = {}
    for given in names:
        if isinstance(given, Step) and given.action != "remove_layer":
            raise ValueError(f'`names` must hold steps with the action "remove_layer". Received: {given}.')
        first, last = _ends(given, "names")
        if isinstance(given, str) or (isinstance(given, Step) and not given.last):
            removals[first] = _removals.of_layer(found, _places.resolved(places, first, "names"))
        else:
            told = f"{first} .. {last}"
            removals[told] = _removals.of_block(_between(found, places, first, last, "names"), f'("{first}", "{last}")')
    return removals


def _check_left(model: Any, replacements: Mapping[int, Replacement]) -> None:
    """Every model must keep at least one layer."""
    for graph in _places.graphs_of(model):
        if not _needed(graph, replacements):
            names = ", ".join(node.operation.name for node in graph.nodes)
            raise ValueError(f'"{graph.model.name}" must keep at least one layer. Received: names that leave none of {names}.')


def _needed(graph: _places.Graph, replacements: Mapping[int, Replacement]) -> list[Any]:
    """The calls that are left of a graph."""
    pending, left, seen = list(_nodes.graph_of(graph.model).outputs), [], set()
    while pending:
        tensor = pending.pop()
        node = graph.giver.get(id(tensor))
        if node is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        replacement = replacements.get(id(node.operation))
        if replacement is None:
            left.append(node)
            pending += _places.inputs_of(node)
        else:
            reads = replacement.reads
            pending.append(node.arguments.keras_tensors[replacement.hands_on] if reads is None else reads)
    return left
