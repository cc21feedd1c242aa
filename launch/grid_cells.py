"""A grid as a command opens it: the cells of its file, what its folder holds of them, which of them are meant."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from gqa_jax import storage
from gqa_jax.errors import ConfigError, closest
from launch import grid as grids
from launch import reach, state
from launch import rules as ruling
from launch.cells import Cell, Layout
from launch.executors.base import Executor, Look
from launch.grid import Grid
from launch.rules import Choice
from launch.run import Pass
from launch.state import CellState
from launch.training_cells import stores

TABLES = (".csv", ".parquet")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of a grid file that a command is about, and where they lie."""

    file: str
    root: str | None  # that was asked for
    rules: str | None  # that were asked for
    choice: Choice
    layout: Layout
    settled: bool = False  # whether it is settled, and said, what of the root the command is about

    @property
    def name(self) -> str:
        return self.choice.grid.name

    @property
    def all(self) -> list[Cell]:
        return self.choice.cells

    @property
    def about(self) -> str:
        """How a command line names the same cells: the grid, its folder, the rules."""
        root = f" --root {shlex.quote(self.root)}" if self.root else ""
        return f"{shlex.quote(self.file)}{root}{self.choice.option}"

    def named(self, names: Sequence[str], among: Sequence[Cell] | None = None) -> list[Cell]:
        """The cells of these names, or beginnings of names. Raises ConfigError for one that is of none, or of several."""
        found, cells = [], self.all if among is None else among
        for name in names:
            matches = [cell for cell in cells if cell.name == name] or [cell for cell in cells if cell.name.startswith(name)]
            if len(matches) != 1:
                what = "no cell of the grid" if not matches else f"the beginning of {len(matches)} cells"
                raise ConfigError(f"{name!r} is {what}; `python -m launch status` lists them")
            found += matches
        return found

    def look(self, cells: Sequence[Cell], engine: Callable[[], Executor], seconds: float | None = None) -> Pass:
        """One look at cells; at their folders alone, which is logged, where the engine can't be asked.

        seconds: that it may take to answer; None: as long as it does.
        """
        at = time.time()
        if self.layout.unseen:
            return Pass(cells, [CellState("planned") for _ in cells], Look({}, None), at)
        jobs, why = reach.jobs_of(engine, seconds)
        if why is None:
            return Pass(cells, state.of_all(cells, self.layout, at, jobs), jobs, at)
        log.warning(f"not checked: what runs: {why}; states are by what cells have written alone")
        return Pass(cells, state.of_folders(cells, self.layout, at), jobs, at)

    def write_plan(self) -> None:
        """config.json of every cell and grid.json, before anything starts."""
        layout, there = self.layout, set(self.layout.names())

        def write(cell: Cell) -> None:
            folder = layout.cell(cell.name)
            if cell.name not in there or "config.json" not in storage.names(folder):
                storage.make_folder(folder)
                storage.write_json(folder / "config.json", cell.stored())

        storage.each(write, self.all, remote=storage.is_remote(layout.root))
        others = [*(cell.name for cell in self.choice.others), *self.choice.kept]
        storage.write_json(layout.root / "grid.json", facts(self.choice.grid, self.all, others))

    def strangers(self) -> list[str]:
        """Sentences on folders of no cell: those that stay in the tables, and those that no table has."""
        found, where = [], f"in {self.layout.root}/cells are of no cell of this grid"
        if kept := self.choice.kept:
            found.append(f"{len(kept)} finished runs {where} and under other rules: they stay in the tables, like {kept[0]}")
        if left := self.choice.strangers:
            found.append(f"{len(left)} folders {where} (it was changed since), and in no table, like {left[0]}")
        return found


def open_cells(grid: str, root: str | None = None, rules: str | None = None, *, offline: bool = False, **table: Any) -> Cells:
    """The cells of a grid file, and what their folder holds.

    Args:
      root: folder of the grid, or gs://BUCKET/FOLDER; default: runs/NAME.
      rules: "old" or "new" (`launch.rules`); without, `run` refuses a root begun under old ones, and the others take these.
      offline: what is on gs:// and can't be reached counts as empty, which is logged: for a plan, or a dry run.
      table: options of a table of runs, which are refused.
    """
    require_grid(grid)
    refuse(table, "a table of runs (.csv, .parquet)")
    the_grid = grids.load(grid)
    place = root or f"runs/{the_grid.name}"
    if offline and (missed := reach.out_of_reach(place, stores(the_grid.configs))):
        log.warning(f"not checked: what is in {' and '.join(missed)}, as if it were empty: {next(iter(missed.values()))}")
        choice = ruling.blind(the_grid, rules, missed)
        layout = Layout(epath.Path(place), unseen=True).holding(choice.cells)
        return Cells(grid, root, rules, choice, layout, settled=True)
    layout = Layout(storage.path(place))
    choice = ruling.choose(the_grid, layout, rules)
    return Cells(grid, root, rules, choice, layout.holding(choice.cells))


def require_grid(path: str) -> None:
    """Raises ConfigError for a table of runs, which has no cells."""
    if path.lower().endswith(TABLES):
        raise ConfigError(
            f"{path}: it is a table of runs, not a grid: it has no cells that could be trained, watched or chosen from; fit, "
            "optimum, report and export take it"
        )


def begun(grid: Cells | str) -> Cells:
    """The cells that the root has been begun with, unless rules are asked for; that it holds others is logged."""
    cells = open_cells(grid) if isinstance(grid, str) else grid
    the, found = cells.choice, cells.choice if cells.settled else ruling.begun_with(cells.choice, cells.layout)
    if the.others and not cells.settled:
        offer = ""
        if not the.asked:
            offer = "; these are shown (as with --rules old)" if found is not the else "; --rules old takes these"
            offer += "; --rules new takes the grid under today's rules"
        log.warning(f"{the.said(cells.layout)}{offer}")
    return dataclasses.replace(cells, choice=found, layout=cells.layout.holding(found.cells), settled=True)


def refuse(options: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError for the first option that is given: it is for something else."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name} is for {what}: leave it out")


def select[T: Cell](all_cells: Sequence[T], where: str | None) -> list[T]:
    """The cells whose fields (as `describe` names them) have the values of `where`: "size=19M,n_heads=8"."""
    if not where:
        return list(all_cells)
    chosen = [(cell, cell.describe()) for cell in all_cells]
    known = list(dict.fromkeys(name for _, about in chosen for name in about))
    for term in where.split(","):
        name, _, value = term.partition("=")
        if name not in known:
            raise ConfigError(f"--where {term}: {name!r} is no field of a cell: {closest(name, known)}")
        chosen = [(cell, about) for cell, about in chosen if str(about.get(name)) == value]
    if not chosen:
        raise ConfigError(f"--where {where}: no cell matches")
    return [cell for cell, _ in chosen]


def facts(grid: Grid, all_cells: Sequence[Cell], old_cells: Sequence[str] = ()) -> dict[str, Any]:
    """grid.json: what the tables need to know of the grid beside its cells (`gqa_jax.results.grid_facts`).

    Names of cells of another kind than those that train are in a list of their own (`Cell.listed`).

    old_cells: names of those that were finished or begun under other rules, and stay in the tables.
    """
    names: dict[str, list[str]] = {"cells": []}
    for cell in all_cells:
        names.setdefault(cell.listed, []).append(cell.name)
    found = {
        "name": grid.name,
        "contexts_served": list(grid.contexts_served),
        "losses": list(grid.losses),
        "convention": grid.convention,
        **names,
    }
    return found | ({"old_cells": list(old_cells)} if old_cells else {})
