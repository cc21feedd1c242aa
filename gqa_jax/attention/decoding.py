"""Decoding, one query per sequence against a long cache of keys and values: in plain JAX, and how parts of a cache merge.

Each part of the cache gives a normalized output and its log-sum-exp, and parts merge by it. The step reads the cache and does
little else, so what counts is that every byte is read once and none beyond the sequence's length: the group of queries that
shares a key/value head meets a block of the cache together, as the rows of one matrix product.

Dao et al., "Flash-Decoding for long-context inference" (2023), https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gqa_jax.attention.cache import WITHIN_HEADS, Cache
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case

XLA_CHUNK = 2048  # keys of a sequence in one step of `xla`
XLA_CHUNK_CPU = 512  # of 256 to 2,048 the least processor time at 16K entries: chunks of all heads stay in its cache


def merge(out_PxBxKxGxH: jax.Array, lse_PxBxKxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp over P disjoint parts of the keys, from those over each: float32 in, float32 out."""
    largest_BxKxG = jnp.maximum(lse_PxBxKxG.max(axis=0), UNSEEN)
    weights_PxBxKxG = jnp.exp(lse_PxBxKxG - largest_BxKxG[None])
    total_BxKxG = weights_PxBxKxG.sum(axis=0)
    seen = total_BxKxG > 0
    safe_total_BxKxG = jnp.where(seen, total_BxKxG, 1)
    out_BxKxGxH = (out_PxBxKxGxH * weights_PxBxKxG[..., None]).sum(axis=0) / safe_total_BxKxG[..., None]
    return out_BxKxGxH, jnp.where(seen, largest_BxKxG + jnp.log(safe_total_BxKxG), -jnp.inf)


def written_out(q_BxKxGxH, cache: Cache, length_B, scale: float, case: Case):
    """`reference`: the whole cache at once."""
    k_BxKxSxH, v_BxKxSxH = cache.arrays(WITHIN_HEADS)
    scales = cache.k_scale_BxKx1xS, cache.v_scale_BxKx1xS
    state = _absorb(
        _start(q_BxKxGxH), q_BxKxGxH, k_BxKxSxH, v_BxKxSxH, *scales, scale, _valid(jnp.arange(case.keys), 0, length_B)
    )
    return _finish(state)


def xla(q_BxKxGxH, cache: Cache, length_B, scale: float, case: Case):
    """`xla`: chunks of the cache up to the longest sequence's end, masked from that on in which the shortest one ends."""
    size = min(XLA_CHUNK_CPU if case.platform == "cpu" else XLA_CHUNK, case.keys)
    k_BxKxSxH, v_BxKxSxH = cache.arrays(WITHIN_HEADS)

    def one_chunk(j, state, *, masked: bool):
        first = jnp.minimum(j * size, case.keys - size)  # the last chunk is moved back to lie within the cache
        parts = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (k_BxKxSxH, v_BxKxSxH))
        scales = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis=3)
            for x in (cache.k_scale_BxKx1xS, cache.v_scale_BxKx1xS)
        )  # fmt: skip
        valid = _valid(first + jnp.arange(size), j * size, length_B) if masked else None
        return _absorb(state, q_BxKxGxH, *parts, *scales, scale, valid)

    whole = length_B.min() // size
    state = jax.lax.fori_loop(0, whole, functools.partial(one_chunk, masked=False), _start(q_BxKxGxH))
    chunks = (length_B.max() + size - 1) // size
    return _finish(jax.lax.fori_loop(whole, chunks, functools.partial(one_chunk, masked=True), state))


def _start(q_BxKxGxH):
    accumulate = jnp.promote_types(q_BxKxGxH.dtype, jnp.float32)
    column = (*q_BxKxGxH.shape[:3], 1)
    return jnp.full(column, UNSEEN, accumulate), jnp.zeros(column, accumulate), jnp.zeros(q_BxKxGxH.shape, accumulate)


def _valid(key_C, first, length_B):
    """Which of the keys at positions key_C count, (B, C): those from `first` on and within the lengths."""
    return (key_C[None, :] >= first) & (key_C[None, :] < length_B[:, None])


def _absorb(state, q_BxKxGxH, k_BxKxCxH, v_BxKxCxH, k_scale_BxKx1xC, v_scale_BxKx1xC, scale, valid_BxC):
    """Adds keys to the running softmax: those that are valid, or all (None)."""
    largest, total, weighted = state
    k_BxKxCxH, v_BxKxCxH = (x.astype(q_BxKxGxH.dtype) for x in (k_BxKxCxH, v_BxKxCxH))
    logits_BxKxGxC = scale * jnp.einsum("bkgh,bkch->bkgc", q_BxKxGxH, k_BxKxCxH, preferred_element_type=total.dtype)
    if k_scale_BxKx1xC is not None:
        logits_BxKxGxC = logits_BxKxGxC * k_scale_BxKx1xC.astype(total.dtype)
    if valid_BxC is not None:
        logits_BxKxGxC = jnp.where(valid_BxC[:, None, None], logits_BxKxGxC, HIDDEN)
        v_BxKxCxH = jnp.where(valid_BxC[:, None, :, None], v_BxKxCxH, 0)  # a weight of 0 does not remove a NaN
    now = jnp.maximum(largest, logits_BxKxGxC.max(axis=-1, keepdims=True))
    weights_BxKxGxC, fade = jnp.exp(logits_BxKxGxC - now), jnp.exp(largest - now)
    total = total * fade + weights_BxKxGxC.sum(axis=-1, keepdims=True)
    if v_scale_BxKx1xC is not None:
        v_scale = v_scale_BxKx1xC.astype(total.dtype)
        if valid_BxC is not None:
            v_scale = jnp.where(valid_BxC[:, None, None], v_scale, 0)
        weights_BxKxGxC = weights_BxKxGxC * v_scale
    product = jnp.einsum(
        "bkgc,bkch->bkgh", weights_BxKxGxC.astype(q_BxKxGxH.dtype), v_BxKxCxH, preferred_element_type=total.dtype
    )
    return now, total, weighted * fade + product


def _finish(state):
    largest, total, weighted = state
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    return weighted / safe_total, jnp.where(seen, largest + jnp.log(safe_total), -jnp.inf)[..., 0]
