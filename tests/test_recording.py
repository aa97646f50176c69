"""A recording holds what the teacher said, to the bit, and nothing on disk is ever half written."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kd.recording import RecordedBatch, Recording, _recorder, _shards, record_teacher
from keras_kd.teachers import FrozenTeacher

from .conftest import classifier, two_devices

ROOT = pathlib.Path(__file__).parent.parent


def record(teacher, data, path, **kwargs):
    return record_teacher(teacher, data, path, **{"verbose": 0, "batch_size": 5, "samples_per_shard": 7, **kwargs})


def read(recording, **kwargs):
    """All elements of a recording, laid side by side."""
    batches = list(recording.dataset(kwargs.pop("batch_size", 6), **kwargs))
    return keras.tree.map_structure(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *batches)


def files_of(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(pathlib.Path(path).iterdir())}


def image_teacher(activation=None):
    backbone = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(3, 3, name="conv")], name="backbone")
    inputs = keras.Input((8, 8, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(backbone(inputs))
    return keras.Model(inputs, keras.layers.Dense(4, activation=activation)(pooled), name="looker")


@pytest.fixture
def images():
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (17, 8, 8, 1)).astype("uint8"), rng.integers(0, 4, 17)


def shift_and_scale(x, seed):
    """A view like those of real pipelines: crop, flip, brightness, all from the seed."""
    x = tf.image.resize_with_crop_or_pad(tf.cast(x, tf.float32) / 255.0, 10, 10)
    x = tf.image.stateless_random_crop(x, (8, 8, 1), seed)
    x = tf.image.stateless_random_flip_left_right(x, seed + 1)
    return tf.image.stateless_random_brightness(x, 0.3, seed + 2)


# What is read is what the teacher says


def test_float32_outputs_are_those_of_predict(teacher, data, tmp_path):
    batch, y = read(record(teacher, data, tmp_path / "r", dtype="float32"))
    np.testing.assert_allclose(batch.outputs, teacher.predict(data[0], verbose=0), atol=1e-6)
    np.testing.assert_array_equal(batch.inputs, data[0])
    np.testing.assert_array_equal(y, data[1])


def test_float16_outputs_are_rounded_once_and_read_in_float32(teacher, data, tmp_path):
    batch, _ = read(record(teacher, data, tmp_path / "r"))
    assert batch.outputs.dtype == np.float32
    np.testing.assert_allclose(batch.outputs, teacher.predict(data[0], verbose=0), rtol=2**-10, atol=1e-6)


def test_small_probabilities_survive_half_precision(data, tmp_path):
    teacher = classifier(activation="softmax")
    teacher.layers[-1].kernel.assign(teacher.layers[-1].kernel * 30)
    recording = record(teacher, data, tmp_path / "r")
    found = read(recording)[0].outputs.astype("float64")
    logits = keras.Model(teacher.inputs, teacher.layers[-2].output).predict(data[0], verbose=0) @ teacher.layers[-1].kernel.numpy()
    expected = logits.astype("float64") - logits.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    assert expected.min() < -20  # float16 itself ends at exp(-17)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    assert recording.kinds == ["logits"]


def test_sigmoid_outputs_are_read_as_logits(data, tmp_path):
    teacher = classifier(activation="sigmoid")
    recording = record(teacher, data, tmp_path / "r", dtype="float32")
    probabilities = 1 / (1 + np.exp(-read(recording)[0].outputs))
    np.testing.assert_allclose(probabilities, teacher.predict(data[0], verbose=0), atol=1e-6)
    assert recording.kinds == ["logits"]


def test_outputs_of_unknown_meaning_are_stored_as_they_are(data, tmp_path):
    class Custom(keras.Model):
        def call(self, x):
            return keras.ops.softmax(x * 3)

    teacher = Custom()
    teacher(data[0])
    recording = record(teacher, data, tmp_path / "r", dtype="float32")
    np.testing.assert_allclose(read(recording)[0].outputs, teacher.predict(data[0], verbose=0), atol=1e-6)
    assert recording.kinds == [None]


def test_integer_outputs_stay_integers(data, tmp_path):
    inputs = keras.Input((4,))
    teacher = keras.Model(inputs, keras.ops.argmax(keras.layers.Dense(3)(inputs), axis=-1))
    batch, _ = read(record(teacher, data, tmp_path / "r"))
    np.testing.assert_array_equal(batch.outputs, teacher.predict(data[0], verbose=0))
    assert batch.outputs.dtype.kind == "i"


@pytest.mark.parametrize(("classes", "k", "index_dtype"), [(5, 2, "uint8"), (5, 5, "uint8"), (300, 3, "uint16"), (3, 1, "uint8")])
def test_top_k_keeps_the_largest_and_spreads_the_rest(classes, k, index_dtype, data, tmp_path):
    teacher = classifier(classes=classes, activation="softmax")
    recording = record(teacher, data, tmp_path / "r", top_k=k, dtype="float32")
    p = teacher.predict(data[0], verbose=0).astype("float64")
    order = np.argsort(-p, axis=-1)
    expected = np.empty_like(p)
    for row, first in enumerate(order[:, :k]):
        expected[row] = (1 - p[row, first].sum()) / max(classes - k, 1)
        expected[row, first] = p[row, first]
    found = read(recording)[0].outputs
    assert found.shape == (24, classes)
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)
    assert recording.output_structure.shape == (None, classes)
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["layout"]["view"][1]["dtype"] == index_dtype


def test_top_k_of_a_sequence_keeps_a_rest_far_below_float_precision(tmp_path):
    inputs = keras.Input((6, 4))
    teacher = keras.Model(inputs, keras.layers.Dense(7)(inputs))
    teacher.layers[-1].kernel.assign(teacher.layers[-1].kernel * 40)
    x = np.random.default_rng(0).normal(size=(9, 6, 4)).astype("float32")
    found = read(record(teacher, x, tmp_path / "r", top_k=2))[0].outputs.astype("float64")
    z = teacher.predict(x, verbose=0).astype("float64")
    log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    ordered = np.sort(log_p, axis=-1)[..., ::-1]
    rest = np.log(np.exp(ordered[..., 2:]).sum(-1) / 5)
    assert rest.min() < -25  # 1 - sum of the kept is 0 there
    np.testing.assert_allclose(np.sort(found, axis=-1)[..., ::-1][..., :2], ordered[..., :2], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found.min(-1), rest, rtol=2e-3, atol=2e-3)


def test_features_of_a_nested_backbone_come_by_name(images, tmp_path):
    teacher = image_teacher()
    recording = record(teacher, images, tmp_path / "r", layer_names=["backbone/conv"], dtype="float32")
    batch, _ = read(recording)
    backbone = teacher.get_layer("backbone")
    np.testing.assert_allclose(batch.features["backbone/conv"], backbone.predict(images[0], verbose=0), atol=1e-4)
    assert recording.layer_names == ("backbone/conv",)
    assert recording.feature_structure["backbone/conv"].shape == (None, 6, 6, 3)


def test_nested_inputs_outputs_labels_and_weights_keep_their_structure(tmp_path):
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    digit, box = keras.layers.Dense(4, "softmax", name="digit")(joined), keras.layers.Dense(2, name="box")(joined)
    teacher = keras.Model({"left": left, "right": right}, {"digit": digit, "box": box})
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(11, 3)).astype("float32"), "right": rng.normal(size=(11, 2)).astype("float32")}
    y = {"digit": rng.integers(0, 4, 11), "box": rng.normal(size=(11, 2))}
    weight = {"digit": rng.random(11).astype("float32"), "box": rng.random(11).astype("float32")}
    source = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4)
    recording = record(teacher, source, tmp_path / "r", dtype="float32")
    batch, labels, weights = read(recording)
    said = teacher.predict(x, verbose=0)
    np.testing.assert_allclose(np.exp(batch.outputs["digit"]), said["digit"], atol=1e-6)
    np.testing.assert_allclose(batch.outputs["box"], said["box"], atol=1e-6)
    for found, expected in ((batch.inputs, x), (labels, y), (weights, weight)):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
    assert recording.kinds == ["logits", "logits"]
    assert set(recording.output_structure) == {"digit", "box"}


def test_a_list_of_outputs_becomes_a_tuple_which_tf_data_knows(tmp_path):
    a, b = keras.Input((3,)), keras.Input((3,))
    teacher = keras.Model((a, b), [keras.layers.Dense(2)(a), keras.layers.Dense(5)(b)])
    x = tuple(np.random.default_rng(i).normal(size=(8, 3)).astype("float32") for i in range(2))
    recording = record(teacher, tf.data.Dataset.from_tensor_slices((x,)).batch(3), tmp_path / "r", dtype="float32")
    (batch,) = next(iter(recording.dataset(8)))
    assert isinstance(batch.outputs, tuple)
    assert isinstance(recording.output_structure, list)
    assert isinstance(batch.inputs, tuple)
    for found, expected in zip(batch.outputs, teacher.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "bool", "float16", "bfloat16", "float64", "int64", "uint16", "uint32", "uint64"]
)
def test_inputs_and_labels_keep_their_dtype_exactly(dtype, tmp_path):
    inputs = keras.Input((4,), dtype="float32")
    teacher = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    x = tf.cast(np.random.default_rng(0).integers(0, 100, (6, 4)), dtype)
    holder = FrozenTeacher(teacher, lambda x: tf.cast(x, tf.float32))
    recording = record(holder, tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(4), tmp_path / "r")
    batch, y = next(iter(recording.dataset(6)))
    assert (batch.inputs.dtype, y.dtype) == (x.dtype, x.dtype)
    assert np.array_equal(batch.inputs, x)
    assert np.array_equal(y, x[:, 0])


def test_preprocessing_is_for_the_teacher_only(images, tmp_path):
    teacher = image_teacher()
    recording = record(
        teacher, images, tmp_path / "r", teacher_preprocessing=lambda x: tf.cast(x, tf.float32) / 255, dtype="float32"
    )
    batch, _ = read(recording)
    np.testing.assert_allclose(batch.outputs, teacher.predict(images[0] / 255.0, verbose=0), atol=1e-5)
    np.testing.assert_array_equal(batch.inputs, images[0])


def test_a_list_of_teachers_is_recorded_as_their_ensemble(data, tmp_path):
    models = [classifier(4, activation="softmax", name=name) for name in "ab"]
    recording = record(models, data, tmp_path / "r", dtype="float32")
    mean = sum(model.predict(data[0], verbose=0) for model in models) / 2
    np.testing.assert_allclose(np.exp(read(recording)[0].outputs), mean, atol=1e-6)
    models[1].layers[0].kernel.assign(models[1].layers[0].kernel * 2)
    with pytest.raises(ValueError, match="the teacher's weights"):
        record(models, data, tmp_path / "r", dtype="float32")


def test_arrays_and_data_sets_make_the_same_shards(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "a")
    record(teacher, tf.data.Dataset.from_tensor_slices(data).batch(5), tmp_path / "b")
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {k: v for k, v in a.items() if "shard" in k} == {k: v for k, v in b.items() if "shard" in k}
    assert len(a) == 4 + 2  # 24 samples in shards of 7, the manifest, and examples


def test_empty_batches_are_skipped(teacher, data, tmp_path):
    def batches():
        for begin, end in ((0, 0), (0, 5), (5, 5), (5, 9), (9, 9), (9, 24), (24, 24)):
            yield tuple(part[begin:end] for part in data)

    spec = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in data)
    record(teacher, tf.data.Dataset.from_generator(batches, output_signature=spec), tmp_path / "a")
    record(teacher, data, tmp_path / "b")
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {k: v for k, v in a.items() if "shard" in k} == {k: v for k, v in b.items() if "shard" in k}


def test_inputs_alone_can_be_recorded(teacher, data, tmp_path):
    for index, source in enumerate([data[0], (data[0],), tf.data.Dataset.from_tensor_slices(data[0]).batch(5)]):
        recording = record(teacher, source, tmp_path / str(index))
        (batch,) = next(iter(recording.dataset(3)))
        assert isinstance(batch, RecordedBatch)
        assert batch.outputs.shape == (3, 3)


def test_a_mapped_array_is_read_slice_by_slice(teacher, data, tmp_path):
    np.save(tmp_path / "x.npy", data[0].astype(">f4"))  # and in another byte order
    recording = record(teacher, np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "r")
    np.testing.assert_array_equal(read(recording)[0].inputs, data[0])


# Reading


@pytest.mark.parametrize("shuffle", [True, 4])
def test_shuffling_gives_each_sample_once_and_another_order_each_epoch(shuffle, teacher, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    dataset = record(teacher, (x, np.arange(60)), tmp_path / "r").dataset(8, shuffle=shuffle)
    epochs = [np.concatenate([y for _, y in dataset]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
        assert list(epoch) != list(range(60))
    assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])
    batch, y = next(iter(dataset))
    np.testing.assert_array_equal(batch.inputs, x[y])
    np.testing.assert_allclose(batch.outputs, teacher.predict(x[y], verbose=0), rtol=1e-3, atol=1e-3)


def test_a_seed_repeats_the_order(teacher, data, tmp_path):
    recording = record(teacher, (data[0], np.arange(24)), tmp_path / "r")
    orders = [np.concatenate([y for _, y in recording.dataset(8, shuffle=True, seed=seed)]) for seed in (1, 1, 2)]
    assert list(orders[0]) == list(orders[1])
    assert list(orders[0]) != list(orders[2])


def test_cardinality_is_known_for_batches_and_single_samples(teacher, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    assert int(recording.dataset(7).cardinality()) == len(list(recording.dataset(7))) == 4
    assert int(recording.dataset(7, drop_remainder=True).cardinality()) == len(list(recording.dataset(7, drop_remainder=True))) == 3
    assert int(recording.dataset().cardinality()) == len(list(recording.dataset())) == 24
    assert recording.dataset(7, drop_remainder=True).element_spec[0].inputs.shape == (7, 4)
    assert recording.dataset().element_spec[0].inputs.shape == (4,)


def test_workers_share_the_samples_out(teacher, data, tmp_path):
    dataset = record(teacher, (data[0], np.arange(24)), tmp_path / "r").dataset(4)
    seen = [np.concatenate([y for _, y in dataset.shard(2, index)]) for index in range(2)]
    assert sorted(np.concatenate(seen)) == list(range(24))


class Follower(keras.Model):
    """Learns the recorded outputs, as a Distiller does."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def call(self, x, training=None):
        return self.student(x, training=training)

    def train_step(self, data):
        batch, _y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.student(batch.inputs, training=True) - batch.outputs) ** 2)
        variables = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"distance": loss}


