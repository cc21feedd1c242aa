"""What ids stand for: the tokenizer as a token store and a run know it, and the record of it in the folder of a run.

Tokenizers that there are, and reading one from its record: `gqa_jax.data.tokenizer`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gqa_jax import storage
from gqa_jax.errors import ConfigError

if TYPE_CHECKING:
    from gqa_jax.data.store import TokenStore

RECORD = "tokenizer"  # folder, in that of a run: about.json (name, sha256, eos_id), and tokenizer.json unless the name says all


class TokenizerError(ValueError):
    """A tokenizer that can't be made. The message says what was asked for and what is possible."""


class Tokenizer(Protocol):
    """What the store needs of a tokenizer."""

    name: str  # as recorded in the store
    vocab_size: int  # ids are 0 ... vocab_size - 1
    eos_id: int  # written after every document
    sha256: str  # two tokenizers with the same digest and eos_id give the same ids
    json: bytes | None  # content of `tokenizer.json` for the store; None when the name says everything
    prefix: Sequence[int]  # ids in front of a prompt, of an imported model; none are written into a store

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, 1-D unsigned integer arrays; several threads where that helps."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; the end of a document is written as its special token."""

    def bytes_at(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> np.ndarray:
        """Bytes of UTF-8 that the first `end` ids stand for, for each of `ends`, int64; a special token stands for none.

        `ids` are those of one document from its beginning, 1-D. What they decode to is counted, not the text that they were
        made of: a tokenizer may have lost some of it. A token that ends within a character counts the bytes of its part.
        """


def record(folder: os.PathLike | str, store: TokenStore) -> None:
    """Keeps the tokenizer of a token store in a run's folder, local or on gs://, unless one is kept there that can be read."""
    try:
        there = recorded(folder)
    except ConfigError:
        there = None
    if there is None:
        content = storage.read_bytes(store.path / "tokenizer.json")
        _keep(folder, store.vocabulary, content)


def record_tokenizer(folder: os.PathLike | str, tokenizer: Tokenizer) -> None:
    """Keeps a tokenizer in a folder, local or on gs://, as `record` does."""
    about = {"name": tokenizer.name, "sha256": tokenizer.sha256, "eos_id": tokenizer.eos_id}
    about |= {"prefix": [*tokenizer.prefix]} if tokenizer.prefix else {}
    _keep(folder, about, tokenizer.json)


def _keep(folder: os.PathLike | str, about: Mapping[str, Any], content: bytes | None) -> None:
    at = storage.path(folder) / RECORD
    storage.make_folder(at)
    if content is not None:
        storage.write_bytes(at / "tokenizer.json", content)
    storage.write_json(at / "about.json", about)


def recorded(folder: os.PathLike | str) -> dict[str, Any] | None:
    """Name, sha256 and eos_id of the tokenizer kept in a run's folder, and `prefix` where it has one; None where none is.

    Raises ConfigError for a record that can't be used, OSError.
    """
    path = storage.path(folder) / RECORD / "about.json"
    about = storage.read_json(path)
    kinds = {"name": str, "sha256": str, "eos_id": int}
    if about is not None and (odd := [name for name, kind in kinds.items() if type(about.get(name)) is not kind]):
        raise ConfigError(f"{path} does not say {', '.join(odd)} of the tokenizer: move it away to make it again")
    return about
