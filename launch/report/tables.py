"""Tables that a report alone has, from its findings; the others are those of the terminal."""

from __future__ import annotations

from typing import Any

from gqa_jax import costs, formatting
from gqa_jax.formatting import seconds, usd
from gqa_jax.search import serving_words
from gqa_jax.search.roofline import Layout
from gqa_jax.search.words import FLOPS
from launch import columns as columns_of
from launch import grid_tables
from launch.report import words
from launch.report.findings import Findings, Study
from launch.tables import Column, Table


def serving(study: Study) -> Table | None:
    """How every H is served for the first question of a study; None of costs that are of no device."""
    answer = study.answer
    described = answer.objective.get("serving")
    if not described:
        return None
    of, limit = columns_of.of, serving_words.LIMITS.get
    columns = [
        columns_of.HEADS,
        of("layout", "layout", lambda text: Layout.parse(text).describe(), "left"),
        of("requests at once", "batch", "{:,.0f}".format),
        of("memory", "memory_bytes", formatting.gb),
        of("first token", "ttft", seconds),
        Column("mostly", lambda row: "" if words.missing(row.ttft) else limit(row.prefill_limit), "left"),
        of("generated token", "tpot", seconds),
        Column("mostly", lambda row: "" if words.missing(row.tpot) else limit(row.decode_limit), "left"),
        of("a request", "request_seconds", seconds),
        of("a million input tokens", "usd_per_million_input", usd),
        of("a million output tokens", "usd_per_million_output", usd),
    ]
    notes = [f"Of the peaks are reached: {words.ended(serving_words.efficiency(described['efficiency']))}"]
    if described["usd_per_hour"] is not None:
        notes.append(f"Price: {described['price']}.")
    if described["n_devices"] > 1:
        columns.append(of("added by shared key/value heads", "replication", "{:.1%}".format))
        notes.append("Shared key/value heads: what it adds to the cost that several devices hold the same ones.")
    caption = f"How each is served on {described['n_devices']} {described['device']}, at the size of the table above."
    return Table.of(answer.candidates, columns, f"serving-t{study.context}", caption, notes)


def run_costs(findings: Findings) -> Table | None:
    """What the trained models cost at the context of the first question; None where no cost table has it."""
    if findings.cost is None:
        return None
    study, table = findings.studies[0], findings.cost
    served = study.answer.context_served
    named = getattr(study.objective, "convention", None)
    name = named if isinstance(named, str) else "figures"
    rows = table[(table["context_served"] == served) & (table["convention"] == name) & (table["context"] == study.context)]
    if rows.empty:
        return None
    rule = costs.named_convention(name)
    caption = (
        f"What the trained models cost to serve at {formatting.context(served)} tokens: memory ({rule.memory}) · compute ("
        f"FLOPs of {FLOPS[rule.flops]}) · Z, counted as {name}. Every context and convention is in tables/cost.csv."
    )

    def cell(run: Any) -> str:
        amounts = ((run.m_infer, rule.memory), (run.c_infer, "FLOPs"), (run.z, ""))
        return " · ".join(formatting.amount(*one) for one in amounts)

    name = f"cost-t{study.context}-served{served}"
    return grid_tables.by_size(rows, cell, cell, name, caption, study.context, order="m_infer")


def unfinished(findings: Findings) -> Table | None:
    """Cells of the grid without a result."""
    if findings.cells is None or not len(findings.cells):
        return None
    columns = [columns_of.of(name, field, side=side) for name, field, side in _UNFINISHED]
    those = formatting.counted(len(findings.cells), "cell")
    caption = f"{those} of the grid without a finished run: nothing here rests on them."
    return Table.of(findings.cells, columns, "unfinished", caption)


_UNFINISHED = (("cell", "cell", "left"), ("state", "state", "left"), ("why", "cause", "text"))
