"""The commands of `python -m launch` as functions, for notebooks and scripts; the command line prints what they return.

    from launch import commands
    commands.optimum("runs/quickstart", loss=2.1, context=8192).to_dict()

Arguments are named as the command line's options, and so are they in errors. What a person has to correct is a ValueError, most
often a ConfigError; an engine that does not answer is a SubmitError. What should be known beside is logged as a warning.
docs/commands.md has all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from gqa_jax import hardware, storage
from gqa_jax.config import HEAD_METHOD
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted, gb, read_context
from gqa_jax.hardware import Price, host
from gqa_jax.hardware import prices as price_list
from gqa_jax.training import records
from launch import fit as fitting
from launch import grid_cells, money, reach, state
from launch import reap as reaping
from launch import rules as ruling
from launch import run as passes
from launch import watch as watching
from launch.cells import Cell, Layout
from launch.executors.base import DEAD, Executor, Job, Submission, SubmitError
from launch.fit import Fit
from launch.grid_cells import Cells, open_cells
from launch.notify import Notifier
from launch.run import Pass
from launch.state import CellState
from launch.training_cells import said, stores, training

if TYPE_CHECKING:
    import pandas as pd

    from gqa_jax.laws import Heads
    from gqa_jax.search.answer import Answer
    from gqa_jax.search.devices import Comparison
    from gqa_jax.search.objectives import Objective
    from gqa_jax.search.own_answer import OwnAnswer
    from launch.export import Exported
    from launch.next_cells import Next
    from launch.plan import Plan
    from launch.studies import Fits, Fitted, Source

log = logging.getLogger(__name__)


# Grids


class Progress:
    """Is told how far `run` and `plan` are (`launch.commands`). This one says nothing."""

    def begins(self, found: Run) -> None:
        """Before cells are compiled and submitted."""

    def compiling(self, total: int, at_a_time: int) -> AbstractContextManager[Callable[[Fit, int, int], None]]:
        """Holds while programs are compiled; what it gives is called as `launch.fit.compile_checks` says."""
        return contextlib.nullcontext(lambda *_: None)

    def passed(self, now: Pass) -> None:
        """After each pass over the cells."""


SILENT = Progress()


def plan(
    grid: Cells | str,
    *,
    where: str | None = None,
    flops_per_second: float | None = None,
    topology: str | None = None,
    estimate: bool = False,
    prices: str | None = None,
    efficiency: float | None = None,
    explain: str | None = None,
    workers: int | None = None,
    rows: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """What every cell will cost: a row per cell; with a topology, one per cell and slice.

    Args:
      grid: of `open_cells`, or a grid file. where: only these cells, as "size=19M,n_heads=8".
      flops_per_second: rate of the estimated time; default: that of finished cells.
      topology: names of slices, separated by commas: does each cell fit, hours, money.
      estimate: by arithmetic alone; else every step is compiled, by `workers` processes (default: one per CPU).
      prices: whose, as in `gqa_jax.hardware.prices.load`. efficiency: share of the roofline that is reached, at most 1.
      rows: the table has a row per cell also of a large grid, which is else shown by size.
      explain: a cell: where its step's time goes on the slices, instead.
    """
    from launch import plan as planning

    cells = grid_cells.begun(open_cells(grid, offline=True) if isinstance(grid, str) else grid)
    trained = training(cells.all)
    chosen = training(grid_cells.select(cells.all, where))
    if topology is None:
        given = {"explain": explain, "estimate": estimate, "prices": prices, "efficiency": efficiency, "workers": workers}
        if alone := [name for name, value in given.items() if value]:
            raise ConfigError(f"--{alone[0]} needs --topology NAME: `python -m launch plan --help` lists them")
    slices = [hardware.find(name) for name in dict.fromkeys(topology.split(",") if topology is not None else ())]
    if explain is not None:
        return planning.explained([fitting.estimate(c, one) for c in cells.named([explain], chosen) for one in slices])
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency {efficiency}: must be above 0 and at most 1")
    states = cells.look(trained, lambda: passes.recall(cells.layout, None), reach.ENGINE_SECONDS).states
    rate = flops_per_second or planning.measured_rate(trained, states)
    by_name = dict(zip((cell.name for cell in trained), states, strict=True))
    frame = planning.table(chosen, [by_name[cell.name] for cell in chosen], rate)
    fits = [fitting.estimate(cell, one) for cell in chosen for one in slices]
    if not estimate:
        _compile(fits, workers, progress)
    _warn(chosen)
    title = f"{cells.name}: {counted(len(chosen), 'cell')}"
    if fits:
        return planning.of_slices(frame, fits, price_list.load(prices), efficiency, title)
    source = "given" if flops_per_second else "reached by the finished cells"
    return planning.of_cells(frame, rate, source, f"{title} in {cells.layout.root}", rows)


def _warn(cells: Sequence[Cell]) -> None:
    """Logs what may not be meant of cells, or will be otherwise."""
    for name in stores(cell.config for cell in training(cells) if cell.missing is not None):
        log.warning(f"token store {name} is not prepared yet: the names of its cells will change")
    for line in said(cells):
        log.warning(line)


@dataclasses.dataclass
class Run:
    """A run of a grid: what it is about, and what has come of it."""

    cells: Cells
    chosen: list[Cell]
    engine: Executor
    todo: list[Cell]  # those that were to be trained
    rate: money.Rate | None = None  # what a cell costs; None: not known
    submissions: list[Submission] = dataclasses.field(default_factory=list)  # of a dry run: what the engine would be given
    last: Pass | None = None  # None: a dry run


def run(
    grid: Cells | str,
    *,
    where: str | None = None,
    on: str | None = None,
    watch: bool = False,
    dry_run: bool = False,
    topology: str | None = None,
    slots: int | None = None,
    max_usd: float | None = None,
    prices: str | None = None,
    notify: str | None = None,
    progress: Progress = SILENT,
) -> Run:
    """Trains the cells that are missing, here or on a cluster; called again it goes on. `export` is what comes then.

    Args:
      grid, where: of `plan`.
      on: an engine, or a cluster file; default: where the grid was last run, else "local", whose cells end with this process.
      watch: go on until all that can finish has, and submit again what was lost. Without it a cluster gets one pass.
      dry_run: only say what would be submitted; nothing is written.
      topology: slice that every cell must fit; default: that of the cluster file. slots: local: cells at a time.
      max_usd: US dollars that the grid may cost (`launch.money.Budget`); prices: whose, default: in the engine's terms.
      notify: a command of a shell that is told of failures and the end (`launch.notify`).

    Raises:
      ConfigError: cells that don't fit or that continue what is not there, a store that is not prepared, another launcher.
    """
    cells = open_cells(grid, offline=dry_run) if isinstance(grid, str) else grid
    the, layout = cells.choice, cells.layout
    if the.others and not the.asked:
        raise ConfigError(
            f"{the.said(layout)}. {ruling.CHANGED}. So `run` in this folder needs --rules, every time: --rules old goes on "
            "with them, and nothing that is finished is trained again; --rules new trains the grid under today's rules beside "
            "them, and they stay in the tables. Or give another --root"
        )
    engine = passes.recall(layout, on or ("local" if layout.unseen else None))
    if slots is not None:
        engine = engine.with_slots(slots)
    rate = money.rate(engine, prices)
    chosen = grid_cells.select(cells.all, where)
    if not dry_run and (lacking := [cell.missing for cell in chosen if cell.missing is not None]):
        raise ConfigError(lacking[0])
    _warn(chosen)
    if not layout.unseen:
        check_parents(chosen, cells.all, layout)
    budget = None if max_usd is None else _budget(max_usd, rate, chosen, engine, watch)
    cells = dataclasses.replace(cells, settled=True)

    def begun(states: Sequence[CellState]) -> Run:
        todo = [cell for cell, now in zip(chosen, states, strict=True) if now.runnable]
        return Run(cells, chosen, engine, todo, rate)

    if dry_run:  # also where there is no engine, no network, no token store
        found = begun(cells.look(chosen, lambda: engine, reach.ENGINE_SECONDS).states)
        if not engine.here:
            log.warning(f"not checked: what `run` asks {engine.engine} first: its programs, credentials, limits, and the root")
        found.submissions = [engine.submission(cell) for cell in _fitted(found.todo, engine, topology, progress)]
        return found
    with contextlib.ExitStack() as stack:
        stack.enter_context(passes.only_launcher(layout, patience=0.0 if engine.here else passes.PATIENCE_SECONDS))
        watching.when_it_answers(engine.check, engine, watch)
        passes.require_free(layout, engine)
        found = begun(watching.when_it_answers(lambda: passes.look(chosen, layout, engine).states, engine, watch))
        progress.begins(found)
        fitted = {cell.name: cell for cell in _fitted(found.todo, engine, topology, progress)}
        storage.check_writable(layout.root)
        cells.write_plan()
        passes.remember(layout, engine)
        if found.todo:
            engine.prepare()
        if not engine.here:
            stack.close()  # each pass holds the grid for itself: other launchers may work on it too
        stack.enter_context(engine)
        ready = [fitted.get(cell.name, cell) for cell in chosen]
        told = notify and Notifier(notify, grid=cells.name, root=os.fspath(layout.root), engine=engine.engine)

        def passed(now: Pass) -> None:
            progress.passed(now)
            if told:
                told.passed(now)

        found.last = watching.repeat(ready, layout, engine, watch, passed, budget=budget)
        if told:
            told.ends(found.last)
    return found


def _budget(max_usd: float, rate: money.Rate | None, cells: Sequence[Cell], engine: Executor, watch: bool) -> money.Budget:
    if rate is None:
        raise ConfigError(
            f"--max_usd {max_usd:g}: what a cell costs on {engine.engine} is not known: set `topology` in the cluster file, "
            "and where its chip has no list price, --prices FILE"
        )
    found = money.Budget(max_usd, rate, money.expected(cells, engine, rate))
    if not (watch or engine.here):
        log.warning(
            "without --watch no cell is submitted that leads beyond --max_usd, but none that runs longer is ended at it"
        )
    return found


def check_parents(chosen: Sequence[Cell], cells: Sequence[Cell], layout: Layout) -> None:
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


def _fitted(todo: list[Cell], engine: Executor, topology: str | None, progress: Progress) -> list[Cell]:
    """The cells, those that train with the execution that was compiled and fits. Raises ConfigError when one does not fit."""
    trained = training(todo)
    where = (hardware.find(topology) if topology else engine.slice) if trained else None
    if trained and where is None and engine.here:
        fitting.require_memory(trained, engine.capacity)
    if where is None:
        return todo
    fits = [fitting.estimate(cell, where) for cell in trained]
    try:
        where.require_compiler()
    except ValueError as error:
        if topology:
            raise
        log.warning(f"whether cells fit {where.name} is estimated: {error}")
    else:
        _compile(fits, None, progress, exact=True)
    fitting.require(fits)
    fitted = {one.cell.name: dataclasses.replace(one.cell, settings=fitting.settings(one)) for one in fits}
    return [fitted.get(cell.name, cell) for cell in todo]


def _compile(fits: list[Fit], workers: int | None, progress: Progress, exact: bool = False) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if fits:
        count = workers or len(host.cpus())
        with progress.compiling(len(fits), count) as changed:
            fitting.compile_checks(fits, count, changed, exact)


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of every cell, from one look."""

    cells: Cells
    engine: Executor
    now: Pass
    prices: Mapping[str, Price]
    rate: money.Rate | None = None  # what a cell costs on the engine; None: not known

    def rows(self) -> list[dict[str, Any]]:
        """A row per cell: its name, the fields of `launch.state.CellState`, and US dollars so far."""
        pairs = zip(self.now.cells, self.now.states, strict=True)
        return [{"cell": cell.name} | dataclasses.asdict(now) | {"usd": money.cost(now, self.prices)} for cell, now in pairs]


