"""Two real processes of four simulated devices each, against one process of eight."""

import dataclasses
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs.train import tiny as configs_train_tiny
from gqa_jax import train
from gqa_jax.config import ConfigError, TrainConfig
from gqa_jax.training import checkpoint, distributed, evaluation, metrics, run_folder, setup, signals

REPOSITORY = Path(__file__).resolve().parent.parent
HEARTBEAT = 5  # seconds
JAX_HEARTBEAT = 100  # of JAX, where it is not told: a machine that does other things ends in less where it was
PATIENCE = 240  # on a machine that does other things too
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

BEGIN = f"""
import json, os, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from gqa_jax.training import distributed, run_folder
from gqa_jax.config import ConfigError
port, me, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
distributed.initialize(coordinator=f"127.0.0.1:{{port}}", processes=2, process=me, heartbeat_seconds={HEARTBEAT})
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placement = jax.sharding.NamedSharding(mesh, jax.P("data"))
add = jax.jit(lambda x: x + x.sum(), out_shardings=placement)  # a step in which every process waits for the others
x = jax.jit(lambda: jnp.zeros(8), out_shardings=placement)()
"""

# Runs what it is told, one folder with a code.py after another, until there is no more.
LISTEN = """
def say(*lines):
    (folder / "unfinished").mkdir(exist_ok=True)
    unread = folder / "unfinished" / f"said-{me}.json"
    unread.write_text(json.dumps(lines))
    unread.rename(folder / unread.name)
for line in sys.stdin:
    folder = Path(line.removesuffix("\\n"))
    exec((folder / "code.py").read_text())
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """Two processes, 0 and 1, of `commands`."""

    def __init__(self, folder, commands):
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for command in commands
        ]

    @classmethod
    def of_code(cls, folder, code):
        """A run of `code` after BEGIN."""
        port = str(free_port())
        return cls(folder, [[sys.executable, "-c", BEGIN + code, port, str(i), str(folder)] for i in range(2)])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stderr.close()
            if process.stdin is not None:
                process.stdin.close()

    def wait_for(self, is_there):
        deadline = time.monotonic() + PATIENCE
        while not is_there(self.folder):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.errors()
            time.sleep(0.01)

    def errors(self):
        return [process.communicate(timeout=PATIENCE)[1] for process in self.processes]

    def said(self, folder, code):
        """What each process says when it runs `code` in `folder`, after BEGIN and LISTEN."""
        (folder / "code.py").write_text(code)
        for process in self.processes:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
        answers = [folder / f"said-{i}.json" for i in range(2)]
        self.wait_for(lambda _: all(answer.exists() for answer in answers))
        return [json.loads(answer.read_text()) for answer in answers]


@pytest.fixture(scope="module")
def listeners(tmp_path_factory):
    """Two processes for all tests that leave them alive; at the end both must end well."""
    with Pair.of_code(tmp_path_factory.mktemp("listeners"), LISTEN) as pair:
        yield pair
        for process in pair.processes:  # both, before one is waited for: they end together
            process.stdin.close()
            process.stdin = None
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [0, 0], errors


def test_processes_agree_or_all_say_who_does_not(listeners, tmp_path):
    code = """
import dataclasses
from gqa_jax.config import TrainConfig
config = TrainConfig(steps=1)
def error_of(function):
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
def phase(errors):
    with distributed.agree("opening the data"):
        if me in errors:
            raise errors[me]
def shared():
    patient, distributed.SHARED_FOLDER_SECONDS = distributed.SHARED_FOLDER_SECONDS, 0.5
    try:
        distributed.shared_folder(folder if me == 0 else folder / "other")
    finally:
        distributed.SHARED_FOLDER_SECONDS = patient
