"""Is this the teacher and the data that were recorded? Hashes that stay the same across processes, machines and layer names."""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

# What a layer's outputs in inference mode do not depend on, or what depends on how often a process has built models.
_IGNORED = ("build_config", "compile_config", "module", "shared_object_id", "trainable")
_NOT_TEACHING = ("given", "name", "supports_jit")  # of a holder: the models a second time, and what says nothing of its outputs
_IGNORED_ENDINGS = ("_initializer", "_regularizer", "_constraint")


def teacher_fingerprint(teacher: Any) -> dict[str, str]:
    """Hashes of a teacher's architecture and of its weights.

    Args:
        teacher: a Keras model, or an object that holds one or several.

    Returns:
        `{"architecture": ..., "weights": ...}`.
    """
    models, settings = _contents(teacher)
    weights = hashlib.sha256()
    for model in models:
        for weight in model.weights:
            value = np.ascontiguousarray(weight)
            weights.update(f"{value.dtype}{value.shape}".encode())
            weights.update(value.tobytes())
    description = [[_architecture(model) for model in models], settings]
    text = json.dumps(description, sort_keys=True, default=str)
    return {"architecture": hashlib.sha256(text.encode()).hexdigest(), "weights": weights.hexdigest()}


def _contents(teacher: Any) -> tuple[list[keras.Model], list[Any]]:
    """The models inside a holder, and the numbers and words beside them (such as an ensemble's weights)."""
    models: list[keras.Model] = []
    settings: list[Any] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, keras.Model):
            if all(value is not model for model in models):
                models.append(value)
        elif isinstance(value, bool | int | float | str):
            settings.append(value)
        elif isinstance(value, keras.Variable | np.ndarray | np.generic):
            settings.append(np.asarray(value).tolist())
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)
        elif hasattr(value, "kinds") and id(value) not in seen:
            seen.add(id(value))
            walk({name: part for name, part in vars(value).items() if name not in _NOT_TEACHING})

    walk(teacher)
    return models, settings


def _architecture(model: keras.Model) -> Any:
    layers = list(model._flatten_layers())
    code = [_code(layer.function) for layer in layers if isinstance(layer, keras.layers.Lambda)]
    try:
        config = keras.saving.serialize_keras_object(model)
    except Exception:  # a subclassed model that says nothing of itself
        config = {"class_name": type(model).__name__, "layers": [type(layer).__name__ for layer in layers]}
    names = {layer.name: f"#{index}" for index, layer in reversed(list(enumerate(layers)))}
    return [_canonical(config, names), code]


def _canonical(node: Any, names: dict[str, str]) -> Any:
    """A config without names that count models ("dense_7"), defaults of newer versions, and what inference does not see."""
    if isinstance(node, dict):
        if node.get("class_name") == "__lambda__":
            return "lambda"
        kept = {key: value for key, value in node.items() if value is not None and key not in _IGNORED}
        return {key: _canonical(value, names) for key, value in kept.items() if not key.endswith(_IGNORED_ENDINGS)}
    if isinstance(node, list | tuple):
        return [_canonical(value, names) for value in node]
    return names.get(node, node) if isinstance(node, str) else node


def _code(function: Any) -> list[str]:
    code = getattr(function, "__code__", None)
    if code is None:
        return [getattr(function, "__name__", type(function).__name__)]
    constants = [repr(value) for value in code.co_consts if isinstance(value, bool | int | float | str | tuple | None)]
    return [code.co_code.hex(), *code.co_names, *constants]


# What differs, in words


def differences_of_teacher(recorded: dict[str, str], asked: dict[str, str]) -> list[str]:
    """Which of a teacher's fingerprints differ."""
    return [f"the teacher's {part}" for part in ("architecture", "weights") if recorded[part] != asked[part]]


