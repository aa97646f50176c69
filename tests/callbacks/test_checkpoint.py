"""The best epoch among those that reached the sparsity."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import callbacks, schedules
from tests.conftest import classifier

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 4)).astype("float32"), RNG.integers(0, 3, size=32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Worsening(keras.callbacks.Callback):
    """A score that is best in the first epoch, when the model is still dense, and falls."""

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = 1.0 - 0.1 * epoch


@pytest.mark.parametrize("distilling", [False, True])
def test_the_best_sparse_epoch_is_kept_where_the_usual_rule_keeps_a_dense_one(tmp_path, distilling, teacher):
    student = classifier(16)
    model = keras_kd.Distiller(teacher, student) if distilling else student
    model.compile("adam", LOSS)
    schedule = schedules.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=12, frequency=4)
    options = {"monitor": "score", "mode": "max", "save_weights_only": True}
    usual = keras.callbacks.ModelCheckpoint(tmp_path / "usual.weights.h5", save_best_only=True, **options)
    ours = callbacks.SparseCheckpoint(tmp_path / "ours.weights.h5", 0.75, **options)
    pruning = callbacks.Pruning(schedule)
    model.fit(X, Y, batch_size=8, epochs=5, verbose=0, callbacks=[pruning, Worsening(), usual, ours])
    assert ours.best == pytest.approx(0.8)  # of epoch 2, the first at the target
    found = {}
    for name in ("usual", "ours"):
        model.load_weights(tmp_path / f"{name}.weights.h5")
        found[name] = float(np.mean(np.asarray(student.layers[0].kernel) == 0))
    assert found["ours"] == 0.75
    assert found["usual"] < 0.6


def test_without_a_sparsity_in_the_logs_it_says_what_to_do(tmp_path):
    model = classifier()
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="Put Pruning or KeepSparsity before it"):
        model.fit(X, Y, verbose=0, callbacks=[callbacks.SparseCheckpoint(tmp_path / "m.keras", 0.5)])


def test_a_sparsity_out_of_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`sparsity` must be between 0 and 1"):
        callbacks.SparseCheckpoint(tmp_path / "m.keras", 80)
