"""The implementation `pallas_triton`: its passes, with the tiles for a case.

Pallas-Triton, which JAX has deprecated since 0.11.0, is imported where a kernel is made, not where one is chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from gqa_jax.attention.spec import Case
from gqa_jax.attention.vjp import Kernel


class Tile(NamedTuple):
    """Rows (query, token pairs) by keys, powers of two of at least 16; warps of a program; stages of the copy pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


class Options(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile
    interpret: bool = False


# By bytes of an element and padded head size. 16-bit tiles fit the 99 KB of shared memory of the smallest GPUs (compute
# capability 8.9) and compile for them and for Hopper without register spills; those of float32, at most a few.
_TILES = {
    (2, 64): (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (2, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
    (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (4, 64): (Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 128): (Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2)),
    (4, 256): (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
}


def choose(length: int, keys: int, group: int, head_dim: int, dtype: Any, *, interpret: bool = False) -> Options:
    """The table's tiles, no larger than the problem."""
    most_rows, most_keys = padded(length * group), padded(keys)
    tiles = _TILES[jnp.dtype(dtype).itemsize, max(64, padded(head_dim))]
    tiles = (tile._replace(rows=min(tile.rows, most_rows), keys=min(tile.keys, most_keys)) for tile in tiles)
    return Options(*tiles, interpret=interpret)


def padded(size: int) -> int:
    """The power of two that Triton holds `size` in, at least 16, the least that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def kernel(case: Case, scale: float) -> Kernel:
    from gqa_jax.attention.triton import kernels

    options = choose(case.length, case.keys, case.group, case.head_dim, case.dtype, interpret=case.interpreted)
    return Kernel(kernels.forward, kernels.backward, scale, options)
