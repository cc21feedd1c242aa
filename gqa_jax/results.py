"""Tables of a grid: one row per run in `loss`, one per run, served context and cost convention in `cost`.

    df = gqa_jax.load_results("runs/quickstart")        # or "gs://bucket/grids/paper"

`LOSS_COLUMNS` and `COST_COLUMNS` are the schema: every column with its type, unit and meaning. What is not known is an
empty cell, never 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pandas as pd
from etils import epath

from gqa_jax import costs, run_folder, storage
from gqa_jax.config import TrainConfig


class Column(NamedTuple):
    """One column: pandas dtype (nullable ones hold empty cells), unit, meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str


_MODEL_COLUMNS = (
    Column("cell", "string", "", "name of the run: its folder under cells/"),
    Column("size", "string", "", "name of the size in the grid"),
    Column("n_layers", "Int64", "", "layers L"),
    Column("d_model", "Int64", "", "hidden size d"),
    Column("n_heads", "Int64", "", "query heads n_h"),
    Column("n_kv_heads", "Int64", "", "key/value heads n_kv"),
    Column("head_dim", "Int64", "", "head size d_h"),
)

LOSS_COLUMNS = (
    *_MODEL_COLUMNS,
    Column("d_ff", "Int64", "", "feed-forward width"),
    Column("vocab_size", "Int64", "", "vocabulary V of the model, padding included"),
    Column("context", "Int64", "tokens", "context length T of the training"),
    Column("continue_from", "string", "", "run whose last parameters it started from; empty: from scratch"),
    Column("seed", "Int64", "", "seed of initialisation and data order"),
    Column("status", "string", "", "done, or diverged: the loss was no longer finite"),
    Column("params_non_embedding", "Int64", "", "parameters without embeddings, as trained (N of the fits)"),
    Column("params_total", "Int64", "", "parameters as trained, tied embedding once"),
    Column("params_paper", "Int64", "", "parameters by the paper's tables: two FFN matrices, embedding once, no norms"),
    Column("params_figures", "Int64", "", "parameters by the paper's figures: three FFN matrices, no embedding, no norms"),
    Column("tokens", "Int64", "tokens", "tokens trained on, D; without those of the run it continues"),
    Column("steps", "Int64", "", "optimizer steps done"),
    Column("batch_tokens", "Int64", "tokens", "tokens per step"),
    Column("learning_rate", "Float64", "", "maximum learning rate"),
    Column("loss", "Float64", "nats/token", "held-out loss after the last step"),
    Column("loss_sem", "Float64", "nats/token", "standard error of loss, clustered by document"),
    Column("bits_per_byte", "Float64", "bits/byte", "held-out loss per byte of text"),
    Column("eval_tokens", "Int64", "tokens", "held-out tokens that loss is a mean of"),
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
)

COST_COLUMNS = (
    *_MODEL_COLUMNS,
    Column("context", "Int64", "tokens", "context length T of the training"),
    Column("context_served", "Int64", "tokens", "context length that the costs are for"),
    Column("convention", "string", "", "what is counted: a name of gqa_jax.costs.CONVENTIONS"),
    Column("c_infer", "Float64", "FLOP", "inference compute, per token or per sequence as the convention says"),
    Column("m_infer", "Float64", "values or bytes", "inference memory at batch 1: parameters and cache"),
    Column("z", "Float64", "", "0.9 m_infer^(1/2) + 0.1 c_infer^(1/3) (Eq. 5)"),
    Column("c_train", "Float64", "FLOP", "compute of the training run"),
    Column("m_train", "Float64", "values or bytes", "training memory of one sequence"),
)


def load_results(path: os.PathLike | str) -> pd.DataFrame:
    """The loss table of a grid folder, local or gs://: one row per run that has a result, columns `LOSS_COLUMNS`.

    Reads the run folders; a folder that holds exported tables only gives those.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: a result.json or config.json that can't be read, naming it.
    """
    root = storage.path(path)
    names = _cell_names(root)
    if names is None:
        table = root / "tables" / "loss.parquet"
        if not table.exists():
            raise FileNotFoundError(f"{root} is no grid folder: neither cells/ nor tables/loss.parquet is in it")
        with table.open("rb") as file:
            return typed(pd.read_parquet(file), LOSS_COLUMNS)
    rows = storage.each(_loss_row, [root / "cells" / name for name in names], remote=storage.is_remote(root))
    return typed(pd.DataFrame([row for row in rows if row is not None]), LOSS_COLUMNS)


