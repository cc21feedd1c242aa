"""What `prepare` says of a store: the facts that it puts into the header, a summary of some lines, and all of it (`--report`).

Everything is read from the finished store, so that it is said the same whenever it is asked for, without the inputs. A store of
the first version of the program has fewer facts; for the others there is a line that says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqa_jax.data.documents import Found, Reading
from gqa_jax.data.sources import shown
from gqa_jax.data.store import SPLITS, TokenStore
from gqa_jax.formatting import counted

_KEPT = 20  # reasons for leaving files out, paths of each, and notes, that the header keeps; of all there is the number
_SHOWN = 3  # sources, and reasons for leaving files out, in the summary


def of_inputs(found: Found, reading: Reading) -> dict[str, Any]:
    """For the header's provenance: what was read and what was left out."""
    reasons = sorted(found.left_out.items(), key=lambda item: -len(item[1]))
    return {
        "kinds": {
            kind: {"files": own.files, "documents": own.documents, "bytes": own.text_bytes}
            for kind, own in reading.kinds.items()
        },
        "left_out": {reason: {"files": len(paths), "first": paths[:_KEPT]} for reason, paths in reasons[:_KEPT]},
        "n_left_out": sum(len(paths) for _, paths in reasons),
        "bad_lines": {reason: {"lines": bad.count, "first": bad.first} for reason, bad in reading.bad_lines.items()},
        "notes": reading.notes[:_KEPT],
        "n_notes": len(reading.notes),
    }


def short(made: TokenStore, out: os.PathLike, seconds: float | None) -> str:
    """The summary; `seconds` None: the store was there."""
    provenance = made.header["provenance"]
    lines = []
    for split, facts in made.header["splits"].items():
        size = f"{facts['bytes'] / 1e6:,.2f} MB of text"
        lines.append(f"{split:10} {facts['tokens']:>15,} tokens {facts['documents']:>11,} documents {size:>20}")
    lines.append(_rule(made))
    if sources := _sources(made):
        few = []
        for name, own in list(sources.items())[:_SHOWN]:
            documents, held_out = own[0]
            share = "the end of its 1 document" if _is_tail(made) else f"{held_out:,} of {counted(documents, 'document')}"
            few.append(f"{name} ({share} held out)")
        more = f", and {len(sources) - _SHOWN:,} more" if len(sources) > _SHOWN else ""
        lines.append(f"{counted(len(sources), 'source')}: {', '.join(few)}{more}")
    lines += [f"tokenizer {_tokenizer(made)}", *_tokenizer_loss(made)]
    if provenance.get("copies") or (provenance.get("paragraphs") or {}).get("copied_paragraphs"):
        lines += _copies(made)
    if left_out := provenance.get("left_out"):
        reasons = [f"{facts['files']:,} {reason}" for reason, facts in list(left_out.items())[:_SHOWN]]
        if others := provenance["n_left_out"] - sum(facts["files"] for facts in list(left_out.values())[:_SHOWN]):
            reasons.append(f"{others:,} for other reasons")
        lines.append(f"left out: {counted(provenance['n_left_out'], 'path')} ({', '.join(reasons)})")
    if bad := provenance.get("bad_lines"):
        lines.append(f"{counted(sum(facts['lines'] for facts in bad.values()), 'bad line')} left out: see --report")
    lines += [f"note: {sentence}" for sentence in _doubts(made)]
    lines.append(f"{provenance['empty_documents']:,} empty documents left out; fingerprint {made.fingerprint[:16]}")
    title = "is there already, nothing to do" if seconds is None else f"made in {seconds:.1f} s"
    return "\n  ".join([f"{out}: {title}", *lines])


def report(made: TokenStore) -> str:
    """All that is known of a store, in sections."""
    provenance = made.header["provenance"]
    unknown = "not recorded by the version that made this store"
    rows = [("source", "documents", "held out", "MB of text", "held out", "tokens", "held out")]
    for name, ((documents, held), (size, held_size), (tokens, held_tokens)) in _sources(made).items():
        documents = 1 if _is_tail(made) else documents
        texts = f"{size / 1e6:,.2f}", f"{held_size / 1e6:,.2f}"
        rows.append((name, f"{documents:,}", f"{held:,}", *texts, f"{tokens:,}", f"{held_tokens:,}"))
    kinds = [("kind", "files", "documents", "MB of text")]
    for kind, own in provenance.get("kinds", {}).items():
        kinds.append((kind, f"{own['files']:,}", f"{own['documents']:,}", f"{own['bytes'] / 1e6:,.2f}"))
    left_out = [f"{counted(provenance['empty_documents'], 'empty document')}"]
    for reason, facts in provenance.get("left_out", {}).items():
        left_out += [f"{facts['files']:,} {reason}:", *(f"  {path}" for path in facts["first"])]
        if facts["files"] > len(facts["first"]):
            left_out.append(f"  and {facts['files'] - len(facts['first']):,} more")
    if others := provenance.get("n_left_out", 0) - sum(own["files"] for own in provenance.get("left_out", {}).values()):
        left_out.append(f"{others:,} for other reasons")
    for reason, facts in provenance.get("bad_lines", {}).items():
        left_out.append(f"{counted(facts['lines'], 'bad line')}: {reason}; first: {facts['first']}")
    if "left_out" not in provenance:
        left_out.append(f"files and lines: {unknown}")
    sections = {
        "held out": [_rule(made)],
        "sources": _table(rows) or [unknown],
        "kinds of files": _table(kinds) or [unknown],
        "left out": left_out,
        "tokenizer": [_tokenizer(made), *(_tokenizer_loss(made) or [f"what it loses: {unknown}"])],
        "copies": _copies(made) or [unknown],
        "notes": _doubts(made),
    }
    return "\n".join("\n  ".join([f"{title}:", *lines]) for title, lines in sections.items() if lines)


