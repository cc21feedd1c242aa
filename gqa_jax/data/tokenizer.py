"""Tokenizers: bytes, GPT-2's BPE, Hugging Face files and hub names, and a BPE trained on the spot.

All of them encode text as ordinary text: `<|endoftext|>` written inside a document is characters, never the end of one, and
nothing is added around a document (the store writes the end-of-document id itself).

GPT-2's merges are embedded (`gpt2_merges.txt.xz`): OpenAI's `vocab.bpe` unchanged, from https://github.com/openai/gpt-2,
Modified MIT License, Copyright (c) 2019 OpenAI. Ids follow from them: 256 byte symbols in GPT-2's order, then one a merge.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa_jax import storage
from gqa_jax.data.corpus import read_embedded
from gqa_jax.data.vocabulary import RECORD, Tokenizer, TokenizerError, recorded
from gqa_jax.hardware import host

if TYPE_CHECKING:
    import tokenizers
    from etils import epath

GPT2_FILE = "gpt2_merges.txt.xz"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of the merges; the one tiktoken checks
BYTES_SHA256 = hashlib.sha256(b"gqa_jax bytes: ids 0 to 255 are bytes of UTF-8, 256 ends a document").hexdigest()

END_OF_TEXT = "<|endoftext|>"
#: Special tokens that end a document in published tokenizers; `--eos` names any other.
COMMON_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|endofdoc|>")

# GPT-2's pre-tokenizer, `tiktoken_ext.openai_public.r50k_pat_str`.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces of about this size, in several threads
MAX_WORD_CHARS = 1_000_000  # text without a safe place to cut is cut after this many characters
TASK_CHARS = 1 << 16  # short documents share a task of a thread

# No match of the pre-tokenizer goes on from a non-space into a space, and none looks back: text cut before white space that
# follows a non-space has the same ids. (Python's \s includes the regex engine's, so its \S is the stricter one.)
_SAFE_CUT = re.compile(r"(?<=\S)[ \t\r\n]")


class ByteTokenizer:
    """Bytes of UTF-8 as ids 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    sha256 = BYTES_SHA256
    json = None
    prefix = ()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.eos_id))
        texts = [part[part != self.eos_id].astype(np.uint8).tobytes().decode("utf-8", "replace") for part in documents]
        return END_OF_TEXT.join(texts)

    def bytes_at(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
        return _counted(np.arange(self.vocab_size) != self.eos_id, ids, ends)


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken, from the embedded merges: 50,257 ids, 50256 ends a document."""

    name = "gpt2"
    vocab_size = 50_257
    eos_id = 50_256
    sha256 = GPT2_SHA256
    json = None
    prefix = ()

    def __init__(self, threads: int | None = None):
        import tiktoken

        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=_gpt2_ranks(),
            special_tokens={END_OF_TEXT: self.eos_id},
            explicit_n_vocab=self.vocab_size,
        )
        self._threads = threads or len(host.cpus())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="gpt2")  # tiktoken releases the GIL

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for document in pieces for piece in document]
        # Consecutive pieces of about TASK_CHARS together, or a longer one, are a task.
        tasks = np.cumsum([0, *map(len, flat)])[:-1] // TASK_CHARS
        borders = np.flatnonzero(np.diff(tasks)) + 1
        slices = (flat[begin:end] for begin, end in zip([0, *borders], [*borders, len(flat)], strict=True))
        encoded = [ids for task in self._pool.map(self._encode, slices) for ids in task]
        ends = np.cumsum([len(document) for document in pieces])
        return [
            encoded[end - 1] if len(document) == 1 else np.concatenate(encoded[end - len(document) : end])
            for document, end in zip(pieces, ends, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Straight from tiktoken's buffer to numpy: no Python list of ids. No special token is disallowed: all are text.
        return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.encoding.decode(np.asarray(ids).tolist())

    def bytes_at(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
        return _counted(self._bytes_of_id, ids, ends)

    @functools.cached_property
    def _bytes_of_id(self) -> np.ndarray:
        lengths = [len(self.encoding.decode_single_token_bytes(id_)) for id_ in range(self.eos_id)]
        return np.array([*lengths, 0])


class HuggingFaceTokenizer:
    """A tokenizer in the format of Hugging Face `tokenizers` (`tokenizer.json`), with its end-of-document token."""

    def __init__(self, content: bytes, name: str, eos: str | int | None = None, prefix: Sequence[int] = ()):
        """`eos` is the token's text or id; None takes the only special token that is among `COMMON_EOS`. `prefix`: as recorded.

        Raises TokenizerError when the content is no tokenizer, or the end of a document can't be told.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the binding raises bare Exception and ValueError
            raise TokenizerError(f"tokenizer {name} is no Hugging Face tokenizer.json ({error})") from error
        # A file may carry the settings of its last use; padding or a cut at 512 tokens would be silent damage.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are characters
        self.name = name
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        self.eos_id = _find_eos(self._tokenizer, name, eos)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.json = content
        self.prefix = tuple(prefix)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # threads in Rust
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def bytes_at(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
        if self._bytes_of_id is not None:
            return _counted(self._bytes_of_id, ids, ends)
        prefixes = (np.asarray(ids[:end]) for end in np.asarray(ends))
        return np.array([self._bytes_of_prefix(prefix[prefix != self.eos_id]) for prefix in prefixes], np.int64)

    def _bytes_of_prefix(self, ids: np.ndarray) -> int:
        """By decoding: what a token adds depends on those before it, as where a decoder writes spaces between words."""
        if not len(ids):
            return 0
        # Tokens that are a byte each, as <0xE6>: cut within a character they would all decode to replacement characters.
        is_byte = self._is_byte[ids]
        single = len(ids) if is_byte.all() else int(np.argmin(is_byte[::-1]))
        text = self._tokenizer.decode(ids[: len(ids) - single].tolist(), skip_special_tokens=True)
        return len(text.encode("utf-8")) + single

    @functools.cached_property
    def _bytes_of_id(self) -> np.ndarray | None:
        """Bytes of every id, int64 (vocab_size,), where each stands for the same bytes everywhere: byte-level; else None.

        As the decoder: an entry stands for a byte with each character, unless one of them is not in the alphabet of bytes.
        """
        if self._decoders != ["ByteLevel"]:
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, id_ in self._tokenizer.get_vocab(with_added_tokens=True).items():
            text = added[id_].content if id_ in added else token
            special = id_ == self.eos_id or (id_ in added and added[id_].special)
            lengths[id_] = 0 if special else len(text) if BYTE_OF.keys() >= set(text) else len(text.encode("utf-8"))
        return lengths

    @functools.cached_property
    def _is_byte(self) -> np.ndarray:
        """Which ids are a byte each, bool (vocab_size,)."""
        result = np.zeros(self.vocab_size, bool)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True) if "ByteFallback" in self._decoders else {}
        result[[id_ for token, id_ in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token)]] = True
        return result

    @functools.cached_property
    def _decoders(self) -> list[str]:
        """Kinds of the steps from tokens to text."""
        decoder = self._tokenizer.decoder
        state = {"decoders": []} if decoder is None else json.loads(decoder.__getstate__())
        return [step["type"] for step in state.get("decoders", [state]) if step["type"] != "Fuse"]


