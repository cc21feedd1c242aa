"""Inputs of `prepare` to files, in an order that never changes: everything that can be reached is found once, or named.

Links are followed, to folders too. A folder or file that is reached by several names is taken once: by the name in the input
that came first, and within one input by a name whose suffix says what it is, then by one that is no link. So a folder of the
Hugging Face hub, whose snapshots are links into its blobs, gives each file once and by its own name.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gqa_jax import errors
from gqa_jax.data import corpus

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # suffix -> what stands between columns
DATA_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet")
NAMED_IN_AN_ERROR = 5  # of many files with one fault

_BESIDE_DATA = re.compile(  # names in small letters, whole: notice-1.txt and readme_corpus.txt may be data
    r"(readme|licen[cs]es?|copying|notices?)(\.(md|txt|rst|html))?|licen[cs]e-[a-z]+(-[0-9.]+)?|dataset_infos?\.json"
)
_HUB_CACHE = {"blobs", "refs", "snapshots"}

Patterns = str | Sequence[str]


class InputError(ValueError):
    """An input that can't be read. The message names the file, the line or row where there is one, and what to do."""


@dataclass(frozen=True)
class Source:
    """One file or named corpus."""

    name: str  # of the file relative to the input that gave it, or the input itself: the same on every machine
    path: Path | None  # None: a named corpus
    size: int | None  # bytes as stored; None: not known before reading
    origin: str  # name of the input: the end of its path that no other input shares, the same on every machine
    in_folder: bool = False  # the input is a folder, and `name` is relative to it

    @property
    def leave(self) -> str:
        """How to leave it out, for messages."""
        return _leave(self.name if self.in_folder else "")


class Found(NamedTuple):
    """What inputs stand for, in order, and what was seen and left out: reason -> paths."""

    sources: list[Source]
    left_out: dict[str, list[str]]


def find_sources(inputs: Sequence[str | os.PathLike], include: Patterns = "*", exclude: Patterns | None = None) -> Found:
    """The sources that `inputs` stand for, in their order; files of a folder sorted by path.

    `include` and `exclude` are shell patterns, one or several, for the paths of files in folders, relative to the folder.
    Raises InputError for an input that is missing, a folder without such files, and, naming all, for what can't be read:
    links to nothing, files and folders without permission, pipes, devices.
    """
    entries = [os.fspath(entry) for entry in inputs]
    if not entries:
        raise InputError("no input: give files, folders, sotu, or hf:NAME")
    search = _Search(*((one,) if isinstance(one, str) else tuple(one) for one in (include, exclude or ())))
    for index, (entry, origin) in enumerate(zip(entries, _origins(entries), strict=True)):
        search.index, search.origin = index, origin
        if not _is_named(entry):
            search.look_at(entry)
        elif entry in entries[:index]:
            search.leave_out(f"the same input as {entry}", entry)
        else:
            size = corpus.SOTU_BYTES if entry == "sotu" else None
            search.files.append(_File(index, (entry,), (index, entry), False, Source(entry, None, size, origin)))
    search.check()
    return Found(search.chosen(), {why: sorted(paths) for why, paths in search.left_out.items()})


def suffixes(name: str) -> tuple[str, list[str]]:
    """What a name says of its content, as in ("jsonl", ["gzip"]) of a.jsonl.gz: suffix in small letters, and its packings."""
    parts, packings = [f".{part}" for part in name.lower().split(".")[1:]], []
    while parts and parts[-1] in COMPRESSIONS:
        packings.append(COMPRESSIONS[parts.pop()])
    return parts[-1] if parts else "", packings


def shown(path: str | os.PathLike) -> str:
    """A path, or another text, on one line of valid Unicode: what can't be printed is escaped."""
    text = os.fspath(path)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def few(names: Sequence[str], separator: str = ", ", most: int = NAMED_IN_AN_ERROR) -> str:
    """The first names, cut where they are long, and how many more there are."""
    begin = [name if len(name) <= 300 else f"{name[:300]}..." for name in names[:most]]
    return separator.join(begin) + (f"{separator}and {len(names) - most:,} more" if len(names) > most else "")


def reason(error: BaseException) -> str:
    """The words of an error on one line; where it is the system's, those of the system."""
    return shown((getattr(error, "strerror", None) or str(error)).strip()) or type(error).__name__


class _File(NamedTuple):
    """A regular file that was found."""

    index: int  # of its input
    parts: tuple[str, ...]  # of its name
    identity: tuple  # device and inode, the same for every name of one file
    is_link: bool
    source: Source

    def preference(self) -> tuple:
        """The smallest of the names of one file is taken."""
        suffix, packings = suffixes(self.parts[-1])
        known = bool(packings) or suffix in (*DATA_SUFFIXES, ".txt", ".md")
        return self.index, 0 if known else 1 if suffix else 2, self.is_link, self.parts


