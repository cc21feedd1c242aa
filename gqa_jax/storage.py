"""Files on local disk or on gs:// (`gqa_jax.gcs`), by the same functions. `path` makes an `etils.epath.Path` of either."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import posixpath
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax import errors
from gqa_jax.errors import ConfigError

log = logging.getLogger(__name__)

# What is wrong with a path itself, and not with the storage that it is on.
_ODD = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)
MOST_BYTES, DEEPEST = 1 << 24, 64  # of a JSON file that we have written


def path(text: os.PathLike | str) -> epath.Path:
    """A path on local disk, `~` expanded and otherwise as it was given, or on gs://.

    Raises ConfigError for gs:// without gcsfs or without a bucket, and for any other `scheme://`.
    """
    if isinstance(text, epath.Path) and is_remote(text):  # was made here, or is not to be read (`launch.reach`): asks nobody
        return text
    text = os.fspath(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(text).expanduser() if text.startswith("~") else epath.Path(text)
    if scheme != "gs":
        raise ConfigError(f"{text}: {scheme}:// is not supported: use a local folder or gs://BUCKET/FOLDER")
    if not rest.strip("/"):
        raise ConfigError(f"{text}: the bucket is missing: gs://BUCKET/FOLDER")
    _gcs().system()
    return epath.Path(text)


def cache(kind: str) -> Path:
    """Folder of what this machine keeps for later: $GQA_JAX_CACHE/KIND, else ~/.cache/gqa_jax/KIND. May not be there yet."""
    return Path(os.environ.get("GQA_JAX_CACHE") or Path.home() / ".cache" / "gqa_jax").expanduser() / kind


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is on gs://."""
    return os.fspath(path).startswith("gs://")


def join(folder: os.PathLike | str, relative: str) -> epath.Path:
    """`relative` as seen from `folder`; also `../NAME`, which gs:// knows nothing of, or a path of its own.

    Raises ConfigError when it leads out of the bucket.
    """
    if "://" in relative or relative.startswith(("/", "~")):
        return path(relative)
    if not is_remote(folder):
        return path(folder) / relative
    bucket, _, inside = os.fspath(folder).removeprefix("gs://").partition("/")
    joined = posixpath.normpath(posixpath.join(inside, relative))
    if joined == ".." or joined.startswith("../"):
        raise ConfigError(f"{relative} leads out of the bucket of {folder}: give the whole gs:// path")
    return path(f"gs://{bucket}/{joined}")


def _gcs() -> Any:
    """The module `gqa_jax.gcs`, imported where a path on gs:// is met."""
    from gqa_jax import gcs

    return gcs


