"""Tells somebody of what happens while nobody looks: a command that is run with a JSON object on its standard input.

Of one launcher: the first cell that has failed or diverged, the first that stalls, a budget that is spent, the end.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from launch import state
from launch.run import Pass

COMMAND_SECONDS = 60.0  # that the command may take
EVENTS = ("failed", "stalled", "budget", "end")

log = logging.getLogger(__name__)


class Notifier:
    """Runs `command`, by a shell, once for each kind of event.

    grid, root, engine: what every event says it is of.
    """

    def __init__(self, command: str, *, grid: str, root: str, engine: str):
        self._command, self._about = command, {"grid": grid, "root": root, "engine": engine}
        self._told: set[str] = set()

    def passed(self, now: Pass) -> None:
        """Looks at a pass for what is new."""
        for event, kinds in (("failed", ("failed", "diverged")), ("stalled", ("stalled",))):
            for cell, one in zip(now.cells, now.states, strict=True):
                if one.state in kinds and not one.runnable:
                    self.tell(event, now, {"cell": cell.name, "state": one.state, "failure": one.failure, "cause": one.cause})
                    break

    def tell(self, event: str, now: Pass, facts: Mapping[str, Any]) -> None:
        """Tells of an event, the first of its kind: which, when, counts of cells by state, and `facts`. Failures are logged."""
        if event in self._told:
            return
        self._told.add(event)
        counts = Counter(one.state for one in now.states)
        said = {"event": event, "time": time.time(), **self._about, "cells": dict(counts), "total": len(now.states), **facts}
        try:
            done = subprocess.run(
                self._command, shell=True, input=json.dumps(said) + "\n", text=True, capture_output=True,
                timeout=COMMAND_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning(f"--notify {self._command}: {error}")
            return
        if done.returncode:
            log.warning(f"--notify {self._command}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")

    def ends(self, now: Pass) -> None:
        """The launcher ends after this pass."""
        if now.over_budget:
            self.tell("budget", now, {"cause": now.over_budget})
        self.tell("end", now, {"left": sum(one.state not in state.FINAL for one in now.states)})
