"""The configuration that a command line gives: a file of `configs/`, and --config.KEY=VALUE for fields of it.

ml_collections reads both; here are its parsers of values, which know None, and one sentence for whatever is wrong.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from gqa_jax import errors
from gqa_jax.config import BUDGETS, TrainConfig, field_types, unknown_key, unknown_key_of, wrong_type
from gqa_jax.errors import ConfigError

log = logging.getLogger(__name__)

FLAG = "config"  # by `config_flags.DEFINE_config_file`

_OVERRIDE = re.compile(rf"--?(?:no)?{FLAG}\.([^=]*)")
_FILE = re.compile(rf"--?{FLAG}=([^:]*)")


class _OrNone(flags.ArgumentParser):
    """Values that `parser` reads, and None: whether a field may be None is checked with all else that it may be."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


for _kind, _parser in (
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (bool, flags.BooleanParser()),
    (str, flags.ArgumentParser()),
):
    config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))


def parse(argv: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> tuple[dict[str, Any] | None, list[str]]:
    """Fields of the configuration as nested dicts, None without --config; and the arguments that are no flags.

    A budget of the command line (one of `BUDGETS`) replaces that of the file, and the log says so. Raises ConfigError with one
    sentence for a flag, a file, a field or a value that can't be used.
    """
    try:
        argv = given.read_flags_from_files(list(argv), force_gnu=False)
        paths = [match[1] for argument in argv if (match := _OVERRIDE.match(argument))]
        _check_fields(paths)
        rest = given(argv)[1:]
        file = given[FLAG]
        to_dict = file.present and getattr(file.value, "to_dict", None)  # raises what went wrong with the file
    except ConfigError:
        raise
    except Exception as error:  # of flags, of a ConfigDict, of whatever the file does
        raise ConfigError(_explained(error, argv)) from error
    if not file.present:
        return None, rest
    if not isinstance(to_dict, Callable):
        raise ConfigError(
            f"--config={file.config_filename}: get_config() gives {type(file.value).__name__}: it must return what "
            "gqa_jax.config.default_config() gives, changed"
        )
    values = to_dict()
    _replace_budget(values, file.override_values)
    return values, rest


def _check_fields(paths: Sequence[str]) -> None:
    known = field_types(TrainConfig)
    for path in paths:
        if path not in known:
            raise ConfigError(unknown_key(path, TrainConfig))
        if one := next((name for name in known if name.startswith(f"{path}.")), None):
            raise ConfigError(f"--{FLAG}.{path} is a group of fields: give one of them, like --{FLAG}.{one}=VALUE")


def _replace_budget(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Takes the budget of the file out of `values` where the command line gives another, and only one."""
    ours = [name for name in BUDGETS if overrides.get(name) is not None]
    if len(ours) != 1:
        return
    for name in BUDGETS:
        if name not in overrides and values.get(name) is not None:
            log.info(
                "%s = %s of the command line replaces %s = %s of the file", ours[0], overrides[ours[0]], name, values[name]
            )
            values[name] = None


def _explained(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with the command line or with the file that it names, and there with the line."""
    text = str(error)
    for path in sorted(field_types(TrainConfig), key=len, reverse=True):
        start = f"flag --{FLAG}.{path}="
        if isinstance(error, flags.IllegalFlagValueError) and text.startswith(start):
            return wrong_type(path, text.removeprefix(start).removesuffix(f": {error.__context__}"), TrainConfig)
    chain = errors.chain(error)[::-1]  # the first cause first
    if own := [str(cause) for cause in chain if isinstance(cause, ConfigError)]:
        return own[0]
    file = next((match[1] for argument in argv if (match := _FILE.match(argument))), None)
    for cause in chain:
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == file]
        if lines:
            return f"{file}, line {lines[-1]}: {unknown_key_of(cause) or errors.named(cause)}"
    if "Error whilst parsing config file" in text:
        return f"--{FLAG}={file}: {errors.named(chain[0])}"
    text = " ".join(text.replace("\\n", " ").split())
    return f"the command line or the configuration file can't be used: {text}"
