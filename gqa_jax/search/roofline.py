"""What serving a model costs on a named device, at the roofline: seconds, tokens a second, US dollars, bytes.

A request of T tokens is a prompt of (1 - s) T tokens and s T generated ones (s = `decode_share`); B requests (`batch`) are
served together. Each phase takes as long as the slowest of three things that a device does at once:

    compute    FLOPs / (n e F)        F peak FLOP/s, W bytes/s of memory, X bytes/s to other devices (`gqa_jax.hardware`),
    memory     bytes / (n e W)        n devices, e the share of these that is reached (`efficiency`)
    exchange   bytes / (e X)

    a decode step that sees t keys    B (f0 + f1 t) FLOPs,               P + B k t bytes,      8 (n - 1)/n L B d bytes exchanged
    the prefill of p tokens           B p (f0 - 2 d V + f1 p/2) FLOPs,   P + B k p bytes,      8 (n - 1)/n L B p d

with f0 = 2 N FLOPs of every matrix and f1 = 4 L d_h n_h per key (paper, Table 3), P the bytes of all parameters, which are
read once, k = 2 L d_h n_kv values of cache per token, in bytes. Causal attention sees p/2 keys on average. Prefill needs no
logits: the last token of the prompt is the first decode step. Exchanged are two all-reduces of B d bfloat16 values a layer
(Megatron-LM, arXiv 1909.08053), each 2 (n - 1)/n times its size around a ring. Parameters and caches are divided evenly over
the devices.

So every number is a bound: less time is not possible on these devices with n-way tensor parallelism, more is likely. Peaks are
those of bfloat16, whatever the parameters are kept in. Parameters and FLOPs are those of the model that is trained (convention
"exact"). Everything broadcasts over NumPy arrays of shapes and contexts; the cost of a size that no model has is infinite or
NaN, like its shape.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import costs
from gqa_jax.costs import HasShape
from gqa_jax.errors import closest
from gqa_jax.hardware import CHIPS, Chip

CONVENTION = "exact"
_ACTIVATION_BYTES = 2  # of a value exchanged: bfloat16


class Phase(NamedTuple):
    """Seconds that a phase of serving keeps each part of the device busy; they overlap."""

    compute: Any
    memory: Any
    exchange: Any

    @property
    def seconds(self) -> Any:
        """Of the phase: its slowest part's."""
        return np.maximum(np.maximum(self.compute, self.memory), self.exchange)

    @property
    def limit(self) -> Any:
        """Which part that is, by name; empty where the seconds are infinite or NaN."""
        parts = np.stack(np.broadcast_arrays(*self))
        return np.where(np.isfinite(self.seconds), np.array(self._fields)[np.argmax(parts, axis=0)], "")[()]


