"""Names of a grid's jobs on engines that others use too: functions of the grid's folder and the cell."""

from __future__ import annotations

import hashlib
import os

from launch.cells import Layout


def of(layout: Layout, cell: str) -> str:
    """Name of a cell's job on every engine, at most 58 characters of [a-z0-9-]: the grid's folder in 7 digits, the cell."""
    return f"{prefix(layout)}{cell}"


def prefix(layout: Layout) -> str:
    """What the names of all jobs of a grid's folder begin with, and those of no other."""
    root = os.fspath(layout.root)
    where = root if "://" in root else os.path.realpath(root)
    return f"g{hashlib.sha256(where.encode()).hexdigest()[:7]}-"
