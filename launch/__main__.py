"""`python -m launch COMMAND GRID`: a grid of training runs, from plan to answer. `--help` lists the commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from etils import epath
from rich.console import Console
from rich.progress import Progress

from gqa_jax import hardware, prices, storage
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted, duration, si
from launch import analysis, fit, grid, rules, run, screen, state, training_cells
from launch.cells import Cell, Layout
from launch.executors import base
from launch.executors.base import DEAD, RUNNING, Executor, SubmitError
from launch.fit import Fit
from launch.rules import Choice

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNFINISHED = 0, 1, 2, 3
WHOSE_PRICES = 'words of a list price, as "google:spot", or a .json or .toml file of your own (docs/prices.md)'

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
  python -m launch retry configs/grids/quickstart.py                let `run` start failed cells again
  python -m launch optimum --preset paper --context 128K --loss 2.615      the cheapest heads, from the paper's data
  python -m launch optimum configs/grids/quickstart.py --context 32K --loss 1.75      from your own runs
  python -m launch report configs/grids/quickstart.py               everything that is known, as one HTML file

exit codes: 0 done (run on a cluster: submitted), 1 a cell failed or diverged, 2 bad input, 3 unfinished (status)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if hasattr(arguments, "ask"):
            return analysis.ask(arguments, _console())
        if analysis.is_table(arguments):
            return analysis.export_table(arguments, _console())
        the_grid = grid.load(arguments.grid)
        layout = Layout(storage.path(arguments.root or f"runs/{the_grid.name}"))
        return arguments.act(arguments, rules.choose(the_grid, layout, arguments.rules), layout, _console())
    except SubmitError as error:
        print(f"launch: the engine does not answer: {error}", file=sys.stderr)
        return EXIT_FAILED
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
        prog="python -m launch",
        description="A grid of training runs, from plan to tables.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, act, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("grid", metavar="GRID", help="a file of configs/grids/")
        command.add_argument("--root", metavar="DIR", help="folder of the grid, or gs://BUCKET/FOLDER (default: runs/NAME)")
        command.add_argument("--rules", choices=(rules.OLD, rules.NEW), help=rules.HELP)
        command.set_defaults(act=act)
        return command

    def add_where(command: argparse.ArgumentParser) -> None:
        command.add_argument("--where", metavar="FIELD=VALUE,...", help="only these cells, for example size=19M,n_heads=8")

    def add_on(command: argparse.ArgumentParser, default: str) -> None:
        engines = ", ".join(base.ENGINES)
        command.add_argument("--on", metavar="ENGINE", help=f"{engines}, or a cluster file (.toml); default: {default}")

    command = add("plan", _plan, "every cell with its parameters, tokens, FLOPs, memory and estimated time")
    add_where(command)
    command.add_argument("--format", choices=("table", "csv", "json"), default="table")
    command.add_argument("--flops_per_second", type=float, metavar="X", help="rate of the estimate (default: finished cells')")
    command.add_argument("--topology", metavar="NAME[,NAME...]", help="slices that are not here, as below: fits, hours, money")
    command.add_argument("--estimate", action="store_true", help="by arithmetic alone; else every step is compiled (kept)")
    command.add_argument("--prices", metavar="ROW|FILE", help=WHOSE_PRICES)
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
    command = add("run", _run, "train the cells that are missing, here or on a cluster, then export; the same command resumes")
    add_where(command)
    add_on(command, "where the grid was last run, else local")
    command.add_argument("--watch", action="store_true", help="go on until all that can finish has: submit again what was lost")
    command.add_argument("--dry_run", action="store_true", help="show exactly what would be submitted; nothing is written")
    command.add_argument("--json", action="store_true", help="with --dry_run: every submission, whole")
    command.add_argument("--topology", metavar="NAME", help="slice that every cell must fit (default: the cluster file's)")
    command.add_argument("--slots", type=int, metavar="N", help="local: cells at a time (default: one per GPU, or per CPU)")
    command.epilog = (
        "--on reads configs/clusters/ENGINE.toml: copy it, fill it in, and give your file. Cells that were preempted, killed "
        "or lost are started again; out of memory, bad configuration, errors and diverged losses only after `retry`."
    )
    command = add("status", _status, "state of every cell, what it cost, and why cells failed")
    add_where(command)
    add_on(command, "where it was last run")
    command.add_argument("--json", action="store_true", help="rows as JSON")
    command.add_argument("--prices", metavar="ROW|FILE", help=WHOSE_PRICES)
    command = add("logs", _logs, "what a cell printed")
    add_on(command, "where it was last run")
    command.add_argument("cell", nargs="?", metavar="CELL", help="name of a cell, or its beginning (default: list them)")
    command.add_argument("--follow", "-f", action="store_true", help="go on until the cell ends")
    command = add("cancel", _cancel, "end the jobs of cells; what they saved stays, and `run` goes on from there")
    add_where(command)
    add_on(command, "where it was last run")
    command.add_argument("cells", nargs="*", metavar="CELL", help="names of cells (default: all that are queued or running)")
    command = add("retry", _retry, "let `run` start failed and diverged cells again; what they left is kept aside")
    command.add_argument("cells", nargs="*", metavar="CELL", help="names of cells (default: all that failed)")
    command = add("export", _export, "loss and cost tables, fits, cheapest heads, pictures")
    analysis.add_confounded(command)
    analysis.add_table(command)
    analysis.add_commands(commands)
    return parser


def _console() -> Console:
    """A terminal as wide as it is; files and pipes get whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _plan(arguments, the: Choice, layout: Layout, console: Console) -> int:
    from launch import plan  # brings pandas, which the other commands need not wait for

    the = _begun(the, layout)
    chosen = grid.select(the.cells, arguments.where)
    states = _states(the.cells, layout, lambda: run.recall(layout, None))
    rate = arguments.flops_per_second or plan.measured_rate(the.cells, states)
    by_name = dict(zip((cell.name for cell in the.cells), states, strict=True))
    frame = plan.table(chosen, [by_name[cell.name] for cell in chosen], rate)
    if arguments.explain:
        return _explain(arguments, _named([arguments.explain], chosen), console)
    fits = _fits(arguments, chosen)
    if fits is not None:
        table = prices.load(arguments.prices)
        frame = plan.on_slices(frame, fits, table, arguments.efficiency)
    for name in sorted({cell.config.data.store for cell in chosen if cell.data_fingerprint is None}):
        print(f"launch: token store {name} is not prepared yet: the names of its cells will change", file=sys.stderr)
    for line in training_cells.said(chosen):
        print(f"launch: {line}", file=sys.stderr)
    if _as_data(arguments, frame):
        return EXIT_DONE
    if fits is not None:
        for view in plan.slices_screen(frame, f"{the.grid.name}: {counted(len(chosen), 'cell')}"):
            console.print(view)
            console.print()
        console.print(plan.hours_are(fits, arguments.efficiency), soft_wrap=True)
        if (memory := plan.memory_is(fits)) is not None:
            console.print(f"GiB: {memory}", highlight=False, soft_wrap=True)
        console.print(f"USD: {plan.origins(fits, table)}", highlight=False, soft_wrap=True)
    else:
        console.print(plan.screen(frame, f"{the.grid.name}: {counted(len(chosen), 'cell')} in {layout.root}"))
        console.print()
        source = "given" if arguments.flops_per_second else "reached by the finished cells"
        if rate:
            console.print(f"time: training FLOPs at {si(rate)}FLOP/s ({source}), one cell after another")
        else:
            console.print("time: not known before a cell has finished here; --flops_per_second X estimates it")
    return EXIT_DONE


