"""Where an answer comes from, as command lines name it: a grid and the folder it was run in, a table, or the paper's data.

The laws of each training context, and which of them answer, are `gqa_jax.search.study`'s.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from etils import epath

from gqa_jax import results, storage
from gqa_jax.errors import ConfigError
from gqa_jax.laws import runs as run_table
from gqa_jax.search import study
from gqa_jax.search.study import COUNT, Fits, Fitted, fit, reachable
from gqa_jax.training import run_folder
from launch import grid
from launch import rules as ruling
from launch.cells import Layout

__all__ = [
    "COUNT", "Fits", "Fitted", "Source", "beside", "fit", "of_documents", "of_grid", "of_preset", "of_table", "reachable",
    "to_best", "under",
]  # fmt: skip

CONFOUNDED = " --allow_confounded"
DIFFERENCE = ("difference", "standard_error", "n_documents")  # columns of `gqa_jax.differences.load_differences`


@dataclass(frozen=True)
class Source(study.Source):
    """What is asked, and how a command line asks it."""

    argument: str = ""  # how a command line names it: a grid, or --preset NAME
    path: str | None = None  # the grid file, the folder or the table that it was named by
    layout: Layout | None = None  # of a grid
    planned: Sequence[str] = ()  # names of the grid's cells
    rules: str | None = None  # of its cells: launch.rules.OLD or NEW
    asked: bool = False  # for those, of a grid that may have others too

    @property
    def table(self) -> str | None:
        """The file, of runs of any trainer."""
        return self.path if self.layout is None else None

    @property
    def option(self) -> str:
        """What a command line needs beside the grid to be about the same runs."""
        return (f" --rules {self.rules}" if self.asked else "") + CONFOUNDED * self.allow_confounded


def of_preset(name: str) -> Source:
    """The paper's data (`gqa_jax.search.presets`)."""
    return Source(**vars(study.from_preset(name)), argument=f"--preset {name}")


def of_table(
    path: str,
    columns: str | None = None,
    *,
    units: str | None = None,
    context_trained: int | None = None,
    heads_rule: str | None = None,
    allow_confounded: bool = False,
) -> Source:
    """The runs of any trainer: a .csv or .parquet file (`gqa_jax.laws.external.load_table`).

    columns: OURS=THEIRS, separated by commas. Raises ConfigError, as it does.
    """
    pairs = [part.partition("=") for part in (columns or "").split(",") if part.strip()]
    if bad := [ours for ours, equals, theirs in pairs if not (equals and ours.strip() and theirs.strip())]:
        raise ConfigError(f"--columns {columns}: {bad[0]!r} is no pair, give OURS=THEIRS, like n_heads=H,loss=val_loss")
    mapped = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(mapped) < len(pairs):
        raise ConfigError(f"--columns {columns}: a column is named twice, give each once")
    given = f" --columns {shlex.quote(columns)}" if columns else ""
    given += (f" --units {units}" if units else "") + (f" --context_trained {context_trained}" if context_trained else "")
    given += f" --heads_rule {heads_rule}" if heads_rule else ""
    found = study.from_table(
        path, mapped, units=units, context=context_trained, heads_rule=heads_rule, allow_confounded=allow_confounded
    )
    return Source(**vars(found), argument=shlex.quote(path) + given + CONFOUNDED * allow_confounded, path=path)


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
        layout = Layout(storage.path(root or f"runs/{grid.load(path).name}"))
    else:
        if root is not None and root != path:
            raise ConfigError(f"{path} is a folder, and --root {root} another: give one of them")
        layout = Layout(epath.Path(storage.path(path)))
        if not storage.is_remote(layout.root) and not layout.root.exists():
            raise ConfigError(f"{path} is not there: give a grid file (.py), or the folder of a grid that was run")
    try:
        loss = results.load_results(layout.root) if loss is None else loss
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: run the grid first, python -m launch run {shlex.quote(path)}") from error
    found = study.from_folder(layout.root, loss, allow_confounded=allow_confounded)
    rows, which = under(found.loss, rules, layout)
    argument = shlex.quote(path) + (f" --root {shlex.quote(root)}" if root else "") + (f" --rules {rules}" if rules else "")
    facts = results.find_grid(layout.root) or {}
    return Source(
        **vars(found) | {"loss": rows}, argument=argument + CONFOUNDED * allow_confounded, path=path, layout=layout,
        planned=_planned(facts, which, layout), rules=which, asked=rules is not None,
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
      differences: of `gqa_jax.differences.load_differences`, which chooses the best.

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
    both = [*names, *others]
    pairs = zip(both, results.each_usable(run_folder.read_config, layout.root, both), strict=True)
    return [name for name, config in pairs if config and (config == config.under_old_rules()) == (which == ruling.OLD)]
