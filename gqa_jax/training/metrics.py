"""What a run says while it runs: metric rows, TensorBoard, Weights & Biases, a heartbeat, a progress bar.

Locally a row is appended to `metrics/attempt-NNN.jsonl` as it comes. Nothing can be appended to on gs://, so there rows are
collected and written as objects of their own, `metrics/attempt-NNN-PPPPP.jsonl`, in the background every PART_SECONDS, and at
once by `Metrics.flush`: before a checkpoint is begun, after which their steps are not trained again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gqa_jax import storage
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.storage import write_json
from gqa_jax.training import run_folder

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
REMOTE_HEARTBEAT_SECONDS = 10.0  # on gs://, where an object may be written about once a second
PART_SECONDS = 30.0
EVENTS_SECONDS = 120.0  # between copies of TensorBoard's files to gs://

_PART = re.compile(r"attempt-(\d+)(?:-(\d+))?\.jsonl")


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, Any]]:
    """Rows of all files in `workdir/metrics`, local or gs://, by step; where two attempts logged a step, the later one counts.

    A last line cut off by a kill is skipped.
    """
    folder = storage.path(workdir) / "metrics"
    matches = [match for name in storage.names(folder) if (match := _PART.fullmatch(name))]
    files = [folder / match[0] for match in sorted(matches, key=lambda match: (int(match[1]), int(match[2] or 0)))]
    rows = {}
    for path, content in zip(files, storage.each(storage.read_bytes, files, remote=storage.is_remote(folder)), strict=True):
        *lines, rest = (content or b"").decode().split("\n")
        for line in lines:
            row = json.loads(line)
            rows[row["step"], row["kind"]] = row
        if rest:
            log.info("%s: last line is incomplete, skipped", path)
    return [rows[key] for key in sorted(rows)]


class Metrics:
    """Writers of one attempt of a run, to be closed, or as a context manager.

    A failing TensorBoard or W&B is reported once and never stops a step. On gs:// neither does a failing heartbeat, or part of
    the rows: these are tried again, and raise in `flush` or `close` when they still can't be written.
    """

    def __init__(
        self,
        workdir: os.PathLike | str,
        attempt: int,
        config: TrainConfig,
        device_time: run_folder.DeviceTime = run_folder.DeviceTime(),  # noqa: B008 (frozen)
    ):
        self._workdir, self._attempt, self._n_steps = storage.path(workdir), attempt, config.n_steps
        self._device_time, self._origin = device_time, run_folder.origin()
        remote = storage.is_remote(workdir)
        self._side_writers: dict[str, Any] = {}
        if config.logging.tensorboard:
            self._side_writers["TensorBoard"] = _TensorBoard(self._workdir / "tensorboard")
        if attempt == 0 or config.logging.wandb_project:  # drawn at once: a later attempt may be the first that needs it
            run_id = run_folder.run_id(self._workdir, attempt)
        if config.logging.wandb_project:
            self._start_wandb(config, run_id)
        self._files = (_RemoteFiles if remote else _LocalFiles)(self._workdir, attempt)
        self._heartbeat_time = -math.inf
        self._progress = _progress_bar() if config.logging.progress and sys.stderr.isatty() else None
        if self._progress:
            self._task = self._progress.add_task("train", total=self._n_steps, rate="")
            self._progress.start()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            log.warning("the last metric rows can't be written: %s", error)  # what ended the run matters more

    def _start_wandb(self, config: TrainConfig, run_id: str) -> None:
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
                id=run_id,
                resume="allow",
                dir=tempfile.mkdtemp(prefix="wandb-") if storage.is_remote(self._workdir) else str(self._workdir),
                config=config.to_dict(),
            )
        except Exception as error:  # an outage of a service must not stop a run
            log.warning("W&B is not reached (%s): going on without it", error)
        else:
            self._side_writers["W&B"] = _WeightsAndBiases(run)

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """One row: `kind` "train" or "eval", the number of optimizer steps done, and named numbers (None: not known)."""
        row = {"kind": kind, "step": step, "time": time.time()} | storage.finite(values)
        self._files.append(json.dumps(row, allow_nan=False) + "\n")
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
        """Replaces heartbeat.json, at most every HEARTBEAT_SECONDS unless forced, and moves the progress bar.

        On gs:// in the background, at most every REMOTE_HEARTBEAT_SECONDS, forced ones every second.
        """
        if self._progress:
            rate = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s"
            rate += "" if mfu is None else f" · MFU {mfu:.0%}"
            self._progress.update(self._task, description=phase, completed=step, rate=rate)
        now = time.time()
        if not force and now - self._heartbeat_time < HEARTBEAT_SECONDS:
            return
        self._heartbeat_time = now
        values = {
            "time": now,
            "phase": phase,
            "step": step,
            "steps": self._n_steps,
            "tokens_per_second": tokens_per_second,
            "eta_seconds": eta_seconds,
            "pid": os.getpid(),
            "attempt": self._attempt,
            "device": self._device_time.device,
            "n_devices": self._device_time.n_devices,
            "device_seconds": self._device_time.seconds(),
        }
        self._files.heartbeat(values | self._origin, force)

    def flush(self) -> None:
        """Returns when every row is where it stays. Raises OSError when it can't be written there."""
        self._files.flush()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        for writer in self._side_writers.values():
            try:
                writer.close()
            except Exception as error:  # an outage of a service must not stop a run
                log.warning("closing a metrics writer failed: %s", error)
        self._files.close()


