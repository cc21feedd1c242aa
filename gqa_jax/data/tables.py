"""Tables to rows: CSV and TSV, Parquet, and datasets of Hugging Face."""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from gqa_jax.data.kinds import LARGEST, Opened, bad_utf8
from gqa_jax.data.records import BATCH_BYTES, DAMAGED, Bad, Format, Rows, check_columns, decoded, option
from gqa_jax.data.sources import InputError, reason
from gqa_jax.data.streams import DAMAGE

BATCH_ROWS = 1024  # of Parquet that are given at once, fewer where they are long
_STRINGS, _BYTES = (
    ("string", "large_string"),
    ("binary", "large_binary", "fixed_size_binary"),
)  # Arrow's names of types begin so


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
