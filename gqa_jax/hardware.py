"""Accelerators, a row each: what one computes, holds and exchanges, how it is called and rented, what it costs.

Everything that is known of a chip is its row of `CHIPS`; a new chip is a new row (docs/adding-a-chip.md).

Sources: TPUs, Google's pages docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (read November 2026), and for v4's links
arXiv 2304.01433, Table 4; clocks, the table of en.wikipedia.org/wiki/Tensor_Processing_Unit. GPUs, NVIDIA's data sheets of the
SXM boards, without sparsity, and for `Gpu` the CUDA C++ programming guide. Bandwidths are bytes a second in one direction: half
of what a page calls bidirectional.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from gqa_jax.errors import closest

GIB = 2**30
#: Of a GPU's memory that JAX takes unless the environment says otherwise (`memory_fraction`).
ALLOCATOR_FRACTION = 0.75
#: Variables of the environment that set it, the one that jaxlib 0.11 reads first.
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
#: Of a device's memory that a server fills with parameters and caches: vLLM's gpu_memory_utilization is 0.9 unless set.
SERVER_FRACTION = 0.9
CHIPS_PER_HOST = 4  # of a TPU slice of several hosts


class Price(NamedTuple):
    """US dollars for an hour of one chip with its share of the host, without storage and taxes.

    Lists of prices change and differ by vendor and region: every row of `CHIPS` fills in all fields.
    """

    usd_per_hour: float
    vendor: str
    product: str = ""  # by its whole name, the vendor's first
    region: str = ""  # "any region": the list names none
    date: str = ""  # of the price list; a month: when it was read
    source: str = ""
    spot: bool = False  # of a machine that may be taken back; else on demand

    @property
    def origin(self) -> str:
        """Who asks for it, where, on which terms unless on demand, since when.

        The product too, where the vendor has others of the same chip, region and terms.
        """
        rows = next((chip.prices for chip in CHIPS.values() if self in chip.prices), ())
        alike = {row.product for row in rows if (row.vendor, row.region, row.spot) == (self.vendor, self.region, self.spot)}
        seller = self.product if len(alike) > 1 else self.vendor
        return ", ".join(filter(None, (seller, self.region, "spot" if self.spot else "", self.date)))


class Collectives(NamedTuple):
    """How long an all-reduce of a few bytes takes over the links of a slice or host, whatever their bandwidth."""

    seconds: tuple[tuple[int, float], ...]  # (devices, seconds), fewest devices first; a number between takes the next one's
    date: str
    source: str  # what was measured, or by which model of the links it is worked out


class Efficiency(NamedTuple):
    """What serving reaches of a device's peaks, part by part: one number for all would favour a model by what limits it.

    Shares above 0 and at most 1, and seconds of at least 0.
    """

    matmul: float  # of the peak FLOP/s, in products with parameters
    attention: float  # of the FLOP/s that the kernels reach at the head size (`Chip.attention_shares`)
    weights_bandwidth: float  # of the bytes/s, reading parameters
    cache_bandwidth: float  # of the bytes/s, reading keys and values
    layer_seconds: float  # of every layer in every phase: kernels that start one after another
    exchange: float = 1.0  # of the links: least over measured seconds of exchanges
    source: str = "as given"
    bound: bool = False  # all parts overlap: what no server beats

    @classmethod
    def uniform(cls, share: float) -> Efficiency:
        """The same share of every peak."""
        return cls(share, share, share, share, 0.0, share)

    @classmethod
    def of_bound(cls) -> Efficiency:
        """Peaks, all at once."""
        return cls(1.0, 1.0, 1.0, 1.0, 0.0, source="the bound: every peak reached, all at once", bound=True)

    def checked(self) -> Efficiency:
        """Itself. Raises ValueError for what is no share."""
        for name in ("matmul", "attention", "weights_bandwidth", "cache_bandwidth", "exchange"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"efficiency: {name} = {value}: a share above 0 and at most 1")
        if not 0 <= self.layer_seconds < math.inf:
            raise ValueError(f"efficiency: layer_seconds = {self.layer_seconds}: seconds of at least 0")
        return self


class Measured(NamedTuple):
    """How near to the planner's bound training came on the chip itself."""

    training: float  # seconds of a step at the roofline (`planner.Estimate.seconds_step`) over those that it took
    case: str  # model, context, mesh
    date: str
    source: str  # the command that measured it, or where its results are kept


