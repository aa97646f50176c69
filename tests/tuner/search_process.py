"""A process of a search, chief or worker by KerasTuner's environment variables: what a user's script looks like.

Called with a folder. The worker "tuner1" stops in its first trial, to be killed there, unless it finds that it was before.
"""

import os
import pathlib
import sys
import time
import types

import keras
import keras_tuner
from keras_tuner.src.distribute import oracle_chief

from keras_kd import tuner as kd_tuner
from tests.tuner.common import data, hypermodel

FOLDER = pathlib.Path(sys.argv[1])
NAME = os.environ["KERASTUNER_TUNER_ID"]


class Stopping(keras.callbacks.Callback):
    """Waits in the middle of the first trial."""

    def on_epoch_begin(self, epoch, logs=None):
        marker = FOLDER / f"{NAME}.is_running"
        if NAME == "tuner1" and not marker.exists():
            marker.touch()
            time.sleep(600)


def main():
    if silent := os.environ.get("SILENT"):
        start = time.monotonic()
        try:
            kd_tuner.check_chief(silent, timeout=2)
        except ConnectionError as error:
            (FOLDER / "silent.txt").write_text(f"{time.monotonic() - start:.1f} {error}")
    kd_tuner.check_chief(timeout=120)
    keras.utils.set_random_seed(1)  # the same teacher everywhere, which a user loads from a file
    tuner = keras_tuner.RandomSearch(
        hypermodel(search={"learning_rate": (1e-3, 1e-1)}),
        objective="val_accuracy",
        max_trials=3,
        seed=1,
        directory=FOLDER,
        project_name="search",
    )
    kd_tuner.resume(tuner)
    # The chief looks every 20 seconds whether all workers have left.
    oracle_chief.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.5)))
    x, y = data()
    tuner.search(x, y, validation_data=data(16, seed=4), epochs=1, verbose=0, callbacks=[Stopping()])


if __name__ == "__main__":
    main()
