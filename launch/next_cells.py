"""`python -m launch next`: which runs of a grid to train next, as a grid file."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from gqa_jax import costs
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import probability, regret, si
from gqa_jax.laws import Heads
from gqa_jax.search import next_runs, optimum
from gqa_jax.search.next_runs import Candidate, Choice, Question
from launch import grid, rules, state, studies
from launch.studies import Fitted, Source
from launch.tables import Column, Table
from launch.training_cells import TrainingCell, training

WAITING = ("planned", "preempted", "lost")  # states of cells that can be chosen
UNDER_WAY = ("queued", "running", "stalled")


@dataclasses.dataclass(frozen=True)
class Possible:
    """Runs that could be chosen, by name of their candidate."""

    cells: dict[str, str]  # of the grid, without a result: candidate -> cell
    seeds: dict[str, tuple[str, int]]  # finished cells once more: candidate -> (cell, seed)
    candidates: list[Candidate]
    pending: list[Candidate]


def ask(arguments: argparse.Namespace, source: Source, objective: Callable, console: Console) -> int:
    """Chooses, prints, and writes the grid file; returns the exit code.

    Raises ConfigError: no grid file, a budget that no run keeps, a file that is there, or no laws yet and what to train first.
    """
    if not arguments.grid.endswith(".py"):
        raise ConfigError(
            f"{arguments.grid}: give the grid file (.py) that the folder was made with: its cells are chosen from"
        )
    out = Path(arguments.out or f"{arguments.grid.removesuffix('.py')}-next.py")
    if out.exists():
        raise ConfigError(f"{out} is there: run it, remove it, or give another name with --out FILE")
    the_grid = grid.load(arguments.grid)
    cells = training(grid.cells(grid.under_old_rules(the_grid) if source.rules == rules.OLD else the_grid))
    fits = studies.fit(source)
    if not fits.fitted:
        why = "; ".join(f"trained at {context}: {reason}" for context, reason in fits.unfitted.items())
        raise ConfigError(f"nothing can be told yet: {why}. Cells that would make a fit possible: {_first(cells, source)}")
    one = fits.at(arguments.train_context)
    goal = objective(arguments, source.convention)
    today = optimum.search(one.laws, arguments.loss, arguments.context, goal, aspect=arguments.aspect, seed=arguments.seed)
    possible = candidates(one, cells, source)
    questions = [Question(arguments.loss, arguments.context, goal, aspect=arguments.aspect)]
    choice = next_runs.choose(
        one.laws, questions, possible.candidates, arguments.budget, pending=possible.pending, seed=arguments.seed
    )
    console.print(
        f"{source.name}, trained at {one.context:,} tokens: {len(one.rows)} runs; {len(possible.candidates)} could be trained"
        + (f", {len(possible.pending)} are under way" if possible.pending else ""),
        highlight=False,
    )
    console.print(
        f"the answer for a loss of {arguments.loss:g} at {arguments.context:,} tokens: {today.heads}"
        + (f", the cheapest with probability {probability(choice.probability_now)}" if math.isnan(today.far) else ", a guess")
        + f"; its expected regret is {regret(choice.regret_now)}",
        highlight=False,
    )
    for warning in dict.fromkeys([*today.warnings, *choice.warnings]):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if not choice.names:
        console.print(f"nothing to train for it: {choice.stopped}", highlight=False)
        return 0
    console.print(_screen(choice))
    console.print()
    console.print(choice.stopped, highlight=False)
    command = (
        f"python -m launch run {shlex.quote(os.fspath(out))} --root {shlex.quote(os.fspath(source.layout.root))}{source.option}"
    )
    text = grid_file(arguments, source, cells, possible, choice, out, command)
    with open(out, "x") as file:
        file.write(text)
    console.print(f"{out}: {command}", highlight=False, soft_wrap=True)
    return 0


def candidates(one: Fitted, cells: Sequence[TrainingCell], source: Source) -> Possible:
    """Cells of the laws' context and heads without a result, and another seed of those that have one; no failed ones."""
    done = set(source.loss.loc[source.loss["status"] == "done", "cell"])
    found = Possible({}, {}, [], [])
    again = seeds_there(cells, source)
    for cell in cells:
        config = cell.config
        heads = Heads(config.model.n_heads, config.model.n_kv_heads)
        if config.context_length != one.context or config.continue_from is not None or heads not in one.laws:
            continue
        size = costs.count_params(config.model, one.laws.size_convention).non_embedding
        name_of_size = f"{config.model.n_layers}x{config.model.d_model}"
        if cell.name in done:
            seed = 1 + max([c.config.seed for c in cells if _same(c.config, config)] + again.get(cell.name, []))
            name = f"{cell.name} with seed {seed}"
            found.seeds[name] = (cell.name, seed)
            found.candidates.append(Candidate(name, heads, size, cell.train_flops, name_of_size))
            continue
        now = state.of(cell, source.layout.cell(cell.name), time.time())
        if now.state in WAITING:
            found.cells[cell.name] = cell.name
            found.candidates.append(Candidate(cell.name, heads, size, cell.train_flops, name_of_size))
        elif now.state in UNDER_WAY:
            found.pending.append(Candidate(cell.name, heads, size, cell.train_flops, name_of_size))
    return found


