"""Random command lines and grid files: whatever is asked, the answer is a sentence and an exit code that docs/commands.md has.

    python -m benchmarks.fuzz [--command_lines N] [--grids N] [--seed S]

Each is drawn from the seed and its number, and run in this process in a folder of its own, with a grid of eight cells of which
six are done, one has failed and one has not begun. Nothing is trained, compiled, drawn or submitted, and there is no network.
What a case must keep is in `faults`. A table of failures is printed; the exit code is 1 where there is one.

A kind of cases is a function of (random, folder) in `KINDS`, which returns the failures of one case.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from gqa_jax import hardware
from gqa_jax.training import run_folder
from gqa_jax.training.metrics import write_json
from launch import __main__ as launch
from launch import grid as grids
from launch import grid_cells, options
from launch.cells import Layout
from launch.executors import local
from tests import grid_fakes

CODES = (0, 1, 2, 3, 130)
CPU_SECONDS = 5.0  # of a call
HANGS_SECONDS = 60  # of the clock: a call is ended
MARGIN = 3.0  # machines that are three times as slow pass

# Words of Python and its packages about values that should have been refused before.
INTERNAL = re.compile(
    r"NoneType|unhashable|index out of|invalid literal|math domain|unsupported operand|not subscriptable|has no attribute|"
    r"could not be broadcast|zero-size|not iterable|cannot convert|truth value|<class|<function| object at 0x|KeyError|"
    r"too large to convert|must be str, not|expected str|codec can't|not supported between|not enough values|too many values|"
    r"Out of bounds|cannot do slice|Exceeds the limit|null (byte|character)|array must not contain infs"
)


outcomes = collections.Counter[Any]()  # of all calls, by exit code: not all of them may be refusals


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case and what it broke."""

    asked: str  # the command line, or the grid file
    what: str


@dataclasses.dataclass(frozen=True)
class Said:
    """What came of a command line."""

    code: Any
    out: str
    err: str
    seconds: float  # of this process
    raised: BaseException | None = None


class _Hangs(BaseException):
    """No error of a command: nothing in it may catch this."""


def call(argv: Sequence[str]) -> Said:
    """Runs `python -m launch` with these arguments in this process; warnings of numpy are errors."""

    def ended(*_: object) -> None:
        raise _Hangs

    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    raised = code = None
    before, began = signal.signal(signal.SIGALRM, ended), time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            signal.alarm(HANGS_SECONDS)
            try:
                code = launch.main(argv)
            finally:
                signal.alarm(0)
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raised = error
    finally:
        signal.signal(signal.SIGALRM, before)
    outcomes[code] += 1
    used, texts = time.process_time() - began, []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Said(code, *texts, used, raised)


def faults(argv: Sequence[str], said: Said, internal: re.Pattern | None = INTERNAL) -> Iterator[str]:
    """What this answer to a command line should not be."""
    if isinstance(said.raised, _Hangs):
        place = traceback.extract_tb(said.raised.__traceback__)[-2]
        yield f"hangs in {Path(place.filename).name}:{place.lineno}"
    elif said.raised is not None:
        ours = [frame for frame in traceback.extract_tb(said.raised.__traceback__) if "site-packages" not in frame.filename]
        place = ours[-1]
        yield f"{type(said.raised).__name__}: {said.raised} in {Path(place.filename).name}:{place.lineno}"
    elif said.code not in CODES:
        yield f"exit code {said.code!r}"
    if said.seconds > MARGIN * CPU_SECONDS:
        yield f"{said.seconds:.0f} s of a CPU"
    if "Traceback" in said.out + said.err:
        yield "a traceback is printed"
    if said.code == launch.EXIT_BAD_INPUT:
        last = re.sub(r"(.)\1{50,}", r"\1", said.err.rstrip("\n").rpartition("\n")[2])  # a value that is absurdly long
        lists = re.search(r"^launch: \d+ of \d+ cells don't fit, .*\n", said.err, re.MULTILINE)  # and says below which, and why
        begins = lists or re.match(r"(launch|python -m launch.*: error): .", last)
        if not begins or len(last) > 1000 or not last.isprintable():
            yield f"no sentence: {last[:200]!r}"
        elif internal is not None and (found := internal.search(last)):
            yield f"words of a program, {found[0]!r}: {last[:200]}"
    if (
        said.code in (0, 3)
        and said.out
        and ("--json" in argv or {"--format=json"} & {*argv})
        and not said.out.startswith("usage: ")
    ):
        try:
            json.loads(said.out)
        except ValueError as error:
            yield f"no JSON: {error}"


