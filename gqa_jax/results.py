"""Tables of a grid: one row per run in `loss`, one per run, served context and cost convention in `cost`.

    df = gqa_jax.load_results("runs/quickstart")        # or "gs://bucket/grids/paper"

and a long one, `load_evaluations`: the loss of each run by source and position. `gqa_jax.differences` has those between runs.

`LOSS_COLUMNS`, `COST_COLUMNS` and `EVALUATION_COLUMNS` are the schema: every column with its type, unit and meaning. One more
of what a run's result.json or configuration has is one more line there. What is not known is an empty cell, never 0. Runs of
the first version are in the tables, under their own rules (`gqa_jax.config.TrainConfig.rules`).
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
from etils import epath

from gqa_jax import costs, storage
from gqa_jax.config import OLD_RULES, TrainConfig
from gqa_jax.training import evaluation, run_folder

log = logging.getLogger(__name__)

AGAIN = "move its result.json away and run it again: its last checkpoint is evaluated"


class Column(NamedTuple):
    """One column: pandas dtype (nullable ones hold empty cells), unit, meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str
    field: str = ""  # of the run's configuration that it shows; else it is what result.json has of this name, or worked out


_MODEL_COLUMNS = (
    Column("cell", "string", "", "name of the run: its folder under cells/"),
    Column("size", "string", "", "name of the size in the grid", "label"),
    Column("n_layers", "Int64", "", "layers L", "model.n_layers"),
    Column("d_model", "Int64", "", "hidden size d", "model.d_model"),
    Column("n_heads", "Int64", "", "query heads n_h", "model.n_heads"),
    Column("n_kv_heads", "Int64", "", "key/value heads n_kv", "model.n_kv_heads"),
    Column("head_dim", "Int64", "", "head size d_h", "model.head_dim"),
)

LOSS_COLUMNS = (
    *_MODEL_COLUMNS,
    Column("d_ff", "Int64", "", "feed-forward width", "model.d_ff"),
    Column("vocab_size", "Int64", "", "vocabulary V of the model, padding included", "model.vocab_size"),
    Column("context", "Int64", "tokens", "context length T of the training", "context_length"),
    Column("continue_from", "string", "", "run or import whose parameters it started from, its folder; empty: from scratch"),
    Column("start_differs", "string", "", "what is other than there: data, RoPE base; empty: nothing, or from scratch"),
    Column("seed", "Int64", "", "seed of initialisation and data order", "seed"),
    Column("status", "string", "", "done, or diverged: the loss was no longer finite"),
    Column("params_non_embedding", "Int64", "", "parameters without embeddings, as trained (N of the fits)"),
    Column("params_total", "Int64", "", "parameters as trained, tied embedding once"),
    Column("params_paper", "Int64", "", "parameters by the paper's tables: two FFN matrices, embedding once, no norms"),
    Column("params_figures", "Int64", "", "parameters by the paper's figures: three FFN matrices, no embedding, no norms"),
    Column("tokens", "Int64", "tokens", "tokens trained on, D; without those of the run it continues"),
    Column("steps", "Int64", "", "optimizer steps done"),
    Column("batch_tokens", "Int64", "tokens", "tokens per step", "batch_tokens"),
    Column("learning_rate", "Float64", "", "maximum learning rate", "optimizer.learning_rate"),
    Column("loss", "Float64", "nats/token", "held-out loss after the last step"),
    Column(
        "loss_sem", "Float64", "nats/token",
        "standard error of loss by the choice of held-out documents: all runs with the same heldout have it in common, so it "
        "says nothing of differences between them (load_differences does)",
    ),
    Column("loss_low", "Float64", "nats/token", "lower end of the 95% interval of loss (Student's t, documents - 1)"),
    Column("loss_high", "Float64", "nats/token", "upper end"),
    Column("bits_per_byte", "Float64", "bits/byte", "held-out loss per byte of the text that the held-out tokens decode to"),
    Column("eval_tokens", "Int64", "tokens", "held-out tokens that loss is a mean of"),
    Column("eval_documents", "Int64", "", "held-out documents that they are of"),
    Column("heldout_documents", "Int64", "", "held-out documents there are"),
    Column("heldout", "string", "", "the text that loss is of: runs with the same have the same held-out tokens"),
    Column(
        "rules", "string", "",
        "how documents were held out, windows of the evaluation, start of the warm-up: what differs in it is not comparable",
    ),
    Column("train_flops", "Float64", "FLOP", "6 D N + 6 D T L d_h n_h, exact convention"),
    Column("tokens_per_second", "Float64", "tokens/s", "while training, all devices"),
    Column("mfu", "Float64", "", "model FLOPs utilisation, where the device's peak is known"),
    Column("seconds_train", "Float64", "s", "in training steps, all attempts"),
    Column("seconds_total", "Float64", "s", "of the last attempt, set-up included"),
    Column("peak_memory_bytes", "Int64", "bytes", "largest resident memory of the process on the host"),
    Column("attention", "string", "", "attention implementation that ran"),
    Column("device", "string", "", "kind of device"),
    Column("n_devices", "Int64", "", "devices used"),
    Column("attempts", "Int64", "", "times the run was started"),
    Column("jax", "string", "", "version of jax"),
    Column("flax", "string", "", "version of flax"),
    Column("commit", "string", "", "commit of this code; + when files differed from it"),
    Column("data_fingerprint", "string", "", "hash of the token store's content"),
    Column("params_sha256", "string", "", "hash of the final parameters"),
)  # fmt: skip

