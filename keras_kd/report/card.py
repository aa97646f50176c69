"""What should a stranger know of this file? Writes a model card beside it, as Hugging Face reads them, of what was measured."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from keras_kd import _files
from keras_kd.export import ExportReport
from keras_kd.report import _card_text
from keras_kd.report._card_text import Facts
from keras_kd.report._front_matter import front_matter
from keras_kd.report.results import Comparison, ModelRow


def model_card(
    file: str | os.PathLike[str] | ExportReport,
    path: str | os.PathLike[str] | None = None,
    *,
    comparison: Comparison | None = None,
    name: str | None = None,
    description: str = "",
    made: Sequence[str] = (),
    limits: Sequence[str] = (),
    task: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model card for a LiteRT file: Markdown that begins with metadata in YAML, as the Hugging Face Hub shows it.

    The card holds what the file itself says (bytes, weights, operators, inputs and outputs with shapes, types and scales), what
    `comparison` measured, what you say in the arguments, and code that runs the file. What nobody measured or said is left out.

    Args:
        file: the path of a `.tflite` file, or what `export.to_litert` returned: then the card says how far the file is from the
            model, too.
        path: where to write. None is `README.md` beside the file.
        comparison: what `compare` measured of this file, and of others beside it.
        name: the file's name in the comparison, if several LiteRT files there are this very one.
        description: what the model is for: Markdown.
        made: how it was made: a line for each step.
        limits: what it is not good for: a line each, after those that follow from the file and the comparison.
        task: as the Hub calls it, such as "image-classification".
        dataset: what the comparison was measured on: its name on the Hub, or another. With `task`, the measured numbers go into
            the metadata, too (`model-index`).
        license: as the Hub calls it, such as "apache-2.0".
        metadata: other fields of the metadata, such as `{"language": "en", "base_model": "..."}`, or other values for those
            above.
        overwrite: whether a file at `path` is replaced.

    Returns:
        The path of the card.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the file is no LiteRT file, or the comparison measured another one.
        FileNotFoundError: if there is no such file.
        FileExistsError: if there is something at `path`, and `overwrite` is False.
        OSError: if the card cannot be written.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> exported = keras_kd.export.to_litert(model, tmp_path / "student.tflite")
    >>> x, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 3
    >>> comparison = keras_kd.report.compare({"student": exported.path}, x, y, verbose=0)
    >>> card = keras_kd.report.model_card(exported, comparison=comparison, license="apache-2.0")
    >>> print(card.read_text()[:49])
    ---
    library_name: "tflite"
    license: "apache-2.0"

    Reference: Mitchell et al., Model Cards for Model Reporting, 2019, and the metadata of the Hugging Face Hub.
    """
    _check_texts(description=description, task=task, dataset=dataset, license=license, name=name)
    made, limits = _checked_lines("made", made), _checked_lines("limits", limits)
    exported = file if isinstance(file, ExportReport) else None
    place, content = _read(file.path if isinstance(file, ExportReport) else file)
    digest = _files.digest(content)
    if exported is not None and exported.sha256 != digest:
        raise ValueError(
            f'`file` must be the report of the file that is there. Received: a report of {exported.size:,} bytes, and "{place}", '
            f"{len(content):,} bytes, which holds others. Export it again."
        )
    target = _target(place.with_name("README.md") if path is None else path, overwrite)
    row = None if comparison is None else _row(comparison, name, digest)
    facts = Facts(place.name, content, exported, comparison, row, dataset)
    values = {"library_name": "tflite", "license": license, "pipeline_tag": task, "tags": _tags(exported)}
    values |= {"datasets": [dataset] if dataset else None} | _results(facts, task)
    known = {key: value for key, value in values.items() if value is not None} | dict(_checked_metadata(metadata))
    text = front_matter(known) + _card_text.body(facts, description=description, made=made, limits=limits)
    _files.write_atomically(target, text.encode())
    return target


def _check_texts(**texts: Any) -> None:
    for key, value in texts.items():
        if not isinstance(value, str) and (value is not None or key == "description"):
            raise TypeError(f"`{key}` must be text. Received: {key}={value!r} of type {type(value).__name__}.")


def _checked_lines(name: str, lines: Any) -> list[str]:
    if isinstance(lines, str) or not isinstance(lines, Sequence) or not all(isinstance(line, str) for line in lines):
        raise TypeError(f"`{name}` must be a list of lines of text. Received: {name}={lines!r}.")
    return list(lines)


def _checked_metadata(metadata: Any) -> Mapping[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"`metadata` must be a dict of fields. Received: metadata={metadata!r} of type {type(metadata).__name__}.")
    return metadata or {}


def _read(file: Any) -> tuple[pathlib.Path, bytes]:
    if not isinstance(file, str | os.PathLike):
        raise TypeError(
            f"`file` must be a path, or what to_litert returned. Received: file={file!r} of type {type(file).__name__}."
        )
    place = pathlib.Path(file)
    if not place.is_file():
        raise FileNotFoundError(f'`file` must be a file that exists. Received: file="{place}".')
    content = place.read_bytes()
    if content[4:8] != b"TFL3":
        raise ValueError(f'`file` must be a LiteRT file, as to_litert writes it. Received: file="{place}", which is none.')
    return place, content


def _target(path: Any, overwrite: bool) -> pathlib.Path:
    target = _files.checked_path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f'"{target}" is there already. Give another `path`, or overwrite=True.')
    return target


def _row(comparison: Any, name: str | None, digest: str) -> ModelRow:
    """The row of a file with this content."""
    if not isinstance(comparison, Comparison):
        raise TypeError(f"`comparison` must be what `compare` returned. Received: comparison={comparison!r}.")
    same = {row.name: row for row in comparison.rows if row.sha256 == digest}
    files = [row.name for row in same.values() if row.kind == "LiteRT"]  # beside the models whose files are the same
    if name is None and len(files) == 1:
        (name,) = files
    if name not in same:
        told = ", ".join(f'"{row.name}" ({row.kind})' for row in comparison.rows)
        raise ValueError(
            "`comparison` must have one row of this very file, or `name` say which of several. Received: "
            f"name={name!r}, rows of this file: {', '.join(same) or 'none'}, of {told}. Hand the path of the file to `compare`."
        )
    return same[name]


def _tags(exported: ExportReport | None) -> list[str]:
    tags = ["keras", "keras-kd", "litert", "tflite"]
    return tags if exported is None or exported.quantization == "float32" else [*tags, exported.quantization]


def _results(facts: Facts, task: str | None) -> dict[str, Any]:
    """The fields `metrics` and `model-index`: the Hub wants task and data set for the second."""
    row, comparison = facts.row, facts.comparison
    if row is None or comparison is None:
        return {}
    measured = {"accuracy": row.accuracy} if comparison.task != "numbers" else {"mse": row.loss}
    known = {key: value for key, value in (measured | row.metrics).items() if value is not None}
    if not known:
        return {}
    found: dict[str, Any] = {"metrics": list(known)}
    if task and facts.dataset:
        results = {
            "task": {"type": task},
            "dataset": {"type": facts.dataset, "name": facts.dataset},
            "metrics": [{"type": key, "value": value} for key, value in known.items()],
        }
        found["model-index"] = [{"name": pathlib.Path(facts.file).stem, "results": [results]}]
    return found
