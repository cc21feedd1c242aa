"""A real Slurm of two nodes on this machine, for tests: no systemd, no accounting, nothing outside a temporary folder.

The first node is called as this machine is: JAX looks up the name of a job's first node, so it must be known here.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests import needs

HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-2")  # in the order of Slurm
GPUS = 8  # of each node, as far as Slurm knows
SECONDS = 300.0  # that anything may take, on a machine that does other things too

# KillWait: seconds from SIGTERM to SIGKILL. Partitions: jobs in `high` take the nodes of those in `low`.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=3
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=10 State=UP PriorityTier=1
"""


class Cluster:
    """A running Slurm; `environment` is what its commands need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": os.fspath(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def run(self, *argv: str, check: bool = True, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        """A command of Slurm, or of a test, that talks to this cluster."""
        env = os.environ | self.environment | (environment or {})
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.stderr}{done.stdout}"
        return done

    def records(self) -> dict[int, dict]:
        """All jobs that Slurm remembers, by id."""
        return {record["job_id"]: record for record in json.loads(self.run("squeue", "--json").stdout)["jobs"]}

    def start_requeued(self) -> None:
        """A job that was requeued waits two minutes: not these.

        But two seconds: to the nodes, whose clocks count whole ones, a start in that of the end is one that was revoked.
        """
        for job, record in self.records().items():
            waits = record["job_state"] == "PENDING" and record["state_reason"] == "BeginTime"
            if waits and time.time() - record["submit_time"] >= 2:  # it was submitted again by the requeue
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def clear(self) -> None:
        """Ends all jobs, and waits until all nodes are idle."""
        self.run("scancel", f"--user={getpass.getuser()}", check=False)
        self._wait(self._is_idle, "jobs are left")

    def stop_node(self, node: str) -> None:
        """Its daemon and the processes of its jobs are gone at once; Slurm is told that it is down, as after a time-out."""
        self._kill(f"slurmd.{node}")
        for pid in self.job_processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def start_node(self, node: str) -> None:
        self._start(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
        self._wait(lambda: "down" not in self.run("sinfo", "-h", "-n", node, "-o", "%t").stdout or self._resume(node), node)

    def job_processes(self, node: str | None = None) -> list[int]:
        """Ids of the living processes of jobs, on a node or on all: first Slurm's own, which would report how others end."""
        ours = {
            pid: environ
            for pid, environ in _environments()
            if environ.get("SLURM_CONF") == self.environment["SLURM_CONF"] and pid != os.getpid()
        }
        daemons = {process.pid for process in self._daemons.values()}
        jobs = {pid for pid, environ in ours.items() if environ.get("SLURMD_NODENAME") in (NODES if node is None else (node,))}
        steps = {parent for pid in jobs if (parent := _parent(pid)) in ours} - jobs - daemons
        return [*steps, *jobs]

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        nodes = (  # of one line: several on one host are refused
            f"NodeName={','.join(NODES)} NodeAddr=127.0.0.1 NodeHostname={HOST} "
            f"Port=[{','.join(map(str, ports[1:]))}] CPUs=4 RealMemory=4000 "
            f"Gres=gpu:h100:{GPUS} State=UNKNOWN"
        )
        text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), controller_port=ports[0], nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        for i in range(GPUS):  # Slurm counts them, and no more
            (folder / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={folder}/gpu[0-{GPUS - 1}]\n")
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{ending}" for option, ending in paths.items()]
        self._start("munged", "munged", "--foreground", "--force", *munge)
        self._wait((folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", os.fspath(folder / "slurm.conf"))
        for node in NODES:
            self._start(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", os.fspath(folder / "slurm.conf"))
        self._wait(self._is_idle, "the nodes do not come up")

    def stop(self) -> None:
        """Ends jobs, daemons and what is left of either."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.clear()
        for name in reversed(list(self._daemons)):
            self._kill(name)
        for pid in self.job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_idle(self) -> bool:
        nodes = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).stdout.split()
        jobs = self.run("squeue", "-h", check=False).stdout
        return nodes == ["idle"] * len(NODES) and not jobs

    def _resume(self, node: str) -> bool:
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return False

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.output", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                # it ends with pytest, however that ends
                [needs.program("setpriv"), "--pdeathsig", "TERM", needs.program(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,  # Ctrl-C is for pytest, which stops it
            )

    def _kill(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.[lo]*")) if path.is_file())
                raise AssertionError(f"{what}; ended: {ended}\n{logs}")
            time.sleep(0.05)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster, until the end of the context. Tests that start one are marked `needs("slurm")`."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        cluster = Cluster(Path(name))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Environments of this user's processes, by id."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                yield int(entry.name), dict(line.split("=", 1) for line in lines if "=" in line)


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
