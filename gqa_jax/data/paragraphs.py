"""Paragraphs of held-out documents that are in the training split too: near-duplicates, which whole documents don't show.

What a paragraph is, and when two are copies, is told in docs/data.md. Long ones are compared by their ends, so that this costs
little beside tokenizing; short ones are not looked at, as headings and polite phrases recur in any text.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

MIN_CHARS = 64
LONG_BYTES = 512
END_CHARS = 128

_LOWER = bytes(range(256)).lower()
_BLANKS = b" \n\t\v\f\r"


def keys(texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of all paragraphs that are long enough, uint64, and how many each text (UTF-8) has, int32 (texts,)."""
    digests, counts = [], []
    for text in texts:
        before = len(digests)
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        # A search for two bytes is slow where there are none, one for a line end is not.
        first = text.find(b"\n")
        if first == 0:
            text = text.lstrip(b"\n")
            first = text.find(b"\n")
        has_blank_lines = first >= 0 and b"\n\n" in text[first:].rstrip(b"\n")
        for paragraph in text.split(b"\n\n" if has_blank_lines else b"\n"):
            if len(paragraph) >= MIN_CHARS:  # bytes, of which no character has less than one
                folded = _folded(paragraph) if len(paragraph) <= LONG_BYTES else _ends(paragraph)
                if len(folded) >= MIN_CHARS:
                    digests.append(blake2b(folded, digest_size=8).digest())
        counts.append(len(digests) - before)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64), np.array(counts, np.int32)


def _folded(text: bytes) -> bytes:
    """Characters without white space and case; empty where they are fewer than MIN_CHARS."""
    if text.isascii():
        return text.translate(_LOWER, _BLANKS)
    folded = "".join(text.decode("utf-8", "ignore").casefold().split())  # a text that was cut may end within a character
    return folded.encode("utf-8") if len(folded) >= MIN_CHARS else b""


def _ends(text: bytes) -> bytes:
    """The same of both ends of a long paragraph."""
    head, tail = _folded(text[: LONG_BYTES // 2]), _folded(text[-LONG_BYTES // 2 :])
    if len(head) < END_CHARS or len(tail) < END_CHARS:  # hardly anything but white space there
        head = tail = _folded(text)
    return head[:END_CHARS] + tail[-END_CHARS:]


def copied(held_out: np.ndarray, counts: np.ndarray, trained: Iterable[np.ndarray]) -> dict[str, int]:
    """How many held-out paragraphs and documents there are, and of how many a copy, of one paragraph at least, is trained on.

    `held_out` has the keys of the held-out documents' paragraphs, one document after the other, `counts` how many each has, and
    `trained` the keys of the training split, in pieces.
    """
    keys, which = np.unique(held_out, return_inverse=True)
    found = np.zeros(len(keys), bool)
    for own in trained if len(keys) else ():
        places = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
        found[places[keys[places] == own]] = True
    documents = np.repeat(np.arange(len(counts)), counts)
    return {
        "paragraphs": len(held_out),
        "copied_paragraphs": int(found[which].sum()),
        "documents": len(counts),
        "documents_with_copies": len(np.unique(documents[found[which]])),
    }
