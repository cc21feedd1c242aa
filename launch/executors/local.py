"""The local engine: cells as processes of this machine, each with some of its GPUs or a share of its CPUs.

Children end with the launcher, however it ends; what they had saved is resumed by the same command. A cell is claimed by an
flock that its processes inherit, so that the kernel drops it with the last of them, and any process can see who runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from etils import epath

from gqa_jax import hardware, storage
from gqa_jax.errors import ConfigError
from gqa_jax.hardware import Slice, allocation, host
from gqa_jax.hardware.allocation import Allocation
from gqa_jax.training import records, run_folder
from launch.cells import REPOSITORY, Cell, Layout
from launch.executors import base
from launch.executors.base import RUNNING, Job, Look, Rents, Submission, SubmitError

GRACE_SECONDS = 20.0  # for a cell to save: it is told by SIGTERM
RANK_SECONDS = 5.0  # that the other processes of a cell have to end after one has failed
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Options(base.Options):
    """Of [local.toml]; `topology` is what one cell sees, found out where it is not given."""

    least: ClassVar = {"gpus_per_cell": 1, "cells_per_gpu": 1, "processes": 1, "heartbeat_seconds": 1}

    slots: int | None = None  # cells at a time; None: as many as the GPUs, or CPUs, allow
    gpus_per_cell: int = 1  # where there are GPUs
    cells_per_gpu: int = 1  # that share each, of small cells: its time, and the memory that JAX takes
    processes: int = 1  # of a cell, as on a pod of so many hosts
    heartbeat_seconds: int = 30  # after which processes of a cell miss another one

    def __post_init__(self):
        super().__post_init__()
        if self.cells_per_gpu > 1 and max(self.gpus_per_cell, self.processes) > 1:
            raise ConfigError(
                f"cells_per_gpu = {self.cells_per_gpu}, gpus_per_cell = {self.gpus_per_cell}, processes = {self.processes}: "
                "cells that share a GPU have one process each and no other GPU: set gpus_per_cell = 1 and processes = 1, or "
                "cells_per_gpu = 1"
            )


class Slot(NamedTuple):
    """A place for one cell."""

    name: str
    environments: list[dict[str, str]]  # of each of its processes, which shows its devices and says what they are
    cpus: set[int]  # that it may use


@dataclasses.dataclass
class _Child:
    """A cell that this launcher has started."""

    cell: str
    slot: Slot
    ranks: list[subprocess.Popen]
    failed_at: float | None = None  # by time.monotonic: when the first of its processes failed


class Executor(base.Executor):
    """Cells as children of this process."""

    Options = Options
    here = True
    pass_seconds = 2.0

    def __init__(self, options: Options, layout: Layout):
        super().__init__(options, layout)
        self._children: dict[str, _Child] = {}

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """The places of this machine. Raises ConfigError when it does not have those that the options ask for."""
        options = self.options
        return slots(options.slots, options.gpus_per_cell, options.processes, self._environment, options.cells_per_gpu)

    @property
    def capacity(self) -> int:
        return len(self.slots)

    @property
    def slice(self) -> Slice | None:
        """What a cell has, with the memory that JAX takes of it here."""
        if not self._has_gpus:
            return self.options.slice
        found = self.options.slice
        if found is not None:
            found = dataclasses.replace(found, chip=hardware.on_this_machine(found.chip, self._environment))
        if (found := found or gpu_slice(self.options.gpus_per_cell, self._environment)) is None:
            return None
        part = dataclasses.replace(found.chip, memory_bytes=found.chip.memory_bytes / self.options.cells_per_gpu)
        return dataclasses.replace(found, chip=part)

    @property
    def rents(self) -> Rents | None:
        whole = super().rents
        return whole and whole._replace(chips=whole.chips / (self.options.cells_per_gpu if self._has_gpus else 1))

    @property
    def _environment(self) -> Mapping[str, str]:
        """Of the processes of cells, but for what their slots add."""
        return os.environ | self.options.environment

    @property
    def _has_gpus(self) -> bool:
        return "CUDA_VISIBLE_DEVICES" in self.slots[0].environments[0]

    def with_slots(self, count: int) -> Executor:
        return Executor(dataclasses.replace(self.options, slots=count), self.layout)

    def check(self) -> None:
        if self._has_gpus and not allocation.has_plugin("gpu"):
            raise ConfigError(
                f"this machine has GPUs ({self.slots[0].name}), for which {sys.executable} has no plugin of jax, so that cells "
                "would train on CPUs: pip install 'gqa-jax[cuda]'; or, to train on CPUs: JAX_PLATFORMS=cpu"
            )

    def __exit__(self, *_: object) -> None:
        """Ends the cells of this launcher; they may save first."""
        self.cancel(list(self._children))
        for child in self._children.values():  # whose end another process has brought about
            for process in child.ranks:
                process.wait()
        self._reap()

    def submission(self, cell: Cell) -> Submission:
        return Submission(cell.name, "\n".join(shlex.join(argv) for argv in self._commands(cell, "PORT")))

    def submit(self, cell: Cell) -> Job:
        """Starts the processes of a cell. Raises SubmitError when no slot is free here."""
        self._reap()
        place = Path(self._claims(cell.name)[0])
        storage.make_folder(place.parent)
        if place.is_dir():
            storage.put_aside(place)
        with open(place, "a+") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._job(cell.name) or Job(cell.name, "", RUNNING)
            if (before := self._children.get(cell.name)) is not None:  # it ends: its files are closed, its exit code comes
                for process in before.ranks:
                    process.wait()
                self._reap()
            busy = {child.slot.name for child in self._children.values()}
            slot = next((slot for slot in self.slots if slot.name not in busy), None)
            if slot is None:
                raise SubmitError(f"all {len(self.slots)} slots are taken")
            ranks: list[subprocess.Popen] = []
            claim.truncate(0)
            job = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
            (log,) = self.logs(cell.name)
            try:
                for argv, environment in zip(self._commands(cell, _free_port()), slot.environments, strict=True):
                    environment = self.options.environment | environment | {"GQA_JAX_JOB": job}
                    ranks.append(_start(argv, Path(log), slot, environment, claim.fileno()))
            finally:
                self._children[cell.name] = _Child(cell.name, slot, ranks)
                facts = {"id": job, "pids": [process.pid for process in ranks], "launcher": os.getpid(), "time": time.time()}
                claim.write(json.dumps(facts))
        return self._job(cell.name) or Job(cell.name, job, RUNNING)

    def jobs(self) -> Look:
        self._reap()
        remote = storage.is_remote(self.layout.root)
        found = map(self._job, storage.names(self.layout.on_this_machine / "claims") if remote else self.layout.names())
        alive = [job for job in found if job is not None]
        return Look({job.cell: job for job in alive}, alive)

    def cancel(self, cells: Sequence[str]) -> None:
        left = [name for name in cells if self._job(name) is not None]
        told: set[int] = set()
        deadline = time.monotonic() + GRACE_SECONDS
        while left:
            late = time.monotonic() > deadline
            for name in left:
                alive = self._processes(name)
                if not alive and time.monotonic() > deadline + RANK_SECONDS:
                    raise SubmitError(
                        f"{name} is held by processes that its records do not name any more: `fuser {self._claims(name)[-1]}` "
                        "finds them: end them by hand"
                    )
                pids = [pid for pid in alive if late or pid not in told]
                _signal(pids, signal.SIGKILL if late else signal.SIGTERM)
                told |= set(pids)  # once: training takes a second SIGTERM as urgent
            time.sleep(POLL_SECONDS)
            self._reap()
            left = [name for name in left if self._job(name) is not None]

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._reap():
            time.sleep(POLL_SECONDS)

    def logs(self, cell: str) -> list[epath.Path]:
        """What the processes of a cell print: in its folder, or on this machine for a grid on gs://."""
        if storage.is_remote(self.layout.root):
            return [epath.Path(self.layout.on_this_machine / "logs" / f"{cell}.txt")]
        return super().logs(cell)

    def _claims(self, cell: str) -> list[str]:
        """Files that the processes of a cell lock: the launcher's, and its own; on this machine for a grid on gs://."""
        if storage.is_remote(self.layout.root):
            return [os.fspath(self.layout.on_this_machine / "claims" / cell)]
        folder = os.fspath(self.layout.cell(cell))
        return [f"{folder}/.job", f"{folder}/.lock"]

    def _holders(self, cell: str) -> list[dict[str, Any]]:
        """What the processes of a cell, started by this or another launcher, or by hand, say of themselves."""
        return [facts for path in self._claims(cell) if (facts := _holder(path)) is not None]

    def _job(self, cell: str) -> Job | None:
        for facts in self._holders(cell):
            job = facts.get("id") or str((facts.get("pids") or [facts.get("pid")])[0])
            return Job(cell, job, RUNNING, since=facts.get("time"), where=str(facts.get("host") or ""))
        return None

    def _processes(self, cell: str) -> list[int]:
        """Ids of the living processes of a cell: its children of this launcher, and those that its claims name and that are of
        its folder still.
        """
        own = [] if (child := self._children.get(cell)) is None else [p.pid for p in child.ranks if p.poll() is None]
        named = {pid for facts in self._holders(cell) for pid in (*facts.get("pids", ()), facts.get("pid")) if pid}
        return [*own, *(pid for pid in named - {*own} if _is_of(pid, os.fspath(self.layout.cell(cell))))]

    def _commands(self, cell: Cell, port: int | str) -> list[list[str]]:
        argv, count = cell.command(self.layout.cell(cell.name)), self.options.processes
        if count == 1:
            return [argv]
        beats = f"--heartbeat_seconds={self.options.heartbeat_seconds}"
        meet = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", beats]
        return [[*argv, *meet, f"--process={rank}"] for rank in range(count)]

    def _reap(self) -> bool:
        """Notes which children have ended; whether one has."""
        ended = False
        for child in list(self._children.values()):
            codes = [process.poll() for process in child.ranks]
            if any(code not in (None, 0, run_folder.EXIT_PREEMPTED) for code in codes):
                child.failed_at = child.failed_at or time.monotonic()
            if None in codes:
                if child.failed_at is not None and time.monotonic() - child.failed_at > RANK_SECONDS:
                    _signal([p.pid for p in child.ranks if p.poll() is None], signal.SIGKILL)  # they miss it, and hang
                continue
            del self._children[child.cell]
            ended = True
            _explain(self.layout.cell(child.cell), codes)
        return ended


