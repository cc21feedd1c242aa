"""Loss against size, and against what a model costs to serve (Figures 2, 9, 10 and 11): runs, laws, bands."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gqa_jax import costs, formatting
from gqa_jax.laws import Heads, PowerLaw, fit_by_heads
from gqa_jax.laws import runs as run_table
from gqa_jax.plots import labels, style, tables
from gqa_jax.plots.measures import measure
from gqa_jax.shape_search import solve_shape
from gqa_jax.shapes import HEAD_DIM, VOCAB_SIZE, Aspect

LOSS = "held-out loss (nats per token)"
HEADS = "curves: (query, key/value) heads"
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
    many = len(laws) > labels.MOST
    ax = ax or style.new_axes(width=7.2 if many else 5.6)
    ends = []
    for heads, law in laws.items():
        look = style.head_look(heads)
        last = law.params.max() * _MARGIN
        grid = np.geomspace(law.params.min() / _MARGIN, last, 100)
        style.curve(ax, grid, law.predict(grid), look)
        if until is not None and until > last:
            beyond = np.geomspace(last, until, 100)
            style.curve(ax, beyond, law.predict(beyond), look, linewidth=0.7)
            grid = np.concatenate([grid, beyond[1:]])
        style.law_band(ax, laws, heads, grid, look)
        style.points(ax, law.params, law.loss, look, error=style.standard_errors(laws, heads), label=style.head_text(heads))
        ends.append(labels.End(grid[-1], float(law.predict(grid[-1])), style.head_text(heads), look.color))
    style.log_axis(ax.xaxis, text=formatting.short)
    if many:
        labels.heads_legend(ax, list(laws))
    else:
        labels.label_ends(ax, ends)
    sure = style.sure(getattr(laws, "shared", None), laws)
    return style.finish(ax, "parameters without embeddings, $N$", LOSS, title, f"{HEADS}\n{sure}")


def loss_vs_cost(
    table: pd.DataFrame | os.PathLike | str,
    laws: Mapping[Heads, PowerLaw] | None,
    context_served: int,
    *,
    cost: Any = "z",
    convention: str | costs.Convention = "figures",
    aspect: Callable[[Any], Any] | None = None,
    title: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Loss against a cost of serving at `context_served`, as the paper's Figures 2, 9, 10 and 11.

    Loss is fitted in N; each point and each point of the curve, with its band, is then moved along x to its cost there.

    Args:
      table: loss table of one training context, or a grid folder.
      laws: of `gqa_jax.laws.fit_by_heads`, of the same table; None: they are fitted.
      cost: "z", "flops" or "memory" in the `convention`, or an objective of `gqa_jax.search.objectives`.
      aspect: aspect ratio of the shapes along the curve; default: between the runs of each H, so that curves meet them.
    Raises:
      ValueError: an unknown cost or convention, no finished run, several training contexts, a law without a run in the table.
    """
    table, _ = run_table.usable(tables.loss_table(table))
    laws = fit_by_heads(table) if laws is None else laws
    chosen = measure(cost, convention)
    ax = ax or style.new_axes(width=6.2)
    lowest, highest, shared = np.inf, 0.0, run_table.shared_sem(table)
    for heads, law in laws.items():
        look, rows = style.head_look(heads), _rows(table, heads)
        x = chosen.cost(_shapes(rows), context_served)
        sizes = np.geomspace(law.params.min() / _MARGIN, law.params.max() * _MARGIN, 100)
        head_dim, vocab_size = run_table.only(rows, "head_dim", HEAD_DIM), run_table.only(rows, "vocab_size", VOCAB_SIZE)
        shapes = solve_shape(
            sizes, heads, aspect or table_aspect(rows), head_dim, vocab_size, getattr(laws, "size_convention", "exact")
        )
        grid = chosen.cost(shapes, context_served)
        style.curve(ax, grid, law.predict(sizes), look)
        style.law_band(ax, laws, heads, sizes, look, at=grid)
        error = tables.numbers(rows, "loss_sem") if shared is None else None
        style.points(ax, x, rows["loss"], look, error=error, label=style.head_text(heads))
        lowest, highest = min(lowest, grid[0], *x), max(highest, grid[-1], *x)
    unit, name = chosen.unit(np.sqrt(lowest * highest))
    style.log_axis(ax.xaxis, unit, chosen.text)
    if legend:
        labels.heads_legend(ax, list(laws))
    counted = f"costs: {convention} convention" if isinstance(convention, str) and isinstance(cost, str) else ""
    if hasattr(laws, "band") or (shared is not None and shared > 0):
        counted = "\n".join(filter(None, (counted, style.sure(run_table.shared_error(table), laws))))
    label = f"{chosen.label} at {formatting.context(context_served)}" + (f" ({name})" if name else "")
    return style.finish(ax, label, LOSS, title, counted)


def loss_vs_costs(
    table: pd.DataFrame | os.PathLike | str,
    laws: Mapping[Heads, PowerLaw] | None,
    context_served: int,
    *,
    title: str = "",
    **options: Any,
) -> np.ndarray:
    """Memory, FLOPs and Z side by side, the whole of Figure 2; returns the three axes. Options as of `loss_vs_cost`."""
    laws = fit_by_heads(tables.loss_table(table)) if laws is None else laws
    panels = style.new_panels(3, width=3.0, height=3.7, sharey=True)
    for ax, cost in zip(panels, ("memory", "flops", "z"), strict=True):
        loss_vs_cost(
            table, laws, context_served, cost=cost, ax=ax, legend=False, title=title if ax is panels[0] else "", **options
        )
        ax.set_xlabel(ax.get_xlabel().replace(" (", "\n("))
        note = ax.texts[0]  # the same in all
        if ax is not panels[0]:
            ax.set_ylabel("")
            note.remove()
            continue
        note.set_in_layout(False)  # it is wider than the panel: a title keeps the room above
        if not title:
            ax.set_title(" ", fontsize=style.SMALL, loc="left", pad=4 + 10 * note.get_text().count("\n"))
    labels.heads_legend(panels[0].figure, list(laws), below=True)
    return panels


def table_aspect(table: pd.DataFrame) -> Aspect:
    """Aspect ratio d / L between the sizes of a loss table."""
    sizes = table.groupby(["n_layers", "d_model"], as_index=False)["params_non_embedding"].mean()
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
