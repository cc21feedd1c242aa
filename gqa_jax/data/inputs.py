"""The files that a store is made of: a change is noticed, while they are read and when the same store is asked for again.

A finished store keeps their names, sizes, times of modification and SHA-256 in `inputs.json`. The digest is taken by a thread
beside the reading, of the bytes as they are stored (compressed ones too).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax import storage
from gqa_jax.data.sources import InputError, Source, reason, shown
from gqa_jax.data.store import INPUTS, StoreError

_READ_BYTES = 1 << 20


class InputFiles:
    """Watches the files of `sources` from the beginning of a preparation to its end; a context manager."""

    def __init__(self, sources: Sequence[Source]):
        """Raises InputError for a file that is no longer as it was found."""
        self._sources = [source for source in sources if source.path is not None]
        self._states = {source.path: _state(source.path) for source in self._sources}
        for source in self._sources:
            if self._states[source.path].st_size != source.size:
                raise _changed(source.path)
        self._digests: dict[Path, Future[str]] = {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="inputs")

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def states(self) -> list[tuple[int, ...]]:
        """What tells each file from another that took its place, in order."""
        return [_identity(state) for state in self._states.values()]

    def begin(self, source: Source) -> None:
        """The source is read from now on: its digest is begun."""
        if source.path is not None and source.path not in self._digests:
            self._digests[source.path] = self._pool.submit(_sha256, source.path, self._stop)

    def check(self, source: Source) -> None:
        """Raises InputError when the file is no longer what it was at the beginning."""
        if source.path is not None and _identity(_state(source.path)) != _identity(self._states[source.path]):
            raise _changed(source.path)

    def write_record(self, out: Path) -> None:
        """Writes `inputs.json` into the folder of the store, if there are files. Raises InputError when one has changed."""
        files = []
        for source in self._sources:
            sha256 = self._digests[source.path].result()
            self.check(source)
            mtime = self._states[source.path].st_mtime_ns
            files.append({"name": source.name, "bytes": source.size, "mtime_ns": mtime, "sha256": sha256})
        if files:
            storage.write_bytes(out / INPUTS, (json.dumps({"files": files}) + "\n").encode())


def changed_since(out: Path | epath.Path, sources: Sequence[Source]) -> list[str] | None:
    """What is no longer as in the finished store in `out`, local or on gs://, a sentence a file; None: it keeps no record.

    A file of the recorded size and time is taken as it is; another is read. Raises StoreError for an unusable record.
    """
    content = storage.read_bytes(out / INPUTS)
    if content is None:
        return None
    try:
        facts = [(file["name"], (file["bytes"], file["mtime_ns"], file["sha256"])) for file in json.loads(content)["files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{out / INPUTS} can't be used ({error}): delete it; changes of the inputs then go unnoticed"
        ) from error
    recorded = _numbered(facts)
    now = _numbered((source.name, source.path) for source in sources if source.path is not None)
    both = [key for key in now if key in recorded]
    sentences = [f"{shown(now[key])} has changed" for key in both if _differs(now[key], *recorded[key])]
    sentences += [f"{shown(path)} is new" for key, path in now.items() if key not in recorded]
    return sentences + [f"{shown(name)} is gone" for name, number in recorded if (name, number) not in now]


def _numbered(files: Iterable[tuple[str, Any]]) -> dict[tuple[str, int], Any]:
    """Values by name, and by how many of that name came before: files of several inputs may have the same."""
    seen, result = Counter(), {}
    for name, value in files:
        result[name, seen[name]] = value
        seen[name] += 1
    return result


def _differs(path: Path, size: int, mtime_ns: int, sha256: str) -> bool:
    state = _state(path)
    if state.st_size == size and state.st_mtime_ns == mtime_ns:
        return False
    return state.st_size != size or _sha256(path, threading.Event()) != sha256


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"{shown(path)}: {reason(error)}: it was there when the inputs were looked for") from error


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _changed(path: Path) -> InputError:
    return InputError(f"{shown(path)} has changed while it was read: give the same command again when nothing writes to it")


def _sha256(path: Path, stop: threading.Event) -> str:
    digest, block = hashlib.sha256(), bytearray(_READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(block)) and not stop.is_set():
                digest.update(memoryview(block)[:count])
    except OSError as error:
        raise InputError(f"{shown(path)}: {reason(error)}") from error
    return digest.hexdigest()
