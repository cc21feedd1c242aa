"""Trains one model: `python -m gqa_jax.train --config=configs/train/tiny.py --workdir=DIR [--config.KEY=VALUE ...]`.

The same command resumes a run that was interrupted, bit for bit: batches are a function of (seed, step), and everything
else that a step needs is in the checkpoint. Exit codes: 0 done, 2 bad configuration or input, 3 diverged, 1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from gqa_jax import attention, costs, devices, evaluation, loss, model, optimizer, results, run_folder, sharding
from gqa_jax.checkpoint import Checkpoints
from gqa_jax.config import ConfigError, TrainConfig, hash_identity
from gqa_jax.data import reader, store
from gqa_jax.metrics import Metrics, write_json
from gqa_jax.run_folder import Diverged

log = logging.getLogger("gqa_jax.train")

PROFILE_STEPS = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar: optimizer steps done
    params: dict[str, Any]  # as model.init_params
    opt_state: optax.OptState


def init_state(config: TrainConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """State before the first step; a pure function of the configuration and the key."""
    params = model.init_params(config.model, key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def train_step(
    config: TrainConfig, tx: optax.GradientTransformation, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on `tokens` and `targets` (A, B, T): the mean gradient over A micro-batches of B sequences.

    Returns the new state and the float32 scalars `loss` (nats per token, before the update) and `grad_norm` (before clipping).
    """

    def micro_loss(params, micro):
        transformer = model.with_params(config.model, params)
        return loss.mean_loss(transformer.hidden(micro["tokens"]), params["embedding"], micro["targets"])

    def accumulate(carry, micro):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(micro_loss)(state.params, micro)), None

    if config.accumulation_steps == 1:
        mean_loss, grads = jax.value_and_grad(micro_loss)(state.params, jax.tree.map(lambda x: x[0], batch))
    else:
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(accumulate, zero, batch)
        mean_loss, grads = jax.tree.map(lambda x: x / config.accumulation_steps, total)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": mean_loss, "grad_norm": optax.tree.norm(grads)}


