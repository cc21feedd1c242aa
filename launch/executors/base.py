"""Engines that run cells, behind one interface: local processes, Slurm, Cloud TPU queued resources, SkyPilot.

An executor keeps no state of its own. What there is to know is in the run folders and in the engine: `jobs` asks it once, by
the names of its jobs, which are functions of the grid's folder and the cell. The engine's unique name is the claim on a cell.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from etils import epath

from gqa_jax import config, errors, hardware
from gqa_jax.errors import ConfigError
from gqa_jax.hardware import Slice
from gqa_jax.hardware.allocation import Allocation
from launch.cells import REPOSITORY, Cell, Layout

ENGINES = ("local", "slurm", "tpu", "sky")  # modules of this package, each with an `Executor`
CLUSTERS = REPOSITORY / "configs" / "clusters"

QUEUED, RUNNING, DEAD = "queued", "running", "dead"
LINGER_SECONDS = 600.0  # that machines may stay after their cell is done: they go by themselves within a minute
REFUSALS = 3  # in a row after which no more cells are submitted: the quota is used up, or the engine is down

# Forms of options.
LINE = (r"\S(.*\S)?", "a text of one line; leave it out for the default")
BASH = (r"(?s).*", "lines of bash, as text")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an engine has for a cell now. A job that has ended and holds nothing is not there any more."""

    cell: str
    id: str  # the engine's own
    state: str  # QUEUED, RUNNING; DEAD: ended, but keeps its name or quota until `reconcile` has removed it
    detail: str = ""  # the engine's words: why it waits, why it ended
    since: float | None = None  # seconds since the epoch that it is RUNNING
    where: str = ""  # nodes, or a zone


class Look(dict[str, Job]):
    """What one look at an engine found: the job of each cell; and in the engine's own form all that is behind them.

    `listed` is None where the engine did not answer.
    """

    def __init__(self, jobs: Mapping[str, Job], listed: Any):
        super().__init__(jobs)
        self.listed = listed


@dataclasses.dataclass(frozen=True)
class Submission:
    """Exactly what an engine is given for a cell; what `run --dry_run` shows."""

    cell: str
    command: str  # what is called, as a person would type it
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the run folder, written before: name -> text


class SubmitError(Exception):
    """The engine refused a cell for a reason that may pass (quota, an outage): the others are still submitted."""


class Submitted(NamedTuple):
    """What came of a submission."""

    cell: Cell
    result: Job | SubmitError | ConfigError  # a refusal is SubmitError where it may pass
    time: float  # when the engine was asked, seconds since the epoch


class Rents(NamedTuple):
    """What an engine has for a cell while it runs, as a bill has it."""

    chip: str  # its name (`gqa_jax.hardware`)
    chips: float  # less than one: a share of it
    spot: bool = False
    region: str | None = None  # as price lists call it


