"""Documents to part files to the files of a store: the parallel and resumable middle of `prepare`.

A part is one chunk of documents, encoded, with what decides where they go (hashes) and what is said of them (paragraphs, what
the tokenizer lost of a sample). Its name is the chunk's index and a hash of its text and tokenizer, so a part that is found
may be used whatever happened in between, and one whose text has changed is never found.

Text and tokens are in memory a few chunks at a time; of each document there are some 40 bytes of numbers, of each held-out
paragraph 16.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gqa_jax.data import paragraphs, roundtrip
from gqa_jax.data.holdout import Split, tail_start
from gqa_jax.data.store import SOURCES, SPLITS, token_dtype
from gqa_jax.data.tokenizer import Tokenizer, TokenizerError

CHUNK_CHARS = 16_000_000  # of text: the unit of work and of memory, and what a killed run loses
CHUNKS_IN_FLIGHT = 2  # beside the one that is being read; tokenizers use several threads for each
VERSION = 2  # of part files; those of the first version of the program have neither hashes nor paragraphs
GATHER_TOKENS = 1 << 24  # of held-out documents, put into their order at once

_ARRAYS = ("tokens", "counts", "text_bytes", "hashes", "paragraphs", "n_paragraphs", "sample")


class Part(NamedTuple):
    """One encoded chunk on disk."""

    path: Path
    sources: np.ndarray  # int32 (documents,): index of each document's source
    text_bytes: int
    tokens: int
    encoded: bool  # by this run; False: found from an earlier one

    @property
    def documents(self) -> int:
        return len(self.sources)


class Index(NamedTuple):
    """What is known of all documents, in their order; arrays (documents,)."""

    hashes: np.ndarray  # uint64: `holdout.hash_of`
    sources: np.ndarray  # int32
    tokens: np.ndarray  # int64, the end of the document counted
    text_bytes: np.ndarray  # int64
    n_paragraphs: np.ndarray  # int32: those that `paragraphs` looks at


def encode_documents(
    documents: Iterable[tuple[str, int]],
    tokenizer: Tokenizer,
    folder: Path,
    on_part: Callable[[Part], None] = lambda part: None,
) -> tuple[list[Part], int]:
    """Part files in `folder` of all documents, in order, and the number of empty documents, which are left out.

    A document is its text and the index of its source.
    Raises what reading raises, TokenizerError for an id outside the vocabulary, OSError for a full disk; finished parts stay.
    """
    done: list[Part] = []
    pending: deque[Future[Part]] = deque()
    empty = 0

    def finish_one() -> None:
        done.append(pending.popleft().result())
        on_part(done[-1])

    with ThreadPoolExecutor(CHUNKS_IN_FLIGHT, thread_name_prefix="chunk") as pool:
        for index, (texts, sources, skipped) in enumerate(_chunks(documents)):
            empty += skipped
            if texts:
                pending.append(pool.submit(_encode_chunk, index, texts, np.array(sources, np.int32), tokenizer, folder))
            if len(pending) == CHUNKS_IN_FLIGHT:
                finish_one()
        while pending:
            finish_one()
    return done, empty


def read_index(parts: Sequence[Part]) -> Index:
    """The index of all documents of the parts."""
    columns = []
    for part in parts:
        with np.load(part.path) as arrays:
            columns.append([arrays[name] for name in ("hashes", "counts", "text_bytes", "n_paragraphs")])
    hashes, counts, text_bytes, n_paragraphs = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Index(hashes, np.concatenate([part.sources for part in parts]), counts, text_bytes, n_paragraphs)


def read_sample(parts: Sequence[Part]) -> roundtrip.Sample:
    """What the tokenizer lost of the samples of all parts."""
    total = roundtrip.Sample()
    for part in parts:
        with np.load(part.path) as arrays:
            fields = json.loads(arrays["sample"].tobytes())
        total += roundtrip.Sample(**fields | {"example": fields["example"] and tuple(fields["example"])})
    return total


def assemble(
    parts: Sequence[Part], index: Index, split: Split, names: Sequence[str], out: Path, tokenizer: Tokenizer
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Writes .bin and .docs.npy of both splits, and the sources, into `out`: train in order, held-out in that of `split`.

    `names` are those of the sources. Returns the header's `splits`, and `Overlap.counted` of paragraphs in both.
    """
    dtype = _stored(tokenizer)
    digest = hashlib.sha256()
    overlap = _held_out_paragraphs(parts, index, split)
    gathered = parts[0].path.with_name("validation.tmp")  # held-out documents in the order of the inputs
    first = 0
    with (out / "train.bin").open("wb") as train, gathered.open("wb") as validation:
        for part in parts:
            held_out = split.held_out[first : first + part.documents]
            first += part.documents
            with np.load(part.path) as arrays:
                tokens, counts = arrays["tokens"], arrays["counts"]
                overlap.look(arrays["paragraphs"][np.repeat(~held_out, arrays["n_paragraphs"])])
            # Runs of documents of one split, in turns: few and long copies instead of a mask over tokens.
            borders = np.flatnonzero(np.diff(held_out)) + 1
            runs = np.split(tokens, np.cumsum(counts)[borders - 1])
            for held, file in ((False, train), (True, validation)):
                own_runs = runs[0::2] if held_out[0] == held else runs[1::2]
                data = np.concatenate([tokens[:0], *own_runs]).astype(dtype, copy=False).data
                file.write(data)
                if not held:
                    digest.update(data)
        _sync(train)
    chosen = {"train": np.flatnonzero(~split.held_out), "validation": split.order}
    place = np.searchsorted(np.flatnonzero(split.held_out), split.order)
    sha256 = {
        "train": digest.hexdigest(),
        "validation": _gather(gathered, out / "validation.bin", dtype, index.tokens[split.held_out], place),
    }
    facts = {
        name: _write_documents(out, name, index.tokens[own], index.text_bytes[own], sha256[name])
        for name, own in chosen.items()
    }
    gathered.unlink()
    _write_sources(out, names, {name: index.sources[own] for name, own in chosen.items()})
    return facts, overlap.counted()