def slots(
    count: int | None = None,
    gpus_per_cell: int = 1,
    processes: int = 1,
    environment: Mapping[str, str] = os.environ,
    cells_per_gpu: int = 1,
) -> list[Slot]:
    """One slot per `gpus_per_cell` visible GPUs, or `cells_per_gpu` per GPU, else one per CPU; `count` asks for another number.

    What processes see and are given follows from `environment`, in which they may have been told otherwise. Raises ConfigError
    for a count that the machine does not have.
    """
    cpus = host.cpus()
    gpus = _gpus(environment)
    groups = [gpus[i : i + gpus_per_cell] for i in range(0, len(gpus) - gpus_per_cell + 1, gpus_per_cell)]
    if gpus and (not groups or gpus_per_cell % processes):
        raise ConfigError(
            f"gpus_per_cell = {gpus_per_cell}: this machine shows {len(gpus)} GPUs, which {processes} processes of a cell share"
        )
    available = len(groups) * cells_per_gpu or len(cpus)
    wanted = available if count is None else count
    if not 1 <= wanted <= available:
        kind = "CPUs" if not gpus else "GPUs" if gpus_per_cell == 1 else f"times {gpus_per_cell} GPUs"
        kind = f"places on {len(gpus)} GPUs (cells_per_gpu = {cells_per_gpu})" if gpus and cells_per_gpu > 1 else kind
        raise ConfigError(f"--slots {wanted}: this machine has {available} {kind}, use 1 to {available}")
    shares = [set(cpus[i::wanted]) or set(cpus) for i in range(wanted)]
    if gpus:
        each = gpus_per_cell // processes
        shown = [[",".join(group[i : i + each]) for i in range(0, gpus_per_cell, each)] for group in groups]
        given = _told(Allocation("gpu", None, gpus_per_cell, each, cells_per_gpu), environment)
        given |= _share_of_memory(cells_per_gpu, environment)
        places = [
            (f"GPU {','.join(group)}{f', {turn + 1} of {cells_per_gpu}' if cells_per_gpu > 1 else ''}", show)
            for turn in range(cells_per_gpu)  # each GPU has one before any has two
            for group, show in zip(groups, shown, strict=True)
        ]
        return [
            Slot(name, [{"CUDA_VISIBLE_DEVICES": names} | given for names in show], share)
            for (name, show), share in zip(places, shares, strict=False)
        ]
    # XLA frees and allocates a step's buffers every step; huge pages save most of the page faults (glibc 2.35 or newer).
    tunables = {"GLIBC_TUNABLES": environment.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
    platforms = environment.get("JAX_PLATFORMS") or "cpu"
    platform = allocation.platform_of(platforms.split(",")[0])
    given = _told(Allocation(platform), environment) if platform in allocation.PLATFORMS else {}
    shown = tunables | {"JAX_PLATFORMS": platforms} | given
    return [Slot(f"CPU {i}", [shown] * processes, share) for i, share in enumerate(shares)]


def _told(given: Allocation, environment: Mapping[str, str]) -> dict[str, str]:
    """How processes are told what they are given; a person may have said otherwise."""
    return {allocation.VARIABLE: environment.get(allocation.VARIABLE, str(given))}


def _share_of_memory(cells: int, environment: Mapping[str, str]) -> dict[str, str]:
    """How JAX is told to take its part of a GPU's memory that so many cells share: of what it would take alone."""
    if cells == 1:
        return {}
    name = next((name for name in hardware.FRACTION_VARIABLES if environment.get(name)), hardware.FRACTION_VARIABLES[-1])
    return {name: f"{hardware.memory_fraction(environment) / cells:.4f}"}


def gpu_slice(count: int, environment: Mapping[str, str] = os.environ) -> Slice | None:
    """The slice that so many GPUs of this machine are, with the memory that JAX takes in this environment; None where they are
    not known.
    """
    chip = hardware.chip_of(names[0]) if (names := _gpu_names()) else None
    if chip is None:
        return None
    chip = hardware.on_this_machine(chip, environment)
    return dataclasses.replace(hardware.find(f"{chip.name}:1"), name=f"{chip.name}:{count}", chip=chip, n_chips=count)


def _holder(path: str) -> dict[str, Any] | None:
    """What the process that holds the lock file says of itself; None: nobody holds it."""
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(facts := json.loads(file.read()), dict):
                        return records.usable(facts, records.RECORDS[".lock"])
                return {}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    return None


def _start(argv: list[str], file: Path, slot: Slot, environment: dict[str, str], claim: int) -> subprocess.Popen:
    """A process that prints into `file` and holds the claim until it has ended."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = argv  # where there is no way to be told of the launcher's death a cell left over ends by itself and is not lost
    if sys.platform == "linux":
        cpus = ",".join(map(str, sorted(slot.cpus)))
        start = [sys.executable, "-S", "-E", "-c", _BIND, str(os.getpid()), cpus, *argv]
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {slot.name}: {' '.join(argv)}\n".encode())
        log.flush()
        return subprocess.Popen(
            start,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path} | environment,
            pass_fds=[claim],
            start_new_session=True,  # Ctrl-C reaches the launcher, which ends its cells
        )


# Runs in the new process and becomes the cell: asks the kernel for SIGKILL when the launcher dies (PR_SET_PDEATHSIG = 1, kept
# across exec), sees whether it died before that, takes the slot's CPUs.
_BIND = """
import ctypes, os, signal, sys
parent, cpus, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("the launcher is gone")
os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
os.execv(argv[0], argv)
"""


def _explain(folder: epath.PathLike, codes: Sequence[int]) -> None:
    """Leaves an exit record for processes that could not write one themselves."""
    folder = epath.Path(folder)
    if all(code == 0 for code in codes) or records.read(folder / "exit.json") or "result.json" in storage.names(folder):
        return
    killed = next((code for code in codes if code == -signal.SIGKILL), None) or next((c for c in codes if c < 0), None)
    if killed is not None:
        run_folder.record_exit(folder, killed, "killed", f"ended by signal {signal.Signals(-killed).name}", None)
    else:
        code = next(code for code in codes if code)
        run_folder.record_exit(folder, code, "error", f"exit code {code} without a word: see log.txt", None)


def _signal(pids: Sequence[int], what: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def _is_of(pid: int, folder: str) -> bool:
    try:
        return folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return not Path("/proc").exists()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process of ours may see, without starting a GPU runtime."""
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    return [str(number) for number, _ in enumerate(_gpu_names())]


def _gpu_names() -> list[str]:
    """What the driver calls this machine's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.splitlines() if found.returncode == 0 else []
