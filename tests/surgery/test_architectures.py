"""prune_channels on the architectures of keras.applications: half of the work goes in one call, and what is left is a model."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.surgery import _analysis, _costs, channels
from keras_kd.surgery._rebuild import Rebuilt
from tests.surgery import networks

THOROUGH = pytest.mark.thorough
SMALLEST = {"InceptionV3": 75, "Xception": 71}
OPTIONS = {
    "MobileNetV2": {"alpha": 0.35},
    "MobileNetV3Small": {"alpha": 0.75},
    "ConvNeXtTiny": {"include_preprocessing": False},  # which makes inputs of this size all the same
}
NAMES = (
    "MobileNetV2",
    "MobileNetV3Small",
    "EfficientNetB0",
    "ResNet50",
    "DenseNet121",
    "ConvNeXtTiny",
    "InceptionV3",
    "Xception",
)
ALWAYS = {("MobileNetV2", "redundancy")}


def images(samples, size):
    """Smooth random images with some noise."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(samples, size // 4 + 2, size // 4 + 2, 3)).astype("float32")
    smooth = np.asarray(keras.ops.image.resize(coarse, (size, size)))
    return smooth + 0.1 * rng.normal(size=smooth.shape).astype("float32")


def macs_of(model):
    """Counted in the graph that TensorFlow runs."""
    return sum(row.macs or 0 for row in _costs.count_macs(model))


CASES = [
    pytest.param(name, criterion, marks=() if (name, criterion) in ALWAYS else THOROUGH)
    for name in NAMES
    for criterion in ("magnitude", "redundancy")
]


@pytest.mark.parametrize(("name", "criterion"), CASES)
def test_half_the_work_of_an_architecture_goes_in_one_call(name, criterion, tmp_path):
    size = SMALLEST.get(name, 32)
    options = OPTIONS.get(name, {})
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=5, **options)
    x = images(32, size)
    networks.enliven(model, x)
    assert float(np.asarray(model(x)).std(0).max()) > 0.01  # what is looked at below depends on the input
    data = x if criterion == "redundancy" else None
    smaller, report = keras_kd.surgery.prune_channels(
        model, macs=0.5, data=data, criterion=criterion, min_channels=8, verbose=0, return_report=True
    )
    assert macs_of(smaller) == report.macs_after
    assert 0.495 * report.macs <= report.macs_after <= 0.5 * report.macs
    assert smaller.count_params() < model.count_params()
    assert np.isfinite(report.cost)
    assert report.cost >= 0
    assert not report.not_refitted
    assert bool(report.refits) is (criterion == "redundancy")
    assert all(one.error_after <= one.error_before for one in report.refits)
    given = np.asarray(smaller(x))
    assert np.isfinite(given).all()
    assert float(given.std(0).max()) > 1e-3  # what comes out still depends on what goes in
    if criterion == "magnitude":  # nothing was fitted: what is gone counts as 0 wherever it was read
        found = _analysis.analyse(model)
        rebuilt = Rebuilt(found, channels.chosen(found, report.removed))
        np.testing.assert_allclose(given, networks.masked(rebuilt, x)[0], atol=1e-4)

    smaller.save(tmp_path / "smaller.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "smaller.keras")(x), given)
    keras_kd.export.to_litert(smaller, tmp_path / "smaller.tflite", check_data=x[:4])  # which runs it against the model
    assert (tmp_path / "smaller.tflite").stat().st_size < 4.5 * smaller.count_params() + 2e5

    before = [np.asarray(v) for v in smaller.trainable_variables]
    smaller.compile("sgd", "sparse_categorical_crossentropy")
    smaller.fit(x[:4], np.arange(4), epochs=1, verbose=0)
    assert all(np.isfinite(np.asarray(v)).all() for v in smaller.trainable_variables)
    assert any(not np.array_equal(v, old) for v, old in zip(smaller.trainable_variables, before, strict=True))
