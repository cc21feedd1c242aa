"""Chips, a row each: what one computes, holds and exchanges, how it is called and rented, what it costs.

A new chip is a new row (docs/CONTRIBUTING.md); at the end, what is known of a class of chips alone.

Sources: TPUs, Google's pages docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (read November 2026), and for v4's links
arXiv 2304.01433, Table 4; clocks, the table of en.wikipedia.org/wiki/Tensor_Processing_Unit. GPUs, NVIDIA's data sheets of the
SXM boards, without sparsity, and for `Gpu` the CUDA C++ programming guide. Bandwidths are bytes a second in one direction: half
of what a page calls bidirectional.
"""

from __future__ import annotations

import csv
import dataclasses
from importlib import resources

from gqa_jax.hardware.chip import ALLOCATOR_FRACTION, GIB, Calibration, Chip, Collectives, Efficiency, Gpu, Price, Tiles, Tpu


def _shares(flops_per_cycle: float, *rows: tuple[int, int, int]) -> tuple[tuple[int, float, float], ...]:
    """Shares from cycles for 1024 x 1024 scores of a head of size d: 4 d FLOPs a score forward, 10 d backward."""
    scores = 1024 * 1024
    return tuple(
        (d, 4 * d * scores / flops_per_cycle / forward, 10 * d * scores / flops_per_cycle / backward)
        for d, forward, backward in rows
    )


# Shapes of slices: of TPUs those that Google lists (docs.cloud.google.com/tpu/docs/v5e and so on, read November 2026).
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_HOST = ("1", "2", "4", "8")


