"""What pictures read: loss tables, and columns of any table, with sentences where they can't be drawn."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import results
from gqa_jax.laws import Heads


def loss_table(source: pd.DataFrame | os.PathLike | str) -> pd.DataFrame:
    """The rows with a loss of a loss table, or of a grid folder (local or gs://). Raises ValueError when there are none."""
    table = source if isinstance(source, pd.DataFrame) else results.load_results(source)
    if "loss" not in table or "status" not in table:
        raise ValueError(f"no loss table: columns loss and status are missing among {', '.join(map(str, table.columns))}")
    done = table[(table["status"] == "done") & table["loss"].notna()]
    if done.empty:
        raise ValueError(f"nothing to draw: none of {len(table)} runs is done and has a loss")
    return done


def the_only(table: pd.DataFrame, column: str) -> Any:
    """The one value of a column. Raises ValueError with the values there are when a picture would mix several."""
    values = sorted(table[column].dropna().unique())
    if len(values) != 1:
        shown = ", ".join(map(str, values))
        raise ValueError(f"one {column} at a time: the table has {shown}; select with table[table[{column!r}] == ...]")
    return values[0]


def numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64; empty cells, and a column that is not there, are NaN."""
    if column not in table:
        return np.full(len(table), np.nan)
    return pd.to_numeric(table[column]).to_numpy(np.float64, na_value=np.nan)


def heads_named(text: str) -> Heads | None:
    """The heads that `str` writes as "(8,1)" or "(d/d_h,8)"; None for another text."""
    found = re.fullmatch(r"\((\d+|d/d_h),(\d+)\)", text)
    return found and Heads(None if found[1] == "d/d_h" else int(found[1]), int(found[2]))
