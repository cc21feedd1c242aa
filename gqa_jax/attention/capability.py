"""The compute capability of NVIDIA GPUs, which decides what kernels can run there."""

from __future__ import annotations

import jax

from gqa_jax import hardware


def compute_capability(chip: str) -> float | None:
    """Of an NVIDIA GPU by its name as JAX gives it ("NVIDIA H200" is 9.0); None for what is not one or is not known."""
    if (known := hardware.compute_capability(chip)) is not None:
        major, minor = known
        return major + minor / 10
    here = jax.local_devices()[0]  # a model that the tables have not
    return float(here.compute_capability) if here.device_kind == chip and hasattr(here, "compute_capability") else None
