"""Attention in plain XLA, on any platform, in O(T) memory: blocks of queries meet chunks of keys, those they can see.

Long contexts loop over blocks and chunks with a running maximum and sum (online softmax), and a block's loop ends with the
last chunk it can see. Short ones are unrolled, each block against all its keys at once: 8 blocks do 9/16 of the work of the
full form. Heads come before positions, so that each product is a plain batched matmul of contiguous matrices: on a CPU
this, more than the skipped keys, is what makes it fast.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax.attention import bounds, vjp
from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case, Mask
from gqa_jax.attention.vjp import LONGEST_UNROLLED, Kernel

SMALLEST_UNROLLED_BLOCK = 128  # smaller ones would save little work and cost compile time


class Options(NamedTuple):
    """Queries of a block and keys of a chunk. `chunk` None: blocks are unrolled, each with all the keys it can see."""

    block: int
    chunk: int | None


def choose(batch: int, length: int, n_heads: int) -> Options:
    """Tiles of logits of 4 MB at most, which stay in a CPU's cache: the fastest of 1 to 16 MB at T = 1K and 8K."""
    if length <= LONGEST_UNROLLED:
        blocks = min(8, -(-length // SMALLEST_UNROLLED_BLOCK))
        return Options(block=-(-length // blocks), chunk=None)
    chunk = 256
    fits = 2**20 // (chunk * batch * n_heads)
    return Options(block=min(256, max(64, 1 << max(fits, 1).bit_length() - 1)), chunk=chunk)


def kernel(case: Case, scale: float) -> Kernel:
    options = choose(case.batch, case.length, case.n_heads)
    return Kernel(forward, backward, scale, options, name="xla", forward_mode=True)


def attend(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, scale: float, case: Case):
    """See `gqa_jax.attention.dispatch.Implementation`."""
    both = kernel(case, scale)
    if both.options.chunk is None and mask.aligned:  # short: JAX's own gradient keeps the probabilities, which is faster
        return forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale, both.options)
    return vjp.attend(both, q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask)


def forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, scale: float, options: Options):
    """See `gqa_jax.attention.vjp.Kernel`."""
    problem = _Problem(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, options)
    dtype, accumulate = q_BxTxKxGxH.dtype, problem.accumulate

    def one_block(_, i, q_BxKxRxH):
        def absorb(state, k_BxKxCxH, v_BxKxCxH, visible, _):
            largest, total, weighted = state
            logits = scale * jnp.einsum("bkrh,bkch->bkrc", q_BxKxRxH, k_BxKxCxH, preferred_element_type=accumulate)
            logits = jnp.where(visible, logits, HIDDEN)
            now = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(axis=-1, keepdims=True)))
            weights = jnp.exp(logits - now)
            fade = jnp.exp(largest - now)
            total = total * fade + weights.sum(axis=-1, keepdims=True)
            product = jnp.einsum("bkrc,bkch->bkrh", weights.astype(dtype), v_BxKxCxH, preferred_element_type=accumulate)
            return now, total, weighted * fade + product

        column = (*q_BxKxRxH.shape[:3], 1)
        start = jnp.full(column, UNSEEN, accumulate), jnp.zeros(column, accumulate), jnp.zeros(q_BxKxRxH.shape, accumulate)
        largest, total, weighted = problem.over_chunks(i, absorb, start)
        safe_total = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, largest + jnp.log(safe_total), -jnp.inf)
        return _, ((weighted / safe_total).astype(dtype), lse[..., 0])

    _, (out_IxBxKxRxH, lse_IxBxKxR) = problem.over_blocks(one_block, (), problem.queries_to_blocks(q_BxTxKxGxH))
    return problem.blocks_to_queries(out_IxBxKxRxH), problem.blocks_to_rows(lse_IxBxKxR)


def backward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, lse_BxKxGxT, delta_BxKxGxT, d_out_BxTxKxGxH, mask, scale, options: Options):
    """See `gqa_jax.attention.vjp.Kernel`."""
    problem = _Problem(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, options)
    dtype, accumulate = q_BxTxKxGxH.dtype, problem.accumulate

    def one_block(sums, i, q_BxKxRxH, d_out_BxKxRxH, lse_BxKxR, delta_BxKxR):
        def contribute(state, k_BxKxCxH, v_BxKxCxH, visible, first_key):
            dq, dk_BxKxSxH, dv_BxKxSxH = state
            logits = scale * jnp.einsum("bkrh,bkch->bkrc", q_BxKxRxH, k_BxKxCxH, preferred_element_type=accumulate)
            p = jnp.exp(jnp.where(visible, logits, HIDDEN) - lse_BxKxR[..., None])
            dp = jnp.einsum("bkrh,bkch->bkrc", d_out_BxKxRxH, v_BxKxCxH, preferred_element_type=accumulate)
            ds = (p * (dp - delta_BxKxR[..., None])).astype(dtype)
            dq = dq + jnp.einsum("bkrc,bkch->bkrh", ds, k_BxKxCxH, preferred_element_type=accumulate)
            dk = jnp.einsum("bkrc,bkrh->bkch", ds, q_BxKxRxH, preferred_element_type=accumulate)
            dv = jnp.einsum("bkrc,bkrh->bkch", p.astype(dtype), d_out_BxKxRxH, preferred_element_type=accumulate)
            return dq, _add(dk_BxKxSxH, dk, first_key), _add(dv_BxKxSxH, dv, first_key)

        dq, *sums = problem.over_chunks(i, contribute, (jnp.zeros(q_BxKxRxH.shape, accumulate), *sums))
        return tuple(sums), (scale * dq).astype(dtype)

    zeros = jnp.zeros(problem.k_BxKxSxH.shape, accumulate)
    (dk_BxKxSxH, dv_BxKxSxH), dq_IxBxKxRxH = problem.over_blocks(
        one_block,
        (zeros, zeros),
        *(problem.queries_to_blocks(x) for x in (q_BxTxKxGxH, d_out_BxTxKxGxH)),
        *(problem.rows_to_blocks(x) for x in (lse_BxKxGxT, delta_BxKxGxT)),
    )
    dk_BxSxKxH, dv_BxSxKxH = (jnp.swapaxes(x[:, :, : problem.keys], 1, 2) for x in (scale * dk_BxKxSxH, dv_BxKxSxH))
    return problem.blocks_to_queries(dq_IxBxKxRxH), dk_BxSxKxH.astype(k_BxSxKxH.dtype), dv_BxSxKxH.astype(v_BxSxKxH.dtype)


