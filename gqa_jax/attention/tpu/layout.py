"""Attention on TPUs in Pallas: what the forward and the backward kernel share, and the functions that call them.

Both work on transposed scores, S^T = K Q^T with keys in sublanes and queries in lanes, so that the probabilities can be the
stationary operand of the products that follow: out^T (H x queries) = V^T P^T streams only the H rows of V^T through the
matrix unit. In the usual form, P V, the H = 64 columns of V fill half of a 128-wide unit and a quarter of a 256-wide one.
Row maxima, sums and the log-sum-exp become lane vectors, reduced over sublanes without the cross-lane unit.

A tile of queries holds `heads` query heads of one key/value head for `tokens` positions, side by side in lanes: keys and
values are read once for all of them, and one causal mask serves them all. Which blocks of keys a tile sees is arithmetic on
its position (`Bounds`): there are no mask tables. Operands lie in HBM with positions minor, (H, T), where H = 64 needs no
padding to 128 lanes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gqa_jax.attention import bounds
from gqa_jax.attention.spec import HIDDEN, Mask
from gqa_jax.hardware import Tiles

LOG2_E = math.log2(math.e)
LANES = 128
PART = 512  # keys of a part of a masked block: parts that no query sees are left out


class Options(NamedTuple):
    """Static choices of a call: tiles of both passes, cores of the chip, and whether Pallas interprets."""

    forward: Tiles
    backward: Tiles
    cores: int = 1
    interpret: Any = False


class Cut(NamedTuple):
    """Shapes of one pass. X tiles side by side in the grid's first dimension: batch x key/value heads x head groups."""

    batch: int
    n_kv: int
    group: int
    heads: int  # query heads of a tile
    tokens: int  # positions of a tile
    length: int  # T
    keys: int  # S
    padded_length: int
    padded_keys: int
    head_dim: int
    tiles: Tiles

    @property
    def head_groups(self) -> int:
        return self.group // self.heads

    @property
    def query_tiles(self) -> int:
        return self.padded_length // self.tokens

    @property
    def key_blocks(self) -> int:
        return self.padded_keys // self.tiles.keys


class Share(NamedTuple):
    """How cores divide the work on a key/value head: each takes some of its query heads, or some of its key blocks."""

    heads: int = 1
    keys: int = 1


def share(n_rows: int, group: int, cores: int) -> Share:
    """For `n_rows` batch x key/value heads: none where they divide over the cores, else heads, else key blocks."""
    if n_rows % cores == 0:
        return Share()
    return Share(heads=cores) if group % cores == 0 else Share(keys=cores)


