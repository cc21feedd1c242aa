"""Tables, fits, pictures and the cheapest heads of a finished grid. Imports no jax."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from gqa_jax import laws, optimum, plots, results, storage
from launch.grid import Layout
from launch.screen import short


@contextlib.contextmanager
def outputs(layout: Layout) -> Iterator[Layout]:
    """Where tables and pictures are written: the grid's folder, or a local one that is copied to gs:// at the end."""
    if not storage.is_remote(layout.root):
        yield layout
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Layout(epath.Path(folder))
        storage.upload(Path(folder), layout.root)


def write(layout: Layout, console: Console) -> None:
    """Tables, fits, cheapest heads and pictures of a grid folder, each file whole or not at all; prints the answer."""
    with outputs(layout) as out:
        answer(layout, out, write_tables(layout, out), console)
    console.print(f"tables in {layout.tables}, pictures in {layout.figures}")


def write_tables(layout: Layout, out: Layout) -> pd.DataFrame:
    """Writes tables/loss and tables/cost as CSV and Parquet; returns the loss table."""
    loss, cost = results.load_results(layout.root), results.load_costs(layout.root)
    for name, table in (("loss", loss), ("cost", cost)):
        write_table(out.tables / f"{name}.csv", lambda path, table=table: table.to_csv(path, index=False))
        write_table(out.tables / f"{name}.parquet", lambda path, table=table: table.to_parquet(path, index=False))
    return loss


