"""State of a cell: a pure function of its run folder, the engine's job and the time.

planned    nothing has happened, or it waits for the cell that it continues
queued     the engine has it and has not started it
running    the engine runs it; stalled: and it has shown no sign of life for ten minutes
preempted  it was asked to end, and saved
lost       it ended without a word: killed, or its machine is gone
failed     it ended with an error, or too often without progress
diverged   its loss was no longer finite: a result
done       it has a result
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax import storage
from gqa_jax.config import TrainConfig, differing_fields
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder
from launch.executors.base import QUEUED, RUNNING, Job
from launch.grid import Cell, Layout

STALLED_SECONDS = 600.0  # without a heartbeat; a compilation may take minutes
CLOCK_SECONDS = 60.0  # that clocks of two machines may differ
RETRIED_CLASSES = ("killed", "disk_full", "preempted", "infrastructure")  # `run` starts these again; others would fail alike
FINAL = ("done", "diverged")
ACTIVE = ("queued", "running", "stalled")
BAD = ("failed", "diverged", "stalled")
CANCELLED = "cancelled.json"  # in a run folder: when `launch cancel` ended its job

# Attempts in a row, of a cell that has saved nothing since, after which it is not started any more.
PREEMPTED_IN_VAIN, LOST_IN_VAIN = 3, 8
UNSTARTED = 5  # submissions in a row after which no training process has appeared
BACKOFF_SECONDS = 30.0  # after the first such submission, doubled by each
LONGEST_BACKOFF_SECONDS = 1800.0


@dataclasses.dataclass(frozen=True)
class CellState:
    """What is known of a cell from outside."""

    state: str
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    heartbeat_age: float | None = None  # seconds
    silence: float | None = None  # of a running cell: seconds since the heartbeat, or the start of its job
    loss: float | None = None
    failure: str | None = None  # class: of run_folder.classify, killed, infrastructure, no_progress, edited, broken_result
    cause: str | None = None  # one sentence; of a planned cell: what it waits for
    attempts: int = 0
    device: str | None = None  # kind of device
    device_seconds: float | None = None  # devices x seconds of all attempts
    job: str | None = None  # the engine's id
    where: str | None = None  # the engine's nodes or zone
    cancelled: float | None = None  # when its job was last ended by `launch cancel`, seconds since the epoch
    blocked: bool = False  # waits for a cell that `run` won't start again
    not_before: float = 0.0  # seconds since the epoch before which `run` does not start it

    @property
    def runnable(self) -> bool:
        """Whether `run` starts it, now or when its parent is done: not finished, not held, not failed as it would again."""
        if self.state in ("planned", "preempted", "lost"):
            return not self.blocked
        return self.state == "failed" and self.failure in RETRIED_CLASSES


def of_all(cells: Sequence[Cell], layout: Layout, now: float, jobs: Mapping[str, Job]) -> list[CellState]:
    """States of these cells; on gs:// many folders are read at once."""
    remote = storage.is_remote(layout.root)
    return storage.each(lambda cell: of(layout.cell(cell.name), now, jobs.get(cell.name), cell), cells, remote=remote)


def of(folder: epath.PathLike, now: float, job: Job | None = None, cell: Cell | None = None) -> CellState:
    """State of the cell in `folder` at `now` (seconds since the epoch), for which the engine has `job`. Reads only.

    With `cell` it is also checked that the folder is still of that cell.
    """
    folder = epath.Path(folder) if storage.is_remote(folder) else Path(folder)  # the latter is several times as fast
    names = set(storage.names(folder))
    heartbeat = _json(folder / "heartbeat.json") if "heartbeat.json" in names else {}
    known: dict[str, Any] = {
        "step": heartbeat.get("step"),
        "steps": heartbeat.get("steps"),
        "tokens_per_second": heartbeat.get("tokens_per_second"),
        "heartbeat_age": now - heartbeat["time"] if "time" in heartbeat else None,
        "device": heartbeat.get("device"),
        "device_seconds": heartbeat.get("device_seconds"),
        "attempts": _attempts(folder, names),
    }
    if job is not None:
        known |= {"job": job.id, "where": job.where}
    if CANCELLED in names:
        known |= {"cancelled": _json(folder / CANCELLED).get("time")}
    if cell is not None and "config.json" in names and (what := _edited(folder, cell)) is not None:
        return CellState("failed", **known, failure="edited", cause=what)
    if "result.json" in names and (over := _finished(folder, known)) is not None:
        return over
    if job is not None and job.state == QUEUED:
        return CellState("queued", **known, cause=job.detail or None)
    if job is not None and job.state == RUNNING:
        return _running(heartbeat, known, job, now)
    return _at_rest(folder, names, known, job, now)


