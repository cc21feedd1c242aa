"""What heads cost against others: at the same loss (Figure 1), and for the same training cost (Figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gqa_jax import costs, formatting, shapes
from gqa_jax.laws import LLAMA3, Heads, PowerLaw
from gqa_jax.laws.posterior import IN_BRIEF
from gqa_jax.plots import labels, style, tables
from gqa_jax.plots.measures import measure
from gqa_jax.search import objectives, optimum
from gqa_jax.shape_search import solve_shape

_NAMES = {"memory": "memory", "flops": "FLOPs", "z": "$Z$"}


def savings(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    *,
    heads: Heads | None = None,
    baseline: Heads = LLAMA3,
    show: Sequence[Any] = ("memory", "flops", "z"),
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Inference costs of two head configurations at the same loss, the baseline's set to 100% (bars of Figure 1).

    Whiskers are 95% intervals of the ratio, from the joint draws of the laws where they have any.

    Args:
      heads: whose costs; default: the answer of `gqa_jax.search.optimum.search` under Z.
      show: "memory", "flops", "z" in the `convention`, or objectives of `gqa_jax.search.objectives`.
      aspect: as in `search`; default: that of the laws.
    Raises:
      ValueError: heads without a law, a loss that one of the two does not reach, an unknown cost or convention.
    """
    aspect = aspect or _aspect(laws)
    heads = heads or optimum.search(laws, loss, context_served, objectives.Z(convention), aspect=aspect).heads
    ours, theirs = (_reach(laws, each, loss, aspect) for each in (heads, baseline))
    ax = ax or style.new_axes(width=1.7 + 1.25 * len(show), height=3.5)
    look = style.head_look(heads)
    frame = {"linewidth": 0.8, "edgecolor": style.INK}
    other = frame | {"facecolor": "0.9", "hatch": "//"}
    highest = 100.0
    for i, each in enumerate(show):
        cost = measure(each, convention).cost
        share = 100 * float(cost(ours.shape, context_served) / cost(theirs.shape, context_served))
        ax.bar(i - 0.2, 100, 0.36, **other)
        ax.bar(i + 0.2, share, 0.36, facecolor=look.color, **frame)
        top = share
        if ours.drawn is not None and theirs.drawn is not None:
            low, high = _interval(100 * cost(ours.drawn, context_served) / cost(theirs.drawn, context_served))
            ax.vlines(i + 0.2, low, high, color=style.INK, linewidth=1.2)
            top = max(share, high) if np.isfinite(high) else share
        highest = max(highest, top)
        ax.annotate(
            f"{share - 100:+.1f}%".replace("-", style.MINUS), (i + 0.2, top), (0, 3), textcoords="offset points", ha="center",
            va="bottom", fontsize=style.TEXT, fontweight="bold", color=style.INK,
        )  # fmt: skip
    names = [_NAMES.get(each, each) if isinstance(each, str) else each.label for each in show]
    ax.set_xticks(range(len(show)), names)
    ax.set(xlim=(-0.55, len(show) - 0.45), ylim=(0, 1.12 * highest))
    ax.legend(
        [Patch(**other), Patch(facecolor=look.color, **frame)],
        [f"{style.head_text(h)}, $N$ = {formatting.short(size.n_params)}" for h, size in ((baseline, theirs), (heads, ours))],
        loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False, fontsize=style.SMALL, labelcolor=style.INK,
    )  # fmt: skip
    counted = f", {convention} convention" if isinstance(convention, str) else ""
    note = f"loss {loss:g} at {formatting.context(context_served)}{counted}"
    if ours.drawn is not None and theirs.drawn is not None:
        note += f"\nwhiskers: 95%{style.rests_on(laws)}"
    style.finish(ax, "", "cost of inference (%)", title, note)
    ax.grid(visible=False, axis="x")
    ax.tick_params(axis="x", length=0, labelsize=style.TEXT)
    return ax


