"""What the search minimises: one class per cost, called on shapes and served contexts.

    objective = objectives.make("latency", device="h200", batch=8)
    objective(shape, 131_072)      # seconds; arrays of shapes and contexts broadcast

An objective is infinite for an infinite size, and NaN for NaN. `describe` is JSON from which a page computes the same number.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gqa_jax import costs, hardware
from gqa_jax.costs import Convention, HasShape
from gqa_jax.errors import closest
from gqa_jax.search import roofline
from gqa_jax.search.roofline import Serving

TOKENS_PER_PARAM = 20.0  # of the paper's runs (Section 5.1)


class Objective(Protocol):
    """A cost of a model; less is better."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def label(self) -> str:
        """For an axis or a heading, without the unit."""
        ...

    @property
    def unit(self) -> str:
        """Of the number; empty where it has none."""
        ...

    def __call__(self, shape: HasShape, context: Any) -> Any:
        """The cost of `shape` served at `context` tokens; both may be arrays that broadcast."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, label, unit and every number that the cost is computed from, for JSON."""
        ...


def settled(objective: Objective, shape: HasShape, context: Any) -> Objective:
    """With what it leaves open fixed as is best for `shape`, element by element: the layout of a `Serving`.

    The layout is chosen once, by the fitted laws, and holds for all draws: nobody changes servers with the noise of a loss.
    """
    serving = getattr(objective, "serving", None)
    if serving is None or serving.parallelism != roofline.BEST:
        return objective
    return dataclasses.replace(objective, serving=serving.settled(shape, context, chosen_by(objective)))


def chosen_by(objective: Objective) -> str:
    """What layout and batch are chosen by: the time of a request, or device-seconds (`Serving.load`)."""
    return "latency" if isinstance(objective, Latency) else "price"


def _described(objective: Objective, **numbers: Any) -> dict[str, Any]:
    return {"cost": objective.name, "label": objective.label, "unit": objective.unit} | numbers


@dataclass(frozen=True)
class Memory:
    """M_infer (Eq. 4): values held, or bytes where the convention says so.

    The dtypes are those of bytes, bfloat16 unless given; ValueError where the convention counts values.
    """

    convention: str | Convention = "figures"
    param_dtype: str | None = None
    cache_dtype: str | None = None

    name = "memory"
    label = "inference memory"

    def __post_init__(self):
        rule = costs.named_convention(self.convention)
        for name in ("param_dtype", "cache_dtype"):
            dtype = getattr(self, name)
            if dtype is None:
                continue
            costs.dtype_bytes(dtype)
            if rule.memory == "values":
                raise ValueError(f'{name} = {dtype!r}: this convention counts values, not bytes; use convention "exact"')

    @property
    def unit(self) -> str:
        return costs.named_convention(self.convention).memory

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return costs.infer_memory(
            shape,
            context,
            self.convention,
            param_dtype=self.param_dtype or "bfloat16",
            cache_dtype=self.cache_dtype or "bfloat16",
        )

    def describe(self) -> dict[str, Any]:
        """M = param_bytes N + cache_bytes 2 T L d_h n_kv; both are 1 for values."""
        rule = costs.named_convention(self.convention)
        param, cache = (
            1.0 if rule.memory == "values" else costs.dtype_bytes(dtype or "bfloat16")
            for dtype in (self.param_dtype, self.cache_dtype)
        )
        return _described(self, convention=dataclasses.asdict(rule), param_bytes=param, cache_bytes=cache)


@dataclass(frozen=True)
class Flops:
    """C_infer (Eq. 3), per token or of a sequence. `flops` takes the place of the convention's rule."""

    convention: str | Convention = "figures"
    flops: str | None = None  # "per_token", "half_T", "full_T"

    name = "flops"

    def __post_init__(self):
        _ = self.rule

    @property
    def rule(self) -> Convention:
        """The convention, with the rule for FLOPs that was asked for."""
        rule = costs.named_convention(self.convention)
        return rule if self.flops is None else dataclasses.replace(rule, flops=self.flops)

    @property
    def label(self) -> str:
        return {
            "per_token": "forward FLOPs of a token",
            "half_T": "forward FLOPs of T/2 tokens",
            "full_T": "forward FLOPs of T tokens",
        }[self.rule.flops]

    unit = "FLOPs"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return costs.infer_flops(shape, context, self.rule)

    def describe(self) -> dict[str, Any]:
        """C = 2 N + 4 T L d_h n_h, times 1, T/2 or T as the convention's `flops` says."""
        return _described(self, convention=dataclasses.asdict(self.rule))


