"""One pass over a grid: what the engine has, what each cell's state is, what is submitted.

Nothing is remembered between passes but in the run folders and the engine (`watch` has what only spares work), so a launcher
may die at any moment, and several may work on one grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from gqa_jax import storage
from gqa_jax.errors import ConfigError
from launch import state
from launch.cells import Cell, Layout
from launch.executors import base
from launch.executors.base import DEAD, Executor, Job, Look, SubmitError, Submitted
from launch.state import CellState

HUNG_SECONDS = 3600.0  # without a sign of life after which a job is ended
SECOND_LOOK_SECONDS = 60.0  # after which it is looked for once more: some heartbeats later, also on gs://
PATIENCE_SECONDS = 300.0  # for another launcher of this machine to end its pass


@dataclasses.dataclass
class Pass:
    """What one pass found and did."""

    cells: Sequence[Cell]
    states: list[CellState]  # before anything was submitted
    jobs: Look
    at: float  # when it looked, seconds since the epoch
    submitted: list[Job] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # cell -> the engine's words
    refused_always: set[str] = dataclasses.field(default_factory=set)  # those of them that the engine would refuse again
    held: dict[str, str] = dataclasses.field(default_factory=dict)  # cell -> why it is not started
    notes: list[str] = dataclasses.field(default_factory=list)  # what `reconcile` did, and what did not answer
    over_budget: str | None = None  # what is said where a budget is spent

    @property
    def active(self) -> int:
        """Cells that the engine has now."""
        return len({job.cell for job in self.jobs.values() if job.state != DEAD} | {job.cell for job in self.submitted})

    @property
    def pending(self) -> list[str]:
        """Cells that a later pass may start."""
        started = {job.cell for job in self.submitted}
        pairs = zip(self.cells, self.states, strict=True)
        return [c.name for c, now in pairs if now.runnable and c.name not in self.held and c.name not in started]


def look(cells: Sequence[Cell], layout: Layout, engine: Executor, done: Mapping[str, CellState] | None = None) -> Pass:
    """The states of these cells, from one look at the engine and one at the folder. Raises SubmitError of the engine.

    done: cells that are known to be done, whose folders are not read again.
    """
    jobs, at = engine.jobs(), time.time()
    return Pass(cells, state.of_all(cells, layout, at, jobs, done or {}), jobs, at)


def advance(
    cells: Sequence[Cell],
    layout: Layout,
    engine: Executor,
    once: Collection[str] = (),
    since: float = math.inf,
    done: Mapping[str, CellState] | None = None,
    held: Mapping[str, str] | None = None,
    resting: Collection[str] = (),
    limit: Callable[[Pass, Sequence[Cell]], Mapping[str, str]] | None = None,
) -> Pass:
    """Cleans up what ended, and submits of `cells` what can start now.

    Not of those named in `once` what was killed or lost, nothing that somebody has cancelled after `since`, nothing that is
    `held`, for the reason given there, or `resting`: for another pass. `limit` is asked which of those that could start must
    not, and why. done: as in `look`. Raises SubmitError when the engine does not answer.
    """
    now = look(cells, layout, engine, done)
    notes = engine.reconcile(now.jobs) if now.jobs.listed else []
    if hung := silent(now, layout, engine):
        engine.cancel(hung)
        notes += [f"{name} has been silent for {HUNG_SECONDS / 60:.0f} minutes: cancelled, to start again" for name in hung]
    if notes:
        now = look(cells, layout, engine, done)
        now.notes = notes
    states = dict(zip((cell.name for cell in cells), now.states, strict=True))
    now.held = state.held_back(cells, now.states)
    now.held |= {name: why for name, why in (held or {}).items() if states[name].runnable}
    chosen = []
    for cell in cells:
        mine = states[cell.name]
        if mine.runnable and mine.cancelled is not None and mine.cancelled > since:
            now.held[cell.name] = "cancelled meanwhile: the next `run` starts it again"
        was_lost = mine.state == "lost" or mine.failure in ("killed", "disk_full")
        if (cell.name in once and was_lost) or cell.name in now.held or not mine.runnable or mine.not_before > now.at:
            continue
        if mine.waits or (cell.parent in states and states[cell.parent].state != "done"):
            continue
        if cell.name not in resting:
            chosen.append(cell)
    if limit is not None and chosen:
        now.held |= limit(now, chosen)
        chosen = [cell for cell in chosen if cell.name not in now.held]
    for cell, result, _ in submit(chosen[: max(engine.capacity - now.active, 0)], now.jobs, layout, engine):
        if isinstance(result, Job):
            now.submitted.append(result)
        else:
            now.refused[cell.name] = str(result)
            now.refused_always |= {cell.name} if isinstance(result, ConfigError) else set()
    return now


def silent(now: Pass, layout: Layout, engine: Executor) -> list[str]:
    """Cells that have been silent for an hour, and are so while this waits: not where a clock was set, or a machine slept, nor
    what has ended meanwhile. Raises SubmitError.
    """

    def found(states: Sequence[CellState]) -> dict[str, float]:
        pairs = zip(now.cells, states, strict=True)
        return {c.name: s.silence for c, s in pairs if s.state == "stalled" and (s.silence or 0.0) > HUNG_SECONDS}

    if not (first := found(now.states)):
        return []
    deadline, jobs = time.monotonic() + SECOND_LOOK_SECONDS, now.jobs
    while (left := deadline - time.monotonic()) > 0 and first.keys() & jobs.keys():
        engine.wait(left)  # or less: until a cell ends
        jobs = engine.jobs()
    again = found(state.of_all(now.cells, layout, now.at, jobs))  # by the same clock: the same number, the same heartbeat
    return [name for name, seconds in first.items() if again.get(name) == seconds]


def submit(cells: Sequence[Cell], jobs: Look, layout: Layout, engine: Executor) -> Iterator[Submitted]:
    """Submits cells, with what their run folders keep of it; `jobs`: the last look. Raises as Executor.submit_all."""
    for cell in cells:
        folder = layout.cell(cell.name)
        for name, text in engine.submission(cell).files.items():
            storage.write_bytes(folder / name, text.encode())
        storage.remove(folder / "host-failure.json")  # of a submission before this one
    for done in engine.submit_all(cells, jobs) if cells else ():
        if isinstance(done.result, Job) and not engine.here:
            submissions = layout.cell(done.cell.name) / "submissions"
            storage.make_folder(submissions)
            facts = {"time": done.time, "engine": engine.engine, "id": done.result.id, "where": done.result.where}
            storage.write_json(submissions / f"{int(1000 * done.time)}-{os.getpid()}.json", facts)
        yield done


@contextlib.contextmanager
def only_launcher(layout: Layout, patience: float = 0.0) -> Iterator[None]:
    """Holds the grid for this process; of a grid on gs://, against others of this machine.

    Raises ConfigError when another launcher has it for longer than `patience` seconds.
    """
    layout.on_this_machine.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with open(layout.on_this_machine / ".lock", "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"another launcher runs in {layout.root}: see `python -m launch status`, or wait for it to end"
                    ) from None
                time.sleep(0.1)
        yield


def cancel(cells: Sequence[str], layout: Layout, engine: Executor) -> None:
    """Ends the jobs of these cells; launchers that are at work don't start them again. Raises SubmitError."""
    mark_cancelled(cells, layout)
    engine.cancel(cells)