def status(grid: Cells | str, *, where: str | None = None, on: str | None = None, prices: str | None = None) -> Status:
    """The state of every cell, what it cost, and why cells failed. Arguments as in `run` and `plan`."""
    cells = grid_cells.begun(grid)
    chosen = grid_cells.select(cells.all, where)
    engine = passes.recall(cells.layout, on)
    rate = money.rate(engine, prices)
    now = cells.look(chosen, lambda: engine)
    now.held = state.held_back(chosen, now.states)
    return Status(cells, engine, now, money.table(rate, prices), rate)


def log_files(grid: Cells | str, *, on: str | None = None) -> list[epath.Path]:
    """Files that hold what the cells printed, cell after cell; not all need to be there."""
    cells = grid_cells.begun(grid)
    engine = passes.recall(cells.layout, on)
    return [path for cell in cells.all for path in engine.logs(cell.name)]


def logs(grid: Cells | str, cell: str, *, on: str | None = None, follow: bool = False) -> Iterator[str]:
    """What a cell (its name, or how that begins) printed, in pieces; with `follow` until it ends. ConfigError: nothing yet."""
    cells = grid_cells.begun(grid)
    engine = passes.recall(cells.layout, on)
    (one,) = cells.named([cell])
    shown: dict[epath.Path, int] = {}  # bytes, by file
    while True:
        active = follow and _is_active(engine.jobs().get(one.name))  # before reading: what it printed last is shown too
        for path in engine.logs(one.name):
            if (content := storage.read_bytes(path)) is not None:
                yield content[shown.get(path, 0) :].decode(errors="replace")
                shown[path] = len(content)
        if not active:
            break
        engine.wait(0.5 if engine.here else 5.0)
    if not shown:
        now = passes.look([one], cells.layout, engine).states[0]
        raise ConfigError(f"{one.name} has printed nothing yet: it is {now.state}{f' ({now.cause})' if now.cause else ''}")


