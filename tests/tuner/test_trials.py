"""What a trial reports is what it saved: the best epoch that reached its target."""

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.errors import FailedTrialError
from keras_tuner.src.engine.tuner_utils import SaveBestEpoch

from keras_kd import callbacks, export
from keras_kd.tuner import Score, fit_trial
from tests.conftest import classifier
from tests.tuner.common import CROSS_ENTROPY, data


class Replay(keras.callbacks.Callback):
    """Writes logs by hand and marks the weights of each epoch by its number."""

    def __init__(self, **logs):
        super().__init__()
        self.logs = logs

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: values[epoch] for name, values in self.logs.items()})
        self.model.layers[0].bias.assign(np.full(4, epoch, "float32"))


def compiled():
    model = classifier(4)
    model.compile("sgd", CROSS_ENTROPY, run_eagerly=True)
    return model


def marked(path):
    """Which epoch a file of weights is from."""
    model = compiled()
    model.load_weights(path)
    return int(model.layers[0].bias[0])


def fit(objective, folder, model=None, **arguments):
    """A call as KerasTuner makes it."""
    x, y = data(8)
    checkpoint = SaveBestEpoch(objective=objective, filepath=str(folder / "checkpoint.weights.h5"))
    return fit_trial(model or compiled(), x, y, callbacks=[checkpoint], batch_size=8, verbose=0, **arguments)


ACCURACY = keras_tuner.Objective("val_accuracy", "max")


