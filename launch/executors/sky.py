"""SkyPilot managed jobs: cells on any cloud that it reaches, a job each, by its `sky` program.

SkyPilot finds the machines, and finds others when these are taken away; it starts a cell again that ends with exit code 75. Its
names of managed jobs are not unique: who submits looks before and after, and of several jobs of a cell the first is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from gqa_jax import hardware, storage
from gqa_jax.data import store
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder
from launch.executors import base, bundle
from launch.executors.base import DEAD, QUEUED, RUNNING, Job, Submission, SubmitError
from launch.grid import Cell

OLDEST = (
    0,
    13,
)  # version of SkyPilot: the first with $SKYPILOT_MANAGED_JOB_ID; --output and recover_on_exit_codes came in 0.12
PORT = 8476  # of process 0, where a cell has several machines; they are the cell's alone
CALL_SECONDS = 1800.0  # that `sky` may take; the first launch of all makes a machine for SkyPilot's controller
NO_CONTROLLER = "No in-progress managed jobs"  # `sky jobs queue` fails with this where there never was a job, or none for long

# SkyPilot's states of a managed job. CANCELLING: its processes may still save, so the cell is not free yet.
ACTIVE = {
    "PENDING": QUEUED,
    "SUBMITTED": QUEUED,
    "STARTING": QUEUED,
    "RECOVERING": QUEUED,
    "RUNNING": RUNNING,
    "WINDING_DOWN": RUNNING,
    "CANCELLING": RUNNING,
}
FAILED = ("FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER")
ENDED = ("SUCCEEDED", "CANCELLED")

# Passes on what it reads, and keeps a copy on gs://, written anew each minute and at the end: objects can't be appended to.
COPY = """
import sys, time
from gqa_jax import storage
text, copied = bytearray(), time.monotonic()
def copy():
    try:
        storage.write_bytes(sys.argv[1], bytes(text))
    except OSError as error:
        print(f"the log is not copied: {error}", flush=True)
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(line)
    sys.stdout.flush()
    text += line
    if time.monotonic() > copied + 60:
        copy()
        copied = time.monotonic()
