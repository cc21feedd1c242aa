"""Slurm: a batch job per cell, on nodes that share a file system with this machine.

Slurm starts a cell again after the failure of a node, a preemption, or an end with exit code 75, in the same job. Its job names
are not unique: of jobs of one name only one runs at a time (singleton), and who submits looks before and after, and keeps the
one with the lowest id.
"""

from __future__ import annotations

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa_jax import hardware, storage
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder
from launch.executors import base
from launch.executors.base import DEAD, QUEUED, RUNNING, Job, Submission, SubmitError
from launch.grid import Cell

CALL_SECONDS = 120.0  # that a command of Slurm may take
RANK_SECONDS = 60  # that the other processes of a cell have to end after one has ended

SCRIPT = """\
#!/bin/bash
{directives}

# Slurm sends SIGTERM before it ends a job: training saves, and this script waits for that.
trap : TERM

# What `python -m launch status` shows where no training process was there to say more.
failed() {{
    printf '{{"class": "infrastructure", "reason": "%s: see log.txt", "time": %s, "job": "%s"}}\\n' \\
        "$1" "$(date +%s)" "$SLURM_JOB_ID" >{folder}/host-failure.json
}}
echo "--- $(date '+%Y-%m-%d %H:%M:%S') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${{SLURM_RESTART_COUNT:-0}}"

{exports}
{setup}
# A process that ends does not end the others at once: they may be saving.
srun {srun} \\
    {command}
code=$?

# A job that Slurm itself ends is not RUNNING any more: it was cancelled, or comes back without this.
if [ "$code" != 0 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    if [ "$code" = {preempted} ]; then # asked to end, and saved
        scontrol requeue "$SLURM_JOB_ID"
    elif ! grep -qsF "\\"job\\": \\"$SLURM_JOB_ID\\"" {folder}/exit.json {folder}/attempts/*.json; then
        failed "srun ended with code $code before training began"
    fi
fi
exit "$code"
"""

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

# Reasons for which a job waits, in words; others are shown as Slurm calls them.
REASONS = {
    "BeginTime": "waits for its begin time, two minutes after a requeue",
    "Dependency": "waits for the end of another job of this cell",
    "Priority": "waits behind jobs of higher priority",
    "Resources": "waits for nodes",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held: scontrol release {id}",
    "ReqNodeNotAvail": "waits for nodes that are down or reserved",
}
# Reasons for which a job never starts: something must be changed first.
NEVER = (
    "AccountNotAllowed", "AssocMaxCpuPerJobLimit", "AssocMaxNodePerJobLimit", "AssocMaxWallDurationPerJobLimit",
    "BadConstraints", "DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS", "PartitionConfig", "PartitionTimeLimit",
    "QOSMaxCpuPerJobLimit", "QOSMaxNodePerJobLimit", "QOSMaxWallDurationPerJobLimit", "QOSNotAllowed", "QOSTimeLimit",
)  # fmt: skip
NOT_LAUNCHED = "launch failed"  # in the words for a job that Slurm holds because it could not start it, on some node
HELD_AFTER = "JobHoldMaxRequeue"  # it failed to start too often

# What sbatch says where a later attempt may do better.
PASSING = (
    "unable to contact", "timed out", "connection refused", "connection reset", "connection failure", "transport endpoint",
    "zero bytes were", "standby", "temporarily unavailable", "temporarily unable", "rate limit", "munge", "credential",
    "submitjob", "maxsubmit", "grpsubmit", "partition not available", "node not available", "unexpected message", "i/o error",
)  # fmt: skip
GONE = ("already completing or completed", "invalid job id")  # of scancel

