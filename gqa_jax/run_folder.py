"""The folder of one run: who may write it, what was recorded of its configuration, environment and end.

config.json        the resolved configuration, written once
environment.json   versions, devices and commit of the newest attempt
metrics/           attempt-NNN.jsonl, one per attempt
heartbeat.json     replaced every few seconds while the run is alive
checkpoints/       see checkpoint.py
exit.json          why the newest attempt ended early, if it did
result.json        written last: the run is over
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqa_jax.config import ConfigError, TrainConfig, differing_fields
from gqa_jax.metrics import write_json

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DIVERGED = 0, 1, 2, 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved; start me again

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gqa-jax")


class Diverged(Exception):
    """The loss or the gradient is no longer finite."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"{what} is {value} at step {step}: try a lower optimizer.learning_rate or a longer warm-up")
        self.step = step


class Preempted(Exception):
    """The run was asked to end, and did so after saving."""

    def __init__(self, step: int):
        super().__init__(f"asked to end (SIGTERM): saved after step {step}; the same command goes on from there")
        self.step = step


class ProcessFailed(Exception):
    """Another process of the run failed; the message says which and why (gqa_jax.distributed)."""


#: Ends that all processes of a run come to at the same place, so that none waits for another.
ALIKE = (ConfigError, Diverged, Preempted, ProcessFailed)


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process. Raises ConfigError when another process trains in it.

    The kernel drops the claim when the process ends, however it ends.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a") as file:
        for patience in (0.1, 0.2, 0.4, None):  # `status` holds it for a moment when it looks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    raise ConfigError(
                        f"{workdir}: another process trains in this folder; wait for it, or use another --workdir"
                    ) from None
                time.sleep(patience)
        yield


def record_config(workdir: Path, config: TrainConfig) -> None:
    """Writes config.json, or checks that the one there describes the same run. Raises ConfigError with what differs."""
    path = workdir / "config.json"
    if not path.exists():
        write_json(path, config.to_dict())
        return
    try:
        theirs = TrainConfig.from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"{path} can't be read ({error}): move it away, or use another --workdir") from None
    refuse_other_identity(workdir, *(c.identity("", c.continue_from) for c in (config, theirs)))


def refuse_other_identity(workdir: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ConfigError naming each field in which two identities (`TrainConfig.identity`) differ."""
    if lines := differing_fields(ours, theirs):
        raise ConfigError(
            f"{workdir} holds a run with another configuration: {'; '.join(lines)}. Resume it with the same fields, "
            "or start this one in another --workdir"
        )


def next_attempt(workdir: Path) -> int:
    """Number of the attempt that starts now: 0 for the first."""
    return sum(1 for _ in (workdir / "metrics").glob("attempt-*.jsonl"))


def record_exit(workdir: Path, code: int, kind: str, reason: str, attempt: int | None) -> None:
    """Writes exit.json: exit code, class (as `classify`) and one sentence."""
    values = {"code": code, "class": kind, "reason": reason, "attempt": attempt, "time": time.time()}
    with contextlib.suppress(OSError):  # on a full disk the exit code and the log have to do
        write_json(workdir / "exit.json", values)


def classify(error: BaseException) -> tuple[str, str]:
    """Class (config, out_of_memory, disk_full, diverged, preempted, error) and one sentence for an error that ended a run."""
    text = str(error).strip() or type(error).__name__
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e) for e in chain):
        return "disk_full", f"the disk is full ({text}): free space and run the same command again; what was saved is kept"
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return "out_of_memory", (
            f"out of memory ({text.splitlines()[0]}): raise accumulation_steps, or set model.remat to full"
        )
    if isinstance(error, ConfigError):
        return "config", text
    if isinstance(error, Diverged):
        return "diverged", text
    if isinstance(error, Preempted):
        return "preempted", text
    if isinstance(error, ProcessFailed):
        return "error", text
    return "error", f"{type(error).__name__}: {text.splitlines()[0]}"


def environment(device: str, n_devices: int) -> dict[str, Any]:
    """Versions, devices, host and commit that a run used."""
    return {
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": device,
        "n_devices": n_devices,
        "host": socket.gethostname(),
        "commit": commit(),
    }


def commit() -> str | None:
    """Commit of this checkout, with `+` when files differ from it; GQA_JAX_COMMIT where there is no checkout; else None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GQA_JAX_COMMIT")
    return head + ("+" if changed.strip() else "")
