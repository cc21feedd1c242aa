"""Where an answer comes from: the finished runs of a grid, or the paper's own data; and the laws of each training context."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from gqa_jax import external, presets, results, storage
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.laws import LawsByHeads, fit_by_heads
from gqa_jax.laws import runs as run_table
from launch import grid
from launch import rules as ruling
from launch.grid import Layout

PAPER_LOSSES = (3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35)  # rows of its Table 4
PAPER_CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072)  # and its columns
COUNT = "params_non_embedding"
CONFOUNDED = " --allow_confounded"
DIFFERENCE = ("difference", "standard_error", "n_documents")  # columns of `gqa_jax.results.load_differences`


@dataclass(frozen=True)
class Source:
    """What is asked: a loss table, and what its grid wants to know."""

    name: str
    loss: pd.DataFrame  # gqa_jax.results.LOSS_COLUMNS
    contexts_served: Sequence[int]
    losses: Sequence[float]  # empty: chosen from what was reached
    convention: str
    argument: str  # how a command line names it: a grid, or --preset NAME
    layout: Layout | None = None  # of a grid
    laws: LawsByHeads | None = None  # of a preset: not fitted here
    planned: Sequence[str] = ()  # names of the grid's cells
    rules: str | None = None  # of its cells: launch.rules.OLD or NEW
    asked: bool = False  # for those, of a grid that may have others too
    table: str | None = None  # the file, of runs of any trainer
    allow_confounded: bool = False  # laws also where heads of a size saw more tokens than others

    @property
    def option(self) -> str:
        """What a command line needs beside the grid to be about the same runs."""
        return (f" --rules {self.rules}" if self.asked else "") + CONFOUNDED * self.allow_confounded


@dataclass(frozen=True)
class Fitted:
    """The laws of one training context, and the questions that are put to them."""

    context: int
    rows: pd.DataFrame  # of the loss table: those that were fitted
    laws: LawsByHeads
    losses: Sequence[float]
    contexts_served: Sequence[int]
    convention: str


@dataclass(frozen=True)
class Fits:
    """Every training context of a source, the one with most runs first; why others have no laws."""

    fitted: list[Fitted]
    unfitted: dict[int, str] = field(default_factory=dict)

    def at(self, context: int | None) -> Fitted:
        """The one of that training context; the one with most runs where none is named. Raises ConfigError."""
        if context is None:
            if not self.fitted:
                why = "; ".join(f"trained at {c}: {reason}" for c, reason in self.unfitted.items())
                raise ConfigError(f"no law can be fitted: {why}")
            return self.fitted[0]
        for one in self.fitted:
            if one.context == context:
                return one
        if context in self.unfitted:
            raise ConfigError(f"--train_context {context}: no law can be fitted: {self.unfitted[context]}")
        known = sorted([one.context for one in self.fitted] + list(self.unfitted))
        raise ConfigError(f"--train_context {context}: no run was trained there; there are {', '.join(map(str, known))}")


def of_preset(name: str) -> Source:
    """The paper's data (`gqa_jax.presets`)."""
    laws = presets.load(name)
    table = results.typed(presets.paper_losses() if name == "paper" else pd.DataFrame(), results.LOSS_COLUMNS)
    return Source(name, table, PAPER_CONTEXTS, PAPER_LOSSES, "figures", f"--preset {name}", laws=laws)


