"""How much of the core the tests hold: random mutants of it, and which of them a test notices.

A mutant is one small change of one line: a comparison, an operator, a constant, a condition, a call that is left out. The list
is made once, from a seed. A change of structure may move a line: a mutant is then found again by its text (and where that is
there several times, by the function that it is in), so that the same mutants can be tried before and after.

    python -m benchmarks.mutants make --seed 17 --count 200 --out mutants.csv      random mutants of CORE
    python -m benchmarks.mutants cover mutants.csv --out covered.json              which fast tests run their lines, in one run
    python -m benchmarks.mutants run mutants.csv covered.json --out killed.csv     tries them, a process at a time; goes on

`cover` and `run` are best started in a worktree of their own: `run` writes each mutant into its file, and puts the file back.
Of a line that many tests run, `run` takes up to 40, the fastest first: a mutant that survives them is listed as a survivor.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS, SECONDS = 40, 240  # of a mutant: tests at most; time for each start of pytest

# What trains, what answers, what launches. A list that was made before has the names of its day.
CORE = {
    "gqa_jax": "shapes mesh costs config storage model train results",
    "gqa_jax/attention": "api spec dispatch decoding vjp bounds xla context",
    "gqa_jax/training": "loss sharding parallel optimizer program evaluation checkpoint metrics run_folder distributed loop "
    "setup",
    "gqa_jax/data": "reader store",
    "gqa_jax/planning": "planner share",
    "gqa_jax/laws": "fitting runs by_heads posterior law heads shape",
    "gqa_jax/search": "ranking optimum candidates answer objectives shape_rule roofline",
    "launch": "grid state run rules cells",
    "launch/executors": "base local slurm sky",
}

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OTHER_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: `before`, a piece of source that begins in `line` of `function` in `file`, becomes `after`."""

    number: int
    file: str
    function: str
    line: int
    text: str  # of the whole line
    column: int  # in it, without its indentation
    before: str
    after: str


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What this node might become."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield ast.Compare(node.left, [COMPARISONS[type(op)]()], node.comparators)
        case ast.BinOp() if type(node.op) in OPERATORS and not isinstance(node.left, ast.Constant | ast.JoinedStr | ast.List):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.IfExp() | ast.If():
            test = node.test
            yield from () if isinstance(test, ast.Compare) else [ast.UnaryOp(ast.Not(), test)]
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in OTHER_CALLS:
            yield ast.Call(ast.Name(OTHER_CALLS[name]), node.args, node.keywords)
        case ast.Call(func=ast.Attribute(attr=name)) if name in OTHER_CALLS:
            yield ast.Call(ast.Attribute(node.func.value, OTHER_CALLS[name]), node.args, node.keywords)
        case ast.Expr(value=ast.Call()):
            yield ast.Constant(None)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a file whose piece of source is on one line."""
    source = (REPOSITORY / file).read_text()
    lines, found = source.splitlines(), []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".strip(".")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
                node, ast.Raise | ast.JoinedStr
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function)
        target = node.test if isinstance(node, ast.If | ast.IfExp) else node
        for changed in changes(node):
            if target.lineno != target.end_lineno or not function:
                continue
            text = lines[target.lineno - 1]
            raw = text.encode()
            before = raw[target.col_offset : target.end_col_offset].decode()
            after = ast.unparse(ast.fix_missing_locations(changed))
            after = f"({after})" if isinstance(changed, ast.expr) and not isinstance(node, ast.Expr) else after
            column = len(raw[: target.col_offset].decode()) - (len(text) - len(text.lstrip()))
            found.append(Mutant(0, file, function, target.lineno, text.strip(), column, before, after))

    visit(ast.parse(source), "")
    return found


def make(seed: int, count: int) -> list[Mutant]:
    """`count` random mutants of CORE, each of another line."""
    everything = [m for folder, names in CORE.items() for name in names.split() for m in mutants_of(f"{folder}/{name}.py")]
    random.Random(seed).shuffle(everything)
    chosen: dict[tuple[str, int], Mutant] = {}
    for mutant in everything:
        if len(chosen) < count:
            chosen.setdefault((mutant.file, mutant.line), mutant)
    return [dataclasses.replace(mutant, number=i) for i, mutant in enumerate(chosen.values(), 1)]


def place(mutant: Mutant, moved: dict[str, str]) -> tuple[str, int] | None:
    """File and line of today that the mutant is of; None: its line is gone."""
    found = []
    for path in sorted([*REPOSITORY.glob("gqa_jax/**/*.py"), *REPOSITORY.glob("launch/**/*.py")]):
        file = path.relative_to(REPOSITORY).as_posix()
        lines = path.read_text().splitlines()
        found += [(file, i) for i, line in enumerate(lines, 1) if line.strip() == mutant.text]
    if not found:
        return None
    name = mutant.function.rpartition(".")[2]
    for narrower in (
        lambda file, line: file == moved.get(mutant.file, mutant.file),
        lambda file, line: function_at(file, line).rpartition(".")[2] == name,
        lambda file, line: function_at(file, line) == mutant.function,
        lambda file, line: line == mutant.line,
    ):
        if len(found) > 1:
            found = [spot for spot in found if narrower(*spot)] or found
    file, line = found[0]
    if Path(file).stem != Path(mutant.file).stem and function_at(file, line).rpartition(".")[2] != name:
        return None  # the same text, of something else
    return file, line


def function_at(file: str, line: int) -> str:
    """Qualified name of the innermost function or class that has the line."""
    name = ""

    def visit(node: ast.AST, inside: str) -> None:
        nonlocal name
        for child in ast.iter_child_nodes(node):
            deeper = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                deeper = f"{inside}.{child.name}".strip(".")
                if child.lineno <= line <= child.end_lineno:
                    name = deeper
            visit(child, deeper)

    visit(ast.parse((REPOSITORY / file).read_text()), "")
    return name


# `sitecustomize` of pytest's processes and of those that tests start: which test runs a line that has a mutant. A line without
# one is met once, and then costs nothing.
WATCH = """
import json, os, sys

