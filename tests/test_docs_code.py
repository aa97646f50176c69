"""The code on the pages of docs runs as it stands, from top to bottom."""

import operator
import pathlib
import re

import keras
import numpy as np
import pytest

from keras_kd import _tfmot

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    "analysis.md",
    "compress.md",
    "from_keras.md",
    "from_tfmot.md",
    "from_torchdistill.md",
    "large_data.md",
    "order.md",
    "pruning.md",
    "quantization.md",
    "search.md",
    "surgery.md",
    "teachers.md",
]


def classifier(width, name):
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")
    return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3, name="head")], name=name)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # Keras warns of it for every data set
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.disable_interactive_logging()
    rng = np.random.default_rng(0)
    names = {"teacher": classifier(16, "teacher"), "student": classifier(4, "student"), "assistant": classifier(8, "assistant")}
    names |= {"x": rng.normal(size=(64, 4)).astype("float32"), "y": rng.integers(0, 3, size=64)}
    names["model"] = classifier(16, "model")
    names["model"].compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_names_of_tf_mot_that_a_page_gives_are_there():
    names = set(re.findall(r"tfmot((?:\.\w+)+)", (ROOT / "docs" / "from_tfmot.md").read_text()))
    assert len(names) > 15
    for name in sorted(names):
        operator.attrgetter(name[1:])(_tfmot.load())  # raises what is missing