COST_COLUMNS = (
    *_MODEL_COLUMNS,
    Column("context", "Int64", "tokens", "context length T of the training", "context_length"),
    Column("context_served", "Int64", "tokens", "context length that the costs are for"),
    Column("convention", "string", "", "what is counted: a name of gqa_jax.costs.CONVENTIONS"),
    Column("c_infer", "Float64", "FLOP", "inference compute, per token or per sequence as the convention says"),
    Column("m_infer", "Float64", "values or bytes", "inference memory at batch 1: parameters and cache"),
    Column("z", "Float64", "", "0.9 m_infer^(1/2) + 0.1 c_infer^(1/3) (Eq. 5)"),
    Column("c_train", "Float64", "FLOP", "compute of the training run"),
    Column("m_train", "Float64", "values or bytes", "training memory of one sequence"),
)

EVALUATION_COLUMNS = (
    Column("cell", "string", "", "name of the run: its folder under cells/"),
    Column("step", "Int64", "", "optimizer steps done"),
    Column("task", "string", "", "what was evaluated: held-out, the text held out of the training"),
    Column("source", "string", "", "where that text comes from; empty: all of it"),
    Column("context", "Int64", "tokens", "length of the windows, T"),
    Column("position", "string", "", "how many targets came before in the window, as 0, 1, 2-3, 4-7; empty: any"),
    Column("metric", "string", "", "loss or bits_per_byte"),
    Column("value", "Float64", "as unit says", "the mean"),
    Column("standard_error", "Float64", "as unit says", "of value, clustered by document; see loss_sem of the loss table"),
    Column("n", "Int64", "tokens", "targets that value is a mean of"),
    Column("n_documents", "Int64", "", "documents that they are of"),
    Column("unit", "string", "", "nats/token or bits/byte"),
    Column("rules", "string", "", "as in the loss table"),
)


def load_results(path: os.PathLike | str) -> pd.DataFrame:
    """The loss table of a grid folder, local or gs://: one row per run that has a result, columns `LOSS_COLUMNS`.

    Reads the run folders; a folder that holds exported tables only gives those. Of a grid folder the runs are those that its
    grid.json names; a warning tells of others that have finished.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: a result.json or config.json that can't be read, naming it.
    """
    return _table(path, "loss", LOSS_COLUMNS, _loss_rows)


def load_costs(path: os.PathLike | str, contexts_served: Sequence[int] | None = None) -> pd.DataFrame:
    """The cost table, columns `COST_COLUMNS`, of the runs of a grid folder at `contexts_served` (default: the grid's own)."""

    def rows(root: epath.Path, names: list[str]) -> Iterator[dict[str, Any]]:
        served = grid_facts(root)["contexts_served"] if contexts_served is None else contexts_served
        for name, config in zip(names, each(_config, root, names), strict=True):
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
    return _table(
        path, "evaluations", EVALUATION_COLUMNS, lambda *runs: itertools.chain.from_iterable(each(_evaluation_rows, *runs))
    )


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
    """
    return _read_json(storage.path(path) / "grid.json")


def _table(
    path: os.PathLike | str,
    name: str,
    columns: Iterable[Column],
    rows: Callable[[epath.Path, list[str]], Iterable[dict[str, Any]]],
) -> pd.DataFrame:
    """The table of a grid folder, whose `rows` are read from its runs; or the exported one, where there are no run folders."""
    root = storage.path(path)
    names = cell_names(root)
    return typed(exported(root, name) if names is None else pd.DataFrame(list(rows(root, names))), columns)


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


def _config(folder: epath.Path) -> TrainConfig:
    return TrainConfig.from_stored(_read_json(folder / "config.json"))


def cell_names(root: epath.Path) -> list[str] | None:
    """Names of the runs, first those of the grid as it is now; None: there are no run folders.

    Warns of finished runs that grid.json does not name, as when the grid was changed since: they are in no table.
    """
    there = storage.names(root / "cells")
    if (facts := storage.read_json(root / "grid.json")) is None:
        return there or None
    named = list(dict.fromkeys([*facts["cells"], *facts.get("old_cells", [])]))
    strangers = sorted({*there} - {*named})
    paths = [root / "cells" / name / "result.json" for name in strangers]
    contents = storage.each(storage.read_bytes, paths, remote=storage.is_remote(root))
    finished = tuple(name for name, content in zip(strangers, contents, strict=True) if content is not None)
    if finished:
        _warn_of_strangers(os.fspath(root), finished)
    return named


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
    return (row for row in each(_loss_row, root, names) if row is not None)


def _loss_row(folder: epath.Path) -> dict[str, Any] | None:
    result = run_folder.find_result(folder / "result.json")
    if result is None:
        return None
    config = _config(folder)
    versions = result.get("versions", {})
    return (
        result
        | _interval(result)
        | _rules(result, config)
        | _configured(LOSS_COLUMNS, config)
        | {
            "cell": folder.name,
            "continue_from": config.continue_from and PurePosixPath(config.continue_from).name,
            "start_differs": "; ".join(result.get("start", {}).get("differs", [])) or None,
            "params_paper": costs.count_params(config.model, "paper").total,
            "params_figures": costs.count_params(config.model, "figures").total,
            "steps": result["step"],
            "train_flops": costs.train_flops(config.model, config.context_length, result["tokens"], "exact"),
            "jax": versions.get("jax"),
            "flax": versions.get("flax"),
        }
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
    config = _config(folder)
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


def _read_json(path: epath.Path) -> dict[str, Any]:
    values = storage.read_json(path)
    if values is None:
        raise FileNotFoundError(f"{path} is not there")
    return values
