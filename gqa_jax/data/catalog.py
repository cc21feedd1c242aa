"""Stores by name: a folder, local or on gs://, or one that is built in, made on first use from the embedded corpus."""

from __future__ import annotations

import os
from pathlib import Path

from gqa_jax import storage
from gqa_jax.data import corpus, store
from gqa_jax.data.store import StoreError, TokenStore
from gqa_jax.data.vocabulary import Tokenizer
from gqa_jax.errors import closest

#: Built-in stores: name -> tokenizer and hold-out rule. Those by position are the stores that the first version made under the
#: names without the rule.
BUILT_IN = {
    "sotu-bytes": ("bytes", "hash"),
    "sotu-gpt2": ("gpt2", "hash"),
    "sotu-bytes@position": ("bytes", "position"),
    "sotu-gpt2@position": ("gpt2", "position"),
}


def open_store(name: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> TokenStore:
    """The store of a name: a folder (`store.open_folder`), or a built-in store, made on first use in about a second.

    Built-in stores are kept in `store.cache_folder(cache_dir)`; a process that asks for one while another makes it waits.
    Raises what `open_folder` raises, and StoreError for a name that is neither.
    """
    name = os.fspath(name)
    if name not in BUILT_IN:
        if os.sep not in name and not Path(name).exists():
            raise StoreError(f"token store {name!r}: no such folder, and no built-in name; {closest(name, BUILT_IN)}")
        return store.open_folder(name, cache_dir)
    tokenizer, rule = BUILT_IN[name]
    # Rule, format and text are in the folder's name, so that a change of any makes a new one; the first rule was not named.
    words = [name.partition("@")[0], *([] if rule == "position" else [rule]), str(store.VERSION), corpus.SOTU_SHA256[:8]]
    folder = store.cache_folder(cache_dir) / "-".join(words)
    if (folder / store.HEADER).exists():
        try:
            return store.open_folder(folder)
        except StoreError as error:
            raise StoreError(f"{error}; delete {folder}, and it is made again") from error
    from gqa_jax.data import prepare  # takes a third of a second, and only a first use needs it

    with store.in_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return prepare.prepare(prepare.Recipe(inputs=("sotu",), tokenizer=tokenizer, holdout_rule=rule), folder, wait=True)


def exists(name: str | os.PathLike) -> bool:
    """Whether there is a store for `open_store`: a built-in name, a folder, or on gs:// a header, so a finished store.

    Raises StoreError or ConfigError where gs:// can't be read.
    """
    if os.fspath(name) in BUILT_IN:
        return True
    return store.is_finished(name) if storage.is_remote(name) else Path(name).expanduser().exists()


def tokenizer_of(name: str, fingerprint: str | None = None) -> Tokenizer:
    """The tokenizer of a store, of which no more than the header is read.

    Raises StoreError where the store is gone, or has another than this `fingerprint`; TokenizerError for a damaged tokenizer.
    """
    from gqa_jax.data.tokenizer import kept, load_tokenizer  # which know every kind of tokenizer

    if name in BUILT_IN:
        return load_tokenizer(BUILT_IN[name][0])
    path = storage.path(name)
    header = store.read_header(path)
    if fingerprint not in (None, header["fingerprint"]):
        raise StoreError(f"the token store {name} was made again, with the fingerprint {header['fingerprint'][:12]}")
    return kept(path, header["tokenizer"] | {"eos_id": header["eos_id"]})