def _is_active(job: Job | None) -> bool:
    return job is not None and job.state != DEAD


class Cancelled(NamedTuple):
    """Jobs that were ended, and the engine that they were on."""

    jobs: list[Job]
    engine: str


def cancel(grid: Cells | str, cells: Sequence[str] = (), *, where: str | None = None, on: str | None = None) -> Cancelled:
    """Ends the jobs of cells, by their names or `where` (default: all); what they saved stays.

    Raises SubmitError when the engine does not answer; the cells that are not over are marked then, so that launchers at work
    don't start them again.
    """
    found = grid_cells.begun(grid)
    engine = passes.recall(found.layout, on)
    chosen = found.named(cells) if cells else grid_cells.select(found.all, where)
    try:
        jobs = engine.jobs()
    except SubmitError as error:
        states = state.of_folders(chosen, found.layout, time.time())
        open_ = [cell.name for cell, now in zip(chosen, states, strict=True) if now.state not in state.FINAL]
        passes.mark_cancelled(open_, found.layout)
        raise SubmitError(
            f"{error}. Launchers that are at work won't start {counted(len(open_), 'cell')} again, but jobs that run are not "
            "ended: give the same command again when it answers"
        ) from error
    active = [jobs[cell.name] for cell in chosen if _is_active(jobs.get(cell.name))]
    passes.cancel([job.cell for job in active], found.layout, engine)
    return Cancelled(active, engine.engine)


