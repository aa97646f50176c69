"""The same demands on every public callback: adding one to `keras_kd.callbacks` enrols it here."""

import copy
import inspect
import re

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import callbacks, losses, schedules
from tests.conftest import classifier

# `SparseCheckpoint` is Keras' ModelCheckpoint, which needs a path and another callback: tests/callbacks/test_checkpoint.py.
OWN_TESTS = {"SparseCheckpoint"}
PUBLIC = [value for name, value in vars(callbacks).items() if name in set(callbacks.__all__) - OWN_TESTS and inspect.isclass(value)]
# How to make each one, for a Distiller; and what those that serve nothing else say of a plain model.
EXAMPLES = {
    "AnnealTemperature": lambda: callbacks.AnnealTemperature(schedules.LinearValue(4.0, 1.0, duration=2)),
    "AnnealWeight": lambda: callbacks.AnnealWeight(schedules.WarmUpValue(0.5, duration=2)),
    "Clustering": lambda: callbacks.Clustering(5),
    "KeepSparsity": callbacks.KeepSparsity,
    "Pruning": lambda: callbacks.Pruning(0.5),
    "Quantization": callbacks.Quantization,
    "ScheduledValue": lambda: callbacks.ScheduledValue("temperature", lambda epoch: 1.0 + epoch, loss=0),
}
# What they are for is to set weights to zero, or to few values.
SPARSER, COARSER = {"Pruning"}, {"Clustering"}
DISTILLER_ONLY = {"AnnealWeight": "keras_kd.Distiller"}

# A model without zeros is as good as any for what is asked here; `KeepSparsity` says that it has none.
pytestmark = pytest.mark.filterwarnings("ignore:KeepSparsity keeps zeros:UserWarning")
every_callback = pytest.mark.parametrize("name", [callback.__name__ for callback in PUBLIC])
RNG = np.random.default_rng(2)
X, LABELS, STORED = RNG.normal(size=(12, 4)).astype("float32"), RNG.integers(0, 3, size=12), RNG.normal(size=(12, 3))


def make_distiller(rate=0.1, **options):
    distiller = keras_kd.Distiller(classifier(), classifier())
    distiller.compile(keras.optimizers.SGD(rate), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return distiller


def fit(model, y, callback, **options):
    return model.fit(X, y, batch_size=4, callbacks=[callback], verbose=0, **{"epochs": 2} | options).history


def fingerprint(model):
    """What a callback must leave as it found it: structure, methods and attributes of the model and its layers."""
    layers = [model, *model._flatten_layers(include_self=False)]
    attributes = [(layer.name, sorted(set(vars(layer)) - {"history"})) for layer in layers]
    variables = [(v.path, tuple(v.shape), v.trainable, getattr(v, "constraint", None)) for v in model.variables]
    return attributes, variables, [layer.call.__func__ for layer in layers], model.get_config()


def test_every_public_callback_has_an_example_here():
    assert {callback.__name__ for callback in PUBLIC} == set(EXAMPLES)


@every_callback
def test_it_serves_a_distiller_several_times(name):
    distiller, callback = make_distiller(), EXAMPLES[name]()
    for _ in range(2):
        history = fit(distiller, LABELS, callback, validation_data=(X, LABELS))
        assert all(np.all(np.isfinite(values)) for values in history.values())


@every_callback
def test_it_serves_a_plain_model_or_says_what_it_needs(name):
    model = classifier()
    model.compile("sgd", loss=losses.KDLoss())
    if name in DISTILLER_ONLY:
        with pytest.raises(ValueError, match=DISTILLER_ONLY[name]):
            fit(model, STORED, EXAMPLES[name]())
    else:
        fit(model, STORED, EXAMPLES[name]())


@every_callback
@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=lambda o: next(iter(o))
)
def test_it_serves_every_way_to_run_a_step(name, options):
    distiller = keras_kd.Distiller(classifier(), classifier())
    distiller.compile("sgd", **options)
    assert len(fit(distiller, None, EXAMPLES[name]())["loss"]) == 2


@every_callback
def test_it_leaves_no_trace_on_the_model(name):
    distiller = make_distiller(rate=0.0)
    fit(distiller, LABELS, keras.callbacks.Callback())
    before, weights = fingerprint(distiller), distiller.student.get_weights()
    fit(distiller, LABELS, EXAMPLES[name]())
    after = fingerprint(distiller)
    assert after[:3] == before[:3]
    assert after[3]["student"] == before[3]["student"]
    for old, new in zip(weights, distiller.student.get_weights(), strict=True):
        if name in COARSER and old.ndim > 1:
            assert len(np.unique(new)) == 5
        else:
            np.testing.assert_array_equal(np.where(new == 0, 0, old) if name in SPARSER else old, new)


@every_callback
def test_a_model_that_was_trained_with_it_saves_and_loads_without_it(name, tmp_path):
    distiller = make_distiller(run_eagerly=True)
    fit(distiller, LABELS, EXAMPLES[name]())
    distiller.student.save(tmp_path / "student.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "student.keras")(X), distiller.student(X))


@every_callback
def test_copies_are_independent_before_and_after_training(name):
    callback = EXAMPLES[name]()
    twin = copy.deepcopy(callback)  # KerasTuner copies the callbacks of every trial
    distillers = [make_distiller(rate=0.0, run_eagerly=True) for _ in range(2)]
    distillers[1].student.set_weights(distillers[0].student.get_weights())
    distillers[1].teacher = distillers[0].teacher
    logs = [fit(distiller, LABELS, each) for distiller, each in zip(distillers, (callback, twin), strict=True)]
    names = [[re.sub(r"dense_\d+", "dense", key) for key in log] for log in logs]  # layers without a name of their own
    assert names[0] == names[1]
    for one, other in zip(*(log.values() for log in logs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert fit(distillers[1], LABELS, copy.deepcopy(callback)).keys() == logs[1].keys()


@every_callback
def test_it_is_documented(name):
    doc = inspect.getdoc(getattr(callbacks, name))
    for part in ("Args:", "Raises:", "Example:", ">>> "):
        assert part in doc, part
