"""How does a model leave Keras for the runtimes of ONNX, and does the file say the same?"""

import math
import numbers
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _agreement, _files, _litert, _samples
from keras_kd._progress import Progress, Verbose
from keras_kd.callbacks._kernels import sparsity_of
from keras_kd.export._arguments import check_number, checked_model, in_float32
from keras_kd.export.results import ExportReport, report_of
from keras_kd.quantized import QuantizedModel


def to_onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    check_data: Any = None,
    tolerance: float = 1e-3,
    opset: int = 17,
    verbose: Verbose = "auto",
) -> ExportReport:
    """Writes `model` as an ONNX file, after running it in onnxruntime against the model.

    It needs the extra `onnx` (tf2onnx, onnx, onnxruntime). A `QuantizedModel` has pairs of QuantizeLinear and DequantizeLinear
    where it rounds activations, and kernels that are rounded already.

    Args:
        model: a built Keras model, or a `QuantizedModel`; for a Distiller, its student.
        path: where to write. The folder must exist.
        check_data: inputs to compare on; see `to_litert`.
        tolerance: largest difference allowed, relative to the largest number of each output.
        opset: version of ONNX's operators.
        verbose: 0 is silent; 1 or `"auto"` counts the three steps: the model's outputs, the conversion, the file's outputs.

    Returns:
        An `ExportReport`.

    Raises:
        ImportError: if tf2onnx or onnxruntime is not installed.
        TypeError: if `model` is no Keras model.
        ValueError: if it is not built, its input shapes are not known and `check_data` is missing, or an argument has another
            value.
        OSError: if `path` lies in no folder, or cannot be written; what was there before still is.
        RuntimeError: if tf2onnx refuses the model, or the file's outputs are not the model's; nothing is left at `path`.
    """
    try:
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise ImportError("ONNX files need tf2onnx and onnxruntime: pip install 'keras-kd[onnx]'") from error
    given = checked_model(model)
    path = _files.checked_path(path)
    check_number("tolerance", tolerance, math.inf)
    if isinstance(opset, bool) or not isinstance(opset, numbers.Integral) or opset < 7:
        raise ValueError(f"`opset` must be a whole number of 7 or more. Received: opset={opset!r}.")
    name = "random inputs" if check_data is None else "`check_data`"
    inputs = _samples.random_inputs(given) if check_data is None else _samples.check_inputs(given, check_data, "check_data")
    with Progress(3, what="steps", title="ONNX", verbose=verbose) as progress:
        in_float = _agreement.outputs_of(given, inputs, name)
        progress.advance()
        model = in_float32(given)
        expected = in_float if model is given else _agreement.outputs_of(model, inputs, name)
        function, specs = _litert.serving_function(model, inputs, _samples.fixed_batch_size(model))
        signature = list(specs.values())
        try:
            with _litert.quiet_tensorflow():
                made, _ = tf2onnx.convert.from_function(_positional(function, specs), input_signature=signature, opset=int(opset))
        except Exception as error:
            raise RuntimeError(f'tf2onnx refuses "{model.name}". Nothing was written. It says: {error}') from error
        content = made.SerializeToString()
        progress.advance()
        options = onnxruntime.SessionOptions()
        # Without this, sums of 8 bits overflow on CPUs without VNNI.
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found = _agreement.as_floats(_run_onnx(session, list(specs), keras.tree.flatten(inputs)))
        progress.advance()
    agreement = _agreement.check_close(expected, found, tolerance, name)
    to_float = None if isinstance(given, QuantizedModel) else _agreement.compare(in_float, found)
    _files.write_atomically(path, content)
    operators: dict[str, int] = {}
    for node in made.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return report_of(
        *(path, content, agreement, to_float, _samples.count(inputs)),
        quantization="onnx",
        operators=operators,
        sparsity=sparsity_of(given),
    )


def _positional(function: Any, specs: dict[str, Any]) -> Any:
    return tf.function(lambda *tensors: function(**dict(zip(specs, tensors, strict=True))))


def _run_onnx(session: Any, names: list[str], arrays: list[np.ndarray], rows: int = 128) -> list[np.ndarray]:
    """Runs an ONNX file, some samples at a time."""
    entries = {entry.name: entry for entry in session.get_inputs()}
    size = next((entry.shape[0] for entry in entries.values() if isinstance(entry.shape[0], int)), None)
    count, rows = len(arrays[0]), size or rows
    whole = [_samples.whole_batches(array, size) if size else array for array in arrays]
    outputs = sorted((entry.name for entry in session.get_outputs()), key=lambda name: int(name.split("_")[1].split(":")[0]))
    parts = []
    for start in range(0, count, rows):
        batch = {name: array[start : start + rows] for name, array in zip(names, whole, strict=True)}
        parts.append(session.run(outputs, {name: part.astype(_onnx_dtype(entries[name].type)) for name, part in batch.items()}))
    return [np.concatenate(output)[:count] for output in zip(*parts, strict=True)]


def _onnx_dtype(name: str) -> str:
    return {"tensor(float)": "float32", "tensor(double)": "float64"}.get(name, name.removeprefix("tensor(").removesuffix(")"))
