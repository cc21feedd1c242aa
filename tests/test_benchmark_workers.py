"""Workers that really hang, die and write nonsense, and what it costs whoever asks."""

import os
import signal
import sys
import time

import pytest

from benchmarks import workers
from benchmarks.workers import Worker

#: A worker with handlers that misbehave, each in its own way.
CODE = """
import ctypes, json, os, signal, subprocess, sys, time
from benchmarks import workers

def works(phase, value, **_):
    phase("compile"); phase("run")
    return {"value": value}

def sleeps(phase, seconds=3600, **_):
    phase("run"); time.sleep(seconds)
    return {}

def spins(phase, **_):
    phase("run")
    while True: pass

def stops(phase, **_):
    phase("run"); os.kill(os.getpid(), signal.SIGSTOP)

def segfaults(phase, **_):
    phase("run"); ctypes.string_at(0)

def exits(phase, **_):
    phase("compile"); print("no memory left", file=sys.stderr); os._exit(137)

def raises(phase, text, **_):
    phase("run"); raise RuntimeError(text)

def not_a_number(phase, **_):
    return {"seconds": float("nan")}

def forks(phase, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    phase("run"); print(child.pid, file=open(os.environ["CHILD"], "w"), flush=True); time.sleep(3600)

def phases(phase, **_):
    for _i in range(40): phase("run"); time.sleep(0.05)
    return {}

def compiles(phase, **_):
    phase("lower"); time.sleep(0.3); phase("compile"); time.sleep(0.3)
    return {}

handlers = works, sleeps, spins, stops, segfaults, exits, raises, not_a_number, forks, phases, compiles
workers.serve({f.__name__: f for f in handlers})
"""
LIMITS = {"start": 60.0, "run": 0.5}


@pytest.fixture
def start(tmp_path):
    """Starts workers of a code; ends them after the test."""
    found = []

    def make(code=CODE, **options):
        found.append(Worker([sys.executable, "-c", code], tmp_path / "log.txt", cwd=os.getcwd(), **options))
        return found[-1]

    yield make
    for worker in found:
        worker.kill()


def gone(pid):
    """Whether a process has ended (a zombie of another parent counts)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_an_answer_with_the_time_of_each_phase(start):
    worker = start()
    outcome = worker.ask({"do": "works", "value": 3}, limits=LIMITS)
    assert (outcome.status, outcome.result, outcome.reason) == ("ok", {"value": 3}, "")
    assert list(outcome.seconds) == ["start", "compile", "run"]
    assert worker.ask({"do": "works", "value": 4}, limits=LIMITS).result == {"value": 4}
    worker.close()
    assert not worker.alive


@pytest.mark.parametrize("way", ["sleeps", "spins", "stops"])
def test_silence_costs_the_limit_of_its_phase_and_the_worker(start, way):
    worker = start()
    worker.ask({"do": "works", "value": 1}, limits=LIMITS)
    began = time.monotonic()
    outcome = worker.ask({"do": way}, limits=LIMITS)
    assert (outcome.status, outcome.phase) == ("hang", "run")
    assert outcome.reason == "silent for 0.5 s in phase 'run'"
    assert time.monotonic() - began > 0.5
    assert not worker.alive
    assert worker.ask({"do": "works", "value": 1}, limits=LIMITS).status == "died"


@pytest.mark.parametrize(("way", "said"), [("segfaults", "SIGSEGV"), ("exits", "exit code 137: no memory left")])
def test_a_worker_that_dies_says_how(start, way, said):
    outcome = start().ask({"do": way}, limits=LIMITS)
    assert outcome.status == "died"
    assert said in outcome.reason


def test_an_error_leaves_the_worker_alive_unless_the_device_is_lost(start):
    worker = start()
    outcome = worker.ask({"do": "raises", "text": "RESOURCE_EXHAUSTED: out of memory"}, limits=LIMITS)
    assert (outcome.status, outcome.reason) == ("failed", "RuntimeError: RESOURCE_EXHAUSTED: out of memory")
    assert worker.alive
    outcome = worker.ask({"do": "raises", "text": "CUDA_ERROR_ILLEGAL_ADDRESS"}, limits=LIMITS)
    assert outcome.status == "failed"
    assert not worker.alive


def test_nan_is_an_answer(start):
    outcome = start().ask({"do": "not_a_number"}, limits=LIMITS)
    assert outcome.ok
    assert outcome.result["seconds"] != outcome.result["seconds"]


@pytest.mark.parametrize(
    ("printed", "status"),
    [
        ("nonsense", "died"),  # it ends without an answer
        ('{"result": 3}', "nonsense"),
        ('{"result": [NaN]}', "nonsense"),
        ('nonsense\\n[1]\\n{"phase": 3}\\n{"result": {}}', "ok"),
    ],
)
def test_what_is_no_message_is_counted_and_kept(start, printed, status):
    worker = start(f"import sys; sys.stdin.readline(); print('{printed}', flush=True)")
    outcome = worker.ask({"do": "works"}, limits=LIMITS)
    assert outcome.status == status
    if "nonsense" in printed:
        assert "that are no message" in outcome.reason
        assert "nonsense" in worker.log.read_text()


def test_endless_noise_is_silence(start):
    worker = start("import sys, time\nsys.stdin.readline()\nwhile True: print('x' * 1000, flush=True); time.sleep(0.001)")
    assert worker.ask({"do": "works"}, limits={"start": 0.5}).status == "hang"


def test_children_end_with_the_worker(start, tmp_path):
    worker = start(env={"CHILD": str(tmp_path / "child")})
    assert worker.ask({"do": "forks"}, limits={**LIMITS, "run": 3.0}).status == "hang"
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(pid)


def test_news_of_a_phase_begins_its_time_again_but_compiling_goes_on_from_lowering(start):
    worker = start()
    assert worker.ask({"do": "phases"}, limits=LIMITS).ok  # 2 s in all, of 0.5 s each
    assert worker.ask({"do": "compiles"}, limits={"lower": 2.0, "compile": 2.0}).ok
    outcome = worker.ask({"do": "compiles"}, limits={"lower": 0.5, "compile": 0.5})
    assert (outcome.status, outcome.phase) == ("hang", "compile")


def test_the_deadline_ends_what_is_not_silent(start):
    worker = start()
    worker.ask({"do": "works", "value": 1}, limits=LIMITS)
    outcome = worker.ask({"do": "phases"}, limits=LIMITS, deadline=time.monotonic() + 0.3)
    assert outcome.status == "out of time"
    assert not worker.alive


def test_a_stopped_worker_can_be_closed(start):
    worker = start()
    worker.ask({"do": "works", "value": 1}, limits=LIMITS)
    os.kill(worker._process.pid, signal.SIGSTOP)
    worker.close(seconds=0.2)
    assert not worker.alive


def test_an_error_in_a_line():
    assert workers.explain(ValueError("two\n  lines")) == "ValueError: two lines"
    assert workers.explain(ValueError()) == "ValueError"
