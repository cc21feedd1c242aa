"""Decoding, one query per sequence against a long cache of keys and values: in plain JAX, and how parts of a cache merge.

Each part of the cache gives a normalized output and its log-sum-exp, and parts merge by it. The step reads the cache and does
little else, so what counts is that every byte is read once and none beyond the sequence's length: the group of queries that
shares a key/value head meets a block of the cache together, as the rows of one matrix product.

Dao et al., "Flash-Decoding for long-context inference" (2023), https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax.attention.cache import BLOCKS, WITHIN_HEADS, Cache, at
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case

XLA_CHUNK = 2048  # keys of a sequence in one step of `xla`
LAST = 2  # blocks of a head in the steps that end a sequence
ALONGSIDE = 8  # heads of all sequences that a step of `xla` meets at least on a CPU, several blocks of one counting as heads


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
    valid_BxS = _valid(jnp.arange(cache.keys), 0, length_B)
    cut = _Cut(cache, k_BxKxSxH, v_BxKxSxH, cache.keys, 1, cache.batch)
    return _finish(_absorb(_start(q_BxKxGxH, 1), q_BxKxGxH, cut.block(0, 0, valid_BxS), scale, cut.k_axes))


def xla(q_BxKxGxH, cache: Cache, length_B, scale: float, case: Case):
    """`xla`: blocks of the cache up to the longest sequence's end, masked from that on in which the shortest one ends.

    A step meets P blocks of each head: on CPUs, whose threads share out the matrices of one product, as many as make enough
    of them. Keys lie as `BLOCKS` there, and as `WITHIN_HEADS` elsewhere. Of several sequences with many heads a CPU reads one
    after the other, so that what a step copies stays in its cache.
    """
    batch, heads = q_BxKxGxH.shape[:2]
    if cache.layout != BLOCKS:
        k, v = cache.arrays(WITHIN_HEADS)
        cut = _Cut(cache, k, v, min(XLA_CHUNK, case.keys), 1, batch)
        return _decoded(cut, 0, q_BxKxGxH, length_B, scale)
    size, together = cache.k.shape[-1], 1 if batch * heads > ALONGSIDE else batch
    # not all of a cache, which XLA would copy for being read whole
    parts = max(1, min(cache.keys // size // 2, ALONGSIDE // (together * heads)))
    cut = _Cut(cache, cache.k, cache.v, size, parts, together)
    if together == batch:
        return _decoded(cut, 0, q_BxKxGxH, length_B, scale)
    out, lse = jax.lax.map(
        lambda one: _decoded(cut, one[0], one[1][None], one[2][None], scale), (jnp.arange(batch), q_BxKxGxH, length_B)
    )
    return out[:, 0], lse[:, 0]


class _Cut(NamedTuple):
    """A cache and what is read of it in a step: `parts` times `size` keys of `sequences` sequences."""

    cache: Cache
    k: jax.Array
    v_BxKxSxH: jax.Array
    size: int
    parts: int
    sequences: int

    @property
    def keys(self) -> int:
        return self.size * self.parts

    @property
    def k_axes(self) -> str:
        return "bkphc" if self.k.ndim == 5 else "bkpch"

    def block(self, sequence, first, valid_BxC) -> _Block:
        """Keys and values of positions from `first` on, of the sequences from `sequence` on."""
        heads, shape = self.v_BxKxSxH.shape[1], (self.sequences, self.v_BxKxSxH.shape[1], self.parts, self.size, -1)
        if self.k.ndim == 5:
            start = at(sequence, 0, first // self.size, 0, 0)
            k = jax.lax.dynamic_slice(self.k, start, (self.sequences, heads, self.parts, *self.k.shape[3:]))
        else:
            k = self._rows(self.k, sequence, first).reshape(shape)
        v_BxKxPxCxH = self._rows(self.v_BxKxSxH, sequence, first).reshape(shape)
        scales = []
        for x_BxKx1xS in (self.cache.k_scale_BxKx1xS, self.cache.v_scale_BxKx1xS):
            if x_BxKx1xS is not None:
                x_BxKx1xS = jax.lax.dynamic_slice(x_BxKx1xS, at(sequence, 0, 0, first), (self.sequences, heads, 1, self.keys))
                x_BxKx1xS = x_BxKx1xS.reshape(*shape[:3], 1, self.size)
            scales.append(x_BxKx1xS)
        return _Block(k, v_BxKxPxCxH, *scales, None if valid_BxC is None else valid_BxC.reshape(-1, *shape[2:4]))

    def _rows(self, x_BxKxSxH: jax.Array, sequence, first) -> jax.Array:
        sizes = self.sequences, x_BxKxSxH.shape[1], self.keys, x_BxKxSxH.shape[3]
        return jax.lax.dynamic_slice(x_BxKxSxH, at(sequence, 0, first, 0), sizes)


def _decoded(cut: _Cut, sequence, q_BxKxGxH: jax.Array, length_B: jax.Array, scale: float):
    """Of the sequences from `sequence` on, whose queries and lengths these are."""

    def one_step(j, state, *, cut: _Cut, begin: int | jax.Array, masked: bool):
        position = begin + j * cut.keys
        first = jnp.minimum(position, cut.cache.keys - cut.keys)  # the last ones are moved back to lie within the cache
        valid = _valid(first + jnp.arange(cut.keys), position, length_B) if masked else None
        return _absorb(state, q_BxKxGxH, cut.block(sequence, first, valid), scale, cut.k_axes)

    whole = length_B.min() // cut.keys
    step = functools.partial(one_step, cut=cut, begin=0, masked=False)
    state = jax.lax.fori_loop(0, whole, step, _start(q_BxKxGxH, cut.parts))
    # as wide as these, the last step would read up to seven blocks for nothing, of a long cache that holds little
    last, begin = cut._replace(parts=min(LAST, cut.parts)), whole * cut.keys
    step, steps = functools.partial(one_step, cut=last, begin=begin, masked=True), -(-(length_B.max() - begin) // last.keys)
    rest = jax.lax.fori_loop(0, steps, step, tuple(x[:, :, : last.parts] for x in state))
    return _finish([jnp.concatenate([own, x[:, :, last.parts :]], axis=2) for own, x in zip(rest, state, strict=True)])


class _Block(NamedTuple):
    """Keys and values of P parts of each head, C of each; scales of int8, else None; which count (None: all)."""

    k: jax.Array  # axes as said beside it
    v_BxKxPxCxH: jax.Array
    k_scale_BxKxPx1xC: jax.Array | None
    v_scale_BxKxPx1xC: jax.Array | None
    valid_BxPxC: jax.Array | None


def _start(q_BxKxGxH, parts: int):
    batch, heads, group, head_dim = q_BxKxGxH.shape
    accumulate, rows = jnp.promote_types(q_BxKxGxH.dtype, jnp.float32), (batch, heads, parts, group)
    return jnp.full((*rows, 1), UNSEEN, accumulate), jnp.zeros((*rows, 1), accumulate), jnp.zeros((*rows, head_dim), accumulate)


def _valid(key_C, first, length_B):
    """Which of the keys at positions key_C count, (B, C): those from `first` on and within the lengths."""
    return (key_C[None, :] >= first) & (key_C[None, :] < length_B[:, None])


def _absorb(state, q_BxKxGxH, block: _Block, scale: float, k_axes: str):
    """Adds keys to the running softmax of each part."""
    largest, total, weighted = state
    parts, dtype = total.shape[2], q_BxKxGxH.dtype
    k, v_BxKxPxCxH = block.k.astype(dtype), block.v_BxKxPxCxH.astype(dtype)
    q_BxKxPxGxH = jnp.broadcast_to(q_BxKxGxH[:, :, None], (*q_BxKxGxH.shape[:2], parts, *q_BxKxGxH.shape[2:]))
    logits_BxKxPxGxC = scale * jnp.einsum(f"bkpgh,{k_axes}->bkpgc", q_BxKxPxGxH, k, preferred_element_type=total.dtype)
    if block.k_scale_BxKxPx1xC is not None:
        logits_BxKxPxGxC = logits_BxKxPxGxC * block.k_scale_BxKxPx1xC.astype(total.dtype)
    valid_BxPxC = block.valid_BxPxC
    if valid_BxPxC is not None:
        logits_BxKxPxGxC = jnp.where(valid_BxPxC[:, None, :, None], logits_BxKxPxGxC, HIDDEN)
        v_BxKxPxCxH = jnp.where(valid_BxPxC[:, None, ..., None], v_BxKxPxCxH, 0)  # a weight of 0 does not remove a NaN
    now = jnp.maximum(largest, logits_BxKxPxGxC.max(axis=-1, keepdims=True))
    weights_BxKxPxGxC, fade = jnp.exp(logits_BxKxPxGxC - now), jnp.exp(largest - now)
    total = total * fade + weights_BxKxPxGxC.sum(axis=-1, keepdims=True)
    if block.v_scale_BxKxPx1xC is not None:
        v_scale = block.v_scale_BxKxPx1xC.astype(total.dtype)
        if valid_BxPxC is not None:
            v_scale = jnp.where(valid_BxPxC[:, None, :, None], v_scale, 0)
        weights_BxKxPxGxC = weights_BxKxPxGxC * v_scale
    product = jnp.einsum("bkpgc,bkpch->bkpgh", weights_BxKxPxGxC.astype(dtype), v_BxKxPxCxH, preferred_element_type=total.dtype)
    return now, total, weighted * fade + product


def _finish(state):
    largest, total, weighted = state
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    out_BxKxPxGxH, lse_BxKxPxG = weighted / safe_total, jnp.where(seen, largest + jnp.log(safe_total), -jnp.inf)[..., 0]
    if out_BxKxPxGxH.shape[2] == 1:
        return out_BxKxPxGxH[:, :, 0], lse_BxKxPxG[:, :, 0]
    return merge(jnp.moveaxis(out_BxKxPxGxH, 2, 0), jnp.moveaxis(lse_BxKxPxG, 2, 0))
