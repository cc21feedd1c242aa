"""State of a cell: a pure function of its run folder, whether a process holds it, and the time. Imports no jax."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any

from gqa_jax import results

STALLED_SECONDS = 600.0  # without a heartbeat; a compilation may take minutes
RETRIED_CLASSES = ("killed", "disk_full", "preempted")  # `run` starts these again; others would fail alike
FINAL = ("done", "diverged")


@dataclasses.dataclass(frozen=True)
class CellState:
    """What is known of a cell from outside."""

    state: str  # planned, running, stalled, interrupted, failed, diverged, done
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    heartbeat_age: float | None = None  # seconds
    loss: float | None = None
    failure: str | None = None  # class: config, out_of_memory, disk_full, killed, error, broken_result
    cause: str | None = None  # one sentence
    attempts: int = 0

    @property
    def runnable(self) -> bool:
        """Whether `run` starts it: not finished, not held, and not failed in a way that would repeat."""
        return self.state in ("planned", "interrupted") or (self.state == "failed" and self.failure in RETRIED_CLASSES)


def of(folder: Path, now: float) -> CellState:
    """State of the cell in `folder` at `now` (seconds since the epoch). Reads only."""
    heartbeat = _json(folder / "heartbeat.json")
    known: dict[str, Any] = {
        "step": heartbeat.get("step"),
        "steps": heartbeat.get("steps"),
        "tokens_per_second": heartbeat.get("tokens_per_second"),
        "heartbeat_age": now - heartbeat["time"] if "time" in heartbeat else None,
        "attempts": sum(1 for _ in (folder / "metrics").glob("attempt-*.jsonl")),
    }
    if (folder / "result.json").exists():
        try:
            result = results.read_result(folder / "result.json")
        except ValueError as error:
            return CellState("failed", **known, failure="broken_result", cause=str(error))
        cause = None if result["status"] == "done" else f"not finite at step {result['step']}"
        known |= {"step": result["step"], "tokens_per_second": result.get("tokens_per_second")}
        return CellState(result["status"], **known, loss=result["loss"], cause=cause)
    if is_held(folder):
        age = known["heartbeat_age"]
        stalled = age is not None and age > STALLED_SECONDS
        cause = f"no heartbeat for {age:.0f} s" if stalled else None
        return CellState("stalled" if stalled else "running", **known, eta_seconds=heartbeat.get("eta_seconds"), cause=cause)
    end = _json(folder / "exit.json")
    if end:
        return CellState("failed", **known, failure=end.get("class", "error"), cause=end.get("reason"))
    return CellState("interrupted" if known["attempts"] else "planned", **known)


def is_held(folder: Path) -> bool:
    """Whether a training process holds the folder (gqa_jax.run_folder.claim)."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _json(path: Path) -> dict[str, Any]:
    """A small record, {} when it is not there or broken: a heartbeat is never worth an error."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
