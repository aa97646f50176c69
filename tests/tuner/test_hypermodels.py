"""Searches over students and losses, by KerasTuner's own tuners, with a teacher that is recorded once."""

import json
import os
import pathlib

import h5py
import keras
import keras_tuner
import numpy as np
import pytest

import keras_kd
from keras_kd import callbacks, losses
from keras_kd.tuner import DistillationHyperModel, Score, _recordings, fit_trial, pareto_front, resume
from tests.conftest import classifier
from tests.tuner.common import CROSS_ENTROPY, EAGER, build_student, data, hypermodel, metrics_of


class KilledError(BaseException):
    """Nothing that a tuner would take for a failed trial."""


def counted(teacher):
    """A teacher, and the list to which it adds the size of every batch that it sees."""
    batches = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            batches.append(x.shape[0])
            return x

    x = keras.Input((4,))
    return keras.Model(x, teacher(Counting()(x)), name="counted"), batches


def search(tuner, **arguments):
    x, y = data()
    tuner.search(x, y, validation_data=data(16, seed=4), epochs=1, batch_size=16, verbose=0, **arguments)
    return tuner


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search by score, whose trials prune."""
    score = Score("val_accuracy", budgets={"parameters": 50}, report=["bytes"])
    space = hypermodel(score=score, search={"sparsity": [0.5]})
    folder = tmp_path_factory.mktemp("search")
    return search(keras_tuner.GridSearch(space, objective=score.objective, directory=folder, project_name="grid"))


def test_every_trial_of_the_space_is_scored(searched):
    trials = list(searched.oracle.trials.values())
    assert [(trial.hyperparameters.get("width"), trial.status) for trial in trials] == [(w, "COMPLETED") for w in (2, 4, 8)]
    for trial in trials[:2]:
        found = metrics_of(trial)
        assert trial.score == found["score"] == found["val_accuracy"]
        file = pathlib.Path(searched.get_trial_dir(trial.trial_id)) / "student.tflite"
        assert found["bytes"] == file.stat().st_size
    assert trials[2].score == pytest.approx(-1 - 0.34 / 1.34)  # 67 parameters


def test_the_best_model_is_the_saved_student_with_its_sparsity(searched):
    best = searched.hypermodel.score.best_trial(searched)
    assert best.score == max(trial.score for trial in searched.oracle.trials.values())
    distiller = searched.load_model(best)
    kernels = [layer.kernel for layer in distiller.student.layers]
    zeros = sum(int(np.sum(keras.ops.convert_to_numpy(kernel) == 0)) for kernel in kernels)
    assert metrics_of(best)["sparsity"] == zeros / sum(int(np.prod(kernel.shape)) for kernel in kernels) >= 0.495
    distiller.evaluate_teacher = False
    found = distiller.evaluate(*data(16, seed=4), verbose=0, return_dict=True)
    assert float(found["accuracy"]) == pytest.approx(metrics_of(best)["val_accuracy"])  # a tensor in Keras 3.12


def test_the_teacher_is_in_no_checkpoint(searched):
    wide = 16
    for file in pathlib.Path(searched.project_dir).rglob("*.h5"):
        shapes = []
        with h5py.File(file) as content:
            content.visititems(lambda name, item, shapes=shapes: shapes.append(getattr(item, "shape", ())))
        assert shapes
        assert all(wide not in shape for shape in shapes)


def test_its_front_is_that_of_accuracy_and_bytes(searched):
    front = pareto_front(searched, ["val_accuracy", "bytes"])
    assert len(front.candidates) == 2  # the third is over its budget
    assert front.left_out == 1
    assert all(os.path.exists(os.path.join(one.folder, "student.tflite")) for one in front)


def test_a_budget_that_nothing_meets_names_the_nearest_and_what_it_misses(tmp_path):
    score = Score("val_accuracy", budgets={"parameters": 10})
    tuner = search(keras_tuner.GridSearch(hypermodel(score=score), objective=score.objective, directory=tmp_path))
    with pytest.raises(ValueError, match="3 trials, of which 0000 is the nearest: parameters 19, 90.0% over 10"):
        score.best_trial(tuner)
    assert [trial.trial_id for trial in tuner.oracle.get_best_trials(3)] == ["0000", "0001", "0002"]


TUNERS = {
    "RandomSearch": {"max_trials": 2},  # GridSearch and Hyperband are in other tests
    "BayesianOptimization": {"max_trials": 3, "num_initial_points": 2},
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # the Gaussian process of three equal scores
@pytest.mark.parametrize("name", TUNERS)
def test_keras_tuners_tuners_run_it(name, tmp_path):
    tuner = getattr(keras_tuner, name)(hypermodel(), objective="val_accuracy", directory=tmp_path, seed=1, **TUNERS[name])
    search(tuner)
    trials = list(tuner.oracle.trials.values())
    assert [trial.status for trial in trials] == ["COMPLETED"] * len(trials)
    assert len(trials) == TUNERS[name].get("max_trials", len(trials)) >= 2
    assert isinstance(tuner.get_best_models()[0], keras_kd.Distiller)


def test_the_tuner_of_scikit_learn_cross_validates_it(tmp_path):
    from sklearn.model_selection import KFold

    def scoring(model, x, y, sample_weight=None):
        return model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]

    keras.utils.disable_interactive_logging()
    oracle = keras_tuner.oracles.RandomSearchOracle(objective=keras_tuner.Objective("score", "max"), max_trials=1)
    tuner = keras_tuner.SklearnTuner(oracle, hypermodel(), scoring=scoring, cv=KFold(2), directory=tmp_path)
    tuner.search(*data())
    assert 0 <= tuner.oracle.trials["0"].score <= 1
    assert tuner.get_best_models()[0].student.predict(data()[0], verbose=0).shape == (32, 3)


def test_a_trial_of_hyperband_goes_on_from_the_weights_and_steps_of_the_one_before(tmp_path):
    steps, score = [], Score("val_accuracy", budgets={"parameters": 1000})

    class Noting(DistillationHyperModel):
        def callbacks(self, hp, distiller, epochs, steps_):
            steps.append((hp.values.get("tuner/initial_epoch"), int(distiller.optimizer.iterations)))
            return super().callbacks(hp, distiller, epochs, steps_)

    space = Noting(build_student, classifier(16), loss=CROSS_ENTROPY, compile_options=EAGER, search={"sparsity": 0.5}, score=score)
    tuner = keras_tuner.Hyperband(space, objective=score.objective, directory=tmp_path, max_epochs=2, factor=2, seed=1)
    search(tuner)
    assert {(epoch, count) for epoch, count in steps if epoch} == {(1, 2)}  # two batches an epoch
    trials = list(tuner.oracle.trials.values())
    assert {trial.status for trial in trials} == {"COMPLETED"}
    assert all(metrics_of(trial)["sparsity"] >= 0.495 for trial in trials)


def test_the_teacher_runs_once_for_all_trials_and_again_for_other_data(tmp_path):
    teacher, seen = counted(classifier(16))
    space = hypermodel(teacher, record=tmp_path / "said")
    search(keras_tuner.GridSearch(space, objective="val_accuracy", directory=tmp_path, max_trials=2))
    assert sum(size or 0 for size in seen) <= 32 + 3 * 8  # the data, and the samples by which a recording knows its teacher
    assert len(list((tmp_path / "said").iterdir())) == 1
    seen.clear()
    again = hypermodel(teacher, record=tmp_path / "said")  # as in another process
    search(keras_tuner.GridSearch(again, objective="val_accuracy", directory=tmp_path, project_name="third", max_trials=1))
    assert sum(size or 0 for size in seen) <= 8
    x, y = data(seed=9)
    other = keras_tuner.GridSearch(again, objective="accuracy", directory=tmp_path, project_name="fourth", max_trials=1)
    other.search(x, y, epochs=1, verbose=0)
    assert len(list((tmp_path / "said").iterdir())) == 2


def test_a_worker_waits_while_another_records(tmp_path, monkeypatch):
    calls = []

    def busy_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError('"said" is being recorded by process 1 on another host.')
        return keras_kd.record_teacher(*args, **kwargs)

    monkeypatch.setattr(_recordings, "record_teacher", busy_at_first)
    x, y = data()
    made = _recordings.Recordings(classifier(16), None, {"augment": lambda x, seed: x})({"x": x, "y": y}, tmp_path, [])
    other = _recordings.Recordings(classifier(16), None, {"augment": lambda x, seed: -x})({"x": x, "y": y}, tmp_path, [])
    assert len(calls) == 3
    assert made[0].num_samples == other[0].num_samples == 32
    assert made[0].path != other[0].path


def test_recorded_and_live_teachers_train_the_same_student(tmp_path):
    teacher = classifier(16)
    found = []
    for record in (True, False):
        keras.utils.set_random_seed(1)
        space = hypermodel(teacher, record=record, record_options={"dtype": "float32"})
        tuner = keras_tuner.GridSearch(
            space, objective="val_accuracy", directory=tmp_path, project_name=str(record), max_trials=1, seed=1
        )
        search(tuner, shuffle=False)
        found.append(tuner.get_best_models()[0].student.get_weights())
    assert os.listdir(tmp_path / "True" / "teacher")
    for recorded, live in zip(*found, strict=True):
        np.testing.assert_allclose(recorded, live, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of KerasTuner, which `pytest.warns` hands on as its own
def test_data_in_another_order_each_time_ask_the_teacher_itself(tmp_path):
    import tensorflow as tf

    shuffled = tf.data.Dataset.from_tensor_slices(data()).shuffle(32).batch(16)
    space = hypermodel()
    tuner = keras_tuner.GridSearch(space, objective=keras_tuner.Objective("accuracy", "max"), directory=tmp_path, max_trials=1)
    with pytest.warns(UserWarning, match="by shuffling or augmenting, so the teacher is not recorded"):
        tuner.search(shuffled, epochs=1, shuffle=False, verbose=0)
    assert tuner.oracle.trials["0"].status == "COMPLETED"
    assert not (pathlib.Path(tuner.project_dir) / "teacher").exists()


def test_a_data_set_in_one_order_is_recorded_and_so_is_a_recording_a_teacher(tmp_path):
    import tensorflow as tf

    def one_trial(teacher, name, *args, **arguments):
        tuner = keras_tuner.GridSearch(
            hypermodel(teacher), objective="val_accuracy", directory=tmp_path, max_trials=1, project_name=name
        )
        tuner.search(*args, validation_data=data(16, seed=4), epochs=1, verbose=0, **arguments)
        assert tuner.oracle.trials["0"].status == "COMPLETED", tuner.oracle.trials["0"].message

    teacher, seen = counted(classifier(16))
    one_trial(teacher, "data set", tf.data.Dataset.from_tensor_slices(data()).batch(16))
    (folder,) = (tmp_path / "data set" / "teacher").iterdir()
    recording = keras_kd.Recording(folder)
    assert recording.num_samples == 32
    seen.clear()
    one_trial(recording, "recording", batch_size=8)
    assert not seen


def test_a_schedule_needs_the_number_of_batches():
    def batches():
        yield data()

    space = hypermodel(search={"sparsity": 0.5})
    hp = keras_tuner.HyperParameters()
    with pytest.warns(UserWarning, match="can be read once only"), pytest.raises(ValueError, match="Pass steps_per_epoch="):
        space.fit(hp, space.build(hp), batches(), epochs=1)


def test_validation_split_takes_the_last_samples(tmp_path):
    class Seen(DistillationHyperModel):
        def taught(self, model, call):
            made = super().taught(model, call)
            self.held_out, self.batches = made["validation_data"], list(made["x"].as_numpy_iterator())
            return made

    x, y = data()
    space = Seen(build_student, classifier(16), loss=CROSS_ENTROPY, compile_options=EAGER)
    tuner = keras_tuner.RandomSearch(space, objective="val_accuracy", directory=tmp_path, max_trials=1, seed=1)
    tuner.search(x, y, validation_split=0.25, shuffle=False, epochs=1, verbose=0)
    np.testing.assert_array_equal(space.held_out[0], x[24:])
    np.testing.assert_array_equal(np.concatenate([batch[0].inputs for batch in space.batches]), x[:24])


class Own(keras_tuner.HyperModel):
    """What users write: a Distiller, and `fit_trial`."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def build(self, hp):
        loss = losses.KDLoss(temperature=hp.Choice("temperature", [1.0, 3.0]))
        distiller = keras_kd.Distiller(self.teacher, classifier(4), loss)
        distiller.compile("adam", CROSS_ENTROPY, metrics=["accuracy"], run_eagerly=True)
        return distiller

    def fit(self, hp, model, *args, **kwargs):
        return fit_trial(model, *args, trial_callbacks=[callbacks.Pruning(hp.Choice("sparsity", [0.5]))], **kwargs)


