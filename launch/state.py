"""State of a cell: a pure function of its run folder, whether a process holds it, and the time. Imports no jax."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
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
    cause: str | None = None  # one sentence; of a planned cell: what it waits for
    attempts: int = 0
    blocked: bool = False  # waits for a cell that `run` won't start again

    @property
    def runnable(self) -> bool:
        """Whether `run` starts it, now or when its parent is done: not finished, not held, not failed as it would again."""
        if self.state in ("planned", "interrupted"):
            return not self.blocked
        return self.state == "failed" and self.failure in RETRIED_CLASSES


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
    cause, blocked = _obstacle(folder, now)
    return CellState("interrupted" if known["attempts"] else "planned", **known, cause=cause, blocked=blocked)


def parent(folder: Path) -> Path | None:
    """Folder of the cell that the one in `folder` continues, by its config.json."""
    source = _json(folder / "config.json").get("continue_from")
    return None if source is None else Path(os.path.normpath(folder / source))


def _obstacle(folder: Path, now: float) -> tuple[str | None, bool]:
    """What a cell that has not started waits for, and whether in vain."""
    source = parent(folder)
    if source is None or (before := of(source, now)).state == "done":
        return None, False
    blocked = before.blocked or not (before.runnable or before.state in ("running", "stalled"))
    what = before.cause if before.blocked else before.state if before.state in ("failed", "diverged") else None
    return f"waits for {source.name}{f', which {what}' if what else ''}", blocked


def waiting(names: Sequence[str], states: Sequence[CellState]) -> list[str]:
    """A line for each cause that unstarted cells wait for."""
    causes: dict[str, list[str]] = {}
    for name, now in zip(names, states, strict=True):
        if now.state in ("planned", "interrupted") and now.cause is not None:
            causes.setdefault(now.cause, []).append(name)
    others = {cause: f" and {len(held) - 1} more" if len(held) > 1 else "" for cause, held in causes.items()}
    return [f"{held[0]}{others[cause]}: {cause}" for cause, held in causes.items()]


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