def assemble_tail(part: Part, source: str, out: Path, tokenizer: Tokenizer, every: int) -> dict[str, dict[str, Any]]:
    """The splits of a store of one document, of the source of that name, whose end is held out: `holdout.tail_start`.

    An end of document closes both parts. Raises InputError where the document is too short.
    """
    with np.load(part.path) as arrays:
        ids = arrays["tokens"][:-1]
    start = tail_start(len(ids), every)
    # In proportion to what both ends decode to, which may be more or less than the text.
    first_decoded, decoded = tokenizer.bytes_at(ids, [start, len(ids)]).tolist()
    first_bytes = round(part.text_bytes * first_decoded / decoded) if decoded else part.text_bytes * start // len(ids)
    facts = {}
    for name, own, text_bytes in (
        ("train", ids[:start], first_bytes),
        ("validation", ids[start:], part.text_bytes - first_bytes),
    ):
        data = np.append(own, own.dtype.type(tokenizer.eos_id)).astype(_stored(tokenizer), copy=False)
        with (out / f"{name}.bin").open("wb") as file:
            file.write(data.data)
            _sync(file)
        sha256 = hashlib.sha256(data.data).hexdigest()
        facts[name] = _write_documents(out, name, np.array([len(data)]), np.array([text_bytes]), sha256)
    _write_sources(out, [source], dict.fromkeys(SPLITS, np.zeros(1, np.int32)))
    return facts