def _explain(arguments, chosen: list[Cell], console: Console) -> int:
    """Where the time of a cell's step goes on the slices asked for, by arithmetic."""
    from launch import plan

    if arguments.topology is None:
        raise ConfigError("--explain needs --topology NAME: `python -m launch plan --help` lists them")
    where = [hardware.find(name) for name in dict.fromkeys(arguments.topology.split(","))]
    fits = [fit.estimate(cell, one) for cell in chosen for one in where]
    frame = plan.explanation(fits)
    if not _as_data(arguments, frame):
        for view in plan.explanation_screen(fits):
            console.print(view)
            console.print()
        console.print(plan.hours_are(fits, None), soft_wrap=True)
    return EXIT_DONE


def _as_data(arguments, frame) -> bool:
    """Writes a plan's table to --out, and prints it as --format asks; False where a screen is asked for."""
    from launch import plan

    if arguments.out:
        plan.write(frame, arguments.out)
    if arguments.format == "csv":
        print(frame.to_csv(index=False), end="")
    elif arguments.format == "json":
        print(frame.to_json(orient="records", indent=1))
    return arguments.format != "table"


def _begun(the: Choice, layout: Layout) -> Choice:
    """The cells that the root has been begun with, unless rules are asked for; says what the root holds under others."""
    found = rules.begun_with(the, layout)
    if the.others:
        offer = ""
        if not the.asked:
            offer = "; these are shown (as with --rules old)" if found is not the else "; --rules old takes these"
            offer += "; --rules new takes the grid under today's rules"
        print(f"launch: {the.said(layout)}{offer}", file=sys.stderr)
    return found


