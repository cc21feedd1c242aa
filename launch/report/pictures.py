"""Pictures of matplotlib as SVG that can stand inside a page beside others."""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import matplotlib as mpl
from markupsafe import Markup, escape

from launch.report.findings import Picture

_ID = re.compile(r'(\bid="|\bxlink:href="#|\bhref="#|url\(#)([^")]+)')
_DATA = re.compile(r' (?:d|x|y|x1|x2|y1|y2|points)="[^"]*"')
_LONG = re.compile(r"(-?\d+\.\d\d)\d+")
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Drawn(NamedTuple):
    """A picture as a page shows it."""

    title: str
    caption: str
    svg: Markup


def draw(picture: Picture, prefix: str) -> Drawn:
    """The picture as an inline <svg> with a name for screen readers; `prefix` keeps its ids apart from those of others."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "gqa_jax", "svg.fonttype": "path"}):
        picture.figure.savefig(buffer, format="svg", metadata=_METADATA, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _ID.sub(lambda match: f"{match[1]}{prefix}-{match[2]}", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # To a hundredth of a point: half as long.
    text = _DATA.sub(lambda match: _LONG.sub(r"\1", match[0].replace("\n", " ")), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    name = escape(f"{picture.title}. {picture.caption}")
    return Drawn(picture.title, picture.caption, Markup(text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)))
