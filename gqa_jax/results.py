"""Tables of a grid: one row per run in `loss`, one per run, served context and cost convention in `cost`.

    df = gqa_jax.load_results("runs/quickstart")        # or "gs://bucket/grids/paper"

and a long one, `load_evaluations`: the loss of each run by source and position. `gqa_jax.differences` has those between runs.

schema.csv has every column with its tables, type, unit and meaning. One more of what a run's result.json or configuration has
is one more line there. What is not known is an empty cell, never 0. Runs of the first version are in the tables, under their
own rules (`gqa_jax.config.TrainConfig.rules`).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
from etils import epath

from gqa_jax import costs, storage
from gqa_jax.config import OLD_RULES, TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.training import evaluation, records, run_folder

log = logging.getLogger(__name__)

AGAIN = "move its result.json away and run it again: its last checkpoint is evaluated"


class Column(NamedTuple):
    """One column: pandas dtype (nullable ones hold empty cells), unit, meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str
    field: str = ""  # of the run's configuration that it shows; else it is what result.json has of this name, or worked out

    @property
    def kind(self) -> records.Kind:
        """What of a record its cells can be."""
        return {"string": records.text, "Int64": records.integer, "Float64": records.number}[self.dtype]


with (resources.files("gqa_jax") / "schema.csv").open(encoding="utf-8") as _file:
    _SCHEMA = list(csv.DictReader(_file))


def columns_of(table: str) -> tuple[Column, ...]:
    """The columns of a table in their order: loss, cost, evaluations or differences."""
    rows = ([row[field] for field in Column._fields] for row in _SCHEMA if table in row["tables"].split())
    return tuple(Column(*row) for row in rows)


LOSS_COLUMNS, COST_COLUMNS, EVALUATION_COLUMNS = map(columns_of, ("loss", "cost", "evaluations"))


def load_results(path: os.PathLike | str) -> pd.DataFrame:
    """The loss table of a grid folder, local or gs://: one row per run that has a result, columns `LOSS_COLUMNS`.

    Reads the run folders; a folder that holds exported tables only gives those. Of a grid folder the runs are those that its
    grid.json names; a warning tells of others that have finished.

    A run whose result.json or config.json can't be used is left out, and a warning names it.

    Raises:
      FileNotFoundError: neither is there.
      ConfigError: a grid.json that can't be used.
    """
    return _table(path, "loss", LOSS_COLUMNS, _loss_rows)


def load_costs(path: os.PathLike | str, contexts_served: Sequence[int] | None = None) -> pd.DataFrame:
    """The cost table, columns `COST_COLUMNS`, of the runs of a grid folder at `contexts_served` (default: the grid's own)."""

    def rows(root: epath.Path, names: list[str]) -> Iterator[dict[str, Any]]:
        served = grid_facts(root)["contexts_served"] if contexts_served is None else contexts_served
        for name, config in zip(names, each_usable(run_folder.read_config, root, names), strict=True):
            if config is None:
                continue
            about = {"cell": name} | _configured(COST_COLUMNS, config)
            for context, convention in itertools.product(served, costs.CONVENTIONS):
                yield (
                    about
                    | {"context_served": context, "convention": convention}
                    | costs.serving_costs(config.model, context, config.train_tokens, config.context_length, convention)
                )

    return _table(path, "cost", COST_COLUMNS, rows)


def load_evaluations(path: os.PathLike | str) -> pd.DataFrame:
    """The long table of evaluations of a grid folder, local or gs://, columns `EVALUATION_COLUMNS`.

    Of every run that is done, its last evaluation: all held-out text, each source, each range of positions. A run that kept no
    more than its loss, as those of the first version, has that. Folders and errors as in `load_results`.
    """

    def rows(root: epath.Path, names: list[str]) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(found or () for found in each_usable(_evaluation_rows, root, names))

    return _table(path, "evaluations", EVALUATION_COLUMNS, rows)


def load_metrics(path: os.PathLike | str) -> pd.DataFrame:
    """What runs logged while they trained, one row per logged step and evaluation: of a grid folder, or of one run's.

    Columns: cell (name of the run), kind (train or eval), step, time (seconds since the epoch), loss (nats per token: of the
    batch, or held out), and what else the run logs: grad_norm, learning_rate, tokens, tokens_per_second, mfu, seconds_train,
    loss_sem, bits_per_byte; what a row has not is empty. Local or gs://.

    Raises FileNotFoundError where neither a grid nor a run is there.
    """
    from gqa_jax.training.metrics import read_metrics

    root = storage.path(path)
    names = cell_names(root)
    if names is None and not storage.names(root / "metrics"):
        raise FileNotFoundError(f"{root} is no grid folder and no run's: neither cells/ nor metrics/ is in it")
    read = {root.name: read_metrics(root)} if names is None else dict(zip(names, each(read_metrics, root, names), strict=True))
    rows = [{"cell": name} | row for name, rows in read.items() for row in rows]
    first = ["cell", "kind", "step", "time", "loss"]
    table = pd.DataFrame(rows, columns=None if rows else first)
    table = table[first + [name for name in table if name not in first]]
    numbers = [name for name in table if name not in ("cell", "kind")]
    return table.astype({name: "Int64" if name in ("step", "tokens") else "Float64" for name in numbers}).astype(
        {"cell": "string", "kind": "string"}
    )


