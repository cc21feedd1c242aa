"""The backward pass on TPUs, one kernel for dQ, dK and dV: five products a block (`gqa_jax.attention.tpu.layout`).

Key blocks are the outer loop. dK^T and dV^T of a block gather in VMEM, in float32, over all query tiles and heads of the
group that see it. dQ^T of a tile is a float32 array in HBM that each visit reads, adds to and writes back by DMA, in a fixed
order, under the cover of the block's arithmetic: O(T) memory, and the same bits in every run.

With S^T = K Q^T and dP^T = V dO^T in (keys, queries), P^T = exp(S^T - lse) and dS^T = P^T * (dP^T - delta):
dV^T = dO^T P, dK^T = Q^T dS, dQ^T = K^T dS^T, each streaming only H rows past a stationary P or dS.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqa_jax.attention.spec import Mask, in_32_bits
from gqa_jax.attention.tpu import layout
from gqa_jax.attention.tpu.layout import LOG2_E, PART, Options, Problem, Steps, Visibility, dot, strip_of
from gqa_jax.attention.vjp import UNSEEN_LSE

SLOT, PREVIOUS, UNWRITTEN, WORDS = 0, 1, 2, 4  # scalars kept between steps; UNWRITTEN is one for each of two slots


@in_32_bits
def backward(
    q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, lse_BxKxGxT, delta_BxKxGxT, d_out_BxTxKxGxH, mask: Mask, scale, options: Options
):
    """See `gqa_jax.attention.vjp.Kernel`."""
    batch_size, _, n_kv, group, _ = q_BxTxKxGxH.shape
    share = layout.share(batch_size * n_kv, group, options.cores)
    cut = layout.cut(q_BxTxKxGxH, k_BxSxKxH, options.backward, share)
    problem = Problem(cut, mask)
    groups = cut.head_groups // share.heads  # tiles of heads that a core does of a key/value head
    per_core = Steps(
        cut.key_blocks // share.keys, lambda n: _visits(problem.bounds(()), n * share.keys, groups),
        longest=cut.query_tiles * groups, folded=problem.folded,
    )  # fmt: skip

    def at(x, r, s, scalars):
        """Key block, query tile, index of the tile's heads in q and in dq, and the flags of `Steps.at`."""
        bounds = problem.bounds(scalars)
        mine = lax.rem(x, share.keys)
        n, step, *flags = per_core.at(r, s, lambda n: _visits(bounds, n * share.keys + mine, groups))
        j = n * share.keys + mine
        i = jnp.minimum(bounds.first_query_tile(j) + lax.div(step, groups), cut.query_tiles - 1)
        group = lax.rem(step, groups)
        return j, i, lax.div(x, share.keys) * groups + group, x * groups + group, flags

    def kv(x):
        return lax.div(x, share.keys * share.heads)

    def batch(x):
        return lax.div(kv(x), cut.n_kv)

    def queries(*middle):
        def index(x, r, s, *scalars):
            _, i, heads, _, _ = at(x, r, s, scalars)
            return (heads, *middle, i)

        return index

    def keys_in_lanes(x, r, s, *scalars):
        return kv(x), 0, at(x, r, s, scalars)[0]

    def sums(x, r, s, *scalars):  # each share of the heads has its own sums over queries
        return lax.div(x, share.keys), 0, at(x, r, s, scalars)[0]

    tile, block, head_dim = cut.tokens, cut.tiles.keys, cut.head_dim
    lse = jnp.where(lse_BxKxGxT == UNSEEN_LSE, UNSEEN_LSE, LOG2_E * lse_BxKxGxT)
    query_tile = pl.BlockSpec((None, cut.heads, head_dim, tile), queries(0, 0))
    query_rows = pl.BlockSpec((None, cut.heads, tile), queries(0))
    key_rows = pl.BlockSpec((None, block, head_dim), lambda x, r, s, *c: (kv(x), at(x, r, s, c)[0], 0))
    operands = [
        layout.queries_minor(q_BxTxKxGxH, cut),
        layout.queries_minor(d_out_BxTxKxGxH, cut),
        layout.rows_minor(lse, cut, UNSEEN_LSE),
        layout.rows_minor(delta_BxKxGxT, cut, 0.0),
        layout.keys_major(k_BxSxKxH, cut),
        layout.keys_major(v_BxSxKxH, cut),
        layout.keys_minor(k_BxSxKxH, cut),
    ]
    in_specs = [
        query_tile, query_tile, query_rows, query_rows, key_rows, key_rows,
        pl.BlockSpec((None, head_dim, block), keys_in_lanes),
    ]  # fmt: skip
    if problem.segments is not None:
        operands += problem.segments
        in_specs += [
            pl.BlockSpec((None, 1, tile), lambda x, r, s, *c: (batch(x), 0, at(x, r, s, c)[1])),
            pl.BlockSpec((None, 1, block), lambda x, r, s, *c: (batch(x), 0, at(x, r, s, c)[0])),
        ]
    x_cores = cut.batch * cut.n_kv * share.heads * share.keys
    dq_shape = (x_cores * groups, cut.heads, head_dim, cut.padded_length)
    operands.append(jnp.zeros(dq_shape, jnp.float32))
    in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    sums_shape = (cut.batch * cut.n_kv * share.heads, head_dim, cut.padded_keys)
    sums_dtype = k_BxSxKxH.dtype if share.heads == 1 else jnp.float32
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, problem=problem, at=at, batch=batch, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(problem.scalars),
            grid=(x_cores, per_core.rows, per_core.steps),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, head_dim, block), sums),
                pl.BlockSpec((None, head_dim, block), sums),
            ],
            scratch_shapes=[
                pltpu.VMEM((head_dim, block), jnp.float32),
                pltpu.VMEM((head_dim, block), jnp.float32),
                pltpu.VMEM((head_dim, cut.tiles.rows), jnp.float32),
                pltpu.VMEM((2, cut.heads, head_dim, tile), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((WORDS,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(dq_shape, jnp.float32),
            jax.ShapeDtypeStruct(sums_shape, sums_dtype),
            jax.ShapeDtypeStruct(sums_shape, sums_dtype),
        ],
        input_output_aliases={len(problem.scalars) + len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=layout.cost(problem, q_BxTxKxGxH.dtype, products=5),
        interpret=options.interpret,
        name="gqa_backward",
    )(*problem.scalars, *operands)
    dq = dq.reshape(-1, share.keys, groups, *dq_shape[1:]).sum(axis=1) if share.keys > 1 else dq
    dk, dv = (x.reshape(-1, share.heads, *x.shape[1:]).sum(axis=1) if share.heads > 1 else x for x in (dk, dv))
    dtype = k_BxSxKxH.dtype
    return layout.queries_back((scale * dq).astype(dtype), cut), *(layout.keys_back(x.astype(dtype), cut) for x in (dk, dv))


def _visits(bounds: layout.Bounds, j, groups: int):
    """Steps of key block j: the query tiles that see it, for each group of heads."""
    return (bounds.cut.query_tiles - bounds.first_query_tile(j)) * groups


def _kernel(*refs, problem: Problem, at, batch, scale: float):
    """One step: a block of keys meets a tile of queries. Logits are in units of log 2: exp2 takes them."""
    cut = problem.cut
    tiles = cut.tiles
    scalars, refs = refs[: len(problem.scalars)], refs[len(problem.scalars) :]
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, k_lanes_ref, *refs = refs
    segment_refs, refs = refs[:-10], refs[-10:]
    _, dq_hbm, dk_ref, dv_ref, dk_sum, dv_sum, dq_sum, buffers, semaphores, kept = refs
    x, r, s = (pl.program_id(axis) for axis in range(3))
    j, i, _, dq_index, (active, first, last) = at(x, r, s, scalars)
    bounds = problem.bounds(scalars)
    may_meet, in_one = problem.segment_facts(scalars, batch(x), i, j)
    active &= may_meet
    dq_tile = dq_hbm.at[dq_index, :, :, pl.ds(pl.multiple_of(i * cut.tokens, cut.tokens), cut.tokens)]

    def finish_write(slot):
        @pl.when(kept[UNWRITTEN + slot] == 1)
        def _():
            pltpu.make_async_copy(buffers.at[slot], dq_tile, semaphores.at[1, slot]).wait()
            kept[UNWRITTEN + slot] = 0

    @pl.when((r == 0) & (s == 0))
    def _():
        kept[SLOT] = kept[UNWRITTEN] = kept[UNWRITTEN + 1] = 0
        kept[PREVIOUS] = -1

    @pl.when(first)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def contribute(first_key, n_keys: int, visibility: Visibility | None):
        """Adds to dk_sum and dv_sum, and to dq_sum, which the first group of chunks overwrites where all is visible."""
        n_strips = tiles.rows // tiles.strip
        groups = [
            range(n, min(n + tiles.together * tiles.chunk, n_keys), tiles.chunk)
            for n in range(0, n_keys, tiles.together * tiles.chunk)
        ]
        pieces = [(group, strip, key) for group in groups for strip in range(n_strips) for key in group]
        products, dk, dv, dq = {}, {}, {}, None
        for n in range(len(pieces) + tiles.ahead):
            if n < len(pieces):
                _, strip, key = pieces[n]
                rows = pl.ds(first_key + key, tiles.chunk)
                products[n] = (
                    dot(k_ref[rows, :], strip_of(q_ref, strip, cut), 1, 0),
                    dot(v_ref[rows, :], strip_of(d_out_ref, strip, cut), 1, 0),
                )
            if n < tiles.ahead:
                continue
            group, strip, key = pieces[n - tiles.ahead]
            keys, lanes = pl.ds(first_key + key, tiles.chunk), slice(strip * tiles.strip, (strip + 1) * tiles.strip)
            scores, dp = products.pop(n - tiles.ahead)
            logits = (scale * LOG2_E) * scores
            if visibility is not None:
                logits = visibility.hide(logits, strip, key)
            p = jnp.exp2(logits - strip_of(lse_ref, strip, cut))
            ds = (p * (dp - strip_of(delta_ref, strip, cut))).astype(k_ref.dtype)
            dq_part = dot(k_lanes_ref[:, keys], ds, 1, 0)
            dk_part = dot(strip_of(q_ref, strip, cut), ds, 1, 1)
            dv_part = dot(strip_of(d_out_ref, strip, cut), p.astype(k_ref.dtype), 1, 1)
            dq = dq_part if key == group[0] else dq + dq_part
            if key == group[-1]:
                if visibility is None and key < tiles.together * tiles.chunk:
                    dq_sum[:, lanes] = dq
                else:
                    dq_sum[:, lanes] += dq
            dk[key] = dk_part if strip == 0 else dk[key] + dk_part
            dv[key] = dv_part if strip == 0 else dv[key] + dv_part
            if strip == n_strips - 1:
                dk_sum[:, keys] += dk.pop(key)
                dv_sum[:, keys] += dv.pop(key)

    @pl.when(active)
    def _():
        slot, tile_id = kept[SLOT], dq_index * cut.query_tiles + i
        finish_write(slot)

        @pl.when(kept[PREVIOUS] == tile_id)  # what the last step writes is what this one reads
        def _():
            finish_write(1 - slot)

        read = pltpu.make_async_copy(dq_tile, buffers.at[slot], semaphores.at[0, slot])
        read.start()
        all_visible = bounds.all_visible(i, j) & in_one

        @pl.when(all_visible)
        def _():
            contribute(0, tiles.keys, None)

        @pl.when(~all_visible)
        def _():
            part = math.gcd(PART, tiles.keys)
            dq_sum[...] = jnp.zeros_like(dq_sum)

            def one_part(n, _):
                first_key = pl.multiple_of(n * part, part)
                contribute(first_key, part, Visibility(cut, i, j, bounds.shift, first_key, *segment_refs))

            lax.fori_loop(0, bounds.parts_seen(i, j, part), one_part, None)

        read.wait()
        for head in range(cut.heads):
            buffers[slot, head] += dq_sum[:, head * cut.tokens : (head + 1) * cut.tokens]
        pltpu.make_async_copy(buffers.at[slot], dq_tile, semaphores.at[1, slot]).start()
        kept[UNWRITTEN + slot], kept[SLOT], kept[PREVIOUS] = 1, 1 - slot, tile_id

    @pl.when(last)
    def _():
        dk_ref[...] = (scale * dk_sum[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when((r == pl.num_programs(1) - 1) & (s == pl.num_programs(2) - 1))
    def _():
        finish_write(0)
        finish_write(1)
