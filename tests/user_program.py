"""A program as a user writes it, whose types `mypy --strict` must know: `tests/test_typing.py` checks it, and nothing runs it."""

import pathlib
from typing import Any, assert_type

import keras  # type: ignore[import-untyped]
import numpy as np

import keras_kd
from keras_kd import analysis, callbacks, export, layers, losses, metrics, profile, report, schedules, surgery, tuner


class Halved(keras_kd.Distiller):
    """Overrides a hook."""

    def distillation_loss(self, x: Any, y: Any, student: Any, teacher: Any, sample_weight: Any) -> Any:
        return 0.5 * super().distillation_loss(x, y, student, teacher, sample_weight)


class Absolute(losses.DistillationLoss):
    """A loss of one's own, with a number that callbacks change."""

    power = keras_kd.Tunable()

    def __init__(self, power: float = 1.0, name: str = "absolute") -> None:
        super().__init__(name=name)
        self.power = power

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** keras_kd.Tunable.tensor(self, "power"), axis=-1)


class Halving(schedules.ValueSchedule):
    """A schedule of one's own."""

    def __call__(self, position: float) -> float:
        return float(0.5**position)

    def get_config(self) -> dict[str, Any]:
        return {}


def network(width: int) -> Any:
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(width, activation="relu"), keras.layers.Dense(3)])


def distil(teacher: Any, student: Any, x: np.ndarray, y: np.ndarray) -> keras_kd.Distiller:
    kd = losses.KDLoss(temperature=4.0)
    assert_type(kd.temperature, int | float)
    distiller = Halved(
        teacher,
        student,
        [kd, Absolute(), losses.HintLoss(teacher_layer_name="hidden", student_layer_name="hidden")],
        student_loss_weight=0.1,
    )
    distiller.compile("adam", loss=None, metrics=[metrics.TeacherAgreement(), metrics.TeacherKL()])
    quantization = callbacks.Quantization(num_bits=8)
    schedule = schedules.PolynomialDecay(0.0, 0.8, begin_step=0, end_step=2000)
    assert_type(schedule.final_sparsity, float)
    used = [
        callbacks.Pruning(schedule, layers="hidden"),
        callbacks.AnnealTemperature(schedules.LinearValue(4.0, 1.0, duration=10)),
        callbacks.AnnealWeight(Halving()),
        quantization,
    ]
    distiller.fit(x, y, epochs=1, callbacks=used)
    distiller.student_loss_weight = 0.3
    assert_type(distiller.student_loss_weight, float)
    assert_type(distiller.distillation_loss_weights, list[int | float])
    assert_type(distiller.evaluate_teacher, bool)
    assert_type(quantization.quantized_model(), keras_kd.quantized.QuantizedModel)
    recorded = keras_kd.record_teacher(teacher, (x, y), "recorded")
    assert_type(recorded, keras_kd.Recording)
    distiller.fit(recorded.dataset(64, shuffle=True))
    return distiller


def look(model: Any, x: np.ndarray, y: np.ndarray) -> analysis.Plan:
    probe = layers.LinearProbe(3, l2=1e-2)
    probe.adapt(x, y)
    found = analysis.linear_analysis(model, x, y)
    assert_type(found, analysis.LinearReport)
    assert_type(found.layers[0].name, str)
    assert_type(analysis.sensitivity(model, x), analysis.SensitivityReport)
    assert_type(analysis.probe(model, x, y), analysis.ProbeReport)
    return found.recommend(macs=0.5)


def cut(model: Any, plan: analysis.Plan, x: np.ndarray) -> Any:
    smaller, told = surgery.prune_channels(model, macs=0.5, data=x, return_report=True)
    assert_type(told, surgery.PruningReport)
    assert_type(told.macs_after, int)
    assert_type(surgery.factorize(smaller, macs=0.7, data=x, return_report=True)[1], surgery.FactorizationReport)
    assert_type(surgery.apply(model, plan, data=x, return_report=True)[1], surgery.ApplyReport)
    assert_type(surgery.reconstruct(smaller, model, x, return_report=True)[1], surgery.Reconstruction)
    assert_type(surgery.fold_batch_norm(model, return_report=True)[1], surgery.MergeReport)
    return surgery.factorize(surgery.prune_channels(model, macs=0.5, data=x), macs=0.7, data=x)


def ship(model: Any, x: np.ndarray, y: np.ndarray) -> pathlib.Path:
    exported = export.to_litert(model, "model.tflite", quantization="int8", representative_data=x)
    assert_type(exported, export.ExportReport)
    (outputs,) = export.run_litert(exported.path, x)
    assert_type(outputs.shape, tuple[Any, ...])
    measured = profile.profile(model, exported.path)
    assert_type(measured.macs, int)
    compared = report.compare({"model": model, "file": exported.path}, x, y)
    assert_type(compared, report.Comparison)
    assert_type(compared["file"].accuracy, float | None)
    found = keras_kd.compress(model, x, y, budget="100KB", folder="small")
    assert_type(found.best.size, int)
    assert_type(found.model, keras_kd.quantized.QuantizedModel)
    return report.model_card(exported, comparison=compared, license="apache-2.0")


def search(teacher: Any, x: np.ndarray) -> tuner.DistillationHyperModel:
    score = tuner.Score(budgets={"bytes": 100_000})
    assert_type(tuner.CompressionHyperModel(teacher, data=x), tuner.CompressionHyperModel)
    return tuner.DistillationHyperModel(lambda hp: network(hp.Int("width", 4, 16)), teacher, score=score)


def reached_by_the_package_alone(model: Any, x: np.ndarray) -> None:
    """Modules that are imported when they are first used have types, too."""
    assert_type(keras_kd.surgery.prune_channels(model, macs=0.5, data=x, return_report=True)[1], keras_kd.surgery.PruningReport)
    assert_type(keras_kd.analysis.linear_analysis(model, x), keras_kd.analysis.LinearReport)
    assert_type(keras_kd.report.compare({"model": model}, x), keras_kd.report.Comparison)
    assert_type(keras_kd.tuner.Score(), keras_kd.tuner.Score)
    assert_type(keras_kd.__version__, str)
    # What is not there is an error: warn_unused_ignores, a part of --strict, would tell.
    keras_kd.surgry  # type: ignore[attr-defined]  # noqa: B018
    keras_kd.schedules.Polynomial  # type: ignore[attr-defined]  # noqa: B018
    keras_kd.Distiller(model, student_weight=0.1)  # type: ignore[call-arg]
    surgery.prune_channels(model, macs="half")  # type: ignore[call-overload]
