"""Distiller(original, pruned): a pruned model learns back what it lost."""

import keras
import numpy as np

import keras_kd
from keras_kd import demo, losses, surgery

L = keras.layers


def test_distilling_from_the_original_recovers_the_accuracy_of_a_pruned_model():
    data = demo.load("digits")
    images, labels = data.teacher
    keras.utils.set_random_seed(0)
    layers = [L.Conv2D(16, 3, padding="same", activation="relu", name="a"), L.MaxPooling2D()]
    layers += [L.Conv2D(24, 3, padding="same", activation="relu", name="b"), L.Flatten(), L.Dense(10, name="head")]
    original = keras.Sequential([keras.Input(images.shape[1:]), *layers])
    supervised = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    original.compile(keras.optimizers.Adam(0.01), supervised)
    original.fit(images, labels, batch_size=64, epochs=5, verbose=0)
    rng = np.random.default_rng(0)
    gone = {"a": rng.choice(16, 10, replace=False), "b": rng.choice(24, 16, replace=False)}
    pruned = surgery.remove_channels(original, gone)

    def accuracy(model):
        return float(np.mean(np.argmax(model.predict(data.test[0], verbose=0), axis=-1) == data.test[1]))

    before = accuracy(pruned)
    hint = losses.HintLoss(teacher_layer_name="b", student_layer_name="b")
    distiller = keras_kd.Distiller(original, pruned, [losses.KDLoss(), hint], student_loss_weight=0.0)
    distiller.compile(keras.optimizers.Adam(0.01), loss=supervised)
    distiller.fit(images, labels, batch_size=64, epochs=4, verbose=0)
    after, best = accuracy(pruned), accuracy(original)
    assert hint.layers == []
    assert before < best - 0.2
    assert after > max(before + 0.15, best - 0.08)
