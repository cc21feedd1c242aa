"""What heads cost against others: at the same loss (Figure 1), and for the same training cost (Figure 4)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gqa_jax import costs, formatting
from gqa_jax.laws import LLAMA3, Heads, PowerLaw
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.posterior import IN_BRIEF
from gqa_jax.plots import cost_axes, labels, style, tables
from gqa_jax.plots.losses import LOSS
from gqa_jax.search import objectives, optimum
from gqa_jax.search.answer import heads_of

_NAMES = {"memory": "memory", "flops": "FLOPs", "z": "$Z$"}
_POINTS = 33  # contexts of a curve


def savings(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    *,
    heads: Heads | None = None,
    baseline: Any = LLAMA3,
    show: Sequence[Any] = ("memory", "flops", "z"),
    convention: str | costs.Convention = "figures",
    aspect: Any = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Inference costs of two models at the same loss, the baseline's set to 100% (bars of Figure 1).

    Whiskers are 95% intervals of the ratio, from the joint draws of the laws where they have any. All bars of the heads are of
    one model: that whose shape is the best under Z, unless `aspect` says which.

    Args:
      heads: whose costs; default: the answer of `gqa_jax.search.optimum.search` under Z.
      baseline: as in `search`: heads, of which a run within .003 nats of the loss is taken, else the law's model; or a model.
      show: "memory", "flops", "z" in the `convention`, or objectives of `gqa_jax.search.objectives`.
      aspect: d / L, as in `search`.
    Raises:
      ValueError: heads without a law, a loss that is not reached, a baseline without a cost, an unknown cost or convention.
    """
    measures = [cost_axes.objective(each, convention) for each in show]
    among = None if heads is None else [heads]
    answer = optimum.search(
        laws, loss, context_served, objectives.Z(convention), aspect=aspect, heads=among, baseline=baseline, draws=_draws(laws)
    )
    free = aspect in (None, "best")
    of_one_model = {"aspect": answer.ratio if free else aspect, "heads": [answer.heads], "baseline": baseline}
    of_one_model["baseline_aspect"] = "trained" if free else None
    found = [optimum.search(laws, loss, context_served, each, **of_one_model, draws=_draws(laws)) for each in measures]
    against = found[0].baseline
    if against is None or not np.isfinite(against.cost):
        raise ValueError(next((text for text in found[0].warnings if text.startswith("no saving")), "the baseline has no cost"))
    ax = ax or style.new_axes(width=2.0 + 1.4 * len(show), height=3.8)
    look = style.head_look(answer.heads)
    frame = {"linewidth": 0.8, "edgecolor": style.INK}
    other = frame | {"facecolor": "0.9", "hatch": "//"}
    highest, sure = 100.0, False
    for i, one in enumerate(found):
        share = 100 * (1 - one.saving)
        ax.bar(i - 0.2, 100, 0.36, **other)
        ax.bar(i + 0.2, share, 0.36, facecolor=look.color, **frame)
        high, low = (100 * (1 - end) for end in one.saving_interval)
        top = share
        if np.isfinite(low):
            ax.vlines(i + 0.2, low, high, color="white", linewidth=3.2)
            ax.vlines(i + 0.2, low, high, color=style.INK, linewidth=1.4)
            top, sure = max(share, high) if np.isfinite(high) else share, True
        highest = max(highest, top)
        ax.annotate(
            f"{share - 100:+.1f}%".replace("-", style.MINUS), (i + 0.2, top), (0, 3), textcoords="offset points", ha="center",
            va="bottom", fontsize=style.TEXT, fontweight="bold", color=style.INK,
        )  # fmt: skip
    names = [_NAMES.get(each, each) if isinstance(each, str) else each.label for each in show]
    ax.set_xticks(range(len(show)), names)
    ax.set(xlim=(-0.55, len(show) - 0.45), ylim=(0, 1.12 * highest))
    theirs = f"{style.head_text(against.heads)}, {'measured' if against.measured else 'by its law'}"
    ours = f"{style.head_text(answer.heads)}{', least expected regret under $Z$' if heads is None else ''}"
    sizes = [f"$N$ = {formatting.short(one.n_params)}, {one.n_layers:.0f} x {one.d_model:.0f}" for one in (against, answer)]
    ax.legend(
        [Patch(**other), Patch(facecolor=look.color, **frame)], [f"{theirs}: {sizes[0]}", f"{ours}: {sizes[1]}"],
        loc="upper left", bbox_to_anchor=(-0.02, -0.1), frameon=False, fontsize=style.SMALL, labelcolor=style.INK,
    )  # fmt: skip
    shapes = cost_axes.shapes_said(laws, aspect).replace("least cost", "least $Z$")
    what = f"loss {loss:g}, served at {formatting.context(context_served)}; {against.label} = 100%"
    rests = f"whiskers: 95%{style.rests_on(laws)}" * sure
    style.finish(
        ax, "", "cost of inference (%)", title, what, cost_axes.counted(convention, show[0], shapes), rests, cheaper="y"
    )
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
    aspect: Any = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Cost of reaching a loss against the served context, a curve and its band per head configuration (curves of Figure 1).

    Yellow marks which of them has the least expected regret, or the least cost where laws have no draws. Arguments and errors
    as of `savings`. Curves go from the least to the greatest of `contexts_served`, which get the ticks.
    """
    chosen = cost_axes.objective(cost, convention)
    for each in heads:
        if each in laws:
            laws[each].solve(loss)  # ValueError where it is not reached
    grid = np.unique(np.round(np.geomspace(min(contexts_served), max(contexts_served), _POINTS)).astype(int))
    frame = optimum.optimum_map(
        laws, [loss], [int(context) for context in grid], chosen, aspect=aspect, heads=heads, draws=_draws(laws)
    )
    ax = ax or style.new_axes()
    entries, bands, curves = [], False, {}
    for each in heads:
        rows = frame[run_table.have(frame, each)]
        x, y, low, high = (tables.numbers(rows, name) for name in ("context_served", "cost", "cost_low", "cost_high"))
        if not np.isfinite(y).any():
            raise ValueError(f"heads {each} have no cost at a loss of {loss:g}: {rows['note'].iloc[0]}")
        look = style.head_look(each)
        style.curve(ax, x, y, look)
        bands |= style.band(ax, x, low, np.where(np.isfinite(high), high, np.nan), look)
        n_params = formatting.short(tables.numbers(rows, "n_params")[-1])
        entries.append(labels.Entry(f"{style.head_text(each)}, {n_params}", look, float(y[-1])))
        curves[each] = y
    style.power_of_two_axis(ax.xaxis, contexts_served, formatting.context)
    cost_axes.scale(ax.yaxis, chosen)
    best = frame[(frame["rank"] == 1).fillna(False)].sort_values("context_served")
    if len(heads) > 1:
        _mark(ax, [heads_of(row) for row in best.to_dict("records")], tables.numbers(best, "context_served"), curves)
    marks = "" if len(heads) == 1 else "least expected regret" if bands else "least cost"
    labels.legend(
        ax, entries, f"{labels.heads(curves)},\n$N$ at {formatting.context(int(grid[-1]))}", markers=False, answer=marks
    )
    what = f"loss {loss:g}; {cost_axes.counted(convention, cost, cost_axes.shapes_said(laws, aspect))}"
    rests = f"bands: 95%{style.rests_on(laws)}" * bands
    return style.finish(ax, "context served (tokens)", cost_axes.label(chosen), title, what, rests, cheaper="y")


def _mark(ax: Axes, winners: Sequence[Heads], x: np.ndarray, curves: Mapping[Heads, np.ndarray]) -> None:
    """Yellow along the curve of the winner at each x, as far as half-way to where the next one begins."""
    edges = [i for i in range(1, len(winners)) if winners[i] != winners[i - 1]]
    for start, end in itertools.pairwise([0, *edges, len(winners)]):
        ends = np.sqrt(x[[max(start - 1, 0), end - 1]] * x[[start, min(end, len(x) - 1)]])
        along = np.unique([ends[0], *x[start:end], ends[1]])
        y = np.exp(np.interp(np.log(along), np.log(x), np.log(curves[winners[start]])))
        style.halo(ax, along, y)


def _draws(laws: Any) -> int:
    """How many draws to take: none of laws whose noise is not known."""
    return 1000 if np.isfinite(getattr(laws, "sigma", np.nan)) else 0


def savings_by_context(
    frame: pd.DataFrame, *, baseline: str = "Llama 3's heads", title: str = "", ax: Axes | None = None
) -> Axes:
    """What the best heads save against a baseline at each served context, a curve per loss to reach, with bands of 95%.

    Args:
      frame: of `gqa_jax.search.optimum.optimum_map`: loss, context_served, rank, saving (0.5: one half) and, where they are
        known, saving_low and saving_high.
      baseline: what the savings are against, in words.
    Raises:
      ValueError: no saving is known: no law of the baseline's heads.
    """
    best = frame[(frame["rank"] == 1).fillna(False) & frame["saving"].notna()]
    if best.empty:
        raise ValueError("no saving to draw: column saving is empty; it needs a law of the Llama-3 heads")
    ax = ax or style.new_axes()
    losses = sorted(best["loss"].unique(), reverse=True)
    entries, bands = [], False
    ax.axhline(0, color="0.6", linewidth=0.8)
    for i, (loss, text) in enumerate(zip(losses, formatting.alike(losses), strict=True)):
        rows, look = best[best["loss"] == loss].sort_values("context_served"), style.step_look(i, len(losses))
        x, saving, low, high = (
            tables.numbers(rows, name) for name in ("context_served", "saving", "saving_low", "saving_high")
        )
        style.curve(ax, x, 100 * saving, look)
        style.points(ax, x, 100 * saving, look, label=text)
        bands |= style.band(ax, x, 100 * low, 100 * high, look)
        entries.append(labels.Entry(text, look, float(saving[-1])))
    style.power_of_two_axis(ax.xaxis, best["context_served"], formatting.context)
    labels.legend(ax, entries, "loss to reach\n(nats per token)")
    note = f"heads of least expected regret, against {baseline} at the same loss"
    label = f"cost saved against\n{baseline} (%)      cheaper \u2192"
    return style.finish(ax, "context served (tokens)", label, title, note, "bands: 95%" * bands)


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
    ax = ax or style.new_axes()
    groups = frame.groupby(["n_heads", "n_kv_heads"], dropna=False)
    found = {heads_of(rows.iloc[0]): rows.sort_values("n_params") for _, rows in groups}
    entries = []
    for heads, rows in found.items():
        look, x, y = style.head_look(heads), tables.numbers(rows, column), tables.numbers(rows, "loss")
        style.curve(ax, x, y, look)
        style.band(ax, x, tables.numbers(rows, "loss_low"), tables.numbers(rows, "loss_high"), look)
        entries.append(labels.Entry(style.head_text(heads), look, float(y[-1])))
    if cost == "cost":
        style.log_axis(ax.xaxis, text=formatting.short)
    else:
        chosen = cost_axes.objective(cost, convention)
        cost_axes.scale(ax.xaxis, chosen)
        label = cost_axes.label(chosen)
    if len(found) > 1:
        _mark_cheapest(ax, [(tables.numbers(rows, column), tables.numbers(rows, "loss")) for rows in found.values()])
    labels.legend(ax, entries, labels.heads(found), markers=False, answer="least cost" * (len(found) > 1))
    rests = f"bands: 95% {IN_BRIEF['independent']}"
    return style.finish(ax, label, LOSS, title, "same training cost for all", rests, cheaper="x")


def _mark_cheapest(ax: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Yellow along the curve that has the least cost for each loss that all have. A curve is costs and losses."""
    losses = np.linspace(max(y.min() for _, y in curves), min(y[0] for _, y in curves), 200)
    at_CxL = np.full((len(curves), len(losses)), np.inf)
    for i, (x, y) in enumerate(curves):
        falling = slice(0, int(np.argmin(y)) + 1)
        inside = (losses >= y[falling].min()) & (losses <= y[falling].max())
        at_CxL[i, inside] = np.exp(np.interp(losses[inside], y[falling][::-1], np.log(x[falling][::-1])))
    best = np.argmin(at_CxL, 0)
    for i in range(len(curves)):
        mine = (best == i) & np.isfinite(at_CxL[i])
        for part in np.split(np.flatnonzero(mine), np.flatnonzero(np.diff(np.flatnonzero(mine)) > 1) + 1):
            if len(part):
                style.halo(ax, at_CxL[i, part], losses[part])