def _finished(folder: epath.Path, known: dict[str, Any]) -> CellState | None:
    """Of a cell with a result; None when `retry` has just moved it away."""
    try:
        result = run_folder.find_result(folder / "result.json")
    except ValueError as error:
        return CellState("failed", **known, failure="broken_result", cause=str(error))
    if result is None:
        return None
    cause = None if result["status"] == "done" else f"not finite at step {result['step']}"
    known |= {"step": result["step"], "tokens_per_second": result.get("tokens_per_second")}
    known |= {"device": result.get("device"), "device_seconds": result.get("device_seconds")}
    return CellState(result["status"], **known, loss=result["loss"], cause=cause)


def _running(heartbeat: dict[str, Any], known: dict[str, Any], job: Job, now: float) -> CellState:
    ahead = heartbeat.get("time", now) - now
    if ahead > CLOCK_SECONDS:
        cause = f"the clock of {heartbeat.get('host')} is {ahead:.0f} s ahead of this machine's: set both by NTP"
        return CellState("running", **known, eta_seconds=heartbeat.get("eta_seconds"), cause=cause)
    life = [at for at in (heartbeat.get("time"), job.since) if at is not None]
    silence = now - max(life) if life else 0.0
    if silence > STALLED_SECONDS:
        return CellState(
            "stalled", **known, cause=f"no heartbeat for {silence:.0f} s: see what it printed, cancel it to start again"
        )
    return CellState("running", **known, eta_seconds=heartbeat.get("eta_seconds"))


def _at_rest(folder: epath.Path, names: set[str], known: dict[str, Any], job: Job | None, now: float) -> CellState:
    """Of a cell without a job that lives."""
    tries = _in_vain(folder, names)
    end = _json(folder / "exit.json") if "exit.json" in names else {}
    if "host-failure.json" in names:  # a host that did not come to train
        failure = _json(folder / "host-failure.json")
        if failure.get("time", 0.0) > max(end.get("time", 0.0), tries.begun):
            end = failure
    kind, cause = end.get("class", "error"), end.get("reason")
    if end and kind not in RETRIED_CLASSES:
        return CellState("failed", **known, failure=kind, cause=cause)
    waits, blocked = _obstacle(folder, now)
    known |= {"not_before": tries.resume}
    said = job.detail if job is not None and job.detail else None
    if end and kind != "preempted":
        resting = CellState("failed", **known, failure=kind, cause=cause)
    elif end:
        resting = CellState("preempted", **known, cause=cause, blocked=blocked)
    elif known["attempts"]:
        cause = said or "it ended without a word: killed, or its machine is gone"
        resting = CellState("lost", **known, cause=cause, blocked=blocked)
    else:
        resting = CellState("planned", **known, cause=waits or said, blocked=blocked)
    if (reason := tries.reason(resting)) is not None:
        return CellState("failed", **known, failure="no_progress", cause=reason)
    return resting


@dataclasses.dataclass(frozen=True)
class _InVain:
    """What a cell has tried since it last got on."""

    attempts: int = 0  # that saved nothing
    submissions: int = 0  # that led to no attempt
    resume: float = 0.0  # when the next one may come, seconds since the epoch
    begun: float = 0.0  # when the newest attempt came to train, seconds since the epoch

    def reason(self, now: CellState) -> str | None:
        """Why it is not tried again; None: it is."""
        if self.submissions >= UNSTARTED:
            said = f": {now.cause}" if now.cause else ""
            return f"submitted {self.submissions} times in a row and no training process has appeared{said}"
        limit = PREEMPTED_IN_VAIN if now.state == "preempted" else LOST_IN_VAIN
        if self.attempts >= limit:
            how = "preempted" if now.state == "preempted" else "ended"
            return f"{how} {self.attempts} times in a row before it had saved anything: lower checkpoint.every_steps"
        return None


def _in_vain(folder: epath.Path, names: set[str]) -> _InVain:
    """From attempts/, submissions/ and the newest checkpoint."""
    records = [_json(folder / "attempts" / name) for name in storage.names(folder / "attempts")] if "attempts" in names else []
    newest = 0
    if records and "checkpoints" in names:
        newest = max((int(name) for name in storage.names(folder / "checkpoints") if name.isdecimal()), default=0)
    fruitless = 0
    for record in reversed(records):
        if record.get("first_step", 0) < newest:
            break
        fruitless += 1
    begun = max((record.get("time", 0.0) for record in records), default=0.0)
    submissions = 0
    last = 0.0
    if "submissions" in names:
        for name in reversed(storage.names(folder / "submissions")):
            at = _json(folder / "submissions" / name).get("time", 0.0)
            if at <= begun:
                break
            submissions, last = submissions + 1, max(last, at)
    wait = min(BACKOFF_SECONDS * 2 ** (submissions - 1), LONGEST_BACKOFF_SECONDS) if submissions else 0.0
    return _InVain(fruitless, submissions, last + wait, begun)


