"""An answer for a terminal: its words (`gqa_jax.search.words`) and its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from gqa_jax import formatting
from gqa_jax.formatting import amount, probability, regret, saving, size
from gqa_jax.laws import Heads, LawsByHeads, PowerLaw
from gqa_jax.search import serving_words
from gqa_jax.search.answer import Answer
from gqa_jax.search.candidates import outside
from gqa_jax.search.words import ASSUMED, FLOPS, baseline_words, headline, ratio_of_runs, shape_text
from launch import grid_tables
from launch.studies import Fitted
from launch.tables import Column, Table

#: Headings of costs (`Objective.name`), whose labels are too long for a table.
COSTS = {
    "z": "Z",
    "flops": "FLOPs",
    "memory": "memory",
    "latency": "a request",
    "throughput": "a token,\na device",
    "price": "a million\ntokens",
    "train": "training\nFLOPs",
    "lifetime": "training\nand serving",
}


# Tables


def candidates(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> Table:
    """Every head configuration, the answer first, and the baseline last. Narrow: heads and cost stay."""
    frame = answer.to_frame()
    cost = _cost_cell(answer)
    columns = [
        Column("", lambda row: {"answer": "best", "baseline": "base"}.get(row.role, ""), "left", 0),
        Column("heads", grid_tables.heads_text, "left", 0),
        Column("L x d", shape_text, rank=1),
        Column("d/L", lambda row: "" if pd.isna(row.ratio) else f"{row.ratio:.0f}", rank=8),
        Column("N*", lambda row: size(row.n_params), rank=2),
        Column("95%", lambda row: formatting.sizes(row.n_params_low, row.n_params_high), "range", 7, name="95% of N*"),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost) or "-", rank=0),
        Column("95%", lambda row: _cost_between(row, cost), "range", 4, name="95% of the cost"),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=2, name="probability"),
        Column("expected\nregret", lambda row: regret(row.expected_regret), rank=5),
        Column("against\nbase", lambda row: "" if row.role == "baseline" else saving(row.saving), rank=3),
        Column("N* against\ntrained sizes", lambda row: outside(row.note), "left", 6),
    ]
    caption = f"Heads for a loss of {answer.loss:.5g} at {answer.context_served:,} tokens of context" + (
        "" if np.isnan(answer.expected_regret) else ", least expected regret first"
    )
    return Table.of(
        frame, columns, "candidates", caption, [*_without(frame), *_legend(answer, laws)],
        strong=lambda row: row.role == "answer", elsewhere="--format json",
    )  # fmt: skip


def _cost_cell(answer: Answer) -> Callable[[float], str]:
    unit = answer.objective["unit"]
    return lambda value: amount(value, unit)


def _cost_between(row: Any, cost: Callable[[float], str]) -> str:
    """Nothing where no draw changes the cost."""
    return "" if row.cost_low == row.cost_high else formatting.interval(row.cost_low, row.cost_high, cost, anything="any cost")


def _known(value: float, text: Callable[[float], str]) -> str:
    return "" if pd.isna(value) else text(value)


def _without(frame: pd.DataFrame) -> list[str]:
    """Why rows have no cost, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in frame.itertuples():
        if not np.isfinite(row.cost) and not pd.isna(row.note):
            reasons.setdefault(row.note, []).append("base" if row.role == "baseline" else grid_tables.heads_text(row))
    return [f"{', '.join(rows)}: {why}" for why, rows in reasons.items()]


