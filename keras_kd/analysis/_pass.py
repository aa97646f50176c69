"""What does one batch show of every place? Rows for moments, answers to noise, and gradients, in one compiled function."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kd import _calls, _taps
from keras_kd.analysis._places import Place, Reading, Window
from keras_kd.layers import LinearProbe

Loss = Callable[[Any, Any], Any]


class Pass:
    """A function of a batch that reads the places of a model.

    The clean pass runs once, with all places on its way. From the same pass come the Jacobian-vector products (by differentiating
    the backward pass with respect to what it was fed, which is exact and works in loops, too) and the gradients of the loss. Each
    level of noise takes one more pass. Where TensorFlow has no such second derivative, the products are central differences, of two
    more passes.

    Args:
        model: a built model.
        places: layers and blocks.
        noise: levels; the products are for the direction of the noise, so one serves all levels.
        loss: of `(y, outputs)`, one number for each sample; None: the outputs' product with random signs.
        max_positions: positions of each sample and place of which rows are taken.
        seed: of noise, signs and positions.

    Attributes:
        differences: why the products are central differences; "" where they are exact.
        without: names of places that have no gradient, and why.
    """

    def __init__(
        self,
        model: keras.Model,
        places: Sequence[Place],
        *,
        noise: Sequence[float],
        loss: Loss | None,
        max_positions: int,
        seed: int,
    ) -> None:
        self.model, self.places, self.noise, self.loss = model, list(places), list(noise), loss
        self.max_positions, self.seed = max_positions, seed
        self.leaves = _calls.find_leaves(model)
        self.pool = LinearProbe(1)
        self.differences = ""
        self.without: dict[str, str] = {}

    def compiled(self, x: Any, y: Any) -> Callable[..., dict[str, Any]]:
        """The function `(x, y, number of the batch)`, traced once for batches of any length.

        Args:
            x: `tf.TensorSpec`s of inputs.
            y: of labels, or None.
        """
        signature = (x, tf.TensorSpec((), "int32")) if y is None else (x, y, tf.TensorSpec((), "int32"))
        run = (lambda x, step: self._run(x, None, step)) if y is None else self._run
        made = tf.function(run, input_signature=signature, autograph=False)  # Keras' own steps do without it, too
        return (lambda x, _, step: made(x, step)) if y is None else made

    def _run(self, x: Any, y: Any, step: Any) -> dict[str, Any]:
        chance = _Chance(self.seed, step)
        clean = self._forward(x, None)
        deltas = {key: chance.normal(value) * self.noise[0] * _rms(value) for key, value in clean.entries.items()}
        found: dict[str, Any] = {name: {} for name in (place.name for place in self.places)}
        outputs = {place.name: clean.outputs[place.name.split(" .. ")[-1]] for place in self.places}
        names = [name for name in outputs if " .. " not in name]
        for place in self.places:
            found[place.name] |= self._rows(place, clean, outputs[place.name], chance)
        tensors = {name: outputs[name] for name in names}
        self._add_responses(found, tensors, clean, deltas, x)
        loss = _signed(clean.final, chance) if self.loss is None else tf.reduce_sum(self.loss(y, clean.final))
        for name, gradient in zip(names, self._gradients(loss, tensors), strict=True):
            found[name] |= _sensitivities(_wide(tensors[name]), gradient)
        for name in names:
            found[name] |= _extremes(tensors[name], chance)
            found[name]["pooled"] = self.pool.pooled(_wide(tensors[name]), clean.masks[name])
        return found | {"": {"output": clean.final}}

    def _forward(self, x: Any, deltas: Mapping[str, Any] | None) -> "_Clean":
        """One pass; noise, or zeros that derivatives are taken by, is added to the first floats that there are.

        These are inputs of floats, what layers give that read whole numbers (embeddings), and what they read that was computed from
        whole numbers (images in bytes, rescaled).
        """
        clean = _Clean()
        flat = []
        for index, tensor in enumerate(keras.tree.flatten(x)):
            flat.append(clean.enter(f"input {index}", tensor, deltas) if tensor.dtype.is_floating else clean.whole(tensor))
        entered = keras.tree.pack_sequence_as(x, flat)
        counts: dict[str, int] = {}
        graph = tf.compat.v1.get_default_graph()

        def watched(path: str, layer: Any) -> Callable[..., Any]:
            def function(call: Any, *args: Any, **kwargs: Any) -> Any:
                if tf.compat.v1.get_default_graph() is not graph:
                    return call(*args, **kwargs)
                index, counts[path] = counts.get(path, 0), counts.get(path, 0) + 1
                if clean.wholes:
                    args, kwargs = clean.with_noise(f"{path} {index}", (args, kwargs), deltas)
                result = call(*args, **kwargs)
                read = _tensors(args or (kwargs.get("inputs"),))
                given = _tensors(result)
                one = given[0] if len(given) == 1 else None
                if one is not None and one.dtype.is_floating and read and not any(t.dtype.is_floating for t in read):
                    one = clean.enter(f"{path} {index}", one, deltas)
                    result = keras.tree.map_structure(lambda t: one if t is given[0] else t, result)
                for name in {path, f"{path}:{index}"}:
                    clean.inputs[name], clean.outputs[name] = read, one
                    clean.masks[name] = _calls._mask_of(layer, args)
                return result

            return function

        with contextlib.ExitStack() as stack:
            for path, layer in self.leaves.items():
                stack.enter_context(_taps.replace(layer, watched(path, layer)))
            clean.final = self.model(entered, training=False)
        return clean

    def _rows(self, place: Place, clean: "_Clean", output: Any, chance: "_Chance") -> dict[str, Any]:
        """Features that the place reads, and what it gives, at positions taken at random, and the weights of these rows."""
        output = _wide(output)
        positions, inner = _positions(output, self.max_positions, chance)
        rows = tf.gather(_flat(output), positions, batch_dims=1)  # (batch, positions, channels)
        read = [_window_rows(_wide(clean.inputs[r.call][r.index]), r, positions, inner) for r in place.readings]
        mask = clean.masks.get(place.name)
        widest = max((one.dtype for one in (*read, rows)), key=lambda dtype: dtype.size)
        joint = tf.concat([tf.cast(one, widest) for one in (*read, rows)], -1)
        found = {"rows": tf.reshape(joint, (-1, sum(r.columns for r in place.readings) + place.channels))}
        if mask is not None and len(inner) == 1:
            found["weights"] = tf.reshape(tf.gather(tf.cast(mask, "float32"), positions, batch_dims=1), (-1,))
        return found

    def _add_responses(
        self, found: dict[str, Any], tensors: dict[str, Any], clean: "_Clean", deltas: dict[str, Any], x: Any
    ) -> None:
        if not deltas:
            return
        products = self._products(tensors, clean, deltas, x)
        around = _norms(list(clean.entries.values()))
        given = _norms(list(deltas.values()))
        for name, tensor, product in zip(tensors, tensors.values(), products, strict=True):
            product = tf.zeros_like(tensor) if product is None else product
            found[name]["norm"] = tf.sqrt(_squares(_wide(tensor)))
            # Relative to the relative size of the noise: both are of the whole sample.
            found[name]["gain"] = _ratio(tf.sqrt(_squares(_wide(product))) * around, found[name]["norm"] * given)
            found[name] |= {"gains": [], "left": [], "changed": []}
        for level in self.noise:
            scale = level / self.noise[0]
            noisy = self._forward(x, {key: delta * scale for key, delta in deltas.items()})
            for name, tensor, product in zip(tensors, tensors.values(), products, strict=True):
                change = _wide(noisy.outputs[name]) - _wide(tensor)
                linear = tf.zeros_like(change) if product is None else _wide(product) * scale
                squares = _squares(change)
                found[name]["gains"].append(_ratio(tf.sqrt(squares) * around, found[name]["norm"] * given * scale))
                found[name]["changed"].append(tf.reduce_sum(squares))
                found[name]["left"].append(tf.reduce_sum(_squares(change - linear)))

    def _gradients(self, loss: Any, tensors: dict[str, Any]) -> list[Any]:
        """Of the loss with respect to each tensor; None where there is none."""
        try:
            return list(tf.gradients(loss, list(tensors.values())))
        except LookupError:
            found = []
            for name, tensor in tensors.items():
                try:
                    found += tf.gradients(loss, [tensor])
                except LookupError as error:
                    self.without[name] = _first_line(error)
                    found.append(None)
            return found

    def _products(self, tensors: dict[str, Any], clean: "_Clean", deltas: dict[str, Any], x: Any) -> list[Any]:
        """J d for each tensor; None where no noise reaches it."""
        if not self.differences:
            feeds = [tf.zeros_like(tensor) for tensor in tensors.values()]
            try:
                back = tf.gradients(list(tensors.values()), list(clean.zeros.values()), grad_ys=feeds)
                pairs = [(gradient, deltas[key]) for key, gradient in zip(clean.zeros, back, strict=True) if gradient is not None]
                return list(tf.gradients([one for one, _ in pairs], feeds, grad_ys=[delta for _, delta in pairs]))
            except LookupError as error:  # no gradient of an operation, or of its gradient
                self.differences = _first_line(error)
        half = any(tensor.dtype.size < 4 for tensor in tensors.values())
        step = (0.03 if half else 1e-3) / self.noise[0]
        ahead, behind = (self._forward(x, {key: delta * sign for key, delta in deltas.items()}) for sign in (step, -step))
        return [(_wide(ahead.outputs[name]) - _wide(behind.outputs[name])) / (2 * step) for name in tensors]


class _Clean:
    """What a pass gave."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[str, Any] = {}
        self.masks: dict[str, Any] = {}
        self.entries: dict[str, Any] = {}
        self.zeros: dict[str, Any] = {}
        self.final: Any = None
        self.wholes: list[Any] = []  # inputs of whole numbers
        self.kinds: dict[str, tuple[bool, bool]] = {}  # of an operation: is there noise in it, are there whole inputs
        self.noisy: dict[int, tuple[Any, Any]] = {}  # by a tensor's id: it, and it with noise

    def enter(self, key: str, tensor: Any, deltas: Mapping[str, Any] | None) -> Any:
        """Adds noise, or zeros."""
        self.entries[key] = tensor
        self.zeros[key] = tf.zeros_like(tensor) if deltas is None else deltas[key]
        entered = tensor + self.zeros[key]
        if getattr(tensor, "_keras_mask", None) is not None:
            entered._keras_mask = tensor._keras_mask
        self.kinds[entered.op.name] = (True, False)
        return entered

    def whole(self, tensor: Any) -> Any:
        """Marks an input of whole numbers."""
        if tensor.dtype.is_integer or tensor.dtype.is_bool:
            self.wholes.append(tensor)
            self.kinds[tensor.op.name] = (False, True)
        return tensor

    def with_noise(self, key: str, arguments: Any, deltas: Mapping[str, Any] | None) -> Any:
        """What a layer reads, with noise in the floats that were computed from whole numbers, if nothing that it reads has some."""
        floats = [t for t in _tensors(arguments) if t.dtype.is_floating and t.shape.rank]
        fresh = [t for t in floats if self._kind(t) == (False, True)]
        if any(self._kind(t)[0] for t in floats if id(t) not in self.noisy):
            return arguments
        for tensor in fresh:
            if id(tensor) not in self.noisy:
                self.noisy[id(tensor)] = tensor, self.enter(f"{key} reads {len(self.noisy)}", tensor, deltas)
        return keras.tree.map_structure(lambda one: self.noisy.get(id(one), (None, one))[1], arguments)

    def _kind(self, tensor: Any) -> tuple[bool, bool]:
        pending, seen = [tensor.op], set()
        while pending:
            operation = pending[-1]
            sources = [] if operation.name in self.kinds else [one.op for one in operation.inputs]
            unknown = [one for one in sources if one.name not in self.kinds and one.name not in seen]
            seen |= {one.name for one in unknown}
            pending.extend(unknown)
            if not unknown:
                pending.pop()
                kinds = [self.kinds.get(one.name, (False, False)) for one in sources]
                self.kinds.setdefault(operation.name, (any(noise for noise, _ in kinds), any(whole for _, whole in kinds)))
        return self.kinds[tensor.op.name]