def reap(grid: Cells | str, *, on: str | None = None, dry_run: bool = False) -> list[str]:
    """Ends what of a grid has machines and is of no use (`launch.reap`); a sentence for each. dry_run: only says it."""
    found = grid_cells.begun(grid)
    engine = passes.recall(found.layout, on)
    with contextlib.nullcontext() if engine.here or dry_run else passes.only_launcher(found.layout, passes.PATIENCE_SECONDS):
        return reaping.reap(found.all, found.layout, engine, dry_run)


class Retry(NamedTuple):
    """Cells that can run again: what state each was in, and where its records are now."""

    cells: Cells
    moved: dict[str, tuple[CellState, epath.Path]]  # by name


def retry(grid: Cells | str, cells: Sequence[str] = ()) -> Retry:
    """Lets `run` start failed and diverged cells again, by their names (default: all); what they left is kept aside, and so are
    records that can't be used.

    Raises ConfigError, and moves nothing, for a named cell that is neither, and for one whose config.json was edited.
    """
    found = grid_cells.begun(grid)
    engine = passes.recall(found.layout, None)
    with passes.only_launcher(found.layout, passes.PATIENCE_SECONDS):
        chosen = found.named(cells) if cells else found.all
        over = {}
        for cell, now in zip(chosen, passes.look(chosen, found.layout, engine).states, strict=True):
            if now.failure == "edited" and cells:
                raise ConfigError(str(now.cause))
            if now.failure == "edited":
                log.warning(f"{cell.name} is left as it is: {now.cause}")
            elif now.state in ("failed", "diverged"):
                over[cell.name] = now
            elif cells:
                raise ConfigError(f"{cell.name} is {now.state}: only failed and diverged cells are retried")
        return Retry(found, {name: (now, _set_aside(found.layout.cell(name), now)) for name, now in over.items()})


def _set_aside(folder: epath.Path, now: CellState) -> epath.Path:
    """Moves what says that the cell is over into a folder of its own, which is returned."""
    there = set(storage.names(folder))
    name = f"before-retry-{time.strftime('%Y%m%d-%H%M%S')}"
    aside = folder / (name if name not in there else f"{name}-{time.time_ns()}")
    kept = {"exit.json", "result.json", "host-failure.json", "attempts", "submissions", "failures", *records.odd(folder)}
    if now.state == "diverged":
        kept |= {"checkpoints", "metrics"}
    if now.failure == "broken_config":  # which says nothing of what has come of the cell
        kept = {"config.json", *records.odd(folder)}
    storage.make_folder(aside)
    for name in sorted(kept & there):
        storage.move(folder / name, aside / name)
    return aside


def generate(
    run: str, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 128, temperature: float = 0.0,
    top_k: int | None = None, top_p: float = 1.0, seed: int = 0, context: int | None = None, cache_dtype: str | None = None,
    dtype: str | None = None, mesh: str | None = None, tokenizer: str | None = None,
) -> list[Any]:  # fmt: skip
    """What a trained model writes after each prompt, a `gqa_jax.inference.loaded.Generation` each.

    Args:
      run: folder of a run that is done, or of imported parameters.
      prompts: texts, or lists of ids.
      tokenizer: name or file of one, where none is kept with the run.
      others: of `gqa_jax.inference.loaded.LoadedModel.generate`.
    Raises:
      ConfigError: a run that is not done, a prompt that doesn't fit.
    """
    asked = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "context": context, "cache_dtype": cache_dtype, "dtype": dtype, "mesh": mesh,
    }  # fmt: skip
    *_, last = stream(run, prompts, tokenizer=tokenizer, segment=None, **asked)
    return last


