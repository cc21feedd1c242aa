"""Inputs of `prepare`: files, folders and named corpora as one stream of documents, in an order that never changes.

| input | documents |
|---|---|
| `*.jsonl`, `*.ndjson`, `*.json` | one a line, field `text_key` |
| `*.parquet` | one a row, column `text_key` |
| any other file | the whole file, or its parts between `separator` |
| `*.gz`, `*.zst`, `*.xz` | as the name without that suffix says |
| folder | its files, recursively, sorted by path; hidden ones are left out |
| `sotu` | the embedded corpus, `gqa_jax.data.corpus` |
| `hf:NAME[@CONFIG][:SPLIT]` | rows of a Hugging Face dataset, column `text_key`; split `train` |

Text is UTF-8 and kept as it is, line ends too; only a byte-order mark at the start of a file is dropped.
"""

from __future__ import annotations

import codecs
import fnmatch
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from gqa_jax import errors
from gqa_jax.data import corpus

LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst", ".xz")
_READ_BYTES = 1 << 20


class InputError(ValueError):
    """An input that can't be read. The message names the file, the line where there is one, and what to do."""


class Document(NamedTuple):
    """A document: its text, how many bytes of its file were read up to its end (for a progress bar), and its source."""

    text: str
    position: int
    source: str  # `Source.origin`, or the value of the field `Format.source_key`


@dataclass(frozen=True)
class Source:
    """One file or named corpus."""

    name: str  # of the file relative to the input that gave it, or the input itself: the same on every machine
    path: Path | None  # None: a named corpus
    size: int | None  # bytes as stored; None: not known before reading
    origin: str  # name of the input: the end of its path that no other input shares, the same on every machine


class Found(NamedTuple):
    """What inputs stand for, in order, and what was seen and left out: reason -> paths."""

    sources: list[Source]
    left_out: dict[str, list[str]]


@dataclass(frozen=True)
class Format:
    """How sources become documents."""

    text_key: str = "text"  # field of JSON lines, column of Parquet and datasets
    separator: str | None = None  # cuts plain files into documents; None: a file is one
    encoding_errors: str = "strict"  # bytes that are no UTF-8: "strict" is an error, "replace" makes them U+FFFD
    source_key: str | None = None  # field or column that names the source of a document; None: the input is its source
    bad_lines: str = "error"  # lines and rows that can't be used: "error", or "skip": counted and left out

    def __post_init__(self):
        if self.separator == "":
            raise InputError("the separator is empty: give the text that stands between documents, or leave it out")


