"""The small JSON records in the folders of runs and grids, as they are read: what each may hold, in one table.

A record may hold anything: whoever wrote it was killed, the disk was full, it was another version, or somebody edited it.
`read` gives the fields that are as the table says and drops each other one, so that an odd record is as if it were not there,
and says nothing of those beside it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gqa_jax import storage
from gqa_jax.errors import ConfigError

Kind = Callable[[Any], Any]  # the value as it is used, None for one that can't be
Fields = Mapping[str, Kind]


def number(value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> float | None:
    """A finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most else None


def amount(value: Any) -> float | None:
    """Of time, of money, a rate, a loss: never negative."""
    return number(value, 0.0)


def stamp(value: Any) -> float | None:
    """Seconds since the epoch, by some machine's clock."""
    return number(value, 0.0, 1e11)


def integer(value: Any) -> int | None:
    """A whole number of 64 bits; 4.0 is one."""
    return int(value) if number(value, -(2**63), 2**63 - 1) is not None and value == math.floor(value) else None


def count(value: Any) -> int | None:
    """A whole number that is not negative."""
    return None if amount(value) is None else integer(value)


def text(value: Any) -> str | None:
    """A text that every screen and file takes: a character that can't be printed is a space."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value[:10_000])


def word(value: Any) -> str | None:
    """A text that says something."""
    return text(value) or None


def path(value: Any) -> str | None:
    """A text that can be the name of a file or folder."""
    try:
        found = isinstance(value, str) and b"\0" not in (name := os.fsencode(value)) and 0 < len(name) < 4096
    except UnicodeEncodeError:
        return None
    return value if found else None


def name(value: Any) -> str | None:
    """The name of a folder in another."""
    return value if path(value) and "/" not in value and value not in (".", "..") and len(os.fsencode(value)) < 256 else None


def one_of(*words: str) -> Kind:
    return lambda value: value if isinstance(value, str) and value in words else None


def several(kind: Kind) -> Kind:
    """A list of these; of one that is not, nothing."""

    def found(value: Any) -> list | None:
        values = [kind(each) for each in value] if isinstance(value, list) else [None]
        return None if None in values else values

    return found


def texts(value: Any) -> dict[str, str] | None:
    """Texts by name."""
    return {key: word for key, each in value.items() if (word := text(each))} if isinstance(value, Mapping) else None


def group(fields: Fields) -> Kind:
    """Fields of their own."""
    return lambda value: usable(value, fields) if isinstance(value, Mapping) else None


_ORIGIN = {"host": text, "job": text}
_END = {"code": integer, "class": word, "reason": text, "attempt": count, "time": stamp} | _ORIGIN
_HELD = {"device": text, "n_devices": count}

#: What is read of each record, by the name of its file, or of its folder.
RECORDS: Mapping[str, Fields] = {
    "config.json": {"continue_from": path},  # the rest: gqa_jax.config.TrainConfig.from_stored
    "id.json": {"id": word},
    "heartbeat.json": {
        "time": stamp, "phase": text, "step": count, "steps": count, "tokens_per_second": amount, "eta_seconds": amount,
        "pid": count, "attempt": count, "device_seconds": amount,
    } | _ORIGIN | _HELD,
    "attempts": {"attempt": count, "time": stamp, "first_step": count, "n_processes": count} | _ORIGIN | _HELD,
    "submissions": {"time": stamp, "engine": text, "id": text, "where": text},
    "exit.json": _END,
    "failures": _END,
    "host-failure.json": _END,
    "cancelled.json": {"time": stamp},
    "result.json": {
        "status": one_of("done", "diverged"), "loss": amount, "step": count, "identity": word, "tokens": count,
        "params_non_embedding": count, "params_total": count,
        "loss_sem": lambda nats: number(nats, 0.0, 1e3), "loss_low": number, "loss_high": number, "bits_per_byte": amount,
        "eval_tokens": count, "eval_documents": count, "heldout_documents": count, "heldout": text, "rules": text,
        "data_fingerprint": text, "tokens_per_second": amount, "seconds_train": amount, "device_seconds": amount,
        "start": group({"kind": text, "folder": text, "identity": text, "differs": several(text)}),
        "attempts": count, "versions": texts, "shared_by": count,
    } | _HELD,
    "grid.json": {
        "name": word, "cells": several(name), "old_cells": several(name), "contexts_served": several(count),
        "losses": several(amount), "convention": text,
    },
    ".lock": {"id": word, "pid": count, "pids": several(count), "launcher": count, "time": stamp} | _ORIGIN,
}  # fmt: skip


def usable(values: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Those of `fields` that are in `values` and of their kinds."""
    found = {key: kind(values[key]) for key, kind in fields.items() if key in values}
    return {key: value for key, value in found.items() if value is not None}


def read(file: os.PathLike | str) -> dict[str, Any]:
    """The fields of a record that can be used; {} where it is not there, or none can. Raises OSError, and for no content."""
    try:
        return usable(storage.read_json(file) or {}, fields_of(file))
    except ConfigError:
        return {}


def fields_of(file: os.PathLike | str) -> Fields:
    """What RECORDS has of the file at this path."""
    *_, folder, own = os.fspath(file).split("/")
    return RECORDS[own if own in RECORDS else folder]


def odd(folder: os.PathLike | str) -> list[str]:
    """Names of the records in a run's folder that say nothing. Raises OSError."""
    return [name for name in storage.names(folder) if name.endswith(".json") and _is_odd(os.path.join(folder, name))]


def _is_odd(file: str) -> bool:
    try:
        values = storage.read_json(file)
    except ConfigError:
        return True
    needs = os.path.basename(file) in RECORDS and os.path.basename(file) != "config.json"  # of that all else is TrainConfig's
    return needs and values is not None and not usable(values, fields_of(file))
