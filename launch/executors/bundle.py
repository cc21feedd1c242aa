"""The code of a run in one file named by its content, for hosts that have no checkout.

A bundle is `<sha256>.tar.gz`: the files of `launch.executors.checkout`, and COMMIT, the commit that they are of. The same files
of the same commit give the same bytes (with one version of zlib), so a bundle is put somewhere once.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from etils import epath

from gqa_jax import storage
from gqa_jax.data import catalog
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder
from launch.cells import REPOSITORY, Cell
from launch.executors import base, checkout

COMMIT = "COMMIT"
# uv for hosts whose image has none: this version, and of its files on PyPI these, for Linux on x86-64 and on ARM.
UV = (
    "uv==0.13.9"
    " --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19"
    " --hash=sha256:5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe"
)
# Reads UV; --target=FOLDER comes after it, and the program is then FOLDER/bin/uv.
INSTALL_UV = (
    *("python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
    *("--require-hashes", "--upgrade", "--requirement=/dev/stdin"),
)
NEEDED = (COMMIT, *checkout.FILES, "configs/cell.py", "gqa_jax/train.py")

log = logging.getLogger(__name__)
_NAME = re.compile(r"([0-9a-f]{64})\.tar\.gz")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle at `path`, local or on gs://, whose bytes have this hash."""

    path: epath.Path
    sha256: str  # hexadecimal; the name of the file begins with it


def make(folder: os.PathLike | str, content: bytes | None = None) -> Bundle:
    """Puts a bundle (None: of this code) into a folder, local or on gs://, unless it is there. Raises as `check`."""
    content = pack() if content is None else content
    made = named(folder, content)
    check(made, content)
    if storage.read_bytes(made.path) != content:  # a few MB; another file of that name would stop every host
        if not storage.is_remote(made.path):
            Path(made.path).parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(made.path, content)
    return made


def named(folder: os.PathLike | str, content: bytes) -> Bundle:
    """What the bundle of these bytes is called in a folder. Writes nothing."""
    sha256 = hashlib.sha256(content).hexdigest()
    return Bundle(storage.path(folder) / f"{sha256}.tar.gz", sha256)


def find(path: os.PathLike | str) -> Bundle:
    """The bundle at a path that somebody gave. Raises ConfigError when its name is not that of one. Reads nothing."""
    return Bundle(storage.path(path), _hash_in(path))


def pack(root: Path = REPOSITORY, commit: str | None = None) -> bytes:
    """The bytes of a bundle of the code below `root`. Raises ConfigError as `checkout.contents`.

    Args:
      commit: what COMMIT says; None: the commit of this code, `+` when files differ from it, nothing where it is not known.
    """
    contents = checkout.contents(root)
    contents[COMMIT] = f"{commit or run_folder.commit() or ''}\n".encode()
    return _tar(contents)


def check(bundle: Bundle, content: bytes | None = None) -> None:
    """Raises ConfigError unless its bytes (None: as they are read) have the hash of its name and all that every run needs."""
    content = read(bundle) if content is None else content
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != bundle.sha256:
        raise ConfigError(f"{bundle.path} is damaged: its SHA-256 is {sha256}: remove it, or give a whole one")
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{bundle.path} is no bundle ({error}): make one with launch.executors.bundle.make") from error
    for member in members:
        if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
            raise ConfigError(f"{bundle.path}: {member.name} is not a plain file below the bundle: make another one")
    if missing := sorted({*NEEDED} - {member.name for member in members}):
        raise ConfigError(f"{bundle.path} lacks {', '.join(missing)}: make it in a whole checkout (git clone)")


def read(bundle: Bundle) -> bytes:
    """Its bytes. Raises ConfigError where it can't be read."""
    try:
        content = storage.read_bytes(bundle.path)
    except OSError as error:
        raise ConfigError(f"bundle {bundle.path} can't be read: {storage.explain(error)}") from error
    if content is None:
        raise ConfigError(
            f"bundle {bundle.path} is not there: make one with launch.executors.bundle.make, or leave `bundle` out"
        )
    return content


def _hash_in(path: os.PathLike | str) -> str:
    """The SHA-256 that the name of a bundle says. Raises ConfigError when it says none."""
    if (match := _NAME.fullmatch(os.fspath(path).rpartition("/")[2])) is None:
        raise ConfigError(
            f"bundle = {os.fspath(path)!r}: the name must be <sha256>.tar.gz, as launch.executors.bundle.make gives it"
        )
    return match[1]


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """A .tar.gz that depends on names and contents alone."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)  # its defaults: mode 0644, owner 0, time 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@dataclasses.dataclass(frozen=True)
class Options(base.Options):
    """Of engines whose machines get the code as a bundle."""

    forms: ClassVar = {"setup": base.BASH, "python": base.LINE}

    setup: list = dataclasses.field(default_factory=list)  # lines of bash, run on each machine before training
    python: str | None = None  # of the machines' image, with all packages; None: an environment is made, by uv
    bundle: str | None = None  # <sha256>.tar.gz of the code, a file or on gs://; None: made of this checkout
    shared_root: bool = False  # the grid's folder is no gs://, but a file system that all machines mount at the same place

    def __post_init__(self):
        super().__post_init__()
        if self.bundle is not None:
            _hash_in(self.bundle)


class Executor(base.Executor):
    """Cells on machines that see no disk of this one, and get the code as a bundle."""

    machines: ClassVar[str]  # what they are called

    def logs(self, cell: str) -> list[epath.Path]:
        folder = epath.Path(self.layout.cell(cell)) / "logs"
        return [folder / name for name in storage.names(folder) if name.endswith(".txt")]

    def prepare(self) -> None:
        """Puts the bundle to code/ of the grid's folder. Raises ConfigError when that can't be written."""
        storage.check_writable(self.layout.root)
        make(self.bundle.path.parent, self._packed or read(find(self.options.bundle)))

    @functools.cached_property
    def _packed(self) -> bytes | None:
        """The code, read once, so that all cells of this launcher run the same; None: an option names it.

        Warns of what is in no commit.
        """
        if self.options.bundle is not None:
            return None
        packed = pack()
        if (found := checkout.changes()) is not None:
            log.warning(found.said())
        return packed

    @functools.cached_property
    def bundle(self) -> Bundle:
        """Where the machines find the code."""
        folder = storage.path(self.layout.root) / "code"
        if self._packed is not None:
            return named(folder, self._packed)
        sha256 = _hash_in(self.options.bundle)
        return Bundle(folder / f"{sha256}.tar.gz", sha256)

    def check_bundle(self) -> None:
        """Raises ConfigError for one that can't be used."""
        check(self.bundle if self.options.bundle is None else find(self.options.bundle), self._packed)

    def check_root(self) -> None:
        """Raises ConfigError for a grid's folder that the machines don't see."""
        root = os.fspath(self.layout.root)
        if not storage.is_remote(root) and not (self.options.shared_root and os.path.isabs(root)):
            raise ConfigError(
                f"--root {root}: {self.machines} don't see it: use gs://BUCKET/FOLDER, or, where a file system is mounted at "
                "the same path on all of them, its absolute path and shared_root = true"
            )

    def check_inputs(self, cell: Cell) -> None:
        """Raises ConfigError for a token store, or parameters to start from, that the machines don't see."""
        for field, name in cell.inputs.items():
            if name not in catalog.BUILT_IN and not storage.is_remote(name) and not self.options.shared_root:
                built_in = ", or use a built-in one" if field == "data.store" else ""
                raise ConfigError(
                    f"{field} = {name!r} of {cell.name} is on this machine, and {self.machines} don't see it: copy it to gs://"
                    f"{built_in}"
                )
