"""The token store: one flat stream of token ids per split in a folder, from which any context length is cut.

The files of a store are described in docs/data.md. Its ids are little-endian uint16 (uint32 above 65,536 entries), every
document followed by the EOS id; header.json is written last, so a folder without it is unfinished.

`fingerprint` is a hash of the content (ids, document ends, vocabulary, tokenizer, hold-out rule), not of paths, dates or
versions: two stores with the same fingerprint give the same batches. `gqa_jax.data.prepare` writes stores. A store on gs:// is
copied to the local disk once, where it is mapped.

`open_folder` reads every byte of a store, and compares it with the header, once for as long as its files keep their sizes and
times of modification; what it has read is remembered in the cache (`gqa_jax.storage.cache`, folder `verified`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gqa_jax import errors, storage
from gqa_jax.data.vocabulary import Tokenizer, TokenizerError

log = logging.getLogger(__name__)

FORMAT = "gqa_jax token store"
VERSION = 1
SPLITS = ("train", "validation")
HEADER = "header.json"
TOKENIZER = "tokenizer.json"
PARTS = "parts"  # folder of an unfinished store
LOCK = ".lock"
SOURCES = "sources.npz"
INPUTS = "inputs.json"
HOLDOUT_RULES = ("hash", "position")
FILES = tuple(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "docs.npy"))  # beside the header
OPTIONAL = (TOKENIZER, SOURCES, INPUTS)  # files that a store may have or not
_CONTENT = ("format", "version", "dtype", "vocab_size", "eos_id", "splits")  # with tokenizer.sha256: the fingerprint

_SAID_BYTES = 4 << 30  # verifying a store of this size takes some seconds: a line in the log says what is waited for


class StoreError(ValueError):
    """A folder that isn't a usable token store. The message names the path, the problem and the fix."""


@dataclass(frozen=True)
class TokenStore:
    """A finished store; made by `TokenStore.open`. Holds no open file: `tokens` maps one."""

    path: Path
    header: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = False) -> TokenStore:
        """The store in folder `path`, its header and sizes checked; `verify` also reads every byte (SHA-256).

        Raises StoreError when it is missing, unfinished, of another format, or doesn't match its header.
        """
        if "://" in os.fspath(path):
            raise StoreError(f"token store {path}: is memory-mapped, so must be on a local disk; open_folder copies it there")
        path = Path(path).expanduser()
        store = cls(path, read_header(path))
        store._check_sizes()
        if verify:
            store._check_contents()
        return store

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the content."""
        return self.header["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self.header["vocab_size"]

    @property
    def eos_id(self) -> int:
        """The id after every document."""
        return self.header["eos_id"]

    @property
    def vocabulary(self) -> dict[str, Any]:
        """What the ids stand for: name, sha256 and eos_id of the tokenizer."""
        return self.header["tokenizer"] | {"eos_id": self.eos_id}

    def n_tokens(self, split: str) -> int:
        """Ids of a split, as its file was found to have when the store was opened."""
        self._file(split, "bin")
        return self.header["splits"][split]["tokens"]

    def tokens(self, split: str) -> np.memmap:
        """Ids of a split, (tokens,) uint16 or uint32, memory-mapped and read-only."""
        return np.memmap(self._file(split, "bin"), dtype=np.dtype(self.header["dtype"]).newbyteorder("<"), mode="r")

    def documents(self, split: str) -> np.ndarray:
        """int64 (documents, 2): exclusive end in the split's tokens, EOS included, and bytes of text."""
        return np.load(self._file(split, "docs.npy"))

    @property
    def holdout_rule(self) -> str:
        """By which rule documents were held out: one of HOLDOUT_RULES."""
        return _holdout_rule(self.header)

    def sources(self, split: str) -> tuple[list[str], np.ndarray] | None:
        """Names of all sources, and int32 (documents,): the index of each document's; None where the store has none.

        Raises StoreError for a damaged file.
        """
        self._file(split, "bin")
        if not (file := self.path / SOURCES).exists():
            return None
        try:
            with file.open("rb") as stream, np.load(stream) as arrays:  # a zip file: reading checks its CRC-32
                names, indices = arrays["names"].tolist(), arrays[split]
        except Exception as error:  # zipfile and numpy raise many kinds
            raise _unusable(f"{file} is damaged ({error})") from error
        documents = self.header["splits"][split]["documents"]
        if indices.shape != (documents,) or not 0 <= indices.min() <= indices.max() < len(names):
            raise _unusable(f"{file} doesn't match the header")
        return names, indices

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids. Raises StoreError when tokenizer.json isn't the one recorded."""
        from gqa_jax.data.tokenizer import kept  # which knows every kind of tokenizer

        try:
            return kept(self.path, self.vocabulary)
        except TokenizerError as error:
            raise StoreError(str(error)) from error

    def _file(self, split: str, suffix: str) -> Path:
        if split not in SPLITS:
            raise StoreError(f"split {split!r}: a store has {' and '.join(SPLITS)}")
        return self.path / f"{split}.{suffix}"

    def _check_sizes(self) -> None:
        for split in SPLITS:
            facts, file, index = self.header["splits"][split], self._file(split, "bin"), self._file(split, "docs.npy")
            expected = facts["tokens"] * np.dtype(self.header["dtype"]).itemsize
            found = file.stat().st_size if file.exists() else None
            if found != expected:
                size = "is missing" if found is None else f"has {found} bytes"
                raise _unusable(f"{file} {size}; its header says {expected} bytes")
            try:
                documents = self.documents(split)
            except (OSError, ValueError) as error:
                raise _unusable(f"{index}: unreadable ({error})") from error
            if documents.shape != (facts["documents"], 2) or documents[-1, 0] != facts["tokens"]:
                raise _unusable(f"{index} doesn't match the header")

    def _check_contents(self) -> None:
        for split in SPLITS:
            facts, file = self.header["splits"][split], self._file(split, "bin")
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != facts["sha256"]:
                raise _unusable(f"{file} is damaged (its SHA-256 isn't the header's)")
            if hashlib.sha256(self.documents(split).tobytes()).hexdigest() != facts["documents_sha256"]:
                raise _unusable(f"{self._file(split, 'docs.npy')} is damaged")


