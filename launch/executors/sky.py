"""SkyPilot managed jobs: cells on any cloud that it reaches, a job each, by its `sky` program.

SkyPilot finds the machines, and finds others when these are taken away; it starts a cell again that ends with exit code 75. Its
names of managed jobs are not unique (`queue`): of the launchers of a machine one submits at a time (`launch.run`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gqa_jax import hardware, storage
from gqa_jax.errors import ConfigError
from gqa_jax.hardware.allocation import VARIABLE, Allocation
from gqa_jax.training import records, run_folder
from launch.cells import Cell
from launch.executors import base, bundle, job_names, queue
from launch.executors.base import QUEUED, RUNNING, Rents, Submission, SubmitError
from launch.executors.queue import Record

# Of SkyPilot: the first with $SKYPILOT_MANAGED_JOB_ID; --output and recover_on_exit_codes came in 0.12.
OLDEST = (0, 13)
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
class Options(bundle.Options):
    """Of a cluster file like configs/clusters/sky.toml; `topology` is what each of `num_nodes` has."""

    least: ClassVar = {"num_nodes": 1, "disk_gb": 10, "max_restarts_on_errors": 0}
    forms: ClassVar = bundle.Options.forms | {
        **dict.fromkeys(("sky", "infra", "image"), base.LINE),
        "accelerators": (r"[A-Za-z][\w.-]*(:\d+)?", "NAME or NAME:COUNT as `sky gpus list` has it"),
    }
    reserved = ("SKYPILOT_", "GQA_JAX_JOB", "GQA_JAX_COMMIT")
    claims = ("sky",)

    engine: str = "sky"
    sky: str = "sky"  # SkyPilot's program, on the PATH or by path: it is best in an environment of its own
    accelerators: str | None = None  # SkyPilot's name and count, "A10G:4"; None: those of `topology`; neither: CPUs alone
    infra: str | None = None  # CLOUD[/REGION[/ZONE]], "gcp/us-central1", "k8s"; None: wherever it is cheapest
    use_spot: bool = True  # machines that may be taken away: they cost less, and a cell goes on elsewhere
    num_nodes: int = 1  # machines of a cell; a TPU slice is one, however many hosts it has
    disk_gb: int | None = None  # of each machine, GB; None: SkyPilot's default
    image: str | None = None  # image of the machines, "docker:IMAGE" or a cloud's; None: SkyPilot's
    max_restarts_on_errors: int = 0  # after errors of a cell, which would mostly come again; losing a machine is none

    def __post_init__(self):
        super().__post_init__()
        if self.is_tpu and self.num_nodes > 1:
            raise ConfigError(
                f"num_nodes = {self.num_nodes} with {self.accelerators or self.topology}: a cell has one TPU slice: take a "
                "larger one, and num_nodes = 1"
            )

    @property
    def allocation(self) -> Allocation:
        """Of which chip where `topology` or SkyPilot's name of it says so, and how many of a TPU where `topology` does."""
        if self.topology is not None and (self.is_tpu or self.accelerators is None):
            return Allocation.of_slices(hardware.find(self.topology), self.num_nodes)
        if self.accelerators is None:
            return Allocation("cpu")
        if self.is_tpu:
            return Allocation("tpu")
        name, _, count = self.accelerators.partition(":")
        chip = hardware.chip_of(name) if self.topology is None else hardware.find(self.topology).chip
        return Allocation("gpu", chip and chip.name, self.num_nodes * int(count or 1), int(count or 1))

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


