"""Processes that measure when they are told to, and whose silence is bounded. Imports no jax.

A worker reads requests and writes messages, a line of JSON each:

    -> {"do": "prepare", "case": "16K, 8/1", ...}      one at a time
    <- {"phase": "compile"}                            before each phase of the work
    <- {"result": {...}} or {"error": "..."}           the answer

Whoever asks waits no longer than a phase may take (`LIMITS`). A worker that is silent for longer, that dies or that answers
what nobody can read costs its own rows: it is killed with all of its children, and `Outcome` says what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds of silence in each phase. "lower" and "compile" share theirs: the clock goes on from one to the other.
LIMITS = {"start": 60.0, "lower": 60.0, "compile": 60.0, "run": 15.0, "check": 15.0}
TOGETHER = ({"lower", "compile"},)
LONGEST_LINE = 2**20  # bytes; what is longer is no message
ENDING_S = 5.0  # for a killed process to go: one that waits within a driver stays, and is left behind
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")
#: Words of errors after which a CUDA context answers nothing else, but for want of memory: the process is of no more use.
POISONED = ("CUDA_ERROR_", "illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction")


class Outcome(NamedTuple):
    """How a request ended. `seconds` has the duration of each phase, `phase` the one in which it ended."""

    status: str  # "ok", "failed" (the worker says why), "hang", "died", "nonsense", "out of time"
    result: dict[str, Any]
    reason: str
    phase: str
    seconds: dict[str, float]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class Worker:
    """A process that answers requests; its standard error goes to a file. Ended, with its children, by `close` or `kill`."""

    def __init__(self, argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None):
        """Starts the process. `env` is added to the environment of this one. Raises OSError where there is no such program."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict(env or {}),
                cwd=cwd,
                start_new_session=True,  # a group of its own: its children end with it
            )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self, request: Mapping[str, Any], *, limits: Mapping[str, float] | None = None, deadline: float = float("inf")
    ) -> Outcome:
        """Sends a request and waits for the answer.

        Args:
          request: becomes a line of JSON; "do" names what to do.
          limits: seconds of silence by phase, beside `LIMITS`.
          deadline: of `time.monotonic`; a worker that has not answered by then is killed, whatever it says.
        """
        allowed = LIMITS | dict(limits or {})
        phase, began, phase_began = "start", time.monotonic(), time.monotonic()
        seconds: dict[str, float] = {}
        noise = 0

        def end(status: str, reason: str = "", result: dict[str, Any] | None = None) -> Outcome:
            seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - phase_began
            if noise:
                reason = f"{reason}{'; ' if reason else ''}{noise} lines that are no message, see {self.log.name}"
            return Outcome(status, result or {}, reason, phase, seconds)

        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError, ValueError):
            return end("died", self._last_words())
        while True:
            silent_until = began + allowed.get(phase, LIMITS["run"])
            try:
                line = self._lines.get(timeout=max(0.0, min(silent_until, deadline) - time.monotonic()))
            except queue.Empty:
                self.kill()
                if deadline <= silent_until:
                    return end("out of time", f"the step's time ended in phase {phase!r}")
                return end("hang", f"silent for {allowed.get(phase, LIMITS['run']):g} s in phase {phase!r}")
            if line is None:
                return end("died", self._last_words())
            message = _message(line)
            match message:
                case {"phase": str(name)}:
                    now = time.monotonic()
                    seconds[phase] = seconds.get(phase, 0.0) + now - phase_began
                    if not any({phase, name} <= group for group in TOGETHER) or phase == name:
                        began = now
                    phase, phase_began = name, now
                case {"result": dict(result)}:
                    return end("ok", result=result)
                case {"result": _}:
                    return end("nonsense", f"its result is {line[:200].decode(errors='replace')!r}")
                case {"error": str(reason)}:
                    if any(word in reason for word in POISONED) and not lacks_memory(reason):
                        self.kill()
                    return end("failed", reason)
                case _:
                    noise += 1
                    with self.log.open("ab") as log:
                        log.write(line)

    def close(self, seconds: float = 5.0) -> None:
        """Lets the process end by itself, and kills what is left of it."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """Ends the process and all of its children at once, stopped ones too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._reader.join(1.0)  # nobody is left who writes

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._process.stdout as stream:
            while line := stream.readline(LONGEST_LINE):
                self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        """How the process ended, and the last that it said."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it closed its output and went on"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        with contextlib.suppress(OSError):
            lines = [line for line in self.log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
            return f"{how}: {' | '.join(lines[-3:])[-500:]}" if lines else how
        return how


def _message(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def lacks_memory(reason: str) -> bool:
    """Whether an error says that there was not memory enough."""
    return any(word in reason for word in OUT_OF_MEMORY)


def explain(error: BaseException) -> str:
    """An exception in one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def serve(handlers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The worker's end: answers requests until there are no more.

    A handler gets `phase`, a function to call with the name of each phase before it begins, and the fields of the request;
    what it returns is the result, and any exception an error. What it prints goes to standard error.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print what they like

    def say(**message: Any) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    for line in sys.stdin:
        request = json.loads(line)
        handler = handlers[request.pop("do")]
        try:
            answer = {"result": handler(lambda name: say(phase=name), **request)}
        except Exception as error:  # of any kind: whoever asked decides what it means
            answer = {"error": explain(error)}
        say(**answer)