def stream(
    run: str, prompts: Sequence[str | Sequence[int]], *, tokenizer: str | None = None, **asked: Any
) -> Iterator[list[Any]]:
    """As `generate`, a list for what there is so far, again and again until it is whole."""
    from gqa_jax.inference.loaded import load_model

    yield from load_model(run, tokenizer=tokenizer).stream(prompts, **asked)


def benchmark_serving(
    models: Sequence[str] = (), *, contexts: Sequence[int | str] | str | None = None, batches: Sequence[int] | None = None,
    new_tokens: int = 32, dtype: str | None = None, cache_dtype: str | None = None, mesh: str | None = None,
    device: str | None = None, fit: str | None = None, repeats: int = 3, seed: int = 0,
    measured: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Any:  # fmt: skip
    """What models take to serve on the devices of this machine, a `launch.serving_benchmark.Benchmark`.

    Args:
      models: folders of runs; shapes like "12x768:8,1" (layers x width : query, key/value heads) or "470M:8,1" (of the paper's
        tables), whose weights are drawn; names of public models or their config.json, too. None, with `fit`: two shapes that
        tell the numbers of a device apart.
      contexts: tokens of a prompt and its answer, like "1K,16K"; None: three that suit the device. batches: requests at once.
      new_tokens: of every answer.
      dtype: of the computation; None: that of a run, else float32 on CPUs and bfloat16. cache_dtype, mesh: as of `generate`.
      device: what the times are set beside: a name, or a file of `fit`; None: the data sheet of what is here.
      fit: a file, new, for what is found of this device (`gqa_jax.search.device_file`).
      repeats: turns, all contexts and batches in each; those whose prompts took 20 seconds have no other. seed: of weights and
        prompts.
      measured: told of each row after each turn.
    Raises:
      ConfigError: an unknown model, a context without room for a prompt, a file that is there.
    """
    from launch import serving_benchmark

    given = contexts.split(",") if isinstance(contexts, str) else contexts
    try:
        return serving_benchmark.run(
            models, contexts=None if given is None else [read_context(str(one)) for one in given], batches=batches,
            new_tokens=new_tokens, dtype=dtype, cache_dtype=cache_dtype, mesh=mesh, device=device, fit=fit, repeats=repeats,
            seed=seed, measured=measured,
        )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def read_prompts(path: str) -> list[str | list[int]]:
    """Prompts of a file, a line each without its end; of .jsonl a text, a list of ids, or {"prompt": either}; "-": of stdin.

    Raises ConfigError for a line of .jsonl that is none of these, naming it; OSError.
    """
    lines = (sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")).splitlines()
    if not path.endswith(".jsonl"):
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: no JSON: {error}") from error
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(one) is int for one in value)):
            raise ConfigError(f'{path}, line {number}: must be a text, a list of ids, or {{"prompt": either}}')
        found.append(value)
    return found


def export_hf(run: str, *, out: str, dtype: str | None = None) -> Any:
    """Writes a trained model as a folder that Hugging Face's readers open, a `gqa_jax.conversion.hf.Exported`.

    Args:
      run: folder of a run that is done or of imported parameters, local or on gs://. out: a new local folder.
      dtype: float32 or bfloat16, of the arrays; None: that of the parameters.
    Raises:
      ConfigError: no such run, a folder that holds something, too little room, a damaged checkpoint.
    """
    from gqa_jax.conversion import hf

    return hf.export(run, out, dtype)


def import_hf(folder: str, *, out: str) -> Any:
    """Imports the model of a Hugging Face folder of the Llama class, a `gqa_jax.conversion.hf.Imported`.

    Args:
      folder: local. out: a new folder, local or on gs://; a run to generate from, to continue, to compare with.
    Raises:
      ConfigError: another kind of model; arrays that are missing, too many, misshaped or damaged; a folder that isn't new.
    """
    from gqa_jax.conversion import hf

    return hf.read_in(folder, out)


def convert_heads(
    run: str,
    *,
    out: str,
    n_kv_heads: int | None = None,
    n_heads: int | None = None,
    method: str = HEAD_METHOD,
    store: str | None = None,
) -> Any:
    """Writes a trained model with other heads, a `gqa_jax.conversion.converting.Converted` with its loss before and after.

    Args:
      run: folder of a run that is done or of imported parameters, local or on gs://. out: a new folder, likewise.
      n_kv_heads: fewer are pooled, more are repetitions; None: as many as there. n_heads: query heads; None: all.
      method: what becomes of a group of key/value heads (`gqa_jax.config.HEAD_METHODS`).
      store: token store of the losses; None: the run's own.
    Raises:
      ConfigError: heads that can't be made of those, or are those; a folder that holds something.
    """
    from gqa_jax.conversion import converting

    return converting.convert_heads(run, out, n_kv_heads=n_kv_heads, n_heads=n_heads, method=method, store=store)