# What is drawn

TOKENS = ("8K", "1024", "131072", "1M")
GOOD = {
    "where": ("n_heads=2", "size=16d", "size=16d,n_heads=1", "cell=x", "context=32"),
    "on": ("local", "slurm", "sky", "tpu", "cluster.toml", "tpu.toml"),
    "rules": ("old", "new"),
    "topology": ("v5e:4x4", "h100:8", "v5e:2x2,h200:8", "v7x:2x2x1"),
    "slots": ("1", "2"),
    "workers": ("1", "2"),
    "prices": ("google", "google:spot", "prices.json"),
    "explain": ("CELL",),
    "efficiency": ("0.5", "1", "bound"),
    "flops_per_second": ("1e12",),
    "out": ("out.csv", "out.parquet", "out"),
    "context": TOKENS,
    "train_context": ("32",),
    "context_trained": ("32", "1K"),
    "loss": ("2.1", "1.9", "2.6"),
    "like": ("llama-3.2-1b", "config.json"),
    "budget": ("1e15", "1e20"),
    "entropy": ("1.5", "1.0"),
    "huber_delta": ("0.01",),
    "heads": ("1,1", "2,1", "8,1", "llama3", "mha", "group:4", "kv:8"),
    "heads_rule": ("mha", "group:4", "kv:1"),
    "columns": ("n_heads=H,loss=val_loss", "loss=loss"),
    "device": ("h100", "v5e", "h200,v6e"),
    "n_devices": ("1", "4"),
    "parallelism": ("best", "tensor", "1,2,1"),
    "batch": ("1", "8", "fits", "best"),
    "draws": ("20", "100"),
    "seed": ("0", "7"),
    "aspect": ("best", "trained", "paper", "64"),
    "fits": ("h100", "v5e"),
    "param_dtype": ("bfloat16", "int8"),
    "cache_dtype": ("bfloat16", "int8"),
    "usd_per_hour": ("2",),
    "lam": ("0.5", "0.9"),
    "root": ("runs/small", "runs/other", "runs/small/"),
}  # fmt: skip
NUMBERS = ("1", "0.5", "10")
ABSURD = ("-1", "0", "1", "2", "1000000007", "99999999999999999999", "1e15", "1e30", "1e-30", "1e308", "inf", "-inf", "nan",
          "0.999999", "1e-9", "5", "1.4999", "8K", "1024M", "65536M")  # fmt: skip
BAD = (
    "", " ", "-1", "0", "1e400", "-inf", "nan", "1e-300", "1e30", "99999999999999999999", "0x10", "1_000", "None", "True",
    "a,b", "=", ",", ",,", "x=", "=x", "x=y=z", "..", "/", "//", "/dev/null", "/etc/hostname", "README.md", "\udcff", "é", "٣",
    "🦙", "[red]", "[/]", "%s", "{}", "'", '"', "s3://bucket/x", "gs://", "gs:///x", "8k", "1G", "8K8", "a" * 300,
    "9" * 5000, "-", "--", "--root", "*", "~", "v5e", "v5e:", ":8", "v5e:0x0", "h100:0", "h100:-1", "v5e:99999x99999", "h100:7",
    "1,1,1,1", "runs", "small.py", "broken.json", "empty.csv", "broken.parquet", "llama-3.2-1c", "group:0",
    "0,0", "1,2", "d,0",
)  # fmt: skip
OF_TABLES = ("columns", "units", "context_trained", "heads_rule")
GRIDS = ("small.py", "runs/small", "runs.csv", "runs.parquet")
ODD_GRIDS = ("gone.py", "runs", "empty.csv", "broken.parquet", "broken.csv", "empty.py", ".", *BAD)


