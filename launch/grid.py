"""Grids: which cells there are, what they are called, where they live.

A grid file defines `get_grid()`, which returns a `Grid`: any list of training configurations, made by `product` or by hand. A
cell may go on from the parameters of another one, its parent, and starts when that is done; or from those of a run that is no
cell of the grid, or of an import (`continued`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from gqa_jax import storage
from gqa_jax.config import TrainConfig, default_config, hash_identity, unknown_key_of
from gqa_jax.data import catalog, reader, store
from gqa_jax.errors import ConfigError, closest
from gqa_jax.training import start
from gqa_jax.training.start import FROM_SCRATCH, Start
from launch.cells import Cell
from launch.training_cells import TrainingCell, training


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named set of training runs, what is asked of them, and cells of other kinds that follow from them."""

    name: str
    configs: Sequence[ml_collections.ConfigDict | TrainConfig]
    contexts_served: Sequence[int]  # T of the cost table and of the answer, tokens
    losses: Sequence[float] = ()  # L* of the answer; empty: chosen from what was reached
    convention: str = "figures"  # costs the answer minimises (gqa_jax.costs.CONVENTIONS)
    others: Callable[[Sequence[TrainingCell]], Sequence[Cell]] = lambda trained: ()  # cells of other kinds, of those that train
    old_rules: bool = False  # its cells are those of the first version (`TrainConfig.under_old_rules`), by their names too


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


