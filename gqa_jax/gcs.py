"""gs:// by gcsfs: what `gqa_jax.storage` does with a path there. What goes wrong is an OSError of one sentence with its fix.

An object is written whole or not at all and can't be appended to; a rename is a copy of everything below. Nothing remembers
what a folder held: a run and who watches it are different machines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from gqa_jax.errors import ConfigError

REQUESTS = 32  # at once, where many small files are read
DOWNLOADS = 8  # ranges of a large object at once
RANGE_BYTES = 1 << 26  # of a download: what a slow line brings within the five minutes that gcsfs gives a request
ROLES = "the roles Storage Object User and Storage Legacy Bucket Reader"  # orbax asks what kind of bucket it is
LOGIN = "log in: gcloud auth application-default login"


@functools.cache
def system() -> Any:
    """The file system by which epath, and orbax with it, reach gs://; made to remember no listings.

    By default gcsfs keeps them for ever, so that a file which another machine has written since would not be there. Raises
    ConfigError without gcsfs.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError("gs:// needs gcsfs: pip install 'gqa-jax[gcs]'")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with a traceback, at each retry, what it raises anyway
    found = epath.backend.fsspec_backend.fs("gs://")
    found.dircache.use_listings_cache = False
    found.dircache.clear()
    return found


def read(path: str) -> bytes:
    """Content of an object; one request."""
    with _explained(path):
        return system().cat_file(path)


def write(path: str, content: bytes) -> None:
    with _explained(path):
        system().pipe_file(path, content)


def remove(path: str) -> None:
    with _explained(path):
        system().rm_file(path)


def move(folder: str, target: str) -> None:
    """Copies every object below `folder`, then removes all old ones."""
    before = folder.removeprefix("gs://")
    with _explained(folder):
        each(lambda name: system().cp_file(name, target + name.removeprefix(before)), system().find(before))
        system().rm(before, recursive=True)


def modified(path: str) -> float:
    """When an object was written, in seconds since the epoch."""
    with _explained(path):
        return system().modified(path).timestamp()


def names(folder: str) -> list[str]:
    """Names of what is in a folder, sorted; one listing."""
    with _explained(folder):
        found = system().ls(folder, detail=False)
    return sorted({posixpath.basename(name) for name in found if not name.endswith("/")})


def each[T, R](function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of every item, in order, many at once."""
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


def download(source: str, target: Path) -> bool:
    """Copies an object to a local file, in ranges side by side. Returns whether it is there at all."""
    try:
        with _explained(source):
            size = system().info(source)["size"]
    except FileNotFoundError:
        return False

    def copy(start: int) -> None:
        with _explained(source):
            content = system().cat_file(source, start=start, end=min(start + RANGE_BYTES, size))
        os.pwrite(file.fileno(), content, start)

    with open(target, "wb") as file, concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(copy, range(0, size, RANGE_BYTES)):
            pass
        file.flush()
        os.fsync(file.fileno())
    return True


def upload(source: Path, target: str) -> None:
    """Copies a local file, or the files of a folder and those below it."""
    for file in sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]:
        relative = file.relative_to(source).as_posix()
        with _explained(target):
            system().put_file(os.fspath(file), posixpath.join(target, *([] if relative == "." else [relative])))


def explain(error: BaseException) -> str | None:
    """One sentence for an error of gs://, with the fix where there is one; None for any other error."""
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


def no_bucket(path: epath.Path) -> str:
    """What is wrong where a file can't be found that was to be written: an object needs no folder, only a bucket."""
    bucket = path.parts[2]
    return f"there is no bucket {bucket!r}: correct the name, or make it: gcloud storage buckets create gs://{bucket}"


def _not_reached(why: str) -> str:
    return f"Google Cloud Storage is not reached ({why}): see that this machine has a network"


class _Explained(OSError):
    """An error of gs://, in one sentence."""


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what gcsfs and the libraries below it raise, of many classes, into an OSError of one sentence.

    FileNotFoundError stays what it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None and (isinstance(error, TimeoutError) or type(error).__module__.startswith("requests.")):
            sentence = _not_reached(_one_line(error) or type(error).__name__)
        if sentence is None:
            raise
        raise _Explained(f"{path}: {sentence}") from error


def _one_line(error: BaseException) -> str:
    """Text of an error in one line, of a web page what can be read of it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", str(error))).strip()[:300]
