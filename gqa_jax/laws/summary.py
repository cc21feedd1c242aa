"""Laws by heads in words: a heading, a row per H with its 95% intervals, and what is doubtful about them."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gqa_jax.formatting import short

if TYPE_CHECKING:
    from gqa_jax.laws.by_heads import LawsByHeads


def text(laws: LawsByHeads) -> str:
    """Lines for a terminal."""
    return "\n".join([*_heading(laws), _rows(laws).to_string(index=False), *(f"warning: {said}" for said in _warnings(laws))])


def html(laws: LawsByHeads) -> str:
    """The same for a notebook."""
    said = "<br>".join(map(escape, _heading(laws)))
    warnings = "".join(f"<li>{escape(text)}</li>" for text in _warnings(laws))
    return f"<p>{said}</p>{_rows(laws).to_html(index=False, border=0)}" + (f"<ul>{warnings}</ul>" if warnings else "")


def _heading(laws: LawsByHeads) -> list[str]:
    shared = "one E for all H" if laws.shared_entropy else "an E per H"
    return [
        *([laws.source] if laws.source else []),
        f"L(N; H) = (a / N)^b + E, N parameters without embeddings, {shared}; trained at {laws.context:,} tokens",
        f"{laws.status}; {laws.noise}, the standard deviation of a run about its law; intervals of 95%",
    ]


def _warnings(laws: LawsByHeads) -> list[str]:
    return list(dict.fromkeys([*laws.warnings, *laws.doubted, *(text for law in laws.values() for text in law.warnings)]))


def _rows(laws: LawsByHeads) -> pd.DataFrame:
    """`LawsByHeads.to_frame` as text."""
    names = {"a": ("a", short), "b": ("b", "{:.4f}".format), "E": ("entropy", "{:.3f}".format)}
    shown = []
    for heads, row in zip(laws, laws.to_frame().to_dict("records"), strict=True):
        cells = {"heads": str(heads)}
        for title, (name, text) in names.items():
            value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
            between = f" ({text(low)} to {text(high) if np.isfinite(high) else 'more'})"
            cells[title] = text(value) + ("" if np.isnan(low) else between)
        shown.append(cells | {"R²": f"{row['r_squared']:.5f}", "runs": row["points"]})
    return pd.DataFrame(shown)
