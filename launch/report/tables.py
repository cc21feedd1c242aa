"""The tables of a report, from its findings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.laws import Heads, posterior
from gqa_jax.search import ranking, serving_words
from gqa_jax.search.candidates import outside
from gqa_jax.search.roofline import Layout
from gqa_jax.search.words import FLOPS
from launch.report import words
from launch.report.findings import Findings, Study
from launch.tables import Column, Table

_NOTE = (
    "Size: parameters without embeddings; * outside what was trained. Probability: share of the draws in which it is the "
    "cheapest. Costs: how much more than the answer, on average over the draws."
)


def candidates(study: Study) -> Table:
    """Every H for the first question of a study, the answer first, and what savings are against where that was measured."""
    question, goal, head_dim = study.questions[0], study.objective, study.laws.head_dim
    answer, cost = question.answer, words.cost(goal.unit)
    base, best = answer.baseline, answer.expected_regret

    def between(name: str, text: Callable[[float], str]) -> Callable[[Any], str]:
        return lambda row: words.span((getattr(row, f"{name}_low"), getattr(row, f"{name}_high")), text)

    def size(row: Any) -> str:
        return words.short(row.n_params) + ("*" if outside(row.note) else "")

    def possible(text: Callable[[Any], str], otherwise: str = "") -> Callable[[Any], str]:
        """Of costs: a size that can't be served has none."""
        return lambda row: text(row) if math.isfinite(row.cost) else otherwise if math.isfinite(row.n_params) else ""

    def more(row: Any) -> str:
        return "the answer" if row.place == 0 else words.more(ranking.above(row.expected_regret, best))

    labels = [words.label(Heads.of(row.n_heads, row.n_kv_heads), head_dim) for row in answer.candidates.itertuples()]
    frame = answer.candidates.assign(heads=labels, place=range(len(labels))).astype(object)
    if base is not None and base.measured:
        cost_of_it = base.cost if math.isfinite(base.cost) else math.inf
        measured = {"heads": f"{words.label(base.heads, head_dim)}, measured", "cost": cost_of_it}
        measured |= {name: getattr(base, name) for name in ("n_params", "n_layers", "d_model")}
        frame = pd.DataFrame([*frame.to_dict("records"), measured])
    columns = [
        Column("heads", lambda row: row.heads, "left"),
        Column("probability", possible(lambda row: words.percent(row.probability))),
        Column("costs", possible(more)),
        Column("size N*", size),
        Column("95%", between("n_params", words.short), "range"),
        Column(f"layers {words.TIMES} width", lambda row: words.shape(row.n_layers, row.d_model)),
        Column(f"{goal.label}{words.unit(goal.unit)}", possible(lambda row: cost(row.cost), "not served")),
        Column("95%", possible(between("cost", cost)), "range"),
    ]
    notes = [_NOTE]
    if base is not None:
        columns += [
            Column(f"against {base.label}", possible(lambda row: formatting.saving(row.saving))),
            Column("95%", possible(lambda row: formatting.saving_between(row.saving_low, row.saving_high)), "range"),
        ]
        notes.append(
            f"Against {base.label}: {words.baseline(base)}." if math.isfinite(base.cost) else words.sentence(base.note)
        )
    reasons: dict[str, list[str]] = {}
    for row in frame.itertuples():
        if not math.isfinite(row.cost) and isinstance(row.note, str):
            reasons.setdefault(row.note, []).append(row.heads)
    notes += [f"{', '.join(names)}: {words.ended(why)}" for why, names in reasons.items()]
    caption = (
        f"Every head configuration at {formatting.context(question.context_served)} tokens and a loss of {question.loss:g}, "
        f"the answer first."
    )
    if answer.noise_model:
        caption += f" Ranges are {answer.noise_model}."
    name = f"candidates-t{study.laws.context}"
    strong = lambda row: row.place == 0  # noqa: E731
    return Table.of(frame, columns, name, caption, notes, strong=strong, values=answer.candidates)


