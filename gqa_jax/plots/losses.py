"""Loss against size, and against what a model costs to serve (Figures 2, 9, 10 and 11): runs, laws, bands.

Against query heads it is a power plus a constant (Figures 3, 12, 13 and 14, Appendix I).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gqa_jax import costs, formatting
from gqa_jax.costs import solve_shape
from gqa_jax.laws import Heads, PowerLaw, fit_by_heads
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.query_heads import Curve, QueryHeadsLaw, fit_query_heads
from gqa_jax.plots import cost_axes, labels, style, tables
from gqa_jax.shapes import HEAD_DIM, VOCAB_SIZE, Aspect

LOSS = "held-out loss (nats per token)"
_MARGIN = 1.15  # curves go beyond the points by this factor of N


def loss_vs_params(
    laws: Mapping[Heads, PowerLaw] | pd.DataFrame | os.PathLike | str,
    *,
    until: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Measured losses and fitted laws against the parameters without embeddings, one curve per head configuration.

    Args:
      laws: of `gqa_jax.laws.fit_by_heads`, a plain dict of laws (without bands), or a loss table or grid folder of one training
        context, which is fitted.
      until: N that the curves are continued to, beyond the runs and thinner.
    """
    laws = laws if isinstance(laws, Mapping) else fit_by_heads(tables.loss_table(laws))
    ax = ax or style.new_axes()
    entries, bars, bands = [], False, False
    for heads, law in laws.items():
        look = style.head_look(heads)
        last = law.params.max() * _MARGIN
        grid = np.geomspace(law.params.min() / _MARGIN, last, 100)
        style.curve(ax, grid, law.predict(grid), look)
        if until is not None and until > last:
            beyond = np.geomspace(last, until, 100)
            style.curve(ax, beyond, law.predict(beyond), look, linewidth=0.7)
            grid = np.concatenate([grid, beyond[1:]])
        bands |= style.law_band(ax, laws, heads, grid, look)
        text, error = style.head_text(heads), style.standard_errors(laws, heads)
        bars |= style.points(ax, law.params, law.loss, look, error=error, label=text)
        entries.append(labels.Entry(text, look, float(law.predict(grid[-1]))))
    style.log_axis(ax.xaxis, text=formatting.short)
    labels.legend(ax, entries, labels.heads(laws))
    beyond = "thin: beyond the runs" if until is not None else ""
    sure = style.sure(laws, getattr(laws, "shared", None), bars=bars, bands=bands)
    return style.finish(ax, "parameters without embeddings, $N$", LOSS, title, beyond, sure)


