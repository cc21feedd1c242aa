"""Attention written out: the O(T S) form, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gqa_jax.attention.spec import HIDDEN, UNSEEN, Case, Mask


def attend(
    q_BxTxKxGxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask: Mask, scale: float, case: Case | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, K, G, H) in q's dtype and log-sum-exp (B, K, G, T), float32 or wider; see `gqa_jax.attention.attention`."""
    accumulate = jnp.promote_types(q_BxTxKxGxH.dtype, jnp.float32)
    logits_BxKxGxTxS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k_BxSxKxH, preferred_element_type=accumulate)
    visible_BxTxS = mask.visible_BxTxS(jnp.arange(q_BxTxKxGxH.shape[1]), jnp.arange(k_BxSxKxH.shape[1]))
    visible_Bx1x1xTxS = visible_BxTxS[:, None, None]
    logits_BxKxGxTxS = jnp.where(visible_Bx1x1xTxS, logits_BxKxGxTxS, HIDDEN)
    largest = jax.lax.stop_gradient(jnp.maximum(logits_BxKxGxTxS.max(axis=-1, keepdims=True), UNSEEN))
    weights_BxKxGxTxS = jnp.exp(logits_BxKxGxTxS - largest)
    total = weights_BxKxGxTxS.sum(axis=-1, keepdims=True)
    seen = total > 0
    safe_total = jnp.where(seen, total, 1)
    probabilities_BxKxGxTxS = (weights_BxKxGxTxS / safe_total).astype(q_BxTxKxGxH.dtype)
    out_BxTxKxGxH = jnp.einsum("bkgts,bskh->btkgh", probabilities_BxKxGxTxS, v_BxSxKxH)
    lse = jnp.where(seen, largest + jnp.log(safe_total), -jnp.inf)
    return out_BxTxKxGxH, lse[..., 0]
