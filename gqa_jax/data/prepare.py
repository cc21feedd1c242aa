"""Text to a token store: `python -m gqa_jax.data.prepare --help`; docs/data.md.

Documents are read in order and tokenized in chunks by several threads (`gqa_jax.data.parts`). A run that was killed and is
started again reads its inputs again, but encodes only what isn't encoded yet. When all is read it is decided which documents
are held out (`gqa_jax.data.holdout`); header.json, with what was seen on the way (`gqa_jax.data.summary`), is written last.

A finished store is never changed. The command that made it finds it: the first version's too, whose request is compared by the
settings that it knew. Inputs that have changed since are an error (`gqa_jax.data.inputs`). A store for gs:// is made in the
cache on the local disk and copied when it is finished.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gqa_jax import storage
from gqa_jax.config import differing_fields
from gqa_jax.data import holdout, inputs, parts, roundtrip, store, summary
from gqa_jax.data.documents import Format, Found, InputError, Reading, Source, find_sources, read_documents
from gqa_jax.data.rows import BAD_LINES, ENCODING_ERRORS
from gqa_jax.data.sources import few, shown
from gqa_jax.data.store import StoreError, TokenStore
from gqa_jax.data.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, bpe_size, load_tokenizer, train_bpe
from gqa_jax.data.vocabulary import Tokenizer, TokenizerError

log = logging.getLogger(__name__)

_OF_FILES = ("files", "bytes", "inputs")  # fields of a request that say what the files were like
BPE_TRAINING_CHARS = 256_000_000  # a BPE is trained on the first documents up to this much text, held-out ones left out
MAX_SOURCES = 10_000  # values of --source_key: a loss is told for each


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the content of a store, beside the bytes of its inputs."""

    inputs: tuple[str, ...]  # `gqa_jax.data.documents`
    tokenizer: str = "gpt2"  # `gqa_jax.data.tokenizer.load_tokenizer`, or bpe:N
    eos: str | None = None  # end-of-document token of a Hugging Face tokenizer; None: found
    holdout_every: int = 20
    form: Format = dataclasses.field(default_factory=Format)
    include: str | tuple[str, ...] = "*"  # shell patterns for files in folders, one or several
    exclude: str | tuple[str, ...] | None = None
    holdout_rule: str = "hash"  # or "position", that of the first version: `gqa_jax.data.holdout`

    def __post_init__(self):
        if self.holdout_rule not in store.HOLDOUT_RULES:
            raise InputError(f"--holdout_rule {self.holdout_rule!r}: must be {' or '.join(store.HOLDOUT_RULES)}")
        if self.holdout_every < 2:
            raise InputError(f"--holdout_every {self.holdout_every}: must be at least 2 (every second document); default 20")
        if bpe_size(self.tokenizer) is not None and self.eos is not None:
            raise TokenizerError(f"--eos {self.eos!r}: a trained BPE ends documents with {END_OF_TEXT}; leave --eos out")


