"""What do the converter and the interpreter need? Turns Keras models into LiteRT files, runs them, and says what is in them."""

import collections
import contextlib
import functools
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_kd._outputs import shapes_agree
from keras_kd._samples import fixed_batch_size, whole_batches
from keras_kd.quantized import QuantizedModel

# Operations on shapes, and those that turn numbers into integers or back at the border.
_NEUTRAL = {"QUANTIZE", "DEQUANTIZE", "SHAPE", "DELEGATE"}


def convert(model: keras.Model, inputs: Any, configure: Callable[[Any], None]) -> bytes:
    """Converts for the model's own batch size or any, or where the converter cannot, for one sample.

    Args:
        model: a built model.
        inputs: arrays nested as it takes them, for models that do not know their input shapes.
        configure: sets the converter's options.

    Raises:
        RuntimeError: if the converter refuses the model.
    """
    fixed = fixed_batch_size(model)
    try:
        return convert_for(model, inputs, fixed, configure)
    except Exception as error:
        try:
            return convert_for(model, inputs, fixed or 1, configure)
        except Exception:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise RuntimeError(f'TensorFlow\'s converter refuses "{model.name}". Nothing was written. It says: {reason}') from error


def convert_for(model: keras.Model, inputs: Any, batch: int | None, configure: Callable[[Any], None]) -> bytes:
    """Converts for one batch size."""
    function, specs = serving_function(model, inputs, batch)
    module = tf.Module()
    # The TensorFlow variables inside Keras' own: the saver finds no others, and the file would hold uninitialised memory.
    module.kept = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory() as folder, quiet_tensorflow():
        tf.saved_model.save(module, folder, signatures={"serving_default": function.get_concrete_function(**specs)})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        configure(converter)
        return converter.convert()


def serving_function(model: keras.Model, inputs: Any, batch: int | None) -> tuple[Any, dict[str, Any]]:
    """A `tf.function` of the model with inputs `input_0` and on and outputs `output_0` and on, and the specs of its inputs."""
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
        outputs = keras.tree.flatten(_call_without_scope(model, nested))
        return {f"output_{index}": tf.identity(output) for index, output in enumerate(outputs)}

    return serving_default, specs


def _call_without_scope(model: keras.Model, inputs: Any) -> Any:
    """The outputs in inference; the name of the model is left out of all names in the file, which holds them several times."""
    if isinstance(model, QuantizedModel):
        with model.rounding.active():
            return _call_without_scope(model.model, inputs)
    if type(model).call.__module__ in ("keras.src.models.functional", "keras.src.models.sequential"):
        return model.call(inputs, training=False)
    return model(inputs, training=False)


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow from saying where the temporary files lie, and that ranges need no data set.

    It logs through absl, which calls `logging.basicConfig` where the root logger has no handler: a user's own would do nothing
    afterwards. So it has one meanwhile.
    """
    logger, handler = tf.get_logger(), logging.NullHandler()
    level = logger.level
    logger.setLevel("ERROR")
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected")
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
            yield
    finally:
        logger.setLevel(level)
        logging.getLogger().removeHandler(handler)


def run(interpreter: Any, arrays: list[np.ndarray], rows: int = 128) -> list[np.ndarray]:
    """Runs a file on inputs of any number of samples; integers at its border stand for floats.

    Args:
        interpreter: of the file.
        arrays: inputs in the order of the model.
        rows: samples at a time, of files with a free batch size: memory does not grow with their number.

    Raises:
        ValueError: if the arrays are not those that the file takes.
    """
    runner = interpreter.get_signature_runner(signature_of(interpreter))
    details, outputs_by_name = in_order(runner.get_input_details(), "input"), in_order(runner.get_output_details(), "output")
    _check_arrays(interpreter, arrays, list(details.values()))
    fixed = [int(detail["shape_signature"][0]) for detail in interpreter.get_input_details() if len(detail["shape_signature"])]
    size = next((length for length in fixed if length > 0), None)
    found: list[dict[str, np.ndarray]] = []
    for start in range(0, len(arrays[0]), size or rows):
        parts = [array[start : start + (size or rows)] for array in arrays]
        count = len(parts[0])
        if size and count < size:  # the last one of a file with a fixed batch size
            parts = [whole_batches(part, size) for part in parts]
        given = {name: _to_border(part, detail) for (name, detail), part in zip(details.items(), parts, strict=True)}
        # Copies: what the runner gives may be views of memory that goes with the interpreter.
        found.append({name: np.array(value[:count] if size else value) for name, value in runner(**given).items()})
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return [_from_border(joined[name], detail) for name, detail in outputs_by_name.items()]


def signature_of(interpreter: Any) -> str:
    """The name of a file's signature.

    Raises:
        ValueError: if it has none.
    """
    names = list(interpreter.get_signature_list())
    if not names:
        raise ValueError("A LiteRT file must have a signature. Received: one without. Write it with keras_kd.export.to_litert.")
    return "serving_default" if "serving_default" in names else names[0]


def in_order(details: dict[str, Any], what: str) -> dict[str, Any]:
    """Inputs or outputs of a file in the order of its model's, which names of others do not tell where there are several.

    Raises:
        ValueError: if there are several, of names that `to_litert` does not give.
    """
    names = [f"{what}_{index}" for index in range(len(details))]
    if details.keys() == set(names):
        return {name: details[name] for name in names}
    if len(details) > 1:
        raise ValueError(
            f"A LiteRT file with several {what}s must name them {', '.join(names)}. Received: {', '.join(details)}. Write it with "
            "keras_kd.export.to_litert."
        )
    return details


def _check_arrays(interpreter: Any, arrays: list[np.ndarray], details: list[Any]) -> None:
    tensors = {detail["index"]: detail for detail in interpreter.get_input_details()}
    signatures = [tensors[detail["index"]]["shape_signature"] for detail in details]
    wanted = [tuple(None if length == -1 else int(length) for length in signature)[1:] for signature in signatures]
    fit = len(arrays) == len(tensors) == len(wanted) and all(map(shapes_agree, [array.shape[1:] for array in arrays], wanted))
    if not fit or len({len(array) for array in arrays}) != 1 or not len(arrays[0]):
        shapes = [tuple(int(n) for n in detail["shape_signature"]) for detail in tensors.values()]
        raise ValueError(
            f"`inputs` must be what the file takes, as many samples of each and at least one: {len(shapes)} of shapes {shapes}, "
            f"where -1 is any length. Received: arrays of shapes {[array.shape for array in arrays]}."
        )


def _to_border(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero = detail["quantization"]
    dtype = np.dtype(detail["dtype"])
    if not scale or dtype.kind == "f" or array.dtype.kind != "f":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(dtype)


def _from_border(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero = detail["quantization"]
    return array if not scale or array.dtype.kind == "f" else ((array.astype("float32") - zero) * np.float32(scale))


@functools.lru_cache(maxsize=1)
def _plain_resolver() -> Any:
    from ai_edge_litert.interpreter import OpResolverType

    return OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def operators(content: bytes, arrays: Any = None) -> tuple[dict[str, int], tuple[str, ...]]:
    """The operators of a file with their numbers, and those that compute on floats.

    Args:
        content: of the file.
        arrays: inputs of the model in its order, for files of unknown lengths.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=_plain_resolver())
    for detail in interpreter.get_input_details() if arrays is not None else []:
        index = re.search(r"input_(\d+)", detail["name"])
        if index and -1 in list(detail["shape_signature"])[1:]:
            interpreter.resize_tensor_input(detail["index"], (1, *np.shape(arrays[int(index[1])])[1:]))
    interpreter.allocate_tensors()
    kinds = {detail["index"]: np.dtype(detail["dtype"]).kind for detail in interpreter.get_tensor_details()}
    found: collections.Counter[str] = collections.Counter()
    floats: dict[str, None] = {}
    for operator in interpreter._get_ops_details():
        found[operator["op_name"]] += 1
        touched = [kinds.get(int(index)) for index in (*operator["inputs"], *operator["outputs"])]
        if "f" in touched and operator["op_name"] not in _NEUTRAL:
            floats[operator["op_name"]] = None
    return dict(found), tuple(floats)


class Border(NamedTuple):
    """An input or output of a file.

    Attributes:
        name: in the signature.
        shape: -1 where any length goes.
        dtype: of the arrays that the file takes or gives.
        stored: of the integers behind it; the same as `dtype` where there are none.
        scale: what one step of these integers stands for; 0.0 where there are none.
        zero: the integer that stands for 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    scale: float
    zero: int

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest number that the integers stand for."""
        integers = np.iinfo(self.stored)
        return self.scale * (int(integers.min) - self.zero), self.scale * (int(integers.max) - self.zero)


def borders(content: bytes) -> tuple[list[Border], list[Border]]:
    """Inputs and outputs of a file, in the order of the model's.

    Raises:
        ValueError: if the file has no signature, or several inputs of names that `to_litert` does not give.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=_plain_resolver())
    runner = interpreter.get_signature_runner(signature_of(interpreter))
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    steps = interpreter._get_ops_details()
    sides = []
    for details, what, operator, here, there in (
        (runner.get_input_details(), "input", "QUANTIZE", "inputs", "outputs"),
        (runner.get_output_details(), "output", "DEQUANTIZE", "outputs", "inputs"),
    ):
        behind = {int(step[here][0]): int(step[there][0]) for step in steps if step["op_name"] == operator}
        found = []
        for name, detail in in_order(details, what).items():
            index = detail["index"]
            outside = tensors[index]
            is_float = np.dtype(outside["dtype"]).kind == "f"  # integers at the border have a scale of their own
            inside = tensors[behind.get(index, index)] if is_float else outside
            scale, zero = inside["quantization"]
            shape = tuple(int(length) for length in outside["shape_signature"])
            found.append(Border(name, shape, _dtype(outside), _dtype(inside), float(scale), int(zero)))
        sides.append(found)
    return sides[0], sides[1]


def _dtype(detail: dict[str, Any]) -> str:
    return np.dtype(detail["dtype"]).name


def output_ranges(content: bytes) -> list[float]:
    """Widths of the ranges that a file's integers have for its outputs, in the order of the model's; 0 for outputs of floats."""
    return [255 * one.scale if np.dtype(one.stored).itemsize == 1 else 0.0 for one in borders(content)[1]]