@functools.cache
def verbs() -> dict[str, list[argparse.Action]]:
    """The options and arguments of every command, without --help."""
    (found,) = [action.choices for action in launch.parser()._actions if action.choices]
    for command in found.values():
        command._fill(command)
    return {name: [one for one in command._actions if one.dest != "help"] for name, command in found.items()}


def value_of(action: argparse.Action, draw: random.Random, cells: Sequence[str]) -> str:
    """A good value of an option, or one in four times another."""
    if action.type in (int, float, options.tokens) and draw.random() < 0.2:
        return draw.choice(ABSURD)
    if draw.random() < 0.08:
        written = action.dest in ("root", "out")  # where a command may write, it stays in its folder
        return draw.choice([value for value in BAD if not (written and re.match(r"/|~|\.\.", value))])
    good = action.choices or GOOD.get(action.dest, NUMBERS)
    value = draw.choice([*good])
    return value.replace("CELL", draw.choice(cells)).replace("cell=x", f"cell={draw.choice(cells)}")


def command_line_of(draw: random.Random, cells: Sequence[str]) -> list[str]:
    """A command with options, most of which it has, in any order."""
    asked = [verb for verb in verbs() if verb != "benchmark-serving"]  # it may measure for minutes
    verb = draw.choice([*asked, "plan", "run", "optimum", "optimum", "next"])
    actions = verbs()[verb]
    found = [one for one in actions if one.option_strings and (one.dest not in OF_TABLES or draw.random() < 0.2)]
    chosen = [one for one in found if one.required and draw.random() < 0.95]
    goal = draw.choice(("loss", "loss", "loss", "like", "neither"))
    chosen += [one for one in found if one.dest == goal and verb == "optimum"]
    chosen += draw.sample(found, min(len(found), draw.choice((0, 0, 1, 1, 2, 4))))
    parts: list[list[str]] = []
    for one in chosen:
        name = draw.choice(one.option_strings)
        name = name.replace("_", "-") if draw.random() < 0.2 else name
        if one.nargs == 0:
            parts.append([name])
        elif one.nargs == "+":
            parts.append([name, *(value_of(one, draw, cells) for _ in range(draw.choice((0, 1, 1, 2, 3))))])
        else:
            value = value_of(one, draw, cells)
            parts.append([f"{name}={value}"] if draw.random() < 0.4 else [name, value])
    if verb == "run" and draw.random() < 0.7:
        parts.append(["--dry_run"])
    if verb == "plan" and draw.random() < 0.6:
        parts.append(["--estimate", "--topology", draw.choice(GOOD["topology"])])
    of_runs = verb in ("fit", "optimum", "report", "export") and draw.random() < 0.4
    if of_runs and verb in ("fit", "optimum") and draw.random() < 0.5:
        parts.append(["--preset", draw.choice(("paper", "paper-table4"))])
    elif draw.random() < 0.97:
        usual = GRIDS[1:] if of_runs else GRIDS[:1]
        parts.append([draw.choice(usual if draw.random() < 0.93 else (*GRIDS, *ODD_GRIDS))])
    if verb in ("logs", "cancel", "retry"):
        names = [draw.choice([*cells, draw.choice(cells)[:9], draw.choice(BAD)]) for _ in range(draw.choice((0, 1, 1, 2)))]
        parts += [[name] for name in names]
    if draw.random() < 0.05:
        parts.append(
            [draw.choice(("--help", "-h", "-f", "--unknown", "--grid=x", "--wher", "--json", "--", "extra", "-x", ""))]
        )
    if draw.random() < 0.7:  # else the grid comes first, as people write it
        draw.shuffle(parts)
    line = [verb] if draw.random() < 0.99 else [draw.choice(("", "plna", "--help", "-h"))]
    return [*line, *(word for part in parts for word in part)]


