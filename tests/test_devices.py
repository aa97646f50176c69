"""Does training on several devices, in one process or in two, do what training on one device does?"""

import contextlib
import inspect
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kd
from keras_kd import losses
from keras_kd.losses._features import phase
from tests import multi_worker
from tests.conftest import classifier, convolutional, two_devices

BASES = (losses.DistillationLoss, losses.ResponseLoss, losses.FeatureLoss, losses.RelationLoss)
PUBLIC = [
    value
    for name, value in vars(losses).items()
    if name in losses.__all__ and inspect.isclass(value) and issubclass(value, losses.DistillationLoss) and value not in BASES
]
# Losses that compare the samples of a batch with each other, or keep what they saw of it.
OVER_THE_BATCH = (losses.RelationLoss, losses.DISTLoss, losses.MultiLevelKDLoss, losses.CRDLoss)
SHARE = 0.3  # of the supervised loss
RATE = 0.05

RNG = np.random.default_rng(11)
X = RNG.normal(size=(24, 8, 8, 1)).astype("float32")
Y = RNG.integers(0, 4, size=24)
WEIGHTS = RNG.uniform(0, 2, size=24).astype("float32")
BATCH = 8
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def on(names, **kwargs):
    return {"teacher_layer_name": names, "student_layer_name": names, **kwargs}


class Case:
    """A loss, what it compares, and the widths of the student's layers."""

    def __init__(self, make, widths=(5, 8), *, over_the_batch=None, **kwargs):
        self.make, self.widths, self.kwargs = make, widths, kwargs
        self.over_the_batch = issubclass(make, OVER_THE_BATCH) if over_the_batch is None else over_the_batch

    def __call__(self):
        kwargs = {name: value() if inspect.isfunction(value) else value for name, value in self.kwargs.items()}
        return self.make(**kwargs)


def first_case(make):
    if issubclass(make, losses.ResponseLoss):
        return Case(make)
    if make is losses.FSPLoss:
        return Case(make, **on(["conv1", "conv2"]))
    return Case(make, **on("conv2", **({"dim": 6, "queue": 20} if make is losses.CRDLoss else {})))


NARROW = (3, 6)
CASES = {
    **{make.__name__: first_case(make) for make in PUBLIC},
    "HintLoss with a projector": Case(losses.HintLoss, NARROW, **on("conv2", projector=lambda: keras.layers.Dense(8))),
    "ABLoss with a projector": Case(losses.ABLoss, NARROW, **on("conv2", projector=lambda: keras.layers.Conv2D(8, 1))),
    "VIDLoss on two narrower layers": Case(losses.VIDLoss, NARROW, **on(["conv1", "conv2"])),
    "HintLoss with batch normalisation": Case(losses.HintLoss, NARROW, over_the_batch=True, **on("conv2")),
    "ReviewKDLoss with its cascade": Case(losses.ReviewKDLoss, NARROW, over_the_batch=True, **on(["conv1", "conv2"])),
}


def parametrized(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


mean_over_samples = parametrized({name: case for name, case in CASES.items() if not case.over_the_batch})
over_the_batch = parametrized({name: case for name, case in CASES.items() if case.over_the_batch})


def one_device():
    return tf.distribute.get_strategy()


def distiller_of(case, strategy, teacher=None, student=None, **compiled):
    """A compiled Distiller whose every weight is the same whatever the strategy."""
    keras.utils.set_random_seed(7)
    with strategy.scope():
        taught = convolutional((5, 8)) if teacher is None else teacher()
        learning = convolutional(case.widths) if student is None else student()
        distiller = keras_kd.Distiller(taught, learning, case(), student_loss_weight=SHARE)
        distiller.compile(**{"optimizer": keras.optimizers.SGD(RATE), "loss": FROM_LOGITS, **compiled})
    return distiller


def values(variables):
    return [np.array(variable) for variable in variables]


def assert_close(received, expected, atol=1e-6):
    assert len(received) == len(expected)
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=atol, atol=atol)


