"""Accelerators: what one computes, holds and exchanges. Arithmetic for estimates and reports; imports no jax.

Sources: TPUs, Google's pages docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (read November 2026), and for v4's links
arXiv 2304.01433, Table 4; clocks, the table of en.wikipedia.org/wiki/Tensor_Processing_Unit. GPUs, NVIDIA's data sheets of the
SXM boards, without sparsity. Bandwidths are bytes a second in one direction: half of what a page calls bidirectional.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30
#: Of a GPU's memory that JAX takes: XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75 unless set.
ALLOCATOR_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; of TPUs v4 and v5p, whose two cores work as one, a chip."""

    name: str
    kinds: tuple[str, ...]  # words of JAX's device_kind
    peak_flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float  # that a program may use
    memory_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s to its neighbours in a slice or host, over all links at once
    network: float | None = None  # bytes/s to other slices or hosts; None: not published
    host_memory_bytes: float | None = None  # of the host that it is rented with, its share; None: nothing is offloaded
    #: Share of the peak that the attention kernels reach: head size -> (forward, backward). Empty: taken as 1.
    attention_share: tuple[tuple[int, float, float], ...] = ()

    def attention_shares(self, head_dim: int) -> tuple[float, float]:
        """Shares of the peak, forward and backward, at a head size: a smaller one takes the time of the next in the table."""
        for size, forward, backward in self.attention_share:
            if head_dim <= size or size == self.attention_share[-1][0]:
                filled = min(1.0, head_dim / size)
                return forward * filled, backward * filled
        return 1.0, 1.0


def _shares(flops_per_cycle: float, *rows: tuple[int, int, int]) -> tuple[tuple[int, float, float], ...]:
    """Shares from cycles for 1024 x 1024 scores of a head of size d: 4 d FLOPs a score forward, 10 d backward."""
    scores = 1024 * 1024
    return tuple(
        (d, 4 * d * scores / flops_per_cycle / forward, 10 * d * scores / flops_per_cycle / backward)
        for d, forward, backward in rows
    )


# memory_bytes of TPUs is what XLA (libtpu 0.0.51) says it has when a program compiled ahead of time is too large, "exceeds
# available HBM (15.75G)". Attention: cycles of the compiler's static schedule of our kernels for blocks without a mask (README,
# "What it costs on a TPU"; `python -m benchmarks.tpu_cycles`), not run on a chip. v4 has no such figures.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            ("TPU v4",),
            275e12,
            30.75 * GIB,
            1228e9,
            interconnect=300e9,  # 6 links of 50 GB/s
            host_memory_bytes=407e9 / 4,
        ),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            197e12,
            15.75 * GIB,
            819e9,
            interconnect=200e9,  # 4 links, 1600 Gbps
            network=6.4e12 / 8 / 256,  # of a pod of 256
            host_memory_bytes=48e9,  # ct5lp-hightpu-4t: 192 GB for 4 chips
            attention_share=_shares(197e12 / 1.5e9, (64, 3212, 7322), (128, 4239, 10408)),
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            918e12,
            31.24 * GIB,
            1640e9,
            interconnect=400e9,  # 4 links, 3200 Gbps
            network=25.6e12 / 8 / 256,
            host_memory_bytes=1536 * GIB / 8,
            attention_share=_shares(918e12 / 1.75e9, (64, 2144, 4055), (128, 2440, 4437)),
        ),
        Chip(  # after v5e and v6e: "TPU v5" is a part of "TPU v5 lite"
            "v5p",
            ("TPU v5", "TPU v5p"),
            459e12,
            95.73 * GIB,
            2765e9,
            interconnect=600e9,  # 6 links, 4800 Gbps
            network=50e9 / 8,
            host_memory_bytes=448e9 / 4,
            attention_share=_shares(459e12 / 2 / 1.75e9, (64, 3222, 7323), (128, 4242, 10409)),  # of a core
        ),
        Chip(
            "h200",
            ("H200",),
            989e12,
            141e9 * ALLOCATOR_FRACTION,
            4.8e12,
            interconnect=450e9,  # NVLink 4
            network=400e9 / 8,
            host_memory_bytes=369e9,  # a3-ultragpu-8g: 2,952 GB for 8
        ),
        Chip(
            "h100",
            ("H100", "GH200"),
            989e12,
            80e9 * ALLOCATOR_FRACTION,
            3.35e12,
            interconnect=450e9,
            network=400e9 / 8,
            host_memory_bytes=234e9,  # a3-highgpu-8g: 1,872 GB for 8
        ),
        Chip(
            "a100",
            ("A100",),
            312e12,
            80e9 * ALLOCATOR_FRACTION,  # the 80 GB board
            2.04e12,
            interconnect=300e9,  # NVLink 3
            network=200e9 / 8,
            host_memory_bytes=170e9,  # a2-ultragpu-8g: 1,360 GB for 8
        ),
        Chip(
            "b200",
            ("B200",),
            2250e12,
            180e9 * ALLOCATOR_FRACTION,
            8e12,
            interconnect=900e9,  # NVLink 5
            network=400e9 / 8,
        ),
        Chip(
            "l4",
            ("L4",),
            121e12,
            24e9 * ALLOCATOR_FRACTION,
            0.3e12,
            interconnect=32e9,  # PCIe 4.0 x16
            host_memory_bytes=16e9,  # g2-standard-4
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None where no data sheet is recorded (CPUs)."""
    for chip in CHIPS.values():
        if any(re.search(rf"\b{kind}\b", device_kind, re.IGNORECASE) for kind in chip.kinds):
            size = re.search(r"\b(\d+)GB", device_kind)  # a smaller board of the same chip: "NVIDIA A100-SXM4-40GB"
            memory = float(size[1]) * 1e9 * ALLOCATOR_FRACTION if size else chip.memory_bytes
            return dataclasses.replace(chip, memory_bytes=min(memory, chip.memory_bytes))
    return None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where no data sheet is recorded (CPUs): MFU is then left empty."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops
