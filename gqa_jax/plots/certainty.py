"""How sure an answer is: how often each H wins, what it may cost, likelihood profiles, residuals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from gqa_jax import formatting
from gqa_jax.laws import Heads, PowerLaw
from gqa_jax.plots import labels, style, tables
from gqa_jax.search.answer import heads_of


def share_of_draws(candidates: pd.DataFrame, *, least: float = 0.01, title: str = "", ax: Axes | None = None) -> Axes:
    """Probability that each H is the cheapest, with the expected regret of choosing it, most probable on top.

    Args:
      candidates: as `Answer.candidates`: n_heads, n_kv_heads, probability (of 1) and, where it is known, expected_regret.
      least: heads of a smaller probability are put together as "others", unless they have the least expected regret.
    Raises:
      ValueError: no probability is known.
    """
    if "probability" not in candidates or candidates["probability"].isna().all():
        raise ValueError("nothing to draw: column probability is empty; give the candidates of gqa_jax.search.optimum.search")
    frame = candidates.assign(regret=tables.numbers(candidates, "expected_regret"), answer=_is_answer(candidates))
    shown = frame[(frame["probability"] >= least) | frame["answer"]].sort_values("probability", ascending=False, kind="stable")
    rest = frame.drop(shown.index)
    ax = ax or style.new_axes(width=5.6, height=1.1 + 0.27 * (len(shown) + bool(len(rest))))
    names = []
    for i, (_, row) in enumerate(shown.iterrows()):
        look = style.head_look(heads_of(row))
        ax.barh(i, 100 * row["probability"], height=0.66, color=look.color, edgecolor=style.INK, linewidth=0.6)
        regret = "" if np.isnan(row["regret"]) else f"regret {formatting.regret(row['regret'])}"
        _beside(ax, i, row["probability"], look.color, regret)
        names.append(style.head_text(heads_of(row)))
    if len(rest):
        share = float(rest["probability"].sum())
        ax.barh(len(shown), 100 * share, height=0.66, color="0.88", hatch="//", edgecolor=style.INK, linewidth=0.6)
        _beside(ax, len(shown), share, "0.88", "")
        names.append(f"{len(rest)} other{'s' * (len(rest) > 1)}")
    note = f"{_ANSWER}; regret: expected cost above the cheapest" * bool(shown["answer"].any())
    style.finish(ax, "probability of being the cheapest (%)", "", title, note)
    ax.set(xlim=(0, 100))
    _rows(ax, names, shown["answer"].to_numpy())
    return ax


def cost_intervals(
    candidates: pd.DataFrame, *, laws: Any = None, label: str = "cost", title: str = "", ax: Axes | None = None
) -> Axes:
    """Cost of each H with its interval, cheapest on top.

    Intervals of two H may overlap where one is surely cheaper: they share what is not known of E. See `share_of_draws`.

    Args:
      candidates: as `Answer.candidates`: n_heads, n_kv_heads, cost, cost_low, cost_high and, where it is known,
        expected_regret, of which the least is marked.
      laws: whose draws the intervals are of, for what they rest on.
      label: of the axis, with the unit.
    Raises:
      ValueError: no finite cost.
    """
    frame = candidates[np.isfinite(tables.numbers(candidates, "cost"))].sort_values("cost", kind="stable")
    if frame.empty:
        raise ValueError("nothing to draw: column cost holds no finite number: is the loss reached by any heads?")
    cost, low, high = (tables.numbers(frame, name) for name in ("cost", "cost_low", "cost_high"))
    ax = ax or style.new_axes(width=5.6, height=1.2 + 0.24 * len(frame))
    top = np.nanmax(np.where(np.isfinite(high), high, cost))
    for i, (_, row) in enumerate(frame.iterrows()):
        look = style.head_look(heads_of(row))
        ax.plot([low[i], min(high[i], 10 * top)], [i, i], color=look.color, linewidth=1.4)
        style.points(ax, [cost[i]], [i], look, label=style.head_text(heads_of(row)))
    least = np.nanmin(np.where(np.isfinite(low), low, cost))
    ax.set(xlim=(least / 1.05, top * 1.05))
    style.log_axis(ax.xaxis, text=formatting.short)
    answer = _is_answer(frame)
    marked = f"{_ANSWER}: the least expected regret" * bool(answer.any())
    bars = f"bars: 95%{style.rests_on(laws)}; what is not known of E moves all alike" * bool(np.isfinite(low).any())
    style.finish(ax, label, "", title, marked, bars, cheaper="x")
    _rows(ax, [style.head_text(heads_of(row)) for _, row in frame.iterrows()], answer)
    return ax


def profile(
    entropy: np.ndarray,
    statistic: np.ndarray,
    *,
    dof: float = np.inf,
    level: float = 0.95,
    xlabel: str = "entropy of the language, $E$ (nats per token)",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Likelihood profile of E: how much worse the best fit for a given E is, and the interval that it leaves.

    Args:
      entropy, statistic: as `gqa_jax.laws.block.Block.entropy_profile` gives them; the statistic is F(1, dof) at the true E.
      dof: degrees of freedom of the residuals; infinite when their spread is known.
    Raises:
      ValueError: arrays of different or no length.
    """
    entropy, statistic = np.asarray(entropy, np.float64), np.asarray(statistic, np.float64)
    if entropy.shape != statistic.shape or entropy.ndim != 1 or not entropy.size:
        raise ValueError(f"a profile is two arrays of one length; got {entropy.shape} and {statistic.shape}")
    limit = float(stats.f.ppf(level, 1, dof) if np.isfinite(dof) else stats.chi2.ppf(level, 1))
    ax = ax or style.new_axes(height=3.2)
    best = int(np.argmin(statistic))
    below = np.flatnonzero(statistic <= limit)
    low, high = (_crossing(entropy, statistic, limit, edge, step) for edge, step in ((below[0], -1), (below[-1], 1)))
    near = statistic <= 4 * limit
    ax.plot(entropy[near], statistic[near], color=style.INK, linewidth=1.4)
    ax.axhline(limit, color=style.QUIET, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.axvspan(entropy[0] if low is None else low, entropy[-1] if high is None else high, color="0.5", alpha=0.14, linewidth=0)
    ax.plot(entropy[best], statistic[best], marker="o", color=style.INK, markersize=5)
    ends = (
        "any E below the losses" if low is None and high is None
        else f"{high:.2f} or less" if low is None
        else f"{low:.2f} or more" if high is None
        else f"{low:.2f} to {high:.2f}"
    )  # fmt: skip
    top = max(statistic[near].max(), limit)
    ax.set_ylim(-0.05 * top, 1.05 * top)
    ax.annotate(
        f"{100 * level:g}%", (1, limit), (-2, 2), xycoords=ax.get_yaxis_transform(), textcoords="offset points", ha="right",
        fontsize=style.SMALL, color=style.QUIET,
    )  # fmt: skip
    found = f"independent noise; least at {entropy[best]:.2f}; {100 * level:g}%: {ends}"
    return style.finish(ax, xlabel, "rise of the sum of squares / $\\sigma^2$", title, found)


def residuals(laws: Mapping[Heads, PowerLaw], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Measured minus fitted loss of every run against its size, with twice their standard deviation where laws know it."""
    ax = ax or style.new_axes(height=3.4)
    ax.axhline(0, color="0.6", linewidth=0.8)
    sigma = getattr(laws, "sigma", np.nan)
    if np.isfinite(sigma):
        ax.axhspan(-2e3 * sigma, 2e3 * sigma, color="0.5", alpha=0.12, linewidth=0)
    for heads, law in laws.items():
        look = style.head_look(heads)
        style.points(ax, law.params, 1e3 * (law.loss - law.predict(law.params)), look, label=style.head_text(heads))
    style.log_axis(ax.xaxis, text=formatting.short)
    labels.legend(ax, [labels.Entry(style.head_text(h), style.head_look(h)) for h in laws], labels.heads(laws), lines=False)
    note = f"band: 95% of runs, twice their standard deviation of {sigma:.4f} nats" if np.isfinite(sigma) else ""
    return style.finish(
        ax, "parameters without embeddings, $N$", f"measured {style.MINUS} fitted loss\n(0.001 nats per token)", title, note
    )


_ANSWER = "yellow: the answer"


def _is_answer(candidates: pd.DataFrame) -> np.ndarray:
    """Whether a row has the least expected regret; nowhere where it is not known."""
    regret = tables.numbers(candidates, "expected_regret")
    return np.arange(len(regret)) == (np.nanargmin(regret) if np.isfinite(regret).any() else -1)


def _rows(ax: Axes, names: list[str], answer: np.ndarray) -> None:
    """A row of the axes for each name, from the top down; yellow behind that of the answer, whose name is bold."""
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    for i in np.flatnonzero(answer):
        ax.axhspan(i - 0.5, i + 0.5, color=style.HALO, alpha=0.6, linewidth=0, zorder=0, label="_answer")
        ax.get_yticklabels()[i].set_fontweight("bold")


def _beside(ax: Axes, place: float, probability: float, color: str, text: str) -> None:
    """The number at the end of a bar; inside it where there is no room beside it."""
    words = "   ".join(part for part in (formatting.percent_of_draws(probability), text) if part)
    inside = probability > 0.55
    ink = "white" if inside and style.luma(color) < 0.5 else style.INK
    ax.annotate(
        words, (100 * probability, place), (-5 if inside else 5, 0), textcoords="offset points", va="center",
        ha="right" if inside else "left", fontsize=style.SMALL, color=ink,
    )  # fmt: skip


def _crossing(x: np.ndarray, statistic: np.ndarray, limit: float, edge: int, step: int) -> float | None:
    """Where the statistic passes the limit beyond `edge`, linear in its root; None where it never does."""
    if not 0 <= edge + step < len(x):
        return None
    inner, outer = np.sqrt(statistic[edge]), np.sqrt(statistic[edge + step])
    return float(x[edge] + (np.sqrt(limit) - inner) / (outer - inner) * (x[edge + step] - x[edge]))
