"""The folder of one run, local or on gs://: who may write it, what was recorded of its configuration, environment and end.

config.json           the resolved configuration, written once
id.json               id: what services (W&B) know the run by, drawn once; of a run of the first version the folder's name
environment.json      versions, devices and commit of the newest attempt
tokenizer/            the tokenizer of its token store (gqa_jax.data.tokenizer)
attempts/NNN.json     attempt, time, first_step (steps done before it), host, job, device, n_devices, n_processes: written once
                      per attempt, when its checkpoint was restored
metrics/              rows of an attempt: attempt-NNN.jsonl; on gs:// in parts, attempt-NNN-PPPPP.jsonl (remote_rows.py)
heartbeat.json        replaced every few seconds while the run is alive: time, phase, step, steps, tokens_per_second,
                      eta_seconds, pid, attempt, host, job, device, n_devices (None: not known yet) and device_seconds
checkpoints/          see checkpoint.py; damaged-checkpoints/ holds those that could not be used
profile/              traces of --profile; tensorboard/ events, if they are asked for
exit.json             why the newest attempt ended early, if it did: code, class, reason, attempt, time, host, job
failures/             the same of every attempt that ended by a fault of machines (class infrastructure), by milliseconds since
                      the epoch; `host` is the machine whose fault it was, by its name in the cluster (None: not known)
evaluations.json      the last evaluation by source and position: rows of `gqa_jax.load_evaluations`
documents.npz         the same by document, for differences between runs: `gqa_jax.training.evaluation.Documents`
result.json           written last: the run is over
.lock                 held by the process that trains here, local folders only: pid, host and time of the one that held it last

`job` is $GQA_JAX_JOB, the name by which the engine that started the attempt knows it, or null. `device_seconds` is devices
times seconds, summed over all attempts: each goes on from the heartbeat of the one before. Missing from it is what an attempt
that was killed spent after its last heartbeat, or before its first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from etils import epath

from gqa_jax import errors, storage
from gqa_jax.config import OLD_RULES, OLD_STORES, TrainConfig, differing_fields
from gqa_jax.errors import ConfigError
from gqa_jax.training import records

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DIVERGED = 0, 1, 2, 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved; start me again

EVALUATIONS, DOCUMENTS = "evaluations.json", "documents.npz"
FAILURES = "failures"
_AGAIN = "then run the same command again: it goes on from the last checkpoint"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gqa-jax")


class Diverged(Exception):
    """The loss or the gradient is no longer finite."""

    def __init__(self, step: int, what: str, value: float):
        super().__init__(f"{what} is {value} at step {step}: try a lower optimizer.learning_rate or a longer warm-up")
        self.step = step


class Preempted(Exception):
    """The run was asked to end, and did so after saving."""

    def __init__(self, step: int, by: str = "SIGTERM"):
        super().__init__(f"asked to end ({by}): saved after step {step}; the same command goes on from there")
        self.step = step


class WrongDevices(Exception):
    """JAX does not have the devices that the run was given (gqa_jax.training.devices)."""


class ProcessFailed(Exception):
    """Another process of the run failed; the message says which and why (gqa_jax.training.distributed)."""

    def __init__(self, message: str, kind: str = "error", host: str | None = None):
        super().__init__(message)
        self.kind = kind  # class, as of `classify`
        self.host = host  # as of `blamed`


class ProcessLost(ProcessFailed):
    """Another process of the run is gone, and could not say why: not of this program, worth another attempt."""

    def __init__(self, message: str):
        super().__init__(message, "infrastructure")


#: Class of the errors that a run may end with, and exit codes of classes.
_ENDS = {ConfigError: "config", Diverged: "diverged", Preempted: "preempted", WrongDevices: "infrastructure"}
_CODES = {"config": EXIT_BAD_INPUT, "diverged": EXIT_DIVERGED, "preempted": EXIT_PREEMPTED}
#: Ends that all processes of a run come to at the same place, so that none waits for another.
ALIKE = (ConfigError, Diverged, Preempted, ProcessFailed)


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Devices that an attempt holds, and the device-seconds of the run."""

    device: str | None = None
    n_devices: int | None = None
    started: float = 0.0  # of this attempt, by time.monotonic
    before: float = 0.0  # device-seconds of the attempts before
    shared_by: int = 1  # runs that share each device

    def seconds(self) -> float:
        """Device-seconds of the run until now; of a device that several share, its part."""
        return self.before + (self.n_devices or 0) / self.shared_by * (time.monotonic() - self.started)


@contextlib.contextmanager
def claim(workdir: os.PathLike | str) -> Iterator[None]:
    """Makes the folder and holds it for this process. Raises ConfigError when it can't be written, or another trains in it.

    The kernel drops the claim when the process ends, however it ends; what the lock file then says is of the past. On gs://
    there is no claim, only the check: that one job trains there is ensured by its name, which an engine gives only once.
    """
    if storage.is_remote(workdir):
        storage.check_writable(workdir)
        yield
        return
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(workdir / ".lock", "a+"))
        except OSError as error:
            if errors.disk_is_full(error):  # not of the configuration
                raise
            raise ConfigError(f"--workdir={workdir} can't be written: {storage.explain(error)}") from error
        for patience in (0.1, 0.2, 0.4, None):  # `status` holds it for a moment when it looks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    raise ConfigError(
                        f"{workdir}: another process trains in this folder{_holder(file)}; wait for it, or use another "
                        "--workdir"
                    ) from None
                time.sleep(patience)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}, file)
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    """Who holds the lock, as far as it has said so."""
    file.seek(0)
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        holder = json.load(file)
        return f" (process {holder['pid']} on {holder['host']})"
    return ""


