"""Grids under attack: whatever is killed, torn, told to end or filled up, every cell is trained once, and to the same bits.

    python -m benchmarks.chaos [--seconds S] [--seed N ...] [--cells N]

Two grids at a time, one of whose cells are two processes each, are run by `launch run --watch` while a seeded sequence of
attacks goes on; launchers that end are started again, as by cron. Then a person tidies up as messages say (`retry`, a torn
cluster.json moved away), and the grids run to their end; they are compared with the same grids that nobody attacked.

The disk is a tmpfs, for which this must be root; else the disk is not filled, which the table says. The clock is that of Python
in launchers and training (time.time, and the age of cluster.json), moved by a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gqa_jax.training.metrics import read_metrics
from launch import grid
from launch.cells import REPOSITORY

STEPS, SAVED_EVERY = 24, 3
MEGABYTES = 256  # of the disk
PATIENCE = 900.0  # seconds for a grid to run to its end
ROUNDS = 8  # of running and tidying up

GRID_FILE = """
from launch import grid
from tests import grid_fakes

def get_grid():
    configs = [grid_fakes.config(n_heads=1 + seed % 2, seed=seed, steps={steps}) for seed in range({cells})]
    for config in configs:
        config.checkpoint.update(every_steps={saved_every}, keep=2)
    return grid.Grid("{name}", configs, [1024])
"""
CLUSTER = """
engine = "local"
processes = {processes}
slots = 1
heartbeat_seconds = 5
"""
#: sitecustomize.py of all processes: their clock is as far ahead as the file says.
CLOCK = """
import os, time
_file, _time, _stat, _monotonic = os.environ["CHAOS_CLOCK"], time.time, os.stat, time.monotonic
_known = [0.0, -1.0]
def _ahead():
    if _monotonic() - _known[1] > 0.2:
        try:
            with open(_file) as file:
                _known[:] = float(file.read() or 0), _monotonic()
        except (OSError, ValueError):
            pass
    return _known[0]
def _modified(path, *arguments, **options):
    found = _stat(path, *arguments, **options)
    if isinstance(path, int) or not os.fspath(path).endswith("cluster.json"):
        return found
    return os.stat_result([*found[:8], found.st_mtime + _ahead(), found.st_ctime], {"st_mtime": found.st_mtime + _ahead()})
time.time, time.time_ns, os.stat = lambda: _time() + _ahead(), lambda: int(1e9 * (_time() + _ahead())), _modified
"""
#: Trains cells of one process one after another in this one.
TRAIN = """
import sys
from gqa_jax.train import compilation_cache
from gqa_jax.training.loop import train_and_evaluate
from launch import grid
compilation_cache()
for cell in grid.cells(grid.load(sys.argv[1])):
    train_and_evaluate(cell.config, f"{sys.argv[2]}/cells/{cell.name}")
