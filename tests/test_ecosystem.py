"""What stands beside the library: data of every kind that Keras takes, pandas, MLflow, KerasHub.

keras.applications are teachers in `test_distiller_features.py` and are cut in `surgery/test_architectures.py`; losses of
keras.distillation stand in our Distiller in `test_distiller.py`, ours in theirs in `test_contract_losses.py`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd import callbacks, export, layers, losses, metrics, surgery

L = keras.layers
rng = np.random.default_rng(0)
X = rng.normal(size=(64, 6)).astype("float32")
Y = rng.integers(0, 3, 64)
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(width, name):
    keras.utils.set_random_seed(width)
    return keras.Sequential(
        [keras.Input((6,)), L.Dense(width, activation="relu", name="hidden"), L.Dense(3, name="head")], name=name
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[16 * index : 16 * index + 16], Y[16 * index : 16 * index + 16]


def generated():
    while True:
        yield from (Batches()[index] for index in range(4))


def frame():
    """The same samples, with an index that is no row number."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    index = range(900, 900 - len(X), -1)
    return pandas.DataFrame(X, columns=list("abcdef"), index=index), pandas.Series(Y, index=index, name="label")


def framed():
    x, y = frame()
    return {"x": x, "y": y, "batch_size": 16}


SOURCES = {
    "tensors": lambda: {"x": tf.constant(X), "y": tf.constant(Y), "batch_size": 16},
    "tf.data": lambda: {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)},
    "PyDataset": lambda: {"x": Batches()},
    "PyDataset of several workers": lambda: {"x": Batches(workers=3, max_queue_size=4)},
    "generator": lambda: {"x": generated(), "steps_per_epoch": 4},
    "pandas": framed,
}


@pytest.fixture(scope="module")
def fitted():
    """A function that fits the same Distiller from the same start on a source; what it logged, and the student's weights."""
    teacher, student = network(8, "teacher"), network(4, "student")
    distiller = keras_kd.Distiller(teacher, student, losses.KDLoss(temperature=2.0))
    distiller.compile("sgd", FROM_LOGITS, metrics=["accuracy", metrics.TeacherAgreement()])
    start = [weight.copy() for weight in student.get_weights()]

    def fit(**source):
        student.set_weights(start)
        used = [callbacks.Pruning(0.5), callbacks.AnnealTemperature(lambda epoch: 2.0 + epoch)]
        return distiller.fit(**source, epochs=2, shuffle=False, verbose=0, callbacks=used).history, student.get_weights()

    return fit, fit(x=X, y=Y, batch_size=16)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_data_trains_as_numpy_does(fitted, source):
    fit, (expected, weights) = fitted
    logged, found = fit(**SOURCES[source]())
    assert expected["sparsity"][-1] == 0.5
    assert expected["temperature"] == [2.0, 3.0]
    assert set(logged) == set(expected) >= {"loss", "student_loss", "distillation_loss", "accuracy", "teacher_agreement"}
    for key, curve in expected.items():
        assert logged[key] == pytest.approx(curve, rel=1e-5), key
    for one, other in zip(found, weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_data_frame_is_calibrated_on_probed_cut_for_and_exported_like_its_array(tmp_path):
    x, y = frame()
    model = network(8, "model")
    from_frame, from_array = (callbacks.Quantization(calibration_data=data).quantize(model) for data in (x, X))
    np.testing.assert_array_equal(from_frame.predict(X, verbose=0), from_array.predict(X, verbose=0))
    probes = [layers.LinearProbe(3), layers.LinearProbe(3)]
    probes[0].adapt(x, y)
    probes[1].adapt(X, Y)
    np.testing.assert_allclose(probes[0](X), probes[1](X), rtol=1e-5)
    cut = [surgery.prune_channels(model, macs=0.5, data=data, verbose=0) for data in (x, X)]
    np.testing.assert_allclose(*(one.predict(X, verbose=0) for one in cut), rtol=1e-5)
    exported = export.to_litert(model, tmp_path / "model.tflite", quantization="int8", representative_data=x)
    np.testing.assert_array_equal(export.run_litert(exported.path, x)[0], export.run_litert(exported.path, X)[0])


@pytest.mark.filterwarnings("ignore")  # of MLflow and what it imports
@pytest.mark.parametrize("flavour", ["keras", "tensorflow"])
def test_mlflow_autologging_sees_every_log(flavour, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    module = pytest.importorskip(f"mlflow.{flavour}", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.chdir(tmp_path)
    distiller = keras_kd.Distiller(network(8, "teacher"), network(4, "student"), [losses.KDLoss(), losses.RKDLoss(name="rkd")])
    distiller.compile("sgd", FROM_LOGITS, metrics=["accuracy", metrics.TeacherAgreement()])
    module.autolog(log_models=False, silent=True)
    try:
        with mlflow.start_run() as run:
            fit = {"validation_data": (X, Y), "epochs": 2, "verbose": 0, "batch_size": 16}
            history = distiller.fit(X, Y, **fit, callbacks=[callbacks.Pruning(0.5)]).history
    finally:
        module.autolog(disable=True)
    logged = mlflow.get_run(run.info.run_id).data
    assert set(history) >= {"distillation_loss", "rkd", "teacher_agreement", "val_teacher_agreement", "sparsity"}
    for key, curve in history.items():
        assert logged.metrics[key] == pytest.approx(curve[-1]), key
    assert logged.params["epochs"] == "2"


def test_an_mlflow_run_knows_the_shapes_of_a_distiller():
    distiller = keras_kd.Distiller(network(8, "teacher"), network(4, "student"))
    assert (distiller.input_shape, distiller.output_shape) == ((None, 6), (None, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what KerasHub imports
def test_a_classifier_of_keras_hub_is_distilled_pruned_quantised_cut_and_exported(tmp_path):
    keras_hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")

    def classifier(stages):
        blocks = {"stackwise_num_blocks": [1] * stages, "stackwise_num_strides": [1, 2][:stages], "block_type": "basic_block"}
        stem = {"input_conv_filters": [64], "input_conv_kernel_sizes": [3], "image_shape": (16, 16, 3)}
        backbone = keras_hub.models.ResNetBackbone(stackwise_num_filters=[64, 128][:stages], **stem, **blocks)
        return keras_hub.models.ImageClassifier(backbone=backbone, num_classes=3)

    x = rng.normal(size=(32, 16, 16, 3)).astype("float32")
    teacher, student = classifier(2), classifier(1)
    distiller = keras_kd.Distiller(teacher, student, losses.KDLoss())
    distiller.compile("adam", FROM_LOGITS)
    history = distiller.fit(x, Y[:32], verbose=0, callbacks=[callbacks.Pruning(0.5), callbacks.Quantization()]).history
    assert np.isfinite(history["distillation_loss"]).all()
    kernels = [weight for weight in student.get_weights() if weight.ndim == 4]
    assert all(np.mean(kernel == 0) == pytest.approx(0.5, abs=0.01) for kernel in kernels)
    exported = export.to_litert(student, tmp_path / "student.tflite", check_data=x)
    assert (exported.quantization, exported.float_operators) == ("int8", ())
    smaller = surgery.prune_channels(teacher, macs=0.5, data=x, verbose=0)
    assert smaller.count_params() < 0.6 * teacher.count_params()
