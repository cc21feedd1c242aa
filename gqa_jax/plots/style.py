"""The one style of all pictures: a look for each head configuration, axes, curves and points, files.

No two head configurations share a colour, and nothing is said by colour alone. Key/value heads are the hue, the line style and
the fill of a marker; query heads are how dark the colour is, and the marker. So both survive a black-and-white printer. Rules
such as Llama 3's, whose heads grow with the width, are greys with stars, Llama 3's own black. A broad yellow line or field is
the answer, in every picture.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from gqa_jax.laws import Heads
from gqa_jax.laws.fitting import SharedError
from gqa_jax.laws.posterior import IN_BRIEF

INK = "0.15"  # of text
_CHEAPER = "\u2190 cheaper      "  # of an axis that is turned, too: there it points down
MINUS = "\u2212"  # as the ticks of matplotlib have it
QUIET = "0.45"  # of what explains
LEVEL = 0.95
TEXT, SMALL = 9.0, 8.0  # points

HALO = "#FFE07A"  # of the answer: the heads of least expected regret

# Colours by key/value heads (1, 2, 4, ... 32) and, within, by query heads from as many on to 32. Lightness and hue are such
# that the closest two are as far apart as can be (in OKLab), also for people without red or green cones (Machado et al. 2009).
_HEAD_COLORS = (
    ("#0EB7FE", "#139AED", "#0A73D3", "#1D55C9", "#2E38B2", "#2C008D"),
    ("#EE5F20", "#C14509", "#A33706", "#852B04", "#5A1700"),
    ("#03867B", "#046E6C", "#0B585B", "#00393F"),
    ("#902A9B", "#711794", "#440371"),
    ("#06527D", "#00335C"),
    ("#023C1E",),
)
_RULE_COLORS = ("#A3A3A3", "#8B8B8B", "#6A6A6A", "#000000", "#4A3B30", "#7A6757", "#A8927F")  # of 1, 2, 4, ... key/value heads
_GROUP_COLORS = ("#3F3F2A", "#5B5B3C", "#777750", "#939365", "#ADAD7C", "#C4C495")  # of groups of 1, 2, 4, ...
_MARKERS = ("o", "s", "^", "D", "v", "P")
_OTHER_MARKERS = ("p", "h", "<", ">", "d", "8")  # numbers of heads that are no power of two up to 32
_LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.2, 1.2)), (0, (7, 1.5, 1, 1.5, 1, 1.5)), (0, (2.5, 2.5)))

# Ordered series that are no heads (sizes, contexts), and filled areas, which touch and are told apart by hatches as well.
_STEP_COLORS = ("#3FA796", "#147D92", "#0F5C8C", "#123A6B", "#0B1F3F")
AREAS = (("#DCE6F2", ""), ("#A9C4E4", "//"), ("#F3D7A2", ".."), ("#D9806A", ""), ("#7A7A7A", "xx"), ("#EFEFEF", "\\\\"))

# Ticks of a logarithmic axis within a decade; those that give about five are taken.
_TICKS = (
    (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    np.arange(2, 20) / 2, np.arange(5, 50) / 5, np.arange(10, 100) / 10,
    np.arange(50, 500) / 50, np.arange(100, 1000) / 100,
)  # fmt: skip


class Look(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str
    line: Any  # a line style of matplotlib
    face: str  # fill of the marker
    size: float = 5.0  # of the marker, points


def head_look(heads: Heads) -> Look:
    """The look of a head configuration, the same in every picture."""
    level = np.log2(heads.n_kv_heads if heads.group is None else heads.group)
    size = 5.0
    if heads.n_heads is None:
        colors, marker = (_RULE_COLORS, "*") if heads.group is None else (_GROUP_COLORS, "X")
        color, size = _between(colors, level / (len(colors) - 1)), 8.0
    else:
        color, power = _head_color(np.log2(heads.n_heads), level), int(np.log2(heads.n_heads))
        known = heads.n_heads == 2**power and power < len(_MARKERS)
        marker = _MARKERS[power] if known else _OTHER_MARKERS[heads.n_heads % len(_OTHER_MARKERS)]
    return Look(color, marker, _LINES[min(round(level), len(_LINES) - 1)], mix(color, min(level / 5, 1.0)), size)


def _head_color(level: float, kv_level: float) -> str:
    """The colour of 2^level query and 2^kv_level key/value heads: between those of the table, beyond it darker and greyer."""
    last = len(_HEAD_COLORS) - 1
    below = min(int(kv_level), last)
    rows = (below, min(below + 1, last))
    here, above = (_between(_HEAD_COLORS[row], (level - row) / max(len(_HEAD_COLORS[row]) - 1, 1)) for row in rows)
    color = mix(here, 1 - min(kv_level - below, 1), above)
    color = mix(color, 0.6 ** max(level - last, 0), "#000000")
    return mix(color, 0.75 ** max(kv_level - last, 0), "#808080")


def head_text(heads: Heads) -> str:
    """(8,1), and (d/d_h,8) with its index set as one."""
    return str(heads).replace("d/d_h", "$d/d_h$").replace("n_h/", "$n_h$/")


def step_look(index: int, count: int) -> Look:
    """The look of number `index` of `count` series that have an order: sizes, training contexts."""
    color = _between(_STEP_COLORS, index / max(count - 1, 1))
    return Look(color, _MARKERS[index % len(_MARKERS)], _LINES[index % len(_LINES)], "white" if index % 2 else color)


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a new figure, inches. The figure is not pyplot's: nothing has to be closed."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def new_panels(count: int, width: float = 3.6, height: float = 3.6, **options: Any) -> np.ndarray:
    """A row of axes of a new figure; inches of one of them."""
    return Figure(figsize=(width * count, height), layout="constrained").subplots(1, count, squeeze=False, **options)[0]


def finish(ax: Axes, xlabel: str, ylabel: str, title: str = "", *note: str, cheaper: str = "") -> Axes:
    """Labels, fonts, grid and frame.

    Args:
      note: explains, in small print above the axes, a paragraph each in lines as long as the figure is wide; "" is none.
      cheaper: "x" or "y": that axis is a cost, which is less towards its beginning.
    """
    along_x, along_y = cheaper == "x", cheaper == "y"
    ax.set_xlabel(_CHEAPER * along_x + xlabel, fontsize=TEXT, color=INK, loc="left" if along_x else None)
    ax.set_ylabel(_CHEAPER * along_y + ylabel, fontsize=TEXT, color=INK, loc="bottom" if along_y else None)
    ax.tick_params(labelsize=SMALL, color="0.6", labelcolor=INK, length=3, width=0.7)
    ax.tick_params(which="minor", length=1.8, width=0.5)
    ax.grid(True, which="major", linewidth=0.5, color="0.91")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color="0.6", linewidth=0.7)
    caption(ax, title, *note)
    return ax


def caption(ax: Axes, title: str, *notes: str, columns: int = 1) -> None:
    """Title and notes above axes, as wide as `columns` of the figure's."""
    place = ax.get_subplotspec()
    share = 1.0 if place is None else columns / place.get_gridspec().ncols
    letters = int(share * ax.figure.get_figwidth() * 72 / (0.6 * SMALL)) - 6  # letters are about 0.6 of their size wide
    note = "\n".join(textwrap.fill(paragraph, max(letters, 20)) for paragraph in notes if paragraph)
    if title:
        pad = 8 + 8 * bool(note) + 10 * note.count("\n")
        ax.set_title(title, fontsize=TEXT + 0.5, color=INK, loc="left", pad=pad, wrap=True)
    if note and columns > 1 and not title:  # keeps the room for a note that is left out of the layout
        ax.set_title(" ", fontsize=SMALL, loc="left", pad=4 + 10 * note.count("\n"))
    if note:
        small = ax.annotate(
            note, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL, color=QUIET
        )
        small.set_in_layout(columns == 1)  # one that is wider than its axes would push the others away


