"""Grids: which cells there are, what they are called, where they live. Imports no jax.

A grid file defines `get_grid()`, which returns a `Grid`: any list of training configurations, made by `product` or by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from gqa_jax import costs
from gqa_jax.config import ConfigError, TrainConfig, closest, hash_identity
from gqa_jax.data import reader, store


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

    @functools.cached_property
    def name(self) -> str:
        """Readable, unique, and valid for every engine: `[a-z][a-z0-9-]{0,48}`; ends in the hash of the cell's identity."""
        config, model = self.config, self.config.model
        label = re.sub(r"[^a-z0-9]+", "p", (config.label or f"{model.n_layers}x{model.d_model}").lower())[:12]
        digest = hash_identity(config.identity(self.data_fingerprint or "unprepared"), 8)
        return f"s{label}-t{config.context_length}-h{model.n_heads}-{model.n_kv_heads}-{digest}"

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
            "seed": config.seed,
            "params_non_embedding": count.non_embedding,
            "params_total": count.total,
            "tokens": config.train_tokens,
            "steps": config.n_steps,
            "batch_tokens": config.batch_tokens,
            "train_flops": costs.train_flops(model, config.context_length, config.train_tokens, "exact"),
        }


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folder of a grid: `cells/NAME` per cell, `tables/`, `figures/`, and `grid.json`, which names the cells."""

    root: Path

    def cell(self, name: str) -> Path:
        return self.root / "cells" / name

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    @property
    def figures(self) -> Path:
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
        raise ConfigError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(grid, Grid):
        raise ConfigError(f"{path}: get_grid() returns a {type(grid).__name__}, it must return a launch.grid.Grid")
    if not grid.configs:
        raise ConfigError(f"{path}: the grid has no cells; check its axes and its skip rule")
    return grid


def cells(grid: Grid) -> list[Cell]:
    """The cells of a grid, checked against their token stores as a training run would.

    Raises ConfigError: a configuration that can't be used, two cells that are the same run, a store that is too short.
    A store that does not exist yet is no error here: its cells have no fingerprint.
    """
    result: dict[str, Cell] = {}
    stores: dict[str, store.TokenStore | None] = {}
    for number, values in enumerate(grid.configs):
        config = values
        try:
            if not isinstance(values, TrainConfig):
                config = TrainConfig.from_dict(values.to_dict())
            if config.data.store not in stores:
                stores[config.data.store] = _open(config.data.store)
            tokens = stores[config.data.store]
            if tokens is not None:
                reader.check(config, tokens)
        except ValueError as error:
            raise ConfigError(f"cell {number} of grid {grid.name!r}: {error}") from error
        cell = Cell(config, tokens.fingerprint if tokens else None)
        if cell.name in result:
            raise ConfigError(f"two cells of grid {grid.name!r} are the same run, {cell.name}: remove one, or change its seed")
        result[cell.name] = cell
    return list(result.values())


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


def facts(grid: Grid, all_cells: Sequence[Cell]) -> dict[str, Any]:
    """grid.json: what the tables need to know of the grid beside its cells (`gqa_jax.results.grid_facts`)."""
    return {
        "name": grid.name,
        "contexts_served": list(grid.contexts_served),
        "losses": list(grid.losses),
        "convention": grid.convention,
        "cells": [cell.name for cell in all_cells],
    }


def _open(name: str) -> store.TokenStore | None:
    if name not in store.BUILT_IN and not Path(name).exists():
        return None
    return store.open_store(name)
