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
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from gqa_jax import storage
from gqa_jax.training import records, run_folder
from launch.cells import Cell, Layout, of_several
from launch.executors.base import QUEUED, RUNNING, Job

STALLED_SECONDS = 600.0  # without a heartbeat; a compilation may take minutes
CLOCK_SECONDS = 60.0  # that clocks of two machines may differ
RETRIED_CLASSES = ("killed", "disk_full", "preempted", "infrastructure")  # `run` starts these again; others would fail alike
STATES = ("planned", "queued", "running", "stalled", "preempted", "lost", "failed", "diverged", "done")
FINAL = ("done", "diverged")
ACTIVE = ("queued", "running", "stalled")
BAD = ("failed", "diverged", "stalled")
BROKEN = ("broken_config", "broken_result")  # a record that can't be used: `retry` moves it aside
CANCELLED = "cancelled.json"  # in a run folder: when `launch cancel` ended its job
PROGRESS = ("step", "steps", "tokens_per_second", "device", "device_seconds")  # of CellState, and of Cell.progress

# Attempts in a row, of a cell that has saved nothing since, after which it is not started any more.
PREEMPTED_IN_VAIN, LOST_IN_VAIN = 3, 8
UNSTARTED = 5  # submissions in a row after which no training process has appeared
FAULTS = 5  # of machines (class infrastructure), in a row
BACKOFF_SECONDS = 30.0  # after the first such submission or fault, doubled by each
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
    failure: str | None = None  # class: of run_folder.classify, killed, infrastructure, no_progress, edited, or of BROKEN
    cause: str | None = None  # one sentence; of a planned cell: what it waits for
    attempts: int = 0
    device: str | None = None  # kind of device
    device_seconds: float | None = None  # devices x seconds of all attempts
    job: str | None = None  # the engine's id
    where: str | None = None  # the engine's nodes or zone
    cancelled: float | None = None  # when its job was last ended by `launch cancel`, seconds since the epoch
    waits: bool = False  # for a cell that is not done; of one that rests
    blocked: bool = False  # waits for one that `run` won't start again
    given_up: bool = False  # machines have failed it too often
    not_before: float = 0.0  # seconds since the epoch before which `run` does not start it

    @property
    def runnable(self) -> bool:
        """Whether `run` starts it, now or when its parent is done: not finished, not held, not failed as it would again."""
        if self.state in ("planned", "preempted", "lost"):
            return not self.blocked
        return self.state == "failed" and self.failure in RETRIED_CLASSES and not self.given_up


def of_all(
    cells: Sequence[Cell], layout: Layout, now: float, jobs: Mapping[str, Job], known: Mapping[str, CellState] | None = None
) -> list[CellState]:
    """States of these cells; on gs:// many folders are read at once, and of those that are `known` none."""
    known = known or {}
    asked = [cell for cell in cells if cell.name not in known]
    remote = storage.is_remote(layout.root)
    found = storage.each(lambda cell: of(cell, layout.cell(cell.name), now, jobs.get(cell.name)), asked, remote=remote)
    states = dict(zip((cell.name for cell in asked), found, strict=True)) | dict(known)
    return [states[cell.name] for cell in cells]


def of_folders(cells: Sequence[Cell], layout: Layout, now: float) -> list[CellState]:
    """States of these cells where the engine can't be asked: a cell that has lately given a sign of life is said to run."""

    def judged(one: CellState) -> CellState:
        lives = one.state == "lost" and one.heartbeat_age is not None and one.heartbeat_age < STALLED_SECONDS
        return dataclasses.replace(one, state="running", cause=None) if lives else one

    return [judged(one) for one in of_all(cells, layout, now, {})]