def _fits(arguments, chosen: list[Cell]) -> list[Fit] | None:
    """Every cell on every slice asked for, compiled unless an estimate is asked for; None when none is."""
    if arguments.topology is None:
        for name in ("estimate", "prices", "efficiency", "workers"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name} needs --topology NAME: `python -m launch plan --help` lists them")
        return None
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        raise ConfigError(f"--efficiency {arguments.efficiency}: must be above 0 and at most 1")
    where = [hardware.find(name) for name in dict.fromkeys(arguments.topology.split(","))]
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
        left = duration((now - started) / done * (everything - done))
        verdict = "fits" if one.fits else "does not fit"
        line = f"{done} of {everything}, {left} left: {one.cell.name} {verdict} {one.slice.name}"
        bar.update(task, completed=done, description=line)
        if not console.is_terminal and (now - spoken > screen.PLAIN_SECONDS or done == everything):
            spoken = now
            console.print(line, highlight=False, soft_wrap=True)

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"compiling, {count} at a time", total=len(fits))
        fit.compile_checks(fits, count, changed, exact)


def _proved(arguments, todo: list[Cell], engine: Executor) -> dict[str, Cell]:
    """The cells, with the execution that was compiled and fits, by name.

    Raises ConfigError when a cell does not fit where it would run, before anything is started.
    """
    where = hardware.find(arguments.topology) if arguments.topology else engine.slice
    if where is None and engine.here:
        fit.require_memory(todo, engine.capacity)
    if where is None:
        return {cell.name: cell for cell in todo}
    fits = [fit.estimate(cell, where) for cell in todo]
    try:
        where.require_compiler()
    except ValueError as error:
        if arguments.topology:
            raise
        print(f"launch: whether cells fit {where.name} is estimated: {error}", file=sys.stderr)
    else:
        _prove(fits, None, exact=True)
    fit.require(fits)
    return {one.cell.name: dataclasses.replace(one.cell, settings=fit.settings(one)) for one in fits}


def _run(arguments, the: Choice, layout: Layout, console: Console) -> int:
    if the.others and not the.asked:
        raise ConfigError(
            f"{the.said(layout)}. {rules.CHANGED}. So `run` in this folder needs --rules, every time: --rules old goes on with "
            "them, and nothing that is finished is trained again; --rules new trains the grid under today's rules beside them, "
            "and they stay in the tables. Or give another --root"
        )
    engine = run.recall(layout, arguments.on)
    if arguments.slots is not None:
        engine = engine.with_slots(arguments.slots)
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json needs --dry_run; what runs is shown by `python -m launch status GRID --json`")
    chosen = grid.select(the.cells, arguments.where)
    for cell in chosen:
        if cell.data_fingerprint is None:
            raise ConfigError(
                f"token store {cell.config.data.store} is not there: make it with `python -m gqa_jax.data.prepare --out "
                f"{cell.config.data.store} ...`"
            )
    for line in training_cells.said(chosen):
        print(f"launch: {line}", file=sys.stderr)
    _check_parents(chosen, the.cells, layout)
    if arguments.dry_run:
        return _dry_run(arguments, the, chosen, layout, engine, console)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.only_launcher(layout, patience=0.0 if engine.here else run.PATIENCE_SECONDS))
        engine.check()
        run.require_free(layout, engine)
        before = run.look(chosen, layout, engine)
        todo = [cell for cell, now in zip(chosen, before.states, strict=True) if now.runnable]
        at_a_time = f"{engine.capacity} at a time{'' if engine.here else f' on {engine.engine}'}"
        summary = f"{the.grid.name}: {counted(len(chosen), 'cell')}, {len(todo)} to train, {at_a_time}, in {layout.root}"
        console.print(summary, highlight=False, soft_wrap=True)
        _print_others(the, layout, console)
        proved = _proved(arguments, todo, engine) if todo else {}
        storage.check_writable(layout.root)
        _write_plan(the, layout)
        run.remember(layout, engine)
        if todo:
            engine.prepare()
        if not engine.here:
            stack.close()  # each pass holds the grid for itself: other launchers may work on it too
        stack.enter_context(engine)
        ready = [proved.get(cell.name, cell) for cell in chosen]
        with screen.Watch(console, prices.load()) as watch:
            last = run.repeat(ready, layout, engine, arguments.watch, watch.update)
        return _end(arguments, the, chosen, layout, engine, last, console)


