"""Loss against the number of query heads: a power plus a constant (Figures 3, 12, 13 and 14, Appendix I)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gqa_jax import formatting
from gqa_jax.laws.query_heads import Curve, QueryHeadsLaw, fit_query_heads
from gqa_jax.plots import labels, style, tables
from gqa_jax.plots.losses import LOSS


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
    text, series, note = _names(list(laws))
    entries, bars, bands = [], False, False
    for i, (which, law) in enumerate(laws.items()):
        look = style.step_look(i, len(laws))
        grid = np.geomspace(law.n_heads.min(), law.n_heads.max(), 41)
        style.curve(ax, grid, law.predict(grid), look)
        bands |= _band(ax, laws, which, law, grid, look)
        bars |= style.points(ax, law.n_heads, law.loss, look, error=style.standard_errors(laws, which), label=text(which))
        entries.append(labels.Entry(text(which), look, float(law.predict(grid[-1]))))
    style.power_of_two_axis(ax.xaxis, np.concatenate([law.n_heads for law in laws.values()]))
    labels.legend(ax, entries, series)
    n_kv = f"$n_{{kv}}$ = {laws.n_kv_heads}" if hasattr(laws, "n_kv_heads") else ""
    sure = style.sure(laws, getattr(laws, "shared", None), bars=bars, bands=bands)
    return style.finish(ax, "query heads, $n_h$", LOSS, title, ", ".join(filter(None, (note, n_kv))), sure)


def _names(curves: list[Curve]) -> tuple[Any, str, str]:
    """What a curve is called, by what it differs in from the others; what that is; and what all have in common."""
    sizes, contexts = {curve.size for curve in curves}, {curve.context for curve in curves}
    if len(contexts) == 1:
        return (lambda curve: curve.size), "size", f"trained at $T$ = {formatting.context(contexts.pop())}"
    if len(sizes) == 1:
        return (lambda curve: formatting.context(curve.context)), "trained at (tokens)", str(sizes.pop())
    return (lambda curve: f"{curve.size}, {formatting.context(curve.context)}"), "size, trained at (tokens)", ""


def _band(ax: Axes, laws: Any, which: Curve, law: QueryHeadsLaw, grid: np.ndarray, look: style.Look) -> bool:
    """Profiles are slow: they are taken at the numbers of heads that were trained, and their distance to the curve between."""
    if not hasattr(laws, "band"):
        return False
    heads = np.unique(law.n_heads)
    edges = laws.band(which, heads, style.LEVEL)
    apart = [np.interp(np.log(grid), np.log(heads), edge - law.predict(heads)) for edge in edges]
    return style.band(ax, grid, law.predict(grid) + apart[0], law.predict(grid) + apart[1], look)