class Calibration(NamedTuple):
    """Shares of a chip's peaks that the planner's expectation of a training step is made with, and how near it comes.

    What it is compared with is the static cost of compiled programs (`benchmarks`), not a time on a chip: `Measured` is that.
    """

    products: float  # of the peak FLOP/s, in products
    bandwidth: float  # of the bytes/s of the memory
    network: float  # of the bytes/s to other devices
    passes: float  # bytes of norms, SwiGLU, stacked arrays over those of a GPU's kernels (`planning.traffic`)
    error: float  # largest relative difference from the static cost, held out programs included
    programs: int  # that were compared
    source: str


class Tiles(NamedTuple):
    """How a pass of `gqa_jax.attention.tpu` is cut up. Scores are computed in pieces of `chunk` keys x `strip` queries.

    A piece's product is issued `ahead` pieces before the softmax that takes it, so that the matrix units never wait;
    `together` neighbours (strips, or chunks in the backward pass) are interleaved, so that their chains are independent.
    """

    rows: int  # queries of a tile: heads * tokens, about
    keys: int  # keys of a block
    strip: int
    chunk: int
    ahead: int
    together: int


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What only a TPU has: Cloud TPU's names of it, and how our attention kernels are cut for it."""

    accelerator: str  # Cloud TPU's accelerator type before its count ("v5litepod-8"); SkyPilot puts "tpu-" before it
    counted: int  # of a chip in that count: its cores, 2, or the chip itself, 1
    image: str  # system image of its machines: Cloud TPU's runtime version
    #: (largest head size, forward, backward), smallest size first: what minimises the cycles of the compiler's static schedule
    #: (`benchmarks/tpu_cycles.py`), not times on a chip. `python -m benchmarks.attention --tune` measures, and prints new ones.
    tiles: tuple[tuple[int, Tiles, Tiles], ...] = ()
    libtpu_config: str | None = None  # libtpu's chip_config_name; None: its own choice


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What only an NVIDIA GPU has: SkyPilot's name, and what XLA asks of a model that is not here."""

    sky: str  # SkyPilot's name of the accelerator
    device_kind: str  # as JAX names the board
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_kib: int  # memory of a multiprocessor; a program may have 1 KiB less
    clock_ghz: float
    l2_mib: int  # cache
    board_mib: int  # of memory, as nvidia-smi shows it: what a server has a fraction of


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; of TPUs v4 and v5p, whose two cores work as one, a chip."""

    name: str
    peak_flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float  # that a program may use
    memory_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s to its neighbours in a slice or host, over all links at once
    network: float | None = None  # bytes/s to other slices or hosts; None: not published
    host_memory_bytes: float | None = None  # of the host that it is rented with, its share; None: nothing is offloaded
    collectives: Collectives | None = None  # None: not published, and several of them can't share a model in `search.roofline`
    #: Peaks of narrower operands, FLOP/s by dtype; what is not in it is computed in bfloat16.
    narrow_flops: tuple[tuple[str, float], ...] = ()
    kinds: tuple[str, ...] = ()  # JAX's names of it: of a TPU whole device kinds, of a GPU words of them
    shapes: tuple[str, ...] = ()  # of slices that can be rented: a TPU's topologies, GPUs of one host
    prices: tuple[Price, ...] = ()  # the first is taken where none is asked for (`gqa_jax.prices`)
    measured: Measured | None = None  # None: never run on; `plan` then gives hours at the roofline
    #: Share of the peak that the attention kernels reach: head size -> (forward, backward). Empty: taken as 1.
    attention_share: tuple[tuple[int, float, float], ...] = ()
    tpu: Tpu | None = None
    gpu: Gpu | None = None

    def __post_init__(self):
        for count, seconds in () if self.collectives is None else self.collectives.seconds:
            if not (count >= 2 and 0 < seconds < math.inf):
                raise ValueError(
                    f"{self.name}: collectives of {count} devices take {seconds} s: must be above 0, of 2 devices or more"
                )
        for price in self.prices:
            if not 0 < price.usd_per_hour < math.inf:
                raise ValueError(f"{self.name}: usd_per_hour = {price.usd_per_hour}: must be US dollars, a number above 0")

    @property
    def price(self) -> Price | None:
        """What an hour costs where no other price is asked for; None: nobody lists it."""
        return self.prices[0] if self.prices else None

    @property
    def kind(self) -> str:
        """Its class, "gpu" or "tpu": the key of what is known of classes."""
        return "gpu" if self.tpu is None else "tpu"

    @property
    def board_bytes(self) -> float:
        """Memory of the device, as far as programs may have it."""
        if self.gpu is None:
            return self.memory_bytes
        board = self.gpu.board_mib * 2**20
        smaller = self.memory_bytes / ALLOCATOR_FRACTION  # of a smaller board of the same chip (`chip_of`)
        return board if smaller > 0.9 * board else smaller

    @property
    def server_bytes(self) -> float:
        """Memory that a server fills with parameters and caches."""
        return SERVER_FRACTION * self.board_bytes

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products of operands of `dtype`; of bfloat16 where the chip has no faster ones for it."""
        return dict(self.narrow_flops).get(dtype, self.peak_flops)

    def collective_seconds(self, n_devices: int) -> float:
        """Seconds of an all-reduce of a few bytes over `n_devices`; 0 for one. Beyond the table: as for the most in it.

        Raises ValueError where nothing is known of the chip's collectives.
        """
        if n_devices == 1:
            return 0.0
        if self.collectives is None:
            raise ValueError(
                f"device {self.name!r} has no seconds per collective (hardware.Collectives), needed for {n_devices}"
            )
        known = self.collectives.seconds
        return next((seconds for count, seconds in known if count >= n_devices), known[-1][1])

    def is_called(self, device_kind: str) -> bool:
        """Whether JAX's `device_kind` is this chip."""
        if self.tpu is not None:
            return device_kind.lower() in (kind.lower() for kind in self.kinds)
        return any(_has_word(device_kind, word) for word in self.kinds)

    def attention_shares(self, head_dim: int) -> tuple[float, float]:
        """Shares of the peak, forward and backward, at a head size: a smaller one takes the time of the next in the table."""
        for size, forward, backward in self.attention_share:
            if head_dim <= size or size == self.attention_share[-1][0]:
                filled = min(1.0, head_dim / size)
                return forward * filled, backward * filled
        return 1.0, 1.0


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


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