@dataclass(frozen=True)
class Z:
    """The hardware-aware cost lam M^alpha + (1 - lam) C^beta (Eq. 5), M and C as `Memory` and `Flops` count them."""

    convention: str | Convention = "figures"
    flops: str | None = None
    lam: float = 0.9
    alpha: float = 1 / 2
    beta: float = 1 / 3
    param_dtype: str | None = None
    cache_dtype: str | None = None

    name = "z"
    label = "hardware-aware cost Z"
    unit = ""

    def __post_init__(self):
        _ = self._memory, self._flops
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam = {self.lam}: a weight between 0 (FLOPs only) and 1 (memory only)")
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: an exponent above 0")

    def __call__(self, shape: HasShape, context: Any) -> Any:
        memory, flops = self._memory(shape, context), self._flops(shape, context)
        return costs.hardware_aware_cost(memory, flops, self.lam, self.alpha, self.beta)

    @property
    def _memory(self) -> Memory:
        return Memory(self.convention, self.param_dtype, self.cache_dtype)

    @property
    def _flops(self) -> Flops:
        return Flops(self.convention, self.flops)

    def describe(self) -> dict[str, Any]:
        """The numbers of M and of C, the weight and the exponents."""
        weights = {"lam": self.lam, "alpha": self.alpha, "beta": self.beta}
        return self._memory.describe() | self._flops.describe() | _described(self, **weights)


@dataclass(frozen=True)
class Latency:
    """Seconds from the start of a request of T tokens to its last (`Serving.request_seconds`); infinite where it can't be."""

    serving: Serving

    name = "latency"
    label = "time of a request"
    unit = "seconds"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.request_seconds(shape, context)

    def describe(self) -> dict[str, Any]:
        """The numbers of `gqa_jax.search.roofline`'s formulas."""
        return _described(self, serving=self.serving.describe())


@dataclass(frozen=True)
class Throughput:
    """Device-seconds per token of a request: one over the throughput of a device, so that less is better."""

    serving: Serving

    name = "throughput"
    label = "time per token and device"
    unit = "seconds"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.seconds_per_token(shape, context)

    def describe(self) -> dict[str, Any]:
        """The numbers of `gqa_jax.search.roofline`'s formulas."""
        return _described(self, serving=self.serving.describe())


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens of requests, prompt and generated alike; infinite where they can't be served.

    Raises ValueError for a device without a price.
    """

    serving: Serving

    def __post_init__(self):
        _ = self.serving.usd

    name = "price"
    label = "price of a million tokens"
    unit = "US dollars"

    def __call__(self, shape: HasShape, context: Any) -> Any:
        return self.serving.usd_per_million_tokens(shape, context)

    def describe(self) -> dict[str, Any]:
        """The numbers of `gqa_jax.search.roofline`'s formulas."""
        return _described(self, serving=self.serving.describe())


