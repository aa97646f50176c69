"""What is in the files that the command line is given? Models without code of others, arrays, and targets that can be written."""

import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np


def load_model(path: str, *, unsafe: bool) -> Any:
    """The model of a `.keras` file, or the student of a Distiller's.

    Args:
        path: of the file.
        unsafe: whether code in it may run.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is no Keras file, or holds code and `unsafe` is False.
    """
    import keras

    import keras_kd  # noqa: F401 (registers its layers, losses and models)

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'There is no file "{path}".')
    if not zipfile.is_zipfile(path):
        raise ValueError(f'A model must be a .keras file, as model.save("model.keras") writes it. Received: "{path}".')
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=not unsafe)
    except (TypeError, ValueError) as error:
        message = str(error).splitlines()[0]
        if "unsafe" in str(error) or "safe_mode" in str(error):
            raise ValueError(
                f'"{path}" holds Python code (a Lambda layer), which loading would run. Add --unsafe if you trust who made it.'
            ) from error
        raise ValueError(
            f'"{path}" cannot be loaded: {message} Classes of your own must be registered with '
            "@keras.saving.register_keras_serializable and imported: write a few lines of Python in the place of this command."
        ) from error
    return getattr(model, "student", model)


def load_loss(path: str, *, unsafe: bool) -> tuple[Any, str]:
    """The loss that the model of a `.keras` file, or a Distiller, was compiled with; optimizer and metrics stay where they are.

    Args:
        path: of a file that `load_model` could load.
        unsafe: whether code in it may run.

    Returns:
        The loss or None, and why there is none; "" if there is one.
    """
    import keras

    with zipfile.ZipFile(path) as file:
        compiled = json.loads(file.read("config.json")).get("compile_config") or {}
    if compiled.get("loss") is None:
        return None, f'"{path}" does not say what loss the model was compiled with.'
    try:
        return keras.saving.deserialize_keras_object(compiled["loss"], safe_mode=not unsafe), ""
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        if not unsafe and ("unsafe" in str(error) or "safe_mode" in str(error)):
            return None, f'the loss in "{path}" is Python code. Add --unsafe if you trust who made it.'
        return None, f'the loss in "{path}" is none of Keras. In Python: keras_kd.compress(..., loss=yours).'


def load_data(path: str, model: Any) -> tuple[Any, Any]:
    """Inputs and labels of an `.npz` file; without pickled objects.

    Args:
        path: of the file.
        model: whose inputs may be named in it; None: it must hold x.

    Returns:
        Inputs, an array or a dict by name, and labels or None.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is no `.npz` file, or does not hold the inputs.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'There is no file "{path}".')
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'Data must be an .npz file, as numpy.savez("data.npz", x=x, y=y) writes it. Received: "{path}".'
        ) from error
    names = [] if model is None else [tensor.name for tensor in model.inputs]
    if "x" in held:
        x: Any = held["x"]
    elif names and set(names) <= set(held):
        x = {name: held[name] for name in names} if len(names) > 1 else held[names[0]]
    else:
        wanted = "x" + f", or {', '.join(names)}" * bool(names)
        raise ValueError(f'"{path}" must hold {wanted}. Received: {", ".join(held) or "nothing"}.')
    return x, held.get("y")


def target(path: str, suffix: str) -> pathlib.Path:
    """A path that can be written, looked at before the work begins.

    Raises:
        ValueError: if it ends otherwise.
        FileNotFoundError: if its folder is not there.
    """
    found = pathlib.Path(path)
    if found.suffix != suffix:
        raise ValueError(f"The file to write must end in {suffix}. Received: {path}")
    if not found.parent.is_dir():
        raise FileNotFoundError(f'There is no folder "{found.parent}" to write "{found.name}" to.')
    return found


def new_target(path: str, suffix: str) -> pathlib.Path:
    """The same, where there is nothing yet.

    Raises:
        FileExistsError: if there is something.
    """
    found = target(path, suffix)
    if found.exists():
        raise FileExistsError(f'"{found}" is there already. Delete it, or give another name.')
    return found


def save(model: Any, path: pathlib.Path) -> None:
    """Writes a model whole or not at all."""
    begun = path.with_name(f".{path.stem}.{os.getpid()}.keras")
    try:
        model.save(begun)
        begun.replace(path)
    finally:
        begun.unlink(missing_ok=True)
