"""Options that several commands share. Each has the name of the argument that it becomes (`launch.commands`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gqa_jax import hardware
from gqa_jax.formatting import read_context
from launch import rules
from launch.executors import base
from launch.tables import FORMATS, ROWS

# As the library has them, which takes a second to import: the help must not (tests/test_commands.py).
UNITS = ("nats", "bits", "perplexity")
PRESETS = ("paper", "paper-table4")
METHODS = ("posterior", "independent", "bootstrap")

LAST_RUN = "where it was last run"
WHOSE_PRICES = 'words of a list price, as "google:spot", or a .json or .toml file of your own (docs/prices.md)'
_CONFOUNDED = "laws also where heads of a size saw neither equal tokens nor equal tokens per parameter; every answer says so"
_FORMAT = "of the answer: csv and json have all numbers as they are, the others the tables of the screen (default: table)"


def add_grid(command: argparse.ArgumentParser, where: bool = False, on: str | None = None) -> None:
    """A grid, to plan or to run; `where`: some of its cells; `on`: an engine, by default this one."""
    command.add_argument("grid", metavar="GRID", help="a file of configs/grids/")
    _add_root(command, rules.HELP)
    if where:
        command.add_argument("--where", metavar="FIELD=VALUE,...", help="only these cells, for example size=19M,n_heads=8")
    if on is not None:
        engines = ", ".join(base.ENGINES)
        command.add_argument("--on", metavar="ENGINE", help=f"{engines}, or a cluster file (.toml); default: {on}")


def add_source(command: argparse.ArgumentParser, needs_grid: bool = False) -> None:
    """Where the runs come from that a question is about. `needs_grid`: a grid's file."""
    of_any = "a grid file, the folder it was run in, or a .csv or .parquet file of runs of any trainer"
    of_cells = "the grid file (.py): runs are chosen from its cells"
    command.add_argument("grid", metavar="GRID", nargs=None if needs_grid else "?", help=of_cells if needs_grid else of_any)
    _add_root(command, rules.ROWS)
    add_confounded(command)
    if not needs_grid:
        add_table(command)
        command.add_argument("--preset", choices=PRESETS, help="the paper's own data instead of a grid: no training")


def _add_root(command: argparse.ArgumentParser, about_rules: str) -> None:
    command.add_argument("--root", metavar="DIR", help="folder of the grid, or gs://BUCKET/FOLDER (default: runs/NAME)")
    command.add_argument("--rules", choices=(rules.OLD, rules.NEW), help=about_rules)


def add_format(command: argparse.ArgumentParser) -> None:
    """How an answer is printed."""
    command.add_argument("--format", choices=FORMATS, default="table", help=_FORMAT)


def add_confounded(command: argparse.ArgumentParser) -> None:
    """The option of commands that fit laws."""
    command.add_argument("--allow_confounded", action="store_true", help=_CONFOUNDED)


def add_table(command: argparse.ArgumentParser) -> None:
    """Options of runs of any trainer, which are a table and no grid."""
    group = command.add_argument_group("of a table of runs (.csv, .parquet)")
    group.add_argument("--columns", metavar="OURS=THEIRS,...", help="names that differ, like n_heads=H,loss=val_loss")
    group.add_argument("--units", choices=UNITS, help="of its losses, per token (default: nats, and checked)")
    group.add_argument(
        "--context_trained", type=tokens, metavar="T", help="training context of all its runs, where it has no such column"
    )
    group.add_argument(
        "--heads_rule", metavar="RULE", help="of heads that grow with the width: mha, group:G (n_kv = n_h / G) or kv:K"
    )


def add_train_context(command: argparse.ArgumentParser, default: str = "that of least noise") -> None:
    """Which laws answer."""
    command.add_argument("--train_context", type=tokens, metavar="T", help=f"training context of the laws (default: {default})")


def add_aspect(command: argparse.ArgumentParser) -> None:
    """Which shapes and heads are looked at."""
    group = command.add_argument_group("which models")
    group.add_argument(
        "--aspect", metavar="RATIO", help="d / L, width over layers: best (default: the cheapest of every draw, from half to "
        "twice the runs' own, with what it costs in loss), trained (as the runs), paper (its tables), or a number like 64",
    )  # fmt: skip
    group.add_argument(
        "--heads", nargs="+", type=_heads, metavar="H", help="only these, like 8,1 4,1 llama3 (default: all that have a law)"
    )


