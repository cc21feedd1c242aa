"""Runs of any trainer: a CSV or Parquet file of losses as the loss table that laws are fitted to.

table = gqa_jax.load_table("losses.csv", {"n_heads": "H", "loss": "val_loss"}, units="bits", context=8192)
laws = gqa_jax.laws.fit_by_heads(table)
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

import numpy as np
import pandas as pd

from gqa_jax import errors, storage
from gqa_jax.errors import ConfigError
from gqa_jax.laws import checks, confounding, heads
from gqa_jax.laws import runs as run_table
from gqa_jax.results import LOSS_COLUMNS

UNITS = ("nats", "bits", "perplexity")  # of a loss per token
SUFFIXES = (".csv", ".parquet")
REQUIRED = ("n_heads", "n_kv_heads", "loss")
SHAPE = ("n_layers", "d_model", "head_dim")
KNOWN = tuple(dict.fromkeys([*(column.name for column in LOSS_COLUMNS), *confounding.DATA, *confounding.RECIPE, "heads_rule"]))


def is_table(path: os.PathLike | str) -> bool:
    """Whether a path is that of a table of runs, by its name."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def load_table(
    path: os.PathLike | str,
    columns: Mapping[str, str] | None = None,
    *,
    units: str | None = None,
    context: int | None = None,
    heads_rule: str | None = None,
) -> pd.DataFrame:
    """The loss table of a .csv or .parquet file, local or gs://: `gqa_jax.results.LOSS_COLUMNS`, and what else is known.

    Args:
      columns: our name -> the file's, where it has another. n_heads (empty: d / d_h), n_kv_heads and loss are needed;
        params_non_embedding, or n_layers, d_model and head_dim, of which it is counted ("exact" convention); context, or
        `context`. Without status every run is done.
      units: of loss: "nats" per token (default), "bits" per token or "perplexity". Without it losses that are too high for
        nats are an error.
      heads_rule: of runs whose heads grow with the width: "mha", "group:G" or "kv:K" (`gqa_jax.laws.heads.rule`); a column
        heads_rule says it for each. Their n_heads and n_kv_heads may be missing, and become those of the rule.
      context: training context of all runs, tokens, where the file has no such column.

    Raises:
      ConfigError: no such file, no table, a column that is not there (with the closest), values that are no numbers, heads
        that no model has, an N that is not that of the shape, losses that are in other units.
    """
    if units not in (None, *UNITS):
        raise ConfigError(f"units = {units!r}: {errors.closest(units, UNITS)}")
    table = _renamed(_read(path), columns or {}, path)
    if "context" not in table:
        if context is None:
            raise ConfigError(
                f"{path} has no column context: {_closest('context', table)}; or give the training context of all runs, "
                "context=T (--context_trained T)"
            )
        table["context"] = context
    elif context is not None:
        raise ConfigError(f"{path} has a column context: context = {context} (--context_trained) is for files without one")
    if heads_rule is not None:
        if "heads_rule" in table:
            raise ConfigError(f"{path} has a column heads_rule: heads_rule = {heads_rule!r} is for files without one")
        table["heads_rule"] = heads_rule
    if "heads_rule" in table:
        table = table.assign(**{name: np.nan for name in ("n_heads", "n_kv_heads") if name not in table})
    if missing := [name for name in REQUIRED if name not in table]:
        said = " and ".join(f"no column {name} ({_closest(name, table)})" for name in missing)
        names = ",".join(f"{name}=NAME" for name in missing)
        raise ConfigError(f"{path} has {said}: name what the file calls it, columns or --columns {names}")
    table["status"] = table["status"].fillna("") if "status" in table else "done"
    for column in LOSS_COLUMNS:
        if column.name in table:
            table[column.name] = _typed(table, column.name, column.dtype, path)
    if "heads_rule" in table:
        table = _with_rules(table, path)
    if "params_non_embedding" not in table:
        table["params_non_embedding"] = _counted(table, path)
    try:
        checked = _in_nats(table, units)
        rows = checked[checked["status"].eq("done").fillna(False) & checked["loss"].notna()]
        checks.require(rows, strict=True)
        if units is None:
            _require_nats(rows["loss"].astype(np.float64))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return checked


def _read(path: os.PathLike | str) -> pd.DataFrame:
    if not is_table(path):
        raise ConfigError(f"{path}: a table of runs is a {' or '.join(SUFFIXES)} file")
    content = storage.read_bytes(storage.path(path))
    if content is None:
        raise ConfigError(f"{path} is not there: give a {' or '.join(SUFFIXES)} file of runs")
    try:
        reader = pd.read_csv if os.fspath(path).lower().endswith(".csv") else pd.read_parquet
        table = reader(io.BytesIO(content))
    except (ValueError, OSError) as error:  # parsers of both raise kinds of these
        raise ConfigError(f"{path} can't be read as a table: {errors.named(error, 200)}") from error
    if table.empty:
        raise ConfigError(f"{path} has no rows: a row per run is needed")
    return table