"""


class Place(NamedTuple):
    """A grid: its folder; its files, and what its launchers print, lie elsewhere."""

    root: Path
    file: Path
    cluster: Path
    log: Path

    @property
    def cells(self) -> list[str]:
        return [cell.name for cell in grid.cells(grid.load(str(self.file)))]


def made(folder: Path, disk: Path, grids: dict[str, tuple[int, int]]) -> list[Place]:
    """Writes grids (name -> cells, processes of a cell) whose folders are on `disk`."""
    found = []
    for name, (cells, processes) in grids.items():
        place = Place(disk / name, folder / f"{name}.py", folder / f"{name}.toml", folder / f"{name}.txt")
        place.file.write_text(GRID_FILE.format(name=name, cells=cells, steps=STEPS, saved_every=SAVED_EVERY))
        place.cluster.write_text(CLUSTER.format(processes=processes))
        found.append(place)
    return found


def command(place: Place, verb: str) -> list[str]:
    on = ["--on", str(place.cluster), "--watch"] if verb == "run" else []
    return [sys.executable, "-m", "launch", verb, str(place.file), "--root", str(place.root), *on]


def ranks(place: Place) -> dict[Path, list[int]]:
    """Processes that train in cells of this grid, by the cell's folder."""
    found: dict[Path, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else []
            if words[1:3] == ["-m", "gqa_jax.train"] and (at := words[4].removeprefix("--workdir=")).startswith(
                f"{place.root}/"
            ):
                found.setdefault(Path(at), []).append(int(entry.name))
    return found


def kill(pids: Sequence[int], what: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def gone(place: Place, seconds: float = 60.0) -> None:
    """Returns when no process trains any more. Raises AssertionError: some do after so long."""
    deadline = time.monotonic() + seconds
    while left := ranks(place):
        assert time.monotonic() < deadline, f"left over: {left}"
        time.sleep(0.05)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own in this folder, to be filled; None where none can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    has_one = os.geteuid() == 0 and subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    try:
        yield folder if has_one else None
    finally:
        if has_one:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Attack:
    """A seeded sequence of attacks on grids and their launchers; `hits`: how many came off, by kind."""

    def __init__(self, places: Sequence[Place], seed: int, clock: Path, full: Path | None):
        self._random, self._clock, self._full = random.Random(seed), clock, full
        kinds: dict[Callable[[Place], bool], int] = {
            self.rank: 3, self.save: 4, self.launcher: 2, self.tell_launcher: 2, self.tell_rank: 2,
            self.tear_record: 8, self.tear_checkpoint: 2, self.tear_rows: 2, self.step_clock: 2,
        }  # fmt: skip
        self._kinds = kinds | ({self.fill: 1} if full else {})
        self.hits = Counter({kind.__name__: 0 for kind in self._kinds})
        self.launchers = {place: self._launch(place) for place in places}
        self.torn: Counter[str] = Counter()

    def _launch(self, place: Place) -> subprocess.Popen:
        with open(place.log, "ab") as log:
            return subprocess.Popen(
                command(place, "run"), cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, seconds: float) -> None:
        """For so long, or until all cells are done; every kind comes soon once."""
        began, first = time.monotonic(), self._random.sample([*self._kinds], len(self._kinds))
        while time.monotonic() - began < seconds and not all(process.poll() == 0 for process in self.launchers.values()):
            time.sleep(self._random.uniform(1.0, 4.0))
            others = self._random.choices([*self._kinds], [*self._kinds.values()])
            kind = first.pop() if first and self._random.random() < 0.6 else others[0]
            place = self._random.choice([*self.launchers])
            came_off = kind(place)
            said = f"{kind.__name__}{'' if came_off else ': nothing to do it to'}"
            with open(place.log, "a") as log:
                log.write(f"--- {time.monotonic() - began:.0f} s: {said}\n")
            if came_off:
                self.hits[kind.__name__] += 1
            elif self.hits[kind.__name__] == 0 and kind not in first:
                first.insert(0, kind)
            for one, process in self.launchers.items():
                if process.poll() not in (None, 0):
                    tidy_cluster(one)
                    self.launchers[one] = self._launch(one)

    def end(self) -> None:
        for process in self.launchers.values():
            process.kill()
            process.wait()

    # What is done to a grid; whether there was what it is done to

    def rank(self, place: Place) -> bool:
        pids = sorted(pid for those in ranks(place).values() for pid in those)
        kill(self._random.sample(pids, min(1, len(pids))))
        return bool(pids)

    def launcher(self, place: Place) -> bool:
        self.launchers[place].kill()
        self.launchers[place].wait()
        gone(place)
        return True

    def tell_launcher(self, place: Place) -> bool:
        """SIGTERM, SIGHUP, Ctrl-C: its cells save, and it ends with the code that says so."""
        process = self.launchers[place]
        if process.poll() is not None:
            return False
        what = self._random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        process.send_signal(what)
        code = process.wait(120)
        started = 75 if what != signal.SIGINT else 130
        told = f"{what.name}: exit code {code}: {place.log.read_text()[-2000:]}"
        assert code in (started, -what, 0, 1), told  # -what: it was still importing
        gone(place)
        return code == started

    def tell_rank(self, place: Place) -> bool:
        pids = sorted(pid for those in ranks(place).values() for pid in those)
        kill(self._random.sample(pids, min(1, len(pids))), self._random.choice([signal.SIGTERM, signal.SIGHUP]))
        return bool(pids)

    def save(self, place: Place) -> bool:
        """Kills a cell while its checkpoint is being written, if there is one within a few seconds."""
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for folder, pids in ranks(place).items():
                if any("tmp" in name for name in _names(folder / "checkpoints")):
                    kill(pids)
                    return True
            time.sleep(0.001)
        return False

    def tear_record(self, place: Place) -> bool:
        """One of any kind, of any cell or of the grid, as a crash of the machine leaves it."""
        found = [path for path in place.root.rglob("*.json") if "checkpoints" not in path.parts]
        found += [*place.root.glob("cells/*/.job"), *place.root.glob("cells/*/.lock")]
        kinds = sorted({_kind(path) for path in found}, key=lambda kind: (self.torn[kind], kind))
        if not kinds:
            return False
        done = self._tear(self._random.choice(sorted(path for path in found if _kind(path) == kinds[0])))
        self.torn[kinds[0]] += done
        return done

    def tear_checkpoint(self, place: Place) -> bool:
        """A file of the newest checkpoint of a cell that has another, after its processes were killed."""
        for folder in self._random.sample(cells := sorted(place.root.glob("cells/*")), len(cells)):
            saved = sorted((name for name in _names(folder / "checkpoints") if name.isdecimal()), key=int)
            if len(saved) < 2 or (folder / "result.json").exists():
                continue
            kill(ranks(place).get(folder, ()))
            files = sorted(path for path in (folder / "checkpoints" / saved[-1]).rglob("*") if path.is_file())
            return bool(files) and self._tear(self._random.choice(files))
        return False

    def tear_rows(self, place: Place) -> bool:
        """The last row of metrics of a cell that is killed, which comes after its last checkpoint, if one does."""
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            for folder, pids in ranks(place).items():
                if _unsaved_row(folder) is None:
                    continue
                kill(pids)
                gone_by = time.monotonic() + 5
                while set(ranks(place).get(folder, ())) & set(pids) and time.monotonic() < gone_by:
                    time.sleep(0.01)
                if (found := _unsaved_row(folder)) is not None:
                    file, content, length = found
                    file.write_bytes(content[: -self._random.randrange(2, length)])
                    return True
            time.sleep(0.001)
        return False

    def step_clock(self, _: Place) -> bool:
        """An hour forward or back, for all processes at once."""
        ahead = float(self._clock.read_text()) + self._random.choice([-3600.0, 3600.0])
        _replace(self._clock, str(ahead).encode())
        return True

    def fill(self, _: Place) -> bool:
        """The disk, for some seconds."""
        ballast = self._full / "ballast"
        try:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
            time.sleep(self._random.uniform(3.0, 8.0))
        finally:
            ballast.unlink()
        return True

    def _tear(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            content = path.read_bytes()
            part = content[: self._random.randrange(len(content))] if content else b""
            noise = bytes(self._random.randrange(256) for _ in part)
            torn = self._random.choice([b"", part, part + bytes(len(content) - len(part)), noise])
            with open(path, "r+b") as file:  # in its place: it may be locked
                file.write(torn)
                file.truncate()
            return True
        return False


def _unsaved_row(folder: Path) -> tuple[Path, bytes, int] | None:
    """File of metrics of the newest attempt in a cell's folder, its content, and the length of its last row; None where that is
    not of a step after the newest checkpoint.
    """
    saved = max((int(name) for name in _names(folder / "checkpoints") if name.isdecimal()), default=0)
    for file in sorted((folder / "metrics").glob("*.jsonl"))[-1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
            content = file.read_bytes()
            last = content.rstrip(b"\n").rpartition(b"\n")[2]
            if json.loads(last)["step"] > saved:
                return file, content, len(last)
    return None


def _kind(path: Path) -> str:
    """Of a record: its file, or its folder where that has many."""
    return path.name if path.parent.name not in ("attempts", "submissions", "failures") else path.parent.name


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [path.name for path in folder.iterdir()]
    return []


def _replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def tidy_cluster(place: Place) -> bool:
    """Moves a torn cluster.json away, as the message says; whether it was one."""
    path = place.root / "cluster.json"
    with contextlib.suppress(ValueError, FileNotFoundError):
        if path.exists() and not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError
        return False
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_suffix(".torn"))
        return True
    return False


def until_done(places: Sequence[Place]) -> int:
    """Runs grids to their end; returns how often somebody had to tidy up. Raises AssertionError: they do not come to it."""
    tidied, left = 0, list(places)
    for _ in range(ROUNDS):
        launchers = []
        for place in left:
            with open(place.log, "ab") as log:
                launchers.append(subprocess.Popen(command(place, "run"), cwd=REPOSITORY, stdout=log, stderr=log))
        try:
            codes = [process.wait(PATIENCE) for process in launchers]
        finally:
            for process in launchers:
                process.kill()
        left = [place for place, code in zip(left, codes, strict=True) if code != 0]
        for place in left:
            done = subprocess.run(command(place, "retry"), cwd=REPOSITORY, capture_output=True, text=True, check=False)
            with open(place.log, "a") as log:
                log.write(done.stdout + done.stderr)
            tidied += tidy_cluster(place) + done.stdout.count("its records are in")
        if not left:
            return tidied
    raise AssertionError("\n".join(place.log.read_text()[-3000:] for place in left))


def undisturbed(places: Sequence[Place], grids: dict[str, tuple[int, int]]) -> None:
    """Trains their cells: those of one process by training alone, without a launcher."""
    alone = [place for place in places if grids[place.root.name][1] == 1]
    for place in alone:
        argv = [sys.executable, "-c", TRAIN, str(place.file), str(place.root)]
        with open(place.log, "ab") as log:
            subprocess.run(argv, cwd=REPOSITORY, stdout=log, stderr=log, check=True)
    until_done([place for place in places if place not in alone])


def compare(attacked: Place, undisturbed: Place) -> int:
    """Cell by cell: the same bits, every row, nothing done after the end. Returns how many attempts it took."""
    attempts = 0
    for name in attacked.cells:
        here, there = (place.root / "cells" / name for place in (attacked, undisturbed))
        result, expected = (json.loads((folder / "result.json").read_text()) for folder in (here, there))
        for key in ("status", "loss", "loss_sem", "params_sha256", "identity", "step", "n_processes"):
            assert result[key] == expected[key], (name, key)
        rows, wanted = ({(row["step"], row["kind"]): row["loss"] for row in read_metrics(f)} for f in (here, there))
        assert rows == wanted, (name, {key: (rows.get(key), wanted.get(key)) for key in {*rows, *wanted}})
        assert {step for step, kind in rows if kind == "train"} == set(range(1, STEPS + 1))
        assert result["attempts"] == max(int(path.stem) for path in (here / "attempts").glob("*.json")) + 1, name
        assert len(list((there / "attempts").glob("*.json"))) == 1
        assert not [each for each in _names(here / "checkpoints") if "tmp" in each], name
        attempts += result["attempts"]
    return attempts


class Outcome(NamedTuple):
    """What a run of attacks came to."""

    seed: int
    hits: dict[str, int]  # attacks that came off, by kind
    torn: dict[str, int]  # records, by kind
    cells: int
    done_before: int  # while it went on
    attempts: int
    tidied: int  # by a person, after it
    has_disk: bool

    def said(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.hits.items()))
        torn = ", ".join(f"{count} {name}" for name, count in sorted(self.torn.items()))
        unfilled = "" if self.has_disk else " (the disk was not filled: that takes root)"
        return (
            f"seed {self.seed}: {kinds}{unfilled}; torn: {torn}; {self.cells} cells, {self.done_before} done meanwhile, "
            f"{self.attempts} attempts, {self.tidied} records moved aside by hand: every cell once, all bits and rows equal"
        )


def attack(folder: Path, seconds: float, seed: int, cells: int) -> Outcome:
    """Attacks grids of so many cells in all in this folder. Raises AssertionError where anything is lost or done twice."""
    pairs = max(1, cells // 4)
    grids = {"alone": (cells - pairs, 1), "pairs": (pairs, 2)}
    clock = folder / "clock"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(CLOCK)
    clock.write_text("0")
    with environment(folder / "site", clock), disk(folder / "disk") as full:
        for name in ("attacked", "undisturbed"):
            (folder / name).mkdir()
        places = made(folder / "attacked", folder / "disk", grids)
        sequence = Attack(places, seed, clock, full)
        try:
            sequence.run(seconds)
            for place in places:
                sequence.launcher(place)
        finally:
            sequence.end()
        done_before = sum((place.root / "cells" / name / "result.json").exists() for place in places for name in place.cells)
        tidied = until_done(places)
        for place in places:
            assert not ranks(place)
        clock.write_text("0")
        others = made(folder / "undisturbed", folder / "undisturbed", grids)
        undisturbed(others, grids)
        attempts = sum(compare(*pair) for pair in zip(places, others, strict=True))
    return Outcome(seed, dict(sequence.hits), dict(sequence.torn), cells, done_before, attempts, tidied, full is not None)


@contextlib.contextmanager
def environment(site: Path, clock: Path) -> Iterator[None]:
    """The environment of what is started: a device per process, and a clock that can be moved."""
    before = dict(os.environ)
    path = os.pathsep.join(filter(None, (str(site), before.get("PYTHONPATH"))))
    os.environ.pop("XLA_FLAGS", None)
    os.environ.update(CHAOS_CLOCK=str(clock), PYTHONPATH=path, JAX_PLATFORMS="cpu")
    # A shell that starts this in its background, or nohup, has them ignored, and what is started would inherit that.
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    handlers = {what: signal.signal(what, handler) for what, handler in ours.items()}
    try:
        yield
    finally:
        for what, handler in handlers.items():
            signal.signal(what, handler)
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of attacks, all seeds together (default: 1800)")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3], help="sequences of attacks (default: 1 2 3)")
    parser.add_argument("--cells", type=int, default=40, help="of a sequence (default: 40)")
    arguments = parser.parse_args()
    for seed in arguments.seed:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            started = time.monotonic()
            outcome = attack(Path(folder), arguments.seconds / len(arguments.seed), seed, arguments.cells)
            print(f"{outcome.said()}; {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
