"""What do attention layers with heads do with channels, and what does their output projection read?"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.surgery import _labels, _nodes
from keras_kd.surgery._labels import Labels
from keras_kd.surgery._visits import Record, Visit

_L = keras.layers
LAYERS = (_L.MultiHeadAttention, _L.GroupQueryAttention)
HEADS = "heads"  # what a record calls them, and the end of the name of their place
_ARGUMENTS = (
    *("query", "value", "key", "query_mask", "value_mask", "key_mask", "attention_mask"),
    *("return_attention_scores", "training", "use_causal_mask"),
)
_STEPS = ("_compute_attention", "_compute_attention_mask", "_compute_causal_mask", "_masked_softmax", "_build_attention")


def place_of(path: str) -> str:
    """Name of the place of a layer's heads."""
    return f"{path}:{HEADS}"


def heads_of(record: Record) -> np.ndarray | None:
    """Atoms of a layer's heads; None for layers without."""
    return record.made.get(HEADS)


def parts_of(layer: Any) -> dict[str, Any]:
    """Its projections by name."""
    names = ("query", "key", "value", "gate", "output")
    return {name: getattr(layer, f"_{name}_dense") for name in names if getattr(layer, f"_{name}_dense", None) is not None}


def options_of(operation: Any) -> dict[str, Any]:
    """What the configuration of an attention layer leaves out."""
    return {"flash_attention": True} if type(operation) in LAYERS and operation._flash_attention else {}


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)


