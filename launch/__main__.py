"""`python -m launch COMMAND GRID`: a grid of training runs, from plan to answer. `--help` lists the commands.

A command is a function of `launch.commands`, whose arguments are the options; here is what it is asked and how it is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import html
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console

from gqa_jax import hardware
from gqa_jax.config import HEAD_METHOD, HEAD_METHODS
from gqa_jax.errors import ConfigError, close
from gqa_jax.formatting import counted, usd
from gqa_jax.hardware import prices as price_list
from gqa_jax.training import signals
from launch import commands, money, options, screen, state
from launch.executors.base import RUNNING, SubmitError
from launch.grid_cells import TABLES

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNFINISHED = 0, 1, 2, 3
EXIT_TOLD = 75  # EX_TEMPFAIL of sysexits.h, as training

EPILOG = """
examples:
  python -m launch plan configs/grids/quickstart.py                 what it will cost, before anything starts
  python -m launch plan configs/grids/paper.py --topology v5e:4x4,h200:8 --estimate      and where it fits, hours, money
  python -m launch run configs/grids/quickstart.py                  train what is missing, then tables and pictures
  python -m launch run configs/grids/paper.py --on slurm --dry_run  what would be submitted to a cluster
  python -m launch run configs/grids/paper.py --on tpu --root gs://BUCKET/paper --watch
  python -m launch status configs/grids/quickstart.py               what is done, running, failed and why, and what it cost
  python -m launch logs configs/grids/quickstart.py CELL --follow
  python -m launch cancel configs/grids/paper.py CELL               end its job; what it saved stays
  python -m launch reap configs/grids/paper.py                      end machines that nobody needs any more
  python -m launch retry configs/grids/quickstart.py                let `run` start failed cells again
  python -m launch optimum --preset paper --context 128K --loss 2.615      the cheapest heads, from the paper's data
  python -m launch optimum configs/grids/quickstart.py --context 32K --loss 1.75      from your own runs
  python -m launch generate runs/quickstart/cells/NAME --prompt 'Fellow citizens'     what a trained model writes
  python -m launch benchmark-serving 3M:8,1 3M:8,8 --contexts 4K    what models take to serve on this machine
  python -m launch export-hf runs/quickstart/cells/NAME --out hf/NAME      for transformers, vLLM, mlx-lm, llama.cpp
  python -m launch report configs/grids/quickstart.py               everything that is known, as one HTML file

exit codes: 0 done (run on a cluster: submitted), 1 a cell failed or diverged, 2 bad input, 3 unfinished (status), 75 told to
end by SIGTERM or SIGHUP, 130 by Ctrl-C: cells of this machine have saved, the same command resumes; told again, it ends at once
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = vars(parser().parse_args(argv))
    act, warnings = arguments.pop("act"), _Warnings()
    logging.getLogger("launch").addHandler(warnings)
    try:
        with signals.noted((signal.SIGTERM, signal.SIGHUP), _told):
            return act(_console(), **arguments)
    except SubmitError as error:
        print(f"launch: the engine does not answer: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"launch: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    except _Told as told:
        print(f"launch: told to end ({told}); the same command resumes", file=sys.stderr)
        return EXIT_TOLD
    except KeyboardInterrupt:
        print("launch: stopped; the same command resumes", file=sys.stderr)
        return 130
    finally:
        logging.getLogger("launch").removeHandler(warnings)


class _Told(KeyboardInterrupt):
    """SIGTERM or SIGHUP: what runs here ends as at Ctrl-C, so that cells can save."""


def _told(by: signal.Signals) -> NoReturn:
    raise _Told(signals.NAMES[by])


class _Warnings(logging.Handler):
    """What commands log, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"launch: {record.getMessage()}", file=sys.stderr)


def _console() -> Console:
    """A terminal as wide as it is; files and pipes get whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=140)


# What is asked


