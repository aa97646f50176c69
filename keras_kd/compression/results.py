"""What did `compress` try, and what came of it?"""

import dataclasses
import json
import pathlib
from typing import Any

from keras_kd.quantized import QuantizedModel


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A file that was made and measured.

    Attributes:
        name: how: such as "channels, trained".
        share: of the work that was to be kept when channels and ranks were chosen.
        epochs: of distillation, those that were begun; 0 without any.
        size: bytes of the LiteRT file; 0 if there is none.
        score: accuracy of the file on the validation data, in [0, 1]; without labels its agreement with the original; for numbers
            minus the mean squared error.
        parameters: number of weights.
        seconds: that it took.
        fits: whether the file is within the budget.
        note: why there is no file; "" otherwise.
        bits: of the kernels' weights.
        stopped: whether the time limit ended a training, so that the last of the epochs may not be a whole one.
    """

    name: str
    share: float
    epochs: int
    size: int
    score: float
    parameters: int
    seconds: float
    fits: bool
    note: str = ""
    bits: int = 8
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Compression:
    """What `compress` found.

    Attributes:
        model: the best model within the budget: a `QuantizedModel`, which computes what the file does.
        path: its LiteRT file.
        best: the attempt that made it.
        attempts: all of them, in order.
        budget: bytes.
        original_score: of the model that was handed over, in float32.
        original_size: bytes of its float32 file.
        what: "accuracy", "agreement" or "minus the mean squared error": what scores are.
    """

    model: QuantizedModel
    path: pathlib.Path
    best: Attempt
    attempts: tuple[Attempt, ...]
    budget: int
    original_score: float
    original_size: int
    what: str

    def as_dict(self) -> dict[str, Any]:
        """Everything but the model, in types that JSON knows."""
        rest = {name: getattr(self, name) for name in ("budget", "original_score", "original_size", "what")}
        attempts = [dataclasses.asdict(one) for one in self.attempts]
        return {"path": str(self.path), "best": dataclasses.asdict(self.best), "attempts": attempts} | rest

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        from rich import table
        from rich.console import Console

        made = table.Table(box=None, pad_edge=False)
        for heading in ("attempt", self.what, "bytes", "weights", "epochs", "seconds", ""):
            made.add_column(heading, justify="left" if heading in ("attempt", "") else "right")
        made.add_row("original, float32", f"{self.original_score:.4f}", f"{self.original_size:,}", "", "", "", "")
        for one in self.attempts:
            mark = "chosen" if one == self.best else one.note if one.note else "" if one.fits else "over the budget"
            mark = ", ".join(filter(None, [mark, "stopped by the time limit" * one.stopped]))
            score, size = ("", "") if one.note else (f"{one.score:.4f}", f"{one.size:,}")
            made.add_row(one.name, score, size, f"{one.parameters:,}", str(one.epochs or ""), f"{one.seconds:.0f}", mark)
        console = Console(width=140, markup=False, highlight=False, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(made)
        table_text = "\n".join(line.rstrip() for line in captured.get().splitlines())
        return f"{table_text}\nbudget {self.budget:,} bytes; written: {self.path}"
