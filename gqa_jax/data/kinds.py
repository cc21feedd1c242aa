"""What a file is, by its first bytes; its name decides only where these leave it open.

A file is unpacked (gzip, zstd, xz, bzip2, in each other too), turned into UTF-8 when it begins with the mark of UTF-16 or
UTF-32, and is then JSON, a table with a header (CSV, TSV), Parquet, or plain text. What holds no text is an error that says
what it is.
"""

from __future__ import annotations

import codecs
import contextlib
import decimal
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from gqa_jax.data.sources import JSON_SUFFIXES, TABLE_SUFFIXES, InputError, Source, reason, shown, suffixes
from gqa_jax.data.streams import BUFFER_BYTES, DAMAGE, PACKINGS, put_back, recoded, unpacked

LARGEST = 1 << 31  # bytes of what is held in memory whole: a document, a line, a JSON array
_SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
_HEAD_BYTES = 1 << 16  # that are looked at
_MOST_PACKINGS = 4
_FIRST_OBJECTS = 100  # lines, or entries of an array, by which JSON under another name is known
_FEW_BAD = 0.1  # share of characters that may be no UTF-8 where replacing them still leaves a text

_MARKS = {  # of an encoding, the longer ones first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_FROM_ARROW = "write it as Parquet first (datasets: load_from_disk(...).to_parquet(...))"
_LFS = rb"version https://git-lfs\.github\.com/spec/v\d+\r?\n"
_NO_TEXT = (  # first bytes of what holds no text, or none that can be read here: what it is, what to do, with `Source.leave`
    (rb"PK\x03\x04", "a zip archive", "unpack it first"),
    (rb"PK\x05\x06", "an empty zip archive", "{leave}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (rb"Rar!\x1a\x07", "a rar archive", "unpack it first"),
    (rb"\x04\x22\x4d\x18", "compressed by lz4", "unpack it first (lz4 -d)"),
    (rb"\x1f\x9d", "compressed by compress (.Z)", "unpack it first (gunzip)"),
    (rb"%PDF-(?:\d\.\d\s*[\r\n])?", "a PDF", "turn it into text first (pdftotext), or {leave}"),
    (rb"\x7fELF", "a program (ELF)", "{leave}"),
    (rb"ARROW1\0\0", "an Arrow file", _FROM_ARROW),
    (rb"\xff\xff\xff\xff..\0\0", "an Arrow stream", _FROM_ARROW),
    (rb"SQLite format 3\0", "an SQLite database", "export its text first, or {leave}"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its text first, or {leave}"),
    (rb"Obj\x01", "an Avro file", "write it as Parquet or JSON lines first"),
    (rb"\x89PNG\r\n", "an image (PNG)", "{leave}"),
    (rb"\xff\xd8\xff", "an image (JPEG)", "{leave}"),
    (rb"GIF8[79]a", "an image (GIF)", "{leave}"),
    (rb"II\*\0|MM\0\*", "an image (TIFF)", "{leave}"),
    (rb"\x93NUMPY", "a NumPy array", "{leave}"),
    (rb"PARE", "an encrypted Parquet file", "decrypt it first"),
    (_LFS, "the pointer to a file in Git LFS, and not that file", "git lfs pull"),
)
_STARTS_NO_TEXT = re.compile(b"|".join(b"(" + begin + b")" for begin, _, _ in _NO_TEXT), re.DOTALL)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"


def _integer(digits: str) -> int | decimal.Decimal:
    try:
        return int(digits)
    except ValueError:  # more digits than Python turns into an int
        return decimal.Decimal(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


class Opened(NamedTuple):
    """An open file: what it is, and its content."""

    path: str  # for messages
    leave: str  # how to leave it out, for messages
    kind: str  # "JSON", "CSV", "TSV", "Parquet" or "plain text"
    raw: IO[bytes]  # as stored
    stream: io.BufferedReader  # of Parquet as stored, else unpacked, as UTF-8 but for bytes that are none
    position: Callable[[int], int]  # about how many bytes as stored were read, given those that came out of `stream`
    delimiter: str  # of the columns of a table, by the name of the file


@contextlib.contextmanager
def opened(source: Source, text_key: str, encoding_errors: str, note: Callable[[str, str], None]) -> Iterator[Opened]:
    """The file of a source, open. `note(what, path)` is called for what a person should know of it.

    Raises InputError for what can't be read. That a file changes meanwhile is noticed elsewhere (`gqa_jax.data.inputs`).
    """
    path = shown(source.path)
    suffix, packings = suffixes(source.path.name)
    found = []  # packings
    try:
        raw = source.path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error
    with raw:
        stream = io.BufferedReader(raw, min(BUFFER_BYTES, source.size + 1))
        try:
            while packing := next((name for name, first in PACKINGS.items() if first.match(stream.peek(1))), None):
                found.append(packing)
                if len(found) > _MOST_PACKINGS:
                    raise InputError(f"{path}: packed more than {_MOST_PACKINGS} times ({', '.join(found)}): unpack it first")
                stream = unpacked(stream, packing)
            head = stream.peek(1)[:_HEAD_BYTES]
            _check_packing(path, source.leave, head, found, packings, note)
            encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
            if encoding is not None:
                note(f"{encoding[:-3].upper()}, read as such", path)  # without the order of bytes
                stream.read(4 if "32" in encoding else 2)
                stream = recoded(stream, encoding, encoding_errors)
                head = stream.peek(1)[:_HEAD_BYTES]
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
                head = head[len(codecs.BOM_UTF8) :]
            kind = _kind(path, source.leave, head, suffix, found)
            if kind not in ("Parquet", "JSON"):
                stream, objects = _begin_of_json(stream, head, kind)
                if any(text_key in fields for fields in objects):
                    note("JSON, read as such", path)
                    kind = "JSON"
                elif objects:
                    note(f"looks like JSON without a field {text_key!r} (--text_key): read as {kind}", path)
        except DAMAGE as error:
            raise InputError(f"{path}:1: damaged or unreadable from here on: {reason(error)}") from error
        if not source.size:
            note("empty", path)
        if kind == "Parquet" and suffix != ".parquet":
            note("Parquet, read as such", path)
        is_stored = not found and encoding is None
        position = (lambda read: read) if is_stored else (lambda read: raw.tell())
        yield Opened(path, source.leave, kind, raw, stream, position, TABLE_SUFFIXES.get(suffix, ","))


def bad_utf8(data: bytes, start: int, leave: str) -> str:
    """What to do about data whose byte `start` is no UTF-8, by how many around it are none; `leave` is how to leave it out."""
    around = data[max(0, start - 4096) : start + 4096].decode("utf-8", "replace")
    convert = "it is in another encoding (often Windows-1252: iconv -f WINDOWS-1252 -t UTF-8)"
    if around.count("\ufffd") <= max(1, _FEW_BAD * len(around)):
        return f"{convert}, or damaged: {leave}, or lose those letters with --encoding_errors=replace"
    return f"{convert}, or no text: {leave}"


def _check_packing(
    path: str, leave: str, head: bytes, found: list[str], said: list[str], note: Callable[[str, str], None]
) -> None:
    """A file whose name says that it is packed, and whose first bytes deny it."""
    if not said or found == said[: len(found)] != []:
        return
    if found:
        note(f"{', then '.join(found)} and not {said[0]} as the name says, read as such", path)
    elif len(head) < 8:
        raise InputError(f"{path}: {len(head)} bytes are no {said[0]} file, cut off? get it again, or {leave}")
    else:
        note(f"no {said[0]} file as the name says, read as it is", path)


def _kind(path: str, leave: str, head: bytes, suffix: str, packings: list[str]) -> str:
    """The kind of a file by the first bytes of its unpacked content in UTF-8. Raises InputError for what is no text."""
    may_be_text = b"\0" not in head and _is_utf8(head)
    if head.startswith(b"PAR1") and (suffix == ".parquet" or not may_be_text):
        if packings:
            raise InputError(f"{path}: Parquet within {packings[0]}, which can't be read in pieces: unpack it first")
        return "Parquet"
    start = _STARTS_NO_TEXT.match(head)
    if start and not (may_be_text and start[0].decode("latin-1").isprintable()):  # a mark of letters may begin a text
        _, what, advice = _NO_TEXT[start.lastindex - 1]
        raise InputError(f"{path}: {what}: {advice.format(leave=leave)}")
    if suffix == ".parquet":
        begin = f"it begins with {head[:20]!r}" if head else "it is empty"
        raise InputError(f"{path}: not a readable Parquet file: {begin}: get it again, rename it, or {leave}")
    if head[257:262] == b"ustar" and not may_be_text:
        raise InputError(f"{path}: a tar archive: unpack it first (tar -xf)")
    is_json = suffix in JSON_SUFFIXES
    if b"\0" in head and not _is_text(head):
        if encoding := _unmarked(head):
            raise InputError(
                f"{path}: looks like {encoding} without a byte-order mark: convert it first (iconv -f {encoding} -t UTF-8), "
                f"or {leave}"
            )
        # Lines of JSON with zeros among them, as a power cut leaves them, are judged line by line.
        if not is_json or not (head.lstrip().startswith((b"{", b"[")) or b'\n{"' in head):
            raise InputError(f"{path}: no text but binary data (a zero byte at {head.index(0):,}): {leave}")
    if suffix in TABLE_SUFFIXES:
        return "CSV" if TABLE_SUFFIXES[suffix] == "," else "TSV"
    return "JSON" if is_json else "plain text"


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _is_text(head: bytes) -> bool:
    """Whether bytes with zeros among them are text all the same: UTF-8 with few control characters."""
    return _is_utf8(head) and len(head) - len(head.translate(None, _CONTROLS)) <= len(head) / 10


def _unmarked(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: the high bytes of most or many characters are zero, and those alone."""
    for width, bits in ((4, 32), (2, 16)):
        whole = head[: len(head) // width * width]
        for order, high, low in (("LE", width - 1, 0), ("BE", 0, width - 1)):
            zeros, others = whole[high::width].count(0), whole[low::width].count(0)
            enough = len(whole) // width * (0.9 if width == 4 else 0.05)
            if whole and zeros >= enough and others <= zeros / 20:
                with contextlib.suppress(UnicodeDecodeError):
                    codecs.getincrementaldecoder(f"utf-{bits}-{order}")().decode(whole)
                    return f"UTF-{bits}{order}"
    return None


def _begin_of_json(stream: io.BufferedReader, head: bytes, kind: str) -> tuple[io.BufferedReader, list[dict[str, Any]]]:
    """JSON objects with which a file under another name begins, none where it is no JSON; and its stream, from the start."""
    if not head.lstrip().startswith((b"{", b"[")):  # a line before the objects may be damaged, or the header of a table
        return stream, _object_lines(head.decode("utf-8", "replace")) if kind == "plain text" else []
    data, _ = layout(stream)
    text = data.decode("utf-8", "replace")
    return put_back(data, stream), _object_lines(text) or _first_objects(text)


def _first_objects(text: str) -> list[dict[str, Any]]:
    """JSON objects with which an array begins, or a text of objects over several lines."""
    objects, position = [], after_space(text, 0)
    is_array = text[position] == "["
    position = after_space(text, position + is_array)
    with contextlib.suppress(ValueError, RecursionError):
        while text[position : position + 1] == "{" and len(objects) < _FIRST_OBJECTS:
            fields, position = DECODER.raw_decode(text, position)
            objects.append(fields)
            position = after_space(text, position)
            if is_array:
                position = after_space(text, position + 1)
            elif text[position : position + 1] not in ("", "{"):
                return []
    return objects


def _object_lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects among the first lines of a text; none where neither the first line is one nor most of them are."""
    lines = [line for line in text.split("\n", _FIRST_OBJECTS)[:_FIRST_OBJECTS] if line.strip()]
    values = [parsed(line) if line.lstrip().startswith("{") else None for line in lines]
    values = [value if isinstance(value, dict) else None for value in values]
    if len(values) > 1 and values[-1] is None and len(lines) < _FIRST_OBJECTS and not text.endswith("\n"):
        del values[-1]  # perhaps cut
    objects = [value for value in values if value is not None]
    return objects if values and (values[0] is not None or 2 * len(objects) > len(values)) else []


def layout(stream: io.BufferedReader) -> tuple[bytes, bool]:
    """As much of JSON as tells how it is written, and whether that is as a whole: not a value a line."""
    data, is_whole = b"", None
    while is_whole is None and len(data) <= LARGEST:
        more = stream.read(max(len(data), _HEAD_BYTES))
        data += more
        is_whole = _is_whole(data.decode("utf-8", "replace"), ended=not more)
    return data, is_whole is not False


def _is_whole(text: str, ended: bool) -> bool | None:
    """Whether JSON is one array, or begins with an object over several lines; None: more of it must be seen."""
    begin = after_space(text, 0)
    is_array = text[begin : begin + 1] == "["
    end = after_space(text, begin + is_array)
    if not is_array or text[end : end + 1] != "]":
        try:
            _, end = DECODER.raw_decode(text, end)
        except json.JSONDecodeError as error:
            is_cut = error.pos > len(text) - 100 or error.msg.startswith("Unterminated string")
            return None if is_cut and not ended else False
        except (ValueError, RecursionError):
            return False
    if not is_array:
        return "\n" in text[begin:end]
    end = after_space(text, end)
    if end == len(text) and not ended:
        return None
    if text[end : end + 1] not in (",", "]"):
        return False
    # Lists, one a line, are no array; the first of them must be whole, and followed by something.
    line, _, others = text[begin:].partition("\n")
    if isinstance(parsed(line), Exception):
        return True
    return False if others.strip() else True if ended else None


def parsed(text: str) -> Any:
    """The value of JSON; or the ValueError or RecursionError that says what is wrong with it."""
    try:
        return DECODER.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return error


def after_space(text: str, position: int) -> int:
    """Where the white space of JSON that begins at `position`, if any does, ends."""
    return _SPACE.match(text, position).end()
