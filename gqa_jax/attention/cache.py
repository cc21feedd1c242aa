"""A layer's cache of keys and values: its arrays, how they lie in memory, and how new entries are written into them.

Who reads a cache decides its layout, once for a whole generation: a reader that finds another one pays with a copy of the
cache for every token. `Layout` is the order of axes of each array, in letters: B batch, S position, K key/value head, H head
size, and C a block of positions, S then being the position within it. `dispatch.Implementation.layout` says which one an
implementation reads.

int8: value = scale x integer, a scale for each position and head (as github.com/jax-ml/jax-llm-examples): the keys' scale
multiplies logits, the values' the weights, so that a reader meets integers alone. Scales are bfloat16, the integers are
rounded with the scale as it is held, and lie as (B, K, 1, S): positions are minor, so that one key/value head is padded to
nothing on a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DTYPES = ("float32", "bfloat16", "float16", "int8")
SCALE = jnp.bfloat16
UNROLLED_WRITES = 8  # sequences whose positions are written one by one


class Layout(NamedTuple):
    """Axes of keys and of values in the order in which they lie, the last one contiguous."""

    k: str
    v: str


ROWS = Layout("BSKH", "BSKH")  # as `attention` takes keys and values
WITHIN_HEADS = Layout("BKSH", "BKSH")  # the positions of a head side by side
LANES = Layout("BKHS", "BKHS")  # positions in the lanes of a TPU
BLOCKS = Layout("BKCHS", "BKSH")  # keys of a block with positions minor: as a CPU's matrix product packs them
BLOCK = 512  # most positions of a block; of 256 to 2,048 the least processor time at 16K entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer: a pytree, whose arrays a loop over tokens updates in place where it is donated.

    Entries that were not written may hold anything; readers are told how many there are.
    """

    k: jax.Array  # axes as layout.k
    v: jax.Array
    k_scale_BxKx1xS: jax.Array | None  # of int8, else None
    v_scale_BxKx1xS: jax.Array | None
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        return self._size("B")

    @property
    def keys(self) -> int:
        """S: entries that there is room for."""
        return self._size("S")

    @property
    def n_kv_heads(self) -> int:
        return self._size("K")

    @property
    def head_dim(self) -> int:
        return self._size("H")

    @property
    def dtype(self) -> Any:
        return self.k.dtype

    @property
    def quantized(self) -> bool:
        return self.k_scale_BxKx1xS is not None

    def _size(self, axis: str) -> int:
        return self.v.shape[self.layout.v.index(axis)]

    def arrays(self, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """Keys and values as they are held (integers of int8) with their axes as in `layout`: a copy, where it isn't that."""
        return _permuted(self.k, self.layout.k, layout.k), _permuted(self.v, self.layout.v, layout.v)

    def rows(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, S, K, H) of `dtype`, as `attention` takes them, for the chunks of a prompt."""
        pairs = zip(self.arrays(ROWS), (self.k_scale_BxKx1xS, self.v_scale_BxKx1xS), strict=True)
        k, v = (x.astype(dtype) if scale is None else _dequantized(x, scale, dtype) for x, scale in pairs)
        return k, v

    def append(
        self, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, position: int | jax.Array, where: jax.Array | None = None
    ) -> Cache:
        """With the keys and values of T tokens at the positions from `position` on.

        Args:
          position: an integer, or with T = 1 one for each sequence (B,). What would lie beyond S is moved back to end there.
          where: of `position`'s shape: False leaves a sequence as it is, as those parts of a context must that have not this
            position. None: True.
        """
        news = [(k_BxTxKxH.astype(self.dtype), None), (v_BxTxKxH.astype(self.dtype), None)]
        if self.quantized:
            news = [quantized(k_BxTxKxH), quantized(v_BxTxKxH)]
        (k, k_scale), (v, v_scale) = news
        return Cache(
            _written(self.k, self.layout.k, k, "BSKH", position, where),
            _written(self.v, self.layout.v, v, "BSKH", position, where),
            None if k_scale is None else _written(self.k_scale_BxKx1xS, "BK1S", k_scale, "BSK1", position, where),
            None if v_scale is None else _written(self.v_scale_BxKx1xS, "BK1S", v_scale, "BSK1", position, where),
            self.layout,
        )


def empty(layout: Layout, batch: int, keys: int, n_kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache of zeros; in blocks it may hold a few entries more, where `keys` can't be cut into them."""
    block = _block(keys)
    keys = -(-keys // block) * block if "C" in layout.k else keys
    sizes = {"B": batch, "S": keys, "K": n_kv_heads, "H": head_dim, "C": keys // block}

    def zeros(axes: str) -> jax.Array:
        return jnp.zeros([block if axis == "S" and "C" in axes else sizes[axis] for axis in axes], dtype)

    k, v = (zeros(axes) for axes in layout)
    scales = [jnp.zeros((batch, n_kv_heads, 1, keys), SCALE) if k.dtype == jnp.int8 else None for _ in range(2)]
    return Cache(k, v, *scales, layout)


def at(*start: int | jax.Array) -> list[jax.Array]:
    """Where a slice starts: of one dtype, also where 64 bits are on and positions come in 32."""
    return [jnp.asarray(x, jnp.int32) for x in start]


def _block(keys: int) -> int:
    """Positions of a block: the most that divide `keys`; where nearly nothing does, what leaves the least over.

    Two blocks at least: XLA's CPU compiler copies an array of which always the same part is read and written.
    """
    most = min(BLOCK, max(1, keys // 2))
    whole = max(size for size in range(1, most + 1) if keys % size == 0)
    return whole if whole >= most // 4 else -(-keys // -(-keys // most))


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integers (..., H) within -127 and 127, and scales (..., 1) with which they give `x` to half a scale."""
    x = x.astype(jnp.float32)
    # half a step of bfloat16 more, so that rounding the scale leaves none of the integers beyond 127
    scale = (jnp.abs(x).max(axis=-1, keepdims=True) * (1 + 2**-8) / 127).astype(SCALE)
    safe = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    return jnp.round(x / safe).astype(jnp.int8), scale


def _dequantized(x_BxSxKxH: jax.Array, scale_BxKx1xS: jax.Array, dtype: Any) -> jax.Array:
    scale_BxSxKx1 = _permuted(scale_BxKx1xS, "BK1S", "BSK1")
    return (x_BxSxKxH.astype(jnp.float32) * scale_BxSxKx1.astype(jnp.float32)).astype(dtype)


def _permuted(x: jax.Array, axes: str, wanted: str) -> jax.Array:
    if "C" in axes and axes != wanted:
        x, axes = _joined(x, axes), axes.replace("C", "").replace("HS", "SH")
    return x if axes == wanted else jnp.transpose(x, [axes.index(axis) for axis in wanted])


def _joined(x_BxKxCxHxS: jax.Array, axes: str) -> jax.Array:
    """Of blocks (B, K, C, H, S) all positions one after another: (B, K, C S, H)."""
    assert axes == BLOCKS.k, axes
    batch, heads, blocks, head_dim, size = x_BxKxCxHxS.shape
    return jnp.swapaxes(x_BxKxCxHxS, 3, 4).reshape(batch, heads, blocks * size, head_dim)


def _cut(x_BxKxSxH: jax.Array, size: int) -> jax.Array:
    """The opposite of `_joined`, in blocks of `size`."""
    batch, heads, keys, head_dim = x_BxKxSxH.shape
    return jnp.swapaxes(x_BxKxSxH.reshape(batch, heads, keys // size, size, head_dim), 3, 4)


def _written(held: jax.Array, axes: str, new: jax.Array, new_axes: str, position: int | jax.Array, where) -> jax.Array:
    if "C" in axes:
        return _written_in_blocks(held, new, new_axes, position, where)
    new = _permuted(new, new_axes, axes)

    def write(held, new, sequence, position, where):
        start = at(*(sequence if axis == "B" else position if axis == "S" else 0 for axis in axes))
        if where is not None:
            new = jnp.where(where, new, lax.dynamic_slice(held, start, new.shape))
        return lax.dynamic_update_slice(held, new, start)

    return _each(write, held, new, position, where)


def _each(write, held: jax.Array, new: jax.Array, position: int | jax.Array, where: jax.Array | None) -> jax.Array:
    """One write where all sequences have one position, else one for each, which XLA does in place; of many in a loop, which is
    compiled sooner.
    """
    if jnp.ndim(position) == 0:
        return write(held, new, 0, position, where)

    def of_sequence(b, held):
        one = lax.dynamic_slice_in_dim(new, b, 1, axis=0)
        return write(held, one, b, position[b], None if where is None else where[b])

    if len(new) <= UNROLLED_WRITES:
        for b in range(len(new)):
            held = of_sequence(b, held)
        return held
    return lax.fori_loop(0, len(new), of_sequence, held)


def _written_in_blocks(held: jax.Array, new: jax.Array, new_axes: str, position: int | jax.Array, where) -> jax.Array:
    """`_written` of blocks (B, K, C, H, S): one position by itself, several with the blocks in which they lie."""
    new_BxKxTxH = _permuted(new, new_axes, "BKSH")
    blocks, size = held.shape[2], held.shape[4]
    touched = min(blocks, 1 + -(-(new_BxKxTxH.shape[2] - 1) // size))  # whatever the first position

    def write(held, new_BxKxTxH, sequence, position, where):
        position = jnp.clip(position, 0, blocks * size - new_BxKxTxH.shape[2])
        first = jnp.minimum(position // size, blocks - touched)
        if new_BxKxTxH.shape[2] == 1:
            start, part = at(sequence, 0, first, 0, position % size), jnp.swapaxes(new_BxKxTxH, 2, 3)[:, :, None]
        else:
            start, sizes = at(sequence, 0, first, 0, 0), (len(new_BxKxTxH), *held.shape[1:2], touched, *held.shape[3:])
            rows_BxKxSxH = _joined(lax.dynamic_slice(held, start, sizes), BLOCKS.k)
            rows_BxKxSxH = lax.dynamic_update_slice(rows_BxKxSxH, new_BxKxTxH, at(0, 0, position - first * size, 0))
            part = _cut(rows_BxKxSxH, size)
        if where is not None:
            part = jnp.where(where, part, lax.dynamic_slice(held, start, part.shape))
        return lax.dynamic_update_slice(held, part, start)

    return _each(write, held, new_BxKxTxH, position, where)
