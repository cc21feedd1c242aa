"""Slurm: a batch job per cell, on nodes that share a file system with this machine.

Slurm starts a cell again after the failure of a node, a preemption, or an end with exit code 75, in the same job. Its job names
are not unique (`queue`), but of jobs of one name only one runs at a time (singleton).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gqa_jax import hardware, storage
from gqa_jax.errors import ConfigError
from gqa_jax.hardware.allocation import VARIABLE, Allocation
from gqa_jax.training import run_folder
from gqa_jax.training.records import read as read_record
from launch.cells import REPOSITORY, Cell
from launch.executors import base, job_names, queue
from launch.executors.base import DEAD, QUEUED, RUNNING, Rents, Submission, SubmitError
from launch.executors.queue import Record
from launch.executors.slurm_words import HELD_AFTER, NEVER, NOT_LAUNCHED, REASONS, may_pass

CALL_SECONDS = 120.0  # that a command of Slurm may take
EXCLUDED_HOURS, EXCLUDED = 24.0, 4  # nodes whose machine has failed a cell since then are left out: so many at most
LOOK_SECONDS = 60.0  # that what is known of them holds
RANK_SECONDS = 60  # that the other processes of a cell have to end after one has ended
SCRIPT = Path(__file__).with_name("slurm_job.sh")
SETUP = """
trap 'failed "a line of setup failed"' ERR
set -e
{lines}
set +e
trap - ERR
"""

# Slurm's states of a job (job_state of `squeue --json`, several in newer versions): the first group that has one of them holds.
ENDING = ("COMPLETING", "STAGE_OUT")  # its processes may still save
WAITING = ("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED", "STOPPED", "CONFIGURING")
ENDED = (  # shown for MinJobAge
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", "LAUNCH_FAILED", "RECONFIG_FAIL",
)  # fmt: skip
STATES = (
    (RUNNING, ENDING),
    (QUEUED, (*WAITING, "POWER_UP_NODE")),
    (RUNNING, ("RUNNING", "RESIZING", "SIGNALING")),
    (QUEUED, ("PENDING",)),
    (None, ENDED),
)

# Options of sbatch that no cluster file sets, beside those of `Options.directives`.
OURS = (
    "job-name", "output", "open-mode", "chdir", "requeue", "dependency", "gpus", "array", "parsable", "wrap", "test-only",
    "no-requeue",
)  # fmt: skip
GONE = ("already completing or completed", "invalid job id")  # of scancel

# Days-hours:minutes:seconds, of which the last may be missing; hours:minutes:seconds; minutes:seconds; minutes.
TIME = re.compile(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Options(base.Options):
    """Of a cluster file like configs/clusters/slurm.toml; `topology` is what each of `nodes` has, None: CPUs alone."""

    least: ClassVar = {"nodes": 1, "cpus_per_task": 1, "signal_seconds": 1}
    forms: ClassVar = dict.fromkeys(("partition", "account", "qos", "constraint", "python", "code"), base.LINE) | {
        "memory": (r"\d+[KMGT]?", 'a number with K, M, G or T, as "64G"'),
        "setup": base.BASH,
        "extra": (r"--[a-z][a-z-]*(=.*)?", 'options of sbatch, as "--reservation=NAME"'),
    }
    reserved = ("SLURM_", "GQA_JAX_JOB", "GQA_JAX_COMMIT")

    engine: str = "slurm"
    nodes: int = 1  # of a cell, one training process each
    gpus_per_node: int | str | None = None  # a count, or TYPE:COUNT as the cluster calls them; None: those of `topology`
    cpus_per_task: int | None = None  # CPUs of a cell on each node; None: what the cluster gives, often one
    memory: str | None = None  # of each node: "64G"; "0" is all that it has; None: what the cluster gives
    partition: str | None = None  # None: the cluster's default, here and below
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of nodes: "h100&ib"
    time: str = "24:00:00"  # after which a cell saves, and goes on in the next turn: HOURS:MINUTES:SECONDS or DAYS-HOURS
    signal_seconds: int = 120  # before that time in which it saves
    python: str = sys.executable  # Python that has the packages, at the same path on all nodes; or its name, if setup finds it
    code: str = os.fspath(REPOSITORY)  # checkout that is trained with, at the same path on all nodes
    setup: list = dataclasses.field(default_factory=list)  # lines of bash before training, on a cell's first node
    extra: list = dataclasses.field(default_factory=list)  # further options of sbatch: "--reservation=NAME"

    def __post_init__(self):
        super().__post_init__()
        self._check_gpus()
        self._check_time()
        self._check_extra()

    @property
    def slice(self) -> hardware.Slice | None:
        """None for several nodes: no slice of several is listed, and nothing is proved to fit them."""
        return super().slice if self.nodes == 1 else None

    @property
    def gpus(self) -> int | str | None:
        """GPUs of each node; None: CPUs alone."""
        if self.gpus_per_node is not None or self.topology is None:
            return self.gpus_per_node
        return hardware.find(self.topology).n_chips

    @property
    def allocation(self) -> Allocation:
        """All GPUs of its nodes; of which chip where `topology`, or the cluster's own name of them, says it."""
        if self.gpus is None:
            return Allocation("cpu")
        kind, _, count = str(self.gpus).rpartition(":")
        chip = hardware.find(self.topology).chip.name if self.topology is not None else kind.lower()
        return Allocation("gpu", chip if chip in hardware.CHIPS else None, self.nodes * int(count), int(count))

    @property
    def directives(self) -> dict[str, Any]:
        """What every job of these options asks for: options of sbatch; those that are None it does not ask for."""
        return {
            "nodes": self.nodes,
            "ntasks-per-node": 1,  # JAX takes all GPUs of the node
            "gpus-per-node": self.gpus,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time,
            "signal": f"TERM@{self.signal_seconds}",
        }

    def _check_gpus(self) -> None:
        if self.topology is not None and hardware.find(self.topology).is_tpu:
            raise ConfigError(f'topology = {self.topology!r}: must be GPUs of a node, as "h200:8"; for TPUs use engine = "tpu"')
        if self.gpus_per_node is None:
            return
        count = str(self.gpus_per_node).rpartition(":")
        if not count[2].isdecimal() or int(count[2]) < 1 or (count[1] and not re.fullmatch(r"[\w.-]+", count[0])):
            raise ConfigError(f'gpus_per_node = {self.gpus_per_node!r}: must be a number from 1 on, or TYPE:NUMBER ("h100:8")')
        if self.topology is not None and int(count[2]) != hardware.find(self.topology).n_chips:
            raise ConfigError(
                f"gpus_per_node = {self.gpus_per_node!r} with topology = {self.topology!r}, which says what a node has: make "
                "them agree, or leave one out"
            )

    def _check_time(self) -> None:
        if (match := TIME.fullmatch(self.time)) is None:
            raise ConfigError(f'time = {self.time!r}: must be HOURS:MINUTES:SECONDS or DAYS-HOURS, as "24:00:00" or "7-0"')
        numbers = [int(number) for number in match[2].split(":")]
        units = (3600, 60, 1) if match[1] or len(numbers) == 3 else (60, 1)
        seconds = 86_400 * int(match[1] or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))
        if seconds <= self.signal_seconds + 60:  # Slurm may send the signal a minute earlier
            raise ConfigError(
                f"time = {self.time!r} is {seconds} s: must be more than signal_seconds + 60 = {self.signal_seconds + 60}, in "
                "which a cell saves: raise it"
            )

    def _check_extra(self) -> None:
        for line in self.extra:
            name = line.removeprefix("--").partition("=")[0]
            if name in OURS or name in self.directives:
                raise ConfigError(f"extra has {line!r}: --{name} is set by the launcher, or by an option of this file")


