"""When a launcher that watches ends, and what it goes on through: on an engine in memory, by a clock that waits move."""

import itertools

import pytest

from gqa_jax import storage
from gqa_jax.errors import ConfigError
from launch import grid, run, state, watch
from launch.cells import Layout
from launch.executors import base
from launch.executors.base import RUNNING, Job, Look, Submission, SubmitError
from tests import grid_fakes

HOUR = 3600.0


class Clock:
    """In the place of the module time."""

    def __init__(self):
        self.now = 1.8e9

    def time(self):
        return self.now

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Engine(base.Executor):
    """Cells take an hour each. `says` maps (what is asked, cell or None) to the error that is the answer, while it is there."""

    def __init__(self, layout, clock):
        super().__init__(base.Options("slurm", max_jobs=2), layout)
        self.clock, self.says, self.began, self.asked = clock, {}, {}, []
        self.cells = {}

    def _ask(self, what, cell=None):
        self.asked.append((self.clock.now, what, cell))
        for key in ((what, cell), (what, None)):
            if key in self.says:
                raise self.says[key]

    def jobs(self):
        self._ask("jobs")
        for name, at in list(self.began.items()):
            if self.clock.now - at > HOUR:
                del self.began[name]
                grid_fakes.finish(self.cells[name], self.layout)
                path = self.layout.cell(name) / "result.json"
                storage.write_json(path, storage.read_json(path) | {"device_seconds": 4 * HOUR})
        return Look({name: Job(name, "1", RUNNING, since=at) for name, at in self.began.items()}, [])

    def submission(self, cell):
        return Submission(cell.name, "submit")

    def submit(self, cell):
        self._ask("submit", cell.name)
        self.cells[cell.name] = cell
        self.began[cell.name] = self.clock.now
        return Job(cell.name, "1", RUNNING)

    def cancel(self, cells):
        self._ask("cancel")

    def wait(self, seconds):
        self.clock.sleep(seconds)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (run, watch, state, base):
        monkeypatch.setattr(module, "time", found, raising=False)
    return found


@pytest.fixture
def engine(tmp_path, clock):
    return Engine(Layout(tmp_path), clock)


CELLS = grid.cells(grid_fakes.small_grid())[:4]
NAMES = [cell.name for cell in CELLS]


def watched(engine, seen=lambda now: None, on=True):
    passes = []

    def on_pass(now):
        passes.append(now)
        seen(now)
        assert engine.clock.now < 1.8e9 + 48 * HOUR, "it does not end"

    last = watch.repeat(CELLS, engine.layout, engine, on, on_pass, 200)
    return last, passes


def test_it_ends_when_all_is_done_and_reads_what_is_done_once(engine, monkeypatch):
    read, of = [], state.of
    monkeypatch.setattr(state, "of", lambda cell, *rest: read.append(cell) or of(cell, *rest))
    last, passes = watched(engine)
    assert [now.state for now in last.states] == ["done"] * 4
    assert engine.clock.now - 1.8e9 == pytest.approx(2 * HOUR, abs=600)
    assert len(passes) > 30
    half = read.count(CELLS[0]), read.count(CELLS[3])  # done after one hour, after two
    assert half[0] == pytest.approx(len(passes) / 2, abs=5)
    assert half[1] == pytest.approx(len(passes), abs=5)


ERRORS = [SubmitError("slurm_load_jobs error"), ConfigError("PERMISSION_DENIED: no"), OSError(116, "Stale file handle")]


@pytest.mark.parametrize("error", ERRORS, ids=["engine", "denied", "storage"])
def test_an_outage_of_ten_hours_only_makes_pauses_longer(engine, error):
    def seen(now):
        hours = (engine.clock.now - 1.8e9) / HOUR
        engine.says = {("jobs", None): error} if 0.5 < hours < 10.5 else {}

    last, passes = watched(engine, seen)
    assert [now.state for now in last.states] == ["done"] * 4
    missed = [now for now in passes if now.notes]
    assert missed[0].notes == [f"slurm can't be asked: {error}"]
    assert len(missed) == pytest.approx(10 * HOUR / watch.LONGEST_PAUSE_SECONDS + 5, abs=3)
    assert not any(now.submitted for now in missed)


