"""Stands for SkyPilot's `sky` where its engine is tested: really runs `setup` and `run` of a task, as processes here.

    python tests/sky_fake.py FOLDER ARGUMENTS OF SKY

FOLDER/jobs/ID.json is a managed job as `sky jobs queue` shows it; a controller process per job writes it, and obeys the files
ID.cancel, ID.preempt (SIGTERM to all processes of its machines) and ID.lose (SIGKILL) beside it. A machine is a folder that is
the home of its processes. Files that a test may write into FOLDER: `version`; `queue.txt`, printed by `sky jobs queue` as it
is; `queue.error` and `launch.error`, said on standard error before the exit code 1; `rival`: the next launch finds that
somebody else was a moment earlier; `at-once`: jobs are at once in the state that it holds, for good. What is not SkyPilot's:
there is no queue for machines, and a cluster starts at once.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

LIFETIME_SECONDS = 120.0  # of a controller, if nobody stops it
GRACE_SECONDS = 10.0
ENDED = ("SUCCEEDED", "CANCELLED", "FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER")


def main(argv):
    folder = Path(argv[0])
    if argv[1:] == ["--version"]:
        version = folder / "version"
        print(version.read_text() if version.exists() else "skypilot, version 0.14.1")
        return 0
    if argv[1] == "--controller":
        return Controller(folder, int(argv[2])).run()
    parser = argparse.ArgumentParser(prog="sky")
    jobs = parser.add_subparsers(required=True).add_parser("jobs").add_subparsers(required=True)
    launch_parser = jobs.add_parser("launch")
    launch_parser.add_argument("-n", dest="name", required=True)
    launch_parser.add_argument("-y", action="store_true", required=True)
    launch_parser.add_argument("-d", action="store_true", required=True)
    launch_parser.add_argument("entrypoint")
    launch_parser.set_defaults(act=launch)
    queue_parser = jobs.add_parser("queue")
    for name in ("--all", "--all-users", "--verbose"):
        queue_parser.add_argument(name, action="store_true")
    queue_parser.add_argument("--output", choices=("table", "json"), default="table")
    queue_parser.set_defaults(act=queue)
    cancel_parser = jobs.add_parser("cancel")
    cancel_parser.add_argument("-y", action="store_true", required=True)
    cancel_parser.add_argument("ids", type=int, nargs="+")
    cancel_parser.set_defaults(act=cancel)
    arguments = parser.parse_args(argv[1:])
    with open(folder / "calls.txt", "a") as calls:
        calls.write(" ".join(argv[1:]) + "\n")
    error = folder / f"{argv[2]}.error"
    if error.exists():
        print(error.read_text(), file=sys.stderr)
        return 1
    return arguments.act(folder, arguments)


def launch(folder, arguments):
    task = yaml.safe_load(Path(arguments.entrypoint).read_text())
    jobs = folder / "jobs"
    jobs.mkdir(exist_ok=True)
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "rival").exists():
            (folder / "rival").unlink()
            start(folder, arguments.name, task)
        number = start(folder, arguments.name, task)
    print(f"Job submitted, ID: {number}")
    return 0


def start(folder, name, task):
    number = 1 + max((int(path.stem) for path in (folder / "jobs").glob("*.json")), default=0)
    (folder / f"{number}.yaml").write_text(yaml.safe_dump(task))
    write(folder, number, {"job_id": number, "job_name": name, "status": "PENDING", "recovery_count": 0})
    if (folder / "at-once").exists():
        write(folder, number, {"status": (folder / "at-once").read_text(), "end_at": time.time()})
        return number
    with open(folder / f"{number}.log", "ab") as log:
        controller = subprocess.Popen(
            [sys.executable, __file__, os.fspath(folder), "--controller", str(number)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "jobs" / f"{number}.pid").write_text(str(controller.pid))
    return number


def write(folder, number, values):
    path = folder / "jobs" / f"{number}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known | values))
    os.replace(temporary, path)


def records(folder):
    found = [json.loads(path.read_text()) for path in (folder / "jobs").glob("*.json")]
    for record in found:
        if record["status"] not in ENDED and (folder / "jobs" / f"{record['job_id']}.cancel").exists():
            record["status"] = "CANCELLING"
    return sorted(found, key=lambda record: -record["job_id"])


def queue(folder, arguments):
    if (folder / "queue.txt").exists():
        print((folder / "queue.txt").read_text())
        return 0
    print("\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m")
    if not (folder / "jobs").exists():
        print("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.", file=sys.stderr)
        return 1
    empty = dict.fromkeys(("start_at", "end_at", "failure_reason", "infra", "details", "user_name"))
    found = [empty | record for record in records(folder)]
    print(json.dumps(found if arguments.all else found[:50], indent=2))
    return 0


def cancel(folder, arguments):
    for number in arguments.ids:
        (folder / "jobs" / f"{number}.cancel").touch()
    return 0


class Controller:
    """Carries a job out, to its end."""

    def __init__(self, folder, number):
        self.folder, self.number = folder, number
        self.task = yaml.safe_load((folder / f"{number}.yaml").read_text())
        self.deadline = time.monotonic() + LIFETIME_SECONDS
        self.machines, self.restarts = 0, 0

    def run(self):
        write(self.folder, self.number, {"status": "STARTING"})
        recovery = self.task["resources"]["job_recovery"]
        while True:
            status, codes = self.attempt()
            if status == "FAILED" and set(codes) & set(recovery["recover_on_exit_codes"]):
                status = "RECOVERING"
            elif status.startswith("FAILED") and self.restarts < recovery["max_restarts_on_errors"]:
                self.restarts += 1
                status = "RECOVERING"
            if status != "RECOVERING":
                break
            write(self.folder, self.number, {"status": status, "recovery_count": self.machines})
        reason = f"Job exited with exit code {codes[0]}" if status.startswith("FAILED") else None
        write(self.folder, self.number, {"status": status, "end_at": time.time(), "failure_reason": reason})
        return 0

    def attempt(self):
        """On new machines: the state of the job after it, and exit codes."""
        nodes = range(self.task.get("num_nodes", 1))
        homes = [self.folder / "machines" / f"{self.number}-{self.machines}-{node}" for node in nodes]
        self.machines += 1
        write(self.folder, self.number, {"status": "RUNNING", "start_at": time.time(), "infra": "GCP (us-central1-a)"})
        for home in homes:
            home.mkdir(parents=True)
            for target, source in self.task.get("file_mounts", {}).items():
                mount(source, home / target.removeprefix("~/"))
        for section in ("setup", "run"):
            processes = [self.start(section, node, home) for node, home in enumerate(homes)]
            event, codes = self.watch(processes)
            if event is not None:
                return event, codes
            if any(codes):
                return "FAILED_SETUP" if section == "setup" else "FAILED", codes
        return "SUCCEEDED", codes

    def start(self, section, node, home):
        nodes = self.task.get("num_nodes", 1)
        environment = os.environ | {"HOME": os.fspath(home)} | self.task.get("envs", {})
        environment |= {
            "SKYPILOT_MANAGED_JOB_ID": str(self.number),
            "SKYPILOT_NODE_RANK": str(node),
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes),
            "JAX_PROCESS_ID": str(node),  # for the fake trainer, in the place of --process and --processes
            "JAX_NUM_PROCESSES": str(nodes),
        }
        return subprocess.Popen(
            ["bash", "-c", self.task[section]], env=environment, cwd=home, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def watch(self, processes):
        """Until all have ended: what happened to the machines meanwhile (None: nothing), and exit codes.

        As SkyPilot does, ends the others when one fails, and says 137 of them.
        """
        jobs = self.folder / "jobs"
        try:
            while True:
                codes = [process.poll() for process in processes]
                if None not in codes:
                    return None, codes
                if any(codes):
                    killed = [137 if code is None else code for code in codes]
                    end(processes, GRACE_SECONDS)
                    return None, killed
                for what, grace, status in (
                    ("cancel", GRACE_SECONDS, "CANCELLED"),
                    ("preempt", GRACE_SECONDS, "RECOVERING"),
                    ("lose", 0.0, "RECOVERING"),
                ):
                    file = jobs / f"{self.number}.{what}"
                    if file.exists():
                        end(processes, grace)
                        if what != "cancel":
                            file.unlink()
                        return status, codes
                if time.monotonic() > self.deadline or (self.folder / "stop").exists() or not jobs.exists():
                    sys.exit("stopped")
                time.sleep(0.05)
        finally:
            end(processes, 0.0)


def mount(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.startswith("gs://"):
        from gqa_jax import storage

        target.write_bytes(storage.read_bytes(source))
    else:
        shutil.copy(source, target)


def end(processes, grace):
    """Ends all processes that these have started, too: they are of a session each."""
    if grace:
        signal_all(processes, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
    signal_all(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def signal_all(processes, number):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def stop(folder):
    """Ends everything that was started in FOLDER, and waits for it."""
    (folder / "stop").touch()
    controllers = [int(path.read_text()) for path in (folder / "jobs").glob("*.pid")]
    deadline = time.monotonic() + 120
    while (left := [pid for pid in controllers if lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"controllers did not end: {left}"


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