class _LocalFiles:
    """Rows and heartbeat of an attempt in a local folder."""

    def __init__(self, workdir: epath.Path, attempt: int):
        self._workdir = workdir
        (workdir / "metrics").mkdir(exist_ok=True)
        self._file = open(workdir / "metrics" / f"attempt-{attempt:03d}.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)

    def append(self, line: str) -> None:
        self._file.write(line)

    def heartbeat(self, values: Mapping[str, Any], force: bool) -> None:
        write_json(self._workdir / "heartbeat.json", values)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _RemoteFiles:
    """Rows and heartbeat of an attempt on gs://, written in the background, so that no step waits for the network."""

    def __init__(self, workdir: epath.Path, attempt: int):
        self._workdir, self._attempt = workdir, attempt
        self._lines: list[str] = []  # not written yet
        self._part = 0
        self._rows_time = time.monotonic()  # when rows were last tried
        self._beat: Mapping[str, Any] | None = None  # not written yet
        self._beat_force = False
        self._beat_time = -math.inf
        self._failing: set[str] = set()
        self._change = threading.Lock()  # of the fields above
        self._writing = threading.Lock()  # one object after the other
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_in_background, name="metrics", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        with self._change:
            self._lines.append(line)

    def heartbeat(self, values: Mapping[str, Any], force: bool) -> None:
        with self._change:
            self._beat, self._beat_force = values, self._beat_force or force

    def flush(self) -> None:
        """Writes the rows that are not yet written as a part. The next one that is tried has the same name if it fails."""
        with self._writing:
            with self._change:
                lines = list(self._lines)
                self._rows_time = time.monotonic()
            if not lines:
                return
            path = self._workdir / "metrics" / f"attempt-{self._attempt:03d}-{self._part:05d}.jsonl"
            storage.write_bytes(path, "".join(lines).encode())
            self._part += 1
            with self._change:
                del self._lines[: len(lines)]

    def close(self) -> None:
        self._over.set()
        self._tell("heartbeat.json", self._write_beat)
        self.flush()

    def _write_in_background(self) -> None:
        while not self._over.wait(0.5):
            with self._change:
                rows_due = bool(self._lines) and time.monotonic() - self._rows_time >= PART_SECONDS
                between = 1.0 if self._beat_force else REMOTE_HEARTBEAT_SECONDS
                beat_due = self._beat is not None and time.monotonic() - self._beat_time >= between
            if beat_due:
                self._tell("heartbeat.json", self._write_beat)
            if rows_due:
                self._tell("metrics", self.flush)

    def _write_beat(self) -> None:
        with self._writing:
            with self._change:
                values, force, self._beat, self._beat_force = self._beat, self._beat_force, None, False
            if values is not None:
                self._beat_time = time.monotonic()
                try:
                    write_json(self._workdir / "heartbeat.json", values)
                except Exception:
                    with self._change:
                        self._beat, self._beat_force = self._beat or values, self._beat_force or force
                    raise

    def _tell(self, what: str, write: Callable[[], None]) -> None:
        """Calls `write`. When it fails it says so once, until it has gone well again."""
        try:
            write()
        except Exception as error:  # an outage must not stop a run
            if what not in self._failing:
                log.warning("%s can't be written for now: %s", what, error)
            self._failing.add(what)
        else:
            self._failing.discard(what)


class NoMetrics(Metrics):
    """Of the processes beside the primary, which write nothing."""

    def __init__(self):
        pass

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    write = heartbeat = flush = close = _nothing


class _TensorBoard:
    """TensorBoard's event files. For gs:// they are copied from a local folder: tensorboardX itself would hang in an outage."""

    def __init__(self, folder: epath.Path):
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._local = Path(tempfile.mkdtemp(prefix="tensorboard-")) if storage.is_remote(folder) else None
        self._writer = SummaryWriter(str(self._local or folder))
        self._copied = time.monotonic()
        self._copying: threading.Thread | None = None

    def write(self, kind, step, values):
        for key, value in values.items():
            self._writer.add_scalar(f"{kind}/{key}", value, step)
        idle = self._copying is None or not self._copying.is_alive()
        if self._local and idle and time.monotonic() - self._copied >= EVENTS_SECONDS:
            self._copied = time.monotonic()
            self._copying = threading.Thread(target=self._copy, daemon=True)
            self._copying.start()

    def _copy(self):
        try:
            self._writer.flush()
            storage.upload(self._local, self._folder)
        except Exception as error:  # an outage must not stop a run
            log.warning("TensorBoard's files can't be copied: %s", error)

    def close(self):
        self._writer.close()
        if self._local:
            if self._copying:
                self._copying.join()
            storage.upload(self._local, self._folder)
            shutil.rmtree(self._local)


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
