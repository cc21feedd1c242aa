"""Forward pass of grouped-query attention on Hopper: FlashAttention-3 (arXiv 2407.08608) in Pallas Mosaic GPU.

One warpgroup loads keys and values with the TMA into a ring of shared memory; the others each own a unit of 64 queries and
keep two products in flight: the logits of the next block of keys are issued before the weighted sum of this one, and the
softmax of the next runs while the tensor cores are at the sum. The consumers take turns at issuing, so that they don't all
do softmax at the same time.
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
    fill_rings,
    hide,
    hide_others,
    launch,
    multiply,
    numbered_rows,
    pad,
    pinned,
    put,
    rows,
    segment_columns,
    segment_rows,
    softmax_step,
    tiled,
    zeros_R,
)
from gqa_jax.attention.spec import UNSEEN, Mask, in_32_bits


@in_32_bits
def forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, scale: float, options):
    """See `gqa_jax.attention.vjp.Kernel`; `options` as `hopper.choose` returns them."""
    problem = Problem.of(q_BxTxKxGxH, k_BxSxKxH, mask)
    tile, dtype = options.forward, q_BxTxKxGxH.dtype
    q = pad(q_BxTxKxGxH, 1, ROWS)
    k, v = (pad(x, 1, tile.block) for x in (k_BxSxKxH, v_BxSxKxH))
    out, lse = launch(
        functools.partial(_kernel, problem=problem, scale=scale, tile=tile, interpret=options.interpret),
        programs=-(-problem.units // tile.consumers) * problem.n_kv * problem.batch,
        warpgroups=tile.consumers + 1,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((problem.batch, problem.n_kv, problem.group, q.shape[1]), jnp.float32),
        ),
        scratch={
            "q_smem": tiled((tile.consumers, ROWS, problem.head_dim), dtype),  # and the output's
            "k_smem": tiled((tile.stages, tile.block, problem.head_dim), dtype),
            "v_smem": tiled((tile.stages, tile.block, problem.head_dim), dtype),
            "lse_smem": plgpu.SMEM((tile.consumers, ROWS), jnp.float32),
            "q_loaded": plgpu.Barrier(num_barriers=tile.consumers),
            "k_loaded": plgpu.Barrier(num_barriers=tile.stages),
            "v_loaded": plgpu.Barrier(num_barriers=tile.stages),
            "k_free": plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
            "v_free": plgpu.Barrier(num_arrivals=tile.consumers, num_barriers=tile.stages),
            "turn": plgpu.Barrier(num_barriers=tile.consumers),
        },
        name="gqa_forward",
        interpret=options.interpret,
    )(Masking.of(mask, tile.block), q, k, v)
    return out[:, : problem.length], lse[..., : problem.length]


def _kernel(masking, q_ref, k_ref, v_ref, out_ref, lse_ref, *, problem: Problem, scale, tile, interpret, q_smem, k_smem,
            v_smem, lse_smem, q_loaded, k_loaded, v_loaded, k_free, v_free, turn):  # fmt: skip
    shift = problem.shift if masking.shift is None else masking.shift[0]
    warpgroup = lax.axis_index("warpgroup")
    late, batch, head = problem.place(lax.axis_index("program"))
    # late tokens see the most keys: they start first, for all heads, and the short ones fill up the end
    first_unit = (-(-problem.units // tile.consumers) - 1 - late) * tile.consumers

    last_token = problem.unit(first_unit + tile.consumers - 1)[0] + ROWS - 1
    # one block at least, so that the loop has a first step: hidden keys add nothing
    n_blocks = jnp.maximum(bounds.key_blocks(0, last_token, shift, problem.keys, tile.block).stop, 1)

    def load():
        def block(ref, i):
            return ref.at[batch, pl.ds((n_blocks - 1 - i) * tile.block, tile.block), head]

        keys = k_free, lambda i: [(block(k_ref, i), k_smem, k_loaded)]
        values = v_free, lambda i: [(block(v_ref, i), v_smem, v_loaded)]
        fill_rings(tile, n_blocks, keys, values)

    def attend():
        plgpu.set_max_registers(tile.consumer_registers, action="increase")
        token, member, exists = problem.unit(first_unit + warpgroup)
        unit = pl.ds(token, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, unit, head, member], q_smem.at[warpgroup], q_loaded.at[warpgroup])
        segments_R = segment_rows(masking.q_segments_BxT, batch, token, ROWS)
        masked_from = 0 if problem.segments else bounds.key_blocks(token, last_token, shift, problem.keys, tile.block).whole

        def await_turn():
            if tile.consumers > 1:
                plgpu.barrier_wait(turn.at[warpgroup])

        def pass_turn(i):
            if tile.consumers > 1:
                wanted = (warpgroup < tile.consumers - 1) | (i < n_blocks - 1)  # all but the very last
                next_one = turn.at[lax.rem(warpgroup + 1, tile.consumers)]
                pl.when(wanted)(lambda: plgpu.barrier_arrive(next_one))

        def masked_logits(i, logits, masked: bool):
            if not masked:
                return logits
            first_key = (n_blocks - 1 - i) * tile.block
            segments_C = segment_columns(masking.kv_segments_BxS, batch, first_key, tile.block)
            logits = hide_others(logits, segments_R, segments_C)
            return hide(logits, problem.last_key(token + numbered_rows(ROWS), shift), first_key)

        def absorb(out_acc):
            def first_step(logits_acc):
                plgpu.barrier_wait(k_loaded.at[0])
                pl.when(warpgroup > 0)(await_turn)
                multiply(logits_acc, q_smem.at[warpgroup], k_smem.at[0].T, interpret)
                pass_turn(0)
                logits = plgpu.wgmma_accumulator_load(logits_acc)
                plgpu.barrier_arrive(k_free.at[0])
                weights, largest, total, _ = softmax_step(
                    masked_logits(0, logits, True), zeros_R(UNSEEN), zeros_R(), scale * LOG2E
                )
                plgpu.barrier_wait(v_loaded.at[0])
                return pinned(weights.astype(q_ref.dtype)), largest, total

            def step(i, state, masked: bool):
                weights, largest, total = state
                slot, before = lax.rem(i, tile.stages), lax.rem(i - 1, tile.stages)

                def overlapped(logits_acc):
                    plgpu.barrier_wait(k_loaded.at[slot])
                    await_turn()
                    multiply(logits_acc, q_smem.at[warpgroup], k_smem.at[slot].T, interpret)
                    multiply(out_acc, weights, v_smem.at[before], interpret)
                    pass_turn(i)
                    logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    new_weights, now, sum_now, fade = softmax_step(
                        masked_logits(i, logits, masked), largest, total, scale * LOG2E
                    )
                    # waiting here also keeps ptxas from awaiting the weighted sum before the exponentials
                    plgpu.barrier_wait(v_loaded.at[slot])
                    return new_weights, now, sum_now, fade

                weights, largest, total, fade = pl.run_scoped(overlapped, plgpu.ACC((ROWS, tile.block), jnp.float32))
                out = plgpu.wgmma_accumulator_load(out_acc)
                # converted only now: the registers that the last weights were multiplied from are free, and no others needed
                weights = pinned(pinned(weights).astype(q_ref.dtype))
                plgpu.barrier_arrive(v_free.at[before])
                put(out_acc, out * rows(fade, out.shape), interpret)
                return weights, largest, total

            plgpu.barrier_wait(q_loaded.at[warpgroup])
            state = pl.run_scoped(first_step, plgpu.ACC((ROWS, tile.block), jnp.float32))
            # descending: step i is of block n_blocks - 1 - i
            unmasked_from = jnp.clip(n_blocks - masked_from, 1, n_blocks)
            state = lax.fori_loop(1, unmasked_from, functools.partial(step, masked=True), state)
            weights, largest, total = lax.fori_loop(unmasked_from, n_blocks, functools.partial(step, masked=False), state)
            last = lax.rem(n_blocks - 1, tile.stages)
            multiply(out_acc, weights, v_smem.at[last], interpret)
            out = plgpu.wgmma_accumulator_load(out_acc)
            plgpu.barrier_arrive(v_free.at[last])
            return out, largest, total

        out, largest, total = pl.run_scoped(absorb, plgpu.ACC((ROWS, problem.head_dim), jnp.float32))
        safe = jnp.where(total > 0, total, 1.0)
        lse_smem[warpgroup] = jnp.where(total > 0, largest * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        q_smem[warpgroup] = (out * rows(1 / safe, out.shape)).astype(q_ref.dtype)
        plgpu.commit_smem()

        @pl.when(exists)
        def _():
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_ref.at[batch, unit, head, member])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, member, unit])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(warpgroup < tile.consumers, attend, load)
