"""Independent truths in NumPy: each formula written once more, from its paper, with loops where loops are clearer.

Every function takes complex numbers too, so that `gradient` gets derivatives by the complex step: exact to rounding, with no
finite-difference error and nothing shared with automatic differentiation.
"""

import math

import numpy as np


def gradient(function, z, step=1e-30):
    """Gradient of a real-valued `function` at `z` by the complex step: Im f(z + ih) / h."""
    z = np.asarray(z, dtype=np.complex128)
    result = np.zeros(z.shape)
    for index in np.ndindex(z.shape):
        moved = z.copy()
        moved[index] += 1j * step
        result[index] = np.imag(function(moved)) / step
    return result


def log_softmax(z):
    z = z - np.max(np.real(z), axis=-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def standardize(z):
    deviation = z - np.mean(z, axis=-1, keepdims=True)
    std = np.sqrt(np.sum(deviation**2, axis=-1, keepdims=True) / (z.shape[-1] - 1))
    return deviation / (1e-7 + std)


def divergence(p, q, kind):
    """Per row, for probabilities without zeros."""
    if kind == "forward_kl":
        return np.sum(p * (np.log(p) - np.log(q)), axis=-1)
    if kind == "reverse_kl":
        return np.sum(q * (np.log(q) - np.log(p)), axis=-1)
    m = (p + q) / 2
    return 0.5 * divergence(p, m, "forward_kl") + 0.5 * divergence(q, m, "forward_kl")


def kd(z_t, z_s, temperature=4.0, targets="soft", mix=0.5, kind="forward_kl", standardized=False):
    if standardized:
        z_t, z_s = standardize(z_t), standardize(z_s)
    onehot = np.eye(z_t.shape[-1])[np.argmax(np.real(z_t), axis=-1)]
    if targets == "hard":
        return -np.sum(onehot * log_softmax(z_s), axis=-1)
    p_t, p_s = softmax(z_t / temperature), softmax(z_s / temperature)
    if targets == "mixed":
        p_t = mix * p_t + (1 - mix) * onehot
    return temperature**2 * divergence(p_t, p_s, kind)


def binary_kd(z_t, z_s, temperature=4.0, targets="soft", mix=0.5, kind="forward_kl"):
    def yes_no(z):
        p = 1 / (1 + np.exp(-z))
        return np.stack([p, 1 - p], axis=-1)

    hard = np.stack([z_t > 0, z_t <= 0], axis=-1).astype(float)
    if targets == "hard":
        return -np.sum(hard * np.log(yes_no(z_s)), axis=(-2, -1))
    p_t = yes_no(z_t / temperature)
    if targets == "mixed":
        p_t = mix * p_t + (1 - mix) * hard
    return temperature**2 * np.sum(divergence(p_t, yes_no(z_s / temperature), kind), axis=-1)


def dkd(z_t, z_s, labels, alpha=1.0, beta=8.0, temperature=4.0):
    values = []
    for t, s, y in zip(z_t, z_s, labels, strict=True):
        p_t, p_s = softmax(t / temperature), softmax(s / temperature)
        two_t, two_s = np.array([p_t[y], 1 - p_t[y]]), np.array([p_s[y], 1 - p_s[y]])
        tckd = divergence(two_t, two_s, "forward_kl")
        others = [i for i in range(len(t)) if i != y]
        nckd = divergence(softmax(t[others] / temperature), softmax(s[others] / temperature), "forward_kl")
        values.append(temperature**2 * (alpha * tckd + beta * nckd))
    return np.array(values)


def nkd(z_t, z_s, labels, gamma=1.5, temperature=1.0):
    values = []
    for t, s, y in zip(z_t, z_s, labels, strict=True):
        others = [i for i in range(len(t)) if i != y]
        target = softmax(t)[y] * log_softmax(s)[y]
        rest = np.sum(softmax(t[others] / temperature) * log_softmax(s[others] / temperature))
        values.append(-target - gamma * temperature**2 * rest)
    return np.array(values)


def pearson(a, b):
    a, b = a - np.mean(a), b - np.mean(b)
    return np.sum(a * b) / (np.sqrt(np.sum(a**2)) * np.sqrt(np.sum(b**2)))


def dist(z_t, z_s, beta=1.0, gamma=1.0, temperature=1.0):
    """The published value, a scalar."""
    p_t, p_s = softmax(z_t / temperature), softmax(z_s / temperature)
    inter = 1 - np.mean([pearson(a, b) for a, b in zip(p_s, p_t, strict=True)])
    intra = 1 - np.mean([pearson(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def multi_level(z_t, z_s, temperatures=(2, 3, 4, 5, 6)):
    """The published value, a scalar."""
    batch, classes = z_t.shape
    total = 0
    for temperature in temperatures:
        p_t, p_s = softmax(z_t / temperature), softmax(z_s / temperature)
        instance = np.mean(kd(z_t, z_s, temperature))
        batch_level = np.sum((p_t @ p_t.T - p_s @ p_s.T) ** 2) / batch
        class_level = np.sum((p_t.T @ p_t - p_s.T @ p_s) ** 2) / classes
        total = total + instance + batch_level + class_level
    return total / len(temperatures)


# Features: channels last, (batch, positions..., channels). A function named after a method gives one value per sample.


def absolute(z):
    return np.where(np.real(z) < 0, -z, z)


def mean_per_sample(values):
    return np.mean(values.reshape(len(values), -1), axis=-1)


def l2_normalize(v, axis=-1):
    return v / np.sqrt(np.sum(v * v, axis=axis, keepdims=True))


def adaptive_average_pool(f, sizes):
    """PyTorch's rule along each axis: cell i of n averages the positions from floor(i L / n) to ceil((i + 1) L / n)."""
    for axis, cells in enumerate(sizes, start=1):
        length = f.shape[axis]
        bounds = [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
        f = np.stack([np.mean(np.take(f, range(*bound), axis=axis), axis=axis) for bound in bounds], axis=axis)
    return f


def to_the_smaller(f_t, f_s):
    sizes = np.minimum(f_t.shape[1:-1], f_s.shape[1:-1])
    return adaptive_average_pool(f_t, sizes), adaptive_average_pool(f_s, sizes)


def hint(f_t, f_s):
    return mean_per_sample((f_s - f_t) ** 2)


def attention_transfer(f_t, f_s, power=2, form="mean"):
    def attention(f):
        return l2_normalize(np.mean(absolute(f) ** power, axis=-1).reshape(len(f), -1))

    f_t, f_s = to_the_smaller(f_t, f_s)
    difference = attention(f_s) - attention(f_t)
    if form == "mean":
        return np.mean(difference**2, axis=-1)
    return np.sqrt(np.sum(difference**2, axis=-1))


def nst(f_t, f_s):
    def kernel(a, b):
        return np.mean([[np.sum(a[:, i] * b[:, j]) ** 2 for j in range(b.shape[1])] for i in range(a.shape[1])])

    values = []
    for t, s in zip(*to_the_smaller(f_t, f_s), strict=True):
        t, s = (l2_normalize(f.reshape(-1, f.shape[-1]), axis=0) for f in (t, s))
        values.append(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t))
    return np.array(values)


def factor_transfer(f_t, f_s, p1=2, p2=1):
    def factor(f):
        return l2_normalize(np.mean(f**p1, axis=-1).reshape(len(f), -1))

    f_t, f_s = to_the_smaller(f_t, f_s)
    return np.mean(absolute(factor(f_s) - factor(f_t)) ** p2, axis=-1)


def vid(f_t, f_s, kernels, a, eps=1e-5):
    """`kernels`: the three matrices of the 1x1 convolutions, with ReLU between them."""
    f_t, mu = to_the_smaller(f_t, f_s)
    for index, kernel in enumerate(kernels):
        mu = np.where(np.real(mu) > 0, mu, 0) if index else mu
        mu = mu @ kernel
    variance = np.log(1 + np.exp(a)) + eps
    return 0.5 * mean_per_sample((mu - f_t) ** 2 / variance + np.log(variance))


def ab(f_t, f_s, margin=1.0):
    s = np.real(f_s)
    wrongly_on = (f_s + margin) ** 2 * ((s > -margin) & (f_t <= 0))
    wrongly_off = (f_s - margin) ** 2 * ((s <= margin) & (f_t > 0))
    return np.sum((wrongly_on + wrongly_off).reshape(len(f_s), -1), axis=-1) / 1000 * 3


def ab_of_several(teachers, students, margin=1.0):
    """The last layer counts whole, the one before it half, and so on."""
    last = len(students) - 1
    return sum(ab(t, s, margin) / 2 ** (last - i) for i, (t, s) in enumerate(zip(teachers, students, strict=True)))


def fsp(teachers, students):
    def matrix(a, b):
        a, b = to_the_smaller(a, b)
        a, b = (f.reshape(len(f), -1, f.shape[-1]) for f in (a, b))
        return np.stack([x.T @ y / len(x) for x, y in zip(a, b, strict=True)])

    total = 0
    for i in range(len(teachers) - 1):
        difference = matrix(students[i], students[i + 1]) - matrix(teachers[i], teachers[i + 1])
        total = total + mean_per_sample(difference**2)
    return total


def hierarchical_context(f_t, f_s, levels=(4, 2, 1)):
    value, weights = hint(f_t, f_s), [1.0]
    for level in levels:
        if level < f_s.shape[1]:
            weights.append(weights[-1] / 2)
            pooled = [adaptive_average_pool(f, (level, level)) for f in (f_t, f_s)]
            value = value + weights[-1] * hint(*pooled)
    return value / sum(weights)


def convolve(f, kernel, bias=0.0):
    """Stride 1, zeros around; `kernel` of shape (k, k, in, out) with k odd."""
    half, (_, height, width, _) = kernel.shape[0] // 2, f.shape
    padded = np.pad(f, ((0, 0), (half, half), (half, half), (0, 0)))
    return bias + sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(2 * half + 1) for j in range(2 * half + 1)
    )


def normalize_by_statistics(f, gamma, beta, mean, variance, epsilon):
    """Batch normalisation in inference."""
    return gamma * (f - mean) / np.sqrt(variance + epsilon) + beta


def nearest(f, sizes):
    for axis, cells in enumerate(sizes, start=1):
        f = np.take(f, [i * f.shape[axis] // cells for i in range(cells)], axis=axis)
    return f


def review(teachers, students, stages, levels=(4, 2, 1)):
    """The cascade from the deepest layer to the first, as ReviewKD's code runs it, then the hierarchical context of each stage.

    `stages`, in the order of the layers, are dicts of functions: "narrow" (1x1 and norm), "gate" (of both maps, concatenated;
    absent for the deepest layer) and "widen" (3x3 and norm).
    """
    total, carried = 0, None
    for f_t, f_s, stage in reversed(list(zip(teachers, students, stages, strict=True))):
        f = stage["narrow"](f_s)
        if carried is not None:
            carried = nearest(carried, f.shape[1:3])
            gate = 1 / (1 + np.exp(-stage["gate"](np.concatenate([f, carried], axis=-1))))
            f = f * gate[..., :1] + carried * gate[..., 1:]
        carried = nearest(f, f_t.shape[1:3])
        total = total + hierarchical_context(f_t, stage["widen"](carried), levels)
    return total


def crd(e_t, e_s, queue, temperature=0.07, constant=None):
    """For normalised embeddings. `constant` is the mean of the first batch's exponentials, through which no gradient flows."""
    positive = np.exp(np.sum(e_s * e_t, axis=-1) / temperature)
    negative = np.exp(e_s @ queue.T / temperature)
    if constant is None:
        constant = np.mean(np.real(np.concatenate([positive[:, None], negative], axis=-1)))
    noise = len(queue) * constant
    return -np.log(positive / (positive + noise)) - np.sum(np.log(noise / (negative + noise)), axis=-1)


# Relations: every function gives the published value, a scalar.


def flat(f):
    return f.reshape(len(f), -1)


def smooth_l1(difference):
    difference = absolute(difference)
    return np.where(np.real(difference) < 1, 0.5 * difference**2, difference - 0.5)


def rkd(f_t, f_s, distance_weight=25.0, angle_weight=50.0):
    return distance_weight * rkd_distance(f_t, f_s) + angle_weight * rkd_angle(f_t, f_s)


def rkd_distance(f_t, f_s):
    def distances(f):
        batch = len(f)
        d = np.zeros((batch, batch), f.dtype)
        for i in range(batch):
            for j in range(batch):
                if np.any(f[i] != f[j]):
                    d[i, j] = np.sqrt(np.sum((f[i] - f[j]) ** 2))
        return d / np.mean(d[np.real(d) > 0])

    return np.mean(smooth_l1(distances(flat(f_s)) - distances(flat(f_t))))


def rkd_angle(f_t, f_s):
    def cosines(f):
        batch = len(f)
        angles = np.zeros((batch, batch, batch), f.dtype)
        for i in range(batch):
            e = {j: l2_normalize(f[j] - f[i]) for j in range(batch) if np.any(f[j] != f[i])}
            for j in e:
                for k in e:
                    angles[i, j, k] = np.sum(e[j] * e[k])
        return angles

    return np.mean(smooth_l1(cosines(flat(f_s)) - cosines(flat(f_t))))


def sp(f_t, f_s):
    grams = [l2_normalize(f @ f.T) for f in (flat(f_t), flat(f_s))]
    return np.sum((grams[1] - grams[0]) ** 2) / len(f_s) ** 2


def pkt(f_t, f_s, eps=1e-7):
    def probabilities(f):
        f = l2_normalize(f)
        p = (f @ f.T + 1) / 2
        return p / np.sum(p, axis=-1, keepdims=True)

    p_t, p_s = probabilities(flat(f_t)), probabilities(flat(f_s))
    return np.mean(p_t * np.log((p_t + eps) / (p_s + eps)))


def correlation(f_t, f_s, kernel=None, gamma=0.4, order=2):
    f_t, f_s, batch = flat(f_t), flat(f_s), len(f_s)
    if kernel is None:
        d = absolute(f_s - f_t)
        return np.mean([np.sum(d[i] * d[i + 1]) for i in range(batch - 1)])

    def congruence(f):
        if kernel == "bilinear":
            return f @ f.T
        terms = [(2 * gamma) ** p / math.factorial(p) * (f @ f.T) ** p for p in range(order + 1)]
        return np.exp(-2 * gamma) * sum(terms)

    return np.sqrt(np.sum((congruence(f_s) - congruence(f_t)) ** 2)) / batch**2


def fake_quantize(x, low, high, bits, narrow=False):
    """Rounds x to `2 ** bits` values of a range whose zero is one of them (Jacob et al. 2018); one fewer where it is narrow."""
    x = np.asarray(x, "float64")
    if low == high == 0:
        return np.zeros_like(x)
    lowest = 1 if narrow else 0
    step = (high - low) / (2**bits - 1 - lowest)
    zero = np.clip(np.round(lowest - low / step), lowest, 2**bits - 1)
    integers = np.clip(np.floor(np.clip(x / step + zero, lowest, 2**bits - 1) + 0.5), lowest, 2**bits - 1)
    return (integers - zero) * step
