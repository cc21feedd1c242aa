"""Grid files are Python: what one returns, what it may hold, and whose line it is where it fails."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import re
import reprlib
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from gqa_jax import costs
from gqa_jax.config import TrainConfig, unknown_key_of
from gqa_jax.errors import ConfigError, closest, named
from gqa_jax.formatting import LARGEST_CONTEXT, read_context


def returned_by(path: str) -> Any:
    """What get_grid() of a grid file returns; what the file prints goes to stderr.

    Raises ConfigError: no such file, no Python, no get_grid, or whatever the file raises, with its line.
    """
    file = Path(path)
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder: give a grid file, a .py that defines get_grid(), like one of configs/grids/")
    if not os.path.exists(path):
        there = sorted(str(p) for p in Path("configs/grids").glob("*.py"))
        raise ConfigError(f"grid file {path} is not there: {closest(path, there) if there else 'give the path of a .py file'}")
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"{path} is no grid file: give a .py that defines get_grid(), like configs/grids/quickstart.py")
    module = types.ModuleType(f"grid_{file.stem}")
    module.__file__ = path
    with contextlib.redirect_stdout(sys.stderr), blamed(path):
        try:
            source = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"it can't be read: {error.strerror}") from error
        sys.modules[module.__name__] = module  # dataclasses look for it there
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
        get_grid = getattr(module, "get_grid", None)
        if not callable(get_grid):
            raise ConfigError("it defines no get_grid(), which returns a launch.grid.Grid")
        return get_grid()


@contextlib.contextmanager
def blamed(path: str) -> Iterator[None]:
    """What is raised inside becomes a ConfigError with the file, the last of its lines that was at work, and the error."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a grid file may do anything, sys.exit() too
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        own = isinstance(error, SyntaxError) and error.filename == path
        lines = [error.lineno] if own else lines
        where = f"{path}, line {lines[-1]}" if lines and lines[-1] else path
        if isinstance(error, ConfigError):
            raise ConfigError(f"{where}: {error}") from error
        left = "it ends the program, which is left to `python -m launch`: remove sys.exit()"
        said = left if isinstance(error, SystemExit) else unknown_key_of(error) or _wrong_type(error) or named(error)
        raise ConfigError(f"{where}: {f'{type(error).__name__}: {error.msg}' if own else said}") from error


def _wrong_type(error: BaseException) -> str | None:
    """The sentence about a value that a field of a ConfigDict can't have; None of any other error."""
    words = r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '(.+?)'> .* <class '(.+?)'>"
    found = re.match(words, str(error), re.DOTALL)
    if found is None:
        return None
    value = repr(found[2]) if found[3] == "str" else " ".join(found[2].split())
    return f"{found[1]} = {value[:100]}: must be {found[4]}, not {found[3]}"


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Grid, by name: what it lists as lists, its contexts as numbers of tokens.

    Raises ConfigError for what could not be used after the runs have been paid for.
    """
    name, convention, others, old = (values[name] for name in ("name", "convention", "others", "old_rules"))
    if not isinstance(name, str) or not re.fullmatch(r"\w([\w. -]{0,62}\w)?", name):
        raise ConfigError(f"Grid: name = {_shown(name)}: must be 1 to 64 letters, digits, _, - and .: its folder has it")
    found = {name: _listed(name, values[name], read) for name, read in _READ.items()}
    if not found["configs"]:
        raise ConfigError("Grid: configs = []: the grid has no cells; check its axes and its skip rule")
    if not found["contexts_served"]:
        raise ConfigError('Grid: contexts_served = []: name one context or more that models will be served at, like "128K"')
    if convention not in [*costs.CONVENTIONS]:
        raise ConfigError(f"Grid: convention = {_shown(convention)}: {closest(str(convention), costs.CONVENTIONS)}")
    if not callable(others) or not isinstance(old, bool):
        raise ConfigError(f"Grid: others = {_shown(others)}, old_rules = {_shown(old)}: a function, and True or False")
    return dict(values) | found


def _listed(name: str, values: Any, read: Callable[[Any], Any]) -> list:
    if isinstance(values, str | Mapping | ml_collections.ConfigDict) or not isinstance(values, Iterable):
        raise ConfigError(f"Grid: {name} = {_shown(values)}: must be a list")
    found = []
    for number, value in enumerate(values):
        try:
            found.append(read(value))
        except ConfigError as error:
            raise ConfigError(f"Grid: {name}[{number}] = {_shown(value)}: {error}") from None
    return found


def _shown(value: Any) -> str:
    """A value of any kind in a sentence: one short line."""
    return " ".join(reprlib.repr(value).split())


def _config(value: Any) -> ml_collections.ConfigDict | TrainConfig:
    if not isinstance(value, ml_collections.ConfigDict | TrainConfig):
        raise ConfigError("must be what gqa_jax.config.default_config() gives, with values of yours, or a TrainConfig")
    return value


def _context(value: Any) -> int:
    with contextlib.suppress(ValueError):
        tokens = read_context(value) if isinstance(value, str) else value
        if isinstance(tokens, numbers.Integral) and not isinstance(tokens, bool) and 1 <= tokens <= LARGEST_CONTEXT:
            return int(tokens)
    raise ConfigError(f"must be a whole number of tokens, 1 to {LARGEST_CONTEXT}, like 131072 or '128K'")


def _loss(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ConfigError("must be a finite number above 0, nats per token")
    return float(value)


_READ = {"configs": _config, "contexts_served": _context, "losses": _loss}
