"""One query per sequence against a cache, in Pallas-Triton: programs over (part of the cache, key/value head, sequence).

A program's rows are the group's queries, padded to the 16 that a matrix unit takes. A sequence's parts divide its own length,
so that all programs have work however short the sequence is in its cache. For all NVIDIA GPUs from Ampere on, Hopper too: the
step waits for memory, not for the matrix units that other instructions would use better.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gqa_jax.attention import bounds
from gqa_jax.attention.cache import WITHIN_HEADS, Cache
from gqa_jax.attention.decoding import merge
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case, in_32_bits
from gqa_jax.attention.triton import padded
from gqa_jax.attention.triton.kernels import LOG2_E

PROGRAMS = 512  # enough to keep the loads of 132 cores in flight
SMALLEST_PART = 512  # keys; merging costs more than smaller parts save


class Options(NamedTuple):
    """Parts of each sequence, keys of a block, warps of a program, stages of the copy pipeline."""

    parts: int
    block: int
    warps: int
    stages: int
    interpret: bool = False


def choose(case: Case) -> Options:
    """Blocks of 16 KB of keys: with their values and three stages, 96 KB, two programs to a Hopper core."""
    wanted = -(-PROGRAMS // (case.batch * case.n_kv_heads))
    row_bytes = padded(case.head_dim) * jnp.dtype(case.dtype).itemsize
    block = min(max(16, min(128, 2**14 // row_bytes)), padded(case.keys))
    return Options(min(wanted, -(-case.keys // SMALLEST_PART)), block, 4, 2 if row_bytes > 512 else 3, case.interpreted)


def decode(q_BxKxGxH, cache: Cache, length_B, scale: float, case: Case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    return merge(*parts(q_BxKxGxH, *cache.arrays(WITHIN_HEADS), length_B, scale, choose(case)))


@in_32_bits
def parts(q_BxKxGxH, k_BxKxSxH, v_BxKxSxH, length_B, scale: float, options: Options):
    """Outputs (P, B, K, G, H) and log-sum-exps (P, B, K, G), float32, of the parts of each sequence."""
    batch, n_kv, keys, head_dim = k_BxKxSxH.shape
    group = q_BxKxGxH.shape[2]
    cache_spec = pl.BlockSpec((None, None, keys, head_dim), lambda p, k, b: (b, k, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, options=options),
        grid=(options.parts, n_kv, batch),
        in_specs=[
            pl.BlockSpec((1,), lambda p, k, b: (b,)),
            pl.BlockSpec((None, None, group, head_dim), lambda p, k, b: (b, k, 0, 0)),
            cache_spec,
            cache_spec,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, group, head_dim), lambda p, k, b: (p, b, k, 0, 0)),
            pl.BlockSpec((None, None, None, group), lambda p, k, b: (p, b, k, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((options.parts, batch, n_kv, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((options.parts, batch, n_kv, group), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=options.warps, num_stages=options.stages),
        interpret=options.interpret,
        name="gqa_triton_decode",
    )(length_B, q_BxKxGxH, k_BxKxSxH, v_BxKxSxH)


def _kernel(length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, scale: float, options: Options):
    group, head_dim = q_ref.shape
    rows, width, size = padded(group), padded(head_dim), options.block
    length = length_ref[0]
    row, column = jnp.arange(rows, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)[None, :]
    row_index = (row[:, None], column)
    row_mask = (row < group)[:, None] & (column < head_dim)
    q = plgpu.load(q_ref.at[row_index], mask=row_mask, other=0.0)
    precision = None
    if q.dtype == jnp.float32:  # see `gqa_jax.attention.triton.kernels`
        precision = lax.Precision.HIGHEST if options.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    first, stop = bounds.part_of_cache(pl.program_id(0), options.parts, length, size)
    whole = jnp.maximum(jnp.minimum(stop, lax.div(length, jnp.int32(size))), first)

    to_base_2 = scale * LOG2_E

    def absorb(j, state, *, masked: bool):
        largest, total, weighted = state
        key = j * size + jnp.arange(size, dtype=jnp.int32)
        index = (key[:, None], column)
        valid = jnp.broadcast_to(column < head_dim, (size, width))
        if masked:  # what lies beyond the length is not loaded: it may be NaN
            valid = valid & (key < length)[:, None]
        load = functools.partial(plgpu.load, eviction_policy="evict_first")
        if masked or width != head_dim:
            k, v = (load(ref.at[index], mask=valid, other=0.0) for ref in (k_ref, v_ref))
        else:
            k, v = (load(ref.at[index]) for ref in (k_ref, v_ref))
        products = plgpu.dot(q, k, trans_b=True, precision=precision)
        if masked:
            products = jnp.where((key < length)[None, :], products, HIDDEN)
        now = jnp.maximum(largest, products.max(axis=1))
        weights = jnp.exp2(products * to_base_2 - (now * to_base_2)[:, None])
        fade = jnp.exp2((largest - now) * to_base_2)
        product = plgpu.dot(weights.astype(v.dtype), v, precision=precision)
        return now, total * fade + weights.sum(axis=1), weighted * fade[:, None] + product

    state = (
        jnp.full((rows,), UNSEEN, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    state = lax.fori_loop(first, whole, functools.partial(absorb, masked=False), state)
    largest, total, weighted = lax.fori_loop(whole, stop, functools.partial(absorb, masked=True), state)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1.0)
    plgpu.store(out_ref.at[row_index], weighted / safe_total[:, None], mask=row_mask)
    lse = jnp.where(seen, largest * scale + jnp.log(safe_total), -jnp.inf)
    plgpu.store(lse_ref.at[row], lse, mask=row < group)