monitoring = sys.monitoring
with open(os.environ["MUTANTS_LINES"]) as file:
    wanted = {name: set(lines) for name, lines in json.load(file).items()}
seen = set()

def line(code, number):
    if number not in wanted.get(code.co_filename, ()):
        return monitoring.DISABLE
    met = [code.co_filename, number, os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]]
    if met[2] and tuple(met) not in seen:
        seen.add(tuple(met))
        at = os.open(os.environ["MUTANTS_MET"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(at, (json.dumps(met) + "\\n").encode())
        os.close(at)

if monitoring.get_tool(monitoring.COVERAGE_ID) is None:
    monitoring.use_tool_id(monitoring.COVERAGE_ID, "mutants")
    monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, line)
    monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
"""

# A plugin of pytest: how long each test takes.
SECONDS_OF = """
import json, os

seconds = {}

def pytest_runtest_logreport(report):
    seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        with open(os.environ["MUTANTS_SECONDS"], "w") as file:
            json.dump(seconds, file)
"""


def cover(mutants: list[Mutant], out: Path, moved: dict[str, str], workers: str) -> int:
    """Runs the fast tests once, and writes {"lines": {file: {line: [tests]}}, "seconds": {test: seconds}}.

    Of the lines of these mutants alone. Returns the exit code of pytest.
    """
    folder = out.with_suffix(".parts").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(WATCH)
    (folder / "mutants_seconds.py").write_text(SECONDS_OF)
    wanted: dict[str, list[int]] = {}
    for spot in filter(None, (place(mutant, moved) for mutant in mutants)):
        wanted.setdefault(os.fspath(REPOSITORY / spot[0]), []).append(spot[1])
    (folder / "lines.json").write_text(json.dumps(wanted))
    met, seconds = folder / "met.jsonl", folder / "seconds.json"
    met.write_text("")
    environment = os.environ | {
        "MUTANTS_LINES": os.fspath(folder / "lines.json"),
        "MUTANTS_MET": os.fspath(met),
        "MUTANTS_SECONDS": os.fspath(seconds),
        "PYTHONPATH": os.pathsep.join([os.fspath(folder), os.fspath(REPOSITORY)]),
    }
    argv = [sys.executable, "-m", "pytest", "-p", "mutants_seconds", "-n", workers, "--dist", "loadfile"]
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment, check=False)
    lines: dict[str, dict[int, list[str]]] = {}
    for file, line, test in {tuple(json.loads(row)) for row in met.read_text().splitlines()}:
        lines.setdefault(Path(file).relative_to(REPOSITORY).as_posix(), {}).setdefault(line, []).append(test)
    out.write_text(json.dumps({"lines": lines, "seconds": json.loads(seconds.read_text())}))
    return done.returncode


def tests_of(covered: dict, file: str, line: int) -> list[str]:
    """Up to TESTS tests that run the line, fast ones first, at least one of every test file."""
    tests = sorted(set(covered["lines"].get(file, {}).get(str(line), [])), key=lambda test: covered["seconds"].get(test, 9e9))
    first_of_file = list({test.partition("::")[0]: test for test in reversed(tests)}.values())
    return list(dict.fromkeys([*tests[: TESTS // 2], *reversed(first_of_file), *tests[TESTS // 2 :]]))[:TESTS]


def attempt(mutant: Mutant, covered: dict, moved: dict[str, str]) -> dict:
    """What becomes of a mutant: gone, uncovered, killed or survived; and where, and by which test."""
    spot = place(mutant, moved)
    if spot is None:
        return {"outcome": "gone", "where": "", "by": ""}
    file, line = spot
    where = f"{file}:{line}"
    tests = tests_of(covered, file, line)
    if not tests:
        return {"outcome": "uncovered", "where": where, "by": ""}
    path = REPOSITORY / file
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    indent = len(lines[line - 1]) - len(lines[line - 1].lstrip())
    start = indent + mutant.column
    assert lines[line - 1][start : start + len(mutant.before)] == mutant.before
    lines[line - 1] = lines[line - 1][:start] + mutant.after + lines[line - 1][start + len(mutant.before) :]
    try:
        path.write_text("".join(lines))
        argv = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", "--tb=no", *tests]
        environment = os.environ | {"PYTHONPATH": os.fspath(REPOSITORY)}
        options = {"capture_output": True, "text": True, "timeout": SECONDS, "check": False}
        try:
            done = subprocess.run(argv, cwd=REPOSITORY, env=environment, **options)
        except subprocess.TimeoutExpired:
            return {"outcome": "killed", "where": where, "by": f"no end in {SECONDS} s"}
    finally:
        path.write_text(source)
    if done.returncode == 0:
        return {"outcome": "survived", "where": where, "by": f"{len(tests)} tests pass"}
    failed = [text for text in done.stdout.splitlines() if text.startswith(("FAILED", "ERROR"))]
    return {"outcome": "killed", "where": where, "by": failed[0][:160] if failed else f"exit code {done.returncode}"}


def run(mutants: list[Mutant], covered: dict, out: Path, moved: dict[str, str]) -> None:
    """Tries the mutants that `out` has no row of."""
    done = {int(row["number"]) for row in csv.DictReader(out.open())} if out.exists() else set()
    fields = ["number", "outcome", "where", "by", "function", "before", "after", "text", "seconds"]
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if not done:
            writer.writeheader()
        for mutant in mutants:
            if mutant.number in done:
                continue
            began = time.monotonic()
            row = attempt(mutant, covered, moved)
            facts = {name: getattr(mutant, name) for name in ("number", "function", "before", "after", "text")}
            writer.writerow(row | facts | {"seconds": f"{time.monotonic() - began:.0f}"})
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--seed", type=int, required=True)
    making.add_argument("--count", type=int, default=200)
    covering = commands.add_parser("cover")
    covering.add_argument("--workers", default="auto")
    running = commands.add_parser("run")
    for command in (covering, running):
        command.add_argument("mutants", type=Path)
        command.add_argument("--moved", type=Path, help="JSON {old file: new file}, where a line is in several")
    running.add_argument("covered", type=Path)
    for command in (making, covering, running):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "make":
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Mutant)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(mutant) for mutant in make(arguments.seed, arguments.count))
        return
    rows = list(csv.DictReader(arguments.mutants.open()))
    mutants = [Mutant(int(row.pop("number")), **row | {k: int(row[k]) for k in ("line", "column")}) for row in rows]
    moved = json.loads(arguments.moved.read_text()) if arguments.moved else {}
    if arguments.command == "cover":
        sys.exit(cover(mutants, arguments.out, moved, arguments.workers))
    else:
        run(mutants, json.loads(arguments.covered.read_text()), arguments.out, moved)


if __name__ == "__main__":
    main()
