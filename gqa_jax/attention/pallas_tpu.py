"""The implementation `pallas_tpu`: what it can run, with which tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from gqa_jax import hardware
from gqa_jax.attention.gradient import Kernel
from gqa_jax.attention.tpu import Options
from gqa_jax.attention.tpu_backward import backward
from gqa_jax.attention.tpu_forward import forward
from gqa_jax.hardware import Tiles

if TYPE_CHECKING:
    from gqa_jax.attention.implementations import Case

HEAD_DIMS = range(16, 129, 16)  # whole bfloat16 registers of sublanes
INTERPRETED_AS = "TPU v5 lite"


def obstacle(case: Case) -> str | None:
    """Why this case can't run here, or None."""
    if case.platform != "tpu" and not case.interpreted:
        return f"it is written for TPUs, and this is {case.chip} ({case.platform})"
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, and this is {jnp.dtype(case.dtype).name}"
    if case.head_dim not in HEAD_DIMS:
        return f"it takes head sizes {', '.join(map(str, HEAD_DIMS))}, and this is {case.head_dim}"
    if case.platform == "tpu" and hardware.tiles_of(case.chip, case.head_dim) is None:
        return f"gqa_jax.hardware has no tiles for {case.chip}"
    return None


def choose(case: Case) -> Options:
    """The tuned tiles of this chip; where Pallas interprets on another platform, those of a v5e."""
    chip = case.chip if case.platform == "tpu" else INTERPRETED_AS
    return Options(*hardware.tiles_of(chip, case.head_dim), cores=case.cores, interpret=case.interpreted)


def candidates(case: Case, which: str) -> list[Tiles]:
    """Tiles worth measuring for a pass ("forward" or "backward"): neighbours of those whose schedules are shortest."""
    keys = (1024, 2048, 4096) if which == "forward" else (512, 1024, 2048)
    pieces = [(256, 128, 2), (256, 256, 2), (256, 256, 4), (128, 128, 4)]
    depths = (4, 5, 6, 8) if which == "forward" else (2, 3, 4)
    return [
        Tiles(rows=rows, keys=n, strip=strip, chunk=chunk, ahead=ahead, together=together)
        for rows in (512, 1024, 2048)
        for n in keys
        for strip, chunk, together in pieces
        for ahead in depths
    ]


def kernel(case: Case, scale: float) -> Kernel:
    return Kernel(forward, backward, scale, choose(case), name="pallas_tpu")