def _end(arguments, the: Choice, chosen: list[Cell], layout: Layout, engine: Executor, last: run.Pass, console: Console) -> int:
    """What `run` says and writes after its last pass."""
    screen.print_failures(chosen, last.states, layout, engine, _about(arguments, the), console)
    failed = any(now.state in state.BAD for now in last.states)
    if last.active:
        console.print(
            f"{counted(len(last.submitted), 'cell')} submitted, {last.active} on {engine.engine}: python -m launch status "
            f"{_about(arguments, the)}",
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_FAILED if failed else EXIT_DONE
    if any(s.state == "done" for s in (last.states if chosen == the.cells else run.look(the.cells, layout, engine).states)):
        _write_answer(layout, console, arguments.rules)
    return EXIT_DONE if all(now.state == "done" for now in last.states) else EXIT_FAILED


def _states(cells: Sequence[Cell], layout: Layout, engine: Callable[[], Executor]) -> list[state.CellState]:
    """The states of these cells; by their folders alone, which is said, where the engine can't be asked."""
    try:
        return run.look(cells, layout, engine()).states
    except (SubmitError, ConfigError) as error:
        print(f"launch: what runs is not known: {error}", file=sys.stderr)
        return state.of_all(cells, layout, time.time(), {})


def _about(arguments, the: Choice) -> str:
    """How another command line names the same cells: the grid, its folder, the rules."""
    root = f" --root {shlex.quote(arguments.root)}" if arguments.root else ""
    return f"{shlex.quote(arguments.grid)}{root}{the.option}"


def _check_parents(chosen: Sequence[Cell], cells: Sequence[Cell], layout: Layout) -> None:
    """Raises ConfigError when one of `chosen` would wait for another of `cells` that is neither done nor chosen."""
    names, others = {cell.name for cell in chosen}, {cell.name: cell for cell in cells}
    for cell in chosen:
        if cell.parent is None or cell.parent in names:
            continue
        ends = state.of(cell, layout.cell(cell.name), time.time()).state in state.FINAL
        if ends or state.of(others[cell.parent], layout.cell(cell.parent), time.time()).state == "done":
            continue
        raise ConfigError(
            f"{cell.name} continues {cell.parent}, which is not done and not chosen: leave --where out (what is done is not "
            f"trained again), or run that one first: --where cell={cell.parent}"
        )


def _dry_run(arguments, the: Choice, chosen: list[Cell], layout: Layout, engine: Executor, console: Console) -> int:
    """What `run` would submit now; asks no engine, so that it also works where there is none."""
    states = _states(chosen, layout, lambda: engine)
    todo = [cell for cell, now in zip(chosen, states, strict=True) if now.runnable]
    proved = _proved(arguments, todo, engine) if todo else {}
    submissions = [engine.submission(proved.get(cell.name, cell)) for cell in todo]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in submissions], indent=1))
        return EXIT_DONE
    those = f"{len(todo)} of {counted(len(chosen), 'cell')}"
    title = f"{the.grid.name}: {those} would be submitted to {engine.engine}, in {layout.root}"
    console.print(title, highlight=False, soft_wrap=True)
    for one in submissions:
        print(one.command)
    for name, text in submissions[0].files.items() if submissions else ():
        print(f"\n--- {layout.cell(submissions[0].cell) / name}\n{text.rstrip()}")
    if submissions and submissions[0].files:
        print("\nthe others differ in their names and settings: --json prints them all")
    return EXIT_DONE


