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
from gqa_jax.data.store import SOURCES, token_dtype
from gqa_jax.data.vocabulary import Tokenizer, TokenizerError

CHUNK_CHARS = 16_000_000  # of text: the unit of work and of memory, and what a killed run loses
CHUNKS_IN_FLIGHT = 2  # beside the one that is being read; tokenizers use several threads for each
VERSION = 2  # of part files; those of the first version of the program have neither hashes nor paragraphs
GATHER_TOKENS = 1 << 24  # of held-out documents, put into their order at once

_ARRAYS = ("tokens", "counts", "text_bytes", "hashes", "paragraphs", "n_paragraphs", "sample")


class Index(NamedTuple):
    """What is known of documents, in their order; arrays (documents,)."""

    hashes: np.ndarray  # uint64: `holdout.hash_of`
    sources: np.ndarray  # int32: index of each document's source
    tokens: np.ndarray  # int64, the end of the document counted
    text_bytes: np.ndarray  # int64
    n_paragraphs: np.ndarray  # int32: those that `paragraphs` looks at


class Part(NamedTuple):
    """One encoded chunk on disk."""

    path: Path
    index: Index
    sample: roundtrip.Sample
    encoded: bool  # by this run; False: found from an earlier one

    @property
    def documents(self) -> int:
        return len(self.index.sources)


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
        for number, (texts, sources, skipped) in enumerate(_chunks(documents)):
            empty += skipped
            if texts:
                pending.append(pool.submit(_part, number, texts, np.array(sources, np.int32), tokenizer, folder))
            if len(pending) == CHUNKS_IN_FLIGHT:
                finish_one()
        while pending:
            finish_one()
    return done, empty


def joined(parts: Sequence[Part]) -> Index:
    """The index of all documents of the parts."""
    return Index(*(np.concatenate(columns) for columns in zip(*(part.index for part in parts), strict=True)))


