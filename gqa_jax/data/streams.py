"""Streams of bytes that are made from others while they are read: unpacked, or in UTF-8."""

from __future__ import annotations

import bz2
import codecs
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

DAMAGE = (OSError, EOFError)  # what reading one of these streams raises
BUFFER_BYTES = 1 << 18  # of a stream; larger reads go past its buffer
_PACKED_BYTES = 1 << 15  # unpacked at once: a few bytes can become a million times as many

PACKINGS = {  # first bytes
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
}


class Stream(io.RawIOBase):
    """Bytes that come in pieces, made from `source`; those before a fault are given first."""

    def __init__(self, source: IO[bytes], pieces: Iterable[bytes]):
        self._source = source  # that nobody holds closes itself, and the file below it
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")
        self._fault: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer) and self._fault is None:
            try:
                while not self._piece:
                    self._piece = memoryview(next(self._pieces))
            except (*DAMAGE, StopIteration) as fault:
                self._fault = fault
                break
            count = min(len(buffer) - filled, len(self._piece))
            buffer[filled : filled + count], self._piece = self._piece[:count], self._piece[count:]
            filled += count
        if not filled and not isinstance(self._fault, StopIteration):
            raise self._fault
        return filled


def unpacked(source: IO[bytes], packing: str) -> io.BufferedReader:
    """The content of a compressed stream: all its members, and a fault where it ends early or other bytes follow."""
    return io.BufferedReader(Stream(source, _unpacked(source, packing)), BUFFER_BYTES)


def recoded(source: IO[bytes], encoding: str, errors: str) -> io.BufferedReader:
    """Text in another encoding as UTF-8."""
    return io.BufferedReader(Stream(source, _recoded(source, encoding, errors)), BUFFER_BYTES)


def put_back(data: bytes, source: IO[bytes]) -> io.BufferedReader:
    """A stream of `data` and then the rest of `source`."""
    rest = iter(lambda: source.read(BUFFER_BYTES), b"")
    return io.BufferedReader(Stream(source, itertools.chain([data], rest)), BUFFER_BYTES)


def _unpacked(source: IO[bytes], packing: str) -> Iterator[bytes]:
    data = b""
    while True:
        while len(data := data.lstrip(b"\0")) < 10 and (more := source.read(_PACKED_BYTES)):  # zeros may fill up
            data += more
        if not data:
            return
        if not PACKINGS[packing].match(data):
            raise OSError(f"bytes that are no {packing} follow what {packing} packed")
        member = _member(packing)
        while not member.eof:
            if not (data := data or source.read(_PACKED_BYTES)):
                raise EOFError(f"it ends within what {packing} packed")
            try:
                yield member.decompress(data)
            except Exception as error:  # each library has its own
                raise OSError(str(error) or type(error).__name__) from error
            data = b""
        data = member.unused_data


def _recoded(source: IO[bytes], encoding: str, errors: str) -> Iterator[bytes]:
    decoder, block = codecs.getincrementaldecoder(encoding)(errors), b"-"
    while block:
        block = source.read(BUFFER_BYTES)
        try:
            yield decoder.decode(block, final=not block).encode("utf-8")
        except UnicodeDecodeError as error:
            raise OSError(f"not valid {encoding} ({error.reason})") from error


def _member(packing: str) -> Any:
    """What unpacks one member: decompress(bytes), eof, unused_data."""
    if packing == "gzip":
        return zlib.decompressobj(wbits=31)
    if packing == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if packing == "bzip2":
        return bz2.BZ2Decompressor()
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # windows as written by zstd --long=31