def sources_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What each projection of the input reads, by its name."""
    query, value = given["query"], given["value"]
    key = value if given.get("key") is None else given["key"]
    return {"query": query, "key": key, "value": value, "gate": query}


# Rules


def multi_head(visit: Visit) -> list[Labels]:
    """Multi-head attention reads channels and makes new ones; whole heads can go."""
    layer = visit.layer
    heads = visit.make(layer.num_heads, HEADS)
    visit.size("num_heads", heads)
    given = _read(visit, heads, heads)
    output = layer._output_dense
    if len(output.kernel.shape) != 3:
        visit.weight("kernel", [heads, *_labels.none(output.kernel.shape[1:])], output)
        return [_labels.none(one.shape) for one in visit.outputs]
    made = visit.make(output.kernel.shape[-1])
    visit.size("output_shape", ((len(made),), [made]))
    return _given(visit, given, heads, made)


def grouped_query(visit: Visit) -> list[Labels]:
    """Several heads of the query share one of key and value: those of one go together, or the same place of each does.

    Whichever leaves more to choose from. Query and value must have the same number of channels, and it gives as many.
    """
    layer = visit.layer
    heads = visit.make(layer.num_query_heads, HEADS)
    table = heads.reshape(layer.num_key_value_heads, -1)
    shared = None
    if len(table) >= table.shape[1]:
        shared = table[:, 0]
        visit.atoms.unite(table[:, :1], table)
        visit.size("num_key_value_heads", shared)
    else:
        visit.atoms.unite(table[:1], table)
    visit.size("num_query_heads", heads)
    given = _read(visit, heads, shared)
    made = visit.make(layer._output_dense.kernel.shape[-1])
    visit.tie([visit.of(given["query"])[-1:], visit.of(given["value"])[-1:], [made]])
    return _given(visit, given, heads, made)


def _read(visit: Visit, heads: np.ndarray, shared: np.ndarray | None) -> dict[str, Any]:
    """What the projections of query, key, value and gate read; heads of key and value may be `shared` by several."""
    given = arguments_of(visit.args, visit.kwargs)
    sources = sources_of(given)
    for tensor in _nodes.tensors_in((visit.args, visit.kwargs)):
        is_source = any(tensor is one for one in sources.values())
        visit.pin(visit.of(tensor)[:-1] if is_source else visit.of(tensor), "attends along it")
    plain = all(_is_plain(one) for one in parts_of(visit.layer).values())
    for name, part in parts_of(visit.layer).items():
        if name == "output":
            continue
        atoms, read = shared if name in ("key", "value") else heads, visit.of(sources[name])[-1]
        if not plain:
            visit.pin([read], "has projections that are not known")
        visit.weight("kernel", [read, atoms, None], part)
        visit.weight("bias", [atoms, None], part)
    reason = _why_heads_stay(visit.layer, given)
    if reason or not plain:
        visit.pin([heads], reason or "has projections that are not known")
    return given


def _given(visit: Visit, given: Mapping[str, Any], heads: np.ndarray, made: np.ndarray) -> list[Labels]:
    """What the output projection gives."""
    output = visit.layer._output_dense
    if not _is_plain(output):
        visit.pin([made], "has projections that are not known")
    visit.weight("kernel", [heads, None, made], output)
    visit.weight("bias", [made], output)
    first: Labels = [*_labels.none(visit.outputs[0].shape[:-1]), made]
    return [first, *[_labels.none(one.shape) for one in visit.outputs[1:]]]


def _is_plain(part: Any) -> bool:
    known = type(part) is _L.EinsumDense and vars(part).get("call") is None
    return known and getattr(part, "quantization_mode", None) is None and not getattr(part, "lora_enabled", False)


def _why_heads_stay(layer: Any, given: Mapping[str, Any]) -> str:
    """Why no head of a layer can go; empty if they can."""
    base = next(cls for cls in LAYERS if isinstance(layer, cls))
    own = [name for name in _STEPS if getattr(type(layer), name, None) is not getattr(base, name, None) or name in vars(layer)]
    if own:
        return f"computes attention in a way of its own (`{own[0]}`)"
    if given.get("return_attention_scores"):
        return "gives its scores, head by head"
    if given.get("query_mask") is not None:
        return "is called with a `query_mask`, which not all versions of Keras look at"
    mask, axes = given.get("attention_mask"), len(getattr(layer, "_attention_axes", (1,)))
    if not axes:
        return "attends along no axis"
    shape = () if mask is None else tuple(mask.shape)
    if len(shape) == len(given["query"].shape) + axes and shape[-2 * axes - 1] != 1:
        return "has a mask for each head"
    return ""


# What is inside


def context_of(layer: Any, node: Any, read: Mapping[int, Any]) -> Any:
    """What the output projection of a layer reads in inference: what each head gives.

    Args:
        layer: the layer, or the one that stands for it in a new model.
        node: a call of it.
        read: values of the tensors that the call reads, by `id` of the symbolic ones.

    Returns:
        `(batch, *steps, heads, channels of a head)`.
    """
    args, kwargs = node.arguments.fill_in(dict(read))
    given = arguments_of(args, kwargs)
    masks = {}
    for name in ("query", "value", "key"):
        mask = given.get(f"{name}_mask")
        masks[f"{name}_mask"] = getattr(given.get(name), "_keras_mask", None) if mask is None else mask
    sources = sources_of(given)
    mask = layer._compute_attention_mask(
        sources["query"],
        sources["value"],
        **masks,
        attention_mask=given.get("attention_mask"),
        use_causal_mask=given.get("use_causal_mask", False),
    )
    parts = parts_of(layer)
    values = {name: part(ops.copy(sources[name])) for name, part in parts.items() if name != "output"}  # a copy has no mask
    repeats = values["query"].shape[-2] // values["key"].shape[-2]
    if repeats > 1:
        values |= {name: ops.repeat(values[name], repeats, axis=-2) for name in ("key", "value")}
    inner, _ = layer._compute_attention(values["query"], values["key"], values["value"], attention_mask=mask, training=False)
    return inner * values["gate"] if "gate" in values else inner


def slopes_of(layer: Any, gradients: Any) -> Any:
    """Gradients of what the output projection reads, from those of what the layer gives."""
    kernel = ops.cast(layer._output_dense.kernel, gradients.dtype)  # (heads, channels, *outputs)
    axes = len(kernel.shape) - 2
    return ops.tensordot(gradients, kernel, [list(range(-axes, 0)), list(range(2, 2 + axes))])