class _Chance:
    """Random numbers that depend on the seed, the number of the batch, and how many were drawn before in it."""

    def __init__(self, seed: int, step: Any) -> None:
        self.seed, self.step, self.drawn = seed, step, 0

    def _key(self) -> Any:
        self.drawn += 1
        return tf.stack([tf.constant((self.seed * 7919 + self.drawn) % (2**31 - 1), "int32"), self.step])

    def normal(self, like: Any) -> Any:
        return tf.cast(tf.random.stateless_normal(tf.shape(like), self._key()), like.dtype)

    def uniform(self, shape: Any) -> Any:
        return tf.random.stateless_uniform(shape, self._key())

    def signs(self, like: Any) -> Any:
        return tf.cast(tf.where(self.uniform(tf.shape(like)) < 0.5, -1.0, 1.0), like.dtype)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:160]


def _tensors(nested: Any) -> list[Any]:
    return [tensor for tensor in keras.tree.flatten(nested) if tf.is_tensor(tensor)]


def _wide(tensor: Any) -> Any:
    """In float32 at least."""
    return tensor if tensor.dtype.size >= 4 else tf.cast(tensor, "float32")


def _inner(tensor: Any) -> list[int]:
    return list(range(1, len(tensor.shape)))


def _squares(tensor: Any) -> Any:
    return tf.cast(tf.reduce_sum(tf.square(tensor), axis=_inner(tensor)), "float64")


