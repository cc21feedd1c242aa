"""Grids: which cells there are, what they are called, where they live.

A grid file defines `get_grid()`, which returns a `Grid`: any list of training configurations, made by `product` or by hand. A
cell may go on from the parameters of another one, its parent, and starts when that is done; or from those of a run that is no
cell of the grid, or of an import (`continued`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import ml_collections

from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError, closest
from launch import grid_file, training_cells
from launch.cells import Cell
from launch.training_cells import TrainingCell, training
from launch.training_cells import continued as continued
from launch.training_cells import converted as converted


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named set of training runs, what is asked of them, and cells of other kinds that follow from them.

    Raises ConfigError for what could not be used after its runs have been paid for.
    """

    name: str  # of its folder, and in tables
    configs: Sequence[ml_collections.ConfigDict | TrainConfig]
    contexts_served: Sequence[int]  # T of the cost table and of the answer, tokens, like 131072 or "128K"
    losses: Sequence[float] = ()  # L* of the answer; empty: chosen from what was reached
    convention: str = "figures"  # costs the answer minimises (gqa_jax.costs.CONVENTIONS)
    others: Callable[[Sequence[TrainingCell]], Sequence[Cell]] = lambda trained: ()  # cells of other kinds, of those that train
    old_rules: bool = False  # its cells are those of the first version (`TrainConfig.under_old_rules`), by their names too

    def __post_init__(self):
        for name, value in grid_file.checked(vars(self)).items():
            object.__setattr__(self, name, value)


def product(
    make: Callable[..., ml_collections.ConfigDict], *, skip: Callable[..., bool] = lambda **axes: False, **axes: Sequence
) -> Iterator[ml_collections.ConfigDict]:
    """`make(**point)` for every point of the product of `axes`, in order, where `skip(**point)` is false.

    product(cell, size=SIZES, heads=[(8, 8), (8, 1)], skip=lambda size, heads: size == "3M" and heads[0] > 8)
    """
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        if not skip(**point):
            yield make(**point)


def load(path: str) -> Grid:
    """The Grid of a grid file. Raises ConfigError when there is none, or it can't be used."""
    found = grid_file.returned_by(path)
    if not isinstance(found, Grid):
        raise ConfigError(f"{path}: get_grid() returns a {type(found).__name__}, it must return a launch.grid.Grid")
    return found


def cells(grid: Grid, unseen: Collection[str] = ()) -> list[Cell]:
    """The cells of a grid, those that train checked against their token stores as a run would; parents before their children.

    Raises ConfigError: a configuration that can't be used, two cells that are the same run, a store that is too short, a cell
    that continues one which is not there. A store that does not exist yet, or is `unseen`, is no error here: its cells have no
    fingerprint.
    """
    found: list[Cell] = [*training_cells.make(grid.name, grid.configs, grid.old_rules, unseen)]
    with grid_file.blamed(getattr(getattr(grid.others, "__code__", None), "co_filename", f"grid {grid.name!r}")):
        found += grid.others(tuple(found))
    if twice := [name for name, count in Counter(cell.name for cell in found).items() if count > 1]:
        raise ConfigError(f"two cells of grid {grid.name!r} are the same run, {twice[0]}: remove one, or change its seed")
    return found


def under_old_rules(grid: Grid) -> Grid:
    """The grid as the first version had it; a store of one's own is the one that is there."""
    return dataclasses.replace(grid, old_rules=True)


def part(path: os.PathLike | str, names: Sequence[str], seeds: Mapping[str, Sequence[int]] | None = None) -> Grid:
    """The cells of those names (and their parents) of another grid file, and cells of it with other `seeds`.

    A name may be of a cell under the rules of the first version (`under_old_rules`), which is then part of the grid.

    Raises ConfigError for a name that the file has no cell of: it was changed since.
    """
    whole, seeds = load(os.fspath(path)), dict(seeds or {})
    by_name = {cell.name: cell for cell in training(cells(whole))}
    if any(name not in by_name for name in [*names, *seeds]):
        with contextlib.suppress(ConfigError):  # then there is no such cell
            old = training(cells(under_old_rules(whole)))
            by_name |= {cell.name: cell for cell in old if cell.name not in by_name}
    if unknown := [name for name in [*names, *seeds] if name not in by_name]:
        raise ConfigError(f"{path} has no cell {unknown[0]} (any more): {closest(unknown[0], by_name)}")
    wanted = set(names)
    for name in names:
        while (parent := by_name[name].parent) is not None:
            wanted.add(name := parent)
    configs = [cell.config for cell in by_name.values() if cell.name in wanted]
    configs += [dataclasses.replace(by_name[name].config, seed=seed) for name, others in seeds.items() for seed in others]
    return dataclasses.replace(whole, configs=configs)
