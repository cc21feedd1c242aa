"""A Llama-style decoder in float64 NumPy, written from the papers' formulas: the independent implementation of the tests.

Loops over batch, position and head on purpose: nothing here shares a trick with gqa_jax.model.
"""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def frequencies(config):
    """Of RoPE, (H/2,): those of Llama 3.1 by the branches of its `apply_scaling`, of github.com/meta-llama/llama-models."""
    found = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2.0 * i / config.head_dim)
        if config.rope_scaling == "linear":
            frequency /= config.rope_factor
        if config.rope_scaling == "llama3":
            wavelength, original = 2 * np.pi / frequency, config.rope_original_context
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            if wavelength > original / low:
                frequency /= config.rope_factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / config.rope_factor + smooth * frequency
        found.append(frequency)
    return np.array(found)


def rotate(x, position, frequency):
    """RoPE of one head vector (H,), as complex multiplication of the pairs (i, i + H/2)."""
    half = x.size // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequency)
    return np.concatenate([z.real, z.imag])


def attention(q, k, v):
    """(B, T, N, H), (B, T, K, H), (B, T, K, H) -> (B, T, N, H): causal, head n reads key/value head n // (N / K)."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for n in range(q.shape[2]):
                logits = k[b, : t + 1, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v[b, : t + 1, n // group] / weights.sum()
    return out


def logits(params, tokens, config):
    """Logits (B, T, V) of gqa_jax.model.init_params' nested dict, given as float64 arrays."""
    x, frequency = params["embedding"][tokens], frequencies(config)
    for i in range(config.n_layers):
        layer = {name: value[i] for name, value in params["layers"].items()}
        normal = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = (np.einsum("btd,dnh->btnh", normal, layer[name]) for name in ("query", "key", "value"))
        for heads in (q, k):
            for b in range(heads.shape[0]):
                for t in range(heads.shape[1]):
                    for n in range(heads.shape[2]):
                        heads[b, t, n] = rotate(heads[b, t, n], t, frequency)
        x = x + np.einsum("btnh,nhd->btd", attention(q, k, v), layer["output"])
        normal = rms_norm(x, layer["ffn_norm"], config.norm_eps)
        gate = normal @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (normal @ layer["up"])) @ layer["down"]
    return rms_norm(x, params["final_norm"], config.norm_eps) @ params["head" if config.untied else "embedding"].T
