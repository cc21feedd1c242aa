"""What the training context does to the loss: relative differences (Figures 5 and 6), continued training (Figure 15)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from gqa_jax import formatting
from gqa_jax.differences import load_differences
from gqa_jax.laws import Heads
from gqa_jax.laws import runs as run_table
from gqa_jax.plots import labels, style, tables
from gqa_jax.plots.losses import LOSS
from gqa_jax.search.answer import heads_of
from gqa_jax.search.invariance import FROM_CONTEXT, Invariance, context_invariance, pairs


def loss_vs_context(
    source: Invariance | pd.DataFrame | os.PathLike | str,
    baseline: Heads | str | None = None,
    *,
    differences: pd.DataFrame | None = None,
    from_context: int = FROM_CONTEXT,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Relative loss difference (L(T) - L_base(T)) / L_base(T) against the training context T, as Figures 5 and 6.

    Thick lines and their bands of 95% are those of the test from `from_context` on; its verdict stands in the legend. Bars are
    95% of the standard errors of the differences.

    Args:
      source: of `gqa_jax.search.invariance.context_invariance`; or a loss table or a grid folder, which is then tested.
      baseline: with a table: heads, for a series per head configuration at its one size (Figure 5); or the name of a size, for
        a series per size at its one head configuration (Figure 6).
      differences: with a loss table: as of `context_invariance`; those of a grid folder are read from it.
    Raises:
      ValueError: a table without a baseline, or one that can't be tested: fewer than three contexts from `from_context` on,
        no run of the baseline, runs that differ in more than the series and T.
    """
    if isinstance(source, Invariance):
        found = source
    elif baseline is None:
        raise ValueError("a loss table needs a baseline: heads such as Heads(8, 8), or the name of a size")
    else:
        table = tables.loss_table(source)
        if differences is None and not isinstance(source, pd.DataFrame):
            differences = load_differences(source, pairs(table, baseline))
        found = context_invariance(table, baseline, differences=differences, from_context=from_context)
    ax = ax or style.new_axes()
    ax.axhline(0, color="0.6", linewidth=0.7)
    tests = found.tests.set_index("model")
    models = list(dict.fromkeys(found.differences["model"]))
    entries = []
    for i, model in enumerate(models):
        rows = found.differences[found.differences["model"] == model].sort_values("context")
        series = tables.heads_named(model) or model
        look, text = _look(series, i, len(models)), _text(series)
        contexts, percent = tables.numbers(rows, "context"), 100 * tables.numbers(rows, "difference")
        ax.plot(contexts, percent, color=look.color, linestyle=look.line, linewidth=0.7, label="_joined")
        style.points(ax, contexts, percent, look, error=100 * tables.numbers(rows, "standard_error"), label=text)
        end = percent[-1]
        if model in tests.index:
            test, tested = tests.loc[model], contexts[contexts >= found.from_context]
            u = np.log2(tested) - np.log2(tested).mean()
            line = 100 * (test["mean"] + test["slope"] * u)
            half = 100 * (test["slope_high"] - test["slope"]) * np.sqrt(u @ u / len(u) + u**2)
            ax.plot(tested, line, color=look.color, linewidth=1.6, label="_line")
            style.band(ax, tested, line - half, line + half, look)
            end, text = line[-1], f"{text} {test['verdict']}"
        entries.append(labels.Entry(text, look, float(end)))
    style.power_of_two_axis(ax.xaxis, found.differences["context"], formatting.context)
    base = tables.heads_named(found.baseline) or found.baseline
    labels.legend(ax, entries, f"{'size' if isinstance(base, str) else 'heads'}, and the verdict")
    lines = (
        f"thick: straight lines from {formatting.context(found.from_context)} on; bands: 95% by the runs' scatter about them"
    )
    bars = "bars: 95% of the standard errors of differences"
    return style.finish(ax, "context of training, $T$ (tokens)", f"loss relative to {_text(base)} (%)", title, lines, bars)


def continued_training(table: pd.DataFrame | os.PathLike | str, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Loss of runs that continue a shorter context, against the tokens of the continuation (Figure 15, Appendix J).

    Lines across are the runs that were trained at the long context from scratch, with 95% of their standard error: what the
    continued ones approach. Seeds of those are averaged. Runs that were evaluated on one text have its error in common: it is
    no bar then, but a note.

    Args:
      table: loss table, or a grid folder, with continued runs (column continue_from) of one context; of several sizes or of
        several head configurations, not both.
    Raises:
      ValueError: no continued run is done, or they differ in more than that.
    """
    table = tables.loss_table(table)
    table = table.assign(heads=[heads_of(row) for _, row in table.iterrows()])
    run_table.require_one_rule(table)
    shared = run_table.shared_error(table)
    if run_table.shared_sem(table) is not None:
        table = table.assign(loss_sem=np.nan)
    continued = table[table["continue_from"].notna()]
    if continued.empty:
        raise ValueError("nothing to draw: no finished run continues another (column continue_from)")
    context = tables.the_only(continued, "context")
    series = "heads" if len(set(continued["heads"])) > 1 else "size"
    tables.the_only(continued, "size" if series == "heads" else "heads")
    ax = ax or style.new_axes()
    order = _order(continued, series)
    scratch = table[table["continue_from"].isna() & (table["context"] == context)]
    entries, bars, bands = [], False, False
    for i, value in enumerate(order):
        look, rows = _look(value, i, len(order)), _select(continued, series, value).sort_values("tokens")
        tokens, loss = tables.numbers(rows, "tokens"), tables.numbers(rows, "loss")
        ax.plot(tokens, loss, color=look.color, linestyle=look.line, linewidth=0.7, label="_joined")
        bars |= style.points(ax, tokens, loss, look, error=tables.numbers(rows, "loss_sem"), label=_text(value))
        entries.append(labels.Entry(_text(value), look, float(loss[-1])))
        same = scratch[(scratch["size"].isin(rows["size"])) & (scratch["heads"].isin(rows["heads"]))]
        if not same.empty:
            loss, squares = tables.numbers(same, "loss").mean(), same["loss_sem"].astype("Float64") ** 2
            ax.axhline(loss, color=look.color, linestyle=look.line, linewidth=1.3, label="_scratch")
            if squares.notna().any():
                half = stats.norm.ppf((1 + style.LEVEL) / 2) * np.sqrt(squares.sum()) / len(same)
                ax.axhspan(loss - half, loss + half, color=look.color, alpha=0.12, linewidth=0)
                bands = True
    style.log_axis(ax.xaxis, text=formatting.short)
    labels.legend(ax, entries, labels.heads(order) if series == "heads" else "size")
    sure = style.sure(None, shared, bars=bars, bands=bands)
    across = "lines across: trained at that context from scratch"
    return style.finish(ax, f"tokens of the continuation at {formatting.context(int(context))}", LOSS, title, across, sure)


def _select(table: pd.DataFrame, series: str, value: Heads | str) -> pd.DataFrame:
    return table[[each == value for each in table[series]]]  # pandas would take heads for two values


def _order(table: pd.DataFrame, series: str) -> list[Any]:
    """Sizes by parameters, heads by number."""
    if series == "size":
        return list(table.groupby("size")["params_non_embedding"].mean().sort_values().index)
    return sorted(set(table["heads"]), key=lambda heads: (heads.n_heads is None, heads.n_heads or 0, heads.n_kv_heads))


def _look(value: Heads | str, index: int, count: int) -> style.Look:
    return style.step_look(index, count) if isinstance(value, str) else style.head_look(value)


def _text(value: Heads | str) -> str:
    return value if isinstance(value, str) else style.head_text(value)
