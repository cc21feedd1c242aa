"""Peak arithmetic of the accelerators that runs are reported against."""

from __future__ import annotations

#: Dense bfloat16 FLOP/s of one device by a part of jax's `device_kind`, from the vendors' data sheets: Google Cloud TPU
#: system architecture pages (v4, v5e, v5p, v6e); NVIDIA A100, H100 SXM and H200 SXM data sheets (without sparsity).
_PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where no data sheet is recorded (CPUs): MFU is then left empty."""
    for name, flops in _PEAK_BF16.items():
        if name.lower() in device_kind.lower():
            return flops
    return None
