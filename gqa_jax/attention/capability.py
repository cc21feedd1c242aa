"""The compute capability of NVIDIA GPUs, which decides what kernels can run there."""

from __future__ import annotations

import re

import jax

# https://developer.nvidia.com/cuda/gpus and .../cuda/legacy-gpus: of models that need not be here, by a word of their names
CAPABILITIES = {
    "P100": 6.0, "V100": 7.0, "T4": 7.5, "A100": 8.0, "A800": 8.0, "A30": 8.0, "A10": 8.6, "A10G": 8.6, "A40": 8.6,
    "RTX 3090": 8.6, "L4": 8.9, "L40": 8.9, "L40S": 8.9, "RTX 4090": 8.9, "H20": 9.0, "H100": 9.0, "H200": 9.0, "H800": 9.0,
    "GH200": 9.0, "B200": 10.0, "GB200": 10.0, "B300": 10.3, "GB300": 10.3, "Thor": 11.0, "RTX 5090": 12.0,
    "RTX PRO 4500": 12.0, "RTX PRO 5000": 12.0, "RTX PRO 6000": 12.0, "GB10": 12.1,
}  # fmt: skip
_MODEL = re.compile(rf"\b(?:{'|'.join(sorted(CAPABILITIES, key=len, reverse=True))})\b")


def compute_capability(chip: str) -> float | None:
    """Of an NVIDIA GPU by its name as JAX gives it ("NVIDIA H200"); None for what is not one or is not known."""
    if "NVIDIA" not in chip and "Tesla" not in chip:
        return None
    if found := _MODEL.search(chip):
        return CAPABILITIES[found[0]]
    here = jax.local_devices()[0]  # a model that the table has not
    return float(here.compute_capability) if here.device_kind == chip else None
