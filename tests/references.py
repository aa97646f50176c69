"""Independent truths in NumPy: each formula written once more, from its paper, with loops where loops are clearer.

Every function takes complex numbers too, so that `gradient` gets derivatives by the complex step: exact to rounding, with no
finite-difference error and nothing shared with automatic differentiation.
"""

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
