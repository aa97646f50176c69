"""What does a card say? Its sections, of what a file holds and what was measured of it."""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from keras_kd import _litert
from keras_kd._litert import Border
from keras_kd.export import ExportReport, open_litert
from keras_kd.report._weights import weights_of
from keras_kd.report.results import Comparison, ModelRow, columns_of

_LENGTHS = (1, 8, 32, 224)  # tried where a file takes any: small ones are shorter than some windows


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a file.

    Attributes:
        file: its name.
        content: of it.
        exported: what `to_litert` said of it.
        comparison: what was measured.
        row: of the file in it.
        dataset: what it was measured on.
    """

    file: str
    content: bytes
    exported: ExportReport | None
    comparison: Comparison | None
    row: ModelRow | None
    dataset: str | None


def body(facts: Facts, *, description: str, made: Sequence[str], limits: Sequence[str]) -> str:
    """The Markdown after the metadata."""
    inputs, outputs = _litert.borders(facts.content)
    arrays = _example(facts.content, inputs)
    restrictions = [*_found_limits(facts, inputs), *limits]
    sections = [
        f"# {pathlib.Path(facts.file).stem}",
        description.strip(),
        _what(facts, arrays),
        "## How it was made\n\n" + _listed(made) if made else "",
        _measured(facts),
        _borders(inputs, outputs),
        ""
        if arrays is None
        else f"## How to run it\n\n```python\n{_code(facts.file, facts.content, inputs, outputs, arrays)}\n```",
        "## Limits\n\n" + _listed(restrictions) if restrictions else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _example(content: bytes, inputs: list[Border]) -> list[np.ndarray] | None:
    """Zeros that the file takes; None if no length that is tried goes."""
    lengths = _LENGTHS if any(-1 in one.shape[1:] for one in inputs) else (1,)
    for length in lengths:
        shapes = [tuple(1 if n == -1 and not i else length if n == -1 else n for i, n in enumerate(one.shape)) for one in inputs]
        arrays = [np.zeros(shape, one.dtype) for shape, one in zip(shapes, inputs, strict=True)]
        try:
            _litert.run(open_litert(content), arrays)
        except (RuntimeError, ValueError):
            continue
        return arrays
    return None


def _what(facts: Facts, arrays: list[np.ndarray] | None) -> str:
    weights = weights_of(facts.content)
    total, nonzero = sum(one.parameters for one in weights), sum(one.nonzero for one in weights)
    origin = "" if facts.exported is None else " that keras_kd exported from a Keras model"
    lines = [f"`{facts.file}` is a LiteRT (TensorFlow Lite) file{origin}."]
    lines.append(f"It has {len(facts.content):,} bytes, {len(gzip.compress(facts.content, 9)):,} after gzip.")
    if total:
        bits = sum(one.bits * one.parameters for one in weights) / total
        lines.append(f"Its {total:,} weights have {bits:.3g} bits in the mean; {total - nonzero:,} of them are 0.")
    if arrays is not None:
        operators, floats = _litert.operators(facts.content, arrays)
        lines.append(f"Operators: {', '.join(f'{name} ({count})' for name, count in operators.items() if name != 'DELEGATE')}.")
        lines.append(f"On floats compute {', '.join(floats)}." if floats else "All of them compute on integers.")
    return "\n".join(lines + _checked(facts.exported))


def _checked(exported: ExportReport | None) -> list[str]:
    if exported is None:
        return []
    samples = f"{exported.samples:,} sample{'s' * (exported.samples > 1)}"
    lines = [
        f"Before it was written ({exported.quantization}) it was run against the model on {samples}: the largest output was the "
        f"same one in {exported.agreement:.1%} of the rows, the largest difference {exported.max_difference:.2g}."
    ]
    if exported.float_agreement is not None and exported.quantization != "float32":
        lines.append(f"Against the model in floats it is the same one in {exported.float_agreement:.1%}.")
    return lines


def _measured(facts: Facts) -> str:
    found = facts.comparison
    if found is None:
        return ""
    columns = columns_of(found)
    rows = [[column.heading for column in columns], ["---" if column.is_text else "---:" for column in columns]]
    rows += [[column.shown(row) for column in columns] for row in found.rows]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    data = f" of {facts.dataset}" if facts.dataset else ""
    told = [f"On {found.samples:,} samples{data}. This file is `{facts.row.name if facts.row else facts.file}`; agreement is with"]
    told[0] += f" `{found.reference}`."
    if any(row.latency is not None for row in found.rows):
        told.append("Latency is that of one sample on one thread, on the machine of the comparison: the median.")
    told.append(f"Versions: {', '.join(f'{name} {version}' for name, version in found.versions.items())}.")
    summary = found.summary()
    return "\n\n".join(["## Measured", table, "\n".join(told), *([_listed(summary)] if summary else [])])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _borders(inputs: list[Border], outputs: list[Border]) -> str:
    head = "| | name | shape | type | integers | scale | zero point |\n|---|---|---|---|---|---:|---:|"
    rows = [_border_row("input", one) for one in inputs] + [_border_row("output", one) for one in outputs]
    notes = ["A length of -1 is any."] if any(-1 in one.shape for one in (*inputs, *outputs)) else []
    if any(one.scale for one in (*inputs, *outputs)):
        notes.append("An integer i stands for scale * (i - zero point).")
        if any(one.scale and one.dtype != one.stored for one in (*inputs, *outputs)):
            notes.append("Where the type is a float the file turns it into these integers, or back, itself.")
    return "\n\n".join(["## Inputs and outputs", "\n".join([head, *rows]), *([" ".join(notes)] if notes else [])])


def _border_row(what: str, one: Border) -> str:
    integers = (one.stored, f"{one.scale:.9g}", str(one.zero)) if one.scale else ("", "", "")
    return f"| {what} | `{_cell(one.name)}` | {one.shape} | {one.dtype} | {' | '.join(integers)} |"


def _code(file: str, content: bytes, inputs: list[Border], outputs: list[Border], arrays: list[np.ndarray]) -> str:
    """Runs the file on zeros."""
    lines = [
        "import numpy as np",
        "from ai_edge_litert.interpreter import Interpreter",
        "",
        f"interpreter = Interpreter(model_path={json.dumps(file)})",
        f"run = interpreter.get_signature_runner({json.dumps(_litert.signature_of(open_litert(content)))})",
    ]
    for index, (one, array) in enumerate(zip(inputs, arrays, strict=True)):
        is_integer = bool(one.scale) and one.dtype == one.stored
        lines.append(f'x{index} = np.zeros({array.shape}, "{"float32" if is_integer else one.dtype}")  # your samples')
        if is_integer:
            low, high = np.iinfo(one.dtype).min, np.iinfo(one.dtype).max
            lines.append(
                f'x{index} = np.clip(np.round(x{index} / {one.scale!r}) {one.zero:+d}, {low}, {high}).astype("{one.dtype}")'
            )
    given = ", ".join(f"{json.dumps(one.name)}: x{index}" for index, one in enumerate(inputs))
    lines.append(f"found = run(**{{{given}}})")
    for index, one in enumerate(outputs):
        value = f"found[{json.dumps(one.name)}]"
        if one.scale and one.dtype == one.stored:
            value = f'({value}.astype("float32") {-one.zero:+d}) * {one.scale!r}'
        lines += [f"y{index} = {value}", f"print(y{index})"]
    return "\n".join(lines)


def _found_limits(facts: Facts, inputs: list[Border]) -> list[str]:
    found = []
    for one in inputs:
        if one.scale:
            low, high = one.limits
            found.append(f"Numbers in `{one.name}` below {low:.4g} count as {low:.4g}, those above {high:.4g} as {high:.4g}.")
        if one.shape and one.shape[0] > 0:
            found.append(f"`{one.name}` takes {one.shape[0]} sample{'s' * (one.shape[0] > 1)} at a time, no other number.")
    if facts.row is None:
        found.append("How often it is right was not measured.")
    elif facts.row.accuracy is None and facts.row.loss is None:
        found.append("It was measured without labels: how often it is right is not known.")
    return [*found, *(facts.row.notes if facts.row else ())]
