"""Random networks of everything that surgery knows, and what they give with some channels counted as 0."""

import contextlib

import keras
import numpy as np

from keras_kd.surgery import _analysis, _nodes
from keras_kd.surgery import channels as surgery_channels
from keras_kd.surgery._rebuild import Rebuilt

L = keras.layers


def randomize(model, seed=0):
    """Gives every weight, bias and statistic a random value."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if not variable.dtype.startswith("float"):
            continue
        shape = tuple(variable.shape)
        if "variance" in variable.name:
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.normal(0.3, 0.5, shape)
        variable.assign(value)
    return model


def inputs_for(model, samples=5, seed=1):
    """Random inputs, as the model takes them."""
    rng = np.random.default_rng(seed)

    def one(tensor):
        shape = (samples, *[n or 6 for n in tensor.shape[1:]])
        if tensor.dtype.startswith("int"):
            return rng.integers(0, 7, shape).astype(tensor.dtype)
        return rng.normal(size=shape).astype("float32")

    given = [one(tensor) for tensor in model.inputs]
    return given if len(given) > 1 else given[0]


class Builder:
    """Adds random layers to an image."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def pick(self, values):
        return values[self.rng.integers(len(values))]

    def image(self, x, steps):
        """Images of one size; their widths change."""
        for _ in range(steps):
            name = self.pick(IMAGE)
            x = getattr(self, name)(x)
        return x

    def conv(self, x):
        kernel, width = int(self.pick([1, 3])), int(self.pick([4, 6, 8]))
        activation, bias = self.pick([None, "relu", "silu"]), bool(self.pick([True, False]))
        return L.Conv2D(width, kernel, padding="same", activation=activation, use_bias=bias)(x)

    def dilated(self, x):
        return L.Conv2D(6, 3, dilation_rate=2, padding="same")(x)

    def grouped(self, x):
        x = L.Conv2D(int(self.pick([4, 8, 12])), 1)(x)
        return L.Conv2D(int(self.pick([4, 8])), 3, groups=int(self.pick([2, 4])), padding="same", activation="relu")(x)

    def depthwise(self, x):
        return L.DepthwiseConv2D(3, depth_multiplier=int(self.pick([1, 2])), padding="same", activation="relu")(x)

    def separable(self, x):
        return L.SeparableConv2D(6, 3, depth_multiplier=int(self.pick([1, 2])), padding="same")(x)

    def transposed(self, x):
        return L.Conv2DTranspose(5, 3, padding="same")(x)

    def batch_norm(self, x):
        return L.BatchNormalization(scale=bool(self.pick([True, False])))(x)

    def group_norm(self, x):
        x = L.Conv2D(8, 1)(x)
        return L.GroupNormalization(int(self.pick([2, 4, -1])))(x)

    def layer_norm(self, x):
        return L.LayerNormalization()(x)

    def prelu(self, x):
        return L.PReLU(shared_axes=self.pick([None, [1, 2]]))(x)

    def activation(self, x):
        return self.pick([L.ReLU(), L.Activation("gelu"), L.LeakyReLU(), L.ELU(), L.Dropout(0.3), keras.ops.tanh])(x)

    def pool(self, x):
        return self.pick([L.MaxPooling2D, L.AveragePooling2D])(2, 1, padding="same")(x)

    def resize(self, x):
        return self.pick([lambda x: L.MaxPooling2D(2)(L.UpSampling2D(2)(x)), lambda x: L.Cropping2D(1)(L.ZeroPadding2D(1)(x))])(x)

    def residual(self, x):
        y = L.Conv2D(x.shape[-1], 3, padding="same", activation="relu")(x)
        merge = self.pick([L.Add(), L.Subtract(), L.Average(), L.Maximum(), L.Minimum(), L.Multiply(), None])
        return x + y * 0.5 - 1.0 if merge is None else merge([x, y])

    def concat(self, x):
        y = self.pick([lambda x: L.Conv2D(4, 1)(x), lambda x: x])(x)
        return L.Concatenate()([x, y]) if self.pick([True, False]) else keras.ops.concatenate([y, x], axis=-1)

    def squeeze_excite(self, x):
        y = L.GlobalAveragePooling2D(keepdims=True)(x) if self.pick([True, False]) else L.GlobalMaxPooling2D()(x)
        y = L.Reshape((1, 1, x.shape[-1]))(y) if len(y.shape) == 2 and self.pick([True, False]) else y
        y = L.Dense(x.shape[-1], activation="sigmoid")(L.Dense(3, activation="relu")(y))
        return L.Multiply()([x, y])

    def nested(self, x):
        inner = keras.Sequential([keras.Input(x.shape[1:]), L.Conv2D(6, 3, padding="same"), L.BatchNormalization(), L.ReLU()])
        return inner(x, training=False) if self.pick([True, False]) else inner(x)

    def nested_twice(self, x):
        a = keras.Input(x.shape[1:])
        inner = keras.Model(a, L.PReLU()(L.Conv2D(5, 1)(a)) + 0.1)
        return L.Add()([inner(x), inner(L.ReLU()(x))])

    def shared(self, x):
        layer, norm = L.Conv2D(5, 3, padding="same"), L.BatchNormalization()
        return L.Concatenate()([norm(layer(x)), norm(layer(L.Activation("tanh")(x)))])

    def einsum(self, x):
        equation = self.pick(["bhwc,cd->bhwd", "...c,cd->...d"])
        shape = 6 if "." in equation else (*x.shape[1:3], 6)
        return L.EinsumDense(equation, shape, bias_axes="d", activation="relu")(x)

    def permuted(self, x):
        y = L.Dense(x.shape[1], activation="relu")(L.Dense(7)(L.Permute((3, 2, 1))(x)))
        return L.Permute((3, 2, 1))(y)

    # What follows the image.

    def flatten(self, x):
        return L.Flatten()(x)

    def average(self, x):
        return L.GlobalAveragePooling2D()(x)

    def mean(self, x):
        return keras.ops.mean(x, axis=(1, 2))

    def reshaped(self, x):
        return L.Reshape((-1,))(x)

    def generated(self, x):
        y = L.Dense(4 * 4 * 3, activation="relu")(L.GlobalAveragePooling2D()(x))
        return L.Flatten()(L.Conv2D(4, 3)(L.Reshape((4, 4, 3))(y)))

    def recurrent(self, x):
        y = L.Reshape((x.shape[1] * x.shape[2], x.shape[3]))(x)
        if self.pick([True, False]):
            y = L.Conv1D(5, 3, padding="causal")(y)
        layer = self.pick([L.LSTM, L.GRU, L.SimpleRNN])
        y = layer(6, return_sequences=True)(y[:, :6])
        return self.pick([L.LSTM, L.GRU])(5)(y)

    def attention(self, x):
        y = keras.ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))
        y = L.Dense(6)(y)
        kind = self.pick(["heads", "plain", "additive", "matmul"])
        if kind == "heads":
            layer = self.pick(
                [L.MultiHeadAttention(3, 3), L.MultiHeadAttention(3, 2, 4, use_bias=False), L.GroupQueryAttention(2, 4, 2)]
            )
            others = L.Dense(6 if isinstance(layer, L.GroupQueryAttention) else 5)(y)
            y = layer(y, others, use_causal_mask=bool(self.pick([True, False])))
        elif kind == "matmul":
            weights = keras.ops.softmax(keras.ops.matmul(L.Dense(5)(y), keras.ops.transpose(L.Dense(5)(y), (0, 2, 1))))
            y = keras.ops.matmul(weights, y)
        else:
            y = (L.Attention(use_scale=True) if kind == "plain" else L.AdditiveAttention())([y, L.Dense(6)(y)])
        return L.GlobalAveragePooling1D()(y)


