"""Engines whose names of jobs are not unique: who submits looks before and after, and of several jobs of a cell the one with
the lowest id is kept.
"""

from __future__ import annotations

import abc
import dataclasses
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gqa_jax import storage
from gqa_jax.errors import ConfigError
from launch.cells import Cell
from launch.executors import base
from launch.executors.base import DEAD, QUEUED, REFUSALS, RUNNING, Job, Look, SubmitError, Submitted


@dataclasses.dataclass(frozen=True)
class Record:
    """A job in the engine's list."""

    cell: str
    id: int
    state: str | None  # QUEUED, RUNNING; DEAD: never to run as it is; None: it has ended
    detail: str = ""  # in words: why it waits, how it ends or has ended
    since: float | None = None  # seconds since the epoch that it is RUNNING
    where: str = ""
    ending: bool = False  # its processes may still save
    failure: str | None = None  # why it came to nothing, where training may not have said so; always of a DEAD one
    is_final: bool = False  # another would fail as this one
    ended: float | None = None  # seconds since the epoch

    @property
    def job(self) -> Job:
        return Job(self.cell, str(self.id), self.state or QUEUED, self.detail, self.since, self.where)


class Executor(base.Executor):
    """A job per cell, in the engine's own queue."""

    @abc.abstractmethod
    def records(self) -> dict[str, list[Record]]:
        """All jobs of this grid that the engine knows, by cell, the lowest id first. Raises SubmitError."""

    @abc.abstractmethod
    def launch(self, cell: Cell) -> int | None:
        """Submits a cell, and its id where the engine says it. Raises as Executor.submit."""

    @abc.abstractmethod
    def end(self, records: Sequence[Record]) -> None:
        """Cancels jobs; those that have ended meanwhile are no error. Raises SubmitError."""

    def dead(self, records: Mapping[str, Sequence[Record]]) -> list[Record]:
        """Those of which the launcher has to say why they came to nothing."""
        return [record for mine in records.values() for record in mine if record.state == DEAD]

    def submit(self, cell: Cell) -> Job:
        (done,) = self.submit_all([cell], self.jobs())
        if isinstance(done.result, Exception):
            raise done.result
        return done.result

    def submit_all(self, cells: Sequence[Cell], jobs: Look) -> Iterator[Submitted]:
        """As Executor.submit_all. One look after the last cell says what became of all, so results come only then."""
        records, refusals = jobs.listed, 0
        asked: list[Submitted] = []
        ids: dict[str, int | None] = {}  # of those that the engine took, by cell
        for cell in cells:
            at, before = time.time(), records.get(cell.name, [])
            result: Job | SubmitError | ConfigError | None
            if alive := _alive(before):
                result = alive[0].job
            elif (result := _in_the_way(cell, before)) is None:
                try:
                    ids[cell.name] = self.launch(cell)
                except (SubmitError, ConfigError) as error:
                    result = error
            asked.append(Submitted(cell, result, at))
            refusals = refusals + 1 if isinstance(result, Exception) else 0
            if refusals == REFUSALS:
                break
        after = self.records() if ids else {}
        more = []
        for cell, result, at in asked:
            if cell.name in ids:
                known = {record.id for record in records.get(cell.name, ())}
                new = [record for record in after.get(cell.name, ()) if record.id not in known]
                more += _alive(new)[1:]  # another launcher came between
                result = self._came_of(cell, ids[cell.name], new)
            yield Submitted(cell, result, at)
        if more:
            self.end(more)

    def _came_of(self, cell: Cell, number: int | None, new: Sequence[Record]) -> Job | SubmitError:
        """A submission to which the engine gave this number, of a cell of which it has these jobs since."""
        if alive := _alive(new):
            return alive[0].job
        if new:  # it is over already, as the next look will show
            return Job(cell.name, str(new[-1].id), QUEUED, f"ended: {new[-1].detail}")
        if number is None:
            return SubmitError(f"{self.engine} took {cell.name} and does not list it: see its queue")
        return Job(cell.name, str(number), QUEUED)  # over already, and forgotten

    def jobs(self) -> Look:
        records = self.records()
        found = {record.cell: dataclasses.replace(record.job, state=DEAD) for record in self.dead(records)}
        for cell, mine in records.items():
            if shown := [*_alive(mine), *(record for record in mine if record.ending)]:
                found[cell] = shown[0].job
        return Look(found, records)

    def cancel(self, cells: Sequence[str]) -> None:
        records = self.records() if cells else {}
        self.end([record for cell in cells for record in records.get(cell, ()) if record.state and not record.ending])

    def reconcile(self, jobs: Look) -> list[str]:
        """As Executor.reconcile. Why a job came to nothing is left in the cell's folder."""
        records = jobs.listed
        notes, removed = [], []
        for cell, mine in records.items():
            if more := _alive(mine)[1:]:
                removed += more
                notes.append(f"{cell} had {len(more) + 1} jobs: cancelled all but {_alive(mine)[0].id}")
        for record in self.dead(records):
            self._explain(record)
            notes.append(f"{record.cell}: {record.failure}" + ("; cancelled" if record.state == DEAD else ""))
            removed += [record] if record.state == DEAD else []
        self.end(removed)
        return notes

    def _explain(self, record: Record) -> None:
        folder = self.layout.cell(record.cell)
        names = storage.names(folder)
        if names and "result.json" not in names:  # else the cell was removed, or is done
            kind = "error" if record.is_final else "infrastructure"  # the latter is tried again
            facts = {"class": kind, "reason": record.failure, "time": record.ended or time.time(), "job": str(record.id)}
            storage.write_json(folder / "host-failure.json", facts)


def _in_the_way(cell: Cell, records: Iterable[Record]) -> SubmitError | None:
    """Why a cell without a job that lives can't be submitted now."""
    for record in records:
        if record.ending:
            return SubmitError(f"job {record.id} of {cell.name} is still {record.detail}")
        if record.state == DEAD:
            return SubmitError(f"job {record.id} of {cell.name} must be cancelled first: {record.detail}")
    return None


def _alive(records: Iterable[Record]) -> list[Record]:
    """Jobs that run, or will; the first is the cell's."""
    return [record for record in records if record.state in (QUEUED, RUNNING) and not record.ending]


def call(
    argv: Sequence[str], *, seconds: float, text: str = "", environment: Mapping[str, str] | None = None, hint: str = ""
) -> subprocess.CompletedProcess:
    """An engine's program, with `text` as its input; its exit code is for the caller.

    Raises SubmitError, with the `hint`, when it can't be started or takes longer than `seconds`.
    """
    try:
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise SubmitError(f"`{shlex.join(argv)}` has not ended after {seconds:.0f} s{hint}") from error
    except OSError as error:
        raise SubmitError(f"`{shlex.join(argv)}` can't be started: {error.strerror}{hint}") from error
