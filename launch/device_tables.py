"""Answers on several devices side by side, and money against time on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape

from gqa_jax import formatting
from gqa_jax.formatting import amount, probability, seconds, size, usd
from gqa_jax.search import serving_words, words
from gqa_jax.search.devices import Comparison
from gqa_jax.search.roofline import Layout
from gqa_jax.search.serving_words import LIMITS
from gqa_jax.search.words import shape_text
from launch import answers
from launch.grid_tables import heads_text
from launch.tables import Column, Table


def headline(found: Comparison, also: Sequence[str] = ()) -> str:
    """Which device is the cheapest, or the fastest, and the answer on it; `also`: of `words.headline`."""
    first = found.table.iloc[0]
    answer = found.answers[first["device"]]
    most = "fastest" if answer.objective["unit"] == "seconds" else "cheapest"
    cost = amount(answer.cost, answer.objective["unit"])
    where = f"Of {len(found.table)} devices, {first['n_devices']} x {first['device']} is the {most}"
    return f"{where} ({answer.objective['label']} {cost}). {words.headline(answer, also)}"


def on_devices(found: Comparison) -> Table:
    """The answer on each device, cheapest first; those that can't serve it say why below. Narrow: heads and cost stay."""
    goal = next(iter(found.answers.values())).objective
    able = found.table[found.table["cost"].notna()]
    columns = [
        Column("device", lambda row: f"{row.n_devices} x {row.device}", "left", 0),
        Column("heads", heads_text, "left", 0),
        Column("L x d", shape_text, rank=4),
        Column("N*", lambda row: size(row.n_params), rank=3),
        Column(answers.COSTS[goal["cost"]], lambda row: amount(row.cost, goal["unit"]), rank=0),
        Column("95%", lambda row: _between(row, goal["unit"]), "range", 5, name="95% of the cost"),
        Column("cheapest\n(prob.)", lambda row: _optional(row.probability, probability), rank=2, name="probability"),
        Column("$/M\ninput", lambda row: _optional(row.usd_per_million_input, usd), rank=7),
        Column("$/M\noutput", lambda row: _optional(row.usd_per_million_output, usd), rank=7),
        Column("at\nonce", lambda row: f"{row.batch:,.0f}", rank=1),
        Column("first\ntoken", lambda row: _optional(row.ttft, seconds), rank=6),
        Column("then\na token", lambda row: _optional(row.tpot, seconds), rank=6),
        Column("limited by", _slowest, "left", 8),
    ]
    notes = [f"{row.n_devices} x {row.device}: {row.note}" for row in found.table[found.table["cost"].isna()].itertuples()]
    notes.append("cheapest (prob.): of the heads on this device; at once: requests")
    caption = "The answer on each device"
    return Table.of(able, columns, "devices", caption, notes, values=found.table, elsewhere="--format json")


def money_and_time(found: Comparison) -> Table:
    """The ways of serving that are neither dearer nor slower than another, fastest first."""
    columns = [
        Column("a request", lambda row: seconds(row.request_seconds), rank=0),
        Column("$/M\ntokens", lambda row: usd(row.usd_per_million), rank=0),
        Column("device", lambda row: f"{row.n_devices} x {row.device}", "left", 0),
        Column("heads", heads_text, "left", 0),
        Column("at\nonce", lambda row: f"{row.batch:,.0f}", rank=1),
        Column("N*", lambda row: size(row.n_params), rank=2),
        Column("layout", lambda row: Layout.parse(row.layout).describe(), "left", 5),
        Column("first\ntoken", lambda row: _optional(row.ttft, seconds), rank=3),
        Column("then\na token", lambda row: _optional(row.tpot, seconds), rank=3),
        Column("limited by", _slowest, "left", 4),
    ]
    caption = "Money against time: no other way of these is both cheaper and faster (fitted laws, powers of two at once)"
    return Table.of(found.front, columns, "front", caption, elsewhere="--format json")


def tables(found: Comparison) -> list[Table]:
    """Both; without the second where no device has a price."""
    return [on_devices(found), *([money_and_time(found)] if len(found.front) else [])]


def print_comparison(found: Comparison, console: Console, also: Sequence[str] = ()) -> None:
    """The answer, its tables, prices, what costs rest on, warnings; `also`: of `headline`."""
    answers.print_headline(headline(found, also), console)
    for table in tables(found):
        console.print(table, "")
    for row in found.table.to_dict("records"):
        hour = "" if pd.isna(row["usd_per_hour"]) else f"${row['usd_per_hour']:.2f} an hour, "
        console.print(f"{row['device']}: {hour}{escape(row['price'])}", highlight=False)
    if found.vendors is not None:
        answers.print_warnings([found.vendors], console)
    efficiencies = (answer.objective["serving"]["efficiency"] for answer in found.answers.values())
    for source in dict.fromkeys(map(serving_words.efficiency, efficiencies)):
        console.print(f"of the peaks are reached: {escape(source)}", highlight=False)
    by_warning: dict[str, list[str]] = {}
    for name, answer in found.answers.items():
        for warning in answer.warnings:
            by_warning.setdefault(warning, []).append(name)
    everywhere = len(found.answers)
    answers.print_warnings(
        [w if len(names) == everywhere else f"{', '.join(names)}: {w}" for w, names in by_warning.items()], console
    )


def _slowest(row: Any) -> str:
    """What the phase that takes most of a request is limited by."""
    generated = row.request_seconds - (0.0 if pd.isna(row.ttft) else row.ttft)
    reads = pd.notna(row.ttft) and row.ttft > generated
    return LIMITS[row.prefill_limit if reads else row.decode_limit]


def _between(row: Any, unit: str) -> str:
    return formatting.interval(row.cost_low, row.cost_high, lambda value: amount(value, unit), anything="any cost")


def _optional(value: float, text: Callable[[float], str]) -> str:
    return "" if pd.isna(value) else text(value)