def load_costs(path: os.PathLike | str, contexts_served: Sequence[int] | None = None) -> pd.DataFrame:
    """The cost table, columns `COST_COLUMNS`, of the runs of a grid folder at `contexts_served` (default: the grid's own)."""
    root = storage.path(path)
    names = _cell_names(root)
    if names is None:
        with (root / "tables" / "cost.parquet").open("rb") as file:
            return typed(pd.read_parquet(file), COST_COLUMNS)
    if contexts_served is None:
        contexts_served = grid_facts(root)["contexts_served"]
    paths = [root / "cells" / name / "config.json" for name in names]
    configs = zip(names, storage.each(_read_json, paths, remote=storage.is_remote(root)), strict=True)
    rows = [row for name, values in configs for row in _cost_rows(name, TrainConfig.from_stored(values), contexts_served)]
    return typed(pd.DataFrame(rows), COST_COLUMNS)


def grid_facts(path: os.PathLike | str) -> dict[str, Any]:
    """grid.json of a grid folder: name, contexts_served, losses, convention, cells."""
    return _read_json(storage.path(path) / "grid.json")


def typed(table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """`table` with exactly `columns`, in order, each of its type; what is missing is empty."""
    columns = list(columns)
    return table.reindex(columns=[c.name for c in columns]).astype({c.name: c.dtype for c in columns})


def _cell_names(root: epath.Path) -> list[str] | None:
    if (facts := storage.read_json(root / "grid.json")) is not None:
        return facts["cells"]
    return storage.names(root / "cells") or None


def _loss_row(folder: epath.Path) -> dict[str, Any] | None:
    result = run_folder.find_result(folder / "result.json")
    if result is None:
        return None
    config = TrainConfig.from_stored(_read_json(folder / "config.json"))
    model = config.model
    return (
        {key: result.get(key) for key in _FROM_RESULT}
        | _model_fields(folder.name, config)
        | {
            "d_ff": model.d_ff,
            "vocab_size": model.vocab_size,
            "continue_from": config.continue_from and PurePosixPath(config.continue_from).name,
            "seed": config.seed,
            "params_paper": costs.count_params(model, "paper").total,
            "params_figures": costs.count_params(model, "figures").total,
            "steps": result["step"],
            "batch_tokens": config.batch_tokens,
            "learning_rate": config.optimizer.learning_rate,
            "train_flops": costs.train_flops(model, config.context_length, result["tokens"], "exact"),
            "jax": result.get("versions", {}).get("jax"),
            "flax": result.get("versions", {}).get("flax"),
        }
    )


_FROM_RESULT = (
    "status", "params_non_embedding", "params_total", "tokens", "loss", "loss_sem", "bits_per_byte", "eval_tokens",
    "tokens_per_second", "mfu", "seconds_train", "seconds_total", "peak_memory_bytes", "attention", "device", "n_devices",
    "attempts", "commit", "data_fingerprint", "params_sha256",
)  # fmt: skip


def _cost_rows(name: str, config: TrainConfig, contexts_served: Sequence[int]) -> Iterable[dict[str, Any]]:
    for context in contexts_served:
        for convention in costs.CONVENTIONS:
            yield _model_fields(name, config) | {
                "context_served": context,
                "convention": convention,
                **costs.serving_costs(config.model, context, config.train_tokens, config.context_length, convention),
            }


def _model_fields(name: str, config: TrainConfig) -> dict[str, Any]:
    model = config.model
    return {
        "cell": name,
        "size": config.label,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "context": config.context_length,
    }


def _read_json(path: epath.Path) -> dict[str, Any]:
    values = storage.read_json(path)
    if values is None:
        raise FileNotFoundError(f"{path} is not there")
    return values