def serving(study: Study) -> Table | None:
    """How every H is served for the first question of a study; None of costs that are of no device."""
    question, head_dim = study.questions[0], study.laws.head_dim
    described = question.answer.objective.get("serving")
    if not described:
        return None

    def usd(value: float) -> str:
        return "" if words.missing(value) else f"${formatting.three(value)}"

    def limit(seconds: float, name: Any) -> str:
        return "" if words.missing(seconds) else serving_words.LIMITS[name]

    columns = [
        Column("heads", lambda row: words.label(Heads.of(row.n_heads, row.n_kv_heads), head_dim), "left"),
        Column("layout", lambda row: "" if words.missing(row.layout) else Layout.parse(row.layout).describe(), "left"),
        Column("requests at once", lambda row: "" if words.missing(row.batch) else f"{row.batch:,.0f}"),
        Column("memory", lambda row: "" if words.missing(row.memory_bytes) else formatting.gb(row.memory_bytes)),
        Column("first token", lambda row: words.seconds(row.ttft)),
        Column("mostly", lambda row: limit(row.ttft, row.prefill_limit), "left"),
        Column("generated token", lambda row: words.seconds(row.tpot)),
        Column("mostly", lambda row: limit(row.tpot, row.decode_limit), "left"),
        Column("a request", lambda row: words.seconds(row.request_seconds)),
        Column("a million input tokens", lambda row: usd(row.usd_per_million_input)),
        Column("a million output tokens", lambda row: usd(row.usd_per_million_output)),
    ]
    notes = [f"Of the peaks are reached: {words.ended(serving_words.efficiency(described['efficiency']))}"]
    if described["usd_per_hour"] is not None:
        notes.append(f"Price: {described['price']}.")
    if described["n_devices"] > 1:
        columns.append(Column("added by shared key/value heads", lambda row: words.tenths(row.replication)))
        notes.append("Shared key/value heads: what it adds to the cost that several devices hold the same ones.")
    caption = f"How each is served on {described['n_devices']} {described['device']}, at the size of the table above."
    return Table.of(question.answer.candidates, columns, f"serving-t{study.laws.context}", caption, notes)


def buildable(study: Study) -> Table | None:
    """Real models near the first answer of a study; None where nobody could build one."""
    frame, goal = study.questions[0].answer.buildable, study.objective
    if frame is None or not len(frame):
        return None
    cost = words.cost(goal.unit)
    columns = [
        Column("layers", lambda row: f"{row.n_layers:g}"),
        Column("width", lambda row: f"{row.d_model:,g}"),
        Column("heads", lambda row: f"({row.n_heads:g},{row.n_kv_heads:g})"),
        Column("feed-forward", lambda row: f"{row.d_ff:,g}"),
        Column("size N", lambda row: words.short(row.n_params)),
        Column("width / layers", lambda row: f"{row.ratio:.0f}"),
        Column("loss by the law", lambda row: f"{row.loss:.4f}"),
        Column(f"{goal.label}{words.unit(goal.unit)}", lambda row: cost(row.cost)),
    ]
    caption = (
        "Models that can be built near the answer and reach the loss, the cheapest first: whole layers and rounded widths."
    )
    return Table.of(frame, columns, f"buildable-t{study.laws.context}", caption)


def losses(context: int, rows: pd.DataFrame, error: str = "") -> Table:
    """Held-out losses of a training context: a row per H, a column per size. `error`: what standard errors are over."""
    sizes = list(rows.sort_values("params_non_embedding")["size"].drop_duplicates())
    caption = (
        f"Held-out loss after training at {formatting.context(context)} tokens, nats per token, ± its standard error "
        f"{error or 'where it is known'}. Columns are sizes; several losses in a cell are seeds."
    )
    return _by_heads_and_size(rows, sizes, _loss, f"loss-t{context}", caption)


def _loss(run: Any) -> str:
    if run.status != "done" or words.missing(run.loss):
        return str(run.status)
    error = "" if words.missing(getattr(run, "loss_sem", None)) else f" ± {run.loss_sem:.4f}"
    return f"{run.loss:.4f}{error}"


def differences(context: int, compared: pd.DataFrame | None) -> Table | None:
    """Losses above the least of their size (`launch.studies.to_best`): a row per H, a column per size; None of none."""
    rows = compared[compared["context"] == context] if compared is not None and len(compared) else ()
    if not len(rows):
        return None
    sizes = list(rows.sort_values("params_non_embedding")["size"].drop_duplicates())
    caption = (
        f"How far the losses at {formatting.context(context)} tokens are above the least of their size, nats per token, ± the "
        "standard error of that difference, paired by documents: what the held-out text does to all runs alike is not in it."
    )

    def text(run: Any) -> str:
        error = "" if words.missing(run.standard_error) else f" ± {run.standard_error:.4f}"
        return "least" if run.cell == run.best else f"{run.difference:.4f}{error}"

    return _by_heads_and_size(rows, sizes, text, f"difference-t{context}", caption)


def run_costs(findings: Findings) -> Table | None:
    """What the trained models cost at the context of the first question; None where no cost table has it."""
    if findings.cost is None:
        return None
    study, table = findings.studies[0], findings.cost
    context = study.questions[0].context_served
    named = getattr(study.objective, "convention", None)
    name = named if isinstance(named, str) else "figures"
    wanted = (table["context_served"] == context) & (table["convention"] == name) & (table["context"] == study.laws.context)
    rows = table[wanted]
    if rows.empty:
        return None
    sizes = list(rows.groupby("size")["m_infer"].min().sort_values().index)
    rule = costs.named_convention(name)
    caption = (
        f"What the trained models cost to serve at {formatting.context(context)} tokens: memory ({rule.memory}) · compute ("
        f"FLOPs of {FLOPS[rule.flops]}) · Z, counted as {name}. Every context and convention is in tables/cost.csv."
    )
    cell = lambda run: " · ".join(map(words.short, (run.m_infer, run.c_infer, run.z)))  # noqa: E731
    return _by_heads_and_size(rows, sizes, cell, f"cost-t{study.laws.context}-served{context}", caption)


