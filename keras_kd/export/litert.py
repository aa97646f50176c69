"""How does a model leave Keras for LiteRT, and does the file say the same? Runs each file before it is written."""

import math
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _agreement, _files, _litert, _samples
from keras_kd._progress import Progress, Verbose
from keras_kd.callbacks._kernels import sparsity_of
from keras_kd.export._arguments import check_choice, check_number, checked_model, in_float32
from keras_kd.export._integers import has_nibbles, prepared
from keras_kd.export.results import MANY, ExportReport, report_of
from keras_kd.quantized import QuantizedModel

_MODES = ("auto", "float32", "float16", "dynamic", "int8", "int4")
# Largest difference allowed, relative to the largest output: for files that round as the model does, and for those that do not.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1, "int4": 0.1, "int8 after training": 0.3}


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
            has operators that compute on floats although "int8" or "int4" was asked for, or no others, or LiteRT cannot run the
            file that `sparse=True` asks for; nothing is left at `path`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> report = keras_kd.export.to_litert(model, tmp_path / "model.tflite", verbose=0)
    >>> report.agreement, report.max_difference < 1e-5
    (1.0, True)
    """
    model = checked_model(model)
    path = _files.checked_path(path)
    check_choice("quantization", quantization, _MODES)
    check_choice("io_dtype", io_dtype, ("float32", "int8", "uint8"))
    _check_numbers(sparse, tolerance, min_agreement)
    given, data = model, None
    if representative_data is not None:
        data = _samples.check_inputs(model, representative_data, "representative_data", finite=True)
    inputs, name = _compared_on(model, check_data, data)
    with Progress(4, what="steps", title="LiteRT", verbose=verbose) as progress:
        in_float = _agreement.outputs_of(model, inputs, name)  # before all that takes time: it may not take these inputs
        progress.advance()
        model, mode, measured, after_training = prepared(model, quantization, data)
        progress.advance()
        _check_border(io_dtype, mode)
        model = in_float32(model)
        expected = in_float if model is given else _agreement.outputs_of(model, inputs, name)
        configure = _options(mode, measured, io_dtype, _samples.fixed_batch_size(model) or 1)
        content, is_sparse = _smallest(model, inputs, configure, sparse)
        progress.advance()
        operators, floats = _litert.operators(content, keras.tree.flatten(inputs))
        _check_integers(quantization, mode, operators, floats)
        tolerance = _TOLERANCES["int8 after training" if measured is not None else mode] if tolerance is None else tolerance
        found = _agreement.as_floats(run_litert(content, inputs))
        progress.advance()
    agreement = _agreement.check_close(expected, found, tolerance, name, _litert.output_ranges(content))
    to_float = None if isinstance(given, QuantizedModel) else _agreement.compare(in_float, found)
    if (check_data is not None or data is not None) and mode in ("int8", "int4"):
        same = min(agreement.same, to_float.same) if to_float is not None and after_training else agreement.same
        _check_same(same, min_agreement, _samples.count(inputs))
    _files.write_atomically(path, content)
    taken, given_back = _border_dtypes(content)
    return report_of(
        *(path, content, agreement, to_float, _samples.count(inputs)),
        quantization=mode,
        sparse=is_sparse,
        input_dtypes=taken,
        output_dtypes=given_back,
        operators=operators,
        float_operators=floats,
        sparsity=sparsity_of(given),
    )


def _compared_on(model: keras.Model, check_data: Any, data: Any) -> tuple[Any, str]:
    """The inputs that a file is compared on, and what messages call them."""
    if check_data is not None:
        return _samples.check_inputs(model, check_data, "check_data"), "`check_data`"
    return (_samples.random_inputs(model), "random inputs") if data is None else (data, "`representative_data`")


def _border_dtypes(content: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Types of the inputs and of the outputs."""
    opened = open_litert(content)
    inputs, outputs = opened.get_input_details(), opened.get_output_details()
    return tuple(np.dtype(one["dtype"]).name for one in inputs), tuple(np.dtype(one["dtype"]).name for one in outputs)


def _check_border(io_dtype: str, mode: str) -> None:
    if io_dtype != "float32" and mode not in ("int8", "int4"):
        raise ValueError(
            f'`io_dtype` must be "float32" for a file of floats. Received: io_dtype="{io_dtype}", quantization="{mode}".'
        )


def _check_numbers(sparse: Any, tolerance: Any, min_agreement: Any) -> None:
    if not isinstance(sparse, bool) and not (isinstance(sparse, str) and sparse == "auto"):
        raise ValueError(f'`sparse` must be True, False or "auto". Received: sparse={sparse!r}.')
    if tolerance is not None:
        check_number("tolerance", tolerance, math.inf)
    check_number("min_agreement", min_agreement, 1)


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
    nibbles = has_nibbles(model)
    if sparse is True and nibbles:
        raise ValueError(
            '`sparse` must be False or "auto" for kernels of 4 bits, which have no sparse form. Received: sparse=True.'
        )
    if sparse is not True:
        content = _litert.convert(model, inputs, configure)
        if sparse is False or sparsity_of(model) < MANY or nibbles:
            return content, False

    def configure_sparse(converter: Any) -> None:
        configure(converter)
        converter.optimizations = [*converter.optimizations, tf.lite.Optimize.EXPERIMENTAL_SPARSITY]

    if sparse is True:
        return _sparse_content(model, inputs, configure, configure_sparse), True
    try:
        smaller = _litert.convert(model, inputs, configure_sparse)
        same = all(
            np.array_equal(one, other) for one, other in zip(run_litert(smaller, inputs), run_litert(content, inputs), strict=True)
        )
    except (RuntimeError, ValueError):  # LiteRT has sparse kernels for some operators
        return content, False
    return (smaller, True) if same and len(smaller) < len(content) else (content, False)


def _sparse_content(
    model: keras.Model, inputs: Any, configure: Callable[[Any], None], configure_sparse: Callable[[Any], None]
) -> bytes:
    """A file without zeros, as it was asked for.

    Raises:
        RuntimeError: if LiteRT cannot run it, though it can run the one with zeros.
    """
    first = keras.tree.map_structure(lambda array: array[:1], inputs)
    try:
        content = _litert.convert(model, inputs, configure_sparse)
        run_litert(content, first)
    except (RuntimeError, ValueError) as error:
        run_litert(_litert.convert(model, inputs, configure), first)  # where this fails, too, it is not for the zeros
        raise RuntimeError(
            f'`sparse` must be "auto" or False for this file: LiteRT does not have sparse kernels for all operators and types, and '
            f"cannot run it without its zeros. Received: sparse=True. Nothing was written. It says: {error}"
        ) from error
    return content


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
