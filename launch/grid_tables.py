"""Tables of finished runs: losses, laws and how they do, the cheapest heads of every question. For a terminal and as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape

from gqa_jax import formatting
from gqa_jax.formatting import size
from gqa_jax.laws import Heads, planning, posterior, validation
from gqa_jax.laws import runs as run_table
from gqa_jax.search import optimum
from gqa_jax.search.candidates import FAR
from launch import columns as columns_of
from launch import studies
from launch.columns import heads_text
from launch.studies import Fitted
from launch.tables import Column, Table

EXPONENTS = (0.0, 10.0)  # beyond which a bound of b is none
E_AT_LEAST = 1e-3  # nats: a bound of E below it is none


def fit_table(one: Fitted) -> pd.DataFrame:
    """`LawsByHeads.to_frame`, after the context and the rules of the runs; with status and warnings."""
    laws, frame = one.laws, one.laws.to_frame()
    frame.insert(0, "context", one.context)
    frame.insert(1, "rules", _rules_of(one))
    frame["status"] = laws.status
    common = list(dict.fromkeys([*laws.warnings, *(w for law in laws.values() for w in law.warnings)]))
    frame["warnings"] = "; ".join(common)
    return frame


def _rules_of(one: Fitted) -> str | None:
    """The rules of the runs, which are those of all; None: of other people's runs."""
    known = one.rows["rules"].dropna() if "rules" in one.rows else ()
    return str(known.iloc[0]) if len(known) else None


def map_table(one: Fitted) -> pd.DataFrame:
    """Every H for every loss and served context: `gqa_jax.search.optimum.optimum_map`; context and rules of the training."""
    frame = optimum.optimum_map(one.laws, one.losses, one.contexts_served, convention=one.convention)
    frame.insert(0, "context", one.context)
    frame.insert(1, "rules", _rules_of(one))
    return frame.sort_values(
        ["context", "loss", "context_served", "rank"], ascending=[True, False, True, True], ignore_index=True
    )


def print_losses(loss: pd.DataFrame, differences: pd.DataFrame, console: Console) -> None:
    """Losses, and how far they are above the best heads of their size where that is known."""
    console.print(losses(loss))
    if len(compared := studies.to_best(loss, differences)):
        console.print()
        console.print(above_best(compared))


def print_laws(one: Fitted, table: pd.DataFrame, console: Console, elsewhere: str) -> None:
    """The laws of one training context, and what is doubtful about them; `elsewhere`: what has columns that do not fit."""
    laws = one.laws
    console.print()
    console.print(laws_of(one, table, elsewhere), "")
    if (said := further_size(one)) is not None:
        console.print(said, highlight=False)
    if laws.design is not None:
        console.print(str(laws.design), highlight=False)
    print_warnings([*laws.warnings, *laws.doubted, *(w for law in one.laws.values() for w in law.warnings)], console)


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    """A line each, and each once."""
    for warning in dict.fromkeys(warnings):
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def laws_of(one: Any, table: pd.DataFrame, elsewhere: str = "--format json") -> Table:
    """Coefficients with their intervals. one: what has `laws` and `context`; table: their `to_frame`."""
    laws = one.laws
    noise = "no degrees of freedom for noise" if not np.isfinite(laws.sigma) else f"a run's noise {laws.sigma:.4f} nats"
    shared = "an E for every H"
    if laws.shared_entropy:
        entropy, *ends = (float(table[name].iloc[0]) for name in ("entropy", "entropy_low", "entropy_high"))
        between = _entropy_between(*ends)
        shared = f"one E for all, {entropy:.4f}{f' ({between})' if between else ''}"
    caption = (
        f"Trained at T = {one.context:,}: L(N; H) = (a / N)^b + E, the loss in nats per token of N parameters without "
        f"embeddings; {shared}; {laws.status}, {noise}; intervals: {posterior.PROFILES}"
    )
    columns = [
        columns_of.HEADS,
        Column("a", lambda row: size(row.a), rank=0),
        Column("95%", lambda row: formatting.sizes(row.a_low, row.a_high), "range", 2, name="95% of a"),
        Column("b", lambda row: f"{row.b:.4f}", rank=0),
        Column("95%", lambda row: formatting.interval(row.b_low, row.b_high, "{:.4f}".format, EXPONENTS, "any exponent"),
               "range", 2, name="95% of b"),
        Column("R²", lambda row: f"{row.r_squared:.5f}", rank=3),
        Column("runs", lambda row: str(row.points), rank=4),
    ]  # fmt: skip
    if not laws.shared_entropy:
        columns[5:5] = [
            Column("E", lambda row: f"{row.entropy:.4f}", rank=1),
            Column("95%", lambda row: _entropy_between(row.entropy_low, row.entropy_high), "range", 5, name="95% of E"),
        ]
    notes = [f"{words_of_heads([Heads(*pair) for pair in laws], laws.head_dim)}; a: parameters, R²: share of the variance "
             "of losses that the law takes up"]  # fmt: skip
    return Table.of(table, columns, f"laws-t{one.context}", caption, notes, elsewhere=elsewhere)


