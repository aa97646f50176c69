"""How far can a network for digits be compressed? One script for chief, workers and a single machine: see docs/search.md.

What differs between the processes are KerasTuner's environment variables alone. All of them see one folder, SEARCH_FOLDER: it holds
the trained network, the teacher's recording and the trials. Put your own network and data in the place of `load` and `train`.
"""

import os
import pathlib

import keras
import keras_tuner
import sklearn.datasets

from keras_kd import tuner as kd_tuner

FOLDER = pathlib.Path(os.environ.get("SEARCH_FOLDER", "searches"))
TRIALS = int(os.environ.get("SEARCH_TRIALS", "20"))
EPOCHS = int(os.environ.get("SEARCH_EPOCHS", "15"))
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load():
    """Images and labels, in an order without meaning: the last 400 are for validation."""
    digits = sklearn.datasets.load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target
    return (x[:-400], y[:-400]), (x[-400:], y[-400:])


def train(data, path):
    """The network that is compressed, and teaches."""
    layers = keras.layers
    body = [layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(48, 3, strides=2, activation="relu"), layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Dense(64, activation="relu"), layers.Dense(10)])
    model.compile("adam", CROSS_ENTROPY)
    model.fit(*data, epochs=EPOCHS, verbose=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path.with_suffix(".part.keras"))
    path.with_suffix(".part.keras").rename(path)  # so that nobody reads half a file


def main():
    """Searches, as what the environment says that this process is."""
    data, held_out = load()
    path = FOLDER / "teacher.keras"
    is_worker = "chief" not in os.environ.get("KERASTUNER_TUNER_ID", "chief")
    if not is_worker and not path.exists():
        train(data, path)  # before the chief answers, so that workers find it
    kd_tuner.check_chief(timeout=600)  # images are pulled and the network is trained meanwhile
    score = kd_tuner.Score("val_accuracy", budgets={"bytes": 40_000})
    hypermodel = kd_tuner.CompressionHyperModel(
        keras.models.load_model(path), data=data[0][:1000], loss=CROSS_ENTROPY, search={"sparsity": None}, score=score
    )
    tuner = keras_tuner.RandomSearch(
        hypermodel, objective=score.objective, max_trials=TRIALS, seed=0, directory=FOLDER, project_name="digits"
    )
    kd_tuner.resume(tuner)
    tuner.search(*data, validation_data=held_out, epochs=EPOCHS, verbose=2)
    return tuner


if __name__ == "__main__":
    main()