GRID_FILE = """\
from gqa_jax.config import default_config
from launch import grid

def cell(size, n_heads, seed=0):
    c = default_config()
    c.label = {label}
    c.context_length = {context_length}
    c.batch_tokens = {batch_tokens}
    c.steps = {steps}
    c.seed = {seed}
    c.model.update(n_layers={n_layers}, d_model={d_model}, n_heads=n_heads, n_kv_heads={n_kv_heads}, head_dim={head_dim})
    c.model.update(vocab_size={vocab_size}, dtype={dtype})
    c.data.update(store={store}, block_tokens={block_tokens})
    c.evaluation.tokens = {evaluation}
    c.optimizer.learning_rate = {learning_rate}
    c.execution.mesh = {mesh}
    c.execution.accumulation_steps = {accumulation}
    c.continue_from = {continue_from}
    return c

def get_grid():
    configs = [*grid.product(cell, size={sizes}, n_heads={heads}), cell(16, 1, 1), cell(32, 1, 1)]
    return grid.Grid({name}, {configs}, {contexts}, {losses}, {convention})
"""
FIELDS = {
    "label": "f'{size}d'", "context_length": "32", "batch_tokens": "256", "steps": "4", "seed": "seed", "n_layers": "2",
    "d_model": "size", "n_kv_heads": "1", "head_dim": "8", "vocab_size": "320", "dtype": "'float32'", "store": "'sotu-bytes'",
    "block_tokens": "64", "evaluation": "1024", "learning_rate": "1e-3", "mesh": "None", "accumulation": "None",
    "continue_from": "None", "sizes": "[16, 32, 64]", "heads": "[1, 2]", "name": "'small'", "configs": "configs",
    "contexts": "[1024, 8192]", "losses": "()", "convention": "'figures'",
}  # fmt: skip
NUMERIC = ("context_length", "batch_tokens", "steps", "seed", "n_layers", "d_model", "n_kv_heads", "head_dim", "vocab_size",
           "block_tokens", "evaluation", "learning_rate", "accumulation")  # fmt: skip
LARGE = 22  # of VALUES: numbers
VALUES = (
    "-1", "0", "1", "2", "3", "64", "96", "1000", "10**9", "2**31 - 2", "2**31", "2**63 - 2**10", "2**63", "-2**63", "10**30",
    "256 * 10**13", "10**15 + 37", "2**61 - 1", "1.5", "1e30", "float('nan')", "float('inf')", "True", "None",
    "-0.0", "'8K'", "''", "'a'", "'a' * 5000", "'../x'", "'/'", "'x\\ny'", "'\\0'", "b'x'", "[]",
    "()", "{}", "{'a': 1}", "[1]", "[None]", "['a']", "[-1]", "[2.0, '2.0']", "[float('nan')]", "[10**30]", "[0]",
    "lambda *a: 0", "object()", "print", "int", "range(2)", "(x for x in [1, 2])", "1 / 0", "undefined", "'fsdp=4'", "'data=0'",
    "'fsdp=99999999999'", "'bfloat16'", "'float16'", "'stores/none'", "'.'", "'sotu-gpt2'", "__file__", "default_config()",
    "[default_config()]", "[{'a': 1}, 5]", "configs * 2" , "'cell 0123456789abcdef'", "'figurs'", "'exact'", "1j",
)  # fmt: skip
STATEMENTS = (
    "raise ValueError('a\\nb')", "raise KeyboardInterrupt2", "import nothing_like_this", "import sys; sys.exit()", "exit(3)",
    "1 / 0", "assert False", "def f(): return f()\nf()", "class E(BaseException): pass\nraise E", "raise MemoryError",
    "raise OSError('no')", "print('hello')", "return 3", "(", "x = '", "\t x", "import os; os.chdir('/tmp/none')",
    "get_grid = 3",
    "get_grid = lambda: 3", "get_grid = lambda: get_grid()", "del get_grid", "default_config = None", "raise SystemExit('a')",
    "import json; json.loads('{')", "raise Exception", "eval('1 +')", "open('gone.txt')", "[].x", "{}['a']", "'%d' % 'a'",
    "default_config().n_layers = 3", "default_config().steps = 'many'", "raise StopIteration", "raise GeneratorExit",
    "from gqa_jax.errors import ConfigError; raise ConfigError('this one')", "int('9' * 9999)", "chr(-1)", "'\\ud800'.encode()",
)  # fmt: skip


