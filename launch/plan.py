"""What a grid will cost before it is started: parameters, tokens, FLOPs, memory and time of every cell. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from gqa_jax import costs
from launch import state
from launch.grid import Cell, Layout


def table(cells: Sequence[Cell], states: Sequence[state.CellState], flops_per_second: float | None) -> pd.DataFrame:
    """One row per cell: `Cell.describe`, memory by the paper's formula in bytes, estimated seconds, and its state.

    `seconds` is train_flops over the rate; empty when no rate is known.
    """
    rows = []
    for cell, now in zip(cells, states, strict=True):
        row: dict[str, Any] = cell.describe()
        row["train_bytes"] = costs.train_memory(
            cell.config.model,
            cell.config.micro_batch * cell.config.context_length,
            "exact",
            dtype=cell.config.model.param_dtype,
            activation_dtype=cell.config.model.dtype,
        )
        row["seconds"] = row["train_flops"] / flops_per_second if flops_per_second else None
        row["state"] = now.state
        rows.append(row)
    return pd.DataFrame(rows).astype({"seconds": "Float64"})


def measured_rate(cells: Sequence[Cell], layout: Layout) -> float | None:
    """FLOP/s that the finished cells of this grid folder reached (median), None when there are none."""
    rates = []
    for cell in cells:
        now = state.of(layout.cell(cell.name), 0.0)
        if now.state == "done" and now.tokens_per_second:
            about = cell.describe()
            rates.append(now.tokens_per_second * about["train_flops"] / about["tokens"])
    return float(pd.Series(rates).median()) if rates else None


def screen(frame: pd.DataFrame, title: str) -> Table:
    """The plan for a terminal, with totals."""
    view = Table(title=title, title_justify="left", show_footer=True, box=box.SIMPLE_HEAD)
    total = frame["seconds"].sum() if frame["seconds"].notna().all() else None
    for name, footer in (
        ("cell", f"{len(frame)} cells"),
        ("L x d", ""),
        ("N", ""),
        ("tokens", short(frame["tokens"].sum())),
        ("FLOPs", short(frame["train_flops"].sum())),
        ("memory", ""),
        ("time", duration(total)),
        ("state", ""),
    ):
        view.add_column(name, footer, justify="left" if name in ("cell", "state") else "right", no_wrap=True)
    for row in frame.itertuples():
        view.add_row(
            row.cell,
            f"{row.n_layers}x{row.d_model}",
            short(row.params_non_embedding),
            short(row.tokens),
            short(row.train_flops),
            f"{short(row.train_bytes)}B",
            duration(row.seconds),
            row.state,
        )
    return view


def short(value: float) -> str:
    """1234567 as "1.23M"."""
    for unit, symbol in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{symbol}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as "5 s", "3 min", "2.5 h" or "4.1 d"; empty when not known."""
    if seconds is None or pd.isna(seconds):
        return ""
    for unit, symbol in ((86400, "d"), (3600, "h")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {symbol}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