def _unusable(what: str) -> StoreError:
    return StoreError(f"{what}: copy the store again, or prepare it again")


def open_folder(folder: os.PathLike | str, cache_dir: os.PathLike | str | None = None) -> TokenStore:
    """The store in a folder, local or on gs://, of which every byte is what its header says.

    A store on gs:// is copied to `cache_folder(cache_dir)`, unless it was before: then only its header.json is read. The first
    time, and when its files were written since, all of a local store is read and compared; that takes about a second a GB, and
    other processes wait for it.

    Raises StoreError for a store or copy that isn't what the header says, or an unwritable cache; ConfigError for gs:// without
    gcsfs.
    """
    if not storage.is_remote(folder):
        return _verified(TokenStore.open(folder))
    source = storage.path(folder)
    header = read_header(source)
    copy = cache_folder(cache_dir) / header["fingerprint"]
    if not (copy / HEADER).exists():
        with in_cache(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            with locked(copy.parent, wait=True):
                if not (copy / HEADER).exists():
                    _copy(source, header, copy)
    return _verified(TokenStore.open(copy))


def is_finished(folder: os.PathLike | str) -> bool:
    """Whether a folder, local or on gs://, has a header, so a finished store. Raises StoreError where gs:// can't be read."""
    try:
        return storage.read_bytes(storage.path(folder) / HEADER) is not None
    except OSError as error:
        raise StoreError(f"token store {error}") from error


def remember(made: TokenStore) -> None:
    """Takes a local store as verified, which was just written, or read and compared: `open_folder` won't read it again."""
    _remember(*_record(made))


def _verified(made: TokenStore) -> TokenStore:
    """The store, when every byte is what its header says. Raises StoreError."""
    record, state = _record(made)
    if _is_remembered(record, state):
        return made
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that can't be written: then each process reads for itself
            record.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(record.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        if not _is_remembered(record, state):  # by another process, which was waited for
            size = sum(bytes_ for bytes_, _ in state["files"].values())
            if size >= _SAID_BYTES:
                log.info("token store %s: reading %.1f GB once, to compare it with its header", made.path, size / 1e9)
            made._check_contents()
            _remember(record, state)
    return made


def _remember(record: Path, state: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that can't be written: the store is read again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(record, state)


def _is_remembered(record: Path, state: Mapping[str, Any]) -> bool:
    with contextlib.suppress(OSError, ValueError):  # no record that can be read is none
        return storage.read_json(record) == state
    return False


def _record(made: TokenStore) -> tuple[Path, dict[str, Any]]:
    """The file that says which store was verified, and what tells whether this is still that one."""
    try:
        folder = storage.cache("verified")
    except RuntimeError:  # no home: as with a cache that can't be written, nothing is remembered
        folder = Path(os.devnull)
    path = made.path.resolve()
    stats = {name: (path / name).stat() for name in FILES}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    state = {"path": str(path), "fingerprint": made.fingerprint, "files": files}
    return folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json", state


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where built-in stores and copies are kept: `cache_dir`, else $GQA_JAX_CACHE/stores, else ~/.cache/gqa_jax/stores."""
    return storage.cache("stores") if cache_dir is None else Path(cache_dir).expanduser()


def _copy(source: epath.Path, header: Mapping[str, Any], folder: Path) -> None:
    """Copies a store from gs:// to `folder`, which then is whole and verified."""
    size = sum(facts["tokens"] for facts in header["splits"].values()) * np.dtype(header["dtype"]).itemsize
    log.info("token store %s: copying %.2f GB to %s", source, size / 1e9, folder)
    begin = time.monotonic()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed; others wait
    temporary.mkdir()
    for name in FILES:
        if not storage.download(source / name, temporary / name):
            raise StoreError(f"token store {source}: {name} is missing: copy the store there again, or prepare it again")
    for name in OPTIONAL:
        storage.download(source / name, temporary / name)
    write_header(temporary, header)
    try:
        made = TokenStore.open(temporary, verify=True)
        if (temporary / TOKENIZER).exists():
            made.tokenizer()
        made.sources("train")
    except StoreError as error:
        raise StoreError(f"token store {source} isn't what its header says, as copied: {error}") from error
    temporary.rename(folder)
    remember(TokenStore.open(folder))
    log.info("token store %s: copied and verified in %.1f s", source, time.monotonic() - begin)


@contextlib.contextmanager
def in_cache(folder: Path) -> Iterator[None]:
    """While `folder` of the cache is written: an error of the system says where else the cache could be."""
    try:
        yield
    except OSError as error:
        if storage.explain_remote(error) is not None:
            raise StoreError(f"token store {error}") from error
        raise StoreError(f"{os_sentence(error, folder)}; GQA_JAX_CACHE=FOLDER chooses another place") from error


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the folder of a store for writing; the system lets go when the process ends in any way."""
    with (path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{path} is being prepared by another process: wait for it, or choose another --out") from None
        yield


def os_sentence(error: OSError, path: Path) -> str:
    """What an error of the operating system means for who writes to `path`."""
    if errors.disk_is_full(error):
        return f"no space left for {error.filename or path}: free some, or choose another disk"
    return f"{error.filename or path}: {error.strerror or error}"


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest type of the store that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def fingerprint(header: Mapping[str, Any]) -> str:
    """SHA-256 over the fields of a header that say what the content is, as canonical JSON."""
    content = {name: header[name] for name in _CONTENT} | {"tokenizer": header["tokenizer"]["sha256"]}
    if "holdout" in header:
        content["holdout"] = header["holdout"]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_header(path: Path, header: Mapping[str, Any]) -> None:
    """Finish a store: header.json, atomically and after the data has reached the disk. Adds format, version, fingerprint."""
    header = {"format": FORMAT, "version": VERSION, **header}
    storage.write_json(path / HEADER, header | {"fingerprint": fingerprint(header)})


def read_header(path: Path | epath.Path) -> dict[str, Any]:
    """The header of a finished store, local or on gs://. Raises StoreError when it is missing, broken or changed."""
    file = path / HEADER
    try:
        content = storage.read_bytes(file)
        header = None if content is None else json.loads(content)
    except (OSError, ValueError) as error:
        if storage.explain_remote(error) is not None:
            raise StoreError(f"token store {error}") from error
        raise _unusable(f"{file} can't be read ({error})") from error
    if content is None:
        state = "there is no header.json"
        if not storage.is_remote(path):
            if (path / PARTS).is_dir():
                raise StoreError(f"token store {path} is unfinished: run the prepare command that began it again")
            state = "this folder has no header.json" if path.is_dir() else "no such folder"
        raise StoreError(f"token store {path}: {state}; make one with python -m gqa_jax.data.prepare --out {path} ...")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StoreError(f"{file} is no header of a token store (format {FORMAT!r})")
    if header.get("version") != VERSION:
        raise StoreError(f"{file} has format version {header.get('version')}; this program reads {VERSION}: prepare it again")
    try:
        for split in SPLITS:
            _ = [header["splits"][split][key] for key in ("tokens", "documents", "bytes", "sha256", "documents_sha256")]
        _ = header["tokenizer"]["name"], np.dtype(header["dtype"])
        expected, found = header["fingerprint"], fingerprint(header)
        rule = _holdout_rule(header)
        _ = "holdout" not in header or 1 / header["holdout"]["every"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file} lacks or garbles {error}: prepare the store again") from error
    if found != expected:
        raise StoreError(f"{file} was changed: its content gives fingerprint {found[:12]}; prepare the store again")
    if rule not in HOLDOUT_RULES:
        raise StoreError(
            f"{file}: documents were held out by the rule {rule!r}, and this program knows {' and '.join(HOLDOUT_RULES)}: use "
            "the version that made the store, or prepare it again"
        )
    return header


def _holdout_rule(header: Mapping[str, Any]) -> str:
    return header["holdout"]["rule"] if "holdout" in header else "position"
