"""What has machines and is of no use is ended, once; and what somebody is told while nobody looks."""

import json

import pytest

from launch import __main__ as launch
from launch import grid, notify, reap, watch
from launch.cells import Layout
from launch.executors import local
from launch.executors.base import DEAD, QUEUED, RUNNING, Job, Look, SubmitError
from launch.run import Pass
from launch.state import CellState
from tests import grid_fakes
from tests.test_money import CELLS, budget  # noqa: F401 (a fixture)
from tests.test_watch import HOUR, NAMES, clock, engine  # noqa: F401 (fixtures)


def found(*states, jobs):
    """A pass in which cells have these states, and the engine these jobs: (name, state)."""
    return Pass(CELLS, list(states), Look({name: Job(name, "1", kind) for name, kind in jobs}, []), 1e9)


PLANNED = CellState("planned")
USELESS = [
    (CellState("done", heartbeat_age=700.0), RUNNING, "its cell is done"),
    (CellState("done", heartbeat_age=500.0), RUNNING, None),  # it is just going
    (CellState("diverged"), QUEUED, "its cell is diverged"),
    (CellState("failed", failure="edited", heartbeat_age=7000.0), RUNNING, "its cell is failed (edited)"),
    (CellState("failed", failure="edited"), RUNNING, None),
    (CellState("stalled", silence=2 * HOUR), RUNNING, "silent for 60 minutes"),
    (CellState("stalled", silence=0.5 * HOUR), RUNNING, None),
    (CellState("running", heartbeat_age=20.0), RUNNING, None),
    (CellState("queued"), QUEUED, None),
    (CellState("done"), DEAD, None),  # of `reconcile`
]


@pytest.mark.parametrize(("one", "kind", "why"), USELESS)
def test_which_jobs_are_of_no_use(tmp_path, one, kind, why):
    now = found(one, PLANNED, PLANNED, PLANNED, jobs=[(NAMES[0], kind)])
    silent = [NAMES[0]] if one.silence == 2 * HOUR else []  # as `launch.run.silent` would say
    assert reap.useless(now, Layout(tmp_path), silent) == ({NAMES[0]: why} if why else {})


@pytest.mark.parametrize(
    ("left", "why"), [(None, "its folder is gone"), ("config.json", None), ("result.json", "its cell is done")]
)
def test_a_job_of_another_grid_file_is_judged_by_its_folder(tmp_path, left, why):
    layout, other = Layout(tmp_path), grid.cells(grid_fakes.small_grid())[5]
    if left == "result.json":
        grid_fakes.finish(other, layout)
    elif left:
        grid_fakes.beat(layout.cell(other.name))
    now = found(*[PLANNED] * 4, jobs=[(other.name, RUNNING)])
    assert reap.useless(now, layout, []) == ({other.name: why} if why else {})


def test_what_is_reaped_is_ended_once_and_the_others_go_on(engine, monkeypatch):  # noqa: F811
    for cell in CELLS[:2]:
        engine.submit(cell)
    grid_fakes.finish(CELLS[0], engine.layout)
    engine.began["of-another-grid-file"] = 1.8e9
    ended = []
    monkeypatch.setattr(engine, "cancel", lambda names: ended.extend(names) or [engine.began.pop(name) for name in names])
    said = [f"{NAMES[0]}: its cell is done", "of-another-grid-file: its folder is gone"]
    assert reap.reap(CELLS, engine.layout, engine, dry_run=True) == said
    assert ended == []
    assert reap.reap(CELLS, engine.layout, engine) == said
    assert ended == [NAMES[0], "of-another-grid-file"]
    assert reap.reap(CELLS, engine.layout, engine) == []
    assert list(engine.began) == [NAMES[1]]


def test_the_command(tmp_path, capsys, monkeypatch):
    file, layout, _ = grid_fakes.finished_grid(tmp_path)
    asked = ["reap", str(file), "--root", str(layout.root)]
    assert launch.main(asked) == launch.EXIT_DONE
    assert capsys.readouterr().out == "0 jobs ended\n"
    monkeypatch.setattr(local.Executor, "jobs", lambda self: Look({"x": Job("x", "1", RUNNING, where="n1")}, []))
    monkeypatch.setattr(local.Executor, "cancel", lambda self, names: None)
    assert launch.main([*asked, "--dry_run"]) == launch.EXIT_DONE
    assert capsys.readouterr().out == "x in n1: its folder is gone\n1 job would be ended\n"
    assert launch.main(asked) == launch.EXIT_DONE
    assert capsys.readouterr().out.endswith("\n1 job ended\n")

    def down(self):
        raise SubmitError("no network")

    monkeypatch.setattr(local.Executor, "jobs", down)
    assert launch.main(asked) == launch.EXIT_FAILED
    assert "no network" in capsys.readouterr().err


@pytest.fixture
def notifier(tmp_path):
    """A notifier whose command keeps what it is told, and what that is."""
    file = tmp_path / "told"
    one = notify.Notifier(f"cat >> {file}", grid="g", root="r", engine="slurm")
    return one, lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_first_of_each_kind_is_told(notifier):
    one, told = notifier
    bad = CellState("failed", failure="out_of_memory", cause="too large")
    one.passed(found(PLANNED, CellState("failed", failure="killed"), PLANNED, PLANNED, jobs=[]))  # it is started again
    assert told() == []
    one.passed(found(PLANNED, bad, PLANNED, CellState("stalled", cause="no heartbeat"), jobs=[]))
    one.passed(found(bad, bad, PLANNED, CellState("stalled"), jobs=[]))
    first, second = told()
    about = {"grid": "g", "root": "r", "engine": "slurm", "cells": {"planned": 2, "failed": 1, "stalled": 1}, "total": 4}
    facts = {"cell": NAMES[1], "state": "failed", "failure": "out_of_memory", "cause": "too large"}
    assert first == {"event": "failed", "time": first["time"]} | about | facts
    assert (second["event"], second["cell"], second["cause"]) == ("stalled", NAMES[3], "no heartbeat")


def test_a_budget_and_the_end_are_told(engine, budget, notifier):  # noqa: F811
    one, told = notifier
    last = watch.repeat(CELLS, engine.layout, engine, True, one.passed, 200, budget(4.5))
    one.ends(last)
    stalled, end = told()  # these cells show no life
    assert (stalled["event"], stalled["cell"]) == ("stalled", NAMES[0])
    assert (end["event"], end["left"], end["cells"]) == ("end", 1, {"done": 3, "planned": 1})
    one.ends(Pass(CELLS, [PLANNED] * 4, Look({}, []), 1e9, over_budget="--max_usd 4: spent"))
    assert (told()[-1]["event"], told()[-1]["cause"], len(told())) == ("budget", "--max_usd 4: spent", 3)


@pytest.mark.parametrize(("command", "words"), [("echo no >&2; exit 3", "exit code 3: no"), ("sleep 9", "timed out")])
def test_a_command_that_fails_ends_nothing(command, words, caplog, monkeypatch):
    monkeypatch.setattr(notify, "COMMAND_SECONDS", 0.3)
    one = notify.Notifier(command, grid="g", root="r", engine="slurm")
    one.ends(found(*[PLANNED] * 4, jobs=[]))
    assert words in caplog.text
