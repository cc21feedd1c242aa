"""Trains one model: `python -m gqa_jax.train --config=configs/train/tiny.py --workdir=DIR [--config.KEY=VALUE ...]`.

The same command resumes a run that was interrupted, bit for bit on the same mesh: batches are a function of (seed, step), and
everything else that a step needs is in the checkpoint. Exit codes: 0 done, 2 bad configuration or input, 3 diverged, 75 saved
and asked to end (SIGTERM), 1 anything else.

DIR is a local folder or gs://BUCKET/FOLDER.

On several hosts it is the same command on each, with one folder that all of them see. Slurm and Cloud TPU are found; elsewhere
each process gets --coordinator=HOST:PORT --processes=N --process=I (gqa_jax/training/distributed.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import optax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from gqa_jax import costs, hardware, storage
from gqa_jax.config import Execution, TrainConfig, hash_identity
from gqa_jax.data import reader, store
from gqa_jax.errors import ConfigError
from gqa_jax.planning import planner
from gqa_jax.storage import write_json
from gqa_jax.training import command_line, distributed, evaluation, optimizer, program, run_folder, sharding
from gqa_jax.training.checkpoint import Checkpoints, params_sha256, restore_params
from gqa_jax.training.metrics import Metrics, NoMetrics
from gqa_jax.training.program import TrainState
from gqa_jax.training.run_folder import DeviceTime, Diverged, Preempted

log = logging.getLogger("gqa_jax.train")

PROFILE_STEPS = 5


def train_and_evaluate(
    config: TrainConfig,
    workdir: os.PathLike | str,
    *,
    profile: bool = False,
    heartbeat_seconds: int = distributed.HEARTBEAT_SECONDS,
    started: float | None = None,
) -> dict[str, Any]:
    """Runs (or resumes) a training run in `workdir` and returns what result.json holds. To be called by all processes.

    `workdir` is a local folder or on gs://. `started` says since when this process holds its devices, in seconds since the
    epoch; None: since now.

    Raises:
      ConfigError: a configuration, token store or device that can't be used, before anything is trained.
      Diverged: after result.json was written with status "diverged".
      Preempted: asked to end by SIGTERM, after saving.
    """
    started = time.time() if started is None else started
    workdir = storage.path(workdir)
    attempt = None

    def record(kind: str, reason: str, code: int = run_folder.EXIT_FAILED) -> None:
        if distributed.is_primary():
            run_folder.record_exit(workdir, code, kind, reason, attempt)

    with distributed.ends_together(record, heartbeat_seconds), _claimed(workdir):
        distributed.shared_folder(workdir)
        distributed.from_primary("config.json", lambda: run_folder.record_config(workdir, config))
        attempt, before = distributed.from_primary(
            "attempt", lambda: (run_folder.next_attempt(workdir), run_folder.device_seconds(workdir))
        )
        try:
            config = planner.resolve(config, jax.devices()[0].device_kind, len(jax.devices()), jax.process_count())
            mesh = sharding.make_mesh(config.execution.mesh)
            attention_of(config)  # one that can't run fails here, before anything is opened
            _warn_of_narrow_parameters(config)
            log.info("data: opening %s", config.data.store)
            fingerprint, train_batches, eval_batches = _open_data(config)
            source = _source(config, workdir, fingerprint)
            identity = config.identity(fingerprint, source and source["identity"])
            if (result := distributed.from_primary("result.json", lambda: _finished(workdir, config, identity))) is not None:
                log.info("result.json is there: nothing to do")
                return result
            device_time = DeviceTime(mesh.devices.flat[0].device_kind, mesh.size, started, before)
            with (
                Metrics(workdir, attempt, config, device_time) if distributed.is_primary() else NoMetrics() as metrics,
                Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
                distributed.Preemption() as preemption,
            ):
                run = _Run(
                    config, mesh, workdir, identity, fingerprint, source, attempt, metrics, checkpoints, preemption, device_time
                )
                return run(train_batches, eval_batches, profile)
        except Exception as error:
            record(*distributed.classify(error), exit_code(error))
            raise


@contextlib.contextmanager
def _claimed(workdir: epath.Path) -> Iterator[None]:
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


def _warn_of_narrow_parameters(config: TrainConfig) -> None:
    if config.model.param_dtype == "bfloat16":
        log.warning(
            "model.param_dtype = bfloat16: updates smaller than about 1/256 of a parameter are lost, and scales of norms, "
            "which begin at 1, stay on a grid of 1/256: use float32 for losses that are compared"
        )


def _open_data(config: TrainConfig) -> tuple[str, reader.Batches, reader.EvalBatches]:
    """Fingerprint and batches of the token store. Raises ConfigError when it can't be read or is too small for the run."""
    with distributed.agree("data"):
        try:
            tokens = store.open_store(config.data.store)
            opened = tokens.fingerprint, *reader.check(config, tokens)
            _ = opened[-1].documents  # a tokenizer that is gone is an error before training
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


