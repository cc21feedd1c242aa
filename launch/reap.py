"""Ends what of a grid has machines and is of no use: what nobody would end by himself, and what bills until somebody does.

Once, from what folders and the engine say: fit for cron. What is asked for again after it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gqa_jax import storage
from launch import state
from launch.cells import Cell, Layout
from launch.executors.base import DEAD, LINGER_SECONDS, Executor, Job
from launch.run import HUNG_SECONDS, Pass, look, silent
from launch.state import CellState


def useless(now: Pass, layout: Layout, silent: Collection[str]) -> dict[str, str]:
    """The cells whose jobs are to be ended, and why; those that are `silent` among them.

    Several grid files may share a folder (`launch next` writes such), so a job of no cell of this one is judged by its folder.
    """
    states = dict(zip((cell.name for cell in now.cells), now.states, strict=True))
    found = {}
    for job in now.jobs.values():
        if job.state == DEAD:
            continue  # of `reconcile`
        if job.cell not in states and not storage.names(layout.cell(job.cell)):
            found[job.cell] = "its folder is gone"
        elif job.cell in silent:
            found[job.cell] = f"silent for {HUNG_SECONDS / 60:.0f} minutes"
        elif why := _over(states.get(job.cell) or _by_folder(job, now, layout)):
            found[job.cell] = why
    return found


def _by_folder(job: Job, now: Pass, layout: Layout) -> CellState:
    """The state of a cell of another grid file, of the kind of these."""
    return state.of(type(now.cells[0]), layout.cell(job.cell), now.at, job)


def _over(mine: CellState) -> str | None:
    """Why the job of a cell in this state is of no use; None: it may be of some."""
    if mine.state in state.FINAL and (mine.heartbeat_age is None or mine.heartbeat_age > LINGER_SECONDS):
        return f"its cell is {mine.state}"
    if mine.state == "failed" and (mine.heartbeat_age or 0.0) > LINGER_SECONDS:  # edited, or broken: it counts for nothing
        return f"its cell is failed ({mine.failure})"
    return None


def reap(cells: Sequence[Cell], layout: Layout, engine: Executor, dry_run: bool = False) -> list[str]:
    """Ends it, and returns a sentence for each. dry_run: says what would be ended. Raises SubmitError.

    Cells that should still be done are started again by the next `run`.
    """
    now = look(cells, layout, engine)
    over = useless(now, layout, silent(now, layout, engine))
    said = [f"{name}{f' in {where}' if (where := now.jobs[name].where) else ''}: {why}" for name, why in over.items()]
    if dry_run:
        dead = [job for job in now.jobs.values() if job.state == DEAD]
        return [f"{job.cell}: {job.detail or 'ended, and keeps its name or quota'}" for job in dead] + said
    notes = engine.reconcile(now.jobs) if now.jobs.listed else []
    if over:
        engine.cancel(list(over))
    return notes + said
