"""The parts of the page after the answer and the explorer: their texts, tables and pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import formatting
from gqa_jax.laws import Heads
from gqa_jax.search import candidates
from launch import answers, grid_tables
from launch.report import pictures, tables, words
from launch.report.answer_map import DRAWS
from launch.report.findings import Findings, Study
from launch.report.opening import warnings
from launch.tables import Column, Table

_OUTSIDE = "* N* is outside the sizes that were trained."


class MapCell(NamedTuple):
    """The cheapest heads of a loss and a context, and the share of draws in which they are."""

    text: str
    small: str = ""
    sure: float = 0.0
    ask: str = ""  # address within the page that opens the question in the explorer


class Map(NamedTuple):
    """The cheapest heads: a row per loss, a column per context."""

    name: str
    caption: str
    contexts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[MapCell]]]

    def table(self) -> Table:
        """The same as text."""
        rows = tuple((loss, *(f"{cell.text} {cell.small}".strip() for cell in cells)) for loss, cells in self.rows)
        columns = tuple(Column(heading, str, "left") for heading in ("loss", *self.contexts))
        return Table(self.name, self.caption, columns, rows, (_OUTSIDE,))


class Block(NamedTuple):
    """A piece of a part; `kind` says how the template shows it, and which field has it."""

    kind: str  # text, law, heading, warnings, table, folded, map, pictures, pairs, code, method
    text: str = ""
    lines: Sequence[str] = ()
    table: Table | None = None
    map: Map | None = None
    pictures: Sequence[pictures.Drawn] = ()
    pairs: Sequence[tuple[str, str]] = ()


class Part(NamedTuple):
    """A part of the page."""

    id: str
    title: str
    blocks: Sequence[Block]


def parts(findings: Findings) -> list[Part]:
    """The parts in their order; those that would be empty are left out."""
    made = [
        Part("questions", "Every question", _questions(findings)),
        Part("runs", "What was measured", _runs(findings)),
        Part("laws", "The laws", _laws(findings)),
        Part("costs", "What it costs", _costs(findings)),
        Part("provenance", "Where it comes from", _provenance(findings)),
        Part("method", "How it was computed", [Block("method")]),
    ]
    return [part for part in made if part.blocks]


def tables_of(made: Sequence[Part]) -> list[Table]:
    """Every table of the parts, maps of the cheapest heads included."""
    blocks = [block for part in made for block in part.blocks]
    return [block.map.table() if block.map else block.table for block in blocks if block.map or block.table]


def _questions(findings: Findings) -> list[Block]:
    """Every loss and context that was asked for."""
    blocks = []
    for index, study in enumerate(findings.studies):
        blocks += _heading(findings, study)
        if index > 0:
            blocks += _warnings("Before you rely on it", warnings(findings, study.answer.warnings))
        if study.optimum_map is not None and len(study.optimum_map):
            blocks.append(Block("map", map=_map(study, index)))
        answer = study.answer
        blocks += _pictures(study, "questions") + _table(answers.buildable(answer), f"buildable-t{study.context}")
        every = dataclasses.replace(answers.candidates(answer, page=True), name=f"candidates-t{study.context}")
        blocks.append(Block("folded", "Every head configuration for the first question", table=every))
        if (how := tables.serving(study)) is not None:
            blocks.append(Block("folded", "How each of them is served", table=how))
    return blocks


def _map(study: Study, index: int) -> Map:
    best = study.optimum_map[study.optimum_map["rank"] == 1]
    reached = study.optimum_map[np.isfinite(study.optimum_map["n_params"])].groupby("loss")["context_served"].agg(set)
    contexts = sorted(study.optimum_map["context_served"].unique())
    rows = []
    for loss in sorted(study.optimum_map["loss"].unique(), reverse=True):
        found = {row.context_served: row for row in best[best["loss"] == loss].itertuples()}
        none = ["not served" if context in reached.get(loss, ()) else "not reached" for context in contexts]
        cells = [_map_cell(found.get(context), study, index, text) for context, text in zip(contexts, none, strict=True)]
        rows.append((f"{loss:g}", cells))
    caption = (
        "The cheapest heads for each loss (nats per token, rows) and context served (tokens, columns), with the share of "
        f"{DRAWS:,} draws in which they are, and N*. Kept low: {study.objective.label}."
    )
    return Map(f"optimum-t{study.context}", caption, [formatting.context(int(one)) for one in contexts], rows)


def _map_cell(row: Any, study: Study, index: int, none: str) -> MapCell:
    """Of the cheapest heads; `none`: what is said where there are none."""
    if row is None or words.missing(row.n_params) or math.isinf(row.n_params):
        return MapCell(none)
    heads = Heads.of(row.n_heads, row.n_kv_heads)
    size = formatting.size(row.n_params) + ("*" if isinstance(row.note, str) and row.note else "")
    sizes = study.laws[heads].params
    far = len(sizes) > 0 and candidates.beyond(row.n_params, min(sizes), max(sizes)) > candidates.FAR
    sure = 0.0 if far or words.missing(row.probability) else round(float(row.probability), 3)
    return MapCell(
        words.label(heads, study.laws.head_dim),
        " · ".join(filter(None, ("a guess" if far else words.percent(row.probability), size))),
        sure,
        _ask(row, study, index),
    )


def _ask(row: Any, study: Study, index: int) -> str:
    """Address within the page of the question of a cell, by the cost of the map; empty where the explorer's map ends before."""
    known = study.answer_map
    if not (known.losses[0] <= row.loss <= known.losses[-1] and known.contexts[0] <= row.context_served <= known.contexts[-1]):
        return ""
    goal = next(iter(known.goals.values()))
    device = "" if goal.device is None else f"&device={goal.device}"
    question = f"context={row.context_served:.0f}&loss={row.loss:g}&cost={goal.objective.name}{device}"
    return f"#ask:study={index}&{question}"


