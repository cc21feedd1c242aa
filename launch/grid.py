"""Grids: which cells there are, what they are called, where they live.

A grid file defines `get_grid()`, which returns a `Grid`: any list of training configurations, made by `product` or by hand. A
cell may go on from the parameters of another one, its parent (`continued`); it starts when that is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from gqa_jax import costs
from gqa_jax.config import TrainConfig, default_config, hash_identity, unknown_key_of
from gqa_jax.data import reader, store
from gqa_jax.errors import ConfigError, closest


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named set of training runs and what is asked of them."""

    name: str
    configs: Sequence[ml_collections.ConfigDict | TrainConfig]
    contexts_served: Sequence[int]  # T of the cost table and of the answer, tokens
    losses: Sequence[float] = ()  # L* of the answer; empty: chosen from what was reached
    convention: str = "figures"  # costs the answer minimises (gqa_jax.costs.CONVENTIONS)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    config: TrainConfig
    data_fingerprint: str | None  # None: the token store is not prepared yet, and the name is provisional
    parent: str | None = None  # name of the cell whose last parameters this one starts from
    continues: str | None = None  # hash of the parent's identity
    settings: tuple[str, ...] = ()  # flags of its training process: how it is carried out, as its compile check found to fit
    number: int = 0  # of its configuration among those of the grid
    holdout: str | None = None  # rule by which documents of its token store are held out; None: it is not prepared yet

    @property
    def identity(self) -> dict[str, Any]:
        """What its training run will call its identity."""
        return self.config.identity(self.data_fingerprint or "unprepared", self.continues)

    @functools.cached_property
    def name(self) -> str:
        """Readable, unique, and valid for every engine: `[a-z][a-z0-9-]{0,48}`; ends in the hash of the cell's identity."""
        config, model = self.config, self.config.model
        label = re.sub(r"[^a-z0-9]+", "p", (config.label or f"{model.n_layers}x{model.d_model}").lower())[:12]
        return f"s{label}-t{config.context_length}-h{model.n_heads}-{model.n_kv_heads}-{hash_identity(self.identity, 8)}"

    def describe(self) -> dict[str, Any]:
        """What `plan` and the tables say of a cell before it has run."""
        config, model = self.config, self.config.model
        count = costs.count_params(model, "exact")
        return {
            "cell": self.name,
            "size": config.label,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "n_heads": model.n_heads,
            "n_kv_heads": model.n_kv_heads,
            "head_dim": model.head_dim,
            "d_ff": model.d_ff,
            "vocab_size": model.vocab_size,
            "context": config.context_length,
            "continue_from": self.parent,
            "seed": config.seed,
            "params_non_embedding": count.non_embedding,
            "params_total": count.total,
            "tokens": config.train_tokens,
            "steps": config.n_steps,
            "batch_tokens": config.batch_tokens,
            "train_flops": self.train_flops,
        }

    @property
    def train_flops(self) -> float:
        """FLOPs of its training run, as its model counts them (`costs.train_flops`, convention "exact")."""
        config = self.config
        return costs.train_flops(config.model, config.context_length, config.train_tokens, "exact")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folder of a grid, local or on gs://: `cells/NAME` per cell, `tables/`, `figures/`, `grid.json`, which names the
    cells, and `cluster.json`, the engine that it was last run on.
    """

    root: epath.Path

    def cell(self, name: str) -> epath.Path:
        return self.root / "cells" / name

    @property
    def tables(self) -> epath.Path:
        return self.root / "tables"

    @property
    def figures(self) -> epath.Path:
        return self.root / "figures"


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
    first: ml_collections.ConfigDict | TrainConfig,
    *,
    context_length: int,
    learning_rate: float,
    tokens: int,
    schedule: str = "constant",
    **changes: Any,
) -> ml_collections.ConfigDict:
    """The second phase of `first`, a configuration of the same grid: from its last parameters, with a fresh optimizer.

    It has a context length, learning rate, schedule and budget of its own (arXiv 2503.09579v2, Appendix J), and `changes`, of
    any field. It reads on in the shuffled order where `first` stops, unless the order is another. What suits one context may
    not suit another, so mesh, accumulation and rematerialisation are open again.
    """
    source = first if isinstance(first, TrainConfig) else TrainConfig.from_dict(first.to_dict())
    config = default_config()
    config.update(source.to_dict())
    config.update(
        context_length=context_length,
        tokens=tokens,
        tokens_per_param=None,
        steps=None,
        continue_from=reference(source),
    )
    config.execution.update(mesh=None, remat=None, accumulation_steps=None, context_attention=None)
    config.optimizer.update(learning_rate=learning_rate, schedule=schedule)
    config.data.skip_tokens = 0
    config.update(changes)
    same_order = (config.seed, config.data.block_tokens) == (source.seed, source.data.block_tokens)
    if same_order and not config.data.skip_tokens:
        read = source.data.skip_tokens + source.train_tokens
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
    """The cells of a grid, checked against their token stores as a training run would; parents come before their children.

    Raises ConfigError: a configuration that can't be used, two cells that are the same run, a store that is too short, a cell
    that continues one which is not there. A store that does not exist yet is no error here: its cells have no fingerprint.
    """
    result: dict[str, Cell] = {}
    stores: dict[str, store.TokenStore | None] = {}
    by_reference: dict[str, Cell] = {}
    waiting: list[tuple[int, TrainConfig]] = []
    for number, values in enumerate(grid.configs):
        with _blame(grid, number):
            waiting.append((number, values if isinstance(values, TrainConfig) else TrainConfig.from_dict(values.to_dict())))
    while waiting:
        ready = [item for item in waiting if item[1].continue_from is None or item[1].continue_from in by_reference]
        if not ready:  # no cycle: a configuration that refers to another holds its hash
            with _blame(grid, waiting[0][0]):
                raise ConfigError(
                    f"continue_from = {waiting[0][1].continue_from!r} is no cell of this grid: put the configuration that "
                    "launch.grid.continued was given into the grid too, and don't change it after"
                )
        waiting = [item for item in waiting if item not in ready]
        for number, config in ready:
            with _blame(grid, number):
                if config.data.store not in stores:
                    stores[config.data.store] = _open(config.data.store)
                cell = _cell(config, stores[config.data.store], by_reference.get(config.continue_from), number)
            if cell.name in result:
                raise ConfigError(
                    f"two cells of grid {grid.name!r} are the same run, {cell.name}: remove one, or change its seed"
                )
            result[cell.name] = by_reference[reference(config)] = cell
    return list(result.values())


def _cell(config: TrainConfig, tokens: store.TokenStore | None, parent: Cell | None, number: int) -> Cell:
    if tokens is not None:
        reader.check(config, tokens)
    fingerprint, holdout = (tokens.fingerprint, tokens.holdout_rule) if tokens else (None, None)
    if parent is None:
        return Cell(config, fingerprint, number=number, holdout=holdout)
    config = dataclasses.replace(config, continue_from=f"../{parent.name}")  # folders of cells lie side by side
    config.check_source(parent.config)
    if fingerprint != parent.data_fingerprint:
        raise ConfigError(
            f"data.store = {config.data.store} is not the store of {parent.name}, which it continues "
            f"({parent.config.data.store}): use that one"
        )
    return Cell(config, fingerprint, parent.name, hash_identity(parent.identity), number=number, holdout=holdout)


def reference(config: TrainConfig) -> str:
    """Stands for a configuration of the same grid in `continue_from`, until `cells` knows what its folder is called."""
    return f"cell {hash_identity(config.identity(config.data.store, config.continue_from), 16)}"


def under_old_rules(grid: Grid) -> Grid:
    """The grid as the first version had it: its cells have the names that that version gave them.

    Every configuration is under its rules (`TrainConfig.under_old_rules`); a store of one's own is the one that is there.

    Raises ConfigError for a configuration that can't be used.
    """
    waiting, made = {}, {}
    for number, values in enumerate(grid.configs):
        with _blame(grid, number):
            waiting[number] = values if isinstance(values, TrainConfig) else TrainConfig.from_dict(values.to_dict())
    renamed: dict[str | None, str | None] = {None: None}  # what stands for a configuration, by what stood for it
    while ready := [number for number, config in waiting.items() if config.continue_from in renamed]:
        for number in ready:
            config = waiting.pop(number)
            made[number] = dataclasses.replace(config, continue_from=renamed[config.continue_from]).under_old_rules()
            renamed[reference(config)] = reference(made[number])
    made |= waiting  # these continue what is not in the grid, as `cells` says
    return dataclasses.replace(grid, configs=[made[number] for number in range(len(grid.configs))])


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
    whole = load(os.fspath(path))
    by_name = {cell.name: cell for cell in cells(whole)}
    seeds = dict(seeds or {})
    configs_of = dict.fromkeys(by_name, whole.configs)
    if any(name not in by_name for name in [*names, *seeds]):
        old = under_old_rules(whole)
        with contextlib.suppress(ConfigError):  # then there is no such cell
            by_name |= (others := {cell.name: cell for cell in cells(old) if cell.name not in by_name})
            configs_of |= dict.fromkeys(others, old.configs)
    if unknown := [name for name in [*names, *seeds] if name not in by_name]:
        raise ConfigError(f"{path} has no cell {unknown[0]} (any more): {closest(unknown[0], by_name)}")
    wanted = set(names)
    for name in names:
        while (parent := by_name[name].parent) is not None:
            wanted.add(name := parent)
    configs: list[ml_collections.ConfigDict | TrainConfig] = [configs_of[n][by_name[n].number] for n in by_name if n in wanted]
    for name, others in seeds.items():
        configs += [dataclasses.replace(by_name[name].config, seed=seed) for seed in others]
    return dataclasses.replace(whole, configs=configs)


def select(all_cells: Sequence[Cell], where: str | None) -> list[Cell]:
    """The cells whose fields (as `describe` names them) have the values of `where`: "size=19M,n_heads=8"."""
    if not where:
        return list(all_cells)
    chosen = list(all_cells)
    for term in where.split(","):
        name, _, value = term.partition("=")
        known = chosen[0].describe() if chosen else {}
        if known and name not in known:
            raise ConfigError(f"--where {term}: {name!r} is no field of a cell: {closest(name, known)}")
        chosen = [cell for cell in chosen if str(cell.describe()[name]) == value]
    if not chosen:
        raise ConfigError(f"--where {where}: no cell matches")
    return chosen


def facts(grid: Grid, all_cells: Sequence[Cell], old_cells: Sequence[str] = ()) -> dict[str, Any]:
    """grid.json: what the tables need to know of the grid beside its cells (`gqa_jax.results.grid_facts`).

    old_cells: names of those that were finished or begun under other rules, and stay in the tables.
    """
    found = {
        "name": grid.name,
        "contexts_served": list(grid.contexts_served),
        "losses": list(grid.losses),
        "convention": grid.convention,
        "cells": [cell.name for cell in all_cells],
    }
    return found | ({"old_cells": list(old_cells)} if old_cells else {})


def _open(name: str) -> store.TokenStore | None:
    return store.open_store(name) if store.exists(name) else None