def _source(config: TrainConfig, workdir: epath.Path, fingerprint: str) -> dict[str, Any] | None:
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


def _finished(workdir: epath.Path, config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
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


@dataclasses.dataclass
class _Run:
    """One attempt, from compilation to result.json."""

    config: TrainConfig  # resolved
    mesh: jax.sharding.Mesh
    workdir: epath.Path
    identity: dict[str, Any]
    data_fingerprint: str
    source: dict[str, Any] | None  # result of the run that this one continues
    attempt: int
    metrics: Metrics
    checkpoints: Checkpoints
    preemption: distributed.Preemption
    device_time: DeviceTime

    def __call__(self, train_batches: reader.Batches, eval_batches: reader.EvalBatches, profile: bool) -> dict[str, Any]:
        config = self.config
        self.held_out = {
            "rules": config.rules(eval_batches.holdout),
            "holdout": eval_batches.holdout,
            "heldout": config.heldout(self.data_fingerprint),
            "heldout_documents": eval_batches.heldout_documents,
            "heldout_tokens": eval_batches.heldout_tokens,
        }
        self._announce("devices", 0)
        mesh = self.mesh
        self.device = self.device_time.device
        how = config.execution
        self.environment = run_folder.environment(self.device, mesh.size) | {
            "n_processes": jax.process_count(),
            "mesh": str(how.mesh),
            "remat": how.remat,
            "accumulation_steps": how.accumulation_steps,
            "context_attention": how.context_attention if how.mesh.context > 1 else None,
        }
        if distributed.is_primary():
            write_json(self.workdir / "environment.json", self.environment)
        log.info("mesh %s of %d %s devices (%d there)", how.mesh, mesh.size, self.device, len(jax.devices()))

        self._announce("restore", 0)
        abstract = program.abstract_state(config, mesh)
        if (newest := self.checkpoints.newest_metadata()) is not None:
            run_folder.refuse_other_identity(self.workdir, self.identity, newest["identity"], config)
        restored = self.checkpoints.restore_newest(abstract)
        if restored is None:
            state, self.seconds_train, first_step = self._first_state(abstract), 0.0, 0
        else:
            state, self.seconds_train = restored.state, restored.metadata["seconds_train"]
            first_step = restored.step
            log.info("resuming after step %d of %d", first_step, config.n_steps)
        if distributed.is_primary():
            run_folder.record_attempt(self.workdir, self.attempt, first_step, self.device_time, jax.process_count())

        self._announce("compile", first_step)
        step_fn = program.compile_step(config, mesh)
        _check_memory(config, mesh, step_fn)
        losses_fn = program.evaluation_losses(config, mesh)
        rows = program.local_rows(config, mesh, how.accumulation_steps)
        every_row, in_order = np.arange(config.micro_batch), np.argsort(program.order(config))

        def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return program.place(config, mesh, batch, rows, how.accumulation_steps)

        def evaluate(params: dict) -> evaluation.Evaluation:
            def token_losses(batch: dict[str, np.ndarray]) -> np.ndarray:
                inputs = {name: batch[name] for name in program.abstract_batch(config, mesh)}
                return np.asarray(losses_fn(params, program.place(config, mesh, inputs, every_row, 1)))[:, in_order]

            return evaluation.evaluate(token_losses, eval_batches)

        self._announce("train", first_step)
        try:
            state = self._loop(step_fn, state, first_step, train_batches.for_rows(rows), place, evaluate, profile)
            self._announce("checkpoint", config.n_steps)
            self.checkpoints.wait()
            self._announce("evaluate", config.n_steps)
            final = self._evaluate(evaluate, state, config.n_steps)
        except Diverged as error:
            log.error("%s", error)
            self._write_result("diverged", error.step, None, None, None)
            raise
        return self._write_result("done", config.n_steps, final, self.train_loss, params_sha256(state.params))

    def _first_state(self, abstract: TrainState) -> TrainState:
        """The state before step 1: drawn, or with the last parameters of the run that this one continues."""
        config = self.config
        state = program.fresh_state(config, self.mesh)
        if self.source is None:
            return state
        folder = storage.join(self.workdir, config.continue_from)
        restored = restore_params(folder, abstract.params)
        if (restored.step, hash_identity(restored.metadata["identity"])) != (self.source["step"], self.source["identity"]):
            raise ConfigError(
                f"continue_from = {config.continue_from!r}: the newest checkpoint that can be used there is of step "
                f"{restored.step}, not the last ({self.source['step']}): run that one again in a new folder"
            )
        log.info("starting from the parameters of %s", folder)
        return dataclasses.replace(state, params=restored.state)

    def _loop(
        self,
        step_fn: Callable,
        state: TrainState,
        first_step: int,
        train_batches: reader.Batches,
        place: Callable,
        evaluate: Callable,
        profile: bool,
    ) -> TrainState:
        config = self.config
        schedule = jax.jit(optimizer.learning_rate(config.optimizer, config.n_steps))
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.train_loss = self._rate = None
        profile_at = range(first_step + 2, first_step + 2 + PROFILE_STEPS) if profile else range(0)
        self._clock = time.perf_counter()

        for step, batch in enumerate(_read(train_batches, first_step, config.n_steps), first_step + 1):
            if step in profile_at and step == profile_at.start:
                remote = storage.is_remote(self.workdir)  # where JAX writes no traces
                traces = Path(tempfile.mkdtemp(prefix="profile-") if remote else self.workdir / "profile")
                jax.profiler.start_trace(str(traces))
            state, step_metrics = step_fn(state, place(batch))
            pending.append((step, step_metrics))
            if len(pending) > 1:  # at most one step ahead of the device: errors and the heartbeat stay close to the truth
                jax.block_until_ready(pending[-2][1])
                self._beat(step - 1)
            if profile_at and step == min(profile_at.stop - 1, config.n_steps):
                jax.block_until_ready(step_metrics)
                jax.profiler.stop_trace()
                if remote:
                    storage.upload(traces, self.workdir / "profile")
                    shutil.rmtree(traces)
                log.info("profile of steps %d to %d: %s", profile_at.start, step, self.workdir / "profile")

            preempted = self.preemption.reached(step) and step < config.n_steps
            saves = step % config.checkpoint.every_steps == 0 or step == config.n_steps or preempted
            evaluates = config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and step < config.n_steps
            if step % config.logging.every_steps == 0 or saves or evaluates:
                self._flush(pending, schedule)
            if evaluates:
                self._evaluate(evaluate, state, step)
                self._clock = time.perf_counter()
            if saves:
                self.metrics.flush()  # these steps are not trained again
                self.checkpoints.save(
                    step,
                    state,
                    {"identity": self.identity, "config": config.to_dict(), "seconds_train": self.seconds_train},
                )
            if preempted:
                self._announce("checkpoint", step)
                self.checkpoints.wait()
                raise Preempted(step)
        return state

    def _flush(self, pending: list[tuple[int, dict[str, jax.Array]]], schedule: optax.Schedule) -> None:
        """Writes the steps done since the last call as rows; stops a run whose numbers are no longer finite."""
        config = self.config
        values = jax.device_get([step_metrics for _, step_metrics in pending])
        seconds = time.perf_counter() - self._clock
        self.seconds_train += seconds
        rate = len(pending) * config.batch_tokens / seconds
        last = pending[-1][0]
        for (step, _), row in zip(pending, values, strict=True):
            self.metrics.write(
                "train",
                step,
                {
                    "loss": float(row["loss"]),
                    "grad_norm": float(row["grad_norm"]),
                    "learning_rate": float(schedule(step - 1)),
                    "tokens": step * config.batch_tokens,
                    "tokens_per_second": rate,
                    "mfu": self._mfu(rate),
                    "seconds_train": self.seconds_train,
                },
            )
            for name in ("loss", "grad_norm"):
                if not math.isfinite(row[name]):
                    raise Diverged(step, f"training {name}", float(row[name]))
        pending.clear()
        self.train_loss = float(values[-1]["loss"])
        self._rate = rate
        self._beat(last)
        self._clock = time.perf_counter()

    def _beat(self, step: int) -> None:
        """A sign of life with the rate of the last rows: None before the first."""
        left = (self.config.n_steps - step) * self.config.batch_tokens
        mfu, eta = (None, None) if self._rate is None else (self._mfu(self._rate), left / self._rate)
        self.metrics.heartbeat("train", step, self._rate, mfu, eta)

    def _evaluate(self, evaluate: Callable, state: TrainState, step: int) -> evaluation.Evaluation:
        result = evaluate(state.params)
        self.metrics.write(
            "eval",
            step,
            {"loss": result.loss, "loss_sem": result.loss_sem, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens},
        )
        if not math.isfinite(result.loss):
            raise Diverged(step, "held-out loss", result.loss)
        log.info("step %d: held-out loss %.4f%s", step, result.loss, evaluation.plus_minus(result.loss_sem))
        return result

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Share of the devices' peak that the model's own FLOPs reach (PaLM, arXiv 2204.02311, Appendix B)."""
        peak = hardware.peak_flops(self.device)
        if peak is None:
            return None
        per_token = costs.train_flops(self.config.model, self.config.context_length, 1, convention="exact")
        return tokens_per_second * per_token / (peak * self.environment["n_devices"])

    def _announce(self, phase: str, step: int) -> None:
        log.info("%s", phase)
        self.metrics.heartbeat(phase, step, force=True)

    def _write_result(
        self, status: str, step: int, final: evaluation.Evaluation | None, train_loss: float | None, sha256: str | None
    ) -> dict[str, Any]:
        config = self.config
        counts = costs.count_params(config.model, convention="exact")
        tokens = step * config.batch_tokens
        rate = tokens / self.seconds_train if self.seconds_train else None
        result = {
            "status": status,
            "loss": final and final.loss,
            "loss_sem": final and final.loss_sem,
            "loss_low": final and final.loss_low,
            "loss_high": final and final.loss_high,
            "bits_per_byte": final and final.bits_per_byte,
            "eval_tokens": final and final.tokens,
            "eval_documents": final and final.documents,
            **self.held_out,
            "train_loss_last": train_loss,
            "step": step,
            "tokens": tokens,
            "params_sha256": sha256,
            "params_non_embedding": counts.non_embedding,
            "params_total": counts.total,
            "tokens_per_second": rate,
            "mfu": rate and self._mfu(rate),
            "seconds_train": self.seconds_train,
            "seconds_total": time.time() - self.device_time.started,
            "device_seconds": self.device_time.seconds(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "attention": attention_of(config),
            "data_fingerprint": self.data_fingerprint,
            "identity": hash_identity(self.identity),
            "attempts": self.attempt + 1,
        } | self.environment
        if distributed.is_primary():
            self.metrics.flush()
            if final is not None:
                about = {"step": step, "context": config.context_length, "rules": result["rules"]}
                write_json(self.workdir / run_folder.EVALUATIONS, {"rows": evaluation.rows(final, **about)})
                storage.write_bytes(self.workdir / run_folder.DOCUMENTS, evaluation.to_bytes(final.by_document))
            write_json(self.workdir / "result.json", result)
        self.metrics.heartbeat(status, step, force=True)
        return result


def _read(batches: reader.Batches, start_step: int, stop_step: int) -> Iterator[dict[str, np.ndarray]]:
    """`reader.read`; a store that turns out to be damaged is bad input, where no other process has to hear of it."""
    try:
        yield from reader.read(batches, start_step, stop_step)
    except reader.ReaderError as error:
        if jax.process_count() > 1:
            raise
        raise ConfigError(str(error)) from error


def _check_memory(config: TrainConfig, mesh: jax.sharding.Mesh, step_fn: jax.stages.Compiled) -> None:
    """Raises ConfigError, on all processes, when a step needs more memory than the devices give, saying what would fit."""
    with distributed.agree("memory"):
        device = mesh.local_devices[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = step_fn.memory_analysis()
        if limit is None or memory is None:
            return
        used = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        )
        if used <= limit:
            return
        raise ConfigError(
            f"a step needs {used / 2**30:.2f} GiB of each {device.device_kind}, which gives {limit / 2**30:.2f}: "
            + _what_fits(config, device.device_kind, mesh.size)
        )


def _what_fits(config: TrainConfig, device_kind: str, n_devices: int) -> str:
    """How the run would be carried out in less memory, by the planner's estimate."""
    chip = hardware.chip_of(device_kind)
    if chip is None:
        return "raise execution.accumulation_steps, set execution.remat to full, or use a mesh of more devices"
    anyhow = dataclasses.replace(config, execution=Execution(attention=config.execution.attention))
    for estimate in planner.choose(anyhow, hardware.on_this_machine(chip, os.environ), n_devices):
        if estimate.fits and (other := estimate.execution) != config.execution:
            return (
                f"execution.mesh={other.mesh}, execution.remat={other.remat}, execution.accumulation_steps="
                f"{other.accumulation_steps}, execution.context_attention={other.context_attention} should fit"
            )
    return f"nothing else fits on {n_devices} of them: use more"


def exit_code(error: BaseException) -> int:
    """Exit code of a run that ended with `error`."""
    match error:
        case Diverged():
            return run_folder.EXIT_DIVERGED
        case Preempted():
            return run_folder.EXIT_PREEMPTED
        case ConfigError():
            return run_folder.EXIT_BAD_INPUT
    return run_folder.EXIT_FAILED


config_flags.DEFINE_config_file(command_line.FLAG, None, "Configuration file; --config.KEY=VALUE overrides one of its fields.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://: made if it isn't there, resumed if it is.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, f"Trace {PROFILE_STEPS} steps into WORKDIR/profile, for TensorBoard or Perfetto."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes: auto looks for Slurm and Cloud TPU in the environment, on asks JAX.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster says it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, from 0, with --coordinator.")
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", distributed.HEARTBEAT_SECONDS, "Without a sign of life of a process for so long, the others end."
)
_START_SECONDS = flags.DEFINE_integer("start_seconds", distributed.START_SECONDS, "Time for all processes to come.")


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax and grain speak through it, at length
    started = time.time()
    try:
        config = _parse(argv)
        compilation_cache()
        distributed.initialize(
            _DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            processes=_PROCESSES.value,
            process=_PROCESS.value,
            heartbeat_seconds=_HEARTBEAT_SECONDS.value,
            start_seconds=_START_SECONDS.value,
        )
        distributed.same_config(config, workdir=_WORKDIR.value)
        result = train_and_evaluate(
            config,
            _WORKDIR.value,
            profile=_PROFILE.value,
            heartbeat_seconds=_HEARTBEAT_SECONDS.value,
            started=started,
        )
    except run_folder.ALIKE as error:
        print(f"gqa_jax.train: {error}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        kind, reason = run_folder.classify(error)
        if kind == "error":
            log.exception("the run failed")
        print(f"gqa_jax.train: {reason}", file=sys.stderr)
        return exit_code(error)
    if distributed.is_primary():
        print(_summary(result, _WORKDIR.value))
    return run_folder.EXIT_DONE if result["status"] == "done" else run_folder.EXIT_DIVERGED


def compilation_cache() -> None:
    """Keeps compiled programs in $GQA_JAX_CACHE/xla (default ~/.cache/gqa_jax/xla), so that equal shapes compile once."""
    folder = storage.cache("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _parse(argv: list[str]) -> TrainConfig:
    """The configuration of the command line. Raises ConfigError with one sentence for whatever is wrong with it."""
    app.define_help_flags()
    values, rest = command_line.parse(argv)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: options start with --")
    if values is None:
        raise ConfigError("--config is missing; try --config=configs/train/tiny.py --workdir=runs/tiny")
    if not _WORKDIR.value:
        raise ConfigError("--workdir is missing: the folder of the run, made if it isn't there")
    return TrainConfig.from_dict(values)


def _summary(result: dict[str, Any], workdir: str) -> str:
    if result["status"] != "done":
        return f"{result['status']} at step {result['step']} · {workdir}/result.json"
    bits = "" if result["bits_per_byte"] is None else f" · {result['bits_per_byte']:.4f} bits/byte"
    return (
        f"loss {result['loss']:.4f}{evaluation.plus_minus(result['loss_sem'])} nats/token{_documents(result)}{bits} · "
        f"{result['tokens']:,} tokens · {result['tokens_per_second']:,.0f} tokens/s · {workdir}/result.json"
    )


def _documents(result: dict[str, Any]) -> str:
    """What the loss is of: " (12 of 12 held-out documents, 95%: 1.661 to 1.797)", as far as a result says it."""
    documents, of = result.get("eval_documents"), result.get("heldout_documents")
    if documents is None:
        return ""
    of_how_many = "" if of is None else f" of {of:,}"
    text = f"{documents:,}{of_how_many} held-out document" + "s" * ((of or documents) > 1)
    low, high = result.get("loss_low"), result.get("loss_high")
    if low is not None and high > low:
        decimals = min(4, max(1, 1 - math.floor(math.log10((high - low) / 2))))
        text += f", 95%: {low:.{decimals}f} to {high:.{decimals}f}"
    return f" ({text})"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
