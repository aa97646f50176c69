"""Does the student tell its teacher's feature of a sample from those of other samples? Contrastive distillation."""

import math
from typing import Any

import keras
from keras import ops

from keras_kd._tunable import Tunable, positive
from keras_kd.losses._features import FeatureLoss, flat, in_training
from keras_kd.losses._math import l2_normalized

_UNKNOWN = -1e30  # a scale that no batch has set yet


@keras.saving.register_keras_serializable(package="keras_kd")
class CRDLoss(FeatureLoss):
    """Contrastive representation distillation: noise-contrastive estimation between embeddings of student and teacher.

    ```
    u = s . t / temperature,   u_n = s . q_n / temperature,     s, t = l2-normalised linear embeddings of the features
    - log h(u) - sum_n log(1 - h(u_n)),    h(u) = e^u / (e^u + N c)
    ```

    q_n are N past embeddings of the teacher. c is the mean of e^u and e^{u_n} over the first batch of training, then constant.
    The student's embedding is trained with the student. Outside training neither queue nor c moves.

    Where it differs from the reference implementation: its memory banks are addressed by the sample's index, which data in `fit`
    do not carry, and give positives and negatives of the same age; it adds the same term with the roles exchanged; and its
    negatives are of other classes than the anchor. Here positives are of now and negatives of the past, from a queue that starts
    with random directions. A teacher's embedding that changes in training would give that away (measured: accuracy of 0.51 where
    a fixed one reaches 0.83), so it is a fixed random projection.

    On several devices the queue takes the first replica's embeddings; on several hosts each keeps its own queue and c.

    Args:
        dim: width of the embeddings, at least 1.
        temperature: above 0. Readable and assignable: compiled steps follow.
        queue: N, at least 1.
        **kwargs: `name`, `reduction`, `dtype`, `teacher_layer_name`, `student_layer_name`, `teacher_channels`: see `FeatureLoss`.

    Call arguments:
        y_true: teacher's feature, shape `(batch, ...)`, or a list.
        y_pred: student's, or a list; the widths may differ.

    Returns:
        A scalar; without reduction, shape `(batch,)`. Not zero at equality.

    Raises:
        ValueError: for a dim or queue below 1, or a temperature that is not above 0.

    Example:

    >>> loss = keras_kd.losses.CRDLoss(dim=16, queue=64)
    >>> bool(loss(np.ones((2, 8)), np.ones((2, 5))) > 0)
    True

    Reference:
        Tian, Krishnan, Isola: Contrastive Representation Distillation, 2020.
    """

    equal_sizes = False
    equal_widths = False
    temperature = Tunable(positive)
    positions_count = True

    def __init__(self, dim: int = 128, temperature: float = 0.07, queue: int = 16384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("dim", dim), ("queue", queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number, at least 1. Received: {name}={value!r}.")
        self.dim, self.queue = dim, queue
        self.temperature = temperature

    def create_layers(self, teacher_shapes: list[Any], student_shapes: list[Any]) -> None:
        """Creates, for each layer, the teacher's fixed embedding, the student's, and the queue."""
        for shapes in zip(teacher_shapes, student_shapes, strict=True):
            for role, shape in zip(("teacher", "student"), shapes, strict=True):
                head = keras.layers.Dense(self.dim, dtype=self.dtype, name=f"{role}_embedding")
                head.build((None, math.prod(shape[1:])))
                head.trainable = role == "student"
                self.layers.append(head)
            memory = EmbeddingQueue(self.queue, self.dim, dtype=self.dtype, name="queue")
            memory.build(None)
            self.layers.append(memory)

    def compare(self, teacher: Any, student: Any, index: int) -> Any:
        """Returns one value per sample."""
        teacher_head, student_head, memory = self.layers[3 * index : 3 * index + 3]
        t, s = l2_normalized(teacher_head(flat(teacher))), l2_normalized(student_head(flat(student)))  # (batch, dim)
        temperature = Tunable.tensor(self, "temperature")
        u = ops.sum(s * t, axis=-1) / temperature  # (batch,)
        u_n = ops.matmul(s, ops.transpose(memory.negatives())) / temperature  # (batch, queue)
        log_noise = math.log(self.queue) + memory.log_scale(u, u_n)
        if in_training():
            memory.push(t)
        log_h = u - ops.logaddexp(u, log_noise)
        log_not_h = log_noise - ops.logaddexp(u_n, log_noise)
        return -log_h - ops.sum(log_not_h, axis=-1)

    def _check_pair(self, teacher: Any, student: Any, received: str) -> None:
        if None in (*teacher[1:], *student[1:]):
            raise ValueError(f"CRDLoss must know the widths of the features. {received} Give the models inputs of a fixed size.")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "dim": self.dim, "temperature": self.temperature, "queue": self.queue}


@keras.saving.register_keras_serializable(package="keras_kd")
class EmbeddingQueue(keras.layers.Layer):
    """The last embeddings of a teacher, and the scale of their products.

    Args:
        length: how many.
        dim: width of an embedding.
        **kwargs: see `keras.layers.Layer`.
    """

    def __init__(self, length: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length, self.dim = length, dim

    def build(self, input_shape: Any) -> None:
        """Creates the queue, of random directions."""
        kept: dict[str, Any] = {"trainable": False, "aggregation": "only_first_replica"}
        self.embeddings = self.add_weight((self.length, self.dim), _random_directions, name="embeddings", **kept)
        self.known_log_scale = self.add_weight((), keras.initializers.Constant(_UNKNOWN), name="log_scale", **kept)

    def negatives(self) -> Any:
        """The embeddings, shape `(length, dim)`."""
        return ops.stop_gradient(ops.convert_to_tensor(self.embeddings))

    def log_scale(self, u: Any, u_n: Any) -> Any:
        """Log of the mean of e^u over the first batch of training; of this batch, before that."""
        known = ops.convert_to_tensor(self.known_log_scale)
        every = ops.reshape(ops.concatenate([ops.expand_dims(u, 1), u_n], axis=1), (-1,))
        here = ops.logsumexp(every) - ops.log(ops.cast(ops.size(every), every.dtype))
        known = ops.stop_gradient(ops.where(known > _UNKNOWN, known, here))
        if in_training():
            self.known_log_scale.assign(known)
        return known

    def push(self, embeddings: Any) -> None:
        """Puts embeddings in front; the oldest fall out at the end."""
        queue = ops.concatenate([ops.stop_gradient(embeddings), self.negatives()], axis=0)
        self.embeddings.assign(queue[: self.length])

    def call(self, inputs: Any) -> Any:
        """Returns the inputs: this layer only remembers."""
        return inputs

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "length": self.length, "dim": self.dim}


def _random_directions(shape: Any, dtype: Any = None) -> Any:
    # By an initialiser, which draws without a state: Keras builds layers where no variable of a random generator can be made.
    return l2_normalized(keras.initializers.RandomNormal(stddev=1.0)(shape, dtype))
