"""The runs of a loss table of several training contexts, with a name for each size."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gqa_jax.laws import runs as run_table
from gqa_jax.laws.heads import Heads


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """`run_table.usable` rows of every context, with columns `size_name` and `heads`; and what was left out, said.

    A size is named by the column size, else by its layers and width ("24x1280").

    Raises:
      ValueError: as `run_table.usable`, for all contexts together, or a table that does not say what size a run has.
    """
    if missing := [name for name in ("context", "status", "loss") if name not in table.columns]:
        raise ValueError(f"the table has no column {', '.join(missing)}: give the loss table of gqa_jax.load_results")
    kept, said = [], []
    finite = np.isfinite(pd.to_numeric(table["loss"], errors="coerce").astype("Float64").to_numpy(np.float64, na_value=np.nan))
    there = table["status"].eq("done").fillna(False).to_numpy(bool) & finite
    for context, rows in table.assign(_there=there).groupby("context"):
        if not rows.pop("_there").any():
            said.append(f"T = {context}: all {len(rows)} runs left out: they diverged or are not finished")
            continue
        rows, words = run_table.usable(rows)
        kept.append(rows)
        said += [f"T = {context}: {word}" for word in words]
    if not kept:
        raise ValueError("no finished run to fit: every row is diverged or missing")
    rows = pd.concat(kept)
    run_table.require_one_rule(rows)
    heads = [Heads.of(h, k) for h, k in zip(rows["n_heads"], rows["n_kv_heads"], strict=True)]
    return rows.assign(size_name=_sizes(rows), heads=pd.Series(heads, rows.index, dtype=object)), said


def _sizes(rows: pd.DataFrame) -> pd.Series:
    if "size" in rows and rows["size"].notna().all():
        return rows["size"].astype(str)
    if {"n_layers", "d_model"} <= set(rows.columns):
        return rows["n_layers"].astype(str) + "x" + rows["d_model"].astype(str)
    raise ValueError("the table says of no run what size it has: it needs the column size, or n_layers and d_model")
