"""Text to a token store: `python -m gqa_jax.data.prepare --help`.

Documents are read in order and tokenized in chunks by several threads (`gqa_jax.data.parts`). A run that was killed and is
started again reads its inputs again, but encodes only what isn't encoded yet; header.json is written last. Document i, empty
ones not counted, is held out when i % holdout_every == holdout_every // 2.

A store for gs:// is made in the cache on the local disk (`gqa_jax.data.store.cache_folder`) and copied when it is finished,
header.json last.
"""

from __future__ import annotations

import argparse
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

from etils import epath

from gqa_jax import storage
from gqa_jax.config import differing_fields
from gqa_jax.data import parts, store
from gqa_jax.data.documents import Format, InputError, Reading, Source, find_sources, read_documents
from gqa_jax.data.store import StoreError, TokenStore
from gqa_jax.data.tokenizer import (
    END_OF_TEXT,
    HuggingFaceTokenizer,
    Tokenizer,
    TokenizerError,
    bpe_size,
    load_tokenizer,
    train_bpe,
)

log = logging.getLogger(__name__)

BPE_TRAINING_CHARS = 256_000_000  # a BPE is trained on the first documents up to this much text, held-out ones left out


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the content of a store, beside the bytes of its inputs."""

    inputs: tuple[str, ...]  # `gqa_jax.data.documents`
    tokenizer: str = "gpt2"  # `gqa_jax.data.tokenizer.load_tokenizer`, or bpe:N
    eos: str | None = None  # end-of-document token of a Hugging Face tokenizer; None: found
    holdout_every: int = 20
    form: Format = dataclasses.field(default_factory=Format)
    include: str = "*"  # shell patterns for files in folders
    exclude: str | None = None

    def __post_init__(self):
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
    sources = find_sources(recipe.inputs, recipe.include, recipe.exclude).sources
    size = bpe_size(recipe.tokenizer)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.eos, threads) if size is None else None
    request = _request(recipe, sources, tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    with store.locked(work, wait):
        if remote and store.exists(out):
            shutil.rmtree(work, ignore_errors=True)  # what was begun here, and the folder of the lock
            return _finished(storage.path(out), request)
        if (work / store.HEADER).exists():
            shutil.rmtree(work / store.PARTS, ignore_errors=True)  # of a run that was killed after its last act but one
            made = _finished(work, request)
        else:
            if remote:
                log.info("preparing in %s", work)
            made = _make(recipe, work, sources, tokenizer, request, progress)
        return _publish(made, storage.path(out)) if remote else made


def _make(
    recipe: Recipe, out: Path, sources: Sequence[Source], tokenizer: Tokenizer | None, request: dict[str, Any], progress: bool
) -> TokenStore:
    """Makes the store in a local folder that is locked; `tokenizer` None: trained first."""
    folder = out / store.PARTS
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    with _Progress(sources, enabled=progress) as bar:
        if tokenizer is None:
            tokenizer = _trained_bpe(recipe, bpe_size(recipe.tokenizer), _texts(sources, recipe.form, bar), folder, request)
        done, empty = parts.encode_documents(_texts(sources, recipe.form, bar), tokenizer, folder, bar.encoded)
    _check_documents(sum(part.documents for part in done), empty, recipe.holdout_every)
    splits = parts.assemble(done, out, tokenizer, recipe.holdout_every)
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
            "sources": [{"name": source.name, "bytes": source.size} for source in sources[:100]],
            "n_sources": len(sources),
            "versions": _versions("gqa-jax", "tiktoken", "tokenizers", "pyarrow", "datasets"),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    store.write_header(out, header)
    shutil.rmtree(folder)
    return TokenStore.open(out)


def _work_folder(out: str | os.PathLike) -> Path:
    """The local folder in which the store for a folder of gs:// is made: the same for every call."""
    return store.cache_folder() / f"prepare-{_digest(os.fspath(out).rstrip('/'))[:16]}"


def _check_remote(out: epath.Path) -> None:
    """Raises ConfigError or StoreError, before anything is encoded, when the store could not be copied to `out`."""
    if others := set(storage.names(out)) - {*store.FILES, store.HEADER, store.TOKENIZER}:
        raise StoreError(f"--out {out} isn't empty and holds no token store ({min(others)}): give a new or an empty folder")
    storage.check_writable(out)