def _norms(tensors: list[Any]) -> Any:
    return tf.sqrt(tf.add_n([_squares(_wide(tensor)) for tensor in tensors]))


def _rms(tensor: Any) -> Any:
    return tf.sqrt(tf.reduce_mean(tf.square(tensor), axis=_inner(tensor), keepdims=True))


def _ratio(a: Any, b: Any) -> Any:
    return tf.math.divide_no_nan(a, b)


def _flat(tensor: Any) -> Any:
    """`(batch, positions, channels)`."""
    return tf.reshape(tensor, (tf.shape(tensor)[0], tf.reduce_prod(tf.shape(tensor)[1:-1]), tensor.shape[-1]))


def _positions(output: Any, limit: int, chance: _Chance) -> tuple[Any, list[Any]]:
    """Numbers of the positions to take, `(batch, at most limit)`, without repetition, and the sizes of the inner axes."""
    shape = tf.shape(output)
    inner = [shape[axis] for axis in range(1, len(output.shape) - 1)]
    number = tf.reduce_prod(tf.stack(inner)) if inner else tf.constant(1)
    known = output.shape[1:-1].num_elements()
    if known is not None and known <= limit:
        return tf.tile(tf.range(number)[None], (shape[0], 1)), inner
    return tf.math.top_k(chance.uniform((shape[0], number)), tf.minimum(limit, number)).indices, inner