def add_rows(command: argparse.ArgumentParser) -> None:
    """--rows, of what is shown of cells."""
    command.add_argument("--rows", action="store_true", help=f"a row per cell; more than {ROWS} are else shown by size")


def add_objective(command: argparse.ArgumentParser) -> None:
    """The cost that is minimised, and its settings (`gqa_jax.search.objectives`)."""
    from gqa_jax.search.objectives import OBJECTIVES

    group = command.add_argument_group("what is minimised")
    group.add_argument("--cost", choices=OBJECTIVES, default="z", help="default: z, the paper's hardware-aware cost")
    group.add_argument(
        "--convention", choices=("paper", "figures", "exact"), help="what z, flops, memory, train count (default: the grid's)"
    )
    group.add_argument(
        "--flops", choices=("half_T", "per_token", "full_T"), help="tokens that FLOPs are of (default: the convention's)"
    )
    for name, text in (
        ("lam", "weight of memory in z (0.9)"),
        ("alpha", "exponent of memory in z (1/2)"),
        ("beta", "exponent of FLOPs in z (1/3)"),
    ):
        group.add_argument(f"--{name}", type=float, metavar="X", help=text)
    group.add_argument("--tokens", type=float, metavar="D", help="trained on, for train and lifetime (20 per parameter)")
    group.add_argument("--served_tokens", type=float, metavar="D", help="over its lifetime, for lifetime")

    group = command.add_argument_group("how it is served, for latency, throughput, price and lifetime (docs/serving.md)")
    group.add_argument(
        "--device",
        metavar="NAME[,NAME...]",
        help=f"one, or for optimum several to compare: {', '.join(hardware.CHIPS)}; or a "
        "file of `benchmark-serving --fit FILE`",
    )
    group.add_argument("--n_devices", type=int, metavar="N", help="that share one copy of the model (1)")
    group.add_argument(
        "--parallelism", metavar="HOW", help="of attention: best (default), tensor (over heads alone), or t,p,c: devices over "
        "which heads, sequences and context are divided",
    )  # fmt: skip
    group.add_argument(
        "--batch", type=_batch, metavar="B", help="requests served at once: a number, fits (the most that memory holds), or "
        "best (default: what costs the least within --ttft and --tpot)",
    )  # fmt: skip
    group.add_argument("--decode_share", type=float, metavar="S", help="share of a request's tokens that are generated (0.1)")
    group.add_argument("--ttft", type=float, metavar="S", help="seconds allowed to the first token")
    group.add_argument("--tpot", type=float, metavar="S", help="seconds allowed for each generated token")
    group.add_argument(
        "--disaggregated", action="store_const", const=True, help="prompts are read by other devices than those that generate"
    )
    group.add_argument("--param_dtype", metavar="DTYPE", help="of parameters where bytes count (bfloat16)")
    group.add_argument("--cache_dtype", metavar="DTYPE", help="of keys and values where bytes count (bfloat16)")
    group.add_argument(
        "--efficiency", metavar="X", help="of the peaks: one share, bound (all at once), or a JSON file of measurements "
        "(default: what servers of the class reached in public measurements)",
    )  # fmt: skip
    group.add_argument("--training_mfu", type=float, metavar="X", help="share of the peak that training reaches, for lifetime")
    group.add_argument("--usd_per_hour", type=float, metavar="X", help="of one device (the dated list price)")
    group.add_argument("--prices", metavar="ROW|FILE", help="whose prices: words of a list price, or a file (docs/prices.md)")


def tokens(text: str) -> int:
    """131072, or 128K, or 1M."""
    try:
        return read_context(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values of that kind, separated by commas."""

    def read(text: str) -> list[Any]:
        return [one(part) for part in text.split(",") if part.strip()]

    read.__name__ = f"{getattr(one, '__name__', 'value')}s, separated by commas"  # what argparse calls it
    return read


def _batch(text: str) -> int | str:
    """A number of requests, fits or best."""
    try:
        return int(text)
    except ValueError:
        return text  # RooflineServing says what there is


def _heads(text: str):
    """8,1; d,8 or llama3 for as many query heads as fill the width and 8 key/value heads; mha, group:4, kv:8."""
    from gqa_jax.laws import LLAMA3, Heads
    from gqa_jax.laws.heads import rule

    try:
        if text == "llama3":
            return LLAMA3
        if ":" in text or text == "mha":
            return rule(text)
        query, kv = text.strip("()").split(",")
        return Heads(None if query in ("d", "d/d_h") else int(query), int(kv))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no heads: give query and key/value heads like 8,1, or llama3, mha, group:4, kv:8"
        ) from None
