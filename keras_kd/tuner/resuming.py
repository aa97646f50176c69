"""What does KerasTuner forget when a search is stopped? A grid its place, and a file that was being written its content."""

import contextlib
import functools
import json
import pathlib
from typing import Any

import keras_tuner

from keras_kd._files import write_atomically

_STATE, _COPY = "oracle.json", "oracle.json.last"


def resume(tuner: Any) -> int:
    """Makes a tuner that was reloaded (`overwrite=False`) go on where it stopped, and says how many trials it knows.

    KerasTuner itself reloads finished trials, and runs the one that was interrupted again. Its `GridSearch` (of version 1.4.8)
    forgets its place in the grid, and ends at once or in a `KeyError`: this finds it again, from the trials. For other tuners, in
    a worker, and for a search that begins, there is nothing to do, and nothing is done: write it after any tuner is made.

    Args:
        tuner: a tuner of KerasTuner, or its oracle.

    Returns:
        The number of trials that have ended; 0 in a worker, whose chief knows.

    Raises:
        TypeError: if `tuner` is none.

    Example:

    >>> import keras_tuner
    >>> tuner = keras_tuner.GridSearch(lambda hp: keras.Sequential(), objective="val_loss", directory=tmp_path)
    >>> keras_kd.tuner.resume(tuner)
    0
    """
    oracle = getattr(tuner, "oracle", tuner)
    if not isinstance(oracle, keras_tuner.Oracle):
        if hasattr(oracle, "get_best_trials"):  # a worker's
            return 0
        raise TypeError(f"`tuner` must be a keras_tuner tuner or oracle. Received: tuner={tuner!r} of type {type(tuner).__name__}.")
    if isinstance(oracle, keras_tuner.oracles.GridSearchOracle) and oracle.trials:
        _find_place(oracle)
    return len(oracle.end_order)


def _find_place(oracle: Any) -> None:
    """Lists the trials in the order of the grid, and asks of each anew what comes after it."""
    by_value = functools.cmp_to_key(
        lambda one, other: oracle._compare(oracle.trials[one].hyperparameters.values, oracle.trials[other].hyperparameters.values)
    )
    ordered = type(oracle._ordered_ids)()
    for trial_id in sorted(oracle.trials, key=by_value):
        ordered.insert(trial_id)
    oracle._ordered_ids = ordered
    oracle._populate_next = sorted(oracle.trials, key=oracle.start_order.index)


def keep_copy(project: pathlib.Path) -> None:
    """Copies the state of a search, which KerasTuner writes in place: a kill in that moment leaves half a file."""
    with contextlib.suppress(OSError, ValueError):
        content = (project / _STATE).read_bytes()
        json.loads(content)
        write_atomically(project / _COPY, content)
