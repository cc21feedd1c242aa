"""`python -m launch next`: which runs of a grid to train next, as a grid file."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gqa_jax import costs
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import probability, regret, si
from gqa_jax.laws import Heads
from gqa_jax.search import next_runs, optimum
from gqa_jax.search.answer import Answer
from gqa_jax.search.next_runs import Candidate, Choice, Question
from gqa_jax.search.objectives import Objective
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


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, and what may be spent on its answer."""

    loss: float  # nats per token
    context: int  # tokens served
    objective: Objective
    aspect: Any  # of `optimum.search`
    budget: float  # FLOPs of training
    train_context: int | None  # whose laws answer; None: those of least noise
    seed: int  # of the draws and simulated losses


@dataclasses.dataclass(frozen=True)
class Next:
    """The runs to train next, and what is known without them."""

    source: Source
    asked: Asked
    laws: Fitted
    possible: Possible
    today: Answer
    choice: Choice
    path: Path  # of the grid file; not written where nothing is chosen
    command: str  # that trains it


def choose(source: Source, asked: Asked, out: str | None = None) -> Next:
    """Chooses runs, and writes the grid file of them to `out` (default: GRID-next.py).

    Raises ConfigError: no grid file, a budget that no run keeps, a file that is there, or no laws yet and what to train first.
    """
    path = source.path or source.name
    if not path.endswith(".py"):
        raise ConfigError(f"{path}: give the grid file (.py) that the folder was made with: its cells are chosen from")
    file = Path(out or f"{path.removesuffix('.py')}-next.py")
    if file.exists():
        raise ConfigError(f"{file} is there: run it, remove it, or give another name with --out FILE")
    the_grid = grid.load(path)
    cells = training(grid.cells(grid.under_old_rules(the_grid) if source.rules == rules.OLD else the_grid))
    fits = studies.fit(source)
    if not fits.fitted:
        why = "; ".join(f"trained at {context}: {reason}" for context, reason in fits.unfitted.items())
        raise ConfigError(f"nothing can be told yet: {why}. Cells that would make a fit possible: {_first(cells, source)}")
    one = fits.at(asked.train_context)
    question = asked.loss, asked.context, asked.objective
    today = optimum.search(one.laws, *question, aspect=asked.aspect, seed=asked.seed)
    possible = candidates(one, cells, source)
    choice = next_runs.choose(
        one.laws,
        [Question(*question, aspect=asked.aspect)],
        possible.candidates,
        asked.budget,
        pending=possible.pending,
        seed=asked.seed,
    )
    command = f"python -m launch run {shlex.quote(os.fspath(file))} --root {shlex.quote(os.fspath(source.layout.root))}"
    found = Next(source, asked, one, possible, today, choice, file, command + source.option)
    if choice.names:
        with open(file, "x") as written:
            written.write(grid_file(found, cells))
    return found


def show(found: Next, console: Console) -> None:
    """What is known today, the runs, and the command that trains them."""
    asked, today, choice = found.asked, found.today, found.choice

    def say(text: str) -> None:
        console.print(text, highlight=False)

    count = f"{len(found.laws.rows)} runs; {len(found.possible.candidates)} could be trained"
    pending = f", {len(found.possible.pending)} are under way" if found.possible.pending else ""
    say(f"{found.source.name}, trained at {found.laws.context:,} tokens: {count}{pending}")
    sure = f", the cheapest with probability {probability(choice.probability_now)}" if math.isnan(today.far) else ", a guess"
    answer = f"the answer for a loss of {asked.loss:g} at {asked.context:,} tokens: {today.heads}{sure}"
    say(f"{answer}; its expected regret is {regret(choice.regret_now)}")
    for warning in dict.fromkeys([*today.warnings, *choice.warnings]):
        say(f"[yellow]warning:[/] {warning}")
    if not choice.names:
        say(f"nothing to train for it: {choice.stopped}")
        return
    console.print(_screen(choice))
    console.print()
    say(choice.stopped)
    console.print(f"{found.path}: {found.command}", highlight=False, soft_wrap=True)


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


def grid_file(found: Next, cells: Sequence[TrainingCell]) -> str:
    """The text of a grid file: finished and chosen cells of another one, because tables are of the cells of a grid file."""
    source, asked, possible, choice = found.source, found.asked, found.possible, found.choice
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
        f"Asked on {time.strftime('%Y-%m-%d', time.gmtime())}: a loss of {asked.loss:g} at {asked.context:,} tokens, "
        f"cost {asked.objective.name}, within {asked.budget:.3g} FLOPs.",
        f"The expected regret of the answer, {regret(choice.regret_now)} now, should fall by {regret(choice.gain)} "
        f"(standard error {regret(choice.gain_error)}).",
        "",
        f"    {found.command}",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "from launch import grid",
        "",
        f"BASE = Path(__file__).parent / {os.path.relpath(source.path, found.path.parent)!r}",
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
