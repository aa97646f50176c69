"""What the tests of searches share: tiny data, a tiny space, no compiling."""

import keras
import numpy as np

from keras_kd.tuner import DistillationHyperModel
from tests.conftest import classifier

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
EAGER = {"run_eagerly": True}  # tracing takes longer than these trainings


def data(count=32, seed=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 4)).astype("float32"), rng.integers(0, 3, size=count)


def build_student(hp):
    return classifier(hp.Choice("width", [2, 4, 8]))


def hypermodel(teacher=None, **arguments):
    """A space of widths alone, unless `search` says more."""
    fixed = {"temperature": 2.0, "student_loss_weight": 0.5, "learning_rate": 0.01}
    arguments = {"loss": CROSS_ENTROPY, "compile_options": EAGER} | arguments
    search = fixed | arguments.pop("search", {})
    return DistillationHyperModel(build_student, teacher or classifier(16, name="teacher"), search=search, **arguments)


def metrics_of(trial):
    return {name: float(history.get_last_value()) for name, history in trial.metrics.metrics.items()}