def halo(ax: Axes, x: Any, y: Any) -> None:
    """Marks a part of a curve as that of the answer."""
    ax.plot(x, y, color=HALO, linewidth=8, solid_capstyle="round", label="_answer", zorder=1.7)


def curve(ax: Axes, x: Any, y: Any, look: Look, **options: Any) -> None:
    """A fitted curve."""
    ax.plot(x, y, color=look.color, linestyle=look.line, **{"linewidth": 1.3, "label": "_curve"} | options)


def points(ax: Axes, x: Any, y: Any, look: Look, *, error: Any = None, label: str) -> bool:
    """Measured points; `error` is a standard error, drawn as a bar of 95%. Whether there is any bar."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if error is not None:
        half = 1.96 * np.asarray(error, np.float64)  # one that is not known is NaN: no bar
        ax.vlines(x, y - half, y + half, color=look.color, linewidth=1.0, zorder=2.4)
    ax.plot(
        x, y, color=look.color, marker=look.marker, markerfacecolor=look.face, markersize=look.size,
        markeredgewidth=1.0, linestyle="none", label=label, zorder=3,
    )  # fmt: skip
    return error is not None and bool(np.isfinite(half).any())


def band(ax: Axes, x: Any, low: Any, high: Any, look: Look) -> bool:
    """A confidence band; False, and none is drawn, where no end of it is known."""
    known = bool(np.isfinite(low).any())
    if known:
        ax.fill_between(x, low, high, color=look.color, alpha=0.16, linewidth=0, zorder=1.5)
    return known


def law_band(ax: Axes, laws: Any, key: Any, x: np.ndarray, look: Look, *, at: Any = None) -> bool:
    """The band of a law at each x, drawn `at` other places if given; False: a dict of laws, or one without residuals."""
    return hasattr(laws, "band") and band(ax, x if at is None else at, *laws.band(key, x, LEVEL), look)


def standard_errors(laws: Any, key: Any) -> np.ndarray | None:
    """Of the runs that a law was fitted to, in their order, where laws know them; nan: none of their own."""
    for block in getattr(laws, "blocks", ()):
        if key in block.heads:
            return block.runs[block.heads.index(key)].sem
    return None


def rests_on(laws: Any) -> str:
    """What the 95% of laws rest on, to be written after it: by the method of their draws; "" of a plain dict of laws."""
    if hasattr(laws, "method"):
        return f" {IN_BRIEF[laws.method]}"
    return f" {IN_BRIEF['independent']}" if hasattr(laws, "band") else ""


def sure(laws: Any, shared: SharedError | None, *, bars: bool, bands: bool) -> str:
    """What the bars and bands that are drawn are; "" where none is.

    shared: the error that all losses have in common. It moves all points alike and is no bar, but is said; nan: not known.
    """
    text = f"; held-out text: \u00b1 {shared.reach(LEVEL):.3f} for all alike" if shared is not None and shared.sem > 0 else ""
    if not (bars or bands):
        return text.removeprefix("; ") + " (95%)" * bool(text)
    return f"{' and '.join(['bars'] * bars + ['bands'] * bands)}: 95%{rests_on(laws)}{text}"


def log_axis(axis: Axis, unit: float = 1.0, text: Callable[[float], str] | None = None) -> None:
    """A logarithmic axis with ticks at round numbers, few enough to be read. Call it when the limits are known.

    `unit`: what a tick is divided by before it is written, in plain figures or by `text`.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    choices = [*(_round_numbers(low, high, steps) for steps in _TICKS), _round_numbers(low, high, (1,))[::2]]
    ticks = min(reversed(choices), key=lambda ticks: abs(len(ticks) - 5))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(FixedLocator(_round_numbers(low, high, range(1, 10))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: (text or "{:,g}".format)(round(value / unit, 12))))
    axis.set_minor_formatter(NullFormatter())


