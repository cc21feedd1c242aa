"""Cells that train: a process of `gqa_jax.train` each, made of the configurations of a grid."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import ml_collections
from etils import epath

from gqa_jax import costs, storage
from gqa_jax.config import (
    HEAD_METHOD,
    ModelConfig,
    TrainConfig,
    check_heads,
    default_config,
    differing_fields,
    from_mapping,
    hash_identity,
)
from gqa_jax.data import catalog, reader
from gqa_jax.data.store import TokenStore
from gqa_jax.errors import ConfigError
from gqa_jax.training import records, run_folder, start
from gqa_jax.training.start import FROM_SCRATCH, Start
from launch.cells import REPOSITORY, Cell, of_several


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
        path = os.path.join(folder, "config.json")
        try:
            values = storage.read_json(path)
            if values is None:
                raise ConfigError("a link to nothing")
            if values == self.config.to_dict():
                return None
            configs = self.config, TrainConfig.from_stored(values)
        except ValueError as error:
            raise ConfigError(
                f"{path} can't be used ({error!s:.500}): `retry` moves it aside, and `run` writes it again"
            ) from error
        lines = differing_fields(*(config.identity("", config.continue_from) for config in configs))
        if not lines:
            return None
        return f"{path} was changed: {'; '.join(lines)}. Change it back, or move the folder away"

    @staticmethod
    def waits_for(folder: os.PathLike) -> tuple[type[TrainingCell], epath.Path] | None:
        parent = above = _parent(folder)
        seen = {os.path.normpath(folder)}
        while above is not None and os.path.normpath(above) not in seen:
            seen.add(os.path.normpath(above))
            above = _parent(above)
        in_a_ring = above is not None  # by a config.json that somebody has changed: `edited` says so
        return None if parent is None or in_a_ring else (TrainingCell, parent)

    @staticmethod
    def progress(folder: os.PathLike) -> dict[str, Any]:
        return records.read(os.path.join(folder, "heartbeat.json"))

    @staticmethod
    def finished(folder: os.PathLike) -> dict[str, Any] | None:
        result = run_folder.find_result(os.path.join(folder, "result.json"))
        if result is not None and result["status"] == "diverged":
            return result | {"cause": f"not finite at step {result['step']}"}
        return result


def _parent(folder: os.PathLike) -> epath.Path | None:
    """Folder of the cell that the one in this folder continues, of the same grid."""
    source = records.read(os.path.join(folder, "config.json")).get("continue_from")
    if source is None or not source.startswith("../"):  # what is outside of the grid was done when the cell was made
        return None
    try:
        joined = storage.join(folder, source)
    except ConfigError:  # out of the bucket
        return None
    return joined if storage.is_remote(joined) else epath.Path(os.path.normpath(joined))


def training(cells: Iterable[Cell]) -> list[TrainingCell]:
    """Those of them that train."""
    return [cell for cell in cells if isinstance(cell, TrainingCell)]


def said(cells: Iterable[Cell]) -> list[str]:
    """What is other than where cells start, a line for each difference."""
    return of_several((cell.name, f"not as where it starts: {line}") for cell in training(cells) for line in cell.start.differs)


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
    config, fingerprint = default_config(), None
    if isinstance(first, str | os.PathLike):
        found = start.of_folder(_absolute(first))
        fingerprint = found.data_fingerprint
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
    if source is not None and not config.data.skip_tokens and _same_order(config, source, fingerprint):
        read = source.data.skip_tokens + source.train_tokens
        config.data.skip_tokens = -(-read // config.context_length) * config.context_length
    return config


def converted(
    first: ml_collections.ConfigDict | TrainConfig | os.PathLike | str,
    n_kv_heads: int,
    tokens: float,
    *,
    n_heads: int | None = None,
    method: str = HEAD_METHOD,
    **changes: Any,
) -> ml_collections.ConfigDict:
    """A run that goes on from the last parameters of `first` with other heads: one checkpoint becomes every H.

    It reads on where `first` stops, with its recipe (the whole schedule again, of fewer steps) and a fresh optimizer.

    Args:
      first: as of `continued`; of an import give `learning_rate`, data, batch_tokens and evaluation among the changes.
      n_kv_heads: fewer are pooled by `method` (`gqa_jax.conversion.heads`), more are repetitions.
      tokens: of its training; up to 1 a share of those of `first`. Rounded up to whole steps.
      n_heads: query heads, those that write most; None: all.
      changes: of any field, as of `continued`; `learning_rate` and `schedule` too.
    Raises:
      ConfigError: heads that can't be made of those of `first`; a share of the tokens of an import, which are not known.
    """
    whole = start.of_folder(_absolute(first)) if isinstance(first, str | os.PathLike) else None
    source = first if isinstance(first, TrainConfig) else None
    if source is None:
        source = whole.config if whole is not None else TrainConfig.from_dict(first.to_dict())
    if source is None and tokens <= 1:
        raise ConfigError(f"tokens = {tokens}: a share of the tokens of an import, which are not known: give their number")
    recipe = {} if source is None else {"learning_rate": source.optimizer.learning_rate, "schedule": source.optimizer.schedule}
    context = changes.pop("context_length", None) or (whole.context if source is None else source.context_length)
    count = math.ceil(tokens * source.train_tokens) if tokens <= 1 else int(tokens)
    config = continued(first, context_length=context, tokens=count, **(recipe | changes))
    model = from_mapping(ModelConfig, config.model.to_dict())
    n_heads = model.n_heads if n_heads is None else n_heads
    check_heads(model, n_heads, n_kv_heads)
    config.model.update(n_heads=n_heads, n_kv_heads=n_kv_heads)
    config.convert_heads = method
    return config


def _same_order(config: ml_collections.ConfigDict, source: TrainConfig, fingerprint: str | None) -> bool:
    """Whether both read the same tokens in the same order; `fingerprint`: of those of `source`, where it is known."""
    store = config.data.store
    if fingerprint is None or not catalog.exists(store):
        same = store == source.data.store
    else:
        same = catalog.open_store(store).fingerprint == fingerprint
    return same and (config.seed, config.data.block_tokens) == (source.seed, source.data.block_tokens)


def make(
    name: str,
    configs: Sequence[ml_collections.ConfigDict | TrainConfig],
    old_rules: bool = False,
    unseen: Collection[str] = (),
) -> list[TrainingCell]:
    """The cells of the grid of this name, checked against their token stores as a run would; parents before their children.

    Args:
      old_rules: they are those of the first version (`TrainConfig.under_old_rules`).
      unseen: token stores that can't be looked at, and count as not prepared.
    Raises:
      ConfigError: as `launch.grid.cells`.
    """
    found: list[TrainingCell] = []
    opened = functools.cache(lambda name: catalog.open_store(name) if name not in unseen and catalog.exists(name) else None)
    of_folder = functools.cache(start.of_folder)
    parents: dict[str, TrainingCell] = {}  # by what stands for them in `continue_from`
    waiting: dict[int, TrainConfig] = {}
    for number, values in enumerate(configs):
        with _blame(name, number):
            waiting[number] = values if isinstance(values, TrainConfig) else TrainConfig.from_dict(values.to_dict())
    has_phases = any(map(_is_inside, waiting.values()))
    while waiting:
        ready = [number for number, config in waiting.items() if config.continue_from in parents or not _is_inside(config)]
        for number in ready or list(waiting):
            config = waiting.pop(number)
            with _blame(name, number):
                ruled = config.under_old_rules() if old_rules else config
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
            if has_phases:
                parents[reference(config)] = parents[f"../{cell.name}"] = cell
    return found


def stores(configs: Iterable[ml_collections.ConfigDict | TrainConfig]) -> list[str]:
    """Names of the token stores that they read, each once."""
    names = (getattr(getattr(config, "data", None), "store", None) for config in configs)
    return [*dict.fromkeys(name for name in names if isinstance(name, str))]


def _cell(config: TrainConfig, tokens: TokenStore | None, source: Start, parent: TrainingCell | None) -> TrainingCell:
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


@contextlib.contextmanager
def _blame(grid: str, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"cell {number} of grid {grid!r}: {error}") from error