def mark_cancelled(cells: Sequence[str], layout: Layout) -> None:
    """Lets launchers that are at work not start these cells again."""
    for name in cells:
        storage.make_folder(layout.cell(name))
        storage.write_json(layout.cell(name) / state.CANCELLED, {"time": time.time()})


def remember(layout: Layout, engine: Executor) -> None:
    """Writes which engine the grid is on, for all commands after this one.

    Raises ConfigError when the clock of this machine is not that of the storage: states follow from times of both.
    """
    path = layout.root / "cluster.json"
    storage.write_json(path, engine.options.facts())
    ahead = time.time() - storage.modified(path)
    if abs(ahead) > state.CLOCK_SECONDS:
        where = "Google's" if storage.is_remote(path) else f"that of the file system of {layout.root}"
        raise ConfigError(
            f"the clock of this machine is {ahead:+.0f} s from {where}: set it by NTP, for cells would look stalled"
        )


def recall(layout: Layout, on: str | None) -> Executor:
    """The engine that `on` names, else the one that the grid was last run on, else this machine. Raises ConfigError."""
    if on is not None:
        return base.load(on, layout)
    return _last(layout) or base.load("local", layout)


def _last(layout: Layout, new: Executor | None = None) -> Executor | None:
    """The engine that cluster.json names, if it is not `new`; None where there is none. Raises ConfigError for an odd file."""
    path = layout.root / "cluster.json"
    try:
        facts = storage.read_json(path)
        same = facts is None or (new is not None and new.options.has_jobs_of(facts))
        return None if same else base.make(facts, layout)
    except ValueError as error:
        raise ConfigError(f"{path} can't be used ({error!s:.500}): move it away and name its engine by --on") from error


def require_free(layout: Layout, engine: Executor) -> None:
    """Raises ConfigError while another engine than this one has cells of the grid: they would run twice."""
    if (before := _last(layout, engine)) is None:
        return
    try:
        active = [job.cell for job in before.jobs().values() if job.state != DEAD]
    except SubmitError as error:
        raise ConfigError(
            f"the grid was run on {before.engine}, which does not answer ({error}): whether it still has cells is not known"
        ) from error
    if active:
        raise ConfigError(
            f"{len(active)} cells of the grid are on {before.engine}, like {active[0]}: wait for them, or end them with "
            "`python -m launch cancel GRID`, before you run it elsewhere"
        )
