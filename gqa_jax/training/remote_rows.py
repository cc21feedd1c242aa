"""Metric rows and heartbeat of a run on gs://, written in the background, so that no step waits for the network.

Nothing can be appended to on gs://: rows are collected and written as objects of their own, `metrics/attempt-NNN-PPPPP.jsonl`,
every PART_SECONDS, and at once by `flush`: before a checkpoint is begun, after which their steps are not trained again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from gqa_jax import storage

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0  # an object may be written about once a second
PART_SECONDS = 30.0


class RemoteFiles:
    """Those of one attempt."""

    def __init__(self, workdir: epath.Path, attempt: int):
        self._workdir, self._attempt, self._part = workdir, attempt, 0
        self._lines: list[str] = []  # not written yet; appended to and deleted from in one operation, which needs no lock
        self._beat: tuple[Mapping[str, Any], bool] | None = None  # not written yet, and whether it is to be at once
        self._rows_time, self._beat_time = time.monotonic(), -math.inf  # when each was last tried
        self._failing: set[str] = set()
        self._beats = threading.Lock()  # of `_beat`
        self._writing = threading.Lock()  # one object after the other
        self._over = threading.Event()
        threading.Thread(target=self._write_in_background, name="metrics", daemon=True).start()

    def append(self, line: str) -> None:
        self._lines.append(line)

    def heartbeat(self, values: Mapping[str, Any], force: bool) -> None:
        with self._beats:
            self._beat = values, force or (self._beat is not None and self._beat[1])

    def flush(self) -> None:
        """Writes the rows that are not yet written as a part. The next one that is tried has the same name if it fails."""
        with self._writing:
            self._rows_time = time.monotonic()
            if lines := list(self._lines):
                path = self._workdir / "metrics" / f"attempt-{self._attempt:03d}-{self._part:05d}.jsonl"
                storage.write_bytes(path, "".join(lines).encode())
                self._part += 1
                del self._lines[: len(lines)]

    def close(self) -> None:
        self._over.set()
        self._tell("heartbeat.json", self._write_beat)
        self.flush()

    def _write_in_background(self) -> None:
        while not self._over.wait(0.5):
            now, beat = time.monotonic(), self._beat
            if beat is not None and now - self._beat_time >= (1.0 if beat[1] else HEARTBEAT_SECONDS):
                self._tell("heartbeat.json", self._write_beat)
            if self._lines and now - self._rows_time >= PART_SECONDS:
                self._tell("metrics", self.flush)

    def _write_beat(self) -> None:
        with self._writing:
            with self._beats:
                beat, self._beat = self._beat, None
            if beat is None:
                return
            self._beat_time = time.monotonic()
            try:
                storage.write_json(self._workdir / "heartbeat.json", beat[0])
            except BaseException:
                with self._beats:  # one that came meanwhile says more
                    newest = self._beat or beat
                    self._beat = newest[0], newest[1] or beat[1]
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
