"""How does a stranger learn what a compressed file is? Writes the card of a folder, and leaves one that somebody edited."""

import hashlib
import pathlib
from typing import Any

from keras_kd import report
from keras_kd.compression.results import Compression

_RUNS = 30  # timed inferences of each file


def write_card(found: Compression, validation: tuple[Any, Any], learning_rate: float, former: str | None) -> str | None:
    """Writes `README.md` beside the file of a compression.

    Args:
        found: the result; `original.tflite` lies beside its file.
        validation: `(x, y)` that the choice was made by.
        learning_rate: of the first training.
        former: digest of the card that was written before; None if there was none.

    Returns:
        The digest of the card; None if somebody else's is there, which stays.
    """
    path = found.path.with_name("README.md")
    if path.exists() and _digest(path) != former:
        return None
    x, y = validation
    files = {"original": found.path.with_name("original.tflite"), "compressed": found.path}
    comparison = report.compare(files, x, y, runs=_RUNS, verbose=0)
    report.model_card(
        found.path,
        path,
        comparison=comparison,
        name="compressed",
        made=_steps(found, learning_rate),
        limits=[
            "The choice among the files was made by the samples that it was measured on, so that its numbers are a little too good."
        ],
        overwrite=True,
    )
    return _digest(path)


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _steps(found: Compression, learning_rate: float) -> list[str]:
    best = found.best
    steps = [
        f"keras_kd.compress, with a limit of {found.budget:,} bytes, tried {len(found.attempts)} "
        f'way{"s" * (len(found.attempts) > 1)}; the best one within the limit was "{best.name}".'
    ]
    if best.share < 1:
        steps.append(f"Cut to {best.share:.3g} of the work, and fitted to what the model gave before.")
    if best.epochs:
        steps.append(
            f"Distilled from the model for {best.epochs} epochs in quantization-aware training, with Adam at a learning rate of "
            f"{learning_rate:g} that falls to 0{', and again at 0.3 of it' * best.name.endswith('again')}."
        )
    else:
        steps.append("Quantised to integers of 8 bits by ranges that training inputs have, without training.")
    steps.append("`model.keras` is a Keras model that computes the same: `import keras_kd`, then `keras.saving.load_model`.")
    return steps
