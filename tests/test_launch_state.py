import json
import time

import pytest

from gqa_jax import run_folder
from gqa_jax.metrics import write_json
from launch import grid, state
from launch.grid import Layout
from tests import grid_fakes
from tests.test_grid import two_phases


def one_cell(tmp_path):
    cell = grid.cells(grid_fakes.small_grid())[0]
    layout = Layout(tmp_path)
    return cell, layout, layout.cell(cell.name)


def test_states_follow_from_the_files(tmp_path):
    cell, layout, folder = one_cell(tmp_path)
    now = time.time()
    assert state.of(folder, now).state == "planned"
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics" / "attempt-000.jsonl").touch()
    grid_fakes.beat(folder)
    with run_folder.claim(folder):
        running = state.of(folder, time.time())
        assert (running.state, running.step, running.eta_seconds) == ("running", 2, 5.0)
        grid_fakes.beat(folder, age=3600)
        stalled = state.of(folder, time.time())
        assert stalled.state == "stalled"
        assert "no heartbeat for 36" in stalled.cause
    interrupted = state.of(folder, now)
    assert interrupted.state == "interrupted"
    assert interrupted.runnable
    run_folder.record_exit(folder, 1, "out_of_memory", "too big", 0)
    failed = state.of(folder, now)
    assert (failed.state, failed.failure, failed.cause, failed.runnable) == ("failed", "out_of_memory", "too big", False)
    run_folder.record_exit(folder, -9, "killed", "SIGKILL", 0)
    assert state.of(folder, now).runnable
    grid_fakes.finish(cell, layout)
    assert state.of(folder, now).state == "done"
    assert not state.of(folder, now).runnable


def test_a_broken_result_is_a_failure_that_says_what_to_do(tmp_path):
    _, _, folder = one_cell(tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "do')
    broken = state.of(folder, 0.0)
    assert (broken.state, broken.failure, broken.runnable) == ("failed", "broken_result", False)
    assert "move it away" in broken.cause


def test_looking_is_harmless(tmp_path):
    """Beside a process that starts: `status` must not make it believe that the folder is taken."""
    _, _, folder = one_cell(tmp_path)
    for _ in range(20):
        with run_folder.claim(folder):
            assert state.is_held(folder)
        assert not state.is_held(folder)
    (folder / "heartbeat.json").write_text(json.dumps([]))
    assert state.of(folder, 0.0).state == "planned"


def phases(tmp_path):
    cells, layout = grid.cells(two_phases()), Layout(tmp_path)
    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        write_json(layout.cell(cell.name) / "config.json", cell.config.to_dict())
    return cells, layout, [layout.cell(cell.name) for cell in cells]


def test_a_cell_waits_for_the_one_that_it_continues(tmp_path):
    (first, second, _), layout, folders = phases(tmp_path)
    states = [state.of(folder, 0.0) for folder in folders]
    assert [(s.state, s.runnable, s.cause) for s in states] == [
        ("planned", True, None),
        ("planned", True, f"waits for {first.name}"),
        ("planned", True, f"waits for {second.name}"),
    ]
    grid_fakes.finish(first, layout)
    assert state.of(folders[1], 0.0).cause is None
    assert state.of(folders[2], 0.0).cause == f"waits for {second.name}"


@pytest.mark.parametrize(("kind", "again"), [("out_of_memory", False), ("killed", True), ("diverged", False)])
def test_a_cell_waits_in_vain_for_one_that_failed(tmp_path, kind, again):
    (first, second, third), layout, folders = phases(tmp_path)
    if kind == "diverged":
        grid_fakes.finish(first, layout, "diverged")
    else:
        run_folder.record_exit(folders[0], 1, kind, "why", 0)
    states = [state.of(folder, 0.0) for folder in folders]
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