def _publish(made: TokenStore, out: epath.Path) -> TokenStore:
    """Copies a finished store to gs://; it stays here as the copy that training would make."""
    if store.exists(out):  # made by another machine meanwhile
        return _finished(out, made.header["provenance"]["request"])
    files = [name for name in (*store.FILES, store.TOKENIZER) if (made.path / name).exists()]
    size = sum((made.path / name).stat().st_size for name in files)
    log.info("copying %.2f GB to %s", size / 1e9, out)
    for name in (*files, store.HEADER):
        storage.upload(made.path / name, out / name)
    kept = store.cache_folder() / made.fingerprint
    if kept.exists():
        shutil.rmtree(made.path)
    else:
        made.path.rename(kept)
    return TokenStore.open(kept)


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
            tokenizer=options.tokenizer,
            eos=options.eos,
            holdout_every=options.holdout_every,
            form=Format(options.text_key, _unescaped(options.separator), options.encoding_errors),
            include=options.include,
            exclude=options.exclude,
        )
        made = prepare(recipe, out, options.threads, progress=sys.stderr.isatty() and not options.quiet)
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
    if not options.quiet:
        print(_summary(made, out, None if was_there else time.perf_counter() - begin))
    return 0


class _Progress:
    """A bar over the bytes of the sources, with documents, tokens and speed of what is encoded."""

    def __init__(self, sources: Sequence[Source], enabled: bool):
        from rich import progress

        sizes = [source.size for source in sources]
        self._total = None if None in sizes else sum(sizes)  # unknown: the bar only moves
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[counts]}"),
            progress.TimeRemainingColumn(),
            disable=not enabled,
            console=_stderr_console(),
        )
        self._task = self._bar.add_task("", total=self._total, counts="")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """Reading starts, at the first source."""
        self._documents = self._tokens = self._bytes = self._shown = 0
        self._start = time.perf_counter()
        self._bar.reset(self._task, description="reading", total=self._total, counts="")

    def read(self, position: int) -> None:
        """`position` bytes of the sources have been read."""
        if position - self._shown >= 1 << 18:  # an update costs as much as reading a short document
            self._bar.update(self._task, completed=position)
            self._shown = position

    def end(self) -> None:
        """All is read."""
        self._bar.update(self._task, completed=self._total)

    def encoded(self, part: parts.Part) -> None:
        """A part is on disk."""
        self._documents += part.documents
        self._tokens += part.tokens
        self._bytes += part.text_bytes if part.encoded else 0
        speed = self._bytes / 1e6 / (time.perf_counter() - self._start)
        counts = f"{self._documents:,} documents, {self._tokens / 1e6:,.1f} M tokens, {speed:.1f} MB/s"
        self._bar.update(self._task, description="encoding", counts=counts)


def _texts(sources: Sequence[Source], form: Format, bar: _Progress) -> Iterator[str]:
    bar.begin()
    before, reading = 0, Reading()
    for source in sources:
        for document in read_documents(source, form, reading):
            bar.read(before + document.position)
            yield document.text
        before += source.size or 0
    bar.end()


def _trained_bpe(
    recipe: Recipe, size: int, texts: Iterator[str], folder: Path, request: dict[str, Any]
) -> HuggingFaceTokenizer:
    """The BPE of this request: found from an earlier run, or trained on the documents that aren't held out."""
    path = folder / f"bpe-{_digest(request)[:32]}.json"
    if path.exists():
        return HuggingFaceTokenizer(path.read_bytes(), recipe.tokenizer, END_OF_TEXT)
    tokenizer = train_bpe(_training_texts(texts, recipe.holdout_every), size)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(tokenizer.json)
    os.replace(temporary, path)
    return tokenizer


def _training_texts(texts: Iterator[str], holdout_every: int) -> Iterator[str]:
    chars = 0
    for i, text in enumerate(text for text in texts if text and not text.isspace()):
        if i % holdout_every != holdout_every // 2:
            yield text
            chars += len(text)
        if chars >= BPE_TRAINING_CHARS:
            return