def _runs(findings: Findings) -> list[Block]:
    """Losses by size and heads, and cells without one."""
    blocks = []
    if len(findings.loss):
        said = [f"{count:,} {status}" for status, count in findings.loss["status"].value_counts().items()]
        blocks.append(Block("text", f"{formatting.counted(len(findings.loss), 'run')} with a result: {words.listed(said)}."))
        for context, rows in findings.loss.groupby("context"):
            blocks += _table(grid_tables.losses(rows, int(context)), f"loss-t{context}")
            compared = () if findings.differences is None else findings.differences.query("context == @context")
            blocks += _table(
                grid_tables.above_best(compared, int(context)) if len(compared) else None, f"difference-t{context}"
            )
            for study in findings.studies:
                blocks += _pictures(study, "runs") if study.context == context else []
    return blocks + _table(tables.unfinished(findings))


def _laws(findings: Findings) -> list[Block]:
    """The fits, how sure they are, and what speaks against them."""
    blocks = [Block("law")]
    for study in findings.studies:
        blocks += _heading(findings, study)
        if math.isfinite(sigma := study.laws.sigma):
            scatter = (
                f"Runs scatter about their laws by {sigma:.4f} nats (standard deviation, {study.laws.dof} degrees of freedom)."
            )
            blocks.append(Block("text", scatter))
        blocks += _table(grid_tables.laws_of(study, study.laws.to_frame()))
        blocks += _table(None if study.checks is None else grid_tables.held_out(study.checks), f"checks-t{study.context}")
        blocks += _warnings("What the checks say", [words.sentence(one) for one in study.doubts]) + _pictures(study, "laws")
        ended = [] if study.laws.status == "CONVERGED" else [f"the fit ended as {study.laws.status}, not CONVERGED"]
        blocks += _warnings("About these laws", warnings(findings, [*ended, *study.laws.warnings]))
    for context, why in findings.unfitted.items():
        blocks.append(
            Block("text", f"Trained at {formatting.context(context)} tokens: nothing is shown, because {words.ended(why)}")
        )
    return blocks


def _costs(findings: Findings) -> list[Block]:
    """What serving costs, and what the way of counting changes."""
    blocks = []
    for study in findings.studies:
        counted = None if study.sensitivity is None else answers.conventions(study.sensitivity)
        inner = _table(counted, f"sensitivity-t{study.context}") + _pictures(study, "costs")
        blocks += [*_heading(findings, study), *inner] if inner else []
    return blocks + _table(tables.run_costs(findings))


def _provenance(findings: Findings) -> list[Block]:
    """Where the numbers come from."""
    loss = findings.loss

    def values(name: str) -> str:
        counts = loss[name].dropna().astype(str).value_counts() if name in loss else {}
        said = [one if len(counts) == 1 else f"{one} ({formatting.counted(count, 'run')})" for one, count in counts.items()]
        return ", ".join(said)

    def total(name: str, text: Callable[[float], str]) -> str:
        known = loss[name].dropna() if name in loss else []
        return text(float(known.sum())) if len(known) else ""

    held_out = values("heldout")
    if held_out:
        there = values("heldout_documents")
        documents = f"{values('eval_documents') or 'an unknown number of'}{f' of {there}' if there else ''} documents"
        held_out = f"{values('eval_tokens')} tokens of {documents} ({held_out})"
    pairs = [
        ("Runs", f"{len(loss):,}, of {formatting.counted(loss['size'].nunique(), 'size')}" if len(loss) else ""),
        ("Trained by commit", values("commit")),
        ("On", values("device")),
        ("Attention", values("attention")),
        ("jax", values("jax")),
        ("flax", values("flax")),
        ("Data", values("data_fingerprint")),
        ("Rules", values("rules")),
        ("Held-out text", held_out),
        ("Tokens trained on", total("tokens", words.long)),
        ("Compute of training", total("train_flops", lambda value: f"{formatting.amount(value, 'FLOPs')} FLOPs")),
        ("Time in training steps", total("seconds_train", formatting.duration)),
        ("This page was made", findings.made),
        ("With", ", ".join(f"{name} {version}" for name, version in findings.versions.items())),
    ]
    commits = loss["commit"].dropna().unique() if "commit" in loss else []
    doubts = ["The runs were trained by different commits of the code."] if len(commits) > 1 else []
    if any(commit.endswith("+") for commit in commits):
        doubts.append("Files differed from the commits with a +.")
    return [
        Block("pairs", pairs=[(name, text) for name, text in pairs if text]),
        *_warnings("About the code", doubts),
        Block("text", "This page is made again by:"),
        Block("code", findings.command),
    ]


def _heading(findings: Findings, study: Study) -> list[Block]:
    """The training context, where there are several."""
    several = len(findings.studies) > 1
    return [Block("heading", f"Trained at {formatting.context(study.context)} tokens")] if several else []


def _table(table: Table | None, name: str | None = None) -> list[Block]:
    """A table, by the name that its files have; nothing of none, or of one without rows."""
    return [Block("table", table=dataclasses.replace(table, name=name or table.name))] if table and table.rows else []


def _warnings(title: str, lines: Sequence[str]) -> list[Block]:
    return [Block("warnings", title, lines)] if lines else []


def _pictures(study: Study, part: str) -> list[Block]:
    made = [pictures.draw(one, f"t{study.context}-{part}{i}") for i, one in enumerate(study.pictures.get(part, ()))]
    return [Block("pictures", pictures=made)] if made else []