other = dataclasses.replace(config, seed=me, data=dataclasses.replace(config.data, store=f"store-{me}"))
say(
    error_of(lambda: distributed.same_config(config, workdir="runs/a")),
    error_of(lambda: distributed.same_config(other, workdir=f"runs/{me}")),
    error_of(lambda: phase({})),
    error_of(lambda: phase({1: ConfigError("no such folder")})),
    error_of(lambda: phase({0: ConfigError("no such folder"), 1: OSError(28, "No space left on device")})),
    error_of(lambda: phase({0: ConfigError("too short"), 1: ConfigError("too short")})),
    error_of(lambda: distributed.shared_folder(folder)),
    error_of(shared),
    distributed.from_primary("number", lambda: {"process": jax.process_index()}),
    error_of(lambda: distributed.from_primary("number", lambda: 1 / 0)),
    distributed.gather("numbers", me or None),
    distributed.is_primary(),
)
"""
    first, second = listeners.said(tmp_path, code)
    assert first.pop() is True
    assert second.pop() is False
    assert first == second
    assert first == [
        None,
        [
            "ConfigError",
            "the processes were started with different configurations: process 1: data.store: 'store-1' here, 'store-0' there; "
            "seed: 1 here, 0 there; workdir: 'runs/1' here, 'runs/0' there (there: process 0)",
        ],
        None,
        ["ConfigError", "opening the data: process 1: no such folder"],
        [
            "ProcessFailed",
            "opening the data: process 0: no such folder | process 1: OSError: [Errno 28] No space left on device",
        ],
        ["ConfigError", "too short"],
        None,
        [
            "ConfigError",
            f"--workdir: process 1: {tmp_path / 'other'} on {socket.gethostname()} is not the folder that process 0 writes to: "
            "it must be on a file system that all hosts share, or on gs://",
        ],
        {"process": 0},
        ["ProcessFailed", "number: process 0: ZeroDivisionError: division by zero"],
        {"1": 1},
    ]
    assert not list(tmp_path.glob(".shared-*"))


LOOP = """
def record(kind, reason, blamed):
    (folder / "exit.json").write_text(json.dumps([kind, reason]))
with distributed.ends_together(record, heartbeat_seconds=10), distributed.Preemption() as preemption:
    for step in range(1, 10**9):
        x = add(x).block_until_ready()
        if step == 1:
            (folder / f"runs-{me}").touch()
        if step == 20 and (folder / "fail").exists() and me == 1:
            raise OSError(28, "No space left on device")
        if preemption.reached(step):
            (folder / f"preempted-{me}").write_text(str(step))
            break
        time.sleep(0.01)
sys.exit(run_folder.EXIT_PREEMPTED)
"""


def test_an_error_of_one_process_ends_all_and_is_told_by_all(tmp_path):
    (tmp_path / "fail").touch()
    with Pair.of_code(tmp_path, LOOP) as pair:
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [1, 1]
    sentence = f"process 1 ({socket.gethostname()}): the disk is full ([Errno 28] No space left on device)"
    for error in errors:
        assert f"gqa_jax.train: {sentence}" in error
        assert "check failure" not in error.lower()
    assert "Traceback" not in errors[0]
    kind, reason = json.loads((tmp_path / "exit.json").read_text())
    assert kind == "disk_full"
    assert reason.startswith(sentence)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_process_is_killed_the_other_ends_within_the_heartbeat(tmp_path, killed):
    with Pair.of_code(tmp_path, LOOP) as pair:
        for i in range(2):
            pair.wait_for(lambda folder, i=i: (folder / f"runs-{i}").exists())
        pair.processes[killed].kill()
        before = time.monotonic()
        other = pair.processes[1 - killed]
        error = other.communicate(timeout=PATIENCE)[1]
        assert time.monotonic() - before < JAX_HEARTBEAT
    assert other.returncode not in (0, None)
    said = "(stopped sending heartbeats):\n1\n" if killed == 1 else "the leader task was preempted/died/restarted"
    assert said in error


@pytest.mark.parametrize("asked", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_request_to_one_process_names_the_same_step_to_both(tmp_path, asked):
    """Ctrl-C to process 0, which it turns into SIGTERM; SIGTERM to process 1."""
    with Pair.of_code(tmp_path, LOOP) as pair:
        for i in range(2):
            pair.wait_for(lambda folder, i=i: (folder / f"runs-{i}").exists())
        pair.processes[asked].send_signal(signal.SIGTERM if asked else signal.SIGINT)
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [75, 75], errors
    steps = [int((tmp_path / f"preempted-{i}").read_text()) for i in range(2)]
    assert steps[0] == steps[1] >= 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any


def state_of(mesh, scale, values):
    """A state as `program.TrainState`, in which no two elements are alike; `values`: arrays, else their descriptions."""

    def leaf(shape, spec, dtype=jnp.float32):
        placement = NamedSharding(mesh, PartitionSpec(*spec))
        if not values:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
        return jax.jit(
            lambda: (scale * jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype),
            out_shardings=placement,
        )()

    first, second = mesh.axis_names
    params = {
        "embedding": leaf((16, 8), (None, (first, second))),
        "layers": {"up": leaf((3, 8, 16), (None, first, second)), "norm": leaf((3, 8), (), jnp.bfloat16)},
    }
    step = jnp.int32(scale) if values else leaf((), (), jnp.int32)
    return State(step=step, params=params, opt_state=(jax.tree.map(lambda x: x, params),))


def test_checkpoints_go_from_one_process_to_two_and_back_on_other_meshes(listeners, tmp_path, caplog):
    run = tmp_path / "run"
    mesh = jax.make_mesh((8, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with checkpoint.Checkpoints(run, keep=4) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(mesh, step, True), {"seconds_train": step / 2})
    for file in (run / "checkpoints" / "4" / "state").glob("**/d/*"):  # all see it
        file.write_bytes(file.read_bytes()[:-9])
    code = f"""