def loss_vs_cost(
    table: pd.DataFrame | os.PathLike | str,
    laws: Mapping[Heads, PowerLaw] | None,
    context_served: int,
    *,
    cost: Any = "z",
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Loss against a cost of serving at `context_served`, as the paper's Figures 2, 9, 10 and 11.

    Loss is fitted in N; each point and each point of the curve, with its band, is then moved along x to its cost there. Yellow
    marks, for each loss, the heads of least expected regret over the draws of the laws (of least cost where laws have none), as
    far as their curve goes.

    Args:
      table: loss table of one training context, or a grid folder.
      laws: of `gqa_jax.laws.fit_by_heads`, of the same table; None: they are fitted.
      cost: "z", "flops" or "memory" in the `convention`, or an objective of `gqa_jax.search.objectives`.
      aspect: d / L along the curves as a function of N; default: between the runs of each H, so that curves meet them.
    Raises:
      ValueError: an unknown cost or convention, no finished run, several training contexts, a law without a run in the table.
    """
    table, _ = run_table.usable(tables.loss_table(table))
    laws = fit_by_heads(table) if laws is None else laws
    ax = ax or style.new_axes()
    chosen = cost_axes.objective(cost, convention)
    entries, sure, marks = _draw_costs(ax, table, laws, context_served, chosen, aspect)
    labels.legend(ax, entries, labels.heads(laws), answer=marks)
    what = cost_axes.counted(convention, cost, _shapes_said(aspect))
    return style.finish(ax, cost_axes.label(chosen, context_served), LOSS, title, what, sure, cheaper="x")


def loss_vs_costs(
    table: pd.DataFrame | os.PathLike | str,
    laws: Mapping[Heads, PowerLaw] | None,
    context_served: int,
    *,
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    title: str = "",
) -> np.ndarray:
    """Memory, FLOPs and Z side by side, the whole of Figure 2; returns the three axes. Arguments as of `loss_vs_cost`."""
    table, _ = run_table.usable(tables.loss_table(table))
    laws = fit_by_heads(table) if laws is None else laws
    panels = style.new_panels(3, width=3.2, height=4.2, sharey=True)
    for ax, cost in zip(panels, ("memory", "flops", "z"), strict=True):
        chosen = cost_axes.objective(cost, convention)
        entries, sure, marks = _draw_costs(ax, table, laws, context_served, chosen, aspect)
        label = cost_axes.label(chosen, context_served).replace(" at ", "\nat ")
        style.finish(ax, label, LOSS if ax is panels[0] else "", cheaper="x")
    style.caption(panels[0], title, cost_axes.counted(convention, "z", _shapes_said(aspect)), sure, columns=3)
    labels.legend_below(panels[0].figure, entries, labels.heads(laws), answer=marks)
    return panels


def loss_vs_query_heads(
    source: Mapping[Curve, QueryHeadsLaw] | pd.DataFrame | os.PathLike | str,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Loss against query heads at one n_kv: runs, L(n_h) = a n_h^b + c and its band, a curve per size and training context.

    Args:
      source: laws of `gqa_jax.laws.fit_query_heads`; or a loss table or a grid folder, which is fitted with one c for all.
    Raises:
      ValueError: a table that can't be fitted: no finished run, several n_kv, fewer than three head counts of a curve.
    """
    laws: Any = source if isinstance(source, Mapping) else fit_query_heads(tables.loss_table(source))
    ax = ax or style.new_axes()
    text, series, note = _curve_names(list(laws))
    entries, bars, bands = [], False, False
    for i, (which, law) in enumerate(laws.items()):
        look = style.step_look(i, len(laws))
        grid = np.geomspace(law.n_heads.min(), law.n_heads.max(), 41)
        style.curve(ax, grid, law.predict(grid), look)
        bands |= _curve_band(ax, laws, which, law, grid, look)
        bars |= style.points(ax, law.n_heads, law.loss, look, error=style.standard_errors(laws, which), label=text(which))
        entries.append(labels.Entry(text(which), look, float(law.predict(grid[-1]))))
    style.power_of_two_axis(ax.xaxis, np.concatenate([law.n_heads for law in laws.values()]))
    labels.legend(ax, entries, series)
    n_kv = f"$n_{{kv}}$ = {laws.n_kv_heads}" if hasattr(laws, "n_kv_heads") else ""
    sure = style.sure(laws, getattr(laws, "shared", None), bars=bars, bands=bands)
    return style.finish(ax, "query heads, $n_h$", LOSS, title, ", ".join(filter(None, (note, n_kv))), sure)


def _draw_costs(
    ax: Axes, table: pd.DataFrame, laws: Mapping[Heads, PowerLaw], context: int, cost: Any, aspect: Any
) -> tuple[list[labels.Entry], str, str]:
    """Runs, curves and bands at their costs; what the legend says, what bars and bands are, and what the yellow marks."""
    shared, entries, aspects, curves = run_table.shared_sem(table), [], {}, {}
    bars, bands = False, False
    for heads, law in laws.items():
        look, rows = style.head_look(heads), _rows(table, heads)
        sizes = np.geomspace(law.params.min() / _MARGIN, law.params.max() * _MARGIN, 100)
        head_dim, vocab_size = run_table.only(rows, "head_dim", HEAD_DIM), run_table.only(rows, "vocab_size", VOCAB_SIZE)
        aspects[heads] = cost_axes.smooth(aspect or _aspect_between(rows))
        shapes = solve_shape(sizes, heads, aspects[heads], head_dim, vocab_size, getattr(laws, "size_convention", "exact"))
        x, y = cost(shapes, context), law.predict(sizes)
        style.curve(ax, x, y, look)
        bands |= style.law_band(ax, laws, heads, sizes, look, at=x)
        error = tables.numbers(rows, "loss_sem") if shared is None else None
        bars |= style.points(ax, cost(_shapes(rows), context), rows["loss"], look, error=error, label=style.head_text(heads))
        entries.append(labels.Entry(style.head_text(heads), look, float(y[-1])))
        curves[heads] = x, y
    cost_axes.scale(ax.xaxis, cost)
    marks = ""
    if len(laws) > 1:
        low, high = (pick(y[at] for _, y in curves.values()) for pick, at in ((min, -1), (max, 0)))
        for start, end, heads in cost_axes.answers_by_loss(laws, cost, context, aspects, low, high):
            x, y = curves[heads]
            inside = (y >= start - (end - start) / 4) & (y <= end + (end - start) / 4)
            if inside.any():
                style.halo(ax, x[inside], y[inside])
                marks = "least expected regret" if np.isfinite(getattr(laws, "sigma", np.nan)) else "least cost"
    return entries, style.sure(laws, run_table.shared_error(table), bars=bars, bands=bands), marks


def _shapes_said(aspect: Any) -> str:
    return f"shapes: $d/L$ as {'between the runs of each curve' if aspect is None else 'given'}"


def _aspect_between(rows: pd.DataFrame) -> Aspect:
    """Aspect ratio d / L between the sizes of runs."""
    sizes = rows.groupby(["n_layers", "d_model"], as_index=False)["params_non_embedding"].mean()
    sizes = sizes[["params_non_embedding", "n_layers", "d_model"]]
    return Aspect.between([tuple(map(float, row)) for row in sizes.to_numpy()])


def _rows(table: pd.DataFrame, heads: Heads) -> pd.DataFrame:
    """The runs of a head configuration; of n_heads None those with n_h d_h = d, or with an empty n_heads."""
    if missing := [name for name in ("n_layers", "d_model") if name not in table or table[name].isna().any()]:
        raise ValueError(f"the shapes of the runs are not known, so neither their costs: {' and '.join(missing)} are missing")
    table = table.assign(head_dim=table["head_dim"].fillna(HEAD_DIM) if "head_dim" in table else HEAD_DIM)
    own = (table["d_model"] / table["head_dim"]).astype("Float64")
    table = table.assign(n_heads=table["n_heads"].astype("Float64").fillna(own))
    n_heads = own if heads.n_heads is None else heads.n_heads
    rows = table[(table["n_heads"] == n_heads) & (table["n_kv_heads"] == heads.n_kv_heads)]
    if rows.empty:
        raise ValueError(f"heads {heads}: a law, but no run in the table; draw the table that was fitted")
    if heads.group is not None:
        return rows.assign(n_kv_heads=heads.kv_heads(rows["d_model"].astype("Float64"), rows["head_dim"].astype("Float64")))
    return rows


def _shapes(rows: pd.DataFrame) -> costs.Shape:
    """Of the runs; where their feed-forward width is not known, 8 d / 3, and head size and vocabulary the paper's."""
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
    numbers = {name: tables.numbers(rows, name) for name in names}
    numbers["d_ff"] = np.where(np.isnan(numbers["d_ff"]), 8 * numbers["d_model"] / 3, numbers["d_ff"])
    for name, usual in (("head_dim", HEAD_DIM), ("vocab_size", VOCAB_SIZE)):
        numbers[name] = np.where(np.isnan(numbers[name]), usual, numbers[name])
    return costs.Shape(**numbers)


def _curve_names(curves: list[Curve]) -> tuple[Any, str, str]:
    """What a curve is called, by what it differs in from the others; what that is; and what all have in common."""
    sizes, contexts = {curve.size for curve in curves}, {curve.context for curve in curves}
    if len(contexts) == 1:
        return (lambda curve: curve.size), "size", f"trained at $T$ = {formatting.context(contexts.pop())}"
    if len(sizes) == 1:
        return (lambda curve: formatting.context(curve.context)), "trained at (tokens)", str(sizes.pop())
    return (lambda curve: f"{curve.size}, {formatting.context(curve.context)}"), "size, trained at (tokens)", ""


def _curve_band(ax: Axes, laws: Any, which: Curve, law: QueryHeadsLaw, grid: np.ndarray, look: style.Look) -> bool:
    """Profiles are slow: they are taken at the numbers of heads that were trained, and their distance to the curve between."""
    if not hasattr(laws, "band"):
        return False
    heads = np.unique(law.n_heads)
    edges = laws.band(which, heads, style.LEVEL)
    apart = [np.interp(np.log(grid), np.log(heads), edge - law.predict(heads)) for edge in edges]
    return style.band(ax, grid, law.predict(grid) + apart[0], law.predict(grid) + apart[1], look)