@dataclass(frozen=True)
class Training:
    """C_train (Table 8): 6 D N + 6 D T L d_h n_h FLOPs, on `tokens` or on `tokens_per_param` times N without embeddings.

    T is `train_context`, or the context served where that is None. With neither rule for tokens, 20 per parameter.
    """

    convention: str | Convention = "exact"
    tokens: float | None = None
    tokens_per_param: float | None = None
    train_context: float | None = None

    name = "train"
    label = "training FLOPs"
    unit = "FLOPs"

    def __post_init__(self):
        costs.named_convention(self.convention)
        if self.tokens is not None and self.tokens_per_param is not None:
            raise ValueError(f"tokens = {self.tokens} and tokens_per_param = {self.tokens_per_param}: give one of them")
        if self.tokens is None and self.tokens_per_param is None:
            object.__setattr__(self, "tokens_per_param", TOKENS_PER_PARAM)
        for name in ("tokens", "tokens_per_param", "train_context"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be above 0 and finite")

    def __call__(self, shape: HasShape, context: Any) -> Any:
        if self.tokens is not None:
            tokens = self.tokens
        else:
            tokens = self.tokens_per_param * costs.count_params(shape, self.convention).non_embedding
        return costs.train_flops(shape, context if self.train_context is None else self.train_context, tokens, self.convention)

    def describe(self) -> dict[str, Any]:
        """C = 3 D times the forward FLOPs of a token that sees T/2 keys; what does not apply is null."""
        return _described(
            self,
            convention=dataclasses.asdict(costs.named_convention(self.convention)),
            tokens=self.tokens,
            tokens_per_param=self.tokens_per_param,
            train_context=self.train_context,
        )


@dataclass(frozen=True)
class Lifetime:
    """Training and then serving `served_tokens` tokens, in requests of the served context.

    With a `serving`, US dollars: training on its devices at `training_mfu` of their peak in bfloat16 (None: what was measured
    of their class, `hardware.TRAINED`), serving at its price per token. Without one, FLOPs: C_train and the forward FLOPs of
    the tokens served, each of which sees T/2 keys on average.
    """

    served_tokens: float
    training: Training = dataclasses.field(default_factory=Training)
    serving: Serving | None = None
    training_mfu: float | None = None

    name = "lifetime"

    def __post_init__(self):
        if not 0 <= self.served_tokens < math.inf:
            raise ValueError(f"served_tokens = {self.served_tokens}: must be a finite number of tokens, at least 0")
        if self.serving is not None:
            _ = self.serving.usd
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
            chip = self.serving.chip
            training = training / (self.mfu * chip.peak_flops) * self.serving.usd / 3600
        if self.served_tokens == 0:  # an infinite size too
            return training
        if self.serving is not None:
            return training + self.served_tokens / 1e6 * self.serving.usd_per_million_tokens(shape, context)
        mean_keys = np.asarray(context, np.float64)[()] / 2
        return training + self.served_tokens * costs.forward_flops(shape, mean_keys, self.training.convention).total

    def describe(self) -> dict[str, Any]:
        """The numbers of both; `serving` is null for FLOPs."""
        return _described(
            self,
            served_tokens=self.served_tokens,
            training=self.training.describe(),
            serving=None if self.serving is None else self.serving.describe(),
            training_mfu=self.mfu,
        )


OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind for kind in (Z, Flops, Memory, Latency, Price, Throughput, Training, Lifetime)
}
_PARTS = {"serving": Serving, "training": Training}  # fields of an objective whose own fields are settings
_NEEDED = {Latency: "device", Price: "device", Throughput: "device", Lifetime: "served_tokens"}
_EXAMPLES = {"device": "h200", "served_tokens": "1e12"}


def settings(cost: str) -> list[str]:
    """Names of the settings that `make` takes for a cost. Raises ValueError for an unknown cost, naming the closest."""
    if cost not in OBJECTIVES:
        raise ValueError(f"cost {cost!r} is unknown: {closest(str(cost), OBJECTIVES)}")
    names = []
    for field in _fields(OBJECTIVES[cost]):
        names += _fields(_PARTS[field]) if field in _PARTS else [field]
    return names


def make(cost: str, **given: Any) -> Objective:
    """The objective of that name: z, flops, memory, latency, price, throughput, train or lifetime.

    `given` are fields of its class, of `Serving` and of `Training`, by name; those that are None are left at their defaults.
    `lifetime` is in US dollars with a device, in FLOPs without.

    Raises ValueError: an unknown cost or setting (naming the closest), one that the cost has no use for, a missing one, or
    what its class refuses.
    """
    allowed = settings(cost)
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in allowed:
            elsewhere = any(name in settings(other) for other in OBJECTIVES)
            why = f"cost {cost!r} has no use for it" if elsewhere else f"unknown, {closest(name, allowed)}"
            raise ValueError(f"{name} = {value!r}: {why}; settings of this cost: {', '.join(allowed)}")
    kind = OBJECTIVES[cost]
    needed = _NEEDED.get(kind)
    if needed and needed not in given:
        raise ValueError(f"cost {cost!r} needs {needed}, for example {needed}={_EXAMPLES[needed]}")

    arguments = {name: given[name] for name in _fields(kind) if name in given}
    for field, part in _PARTS.items():
        inner = {name: given[name] for name in _fields(part) if name in given}
        if field not in _fields(kind) or not inner:
            continue
        if part is Serving and "device" not in inner:
            raise ValueError(f"{', '.join(inner)} given without a device: add one, for example device={_EXAMPLES['device']}")
        arguments[field] = part(**inner)
    return kind(**arguments)


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
