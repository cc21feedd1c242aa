"""Several processes as one run: how they find each other, agree, and end together.

A run on several hosts is the same command on each: one process per host, or per GPU. They meet at JAX's coordination service,
which lives in process 0, the primary: it alone writes the run folder's small files. What can go wrong in one process:

- An error in a phase of the set-up: `agree` waits for all of them, then all raise it.
- An error anywhere else, where the others hang in a collective: `ends_together` tells them, and every process exits.
- A process that is killed, or whose machine is gone, says nothing: JAX's service ends the others, printing the number of the
  one that sends no heartbeats any more, within `--heartbeat_seconds`; at once when it is process 0.
- SIGTERM, which announces that machines are taken away, or Ctrl-C: `Preemption` names the same last step to all.

With one process and no service all of these do nothing, but for `Preemption`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from etils import epath
from jax._src import distributed as jax_distributed  # its client is not public; orbax uses it likewise
from jax.experimental import multihost_utils

from gqa_jax import errors, storage
from gqa_jax.config import TrainConfig, differing_fields
from gqa_jax.errors import ConfigError
from gqa_jax.hardware import faults  # before anything fails: it may be the files that do
from gqa_jax.training import devices, run_folder, signals
from gqa_jax.training.run_folder import ProcessFailed, ProcessLost, WrongDevices

log = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
HEARTBEAT_SECONDS = 100  # JAX's default
START_SECONDS = 300  # for all processes to come; JAX's default
PHASE_SECONDS = 3600  # for all processes to end a phase: one that dies is noticed by its heartbeat
SHARED_FOLDER_SECONDS = 60  # a network file system may not show a new file for so long
POLL_SECONDS = 1.0
LEAVE_SECONDS = 10  # that the primary, and the service with it, waits for the others to have read why the run ends

_FAILED = "gqa_jax/failed"
_LEFT = "gqa_jax/left/"


def initialize(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    start_seconds: int = START_SECONDS,
    record: Callable[[str, str], None] = lambda kind, reason: None,
) -> None:
    """Makes this process one of several, and starts its devices; must come before anything else that does.

    With `coordinator` ("HOST:PORT" of process 0), `processes` and `process` by these. Without them "auto" looks for a Slurm
    step of several tasks (SLURM_STEP_NUM_TASKS), a Cloud TPU slice of several hosts (TPU_WORKER_HOSTNAMES) or several slices
    (MEGASCALE_COORDINATOR_ADDRESS); "on" lets JAX look for any cluster that it knows, so also Cloud TPU hosts whose
    environment says nothing; "off" starts one process by itself.

    Raises:
      ConfigError: arguments that don't go together, none of these clusters with "on", a port in use, hosts that would each
        have trained alone. Processes that don't come within `start_seconds` end this one with exit code 1; `record` is called
        before, with class and sentence as of `run_folder.classify`.
      WrongDevices: JAX has no devices.
    """
    arguments = _arguments(mode, coordinator, processes, process, heartbeat_seconds)
    if arguments is not None:
        if process == 0:
            _check_port(coordinator)
        where = arguments.get("coordinator_address", "the address that the cluster gives")
        log.info("processes: meeting at %s, for at most %d s", where, start_seconds)
        timer = threading.Timer(start_seconds, _nobody_came, (start_seconds, record))
        timer.daemon = True
        timer.start()
        try:
            jax.distributed.initialize(
                **arguments,
                heartbeat_timeout_seconds=heartbeat_seconds,
                initialization_timeout=start_seconds + 60,  # JAX aborts the process then, without an address
            )
        except (ValueError, RuntimeError) as error:  # no cluster was found, most likely
            if faults.of(error) is not None:
                raise
            raise ConfigError(
                f"--distributed={mode}: {errors.first_line(error)} ({where}). Give --coordinator=HOST:PORT, --processes and "
                "--process, or --distributed=off for one process"
            ) from error
        finally:
            timer.cancel()
    devices.start()
    if jax.process_count() > 1 and _client() is None:
        raise ConfigError(
            f"this is one of {jax.process_count()} hosts, and each would train alone: start the same command on all of them "
            "with --distributed=on"
        )
    if jax.process_count() > 1:
        log.info("processes: this is %d of %d", jax.process_index(), jax.process_count())


def _arguments(
    mode: str, coordinator: str | None, processes: int | None, process: int | None, heartbeat_seconds: int
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is given; None: this process is alone. Raises ConfigError. Starts nothing."""
    if mode not in MODES:
        raise ConfigError(f"--distributed={mode}: must be one of {', '.join(MODES)}")
    if heartbeat_seconds < 1:
        raise ConfigError(f"--heartbeat_seconds={heartbeat_seconds}: must be at least 1")
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if any(value is not None for value in given.values()):
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise ConfigError(
                f"{' and '.join(missing)} missing: --coordinator=HOST:PORT, --processes=N and --process=I go together"
            )
        if mode == "off":
            raise ConfigError("--distributed=off is for one process: leave out --coordinator, --processes and --process")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"--coordinator={coordinator}: must be HOST:PORT, the address of process 0 and a free port there")
        if processes < 1:
            raise ConfigError(f"--processes={processes}: must be at least 1")
        if not 0 <= process < processes:
            raise ConfigError(f"--process={process}: must be from 0 to {processes - 1}, below --processes={processes}")
        address = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        return address | {"cluster_detection_method": "deactivate"}
    if mode == "off":
        return None
    environment = os.environ
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)  # of the step; JAX would take the job's
    if tasks > 1:
        return {"num_processes": tasks, "local_device_ids": _slurm_devices(environment)}
    several_hosts = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    several_slices = bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS"))
    return {} if several_hosts or several_slices or mode == "on" else None


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """GPUs of one task of a Slurm step, as `local_device_ids`: [] is all that it sees, None leaves it to JAX.

    JAX takes the GPU with the task's number on the node. That is right for a task per GPU that sees all GPUs of the node, and
    wrong for one task per node, and for tasks that Slurm shows only their own (--gpus-per-task).
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # like "2(x3),1"
    most = max(int(part.split("(")[0]) for part in tasks.split(","))
    seen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [] if most == 1 or 0 < len(seen) < most else None


def _check_port(coordinator: str) -> None:
    """Raises ConfigError where another program listens: gRPC may share a port with it, and then nobody finds process 0."""
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2])), family=family, dualstack_ipv6=ipv6).close()
    except OSError as error:
        raise ConfigError(
            f"--coordinator={coordinator}: process 0 can't listen on this port of {socket.gethostname()} ({error.strerror}): "
            "give a free one"
        ) from error


def _nobody_came(seconds: int, record: Callable[[str, str], None]) -> NoReturn:
    reason = "the cluster did not say where process 0 is"
    if (address := jax_distributed.global_state.coordinator_address) is not None:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            reason = f"process 0 answers at {address}, but not all processes came: see that every one of them runs"
        except OSError as error:
            reason = f"nothing answers at {address} ({error}): see that process 0 runs, the address and the firewall"
    sentence = f"the processes of this run did not find each other within {seconds} s: {reason}"
    _exit(sentence, before=lambda: record("infrastructure", sentence))


def is_primary() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def _client() -> Any:
    """The connection to JAX's coordination service; None in a process by itself."""
    return jax_distributed.global_state.client


_numbers = itertools.count()  # of phases: every process goes through the same ones


@contextlib.contextmanager
def agree(phase: str) -> Iterator[None]:
    """A part of the program that ends alike on all processes: where one raises in it, all raise the same at its end.

    All processes enter the same phases in the same order. ConfigError when all that failed raised one, else ProcessFailed, of
    the class of their errors where they have one; the message names the processes and what each said. No collective of devices
    may be in the body.
    """
    if _client() is None:
        yield
        return
    mine, said = None, None
    try:
        yield
    except Exception as error:
        in_words = isinstance(error, ConfigError | WrongDevices)
        sentence = str(error).strip() if in_words else errors.named(error)
        mine, said = error, [run_folder.classify(error)[0], sentence, run_folder.blamed(error)]
    if failures := gather(phase, said):
        kinds = {kind for kind, _, _ in failures.values()}
        text = _who_and_why(phase, {i: text for i, (_, text, _) in failures.items()})
        if kinds == {"config"}:
            raise ConfigError(text) from mine
        host = next((host for _, _, host in failures.values() if host is not None), None)
        raise ProcessFailed(text, kinds.pop() if len(kinds) == 1 else "error", host) from mine


def gather(phase: str, value: Any) -> dict[int, Any]:
    """What the processes give here, JSON-serialisable, by their numbers; without those who give None."""
    client = _client()
    if client is None:
        return {} if value is None else {0: value}
    key = f"gqa_jax/{next(_numbers)} {phase}"
    if value is not None:
        client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    try:
        client.wait_at_barrier(key, PHASE_SECONDS * 1000)
    except RuntimeError as error:
        raise ProcessLost(f"{phase}: not every process came to this: {errors.first_line(error)}") from error
    given = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(f"{key}/")}
    return dict(sorted(given.items()))


def _who_and_why(phase: str, texts: dict[int, str]) -> str:
    """One sentence for the errors of some processes, by their numbers, ascending."""
    if len(texts) == jax.process_count() and len(set(texts.values())) == 1:
        return texts[0]
    parts = []
    for text in dict.fromkeys(texts.values()):
        those = [str(i) for i in texts if texts[i] == text]
        parts.append(f"process{'es' if len(those) > 1 else ''} {', '.join(those)}: {text}")
    more = f" | and {len(parts) - 3} others" if len(parts) > 3 else ""
    return f"{phase}: {' | '.join(parts[:3])}{more}"


def from_primary(phase: str, function: Callable[[], Any]) -> Any:
    """What `function` returns on the primary, where alone it is called; JSON-serialisable. Its error is everybody's."""
    found = None
    with agree(phase):
        if is_primary():
            found = [function()]
    return gather(f"{phase}, value", found)[0][0]


def same_config(config: TrainConfig, **others: str) -> None:
    """Raises ConfigError, with the fields, on every process unless all have this configuration and these `others`."""
    ours = json.loads(json.dumps(config.to_dict() | others | {"jax": jax.__version__}))
    theirs = from_primary("configuration", lambda: ours)
    with agree("the processes were started with different configurations"):
        if lines := differing_fields(ours, theirs):
            raise ConfigError(f"{'; '.join(lines)} (there: process 0)")


def shared_folder(folder: epath.Path) -> None:
    """Raises ConfigError on every process unless all see in `folder`, which the primary has made, what it writes there."""
    if _client() is None:
        return

    def write() -> str:
        path = folder / f".shared-{time.time_ns()}"
        storage.write_bytes(path, b"")
        return path.name

    path = folder / from_primary("--workdir", write)
    try:
        with agree("--workdir"):
            deadline = time.monotonic() + SHARED_FOLDER_SECONDS
            while storage.read_bytes(path) is None:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{folder} on {socket.gethostname()} is not the folder that process 0 writes to: it must be on a file "
                        "system that all hosts share, or on gs://"
                    )
                time.sleep(POLL_SECONDS)
    finally:
        if is_primary():
            storage.remove(path)


@contextlib.contextmanager
def ends_together(record: Callable[[str, str, str | None], None], heartbeat_seconds: int = HEARTBEAT_SECONDS) -> Iterator[None]:
    """Where one process fails in the body, every process says so and exits with 1, though it hangs in a collective.

    On the primary `record` is called before, from any thread, with class and sentence as of `classify` and the host as of
    `blamed`. Errors that all processes raise at the same place (`run_folder.ALIKE`) pass through.
    """
    client = _client()
    if client is None:
        yield
        return
    over, ending = threading.Event(), threading.Lock()

    def end(process: int, host: str, kind: str, reason: str, at: str | None) -> NoReturn:
        ending.acquire()  # for ever: the first thread that comes here ends the process
        sentence = f"process {process} ({host}): {reason}"
        if is_primary():
            with contextlib.suppress(Exception):
                record(kind, sentence, at)
        _exit(sentence, before=lambda: _leave(client))

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            with contextlib.suppress(RuntimeError):  # not there; or the service is gone, of which JAX's own thread speaks
                end(*json.loads(client.key_value_try_get(_FAILED)))

    watcher = threading.Thread(target=watch, name="ends_together", daemon=True)
    watcher.start()
    try:
        yield
    except run_folder.ALIKE:
        over.set()
        watcher.join()
        raise
    except BaseException as error:
        if _is_of_a_peer(error):  # that peer will say why; or JAX's service ends this process before the sleep is over
            time.sleep(1.5 * heartbeat_seconds)
        kind, reason = classify(error)
        if kind == "error" or _is_of_a_peer(error):
            log.exception("process %d failed", jax.process_index())
        with contextlib.suppress(RuntimeError):  # another was first
            facts = [jax.process_index(), socket.gethostname(), kind, reason, blamed(error)]
            client.key_value_set(_FAILED, json.dumps(facts))
        end(*json.loads(client.blocking_key_value_get(_FAILED, 1000 * LEAVE_SECONDS)))
    over.set()
    watcher.join()


def classify(error: BaseException) -> tuple[str, str]:
    """As `run_folder.classify`; with several processes, a collective whose other side went away is `infrastructure`.

    It is no fault of this program, and worth another attempt. To be recorded at once: JAX's service may end this process, too.
    """
    kind, reason = run_folder.classify(error)
    if kind in ("error", "infrastructure") and _client() is not None and _is_of_a_peer(error):
        return "infrastructure", f"another process is gone: {reason}"
    return kind, reason


def blamed(error: BaseException) -> str | None:
    """As `run_folder.blamed`; of another process where that has said so; None where a collective failed, on whose side ever."""
    if isinstance(error, ProcessFailed):
        return error.host
    return None if _client() is not None and _is_of_a_peer(error) else run_folder.blamed(error)


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because its other side went away; libraries put JAX's error into their own."""
    return any(
        isinstance(each, jax.errors.JaxRuntimeError) and word in str(each)
        for each in errors.chain(error)
        for word in ("Gloo", "NCCL", "onnection closed", "onnection reset", "CoordinationService")
    )


def _leave(client: Any) -> None:
    """The service ends with the primary, and without it the others would be aborted before they have spoken."""
    with contextlib.suppress(RuntimeError):
        client.key_value_set(f"{_LEFT}{jax.process_index()}", "")
        deadline = time.monotonic() + LEAVE_SECONDS if is_primary() else 0
        while time.monotonic() < deadline and len(client.key_value_dir_get(_LEFT)) < jax.process_count():
            time.sleep(0.05)


def _exit(sentence: str, before: Callable[[], None] = lambda: None) -> NoReturn:
    """Ends the process from any thread, without the wait for all others that JAX adds to an ordinary exit."""
    print(f"gqa_jax.train: {sentence}", file=sys.stderr, flush=True)
    before()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(run_folder.EXIT_FAILED)


class Preemption:
    """Whether the run was asked to end (SIGTERM, SIGHUP, Ctrl-C), as a context manager; a second request ends it at once.

    With several processes a request may reach any one of them: JAX's service passes SIGTERM on, for which no handler of
    Python's may be in its way; so the others are turned into it. A process by itself handles them all while the context lasts.
    """

    def __enter__(self) -> Preemption:
        self.by = signals.NAMES[signal.SIGTERM]
        self._asked = False
        noted = (signal.SIGHUP, signal.SIGINT, *((signal.SIGTERM,) if _client() is None else ()))
        self._handlers = signals.noted(noted, self._note)
        self._handlers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handlers.__exit__(*error)

    def _note(self, request: signal.Signals) -> None:
        self.by, self._asked = signals.NAMES[request], True
        if request != signal.SIGTERM:
            signals.say(f"gqa_jax.train: {self.by}: this step is the last, and is saved; once more ends at once")
            if _client() is not None:
                signal.raise_signal(signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to save after `step` and end; the same on all processes. To be asked after every step, on every process."""
        return self._asked if _client() is None else multihost_utils.reached_preemption_sync_point(step)
