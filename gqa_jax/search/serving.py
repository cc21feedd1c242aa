"""Costs of serving on devices (`gqa_jax.search.roofline`): time and money, each infinite where a model can't be served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from gqa_jax import costs, hardware
from gqa_jax.costs import HasShape, Shape
from gqa_jax.search import roofline
from gqa_jax.search.candidates import one_of
from gqa_jax.search.objectives import Objective, Training
from gqa_jax.search.roofline import Layout, RooflineServing

#: Columns of how a model is served (`Served.columns`).
SERVED = (
    "layout", "batch", "memory_bytes", "ttft", "tpot", "request_seconds", "usd_per_million_input", "usd_per_million_output",
    "prefill_limit", "decode_limit", "replication",
)  # fmt: skip


class _OfDevices(Objective):
    """A cost with a field `serving`, which may be None."""

    parts: ClassVar = {"serving": RooflineServing}
    needs = ("device", "h200")
    by = "price"  # what layout and batch are chosen by: device-seconds, or "latency", the time of a request

    def describe(self) -> dict[str, Any]:
        """The numbers of `gqa_jax.search.roofline`'s formulas."""
        return super().describe() | {"serving": self.serving.describe()}

    def settled(self, shape: HasShape, context: Any) -> Objective:
        """With the layout that is best for `shape`, element by element.

        It is chosen once, by the fitted laws, and holds for all draws: nobody changes servers with the noise of a loss.
        """
        if self.serving is None or self.serving.parallelism != roofline.BEST:
            return self
        return dataclasses.replace(self, serving=self.serving.settled(shape, context, self.by))

    def drawn(self, count: int, seed: int) -> Objective:
        """With the efficiencies of a device that was measured drawn within their standard errors."""
        serving = None if self.serving is None else self.serving.drawn(count, seed)
        return self if serving is self.serving else dataclasses.replace(self, serving=serving)

    def served(self, shape: HasShape, context: Any) -> Served | None:
        return None if self.serving is None else Served(self.serving, shape, context, self.by)


@dataclass(frozen=True)
class Latency(_OfDevices):
    """Seconds from the start of a request of T tokens to its last (`RooflineServing.request_seconds`)."""

    serving: RooflineServing

    name = "latency"
    heading = "a request"
    choice = "time of a request"
    label = "time of a request"
    unit = "seconds"
    by = "latency"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.request_seconds(shape, context)


@dataclass(frozen=True)
class Throughput(_OfDevices):
    """Device-seconds per token of a request: one over the throughput of a device, so that less is better."""

    serving: RooflineServing

    name = "throughput"
    heading = "a token,\na device"
    choice = "time per token and device"
    label = "time per token and device"
    unit = "seconds"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.seconds_per_token(shape, context)


@dataclass(frozen=True)
class Price(_OfDevices):
    """US dollars per million tokens of requests, prompt and generated alike. Raises ValueError: a device without a price."""

    serving: RooflineServing

    name = "price"
    heading = "a million\ntokens"
    choice = "price of a million tokens"
    label = "price of a million tokens"
    unit = "US dollars"

    def __post_init__(self):
        _ = self.serving.usd

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.usd_per_million_tokens(shape, context)


@dataclass(frozen=True)
class Lifetime(_OfDevices):
    """Training and then serving `served_tokens` tokens, in requests of the served context.

    With a `serving`, US dollars: training on its devices at `training_mfu` of their peak in bfloat16 (None: what was measured
    of their class, `hardware.TRAINED`), serving at its price per token. Without one, FLOPs: C_train and the forward FLOPs of
    the tokens served, each of which sees T/2 keys on average.
    """

    served_tokens: float
    training: Training = dataclasses.field(default_factory=Training)
    serving: RooflineServing | None = None
    training_mfu: float | None = None

    name = "lifetime"
    heading = "training\nand serving"
    choice = "training and serving, over a lifetime"
    parts: ClassVar = {"serving": RooflineServing, "training": Training}
    needs = ("served_tokens", "1e12")

    def __post_init__(self):
        if not 0 <= self.served_tokens < np.inf:
            raise ValueError(f"served_tokens = {self.served_tokens}: must be a finite number of tokens, at least 0")
        if self.serving is not None:
            _ = self.serving.usd
        if self.training_mfu is None and self.serving is not None and not self.serving.chip.data_sheet:
            raise ValueError(
                f"training_mfu: nothing is known of training on {self.serving.chip.name}; give the share of its peak"
            )
        if self.training_mfu is not None:
            if self.serving is None:
                raise ValueError(f"training_mfu = {self.training_mfu} given without a device: FLOPs have no use for it")
            if not 0 < self.training_mfu <= 1:
                raise ValueError(f"training_mfu = {self.training_mfu}: a share of the peak, above 0 and at most 1")

    @property
    def mfu(self) -> float | None:
        """Share of the peak that training is taken to reach; None where nothing is trained on a device."""
        if self.serving is None:
            return None
        return hardware.trained_mfu(self.serving.chip) if self.training_mfu is None else self.training_mfu

    @property
    def label(self) -> str:
        return f"{'FLOPs' if self.serving is None else 'price'} of training and of serving {self.served_tokens:.3g} tokens"

    @property
    def unit(self) -> str:
        return "FLOPs" if self.serving is None else "US dollars"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        training = self.training(shape, context)
        if self.serving is not None:
            training = training / (self.mfu * self.serving.chip.peak_flops) * self.serving.usd / 3600
        if self.served_tokens == 0:  # an infinite size too
            return training
        if self.serving is not None:
            return training + self.served_tokens / 1e6 * self.serving.usd_per_million_tokens(shape, context)
        mean_keys = np.asarray(context, np.float64)[()] / 2
        return training + self.served_tokens * costs.forward_flops(shape, mean_keys, self.training.convention).total

    def describe(self) -> dict[str, Any]:
        """The numbers of both; `serving` is null for FLOPs."""
        own = {"served_tokens": self.served_tokens, "training": self.training.describe()}
        serving = None if self.serving is None else self.serving.describe()
        return Objective.describe(self) | own | {"serving": serving, "training_mfu": self.mfu}


class Served:
    """How each of a row of models is served, in the layout and with the batch of the least cost (`by`)."""

    def __init__(self, serving: RooflineServing, shape: Shape, context: int, by: str):
        self.serving, self.shape, self.context, self.by = serving, shape, context, by
        self.load = serving.load(shape, context, by)
        self.count = np.broadcast_shapes(np.shape(shape.n_layers), np.shape(self.load.token_seconds))

    def columns(self) -> dict[str, Any]:
        """Columns SERVED; empty where a model can't be served."""
        load, count = self.load, self.count
        possible = np.broadcast_to(load.possible, count)

        def known(values: Any) -> np.ndarray:
            return np.where(possible, np.broadcast_to(values, count), np.nan)

        usd = self.serving.usd_per_million(1.0) if self.serving.has_price else np.nan
        chosen = [str(one) if ok else None for one, ok in zip(_each(load.layout, count), possible, strict=True)]
        return {
            "layout": pd.array(chosen, dtype="string"),
            "batch": known(load.batch),
            "memory_bytes": known(load.memory),
            "ttft": known(load.ttft),
            "tpot": known(load.tpot),
            "request_seconds": known(load.request),
            "usd_per_million_input": known(usd * load.input_seconds),
            "usd_per_million_output": known(usd * load.output_seconds),
            "prefill_limit": pd.array(np.broadcast_to(load.prefill.limit, count), dtype="string"),
            "decode_limit": pd.array(np.broadcast_to(load.decode.limit, count), dtype="string"),
            "replication": known(roofline.replication_cost(self.serving, self.shape, self.context, self.by)),
        }

    def excess(self) -> np.ndarray:
        """By what factor each misses the limit that it misses; 0: keeps all, infinite for heads."""
        serving, load = self.serving, self.load
        over = [0.0, np.inf, np.inf, load.memory / serving.chip.server_bytes]
        over += [
            np.inf if limit is None else value / limit
            for value, limit in ((load.ttft, serving.ttft), (load.tpot, serving.tpot))
        ]
        return np.choose(load.unsupported, [np.broadcast_to(one, self.count) for one in over])

    def unsupported_reason(self, index: int) -> str:
        """Why the model of that index can't be served; empty where it can."""
        serving = self.serving
        if isinstance(serving.parallelism, Layout):
            layout = _each(serving.parallelism, np.shape(self.shape.n_layers))[index]
            serving = dataclasses.replace(serving, parallelism=layout)
        return roofline.unsupported_reason(serving, one_of(self.shape, index), self.context, self.by)


def _each(layout: Layout, count: tuple[int, ...]) -> list[Layout]:
    """The layouts of a row of H, one by one."""
    return [Layout(*map(int, one)) for one in zip(*(np.broadcast_to(values, count) for values in layout), strict=True)]
