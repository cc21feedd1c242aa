"""What a run says while it runs: metric rows, TensorBoard, Weights & Biases, a heartbeat, a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gqa_jax.config import ConfigError, TrainConfig

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all: a temporary file in the same folder, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(_finite(values), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of `workdir/metrics/attempt-*.jsonl` by step; where two attempts logged a step, the later one counts.

    A last line cut off by a kill is skipped.
    """
    rows = {}
    for path in sorted(Path(workdir, "metrics").glob("attempt-*.jsonl")):
        *lines, rest = path.read_text().split("\n")
        for line in lines:
            row = json.loads(line)
            rows[row["step"], row["kind"]] = row
        if rest:
            log.info("%s: last line is incomplete, skipped", path)
    return [rows[key] for key in sorted(rows)]


class Metrics:
    """Writers of one attempt of a run. A failing TensorBoard or W&B is reported once and never stops a step."""

    def __init__(self, workdir: Path, attempt: int, config: TrainConfig):
        self._workdir, self._attempt, self._n_steps = workdir, attempt, config.n_steps
        self._side_writers: dict[str, Any] = {}
        if config.logging.tensorboard:
            from tensorboardX import SummaryWriter

            self._side_writers["TensorBoard"] = _TensorBoard(SummaryWriter(str(workdir / "tensorboard")))
        if config.logging.wandb_project:
            self._start_wandb(config)
        folder = workdir / "metrics"
        folder.mkdir(exist_ok=True)
        self._file = open(folder / f"attempt-{attempt:03d}.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._heartbeat_time = -math.inf
        self._progress = _progress_bar() if config.logging.progress and sys.stderr.isatty() else None
        if self._progress:
            self._task = self._progress.add_task("train", total=self._n_steps, rate="")
            self._progress.start()

    def _start_wandb(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb_project = {config.logging.wandb_project!r} needs wandb: pip install wandb, or leave it empty"
            ) from error
        try:
            run = wandb.init(
                project=config.logging.wandb_project,
                name=self._workdir.name,
                id=self._workdir.name,
                resume="allow",
                dir=str(self._workdir),
                config=config.to_dict(),
            )
        except Exception as error:  # an outage of a service must not stop a run
            log.warning("W&B is not reached (%s): going on without it", error)
        else:
            self._side_writers["W&B"] = _WeightsAndBiases(run)

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """One row: `kind` "train" or "eval", the number of optimizer steps done, and named numbers (None: not known)."""
        row = {"kind": kind, "step": step, "time": time.time()} | _finite(values)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for name, writer in list(self._side_writers.items()):
            try:
                writer.write(kind, step, {key: value for key, value in values.items() if value is not None})
            except Exception as error:  # an outage of a service must not stop a run
                log.warning("%s failed (%s): going on without it", name, error)
                del self._side_writers[name]

    def heartbeat(
        self,
        phase: str,
        step: int,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        eta_seconds: float | None = None,
        force: bool = False,
    ) -> None:
        """Replaces heartbeat.json, at most every HEARTBEAT_SECONDS unless forced, and moves the progress bar."""
        if self._progress:
            rate = (
                ""
                if tokens_per_second is None
                else f"{tokens_per_second:,.0f} tok/s" + ("" if mfu is None else f" · MFU {mfu:.0%}")
            )
            self._progress.update(self._task, description=phase, completed=step, rate=rate)
        now = time.time()
        if not force and now - self._heartbeat_time < HEARTBEAT_SECONDS:
            return
        self._heartbeat_time = now
        write_json(
            self._workdir / "heartbeat.json",
            {
                "time": now,
                "phase": phase,
                "step": step,
                "steps": self._n_steps,
                "tokens_per_second": tokens_per_second,
                "eta_seconds": eta_seconds,
                "pid": os.getpid(),
                "attempt": self._attempt,
            },
        )

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()
        for writer in self._side_writers.values():
            try:
                writer.close()
            except Exception as error:  # an outage of a service must not stop a run
                log.warning("closing a metrics writer failed: %s", error)


class NoMetrics(Metrics):
    """Of the processes beside the primary, which write nothing."""

    def __init__(self):
        pass

    def write(self, *_: object, **__: object) -> None:
        pass

    def heartbeat(self, *_: object, **__: object) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, writer):
        self._writer = writer

    def write(self, kind, step, values):
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self):
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run):
        self._run = run

    def write(self, kind, step, values):
        self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def close(self):
        self._run.finish()


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with NaN and infinities as "nan", "inf", "-inf": JSON has no such numbers, and a reader must see them."""
    return {
        key: _finite(value)
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }
