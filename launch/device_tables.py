"""Answers on several devices side by side, and money against time on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.markup import escape

from gqa_jax.formatting import amount, seconds, usd
from gqa_jax.search import serving_words, words
from gqa_jax.search.devices import Comparison
from gqa_jax.search.roofline import Layout
from launch import answers, grid_tables
from launch import columns as columns_of
from launch.tables import Column, Table

_DEVICE = Column("device", lambda row: f"{row.n_devices} x {row.device}", "left", 0)


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
        _DEVICE, columns_of.HEADS, columns_of.SHAPE._replace(rank=4), columns_of.SIZE._replace(rank=3), columns_of.cost(goal),
        columns_of.cost_between(goal, 5), columns_of.PROBABILITY, columns_of.INPUT_PRICE, columns_of.OUTPUT_PRICE,
        columns_of.AT_ONCE, columns_of.FIRST_TOKEN, columns_of.EACH_TOKEN, columns_of.LIMITED_BY,
    ]  # fmt: skip
    notes = [f"{row.n_devices} x {row.device}: {row.note}" for row in found.table[found.table["cost"].isna()].itertuples()]
    notes.append("cheapest (prob.): of the heads on this device; at once: requests")
    caption = "The answer on each device"
    return Table.of(able, columns, "devices", caption, notes, values=found.table, elsewhere="--format json")


def money_and_time(found: Comparison) -> Table:
    """The ways of serving that are neither dearer nor slower than another, fastest first."""
    columns = [
        columns_of.of("a request", "request_seconds", seconds, rank=0),
        columns_of.of("$/M\ntokens", "usd_per_million", usd, rank=0),
        _DEVICE,
        columns_of.HEADS,
        columns_of.AT_ONCE,
        columns_of.SIZE,
        columns_of.of("layout", "layout", lambda text: Layout.parse(text).describe(), "left", 5),
        columns_of.FIRST_TOKEN._replace(rank=3),
        columns_of.EACH_TOKEN._replace(rank=3),
        columns_of.LIMITED_BY._replace(rank=4),
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
        grid_tables.print_warnings([found.vendors], console)
    efficiencies = (answer.objective["serving"]["efficiency"] for answer in found.answers.values())
    for source in dict.fromkeys(map(serving_words.efficiency, efficiencies)):
        console.print(f"of the peaks are reached: {escape(source)}", highlight=False)
    by_warning: dict[str, list[str]] = {}
    for name, answer in found.answers.items():
        for warning in answer.warnings:
            by_warning.setdefault(warning, []).append(name)
    everywhere = len(found.answers)
    grid_tables.print_warnings(
        [w if len(names) == everywhere else f"{', '.join(names)}: {w}" for w, names in by_warning.items()], console
    )
