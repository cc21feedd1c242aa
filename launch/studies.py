"""Where an answer comes from: the finished runs of a grid, or the paper's own data; and the laws of each training context."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from gqa_jax import presets, results, storage
from gqa_jax.errors import ConfigError
from gqa_jax.laws import LawsByHeads, fit_by_heads, points
from launch import grid
from launch.grid import Layout

PAPER_LOSSES = (3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.35)  # rows of its Table 4
PAPER_CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072)  # and its columns


@dataclass(frozen=True)
class Source:
    """What is asked: a loss table, and what its grid wants to know."""

    name: str
    loss: pd.DataFrame  # gqa_jax.results.LOSS_COLUMNS
    contexts_served: Sequence[int]
    losses: Sequence[float]  # empty: chosen from what was reached
    convention: str
    argument: str  # how a command line names it: a grid, or --preset NAME
    layout: Layout | None = None  # of a grid
    laws: LawsByHeads | None = None  # of a preset: not fitted here
    planned: Sequence[str] = ()  # names of the grid's cells


@dataclass(frozen=True)
class Fitted:
    """The laws of one training context, and the questions that are put to them."""

    context: int
    rows: pd.DataFrame  # of the loss table: those that were fitted
    laws: LawsByHeads
    losses: Sequence[float]
    contexts_served: Sequence[int]
    convention: str


@dataclass(frozen=True)
class Fits:
    """Every training context of a source, the one with most runs first; why others have no laws."""

    fitted: list[Fitted]
    unfitted: dict[int, str] = field(default_factory=dict)

    def at(self, context: int | None) -> Fitted:
        """The one of that training context; the one with most runs where none is named. Raises ConfigError."""
        if context is None:
            if not self.fitted:
                why = "; ".join(f"trained at {c}: {reason}" for c, reason in self.unfitted.items())
                raise ConfigError(f"no law can be fitted: {why}")
            return self.fitted[0]
        for one in self.fitted:
            if one.context == context:
                return one
        if context in self.unfitted:
            raise ConfigError(f"--train_context {context}: no law can be fitted: {self.unfitted[context]}")
        known = sorted([one.context for one in self.fitted] + list(self.unfitted))
        raise ConfigError(f"--train_context {context}: no run was trained there; there are {', '.join(map(str, known))}")


def of_preset(name: str) -> Source:
    """The paper's data (`gqa_jax.presets`)."""
    laws = presets.load(name)
    table = results.typed(presets.paper_losses() if name == "paper" else pd.DataFrame(), results.LOSS_COLUMNS)
    return Source(name, table, PAPER_CONTEXTS, PAPER_LOSSES, "figures", f"--preset {name}", laws=laws)


def of_grid(path: str, root: str | None = None, *, loss: pd.DataFrame | None = None) -> Source:
    """The runs of a grid: its file, and the folder it was run in; or that folder itself, local or gs://.

    `loss`: its loss table, where that has been read already.

    Raises ConfigError: neither is there, or nothing has finished.
    """
    if path.endswith(".py"):
        name = grid.load(path).name
        layout = Layout(storage.path(root or f"runs/{name}"))
    else:
        if root is not None and root != path:
            raise ConfigError(f"{path} is a folder, and --root {root} another: give one of them")
        layout = Layout(epath.Path(storage.path(path)))
        name = Path(str(path).rstrip("/")).name
        if not storage.is_remote(layout.root) and not layout.root.exists():
            raise ConfigError(f"{path} is not there: give a grid file (.py), or the folder of a grid that was run")
    facts = storage.read_json(layout.root / "grid.json") or {}
    try:
        loss = results.load_results(layout.root) if loss is None else loss
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: run the grid first, python -m launch run {shlex.quote(path)}") from error
    if loss.empty:
        raise ConfigError(f"no cell of {facts.get('name', name)} has finished in {layout.root}: run it first")
    argument = shlex.quote(path) + (f" --root {shlex.quote(root)}" if root else "")
    served = facts.get("contexts_served") or sorted({int(c) for c in loss["context"].unique()} | set(PAPER_CONTEXTS))
    return Source(
        facts.get("name", name), loss, served, facts.get("losses") or (), facts.get("convention", "figures"), argument, layout,
        planned=facts.get("cells") or (),
    )  # fmt: skip


def fit(source: Source, **options: Any) -> Fits:
    """The laws of every training context; H that have too few sizes yet are left out, and said in their warnings.

    options: of `gqa_jax.laws.fit_by_heads`.
    """
    if source.laws is not None:
        if options:
            raise ConfigError(f"the laws of {source.argument} are as they are; {', '.join(options)} is for grids")
        one = Fitted(
            source.laws.context, source.loss, source.laws, list(source.losses), list(source.contexts_served), source.convention
        )
        return Fits([one])
    fitted, unfitted = [], {}
    for context, rows in source.loss.groupby("context"):
        said: list[str] = []
        try:
            usable, _ = points.usable(rows)
            chosen, said = points.fittable(usable)  # sizes that one H lacks are no reason to know nothing of the others
            if chosen.empty:
                raise ValueError("; ".join(said))
            left_out = usable.index.difference(chosen.index)
            laws = fit_by_heads(rows.drop(left_out), **options)
        except ValueError as error:
            unfitted[int(context)] = str(error)
            continue
        laws.warnings = (*laws.warnings, *said)
        fitted.append(
            Fitted(int(context), chosen, laws, list(source.losses) or reachable(laws),
                   list(source.contexts_served), source.convention)
        )  # fmt: skip
    fitted.sort(key=lambda one: (-len(one.rows), -one.context))
    return Fits(fitted, unfitted)


def reachable(laws: LawsByHeads) -> list[float]:
    """Three losses that every H reaches inside the sizes it was trained at, where the ranges overlap; else their middle."""
    low = max(law.predict(law.params.max()) for law in laws.values())
    high = min(law.predict(law.params.min()) for law in laws.values())
    if low >= high:
        return [round(float((low + high) / 2), 3)]
    return [round(float(x), 3) for x in np.linspace(high, low, 5)[1:4]]
