"""The public functions: shapes checked, an implementation chosen, its result returned in the caller's form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_jax.attention import dispatch
from gqa_jax.attention.cache import DTYPES, ROWS, Cache, empty
from gqa_jax.attention.dispatch import resolve
from gqa_jax.attention.spec import Case, Mask


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: str | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_offset: int | jax.Array = 0,
    kv_offset: int | jax.Array = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of grouped queries: softmax(scale q k^T) v over the keys that a query sees.

    Query t sees key s when q_offset + t >= kv_offset + s and, with segments, when theirs are equal. Keys and values are never
    repeated. Differentiable in q, k and v, through the log-sum-exp too: once and in reverse. Twice, and in forward mode:
    `reference`, and `xla` with equal int offsets and T up to 1024.

    Logits must be greater than about -1e20: a key of a smaller one counts as not seen.

    Args:
      q: (B, T, N, H) queries, N a multiple of K; head n reads key/value head n // (N / K). Or (B, T, K, G, H).
      k: (B, S, K, H) keys. v: (B, S, K, H) values. All of one dtype: bfloat16 or float32 (others: `reference`, `xla`).
      implementation: a name, or None for the best one for this platform and case (`gqa_jax.attention.dispatch`).
      segment_ids: (B, T) integers of 32 bits, documents of a packed sequence; with S != T or offsets a pair, (B, T) and (B, S).
      q_offset, kv_offset: positions of the first query and key, ints or int32 scalars. S != T needs them. Equal ints are the
        usual causal mask, of which kernels leave out what is hidden; an array is known only when the program runs.
      scale: of the logits; None is H ** -0.5.
      return_lse: also return the log-sum-exp of each query's logits, natural, (B, T, N) (or (B, T, K, G)), float32:
        parts over disjoint keys merge by it. -inf where a query sees no key; its output is 0.

    Returns:
      The output in q's shape and dtype, and with return_lse the log-sum-exp. Logits and softmax are float32 (float64 for
      float64 input).

    Raises:
      ValueError: shapes, dtypes or offsets that don't fit together, an implementation that is unknown or can't run this
        case here, before anything is traced.
      NotImplementedError: a derivative that the implementation has not, where it is taken.
    """
    check(q, k, v, segment_ids, q_offset, kv_offset, scale)
    batch, length, *heads, head_dim = q.shape
    n_kv = k.shape[2]
    q_BxTxKxGxH = q if q.ndim == 5 else q.reshape(batch, length, n_kv, q.shape[2] // n_kv, head_dim)
    scale = head_dim**-0.5 if scale is None else float(scale)
    q_segments, kv_segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    mask = Mask(_position(q_offset), _position(kv_offset), ids_of(q_segments), ids_of(kv_segments))
    case = Case.of(q_BxTxKxGxH, k, mask, return_lse=return_lse)
    name = resolve(implementation, case)
    out_BxTxKxGxH, lse_BxKxGxT = dispatch.attend(name, q_BxTxKxGxH, k, v, mask, scale, case)
    out = out_BxTxKxGxH.reshape(q.shape)
    if not return_lse:
        return out
    return out, jnp.transpose(lse_BxKxGxT, (0, 3, 1, 2)).reshape(batch, length, *heads)


def new_cache(
    batch: int,
    keys: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    dtype: Any,
    *,
    cache_dtype: Any = None,
    implementation: str | None = None,
) -> Cache:
    """An empty cache of one layer, laid out as the implementation reads it that `decode` will take.

    Args:
      keys: S, entries of each sequence that there is room for; on TPUs a multiple of 128, else it is padded to one.
      n_heads, n_kv_heads, head_dim: of the attention.
      dtype: of the queries.
      cache_dtype: float32, bfloat16, float16 or int8 (a scale for each position and head); None: `dtype`.
      implementation: a name, or None for the best one here, as in `decode`.

    Raises:
      ValueError: an implementation that is unknown or doesn't read such a cache here.
    """
    name = cache_dtype if isinstance(cache_dtype, str) else jnp.dtype(dtype if cache_dtype is None else cache_dtype).name
    if name not in DTYPES:
        raise ValueError(f"a cache can't be of {name}: use {', '.join(DTYPES)}")
    held = jnp.dtype(name)
    case = _decode_case(batch, keys, n_heads, n_kv_heads, head_dim, dtype, held)
    return empty(dispatch.get(resolve(implementation, case)).layout_of(case), batch, keys, n_kv_heads, head_dim, held)


def cache_of(k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array) -> Cache:
    """Keys and values at hand as a cache, as they lie: most implementations read another layout, and copy for each call."""
    if k_BxSxKxH.ndim != 4 or k_BxSxKxH.shape != v_BxSxKxH.shape or k_BxSxKxH.dtype != v_BxSxKxH.dtype:
        raise ValueError(
            f"a cache takes k and v (B, S, K, H) of one dtype; got k {k_BxSxKxH.shape} {k_BxSxKxH.dtype}, "
            f"v {v_BxSxKxH.shape} {v_BxSxKxH.dtype}"
        )
    if not jnp.issubdtype(k_BxSxKxH.dtype, jnp.floating):
        raise ValueError(f"a cache of arrays must be floating; got {k_BxSxKxH.dtype}: `new_cache` makes quantised ones")
    return Cache(k_BxSxKxH, v_BxSxKxH, None, None, ROWS)


def decode(
    q: jax.Array,
    cache: Cache,
    length: int | jax.Array,
    *,
    implementation: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v over the first `length` entries of each sequence's cache; not differentiable.

    Args:
      q: (B, N, H) queries, N a multiple of K; head n reads key/value head n // (N / K). Or (B, K, G, H).
      cache: what `new_cache` made and `Cache.append` filled, or `cache_of` arrays. Entries from `length` on may hold anything,
        NaN too.
      length: valid entries, an integer or int (B,), possibly traced; a `jax.Array` is taken to be within 0 and S.
      implementation: a name, or None for the best one for this platform and case (`gqa_jax.attention.dispatch`).
      scale: of the logits; None is H ** -0.5.
      return_lse: also return the natural log-sum-exp of the logits, (B, N) (or (B, K, G)), float32: results over disjoint
        parts of a cache merge by it. -inf where length is 0; the output is 0 there.

    Raises:
      ValueError: as in `attention`, before anything is traced.
    """
    _check_decode(q, cache, length, scale)
    batch, keys, n_kv, head_dim = cache.batch, cache.keys, cache.n_kv_heads, cache.head_dim
    q_BxKxGxH = q.reshape(batch, n_kv, -1, head_dim)
    scale = head_dim**-0.5 if scale is None else float(scale)
    case = _decode_case(batch, keys, n_kv * q_BxKxGxH.shape[2], n_kv, head_dim, q.dtype, cache.dtype)
    case = case._replace(return_lse=return_lse)
    length_B = jnp.broadcast_to(jnp.clip(jnp.asarray(length, jnp.int32), 0, keys), (batch,))
    name = resolve(implementation, case)
    out_BxKxGxH, lse_BxKxG = dispatch.decode(name, q_BxKxGxH, cache, length_B, scale, case)
    out = out_BxKxGxH.astype(q.dtype).reshape(q.shape)
    return (out, lse_BxKxG.reshape(q.shape[:-1])) if return_lse else out


def _decode_case(batch, keys, n_heads, n_kv_heads, head_dim, dtype, cache_dtype) -> Case:
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    case = Case.planned(batch=batch, length=1, keys=keys, **sizes, dtype=dtype, aligned=False)
    return case._replace(decode=True, cache_dtype=jnp.dtype(cache_dtype))


def _position(offset: int | np.integer | jax.Array) -> int | jax.Array:
    """An offset as masks have it: what is known while tracing a Python int, the rest int32."""
    if isinstance(offset, (np.integer, np.ndarray)):
        return int(offset)
    return offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)


def ids_of(segments: jax.Array | None) -> jax.Array | None:
    """Segment ids, checked, as the int32 that masks have."""
    return None if segments is None else jnp.asarray(segments, jnp.int32)


def check(q, k, v, segment_ids, q_offset, kv_offset, scale) -> None:
    """Raises ValueError where arguments of `attention` don't fit together."""
    shapes = f"q {q.shape} {q.dtype}, k {k.shape} {k.dtype}, v {v.shape} {v.dtype}"
    if q.ndim not in (4, 5) or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q (B, T, N, H) or (B, T, K, G, H) and k, v (B, S, K, H); got {shapes}")
    _check_heads(q, k.shape, heads_axis=2, grouped=q.ndim == 5, shapes=shapes)
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"queries, keys and values must have one floating dtype; got {shapes}")
    offsets_given = any(not isinstance(offset, int) or offset != 0 for offset in (q_offset, kv_offset))
    if q.shape[1] != k.shape[1] and not offsets_given:
        raise ValueError(f"causal attention needs as many keys as queries (S = T), or q_offset and kv_offset; got {shapes}")
    for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
        if not isinstance(offset, int) and (
            jnp.shape(offset) != () or not jnp.issubdtype(jnp.result_type(offset), jnp.integer)
        ):
            raise ValueError(f"{name} must be an integer scalar; got {jnp.result_type(offset)} {jnp.shape(offset)}")
    _check_scale(scale)
    if segment_ids is not None:
        _check_segments(segment_ids, q, k)


def _check_heads(q, kv_shape: tuple[int, ...], *, heads_axis: int, grouped: bool, shapes: str) -> None:
    """Raises ValueError, with `shapes`, where batch and heads of q and of keys (B, S, K, H) don't fit together."""
    if q.shape[0] != kv_shape[0] or q.shape[-1] != kv_shape[3]:
        raise ValueError(f"queries and keys must have the same batch and head size; got {shapes}")
    if 0 in q.shape or 0 in kv_shape:
        raise ValueError(f"there must be at least one query, key and head; got {shapes}")
    if grouped and q.shape[heads_axis] != kv_shape[2]:
        raise ValueError(f"q (..., K, G, H) must have the K of the keys (B, S, K, H); got {shapes}")
    if q.shape[heads_axis] % kv_shape[2]:
        raise ValueError(f"query heads must be a multiple of key/value heads; got {shapes}")


def _check_segments(segment_ids, q, k) -> None:
    expected = (q.shape[:2], k.shape[:2])
    if not isinstance(segment_ids, tuple) and q.shape[1] != k.shape[1]:
        raise ValueError(f"segment_ids must be a pair, of shapes {expected[0]} and {expected[1]}, where S != T")
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2 or any(ids is None for ids in pair):
        raise ValueError("segment_ids must be an array (B, T), or a pair of arrays (B, T) and (B, S)")
    for ids, shape in zip(pair, expected, strict=True):
        if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids must be integers of shape {shape}; got {ids.dtype} {ids.shape}")
        if ids.dtype.itemsize < 8:
            continue
        # of 64-bit ids the kernels would compare the lower half
        if not isinstance(ids, np.ndarray):
            raise ValueError(f"segment_ids must be integers of 32 bits; got {ids.dtype}: number the documents in int32")
        if ids.min() < -(2**31) or ids.max() >= 2**31:
            raise ValueError(f"segment_ids must be within int32; got {ids.min()} to {ids.max()}: number the documents from 0")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive Python number; got {scale!r}")


def _check_decode(q, cache, length, scale) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(
            f"decode takes q, a cache and its length; got a {type(cache).__name__}: use new_cache, or cache_of(k, v)"
        )
    shape = (cache.batch, cache.keys, cache.n_kv_heads, cache.head_dim)
    shapes = f"q {q.shape} {q.dtype}, a cache (B, S, K, H) of {shape} {cache.dtype}"
    if q.ndim not in (3, 4):
        raise ValueError(f"decode takes q (B, N, H) or (B, K, G, H); got {shapes}")
    _check_heads(q, shape, heads_axis=1, grouped=q.ndim == 4, shapes=shapes)
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"queries must have a floating dtype; got {shapes}")
    if jnp.shape(length) not in ((), (q.shape[0],)) or not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(
            f"length must be an integer or integers ({q.shape[0]},); got {jnp.result_type(length)} {jnp.shape(length)}"
        )
    # one that is on a device is not waited for
    if not isinstance(length, jax.Array) and not np.all((np.asarray(length) >= 0) & (np.asarray(length) <= cache.keys)):
        raise ValueError(f"length must be within the cache, 0 to {cache.keys}; got {length}")
    _check_scale(scale)