def _legend(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> list[str]:
    """The words of the table, once."""
    known = [grid_tables.heads_of(row) for row in answer.candidates.itertuples()]
    if answer.baseline is not None:
        known.append(answer.baseline.heads)
    found = [f"{grid_tables.words_of_heads(known, _head_dim(laws))}; L x d: layers x width"]
    if answer.baseline is not None:
        found.append(f"base: {baseline_words(answer)}")
    found.append("N*: parameters without embeddings that reach the loss by the law of these heads")
    if answer.noise_model:
        words = f"95%: of {answer.noise_model.removeprefix('95% of ')}"
        if not np.isnan(answer.price_of_doubt):
            words += f", {answer.price_of_doubt:.1f} times as wide as for a power law alone"
        if np.isnan(answer.far):
            words += "; probability: the share of these draws in which they are the cheapest"
        found.append(f"{words}; expected regret: what they cost above the cheapest, on average")
    return found


def worth(answer: Answer) -> Table | None:
    """What heads are worth, and what shape is: the answer beside that with the trained shapes. None where shapes are given."""
    other = answer.as_trained
    if other is None:
        return None
    rows: list[dict[str, Any]] = [
        _row("heads and shape", answer),
        _row("heads, in the trained shapes", other),
    ]
    if not np.isnan(value := answer.worth["shape"]):
        rows.append({"change": "shape alone, heads of the base", "cost": answer.baseline.cost * (1 - value), "saving": value})
    frame = pd.DataFrame(rows).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
    if not (np.isnan(answer.far) and np.isnan(other.far)):
        frame["probability"] = np.nan
    cost = _cost_cell(answer)
    columns = [
        Column("what is chosen", lambda row: row.change, "left", 0),
        Column("heads", lambda row: "" if pd.isna(row.n_kv_heads) else grid_tables.heads_text(row), "left", 0),
        Column("L x d", shape_text, rank=1),
        Column("N*", lambda row: size(row.n_params), rank=3),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost), rank=0),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=2, name="probability"),
        Column("against\nbase", lambda row: saving(row.saving), rank=0),
    ]
    shape = answer.shape
    k, best = (formatting.interval(*ends, "{:.2g}".format) for ends in (shape.k_interval, shape.best_interval))
    notes = [
        f"shapes: loss is taken to rise with k ln^2(r / c) of r = d/L, the best c = {shape.best:.0f} ({best}), k = "
        f"{shape.k:.2g} ({k}), from that of the runs, {ratio_of_runs(shape)}: {shape.source}"
    ]
    return Table.of(frame, columns, "worth", "What heads are worth, and what shape is", notes, elsewhere="--format json")


def _row(what: str, answer: Answer) -> dict[str, Any]:
    names = ("n_params", "n_layers", "d_model", "cost", "probability", "saving")
    return {"change": what} | answer.heads._asdict() | {name: getattr(answer, name) for name in names}


def buildable(answer: Answer) -> Table | None:
    """Models of whole layers and even widths that reach the loss; None where there are none."""
    frame = answer.buildable
    if frame is None or frame.empty:
        return None
    cost = _cost_cell(answer)
    columns = [
        Column("L x d", lambda row: f"{row.n_layers} x {row.d_model}", rank=0),
        Column("heads", lambda row: f"({row.n_heads},{row.n_kv_heads})", "left", 0),
        Column("feed-forward", lambda row: f"{row.d_ff}", rank=3),
        Column("d/L", lambda row: f"{row.ratio:.0f}", rank=4),
        Column("N", lambda row: size(row.n_params), rank=2),
        Column("loss by\nthe law", lambda row: f"{row.loss:.4f}", rank=1),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost), rank=0),
    ]
    return Table.of(frame, columns, "buildable", "Models to build that reach the loss", elsewhere="--format json")


def conventions(frame: pd.DataFrame) -> Table:
    """`gqa_jax.search.optimum.convention_sensitivity`."""
    columns = [
        Column("FLOPs of", lambda row: FLOPS[row.flops], "left", 0),
        Column("memory in", lambda row: row.memory, "left", 0),
        Column("heads", grid_tables.heads_text, "left", 0),
        Column("N*", lambda row: size(row.n_params), rank=4),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=1, name="probability"),
        Column("against\nbase", lambda row: saving(row.saving), rank=2),
        Column("the first heads\ncost more by", lambda row: regret(row.regret), rank=1),
    ]
    caption = "The answer by Z in other conventions, and what the heads of the first cost more there than the answer there"
    return Table.of(frame, columns, "conventions", caption)


def tables(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> list[Table]:
    """All of an answer, the candidates first."""
    found = [candidates(answer, laws), worth(answer), buildable(answer)]
    return [one for one in found if one is not None]


# For a terminal


def print_answer(found: Answer, one: Fitted, console: Console, also: Sequence[str] = (), about: Sequence[str] = ()) -> None:
    """One question's answer: in words, its tables, how it is served, warnings.

    also: of `headline`; about: sentences that follow it.
    """
    print_headline(headline(found, also), console)
    for sentence in about:
        console.print(escape(sentence), highlight=False)
    if one.laws.source:
        console.print(escape(one.laws.source), highlight=False)
        console.print()
    for table in tables(found, one.laws):
        console.print(table, "")
    for sentence in serving_words.said(found):
        console.print(escape(sentence), highlight=False)
    print_warnings([warning for warning in found.warnings if warning != one.laws.source], console)


def print_headline(text: str, console: Console) -> None:
    """What is answered stands out from what is assumed."""
    line = Text(text)
    line.stylize("bold", 0, text.index(ASSUMED) if ASSUMED in text else len(text))
    console.print(line, "")


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """A line each."""
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def _head_dim(laws: Mapping[Heads, PowerLaw]) -> float:
    return laws.head_dim if isinstance(laws, LawsByHeads) else 64.0
