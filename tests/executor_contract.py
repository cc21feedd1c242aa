"""What every engine must do (launch.executors.base.Executor), as a base of test classes: real jobs of tests/fake_trainer.py.

An engine's test file has a fixture `engine` that yields an `Engine`, and a class that inherits `Contract`.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch import grid, state
from launch.executors.base import DEAD, QUEUED, RUNNING
from tests import grid_fakes

SECONDS = 300.0  # that anything may take, on a machine that does other things too


class Engine:
    """An executor on a real or faked engine, and what may happen to its jobs from outside. Made by an engine's fixture."""

    ranks = 1  # processes of a cell
    lock = "contextlib.nullcontext()"  # source of what two launchers of a machine hold in turn, where the engine needs it

    def __init__(self, the_executor, cells):
        self.executor, self.cells = the_executor, cells
        self.layout = the_executor.layout

    def step(self):
        """Called in every wait: a faked engine may move on; an executor that polls its children, too."""

    def preempt(self, cell):
        """Takes the machines of a running cell away as the engine does: SIGTERM first."""
        raise NotImplementedError

    def lose(self, cell):
        """The machines of a running cell are gone at once, and nobody says so to its processes."""
        raise NotImplementedError

    def processes(self, cell):
        """Ids of the living processes of a cell on this machine."""
        wanted = ["-m", "tests.fake_trainer", os.fspath(self.layout.cell(cell))]
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cmdline").read_text().split("\0")[1:-1] == wanted:
                    found.append(int(entry.name))
        return found

    def another_launcher(self):
        """Source of an expression for an equal executor in another process (`layout` is there); None: only one may be."""
        return None


def fake_command(cell, folder, *_):
    """In the place of `Cell.command`."""
    return [sys.executable, "-m", "tests.fake_trainer", os.fspath(folder)]


def prepared(layout, count=2, behaviour=("finish",)):
    """Cells of a small grid whose folders say what the fake trainer does."""
    cells = grid.cells(grid_fakes.small_grid())[:count]
    for cell in cells:
        behave(layout, cell, *behaviour)
    return cells


def behave(layout, cell, *behaviour):
    folder = layout.cell(cell.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cell.config.to_dict()))
    (folder / "behaviour.json").write_text(json.dumps(behaviour))


