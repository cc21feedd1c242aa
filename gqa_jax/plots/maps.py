"""The cost-optimal heads over loss and served context, with their probability: the paper's Table 4 as a map."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from gqa_jax import formatting
from gqa_jax.laws import Heads
from gqa_jax.plots import style
from gqa_jax.search.answer import heads_of

_TINT = (0.04, 0.3)  # how far cells are from white, from impossible to certain, whatever their hue: light enough for dark text
_HATCH = (0.1, 0.1, 0.1, 0.3)
_DOUBT = 0.5  # below it the heads are more likely not the cheapest: hatched


def optimum_map(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """The heads of least expected regret for each loss (rows, easiest on top) and served context (columns).

    Colour: the heads, stronger the more probable it is that they are the cheapest; hatched below one half; a star: N* lies
    outside the sizes that were trained. Heavy lines part regions of different heads. A cell without an answer is left empty
    with a dash.

    Args:
      frame: of `search.optimum.optimum_map`: columns loss, context_served, n_heads, n_kv_heads, rank (1: the answer) and,
        where they are known, probability, n_params, note.
    Raises:
      ValueError: a column is missing, there is no row, or a cell has two answers.
    """
    if missing := [name for name in ("loss", "context_served", "n_heads", "n_kv_heads", "rank") if name not in frame]:
        raise ValueError(f"the map needs columns {', '.join(missing)}: give the frame of gqa_jax.search.optimum.optimum_map")
    if frame.empty:
        raise ValueError("nothing to draw: the map has no row")
    losses = sorted(frame["loss"].unique(), reverse=True)
    contexts = sorted(frame["context_served"].unique())
    best = frame[frame["rank"] == 1]
    if best.duplicated(["loss", "context_served"]).any():
        row = best[best.duplicated(["loss", "context_served"])].iloc[0]
        raise ValueError(
            f"loss {row['loss']:g} at {int(row['context_served'])} has two rows of rank 1: give one objective at a time"
        )
    best = best.set_index(["loss", "context_served"])
    certain = "probability" in best and best["probability"].notna().any()
    ax = ax or style.new_axes(width=max(0.9 + 0.95 * len(contexts), 3.4), height=1.3 + 0.5 * len(losses))
    winners = {}
    for row, loss in enumerate(losses):
        for column, context in enumerate(contexts):
            if (loss, context) in best.index:
                winners[row, column] = _cell(ax, row, column, best.loc[(loss, context)], certain)
            else:
                ax.text(column, row, "\u2013", ha="center", va="center", fontsize=style.TEXT, color=style.QUIET)
    _borders(ax, winners, len(losses), len(contexts))
    ax.set(xlim=(-0.5, len(contexts) - 0.5), ylim=(len(losses) - 0.5, -0.5))
    ax.set_xticks(range(len(contexts)), [formatting.context(int(context)) for context in contexts])
    ax.set_yticks(range(len(losses)), formatting.alike(losses))
    starred = any("note" in best and not pd.isna(note) for note in best.get("note", []))
    sized = "n_params" in best and best["n_params"].notna().any()
    shown = ["$N$"] * bool(sized) + ["probability of being the cheapest (tint; hatched below 50%)"] * bool(certain)
    note = f"(query, key/value) heads of least {'expected regret' if certain else 'cost'}"
    note += f", {' and '.join(shown)}" * bool(shown) + "; * outside the sizes trained" * starred
    note += "; $d/d_h$: as many as fill the width" * any(heads.n_heads is None for heads in winners.values())
    style.finish(ax, "context served (tokens)", "loss to reach\n(nats per token)", title, note)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _cell(ax: Axes, row: int, column: int, answer: pd.Series, certain: bool) -> Heads:
    probability = float(answer["probability"]) if certain and not pd.isna(answer["probability"]) else None
    heads = heads_of(answer)
    own, away = style.head_look(heads).color, np.interp(0.5 if probability is None else probability, (0, 1), _TINT)
    color = style.mix(own, away / max(1 - style.luma(own), _TINT[1]))
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=color, edgecolor="white", linewidth=0.8))
    if probability is not None and probability < _DOUBT:
        ax.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=_HATCH, hatch="////", linewidth=0, zorder=1.2))
    star = "*" if not pd.isna(answer.get("note", pd.NA)) else ""
    halo = {"boxstyle": "round,pad=0.12", "facecolor": color, "edgecolor": "none"}
    small = [formatting.short(answer["n_params"])] if not pd.isna(answer.get("n_params", pd.NA)) else []
    small += [formatting.percent_of_draws(probability)] if probability is not None else []
    inside = {"ha": "center", "va": "center", "color": style.INK, "bbox": halo}
    name, place = style.head_text(heads) + star, row - (0.16 if small else 0)
    ax.text(column, place, name, fontsize=style.TEXT, fontweight="bold", **inside)
    if small:
        ax.text(column, row + 0.22, " · ".join(small), fontsize=style.SMALL - 1, **inside)
    return heads


def _borders(ax: Axes, winners: dict[tuple[int, int], Heads], rows: int, columns: int) -> None:
    """Heavy lines between cells whose heads differ, and around all of them."""
    lines = []
    for row in range(rows + 1):
        for column in range(columns + 1):
            here = winners.get((row, column))
            if column < columns and here != winners.get((row - 1, column)):
                lines.append(((column - 0.5, column + 0.5), (row - 0.5, row - 0.5)))
            if row < rows and here != winners.get((row, column - 1)):
                lines.append(((column - 0.5, column - 0.5), (row - 0.5, row + 0.5)))
    for x, y in lines:
        ax.plot(x, y, color=style.INK, linewidth=1.1, solid_capstyle="round", clip_on=False, zorder=3)