@dataclass
class Counted:
    """How much was read of one kind of file."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0  # of the text as UTF-8


@dataclass
class BadLines:
    """Lines or rows that were left out for one reason."""

    count: int
    first: str  # file and line or row of the first one


@dataclass
class Reading:
    """What `read_documents` has met; one object is given for all sources of a reading."""

    kinds: dict[str, Counted] = field(default_factory=dict)  # "JSON lines", "plain text", ...
    bad_lines: dict[str, BadLines] = field(default_factory=dict)  # by reason
    notes: list[str] = field(default_factory=list)  # sentences that a person should see


def find_sources(inputs: Sequence[str | os.PathLike], include: str = "*", exclude: str | None = None) -> Found:
    """The sources that `inputs` stand for, in their order.

    `include` and `exclude` are shell patterns for the paths of files in folders, relative to the folder.
    Raises InputError for an input that is missing, unreadable, or a folder without such files.
    """
    sources = []
    entries = [os.fspath(entry) for entry in inputs]
    for entry, origin in zip(entries, _origins(entries), strict=True):
        if entry == "sotu":
            sources.append(Source("sotu", None, corpus.SOTU_BYTES, origin))
            continue
        if entry.startswith("hf:"):
            sources.append(Source(entry, None, None, origin))
            continue
        path = Path(entry).expanduser()
        if path.is_dir():
            files = [file for file in _files(path) if _selected(file.relative_to(path), include, exclude)]
            if not files:
                raise InputError(f"input {entry}: no file in this folder (include {include!r}, exclude {exclude!r})")
            sources += [_file_source(file, file.relative_to(path).as_posix(), origin) for file in files]
        elif path.exists():
            sources.append(_file_source(path, path.name, origin))
        else:
            raise InputError(f"input {entry}: no such file or folder{_neighbour(path)}; named inputs are sotu and hf:NAME")
    if not sources:
        raise InputError("no input: give files, folders, sotu, or hf:NAME")
    return Found(sources, {})


def read_documents(source: Source, form: Format, reading: Reading) -> Iterator[Document]:
    """Documents of one source in order, empty ones too, counted in `reading`.

    Raises InputError, which names file and line or row, on the first that can't be read.
    """
    kind, documents = _contents(source, form)
    counted = reading.kinds.setdefault(kind, Counted())
    counted.files += 1
    for text, position in documents:
        counted.documents += 1
        counted.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        yield Document(text, position, source.origin)


def _contents(source: Source, form: Format) -> tuple[str, Iterator[tuple[str, int]]]:
    """The kind of a source, and its texts, each with the bytes read up to its end."""
    if source.path is None:
        return ("embedded corpus", _sotu()) if source.name == "sotu" else ("dataset", _dataset(source.name, form))
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet" and not compression:
        return "Parquet", _parquet(source, form)
    if kind in LINES_SUFFIXES:
        return "JSON lines", _json_lines(source, compression, form)
    return "plain text", _plain(source, compression, form)


def _sotu() -> Iterator[tuple[str, int]]:
    position = 0
    for address in corpus.load_sotu():
        position += len(address.text.encode("utf-8"))
        yield address.text, position


def _dataset(name: str, form: Format) -> Iterator[tuple[str, int]]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"input {name} needs the library datasets: pip install 'gqa_jax[datasets]'") from None
    path, _, split = name.removeprefix("hf:").partition(":")
    path, _, config = path.partition("@")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # missing, gated, offline, ambiguous config: datasets' own message says which
        raise InputError(f"input {name}: datasets.load_dataset failed: {error}") from error
    if form.text_key not in rows.column_names:
        raise InputError(f"input {name}: no column {form.text_key!r}; columns: {', '.join(rows.column_names)} (--text_key)")
    for number, row in enumerate(rows.select_columns([form.text_key])):
        yield _checked_text(row[form.text_key], f"{name} row {number}", form), 0


def _parquet(source: Source, form: Format) -> Iterator[tuple[str, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if form.text_key not in names:
                raise InputError(f"{source.path}: no column {form.text_key!r}; columns: {', '.join(names)} (--text_key)")
            rows = 0
            for batch in file.iter_batches(batch_size=1024, columns=[form.text_key]):
                for value in batch.column(0).to_pylist():
                    rows += 1
                    text = _checked_text(value, f"{source.path} row {rows}", form)
                    yield text, source.size * rows // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source.path}: not a readable Parquet file: {_reason(error)}") from error


def _json_lines(source: Source, compression: str, form: Format) -> Iterator[tuple[str, int]]:
    number = 0
    raw, stream = _open(source.path, compression)
    with raw, stream:
        while line := _guarded(stream.readline, source.path, number + 1):
            number += 1
            where = f"{source.path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                value = json.loads(line.decode("utf-8", form.encoding_errors))
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: byte {error.start} is no UTF-8; --encoding_errors=replace accepts it") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(
                    f"{where}: not one JSON object a line ({error}): repair it, or leave the file out (--exclude)"
                ) from error
            if not isinstance(value, dict) or form.text_key not in value:
                keys = f"its fields: {', '.join(value)}" if isinstance(value, dict) else f"it is a {type(value).__name__}"
                raise InputError(f"{where}: no field {form.text_key!r}; {keys} (--text_key)")
            yield _checked_text(value[form.text_key], where, form), raw.tell()


def _plain(source: Source, compression: str, form: Format) -> Iterator[tuple[str, int]]:
    raw, stream = _open(source.path, compression)
    with raw, stream:
        blocks = _decoded(stream, source.path, form.encoding_errors)
        texts = ["".join(blocks)] if form.separator is None else _split(blocks, form.separator)
        for text in texts:
            yield text, raw.tell()


def _split(blocks: Iterator[str], separator: str) -> Iterator[str]:
    """The parts of the joined blocks between separators; holds one part and one block, and looks at each text once."""
    overlap = len(separator) - 1  # a separator may lie across blocks
    parts, tail = [], ""
    for block in blocks:
        first, *others = (tail + block).split(separator)
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
        tail = parts[-1][len(parts[-1]) - overlap :] if len(parts[-1]) > overlap else parts[-1]
        parts[-1] = parts[-1][: len(parts[-1]) - len(tail)]
    yield "".join(parts) + tail


def _decoded(stream: IO[bytes], path: Path, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    lines, last = 1, False
    while not last:
        block = _guarded(lambda: stream.read(_READ_BYTES), path, lines)
        last = not block
        try:
            text = decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n")
            raise InputError(
                f"{path}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}): leave the file out (--exclude), "
                "or accept replacement characters with --encoding_errors=replace"
            ) from error
        lines += text.count("\n")
        yield text


def _checked_text(value: object, where: str, form: Format) -> str:
    """A text field's value: null is an empty document, anything else than a string an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {form.text_key!r} is a {type(value).__name__}, not text (--text_key)")
    return value


def _open(path: Path, compression: str) -> tuple[IO[bytes], IO[bytes]]:
    """The file itself (its position is the progress) and the stream of its uncompressed content."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}") from error
    if compression == ".gz":
        return raw, gzip.GzipFile(fileobj=raw)
    if compression == ".xz":
        return raw, lzma.LZMAFile(raw)
    if compression == ".zst":
        return raw, io.BufferedReader(_ZstdStream(raw), _READ_BYTES)
    return raw, raw


class _ZstdStream(io.RawIOBase):
    """Decompresses every frame of a .zst file and notices its early end (zstandard's stream_reader stops silently)."""

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # as written by zstd --long=31
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_READ_BYTES // 8)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._output, self._input = memoryview(self._frame.decompress(self._input)), b""
            except self._error as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _guarded(read, path: Path, line: int) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}:{line}: damaged or unreadable from here on: {_reason(error)}") from error


def _origins(entries: Sequence[str]) -> list[str]:
    """Names of the inputs as sources: the shortest end of each path, in whole parts, that no other input shares."""
    parts = {e: Path(os.path.abspath(Path(e).expanduser())).parts for e in entries if e != "sotu" and not e.startswith("hf:")}

    def name(own: tuple[str, ...]) -> str:
        for length in range(1, len(own)):
            if all(other == own or other[-length:] != own[-length:] for other in parts.values()):
                return "/".join(own[-length:])
        return os.path.join(*own)

    return [name(parts[entry]) if entry in parts else entry for entry in entries]


def _files(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.rglob("*") if path.is_file()]
    except OSError as error:
        raise InputError(f"input {folder}: {_reason(error)}") from error
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(visible, key=lambda path: path.relative_to(folder).parts)


def _selected(path: Path, include: str, exclude: str | None) -> bool:
    name = path.as_posix()
    return fnmatch.fnmatch(name, include) and not (exclude and fnmatch.fnmatch(name, exclude))


def _file_source(path: Path, name: str, origin: str) -> Source:
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it")
    return Source(name, path, path.stat().st_size, origin)


def _neighbour(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = errors.close(path.name, names)
    return "" if close is None else f", did you mean {path.parent / close}?"


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