# Price lists.
_SKYPILOT = "https://github.com/skypilot-org/skypilot-catalog catalogs/v8/gcp/vms.csv, commit 006059e0"
_CYCLENERD = "https://github.com/Cyclenerd/google-cloud-pricing-cost-calculator pricing.yml, commit dac31281"
_SILYBENCH = "https://github.com/tgarg01/silybench-data prices/gpu_hourly.yaml, commit 045df3b5"
_DATARECEIPTS = (
    "https://github.com/datareceipts/data-receipts 109-gpu-pricing/hyperscalers.json (as a search quoted it; not opened)"
)
_TANOD = "https://huggingface.co/datasets/tanod/cloud-gpu-list-prices"
_EVANGELIST = "https://github.com/api-evangelist/lambda-labs plans/lambda-labs-plans-pricing.yml, commit 1929382e"


def _listed(
    vendor: str, region: str, date: str, source: str, usd: Mapping[str, float], *, spot: bool = False
) -> tuple[Price, ...]:
    """Prices of one list: of products by their names without the vendor's."""
    return tuple(Price(each, vendor, f"{vendor} {name}", region, date, source, spot) for name, each in usd.items())


_google = functools.partial(_listed, "Google Cloud", "us-central1")
_runpod = functools.partial(_listed, "RunPod", "any region", "2026-09-25", _SILYBENCH)
_nebius = functools.partial(_listed, "Nebius", "any region", "2026-09-25", _SILYBENCH)
_lambda = functools.partial(_listed, "Lambda", "any region", "2026-09-20", _EVANGELIST)
_aws = functools.partial(_listed, "AWS", "us-east-1", "2026-11-09", _DATARECEIPTS)
_azure = functools.partial(_listed, "Azure", "eastus", "2026-11-09", _DATARECEIPTS)


