"""The files of this code that hosts get: those that git tracks, as they are now, new modules beside them, and no others.

A file is named by its path below the root of the code, with `/`. Left out, wherever they come from, are cluster files and names
with a part that begins with a dot, like configs/.env: they may hold keys. What git tracks under other names is packed: a key
does not belong there.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted
from launch.cells import REPOSITORY

FOLDERS = ("gqa_jax", "launch", "configs")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE")  # the last three: setuptools reads them
LEFT_OUT = "configs/clusters/"  # hosts don't need them
MOST_BYTES = 20_000_000  # of all contents, before they are compressed; this code has 5 MB
NAMED = 10  # files that a sentence names


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the files that hosts get differ from the commit that is checked out."""

    commit: str
    modified: Sequence[str]  # names of tracked files; also of those that git is told to forget
    new: Sequence[str]  # names of modules that git neither tracks nor ignores

    def said(self) -> str:
        """In a sentence that names them."""
        parts = []
        if self.modified:
            count = counted(len(self.modified), "file")
            parts.append(f"differs from commit {self.commit[:10]} in {count}: {_named(self.modified)}")
        if self.new:
            parts.append(f"has {counted(len(self.new), 'file')} that git does not track: {_named(self.new)}")
        return f"the bundle {'; it '.join(parts)}"


def contents(root: Path = REPOSITORY) -> dict[str, bytes]:
    """What the files hold, by name.

    Where there is no git, as in an installed package: modules and package data of pyproject.toml. Links to folders are not
    followed.

    Raises ConfigError: git can't read its checkout; a tracked file is not there; a link that leads to no file of the code; more
    than MOST_BYTES.
    """
    root = root.resolve()
    listed = _listed(root)
    known = set().union(*listed) if listed else _walked(root)
    names = sorted(filter(_is_of_code, known))
    if gone := [name for name in names if not os.path.lexists(root / name)]:
        raise ConfigError(f"{root} lacks {_named(gone)}, which git tracks: `git restore` it, or `git rm` it")
    paths = {name: _followed(root, name, known) for name in names}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ConfigError(
            f"the code in {root} has {total / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:.0f} MB go to hosts; its largest files"
            f" are {', '.join(f'{name} ({sizes[name] / 1e6:.1f} MB)' for name in largest)}: keep data outside of "
            f"{', '.join(FOLDERS)} (data.store may be on gs://), and `git rm --cached` what git tracks of it"
        )
    return {name: path.read_bytes() for name, path in paths.items()}


def changes(root: Path = REPOSITORY) -> Changes | None:
    """What is modified and new of the files that hosts get. None: nothing, or there is no git.

    Raises ConfigError: git can't read its checkout.
    """
    root = root.resolve()
    if (listed := _listed(root)) is None:
        return None
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if head.returncode:
        return Changes("(none yet)", sorted(filter(_is_of_code, listed[0])), sorted(listed[1]))
    same_modes = ("-c", "core.fileMode=false")  # contents alone are packed
    where = ("--relative", "-z", "HEAD", "--", *FOLDERS, *FILES)
    modified = filter(_may_leave, _split(_git(root, *same_modes, "diff", "--name-only", "--no-renames", *where)))
    found = Changes(head.stdout.decode().strip(), sorted(modified), sorted(listed[1]))
    return found if found.modified or found.new else None


def _listed(root: Path) -> tuple[set[str], set[str]] | None:
    """Files of the checkout at `root` that git tracks, and new modules in FOLDERS. None: this code is in no checkout."""
    tracked = _git(root, "ls-files", "-z")
    if tracked.returncode:
        if any((folder / ".git").exists() for folder in (root, *root.parents)):
            words = " ".join(tracked.stderr.decode(errors="replace").split())
            raise ConfigError(f"which files of {root} are the code's is not known, for git can't say it ({words}): mend that")
        return None
    if "gqa_jax/train.py" not in _split(tracked):  # an installed package, below another project's checkout
        return None
    others = _split(_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS))
    new = {name for name in others if name.endswith(".py")}
    return set(filter(_may_leave, _split(tracked))), set(filter(_may_leave, new))


def _walked(root: Path) -> set[str]:
    """The files of a package at `root`, where there is no git."""
    project = root / "pyproject.toml"
    data = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"] if project.exists() else {}
    found = [root / name for name in FILES if (root / name).exists()]
    found += [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    found += [
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (root / package.replace(".", "/")).glob(pattern)
    ]
    names = {path.relative_to(root).as_posix() for path in found if not path.is_dir()}
    return set(filter(_may_leave, names))


def _is_of_code(name: str) -> bool:
    return name in FILES or name.partition("/")[0] in FOLDERS


def _may_leave(name: str) -> bool:
    return not name.startswith(LEFT_OUT) and not any(part.startswith(".") for part in name.split("/"))


def _followed(root: Path, name: str, known: set[str]) -> Path:
    """Where the content of a file is. Raises ConfigError for a link that leads to none of the files `known`."""
    path = Path(os.path.realpath(root / name))
    if path.is_file() and path.is_relative_to(root) and path.relative_to(root).as_posix() in known:
        return path
    why = "is none of the code's files" if path.exists() else "is not there"
    raise ConfigError(f"{name} is a link to {path}, which {why}: put a copy of the file in its place, or remove the link")


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    argv = ["git", "-C", os.fspath(root), *arguments]
    try:
        return subprocess.run(argv, capture_output=True)
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, b"", f"git: {error.strerror}".encode())


def _split(done: subprocess.CompletedProcess[bytes]) -> set[str]:
    return {name for name in os.fsdecode(done.stdout).split("\0") if name}


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
