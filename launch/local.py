"""The local backend: cells as processes of this machine, one per device slot. Imports no jax.

A slot is a GPU, or an equal share of the CPUs. Children end with the launcher, however it ends; what they had saved is
resumed by the same command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gqa_jax import run_folder
from gqa_jax.config import ConfigError
from launch import state
from launch.grid import Cell, Layout

PREEMPTED = 75  # exit code: saved, start me again
POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0  # for a cell to save: it is told by SIGTERM
REPOSITORY = Path(__file__).resolve().parent.parent


class Slot:
    """A place for one process: environment that shows it its device, and the CPUs that it may use."""

    def __init__(self, name: str, environment: dict[str, str], cpus: set[int]):
        self.name, self.environment, self.cpus = name, environment, cpus


def slots(count: int | None = None) -> list[Slot]:
    """One slot per visible GPU, else one per CPU; `count` asks for another number.

    Raises ConfigError for a count that the machine does not have.
    """
    cpus = sorted(os.sched_getaffinity(0))
    gpus = _gpus()
    available = len(gpus) or len(cpus)
    wanted = available if count is None else count
    if not 1 <= wanted <= available:
        kind = "GPUs" if gpus else "CPUs"
        raise ConfigError(f"--slots {wanted}: this machine has {available} {kind}, use 1 to {available}")
    shares = [set(cpus[i::wanted]) or set(cpus) for i in range(wanted)]
    if gpus:
        return [Slot(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}, share) for gpu, share in zip(gpus, shares, strict=False)]
    # XLA frees and allocates a step's buffers every step; huge pages save most of the page faults (glibc 2.35 or newer).
    tunables = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
    platform = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    return [Slot(f"CPU {i}", tunables | platform, share) for i, share in enumerate(shares)]


def command(cell: Cell, layout: Layout) -> list[str]:
    """The training process of a cell; also what a person types to repeat it."""
    folder = layout.cell(cell.name)
    config = f"--config={REPOSITORY / 'configs' / 'cell.py'}:{folder / 'config.json'}"
    return [sys.executable, "-m", "gqa_jax.train", config, f"--workdir={folder}"]


@contextlib.contextmanager
def only_launcher(layout: Layout) -> Iterator[None]:
    """Holds the grid folder for this process. Raises ConfigError when another launcher has it."""
    layout.root.mkdir(parents=True, exist_ok=True)
    with open(layout.root / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another launcher runs in {layout.root}: watch it with `python -m launch status`, or wait for it to end"
            ) from None
        yield


def check_parents(chosen: Sequence[Cell], layout: Layout) -> None:
    """Raises ConfigError when one of `chosen` would wait for a cell that is neither done nor among them."""
    names = {cell.name for cell in chosen}
    for cell in chosen:
        ends = state.of(layout.cell(cell.name), time.time()).state in state.FINAL
        if cell.parent is None or cell.parent in names or ends or _is_done(layout.cell(cell.parent)):
            continue
        raise ConfigError(
            f"{cell.name} continues {cell.parent}, which is not done and not chosen: leave --where out (what is done is not "
            f"trained again), or run that one first: --where cell={cell.parent}"
        )


def run(
    cells: Sequence[Cell],
    layout: Layout,
    places: Sequence[Slot],
    on_change: Callable[[Sequence[Cell], dict[str, int]], None],
    make_command: Callable[[Cell, Layout], list[str]] = command,
) -> dict[str, int]:
    """Runs `cells` to their end, as many at a time as there are slots; a failing one doesn't stop the others.

    A cell starts when its parent is done; when that ended otherwise it is not started, and has no exit code.
    `on_change(running cells, exit codes so far)` is called a few times a second. A cell that exits with 75 is started
    again, three times at most. Returns the exit code of each cell (negative: ended by that signal).
    """
    waiting, running, codes = list(cells), {}, {}
    restarts = dict.fromkeys((cell.name for cell in cells), 0)
    try:
        while waiting or running:
            for slot in places:
                busy = {cell.name for cell, _ in running.values()}
                if slot.name not in running and (cell := _take(waiting, busy, layout)) is not None:
                    running[slot.name] = cell, _start(make_command(cell, layout), layout.cell(cell.name), slot)
            for name, (cell, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code == PREEMPTED and restarts[cell.name] < 3:
                    restarts[cell.name] += 1
                    waiting.append(cell)
                    continue
                codes[cell.name] = code
                _explain(layout.cell(cell.name), code)
            on_change([cell for cell, _ in running.values()], codes)
            time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process in running.values()])
    return codes


def _take(waiting: list[Cell], busy: set[str], layout: Layout) -> Cell | None:
    """The first cell that can start, taken from `waiting`, as are those whose parent has ended without being done."""
    unfinished = busy | {cell.name for cell in waiting}
    for cell in list(waiting):
        if cell.parent in unfinished:
            continue
        waiting.remove(cell)
        if cell.parent is None or _is_done(layout.cell(cell.parent)):
            return cell
        unfinished.remove(cell.name)
    return None


def _is_done(folder: Path) -> bool:
    return state.of(folder, time.time()).state == "done"


def _start(argv: list[str], folder: Path, slot: Slot) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | slot.environment | {"PYTHONPATH": _with_repository(os.environ.get("PYTHONPATH"))}
    if sys.platform == "linux":
        cpus = ",".join(map(str, sorted(slot.cpus)))
        start = [sys.executable, "-S", "-E", "-c", _BIND, str(os.getpid()), cpus, *argv]
    else:
        start = argv  # no way to be told of the launcher's death: a cell left over ends by itself and is not lost
    with open(folder / "log.txt", "ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {slot.name}: {' '.join(argv)}\n".encode())
        log.flush()
        return subprocess.Popen(
            start,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
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


def _explain(folder: Path, code: int) -> None:
    """Leaves an exit record for a process that could not write one itself."""
    if code == 0 or (folder / "exit.json").exists() or (folder / "result.json").exists():
        return
    if code < 0:
        run_folder.record_exit(folder, code, "killed", f"ended by signal {signal.Signals(-code).name}", None)
    else:
        run_folder.record_exit(folder, code, "error", f"exit code {code} without a word: see log.txt", None)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _gpus() -> list[str]:
    """Names of the GPUs that a process of ours may see, without starting a GPU runtime."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines() if found.returncode == 0 else []
    return [str(i) for i, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def _with_repository(path: str | None) -> str:
    return os.pathsep.join([str(REPOSITORY), *([path] if path else [])])
