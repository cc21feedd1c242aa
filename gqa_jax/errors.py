"""Errors and their words: what a person has to correct, the closest name, the first line, whether a disk is full."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class ConfigError(ValueError):
    """What a person has to correct: a configuration, an option, a file. Its text has the value, what is allowed and the fix."""


def close(name: str, allowed: Iterable[str]) -> str | None:
    """The name of `allowed` that was probably meant by `name`; None when none is close."""
    return next(iter(difflib.get_close_matches(name, list(allowed), n=1)), None)


def closest(name: str, allowed: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: "did you mean 'x'?", or `otherwise`, all of `allowed`, when none is close."""
    allowed = list(allowed)
    if (match := close(name, allowed)) is not None:
        return f"did you mean {match!r}?"
    return f"allowed: {', '.join(allowed)}" if otherwise is None else otherwise


def first_line(error: BaseException) -> str:
    """The first line of an error's text; empty when it has none."""
    return next(iter(str(error).strip().splitlines()), "")


def named(error: BaseException, length: int | None = None) -> str:
    """Class and first line of an error, "ValueError: no such head", of that line at most `length` characters."""
    text = first_line(error)[:length]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def chain(error: BaseException) -> list[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a quota on it, is full; libraries put the system's words into their own errors."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
