"""What serving a model costs on named devices: seconds of a prompt and of a token, US dollars, bytes, by arithmetic on shapes.

A replica is n devices that hold one model. Its feed-forward network and unembedding are split over all n; its attention over
n = t p c: t over heads, p over sequences, c over the context (`Layout`). It serves B requests at once, each a prompt of
P = (1 - s) T tokens and G = s T generated ones, and takes up the next request as one ends: a steady state.

Of one device, with b = ceil(B / p) sequences in each of the p groups of g = t c devices; w, v, a bytes of a parameter, of a
cached value and of an activation (2); k key/value heads that a device holds (`kv_heads_held`): n_kv / t where t divides n_kv,
and at least one, which devices of the same group then hold in common (key/value heads are replicated where n_kv < t):

    parameters    w [(3 L d F + V d)/n + 2 L d d_h n_h/(t c) + 2 L d d_h k + (2 L + 1) d]    bytes; an untied head: V d/n more
    cache         2 L d_h k v x/c                                                      bytes of x tokens of a sequence
    decode step   B (6 L d F + 2 V d)/n + b (4 L d d_h n_h/(t c) + 4 L d d_h k)           FLOPs of matrices
    that sees     4 b L d_h (n_h/t) x/c                                                FLOPs of attention
    x keys        2 a L d [(n - 1)/n B + (g - 1)/g b]                                  bytes exchanged: activations, and with
                  (c - 1)/c L b (n_h/t) (2 a d_h + 4)                                  c > 1 queries, results and their sums
                  L (s(g) + s(n) + s(c)) + s(n)                                        seconds of exchanges of few bytes
    prefill of    6 p P L d F/n + P (4 L d d_h n_h/(t c) + 4 L d d_h k/c)                 FLOPs of matrices, without logits
    p prompts of  4 L d_h (n_h/t) P (P/2)/c                                            FLOPs of attention, causal
    P tokens, one 2 a L d [(n - 1)/n p P + (t - 1)/t P/c]                              bytes exchanged: activations, and with
    in each group (c - 1)/c L (2 a d_h k P + 2 w d d_h n_h/t)                            c > 1 keys, values and parameters
                  L (s(t) + s(n) + s(c))                                               seconds of exchanges of few bytes

s(m) is what an all-reduce of a few bytes over m devices takes (`Chip.collective_seconds`), s(1) = 0; a reduce-scatter or an
all-gather is taken as half of one. With t = n these are the two all-reduces a layer of Megatron-LM (arXiv 1909.08053) and one
for the logits; c > 1 is decode-context parallelism (arXiv 2507.07120): queries are gathered, each device attends to its part of
the context, and the parts are merged by their log-sum-exp. A prompt is split along c too: its keys and values are gathered,
and the parameters of queries and output, of which every device then reads 2 L d d_h n_h/t. An all-reduce sends what it does
around a ring; a switch that adds on the way (NVLink SHARP) sends half of it.

Seconds of a phase, with F peak FLOP/s, W bytes/s of memory and X bytes/s of links, and the efficiencies of each part
(`Efficiency`):

    matrices/(e_m F) + parameters/(e_w W) + attention/(e_a F) + cache/(e_c W) + exchanges/e_x + L e_l      expected
    max(matrices/F + attention/F', (parameters + cache)/W, exchanges)                                    the bound

Where measurements of a device say so (`Efficiency.overlap`, o > 1), computing and reading of one operation hide each other in
part: (x^o + y^o)^(1/o) of matrices and parameters, and of attention and cache, takes the place of their sums x + y.

In the bound everything that a device does overlaps and reaches its peak: no server with this layout is faster. In the
expectation the parts add: measured steps grow along a straight line with the number of requests, also where reading parameters
and multiplying by them take as long (docs/serving-measured.md). F of matrices is the peak of the parameters' dtype where the
chip has one; F' that of the cache's, as attention may be computed in it, while the expectation has it in bfloat16. The
expectation is what the search compares.

The load, with seconds u of a prefill and q of a decode step at the mean number of keys, (1 - s/2) T:

    time to first token     u                                    its own prefill
    time per output token   q + (B/p - 1) u / G                  the prompts of the others are read in between, p at once;
                                                                 `disaggregated`: q, other devices read them
    device-seconds          n u / (p P) of an input token, n q / B of an output token

so that P of the one and G of the other are all that the devices do for a request. Parameters and FLOPs are those of the model
that is trained (convention "exact"). Everything broadcasts over NumPy arrays of shapes and contexts; the cost of a size that no
model has is infinite or NaN, like its shape.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import costs, hardware
from gqa_jax.costs import HasShape
from gqa_jax.errors import closest
from gqa_jax.formatting import gb
from gqa_jax.hardware import CHIPS, Chip, Efficiency, Price
from gqa_jax.mesh import divisors
from gqa_jax.search import device_file

CONVENTION = "exact"
TENSOR, BEST, FITS = "tensor", "best", "fits"
_ACTIVATION = 2  # bytes of a value exchanged: bfloat16
_SUM = 4  # bytes of a log-sum-exp
_ALIKE = 1e-9  # relative: costs of layouts that divide the same work otherwise, each with its own rounding
#: Bytes of a cached value beside `costs.DTYPE_BYTES`: int8 has a 16-bit scale for every position and head (as in
#: github.com/jax-ml/jax-llm-examples), int4 one for every 32 values (llama.cpp's Q4_0: 18 bytes for 32).
_SCALE = {"int8": lambda head_dim: 2 / head_dim, "int4": lambda head_dim: 2 / 32}


def cache_value_bytes(dtype: str, head_dim: Any) -> Any:
    """Bytes of a value in a cache of keys and values, its share of a scale included. Raises ValueError for an unknown dtype."""
    return costs.dtype_bytes(dtype) + (_SCALE[dtype](head_dim) if dtype in _SCALE else 0.0)


class Layout(NamedTuple):
    """How attention is divided among n = heads x sequences x context devices; integers, or arrays of one for each H."""

    heads: Any = 1  # t
    sequences: Any = 1  # p
    context: Any = 1  # c

    @property
    def n_devices(self) -> Any:
        return self.heads * self.sequences * self.context

    def __str__(self) -> str:
        """As `RooflineServing.parallelism` takes it."""
        return f"{self.heads},{self.sequences},{self.context}"

    def describe(self) -> str:
        """In words: "heads over 4, sequences over 2"; empty for one device."""
        return ", ".join(f"{name} over {count}" for name, count in self._asdict().items() if count > 1)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Of "t,p,c". Raises ValueError."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
            raise ValueError(
                f"parallelism {text!r}: {TENSOR}, {BEST}, or three integers of at least 1, the devices over which heads, "
                "sequences and context are divided, like 4,2,1"
            )
        return cls(*map(int, parts))


def layouts(n_devices: int) -> list[Layout]:
    """Every layout of `n_devices`, tensor parallelism first."""
    found = [
        Layout(heads, sequences, n_devices // heads // sequences)
        for heads in divisors(n_devices)
        for sequences in divisors(n_devices // heads)
    ]
    return sorted(found, reverse=True)


def kv_heads_held(n_heads: Any, n_kv_heads: Any, over: Any) -> Any:
    """Key/value heads that a device needs where query heads are divided over so many devices: k of this module's formulas.

    Neighbouring query heads lie on a device, m = n_h / t of them, and G = n_h / n_kv neighbours share a key/value head. The
    device that needs most begins gcd(m, G) before the end of a group: 1 + ceil((m - gcd(m, G)) / G). Of heads that are no whole
    numbers (they grow with a width that is none): n_kv / t, and at least 1.
    """
    n_heads, n_kv_heads, over = (np.asarray(x, np.float64) for x in (n_heads, n_kv_heads, over))
    with np.errstate(invalid="ignore"):
        undivided = (over == 1).all() and (n_kv_heads % 1 == 0).all()
    if undivided:
        shape = np.broadcast_shapes(n_heads.shape, n_kv_heads.shape, over.shape)
        return np.broadcast_to(np.maximum(n_kv_heads, 1.0), shape)[()]
    with np.errstate(invalid="ignore"):
        group, own = n_heads / n_kv_heads, n_heads / over
        whole = (group % 1 == 0) & (own % 1 == 0)
        common = np.gcd(*(np.where(whole, count, 1).astype(np.int64) for count in (own, group)))
        return np.where(whole, 1 + np.ceil((own - common) / group), np.maximum(n_kv_heads / over, 1.0))[()]


_PARTS = 6  # of a `Phase`


class Phase(NamedTuple):
    """Seconds that a phase of serving keeps each part of a device busy, at the efficiencies asked for."""

    matmul: Any
    attention: Any
    weights: Any
    cache: Any
    exchange: Any
    layers: Any
    overlapped: bool = False  # of the bound
    overlap: float = 1.0  # of an expectation

    @property
    def parts(self) -> tuple:
        """The six kinds of seconds."""
        return self[:_PARTS]

    @property
    def seconds(self) -> Any:
        """Of the phase."""
        if self.overlapped:
            compute, memory = self.matmul + self.attention, self.weights + self.cache
            return np.maximum(np.maximum(compute, memory), self.exchange)
        if self.overlap != 1:
            products, attention = _sum(self.matmul, self.weights, self.overlap), _sum(self.attention, self.cache, self.overlap)
            return products + attention + self.exchange + self.layers
        return self.matmul + self.weights + self.attention + self.cache + self.exchange + self.layers

    @property
    def limit(self) -> Any:
        """What most of it goes to: matmul, attention, weights, cache, exchange or layers; empty of no time, or no number."""
        parts = np.stack(np.broadcast_arrays(*self.parts))
        taken = np.isfinite(self.seconds) & (np.asarray(self.seconds) > 0)
        return np.where(taken, np.array(self._fields[:_PARTS])[np.argmax(parts, axis=0)], "")[()]


class Load(NamedTuple):
    """What a replica in its steady state does; NaN where a request has no prompt, or no generated token."""

    layout: Layout
    batch: Any  # B: requests served at once
    prefill: Phase
    decode: Phase
    ttft: Any  # seconds to the first token
    tpot: Any  # seconds for each one of the generated tokens
    request: Any  # seconds of a whole request
    input_seconds: Any  # device-seconds per token of a prompt
    output_seconds: Any  # device-seconds per generated token
    token_seconds: Any  # device-seconds per token of a request, of either kind
    memory: Any  # bytes on the fullest device
    unsupported: Any  # why it can't be, a place in UNSUPPORTED; 0: it can

    @property
    def possible(self) -> Any:
        return self.unsupported == 0


#: Why a model can't be served as asked.
UNSUPPORTED = ("", "heads", "batch", "memory", "ttft", "tpot")


@dataclass(frozen=True)
class RooflineServing:
    """How a model is served. Raises ValueError for what can't be: the value, what is allowed, what comes closest.

    parallelism: "tensor": attention divided over heads alone; "best": the `Layout` that costs the least; a Layout, or "t,p,c".
    batch: requests that a replica serves at once; "fits": the most that its memory holds; "best": of these the number that
    costs the least within `ttft` and `tpot`, which is the fewest for a latency and the most for a price.
    efficiency: None: the default of the class of device; "bound": the bound; a number: that share of every peak.
    """

    device: str | Chip  # a name of `gqa_jax.hardware.CHIPS`, a file of measurements (`.device_file`), or numbers of your own
    n_devices: int = 1  # that share one copy of the model
    parallelism: str | Layout | tuple = BEST
    batch: int | str = BEST
    decode_share: float = 0.1  # of the tokens of a request, generated; 0: prefill only, 1: generated from nothing
    param_dtype: str | None = None  # None: bfloat16; of a device that was measured, what it was measured with
    cache_dtype: str | None = None
    untied: bool = False  # whether the unembedding is a matrix of its own, where the shape does not say so
    efficiency: Efficiency | float | str | None = None
    usd_per_hour: float | None = None  # of one device; None: that of `price`
    price: Price | None = None  # None: the dated list price of `gqa_jax.hardware`
    disaggregated: bool = False  # prompts are read by other devices than those that generate
    ttft: float | None = None  # seconds allowed to the first token
    tpot: float | None = None  # seconds allowed for each generated token

    def __post_init__(self):
        if not isinstance(self.device, Chip) and self.device not in CHIPS:
            self._open(str(self.device))
        for name in ("param_dtype", "cache_dtype"):
            object.__setattr__(self, name, getattr(self, name) or "bfloat16")
        if isinstance(self.n_devices, bool) or not isinstance(self.n_devices, int) or self.n_devices < 1:
            raise ValueError(f"n_devices = {self.n_devices!r}: must be an integer of at least 1")
        for name in ("param_dtype", "cache_dtype"):
            costs.dtype_bytes(getattr(self, name))
        object.__setattr__(self, "efficiency", _efficiency(self.efficiency, self.chip, self.param_dtype))
        self._check_links()
        self._check_layout()
        self._check_batch()
        if not 0 <= self.decode_share <= 1:
            raise ValueError(f"decode_share = {self.decode_share}: from 0 (prefill only) to 1 (every token generated)")
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be seconds, above 0")
        if self.tpot is not None and self.decode_share == 0:
            raise ValueError(f"tpot = {self.tpot}: with decode_share = 0 nothing is generated; leave it out")
        if self.ttft is not None and self.decode_share == 1:
            raise ValueError(f"ttft = {self.ttft}: with decode_share = 1 there is no prompt; leave it out")
        if self.usd_per_hour is not None and not 0 <= self.usd_per_hour < math.inf:
            raise ValueError(f"usd_per_hour = {self.usd_per_hour}: must be US dollars, a number of at least 0")

    def _open(self, path: str) -> None:
        """Takes a device of a file, and what is open as it was measured."""
        if not device_file.is_file(path):
            names = closest(path, CHIPS)
            raise ValueError(
                f"device {path!r} is unknown: {names}; or a file of `python -m launch benchmark-serving --fit FILE`"
            )
        measured = device_file.read(path)
        for name, value in (("efficiency", measured.efficiency), ("param_dtype", measured.param_dtype),
                            ("cache_dtype", measured.cache_dtype)):  # fmt: skip
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "device", measured.chip)

    def _check_links(self) -> None:
        if self.n_devices == 1:
            return
        chip = self.chip
        if not chip.interconnect > 0:
            raise ValueError(f"n_devices = {self.n_devices}: {chip.name} has no link (interconnect = {chip.interconnect})")
        chip.collective_seconds(self.n_devices)
        largest = max((math.prod(map(int, shape.split("x"))) for shape in chip.shapes), default=self.n_devices)
        if self.n_devices > largest:
            raise ValueError(
                f"n_devices = {self.n_devices}: the links of {chip.name} join {largest} at most; serve several replicas instead"
            )

    def _check_layout(self) -> None:
        given = self.parallelism
        if isinstance(given, str):
            if given in (TENSOR, BEST):
                return
            given = Layout.parse(given)
        layout = Layout(*given)
        if any(np.any((np.asarray(count) < 1) | (np.asarray(count) % 1 != 0)) for count in layout):
            raise ValueError(f"parallelism {layout}: must be integers of at least 1")
        object.__setattr__(self, "parallelism", layout)
        wrong = np.asarray(layout.n_devices) != self.n_devices
        if np.any(wrong):
            raise ValueError(
                f"parallelism {layout}: {layout.n_devices} devices, and n_devices = {self.n_devices}; there are "
                + ", ".join(map(str, layouts(self.n_devices)))
            )

    def _check_batch(self) -> None:
        batch = self.batch
        if isinstance(batch, str):
            if batch not in (FITS, BEST):
                raise ValueError(f"batch {batch!r}: a number of requests, {FITS} (the most that memory holds) or {BEST}")
            return
        if isinstance(batch, bool) or not (1 <= batch < math.inf and batch == int(batch)):
            raise ValueError(f"batch = {batch}: must be a whole number of requests, at least 1, or {FITS}, or {BEST}")
        if isinstance(self.parallelism, Layout) and np.any(np.asarray(self.parallelism.sequences) > batch):
            raise ValueError(
                f"batch = {batch}: below the {self.parallelism.sequences} devices over which sequences are divided; "
                f"serve at least as many requests, or divide heads or context"
            )

    @property
    def chip(self) -> Chip:
        return self.device if isinstance(self.device, Chip) else CHIPS[self.device]

    @property
    def has_price(self) -> bool:
        """Whether an hour of a device has a known price."""
        return self.usd_per_hour is not None or self.listed is not None

    @property
    def listed(self) -> Price | None:
        """The list price that an hour of a device is taken to cost; None: it is given, or nobody lists it."""
        if self.usd_per_hour is not None:
            return None
        return self.chip.price if self.price is None else self.price

    @property
    def origin(self) -> str:
        """Whose price an hour of a device has, where and since when."""
        if self.usd_per_hour is not None:
            return "as given"
        return "no price" if self.listed is None else self.listed.origin

    @property
    def usd(self) -> float:
        """US dollars for an hour of one device. Raises ValueError where none is known."""
        if self.usd_per_hour is not None:
            return self.usd_per_hour
        if self.listed is None:
            raise ValueError(f"device {self.chip.name!r} has no list price: give usd_per_hour")
        return self.listed.usd_per_hour

    def layouts(self) -> list[Layout]:
        """Those that may be chosen."""
        if isinstance(self.parallelism, Layout):
            return [self.parallelism]
        return [Layout(self.n_devices)] if self.parallelism == TENSOR else layouts(self.n_devices)

    def load(self, shape: HasShape, context: Any, by: str = "price") -> Load:
        """The steady state of requests of `context` tokens, in the layout and with the batch that cost the least.

        by: "price" (device-seconds per token) or "latency" (seconds of a request): what the least is of, where the layout or
        the batch is open; where none is possible it is the layout that comes nearest. Layout and batch may differ between
        elements of arrays.
        """
        loads = [self._load(shape, context, layout, by) for layout in self.layouts()]
        if len(loads) == 1:
            return loads[0]
        return _take(loads, _best(loads, by))

    def settled(self, shape: HasShape, context: Any, by: str = "price") -> RooflineServing:
        """With the layout fixed that is the best for `shape`, one for each of its elements."""
        if self.parallelism != BEST:
            return self
        if self.n_devices == 1:
            return dataclasses.replace(self, parallelism=Layout(1))
        return dataclasses.replace(self, parallelism=self.load(shape, context, by).layout)

    def drawn(self, count: int, seed: int) -> RooflineServing:
        """With efficiencies as (count, 1) arrays, drawn within the standard errors of their measurements; itself without any.

        Draws are normal, of the seconds of the five parts together, and kept above a fiftieth of what was measured.
        """
        given = self.efficiency
        if not given.errors:
            return self
        covariance = np.outer(given.errors, given.errors) * np.asarray(given.correlation)
        normal = np.random.default_rng(seed).multivariate_normal(np.zeros(5), covariance, count, check_valid="ignore")
        factor_5xSx1 = np.maximum(1 + normal, 0.02).T[..., None]
        shares = [value / factor for value, factor in zip(given[:4], factor_5xSx1, strict=False)]
        return dataclasses.replace(self, efficiency=_Drawn(*shares, given.layer_seconds * factor_5xSx1[4], *given[5:]))

    def request_seconds(self, shape: HasShape, context: Any) -> Any:
        """From the start of the prefill of a request to its last token; infinite where it can't be served."""
        return _cost(self.load(shape, context, "latency"), "latency")

    def seconds_per_token(self, shape: HasShape, context: Any) -> Any:
        """Device-seconds per token of a request, prompt and generated alike; infinite where it can't be served."""
        return _cost(self.load(shape, context), "price")

    def usd_per_million_tokens(self, shape: HasShape, context: Any) -> Any:
        """US dollars per million tokens of requests, prompt and generated alike."""
        return self.usd_per_million(self.seconds_per_token(shape, context))

    def usd_per_million(self, device_seconds: Any) -> Any:
        """US dollars for a million times so many device-seconds."""
        return 1e6 * self.usd / 3600 * device_seconds

    def memory_bytes(self, shape: HasShape, context: Any, batch: Any = None, layout: Layout | None = None) -> Any:
        """Bytes on the fullest device: its parameters and its caches of `context` tokens.

        batch: requests; default: that of `batch`, one for each group of sequences where it is open. layout: default: the one
        that needs the least.
        """
        given, needed = self.batch if batch is None else batch, []
        for one in self.layouts() if layout is None else [layout]:
            count = one.sequences if isinstance(given, str) else given
            can = self._divides(shape, one) & (np.asarray(one.sequences) <= count)
            needed.append(np.where(can, self._memory(shape, context, one, np.asarray(count, np.float64)), np.inf))
        return np.minimum.reduce(needed)[()]

    @property
    def room(self) -> str:
        """What may be filled, in words."""
        return f"the {gb(self.chip.server_bytes)} that a server fills of each of {self.n_devices} x {self.chip.name}"

    def fits(self, shape: HasShape, context: Any) -> Any:
        """Whether that is at most what a server fills of a device, in some layout."""
        return np.less_equal(self.memory_bytes(shape, context), self.chip.server_bytes)

    def largest_batch(self, shape: HasShape, context: Any) -> Any:
        """The most requests of `context` tokens that fit, in the layout that holds most; 0 where not even one does."""
        found = [np.where(self._divides(shape, one), self._room(shape, context, one), 0.0) for one in self.layouts()]
        return np.maximum.reduce(found)[()]

    def describe(self) -> dict[str, Any]:
        """The numbers of this module's formulas, for JSON."""
        chip, efficiency = self.chip, self.efficiency
        return {
            "device": chip.name,
            "peak_flops": chip.peak(self.param_dtype),
            "attention_flops": chip.peak(self.cache_dtype) if efficiency.bound else chip.peak_flops,
            "bfloat16_flops": chip.peak_flops,
            "memory_bandwidth": chip.memory_bandwidth,
            "interconnect": chip.interconnect,
            "collective_seconds": [
                [m, chip.collective_seconds(m)] for m in divisors(self.n_devices) if m > 1 or self.n_devices == 1
            ],
            "memory_bytes": chip.server_bytes,
            "n_devices": self.n_devices,
            "parallelism": _plain_layout(self.parallelism),
            "batch": self.batch,
            "decode_share": self.decode_share,
            "param_bytes": costs.dtype_bytes(self.param_dtype),
            "cache_dtype": self.cache_dtype,
            "untied": self.untied,
            **({} if chip.data_sheet else {"data_sheet": False}),
            "efficiency": {name: value for name, value in efficiency._asdict().items() if value != ()},
            "attention_share": [list(row[:2]) for row in chip.attention_share],
            "disaggregated": self.disaggregated,
            "ttft": self.ttft,
            "tpot": self.tpot,
            "usd_per_hour": self.usd if self.has_price else None,
            "price": self.origin,
            "convention": dataclasses.asdict(costs.CONVENTIONS[CONVENTION]),
        }

    def _load(self, shape: HasShape, context: Any, layout: Layout, by: str, batch: Any = None) -> Load:
        context = np.asarray(context, np.float64)[()]
        prompt, generated = (1 - self.decode_share) * context, self.decode_share * context
        prefill = self.prefill(shape, prompt, layout) if self.decode_share < 1 else _nothing(shape, context)
        if batch is None:
            batch = self._slots(shape, context, layout, by, prefill.seconds)
        decode = self.decode_step(shape, (1 - self.decode_share / 2) * context, layout, batch)
        rounds = batch / layout.sequences  # of prefills, while each request generates its tokens
        first, step = prefill.seconds, decode.seconds if self.decode_share > 0 else np.zeros_like(decode.seconds)
        with np.errstate(invalid="ignore", divide="ignore"):
            between = 0.0 if self.disaggregated or self.decode_share == 0 else _times(rounds - 1, first) / generated
            per_token = step + between
            input_seconds = self.n_devices * rounds * first / (batch * prompt)
            output_seconds = self.n_devices * step / batch
            token_seconds = self.n_devices * (rounds * first + generated * step) / (batch * context)
        memory = self._memory(shape, context, layout, batch)
        unsupported = np.select(
            [
                ~self._divides(shape, layout),
                np.asarray(layout.sequences) > batch,
                ~(memory <= self.chip.server_bytes),
                np.asarray(False if self.ttft is None else first > self.ttft),
                np.asarray(False if self.tpot is None else per_token > self.tpot),
            ],
            [1, 2, 3, 4, 5],
            0,
        )
        return Load(
            layout, batch, prefill, decode,
            ttft=first if self.decode_share < 1 else np.nan * first,
            tpot=per_token if self.decode_share > 0 else np.nan * per_token,
            request=first + generated * per_token,
            input_seconds=input_seconds if self.decode_share < 1 else np.nan * input_seconds,
            output_seconds=output_seconds if self.decode_share > 0 else np.nan * output_seconds,
            token_seconds=token_seconds, memory=memory, unsupported=unsupported,
        )  # fmt: skip

    def prefill(self, shape: HasShape, tokens: Any, layout: Layout | None = None) -> Phase:
        """Prompts of `tokens` tokens, one in each group of sequences, at once; layout: default tensor parallelism."""
        layout = layout or Layout(self.n_devices)
        tokens = np.asarray(tokens, np.float64)[()]
        t, p, c = (np.asarray(x, np.float64) for x in layout)
        part = self._parts(shape, t)
        n, layers, d = self.n_devices, shape.n_layers, shape.d_model
        exchanged = 2 * _ACTIVATION * (_lacking(n, d * p * tokens) + _lacking(t, d * tokens / c))
        exchanged = exchanged + _lacking(c, 2 * _ACTIVATION * shape.head_dim * part.kv_heads * tokens)
        gathered = costs.dtype_bytes(self.param_dtype) * 2 * d * shape.head_dim * shape.n_heads / t
        exchanged = exchanged + _lacking(c, gathered)
        seconds = self._collective(t) + self._collective(n) + self._collective(c)
        return self._phase(
            shape,
            matmul=2 * tokens * (p * part.ffn / n + part.queries / (t * c) + part.keys / c),
            attention=4 * layers * shape.head_dim * shape.n_heads / t * tokens * (tokens / 2) / c,
            weights=costs.dtype_bytes(self.param_dtype) * part.held(n, t, vocabulary=0.0),
            cache=self._cache(shape, part, tokens) / c,
            exchanged=_times(exchanged, layers),
            waited=_times(seconds, layers),
        )

    def decode_step(self, shape: HasShape, keys: Any, layout: Layout | None = None, batch: Any = None) -> Phase:
        """One token for every request of the batch, each of which sees `keys` keys; layout: default tensor parallelism.

        batch: requests; default: that of `batch`, 1 where it is open.
        """
        layout = layout or Layout(self.n_devices)
        batch = batch if batch is not None else 1 if isinstance(self.batch, str) else self.batch
        keys = np.asarray(keys, np.float64)[()]
        t, p, c = (np.asarray(x, np.float64) for x in layout)
        part = self._parts(shape, t)
        n, layers, d, own = self.n_devices, shape.n_layers, shape.d_model, np.ceil(batch / p)
        exchanged = 2 * _ACTIVATION * (_lacking(n, d * batch) + _lacking(t * c, d * own))
        exchanged = exchanged + _lacking(c, own * shape.n_heads / t * (2 * _ACTIVATION * shape.head_dim + _SUM))
        seconds = self._collective(t * c) + self._collective(n) + self._collective(c)
        return self._phase(
            shape,
            matmul=2 * (batch * (part.ffn + part.vocabulary) / n + own * (part.queries / (t * c) + part.keys)),
            attention=4 * own * layers * shape.head_dim * shape.n_heads / t * keys / c,
            weights=costs.dtype_bytes(self.param_dtype) * part.held(n, t * c),
            cache=own * self._cache(shape, part, keys) / c,
            exchanged=_times(exchanged, layers),
            waited=_times(seconds, layers) + self._collective(n),
        )

    def _phase(
        self, shape: HasShape, *, matmul: Any, attention: Any, weights: Any, cache: Any, exchanged: Any, waited: Any
    ) -> Phase:
        """Seconds of FLOPs, bytes, bytes exchanged and seconds of collectives, of the busiest device."""
        chip, reached = self.chip, self.efficiency
        shares = _attention_shares(chip, shape.head_dim)
        attention_flops = chip.peak(self.cache_dtype) if reached.bound else reached.attention * shares * chip.peak_flops
        if self.n_devices == 1:
            exchange = np.zeros_like(weights)
        else:
            exchange = (exchanged / chip.interconnect + waited) / reached.exchange
        return Phase(
            matmul / (reached.matmul * chip.peak(self.param_dtype)),
            attention / attention_flops,
            weights / (reached.weights_bandwidth * chip.memory_bandwidth),
            cache / (reached.cache_bandwidth * chip.memory_bandwidth),
            exchange,
            _times(reached.layer_seconds, shape.n_layers),
            reached.bound,
            reached.overlap,
        )

    def _collective(self, over: Any) -> Any:
        """Seconds of an all-reduce of few bytes over so many devices; arrays too."""
        if np.ndim(over) == 0:
            return self.chip.collective_seconds(int(over))
        return np.vectorize(lambda count: self.chip.collective_seconds(int(count)), otypes=[float])(over)

    def _cache(self, shape: HasShape, part: _Parts, tokens: Any) -> Any:
        """Bytes of the keys and values of one sequence that a device holds, of all positions."""
        value = cache_value_bytes(self.cache_dtype, shape.head_dim)
        return 2 * shape.n_layers * shape.head_dim * part.kv_heads * value * tokens

    def _parts(self, shape: HasShape, heads_over: Any) -> _Parts:
        return _Parts.of(shape, kv_heads_held(shape.n_heads, shape.n_kv_heads, heads_over))

    def _memory(self, shape: HasShape, context: Any, layout: Layout, batch: Any) -> Any:
        t, p, c = (np.asarray(x, np.float64) for x in layout)
        part = self._parts(shape, t)
        matrices = 2.0 if self.untied or shape.untied else 1.0  # of the vocabulary
        held = costs.dtype_bytes(self.param_dtype) * part.held(self.n_devices, t * c, vocabulary=matrices)
        return held + _times(np.ceil(batch / p), self._cache(shape, part, np.asarray(context, np.float64)) / c)

    def _room(self, shape: HasShape, context: Any, layout: Layout) -> Any:
        """The most requests that fit; whole numbers."""
        empty = self._memory(shape, context, layout, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):  # none of an infinite size fits, or of one that hides the cache
            one = self._memory(shape, context, layout, np.asarray(layout.sequences, np.float64)) - empty
            return np.fmax(0.0, np.floor((self.chip.server_bytes - empty) / one)) * layout.sequences

    def _slots(self, shape: HasShape, context: Any, layout: Layout, by: str, prefill: Any) -> Any:
        """Requests served at once; where their number is open at least one for each group of sequences, if it fits or not."""
        if not isinstance(self.batch, str):
            return float(self.batch)
        least = np.asarray(layout.sequences, np.float64)
        if self.batch == BEST and by == "latency":
            return np.broadcast_to(least, np.broadcast_shapes(np.shape(shape.n_layers), np.shape(context), least.shape))[()]
        most = np.maximum(self._room(shape, context, layout), least)
        if self.batch == BEST and self.tpot is not None:
            most = least * self._within(shape, context, layout, prefill, most / least)
        return np.asarray(most, np.float64)[()]

    def _within(self, shape: HasShape, context: Any, layout: Layout, prefill: Any, rounds: Any) -> Any:
        """The most sequences of a group, up to `rounds`, with which a token takes no more than `tpot`; at least 1."""
        generated, keys = self.decode_share * context, (1 - self.decode_share / 2) * context

        def seconds(own: Any) -> Any:
            between = 0.0 if self.disaggregated else _times(own - 1, prefill) / generated
            return self.decode_step(shape, keys, layout, own * layout.sequences).seconds + between

        low, high = np.ones_like(np.asarray(rounds, np.float64)), np.asarray(rounds, np.float64)
        low = np.where(seconds(high) <= self.tpot, high, low)
        for _ in range(int(np.ceil(np.log2(max(2.0, np.nanmax(high, initial=2.0))))) + 1):  # the time grows with their number
            middle = np.floor((low + high + 1) / 2)
            kept = seconds(middle) <= self.tpot
            low, high = np.where(kept, middle, low), np.where(kept, high, np.maximum(low, middle - 1))
        return low

    def _divides(self, shape: HasShape, layout: Layout) -> Any:
        """Whether heads can be divided so: t divides n_h, or is at most as many where these are no whole number."""
        n_heads, over = np.asarray(shape.n_heads, np.float64), np.asarray(layout.heads)
        with np.errstate(invalid="ignore"):
            return np.where(n_heads % 1 == 0, n_heads % over == 0, ~(n_heads < over))