copy()
""".strip()


@dataclasses.dataclass(frozen=True)
class Options(base.Options):
    """Of a cluster file like configs/clusters/sky.toml; `topology` is what each of `num_nodes` has."""

    engine: str = "sky"
    sky: str = "sky"  # SkyPilot's program, on the PATH or by path: it is best in an environment of its own
    accelerators: str | None = None  # SkyPilot's name and count, "A10G:4"; None: those of `topology`; neither: CPUs alone
    infra: str | None = None  # CLOUD[/REGION[/ZONE]], "gcp/us-central1", "k8s"; None: wherever it is cheapest
    use_spot: bool = True  # machines that may be taken away: they cost less, and a cell goes on elsewhere
    num_nodes: int = 1  # machines of a cell; a TPU slice is one, however many hosts it has
    disk_gb: int | None = None  # of each machine, GB; None: SkyPilot's default
    image: str | None = None  # image of the machines, "docker:IMAGE" or a cloud's; None: SkyPilot's
    max_restarts_on_errors: int = 0  # after errors of a cell, which would mostly come again; losing a machine is none
    setup: list = dataclasses.field(default_factory=list)  # lines of bash, run on each machine before the code is installed
    python: str | None = None  # Python of the machines that has all packages (of an image); None: one is made, by uv
    bundle: str | None = None  # code of the cells: a file that launch.executors.bundle.make made; None: of this checkout
    shared_root: bool = False  # the grid's folder is at the same path on every machine; else it must be on gs://

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_nodes", 1), ("disk_gb", 10), ("max_restarts_on_errors", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        for name in ("sky", "infra", "image", "python", "bundle"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} = '': must not be empty; leave it out for the default")
        if self.accelerators is not None and not re.fullmatch(r"[A-Za-z][\w.-]*(:\d+)?", self.accelerators):
            raise ConfigError(f"accelerators = {self.accelerators!r}: must be NAME or NAME:COUNT as `sky gpus list` has it")
        if bad := [line for line in self.setup if not isinstance(line, str)]:
            raise ConfigError(f"setup has {bad[0]!r}: must be lines of bash, as text")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name.startswith(("SKYPILOT_", "GQA_JAX_JOB", "GQA_JAX_COMMIT")):
                raise ConfigError(
                    f"environment.{name}: must be a name of letters, digits and _ that is not set by the launcher"
                )
        if self.is_tpu and self.num_nodes > 1:
            raise ConfigError(
                f"num_nodes = {self.num_nodes} with {self.accelerators or self.topology}: a cell has one TPU slice: take a "
                "larger one, and num_nodes = 1"
            )

    @property
    def is_tpu(self) -> bool:
        """Whether a cell runs on a TPU slice."""
        if self.accelerators is not None:
            return self.accelerators.lower().startswith("tpu")
        return self.topology is not None and hardware.find(self.topology).is_tpu

    @property
    def slice(self) -> hardware.Slice | None:
        """None for several machines: no slice of several is listed, and nothing is proved to fit them."""
        return super().slice if self.num_nodes == 1 else None


class Executor(base.Executor):
    """A managed job per cell."""

    Options = Options

    def check(self) -> None:
        self._check_root()
        made, content = self._bundle
        bundle.check_content(made, content) if content else bundle.check(bundle.find(self.options.bundle))
        if shutil.which(self.options.sky) is None:
            raise ConfigError(
                f"sky = {self.options.sky!r} is not there: install SkyPilot in an environment of its own (python -m venv DIR; "
                "DIR/bin/pip install 'skypilot[gcp]'), and set sky = \"DIR/bin/sky\""
            )
        try:
            text = self._sky("--version")
        except SubmitError as error:
            raise ConfigError(str(error)) from error
        found = re.search(r"(\d+)\.(\d+)[\w.+-]*", text)
        if found is None or (int(found[1]), int(found[2])) < OLDEST:
            version = found[0] if found else repr(text.strip())
            raise ConfigError(
                f"sky = {self.options.sky!r} is SkyPilot {version}: must be {'.'.join(map(str, OLDEST))} or newer: "
                "pip install -U skypilot"
            )

    def prepare(self) -> None:
        """Puts the code beside the cells."""
        made, content = self._bundle
        if content is None:
            bundle.put(bundle.find(self.options.bundle), made.path.parent)
        else:
            bundle.make(made.path.parent, content)

    def submission(self, cell: Cell) -> Submission:
        name = base.job_name(self.layout, cell.name)
        file = self.layout.cell(cell.name) / "sky.yaml"
        command = [self.options.sky, "jobs", "launch", "-n", name, "-y", "-d", os.fspath(file)]
        return Submission(cell.name, base.bash(command), {file.name: self._yaml(name, cell)})

    def submit(self, cell: Cell) -> Job:
        text = self.submission(cell).files["sky.yaml"]
        with self._only_submitter():
            before = self._records().get(cell.name, [])
            if kept := _kept(before):
                return _job(cell.name, kept[0])
            if ending := _active(before):
                raise SubmitError(f"job {ending[0]['job_id']} of {cell.name} is still being cancelled")
            with tempfile.TemporaryDirectory() as folder:  # `sky` reads no gs://
                file = Path(folder) / "sky.yaml"
                file.write_text(text)
                self._sky("jobs", "launch", "-n", base.job_name(self.layout, cell.name), "-y", "-d", os.fspath(file))
            known = {record["job_id"] for record in before}
            new = [record for record in self._records().get(cell.name, []) if record["job_id"] not in known]
            if not new:
                raise SubmitError(f"SkyPilot took {cell.name} and does not list it: see `{self.options.sky} jobs queue`")
            if not (kept := _kept(new)):  # it is over already, as the next look will show
                return Job(cell.name, str(new[-1]["job_id"]), QUEUED, f"ended: {new[-1]['status'].lower()}")
            self._cancel(kept[1:])  # another launcher came between
            return _job(cell.name, kept[0])

    def jobs(self) -> dict[str, Job]:
        """As Executor.jobs. DEAD are failures that the run folder says nothing of, as no training process was there to."""
        records = self._records()
        dead = self._unexplained(records)
        active = {cell: _kept(mine) or _active(mine) for cell, mine in records.items()}
        return {cell: _job(cell, mine[0]) for cell, mine in active.items() if mine} | {
            cell: Job(cell, str(record["job_id"]), DEAD, _why(record)) for cell, record in dead.items()
        }

    def cancel(self, cells: Sequence[str]) -> None:
        records = self._records()
        self._cancel([record for cell in cells for record in _kept(records.get(cell, []))])

    def reconcile(self, jobs: Mapping[str, Job]) -> list[str]:
        records = self._records()
        done = []
        for cell, mine in records.items():
            if more := _kept(mine)[1:]:
                self._cancel(more)
                done.append(f"{cell} had {len(more) + 1} jobs: cancelled all but {_kept(mine)[0]['job_id']}")
        for cell, record in self._unexplained(records).items():
            facts = {"class": "infrastructure", "reason": _why(record), "job": str(record["job_id"])}
            storage.write_json(
                self.layout.cell(cell) / "host-failure.json", facts | {"time": record.get("end_at") or time.time()}
            )
            done.append(f"{cell}: {_why(record)}")
        return done

    def logs(self, cell: str) -> list[epath.Path]:
        folder = self.layout.cell(cell) / "logs"
        return [epath.Path(folder) / name for name in storage.names(folder) if name.endswith(".txt")]

    # What a job is.

    def _yaml(self, name: str, cell: Cell) -> str:
        """The task as SkyPilot reads it (docs.skypilot.co/en/latest/reference/yaml-spec.html)."""
        options = self.options
        self._check_root()
        tokens = cell.config.data.store
        if tokens not in store.BUILT_IN and not storage.is_remote(tokens) and not options.shared_root:
            raise ConfigError(
                f"data.store = {tokens!r} of {cell.name} is on this machine, and SkyPilot's machines don't see it: copy it to "
                "gs://, or use a built-in one"
            )
        resources = self._accelerators() | {
            "infra": options.infra,
            "use_spot": options.use_spot,
            "disk_size": options.disk_gb,
            "image_id": options.image,
            "job_recovery": {
                "max_restarts_on_errors": options.max_restarts_on_errors,
                "recover_on_exit_codes": [run_folder.EXIT_PREEMPTED],
            },
        }
        made, _ = self._bundle
        file = f"{self._code}.tar.gz"
        task = {
            "name": name,
            "resources": {key: value for key, value in resources.items() if value is not None},
            "num_nodes": options.num_nodes,
            "envs": dict(options.environment),
            "file_mounts": {file: os.fspath(made.path)} if storage.is_remote(made.path) else {},
            "setup": self._setup(file if storage.is_remote(made.path) else shlex.quote(os.fspath(made.path))),
            "run": self._run(cell),
        }
        given = {key: value for key, value in task.items() if value != {}}
        return yaml.dump(given, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)

    def _accelerators(self) -> dict[str, Any]:
        options = self.options
        if options.topology is None or options.accelerators is not None:
            return {"accelerators": options.accelerators}
        where = hardware.find(options.topology)
        if where.chip.gpu is not None:
            return {"accelerators": f"{where.chip.gpu.sky}:{where.n_chips}"}
        tpu = where.chip.tpu
        name = f"tpu-{tpu.accelerator}-{tpu.counted * where.n_chips}"
        return {"accelerators": name, "accelerator_args": {"runtime_version": tpu.image}}

    def _setup(self, file: str) -> str:
        """Runs on every host before the first attempt, and again on machines that take its place."""
        lines = ["set -eo pipefail", *self.options.setup]
        lines += [f"mkdir -p {self._code}", f"tar -xzf {file} -C {self._code}"]
        if self.options.python is None:
            has_gpus = not self.options.is_tpu and (self.options.accelerators or self.options.topology)
            extras = ["tpu"] if self.options.is_tpu else ["cuda"] if has_gpus else []
            extras += ["gcs"] if storage.is_remote(self.layout.root) else []
            wanted = f".[{','.join(extras)}]" if extras else "."
            lines += [
                f"cd {self._code}",
                'export PATH="$HOME/.local/bin:$PATH"',
                "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh",
                "[ -x .venv/bin/python ] || uv venv --python 3.12 .venv",
                f"uv pip install --python .venv/bin/python -c constraints.txt -e {shlex.quote(wanted)}",
            ]
        return "\n".join(lines) + "\n"

    def _run(self, cell: Cell) -> str:
        """Runs on every host, and ends with the exit code of training, which bash and the log outlast when all are to end."""
        python = self.options.python or ".venv/bin/python"
        command = base.bash(base.training(cell, self.layout, python=python, code="."))
        if self.options.is_tpu:
            several = self.options.accelerators is not None or hardware.find(self.options.topology).n_hosts > 1
            command += " --distributed=on" if several else ""
        elif self.options.num_nodes > 1:
            first = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n1):{PORT}"'
            command += f' --coordinator={first} --processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK"'
        logs = shlex.quote(os.fspath(self.layout.cell(cell.name) / "logs"))
        keep = f"{shlex.quote(python)} -c {shlex.quote(COPY)}" if storage.is_remote(self.layout.root) else "tee -a"
        lines = [
            "set -o pipefail",
            f"cd {self._code}",
            'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
            'export GQA_JAX_JOB="$SKYPILOT_MANAGED_JOB_ID"',
            'export GQA_JAX_COMMIT="$(cat COMMIT)"',
            f'log={logs}/"$(date -u +%Y%m%dT%H%M%SZ)-job$GQA_JAX_JOB-rank$SKYPILOT_NODE_RANK.txt"',
        ]
        if not storage.is_remote(self.layout.root):
            lines.append(f"mkdir -p {logs}")
        lines += ["trap : TERM", f"{command} 2>&1 | (trap '' TERM; exec {keep} \"$log\")"]
        return "\n".join(lines) + "\n"

    @property
    def _code(self) -> str:
        """Folder of the code on a host."""
        return f"~/gqa_jax/{self._bundle[0].sha256[:16]}"

    @functools.cached_property
    def _bundle(self) -> tuple[bundle.Bundle, bytes | None]:
        """The bundle where hosts find it, and its bytes if they are of this checkout."""
        folder = self.layout.root / "code"
        if self.options.bundle is not None:
            name = bundle.find(self.options.bundle)
            return dataclasses.replace(name, path=storage.path(folder / f"{name.sha256}.tar.gz")), None
        content = bundle.pack()
        return bundle.named(folder, content), content

    def _check_root(self) -> None:
        root = os.fspath(self.layout.root)
        if not storage.is_remote(root) and not (self.options.shared_root and os.path.isabs(root)):
            raise ConfigError(
                f"--root {root}: SkyPilot's machines don't see it: use gs://BUCKET/FOLDER, or, where a file system is mounted "
                "at the same path on all of them, its absolute path and shared_root = true"
            )

    # What SkyPilot has.

    @contextlib.contextmanager
    def _only_submitter(self) -> Iterator[None]:
        """Of the launchers of this user and machine, one submits for a grid at a time."""
        folder = storage.cache("sky")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{base.grid_prefix(self.layout)}lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _records(self) -> dict[str, list[dict[str, Any]]]:
        """This grid's jobs, of all users, by cell and oldest first, also those that have ended."""
        arguments = ["jobs", "queue", "--all", "--all-users", "--verbose", "--output", "json"]
        try:
            text = self._sky(*arguments)
        except SubmitError as error:
            if NO_CONTROLLER in str(error):
                return {}
            raise
        lines = text.splitlines()  # `sky` may say first that it starts its server
        start = next((i for i, line in enumerate(lines) if line in ("[", "[]")), 0)
        prefix = base.grid_prefix(self.layout)
        found: dict[str, list[dict[str, Any]]] = {}
        try:
            for record in json.loads("\n".join(lines[start:])):
                if (name := record["job_name"] or "").startswith(prefix):
                    found.setdefault(name.removeprefix(prefix), []).append(record)
            states = {record["status"] for mine in found.values() for record in mine}
            for mine in found.values():
                mine.sort(key=lambda record: record["job_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise SubmitError(f"`{self.options.sky} jobs queue` gives no list of jobs: {text[-300:].strip()!r}") from error
        if unknown := states - {*ACTIVE, *FAILED, *ENDED}:
            raise SubmitError(f"SkyPilot has jobs in states that are not known here: {', '.join(map(str, unknown))}")
        return found

    def _unexplained(self, records: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """The newest jobs of cells that failed, of which the run folder holds no word, by cell."""
        failed = [(cell, mine[-1]) for cell, mine in records.items() if not _active(mine) and mine[-1]["status"] in FAILED]

        def explained(pair: tuple[str, dict[str, Any]]) -> bool:
            folder, record = self.layout.cell(pair[0]), pair[1]
            names = storage.names(folder)
            if not names or "result.json" in names:  # the cell was removed, or is done
                return True
            ends = [storage.read_json(folder / name) or {} for name in ("exit.json", "host-failure.json") if name in names]
            # A job that was preempted and saved has failed after that: no machine was left for it, say.
            ends = [end for end in ends if end.get("class") != "preempted" or end.get("job") != str(record["job_id"])]
            return any(
                end.get("job") == str(record["job_id"]) or end.get("time", 0) >= (record.get("end_at") or 0) for end in ends
            )

        known = storage.each(explained, failed, remote=storage.is_remote(self.layout.root))
        return {cell: record for (cell, record), yes in zip(failed, known, strict=True) if not yes}

    def _cancel(self, records: Sequence[dict[str, Any]]) -> None:
        if records:
            self._sky("jobs", "cancel", "-y", *(str(record["job_id"]) for record in records))

    def _sky(self, *arguments: str) -> str:
        """What `sky` prints. Raises SubmitError with what it says when it fails."""
        done = base.call([self.options.sky, *arguments], seconds=CALL_SECONDS)
        if done.returncode:
            said = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", done.stderr.strip() or done.stdout.strip())
            raise SubmitError(f"`{self.options.sky} {' '.join(arguments[:2])}` failed ({done.returncode}): {said[-1000:]}")
        return done.stdout


def _active(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have not ended."""
    return [record for record in records if record["status"] in ACTIVE]


def _kept(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have not ended and are not to; the first is the cell's."""
    return [record for record in _active(records) if record["status"] != "CANCELLING"]


def _job(cell: str, record: dict[str, Any]) -> Job:
    state = ACTIVE[record["status"]]
    since = record.get("start_at") if state == RUNNING else None
    detail = record["status"].lower()
    if record.get("recovery_count"):
        detail += f", recovered {record['recovery_count']} times"
    return Job(cell, str(record["job_id"]), state, detail, since, record.get("infra") or "")


def _why(record: dict[str, Any]) -> str:
    """Why a job failed, in one line."""
    reason = " ".join((record.get("failure_reason") or f"see `sky jobs logs {record['job_id']}`").split())
    return f"SkyPilot's job {record['job_id']} is {record['status']}: {reason[:500]}"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, to be read by people."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