def _rule(made: TokenStore) -> str:
    every, tokens = _every(made), {split: made.header["splits"][split]["tokens"] for split in SPLITS}
    share = f"{tokens['validation'] / sum(tokens.values()):.1%} of the tokens"
    if made.holdout_rule == "position":
        return (
            f"held out by position, one document of {every} in the order of the inputs (the rule of the first version): {share}"
        )
    if _is_tail(made):
        return f"held out is the end of its one document: {share}"
    return f"held out by {made.holdout_rule} of the text, one document of {every}: {share}"


def _every(made: TokenStore) -> int:
    return (
        made.header["holdout"]["every"] if "holdout" in made.header else made.header["provenance"]["request"]["holdout_every"]
    )


def _is_tail(made: TokenStore) -> bool:
    """Whether the end of the only document is held out."""
    return made.header["provenance"].get("tail", False)


def _sources(made: TokenStore) -> dict[str, np.ndarray]:
    """Documents, bytes and tokens of every source, int64 (3, 2): all, held out. Largest first; empty: there is no record."""
    splits = []
    for split in SPLITS:
        if (found := made.sources(split)) is None:
            return {}
        names, sources = found
        ends, text_bytes = made.documents(split).T
        columns = (np.ones_like(ends), text_bytes, np.diff(ends, prepend=0))
        # As float64, `bincount` is exact up to 2^53 tokens.
        splits.append([np.bincount(sources, column, len(names)) for column in columns])
    train, held_out = np.array(splits, np.int64)
    counts = np.stack([train + held_out, held_out], axis=-1)
    rows = {shown(name): counts[:, i] for i, name in enumerate(names)}
    return dict(sorted(rows.items(), key=lambda row: -row[1][1, 0]))


def _tokenizer(made: TokenStore) -> str:
    return f"{made.header['tokenizer']['name']}, {made.vocab_size:,} ids as {made.header['dtype']}"


def _tokenizer_loss(made: TokenStore) -> list[str]:
    """A sentence on what the tokenizer loses, none where there is no record."""
    if (sample := made.header["provenance"].get("tokenizer_sample")) is None:
        return []
    size = f"{counted(sample['pieces'], 'piece')} of documents, {sample['text_bytes'] / 1e6:,.3f} MB"
    if not sample["changed"]:
        return [f"lossless on a sample ({size})"]
    before, after = sample["example"]
    return [
        f"LOSES TEXT: of a sample ({size}) {sample['changed'] / sample['pieces']:.1%} of the pieces come back changed, "
        f"{sample['lost_bytes'] / sample['text_bytes']:.1%} of the bytes don't come back; {before!r} comes back as {after!r}"
    ]


def _copies(made: TokenStore) -> list[str]:
    """Sentences on copies, none where there is no record."""
    provenance = made.header["provenance"]
    if "copies" not in provenance:
        return []
    copies, found = provenance["copies"], provenance["paragraphs"]
    line = f"{copies:,} exact {'copy' if copies == 1 else 'copies'} of another document"
    if copies and made.holdout_rule == "hash":
        line += ", always in the same split"
    elif copies:
        line += f"; {counted(provenance['documents_in_both'], 'held-out document')} in the training split too"
    if found is None:
        return [line, "paragraphs in both splits were not looked for: there is one document"]
    if not found["paragraphs"]:
        return [line, "no held-out paragraph is long enough to be looked for in the training split"]
    share = found["copied_paragraphs"] / found["paragraphs"]
    return [
        line,
        f"{found['copied_paragraphs']:,} of {found['paragraphs']:,} held-out paragraphs ({share:.1%}), in "
        f"{found['documents_with_copies']:,} of {found['documents']:,} documents, are in the training split too",
    ]


def _doubts(made: TokenStore) -> list[str]:
    provenance, facts, every = made.header["provenance"], made.header["splits"], _every(made)
    notes = provenance.get("notes", [])
    more = provenance.get("n_notes", 0) - len(notes)
    sentences = [*provenance.get("doubts", []), *notes, *([f"and {more:,} more of the inputs"] if more else [])]
    part = facts["validation"]["tokens"] * every / sum(facts[split]["tokens"] for split in SPLITS)
    if not 0.5 <= part <= 2:
        sentences.append(
            f"{part / every:.2g} of the tokens are held out, {1 / every:.2g} was asked for: few documents, or of very "
            "different lengths"
        )
    return sentences


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a header and rows below it; none where there is no row."""
    if len(rows) == 1:
        return []
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