@dataclasses.dataclass(frozen=True)
class Options:
    """What a cluster file may set, for every engine. Made by `load`, which checks names and types."""

    least: ClassVar[Mapping[str, int]] = {"max_jobs": 1}  # of options that are numbers, where they are set
    forms: ClassVar[Mapping[str, tuple[str, str]]] = {}  # of texts, and of lists of texts: a pattern, and in words
    reserved: ClassVar[tuple[str, ...]] = ()  # beginnings of variables that `environment` may not set
    claims: ClassVar[tuple[str, ...]] = ()  # options that decide which list of jobs the engine has

    engine: str = "local"
    topology: str | None = None  # slice of a cell (gqa_jax.hardware): what must fit it is compiled before it is submitted
    environment: dict = dataclasses.field(default_factory=dict)  # variables of the training processes, name -> text
    max_jobs: int = 100  # cells on the engine at a time

    def __post_init__(self):
        if self.topology is not None:
            hardware.find(self.topology)
        for name, value in self.environment.items():
            if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or name.startswith(self.reserved):
                raise ConfigError(
                    f"environment.{name} = {value!r}: must be a name of letters, digits and _ that is not set by the engine or "
                    "the launcher, and a text"
                )
        for name, least in (Options.least | self.least).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} = {value}: must be at least {least}")
        for name, (pattern, words) in self.forms.items():
            value = getattr(self, name)
            for text in value if isinstance(value, list) else [value]:
                if text is not None and not (isinstance(text, str) and re.fullmatch(pattern, text)):
                    raise ConfigError(f"{name} = {text!r}: must be {words}")

    @property
    def slice(self) -> Slice | None:
        """All the chips of a cell; None where no topology was named."""
        return None if self.topology is None else hardware.find(self.topology)

    @property
    def allocation(self) -> Allocation | None:
        """Devices that a cell is given, of which training is told; None: they are not known."""
        return None if self.topology is None else Allocation.of_slices(hardware.find(self.topology))

    def facts(self) -> dict[str, Any]:
        """What `make` needs to make the engine again: cluster.json of a grid."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def has_jobs_of(self, facts: Mapping[str, Any]) -> bool:
        """Whether these options and those `facts` lead to the same list of jobs."""
        return all(self.facts().get(name) == facts.get(name) for name in {*self.claims, "engine"})


class Executor(abc.ABC):
    """One engine, for the grid in `layout`."""

    Options: ClassVar[type[Options]] = Options
    #: Whether cells are children of this process: they end with it, so it holds the grid and stays until the last has ended.
    #: Else they go on by themselves, and each submission is recorded in the cell's folder.
    here: ClassVar[bool] = False
    pass_seconds: ClassVar[float] = 30.0  # between two looks of a launcher

    def __init__(self, options: Options, layout: Layout):
        self.options, self.layout = options, layout

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        """An engine of its own goes on when the launcher ends."""

    @property
    def engine(self) -> str:
        return self.options.engine

    @property
    def slice(self) -> Slice | None:
        """All the chips of a cell; None: they are not known."""
        return self.options.slice

    @property
    def rents(self) -> Rents | None:
        """What a cell has while it runs; None: it is not known."""
        return None if self.slice is None else Rents(self.slice.chip.name, self.slice.n_chips)

    @property
    def capacity(self) -> int:
        """Cells that may be on the engine at a time."""
        return self.options.max_jobs

    def with_slots(self, count: int) -> Executor:
        """The engine with so many cells of this machine at a time. Raises ConfigError for one on others."""
        raise ConfigError(
            f"--slots is for --on local; on {self.engine} max_jobs of the cluster file limits the cells at a time"
        )

    def check(self) -> None:  # noqa: B027 (nothing to check is an answer)
        """Raises ConfigError for what would fail later: programs, credentials, names that the engine does not know, the root.

        Asks the engine, submits and writes nothing.
        """

    def prepare(self) -> None:  # noqa: B027
        """What must be in place once before cells are submitted, such as the code."""

    @abc.abstractmethod
    def submission(self, cell: Cell) -> Submission:
        """What `submit` would give the engine. Pure: needs no engine."""

    @abc.abstractmethod
    def submit(self, cell: Cell) -> Job:
        """Submits a cell, unless the engine has a job of its name: then that one is the answer, also for two launchers at once.

        Raises SubmitError when the engine refuses it now, ConfigError when it would refuse it always.
        """

    def submit_all(self, cells: Sequence[Cell], jobs: Look) -> Iterator[Submitted]:
        """Submits cells in turn, as `submit`; `jobs`: what the engine had when it was last asked.

        After three refusals in a row the rest is left. Raises SubmitError when the engine does not say what came of them.
        """
        refusals = 0
        for cell in cells:
            at = time.time()
            try:
                result = self.submit(cell)
            except (SubmitError, ConfigError) as error:
                result = error
            refusals = refusals + 1 if isinstance(result, Exception) else 0
            yield Submitted(cell, result, at)
            if refusals == REFUSALS:
                return

    @abc.abstractmethod
    def jobs(self) -> Look:
        """The jobs of this grid by cell, DEAD ones too, in one call to the engine (one per zone).

        Raises SubmitError when the engine does not answer.
        """

    @abc.abstractmethod
    def cancel(self, cells: Sequence[str]) -> None:
        """Ends the jobs of these cells, where there are any; what was saved stays. They are not started again by the engine."""

    def reconcile(self, jobs: Look) -> list[str]:
        """Removes what only holds names or quota: DEAD jobs, second jobs of a cell; `jobs`: what `jobs` has just returned.

        Returns a sentence for each thing done.
        """
        return []

    def wait(self, seconds: float) -> None:
        """Returns after so long, or earlier when a job is known to have ended."""
        time.sleep(seconds)

    def logs(self, cell: str) -> list[epath.Path]:
        """Files that hold what the processes of a cell printed, in the order to read them; not all need to be there."""
        return [self.layout.cell(cell) / "log.txt"]


def load(on: str, layout: Layout) -> Executor:
    """The executor that `--on` names: an engine, with the options of configs/clusters/ENGINE.toml, or another cluster file.

    Raises ConfigError: no such engine or file, an option that the engine does not have (naming the closest), a wrong type.
    """
    path = CLUSTERS / f"{on}.toml" if on in ENGINES else Path(on)
    if not path.is_file():
        if on in ENGINES:
            return make({"engine": on}, layout)
        raise ConfigError(f"--on {on}: must be {', '.join(ENGINES)}, or a cluster file like {CLUSTERS.name}/slurm.toml")
    try:
        return make(tomllib.loads(path.read_text()), layout)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def make(values: Mapping[str, Any], layout: Layout) -> Executor:
    """The executor of these options, which name their engine. Raises ConfigError as `load`."""
    engine = values.get("engine")
    if engine not in ENGINES:
        raise ConfigError(f"engine = {engine!r}: {errors.closest(str(engine), ENGINES)}")
    kind = importlib.import_module(f"launch.executors.{engine}").Executor
    return kind(config.from_mapping(kind.Options, values), layout)