def cut(q_BxTxKxGxH, k_BxSxKxH, tiles: Tiles, share: Share) -> Cut:
    """Shapes for these operands; heads of a group and key blocks come in multiples that can be shared."""
    batch, length, n_kv, group, head_dim = q_BxTxKxGxH.shape
    keys = k_BxSxKxH.shape[1]
    heads = max(h for h in range(1, 9) if (group // share.heads) % h == 0)
    tokens = LANES
    while heads * tokens * 2 <= max(tiles.rows, LANES) and tokens < length:
        tokens *= 2
    strip = math.gcd(tiles.strip, heads * tokens)
    block = min(tiles.keys, -(-keys // tiles.chunk) * tiles.chunk)
    tiles = tiles._replace(rows=heads * tokens, strip=strip, keys=block)
    return Cut(
        batch, n_kv, group, heads, tokens, length, keys,
        -(-length // tokens) * tokens, -(-keys // (block * share.keys)) * block * share.keys, head_dim, tiles,
    )  # fmt: skip


# Operands in the kernels' layout. X = batch * n_kv * head_groups.


def queries_minor(x_BxTxKxGxH, cut: Cut):
    """(X, heads, H, T'): positions in lanes."""
    x = jnp.transpose(x_BxTxKxGxH, (0, 2, 3, 4, 1)).reshape(-1, cut.heads, cut.head_dim, cut.length)
    return _pad(x, 3, cut.padded_length)


def queries_back(x_XxhxHxT, cut: Cut):
    """(B, T, K, G, H) of what `queries_minor` gives."""
    x = x_XxhxHxT[..., : cut.length].reshape(cut.batch, cut.n_kv, cut.group, cut.head_dim, cut.length)
    return jnp.transpose(x, (0, 4, 1, 2, 3))


def rows_minor(x_BxKxGxT, cut: Cut, fill: float):
    """(X, heads, T') of a number per query."""
    return _pad(x_BxKxGxT.reshape(-1, cut.heads, cut.length), 2, cut.padded_length, fill)


def keys_major(x_BxSxKxH, cut: Cut):
    """(B K, S', H)."""
    return _pad(jnp.swapaxes(x_BxSxKxH, 1, 2).reshape(-1, cut.keys, cut.head_dim), 1, cut.padded_keys)


def keys_minor(x_BxSxKxH, cut: Cut):
    """(B K, H, S'): positions in lanes."""
    return _pad(jnp.transpose(x_BxSxKxH, (0, 2, 3, 1)).reshape(-1, cut.head_dim, cut.keys), 2, cut.padded_keys)


def keys_back(x_XxHxS, cut: Cut):
    """(B, S, K, H) of what `keys_minor` gives."""
    x = x_XxHxS[..., : cut.keys].reshape(cut.batch, cut.n_kv, cut.head_dim, cut.keys)
    return jnp.transpose(x, (0, 3, 1, 2))


def _pad(x, axis: int, size: int, fill: float = 0):
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


class Bounds(NamedTuple):
    """Which key blocks a query tile sees; on Python ints and on scalars of a kernel alike."""

    cut: Cut
    shift: Any  # q_offset - kv_offset: query t sees keys up to t + shift

    def key_blocks_seen(self, i):
        """Blocks 0 .. n - 1 hold all keys that some query of tile i sees."""
        return bounds.blocks(bounds.keys_seen((i + 1) * self.cut.tokens - 1, self.shift, self.cut.keys), self.cut.tiles.keys)

    def first_query_tile(self, j):
        """Tiles from this one on hold all queries that see some key of block j; query_tiles when there is none."""
        before = bounds.queries_before(j * self.cut.tiles.keys, self.shift, self.cut.padded_length)
        return bounds.whole_blocks(before, self.cut.tokens)

    def parts_seen(self, i, j, part: int):
        """Parts of key block j, `part` keys each, that some query of tile i sees: the first ones, one at least."""
        reach = (i + 1) * self.cut.tokens + self.shift - j * self.cut.tiles.keys  # keys of the block that the last query sees
        return jnp.clip(lax.div(reach + part - 1, part), 1, self.cut.tiles.keys // part)

    def all_visible(self, i, j):
        """Whether every query of tile i sees every key of block j, and none of them is padding."""
        return (j + 1) * self.cut.tiles.keys <= bounds.keys_seen(i * self.cut.tokens, self.shift, self.cut.keys)


class Steps:
    """Items of unequal length as a rectangle of grid steps.

    Under the aligned causal mask item i and item n - 1 - i are about as long together as any other two: folded, a row of
    the grid does first the one, then the other, and no step is empty. Else an item has a row of its own, as long as the
    longest may be; steps beyond its end do nothing, and clamped indices move no data.
    """

    def __init__(self, n: int, part, *, longest: int, folded: bool):
        """`part(i)` is the number of steps of item i; only called here when folded, with Python ints."""
        self.n, self.folded = n, folded
        self.rows, self.steps = n, longest
        if folded:
            self.rows = -(-n // 2)
            self.steps = max(part(r) + (part(n - 1 - r) if n - 1 - r != r else 0) for r in range(self.rows))

    def at(self, r, s, part):
        """Item and the step within it, clamped, and whether this step works, begins and ends the item."""
        if not self.folded:
            length = part(r)
            return r, jnp.minimum(s, jnp.maximum(length - 1, 0)), s < length, s == 0, s == self.steps - 1
        other = self.n - 1 - r
        own = part(r)
        others = jnp.where(other == r, 0, part(other))
        is_own = s < own
        active = is_own | (s - own < others)
        item = jnp.where(is_own | (others == 0), r, other)
        length = jnp.where(item == r, own, others)
        step = jnp.where(active, jnp.where(is_own, s, s - own), length - 1)
        return item, step, active, active & (step == 0), active & (step == length - 1)


class Problem:
    """A call's shapes and mask as a kernel sees them: what is static, and the scalars that the grid prefetches."""

    def __init__(self, cut: Cut, mask: Mask):
        self.cut = cut
        self._shift = mask.static_shift
        self.folded = self._shift == 0 and cut.length == cut.keys
        self.scalars, self.segments = [], None
        if self._shift is None:
            self.scalars.append(jnp.asarray(mask.q_offset - mask.kv_offset, jnp.int32).reshape(1))
        if mask.q_segments_BxT is not None:
            q, q_range = _segments(mask.q_segments_BxT, cut.padded_length, cut.tokens)
            kv, kv_range = _segments(mask.kv_segments_BxS, cut.padded_keys, cut.tiles.keys)
            self.segments = (q, kv)
            self.scalars += [q_range, kv_range]

    def bounds(self, scalars) -> Bounds:
        return Bounds(self.cut, scalars[0][0] if self._shift is None else self._shift)

    def segment_facts(self, scalars, b, i, j):
        """Whether query tile i and key block j of sequence b may share a segment, and whether they lie in one."""
        if self.segments is None:
            return True, True
        q_range, kv_range = scalars[-2:]
        tiles, blocks = self.cut.query_tiles, self.cut.key_blocks
        q = tuple(q_range[(2 * b + n) * tiles + i] for n in (0, 1))
        kv = tuple(kv_range[(2 * b + n) * blocks + j] for n in (0, 1))
        return bounds.segments_meet(q, kv)


def _segments(ids_BxT, size: int, block: int):
    """Ids as (B, 1, T'), and the least and largest in each block: what does not overlap can't be equal."""
    ids = jnp.pad(ids_BxT.astype(jnp.int32), ((0, 0), (0, size - ids_BxT.shape[1])), mode="edge")
    return ids[:, None], bounds.segment_ranges(ids, block)


def strip_of(ref, s: int, cut: Cut):
    """Strip s of a (heads, H, tokens) or (heads, tokens) reference: (H, strip) or (1, strip), heads side by side."""
    width, tokens = cut.tiles.strip, cut.tokens
    if width <= tokens:
        head, start = divmod(s * width, tokens)
        return _lanes(ref, head, start, width)
    first = s * (width // tokens)
    return jnp.concatenate([_lanes(ref, first + h, 0, tokens) for h in range(width // tokens)], axis=1)


def _lanes(ref, head: int, start: int, width: int):
    if len(ref.shape) == 3:
        return ref[head, :, start : start + width]
    return ref[head : head + 1, start : start + width]


def dot(a, b, contract_a: int, contract_b: int):
    """Product with float32 accumulation; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class Visibility:
    """Masks of (chunk, strip) pieces, for tile i and the keys of block j from `first_key` on.

    Causality is one comparison of a pattern, the same for all pieces, with a scalar that places the piece.
    """

    def __init__(self, cut: Cut, i, j, shift, first_key, q_segments_ref=None, kv_segments_ref=None):
        shape = (cut.tiles.chunk, cut.tiles.strip)
        self.cut, self.first_key = cut, first_key
        self.key = lax.broadcasted_iota(jnp.int32, shape, 0)
        token = lax.broadcasted_iota(jnp.int32, shape, 1) & (min(cut.tiles.strip, cut.tokens) - 1)
        self.distance = self.key - token
        self.diagonal = i * cut.tokens + shift - j * cut.tiles.keys - first_key
        self.keys_left = cut.keys - j * cut.tiles.keys - first_key
        self.q_segments_ref, self.kv_segments_ref = q_segments_ref, kv_segments_ref
        self.columns = {}

    def hide(self, scores, s: int, key: int):
        """Scores (chunk, strip) of strip s and the chunk `key` keys after the first, hidden ones replaced."""
        start = (s * self.cut.tiles.strip) % self.cut.tokens
        seen = self.distance <= self.diagonal + start - key
        if self.cut.keys != self.cut.padded_keys:
            seen &= self.key < self.keys_left - key
        if self.q_segments_ref is not None:
            if key not in self.columns:
                self.columns[key] = self._column(key)
            width = min(self.cut.tiles.strip, self.cut.tokens)
            row = self.q_segments_ref[:, start : start + width]
            seen &= self.columns[key] == jnp.concatenate([row] * (self.cut.tiles.strip // width), axis=1)
        return jnp.where(seen, scores, HIDDEN)

    def _column(self, key: int):
        """Segment ids of a chunk's keys, which lie in lanes, as a column (chunk, 1)."""
        squares = []
        for start in range(key, key + self.cut.tiles.chunk, LANES):
            ids = self.kv_segments_ref[:, pl.ds(self.first_key + start, LANES)]
            squares.append(jnp.broadcast_to(ids, (LANES, LANES)).T)
        return jnp.concatenate(squares, axis=0)[:, :1]


def cost(problem: Problem, dtype, *, products: int) -> pl.CostEstimate:
    """What XLA's scheduler is told of a pass that multiplies `products` times: half of T x S, each tile read once a visit."""
    cut = problem.cut
    pairs = cut.batch * cut.n_kv * cut.group * cut.length * cut.keys / 2
    visits = pairs / (cut.tiles.rows * cut.tiles.keys)
    block_bytes = (cut.tiles.rows + cut.tiles.keys) * cut.head_dim * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=int(2 * products * cut.head_dim * pairs),
        transcendentals=int(pairs),
        bytes_accessed=int(products * visits * block_bytes),
    )
