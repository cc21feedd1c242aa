"""Next-token cross-entropy that never holds the logits of all tokens.

The output projection and the loss are computed together, a chunk of tokens at a time, and the gradients of both in the same
pass: three matmuls as in the plain form, but chunk x V logits in memory (and in cache) instead of tokens x V. The gradient of
the hidden states is written over them, so that a program that gives them up (donated, or made within it) holds them once.

Axes beside those of gqa_jax.model: P all B x T tokens, C tokens of a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gqa_jax.attention.spec import target
from gqa_jax.collectives import reduce_scatter

# Logits held at once. On an accelerator, adding few tokens at a time to the embedding's gradient takes longer than the matmuls:
# by the compiler's schedule at V = 50,304 and D = 1,536, chunks of 256, 512, 1,024 and 2,048 tokens take 9,800, 6,200, 6,000
# and 5,600 cycles a token on a v5e, 4,900, 3,600, 2,600 and 2,300 on a v6e. A CPU is fastest with few tokens.
CHUNK_LOGITS = 2**26  # 256 MiB in float32
CHUNK_LOGITS_CPU = 2**24


def token_losses(hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """-log p(target) in nats of every token, (B, T) float32; logits are hidden @ embedding^T, accumulated in float32."""
    embedding_VxD = embedding_VxD.astype(hidden_BxTxD.dtype)
    hidden_PxD, targets_P = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]), targets_BxT.reshape(-1)
    chunks, size = _chunks(targets_P.size, embedding_VxD.shape[0])

    def chunk(i, losses_P):
        start = jnp.minimum(i * size, targets_P.size - size)
        hidden_CxD, targets_C = (lax.dynamic_slice_in_dim(x, start, size) for x in (hidden_PxD, targets_P))
        logits_CxV, _, lse_C = _logits(hidden_CxD, embedding_VxD)
        losses_C = lse_C - _pick(logits_CxV, _hits(targets_C, embedding_VxD))
        return lax.dynamic_update_slice_in_dim(losses_P, losses_C, start, 0)

    losses_P = jnp.zeros(targets_P.shape, _accumulation_dtype(hidden_PxD))
    return lax.fori_loop(0, chunks, chunk, losses_P).reshape(targets_BxT.shape)


def mean_loss(hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean of `token_losses` over all tokens, a float32 scalar, with a gradient for hidden states and embedding."""
    return mean_loss_of_shard(embedding_VxD, embedding_VxD, hidden_BxTxD, targets_BxT, ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mean_loss_of_shard(
    shard_VxD: jax.Array, whole_VxD: jax.Array, hidden_BxTxD: jax.Array, targets_BxT: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    """`mean_loss` by the whole embedding, with a gradient for hidden states and this device's shard of it.

    The shard is cut over the mesh axes `axes` along D: gradients of the whole are summed over them, in float32 at least.
    """
    return jnp.mean(token_losses(hidden_BxTxD, whole_VxD, targets_BxT))


@jax.named_scope("loss")
def loss_and_gradients(
    hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, and its gradients for the hidden states, in their dtype, and for the embedding, in float32 or wider."""
    count, accumulate = targets_BxT.size, _accumulation_dtype(hidden_BxTxD)
    narrow_VxD, targets_P = embedding_VxD.astype(hidden_BxTxD.dtype), targets_BxT.reshape(-1)
    chunks, size = _chunks(count, embedding_VxD.shape[0])

    def chunk(i, carry):
        total, features_PxD, d_embedding_VxD = carry  # features: hidden states, their gradient where chunks are done
        start = jnp.minimum(i * size, count - size)
        hidden_CxD, targets_C = (lax.dynamic_slice_in_dim(x, start, size) for x in (features_PxD, targets_P))
        hidden_CxD = lax.optimization_barrier(hidden_CxD)  # read once, before it is written over: else CPUs copy all of it
        new_C = start + jnp.arange(size) >= i * size  # the last chunk may reach back into the one before it
        logits_CxV, weights_CxV, lse_C = _logits(hidden_CxD, narrow_VxD)
        hits_CxV = _hits(targets_C, narrow_VxD)
        total += jnp.sum(jnp.where(new_C, lse_C - _pick(logits_CxV, hits_CxV), 0))
        share_C = new_C.astype(accumulate) / count
        d_logits_CxV = weights_CxV * (share_C / jnp.sum(weights_CxV, axis=-1))[:, None]
        d_logits_CxV = (d_logits_CxV - jnp.where(hits_CxV, share_C[:, None], 0)).astype(hidden_CxD.dtype)
        d_hidden_CxD = jnp.where(new_C[:, None], d_logits_CxV @ narrow_VxD, hidden_CxD)
        d_embedding_VxD += lax.dot_general(
            d_logits_CxV, hidden_CxD, (((0,), (0,)), ((), ())), preferred_element_type=accumulate
        )
        return total, lax.dynamic_update_slice_in_dim(features_PxD, d_hidden_CxD, start, 0), d_embedding_VxD

    first = (
        jnp.zeros((), accumulate),
        hidden_BxTxD.reshape(count, -1),
        jnp.zeros(embedding_VxD.shape, accumulate),
    )
    total, d_hidden_PxD, d_embedding_VxD = lax.fori_loop(0, chunks, chunk, first)
    return total / count, d_hidden_PxD.reshape(hidden_BxTxD.shape), d_embedding_VxD


def _forward(shard_VxD, whole_VxD, hidden_BxTxD, targets_BxT, axes):
    mean, d_hidden_BxTxD, d_whole_VxD = loss_and_gradients(hidden_BxTxD, whole_VxD, targets_BxT)
    return mean, (reduce_scatter(d_whole_VxD, axes, 1).astype(shard_VxD.dtype), d_hidden_BxTxD)


def _backward(axes, gradients, cotangent):
    d_shard_VxD, d_hidden_BxTxD = ((cotangent * x).astype(x.dtype) for x in gradients)
    return d_shard_VxD, None, d_hidden_BxTxD, None


mean_loss_of_shard.defvjp(_forward, _backward)


def _chunks(count: int, vocab_size: int) -> tuple[int, int]:
    """Number of chunks and their tokens, a power of two where there are enough; chunks overlap where they don't divide."""
    logits = CHUNK_LOGITS_CPU if target()[0] == "cpu" else CHUNK_LOGITS
    size = min(2 ** max(3, (logits // vocab_size).bit_length() - 1), count)
    return -(-count // size), size


def _logits(hidden_CxD, embedding_VxD):
    """Logits, exp(logits - their maximum) and log-sum-exp: one exponential per logit serves the loss and its gradient."""
    logits_CxV = lax.dot_general(
        hidden_CxD, embedding_VxD, (((1,), (1,)), ((), ())), preferred_element_type=_accumulation_dtype(hidden_CxD)
    )
    largest_Cx1 = jnp.max(logits_CxV, axis=-1, keepdims=True)
    weights_CxV = jnp.exp(logits_CxV - largest_Cx1)
    return logits_CxV, weights_CxV, jnp.log(jnp.sum(weights_CxV, axis=-1)) + largest_Cx1[:, 0]


def _hits(targets_C, embedding_VxD):
    """True at each token's target: compared, not indexed, so that it is part of the loops over logits (TPUs: 1.2x)."""
    return targets_C[:, None] == jnp.arange(embedding_VxD.shape[0], dtype=targets_C.dtype)[None]


def _pick(logits_CxV, hits_CxV):
    return jnp.sum(jnp.where(hits_CxV, logits_CxV, 0), axis=-1)


def _accumulation_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)