def seeds_there(cells: Sequence[TrainingCell], source: Source) -> dict[str, list[int]]:
    """Seeds of finished runs that are cells of the grid file but for their seed: earlier choices."""
    extra = set(source.loss["cell"]) - {cell.name for cell in cells}
    found: dict[str, list[int]] = {}
    for cell in cells if extra else ():
        for seed in sorted({int(seed) for seed in source.loss["seed"].dropna()}):
            if TrainingCell(dataclasses.replace(cell.config, seed=seed), cell.data_fingerprint).name in extra:
                found.setdefault(cell.name, []).append(seed)
    return found


def grid_file(
    arguments: argparse.Namespace,
    source: Source,
    cells: Sequence[TrainingCell],
    possible: Possible,
    choice: Choice,
    out: Path,
    command: str,
) -> str:
    """The text of a grid file: finished and chosen cells of another one, because tables are of the cells of a grid file."""
    there = set(source.loss["cell"])
    seeds = seeds_there(cells, source)
    for name in choice.names:
        if name in possible.seeds:
            cell, seed = possible.seeds[name]
            seeds.setdefault(cell, []).append(seed)
    lists = {
        "CHOSEN": ("cells of BASE without a result", [possible.cells[n] for n in choice.names if n in possible.cells]),
        "FINISHED": ("or under way: they stay in the tables", [c.name for c in cells if c.name in there]),
    }
    lists["FINISHED"][1].extend(run.name for run in possible.pending)
    lines = [
        f'"""What to train next of {source.name}: {len(choice.names)} runs, {choice.cost:.3g} FLOPs.',
        "",
        f"Asked on {time.strftime('%Y-%m-%d', time.gmtime())}: a loss of {arguments.loss:g} at {arguments.context:,} tokens, "
        f"cost {arguments.cost}, within {arguments.budget:.3g} FLOPs.",
        f"The expected regret of the answer, {regret(choice.regret_now)} now, should fall by {regret(choice.gain)} "
        f"(standard error {regret(choice.gain_error)}).",
        "",
        f"    {command}",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "from launch import grid",
        "",
        f"BASE = Path(__file__).parent / {os.path.relpath(arguments.grid, out.parent)!r}",
        "SEEDS = {  # cells of BASE that are trained once more",
        *(f"    {cell!r}: {others!r}," for cell, others in seeds.items()),
        "}",
    ]
    for name, (what, values) in lists.items():
        lines += [f"{name} = [  # {what}", *(f"    {value!r}," for value in values), "]"]
    lines += ["", "", "def get_grid():", "    return grid.part(BASE, [*CHOSEN, *FINISHED], SEEDS)", ""]
    return "\n".join(lines)


def _screen(choice: Choice) -> Table:
    """The runs in their order. Narrow: runs, what they cost, and the regret that is left stay."""
    columns = [
        Column("train", lambda row: row.name, "left", 0),
        Column("FLOPs", lambda row: si(row.cost), rank=0),
        Column("all so far", lambda row: si(row.total_cost), rank=3),
        Column("expected regret\nafter it", lambda row: regret(row.regret_after), rank=0),
        Column("gain\nso far", lambda row: regret(row.total_gain), rank=1),
        Column("± error", lambda row: regret(row.total_gain_error), rank=2, name="error of the gain"),
    ]
    notes = ["expected regret: what the heads of the answer cost above the cheapest, on average over the draws of the laws"]
    return Table.of(choice.steps, columns, "next", "What to train, in this order", notes)


def _same(one: TrainConfig, other: TrainConfig) -> bool:
    """The same run but for its seed."""
    return dataclasses.replace(one, seed=other.seed) == other


def _first(cells: Sequence[TrainingCell], source: Source) -> str:
    """The cheapest cells that give some H three sizes."""
    done = set(source.loss.loc[source.loss["status"] == "done", "cell"])
    groups: dict[tuple, list[TrainingCell]] = {}
    for cell in cells:
        if cell.config.continue_from is None:
            model = cell.config.model
            groups.setdefault((cell.config.context_length, model.n_heads, model.n_kv_heads), []).append(cell)
    options = []
    for group in groups.values():
        missing = sorted((cell for cell in group if cell.name not in done), key=lambda cell: cell.train_flops)
        need = max(1, 3 - (len(group) - len(missing)))
        if len(missing) >= need:
            options.append(missing[:need])
    if not options:
        return "none: the grid has too few sizes per head configuration, add some"
    return ", ".join(cell.name for cell in min(options, key=lambda group: sum(cell.train_flops for cell in group)))
