"""Requests to end: SIGTERM, SIGHUP, Ctrl-C. The first one is a request, a later one is an order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGINT: "Ctrl-C"}
#: In which another one is the first once more: Slurm sends SIGTERM twice, and a terminal that closes SIGHUP by two ways.
REPEATED_SECONDS = {signal.SIGTERM: 5.0, signal.SIGHUP: 5.0, signal.SIGINT: 0.2}


@contextlib.contextmanager
def noted(signals: Sequence[signal.Signals], act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """While it lasts, `act` is called at the first of these signals, and a later one ends this process at once.

    Those that are ignored stay so (nohup; a job that a script has put into the background), and where this is not the main
    thread, to which Python gives them, all stay as they are. What SIGHUP takes away is not printed to any more.
    """
    asked: float | None = None  # when, by time.monotonic
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def note(number: int, _: Any) -> None:
        nonlocal asked
        now, before = time.monotonic(), asked
        if number == signal.SIGHUP:
            _silence(terminals)
        if before is None:
            asked = now
            act(signal.Signals(number))
        elif now - before > REPEATED_SECONDS[number]:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    handled = signals if threading.current_thread() is threading.main_thread() else ()
    earlier = {number: signal.getsignal(number) for number in handled}
    replaced = {number: handler for number, handler in earlier.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line on stderr, from a signal handler, which may have come in the midst of another."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _silence(descriptors: Sequence[int]) -> None:
    """What is written to them goes nowhere: a terminal that has hung up answers with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
