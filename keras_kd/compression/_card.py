"""How does a stranger learn what a compressed file is? Writes the card of a folder, and leaves one that somebody edited."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from keras_kd import _files, report
from keras_kd.compression.results import Compression

_RUNS = 30  # timed inferences of each file
_CHOSEN = "The choice among the files was made by the samples that it was measured on, so that its numbers are a little too good."
_SEEN = (
    "Measured on samples that the original may have been trained on, as no validation data were given: on others its numbers, and "
    "those of this file, may be worse."
)


def write_card(
    found: Compression,
    validation: tuple[Any, Any],
    learning_rate: float,
    former: Mapping[str, Any] | None,
    keep: Callable[[dict[str, Any]], None],
    *,
    is_held_out: bool = False,
) -> bool:
    """Writes `README.md` beside the file of a compression, unless it tells the same already.

    Args:
        found: the result; `original.tflite` lies beside its file.
        validation: `(x, y)` that the choice was made by.
        learning_rate: of the first training.
        former: what was kept when a card was written before; None if there was none.
        keep: is given what is to be kept, before the card is at its place: so no interruption makes it a stranger's.
        is_held_out: whether the validation data are a part of what was given for training.

    Returns:
        Whether the card is there; False if somebody edited it, and it stays.
    """
    path = found.path.with_name("README.md")
    told = {name: value for name, value in found.as_dict().items() if name != "path"} | ({"held_out": True} if is_held_out else {})
    result = _files.digest(json.dumps(told, sort_keys=True).encode())
    there = [_digest(path)] if path.exists() else []
    known = {"digests": [], "result": ""} if former is None else former
    if not set(there) <= set(known["digests"]):
        return False
    if there and there == known["digests"][-1:] and result == known["result"]:
        return True
    x, y = validation
    files = {"original": found.path.with_name("original.tflite"), "compressed": found.path}
    comparison = report.compare(files, x, y, runs=_RUNS, verbose=0)
    part = report.model_card(
        found.path,
        path.with_name("README.md.part"),
        comparison=comparison,
        name="compressed",
        made=_steps(found, learning_rate),
        limits=[_CHOSEN, *[_SEEN] * is_held_out],
        overwrite=True,
    )
    keep({"digests": [*there, _digest(part)], "result": result})
    part.replace(path)
    return True


def _digest(path: pathlib.Path) -> str:
    return _files.digest(path.read_bytes())


def _steps(found: Compression, learning_rate: float) -> list[str]:
    best = found.best
    steps = [
        f"keras_kd.compress, with a limit of {found.budget:,} bytes, tried {len(found.attempts)} "
        f'way{"s" * (len(found.attempts) > 1)}; the best one within the limit was "{best.name}".'
    ]
    if best.share < 1:
        steps.append(f"Cut to {best.share:.3g} of the work, and fitted to what the model gave before.")
    integers = f"weights of {best.bits} bits, activations of 8"
    if best.epochs:
        falls = "was to fall" if best.stopped else "falls"
        steps.append(
            f"Distilled from the model for {best.epochs} epoch{'s' * (best.epochs > 1)} in quantization-aware training "
            f"({integers}), with Adam at a learning rate of {learning_rate:g} that {falls} to 0"
            f"{', and again at 0.3 of it' * best.name.endswith('again')}{'; stopped by the time limit' * best.stopped}."
        )
    else:
        steps.append(f"Quantised to integers ({integers}) by ranges that training inputs have, without training.")
    steps.append("`model.keras` is a Keras model that computes the same: `import keras_kd`, then `keras.saving.load_model`.")
    return steps