# Days-hours:minutes:seconds, of which the last may be missing; hours:minutes:seconds; minutes:seconds; minutes.
TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?|((?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<only>\d+)", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class Options(base.Options):
    """Of a cluster file like configs/clusters/slurm.toml; `topology` is what each of `nodes` has, None: CPUs alone."""

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
    code: str = os.fspath(base.REPOSITORY)  # checkout that is trained with, at the same path on all nodes
    setup: list = dataclasses.field(default_factory=list)  # lines of bash before training, on a cell's first node
    extra: list = dataclasses.field(default_factory=list)  # further options of sbatch: "--reservation=NAME"

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("nodes", 1), ("cpus_per_task", 1), ("signal_seconds", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        for name in ("memory", "partition", "account", "qos", "constraint", "python", "code"):
            if (value := getattr(self, name)) is not None and (not value.strip() or not value.isprintable()):
                raise ConfigError(f"{name} = {value!r}: must be a text of one line; leave it out for the default")
        if self.memory is not None and not re.fullmatch(r"\d+[KMGT]?", self.memory):
            raise ConfigError(f'memory = {self.memory!r}: must be a number with K, M, G or T, as "64G"')
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name.startswith(("SLURM_", "GQA_JAX_JOB", "GQA_JAX_COMMIT")):
                raise ConfigError(
                    f"environment.{name}: must be a name of letters, digits and _ that is not set by Slurm or the launcher"
                )
        for name in ("setup", "extra"):
            if bad := [line for line in getattr(self, name) if not isinstance(line, str) or not line.strip()]:
                raise ConfigError(f"{name} has {bad[0]!r}: must be lines of text")
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
    def directives(self) -> dict[str, Any]:
        """What every job of these options asks for: options of sbatch, without those that are None."""
        values = {
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
        return {name: value for name, value in values.items() if value is not None}

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
        given = {name: int(value or 0) for name, value in match.groupdict().items()}
        hours, minutes = 24 * given["d"] + given["dh"] + given["h"], given["dm"] + given["m"] + given["only"]
        seconds = 3600 * hours + 60 * minutes + given["ds"] + given["s"]
        if seconds <= self.signal_seconds + 60:  # Slurm may send the signal a minute earlier
            raise ConfigError(
                f"time = {self.time!r} is {seconds} s: must be more than signal_seconds + 60 = {self.signal_seconds + 60}, in "
                "which a cell saves: raise it"
            )

    def _check_extra(self) -> None:
        ours = {*_job_directives("", "", ""), *self.directives, "gpus", "array", "parsable", "wrap", "test-only", "no-requeue"}
        ours |= {"gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos", "constraint"}
        for line in self.extra:
            name = line.removeprefix("--").partition("=")[0].strip()
            if not line.startswith("--") or not line.isprintable() or not re.fullmatch(r"[a-z][a-z-]*", name):
                raise ConfigError(f'extra has {line!r}: must be options of sbatch, as "--reservation=NAME"')
            if name in ours:
                raise ConfigError(f"extra has {line!r}: --{name} is set by the launcher, or by an option of this file")


@dataclasses.dataclass(frozen=True)
class Record:
    """A job in Slurm's queue."""

    id: int
    cell: str
    states: tuple[str, ...]
    reason: str  # that it waits for, as Slurm calls it
    description: str
    start: float | None  # seconds since the epoch
    nodes: str

    @property
    def state(self) -> str | None:
        """QUEUED, RUNNING, DEAD; None: it has ended. Raises SubmitError for a state that is not known here."""
        state = next((state for state, names in STATES if any(name in names for name in self.states)), "")
        if state == "":
            raise SubmitError(f"job {self.id} of {self.cell} is in a state that is not known here: {', '.join(self.states)}")
        return DEAD if state == QUEUED and (self.never or self.not_launched) else state

    @property
    def ending(self) -> bool:
        return any(name in ENDING for name in self.states)

    @property
    def never(self) -> bool:
        """Whether it can't start before something is changed."""
        return self.reason in NEVER

    @property
    def not_launched(self) -> bool:
        """Whether Slurm holds it because it could not start it."""
        return self.reason == HELD_AFTER or NOT_LAUNCHED in self.description.lower()

    @property
    def detail(self) -> str:
        """Why it waits, or ends, in words."""
        if self.state == RUNNING:
            return "ending" if self.ending else ""
        if self.not_launched:
            return f"held by Slurm, which could not start it ({self.description or self.reason})"
        if self.never:
            return f"Slurm will not start it: {self.reason}"
        flags = [name for name in self.states if name not in ("PENDING", "RUNNING")]
        words = REASONS.get(self.reason, self.reason).format(id=self.id)
        return ", ".join([*(flag.lower() for flag in flags), *([words] if words not in ("", "None") else [])])

    @property
    def job(self) -> Job:
        state = self.state
        return Job(self.cell, str(self.id), state, self.detail, self.start if state == RUNNING else None, self.nodes)


class Executor(base.Executor):
    """A batch job per cell."""

    Options = Options

    def check(self) -> None:
        self._check_root()
        missing = [name for name in ("sbatch", "squeue", "scancel", "srun") if shutil.which(name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not on the PATH: run this on a login node of the Slurm cluster")
        for name, path in (("python", self.options.python), ("code", os.path.join(self.options.code, "configs", "cell.py"))):
            if (os.path.isabs(path) or name == "code") and not os.path.exists(path):
                raise ConfigError(f"{name} = {getattr(self.options, name)!r}: {path} is not there")
        try:
            self._records()
        except SubmitError as error:
            raise ConfigError(f"{error}: Slurm must answer, be 21.08 or newer, and have JSON") from error
        script = "\n".join(["#!/bin/bash", *self._directives("check", os.devnull), "true", ""])
        done = _call("sbatch", "--test-only", text=script)
        if done.returncode and not _may_pass(done.stderr):
            raise ConfigError(f"sbatch refuses these options: {_words(done.stderr)}")

    def submission(self, cell: Cell) -> Submission:
        file = self.layout.cell(cell.name) / "job.sbatch"
        return Submission(cell.name, base.bash(["sbatch", "--parsable", _absolute(file)]), {file.name: self._script(cell)})

    def submit(self, cell: Cell) -> Job:
        if (there := self._there(self._of(cell.name))) is not None:
            return there
        folder = self.layout.cell(cell.name)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(folder / "job.sbatch", self._script(cell).encode())
        done = _call("sbatch", "--parsable", _absolute(folder / "job.sbatch"))
        if done.returncode:
            if _may_pass(done.stderr):
                raise SubmitError(f"sbatch failed: {_words(done.stderr)}")
            raise ConfigError(f"sbatch refuses {cell.name}: {_words(done.stderr)}")
        mine = done.stdout.strip().partition(";")[0]  # ID, or ID;CLUSTER
        alive = _alive(self._of(cell.name))
        _cancel(alive[1:])  # another launcher came between
        return alive[0].job if alive else Job(cell.name, mine, QUEUED)  # over already, and forgotten

    def jobs(self) -> dict[str, Job]:
        return {cell: shown.job for cell, mine in self._records().items() if (shown := _shown(mine)) is not None}

    def cancel(self, cells: Sequence[str]) -> None:
        records = self._records() if cells else {}
        _cancel(record for cell in cells for record in records.get(cell, ()) if record.state is not None)

    def reconcile(self, jobs: Mapping[str, Job]) -> list[str]:
        """As Executor.reconcile. Why a job was never started is left in the cell's folder."""
        notes, removed = [], []
        for cell, mine in self._records().items():
            if more := _alive(mine)[1:]:
                removed += more
                notes.append(f"{cell} had {len(more) + 1} jobs: cancelled all but {_alive(mine)[0].id}")
            for record in mine:
                if record.state == DEAD:
                    removed.append(record)
                    self._explain(record)
                    notes.append(f"{cell}: {_why(record)}; cancelled")
        _cancel(removed)
        return notes

    # What a job is.

    def _script(self, cell: Cell) -> str:
        self._check_root()
        options = self.options
        folder = _absolute(self.layout.cell(cell.name))
        lines = self._directives(cell.name, os.path.join(folder, "log.txt").replace("%", "%%"))  # % begins a pattern of Slurm
        exports = {
            "GQA_JAX_JOB": '"$SLURM_JOB_ID"',
            **({"GQA_JAX_COMMIT": shlex.quote(self._commit)} if self._commit else {}),
            "PYTHONPATH": f'{shlex.quote(options.code)}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            # Without this JAX would go on with CPUs where it does not find the GPUs.
            "JAX_PLATFORMS": "cpu" if options.gpus is None else "cuda,cpu",
        }
        exports |= {name: shlex.quote(value) for name, value in options.environment.items()}
        # Slurm passes the number of CPUs on to no step by itself.
        srun = ["--kill-on-bad-exit=0", f"--wait={RANK_SECONDS}"]
        srun += [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
        return SCRIPT.format(
            directives="\n".join(lines),
            folder=shlex.quote(folder),
            exports="\n".join(f"export {name}={value}" for name, value in exports.items()),
            setup=SETUP.format(lines="\n".join(options.setup)) if options.setup else "",
            srun=" ".join(srun),
            command=base.bash(base.training(cell, self.layout, python=options.python, code=options.code)),
            preempted=run_folder.EXIT_PREEMPTED,
        )

    def _directives(self, cell: str, output: str) -> list[str]:
        """The #SBATCH lines of a cell's job. Its working directory is this one, which relative paths are of."""
        values = _job_directives(base.job_name(self.layout, cell), output, os.getcwd()) | self.options.directives
        lines = [f"--{name}={_quoted(value)}" if value is not True else f"--{name}" for name, value in values.items()]
        return [f"#SBATCH {line}" for line in [*lines, *self.options.extra]]

    @functools.cached_property
    def _commit(self) -> str:
        """Commit of the code, for nodes without git; empty where it is not known here."""
        code = Path(self.options.code)
        if code.resolve() == base.REPOSITORY:
            return run_folder.commit() or ""
        return (storage.read_bytes(code / "COMMIT") or b"").decode().strip()  # an unpacked launch.executors.bundle

    def _check_root(self) -> None:
        if storage.is_remote(self.layout.root):
            raise ConfigError(
                f"--root {os.fspath(self.layout.root)}: scripts and logs of Slurm's jobs need a folder that the login node and "
                "the others share: give one on their file system"
            )

    # What Slurm has.

    def _records(self) -> dict[str, list[Record]]:
        """This user's jobs of this grid by cell, ended ones too, by id."""
        # Some versions ignore all filters of `squeue --json`.
        done = _call("squeue", "--json", f"--user={os.getuid()}")
        if done.returncode:
            raise SubmitError(f"squeue failed: {_words(done.stderr)}")
        return parse(done.stdout, base.grid_prefix(self.layout), os.getuid())

    def _of(self, cell: str) -> list[Record]:
        return self._records().get(cell, [])

    def _there(self, mine: Sequence[Record]) -> Job | None:
        """The job that a cell has. Raises SubmitError where the one that it has must be gone first."""
        if alive := _alive(mine):
            return alive[0].job
        for record in mine:
            if record.ending:
                raise SubmitError(f"job {record.id} of {record.cell} is still ending")
            if record.state == DEAD:
                raise SubmitError(f"job {record.id} of {record.cell} must be cancelled first: {record.detail}")
        return None

    def _explain(self, record: Record) -> None:
        folder = self.layout.cell(record.cell)
        names = storage.names(folder)
        if names and "result.json" not in names:
            kind = "error" if record.never else "infrastructure"  # the latter is tried again
            facts = {"class": kind, "reason": _why(record), "time": time.time(), "job": str(record.id)}
            storage.write_json(folder / "host-failure.json", facts)


def parse(text: str, prefix: str, user: int) -> dict[str, list[Record]]:
    """The jobs of a user (an id) in what `squeue --json` prints, whose names begin with `prefix`, by the rest of these.

    Knows the formats of Slurm 21.08 (v0.0.37) to 25.05 (v0.0.43). Raises SubmitError for anything else.
    """
    found: dict[str, list[Record]] = {}
    try:
        for job in json.loads(text)["jobs"]:
            name, states = job["name"] or "", job["job_state"]
            if not name.startswith(prefix) or _number(job["user_id"]) != user:
                continue
            record = Record(
                id=int(_number(job["job_id"])),
                cell=name.removeprefix(prefix),
                states=tuple(states.split()) if isinstance(states, str) else tuple(states),
                reason=job["state_reason"] or "",
                description=job["state_description"] or "",
                start=_number(job["start_time"]) or None,
                nodes=job["nodes"] or "",
            )
            found.setdefault(record.cell, []).append(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SubmitError(f"`squeue --json` gives no list of jobs ({error!r}): {text[:300].strip()!r}") from error
    for mine in found.values():
        mine.sort(key=lambda record: record.id)
    return found


def _number(value: Any) -> float | None:
    """A number of any version's JSON: newer ones give {"set": true, "infinite": false, "number": 7}."""
    if isinstance(value, dict):
        return value["number"] if value["set"] and not value["infinite"] else None
    return value


def _alive(records: Iterable[Record]) -> list[Record]:
    """Jobs that run, or will; the first is the cell's."""
    return [record for record in records if record.state in (QUEUED, RUNNING) and not record.ending]


def _shown(records: Sequence[Record]) -> Record | None:
    """The job that stands for a cell: one that is alive, else one that ends, else a DEAD one."""
    rest = [record for record in records if record.state is not None]
    return next(iter([*_alive(rest), *(record for record in rest if record.ending), *rest]), None)


def _why(record: Record) -> str:
    return f"job {record.id}: {record.detail}" + ("; change the options or the grid, then `retry`" if record.never else "")


def _cancel(records: Iterable[Record]) -> None:
    """Raises SubmitError when Slurm does not do it; jobs that have ended by themselves are no error."""
    if ids := sorted({record.id for record in records}):
        done = _call("scancel", *map(str, ids))
        others = [line for line in done.stderr.splitlines() if not any(words in line.lower() for words in GONE)]
        if done.returncode and others:
            raise SubmitError(f"scancel failed: {_words(done.stderr)}")


def _job_directives(name: str, output: str, folder: str) -> dict[str, Any]:
    """Options of sbatch that differ between jobs, or that no cluster file can change."""
    return {
        "job-name": name,
        "output": output,
        "open-mode": "append",
        "chdir": folder,
        "requeue": True,
        "dependency": "singleton",
    }


def _quoted(value: Any) -> str:
    """A value as sbatch reads it in a script: quotes and backslashes are as in a shell."""
    text = str(value)
    return text if re.fullmatch(r"[^\s\"'\\#;]*", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _absolute(path: os.PathLike) -> str:
    return os.path.abspath(os.fspath(path))


def _call(program: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess:
    """A command of Slurm. Raises SubmitError when it can't be started, or takes too long."""
    # Of a job around this process, or of a user's habits, these would change what is asked for; and a login node's devices
    # are not those of the nodes. sbatch passes the rest of the environment on to the job.
    own = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SRUN_", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
    kept = ("SLURM_CONF", "SLURM_JWT")
    environment = {name: value for name, value in os.environ.items() if name in kept or not name.startswith(own)}
    hint = ": see that this is a login node, and whether slurmctld is overloaded"
    return base.call([program, *arguments], seconds=CALL_SECONDS, text=text or "", environment=environment, hint=hint)


def _may_pass(stderr: str) -> bool:
    return any(words in stderr.lower() for words in PASSING)


def _words(stderr: str) -> str:
    """What Slurm said, in one line."""
    return " ".join(" ".join(line.split()) for line in stderr.strip().splitlines())[-1000:] or "it says nothing"