class Executor(queue.Executor):
    """A batch job per cell."""

    Options = Options
    _excluded: tuple[float, list[str]] = -LOOK_SECONDS, []  # when it was looked for, by time.monotonic, and what was found

    @property
    def rents(self) -> Rents | None:
        if self.options.topology is None:
            return None
        node = hardware.find(self.options.topology)
        return Rents(node.chip.name, self.options.nodes * node.n_chips)

    def check(self) -> None:
        self._check_root()
        missing = [name for name in ("sbatch", "squeue", "scancel", "srun") if shutil.which(name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not on the PATH: run this on a login node of the Slurm cluster")
        for name, path in (("python", self.options.python), ("code", os.path.join(self.options.code, "configs", "cell.py"))):
            if (os.path.isabs(path) or name == "code") and not os.path.exists(path):
                raise ConfigError(f"{name} = {getattr(self.options, name)!r}: {path} is not there")
        text = self._squeue()
        try:
            self._parsed(text)
        except SubmitError as error:
            raise ConfigError(f"{error}: Slurm must be 21.08 or newer, and have JSON") from error
        script = "\n".join(["#!/bin/bash", *self._directives("check", os.devnull), "true", ""])
        done = _call("sbatch", "--test-only", text=script)
        if done.returncode and not may_pass(done.stderr):
            raise ConfigError(f"sbatch refuses these options: {_words(done.stderr)}")

    def submission(self, cell: Cell) -> Submission:
        file = self.layout.cell(cell.name) / "job.sbatch"
        command = shlex.join(["sbatch", "--parsable", os.path.abspath(file)])
        return Submission(cell.name, command, {file.name: self._script(cell)})

    def launch(self, cell: Cell) -> int:
        folder = self.layout.cell(cell.name)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(folder / "job.sbatch", self._script(cell).encode())
        done = _call("sbatch", "--parsable", os.path.abspath(folder / "job.sbatch"))
        if done.returncode:
            if may_pass(done.stderr):
                raise SubmitError(f"sbatch failed: {_words(done.stderr)}")
            raise ConfigError(f"sbatch refuses {cell.name}: {_words(done.stderr)}")
        return int(done.stdout.strip().partition(";")[0])  # ID, or ID;CLUSTER

    def end(self, records: Sequence[Record]) -> None:
        if ids := sorted({record.id for record in records}):
            done = _call("scancel", *map(str, ids))
            others = [line for line in done.stderr.splitlines() if not any(words in line.lower() for words in GONE)]
            if done.returncode and others:
                raise SubmitError(f"scancel failed: {_words(done.stderr)}")

    def records(self) -> dict[str, list[Record]]:
        """This user's jobs of this grid."""
        return self._parsed(self._squeue())

    def _squeue(self) -> str:
        """What squeue prints. Raises SubmitError."""
        # Some versions ignore all filters of `squeue --json`.
        done = _call("squeue", "--json", f"--user={os.getuid()}")
        if done.returncode:
            raise SubmitError(f"squeue failed: {_words(done.stderr)}")
        return done.stdout

    def _parsed(self, text: str) -> dict[str, list[Record]]:
        return parse(text, job_names.prefix(self.layout), os.getuid())

    # What a job is.

    def _script(self, cell: Cell) -> str:
        self._check_root()
        options = self.options
        folder = os.path.abspath(self.layout.cell(cell.name))
        lines = self._directives(cell.name, os.path.join(folder, "log.txt").replace("%", "%%"))  # % begins a pattern of Slurm
        exports = {
            "GQA_JAX_JOB": '"$SLURM_JOB_ID"',
            **({"GQA_JAX_COMMIT": shlex.quote(self._commit)} if self._commit else {}),
            "PYTHONPATH": f'{shlex.quote(options.code)}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            # JAX goes on with CPUs where it does not find the GPUs; so training is told what it was given, and compares.
            "JAX_PLATFORMS": "cpu" if options.gpus is None else "cuda,cpu",
            VARIABLE: str(options.allocation),
        }
        exports |= {name: shlex.quote(value) for name, value in options.environment.items()}
        # Slurm passes the number of CPUs on to no step by itself.
        srun = ["--kill-on-bad-exit=0", f"--wait={RANK_SECONDS}"]
        srun += [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
        values = {
            "directives": "\n".join(lines),
            "folder": shlex.quote(folder),
            "exports": "\n".join(f"export {name}={value}" for name, value in exports.items()),
            "setup": SETUP.format(lines="\n".join(options.setup)) if options.setup else "",
            "srun": " ".join(srun),
            "command": shlex.join(cell.command(self.layout.cell(cell.name), options.python, options.code)),
            "preempted": str(run_folder.EXIT_PREEMPTED),
        }
        return re.sub(r"@(\w+)@", lambda match: values[match[1]], SCRIPT.read_text())

    def _directives(self, cell: str, output: str) -> list[str]:
        """The #SBATCH lines of a cell's job. Its working directory is this one, which relative paths are of."""
        values = {
            "job-name": job_names.of(self.layout, cell),
            "output": output,
            "open-mode": "append",
            "chdir": os.getcwd(),
            "requeue": True,
            "dependency": "singleton",
            **self.options.directives,
            "exclude": ",".join(self._faulty_nodes()) or None,
        }
        given = {name: "" if value is True else f"={_quoted(value)}" for name, value in values.items() if value is not None}
        lines = [*(f"--{name}{value}" for name, value in given.items()), *self.options.extra]
        if (excluded := values["exclude"]) is not None:  # sbatch takes the last
            lines += [f"{line},{excluded}" for line in self.options.extra if line.startswith("--exclude=")][-1:]
        return [f"#SBATCH {line}" for line in lines]

    def _faulty_nodes(self) -> list[str]:
        """Nodes that a job is not to run on, beside those of `extra`: machines that have failed cells of this grid.

        Of the last EXCLUDED_HOURS, those that failed most often first, at most EXCLUDED, and no more than half of what the
        partition has beside the cell's own nodes. None where Slurm does not say what it has, or `extra` names the nodes.
        """
        if time.monotonic() - self._excluded[0] >= LOOK_SECONDS:
            self._excluded = time.monotonic(), self._look_for_faulty_nodes()
        return self._excluded[1]

    def _look_for_faulty_nodes(self) -> list[str]:
        if any(re.match(r"--(nodelist|nodefile)\b", line) for line in self.options.extra):
            return []
        since = time.time() - 3600 * EXCLUDED_HOURS
        kept = [run_folder.failures(self.layout.cell(name)) for name in self.layout.names()]
        blamed = Counter(read_record(path).get("host") for mine in kept for at, path in mine.items() if at > since)
        if not (blamed.keys() - {None}):
            return []
        with contextlib.suppress(SubmitError):
            partitions = (self.options.partition or "").split(",")
            lines = [line.split() for line in _call("sinfo", "--noheader", "--Node", "--format=%N %P").stdout.splitlines()]
            nodes = {node for node, name in lines if name.rstrip("*") in partitions or (name[-1] == "*" and partitions == [""])}
            most = min(EXCLUDED, max(0, len(nodes) - self.options.nodes) // 2)
            return sorted([node for node, _ in blamed.most_common() if node in nodes][:most])
        return []

    @functools.cached_property
    def _commit(self) -> str:
        """Commit of the code, for nodes without git; empty where it is not known here."""
        code = Path(self.options.code)
        if code.resolve() == REPOSITORY:
            return run_folder.commit() or ""
        return (storage.read_bytes(code / "COMMIT") or b"").decode().strip()  # an unpacked launch.executors.bundle

    def _check_root(self) -> None:
        if storage.is_remote(self.layout.root):
            raise ConfigError(
                f"--root {os.fspath(self.layout.root)}: scripts and logs of Slurm's jobs need a folder that the login node and "
                "the others share: give one on their file system"
            )


def parse(text: str, prefix: str, user: int) -> dict[str, list[Record]]:
    """The jobs of a user (an id) in what `squeue --json` prints, whose names begin with `prefix`, by the rest of these.

    Knows the formats of Slurm 21.08 (v0.0.37) to 25.05 (v0.0.43). Raises SubmitError for anything else.
    """
    found: dict[str, list[Record]] = {}
    try:
        for job in json.loads(text)["jobs"]:
            name, owner = job["name"] or "", _number(job["user_id"])
            if name.startswith(prefix) and owner == user:
                found.setdefault(name.removeprefix(prefix), []).append(_record(name.removeprefix(prefix), job))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SubmitError(f"`squeue --json` gives no list of jobs ({error!r}): {text[:300].strip()!r}") from error
    return {cell: sorted(mine, key=lambda record: record.id) for cell, mine in found.items()}


def _record(cell: str, job: dict[str, Any]) -> Record:
    """A job as `squeue --json` has it. Raises SubmitError for a state that is not known here."""
    number, states, reason = int(_number(job["job_id"])), job["job_state"], job["state_reason"] or ""
    states = states.split() if isinstance(states, str) else states
    state = next((state for state, names in STATES if any(name in names for name in states)), "")
    if state == "":
        raise SubmitError(f"job {number} of {cell} is in a state that is not known here: {', '.join(states)}")
    ending = any(name in ENDING for name in states)
    description = job["state_description"] or ""
    never = reason in NEVER
    flags = [name.lower() for name in states if name not in ("PENDING", "RUNNING")]
    words = REASONS.get(reason, reason).format(id=number)
    failure = None
    if state == RUNNING:
        detail = "ending" if ending else ""
    elif state == QUEUED and (reason == HELD_AFTER or NOT_LAUNCHED in description.lower()):
        state, detail = DEAD, f"held by Slurm, which could not start it ({description or reason})"
    elif state == QUEUED and never:
        state, detail = DEAD, f"Slurm will not start it: {reason}"
    else:
        detail = ", ".join([*flags, *([words] if words not in ("", "None") else [])])
    if state == DEAD:
        failure = f"job {number}: {detail}" + ("; change the options or the grid, then `retry`" if never else "")
    since = _number(job["start_time"]) or None if state == RUNNING else None
    return Record(cell, number, state, detail, since, job["nodes"] or "", ending, failure, is_final=never)


def _number(value: Any) -> float | None:
    """A number of any version's JSON: newer ones give {"set": true, "infinite": false, "number": 7}."""
    if isinstance(value, dict):
        return value["number"] if value["set"] and not value["infinite"] else None
    return value


def _quoted(value: Any) -> str:
    """A value as sbatch reads it in a script: quotes and backslashes are as in a shell."""
    text = str(value)
    return text if re.fullmatch(r"[^\s\"'\\#;]*", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _call(program: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    """A command of Slurm. Raises SubmitError when it can't be started, or takes too long."""
    # Of a job around this process, or of a user's habits, these would change what is asked for; and a login node's devices
    # are not those of the nodes. sbatch passes the rest of the environment on to the job.
    own = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SRUN_", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
    kept = ("SLURM_CONF", "SLURM_JWT")
    environment = {name: value for name, value in os.environ.items() if name in kept or not name.startswith(own)}
    hint = ": see that this is a login node, and whether slurmctld is overloaded"
    return queue.call([program, *arguments], seconds=CALL_SECONDS, text=text or "", environment=environment, hint=hint)


def _words(stderr: str) -> str:
    """What Slurm said, in one line."""
    return " ".join(" ".join(line.split()) for line in stderr.strip().splitlines())[-1000:] or "it says nothing"