def power_of_two_axis(axis: Axis, values: Any, text: Callable[[int], str] = str) -> None:
    """A logarithmic axis with a tick at each of `values` (heads, contexts)."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ticks = sorted({int(value) for value in values})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(round(value))))


def save(figure: Figure, path: os.PathLike | str, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Writes `path` in each format (png at 150 dpi, svg, pdf), the same bytes for the same picture; returns the paths.

    Raises ValueError for another format.
    """
    path = Path(path)
    if unknown := set(formats) - set(_METADATA):
        raise ValueError(f"picture format {', '.join(sorted(unknown))} is unknown here: use {', '.join(_METADATA)}")
    stem = path.stem if path.suffix[1:] in _METADATA else path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(f"{stem}.{name}") for name in formats]
    with mpl.rc_context({"svg.hashsalt": "gqa_jax"}):
        for name, target in zip(formats, written, strict=True):
            figure.savefig(target, dpi=150, metadata=_METADATA[name])
    return written


_METADATA: dict[str, dict] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _round_numbers(low: float, high: float, steps: Any) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [float(tick) for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]


def _between(colors: Sequence[str], place: float) -> str:
    """The colour at `place`, 0 to 1, of a row of colours."""
    x = np.clip(place, 0, 1) * (len(colors) - 1)
    rgb_Cx3 = np.array([to_rgb(color) for color in colors])
    return to_hex([np.interp(x, np.arange(len(colors)), channel) for channel in rgb_Cx3.T])


def mix(color: str, share: float, other: str = "#FFFFFF") -> str:
    """`share` of the colour, the rest another."""
    return to_hex(share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(other)))


def luma(color: str) -> float:
    """How light a colour is in black and white, 0 to 1."""
    return float(np.array(to_rgb(color)) @ [0.299, 0.587, 0.114])
