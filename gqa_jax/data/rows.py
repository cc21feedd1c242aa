"""Files with fields to rows: JSON, CSV and TSV, Parquet, datasets of Hugging Face; and what makes a row unusable.

Every reader gives rows in small batches, (rows, places, position): a row is a dict of fields, a text without fields, another
value of JSON, or `Bad`; its place is the number of its line or row, for messages; the position is how many bytes of the file
were read. What makes the rest of a file unreadable is an InputError.
"""

from __future__ import annotations

import csv
import decimal
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gqa_jax.data.kinds import DECODER, LARGEST, Opened, after_space, bad_utf8, layout, parsed
from gqa_jax.data.sources import InputError, few, reason, shown
from gqa_jax.data.streams import BUFFER_BYTES, DAMAGE, put_back

BATCH_BYTES = 1 << 18  # of rows that are given at once: they stay in a cache
SOURCE_CHARS = 200  # of the name of a source, at most
DAMAGED = "damaged or unreadable from here on"
ENCODING_ERRORS = ("strict", "replace")
BAD_LINES = ("error", "skip")
BATCH_ROWS = 1024  # of Parquet that are given at once, fewer where they are long
_STRINGS, _BYTES = (
    ("string", "large_string"),
    ("binary", "large_binary", "fixed_size_binary"),
)  # Arrow's names of types begin so


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


def table_rows(file: Opened, form: Format) -> Iterator[Rows]:
    """Rows below a header. Columns are divided as the name of the file says, or as gives the column of the text."""
    csv.field_size_limit(LARGEST)  # of the whole process; its default refuses texts of 128 KiB
    read, bad = 0, None  # bytes; the last line of a row that is no UTF-8

    def lines() -> Iterator[str]:
        nonlocal read, bad
        number = 0
        try:
            for number, line in enumerate(iter(functools.partial(file.stream.readline, LARGEST), b""), 1):
                read += len(line)
                try:
                    text = line.decode("utf-8", form.encoding_errors)
                except UnicodeDecodeError as error:
                    advice = bad_utf8(line, error.start, file.leave)
                    bad = Bad("no UTF-8", f"byte {error.start} of line {number} is no UTF-8: {advice}")
                    text = line.decode("utf-8", "replace")
                yield text
        except DAMAGE as error:
            raise InputError(f"{file.path}:{number + 1}: {DAMAGED}: {reason(error)}") from error

    all_lines = lines()
    if (first := next(all_lines, None)) is None:
        return
    headers = {d: _header(first, d) for d in dict.fromkeys((file.delimiter, ",", ";", "\t", "|"))}
    delimiter = next((d for d, names in headers.items() if form.text_key in names), file.delimiter)
    reader = csv.reader(itertools.chain([first], all_lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise InputError(f"{file.path}:{reader.line_num}: no header of a table: {error}") from error
    if bad:
        raise InputError(f"{file.path}:{reader.line_num}: {bad.message}")
    check_columns(file.path, header, form)
    places = {key: header.index(key) for key in form.keys}
    row = 0
    while True:
        bad, begin = None, reader.line_num
        try:
            if not (values := next(reader)):
                continue
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num != begin + 1:  # then nobody knows where the next row begins
                where = f"{file.path} row {row + 1} (line {begin + 1})"
                raise InputError(f"{where}: a field in quotes that does not end as one ({error}): repair it") from error
            fields = Bad("no row of a table", f"no row of a table ({error})")
        else:
            if len(values) == len(header):
                fields = bad or {key: values[place] for key, place in places.items()}
            else:
                fields = Bad("another number of columns than the header", f"{len(values)} columns, the header {len(header)}")
        row += 1
        yield [fields], [f"{row} (line {begin + 1})"], file.position(read)


def parquet_rows(file: Opened, form: Format, size: int) -> Iterator[Rows]:
    """Rows of a Parquet file of `size` bytes: columns of strings, or of bytes that are UTF-8."""
    import pyarrow
    from pyarrow import parquet

    keys, row = form.keys, 0
    # Arrow reads a file faster by its name than an open one; not where its name is no Unicode.
    name = str(file.raw.name)
    try:
        with parquet.ParquetFile(name if name.isprintable() else file.raw, page_checksum_verification=True) as table:
            schema, total = table.schema_arrow, table.metadata.num_rows
            check_columns(file.path, schema.names, form)
            for key in keys:
                _check_type(file.path, key, schema.field(key).type, form)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
            for batch in table.iter_batches(batch_size=batch_rows, columns=keys):
                columns = [_texts(batch.column(key), form.encoding_errors) for key in keys]
                if batch.column(form.text_key).null_count:
                    columns[0] = ["" if text is None else text for text in columns[0]]
                rows = columns[0]
                if form.source_key is not None:
                    rows = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
                del batch, columns  # memory that is free is used again
                first, row = row + 1, row + len(rows)
                yield rows, range(first, row + 1), min(size, size * row // max(1, total))
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, RuntimeError) as error:
        where = f"{file.path} row {row + 1}" if row else file.path
        raise InputError(f"{where}: not a readable Parquet file: {reason(error)}") from error
    if row != total:
        raise InputError(f"{file.path}: not a readable Parquet file: {row:,} rows, and {total:,} by its own account")


def dataset_rows(name: str, form: Format) -> Iterator[Rows]:
    """Rows of a Hugging Face dataset, NAME[@CONFIG][:SPLIT] after "hf:"."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"input {name} needs the library datasets: pip install -e '.[datasets]'") from None
    path, _, split = name.removeprefix("hf:").partition(":")
    path, _, config = path.partition("@")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # missing, gated, offline, ambiguous config: datasets' own message says which
        raise InputError(f"input {name}: datasets.load_dataset failed: {error}") from error
    check_columns(f"input {name}", rows.column_names, form)
    number = 0
    try:
        for number, fields in enumerate(rows.select_columns(form.keys)):
            for key, value in fields.items():
                if isinstance(value, bytes):
                    fields[key] = decoded(value, form.encoding_errors)
            yield [fields], [number], 0
    except Exception as error:  # a file of it that is damaged, in the words of its library
        raise InputError(f"{name} row {number + 1}: {DAMAGED}: {reason(error)}") from error


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _check_type(path: str, key: str, of_column: Any, form: Format) -> None:
    from pyarrow import types

    inner = of_column.value_type if types.is_dictionary(of_column) else of_column
    is_text = str(inner).startswith((*_STRINGS, *_BYTES)) or types.is_null(inner)
    if types.is_nested(inner) or (key == form.text_key and not is_text):
        raise InputError(f"{path}: column {key!r} is {inner}, not text (--{option(key, form)})")


def _texts(column: Any, errors: str) -> list:
    """The values of a column of Parquet: what is UTF-8 as text, `Bad` where it is none."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not str(column.type).startswith(_BYTES):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            column = column.cast(pyarrow.large_binary() if str(column.type) == "large_string" else pyarrow.binary())
    return [None if value is None else decoded(value, errors) for value in column.to_pylist()]
