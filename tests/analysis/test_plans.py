"""Plans: nothing in them that surgery could not do, and what they save is what smaller models really save."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kd import _calls, _macs, analysis
from keras_kd.analysis import LinearReport, Moments, Plan, _flows, _places, linear_analysis
from keras_kd.surgery import SurgeryReport
from tests.analysis.test_linear import randomized

X = np.random.default_rng(0).normal(size=(400, 8)).astype("float32")
IMAGES = np.random.default_rng(1).normal(size=(120, 8, 8, 3)).astype("float32")


def analysed(model, x=X, **arguments):
    return linear_analysis(model, x, verbose=0, **arguments)


def reasons(model):
    trace = _calls.trace(model, _places.input_specs(model, None))
    flows = _flows.find_flows(model, trace, _places.find_places(trace))
    return {name: flow.reason for name, flow in flows.items()}


class Block(layers.Layer):
    """Adds what one layer gives to what another makes of it."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Dense(units, name="a"), layers.Dense(units, name="b")

    def call(self, x):
        h = self.a(x)
        return h + self.b(h)


def test_channels_that_other_code_reads_too_stay():
    inputs = keras.Input((8,))
    hidden = layers.Dense(8, name="before")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(Block(8, name="block")(hidden)))
    found = reasons(model)
    assert "inside of a layer that is no Functional model" in found["block/a"]
    assert "inside of a layer that is no Functional model" in found["before"]
    twice = layers.Dense(6, name="twice")(inputs)
    outer = keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(6, name="next")(twice) + twice))
    assert reasons(outer)["twice"] == "several layers read it"
    assert {step.layer for step in analysed(outer).recommend(parameters=0.7).steps} <= set()


@pytest.mark.parametrize(
    ("activation", "reason"),
    [("softmax", "may mix channels"), (lambda x: keras.ops.relu(x), "may mix channels"), ("relu", ""), ("gelu", "")],
)
def test_an_activation_that_mixes_channels_ties_them(activation, reason):
    inside = keras.Sequential([keras.Input((8,)), layers.Dense(8, activation=activation, name="d"), layers.Dense(3)])
    beside = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="d"), layers.Activation(activation), layers.Dense(3)])
    for model in (inside, beside):
        found = reasons(model)["d"]
        assert (reason in found) if reason else found == ""


def test_a_cast_between_layers_hides_nobody():
    body = layers.Dense(8, activation="relu", dtype="mixed_float16", name="body")
    model = keras.Sequential([keras.Input((8,)), body, layers.Dense(3, dtype="float32", name="head")])
    assert reasons(model) == {"body": "", "head": "it gives the model's output"}


def test_what_lost_channels_is_not_removed_and_the_other_way_round():
    inputs = keras.Input((8,))
    a = layers.Dense(32, activation="relu", name="a")(inputs)
    b = layers.Dense(32, name="idle")(a)
    model = randomized(keras.Model(inputs, layers.Dense(3)(layers.LayerNormalization(name="norm")(b))))
    kernel, bias = model.get_layer("a").get_weights()
    bias[:10] = -50.0  # dead
    model.get_layer("a").set_weights([kernel, bias])
    noise = 0.001 * np.random.default_rng(0).normal(size=(32, 32))
    model.get_layer("idle").set_weights([np.eye(32) + noise, np.zeros(32)])
    for budget in (0.9, 0.6, 0.35, 0.1):
        steps = analysed(model).recommend(parameters=budget).steps
        assert not ({"a", "idle"} <= {step.layer for step in steps})


def test_a_block_that_is_read_from_outside_is_not_merged():
    inputs = keras.Input((8,))
    a = layers.Dense(40, name="a")(inputs)
    b = layers.Dense(40, name="b")(a)
    model = randomized(keras.Model(inputs, layers.Dense(3)(layers.Concatenate(name="both")([b, a]))))
    report = analysed(model, blocks=[("a", "b")])
    assert report.blocks[0].escapes == '"a" is read by both'
    assert all(step.action != "merge_block" for step in report.recommend(parameters=0.6).steps)


def test_a_block_holds_its_branches_and_nothing_beside_it():
    inputs = keras.Input((8,))
    a = layers.Dense(8, name="a")(inputs)
    beside = layers.Dense(5, name="beside")(a)
    b = layers.Dense(8, name="b")(layers.ReLU(name="relu")(a))
    short = layers.Dense(8, name="short")(inputs)
    added = layers.Add(name="add")([b, short])
    model = keras.Model(inputs, layers.Concatenate()([added, beside]))
    (block,) = analysed(model, blocks=[("a", "add")]).blocks
    assert set(block.members) == {"a", "relu", "b", "short", "add"}
    assert block.escapes == '"a" is read by beside'


