"""Sentences of a report. Numbers are written as everywhere (`gqa_jax.formatting`), but for a few; numbers.js does likewise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from gqa_jax import formatting
from gqa_jax.formatting import counted, seconds, usd
from gqa_jax.laws import Heads
from gqa_jax.search import shape_rule
from gqa_jax.search.roofline import Layout
from gqa_jax.search.serving_words import LIMITS

TIMES = "\u00d7"  # a sign that looks like an x
NAMES = (" sextillion", " quintillion", " quadrillion", " trillion", " billion", " million", " thousand")


def long(value: float) -> str:
    """2.02 billion."""
    return formatting.scaled(value, NAMES, formatting.three)


def percent(share: float) -> str:
    """Shares of draws to a percent, which is what 1,000 draws know: 87%, <1%."""
    return "" if missing(share) else formatting.percent(share)


def share(value: float) -> str:
    """The same within a sentence: more than 99%."""
    return percent(value).replace("<", "fewer than ").replace(">", "more than ")


def more(share: float) -> str:
    """What something costs more: 5.1% more, 2.4 times as much; empty where not known."""
    if missing(share):
        return ""
    if share >= formatting.LARGEST_REGRET:
        return f"over {formatting.LARGEST_REGRET:g} times as much"
    if share >= 1:
        return f"{1 + share:.1f} times as much"
    return "<0.1% more" if share < 5e-4 else f"{100 * share:.1f}% more"


def unit(name: str) -> str:
    """What follows numbers that don't say their unit themselves: ", FLOPs"; empty for the others."""
    return "" if name in ("", "US dollars", "seconds", "bytes") else f", {name}"


def listed(texts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def capital(text: str) -> str:
    """With a capital letter first."""
    return text[:1].upper() + text[1:]


def ended(text: str) -> str:
    """With a full stop last."""
    return text + ("" if text.endswith((".", "!", "?")) else ".")


def sentence(text: str) -> str:
    """With a capital letter first and a full stop last."""
    return capital(ended(text))


def label(one: Heads, head_dim: float = 64) -> str:
    """(8,1); (d/64,8) for Llama-3's rule."""
    return str(one).replace("d/d_h", f"d/{head_dim:g}")


def shape(n_layers: float, d_model: float) -> str:
    """25.3 x 3,242: layers and width, real numbers."""
    return "" if missing(n_layers) or math.isinf(n_layers) else f"{n_layers:.1f} {TIMES} {d_model:,.0f}"


def rule(name: str) -> str:
    """How the ratio of width to layers was chosen (`gqa_jax.search.answer.ShapeChoice.rule`)."""
    return "the cheapest" if name == shape_rule.BEST else shape_rule.WORDS.get(name, "as asked")


def baseline(one: Any) -> str:
    """What savings are against (`gqa_jax.search.answer.Baseline`): a model that was measured, or one of a law."""
    model = f"{one.n_layers:.0f} {TIMES} {one.d_model:,.0f}"
    if one.measured:
        return f"the measured model of {one.label}, {model} (loss {one.loss:.4f})"
    return f"what the law of {one.label} needs, {model}{', shaped as the trained sizes' if one.shape == 'trained' else ''}"


def served(row: Any, serving: dict[str, Any]) -> list[str]:
    """How a model is served, in sentences; of none that can't be.

    row: with the columns `gqa_jax.search.serving.SERVED`; serving: `gqa_jax.search.roofline.RooflineServing.describe()`.
    """
    if missing(row.layout):
        return []
    layout, price = Layout.parse(row.layout).describe(), serving["usd_per_hour"]
    on = f"{serving['n_devices']} {serving['device']}{f' ({layout})' if layout else ''}"
    others = "; prompts are read on others" if serving["disaggregated"] else ""
    said = [f"Served on {on}, {counted(int(row.batch), 'request')} at once{others}."]
    if not missing(row.ttft):
        cost = "" if price is None else f"; a million input tokens cost {usd(row.usd_per_million_input)}"
        said.append(f"The first token comes after {seconds(row.ttft)} (mostly {LIMITS[row.prefill_limit]}){cost}.")
    if not missing(row.tpot):
        cost = "" if price is None else f"; a million output tokens cost {usd(row.usd_per_million_output)}"
        said.append(f"Each generated token takes {seconds(row.tpot)} (a step is mostly {LIMITS[row.decode_limit]}){cost}.")
    return said + closing(serving)


def closing(serving: dict[str, Any]) -> list[str]:
    """What costs of devices rest on, in sentences: how much of the peaks is reached, and what an hour costs."""
    said = [f"Efficiencies: {ended(serving['efficiency']['source'])}"]
    if serving["usd_per_hour"] is not None:
        said.append(f"Price: ${serving['usd_per_hour']:,.2f} an hour and device, {serving['price']}.")
    return said


def missing(value: Any) -> bool:
    """Whether there is no number: None, NaN or an empty cell."""
    return bool(pd.isna(value))