def _cloud_tpu(name: str, *rows: tuple[str, float, float]) -> tuple[Price, ...]:
    """Google's prices of a TPU, from (regions, on demand, spot): of a chip, where the list has that of a slice."""
    return tuple(
        Price(usd, "Google Cloud", f"Google Cloud TPU {name}", region, "2026-11", _SKYPILOT, spot)
        for regions, on_demand, spot_usd in rows
        for region in regions.split()
        for usd, spot in ((on_demand, False), (spot_usd, True))
    )


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
        prices=_cloud_tpu("v4", ("us-central2", 3.22, 0.922)),
        # Its matrix units are those of a v5p. Its two cores work as one device, as they do on Google Cloud, when libtpu is
        # told so; those of a v5p always do.
        tpu=Tpu("v4", counted=2, image="tpu-ubuntu2204-base", tiles=(_TILES_128,), libtpu_config="megacore"),
    ),
    Chip(
        "v5e", kinds=("TPU v5 lite", "TPU v5e"), peak_flops=197e12, narrow_flops=(("int8", 394e12),),
        memory_bytes=15.75 * GIB, memory_bandwidth=819e9, host_memory_bytes=192e9 / 4,  # ct5lp-hightpu-4t
        interconnect=200e9, network=6.4e12 / 8 / 256,  # 4 links, 1600 Gbps; a share of a pod of 256
        collectives=_TORUS, shapes=_FLAT, attention_share=_shares(197e12 / 1.5e9, (64, 3212, 7322), (128, 4239, 10408)),
        prices=_cloud_tpu(
            "v5e", ("us-central1 us-east1 us-west1", 1.20, 0.245),
            ("us-west4", 1.20, 0.48),
            ("us-east4 us-east5", 1.20, 0.60),
            ("europe-west4", 1.56, 0.445),
        ),
        tpu=Tpu("v5litepod", counted=1, image="v2-alpha-tpuv5-lite", tiles=(_TILES_128,)),
    ),
    Chip(
        "v5p", kinds=("TPU v5", "TPU v5p"), peak_flops=459e12, narrow_flops=(("int8", 918e12),),
        memory_bytes=95.73 * GIB, memory_bandwidth=2765e9, host_memory_bytes=448e9 / 4,
        interconnect=600e9, network=50e9 / 8,  # 6 links, 4800 Gbps
        collectives=_CUBE_TORUS, shapes=_CUBE,
        attention_share=_shares(459e12 / 2 / 1.75e9, (64, 3222, 7323), (128, 4242, 10409)),  # of a core
        prices=_cloud_tpu(
            "v5p", ("us-central1 us-east1", 4.20, 0.836),
            ("us-east5", 4.20, 1.68),
            ("europe-west4", 4.2525, 1.349),
        ),
        tpu=Tpu("v5p", counted=2, image="v2-alpha-tpuv5", tiles=(_TILES_128,)),
    ),
    Chip(
        "v6e", kinds=("TPU v6 lite", "TPU v6e"), peak_flops=918e12, narrow_flops=(("int8", 1836e12),),
        memory_bytes=31.24 * GIB, memory_bandwidth=1640e9, host_memory_bytes=1536 * GIB / 8,
        interconnect=400e9, network=25.6e12 / 8 / 256,  # 4 links, 3200 Gbps
        collectives=_TORUS, shapes=_FLAT, attention_share=_shares(918e12 / 1.75e9, (64, 2144, 4055), (128, 2440, 4437)),
        prices=_cloud_tpu(
            "v6e", ("us-central1 us-east1 us-west1", 2.70, 0.544),
            ("us-east5", 2.70, 1.215),
            ("us-south1", 2.70, 1.35),
            ("europe-west4", 2.97, 1.037),
            ("asia-northeast1", 3.24, 0.944),
        ),
        tpu=Tpu("v6e", counted=1, image="v2-alpha-tpuv6e", tiles=(_TILES_256,)),
    ),
    Chip(
        "h200", kinds=("H200",), peak_flops=989e12, narrow_flops=(("float8", 1979e12), ("int8", 1979e12)),
        memory_bytes=141e9 * ALLOCATOR_FRACTION, memory_bandwidth=4.8e12, host_memory_bytes=2952e9 / 8,  # a3-ultragpu-8g
        interconnect=450e9, network=400e9 / 8,  # NVLink 4
        collectives=_NVSWITCH, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        prices=(
            *_google("2026-10-13", _TANOD, {"a3-ultragpu-8g": 10.4365}),
            *_runpod({"secure H200": 4.59, "community H200": 3.59}),
            *_nebius({"HGX H200": 4.50}),
        ),
        gpu=Gpu("H200", "NVIDIA H200", (9, 0), 132, shared_kib=228, clock_ghz=1.98, l2_mib=50, board_mib=143771),
    ),
    Chip(
        "h100", kinds=("H100", "GH200"), peak_flops=989e12, narrow_flops=(("float8", 1979e12), ("int8", 1979e12)),
        memory_bytes=80e9 * ALLOCATOR_FRACTION, memory_bandwidth=3.35e12, host_memory_bytes=1872e9 / 8,  # a3-highgpu-8g
        interconnect=450e9, network=400e9 / 8,
        collectives=_NVSWITCH, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        prices=(
            # The sum of its parts on demand: machines of one H100 are rented as spot alone.
            *_google("2026-09-26", _SILYBENCH, {"a3-highgpu-1g": 10.9791}),
            *_google("2026-09-26", _SILYBENCH, {"a3-highgpu-1g": 6.571}, spot=True),
            *_lambda({"8x H100 SXM": 3.99, "4x H100 SXM": 4.09, "2x H100 SXM": 4.19, "1x H100 SXM": 4.29}),
            *_runpod({"secure H100 SXM": 3.49, "community H100 SXM": 2.69}),
            *_nebius({"HGX H100": 3.85}),
            *_aws({"p5.48xlarge": 6.88}),
            *_azure({"ND96isr_H100_v5": 12.29}),
        ),
        gpu=Gpu("H100", "NVIDIA H100 80GB HBM3", (9, 0), 132, shared_kib=228, clock_ghz=1.98, l2_mib=50, board_mib=81559),
    ),
    Chip(
        "a100", kinds=("A100",), peak_flops=312e12, narrow_flops=(("int8", 624e12),),  # the board of 80 GB
        memory_bytes=80e9 * ALLOCATOR_FRACTION, memory_bandwidth=2.04e12, host_memory_bytes=1360e9 / 8,  # a2-ultragpu-8g
        interconnect=300e9, network=200e9 / 8,  # NVLink 3
        collectives=_NVLINK_3, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        prices=(
            *_google("2026-08-20", _CYCLENERD, {"a2-ultragpu-8g": 40.5503831 / 8}),
            *_lambda({"8x A100 SXM 80 GB": 2.79}),
            *_runpod({"secure A100 SXM": 1.59, "community A100 SXM": 1.39}),
            *_aws({"p4de.24xlarge": 3.43}),
        ),
        gpu=Gpu("A100-80GB", "NVIDIA A100-SXM4-80GB", (8, 0), 108, shared_kib=164, clock_ghz=1.41, l2_mib=40, board_mib=81920),
    ),
    Chip(
        "b200", kinds=("B200",), peak_flops=2250e12, narrow_flops=(("float8", 4500e12), ("int8", 4500e12), ("float4", 9000e12)),
        memory_bytes=180e9 * ALLOCATOR_FRACTION, memory_bandwidth=8e12,
        interconnect=900e9, network=400e9 / 8,  # NVLink 5
        collectives=_NVLINK_5, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        prices=(
            *_lambda({"8x B200 SXM6": 6.69, "4x B200 SXM6": 6.79, "2x B200 SXM6": 6.89, "1x B200 SXM6": 6.99}),
            *_runpod({"secure B200": 6.79, "community B200": 5.98}),
            *_nebius({"HGX B200": 7.15}),
        ),
        gpu=Gpu("B200", "NVIDIA B200", (10, 0), 148, shared_kib=228, clock_ghz=1.96, l2_mib=126, board_mib=183359),
    ),
    Chip(
        "l4", kinds=("L4",), peak_flops=121e12, narrow_flops=(("float8", 242e12), ("int8", 242e12)),
        memory_bytes=24e9 * ALLOCATOR_FRACTION, memory_bandwidth=0.3e12, host_memory_bytes=16e9,  # g2-standard-4
        interconnect=32e9,  # PCIe 4.0 x16
        collectives=_PCIE, shapes=_HOST, attention_share=_HOPPER_ATTENTION,
        prices=_google("2026-08-20", _CYCLENERD, {"g2-standard-4": 0.706832255}),
        gpu=Gpu("L4", "NVIDIA L4", (8, 9), 58, shared_kib=100, clock_ghz=2.04, l2_mib=48, board_mib=23034),
    ),
)
# fmt: on