def prepare(
    recipe: Recipe, out: str | os.PathLike, threads: int | None = None, progress: bool = False, wait: bool = False
) -> TokenStore:
    """Make the store of `recipe` in folder `out`, local or on gs://, or open it when it is there already.

    Args:
      threads: of the tokenizer; None: every CPU.
      progress: show a bar on stderr.
      wait: for another process that is preparing the same folder; False: an error.
    Raises:
      InputError, TokenizerError, StoreError, ConfigError (all ValueError): with a sentence.
      OSError: no space, no permission, no network.
      In each case what was encoded is kept, and the same call goes on from there.
    """
    if remote := storage.is_remote(out):
        _check_remote(storage.path(out))
        work = _work_folder(out)
    else:
        work = Path(out).expanduser()
        _check_folder(work, recipe.inputs)
    if threads is not None and threads < 1:
        raise TokenizerError(f"--threads {threads}: must be at least 1")
    found = _find(recipe)
    if not remote:
        _check_outside(work, found.sources)
    size = bpe_size(recipe.tokenizer)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.eos, threads) if size is None else None
    request = _request(recipe, found.sources, tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    with store.locked(work, wait):
        if remote and store.is_finished(out):
            shutil.rmtree(work, ignore_errors=True)  # what was begun here, and the folder of the lock
            return _finished(storage.path(out), recipe, request, found.sources)
        if (work / store.HEADER).exists():
            shutil.rmtree(work / store.PARTS, ignore_errors=True)  # of a run that was killed after its last act but one
            made = _finished(work, recipe, request, found.sources)
        else:
            if remote:
                log.info("preparing in %s", work)
            made = _make(recipe, work, found, tokenizer, request, progress)
        return _publish(made, storage.path(out), recipe, found.sources) if remote else made


def _find(recipe: Recipe, as_given: bool = False) -> Found:
    """The sources; by name, so that a store by hash is the same for any order of its inputs, or in the order of the inputs."""
    if as_given or recipe.holdout_rule == "position":
        return find_sources(recipe.inputs, recipe.include, recipe.exclude)
    found = find_sources(sorted(recipe.inputs, key=os.fspath), recipe.include, recipe.exclude)
    return found._replace(sources=sorted(found.sources, key=lambda source: source.origin))


def _make(
    recipe: Recipe, out: Path, found: Found, tokenizer: Tokenizer | None, request: dict[str, Any], progress: bool
) -> TokenStore:
    """Makes the store in a local folder that is locked; `tokenizer` None: trained first."""
    folder = out / store.PARTS
    folder.mkdir(exist_ok=True)
    for leftover in (*folder.glob("*.tmp"), *(out / name for name in store.OPTIONAL)):  # perhaps of another request
        leftover.unlink(missing_ok=True)
    reading, names = Reading(), {}
    bar = _Progress(found.sources, enabled=progress)
    with bar.display, inputs.InputFiles(found.sources) as files:
        if tokenizer is None:
            texts = _training_texts(_documents(found.sources, recipe.form, bar, files, Reading(), {}), recipe)
            tokenizer = _trained_bpe(recipe, texts, folder, request, files.states)
        documents = _documents(found.sources, recipe.form, bar, files, reading, names)
        done, empty = parts.encode_documents(documents, tokenizer, folder, bar.encoded)
        if not done:
            bad = "".join(f"; {one.count:,} bad lines: {why} ({one.first})" for why, one in reading.bad_lines.items())
            raise InputError(f"no text in the input: 0 documents ({empty} empty ones){bad}")
        files.write_record(out)
    splits, facts = _assembled(recipe, done, list(names), out, tokenizer)
    if tokenizer.json is not None:
        (out / store.TOKENIZER).write_bytes(tokenizer.json)
    header = {
        "dtype": store.token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "splits": splits,
        "provenance": {
            "request": request,
            "empty_documents": empty,
            "sources": [{"name": source.name, "bytes": source.size} for source in found.sources[:100]],
            "n_sources": len(found.sources),
            **summary.of_inputs(found, reading),
            **facts,
            "tokenizer_sample": roundtrip.total([part.sample for part in done])._asdict(),
            "versions": _versions("gqa-jax", "tiktoken", "tokenizers", "pyarrow", "datasets"),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    if recipe.holdout_rule != "position":
        header["holdout"] = {"rule": recipe.holdout_rule, "every": recipe.holdout_every}
    store.write_header(out, header)
    shutil.rmtree(folder)
    made = TokenStore.open(out)
    store.remember(made)
    return made


def _assembled(
    recipe: Recipe, done: Sequence[parts.Part], names: list[str], out: Path, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The splits of the store, decided and written; returns the header's entry, and what else is to be said of documents."""
    index = parts.joined(done)
    has_text = np.bincount(index.sources, minlength=len(names)) > 0
    doubts = [f"source {name} has no text" for name, has in zip(names, has_text, strict=True) if not has]
    names = [name for name, has in zip(names, has_text, strict=True) if has]
    index = index._replace(sources=(np.cumsum(has_text) - 1)[index.sources])
    every, copies = recipe.holdout_every, len(index.hashes) - len(np.unique(index.hashes))
    if recipe.holdout_rule == "position":
        split = holdout.by_position(len(index.hashes), every)
    elif len(index.hashes) > 1:
        split = holdout.by_hash(index.hashes, index.sources, names, every)
    else:
        done = [parts.cut(done[0], tokenizer, every)]
        index, split = done[0].index, holdout.TAIL
    splits, copied = parts.assemble(done, index, split, names, out, tokenizer)
    held_out, trained = index.hashes[split.held_out], index.hashes[~split.held_out]
    tail = split is holdout.TAIL
    return splits, {
        "doubts": [*doubts, *split.doubts],
        "paragraphs": None if tail else copied,
        "copies": copies,
        "documents_in_both": None if tail else int(np.isin(held_out, trained).sum()),
        "tail": tail,
    }


def _work_folder(out: str | os.PathLike) -> Path:
    """The local folder in which the store for a folder of gs:// is made: the same for every call."""
    return store.cache_folder() / f"prepare-{_digest(os.fspath(out).rstrip('/'))[:16]}"


def _check_remote(out: epath.Path) -> None:
    """Raises ConfigError or StoreError, before anything is encoded, when the store could not be copied to `out`."""
    if others := set(storage.names(out)) - {*store.FILES, *store.OPTIONAL, store.HEADER}:
        raise StoreError(f"--out {out} isn't empty and holds no token store ({min(others)}): give a new or an empty folder")
    storage.check_writable(out)


def _publish(made: TokenStore, out: epath.Path, recipe: Recipe, sources: Sequence[Source]) -> TokenStore:
    """Copies a finished store to gs://; it stays here as the copy that training would make."""
    if store.is_finished(out):  # made by another machine meanwhile
        return _finished(out, recipe, made.header["provenance"]["request"], sources)
    files = [name for name in (*store.FILES, *store.OPTIONAL) if (made.path / name).exists()]
    size = sum((made.path / name).stat().st_size for name in files)
    log.info("copying %.2f GB to %s", size / 1e9, out)
    for name in (*files, store.HEADER):
        storage.upload(made.path / name, out / name)
    kept = store.cache_folder() / made.fingerprint
    if kept.exists():
        shutil.rmtree(made.path)
    else:
        made.path.rename(kept)
        store.remember(TokenStore.open(kept))
    return store.open_folder(kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or already there, 1 the machine's fault, 2 the input's, 130 stopped."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="prepare: %(message)s")
    if not options.quiet:
        for logger in (log, store.log):
            logger.setLevel(logging.INFO)
    if options.threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # for Hugging Face tokenizers, which read it at first use
    begin = time.perf_counter()
    try:
        out = storage.path(options.out)
        was_there = storage.read_bytes(out / store.HEADER) is not None
        recipe = Recipe(
            inputs=tuple(options.inputs),
            form=Format(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Format)}),
            include=tuple(options.include or ["*"]),
            exclude=tuple(options.exclude),
            **{name: getattr(options, name) for name in ("tokenizer", "eos", "holdout_every", "holdout_rule")},
        )
        made = prepare(recipe, out, options.threads, progress=sys.stderr.isatty() and not options.quiet)
        seconds = None if was_there else time.perf_counter() - begin
        said = [] if options.quiet else [summary.short(made, out, seconds)]
        if options.report:
            said.append(summary.report(made))
        if said:
            print("\n".join(said), flush=True)
    except BrokenPipeError:  # whoever reads this has seen enough, as `head`: the store is made
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        sentence = storage.explain_remote(error) or store.os_sentence(error, Path(options.out))
        print(f"prepare: {sentence}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


class _Progress:
    """A bar over the bytes of the sources, with documents, tokens and speed of what is encoded; shown within `display`."""

    def __init__(self, sources: Sequence[Source], enabled: bool):
        from rich import console, progress

        sizes = [source.size for source in sources]
        self._total = None if None in sizes else sum(sizes)  # unknown: the bar only moves
        columns = ("{task.description}", progress.BarColumn(), progress.TaskProgressColumn(), "{task.fields[counts]}")
        columns += (progress.TimeRemainingColumn(),)
        self.display = progress.Progress(*columns, disable=not enabled, console=console.Console(stderr=True))
        self._task = self.display.add_task("", total=self._total, counts="")

    def begin(self) -> None:
        """Reading starts, at the first source."""
        self._documents = self._tokens = self._bytes = self._shown = 0
        self._start = time.perf_counter()
        self.display.reset(self._task, description="reading", total=self._total, counts="")

    def read(self, position: int | None) -> None:
        """`position` bytes of the sources have been read; None: all."""
        if position is None:
            self.display.update(self._task, completed=self._total)
        elif position - self._shown >= 1 << 18:  # an update costs as much as reading a short document
            self.display.update(self._task, completed=position)
            self._shown = position

    def encoded(self, part: parts.Part) -> None:
        """A part is on disk."""
        self._documents += part.documents
        self._tokens += part.index.tokens.sum()
        self._bytes += part.index.text_bytes.sum() if part.encoded else 0
        speed = self._bytes / 1e6 / (time.perf_counter() - self._start)
        counts = f"{self._documents:,} documents, {self._tokens / 1e6:,.1f} M tokens, {speed:.1f} MB/s"
        self.display.update(self._task, description="encoding", counts=counts)


def _documents(
    sources: Sequence[Source],
    form: Format,
    bar: _Progress,
    files: inputs.InputFiles,
    reading: Reading,
    names: dict[str, int],
) -> Iterator[tuple[str, int]]:
    """Text and index of the source of every document; `names` gets the sources' names, in the order of the indices.

    Raises InputError for what can't be read, a file that changes meanwhile, and too many sources.
    """
    bar.begin()
    before = 0
    for source in sources:
        files.begin(source)
        if form.source_key is None:
            names.setdefault(source.origin, len(names))  # also of a source without a document
        try:
            for document in read_documents(source, form, reading):
                bar.read(before + document.position)
                index = names.setdefault(document.source, len(names))
                if index >= MAX_SOURCES and form.source_key is not None:
                    raise InputError(
                        f"--source_key {form.source_key}: more than {MAX_SOURCES:,} values, as {document.source!r} in "
                        f"{shown(source.name)}: give a field that names kinds of text"
                    )
                yield document.text, index
        except InputError:
            files.check(source)  # a change is the better reason
            raise
        files.check(source)
        before += source.size or 0
    bar.read(None)


def _trained_bpe(
    recipe: Recipe, texts: Iterator[str], folder: Path, request: dict[str, Any], files: list[tuple[int, ...]]
) -> HuggingFaceTokenizer:
    """The BPE of this request: found from an earlier run on the very `files`, or trained on texts that aren't held out."""
    path = folder / f"bpe-{_digest([request, files])[:32]}.json"
    if not path.exists():
        storage.write_bytes(path, train_bpe(_limited(texts, BPE_TRAINING_CHARS), bpe_size(recipe.tokenizer)).json)
    return HuggingFaceTokenizer(path.read_bytes(), recipe.tokenizer, END_OF_TEXT)


def _limited(texts: Iterator[str], chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def _training_texts(documents: Iterator[tuple[str, int]], recipe: Recipe) -> Iterator[str]:
    """Texts that aren't held out, for a tokenizer that is trained before all documents are known.

    By position these are exactly those of the training split. By hash, documents below the limit are left out exactly. So are
    those of a source's or the store's lowest hash where none is below, unless another source has the same text. Of a single
    document it is the beginning up to where about the tail is cut.
    """
    filled = ((text, source) for text, source in documents if text and not text.isspace())
    every = recipe.holdout_every
    if recipe.holdout_rule == "position":
        yield from (text for i, (text, _) in enumerate(filled) if i % every != every // 2)
        return
    lowest: dict[int, tuple[int, str]] = {}  # of sources that have none below the limit so far: kept back
    below, several = set(), set()  # sources with documents below the limit, and with different texts
    count, last = 0, ""
    for text, source in filled:
        last, data = parts.utf8(text)
        count += 1
        own = (holdout.hash_of(data), last)
        if own[0] <= holdout.limit(every):
            below.add(source)
            if source in lowest:
                yield lowest.pop(source)[1]
        elif source in below:
            yield last
        elif own[0] != lowest.setdefault(source, own)[0]:
            several.add(source)
            yield max(own, lowest[source])[1]
            lowest[source] = min(own, lowest[source])
    if count == 1:
        yield last[: len(last) * (every - 1) // every]
        return
    one_text = sorted(own for source, own in lowest.items() if source not in several)
    yield from (text for _, text in one_text[0 if below or several else 1 :])


def _request(recipe: Recipe, sources: Sequence[Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What was asked for, to compare with a finished store: settings, names and sizes of the inputs, names of sources."""
    origins = list(dict.fromkeys(source.origin for source in sources))
    return {
        "tokenizer": recipe.tokenizer if tokenizer is None else f"{tokenizer.name} {tokenizer.sha256[:12]}",
        "eos": recipe.eos if tokenizer is None else tokenizer.eos_id,
        "holdout_every": recipe.holdout_every,
        "holdout_rule": recipe.holdout_rule,
        **dataclasses.asdict(recipe.form),
        "files": len(sources),
        "bytes": sum(source.size or 0 for source in sources),
        "inputs": _inputs_digest(sources),
        "sources": ", ".join(origins) if len(origins) <= 10 else f"{len(origins)} sources, {_digest(origins)[:12]}",
    }


def _inputs_digest(sources: Sequence[Source]) -> str:
    return _digest([[source.name, source.size] for source in sources])[:12]


def _finished(out: Path | epath.Path, recipe: Recipe, request: dict[str, Any], sources: Sequence[Source]) -> TokenStore:
    """The finished store in `out`, when it is of this request and its inputs are what they were; its header comes first."""
    provenance = store.read_header(out)["provenance"]
    theirs = provenance.get("request", {})
    is_first = "holdout_rule" not in theirs
    # The first version read its inputs as they were given, and knew fewer settings: it did what the default of each says, held
    # out by position, and named no sources.
    if is_first:
        request = request | {"inputs": _inputs_digest(_find(recipe, as_given=True).sources)}
    theirs = dataclasses.asdict(Format()) | {name: request[name] for name in ("holdout_rule", "sources")} | theirs
    differing = differing_fields(request, theirs)
    changed = inputs.changed_since(out, sources)
    if differing and (not changed or any(request[name] != theirs.get(name) for name in request if name not in _OF_FILES)):
        others = is_first and request["files"] != theirs.get("files")
        why = "; since then links are followed, and README and the like beside data are left out" if others else ""
        raise StoreError(
            f"{out} holds a finished store of another request ({'; '.join(differing)}{why}); nothing was changed: "
            "choose another --out, or delete that folder first"
        )
    if changed:
        raise StoreError(
            f"{out} holds a finished store of these inputs as they were; since then {few(changed)}; "
            "nothing was changed in the store: choose another --out, or delete that folder first"
        )
    if changed is None and (newer := _newer(sources, provenance["created"])):
        log.warning("%s was written after %s was made, which keeps no record of its inputs: is it of this text?", newer, out)
    try:
        return store.open_folder(out)
    except StoreError as error:
        raise StoreError(f"{error}; to make it again delete {out} first, then give the same command") from error


def _newer(sources: Sequence[Source], created: str) -> Path | None:
    """A file that was written after `created`, as the header says it."""
    seconds = calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ")) + 1
    return next((source.path for source in sources if source.path and source.path.stat().st_mtime > seconds), None)


def _check_folder(out: Path, inputs: Sequence[str]) -> None:
    for entry in inputs:
        if (folder := Path(entry).expanduser()).is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"--out {out} lies in the input {entry}, and would be read as text: put it elsewhere")
    if out.exists() and not out.is_dir():
        raise StoreError(f"--out {out} is a file: give a folder for the store")
    found = set(os.listdir(out)) if out.is_dir() else set()
    if found and not found & {store.HEADER, store.PARTS, store.LOCK}:
        raise StoreError(f"--out {out} isn't empty and holds no token store: give a new or an empty folder")


def _check_outside(out: Path, sources: Sequence[Source]) -> None:
    """Raises StoreError where a link leads from an input into the folder of the store."""
    folder = os.path.join(os.path.realpath(out), "")
    if inside := next((one.path for one in sources if one.path and os.path.realpath(one.path).startswith(folder)), None):
        raise StoreError(
            f"--out {out} is reached from an input, as {shown(inside)}, and would be read as text: put it elsewhere"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _unescaped(separator: str) -> str:
    return separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gqa_jax.data.prepare",
        description="Turn text into a token store that training reads (data.store=OUT).",
        epilog="A run that was stopped goes on when the same command is given again. Example:\n"
        "  python -m gqa_jax.data.prepare --out stores/web --tokenizer gpt2 web/ books/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder (its files, sorted), sotu (the embedded corpus) or hf:NAME[@CONFIG][:SPLIT]; each is a source, and "
        "losses are told for each. Files: JSON lines, JSON arrays, Parquet, CSV, TSV, anything else as plain text (UTF-8, or "
        "UTF-16 with its mark), packed by gzip, zstd, xz or bzip2 or not",
    )
    add("--out", required=True, help="folder of the store, local or gs://BUCKET/FOLDER")
    add(
        "--tokenizer",
        default="gpt2",
        help="gpt2 (default), bytes, bpe:N (trained on the input, N entries), hub:NAME[@REVISION], "
        "or a Hugging Face tokenizer.json",
    )
    add("--eos", metavar="TOKEN", help="token that ends a document in a Hugging Face tokenizer (default: found)")
    add("--text_key", default="text", metavar="KEY", help="field or column that holds the text (default: text)")
    cuts = r"cuts plain files into documents, as in '\n\n' or '<|endoftext|>'"
    add("--separator", type=_unescaped, metavar="TEXT", help=cuts)
    add("--holdout_every", type=int, default=20, metavar="N", help="hold out one document of N for evaluation (default: 20)")
    which = "which: by a hash of the text (default), or by position, the rule of the first version"
    add("--holdout_rule", choices=store.HOLDOUT_RULES, default="hash", help=which)
    add(
        "--source_key",
        metavar="KEY",
        help="field or column that names the source of a document (default: the INPUT is its source); losses are told for each",
    )
    patterns = {"action": "append", "default": [], "metavar": "PATTERN"}
    add("--include", **patterns, help="only these files of folders, as in '*.txt'; may be repeated")
    add("--exclude", **patterns, help="not these files of folders; may be repeated")
    no_utf8 = "bytes that are no UTF-8: an error (strict, default), or replacement characters"
    add("--encoding_errors", choices=ENCODING_ERRORS, default="strict", help=no_utf8)
    bad = "lines and rows that can't be used: an error (default), or left out and counted"
    add("--bad_lines", choices=BAD_LINES, default="error", help=bad)
    add("--threads", type=int, metavar="N", help="of the tokenizer (default: every CPU)")
    add(
        "--report",
        action="store_true",
        help="print what is known of the store: sources, kinds of files, what was left out, what the tokenizer loses, copies",
    )
    add("--quiet", action="store_true", help="no progress bar and no summary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
