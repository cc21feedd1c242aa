"""Devices of the public measurements: rows of `gqa_jax.hardware`, and boards that it has none for."""

from __future__ import annotations

import dataclasses

from gqa_jax.hardware import ALLOCATOR_FRACTION, CHIPS, GIB, Chip


def _board(name: str, like: str, gibibytes: float, **changes) -> Chip:
    """A GPU with so much memory, otherwise like a chip of `CHIPS` but for `changes`."""
    chip = CHIPS[like]
    gpu = dataclasses.replace(chip.gpu, board_mib=round(1024 * gibibytes))
    return dataclasses.replace(chip, name=name, memory_bytes=ALLOCATOR_FRACTION * gibibytes * GIB, gpu=gpu, **changes)


DEVICES = {name: CHIPS[name] for name in ("h100", "h200", "b200", "a100", "v5e", "v6e")} | {
    # NVIDIA's data sheets: GH200 with 96 GB of HBM3 at 4 TB/s; A100 PCIe 80 GB at 1,935 GB/s, PCIe 4.0 x16; A100 SXM 40 GB at
    # 1,555 GB/s; H800 with 400 GB/s of NVLink in both directions.
    "gh200": _board("gh200", "h100", 95.6, memory_bandwidth=4.0e12),
    "a100-pcie": _board("a100-pcie", "a100", 80, memory_bandwidth=1.935e12, interconnect=32e9),
    "a100-40gb": _board("a100-40gb", "a100", 40, memory_bandwidth=1.555e12),
    "h800": _board("h800", "h100", 79.6, interconnect=200e9),
    # NVIDIA's white paper of the Ada GPU architecture, appendix A: float16 with 32-bit sums, float8 with 16-bit sums, int8.
    "rtx4090": _board(
        "rtx4090",
        "l4",
        24,
        peak_flops=165.2e12,
        memory_bandwidth=1.008e12,
        narrow_flops=(("float8", 660.6e12), ("int8", 660.6e12)),
    ),
    # docs.cloud.google.com/tpu/docs/tpu7x: a chip with both of its cores.
    "v7x": Chip(
        "v7x",
        peak_flops=2307e12,
        memory_bytes=192 * GIB,
        memory_bandwidth=7380e9,
        interconnect=600e9,
        narrow_flops=(("float8", 4614e12),),
        attention_share=CHIPS["v6e"].attention_share,
        tpu=CHIPS["v6e"].tpu,
    ),
}