def parent(folder: epath.PathLike) -> epath.Path | None:
    """Folder of the cell that the one in `folder` continues, by its config.json."""
    source = _json(epath.Path(folder) / "config.json").get("continue_from")
    if source is None:
        return None
    joined = storage.join(folder, source)
    return joined if storage.is_remote(joined) else epath.Path(os.path.normpath(joined))


def _obstacle(folder: epath.Path, now: float) -> tuple[str | None, bool]:
    """What a cell that has not started waits for, and whether in vain."""
    source = parent(folder)
    if source is None or (before := of(source, now)).state == "done":
        return None, False
    blocked = before.blocked or not before.runnable
    what = before.cause if before.blocked else before.state if before.state in ("failed", "diverged") else None
    return f"waits for {source.name}{f', which {what}' if what else ''}", blocked


def _edited(folder: epath.Path, cell: Cell) -> str | None:
    """What somebody has changed in config.json, so that the folder is not this cell's any more."""
    path = folder / "config.json"
    try:
        values = json.loads(storage.read_bytes(path) or b"")
        if values == cell.config.to_dict():
            return None
        theirs = TrainConfig.from_stored(values)
    except ValueError as error:
        return f"{path} can't be used ({error}): move it away, and `run` writes it again"
    try:
        lines = differing_fields(*(c.identity("", c.continue_from) for c in (cell.config, theirs)))
    except ConfigError as error:
        return f"{path} can't be used ({error}): move it away, and `run` writes it again"
    if not lines:
        return None
    return f"{path} was changed: {'; '.join(lines)}. Change it back, or move the folder away"


def waiting(names: Sequence[str], states: Sequence[CellState]) -> list[str]:
    """A line for each cause that unstarted cells wait for."""
    causes: dict[str, list[str]] = {}
    for name, now in zip(names, states, strict=True):
        if now.state in ("planned", "queued") and now.cause is not None:
            causes.setdefault(now.cause, []).append(name)
    others = {cause: f" and {len(held) - 1} more" if len(held) > 1 else "" for cause, held in causes.items()}
    return [f"{held[0]}{others[cause]}: {cause}" for cause, held in causes.items()]


ALIKE = 3  # cells of a size that fail alike before the others of that size are held back


def held_back(cells: Sequence[Cell], states: Sequence[CellState]) -> dict[str, str]:
    """Cells not to be started, with the reason: the first of their size have failed alike, and none has got through."""
    failures: dict[tuple, list[tuple[str, str]]] = defaultdict(list)
    through = set()
    for cell, now in zip(cells, states, strict=True):
        if now.state == "failed" and now.failure not in RETRIED_CLASSES:
            failures[_size(cell)].append((str(now.failure), cell.name))
        elif now.state == "done" or (now.state == "running" and now.step):
            through.add(_size(cell))
    result = {}
    for cell, now in zip(cells, states, strict=True):
        kinds = {kind for kind, _ in failures[_size(cell)]}
        if now.runnable and _size(cell) not in through and len(failures[_size(cell)]) >= ALIKE and len(kinds) == 1:
            (kind, first), *others = failures[_size(cell)]
            result[cell.name] = f"held back: {len(others) + 1} cells of its size failed alike ({kind}), like {first}"
    return result


def _size(cell: Cell) -> tuple[int, int, int]:
    return cell.config.model.n_layers, cell.config.model.d_model, cell.config.context_length


def _attempts(folder: epath.Path, names: set[str]) -> int:
    """How often training has begun: by the records, and by the rows of attempts from before there were records."""
    numbers = set()
    for kind in ("attempts", "metrics"):
        if kind in names:
            for name in storage.names(folder / kind):
                number = name.removeprefix("attempt-").split(".")[0].split("-")[0]
                if number.isdecimal():
                    numbers.add(int(number))
    return len(numbers)


def _json(path: epath.Path) -> dict[str, Any]:
    """A small record, {} when it is not there or broken: a heartbeat is never worth an error."""
    try:
        return storage.read_json(path) or {}
    except (OSError, ValueError):
        return {}
