import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gqa_jax
from gqa_jax import hardware
from gqa_jax.config import ConfigError
from gqa_jax.training.metrics import write_json
from launch import __main__ as launch
from launch import commands, grid, run, state
from launch import watch as watching
from launch.cells import Layout
from launch.executors import local
from launch.executors.base import Rents, SubmitError
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes
from tests.executor_contract import Contract, Engine, behave
from tests.test_grid import two_phases


class LocalEngine(Engine):
    def preempt(self, cell):
        for pid in self.processes(cell):
            os.kill(pid, signal.SIGTERM)

    def lose(self, cell):
        for pid in self.processes(cell):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fake_training(monkeypatch):
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)


@pytest.fixture
def engine(tmp_path, fake_training):
    layout = Layout(tmp_path)
    with local.Executor(local.Options(), layout) as one:
        yield LocalEngine(one, executor_contract.prepared(layout))


def test_a_process_that_is_gone_is_of_no_folder():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", "print('there', flush=True); input()", "runs/here"], **pipes)
    process.stdout.readline()  # before it runs, it may have no command line yet
    assert local._is_of(process.pid, "runs/here") is True
    assert local._is_of(process.pid, "runs/there") is False
    process.communicate(b"\n")
    assert local._is_of(process.pid, "runs/here") is False


class TestContract(Contract):
    def test_a_job_is_seen_and_ended_by_another_process(self, engine):
        """`status` and `cancel` beside the launcher."""
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang")
        job = engine.executor.submit(cell)
        self.until_running(engine, cell)
        source = f"""
from pathlib import Path
from launch.cells import Layout
from launch.executors import local
other = local.Executor(local.Options(), Layout(Path({os.fspath(engine.layout.root)!r})))
print(other.jobs()[{cell.name!r}].id)
other.cancel([{cell.name!r}])
"""
        found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == job.id
        self.until_gone(engine, cell)
        assert self.state_of(engine, cell).state == "preempted"

    def test_a_job_of_another_launcher_is_not_started_again(self, engine):
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang")
        job = engine.executor.submit(cell)
        other = local.Executor(local.Options(), engine.layout)
        assert other.submit(cell).id == job.id
        assert len(engine.processes(cell.name)) <= 1

    def test_no_more_cells_than_slots(self, tmp_path, fake_training):
        layout = Layout(tmp_path)
        cells = executor_contract.prepared(layout, 2, ("hang",))
        with local.Executor(local.Options(slots=1), layout) as one:
            one.submit(cells[0])
            with pytest.raises(SubmitError, match="all 1 slots"):
                one.submit(cells[1])

    def test_a_process_that_has_closed_its_files_is_reaped_before_the_next_starts(self, engine, monkeypatch):
        """The kernel gives its claim back a moment before its parent can ask for the exit code."""
        cell = engine.cells[0]
        source = "import os, time; os.closerange(3, 64); time.sleep(0.5); os._exit(3)"
        monkeypatch.setattr(TrainingCell, "command", lambda *_, **__: [sys.executable, "-c", source])
        engine.executor.submit(cell)
        first = engine.executor._children[cell.name].ranks[0]
        self.wait(engine, lambda: cell.name not in engine.executor.jobs(), "it keeps its claim")
        engine.executor.submit(cell)
        assert first.returncode == 3

    def test_when_one_process_of_a_cell_dies_the_others_end(self, tmp_path, fake_training, monkeypatch):
        monkeypatch.setattr(local, "RANK_SECONDS", 0.2)
        layout = Layout(tmp_path)
        (cell,) = executor_contract.prepared(layout, 1, ("hang",))
        monkeypatch.setattr(local, "_start", _start_ranks(local._start))
        with local.Executor(local.Options(processes=2), layout) as one:
            engine = LocalEngine(one, [cell])
            one.submit(cell)
            self.wait(engine, lambda: len(engine.processes(cell.name)) == 2, "not two processes")
            self.until_running(engine, cell)
            os.kill(max(engine.processes(cell.name)), signal.SIGKILL)
            self.until_gone(engine, cell)
            now = self.state_of(engine, cell)
            assert (now.state, now.failure, now.runnable) == ("failed", "killed", True)