def cost_by_context(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    contexts_served: Sequence[int],
    heads: Sequence[Heads],
    *,
    cost: Any = "memory",
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Cost of reaching a loss against the served context, a curve and its band per head configuration (curves of Figure 1).

    Arguments and errors as of `savings`. Curves go from the least to the greatest of `contexts_served`, which get the ticks.
    """
    aspect = aspect or _aspect(laws)
    chosen = measure(cost, convention)
    ax = ax or style.new_axes()
    grid = np.geomspace(min(contexts_served), max(contexts_served), 60)
    found = {each: _reach(laws, each, loss, aspect) for each in heads}
    ends = []
    for each, size in found.items():
        look = style.head_look(each)
        y = np.broadcast_to(chosen.cost(size.shape, grid), grid.shape)
        style.curve(ax, grid, y, look)
        if size.drawn is not None:
            edges = [_interval(chosen.cost(size.drawn, context)) for context in grid]
            style.band(ax, grid, *np.transpose(edges), look)
        ends.append(labels.End(grid[-1], y[-1], f"{style.head_text(each)}, {formatting.short(size.n_params)}", look.color))
    style.power_of_two_axis(ax.xaxis, contexts_served, formatting.context)
    unit, name = chosen.unit(float(np.sqrt(min(end.y for end in ends) * max(end.y for end in ends))))
    style.log_axis(ax.yaxis, unit, chosen.text)
    labels.label_ends(ax, ends)
    label = chosen.label + (f" ({name})" if name else "")
    note = f"loss {loss:g}; curves: (query, key/value) heads, $N$"
    if any(size.drawn is not None for size in found.values()):
        note += f"; bands: 95%{style.rests_on(laws)}"
    return style.finish(ax, "context served (tokens)", label, title, note)


def savings_by_context(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """What the best heads save against Llama-3's at each served context, a curve per loss to reach.

    Args:
      frame: of `gqa_jax.search.optimum.optimum_map`: loss, context_served, rank, saving (0.5: one half).
    Raises:
      ValueError: no saving is known: no law of the Llama-3 heads.
    """
    best = frame[(frame["rank"] == 1).fillna(False) & frame["saving"].notna()]
    if best.empty:
        raise ValueError("no saving to draw: column saving is empty; it needs a law of the Llama-3 heads")
    ax = ax or style.new_axes()
    losses = sorted(best["loss"].unique(), reverse=True)
    ends = []
    for i, (loss, text) in enumerate(zip(losses, formatting.alike(losses), strict=True)):
        rows, look = best[best["loss"] == loss].sort_values("context_served"), style.step_look(i, len(losses))
        x, saving = tables.numbers(rows, "context_served"), 100 * tables.numbers(rows, "saving")
        style.curve(ax, x, saving, look)
        style.points(ax, x, saving, look, label=text)
        ends.append(labels.End(x[-1], saving[-1], text, look.color))
    style.power_of_two_axis(ax.xaxis, best["context_served"], formatting.context)
    labels.label_ends(ax, ends)
    note = "curves: loss to reach (nats per token)"
    return style.finish(ax, "context served (tokens)", "saving against Llama-3's heads (%)", title, note)


_COLUMNS = {"memory": "m_infer", "flops": "c_infer", "cost": "cost"}


def aligned_cost(
    frame: pd.DataFrame,
    *,
    cost: str = "memory",
    convention: str | costs.Convention = "figures",
    label: str = "cost",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Loss against the cost of serving where all heads had the same training cost, not the same tokens (Figure 4).

    Args:
      frame: of `equal_compute.equal_training_curves` with a served context: n_heads, n_kv_heads, n_params, loss, loss_low,
        loss_high, m_infer, c_infer, cost.
      cost: "memory", "flops", or "cost" for the objective that the frame was made with.
      convention: of m_infer and c_infer, for their unit.
      label: of the axis where cost="cost", with the unit.
    Raises:
      ValueError: another cost, or a frame without its column.
    """
    if cost not in _COLUMNS:
        raise ValueError(f"cost {cost!r} is unknown here: use {', '.join(_COLUMNS)}")
    column = _COLUMNS[cost]
    if column not in frame:
        raise ValueError(f"the frame has no column {column}: give equal_training_curves a context_served")
    ax = ax or style.new_axes(width=6.2)
    groups = frame.groupby(["n_heads", "n_kv_heads"], dropna=False)
    found = {tables.heads_of(rows.iloc[0]): rows.sort_values("n_params") for _, rows in groups}
    for heads, rows in found.items():
        look, x = style.head_look(heads), tables.numbers(rows, column)
        style.curve(ax, x, tables.numbers(rows, "loss"), look)
        style.band(ax, x, tables.numbers(rows, "loss_low"), tables.numbers(rows, "loss_high"), look)
    typical = float(np.exp(np.mean(np.log(tables.numbers(frame, column)))))
    if cost != "cost":
        chosen = measure(cost, convention)
        unit, name = chosen.unit(typical)
        label = f"{chosen.label} ({name})"
    style.log_axis(ax.xaxis, 1.0 if cost == "cost" else unit, formatting.short if cost == "cost" else None)
    labels.heads_legend(ax, list(found), markers=False)
    return style.finish(
        ax, label, "loss (nats per token)", title, f"same training cost for all; bands: 95% {IN_BRIEF['independent']}"
    )


class _Size(NamedTuple):
    """The model of one H that reaches a loss."""

    n_params: float
    shape: costs.Shape
    drawn: costs.Shape | None  # of every joint draw, where laws have draws


def _reach(laws: Any, heads: Heads, loss: float, aspect: Callable[[Any], Any]) -> _Size:
    """Raises ValueError for heads without a law, and a loss that is not reached."""
    about = [getattr(laws, name, default) for name, default in _ABOUT]
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
    real = solve_shape(n_params, heads, aspect, *about)
    return _Size(n_params, real, None if sizes is None else solve_shape(sizes, heads, aspect, *about))


def _aspect(laws: Any) -> Callable[[Any], Any]:
    return getattr(laws, "aspect", None) or shapes.paper_aspect()


_ABOUT = (("head_dim", shapes.HEAD_DIM), ("vocab_size", shapes.VOCAB_SIZE), ("size_convention", "exact"))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Of draws; inf above where too many do not reach the loss. A ratio of two infinite costs is no number: left out."""
    values = values[~np.isnan(values)]
    if not values.size:
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - style.LEVEL) / 2, (1 + style.LEVEL) / 2], method="nearest")
    return float(low), float(high)