def _request(recipe: Recipe, sources: Sequence[Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What was asked for, to compare with a finished store: settings, and names and sizes of the inputs."""
    later = ("source_key", "bad_lines")  # settings that came later are left out where they change nothing
    form = {key: value for key, value in dataclasses.asdict(recipe.form).items() if key not in later}
    form |= {key: value for key in later if (value := getattr(recipe.form, key)) != getattr(Format(), key)}
    return {
        "tokenizer": recipe.tokenizer if tokenizer is None else f"{tokenizer.name} {tokenizer.sha256[:12]}",
        "eos": recipe.eos if tokenizer is None else tokenizer.eos_id,
        "holdout_every": recipe.holdout_every,
        **form,
        "files": len(sources),
        "bytes": sum(source.size or 0 for source in sources),
        "inputs": _digest([[source.name, source.size] for source in sources])[:12],
    }


def _finished(out: Path | epath.Path, request: dict[str, Any]) -> TokenStore:
    """The finished store in `out`, when it is of this request; its header is looked at first."""
    if differing := differing_fields(request, store.read_header(out)["provenance"]["request"]):
        raise StoreError(
            f"{out} holds a finished store of another request ({'; '.join(differing)}); nothing was changed: "
            "choose another --out, or delete that folder first"
        )
    return store.open_store(out)


def _check_folder(out: Path, inputs: Sequence[str]) -> None:
    for entry in inputs:
        if (folder := Path(entry).expanduser()).is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"--out {out} lies in the input {entry}, and would be read as text: put it elsewhere")
    if out.exists() and not out.is_dir():
        raise StoreError(f"--out {out} is a file: give a folder for the store")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in (store.HEADER, store.PARTS, store.LOCK))
    ):
        raise StoreError(f"--out {out} isn't empty and holds no token store: give a new or an empty folder")


def _check_documents(documents: int, empty: int, holdout_every: int) -> None:
    if documents == 0:
        raise InputError(f"no text in the input: 0 documents ({empty} empty ones)")
    if documents < 2:
        raise InputError("1 document: a store needs at least 2, one of them held out; --separator cuts a file into documents")
    if documents <= holdout_every // 2:
        fitting = min(holdout_every, 2 * documents - 1)
        raise InputError(
            f"{documents} documents are too few to hold out every {holdout_every}th: "
            f"use --holdout_every={fitting} or less, or cut files into documents with --separator"
        )


def _stderr_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _summary(made: TokenStore, out: epath.Path, seconds: float | None) -> str:
    lines = [f"{out}: " + ("is there already, nothing to do" if seconds is None else f"made in {seconds:.1f} s")]
    for split, facts in made.header["splits"].items():
        size = f"{facts['bytes'] / 1e6:,.2f} MB of text"
        lines.append(f"  {split:10} {facts['tokens']:>15,} tokens {facts['documents']:>11,} documents {size:>20}")
    empty = made.header["provenance"]["empty_documents"]
    lines.append(f"  tokenizer {made.header['tokenizer']['name']}, {made.vocab_size:,} ids as {made.header['dtype']}")
    lines.append(f"  {empty:,} empty documents left out; fingerprint {made.fingerprint[:16]}")
    return "\n".join(lines)


def _unescaped(separator: str | None) -> str | None:
    return separator and separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gqa_jax.data.prepare",
        description="Turn text into a token store that training reads (data.store=OUT).",
        epilog="A run that was stopped goes on when the same command is given again. Example:\n"
        "  python -m gqa_jax.data.prepare --out stores/web --tokenizer gpt2 web/*.jsonl.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder (its files, sorted), sotu (the embedded corpus) or hf:NAME[@CONFIG][:SPLIT]. Files: .jsonl and "
        ".json (one object a line), .parquet, anything else as plain text; .gz, .zst and .xz after the name",
    )
    parser.add_argument("--out", required=True, help="folder of the store, local or gs://BUCKET/FOLDER")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2 (default), bytes, bpe:N (trained on the input, N entries), hub:NAME[@REVISION], "
        "or a Hugging Face tokenizer.json",
    )
    parser.add_argument(
        "--eos", metavar="TOKEN", help="token that ends a document in a Hugging Face tokenizer (default: found)"
    )
    parser.add_argument("--text_key", default="text", metavar="KEY", help="field or column that holds the text (default: text)")
    parser.add_argument("--separator", metavar="TEXT", help=r"cuts plain files into documents, as in '\n\n' or '<|endoftext|>'")
    parser.add_argument(
        "--holdout_every", type=int, default=20, metavar="N", help="hold out one document of N for evaluation (default: 20)"
    )
    parser.add_argument("--include", default="*", metavar="PATTERN", help="only these files of folders, as in '*.txt'")
    parser.add_argument("--exclude", metavar="PATTERN", help="not these files of folders")
    parser.add_argument(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are no UTF-8: an error (strict, default), or replacement characters",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the tokenizer (default: every CPU)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