def token_losses(config: TrainConfig, params: dict, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p of every target, (B, T) float32 nats."""
    return loss.token_losses(model.with_params(config.model, params).hidden(tokens), params["embedding"], targets)


def params_sha256(params: dict) -> str:
    """SHA-256 over every parameter's path, dtype, shape and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)):
        array = np.asarray(leaf)
        digest.update(f"{path}|{array.dtype}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def train_and_evaluate(config: TrainConfig, workdir: Path, *, profile: bool = False) -> dict[str, Any]:
    """Runs (or resumes) a training run in `workdir` and returns what result.json holds.

    Raises:
      ConfigError: a configuration or token store that can't be used, before anything is trained.
      Diverged: after result.json was written with status "diverged".
    """
    started = time.time()
    with run_folder.claim(workdir):
        run_folder.record_config(workdir, config)
        attempt = run_folder.next_attempt(workdir)
        try:
            attention_of(config)  # one that can't run fails here, before anything is opened
            log.info("data: opening %s", config.data.store)
            fingerprint, train_batches, eval_batches = _open_data(config)
            identity = config.identity(fingerprint)
            if (result := _finished(workdir, identity)) is not None:
                log.info("result.json is there: nothing to do")
                return result
            (workdir / "exit.json").unlink(missing_ok=True)
            with (
                contextlib.closing(Metrics(workdir, attempt, config)) as metrics,
                Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
            ):
                run = _Run(config, workdir, identity, fingerprint, attempt, metrics, checkpoints, started)
                return run(train_batches, eval_batches, profile)
        except Exception as error:
            kind, reason = run_folder.classify(error)
            run_folder.record_exit(workdir, exit_code(error), kind, reason, attempt)
            raise


def attention_of(config: TrainConfig) -> str:
    """The implementation of attention that this run trains with here. Raises ConfigError when the one asked for can't."""
    model = config.model
    try:
        case = attention.Case.planned(
            batch=config.batch_size // config.accumulation_steps,
            length=config.context_length,
            n_heads=model.n_heads,
            n_kv_heads=model.n_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
        )
        return attention.resolve(model.attention, case)
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from error


def _open_data(config: TrainConfig) -> tuple[str, reader.Batches, reader.EvalBatches]:
    """Fingerprint and batches of the token store. Raises ConfigError when it can't be read or is too small for the run."""
    try:
        tokens = store.open_store(config.data.store)
        return tokens.fingerprint, *reader.check(config, tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _finished(workdir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of this very run when it is over. Raises ConfigError for a broken one, or one of another run."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        result = results.read_result(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if result["identity"] != hash_identity(identity):
        raise ConfigError(f"{path} is of another configuration or other data: use another --workdir")
    return result


@dataclasses.dataclass
class _Run:
    """One attempt, from compilation to result.json."""

    config: TrainConfig
    workdir: Path
    identity: dict[str, Any]
    data_fingerprint: str
    attempt: int
    metrics: Metrics
    checkpoints: Checkpoints
    started: float

    def __call__(self, train_batches: reader.Batches, eval_batches: reader.EvalBatches, profile: bool) -> dict[str, Any]:
        config = self.config
        self._announce("devices", 0)
        mesh = sharding.make_mesh()
        self.device = mesh.devices.flat[0].device_kind
        self.environment = run_folder.environment(self.device, mesh.size)
        write_json(self.workdir / "environment.json", self.environment)
        if len(jax.devices()) > mesh.size:
            log.info("%d of %d devices are used", mesh.size, len(jax.devices()))

        self._announce("restore", 0)
        tx = optimizer.adamw(config.optimizer, config.n_steps)
        init = partial(init_state, config, tx)
        key = jax.random.key(config.seed)
        everywhere = sharding.replicated(mesh)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init, key)
        )
        if (newest := self.checkpoints.newest_metadata()) is not None:
            run_folder.refuse_other_identity(self.workdir, self.identity, newest["identity"])
        restored = self.checkpoints.restore_newest(abstract)
        if restored is None:
            # Drawing the weights takes a moment, compiling the draws well took seconds on CPU.
            options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
            state, self.seconds_train = jax.jit(init, out_shardings=everywhere, compiler_options=options)(key), 0.0
            first_step = 0
        else:
            state, self.seconds_train = restored.state, restored.metadata["seconds_train"]
            first_step = restored.step
            log.info("resuming after step %d of %d", first_step, config.n_steps)

        self._announce("compile", first_step)
        per_batch = sharding.by_sequence(mesh)
        shape = (config.accumulation_steps, config.batch_size // config.accumulation_steps, config.context_length)
        abstract_batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=per_batch) for name in ("tokens", "targets")}
        step_fn = (
            jax.jit(partial(train_step, config, tx), donate_argnums=0, out_shardings=(everywhere, everywhere))
            .lower(abstract, abstract_batch)
            .compile()
        )
        losses_fn = jax.jit(partial(token_losses, config))

        def evaluate(params: dict) -> evaluation.Evaluation:
            return evaluation.evaluate(
                partial(losses_fn, params), eval_batches, eval_batches.document_ids, eval_batches.bytes_of_text
            )

        def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return {name: jax.device_put(x.reshape(shape), per_batch) for name, x in batch.items()}

        self._announce("train", first_step)
        try:
            state = self._loop(step_fn, state, first_step, train_batches, place, evaluate, profile)
            self._announce("checkpoint", config.n_steps)
            self.checkpoints.wait()
            self._announce("evaluate", config.n_steps)
            final = self._evaluate(evaluate, state, config.n_steps)
        except Diverged as error:
            log.error("%s", error)
            self._write_result("diverged", error.step, None, None, None)
            raise
        return self._write_result("done", config.n_steps, final, self.train_loss, params_sha256(state.params))

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
        schedule = optimizer.learning_rate(config.optimizer, config.n_steps)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.train_loss = self._rate = None
        profile_at = range(first_step + 2, first_step + 2 + PROFILE_STEPS) if profile else range(0)
        self._clock = time.perf_counter()

        for step, batch in enumerate(reader.read(train_batches, first_step, config.n_steps), first_step + 1):
            if step in profile_at and step == profile_at.start:
                jax.profiler.start_trace(str(self.workdir / "profile"))
            state, step_metrics = step_fn(state, place(batch))
            pending.append((step, step_metrics))
            if len(pending) > 1:  # at most one step ahead of the device: errors and the heartbeat stay close to the truth
                jax.block_until_ready(pending[-2][1])
                self._beat(step - 1)
            if profile_at and step == min(profile_at.stop - 1, config.n_steps):
                jax.block_until_ready(step_metrics)
                jax.profiler.stop_trace()
                log.info("profile of steps %d to %d: %s", profile_at.start, step, self.workdir / "profile")

            saves = step % config.checkpoint.every_steps == 0 or step == config.n_steps
            evaluates = config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and step < config.n_steps
            if step % config.logging.every_steps == 0 or saves or evaluates:
                self._flush(pending, schedule)
            if evaluates:
                self._evaluate(evaluate, state, step)
                self._clock = time.perf_counter()
            if saves:
                self.checkpoints.save(
                    step,
                    state,
                    {"identity": self.identity, "config": config.to_dict(), "seconds_train": self.seconds_train},
                )
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
        log.info("step %d: held-out loss %.4f ± %.4f", step, result.loss, result.loss_sem or math.nan)
        return result

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Share of the devices' peak that the model's own FLOPs reach (PaLM, arXiv 2204.02311, Appendix B)."""
        peak = devices.peak_flops(self.device)
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
            "bits_per_byte": final and final.bits_per_byte,
            "eval_tokens": final and final.tokens,
            "eval_documents": final and final.documents,
            "train_loss_last": train_loss,
            "step": step,
            "tokens": tokens,
            "params_sha256": sha256,
            "params_non_embedding": counts.non_embedding,
            "params_total": counts.total,
            "tokens_per_second": rate,
            "mfu": rate and self._mfu(rate),
            "seconds_train": self.seconds_train,
            "seconds_total": time.time() - self.started,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "attention": attention_of(config),
            "data_fingerprint": self.data_fingerprint,
            "identity": hash_identity(self.identity),
            "attempts": self.attempt + 1,
        } | self.environment
        write_json(self.workdir / "result.json", result)
        self.metrics.heartbeat(status, step, force=True)
        return result


def _check_store(config: TrainConfig, tokens: store.TokenStore) -> None:
    needed = tokens.header["vocab_size"]
    if needed > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of the token store "
            f"{config.data.store} ({needed}, tokenizer {tokens.header['tokenizer']['name']}): use {-(-needed // 64) * 64}"
        )


def exit_code(error: BaseException) -> int:
    """Exit code of a run that ended with `error`."""
    match error:
        case Diverged():
            return run_folder.EXIT_DIVERGED
        case ConfigError():
            return run_folder.EXIT_BAD_INPUT
    return run_folder.EXIT_FAILED


_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file; --config.KEY=VALUE overrides one of its fields.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: made if it isn't there, resumed if it is.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, f"Trace {PROFILE_STEPS} steps into WORKDIR/profile, for TensorBoard or Perfetto."
)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax and grain speak through it, at length
    try:
        config = _parse(argv)
        compilation_cache()
        result = train_and_evaluate(config, Path(_WORKDIR.value), profile=_PROFILE.value)
    except (ConfigError, Diverged) as error:
        print(f"gqa_jax.train: {error}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        kind, reason = run_folder.classify(error)
        if kind == "error":
            log.exception("the run failed")
        print(f"gqa_jax.train: {reason}", file=sys.stderr)
        return exit_code(error)
    print(_summary(result, _WORKDIR.value))
    return run_folder.EXIT_DONE if result["status"] == "done" else run_folder.EXIT_DIVERGED


def compilation_cache() -> None:
    """Keeps compiled programs in $GQA_JAX_CACHE/xla (default ~/.cache/gqa_jax/xla), so that equal shapes compile once."""
    folder = Path(os.environ.get("GQA_JAX_CACHE", Path.home() / ".cache" / "gqa_jax")) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _parse(argv: list[str]) -> TrainConfig:
    """The configuration of the command line. Raises ConfigError with one sentence for whatever is wrong with it."""
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)[1:]
        values = None if _CONFIG.value is None else _CONFIG.value.to_dict()
    except Exception as error:  # of flags, of a locked ConfigDict that refuses a key or a value, of the file itself
        text = " ".join(str(error).replace("\\n", " ").split())
        raise ConfigError(f"the command line or the configuration file can't be used: {text}") from error
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
    sem = "" if result["loss_sem"] is None else f" ± {result['loss_sem']:.4f}"
    return (
        f"loss {result['loss']:.4f}{sem} nats/token · {result['bits_per_byte']:.4f} bits/byte · {result['tokens']:,} tokens · "
        f"{result['tokens_per_second']:,.0f} tokens/s · {workdir}/result.json"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