@dataclass
class _Search:
    """A walk through all inputs, one after the other."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    index: int = 0  # of the input that is looked at
    origin: str = ""  # its name
    left_out: dict[str, list[str]] = field(default_factory=dict)
    files: list[_File] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path and why; how to leave it out
    empty: list[str] = field(default_factory=list)  # folders that gave nothing
    folders: dict[tuple[int, ...], str] = field(default_factory=dict)  # identity -> path by which it was read

    def refuse(self, path: str | os.PathLike, why: str, name: str = "") -> None:
        """Notes what can't be read; `name` is that of what lies in a folder."""
        self.unreadable.append((f"{shown(path)}: {why}", _leave(name)))

    def leave_out(self, why: str, path: str | os.PathLike) -> None:
        self.left_out.setdefault(why, []).append(shown(path))

    def look_at(self, entry: str) -> None:
        """Finds the files of one input."""
        if not entry:
            raise InputError("an input is empty: give a file or folder; . is the folder you are in")
        try:
            path = Path(entry).expanduser()
            found = path.stat()
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~nobody
            if not os.path.islink(entry) and not isinstance(error, PermissionError):
                raise InputError(
                    f"input {shown(entry)}: no such file or folder{_neighbour(Path(entry))}; named inputs are sotu and hf:NAME"
                ) from None
            self.refuse(entry, _dangling(entry) if os.path.islink(entry) else "no permission to reach it")
            return
        if not stat.S_ISDIR(found.st_mode):
            self._file((path.name,), path, found, path.is_symlink(), in_folder=False)
        elif self._is_new(path, found):
            before = len(self.files), len(self.unreadable)
            self._folder(path)
            self._leave_out_readmes(before[0])
            if before == (len(self.files), len(self.unreadable)):
                self.empty.append(shown(entry))

    def check(self) -> None:
        """Raises InputError when something can't be read, or a folder had nothing."""
        if self.unreadable:
            sentences, (leave, *others) = zip(*self.unreadable, strict=True)
            if others:
                leave = "leave each out (in a folder: --exclude=PATTERN; else: take it off the command)"
            several = f"{len(sentences):,} files or folders can't be read: " if others else ""
            raise InputError(
                f"{several}{few(sentences, '; ')}. Repair that (a link to nothing: delete it; no permission: "
                f"chmod -R u+rX), or {leave}"
            )
        if self.empty:
            why = "".join(f"; {few(paths)}: {reason}" for reason, paths in self.left_out.items())
            include, exclude = (", ".join(map(repr, patterns)) or "nothing" for patterns in (self.include, self.exclude))
            raise InputError(f"input {self.empty[0]}: no file in this folder (include {include}, exclude {exclude}){why}")

    def chosen(self) -> list[Source]:
        """Each file once, sorted by input and path."""
        best: dict[tuple, _File] = {}
        for file in sorted(self.files, key=_File.preference):
            if (other := best.setdefault(file.identity, file)) is not file:
                self.leave_out(f"the same file as {shown(other.source.path)}", file.source.path)
        return [file.source for file in sorted(best.values(), key=lambda file: (file.index, file.parts))]

    def _is_new(self, path: Path, found: os.stat_result) -> bool:
        """Whether a folder is reached for the first time; then it is known by this path."""
        if other := self.folders.get((found.st_dev, found.st_ino)):
            self.leave_out(f"the same folder as {other}", path)
            return False
        self.folders[found.st_dev, found.st_ino] = shown(path)
        return True

    def _folder(self, root: Path) -> None:
        # What is really there comes first and links to folders later, so that a link is never taken for the folder itself.
        folders, links = [(root, ())], []
        while folders or links:
            if not folders:
                links.sort(key=lambda link: link[1], reverse=True)
                path, parts, found = links.pop()
                if not self._is_new(path, found):
                    continue
                folders.append((path, parts))
            folder, parts = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not self._is_left_out(parts, folder, is_folder=True):
                    self.refuse(folder, _refusal(error), "/".join(parts))
                continue
            is_hub_cache = {entry.name for entry in entries} >= _HUB_CACHE
            for entry in entries:
                path, own = folder / entry.name, (*parts, entry.name)
                if entry.name.startswith("."):
                    self.leave_out("hidden", f"{path}/" if entry.is_dir(follow_symlinks=False) else path)
                elif is_hub_cache and entry.name != "snapshots":
                    self.leave_out("in a cache of the Hugging Face hub, whose snapshots name its files", path)
                elif (found := self._stat(entry, own, path)) is None:
                    continue
                elif not stat.S_ISDIR(found.st_mode):
                    if not self._is_left_out(own, path):
                        self._file(own, path, found, entry.is_symlink(), in_folder=True)
                elif not entry.is_symlink():
                    if self._is_new(path, found):  # else a mount of a folder in itself
                        folders.append((path, own))
                elif _is_above(path):
                    self.leave_out("a link to a folder that it lies in", path)
                else:
                    links.append((path, own, found))

    def _stat(self, entry: os.DirEntry, parts: tuple[str, ...], path: Path) -> os.stat_result | None:
        """What an entry of a folder, or the target of a link, is; None where that can't be told."""
        try:
            return entry.stat()
        except OSError as error:
            if not self._is_left_out(parts, path):
                is_dangling = entry.is_symlink() and not isinstance(error, PermissionError)
                self.refuse(path, _dangling(path) if is_dangling else _refusal(error), "/".join(parts))
            return None

    def _file(self, parts: tuple[str, ...], path: Path, found: os.stat_result, is_link: bool, in_folder: bool) -> None:
        name = "/".join(parts)
        if not stat.S_ISREG(found.st_mode):
            why = f"{_special(found.st_mode)}, which can't be read twice: write it to a file"
            self.refuse(path, why, name if in_folder else "")
        elif not os.access(path, os.R_OK):
            self.refuse(path, "no permission to read it", name if in_folder else "")
        else:
            # A file system without inodes has 0: then every name is a file of its own.
            identity = (found.st_dev, found.st_ino) if found.st_ino else (self.index, len(self.files), name)
            source = Source(name, path, found.st_size, self.origin, in_folder)
            self.files.append(_File(self.index, parts, identity, is_link, source))

    def _is_left_out(self, parts: tuple[str, ...], path: Path, is_folder: bool = False) -> bool:
        """Whether the patterns leave a file out, or a folder that can't be looked into; it is noted then."""
        names = ["/".join(parts), "/".join(parts) + "/"][: 1 + is_folder]
        if pattern := next((p for p in self.exclude if any(fnmatch.fnmatch(name, p) for name in names)), None):
            self.leave_out(f"left out by --exclude {shown(pattern)}", path)
            return True
        if not is_folder and not any(fnmatch.fnmatch(names[0], pattern) for pattern in self.include):
            self.leave_out(f"not selected by --include {shown(' '.join(self.include))}", path)
            return True
        return False

    def _leave_out_readmes(self, first: int) -> None:
        """Leaves out what describes data, among the files from `first` on, in folders that hold data, themselves or below."""
        files = self.files[first:]
        describing = [file for file in files if _describes_data(file.parts[-1])]
        data = {
            file.parts[:depth]
            for file in files
            if suffixes(file.parts[-1])[0] in DATA_SUFFIXES and not _describes_data(file.parts[-1])
            for depth in range(len(file.parts))
        }
        aside = {file.identity for file in describing if file.parts[:-1] in data}  # by whatever name
        for file in files:
            if file.identity in aside:
                self.leave_out("README, licence or description beside data", file.source.path)
        self.files[first:] = [file for file in files if file.identity not in aside]


