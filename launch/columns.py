"""Columns that several tables have, each defined once: of a field of a row, of an interval, and those of every answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from gqa_jax import formatting
from gqa_jax.formatting import amount
from gqa_jax.laws import Heads
from gqa_jax.search import objectives
from gqa_jax.search.serving_words import LIMITS
from gqa_jax.search.words import shape_text
from launch.tables import Column


def of(heading: str, field: str, text: Callable[[Any], str] = str, side: str = "right", rank: int = 1, **more: Any) -> Column:
    """A field of a row as `text` writes it; empty where a row has none. `more`: of `Column`."""

    def shown(row: Any) -> str:
        value = getattr(row, field, None)
        return "" if pd.isna(value) else text(value)

    return Column(heading, shown, side, rank, **more)


def between(field: str, text: Callable[[float, float], str], rank: int, name: str, **more: Any) -> Column:
    """The interval of a field, from its ends FIELD_low and FIELD_high, as `text` writes both."""

    def shown(row: Any) -> str:
        return text(getattr(row, f"{field}_low"), getattr(row, f"{field}_high"))

    return Column("95%", shown, "range", rank, name=f"95% of {name}", **more)


def cost(goal: dict[str, Any], rank: int = 0, none: str = "") -> Column:
    """The cost of `goal` (`Objective.describe`); `none`: of a row that has none."""
    return Column(objectives.class_of(goal["cost"]).heading, lambda row: amount(row.cost, goal["unit"]) or none, rank=rank)


def cost_between(goal: dict[str, Any], rank: int) -> Column:
    """Its interval; empty where no draw changes the cost."""

    def text(low: float, high: float) -> str:
        return "" if low == high else formatting.interval(low, high, lambda one: amount(one, goal["unit"]), anything="any cost")

    return between("cost", text, rank, "the cost")


def heads_of(row: Any) -> Heads:
    """The head configuration of a row with n_heads (empty: d / d_h) and n_kv_heads."""
    return Heads.of(row.n_heads, row.n_kv_heads)


def heads_text(row: Any) -> str:
    """(8,1), (d/d_h,8); empty of a row without heads."""
    return "" if pd.isna(row.n_kv_heads) else str(heads_of(row))


HEADS = Column("heads", heads_text, "left", 0)
SHAPE = Column("L x d", shape_text, rank=1)
RATIO = of("d/L", "ratio", "{:.0f}".format, rank=8)
SIZE = of("N*", "n_params", formatting.size, rank=2)
SIZE_BETWEEN = between("n_params", formatting.sizes, 7, "N*")
PROBABILITY = of("cheapest\n(prob.)", "probability", formatting.probability, rank=2, name="probability")
SAVING = Column("against\nbase", lambda row: formatting.saving(row.saving), rank=3)
AT_ONCE = of("at\nonce", "batch", "{:,.0f}".format, rank=1)
FIRST_TOKEN = of("first\ntoken", "ttft", formatting.seconds, rank=6)
EACH_TOKEN = of("then\na token", "tpot", formatting.seconds, rank=6)
INPUT_PRICE = of("$/M\ninput", "usd_per_million_input", formatting.usd, rank=7)
OUTPUT_PRICE = of("$/M\noutput", "usd_per_million_output", formatting.usd, rank=7)


def _slowest(row: Any) -> str:
    """What the phase that takes most of a request is limited by."""
    generated = row.request_seconds - (0.0 if pd.isna(row.ttft) else row.ttft)
    reads = pd.notna(row.ttft) and row.ttft > generated
    return LIMITS[row.prefill_limit if reads else row.decode_limit]


LIMITED_BY = Column("limited by", _slowest, "left", 8)
