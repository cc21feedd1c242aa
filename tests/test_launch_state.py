import functools
import json
import time

import pytest

from gqa_jax.hardware import prices
from gqa_jax.training import run_folder
from gqa_jax.training.metrics import write_json
from launch import grid, money, state
from launch.cells import Layout
from launch.executors import local
from launch.executors.base import DEAD, QUEUED, RUNNING, Job
from launch.training_cells import TrainingCell
from tests import grid_fakes
from tests.test_grid import two_phases

state_of = functools.partial(state.of, TrainingCell)


def one_cell(tmp_path):
    cell = grid.cells(grid_fakes.small_grid())[0]
    layout = Layout(tmp_path)
    return cell, layout, layout.cell(cell.name)


def running(cell, **values):
    return Job(cell.name, "7", RUNNING, **values)


def test_states_follow_from_the_files_the_job_and_the_time(tmp_path):
    cell, layout, folder = one_cell(tmp_path)
    now = time.time()
    assert state_of(folder, now).state == "planned"
    queued = state_of(folder, now, Job(cell.name, "7", QUEUED, "Priority"))
    assert (queued.state, queued.cause, queued.runnable) == ("queued", "Priority", False)
    assert state_of(folder, now, running(cell, since=now)).state == "running"
    assert state_of(folder, now + 3600, running(cell, since=now)).state == "stalled"  # it has never shown a sign of life
    begin(folder, 0, 0, now)
    grid_fakes.beat(folder)
    seen = state_of(folder, now, running(cell))
    assert (seen.state, seen.step, seen.eta_seconds, seen.attempts, seen.job) == ("running", 2, 5.0, 1, "7")
    grid_fakes.beat(folder, age=3600)
    assert state_of(folder, now, running(cell, since=now)).state == "running"  # of the attempt before: this one is starting
    stalled = state_of(folder, now, running(cell))
    assert stalled.state == "stalled"
    assert "no heartbeat for 36" in stalled.cause
    assert stalled.silence > state.STALLED_SECONDS
    lost = state_of(folder, now)
    assert (lost.state, lost.runnable) == ("lost", True)
    assert state_of(folder, now, Job(cell.name, "7", DEAD, "the node failed")).cause == "the node failed"
    run_folder.record_exit(folder, 75, "preempted", "asked to end", 0)
    assert (state_of(folder, now).state, state_of(folder, now).runnable) == ("preempted", True)
    run_folder.record_exit(folder, 1, "out_of_memory", "too big", 0)
    failed = state_of(folder, now)
    assert (failed.state, failed.failure, failed.cause, failed.runnable) == ("failed", "out_of_memory", "too big", False)
    run_folder.record_exit(folder, -9, "killed", "SIGKILL", 0)
    assert state_of(folder, now).runnable
    grid_fakes.finish(cell, layout)
    assert state_of(folder, now, running(cell)).state == "done"
    assert not state_of(folder, now).runnable


def begin(folder, number, first_step, at):
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    write_json(folder / "attempts" / f"{number:03d}.json", {"attempt": number, "first_step": first_step, "time": at})


def submitted(folder, at, number):
    (folder / "submissions").mkdir(parents=True, exist_ok=True)
    write_json(folder / "submissions" / f"{number:03d}.json", {"time": at, "engine": "slurm", "id": "7", "where": ""})


def test_preempted_three_times_without_progress_is_a_failure(tmp_path):
    _, _, folder = one_cell(tmp_path)
    folder.mkdir(parents=True)
    for number in range(state.PREEMPTED_IN_VAIN):
        begin(folder, number, 0, number)
        run_folder.record_exit(folder, 75, "preempted", "asked to end", number)
        assert state_of(folder, 1e9).runnable == (number < 2)
    failed = state_of(folder, 1e9)
    assert (failed.state, failed.failure) == ("failed", "no_progress")
    assert "preempted 3 times in a row" in failed.cause
    (folder / "checkpoints" / "5").mkdir(parents=True)  # the last of them had saved something
    assert state_of(folder, 1e9).state == "preempted"
    begin(folder, 3, 5, 3)
    assert state_of(folder, 1e9).runnable


def test_submissions_that_lead_nowhere_wait_longer_each_time_and_end(tmp_path):
    _, _, folder = one_cell(tmp_path)
    waits = []
    for number in range(state.UNSTARTED):
        submitted(folder, 1000.0, number)
        waits.append(state_of(folder, 2000.0).not_before - 1000.0)
    assert waits[:4] == [30, 60, 120, 240]
    failed = state_of(folder, 2000.0)
    assert (failed.failure, failed.runnable) == ("no_progress", False)
    assert "no training process has appeared" in failed.cause
    begin(folder, 0, 0, 1001.0)
    assert state_of(folder, 2000.0).not_before == 0


def fault(folder, at, monkeypatch, kind="infrastructure"):
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.time, "time", lambda: at)
        run_folder.record_exit(folder, 1, kind, "no GPU", 0, "node1")


