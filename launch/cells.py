"""Cells: the units of work of a grid, whatever their kind, and where their folders lie; and the kind that trains.

A cell is a process in a folder that keeps the records of `gqa_jax.training.run_folder`: config.json, attempts/, heartbeat.json,
exit.json, result.json. The launcher reads and writes these alone; what config.json, heartbeat.json and result.json say is
asked of the kind.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from etils import epath

from gqa_jax import costs, storage
from gqa_jax.config import TrainConfig, differing_fields, hash_identity
from gqa_jax.training import run_folder

REPOSITORY = Path(__file__).resolve().parents[1]


class Cell(Protocol):
    """What a kind of cells must have for `state`, `run`, the engines and the tables, which know no more of it."""

    kind: ClassVar[str]
    listed: ClassVar[str]  # the list of grid.json that its names are in
    name: str  # unique in its grid, on every engine: [a-z][a-z0-9-]{0,48}
    place: str  # its folder, seen from that of the grid
    parent: str | None  # name of the cell that must be done before it starts
    size: Hashable  # cells of one kind and size fail alike
    store: str  # token store that its process reads
    steps: int  # that its process takes

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
        """What somebody has changed in config.json, so that the folder is not this cell's any more."""

    # Of a folder alone: a class answers it without a cell.

    @staticmethod
    def waits_for(folder: os.PathLike) -> epath.Path | None:
        """Folder of the parent of the cell in this one."""

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


@dataclasses.dataclass(frozen=True)
class TrainingCell:
    """One training run of a grid."""

    kind: ClassVar[str] = "training"
    listed: ClassVar[str] = "cells"

    config: TrainConfig
    data_fingerprint: str | None  # None: the token store is not prepared yet, and the name is provisional
    parent: str | None = None  # name of the cell whose last parameters this one starts from
    continues: str | None = None  # hash of the parent's identity
    settings: tuple[str, ...] = ()  # flags of its process: how it is carried out, as was compiled and found to fit
    number: int = 0  # of its configuration among those of the grid
    holdout: str | None = None  # rule by which documents of its token store are held out; None: it is not prepared yet

    @property
    def identity(self) -> dict[str, Any]:
        return self.config.identity(self.data_fingerprint or "unprepared", self.continues)

    @functools.cached_property
    def name(self) -> str:
        """Readable; ends in the hash of the cell's identity."""
        config, model = self.config, self.config.model
        label = re.sub(r"[^a-z0-9]+", "p", (config.label or f"{model.n_layers}x{model.d_model}").lower())[:12]
        return f"s{label}-t{config.context_length}-h{model.n_heads}-{model.n_kv_heads}-{hash_identity(self.identity, 8)}"

    @property
    def place(self) -> str:
        return f"cells/{self.name}"

    @property
    def size(self) -> Hashable:
        return self.config.model.n_layers, self.config.model.d_model, self.config.context_length

    @property
    def store(self) -> str:
        return self.config.data.store

    @property
    def steps(self) -> int:
        return self.config.n_steps

    @property
    def train_flops(self) -> float:
        """FLOPs of its training run, as its model counts them (`costs.train_flops`, convention "exact")."""
        config = self.config
        return costs.train_flops(config.model, config.context_length, config.train_tokens, "exact")

    def describe(self) -> dict[str, Any]:
        config, model = self.config, self.config.model
        count = costs.count_params(model, "exact")
        shape = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
        return {
            "cell": self.name,
            "size": config.label,
            **{name: getattr(model, name) for name in shape},
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

    def stored(self) -> dict[str, Any]:
        return self.config.to_dict()

    def command(self, folder: os.PathLike, python: str = sys.executable, code: str | Path = REPOSITORY) -> list[str]:
        config = f"{Path(code) / 'configs' / 'cell.py'}:{storage.path(folder) / 'config.json'}"
        return [python, "-m", "gqa_jax.train", f"--config={config}", f"--workdir={os.fspath(folder)}", *self.settings]

    def edited(self, folder: os.PathLike) -> str | None:
        path = folder / "config.json"
        try:
            values = json.loads(storage.read_bytes(path) or b"")
            if values == self.config.to_dict():
                return None
            configs = self.config, TrainConfig.from_stored(values)
            lines = differing_fields(*(config.identity("", config.continue_from) for config in configs))
        except ValueError as error:
            return f"{path} can't be used ({error}): move it away, and `run` writes it again"
        if not lines:
            return None
        return f"{path} was changed: {'; '.join(lines)}. Change it back, or move the folder away"

    @staticmethod
    def waits_for(folder: os.PathLike) -> epath.Path | None:
        source = record(epath.Path(folder) / "config.json").get("continue_from")
        if source is None:
            return None
        joined = storage.join(folder, source)
        return joined if storage.is_remote(joined) else epath.Path(os.path.normpath(joined))

    @staticmethod
    def progress(folder: os.PathLike) -> dict[str, Any]:
        return record(folder / "heartbeat.json")

    @staticmethod
    def finished(folder: os.PathLike) -> dict[str, Any] | None:
        result = run_folder.find_result(folder / "result.json")
        if result is not None and result["status"] == "diverged":
            return result | {"cause": f"not finite at step {result['step']}"}
        return result


def record(path: epath.Path) -> dict[str, Any]:
    """A small JSON file, {} when it is not there or broken: a heartbeat is never worth an error."""
    try:
        return storage.read_json(path) or {}
    except (OSError, ValueError):
        return {}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folder of a grid, local or on gs://: `cells/NAME` per cell, `tables/`, `figures/`, `grid.json`, which names the
    cells, and `cluster.json`, the engine that it was last run on.
    """

    root: epath.Path
    places: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # of cells that lie elsewhere, by name

    def holding(self, cells: Iterable[Cell]) -> Layout:
        """The layout that knows where these cells lie."""
        return dataclasses.replace(self, places={c.name: c.place for c in cells if c.place != f"cells/{c.name}"})

    def cell(self, name: str) -> epath.Path:
        return self.root / self.places.get(name, f"cells/{name}")

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
