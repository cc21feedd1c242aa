"""One attempt of a run, from its folder to result.json: set-up, restore, compile, the steps, the last evaluation.

Every act is announced in the log and in the heartbeat, so that a hang can be placed. All processes of a run go through the same
acts; the primary writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from gqa_jax import attention, costs, hardware, storage
from gqa_jax.config import TrainConfig, hash_identity
from gqa_jax.data import vocabulary
from gqa_jax.planning import planner
from gqa_jax.storage import write_json
from gqa_jax.training import devices, distributed, evaluation, optimizer, program, run_folder, setup, sharding
from gqa_jax.training.checkpoint import Checkpoints, params_sha256
from gqa_jax.training.metrics import Metrics, NoMetrics
from gqa_jax.training.program import TrainState
from gqa_jax.training.run_folder import DeviceTime, Diverged, Preempted
from gqa_jax.training.start import Start

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

    `workdir` is a local folder or on gs://. `started` says since when this process holds its devices, by time.monotonic; None:
    since now.

    Raises:
      ConfigError: a configuration, token store or device that can't be used, before anything is trained.
      Diverged: after result.json was written with status "diverged".
      Preempted: asked to end by SIGTERM, SIGHUP or Ctrl-C, after saving.
      WrongDevices: not those that the run was given, before anything is opened.
    """
    started = time.monotonic() if started is None else started
    workdir = storage.path(workdir)
    attempt = None

    def record(kind: str, reason: str, blamed: str | None, code: int = run_folder.EXIT_FAILED) -> None:
        if distributed.is_primary():
            run_folder.record_exit(workdir, code, kind, reason, attempt, blamed)

    with distributed.ends_together(record, heartbeat_seconds), setup.claimed(workdir):
        distributed.shared_folder(workdir)
        distributed.from_primary("config.json", lambda: run_folder.record_config(workdir, config))
        attempt, before = distributed.from_primary(
            "attempt", lambda: (run_folder.next_attempt(workdir), run_folder.device_seconds(workdir))
        )
        try:
            return _attempt(config, workdir, attempt, started, before, profile)
        except Exception as error:
            record(*distributed.classify(error), distributed.blamed(error), run_folder.exit_code(error))
            raise