@dataclass(frozen=True)
class _Parts:
    """Parameters of a model by how they are divided, and the key/value heads that a device holds."""

    ffn: Any
    queries: Any  # of queries and output
    keys: Any  # of keys and values, those that a device holds
    vocabulary: Any
    norms: Any
    kv_heads: Any

    @classmethod
    def of(cls, shape: HasShape, held: Any) -> _Parts:
        count = costs.count_params(shape, CONVENTION)
        each = 2 * shape.n_layers * shape.d_model * shape.head_dim
        return cls(count.ffn, each * shape.n_heads, each * held, count.embedding, count.norms, held)

    def held(self, n_devices: int, group: Any, vocabulary: float = 1.0) -> Any:
        """Parameters on one device, with so many times the vocabulary's matrix."""
        shared = (self.ffn + _times(vocabulary, self.vocabulary)) / n_devices
        return shared + self.queries / group + self.keys + self.norms


class _Drawn(Efficiency):
    """Arrays of draws, of which some are above a peak."""

    def checked(self) -> Efficiency:
        return self


class _Undivided(RooflineServing):
    """As if key/value heads could be divided as finely as query heads: what replicating them costs is the difference."""

    def _parts(self, shape: HasShape, heads_over: Any) -> _Parts:
        return _Parts.of(shape, shape.n_kv_heads / heads_over)