def test_an_outage_at_the_start_is_waited_for_where_it_watches(engine):
    engine.says = {("jobs", None): SubmitError("squeue has not ended after 120 s")}
    with pytest.raises(SubmitError, match="has not ended"):
        watched(engine, on=False)

    def seen(now):
        assert len(now.states) == 4
        if engine.clock.now > 1.8e9 + HOUR:
            engine.says = {}

    assert [now.state for now in watched(engine, seen)[0].states] == ["done"] * 4
    engine.says = {("jobs", None): SubmitError("busy")}

    def act():
        if engine.clock.now > 1.8e9 + 9 * HOUR:
            engine.says = {}
        return engine.jobs()

    assert watch.when_it_answers(act, engine, True) == {}
    engine.says = {("jobs", None): SubmitError("busy")}
    with pytest.raises(SubmitError, match="busy"):
        watch.when_it_answers(engine.jobs, engine, False)


def test_a_cell_that_is_refused_for_ever_is_given_up_alone(engine):
    engine.says = {("submit", NAMES[0]): ConfigError("sbatch refuses it: Invalid feature specification")}
    last, _ = watched(engine)
    assert [now.state for now in last.states] == ["planned", "done", "done", "done"]
    (why,) = last.held.values()
    said = "refused 15 times in 6.0 h, given up until the next `run`: sbatch refuses it: Invalid feature specification"
    assert why == said
    times = [at for at, what, cell in engine.asked if (what, cell) == ("submit", NAMES[0])]
    assert [round((b - a) / 60) for a, b in itertools.pairwise(times)][3:7] == [10, 17, 30, 30]


def test_a_refusal_that_passes_does_not_count(engine):
    def seen(now):
        if engine.clock.now > 1.8e9 + 5 * HOUR:
            engine.says = {}

    engine.says = {("submit", name): ConfigError("QOS") for name in NAMES}
    last, _ = watched(engine, seen)
    assert [now.state for now in last.states] == ["done"] * 4
    assert last.held == {}


def test_a_quota_is_waited_for(engine):
    def seen(now):
        assert len(now.refused) <= base.REFUSALS
        if engine.clock.now > 1.8e9 + 5 * HOUR:
            engine.says = {}

    engine.says = {("submit", None): SubmitError("RESOURCE_EXHAUSTED")}
    last, _ = watched(engine, seen)
    assert [now.state for now in last.states] == ["done"] * 4


def test_without_a_watch_what_would_be_refused_always_is_an_error_if_nothing_else_was_taken(engine):
    engine.says = {("submit", None): ConfigError("sbatch refuses it")}
    with pytest.raises(ConfigError, match="sbatch refuses it"):
        watched(engine, on=False)
    assert len([what for _, what, _ in engine.asked if what == "submit"]) == 2  # of max_jobs
    engine.says = {("submit", NAMES[0]): ConfigError("sbatch refuses it")}
    last, _ = watched(engine, on=False)
    assert (last.refused, last.refused_always) == ({NAMES[0]: "sbatch refuses it"}, {NAMES[0]})
    assert [job.cell for job in last.submitted] == [NAMES[1]]


def test_the_record_of_a_submission_has_the_time_before_it(engine, clock):
    submit = engine.submit

    def slow(cell):
        clock.now += 100
        return submit(cell)

    engine.submit = slow
    before = clock.now
    list(run.submit(CELLS[:2], engine.jobs(), engine.layout, engine))
    for cell, at in zip(CELLS[:2], (before, before + 100), strict=True):
        (path,) = (engine.layout.cell(cell.name) / "submissions").iterdir()
        assert storage.read_json(path)["time"] == at


def test_where_the_engine_cannot_be_asked_a_cell_that_shows_life_runs(engine, clock):
    cell = CELLS[0]
    for name, age in ((NAMES[0], 5.0), (NAMES[1], 700.0)):
        folder = engine.layout.cell(name)
        (folder / "attempts").mkdir(parents=True)
        storage.write_json(folder / "attempts" / "00000.json", {"time": clock.now - 900, "first_step": 0})
        storage.write_json(folder / "heartbeat.json", {"time": clock.now - age, "step": 3})
    known = state.of_folders(CELLS, engine.layout, clock.now)
    assert [now.state for now in known] == ["running", "lost", "planned", "planned"]
    assert known[0].step == 3
    assert state.of_all([cell], engine.layout, clock.now, {}, {cell.name: known[1]}) == [known[1]]
