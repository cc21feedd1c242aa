import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gqa_jax
from gqa_jax.config import ConfigError
from gqa_jax.metrics import write_json
from launch import __main__ as launch
from launch import grid, local, state
from launch.grid import Layout
from tests import grid_fakes
from tests.test_grid import two_phases

# A training process in a line or two: claims its folder as the real one does, then does what the argument says.
FAKE = """
import json, os, sys, time
from pathlib import Path
from gqa_jax import run_folder
folder, what = Path(sys.argv[1]), sys.argv[2]
with run_folder.claim(folder):
    starts = folder / "starts"
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    if what == "fail":
        sys.exit("boom")
    if what == "config":
        run_folder.record_exit(folder, 2, "config", "bad heads", 0)
        sys.exit(2)
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "preempt" and len(starts.read_text()) < 3:
        sys.exit(75)
    if what == "hang":
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(60)
    if what in ("done", "preempt"):
        source = json.loads((folder / "config.json").read_text())["continue_from"]
        assert source is None or (folder / source / "result.json").exists(), "too early"
        (folder / "result.json").write_text(json.dumps({"status": "done", "loss": 1.0, "step": 4, "identity": "x"}))
    (folder / "cpus").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
"""


def commands(behaviour):
    def make(cell, layout):
        return [sys.executable, "-c", FAKE, str(layout.cell(cell.name)), behaviour.get(cell.name, "succeed")]

    return make


def setup(tmp_path, the_grid=None):
    cells, layout = grid.cells(the_grid or grid_fakes.small_grid()), Layout(tmp_path)
    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True, exist_ok=True)
        write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    return cells, layout


def test_a_failing_cell_does_not_stop_the_others_and_leaves_its_cause(tmp_path):
    cells, layout = setup(tmp_path)
    names = [cell.name for cell in cells]
    behaviour = {names[0]: "fail", names[1]: "config", names[2]: "die", names[3]: "preempt"}
    seen = []
    codes = local.run(cells, layout, local.slots(2), lambda running, done: seen.append(len(running)), commands(behaviour))
    assert [codes[name] for name in names] == [1, 2, -9, 0, 0, 0]
    assert max(seen) == 2
    assert (layout.cell(names[3]) / "starts").read_text() == "xxx"  # started again after 75, and only this one
    assert (layout.cell(names[0]) / "starts").read_text() == "x"
    states = {name: state.of(layout.cell(name), time.time()) for name in names}
    assert "exit code 1" in states[names[0]].cause
    assert (states[names[1]].failure, states[names[1]].cause) == ("config", "bad heads")
    assert (states[names[2]].failure, states[names[2]].runnable) == ("killed", True)
    assert "boom" in (layout.cell(names[0]) / "log.txt").read_text()


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
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in local.slots()] == ["2", "5"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "CUDA_VISIBLE_DEVICES" not in local.slots()[0].environment


def test_two_launchers_on_one_grid(tmp_path):
    _, layout = setup(tmp_path)
    with local.only_launcher(layout), pytest.raises(ConfigError, match="another launcher runs in"):
        local.only_launcher(layout).__enter__()


LAUNCHER = """
import sys
from pathlib import Path
from launch import grid, local
from tests import grid_fakes, test_launch_local
cells, layout = test_launch_local.setup(Path(sys.argv[1]))
local.run(cells, layout, local.slots(2), lambda *_: None, test_launch_local.commands({c.name: "hang" for c in cells}))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_cells_end_with_the_launcher(tmp_path, how):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(found := list(tmp_path.glob("cells/*/pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in found]
    assert len(pids) == 2
    launcher.send_signal(how)
    launcher.wait(20)
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))
    assert not any(state.is_held(path.parent) for path in found)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_of_a_cell_can_be_typed(tmp_path):
    cells, layout = setup(tmp_path)
    argv = local.command(cells[0], layout)
    assert argv[1:3] == ["-m", "gqa_jax.train"]
    assert argv[3].endswith(f"cell.py:{layout.cell(cells[0].name)}/config.json")


def test_a_phase_starts_when_the_one_before_it_is_done(tmp_path):
    cells, layout = setup(tmp_path, two_phases())
    names = [cell.name for cell in cells]
    running = []
    behaviour = dict.fromkeys(names, "done") | {names[0]: "preempt"}
    codes = local.run(
        cells, layout, local.slots(2), lambda now, _: running.append({cell.name for cell in now}), commands(behaviour)
    )
    assert codes == dict.fromkeys(names, 0)
    assert (layout.cell(names[0]) / "starts").read_text() == "xxx"
    assert max(map(len, running)) == 1


@pytest.mark.parametrize("how", ["fail", "config", "die"])
def test_a_phase_does_not_start_after_one_that_failed(tmp_path, how):
    other = grid_fakes.config(size=32)
    the_grid = two_phases()
    cells, layout = setup(tmp_path, grid.Grid("g", [*the_grid.configs, other], [1024]))
    (first, second, third), (alone,) = [c for c in cells if "s16d" in c.name], [c for c in cells if "s32d" in c.name]
    codes = local.run(cells, layout, local.slots(1), lambda *_: None, commands({first.name: how, alone.name: "done"}))
    assert set(codes) == {first.name, alone.name}
    assert codes[alone.name] == 0
    assert state.of(layout.cell(second.name), time.time()).cause == f"waits for {first.name}, which failed"
    assert not (layout.cell(third.name) / "starts").exists()


def test_a_phase_chosen_without_the_one_before_it_is_refused(tmp_path):
    cells, layout = setup(tmp_path, two_phases())
    first, second, third = cells
    local.check_parents(cells, layout)
    with pytest.raises(
        ConfigError, match=f"{second.name} continues {first.name}, which is not done and not chosen: leave --where"
    ):
        local.check_parents([second, third], layout)
    grid_fakes.finish(first, layout)
    local.check_parents([second, third], layout)
    (layout.cell(first.name) / "result.json").unlink()
    grid_fakes.finish(second, layout)
    local.check_parents([second], layout)  # there is nothing to start


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