def grid_facts(path: os.PathLike | str) -> dict[str, Any]:
    """grid.json of a grid folder: name, contexts_served, losses, convention, cells, and old_cells where there are any: runs
    that are done under other rules than those of the grid's cells.

    Raises FileNotFoundError where it is not there, ConfigError where it can't be used.
    """
    if (facts := find_grid(path)) is None:
        raise FileNotFoundError(f"{storage.path(path) / 'grid.json'} is not there")
    return facts


def find_grid(path: os.PathLike | str) -> dict[str, Any] | None:
    """As `grid_facts`, None where it is not there."""
    file = storage.path(path) / "grid.json"
    again = "`python -m launch run` or `export` of the grid writes it again"
    try:
        values = storage.read_json(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; {again}") from error
    if values is None:
        return None
    facts = records.usable(values, fields := records.RECORDS["grid.json"])
    if odd := [name for name in fields if name not in facts and (name in values or name == "cells")]:
        raise ConfigError(f"{file} does not say {', '.join(odd)} of the grid: {again}")
    return facts


def _table(
    path: os.PathLike | str,
    name: str,
    columns: Sequence[Column],
    rows: Callable[[epath.Path, list[str]], Iterable[dict[str, Any]]],
) -> pd.DataFrame:
    """The table of a grid folder, whose `rows` are read from its runs; or the exported one, where there are no run folders."""
    root = storage.path(path)
    names = cell_names(root)
    if names is None:
        return typed(exported(root, name), columns)
    found = [{column.name: column.kind(row.get(column.name)) for column in columns} for row in rows(root, names)]
    return typed(pd.DataFrame(found), columns)


def typed(table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """`table` with exactly `columns`, in order, each of its type; what is missing is empty."""
    columns = list(columns)
    return table.reindex(columns=[c.name for c in columns]).astype({c.name: c.dtype for c in columns})


def each[T](read: Callable[[epath.Path], T], root: epath.Path, names: Iterable[str]) -> list[T]:
    """What `read` gives of the folder of each run."""
    return storage.each(read, [root / "cells" / name for name in names], remote=storage.is_remote(root))


def _configured(columns: Iterable[Column], config: TrainConfig) -> dict[str, Any]:
    """The columns that show a field of the configuration."""
    return {column.name: operator.attrgetter(column.field)(config) for column in columns if column.field}


def each_usable[T](read: Callable[[epath.Path], T], root: epath.Path, names: Iterable[str]) -> list[T | None]:
    """As `each`; None for a run whose records can't be used, and a warning that names it."""

    def found(folder: epath.Path) -> T | ConfigError:
        try:
            return read(folder)
        except ConfigError as error:
            return error

    names = list(names)
    values = each(found, root, names)
    odd = tuple((name, str(error)) for name, error in zip(names, values, strict=True) if isinstance(error, ConfigError))
    if odd:
        _warn_of_odd(os.fspath(root), odd)
    return [None if isinstance(value, ConfigError) else value for value in values]


@functools.lru_cache
def _warn_of_odd(root: str, odd: tuple[tuple[str, str], ...]) -> None:
    """Once for the same runs and what is odd in them: the tables of a grid are read one after another."""
    runs, are, them = ("runs", "are", "them") if len(odd) > 1 else ("run", "is", "it")
    more = f"; and {len(odd) - 3} more" if len(odd) > 3 else ""
    log.warning(
        "%d %s of %s %s left out: %s%s. `python -m launch retry GRID` moves %s aside, and `run` goes on from what was saved",
        len(odd), runs, root, are, "; ".join(f"{name}: {why:.500}" for name, why in odd[:3]), more, them,
    )  # fmt: skip


def cell_names(root: epath.Path) -> list[str] | None:
    """Names of the runs, first those of the grid as it is now; None: there are no run folders.

    Warns of finished runs that grid.json does not name, as when the grid was changed since: they are in no table.
    """
    there = storage.names(root / "cells")
    if (facts := find_grid(root)) is None:
        return there or None
    named = list(dict.fromkeys([*facts["cells"], *facts.get("old_cells", [])]))
    strangers = sorted({*there} - {*named})
    paths = [root / "cells" / name / "result.json" for name in strangers]
    over = storage.each(_is_over, paths, remote=storage.is_remote(root))
    finished = tuple(name for name, yes in zip(strangers, over, strict=True) if yes)
    if finished:
        _warn_of_strangers(os.fspath(root), finished)
    return named


def _is_over(path: epath.Path) -> bool:
    with contextlib.suppress(ConfigError):
        return storage.read_file(path) is not None
    return False


@functools.lru_cache
def _warn_of_strangers(root: str, names: tuple[str, ...]) -> None:
    """Once for the same runs: the tables of a grid are read one after another."""
    runs, are = ("runs", "are") if len(names) > 1 else ("run", "is")
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    log.warning(
        "%d finished %s in %s/cells %s not of grid.json, so not in the tables: %s. If the grid was changed since, all runs are "
        "read once %s/grid.json is moved away",
        len(names), runs, root, are, ", ".join(names[:2]) + more, root,
    )  # fmt: skip


def exported(root: epath.Path, name: str) -> pd.DataFrame:
    """A table that `launch export` has written."""
    content = storage.read_bytes(root / "tables" / f"{name}.parquet")
    if content is None:
        raise FileNotFoundError(f"{root} is no grid folder: neither cells/ nor tables/{name}.parquet is in it")
    table = pd.read_parquet(io.BytesIO(content))
    return _of_first_version(table) if name == "loss" else table


def _of_first_version(table: pd.DataFrame) -> pd.DataFrame:
    """A loss table with the rules of its runs where it was exported before there were others."""
    if "rules" in table or not {"data_fingerprint", "eval_tokens"} <= {*table.columns}:
        return table
    heldout = [
        pd.NA if pd.isna(tokens) else f"{fingerprint[:12]}/{OLD_RULES['evaluation']['windows']}/{tokens}"
        for fingerprint, tokens in zip(table["data_fingerprint"], table["eval_tokens"], strict=True)
    ]
    rules = "/".join(("position", OLD_RULES["evaluation"]["windows"], OLD_RULES["optimizer"]["warmup_from"]))
    return table.assign(heldout=heldout, rules=rules)


def _loss_rows(root: epath.Path, names: list[str]) -> Iterator[dict[str, Any]]:
    return (row for row in each_usable(_loss_row, root, names) if row is not None)


def _loss_row(folder: epath.Path) -> dict[str, Any] | None:
    result = run_folder.find_result(folder / "result.json")
    if result is None:
        return None
    config = run_folder.read_config(folder)
    versions, counted = result.get("versions") or {}, costs.count_params(config.model, "exact")
    tokens = result.get("tokens") or result["step"] * config.batch_tokens
    return (
        result
        | _interval(result)
        | _rules(result, config)
        | _configured(LOSS_COLUMNS, config)
        | {
            "cell": folder.name,
            "continue_from": config.continue_from and PurePosixPath(config.continue_from).name,
            "start_differs": "; ".join((result.get("start") or {}).get("differs", [])) or None,
            "params_non_embedding": result.get("params_non_embedding") or counted.non_embedding,
            "params_total": result.get("params_total") or counted.total,
            "params_paper": costs.count_params(config.model, "paper").total,
            "params_figures": costs.count_params(config.model, "figures").total,
            "unembedding": "untied" if config.model.untied else "tied",
            "steps": result["step"],
            "tokens": tokens,
            "train_flops": costs.train_flops(config.model, config.context_length, tokens, "exact"),
        }
        | {name: versions.get(name) for name in ("jax", "flax")}
    )


def _rules(result: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """What a result says of its rules; one of the first version says nothing, and its documents were held out by position."""
    rules = result.get("rules") or config.rules("position")
    fingerprint = result.get("data_fingerprint")
    return {"rules": rules, "heldout": result.get("heldout") or (fingerprint and config.heldout(fingerprint))}


def _interval(result: dict[str, Any]) -> dict[str, float | None]:
    """The 95% interval of a loss, which results of the first version lack."""
    low, high = result.get("loss_low"), result.get("loss_high")
    sem, documents = result.get("loss_sem"), result.get("eval_documents")
    if low is None and sem is not None and (documents or 0) > 1:
        low, high = evaluation.interval(result["loss"], sem, documents)
    return {"loss_low": low, "loss_high": high}


def _evaluation_rows(folder: epath.Path) -> list[dict[str, Any]]:
    result = run_folder.find_result(folder / "result.json")
    if result is None or result["status"] != "done":
        return []
    path = folder / run_folder.EVALUATIONS
    try:
        kept = storage.read_json(path)
        if kept is not None:
            return [{"cell": folder.name} | {key: row[key] for key in _KEPT} for row in kept["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s can't be read (%s): only the loss of all held-out text is in the table; %s", path, error, AGAIN)
    config = run_folder.read_config(folder)
    about = {"cell": folder.name, "step": result["step"], "task": evaluation.TASK, "source": "", "position": ""}
    about |= {"context": config.context_length, "n": result.get("eval_tokens"), "n_documents": result.get("eval_documents")}
    about["rules"] = _rules(result, config)["rules"]
    values = ("loss", evaluation.NATS, "loss_sem"), ("bits_per_byte", evaluation.BITS, None)
    return [
        about | {"metric": name, "value": result[name], "standard_error": error and result.get(error), "unit": unit}
        for name, unit, error in values
        if result.get(name) is not None
    ]


_KEPT = tuple(column.name for column in EVALUATION_COLUMNS if column.name != "cell")
