"""What a tokenizer loses of a text: pieces from all over it are encoded, decoded, and compared.

A byte-level tokenizer loses nothing. Others write entries they don't have as an unknown token or leave them out, fold case,
normalise characters or white space: a loss per byte of such a text is not one of the text that was given.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from gqa_jax.data.vocabulary import Tokenizer

PIECES = 64  # of every chunk of documents (16 million characters)
PIECE_CHARS = 1024
_WORD = re.compile(r"(?<=\s)\S")
_SHOWN = 24  # characters of an example


class Sample(NamedTuple):
    """Pieces of documents, short ones whole, and how what they decode to differs from the text that was encoded."""

    pieces: int = 0
    changed: int = 0  # pieces that don't come back as they were
    text_bytes: int = 0
    lost_bytes: int = 0  # of characters that don't come back; order is not looked at
    example: Sequence[str] | None = None  # a piece of text, and what came back in its place


def total(samples: Sequence[Sample]) -> Sample:
    """All samples as one, with the first example."""
    counts = (sum(column) for column in zip(*(own[:-1] for own in samples), strict=True))
    return Sample(*counts, example=next((own.example for own in samples if own.example), None))


def sample(texts: Sequence[str], tokenizer: Tokenizer) -> Sample:
    """What the tokenizer loses of pieces at even distances in the texts, each of them valid Unicode."""
    ends = list(accumulate(len(text) for text in texts))
    starts = {}  # as a set, but in order
    for i in range(PIECES):
        position = (2 * i + 1) * ends[-1] // (2 * PIECES)
        document = bisect_right(ends, position)
        offset = position - (ends[document] - len(texts[document]))
        starts[document, _word(texts[document], offset) if offset >= PIECE_CHARS else 0] = None
    pieces = [texts[document][start : start + PIECE_CHARS] for document, start in starts]
    decoded = map(tokenizer.decode, tokenizer.encode_batch(pieces))
    changed = [(before, after) for before, after in zip(pieces, decoded, strict=True) if before != after]
    lost = sum(_bytes_of((Counter(before) - Counter(after)).elements()) for before, after in changed)
    return Sample(len(pieces), len(changed), _bytes_of(pieces), lost, _difference(*changed[0]) if changed else None)


def _word(text: str, offset: int) -> int:
    """Where a word begins at or after `offset`, if one does soon: white space at an end is not kept by every tokenizer."""
    found = _WORD.search(text, offset, offset + PIECE_CHARS)
    return found.start() if found else offset


def _bytes_of(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _difference(before: str, after: str) -> list[str]:
    """Both texts from a little before where they begin to differ."""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    start = max(0, same - _SHOWN // 3)
    return [before[start : start + _SHOWN], after[start : start + _SHOWN]]
