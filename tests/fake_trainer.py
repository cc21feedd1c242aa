"""Stands for `python -m gqa_jax.train` where engines are tested: no jax, starts at once, leaves the same records.

    python -m tests.fake_trainer FOLDER

What it does is in FOLDER/behaviour.json, a list with an entry per attempt (the last for all further ones):
  "finish"  result.json, exit code 0        "hang"   a heartbeat every 0.1 s until SIGTERM, then exit code 75
  "fail"    an error, exit code 1           "oom"    out of memory, exit code 1
  "die"     SIGKILL to itself               "silent" exit code 1 without a word
Of several ranks (SLURM_PROCID, JAX_PROCESS_ID) rank 0 alone writes. It begins when the others have joined it, as with
jax.distributed; they end as it does, or when told.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time

from gqa_jax.storage import path
from gqa_jax.training import run_folder
from gqa_jax.training.metrics import write_json


def main(folder):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("JAX_PROCESS_ID", "0")))
    print(f"rank {rank} of {folder.name}", flush=True)
    if rank:
        return follow(folder, stop)
    local = "://" not in os.fspath(folder)
    with run_folder.claim(folder) if local else contextlib.nullcontext():
        others = gather(folder, stop)
        attempts = folder / "attempts"
        attempts.mkdir(parents=True, exist_ok=True)
        number = len(list(attempts.glob("*.json")))
        steps = folder / "checkpoints"
        saved = max((int(step.name) for step in steps.iterdir()), default=0) if steps.exists() else 0
        record = {"attempt": number, "time": time.time(), "first_step": saved, "host": "h", "n_devices": 2, "device": "cpu"}
        write_json(attempts / f"{number:03d}.json", record | {"job": os.environ.get("GQA_JAX_JOB"), "pid": os.getpid()})
        with contextlib.suppress(FileNotFoundError):
            (folder / "exit.json").unlink()
        behaviour = json.loads((folder / "behaviour.json").read_text())
        what = behaviour[min(number, len(behaviour) - 1)]
        code = act(folder, what, stop, number, saved)
        for other in others:
            with other, contextlib.suppress(OSError):  # it may be over
                other.send(str(code).encode())
        return code


def act(folder, what, stop, number, saved):
    while what == "hang" and not stop:
        beat(folder, number, saved + 1)
        time.sleep(0.1)
    if what == "hang" or stop:
        (folder / "checkpoints" / str(saved + 1)).mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / str(saved + 1) / "saved").write_text("")
        run_folder.record_exit(folder, 75, "preempted", "asked to end (SIGTERM): saved", number)
        return 75
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "silent":
        return 1
    if what in ("fail", "oom"):
        kind, reason = {"fail": ("error", "ValueError: boom"), "oom": ("out_of_memory", "out of memory (8 GiB)")}[what]
        run_folder.record_exit(folder, 1, kind, reason, number)
        print(reason, file=sys.stderr, flush=True)
        return 1
    beat(folder, number, 4)
    write_json(folder / "result.json", {"status": "done", "loss": 1.0, "step": 4, "identity": "x", "attempts": number + 1})
    return 0


def beat(folder, number, step):
    values = {"time": time.time(), "phase": "train", "step": step, "steps": 4, "tokens_per_second": 100.0, "eta_seconds": 1.0}
    write_json(folder / "heartbeat.json", values | {"attempt": number, "device": "cpu", "n_devices": 2, "device_seconds": 1.0})


def address(folder):
    """Where ranks meet: an abstract socket, so that no start finds anything of an earlier one."""
    return f"\0fake-trainer-{hashlib.sha256(os.fspath(folder).encode()).hexdigest()}"


def gather(folder, stop):
    """Connections of rank 0 to all others; to fewer, if it is told to end before."""
    wanted = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("JAX_NUM_PROCESSES", "1"))) - 1
    others = []
    if wanted:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address(folder))
            listener.listen(wanted)
            listener.settimeout(0.1)
            while len(others) < wanted and not stop:
                with contextlib.suppress(TimeoutError):
                    others.append(listener.accept()[0])
    return others


def follow(folder, stop):
    """Exit code of another rank: that of the rank 0 which it has joined. One that is killed says none, and may be replaced."""
    while not stop:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.settimeout(0.1)
            first.connect(address(folder))
            said = None
            while said is None and not stop:
                with contextlib.suppress(TimeoutError):
                    said = first.recv(16)
            if said:
                return int(said)
        time.sleep(0.1)
    return 75


if __name__ == "__main__":
    sys.exit(main(path(sys.argv[1])))
