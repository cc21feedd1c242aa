"""Tables, laws, the cheapest heads and pictures of a finished grid, as files; what is printed with them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
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


@dataclasses.dataclass
class Exported:
    """What was written, and what it is of."""

    layout: Layout
    loss: pd.DataFrame
    differences: pd.DataFrame | None = None  # of `gqa_jax.differences.load_differences`; None: of a table of runs
    source: Source | None = None  # None: there are no laws of runs under several rules
    fits: Fits | None = None
    laws: pd.DataFrame | None = None  # tables/fits.csv, of every training context that has laws
    optima: pd.DataFrame | None = None  # tables/optimum.csv
    notes: list[str] = dataclasses.field(default_factory=list)


def of_grid(layout: Layout, asked: str | None = None, allow_confounded: bool = False) -> Exported:
    """Writes tables, laws, cheapest heads and pictures of a grid's folder, each file whole or not at all.

    asked: the rules (`launch.rules`) that the laws are of. Tables have all runs, whatever rules they are under; without `asked`
    there are no laws of runs under several. allow_confounded: of `gqa_jax.laws.fit_by_heads`.
    """
    with outputs(layout) as out:
        found = Exported(layout, *write_tables(layout, out))
        if asked is not None or run_table.several_rules(found.loss) is None:
            root = os.fspath(layout.root)
            found.source = studies.of_grid(root, rules=asked, loss=found.loss, allow_confounded=allow_confounded)
            _write_laws(found, studies.fit(found.source), out)
    return found


def of_table(source: Source) -> Exported:
    """The same of a table of runs, beside it. Raises ConfigError where there are no laws."""
    fits = studies.fit(source)
    fits.at(None)
    found = Exported(studies.beside(source.table), source.loss, source=source)
    with outputs(found.layout) as out:
        write_table(out.tables / "loss.csv", lambda path: source.loss.to_csv(path, index=False))
        _write_laws(found, fits, out)
    return found


def _write_laws(found: Exported, fits: Fits, out: Layout) -> None:
    """Writes tables/fits.csv, tables/optimum.csv and pictures, of every training context that has laws."""
    found.fits = fits
    if not fits.fitted:
        return
    found.laws = pd.concat([grid_tables.fit_table(one) for one in fits.fitted], ignore_index=True)
    found.optima = pd.concat([grid_tables.map_table(one) for one in fits.fitted], ignore_index=True)
    write_table(out.tables / "fits.csv", lambda path: found.laws.to_csv(path, index=False))
    write_table(out.tables / "optimum.csv", lambda path: found.optima.to_csv(path, index=False))
    for one in fits.fitted:
        _draw(out, found.source.name, one)


def show(found: Exported, console: Console) -> None:
    """Losses, laws, the answers, and where they were written."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if found.source is None:
        for _, rows in found.loss.groupby("rules"):
            grid_tables.print_losses(rows, found.differences, console)
            console.print()
        say(f"[yellow]no laws:[/] {escape(run_table.several_rules(found.loss))}")
        there = {"fits.csv", "optimum.csv"} & {*storage.names(found.layout.tables)}
        earlier = f"; {' and '.join(sorted(there))} are of an earlier export" if there else ""
        say(f"tables in {found.layout.tables}{earlier}")
    else:
        _show_laws(found, console)
        if left := len(found.loss) - len(found.source.loss):
            say(f"runs under other rules: {left}, in the tables and in no law")
        say(f"tables in {found.layout.tables}" + f", pictures in {found.layout.figures}" * bool(found.fits.fitted))
    for note in found.notes:
        say(note)


def _show_laws(found: Exported, console: Console) -> None:
    source, fits = found.source, found.fits
    if source.rules == rules.OLD and not source.asked:
        console.print(rules.SAID, highlight=False, soft_wrap=True)
    if len(commits := source.loss["commit"].dropna().unique()) > 1:
        names = ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in commits)
        console.print(f"[yellow]warning:[/] cells were trained by {len(commits)} commits: {names}")
    for context, why in fits.unfitted.items():
        console.print(f"context {context}: no fit: {why}")
    if found.differences is not None:
        grid_tables.print_losses(source.loss, found.differences, console)
    for one in sorted(fits.fitted, key=lambda one: one.context):
        grid_tables.print_laws(one, found.laws[found.laws["context"] == one.context], console, "tables/fits.csv")
    if fits.fitted:
        console.print()
        console.print(grid_tables.optimum_map(found.optima, source.convention), "")


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


def _draw(layout: Layout, name: str, one: Fitted) -> None:
    trained = f"trained at T = {formatting.context(one.context)}"
    ax = plots.loss_vs_params(one.laws, title=f"{name}: loss against size, {trained}")
    plots.save(ax.figure, layout.figures / f"loss-params-t{one.context}")
    if one.rows["d_model"].isna().any():
        return  # without shapes there are no costs of the runs
    for served in sorted({one.contexts_served[0], one.contexts_served[-1]}):
        ax = plots.loss_vs_cost(
            one.rows,
            one.laws,
            served,
            convention=one.convention,
            title=f"{name}: loss against cost at {formatting.context(served)}, {trained}",
        )
        plots.save(ax.figure, layout.figures / f"loss-cost-t{one.context}-served{served}")