def replication_cost(serving: RooflineServing, shape: HasShape, context: Any, by: str = "price") -> Any:
    """What devices that hold the same key/value heads cost, relative: 0 where none do or where other things decide.

    Of the layout and the number of requests with which the model is served. NaN where it can't be served.
    """
    load = serving.load(shape, context, by)
    fields = {field.name: getattr(serving, field.name) for field in dataclasses.fields(serving)}
    as_served = fields | {"parallelism": load.layout, "ttft": None, "tpot": None}
    with np.errstate(invalid="ignore"):
        values = []
        for kind in (RooflineServing, _Undivided):
            other = kind(**as_served)._load(shape, context, load.layout, by, load.batch)
            values.append(other.request if by == "latency" else other.token_seconds)
        return np.where(load.possible, values[0] / values[1] - 1, np.nan)[()]


def unsupported_reason(serving: RooflineServing, shape: HasShape, context: float, by: str = "price") -> str:
    """Why one model can't be served as asked, with what comes closest; empty where it can."""
    loads = [serving._load(shape, context, layout, by) for layout in serving.layouts()]
    if any(load.possible for load in loads):
        return ""
    load = max(loads, key=lambda load: float(load.unsupported))  # the layout that comes furthest
    chip, kind = serving.chip, UNSUPPORTED[int(load.unsupported)]
    if kind == "heads":
        plural = "s" if shape.n_heads > 1 else ""
        count = f"{_number(shape.n_heads)} query head{plural}"
        return f"{_number(load.layout.heads)} devices can't share {count}: {_nearest(serving, shape)}"
    if kind == "memory":
        most = _number(serving.largest_batch(shape, context))
        count = "" if isinstance(serving.batch, str) else f" with {_number(load.batch)} requests ({most} fit)"
        return (
            f"takes {float(serving.memory_bytes(shape, context)) / 1e9:.1f} GB of each {chip.name}{count}, and a server has "
            f"{chip.server_bytes / 1e9:.1f} GB"
        )
    least = min(float(getattr(other, kind)) for other in loads if other.unsupported == load.unsupported)
    name = "first token" if kind == "ttft" else "token"
    return f"{name} after {least:.3g} s, not {getattr(serving, kind):.3g} s"


