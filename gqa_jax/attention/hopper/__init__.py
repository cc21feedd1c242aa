"""The implementation `pallas_gpu`, for NVIDIA Hopper (H100, H200, GH200) in bfloat16: its passes, with the tiles for a case."""

from __future__ import annotations

from typing import NamedTuple

from gqa_jax import hardware
from gqa_jax.attention.hopper.backward import backward
from gqa_jax.attention.hopper.forward import forward
from gqa_jax.attention.hopper.tiles import ROWS
from gqa_jax.attention.spec import Case
from gqa_jax.attention.vjp import Kernel

__all__ = ["Options", "Tile", "backward", "choose", "forward", "kernel"]

MULTIPROCESSORS = hardware.CHIPS["h100"].gpu.multiprocessors  # an H200 has as many


class Tile(NamedTuple):
    """Shape of one kernel's CTA: consumer warpgroups of 64 rows each, and one that loads. One CTA fills a multiprocessor."""

    consumers: int
    block: int  # keys that the consumers walk over in a step; queries in the dk/dv kernel
    stages: int  # blocks in shared memory, at least 2
    consumer_registers: int  # per thread; threads of one warpgroup of each kind have 512 in all
    loader_registers: int
    splits: int = 1  # dk/dv kernel: CTAs that share a group's query heads, and whose partial sums are added in order


class Options(NamedTuple):
    """Tiles of the three kernels, and whether Pallas interprets them (on any platform, thousands of times slower)."""

    forward: Tile
    dq: Tile
    dkv: Tile
    interpret: bool = False


def choose(head_dim: int, length: int, group: int, kv_heads: int = 1, segments: bool = False) -> Options:
    """Tiles with which no loop spills registers; kv_heads counts those of the whole batch.

    Forward: FlashAttention-3's tiles for causal attention, 192 x 128 and 128 x 128, but where segments take registers. The
    group is split in the dk/dv kernel where there are too few blocks of keys to fill the chip nearly twice (its CTAs are of
    unequal length).
    """
    if head_dim == 64:
        forward_tile = Tile(2, 128, 4, 240, 24) if segments else Tile(3, 128, 4, 160, 32)
        options = Options(forward_tile, Tile(2, 128, 4, 240, 24), Tile(2, 64, 4, 240, 24))
    else:
        options = Options(Tile(2, 128, 2, 240, 24), Tile(2, 64, 3, 240, 24), Tile(2, 64, 2, 240, 24))
    unsplit = -(-length // (options.dkv.consumers * ROWS)) * kv_heads
    enough = [n for n in range(1, group + 1) if group % n == 0 and (n * unsplit >= 1.8 * MULTIPROCESSORS or n == group)]
    return options._replace(dkv=options.dkv._replace(splits=enough[0]))


def kernel(case: Case, scale: float) -> Kernel:
    options = choose(case.head_dim, case.length, case.group, case.batch * case.n_kv_heads, case.segments)
    return Kernel(forward, backward, scale, options._replace(interpret=case.interpreted))