IMAGE = [name for name in vars(Builder) if name not in ("image", "pick") and not name.startswith("_")]
HEADS = IMAGE[IMAGE.index("flatten") :]
IMAGE = IMAGE[: IMAGE.index("flatten")]


def random_network(seed, steps=5):
    """A network of two inputs and one or two outputs, with random weights."""
    build = Builder(seed)
    image, words = keras.Input((6, 6, 3), name="image"), keras.Input((4,), dtype="int32", name="words")
    x = build.image(L.Conv2D(6, 3, padding="same")(image), steps)
    x = getattr(build, build.pick(HEADS))(x)
    y = build.pick([L.GlobalMaxPooling1D(), L.Flatten(), L.LSTM(4)])(L.Embedding(7, 5)(words))
    x = L.Concatenate()([x, y])
    x = L.Dense(8, activation="relu")(x)
    outputs = [L.Dense(3)(x)]
    if build.pick([True, False]):
        outputs.append(L.Dense(2, activation="softmax")(L.BatchNormalization()(x)))
    return randomize(keras.Model([image, words], outputs), seed)


def random_transformer(seed):
    """Two or three blocks of attention, to the same tokens and to others, and feed-forward layers, with random weights."""
    build = Builder(seed)
    pick, width = build.pick, int(build.pick([6, 8]))

    def attention(x, others):
        heads, options = int(pick([2, 3, 4])), {"use_bias": bool(pick([True, False])), "dropout": float(pick([0.0, 0.1]))}
        if others.shape[-1] != width or pick([True, False]):
            layer = L.MultiHeadAttention(heads, int(pick([2, 3])), pick([None, 4]), **options)
        else:
            layer = L.GroupQueryAttention(2, heads * int(pick([1, 2])), heads, **options)
        mask = pick([None, np.tril(np.ones((1, 7, others.shape[1]), bool))])
        return layer(x, others, pick([None, others * 0.5]), attention_mask=mask, use_causal_mask=bool(pick([True, False])))

    def block(x, others):
        norm = pick([L.LayerNormalization, L.RMSNormalization, lambda: L.Activation("tanh")])
        x = L.Add()([x, attention(norm()(x), others)])
        y = L.Dense(10, activation=pick(["gelu", "relu"]))(norm()(x))
        return L.Add()([x, L.Dense(width)(y)])

    first, second = keras.Input((7, 5), name="first"), keras.Input((4, 3), name="second")
    x, others = L.Dense(width)(first), L.Dense(int(pick([5, width])), activation="relu")(second)
    x = block(x, x)
    if pick([True, False]):
        inside, beside = keras.Input(x.shape[1:]), keras.Input(others.shape[1:])
        x = keras.Model([inside, beside], block(inside, beside))([x, others])
    x = block(x, others)
    return randomize(keras.Model([first, second], L.Dense(3)(L.GlobalAveragePooling1D()(x))), seed)


