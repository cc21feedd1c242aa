"""An answer for a terminal: its words (`gqa_jax.search.words`) and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from gqa_jax import formatting
from gqa_jax.search import serving_words
from gqa_jax.search.answer import Answer
from gqa_jax.search.candidates import outside
from gqa_jax.search.words import ASSUMED, FLOPS, baseline_words, headline, ratio_of_runs
from launch import columns as columns_of
from launch import grid_tables
from launch.studies import Fitted
from launch.tables import Column, Table

# Tables


def candidates(answer: Answer, page: bool = False) -> Table:
    """Every head configuration, the answer first, and the baseline last. Narrow: heads and cost stay.

    page: of a report, with columns that no terminal has room for.
    """
    frame = answer.to_frame()
    columns = [
        Column("", lambda row: {"answer": "best", "baseline": "base"}.get(row.role, ""), "left", 0),
        columns_of.HEADS,
        columns_of.SHAPE,
        columns_of.RATIO,
        columns_of.SIZE,
        columns_of.SIZE_BETWEEN,
        columns_of.cost(answer.objective, none="-"),
        columns_of.cost_between(answer.objective, 4),
        columns_of.PROBABILITY,
        columns_of.of("expected\nregret", "expected_regret", formatting.regret, rank=5),
        Column("against\nbase", lambda row: "" if row.role == "baseline" else formatting.saving(row.saving), rank=3),
        *([columns_of.between("saving", formatting.saving_between, 3, "the saving")] if page else []),
        Column("N* against\ntrained sizes", lambda row: outside(row.note), "left", 6),
    ]
    caption = f"Heads for a loss of {answer.loss:.5g} at {answer.context_served:,} tokens of context" + (
        "" if np.isnan(answer.expected_regret) else ", least expected regret first"
    )
    return Table.of(
        frame, columns, "candidates", caption, [*_without(frame), *_legend(answer)],
        strong=lambda row: row.role == "answer", elsewhere="--format json",
    )  # fmt: skip


def _without(frame: pd.DataFrame) -> list[str]:
    """Why rows have no cost, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in frame.itertuples():
        if not np.isfinite(row.cost) and not pd.isna(row.note):
            reasons.setdefault(row.note, []).append("base" if row.role == "baseline" else columns_of.heads_text(row))
    return [f"{', '.join(rows)}: {why}" for why, rows in reasons.items()]


def _legend(answer: Answer) -> list[str]:
    """The words of the table, once."""
    known = [columns_of.heads_of(row) for row in answer.candidates.itertuples()]
    if answer.baseline is not None:
        known.append(answer.baseline.heads)
    found = [f"{grid_tables.words_of_heads(known, answer.head_dim)}; L x d: layers x width"]
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
    columns = [
        columns_of.of("what is chosen", "change", side="left", rank=0),
        columns_of.HEADS,
        columns_of.SHAPE,
        columns_of.SIZE._replace(rank=3),
        columns_of.cost(answer.objective),
        columns_of.PROBABILITY,
        columns_of.SAVING._replace(rank=0),
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
    columns = [
        Column("L x d", lambda row: f"{row.n_layers} x {row.d_model}", rank=0),
        Column("heads", lambda row: f"({row.n_heads},{row.n_kv_heads})", "left", 0),
        columns_of.of("feed-forward", "d_ff", rank=3),
        columns_of.RATIO._replace(rank=4),
        columns_of.SIZE._replace(heading="N"),
        columns_of.of("loss by\nthe law", "loss", "{:.4f}".format),
        columns_of.cost(answer.objective),
    ]
    return Table.of(frame, columns, "buildable", "Models to build that reach the loss", elsewhere="--format json")


def conventions(frame: pd.DataFrame) -> Table:
    """`gqa_jax.search.optimum.convention_sensitivity`."""
    columns = [
        columns_of.of("FLOPs of", "flops", FLOPS.get, "left", 0),
        columns_of.of("memory in", "memory", side="left", rank=0),
        columns_of.HEADS,
        columns_of.SIZE._replace(rank=4),
        columns_of.PROBABILITY._replace(rank=1),
        columns_of.SAVING._replace(rank=2),
        columns_of.of("the first heads\ncost more by", "regret", formatting.regret),
    ]
    caption = "The answer by Z in other conventions, and what the heads of the first cost more there than the answer there"
    return Table.of(frame, columns, "conventions", caption)


def tables(answer: Answer) -> list[Table]:
    """All of an answer, the candidates first."""
    found = [candidates(answer), worth(answer), buildable(answer)]
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
    for table in tables(found):
        console.print(table, "")
    for sentence in serving_words.said(found):
        console.print(escape(sentence), highlight=False)
    grid_tables.print_warnings([warning for warning in found.warnings if warning != one.laws.source], console)


def print_headline(text: str, console: Console) -> None:
    """What is answered stands out from what is assumed."""
    line = Text(text)
    line.stylize("bold", 0, text.index(ASSUMED) if ASSUMED in text else len(text))
    console.print(line, "")
