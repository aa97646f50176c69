"""How does a model leave Keras, and does the file say the same? Writes LiteRT and ONNX files, which are run before."""

import dataclasses
import gzip
import math
import numbers
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _agreement, _files, _litert, _samples
from keras_kd._progress import Progress, Verbose
from keras_kd.callbacks import Quantization
from keras_kd.callbacks._kernels import sparsity_of
from keras_kd.quantized import QuantizedModel
from keras_kd.quantized._copying import copy_model
from keras_kd.quantized.model import quantized_parts, trained_with_rounding

_MODES = ("auto", "float32", "float16", "dynamic", "int8", "int4")
# Largest difference allowed, relative to the largest output: for files that round as the model does, and for those that do not.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1, "int4": 0.1, "int8 after training": 0.3}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the model.

    Attributes:
        path: the file.
        size: its length in bytes.
        gzip_size: its length in bytes after gzip.
        max_difference: largest absolute difference between the file's outputs and the model's; for a plain model that is quantised
            by ranges of its training, or that this library measured, those of the `QuantizedModel` that the integers should equal.
        agreement: share of rows in which the largest output of these is the same, in [0, 1]; 1.0 for single-valued outputs.
        samples: number of samples that were compared.
        quantization: "float32", "float16", "dynamic", "int8" or "int4"; "onnx" for ONNX files. Files of "int8" and "int4" are
            integers but for `float_operators`.
        sparse: whether zeros are left out of the file.
        input_dtypes: types of the inputs.
        output_dtypes: types of the outputs.
        operators: how often each operator occurs.
        float_operators: operators that compute on floats.
        float_difference: largest absolute difference between the file's outputs and those of the plain model that was handed over,
            as it computes in Keras: what quantising changes; None for a `QuantizedModel`.
        float_agreement: share of rows in which the largest output of these is the same; None for a `QuantizedModel`.
        sparsity: share of zeros in the model's weights that `callbacks.Pruning` works on, in [0, 1].
    """

    path: pathlib.Path
    size: int
    gzip_size: int
    max_difference: float
    agreement: float
    samples: int
    quantization: str = "float32"
    sparse: bool = False
    input_dtypes: tuple[str, ...] = ()
    output_dtypes: tuple[str, ...] = ()
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    float_operators: tuple[str, ...] = ()
    float_difference: float | None = None
    float_agreement: float | None = None
    sparsity: float = 0.0

    def __str__(self) -> str:
        shared = f"{self.agreement:.1%} of {self.samples:,} samples" if self.agreement < 1 else f"all {self.samples:,} samples"
        text = f"{self.path.name}: {self.quantization}, {self.size:,} bytes ({self.gzip_size:,} after gzip)"
        text += f"; agrees with the model on {shared}, largest difference {self.max_difference:.2g}"
        if self.float_agreement is not None and self.float_difference is not None and self.quantization != "float32":
            text += f"; with the plain model, before rounding, on {self.float_agreement:.1%}, {self.float_difference:.2g}"
        return text + (f"; zeros in kernels: {self.sparsity:.1%}" if self.sparsity >= 0.001 else "")


def to_litert(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    quantization: str = "auto",
    representative_data: Any = None,
    sparse: bool | str = "auto",
    io_dtype: str = "float32",
    check_data: Any = None,
    tolerance: float | None = None,
    min_agreement: float = 0.9,
    verbose: Verbose = "auto",
) -> ExportReport:
    """Writes `model` as a LiteRT (`.tflite`) file, after running it against the model.

    The file appears at `path` whole or not at all: it is run in the LiteRT interpreter on `check_data`, and written only if its
    outputs are the model's and it is what was asked for. Models of other precisions (mixed_float16, float64) are exported, and
    compared, in float32. A file takes any number of samples at a time; that of a model with a batch size of its own takes so many.
    Recurrent layers keep the converter from a free batch size: their files take one sample at a time.

    Args:
        model: a built Keras model, or a `QuantizedModel`; for a Distiller, its student.
        path: where to write. The folder must exist.
        quantization: "float32"; "float16": weights of half precision; "dynamic": int8 kernels, floats between the layers; "int8":
            integers throughout; "int4": the same with kernels of 4 bits. "auto": int8 (or what its bits are) for a
            `QuantizedModel`, for a model with `QuantizedModel`s inside, and for a model whose weights are still those that training
            with `callbacks.Quantization` left; int8 where there is `representative_data`; float32 otherwise. What cannot be
            integers stays in float then, as the report's `float_operators` say; "int8" and "int4" refuse it.
        representative_data: inputs that ranges are measured on, for "int8" and "int4" of a model that was not trained for it.
        sparse: whether the file leaves out zeros; "auto" does where a third of the kernels' weights or more is zero and the
            file becomes smaller; kernels of 4 bits stay whole.
        io_dtype: "float32", "int8" or "uint8": type of the inputs and outputs of a file of integers.
        check_data: inputs to compare on, nested as the model takes them, of any number of samples. None is
            `representative_data`, or 8 seeded random samples of the model's input shapes.
        tolerance: largest difference allowed, relative to the largest number of each output, or to the range of its integers if
            that is wider. None is 1e-3 for float32, 1e-2 for float16, 0.1 for integers, and 0.3 for integers of a plain model
            whose ranges TensorFlow measures on `representative_data`.
        min_agreement: smallest share of rows with the same largest output, in [0, 1], for integers where there is `check_data` or
            `representative_data`; without training, also of those in which the plain model gives it.
        verbose: 0 is silent; 1 or `"auto"` counts the four steps: the model's outputs, ranges, the conversion, the file's outputs.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is no Keras model, or another argument of the wrong type.
        ValueError: if it is not built, its input shapes are not known and `check_data` is missing, an argument has another value,
            data does not fit the model, or `representative_data` is missing where it is needed.
        OSError: if `path` lies in no folder, or cannot be written; what was there before still is.
        RuntimeError: if TensorFlow's converter refuses the model, the file's outputs are not the model's, or a file of integers
            has operators that compute on floats although "int8" or "int4" was asked for, or no others; nothing is left at `path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite", verbose=0)
    >>> report.agreement, report.max_difference < 1e-5
    (1.0, True)
    """
    model = _checked_model(model)
    path = _files.checked_path(path)
    _check_choice("quantization", quantization, _MODES)
    _check_choice("io_dtype", io_dtype, ("float32", "int8", "uint8"))
    _check_numbers(sparse, tolerance, min_agreement)
    given, data = model, None
    if representative_data is not None:
        data = _samples.check_inputs(model, representative_data, "representative_data", finite=True)
    real = check_data is not None or data is not None
    name = "`check_data`" if check_data is not None else "`representative_data`" if real else "random inputs"
    if check_data is not None:
        inputs = _samples.check_inputs(model, check_data, "check_data")
    else:
        inputs = data if real else _samples.random_inputs(model)
    progress = Progress(4, what="steps", title="LiteRT", verbose=verbose)
    in_float = _agreement.outputs_of(model, inputs, name)  # before all that takes time: it may not take these inputs
    progress.advance()
    model, mode, measured, after_training = _prepared(model, quantization, data)
    progress.advance()
    if io_dtype != "float32" and mode not in ("int8", "int4"):
        raise ValueError(
            f'`io_dtype` must be "float32" for a file of floats. Received: io_dtype="{io_dtype}", quantization="{mode}".'
        )
    model = _in_float32(model)
    expected = in_float if model is given else _agreement.outputs_of(model, inputs, name)
    content, is_sparse = _smallest(model, inputs, _options(mode, measured, io_dtype, _samples.fixed_batch_size(model) or 1), sparse)
    progress.advance()
    operators, floats = _litert.operators(content, keras.tree.flatten(inputs))
    _check_integers(quantization, mode, operators, floats)
    tolerance = _TOLERANCES["int8 after training" if measured is not None else mode] if tolerance is None else tolerance
    found = _agreement.as_floats(run_litert(content, inputs))
    progress.advance()
    progress.close()
    agreement = _agreement.check_close(expected, found, tolerance, name, _litert.output_ranges(content))
    to_float = None if isinstance(given, QuantizedModel) else _agreement.compare(in_float, found)
    if real and mode in ("int8", "int4"):
        same = min(agreement.same, to_float.same) if to_float is not None and after_training else agreement.same
        _check_same(same, min_agreement, _samples.count(inputs))
    _files.write_atomically(path, content)
    opened = open_litert(content)
    dtypes = [tuple(np.dtype(d["dtype"]).name for d in ds) for ds in (opened.get_input_details(), opened.get_output_details())]
    return ExportReport(
        *(path, len(content), len(gzip.compress(content, 9)), agreement.difference, agreement.same, _samples.count(inputs)),
        *(mode, is_sparse, dtypes[0], dtypes[1], operators, floats),
        float_difference=None if to_float is None else to_float.difference,
        float_agreement=None if to_float is None else to_float.same,
        sparsity=sparsity_of(given),
    )


def _check_numbers(sparse: Any, tolerance: Any, min_agreement: Any) -> None:
    if not isinstance(sparse, bool) and not (isinstance(sparse, str) and sparse == "auto"):
        raise ValueError(f'`sparse` must be True, False or "auto". Received: sparse={sparse!r}.')
    if tolerance is not None:
        _check_number("tolerance", tolerance, math.inf)
    _check_number("min_agreement", min_agreement, 1)


def _check_integers(quantization: str, mode: str, operators: dict[str, int], floats: tuple[str, ...]) -> None:
    """Refuses a file that computes on floats although integers were asked for, or without any integers."""
    if quantization in ("int8", "int4") and floats:
        raise RuntimeError(
            f"Not all of the file is integers: {', '.join(floats)} compute on floats. Nothing was written. Take layers that can "
            'be quantised, or quantization="auto", which lets the others be.'
        )
    if mode in ("int8", "int4") and not {"QUANTIZE", "DEQUANTIZE"} & operators.keys() and floats:
        raise RuntimeError(
            f"Nothing in the file is integers: {', '.join(floats)} compute on floats. Nothing was written. Give "
            '`representative_data` as `check_data`, and take quantization="float32", "float16" or "dynamic".'
        )


def _check_same(same: float, wanted: float, count: int) -> None:
    if same < wanted:
        raise RuntimeError(
            f"The file gives the model's class in {same:.1%} of {count} samples (min_agreement={wanted:g}). Nothing was written. "
            "Train with callbacks.Quantization, or give more representative data."
        )


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
    given = _checked_model(model)
    path = _files.checked_path(path)
    _check_number("tolerance", tolerance, math.inf)
    if isinstance(opset, bool) or not isinstance(opset, numbers.Integral) or opset < 7:
        raise ValueError(f"`opset` must be a whole number of 7 or more. Received: opset={opset!r}.")
    name = "random inputs" if check_data is None else "`check_data`"
    inputs = _samples.random_inputs(given) if check_data is None else _samples.check_inputs(given, check_data, "check_data")
    progress = Progress(3, what="steps", title="ONNX", verbose=verbose)
    in_float = _agreement.outputs_of(given, inputs, name)
    progress.advance()
    model = _in_float32(given)
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
    options.add_session_config_entry("session.x64quantprecision", "1")  # without it, sums of 8 bits overflow on CPUs without VNNI
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = _agreement.as_floats(_run_onnx(session, list(specs), keras.tree.flatten(inputs)))
    progress.advance()
    progress.close()
    agreement = _agreement.check_close(expected, found, tolerance, name)
    to_float = None if isinstance(given, QuantizedModel) else _agreement.compare(in_float, found)
    _files.write_atomically(path, content)
    operators: dict[str, int] = {}
    for node in made.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return ExportReport(
        *(path, len(content), len(gzip.compress(content, 9)), agreement.difference, agreement.same, _samples.count(inputs), "onnx"),
        operators=operators,
        float_difference=None if to_float is None else to_float.difference,
        float_agreement=None if to_float is None else to_float.same,
        sparsity=sparsity_of(given),
    )


def run_litert(file: str | os.PathLike[str] | bytes, inputs: Any, *, threads: int = 1) -> list[np.ndarray]:
    """Runs a LiteRT file on inputs of any number of samples.

    Args:
        file: a path, or the file's content.
        inputs: arrays nested as the Keras model takes them, in its order; floats, also where the file takes integers.
        threads: number of threads of the interpreter.

    Returns:
        The outputs in `keras.tree.flatten` order of the Keras model's; floats, also where the file gives integers.

    Raises:
        ValueError: if the inputs are not those that the file takes.
    """
    return _litert.run(open_litert(file, threads=threads), [np.asarray(array) for array in keras.tree.flatten(inputs)])


def open_litert(file: str | os.PathLike[str] | bytes, *, threads: int = 1) -> Any:
    """Opens a LiteRT file or its content in an interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    where = {"model_content": file} if isinstance(file, bytes) else {"model_path": os.fspath(file)}
    return Interpreter(**where, num_threads=threads)


def _checked_model(model: Any) -> keras.Model:
    model = getattr(model, "student", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f'`model` must be built. Received: the unbuilt model "{model.name}". Call it on a batch of data first.')
    return model


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}.")


def _check_number(name: str, value: Any, highest: float) -> None:
    rule = "a number of 0 or more" if highest == math.inf else f"a number from 0 to {highest:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {rule}. Received: {name}={value!r} of type {type(value).__name__}.")
    if not 0 <= float(value) <= highest:
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}.")


class _Prepared(NamedTuple):
    """What the converter gets.

    Attributes:
        model: the model to convert.
        mode: what its file is to be.
        measured: data on which the converter measures ranges, if it does.
        after_training: whether the model was quantised here, without training.
    """

    model: keras.Model
    mode: str
    measured: Any = None
    after_training: bool = False


def _prepared(model: keras.Model, quantization: str, data: Any) -> _Prepared:
    parts = _integers_of_parts(model)
    after_training = False
    if quantization in ("auto", "int8", "int4") and not isinstance(model, QuantizedModel):
        trained = trained_with_rounding(model)
        if trained is not None and quantization in ("auto", _integers_of(trained)):
            model = trained
        elif quantization != "auto" and data is None and quantization != parts:
            raise ValueError(
                f'quantization="{quantization}" needs `representative_data`, or a model that was trained with '
                f'callbacks.Quantization. Received: the plain model "{model.name}".'
            )
        elif quantization == "int4" and parts is None:
            model, after_training = _quantized(model, 4, data), True
    if isinstance(model, QuantizedModel):
        found = _integers_of(model)
        if quantization not in ("auto", found):
            raise ValueError(
                f'What "{model.name}" rounds makes a file of {found}. Received: quantization="{quantization}". Take "auto", or '
                "export the plain model inside, `model.model`."
            )
        return _Prepared(model.with_rounded_kernels() if found == "dynamic" else model, found, None, after_training)
    if quantization == "auto":
        quantization = (parts or "float32") if data is None else "int8"
    if quantization != "int8" or data is None:
        return _Prepared(model, quantization)
    if _has_loops(model):  # TensorFlow's own measuring of ranges crashes the process there
        return _Prepared(_quantized(model, 8, data), "int8", None, True)
    return _Prepared(model, "int8", data, True)


def _quantized(model: keras.Model, bits: int, data: Any) -> QuantizedModel:
    try:
        return Quantization(bits, calibration_data=data).quantize(model)
    except ValueError as error:
        raise ValueError(
            f'`representative_data` asks for a file of integers, which "{model.name}" cannot become: {error} Give it as '
            '`check_data`, and take quantization="float32", "float16" or "dynamic".'
        ) from error


def _integers_of_parts(model: keras.Model) -> str | None:
    """What the quantised models inside of a plain one ask for; None if there are none."""
    found = set() if isinstance(model, QuantizedModel) else {_integers_of(part) for part in quantized_parts(model)}
    return "int8" if len(found) > 1 else next(iter(found), None)


def _has_loops(model: keras.Model) -> bool:
    return any(isinstance(layer, keras.layers.RNN) and not layer.unroll for layer in model._flatten_layers())


def _integers_of(model: QuantizedModel) -> str:
    """What file a quantised model makes."""
    plan = model.plan
    if any(bits > 8 for bits in plan.bits.values()) or plan.activation_bits not in (None, 8):
        raise ValueError(
            "LiteRT has kernels of up to 8 bits, and activations of 8. Received: a model of kernels of "
            f"{', '.join(str(bits) for bits in sorted(set(plan.bits.values())))} bits and activations of {plan.activation_bits}."
        )
    if plan.activation_bits is None:
        return "dynamic"
    return "int4" if plan.bits and max(plan.bits.values()) <= 4 else "int8"


def _options(mode: str, data: Any, io_dtype: str, batch: int) -> Callable[[Any], None]:
    """A function that sets the converter's options."""

    def configure(converter: Any) -> None:
        if mode == "float32":
            return
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if mode == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if data is not None:
            arrays = [_samples.whole_batches(array, batch) for array in keras.tree.flatten(data)]

            def samples() -> Any:
                for i in range(0, min(len(arrays[0]), 500), batch):
                    yield {f"input_{index}": array[i : i + batch] for index, array in enumerate(arrays)}

            converter.representative_dataset = samples
        if io_dtype != "float32":
            converter.inference_input_type = converter.inference_output_type = tf.as_dtype(io_dtype)

    return configure


def _smallest(model: keras.Model, inputs: Any, configure: Callable[[Any], None], sparse: bool | str) -> tuple[bytes, bool]:
    """The file's content, and whether it leaves zeros out."""
    has_nibbles = _has_nibbles(model)
    if sparse is True and has_nibbles:
        raise ValueError(
            '`sparse` must be False or "auto" for kernels of 4 bits, which have no sparse form. Received: sparse=True.'
        )
    if sparse is not True:
        content = _litert.convert(model, inputs, configure)
        if sparse is False or sparsity_of(model) < 1 / 3 or has_nibbles:
            return content, False

    def configure_sparse(converter: Any) -> None:
        configure(converter)
        converter.optimizations = [*converter.optimizations, tf.lite.Optimize.EXPERIMENTAL_SPARSITY]

    if sparse is True:
        return _litert.convert(model, inputs, configure_sparse), True
    try:
        smaller = _litert.convert(model, inputs, configure_sparse)
        same = all(
            np.array_equal(one, other) for one, other in zip(run_litert(smaller, inputs), run_litert(content, inputs), strict=True)
        )
    except (RuntimeError, ValueError):  # LiteRT has sparse kernels for some operators
        return content, False
    return (smaller, True) if same and len(smaller) < len(content) else (content, False)


def _has_nibbles(model: keras.Model) -> bool:
    """Whether kernels have 4 bits or fewer: TensorFlow's converter ends the whole process where it is to make these sparse."""
    parts = [model] if isinstance(model, QuantizedModel) else quantized_parts(model)
    return any(bits <= 4 for part in parts for bits in part.plan.bits.values())


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


def _in_float32(model: keras.Model) -> keras.Model:
    """The model itself, or a twin of the same weights that computes in float32: LiteRT has no kernels for other precisions."""
    others = ("float16", "bfloat16", "float64")
    policies = {layer.dtype_policy.name for layer in model._flatten_layers() if layer.compute_dtype in others}
    if not policies:
        return model
    try:
        return copy_model(model, dtype="float32")
    except ValueError as error:
        raise ValueError(
            f'"{model.name}" computes in {", ".join(sorted(policies))}, LiteRT in float32, and the model cannot be rebuilt from '
            "its config in float32. Build it with the float32 policy, and set the weights."
        ) from error