def _entropy_between(low: float, high: float) -> str:
    return formatting.interval(low, high, "{:.3f}".format, (E_AT_LEAST, np.inf))


def checks(one: Fitted) -> tuple[pd.DataFrame | None, list[str]]:
    """How the laws do on runs that they have not seen: `validation.summary` (None: of no runs), and sentences."""
    if one.rows.empty:
        return None, []
    frame, missing = validation.hold_out_all(one.rows)
    said = [f"no held-out check: {why}" for why in dict.fromkeys(text.partition(": ")[2] or text for text in missing)]
    said += validation.not_falling(one.laws)
    return None if frame.empty else validation.summary(frame), said


def print_checks(one: Fitted, console: Console) -> None:
    """`checks` in a terminal."""
    summary, said = checks(one)
    if summary is not None:
        console.print()
        console.print(held_out(summary), "")
    print_warnings(said, console)


def held_out(summary: pd.DataFrame) -> Table:
    """`gqa_jax.laws.validation.summary`."""
    columns = [
        Column("held out", lambda row: row.scheme.replace("_", " "), "left", 0),
        Column("model", lambda row: row.model.replace("_", " "), "left", 0),
        Column("runs", lambda row: f"{row.predicted} of {row.runs}", rank=2),
        Column("mean", lambda row: f"{row.mean_error:+.4f}", rank=1),
        Column("rms", lambda row: f"{row.rms_error:.4f}", rank=0),
        Column("worst", lambda row: f"{row.worst_error:+.4f}", rank=1),
        Column("inside 95%", lambda row: "" if pd.isna(row.covered) else f"{row.covered:.0%}", rank=1),
    ]
    caption = "Held-out runs, which the law of the others predicts: predicted minus measured loss, nats per token"
    return Table.of(summary, columns, "held-out", caption)


def losses(loss: pd.DataFrame, context: int | None = None) -> Table:
    """Losses by heads and size (`by_size`); what ± is, and which rules they are under where a row says."""
    ruled = loss["rules"].dropna().unique() if "rules" in loss else ()
    under = f" under {ruled[0]}" if len(ruled) == 1 else ""

    def text(row: Any) -> str:
        if pd.isna(row.loss):
            return row.status
        return f"{row.loss:.4f}" + ("" if pd.isna(row.loss_sem) else f" ± {row.loss_sem:.4f}")

    def brief(row: Any) -> str:
        return row.status if pd.isna(row.loss) else f"{row.loss:.4f}"

    error = studies.of_documents(loss) or "over documents"
    caption = f"Held-out loss{under}, nats per token (± standard error {error})"
    return by_size(loss, text, brief, "losses", caption, context)


def above_best(compared: pd.DataFrame, context: int | None = None) -> Table:
    """`studies.to_best` by heads and size (`by_size`)."""

    def text(row: Any) -> str:
        error = "" if pd.isna(row.standard_error) else f" ± {row.standard_error:.4f}"
        return "best" if row.cell == row.best else f"{row.difference:+.4f}{error}"

    def brief(row: Any) -> str:
        return "best" if row.cell == row.best else f"{row.difference:+.4f}"

    caption = "Above the best heads of the size, nats per token (± standard error, paired by documents)"
    return by_size(compared, text, brief, "differences", caption, context)