def assert_devices_agree(variables):
    for variable in variables:
        first, second = two_devices().experimental_local_results(variable.value)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


def fit(distiller, x=X, y=Y, **kwargs):
    return distiller.fit(x, y, **{"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}).history


@mean_over_samples
def test_two_devices_train_as_one_with_a_loss_that_is_a_mean_over_samples(case):
    alone, together = distiller_of(case, one_device(), run_eagerly=True), distiller_of(case, two_devices())
    before = values(together.trainable_variables)
    for distiller in (alone, together):
        fit(distiller, sample_weight=WEIGHTS)
    assert_close(values(together.variables), values(alone.variables))
    assert_devices_agree(together.variables)
    assert not any(np.array_equal(*pair) for pair in zip(values(together.trainable_variables), before, strict=True))


def inner(model, names):
    if names is None:
        return model
    outputs = [model.get_layer(name).output for name in ([names] if isinstance(names, str) else names)]
    return keras.Model(model.inputs[0], [model.outputs[0], outputs[0] if isinstance(names, str) else outputs])


class ByHand:
    """Gradient descent on the mean of the gradients of the two halves of each batch; what else changes is the first half's."""

    def __init__(self, distiller):
        (self.loss,) = distiller.distillation_losses
        name = self.loss.teacher_layer_name
        self.inner = name is not None
        self.models = [inner(model, name) for model in (distiller.teacher, distiller.student)]
        self.weights = distiller.trainable_variables
        self.states = [variable for variable in distiller.variables if not variable.trainable]

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            teacher, student = (model(x) for model in self.models)
            logits = student[0] if self.inner else student
            with phase(training=True):
                distance = self.loss(*((teacher[1], student[1]) if self.inner else (teacher, student)))
            total = SHARE * FROM_LOGITS(y, logits) + (1 - SHARE) * distance
        return tape.gradient(total, [weight.value for weight in self.weights])

    def step(self, x, y):
        before = values(self.states)
        gradients, after = [], []
        for half in (slice(None, -(-len(x) // 2)), slice(-(-len(x) // 2), None)):  # the first takes the odd sample
            for state, value in zip(self.states, before, strict=True):
                state.assign(value)
            gradients.append(self.gradients(x[half], y[half]))
            after.append(values(self.states))
        for state, first in zip(self.states, after[0], strict=True):
            state.assign(first)
        for weight, first, second in zip(self.weights, *gradients, strict=True):
            weight.assign(weight - RATE * (first + second) / 2)


@over_the_batch
def test_each_device_relates_its_own_share_with_a_loss_over_the_batch(case):
    alone, together = distiller_of(case, one_device()), distiller_of(case, two_devices())
    by_hand = ByHand(alone)
    fit(together)
    for start in range(0, len(X), BATCH):
        by_hand.step(X[start : start + BATCH], Y[start : start + BATCH])
    assert_close(values(together.variables), values(alone.variables))
    assert_devices_agree(together.trainable_variables)
    if case.make is losses.CRDLoss:
        assert_devices_agree(together.variables)  # its queue too
    whole = distiller_of(case, one_device(), run_eagerly=True)
    fit(whole)
    assert any(np.max(np.abs(a - b)) > 1e-5 for a, b in zip(values(whole.variables), values(alone.variables), strict=True))


def test_on_two_devices_samples_of_a_smaller_share_weigh_more():
    case = CASES["KDLoss"]
    alone, together = distiller_of(case, one_device()), distiller_of(case, two_devices())
    by_hand = ByHand(alone)
    fit(together, X[:15], Y[:15], batch_size=5)
    for start in (0, 5, 10):
        by_hand.step(X[start : start + 5], Y[start : start + 5])
    assert_close(values(together.variables), values(alone.variables))


def distillers(teacher, student, loss, metrics=(), **kwargs):
    """The same compiled Distiller on one device and on two."""
    for strategy in (one_device(), two_devices()):
        keras.utils.set_random_seed(7)
        with strategy.scope():
            distiller = keras_kd.Distiller(teacher(), student(), loss(), **kwargs)
            distiller.compile(keras.optimizers.SGD(RATE), FROM_LOGITS, metrics=[metric() for metric in metrics])
        yield distiller


def assert_same_logs(received, expected):
    assert set(received) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(received[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def both_kinds():
    return [losses.KDLoss(), losses.HintLoss(keras.layers.Dense(8), **on("conv2"))]


def test_logs_of_two_devices_are_those_of_one_with_uneven_shares_and_without_the_teacher():
    named = [lambda: "accuracy", keras_kd.metrics.TeacherAgreement]
    alone, together = distillers(lambda: convolutional((5, 8)), convolutional, both_kinds, named)
    uneven = {"validation_data": (X[:9], Y[:9]), "validation_batch_size": 5}  # Keras stops at a first batch of 3 + 2 samples
    assert_same_logs(fit(together, **uneven), fit(alone, **uneven))
    for distiller in (alone, together):
        distiller.evaluate_teacher = False
    expected, received = (d.evaluate(X[:9], Y[:9], batch_size=5, verbose=0, return_dict=True) for d in (alone, together))
    assert set(expected) == {"loss", "student_loss", "accuracy"}
    assert_same_logs(received, expected)


def test_a_moving_average_follows_on_both_devices():
    def kept():
        return [losses.KDLoss(), losses.AttentionTransferLoss(**on("conv2"))]

    alone, together = distillers(lambda: keras_kd.teachers.MovingAverage(0.8), convolutional, kept)
    start = values(together.teacher.model.variables)
    fit(alone)
    fit(together)
    assert_close(values(together.variables), values(alone.variables))
    averages = together.teacher.model.variables
    assert_close(values(averages), values(alone.teacher.model.variables))
    assert_devices_agree(averages)
    assert not any(np.array_equal(*pair) for pair in zip(values(averages), start, strict=True))


def test_two_teachers_teach_on_both_devices():
    def teachers():
        return [convolutional((5, 8), name="a"), convolutional((3, 4), name="b")]

    def attention():
        return [losses.KDLoss(), losses.AttentionTransferLoss(teacher_layer_name="a/conv2", student_layer_name="conv2")]

    alone, together = distillers(teachers, convolutional, attention, teacher_weights=[2, 1])
    assert_same_logs(fit(together), fit(alone))
    assert_close(values(together.variables), values(alone.variables))


def test_a_recording_teaches_on_both_devices(tmp_path):
    recording = keras_kd.record_teacher(convolutional((5, 8)), (X, Y), tmp_path / "r", layer_names=["conv2"], verbose=0)
    alone, together = distillers(lambda: recording, convolutional, both_kinds)
    for distiller in (alone, together):
        distiller.fit(recording.dataset(BATCH), verbose=0, shuffle=False)
    assert_close(values(together.variables), values(alone.variables))


class Subclassed(keras.Model):
    """A model whose inner shapes show only when it is called."""

    def __init__(self, width):
        super().__init__()
        self.conv = keras.layers.Conv2D(width, 3, name="conv")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = keras.layers.Dense(4)

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.head.build((None, self.conv.filters))

    def call(self, x):
        return self.head(self.pool(self.conv(x)))


def subclassed(width):
    model = Subclassed(width)
    model.build((None, 8, 8, 1))
    return model


@pytest.mark.parametrize("loss", [lambda: losses.VIDLoss(**on("conv")), lambda: losses.CRDLoss(4, queue=12, **on("conv"))])
def test_layers_of_losses_that_are_made_in_the_first_step_are_trained_on_both_devices(loss):
    _, together = distillers(lambda: subclassed(8), lambda: subclassed(5), loss)
    fit(together)
    (made,) = together.distillation_losses
    before = values(made.trainable_variables)
    assert {id(variable) for variable in made.trainable_variables} <= {id(variable) for variable in together.trainable_variables}
    fit(together)
    assert_devices_agree(together.variables)
    assert not any(np.array_equal(*pair) for pair in zip(values(made.trainable_variables), before, strict=True))


@pytest.mark.parametrize("outside", ["student", "compile", "Distiller"])
def test_what_is_not_made_under_the_strategy_is_an_error(outside):
    def scope(part):
        return contextlib.nullcontext() if part == outside else two_devices().scope()

    with scope("student"):
        student = classifier()
    with scope("Distiller"):
        distiller = keras_kd.Distiller(classifier(), classifier() if outside == "Distiller" else student)
    with scope("compile"), pytest.raises(ValueError, match=r"under the same strategy.*dense.*with strategy.scope\(\):"):
        distiller.compile("adam", FROM_LOGITS)


# Several processes

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 180  # a worker that waits longer has hung


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_workers(folder, commands):
    """Runs one worker for each command, in `folder`, as one cluster on loopback; fails, with their logs, if one fails or hangs."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(len(commands))]}
    workers, logs = [], [folder / f"worker-{index}.log" for index in range(len(commands))]
    try:
        for index, (command, log) in enumerate(zip(commands, logs, strict=True)):
            config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
            environment = {**os.environ, "TF_CONFIG": config, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
            with log.open("w") as file:
                worker = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stdout=file, stderr=file)
            workers.append(worker)
        codes = [worker.wait(timeout=SECONDS) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = ["hung"]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(codes):
        pytest.fail(f"Workers ended with {codes}.\n" + "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in logs))


@pytest.mark.slow
def test_two_processes_train_validate_and_predict_as_one(tmp_path):
    recording = keras_kd.record_teacher(
        multi_worker.taught(),
        (multi_worker.X, multi_worker.Y),
        tmp_path / "recording",
        layer_names=["conv"],
        dtype="float32",
        verbose=0,
    )
    results = [tmp_path / f"{index}.json" for index in range(2)]
    run_workers(tmp_path, [["-m", "tests.multi_worker", str(result), str(recording.path)] for result in results])
    first, second = (json.loads(result.read_text()) for result in results)
    assert first == second
    assert first["replicas"] == 2
    for name in multi_worker.LOSSES:
        for part, expected in multi_worker.train(name, one_device(), recording).items():
            assert first[name][part].keys() == expected.keys(), (name, part)
            for key, value in expected.items():
                np.testing.assert_allclose(first[name][part][key], value, rtol=1e-6, atol=1e-6, err_msg=f"{name}: {part}: {key}")


PAGE = ROOT / "docs" / "distributed.md"


@pytest.mark.slow
def test_the_scripts_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).normal(size=(256, 4)).astype("float32"), np.arange(256) % 3
    np.savez("data.npz", x=x, y=y, x_val=x[:90], y_val=y[:90])
    classifier(16).save("teacher.keras")
    text = PAGE.read_text()
    one_host, several_hosts = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    keras.utils.disable_interactive_logging()
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", two_devices)
    exec(compile(one_host, PAGE.name, "exec"), {"x": x, "y": y})
    configs = [json.loads(config) for config in re.findall(r"TF_CONFIG='(.*?)'", text)]
    assert [config["task"]["index"] for config in configs] == [0, 1]
    assert all(len(config["cluster"]["worker"]) == len(configs) for config in configs)
    pathlib.Path("train.py").write_text(several_hosts)
    run_workers(tmp_path, [["train.py"]] * len(configs))
    log = pathlib.Path("worker-0.log").read_text()
    assert "Epoch 2/2" in log
    assert "val_accuracy" in log
    assert keras.saving.load_model("student.keras").count_params() == 67
