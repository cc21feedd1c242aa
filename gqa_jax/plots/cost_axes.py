"""Costs on an axis: which cost, its label and unit, the shapes that curves have, and whose cost is the answer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from scipy.interpolate import PchipInterpolator

from gqa_jax import costs, formatting, shapes
from gqa_jax.laws import Heads
from gqa_jax.plots import style
from gqa_jax.search import objectives, optimum
from gqa_jax.shape_search import solve_shape
from gqa_jax.shapes import Aspect

ANSWER = "least expected regret"  # what the yellow marks, in legends
_SAMPLES = 32  # losses at which it is found out whose regret is the least


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


def counted(convention: str | costs.Convention, cost: Any) -> str:
    """By which convention a cost is counted, where it is by one with a name."""
    return f'costs counted by the "{convention}" convention' if isinstance(convention, str) and isinstance(cost, str) else ""


def about(laws: Any) -> tuple[float, float, str]:
    """Head size, vocabulary, and how N is counted."""
    usual = (("head_dim", shapes.HEAD_DIM), ("vocab_size", shapes.VOCAB_SIZE), ("size_convention", "exact"))
    return tuple(getattr(laws, name, default) for name, default in usual)


def shape_rule(laws: Any, aspect: Any) -> tuple[Callable[[Any], Any], str]:
    """d / L as a function of N, and what it is called: None or "trained" as between the trained sizes, "paper", or a number."""
    if aspect is None or aspect == "trained":
        aspect = getattr(laws, "aspect", None) or shapes.paper_aspect()
        words = "as between the trained sizes"
    elif aspect == "paper":
        aspect, words = shapes.paper_aspect(), "of the paper's tables"
    else:
        aspect = aspect if callable(aspect) else Aspect.constant(float(aspect))
        words = "as given"
    if isinstance(aspect, Aspect) and len(set(aspect.ratio)) == 1:
        words = f"{aspect.ratio[0]:.3g}"
    return smooth(aspect), f"shapes: $d/L$ {'= ' if words[0].isdigit() else ''}{words}"


def smooth(aspect: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same ratios at the knots of an `Aspect`, and between them a curve without kinks that does not leave their range."""
    if not isinstance(aspect, Aspect) or len(aspect.params) < 3:
        return aspect
    ends = np.log(aspect.params[0]), np.log(aspect.params[-1])
    between = PchipInterpolator(np.log(aspect.params), np.log(aspect.ratio))
    return lambda n_params: np.exp(between(np.clip(np.log(n_params), *ends)))


def reach(laws: Any, heads: Heads, loss: float, aspect: Callable[[Any], Any]) -> tuple[costs.Shape, costs.Shape | None, float]:
    """(shape by the fitted law, shapes of every joint draw or None, N*) of the models that reach a loss.

    Raises ValueError for heads without a law, and a loss that is not reached.
    """
    drawn = laws.draws() if np.isfinite(getattr(laws, "sigma", np.nan)) else None
    sizes = None
    if drawn is not None and heads in drawn.heads:
        with np.errstate(over="ignore"):
            sizes = np.exp(drawn.take([heads]).log_size(loss)[:, 0])
    if heads in laws:
        n_params = laws[heads].solve(loss)
    elif sizes is not None and np.isfinite(np.median(sizes)):  # a rule without runs of its own, from the law over heads
        n_params = float(np.median(sizes))
    else:
        raise ValueError(f"heads {heads}: no law; there are {', '.join(map(str, laws))}")
    drawn_shape = None if sizes is None else solve_shape(sizes, heads, aspect, *about(laws))
    return solve_shape(n_params, heads, aspect, *about(laws)), drawn_shape, n_params


def answer(cost_H: Sequence[float], cost_SxH: np.ndarray | None) -> int | None:
    """Index of the heads of least expected regret over draws, else, without draws, of least cost; None where none has a cost."""
    if cost_SxH is not None:
        regret_SxH = optimum.regret(cost_SxH)
        reached = np.isfinite(cost_SxH.min(1))
        return int(np.argmin(regret_SxH[reached].mean(0))) if reached.any() else None
    known = np.where(np.isfinite(cost_H), cost_H, np.inf)
    return int(np.argmin(known)) if np.isfinite(known).any() else None


def answers_by_loss(
    laws: Any, cost: objectives.Objective, context: int, aspects: dict[Heads, Callable[[Any], Any]], low: float, high: float
) -> list[tuple[float, float, Heads]]:
    """(from, to, heads of least expected regret) of losses from `low` to `high`, where some are known."""
    edges = np.linspace(low, high, _SAMPLES + 1)
    found = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        fitted, drawn = [], []
        for heads, aspect in aspects.items():
            try:
                shape, shapes_S, _ = reach(laws, heads, (start + end) / 2, aspect)
            except ValueError:
                fitted.append(np.inf)
                drawn.append(None)
                continue
            fixed = objectives.settled(cost, shape, context)
            fitted.append(float(fixed(shape, context)))
            drawn.append(None if shapes_S is None else np.asarray(fixed(shapes_S, context), np.float64))
        count = max((len(one) for one in drawn if one is not None), default=0)
        cost_SxH = (
            np.stack([np.full(count, np.inf) if one is None else np.where(np.isnan(one), np.inf, one) for one in drawn], 1)
            if count
            else None
        )
        best = answer(fitted, cost_SxH)
        if best is not None:
            found.append((float(start), float(end), list(aspects)[best]))
    return found