@dataclasses.dataclass(frozen=True)
class Context:
    """What one attempt works with, all of it there before its first act."""

    config: TrainConfig  # resolved
    mesh: jax.sharding.Mesh
    workdir: epath.Path
    data: setup.Data
    identity: dict[str, Any]
    start: Start
    attempt: int
    device_time: DeviceTime
    environment: dict[str, Any]  # content of environment.json
    metrics: Metrics
    checkpoints: Checkpoints
    preemption: distributed.Preemption

    def announce(self, act: str, step: int) -> None:
        log.info("%s", act)
        self.metrics.heartbeat(act, step, force=True)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the devices' peak that the model's own FLOPs reach (PaLM, arXiv 2204.02311, Appendix B)."""
        peak = hardware.peak_flops(self.device_time.device)
        if peak is None:
            return None
        per_token = costs.train_flops(self.config.model, self.config.context_length, 1, convention="exact")
        return tokens_per_second * per_token / (peak * self.mesh.size)


class Progress(NamedTuple):
    """What the loop carries from rows of metrics to the next rows."""

    seconds_train: float  # of all attempts, without evaluations
    since: float  # when the steps of the next rows began, by time.perf_counter
    train_loss: float | None = None  # of the last row; None before the first
    tokens_per_second: float | None = None  # of the last rows

    def after(self, tokens: int, train_loss: float) -> Progress:
        """When steps on so many tokens are done."""
        seconds = time.perf_counter() - self.since
        return Progress(self.seconds_train + seconds, self.since, train_loss, tokens / seconds)

    def now(self) -> Progress:
        """When what is no training, since the last rows, is over."""
        return self._replace(since=time.perf_counter())


def _attempt(
    config: TrainConfig, workdir: epath.Path, attempt: int, started: float, before: float, profile: bool
) -> dict[str, Any]:
    """What `train_and_evaluate` does in a folder that it holds; `before`: device-seconds of the attempts before."""
    with distributed.agree("devices"):
        given = devices.require_here()
    config = planner.resolve(config, jax.devices()[0].device_kind, len(jax.devices()), jax.process_count())
    mesh = sharding.make_mesh(config.execution.mesh)
    program.attention_of(config)  # one that can't run fails here, before anything is opened
    setup.warn_of_narrow_parameters(config)
    log.info("data: opening %s", config.data.store)
    data = setup.open_data(config)
    start = setup.start_of(config, workdir, data.store)
    identity = config.identity(data.fingerprint, start.identity)
    if (result := distributed.from_primary("result.json", lambda: setup.finished(workdir, config, identity))) is not None:
        log.info("result.json is there: nothing to do")
        return result
    shared_by = given.shared_by if given else 1
    device_time = DeviceTime(mesh.devices.flat[0].device_kind, mesh.size, started, before, shared_by)
    environment = run_folder.environment(config, device_time.device, mesh.size, jax.process_count())
    environment |= {"shared_by": shared_by} if shared_by > 1 else {}  # its rates are of a part of the devices
    with (
        Metrics(workdir, attempt, config, device_time) if distributed.is_primary() else NoMetrics() as metrics,
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
        distributed.Preemption() as preemption,
    ):
        context = Context(
            config, mesh, workdir, data, identity, start, attempt, device_time, environment, metrics, checkpoints, preemption
        )
        return _train(context, profile)


def _train(context: Context, profile: bool) -> dict[str, Any]:
    config, mesh, metrics = context.config, context.mesh, context.metrics

    context.announce("devices", 0)
    if distributed.is_primary():
        write_json(context.workdir / "environment.json", context.environment)
        vocabulary.record(context.workdir, context.data.store)
    log.info(
        "mesh %s of %d %s devices (%d there)",
        config.execution.mesh, mesh.size, context.device_time.device, len(jax.devices()),
    )  # fmt: skip

    context.announce("restore", 0)
    state, first_step, seconds_train = _restore(context)
    if distributed.is_primary():
        run_folder.record_attempt(context.workdir, context.attempt, first_step, context.device_time, jax.process_count())

    context.announce("compile", first_step)
    attention.clear_traced()
    step_fn = program.compile_step(config, mesh)
    write_result = partial(_write_result, context, attention.traced()["attention"])
    setup.check_memory(config, mesh, step_fn)
    rows = program.local_rows(config, mesh, config.execution.accumulation_steps)
    place = partial(program.place, config, mesh, rows=rows, accumulation_steps=config.execution.accumulation_steps)
    evaluate = partial(_evaluate, context, program.evaluation_losses(config, mesh))
    schedule = jax.jit(optimizer.learning_rate(config.optimizer, config.n_steps))

    context.announce("train", first_step)
    progress = Progress(seconds_train, time.perf_counter())
    batches = map(place, setup.read(context.data.train.for_rows(rows), first_step, config.n_steps))
    trained = steps(step_fn, state, batches, first_step)
    done: list[tuple[int, dict[str, jax.Array]]] = []  # steps that no row tells of yet
    try:
        for step, state, step_metrics in _profiled(context, profile, first_step, trained):
            done.append((step, step_metrics))
            if len(done) > 1:
                _beat(context, progress, step - 1)
            preempted = context.preemption.reached(step) and step < config.n_steps
            saves = step % config.checkpoint.every_steps == 0 or step == config.n_steps or preempted
            every = config.evaluation.every_steps
            evaluates = every and step % every == 0 and step < config.n_steps
            if step % config.logging.every_steps == 0 or saves or evaluates:
                values = jax.device_get([each for _, each in done])
                progress = progress.after(len(done) * config.batch_tokens, float(values[-1]["loss"]))
                for (number, _), row in zip(done, values, strict=True):
                    _write_row(context, progress, number, row, float(schedule(number - 1)))
                done.clear()
                _beat(context, progress, step)
                progress = progress.now()
            if evaluates:
                evaluate(state, step)
                progress = progress.now()
            if saves:
                metrics.flush()  # these steps are not trained again
                saved = {"identity": context.identity, "config": config.to_dict(), "seconds_train": progress.seconds_train}
                context.checkpoints.save(step, state, saved)
            if preempted:
                context.announce("checkpoint", step)
                context.checkpoints.wait()
                raise Preempted(step, context.preemption.by)

        context.announce("checkpoint", config.n_steps)
        context.checkpoints.wait()
        context.announce("evaluate", config.n_steps)
        final = evaluate(state, config.n_steps)
    except Diverged as error:
        log.error("%s", error)
        write_result("diverged", error.step, progress._replace(train_loss=None))
        raise
    return write_result("done", config.n_steps, progress, final, params_sha256(state.params))


def steps(
    step_fn: Callable, state: TrainState, batches: Iterable[dict[str, jax.Array]], first_step: int
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """After every step its number, the state and the metrics, which may still be computed; the next step uses the state up.

    At most one step ahead of the device: errors and the heartbeat stay close to the truth.
    """
    before = None
    for step, batch in enumerate(batches, first_step + 1):
        state, step_metrics = step_fn(state, batch)
        jax.block_until_ready(before)
        before = step_metrics
        yield step, state, step_metrics


def _profiled(context: Context, profile: bool, first_step: int, steps: Iterator) -> Iterator:
    """`steps`, of which PROFILE_STEPS after the first are traced into the run's folder when `profile` asks for it."""
    n_steps = context.config.n_steps
    first, last = first_step + 2, min(first_step + 1 + PROFILE_STEPS, n_steps)
    if not profile or first > n_steps:
        yield from steps
        return
    yield from itertools.islice(steps, 1)
    remote = storage.is_remote(context.workdir)  # where JAX writes no traces
    traces = Path(tempfile.mkdtemp(prefix="profile-") if remote else context.workdir / "profile")
    jax.profiler.start_trace(str(traces))
    for step, state, step_metrics in steps:
        if step == last:
            jax.block_until_ready(step_metrics)
            jax.profiler.stop_trace()
            if remote:
                storage.upload(traces, context.workdir / "profile")
                shutil.rmtree(traces)
            log.info("profile of steps %d to %d: %s", first, step, context.workdir / "profile")
        yield step, state, step_metrics


