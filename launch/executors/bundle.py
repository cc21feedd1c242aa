"""The code of a run in one file named by its content, for hosts that have no checkout.

A bundle is `<sha256>.tar.gz`: gqa_jax, launch, configs, what `pip install` needs, and COMMIT, the commit that they are of. The
same files of the same commit give the same bytes (with one version of zlib), so a bundle is put somewhere once. Cluster files
are left out: hosts don't need them, and they may hold keys.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from gqa_jax import storage
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("gqa_jax", "launch", "configs")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE")  # the last three: setuptools reads them
LEFT_OUT = ("configs/clusters/",)
COMMIT = "COMMIT"
NEEDED = (COMMIT, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "configs/cell.py", "gqa_jax/train.py")

_NAME = re.compile(r"([0-9a-f]{64})\.tar\.gz")
_DATA = re.compile(r"\w[\w.]*\.xz")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle at `path`, local or on gs://, whose bytes have this hash."""

    path: epath.Path
    sha256: str  # hexadecimal; the name of the file begins with it


def make(folder: os.PathLike | str, content: bytes | None = None) -> Bundle:
    """Puts a bundle of this code into a folder, local or on gs://, unless it is there.

    Args:
      content: what `pack` gave; None: packed now.
    Raises:
      ConfigError: something that a run needs is missing.
    """
    content = pack() if content is None else content
    made = named(folder, content)
    check_content(made, content)
    _write(made, content)
    return made


def named(folder: os.PathLike | str, content: bytes) -> Bundle:
    """What the bundle of these bytes is called in a folder. Writes nothing."""
    sha256 = hashlib.sha256(content).hexdigest()
    return Bundle(storage.path(folder) / f"{sha256}.tar.gz", sha256)


def find(path: os.PathLike | str) -> Bundle:
    """The bundle at a path that somebody gave. Raises ConfigError when its name is not that of one. Reads nothing."""
    match = _NAME.fullmatch(os.fspath(path).rpartition("/")[2])
    if match is None:
        raise ConfigError(
            f"bundle = {os.fspath(path)!r}: the name must be <sha256>.tar.gz, as launch.executors.bundle.make gives it"
        )
    return Bundle(storage.path(path), match[1])


def check(bundle: Bundle) -> None:
    """Raises ConfigError unless it is there, its bytes have the hash of its name, and nothing that a run needs is missing."""
    check_content(bundle, _read(bundle))


def put(bundle: Bundle, folder: os.PathLike | str) -> Bundle:
    """Copies a bundle, checked, into another folder, local or on gs://, unless it is there. Raises as `check`."""
    return make(folder, _read(bundle))


def pack(root: Path = REPOSITORY, commit: str | None = None) -> bytes:
    """The bytes of a bundle of the code below `root`: what git tracks or would track, all files where there is no git.

    Args:
      commit: what COMMIT says; None: the commit of this code, `+` when files differ from it, nothing where it is not known.
    """
    contents = {name: (root / name).read_bytes() for name in _names(root)}
    contents[COMMIT] = f"{commit or run_folder.commit() or ''}\n".encode()
    return _tar(contents)


def check_content(bundle: Bundle, content: bytes) -> None:
    """As `check`, for bytes that were read, or are to be written."""
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != bundle.sha256:
        raise ConfigError(f"{bundle.path} is damaged: its SHA-256 is {sha256}: remove it, or give a whole one")
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            members = tar.getmembers()
            strange = [m.name for m in members if not m.isfile() or m.name.startswith("/") or ".." in m.name.split("/")]
            if strange:
                raise ConfigError(f"{bundle.path}: {strange[0]} is not a plain file below the bundle: make another one")
            contents = {m.name: tar.extractfile(m).read() for m in members}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{bundle.path} is no bundle ({error}): make one with launch.executors.bundle.make") from error
    if missing := sorted(needed(contents) - contents.keys()):
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(
            f"{bundle.path} lacks {some}: make it in a whole checkout (git clone), whose .gitignore does not name these"
        )


def _write(bundle: Bundle, content: bytes) -> None:
    there = storage.read_bytes(bundle.path)  # a few MB; another file of that name would stop every host
    if there == content:
        return
    if not storage.is_remote(bundle.path):
        Path(bundle.path).parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(bundle.path, content)


def _read(bundle: Bundle) -> bytes:
    try:
        content = storage.read_bytes(bundle.path)
    except OSError as error:
        raise ConfigError(f"bundle {bundle.path} can't be read: {storage.explain(error)}") from error
    if content is None:
        raise ConfigError(
            f"bundle {bundle.path} is not there: make one with launch.executors.bundle.make, or leave `bundle` out"
        )
    return content


def _names(root: Path) -> list[str]:
    """Files of a bundle below `root`, sorted, with `/`."""
    names = _of_git(root)
    if names is None:
        walked = (path for folder in FOLDERS for path in (root / folder).rglob("*"))
        names = [path.relative_to(root).as_posix() for path in (*walked, *(root / name for name in FILES))]
        names = [name for name in names if "__pycache__" not in name and "/." not in name]
    return sorted({name for name in names if (root / name).is_file() and not name.startswith(LEFT_OUT)})


def _of_git(root: Path) -> list[str] | None:
    """Files that git tracks, or does not ignore; None where `root` is no checkout of this code (an installed package)."""
    git = ["git", "-C", os.fspath(root), "ls-files", "-z"]
    try:
        tracked = subprocess.run([*git, "--", "gqa_jax/train.py"], capture_output=True, check=True).stdout
        if not tracked:
            return None
        listed = [*git, "--cached", "--others", "--exclude-standard", "--", *FOLDERS, *FILES]
        found = subprocess.run(listed, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in found.decode().split("\0") if name]


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


def needed(contents: Mapping[str, bytes]) -> set[str]:
    """Files that a run needs: NEEDED, modules of gqa_jax that others of them import, data that they name."""
    names = set(NEEDED)
    trees = {name: ast.parse(text) for name, text in contents.items() if name.startswith("gqa_jax/") and name.endswith(".py")}
    packages = {name.rpartition("/")[0] for name in trees}

    def need(module: str) -> None:
        parts = module.split(".")
        for n in range(1, len(parts) + 1):  # the packages that it is in, too
            path = "/".join(parts[:n])
            names.add(f"{path}/__init__.py" if path in packages else f"{path}.py")

    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "gqa_jax":
                        need(alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gqa_jax":
                need(node.module)
                if (package := node.module.replace(".", "/")) in packages:
                    bound = _bound(trees.get(f"{package}/__init__.py", ast.Module([], [])), node.module)
                    for alias in node.names:
                        if alias.name not in bound:
                            need(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DATA.fullmatch(node.value):
                names.add(f"{name.rpartition('/')[0]}/{node.value}")  # data lies beside the module that names it
    return names


def _bound(tree: ast.AST, package: str) -> set[str]:
    """Names that the text of a package gives to other things than its own modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module != package:
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
