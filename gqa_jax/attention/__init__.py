"""Causal grouped-query attention: one signature, implementations by name.

Axes: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K queries per group, H head size.
"""

from __future__ import annotations

import difflib

import jax

from gqa_jax.attention.reference import reference
from gqa_jax.attention.xla import xla

_IMPLEMENTATIONS = {"reference": reference, "xla": xla}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for `implementation`; None asks for the best one here.

    Raises ValueError on an unknown name. Nothing else is ever run in the place of the one that was asked for.
    """
    if implementation is None:
        return "xla"
    if implementation not in _IMPLEMENTATIONS:
        close = difflib.get_close_matches(implementation, _IMPLEMENTATIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"available here: {', '.join(_IMPLEMENTATIONS)}"
        raise ValueError(f"attention implementation {implementation!r} is unknown: {hint}")
    return implementation


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Causal attention of grouped queries, scaled by 1/sqrt(H): softmax(q k^T / sqrt(H)) v.

    Args:
      q: (B, T, N, H) queries, N a multiple of K; query head n reads key/value head n // (N / K).
      k: (B, S, K, H) keys, S = T.
      v: (B, S, K, H) values.
      implementation: a name, or None for the best one here.

    Returns:
      (B, T, N, H) in q's dtype; logits and softmax are float32 (float64 for float64 input).

    Raises:
      ValueError: shapes or dtypes that don't fit together, or an unknown implementation, before anything is traced.
    """
    _check(q, k, v)
    return _IMPLEMENTATIONS[resolve(implementation)](q, k, v)


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape} {q.dtype}, k {k.shape} {k.dtype}, v {v.shape} {v.dtype}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q (B, T, N, H) and k, v (B, S, K, H); got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must have the same batch and head size; got {shapes}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs as many keys as queries (S = T); got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key/value heads; got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {shapes}")
