"""What `status` and `run` show of a grid, and how far they are."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from gqa_jax.formatting import context, counted, duration, percent
from gqa_jax.hardware import Price
from gqa_jax.hardware.allocation import PLATFORMS
from launch import state
from launch.cells import Cell, Layout, of_several
from launch.commands import Progress, Run
from launch.executors.base import Executor
from launch.fit import Fit
from launch.money import Rate, billed, cost
from launch.run import Pass
from launch.state import CellState
from launch.tables import ROWS

PLAIN_SECONDS = 15.0  # between lines where there is no terminal
COLORS = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "stalled": "red"}


def table(
    cells: Sequence[Cell], states: Sequence[CellState], title: str, prices: Mapping[str, Price], rows: bool = False
) -> Table:
    """A row per cell; of more than ROWS cells a row per size, unless `rows`. Columns that nothing is known for are left out."""
    counts = Counter(now.state for now in states)
    spent = money(states, prices)
    title = f"{title}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())
    title += "" if spent is None else f"; ${spent:,.2f} so far"
    if len(cells) > ROWS and not rows:
        return _by_size(cells, states, title, prices)
    of_cells = [_row(cell, now, prices) for cell, now in zip(cells, states, strict=True)]
    devices = {row["device"] for row in of_cells} - {""}
    if len(devices) == 1:  # said once
        title += f"; on {devices.pop()}"
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in _COLUMNS:
        is_told = bool(devices) if name == "device" else any(row[name] for row in of_cells)
        if is_told or name in ("cell", "state", "step"):
            view.add_column(name, justify="left" if name in ("cell", "state", "device", "where") else "right", no_wrap=True)
    shown = [column.header for column in view.columns]
    for row in of_cells:
        view.add_row(*(row[name] for name in shown))
    return view


def _by_size(cells: Sequence[Cell], states: Sequence[CellState], title: str, prices: Mapping[str, Price]) -> Table:
    """A row per kind and size of cells, with how many are in each state."""
    groups: dict[tuple, list[tuple[Cell, CellState]]] = defaultdict(list)
    for cell, now in zip(cells, states, strict=True):
        groups[cell.kind, cell.size].append((cell, now))
    names = [name for name in state.STATES if any(now.state == name for now in states)]
    spent = {key: money([now for _, now in members], prices) for key, members in groups.items()}
    has_usd = any(usd is not None for usd in spent.values())
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    view.add_column("size", no_wrap=True)
    for name in ("cells", *names, "trained", "ETA", *(["$"] if has_usd else [])):
        view.add_column(name, justify="right", no_wrap=True)
    for key, members in groups.items():
        counts = Counter(now.state for _, now in members)
        shares = [1.0 if now.state in state.FINAL else min(1.0, (now.step or 0) / cell.steps) for cell, now in members]
        etas = [now.eta_seconds for _, now in members if now.state == "running" and now.eta_seconds is not None]
        usd = spent[key]
        view.add_row(
            escape(_size_of(members[0][0])),
            f"{len(members):,}",
            *(f"[{COLORS.get(name, 'default')}]{counts[name]:,}[/]" if counts[name] else "" for name in names),
            percent(sum(shares) / len(shares)) if any(shares) else "",
            duration(max(etas)) if etas else "",
            *([] if not has_usd else ["" if usd is None else f"{usd:,.2f}"]),
        )
    return view


def _size_of(cell: Cell) -> str:
    """The size of a cell in a few words, as its kind describes it."""
    facts = cell.describe()
    shape = f"{facts['n_layers']}x{facts['d_model']}" if {"n_layers", "d_model"} <= facts.keys() else ""
    words = [facts.get("size") or shape or str(cell.size), context(facts["context"]) if "context" in facts else ""]
    return " ".join(filter(None, [*words, "" if cell.kind == "training" else cell.kind]))


_COLUMNS = ("cell", "state", "step", "tok/s", "ETA", "tries", "beat", "$", "loss", "device", "where")


def _row(cell: Cell, now: CellState, prices: Mapping[str, Price]) -> dict[str, str]:
    usd = cost(now, prices)
    alive = now.state in ("running", "stalled")
    return {
        "cell": cell.name,
        "state": f"[{COLORS.get(now.state, 'default')}]{now.state}[/]",
        "step": "" if now.step is None else f"{now.step:,}/{cell.steps:,}",
        "tok/s": "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}",
        "ETA": duration(now.eta_seconds) if alive and now.eta_seconds is not None else "",
        "tries": "" if now.attempts < 2 else str(now.attempts),
        "beat": duration(now.heartbeat_age) if alive and now.heartbeat_age is not None else "",
        "$": "" if usd is None else f"{usd:,.2f}",
        "loss": "" if now.loss is None else f"{now.loss:.4f}",
        "device": escape(now.device or ""),
        "where": escape(now.where or "") if now.state in state.ACTIVE else "",
    }


def money(states: Sequence[CellState], prices: Mapping[str, Price]) -> float | None:
    """US dollars of all, None when no price is known for any."""
    known = [usd for now in states if (usd := cost(now, prices)) is not None]
    return sum(known) if known else None


def unlike_given(cells: Sequence[Cell], states: Sequence[CellState], engine: Executor) -> list[str]:
    """A line where cells have trained on a CPU though the engine gives them something else."""
    given = engine.options.allocation
    on_cpu = [cell.name for cell, now in zip(cells, states, strict=True) if now.device and now.device.lower() == "cpu"]
    if given is None or given.platform == "cpu" or not on_cpu:
        return []
    return [
        f"{counted(len(on_cpu), 'cell')} trained on cpu, like {on_cpu[0]}, where {engine.engine} gives a cell {given.said()}: "
        f"the losses hold; if the {PLATFORMS[given.platform]}s were paid for, see in the log why they were not used"
    ]


def print_failures(
    cells: Sequence[Cell],
    states: Sequence[CellState],
    layout: Layout,
    engine: Executor,
    about: str,
    console: Console,
) -> None:
    """One paragraph a cause: how many cells, what, the file to read, the command that repeats one here.

    about: how a command line names these cells: the grid, and its options.
    """
    causes = defaultdict(list)
    for cell, now in zip(cells, states, strict=True):
        if now.state in state.BAD:
            causes[now.state, now.failure, now.cause].append(cell)
    for (kind, failure, cause), failed in causes.items():
        first = failed[0]
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        name = kind if failure is None else f"{kind} ({failure})"
        files = engine.logs(first.name)
        _line(console, f"[red]{name}[/]: {first.name}{others}: {escape(str(cause))}")
        _line(console, f"  read    {escape(str(files[-1] if files else layout.cell(first.name)))}")
        if kind == "stalled":
            _line(console, f"  end it  python -m launch cancel {about} {first.name}")
            continue
        _line(console, f"  repeat  {escape(shlex.join(first.command(layout.cell(first.name))))}")
        _line(console, f"  again   python -m launch retry {about}, then run")
    for line in state.waiting([cell.name for cell in cells], states):
        _line(console, escape(line))


def print_bill(now: Pass, rate: Rate | None, console: Console) -> None:
    """What machines cost an hour now."""
    count, usd = billed(now, rate)
    if count and usd is not None:
        _line(console, f"{counted(count, 'cell')} with machines: ${usd:,.2f} an hour now, each {escape(rate.said())}")


def print_pass(now: Pass, console: Console) -> None:
    """What a pass did, and what it could not do."""
    for note in now.notes:
        _line(console, escape(note))
    for line in of_several(now.refused.items()):
        _line(console, f"[yellow]not submitted now[/]: {escape(line)}")
    for line in of_several(now.held.items()):
        _line(console, f"[yellow]not submitted[/]: {escape(line)}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


class Watch(Progress):
    """Of a command line: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, prices: Mapping[str, Price]):
        self._console, self._prices = console, prices
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._started, self._spoken, self._ended = time.monotonic(), 0.0, 0
        self._share: list[float] | None = None
        self._said: set[str] = set()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def begins(self, found: Run) -> None:
        cells, engine = found.cells, found.engine
        self._prices = self._prices | ({} if found.rate is None else {found.rate.rents.chip: found.rate.price})
        at_a_time = f"{engine.capacity} at a time{'' if engine.here else f' on {engine.engine}'}"
        count = f"{counted(len(found.chosen), 'cell')}, {len(found.todo)} to train, {at_a_time}"
        _line(self._console, f"{cells.name}: {count}, in {cells.layout.root}")
        if cells.choice.others:
            _line(self._console, f"{cells.choice.said(cells.layout)}: they stay as they are, and in the tables")
        for sentence in cells.strangers():
            _line(self._console, sentence)

    @contextlib.contextmanager
    def compiling(self, total: int, at_a_time: int) -> Iterator[Callable[[Fit, int, int], None]]:
        console = Console(stderr=True)
        started = spoken = time.monotonic()

        def changed(one: Fit, done: int, everything: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            left = duration((now - started) / done * (everything - done))
            verdict = "fits" if one.fits else "does not fit"
            line = f"{done} of {everything}, {left} left: {one.cell.name} {verdict} {one.slice.name}"
            bar.update(task, completed=done, description=line)
            if not console.is_terminal and (now - spoken > PLAIN_SECONDS or done == everything):
                spoken = now
                _line(console, line)

        with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"compiling, {at_a_time} at a time", total=total)
            yield changed

    def passed(self, now: Pass) -> None:
        if self._live:
            self._live.start()
        self._print_news(now)  # what engine and policy say, once
        clock = time.monotonic()
        elapsed = duration(clock - self._started)
        left = self._eta(now)
        if self._live:
            self._live.update(table(now.cells, now.states, f"{elapsed}{left}", self._prices))
            return
        counts = Counter(s.state for s in now.states)
        ended = sum(counts[name] for name in (*state.FINAL, "failed"))
        if ended > self._ended or clock - self._spoken > PLAIN_SECONDS:
            self._spoken, self._ended = clock, ended
            running = [job.cell for job in (*now.jobs.values(), *now.submitted)]
            names = ", ".join(running[:4]) + (f" and {len(running) - 4} more" if len(running) > 4 else "")
            done, failed = sum(counts[name] for name in state.FINAL), counts["failed"]
            _line(self._console, f"{elapsed}: {done} of {len(now.states)} done, {failed} failed{left}; {names}")

    def _print_news(self, now: Pass) -> None:
        refused = {cell: cause for cell, cause in now.refused.items() if cause not in self._said}
        held = {cell: cause for cell, cause in now.held.items() if cause not in self._said}
        self._said |= {*refused.values(), *held.values()}
        print_pass(dataclasses.replace(now, refused=refused, held=held), self._console)

    def _eta(self, now: Pass) -> str:
        """Time left, from the training FLOPs done since the start and those that remain."""
        flops = [cell.train_flops for cell in now.cells]
        share = [1.0 if s.state in state.FINAL else (s.step or 0) / (s.steps or 1) for s in now.states]
        if self._share is None:
            self._share = share
        done = sum(f * (a - b) for f, a, b in zip(flops, share, self._share, strict=True))
        left = sum(f * (1 - a) for f, a in zip(flops, share, strict=True))
        elapsed = time.monotonic() - self._started
        return f", {duration(elapsed * left / done)} left" if done > 0 else ""