class _Command(argparse.ArgumentParser):
    """The parser of a command, which gets its options when it is used: some lists of choices take a second to import.

    Options and other arguments come in any order, and `--dry-run` is `--dry_run`.
    """

    def __init__(self, *args: Any, fill: Callable[[argparse.ArgumentParser], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._fill: Callable | None = fill

    def parse_known_args(self, args=None, namespace=None):
        if self._fill is None:  # one of the two passes of parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        fill, self._fill = self._fill, None
        fill(self)
        found, unknown = self.parse_known_intermixed_args([*map(_underscored, args)], namespace)
        if unknown:
            meant = next((close(name, self._option_string_actions) for name in unknown if name.startswith("--")), None)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f': did you mean {meant}?' if meant else ''}")
        return found, unknown


def _underscored(argument: str) -> str:
    """`--dry-run` as `--dry_run`."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def parser() -> argparse.ArgumentParser:
    """Of the command line; `act` of what it parses is what to call with a console and the other arguments."""
    found = argparse.ArgumentParser(
        prog="python -m launch",
        description="A grid of training runs, from plan to tables.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = found.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    for fill, act, summary in (
        (_fill_plan, _plan, "every cell with its parameters, tokens, FLOPs, memory and estimated time"),
        (_fill_run, _run, "train the cells that are missing, here or on a cluster, then export; the same command resumes"),
        (_fill_status, _status, "state of every cell, what it cost, and why cells failed"),
        (_fill_logs, _logs, "what a cell printed"),
        (_fill_cancel, _cancel, "end the jobs of cells; what they saved stays, and `run` goes on from there"),
        (
            _fill_reap,
            _reap,
            "end what has machines and is of no use: jobs of cells that are over, silent, or removed",
        ),
        (_fill_retry, _retry, "let `run` start failed and diverged cells again; what they left is kept aside"),
        (_fill_export, _export, "loss and cost tables, fits, cheapest heads, pictures"),
        (_fill_fit, _fit, "the laws L(N; H) of finished runs, with intervals, checks and warnings"),
        (
            _fill_optimum,
            _optimum,
            "the cheapest heads and shape for a loss (or what your own model reaches) and a served context, and how sure that "
            "is",
        ),
        (_fill_next, _next, "the runs that would make the answer surer, within a budget, as a grid file for `run`"),
        (_fill_generate, _generate, "what a trained model writes: to a terminal as it comes, to a pipe as JSON lines"),
        (
            _fill_benchmark_serving,
            _benchmark_serving,
            "what models take to serve on this machine, and with --fit its numbers for --device FILE",
        ),
        (_fill_export_hf, _export_hf, "a trained model as a folder that transformers, vLLM, mlx-lm, llama.cpp open"),
        (_fill_import_hf, _import_hf, "a model of such a folder (Llama class), to generate from, train on, compare with"),
        (
            _fill_convert_heads,
            _convert_heads,
            "a trained model with fewer key/value heads (or more, or fewer query heads), and its loss before and after",
        ),
        (_fill_report, _report, "one HTML file with the answer, its certainty, tables, pictures and an explorer"),
    ):
        verbs.add_parser(act.__name__[1:].replace("_", "-"), help=summary, description=summary, fill=fill).set_defaults(act=act)
    return found


def _fill_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="folder of a run that is done, or of imported parameters; local or gs://")
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="what it goes on from")
    asked.add_argument("--prompts", metavar="FILE", help="a file with a prompt a line; .jsonl: text or ids; -: stdin")
    command.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="most tokens of an answer (default: 128)")
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (default)")
    command.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    command.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that make up P")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    command.add_argument("--context", type=options.tokens, metavar="T", help="most tokens of both (default: as trained)")
    command.add_argument("--cache_dtype", metavar="D", help="float32, bfloat16 or int8 (default: the model's dtype)")
    command.add_argument("--dtype", metavar="D", help="of the computation (default: the model's; CPUs are fastest in float32)")
    command.add_argument("--mesh", metavar="AXES", help="devices that share the model, as tensor=4,context=2")
    command.add_argument("--tokenizer", metavar="NAME", help="where none is kept with it: bytes, gpt2, hub:NAME, a file")
    command.epilog = (
        "Answers end at the end of a document. Example: python -m launch generate runs/quickstart/cells/NAME --prompt 'Fellow "
        "citizens' --temperature 0.8 --seed 1 (docs/generation.md)"
    )


def _fill_benchmark_serving(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models", nargs="*", metavar="RUN|SHAPE", help="a run's folder, or random weights: 12x768:8,1 (layers x width : query, "
        "key/value heads), 470M:8,1 (of the paper), a public model or its config.json (default with --fit: two of its own)",
    )  # fmt: skip
    command.add_argument(
        "--contexts", type=options.several(options.tokens), metavar="T,...", help="tokens of a prompt and its answer, like "
        "1K,16K (default: three that suit the device)",
    )  # fmt: skip
    command.add_argument(
        "--batches", type=options.several(int), metavar="B,...", help="requests served at once (default: 1; with --fit 1,2,8)"
    )
    command.add_argument("--new_tokens", type=int, default=32, metavar="N", help="of every answer (default: 32)")
    command.add_argument("--dtype", metavar="D", help="of the computation (default: a run's; else bfloat16, float32 on CPUs)")
    command.add_argument("--cache_dtype", metavar="D", help="float32, bfloat16 or int8 (default: that of the computation)")
    command.add_argument("--mesh", metavar="AXES", help="devices that share a model, as tensor=4,context=2")
    command.add_argument(
        "--device",
        metavar="NAME|FILE",
        help="what times are set beside: a data sheet or a file of --fit (default: what is here)",
    )
    command.add_argument("--fit", metavar="FILE", help="write what is found of this device there, for --device FILE elsewhere")
    command.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="turns of reading prompts and answering (default: 3)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and prompts (default: 0)")
    command.add_argument("--out", metavar="FILE", help="all columns as .parquet or .csv")
    options.add_format(command)
    command.epilog = (
        "A closed batch: all prompts at once, then a loop on the device; programs are compiled and run once before anything is "
        "timed. Example: python -m launch benchmark-serving 3M:8,1 3M:8,8 --contexts 1K,4K (docs/serving-cost.md)"
    )


def _fill_export_hf(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="folder of a run that is done, or of imported parameters; local or gs://")
    command.add_argument("--out", required=True, metavar="DIR", help="a new local folder")
    command.add_argument("--dtype", metavar="D", help="float32 or bfloat16, of the arrays (default: that of the parameters)")
    command.epilog = (
        "Needs neither torch nor transformers. Example: python -m launch export-hf runs/quickstart/cells/NAME --out hf/NAME "
        "(docs/elsewhere.md)"
    )


def _fill_import_hf(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a local folder with config.json and safetensors (hf download NAME)")
    command.add_argument("--out", required=True, metavar="RUN", help="a new folder, local or on gs://")
    command.epilog = (
        "Llama, and Mistral and Ministral without windows; what computes otherwise is refused by its field. Example: python -m "
        "launch import-hf SmolLM2-135M --out imports/smollm2 (docs/bring-a-model.md)"
    )


def _fill_convert_heads(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="folder of a run that is done, or of imported parameters; local or gs://")
    command.add_argument("--n_kv_heads", type=int, metavar="K", help="key/value heads (default: as many as there)")
    command.add_argument("--n_heads", type=int, metavar="N", help="query heads: those that write most (default: all)")
    command.add_argument(
        "--method",
        choices=HEAD_METHODS,
        default=HEAD_METHOD,
        help=f"what becomes of a group of key/value heads (default: {HEAD_METHOD})",
    )
    command.add_argument("--out", required=True, metavar="RUN2", help="a new folder, local or on gs://")
    command.add_argument("--store", metavar="NAME", help="token store of the losses (default: the run's own)")
    command.epilog = (
        "The new folder is imported parameters: generate from it, export it, train it on. Example: python -m launch "
        "convert-heads runs/quickstart/cells/NAME --n_kv_heads 1 --out runs/fewer (docs/fewer-heads.md)"
    )


def _fill_plan(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, where=True)
    command.add_argument("--format", choices=("table", "csv", "json"), default="table")
    options.add_rows(command)
    command.add_argument("--flops_per_second", type=float, metavar="X", help="rate of the estimate (default: finished cells')")
    command.add_argument("--topology", metavar="NAME[,NAME...]", help="slices that are not here, as below: fits, hours, money")
    command.add_argument("--estimate", action="store_true", help="by arithmetic alone; else every step is compiled (kept)")
    command.add_argument("--prices", metavar="ROW|FILE", help=options.WHOSE_PRICES)
    command.add_argument(
        "--efficiency", type=float, metavar="X", help="hours at this share of the roofline (default: measured, else expected)"
    )
    command.add_argument("--explain", metavar="CELL", help="where a step's time goes, by phase: needs --topology")
    command.add_argument("--workers", type=int, metavar="N", help="programs compiled at a time (default: one per CPU)")
    command.add_argument("--out", metavar="FILE", help="the table as .parquet or .csv")
    command.epilog = (
        f"topologies: {hardware.listing()}. At least: the roofline of each phase of a step. Hours: what compiled programs' "
        "kernels add up to, unless --efficiency is given."
    )


def _fill_run(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, where=True, on="where the grid was last run, else local")
    command.add_argument("--watch", action="store_true", help="go on until all that can finish has: submit again what was lost")
    command.add_argument("--dry_run", action="store_true", help="show exactly what would be submitted; nothing is written")
    command.add_argument("--json", action="store_true", help="with --dry_run: every submission, whole")
    command.add_argument("--topology", metavar="NAME", help="slice that every cell must fit (default: the cluster file's)")
    command.add_argument("--slots", type=int, metavar="N", help="local: cells at a time (default: one per GPU, or per CPU)")
    command.add_argument(
        "--max_usd", type=float, metavar="X", help="submit no cell that leads beyond X US dollars, spent ones included; with "
        "--watch, or locally, end all cells at X: they can be resumed",
    )  # fmt: skip
    command.add_argument(
        "--notify", metavar="COMMAND", help="told of the first failure, the first stall, a spent budget and the end: it is run "
        "by a shell with a JSON object on its standard input",
    )  # fmt: skip
    command.add_argument(
        "--prices", metavar="ROW|FILE", help=f"{options.WHOSE_PRICES}; default: list prices in the engine's terms"
    )
    command.epilog = (
        "--on reads configs/clusters/ENGINE.toml: copy it, fill it in, and give your file. Cells that were preempted, killed "
        "or lost are started again; out of memory, bad configuration, errors and diverged losses only after `retry`."
    )


def _fill_status(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, where=True, on=options.LAST_RUN)
    options.add_rows(command)
    command.add_argument("--json", action="store_true", help="rows as JSON")
    command.add_argument("--prices", metavar="ROW|FILE", help=options.WHOSE_PRICES)


def _fill_logs(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, on=options.LAST_RUN)
    command.add_argument("cell", nargs="?", metavar="CELL", help="name of a cell, or its beginning (default: list them)")
    command.add_argument("--follow", "-f", action="store_true", help="go on until the cell ends")


def _fill_cancel(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, where=True, on=options.LAST_RUN)
    command.add_argument("cells", nargs="*", metavar="CELL", help="names of cells (default: all that are queued or running)")


def _fill_reap(command: argparse.ArgumentParser) -> None:
    options.add_grid(command, on=options.LAST_RUN)
    command.add_argument("--dry_run", action="store_true", help="only say what would be ended")
    command.epilog = "Asked twice it ends nothing twice, and it asks nobody: fit for cron. Its last line is a count."


def _fill_retry(command: argparse.ArgumentParser) -> None:
    options.add_grid(command)
    command.add_argument("cells", nargs="*", metavar="CELL", help="names of cells (default: all that failed)")


def _fill_export(command: argparse.ArgumentParser) -> None:
    options.add_grid(command)
    options.add_confounded(command)
    options.add_table(command)


def _fill_fit(command: argparse.ArgumentParser) -> None:
    options.add_source(command)
    options.add_train_context(command, "all")
    command.add_argument("--free_entropy", action="store_true", help="an E per head configuration instead of one for all")
    command.add_argument("--entropy", type=float, metavar="E", help="E, given instead of fitted, nats per token")
    command.add_argument("--huber_delta", type=float, metavar="D", help="residuals beyond D nats count linearly")
    options.add_format(command)


def _fill_optimum(command: argparse.ArgumentParser) -> None:
    options.add_source(command)
    command.add_argument(
        "--context", type=options.tokens, required=True, metavar="T", help="tokens served, like 131072 or 128K"
    )
    goal = command.add_mutually_exclusive_group(required=True)
    goal.add_argument("--loss", type=float, metavar="L", help="loss that must be reached, nats per token")
    goal.add_argument(
        "--like", metavar="MODEL", help="instead of a loss: what your model would reach, trained like the runs; a config.json "
        "of Hugging Face (Llama class), its folder, or a name like llama-3.2-1b (docs/own-model.md)",
    )  # fmt: skip
    options.add_train_context(command)
    options.add_objective(command)
    options.add_aspect(command)
    command.add_argument(
        "--fits", metavar="DEVICE", help="only models whose parameters and caches fit DEVICE (--n_devices of it)"
    )
    command.add_argument("--draws", type=int, default=1000, metavar="N", help="of the laws' coefficients (default: 1000)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    command.add_argument(
        "--method", choices=options.METHODS, help="of the draws (default: posterior, which allows for shared noise and bends)"
    )
    command.add_argument("--conventions", action="store_true", help="also what the answer would be in every convention of Z")
    options.add_format(command)
    command.epilog = (
        "example: python -m launch optimum --preset paper --context 131072 --loss 2.615. Memory only: --cost memory; FLOPs "
        "only: --cost flops; on a device: --cost latency --device h200 --batch 8; against a model: --like llama-3.2-1b"
    )


def _fill_next(command: argparse.ArgumentParser) -> None:
    options.add_source(command, needs_grid=True)
    command.add_argument(
        "--context", type=options.tokens, required=True, metavar="T", help="tokens served, like 131072 or 128K"
    )
    command.add_argument("--loss", type=float, required=True, metavar="L", help="loss that must be reached, nats per token")
    command.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="of training, for all of them")
    options.add_train_context(command)
    options.add_objective(command)
    command.add_argument("--aspect", metavar="RATIO", help="d / L of the models, as for optimum (default: best)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws and simulated losses (default: 0)")
    command.add_argument("--out", metavar="FILE", help="the grid file that is written (default: GRID-next.py beside GRID)")


def _fill_report(command: argparse.ArgumentParser) -> None:
    options.add_source(command)
    command.add_argument(
        "--context", type=options.tokens, metavar="T", help="of the question that it opens with (default: the longest)"
    )
    command.add_argument("--loss", type=float, metavar="L", help="of that question (default: the grid's, or what was reached)")
    command.add_argument(
        "--out",
        metavar="DIR",
        help="folder that it is written to (default: report/ in GRID's folder, TABLE-report or runs/PRESET)",
    )
    options.add_objective(command)
    options.add_aspect(command)


# How it is shown: each takes what its parser gives, and returns the exit code


def _plan(console: Console, *, format: str, out: str | None, **asked: Any) -> int:
    found = commands.plan(_cells(asked, offline=True), **asked, progress=screen.Watch(console, {}))
    if out:
        from launch import plan

        plan.write(found.frame, out)
    if format == "csv":
        print(found.frame.to_csv(index=False), end="")
    elif format == "json":
        print(found.frame.to_json(orient="records", indent=1))
    else:
        for view in found.tables:
            console.print(view)
            console.print()
        for sentence in found.sentences:
            console.print(sentence, highlight=False, soft_wrap=True)
    return EXIT_DONE


def _run(console: Console, *, json: bool, **asked: Any) -> int:
    if json and not asked["dry_run"]:
        raise ConfigError("--json needs --dry_run; what runs is shown by `python -m launch status GRID --json`")
    with screen.Watch(console, price_list.load(asked["prices"])) as watch:
        found = commands.run(_cells(asked, offline=asked["dry_run"]), **asked, progress=watch)
    cells = found.cells
    if found.last is None:
        _show_submissions(found, console, json)
        return EXIT_DONE
    screen.print_failures(found.chosen, found.last.states, cells.layout, found.engine, cells.about, console)
    if found.last.active:
        submitted = f"{counted(len(found.last.submitted), 'cell')} submitted, {found.last.active} on {found.engine.engine}"
        console.print(f"{submitted}: python -m launch status {cells.about}", highlight=False, soft_wrap=True)
        return EXIT_FAILED if any(now.state in state.BAD for now in found.last.states) else EXIT_DONE
    everything = found.last if found.chosen == cells.all else commands.status(cells).now
    if any(now.state == "done" for now in everything.states):
        _show_exported(dataclasses.replace(commands.export(cells), notes=[]), console)
    return EXIT_DONE if all(now.state == "done" for now in found.last.states) else EXIT_FAILED


def _show_submissions(found: commands.Run, console: Console, as_json: bool) -> None:
    submissions, layout = found.submissions, found.cells.layout
    if as_json:
        _print_json([dataclasses.asdict(one) for one in submissions], allow_nan=True)
        return
    those = f"{len(submissions)} of {counted(len(found.chosen), 'cell')}"
    title = f"{found.cells.name}: {those} would be submitted to {found.engine.engine}, in {layout.root}"
    console.print(title, highlight=False, soft_wrap=True)
    if submissions and found.rate is not None:
        console.print(_bill(found), highlight=False, soft_wrap=True)
    for one in submissions:
        print(one.command)
    for name, text in submissions[0].files.items() if submissions else ():
        print(f"\n--- {layout.cell(submissions[0].cell) / name}\n{text.rstrip()}")
    if submissions and submissions[0].files:
        print("\nthe others differ in their names and settings: --json prints them all")


def _bill(found: commands.Run) -> str:
    """What the cells of a dry run would cost."""
    known = money.expected(found.todo, found.engine, found.rate)
    left = len(found.todo) - len(known)
    all_of = f"; in all about {usd(sum(known.values()))} by arithmetic" if known else ""
    return f"each costs {found.rate.said()}{all_of}" + (f", without {counted(left, 'cell')} of no known time" if left else "")


def _status(console: Console, *, json: bool, rows: bool, **asked: Any) -> int:
    found = commands.status(_cells(asked), **asked)
    cells, now = found.cells, found.now
    if json:
        _print_json(found.rows(), allow_nan=True)
    else:
        console.print(screen.table(now.cells, now.states, cells.name, found.prices, rows))
        screen.print_failures(now.cells, now.states, cells.layout, found.engine, cells.about, console)
        screen.print_pass(now, console)
        screen.print_bill(now, found.rate, console)
        _print_lines([*screen.unlike_given(now.cells, now.states, found.engine), *cells.strangers()], console)
    kinds = {one.state for one in now.states}
    if kinds & set(state.BAD) or now.jobs.listed is None:
        return EXIT_FAILED
    return EXIT_DONE if kinds == {"done"} else EXIT_UNFINISHED


def _logs(_: Console, *, cell: str | None, follow: bool, **asked: Any) -> int:
    if cell is None:
        for path in commands.log_files(_cells(asked), **asked):
            print(path)
        return EXIT_DONE
    for text in commands.logs(_cells(asked), cell, follow=follow, **asked):
        print(text, end="", flush=True)
    return EXIT_DONE


def _cancel(_: Console, **asked: Any) -> int:
    jobs, engine = commands.cancel(_cells(asked), **asked)
    for job in jobs:
        print(f"{job.cell}: cancelled ({job.id}{', it ran' if job.state == RUNNING else ''})")
    print(f"{counted(len(jobs), 'cell')} cancelled on {engine}; what they saved stays")
    return EXIT_DONE


def _reap(_: Console, *, dry_run: bool, **asked: Any) -> int:
    said = commands.reap(_cells(asked), **asked, dry_run=dry_run)
    for line in said:
        print(line)
    print(f"{counted(len(said), 'job')} {'would be ' if dry_run else ''}ended")
    return EXIT_DONE


def _retry(_: Console, **asked: Any) -> int:
    cells, moved = commands.retry(_cells(asked), **asked)
    for name, (now, aside) in moved.items():
        print(f"{name}: {now.state} ({now.failure or now.cause}); its records are in {aside}")
    print(f"{counted(len(moved), 'cell')} can run again: python -m launch run {cells.about}")
    return EXIT_DONE


def _generate(_: Console, *, run: str, prompt: str | None, prompts: str | None, **asked: Any) -> int:
    given = [prompt] if prompts is None else commands.read_prompts(prompts)
    if sys.stdout.isatty() and prompt is not None:
        shown = ""
        print(prompt, end="", flush=True)
        for found in commands.stream(run, given, **asked):
            text = found[0].text.rstrip("\ufffd")  # a character of which a part is missing still
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        return EXIT_DONE
    for one in commands.generate(run, given, **asked):
        print(json.dumps(one.to_dict(), ensure_ascii=False))
    return EXIT_DONE


def _benchmark_serving(console: Console, *, format: str, out: str | None, **asked: Any) -> int:
    rows: dict[Any, dict[str, Any]] = {}

    def tell(row: dict[str, Any]) -> None:
        rows[row["model"], row["context"], row["batch"]] = row
        what = f"{row['model']}, T = {row['context']:,}, B = {row['batch']}"
        said = row["note"] or f"TTFT {row['ttft']:.3g} s, TPOT {row['tpot']:.3g} s"
        print(f"{what}: {said}", file=sys.stderr, flush=True)

    if out is not None and not out.endswith((".parquet", ".csv")):
        raise ConfigError(f"--out {out}: must end in .parquet or .csv")
    from launch import plan

    try:
        found = commands.benchmark_serving(**asked, measured=tell)
    except BaseException:  # interrupted, or no fit: what was measured until then
        if out is not None and rows:
            import pandas as pd

            plan.write(pd.DataFrame(rows.values()), out)
        raise
    if out is not None:
        plan.write(found.frame, out)
    if format == "json":
        from gqa_jax.search.answer import records

        _print_json(records(found.frame))
    elif format == "csv":
        print(found.frame.to_csv(index=False), end="")
    elif format != "table":
        print(found.table().text(format), end="")
    else:
        console.print(found.table())
        _print_lines(found.sentences(), console)
    return EXIT_DONE


def _export_hf(console: Console, **asked: Any) -> int:
    _print_lines(commands.export_hf(**asked).sentences(), console)
    return EXIT_DONE


def _import_hf(console: Console, **asked: Any) -> int:
    _print_lines(commands.import_hf(**asked).sentences(), console)
    return EXIT_DONE


def _convert_heads(console: Console, **asked: Any) -> int:
    _print_lines(commands.convert_heads(**asked).sentences(), console)
    return EXIT_DONE


def _export(console: Console, *, allow_confounded: bool, **asked: Any) -> int:
    if asked["grid"].lower().endswith(TABLES):
        found = commands.export(commands.open_source(**asked, allow_confounded=allow_confounded))
    else:
        found = commands.export(commands.open_cells(**asked), allow_confounded=allow_confounded)
    _show_exported(found, console)
    return EXIT_DONE


def _show_exported(found, console: Console) -> None:
    from launch import export

    export.show(found, console)


def _fit(console: Console, *, format: str, **asked: Any) -> int:
    from launch import grid_tables

    found = commands.fit(_opened(asked), **asked)
    tables = found.tables()
    if format in ("csv", "json"):
        import pandas as pd

        from gqa_jax.search.answer import records

        frame = pd.concat(tables, ignore_index=True)
        print(frame.to_csv(index=False), end="") if format == "csv" else _print_json(records(frame))
    elif format != "table":
        laws = [grid_tables.laws_of(one, table, "") for one, table in zip(found.chosen, tables, strict=True)]
        print("\n".join(one.text(format) for one in laws), end="")
    else:
        for one, table in zip(found.chosen, tables, strict=True):
            if one.laws.source:
                console.print(one.laws.source, highlight=False)
            grid_tables.print_laws(one, table, console, "--format json")
            grid_tables.print_checks(one, console)
        for context, why in found.fits.unfitted.items():
            console.print(f"trained at T = {context:,}: no fit: {why}", highlight=False)
    return EXIT_DONE


def _optimum(console: Console, *, format: str, **asked: Any) -> int:
    from gqa_jax.search.devices import Comparison
    from gqa_jax.search.own_answer import OwnAnswer
    from launch import answers, device_tables

    if asked["conventions"] and format == "csv":
        raise ConfigError("--format csv has one table: leave out --conventions, or take another format")
    found = commands.optimum(_opened(asked), **asked)
    of_devices = isinstance(found.found, Comparison)
    if format == "json":
        _print_json(found.to_dict())
    elif of_devices and format == "table":
        device_tables.print_comparison(found.found, console, found.also)
    elif of_devices:
        _print_document(format, [device_tables.headline(found.found, found.also)], device_tables.tables(found.found))
    else:
        answer, about = found.found, []
        if isinstance(answer, OwnAnswer):
            answer, about = answer.answer, answer.sentences()
        others = [] if found.conventions is None else [answers.conventions(found.conventions)]
        if format == "table":
            answers.print_answer(answer, found.laws, console, found.also, about)
            for table in others:
                console.print(table)
        else:
            sentences = [answers.headline(answer, found.also), *about]
            _print_document(format, sentences, [*answers.tables(answer), *others])
    return EXIT_DONE


def _next(console: Console, **asked: Any) -> int:
    from launch import next_cells

    next_cells.show(commands.next(_opened(asked), **asked), console)
    return EXIT_DONE


def _report(console: Console, **asked: Any) -> int:
    console.print(f"{commands.report(_opened(asked), **asked)}", highlight=False, soft_wrap=True)
    return EXIT_DONE


def _opened(asked: dict[str, Any]) -> Any:
    """The source that the options name, which are taken out of `asked`."""
    names = ("grid", "preset", "root", "rules", "columns", "units", "context_trained", "heads_rule", "allow_confounded")
    return commands.open_source(**{name: asked.pop(name) for name in names if name in asked})


def _cells(asked: dict[str, Any], offline: bool = False) -> commands.Cells:
    """The cells that the options name, which are taken out of `asked`."""
    return commands.open_cells(*(asked.pop(name) for name in ("grid", "root", "rules")), offline=offline)


def _print_document(form: str, sentences: list[str], tables: list) -> None:
    """An answer as a document, or its first table as data."""
    if form == "csv":
        print(tables[0].text(form), end="")
        return
    said = {"markdown": "{}".format, "latex": "% {}".format, "html": lambda text: f"<p>{html.escape(text, quote=False)}</p>"}
    print("\n\n".join([*map(said[form], sentences), *(one.text(form).rstrip() for one in tables)]))


def _print_json(value: Any, allow_nan: bool = False) -> None:
    print(json.dumps(value, indent=1, allow_nan=allow_nan))


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    gc.set_threshold(100_000)  # of objects made: a large grid's all live, and to look for others took an eighth of the time
    sys.exit(main())
