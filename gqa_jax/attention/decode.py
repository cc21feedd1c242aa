"""Decoding: one query per sequence against a long cache of keys and values, the work split over the cache.

Each part of the cache gives a normalized output and its log-sum-exp, and parts merge by it. The step reads the cache and does
little else, so what counts is that every byte is read once and none beyond the sequence's length: the group of queries that
shares a key/value head meets a block of the cache together, as the rows of one matrix product.

Dao et al., "Flash-Decoding for long-context inference" (2023), https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.attention import decode_tpu, pallas_triton
from gqa_jax.attention.api import check_heads
from gqa_jax.attention.implementations import Case
from gqa_jax.attention.masks import HIDDEN, UNSEEN
from gqa_jax.errors import closest

XLA_CHUNK = 2048  # keys of a sequence in one step of `xla`


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: int | jax.Array,
    *,
    implementation: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v over the first `length` entries of each sequence's cache; not differentiable.

    Args:
      q: (B, N, H) queries, N a multiple of K; head n reads key/value head n // (N / K). Or (B, K, G, H).
      k_cache, v_cache: (B, S, K, H), of q's dtype. Entries from `length` on may hold anything, NaN too. On TPUs make S a
        multiple of 8: where H is 128 and K less than 8, other caches cost time, and with K = 1 and B > 1 a copy.
      length: valid entries, an integer or int (B,), possibly traced; a `jax.Array` is taken to be within 0 and S.
      implementation: a name, or None for the best one for this platform: "reference", "xla", "pallas_tpu", "pallas_triton".
      scale: of the logits; None is H ** -0.5.
      return_lse: also return the natural log-sum-exp of the logits, (B, N) (or (B, K, G)), float32: results over disjoint
        parts of a cache merge by it. -inf where length is 0; the output is 0 there.

    Raises:
      ValueError: as in `gqa_jax.attention.attention`, before anything is traced.
    """
    _check(q, k_cache, v_cache, length, scale)
    batch, keys, n_kv, head_dim = k_cache.shape
    q_BxKxGxH = q.reshape(batch, n_kv, -1, head_dim)
    scale = head_dim**-0.5 if scale is None else float(scale)
    sizes = {"n_heads": n_kv * q_BxKxGxH.shape[2], "n_kv_heads": n_kv, "head_dim": head_dim}
    case = Case.planned(batch=batch, length=1, **sizes, dtype=q.dtype)
    case = case._replace(keys=keys, aligned=False, return_lse=return_lse)
    length_B = jnp.broadcast_to(jnp.clip(jnp.asarray(length, jnp.int32), 0, keys), (batch,))
    out_BxKxGxH, lse_BxKxG = DECODERS[resolve(implementation, case)].run(q_BxKxGxH, k_cache, v_cache, length_B, scale, case)
    out = out_BxKxGxH.astype(q.dtype).reshape(q.shape)
    return (out, lse_BxKxG.reshape(q.shape[:-1])) if return_lse else out


class Implementation(NamedTuple):
    """obstacle(case) is None where it can run, else why not; run(q (B, K, G, H), k, v (B, S, K, H), length (B,) int32, scale,
    case) -> out (B, K, G, H), lse (B, K, G) float32."""

    obstacle: Callable[[Case], str | None]
    run: Callable[..., tuple[jax.Array, jax.Array]]


def resolve(implementation: str | None, case: Case) -> str:
    """The name of the implementation that runs `case`; ValueError on one that is unknown or can't run it here."""
    able = [name for name, candidate in DECODERS.items() if candidate.obstacle(case) is None]
    if implementation is None:
        preferred = {"tpu": "pallas_tpu", "gpu": "pallas_triton"}.get(case.platform)
        return preferred if preferred in able else "xla"
    if implementation not in DECODERS:
        raise ValueError(f"decode implementation {implementation!r} is unknown: {closest(implementation, DECODERS)}")
    if implementation not in able:
        obstacle = DECODERS[implementation].obstacle(case)
        raise ValueError(f"decode implementation {implementation!r} can't run here: {obstacle}. These can: {', '.join(able)}")
    return implementation


def merge(out_PxBxKxGxH: jax.Array, lse_PxBxKxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp over P disjoint parts of the keys, from those over each: float32 in, float32 out."""
    largest_BxKxG = jnp.maximum(lse_PxBxKxG.max(axis=0), UNSEEN)
    weights_PxBxKxG = jnp.exp(lse_PxBxKxG - largest_BxKxG[None])
    total_BxKxG = weights_PxBxKxG.sum(axis=0)
    seen = total_BxKxG > 0
    safe_total_BxKxG = jnp.where(seen, total_BxKxG, 1)
    out_BxKxGxH = (out_PxBxKxGxH * weights_PxBxKxG[..., None]).sum(axis=0) / safe_total_BxKxG[..., None]
    return out_BxKxGxH, jnp.where(seen, largest_BxKxG + jnp.log(safe_total_BxKxG), -jnp.inf)


def _reference(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    return _absorb(_start(q_BxKxGxH), q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, jnp.arange(case.keys), 0, length_B, scale, last=True)


def _xla(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    """Chunks of the cache up to the longest sequence's end; the last chunk is moved back to lie within the cache."""
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


def _pallas_tpu(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    options = decode_tpu.choose(case)
    return merge(*decode_tpu.parts(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale, options))


def _pallas_triton(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    from gqa_jax.attention import decode_triton  # deprecated in JAX: only where it runs

    options = decode_triton.choose(case)
    return merge(*decode_triton.parts(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale, options))


DECODERS: dict[str, Implementation] = {
    "reference": Implementation(lambda case: None, _reference),
    "xla": Implementation(lambda case: None, _xla),
    "pallas_tpu": Implementation(decode_tpu.obstacle, _pallas_tpu),
    "pallas_triton": Implementation(pallas_triton.obstacle, _pallas_triton),
}


def _check(q, k_cache, v_cache, length, scale) -> None:
    shapes = f"q {q.shape} {q.dtype}, k_cache {k_cache.shape} {k_cache.dtype}, v_cache {v_cache.shape} {v_cache.dtype}"
    if q.ndim not in (3, 4) or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(f"decode takes q (B, N, H) or (B, K, G, H) and k_cache, v_cache (B, S, K, H); got {shapes}")
    check_heads(q, k_cache, v_cache, heads_axis=1, grouped=q.ndim == 4, shapes=shapes)
    if jnp.shape(length) not in ((), (q.shape[0],)) or not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(
            f"length must be an integer or integers ({q.shape[0]},); got {jnp.result_type(length)} {jnp.shape(length)}"
        )
    # one that is on a device is not waited for
    if not isinstance(length, jax.Array) and not np.all((np.asarray(length) >= 0) & (np.asarray(length) <= k_cache.shape[1])):
        raise ValueError(f"length must be within the cache, 0 to {k_cache.shape[1]}; got {length}")
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive Python number; got {scale!r}")
