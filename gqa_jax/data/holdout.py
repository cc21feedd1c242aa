"""Which documents of a store are held out, and in which order they are kept: two rules, both functions of the documents.

"hash", the rule of new stores (docs/data.md): documents whose hash, the first 8 bytes of SHA-256 of their text as UTF-8, is
below 2^64 / every, and what keeps a source or store from having none; kept by (name of the source, hash), so that the order of
the inputs does not matter. A store of one document holds out its end (`tail_start`).

"position", the rule of the first version. Document i, empty ones not counted, is held out when i % every == every // 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gqa_jax.data.sources import InputError

TAIL_BLOCK = 131_072  # tokens: the end of a single document is cut on a border of blocks of at most this size
_NAMED = 3  # sources that a sentence names; of more it says how many


class Split(NamedTuple):
    """Where the documents of a store go."""

    held_out: np.ndarray  # bool (documents,), in the order of the inputs
    order: np.ndarray  # int64 (held-out documents,): those, in the order in which they are kept
    doubts: list[str]  # sentences on sources of which nothing is held out, or trained on


#: A single document that was cut in two: the second is held out.
TAIL = Split(
    np.array([False, True]),
    np.array([1]),
    [
        "1 document: its end is held out, which is more like the rest of it than other documents are, so its loss is lower "
        "than that of new text"
    ],
)


def hash_of(data: bytes) -> int:
    """The hash of a document, 0 to 2^64 - 1, from its text as UTF-8."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def limit(every: int) -> int:
    """The largest hash that is below 2^64 / every."""
    return (2**64 - 1) // every


def by_position(documents: int, every: int) -> Split:
    """The first version's rule. Raises InputError where nothing would be held out."""
    if documents < 2:
        raise InputError("1 document: a store needs at least 2, one of them held out; --separator cuts a file into documents")
    if documents <= every // 2:
        fitting = min(every, 2 * documents - 1)
        raise InputError(
            f"{documents} documents are too few to hold out every {every}th: "
            f"use --holdout_every={fitting} or less, or cut files into documents with --separator"
        )
    held_out = np.arange(documents) % every == every // 2
    return Split(held_out, np.flatnonzero(held_out), [])


def by_hash(hashes: np.ndarray, sources: np.ndarray, names: Sequence[str], every: int) -> Split:
    """The rule by hash, for at least two documents.

    Args:
      hashes: uint64 (documents,), `hash_of` each.
      sources: int (documents,), index into `names` of each document's source.
      names: of the sources; each has a document.
    Raises:
      InputError: all documents are the same text, or all would be held out.
    """
    lowest = np.full(len(names), 2**64 - 1, np.uint64)
    highest = np.zeros(len(names), np.uint64)
    np.minimum.at(lowest, sources, hashes)
    np.maximum.at(highest, sources, hashes)
    if lowest.min() == highest.max():
        raise InputError(
            f"{len(hashes):,} documents, all of them the same text: what is held out would be trained on too; give other text, "
            "or a single document, whose end is held out"
        )
    if highest.max() <= limit(every):
        raise InputError(
            f"{len(hashes):,} documents, all of them with hashes in the lowest 1/{every}: all would be held out, and nothing "
            f"trained on; use --holdout_every={(2**64 - 1) // int(highest.max()) + 1} or more"
        )
    # All from what is below the limit, not one after the other: the order of the sources must not matter.
    without = (lowest > limit(every)) & (lowest != highest)
    held_out = (hashes <= limit(every)) | np.isin(hashes, lowest[without])
    if not held_out.any():  # sources of one text each, none below
        held_out = hashes == lowest.min()
    chosen = np.flatnonzero(held_out)
    _, rank = np.unique(names, return_inverse=True)
    order = chosen[np.lexsort((hashes[chosen], rank[sources[chosen]]))]
    return Split(held_out, order, _doubts(sources, names, held_out, lowest == highest))


def tail_start(tokens: int, every: int) -> int:
    """Where the held-out end of a single document of so many tokens begins, its end of document not counted.

    At the last border of blocks of B tokens at or below tokens * (1 - 1 / every), where B is the largest power of two that is
    at most tokens / every and TAIL_BLOCK. Raises InputError for a document that is too short.
    """
    block = 1 << (max(1, min(tokens // every, TAIL_BLOCK)).bit_length() - 1)
    start = tokens * (every - 1) // every // block * block
    if not start:
        raise InputError(f"1 document of {tokens} token: too short to hold out its end; give more text")
    return start


def _doubts(sources: np.ndarray, names: Sequence[str], held_out: np.ndarray, one_text: np.ndarray) -> list[str]:
    documents = np.bincount(sources, minlength=len(names))
    held = np.bincount(sources[held_out], minlength=len(names))
    sentences = []
    for chosen, end in ((held == 0, "none of it is held out"), (held == documents, "none of it is trained on")):
        found = sorted((names[i], int(documents[i]), bool(one_text[i])) for i in np.flatnonzero(chosen))
        if len(found) > _NAMED:
            few = ", ".join(name for name, *_ in found[:_NAMED])
            ending = end.replace("of it", "of them")
            sentences.append(f"{len(found):,} sources, most often of 1 document each ({few}, ...): {ending}")
            continue
        for name, count, one in found:
            size = "1 document" if count == 1 else f"{count:,} copies of 1 document" if one else f"{count:,} documents"
            sentences.append(f"source {name} has {size}: {end}")
    return sentences
