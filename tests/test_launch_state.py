import json
import time

from gqa_jax import run_folder
from launch import grid, state
from launch.grid import Layout
from tests import grid_fakes


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
