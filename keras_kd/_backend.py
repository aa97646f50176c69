"""Is this Keras one that the library works on? Importing this module answers with a clear error where it is not."""

import os

_NEEDED = (
    "keras_kd needs the TensorFlow backend of Keras. Received: the backend {received!r}. Set the environment variable "
    "KERAS_BACKEND=tensorflow before Keras is imported (or `backend` in ~/.keras/keras.json)."
)

try:
    import keras
except ImportError as error:
    if (requested := os.environ.get("KERAS_BACKEND", "tensorflow")) != "tensorflow":
        raise ImportError(_NEEDED.format(received=requested)) from error
    raise

if keras.config.backend() != "tensorflow":
    raise ImportError(_NEEDED.format(received=keras.config.backend()))
