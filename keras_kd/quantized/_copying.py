"""How is a trained model made a second time? From its config, with its own functions and classes, registered or not."""

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np


def copy_model(model: keras.Model, dtype: str | None = None) -> keras.Model:
    """A model of the same config, with weights of the same values; it is not compiled.

    Functions and classes of users need no registration: they are those of the model.

    Args:
        model: a built model.
        dtype: what the copy computes in; None is as the model does.

    Raises:
        ValueError: if the config does not suffice to make it again.
    """
    state = random.getstate()  # seeds of new layers come from there; what is drawn afterwards must not depend on a copy
    try:
        with _by_name(model) as known:
            errors = []
            for way in (_again, _layer_by_layer, _by_parameters):
                try:
                    return _with_weights_of(model, way(model, known, dtype), dtype)
                except Exception as error:
                    errors.append(error)
        reason = (str(errors[0]).strip() or repr(errors[0])).splitlines()[0][:300]
        raise ValueError(
            f'The model "{model.name}" cannot be made again from its config: {reason} Give its classes a `get_config` that returns '
            "the arguments of `__init__`."
        ) from errors[0]
    finally:
        random.setstate(state)


def _again(layer: Any, known: dict[str, Any], dtype: str | None) -> Any:
    config = keras.saving.serialize_keras_object(layer)
    if dtype is not None:
        parts = layer._flatten_layers() if isinstance(layer, keras.layers.Layer) else []
        config = _in_dtype(config, dtype, {part.dtype_policy.name for part in parts})
    return keras.saving.deserialize_keras_object(config, custom_objects=known, safe_mode=False)


def _layer_by_layer(model: keras.Model, known: dict[str, Any], dtype: str | None) -> keras.Model:
    """Of Functional models alone: the config of one has a model twice that stands in two others."""
    return keras.models.clone_model(model, clone_function=lambda layer: _again(layer, known, dtype), recursive=True)


def _by_parameters(model: keras.Model, known: dict[str, Any], dtype: str | None) -> keras.Model:
    """Of models whose `__init__` does not take the name and so on, which Keras puts into every config."""
    taken = inspect.signature(type(model).__init__).parameters
    config = model.get_config() if dtype is None else _in_dtype(model.get_config(), dtype, {model.dtype_policy.name})
    config = {name: value for name, value in config.items() if name in taken}
    twin = type(model)(**keras.saving.deserialize_keras_object(config, custom_objects=known, safe_mode=False))
    twin.build_from_config(model.get_build_config())
    twin.built = True  # as Keras sets it where it loads a model
    return twin


def _with_weights_of(model: keras.Model, twin: keras.Model, dtype: str | None) -> keras.Model:
    if not twin.built:
        twin.build(model.input_shape)
    weights = model.get_weights()
    twin.set_weights([np.asarray(w, dtype) if dtype and w.dtype.kind not in "iub" else w for w in weights])
    finalize_states(twin)
    for name in inspect.signature(type(model).__init__).parameters:  # what Keras makes a config of are a model's default arguments
        wanted, found = (vars(one).get(name) for one in (model, twin))
        if isinstance(wanted, int | float | str) and wanted != found and name != "name":
            raise ValueError(f"The argument {name}={wanted!r} is not in the config.")
    return twin


def finalize_states(model: keras.Model) -> None:
    """Lets layers with `adapt` make the constants that they compute with of weights that they were given."""
    for layer in model._flatten_layers():
        getattr(layer, "finalize_state", lambda: None)()


@contextlib.contextmanager
def _by_name(model: keras.Model) -> Iterator[dict[str, Any]]:
    """While it is open, functions in the model bear names that nobody else has; gives what these names mean, and classes'."""
    layers = [model, *model._flatten_layers(include_self=False)]
    parts = [part for layer in layers for value in [layer, *vars(layer).values()] for part in _parts(value)]
    functions = {id(part): part for part in parts if inspect.isfunction(part) and not part.__module__.startswith("keras.")}
    classes = {type(part).__name__: type(part) for part in parts if hasattr(part, "get_config")}
    known = {name: one for name, one in classes.items() if not one.__module__.startswith("keras.")}
    names = [(function, function.__name__, f"keras_kd_function_{index}") for index, function in enumerate(functions.values())]
    with contextlib.ExitStack() as stack:
        for one in layers:
            if isinstance(one, keras.Model):  # losses of users may have no config, and a copy needs none
                stack.enter_context(attribute_of(one, "get_compile_config", lambda: None))
                stack.enter_context(attribute_of(one, "compiled", False))
        try:
            for function, _, name in names:
                function.__name__ = name  # even of a lambda, which Keras would take apart and lose what it refers to
            yield known | {name: function for function, _, name in names}
        finally:
            for function, former, _ in names:
                function.__name__ = former


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else list(value.values()) if isinstance(value, dict) else [value]


def _in_dtype(node: Any, dtype: str, policies: set[str]) -> Any:
    """A config with other precisions put in the place of `policies`."""
    if isinstance(node, dict):
        return {key: _in_dtype(value, dtype, policies) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_in_dtype(value, dtype, policies) for value in node)
    return dtype if isinstance(node, str) and node in policies.union(("float16", "bfloat16", "float64")) else node


@contextlib.contextmanager
def attribute_of(model: keras.Model, name: str, value: Any) -> Iterator[None]:
    """Gives an object an attribute of its own for a while, past Keras' tracking."""
    own = vars(model)
    former = own.get(name)
    object.__setattr__(model, name, value)
    try:
        yield
    finally:
        if former is None:
            own.pop(name, None)
        else:
            object.__setattr__(model, name, former)