def of(cell: Cell | type[Cell], folder: epath.PathLike, now: float, job: Job | None = None) -> CellState:
    """State of a cell in its folder at `now` (seconds since the epoch), for which the engine has `job`. Reads only.

    Where only the kind of the cell is given, it is not checked that the folder is still of that cell.
    """
    if not isinstance(folder, Path):
        folder = epath.Path(folder) if storage.is_remote(folder) else Path(folder)  # the latter is several times as fast
    place = os.fspath(folder)  # and texts are again
    names = set(storage.names(place))
    beat = cell.progress(folder) if "heartbeat.json" in names else {}
    known: dict[str, Any] = {name: beat.get(name) for name in PROGRESS}
    known |= {"heartbeat_age": max(0.0, now - beat["time"]) if "time" in beat else None}
    known |= {"attempts": run_folder.next_attempt(place) if names & {"attempts", "metrics"} else 0}
    if job is not None:
        known |= {"job": job.id, "where": job.where}
    known |= {"cancelled": records.read(f"{place}/{CANCELLED}").get("time") if CANCELLED in names else None}
    if not isinstance(cell, type) and "config.json" in names:
        try:
            what, kind = cell.edited(folder), "edited"
        except ValueError as error:
            what, kind = str(error), "broken_config"
        if what is not None:
            return CellState("failed", **known, failure=kind, cause=what)
    if "result.json" in names:
        try:
            result = cell.finished(folder)
        except ValueError as error:
            return CellState("failed", **known, failure="broken_result", cause=str(error))
        if result is not None:  # else `retry` has just moved it away
            known |= {name: result.get(name) for name in (*PROGRESS, "loss", "cause") if name != "steps"}
            return CellState(result["status"], **known)
    if job is not None and job.state == QUEUED:
        return CellState("queued", **known, cause=job.detail or None)
    if job is not None and job.state == RUNNING:
        return _running(beat, known, job, now)
    return _at_rest(cell, folder, names, known, job, now)


def _running(beat: Mapping[str, Any], known: dict[str, Any], job: Job, now: float) -> CellState:
    ahead = beat.get("time", now) - now
    if ahead > CLOCK_SECONDS:
        cause = f"the clock of {beat.get('host')} is {ahead:.0f} s ahead of this machine's: set both by NTP"
        return CellState("running", **known, eta_seconds=beat.get("eta_seconds"), cause=cause)
    life = [at for at in (beat.get("time"), job.since) if at is not None]
    silence = max(0.0, now - max(life)) if life else 0.0
    if silence > STALLED_SECONDS:
        cause = f"no heartbeat for {silence:.0f} s: see what it printed, cancel it to start again"
        return CellState("stalled", **known, silence=silence, cause=cause)
    return CellState("running", **known, silence=silence, eta_seconds=beat.get("eta_seconds"))


def _at_rest(
    cell: Cell | type[Cell], folder: epath.Path, names: set[str], known: dict[str, Any], job: Job | None, now: float
) -> CellState:
    """State of a cell without a job that lives."""
    place = os.fspath(folder)
    tries = _in_vain(place, names, now)
    end, failed = (records.read(f"{place}/{name}") if name in names else {} for name in ("exit.json", "host-failure.json"))
    if "class" in failed and failed.get("time", 0.0) > max(end.get("time", 0.0), tries.begun):  # a host never trained
        end = failed
    failure, cause = end.get("class"), end.get("reason")
    if failure is not None and failure not in RETRIED_CLASSES:
        return CellState("failed", **known, failure=failure, cause=cause)
    waits, blocked = _waits(cell, folder, now)
    known |= {"not_before": tries.resume, "waits": waits is not None}
    said = job.detail or None if job is not None else None
    if failure is not None:
        resting = "preempted" if failure == "preempted" else "failed"
    elif known["attempts"]:
        resting, cause = "lost", said or "it ended without a word: killed, or its machine is gone"
    else:
        resting, cause = "planned", waits or said
    if (reason := tries.reason(resting, cause)) is not None:
        return CellState("failed", **known, failure="no_progress", cause=reason)
    if resting == "failed":
        given_up = failure == "infrastructure" and tries.faults >= FAULTS
        cause = f"{tries.faults} times in a row its machines failed it, at last: {cause}" if given_up else cause
        return CellState("failed", **known, failure=failure, cause=cause, given_up=given_up)
    return CellState(resting, **known, cause=cause, blocked=blocked)