def _start_ranks(start):
    """Tells the fake trainer its rank, which has no flags."""

    def tell(argv, file, slot, environment, claim):
        rank = next(word.removeprefix("--process=") for word in argv if word.startswith("--process="))
        return start(argv[:4], file, slot, environment | {"JAX_PROCESS_ID": rank}, claim)

    return tell


def train(cells, layout, behaviour, slots=2, watch=False):
    """`run` of these cells with the fake trainer; what is not in `behaviour` finishes. The passes."""
    for cell in cells:
        behave(layout, cell, *behaviour.get(cell.name, ("finish",)))
    passes = []
    with local.Executor(local.Options(slots=slots), layout) as one:
        watching.repeat(cells, layout, one, watch, passes.append, 0.05)
    return passes


def starts(layout, cell):
    return len(list((layout.cell(cell.name) / "attempts").glob("*.json")))


def test_a_failing_cell_does_not_stop_the_others_and_leaves_its_cause(tmp_path, fake_training):
    layout = Layout(tmp_path)
    cells = grid.cells(grid_fakes.small_grid())
    names = [cell.name for cell in cells]
    behaviour = {names[0]: ["silent"], names[1]: ["oom"], names[2]: ["die"], names[3]: ["die", "finish"]}
    passes = train(cells, layout, behaviour)
    states = dict(zip(names, state.of_all(cells, layout, time.time(), {}), strict=True))
    assert [states[name].state for name in names] == ["failed"] * 4 + ["done"] * 2
    assert max(now.active for now in passes) == 2
    assert [starts(layout, cell) for cell in cells] == [1] * 6  # what was killed is not started twice in a run
    assert "exit code 1" in states[names[0]].cause
    assert (states[names[1]].failure, states[names[1]].runnable) == ("out_of_memory", False)
    assert (states[names[2]].failure, states[names[2]].runnable) == ("killed", True)
    assert "out of memory" in (layout.cell(names[1]) / "log.txt").read_text()
    train(cells, layout, {names[2]: ["die"], names[3]: ["die", "finish"]}, watch=True)  # gives up on the one that always dies
    states = dict(zip(names, state.of_all(cells, layout, time.time(), {}), strict=True))
    assert states[names[3]].state == "done"
    assert (states[names[2]].failure, states[names[2]].runnable) == ("no_progress", False)
    assert starts(layout, cells[2]) == state.LOST_IN_VAIN


def test_a_preempted_cell_is_started_again_in_the_same_run(tmp_path, fake_training):
    layout = Layout(tmp_path)
    (cell,) = grid.cells(grid_fakes.small_grid())[:1]
    behave(layout, cell, "hang", "hang", "finish")
    with local.Executor(local.Options(slots=1), layout) as one:
        engine = LocalEngine(one, [cell])

        def preempt(now):
            beat = layout.cell(cell.name) / "heartbeat.json"
            if beat.exists() and json.loads(beat.read_text())["attempt"] == len(told) < 2:
                told.append(engine.preempt(cell.name))

        told = []
        watching.repeat([cell], layout, one, False, preempt, 0.05)
    assert state.of(cell, layout.cell(cell.name), time.time()).state == "done"
    assert starts(layout, cell) == 3


def test_what_is_cancelled_stays_so_until_the_next_run(tmp_path, fake_training):
    layout = Layout(tmp_path)
    (cell,) = executor_contract.prepared(layout, 1, ("hang", "finish"))
    with local.Executor(local.Options(slots=1), layout) as one:

        def cancel(now):
            if (layout.cell(cell.name) / "heartbeat.json").exists() and now.active:
                run.cancel([cell.name], layout, one)

        last = watching.repeat([cell], layout, one, True, cancel, 0.05)
    assert "cancelled meanwhile" in last.held[cell.name]
    assert (last.states[0].state, starts(layout, cell)) == ("preempted", 1)
    with local.Executor(local.Options(slots=1), layout) as one:
        watching.repeat([cell], layout, one, True, lambda now: None, 0.05)
    assert state.of(cell, layout.cell(cell.name), time.time()).state == "done"


