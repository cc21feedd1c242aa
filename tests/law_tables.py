"""Loss tables from known laws, for tests of fits and searches."""

import numpy as np
import pandas as pd

from gqa_jax import shapes

# Curves of the paper's Figure 2, traced: L = 1.95 + A (N / 1e9)^-b.
TRACED = {
    (8, 8): (0.7257, 0.1803),
    (8, 4): (0.7319, 0.1770),
    (8, 2): (0.7428, 0.1762),
    (8, 1): (0.7517, 0.1748),
    (4, 1): (0.7677, 0.1721),
    (2, 1): (0.8052, 0.1656),
    (1, 1): (0.8346, 0.1641),
}
SIZES = [(size.n_layers, size.d_model) for size in shapes.SIZES.values()]
ENTROPY = 1.95


def truth(heads=None, seed=None, rough=0.005):
    """(entropy, {heads: (A at 1e9, b)}): laws that vary smoothly with the heads, and a little beside; seed None: as traced."""
    heads = list(heads or TRACED)
    base = {h: TRACED.get(h, _between(h)) for h in heads}
    if seed is None:
        return ENTROPY, base
    generator = np.random.default_rng(seed)
    tilt = generator.normal(size=4) * [0.01, 0.006, 0.0015, 0.001]
    steeper = generator.uniform(0.85, 1.15)
    result = {}
    for h, (amplitude, b) in base.items():
        u, v = np.log2(h)
        own = generator.normal(size=2) * [rough, 0.3 * rough]
        result[h] = (amplitude * np.exp(tilt[0] * u + tilt[1] * v + own[0]), steeper * b + tilt[2] * u + tilt[3] * v + own[1])
    return float(generator.uniform(1.6, 2.1)), result


def params(heads, sizes=SIZES):
    """N without embeddings and norms, three FFN matrices of 8 d / 3: the paper's figures."""
    return np.array([layers * (8 * d * d + 128 * d * sum(heads)) for layers, d in sizes], float)


def loss(entropy, law, n):
    return entropy + law[0] * (n / 1e9) ** -law[1]


def table(entropy, laws_of, sizes=SIZES, noise=0.0, generator=None, context=8192):
    """Rows of a loss table, equal tokens for all heads of a size; noise: relative, of each loss."""
    generator = generator or np.random.default_rng(0)
    rows = []
    for heads, law in laws_of.items():
        for (layers, d), n in zip(sizes, params(heads, sizes), strict=True):
            value = loss(entropy, law, n) * (1 + noise * generator.normal())
            rows.append(
                {"n_heads": heads[0], "n_kv_heads": heads[1], "n_layers": layers, "d_model": d, "head_dim": 64,
                 "params_non_embedding": n, "tokens": 240 * layers * d * d, "loss": value, "status": "done", "context": context}
            )  # fmt: skip
    return pd.DataFrame(rows)


def synthetic(noise=0.0, seed=0, heads=None, sizes=SIZES[1:7], random_truth=False):
    """A table from the traced laws (or random ones), with seeded noise."""
    entropy, laws_of = truth(heads, seed if random_truth else None)
    return table(entropy, laws_of, sizes, noise, np.random.default_rng(seed))


def _between(heads):
    """A smooth stand-in for heads that were not traced."""
    u, v = np.log2(heads)
    return 0.8346 * np.exp(-0.045 * u + 0.0025 * u * u - 0.012 * v), 0.1641 + 0.0025 * u + 0.002 * v
