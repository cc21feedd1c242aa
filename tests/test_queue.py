"""What engines do whose names of jobs are not unique, on one that is a list in memory."""

import dataclasses
import json
import time

import pytest

from gqa_jax import storage
from launch import grid, run
from launch.cells import Layout
from launch.executors import base, queue
from launch.executors.base import DEAD, QUEUED, RUNNING, Job, Submission, SubmitError
from launch.executors.queue import Record
from tests import grid_fakes


class Listed(queue.Executor):
    """An engine whose queue is `listed`; a submission puts `arrives` there."""

    def __init__(self, layout, *listed):
        super().__init__(base.Options("listed"), layout)
        self.listed, self.arrives, self.says, self.ended = list(listed), [], None, []

    def records(self):
        found = {}
        for record in sorted(self.listed, key=lambda record: record.id):
            found.setdefault(record.cell, []).append(record)
        return found

    def submission(self, cell):
        return Submission(cell.name, "submit")

    def launch(self, cell):
        self.listed += self.arrives
        return self.says

    def end(self, records):
        self.ended += [record.id for record in records]


A, B = grid.cells(grid_fakes.small_grid())[:2]


def of(number, state=QUEUED, detail="", cell=A.name, **values):
    return Record(cell, number, state, detail, **values)


RUNS, WAITS, ENDS = of(7, RUNNING, since=5.0, where="n1"), of(8), of(6, RUNNING, "ending", ending=True)
NEVER = of(5, DEAD, "no such partition", failure="job 5: no such partition", is_final=True)
OVER = of(4, None, "failed")


@pytest.fixture
def engine(tmp_path):
    layout = Layout(tmp_path)
    layout.cell(A.name).mkdir(parents=True)
    storage.write_json(layout.cell(A.name) / "config.json", A.stored())
    return lambda *listed: Listed(layout, *listed)


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        ([WAITS, RUNS, ENDS, NEVER, OVER], Job(A.name, "7", RUNNING, "", 5.0, "n1")),
        ([ENDS, NEVER, OVER], Job(A.name, "6", RUNNING, "ending")),
        ([NEVER, OVER], Job(A.name, "5", DEAD, "no such partition")),
        ([OVER], None),
    ],
)
def test_the_job_of_a_cell_is_the_first_that_lives_else_one_that_ends_else_a_dead_one(engine, listed, shown):
    assert engine(*listed).jobs() == ({A.name: shown} if shown else {})


def test_what_is_there_is_not_submitted_again(engine):
    one = engine(WAITS, RUNS)
    one.arrives = [of(9)]
    assert one.submit(A).id == "7"
    assert one.listed == [WAITS, RUNS]


@pytest.mark.parametrize(
    ("there", "words"), [(ENDS, "job 6 of .* is still ending"), (NEVER, "job 5 .* be cancelled first: no")]
)
def test_what_must_be_gone_first(engine, there, words):
    one = engine(there)
    with pytest.raises(SubmitError, match=words):
        one.submit(A)
    assert one.listed == [there]


def test_of_two_that_submit_at_once_the_lowest_id_is_kept(engine):
    one = engine(OVER)
    one.arrives = [of(10), of(9)]
    assert one.submit(A).id == "9"
    assert one.ended == [10]


def test_a_job_that_is_over_at_once_is_the_answer(engine):
    one = engine(OVER)
    one.arrives = [of(9, None, "failed_prechecks")]
    assert one.submit(A) == Job(A.name, "9", QUEUED, "ended: failed_prechecks")
    one = engine()
    one.says = 9  # and it is forgotten by now
    assert one.submit(A) == Job(A.name, "9", QUEUED)


def test_a_job_that_is_not_listed(engine):
    with pytest.raises(SubmitError, match=f"listed took {A.name} and does not list it"):
        engine(OVER).submit(A)


def test_what_lives_or_waits_in_vain_is_cancelled(engine):
    one = engine(WAITS, RUNS, ENDS, NEVER, OVER, dataclasses.replace(RUNS, cell=B.name, id=11))
    one.cancel([A.name, "unknown"])
    assert one.ended == [5, 7, 8]
    one.records = None
    one.cancel([])  # asks nothing


def test_second_jobs_are_removed(engine):
    one = engine(WAITS, RUNS, ENDS, OVER)
    assert one.reconcile(one.jobs()) == [f"{A.name} had 2 jobs: cancelled all but 7"]
    assert one.ended == [8]