def _by_heads_and_size(rows: pd.DataFrame, sizes: list[str], text: Callable[[Any], str], name: str, caption: str) -> Table:
    """A row per H, a column per size, the texts of all runs of both in a cell."""
    runs: dict[Heads, dict[str, list[str]]] = {}
    for run in rows.itertuples():
        runs.setdefault(Heads.of(run.n_heads, run.n_kv_heads), {}).setdefault(run.size, []).append(text(run))
    frame = pd.DataFrame({"heads": sorted(runs, key=lambda one: (one.n_heads or math.inf, one.n_kv_heads))})
    head_dim = float(next(iter(rows["head_dim"].dropna()), 64))

    def of(size: str) -> Callable[[Any], str]:
        return lambda row: ", ".join(runs[row.heads].get(size, ()))

    columns = [
        Column("heads", lambda row: words.label(row.heads, head_dim), "left"),
        *(Column(str(one), of(one)) for one in sizes),
    ]
    return Table.of(frame, columns, name, caption)


def coefficients(study: Study) -> Table:
    """a, b and E of every H with their intervals."""
    laws = study.laws

    def with_range(name: str, text: Callable[[float], str]) -> Callable[[Any], str]:
        def shown(row: Any) -> str:
            between = words.span((getattr(row, f"{name}_low"), getattr(row, f"{name}_high")), text)
            return text(getattr(row, name)) + (f" ({between})" if between else "")

        return shown

    def r_squared(row: Any) -> str:
        value = laws[Heads.of(row.n_heads, row.n_kv_heads)].r_squared
        return "" if words.missing(value) else f"{value:.5f}"

    columns = [
        Column("heads", lambda row: words.label(Heads.of(row.n_heads, row.n_kv_heads), laws.head_dim), "left"),
        Column("a, parameters", with_range("a", words.short)),
        Column("b", with_range("b", "{:.4f}".format)),
        Column("E, nats per token", with_range("entropy", "{:.3f}".format)),
        Column("R²", r_squared),
        Column("runs", lambda row: str(len(laws[Heads.of(row.n_heads, row.n_kv_heads)].loss))),
    ]
    caption = (
        f"Fitted coefficients of the runs trained at {formatting.context(laws.context)} tokens; the fit ended as {laws.status}."
    )
    if math.isfinite(laws.sigma):
        caption += (
            f" Runs scatter about their laws by {laws.sigma:.4f} nats (standard deviation, {laws.dof} degrees of freedom)."
        )
    notes = [f"Ranges: {posterior.PROFILES}."] if laws.dof > 0 else []
    notes.append("R² says how much of the spread of the losses a law explains, and nothing about E.")
    return Table.of(laws.intervals(), columns, f"laws-t{laws.context}", caption, notes)


def checks(study: Study) -> Table | None:
    """What the laws say of runs that they have not seen."""
    if study.checks is None or not len(study.checks):
        return None
    columns = [
        Column("check", lambda row: row.check, "left"),
        Column("result", lambda row: words.sentence(str(row.result)), "text"),
    ]
    caption = "What the laws say of runs that they were not fitted to."
    return Table.of(study.checks, columns, f"checks-t{study.laws.context}", caption)


def sensitivity(study: Study) -> Table | None:
    """What the first answer of a study would be by other ways of counting."""
    if study.sensitivity is None or not len(study.sensitivity):
        return None
    question = study.questions[0]
    columns = [
        Column("FLOPs of", lambda row: FLOPS.get(row.flops, row.flops), "left"),
        Column("memory", lambda row: row.memory, "left"),
        Column("cheapest heads", lambda row: words.label(Heads.of(row.n_heads, row.n_kv_heads), study.laws.head_dim), "left"),
        Column("cheapest in", lambda row: words.percent(row.probability)),
        Column("size N*", lambda row: words.short(row.n_params)),
        Column("against Llama 3's heads", lambda row: formatting.saving(row.saving)),
        Column("the first row's heads cost", lambda row: "the same" if row.regret == 0 else words.more(row.regret)),
    ]
    caption = (
        f"What the way of counting changes, at {formatting.context(question.context_served)} tokens and a loss of "
        f"{question.loss:g}: the heads of the least Z when FLOPs and memory are counted otherwise."
    )
    return Table.of(study.sensitivity, columns, f"sensitivity-t{study.laws.context}", caption)


def unfinished(findings: Findings) -> Table | None:
    """Cells of the grid without a result."""
    if findings.cells is None or not len(findings.cells):
        return None
    columns = [
        Column("cell", lambda row: row.cell, "left"),
        Column("state", lambda row: row.state, "left"),
        Column("why", lambda row: "" if words.missing(row.cause) else str(row.cause), "text"),
    ]
    those = formatting.counted(len(findings.cells), "cell")
    caption = f"{those} of the grid without a finished run: nothing here rests on them."
    return Table.of(findings.cells, columns, "unfinished", caption)