def _nearest(serving: RooflineServing, shape: HasShape) -> str:
    """What comes closest: numbers of devices that can share the heads, and layouts of these devices that can."""
    heads = float(shape.n_heads)
    allowed = [one for one in layouts(serving.n_devices) if serving._divides(shape, one)]
    counts = [count for count in range(1, int(heads) + 1) if serving._divides(shape, Layout(count))]
    below = max((count for count in counts if count < serving.n_devices), default=None)
    above = min((count for count in counts if count > serving.n_devices), default=None)
    near = " or ".join(str(count) for count in (below, above) if count is not None)
    return f"{near} can; so can these as {' or '.join(map(str, allowed[:2]))}"


def _number(value: Any) -> str:
    return f"{float(value):g}"


def _efficiency(given: Efficiency | float | str | None, chip: Chip, param_dtype: str) -> Efficiency:
    if isinstance(given, Efficiency):
        return given.checked()
    if given is None:
        return hardware.default_efficiency(chip, param_dtype)
    if isinstance(given, str):
        if given == "bound":
            if not chip.data_sheet:
                raise ValueError(f"efficiency = 'bound': of {chip.name} nobody publishes peaks; leave it out")
            return Efficiency.of_bound()
        try:
            given = float(given)
        except ValueError:
            return device_file.read_efficiency(given)
    if isinstance(given, bool) or not 0 < given <= 1:
        raise ValueError(f"efficiency = {given}: above 0 and at most 1, the share of every peak; or bound, or a file")
    return Efficiency.uniform(float(given))


