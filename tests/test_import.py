"""Importing the library, and TF-MOT through it, changes nothing: each claim is run in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest


def run(script, **environment):
    """Runs a script in a fresh interpreter; returns what it prints as JSON, or raises with what it wrote."""
    env = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "TF_USE_LEGACY_KERAS")} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=env, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_adds_no_tf_mot_no_environment_variable_and_leaves_tf_keras_alone():
    found = run(
        """
        import json, os, sys
        import keras
        before, known = dict(os.environ), set(sys.modules)  # Keras itself brings some of them
        import keras_kd
        lazy = ("tensorflow_model_optimization", "tf_keras", "sklearn", "matplotlib", "rich", "keras_tuner", "ai_edge_litert")
        import tensorflow as tf
        print(json.dumps({
            "heavy": [name for name in lazy if name in set(sys.modules) - known],
            "environment": dict(os.environ) == before,
            "tf_keras": tf.keras.__version__ == keras.__version__,
        }))
        """
    )
    assert found == {"heavy": [], "environment": True, "tf_keras": True}


def test_importing_adds_at_most_a_fifth_of_a_second_to_keras():
    script = """
        import json, time
        begin = time.perf_counter()
        import keras
        start = time.perf_counter()
        import keras_kd
        print(json.dumps([start - begin, time.perf_counter() - start]))
        """
    found = [run(script) for _ in range(3)]  # the least of three: the machine may be busy
    of_keras, added = (min(times) for times in zip(*found, strict=True))
    assert added < max(0.2, 0.05 * of_keras)  # or, on a slow machine, a twentieth of what Keras itself takes


@pytest.mark.parametrize("touched", [True, False], ids=["after tf.keras was used", "as the first thing"])
def test_loading_tf_mot_leaves_the_environment_and_tf_keras_as_they_were(touched):
    found = run(
        f"""
        import json, os, subprocess, sys
        import tensorflow as tf
        if {touched}:
            tf.keras.layers.Dense
        before = dict(os.environ)
        import keras, keras_kd
        from keras_kd import _tfmot
        tfmot = _tfmot.load()
        child = subprocess.run(
            [sys.executable, "-c", "import tensorflow as tf; print(tf.keras.__version__)"], capture_output=True, text=True)
        print(json.dumps({{
            "schedule": hasattr(tfmot.sparsity.keras, "PolynomialDecay"),
            "environment": dict(os.environ) == before,
            "tf_keras": tf.keras.__version__ == keras.__version__,
            "child": child.stdout.split()[-1] == keras.__version__,
        }}))
        """
    )
    assert found == {"schedule": True, "environment": True, "tf_keras": True, "child": True}


def test_what_the_user_had_set_stays_set():
    found = run(
        """
        import json, os
        from keras_kd import _tfmot
        _tfmot.load()
        print(json.dumps(os.environ.get("TF_USE_LEGACY_KERAS")))
        """,
        TF_USE_LEGACY_KERAS="0",
    )
    assert found == "0"


@pytest.mark.parametrize("backend", ["jax", "numpy"], ids=["whether it is installed or not", "one that Keras itself imports"])
def test_another_backend_is_named_with_the_way_out(backend):
    with pytest.raises(RuntimeError, match=f"keras_kd needs the TensorFlow backend of Keras. Received: the backend '{backend}'"):
        run("import keras_kd", KERAS_BACKEND=backend)
