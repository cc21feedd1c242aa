"""Decoding, one query per sequence against a long cache of keys and values: in plain JAX, and how parts of a cache merge.

Each part of the cache gives a normalized output and its log-sum-exp, and parts merge by it. The step reads the cache and does
little else, so what counts is that every byte is read once and none beyond the sequence's length: the group of queries that
shares a key/value head meets a block of the cache together, as the rows of one matrix product.

Dao et al., "Flash-Decoding for long-context inference" (2023), https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case

XLA_CHUNK = 2048  # keys of a sequence in one step of `xla`


def merge(out_PxBxKxGxH: jax.Array, lse_PxBxKxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp over P disjoint parts of the keys, from those over each: float32 in, float32 out."""
    largest_BxKxG = jnp.maximum(lse_PxBxKxG.max(axis=0), UNSEEN)
    weights_PxBxKxG = jnp.exp(lse_PxBxKxG - largest_BxKxG[None])
    total_BxKxG = weights_PxBxKxG.sum(axis=0)
    seen = total_BxKxG > 0
    safe_total_BxKxG = jnp.where(seen, total_BxKxG, 1)
    out_BxKxGxH = (out_PxBxKxGxH * weights_PxBxKxG[..., None]).sum(axis=0) / safe_total_BxKxG[..., None]
    return out_BxKxGxH, jnp.where(seen, largest_BxKxG + jnp.log(safe_total_BxKxG), -jnp.inf)


def written_out(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    """`reference`: the whole cache at once."""
    return _absorb(_start(q_BxKxGxH), q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, jnp.arange(case.keys), 0, length_B, scale, last=True)


def xla(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    """`xla`: chunks of the cache up to the longest sequence's end; the last chunk is moved back to lie within the cache."""
    size = min(XLA_CHUNK, case.keys)

    def one_chunk(j, state):
        first = jnp.minimum(j * size, case.keys - size)
        k_BxCxKxH, v_BxCxKxH = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k_BxSxKxH, v_BxSxKxH))
        return _absorb(state, q_BxKxGxH, k_BxCxKxH, v_BxCxKxH, first + jnp.arange(size), j * size, length_B, scale)

    chunks = (length_B.max() + size - 1) // size
    return _finish(jax.lax.fori_loop(0, chunks, one_chunk, _start(q_BxKxGxH)))


def _start(q_BxKxGxH):
    accumulate = jnp.promote_types(q_BxKxGxH.dtype, jnp.float32)
    column = (*q_BxKxGxH.shape[:3], 1)
    return jnp.full(column, UNSEEN, accumulate), jnp.zeros(column, accumulate), jnp.zeros(q_BxKxGxH.shape, accumulate)


def _absorb(state, q_BxKxGxH, k_BxCxKxH, v_BxCxKxH, key_C, first, length_B, scale, *, last: bool = False):
    """Adds the keys at positions key_C that are from `first` on and within the lengths to the running softmax."""
    largest, total, weighted = state
    valid_BxC = (key_C[None, :] >= first) & (key_C[None, :] < length_B[:, None])
    logits_BxKxGxC = scale * jnp.einsum("bkgh,bckh->bkgc", q_BxKxGxH, k_BxCxKxH, preferred_element_type=total.dtype)
    logits_BxKxGxC = jnp.where(valid_BxC[:, None, None], logits_BxKxGxC, HIDDEN)
    now = jnp.maximum(largest, logits_BxKxGxC.max(axis=-1, keepdims=True))
    weights_BxKxGxC, fade = jnp.exp(logits_BxKxGxC - now), jnp.exp(largest - now)
    v_BxCxKxH = jnp.where(valid_BxC[:, :, None, None], v_BxCxKxH, 0)  # a weight of 0 does not remove a NaN
    product = jnp.einsum(
        "bkgc,bckh->bkgh", weights_BxKxGxC.astype(v_BxCxKxH.dtype), v_BxCxKxH, preferred_element_type=total.dtype
    )
    state = now, total * fade + weights_BxKxGxC.sum(axis=-1, keepdims=True), weighted * fade + product
    return _finish(state) if last else state


def _finish(state):
    largest, total, weighted = state
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    return weighted / safe_total, jnp.where(seen, largest + jnp.log(safe_total), -jnp.inf)[..., 0]
