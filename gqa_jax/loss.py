"""Next-token cross-entropy that never holds the logits of all tokens.

The output projection and the loss are computed together, `chunk` tokens at a time, and the gradients of both in the same
pass: three matmuls as in the plain form, but chunk x V logits in memory (and in cache) instead of tokens x V.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK_LOGITS = 2**24  # logits held at once: 64 MiB in float32


def token_losses(hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """-log p(target) in nats of every token, (B, T) float32; logits are hidden @ embedding^T, accumulated in float32."""
    embedding_VxD = embedding_VxD.astype(hidden_BxTxD.dtype)
    hidden_cxCxD, targets_cxC = _chunks(hidden_BxTxD, targets_BxT, embedding_VxD.shape[0])

    def chunk(args):
        logits_CxV, _, lse_C = _logits(args[0], embedding_VxD)
        return lse_C - _pick(logits_CxV, args[1])

    return jax.lax.map(chunk, (hidden_cxCxD, targets_cxC)).reshape(-1)[: targets_BxT.size].reshape(targets_BxT.shape)


@jax.custom_vjp
def mean_loss(hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean of `token_losses` over all tokens, a float32 scalar, with a gradient for hidden states and embedding."""
    return jnp.mean(token_losses(hidden_BxTxD, embedding_VxD, targets_BxT))


@jax.named_scope("loss")
def _forward(hidden_BxTxD, embedding_VxD, targets_BxT):
    count = targets_BxT.size
    accumulate = _accumulation_dtype(hidden_BxTxD)
    narrow_VxD = embedding_VxD.astype(hidden_BxTxD.dtype)
    hidden_cxCxD, targets_cxC = _chunks(hidden_BxTxD, targets_BxT, embedding_VxD.shape[0])
    chunk_size = targets_cxC.shape[1]
    first_token_c = jnp.arange(targets_cxC.shape[0]) * chunk_size

    def chunk(carry, args):
        total, d_embedding_VxD = carry
        hidden_CxD, targets_C, first_token = args
        logits_CxV, weights_CxV, lse_C = _logits(hidden_CxD, narrow_VxD)
        real_C = first_token + jnp.arange(chunk_size) < count  # the last chunk may be padded
        total += jnp.sum(jnp.where(real_C, lse_C - _pick(logits_CxV, targets_C), 0))
        share_C = real_C.astype(accumulate) / count
        d_logits_CxV = weights_CxV * (share_C / jnp.sum(weights_CxV, axis=-1))[:, None]
        d_logits_CxV = d_logits_CxV.at[jnp.arange(chunk_size), targets_C].add(-share_C).astype(hidden_CxD.dtype)
        d_hidden_CxD = d_logits_CxV @ narrow_VxD
        d_embedding_VxD += jax.lax.dot_general(
            d_logits_CxV, hidden_CxD, (((0,), (0,)), ((), ())), preferred_element_type=accumulate
        )
        return (total, d_embedding_VxD), d_hidden_CxD

    zero = (jnp.zeros((), accumulate), jnp.zeros(embedding_VxD.shape, accumulate))
    (total, d_embedding), d_hidden = jax.lax.scan(chunk, zero, (hidden_cxCxD, targets_cxC, first_token_c))
    d_hidden = d_hidden.reshape(-1, hidden_BxTxD.shape[-1])[:count].reshape(hidden_BxTxD.shape)
    return total / count, (d_hidden, d_embedding.astype(embedding_VxD.dtype))


def _backward(residuals, cotangent):
    d_hidden, d_embedding = residuals
    return cotangent.astype(d_hidden.dtype) * d_hidden, cotangent.astype(d_embedding.dtype) * d_embedding, None


mean_loss.defvjp(_forward, _backward)


def _chunks(hidden_BxTxD, targets_BxT, vocab_size):
    """Tokens in equal chunks of at most CHUNK_LOGITS logits (a power of two of tokens), the last one zero-padded."""
    count = targets_BxT.size
    size = min(2 ** max(3, (CHUNK_LOGITS // vocab_size).bit_length() - 1), count)
    pad = -count % size
    hidden = jnp.pad(hidden_BxTxD.reshape(count, -1), ((0, pad), (0, 0)))
    targets = jnp.pad(targets_BxT.reshape(count), (0, pad))
    return hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)


def _logits(hidden_CxD, embedding_VxD):
    """Logits, exp(logits - their maximum) and log-sum-exp: one exponential per logit serves the loss and its gradient."""
    logits_CxV = jax.lax.dot_general(
        hidden_CxD, embedding_VxD, (((1,), (1,)), ((), ())), preferred_element_type=_accumulation_dtype(hidden_CxD)
    )
    largest_Cx1 = jnp.max(logits_CxV, axis=-1, keepdims=True)
    weights_CxV = jnp.exp(logits_CxV - largest_Cx1)
    return logits_CxV, weights_CxV, jnp.log(jnp.sum(weights_CxV, axis=-1)) + largest_Cx1[:, 0]


def _pick(logits_CxV, targets_C):
    return jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=1)[:, 0]


def _accumulation_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)