def export(grid: Cells | Source | str, *, allow_confounded: bool = False) -> Exported:
    """Writes loss and cost tables, fits, cheapest heads and pictures: of a grid into its folder, of a table of runs beside it.

    allow_confounded: of `open_source`.
    """
    from launch import export as exports

    if isinstance(grid, str) and grid.lower().endswith(grid_cells.TABLES):
        grid = open_source(grid, allow_confounded=allow_confounded)
    if not isinstance(grid, Cells | str):
        return exports.of_table(grid)
    cells = grid_cells.begun(grid)
    the, layout, engine = cells.choice, cells.layout, passes.recall(cells.layout, None)
    states = passes.look(cells.all, layout, engine).states
    if not any(now.state in state.FINAL for now in states) and (the.asked or not the.finished):
        raise ConfigError(f"no cell of {cells.name} has finished in {layout.root}: run it first")
    with passes.only_launcher(layout, 0.0 if engine.here else passes.PATIENCE_SECONDS):
        cells.write_plan()
        found = exports.of_grid(layout, cells.rules, allow_confounded)
    if missing := sum(now.state not in state.FINAL for now in states):
        under = " under today's rules" if the.rules == ruling.NEW and (the.others or the.kept) else ""
        found.notes.append(f"{missing} of {len(cells.all)} cells{under} are not finished and not in the tables")
    found.notes.extend(cells.strangers())
    return found


# Questions


def open_source(
    grid: str | None = None,
    *,
    preset: str | None = None,
    root: str | None = None,
    rules: str | None = None,
    allow_confounded: bool = False,
    **table: Any,
) -> Source:
    """The runs that a question is about.

    Args:
      grid: a grid file, the folder it was run in, or a .csv or .parquet file of runs of any trainer.
      preset: the paper's own data instead (`gqa_jax.search.presets`).
      root, rules: of a grid, as in `open_cells`; without rules all its runs, which must be under the same.
      allow_confounded: laws also where heads of a size saw neither equal tokens nor equal tokens per parameter.
      table: columns ("n_heads=H,loss=val_loss"), units, context_trained, heads_rule: of a table (`launch.studies.of_table`).
    """
    from launch import studies

    if preset is None and grid is None:
        raise ConfigError("give a GRID, or --preset paper for the paper's own data")
    if preset is not None:
        if grid is not None or root is not None:
            raise ConfigError(f"--preset {preset} or a GRID: not both")
        if rules is not None:
            raise ConfigError(f"--rules {rules} is for grids: the paper's data are under its own rules")
        if allow_confounded:
            raise ConfigError("--allow_confounded is for your runs: the laws of the paper's data are as they are")
    if grid is not None and grid.lower().endswith(grid_cells.TABLES):
        grid_cells.refuse({"root": root, "rules": rules}, "grids")
        return studies.of_table(grid, **table, allow_confounded=allow_confounded)
    grid_cells.refuse(table, "a table of runs (.csv, .parquet)")
    if preset is not None:
        return studies.of_preset(preset)
    source = studies.of_grid(grid, root, rules=rules, allow_confounded=allow_confounded)
    if source.rules == ruling.OLD and not source.asked:
        log.warning(ruling.SAID)
    return source


def _source(source: Source | str) -> Source:
    """One that is open, or that a notebook names: a preset, or the `grid` of `open_source`."""
    if not isinstance(source, str):
        return source
    from gqa_jax.search.presets import PRESETS

    return open_source(preset=source) if source in PRESETS else open_source(source)


@dataclasses.dataclass(frozen=True)
class Laws:
    """The laws of a source, and those of the training contexts that were asked for."""

    source: Source
    fits: Fits
    chosen: list[Fitted]

    def tables(self) -> list[pd.DataFrame]:
        """Of each that was asked for, a row per H: coefficients, their 95% intervals, R², noise, status, warnings."""
        from launch import grid_tables

        return [grid_tables.fit_table(one) for one in self.chosen]


