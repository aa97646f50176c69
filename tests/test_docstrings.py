"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import keras
import numpy as np
import pytest

import keras_kd
from keras_kd import _progress


def examples():
    for info in [None, *pkgutil.walk_packages(keras_kd.__path__, "keras_kd.")]:
        name = info.name if info else "keras_kd"
        if name.endswith("__main__"):
            continue
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("example", list(examples()))
def test_an_example_prints_what_it_says(example, tmp_path, monkeypatch):
    monkeypatch.setattr(_progress, "_SHORT_SECONDS", np.inf)  # on a busy machine the shortest jobs would show themselves
    example.globs = {"keras": keras, "keras_kd": keras_kd, "np": np, "tmp_path": tmp_path}
    written = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=written.append, clear_globs=False)
    assert result.failed == 0, "".join(written)
