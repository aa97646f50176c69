"""How do weights come to share few values while a model trains? Weight clustering as a plain callback, begun as by TF-MOT."""

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _tfmot
from keras_kd.callbacks._kernels import Kernel, choose_kernels
from keras_kd.callbacks._masking import Link, clear_stale, masking_groups, unlink

_INITS = ("kmeans_plus_plus", "linear", "density_based", "random")


class Clustering(keras.callbacks.Callback):
    """Weight clustering inside `fit`: each kernel holds few distinct values, which are trained.

    ```
    w_i = c[nearest(v_i)]                                  the kernel: every value is a centroid
    v_i <- v_i + d_i,  c_j <- c_j + mean over i of cluster j of d_i
    ```

    d is the optimizer's update of the kernel at its clustered value. So the hidden weights v learn by the straight-through
    estimator, as in TF-MOT, and a centroid moves by the mean of its weights' updates: under SGD that is TF-MOT's gradient averaged
    over the cluster; under other optimizers it is their step, which does not grow with the cluster. The nearest centroid is
    found by bisection, in memory of the size of the kernel.

    Before the first step, after every optimizer step and after `fit` a kernel holds at most `number_of_clusters` values, whatever
    the optimizer's options. A later fit with the callback goes on from the values that it finds. On a `Distiller` it works on the
    student. After `fit` the model carries no trace.

    Args:
        number_of_clusters: how many values a kernel may hold, at least 2.
        cluster_centroids_init: TF-MOT's initialisers: `"kmeans_plus_plus"`, `"linear"`, `"density_based"` or `"random"`, in upper
            case as well, or a member of TF-MOT's `CentroidInitialization`. They see the weights scaled to a largest magnitude of 1,
            since their constants are made for weights of that size.
        preserve_sparsity: whether weights that are zero stay zero; zero is one of the values then. Beside `Pruning` and
            `KeepSparsity` it must be set.
        layers: which layers: None for all that have a kernel; a name or path, a layer class, a function of a layer, or a list of
            these.

    Raises:
        ValueError: for an argument out of its range; in `fit`, for layers that match nothing, or kernels with fewer weights than
            clusters.

    Example:

    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> clustering = keras_kd.callbacks.Clustering(4)
    >>> history = model.fit(np.ones((32, 10)), np.ones((32, 1)), epochs=2, callbacks=[clustering], verbose=0)
    >>> len(np.unique(model.layers[0].kernel))
    4

    Reference:
        Han, Mao, Dally: Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding,
        2016.
    """

    def __init__(
        self,
        number_of_clusters: int,
        *,
        cluster_centroids_init: str = "kmeans_plus_plus",
        preserve_sparsity: bool = False,
        layers: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(number_of_clusters, bool) or not isinstance(number_of_clusters, int) or number_of_clusters < 2:
            raise ValueError(
                f"`number_of_clusters` must be a whole number of at least 2. Received: number_of_clusters={number_of_clusters!r}."
            )
        init = str(getattr(cluster_centroids_init, "name", cluster_centroids_init)).lower()  # TF-MOT's member is a string, too
        if init not in _INITS:
            raise ValueError(
                f"`cluster_centroids_init` must be one of {', '.join(_INITS)}. Received: "
                f"cluster_centroids_init={cluster_centroids_init!r}."
            )
        self.number_of_clusters = number_of_clusters
        self.cluster_centroids_init = init
        self.preserve_sparsity = bool(preserve_sparsity)
        self.layers = layers
        self._clustered: list[_Clustered] = []
        self._begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts the clusters on the weights."""
        for kernel in self._clustered:  # of a `fit` that ended in an error
            kernel.detach()
        student = getattr(self.model, "student", self.model)
        clear_stale(student, self.params)
        self._clustered = [_Clustered(kernel, self) for kernel in self._fitting(choose_kernels(student, self.layers))]
        self._begun = False
        self.model.make_train_function(force=True)  # Keras has traced one without the clusters already

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Makes the clusters, now that every other callback has given the weights their values."""
        if self._begun:
            return
        self._begun = True
        masked = [kernel.kernel.path for kernel in self._clustered if masking_groups(kernel.kernel.variable)]
        for kernel in self._clustered:
            for group in masking_groups(kernel.kernel.variable):
                group.begin()  # masks come first, by magnitudes that are not clustered yet
        if masked and not self.preserve_sparsity:
            warnings.warn(
                f"Clustering gives the zeros that another callback keeps in {', '.join(masked)} the value of a cluster. Set "
                "preserve_sparsity=True.",
                stacklevel=2,
            )
        for kernel in self._clustered:
            kernel.begin()

    def on_train_end(self, logs: Any = None) -> None:
        """Clusters a last time, since Keras may have put averaged weights in, and leaves no trace on the model."""
        for kernel in self._clustered:
            if self._begun:
                kernel.finish()
            kernel.detach()
        self._clustered = []

    def _fitting(self, kernels: list[Kernel]) -> list[Kernel]:
        small = [kernel for kernel in kernels if int(np.prod(kernel.variable.shape)) < self.number_of_clusters]
        if not small:
            return kernels
        message = (
            f"A kernel must have at least as many weights as clusters. Received: number_of_clusters={self.number_of_clusters} for "
            f"{', '.join(kernel.label for kernel in small)}."
        )
        if self.layers is not None or len(small) == len(kernels):
            raise ValueError(f"{message} Choose other layers with `layers=`, or fewer clusters.")
        warnings.warn(f"{message} They stay as they are.", stacklevel=2)
        return [kernel for kernel in kernels if kernel not in small]

    def first_centroids(self, weights: np.ndarray) -> np.ndarray:
        """Hook: the values that a kernel begins with, in ascending order, `number_of_clusters` of them.

        A kernel that has no more distinct values than that, because it is clustered already, keeps them.
        """
        distinct = np.unique(np.append(weights, 0) if self.preserve_sparsity else weights)
        if len(distinct) <= self.number_of_clusters:
            found = distinct
        else:
            scale = float(np.abs(distinct).max())  # for TF-MOT's absolute constants
            config = _tfmot.load().clustering.keras.CentroidInitialization[self.cluster_centroids_init.upper()]
            factory = _tfmot.load_part("clustering.keras.clustering_centroids").CentroidsInitializerFactory
            initializer = factory.get_centroid_initializer(config)
            scaled = tf.constant((weights / scale).astype("float32").reshape(-1))
            made = initializer(scaled, self.number_of_clusters, preserve_sparsity=self.preserve_sparsity).get_cluster_centroids()
            found = np.unique(np.asarray(made, dtype="float64") * scale)
        missing = self.number_of_clusters - len(found)
        return np.concatenate([found, np.full(max(missing, 0), found[-1])]).astype(weights.dtype)


class _Clustered(Link):
    """A kernel in training, its hidden weights and its centroids."""

    def __init__(self, kernel: Kernel, callback: Clustering) -> None:
        super().__init__(self, 0, callback.params)
        self.kernel, self.callback, self.model = kernel, callback, callback.model
        self.strategy = strategy = self.model.distribute_strategy
        options = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        variable = kernel.variable
        with strategy.scope():
            self.hidden = tf.Variable(tf.zeros(variable.shape, variable.dtype), **options)
            self.before = tf.Variable(tf.zeros(variable.shape, variable.dtype), **options)  # the kernel of the step before
            self.members = tf.Variable(tf.zeros(variable.shape, tf.int64), **options)  # of each hidden weight, the centroid
            self.centroids = tf.Variable(tf.zeros((callback.number_of_clusters,), variable.dtype), **options)
        self.link(variable)

    def begin(self) -> None:
        """Makes the centroids and clusters the kernel."""
        weights = keras.ops.convert_to_numpy(self.kernel.variable)
        with self.strategy.scope():
            self.centroids.assign(self.callback.first_centroids(weights))
            self.hidden.assign(weights)
            self.members.assign(_nearest(tf.convert_to_tensor(self.hidden), tf.convert_to_tensor(self.centroids)))
            self.finish()
            self.before.assign(keras.ops.convert_to_tensor(self.kernel.variable))

    def finish(self) -> None:
        """Gives every weight of the kernel the nearest value."""
        with self.strategy.scope():
            weights = keras.ops.convert_to_tensor(self.kernel.variable)
            centroids = tf.convert_to_tensor(self.centroids)
            self.kernel.variable.assign(self._values(centroids, _nearest(weights, centroids), weights))

    def detach(self) -> None:
        """Gives the kernel the constraint back that it had."""
        unlink(self.kernel.variable, self)
        self.model.train_function = None  # the clusters are in it

    def __call__(self, weight: Any) -> Any:
        """Returns the kernel's next clustered value, after a step of the optimizer."""
        stepped = self.value(weight)
        centroids, hidden = tf.convert_to_tensor(self.centroids), tf.convert_to_tensor(self.hidden)
        update = stepped - tf.convert_to_tensor(self.before)
        hidden = hidden + update
        moved = centroids + self._mean_update(update, tf.convert_to_tensor(self.members))
        if self.callback.preserve_sparsity:
            moved = tf.where(centroids == 0, tf.zeros_like(moved), moved)
        moved = tf.sort(moved)
        members = _nearest(hidden, moved)
        clustered = self._values(moved, members, stepped)
        self.members.assign(members)
        self.hidden.assign(hidden)
        self.centroids.assign(moved)
        self.before.assign(clustered)
        return clustered

    def _mean_update(self, update: Any, members: Any) -> Any:
        count = self.callback.number_of_clusters
        wide = tf.cast(update, tf.float64 if update.dtype == tf.float64 else tf.float32)  # half precision cannot count so far
        flat = [tf.reshape(tensor, [-1]) for tensor in (wide, tf.ones_like(wide))]
        sums, sizes = (tf.math.unsorted_segment_sum(one, tf.reshape(members, [-1]), count) for one in flat)
        return tf.cast(tf.math.divide_no_nan(sums, sizes), update.dtype)

    def _values(self, centroids: Any, members: Any, present: Any) -> Any:
        values = tf.gather(centroids, members)
        return tf.where(present == 0, tf.zeros_like(values), values) if self.callback.preserve_sparsity else values


def is_clustered(variable: Any) -> bool:
    """Whether a callback is clustering this weight."""
    constraint = variable.constraint
    while isinstance(constraint, Link):
        if isinstance(constraint, _Clustered):
            return True
        constraint = constraint.former
    return False


def _nearest(weights: Any, centroids: Any) -> Any:
    """Index of the nearest of the sorted centroids, the lower one at equal distance."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    found = tf.searchsorted(middles, tf.reshape(weights, [-1]), side="left", out_type=tf.int64)
    return tf.reshape(found, tf.shape(weights))