def test_a_model_trains_on_recorded_batches_in_fit(teacher, student, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    follower = Follower(student)
    follower.compile(keras.optimizers.Adam(0.05))
    losses = follower.fit(recording.dataset(8, shuffle=True), epochs=8, verbose=0, shuffle=False).history["distance"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_trains_on_recorded_batches_on_two_devices(teacher, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    strategy = two_devices()
    dataset = strategy.experimental_distribute_dataset(recording.dataset(8))
    seen = [
        np.concatenate([np.asarray(part) for part in strategy.experimental_local_results(batch.inputs)]) for batch, _ in dataset
    ]
    np.testing.assert_array_equal(np.concatenate(seen), data[0])


def test_a_plain_model_trains_on_the_teachers_outputs_as_targets(teacher, student, data, tmp_path):
    weights = np.linspace(0, 1, 24).astype("float32")
    recording = record(teacher, (*data, weights), tmp_path / "r")
    x, outputs, weight = read(recording, targets="teacher")
    np.testing.assert_array_equal(x, data[0])
    np.testing.assert_array_equal(weight, weights)
    np.testing.assert_allclose(outputs, teacher.predict(data[0], verbose=0), rtol=1e-3, atol=1e-3)
    student.compile("adam", "mse")
    student.fit(recording.dataset(8, targets="teacher"), verbose=0, shuffle=False)


def test_a_recording_describes_itself(teacher, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    assert (recording.num_samples, len(recording), recording.views, recording.top_k, recording.dtype) == (
        24,
        24,
        1,
        None,
        "float16",
    )
    assert recording.path == tmp_path / "r"
    assert recording.bytes == sum(file.stat().st_size for file in (tmp_path / "r").iterdir())
    assert "teacher='teacher'" in repr(recording)
    assert "num_samples=24" in repr(recording)


# Augmentation


def echo(shape=(8, 8, 1)):
    """A teacher whose output is its input."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Identity()(keras.layers.Identity()(inputs)), name="echo")


@pytest.mark.parametrize("batch_size", [None, 6])
def test_the_student_sees_the_very_view_that_the_teacher_saw(batch_size, images, tmp_path):
    recording = record(echo(), images, tmp_path / "r", augment=shift_and_scale, views=3, dtype="float32")
    assert len(recording) == 51
    count = 0
    for batch, _ in recording.dataset(batch_size, shuffle=True):
        assert np.array_equal(batch.inputs, batch.outputs)
        count += 1 if batch_size is None else len(batch.inputs)
    assert count == 51


def test_views_differ_and_can_be_read_one_by_one(images, tmp_path):
    recording = record(echo(), images, tmp_path / "r", augment=shift_and_scale, views=2, dtype="float32")
    first, second = (read(recording, view=view) for view in range(2))
    every = read(recording)
    np.testing.assert_array_equal(first[1], images[1])
    np.testing.assert_array_equal(np.concatenate([first[0].inputs, second[0].inputs]), every[0].inputs)
    assert not any(np.array_equal(a, b) for a, b in zip(first[0].inputs, second[0].inputs, strict=True))
    assert len({x.tobytes() for x in every[0].inputs}) == 34
    one = record(echo(), images, tmp_path / "one", augment=shift_and_scale, dtype="float32")
    np.testing.assert_array_equal(read(one)[0].inputs, first[0].inputs)  # more views leave the first as it was


def test_inputs_are_stored_once_and_as_they_came(images, tmp_path):
    teacher = image_teacher()
    sizes = [record(teacher, images, tmp_path / str(v), augment=shift_and_scale, views=v).bytes for v in (1, 5)]
    assert sizes[1] - sizes[0] < 17 * 4 * (8 + 4 * 2) + 400  # a seed and four half floats a view, and some manifest
    manifest = json.loads((tmp_path / "5" / "manifest.json").read_text())
    assert manifest["layout"]["sample"][0] == {"name": "x", "dtype": "uint8", "shape": [8, 8, 1]}


def test_another_seed_gives_other_views(images, tmp_path):
    a = read(record(echo(), images, tmp_path / "a", augment=shift_and_scale))[0].inputs
    b = read(record(echo(), images, tmp_path / "b", augment=shift_and_scale, seed=-1))[0].inputs
    assert not np.array_equal(a, b)


def test_nested_inputs_are_augmented_together(tmp_path):
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    teacher = keras.Model({"a": a, "b": b}, keras.layers.Add()([a, b]))
    x = {"a": np.ones((9, 2), "float32"), "b": np.zeros((9, 2), "float32")}

    def augment(x, seed):
        if tf.random.stateless_uniform((), seed) > 0.5:  # autograph works in it
            return {"a": x["b"], "b": x["a"] * 2}
        return x

    recording = record(teacher, x, tmp_path / "r", augment=augment, views=4)
    (batch,) = read(recording)
    np.testing.assert_array_equal(batch.outputs, batch.inputs["a"] + batch.inputs["b"])
    assert set(batch.outputs[:, 0]) == {1.0, 2.0}


def test_the_augmentation_must_be_handed_over_to_read(images, tmp_path):
    record(echo(), images, tmp_path / "r", augment=shift_and_scale)
    with pytest.raises(ValueError, match="recorded with an augmentation"):
        Recording(tmp_path / "r")
    with pytest.raises(ValueError, match="makes something else"):
        Recording(tmp_path / "r", augment=lambda x, seed: shift_and_scale(x, seed) * 1.01)
    with pytest.raises(ValueError, match="makes something else"):
        record(echo(), images, tmp_path / "r", augment=lambda x, seed: shift_and_scale(x, seed + 1))
    with pytest.raises(ValueError, match="augment: recorded with one"):
        record(echo(), images, tmp_path / "r")
    assert len(read(Recording(tmp_path / "r", augment=shift_and_scale))[1]) == 17
    record(image_teacher(), images, tmp_path / "plain")
    with pytest.raises(ValueError, match="recorded without an augmentation"):
        Recording(tmp_path / "plain", augment=shift_and_scale)


@pytest.mark.filterwarnings("ignore:Seed 7 from outer graph")
def test_an_augmentation_that_ignores_its_seed_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="must give the same view for the same seed"):
        record(echo(), images, tmp_path / "r", augment=lambda x, seed: tf.cast(x, tf.float32) + tf.random.uniform(()))


# Opening instead of recording


@pytest.fixture
def no_pass(monkeypatch):
    def refuse(*args):
        raise AssertionError("the teacher was run")

    return lambda: monkeypatch.setattr(_recorder.TeacherPass, "__call__", refuse)


def test_a_complete_recording_is_opened_without_the_teacher(teacher, data, tmp_path, no_pass):
    record(teacher, data, tmp_path / "r")
    before = files_of(tmp_path / "r")
    no_pass()
    twin = classifier(16)  # other names, other flags, other batches: the same teacher and data
    twin.set_weights(teacher.get_weights())
    twin.trainable = False
    twin.compile("adam", "mse")
    assert record(teacher, data, tmp_path / "r", verify=True).num_samples == 24
    assert record(twin, data, tmp_path / "r", batch_size=3).num_samples == 24
    assert record(twin, tf.data.Dataset.from_tensor_slices(data).batch(4), tmp_path / "r").num_samples == 24
    assert files_of(tmp_path / "r") == before


def _scaled(teacher):
    teacher.layers[0].kernel.assign(teacher.layers[0].kernel * 1.001)
    return teacher


OTHERS = {
    "the teacher's weights": lambda t, d: (_scaled(t), d, {}),
    "the teacher's architecture": lambda t, d: (classifier(16, activation="softmax"), d, {}),
    r"the data: shape of x \(4,\) against \(5,\)": lambda t, d: (t, (np.ones((24, 5), "float32"), d[1]), {}),
    "the data: dtype of y int64 against int32": lambda t, d: (t, (d[0], d[1].astype("int32")), {}),
    "the data: the first samples of x": lambda t, d: (t, (d[0][::-1], d[1]), {}),
    "the data: the first samples of y": lambda t, d: (t, (d[0], d[1] + 1), {}),
    "the data: 24 samples against 20": lambda t, d: (t, (d[0][:20], d[1][:20]), {}),
    r"the data: recorded \(x, y\), received \(x\)": lambda t, d: (t, d[0], {}),
    "the data: the structure of y": lambda t, d: (t, (d[0], {"a": d[1]}), {}),
    "top_k: recorded None, asked for 2": lambda t, d: (t, d, {"top_k": 2}),
    "dtype: recorded 'float16', asked for 'float32'": lambda t, d: (t, d, {"dtype": "float32"}),
    r"layer_names: recorded \[\], asked for \['dense": lambda t, d: (t, d, {"layer_names": [t.layers[0].name]}),
    "augment: recorded without one": lambda t, d: (t, d, {"augment": lambda x, seed: x}),
    "teacher_preprocessing: recorded without one": lambda t, d: (t, d, {"teacher_preprocessing": lambda x: x}),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_teacher_other_data_or_other_settings_are_named(difference, teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    before = files_of(tmp_path / "r")
    other_teacher, other_data, settings = OTHERS[difference](teacher, data)
    with pytest.raises(ValueError, match=difference) as error:
        record(other_teacher, other_data, tmp_path / "r", **settings)
    assert "Record to another path" in str(error.value)
    assert files_of(tmp_path / "r") == before


def _changed(part, index):
    part = part.copy()
    part[index] += 1
    return part


@pytest.mark.parametrize("role", ["x", "y", "sample_weight"])
@pytest.mark.parametrize("source", [lambda parts: parts, lambda parts: tf.data.Dataset.from_tensor_slices(parts).batch(50)])
def test_verify_compares_all_data_without_the_teacher(source, role, teacher, tmp_path, no_pass):
    rng = np.random.default_rng(0)
    parts = {"x": rng.normal(size=(300, 4)).astype("float32"), "y": np.arange(300), "sample_weight": np.ones(300, "float32")}
    record(teacher, source(tuple(parts.values())), tmp_path / "r", samples_per_shard=40)
    before = files_of(tmp_path / "r")
    no_pass()
    other = source(tuple({**parts, role: _changed(parts[role], 202)}.values()))  # between those that are always looked at
    record(teacher, other, tmp_path / "r")
    with pytest.raises(ValueError, match="samples 200 to 239 are not those of shard-00005.*choose another path, or delete"):
        record(teacher, other, tmp_path / "r", verify=True)
    record(teacher, source(tuple(parts.values())), tmp_path / "r", verify=True)
    longer = {key: np.concatenate([part, part[:20]]) for key, part in parts.items()}  # no .batch(50): another cardinality
    with pytest.raises(ValueError, match="samples 280 to 319 are not those of shard-00007"):
        record(teacher, interrupted(tuple(longer.values()), None), tmp_path / "r", verify=True)
    assert files_of(tmp_path / "r") == before


def test_mending_with_verify_compares_the_rest_too(teacher, data, tmp_path):
    record(teacher, SLICES(data).batch(5), tmp_path / "r")
    flip(tmp_path / "r" / "shard-00001.tfrecord")
    with pytest.raises(ValueError, match="samples 21 to 23 are not those of shard-00003"):
        record(teacher, SLICES((data[0], _changed(data[1], -1))).batch(5), tmp_path / "r", verify=True)


@pytest.mark.parametrize("index", [500, 999])
def test_arrays_are_compared_over_their_whole_length(index, teacher, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(1000, 4)).astype("float32"), np.arange(1000)
    record(teacher, (x, y), tmp_path / "r", batch_size=100, samples_per_shard=500)
    assert record(teacher, (x, y), tmp_path / "r", batch_size=64).num_samples == 1000
    with pytest.raises(ValueError, match="the data: later samples of y.*Record to another path"):
        record(teacher, (x, _changed(y, index)), tmp_path / "r", batch_size=64)


def test_a_data_set_that_ends_what_arrays_began_leaves_nothing_to_compare_arrays_with(teacher, data, tmp_path, monkeypatch):
    finish = _recorder._Run._finish_shard
    monkeypatch.setattr(_recorder._Run, "_finish_shard", lambda run: (_ for _ in ()).throw(StopError))
    with pytest.raises(StopError):
        record(teacher, data, tmp_path / "r")
    monkeypatch.setattr(_recorder._Run, "_finish_shard", finish)
    other = (data[0], _changed(data[1], -1))
    record(teacher, SLICES(other).batch(5), tmp_path / "r")
    record(teacher, other, tmp_path / "r", verify=True)


def _subclassed(function):
    class Told(keras.Model):
        def __init__(self):
            super().__init__(name="told")
            self.dense = keras.layers.Dense(3, name="dense")

        def call(self, x):
            return function(self.dense(x))

    model = Told()
    model(np.zeros((1, 4), "float32"))
    model.dense.kernel.assign(np.random.default_rng(0).normal(size=(4, 3)))
    return model


@pytest.mark.parametrize("settings", [{}, {"layer_names": ["dense"]}, {"batch_size": 3}])
def test_a_teacher_of_another_call_is_found_out(settings, data, tmp_path):
    record(_subclassed(keras.ops.tanh), data, tmp_path / "r", **{**settings, "batch_size": 5})
    before = files_of(tmp_path / "r")
    assert record(_subclassed(lambda z: keras.ops.tanh(z * (1 + 1e-4))), data, tmp_path / "r", **settings).num_samples == 24
    for function in (keras.ops.relu, lambda z: -keras.ops.tanh(z), lambda z: keras.ops.tanh(z)[:, :2]):
        with pytest.raises(ValueError, match="the teacher computes something else.*Record to another path"):
            record(_subclassed(function), data, tmp_path / "r", **settings)
    assert files_of(tmp_path / "r") == before


def test_a_recording_without_its_examples_is_named(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    (tmp_path / "r" / "examples.npz").unlink()
    with pytest.raises(ValueError, match="examples.npz.*delete"):
        record(teacher, data, tmp_path / "r")


def test_a_seed_without_augmentation_does_not_matter(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r", seed=1)
    record(teacher, data, tmp_path / "r", seed=2)


# Interruptions


class StopError(Exception):
    pass


def interrupted(data, after, *, batch=5):
    """A data set that breaks after some batches; its first samples can be looked at before."""

    def batches():
        for index in range(0, len(data[0]), batch):
            if index // batch == after:
                raise StopError
            yield tuple(part[index : index + batch] for part in data)

    spec = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in data)
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


def test_an_interrupted_recording_goes_on_and_ends_the_same(teacher, data, tmp_path, monkeypatch):
    record(teacher, interrupted(data, None), tmp_path / "whole")
    for after in (2, 3, 4):
        with pytest.raises(Exception, match="Stop"):
            record(teacher, interrupted(data, after), tmp_path / "r")
        with pytest.raises(ValueError, match="is not complete: .* samples so far"):
            Recording(tmp_path / "r")
    batches = []
    run = _recorder.TeacherPass.__call__
    monkeypatch.setattr(_recorder.TeacherPass, "__call__", lambda *args: (batches.append(args[-1]), run(*args))[1])
    record(teacher, interrupted(data, None), tmp_path / "r")
    assert batches == ["samples 10 to 14", "samples 15 to 19", "samples 20 to 23"]  # shards of 7: the first two were there
    assert files_of(tmp_path / "r") == files_of(tmp_path / "whole")


def test_a_shuffled_source_is_found_out_when_recording_goes_on(teacher, data, tmp_path):
    with pytest.raises(Exception, match="Stop"):
        record(teacher, interrupted(data, 4), tmp_path / "r")
    order = np.r_[np.arange(9), 10, 9, np.arange(11, 24)]  # the first ones are the same
    shuffled = tuple(part[order] for part in data)
    with pytest.raises(ValueError, match="samples 7 to 13 are not those of shard-00001.tfrecord.*switch off shuffling"):
        record(teacher, interrupted(shuffled, None), tmp_path / "r")
    with pytest.raises(ValueError, match="first samples of x.*If the data set shuffles"):
        record(teacher, tf.data.Dataset.from_tensor_slices(data).shuffle(24, seed=3).batch(5), tmp_path / "r")


def test_data_that_has_become_shorter_is_found_out(teacher, data, tmp_path):
    with pytest.raises(Exception, match="Stop"):
        record(teacher, interrupted(data, 4), tmp_path / "r")
    with pytest.raises(ValueError, match="samples 7 to 8 are not those of shard-00001.tfrecord"):
        record(teacher, interrupted(tuple(part[:9] for part in data), None), tmp_path / "r")


DRIVER = """
import os, resource, signal, sys
import numpy as np, tensorflow as tf, keras
from keras_kd.recording import _shards
from keras_kd.recording import Recording, record_teacher

def teacher():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, "relu", name="wide"), keras.layers.Dense(10, "softmax")])

def forked(work, *args):  # TensorFlow is imported, and has not started its threads yet
    child = os.fork()
    if child == 0:
        try:
            work(*args)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.wait4(child, 0)[1:]

def record(path, die_at):
    events = iter(range(1, 10**6))
    def watched(function):
        def around(*args):
            for step in (lambda: None, lambda: function(*args)):
                result = step()
                if next(events) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        return around
    os.replace = watched(os.replace)
    os.ftruncate = watched(os.ftruncate)
    _shards.ShardWriter.write = watched(_shards.ShardWriter.write)
    x = np.random.default_rng(0).normal(size=(200, 16)).astype("float32")
    record_teacher(teacher(), (x, np.arange(200)), path, layer_names=["wide"], samples_per_shard=30, verbose=0)

def large(path, count):
    def batches():
        for index in range(count // 64):
            yield np.full((64, 64, 64, 3), index % 251, "uint8")
    data = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec((None, 64, 64, 3), tf.uint8))
    model = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)])
    recording = record_teacher(model, data, path, verbose=0, samples_per_shard=512)
    assert sum(len(batch.inputs) for (batch,) in recording.dataset(64, shuffle=512)) == count