def _leave(name: str) -> str:
    """How to leave out a file by its name in a folder; "": it is an argument itself."""
    if not name:
        return "take it off the command"
    pattern = "".join(c if c.isprintable() else "?" for c in glob.escape(name))  # ? stands for any character
    return f"leave it out (--exclude={shlex.quote(pattern)})"


def _is_named(entry: str) -> bool:
    return entry == "sotu" or entry.startswith("hf:")


def _describes_data(name: str) -> bool:
    """Whether a file beside data is about them, by its name; README.jsonl is data itself."""
    is_data = suffixes(name)[0] in DATA_SUFFIXES and not name.lower().startswith("dataset_info")
    return not is_data and _BESIDE_DATA.fullmatch(name.lower()) is not None


def _is_above(link: Path) -> bool:
    """Whether a link leads to a folder that it lies in itself."""
    target, holder = os.path.realpath(link), os.path.realpath(link.parent)
    return f"{holder}/".startswith(f"{target.rstrip('/')}/")


def _dangling(link: str | os.PathLike) -> str:
    return f"a link to {shown(os.readlink(link))}, which leads to nothing"


def _refusal(error: OSError) -> str:
    return "no permission to read it" if isinstance(error, PermissionError) else reason(error)


def _special(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    return next((word for test, word in kinds.items() if test(mode)), "no regular file")


def _origins(entries: Sequence[str]) -> list[str]:
    """Names of the inputs as sources: the shortest end of each path, in whole parts, that no other input shares."""
    parts = {e: Path(os.path.abspath(os.path.expanduser(e))).parts for e in entries if not _is_named(e)}
    ends: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for own in parts.values():
        for length in range(1, len(own) + 1):
            ends.setdefault(own[-length:], set()).add(own)

    def name(own: tuple[str, ...]) -> str:
        length = next((n for n in range(1, len(own)) if len(ends[own[-n:]]) == 1), len(own))
        return shown(os.path.join(*own[-length:])) if own[1:] else own[0]

    return [name(parts[entry]) if entry in parts else entry for entry in entries]


def _neighbour(path: Path) -> str:
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    close = errors.close(path.name, names)
    return "" if close is None else f", did you mean {shown(path.parent / close)}?"