def of_table(
    path: str,
    columns: str | None = None,
    *,
    units: str | None = None,
    context: int | None = None,
    heads_rule: str | None = None,
    allow_confounded: bool = False,
) -> Source:
    """The runs of any trainer: a .csv or .parquet file (`gqa_jax.external.load_table`).

    columns: OURS=THEIRS, separated by commas. Raises ConfigError, as it does.
    """
    pairs = [part.partition("=") for part in (columns or "").split(",") if part.strip()]
    if bad := [ours for ours, equals, theirs in pairs if not (equals and ours.strip() and theirs.strip())]:
        raise ConfigError(f"--columns {columns}: {bad[0]!r} is no pair, give OURS=THEIRS, like n_heads=H,loss=val_loss")
    mapped = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(mapped) < len(pairs):
        raise ConfigError(f"--columns {columns}: a column is named twice, give each once")
    loss = external.load_table(path, mapped, units=units, context=context, heads_rule=heads_rule)
    extra = [name for name in loss.columns if name not in {column.name for column in results.LOSS_COLUMNS}]
    typed = results.typed(loss.assign(**{COUNT: loss[COUNT].round()}), results.LOSS_COLUMNS)
    labels = run_table.size_labels(typed)
    names = pd.Series(run_table.size_names(typed, labels), dtype="string")[labels].to_numpy()
    typed["size"] = typed["size"].fillna(pd.Series(names, typed.index, dtype="string"))
    given = f" --columns {shlex.quote(columns)}" if columns else ""
    given += (f" --units {units}" if units else "") + (f" --context_trained {context}" if context else "")
    given += f" --heads_rule {heads_rule}" if heads_rule else ""
    served = sorted({int(c) for c in loss["context"].dropna().unique()} | set(PAPER_CONTEXTS))
    return Source(
        Path(path).stem, typed.assign(**{name: loss[name] for name in extra}), served, (), "figures",
        shlex.quote(path) + given + CONFOUNDED * allow_confounded, table=path, allow_confounded=allow_confounded,
    )  # fmt: skip


def beside(table: str) -> Layout:
    """Where the report and the tables of a table of runs are written: TABLE-report, beside it."""
    return Layout(storage.path(f"{table.rpartition('.')[0]}-report"))


def of_grid(
    path: str,
    root: str | None = None,
    *,
    rules: str | None = None,
    loss: pd.DataFrame | None = None,
    allow_confounded: bool = False,
) -> Source:
    """The runs of a grid: its file, and the folder it was run in; or that folder itself, local or gs://.

    Args:
      rules: launch.rules.OLD or NEW, of a grid that has runs of both.
      loss: its loss table, where that has been read already.
      allow_confounded: of `fit_by_heads`.

    Raises:
      ConfigError: neither is there, nothing has finished, or nothing under these rules.
      ValueError: without `rules`, runs under several.
    """
    if path.endswith(".py"):
        name = grid.load(path).name
        layout = Layout(storage.path(root or f"runs/{name}"))
    else:
        if root is not None and root != path:
            raise ConfigError(f"{path} is a folder, and --root {root} another: give one of them")
        layout = Layout(epath.Path(storage.path(path)))
        name = Path(str(path).rstrip("/")).name
        if not storage.is_remote(layout.root) and not layout.root.exists():
            raise ConfigError(f"{path} is not there: give a grid file (.py), or the folder of a grid that was run")
    facts = storage.read_json(layout.root / "grid.json") or {}
    try:
        loss = results.load_results(layout.root) if loss is None else loss
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: run the grid first, python -m launch run {shlex.quote(path)}") from error
    if loss.empty:
        raise ConfigError(f"no cell of {facts.get('name', name)} has finished in {layout.root}: run it first")
    loss, which = under(loss, rules, layout)
    argument = shlex.quote(path) + (f" --root {shlex.quote(root)}" if root else "") + (f" --rules {rules}" if rules else "")
    argument += CONFOUNDED * allow_confounded
    served = facts.get("contexts_served") or sorted({int(c) for c in loss["context"].unique()} | set(PAPER_CONTEXTS))
    return Source(
        facts.get("name", name), loss, served, facts.get("losses") or (), facts.get("convention", "figures"), argument, layout,
        planned=_planned(facts, which, layout), rules=which, asked=rules is not None, allow_confounded=allow_confounded,
    )  # fmt: skip


def under(loss: pd.DataFrame, asked: str | None, layout: Layout) -> tuple[pd.DataFrame, str]:
    """The rows of a loss table under the rules asked for, and which these are; without any all, which must be under one.

    Raises ConfigError where no run is under them, ValueError where runs are under several rules and none were asked for.
    """
    old = loss["rules"].eq(ruling.FIRST).fillna(False).astype(bool)
    if asked is not None:
        rows = loss[old if asked == ruling.OLD else ~old]
        if rows.empty:
            there = ", ".join(sorted(loss["rules"].dropna().unique()))
            raise ConfigError(f"--rules {asked}: no run in {layout.root} is under these rules, all are under {there}")
        return rows, asked
    run_table.require_one_rule(loss)  # also between training contexts, whose laws are fitted apart
    return loss, ruling.OLD if old[loss["status"] == "done"].all() else ruling.NEW


