"""What do the differences to `keras.distillation` amount to? Measures both libraries on the same task, for docs/comparison.md.

`python benchmarks/comparison.py` writes results/comparison.json, and its figures into the page at their marks: behind each figure
stands a comment with its place there, `16.1<!--03.value.keras_distillation-->`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import rich
import sklearn
import sklearn.datasets
import tensorflow as tf
from distiller import clone, conv_net, describe_machine, interleave, load_data, make_step, summarize  # its neighbour

import keras_kd

RESULT = pathlib.Path(__file__).parent / "results" / "comparison.json"
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "comparison.md"
MARKED = re.compile(r"(?:`(?P<text>[^`]+)`|(?P<figure>[\d,]*\d(?:\.\d+)?))<!--(?P<place>[\w.]+)-->")
TEMPERATURE = 3.0
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Library:
    """One of the two, in the same words."""

    name: str
    Distiller: Any
    default: Callable[[], Any]  # the loss that it takes without being told more
    kd: Callable[[], Any]  # the best it has
    hint: Callable[[str], Any]  # mean squares of a layer
    raw: Callable[[Any], Any]  # a loss of Keras, at temperature 1


OURS = Library(
    "keras_kd",
    keras_kd.Distiller,
    default=lambda: keras_kd.losses.KDLoss(TEMPERATURE),
    kd=lambda: keras_kd.losses.KDLoss(TEMPERATURE),
    hint=lambda name: keras_kd.losses.HintLoss(teacher_layer_name=name, student_layer_name=name),
    raw=lambda loss: loss,
)
KERAS = Library(
    "keras_distillation",
    keras.distillation.Distiller,
    default=lambda: keras.distillation.LogitsDistillation(TEMPERATURE),
    kd=lambda: keras.distillation.LogitsDistillation(TEMPERATURE, loss=keras.losses.KLDivergence()),
    hint=lambda name: keras.distillation.FeatureDistillation("mse", name, name),
    raw=lambda loss: keras.distillation.LogitsDistillation(1.0, loss=loss),
)
MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {}


def defect(number: int) -> Callable[[Any], Any]:
    """Marks a function that measures the defect of this number in docs/comparison.md."""

    def register(function: Any) -> Any:
        MEASUREMENTS[f"{number:02}"] = function
        return function

    return register


def both(measure: Callable[[Library], Any], **others: Any) -> dict[str, Any]:
    """What `measure` gives for either library."""
    return {lib.name: measure(lib) for lib in (KERAS, OURS)} | others


def outcome(attempt: Callable[[], Any]) -> str:
    """Name of the error that `attempt` ends in; else what it says, or "works"."""
    try:
        said = attempt()
    except Exception as error:
        return type(error).__name__
    return said if isinstance(said, str) else "works"


# Models with logits x @ kernel, whose steps can be computed by hand

_rng = np.random.default_rng(11)
X = _rng.normal(size=(BATCH, 8)).astype("float32")
Y = _rng.integers(0, 5, size=BATCH)


def linear(seed: int, *, activation: str | None = None, dense: Any = keras.layers.Dense, **kwargs: Any) -> keras.Model:
    """One dense layer of fixed weights."""
    layer = dense(5, use_bias=False, activation=activation, name="logits", **kwargs)
    model = keras.Sequential([keras.Input((8,)), layer], name=f"linear_{seed}")
    layer.set_weights([np.random.default_rng(seed).normal(size=(8, 5))])
    return model


def two_layers(seed: int, *front: Any, width: int = 6, dense: Any = keras.layers.Dense) -> keras.Model:
    """Two dense layers, "hidden" and "logits", behind the layers `front`."""
    keras.utils.set_random_seed(seed)
    layers = [dense(width, use_bias=False, name="hidden"), keras.layers.Dense(5, use_bias=False, name="logits")]
    return keras.Sequential([keras.Input((8,)), *front, *layers], name=f"two_layers_{seed}")


class Counting(keras.layers.Dense):
    """Counts its calls."""

    calls = 0

    def call(self, inputs: Any) -> Any:
        """Counts, and computes the layer."""
        self.calls += 1
        return super().call(inputs)


def kernel(model: keras.Model) -> np.ndarray:
    return np.array(model.get_weights()[0], "float64")


def from_logits() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(lib: Library, teacher: Any, student: Any, loss: Any = None, *, student_loss: Any = None, **kwargs: Any) -> Any:
    """A Distiller that runs eagerly, for the cases in which only a step or two are wanted."""
    run_eagerly = kwargs.pop("run_eagerly", True)
    distiller = lib.Distiller(teacher, student, loss or lib.kd(), **kwargs)
    distiller.compile(keras.optimizers.SGD(1.0), student_loss or from_logits(), run_eagerly=run_eagerly)
    return distiller


def one_step(distiller: Any, x: Any = X, y: Any = Y, **kwargs: Any) -> dict[str, float]:
    """Trains on one batch and returns the logs."""
    history = distiller.fit(x, y, batch_size=len(x), shuffle=False, verbose=0, **kwargs).history
    return {name: values[0] for name, values in history.items()}


def evaluate(distiller: Any, x: Any = X, y: Any = Y) -> dict[str, float]:
    return distiller.evaluate(x, y, batch_size=len(x), verbose=0, return_dict=True)


def divergence(z_t: Any, z_s: Any, temperature: float = TEMPERATURE) -> Any:
    """T^2 KL(p_t || p_s) per sample, by log-softmax: what both libraries are compared with."""
    log_p, log_q = (tf.nn.log_softmax(tf.cast(z, "float64") / temperature) for z in (z_t, z_s))
    return temperature**2 * tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)


def right_update(weights: Any = 1.0, penalty: float = 0.0) -> np.ndarray:
    """What one step of gradient descent at rate 1 adds to the kernel of the student `linear(2)`; its teacher is `linear(1)`."""
    w = tf.Variable(kernel(linear(2)))
    with tf.GradientTape() as tape:
        z = tf.constant(X.astype("float64")) @ w
        supervised = tf.nn.sparse_softmax_cross_entropy_with_logits(Y, z)
        per_sample = 0.5 * supervised + 0.5 * divergence(X @ kernel(linear(1)), z)
        loss = tf.reduce_mean(weights * per_sample) + penalty * tf.reduce_sum(w**2)
    return -tape.gradient(loss, w).numpy()


def error_percent(update: np.ndarray, right: np.ndarray) -> float:
    return 100 * float(np.linalg.norm(update - right) / np.linalg.norm(right))


def update_of(lib: Library, *, student: Any = None, **given: Any) -> np.ndarray:
    """What one step adds to the student's kernel."""
    student = student or linear(2)
    before = kernel(student)
    one_step(compiled(lib, linear(1), student), **given)
    return kernel(student) - before