def assemble(
    parts: Sequence[Part], index: Index, split: Split, names: Sequence[str], out: Path, tokenizer: Tokenizer
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Writes .bin and .docs.npy of both splits, and the sources, into `out`: train in order, held-out in that of `split`.

    `names` are those of the sources. Returns the header's `splits`, and `paragraphs.copied` from one to the other.
    """
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    digest = hashlib.sha256()
    gathered = parts[0].path.with_name("validation.tmp")  # held-out documents in the order of the inputs
    with (out / "train.bin").open("wb") as train, gathered.open("wb") as validation:
        for part, held_out in _by_part(parts, split.held_out):
            with np.load(part.path) as arrays:
                tokens = arrays["tokens"]
            # Runs of documents of one split, in turns: few and long copies instead of a mask over tokens.
            borders = np.flatnonzero(np.diff(held_out)) + 1
            runs = np.split(tokens, np.cumsum(part.index.tokens)[borders - 1])
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
    held_out = np.concatenate([*_paragraphs(parts, split.held_out)])
    copied = paragraphs.copied(held_out, index.n_paragraphs[split.held_out], _paragraphs(parts, ~split.held_out))
    return facts, copied


def cut(part: Part, tokenizer: Tokenizer, every: int) -> Part:
    """A part of the only document as one of two: what is trained on, and the end that is held out (`holdout.tail_start`).

    An end of document closes both; their paragraphs are not looked for. Raises InputError where the document is too short.
    """
    with np.load(part.path) as arrays:
        ids = arrays["tokens"][:-1]
    start, text_bytes = tail_start(len(ids), every), int(part.index.text_bytes[0])
    # In proportion to what both ends decode to, which may be more or less than the text.
    first_decoded, decoded = tokenizer.bytes_at(ids, [start, len(ids)]).tolist()
    first_bytes = round(text_bytes * first_decoded / decoded) if decoded else text_bytes * start // len(ids)
    path, none = part.path.with_name("tail.npz"), np.zeros(0, np.uint64)
    np.savez(path, tokens=np.insert(ids, [start, len(ids)], tokenizer.eos_id), paragraphs=none)
    index = Index(
        hashes=part.index.hashes.repeat(2),
        sources=np.zeros(2, np.int32),
        tokens=np.array([start + 1, len(ids) - start + 1]),
        text_bytes=np.array([first_bytes, text_bytes - first_bytes]),
        n_paragraphs=np.zeros(2, np.int32),
    )
    return part._replace(path=path, index=index)


def _by_part(parts: Sequence[Part], column: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part, and what a column (documents,) of all says of its documents."""
    return zip(parts, np.split(column, np.cumsum([part.documents for part in parts])[:-1]), strict=True)


def _paragraphs(parts: Sequence[Part], chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Keys of the paragraphs of documents that `chosen`, bool (documents,), has, part by part."""
    for part, own in _by_part(parts, chosen):
        with np.load(part.path) as arrays:
            yield arrays["paragraphs"][np.repeat(own, part.index.n_paragraphs)]


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
    sorted_names, places = np.unique(np.array(names), return_inverse=True)
    own = {split: places.astype("<i4")[sources] for split, sources in splits.items()}
    with (out / SOURCES).open("wb") as file:
        np.savez_compressed(file, names=sorted_names, **own)
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


def _part(number: int, texts: list[str], sources: np.ndarray, tokenizer: Tokenizer, folder: Path) -> Part:
    """The part of a chunk, found or encoded."""
    valid, digests, lengths = [], [], np.empty(len(texts), np.int64)
    for i, text in enumerate(texts):
        text, data = utf8(text)
        valid.append(text)
        digests.append(hashlib.sha256(data).digest())
        lengths[i] = len(data)
    name = hashlib.sha256(f"part {VERSION} {tokenizer.sha256} {tokenizer.eos_id} ".encode() + b"".join(digests)).hexdigest()
    path = folder / f"{number:06d}-{name[:32]}.npz"
    arrays, encoded = _found(path), False
    if arrays is None:
        hashes = np.frombuffer(b"".join([digest[:8] for digest in digests]), ">u8").astype(np.uint64)
        arrays, encoded = {"text_bytes": lengths, "hashes": hashes} | _encoded(valid, tokenizer), True
        _write(path, arrays)
    index = Index(arrays["hashes"], sources, arrays["counts"], arrays["text_bytes"], arrays["n_paragraphs"])
    return Part(path, index, roundtrip.Sample(**json.loads(arrays["sample"].tobytes())), encoded)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Tokens of valid texts, an EOS after each; of each their number, EOS counted; its paragraphs; what a sample lost."""
    keys, n_paragraphs = paragraphs.keys(text.encode("utf-8") for text in texts)
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
    sample = np.frombuffer(json.dumps(roundtrip.sample(texts, tokenizer)._asdict()).encode(), np.uint8)
    return {"tokens": tokens, "counts": counts, "paragraphs": keys, "n_paragraphs": n_paragraphs, "sample": sample}


def utf8(text: str) -> tuple[str, bytes]:
    """A text as valid Unicode, and as UTF-8."""
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape: U+FFFD, as tokenizers do
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode("utf-8")


def _found(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a part; None when there is none, or it is damaged as after a power cut: then it is made again."""
    try:
        with path.open("rb") as file, np.load(file) as part:  # a zip file: reading checks its CRC-32
            arrays = {name: part[name] for name in _ARRAYS}
    except Exception:  # missing, truncated, no zip, wrong CRC-32, missing array: zipfile and numpy raise many kinds
        return None
    of_documents = {len(arrays[name]) for name in ("counts", "text_bytes", "hashes", "n_paragraphs")}
    sums = arrays["counts"].sum(), arrays["n_paragraphs"].sum()
    return arrays if len(of_documents) == 1 and sums == (len(arrays["tokens"]), len(arrays["paragraphs"])) else None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
