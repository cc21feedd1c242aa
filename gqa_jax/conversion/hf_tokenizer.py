"""Tokenizers as Hugging Face's `AutoTokenizer` opens them, and those of its folders."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa_jax.data import tokenizer as known
from gqa_jax.data.vocabulary import Tokenizer, TokenizerError
from gqa_jax.errors import ConfigError

CONTENT, SETTINGS = "tokenizer.json", "tokenizer_config.json"
#: What is kept of a folder that is imported, for who exports it again.
KEPT = (SETTINGS, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def written(tokenizer: Tokenizer, context: int | None) -> dict[str, bytes]:
    """Files by name with which `AutoTokenizer` encodes and decodes as a tokenizer of ours does.

    Special tokens that are written in a text are its characters, and nothing is added around it, as in our token stores.
    """
    content, eos = _content(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": None,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **({} if context is None else {"model_max_length": context}),
    }
    return {CONTENT: content, SETTINGS: encoded(settings)}


def _content(tokenizer: Tokenizer) -> tuple[bytes, str]:
    """tokenizer.json of a tokenizer of ours, and its end of a document as text."""
    import tokenizers

    if tokenizer.json is None:
        return _built_in()[tokenizer.name], known.END_OF_TEXT
    found = tokenizers.Tokenizer.from_buffer(tokenizer.json)
    eos = found.id_to_token(tokenizer.eos_id)
    if _around(found) == ((), ()):
        return tokenizer.json, eos
    values = json.loads(tokenizer.json)
    values["post_processor"] = None  # what it adds was not there in training
    return encoded(values), eos


@functools.cache
def _built_in() -> Mapping[str, bytes]:
    """tokenizer.json of the tokenizers that are known by their names."""
    merges = known.gpt2_merges()
    gpt2 = [*known.BYTE_OF, *("".join(pair) for pair in merges)]
    return {
        "bytes": _byte_level(known.BYTE_OF, [], splits=False),
        "gpt2": _byte_level({entry: i for i, entry in enumerate(gpt2)}, merges, splits=True),
    }


def _byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, splits: bool) -> bytes:
    """A byte-level BPE with the end of a document as its last id; `splits`: into words first, as GPT-2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    found = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=[*merges]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(known.END_OF_TEXT, special=True, normalized=False)])
    return found.to_str(pretty=False).encode() + b"\n"


def read(folder: Path, eos_id: int | None) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has none, or only one that is no tokenizer.json.

    That of an export of ours is the one that it was made of, under its own name.

    Args:
      eos_id: the end of a document; None: what tokenizer_config.json says, or the only special token that is known as one.
    Raises:
      ConfigError: it can't be read, or the end of a document can't be told.
    """
    import tokenizers

    path = folder / CONTENT
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        found = known.HuggingFaceTokenizer(content, folder.name, _eos(folder) if eos_id is None else eos_id)
    except TokenizerError as error:
        raise ConfigError(f"{path}: {error}. Or write eos_token_id into config.json") from error
    found.prefix, _ = _around(tokenizers.Tokenizer.from_buffer(content))
    meaning = None if found.prefix else _meaning(content)
    for name, ours in _built_in().items() if meaning else ():
        if meaning == _meaning(ours) and found.eos_id == (same := known.load_tokenizer(name)).eos_id:
            return same
    return found


def _meaning(content: bytes) -> Any:
    """What a tokenizer.json of a byte-level BPE says of ids, whoever wrote it; None of another."""
    try:
        values = json.loads(content)
        model, before, added = values["model"], values["pre_tokenizer"], values["added_tokens"]
        if (model["type"], before["type"], values["normalizer"]) != ("BPE", "ByteLevel", None):
            return None
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        specials = {token["content"]: token["id"] for token in added}
        return {**model["vocab"], **specials}, merges, before["add_prefix_space"], before.get("use_regex", True)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _eos(folder: Path) -> str | None:
    """The end of a document by a tokenizer_config.json; None: not said."""
    try:
        token = json.loads((folder / SETTINGS).read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def kept(folder: Path) -> dict[str, bytes]:
    """Files beside the tokenizer of a folder, by name."""
    return {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a tokenizer's own settings put before and behind a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for i in range(len(whole) - len(plain) + 1):
        if whole[i : i + len(plain)] == plain:
            return tuple(whole[:i]), tuple(whole[i + len(plain) :])
    return (), ()


def encoded(values: Mapping[str, Any]) -> bytes:
    """A JSON file as these folders have them."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
