"""Who may import whom: one table of all modules, from arithmetic to programs, and which of them do without jax.

A row imports only rows above it, so there are no circles, and the library never knows the launcher. Where a row names no
package of jax's family, and no row that it imports does, its modules import none: a notebook on a laptop, the launcher on a
login node and the planner use them. An import inside a function, or for types alone, is in `lazily`. What is not seen here:
`launch.executors.base` finds an engine's module by the name of the engine, and `gqa_jax` and `gqa_jax.laws` their own by the
name of an attribute.
"""

import ast
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("gqa_jax", "launch", "configs", "benchmarks")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain")


@dataclasses.dataclass(frozen=True)
class Row:
    """A module, or a package with all its modules, and what it may import; a name that begins with a dot is of gqa_jax."""

    name: str
    imports: str = ""  # when it is imported itself
    lazily: str = ""  # when one of its functions is called
    outside: str = ""  # of JAX, when it is imported

    def rows(self, lazily: bool = False) -> list[str]:
        """Names of the rows that it may import."""
        names = f"{self.imports} {self.lazily if lazily else ''}".split()
        return [f"gqa_jax{name}" if name.startswith(".") else name for name in names]


TABLE = (
    # Arithmetic and its configuration.
    Row("gqa_jax.errors"),
    Row("gqa_jax.formatting"),
    Row("gqa_jax.hardware", ".errors"),
    Row("gqa_jax.hardware.allocation", ".errors .hardware"),
    Row("gqa_jax.hardware.faults", ".errors"),
    Row("gqa_jax.hardware.host"),
    Row("gqa_jax.shapes"),
    Row("gqa_jax.mesh", ".errors"),
    Row("gqa_jax.costs", ".shapes"),
    Row("gqa_jax.config", ".errors .shapes .mesh", lazily=".costs"),
    Row("gqa_jax.hardware.prices", ".errors .hardware"),
    Row("gqa_jax.gcs", ".errors"),
    Row("gqa_jax.storage", ".errors", lazily=".gcs"),
    # Text, and what trains on it.
    Row("gqa_jax.data", ".errors .formatting .hardware.host .config .storage"),
    Row("gqa_jax.data.catalog", ".errors .storage .data"),
    Row("gqa_jax.data.reader", ".errors .config .data .data.catalog"),
    Row("gqa_jax.training"),
    Row("gqa_jax.collectives", outside="jax"),
    Row("gqa_jax.attention", ".errors .hardware .collectives", outside="jax"),
    Row("gqa_jax.training.loss", ".collectives .attention", outside="jax"),
    Row("gqa_jax.training.sharding", ".errors .mesh .collectives", outside="jax"),
    Row("gqa_jax.model", ".config .attention", outside="flax jax"),
    Row(
        "gqa_jax.training.parallel",
        ".mesh .config .collectives .attention .training.loss .training.sharding .model",
        outside="jax",
    ),
    Row("gqa_jax.training.optimizer", ".config", outside="jax optax"),
    Row("gqa_jax.training.evaluation", ".errors", lazily=".data.reader"),
    Row(
        "gqa_jax.training.program",
        ".errors .mesh .config .attention .training.sharding .model .training.parallel .training.optimizer",
        outside="jax optax",
    ),
    Row("gqa_jax.training.signals"),
    Row("gqa_jax.training.records", ".errors .storage"),
    Row("gqa_jax.training.run_folder", ".errors .config .storage .training.records", lazily=".hardware.faults"),
    Row("gqa_jax.training.devices", ".errors .hardware.allocation .training.run_folder", outside="jax"),
    Row(
        "gqa_jax.training.distributed",
        ".errors .hardware.faults .config .storage .training.signals .training.run_folder .training.devices",
        outside="jax",
    ),
    Row("gqa_jax.training.start", ".errors .config .storage .data .training.run_folder"),
    Row(
        "gqa_jax.training.checkpoint",
        ".errors .config .storage .training.run_folder .training.distributed .training.start",
        outside="jax orbax",
    ),
    Row("gqa_jax.training.services", ".errors .config .storage .training.run_folder"),
    Row("gqa_jax.training.remote_rows", ".storage"),
    Row(
        "gqa_jax.training.metrics",
        ".errors .config .storage .training.records .training.run_folder",
        lazily=".training.services .training.remote_rows",
    ),
    # What a run needs, before it is started.
    Row("gqa_jax.planning"),
    Row("gqa_jax.planning.share", ".costs .config"),
    Row("gqa_jax.planning.traffic", ".planning.share"),
    Row("gqa_jax.planning.planner", ".errors .hardware .mesh .costs .config .planning.share .planning.traffic"),
    Row("gqa_jax.planning.topologies", ".hardware .mesh .training.sharding", outside="jax"),
    Row("gqa_jax.planning.compile_check", ".hardware .config .storage", lazily=".training.program .planning.topologies"),
    # The program that trains.
    Row(
        "gqa_jax.training.parameters",
        ".errors .config .storage .data .model .training.checkpoint .training.start",
        outside="jax orbax",
    ),
    # With other heads, and as others write it.
    Row("gqa_jax.conversion"),
    Row(
        "gqa_jax.conversion.heads",
        ".errors .config .model .training.sharding .training.checkpoint .training.start",
        outside="jax",
    ),
    # A model that is trained, to use.
    Row("gqa_jax.inference"),
    Row("gqa_jax.inference.sampling", ".errors .config .model", outside="jax"),
    Row("gqa_jax.inference.weights", ".errors .mesh .config", outside="jax"),
    Row(
        "gqa_jax.inference.engine",
        ".errors .mesh .config .attention .training.sharding .model .inference.sampling .inference.weights",
        outside="jax",
    ),
    Row(
        "gqa_jax.inference.loaded",
        ".errors .formatting .config .data .data.catalog .training.loss .model .training.checkpoint .training.start "
        ".training.parameters .inference.sampling .inference.engine",
        outside="jax",
    ),
    Row("gqa_jax.conversion.hf_config", ".errors .costs .config"),
    Row("gqa_jax.conversion.hf_tensors", ".errors .formatting .storage"),
    Row("gqa_jax.conversion.hf_tokenizer", ".errors .data"),
    Row("gqa_jax.conversion.model_card", ".formatting .costs .storage .data .training.run_folder .training.start"),
    Row(
        "gqa_jax.conversion.hf",
        ".errors .formatting .costs .config .storage .data .training.start .training.parameters .inference.loaded "
        ".conversion.hf_config .conversion.hf_tensors .conversion.hf_tokenizer .conversion.model_card",
    ),
    Row(
        "gqa_jax.conversion.converting",
        ".errors .formatting .costs .config .storage .data .data.catalog .data.reader .training.evaluation .training.program "
        ".training.sharding .training.start .training.parameters .planning.planner .inference.loaded .conversion.heads "
        ".conversion.hf_tokenizer",
        outside="jax",
    ),
    Row("gqa_jax.inference.timing", ".inference.sampling .inference.engine", outside="jax"),
    # The program that trains.
    Row(
        "gqa_jax.training.setup",
        ".errors .config .storage .data .data.catalog .data.reader .training.run_folder "
        ".training.distributed .training.checkpoint .planning.planner .training.start",
        lazily=".conversion.heads",
        outside="jax",
    ),
    Row(
        "gqa_jax.training.loop",
        ".attention .hardware .costs .config .storage .data .training.sharding .training.optimizer .training.evaluation "
        ".training.program .training.run_folder .training.distributed .training.checkpoint .training.metrics "
        ".planning.planner .training.start .training.setup .training.devices",
        outside="jax",
    ),
    Row(
        "gqa_jax.train",
        ".errors .config .storage .training.evaluation .training.run_folder .training.distributed .training.loop",
        outside="jax",
    ),
    # Losses to laws, laws to answers.
    Row(
        "gqa_jax.results",
        ".errors .costs .config .storage .training.evaluation .training.records .training.run_folder",
        lazily=".training.metrics",
    ),
    Row("gqa_jax.differences", ".errors .storage .training.evaluation .training.run_folder .results"),
    Row("gqa_jax.laws", ".formatting .shapes .costs"),
    Row("gqa_jax.laws.joint", ".shapes .costs .laws"),
    Row("gqa_jax.laws.loss_nd", ".errors .shapes .laws"),
    Row("gqa_jax.laws.query_heads", ".laws"),
    Row("gqa_jax.laws.trends", ".laws"),
    Row("gqa_jax.laws.validation", ".laws .laws.joint"),
    Row("gqa_jax.laws.planning", ".formatting .laws"),
    Row("gqa_jax.laws.external", ".errors .storage .results .laws"),
    Row("gqa_jax.search.invariance", ".laws"),
    Row("gqa_jax.search.presets", ".errors .shapes .laws"),
    Row("gqa_jax.search"),
    Row("gqa_jax.search.own_model", ".errors .costs .storage .training.start .conversion.hf_config"),
    Row("gqa_jax.search.device_file", ".hardware .costs"),
    Row("gqa_jax.search.roofline", ".errors .formatting .hardware .mesh .costs .search.device_file"),
    Row("gqa_jax.search.calibration", ".hardware .costs .search.device_file .search.roofline"),
    Row("gqa_jax.search.objectives", ".errors .costs"),
    Row("gqa_jax.search.ranking", ".formatting"),
    Row("gqa_jax.search.shape_rule", ".shapes .laws"),
    Row("gqa_jax.search.serving_words", ".formatting .laws .search.roofline"),
    Row("gqa_jax.search.words", ".formatting .costs .laws .search.ranking .search.shape_rule", lazily=".search.serving_words"),
    Row("gqa_jax.search.answer", ".costs .laws", lazily=".search.words"),
    Row("gqa_jax.search.candidates", ".formatting .shapes .costs .laws .search.objectives .search.ranking .search.shape_rule"),
    Row("gqa_jax.search.serving", ".hardware .costs .search.roofline .search.objectives .search.candidates"),
    Row("gqa_jax.search.buildable", ".costs .laws .search.shape_rule .search.answer .search.candidates"),
    Row("gqa_jax.search.caveats", ".formatting .laws .search.answer .search.candidates"),
    Row(
        "gqa_jax.search.optimum",
        ".formatting .shapes .costs .laws .search.objectives .search.ranking .search.shape_rule .search.answer "
        ".search.candidates .search.buildable .search.caveats",
    ),
    Row(
        "gqa_jax.search.own_answer",
        ".formatting .laws .search.own_model .search.objectives .search.ranking .search.answer .search.candidates "
        ".search.optimum",
    ),
    Row(
        "gqa_jax.search.devices",
        ".hardware.prices .laws .search.roofline .search.objectives .search.answer .search.candidates .search.serving "
        ".search.optimum",
    ),
    Row("gqa_jax.search.equal_compute", ".costs .laws .laws.loss_nd .search.objectives .search.ranking .search.candidates"),
    Row("gqa_jax.search.next_runs", ".laws .search.objectives .search.optimum"),
    Row(
        "gqa_jax.plots",
        ".formatting .shapes .costs .results .differences .laws .laws.query_heads .search.invariance "
        ".search.objectives .search.shape_rule .search.answer .search.candidates .search.optimum",
    ),
    Row(
        "gqa_jax.search.study",
        ".errors .formatting .costs .storage .results .differences .laws .laws.external .search.presets "
        ".search.objectives .search.candidates .search.optimum",
    ),
    Row(
        "gqa_jax",
        lazily=".inference.loaded .results .differences .laws.external .search.invariance .search.presets .search.study",
    ),
    # Grids: what a person runs.
    Row("launch"),
    Row("launch.executors"),
    Row("launch.cells", ".storage"),
    Row(
        "launch.training_cells",
        ".errors .costs .config .storage .data .data.catalog .data.reader .training.records .training.run_folder "
        ".training.start launch.cells",
    ),
    Row("launch.grid_file", ".errors .formatting .costs .config"),
    Row("launch.grid", ".errors .config launch.cells launch.training_cells launch.grid_file"),
    Row("launch.rules", ".errors .storage .training.run_folder launch.cells launch.training_cells launch.grid"),
    Row("launch.executors.base", ".errors .hardware .hardware.allocation .config launch.cells"),
    Row("launch.executors.job_names", "launch.cells"),
    Row("launch.executors.queue", ".errors .storage launch.cells launch.executors.base"),
    Row("launch.executors.checkout", ".errors .formatting launch.cells"),
    Row(
        "launch.executors.bundle",
        ".errors .storage .data.catalog .training.run_folder launch.cells launch.executors.base launch.executors.checkout",
    ),
    Row(
        "launch.executors.local",
        ".errors .hardware .hardware.host .hardware.allocation .storage .training.records .training.run_folder launch.cells "
        "launch.executors.base",
    ),
    Row("launch.executors.slurm_words"),
    Row(
        "launch.executors.slurm",
        ".errors .hardware .hardware.allocation .storage .training.records .training.run_folder launch.cells "
        "launch.executors.base launch.executors.job_names launch.executors.queue launch.executors.slurm_words",
    ),
    Row(
        "launch.executors.tpu",
        ".errors .hardware.allocation .storage .training.records .training.run_folder launch.cells launch.executors.base "
        "launch.executors.job_names launch.executors.bundle",
    ),
    Row(
        "launch.executors.sky",
        ".errors .hardware .hardware.allocation .storage .training.records .training.run_folder launch.cells "
        "launch.executors.base launch.executors.job_names launch.executors.queue launch.executors.bundle",
    ),
    Row("launch.state", ".storage .training.records .training.run_folder launch.cells launch.executors.base"),
    Row("launch.run", ".errors .storage launch.cells launch.executors.base launch.state"),
    Row("launch.watch", ".errors .formatting launch.cells launch.executors.base launch.state launch.run"),
    Row("launch.reach", ".errors .storage .data.catalog launch.executors.base"),
    Row(
        "launch.grid_cells",
        ".errors .storage launch.cells launch.training_cells launch.grid launch.rules launch.executors.base launch.state "
        "launch.run launch.reach",
    ),
    Row("launch.fit", ".errors .formatting .hardware .costs .config .planning.planner .planning.compile_check launch.cells"),
    Row(
        "launch.money",
        ".errors .formatting .hardware .hardware.prices launch.cells launch.training_cells launch.executors.base launch.state "
        "launch.run launch.fit",
    ),
    Row("launch.notify", "launch.state launch.run"),
    Row("launch.reap", ".storage launch.cells launch.executors.base launch.state launch.run"),
    Row("launch.tables", lazily=".search.answer"),
    Row(
        "launch.plan",
        ".errors .formatting .hardware .costs .planning.planner launch.cells launch.state launch.fit launch.tables",
    ),
    Row(
        "launch.studies",
        ".errors .storage .training.run_folder .results .laws .search.study launch.cells launch.grid launch.rules",
    ),
    Row("launch.columns", ".formatting .laws .search.objectives .search.serving_words .search.words launch.tables"),
    Row(
        "launch.grid_tables",
        ".formatting .laws .laws.validation .laws.planning .search.candidates .search.optimum launch.tables "
        "launch.studies launch.columns",
    ),
    Row(
        "launch.answers",
        ".formatting .search.serving_words .search.words .search.answer .search.candidates launch.tables "
        "launch.studies launch.columns launch.grid_tables",
    ),
    Row(
        "launch.device_tables",
        ".formatting .search.roofline .search.serving_words .search.words .search.devices launch.tables "
        "launch.columns launch.grid_tables launch.answers",
    ),
    Row(
        "launch.export",
        ".formatting .storage .results .differences .laws .plots launch.cells launch.rules launch.studies launch.grid_tables",
    ),
    Row(
        "launch.next_cells",
        ".errors .formatting .costs .config .laws .search.objectives .search.answer .search.optimum .search.next_runs "
        "launch.training_cells launch.grid launch.rules launch.state launch.tables launch.studies",
    ),
    Row(
        "launch.report",
        ".formatting .costs .storage .laws .search.roofline .search.objectives .search.ranking .search.shape_rule "
        ".search.serving_words .search.words .search.answer .search.candidates .search.optimum .plots "
        "launch.tables launch.columns launch.grid_tables launch.answers",
    ),
    Row(
        "launch.findings",
        ".errors .formatting .shapes .costs .storage .results .differences .laws .search.invariance "
        ".search.objectives .search.answer .search.optimum .plots launch.training_cells launch.state "
        "launch.studies launch.grid_tables launch.report",
    ),
    Row(
        "launch.serving_benchmark",
        ".errors .formatting .hardware .hardware.host .shapes .mesh .costs .config .storage .model .inference.engine "
        ".inference.loaded "
        ".inference.timing .search.own_model .search.device_file .search.roofline .search.calibration launch.tables",
        outside="jax",
    ),
    Row(
        "launch.commands",
        ".errors .formatting .hardware .hardware.host .hardware.prices .config .storage .training.records launch.cells "
        "launch.training_cells "
        "launch.rules launch.executors.base launch.state launch.run launch.watch launch.reach launch.grid_cells launch.fit "
        "launch.money launch.notify launch.reap",
        lazily=".inference.loaded .conversion.hf .conversion.converting "
        ".laws .search.presets .search.own_model .search.device_file .search.roofline .search.objectives "
        ".search.answer .search.optimum "
        ".search.own_answer .search.devices launch.plan launch.serving_benchmark launch.studies launch.grid_tables "
        "launch.export launch.next_cells "
        "launch.report launch.findings",
    ),
    Row(
        "launch.screen",
        ".formatting .hardware .hardware.allocation launch.cells launch.executors.base launch.state launch.run launch.fit "
        "launch.money launch.tables launch.commands",
    ),
    Row(
        "launch.options",
        ".formatting .hardware launch.rules launch.executors.base launch.tables",
        lazily=".laws .search.objectives",
    ),
    Row(
        "launch.__main__",
        ".errors .formatting .hardware .hardware.prices .config .training.signals launch.executors.base launch.state "
        "launch.grid_cells launch.commands launch.money launch.screen launch.options",
        lazily=".search.answer .search.own_answer .search.devices launch.plan launch.grid_tables launch.answers "
        "launch.device_tables launch.export launch.next_cells",
    ),
    # What is built on both.
    Row("configs", ".errors .shapes .config .storage launch.grid"),
    Row(
        "benchmarks",
        ".errors .formatting .hardware .hardware.host .shapes .costs .config .storage .data .data.catalog .data.reader "
        ".attention .model .conversion.converting "
        ".inference.sampling .inference.engine gqa_jax .training.loss .training.sharding .training.optimizer "
        ".training.evaluation .training.program .training.run_folder .training.checkpoint .planning.share .planning.traffic "
        ".planning.planner .planning.topologies .results .differences "
        ".laws .laws.planning .search.presets .search.own_model .search.roofline .search.objectives .search.ranking "
        ".search.optimum .search.next_runs .plots launch.cells launch.training_cells launch.grid launch.studies "
        "launch.report launch.findings launch.executors.local launch.grid_cells launch.options launch.__main__ "
        "launch.export .training.metrics tests",
        outside="jax",
    ),
)
ROWS = {row.name: row for row in TABLE}