def write_table(path: epath.PathLike, write: Callable[[Path], None]) -> None:
    """`write` to a temporary file beside `path`, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def answer(layout: Layout, out: Layout, loss: pd.DataFrame, console: Console) -> None:
    """Fits every training context, prints and writes fits, cheapest heads per served context, and pictures.

    A context that can't be fitted is said so, and the others go on.
    """
    facts = results.grid_facts(layout.root)
    fits, optima = [], []
    if len(commits := loss["commit"].dropna().unique()) > 1:
        names = ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in commits)
        console.print(f"[yellow]warning:[/] cells were trained by {len(commits)} commits: {names}")
    for context, rows in loss.groupby("context"):
        continued = rows["continue_from"].notna()
        if continued.any() and not continued.all():  # other runs altogether: one law can't hold for both
            console.print(f"context {context}: {continued.sum()} cells that continue others are left out of the fit")
            rows = rows[~continued]
        try:
            by_heads = laws.fit_by_heads(rows)
        except ValueError as error:
            console.print(f"context {context}: no fit: {error}")
            continue
        fits.append(_fit_table(int(context), by_heads))
        targets = facts["losses"] or _reachable(by_heads)
        table = optimum.best_heads(
            by_heads,
            targets,
            facts["contexts_served"],
            convention=facts["convention"],
            aspect=plots.table_aspect(rows),
            head_dim=float(rows["head_dim"].iloc[0]),
            vocab_size=float(rows["vocab_size"].iloc[0]),
        )
        table.insert(0, "context", int(context))
        optima.append(table)
        _draw(out, int(context), rows, by_heads, facts)
    if not fits:
        return
    fit_table, optimum_table = pd.concat(fits, ignore_index=True), pd.concat(optima, ignore_index=True)
    write_table(out.tables / "fits.csv", lambda path: fit_table.to_csv(path, index=False))
    write_table(out.tables / "optimum.csv", lambda path: optimum_table.to_csv(path, index=False))
    console.print(_loss_screen(loss))
    console.print(_fit_screen(fit_table))
    for warning in dict.fromkeys(w for text in fit_table["warnings"] for w in text.split("; ") if w):
        console.print(f"[yellow]warning:[/] {warning}")
    console.print(_optimum_screen(optimum_table, facts["convention"]))


def _fit_table(context: int, by_heads: dict[laws.Heads, laws.PowerLaw]) -> pd.DataFrame:
    return pd.DataFrame(
        {"context": context, **heads._asdict(), "a": law.a, "b": law.b, "entropy": law.entropy, "r_squared": law.r_squared,
         "points": len(law.loss), "warnings": "; ".join(law.warnings)}
        for heads, law in by_heads.items()
    )  # fmt: skip


def _reachable(by_heads: dict[laws.Heads, laws.PowerLaw]) -> list[float]:
    """Three losses that every H reaches inside the sizes it was trained at, where the ranges overlap; else their middle."""
    low = max(law.predict(law.params.max()) for law in by_heads.values())
    high = min(law.predict(law.params.min()) for law in by_heads.values())
    if low >= high:
        return [round(float((low + high) / 2), 3)]
    return [round(float(x), 3) for x in np.linspace(high, low, 5)[1:4]]


def _draw(layout: Layout, context: int, rows: pd.DataFrame, by_heads: dict, facts: dict) -> None:
    label = plots.context_label(context)
    trained = f"trained at T = {label}"
    ax = plots.loss_vs_params(by_heads, title=f"{facts['name']}: loss against size, {trained}")
    plots.save(ax.figure, layout.figures / f"loss-params-t{context}")
    for served in _few(facts["contexts_served"]):
        ax = plots.loss_vs_cost(
            rows,
            by_heads,
            served,
            convention=facts["convention"],
            title=f"{facts['name']}: loss against cost at {plots.context_label(served)}, {trained}",
        )
        plots.save(ax.figure, layout.figures / f"loss-cost-t{context}-served{served}")


def _few(contexts: Sequence[int]) -> list[int]:
    return sorted({contexts[0], contexts[-1]})


def _loss_screen(loss: pd.DataFrame) -> Table:
    view = Table(
        title="Held-out loss, nats per token (± standard error over documents)", title_justify="left", box=box.SIMPLE_HEAD
    )
    pivot = {}
    for row in loss.itertuples():
        text = (
            row.status if pd.isna(row.loss) else f"{row.loss:.4f}" + ("" if pd.isna(row.loss_sem) else f" ± {row.loss_sem:.4f}")
        )
        pivot.setdefault((row.context, row.n_heads, row.n_kv_heads), {})[row.size] = text
    sizes = list(dict.fromkeys(loss.sort_values("params_non_embedding")["size"]))
    for name in ("context", "heads", *sizes):
        view.add_column(name, justify="right")
    for (context, n_heads, n_kv), by_size in sorted(pivot.items()):
        view.add_row(f"{context:,}", f"({n_heads},{n_kv})", *(by_size.get(size, "") for size in sizes))
    return view


def _fit_screen(table: pd.DataFrame) -> Table:
    view = Table(title="L(N; H) = (a / N)^b + E, E shared by the heads of a context", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("context", "heads", "a", "b", "E", "R²", "runs"):
        view.add_column(name, justify="right")
    for row in table.itertuples():
        view.add_row(
            f"{row.context:,}",
            f"({row.n_heads},{row.n_kv_heads})",
            short(row.a),
            f"{row.b:.4f}",
            f"{row.entropy:.4f}",
            f"{row.r_squared:.5f}",
            str(row.points),
        )
    return view


def _optimum_screen(table: pd.DataFrame, convention: str) -> Table:
    view = Table(
        title=f"Cheapest heads (n_h, n_kv) by Z, {convention} convention; * N* outside the trained sizes", title_justify="left"
    )
    served = sorted(table["context_served"].unique())
    for name in ("trained at", "loss", *(f"served {plots.context_label(int(c))}" for c in served)):
        view.add_column(name, justify="right")
    best = table[table["rank"] == 1]
    for (context, loss), rows in best.groupby(["context", "loss"], sort=False):
        cells = {row.context_served: _winner(row) for row in rows.itertuples()}
        view.add_row(f"{context:,}", f"{loss:.3f}", *(cells.get(c, "not reached") for c in served))
    return view


def _winner(row) -> str:
    return f"({row.n_heads},{row.n_kv_heads}) N={short(row.n_params)}" + ("" if pd.isna(row.note) else "*")
