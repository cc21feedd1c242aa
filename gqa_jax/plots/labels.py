"""Which curve is which: names at the ends of curves, which keep out of each other's way, or a legend where curves cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import IdentityTransform

from gqa_jax.laws import Heads
from gqa_jax.plots import style

MOST = 12  # curves that can be named at their ends
_OFFSET = 7.0  # of a name from its curve, points


class End(NamedTuple):
    """What is written where a curve ends, in data coordinates."""

    x: float
    y: float
    text: str
    color: str


def label_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Writes labels right of the ends of curves, moved apart where they would overlap, with a line to those that were moved."""
    group: list[_EndLabel] = []
    for end in ends:
        group.append(label := _EndLabel(group, end))
        ax.add_artist(label)
        label.set_clip_on(False)  # add_artist clips


class _EndLabel(Annotation):
    """A label that finds its place among its group whenever it is drawn: limits and sizes may change until then."""

    def __init__(self, group: list[_EndLabel], end: End):
        color = style.darker(end.color)
        super().__init__(
            end.text, (end.x, end.y), xytext=(_OFFSET, 0), xycoords="data", textcoords="offset points",
            ha="left", va="center", fontsize=style.SMALL, color=color, annotation_clip=False,
            transform=IdentityTransform(),  # until it is drawn; the axes would take offsets for data
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2, "relpos": (0.0, 0.5),
                "patchA": None,  # matplotlib's own pads the text, which leaves nothing of a short line
            },
        )  # fmt: skip
        self._group = group

    def update_positions(self, renderer: Any) -> None:
        point = self.figure.dpi / 72
        places = []
        for label in self._group:
            x, y = label.axes.transData.transform(label.xy)
            width, _, _ = renderer.get_text_width_height_descent(label.get_text(), label.get_fontproperties(), False)
            places.append((x, y, width, label))
        for column in _columns(places, 2 * _OFFSET * point):
            right = max(x for x, *_ in column)
            column.sort(key=lambda place: place[1])
            box = column[0][-1].axes.bbox
            heights = spread([y for _, y, *_ in column], 1.15 * style.SMALL * point, box.y0 + 0.5 * style.SMALL * point, box.y1)
            for (x, y, _, label), height in zip(column, heights, strict=True):
                label.xyann = (_OFFSET + (right - x) / point, (height - y) / point)
                moved = abs(height - y) > 0.4 * style.SMALL * point or right - x > 2 * point
                label.arrow_patch.set_visible(moved)
        super().update_positions(renderer)


def _columns(places: Sequence[tuple], margin: float) -> list[list[tuple]]:
    """Labels (x of the curve's end, y, width, label) in columns: those that would overlap sideways share one."""
    columns: list[list[tuple]] = []
    for place in sorted(places, key=lambda place: place[:2]):
        if not columns or place[0] > max(x for x, *_ in columns[-1]) + max(width for _, _, width, _ in columns[-1]) + margin:
            columns.append([])
        columns[-1].append(place)
    return columns


def heads_legend(
    owner: Axes | Figure, heads: Sequence[Heads], *, lines: bool = True, markers: bool = True, below: bool = False
) -> None:
    """Names curves that cross too often to be named at their ends: beside the axes, or below a figure."""
    handles = []
    for look in map(style.head_look, heads):
        marker = {"marker": look.marker, "markerfacecolor": look.face, "markersize": look.size} if markers else {}
        handles.append(Line2D([], [], color=look.color, linestyle=look.line if lines else "none", linewidth=1.3, **marker))
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "ncols": -(-len(handles) // 13)}
    if below:
        place = {"loc": "outside lower center", "ncols": min(len(handles), 8)}
    legend = owner.legend(
        handles, [style.head_text(each) for each in heads], title="(query, key/value) heads", frameon=False,
        handlelength=3.4 if lines else 1.2, labelcolor=style.INK, fontsize=style.SMALL, title_fontsize=style.SMALL,
        labelspacing=0.7, columnspacing=1.6, **place,
    )  # fmt: skip
    legend.get_title().set_color(style.QUIET)


def spread(heights: Sequence[float], gap: float, low: float = -np.inf, high: float = np.inf) -> list[float]:
    """Ascending heights moved as little as possible (least squares) to be `gap` apart, then into [low, high] if they fit."""
    blocks: list[list[float]] = []  # sum of (height - gap x rank), count: pool adjacent violators
    for rank, height in enumerate(heights):
        blocks.append([height - gap * rank, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    flat = np.array([total / count for total, count in blocks for _ in range(int(count))])
    room = high - gap * (len(heights) - 1)
    if low <= room:
        flat = np.clip(flat, low, room)
    return list(flat + gap * np.arange(len(heights)))
