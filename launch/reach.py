"""What a plan or a dry run can look at from where it is: a machine without a network shows all that does not need one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from gqa_jax import storage
from gqa_jax.data import catalog
from gqa_jax.errors import ConfigError
from launch.executors.base import Executor, Look, SubmitError

STORAGE_SECONDS = 20.0  # for gs:// to answer: its client alone tries for a minute
ENGINE_SECONDS = 60.0  # for an engine to say what it has


class Unanswered(Exception):
    """It took longer than it may."""


def within[T](seconds: float, function: Callable[[], T]) -> T:
    """What the function returns or raises, within so long. Raises Unanswered; it may then still be at work."""
    found: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise Unanswered(f"no answer within {seconds:.0f} s")
    return found[0]


def out_of_reach(root: str, stores: Iterable[str]) -> dict[str, str]:
    """Of the folder of a grid and its token stores, those on gs:// that can't be read, and why."""
    looks = [(root, lambda: storage.names(storage.path(root) / "cells"))]
    looks += [(name, lambda name=name: catalog.exists(name)) for name in dict.fromkeys(stores)]
    found, deadline = {}, time.monotonic() + STORAGE_SECONDS
    for place, look in looks:
        if storage.is_remote(place) and place.strip("/") != "gs:":  # which is no place
            try:
                within(max(1.0, deadline - time.monotonic()), look)
            except (Unanswered, OSError, ValueError) as error:
                found[place] = str(error)
    return found


def jobs_of(engine: Callable[[], Executor], seconds: float | None) -> tuple[Look, str | None]:
    """The jobs that an engine has; none where it can't be asked, and why.

    seconds: that it may take; None: as long as it does.
    """
    try:
        return engine().jobs() if seconds is None else within(seconds, lambda: engine().jobs()), None
    except (Unanswered, SubmitError, ConfigError) as error:
        return Look({}, None), str(error)
