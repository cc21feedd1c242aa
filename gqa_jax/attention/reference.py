"""Attention written out: the O(T S) form that every kernel is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference(q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array) -> jax.Array:
    """See `gqa_jax.attention.attention`. Keys and values are never repeated: queries are viewed as (K, G)."""
    batch, length, n_heads, head_dim = q_BxTxNxH.shape
    n_kv = k_BxSxKxH.shape[2]
    accumulate = jnp.promote_types(q_BxTxNxH.dtype, jnp.float32)
    q_BxTxKxGxH = q_BxTxNxH.reshape(batch, length, n_kv, n_heads // n_kv, head_dim)
    logits_BxKxGxTxS = jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k_BxSxKxH, preferred_element_type=accumulate)
    causal_TxS = jnp.tril(jnp.ones((length, k_BxSxKxH.shape[1]), dtype=bool))
    logits_BxKxGxTxS = jnp.where(causal_TxS, logits_BxKxGxTxS * head_dim**-0.5, -jnp.inf)
    weights_BxKxGxTxS = jax.nn.softmax(logits_BxKxGxTxS, axis=-1).astype(q_BxTxNxH.dtype)
    out_BxTxKxGxH = jnp.einsum("bkgts,bskh->btkgh", weights_BxKxGxTxS, v_BxSxKxH)
    return out_BxTxKxGxH.reshape(batch, length, n_heads, head_dim)