def _window_rows(tensor: Any, reading: Reading, positions: Any, inner: list[Any]) -> Any:
    """What a reading takes of a tensor at positions of the output, `(batch, positions, columns)`."""
    if reading.window is None:
        flat = tf.reshape(tensor, (tf.shape(tensor)[0], 1, reading.columns))
        return tf.tile(flat, (1, tf.shape(positions)[1], 1))
    window: Window = reading.window
    width = tensor.shape[-1]
    if not inner:
        return tensor[:, None]
    sizes = [tf.shape(tensor)[axis + 1] for axis in range(len(inner))]
    rest, coordinates = positions, list[Any]()
    for size in reversed(inner):
        coordinates.insert(0, rest % size)
        rest = rest // size
    index, inside = tf.zeros_like(positions)[..., None], tf.ones_like(positions, tf.bool)[..., None]
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in window.size], indexing="ij"), -1).reshape(-1, len(inner))
    for axis, size in enumerate(sizes):
        at = coordinates[axis][..., None] * window.jump[axis] + window.start[axis] + grid[:, axis]  # (batch, positions, window)
        inside = inside & (at >= 0) & (at < size)
        index = index * size + tf.clip_by_value(at, 0, size - 1)
    taken = tf.gather(_flat(tensor), index, batch_dims=1)
    taken = tf.where(inside[..., None], taken, tf.zeros_like(taken))
    return tf.reshape(taken, (tf.shape(taken)[0], tf.shape(taken)[1], math.prod(window.size) * width))


def _sensitivities(tensor: Any, gradient: Any) -> dict[str, Any]:
    """First-order effect of setting each channel to 0 for each sample, and the squares of the gradient."""
    if gradient is None:
        return {}
    gradient = tf.cast(gradient, tensor.dtype)
    axes = list(range(1, len(tensor.shape) - 1))
    removed = tf.reduce_sum(tensor * gradient, axis=axes)
    return {"removed": removed, "gradients": tf.reduce_sum(tf.reduce_sum(tf.square(gradient), axis=axes), axis=0)}


def _signed(outputs: Any, chance: _Chance) -> Any:
    return tf.add_n([tf.reduce_sum(tf.cast(one * chance.signs(one), "float32")) for one in keras.tree.flatten(outputs)])


def _extremes(tensor: Any, chance: _Chance) -> dict[str, Any]:
    """Lowest and highest value of each channel, and a sum of its bits that equal channels share, over all positions."""
    axes = list(range(len(tensor.shape) - 1))
    tensor = _wide(tensor)
    whole = tf.int64 if tensor.dtype == tf.float64 else tf.int32
    bits = tf.bitcast(tensor + tf.zeros((), tensor.dtype), whole)  # -0.0 becomes 0.0
    shape = tf.concat([tf.shape(tensor)[:-1], [1]], 0)
    factors = tf.random.stateless_uniform(shape, chance._key(), None, None, whole)
    # Sums of whole numbers that wrap around do not depend on their order.
    return {"low": tf.reduce_min(tensor, axes), "high": tf.reduce_max(tensor, axes), "bits": tf.reduce_sum(bits * factors, axes)}
