"""The implementation `pallas_triton`: what it can run, with which tiles.

Pallas-Triton, which JAX has deprecated since 0.11.0, is imported where a kernel is made, not where one is chosen.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax.attention.capability import compute_capability
from gqa_jax.attention.gradient import Kernel

BACKEND = "jax.experimental.pallas.triton"
LARGEST_HEAD = 256


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


def obstacle(case) -> str | None:
    """Why these kernels can't run `case` (`gqa_jax.attention.implementations.Case`); None where they can."""
    if importlib.util.find_spec(BACKEND) is None:
        return f"this jax ({jax.__version__}) has no {BACKEND} any more: gqa_jax runs it with jax>=0.11,<0.12"
    if not case.interpreted:
        if case.platform != "gpu":
            return f"pallas_triton runs on NVIDIA GPUs, this is {case.platform}"
        if (compute_capability(case.chip) or 0) < 8:
            return f"pallas_triton needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, this is {case.chip}"
    if case.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"pallas_triton takes bfloat16, float16 and float32, not {case.dtype}"
    if case.head_dim % 16 or case.head_dim > LARGEST_HEAD:
        return f"pallas_triton takes head sizes of a multiple of 16 up to {LARGEST_HEAD}, not {case.head_dim}"
    if max(case.batch, case.n_kv_heads) > 65535:
        return f"a CUDA grid takes a batch and key/value heads of 65535 at most, not {case.batch} and {case.n_kv_heads}"
    if max(case.length * case.group, case.keys) >= 2**30:
        return f"pallas_triton counts rows in 32 bits; {case.length} queries of a group of {case.group} are too many"
    return None


def kernel(case, scale: float) -> Kernel:
    """Both passes, with the tiles for `case`."""
    from gqa_jax.attention import triton

    options = choose(case.length, case.keys, case.group, case.head_dim, case.dtype, interpret=case.interpreted)
    return Kernel(triton.forward, triton.backward, scale, options, name="pallas_triton")
