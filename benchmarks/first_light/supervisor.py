"""Runs the steps of first light within their time and keeps what they found, whatever happens to the workers. Imports no jax.

Everything that is known goes into one file, `first-light.json`, which is whole at every moment: it is written anew, beside
itself, and renamed after every row. Beside it are few files: what workers said, in one archive, and a profile. Weights,
checkpoints and runs lie in a temporary folder.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.first_light.sizes import Sizes
from benchmarks.workers import ENDING_S, LIMITS, Outcome, Worker, lacks_memory

NAME, LOGS = "first-light.json", "logs.tar.gz"
SCHEMA = 1
TURNS = 5  # of what takes part in a comparison
#: How many times longer than on a device things may take: interpreted kernels, or the compiler on a laptop.
PATIENCE = {"device": 1, "rehearse": 20, "compile_only": 20}


class Step(NamedTuple):
    """A part of the run, with the most seconds that it may take."""

    name: str  # "0" to "10", and "1b"
    title: str
    seconds: int
    run: Callable[[Lab], None]
    beside: str | None = None  # a step with which it begins already
    begin: Callable[[Lab], None] | None = None  # what it does then, without waiting


class Kind(NamedTuple):
    """A kind of worker: its command, and what its environment has beside that of the others."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}


class Lab:
    """What a step works with: workers by name, kernels that are known to be bad, rows, and the time that is left.

    A worker is started when it is first asked. `ask` never raises for what a worker does: the outcome says it, and the row.
    """

    def __init__(self, out: Path, mode: str, sizes: Sizes, kinds: Mapping[str, Kind], facts: Mapping[str, Any]):
        """`kinds` are the workers by name; `facts` stand at the head of the file. Raises FileExistsError on an earlier file."""
        self.out, self.mode, self.sizes, self._kinds = out, mode, sizes, kinds
        self.path = out / NAME
        if self.path.exists():
            raise FileExistsError(f"{self.path} has an earlier run: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="first-light-"))
        (self.scratch / "logs").mkdir()
        self.deadline = math.inf
        self.ending = False
        self.early: dict[str, Any] = {}  # what steps have begun before their turn
        self._slow: list[str] = []  # kernels whose compilation was given up
        self._workers: dict[str, Worker] = {}
        self._programs: set[subprocess.Popen] = set()
        self._writing = threading.RLock()
        self._step: dict[str, Any] = {}
        self.record: dict[str, Any] = {
            "schema": SCHEMA, "mode": mode, "began": _now(), "finished": False, **facts, "steps": {}, "bad": {}, "rows": [],
        }  # fmt: skip
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.record["rows"]

    @property
    def left(self) -> float:
        """Seconds that the step has left; none when the run is being ended."""
        return 0.0 if self.ending else self.deadline - time.monotonic()

    def save(self) -> None:
        """Writes the file anew; a reader finds the old one or the new one, never a part."""
        temporary = self.path.with_suffix(".tmp")
        with self._writing:
            with temporary.open("w") as file:
                json.dump(printable(self.record), file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)

    def row(self, **values: Any) -> dict[str, Any]:
        """Keeps a row of the present step and returns it."""
        row = {"step": self._step.get("name"), **values}
        with self._writing:
            self.rows.append(row)
            self.save()
        return row

    def keep(self, found: Outcome, **values: Any) -> dict[str, Any]:
        """Keeps a row of an outcome: what the worker found, and the status that it gave, or how the request ended."""
        result = dict(found.result)
        usual = "compiled" if self.mode == "compile_only" and found.ok else found.status
        status, reason = result.pop("status", usual), result.pop("reason", found.reason)
        if not found.ok:
            status, reason = found.status, found.reason
        return self.row(**(result | values), status=status, reason=reason, ended_in=found.phase, phases=found.seconds)

    def mark_bad(self, kernel: str, reason: str) -> None:
        """From now on what needs `kernel` is left out, with the reason; the first reason stays."""
        with self._writing:
            self.record["bad"].setdefault(kernel, reason)
            self.save()

    def bad(self, needs: Sequence[str]) -> str | None:
        """Why what needs these kernels should not run, or None."""
        return next((f"{kernel}: {self.record['bad'][kernel]}" for kernel in needs if kernel in self.record["bad"]), None)

    def ask(
        self, worker: str, request: Mapping[str, Any], *, needs: Sequence[str] = (), limits: Mapping[str, float] | None = None
    ) -> Outcome:
        """Asks a worker, started if need be, within the step's time.

        `needs` names parts of kernels: where one is bad the outcome is "left out". The last of them is marked bad where the
        worker hangs or dies. Safe to call from threads for different workers.
        """
        if (reason := self.bad(needs)) is not None:
            return Outcome("left out", {}, reason, "", {})
        if self.left <= 0:
            return Outcome("left out", {}, "no time left in this step", "", {})
        try:
            process = self._worker(worker)
        except OSError as error:
            return Outcome("failed", {}, f"could not be started: {error}", "start", {})
        allowed = {phase: PATIENCE[self.mode] * seconds for phase, seconds in (LIMITS | dict(limits or {})).items()}
        outcome = process.ask(request, limits=allowed, deadline=self.deadline)
        if not process.alive:
            self.close(worker)
        if needs and self._is_to_blame(needs[-1], outcome, process.alive):
            where = f"step {self._step.get('name')}, {request.get('case', request['do'])}, phase {outcome.phase}"
            self.mark_bad(needs[-1], f"{outcome.status} in {where}: {outcome.reason}")
        return outcome

    def _is_to_blame(self, kernel: str, outcome: Outcome, alive: bool) -> bool:
        """Whether a kernel is bad after this: it hung while it ran, or took its worker along.

        A compiler that is silent for long compiles others too, and shares the machine: twice, and the kernel is to blame.
        """
        if outcome.phase == "start" or lacks_memory(outcome.reason):
            return False
        if outcome.status == "hang" and outcome.phase in ("lower", "compile"):
            self._slow.append(kernel)
            return self._slow.count(kernel) > 1
        return outcome.status in ("hang", "died") or (outcome.status == "failed" and not alive)

    def side_by_side(
        self, requests: Mapping[str, tuple[str, Mapping[str, Any], Sequence[str]]], **options: Any
    ) -> dict[str, Outcome]:
        """Asks for several things at once: name -> (worker, request, needs). A worker does one after the other."""
        by_worker: dict[str, list[str]] = {}
        for name, (worker, _, _) in requests.items():
            by_worker.setdefault(worker, []).append(name)

        def one_after_the_other(names: list[str]) -> dict[str, Outcome]:
            found = {}
            for name in names:
                worker, request, needs = requests[name]
                found[name] = self.ask(worker, request, needs=needs, **options)
            return found

        with concurrent.futures.ThreadPoolExecutor(max(1, len(by_worker))) as pool:
            parts = list(pool.map(one_after_the_other, by_worker.values()))
        found = {name: outcome for part in parts for name, outcome in part.items()}
        return {name: found[name] for name in requests}

    def forget(self, cases: Mapping[str, tuple[str, str]]) -> None:
        """Tells workers that are alive to give back the memory of cases: name -> (worker, case)."""
        for worker, case in cases.values():
            if (process := self._workers.get(worker)) is not None and process.alive:
                self.ask(worker, {"do": "forget", "cases": [case]})

    def has(self, worker: str) -> bool:
        """Whether there is a worker of that name in this run."""
        return worker in self._kinds

    def environment(self, worker: str) -> Mapping[str, str]:
        """What the environment of a kind of worker has beside this process's."""
        return self._kinds[worker].env

    def start(self, *workers: str) -> None:
        """Starts workers that are not there yet, so that they get ready side by side; who can't start says so when asked."""
        for name in workers:
            with contextlib.suppress(OSError):
                self._worker(name)

    def turns(
        self, asked: Mapping[str, tuple[str, Mapping[str, Any], Sequence[str]]], turns: int = TURNS
    ) -> dict[str, list[float]]:
        """Seconds of everything in turns, so that a busy neighbour or a hot card slows all alike.

        Args:
          asked: name -> (worker, a "measure" request whose result has `seconds`, a number or a list, needs).

        Returns:
          The medians of each turn, in order; shorter for what failed on the way or when the step's time ended.
        """
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        gone: set[str] = set()
        if self.mode == "compile_only":
            return seconds
        for _ in range(turns):
            for name, (worker, request, needs) in asked.items():
                if name in gone or self.left <= 0:
                    continue
                outcome = self.ask(worker, request, needs=needs)
                if outcome.ok:
                    values = outcome.result["seconds"]
                    seconds[name].append(median(values) if isinstance(values, list) else float(values))
                else:
                    gone.add(name)
                    self.row(case=name, worker=worker, status=outcome.status, reason=outcome.reason, phase=outcome.phase)
        return seconds

    def command(
        self, argv: Sequence[str], log: str, *, env: Mapping[str, str] | None = None, seconds: float | None = None
    ) -> Outcome:
        """Runs a program to its end, at most so long as the step has time, or `seconds`; its output goes to the file `log`.

        The result has `exit_code` and the last 3,000 characters of the output.
        """
        began = time.monotonic()
        until = self.deadline if seconds is None else began + PATIENCE[self.mode] * seconds
        path = self.scratch / "logs" / log
        with path.open("wb") as output:
            try:
                process = subprocess.Popen(
                    list(argv), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=os.environ | dict(env or {}), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Outcome("failed", {}, str(error), "start", {})
            self._programs.add(process)
            if self.ending:
                _kill(process)
            try:
                process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            finally:  # its children too
                running = process.poll() is None
                _kill(process)
                self._programs.discard(process)
        took = {"run": time.monotonic() - began}
        text = path.read_bytes()[-3000:].decode(errors="replace")
        if running:
            return Outcome("out of time", {"output": text}, f"stopped after {took['run']:.0f} s", "run", took)
        result = {"exit_code": process.returncode, "output": text}
        return Outcome(
            "ok" if process.returncode == 0 else "failed", result, "" if process.returncode == 0 else text[-300:], "run", took
        )

    def close(self, *workers: str) -> None:
        """Ends workers side by side, which gives back what they hold on the device; without names, all."""
        ended = [worker for name in workers or list(self._workers) if (worker := self._workers.pop(name, None)) is not None]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(ended))) as pool:
            list(pool.map(Worker.close, ended))

    def end(self) -> None:
        """Ends all workers and programs at once, from a signal's handler too: what is asked returns, and no more begins."""
        self.ending = True
        for worker in list(self._workers.values()):
            worker.kill()
        for process in list(self._programs):
            _kill(process)

    def run(self, steps: Sequence[Step], stop_after: float) -> None:
        """The steps in order, each with the time that those before it left over.

        One that raises is recorded, and the next one begins; none begins after `stop_after` seconds.
        """
        end, unused = time.monotonic() + stop_after, 0.0
        try:
            for step in steps:
                early = [other for other in steps if other.begin is not None and other.beside == step.name]
                unused = self._run(step, end, unused, early)
            self.record["finished"] = not self.ending
        finally:
            self.close()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.record["ended"] = _now()
            self.save()

    def _run(self, step: Step, end: float, unused: float, early: Sequence[Step]) -> float:
        """One step; returns the seconds that it and those before it have not used."""
        began, allowed = time.monotonic(), PATIENCE[self.mode] * step.seconds + unused
        self._step = {
            "name": step.name,
            "title": step.title,
            "limit_s": round(allowed),
            "status": "running",
            "reason": "",
        }
        self.record["steps"][step.name] = self._step
        if self.ending or began >= end:
            self._step |= {"status": "left out", "reason": "no time left", "seconds": 0.0}
            self.save()
            return unused
        self.deadline = min(began + allowed, end)
        self.save()
        print(f"{step.name:>3}  {step.title} (at most {allowed:.0f} s)", flush=True)
        try:
            for other in early:
                other.begin(self)
            step.run(self)
            self._step["status"] = "done" if self.left > 0 else "out of time"
        except Exception as error:  # of any kind: what the other steps find is worth more
            self._step |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            print(f"     failed: {self._step['reason']}", file=sys.stderr, flush=True)
        self._step["seconds"] = round(time.monotonic() - began, 1)
        self.deadline = math.inf
        self.save()
        self._keep_logs()
        print(f"     {self._step['status']} after {self._step['seconds']} s", flush=True)
        return max(0.0, allowed - (time.monotonic() - began))

    def _keep_logs(self) -> None:
        """What workers and programs said, as one file beside the record: few files are easily carried away."""
        temporary = self.out / "logs.tmp"
        with tarfile.open(temporary, "w:gz") as archive:
            archive.add(self.scratch / "logs", "logs")
        temporary.replace(self.out / LOGS)

    def _worker(self, name: str) -> Worker:
        if (worker := self._workers.get(name)) is None or not worker.alive:
            kind = self._kinds[name]
            worker = Worker(kind.argv, self.scratch / "logs" / f"{name}.txt", env=kind.env)
            self._workers[name] = worker
            if self.ending:
                worker.kill()
        return worker


def _kill(process: subprocess.Popen) -> None:
    """Ends a program and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_S)


def printable(value: Any) -> Any:
    """`value` for JSON, which has no NaN and no infinity: these become the strings "nan", "inf", "-inf"."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(key): printable(item) for key, item in value.items()}
        case list() | tuple():
            return [printable(item) for item in value]
        case _:
            return value


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle; NaN of nothing."""
    ordered = sorted(values)
    n = len(ordered)
    if not n:
        return math.nan
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