def fit(
    source: Source | str,
    *,
    train_context: int | None = None,
    free_entropy: bool = False,
    entropy: float | None = None,
    huber_delta: float | None = None,
) -> Laws:
    """The laws L(N; H) of finished runs, with intervals, checks and warnings.

    Args:
      source: of `open_source`, or its name: a grid file, a folder, a table, "paper".
      train_context: default: all. free_entropy: an E per head configuration. entropy: E, given instead of fitted, nats.
      huber_delta: residuals beyond so many nats count linearly.
    """
    from launch import studies

    if free_entropy and entropy is not None:
        raise ConfigError("--free_entropy or --entropy: not both")
    given = {"entropy": entropy, "huber_delta": huber_delta, "shared_entropy": False if free_entropy else None}
    opened = _source(source)
    fits = studies.fit(opened, **{name: value for name, value in given.items() if value is not None})
    first = fits.at(train_context)
    return Laws(opened, fits, fits.fitted if train_context is None else [first])


def goals(
    cost: Objective | str,
    counted: str,
    *,
    device: str | None = None,
    prices: str | None = None,
    fits: str | None = None,
    several: bool = False,
    **settings: Any,
) -> list[Objective]:
    """The objectives of these settings (`gqa_jax.search.objectives.make`), one for each of the devices.

    Args:
      counted: the convention of a cost that is counted, where `settings` has none.
      device: names, separated by commas; of more than one where `several`. prices: whose, as in `gqa_jax.hardware.prices.load`.
      fits: a device that models must fit: `n_devices` and `batch` are of that one where the cost has no use for them.
      settings: None where not given.
    """
    from gqa_jax.search import objectives

    given = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(cost, str):
        if given or device is not None or prices is not None:
            raise ValueError(f"the objective {cost.name} has its settings already: give them where it is made")
        return [cost]
    names = [name.strip() for name in (device or "").split(",") if name.strip()]
    if len(names) > 1 and not several:
        raise ConfigError(f"--device {device}: one device here; `optimum` compares several")
    allowed = objectives.settings(cost)
    of_fits = () if fits is None else ("n_devices", "batch")
    given = {name: value for name, value in given.items() if name in allowed or name not in of_fits}
    if "convention" not in given and "convention" in allowed:
        given["convention"] = "exact" if "param_dtype" in given or "cache_dtype" in given else counted
    found = []
    for name in names or [None]:
        own = {} if prices is None else {"price": _price(prices, name, given.get("usd_per_hour"))}
        try:
            found.append(objectives.make(cost, **given, **own, device=name))
        except ValueError as error:
            raise ConfigError(f"--cost {cost}: {error}") from error
    return found


def _price(words: str, device: str | None, usd_per_hour: float | None) -> Price | None:
    """The price of a device that these words name. Raises ConfigError where there is none."""
    if device is None:
        raise ConfigError(f"--prices {words} given without a device: add --device")
    if usd_per_hour is not None:
        raise ConfigError(f"--prices {words} or --usd_per_hour {usd_per_hour}: not both")
    from gqa_jax.search import device_file

    listed = price_list.load(words)
    if device_file.is_file(device):
        device = device_file.read(device).data_sheet or device
    if device in hardware.CHIPS and device not in listed:
        raise ConfigError(f"--prices {words}: {device} has {price_list.listing(device)}")
    return listed.get(device)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """What `optimum` found, the laws that say so, and sentences on these."""

    source: Source
    laws: Fitted
    found: Answer | OwnAnswer | Comparison  # of a loss; of a model of one's own; on several devices
    also: list[str]  # whose laws they are, and what limits the models
    conventions: pd.DataFrame | None = None  # the answer in every convention of Z, where that was asked for

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        from gqa_jax.search.answer import records

        about = {"source": self.source.name, "train_context": self.laws.context, "status": self.laws.laws.status}
        more = {} if self.conventions is None else {"conventions": records(self.conventions)}
        return about | self.found.to_dict() | more