def test_the_best_epoch_that_has_the_sparsity_is_saved_and_reported(tmp_path):
    replay = Replay(val_accuracy=[0.9, 0.6, 0.8, 0.7], sparsity=[0.42, 0.5, 0.44, 0.5])  # 28 weights in two kernels
    model = compiled()
    found = fit(ACCURACY, tmp_path, model, epochs=4, trial_callbacks=[replay], sparsity=0.5)
    assert (found["val_accuracy"], found["sparsity"], found["best_epoch"]) == (0.8, 0.44, 2.0)
    assert marked(tmp_path / "checkpoint.weights.h5") == int(model.layers[0].bias[0]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.weights.h5"]


def test_the_sparsity_is_that_of_the_pruning_among_the_callbacks(tmp_path):
    replay = Replay(val_accuracy=[0.5, 0.9, 0.6])
    with pytest.raises(FailedTrialError, match="the last one has a sparsity of 0.500, wanted is 0.9"):
        fit(ACCURACY, tmp_path, epochs=1, trial_callbacks=[callbacks.Pruning(0.5), Replay(val_accuracy=[1.0])], sparsity=0.9)
    found = fit(ACCURACY, tmp_path, epochs=3, trial_callbacks=[callbacks.Pruning(0.5), replay])
    kernels = [weight for weight in saved(tmp_path).weights if len(weight.shape) == 2]
    zeros = sum(int(np.sum(keras.ops.convert_to_numpy(weight) == 0)) for weight in kernels)
    assert found["sparsity"] == zeros / sum(int(np.prod(weight.shape)) for weight in kernels) == 0.5


def saved(folder):
    model = compiled()
    model.load_weights(folder / "checkpoint.weights.h5")
    return model


def test_a_scored_trial_that_misses_its_sparsity_is_over_its_limits_by_that(tmp_path):
    score = Score("val_accuracy")
    replay = Replay(val_accuracy=[0.9, 0.8], sparsity=[0.2, 0.4])
    found = fit(score.objective, tmp_path, epochs=2, trial_callbacks=[replay], sparsity=0.8, score=score)
    assert found["best_epoch"] == 1.0
    assert found["over_budget"] == pytest.approx((0.8 - 2 / 28 - 0.4) / 0.8)
    assert found["score"] == score(found) < -1


def test_bytes_are_those_of_the_saved_epoch_and_its_file_stays_with_the_trial(tmp_path):
    score = Score("val_accuracy", budgets={"bytes": 10**6}, report=["nonzero_parameters"])
    replay = Replay(val_accuracy=[0.9, 0.8])
    model = compiled()
    found = fit(score.objective, tmp_path, model, epochs=2, trial_callbacks=[replay], score=score)
    file = tmp_path / "student.tflite"
    assert found["bytes"] == file.stat().st_size
    assert found["nonzero_parameters"] == sum(int(np.count_nonzero(weight)) for weight in saved(tmp_path).get_weights())
    x, _ = data(4)
    np.testing.assert_allclose(export.run_litert(file, x)[0], saved(tmp_path).predict(x, verbose=0), atol=1e-5)
    assert (found["score"], found["over_budget"]) == (0.9, 0.0)


def test_a_rounded_model_is_exported_with_the_integers_of_its_best_epoch(tmp_path):
    score = Score("val_accuracy", report=["bytes"])
    made = [Replay(val_accuracy=[0.9, 0.5, 0.4]), callbacks.Quantization(start_step=1)]
    found = fit(score.objective, tmp_path, epochs=3, trial_callbacks=made, score=score)
    assert found["best_epoch"] == 1.0  # the first with rounding
    interpreter = export.open_litert(tmp_path / "student.tflite")
    assert {detail["dtype"] for detail in interpreter.get_tensor_details()} >= {np.int8}


def test_a_model_over_its_budget_of_macs_is_not_trained(tmp_path):
    score = Score("val_accuracy", budgets={"macs": 14})
    found = fit(score.objective, tmp_path, epochs=2, trial_callbacks=[Replay()], score=score)
    assert found == {"macs": 28.0, "over_budget": 1.0, "score": -1.5}
    assert (tmp_path / "checkpoint.weights.h5").exists()


def test_the_best_of_several_executions_is_kept(tmp_path):
    x, y = data(8)
    checkpoint = SaveBestEpoch(objective=ACCURACY, filepath=str(tmp_path / "checkpoint.weights.h5"))
    for values in ([0.1, 0.7], [0.5, 0.2, 0.3]):
        made = [Replay(val_accuracy=values)]
        fit_trial(compiled(), x, y, callbacks=[checkpoint], epochs=len(values), verbose=0, trial_callbacks=made)
    assert marked(tmp_path / "checkpoint.weights.h5") == 1


def test_several_objectives_have_keras_tuners_sum(tmp_path):
    several = keras_tuner.oracles.RandomSearchOracle(objective=[ACCURACY, keras_tuner.Objective("macs", "min")]).objective
    score = Score("val_accuracy", report=["macs"])
    found = fit(several, tmp_path, epochs=1, trial_callbacks=[Replay(val_accuracy=[0.25])], score=score)
    assert found["multi_objective"] == 28 - 0.25


def test_the_state_of_the_search_is_copied_before_each_trial_unless_it_is_cut_off(tmp_path):
    trial = tmp_path / "trial_0"
    for content, copied in (('{"ongoing_trials": {}}', '{"ongoing_trials": {}}'), ('{"ongoing_', '{"ongoing_trials": {}}')):
        (tmp_path / "oracle.json").write_text(content)
        fit(ACCURACY, trial, epochs=1, trial_callbacks=[Replay(val_accuracy=[0.5])])
        assert (tmp_path / "oracle.json.last").read_text() == copied


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    found = fit(ACCURACY, tmp_path, epochs=1, trial_callbacks=[Replay(val_accuracy=[0.5], val_other=[np.nan])])
    assert "val_other" not in found


def test_outside_of_a_search_it_leaves_the_weights_of_the_best_epoch():
    model = compiled()
    found = fit_trial(model, *data(8), epochs=3, verbose=0, trial_callbacks=[Replay(val_loss=[3.0, 1.0, 2.0])])
    assert found["best_epoch"] == model.layers[0].bias[0] == 1.0


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        ("val_acuracy", {}, "The objective val_acuracy is no metric of this training. Received logs: loss, val_accuracy"),
        ("score", {}, 'The objective "score" needs `score`'),
        ("bytes", {}, "The objective bytes is a cost that nothing measures"),
        ("val_accuracy", {"score": Score(budgets={"macs": 1})}, "must be the tuner's objective, or it knows nothing of them"),
        ("val_accuracy", {"score": 3}, "must be a keras_kd.tuner.Score"),
        ("val_accuracy", {"epochs": 0}, "for one epoch at least"),
        ("val_accuracy", {"sparsity": 0.5}, "nothing logs it"),
        ("val_accuracy", {"monitor": "val_fun_loss"}, "`monitor` must be in the logs"),
        (None, {}, "The tuner must have an objective"),
    ],
)
def test_bad_input_ends_the_search(objective, arguments, message, tmp_path):
    objective = keras_tuner.Objective(objective or "default_objective", "max")
    arguments = {"epochs": 1, "trial_callbacks": [Replay(val_accuracy=[0.5])]} | arguments
    with pytest.raises(keras_tuner.errors.FatalError, match=message):
        fit(objective, tmp_path, **arguments)
