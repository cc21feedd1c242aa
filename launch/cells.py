"""Cells: the units of work of a grid, whatever their kind, and where their folders lie.

A cell is a process in a folder that keeps the records of `gqa_jax.training.run_folder`: config.json, attempts/, heartbeat.json,
exit.json, result.json. The launcher reads and writes these alone; what config.json, heartbeat.json and result.json say is
asked of the kind.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from etils import epath

from gqa_jax import storage

REPOSITORY = Path(__file__).resolve().parents[1]


class Cell(Protocol):
    """What a kind of cells must have for `state`, `run`, the engines and the tables, which know no more of it."""

    kind: ClassVar[str]
    listed: ClassVar[str]  # the list of grid.json that its names are in
    name: str  # unique in its grid, on every engine: [a-z][a-z0-9-]{0,48}
    place: str  # its folder, seen from that of the grid
    parent: str | None  # name of the cell that must be done before it starts
    size: Hashable  # cells of one kind and size fail alike
    inputs: Mapping[str, str]  # what its process reads beside its folder, by field: a token store, parameters to start from
    steps: int  # that its process takes
    missing: str | None  # what must be made before it can start, and how
    train_flops: float  # of its process, by which the time that is left is shared out

    @property
    def identity(self) -> dict[str, Any]:
        """What its result is a function of."""

    def describe(self) -> dict[str, Any]:
        """What `plan`, `--where` and the tables say of it before it has run."""

    def stored(self) -> dict[str, Any]:
        """What config.json of its folder holds."""

    def command(self, folder: os.PathLike, python: str = sys.executable, code: str | Path = REPOSITORY) -> list[str]:
        """Its process, by this Python with the code in this folder; also what a person types to repeat it."""

    def edited(self, folder: os.PathLike) -> str | None:
        """What somebody has changed in config.json: the folder is not this cell's any more. ValueError: it is broken."""

    # Of a folder alone: a class answers it without a cell.

    @staticmethod
    def waits_for(folder: os.PathLike) -> tuple[type[Cell], epath.Path] | None:
        """Kind and folder of the parent of the cell in this one."""

    @staticmethod
    def progress(folder: os.PathLike) -> dict[str, Any]:
        """What its process last said of itself: `time`, in seconds since the epoch; all else may be missing: `step` of
        `steps`, `tokens_per_second`, `eta_seconds`, `host`, `device` (its kind), `device_seconds`.
        """

    @staticmethod
    def finished(folder: os.PathLike) -> dict[str, Any] | None:
        """Its result, None where there is none: `status` (done, diverged); all else may be missing: `cause`, `loss`, and
        `step`, `tokens_per_second`, `device`, `device_seconds` as of `progress`. Raises ValueError for one that is broken.
        """


def of_several(said: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each sentence of (name of a cell, sentence): the first of its cells, and how many more there are."""
    names: dict[str, list[str]] = {}
    for name, sentence in said:
        names.setdefault(sentence, []).append(name)
    more = {sentence: f" and {len(held) - 1} more" if len(held) > 1 else "" for sentence, held in names.items()}
    return [f"{held[0]}{more[sentence]}: {sentence}" for sentence, held in names.items()]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folder of a grid, local or on gs://: `cells/NAME` per cell, `tables/`, `figures/`, `grid.json`, which names the
    cells, and `cluster.json`, the engine that it was last run on.
    """

    root: epath.Path
    places: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # of cells that lie elsewhere, by name
    unseen: bool = False  # it can't be looked at (`launch.reach`): a plan or a dry run takes it to be empty

    def holding(self, cells: Iterable[Cell]) -> Layout:
        """The layout that knows where these cells lie."""
        return dataclasses.replace(self, places={c.name: c.place for c in cells if c.place != f"cells/{c.name}"})

    @functools.cached_property
    def _root(self) -> epath.Path | Path:
        """The root; a local one as pathlib's, which is several times as fast."""
        return self.root if storage.is_remote(self.root) else Path(self.root)

    def cell(self, name: str) -> epath.Path | Path:
        return self._root / self.places.get(name, f"cells/{name}")

    def names(self) -> list[str]:
        """Names of the cells whose folders may be there: those of cells/, and those that lie elsewhere."""
        return [*storage.names(self.root / "cells"), *self.places]

    @property
    def tables(self) -> epath.Path:
        return self.root / "tables"

    @property
    def figures(self) -> epath.Path:
        return self.root / "figures"

    @property
    def on_this_machine(self) -> Path:
        """What this machine keeps for a grid on gs://: locks, and what its processes print. The root itself of another."""
        if not storage.is_remote(self.root):
            return Path(self.root)
        return storage.cache("grids") / hashlib.sha256(os.fspath(self.root).encode()).hexdigest()[:16]
