"""The gradient that all kernels share: what a kernel keeps of its forward pass, and what its backward pass is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gqa_jax.attention.masks import Mask

UNSEEN_LSE = 1e30  # a backward pass is given this for a row that saw no key: all its probabilities come out 0


class Kernel(NamedTuple):
    """A pair of passes and what is fixed while tracing. With P = exp(scale q k^T - lse) where visible, else 0:

    forward(q, k, v, mask, scale, options) -> out = P v (B, T, K, G, H) in q's dtype, lse (B, K, G, T) float32, natural,
      -inf where a row sees no key (and out is 0 there);
    backward(q, k, v, lse, delta, d_out, mask, scale, options) -> dq, dk, dv in the dtypes of q, k, v, where
      dS = P * (d_out v^T - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T d_out, both summed over the group in float32.
    Shapes: q, out, d_out (B, T, K, G, H); k, v (B, S, K, H); lse, delta (B, K, G, T) float32. Any T and S.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    scale: float
    options: Any  # hashable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernel: Kernel, q_BxTxKxGxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp by `kernel`, differentiable in q, k and v through both."""
    return kernel.forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, kernel.scale, kernel.options)


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Under names by which a rematerialisation policy keeps them: with both, no backward pass runs the kernel again."""
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def rows_of(out_BxTxKxGxH: jax.Array, lse_BxKxGxT: jax.Array, d_out_BxTxKxGxH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-sum-exp and delta that a backward pass is given, (B, K, G, T) float32."""
    accumulate = jnp.promote_types(out_BxTxKxGxH.dtype, jnp.float32)
    # sum over H of out * d_out is the row sum of P * dP
    delta_BxKxGxT = jnp.einsum("btkgh,btkgh->bkgt", out_BxTxKxGxH, d_out_BxTxKxGxH, preferred_element_type=accumulate)
    return jnp.where(lse_BxKxGxT == -jnp.inf, UNSEEN_LSE, lse_BxKxGxT), delta_BxKxGxT


def _forward(kernel, q, k, v, mask):
    out, lse = named(*kernel.forward(q, k, v, mask, kernel.scale, kernel.options))
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(kernel, kept, cotangents):
    q, k, v, mask, out, lse = kept
    d_out, d_lse = cotangents
    finite_lse, delta = rows_of(out, lse, d_out)
    # the log-sum-exp's own cotangent enters dS as delta does
    return (*kernel.backward(q, k, v, finite_lse, delta - d_lse, d_out, mask, kernel.scale, kernel.options), None)


attend.defvjp(_forward, _backward)
