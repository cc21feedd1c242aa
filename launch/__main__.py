"""`python -m launch plan|run|status|logs|retry|export GRID`: a grid of training runs, from plan to tables. Imports no jax."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from gqa_jax import prices, slices
from gqa_jax.config import ConfigError
from gqa_jax.metrics import write_json
from launch import answer, fit, grid, local, plan, state
from launch.fit import Fit
from launch.grid import Cell, Grid, Layout

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNFINISHED = 0, 1, 2, 3
PLAIN_SECONDS = 15.0  # between lines where there is no terminal

EPILOG = """
examples:
  python -m launch plan configs/grids/quickstart.py                 what it will cost, before anything starts
  python -m launch plan configs/grids/paper.py --topology v5e:4x4,h200:8 --estimate      and where it fits, hours, money
  python -m launch run configs/grids/quickstart.py                  train what is missing, then tables and pictures
  python -m launch status configs/grids/quickstart.py               what is done, running, failed and why
  python -m launch logs configs/grids/quickstart.py CELL --follow
  python -m launch retry configs/grids/quickstart.py                let `run` start failed cells again

exit codes: 0 done, 1 a cell failed or diverged, 2 bad input, 3 unfinished (status)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        the_grid = grid.load(arguments.grid)
        layout = Layout(Path(arguments.root or f"runs/{the_grid.name}"))
        return arguments.act(arguments, the_grid, grid.cells(the_grid), layout, _console())
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"launch: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("launch: stopped; the same command resumes", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, act, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("grid", metavar="GRID", help="a file of configs/grids/")
        command.add_argument("--root", metavar="DIR", help="folder of the grid (default: runs/NAME)")
        command.set_defaults(act=act)
        return command

    def add_where(command: argparse.ArgumentParser) -> None:
        command.add_argument("--where", metavar="FIELD=VALUE,...", help="only these cells, for example size=19M,n_heads=8")

    command = add("plan", _plan, "every cell with its parameters, tokens, FLOPs, memory and estimated time")
    add_where(command)
    command.add_argument("--format", choices=("table", "csv", "json"), default="table")
    command.add_argument("--flops_per_second", type=float, metavar="X", help="rate of the estimate (default: finished cells')")
    command.add_argument("--topology", metavar="NAME[,NAME...]", help="slices that are not here, as below: fits, hours, money")
    command.add_argument("--estimate", action="store_true", help="by arithmetic alone; else every step is compiled (kept)")
    command.add_argument("--prices", metavar="FILE", help='JSON or TOML, US dollars per chip-hour: {"v5e": 1.2}')
    command.add_argument("--efficiency", type=float, metavar="X", help="share of the roofline that is reached (default: 1)")
    command.add_argument("--workers", type=int, metavar="N", help="programs compiled at a time (default: one per CPU)")
    command.add_argument("--out", metavar="FILE", help="the table as .parquet or .csv")
    names = "; ".join(f"{chip}:{', '.join(shapes)}" for chip, shapes in slices.SHAPES.items())
    command.epilog = f"topologies: {names}. Hours are a lower bound: the roofline of each phase of a step, over --efficiency."
    command = add("run", _run, "train the cells that are missing on this machine, then export")
    add_where(command)
    command.add_argument("--topology", metavar="NAME", help="refuse cells whose compiled step does not fit this slice")
    command.add_argument("--slots", type=int, metavar="N", help="cells at a time (default: one per GPU, or per CPU)")
    command = add("status", _status, "state of every cell, and why cells failed")
    add_where(command)
    command.add_argument("--json", action="store_true", help="rows as JSON")
    command = add("logs", _logs, "what a cell printed")
    command.add_argument("cell", nargs="?", metavar="CELL", help="name of a cell, or its beginning (default: list them)")
    command.add_argument("--follow", "-f", action="store_true", help="go on until the cell ends")
    command = add("retry", _retry, "let `run` start failed and diverged cells again; what they left is kept aside")
    command.add_argument("cells", nargs="*", metavar="CELL", help="names of cells (default: all that failed)")
    add("export", _export, "loss and cost tables, fits, cheapest heads, pictures")
    return parser