class _Problem:
    """The operands cut up: I blocks of R = G * block rows, ordered (G, block), and chunks of C keys; ends are padded."""

    def __init__(self, q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, options: Options):
        self.batch, self.length, self.n_kv, self.group, self.head_dim = q_BxTxKxGxH.shape
        self.keys = k_BxSxKxH.shape[1]
        self.accumulate = jnp.promote_types(q_BxTxKxGxH.dtype, jnp.float32)
        self.mask = mask
        self.block = options.block
        self.chunk = options.chunk if mask.aligned else options.chunk or min(self.keys, LONGEST_UNROLLED)
        pad = 0 if self.chunk is None else -self.keys % self.chunk
        self.k_BxKxSxH, self.v_BxKxSxH = (
            jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k_BxSxKxH, v_BxSxKxH)
        )

    def over_blocks(self, one_block, carry, *arrays_I):
        """one_block(carry, i, *arrays[i]) -> carry, outputs; returns the last carry and the outputs stacked."""
        if self.chunk is not None:
            return jax.lax.scan(lambda c, x: one_block(c, *x), carry, (jnp.arange(len(arrays_I[0])), *arrays_I))
        outputs = []
        for i, arrays in enumerate(zip(*arrays_I, strict=True)):
            carry, output = one_block(carry, i, *arrays)
            outputs.append(output)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

    def over_chunks(self, i, one_chunk, state):
        """one_chunk(state, k, v, visible, first_key) -> state, over the chunks up to the last that block i can see."""
        if self.chunk is None:
            return self._at(0, bounds.keys_seen((i + 1) * self.block - 1, 0, self.keys), i, one_chunk, state)
        last, shift = jnp.minimum((i + 1) * self.block, self.length) - 1, self.mask.q_offset - self.mask.kv_offset
        n = bounds.blocks(bounds.keys_seen(last, shift, self.keys), self.chunk)
        return jax.lax.fori_loop(0, n, lambda j, s: self._at(j * self.chunk, self.chunk, i, one_chunk, s), state)

    def _at(self, first_key, size: int, i, one_chunk, state):
        k_BxKxCxH, v_BxKxCxH = (
            jax.lax.dynamic_slice_in_dim(x, first_key, size, axis=2) for x in (self.k_BxKxSxH, self.v_BxKxSxH)
        )
        t, s = i * self.block + jnp.arange(self.block), first_key + jnp.arange(size)
        # padding: queries beyond the end see what the last one sees, keys beyond it are seen by none
        seen = self.mask.visible_BxTxS(jnp.minimum(t, self.length - 1), jnp.minimum(s, self.keys - 1))
        seen = seen & (s < self.keys)[None, None]
        return one_chunk(state, k_BxKxCxH, v_BxKxCxH, jnp.tile(seen, (1, self.group, 1))[:, None], first_key)

    def queries_to_blocks(self, x_BxTxKxGxH):
        return self.rows_to_blocks(jnp.transpose(x_BxTxKxGxH, (0, 2, 3, 1, 4)))

    def rows_to_blocks(self, x_BxKxGxT):
        """(B, K, G, T, ...) to (I, B, K, R, ...)."""
        b, k, g, t, *rest = x_BxKxGxT.shape
        x = jnp.pad(x_BxKxGxT, ((0, 0), (0, 0), (0, 0), (0, -t % self.block), *((0, 0) for _ in rest)))
        x = x.reshape(b, k, g, -1, self.block, *rest)
        return jnp.moveaxis(x, 3, 0).reshape(-1, b, k, g * self.block, *rest)

    def blocks_to_rows(self, x_IxBxKxR):
        i, b, k, _, *rest = x_IxBxKxR.shape
        x = jnp.moveaxis(x_IxBxKxR.reshape(i, b, k, self.group, self.block, *rest), 0, 3)
        return x.reshape(b, k, self.group, i * self.block, *rest)[:, :, :, : self.length]

    def blocks_to_queries(self, x_IxBxKxRxH):
        return jnp.transpose(self.blocks_to_rows(x_IxBxKxRxH), (0, 3, 1, 2, 4))


def _add(sum_BxKxSxH, part_BxKxCxH, first_key):
    size = part_BxKxCxH.shape[2]
    here = jax.lax.dynamic_slice_in_dim(sum_BxKxSxH, first_key, size, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(sum_BxKxSxH, here + part_BxKxCxH, first_key, axis=2)