def record_config(workdir: epath.Path, config: TrainConfig) -> None:
    """Writes config.json, or checks that the one there describes the same run. Raises ConfigError with what differs."""
    path = workdir / "config.json"
    try:
        values = storage.read_json(path)
        if values is None:
            storage.write_json(path, config.to_dict())
            return
        theirs = TrainConfig.from_stored(values)
    except ValueError as error:
        raise ConfigError(f"{path} can't be used ({error}): move it away, or use another --workdir") from None
    refuse_other_identity(workdir, *(c.identity("", c.continue_from) for c in (config, theirs)), config)


def refuse_other_identity(workdir: Path, ours: dict[str, Any], theirs: dict[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError naming each field in which two identities (`TrainConfig.identity`) differ, and how to go on.

    Args:
      config: the configuration that `ours` is of.
    """
    ours, theirs = _with_rules(ours), _with_rules(theirs)
    lines = differing_fields(ours, theirs)
    if not lines:
        return
    rules = [(group, name) for group, fields in OLD_RULES.items() for name in fields]
    others = [(group, name) for group, name in rules if ours[group][name] != theirs[group][name]]
    data = ours["data"]["fingerprint"] != theirs["data"]["fingerprint"]
    fix = "Resume it with the same fields"
    if others or data:
        options = [f"--config.{group}.{name}={theirs[group][name]}" for group, name in others]
        if all(theirs[group][name] == OLD_RULES[group][name] for group, name in rules):
            options += _store_of_first_version(config)
            begun = "That run was begun under the rules of the first version"
        else:
            begun = "That run was begun under other rules"
        if options:
            fix = f"{begun}: to resume it add {' '.join(options)}"
            fix += " and the same values of the other fields" * (len(lines) > len(others) + data)
    raise ConfigError(
        f"{workdir} holds a run with another configuration: {'; '.join(lines)}. {fix}, or start this one in another --workdir"
    )


def data_of_first_version(config: TrainConfig) -> str:
    """Words after the fingerprint of data that is not that of a run which is over; empty where nothing is to be said."""
    options = _store_of_first_version(config)
    return f"; if that run is of the first version, add {' '.join(options)}" if options else ""


def _store_of_first_version(config: TrainConfig) -> list[str]:
    """The option by which a built-in store is the one of that name in the first version."""
    name = OLD_STORES.get(config.data.store)
    return [] if name is None else [f"--config.data.store={name}"]


def _with_rules(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the rules of the first version where it names none."""
    return identity | {group: fields | identity[group] for group, fields in OLD_RULES.items()}


def next_attempt(workdir: os.PathLike | str) -> int:
    """Number of the attempt that starts now, 0 for the first: above every one that left metrics or a record."""
    files = (storage.names(os.path.join(workdir, folder)) for folder in ("metrics", "attempts"))
    patterns = r"attempt-(\d{1,9})(?:-\d+)?\.jsonl", r"(\d{1,9})\.json"
    found = [re.fullmatch(pattern, name) for pattern, names in zip(patterns, files, strict=True) for name in names]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def run_id(workdir: epath.Path, attempt: int) -> str:
    """What services know this run by: drawn by attempt 0 and kept in id.json, so that folders of one name are not one run.

    A run that was begun without it, by the first version, was known by the name of its folder and keeps that. Raises
    ConfigError when id.json can't be used.
    """
    path = workdir / "id.json"
    values = storage.read_json(path)
    if values is None:
        values = {"id": secrets.token_hex(8) if attempt == 0 else workdir.name}
        storage.write_json(path, values)
    if (found := records.usable(values, records.RECORDS["id.json"]).get("id")) is None:
        raise ConfigError(f"{path} has no id: move it away; W&B then knows this run by the name of its folder")
    return found


def device_seconds(workdir: epath.Path) -> float:
    """Device-seconds that a run has spent so far, by its heartbeat."""
    return records.read(workdir / "heartbeat.json").get("device_seconds", 0.0)


def origin() -> dict[str, str | None]:
    """Host of this process, and $GQA_JAX_JOB: the name by which the engine that started it knows it."""
    return {"host": socket.gethostname(), "job": os.environ.get("GQA_JAX_JOB") or None}


def read_config(folder: epath.Path) -> TrainConfig:
    """The configuration of a run. Raises ConfigError, naming its file and the fix, where there is none that can be used."""
    path = folder / "config.json"
    try:
        values = storage.read_json(path)
        if values is None:
            raise ConfigError("it is not there")
        return TrainConfig.from_stored(values)
    except ValueError as error:
        raise ConfigError(f"{path} can't be used ({error!s:.500})") from error


def find_result(path: os.PathLike | str) -> dict[str, Any] | None:
    """A result.json, with what it has beside the fields of `records.RECORDS`; None when it is not there.

    Raises ConfigError, naming the file and the fix, when it can't be read or lacks what it must have.
    """
    values = storage.read_json(path)
    if values is None:
        return None
    result = records.usable(values, fields := records.RECORDS["result.json"])
    needed = ("status", "loss", "step", "identity") if result.get("status") == "done" else ("status", "step", "identity")
    if odd := [f"{name} = {values[name]!r:.60}" if name in values else f"no {name}" for name in needed if name not in result]:
        raise ConfigError(f"{path} has {', '.join(odd)}: move it away to run this cell again")
    return values | {name: result.get(name) for name in fields if name in values or name == "loss"}


def record_attempt(workdir: epath.Path, attempt: int, first_step: int, device_time: DeviceTime, n_processes: int) -> None:
    """Writes attempts/NNN.json: where this attempt starts, and what it holds."""
    values = {"attempt": attempt, "time": time.time(), "first_step": first_step} | origin()
    values |= {"device": device_time.device, "n_devices": device_time.n_devices, "n_processes": n_processes}
    storage.make_folder(workdir / "attempts")
    storage.write_json(workdir / "attempts" / f"{attempt:03d}.json", values)


def record_exit(
    workdir: os.PathLike | str, code: int, kind: str, reason: str, attempt: int | None, blamed: str | None = None
) -> None:
    """Writes exit.json: exit code, class (as `classify`) and one sentence; for faults of machines failures/ too."""
    now = time.time()
    values = {"code": code, "class": kind, "reason": reason, "attempt": attempt, "time": now} | origin()
    try:
        storage.write_json(storage.path(workdir) / "exit.json", values)
        if kind == "infrastructure":
            folder = storage.path(workdir) / FAILURES
            storage.make_folder(folder)
            storage.write_json(folder / f"{int(1000 * now)}.json", values | {"host": blamed})
    except Exception as error:  # on a full disk, or without a network, the exit code and the log have to do
        log.warning("exit.json can't be written: %s", error)


def failures(workdir: os.PathLike | str) -> dict[float, epath.Path]:
    """The records of failures/, oldest first, by their times in seconds since the epoch."""
    folder = storage.path(workdir) / FAILURES
    return {int(name[:-5]) / 1000: folder / name for name in storage.names(folder) if re.fullmatch(r"\d+\.json", name)}


def classify(error: BaseException) -> tuple[str, str]:
    """Class and one sentence for an error that ended a run.

    Classes: config, out_of_memory, disk_full, infrastructure (machines, devices, network, files: `gqa_jax.hardware.faults`),
    diverged, preempted, error.
    """
    from gqa_jax.hardware import faults

    text = str(error).strip() or type(error).__name__
    if any(map(errors.disk_is_full, errors.chain(error))):
        return "disk_full", f"the disk is full ({text}): free space and run the same command again; what was saved is kept"
    fault, cause = faults.of(error) or (None, error)
    if isinstance(error, ConfigError) and fault is not None:
        return fault.kind, text
    for kind, name in _ENDS.items():
        if isinstance(error, kind):
            return name, text
    if isinstance(error, ProcessFailed):
        return error.kind, text
    if (sentence := storage.explain_remote(error)) is not None:
        return "infrastructure", f"{sentence}; {_AGAIN}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or (fault and fault.kind == "out_of_memory"):
        return "out_of_memory", (
            f"out of memory ({errors.first_line(cause) or text}): raise execution.accumulation_steps, or set "
            "execution.remat to full"
        )
    if fault is not None:
        return fault.kind, f"{fault.what} ({errors.named(cause)}); {_AGAIN}"
    return "error", errors.named(error)


def blamed(error: BaseException) -> str | None:
    """This machine, by its name in the cluster, where an error is a fault of it; else None."""
    from gqa_jax.hardware import faults

    row, _ = faults.of(error) or (None, error)
    of_host = isinstance(error, WrongDevices) or (row is not None and row.of_host)
    if not of_host or isinstance(error, ProcessFailed) or classify(error)[0] != "infrastructure":
        return None
    if storage.explain_remote(error) is not None:
        return None
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def exit_code(error: BaseException) -> int:
    """Exit code of a run that ended with `error`."""
    return _CODES.get(classify(error)[0], EXIT_FAILED)


def environment(config: TrainConfig, device: str, n_devices: int, n_processes: int) -> dict[str, Any]:
    """Versions, devices, host and commit that a run used, and how `config`, resolved, is carried out."""
    execution = config.execution
    return {
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": device,
        "n_devices": n_devices,
        "host": socket.gethostname(),
        "commit": commit(),
        "n_processes": n_processes,
        "mesh": str(execution.mesh),
        "remat": execution.remat,
        "accumulation_steps": execution.accumulation_steps,
        "context_attention": execution.context_attention if execution.mesh.context > 1 else None,
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
