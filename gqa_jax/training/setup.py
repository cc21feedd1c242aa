"""What must be right before a run trains: its folder, devices, data, where it starts. Bad input is a ConfigError.

Each is for all processes of a run together, and ends alike on all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from gqa_jax import storage
from gqa_jax.config import TrainConfig, hash_identity
from gqa_jax.data import catalog, reader, store
from gqa_jax.errors import ConfigError
from gqa_jax.planning import planner
from gqa_jax.training import distributed, run_folder, start
from gqa_jax.training.checkpoint import restore_start
from gqa_jax.training.start import FROM_SCRATCH, Start

log = logging.getLogger("gqa_jax.train")


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Holds the folder, made by the primary, for the run."""
    with contextlib.ExitStack() as stack:
        with distributed.agree("--workdir"):
            if distributed.is_primary():
                stack.enter_context(run_folder.claim(workdir))
        yield


def warn_of_narrow_parameters(config: TrainConfig) -> None:
    if config.model.param_dtype == "bfloat16":
        log.warning(
            "model.param_dtype = bfloat16: updates smaller than about 1/256 of a parameter are lost, and scales of norms, "
            "which begin at 1, stay on a grid of 1/256: use float32 for losses that are compared"
        )


class Data(NamedTuple):
    """The token store of a run, cut as the run reads it."""

    store: store.TokenStore
    train: reader.Batches
    held_out: reader.EvalBatches

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint


def open_data(config: TrainConfig) -> Data:
    """The token store and its batches. Raises ConfigError when it can't be read or is too small for the run."""
    with distributed.agree("data"):
        try:
            tokens = catalog.open_store(config.data.store)
            opened = Data(tokens, *reader.check(config, tokens))
            _ = opened.held_out.documents  # a tokenizer that is gone is an error before training
        except ValueError as error:
            raise ConfigError(str(error)) from error
    expected = distributed.from_primary("fingerprint of the data", lambda: tokens.fingerprint)
    with distributed.agree("data"):
        if tokens.fingerprint != expected:
            raise ConfigError(
                f"the token store {tokens.path} has the fingerprint {tokens.fingerprint[:12]} and that of process 0 "
                f"{expected[:12]}: copy that one here"
            )
    return opened


def start_of(config: TrainConfig, workdir: epath.Path, tokens: store.TokenStore) -> Start:
    """Where the parameters of this run come from; warns of what is other than there.

    Raises ConfigError unless `continue_from`, where it is given, is a run that is done or an import, of the same parameters
    and vocabulary.
    """
    if config.continue_from is None:
        return FROM_SCRATCH
    with distributed.agree("continue_from"):
        found = start.of_folder(storage.join(workdir, config.continue_from), f"continue_from = {config.continue_from!r}")
        found = dataclasses.replace(found, differs=tuple(found.differences(config, tokens.fingerprint, tokens.vocabulary)))
    for line in found.differs:
        of_first = run_folder.data_of_first_version(config) if line.startswith("data.") else ""
        log.warning("continue_from = %r: not as it was there: %s%s", config.continue_from, line, of_first)
    return found


def starting_params(source: Start, config: TrainConfig, abstract_params: dict) -> dict:
    """The parameters of a start, placed as `abstract_params`, their heads made those of the run."""
    if config.convert_heads is None:
        return restore_start(source, abstract_params)
    from gqa_jax.conversion import heads

    return heads.restored(source, config.model, config.convert_heads, abstract_params)


def finished(workdir: epath.Path, config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of this very run when it is over, else None, and no exit record of an attempt before.

    Raises ConfigError for a broken result, or one of another run.
    """
    path = workdir / "result.json"
    result = run_folder.find_result(path)
    if result is None:
        storage.remove(workdir / "exit.json")
        return None
    if result["identity"] == hash_identity(identity):
        return result
    ours, theirs = identity["data"]["fingerprint"], result.get("data_fingerprint")
    what = "another configuration or other data"
    if theirs and ours != theirs:
        what = f"other data (data.fingerprint: {ours[:12]} here, {theirs[:12]} there{run_folder.data_of_first_version(config)})"
    raise ConfigError(f"{path} is of {what}: use another --workdir")


def read(batches: reader.Batches, start_step: int, stop_step: int) -> Iterator[dict[str, np.ndarray]]:
    """`reader.read`; a store that turns out to be damaged is bad input, where no other process has to hear of it."""
    try:
        yield from reader.read(batches, start_step, stop_step)
    except reader.ReaderError as error:
        if jax.process_count() > 1:
            raise
        raise ConfigError(str(error)) from error


def check_memory(config: TrainConfig, mesh: jax.sharding.Mesh, step_fn: jax.stages.Compiled) -> None:
    """Raises ConfigError, on all processes, when a step needs more memory than the devices give, saying what would fit."""
    with distributed.agree("memory"):
        device = mesh.local_devices[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = step_fn.memory_analysis()
        if limit is None or memory is None:
            return
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        used += memory.temp_size_in_bytes
        if used <= limit:
            return
        raise ConfigError(
            f"a step needs {used / 2**30:.2f} GiB of each {device.device_kind}, which gives {limit / 2**30:.2f}: "
            + planner.what_fits(config, device.device_kind, mesh.size)
        )
