"""Tables, laws, the cheapest heads and pictures of a finished grid, as files; what is printed with them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from etils import epath
from rich.console import Console
from rich.markup import escape

from gqa_jax import formatting, plots, results, storage
from gqa_jax.differences import load_differences
from gqa_jax.laws import runs as run_table
from launch import grid_tables, rules, studies
from launch.cells import Layout
from launch.studies import Fits, Fitted, Source


@contextlib.contextmanager
def outputs(layout: Layout) -> Iterator[Layout]:
    """Where tables and pictures are written: the grid's folder, or a local one that is copied to gs:// at the end."""
    if not storage.is_remote(layout.root):
        yield layout
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Layout(epath.Path(folder))
        storage.upload(Path(folder), layout.root)


def write(layout: Layout, console: Console, asked: str | None = None, allow_confounded: bool = False) -> None:
    """Tables, laws, cheapest heads and pictures of a grid folder, each file whole or not at all; prints the answer.

    asked: the rules (`launch.rules`) that the laws are of. Tables have all runs, whatever rules they are under; without `asked`
    there are no laws of runs under several. allow_confounded: of `gqa_jax.laws.fit_by_heads`.
    """
    with outputs(layout) as out:
        loss, differences = write_tables(layout, out)
        if asked is None and (mixture := run_table.several_rules(loss)) is not None:
            for _, rows in loss.groupby("rules"):
                grid_tables.print_losses(rows, differences, console)
                console.print()
            console.print(f"[yellow]no laws:[/] {escape(mixture)}", highlight=False, soft_wrap=True)
            there = set(storage.names(layout.tables)) & {"fits.csv", "optimum.csv"}
            earlier = f"; {' and '.join(sorted(there))} are of an earlier export" if there else ""
            console.print(f"tables in {layout.tables}{earlier}", highlight=False, soft_wrap=True)
            return
        source = studies.of_grid(os.fspath(layout.root), rules=asked, loss=loss, allow_confounded=allow_confounded)
        fits = studies.fit(source)
        tables = write_fits(fits, out)
        for one in fits.fitted:
            _draw(out, source.name, one)
    _print(source, fits, tables, differences, console)
    if left := len(loss) - len(source.loss):
        console.print(f"runs under other rules: {left}, in the tables and in no law", highlight=False)
    console.print(f"tables in {layout.tables}" + f", pictures in {layout.figures}" * bool(fits.fitted), highlight=False)


def write_of_table(source: Source, console: Console) -> None:
    """Tables, laws, cheapest heads and pictures of a table of runs, beside it; prints the answer. ConfigError: no laws."""
    fits = studies.fit(source)
    fits.at(None)
    layout = studies.beside(source.table)
    with outputs(layout) as out:
        write_table(out.tables / "loss.csv", lambda path: source.loss.to_csv(path, index=False))
        tables = write_fits(fits, out)
        for one in fits.fitted:
            _draw(out, source.name, one)
    for context, why in fits.unfitted.items():
        console.print(f"context {context}: no fit: {why}")
    for one in fits.fitted:
        grid_tables.print_laws(one, tables[0][tables[0]["context"] == one.context], console, "tables/fits.csv")
    console.print()
    console.print(grid_tables.optimum_map(tables[1], source.convention), "")
    console.print(f"tables in {layout.tables}, pictures in {layout.figures}", highlight=False, soft_wrap=True)


def write_tables(layout: Layout, out: Layout) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes tables/loss, cost, evaluations and differences as CSV and Parquet; returns the first and the last."""
    root = layout.root
    loss, differences = results.load_results(root), load_differences(root)
    written = {"loss": loss, "cost": results.load_costs(root), "evaluations": results.load_evaluations(root)}
    for name, table in (written | {"differences": differences}).items():
        write_table(out.tables / f"{name}.csv", lambda path, table=table: table.to_csv(path, index=False))
        write_table(out.tables / f"{name}.parquet", lambda path, table=table: table.to_parquet(path, index=False))
    return loss, differences


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


def write_fits(fits: Fits, out: Layout) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Writes tables/fits.csv and tables/optimum.csv, of every training context that has laws; returns both, or None."""
    if not fits.fitted:
        return None
    laws = pd.concat([grid_tables.fit_table(one) for one in fits.fitted], ignore_index=True)
    optima = pd.concat([grid_tables.map_table(one) for one in fits.fitted], ignore_index=True)
    write_table(out.tables / "fits.csv", lambda path: laws.to_csv(path, index=False))
    write_table(out.tables / "optimum.csv", lambda path: optima.to_csv(path, index=False))
    return laws, optima


def _print(
    source: Source,
    fits: Fits,
    tables: tuple[pd.DataFrame, pd.DataFrame] | None,
    differences: pd.DataFrame,
    console: Console,
) -> None:
    if source.rules == rules.OLD and not source.asked:
        console.print(rules.SAID, highlight=False, soft_wrap=True)
    if len(commits := source.loss["commit"].dropna().unique()) > 1:
        names = ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in commits)
        console.print(f"[yellow]warning:[/] cells were trained by {len(commits)} commits: {names}")
    for context, why in fits.unfitted.items():
        console.print(f"context {context}: no fit: {why}")
    grid_tables.print_losses(source.loss, differences, console)
    if tables is None:
        return
    for one in sorted(fits.fitted, key=lambda one: one.context):
        grid_tables.print_laws(one, tables[0][tables[0]["context"] == one.context], console, "tables/fits.csv")
    console.print()
    console.print(grid_tables.optimum_map(tables[1], source.convention), "")


def _draw(layout: Layout, name: str, one: Fitted) -> None:
    trained = f"trained at T = {formatting.context(one.context)}"
    ax = plots.loss_vs_params(one.laws, title=f"{name}: loss against size, {trained}")
    plots.save(ax.figure, layout.figures / f"loss-params-t{one.context}")
    if one.rows["d_model"].isna().any():
        return  # without shapes there are no costs of the runs
    for served in _few(one.contexts_served):
        ax = plots.loss_vs_cost(
            one.rows,
            one.laws,
            served,
            convention=one.convention,
            title=f"{name}: loss against cost at {formatting.context(served)}, {trained}",
        )
        plots.save(ax.figure, layout.figures / f"loss-cost-t{one.context}-served{served}")


def _few(contexts: Sequence[int]) -> list[int]:
    return sorted({contexts[0], contexts[-1]})