def read_bytes(path: os.PathLike | str) -> bytes | None:
    """Content of a small file; None when it is not there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return _gcs().read(os.fspath(path)) if is_remote(path) else Path(path).read_bytes()
    return None


def read_file(path: os.PathLike | str, most: float = math.inf) -> bytes | None:
    """As `read_bytes`, of a file that should be ours; `most`: bytes that it may have.

    Raises ConfigError, naming it and the fix, for what is no file (a folder, a pipe, a device), may not be read or is larger;
    OSError where the storage can't be reached.
    """
    try:
        content = read_bytes(path) if is_remote(path) else _regular(path, most)
    except OSError as error:
        if error.errno not in _ODD:
            raise
        raise _unreadable(path, str(error.strerror)) from None
    if content is not None and len(content) > most:
        raise _unreadable(path, _TOO_LARGE.format(most))
    return content


_TOO_LARGE = "more than {:,} bytes"


def _unreadable(path: os.PathLike | str, why: str) -> ConfigError:
    return ConfigError(f"{os.fspath(path)} can't be read ({why}): move it away to make it again")


def _regular(path: os.PathLike | str, most: float) -> bytes | None:
    """Content of a local file; None when it is not there."""
    for last in (False, True):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would be a wait
            try:
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                    raise _unreadable(path, _TOO_LARGE.format(most) if stat.S_ISREG(found.st_mode) else "it is no file")
                content = os.read(file, found.st_size)  # open() would ask the system twice as often, of thousands of files
                while len(content) < found.st_size and (more := os.read(file, found.st_size - len(content))):
                    content += more
                return content
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or last:  # replaced just now, on NFS
                raise
    return None


def write_bytes(path: os.PathLike | str, content: bytes) -> None:
    """Writes a small file whole or not at all. Locally a temporary file in the same folder, synced, then renamed; a folder in
    its place is moved aside.
    """
    if is_remote(path):
        _gcs().write(os.fspath(path), content)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            put_aside(path)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: os.PathLike | str, values: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all (`write_bytes`), numbers that are not finite as text (`finite`)."""
    write_bytes(path, (json.dumps(finite(values), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: os.PathLike | str) -> dict[str, Any] | None:
    """The object of a JSON file; None when the file is not there.

    Raises ConfigError, naming the file and the fix, for whatever else is there; OSError where the storage can't be reached.
    """
    content = read_file(path, MOST_BYTES)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{os.fspath(path)} holds no JSON object: move it away to make it again")
    if content.count(b"{") + content.count(b"[") > DEEPEST and _is_deeper(values, DEEPEST):
        raise _unreadable(path, f"nested deeper than {DEEPEST}")
    return values


def _is_deeper(values: Any, depth: int) -> bool:
    """Whether objects and lists lie within each other more than so many times."""
    inside: list[Any] = [values]
    for _ in range(depth):
        within = (each.values() if isinstance(each, dict) else each for each in inside)
        inside = [value for one in within for value in one if isinstance(value, (dict, list))]
    return bool(inside)


def make_folder(path: os.PathLike | str) -> None:
    """Makes a local folder, and those above it, unless it is there; a file in its place is moved aside."""
    if is_remote(path):
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        put_aside(path)
        Path(path).mkdir(parents=True, exist_ok=True)


def put_aside(path: os.PathLike | str) -> None:
    """Gives what is in the way of a file or folder of ours another name beside it, NAME.aside-N, and says so."""
    path = epath.Path(path)
    taken = names(path.parent)
    target = next(name for n in itertools.count(1) if (name := f"{path.name}.aside-{n}") not in taken)
    move(path, path.with_name(target))
    log.warning("%s was in the way, or could not be used: it is %s now", os.fspath(path), target)


def remove(path: os.PathLike | str) -> None:
    """Removes a file, if it is there; a folder in its place is moved aside."""
    try:
        with contextlib.suppress(FileNotFoundError):
            _gcs().remove(os.fspath(path)) if is_remote(path) else Path(path).unlink()
    except OSError:  # of a folder: EISDIR on Linux, EPERM elsewhere
        if is_remote(path) or not Path(path).is_dir():
            raise
        put_aside(path)


def move(folder: os.PathLike | str, target: os.PathLike | str) -> None:
    """Moves a file or folder."""
    if is_remote(folder):
        _gcs().move(os.fspath(folder), os.fspath(target))
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(folder).rename(target)


def modified(path: os.PathLike | str) -> float:
    """When a file was written, in seconds since the epoch, by the clock of the machine that keeps it. Raises OSError."""
    return _gcs().modified(os.fspath(path)) if is_remote(path) else Path(path).stat().st_mtime


def names(folder: os.PathLike | str) -> list[str]:
    """Names of what is in a folder, sorted; none when it is not there, or no folder."""
    try:
        return _gcs().names(os.fspath(folder)) if is_remote(folder) else sorted(os.listdir(folder))
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return []
        raise


def each[T, R](function: Callable[[T], R], items: Iterable[T], *, remote: bool) -> list[R]:
    """`function` of every item, in order; `remote`: many at once, as each waits for gs://."""
    return _gcs().each(function, items) if remote else [function(item) for item in items]


def download(source: os.PathLike | str, target: Path) -> bool:
    """Copies an object of gs:// to a local file. Returns whether it is there at all."""
    return _gcs().download(os.fspath(source), target)


def upload(source: Path, target: os.PathLike | str) -> None:
    """Copies a local file, or the files of a folder and those below it, to gs://."""
    _gcs().upload(source, os.fspath(target))


def check_writable(folder: os.PathLike | str) -> None:
    """Makes the folder (on gs:// there is nothing to make), writes a small file in it, reads that back and removes it.

    Raises ConfigError with the reason and the fix.
    """
    folder = path(folder)
    probe = folder / f".writable-{secrets.token_hex(8)}"
    try:
        if not is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        write_bytes(probe, b"gqa_jax")
        found = read_bytes(probe)
        remove(probe)
    except OSError as error:
        if is_remote(folder) and isinstance(error, FileNotFoundError):  # an object needs no folder: only a bucket
            reason = _gcs().no_bucket(folder)
        else:
            reason = explain(error)
        raise ConfigError(f"{folder} can't be written: {reason}") from error
    if found != b"gqa_jax":
        raise ConfigError(f"{folder} can't be used: a file that was just written there is not found")


def explain(error: BaseException) -> str | None:
    """One sentence for an error of gs:// (`explain_remote`) or of local disk, with the fix; None for any other error."""
    return explain_remote(error) or _of_disk(error)


def explain_remote(error: BaseException) -> str | None:
    """One sentence for an error of gs://, or one that it caused, with the fix where there is one; None for any other error."""
    return next((sentence for e in errors.chain(error) if (sentence := _gcs().explain(e)) is not None), None)


def _of_disk(error: BaseException) -> str | None:
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if errors.disk_is_full(error):
        return "the disk is full: free space, or use another folder"
    match error.errno:
        case errno.EROFS:
            return "the file system is read-only: use another folder"
        case errno.EACCES | errno.EPERM:
            return "permission denied: change the permissions, or use another folder"
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
            return f"{error.filename} is in the way: use another folder"
    return f"{error.strerror or error}: use another folder"


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with NaN and infinities as "nan", "inf", "-inf": JSON has no such numbers, and a reader must see them."""

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return finite(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {key: written(value) for key, value in values.items()}