def differences_of_data(recorded: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """How two data sets differ; what follows from another difference is left out."""
    if list(recorded["structure"]) != list(asked["structure"]):
        return [f"the data: recorded ({', '.join(recorded['structure'])}), received ({', '.join(asked['structure'])})"]
    if others := [role for role, tree in recorded["structure"].items() if tree != asked["structure"][role]]:
        return [f"the data: the structure of {role}" for role in others]
    found = []
    for (name, dtype, shape), (_, other_dtype, other_shape) in zip(recorded["fields"], asked["fields"], strict=True):
        if shape != other_shape:
            found.append(f"the data: shape of {name} {tuple(shape)} against {tuple(other_shape)}")
        if dtype != other_dtype:
            found.append(f"the data: dtype of {name} {dtype} against {other_dtype}")
    if not found:
        found = [
            f"the data: the first samples of {role}"
            for role in recorded["first"]
            if recorded["first"][role] != asked["first"][role]
        ]
    if not found and recorded["samples"] == asked["samples"] and None not in (recorded["spread"], asked["spread"]):
        spread = recorded["spread"]
        found = [f"the data: later samples of {role}" for role in spread if spread[role] != asked["spread"][role]]
    same_batches = recorded["batch_size"] == asked["batch_size"]  # else their number says nothing
    for name in ["samples", *(["batches"] if same_batches else [])]:
        if None not in (recorded[name], asked[name]) and recorded[name] != asked[name]:
            found.append(f"the data: {recorded[name]} {name} against {asked[name]}")
    return found


def differences_of_settings(recorded: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Which arguments differ."""
    found = []
    for name in sorted(set(recorded["functions"]) ^ set(asked["functions"])):
        found.append(f"{name}: recorded {'with' if name in recorded['functions'] else 'without'} one")
    for name, value in asked.items():
        before = recorded[name]
        if name == "layer_names":
            before, value = sorted(before), sorted(value)
        matters = name != "functions" and not (name == "seed" and "augment" not in recorded["functions"])
        if matters and before != value:
            found.append(f"{name}: recorded {before!r}, asked for {value!r}")
    return found


def digest(rows: np.ndarray) -> str:
    """SHA-256 of an array of bytes."""
    return hashlib.sha256(rows.tobytes()).hexdigest()


# Functions have no fingerprint; what they make of the first samples has one, and it bears the rounding of other machines.


_ROUNDING = 1e-2  # of the largest number: TF32 and half precision in a deep network on other hardware


def save_examples(examples: dict[str, list[np.ndarray]]) -> bytes:
    """What each function made of the first samples, as a file's content."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {f"{name}-{index}": array for name, index, array in _flat(examples)}
    np.savez(file, **arrays)
    return file.getvalue()


def changed_examples(content: bytes, examples: dict[str, list[np.ndarray]]) -> list[str]:
    """Names of the functions that make something else of the first samples, or of fewer, than was saved."""
    with np.load(io.BytesIO(content)) as file:
        saved = dict(file)
    changed = [
        name
        for name, index, array in _flat(examples)
        if f"{name}-{index}" not in saved or not _alike(saved[f"{name}-{index}"][: len(array)], array)
    ]
    return list(dict.fromkeys(changed))


def same_answers(content: bytes, name: str, answers: list[np.ndarray]) -> bool:
    """Whether a teacher says of the first samples what was saved, but for the rounding of other hardware."""
    with np.load(io.BytesIO(content)) as file:
        saved = [file[key] for key in sorted((k for k in file if k.startswith(f"{name}-")), key=lambda k: int(k.split("-")[-1]))]
    return len(saved) == len(answers) and all(map(_nearly_alike, saved, answers))


def _nearly_alike(saved: np.ndarray, array: np.ndarray) -> bool:
    count = min(len(saved), len(array))
    saved, array = saved[:count], array[:count]
    if saved.shape != array.shape or saved.dtype != array.dtype:
        return False
    if saved.dtype.kind != "f":
        return not saved.size or bool(np.mean(saved != array) <= 0.1)  # the largest of two that are all but equal
    finite = np.isfinite(saved)
    if not np.array_equal(finite, np.isfinite(array)):
        return False
    a, b = saved[finite].astype("float64"), array[finite].astype("float64")
    return not a.size or bool(np.all(np.abs(a - b) <= _ROUNDING * np.max(np.abs(a))))


def _flat(examples: dict[str, list[np.ndarray]]) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, arrays in examples.items():
        for index, array in enumerate(arrays):
            yield name, index, array


def _alike(saved: np.ndarray, array: np.ndarray) -> bool:
    if saved.shape != array.shape or saved.dtype != array.dtype:
        return False
    if saved.dtype.kind not in "fiu" or not saved.size:
        return np.array_equal(saved, array)
    a, b = saved.astype("float64"), array.astype("float64")
    if saved.dtype.kind == "f":
        return bool(np.all(np.abs(a - b) <= 1e-3 * np.max(np.abs(a))))
    return bool(np.max(np.abs(a - b)) <= 1 and np.mean(a != b) <= 0.01)  # a float was rounded the other way
