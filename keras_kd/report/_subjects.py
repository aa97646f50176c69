"""What is compared? Models, and files of models, behind one face: outputs, the content of a LiteRT file, layers."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_kd import _agreement, _litert, _outputs, _samples
from keras_kd.export import open_litert, to_litert
from keras_kd.profile import LayerProfile, layer_profiles, unchanged
from keras_kd.quantized import QuantizedModel
from keras_kd.quantized.model import quantized_parts
from keras_kd.report._weights import Weights, weights_of
from keras_kd.report.results import LayerRow


class Subject:
    """One of the models that are compared.

    Attributes:
        name: as it was handed over.
        kind: "Keras", "quantized Keras" or "LiteRT".
        notes: what could not be measured, and why.
        content: of its LiteRT file; None until `measure`, or if there is none.
        layers: those that hold weights, after `measure`.
        bits: mean bits of a weight in the file.
        parameters: number of weights.
        nonzero_parameters: how many are not 0.
        macs: multiply-accumulates; None for files.
    """

    kind = ""

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []
        self.content: bytes | None = None
        self.layers: tuple[LayerRow, ...] = ()
        self.bits: float | None = None
        self.parameters, self.nonzero_parameters = 0, 0
        self.macs: int | None = None

    def outputs(self, x: Any) -> list[np.ndarray]:
        """What it gives for a batch, flat and in float64.

        Raises:
            ValueError: if it does not take this batch; the message names the model.
        """
        try:
            return self._outputs(x)
        except (TypeError, ValueError) as error:
            raise type(error)(f'models["{self.name}"] does not take `data`. {error}') from error

    def output_kind(self, index: int) -> str | None:
        """What an output holds, as far as the model tells."""
        return None

    def measure(self, x: Any) -> None:
        """Finds its file and its layers.

        Args:
            x: some samples.
        """
        raise NotImplementedError

    def _outputs(self, x: Any) -> list[np.ndarray]:
        raise NotImplementedError

    def _count(self, weights: list[Weights]) -> None:
        total = sum(one.parameters for one in weights)
        self.bits = sum(one.bits * one.parameters for one in weights) / total if total else None


class LitertSubject(Subject):
    """A LiteRT file."""

    kind = "LiteRT"

    def __init__(self, name: str, path: pathlib.Path) -> None:
        super().__init__(name)
        self.content = path.read_bytes()
        try:
            self._weights = weights_of(self.content)
            self._interpreter = open_litert(self.content)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f'models["{name}"] must be a LiteRT file. Received: "{path}". {error}') from error

    def _outputs(self, x: Any) -> list[np.ndarray]:
        arrays = [np.asarray(array) for array in keras.tree.flatten(x)]
        return _agreement.as_floats(_litert.run(self._interpreter, arrays))

    def measure(self, x: Any) -> None:
        """Counts what the file holds."""
        self._count(self._weights)
        names = _unique([one.name for one in self._weights])
        self.layers = tuple(
            LayerRow(name, one.operator, one.parameters, one.nonzero, one.bits, None)
            for name, one in zip(names, self._weights, strict=True)
        )
        self.parameters = sum(one.parameters for one in self._weights)
        self.nonzero_parameters = sum(one.nonzero for one in self._weights)


class KerasSubject(Subject):
    """A Keras model; `QuantizedModel`s are exported as what they are, others in float32."""

    kind = "Keras"

    def __init__(self, name: str, model: keras.Model) -> None:
        super().__init__(name)
        self.model = model
        if isinstance(model, QuantizedModel):
            self.kind = "quantized Keras"

    def _outputs(self, x: Any) -> list[np.ndarray]:
        x = _samples.check_inputs(self.model, x, "data")
        with unchanged(self.model):
            return _agreement.outputs_of(self.model, x, "`data`")

    def output_kind(self, index: int) -> str | None:
        """What the graph says."""
        kinds = _outputs.output_kinds(getattr(self.model, "model", self.model) if self.kind != "Keras" else self.model)
        return kinds[index] if index < len(kinds) else None

    def measure(self, x: Any) -> None:
        """Exports the model to a temporary file, and counts what its layers hold."""
        x = _samples.check_inputs(self.model, x, "data")
        with unchanged(self.model):
            self.content = self._exported(x)
        if self.content is not None:
            self._count(weights_of(self.content))
        model, bits = self._counted()
        profiles = self._profiles(model, x)
        self.parameters = model.count_params()
        self.nonzero_parameters = sum(int(np.count_nonzero(array)) for array in model.get_weights())
        self.layers = tuple(
            LayerRow(one.path, one.kind, one.parameters, one.nonzero_parameters, bits(one.path), one.macs)
            for one in profiles
            if one.parameters
        )

    def _profiles(self, model: keras.Model, x: Any) -> tuple[LayerProfile, ...]:
        """The layers; none, with a note, where the model cannot be traced for one sample."""
        try:
            profiles = layer_profiles(model, x)
        except ValueError as error:  # stateful layers of a batch size of their own
            self.notes.append(f"No layers, no multiply-accumulates: {str(error).strip().splitlines()[0]}")
            return ()
        self.macs = sum(one.macs or 0 for one in profiles)
        uncounted = [one.path for one in profiles if one.macs is None]
        if uncounted:
            self.notes.append(f"Multiply-accumulates without those of {', '.join(uncounted)}.")
        return profiles

    def _exported(self, x: Any) -> bytes | None:
        rounds = isinstance(self.model, QuantizedModel) or quantized_parts(self.model)
        some = keras.tree.map_structure(lambda array: array[:32], x)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.tflite"
            try:
                to_litert(
                    self.model, path, quantization="auto" if rounds else "float32", check_data=some, min_agreement=0.0, verbose=0
                )
            except (RuntimeError, ValueError) as error:
                self.notes.append(f"No LiteRT file: {error}")
                return None
            return path.read_bytes()

    def _counted(self) -> tuple[keras.Model, Callable[[str], float]]:
        """The model whose weights count, where rounding has made its zeros; and the bits of a layer's kernels."""
        model = self.model
        if not isinstance(model, QuantizedModel):
            return model, lambda path: 32.0
        bits = model.plan.bits
        try:
            return model.with_rounded_kernels(), lambda path: float(bits.get(path, 32))
        except (TypeError, ValueError):  # what cannot be copied counts as it was before rounding
            return model.model, lambda path: float(bits.get(path, 32))


