"""The gradient that all kernels share: what a kernel keeps of its forward pass, and what its backward pass is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gqa_jax.attention.spec import Mask

LONGEST_UNROLLED = 1024  # queries up to which `xla` is plain JAX, without the gradient below
RESULTS = ("attention_out", "attention_lse")  # names of what a rematerialisation policy may keep
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive
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
    name: str = "a kernel by itself"  # of the implementation, for errors
    forward_mode: bool = False  # whether JAX can differentiate the passes once more, in forward mode: they are plain JAX


def attend(
    kernel: Kernel, q_BxTxKxGxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp by `kernel`, differentiable in q, k and v through both, once and in reverse.

    Raises NotImplementedError where it is differentiated twice or in forward mode. Forward mode under `jax.jit` is told by
    JAX only when it compiles: a TypeError of its own.
    """
    try:
        return _attend(kernel, q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask)
    except TypeError as error:
        if "forward-mode" not in str(error):  # JAX's word for a function with a custom_vjp
            raise
        raise NotImplementedError(_has_no_derivative(kernel, "in forward mode (jvp)")) from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, q, k, v, mask):
    return kernel.forward(q, k, v, mask, kernel.scale, kernel.options)


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Under names by which a rematerialisation policy keeps them: with both, no backward pass runs the kernel again."""
    return checkpoint_name(out, RESULTS[0]), checkpoint_name(lse, RESULTS[1])


def results_saveable(prim, *_, **params) -> bool:
    """A policy of `jax.checkpoint`: the output of attention and its log-sum-exp are kept, so that its kernel runs once.

    Those of our kernels and of `cudnn`. Not of `tokamax`, whose results have no names; nor of `reference` and the short form
    of `xla`, which JAX differentiates: their probabilities are computed again.
    """
    # JAX defines the gradient of cuDNN's attention, around a pair of primitives of its own. A name put on the output would not
    # be the value that its backward pass reads, and to define the gradient anew would take JAX's private functions with all of
    # their arguments. The primitive's name is all that is needed here, as `jax.checkpoint_policies.dots_saveable` needs that of
    # cuDNN's matmul; were it to change, attention would be computed twice, and a test would say so.
    return prim.name == CUDNN_FORWARD or (prim.name == "name" and params["name"] in RESULTS)


def rows_of(out_BxTxKxGxH: jax.Array, lse_BxKxGxT: jax.Array, d_out_BxTxKxGxH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-sum-exp and delta that a backward pass is given, (B, K, G, T) float32."""
    accumulate = jnp.promote_types(out_BxTxKxGxH.dtype, jnp.float32)
    # sum over H of out * d_out is the row sum of P * dP
    delta_BxKxGxT = jnp.einsum("btkgh,btkgh->bkgt", out_BxTxKxGxH, d_out_BxTxKxGxH, preferred_element_type=accumulate)
    return jnp.where(lse_BxKxGxT == -jnp.inf, UNSEEN_LSE, lse_BxKxGxT), delta_BxKxGxT


def _forward(kernel, q, k, v, mask):
    out, lse = named(*kernel.forward(*once(kernel, q, k, v), mask, kernel.scale, kernel.options))
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(kernel, kept, cotangents):
    q, k, v, mask, out, lse = kept
    d_out, d_lse = cotangents
    q, k, v, out, lse, d_out, d_lse = once(kernel, q, k, v, out, lse, d_out, d_lse)
    finite_lse, delta = rows_of(out, lse, d_out)
    # The log-sum-exp's own cotangent enters dS as delta does. That of a row that sees no key, whose log-sum-exp is -inf, is
    # most often inf or NaN, and no element of dS is the row's: 0 times NaN would be NaN in every row of dk.
    delta = delta - jnp.where(lse == -jnp.inf, 0, d_lse)
    return (*kernel.backward(q, k, v, finite_lse, delta, d_out, mask, kernel.scale, kernel.options), None)


_attend.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def once(kernel: Kernel, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The operands of a pass, as they are. Only a second derivative differentiates a pass; what can't be is refused by name."""
    return arrays


@once.defjvp
def _second(kernel, arrays, tangents):
    if not kernel.forward_mode:
        raise NotImplementedError(_has_no_derivative(kernel, "twice"))
    return arrays, tangents


def _has_no_derivative(kernel: Kernel, how: str) -> str:
    return (
        f"attention implementation {kernel.name!r} can't be differentiated {how} here: 'reference' can, and 'xla' with offsets "
        f"that are equal ints and T up to {LONGEST_UNROLLED} (elsewhere 'xla' can in forward mode over reverse mode)"
    )