class _InVain(NamedTuple):
    """What a cell has tried since it last got on."""

    attempts: int  # that saved nothing, without those that machines have failed
    submissions: int  # of which no training process has been heard
    faults: int  # of machines
    resume: float  # when the next one may come, seconds since the epoch
    begun: float  # when the newest attempt came to train, seconds since the epoch

    def reason(self, resting: str, cause: str | None) -> str | None:
        """Why a cell that rests in this state is not tried again; None: it is."""
        if self.submissions >= UNSTARTED:
            said = f": {cause}" if cause else ""
            return f"submitted {self.submissions} times in a row and no training process has appeared{said}"
        how, limit = ("preempted", PREEMPTED_IN_VAIN) if resting == "preempted" else ("ended", LOST_IN_VAIN)
        if self.attempts >= limit:
            return f"{how} {self.attempts} times in a row before it had saved anything: lower checkpoint.every_steps"
        return None


def _in_vain(folder: str, names: set[str], now: float) -> _InVain:
    """From attempts/, submissions/, failures/ and the newest checkpoint; what is dated by a clock ahead is not waited for."""

    def listed(name: str) -> list[str]:
        return storage.names(f"{folder}/{name}") if name in names else []

    tries = [records.read(f"{folder}/attempts/{name}") for name in listed("attempts")]
    saved = [int(name) for name in listed("checkpoints") if name.isdecimal()] if tries else []
    after = itertools.takewhile(lambda each: each.get("first_step", 0) >= max(saved, default=0), reversed(tries))
    begun = max((each.get("time", 0.0) for each in tries), default=0.0)
    times = (records.read(f"{folder}/submissions/{name}").get("time", 0.0) for name in reversed(listed("submissions")))
    in_vain = len(list(after))
    saving = max((each.get("time", 0.0) for each in tries[: len(tries) - in_vain]), default=0.0)  # attempts that saved
    faults = [at for at in run_folder.failures(folder) if at > saving] if run_folder.FAILURES in names else []
    unheard = list(itertools.takewhile(lambda at: at > max([begun, *faults]), times))
    resume = max(_backoff(unheard, now), _backoff(faults, now))
    return _InVain(max(0, in_vain - len(faults)), len(unheard), len(faults), resume, begun)


def _backoff(times: Sequence[float], now: float) -> float:
    """When the next try may come after those at these times; 0: now."""
    known = [at for at in times if at <= now + CLOCK_SECONDS]
    return max(known) + min(BACKOFF_SECONDS * 2 ** (len(times) - 1), LONGEST_BACKOFF_SECONDS) if known else 0.0


def _waits(cell: Cell | type[Cell], folder: epath.Path, now: float) -> tuple[str | None, bool]:
    """What a cell waits for, if its parent is not done, and whether in vain."""
    is_first = not isinstance(cell, type) and cell.parent is None
    if is_first or (parent := cell.waits_for(folder)) is None or (before := of(*parent, now)).state == "done":
        return None, False
    blocked = before.blocked or not before.runnable
    what = before.cause if before.blocked else before.state if before.state in ("failed", "diverged") else None
    return f"waits for {parent[1].name}{f', which {what}' if what else ''}", blocked


def waiting(names: Sequence[str], states: Sequence[CellState]) -> list[str]:
    """A line for each cause that unstarted cells wait for."""
    pairs = zip(names, states, strict=True)
    return of_several((name, now.cause) for name, now in pairs if now.state in ("planned", "queued") and now.cause is not None)


ALIKE = 3  # cells of a size that fail alike before the others of that size are held back


def held_back(cells: Sequence[Cell], states: Sequence[CellState]) -> dict[str, str]:
    """Cells not to be started, with the reason: the first of their kind and size have failed alike, none has got through.

    Faults of machines are not of a size.
    """
    groups: dict[tuple, list[tuple[Cell, CellState]]] = defaultdict(list)
    for cell, now in zip(cells, states, strict=True):
        groups[cell.kind, cell.size].append((cell, now))
    result = {}
    for members in groups.values():
        over = [(cell, now) for cell, now in members if now.state == "failed" and not now.runnable and not now.given_up]
        failed = [(now.failure, cell.name) for cell, now in over if now.failure not in (*BROKEN, "edited")]
        through = any(now.state == "done" or (now.state == "running" and now.step) for _, now in members)
        if through or len(failed) < ALIKE or len({failure for failure, _ in failed}) > 1:
            continue
        (failure, first), *_ = failed
        reason = f"held back: {len(failed)} cells of its size failed alike ({failure}), like {first}"
        result |= {cell.name: reason for cell, now in members if now.runnable}
    return result
