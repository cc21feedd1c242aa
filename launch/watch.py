"""Passes over a grid again and again: when a launcher stops, what it does when nothing answers, whom it gives up.

What matters is in the run folders and the engine alone, so a launcher may die at any moment, and several may work on one grid.
While it goes on it remembers what is done, so as not to read it again, and what was refused, so as to ask less often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from gqa_jax.errors import ConfigError
from gqa_jax.formatting import duration
from launch import state
from launch.cells import Cell, Layout
from launch.executors.base import Executor, Look, SubmitError
from launch.run import PATIENCE_SECONDS, Pass, advance, only_launcher
from launch.state import CellState

log = logging.getLogger(__name__)

# Of a watch: between two passes in which nothing answers, and between two submissions of a cell that is refused, each pause is
# twice the last one, up to the longest; what is refused as if always for so long is given up.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 1800.0
GIVEN_UP_SECONDS = 6 * 3600.0


class _Refused(NamedTuple):
    """How a cell was refused as if always, again and again."""

    times: int
    words: str  # the engine's, the last time
    first: float  # when it was refused, seconds since the epoch
    last: float


class Refusals:
    """What a watch was refused."""

    def __init__(self):
        self._cells: dict[str, _Refused] = {}

    def count(self, now: Pass, at: float) -> None:
        """Notes what came of a pass that began at `at`."""
        for job in now.submitted:
            self._cells.pop(job.cell, None)
        for name in now.refused_always:
            before = self._cells.get(name)
            times, first = (before.times + 1, before.first) if before else (1, at)
            self._cells[name] = _Refused(times, now.refused[name], first, at)

    def resting(self, at: float) -> list[str]:
        """Cells that are not to be asked for yet."""
        return [name for name, one in self._cells.items() if at < one.last + pause(one.times)]

    def given_up(self) -> dict[str, str]:
        """Cells that are not asked for any more, and why."""
        return {
            name: f"refused {one.times} times in {duration(one.last - one.first)}, given up until the next `run`: {one.words}"
            for name, one in self._cells.items()
            if one.last - one.first >= GIVEN_UP_SECONDS
        }


class Budget(Protocol):
    """What a grid may cost (`launch.money.Budget`)."""

    def hold(self, now: Pass, chosen: Sequence[Cell]) -> Mapping[str, str]:
        """Of the cells that a pass would submit, those that would lead beyond it, and why."""

    def is_over(self, now: Pass) -> bool:
        """Whether all of it is spent."""

    def over(self, now: Pass) -> str:
        """What is said then."""


def pause(times: int) -> float:
    """Seconds to wait after so many refusals in a row."""
    return min(FIRST_PAUSE_SECONDS * 2 ** (min(times, 30) - 1), LONGEST_PAUSE_SECONDS)


def repeat(
    cells: Sequence[Cell],
    layout: Layout,
    engine: Executor,
    watch: bool,
    on_pass: Callable[[Pass], None],
    seconds: float | None = None,
    budget: Budget | None = None,
) -> Pass:
    """Passes until no cell is active or can be started; one alone on an engine that goes on by itself, unless `watch`.

    Without `watch` a cell that was killed or lost meanwhile is not started again. `on_pass` is called after each pass, also one
    in which the engine or the storage did not answer, which has a note: after the first, they only make pauses longer.
    `seconds` lie between two passes (default: the engine's). With a `budget` no cell is submitted that leads beyond it; where
    it is spent all cells are ended, to be resumed, and so are the passes.

    Raises:
      ConfigError: the engine would refuse all that it was asked for always, without `watch`.
      SubmitError, ConfigError, OSError: of the first pass, when it can't be made, without `watch`.
    """
    began = time.time()
    started: set[str] = set()
    done: dict[str, CellState] = {}
    refusals, failures = Refusals(), 0
    last: Pass | None = None
    while True:
        at = time.time()
        try:
            # Of the launchers on this machine one looks and submits at a time; one whose children the cells are holds the grid.
            with contextlib.nullcontext() if engine.here else only_launcher(layout, PATIENCE_SECONDS):
                once = () if watch else started
                last = advance(
                    cells, layout, engine, once, began, done, refusals.given_up(), refusals.resting(at),
                    None if budget is None else budget.hold,
                )  # fmt: skip
                if budget is not None and budget.is_over(last):
                    engine.cancel([job.cell for job in last.jobs.values()])
                    last.over_budget = budget.over(last)
                    last.notes.append(last.over_budget)
            failures = 0
            refusals.count(last, at)
        except (SubmitError, ConfigError, OSError) as error:
            if last is None and not watch:
                raise
            known = last or Pass(cells, state.of_folders(cells, layout, at), Look({}, None), at)
            failures += 1
            last = dataclasses.replace(known, submitted=[], refused={}, notes=[f"{engine.engine} can't be asked: {error}"])
        started |= {job.cell for job in last.submitted}
        done |= {cell.name: now for cell, now in zip(cells, last.states, strict=True) if now.state == "done"}
        on_pass(last)
        if (
            last.over_budget
            or not (engine.here or watch)
            or (last.active == 0 and not (watch and last.pending) and not failures)
        ):
            break
        usual = engine.pass_seconds if seconds is None else seconds
        engine.wait(max(usual, pause(failures)) if failures else usual)
    if not watch and not last.active and last.refused and last.refused_always == set(last.refused):
        raise ConfigError(next(iter(last.refused.values())))
    return last


def when_it_answers[T](act: Callable[[], T], engine: Executor, watch: bool) -> T:
    """`act()`; a watch tries it again for as long as the engine does not answer. Raises what `act` raises."""
    for times in itertools.count(1):
        try:
            return act()
        except SubmitError as error:
            if not watch:
                raise
            log.warning(f"{engine.engine} can't be asked: {error}; again in {pause(times):.0f} s")
            engine.wait(pause(times))
    raise AssertionError