def optimum(
    source: Source | str,
    *,
    context: int | str,
    loss: float | None = None,
    like: str | None = None,
    train_context: int | None = None,
    cost: Objective | str = "z",
    device: str | None = None,
    fits: str | None = None,
    aspect: str | float | None = None,
    heads: Sequence[Heads] | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
    conventions: bool = False,
    **settings: Any,
) -> Optimum:
    """The cheapest heads and shape for a loss, or for what a model of one's own reaches, and how sure that is.

    Args:
      source: of `open_source`, or its name: a grid file, a folder, a table, "paper".
      context: tokens served, like 131072 or "128K". loss: nats per token, as in the runs. like: instead of a loss, a model
        (`gqa_jax.search.own_model.load`).
      train_context: whose laws answer; default: those of least noise.
      cost, device, settings: of `goals`; several devices, separated by commas, are compared.
      fits: only models whose parameters and caches fit this device.
      aspect, heads, draws, seed, method: of `gqa_jax.search.optimum.search`.
      conventions: also what the answer would be in every convention of Z.
    """
    from gqa_jax.search import devices, objectives, own_answer, own_model
    from gqa_jax.search import optimum as searching
    from gqa_jax.search.roofline import RooflineServing
    from launch import studies

    if (loss is None) == (like is None):
        raise ConfigError("give --loss, which must be reached, or --like, a model that you have")
    opened = _source(source)
    asked = goals(cost, opened.convention, device=device, fits=fits, several=True, **settings)
    laws = studies.fit(opened)
    one = laws.at(train_context)
    whose, limit = f"laws of the preset {opened.name}", None
    if opened.laws is None:
        whose = f"laws of the runs of {opened.name} that were trained at {one.context:,} tokens"
        whose += f" ({laws.reason})" if train_context is None and laws.reason else ""
    also = [whose]
    if fits is not None:
        own = {name: settings.get(name) for name in ("n_devices", "batch", "param_dtype", "cache_dtype")}
        limit = RooflineServing(fits, **{name: value for name, value in own.items() if value is not None})
        room = gb(limit.chip.server_bytes)
        also.append(f"within the {room} that a server fills of each of {limit.n_devices} x {limit.chip.name}")
    if conventions and like is not None:
        raise ConfigError("--conventions is for a --loss: leave it out with --like")
    if conventions and len(asked) > 1:
        raise ConfigError("--conventions is for one device: leave it out, or name one")
    context = _tokens(context)
    shapes = {"aspect": aspect, "heads": heads, "draws": draws, "seed": seed}
    how = {"convention": settings.get("convention") or opened.convention, "memory_limit": limit, "method": method} | shapes
    if like is not None:
        if len(asked) > 1:
            raise ConfigError(f"--device {device}: one device with --like")
        own = own_model.load(like)
        try:
            return Optimum(opened, one, own_answer.compare_own(one.laws, own, context, asked[0], **how), also)
        except ValueError as error:
            raise ConfigError(f"--like {like}: {error}") from error
    if len(asked) > 1:
        return Optimum(opened, one, devices.compare(one.laws, loss, context, asked, **how), also)
    found = searching.search(one.laws, loss, context, asked[0], **how)
    others = None
    if conventions:
        weights = asked[0] if isinstance(asked[0], objectives.Z) else None
        others = searching.convention_sensitivity(
            one.laws, loss, context, weights=weights, memory_limit=limit, method=method, **shapes
        )
    return Optimum(opened, one, found, also, others)


def next(
    source: Source | str,
    *,
    loss: float,
    context: int | str,
    budget: float,
    train_context: int | None = None,
    cost: Objective | str = "z",
    device: str | None = None,
    aspect: str | float | None = None,
    seed: int = 0,
    out: str | None = None,
    **settings: Any,
) -> Next:
    """The runs that would make an answer surer, and a grid file of them for `run`, which is written.

    Args:
      source: of `open_source`, from a grid file: its cells are chosen from.
      budget: FLOPs of training, for all of them. seed: of the draws and the simulated losses.
      out: the file; default: GRID-next.py, beside GRID. The others as in `optimum`.

    Raises:
      ConfigError: no grid file, a budget that no run keeps, a file that is there, or no laws yet and what to train first.
    """
    from launch import next_cells

    opened = _source(source)
    grid_cells.require_grid(opened.path or "")
    (goal,) = goals(cost, opened.convention, device=device, **settings)
    asked = next_cells.Asked(loss, _tokens(context), goal, aspect, budget, train_context, seed)
    return next_cells.choose(opened, asked, out)


def report(
    source: Source | str,
    *,
    context: int | str | None = None,
    loss: float | None = None,
    cost: Objective | str = "z",
    device: str | None = None,
    aspect: str | float | None = None,
    heads: Sequence[Heads] | None = None,
    out: str | None = None,
    **settings: Any,
) -> epath.Path:
    """Writes one HTML file with the answer, its certainty, tables, pictures and an explorer; returns its path.

    Args:
      source, cost, device, aspect, heads, settings: of `optimum`.
      context, loss: of the question that it opens with; default: the longest, and the grid's loss or what was reached.
      out: folder; default: report/ in the grid's folder, TABLE-report or runs/PRESET.
    """
    from launch import findings
    from launch import report as reports

    opened = _source(source)
    (objective,) = goals(cost, opened.convention, device=device, **settings)
    options = {name: value for name, value in {"device": device, **settings}.items() if value is not None}
    asked = {"loss": loss, "context": _tokens(context), "aspect": aspect, "heads": heads}
    found = findings.of(opened, objective, **asked, options=options)
    return reports.write(findings.folder(opened, out), found)


def _tokens(context: int | str | None) -> int | None:
    return read_context(context) if isinstance(context, str) else context
