"""Which epoch of a pruning run is worth keeping? The best of those that reached the sparsity."""

from typing import Any

import keras

from keras_kd._tunable import fraction


class SparseCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the best model among the epochs that reached a sparsity.

    The usual rule, `ModelCheckpoint(save_best_only=True)`, picks an epoch from before pruning was done: dense models are the more
    accurate ones. Put this callback after `Pruning` (or `KeepSparsity`), which writes the sparsity into the logs.

    Args:
        filepath: where the model goes, `.keras`; or `.weights.h5` with `save_weights_only=True`.
        sparsity: the share of zeros in the pruned kernels that an epoch must have, in [0, 1].
        monitor: what is compared between epochs.
        tolerance: how far below `sparsity` still counts: a whole number of weights seldom has the exact share.
        **kwargs: of `keras.callbacks.ModelCheckpoint`, such as `mode` or `verbose`; `save_best_only` is True and `save_freq`
            "epoch".

    Raises:
        ValueError: for a sparsity out of its range; in `fit`, if no callback before this one logs the sparsity.

    Example:

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "best.keras")
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> keep = [keras_kd.callbacks.Pruning(0.5), keras_kd.callbacks.SparseCheckpoint(path, 0.5, monitor="loss")]
    >>> history = model.fit(np.ones((32, 10)), np.ones((32, 4)), epochs=2, callbacks=keep, verbose=0)
    >>> float(np.mean(keras.models.load_model(path).layers[0].kernel == 0))
    0.5
    """

    def __init__(
        self, filepath: Any, sparsity: float, monitor: str = "val_loss", *, tolerance: float = 0.005, **kwargs: Any
    ) -> None:
        super().__init__(filepath, monitor=monitor, save_best_only=True, save_freq="epoch", **kwargs)
        self.sparsity = fraction("sparsity", sparsity)
        self.tolerance = fraction("tolerance", tolerance)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves the model if the epoch reached the sparsity and is the best of those."""
        if "sparsity" not in (logs or {}):
            raise ValueError(
                "SparseCheckpoint finds no `sparsity` in the logs. Put Pruning or KeepSparsity before it in the list of callbacks. "
                f"Received logs: {', '.join(logs or {}) or 'none'}."
            )
        if logs["sparsity"] >= self.sparsity - self.tolerance:
            super().on_epoch_end(epoch, logs)
