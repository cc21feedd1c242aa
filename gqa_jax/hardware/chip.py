"""What is known of a chip: the fields of its row in `gqa_jax.hardware.chips`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

GIB = 2**30
#: Of a GPU's memory that JAX takes unless the environment says otherwise (`memory_fraction`).
ALLOCATOR_FRACTION = 0.75
#: Variables of the environment that set it, the one that jaxlib 0.11 reads first.
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
#: Of a device's memory that a server fills with parameters and caches: vLLM's gpu_memory_utilization is 0.9 unless set.
SERVER_FRACTION = 0.9


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
        from gqa_jax.hardware.chips import CHIPS

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
    #: Exponent with which computing and reading of the same operation add (`search.roofline.Phase`): 1 a sum, more hides more.
    overlap: float = 1.0
    #: Of the seconds of the first five parts: relative standard errors and their correlations; empty: taken as exact.
    errors: tuple[float, ...] = ()
    correlation: tuple[tuple[float, ...], ...] = ()

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
        if not 1 <= self.overlap <= 100:
            raise ValueError(
                f"efficiency: overlap = {self.overlap}: an exponent from 1 (parts add) to 100 (the longest counts)"
            )
        if self.errors:
            rows = [self.errors, *self.correlation]
            numbers = [value for row in rows for value in row]
            if [*map(len, rows)] != [5] * 6 or not all(math.isfinite(value) for value in numbers) or min(self.errors) < 0:
                raise ValueError("efficiency: errors must be five relative standard errors, correlation five rows of five")
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
    prices: tuple[Price, ...] = ()  # the first is taken where none is asked for (`gqa_jax.hardware.prices`)
    measured: Measured | None = None  # None: never run on; `plan` then gives hours at the roofline
    #: Share of the peak that the attention kernels reach: head size -> (forward, backward). Empty: taken as 1.
    attention_share: tuple[tuple[int, float, float], ...] = ()
    tpu: Tpu | None = None
    gpu: Gpu | None = None
    data_sheet: bool = True  # else its peaks are rates that were measured, and nothing is known of its class

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
        return any(has_word(device_kind, word) for word in self.kinds)

    def attention_shares(self, head_dim: int) -> tuple[float, float]:
        """Shares of the peak, forward and backward, at a head size: a smaller one takes the time of the next in the table."""
        for size, forward, backward in self.attention_share:
            if head_dim <= size or size == self.attention_share[-1][0]:
                filled = min(1.0, head_dim / size)
                return forward * filled, backward * filled
        return 1.0, 1.0


def has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