def _renamed(table: pd.DataFrame, columns: Mapping[str, str], path: os.PathLike | str) -> pd.DataFrame:
    """The table by our names; of a name that is mapped, the file's own column of that name is dropped."""
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise ConfigError(f"columns: {ours!r} is no column of a loss table: {errors.closest(ours, KNOWN)}")
        if theirs not in table:
            raise ConfigError(f"{path} has no column {theirs!r}: {errors.closest(theirs, table.columns.astype(str))}")
    dropped = [ours for ours, theirs in columns.items() if ours in table and theirs != ours]
    taken = {ours: table[theirs] for ours, theirs in columns.items()}
    rest = table.drop(columns=[*dropped, *columns.values()], errors="ignore")
    return rest.assign(**taken)


def _closest(name: str, table: pd.DataFrame) -> str:
    """The column that was probably meant."""
    names = [str(column) for column in table.columns if column not in KNOWN]  # those are something else already
    match = errors.close(name, names) or next((other for other in names if name in other or other in name), None)
    return f"did you mean {match!r}?" if match else f"unnamed columns: {', '.join(names) or 'none'}"


def _typed(table: pd.DataFrame, name: str, dtype: str, path: os.PathLike | str) -> pd.Series:
    """A column of the type that it has in a loss table. Raises ConfigError with the first value that has not."""
    values = table[name]
    if dtype == "string":
        return values.astype("string")
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    bad = numbers.isna() & values.notna()
    if dtype == "Int64" and name != "params_non_embedding":
        bad |= numbers.notna() & (numbers != numbers.round())
    elif dtype == "Int64":  # counts that somebody rounded, or wrote in other units: said by `checks`
        return numbers.astype("Float64")
    if bad.any():
        i = int(np.argmax(bad))
        kind = "a whole number" if dtype == "Int64" else "a number"
        raise ConfigError(f"{path}, row {i + 1}: {name} = {str(values.iloc[i])!r} must be {kind}, or empty")
    return numbers.astype(dtype)


def _with_rules(table: pd.DataFrame, path: os.PathLike | str) -> pd.DataFrame:
    """The table with the heads of the rules that its column heads_rule names; rows without one keep their own."""
    parts = []
    try:
        for text, rows in table.groupby(table["heads_rule"].fillna("").astype(str), sort=False):
            parts.append(run_table.follow(rows, heads.rule(text)) if text else rows)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return pd.concat(parts).loc[table.index]


def _counted(table: pd.DataFrame, path: os.PathLike | str) -> np.ndarray:
    """N of the shapes, as trained here: with norms."""
    if missing := [name for name in SHAPE if name not in table]:
        raise ConfigError(
            f"{path} has no column params_non_embedding: {_closest('params_non_embedding', table)}; or give the shapes, "
            f"for which it lacks {', '.join(missing)}"
        )
    count = checks.shape_counts(table)[checks.EXACT]
    if np.isnan(count).any():
        i = int(np.argmax(np.isnan(count)))
        raise ConfigError(f"{path}, row {i + 1}: without params_non_embedding it needs {', '.join(SHAPE)} and both heads")
    return count


def _in_nats(table: pd.DataFrame, units: str | None) -> pd.DataFrame:
    """Losses and what belongs to them in nats per token. Raises ValueError for perplexities that can't be."""
    losses = [name for name in ("loss", "loss_low", "loss_high") if name in table]
    values = table[losses].astype(np.float64)
    if units == "perplexity":
        if (values["loss"] <= 0).any():
            raise ValueError(f"a perplexity of {values['loss'].min():g} can't be: it is exp(loss), above 1")
        scale = 1 / values["loss"]
        values = np.log(values)
    else:
        scale = np.log(2) if units == "bits" else 1.0
        values = values * scale
    found = table.assign(**{name: values[name].astype("Float64") for name in losses})
    if "loss_sem" in table:
        found["loss_sem"] = (table["loss_sem"].astype(np.float64) * scale).astype("Float64")
    return found


def _require_nats(losses: pd.Series) -> None:
    """Raises ValueError for losses that hardly are nats per token."""
    if len(losses) and (middle := float(losses.median())) > checks.HIGHEST:
        raise ValueError(
            f"half of the losses are above {checks.HIGHEST:g}, like {middle:.4g}: finished models have fewer nats per token. "
            f'{checks.in_other_units(middle)}. Where they are nats all the same: units="nats", --units nats'
        )
