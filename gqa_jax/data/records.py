"""Rows with fields, whatever they were read from, and what makes one unusable.

Every reader of such files gives rows in small batches, (rows, places, position): a row is a dict of fields, a text without
fields, another value of JSON, or `Bad`; its place is the number of its line or row, for messages; the position is how many
bytes of the file were read. What makes the rest of a file unreadable is an InputError.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gqa_jax.data.sources import InputError, few, shown

BATCH_BYTES = 1 << 18  # of rows that are given at once: they stay in a cache
SOURCE_CHARS = 200  # of the name of a source, at most
DAMAGED = "damaged or unreadable from here on"
ENCODING_ERRORS = ("strict", "replace")
BAD_LINES = ("error", "skip")


@dataclass(frozen=True)
class Format:
    """How sources become documents."""

    text_key: str = "text"  # field of JSON, column of tables, Parquet and datasets
    separator: str | None = None  # cuts plain files into documents; None: a file is one
    encoding_errors: str = "strict"  # bytes that are no UTF-8: "strict" is an error, "replace" makes them U+FFFD
    source_key: str | None = None  # field or column that names the source of a document; None: the input is its source
    bad_lines: str = "error"  # lines and rows that can't be used: "error", or "skip": counted and left out

    def __post_init__(self):
        if self.separator == "":
            raise InputError("the separator is empty: give the text that stands between documents, or leave it out")
        for name, allowed in (("encoding_errors", ENCODING_ERRORS), ("bad_lines", BAD_LINES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name}={getattr(self, name)}: must be {' or '.join(allowed)}")

    @property
    def keys(self) -> list[str]:
        """The fields that are read."""
        return list(dict.fromkeys(key for key in (self.text_key, self.source_key) if key is not None))


class Bad(NamedTuple):
    """A row that can't be used: in few words, by which it is counted, and in full."""

    reason: str
    message: str


Rows = tuple[Sequence[Any], Sequence[int | str], int]


def usable(fields: Any, form: Format, origin: str) -> tuple[str, str] | Bad:
    """Text and source of a row, or what is wrong with it. No text (null) is an empty one, no source is an error."""
    if type(fields) is Bad:
        return fields
    if isinstance(fields, str):
        what = f"a text without fields, and no {form.source_key!r} names its source (--source_key)"
        return (fields, origin) if form.source_key is None else Bad("a text without fields", what)
    if not isinstance(fields, dict):
        return Bad("no object", f"no field {form.text_key!r}; it is {_type(fields)} (--text_key)")
    for key in form.keys:
        if key not in fields:
            return Bad(f"no field {key!r}", f"no field {key!r}; its fields: {_names(fields)} (--{option(key, form)})")
    if bad := next((fields[key] for key in form.keys if type(fields[key]) is Bad), None):
        return bad
    text = "" if fields[form.text_key] is None else fields[form.text_key]
    if not isinstance(text, str):
        return Bad(f"{form.text_key!r} is {_type(text)}", f"{form.text_key!r} is {_type(text)}, not text (--text_key)")
    if form.source_key is None:
        return text, origin
    value, what = fields[form.source_key], None
    if value is None or isinstance(value, dict | list):
        what = _type(value)
    elif not str(value).strip():
        what = "empty"
    elif len(str(value)) > SOURCE_CHARS:
        what = f"longer than {SOURCE_CHARS} characters"
    if what is not None:
        return Bad(f"{form.source_key!r} is {what}", f"{form.source_key!r} is {what} and names no source (--source_key)")
    # Half a surrogate pair, from a JSON escape, becomes U+FFFD: a name is written to files.
    return text, str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decoded(value: bytes, errors: str) -> str | Bad:
    """A text that a column holds as bytes."""
    try:
        return value.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        advice = "write it as UTF-8, or lose those letters with --encoding_errors=replace"
        return Bad("no UTF-8", f"byte {error.start} of its text is no UTF-8: {advice}")


def check_columns(where: str, names: Sequence[str], form: Format) -> None:
    for key in form.keys:
        if key not in names:
            raise InputError(f"{where}: no column {key!r}; columns: {_names(names)} (--{option(key, form)})")


def option(key: str, form: Format) -> str:
    return "text_key" if key == form.text_key else "source_key"


def _names(names: Iterable[Any]) -> str:
    return few([shown(str(name)[:60]) for name in names], most=20) or "none"


def _type(value: Any) -> str:
    names = {bool: "true or false", str: "text", dict: "an object", list: "a list", type(None): "null"}
    numbers = int | float | decimal.Decimal
    return names.get(type(value)) or ("a number" if isinstance(value, numbers) else f"a {type(value).__name__}")