def test_faults_of_machines_wait_longer_each_time_and_end(tmp_path, monkeypatch):
    """Though a training process appeared, and said so, no attempt began to train."""
    _, _, folder = one_cell(tmp_path)
    folder.mkdir(parents=True)
    waits = []
    for number in range(state.FAULTS):
        submitted(folder, 1000.0 + number, number)
        fault(folder, 1000.5 + number, monkeypatch)
        now = state_of(folder, 9e3)
        assert (now.state, now.failure) == ("failed", "infrastructure")
        waits.append((now.not_before - 1000.5 - number, now.runnable))
    assert waits == [(30, True), (60, True), (120, True), (240, True), (480, False)]
    assert now.cause == "5 times in a row its machines failed it, at last: no GPU"
    cells = grid.cells(grid.Grid("g", list(grid.product(grid_fakes.config, size=[16], n_heads=[1, 2, 4, 8])), [1024]))
    assert state.held_back(cells, [now] * 3 + [state.CellState("planned")]) == {}  # it is not of a size


def test_faults_are_counted_since_a_cell_last_saved(tmp_path, monkeypatch):
    _, _, folder = one_cell(tmp_path)
    begin(folder, 0, 0, 100.0)
    for at in (110.0, 120.0):
        fault(folder, at, monkeypatch)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    begin(folder, 1, 0, 200.0)  # it saved step 5
    fault(folder, 210.0, monkeypatch)
    assert state_of(folder, 1e9).not_before == 240.0
    begin(folder, 2, 5, 300.0)
    fault(folder, 310.0, monkeypatch)
    assert state_of(folder, 1e9).not_before == 370.0
    fault(folder, 320.0, monkeypatch, "disk_full")  # no fault of a machine
    assert state_of(folder, 1e9).not_before == 370.0


def test_attempts_that_machines_failed_are_not_in_vain(tmp_path, monkeypatch):
    _, _, folder = one_cell(tmp_path)
    for number in range(state.PREEMPTED_IN_VAIN):
        begin(folder, number, 0, 100.0 * (number + 1))
        fault(folder, 100.0 * (number + 1) + 5, monkeypatch, "preempted" if number else "infrastructure")
    assert state_of(folder, 1e9).state == "preempted"
    assert state_of(folder, 1e9).runnable


def test_a_host_that_failed_before_training_is_shown(tmp_path):
    _, _, folder = one_cell(tmp_path)
    folder.mkdir(parents=True)
    run_folder.record_exit(folder, 75, "preempted", "asked to end", 0)
    later = time.time() + 5
    write_json(
        folder / "host-failure.json", {"class": "infrastructure", "reason": "no space for the environment", "time": later}
    )
    failed = state_of(folder, later)
    assert (failed.state, failed.failure, failed.cause) == ("failed", "infrastructure", "no space for the environment")
    assert failed.runnable


def test_a_folder_that_somebody_edited_is_a_failure_with_the_field(tmp_path):
    cell, _, folder = one_cell(tmp_path)
    values = cell.config.to_dict()
    folder.mkdir(parents=True)
    write_json(folder / "config.json", values | {"checkpoint": values["checkpoint"] | {"keep": 9}})
    assert state.of(cell, folder, 0.0).state == "planned"  # nothing that changes its result
    write_json(folder / "config.json", values | {"seed": 5})
    edited = state.of(cell, folder, 0.0)
    assert (edited.state, edited.failure, edited.runnable) == ("failed", "edited", False)
    assert "seed: 0 here, 5 there" in edited.cause
    (folder / "config.json").write_text("{")
    assert "can't be used" in state.of(cell, folder, 0.0).cause


def test_a_clock_that_is_off_is_said(tmp_path):
    cell, _, folder = one_cell(tmp_path)
    grid_fakes.beat(folder, age=-300)
    ahead = state_of(folder, time.time(), running(cell))
    assert ahead.state == "running"
    assert "300 s ahead" in ahead.cause


@pytest.mark.parametrize("by", [-3600.0, 3600.0])
def test_a_clock_that_was_set_leaves_nothing_negative_and_no_cell_stalled(tmp_path, by):
    """The wall clock of both machines is set by an hour between a heartbeat and the look, and the next heartbeat comes."""
    cell, _, folder = one_cell(tmp_path)
    now = time.time()
    begin(folder, 0, 0, now)
    write_json(folder / "heartbeat.json", {"time": now, "step": 2, "device": "NVIDIA H200", "device_seconds": 7200.0})
    job = running(cell, since=now - 60)
    seen = state_of(folder, now + by, job)
    assert seen.heartbeat_age == max(0.0, by)
    assert (seen.silence or 0.0) >= 0.0
    assert state_of(folder, now - 30, job).silence == 0.0  # clocks of two machines may differ by so much
    write_json(folder / "heartbeat.json", {"time": now + by, "step": 3, "device": "NVIDIA H200", "device_seconds": -5.0})
    seen = state_of(folder, now + by + 2, job)
    assert (seen.state, seen.silence is None or seen.silence < 60, seen.device_seconds) == ("running", True, None)
    assert money.cost(seen, prices.load()) is None  # what an earlier version wrote can't be
    seen = state_of(folder, now + by + 2 * state.STALLED_SECONDS, job)
    assert seen.state == ("stalled" if by > 0 else "running")  # when the job began is by the clock of then
    assert state_of(folder, now + abs(by) + 2 * state.STALLED_SECONDS, job).state == "stalled"