def test_cells_whose_claims_are_torn_are_ended_by_their_launcher_alone(tmp_path, fake_training, monkeypatch):
    """Another one says what it can't do, instead of waiting for ever."""
    for name in ("GRACE_SECONDS", "RANK_SECONDS"):
        monkeypatch.setattr(local, name, 0.1)
    layout = Layout(tmp_path)
    (cell,) = executor_contract.prepared(layout, 1, ("hang",))
    folder = layout.cell(cell.name)
    with local.Executor(local.Options(slots=1), layout) as one:
        one.submit(cell)
        while not (folder / ".lock").exists() or not (folder / "attempts" / "000.json").exists():
            time.sleep(0.05)
        for name in (".job", ".lock"):
            os.truncate(folder / name, 0)
        with pytest.raises(SubmitError, match=rf"{cell.name} is held by processes .* `fuser .*/\.lock` finds them"):
            local.Executor(local.Options(), layout).cancel([cell.name])
        assert one.jobs().keys() == {cell.name}
        one.cancel([cell.name])
        assert one.jobs() == {}


def test_slots_share_the_cpus():
    cpus = os.sched_getaffinity(0)
    places = local.slots(len(cpus))
    assert set.union(*(slot.cpus for slot in places)) == cpus
    assert sum(len(slot.cpus) for slot in places) == len(cpus)
    with pytest.raises(ConfigError, match="this machine has"):
        local.slots(len(cpus) + 1)


def test_a_slot_per_visible_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    shown = [[env["CUDA_VISIBLE_DEVICES"] for env in slot.environments] for slot in local.slots()]
    assert shown == [["2"], ["5"]]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "CUDA_VISIBLE_DEVICES" not in local.slots()[0].environments[0]


def test_a_slot_of_several_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    shown = [[env["CUDA_VISIBLE_DEVICES"] for env in slot.environments] for slot in local.slots(None, 2)]
    assert shown == [["0,1"], ["2,3"]]
    shown = [[env["CUDA_VISIBLE_DEVICES"] for env in slot.environments] for slot in local.slots(None, 4, 2)]
    assert shown == [["0,1", "2,3"]]
    with pytest.raises(ConfigError, match="shows 5 GPUs"):
        local.slots(None, 8)
    with pytest.raises(ConfigError, match="has 2 times 2 GPUs"):
        local.slots(3, 2)


