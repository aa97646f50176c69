"""apply: a plan is carried out as it stands, measured, and stopped where it costs too much."""

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd.analysis import Plan, Step
from keras_kd.surgery import _costs, apply
from tests.surgery import networks

L = keras.layers


def macs_of(model):
    return sum(row.macs or 0 for row in _costs.count_macs(model))


def images(samples=150):
    return np.random.default_rng(0).normal(size=(samples, 8, 8, 3)).astype("float32")


def network():
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="a")(image)
    y = L.Conv2D(8, 3, padding="same", activation="relu", name="b")(x)
    x = L.Add(name="add")([x, y])
    x = L.Conv2D(10, 3, activation="relu", name="c")(x)
    x = L.Dense(16, activation="relu", name="d")(L.GlobalAveragePooling2D()(x))
    x = L.Dense(16, activation="relu", name="e")(x)
    return networks.randomize(keras.Model(image, L.Dense(3, name="head")(x)))


def test_a_recommended_plan_gives_the_costs_that_it_says():
    model, x = network(), images()
    plan = keras_kd.analysis.linear_analysis(model, x, verbose=0).recommend(macs=0.6)
    smaller, report = apply(model, Plan.from_json(plan.to_json()), data=x, verbose=0, return_report=True)
    assert (macs_of(smaller), smaller.count_params()) == (plan.macs_after, plan.parameters_after)
    assert (report.steps[-1].macs, report.steps[-1].parameters) == (plan.macs_after, plan.parameters_after)
    assert all(one.taken and 0 <= one.measure <= 1 for one in report.steps)
    assert report.measure == 1.0


def test_removals_in_a_row_are_one_removal():
    model, x = network(), images()
    steps = [
        Step("remove_channels", "c", channels=(1, 4)),
        Step("remove_channels", "c", channels=(7,)),
        Step("remove_channels", "d", channels=(0,)),
    ]
    smaller = apply(model, steps, data=x, verbose=0)
    at_once = keras_kd.surgery.remove_channels(model, {"c": [1, 4, 7], "d": [0]}, data=x)
    np.testing.assert_allclose(smaller(x), at_once(x), atol=1e-5)


def test_channels_are_those_of_the_original_after_other_steps():
    model, x = network(), images()
    steps = [
        Step("remove_channels", "c", channels=(0, 1)),
        Step("factorize", "d", rank=4),
        Step("remove_channels", "c", channels=(1, 5, 9)),
    ]
    smaller = apply(model, steps, data=x, verbose=0)
    assert smaller.get_layer("c").filters == 6
    kept = keras_kd.surgery.kept_channels(smaller)["c"]
    assert kept.tolist() == [2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(
    "step",
    [
        Step("remove_channels", "c", channels=(2,)),
        Step("remove_layer", "e"),
        Step("remove_layer", "b", last="add"),
        Step("merge_block", "d", last="e"),
        Step("factorize", "e", rank=3),
    ],
    ids=lambda step: f"{step.action}-{step.layer}",
)
def test_every_action_makes_the_model_smaller(step, tmp_path):
    model, x = network(), images()
    smaller, report = apply(model, [step], data=x, verbose=0, return_report=True)
    assert smaller.count_params() == report.steps[0].parameters < model.count_params()
    assert step.action in str(report)
    smaller.save(tmp_path / "smaller.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "smaller.keras")(x), smaller(x), atol=1e-6)


def test_the_step_that_costs_too_much_is_not_taken_and_none_after_it():
    model, x = network(), images()
    labels = np.argmax(model(x), -1)
    steps = [
        Step("factorize", "e", rank=7),
        Step("remove_channels", "d", channels=tuple(range(15))),
        Step("factorize", "d", rank=2),
    ]
    smaller, report = apply(model, steps, data=x, labels=labels, tolerance=0.05, verbose=0, return_report=True)
    assert report.measure == 1.0
    assert [one.taken for one in report.steps] == [True, False]
    assert report.steps[0].measure >= 0.95 > report.steps[1].measure
    assert smaller.count_params() == report.steps[0].parameters
    assert 'remove_channels of "d"' in report.stopped


def test_an_empty_plan_gives_the_model_itself():
    model = network()
    assert apply(model, [], verbose=0) is model


@pytest.mark.parametrize(
    ("plan", "options", "told"),
    [
        ("plan", {}, "`plan` must be a Plan"),
        ([Step("factorize", "nowhere", rank=2)], {}, "must be one for this model"),
        ([Step("melt", "a")], {}, "Actions are remove_channels"),
        ([], {"tolerance": 2}, r"`tolerance` must be in \[0, 1\]"),
        ([], {"tolerance": 0.1}, "`data` must be given with `tolerance`"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_done(plan, options, told):
    with pytest.raises((TypeError, ValueError), match=told):
        apply(network(), plan, verbose=0, **options)