def test_a_shared_layer_is_not_removed_for_one_of_its_calls():
    shared = layers.Dense(8, name="shared")
    inputs = keras.Input((8,))
    x = layers.ReLU()(shared(inputs))
    model = keras.Model(inputs, layers.Dense(3)(shared(x)))
    shared.set_weights([np.eye(8), np.zeros(8)])
    report = analysed(model)
    assert report["shared:0"].bypass == pytest.approx(1.0)
    assert all(step.layer != "shared" for step in report.recommend(parameters=0.6).steps)


def test_grouped_convolutions_are_not_factorized_and_wide_ones_are():
    grouped = randomized(
        keras.Sequential([keras.Input((8, 8, 32)), layers.Conv2D(32, 3, groups=4), layers.ReLU(), layers.Conv2D(2, 1)])
    )
    x = np.random.default_rng(0).normal(size=(200, 8, 8, 32)).astype("float32")
    assert all(step.action != "factorize" for step in analysed(grouped, x).recommend(macs=0.5, tolerance=0.3).steps)
    inputs = keras.Input((5, 5, 128))
    conv = layers.Conv2D(24, 3, name="conv")
    model = keras.Model(inputs, layers.Conv2D(2, 1)(layers.LayerNormalization()(conv(inputs))))
    rng = np.random.default_rng(0)
    conv.set_weights([(rng.normal(size=(1152, 4)) @ rng.normal(size=(4, 24))).reshape(3, 3, 128, 24), np.zeros(24)])
    report = analysed(model, rng.normal(size=(100, 5, 5, 128)).astype("float32"))
    assert report["conv"].linearity_reason == "its window was cut to the middle: a lower bound"
    assert "≥ 0." in str(report)
    (step,) = report.recommend(macs=0.5).steps
    assert (step.action, step.rank) == ("factorize", 4)
    left = 9 * (1152 * 4 + 4 * 24) + 9 * 24 * 2
    assert report.recommend(macs=0.5).macs_after == pytest.approx(left, rel=0.01)


def test_few_rows_do_not_make_noise_look_linear():
    x = np.random.default_rng(0).normal(size=(9000, 60)).astype("float32")
    model = keras.Sequential([keras.Input((60,)), layers.Dense(60, activation="tanh", name="d"), layers.Dense(2)])
    model.layers[0].set_weights([np.random.default_rng(1).normal(size=(60, 60)), np.zeros(60)])
    many, few = analysed(model, x)["d"], analysed(model, x[:150])["d"]
    assert few.linearity == pytest.approx(many.linearity, abs=0.08)
    assert np.mean(few.redundancy) == pytest.approx(np.mean(many.redundancy), abs=0.08)


def test_a_constant_cannot_stand_for_a_channel_around_which_there_are_zeros():
    def plan(padding):
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="conv")(inputs)
        model = randomized(keras.Model(inputs, layers.Conv2D(2, 3, padding=padding)(x)))
        kernel, bias = model.get_layer("conv").get_weights()
        kernel[..., 2], bias[2] = 0.0, 5.0
        model.get_layer("conv").set_weights([kernel, bias])
        return analysed(model, IMAGES).recommend()

    assert [step.channels for step in plan("valid").steps if step.action == "remove_channels"] == [(2,)]
    assert all(step.action != "remove_channels" for step in plan("same").steps)


def test_a_layer_that_adds_a_constant_is_not_one_that_does_nothing():
    norm = layers.BatchNormalization(name="norm", epsilon=0.0)
    model = keras.Sequential([keras.Input((8,)), norm, layers.ReLU(), layers.Dense(3)])
    assert analysed(model)["norm"].bypass == pytest.approx(1.0)
    norm.beta.assign(np.full(8, 5.0))
    assert analysed(model)["norm"].bypass < 0


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
def test_what_a_plan_saves_is_what_a_smaller_model_has(budget):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, padding="same", name="a")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="deep")(x)
    x = layers.Conv2D(24, 1, activation="relu", name="b")(x)
    x = layers.Dense(12, activation="relu", name="c")(layers.Flatten()(layers.MaxPooling2D()(x)))
    model = randomized(keras.Model(inputs, layers.Dense(4, name="head")(x)))
    plan = analysed(model, IMAGES).recommend(macs=budget, parameters=budget)
    assert plan.reached
    gone = {step.layer: len(step.channels) for step in plan.steps}
    assert {step.action for step in plan.steps} == {"remove_channels"}
    x = layers.Conv2D(16 - gone.get("a", 0), 3, padding="same")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Conv2D(24 - gone.get("b", 0), 1, activation="relu")(x)
    x = layers.Dense(12 - gone.get("c", 0), activation="relu")(layers.Flatten()(layers.MaxPooling2D()(x)))
    smaller = keras.Model(inputs, layers.Dense(4)(x))
    macs = sum(cost.macs or 0 for cost in _macs.measure(smaller, tf.constant(IMAGES[:1]))[0])
    assert plan.macs_after == pytest.approx(macs, rel=0.005)
    assert plan.parameters_after == pytest.approx(smaller.count_params(), rel=0.005)


