"""Is KerasTuner there? Importing this module answers with the way to install it where it is not."""

import importlib.util

if missing := [name for name in ("keras_tuner", "tensorboard") if importlib.util.find_spec(name) is None]:
    # KerasTuner imports tensorboard in every trial without declaring it: each would fail.
    raise ImportError(
        f"keras_kd.tuner needs KerasTuner and TensorBoard. Received: no module {', '.join(missing)}. Install them: "
        "pip install 'keras-kd[tuner]'"
    )
