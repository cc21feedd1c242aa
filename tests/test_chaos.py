"""A grid under attack: ranks, launchers and cells that are saving are killed, and nothing is lost or done twice."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gqa_jax.training.metrics import read_metrics
from launch import grid
from launch.cells import REPOSITORY

STEPS, SECONDS, SEED = 24, 120.0, 7
#: Two grids at a time, with a cell at a time each: name -> cells, processes of a cell.
GRIDS = {"alone": (14, 1), "pairs": (6, 2)}

GRID_FILE = """
from launch import grid
from tests import grid_fakes

def get_grid():
    configs = [grid_fakes.config(n_heads=heads, seed=seed, steps={steps}) for heads in (1, 2) for seed in range({cells} // 2)]
    for config in configs:
        config.checkpoint.update(every_steps=3, keep=2)
    return grid.Grid("{name}", configs, [1024])
"""
CLUSTER = """
engine = "local"
processes = {processes}
slots = 1
heartbeat_seconds = 5
"""


def launcher(root):
    """`run --watch` of the grid whose folder this is; its files lie beside it."""
    command = [sys.executable, "-m", "launch", "run", f"{root}.py", "--root", str(root), "--on", f"{root}.toml", "--watch"]
    with open(f"{root}.txt", "ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def ranks(root):
    """Processes that train in cells of this grid, by cell."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else []
            if words[1:3] == ["-m", "gqa_jax.train"] and (place := words[4].removeprefix("--workdir=")).startswith(f"{root}/"):
                found.setdefault(Path(place), []).append(int(entry.name))
    return found


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Attack:
    """A seeded sequence of kills on grids and their launchers."""

    def __init__(self, roots):
        self.random = random.Random(SEED)
        self.launchers = {root: launcher(root) for root in roots}
        self.hits = {"rank": 0, "launcher": 0, "save": 0}

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.random.uniform(2.0, 6.0))
            what = self.random.choices(list(self.hits), weights=(3, 1, 4))[0]
            root = self.random.choice(list(self.launchers))
            self.hits[what] += {"rank": self.rank, "launcher": self.launcher_dies, "save": self.save}[what](root)
            for place, process in self.launchers.items():
                if process.poll() is not None:  # killed, or every cell is done
                    self.launchers[place] = launcher(place)

    def rank(self, root):
        pids = sorted(pid for those in ranks(root).values() for pid in those)
        kill(self.random.sample(pids, min(1, len(pids))))
        return len(pids) > 0

    def launcher_dies(self, root):
        self.launchers[root].kill()
        self.launchers[root].wait()
        deadline = time.monotonic() + 60
        while left := ranks(root):
            assert time.monotonic() < deadline, f"left over by a launcher: {left}"
            time.sleep(0.05)
        return True

    def save(self, root):
        """Kills a cell while its checkpoint is being written, if there is one within a few seconds."""
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for folder, pids in ranks(root).items():
                if any("tmp" in name.name for name in _names(folder / "checkpoints")):
                    kill(pids)
                    return True
            time.sleep(0.001)
        return False

    def end(self):
        for process in self.launchers.values():
            process.kill()
            process.wait()


def _names(folder):
    with contextlib.suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []


def until_done(roots, seconds=900):
    processes = {root: launcher(root) for root in roots}
    try:
        for root, process in processes.items():
            assert process.wait(seconds) == 0, Path(f"{root}.txt").read_text()[-3000:]
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.slow
def test_grids_survive_two_minutes_of_kills(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # a device per process
    places = {}
    for when in ("attacked", "undisturbed"):
        (tmp_path / when).mkdir()
        places[when] = [tmp_path / when / name for name in GRIDS]
        for root, (cells, processes) in zip(places[when], GRIDS.values(), strict=True):
            Path(f"{root}.py").write_text(GRID_FILE.format(name=root.name, cells=cells, steps=STEPS))
            Path(f"{root}.toml").write_text(CLUSTER.format(processes=processes))
    attack = Attack(places["attacked"])
    try:
        attack.run(SECONDS)
        for root in places["attacked"]:
            attack.launcher_dies(root)
    finally:
        attack.end()
    results = [folder / "result.json" for root in places["attacked"] for folder in (root / "cells").iterdir()]
    done_before = sum(path.exists() for path in results)
    until_done(places["attacked"])
    assert not any(ranks(root) for root in places["attacked"])
    until_done(places["undisturbed"])
    attempts = 0
    for attacked, undisturbed in zip(*places.values(), strict=True):
        attempts += _compare(attacked, undisturbed)
    print(f"\n{attack.hits}, {done_before} of {len(results)} done under attack, {attempts} attempts in all")
    assert attempts > len(results) == sum(cells for cells, _ in GRIDS.values())
    assert min(attack.hits.values()) > 0


def _compare(attacked, undisturbed):
    """Cell by cell: the same bits, every row, nothing done after the end. How many attempts it took."""
    attempts = 0
    names = [cell.name for cell in grid.cells(grid.load(f"{attacked}.py"))]
    for name in names:
        here, there = attacked / "cells" / name, undisturbed / "cells" / name
        result, expected = (json.loads((folder / "result.json").read_text()) for folder in (here, there))
        for key in ("status", "loss", "loss_sem", "params_sha256", "identity", "step", "n_processes"):
            assert result[key] == expected[key], (name, key)
        rows, wanted = ({(row["step"], row["kind"]): row["loss"] for row in read_metrics(f)} for f in (here, there))
        assert rows == wanted, name
        assert {step for step, kind in rows if kind == "train"} == set(range(1, STEPS + 1))
        begun = [json.loads(path.read_text())["time"] for path in (here / "attempts").glob("*.json")]
        assert max(begun) < (here / "result.json").stat().st_mtime, f"{name} was started after it was done"
        assert len(list((there / "attempts").glob("*.json"))) == 1
        attempts += result["attempts"]
    return attempts