def of_documents(loss: pd.DataFrame) -> str:
    """What the standard errors of these losses are over, in words that follow "standard error"; empty: it is not known."""
    if "heldout" not in loss or loss["heldout"].isna().all():
        return ""
    found = [loss[name].dropna().unique() for name in ("heldout", "eval_documents", "heldout_documents")]
    texts, evaluated, there = ([str(value) if i == 0 else f"{value:,}" for value in values] for i, values in enumerate(found))
    if len(texts) > 1 or len(evaluated) != 1 or len(there) > 1:
        return "over documents, the same for runs of the same held-out text"
    return f"over {evaluated[0]}{f' of {there[0]}' if there else ''} documents, common to all runs"


def to_best(loss: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Every run against the best of its size and training context, on the documents of both.

    Args:
      loss: the runs that are asked for.
      differences: of `gqa_jax.results.load_differences`, which chooses the best.

    Returns:
      columns context, size, n_heads, n_kv_heads, head_dim, params_non_embedding, cell, best (name of that run), difference,
      standard_error (empty: not known), n_documents; the last three are empty for the best themselves. Only runs whose
      difference is known.
    """
    fields = ["context", "size", "n_heads", "n_kv_heads", "head_dim", "params_non_embedding", "cell"]
    known = differences[differences["difference"].notna()]
    rows = loss[fields].merge(known[["cell", "other", *DIFFERENCE]].rename(columns={"other": "best"}), on="cell")
    best = loss.loc[loss["cell"].isin(rows["best"]), fields].assign(best=lambda frame: frame["cell"])
    return pd.concat([best, rows], ignore_index=True) if len(rows) else rows


def _planned(facts: dict[str, Any], which: str, layout: Layout) -> list[str]:
    """Names of the cells that grid.json has; those under these rules, where it has others too."""
    names, others = facts.get("cells") or [], facts.get("old_cells")
    if not others:
        return names
    paths = [layout.cell(name) / "config.json" for name in [*names, *others]]
    stored = storage.each(storage.read_json, paths, remote=storage.is_remote(layout.root))
    configs = [values and TrainConfig.from_stored(values) for values in stored]
    pairs = zip([*names, *others], configs, strict=True)
    return [name for name, config in pairs if config and (config == config.under_old_rules()) == (which == ruling.OLD)]


def fit(source: Source, **options: Any) -> Fits:
    """The laws of every training context; H that have too few sizes yet are left out, and said in their warnings.

    options: of `gqa_jax.laws.fit_by_heads`.
    """
    if source.laws is not None:
        if options:
            raise ConfigError(f"the laws of {source.argument} are as they are; {', '.join(options)} is for grids")
        one = Fitted(
            source.laws.context, source.loss, source.laws, list(source.losses), list(source.contexts_served), source.convention
        )
        return Fits([one])
    fitted, unfitted = [], {}
    for context, rows in source.loss.groupby("context"):
        said: list[str] = []
        try:
            usable, _ = run_table.by_rule(run_table.usable(rows)[0])
            chosen, said = run_table.fittable(usable)  # sizes that one H lacks are no reason to know nothing of the others
            if chosen.empty:
                raise ValueError("; ".join(said))
            left_out = usable.index.difference(chosen.index)
            laws = fit_by_heads(rows.drop(left_out), allow_confounded=source.allow_confounded, **options)
        except ValueError as error:
            unfitted[int(context)] = str(error)
            continue
        laws.warnings = (*laws.warnings, *said)
        fitted.append(
            Fitted(int(context), chosen, laws, list(source.losses) or reachable(laws),
                   list(source.contexts_served), source.convention)
        )  # fmt: skip
    fitted.sort(key=lambda one: (-len(one.rows), -one.context))
    return Fits(fitted, unfitted)


def reachable(laws: LawsByHeads) -> list[float]:
    """Three losses that every H reaches inside the sizes it was trained at, where the ranges overlap; else their middle."""
    low = max(law.predict(law.params.max()) for law in laws.values())
    high = min(law.predict(law.params.min()) for law in laws.values())
    if low >= high:
        return [round(float((low + high) / 2), 3)]
    return [round(float(x), 3) for x in np.linspace(high, low, 5)[1:4]]