def grid_file_of(draw: random.Random) -> bytes:
    """A small grid with a few values, lines or bytes of it changed."""
    fields = dict(FIELDS)
    for name in draw.sample([*fields], draw.choice((0, 0, 1, 1, 1, 2, 3))):
        numbers = name in NUMERIC and draw.random() < 0.8
        fields[name] = draw.choice(VALUES[:LARGE] if numbers else VALUES)
    lines = GRID_FILE.format(**fields).splitlines()
    how = draw.random()
    if how < 0.15:
        at = draw.randrange(len(lines) + 1)
        indent = re.match(r"\s*", lines[at - 1])[0] if draw.random() < 0.7 else ""
        lines[at:at] = [indent + line for line in draw.choice(STATEMENTS).split("\n")]
    elif how < 0.22:
        del lines[draw.randrange(len(lines))]
    elif how < 0.25:
        draw.shuffle(lines)
    content = "\n".join(lines).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(content))
        content = draw.choice(
            (content[:at], content[at:], content[:at] + draw.randbytes(4) + content[at:], draw.randbytes(200), b"",
             content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), b"\0" * 99)
        )  # fmt: skip
    return content


# Kinds of cases


def command_line(draw: random.Random, folder: Path) -> list[Failure]:
    """A command line over a small grid, a table of its runs and files that are not what they should be."""
    cells = sorted(path.name for path in Path(folder, "runs/small/cells").iterdir())
    argv = command_line_of(draw, cells)
    before = tree(folder)
    said = call(argv)
    found = [Failure(" ".join(map(repr, argv)), what) for what in faults(argv, said)]
    silent = argv[0] in ("status", "logs", "fit") or (argv[0] == "run" and {"--dry_run", "--dry-run"} & {*argv})
    if silent and (new := {*tree(folder)} - {*before}):
        found.append(Failure(" ".join(map(repr, argv)), f"wrote {sorted(new)[:3]}"))
    return found


def grid_file(draw: random.Random, folder: Path) -> list[Failure]:
    """A command over a grid file that somebody has changed."""
    content = grid_file_of(draw)
    Path(folder, "small.py").write_bytes(content)
    argv = draw.choice(
        (["plan"], ["plan"], ["plan", "--topology=v5e:4x4,h100:8", "--estimate"], ["plan", "--format=json"],
         ["status", "--json"],
         ["run", "--dry_run"], ["run", "--dry_run", "--json", "--on=slurm"], ["run", "--dry_run", "--on=cluster.toml"],
         ["run", "--dry_run", "--on=tpu.toml", "--json"], ["run", "--slots=2"], ["export"], ["fit"], ["retry"])
    )  # fmt: skip
    argv = [argv[0], "small.py", *argv[1:]]
    said = call(argv)
    # What a file raises is told as it is, so words of programs are no fault here.
    return [Failure(f"{argv} of\n{content!r}", what) for what in faults(argv, said, internal=None)]


KINDS: dict[str, Callable[[random.Random, Path], list[Failure]]] = {"command_lines": command_line, "grids": grid_file}


# Where it is run


