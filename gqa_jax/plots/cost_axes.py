"""Costs on an axis: which cost, its label and unit, the shapes that curves have, and whose cost is the answer's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from scipy.interpolate import PchipInterpolator

from gqa_jax import costs, formatting
from gqa_jax.laws import Heads, PowerLaw
from gqa_jax.plots import style
from gqa_jax.search import objectives, shape_rule
from gqa_jax.search.answer import heads_of
from gqa_jax.search.candidates import CostAt, Table, coefficients, rule_of
from gqa_jax.shapes import Aspect

_LOSSES = 24  # at which it is found out whose regret is the least

_SHAPES = {shape_rule.BEST: "of least cost"} | shape_rule.WORDS


def objective(cost: Any, convention: str | costs.Convention) -> objectives.Objective:
    """Of "z", "flops" or "memory" in a convention, or an objective as it is. Raises ValueError for another name."""
    if callable(cost):
        return cost
    costs.named_convention(convention)
    if cost not in ("z", "flops", "memory"):
        raise ValueError(f"cost {cost!r} is unknown: use z, flops, memory, or an objective of gqa_jax.search.objectives")
    return objectives.make(cost, convention=convention)


def label(cost: objectives.Objective, context: int | None = None) -> str:
    """Of an axis, with the unit: inference memory at 128K (values)."""
    at = "" if context is None else f" at {formatting.context(context)}"
    unit = "" if "FLOPs" in cost.label and cost.unit == "FLOPs" else f" ({cost.unit or 'no unit'})"
    return cost.label + at + unit


def scale(axis: Axis, cost: objectives.Objective) -> None:
    """The logarithmic axis of a cost: counted values in millions and billions (M, B), units with the letters of the SI."""
    style.log_axis(axis, text=formatting.si if cost.unit in ("FLOPs", "bytes") else formatting.short)


def counted(convention: str | costs.Convention, cost: Any, shapes: str = "") -> str:
    """By which convention a cost is counted, where it is by one with a name, and `shapes` (`shapes_said`) after it."""
    named = isinstance(convention, str) and isinstance(cost, str)
    return "; ".join(filter(None, (f'costs counted by the "{convention}" convention' if named else "", shapes)))


def shapes_said(laws: Mapping[Heads, PowerLaw], aspect: Any) -> str:
    """Which rule for shapes a picture's costs have, `aspect` as of `gqa_jax.search.optimum.search`."""
    name = rule_of(laws, aspect).name
    return f"shapes: $d/L$ {_SHAPES.get(name, f'= {name}')}"


def smooth(aspect: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same ratios at the knots of an `Aspect`, and between them a curve without kinks.

    What is interpolated is N / r^2, the cube of the layers but for a factor: between two sizes of as many layers a model has as
    many, and its cost does not swing.
    """
    if not isinstance(aspect, Aspect) or len(aspect.params) < 2:
        return aspect
    ends = (np.log(aspect.params[0]) - 1, np.log(aspect.params[-1]) + 1)
    log_n = np.pad(np.log(aspect.params), 1, "linear_ramp", end_values=ends)
    log_ratio = np.pad(np.log(aspect.ratio), 1, "edge")  # flat at the ends, as it is outside
    cubed = PchipInterpolator(log_n, log_n - 2 * log_ratio)

    def ratio(n_params: Any) -> Any:
        at = np.clip(np.log(n_params), *ends)
        return np.exp((at - cubed(at)) / 2)

    return ratio


def answers_by_loss(
    laws: Mapping[Heads, PowerLaw],
    cost: objectives.Objective,
    context: int,
    aspects: Mapping[Heads, Callable[[Any], Any]],
    low: float,
    high: float,
) -> list[tuple[float, float, Heads]]:
    """(from, to, heads of least expected regret) of losses from `low` to `high`; without draws, of least cost.

    aspects: d / L of each H as a function of N. Losses that no H reaches are left out.
    """
    heads = list(aspects)
    known = coefficients(laws, heads=heads, compared=None)

    def ratios(n_xH: np.ndarray) -> np.ndarray:
        return np.stack([np.broadcast_to(aspects[h](n_xH[..., i]), n_xH.shape[:-1]) for i, h in enumerate(heads)], -1)

    rule: Any = shape_rule.ShapeRule("runs", rule_of(laws, None).penalty, aspect=ratios)  # type: ignore[arg-type]
    edges, found = np.linspace(low, high, _LOSSES + 1), []
    for start, end in itertools.pairwise(edges):
        best = Table.of(laws, (start + end) / 2, rule, known).ranked(CostAt(cost, context)).frame.iloc[0]
        if np.isfinite(best["cost"]):
            found.append((float(start), float(end), heads_of(best)))
    return found