def load_tokenizer(spec: str, eos: str | None = None, threads: int | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
      spec: `bytes`, `gpt2`, `hub:NAME` or `hub:NAME@REVISION`, or the path of a Hugging Face `tokenizer.json` (or of a folder
        that holds one). `bpe:N` needs text: see `train_bpe`.
      eos: end-of-document token of a Hugging Face tokenizer; None finds it.
      threads: of GPT-2's tokenizer; None: every CPU. (Hugging Face's reads RAYON_NUM_THREADS.)
    Raises:
      TokenizerError: unknown name, unreadable file, no connection to the hub, unknown end of document.
    """
    if spec in ("bytes", "gpt2"):
        tokenizer = ByteTokenizer() if spec == "bytes" else GPT2Tokenizer(threads)
        if eos is not None:
            raise TokenizerError(f"--eos {eos!r}: tokenizer {spec} ends documents with id {tokenizer.eos_id}; leave --eos out")
        return tokenizer
    if spec.startswith("hub:"):
        return HuggingFaceTokenizer(_download(spec.removeprefix("hub:")), spec, eos)
    if spec.startswith("bpe:"):
        raise TokenizerError(f"tokenizer {spec} is trained on the input of gqa_jax.data.prepare; it has no file to load")
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return HuggingFaceTokenizer(path.read_bytes(), path.name, eos)
    except FileNotFoundError:
        raise TokenizerError(
            f"tokenizer {spec!r}: no file {path}, and no name of a tokenizer; use bytes, gpt2, bpe:N, hub:NAME "
            "or the path of a Hugging Face tokenizer.json"
        ) from None
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} can't be read: {error.strerror}") from error


def of_run(folder: os.PathLike | str) -> Tokenizer:
    """The tokenizer kept in the folder of a run or an import. Raises TokenizerError: none is, or it is damaged."""
    try:
        about = recorded(folder)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"the tokenizer of {folder} can't be read: {error}") from error
    if about is None:
        raise TokenizerError(f"no tokenizer is kept in {folder}")
    return kept(storage.path(folder) / RECORD, about)


def kept(folder: epath.Path, about: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with the name, sha256 and eos_id of `about`: of the tokenizer.json in a folder, without one by its name.

    Raises TokenizerError when it is another, or can't be read.
    """
    try:
        content = storage.read_bytes(folder / "tokenizer.json")
        name, sha256, eos_id = (about[key] for key in ("name", "sha256", "eos_id"))
    except (OSError, KeyError) as error:
        raise TokenizerError(f"the tokenizer in {folder} can't be read: {error}") from error
    found = load_tokenizer(name) if content is None else HuggingFaceTokenizer(content, name, eos_id, about.get("prefix", ()))
    if found.sha256 != sha256:
        differ = f"SHA-256 {found.sha256[:12]}, not {sha256[:12]}"
        raise TokenizerError(f"{folder}/tokenizer.json isn't the tokenizer that was recorded ({differ})")
    return found


