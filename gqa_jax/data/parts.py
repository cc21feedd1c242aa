"""Documents to part files to the files of a store: the parallel and resumable middle of `prepare`.

A part is one chunk of documents, encoded. Its name is the chunk's index and a hash of its text and tokenizer, so a part that
is found may be used whatever happened in between, and one whose text has changed is never found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa_jax.data.store import SPLITS, VERSION, token_dtype
from gqa_jax.data.tokenizer import Tokenizer, TokenizerError

CHUNK_CHARS = 16_000_000  # of text: the unit of work and of memory, and what a killed run loses
CHUNKS_IN_FLIGHT = 2  # beside the one that is being read; tokenizers use several threads for each


class Part(NamedTuple):
    """One encoded chunk on disk."""

    path: Path
    documents: int
    text_bytes: int
    tokens: int
    encoded: bool  # by this run; False: found from an earlier one


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, folder: Path, on_part: Callable[[Part], None] = lambda part: None
) -> tuple[list[Part], int]:
    """Part files in `folder` of all documents, in order, and the number of empty documents, which are left out.

    Raises what reading raises, TokenizerError for an id outside the vocabulary, OSError for a full disk; finished parts stay.
    """
    done: list[Part] = []
    pending: deque[Future[Part]] = deque()
    empty = 0

    def finish_one() -> None:
        done.append(pending.popleft().result())
        on_part(done[-1])

    with ThreadPoolExecutor(CHUNKS_IN_FLIGHT, thread_name_prefix="chunk") as pool:
        for index, (texts, skipped) in enumerate(_chunks(documents)):
            empty += skipped
            if texts:
                pending.append(pool.submit(_encode_chunk, index, texts, tokenizer, folder))
            if len(pending) == CHUNKS_IN_FLIGHT:
                finish_one()
        while pending:
            finish_one()
    return done, empty


def assemble(parts: Sequence[Part], out: Path, tokenizer: Tokenizer, holdout_every: int) -> dict[str, dict[str, Any]]:
    """Write .bin and .docs.npy of both splits into `out`; returns the header's `splits`.

    Document i, counted over all parts, goes to validation when i % holdout_every == holdout_every // 2, else to train.
    """
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    counts = {split: [] for split in SPLITS}
    text_bytes = {split: [] for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    first = 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((out / f"{split}.bin").open("wb")) for split in SPLITS}
        for part in parts:
            with np.load(part.path) as arrays:
                tokens, part_counts, part_bytes = arrays["tokens"], arrays["counts"], arrays["text_bytes"]
            held_out = np.arange(first, first + part.documents) % holdout_every == holdout_every // 2
            first += part.documents
            # Runs of documents of one split, in turns: few and long copies instead of a mask over tokens.
            borders = np.flatnonzero(np.diff(held_out)) + 1
            runs = np.split(tokens, np.cumsum(part_counts)[borders - 1])
            for held, split in enumerate(SPLITS):
                chosen = held_out == held
                own_runs = runs[0::2] if chosen[0] else runs[1::2]
                data = np.concatenate([tokens[:0], *own_runs]).astype(dtype, copy=False).data
                files[split].write(data)
                digests[split].update(data)
                counts[split].append(part_counts[chosen])
                text_bytes[split].append(part_bytes[chosen])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    facts = {}
    for split in SPLITS:
        ends = np.cumsum(np.concatenate(counts[split]))
        documents = np.stack([ends, np.concatenate(text_bytes[split])], axis=1).astype("<i8")
        with (out / f"{split}.docs.npy").open("wb") as file:
            np.save(file, documents)
            file.flush()
            os.fsync(file.fileno())
        facts[split] = {
            "tokens": int(ends[-1]),
            "documents": len(documents),
            "bytes": int(documents[:, 1].sum()),
            "sha256": digests[split].hexdigest(),
            "documents_sha256": hashlib.sha256(documents.tobytes()).hexdigest(),
        }
    return facts


def _chunks(documents: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Consecutive documents of about CHUNK_CHARS together, and how many empty ones were among them."""
    texts, size, empty = [], 0, 0
    for text in documents:
        if not text or text.isspace():
            empty += 1
            continue
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield texts, empty
            texts, size, empty = [], 0, 0
    yield texts, empty


def _encode_chunk(index: int, texts: list[str], tokenizer: Tokenizer, folder: Path) -> Part:
    """The part of a chunk: tokens with EOS, and tokens (EOS counted) and bytes of text per document."""
    texts, lengths, digest = _hashed(texts, f"{VERSION} {tokenizer.sha256} {tokenizer.eos_id} ")
    path = folder / f"{index:06d}-{digest[:32]}.npz"
    n_tokens = _tokens_in(path)
    if n_tokens is not None:
        return Part(path, len(texts), int(lengths.sum()), n_tokens, encoded=False)

    ids = tokenizer.encode_batch(texts)
    counts = np.array([len(document) + 1 for document in ids], dtype=np.int64)
    tokens = np.empty(counts.sum(), dtype=token_dtype(tokenizer.vocab_size))
    ends = np.cumsum(counts)
    for document, start, end in zip(ids, ends - counts, ends, strict=True):
        # Before the cast: it would wrap an id that is too large.
        if document.size and document.max() >= tokenizer.vocab_size:
            raise TokenizerError(
                f"tokenizer {tokenizer.name} gave id {document.max()}, outside its vocabulary of {tokenizer.vocab_size} entries"
            )
        tokens[start : end - 1] = document
    tokens[ends - 1] = tokenizer.eos_id
    _write(path, tokens=tokens, counts=counts, text_bytes=lengths)
    return Part(path, len(texts), int(lengths.sum()), len(tokens), encoded=True)


def _hashed(texts: Sequence[str], prefix: str) -> tuple[list[str], np.ndarray, str]:
    """The texts as valid Unicode, their lengths in bytes of UTF-8 (int64), and SHA-256 over prefix and texts."""
    digest, valid, lengths = hashlib.sha256(prefix.encode()), [], []
    for text in texts:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape: U+FFFD, as tokenizers do
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            data = text.encode("utf-8")
        valid.append(text)
        lengths.append(len(data))
        digest.update(data)
    lengths = np.array(lengths, dtype=np.int64)
    digest.update(lengths.astype("<i8").tobytes())
    return valid, lengths, digest.hexdigest()


def _tokens_in(path: Path) -> int | None:
    """Tokens of a part; None when there is none, or it is damaged as after a power cut: then it is made again."""
    try:
        with path.open("rb") as file, np.load(file) as part:  # a zip file: reading checks its CRC-32
            n_tokens = len(part["tokens"])
            return n_tokens if part["counts"].sum() == n_tokens and len(part["text_bytes"]) == len(part["counts"]) else None
    except Exception:  # missing, truncated, no zip, wrong CRC-32, missing array: zipfile and numpy raise many kinds
        return None


def _write(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