def by_size(
    rows: pd.DataFrame,
    text: Callable[[Any], str],
    brief: Callable[[Any], str],
    name: str,
    caption: str,
    context: int | None = None,
    order: str = studies.COUNT,
) -> Table:
    """A row per training context and heads, a column per size; several runs of both in a cell. Narrow: without middle sizes.

    text, brief: of a run, in its cell; the shorter one where there is little room. context: of all rows, which the caption
    says then instead of a column. order: a column that sizes ascend by.
    """
    sizes = list(dict.fromkeys(rows.sort_values(order)["size"]))
    pivot: dict[tuple, dict[str, list[Any]]] = {}
    for row in rows.itertuples():
        heads = columns_of.heads_of(row)
        place = row.context, heads.n_heads or math.inf, heads.n_kv_heads  # heads that grow with the width last
        pivot.setdefault((place, row.context, *heads), {}).setdefault(row.size, []).append(row)
    frame = pd.DataFrame(
        [(*key[1:], *(runs.get(one, ()) for one in sizes)) for key, runs in sorted(pivot.items())],
        columns=["context", "n_heads", "n_kv_heads", *range(len(sizes))],
        dtype=object,
    )

    def cell(i: int, of: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda row: ", ".join(map(of, row[3 + i]))

    last = len(sizes) - 1
    if context is not None:
        caption = f"Trained at {formatting.context(context)} tokens. {caption}"
    columns = [
        *([columns_of.of("context", "context", "{:,}".format, rank=0)] if context is None else []),
        columns_of.HEADS,
        *(
            Column(str(one), cell(i, text), rank=0 if i in (0, last) else 1 + min(i, last - i), brief=cell(i, brief))
            for i, one in enumerate(sizes)
        ),
    ]
    return Table.of(frame, columns, name, caption, values=rows, elsewhere="tables/*.csv")


def optimum_map(table: pd.DataFrame, convention: str) -> Table:
    """The answer for every loss and served context; `table` is `map_table`."""
    served = sorted(table["context_served"].unique())
    rows = []
    for (context, loss), some in table.groupby(["context", "loss"], sort=False):
        first = {row.context_served: row for row in some[some["rank"] == 1].itertuples()}
        rows.append((context, loss, *(first.get(c) for c in served)))
    frame = pd.DataFrame(rows, columns=["context", "loss", *range(len(served))], dtype=object)
    last = len(served) - 1

    def cell(i: int, sized: bool) -> Callable[[Any], str]:
        return lambda row: "not reached" if row[2 + i] is None else _winner(row[2 + i], sized)

    columns = [
        Column("trained at", lambda row: f"{row.context:,}", rank=0),
        Column("loss", lambda row: f"{row.loss:.3f}", rank=0),
        *(
            Column(f"served {formatting.context(int(c))}", cell(i, True), "left", 0 if i in (0, last) else 1,
                   brief=cell(i, False))
            for i, c in enumerate(served)
        ),
    ]  # fmt: skip
    caption = (
        f"Cheapest heads (query, key/value) by the cost Z in the convention {convention}, the probability that they are, and "
        "their size N*"
    )
    first = table[table["rank"] == 1]
    notes = ["* N* is outside the trained sizes"] if first["note"].notna().any() else []
    if first["probability"].isna().any() and first["probability"].notna().any():
        notes.append(f"without a probability: N* is more than {FAR:g} times outside, a guess")
    return Table.of(frame, columns, "optimum", caption, notes, values=table, elsewhere="tables/optimum.csv")


def _winner(row: Any, sized: bool) -> str:
    sure = "" if np.isnan(row.probability) else f" {formatting.percent(row.probability)}"
    return f"{heads_text(row)}{sure}{f' {size(row.n_params)}' if sized else ''}" + ("" if pd.isna(row.note) else "*")


def words_of_heads(some: Sequence[Heads], head_dim: float) -> str:
    """What (8,1) and (d/d_h,8) stand for, of those kinds that there are."""
    said = []
    if any(one.n_heads is not None for one in some):
        said.append("(a,b): a query heads and b key/value heads at every size")
    rule = f"(d/d_h,b): a query head for every {head_dim:g} of the width d"
    if any(one.n_heads is None for one in some):
        groups = any(one.group is not None for one in some)
        said.append(rule + (", and a key/value head for every one or g of them (n_h/g)" if groups else ""))
    return "; ".join(said)


def further_size(one: Fitted) -> str | None:
    """By how much one more size would narrow the intervals of N* at the middle one of the losses that are asked for.

    None where the noise of a run is not known from runs.
    """
    laws, there = one.laws, one.rows
    if not np.isfinite(laws.sigma) or any(block.known_sigma is not None for block in laws.blocks) or not one.losses:
        return None
    trained = None
    if "tokens" in there and there["tokens"].notna().all() and len(there):
        trained = (run_table.column(there, studies.COUNT), run_table.column(there, "tokens"))
    loss = sorted(one.losses)[len(one.losses) // 2]
    try:
        return planning.sentence(planning.one_more_size(laws, loss, trained=trained), loss)
    except ValueError as error:  # no draw of the laws falls with size
        return f"what one more size would tell is not known: {error}"