class Executor(queue.Executor, bundle.Executor):
    """A managed job per cell."""

    Options = Options
    machines = "SkyPilot's machines"

    @property
    def rents(self) -> Rents | None:
        options = self.options
        if options.topology is None:
            return None
        machine, region = hardware.find(options.topology), (options.infra or "").split("/")[1:2]
        chips = options.num_nodes * machine.n_chips
        return Rents(machine.chip.name, chips, options.use_spot, region[0] if region else None)

    def check(self) -> None:
        self.check_root()
        self.check_bundle()
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

    def submission(self, cell: Cell) -> Submission:
        file = self.layout.cell(cell.name) / "sky.yaml"
        command = shlex.join([self.options.sky, *self._launch(cell, file)])
        return Submission(cell.name, command, {file.name: self._yaml(job_names.of(self.layout, cell.name), cell)})

    def launch(self, cell: Cell) -> None:
        with tempfile.TemporaryDirectory() as folder:  # `sky` reads no gs://
            file = Path(folder) / "sky.yaml"
            file.write_text(self.submission(cell).files["sky.yaml"])
            self._sky(*self._launch(cell, file))

    def _launch(self, cell: Cell, file: os.PathLike) -> list[str]:
        return ["jobs", "launch", "-n", job_names.of(self.layout, cell.name), "-y", "-d", os.fspath(file)]

    def end(self, records: Sequence[Record]) -> None:
        if records:
            self._sky("jobs", "cancel", "-y", *(str(record.id) for record in records))

    def dead(self, records: Mapping[str, Sequence[Record]]) -> list[Record]:
        """The newest jobs of cells that failed, where the run folder has no word of it: no training process was there."""
        newest = [mine[-1] for mine in records.values() if all(record.state is None for record in mine)]
        failed = [record for record in newest if record.failure is not None]
        known = storage.each(self._is_explained, failed, remote=storage.is_remote(self.layout.root))
        return [record for record, yes in zip(failed, known, strict=True) if not yes]

    def _is_explained(self, job: Record) -> bool:
        folder = self.layout.cell(job.cell)
        names = storage.names(folder)
        if not names or "result.json" in names:  # the cell was removed, or is done
            return True
        ends = [records.read(folder / name) for name in ("exit.json", "host-failure.json") if name in names]
        # A job that was preempted and saved has failed after that: no machine was left for it, say.
        ends = [end for end in ends if end.get("class") != "preempted" or end.get("job") != str(job.id)]
        return any(end.get("job") == str(job.id) or end.get("time", 0) >= (job.ended or 0) for end in ends)

    def records(self) -> dict[str, list[Record]]:
        """This grid's jobs, of all users, also those that have ended."""
        arguments = ["jobs", "queue", "--all", "--all-users", "--verbose", "--output", "json"]
        try:
            text = self._sky(*arguments)
        except SubmitError as error:
            if NO_CONTROLLER in str(error):
                return {}
            raise
        lines = text.splitlines()  # `sky` may say first that it starts its server
        start = next((i for i, line in enumerate(lines) if line in ("[", "[]")), 0)
        prefix = job_names.prefix(self.layout)
        found: dict[str, list[Record]] = {}
        try:
            for job in json.loads("\n".join(lines[start:])):
                if (name := job["job_name"] or "").startswith(prefix):
                    found.setdefault(name.removeprefix(prefix), []).append(_record(name.removeprefix(prefix), job))
        except (ValueError, TypeError, KeyError) as error:
            raise SubmitError(f"`{self.options.sky} jobs queue` gives no list of jobs: {text[-300:].strip()!r}") from error
        return {cell: sorted(mine, key=lambda job: job.id) for cell, mine in found.items()}

    # What a job is.

    def _yaml(self, name: str, cell: Cell) -> str:
        """The task as SkyPilot reads it (docs.skypilot.co/en/latest/reference/yaml-spec.html)."""
        options = self.options
        self.check_root()
        self.check_inputs(cell)
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
        made, file = self.bundle, f"{self._code}.tar.gz"
        task = {
            "name": name,
            "resources": {key: value for key, value in resources.items() if value is not None},
            "num_nodes": options.num_nodes,
            "envs": {VARIABLE: str(options.allocation)} | options.environment,
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
            wanted, install = f".[{','.join(extras)}]" if extras else ".", shlex.join(bundle.INSTALL_UV)
            lines += [
                f"cd {self._code}",
                'export PATH="$HOME/.local/bin:$PATH:$HOME/gqa_jax/uv/bin"',  # SkyPilot's own uv is in the first of them
                f'command -v uv > /dev/null || {install} --target="$HOME/gqa_jax/uv" <<< {shlex.quote(bundle.UV)}',
                "[ -x .venv/bin/python ] || uv venv --python 3.12 .venv",
                f"uv pip install --python .venv/bin/python -c constraints.txt -e {shlex.quote(wanted)}",
            ]
        return "\n".join(lines) + "\n"

    def _run(self, cell: Cell) -> str:
        """Runs on every host, and ends with the exit code of training, which bash and the log outlast when all are to end."""
        python = self.options.python or ".venv/bin/python"
        command = shlex.join(cell.command(self.layout.cell(cell.name), python, "."))
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
        return f"~/gqa_jax/{self.bundle.sha256[:16]}"

    def _sky(self, *arguments: str) -> str:
        """What `sky` prints. Raises SubmitError with what it says when it fails."""
        done = queue.call([self.options.sky, *arguments], seconds=CALL_SECONDS)
        if done.returncode:
            said = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", done.stderr.strip() or done.stdout.strip())
            raise SubmitError(f"`{self.options.sky} {' '.join(arguments[:2])}` failed ({done.returncode}): {said[-1000:]}")
        return done.stdout


def _record(cell: str, job: dict[str, Any]) -> Record:
    """A job as `sky jobs queue` has it. Raises SubmitError for a state that is not known here."""
    number, status = int(job["job_id"]), job["status"]
    if status not in (*ACTIVE, *FAILED, *ENDED):
        raise SubmitError(f"SkyPilot has jobs in states that are not known here: {status}")
    state, detail, failure = ACTIVE.get(status), status.lower(), None
    if status in FAILED:
        reason = " ".join((job.get("failure_reason") or f"see `sky jobs logs {number}`").split())
        detail = failure = f"SkyPilot's job {number} is {status}: {reason[:500]}"
    elif job.get("recovery_count"):
        detail += f", recovered {job['recovery_count']} times"
    since = job.get("start_at") if state == RUNNING else None
    return Record(
        cell, number, state, detail, since, job.get("infra") or "", status == "CANCELLING", failure, ended=job.get("end_at")
    )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, to be read by people."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