# The losses


def digits() -> tuple[np.ndarray, ...]:
    """scikit-learn's digits: 1,200 images to learn from, 597 to test with."""
    data = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype("float32"), data.target[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def dense_net(width: int, activation: str | None = None) -> keras.Model:
    layers = [keras.layers.Dense(width, "relu"), keras.layers.Dense(10, activation)]
    return keras.Sequential([keras.Input((64,)), *layers])


@defect(1)
def default_loss(seeds: int = 3) -> dict[str, Any]:
    """Agreement of student and teacher on test images, after learning from the teacher alone."""
    x, y, x_test, y_test = digits()

    def agreement(lib: Library, make_loss: Callable[[], Any], teacher: keras.Model, seed: int) -> float:
        keras.utils.set_random_seed(seed)
        student = dense_net(16)
        distiller = lib.Distiller(teacher, student, make_loss(), student_loss_weight=0.0)
        distiller.compile(keras.optimizers.Adam(0.005), from_logits())
        distiller.fit(x, y, epochs=30, batch_size=32, verbose=0)
        answers = (model.predict(x_test, verbose=0).argmax(-1) for model in (student, teacher))
        return 100 * float(np.mean(np.equal(*answers)))

    found: dict[str, list[float]] = {"teacher_accuracy": [], "default": [], "kl_divergence_object": [], "keras_kd": []}
    for seed in range(seeds):
        keras.utils.set_random_seed(100 + seed)
        teacher = dense_net(128)
        teacher.compile(keras.optimizers.Adam(0.005), from_logits(), metrics=["accuracy"])
        teacher.fit(x, y, epochs=20, batch_size=32, verbose=0)
        found["teacher_accuracy"].append(100 * teacher.evaluate(x_test, y_test, verbose=0)[1])
        for name, lib, make_loss in (
            ("default", KERAS, KERAS.default),
            ("kl_divergence_object", KERAS, KERAS.kd),
            ("keras_kd", OURS, OURS.kd),
        ):
            found[name].append(agreement(lib, make_loss, teacher, seed))
    z_t, z_s = X @ kernel(linear(1)), X @ kernel(linear(2))
    value = both(lambda lib: float(lib.default().compute_loss(z_t, z_s)), right=float(tf.reduce_mean(divergence(z_t, z_s))))
    return {"agreement_percent": {name: float(np.mean(values)) for name, values in found.items()}, "value": value}


@defect(2)
def cross_entropy_with_the_teacher() -> dict[str, Any]:
    """Gradient of the logits where student and teacher agree, and the largest probability after 200 steps of descent."""
    z_t = np.array([[2.0, 1.0, 0.0]], "float32")
    one = np.ones((1, 1), "float32")

    def model(logits: Any) -> keras.Model:
        layer = keras.layers.Dense(3, use_bias=False)
        made = keras.Sequential([keras.Input((1,)), layer])
        layer.set_weights([logits])
        return made

    def gradient_and_end(lib: Library) -> tuple[float, float]:
        student = model(z_t)
        loss = lib.raw(keras.losses.CategoricalCrossentropy(from_logits=True))
        distiller = lib.Distiller(model(z_t), student, loss, student_loss_weight=0.0)
        w = student.trainable_variables[0]

        def gradient() -> Any:
            with tf.GradientTape() as tape:
                value = distiller.compute_loss(one, None, distiller(one, training=True))
            return tape.gradient(value, w.value)

        at_teacher = float(tf.norm(gradient()))
        for _ in range(200):
            w.assign(w - gradient())
        return at_teacher, float(tf.reduce_max(tf.nn.softmax(w.value)))

    found = both(gradient_and_end)
    right = (0.0, float(tf.reduce_max(tf.nn.softmax(z_t))))
    parts = ("gradient_at_equality", "largest_probability")
    return {part: {name: pair[i] for name, pair in found.items()} | {"right": right[i]} for i, part in enumerate(parts)}


@defect(3)
def extreme_logits() -> dict[str, Any]:
    """Value and norm of the gradient for two opposed, certain answers at T = 1."""
    z_t, z_s = tf.constant([[60.0, 0.0]]), tf.constant([[0.0, 60.0]])
    losses = {
        "keras_distillation": keras.distillation.LogitsDistillation(1.0, loss=keras.losses.KLDivergence()),
        "keras_kd": keras_kd.losses.KDLoss(1.0),
    }

    def value_and_slope(compute: Any) -> tuple[float, float]:
        with tf.GradientTape() as tape:
            tape.watch(z_s)
            value = compute(z_t, z_s)
        return float(value), float(tf.norm(tape.gradient(value, z_s)))

    found = {name: value_and_slope(loss.compute_loss) for name, loss in losses.items()}
    found["right"] = value_and_slope(lambda t, s: tf.reduce_mean(divergence(t, s, 1.0)))
    return {part: {name: pair[i] for name, pair in found.items()} for i, part in enumerate(("value", "gradient"))}


@defect(4)
def softmax_outputs() -> dict[str, Any]:
    """The distillation loss of models that end in softmax."""

    def value(lib: Library) -> float:
        teacher, student = linear(1, activation="softmax"), linear(2, activation="softmax")
        distiller = compiled(lib, teacher, student, student_loss=keras.losses.SparseCategoricalCrossentropy())
        return evaluate(distiller)["distillation_loss"]

    return {"value": both(value, right=float(tf.reduce_mean(divergence(X @ kernel(linear(1)), X @ kernel(linear(2))))))}


# Losses on layers


@defect(5)
def passes(rounds: int = 50) -> dict[str, Any]:
    """Passes a step, updates of batch normalisation, and time, for distillation of the outputs and of two layers."""

    def counted(lib: Library) -> tuple[int, int]:
        models = two_layers(1, dense=Counting), two_layers(2, dense=Counting)
        distiller = compiled(lib, *models, [lib.kd(), lib.hint("hidden"), lib.hint("logits")])
        one_step(distiller)  # what Keras runs once in order to build
        before = [model.get_layer("hidden").calls for model in models]
        one_step(distiller)
        teacher, student = (model.get_layer("hidden").calls - calls for model, calls in zip(models, before, strict=True))
        return teacher, student

    def moved(lib: Library) -> float:
        norm = keras.layers.BatchNormalization(momentum=0.9)
        one_step(compiled(lib, two_layers(1), two_layers(2, norm), lib.hint("hidden")))
        return float(np.linalg.norm(norm.moving_mean) / np.linalg.norm(0.1 * X.mean(axis=0)))

    found = both(counted)
    return {
        "teacher_passes": {name: pair[0] for name, pair in found.items()},
        "student_passes": {name: pair[1] for name, pair in found.items()},
        "batch_norm_moves": both(moved, right=1.0),
        "time": step_times(rounds),
    }


def step_times(rounds: int) -> dict[str, Any]:
    """Times of a step with and without losses on two layers, and their ratios, round by round."""
    keras.utils.set_random_seed(0)
    dataset, data = load_data(BATCH, batches=20)
    teacher, student = conv_net((16, 72, 32), "teacher"), conv_net((16, 32, 32), "student")
    for model in (teacher, student):
        for name, index in (("early", 2), ("late", 8)):
            model.layers[index].name = name
    steps, models = {}, {}
    for lib in (KERAS, OURS):
        for task, losses in (("logits", [lib.kd()]), ("layers", [lib.kd(), lib.hint("early"), lib.hint("late")])):
            models[f"{lib.name}_{task}"] = model = lib.Distiller(clone(teacher), clone(student), losses)
            steps[f"{lib.name}_{task}"] = make_step(model, dataset, "auto")
    check_same_losses(models)
    measured = interleave(steps, rounds, 6)
    ratios = {
        "keras_distillation": lambda t: t["keras_distillation_layers"] / t["keras_distillation_logits"],
        "keras_kd": lambda t: t["keras_kd_layers"] / t["keras_kd_logits"],
        "keras_distillation_to_keras_kd": lambda t: t["keras_distillation_layers"] / t["keras_kd_layers"],
    }
    return {
        "data": data,
        "seconds_a_step": {name: summarize([times[name] for times in measured]) for name in steps},
        "ratio": {name: summarize([ratio(times) for times in measured]) for name, ratio in ratios.items()},
    }


def check_same_losses(models: dict[str, Any]) -> None:
    """Raises unless both libraries report the same loss after the same steps."""
    for task in ("logits", "layers"):
        pair = [float(models[f"{lib.name}_{task}"].get_metrics_result()["distillation_loss"]) for lib in (KERAS, OURS)]
        if not np.isclose(*pair, rtol=0.02):
            raise RuntimeError(f"The distillation losses of {task} differ: {pair}.")


@defect(6)
def evaluation() -> dict[str, Any]:
    """What `evaluate` does to batch statistics, and by how much two evaluations in a row differ."""

    def statistics_moved(lib: Library) -> float:
        norm = keras.layers.BatchNormalization(momentum=0.9)
        student = two_layers(2, norm)
        evaluate(compiled(lib, two_layers(1), student, lib.hint("hidden")))
        return float(np.linalg.norm(norm.moving_mean) / np.linalg.norm(0.1 * X.mean(axis=0)))

    def differ_by(lib: Library) -> float:
        distiller = compiled(lib, two_layers(1), two_layers(2, keras.layers.Dropout(0.5, seed=1)), lib.hint("hidden"))
        first, second = (evaluate(distiller)["distillation_loss"] for _ in range(2))
        return 100 * abs(first - second) / first

    return {"statistics_moved": both(statistics_moved, right=0.0), "repetition_percent": both(differ_by, right=0.0)}


# What a training step learns from


@defect(7)
def weights() -> dict[str, Any]:
    """Error of the update with weights from 0 to 3."""
    of_samples, of_classes = np.arange(BATCH) % 4.0, {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 1.0}
    cases = {
        "sample_weight": ({"sample_weight": of_samples}, of_samples),
        "class_weight": ({"class_weight": of_classes}, np.array(list(of_classes.values()))[Y]),
    }
    return {
        f"{name}_error_percent": both(lambda lib, g=given, w=right: error_percent(update_of(lib, **g), right_update(w)))
        for name, (given, right) in cases.items()
    }


class Penalised(keras.layers.Dense):
    """Adds 0.1 |W|^2 to the loss."""

    def call(self, inputs: Any) -> Any:
        """Adds the penalty, and computes the layer."""
        self.add_loss(0.1 * keras.ops.sum(keras.ops.square(self.kernel)))
        return super().call(inputs)


@defect(8)
def regularisers() -> dict[str, Any]:
    """Error of the update with a penalty of 0.1 |W|^2."""
    right = right_update(penalty=0.1)
    cases: dict[str, dict[str, Any]] = {
        "regulariser": {"kernel_regularizer": keras.regularizers.L2(0.1)},
        "add_loss": {"dense": Penalised},
    }
    return {
        f"{name}_error_percent": both(lambda lib, k=kwargs: error_percent(update_of(lib, student=linear(2, **k)), right))
        for name, kwargs in cases.items()
    }


@defect(9)
def masks() -> dict[str, Any]:
    """The distillation loss of sequences of which half the positions are padding."""
    rng = np.random.default_rng(3)
    words = rng.integers(1, 20, size=(BATCH, 12)) * (np.arange(12) < rng.integers(1, 12, size=(BATCH, 1)))

    def tagger(seed: int) -> keras.Model:
        layers = [keras.layers.Embedding(20, 6, mask_zero=True), keras.layers.Dense(5)]
        model = keras.Sequential([keras.Input((12,), dtype="int32"), *layers])
        own = np.random.default_rng(seed)
        model.set_weights([own.normal(size=w.shape) for w in model.get_weights()])
        return model

    def value(lib: Library) -> float:
        return evaluate(compiled(lib, tagger(1), tagger(2)), words, np.zeros(words.shape, "int32"))["distillation_loss"]

    z_t, z_s = (w[0][words] @ w[1] + w[2] for w in (tagger(seed).get_weights() for seed in (1, 2)))
    right = float(np.mean(divergence(z_t, z_s).numpy()[words > 0]))
    return {"value": both(value, right=right), "padding": {"percent": 100 * float(np.mean(words == 0))}}


@defect(10)
def replicas() -> dict[str, Any]:
    """Error of the update of two replicas, next to that of one device."""

    def update(lib: Library, strategy: Any, loss: Any, student_loss: Any, share: float) -> np.ndarray:
        with strategy.scope():
            teacher, student = linear(1, activation="softmax"), linear(2, activation="softmax")
            before = kernel(student)
            options = {"student_loss": student_loss, "student_loss_weight": share, "run_eagerly": False}
            distiller = compiled(lib, teacher, student, loss(), **options)
        one_step(distiller)
        return kernel(student) - before

    def error(loss: str, student_loss: Any, share: float = 0.5) -> Callable[[Library], float]:
        strategies = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()
        return lambda lib: error_percent(*(update(lib, each, getattr(lib, loss), student_loss, share) for each in strategies))

    name, instance = "sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()
    return {
        "default_loss_error_percent": both(error("default", instance)),
        "default_loss_alone_error_percent": both(error("default", instance, share=0.0)),
        "student_loss_by_name_error_percent": both(error("kd", name)),
        "loss_objects_error_percent": both(error("kd", instance)),
    }


@defect(11)
def tape() -> dict[str, Any]:
    """How many of the teacher's variables the gradient tape watches."""

    def watched(lib: Library) -> int:
        tapes = []

        class Recorded(tf.GradientTape):
            def __enter__(self) -> Any:
                tapes.append(self)
                return super().__enter__()

        teacher, original = linear(1), tf.GradientTape
        tf.GradientTape = Recorded
        try:
            one_step(compiled(lib, teacher, linear(2)))
        finally:
            tf.GradientTape = original
        found = {variable.ref() for variable in tapes[-1].watched_variables()}
        return sum(variable.value.ref() in found for variable in teacher.variables)

    return {"watched_teacher_variables": both(watched, right=0)}


@defect(12)
def schedules() -> dict[str, Any]:
    """The distillation loss that a compiled step reports after its temperature was set from 3 to 8."""

    def value(lib: Library) -> float:
        loss = lib.kd()
        distiller = compiled(lib, linear(1), linear(2), loss, run_eagerly=False)
        distiller.optimizer.learning_rate = 0.0
        one_step(distiller)
        loss.temperature = 8.0
        return one_step(distiller)["distillation_loss"]

    z_t, z_s = X @ kernel(linear(1)), X @ kernel(linear(2))
    before, after = (float(tf.reduce_mean(divergence(z_t, z_s, temperature))) for temperature in (TEMPERATURE, 8.0))
    return {"value": both(value, before=before, right=after)}


# What a Distiller takes


@defect(13)
def one_layer_name() -> dict[str, Any]:
    """The loss on a layer that only the student names, next to the loss on the outputs and the loss on that layer."""

    def value(*names: Any) -> float:
        teacher, student = two_layers(1), two_layers(2)
        return evaluate(compiled(KERAS, teacher, student, keras.distillation.FeatureDistillation("mse", *names)))[
            "distillation_loss"
        ]

    def refused() -> Any:
        return keras_kd.losses.HintLoss(student_layer_name="hidden")

    found = {"keras_distillation": value(None, "hidden"), "outputs": value(), "layer": value("hidden", "hidden")}
    return {"value": found, "error": {"keras_kd": outcome(refused)}}


@defect(14)
def weight_of_one_loss() -> dict[str, Any]:
    """How much a single loss counts that was given with the weight 7."""

    def weight(lib: Library) -> float:
        pair = (compiled(lib, linear(1), linear(2), distillation_loss_weights=w, student_loss_weight=0.0) for w in ([7.0], None))
        weighted, plain = (evaluate(distiller)["loss"] for distiller in pair)
        return weighted / plain

    return {"weight": both(weight, right=7.0)}


@defect(15)
def several_outputs() -> dict[str, Any]:
    """Whether a model with two outputs trains."""

    def heads(seed: int) -> keras.Model:
        x = keras.Input((8,))
        return keras.Model(x, [keras.layers.Dense(3)(x), keras.layers.Dense(2)(x)], name=f"heads_{seed}")

    def fit(lib: Library) -> None:
        one = lib is KERAS
        loss = keras.distillation.LogitsDistillation(loss=[keras.losses.KLDivergence()] * 2) if one else keras_kd.losses.KDLoss()
        distiller = compiled(lib, heads(1), heads(2), loss, student_loss=[from_logits(), from_logits()])
        one_step(distiller, X, [Y % 3, Y % 2])

    return {"fit": both(lambda lib: outcome(lambda: fit(lib)))}


@defect(16)
def structures() -> dict[str, Any]:
    """The error for a loss of an output that is not there, and what a config gives back."""

    def heads(seed: int) -> keras.Model:
        x = keras.Input((8,))
        return keras.Model(x, {"color": keras.layers.Dense(3)(x)}, name=f"heads_{seed}")

    def loss_of(lib: Library, output: str) -> Any:
        return (
            keras.distillation.FeatureDistillation({output: "mse"}) if lib is KERAS else keras_kd.losses.KDLoss(output_name=output)
        )

    def mismatch(lib: Library) -> None:
        distiller = lib.Distiller(heads(1), heads(2), loss_of(lib, "size"))
        distiller.compute_loss(X, None, distiller(X))

    def round_trip(lib: Library) -> None:
        loss = loss_of(lib, "color")
        type(loss).from_config(loss.get_config())

    return {
        "mismatch": both(lambda lib: outcome(lambda: mismatch(lib))),
        "config_round_trip": both(lambda lib: outcome(lambda: round_trip(lib))),
    }


@defect(17)
def loading(folder: pathlib.Path) -> dict[str, Any]:
    """The optimizer of a loaded Distiller, and whether BackupAndRestore takes one."""

    def optimizer(lib: Library) -> str:
        path = folder / f"{lib.name}.keras"
        distiller = compiled(lib, linear(1), linear(2))
        one_step(distiller)
        distiller.save(path)
        loaded = getattr(keras.saving.load_model(path), "optimizer", None)
        return "none" if loaded is None else type(loaded).__name__

    def backed_up(lib: Library) -> Any:
        return one_step(compiled(lib, linear(1), linear(2)), callbacks=[keras.callbacks.BackupAndRestore(folder / lib.name)])

    return {
        "optimizer_after_loading": both(optimizer),
        "backup_and_restore": both(lambda lib: outcome(lambda: backed_up(lib))),
    }


@defect(18)
def layers_inside() -> dict[str, Any]:
    """Whether a layer inside a nested model, the nested model itself, and a layer of a subclassed model give features."""

    def nested(seed: int) -> keras.Model:
        x = keras.Input((8,))
        backbone = keras.Model(x, keras.layers.Dense(6, name="inner")(x), name="backbone")
        x = keras.Input((8,))
        return keras.Model(x, keras.layers.Dense(5)(backbone(x)), name=f"nested_{seed}")

    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.logits = keras.layers.Dense(6, name="hidden"), keras.layers.Dense(5)

        def call(self, x: Any) -> Any:
            return self.logits(self.hidden(x))

    def subclassed() -> keras.Model:
        model = Subclassed()
        model(X)
        return model

    pairs: dict[str, tuple[Any, str]] = {
        "inner_layer": (lambda: (nested(1), nested(2)), "inner"),
        "nested_model": (lambda: (nested(1), nested(2)), "backbone"),
        "subclassed": (lambda: (subclassed(), subclassed()), "hidden"),
    }
    return {
        name: both(lambda lib, m=models, w=where: outcome(lambda: one_step(compiled(lib, *m(), lib.hint(w)))))
        for name, (models, where) in pairs.items()
    }


@defect(19)
def widths() -> dict[str, Any]:
    """Whether layers of different widths can be compared."""

    def train(lib: Library, loss: Any) -> Any:
        return one_step(compiled(lib, two_layers(1, width=6), two_layers(2, width=3), loss))

    by_angle = keras.distillation.FeatureDistillation("cosine_similarity", "hidden", "hidden")
    return {
        "mean_squares": both(lambda lib: outcome(lambda: train(lib, lib.hint("hidden")))),
        "cosine_similarity": {KERAS.name: outcome(lambda: train(KERAS, by_angle))},
    }


@defect(20)
def dtypes_and_shapes() -> dict[str, Any]:
    """Whether teacher and student may differ in precision, in the dtype of their inputs and in their shape."""

    def net(features: int = 8, *, dtype: str = "float32", policy: str = "float32") -> keras.Model:
        x = keras.Input((features,), dtype=dtype)
        return keras.Model(x, keras.layers.Dense(5, dtype=policy)(x))

    def train(lib: Library, teacher: keras.Model, student: keras.Model, x: Any = X) -> None:
        small = {"teacher_preprocessing": lambda x: x[:, :4]} if lib is OURS and teacher.input_shape[-1] == 4 else {}
        one_step(compiled(lib, teacher, student, **small), x)

    pairs: dict[str, Any] = {
        "precision": lambda lib: train(lib, net(), net(policy="mixed_float16")),
        "input_dtype": lambda lib: train(lib, net(), net(dtype="uint8"), np.ones((BATCH, 8), "uint8")),
        "input_shape": lambda lib: train(lib, net(4), net()),
    }
    return {name: both(lambda lib, t=task: outcome(lambda: t(lib))) for name, task in pairs.items()}


# Files and side effects


@defect(21)
def files(folder: pathlib.Path) -> dict[str, Any]:
    """Bytes of weight files of a teacher, its student, and the Distillers of both."""

    def size(name: str, model: Any) -> int:
        path = folder / f"{name}.weights.h5"
        model.save_weights(path)
        return path.stat().st_size

    def distiller(lib: Library) -> Any:
        made = compiled(lib, wide(), dense_net(16))
        made(np.ones((1, 64), "float32"))  # builds Keras' own
        return made

    def wide() -> keras.Model:
        dense = [keras.layers.Dense(width, "relu") for width in (176, 208)]
        return keras.Sequential([keras.Input((64,)), *dense, keras.layers.Dense(10)])

    models = {"teacher": wide(), "student": dense_net(16)}
    return {
        "bytes": both(lambda lib: size(lib.name, distiller(lib))) | {name: size(name, model) for name, model in models.items()},
        "parameters": {name: model.count_params() for name, model in models.items()},
    }


@defect(22)
def side_effects() -> dict[str, Any]:
    """The teacher's trainable weights afterwards, and what happens if the teacher is the student."""

    def trainable(lib: Library) -> int:
        teacher = linear(1)
        one_step(compiled(lib, teacher, linear(2)))
        return len(teacher.trainable_variables)

    def same(lib: Library) -> str:
        model = linear(1)
        before = kernel(model)
        one_step(compiled(lib, model, model))
        return "trains nothing" if np.array_equal(before, kernel(model)) else "trains"

    return {
        "trainable_weights_afterwards": both(trainable, right=1),
        "teacher_is_student": both(lambda lib: outcome(lambda: same(lib))),
    }


@defect(23)
def labels() -> dict[str, Any]:
    """Whether a loss can read labels, and whether there may be none."""

    def read(lib: Library) -> None:
        one_step(compiled(lib, linear(1), linear(2), keras_kd.losses.DKDLoss()))

    def without(lib: Library) -> None:
        distiller = lib.Distiller(linear(1), linear(2), lib.kd(), student_loss_weight=0.0)
        distiller.compile("sgd", loss=None)
        distiller.fit(X, verbose=0)

    return {
        "loss_that_reads_labels": both(lambda lib: outcome(lambda: read(lib))),
        "no_labels": both(lambda lib: outcome(lambda: without(lib))),
    }


@defect(24)
def teachers(folder: pathlib.Path) -> dict[str, Any]:
    """Passes of the teacher in validation and in three epochs, several teachers, and the logs."""

    def in_validation(lib: Library) -> int:
        teacher = linear(1, dense=Counting)
        distiller = compiled(lib, teacher, linear(2))
        distiller.evaluate_teacher = False
        before = teacher.layers[-1].calls
        evaluate(distiller)
        return teacher.layers[-1].calls - before

    def in_three_epochs(lib: Library) -> int:
        teacher = linear(1, dense=Counting)
        if lib is OURS:
            recording = keras_kd.record_teacher(teacher, (X, Y), folder / "recording", batch_size=BATCH, verbose=0)
            before = teacher.layers[-1].calls
            compiled(lib, recording, linear(2)).fit(recording.dataset(batch_size=16), epochs=3, shuffle=False, verbose=0)
        else:
            distiller = compiled(lib, teacher, linear(2))
            one_step(distiller)  # what Keras runs once in order to build
            before = teacher.layers[-1].calls
            distiller.fit(X, Y, batch_size=16, epochs=3, verbose=0)
        return teacher.layers[-1].calls - before

    def several(lib: Library) -> Any:
        return one_step(compiled(lib, [linear(1), linear(4)], linear(2)))

    def logs(lib: Library) -> str:
        return ", ".join(sorted(one_step(compiled(lib, linear(1), linear(2), [lib.kd(), lib.hint("logits")]))))

    return {
        "teacher_passes_in_validation": both(in_validation),
        "teacher_passes_in_three_epochs_of_four_batches": both(in_three_epochs),
        "several_teachers": both(lambda lib: outcome(lambda: several(lib))),
        "logs": both(logs),
    }


# The result


def rounded(value: Any) -> Any:
    """Six significant digits, at any depth."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run(numbers: list[str], rounds: int) -> dict[str, Any]:
    """Measures the defects of these numbers and puts the result together."""
    figures = {}
    for number in numbers:
        function = MEASUREMENTS[number]
        keras.utils.set_random_seed(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stack.callback(keras.backend.clear_session)
            names = function.__code__.co_varnames[: function.__code__.co_argcount]
            given = {"folder": pathlib.Path(folder), "rounds": rounds}
            figures[number] = rounded(function(**{name: given[name] for name in names if name in given}))
        rich.print(number, figures[number])
    versions = {module.__name__: module.__version__ for module in (tf, keras, keras_kd, sklearn)}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions | {"python": platform.python_version()},
        "machine": describe_machine(),
        "settings": {"temperature": TEMPERATURE, "batch_size": BATCH, "rounds": rounds, "logical_cpus": 2},
        "figures": figures,
    }


def with_figures(page: str, result: dict[str, Any]) -> str:
    """The page with what this result holds at the marks, figures with as many decimals as they had."""

    def replace(match: re.Match[str]) -> str:
        value: Any = result["figures"] | result
        for key in match["place"].split("."):
            value = value[key]
        decimals = len((match["figure"] or "").partition(".")[2])
        written = f"`{value}`" if match["text"] else f"{value:,.{decimals}f}"
        return f"{written}<!--{match['place']}-->"

    return MARKED.sub(replace, page)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of defects; they are printed and nothing is written")
    parser.add_argument("--rounds", type=int, default=50, help="rounds in which the timed steps take turns")
    options = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(2)])
    numbers = [f"{number:02}" for number in options.only] if options.only else sorted(MEASUREMENTS)
    result = run(numbers, options.rounds)
    if not options.only:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        PAGE.write_text(with_figures(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