@dataclass(frozen=True)
class Serving:
    """How a model is served. Raises ValueError for what can't be: the value, what is allowed."""

    device: str | Chip  # a name of `gqa_jax.hardware.CHIPS`, or numbers of your own
    n_devices: int = 1  # that share one copy of the model
    batch: float = 1  # sequences decoded together, over all devices
    decode_share: float = 0.1  # of the tokens of a request, generated; 0: prefill only, 1: generated from nothing
    param_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    efficiency: float = 1.0  # share of the peaks that is reached
    usd_per_hour: float | None = None  # of one device; None: the dated list price of `gqa_jax.hardware`

    def __post_init__(self):
        if not isinstance(self.device, Chip) and self.device not in CHIPS:
            raise ValueError(f"device {self.device!r} is unknown: {closest(str(self.device), CHIPS)}")
        if isinstance(self.n_devices, bool) or not isinstance(self.n_devices, int) or self.n_devices < 1:
            raise ValueError(f"n_devices = {self.n_devices!r}: must be an integer of at least 1")
        if not 1 <= self.batch < math.inf:
            raise ValueError(f"batch = {self.batch}: must be a number of sequences, at least 1")
        if not 0 <= self.decode_share <= 1:
            raise ValueError(f"decode_share = {self.decode_share}: from 0 (prefill only) to 1 (every token generated)")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency = {self.efficiency}: the share of the peaks that is reached, above 0 and at most 1")
        for name in ("param_dtype", "cache_dtype"):
            costs.dtype_bytes(getattr(self, name))
        if self.usd_per_hour is None:
            if self.chip.price is None:
                raise ValueError(f"device {self.chip.name!r} has no list price: give usd_per_hour")
        elif not 0 <= self.usd_per_hour < math.inf:
            raise ValueError(f"usd_per_hour = {self.usd_per_hour}: must be US dollars, a number of at least 0")

    @property
    def chip(self) -> Chip:
        return self.device if isinstance(self.device, Chip) else CHIPS[self.device]

    @property
    def usd(self) -> float:
        """US dollars for an hour of one device."""
        return self.chip.price.usd_per_hour if self.usd_per_hour is None else self.usd_per_hour

    def prefill(self, shape: HasShape, tokens: Any) -> Phase:
        """Prompts of `tokens` tokens, one per sequence of the batch."""
        tokens = np.asarray(tokens, np.float64)[()]
        flops = costs.forward_flops(shape, tokens / 2, CONVENTION)
        return self._phase(
            self.batch * tokens * (flops.projections + flops.ffn + flops.attention),
            self._held(shape, tokens),
            tokens * self._exchanged(shape),
        )

    def decode_step(self, shape: HasShape, context: Any) -> Phase:
        """One token for every sequence of the batch, each of which sees `context` keys."""
        return self._phase(
            self.batch * costs.forward_flops(shape, context, CONVENTION).total,
            self._held(shape, context),
            self._exchanged(shape),
        )

    def request_seconds(self, shape: HasShape, context: Any) -> Any:
        """From the start of the prefill of a batch of requests of `context` tokens each to their last token.

        In a server that refills its batch as requests end this is the time of each of them too: while one generates, the
        prompts of the B - 1 others are read. All decode steps are taken to see the mean number of keys, (1 - s/2) T: exact
        while one part of the device limits them all, otherwise below their sum.
        """
        context = np.asarray(context, np.float64)[()]
        generated = self.decode_share
        seconds = 0.0
        if generated < 1:
            seconds = seconds + self.prefill(shape, (1 - generated) * context).seconds
        if generated > 0:
            seconds = seconds + generated * context * self.decode_step(shape, (1 - generated / 2) * context).seconds
        return seconds

    def seconds_per_token(self, shape: HasShape, context: Any) -> Any:
        """Device-seconds per token of a request, prompt and generated alike."""
        tokens = self.batch * np.asarray(context, np.float64)[()]
        return self.n_devices * self.request_seconds(shape, context) / tokens

    def throughput(self, shape: HasShape, context: Any) -> Any:
        """Tokens of requests, prompt and generated alike, per second and device."""
        return 1 / self.seconds_per_token(shape, context)

    def usd_per_million_tokens(self, shape: HasShape, context: Any) -> Any:
        """US dollars per million tokens of requests, prompt and generated alike."""
        return 1e6 * self.usd / 3600 * self.seconds_per_token(shape, context)

    def memory_bytes(self, shape: HasShape, context: Any) -> Any:
        """Bytes on all devices: parameters, and a cache of `context` tokens per sequence of the batch."""
        return self._held(shape, context)

    def fits(self, shape: HasShape, context: Any) -> Any:
        """Whether that is at most what programs may use of the devices; activations are not counted."""
        return np.less_equal(self.memory_bytes(shape, context), self.n_devices * self.chip.memory_bytes)

    def largest_batch(self, shape: HasShape, context: Any) -> Any:
        """How many sequences of `context` tokens fit, a whole number; 0 where the parameters leave no room for one."""
        parts = self._parts(shape, context)
        with np.errstate(invalid="ignore"):  # none of an infinite size fits
            room = (self.n_devices * self.chip.memory_bytes - parts.params) / parts.cache
        return np.fmax(0.0, np.floor(room))

    def describe(self) -> dict[str, Any]:
        """The numbers of this module's formulas, for JSON."""
        chip = self.chip
        listed = chip.price if self.usd_per_hour is None else None
        return {
            "device": chip.name,
            "peak_flops": chip.peak_flops,
            "memory_bandwidth": chip.memory_bandwidth,
            "interconnect": chip.interconnect,
            "memory_bytes": chip.memory_bytes,
            "n_devices": self.n_devices,
            "batch": self.batch,
            "decode_share": self.decode_share,
            "param_bytes": costs.dtype_bytes(self.param_dtype),
            "cache_bytes": costs.dtype_bytes(self.cache_dtype),
            "efficiency": self.efficiency,
            "usd_per_hour": self.usd,
            "price": f"{listed.product}, {listed.region}, {listed.date}" if listed else "as given",
            "convention": dataclasses.asdict(costs.CONVENTIONS[CONVENTION]),
        }

    def _phase(self, flops: Any, held: Any, exchanged: Any) -> Phase:
        reached = self.n_devices * self.efficiency
        return Phase(
            flops / (reached * self.chip.peak_flops),
            held / (reached * self.chip.memory_bandwidth),
            exchanged / (self.efficiency * self.chip.interconnect),
        )

    def _parts(self, shape: HasShape, tokens: Any) -> costs.InferMemory:
        return costs.infer_memory_parts(shape, tokens, CONVENTION, param_dtype=self.param_dtype, cache_dtype=self.cache_dtype)

    def _held(self, shape: HasShape, tokens: Any) -> Any:
        """P + B k t: bytes of the parameters and the caches."""
        parts = self._parts(shape, tokens)
        return parts.params + self.batch * parts.cache

    def _exchanged(self, shape: HasShape) -> Any:
        """Bytes that each device sends per token of every sequence."""
        if self.n_devices == 1:
            return 0.0  # of an infinite size too
        around = 2 * (self.n_devices - 1) / self.n_devices
        return 2 * around * _ACTIVATION_BYTES * shape.n_layers * self.batch * shape.d_model