def test_the_slice_of_a_gpu_machine_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    class Found:
        returncode, stdout = 0, "NVIDIA A100-SXM4-40GB\nNVIDIA A100-SXM4-40GB\n"  # what a cell sees of them is asked for

    monkeypatch.setattr(local.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(local.subprocess, "run", lambda *_, **__: Found)
    where = local.gpu_slice(2)
    assert (where.name, where.n_chips) == ("a100:2", 2)
    assert where.chip.memory_bytes == 0.75 * 40e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert local.gpu_slice(2).chip.memory_bytes == pytest.approx(0.9 * 40e9)
    assert hardware.find("a100:2").chip.memory_bytes == 0.75 * 80e9  # elsewhere nothing is known
    monkeypatch.setattr(Found, "stdout", "NVIDIA GeForce RTX 4090\n")
    assert local.gpu_slice(1) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.Executor(local.Options(), Layout(tmp_path)).slice is None


def shared(tmp_path, monkeypatch, **options):
    """The engine on a machine of two A100, each shared by four cells."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", *hardware.FRACTION_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "_gpu_names", lambda: ["NVIDIA A100-SXM4-40GB"] * 2)
    return local.Executor(local.Options(cells_per_gpu=4, **options), Layout(tmp_path))


def test_small_cells_share_a_gpu(tmp_path, monkeypatch):
    """Its time and the memory that JAX takes: both are told, training by its environment, the planner by the slice."""
    one = shared(tmp_path, monkeypatch)
    assert one.capacity == 8
    assert [slot.name for slot in one.slots[:3]] == ["GPU 0, 1 of 4", "GPU 1, 1 of 4", "GPU 0, 2 of 4"]
    for slot in one.slots:
        (environment,) = slot.environments
        assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.1875"
        assert environment["GQA_JAX_DEVICES"] == "gpu,devices=1,per_process=1,shared_by=4"
    assert [slot.environments[0]["CUDA_VISIBLE_DEVICES"] for slot in one.slots] == ["0", "1"] * 4
    memory = hardware.on_this_machine(hardware.chip_of("NVIDIA A100-SXM4-40GB"), one.slots[0].environments[0]).memory_bytes
    assert (one.slice.name, one.slice.n_chips) == ("a100:1", 1)
    assert one.slice.chip.memory_bytes == pytest.approx(memory) == pytest.approx(0.75 * 40e9 / 4)
    assert one.rents == Rents("a100", 0.25)
    with pytest.raises(ConfigError, match=r"has 8 places on 2 GPUs \(cells_per_gpu = 4\), use 1 to 8"):
        _ = one.with_slots(9).slots


@pytest.mark.parametrize("name", hardware.FRACTION_VARIABLES)
def test_what_a_person_gives_jax_of_a_gpu_is_shared_out(tmp_path, monkeypatch, name):
    one = shared(tmp_path, monkeypatch, environment={name: "0.9"}, topology="a100:1")
    told = one._environment | one.slots[0].environments[0]
    assert hardware.memory_fraction(told) == pytest.approx(0.225)
    assert one.slice.chip.memory_bytes == pytest.approx(0.9 * 80e9 / 4)


def test_cells_that_share_a_gpu_have_one_process_and_one_gpu():
    for others in ({"gpus_per_cell": 2}, {"processes": 2}):
        with pytest.raises(ConfigError, match="cells that share a GPU have one process each and no other GPU"):
            local.Options(cells_per_gpu=2, **others)
    with pytest.raises(ConfigError, match="cells_per_gpu = 0: must be at least 1"):
        local.Options(cells_per_gpu=0)


def test_where_there_are_no_gpus_none_is_shared(tmp_path, monkeypatch):
    one = local.Executor(local.Options(cells_per_gpu=4), Layout(tmp_path))
    assert one.capacity == len(os.sched_getaffinity(0))
    assert not {*hardware.FRACTION_VARIABLES} & one.slots[0].environments[0].keys()
    assert (one.slice, one.rents) == (None, None)


def test_two_launchers_on_one_grid(tmp_path):
    layout = Layout(tmp_path)
    with run.only_launcher(layout), pytest.raises(ConfigError, match="another launcher runs in"):
        run.only_launcher(layout).__enter__()


LAUNCHER = """
import argparse, signal, sys
from pathlib import Path
from launch import __main__ as launch
from launch import grid, watch
from launch.cells import Layout
from launch.training_cells import TrainingCell
from launch.executors import local
from tests import executor_contract, grid_fakes
TrainingCell.command = executor_contract.fake_command
layout = Layout(Path(sys.argv[1]))
cells = executor_contract.prepared(layout, 6, ("hang",))

def act(console):
    with local.Executor(local.Options(slots=2), layout) as one:
        watch.repeat(cells, layout, one, False, lambda now: None, 0.05)

class Parser:
    parse_args = staticmethod(lambda argv: argparse.Namespace(act=act))

launch.parser = Parser
sys.exit(launch.main([]))
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_cells_end_with_the_launcher(tmp_path, how, code):
    """And save first, unless it was killed."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(found := list(tmp_path.glob("cells/*/attempts/000.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [json.loads(path.read_text())["pid"] for path in found]
    assert len(pids) == 2
    launcher.send_signal(how)
    assert launcher.wait(20) == code
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))
    saved = [json.loads(path.read_text())["class"] for path in tmp_path.glob("cells/*/exit.json")]
    assert saved == ["preempted"] * (0 if how == signal.SIGKILL else 2)
    assert local.Executor(local.Options(), Layout(tmp_path)).jobs() == {}


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_of_a_cell_can_be_typed(tmp_path):
    layout = Layout(tmp_path)
    cell = grid.cells(grid_fakes.small_grid())[0]
    argv = cell.command(layout.cell(cell.name))
    assert argv[1:3] == ["-m", "gqa_jax.train"]
    assert argv[3].endswith(f"cell.py:{layout.cell(cell.name)}/config.json")


def test_a_phase_starts_when_the_one_before_it_is_done(tmp_path, fake_training):
    layout = Layout(tmp_path)
    cells = grid.cells(two_phases())
    train(cells, layout, {})
    assert [starts(layout, cell) for cell in cells] == [1] * 3
    ended = [(layout.cell(cell.name) / "result.json").stat().st_mtime for cell in cells]
    begun = [json.loads((layout.cell(cell.name) / "attempts" / "000.json").read_text())["time"] for cell in cells]
    assert all(end < start for end, start in zip(ended, begun[1:], strict=False))
    assert state.of(cells[-1], layout.cell(cells[-1].name), time.time()).state == "done"


@pytest.mark.parametrize("how", ["fail", "oom", "die"])
def test_a_phase_does_not_start_after_one_that_failed(tmp_path, how, fake_training):
    other = grid_fakes.config(size=32)
    the_grid = two_phases()
    layout = Layout(tmp_path)
    cells = grid.cells(grid.Grid("g", [*the_grid.configs, other], [1024]))
    (first, second, third), (alone,) = [c for c in cells if "s16d" in c.name], [c for c in cells if "s32d" in c.name]
    train(cells, layout, {first.name: [how]}, slots=1)
    assert [starts(layout, cell) for cell in (first, second, third, alone)] == [1, 0, 0, 1]
    assert state.of(second, layout.cell(second.name), time.time()).cause == f"waits for {first.name}, which failed"


def test_a_phase_chosen_without_the_one_before_it_is_refused(tmp_path):
    layout = Layout(tmp_path)
    first, second, third = cells = grid.cells(two_phases())
    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    commands.check_parents(cells, cells, layout)
    with pytest.raises(
        ConfigError, match=f"{second.name} continues {first.name}, which is not done and not chosen: leave --where"
    ):
        commands.check_parents([second, third], cells, layout)
    grid_fakes.finish(first, layout)
    commands.check_parents([second, third], cells, layout)
    (layout.cell(first.name) / "result.json").unlink()
    grid_fakes.finish(second, layout)
    commands.check_parents([second], cells, layout)  # there is nothing to start


def test_two_phases_of_real_training_from_the_command_line(tmp_path, capsys):
    path, layout = tmp_path / "phases.py", Layout(tmp_path / "root")
    path.write_text(
        "import dataclasses\nfrom tests.test_grid import two_phases\n"
        "def get_grid(): return dataclasses.replace(two_phases(), configs=two_phases().configs[1:])\n"
    )
    first, second = grid.cells(grid.load(str(path)))
    assert launch.main(["run", str(path), "--root", str(layout.root), "--where", "context=64"]) == launch.EXIT_BAD_INPUT
    assert f"--where cell={first.name}" in capsys.readouterr().err
    assert launch.main(["run", str(path), "--root", str(layout.root)]) == launch.EXIT_DONE
    table = gqa_jax.load_results(layout.root).set_index("cell")
    assert table["continue_from"].fillna("").to_dict() == {first.name: "", second.name: first.name}
    assert table["tokens"].to_dict() == {first.name: 1024, second.name: 512}
    before, after = table["loss"][first.name], table["loss"][second.name]
    assert after == pytest.approx(before, rel=0.02)  # it went on: a learning rate of 1e-5 changes little
    assert after != before
