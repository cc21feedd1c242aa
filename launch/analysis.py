"""`python -m launch fit|optimum|next|report`: questions to finished runs, or to the paper's own data."""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Callable

from rich.console import Console

from gqa_jax import hardware, prices
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import read_context
from gqa_jax.hardware import Price
from launch import rules
from launch.tables import FORMATS

COSTS = ("z", "flops", "memory", "latency", "throughput", "price", "train", "lifetime")
CONFOUNDED = "laws also where heads of a size saw neither equal tokens nor equal tokens per parameter; every answer says so"
TABLES = (".csv", ".parquet")
TABLE_OPTIONS = ("columns", "units", "context_trained", "heads_rule")
UNITS = ("nats", "bits", "perplexity")
PRESETS = ("paper", "paper-table4")
_FORMAT = "of the answer: csv and json have all numbers as they are, the others the tables of the screen (default: table)"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds them to the command line; `ask` of the parsed arguments is what to call with them and a console."""

    def add(name: str, ask: Callable, summary: str, needs_grid: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "grid",
            metavar="GRID",
            nargs=None if needs_grid else "?",
            help="the grid file (.py): runs are chosen from its cells"
            if needs_grid
            else "a grid file, the folder it was run in, or a .csv or .parquet file of runs of any trainer",
        )
        command.add_argument("--root", metavar="DIR", help="folder of the grid, or gs://BUCKET/FOLDER (default: runs/NAME)")
        command.add_argument("--rules", choices=(rules.OLD, rules.NEW), help=rules.ROWS)
        add_confounded(command)
        if not needs_grid:
            add_table(command)
            command.add_argument("--preset", choices=PRESETS, help="the paper's own data instead of a grid: no training")
        command.set_defaults(ask=ask)
        return command

    command = add("fit", _fit, "the laws L(N; H) of finished runs, with intervals, checks and warnings")
    _add_context(command, "all")
    command.add_argument("--free_entropy", action="store_true", help="an E per head configuration instead of one for all")
    command.add_argument("--entropy", type=float, metavar="E", help="E, given instead of fitted, nats per token")
    command.add_argument("--huber_delta", type=float, metavar="D", help="residuals beyond D nats count linearly")
    command.add_argument("--format", choices=FORMATS, default="table", help=_FORMAT)

    summary = (
        "the cheapest heads and shape for a loss (or what your own model reaches) and a served context, and how sure that is"
    )
    command = add("optimum", _optimum, summary)
    command.add_argument("--context", type=_tokens, required=True, metavar="T", help="tokens served, like 131072 or 128K")
    goal = command.add_mutually_exclusive_group(required=True)
    goal.add_argument("--loss", type=float, metavar="L", help="loss that must be reached, nats per token")
    goal.add_argument(
        "--like", metavar="MODEL", help="instead of a loss: what your model would reach, trained like the runs; a config.json "
        "of Hugging Face (Llama class), its folder, or a name like llama-3.2-1b (docs/own-model.md)",
    )  # fmt: skip
    _add_context(command)
    add_objective(command)
    _add_aspect(command)
    command.add_argument(
        "--fits", metavar="DEVICE", help="only models whose parameters and caches fit DEVICE (--n_devices of it)"
    )
    command.add_argument("--draws", type=int, default=1000, metavar="N", help="of the laws' coefficients (default: 1000)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    command.add_argument(
        "--method",
        choices=("posterior", "independent", "bootstrap"),
        help="of the draws (default: posterior, which allows for shared noise and bends)",
    )
    command.add_argument("--conventions", action="store_true", help="also what the answer would be in every convention of Z")
    command.add_argument("--format", choices=FORMATS, default="table", help=_FORMAT)
    command.epilog = (
        "example: python -m launch optimum --preset paper --context 131072 --loss 2.615. Memory only: --cost memory; FLOPs "
        "only: --cost flops; on a device: --cost latency --device h200 --batch 8; against a model: --like llama-3.2-1b"
    )

    command = add("next", _next, "the runs that would make the answer surer, within a budget, as a grid file for `run`", True)
    command.add_argument("--context", type=_tokens, required=True, metavar="T", help="tokens served, like 131072 or 128K")
    command.add_argument("--loss", type=float, required=True, metavar="L", help="loss that must be reached, nats per token")
    command.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="of training, for all of them")
    _add_context(command)
    add_objective(command)
    command.add_argument("--aspect", metavar="RATIO", help="d / L of the models, as for optimum (default: best)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws and simulated losses (default: 0)")
    command.add_argument("--out", metavar="FILE", help="the grid file that is written (default: GRID-next.py beside GRID)")

    command = add("report", _report, "one HTML file with the answer, its certainty, tables, pictures and an explorer")
    command.add_argument(
        "--context", type=_tokens, metavar="T", help="of the question that it opens with (default: the longest)"
    )
    command.add_argument("--loss", type=float, metavar="L", help="of that question (default: the grid's, or what was reached)")
    command.add_argument(
        "--out",
        metavar="DIR",
        help="folder that it is written to (default: report/ in GRID's folder, TABLE-report or runs/PRESET)",
    )
    add_objective(command)
    _add_aspect(command)


def ask(arguments: argparse.Namespace, console: Console) -> int:
    """Carries out one of these commands; returns the exit code."""
    if getattr(arguments, "preset", None) is None and arguments.grid is None:
        raise ConfigError("give a GRID, or --preset paper for the paper's own data")
    if getattr(arguments, "preset", None) is not None and (arguments.grid is not None or arguments.root is not None):
        raise ConfigError(f"--preset {arguments.preset} or a GRID: not both")
    if getattr(arguments, "preset", None) is not None and arguments.rules is not None:
        raise ConfigError(f"--rules {arguments.rules} is for grids: the paper's data are under its own rules")
    if getattr(arguments, "preset", None) is not None and arguments.allow_confounded:
        raise ConfigError("--allow_confounded is for your runs: the laws of the paper's data are as they are")
    is_table(arguments)
    return arguments.ask(arguments, console)


def is_table(arguments: argparse.Namespace) -> bool:
    """Whether GRID is a table of runs of any trainer. Raises ConfigError where the command, or an option, is not for it."""
    table = arguments.grid is not None and arguments.grid.lower().endswith(TABLES)
    if table and not hasattr(arguments, "columns"):
        raise ConfigError(
            f"{arguments.grid}: it is a table of runs, not a grid: it has no cells that could be trained, watched or chosen "
            "from; fit, optimum, report and export take it"
        )
    for name in TABLE_OPTIONS if not table else ("root", "rules"):
        if getattr(arguments, name, None) is not None:
            raise ConfigError(f"--{name} is for {'grids' if table else 'a table of runs (.csv, .parquet)'}: leave it out")
    return table


def export_table(arguments: argparse.Namespace, console: Console) -> int:
    """`export` of a table of runs."""
    from launch import export

    export.write_of_table(_source(arguments), console)
    return 0


def add_confounded(command: argparse.ArgumentParser) -> None:
    """The option of commands that fit laws."""
    command.add_argument("--allow_confounded", action="store_true", help=CONFOUNDED)


def add_table(command: argparse.ArgumentParser) -> None:
    """Options of runs of any trainer, which are a table and no grid."""
    group = command.add_argument_group("of a table of runs (.csv, .parquet)")
    group.add_argument("--columns", metavar="OURS=THEIRS,...", help="names that differ, like n_heads=H,loss=val_loss")
    group.add_argument("--units", choices=UNITS, help="of its losses, per token (default: nats, and checked)")
    group.add_argument(
        "--context_trained", type=_tokens, metavar="T", help="training context of all its runs, where it has no such column"
    )
    group.add_argument(
        "--heads_rule", metavar="RULE", help="of heads that grow with the width: mha, group:G (n_kv = n_h / G) or kv:K"
    )


def add_objective(command: argparse.ArgumentParser) -> None:
    """Options of the cost that is minimised (`gqa_jax.search.objectives`)."""
    group = command.add_argument_group("what is minimised")
    group.add_argument("--cost", choices=COSTS, default="z", help="default: z, the paper's hardware-aware cost")
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
        "--device", metavar="NAME[,NAME...]", help=f"one, or for optimum several to compare: {', '.join(hardware.CHIPS)}"
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


def objective(arguments: argparse.Namespace, convention: str, device: str | None = None):
    """The objective of those options, on `device` of several. Raises ConfigError for one that its cost has no use for."""
    from gqa_jax.search import objectives

    names = ("flops", "lam", "alpha", "beta", "n_devices", "parallelism", "batch", "decode_share", "ttft", "tpot",
             "disaggregated", "param_dtype", "cache_dtype", "efficiency", "training_mfu", "usd_per_hour", "tokens",
             "served_tokens", "convention")  # fmt: skip
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    named = devices(arguments)
    if device is None and len(named) > 1:
        raise ConfigError(f"--device {arguments.device}: one device here; `optimum` compares several")
    if named:
        given["device"] = device or named[0]
    if arguments.prices is not None:
        given["price"] = _price(arguments, given)
    if getattr(arguments, "fits", None) and arguments.cost not in ("latency", "throughput", "price", "lifetime"):
        for name in ("n_devices", "batch"):
            given.pop(name, None)  # of --fits
    if "convention" not in given and "convention" in objectives.settings(arguments.cost):
        if any(name in given for name in ("param_dtype", "cache_dtype")):
            convention = "exact"  # bytes are asked for
        given["convention"] = convention
    try:
        return objectives.make(arguments.cost, **given)
    except ValueError as error:
        raise ConfigError(f"--cost {arguments.cost}: {error}") from error


def devices(arguments: argparse.Namespace) -> list[str]:
    """The names of --device, in their order; none: it was not given."""
    return [name.strip() for name in (arguments.device or "").split(",") if name.strip()]


def _price(arguments: argparse.Namespace, given: dict) -> Price | None:
    """The row of --prices for a device. Raises ConfigError."""
    if "device" not in given:
        raise ConfigError(f"--prices {arguments.prices} given without a device: add --device")
    if arguments.usd_per_hour is not None:
        raise ConfigError(f"--prices {arguments.prices} or --usd_per_hour {arguments.usd_per_hour}: not both")
    try:
        listed = prices.load(arguments.prices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if given["device"] in hardware.CHIPS and given["device"] not in listed:
        raise ConfigError(f"--prices {arguments.prices}: {given['device']} has {prices.listing(given['device'])}")
    return listed.get(given["device"])


def _batch(text: str) -> int | str:
    """A number of requests, fits or best."""
    try:
        return int(text)
    except ValueError:
        return text  # RooflineServing says what there is


def _add_context(command: argparse.ArgumentParser, default: str = "that of least noise") -> None:
    summary = f"training context of the laws (default: {default})"
    command.add_argument("--train_context", type=_tokens, metavar="T", help=summary)


def _add_aspect(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("which models")
    group.add_argument(
        "--aspect", metavar="RATIO", help="d / L, width over layers: best (default: the cheapest of every draw, from half to "
        "twice the runs' own, with what it costs in loss), trained (as the runs), paper (its tables), or a number like 64",
    )  # fmt: skip
    group.add_argument(
        "--heads", nargs="+", type=_heads, metavar="H", help="only these, like 8,1 4,1 llama3 (default: all that have a law)"
    )


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


def _tokens(text: str) -> int:
    """131072, or 128K, or 1M."""
    try:
        return read_context(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _source(arguments: argparse.Namespace):
    from launch import studies

    if getattr(arguments, "preset", None):
        return studies.of_preset(arguments.preset)
    if arguments.grid.lower().endswith(TABLES):
        return studies.of_table(
            arguments.grid, arguments.columns, units=arguments.units, context=arguments.context_trained,
            heads_rule=arguments.heads_rule,
            allow_confounded=arguments.allow_confounded,
        )  # fmt: skip
    source = studies.of_grid(arguments.grid, arguments.root, rules=arguments.rules, allow_confounded=arguments.allow_confounded)
    if source.rules == rules.OLD and not source.asked:
        print(f"launch: {rules.SAID}", file=sys.stderr)
    return source


def _fit(arguments: argparse.Namespace, console: Console) -> int:
    from launch import grid_tables, studies

    source = _source(arguments)
    options = {}
    if arguments.free_entropy:
        options["shared_entropy"] = False
    for name in ("entropy", "huber_delta"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.free_entropy and arguments.entropy is not None:
        raise ConfigError("--free_entropy or --entropy: not both")
    fits = studies.fit(source, **options)
    first = fits.at(arguments.train_context)
    chosen = fits.fitted if arguments.train_context is None else [first]
    import pandas as pd

    from gqa_jax.search.answer import records

    tables = [grid_tables.fit_table(one) for one in chosen]
    if arguments.format == "csv":
        print(pd.concat(tables, ignore_index=True).to_csv(index=False), end="")
    elif arguments.format == "json":
        print(json.dumps(records(pd.concat(tables, ignore_index=True)), indent=1, allow_nan=False))
    elif arguments.format != "table":
        laws = [grid_tables.laws_of(one, table) for one, table in zip(chosen, tables, strict=True)]
        print("\n".join(one.text(arguments.format) for one in laws), end="")
    else:
        for one, table in zip(chosen, tables, strict=True):
            if one.laws.source:
                console.print(one.laws.source, highlight=False)
            grid_tables.print_laws(one, table, console, "--format json")
            grid_tables.print_checks(one, console)
        for context, why in fits.unfitted.items():
            console.print(f"trained at T = {context:,}: no fit: {why}", highlight=False)
    return 0


def _optimum(arguments: argparse.Namespace, console: Console) -> int:
    from gqa_jax.search import devices as devices_of
    from gqa_jax.search import objectives, optimum
    from gqa_jax.search.answer import records
    from gqa_jax.search.roofline import RooflineServing
    from launch import answers, studies

    source = _source(arguments)
    if arguments.conventions and arguments.format == "csv":
        raise ConfigError("--format csv has one table: leave out --conventions, or take another format")
    named = devices(arguments)
    goals = [objective(arguments, source.convention, name) for name in named or [None]]
    fits = studies.fit(source)
    one = fits.at(arguments.train_context)
    limit = None
    if arguments.fits:
        own = {name: getattr(arguments, name) for name in ("n_devices", "batch", "param_dtype", "cache_dtype")}
        limit = RooflineServing(arguments.fits, **{name: value for name, value in own.items() if value is not None})
    convention = arguments.convention or source.convention
    how = {"draws": arguments.draws, "seed": arguments.seed, "aspect": arguments.aspect, "heads": arguments.heads}
    limits = {"convention": convention, "memory_limit": limit, "method": arguments.method}
    also = [
        _of_runs(source, one, fits.reason if arguments.train_context is None else ""),
        *([] if limit is None else [_within(limit)]),
    ]
    if arguments.like is not None:
        return _like(arguments, source, one, goals, how | limits, also, console)
    question = one.laws, arguments.loss, arguments.context
    if len(goals) > 1:
        return _compare(arguments, source, one, devices_of.compare(*question, goals, **limits, **how), console, also)
    found = optimum.search(*question, goals[0], **limits, **how)
    other = None
    if arguments.conventions:
        weights = goals[0] if isinstance(goals[0], objectives.Z) else None
        own = {"memory_limit": limit, "method": arguments.method, "weights": weights}
        other = optimum.convention_sensitivity(*question, **own, **how)
    if arguments.format == "json":
        about = {"source": source.name, "train_context": one.context, "status": one.laws.status}
        more = {} if other is None else {"conventions": records(other)}
        print(json.dumps(about | found.to_dict() | more, indent=1, allow_nan=False))
        return 0
    _show(arguments, found, one, also, console, others=[] if other is None else [answers.conventions(other)])
    return 0


def _of_runs(source, one, reason: str) -> str:
    """Whose laws they are, and why those of this training context; empty: it was asked for, or there is no other."""
    if source.laws is not None:
        return f"laws of the preset {source.name}"
    return f"laws of the runs of {source.name} that were trained at {one.context:,} tokens" + f" ({reason})" * bool(reason)


def _within(limit) -> str:
    from gqa_jax import formatting

    room = formatting.gb(limit.chip.server_bytes)
    return f"within the {room} that a server fills of each of {limit.n_devices} x {limit.chip.name}"


def _show(arguments: argparse.Namespace, found, one, also: list[str], console: Console, about=(), others=()) -> None:
    """An answer as --format says. about: sentences that follow its first; others: tables that follow its own."""
    from launch import answers

    if arguments.format == "table":
        answers.print_answer(found, one, console, also, about)
        for table in others:
            console.print(table)
        return
    _print_as(arguments.format, [answers.headline(found, also), *about], [*answers.tables(found), *others])


def _print_as(form: str, sentences: list[str], tables) -> None:
    """An answer as a document, or its first table as data."""
    if form == "csv":
        print(tables[0].text(form), end="")
        return
    said = {"markdown": "{}".format, "latex": "% {}".format, "html": lambda text: f"<p>{html.escape(text, quote=False)}</p>"}
    print("\n\n".join([*map(said[form], sentences), *(one.text(form).rstrip() for one in tables)]))


def _like(arguments: argparse.Namespace, source, one, goals: list, how: dict, also: list[str], console: Console) -> int:
    """`optimum --like`: against a model that somebody has."""
    from gqa_jax.search import own_answer, own_model

    if arguments.conventions:
        raise ConfigError("--conventions is for a --loss: leave it out with --like")
    if len(goals) > 1:
        raise ConfigError(f"--device {arguments.device}: one device with --like")
    own = own_model.load(arguments.like)
    try:
        found = own_answer.compare_own(one.laws, own, arguments.context, goals[0], **how)
    except ValueError as error:
        raise ConfigError(f"--like {arguments.like}: {error}") from error
    if arguments.format == "json":
        about = {"source": source.name, "train_context": one.context, "status": one.laws.status}
        print(json.dumps(about | found.to_dict(), indent=1, allow_nan=False))
        return 0
    _show(arguments, found.answer, one, also, console, about=found.sentences())
    return 0


def _compare(arguments: argparse.Namespace, source, one, found, console: Console, also: list[str]) -> int:
    from gqa_jax.search.answer import records
    from launch import device_tables

    if arguments.conventions:
        raise ConfigError("--conventions is for one device: leave it out, or name one")
    if arguments.format == "json":
        about = {"source": source.name, "train_context": one.context, "status": one.laws.status}
        by_device = {name: each.to_dict() for name, each in found.answers.items()}
        tables = {"devices": records(found.table), "front": records(found.front)}
        print(json.dumps(about | tables | {"answers": by_device}, indent=1, allow_nan=False))
    elif arguments.format == "table":
        device_tables.print_comparison(found, console, also)
    else:
        _print_as(arguments.format, [device_tables.headline(found, also)], device_tables.tables(found))
    return 0


def _next(arguments: argparse.Namespace, console: Console) -> int:
    from launch import next_cells

    return next_cells.ask(arguments, _source(arguments), objective, console)


def _report(arguments: argparse.Namespace, console: Console) -> int:
    from launch import findings, report
    from launch.report import answer_map

    source = _source(arguments)
    given = {name: value for name, value in vars(arguments).items() if name in answer_map.OPTIONS and value is not None}
    found = findings.of(
        source,
        arguments.loss,
        arguments.context,
        objective(arguments, source.convention),
        console,
        arguments.aspect,
        arguments.heads,
        given,
    )
    path = report.write(findings.folder(source, arguments.out), found)
    console.print(f"{path}", highlight=False, soft_wrap=True)
    return 0
