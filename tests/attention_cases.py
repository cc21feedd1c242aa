"""Inputs for attention, and what kernels make of them."""

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.attention.spec import Mask
from gqa_jax.attention.vjp import Kernel, attend


def inputs(n_heads, n_kv, head_dim, length, *, keys=None, batch=1, dtype=jnp.bfloat16, kind="normal", seed=0):
    """q (B, T, K, G, H), k, v (B, S, K, H) and the cotangent of the output; `kind` is normal, large or equal."""
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    shapes = [(batch, length, n_kv, n_heads // n_kv, head_dim), *[(batch, keys, n_kv, head_dim)] * 2]
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    if kind == "large":
        q, k = 6 * q, 6 * k
    if kind == "equal":
        q, k = np.broadcast_to(q[:, :1], q.shape), np.broadcast_to(k[:, :1], k.shape)
    return [jnp.asarray(x, dtype) for x in (q, k, v, rng.normal(size=shapes[0]))]


def segments(length, *, batch=1, seed=0):
    """Document ids of packed sequences: sorted, several a sequence."""
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 5, size=(batch, length))), jnp.int32)


def run(forward, backward, options, arrays, mask=None, scale=None):
    """Output, log-sum-exp and the three gradients, jitted. Offsets of `mask` that are Python ints stay static."""
    q, k, v, d_out = arrays
    mask = mask or Mask()
    kernel = Kernel(forward, backward, q.shape[-1] ** -0.5 if scale is None else scale, options)

    def all_of(q, k, v, d_out, traced):
        full = mask._replace(**traced)
        (out, lse), pull = jax.vjp(lambda q, k, v: attend(kernel, q, k, v, full), q, k, v)
        # of a row that sees no key a log-sum-exp of -inf has any cotangent, and none may matter
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, jnp.nan, jnp.zeros_like(lse))))

    traced = {name: value for name, value in mask._asdict().items() if value is not None and not isinstance(value, int)}
    return [np.asarray(x) for x in jax.jit(all_of)(q, k, v, d_out, traced)]
