"""Attention and its gradients in NumPy, float64: what every implementation is measured against."""

from __future__ import annotations

import numpy as np


def forward(q, k, v, *, q_offset=0, kv_offset=0, q_segments=None, kv_segments=None, scale=None):
    """Output and log-sum-exp of causal grouped-query attention.

    Args:
      q: (B, T, K, G, H) array of any dtype, taken as float64. k, v: (B, S, K, H).
      q_segments, kv_segments: (B, T) and (B, S) integers, or None.
      scale: of the logits; None is H ** -0.5.

    Returns:
      (B, T, K, G, H) and (B, K, G, T), float64. A row that sees no key is 0, its log-sum-exp -inf.
    """
    weights, total, largest, v = _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale)
    out = np.einsum("bkgts,bskh->btkgh", weights / np.where(total > 0, total, 1), v)
    with np.errstate(divide="ignore"):
        return out, np.where(total > 0, largest + np.log(total), -np.inf)[..., 0]


def gradients(q, k, v, d_out, d_lse=None, *, q_offset=0, kv_offset=0, q_segments=None, kv_segments=None, scale=None):
    """Gradients of sum(out * d_out) + sum(lse * d_lse) to q, k and v; arguments as in `forward`, d_lse (B, K, G, T) or None."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights, total, _, v = _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale)
    q, k, d_out = (np.asarray(x, np.float64) for x in (q, k, d_out))
    p = weights / np.where(total > 0, total, 1)
    d_p = np.einsum("btkgh,bskh->bkgts", d_out, v)
    inner = (p * d_p).sum(-1, keepdims=True)
    if d_lse is not None:
        inner = inner - np.asarray(d_lse, np.float64)[..., None]
    d_s = scale * p * (d_p - inner)
    return (
        np.einsum("bkgts,bskh->btkgh", d_s, k),
        np.einsum("bkgts,btkgh->bskh", d_s, q),
        np.einsum("bkgts,btkgh->bskh", p, d_out),
    )


def _weights(q, k, v, q_offset, kv_offset, q_segments, kv_segments, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("btkgh,bskh->bkgts", q, k)
    seen = (q_offset + np.arange(q.shape[1]))[:, None] >= (kv_offset + np.arange(k.shape[1]))[None, :]
    seen = np.broadcast_to(seen, (q.shape[0], *seen.shape))
    if q_segments is not None:
        seen = seen & (np.asarray(q_segments)[:, :, None] == np.asarray(kv_segments)[:, None, :])
    logits = np.where(seen[:, None, None], logits, -np.inf)
    largest = logits.max(-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(logits - largest)
    return weights, weights.sum(-1, keepdims=True), largest, v
