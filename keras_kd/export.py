"""How does a model leave Keras, and does the file say the same? Writes LiteRT files and runs them before it believes them."""

import contextlib
import dataclasses
import gzip
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the model.

    Attributes:
        path: the file.
        size: its length in bytes.
        gzip_size: its length in bytes after gzip.
        max_difference: largest absolute difference between the file's outputs and the model's.
        agreement: share of rows in which the largest output is the same, in [0, 1]; 1.0 for single-valued outputs.
        samples: number of samples that were compared.
    """

    path: pathlib.Path
    size: int
    gzip_size: int
    max_difference: float
    agreement: float
    samples: int


def to_litert(model: keras.Model, path: str | os.PathLike[str], *, check_data: Any = None, tolerance: float = 1e-3) -> ExportReport:
    """Writes `model` as a float LiteRT (`.tflite`) file, after running it against the model.

    The file appears at `path` whole or not at all: it is written beside it, run in the LiteRT interpreter on `check_data`, and
    moved into place only if its outputs are the model's. Models of other precisions (mixed_float16, float64) are exported, and
    compared, in float32. Recurrent layers keep the converter from a free batch size: their files take one sample at a time.

    Args:
        model: a built Keras model; for a Distiller, its student.
        path: where to write. The folder must exist.
        check_data: inputs to compare on, nested as the model takes them, of any number of samples. None is 8 seeded random
            samples of the model's input shapes.
        tolerance: largest difference allowed, relative to the largest output (or to 1, if that is larger).

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, or its input shapes are not known and `check_data` is missing.
        FileNotFoundError: if the folder does not exist.
        RuntimeError: if TensorFlow's converter refuses the model, or the file's outputs are not the model's; nothing is left at
            `path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite")
    >>> report.agreement, report.max_difference < 1e-5
    (1.0, True)
    """
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'`path` must lie in a folder that exists. Received: path="{path}". Create "{path.parent}" first.')
    if path.is_dir():
        raise IsADirectoryError(f'`path` must be a file. Received: path="{path}", a folder.')
    model = _in_float32(model)
    inputs = _random_inputs(model) if check_data is None else _check_inputs(model, check_data)
    content = _convert(model, inputs)
    difference, agreement = _compare(model, content, inputs, tolerance)
    _write_atomically(path, content)
    samples = len(keras.tree.flatten(inputs)[0])
    return ExportReport(path, len(content), len(gzip.compress(content, 9)), difference, agreement, samples)


def run_litert(file: str | os.PathLike[str] | bytes, inputs: Any, *, threads: int = 1) -> list[np.ndarray]:
    """Runs a LiteRT file on inputs of any number of samples.

    Args:
        file: a path, or the file's content.
        inputs: arrays nested as the Keras model takes them, in its order.
        threads: number of threads of the interpreter.

    Returns:
        The outputs in `keras.tree.flatten` order of the Keras model's.
    """
    interpreter = open_litert(file, threads=threads)
    arrays = [np.asarray(array) for array in keras.tree.flatten(inputs)]
    runner = interpreter.get_signature_runner("serving_default")
    names = [f"input_{index}" for index in range(len(arrays))]
    types = runner.get_input_details()
    given = {name: array.astype(types[name]["dtype"]) for name, array in zip(names, arrays, strict=True)}
    one_by_one = any(detail["shape_signature"][0] == 1 for detail in interpreter.get_input_details())
    batches = [{name: given[name][i : i + 1] for name in names} for i in range(len(arrays[0]))] if one_by_one else [given]
    # Copies: what the runner gives may be views of memory that goes with the interpreter.
    outputs = [{name: np.array(value) for name, value in runner(**batch).items()} for batch in batches]
    return [np.concatenate([part[f"output_{index}"] for part in outputs]) for index in range(len(outputs[0]))]


def open_litert(file: str | os.PathLike[str] | bytes, *, threads: int = 1) -> Any:
    """Opens a LiteRT file or its content in an interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    where = {"model_content": file} if isinstance(file, bytes) else {"model_path": os.fspath(file)}
    return Interpreter(**where, num_threads=threads)


def _in_float32(model: keras.Model) -> keras.Model:
    """The model itself, or a twin of the same weights that computes in float32: LiteRT has no kernels for other precisions."""
    others = ("float16", "bfloat16", "float64")
    policies = {layer.dtype_policy.name for layer in model._flatten_layers() if layer.compute_dtype in others}
    if not policies:
        return model

    def rename(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: rename(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(rename(value) for value in node)
        return "float32" if isinstance(node, str) and node in policies.union(others) else node

    try:
        twin = type(model).from_config(rename(model.get_config()))
        if not twin.built:
            twin.build(model.input_shape)
        twin.set_weights([np.asarray(w, "float32") if w.dtype.kind == "f" else w for w in model.get_weights()])
    except Exception as error:
        raise ValueError(
            f'"{model.name}" computes in {", ".join(sorted(policies))}, LiteRT in float32, and the model cannot be rebuilt from '
            "its config in float32. Build it with the float32 policy, and set the weights."
        ) from error
    return twin


def _check_inputs(model: keras.Model, data: Any) -> Any:
    """`check_data` as arrays, in the order of the model's inputs."""
    if isinstance(data, dict) and getattr(model, "inputs", None) and not isinstance(getattr(model, "_inputs_struct", None), dict):
        data = [data[tensor.name] for tensor in model.inputs]
    try:
        data = keras.tree.map_structure(np.asarray, data)
    except Exception:
        data = np.empty(0, dtype=object)
    arrays = keras.tree.flatten(data)
    if not arrays or any(array.ndim == 0 or len(array) == 0 or array.dtype == object for array in arrays):
        raise ValueError(
            "`check_data` must be an array of samples, or arrays nested as the model takes them, with at least one sample. "
            f"Received: shapes {[array.shape for array in arrays]}."
        )
    return data


def _convert(model: keras.Model, inputs: Any) -> bytes:
    """Converts for any batch size, or where the converter cannot, for one sample."""
    try:
        return _convert_for(model, inputs, None)
    except Exception as error:
        try:
            return _convert_for(model, inputs, 1)
        except Exception:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise RuntimeError(f'TensorFlow\'s converter refuses "{model.name}". Nothing was written. It says: {reason}') from error


def _convert_for(model: keras.Model, inputs: Any, batch: int | None) -> bytes:
    known = getattr(model, "inputs", None)
    if known:
        template = model._inputs_struct if hasattr(model, "_inputs_struct") else known[0]
        shapes = [(batch, *tensor.shape[1:]) for tensor in known]
        dtypes = [tensor.dtype for tensor in known]
    else:
        template = inputs
        shapes = [(batch, *np.shape(array)[1:]) for array in keras.tree.flatten(inputs)]
        dtypes = [np.asarray(array).dtype for array in keras.tree.flatten(inputs)]
    specs = {
        f"input_{index}": tf.TensorSpec(shape, dtype, name=f"input_{index}")
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }

    @tf.function
    def serving_default(**tensors: Any) -> Any:
        ordered = [tensors[name] for name in specs]
        nested = keras.tree.pack_sequence_as(template, ordered) if keras.tree.is_nested(template) else ordered[0]
        outputs = keras.tree.flatten(model(nested, training=False))
        return {f"output_{index}": tf.identity(output) for index, output in enumerate(outputs)}

    module = tf.Module()
    # The TensorFlow variables inside Keras' own: the saver finds no others, and the file would hold uninitialised memory.
    module.kept = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory() as folder, _quiet_tensorflow():
        tf.saved_model.save(module, folder, signatures={"serving_default": serving_default.get_concrete_function(**specs)})
        return tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"]).convert()


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow from saying where the temporary files lie."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def _random_inputs(model: keras.Model) -> Any:
    if not getattr(model, "inputs", None):
        raise ValueError(
            f'The input shapes of the subclassed model "{model.name}" are not known. Pass check_data=: a few samples of its inputs.'
        )
    rng = np.random.default_rng(0)
    arrays = []
    for tensor in model.inputs:
        shape = (8, *(length or 8 for length in tensor.shape[1:]))
        is_float = keras.backend.is_float_dtype(tensor.dtype)
        arrays.append((rng.normal(size=shape) if is_float else rng.integers(0, 2, shape)).astype(tensor.dtype))
    return keras.tree.pack_sequence_as(model._inputs_struct, arrays) if hasattr(model, "_inputs_struct") else arrays[0]


def _compare(model: keras.Model, content: bytes, inputs: Any, tolerance: float) -> tuple[float, float]:
    expected = [np.asarray(output, "float64") for output in keras.tree.flatten(model.predict(inputs, verbose=0))]
    found = [np.asarray(output, "float64") for output in run_litert(content, inputs)]
    for outputs, whose in ((expected, "model"), (found, "LiteRT file")):
        if not all(np.all(np.isfinite(output)) for output in outputs):
            raise RuntimeError(f"The {whose} gives NaN or infinite outputs on `check_data`. Nothing was written.")
    difference, agreement = 0.0, 1.0
    for want, got in zip(expected, found, strict=True):
        difference = max(difference, float(np.max(np.abs(want - got))))
        if want.ndim > 1 and want.shape[-1] > 1:
            agreement = min(agreement, float(np.mean(want.argmax(-1) == got.argmax(-1))))
    scale = max(1.0, *(float(np.max(np.abs(want))) for want in expected))
    if not difference <= tolerance * scale:
        raise RuntimeError(
            f"The LiteRT file does not compute what the model computes: the largest difference is {difference:.3g} for outputs of "
            f"up to {scale:.3g} (tolerance={tolerance:g}), the same class in {agreement:.1%}. Nothing was written."
        )
    return difference, agreement


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