def _status(arguments, the: Choice, layout: Layout, console: Console) -> int:
    the = _begun(the, layout)
    chosen = grid.select(the.cells, arguments.where)
    engine = run.recall(layout, arguments.on)
    table = prices.load(arguments.prices)
    now = run.look(chosen, layout, engine)
    if arguments.json:
        print(json.dumps(screen.rows(chosen, now.states, table), indent=1))
    else:
        console.print(screen.table(chosen, now.states, the.grid.name, table))
        screen.print_failures(chosen, now.states, layout, engine, _about(arguments, the), console)
        now.held = state.held_back(chosen, now.states)
        screen.print_pass(now, console)
        _print_strangers(the, layout, console)
    kinds = {s.state for s in now.states}
    if kinds & set(state.BAD):
        return EXIT_FAILED
    return EXIT_DONE if kinds == {"done"} else EXIT_UNFINISHED


def _logs(arguments, the: Choice, layout: Layout, console: Console) -> int:
    the = _begun(the, layout)
    engine = run.recall(layout, arguments.on)
    if arguments.cell is None:
        for cell in the.cells:
            for path in engine.logs(cell.name):
                print(path)
        return EXIT_DONE
    (cell,) = _named([arguments.cell], the.cells)
    shown: dict[str, int] = {}
    while True:
        active = arguments.follow and _is_active(engine, cell.name)  # before reading: what it printed last is shown too
        for path in engine.logs(cell.name):
            _print_from(path, shown)
        sys.stdout.flush()
        if not active:
            break
        engine.wait(0.5 if engine.here else 5.0)
    if not shown:
        now = run.look([cell], layout, engine).states[0]
        said = f": it is {now.state}{f' ({now.cause})' if now.cause else ''}"
        raise ConfigError(f"{cell.name} has printed nothing yet{said}")
    return EXIT_DONE


def _is_active(engine: Executor, cell: str) -> bool:
    job = engine.jobs().get(cell)
    return job is not None and job.state != DEAD


def _print_from(path: epath.Path, shown: dict[str, int]) -> None:
    """Prints what a file has gained; `shown` has the bytes printed before, by path."""
    name = os.fspath(path)
    if storage.is_remote(path):
        content = storage.read_bytes(path)
        if content is not None:
            sys.stdout.write(content[shown.get(name, 0) :].decode(errors="replace"))
            shown[name] = len(content)
        return
    if path.exists():
        with open(name, "rb") as file:
            file.seek(shown.get(name, 0))
            text = file.read()
            shown[name] = file.tell()
        sys.stdout.write(text.decode(errors="replace"))


def _cancel(arguments, the: Choice, layout: Layout, console: Console) -> int:
    the = _begun(the, layout)
    engine = run.recall(layout, arguments.on)
    chosen = _named(arguments.cells, the.cells) if arguments.cells else grid.select(the.cells, arguments.where)
    jobs = engine.jobs()
    active = [cell.name for cell in chosen if (job := jobs.get(cell.name)) is not None and job.state != DEAD]
    run.cancel(active, layout, engine)
    for name in active:
        print(f"{name}: cancelled ({jobs[name].id}{', it ran' if jobs[name].state == RUNNING else ''})")
    print(f"{counted(len(active), 'cell')} cancelled on {engine.engine}; what they saved stays")
    return EXIT_DONE


def _retry(arguments, the: Choice, layout: Layout, console: Console) -> int:
    the = _begun(the, layout)
    engine = run.recall(layout, None)
    with run.only_launcher(layout, run.PATIENCE_SECONDS):
        chosen = _named(arguments.cells, the.cells) if arguments.cells else the.cells
        count = 0
        for cell, now in zip(chosen, run.look(chosen, layout, engine).states, strict=True):
            if now.state not in ("failed", "diverged"):
                if arguments.cells:
                    raise ConfigError(f"{cell.name} is {now.state}: only failed and diverged cells are retried")
                continue
            if now.failure == "edited":
                raise ConfigError(str(now.cause))
            aside = _set_aside(layout.cell(cell.name), now)
            count += 1
            print(f"{cell.name}: {now.state} ({now.failure or now.cause}); its records are in {aside}")
    print(f"{counted(count, 'cell')} can run again: python -m launch run {_about(arguments, the)}")
    return EXIT_DONE