import dataclasses
from typing import Any
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gqa_jax.training import checkpoint
{inspect.getsource(State)}
{inspect.getsource(state_of)}
run = folder / "run"
real = checkpoint._read_metadata
def read(folder):
    if folder.name == "3" and me == 1:  # one sees it
        raise OSError("stale file handle")
    return real(folder)
checkpoint._read_metadata = read
with checkpoint.Checkpoints(run, keep=4) as checkpoints:
    newest = checkpoints.newest_metadata()["seconds_train"]
    restored = checkpoints.restore_newest(state_of(mesh, 0, False))
    checkpoints.save(5, dataclasses.replace(restored.state, step=restored.state.step + 3), {{}})
_, params, _ = checkpoint.restore_params(run, state_of(mesh, 0, False).params)
other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
hashes = [state_of(mesh, 2, True).params, state_of(other, 2, True).params, restored.state.params, params]
checkpoint.HASHED_BYTES = 300  # so that leaves come in several pieces
say(
    [newest, restored.step, restored.metadata["seconds_train"]],
    [checkpoint.params_sha256(values) for values in hashes],
    restored.metadata["checksums"],
)
"""
    first, second = listeners.said(tmp_path, code)
    assert first == second
    facts, hashes, sums = first
    assert facts == [2.0, 2, 1.0]
    assert {path.name.split("-")[0] for path in (run / "damaged-checkpoints").iterdir()} == {"3", "4"}
    expected = state_of(mesh, 2, True)
    assert {checkpoint.params_sha256(expected.params), *hashes} == {hashes[0]}
    assert {path: int(value) for path, value in checkpoint.checksums(expected).items()} == sums
    with checkpoint.Checkpoints(run, keep=4) as checkpoints:
        restored = checkpoints.restore_newest(state_of(mesh, 0, False))
    assert restored.step == 5
    assert "damaged" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, restored.state, dataclasses.replace(expected, step=5))
    assert restored.state.params["embedding"].sharding.mesh == mesh


RUN = {
    "context_length": 32,
    "batch_tokens": 256,
    "steps": 60,
    "model": {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
    "data": {"block_tokens": 64},
    "evaluation": {"tokens": 1024},
    "checkpoint": {"every_steps": 10},
    "logging": {"every_steps": 1, "progress": False},
}


def run_config(mesh):
    values = configs_train_tiny.get_config()
    with values.unlocked():
        values.update(RUN)
        values.execution.mesh = mesh
    return TrainConfig.from_dict(values.to_dict())


def run_commands(folder, mesh, more=((), ())):
    """The command lines of a run in two processes."""
    fields = {**{k: v for k, v in RUN.items() if not isinstance(v, dict)}, "execution.mesh": mesh}
    fields |= {f"{group}.{k}": v for group, values in RUN.items() if isinstance(values, dict) for k, v in values.items()}
    common = [
        *(sys.executable, "-m", "gqa_jax.train", "--config=configs/train/tiny.py", f"--workdir={folder / 'run'}"),
        *(f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--heartbeat_seconds=10"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    return [[*common, f"--process={i}", *more[i]] for i in range(2)]


def losses(folder):
    return {row["step"]: row["loss"] for row in metrics.read_metrics(folder) if row["kind"] == "train"}


def checkpoint_steps(folder):
    return {int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()}


@pytest.mark.slow
def test_a_run_goes_on_after_sigterm_and_sigkill_with_other_processes_and_meshes(tmp_path):
    """Two processes of four devices are preempted, their successors killed; one process of eight ends the run."""
    run = tmp_path / "run"
    with Pair(tmp_path, run_commands(tmp_path, "data=2,fsdp=2,context=2")) as pair:
        pair.wait_for(lambda _: len(losses(run)) >= 3)
        pair.processes[1].terminate()
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [75, 75], errors
    preempted = max(checkpoint_steps(run))  # a step of the periodic ones too, by chance
    assert all(f"asked to end (SIGTERM): saved after step {preempted};" in error for error in errors)
    assert 3 <= preempted < 60
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["class"], ended["code"], ended["attempt"]) == ("preempted", 75, 0)

    with Pair(tmp_path, run_commands(tmp_path, "fsdp=4,context=2")) as pair:
        pair.wait_for(lambda _: max(checkpoint_steps(run)) > preempted)
        assert [process.poll() for process in pair.processes] == [None, None]  # nothing is wrong before
        pair.processes[1].kill()
        before = time.monotonic()
        error = pair.processes[0].communicate(timeout=PATIENCE)[1]
        assert time.monotonic() - before < JAX_HEARTBEAT
        assert pair.processes[0].returncode not in (0, None)
    # Named by JAX's service; or Gloo's thread, where some devices were in their next collective, has ended process 0 before.
    assert "(stopped sending heartbeats):\n1\n" in error or "Received data size doesn't match expected size" in error, error
    assert not (run / "result.json").exists()
    if (run / "exit.json").exists():  # not where process 0 was ended before its collective failed
        ended = json.loads((run / "exit.json").read_text())
        assert (ended["class"], ended["attempt"]) == ("infrastructure", 1)
        assert ended["reason"].startswith("another process is gone: JaxRuntimeError: ")

    result = train.train_and_evaluate(run_config("fsdp=2,tensor=2,context=2"), run)
    assert (result["status"], result["attempts"], result["n_processes"]) == ("done", 3, 1)
    whole = train.train_and_evaluate(run_config(None), tmp_path / "whole")
    assert whole["n_devices"] == 1
    assert list(losses(run)) == list(range(1, 61))
    np.testing.assert_allclose(list(losses(run).values()), list(losses(tmp_path / "whole").values()), rtol=1e-5)
    np.testing.assert_allclose(result["loss"], whole["loss"], rtol=1e-5)
    of, of_whole = (evaluation.from_bytes((folder / "documents.npz").read_bytes()) for folder in (run, tmp_path / "whole"))
    np.testing.assert_array_equal(of.document, of_whole.document)
    np.testing.assert_allclose(of.loss, of_whole.loss, rtol=1e-5)
    attempts = [[json.loads(line)["step"] for line in path.read_text().splitlines()] for path in sorted(run.glob("metrics/*"))]
    assert [steps[0] for steps in attempts[:2]] == [1, preempted + 1]
    assert attempts[2][0] in {step + 1 for step in range(preempted, 60)}
    assert len(attempts) == 3  # the primary alone writes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (((), ("--config.seed=1",)), "different configurations: process 1: seed: 1 here, 0 there (there: process 0)"),
        ((("--config.data.store=none",), ("--config.data.store=none",)), "token store 'none': no such folder"),
        (
            (("--config.execution.mesh=data=2",), ("--config.execution.mesh=data=2",)),
            "mesh 'data=2' is of 2 devices and there are 8",
        ),
    ],
)
def test_what_can_not_be_trained_ends_both_processes_with_the_reason(tmp_path, more, message):
    with Pair(tmp_path, run_commands(tmp_path, "data=8", more)) as pair:
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [2, 2], errors
    for error in errors:
        assert message in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, r"--processes and --process missing"),
        ({"processes": 2, "process": 0}, r"--coordinator missing: .* go together"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"--process=2: must be from 0 to 1, below --processes=2"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, r"--processes=0: must be at least 1"),
        ({"coordinator": "a", "processes": 2, "process": 0}, r"--coordinator=a: must be HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, r"--coordinator=a:99999: must be HOST:PORT"),
        ({"mode": "off", "coordinator": "a:1", "processes": 2, "process": 0}, r"--distributed=off is for one process"),
        ({"mode": "yes"}, r"--distributed=yes: must be one of auto, on, off"),
        ({"heartbeat_seconds": 0}, r"--heartbeat_seconds=0: must be at least 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_anything_starts(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(**arguments)


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, None),
        ("off", {"SLURM_STEP_NUM_TASKS": "4"}, None),
        ("on", {}, {}),
        ("auto", {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ("auto", {"SLURM_STEP_NUM_TASKS": "4"}, {"num_processes": 4, "local_device_ids": []}),
        (
            "auto",
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1"},
            {"num_processes": 4, "local_device_ids": None},  # JAX: the GPU of the task's number
        ),
        (
            "auto",
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0"},
            {"num_processes": 4, "local_device_ids": []},  # Slurm shows a task its own
        ),
        ("auto", {"TPU_WORKER_HOSTNAMES": "10.0.0.1"}, None),
        ("auto", {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, {}),
        ("auto", {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"}, {}),
    ],
)
def test_clusters_are_found_by_their_environment(monkeypatch, mode, environment, expected):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._arguments(mode, None, None, None, 100) == expected


def start_alone(process, port):
    code = (
        "import sys; from gqa_jax.training import distributed\n"
        f"distributed.initialize(coordinator='127.0.0.1:{port}', processes=2, process={process}, start_seconds=2)"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ENVIRONMENT,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done, time.monotonic() - begin


def test_processes_that_do_not_find_each_other_say_so_in_time():
    port = free_port()
    for process, message in (
        (0, f"process 0 answers at 127.0.0.1:{port}, but not all processes came"),
        (1, f"nothing answers at 127.0.0.1:{port} ("),
    ):
        done, seconds = start_alone(process, port)
        assert (done.returncode, seconds < distributed.START_SECONDS) == (1, True)
        assert f"did not find each other within 2 s: {message}" in done.stderr
        assert "check failure" not in done.stderr.lower()


def test_a_port_in_use_is_an_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"--coordinator=localhost:{port}: process 0 can't listen on this port of .* in use"
        ):
            distributed.initialize(coordinator=f"localhost:{port}", processes=2, process=0)


REQUESTS = [
    (signal.SIGTERM, signal.SIGTERM, "SIGTERM"),  # as Slurm does: it is one request
    (signal.SIGHUP, signal.SIGTERM, "SIGHUP"),  # as a session that is closed
    (signal.SIGINT, signal.SIGINT, "Ctrl-C"),  # to a group of processes, one of which passes it on
]


@pytest.mark.parametrize(("first", "again", "by"), REQUESTS)
def test_one_process_notes_a_request_and_gives_the_handlers_back(first, again, by, capfd):
    before = [signal.getsignal(number) for number in signals.NAMES]
    with distributed.Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(first)
        signal.raise_signal(again)
        assert preemption.reached(2)
        assert preemption.by == by
    assert [signal.getsignal(number) for number in signals.NAMES] == before
    assert capfd.readouterr().err.count("this step is the last, and is saved") == (first != signal.SIGTERM)


def test_of_several_processes_any_request_is_a_sigterm(monkeypatch):
    """Which JAX's service passes on to all."""
    told = []
    monkeypatch.setattr(distributed, "_client", lambda: "a service")
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", lambda step: bool(told))
    before = signal.signal(signal.SIGTERM, lambda *_: told.append("SIGTERM"))
    try:
        with distributed.Preemption() as preemption:
            assert not preemption.reached(1)
            signal.raise_signal(signal.SIGINT)
            assert preemption.reached(2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (told, preemption.by) == (["SIGTERM"], "Ctrl-C")


def test_what_is_ignored_stays_ignored():
    """By nohup, or by a script that has put a run into the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_has_hung_up_is_not_printed_to(tmp_path):
    """It would answer with an error, which would end the run unsaved."""
    with open(tmp_path / "terminal", "wb", buffering=0) as terminal:
        signals._silence([terminal.fileno()])
        assert terminal.write(b"lost") == 4
    assert (tmp_path / "terminal").read_bytes() == b""


def test_a_process_that_is_gone_is_no_error_of_this_program(monkeypatch):
    """What the others say when one was killed between collectives: the run is worth another attempt."""

    class Client:
        def wait_at_barrier(self, key, milliseconds):
            raise RuntimeError("INTERNAL: Barrier failed because: task is set to ERROR: Task 1 heartbeat timeout.\nmore")

    monkeypatch.setattr(distributed, "_client", Client)
    with pytest.raises(run_folder.ProcessLost) as caught:
        distributed.gather("checkpoints", None)
    assert run_folder.classify(caught.value) == (
        "infrastructure",
        "checkpoints: not every process came to this: INTERNAL: Barrier failed because: task is set to ERROR: Task 1 heartbeat "
        "timeout.",
    )
    assert run_folder.classify(run_folder.ProcessFailed("process 1: boom"))[0] == "error"


GONE = "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:44205"


def test_a_collective_whose_other_side_went_away_is_recorded_as_such_at_once(tmp_path, monkeypatch):
    """Before any wait for that side's own words, in which JAX's service may end this process."""

    def fail(*_):
        monkeypatch.setattr(distributed, "_client", lambda: "a service")
        try:
            raise jax.errors.JaxRuntimeError(GONE)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("not saved") from error  # as checkpoint libraries do

    monkeypatch.setattr(setup, "open_data", fail)
    with pytest.raises(ValueError, match="not saved"):
        train.train_and_evaluate(run_config("fsdp=8"), tmp_path)
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert (ended["class"], ended["code"]) == ("infrastructure", run_folder.EXIT_FAILED)
    assert ended["reason"] == "another process is gone: ValueError: not saved"


def test_in_a_process_by_itself_nobody_went_away():
    assert distributed.classify(jax.errors.JaxRuntimeError(GONE)) == ("error", f"JaxRuntimeError: {GONE}")


@pytest.mark.parametrize("request_", ["SIGTERM", "SIGINT"])
def test_a_later_request_ends_a_process_at_once(request_):
    source = f"""
import os, signal
from gqa_jax.training import signals
signals.REPEATED_SECONDS = dict.fromkeys(signals.NAMES, 0.0)
with signals.noted(tuple(signals.NAMES), lambda request: print("told", flush=True)):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.{request_})
    print("alive")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.Signals[request_], "told\n")


def test_one_process_is_alone_with_its_errors(tmp_path):
    assert distributed.from_primary("number", lambda: 1) == 1
    assert distributed.gather("numbers", 2) == {0: 2}
    distributed.shared_folder(tmp_path / "none")
    assert distributed.is_primary()
    with pytest.raises(ConfigError, match="x"), distributed.ends_together(None), distributed.agree("phase"):
        raise ConfigError("x")