def bpe_size(spec: str) -> int | None:
    """N of `bpe:N`; None for another spec. Raises TokenizerError when N is no number above 256."""
    if not spec.startswith("bpe:"):
        return None
    number = spec.removeprefix("bpe:").replace("_", "")
    if not number.isdecimal() or int(number) < 257:
        raise TokenizerError(f"tokenizer {spec!r}: N of bpe:N must be at least 257: 256 bytes and the end of a document")
    return int(number)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE of `vocab_size` entries (256 bytes, merges, END_OF_TEXT) with GPT-2's pre-tokenizer.

    Raises TokenizerError when the texts are too few for that many merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise TokenizerError(f"tokenizer bpe:{vocab_size}: the text yields only {size} entries; use bpe:{size}")
    return HuggingFaceTokenizer(tokenizer.to_str().encode("utf-8"), f"bpe:{vocab_size}", END_OF_TEXT)


def _byte_alphabet() -> dict[str, int]:
    """Byte of each character in which byte-level tokenizers write their entries, in GPT-2's order of bytes.

    Characters that can be seen: bytes that can't stand as the characters from U+0100 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


#: Byte of each character of byte-level tokenizers, in the order of GPT-2's ids.
BYTE_OF = _byte_alphabet()


def _counted(bytes_of_id: np.ndarray, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
    """`Tokenizer.bytes_at` where every id stands for `bytes_of_id` bytes, wherever it is."""
    return np.concatenate([[0], np.cumsum(bytes_of_id[ids], dtype=np.int64)])[np.asarray(ends, np.int64)]


def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's vocabulary without its special token: bytes of each entry -> id, which is also the rank of its merge."""
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_OF.values())}
    for pair in gpt2_merges():
        ranks[bytes(BYTE_OF[character] for character in "".join(pair))] = len(ranks)
    return ranks


def gpt2_merges() -> list[tuple[str, str]]:
    """GPT-2's merges in their order, in the characters of `BYTE_OF`."""
    _version, *merges = read_embedded(GPT2_FILE, GPT2_SHA256).decode("utf-8").splitlines()
    return [(first, second) for first, second in map(str.split, merges)]


def _pieces(text: str, piece: int = PIECE_CHARS, longest: int = MAX_WORD_CHARS) -> Iterator[str]:
    """`text` in pieces of about `piece` characters that have, joined, the ids of the whole.

    Only a word of more than `longest` characters (nothing to cut at) is cut inside: there tiktoken, like any BPE, takes time
    and memory that grow faster than the word, and one or two ids at the cut differ.
    """
    start = 0
    while len(text) - start > piece:
        limit = min(start + longest, len(text))
        if cut := _SAFE_CUT.search(text, start + piece, limit):
            end = cut.start()
        else:
            earlier = [cut.start() for cut in _SAFE_CUT.finditer(text, start + 1, min(start + piece, limit))]
            end = earlier[-1] if earlier and limit < len(text) else limit
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def _find_eos(tokenizer: tokenizers.Tokenizer, name: str, eos: str | int | None) -> int:
    if isinstance(eos, int):
        return eos
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if eos is not None and tokenizer.token_to_id(eos) is None:
        raise TokenizerError(f"--eos {eos!r} is no entry of tokenizer {name}; its special tokens: {special}")
    found = [token for token in COMMON_EOS if token in special] if eos is None else [eos]
    if len(found) != 1:
        problem = f"has several ends of a document, {found}" if found else "has no known end of a document"
        raise TokenizerError(f"tokenizer {name} {problem}: choose with --eos TOKEN; its special tokens: {special or 'none'}")
    return tokenizer.token_to_id(found[0])


def _download(name: str) -> bytes:
    """`tokenizer.json` of a repository of the Hugging Face hub, through its local cache."""
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "tokenizer.json", revision=revision or None)).read_bytes()
    except errors.LocalEntryNotFoundError as error:
        reason = "the hub can't be reached and the local cache has no copy: connect, or pass the path of a tokenizer.json"
        raise TokenizerError(f"tokenizer hub:{name}: {reason} ({error})") from error
    except errors.EntryNotFoundError as error:
        raise TokenizerError(f"tokenizer hub:{name}: the repository has no tokenizer.json") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise TokenizerError(f"tokenizer hub:{name}: {str(error).strip()}") from error