def masked(rebuilt: Rebuilt, x):
    """What the old model gives if every channel that is gone counts as 0 wherever it is read."""
    found = rebuilt.found
    inside = []  # what is read inside of a layer: a unit reads the others, too, and an output projection reads heads
    for record in found.records.values():
        output = getattr(record.operation, "_output_dense", None)
        for variable in getattr(record.operation, "variables", ()):
            axes = found.records[id(record.operation)].weights.get(id(variable))
            if axes is not None and (variable.name == "recurrent_kernel" or variable is getattr(output, "kernel", None)):
                inside.append((variable, np.asarray(variable)))
                keep = rebuilt.keep[axes[0]]
                variable.assign(np.asarray(variable) * keep.reshape([-1] + [1] * (len(axes) - 1)))
    given = _run(rebuilt, found.model, keras.tree.flatten(x))
    for variable, value in inside:
        variable.assign(value)
    return given


def _run(rebuilt, model, inputs):
    graph = _nodes.graph_of(model)
    values = {id(t): keras.ops.convert_to_tensor(v, t.dtype) for t, v in zip(graph.inputs, inputs, strict=True)}
    for node in _nodes.nodes_of(model):
        args, kwargs = node.arguments.fill_in(values)
        if _nodes.is_open(node.operation):
            given = _run(rebuilt, node.operation, keras.tree.flatten(args[0]))
        else:
            given = keras.tree.flatten(node.operation(*args, **kwargs))
        for tensor, value in zip(node.outputs, given, strict=True):
            for axis, atoms in enumerate(rebuilt.found.labels[id(tensor)]):
                if atoms is not None:
                    shape = [-1 if i == axis else 1 for i in range(len(value.shape))]
                    value = value * keras.ops.cast(rebuilt.keep[atoms].reshape(shape), value.dtype)
            values[id(tensor)] = value
    return [values[id(t)] for t in graph.outputs]


def random_channels(model, seed, share=0.3):
    """For each layer that makes channels, some of those that can go."""
    rng = np.random.default_rng(seed)
    found = _analysis.analyse(model)
    chosen = {}
    for record in found.records.values():
        for what, atoms in record.made.items():
            roots = found.roots[atoms]
            free = np.asarray([root for root in np.unique(roots) if root not in found.pinned])
            place = f"{record.path}:heads" if what == "heads" else record.path
            if len(free) > 1 and place in found.places():
                gone = rng.choice(free, max(1, int(share * len(free))), replace=False)
                channels = found.places()[place][1]
                name = f"{place}:output" if "heads" in record.made and what != "heads" else place
                wanted = chosen | {name: np.flatnonzero(np.isin(found.roots[channels], gone))}
                with contextlib.suppress(ValueError):  # together they would leave a layer without channels
                    surgery_channels.chosen(found, wanted)
                    chosen = wanted
    return chosen


def enliven(model, x, seed=0):
    """Random scales and offsets, and statistics that are those of the data: what a deep network gives then depends on its input."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.name == "gamma":
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "bias"):
            variable.assign(rng.normal(0, 0.3, variable.shape))
    for layer in model._flatten_layers():
        if type(layer).__name__ == "LayerScale":  # ConvNeXt's begin at a millionth
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(x, training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model
