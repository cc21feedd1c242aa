"""Backward pass of grouped-query attention on Hopper, in two kernels that add nothing to memory: the same result each time.

dq is gathered by units of 64 queries that walk over the keys they see, dk and dv by units of 64 keys that walk over the
queries that see them, of all query heads of the group: the sum over the group stays in float32 registers and is written once.
Seven products of matrices instead of FlashAttention-2's five (arXiv 2307.08691) pay for having no atomic additions.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from gqa_jax.attention import bounds
from gqa_jax.attention.hopper.tiles import (
    LOG2E,
    ROWS,
    Masking,
    Problem,
    columns,
    fill_rings,
    hide,
    hide_others,
    hide_transposed,
    launch,
    multiply,
    numbered_rows,
    pad,
    pinned,
    put,
    rows,
    segment_columns,
    segment_rows,
    tiled,
)
from gqa_jax.attention.spec import Mask, in_32_bits
from gqa_jax.attention.vjp import UNSEEN_LSE


@in_32_bits
def backward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, lse_BxKxGxT, delta_BxKxGxT, d_out_BxTxKxGxH, mask: Mask, scale, options):
    """See `gqa_jax.attention.vjp.Kernel`; `options` as `hopper.choose` returns them."""
    problem = Problem.of(q_BxTxKxGxH, k_BxSxKxH, mask)
    q, d_out = (pad(x, 1, ROWS) for x in (q_BxTxKxGxH, d_out_BxTxKxGxH))
    # rows past the end are rows that see no key: their weights are 0
    lse2, minus_delta = pad(lse_BxKxGxT, 3, ROWS, UNSEEN_LSE) * LOG2E, pad(-delta_BxKxGxT, 3, ROWS)
    operands = (mask, q, k_BxSxKxH, v_BxSxKxH, d_out, lse2, minus_delta)
    dq = _dq(operands, problem, scale, options.dq, options.interpret)
    dk, dv = _dkv(operands, problem, scale, options.dkv, options.interpret)
    return dq[:, : problem.length], dk[:, : problem.keys], dv[:, : problem.keys]


def _dq(operands, problem: Problem, scale, tile, interpret):
    mask, q, k, v, d_out, lse2, minus_delta = operands
    unit = tiled((tile.consumers, ROWS, problem.head_dim), q.dtype)
    ring = tiled((tile.stages, tile.block, problem.head_dim), q.dtype)
    return launch(
        functools.partial(_dq_kernel, problem=problem, scale=scale, tile=tile, interpret=interpret),
        programs=-(-problem.units // tile.consumers) * problem.n_kv * problem.batch,
        warpgroups=tile.consumers + 1,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch={
            "q_smem": unit,  # and dq's
            "d_out_smem": unit,
            "k_smem": ring,
            "v_smem": ring,
            "unit_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tile.consumers),
            "k_loaded": plgpu.Barrier(num_barriers=tile.stages),
            "v_loaded": plgpu.Barrier(num_barriers=tile.stages),
            "k_free": plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
            "v_free": plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
        },
        name="gqa_backward_dq",
        interpret=interpret,
    )(Masking.of(mask, tile.block), q, *(pad(x, 1, tile.block) for x in (k, v)), d_out, lse2, minus_delta)


def _dq_kernel(masking, *refs, problem: Problem, scale, tile, interpret, q_smem, d_out_smem, k_smem, v_smem, unit_loaded,
               k_loaded, v_loaded, k_free, v_free):  # fmt: skip
    q_ref, k_ref, v_ref, d_out_ref, lse2_ref, minus_delta_ref, dq_ref = refs
    shift = problem.shift if masking.shift is None else masking.shift[0]
    warpgroup = lax.axis_index("warpgroup")
    late, batch, head = problem.place(lax.axis_index("program"))
    first_unit = (-(-problem.units // tile.consumers) - 1 - late) * tile.consumers  # the longest walks first

    last_token = problem.unit(first_unit + tile.consumers - 1)[0] + ROWS - 1
    n_blocks = bounds.key_blocks(0, last_token, shift, problem.keys, tile.block).stop

    def load():
        def block(ref, i):
            return ref.at[batch, pl.ds(i * tile.block, tile.block), head]

        keys = k_free, lambda i: [(block(k_ref, i), k_smem, k_loaded)]
        values = v_free, lambda i: [(block(v_ref, i), v_smem, v_loaded)]
        fill_rings(tile, n_blocks, keys, values)

    def gather():
        plgpu.set_max_registers(tile.consumer_registers, action="increase")
        token, member, exists = problem.unit(first_unit + warpgroup)
        unit = pl.ds(token, ROWS)
        for source, smem in ((q_ref, q_smem), (d_out_ref, d_out_smem)):
            plgpu.copy_gmem_to_smem(source.at[batch, unit, head, member], smem.at[warpgroup], unit_loaded.at[warpgroup])
        lse2_R, minus_delta_R = (
            plgpu.load(x.at[batch, head, member, unit], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            for x in (lse2_ref, minus_delta_ref)
        )
        segments_R = segment_rows(masking.q_segments_BxT, batch, token, ROWS)
        masked_from = 0 if problem.segments else bounds.key_blocks(token, last_token, shift, problem.keys, tile.block).whole
        plgpu.barrier_wait(unit_loaded.at[warpgroup])

        def await_keys(i):
            pl.when(i < n_blocks)(lambda: plgpu.barrier_wait(k_loaded.at[lax.rem(i, tile.stages)]))

        def walk(dq_acc):
            def step(i, _, masked: bool):
                slot = lax.rem(i, tile.stages)

                def products(logits_acc, d_weights_acc):
                    multiply(logits_acc, q_smem.at[warpgroup], k_smem.at[slot].T, interpret)
                    put(d_weights_acc, rows(minus_delta_R, (ROWS, tile.block)), interpret)
                    plgpu.barrier_wait(v_loaded.at[slot])
                    multiply(d_weights_acc, d_out_smem.at[warpgroup], v_smem.at[slot].T, interpret)
                    # all but the last product are done: the logits, and what the step before added to dq
                    logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(k_free.at[lax.rem(i + tile.stages - 1, tile.stages)]))
                    if masked:
                        segments_C = segment_columns(masking.kv_segments_BxS, batch, i * tile.block, tile.block)
                        logits = hide_others(logits, segments_R, segments_C)
                        logits = hide(logits, problem.last_key(token + numbered_rows(ROWS), shift), i * tile.block)
                    weights = pinned(jnp.exp2(logits * (scale * LOG2E) - rows(lse2_R, logits.shape)))
                    # waiting here also keeps ptxas from awaiting the product before the exponentials
                    await_keys(i + 1)
                    d_weights = plgpu.wgmma_accumulator_load(d_weights_acc)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return weights * d_weights

                accumulator = plgpu.ACC((ROWS, tile.block), jnp.float32)
                d_logits = pl.run_scoped(products, accumulator, accumulator)
                multiply(dq_acc, pinned(d_logits.astype(q_ref.dtype)), k_smem.at[slot], interpret)

            await_keys(0)
            lax.fori_loop(0, masked_from, functools.partial(step, masked=False), None)
            lax.fori_loop(masked_from, n_blocks, functools.partial(step, masked=True), None)
            dq = plgpu.wgmma_accumulator_load(dq_acc)
            pl.when(n_blocks > 0)(lambda: plgpu.barrier_arrive(k_free.at[lax.rem(n_blocks + tile.stages - 1, tile.stages)]))
            return dq * scale

        dq = pl.run_scoped(walk, plgpu.ACC((ROWS, problem.head_dim), jnp.float32))
        q_smem[warpgroup] = dq.astype(q_ref.dtype)
        plgpu.commit_smem()

        @pl.when(exists)
        def _():
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], dq_ref.at[batch, unit, head, member])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(warpgroup < tile.consumers, gather, load)


def _dkv(operands, problem: Problem, scale, tile, interpret):
    mask, q, k, v, d_out, lse2, minus_delta = operands
    k, v = (pad(x, 1, tile.consumers * ROWS) for x in (k, v))
    dtype = q.dtype if tile.splits == 1 else jnp.float32
    unit = tiled((tile.consumers, ROWS, problem.head_dim), q.dtype)
    ring = tiled((tile.stages, tile.block, problem.head_dim), q.dtype)
    rows_ring = plgpu.SMEM((tile.stages, tile.block), jnp.float32)
    partial = jax.ShapeDtypeStruct((tile.splits, *k.shape), dtype)
    dk, dv = launch(
        functools.partial(_dkv_kernel, problem=problem, scale=scale, tile=tile, interpret=interpret),
        programs=k.shape[1] // (tile.consumers * ROWS) * tile.splits * problem.n_kv * problem.batch,
        warpgroups=tile.consumers + 1,
        out_type=(partial, partial),
        scratch={
            "k_smem": unit,
            "v_smem": unit,
            "out_smem": None if tile.splits == 1 else tiled((tile.consumers, ROWS, problem.head_dim), dtype),
            "q_smem": ring,
            "d_out_smem": ring,
            "lse2_smem": rows_ring,
            "minus_delta_smem": rows_ring,
            "unit_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tile.consumers),
            "q_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            "d_out_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            "free": plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
        },
        name="gqa_backward_dkv",
        interpret=interpret,
    )(Masking.of(mask, tile.consumers * ROWS), q, k, v, d_out, lse2, minus_delta)
    # in the order of the splits, so that the sum is the same each time
    return tuple(functools.reduce(jnp.add, list(x)).astype(q.dtype) for x in (dk, dv))


def _dkv_kernel(masking, *refs, problem: Problem, scale, tile, interpret, k_smem, v_smem, out_smem, q_smem, d_out_smem,
                lse2_smem, minus_delta_smem, unit_loaded, q_loaded, d_out_loaded, free):  # fmt: skip
    q_ref, k_ref, v_ref, d_out_ref, lse2_ref, minus_delta_ref, dk_ref, dv_ref = refs
    shift = problem.shift if masking.shift is None else masking.shift[0]
    warpgroup = lax.axis_index("warpgroup")
    # early keys are seen by the most queries: they are first as they lie
    place, batch, head = problem.place(lax.axis_index("program"))
    tile_number, split = lax.div(place, tile.splits), lax.rem(place, tile.splits)
    members = problem.group // tile.splits
    tile_key = tile_number * (tile.consumers * ROWS)
    first_key = tile_key + warpgroup * ROWS
    first_block, whole = bounds.query_tiles(tile_key, first_key + ROWS - 1, shift, problem.length, tile.block)
    stop = q_ref.shape[1] // tile.block
    per_member = stop - first_block
    n_steps = members * per_member

    def load():
        def blocks(i):
            member = split * members + lax.div(i, per_member)
            block = pl.ds((first_block + lax.rem(i, per_member)) * tile.block, tile.block)
            return [
                (q_ref.at[batch, block, head, member], q_smem, q_loaded),
                (lse2_ref.at[batch, head, member, block], lse2_smem, q_loaded),
                (d_out_ref.at[batch, block, head, member], d_out_smem, d_out_loaded),
                (minus_delta_ref.at[batch, head, member, block], minus_delta_smem, d_out_loaded),
            ]

        fill_rings(tile, n_steps, (free, blocks))

    def gather():
        plgpu.set_max_registers(tile.consumer_registers, action="increase")
        unit = pl.ds(first_key, ROWS)
        for source, smem in ((k_ref, k_smem), (v_ref, v_smem)):
            plgpu.copy_gmem_to_smem(source.at[batch, unit, head], smem.at[warpgroup], unit_loaded.at[warpgroup])
        segments_R = segment_rows(masking.kv_segments_BxS, batch, first_key, ROWS)
        unmasked_from = stop if problem.segments else whole
        plgpu.barrier_wait(unit_loaded.at[warpgroup])

        def await_queries(i):
            pl.when(i < n_steps)(lambda: plgpu.barrier_wait(q_loaded.at[lax.rem(i, tile.stages)]))

        def walk(dk_acc, dv_acc):
            def step(block, i, masked: bool):
                slot = lax.rem(i, tile.stages)

                def logits_of(accumulator):
                    multiply(accumulator, k_smem.at[warpgroup], q_smem.at[slot].T, interpret)
                    logits = plgpu.wgmma_accumulator_load(accumulator)
                    # with the logits, what the step before added to dk and dv is done: the queries' slot is free
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(i + tile.stages - 1, tile.stages)]))
                    return logits

                def d_logits_of(accumulator):
                    plgpu.barrier_wait(d_out_loaded.at[slot])
                    minus_delta_T = plgpu.load(minus_delta_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                    put(accumulator, columns(minus_delta_T, logits.shape), interpret)
                    multiply(accumulator, v_smem.at[warpgroup], d_out_smem.at[slot].T, interpret)
                    hidden = logits
                    if masked:
                        first_seen_by_R = first_key + numbered_rows(ROWS) - shift  # keys past the end are cut off later
                        hidden = hide_transposed(logits, first_seen_by_R, block * tile.block)
                        segments_T = segment_columns(masking.q_segments_BxT, batch, block * tile.block, tile.block)
                        hidden = hide_others(hidden, segments_R, segments_T)
                    lse2_T = plgpu.load(lse2_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                    weights = pinned(jnp.exp2(hidden * (scale * LOG2E) - columns(lse2_T, logits.shape)))
                    # waiting here also keeps ptxas from awaiting the product before the exponentials
                    await_queries(i + 1)
                    d_weights = plgpu.wgmma_accumulator_load(accumulator)
                    return weights, weights * d_weights

                accumulator = plgpu.ACC((ROWS, tile.block), jnp.float32)
                logits = pl.run_scoped(logits_of, accumulator)
                weights, d_logits = (pinned(x.astype(q_ref.dtype)) for x in pl.run_scoped(d_logits_of, accumulator))
                plgpu.commit_smem()  # lse2 and -delta are read: the TMA may overwrite them once the slot is free
                multiply(dv_acc, weights, d_out_smem.at[slot], interpret)
                multiply(dk_acc, d_logits, q_smem.at[slot], interpret)
                return i + 1

            def of_member(_, i):
                i = lax.fori_loop(first_block, unmasked_from, functools.partial(step, masked=True), i)
                return lax.fori_loop(unmasked_from, stop, functools.partial(step, masked=False), i)

            await_queries(0)
            lax.fori_loop(0, members, of_member, 0)
            dk, dv = (plgpu.wgmma_accumulator_load(x) for x in (dk_acc, dv_acc))
            pl.when(n_steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(n_steps + tile.stages - 1, tile.stages)]))
            return dk * scale, dv

        accumulator = plgpu.ACC((ROWS, problem.head_dim), jnp.float32)
        dk, dv = pl.run_scoped(walk, accumulator, accumulator)
        # once more from the CTA's number, as keeping them all along takes registers from the products
        place_out, batch_out, head_out = problem.place(pinned(lax.axis_index("program")))
        tile_out, split_out = lax.div(place_out, tile.splits), lax.rem(place_out, tile.splits)
        unit_out = pl.ds((tile_out * tile.consumers + warpgroup) * ROWS, ROWS)
        for value, smem, out_ref in ((dk, k_smem, dk_ref), (dv, v_smem, dv_ref)):
            staged = (smem if out_smem is None else out_smem).at[warpgroup]
            staged[...] = value.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out_ref.at[split_out, batch_out, unit_out, head_out])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(warpgroup < tile.consumers, gather, load)
