"""Which curve is which: legends beside the axes, in the order in which the curves end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gqa_jax.laws import Heads
from gqa_jax.plots import style

_ROWS, _ACROSS = 13, 7  # of a legend beside axes, before it has two columns; of one below, before it has two rows


def heads(shown: Iterable[Heads]) -> str:
    """The title of a legend of heads."""
    rule = "\n$d/d_h$: as many as fill the width" if any(each.n_heads is None for each in shown) else ""
    return f"(query, key/value) heads{rule}"


class Entry(NamedTuple):
    """A series of a legend."""

    text: str
    look: style.Look
    end: float = 0.0  # where its curve ends: the highest is named first


def legend(
    ax: Axes, entries: Sequence[Entry], title: str = "", *, lines: bool = True, markers: bool = True, answer: str = ""
) -> None:
    """Names of series beside the axes, from the top down as their curves end. `answer`: what the yellow marks."""
    order = sorted(entries, key=lambda entry: -entry.end)
    handles, texts = _handles(order, lines, markers, answer)
    legend = ax.legend(
        handles, texts, title=title or None, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=-(-len(handles) // _ROWS),
        handlelength=3.4 if lines else 1.2, labelspacing=0.6, columnspacing=1.4, **_TEXT,
    )  # fmt: skip
    legend.get_title().set_color(style.QUIET)


def legend_below(figure: Figure, entries: Sequence[Entry], title: str, *, answer: str = "") -> None:
    """Names of series that several axes share, below them, in their own order."""
    handles, texts = _handles(entries, True, True, answer)
    rows = -(-len(handles) // _ACROSS)
    legend = figure.legend(
        handles, texts, title=title, loc="outside lower center", ncols=-(-len(handles) // rows), handlelength=3.4,
        labelspacing=0.6, columnspacing=1.6, **_TEXT,
    )  # fmt: skip
    legend.get_title().set_color(style.QUIET)


def areas_legend(ax: Axes, areas: Sequence[Artist]) -> None:
    """Names of filled areas beside the axes, in the order given: from the top down."""
    ax.legend(handles=areas, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.0, handleheight=1.4, **_TEXT)


_TEXT: dict[str, Any] = {
    "frameon": False, "labelcolor": style.INK, "fontsize": style.SMALL, "title_fontsize": style.SMALL, "alignment": "left",
}  # fmt: skip


def _handles(entries: Sequence[Entry], lines: bool, markers: bool, answer: str) -> tuple[list[Artist], list[str]]:
    handles: list[Artist] = []
    for _, look, _ in entries:
        marker = {"marker": look.marker, "markerfacecolor": look.face, "markersize": look.size} if markers else {}
        handles.append(Line2D([], [], color=look.color, linestyle=look.line if lines else "none", linewidth=1.3, **marker))
    texts = [entry.text for entry in entries]
    if answer:
        handles.append(Line2D([], [], color=style.HALO, linewidth=8, solid_capstyle="butt"))
        texts.append(answer)
    return handles, texts