def _plain_layout(parallelism: str | Layout) -> Any:
    """For JSON: a name, a list of three, or a list of three for each H."""
    if isinstance(parallelism, str):
        return parallelism
    return np.stack(np.broadcast_arrays(*parallelism), -1).tolist()


def _attention_shares(chip: Chip, head_dim: Any) -> Any:
    """Of the peak that attention of a prompt reaches at head sizes; arrays too."""
    if np.ndim(head_dim) == 0:
        return chip.attention_shares(head_dim)[0]
    return np.vectorize(lambda size: chip.attention_shares(size)[0], otypes=[float])(head_dim)


def _nothing(shape: HasShape, context: Any) -> Phase:
    """A phase that there is not, of the shape of its arguments; NaN stays NaN."""
    zero = np.where(np.isnan(shape.n_layers * context), np.nan, 0.0)[()]
    return Phase(zero, zero, zero, zero, zero, zero)


def _cost(load: Load, by: str) -> Any:
    """What is minimised; infinite where it can't be, NaN for NaN."""
    value = load.request if by == "latency" else load.token_seconds
    return np.where(load.possible | np.isnan(value), value, np.inf)[()]


def _best(loads: list[Load], by: str) -> np.ndarray:
    """Index of the load that costs the least; where none is possible, of those that come furthest the one that misses least."""
    rows = [np.broadcast_arrays(_cost(load, by), load.unsupported, load.memory, load.ttft, load.tpot) for load in loads]
    cost, stop, *missed = (np.stack(values) for values in zip(*rows, strict=True))
    over = np.select([stop == UNSUPPORTED.index(name) for name in ("memory", "ttft", "tpot")], missed)
    return np.where((stop == 0).any(0), _least(cost), _least(np.where(stop == stop.max(0), over, np.inf)))


