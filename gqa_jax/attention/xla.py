"""Attention in plain XLA, causal by blocks: the keys that a block of queries can't see are never multiplied.

Queries are cut into at most BLOCKS blocks; block i meets the keys up to its own end, so that 8 blocks do 9/16 of the work of
the full T x T form and hold a part of its logits. Heads come before positions, so that every product is a plain batched
matmul of contiguous matrices: on a CPU this, more than the skipped blocks, is what makes it fast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCKS = 8  # each is unrolled into the program: more would save little work and cost compile time
SMALLEST_BLOCK = 128


def xla(q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array) -> jax.Array:
    """See `gqa_jax.attention.attention`."""
    batch, length, n_heads, head_dim = q_BxTxNxH.shape
    n_kv = k_BxSxKxH.shape[2]
    group = n_heads // n_kv
    accumulate = jnp.promote_types(q_BxTxNxH.dtype, jnp.float32)
    q_BxKxGxTxH = jnp.transpose(q_BxTxNxH.reshape(batch, length, n_kv, group, head_dim), (0, 2, 3, 1, 4))
    k_BxKxSxH, v_BxKxSxH = (jnp.swapaxes(x, 1, 2) for x in (k_BxSxKxH, v_BxSxKxH))
    block = max(SMALLEST_BLOCK, -(-length // BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = stop - start
        q_BxKxRxH = q_BxKxGxTxH[:, :, :, start:stop].reshape(batch, n_kv, group * rows, head_dim)
        logits_BxKxRxS = head_dim**-0.5 * jnp.einsum(
            "bkrh,bksh->bkrs", q_BxKxRxH, k_BxKxSxH[:, :, :stop], preferred_element_type=accumulate
        )
        visible_CxS = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
        visible_RxS = jnp.tile(visible_CxS, (group, 1))[None, None]
        logits_BxKxRxS = jnp.where(visible_RxS, logits_BxKxRxS, -jnp.inf)
        largest = jax.lax.stop_gradient(jnp.max(logits_BxKxRxS, axis=-1, keepdims=True))
        weights_BxKxRxS = jnp.exp(logits_BxKxRxS - largest)  # divided by their sum after the product: H columns, not S
        total_BxKxRx1 = jnp.sum(weights_BxKxRxS, axis=-1, keepdims=True)
        out_BxKxRxH = jnp.einsum(
            "bkrs,bksh->bkrh",
            weights_BxKxRxS.astype(q_BxTxNxH.dtype),
            v_BxKxSxH[:, :, :stop],
            preferred_element_type=accumulate,
        )
        out_BxKxRxH = (out_BxKxRxH / total_BxKxRx1).astype(q_BxTxNxH.dtype)
        outputs.append(out_BxKxRxH.reshape(batch, n_kv, group, rows, head_dim))
    out_BxKxGxTxH = jnp.concatenate(outputs, axis=3)
    return jnp.transpose(out_BxKxGxTxH, (0, 3, 1, 2, 4)).reshape(batch, length, n_heads, head_dim)
