"""Random command lines and grid files (`benchmarks/fuzz.py`): each is answered with a sentence and a documented exit code."""

import contextlib
import signal
import time

import pytest

from benchmarks import fuzz

CASES = {"command_lines": 60, "grids": 80}


@pytest.mark.parametrize("kind", CASES)
def test_no_case_is_a_traceback_a_hang_or_no_sentence(kind):
    fuzz.outcomes.clear()
    assert list(fuzz.run(kind, range(CASES[kind]), seed=1)) == []
    refused, answered = fuzz.outcomes[2], fuzz.outcomes[0]
    assert refused + answered > 0.8 * CASES[kind]
    assert min(refused, answered) >= 5  # neither all good nor all bad


def said(argv, act, monkeypatch):
    monkeypatch.setattr(fuzz.launch, "main", act)
    return list(fuzz.faults(argv, fuzz.call(argv)))


def test_what_a_case_must_not_do_is_seen(monkeypatch, capsys):
    def answers(code=0, out="", err=""):
        def act(_):
            print(out, end="")
            print(err, end="", file=fuzz.sys.stderr)
            return code

        return act

    def fails(_):
        raise KeyError("x")

    def leaves(_):
        raise SystemExit(2)

    def hangs(_):
        with contextlib.suppress(Exception):
            time.sleep(30)

    good = "launch: --slots 9: this machine has 2 CPUs, use 1 to 2\n"
    assert said(["run"], answers(2, err=good), monkeypatch) == []
    assert said(["run", "--json"], answers(0, "[1]"), monkeypatch) == []
    for act, fault in (
        (fails, "KeyError: 'x' in test_fuzz.py:"),
        (leaves, "no sentence: ''"),
        (answers(5), "exit code 5"),
        (answers(0, "Traceback (most recent call last)"), "a traceback is printed"),
        (answers(2, err="launch: a\nb\n"), "no sentence: 'b'"),
        (answers(2, err="launch: \0\n"), "no sentence: 'launch: \\x00'"),
        (answers(2, err="launch: 'NoneType' object is not iterable\n"), "words of a program, 'NoneType'"),
        (answers(0, "{", good), "no JSON: "),
    ):
        (found,) = said(["run", "--json"] if fault == "no JSON: " else ["run"], act, monkeypatch)
        assert found.startswith(fault)
    monkeypatch.setattr(fuzz, "HANGS_SECONDS", 1)
    (found,) = said(["run"], hangs, monkeypatch)
    assert found.startswith("hangs in test_fuzz.py:")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert capsys.readouterr().out == ""