"""


# One process imports TensorFlow for three tests; what each looks at runs in children of it.
MOMENTS = """
forked(record, 'whole', 0)
# Around each lock, each batch written and each rename, of shards and of manifests.
for die_at in [1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 14, 15, 16, 8, 12, 10, 17, 18, 0]:
    status, _ = forked(record, 'killed', die_at)
    print('killed', os.waitstatus_to_exitcode(status))
for count in (2048, 8192):
    status, usage = forked(large, str(count), count)
    print('memory', os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024)

def read():
    recording = Recording('elsewhere')
    os.chdir('/')
    total = sum(float(np.sum(batch.outputs)) for batch, _ in recording.dataset(5))
    print('moved', total, recording.teacher_name, len(recording), flush=True)

forked(read)
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """What the other process said, by its first word, and the folder that it worked in."""
    folder = tmp_path_factory.mktemp("driven")
    data = np.random.default_rng(3).normal(size=(24, 4)).astype("float32"), np.arange(24) % 3
    record(classifier(16, name="teacher"), data, folder / "r")
    shutil.move(folder / "r", folder / "elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-u", "-c", DRIVER + MOMENTS], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = [line.split() for line in result.stdout.splitlines()]
    return {word: [line[1:] for line in said if line[0] == word] for word in ("killed", "memory", "moved")}, folder


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(driven):
    said, folder = driven
    codes = [int(code) for (code,) in said["killed"]]
    assert codes.count(-9) >= 10, codes
    assert set(codes) == {-9, 0}
    assert codes[-1] == 0
    assert files_of(folder / "killed") == files_of(folder / "whole")
    shards = {f"shard-0000{i}.tfrecord" for i in range(7)}
    assert set(files_of(folder / "whole")) == {"manifest.json", "examples.npz", *shards}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(driven):
    lines = driven[0]["memory"]
    assert [line[0] for line in lines] == ["0", "0"]
    assert int(lines[1][1]) < int(lines[0][1]) + 40, lines  # MB; the data grew by 75


@pytest.mark.slow
def test_another_process_reads_a_recording_that_was_moved(driven):
    said, folder = driven
    ((total, name, length),) = said["moved"]
    assert float(total) == pytest.approx(float(np.sum(read(Recording(folder / "elsewhere"))[0].outputs)), abs=1e-3)
    assert (name, length) == ("teacher", "24")


def test_a_path_that_another_process_records_to_is_refused(teacher, data, tmp_path):
    (tmp_path / "r").mkdir()
    with _shards.lock(tmp_path / "r"):
        with pytest.raises(RuntimeError, match=f"is being recorded by process {os.getpid()} on"):
            record(teacher, data, tmp_path / "r")
    assert record(teacher, data, tmp_path / "r").num_samples == 24


def test_the_lock_of_a_dead_process_is_taken_over(teacher, data, tmp_path):
    (tmp_path / "r").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"host": os.uname().nodename, "process": dead.pid}
    (tmp_path / "r" / ".lock").write_text(json.dumps(owner))
    assert record(teacher, data, tmp_path / "r").num_samples == 24
    assert not (tmp_path / "r" / ".lock").exists()


def test_the_lock_of_another_machine_is_respected(teacher, data, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").write_text(json.dumps({"host": "faraway", "process": 12}))
    with pytest.raises(RuntimeError, match="process 12 on faraway.*delete"):
        record(teacher, data, tmp_path / "r")


# Damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.fixture(params=[truncate, flip, pathlib.Path.unlink], ids=["truncated", "flipped", "missing"])
def damage(request):
    return request.param


def test_a_damaged_shard_is_named_left_out_or_recorded_again(damage, teacher, data, tmp_path, monkeypatch):
    path = tmp_path / "r"
    source = (data[0], np.arange(24))
    record(teacher, source, path)
    before, times = files_of(path), {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    damage(path / "shard-00001.tfrecord")
    recording = Recording(path)
    assert recording.verify() == ["shard-00001.tfrecord"]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="shard-00001.tfrecord.*verify=True"):
        list(recording.dataset(4))
    with pytest.warns(UserWarning, match="left out: shard-00001.tfrecord, 7 of 24 samples"):
        dataset = recording.dataset(4, skip_damaged=True)
    assert [int(y) for _, ys in dataset for y in ys] == [*range(7), *range(14, 24)]
    assert int(dataset.cardinality()) == 5

    batches = []
    run = _recorder.TeacherPass.__call__
    monkeypatch.setattr(_recorder.TeacherPass, "__call__", lambda *args: (batches.append(args[-1]), run(*args))[1])
    time.sleep(0.01)
    assert record(teacher, source, path, verify=True).verify() == []
    assert batches == ["samples 5 to 9", "samples 10 to 14"]
    assert files_of(path) == before
    written = {file.name for file in path.iterdir() if file.stat().st_mtime_ns != times[file.name]}
    assert written == {"shard-00001.tfrecord", "manifest.json"}


def test_a_shard_of_another_size_is_recorded_again_unasked(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    before = files_of(tmp_path / "r")
    truncate(tmp_path / "r" / "shard-00003.tfrecord")
    record(teacher, data, tmp_path / "r")
    assert files_of(tmp_path / "r") == before


def test_mending_refuses_other_data(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    (tmp_path / "r" / "shard-00003.tfrecord").unlink()
    other = (np.r_[data[0][:22], data[0][22:] + 1], data[1])
    with pytest.raises(ValueError, match="samples 21 to 23 are not those of shard-00003"):
        record(teacher, SLICES(other).batch(5), tmp_path / "r")


def test_a_damaged_shard_stops_fit_with_its_name(teacher, student, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    flip(tmp_path / "r" / "shard-00002.tfrecord")
    follower = Follower(student)
    follower.compile("adam")
    with pytest.raises(tf.errors.InvalidArgumentError, match="shard-00002.tfrecord"):
        follower.fit(recording.dataset(4), verbose=0, shuffle=False)


def test_all_damaged_leaves_an_empty_data_set(teacher, data, tmp_path):
    recording = record(teacher, data, tmp_path / "r")
    for file in (tmp_path / "r").glob("shard-*"):
        truncate(file)
    with pytest.warns(UserWarning, match="24 of 24 samples"):
        assert list(recording.dataset(4, shuffle=True, skip_damaged=True)) == []


def test_a_broken_manifest_is_named(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    truncate(tmp_path / "r" / "manifest.json")
    with pytest.raises(ValueError, match="manifest.json.*record again"):
        Recording(tmp_path / "r")


def test_an_older_format_is_refused(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    file = tmp_path / "r" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    with pytest.raises(ValueError, match="format 1.*record again"):
        Recording(tmp_path / "r")


def test_a_newer_format_is_refused(teacher, data, tmp_path):
    record(teacher, data, tmp_path / "r")
    file = tmp_path / "r" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="format 99.*newer keras_kd"):
        Recording(tmp_path / "r")


# Bad inputs

SLICES = tf.data.Dataset.from_tensor_slices
X = np.ones((6, 4), "float32")
BAD_ARGUMENTS = {
    "`dtype` must be": {"dtype": "int8"},
    "`top_k` must be an integer of at least 1": {"top_k": 0},
    "`top_k` must be between 1 and the number of classes": {"top_k": 4},
    "`views` must be": {"views": 0},
    "Several views need an augmentation": {"views": 2},
    "`batch_size` must be": {"batch_size": 0},
    "`samples_per_shard` must be": {"samples_per_shard": -1},
    "`seed` must be": {"seed": 0.5},
    "`augment` must be a function": {"augment": 3},
    "`layer_names` must be a list": {"layer_names": "dense"},
    'No layer "nothing"': {"layer_names": ["nothing"]},
    "`teacher_preprocessing` must be callable": {"teacher_preprocessing": 1},
    "`verbose` must be": {"verbose": "loud"},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_arguments_out_of_range_are_named(message, teacher, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        record(teacher, X, tmp_path / "r", **BAD_ARGUMENTS[message])
    assert not list(tmp_path.glob("r/*"))


def ragged():
    return tf.data.Dataset.from_tensors(tf.ragged.constant([[1.0], [1.0, 2.0]])).map(lambda x: x)


BAD_DATA = {
    "must be batched": lambda: SLICES((X, np.arange(6))),
    "must end. Received: an infinite one": lambda: SLICES(X).batch(2).repeat(),
    "at least one sample": lambda: SLICES(X).batch(2).take(0),
    "at least one sample. ": lambda: X[:0],
    "must be a batched tf.data.Dataset": lambda: [1, 2, 3],
    "must give x,": lambda: (X, X, X, X),
    "the same number of samples": lambda: (X, X[:3]),
    "holds numbers. Received: .*string": lambda: SLICES((X, ["a"] * 6)).batch(2),
    "holds numbers": lambda: (X, np.array(["a"] * 6)),
    "dense tensors. Received: x as RaggedTensorSpec": ragged,
    "samples of one shape. Received: x of shapes": lambda: tf.data.Dataset.from_generator(
        lambda: (X[:, :width] for width in (4, 3)), output_signature=tf.TensorSpec((None, None), tf.float32)
    ),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_data_that_cannot_be_recorded_is_explained(message, teacher, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        record(teacher, BAD_DATA[message](), tmp_path / "r")


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`teacher` must be a keras.Model"):
        record("resnet", X, tmp_path / "r")
    with pytest.raises(ValueError, match="must be built"):
        record(keras.Sequential([keras.layers.Dense(2)]), X, tmp_path / "r")
    stateful = keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), keras.layers.LSTM(2, stateful=True, name="memory")])
    with pytest.raises(ValueError, match="memory are stateful"):
        record(stateful, np.ones((2, 3, 4), "float32"), tmp_path / "r")


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_top_k_needs_classes_that_exclude_each_other(activation, tmp_path):
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3, activation=activation, name="said")(inputs)
    teacher = keras.Model(inputs, {"said": outputs if activation else keras.ops.abs(outputs)})
    with pytest.raises(ValueError, match='`top_k`.*output "said".*top_k=None'):
        record(teacher, X, tmp_path / "r", top_k=2)


def test_overflow_and_nan_name_the_output_and_the_fix(teacher, tmp_path):
    x = np.ones((6, 4), "float32")
    large = classifier(1)
    large.layers[-1].bias.assign([1e5, 0.0, 0.0])
    with pytest.raises(ValueError, match='The teacher\'s output must fit into float16.*dtype="float32"'):
        record(large, x, tmp_path / "a")
    assert read(record(large, x, tmp_path / "b", dtype="float32"))[0].outputs.max() > 9e4
    x[4, 0] = np.nan
    with pytest.raises(ValueError, match="must be finite. Received: NaN or infinite values for samples 0 to 4"):
        record(teacher, x, tmp_path / "c", layer_names=[teacher.layers[0].name])
    first = teacher.layers[0]
    first.activation = keras.activations.linear
    first.bias.assign(np.full(16, 7e4))
    teacher.layers[-1].kernel.assign(teacher.layers[-1].kernel * 0)
    with pytest.raises(ValueError, match=f'layer "{first.name}" must fit into float16'):
        record(teacher, X, tmp_path / "d", layer_names=[first.name])


def _offset(bias, classes=3):
    teacher = classifier(4, classes=classes)
    teacher.layers[-1].bias.assign(np.broadcast_to(np.asarray(bias, "float32"), classes))
    return teacher


def test_logits_that_half_precision_spoils_are_refused(data, tmp_path):
    teacher = _offset([3000.0, 3001.0, 3002.0])
    with pytest.raises(ValueError, match='output loses too much in float16.*dtype="float32"'):
        record(teacher, data, tmp_path / "a")
    found = read(record(teacher, data, tmp_path / "b", dtype="float32"))[0].outputs
    np.testing.assert_allclose(found, teacher.predict(data[0], verbose=0), atol=1e-3)
    record(teacher, data, tmp_path / "c", top_k=2)  # log-probabilities: the offset is gone
    softmax = keras.Sequential([keras.Input((4,)), *teacher.layers, keras.layers.Softmax()])
    found = keras.ops.softmax(read(record(softmax, data, tmp_path / "d"))[0].outputs)
    np.testing.assert_allclose(found, softmax.predict(data[0], verbose=0), atol=5e-3)


def test_logits_that_half_precision_coarsens_are_warned_of_once(data, tmp_path):
    teacher = _offset([200.0, 200.3, 150.0])
    with pytest.warns(UserWarning, match='output loses accuracy in float16.*dtype="float32"') as caught:
        record(teacher, data, tmp_path / "r")
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bias", [[30.0, -30.0, 29.9], [60.0, 60.1, -60.0], [900.0, 0.0, -500.0], [0.0, -4000.0, 0.1]])
def test_ordinary_logits_pass_silently(bias, data, tmp_path):
    record(_offset(bias), data, tmp_path / "r")


@pytest.mark.filterwarnings("error")
def test_large_numbers_of_a_regression_pass_silently(data, tmp_path):
    teacher = classifier(4, classes=1)
    teacher.layers[-1].kernel.assign(teacher.layers[-1].kernel * 10000)
    recording = record(teacher, data, tmp_path / "r", batch_size=23)  # the last batch is one row
    np.testing.assert_allclose(read(recording)[0].outputs, teacher.predict(data[0], verbose=0), rtol=1e-3)


def test_a_folder_with_other_things_in_it_is_left_alone(teacher, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder.*notes.txt"):
        record(teacher, X, tmp_path)
    with pytest.raises(NotADirectoryError, match="a file"):
        record(teacher, X, tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="No recording at"):
        Recording(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"shuffle": -1}, {"shuffle": "yes"}, {"view": 1}, {"view": "all"}, {"targets": "student"}]
)
def test_reading_arguments_out_of_range_are_named(arguments, teacher, tmp_path):
    recording = record(teacher, X, tmp_path / "r")
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        recording.dataset(**arguments)