def test_the_error_of_channels_is_the_share_of_variance_that_the_kept_ones_do_not_give():
    model = randomized(keras.Sequential([keras.Input((8,)), layers.Dense(10, activation="relu", name="d"), layers.Dense(3)]))
    (step,) = analysed(model).recommend(parameters=0.6).steps
    values = np.asarray(keras.Model(model.inputs[0], model.get_layer("d").output)(X), "float64")
    kept = np.delete(values, step.channels, axis=1)
    design = np.column_stack([kept, np.ones(400)])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    expected = left.var(0).sum() / values.var(0).sum() * 399 / (399 - kept.shape[1])
    assert step.error == pytest.approx(expected, rel=1e-3)


def test_a_tolerance_holds_for_every_step():
    inputs = keras.Input((8,))
    x = layers.Dense(20, activation="relu", name="a")(inputs)
    model = randomized(keras.Model(inputs, layers.Dense(3)(layers.Dense(20, name="b")(x))))
    for tolerance in (0.02, 0.1):
        steps = analysed(model).recommend(tolerance=tolerance).steps
        assert steps
        assert all(step.error <= tolerance for step in steps)


def test_blocks_bring_their_layers_with_them():
    inputs = keras.Input((8,))
    x = layers.Dense(40, name="b")(layers.Dense(40, name="a")(inputs))
    model = randomized(keras.Model(inputs, layers.Dense(3, name="c")(layers.ReLU()(x))))
    report = analysed(model, blocks=[("a", "b")], layers=["c"])
    assert {"a", "b", "c"} <= {layer.name for layer in report.layers}
    assert any(step.action == "merge_block" for step in report.recommend(parameters=0.5).steps)


def test_a_plan_for_many_layers_takes_seconds():
    inputs = keras.Input((16,))
    x = inputs
    for index in range(40):
        x = layers.Dense(32, activation="relu", name=f"d{index}")(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    report = linear_analysis(model, np.random.default_rng(0).normal(size=(300, 16)).astype("float32"), verbose=0)
    import time

    start = time.perf_counter()
    assert report.recommend(macs=0.3).reached
    assert time.perf_counter() - start < 10


def test_errors_in_order_are_those_of_regressions():
    rows = np.random.default_rng(0).normal(size=(200, 4)) @ np.random.default_rng(1).normal(size=(4, 6))
    moments = Moments.of(rows)
    found = analysis.statistics.errors_in_order(moments, [3, 0, 5, 1, 2, 4])
    for kept in range(1, 5):
        chosen = np.column_stack([rows[:, [3, 0, 5, 1][:kept]], np.ones(200)])
        left = rows - chosen @ np.linalg.lstsq(chosen, rows, rcond=None)[0]
        assert found[kept] == pytest.approx(left.var(0).sum() / rows.var(0).sum(), abs=1e-9)
    assert found[-1] == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macs": "half"}, TypeError, "`macs` must be a number"),
        ({"macs": True}, TypeError, "`macs` must be a number"),
        ({"parameters": float("inf")}, ValueError, "`parameters` must be above 0"),
        ({"tolerance": True}, TypeError, "`tolerance` must be a number"),
    ],
)
def test_budgets_that_make_no_sense_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        analysed(keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dense(2)])).recommend(**arguments)


@pytest.mark.parametrize("source", ["[1]", "", "{}", '{"steps": 3}'])
def test_what_is_no_report_is_named(source):
    for kind in (LinearReport, Plan):
        with pytest.raises(ValueError, match="`source` must be what"):
            kind.from_json(source)


def test_a_report_is_a_page_of_its_own(tmp_path):
    path = tmp_path / "report.html"
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="a"), layers.Dense(2)], name="net")
    analysed(model).to_html(path)
    text = path.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "Linear analysis of net" in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    "report",
    [
        Plan(steps=(), macs=2, macs_after=1, parameters=2, parameters_after=1, reached=True, untouched={}),
        SurgeryReport(kept={"a": np.array([0])}, removed={"a": np.array([1])}, parameters=2, parameters_after=1),
    ],
    ids=["plan", "surgery"],
)
def test_the_text_of_a_report_is_plain_and_shows_nothing_by_itself_in_a_notebook(report, monkeypatch):
    display = pytest.importorskip("IPython.display")
    plain, shown = str(report), []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(display, "display", shown.append)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks set it
    assert str(report) == plain
    assert "\x1b" not in plain
    assert not shown
