"""One query per sequence against a cache, in Pallas for TPUs: the pipeline streams blocks of keys and values past the queries.

The cache lies as (B, K, H, S), positions in the lanes (`gqa_jax.attention.cache.LANES`), for every size of head: nothing is
padded, and a grid step takes one key/value head and a block of its positions. Of int8 the integers are multiplied as they
are, in the dtype of the queries; the scales of a block are two rows of lanes.
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
from gqa_jax.attention.cache import LANES as CACHE
from gqa_jax.attention.cache import Cache
from gqa_jax.attention.decoding import merge
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case, in_32_bits

LANES = 128


class Options(NamedTuple):
    """Parts of each sequence, one for each core of the device; positions of a block."""

    parts: int
    block: int
    interpret: bool = False


def choose(case: Case) -> Options:
    """Blocks of 1 MB of keys, microseconds of memory time, and of 1 MB of logits at most."""
    held = jnp.dtype(case.dtype if case.cache_dtype is None else case.cache_dtype)
    most = min(2**20 // (case.head_dim * held.itemsize), 2**18 // case.group)
    return Options(case.cores, min(max(1, most // LANES) * LANES, -(-case.keys // LANES) * LANES), case.interpreted)


def decode(q_BxKxGxH, cache: Cache, length_B, scale: float, case: Case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    return merge(*parts(q_BxKxGxH, cache, length_B, scale, choose(case)))


@in_32_bits
def parts(q_BxKxGxH, cache: Cache, length_B, scale: float, options: Options):
    """Outputs (P, B, K, G, H) and log-sum-exps (P, B, K, G), float32, of the parts of each sequence."""
    batch, n_kv, group, head_dim = q_BxKxGxH.shape
    padded_rows = -(-group // 8) * 8
    q_BxKxRxH = jnp.pad(q_BxKxGxH, ((0, 0), (0, 0), (0, padded_rows - group), (0, 0)))

    def cache_index(p, b, i, j, length_ref):
        first, stop = bounds.part_of_cache(p, options.parts, length_ref[b], options.block)
        block = jnp.maximum(jnp.minimum(first + j, stop - 1), 0)  # past the end the last one again, which is not fetched twice
        return b, i, 0, block

    first_B, stop_B = bounds.part_of_cache(0, options.parts, length_B, options.block)
    steps = jnp.maximum((stop_B - first_B).max(), 1)  # of the longest sequence's first part, the largest
    scales = [cache.k_scale_BxKx1xS, cache.v_scale_BxKx1xS] if cache.quantized else []
    out, lse = pl.pallas_call(
        functools.partial(_kernel, scale=scale, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(options.parts, batch, n_kv, steps),
            in_specs=[
                pl.BlockSpec((None, None, padded_rows, head_dim), lambda p, b, i, j, length_ref: (b, i, 0, 0)),
                *(pl.BlockSpec((None, None, head_dim, options.block), cache_index) for _ in range(2)),
                *(pl.BlockSpec((None, None, 1, options.block), cache_index) for _ in scales),
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, padded_rows, width), lambda p, b, i, j, length_ref: (p, b, i, 0, 0))
                for width in (head_dim, 1)
            ],
            scratch_shapes=[pltpu.VMEM((padded_rows, width), jnp.float32) for width in (1, 1, head_dim)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((options.parts, batch, n_kv, padded_rows, width), jnp.float32) for width in (head_dim, 1)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=options.interpret,
        name="gqa_tpu_decode",
    )(length_B, q_BxKxRxH, *cache.arrays(CACHE), *scales)
    return out[:, :, :, :group], lse[:, :, :, :group, 0]


def _kernel(length_ref, q_ref, k_ref, v_ref, *refs, scale: float, options: Options):
    *scale_refs, out_ref, lse_ref, largest_ref, total_ref, weighted_ref = refs
    p, b, j = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    length = length_ref[b]
    first, stop = bounds.part_of_cache(p, options.parts, length, options.block)
    here = (first + j) * options.block  # first position of the block
    dtype = q_ref.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None  # the default is one bfloat16 product

    @pl.when(j == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)

    def dot(a, b, contract):
        return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def absorb(*, ends: bool):
        k, v = (ref[...].astype(dtype) for ref in (k_ref, v_ref))
        scales = [ref[...].astype(jnp.float32) for ref in scale_refs]
        logits = dot(q_ref[...], k, ((1,), (0,))) * scale
        if scales:
            logits = logits * scales[0]
        if ends:
            entry = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(entry < length - here, logits, HIDDEN)
            place = lax.broadcasted_iota(jnp.int32, v.shape, 1)
            # beyond the end anything may lie, and a weight of 0 does not remove a NaN; every TPU can select in 32 bits
            v = jnp.where(place < length - here, v.astype(jnp.float32), 0.0).astype(dtype)
            scales = [jnp.where(place[:1] < length - here, x, 0.0) for x in scales]
        largest = largest_ref[...]
        now = jnp.maximum(largest, logits.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(logits - now), jnp.exp(largest - now)
        largest_ref[...] = now
        total_ref[...] = total_ref[...] * fade + weights.sum(axis=1, keepdims=True)
        if scales:
            weights = weights * scales[1]
        weighted_ref[...] = weighted_ref[...] * fade + dot(weights.astype(dtype), v, ((1,), (1,)))

    inside = first + j < stop
    whole = here + options.block <= length
    pl.when(inside & whole)(functools.partial(absorb, ends=False))
    pl.when(inside & jnp.logical_not(whole))(functools.partial(absorb, ends=True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        seen = total > 0
        safe_total = jnp.where(seen, total, 1.0)
        out_ref[...] = weighted_ref[...] / safe_total
        lse_ref[...] = jnp.where(seen, largest_ref[...] + jnp.log(safe_total), -jnp.inf)
