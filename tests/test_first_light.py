"""First light's supervisor with workers that hang, die and lie; and the whole script, rehearsed and compiled."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from benchmarks.first_light import __main__ as first_light
from benchmarks.first_light import fleet, sizes, steps, supervisor
from benchmarks.first_light.supervisor import Kind, Lab, Step
from tests.test_benchmark_workers import CODE, gone

QUICK = {"run": 0.4}


@pytest.fixture
def lab(tmp_path):
    kinds = {name: Kind((sys.executable, "-c", CODE), {"PYTHONPATH": os.getcwd()}) for name in ("a", "b", "c")}
    kinds["missing"] = Kind(("/nowhere/python",))
    lab = Lab(tmp_path / "out", "device", sizes.SIZES["rehearse"], kinds, {"date": "today"})
    yield lab
    lab.close()
    shutil.rmtree(lab.scratch, ignore_errors=True)


def read(lab):
    return json.loads(lab.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_one_that_hangs_costs_its_own_rows_and_nobody_elses(lab):
    def step(lab):
        for i in range(3):
            for worker, do in (("a", "works"), ("b", "stops" if i == 1 else "works"), ("c", "not_a_number")):
                found = lab.ask(worker, {"do": do, "value": i}, needs=[f"kernel {worker}"], limits=QUICK)
                lab.keep(found, case=i, worker=worker)

    lab.run([Step("1", "all of them", 60, step)], 60)
    record = read(lab)
    status = {(row["worker"], row["case"]): row["status"] for row in record["rows"]}
    assert [status["a", i] for i in range(3)] == ["ok"] * 3
    assert [status["b", i] for i in range(3)] == ["ok", "hang", "left out"]
    assert record["bad"] == {"kernel b": "hang in step 1, stops, phase run: silent for 0.4 s in phase 'run'"}
    assert [row["seconds"] for row in record["rows"] if row["worker"] == "c"] == ["nan"] * 3
    assert record["finished"]
    assert record["steps"]["1"]["status"] == "done"


def test_the_file_is_whole_at_every_moment(lab):
    """A reader that never waits, while rows and marks are written from several threads."""
    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            seen.append(len(read(lab)["rows"]))

    def step(lab):
        def write(name):
            for i in range(60):
                lab.row(case=i, values=[float("inf")] * 200)
                lab.mark_bad(f"{name} {i}", "why")

        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    watcher = threading.Thread(target=watch)
    watcher.start()
    lab.run([Step("1", "rows", 60, step)], 60)
    stop.set()
    watcher.join()
    assert len(set(seen)) > 3
    assert seen == sorted(seen)
    assert len(read(lab)["rows"]) == 120


def test_a_step_that_raises_or_runs_out_of_time_does_not_end_the_others(lab):
    def fails(lab):
        lab.row(case="before")
        raise RuntimeError("no such thing")

    def slow(lab):
        for _ in range(5):
            lab.keep(lab.ask("a", {"do": "phases"}), case="slow")

    def last(lab):
        lab.keep(lab.ask("a", {"do": "works", "value": 1}), case="last")

    lab.run([Step("1", "fails", 0, fails), Step("2", "slow", 1, slow), Step("3", "last", 60, last)], 60)
    record = read(lab)
    assert [step["status"] for step in record["steps"].values()] == ["failed", "out of time", "done"]
    assert record["steps"]["1"]["reason"] == "RuntimeError: no such thing"
    assert [row["status"] for row in record["rows"] if row.get("case") == "slow"] == ["out of time", *["left out"] * 4]
    assert record["bad"] == {}
    assert record["rows"][-1]["status"] == "ok"


def test_no_step_begins_after_the_end(lab):
    lab.run([Step("1", "first", 60, lambda lab: time.sleep(0.2)), Step("2", "second", 60, lambda lab: lab.row(case=1))], 0.1)
    record = read(lab)
    assert [step["status"] for step in record["steps"].values()] == ["out of time", "left out"]
    assert record["rows"] == []


def test_a_worker_that_can_not_start_is_a_reason(lab):
    found = lab.ask("missing", {"do": "works"}, needs=["kernel"])
    assert found.status == "failed"
    assert "/nowhere/python" in found.reason
    assert lab.record["bad"] == {}  # no kernel is to blame


def test_a_lost_device_is_blamed_and_the_worker_started_again(lab):
    lost = lab.ask("a", {"do": "raises", "text": "CUDA_ERROR_LAUNCH_FAILED"}, needs=["x forward", "x backward"])
    assert lost.status == "failed"
    assert list(lab.record["bad"]) == ["x backward"]
    assert lab.ask("a", {"do": "works", "value": 1}).ok
    memory = lab.ask("a", {"do": "raises", "text": "RESOURCE_EXHAUSTED"}, needs=["x forward"])
    assert memory.status == "failed"
    assert list(lab.record["bad"]) == ["x backward"]


def test_a_slow_compilation_is_forgiven_once_and_want_of_memory_always(lab):
    limits = {"lower": 0.1, "compile": 0.1}
    assert lab.ask("a", {"do": "compiles"}, needs=["x"], limits=limits).status == "hang"
    assert lab.record["bad"] == {}
    assert lab.ask("a", {"do": "compiles"}, needs=["x"], limits=limits).status == "hang"
    assert list(lab.record["bad"]) == ["x"]
    lost = lab.ask("b", {"do": "raises", "text": "CUDA_ERROR_OUT_OF_MEMORY"}, needs=["y"])
    assert lost.status == "failed"
    assert lab.ask("b", {"do": "works", "value": 1}, needs=["y"]).ok
    died = supervisor.Outcome("died", {}, "exit code 1: RESOURCE_EXHAUSTED: out of memory", "run", {})
    assert not lab._is_to_blame("y", died, alive=False)
    assert lab._is_to_blame("y", died._replace(reason="signal SIGSEGV"), alive=False)


def test_a_step_has_what_those_before_left_and_may_begin_beside_one(lab):
    began = []

    def begin(lab):
        began.append("later")
        lab.early["later"] = 5

    steps_of = [
        Step("1", "first", 30, lambda lab: began.append("first")),
        Step("2", "later", 30, lambda lab: began.append(lab.early.pop("later")), beside="1", begin=begin),
    ]
    lab.run(steps_of, 600)
    assert began == ["later", "first", 5]
    limits = [step["limit_s"] for step in read(lab)["steps"].values()]
    assert limits[0] == 30
    assert 55 <= limits[1] <= 60


def test_turns_go_round_and_lose_only_who_fails(lab):
    asked = {
        "a": ("a", {"do": "works", "value": 1, "case": "a"}, []),
        "b": ("b", {"do": "segfaults", "case": "b"}, ["kernel b"]),
        "c": ("c", {"do": "not_a_number", "case": "c"}, []),
    }
    lab.ask = lambda worker, request, needs=(), ask=lab.ask: _with_seconds(ask(worker, request, needs=needs))
    seconds = lab.turns(asked, turns=3)
    assert seconds["a"] == [1.0, 1.0, 1.0]
    assert seconds["b"] == []
    assert len(seconds["c"]) == 3
    (row,) = lab.rows
    assert (row["case"], row["status"]) == ("b", "died")
    assert "SIGSEGV" in row["reason"]


def _with_seconds(outcome):
    return outcome._replace(result={"seconds": outcome.result.get("value", 2.0)}) if outcome.ok else outcome


def test_commands_end_with_their_children(lab):
    lab.deadline = time.monotonic() + 30
    found = lab.command([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], "hello.txt")
    assert (found.status, found.result["exit_code"], found.result["output"]) == ("failed", 3, "hello\n")
    found = lab.command(["sh", "-c", "sleep 3600 & echo $!; wait"], "sleep.txt", seconds=0.5)
    assert found.status == "out of time"
    pid = int(found.result["output"])
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(pid)


def test_an_earlier_run_is_not_overwritten(lab):
    with pytest.raises(FileExistsError, match="has an earlier run: give another --out"):
        Lab(lab.out, "device", sizes.SIZES["rehearse"], {}, {})


def test_few_files_are_left_and_the_logs_are_in_one(lab):
    lab.run([Step("1", "dies", 60, lambda lab: lab.ask("a", {"do": "exits"}))], 60)
    assert sorted(path.name for path in lab.out.iterdir()) == ["first-light.json", "logs.tar.gz"]
    with tarfile.open(lab.out / "logs.tar.gz") as archive:
        assert b"no memory left" in archive.extractfile("logs/a.txt").read()
    assert not lab.scratch.exists()


def test_one_that_is_told_to_end_keeps_the_record_and_leaves_no_worker(tmp_path):
    """As a time limit ends it, in the middle of a step."""
    code = "import sys; from benchmarks.first_light.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "--rehearse", "--only", "0", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().startswith("  0  environment")
    deadline = time.monotonic() + 60
    while not (workers := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    assert workers
    assert all(gone(pid) for pid in workers)
    record = json.loads((tmp_path / "out" / "first-light.json").read_text())
    assert (record["finished"], record["steps"]["0"]["status"]) == (False, "out of time")


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_json_has_no_nan():
    values = {"a": [float("nan"), -float("inf"), 1.5, None, True, "x"], 3: (float("inf"),)}
    assert supervisor.printable(values) == {"a": ["nan", "-inf", 1.5, None, True, "x"], "3": ["inf"]}


def test_the_limits_of_the_steps_add_up_to_one_call():
    assert sum(step.seconds for step in steps.STEPS) <= first_light.STOP_AFTER == 540
    assert [step.name for step in steps.STEPS] == ["0", "1", "1b", "2", "3", "4", "5", "6", "7", "8", "9", "10"]


def test_every_step_asks_workers_that_there_are(tmp_path):
    """In each mode, with a PyTorch: no step names a worker that the fleet lacks, or raises where every answer is an error."""
    for mode in supervisor.PATIENCE:
        asked = []

        class Silent(Lab):
            def save(self):
                pass

            def ask(self, worker, request, *, needs=(), limits=None, asked=asked):
                assert worker in self._kinds
                asked.append((worker, request["do"]))
                return supervisor.Outcome("failed", {}, "nobody is there", "start", {})

            def start(self, *workers):
                assert set(workers) <= set(self._kinds)

            def command(self, argv, log, *, env=None, seconds=None):
                return supervisor.Outcome("failed", {}, "nothing runs", "run", {})

        kinds = fleet.kinds(mode, sizes.SIZES[mode], "h100", sys.executable)
        silent = Silent(tmp_path / mode, mode, sizes.SIZES[mode], kinds, {"target": "h100"})
        silent.run(steps.STEPS, 1e6)
        assert {name: step["reason"] for name, step in silent.record["steps"].items() if step["status"] != "done"} == {}
        assert len(asked) > 30
        assert all(row["status"] for row in silent.rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "1,99"], "unknown step '99': there are 0, 1, 1b, 2"),
        (["--stop_after", "0"], "'0' is no number of seconds above 0"),
        (["--compile_only", "b200"], "invalid choice: 'b200'"),
        (["--report", "/nowhere/first-light.json"], "No such file"),
        ([], "there is no NVIDIA GPU here: --rehearse"),
    ],
)
def test_options_that_can_not_be_are_told_before_anything_starts(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        first_light.main([*arguments, "--out", str(tmp_path / "out"), *(["--rehearse"] if "--only" in arguments else [])])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_check_fails_on_what_is_not_right():
    steps_done = {"1": {"status": "done"}, "2": {"status": "out of time"}}
    rows = [{"step": "1", "case": name, "status": name} for name in ("ok", "compiled", "refused", "wrong", "left out")]
    assert [line.partition(":")[0] for line in first_light._amiss({"steps": steps_done, "rows": rows})] == [
        "step 2",
        "step 1, wrong, ",
        "step 1, left out, ",
    ]


@pytest.mark.thorough
def test_a_rehearsal_of_all_steps(tmp_path, capsys):
    """The same code as on a device, with interpreted kernels: every step is done, and what is there to run is right."""
    assert first_light.main(["--rehearse", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "first-light.json").read_text())
    assert {name: step["status"] for name, step in record["steps"].items()} == {step.name: "done" for step in steps.STEPS}
    allowed = {"ok", "refused"} | ({"left out"} if first_light._torch_python(None) is None else set())
    assert [row for row in record["rows"] if row["status"] not in allowed] == []
    assert record["bad"] == {}
    right = {row["implementation"] for row in record["rows"] if row["status"] == "ok" and row["step"] in ("2", "5")}
    assert right >= {"pallas_gpu", "pallas_triton"}
    assert "rehears" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.parametrize("target", first_light.TARGETS[:1])
def test_a_program_of_every_step_compiles_ahead_of_time(tmp_path, target):
    assert first_light.main(["--compile_only", target, "--one_of_each", "--check", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "first-light.json").read_text())
    assert {name: step["status"] for name, step in record["steps"].items()} == {step.name: "done" for step in steps.STEPS}
    failed = [row for row in record["rows"] if row["status"] not in ("compiled", "ok", "refused", "left out")]
    assert failed == []
    compiled = {row["step"] for row in record["rows"] if row["status"] == "compiled"}
    assert compiled >= {"1", "1b", "2", "3", "4", "5", "6", "7", "8", "9", "10"}