CHIPS = {chip.name: chip for chip in _ROWS}


# Devices without a row, of which kernels know enough.
SAME_MATRIX_UNITS = {"TPU7x": "v6e"}  # JAX's device kind -> the chip whose tiles suit it
# Word of the device kind -> compute capability (developer.nvidia.com/cuda/gpus and .../cuda/legacy-gpus).
OTHER_GPUS = {
    "P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A800": (8, 0), "A30": (8, 0), "A10": (8, 6), "A10G": (8, 6), "A40": (8, 6),
    "RTX 3090": (8, 6), "L40": (8, 9), "L40S": (8, 9), "RTX 4090": (8, 9), "H800": (9, 0), "H20": (9, 0), "GB200": (10, 0),
    "B300": (10, 3), "GB300": (10, 3), "Thor": (11, 0), "RTX 5090": (12, 0), "RTX PRO 4500": (12, 0), "RTX PRO 5000": (12, 0),
    "RTX PRO 6000": (12, 0), "GB10": (12, 1),
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None where no data sheet is recorded (CPUs)."""
    chip = next((chip for chip in CHIPS.values() if chip.is_called(device_kind)), None)
    board = re.search(r"\b(\d+)GB", device_kind)
    if chip is None or board is None:
        return chip
    memory = float(board[1]) * 1e9 * ALLOCATOR_FRACTION  # of a smaller board of the same chip: "NVIDIA A100-SXM4-40GB"
    return dataclasses.replace(chip, memory_bytes=min(memory, chip.memory_bytes))


def memory_fraction(environment: Mapping[str, str]) -> float:
    """Share of a GPU's memory that JAX takes in this environment. Raises ValueError for what is no share of it."""
    for name in FRACTION_VARIABLES:
        if text := environment.get(name):
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 < value <= 1:
                raise ValueError(f"{name}={text}: must be a number above 0 and at most 1, the share of a GPU's memory")
            return value
    return ALLOCATOR_FRACTION


def on_this_machine(chip: Chip, environment: Mapping[str, str]) -> Chip:
    """`chip` with the memory that JAX takes of it here: that of a GPU by `memory_fraction`."""
    if chip.gpu is None:
        return chip
    return dataclasses.replace(chip, memory_bytes=chip.memory_bytes / ALLOCATOR_FRACTION * memory_fraction(environment))


#: What compiled training steps have, by class of device, and by chip where it differs.
_STATIC = "benchmarks/results/static_cost.json, of {}, 2026-11-28, jax 0.11.2"
CALIBRATED = {
    "gpu": Calibration(0.75, 0.9, 0.82, 1.0, 0.07, 104, _STATIC.format("H100")),
    "tpu": Calibration(0.95, 0.55, 0.82, 0.7, 0.14, 12, _STATIC.format("v5e")),
    "v6e": Calibration(0.62, 0.7, 0.82, 1.3, 0.06, 7, _STATIC.format("v6e")),
}


def calibration(chip: Chip) -> Calibration:
    """Of the chip itself where it has one, else of its class, GPU or TPU."""
    return CALIBRATED.get(chip.name, CALIBRATED[chip.kind])


_PUBLIC = "public measurements of {} (docs/serving-measured.md)"
#: What servers reached in public measurements, fitted by class of device (docs/serving-measured.md); MATMUL: of the peak of
#: operands of so many bits.
SERVED = {
    "gpu": Efficiency(0.71, 1.0, 0.81, 0.95, 51e-6, 0.52, _PUBLIC.format("GPU servers, 2023 to 2026")),
    "tpu": Efficiency(0.54, 1.0, 1.0, 0.68, 1e-6, 1.0, _PUBLIC.format("TPU servers, 2024 to 2026")),
}
MATMUL = {"gpu": {16: 0.71, 8: 0.52, 4: 0.39}, "tpu": {}}


def default_efficiency(chip: Chip, param_dtype: str = "bfloat16") -> Efficiency:
    """What is taken of a chip that nobody has calibrated: that of its class, GPU or TPU, for parameters of a dtype."""
    narrow = {"float8": 8, "int8": 8, "float4": 4, "int4": 4} if param_dtype in dict(chip.narrow_flops) else {}
    bits = narrow.get(param_dtype, 16)
    return SERVED[chip.kind]._replace(matmul=MATMUL[chip.kind].get(bits, SERVED[chip.kind].matmul))


#: Model FLOPs utilisation of training in public measurements, median by class of device (docs/training-measured.md).
TRAINED = {"gpu": 0.4, "tpu": 0.49}


def trained_mfu(chip: Chip) -> float:
    """Share of the peak in bfloat16 that training is taken to reach where it was not measured on the chip."""
    return TRAINED[chip.kind]


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where no data sheet is recorded (CPUs): MFU is then left empty."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops


def compute_capability(device_kind: str) -> tuple[int, int] | None:
    """Major and minor number of an NVIDIA GPU by JAX's name of it, or None for what is not one or is not known."""
    chip = chip_of(device_kind)
    if chip is not None:
        return None if chip.gpu is None else chip.gpu.compute_capability
    return next((known for word, known in OTHER_GPUS.items() if _has_word(device_kind, word)), None)


def tiles_of(device_kind: str, head_dim: int) -> tuple[Tiles, Tiles] | None:
    """Tiles of the forward and the backward attention kernel on a TPU by JAX's name of it; None where there are none."""
    chip = CHIPS[SAME_MATRIX_UNITS[device_kind]] if device_kind in SAME_MATRIX_UNITS else chip_of(device_kind)
    rows = () if chip is None or chip.tpu is None else chip.tpu.tiles
    return next(((forward, backward) for largest, forward, backward in rows if head_dim <= largest), None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together, by name ("v5e:4x4", "v5p:2x2x4", "h200:8"); JAX shows each as one device."""

    name: str
    chip: Chip
    n_chips: int

    @property
    def shape(self) -> str:
        """Of a TPU slice its topology, "4x4"; of a GPU host how many, "8"."""
        return self.name.partition(":")[2]

    @property
    def is_tpu(self) -> bool:
        return self.chip.tpu is not None

    @property
    def n_hosts(self) -> int:
        """Machines, so processes: 4 TPU chips each where there are several; GPUs of one machine."""
        return max(1, self.n_chips // CHIPS_PER_HOST) if self.is_tpu else 1

    def require_compiler(self) -> None:
        """Raises ValueError, with what to install, where programs can't be compiled for these chips."""
        module = "libtpu" if self.is_tpu else "jax_cuda13_plugin"
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ValueError(f"compiling for {self.name} takes the package {package}: pip install 'gqa-jax[aot]'")


SLICES = {
    f"{chip.name}:{shape}": Slice(f"{chip.name}:{shape}", chip, math.prod(map(int, shape.split("x"))))
    for chip in CHIPS.values()
    for shape in chip.shapes
}


def find(name: str) -> Slice:
    """The slice of that name. Raises ValueError naming the closest."""
    if name in SLICES:
        return SLICES[name]
    chip = CHIPS.get(name.partition(":")[0])
    if chip is not None:
        raise ValueError(
            f"unknown topology {name!r}: of {chip.name} there are {', '.join(f'{chip.name}:{s}' for s in chip.shapes)}"
        )
    raise ValueError(f"unknown topology {name!r}: {closest(name, SLICES, f'there are {listing()}')}")


def listing() -> str:
    """The names of all slices, chip by chip."""
    return "; ".join(f"{chip.name}:{', '.join(chip.shapes)}" for chip in CHIPS.values())


def larger(than: Slice) -> list[Slice]:
    """Slices of the same chip with more of them, smallest first."""
    return [s for s in SLICES.values() if s.chip.name == than.chip.name and s.n_chips > than.n_chips]
