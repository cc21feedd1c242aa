"""Odd records: a grid must read as before but for the run whose record is odd.

    python -m benchmarks.fuzz_records [--count N] [--seed S]

A small grid is made, without training: finished runs, one that diverged, one that was asked to end, one that never came to
train. One record at a time becomes odd: a field of another type, torn, binary, nested, huge, a folder, a link, a pipe. Then
`status --json` and the tables that are made of it, now and then all of them, must work, in seconds, with the rows of all other
runs as they were; of grid.json and cluster.json, which are of the grid, a sentence with the fix does as well.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from gqa_jax import results, storage
from gqa_jax.differences import load_differences
from launch import __main__ as command_line
from launch import export
from launch.cells import Layout
from tests import grid_fakes

SECONDS = 5.0  # that one look may take; most take a tenth
OF_GRID = ("grid.json", "cluster.json")
ODD_VALUES = (
    None, True, 0, -1, -1.5, 10**18, 10**400, 1e308, float("nan"), float("inf"), "", "0", "\ud800\x1b[31m\n", "x" * 100_000,
    "a\0b", "../..", "../" * 2000, [], [None], {}, {"a": {"b": [1]}}, 1e12,
)  # fmt: skip


class Made(NamedTuple):
    """A grid with records of every kind."""

    file: Path
    layout: Layout
    names: list[str]
    records: list[Path]


def made(folder: Path) -> Made:
    """Writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, layout, cells = grid_fakes.finished_grid(folder)
    storage.write_json(layout.root / "cluster.json", {"engine": "local", "processes": 1})
    for number, cell in enumerate(cells):
        at, now = layout.cell(cell.name), time.time()
        for name in ("attempts", "submissions", "metrics"):
            (at / name).mkdir()
        grid_fakes.beat(at, age=30.0)
        storage.write_json(at / "attempts" / "000.json", {"attempt": 0, "time": now - 60, "first_step": 0, "job": "7"})
        storage.write_json(at / "submissions" / f"{int(1000 * now)}-1.json", {"time": now - 90, "engine": "slurm", "id": "7"})
        storage.write_json(at / "environment.json", {"versions": {"jax": "0.11.2"}, "host": "h"})
        rows = [{"kind": "train", "step": step, "time": now, "loss": 5.0 - step, "tokens": 256 * step} for step in (1, 2, 3)]
        (at / "metrics" / "attempt-000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        row = {"step": 4, "task": "held-out", "source": "", "context": 32, "position": "", "metric": "loss", "value": 2.0}
        row |= {"standard_error": 0.1, "n": 1024, "n_documents": 4, "unit": "nats/token", "rules": "hash/spread/one"}
        storage.write_json(at / "evaluations.json", {"rows": [row]})
        storage.write_json(at / "cancelled.json", {"time": now - 200})
        if number == 3:
            grid_fakes.finish(cell, layout, "diverged")
        if number > 3:
            (at / "result.json").unlink()
        if number == 4:
            storage.write_json(at / "exit.json", {"code": 75, "class": "preempted", "reason": "asked to end", "time": now - 20})
        if number == 5:
            shutil.rmtree(at / "attempts")
            end = {"class": "infrastructure", "reason": "no space", "time": now - 10, "job": "7"}
            storage.write_json(at / "host-failure.json", end)
    records = sorted(path for path in Path(layout.root).rglob("*.json*"))
    return Made(file, layout, [cell.name for cell in cells], records)


# Odd things in the place of a record


def odd(generator: random.Random, content: bytes) -> tuple[str, Callable[[Path], Any]]:
    """What it is in words, and what puts it at a path where nothing is."""
    kinds = [_swapped] * 8 + [_bytes] * 5 + [_no_file] * 3
    return generator.choice(kinds)(generator, content)


def _swapped(generator: random.Random, content: bytes) -> tuple[str, Callable[[Path], Any]]:
    """Some fields of the first line that is JSON have other values, are gone or nested, or are there twice."""
    values, rest = (json.loads(content), b"") if content[:1] == b"{" and b"\n}" in content else _first_line(content)
    said = []
    for _ in range(generator.randrange(1, 4)):
        inside = values
        while True:
            key = generator.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            if not isinstance(inside[key], dict | list) or not inside[key] or generator.random() < 0.3:
                break
            inside = inside[key]
        value = copy.deepcopy(generator.choice(ODD_VALUES))
        said.append(f"{key} = {value!r:.40}")
        inside[key] = value
        if not values:
            break
    text = json.dumps(values).encode()
    if generator.random() < 0.1:
        text, said = text[:-1] + b', "time": null, "status": 5}', [*said, "twice"]
    return ", ".join(said), lambda path: path.write_bytes(text + rest)


def _first_line(content: bytes) -> tuple[Any, bytes]:
    line, _, rest = content.partition(b"\n")
    return json.loads(line), b"\n" + rest


def _bytes(generator: random.Random, content: bytes) -> tuple[str, Callable[[Path], Any]]:
    """Other bytes."""
    place = generator.randrange(len(content))
    deep = generator.choice([100, 5000, 100_000])
    name, data = generator.choice(
        [
            ("empty", b""),
            ("torn", content[:place]),
            ("torn in the midst", content[:place] + content[place + 5 :]),
            ("binary", generator.randbytes(generator.choice([1, 50, 5000]))),
            ("a byte changed", content[:place] + generator.randbytes(1) + content[place + 1 :]),
            ("no object", generator.choice([b"null", b"[]", b"[{}]", b"5", b'"x"', b"NaN", b"{}", b"{}{}", b"true"])),
            ("utf-16", content.decode().encode("utf-16")),
            ("a mark", b"\xef\xbb\xbf" + content),
            ("nested lists", b"[" * deep + b"]" * deep),
            ("nested objects", b'{"time":' * deep + b"1" + b"}" * deep),
            ("a nested field", content.rstrip()[:-1] + b', "more": ' + b"[" * deep + b"]" * deep + b"}"),
            ("a list without an end", b"[" * deep),
            ("digits", b'{"time": ' + b"9" * generator.choice([400, 5000, 1_000_000]) + b"}"),
            ("zeros", bytes(5000)),
            ("twice", content + content),
        ]
    )
    return name, lambda path: path.write_bytes(data)


def _no_file(generator: random.Random, content: bytes) -> tuple[str, Callable[[Path], Any]]:
    """A folder, a link, a pipe, a file without an end."""

    def huge(path: Path) -> None:
        path.write_bytes(content)
        os.truncate(path, 1 << 36)

    def full(path: Path) -> None:
        path.mkdir()
        (path / "a.json").write_bytes(content)

    def folder_is_a_file(path: Path) -> None:
        """Of what lies in a folder of its own, as attempts/."""
        if path.parent.name in ("attempts", "submissions", "metrics"):
            path.parent.rmdir()
            path.parent.write_bytes(content)

    return generator.choice(
        [
            ("a folder", Path.mkdir),
            ("a folder with a file", full),
            ("a link to nothing", lambda path: path.symlink_to("none")),
            ("a link to itself", lambda path: path.symlink_to(path.name)),
            ("a link to zeros", lambda path: path.symlink_to("/dev/zero")),
            ("a link to a folder", lambda path: path.symlink_to("..")),
            ("a pipe", os.mkfifo),
            ("a huge file", huge),
            ("gone", lambda path: None),
            ("a file for its folder", folder_is_a_file),
        ]
    )


@contextlib.contextmanager
def changed(path: Path, put: Callable[[Path], Any]) -> Iterator[None]:
    """With something else at the path, and what was there before after it."""
    content, folder = path.read_bytes(), path.parent
    path.unlink()
    put(path)
    try:
        yield
    finally:
        for each in (path, folder):
            if each.is_symlink() or (each.exists() and (each == path or not each.is_dir())):
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        folder.mkdir(exist_ok=True)
        path.write_bytes(content)


# What is right


Rows = dict[str, list[dict[str, Any]]]  # of each run by name, without empty cells


def looks(grid: Made) -> dict[str, Callable[[], Rows]]:
    """Ways to look at the grid."""
    root = grid.layout.root
    tables = {
        "load_results": results.load_results,
        "load_costs": results.load_costs,
        "load_evaluations": results.load_evaluations,
        "load_metrics": results.load_metrics,
        "load_differences": load_differences,
        "export": lambda _: export.write_tables(grid.layout, grid.layout)[0],
    }
    found = {name: lambda load=load: _rows(load(root).to_dict("records")) for name, load in tables.items()}
    return {"status": functools.partial(_status, grid), **found}


def _rows(rows: list[dict[str, Any]]) -> Rows:
    found: Rows = {}
    for row in rows:
        found.setdefault(row["cell"], []).append({key: value for key, value in row.items() if not pd.isna(value)})
    return found


def _status(grid: Made) -> Rows:
    """Raises ValueError for bad input, as the command says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line.main(["status", str(grid.file), "--root", str(grid.layout.root), "--json"])
    if code == command_line.EXIT_BAD_INPUT:
        raise ValueError(err.getvalue())
    assert code in (command_line.EXIT_FAILED, command_line.EXIT_UNFINISHED), (code, err.getvalue())
    found = _rows(json.loads(out.getvalue()))
    assert list(found) == grid.names
    for (row,) in found.values():
        assert not any(isinstance(value, float) and not 0 <= value < math.inf for value in row.values()), row
        row.pop("heartbeat_age", None)  # of time
    return found


def _others(rows: Rows, name: str) -> Rows:
    """Those of all runs but one, and not compared with it."""
    kept = {cell: [row for row in mine if row.get("other") != name] for cell, mine in rows.items() if cell != name}
    return {cell: mine for cell, mine in kept.items() if mine}


def concerned(path: Path) -> tuple[str, ...]:
    """The looks that a record is read for."""
    if path.parent.name == "metrics":
        return "status", "load_metrics"
    if path.name in ("grid.json", "config.json", "result.json", "evaluations.json"):
        return "status", "load_results", "load_costs", "load_evaluations", "load_differences"
    return ("status",)


def records(count: int, seed: int, folder: Path) -> list[str]:
    """What went wrong, a sentence each, of `count` odd records drawn from `seed`, in a grid that is made in `folder`."""
    generator, grid = random.Random(seed), made(folder / "grid")
    logging.getLogger("gqa_jax").addHandler(quiet := logging.NullHandler())
    all_looks, failures = looks(grid), []
    before = {name: look() for name, look in all_looks.items()}
    for number in range(count):
        path = grid.records[generator.randrange(len(grid.records))]
        words, put = odd(generator, path.read_bytes())
        of_run = next((part for part in path.parts if part in grid.names), None)
        about = f"{number}: {path.relative_to(grid.layout.root)}: {words}"
        with changed(path, put), warnings.catch_warnings(action="ignore"):
            for name, look in all_looks.items():
                if number % 10 and name not in concerned(path):
                    continue
                began = time.monotonic()
                try:
                    after = look()
                    if of_run is not None and _others(after, of_run) != _others(before[name], of_run):
                        failures.append(f"{about}: {name}: rows of other runs have changed")
                except (ValueError, FileNotFoundError) as error:
                    if path.name not in OF_GRID:
                        failures.append(f"{about}: {name}: {_short(error)}")
                except Exception as error:
                    failures.append(f"{about}: {name}: {_short(error)}")
                if (seconds := time.monotonic() - began) > SECONDS:
                    failures.append(f"{about}: {name} took {seconds:.1f} s")
    logging.getLogger("gqa_jax").removeHandler(quiet)
    return failures


def _short(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.200} ({Path(last.filename).name}:{last.lineno})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failures = records(arguments.count, arguments.seed, Path(folder))
    for failure in failures:
        print(failure)
    took = f"{time.monotonic() - began:.0f} s"
    print(f"{arguments.count} odd records from seed {arguments.seed}: {len(failures)} failures, {took}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
