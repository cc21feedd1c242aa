"""Trains one model: `python -m gqa_jax.train --config=configs/train/tiny.py --workdir=DIR [--config.KEY=VALUE ...]`.

The same command resumes a run that was interrupted, bit for bit on the same mesh: batches are a function of (seed, step), and
everything else that a step needs is in the checkpoint. Exit codes: 0 done, 2 bad configuration or input, 3 diverged, 75 saved
and asked to end (SIGTERM, SIGHUP, Ctrl-C), 1 anything else. A launcher says in $GQA_JAX_DEVICES what the run is given.

DIR is a local folder or gs://BUCKET/FOLDER.

On several hosts it is the same command on each, with one folder that all of them see. Slurm and Cloud TPU are found; elsewhere
each process gets --coordinator=HOST:PORT --processes=N --process=I (gqa_jax/training/distributed.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from gqa_jax import errors, storage
from gqa_jax.config import BUDGETS, TrainConfig, field_types, unknown_key, unknown_key_of, wrong_type
from gqa_jax.errors import ConfigError
from gqa_jax.training import distributed, evaluation, run_folder
from gqa_jax.training.loop import PROFILE_STEPS, train_and_evaluate

log = logging.getLogger("gqa_jax.train")

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

config_flags.DEFINE_config_file(FLAG, None, "Configuration file; --config.KEY=VALUE overrides one of its fields.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://: made if it isn't there, resumed if it is.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, f"Trace {PROFILE_STEPS} steps into WORKDIR/profile, for TensorBoard or Perfetto."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes: auto looks for Slurm and Cloud TPU in the environment, on asks JAX.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster says it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, from 0, with --coordinator.")
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", distributed.HEARTBEAT_SECONDS, "Without a sign of life of a process for so long, the others end."
)
_START_SECONDS = flags.DEFINE_integer("start_seconds", distributed.START_SECONDS, "Time for all processes to come.")


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax and grain speak through it, at length
    started = time.monotonic()
    try:
        config = _parse(argv)
        compilation_cache()
        with _recorded():
            distributed.initialize(
                _DISTRIBUTED.value,
                coordinator=_COORDINATOR.value,
                processes=_PROCESSES.value,
                process=_PROCESS.value,
                heartbeat_seconds=_HEARTBEAT_SECONDS.value,
                start_seconds=_START_SECONDS.value,
                record=_record,
            )
            distributed.same_config(config, workdir=_WORKDIR.value)
        result = train_and_evaluate(
            config,
            _WORKDIR.value,
            profile=_PROFILE.value,
            heartbeat_seconds=_HEARTBEAT_SECONDS.value,
            started=started,
        )
    except run_folder.ALIKE as error:
        print(f"gqa_jax.train: {error}", file=sys.stderr)
        return run_folder.exit_code(error)
    except Exception as error:
        kind, reason = run_folder.classify(error)
        if kind == "error":
            log.exception("the run failed")
        print(f"gqa_jax.train: {reason}", file=sys.stderr)
        return run_folder.exit_code(error)
    except KeyboardInterrupt:  # later ones are for `distributed.Preemption`
        print("gqa_jax.train: stopped before it trained; the same command starts it again", file=sys.stderr)
        return 128 + signal.SIGINT
    if distributed.is_primary():
        print(_summary(result, _WORKDIR.value))
    return run_folder.EXIT_DONE if result["status"] == "done" else run_folder.EXIT_DIVERGED


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    """Leaves an exit record where a run fails that does not hold its folder yet; none of what is wrong with its command."""
    try:
        yield
    except Exception as error:
        kind, reason = distributed.classify(error)
        if kind != "config":
            _record(kind, reason, distributed.blamed(error))
        raise


def _record(kind: str, reason: str, blamed: str | None = None) -> None:
    with contextlib.suppress(ConfigError, OSError), run_folder.claim(_WORKDIR.value):  # another process may hold it
        run_folder.record_exit(_WORKDIR.value, run_folder.EXIT_FAILED, kind, reason, None, blamed)


def compilation_cache() -> None:
    """Keeps compiled programs in $GQA_JAX_CACHE/xla (default ~/.cache/gqa_jax/xla), so that equal shapes compile once."""
    folder = storage.cache("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _parse(argv: list[str]) -> TrainConfig:
    """The configuration of the command line. Raises ConfigError with one sentence for whatever is wrong with it."""
    app.define_help_flags()
    values, rest = read_config(argv)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: options start with --")
    if values is None:
        raise ConfigError("--config is missing; try --config=configs/train/tiny.py --workdir=runs/tiny")
    if not _WORKDIR.value:
        raise ConfigError("--workdir is missing: the folder of the run, made if it isn't there")
    return TrainConfig.from_dict(values)


def read_config(argv: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> tuple[dict[str, Any] | None, list[str]]:
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


def _summary(result: dict[str, Any], workdir: str) -> str:
    if result["status"] != "done":
        return f"{result['status']} at step {result['step']} · {workdir}/result.json"
    bits, tokens, rate = (result.get(name) for name in ("bits_per_byte", "tokens", "tokens_per_second"))
    also = [None if bits is None else f"{bits:.4f} bits/byte", None if tokens is None else f"{tokens:,} tokens"]
    also += [None if rate is None else f"{rate:,.0f} tokens/s", f"{workdir}/result.json"]
    loss = f"loss {result['loss']:.4f}{evaluation.plus_minus(result.get('loss_sem'))} nats/token{_documents(result)}"
    return " · ".join([loss, *filter(None, also)])


def _documents(result: dict[str, Any]) -> str:
    """What the loss is of: " (12 of 12 held-out documents, 95%: 1.661 to 1.797)", as far as a result says it."""
    documents, of = result.get("eval_documents"), result.get("heldout_documents")
    if documents is None:
        return ""
    of_how_many = "" if of is None else f" of {of:,}"
    text = f"{documents:,}{of_how_many} held-out document" + "s" * ((of or documents) > 1)
    low, high = result.get("loss_low"), result.get("loss_high")
    if None not in (low, high) and high > low:
        decimals = min(4, max(1, 1 - math.floor(math.log10((high - low) / 2))))
        text += f", 95%: {low:.{decimals}f} to {high:.{decimals}f}"
    return f" ({text})"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
