"""Which blocks of keys a tile of queries sees, and which tiles of queries see a block of keys, by their positions alone.

Query t sees key s where s <= t + shift (shift = q_offset - kv_offset). All kernels cut their loops by this one arithmetic. It
takes Python ints and traced int32 alike, and is int32 division throughout (`lax.div`: the sign correction of // asks the host,
which may not be a TPU, for its TPU's kind).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Scalar = int | jax.Array


class KeyBlocks(NamedTuple):
    """Blocks of keys before `whole` are seen whole by all of some queries, those from `stop` on by none of them."""

    whole: Scalar
    stop: Scalar


class QueryTiles(NamedTuple):
    """Tiles of queries before `start` see none of some keys, those from `whole` on all of them."""

    start: Scalar
    whole: Scalar


def keys_seen(t: Scalar, shift: Scalar, n_keys: int) -> Scalar:
    """Number of keys that query t sees: they are the first ones."""
    return _within(t + shift + 1, n_keys)


def queries_before(s: Scalar, shift: Scalar, n_queries: int) -> Scalar:
    """Number of queries that don't see key s: they are the first ones."""
    return _within(s - shift, n_queries)


def whole_blocks(n: Scalar, block: int) -> Scalar:
    """Blocks that the first n positions fill."""
    return n // block if isinstance(n, int) else lax.div(n, jnp.full_like(n, block))


def blocks(n: Scalar, block: int) -> Scalar:
    """Blocks that the first n positions reach into."""
    return whole_blocks(n + (block - 1), block)


def key_blocks(first: Scalar, last: Scalar, shift: Scalar, n_keys: int, block: int) -> KeyBlocks:
    """Of keys cut into blocks, for queries `first` to `last`."""
    return KeyBlocks(whole_blocks(keys_seen(first, shift, n_keys), block), blocks(keys_seen(last, shift, n_keys), block))


def query_tiles(first: Scalar, last: Scalar, shift: Scalar, n_queries: int, tile: int, group: int = 1) -> QueryTiles:
    """Of queries cut into tiles of rows, `group` rows a query, for keys `first` to `last`."""
    start, whole = (queries_before(s, shift, n_queries) * group for s in (first, last))
    return QueryTiles(whole_blocks(start, tile), blocks(whole, tile))


def part_of_cache(part: Scalar, parts: int, entries: Scalar, block: int) -> tuple[Scalar, Scalar]:
    """First block of a part of a cache's `entries`, and the one after its last: whole blocks, shared out over `parts`."""
    n = blocks(entries, block)
    share = blocks(n, parts)
    first = jnp.minimum(part * share, n)
    return first, jnp.minimum(first + share, n)


def segment_ranges(ids_BxT: jax.Array, block: int) -> jax.Array:
    """Flat (2 B n,) int32 of ids cut into n blocks: at (2 b) n + i the least of block i, at (2 b + 1) n + i its largest."""
    blocks = ids_BxT.reshape(len(ids_BxT), -1, block)
    return jnp.stack([blocks.min(axis=-1), blocks.max(axis=-1)], axis=1).reshape(-1)


def segments_meet(q: tuple[Scalar, Scalar], kv: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
    """Whether queries and keys with these least and largest ids may share a segment, and whether all of them lie in one."""
    (q_low, q_high), (kv_low, kv_high) = q, kv
    return (q_low <= kv_high) & (kv_low <= q_high), (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)


def _within(x: Scalar, n: int) -> Scalar:
    return min(max(x, 0), n) if isinstance(x, int) else jnp.minimum(jnp.maximum(x, 0), n)