def tree(folder: Path) -> dict[str, int]:
    """Files below a folder, and their sizes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def furnish(folder: Path) -> None:
    """A grid in every state, tables, and files that are nothing."""
    (folder / "small.py").write_text(GRID_FILE.format(**FIELDS))
    the_grid = grids.load(str(folder / "small.py"))
    *done, failed, planned = grids.cells(the_grid)
    layout = Layout(folder / "runs" / "small")
    for cell in done:
        grid_fakes.finish(cell, layout)
    for cell in (failed, planned):
        layout.cell(cell.name).mkdir()
        write_json(layout.cell(cell.name) / "config.json", cell.stored())
    run_folder.record_exit(layout.cell(failed.name), 1, "out_of_memory", "out of memory (8 GiB)", 0)
    (layout.cell(failed.name) / "log.txt").write_text("a line\n")
    write_json(layout.root / "grid.json", grid_cells.facts(the_grid, [*done, failed, planned]))
    rows = [(n, h, 1, 2048, (2e3 / n) ** 0.3 / h**0.05 + 1.5) for n in (1e6, 3e6, 1e7, 3e7) for h in (1, 2, 4)]
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("params_non_embedding", "n_heads", "n_kv_heads", "context", "loss"))
        writer.writerows(rows)
    import pandas as pd

    pd.read_csv(folder / "runs.csv").to_parquet(folder / "runs.parquet")
    for name, text in {
        "cluster.toml": 'engine = "local"\nslots = 2\n', "prices.json": '{"v5e": 10}', "broken.json": "{", "empty.csv": "",
        "tpu.toml": 'engine = "tpu"\ntopology = "v5e:2x2"\nproject = "projects"\nzones = ["us-west4-a"]\nshared_root = true\n',
        "broken.parquet": "PAR1", "broken.csv": "a,b\n1\n2,3,4\n", "empty.py": "",
        "config.json": json.dumps({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
                                   "num_key_value_heads": 2, "intermediate_size": 128, "model_type": "llama"}),
    }.items():  # fmt: skip
        (folder / name).write_text(text)


class _Ended:
    """Stands for the process of a cell: it has ended without a word."""

    pid = 2**30

    def poll(self) -> int:
        return 1

    wait = poll


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nothing is trained, compiled, drawn or submitted, and there is no network."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    with contextlib.ExitStack() as stack:
        programs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (programs / "git").symlink_to(shutil.which("git"))
        stack.enter_context(mock.patch.dict(os.environ, PATH=str(programs), NO_GCE_CHECK="true", COLUMNS="200"))
        for name, value in {
            "launch.fit.compile_checks": lambda *_, **__: None,
            "launch.export._draw": lambda *_: None,
            "launch.findings._pictures": lambda *_, **__: {},
            "launch.report.write": lambda folder, found: folder / "index.html",
            "launch.report.answer_map.LOSSES": 4,
            "launch.report.answer_map.CONTEXTS": (1024, 8192),
            "launch.report.answer_map.DEVICES": ("h100",),
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(local, "_start", return_value=_Ended()))
        stack.enter_context(mock.patch.object(hardware.Slice, "require_compiler"))
        stack.enter_context(mock.patch("gqa_jax.gcs.system", unreachable))
        for name in ("connect", "connect_ex"):
            stack.enter_context(mock.patch.object(socket.socket, name, unreachable))
        stack.enter_context(mock.patch.object(socket, "getaddrinfo", unreachable))
        yield


def run(kind: str, numbers: Sequence[int], seed: int) -> Iterator[tuple[int, Failure]]:
    """The failures of cases of a kind, by number."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, alone():
        template, place = Path(folder, "template"), Path(folder, "case")
        template.mkdir()
        furnish(template)
        try:
            for number in numbers:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(template, place)
                os.chdir(place)
                for failure in KINDS[kind](random.Random(f"{kind} {seed} {number}"), place):
                    yield number, failure
        finally:
            os.chdir(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case, to repeat one")
    asked = parser.parse_args()
    found = 0
    for kind in (kind for kind in KINDS if getattr(asked, kind)):
        count, began, groups = getattr(asked, kind), time.process_time(), collections.Counter[str]()
        for number, failure in run(kind, range(asked.first, asked.first + count), asked.seed):
            print(f"{kind} {number}: {failure.what}\n    {failure.asked[:1500]}", flush=True)
            groups[re.sub(r"\d+", "N", failure.what[:60])] += 1
        used, codes = time.process_time() - began, ", ".join(f"{n} x {code}" for code, n in sorted(outcomes.items(), key=str))
        print(f"{kind:14s} {count:6,} cases, seed {asked.seed}, {groups.total():4} failures, {used:.0f} s of a CPU")
        print(f"    exit codes: {codes}")
        outcomes.clear()
        for what, times in groups.most_common():
            print(f"    {times:5} {what}")
        found += groups.total()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