def _stored(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")


def _held_out_paragraphs(parts: Sequence[Part], index: Index, split: Split) -> paragraphs.Overlap:
    keys, first = [], 0
    for part in parts:
        held_out = split.held_out[first : first + part.documents]
        first += part.documents
        with np.load(part.path) as arrays:
            keys.append(arrays["paragraphs"][np.repeat(held_out, arrays["n_paragraphs"])])
    return paragraphs.Overlap(np.concatenate(keys), index.n_paragraphs[split.held_out])


def _gather(source: Path, target: Path, dtype: np.dtype, counts: np.ndarray, order: np.ndarray) -> str:
    """Writes the documents of `source`, of so many tokens each, in another order; returns the SHA-256 of that.

    `source` is mapped and copied some documents at a time: it may be larger than the memory.
    """
    tokens = np.asarray(np.memmap(source, dtype=dtype, mode="r"))  # a plain view: slices of a memmap are slow to make
    starts = np.cumsum(counts) - counts
    digest = hashlib.sha256()
    sizes = np.cumsum(counts[order])
    borders = np.searchsorted(sizes, np.arange(GATHER_TOKENS, sizes[-1], GATHER_TOKENS)) + 1
    with target.open("wb") as file:
        for documents in np.split(order, borders):
            if len(documents):
                data = np.concatenate([tokens[starts[i] : starts[i] + counts[i]] for i in documents]).data
                file.write(data)
                digest.update(data)
        _sync(file)
    return digest.hexdigest()


def _write_documents(out: Path, split: str, tokens: np.ndarray, text_bytes: np.ndarray, sha256: str) -> dict[str, Any]:
    """Writes .docs.npy of documents of so many tokens and bytes; returns the split's entry of the header."""
    ends = np.cumsum(tokens)
    documents = np.stack([ends, text_bytes], axis=1).astype("<i8")
    with (out / f"{split}.docs.npy").open("wb") as file:
        np.save(file, documents)
        _sync(file)
    return {
        "tokens": int(ends[-1]),
        "documents": len(documents),
        "bytes": int(documents[:, 1].sum()),
        "sha256": sha256,
        "documents_sha256": hashlib.sha256(documents.tobytes()).hexdigest(),
    }


def _write_sources(out: Path, names: Sequence[str], splits: Mapping[str, np.ndarray]) -> None:
    """Names in alphabetical order, whatever the order of the inputs, and the index of each document's in both splits."""
    sorted_names = sorted(names)
    place = {name: i for i, name in enumerate(sorted_names)}
    renumbered = np.array([place[name] for name in names], "<i4")
    with (out / SOURCES).open("wb") as file:
        np.savez_compressed(
            file, names=np.array(sorted_names), **{split: renumbered[sources] for split, sources in splits.items()}
        )
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _chunks(documents: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], list[int], int]]:
    """Consecutive documents of about CHUNK_CHARS together, their sources, and how many empty ones were among them."""
    texts, sources, size, empty = [], [], 0, 0
    for text, source in documents:
        if not text or text.isspace():
            empty += 1
            continue
        texts.append(text)
        sources.append(source)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield texts, sources, empty
            texts, sources, size, empty = [], [], 0, 0
    yield texts, sources, empty


def _encode_chunk(index: int, texts: list[str], sources: np.ndarray, tokenizer: Tokenizer, folder: Path) -> Part:
    """The part of a chunk: tokens with EOS; of each document tokens (EOS counted), bytes of text, hash and paragraphs."""
    valid, digests, lengths = [], [], np.empty(len(texts), np.int64)
    for i, text in enumerate(texts):
        text, data = utf8(text)
        valid.append(text)
        digests.append(hashlib.sha256(data).digest())
        lengths[i] = len(data)
    name = hashlib.sha256(f"part {VERSION} {tokenizer.sha256} {tokenizer.eos_id} ".encode() + b"".join(digests)).hexdigest()
    path = folder / f"{index:06d}-{name[:32]}.npz"
    n_tokens = _tokens_in(path)
    if n_tokens is not None:
        return Part(path, sources, int(lengths.sum()), n_tokens, encoded=False)

    hashes = np.frombuffer(b"".join([digest[:8] for digest in digests]), ">u8").astype(np.uint64)
    keys, n_paragraphs = paragraphs.keys(text.encode("utf-8") for text in valid)
    ids = tokenizer.encode_batch(valid)
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
    sample = json.dumps(roundtrip.sample(valid, tokenizer).as_dict()).encode()
    _write(
        path,
        tokens=tokens,
        counts=counts,
        text_bytes=lengths,
        hashes=hashes,
        paragraphs=keys,
        n_paragraphs=n_paragraphs,
        sample=np.frombuffer(sample, np.uint8),
    )
    return Part(path, sources, int(lengths.sum()), len(tokens), encoded=True)


def utf8(text: str) -> tuple[str, bytes]:
    """A text as valid Unicode, and as UTF-8."""
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape: U+FFFD, as tokenizers do
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode("utf-8")


def _tokens_in(path: Path) -> int | None:
    """Tokens of a part; None when there is none, or it is damaged as after a power cut: then it is made again."""
    try:
        with path.open("rb") as file, np.load(file) as part:  # a zip file: reading checks its CRC-32
            arrays = {name: part[name] for name in _ARRAYS}
    except Exception:  # missing, truncated, no zip, wrong CRC-32, missing array: zipfile and numpy raise many kinds
        return None
    n_tokens, documents = len(arrays["tokens"]), len(arrays["counts"])
    whole = arrays["counts"].sum() == n_tokens and arrays["n_paragraphs"].sum() == len(arrays["paragraphs"])
    return n_tokens if whole and all(len(arrays[name]) == documents for name in ("text_bytes", "hashes")) else None


def _write(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
