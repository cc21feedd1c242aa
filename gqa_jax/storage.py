"""Files on local disk or on gs://, by the same functions.

`path` makes an `etils.epath.Path` of either; gs:// needs gcsfs. An object on gs:// is written whole or not at all and can't be
appended to; a rename is a copy of everything below. Nothing here remembers what a folder held: a run and who watches it are
different machines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import importlib.util
import json
import logging
import math
import os
import posixpath
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax import errors
from gqa_jax.errors import ConfigError

log = logging.getLogger(__name__)

REQUESTS = 32  # to gs:// at once, where many small files are read
DOWNLOADS = 8  # ranges of a large object at once
RANGE_BYTES = 1 << 26  # of a download: what a slow line brings within the five minutes that gcsfs gives a request
ROLES = "the roles Storage Object Admin and Storage Legacy Bucket Reader"  # orbax asks what kind of bucket it is
LOGIN = "log in: gcloud auth application-default login"


def path(text: os.PathLike | str) -> epath.Path:
    """A path on local disk, `~` expanded and otherwise as it was given, or on gs://.

    Raises ConfigError for gs:// without gcsfs or without a bucket, and for any other `scheme://`.
    """
    text = os.fspath(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(text).expanduser() if text.startswith("~") else epath.Path(text)
    if scheme != "gs":
        raise ConfigError(f"{text}: {scheme}:// is not supported: use a local folder or gs://BUCKET/FOLDER")
    if not rest.strip("/"):
        raise ConfigError(f"{text}: the bucket is missing: gs://BUCKET/FOLDER")
    _gcs()
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


@functools.cache
def _gcs() -> Any:
    """The file system by which epath, and orbax with it, reach gs://; made to remember no listings.

    By default gcsfs keeps them for ever, so that a file which another machine has written since would not be there.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError("gs:// needs gcsfs: pip install 'gqa-jax[gcs]'")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with a traceback, at each retry, what it raises anyway
    system = epath.backend.fsspec_backend.fs("gs://")
    system.dircache.use_listings_cache = False
    system.dircache.clear()
    return system


def read_bytes(path: os.PathLike | str) -> bytes | None:
    """Content of a small file; None when it is not there. On gs:// one request. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _explained(path):
        return _gcs().cat_file(os.fspath(path)) if is_remote(path) else Path(path).read_bytes()
    return None


def write_bytes(path: os.PathLike | str, content: bytes) -> None:
    """Writes a small file whole or not at all. Locally a temporary file in the same folder, synced, then renamed."""
    if is_remote(path):
        with _explained(path):
            _gcs().pipe_file(os.fspath(path), content)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: os.PathLike | str, values: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all (`write_bytes`), numbers that are not finite as text (`finite`)."""
    write_bytes(path, (json.dumps(finite(values), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: os.PathLike | str) -> dict[str, Any] | None:
    """The object of a JSON file; None when the file is not there.

    Raises ValueError, naming the file and the fix, when it holds no object; OSError when it can't be read.
    """
    content = read_bytes(path)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}): move it away to make it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: move it away to make it again")
    return values


def remove(path: os.PathLike | str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError), _explained(path):
        _gcs().rm_file(os.fspath(path)) if is_remote(path) else Path(path).unlink()


def move(folder: os.PathLike | str, target: os.PathLike | str) -> None:
    """Moves a file or folder; on gs:// every object below it is copied, then all old ones are removed."""
    if is_remote(folder):
        system, before = _gcs(), os.fspath(folder).removeprefix("gs://")
        with _explained(folder):
            each(
                lambda name: system.cp_file(name, os.fspath(target) + name.removeprefix(before)),
                system.find(before),
                remote=True,
            )
            system.rm(before, recursive=True)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(folder).rename(target)


def modified(path: os.PathLike | str) -> float:
    """When a file was written, in seconds since the epoch, by the clock of the machine that keeps it. Raises OSError."""
    if not is_remote(path):
        return Path(path).stat().st_mtime
    with _explained(path):
        return _gcs().modified(os.fspath(path)).timestamp()