class Contract:
    """Inherit in an engine's test file, which has the fixture `engine`: two cells, whose behaviour is "finish"."""

    @staticmethod
    def wait(engine, condition, what):
        deadline = time.monotonic() + SECONDS
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: {engine.executor.jobs()}"
            engine.step()
            time.sleep(0.1)
        return value

    def until_running(self, engine, cell):
        folder = engine.layout.cell(cell.name)
        self.wait(engine, lambda: (folder / "heartbeat.json").exists(), "no heartbeat")
        return self.wait(
            engine,
            lambda: (job := engine.executor.jobs().get(cell.name)) and job.state == RUNNING and job,
            "the job does not run",
        )

    def until_gone(self, engine, cell):
        def gone():
            job = engine.executor.jobs().get(cell.name)
            return job is None or job.state == DEAD

        self.wait(engine, gone, "the job does not end")
        self.wait(engine, lambda: not engine.processes(cell.name), "processes are left")

    def state_of(self, engine, cell):
        jobs = engine.executor.jobs()
        return state.of(cell, engine.layout.cell(cell.name), time.time(), jobs.get(cell.name))

    def test_a_cell_runs_to_its_end(self, engine):
        cell, other = engine.cells
        engine.executor.check()
        engine.executor.prepare()
        assert engine.executor.jobs() == {}
        job = engine.executor.submit(cell)
        assert (job.cell, job.state in (QUEUED, RUNNING)) == (cell.name, True)
        self.until_gone(engine, cell)
        assert self.state_of(engine, cell).state == "done"
        assert self.state_of(engine, other).state == "planned"
        text = "".join(path.read_text() for path in engine.executor.logs(cell.name) if path.exists())
        for rank in range(engine.ranks):
            assert f"rank {rank} of {cell.name}" in text

    def test_submitted_twice_is_one_job(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang", "finish")
        engine.executor.prepare()
        first = engine.executor.submit(cell)
        assert engine.executor.submit(cell).id == first.id
        self.until_running(engine, cell)
        assert engine.executor.submit(cell).id == first.id
        assert list(engine.executor.jobs()) == [cell.name]
        assert len(engine.processes(cell.name)) == engine.ranks

    def test_a_cancelled_job_ends_and_does_not_come_back(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang")
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.until_running(engine, cell)
        engine.executor.cancel([cell.name])
        self.until_gone(engine, cell)
        engine.executor.reconcile(engine.executor.jobs())
        for _ in range(10):
            engine.step()
            time.sleep(0.1)
        assert cell.name not in engine.executor.jobs()
        assert self.state_of(engine, cell).state in ("preempted", "lost")
        assert self.state_of(engine, cell).runnable
        engine.executor.cancel([cell.name])  # of nothing: no error

    def test_a_preempted_cell_goes_on(self, engine):
        """By the engine itself, or after `reconcile` and another submission."""
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang", "finish")
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.until_running(engine, cell)
        engine.preempt(cell.name)
        self.finish(engine, cell)
        attempts = sorted((engine.layout.cell(cell.name) / "attempts").glob("*.json"))
        first_steps = [json.loads(path.read_text())["first_step"] for path in attempts]
        assert first_steps == [0, 1], first_steps

    def finish(self, engine, cell):
        """What `run --watch` does, until the cell is done."""

        def done():
            jobs = engine.executor.jobs()
            engine.executor.reconcile(jobs)
            now = self.state_of(engine, cell)
            if cell.name not in engine.executor.jobs() and now.runnable:
                engine.executor.submit(cell)
            return now.state == "done"

        self.wait(engine, done, "the cell does not get done")
        self.until_gone(engine, cell)

    def test_a_failing_cell_ends_and_is_not_started_again(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "oom")
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.until_gone(engine, cell)
        engine.executor.reconcile(engine.executor.jobs())
        now = self.wait(engine, lambda: (s := self.state_of(engine, cell)).state == "failed" and s, "not failed")
        assert (now.failure, now.runnable) == ("out_of_memory", False)
        for _ in range(10):
            engine.step()
            time.sleep(0.1)
        assert cell.name not in engine.executor.jobs()
        assert len(list((engine.layout.cell(cell.name) / "attempts").glob("*.json"))) == 1
        text = "".join(path.read_text() for path in engine.executor.logs(cell.name) if path.exists())
        assert "out of memory" in text

    def test_a_lost_cell_can_be_started_again(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang", "finish")
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.until_running(engine, cell)
        engine.lose(cell.name)
        self.finish(engine, cell)

    def test_two_launchers_start_a_cell_once(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang", "finish")
        engine.executor.prepare()
        if (other := engine.another_launcher()) is None:
            return
        source = f"""
import contextlib, os, sys, time
from pathlib import Path
from etils import epath
from launch import grid, run
from launch.cells import Layout
from launch.training_cells import TrainingCell
from launch.executors import base
from tests import executor_contract, grid_fakes
TrainingCell.command = executor_contract.fake_command
layout = Layout(epath.Path({os.fspath(engine.layout.root)!r}))
one = {other}
(cell,) = [c for c in grid.cells(grid_fakes.small_grid()) if c.name == {cell.name!r}]
time.sleep(max(0, float(sys.argv[1]) - time.time()))
with {engine.lock}:
    print(one.submit(cell).id)
"""
        at = str(time.time() + 4.0)
        start = [sys.executable, "-c", source, at]
        launchers = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        ids = {launcher.communicate(timeout=SECONDS)[0].strip() for launcher in launchers}
        assert len(ids) == 1
        self.until_running(engine, cell)
        assert len(engine.processes(cell.name)) == engine.ranks
        assert len(list((engine.layout.cell(cell.name) / "attempts").glob("*.json"))) == 1
