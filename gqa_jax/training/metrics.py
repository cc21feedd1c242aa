"""What a run says while it runs: metric rows, a heartbeat, a progress bar, and what services show of it.

A row is appended to `metrics/attempt-NNN.jsonl` as it comes; on gs:// they come in parts (remote_rows.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from gqa_jax import storage
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.storage import write_json
from gqa_jax.training import records, run_folder

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
MOST_BYTES = 1 << 30  # of a file of rows: millions of them

_PART = re.compile(r"attempt-(\d+)(?:-(\d+))?\.jsonl")


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, Any]]:
    """Rows of all files in `workdir/metrics`, local or gs://, by step; where two attempts logged a step, the later one counts.

    Lines that can't be read are left out and said; a last one, cut off by a kill, is only logged.
    """
    folder = storage.path(workdir) / "metrics"
    matches = [match for name in storage.names(folder) if (match := _PART.fullmatch(name))]
    files = [folder / match[0] for match in sorted(matches, key=lambda match: (int(match[1]), int(match[2] or 0)))]
    rows = {}
    for path, content in zip(files, storage.each(_content, files, remote=storage.is_remote(folder)), strict=True):
        *lines, rest = content.split(b"\n")
        found = [_row(line) for line in lines]
        rows |= {(row["step"], row["kind"]): row for row in found if row is not None}
        if odd := found.count(None):
            log.warning("%s: %d of %d lines can't be read and are left out", path, odd, len(lines))
        if rest:
            log.info("%s: last line is incomplete, skipped", path)
    return [rows[key] for key in sorted(rows)]


def _content(path: epath.Path) -> bytes:
    try:
        return storage.read_file(path, MOST_BYTES) or b""
    except ConfigError as error:
        log.warning("%s; its rows are left out", error)
        return b""


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line of metrics says: its step, kind and numbers; None where it has no step or no kind."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    values = values if isinstance(values, dict) else {}
    row = records.usable(values, _ROW)
    if not {"kind", "step"} <= {*row}:
        return None
    return row | {name: value for name, value in values.items() if name not in _ROW and _is_measured(value)}


_ROW = {"kind": records.word, "step": records.count, "time": records.stamp, "tokens": records.count}


def _is_measured(value: Any) -> bool:
    return value is None or value in ("nan", "inf", "-inf") or records.number(value) is not None


class Metrics:
    """Writers of one attempt of a run, to be closed, or as a context manager.

    A failing service is reported once and never stops a step. On gs:// neither does a failing heartbeat, or part of
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
        self._services: dict[str, Any] = {}
        if attempt == 0:  # drawn at once: a later attempt may be the first that needs it
            run_folder.run_id(self._workdir, attempt)
        if config.logging.tensorboard or config.logging.wandb_project:
            from gqa_jax.training import services

            self._services = services.start(config, self._workdir, attempt)
        if storage.is_remote(workdir):
            from gqa_jax.training import remote_rows

            self._files = remote_rows.RemoteFiles(self._workdir, attempt)
        else:
            self._files = _LocalFiles(self._workdir, attempt)
        self._heartbeat_time = -math.inf
        self._progress = None
        if config.logging.progress and sys.stderr.isatty():
            from gqa_jax.training import services

            self._progress = services.ProgressBar(self._n_steps)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            log.warning("the last metric rows can't be written: %s", error)  # what ended the run matters more

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """One row: `kind` "train" or "eval", the number of optimizer steps done, and named numbers (None: not known)."""
        row = {"kind": kind, "step": step, "time": time.time()} | storage.finite(values)
        self._files.append(json.dumps(row, allow_nan=False) + "\n")
        for name, service in list(self._services.items()):
            try:
                service.write(kind, step, {key: value for key, value in values.items() if value is not None})
            except Exception as error:  # an outage of a service must not stop a run
                log.warning("%s failed (%s): going on without it", name, error)
                del self._services[name]

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

        On gs:// in the background, and more rarely (remote_rows.py).
        """
        if self._progress:
            self._progress.update(phase, step, tokens_per_second, mfu)
        now = time.monotonic()  # the clock of the machine may be set back
        if not force and now - self._heartbeat_time < HEARTBEAT_SECONDS:
            return
        self._heartbeat_time = now
        values = {
            "time": time.time(),
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
            self._progress.close()
        for service in self._services.values():
            try:
                service.close()
            except Exception as error:  # an outage of a service must not stop a run
                log.warning("closing a metrics writer failed: %s", error)
        self._files.close()


class _LocalFiles:
    """Rows and heartbeat of an attempt in a local folder."""

    def __init__(self, workdir: epath.Path, attempt: int):
        self._workdir = workdir
        storage.make_folder(workdir / "metrics")
        self._file = open(workdir / "metrics" / f"attempt-{attempt:03d}.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)

    def append(self, line: str) -> None:
        self._file.write(line)

    def heartbeat(self, values: Mapping[str, Any], force: bool) -> None:
        write_json(self._workdir / "heartbeat.json", values)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NoMetrics(Metrics):
    """Of the processes beside the primary, which write nothing."""

    def __init__(self):
        pass

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    write = heartbeat = flush = close = _nothing