def names(folder: os.PathLike | str) -> list[str]:
    """Names of what is in a folder, sorted; none when it is not there. On gs:// one listing."""
    with contextlib.suppress(FileNotFoundError), _explained(folder):
        if not is_remote(folder):
            return sorted(os.listdir(folder))
        found = _gcs().ls(os.fspath(folder), detail=False)
        return sorted({posixpath.basename(name) for name in found if not name.endswith("/")})
    return []


def each[T, R](function: Callable[[T], R], items: Iterable[T], *, remote: bool) -> list[R]:
    """`function` of every item, in order; `remote`: many at once, as each waits for gs://."""
    if not remote:
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


def download(source: os.PathLike | str, target: Path) -> bool:
    """Copies an object of gs:// to a local file, in ranges side by side. Returns whether it is there at all."""
    source = os.fspath(source)
    try:
        with _explained(source):
            size = _gcs().info(source)["size"]
    except FileNotFoundError:
        return False

    def copy(start: int) -> None:
        with _explained(source):
            content = _gcs().cat_file(source, start=start, end=min(start + RANGE_BYTES, size))
        os.pwrite(file.fileno(), content, start)

    with open(target, "wb") as file, concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(copy, range(0, size, RANGE_BYTES)):
            pass
        file.flush()
        os.fsync(file.fileno())
    return True


def upload(source: Path, target: os.PathLike | str) -> None:
    """Copies a local file, or the files of a folder and those below it, to gs://."""
    for file in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
        relative = file.relative_to(source).as_posix()
        with _explained(target):
            _gcs().put_file(os.fspath(file), posixpath.join(os.fspath(target), *([] if relative == "." else [relative])))


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
            bucket = folder.parts[2]
            reason = f"there is no bucket {bucket!r}: correct the name, or make it: gcloud storage buckets create gs://{bucket}"
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
    return next((sentence for e in errors.chain(error) if (sentence := _of_gcs(e)) is not None), None)


def _of_gcs(error: BaseException) -> str | None:
    if isinstance(error, _Explained):
        return str(error)
    module, text, code = type(error).__module__, _one_line(error), str(getattr(error, "code", None))
    of_tensorstore = re.search(r"\[(http_response|curl)_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
    if of_tensorstore and of_tensorstore[1] == "curl":
        return _not_reached(text)
    if of_tensorstore:
        code = of_tensorstore[2]
    if text.startswith("Project was not passed"):
        return "the Google project is not known: set GOOGLE_CLOUD_PROJECT to its name"
    if module.startswith("google.auth."):
        return f"the Google credentials can't be used ({text}); {LOGIN}"
    answered = of_tensorstore is not None or (module.startswith(("gcsfs.", "google.api_core.")) and code != "None")
    if "Anonymous caller" in text or (answered and code == "401"):
        return f"no Google credentials were found, or they are no longer valid; {LOGIN}"
    if text.startswith("Forbidden: ") or (answered and code == "403"):
        return f"permission denied ({text}): ask for {ROLES} on the bucket"
    if answered or text.startswith("Bad Request: "):
        return f"Google Cloud Storage answers {text}"
    if module.startswith(("aiohttp.", "fsspec.")):
        return _not_reached(text or type(error).__name__)
    return None


def _not_reached(why: str) -> str:
    return f"Google Cloud Storage is not reached ({why}): see that this machine has a network"


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


class _Explained(OSError):
    """An error of gs://, in one sentence."""


@contextlib.contextmanager
def _explained(path: os.PathLike | str) -> Iterator[None]:
    """Turns what gcsfs and the libraries below it raise, of many classes, into an OSError of one sentence.

    FileNotFoundError, and errors of the local disk, stay what they are.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        sentence = _of_gcs(error)
        if sentence is None and (isinstance(error, TimeoutError) or type(error).__module__.startswith("requests.")):
            sentence = _not_reached(_one_line(error) or type(error).__name__)
        if sentence is None:
            raise
        raise _Explained(f"{os.fspath(path)}: {sentence}") from error


def _one_line(error: BaseException) -> str:
    """Text of an error in one line, of a web page what can be read of it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", str(error))).strip()[:300]


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with NaN and infinities as "nan", "inf", "-inf": JSON has no such numbers, and a reader must see them."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }
