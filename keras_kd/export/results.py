"""What was written, and how far is it from the model?"""

import dataclasses
import gzip
import pathlib
from typing import Any

from keras_kd import _files
from keras_kd._agreement import Agreement

MANY = 1 / 3  # of the kernels' weights: from so many zeros on, a file may be smaller without them


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
        sha256: digest of the file's content.
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
    sha256: str = ""
    sparsity: float = 0.0

    def __str__(self) -> str:
        shared = f"{self.agreement:.1%} of {self.samples:,} samples" if self.agreement < 1 else f"all {self.samples:,} samples"
        text = f"{self.path.name}: {self.quantization}, {self.size:,} bytes ({self.gzip_size:,} after gzip)"
        text += f"; agrees with the model on {shared}, largest difference {self.max_difference:.2g}"
        if self.float_agreement is not None and self.float_difference is not None and self.quantization not in ("float32", "onnx"):
            text += f"; with the plain model, before rounding, on {self.float_agreement:.1%}, {self.float_difference:.2g}"
        if self.sparsity >= 0.001:
            text += f"; zeros in kernels: {self.sparsity:.1%}"
            text += ", stored like other weights: they help after gzip only" if self.sparsity >= MANY and not self.sparse else ""
        return text


def report_of(
    path: pathlib.Path, content: bytes, agreement: Agreement, to_float: Agreement | None, samples: int, **facts: Any
) -> ExportReport:
    """The report of a file.

    Args:
        path: where it is.
        content: of it.
        agreement: with the model it was made of.
        to_float: with the plain model.
        samples: how many were compared.
        **facts: other attributes.
    """
    return ExportReport(
        path=path,
        size=len(content),
        gzip_size=len(gzip.compress(content, 9)),
        max_difference=agreement.difference,
        agreement=agreement.same,
        samples=samples,
        float_difference=None if to_float is None else to_float.difference,
        float_agreement=None if to_float is None else to_float.same,
        sha256=_files.digest(content),
        **facts,
    )
