"""Grids that the first version began: under its rules every cell has another name.

A loss belongs to the rules that it was made under (`gqa_jax.config.TrainConfig.rules`): how documents are held out, which
windows are evaluated, where warm-up begins. They are part of a cell's identity, so of its name: the cells of a grid that the
first version trained are not those that the same file has today. They are found by their names, offered, and never left out
unsaid.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence

from gqa_jax import storage
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder
from launch import grid
from launch.cells import Cell, Layout
from launch.grid import Grid
from launch.training_cells import training

OLD, NEW = "old", "new"
FIRST = "position/first/zero"  # the rules of the first version, as tables have them
CHANGED = (
    "Since then documents are held out by a hash of their text instead of by their place, held-out windows lie over the whole "
    "held-out text instead of at its beginning, and the first step of a warm-up has 1/n of the learning rate instead of 0: "
    "losses under both can't be compared"
)
SAID = (
    f"these runs are under the rules of the first version ({FIRST}): their losses are of the beginning of the held-out text, "
    "and can't be compared with those of today"
)
HELP = (
    "old: the grid under the rules of the first version, whose cells have the names that it gave them; new: as the file says, "
    "today's rules where it says nothing (default: new, and where a root holds cells of the old rules it is said)"
)
ROWS = (
    f"of a grid with runs of both: old takes those under the rules of the first version ({FIRST}), new all others (default: "
    "all, which must be under the same rules)"
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cells that a command is about, and what else their root holds."""

    grid: Grid
    cells: list[Cell]
    rules: str  # OLD or NEW
    asked: bool  # by --rules; or the root was begun so, and what is printed has to say it
    others: list[Cell]  # of the same grid under the other rules, that have begun
    finished: int  # of those
    strangers: list[str]  # folders that are of no cell under either rules
    kept: list[str]  # of other folders, finished under other rules than those of the cells: by another grid file, or before

    @property
    def option(self) -> str:
        """What a command line needs to be about the same cells."""
        return f" --rules {self.rules}" if self.asked else ""

    def said(self, layout: Layout) -> str:
        """Which cells of the grid the root holds under the other rules."""
        ended = "finished" if self.finished == len(self.others) else f"{self.finished} finished, others begun"
        whose = "the rules of the first version" if self.rules == NEW else "today's rules"
        more = f" and {len(self.others) - 2} more" if len(self.others) > 2 else ""
        names = ", ".join(cell.name for cell in self.others[:2]) + more
        count = f"{len(self.others)} cell{'s' * (len(self.others) > 1)}"
        return f"{layout.root} holds {count} of this grid under {whose} ({ended}): {names}"


def choose(the_grid: Grid, layout: Layout, asked: str | None) -> Choice:
    """The cells of the grid under the rules that are asked for; where none are, under those that its root has been begun with.

    One listing of the root; cells under the other rules are looked for only where it has folders that are of no cell.

    Raises ConfigError as `grid.cells` and `grid.under_old_rules`.
    """
    rules = asked or NEW
    cells = _cells(the_grid, rules)
    names = {cell.name for cell in cells}
    left = [name for name in storage.names(layout.root / "cells") if name not in names]
    others: list[Cell] = []
    if left:
        with contextlib.suppress(ValueError):  # such a grid can't have been run
            others = [cell for cell in _cells(the_grid, NEW if rules == OLD else OLD) if cell.name in left]
        left = [name for name in left if name not in {cell.name for cell in others}]
    contents = _contents(others, layout)
    others = [cell for cell in others if contents[cell.name]]
    finished = sum("result.json" in contents[cell.name] for cell in others)
    ruled = grid.under_old_rules(the_grid) if rules == OLD else the_grid
    return Choice(ruled, cells, rules, asked is not None, others, finished, *_strangers(left, cells, layout))


def blind(the_grid: Grid, asked: str | None, stores: Collection[str]) -> Choice:
    """The choice of a grid whose root, or these token stores, can't be looked at: as if nothing had begun."""
    ruled = grid.under_old_rules(the_grid) if asked == OLD else the_grid
    return Choice(ruled, grid.cells(ruled, stores), asked or NEW, asked is not None, [], 0, [], [])


def begun_with(found: Choice, layout: Layout) -> Choice:
    """The choice itself; or that of the old rules, where none were asked for and the root holds no begun cell of others."""
    if found.asked or not found.others:
        return found
    there = set(storage.names(layout.root / "cells"))
    if any(_contents([cell for cell in found.cells if cell.name in there], layout).values()):
        return found
    cells = _cells(found.grid, OLD)
    left = _strangers(sorted([*found.strangers, *found.kept]), cells, layout)
    return Choice(grid.under_old_rules(found.grid), cells, OLD, True, [], 0, *left)


def _cells(the_grid: Grid, rules: str) -> list[Cell]:
    """Its cells under these rules. Raises ConfigError for a token store that the first version did not make under the old."""
    cells = grid.cells(grid.under_old_rules(the_grid) if rules == OLD else the_grid)
    for cell in training(cells) if rules == OLD else ():
        if cell.holdout not in (None, "position"):
            raise ConfigError(
                f"--rules old: documents of token store {cell.config.data.store} are held out by {cell.holdout}, under the old "
                "rules they are by position: give the store that the first version made, or leave --rules out"
            )
    return cells


def _strangers(names: Sequence[str], cells: Sequence[Cell], layout: Layout) -> tuple[list[str], list[str]]:
    """Folders of no cell: those that are of no use, and those that hold a result under rules that no cell has."""
    own = {cell.config.rules(cell.holdout) for cell in training(cells) if cell.holdout is not None}

    def stays(name: str) -> bool:
        folder = layout.cell(name)
        try:
            result = run_folder.find_result(folder / "result.json")
            if result is None:
                return False
            found = result.get("rules") or run_folder.read_config(folder).rules("position")
        except ValueError:  # broken: `status` says so where it is a cell
            return False
        return found not in own

    found = dict(zip(names, storage.each(stays, list(names), remote=storage.is_remote(layout.root)), strict=True))
    return [name for name in names if not found[name]], [name for name in names if found[name]]


def _contents(cells: Sequence[Cell], layout: Layout) -> dict[str, set[str]]:
    """What the folders of these cells hold beside the configuration, which is written before anything begins."""
    remote = storage.is_remote(layout.root)
    found = storage.each(lambda cell: storage.names(layout.cell(cell.name)), cells, remote=remote)
    return {cell.name: {*names} - {"config.json"} for cell, names in zip(cells, found, strict=True)}