def _restore(context: Context) -> tuple[TrainState, int, float]:
    """The state that this attempt goes on from, the steps done before it, and their seconds."""
    config, checkpoints = context.config, context.checkpoints
    abstract = program.abstract_state(config, context.mesh)
    if (newest := checkpoints.newest_metadata()) is not None:
        run_folder.refuse_other_identity(context.workdir, context.identity, newest["identity"], config)
    restored = checkpoints.restore_newest(abstract)
    if restored is not None:
        log.info("resuming after step %d of %d", restored.step, config.n_steps)
        return restored.state, restored.step, restored.metadata["seconds_train"]
    state = program.fresh_state(config, context.mesh)
    if context.start.folder is not None:
        state = dataclasses.replace(state, params=setup.starting_params(context.start, config, abstract.params))
        log.info("starting from the parameters of %s", context.start.folder)
    return state, 0, 0.0


def _write_row(context: Context, progress: Progress, step: int, row: dict[str, np.ndarray], learning_rate: float) -> None:
    """Writes a step's row of metrics; raises Diverged where its numbers are no longer finite."""
    rate, tokens = progress.tokens_per_second, step * context.config.batch_tokens
    values = {"loss": float(row["loss"]), "grad_norm": float(row["grad_norm"])}
    rest = {"learning_rate": learning_rate, "tokens": tokens, "tokens_per_second": rate, "mfu": context.mfu(rate)}
    context.metrics.write("train", step, values | rest | {"seconds_train": progress.seconds_train})
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(step, f"training {name}", value)