def continued(
    first: ml_collections.ConfigDict | TrainConfig | os.PathLike | str,
    *,
    context_length: int,
    learning_rate: float,
    tokens: int,
    schedule: str = "constant",
    rope_theta: float | None = None,
    **changes: Any,
) -> ml_collections.ConfigDict:
    """A second phase: from the last parameters of `first`, with a fresh optimizer.

    It has a context length, learning rate, schedule and budget of its own (arXiv 2503.09579v2, Appendix J), and `changes`, of
    any field but those that give the parameters their shapes. It reads on in the shuffled order where `first` stops, unless
    the order or the store is another. What suits one context may not suit another, so mesh, accumulation and rematerialisation
    are open again.

    Args:
      first: a configuration of the same grid; or the folder, local or on gs://, of a run that is done or of imported parameters
        (`gqa_jax.training.start`), whose cells then are named by what is in it. An import brings its model alone: give data,
        batch_tokens and evaluation among the changes.
      rope_theta: base of the positions; None: as there.
    Raises:
      ConfigError: the folder is neither.
    """
    config = default_config()
    if isinstance(first, str | os.PathLike):
        found = start.of_folder(_absolute(first))
        source, continue_from, values = found.config, _absolute(first), {"model": dataclasses.asdict(found.model)}
    else:
        source = first if isinstance(first, TrainConfig) else TrainConfig.from_dict(first.to_dict())
        continue_from = reference(source)
    config.update(values if source is None else source.to_dict())
    config.update(
        context_length=context_length,
        tokens=tokens,
        tokens_per_param=None,
        steps=None,
        continue_from=continue_from,
    )
    config.execution.update(mesh=None, remat=None, accumulation_steps=None, context_attention=None)
    config.optimizer.update(learning_rate=learning_rate, schedule=schedule)
    config.data.skip_tokens = 0
    if rope_theta is not None:
        config.model.rope_theta = rope_theta
    config.update(changes)
    if source is not None and not config.data.skip_tokens:
        ours, theirs = ((c.seed, c.data.block_tokens, c.data.store) for c in (config, source))
        read = source.data.skip_tokens + source.train_tokens if ours == theirs else 0
        config.data.skip_tokens = -(-read // config.context_length) * config.context_length
    return config


def load(path: str) -> Grid:
    """The Grid of a grid file. Raises ConfigError when there is none, or it can't be used."""
    file = Path(path)
    if not file.is_file():
        there = sorted(str(p) for p in Path("configs/grids").glob("*.py"))
        raise ConfigError(f"grid file {path} is not there: {closest(path, there) if there else 'give the path of a .py file'}")
    spec = importlib.util.spec_from_file_location(f"grid_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_grid = getattr(module, "get_grid", None)
        if get_grid is None:
            raise ConfigError("it defines no get_grid()")
        grid = get_grid()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{path} fails: {unknown_key_of(error) or f'{type(error).__name__}: {error}'}") from error
    if not isinstance(grid, Grid):
        raise ConfigError(f"{path}: get_grid() returns a {type(grid).__name__}, it must return a launch.grid.Grid")
    if not grid.configs:
        raise ConfigError(f"{path}: the grid has no cells; check its axes and its skip rule")
    return grid


def cells(grid: Grid) -> list[Cell]:
    """The cells of a grid, those that train checked against their token stores as a run would; parents before their children.

    Raises ConfigError: a configuration that can't be used, two cells that are the same run, a store that is too short, a cell
    that continues one which is not there. A store that does not exist yet is no error here: its cells have no fingerprint.
    """
    found: list[Cell] = []
    opened = functools.cache(lambda name: catalog.open_store(name) if catalog.exists(name) else None)
    of_folder = functools.cache(start.of_folder)
    parents: dict[str, TrainingCell] = {}  # by what stands for them in `continue_from`
    waiting: dict[int, TrainConfig] = {}
    for number, values in enumerate(grid.configs):
        with _blame(grid, number):
            waiting[number] = values if isinstance(values, TrainConfig) else TrainConfig.from_dict(values.to_dict())
    while waiting:
        ready = [number for number, config in waiting.items() if config.continue_from in parents or not _is_inside(config)]
        for number in ready or list(waiting):
            config = waiting.pop(number)
            with _blame(grid, number):
                ruled = config.under_old_rules() if grid.old_rules else config
                parent, source = None, FROM_SCRATCH
                if _is_inside(config):
                    if (parent := parents.get(config.continue_from)) is None:  # no cycle: who refers to another holds its hash
                        raise ConfigError(
                            f"continue_from = {config.continue_from!r} is no cell of this grid: put the configuration that "
                            "launch.grid.continued was given into the grid too, and don't change it after"
                        )
                    ruled = dataclasses.replace(ruled, continue_from=f"../{parent.name}")  # folders of cells lie side by side
                    source = parent.as_start(opened(parent.config.data.store))
                elif config.continue_from is not None:
                    ruled = dataclasses.replace(ruled, continue_from=_absolute(config.continue_from))
                    source = of_folder(ruled.continue_from, f"continue_from = {ruled.continue_from!r}")
                cell = _cell(ruled, opened(ruled.data.store), source, parent)
            found.append(cell)
            parents[reference(config)] = parents[f"../{cell.name}"] = cell
    found += grid.others(tuple(found))
    if twice := [name for name, count in Counter(cell.name for cell in found).items() if count > 1]:
        raise ConfigError(f"two cells of grid {grid.name!r} are the same run, {twice[0]}: remove one, or change its seed")
    return found


def _cell(config: TrainConfig, tokens: store.TokenStore | None, source: Start, parent: TrainingCell | None) -> TrainingCell:
    fingerprint = holdout = vocabulary = None
    if tokens is not None:
        reader.check(config, tokens)
        fingerprint, holdout, vocabulary = tokens.fingerprint, tokens.holdout_rule, tokens.vocabulary
    source = dataclasses.replace(source, differs=tuple(source.differences(config, fingerprint, vocabulary)))
    return TrainingCell(config, fingerprint, parent and parent.name, source, holdout=holdout)


def reference(config: TrainConfig) -> str:
    """Stands for a configuration of the same grid in `continue_from`, until `cells` knows what its folder is called."""
    return f"cell {hash_identity(config.identity(config.data.store, config.continue_from), 16)}"


def _is_inside(config: TrainConfig) -> bool:
    """Whether it continues a cell of its grid, by `reference` or by the cell's folder beside its own."""
    return re.match(r"\.\./|cell [0-9a-f]{16}$", config.continue_from or "") is not None


def _absolute(folder: os.PathLike | str) -> str:
    """A folder as every process of the grid finds it: absolute, or on gs://."""
    return os.fspath(folder) if storage.is_remote(folder) else os.path.abspath(os.path.expanduser(folder))


def under_old_rules(grid: Grid) -> Grid:
    """The grid as the first version had it; a store of one's own is the one that is there."""
    return dataclasses.replace(grid, old_rules=True)


@contextlib.contextmanager
def _blame(grid: Grid, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"cell {number} of grid {grid.name!r}: {error}") from error


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


def select[T: Cell](all_cells: Sequence[T], where: str | None) -> list[T]:
    """The cells whose fields (as `describe` names them) have the values of `where`: "size=19M,n_heads=8"."""
    chosen = list(all_cells)
    for term in where.split(",") if where else ():
        name, _, value = term.partition("=")
        if chosen and name not in (known := chosen[0].describe()):
            raise ConfigError(f"--where {term}: {name!r} is no field of a cell: {closest(name, known)}")
        chosen = [cell for cell in chosen if str(cell.describe()[name]) == value]
    if where and not chosen:
        raise ConfigError(f"--where {where}: no cell matches")
    return chosen


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