def _least(cost: np.ndarray) -> np.ndarray:
    """Index of the least along the first axis; of those that are alike but for rounding the first."""
    cost = np.where(np.isnan(cost), np.inf, cost)
    return np.argmax(cost <= cost.min(0) * (1 + _ALIKE), axis=0)


def _take(loads: list[Load], index: np.ndarray) -> Load:
    """Of several loads, element by element the one of that index."""

    def choose(values: list[Any]) -> Any:
        found = np.array(np.broadcast_to(values[0], index.shape))
        for i, value in enumerate(values[1:], 1):
            found = np.where(index == i, value, found)
        return found[()]

    def each(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Phase):
            return Phase(*(choose([value[i] for value in values]) for i in range(_PARTS)), *first[_PARTS:])
        if isinstance(first, Layout):
            return Layout(*(choose([value[i] for value in values]) for i in range(len(first))))
        return choose(values)

    return Load(*(each([load[i] for load in loads]) for i in range(len(loads[0]))))


def _lacking(over: Any, value: Any) -> Any:
    """Of a value that is divided over so many devices, what one of them has not: (m - 1)/m."""
    return _times((over - 1) / over, value)


def _sum(x: Any, y: Any, exponent: float) -> Any:
    """(x^o + y^o)^(1/o) of values of at least 0."""
    larger, smaller = np.maximum(x, y), np.minimum(x, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(larger > 0, smaller / larger, 0.0)
    return _times(larger, (1 + part**exponent) ** (1 / exponent))


def _times(count: Any, value: Any) -> Any:
    """Their product; 0 where the count is, also of a value that is infinite."""
    return count * np.where(np.equal(count, 0), 0.0, value)[()]