def _beat(context: Context, progress: Progress, step: int) -> None:
    """A sign of life with the rate of the last rows: None before the first."""
    config, rate = context.config, progress.tokens_per_second
    left = (config.n_steps - step) * config.batch_tokens
    mfu, eta = (None, None) if rate is None else (context.mfu(rate), left / rate)
    context.metrics.heartbeat("train", step, rate, mfu, eta)


def _evaluate(context: Context, losses_fn: Callable, state: TrainState, step: int) -> evaluation.Evaluation:
    """The held-out loss, written as a row; raises Diverged when it is not finite."""
    config, mesh = context.config, context.mesh
    every_row, in_order = np.arange(config.micro_batch), np.argsort(program.order(config))

    def token_losses(batch: dict[str, np.ndarray]) -> np.ndarray:
        inputs = {name: batch[name] for name in program.abstract_batch(config, mesh)}
        return np.asarray(losses_fn(state.params, program.place(config, mesh, inputs, every_row, 1)))[:, in_order]

    found = evaluation.evaluate(token_losses, context.data.held_out)
    names = ("loss", "loss_sem", "bits_per_byte", "tokens")
    context.metrics.write("eval", step, {name: getattr(found, name) for name in names})
    if not math.isfinite(found.loss):
        raise Diverged(step, "held-out loss", found.loss)
    log.info("step %d: held-out loss %.4f%s", step, found.loss, evaluation.plus_minus(found.loss_sem))
    return found


def _write_result(
    context: Context,
    implementation: str,
    status: str,
    step: int,
    progress: Progress,
    final: evaluation.Evaluation | None = None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Writes what the run found, result.json last; returns its content. `implementation` is of attention, as it was traced."""
    config, data, workdir = context.config, context.data, context.workdir
    counts = costs.count_params(config.model, convention="exact")
    tokens = step * config.batch_tokens
    rate = tokens / progress.seconds_train if progress.seconds_train else None
    result = {
        "status": status,
        **{name: final and getattr(final, name) for name in ("loss", "loss_sem", "loss_low", "loss_high", "bits_per_byte")},
        "eval_tokens": final and final.tokens,
        "eval_documents": final and final.documents,
        "rules": config.rules(data.held_out.holdout),
        "holdout": data.held_out.holdout,
        "heldout": config.heldout(data.fingerprint),
        "heldout_documents": data.held_out.heldout_documents,
        "heldout_tokens": data.held_out.heldout_tokens,
        "train_loss_last": progress.train_loss,
        "step": step,
        "tokens": tokens,
        "params_sha256": sha256,
        "params_non_embedding": counts.non_embedding,
        "params_total": counts.total,
        "tokens_per_second": rate,
        "mfu": rate and context.mfu(rate),
        "seconds_train": progress.seconds_train,
        "seconds_total": time.monotonic() - context.device_time.started,
        "device_seconds": context.device_time.seconds(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "attention": implementation,
        "data_fingerprint": data.fingerprint,
        "identity": hash_identity(context.identity),
        "start": context.start.facts(),
        "attempts": context.attempt + 1,
    } | context.environment
    if distributed.is_primary():
        context.metrics.flush()
        if final is not None:
            about = {"step": step, "context": config.context_length, "rules": result["rules"]}
            write_json(workdir / run_folder.EVALUATIONS, {"rows": evaluation.rows(final, **about)})
            storage.write_bytes(workdir / run_folder.DOCUMENTS, evaluation.to_bytes(final.by_document))
        write_json(workdir / "result.json", result)
    context.metrics.heartbeat(status, step, force=True)
    return result
