"""One pass over a grid: what the engine has, what each cell's state is, what is submitted.

Nothing is remembered between passes but in the run folders and the engine, so a launcher may die at any moment, and several
may work on one grid.
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
from launch.executors.base import DEAD, Executor, Job, SubmitError
from launch.state import CellState

HUNG_SECONDS = 3600.0  # without a sign of life after which a job is ended
PATIENCE_SECONDS = 300.0  # for another launcher of this machine to end its pass
REFUSALS = 3  # in a row after which a pass submits no more: the quota is used up, or the engine is down


@dataclasses.dataclass
class Pass:
    """What one pass found and did."""

    cells: Sequence[Cell]
    states: list[CellState]  # before anything was submitted
    jobs: Mapping[str, Job]
    submitted: list[Job] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # cell -> the engine's words
    held: dict[str, str] = dataclasses.field(default_factory=dict)  # cell -> why it is not started
    notes: list[str] = dataclasses.field(default_factory=list)  # what `reconcile` did

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


def look(cells: Sequence[Cell], layout: Layout, engine: Executor) -> Pass:
    """The states of these cells, from one look at the engine and one at the folder. Raises SubmitError of the engine."""
    jobs = engine.jobs()
    return Pass(cells, state.of_all(cells, layout, time.time(), jobs), jobs)


def advance(
    cells: Sequence[Cell], layout: Layout, engine: Executor, once: Collection[str] = (), since: float = math.inf
) -> Pass:
    """Cleans up what ended, and submits of `cells` what can start now.

    Not of those named in `once` what was killed or lost, and nothing that somebody has cancelled after `since`.

    Raises ConfigError when the engine would refuse a cell always, SubmitError when it does not answer.
    """
    now = look(cells, layout, engine)
    notes = engine.reconcile(now.jobs) if now.jobs else []
    hung = [c.name for c, s in zip(cells, now.states, strict=True) if s.state == "stalled" and (s.silence or 0) > HUNG_SECONDS]
    if hung:
        engine.cancel(hung)
        notes += [f"{name} has been silent for {HUNG_SECONDS / 60:.0f} minutes: cancelled, to start again" for name in hung]
    if notes:
        now = look(cells, layout, engine)
        now.notes = notes
    now.held = state.held_back(cells, now.states)
    states = dict(zip((cell.name for cell in cells), now.states, strict=True))
    at, refusals = time.time(), 0
    for cell in cells:
        mine = states[cell.name]
        if mine.runnable and mine.cancelled is not None and mine.cancelled > since:
            now.held[cell.name] = "cancelled meanwhile: the next `run` starts it again"
        was_lost = mine.state == "lost" or mine.failure in ("killed", "disk_full")
        if (cell.name in once and was_lost) or cell.name in now.held or not mine.runnable or mine.not_before > at:
            continue
        if mine.waits or (cell.parent in states and states[cell.parent].state != "done"):
            continue
        if now.active >= engine.capacity or refusals == REFUSALS:
            break
        try:
            now.submitted.append(submit(cell, layout, engine))
            refusals = 0
        except SubmitError as error:
            now.refused[cell.name] = str(error)
            refusals += 1
    return now


def submit(cell: Cell, layout: Layout, engine: Executor) -> Job:
    """Writes what the run folder keeps of a submission, and submits. Raises as Executor.submit."""
    folder = layout.cell(cell.name)
    for name, text in engine.submission(cell).files.items():
        storage.write_bytes(folder / name, text.encode())
    storage.remove(folder / "host-failure.json")  # of a submission before this one
    job = engine.submit(cell)
    if not engine.here:
        at, records = time.time(), folder / "submissions"
        records.mkdir(parents=True, exist_ok=True)
        facts = {"time": at, "engine": engine.engine, "id": job.id, "where": job.where}
        storage.write_json(records / f"{int(1000 * at)}-{os.getpid()}.json", facts)
    return job


def repeat(
    cells: Sequence[Cell],
    layout: Layout,
    engine: Executor,
    watch: bool,
    on_pass: Callable[[Pass], None],
    seconds: float | None = None,
) -> Pass:
    """Passes until no cell is active or can be started; one alone on an engine that goes on by itself, unless `watch`.

    Without `watch` a cell that was killed or lost meanwhile is not started again. `on_pass` is called after each pass, also one
    in which the engine did not answer, which has a note. `seconds` lie between them (default: the engine's).
    """
    began = time.time()
    started: set[str] = set()
    last: Pass | None = None
    while True:
        try:
            # Of the launchers on this machine one looks and submits at a time; one whose children the cells are holds the grid.
            with contextlib.nullcontext() if engine.here else only_launcher(layout, PATIENCE_SECONDS):
                last = advance(cells, layout, engine, () if watch else started, began)
        except SubmitError as error:
            if last is None:
                raise ConfigError(str(error)) from error
            last = dataclasses.replace(last, submitted=[], notes=[f"{engine.engine} does not answer: {error}"])
        started |= {job.cell for job in last.submitted}
        on_pass(last)
        if not (engine.here or watch) or (last.active == 0 and not (watch and last.pending)):
            return last
        engine.wait(engine.pass_seconds if seconds is None else seconds)


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
    for name in cells:
        storage.write_json(layout.cell(name) / state.CANCELLED, {"time": time.time()})
    engine.cancel(cells)


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
    facts = storage.read_json(layout.root / "cluster.json")
    return base.make(facts, layout) if facts else base.load("local", layout)


def require_free(layout: Layout, engine: Executor) -> None:
    """Raises ConfigError while another engine than this one has cells of the grid: they would run twice."""
    facts = storage.read_json(layout.root / "cluster.json")
    if facts is None or engine.options.has_jobs_of(facts):
        return
    before = base.make(facts, layout)
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
