"""The implementation `pallas_tpu`: its passes, with the tiles for a case."""

from __future__ import annotations

from gqa_jax import hardware
from gqa_jax.attention.spec import Case
from gqa_jax.attention.tpu.backward import backward
from gqa_jax.attention.tpu.forward import forward
from gqa_jax.attention.tpu.layout import Options
from gqa_jax.attention.vjp import Kernel

__all__ = ["Options", "backward", "choose", "forward", "kernel"]

INTERPRETED_AS = "TPU v5 lite"


def choose(case: Case) -> Options:
    """The tuned tiles of this chip; where Pallas interprets on another platform, those of a v5e."""
    chip = case.chip if case.platform == "tpu" else INTERPRETED_AS
    return Options(*hardware.tiles_of(chip, case.head_dim), cores=case.cores, interpret=case.interpreted)


def kernel(case: Case, scale: float) -> Kernel:
    return Kernel(forward, backward, scale, choose(case))
