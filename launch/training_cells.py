"""Cells that train: a process of `gqa_jax.train` each."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Hashable, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from etils import epath

from gqa_jax import costs, storage
from gqa_jax.config import TrainConfig, differing_fields, hash_identity
from gqa_jax.training import run_folder, start
from gqa_jax.training.start import FROM_SCRATCH, Start
from launch.cells import REPOSITORY, Cell, record

if TYPE_CHECKING:
    from gqa_jax.data.store import TokenStore


@dataclasses.dataclass(frozen=True)
class TrainingCell:
    """One training run of a grid."""

    kind: ClassVar[str] = "training"
    listed: ClassVar[str] = "cells"

    config: TrainConfig
    data_fingerprint: str | None  # None: the token store is not prepared yet, and the name is provisional
    parent: str | None = None  # name of the cell whose last parameters this one starts from
    start: Start = FROM_SCRATCH  # where its parameters come from: the parent, or a folder outside of the grid
    settings: tuple[str, ...] = ()  # flags of its process: how it is carried out, as was compiled and found to fit
    holdout: str | None = None  # rule by which documents of its token store are held out; None: it is not prepared yet

    @property
    def identity(self) -> dict[str, Any]:
        return self.config.identity(self.data_fingerprint or "unprepared", self.start.identity)

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
    def inputs(self) -> dict[str, str]:
        folder = self.config.continue_from if self.parent is None else None
        return {"data.store": self.config.data.store} | ({"continue_from": folder} if folder else {})

    @property
    def steps(self) -> int:
        return self.config.n_steps

    @property
    def train_flops(self) -> float:
        """FLOPs of its training run, as its model counts them (`costs.train_flops`, convention "exact")."""
        config = self.config
        return costs.train_flops(config.model, config.context_length, config.train_tokens, "exact")

    @property
    def missing(self) -> str | None:
        if self.data_fingerprint is not None:
            return None
        store = self.config.data.store
        return f"token store {store} is not there: make it with `python -m gqa_jax.data.prepare --out {store} ...`"

    def describe(self) -> dict[str, Any]:
        config, model = self.config, self.config.model
        count = costs.count_params(model, "exact")
        shape = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
        return {
            "cell": self.name,
            "size": config.label,
            **{name: getattr(model, name) for name in shape},
            "context": config.context_length,
            "continue_from": config.continue_from and PurePosixPath(config.continue_from).name,
            "seed": config.seed,
            "params_non_embedding": count.non_embedding,
            "params_total": count.total,
            "tokens": config.train_tokens,
            "steps": config.n_steps,
            "batch_tokens": config.batch_tokens,
            "train_flops": self.train_flops,
        }

    def as_start(self, tokens: TokenStore | None) -> Start:
        """Where a cell starts that continues this one; `tokens`: its token store, where it is there."""
        known = hash_identity(self.identity), self.steps, self.config.model, self.config, self.data_fingerprint
        return Start(start.RUN, None, *known, tokens and tokens.vocabulary)

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
    def waits_for(folder: os.PathLike) -> tuple[type[TrainingCell], epath.Path] | None:
        source = record(epath.Path(folder) / "config.json").get("continue_from")
        if source is None or not source.startswith("../"):  # what is outside of the grid was done when the cell was made
            return None
        joined = storage.join(folder, source)
        return TrainingCell, joined if storage.is_remote(joined) else epath.Path(os.path.normpath(joined))

    @staticmethod
    def progress(folder: os.PathLike) -> dict[str, Any]:
        return record(folder / "heartbeat.json")

    @staticmethod
    def finished(folder: os.PathLike) -> dict[str, Any] | None:
        result = run_folder.find_result(folder / "result.json")
        if result is not None and result["status"] == "diverged":
            return result | {"cause": f"not finite at step {result['step']}"}
        return result


def training(cells: Iterable[Cell]) -> list[TrainingCell]:
    """Those of them that train."""
    return [cell for cell in cells if isinstance(cell, TrainingCell)]
