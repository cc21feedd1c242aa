"""Costs on an axis: what is computed, what it is called, in which unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import costs, formatting


class Measure(NamedTuple):
    """A cost and how its axis is written."""

    cost: Callable[[costs.Shape, float], np.ndarray]
    label: str
    unit: Callable[[float], tuple[float, str]]  # a typical value to the unit of the axis and its name
    text: Callable[[float], str] | None = None


def measure(cost: Any, convention: str | costs.Convention) -> Measure:
    """Of "z", "flops" or "memory" in a convention, or of an objective. Raises ValueError for another name."""
    rule = costs.named_convention(convention)
    if callable(cost):
        return Measure(cost, cost.label, lambda _: (1.0, cost.unit))
    if cost == "memory":
        unit = _bytes if rule.memory == "bytes" else _values
        return Measure(lambda shape, context: costs.infer_memory(shape, context, rule), "inference memory", unit)
    if cost == "flops":
        per = "token" if rule.flops == "per_token" else "sequence"

        def unit(typical: float) -> tuple[float, str]:
            factor, prefix = _prefix(typical)
            return factor, f"{prefix}FLOPs per {per}"

        return Measure(lambda shape, context: costs.infer_flops(shape, context, rule), "inference compute", unit)
    if cost == "z":
        return Measure(
            lambda shape, context: costs.hardware_aware_cost(
                costs.infer_memory(shape, context, rule), costs.infer_flops(shape, context, rule)
            ),
            "hardware-aware cost $Z$",
            lambda _: (1.0, ""),
            formatting.short,
        )
    raise ValueError(f"cost {cost!r} is unknown: use z, flops, memory, or an objective of gqa_jax.search.objectives")


def _prefix(typical: float) -> tuple[float, str]:
    power = int(np.clip(np.floor(np.log10(typical) / 3), 0, 6))
    return 1000.0**power, ("", *reversed(formatting.SI))[power]


def _bytes(typical: float) -> tuple[float, str]:
    factor, prefix = _prefix(typical)
    return factor, f"{prefix}B"


def _values(typical: float) -> tuple[float, str]:
    factor, prefix = _prefix(typical)
    names = {"": "", "k": "thousand ", "M": "million ", "G": "billion ", "T": "trillion "}
    return (factor, f"{names[prefix]}values") if prefix in names else (1e12, "trillion values")
