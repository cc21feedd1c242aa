"""One query per sequence against a cache, in Pallas for TPUs: the pipeline streams blocks of keys and values past the queries.

XLA lays a (B, S, K, H) cache out without padding, and a kernel that asks for another layout pays with a copy of the cache. Up
to heads of 128 lanes there are two such layouts (seen in compiled programs for v5e, v5p and v6e):
  H < 128: positions are the lanes, (B, K, H, S). A grid step takes one key/value head and a block of positions.
  H = 128: the head is the lanes, (B, S, K, H), the same bytes as (B, S K, H). A step takes a block of these rows, all heads at
    once; a query's logits with the rows of other heads are masked. The matrix unit would have to take the rows in anyway.
    Where S K is no multiple of 8 the bytes differ, and the kernel flattens each block itself: for K = 2 this takes longer than
    to read it.
Lengths are prefetched scalars: blocks beyond a sequence's end are not fetched, and the grid ends with the longest sequence.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqa_jax.attention import bounds
from gqa_jax.attention.decoding import merge
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case, in_32_bits

LANES = 128


class Options(NamedTuple):
    """Parts of each sequence, one for each core of the device; positions (H < 128) or rows (H = 128) of a block."""

    parts: int
    block: int
    interpret: bool = False


def choose(case: Case) -> Options:
    """Blocks of 1 MB of keys, microseconds of memory time, and of 1 MB of logits at most."""
    most = 2**20 // (case.head_dim * jnp.dtype(case.dtype).itemsize)
    if case.head_dim == LANES:
        most = min(most, 2**18 // case.n_heads)
        block, entries = max(8, most // case.n_kv_heads // 8 * 8) * case.n_kv_heads, case.keys * case.n_kv_heads
    else:
        block, entries = max(1, min(most, 2**18 // case.group) // LANES) * LANES, case.keys
    return Options(case.cores, min(block, -(-entries // LANES) * LANES), case.interpreted)


def decode(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, case: Case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    return merge(*parts(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale, choose(case)))


@in_32_bits
def parts(q_BxKxGxH, k_BxSxKxH, v_BxSxKxH, length_B, scale: float, options: Options):
    """Outputs (P, B, K, G, H) and log-sum-exps (P, B, K, G), float32, of the parts of each sequence."""
    batch, n_kv, group, head_dim = q_BxKxGxH.shape
    if head_dim == LANES:
        heads_per_row, q_BxIxRxH = n_kv, q_BxKxGxH.reshape(batch, 1, n_kv * group, head_dim)
        k, v, cache_block = k_BxSxKxH, v_BxSxKxH, (None, options.block // n_kv, n_kv, head_dim)
        if n_kv == 1 or k.shape[1] * n_kv % 8 == 0:
            k, v = (x.reshape(batch, -1, head_dim) for x in (k, v))
            cache_block = (None, options.block, head_dim)
    else:
        heads_per_row, q_BxIxRxH = 1, q_BxKxGxH
        k, v = (jnp.transpose(x, (0, 2, 3, 1)) for x in (k_BxSxKxH, v_BxSxKxH))
        cache_block = (None, None, head_dim, options.block)
    n_rows = q_BxIxRxH.shape[2]
    padded_rows = -(-n_rows // 8) * 8
    q_BxIxRxH = jnp.pad(q_BxIxRxH, ((0, 0), (0, 0), (0, padded_rows - n_rows), (0, 0)))
    instances = q_BxIxRxH.shape[1]  # K, or 1 with all heads in a row block

    def cache_index(p, b, i, j, entries_ref):
        first, stop = bounds.part_of_cache(p, options.parts, entries_ref[b], options.block)
        block = jnp.maximum(jnp.minimum(first + j, stop - 1), 0)  # past the end the last one again, which is not fetched twice
        return (b, i, 0, block) if head_dim < LANES else (b, block, 0, 0)[: k.ndim]

    entries_B = length_B * heads_per_row
    first_B, stop_B = bounds.part_of_cache(0, options.parts, entries_B, options.block)
    steps = jnp.maximum((stop_B - first_B).max(), 1)  # of the longest sequence's first part, the largest
    out, lse = pl.pallas_call(
        functools.partial(_kernel, scale=scale, group=group, heads_per_row=heads_per_row, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(options.parts, batch, instances, steps),
            in_specs=[
                pl.BlockSpec((None, None, padded_rows, head_dim), lambda p, b, i, j, entries_ref: (b, i, 0, 0)),
                pl.BlockSpec(cache_block, cache_index),
                pl.BlockSpec(cache_block, cache_index),
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, padded_rows, width), lambda p, b, i, j, entries_ref: (p, b, i, 0, 0))
                for width in (head_dim, 1)
            ],
            scratch_shapes=[pltpu.VMEM((padded_rows, width), jnp.float32) for width in (1, 1, head_dim)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((options.parts, batch, instances, padded_rows, width), jnp.float32) for width in (head_dim, 1)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=options.interpret,
        name="gqa_tpu_decode",
    )(entries_B, q_BxIxRxH, k, v)
    shape = options.parts, batch, n_kv, group
    return out[:, :, :, :n_rows].reshape(*shape, head_dim), lse[:, :, :, :n_rows, 0].reshape(shape)


def _kernel(entries_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, largest_ref, total_ref, weighted_ref, *, scale, group,
            heads_per_row: int, options: Options):  # fmt: skip
    p, b, j = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    entries = entries_ref[b]
    first, stop = bounds.part_of_cache(p, options.parts, entries, options.block)
    here = (first + j) * options.block  # first entry of the block
    lanes_are_keys = q_ref.shape[1] != LANES
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None  # the default is one bfloat16 product

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)

    def dot(a, b, contract):
        return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def absorb(*, ends: bool):
        k, v = (ref[...] if lanes_are_keys else ref[...].reshape(-1, LANES) for ref in (k_ref, v_ref))
        logits = dot(q_ref[...], k, ((1,), (0,)) if lanes_are_keys else ((1,), (1,))) * scale
        entry = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        if heads_per_row > 1:
            head = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            same = lax.rem(entry, jnp.full_like(entry, heads_per_row)) == lax.div(head, jnp.full_like(head, group))
            logits = jnp.where(same, logits, HIDDEN)
        if ends:
            logits = jnp.where(entry < entries - here, logits, HIDDEN)
            place = lax.broadcasted_iota(jnp.int32, v.shape, 1 if lanes_are_keys else 0)
            # beyond the end anything may lie, and a weight of 0 does not remove a NaN; every TPU can select in 32 bits
            v = jnp.where(place < entries - here, v.astype(jnp.float32), 0.0).astype(v.dtype)
        largest = largest_ref[...]
        now = jnp.maximum(largest, logits.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(logits - now), jnp.exp(largest - now)
        largest_ref[...] = now
        total_ref[...] = total_ref[...] * fade + weights.sum(axis=1, keepdims=True)
        product = dot(weights.astype(v.dtype), v, ((1,), (1,)) if lanes_are_keys else ((1,), (0,)))
        weighted_ref[...] = weighted_ref[...] * fade + product

    inside = first + j < stop
    whole = here + options.block <= entries
    pl.when(inside & whole)(functools.partial(absorb, ends=False))
    pl.when(inside & jnp.logical_not(whole))(functools.partial(absorb, ends=True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        out_ref[...] = weighted_ref[...] / safe_total
        lse_ref[...] = jnp.where(seen, largest_ref[...] + jnp.log(safe_total), -jnp.inf)
