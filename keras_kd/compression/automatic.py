"""Which road to a small file is best for this model? Cuts, thins, distils and quantises, measures each file, and keeps the best."""

import math
from typing import Any

from keras_kd._progress import check_verbose
from keras_kd.compression._data import Data
from keras_kd.compression._settings import bytes_of, check_settings, checked_model, loss_of
from keras_kd.compression._work import Work
from keras_kd.compression.results import Compression


def compress(
    model: Any,
    data: Any,
    labels: Any = None,
    *,
    budget: int | str,
    validation_data: Any = None,
    max_trials: int = 6,
    max_minutes: float | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    loss: Any = None,
    folder: Any = None,
    seed: int = 0,
    verbose: Any = "auto",
) -> Compression:
    """Makes a model fit into a file of so many bytes, in integers, and loses as little as it can.

    First without training: the whole model in integers of 8 bits, and if that is too large, with weights of 4 bits, and, cut to the
    budget, fewer channels, thinner layers, and both. What is cut is fitted to what the model gives (`surgery`). Then trials: the
    candidates, the best one first, are distilled from the model in quantization-aware training; trials that are left go on with the
    best one, at a lower learning rate. Every file is run in the LiteRT interpreter on the validation data, and the best one within
    the budget is what you get, trained or not.

    With a `folder` everything is kept there. The same call goes on where a former one was interrupted; with a larger `max_trials`
    it does more of them. A model card, `README.md`, says how the file was made, and what it and the original gave on the validation
    data; one that you edited stays, and one whose result is the same, too.

    Args:
        model: a built Functional or Sequential model, trained; for a Distiller, its student. It is not changed.
        data: training inputs, nested as the model takes them, or batches `x` or `(x, y)` that can be read again, such as a
            `tf.data.Dataset`.
        labels: an entry for each sample, where `data` are arrays. Without any, the model's outputs are what is learned, and what
            files are measured by.
        budget: bytes of the file: a number, or text such as "100KB" (1000 bytes), "100KiB" (1024), "1.5MB", or "20%" of the model's
            float32 file.
        validation_data: `(x, y)`, `x` or batches, which the choice is made by: what you report should be measured on others. Give
            validation_data that the model was not trained on. None holds out a tenth of the arrays: where the model was trained on
            these, scores are too good.
        max_trials: at most so many trainings; 0 is none.
        max_minutes: no training goes on after so many minutes, and as soon as there is a file within the budget, no other way of
            cutting is begun. None: no limit.
        epochs: of each training.
        batch_size: where `data` are arrays.
        learning_rate: Adam's, which falls to 0 along a cosine.
        loss: supervised loss, beside the distillation, where there are labels. None takes that the model, or the Distiller, was
            compiled with; without either, only the distillation counts.
        folder: where to keep candidates, files and the state; made if it is not there. Its `model.tflite` is the best one so far at
            any time. None: a temporary one, and the file goes with it as soon as nobody holds the result.
        seed: of the split, the order of the data, and what is random in layers; each training sets Keras' global seed by it.
        verbose: 0 is silent; 1 or "auto" says what is done, and what came of it.

    Returns:
        A `Compression`: the model, the file, and all attempts.

    Raises:
        TypeError: if `model` is no Keras model, or an argument of another type.
        ValueError: if nothing fits the budget: the message names the smallest file that was made; for subclassed models, arguments
            out of range, data that do not fit, labels of arrays or of the validation that are not finite, and a folder of another
            compression.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(3)])
    >>> x = np.random.default_rng(0).normal(size=(300, 8)).astype("float32")
    >>> found = keras_kd.compress(model, x, budget="2500B", max_trials=1, epochs=1, folder=tmp_path / "small", verbose=0)
    >>> found.best.size <= 2500, found.path.name
    (True, 'model.tflite')
    """
    check_verbose(verbose)
    check_settings(max_trials, max_minutes, epochs, batch_size, learning_rate, seed)
    given, model = model, checked_model(model)
    held = Data(data, labels, validation_data, int(batch_size), int(seed))
    settings = {
        "budget": bytes_of(budget),
        "epochs": int(epochs),
        "learning_rate": float(learning_rate),
        "batch_size": int(batch_size),
        "seed": int(seed),
    }
    work = Work(model, held, settings, loss_of((given, model), loss, held), folder, verbose)
    try:
        deadline = math.inf if max_minutes is None else work.began + 60 * max_minutes
        work.cut(deadline)
        work.train(max_trials, deadline)
    except KeyboardInterrupt:
        if folder is not None:
            best = ", the best file so far as model.tflite" if any(one.fits for one in work.attempts.values()) else ""
            work.say(f"interrupted: what was done is kept in {work.folder}{best}, and the same call goes on from there")
        raise
    return work.result()
