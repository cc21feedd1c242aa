"""Ends what of a grid has machines and is of no use: what nobody would end by himself, and what bills until somebody does.

Once, from what folders and the engine say: fit for cron. What is asked for again after it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from gqa_jax.formatting import duration
from launch import state
from launch.cells import Cell, Layout
from launch.executors.base import DEAD, Executor
from launch.run import HUNG_SECONDS, Pass, look

LINGER_SECONDS = 600.0  # for machines to go by themselves, after the last sign of life of a cell that is over


def useless(now: Pass) -> dict[str, str]:
    """The cells whose jobs are to be ended, and why; with names that are of no cell of the grid, for it was changed."""
    states = dict(zip((cell.name for cell in now.cells), now.states, strict=True))
    found = {}
    for job in now.jobs.values():
        if job.state == DEAD:
            continue  # of `reconcile`
        mine = states.get(job.cell)
        quiet = None if mine is None else mine.silence if mine.state == "stalled" else mine.heartbeat_age
        if mine is None:
            found[job.cell] = "it is of no cell of the grid"
        elif mine.state in (*state.FINAL, "failed") and (quiet is None or quiet > LINGER_SECONDS):
            found[job.cell] = f"its cell is {mine.state}"
        elif mine.state == "stalled" and (quiet or 0.0) > HUNG_SECONDS:
            found[job.cell] = f"silent for {duration(quiet)}"
    return found


def reap(cells: Sequence[Cell], layout: Layout, engine: Executor, dry_run: bool = False) -> list[str]:
    """Ends it, and returns a sentence for each. dry_run: says what would be ended. Raises SubmitError.

    Cells that should still be done are started again by the next `run`.
    """
    now = look(cells, layout, engine)
    over = useless(now)
    said = [f"{name}{f' in {where}' if (where := now.jobs[name].where) else ''}: {why}" for name, why in over.items()]
    if dry_run:
        dead = [job for job in now.jobs.values() if job.state == DEAD]
        return [f"{job.cell}: {job.detail or 'ended, and keeps its name or quota'}" for job in dead] + said
    notes = engine.reconcile(now.jobs) if now.jobs.listed else []
    if over:
        engine.cancel(list(over))
    return notes + said
