"""Inputs of `prepare`: files, folders and named corpora as one stream of documents, in an order that never changes.

Which inputs there are, and what is a document of each, is told in docs/data.md. The first bytes of a file decide what it is
(`gqa_jax.data.kinds`). Text is kept as it is, line ends too; only a byte-order mark at the start is dropped.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gqa_jax.data import corpus
from gqa_jax.data.kinds import LARGEST, Opened, bad_utf8, opened
from gqa_jax.data.rows import DAMAGED, Bad, Format, Rows, dataset_rows, json_rows, parquet_rows, table_rows, usable
from gqa_jax.data.sources import Found, InputError, Source, find_sources, reason
from gqa_jax.data.streams import DAMAGE

__all__ = ["Document", "Format", "Found", "InputError", "Reading", "Source", "find_sources", "read_documents"]

_READ_BYTES = 1 << 20
_PIECE_CHARS = 1 << 16
_new_tuple = tuple.__new__


class Document(NamedTuple):
    """A document: its text, how many bytes of its file were read up to its end (for a progress bar), and its source."""

    text: str
    position: int
    source: str  # `Source.origin`, or the value of the field `Format.source_key`


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

    kinds: dict[str, Counted] = field(default_factory=dict)  # "JSON", "plain text", ...
    bad_lines: dict[str, BadLines] = field(default_factory=dict)  # by reason
    _noted: dict[str, list] = field(default_factory=dict)  # what -> path of the first file, number of others

    @property
    def notes(self) -> list[str]:
        """Sentences that a person should see, each about one file or more: "a.txt and 2 more: UTF-16, read as such"."""
        return [f"{first}{f' and {more:,} more' if more else ''}: {what}" for what, (first, more) in self._noted.items()]

    def note(self, what: str, path: str) -> None:
        if what in self._noted:
            self._noted[what][1] += 1
        else:
            self._noted[what] = [path, 0]

    def skipped(self, bad: Bad, where: str) -> None:
        self.bad_lines.setdefault(bad.reason, BadLines(0, where)).count += 1


def read_documents(source: Source, form: Format, reading: Reading) -> Iterator[Document]:
    """Documents of one source in order, empty ones too, counted in `reading`.

    Raises InputError, which names file and line or row, on the first that can't be read; with bad_lines "skip" lines and rows
    that can't be used are counted and left out, and it is only raised where the rest of a file is lost.
    """
    if source.path is None:
        if source.name == "sotu":
            _check_plain("sotu", form)
            yield from _documents(_sotu(), "embedded corpus", "", source, form, reading)
        else:
            yield from _documents(dataset_rows(source.name, form), "dataset", f"{source.name} row ", source, form, reading)
        return
    with opened(source, form.text_key, form.encoding_errors, reading.note) as file:
        where = f"{file.path}:" if file.kind == "JSON" else f"{file.path} row "
        if file.kind == "JSON":
            rows = json_rows(file, form)
        elif file.kind == "plain text":
            _check_plain(file.path, form)
            rows = _plain(file, form, reading)
        else:
            rows = parquet_rows(file, form, source.size) if file.kind == "Parquet" else table_rows(file, form)
        yield from _documents(rows, file.kind, where, source, form, reading)


def _documents(
    batches: Iterator[Rows], kind: str, where: str, source: Source, form: Format, reading: Reading
) -> Iterator[Document]:
    """Documents of rows; `where` stands before the number of a row in messages."""
    counted = reading.kinds.setdefault(kind, Counted())
    counted.files += 1
    key, origin, of_field = form.text_key, source.origin, form.source_key is not None
    begin, skipped = counted.documents, 0
    for rows, places, position in batches:
        documents = text_bytes = 0  # in this batch: a count in a variable is faster than one in an object
        try:
            for row, place in zip(rows, places, strict=True):
                text, name = row.get(key) if type(row) is dict else row, origin
                if of_field or type(text) is not str:
                    result = usable(row, form, origin)
                    if type(result) is Bad:
                        if form.bad_lines == "error":
                            others = "; --bad_lines=skip leaves such ones out" if documents or counted.documents > begin else ""
                            raise InputError(f"{where}{place}: {result.message}{others}")
                        reading.skipped(result, f"{where}{place}")
                        skipped += 1
                        continue
                    text, name = result
                documents += 1
                text_bytes += len(text) if text.isascii() else _text_bytes(text)
                yield _new_tuple(Document, (text, position, name))  # Document(...) takes twice as long
        finally:
            counted.documents += documents
            counted.text_bytes += text_bytes
    if skipped and counted.documents == begin:
        reading.note("none of its lines or rows can be used", where.removesuffix(":").removesuffix(" row "))


def _text_bytes(text: str) -> int:
    # Half a surrogate pair counts as the U+FFFD that stands for it in a store: three bytes.
    if len(text) <= _PIECE_CHARS:
        return len(text.encode("utf-8", "surrogatepass"))
    pieces = (text[i : i + _PIECE_CHARS] for i in range(0, len(text), _PIECE_CHARS))  # memory that is used again is fast
    return sum(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces)


def _check_plain(path: str, form: Format) -> None:
    if form.source_key is not None:
        raise InputError(
            f"{path}: plain text has no fields, and no {form.source_key!r} that could name a source: leave --source_key out "
            "(each input is a source then), or give JSON lines, Parquet, CSV or TSV"
        )


def _sotu() -> Iterator[Rows]:
    position = 0
    for text in corpus.load_sotu():
        position += len(text.encode("utf-8"))
        yield [text], [0], position


def _plain(file: Opened, form: Format, reading: Reading) -> Iterator[Rows]:
    """Texts of a plain file."""
    progress = [0]  # bytes of text taken from the stream
    all_texts = _split(_decoded(file, form.encoding_errors, progress, reading), form.separator, file.path)
    for read, texts in itertools.groupby(all_texts, key=lambda text: progress[0]):
        texts = list(texts)
        yield texts, range(len(texts)), file.position(read)


def _split(blocks: Iterator[str], separator: str | None, path: str) -> Iterator[str]:
    """The parts of the joined blocks between separators; holds one part and one block, and looks at each text once."""
    overlap = 0 if separator is None else len(separator) - 1  # a separator may lie across blocks
    parts, tail, size = [], "", 0
    for block in blocks:
        first, *others = [tail + block] if separator is None else (tail + block).split(separator)
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
        size = len(others[-1]) if others else size + len(block)
        if size > LARGEST:
            raise InputError(f"{path}: a document of more than {LARGEST:,} characters: cut the file with --separator")
        tail = parts[-1][len(parts[-1]) - overlap :] if len(parts[-1]) > overlap else parts[-1]
        parts[-1] = parts[-1][: len(parts[-1]) - len(tail)]
    yield "".join(parts) + tail


def _decoded(file: Opened, errors: str, progress: list[int], reading: Reading) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    lines, chars, replaced, last = 1, 0, 0, False
    while not last:
        try:
            block = file.stream.read(_READ_BYTES)
        except DAMAGE as error:
            raise InputError(f"{file.path}:{lines}: {DAMAGED}: {reason(error)}") from error
        last = not block
        progress[0] += len(block)
        try:
            text = decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n")
            raise InputError(
                f"{file.path}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}): "
                f"{bad_utf8(error.object, error.start, file.leave)}"
            ) from error
        lines += text.count("\n")
        if errors == "replace":
            chars, replaced = chars + len(text), replaced + text.count("\ufffd")
        yield text
    if replaced > chars / 10:
        reading.note("more than a tenth of its characters is U+FFFD: no UTF-8, perhaps no text", file.path)
