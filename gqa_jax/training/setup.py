"""What must be right before a run trains: its folder, devices, data, the run that it continues. Bad input is a ConfigError.

Each is for all processes of a run together, and ends alike on all of them.
"""

from __future__ import annotations

import contextlib
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
from gqa_jax.training import distributed, program, run_folder

log = logging.getLogger("gqa_jax.train")


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Holds the folder, made by the primary, for the run."""
    with contextlib.ExitStack() as stack:
        with distributed.agree("--workdir"):
            if distributed.is_primary():
                stack.enter_context(run_folder.claim(workdir))
        yield


def attention_of(config: TrainConfig) -> str:
    """The implementation of attention that this run trains with here. Raises ConfigError when the one asked for can't."""
    try:
        return program.attention_of(config)
    except ValueError as error:
        raise ConfigError(f"execution.attention: {error}") from error


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


def source(config: TrainConfig, workdir: epath.Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of the run that this one continues, None when it continues none.

    Raises ConfigError unless that run is done, of the same parameters and data.
    """
    if config.continue_from is None:
        return None
    folder, name = storage.join(workdir, config.continue_from), f"continue_from = {config.continue_from!r}"

    def read() -> dict[str, Any]:
        try:
            result, values = run_folder.find_result(folder / "result.json"), storage.read_json(folder / "config.json")
            source = values and TrainConfig.from_stored(values)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from error
        if result is None:
            raise ConfigError(f"{name}: {folder} has no result.json: let that run end first, or name another")
        if source is None:
            raise ConfigError(f"{name}: {folder} has no config.json: it is no run that can be continued")
        if result["status"] != "done":
            raise ConfigError(f"{name}: that run {result['status']} at step {result['step']}")
        config.check_source(source)
        if result["data_fingerprint"] != fingerprint:
            raise ConfigError(
                f"{name} was trained on other data: data.fingerprint: {fingerprint[:12]} here, "
                f"{result['data_fingerprint'][:12]} there. Use the same token store{run_folder.data_of_first_version(config)}"
            )
        return result

    return distributed.from_primary("continue_from", read)


def finished(workdir: epath.Path, config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of this very run when it is over, else None, and no exit record of an attempt before.

    Raises ConfigError for a broken result, or one of another run.
    """
    path = workdir / "result.json"
    try:
        result = run_folder.find_result(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
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