def _prices() -> dict[str, tuple[Price, ...]]:
    """Dated list prices by chip (prices.csv), of one chip also where the list has those of a slice or a machine.

    Google's a3-highgpu-1g on demand is the sum of its parts: machines of one H100 are rented as spot alone.
    """
    found: dict[str, list[Price]] = {}
    with (resources.files("gqa_jax.hardware") / "prices.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            chip, usd, spot = row.pop("chip"), float(row.pop("usd_per_hour")), row.pop("spot") == "spot"
            found.setdefault(chip, []).append(Price(usd, **row, spot=spot))
    return {chip: tuple(prices) for chip, prices in found.items()}


# cuDNN on an H100: 538 and 645 TFLOP/s forward at 16K tokens, causal, bfloat16 (the autotuning files of
# github.com/openxla/tokamax, July and August 2026); backward FlashAttention-3's 474 and 561 (arXiv 2407.08608, FP16). Other
# GPUs are taken to reach the same shares until somebody measures.
_HOPPER_ATTENTION = ((64, 538 / 989, 474 / 989), (128, 645 / 989, 561 / 989))

# Seconds of collectives. The least that was published for these links: a server's own kernels, captured in a graph.
_HOP = "1 us a hop (github.com/jax-ml/scaling-book sharding.md, commit 0819a7d), there and back around a torus; not measured"
_TORUS = Collectives(((2, 2e-6), (4, 4e-6), (8, 6e-6), (16, 8e-6), (32, 12e-6), (64, 16e-6), (256, 32e-6)), "2026-11", _HOP)
_CUBE_TORUS = Collectives(((2, 2e-6), (4, 4e-6), (8, 6e-6), (16, 8e-6), (64, 12e-6), (512, 24e-6)), "2026-11", _HOP)
_NVSWITCH = Collectives(
    ((2, 3.7e-6), (4, 3.7e-6), (8, 5.7e-6)),
    "2025-01-15",
    "all-reduce kernel of SGLang on H100, github.com/sgl-project/sglang/pull/2904",
)
_NVLINK_5 = Collectives(
    ((4, 5.18e-6), (8, 7e-6)), "2026-03-21",
    "4 GB200: github.com/NVIDIA/nccl-tests/issues/333; 16 KiB on B300, one-shot: github.com/vllm-project/vllm/pull/37756",
)  # fmt: skip
_NCCL = (
    "NCCL's model, tree and LL protocol: 6.8 us and {} us a step, 2 log2(n) steps (github.com/NVIDIA/nccl src/graph/tuning.cc)"
)
_NVLINK_3 = Collectives(((2, 8.0e-6), (4, 9.2e-6), (8, 10.4e-6)), "2024-07-01", _NCCL.format(0.6))
_PCIE = Collectives(((2, 8.8e-6), (4, 10.8e-6), (8, 12.8e-6)), "2024-07-01", _NCCL.format("1.0"))

# Tiles for matrix units of 128 x 128 and of 256 x 256.
_TILES_128 = (
    128,
    Tiles(rows=1024, keys=2048, strip=256, chunk=128, ahead=6, together=2),
    Tiles(rows=1024, keys=1024, strip=256, chunk=128, ahead=3, together=2),
)
_TILES_256 = (
    128,
    Tiles(rows=1024, keys=2048, strip=256, chunk=256, ahead=5, together=4),
    Tiles(rows=1024, keys=1024, strip=256, chunk=256, ahead=3, together=2),
)

# memory_bytes of TPUs is what XLA (libtpu 0.0.51) says it has when a program compiled ahead of time is too large, "exceeds
# available HBM (15.75G)". Attention: cycles of the compiler's static schedule of our kernels for blocks without a mask (README,
# "What it costs on a TPU"; `python -m benchmarks.tpu_cycles`), not run on a chip. v4 has no such figures.
# fmt: off
_ROWS = (
    Chip(
        "v4", kinds=("TPU v4",), peak_flops=275e12,
        memory_bytes=30.75 * GIB, memory_bandwidth=1228e9, host_memory_bytes=407e9 / 4,
        interconnect=300e9,  # 6 links of 50 GB/s
        collectives=_CUBE_TORUS, shapes=_CUBE,
        # Its matrix units are those of a v5p. Its two cores work as one device, as they do on Google Cloud, when libtpu is
        # told so; those of a v5p always do.
        tpu=Tpu("v4", counted=2, image="tpu-ubuntu2204-base", tiles=(_TILES_128,), libtpu_config="megacore"),
    ),
    Chip(
        "v5e", kinds=("TPU v5 lite", "TPU v5e"), peak_flops=197e12, narrow_flops=(("int8", 394e12),),
        memory_bytes=15.75 * GIB, memory_bandwidth=819e9, host_memory_bytes=192e9 / 4,  # ct5lp-hightpu-4t
        interconnect=200e9, network=6.4e12 / 8 / 256,  # 4 links, 1600 Gbps; a share of a pod of 256
        collectives=_TORUS, shapes=_FLAT, attention_share=_shares(197e12 / 1.5e9, (64, 3212, 7322), (128, 4239, 10408)),
        tpu=Tpu("v5litepod", counted=1, image="v2-alpha-tpuv5-lite", tiles=(_TILES_128,)),
    ),
    Chip(
        "v5p", kinds=("TPU v5", "TPU v5p"), peak_flops=459e12, narrow_flops=(("int8", 918e12),),
        memory_bytes=95.73 * GIB, memory_bandwidth=2765e9, host_memory_bytes=448e9 / 4,
        interconnect=600e9, network=50e9 / 8,  # 6 links, 4800 Gbps
        collectives=_CUBE_TORUS, shapes=_CUBE,
        attention_share=_shares(459e12 / 2 / 1.75e9, (64, 3222, 7323), (128, 4242, 10409)),  # of a core
        tpu=Tpu("v5p", counted=2, image="v2-alpha-tpuv5", tiles=(_TILES_128,)),
    ),
    Chip(
        "v6e", kinds=("TPU v6 lite", "TPU v6e"), peak_flops=918e12, narrow_flops=(("int8", 1836e12),),
        memory_bytes=31.24 * GIB, memory_bandwidth=1640e9, host_memory_bytes=1536 * GIB / 8,
        interconnect=400e9, network=25.6e12 / 8 / 256,  # 4 links, 3200 Gbps
        collectives=_TORUS, shapes=_FLAT, attention_share=_shares(918e12 / 1.75e9, (64, 2144, 4055), (128, 2440, 4437)),
        tpu=Tpu("v6e", counted=1, image="v2-alpha-tpuv6e", tiles=(_TILES_256,)),
    ),
    Chip(
        "h200", kinds=("H200",), peak_flops=989e12, narrow_flops=(("float8", 1979e12), ("int8", 1979e12)),
        memory_bytes=141e9 * ALLOCATOR_FRACTION, memory_bandwidth=4.8e12, host_memory_bytes=2952e9 / 8,  # a3-ultragpu-8g
        interconnect=450e9, network=400e9 / 8,  # NVLink 4
        collectives=_NVSWITCH, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        gpu=Gpu("H200", "NVIDIA H200", (9, 0), 132, shared_kib=228, clock_ghz=1.98, l2_mib=50, board_mib=143771),
    ),
    Chip(
        "h100", kinds=("H100", "GH200"), peak_flops=989e12, narrow_flops=(("float8", 1979e12), ("int8", 1979e12)),
        memory_bytes=80e9 * ALLOCATOR_FRACTION, memory_bandwidth=3.35e12, host_memory_bytes=1872e9 / 8,  # a3-highgpu-8g
        interconnect=450e9, network=400e9 / 8,
        collectives=_NVSWITCH, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        gpu=Gpu("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, shared_kib=228, clock_ghz=1.98, l2_mib=50, board_mib=81559),
    ),
    Chip(
        "a100", kinds=("A100",), peak_flops=312e12, narrow_flops=(("int8", 624e12),),  # the board of 80 GB
        memory_bytes=80e9 * ALLOCATOR_FRACTION, memory_bandwidth=2.04e12, host_memory_bytes=1360e9 / 8,  # a2-ultragpu-8g
        interconnect=300e9, network=200e9 / 8,  # NVLink 3
        collectives=_NVLINK_3, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        gpu=Gpu("A100-80GB", "NVIDIA A100-SXM4-80GB", (8, 0), 108, shared_kib=164, clock_ghz=1.41, l2_mib=40, board_mib=81920),
    ),
    Chip(
        "b200", kinds=("B200",), peak_flops=2250e12, narrow_flops=(("float8", 4500e12), ("int8", 4500e12), ("float4", 9000e12)),
        memory_bytes=180e9 * ALLOCATOR_FRACTION, memory_bandwidth=8e12,
        interconnect=900e9, network=400e9 / 8,  # NVLink 5
        collectives=_NVLINK_5, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        gpu=Gpu("B200", "NVIDIA B200", (10, 0), 148, shared_kib=228, clock_ghz=1.96, l2_mib=126, board_mib=183359),
    ),
    Chip(
        "l4", kinds=("L4",), peak_flops=121e12, narrow_flops=(("float8", 242e12), ("int8", 242e12)),
        memory_bytes=24e9 * ALLOCATOR_FRACTION, memory_bandwidth=0.3e12, host_memory_bytes=16e9,  # g2-standard-4
        interconnect=32e9,  # PCIe 4.0 x16
        collectives=_PCIE, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        gpu=Gpu("L4", "NVIDIA L4", (8, 9), 58, shared_kib=100, clock_ghz=2.04, l2_mib=48, board_mib=23034),
    ),
)
# fmt: on

_LISTED = _prices()
CHIPS = {chip.name: dataclasses.replace(chip, prices=_LISTED.get(chip.name, ())) for chip in _ROWS}

# Devices without a row, of which kernels know enough.
SAME_MATRIX_UNITS = {"TPU7x": "v6e"}  # JAX's device kind -> the chip whose tiles suit it
# Word of the device kind -> compute capability (developer.nvidia.com/cuda/gpus and .../cuda/legacy-gpus).
OTHER_GPUS = {
    "P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A800": (8, 0), "A30": (8, 0), "A10": (8, 6), "A10G": (8, 6), "A40": (8, 6),
    "RTX 3090": (8, 6), "L40": (8, 9), "L40S": (8, 9), "RTX 4090": (8, 9), "H800": (9, 0), "H20": (9, 0), "GB200": (10, 0),
    "B300": (10, 3), "GB300": (10, 3), "Thor": (11, 0), "RTX 5090": (12, 0), "RTX PRO 4500": (12, 0), "RTX PRO 5000": (12, 0),
    "RTX PRO 6000": (12, 0), "GB10": (12, 1),
}  # fmt: skip

#: What compiled training steps have, by class of device, and by chip where it differs.
_STATIC = "benchmarks/results/static_cost.json, of {}, 2026-11-28, jax 0.11.2"
CALIBRATED = {
    "gpu": Calibration(0.75, 0.9, 0.82, 1.0, 0.07, 104, _STATIC.format("H100")),
    "tpu": Calibration(0.95, 0.55, 0.82, 0.7, 0.14, 12, _STATIC.format("v5e")),
    "v6e": Calibration(0.62, 0.7, 0.82, 1.3, 0.06, 7, _STATIC.format("v6e")),
}

_PUBLIC = "public measurements of {} (docs/serving-measured.md)"
#: What servers reached in public measurements, fitted by class of device (docs/serving-measured.md); MATMUL: of the peak of
#: operands of so many bits.
SERVED = {
    "gpu": Efficiency(0.71, 1.0, 0.81, 0.95, 51e-6, 0.52, _PUBLIC.format("GPU servers, 2023 to 2026")),
    "tpu": Efficiency(0.54, 1.0, 1.0, 0.68, 1e-6, 1.0, _PUBLIC.format("TPU servers, 2024 to 2026")),
}
MATMUL = {"gpu": {16: 0.71, 8: 0.52, 4: 0.39}, "tpu": {}}

#: Model FLOPs utilisation of training in public measurements, median by class of device (docs/training-measured.md).
TRAINED = {"gpu": 0.4, "tpu": 0.49}