def open_subject(name: Any, value: Any) -> Subject:
    """Opens one of the models.

    Raises:
        TypeError: if the name is no string, or it is neither a model nor a path.
        ValueError: if it is not built, or a file of another kind.
        FileNotFoundError: if there is no such file.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"`models` must have strings as names. Received: {name!r} of type {type(name).__name__}.")
    if isinstance(value, str | os.PathLike):
        return _open_file(name, pathlib.Path(value))
    if hasattr(value, "students"):
        raise TypeError(f'models["{name}"] must be one model. Received: a MutualDistiller. Give its `students` one by one.')
    return _keras_subject(name, value)


def _open_file(name: str, path: pathlib.Path) -> Subject:
    if not path.is_file():
        raise FileNotFoundError(f'models["{name}"] must be a file that exists. Received: "{path}".')
    if path.suffix == ".tflite":
        return LitertSubject(name, path)
    if path.suffix != ".keras":
        raise ValueError(f'models["{name}"] must be a file of the kind .keras or .tflite. Received: "{path}".')
    return _keras_subject(name, keras.saving.load_model(path, compile=False))


def _keras_subject(name: str, value: Any) -> Subject:
    model = getattr(value, "student", value)
    if not isinstance(model, keras.Model):
        raise TypeError(
            f'models["{name}"] must be a Keras model, or the path of a .keras or .tflite file. Received: {value!r} of type '
            f"{type(value).__name__}."
        )
    if not model.built:
        raise ValueError(f'models["{name}"] must be built. Received: the unbuilt model "{model.name}". Call it on a batch first.')
    return KerasSubject(name, model)


def _unique(names: list[str]) -> list[str]:
    """Names with a number behind those that were there before."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found