def test_a_submission_by_a_clock_that_was_ahead_holds_nothing_back(tmp_path):
    _, _, folder = one_cell(tmp_path)
    submitted(folder, 5000.0, 0)
    assert state_of(folder, 1000.0).not_before == 0
    assert state_of(folder, 5000.0).not_before == 5030
    submitted(folder, 1010.0, 1)
    assert state_of(folder, 1020.0).not_before == 1010 + 60


def test_cells_of_a_size_are_held_back_when_its_first_ones_fail_alike(tmp_path):
    configs = list(grid.product(grid_fakes.config, size=[16, 32], n_heads=[1, 2, 4, 8]))
    cells = grid.cells(grid.Grid("g", configs, [1024]))
    planned, oom = state.CellState("planned"), state.CellState("failed", failure="out_of_memory")
    assert state.held_back(cells, [oom, oom, planned, planned] + [planned] * 4) == {}
    held = state.held_back(cells, [oom, oom, oom, planned] + [planned] * 4)
    assert list(held) == [cells[3].name]
    assert held[cells[3].name] == f"held back: 3 cells of its size failed alike (out_of_memory), like {cells[0].name}"
    killed = state.CellState("failed", failure="killed")
    assert state.held_back(cells, [killed] * 3 + [planned] * 5) == {}
    for kind in ("broken_result", "broken_config", "edited"):  # which says nothing of the size
        odd = state.CellState("failed", failure=kind)
        assert state.held_back(cells, [odd] * 3 + [planned] * 5) == {}
        assert list(state.held_back(cells, [oom] * 2 + [odd, planned] + [planned] * 4)) == []
    done = state.CellState("done")
    assert state.held_back(cells[:4] + cells[4:], [oom, oom, oom, planned, done] + [planned] * 3) != {}


def test_a_broken_result_is_a_failure_that_says_what_to_do(tmp_path):
    _, _, folder = one_cell(tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "do')
    broken = state_of(folder, 0.0)
    assert (broken.state, broken.failure, broken.runnable) == ("failed", "broken_result", False)
    assert "move it away" in broken.cause


def test_looking_is_harmless(tmp_path):
    """Beside a process that starts: `status` must not make it believe that the folder is taken."""
    cell, layout, folder = one_cell(tmp_path)
    engine = local.Executor(local.Options(), layout)
    for _ in range(20):
        with run_folder.claim(folder):
            assert list(engine.jobs()) == [cell.name]
        assert engine.jobs() == {}
    (folder / "heartbeat.json").write_text(json.dumps([]))
    assert state_of(folder, 0.0).state == "planned"


def phases(tmp_path):
    cells, layout = grid.cells(two_phases()), Layout(tmp_path)
    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    return cells, layout, [layout.cell(cell.name) for cell in cells]


def test_a_cell_waits_for_the_one_that_it_continues(tmp_path):
    (first, second, _), layout, folders = phases(tmp_path)
    states = [state_of(folder, 0.0) for folder in folders]
    assert [(s.state, s.runnable, s.cause) for s in states] == [
        ("planned", True, None),
        ("planned", True, f"waits for {first.name}"),
        ("planned", True, f"waits for {second.name}"),
    ]
    grid_fakes.finish(first, layout)
    assert state_of(folders[1], 0.0).cause is None
    assert state_of(folders[2], 0.0).cause == f"waits for {second.name}"


@pytest.mark.parametrize(("kind", "again"), [("out_of_memory", False), ("killed", True), ("diverged", False)])
def test_a_cell_waits_in_vain_for_one_that_failed(tmp_path, kind, again):
    (first, second, third), layout, folders = phases(tmp_path)
    if kind == "diverged":
        grid_fakes.finish(first, layout, "diverged")
    else:
        run_folder.record_exit(folders[0], 1, kind, "why", 0)
    states = [state_of(folder, 0.0) for folder in folders]
    ended = "diverged" if kind == "diverged" else "failed"
    assert [s.state for s in states] == [ended, "planned", "planned"]
    assert states[1].cause == f"waits for {first.name}, which {ended}"
    assert (states[1].runnable, states[2].runnable) == (again, again)
    chain = f"waits for {second.name}" + ("" if again else f", which {states[1].cause}")
    assert states[2].cause == chain
    assert state.waiting([cell.name for cell in (first, second, third)], states) == [
        f"{second.name}: {states[1].cause}",
        f"{third.name}: {chain}",
    ]
    assert state.waiting(["a", "b"], [states[1]] * 2) == [f"a and 1 more: {states[1].cause}"]
