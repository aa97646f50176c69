"""How is TF-MOT reached? The only module that imports it: when it is needed, and without its side effects."""

import importlib
import os
from typing import Any


def load() -> Any:
    """Imports tensorflow-model-optimization and returns it; the environment and `tf.keras` stay what they were.

    Its own import sets `TF_USE_LEGACY_KERAS=1`, which every subprocess inherits, and turns `tf.keras` into Keras 2 if nobody
    has touched it yet.

    Returns:
        The module `tensorflow_model_optimization`.

    Raises:
        ImportError: if it is not installed, or on Python 3.12 and later if setuptools is not.
    """
    import tensorflow as tf

    _ = tf.keras.Model  # settles which Keras `tf.keras` is, before TF-MOT can
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        return importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        raise ImportError(
            "Pruning, clustering and quantization need tensorflow-model-optimization (and setuptools on Python >= 3.12): "
            "pip install tensorflow-model-optimization setuptools"
        ) from error
    finally:
        if before is None:
            os.environ.pop("TF_USE_LEGACY_KERAS", None)
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = before


def load_part(path: str) -> Any:
    """Imports a module of TF-MOT's core that its public names do not reach, such as `"clustering.keras.clustering_centroids"`."""
    return importlib.import_module(f"{load().__name__}.python.core.{path}")
