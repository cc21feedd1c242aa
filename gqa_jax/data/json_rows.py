"""JSON to rows: one value a line, the elements of one array, or objects that are written over several lines."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from gqa_jax.data.kinds import DECODER, LARGEST, Opened, after_space, bad_utf8, layout, parsed
from gqa_jax.data.records import BATCH_BYTES, DAMAGED, Bad, Format, Rows
from gqa_jax.data.sources import InputError, reason
from gqa_jax.data.streams import BUFFER_BYTES, DAMAGE, put_back


def json_rows(file: Opened, form: Format) -> Iterator[Rows]:
    """One value a line; or the elements of one array; or objects that are written over several lines."""
    stream, errors = file.stream, form.encoding_errors
    begin = stream.peek(1).lstrip()
    first = begin.partition(b"\n")[0].decode("utf-8", "replace")
    if begin.startswith(b"[") or (begin.startswith(b"{") and isinstance(parsed(first), Exception)):
        try:
            data, is_whole = layout(stream)
        except DAMAGE as error:
            raise InputError(f"{file.path}:1: {DAMAGED}: {reason(error)}") from error
        if is_whole:
            yield from _values(file, _rest(file, data), form)
            return
        stream = put_back(data, stream)
    number = read = 0
    rows, places, enough = [], [], BATCH_BYTES
    try:
        for number, line in enumerate(iter(functools.partial(stream.readline, LARGEST), b""), 1):
            read += len(line)
            try:
                value = json.loads(line.decode("utf-8", errors))
            except (ValueError, RecursionError):
                if line.isspace():
                    continue
                if len(line) == LARGEST:
                    raise InputError(f"{file.path}:{number}: a line of more than {LARGEST:,} bytes") from None
                value = _parsed(line, errors, file.leave)
            rows.append(value)
            places.append(number)
            if read >= enough:
                yield rows, places, file.position(read)
                rows, places, enough = [], [], read + BATCH_BYTES
    except DAMAGE as error:
        yield rows, places, file.position(read)
        raise InputError(f"{file.path}:{number + 1}: {DAMAGED}: {reason(error)}") from error
    yield rows, places, file.position(read)


def _parsed(line: bytes, errors: str, leave: str) -> Any:
    """The value of a line that is no JSON at first sight: a mark within, a large integer; or what is wrong with it."""
    try:
        value = parsed(line.decode("utf-8", errors))
    except UnicodeDecodeError as error:
        return Bad("no UTF-8", f"byte {error.start} is no UTF-8: {bad_utf8(line, error.start, leave)}")
    if isinstance(value, RecursionError):
        return Bad("nested too deep", "lists or objects within each other, too deep to be read")
    if isinstance(value, ValueError):
        return Bad("no JSON", f"not one JSON object a line ({value}): repair it, or {leave}")
    return value


def _rest(file: Opened, data: bytes) -> bytes:
    """All of a JSON file that begins with `data`, which is held in memory."""
    try:
        while len(data) <= LARGEST:
            if not (more := file.stream.read(max(len(data), BUFFER_BYTES))):
                return data
            data += more
    except DAMAGE as error:
        raise InputError(f"{file.path}:{data.count(b'\n') + 1}: {DAMAGED}: {reason(error)}") from error
    raise InputError(f"{file.path}: JSON of more than {LARGEST:,} bytes in one piece: make it one object a line (jq -c '.[]')")


def _values(file: Opened, data: bytes, form: Format) -> Iterator[Rows]:
    """Elements of an array, or objects one after the other."""
    try:
        text = data.decode("utf-8", form.encoding_errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file.path}:{line}: not UTF-8 text: {bad_utf8(data, error.start, file.leave)}") from error
    read, line, counted = file.position(len(data)), 1, 0
    position = after_space(text, 0)
    is_array = text[position] == "["
    position = after_space(text, position + is_array)
    for number in itertools.count(1):
        line, counted = line + text.count("\n", counted, position), position
        place = f"{line}, element {number}" if is_array else line
        if is_array and number == 1 and text[position : position + 1] == "]":
            break
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{file.path}:{place}: damaged JSON ({error.msg} at line {error.lineno}): repair it") from error
        except RecursionError:
            raise InputError(f"{file.path}:{place}: lists or objects within each other, too deep to be read") from None
        yield [value], [place], read
        position = after_space(text, position)
        mark = text[position : position + 1]
        if mark == ("]" if is_array else ""):
            break
        if is_array and mark != ",":
            raise InputError(f"{file.path}:{place}: damaged JSON (no comma or ] after it, cut off?): repair it")
        position = after_space(text, position + is_array)
    if is_array and after_space(text, position + 1) != len(text):
        raise InputError(f"{file.path}:{place}: damaged JSON (something follows the end of the array): repair it")