def test_a_hypermodel_of_ones_own_works_as_well(tmp_path):
    tuner = search(keras_tuner.GridSearch(Own(classifier(16)), objective="val_accuracy", directory=tmp_path, max_trials=2))
    assert [metrics_of(trial)["sparsity"] for trial in tuner.oracle.trials.values()] == [0.5, 0.5]


def test_a_killed_search_goes_on_and_loses_only_the_running_trial(tmp_path):
    def make(space):
        tuner = keras_tuner.GridSearch(space, objective="val_accuracy", directory=tmp_path, project_name="killed")
        resume(tuner)
        return tuner

    class Killed(DistillationHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            if hp.get("width") == 4:
                raise KilledError
            return super().fit(hp, model, *args, **kwargs)

    fixed = {"temperature": 2.0, "student_loss_weight": 0.5, "learning_rate": 0.01}
    killed = Killed(build_student, classifier(16), loss=CROSS_ENTROPY, compile_options=EAGER, search=fixed)
    with pytest.raises(KilledError):
        search(make(killed))
    first = json.loads((tmp_path / "killed" / "trial_0000" / "trial.json").read_text())
    trained = []

    class Noting(DistillationHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            trained.append(hp.get("width"))
            return super().fit(hp, model, *args, **kwargs)

    tuner = search(make(Noting(build_student, classifier(16), loss=CROSS_ENTROPY, compile_options=EAGER, search=fixed)))
    assert trained == [4, 8]
    assert tuner.oracle.trials["0000"].get_state() == first
    assert {trial.status for trial in tuner.oracle.trials.values()} == {"COMPLETED"}


def test_everything_that_search_names_reaches_the_trial():
    hp = keras_tuner.HyperParameters()
    space = hypermodel(
        losses=lambda hp: [losses.KDLoss(), losses.DKDLoss()],
        search={
            "temperature": [3.0],
            "student_loss_weight": (0.25, 0.5),
            "learning_rate": (1e-3, 1e-2),
            "distillation_loss_weight": (0.5, 2.0, 0.5),
            "final_temperature": 1.0,
            "sparsity": lambda hp: 0.75,
            "num_bits": (4, 8),
            "number_of_clusters": (3, 9, 2),
        },
    )
    distiller = space.build(hp)
    assert [loss.temperature for loss in distiller.distillation_losses] == [3.0, 3.0]
    assert distiller.distillation_loss_weights == [1.0, 0.5]
    assert distiller.student_loss_weight == 0.25
    assert float(distiller.optimizer.learning_rate) == pytest.approx(1e-3)
    made = space.callbacks(hp, distiller, epochs=4, steps=100)
    assert [type(one).__name__ for one in made] == ["AnnealTemperature", "Pruning", "Clustering", "Quantization"]
    assert (made[1].pruning_schedule.final_sparsity, made[1].pruning_schedule.end_step) == (0.75, 60)
    assert (made[2].number_of_clusters, made[2].preserve_sparsity, made[3].num_bits) == (3, True, 4)
    assert set(hp.values) == {
        "width", "temperature", "student_loss_weight", "learning_rate", "dkd_loss_weight", "num_bits", "number_of_clusters",
    }  # fmt: skip
    again = space.build(hp)
    assert again.distillation_losses[0] is not distiller.distillation_losses[0]


def test_the_temperature_of_a_given_loss_is_searched_and_that_of_a_function_left_to_it():
    for given, expected in ((losses.KDLoss(temperature=7.0), 1.0), (lambda hp: losses.KDLoss(temperature=7.0), 7.0)):
        space = DistillationHyperModel(build_student, classifier(16), losses=given)
        assert space.build(keras_tuner.HyperParameters()).distillation_losses[0].temperature == expected


def test_losses_are_chosen_by_name_and_copied_for_each_trial():
    given = losses.KDLoss(temperature=7.0)
    space = hypermodel(losses={"plain": given, "decoupled": lambda hp: losses.DKDLoss()}, search={"temperature": None})
    hp = keras_tuner.HyperParameters()
    first = space.build(hp).distillation_losses[0]
    assert (first.temperature, first is given) == (7.0, False)
    hp.values["distillation_loss"] = "decoupled"
    assert isinstance(space.build(hp).distillation_losses[0], losses.DKDLoss)


def test_without_labels_the_teacher_alone_counts():
    assert hypermodel(loss=None, metrics=None).build(keras_tuner.HyperParameters()).student_loss_weight == 0.0


def test_an_average_of_the_student_belongs_to_its_trial():
    average = keras_kd.teachers.MovingAverage(0.5)
    space = hypermodel(average)
    one, other = (space.build(keras_tuner.HyperParameters()).teacher for _ in range(2))
    assert one is not other
    assert average.model is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: DistillationHyperModel(classifier(2), classifier(4)), "`build_student` must be a function"),
        (lambda folder: hypermodel(search={"dropout": 0.5}), "`search` knows temperature.*Received: dropout"),
        (lambda folder: hypermodel(search={"num_bits": (8, 4)}).build(keras_tuner.HyperParameters()), "low < high"),
        (
            lambda folder: hypermodel(search={"sparsity": "much"} | {"sparsity": (1,)}).build(keras_tuner.HyperParameters()),
            "must be a list",
        ),
        (lambda folder: hypermodel(score="val_accuracy"), "`score` must be a keras_kd.tuner.Score"),
        (
            lambda folder: keras_tuner.RandomSearch(
                DistillationHyperModel(lambda hp: None, classifier(4)), objective="val_accuracy", directory=folder
            ),
            "`build_student` must return a keras.Model. Received: None",
        ),
        (
            lambda folder: keras_tuner.RandomSearch(
                DistillationHyperModel(lambda hp: keras.Sequential([keras.layers.Dense(3)]), classifier(4)), objective="loss"
            ),
            "must return a built model",
        ),
        (
            lambda folder: hypermodel(losses=losses.PKTLoss(), search={"temperature": [1.0]}).build(keras_tuner.HyperParameters()),
            'has a "temperature", and no loss has one',
        ),
        (
            lambda folder: search(
                keras_tuner.RandomSearch(
                    hypermodel(search={"student_loss_weight": (0.0, 1.0)}), objective="val_loss", directory=folder
                )
            ),
            "compared by what the search does not scale",
        ),
        (
            lambda folder: search(
                keras_tuner.RandomSearch(hypermodel(), objective=keras_tuner.Objective("val_acuracy", "max"), directory=folder)
            ),
            "The objective val_acuracy is no metric of this training",
        ),
    ],
)
def test_bad_input_is_named_and_ends_the_search(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        call(tmp_path)