def _set_aside(folder: epath.Path, now: state.CellState) -> epath.Path:
    """Moves what says that the cell is over into a folder of its own, which is returned."""
    aside = folder / f"before-retry-{time.strftime('%Y%m%d-%H%M%S')}"
    kept = ["exit.json", "result.json", "host-failure.json", "attempts", "submissions"]
    if now.state == "diverged":
        kept += ["checkpoints", "metrics"]
    there = set(storage.names(folder))
    aside.mkdir(parents=True, exist_ok=True)
    for name in kept:
        if name in there:
            storage.move(folder / name, aside / name)
    return aside


def _export(arguments, the: Choice, layout: Layout, console: Console) -> int:
    the = _begun(the, layout)
    states = run.look(the.cells, layout, run.recall(layout, None)).states
    if not any(s.state in state.FINAL for s in states) and (the.asked or not the.finished):
        raise ConfigError(f"no cell of {the.grid.name} has finished in {layout.root}: run it first")
    with run.only_launcher(layout):
        _write_plan(the, layout)
        _write_answer(layout, console, arguments.rules, arguments.allow_confounded)
    missing = sum(s.state not in state.FINAL for s in states)
    if missing:
        under = " under today's rules" if the.rules == rules.NEW and (the.others or the.kept) else ""
        console.print(f"{missing} of {len(the.cells)} cells{under} are not finished and not in the tables")
    _print_strangers(the, layout, console)
    return EXIT_DONE


def _print_strangers(the: Choice, layout: Layout, console: Console) -> None:
    """Folders of no cell: those that stay in the tables, and those that no table has."""
    if the.kept:
        console.print(
            f"{len(the.kept)} finished runs in {layout.root}/cells are of no cell of this grid and under other rules: they "
            f"stay in the tables, like {the.kept[0]}",
            highlight=False,
            soft_wrap=True,
        )
    if count := len(the.strangers):
        console.print(
            f"{count} folders in {layout.root}/cells are of no cell of this grid (it was changed since), and in no table, like "
            f"{the.strangers[0]}",
            highlight=False,
            soft_wrap=True,
        )


def _print_others(the: Choice, layout: Layout, console: Console) -> None:
    """What `run` leaves alone."""
    if the.others:
        console.print(f"{the.said(layout)}: they stay as they are, and in the tables", highlight=False, soft_wrap=True)
    _print_strangers(the, layout, console)


def _write_answer(layout: Layout, console: Console, asked: str | None, allow_confounded: bool = False) -> None:
    from launch import export  # brings scipy and matplotlib: a second that the other commands need not wait

    export.write(layout, console, asked, allow_confounded)


def _write_plan(the: Choice, layout: Layout) -> None:
    """config.json of every cell and grid.json, before anything starts."""
    there = set(storage.names(layout.root / "cells"))

    def write(cell: Cell) -> None:
        folder = layout.cell(cell.name)
        if cell.name not in there or "config.json" not in storage.names(folder):
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(folder / "config.json", cell.stored())

    storage.each(write, the.cells, remote=storage.is_remote(layout.root))
    storage.write_json(
        layout.root / "grid.json", grid.facts(the.grid, the.cells, [*(cell.name for cell in the.others), *the.kept])
    )


def _named(names: Sequence[str], cells: Sequence[Cell]) -> list[Cell]:
    found = []
    for name in names:
        matches = [cell for cell in cells if cell.name == name] or [cell for cell in cells if cell.name.startswith(name)]
        if len(matches) != 1:
            what = "no cell of the grid" if not matches else f"the beginning of {len(matches)} cells"
            raise ConfigError(f"{name!r} is {what}; `python -m launch status` lists them")
        found += matches
    return found


if __name__ == "__main__":
    sys.exit(main())