def _console() -> Console:
    """A terminal as wide as it is; files and pipes get whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _plan(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    chosen = grid.select(cells, arguments.where)
    rate = arguments.flops_per_second or plan.measured_rate(cells, layout)
    frame = plan.table(chosen, _states(chosen, layout), rate)
    fits = _fits(arguments, chosen)
    if fits is not None:
        frame = plan.on_slices(frame, fits, prices.load(arguments.prices), arguments.efficiency or 1.0)
    if arguments.out:
        plan.write(frame, arguments.out)
    if arguments.format == "csv":
        print(frame.to_csv(index=False), end="")
    elif arguments.format == "json":
        print(frame.to_json(orient="records", indent=1))
    elif fits is not None:
        console.print(*plan.slices_screen(frame, f"{the_grid.name}: {len(chosen)} cells"))
        console.print(f"hours: at least, every phase at its roofline; --efficiency {arguments.efficiency or 1:g}")
    else:
        console.print(plan.screen(frame, f"{the_grid.name}: {len(chosen)} cells in {layout.root}"))
        source = "given" if arguments.flops_per_second else "reached by the finished cells"
        if rate:
            console.print(f"time: training FLOPs at {plan.short(rate)}FLOP/s ({source}), one cell after another")
        else:
            console.print("time: not known before a cell has finished here; --flops_per_second X estimates it")
    for name in sorted({cell.config.data.store for cell in chosen if cell.data_fingerprint is None}):
        print(f"launch: token store {name} is not prepared yet: the names of its cells will change", file=sys.stderr)
    return EXIT_DONE


def _fits(arguments, chosen: list[Cell]) -> list[Fit] | None:
    """Every cell on every slice asked for, compiled unless an estimate is asked for; None when none is."""
    if arguments.topology is None:
        for name in ("estimate", "prices", "efficiency", "workers"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name} needs --topology NAME: `python -m launch plan --help` lists them")
        return None
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        raise ConfigError(f"--efficiency {arguments.efficiency}: must be above 0 and at most 1")
    where = [slices.find(name) for name in dict.fromkeys(arguments.topology.split(","))]
    fits = [fit.estimate(cell, one) for cell in chosen for one in where]
    if not arguments.estimate:
        _prove(fits, arguments.workers)
    return fits


def _prove(fits: list[Fit], workers: int | None, exact: bool = False) -> None:
    """Compiles what was chosen, and shows how far it is on stderr."""
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    count = workers or len(os.sched_getaffinity(0))
    console = Console(stderr=True)
    started = spoken = time.monotonic()

    def changed(one: Fit, done: int, everything: int) -> None:
        nonlocal spoken
        now = time.monotonic()
        left = plan.duration((now - started) / done * (everything - done))
        verdict = "fits" if one.fits else "does not fit"
        line = f"{done} of {everything}, {left} left: {one.cell.name} {verdict} {one.slice.name}"
        bar.update(task, completed=done, description=line)
        if not console.is_terminal and (now - spoken > PLAIN_SECONDS or done == everything):
            spoken = now
            console.print(line, highlight=False, soft_wrap=True)

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"compiling, {count} at a time", total=len(fits))
        fit.prove(fits, count, changed, exact)


def _require_fit(arguments, todo: list[Cell], places: Sequence[local.Slot], console: Console) -> None:
    """Raises ConfigError when a cell does not fit where it would run, before anything is started."""
    gpus = [place for place in places if "CUDA_VISIBLE_DEVICES" in place.environment]
    where = slices.find(arguments.topology) if arguments.topology else fit.here(len(gpus))
    if where is None:
        fit.require_memory(todo, len(places))
        return
    fits = [fit.estimate(cell, where) for cell in todo]
    try:
        where.require_compiler()
    except ValueError as error:
        if arguments.topology:
            raise
        console.print(f"whether cells fit {where.name} is estimated: {error}", highlight=False)
    else:
        _prove(fits, None, exact=True)
    fit.require(fits)


def _run(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    places = local.slots(arguments.slots)
    chosen = grid.select(cells, arguments.where)
    for cell in chosen:
        if cell.data_fingerprint is None:
            raise ConfigError(
                f"token store {cell.config.data.store} is not there: make it with `python -m gqa_jax.data.prepare --out "
                f"{cell.config.data.store} ...`"
            )
    local.check_parents(chosen, layout)
    with local.only_launcher(layout):
        _write_plan(the_grid, cells, layout)
        before = dict(zip((cell.name for cell in chosen), _states(chosen, layout), strict=True))
        todo = [cell for cell in chosen if before[cell.name].runnable]
        console.print(
            f"{the_grid.name}: {len(chosen)} cells, {len(todo)} to train, {len(places)} at a time, in {layout.root}",
            highlight=False,
        )
        if todo:
            _require_fit(arguments, todo, places, console)
            with _Watch(console, chosen, layout) as watch:
                local.run(todo, layout, places, watch.update)
        states = _states(chosen, layout)
        _print_failures(chosen, states, layout, console)
        if any(s.state == "done" for s in _states(cells, layout)):
            _write_answer(layout, console)
    return EXIT_DONE if all(s.state == "done" for s in states) else EXIT_FAILED


def _status(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    chosen = grid.select(cells, arguments.where)
    states = _states(chosen, layout)
    if arguments.json:
        rows = [{"cell": cell.name} | dataclasses.asdict(s) for cell, s in zip(chosen, states, strict=True)]
        print(json.dumps(rows, indent=1))
    else:
        console.print(_table(chosen, states, the_grid.name))
        _print_failures(chosen, states, layout, console)
        strangers = sorted(set(_folders(layout)) - {cell.name for cell in cells})
        if strangers:
            console.print(f"{len(strangers)} folders in {layout.root}/cells are of no cell of this grid (it was changed since)")
    kinds = {s.state for s in states}
    if kinds & {"failed", "diverged", "stalled"}:
        return EXIT_FAILED
    return EXIT_DONE if kinds == {"done"} else EXIT_UNFINISHED


def _logs(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    if arguments.cell is None:
        for cell in cells:
            print(layout.cell(cell.name) / "log.txt")
        return EXIT_DONE
    (cell,) = _named([arguments.cell], cells)
    path = layout.cell(cell.name) / "log.txt"
    if not path.exists():
        raise ConfigError(f"{path} is not there: the cell has not been started here")
    with open(path, errors="replace") as file:
        while True:
            shutil.copyfileobj(file, sys.stdout)
            sys.stdout.flush()
            if not arguments.follow or not state.is_held(layout.cell(cell.name)):
                return EXIT_DONE
            time.sleep(0.5)


def _retry(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    with local.only_launcher(layout):
        chosen = _named(arguments.cells, cells) if arguments.cells else cells
        count = 0
        for cell, now in zip(chosen, _states(chosen, layout), strict=True):
            if now.state not in ("failed", "diverged"):
                if arguments.cells:
                    raise ConfigError(f"{cell.name} is {now.state}: only failed and diverged cells are retried")
                continue
            folder = layout.cell(cell.name)
            aside = folder / f"before-retry-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.mkdir()
            kept = ["exit.json", "result.json"] + (["checkpoints", "metrics"] if now.state == "diverged" else [])
            for name in kept:
                if (folder / name).exists():
                    (folder / name).rename(aside / name)
            count += 1
            print(f"{cell.name}: {now.state} ({now.failure or now.cause}); its records are in {aside}")
    print(f"{count} cells can run again: python -m launch run {shlex.quote(arguments.grid)}")
    return EXIT_DONE


def _export(arguments, the_grid: Grid, cells: list[Cell], layout: Layout, console: Console) -> int:
    states = _states(cells, layout)
    if not any(s.state in state.FINAL for s in states):
        raise ConfigError(f"no cell of {the_grid.name} has finished in {layout.root}: run it first")
    with local.only_launcher(layout):
        _write_plan(the_grid, cells, layout)
        _write_answer(layout, console)
    missing = sum(s.state not in state.FINAL for s in states)
    if missing:
        console.print(f"{missing} of {len(cells)} cells are not finished and not in the tables")
    return EXIT_DONE


def _write_plan(the_grid: Grid, cells: Sequence[Cell], layout: Layout) -> None:
    """config.json of every cell and grid.json, before anything starts."""
    for cell in cells:
        folder = layout.cell(cell.name)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", cell.config.to_dict())
    write_json(layout.root / "grid.json", grid.facts(the_grid, cells))


def _write_answer(layout: Layout, console: Console) -> None:
    loss, _ = answer.write_tables(layout)
    answer.answer(layout, loss, console)


def _states(cells: Sequence[Cell], layout: Layout) -> list[state.CellState]:
    now = time.time()
    return [state.of(layout.cell(cell.name), now) for cell in cells]


def _folders(layout: Layout) -> list[str]:
    cells = layout.root / "cells"
    return [folder.name for folder in cells.iterdir()] if cells.exists() else []


def _named(names: Sequence[str], cells: Sequence[Cell]) -> list[Cell]:
    found = []
    for name in names:
        matches = [cell for cell in cells if cell.name == name] or [cell for cell in cells if cell.name.startswith(name)]
        if len(matches) != 1:
            what = "no cell of the grid" if not matches else f"the beginning of {len(matches)} cells"
            raise ConfigError(f"{name!r} is {what}; `python -m launch status` lists them")
        found += matches
    return found


def _table(cells: Sequence[Cell], states: Sequence[state.CellState], title: str) -> Table:
    counts = defaultdict(int)
    for s in states:
        counts[s.state] += 1
    view = Table(
        title=f"{title}: " + ", ".join(f"{n} {name}" for name, n in counts.items()), title_justify="left", box=box.SIMPLE_HEAD
    )
    for name, justify in (
        ("cell", "left"),
        ("state", "left"),
        ("step", "right"),
        ("tok/s", "right"),
        ("ETA", "right"),
        ("loss", "right"),
    ):
        view.add_column(name, justify=justify, no_wrap=True)
    colors = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "stalled": "red"}
    for cell, s in zip(cells, states, strict=True):
        view.add_row(
            cell.name,
            f"[{colors.get(s.state, 'default')}]{s.state}[/]",
            "" if s.step is None else f"{s.step:,}/{cell.config.n_steps:,}",
            "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
            plan.duration(s.eta_seconds),
            "" if s.loss is None else f"{s.loss:.4f}",
        )
    return view


def _print_failures(cells: Sequence[Cell], states: Sequence[state.CellState], layout: Layout, console: Console) -> None:
    """One paragraph a cause: how many cells, what, the file to read, the command that repeats one here."""
    causes = defaultdict(list)
    for cell, s in zip(cells, states, strict=True):
        if s.state in ("failed", "diverged", "stalled"):
            causes[s.state, s.failure, s.cause].append(cell)
    for (kind, failure, cause), failed in causes.items():
        folder = layout.cell(failed[0].name)
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        name = kind if failure is None else f"{kind} ({failure})"
        console.print(f"[red]{name}[/]: {failed[0].name}{others}: {escape(str(cause))}", highlight=False)
        console.print(f"  read    {folder / 'log.txt'}", highlight=False, soft_wrap=True)
        console.print(f"  repeat  {shlex.join(local.command(failed[0], layout))}", highlight=False, soft_wrap=True)
        console.print("  again   python -m launch retry GRID, then run", highlight=False)
    for line in state.waiting([cell.name for cell in cells], states):
        console.print(line, highlight=False, soft_wrap=True)


class _Watch:
    """What `run` shows while cells train: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, cells: Sequence[Cell], layout: Layout):
        self._console, self._cells, self._layout = console, cells, layout
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._started, self._spoken, self._refreshed, self._ended = time.monotonic(), 0.0, 0.0, 0

    def __enter__(self) -> _Watch:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live:
            self._live.__exit__(*error)

    def update(self, running: Sequence[Cell], codes: dict[str, int]) -> None:
        now = time.monotonic()
        if self._live and now - self._refreshed > 1.0:
            self._refreshed = now
            states = _states(self._cells, self._layout)
            self._live.update(_table(self._cells, states, f"{plan.duration(now - self._started)}{self._eta(states)}"))
        if not self._live and (len(codes) > self._ended or now - self._spoken > PLAIN_SECONDS):
            self._spoken, self._ended = now, len(codes)
            states = _states(self._cells, self._layout)
            done = sum(s.state in state.FINAL for s in states)
            failed = sum(s.state == "failed" for s in states)
            names = ", ".join(cell.name for cell in running)
            elapsed = plan.duration(now - self._started)
            line = f"{elapsed}: {done} of {len(states)} done, {failed} failed{self._eta(states)}; {names}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _eta(self, states: Sequence[state.CellState]) -> str:
        """Time left, from the training FLOPs done since the start and those that remain."""
        flops = [cell.describe()["train_flops"] for cell in self._cells]
        share = [1.0 if s.state in state.FINAL else (s.step or 0) / (s.steps or 1) for s in states]
        if not hasattr(self, "_share"):
            self._share = share
        done = sum(f * (a - b) for f, a, b in zip(flops, share, self._share, strict=True))
        left = sum(f * (1 - a) for f, a in zip(flops, share, strict=True))
        elapsed = time.monotonic() - self._started
        return f", {plan.duration(elapsed * left / done)} left" if done > 0 else ""


if __name__ == "__main__":
    sys.exit(main())
