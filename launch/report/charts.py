"""The explorer's charts as Bokeh models, empty: charts.js fills in rows, numbers and colours.

charts.js finds what it fills by `name`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, LabelSet, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure


def charts() -> dict[str, dict[str, Any]]:
    """What `Bokeh.embed.embed_item` takes, by the name of the chart; the same every time."""
    made = {"curves": _curves(), "regret": _regret(), "probability": _probability()}
    return {name: _with_stable_ids(name, json_item(plot)) for name, plot in made.items()}


def _with_stable_ids(name: str, item: dict[str, Any]) -> dict[str, Any]:
    """Bokeh counts models over a process: here they are counted over the chart."""
    ids: dict[str, str] = {}
    text = re.sub(r'"p\d+"', lambda match: ids.setdefault(match[0], f'"{name}{len(ids)}"'), json.dumps(item))
    return json.loads(text)


def _curves() -> figure:
    """Loss against cost at the context served: every H thin, those that the answer is about on top."""
    plot = _figure(height=380, x_axis_type="log", x_range=Range1d(1, 10), y_axis_label="loss, nats per token")
    plot.xaxis.ticker = FixedTicker(ticks=[])
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0[.]000000")
    lines = _source("lines", "xs", "ys", "color", "width", "dash", "label")
    drawn = plot.multi_line(
        "xs", "ys", source=lines, line_color="color", line_width="width", line_dash="dash", line_cap="round", line_join="round"
    )
    plot.add_layout(Span(location=0, dimension="width", line_dash="dotted", line_width=1.5, name="target"))
    marks = _source("marks", "x", "y", "low", "high", "color", "marker", "label", "align")
    plot.segment("low", "y", "high", "y", source=marks, line_color="color", line_width=7, line_alpha=0.35, line_cap="round")
    plot.scatter("x", "y", source=marks, marker="marker", size=11, fill_color="color", line_color="color")
    look = {"text_color": "color", "text_font_style": "bold", "text_font_size": "13px", "background_fill_alpha": 0.8}
    text = LabelSet(x="x", y="y", text="label", text_align="align", y_offset=9, source=marks, name="mark_labels", **look)
    plot.add_layout(text)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips="heads @label", line_policy="interp"))
    return plot


def _regret() -> figure:
    """What each H costs beyond the cheapest: the mean, and 95% of the draws."""
    plot = _rows()
    source = _source("regret", "y", "x", "low", "high", "color", "marker", "label")
    plot.segment("low", "y", "high", "y", source=source, line_color="color", line_width=3, line_alpha=0.45, line_cap="round")
    dots = plot.scatter("x", "y", source=source, marker="marker", size=9, fill_color="color", line_color="color")
    plot.add_tools(HoverTool(renderers=[dots], tooltips="@label", attachment="above"))
    return plot


def _probability() -> figure:
    """How often each H is the cheapest."""
    plot = _rows()
    plot.x_range.update(start=-0.01, end=1.03)
    plot.xaxis.ticker = FixedTicker(ticks=[0, 0.5, 1])
    source = _source("probability", "y", "right", "color", "label")
    bars = plot.hbar("y", height=0.62, left=0, right="right", source=source, fill_color="color", line_color=None)
    plot.add_tools(HoverTool(renderers=[bars], tooltips="@label", attachment="above"))
    return plot


def _rows() -> figure:
    """A chart with a row per H, the first on top, and shares below."""
    plot = _figure(height=200, x_range=Range1d(0, 1))
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.yaxis.ticker = FixedTicker(ticks=[])
    plot.ygrid.visible = False
    return plot


def _source(name: str, *columns: str) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=name)


def _figure(**options: Any) -> figure:
    """House style: no toolbar, no gestures (a finger that scrolls the page must not move a chart), few lines."""
    plot = figure(
        sizing_mode="stretch_width",
        y_range=Range1d(0, 1),
        toolbar_location=None,
        tools="",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=14,
        lod_threshold=None,
        **options,
    )
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_line_color = None
    plot.axis.major_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    return plot
