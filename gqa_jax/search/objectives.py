"""What the search minimises: one class per cost, called on shapes and served contexts.

    objective = objectives.make("latency", device="h200", batch=8)
    objective(shape, 131_072)      # seconds; arrays of shapes and contexts broadcast

An objective is infinite for an infinite size, and NaN for NaN. `describe` is JSON from which a page computes the same number.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gqa_jax import costs
from gqa_jax.costs import Convention, HasShape
from gqa_jax.errors import closest

TOKENS_PER_PARAM = 20.0  # of the paper's runs (Section 5.1)


class Objective:
    """A cost of a model; less is better. A subclass is a frozen dataclass, whose fields are its settings (`make`)."""

    name: ClassVar[str]  # as on the command line
    heading: ClassVar[str]  # of a narrow column
    choice: ClassVar[str]  # among other costs, in words
    label: str  # for an axis, without the unit
    unit: str  # of the number; empty where it has none
    parts: ClassVar[Mapping[str, type]] = {}  # fields that are dataclasses, whose own fields are settings too
    needs: ClassVar[tuple[str, str] | None] = None  # a setting that must be given, and an example of it

    def __call__(self, shape: HasShape, context: Any) -> Any:
        """The cost of `shape` served at `context` tokens; both may be arrays that broadcast."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Name, label, unit and every number that the cost is computed from, for JSON."""
        return {"cost": self.name, "label": self.label, "unit": self.unit}

    def settled(self, shape: HasShape, context: Any) -> Objective:
        """With what it leaves open fixed as is best for `shape`, element by element."""
        return self

    def drawn(self, count: int, seed: int) -> Objective:
        """With what was measured of a device drawn `count` times, as arrays (count, 1); itself where nothing was."""
        return self

    def served(self, shape: HasShape, context: Any) -> Any:
        """How models are served (`gqa_jax.search.serving.Served`); None of costs that are of no device."""
        return None


@dataclass(frozen=True)
class Memory(Objective):
    """M_infer (Eq. 4): values held, or bytes where the convention says so.

    The dtypes are those of bytes, bfloat16 unless given; ValueError where the convention counts values.
    """

    convention: str | Convention = "figures"
    param_dtype: str | None = None
    cache_dtype: str | None = None

    name = "memory"
    heading = "memory"
    choice = "memory"
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
        return super().describe() | {"convention": dataclasses.asdict(rule), "param_bytes": param, "cache_bytes": cache}


@dataclass(frozen=True)
class Flops(Objective):
    """C_infer (Eq. 3), per token or of a sequence. `flops` takes the place of the convention's rule."""

    convention: str | Convention = "figures"
    flops: str | None = None  # "per_token", "half_T", "full_T"

    name = "flops"
    heading = "FLOPs"
    choice = "compute (FLOPs)"

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
        return super().describe() | {"convention": dataclasses.asdict(self.rule)}


@dataclass(frozen=True)
class Z(Objective):
    """The hardware-aware cost lam M^alpha + (1 - lam) C^beta (Eq. 5), M and C as `Memory` and `Flops` count them."""

    convention: str | Convention = "figures"
    flops: str | None = None
    lam: float = 0.9
    alpha: float = 1 / 2
    beta: float = 1 / 3
    param_dtype: str | None = None
    cache_dtype: str | None = None

    name = "z"
    heading = "Z"
    choice = "Z: memory and compute, weighted"
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
        return self._memory.describe() | self._flops.describe() | super().describe() | weights


@dataclass(frozen=True)
class Training(Objective):
    """C_train (Table 8): 6 D N + 6 D T L d_h n_h FLOPs, on `tokens` or on `tokens_per_param` times N without embeddings.

    T is `train_context`, or the context served where that is None. With neither rule for tokens, 20 per parameter.
    """

    convention: str | Convention = "exact"
    tokens: float | None = None
    tokens_per_param: float | None = None
    train_context: float | None = None

    name = "train"
    heading = "training\nFLOPs"
    choice = "compute of training"
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
        return super().describe() | {
            "convention": dataclasses.asdict(costs.named_convention(self.convention)),
            "tokens": self.tokens,
            "tokens_per_param": self.tokens_per_param,
            "train_context": self.train_context,
        }


#: Every cost by its name, and the class that computes it. A further cost is a class and a line here.
OBJECTIVES = {
    "z": "gqa_jax.search.objectives.Z",
    "flops": "gqa_jax.search.objectives.Flops",
    "memory": "gqa_jax.search.objectives.Memory",
    "latency": "gqa_jax.search.serving.Latency",
    "price": "gqa_jax.search.serving.Price",
    "throughput": "gqa_jax.search.serving.Throughput",
    "train": "gqa_jax.search.objectives.Training",
    "lifetime": "gqa_jax.search.serving.Lifetime",
}


def class_of(cost: str) -> type[Objective]:
    """The class of a cost. Raises ValueError for an unknown one, naming the closest."""
    if cost not in OBJECTIVES:
        raise ValueError(f"cost {cost!r} is unknown: {closest(str(cost), OBJECTIVES)}")
    module, _, name = OBJECTIVES[cost].rpartition(".")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> type[Objective]:
    """`objectives.Price` and the like: classes of other modules, which are imported when they are asked for."""
    cost = next((cost for cost, path in OBJECTIVES.items() if path.rpartition(".")[2] == name), None)
    if cost is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return class_of(cost)


def settings(cost: str) -> list[str]:
    """Names of the settings that `make` takes for a cost. Raises ValueError for an unknown cost, naming the closest."""
    parts = class_of(cost).parts
    return [name for field in _fields(class_of(cost)) for name in (_fields(parts[field]) if field in parts else [field])]


def make(cost: str, **given: Any) -> Objective:
    """The objective of that name: z, flops, memory, latency, price, throughput, train or lifetime.

    `given` are fields of its class, and of its `parts`, by name; those that are None are left at their defaults. `lifetime` is
    in US dollars with a device, in FLOPs without.

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
    made = class_of(cost)
    if made.needs is not None and made.needs[0] not in given:
        name, example = made.needs
        raise ValueError(f"cost {cost!r} needs {name}, for example {name}={example}")
    arguments = {name: given[name] for name in _fields(made) if name in given}
    for field, part in made.parts.items():
        inner = {name: given[name] for name in _fields(part) if name in given}
        if inner and field == "serving" and "device" not in inner:
            raise ValueError(f"{', '.join(inner)} given without a device: add one, for example device=h200")
        if inner:
            arguments[field] = part(**inner)
    return made(**arguments)


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
