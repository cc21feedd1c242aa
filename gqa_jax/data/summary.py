"""What `prepare` says of a store: the facts that it puts into the header, a summary of some lines, and all of it (`--report`).

Everything is read from the finished store, so that it is said the same whenever it is asked for, without the inputs. A store of
the first version of the program has fewer facts; for the others there is a line that says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
            kind: {"files": counted.files, "documents": counted.documents, "bytes": counted.text_bytes}
            for kind, counted in reading.kinds.items()
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
    lines = [f"{out}: " + ("is there already, nothing to do" if seconds is None else f"made in {seconds:.1f} s")]
    for split, facts in made.header["splits"].items():
        size = f"{facts['bytes'] / 1e6:,.2f} MB of text"
        lines.append(f"  {split:10} {facts['tokens']:>15,} tokens {facts['documents']:>11,} documents {size:>20}")
    lines.append(f"  {_rule(made)}")
    if sources := _sources(made):
        few = [
            f"{name} ({'the end of its 1 document' if provenance.get('tail') else _of_how_many(own)} held out)"
            for name, own in list(sources.items())[:_SHOWN]
        ]
        more = f", and {len(sources) - _SHOWN:,} more" if len(sources) > _SHOWN else ""
        lines.append(f"  {counted(len(sources), 'source')}: {', '.join(few)}{more}")
    lines.append(f"  tokenizer {made.header['tokenizer']['name']}, {made.vocab_size:,} ids as {made.header['dtype']}")
    lines += [f"  {sentence}" for sentence in _tokenizer_loss(provenance)]
    if provenance.get("copies") or (provenance.get("paragraphs") or {}).get("copied_paragraphs"):
        lines += [f"  {sentence}" for sentence in _copies(made)]
    if left_out := provenance.get("left_out"):
        reasons = [f"{facts['files']:,} {reason}" for reason, facts in left_out.items()]
        others = provenance["n_left_out"] - sum(facts["files"] for facts in list(left_out.values())[:_SHOWN])
        why = ", ".join([*reasons[:_SHOWN], *([f"{others:,} for other reasons"] if others else [])])
        lines.append(f"  left out: {counted(provenance['n_left_out'], 'path')} ({why})")
    if bad := provenance.get("bad_lines"):
        lines.append(f"  {counted(sum(facts['lines'] for facts in bad.values()), 'bad line')} left out: see --report")
    lines += [f"  note: {sentence}" for sentence in _doubts(made)]
    lines.append(f"  {provenance['empty_documents']:,} empty documents left out; fingerprint {made.fingerprint[:16]}")
    return "\n".join(lines)


def report(made: TokenStore) -> str:
    """All that is known of a store, in sections."""
    provenance = made.header["provenance"]
    not_recorded = "not recorded by the version that made this store"
    sections = {"held out": [_rule(made)], "sources": [not_recorded], "kinds of files": [not_recorded]}
    if sources := _sources(made):
        header = ("source", "documents", "held out", "MB of text", "held out", "tokens", "held out")
        rows = [
            (
                name,
                f"{1 if provenance.get('tail') else _both(own, 'documents'):,}",
                f"{own['validation']['documents']:,}",
                f"{_both(own, 'bytes') / 1e6:,.2f}",
                f"{own['validation']['bytes'] / 1e6:,.2f}",
                f"{_both(own, 'tokens'):,}",
                f"{own['validation']['tokens']:,}",
            )
            for name, own in sources.items()
        ]
        sections["sources"] = _table(header, rows)
    if kinds := provenance.get("kinds"):
        rows = [
            (kind, f"{own['files']:,}", f"{own['documents']:,}", f"{own['bytes'] / 1e6:,.2f}") for kind, own in kinds.items()
        ]
        sections["kinds of files"] = _table(("kind", "files", "documents", "MB of text"), rows)
    sections["left out"] = [f"{counted(provenance['empty_documents'], 'empty document')}"]
    for reason, facts in provenance.get("left_out", {}).items():
        sections["left out"] += [f"{facts['files']:,} {reason}:", *(f"  {path}" for path in facts["first"])]
        if facts["files"] > len(facts["first"]):
            sections["left out"].append(f"  and {facts['files'] - len(facts['first']):,} more")
    others = provenance.get("n_left_out", 0) - sum(facts["files"] for facts in provenance.get("left_out", {}).values())
    if others:
        sections["left out"].append(f"{others:,} for other reasons")
    for reason, facts in provenance.get("bad_lines", {}).items():
        sections["left out"].append(f"{counted(facts['lines'], 'bad line')}: {reason}; first: {facts['first']}")
    if "left_out" not in provenance:
        sections["left out"].append(f"files and lines: {not_recorded}")
    sections["tokenizer"] = [
        f"{made.header['tokenizer']['name']}, {made.vocab_size:,} ids as {made.header['dtype']}",
        *(_tokenizer_loss(provenance) or [f"what it loses: {not_recorded}"]),
    ]
    sections["copies"] = _copies(made) or [not_recorded]
    if doubts := _doubts(made):
        sections["notes"] = doubts
    return "\n".join(line for title, lines in sections.items() for line in (f"{title}:", *(f"  {line}" for line in lines)))


def _rule(made: TokenStore) -> str:
    tokens = {split: made.header["splits"][split]["tokens"] for split in SPLITS}
    share = f"{tokens['validation'] / sum(tokens.values()):.1%} of the tokens"
    if made.holdout_rule == "position":
        every = made.header["provenance"]["request"]["holdout_every"]
        return (
            f"held out by position, one document of {every} in the order of the inputs (the rule of the first version): {share}"
        )
    if made.header["provenance"].get("tail"):
        return f"held out is the end of its one document: {share}"
    return f"held out by {made.holdout_rule} of the text, one document of {made.header['holdout']['every']}: {share}"


def _sources(made: TokenStore) -> dict[str, dict[str, dict[str, int]]]:
    """Documents, bytes and tokens of every source in both splits; the largest come first. Empty where there is no record."""
    columns = {}
    for split in SPLITS:
        if (found := made.sources(split)) is None:
            return {}
        names, sources = found
        index = made.documents(split)
        tokens = np.diff(index[:, 0], prepend=0)
        # As float64, `bincount` is exact up to 2^53 tokens.
        columns[split] = {
            "documents": np.bincount(sources, minlength=len(names)),
            "bytes": np.bincount(sources, index[:, 1], len(names)).astype(np.int64),
            "tokens": np.bincount(sources, tokens, len(names)).astype(np.int64),
        }
    rows = {
        shown(name): {split: {key: int(column[i]) for key, column in own.items()} for split, own in columns.items()}
        for i, name in enumerate(names)
    }
    return dict(sorted(rows.items(), key=lambda row: -_both(row[1], "bytes")))


def _of_how_many(own: Mapping[str, Mapping[str, int]]) -> str:
    return f"{own['validation']['documents']:,} of {counted(_both(own, 'documents'), 'document')}"


def _both(source: Mapping[str, Mapping[str, int]], key: str) -> int:
    return sum(own[key] for own in source.values())


def _tokenizer_loss(provenance: Mapping[str, Any]) -> list[str]:
    sample = provenance.get("tokenizer_sample")
    if sample is None:
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
    lines = [f"{copies:,} exact {'copy' if copies == 1 else 'copies'} of another document"]
    if copies and made.holdout_rule == "hash":
        lines[0] += ", always in the same split"
    elif copies:
        lines[0] += f"; {counted(provenance['documents_in_both'], 'held-out document')} in the training split too"
    if found is None:
        return [*lines, "paragraphs in both splits were not looked for: there is one document"]
    if not found["paragraphs"]:
        return [*lines, "no held-out paragraph is long enough to be looked for in the training split"]
    share = found["copied_paragraphs"] / found["paragraphs"]
    return [
        *lines,
        f"{found['copied_paragraphs']:,} of {found['paragraphs']:,} held-out paragraphs ({share:.1%}), in "
        f"{found['documents_with_copies']:,} of {found['documents']:,} documents, are in the training split too",
    ]


def _doubts(made: TokenStore) -> list[str]:
    provenance = made.header["provenance"]
    notes = provenance.get("notes", [])
    more = provenance.get("n_notes", 0) - len(notes)
    sentences = [*provenance.get("doubts", []), *notes, *([f"and {more:,} more of the inputs"] if more else [])]
    facts = made.header["splits"]
    every = made.header["holdout"]["every"] if "holdout" in made.header else provenance["request"]["holdout_every"]
    part = facts["validation"]["tokens"] * every / sum(facts[split]["tokens"] for split in SPLITS)
    if not 0.5 <= part <= 2:
        sentences.append(
            f"{part / every:.2g} of the tokens are held out, {1 / every:.2g} was asked for: few documents, or of very "
            "different lengths"
        )
    return sentences


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