# The three cores: what a stranger reads to know how a run trains, how losses become an answer, and how a grid is run, with the
# lines that each may have. Attention and planning are chapters of their own, and the table of chips is data. A leaf is imported
# where it is met: a service that shows a run, gs://, a further law, a cost of a device, a kind of cells, an engine.
# `python -m tests.test_imports` prints their files.
CORES = {
    "trains": (
        6500,
        "collectives config costs data.catalog data.corpus data.reader data.store data.vocabulary errors mesh model shapes "
        "storage train training.checkpoint training.devices training.distributed training.evaluation training.loop "
        "training.loss training.metrics training.optimizer training.parallel training.program training.records "
        "training.run_folder training.setup training.sharding training.signals training.start",
    ),
    "answers": (
        4800,
        "formatting laws laws.block laws.by_heads laws.checks laws.fitting laws.heads laws.law laws.posterior laws.runs "
        "laws.shape results search.answer search.buildable search.candidates search.caveats search.objectives "
        "search.optimum search.ranking search.shape_rule",
    ),
    "launches": (1_200, "launch.cells launch.executors.base launch.grid launch.run launch.state launch.watch"),
}


def core(name: str) -> set[str]:
    """Full names of its modules."""
    return {module if module.startswith("launch.") else f"gqa_jax.{module}" for module in CORES[name][1].split()}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of PACKAGES by its name."""
    found = {}
    for path in (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def row_of(module: str) -> Row | None:
    """The row of a module: its own, or that of its package, unless the modules of that have rows of their own."""
    own = ROWS.get(module)
    package = module.partition(".")[0] if module.startswith(("configs", "benchmarks")) else ".".join(module.split(".")[:2])
    return own or ROWS.get(package)


@functools.cache
def imports_of(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a module imports when it is imported, and what else in functions or for types: full names of modules."""
    eager, lazy = set(), set()

    def visit(node: ast.AST, found: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            match child:
                case ast.Import():
                    found.update(alias.name for alias in child.names)
                case ast.ImportFrom():
                    assert child.level == 0, f"{module}: write imports in full"
                    for alias in child.names:
                        name = f"{child.module}.{alias.name}"
                        found.add(name if name in modules() else child.module)
            visit(child, lazy if inside or types else found)

    visit(ast.parse(modules()[module].read_text()), eager)
    return frozenset(eager), frozenset(lazy - eager)


def of_row(row: Row) -> list[str]:
    """The modules of a row."""
    return [module for module in modules() if row_of(module) is row]


def rows_in(names: frozenset[str], beside: Row) -> set[str]:
    """Rows of imported names, without `beside`; "tests" where they are of the tests."""
    ours = {name for name in names if name.partition(".")[0] in (*PACKAGES, "tests")}
    return {"tests" if name.partition(".")[0] == "tests" else row_of(name).name for name in ours} - {beside.name}


def without_jax() -> list[Row]:
    """Rows that name no package of JAX, and import no row that does."""
    free: list[Row] = []
    for row in TABLE:
        if not row.outside and all(ROWS[name] in free for name in row.rows() if name in ROWS):
            free.append(row)
    return free


def test_every_module_is_in_the_table():
    assert [module for module in modules() if row_of(module) is None] == [], "give it a row, below what it imports"
    assert len(modules()) > 130
    assert [row.name for row in TABLE if not of_row(row)] == []


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_imports_what_it_may(row):
    eager, lazy, outside = set(), set(), set()
    for module in of_row(row):
        now, later = imports_of(module)
        eager |= rows_in(now, row)
        lazy |= rows_in(later, row)
        outside |= {name.partition(".")[0] for name in now} & set(JAX)
    assert eager <= set(row.rows()), f"{row.name} imports more than its row in tests/test_imports.py says"
    assert lazy <= set(row.rows(lazily=True)), f"functions of {row.name} import more than its row in tests/test_imports.py says"
    assert outside <= set(row.outside.split()), f"{row.name} imports more of jax than its row in tests/test_imports.py says"
    said = {*row.rows(lazily=True), *row.outside.split()}
    assert said == eager | lazy | outside, f"the row of {row.name} in tests/test_imports.py says what nobody imports any more"


def test_a_row_imports_rows_above_it_only():
    places = {row.name: i for i, row in enumerate(TABLE)}
    upward = [(row.name, name) for row in TABLE for name in row.rows(lazily=True) if places.get(name, -1) > places[row.name]]
    assert upward == []
    library = [row for row in TABLE if row.name.partition(".")[0] == "gqa_jax"]
    assert TABLE[: len(library)] == tuple(library)  # all of it above launch, configs and benchmarks


def loaded_by(module: str) -> set[str]:
    """A module and all of PACKAGES that is imported when it is."""
    found, ahead = set(), [module]
    while ahead:
        if (name := ahead.pop()) in modules() and name not in found:
            found.add(name)
            ahead += imports_of(name)[0]
    return found


def sizes(name: str) -> dict[str, int]:
    """Lines of the modules of a core."""
    return {module: len(modules()[module].read_text().splitlines()) for module in sorted(core(name))}


@pytest.mark.parametrize("name", CORES)
def test_a_core_has_no_more_lines_than_it_may(name):
    assert sum(sizes(name).values()) <= CORES[name][0]


def test_a_run_loads_the_core_that_trains_and_no_leaf():
    beside = ("gqa_jax.attention", "gqa_jax.hardware", "gqa_jax.planning")
    assert {name for name in loaded_by("gqa_jax.train") if not name.startswith(beside)} == core("trains")


def test_a_search_loads_the_core_that_answers_and_no_leaf():
    loaded = loaded_by("gqa_jax.search.optimum") | loaded_by("gqa_jax.results")
    assert loaded - core("trains") - {"gqa_jax.search"} == core("answers")


def test_a_pass_over_cells_loads_no_kind_of_them_and_no_engine():
    loaded = {name for name in loaded_by("launch.watch") if name.startswith("launch.")}
    assert loaded == core("launches") - {"launch.grid"}


def test_few_modules_stand_beside_the_chapters():
    assert len(list((REPOSITORY / "gqa_jax").glob("*.py"))) <= 14


def test_what_does_without_jax_is_imported_without_it():
    """In a process of its own, as source says nothing of what other packages import; and without pyplot, which has a state."""
    names = [module for row in without_jax() if row.name not in ("configs", "benchmarks") for module in of_row(row)]
    known = ("costs", "shapes", "config", "storage", "training.run_folder", "training.metrics", "training.start", "results",
             "planning.planner", "planning.compile_check", "hardware.prices", "laws.joint",
             "data.reader", "data.prepare", "data.store", "search.optimum",
             "search.objectives", "search.next_runs", "plots.style")  # fmt: skip
    assert {f"gqa_jax.{name}" for name in known} | {
        "launch.__main__",
        "launch.executors.tpu",
        "launch.report.answer_map",
    } <= set(names)
    assert "gqa_jax.model" not in names
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    if found := [other for other in sys.argv[1].split() if other in sys.modules]:\n"
        "        sys.exit(f'{name} brings {found}')\n"
    )
    unwanted = " ".join((*JAX, "matplotlib.pyplot"))
    done = subprocess.run([sys.executable, "-c", code, unwanted, *names], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for name, (most, _) in CORES.items():
        print(f"{name}: {sum(sizes(name).values()):,} lines in {len(core(name))} modules, at most {most:,}")
        for module, lines in sizes(name).items():
            print(f"  {lines:5,} {module}")
    for package in ("gqa_jax", "launch"):
        files = [path for module, path in modules().items() if module.partition(".")[0] == package]
        print(f"{package}: {sum(len(path.read_text().splitlines()) for path in files):,} lines in {len(files)} modules")