@pytest.mark.parametrize(
    ("minutes", "then", "ended"), [(50, "hangs", []), (70, "hangs", [7]), (70, "beats", []), (70, "ends", [])]
)
def test_a_job_that_is_silent_for_an_hour_is_ended_to_start_again(engine, monkeypatch, minutes, then, ended):
    """Not one whose heartbeat comes while the launcher waits, whatever clocks say: one was set, or a machine slept; and not
    one that has ended by itself.
    """
    monkeypatch.setattr(run, "SECOND_LOOK_SECONDS", 0.01)
    folder, now = Layout(engine().layout.root).cell(A.name), time.time()
    storage.write_json(folder / "heartbeat.json", {"time": now - 60 * minutes, "step": 3})
    one = engine(of(7, RUNNING, since=now - 60 * minutes))

    def wait(seconds):
        beat = {"time": now - 59 * minutes, "step": 4} if then == "beats" else {"time": now - 60 * minutes}
        storage.write_json(folder / "heartbeat.json", beat)
        if then == "ends":
            one.listed.clear()

    one.wait = wait
    found = run.advance([A], one.layout, one)
    assert one.ended == ended
    assert found.notes == [f"{A.name} has been silent for 60 minutes: cancelled, to start again"] * len(ended)


@pytest.mark.parametrize(("is_final", "kind"), [(True, "error"), (False, "infrastructure")])
def test_why_a_job_came_to_nothing_is_left_in_the_folder(engine, is_final, kind):
    one = engine(dataclasses.replace(NEVER, is_final=is_final, ended=12.0))
    assert one.reconcile(one.jobs()) == [f"{A.name}: job 5: no such partition; cancelled"]
    assert one.ended == [5]
    file = one.layout.cell(A.name) / "host-failure.json"
    assert json.loads(file.read_text()) == {"class": kind, "reason": "job 5: no such partition", "time": 12.0, "job": "5"}
    file.unlink()
    (file.parent / "result.json").touch()
    one.reconcile(one.jobs())
    assert not file.exists()


def test_why_an_earlier_job_came_to_nothing_is_gone_when_the_cell_is_submitted_again(engine):
    one = engine()
    one.arrives, one.says = [WAITS], 8
    file = one.layout.cell(A.name) / "host-failure.json"
    storage.write_json(file, {"class": "infrastructure", "reason": "no such partition", "time": 12.0, "job": "5"})
    (done,) = run.submit([A], one.jobs(), one.layout, one)
    assert done.result.id == "8"
    assert not file.exists()


def test_a_pass_over_a_hundred_cells_looks_twice_and_submits_each_once(engine, monkeypatch):
    cells = grid.cells(grid.Grid("hundred", [grid_fakes.config(seed=seed) for seed in range(100)], [1024]))
    one, looks, launched = engine(), [], []
    records = one.records
    monkeypatch.setattr(one, "records", lambda: looks.append(len(one.listed)) or records())
    monkeypatch.setattr(
        one, "launch", lambda cell: launched.append(cell) or one.listed.append(of(len(launched), cell=cell.name))
    )
    found = run.advance(cells, one.layout, one)
    assert (looks, launched) == ([0, 100], cells)
    assert [int(job.id) for job in found.submitted] == list(range(1, 101))
    assert run.advance(cells, one.layout, one).submitted == []
    assert looks == [0, 100, 100]
    one.listed[7] = dataclasses.replace(one.listed[7], state=DEAD, failure="held")  # what is removed is looked at again
    assert len(run.advance(cells, one.layout, one).notes) == 1
    assert looks == [0, 100, 100, 100, 100]


def test_three_refusals_in_a_row_end_a_pass_and_those_before_are_kept(engine, monkeypatch):
    cells = grid.cells(grid_fakes.small_grid())
    one, asked = engine(), []

    def launch(cell):
        asked.append(cell.name)
        if len(asked) > 1:
            raise SubmitError("QOSMaxSubmitJobPerUserLimit")
        return 70

    monkeypatch.setattr(one, "launch", launch)
    found = run.advance(cells, one.layout, one)
    assert asked == [cell.name for cell in cells[:4]]
    assert [job.cell for job in found.submitted] == [cells[0].name]
    assert found.refused == dict.fromkeys(asked[1:], "QOSMaxSubmitJobPerUserLimit")
    assert found.refused_always == set()
