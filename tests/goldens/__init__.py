"""What the code answers today, kept as files beside this one: a change of structure must leave all of them as they are.

    python -m tests.goldens                          # computes them again, and says what differs
    python -m tests.goldens --write                  # keeps what the code answers now; `--only NAME,...` of some
    python -m tests.goldens --quickstart runs/quickstart     # compares a whole trained quickstart with the one that is kept

`tests/test_goldens.py` does the first. A golden that fails means that a change has changed an answer: if that is meant, write
the goldens again and say so in the commit.

What is compared how:

- Identities of cells, plans, costs, submissions to engines: texts, exact. They are arithmetic in Python's floats.
- Screens and tables of a report: texts, exact. They round, so the last bits of a fit don't show.
- Laws of presets, and answers from them: numbers, within 1e-9 of their size (LAWS). Those of the quickstart, whose three sizes
  hardly determine a law: within 1e-4 (THREE_SIZES). Measured with the kernels that OpenBLAS has for older processors
  (OPENBLAS_CORETYPE = Prescott, Nehalem, Haswell): the former move by less than 1e-9, the latter by up to 2e-5, and the texts
  of screens and reports not at all.
- Losses of training: within 1e-5, which is what meshes and attention implementations may differ by. Bits of parameters depend
  on the processor, the number of its threads and the version of jax: they are kept with these, compared on such a machine, and
  elsewhere not looked at (`machine`). Whole runs of the quickstart, on a machine whose bits are not kept: within 1e-3, because
  rounding grows over hundreds of steps (ELSEWHERE; on two threads instead of one by 1e-5).

Dates, folders, versions, hashes of the code and the speed of the machine are taken out (`normalised`, MEASURED).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import lzma
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from rich.console import Console

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
MEANING = "a change has changed this answer; if it is meant, `python -m tests.goldens --write`, and say so in the commit"

LAWS, THREE_SIZES, LOSSES, ELSEWHERE = 1e-9, 1e-4, 1e-5, 1e-3  # relative differences that are none
#: Columns of tables/loss that differ between two runs of the same code, or between its commits.
MEASURED = (
    "tokens_per_second", "mfu", "seconds_train", "seconds_total", "peak_memory_bytes", "device", "n_devices", "attempts", "jax",
    "flax", "commit",
)  # fmt: skip
GRIDS = ("quickstart", "paper", "long_context")
FEW = "size=1.2B,n_heads=8,n_kv_heads=1"  # cells of the paper's grid that are planned on every slice
SLICES = ",".join(
    f"{chip}:{shape}"
    for chips, shapes in (
        (("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
        (("v4", "v5p"), ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),
        (("h200", "h100", "a100", "b200", "l4"), ("1", "2", "4", "8")),
    )
    for chip in chips
    for shape in shapes
)
ONE = "size=40k,context=128,n_heads=4,n_kv_heads=4"  # cell of the quickstart that is submitted to every engine


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file of this folder; a name that ends in .xz is compressed."""

    name: str
    make: Callable[[Path], str]  # from an empty folder that it may use to the text
    relative: float | None = None  # of JSON: numbers may differ by so much of their size; None: the text is exact
    slow: bool = False  # more than ten seconds of a CPU

    @property
    def kept(self) -> str:
        """The text in the file."""
        content = (FOLDER / self.name).read_bytes()
        return (lzma.decompress(content) if self.name.endswith(".xz") else content).decode()

    def write(self, text: str) -> None:
        """Keeps another text."""
        content = text.encode()
        (FOLDER / self.name).write_bytes(lzma.compress(content, preset=9) if self.name.endswith(".xz") else content)

    def differences(self, text: str) -> list[str]:
        """What is not as it was kept, a sentence each; none: nothing has changed."""
        if self.relative is not None:
            return list(_differences(json.loads(self.kept), json.loads(text), self.relative))
        if text == self.kept:
            return []
        old, new = self.kept.splitlines(), text.splitlines()
        found = [f"line {i}: {a!r}, was {b!r}" for i, (a, b) in enumerate(zip(new, old, strict=False), 1) if a != b]
        if len(new) != len(old):
            found.append(f"{len(new)} lines, were {len(old)}")
        return found or ["other ends of lines"]


def _differences(old: Any, new: Any, relative: float, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if key not in old or key not in new:
                yield f"{at}.{key} is {'new' if key in new else 'gone'}"
            else:
                yield from _differences(old[key], new[key], relative, f"{at}.{key}")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{at}: {len(new)} entries, were {len(old)}"
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from _differences(a, b, relative, f"{at}[{i}]")
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=relative, abs_tol=relative * 1e-3):
            yield f"{at}: {new!r}, was {old!r}, a relative difference of {abs(new / old - 1) if old else math.inf:.1e}"
    elif old != new or type(old) is not type(new):
        yield f"{at}: {new!r}, was {old!r}"


# The commands


def printed(folder: Path, *argv: str, width: int | None = None) -> str:
    """What `python -m launch ...` prints on stdout in a folder with nothing but configs/, without compilers and engines.

    width: of the terminal that it is printed to; None: a file.
    """
    import importlib.util

    from launch import __main__ as launch

    find_spec = importlib.util.find_spec
    absent = ("libtpu", "jax_cuda13_plugin")
    out, err = io.StringIO(), io.StringIO()
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(REPOSITORY / "configs")
    with contextlib.ExitStack() as stack:
        if width is not None:
            stack.enter_context(mock.patch("launch.__main__._console", return_value=Console(width=width)))
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(
            mock.patch("importlib.util.find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest))
        )
        for engine in ("slurm", "tpu", "sky"):
            stack.enter_context(mock.patch(f"launch.executors.{engine}.Executor.jobs", return_value={}))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        ended = launch.main(argv)
    assert ended == 0, f"{argv} ended with {ended}: {err.getvalue()}"
    return normalised(out.getvalue(), folder)


def normalised(text: str, folder: Path) -> str:
    """Without what belongs to this machine, this checkout or this moment."""
    for value, name in ((os.fspath(folder), "HERE"), (sys.executable, "PYTHON"), (os.fspath(REPOSITORY), "CHECKOUT")):
        text = text.replace(value, name)
    text = re.sub(r"\bg[0-9a-f]{7}-s", "gFOLDER-s", text)  # launch.executors.job_names.prefix
    text = re.sub(r"(GQA_JAX_COMMIT=)[0-9a-f]+\+?", r"\1COMMIT", text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)
    text = re.sub(r"gqa_jax/[0-9a-f]{16}\b", "gqa_jax/SHA256", text)
    return text


def several(*parts: tuple[str, str]) -> str:
    """Texts with their titles, one after another, without spaces at ends of lines."""
    whole = "\n".join(f"===== {title}\n{text.rstrip()}\n" for title, text in parts)
    return "\n".join(line.rstrip() for line in whole.splitlines()) + "\n"


WIDTHS = (80, 100, 140)  # of terminals


def screens(folder: Path, *commands: str) -> str:
    """What these commands print to a file."""
    return several(*((one, printed(folder, *one.split())) for one in commands))


def at_widths(folder: Path, command: str, stop: str | None = None) -> str:
    """What a command prints at WIDTHS; but for the first, no further than the line that begins with `stop`."""
    parts = []
    for width in WIDTHS:
        lines = printed(folder, *command.split(), width=width).splitlines()
        if stop is not None and width != WIDTHS[0]:
            lines = lines[: next(i for i, line in enumerate(lines) if line.startswith(stop))]
        parts.append((f"{command}, {width} columns", "\n".join(lines)))
    return several(*parts)


# Identities, plans


def identities(_: Path) -> str:
    """Names of the cells of configs/grids and hashes of their identities, today and in the first version; of configs/train."""
    import runpy

    from gqa_jax.config import TrainConfig, hash_identity
    from launch import grid

    found: dict[str, Any] = {}
    for name in GRIDS:
        today = grid.load(os.fspath(REPOSITORY / f"configs/grids/{name}.py"))
        for rules, one in (("", today), (", rules of the first version", grid.under_old_rules(today))):
            cells = grid.cells(one)
            found[name + rules] = {cell.name: hash_identity(cell.identity) for cell in cells}
            found[f"{name}{rules}: identity of the last"] = cells[-1].identity
    for path in sorted((REPOSITORY / "configs/train").glob("*.py")):
        config = TrainConfig.from_dict(runpy.run_path(os.fspath(path))["get_config"]().to_dict())
        found[f"train/{path.stem}"] = hash_identity(config.identity("unprepared"))
    return json.dumps(found, indent=1) + "\n"


def plan(name: str) -> Callable[[Path], str]:
    return lambda folder: printed(folder, "plan", f"configs/grids/{name}.py", "--format", "csv")


def plan_slices(folder: Path) -> str:
    """Few cells on all slices: which mesh, what fits, hours, money."""
    where = (f"{FEW},context={context}" for context in (8192, 131_072))
    paper = ["plan", "configs/grids/paper.py", "--topology", SLICES, "--estimate"]
    return "".join(printed(folder, *paper, "--where", one, "--format", "csv") for one in where)


def plan_screens(folder: Path) -> str:
    paper = f"plan configs/grids/paper.py --where {FEW}"
    slices = f"{paper} --topology v5e:4x4,v6e:2x4,h200:8,l4:1 --estimate --efficiency 0.5"
    return (
        screens(folder, "plan configs/grids/quickstart.py")
        + at_widths(folder, "plan configs/grids/quickstart.py --flops_per_second 2e9 --where context=128", "time:")
        + screens(folder, paper)
        + at_widths(folder, slices, "The whole grid")
        + screens(folder, f"{paper} --topology v5p:2x2x2 --estimate")
    )


def paper_plan(folder: Path) -> str:
    """configs/grids/paper-plan.csv."""
    paper = "plan configs/grids/paper.py --topology v5e:4x4,v6e:2x4 --estimate --where context=8192 --out plan.csv"
    printed(folder, *paper.split())
    return (folder / "plan.csv").read_text()


# Answers


QUESTIONS = {"paper": 2.615, "paper-table4": 2.615}  # loss that is asked for at 128K


def optimum(preset: str) -> Callable[[Path], str]:
    question = ("--context", "128K", "--loss", str(QUESTIONS[preset]), "--format", "json")
    return lambda folder: printed(folder, "optimum", "--preset", preset, *question)


def optimum_quickstart(folder: Path) -> str:
    finished(folder)
    asked = (("32K", "1.75", "128"), ("128K", "1.8", "512"))
    return json.dumps(
        [
            json.loads(
                printed(folder, "optimum", "ROOT", "--context", t, "--loss", x, "--train_context", c, "--format", "json")
            )
            for t, x, c in asked
        ],
        indent=1,
    )


def answer_screens(folder: Path) -> str:
    """Every kind of question; the tables of some at all widths."""
    paper = "optimum --preset paper --context 128K --loss 2.615"
    wide = [
        at_widths(folder, one, "warning:")
        for one in (
            paper,
            f"{paper} --cost price --device h200 --batch 8",
            f"{paper} --cost price --device h200,v6e,h100",
            "optimum --preset paper --context 128K --loss 2.35",
        )
    ]
    return "".join(wide) + screens(
        folder,
        f"{paper} --conventions --aspect paper",
        f"{paper} --cost throughput --device h100 --batch 12",
        f"{paper} --cost price --device v5e --n_devices 4 --cache_dtype int8",
        f"{paper} --cost lifetime --served_tokens 1e12 --device v6e",
        f"{paper} --cost train",
        f"{paper} --fits h100 --batch 16",
        "optimum --preset paper-table4 --context 8K --loss 2.9 --cost memory --convention exact",
    )


def answer_formats(folder: Path) -> str:
    """One answer in every format but JSON, which has goldens of its own; laws in those of documents."""
    paper = "optimum --preset paper --context 128K --loss 2.615"
    asked = [f"{paper} --format {form}" for form in ("markdown", "latex", "html")]
    return screens(folder, *asked, *(f"fit --preset paper --format {form}" for form in ("markdown", "latex")))


def fit_screens(folder: Path) -> str:
    return at_widths(folder, "fit --preset paper") + screens(folder, "fit --preset paper-table4")


def quickstart_screens(folder: Path) -> str:
    """`export` of the finished quickstart, its tables on narrower terminals, and what is asked of it then."""
    finished(folder)
    asked = screens(folder, "fit ROOT", "optimum ROOT --context 32K --loss 1.75")
    chosen = (f"{NEXT}, 80 columns", printed(folder, *NEXT.split(), "--out", "80.py", width=80))
    return several(("export configs/grids/quickstart.py --root ROOT", exported()[0]), *exported_tables(folder), chosen) + asked


NEXT = "next configs/grids/quickstart.py --root ROOT --context 32K --loss 2.1 --budget 3e11"


def exported_tables(folder: Path) -> list[tuple[str, str]]:
    """The losses and the cheapest heads that `export` prints, on narrower terminals."""
    from gqa_jax import differences, results
    from launch import grid_tables, studies

    root = folder / "ROOT"
    loss = results.load_results(root)
    compared = studies.to_best(loss, differences.load_differences(root))
    optima = pd.read_csv(io.StringIO(exported()[1]["optimum"])).astype({"n_heads": "Int64"})
    found = []
    for width in WIDTHS[:-1]:
        out = io.StringIO()
        tables = grid_tables.losses(loss), grid_tables.above_best(compared), grid_tables.optimum_map(optima, "figures")
        Console(file=out, width=width).print(*tables)
        found.append((f"its tables, {width} columns", out.getvalue()))
    return found


def quickstart_loss(_: Path) -> str:
    """The loss table, without what was measured."""
    table = pd.read_csv(io.StringIO(exported()[1]["loss"]), dtype="string", keep_default_na=False)
    return table.drop(columns=list(MEASURED)).to_csv(index=False)


def quickstart_cost(_: Path) -> str:
    return exported()[1]["cost"]


def quickstart_fits(_: Path) -> str:
    """The tables of fits and of cheapest heads."""
    tables = {name: pd.read_csv(io.StringIO(exported()[1][name])).to_dict("split", index=False) for name in ("fits", "optimum")}
    return json.dumps(_without_nan(tables)) + "\n"


@functools.cache
def exported() -> tuple[str, dict[str, str]]:
    """What `export` prints of the finished quickstart, and the tables that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        root = finished(Path(folder))
        said = printed(Path(folder), "export", "configs/grids/quickstart.py", "--root", "ROOT")
        return said, {path.stem: path.read_text() for path in (root / "tables").glob("*.csv")}


def _without_nan(value: Any) -> Any:
    """NaN is equal to nothing; an empty cell is a text."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def laws_of_presets(_: Path) -> str:
    from launch import studies

    return _laws(studies.of_preset("paper"), studies.of_preset("paper-table4"))


def laws_of_quickstart(folder: Path) -> str:
    from launch import studies

    return _laws(studies.of_grid(str(finished(folder))))


def _laws(*sources: Any) -> str:
    """Coefficients and profile intervals of the laws of every training context."""
    from launch import studies

    found = {}
    for source in sources:
        for one in studies.fit(source).fitted:
            rows = json.loads(one.laws.intervals().to_json(orient="records", double_precision=15))
            found[f"{source.name} at {one.context}"] = {
                "sigma": one.laws.sigma,
                "dof": one.laws.dof,
                "status": one.laws.status,
                "warnings": list(one.laws.warnings),
                "laws": rows,
            }
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def report(folder: Path) -> str:
    """What the page of a preset says, and its tables in Markdown and LaTeX; pictures and scripts have tests of their own."""
    printed(folder, "report", "--preset", "paper")
    made = folder / "runs/paper/report"
    page = (made / "index.html").read_text()
    for tag in ("script", "style", "svg"):
        page = re.sub(rf"<{tag}\b.*?</{tag}>", f"[{tag}]", page, flags=re.DOTALL)
    page = re.sub(r"\d{4}-\d{2}-\d{2} \d{2}:\d{2} UTC", "DATE", page)
    page = re.sub(r"(gqa-jax|numpy|scipy|pandas|matplotlib|python)\s*(:|</\w+>\s*<\w+>)?\s*\d+(\.\d+)+", r"\1 VERSION", page)
    page = re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", "\n", page))
    return several(("index.html", page), *((p.name, p.read_text()) for p in sorted(made.iterdir()) if p.suffix != ".html"))


# Submissions to engines


def dry_run(engine: str) -> Callable[[Path], str]:
    """`run --dry_run`, for a person and as JSON."""

    def make(folder: Path) -> str:
        from tests.gcs import BUCKET, emulator

        on_gcs = engine in ("tpu", "sky")
        here = contextlib.nullcontext() if not on_gcs or "STORAGE_EMULATOR_HOST" in os.environ else emulator()
        root = f"gs://{BUCKET}/goldens" if on_gcs else "ROOT"
        run = ["run", "configs/grids/quickstart.py", "--on", engine, "--root", root, "--dry_run", "--where"]
        with here, mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"):
            person = printed(folder, *run, "size=40k,context=128,n_kv_heads=1")
            machine = printed(folder, *run, ONE, "--json")
        return several(("--dry_run", person), ("--dry_run --json", machine))

    return make


# A grid that has finished


NOW, FIRST_VERSION = "quickstart.json.xz", "quickstart-first-version.json.xz"


def finished(folder: Path, version: str = NOW) -> Path:
    """Makes `folder`/ROOT: a trained quickstart, its configurations, results, evaluations and grid.json.

    NOW is of today's rules. FIRST_VERSION is as the code of November 2026 left it, before there were others: it is never
    written again.
    """
    root = folder / "ROOT"
    for name, content in json.loads(lzma.decompress((FOLDER / version).read_bytes())).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content) if path.suffix == ".npz" else json.dumps(content, indent=1).encode())
    return root


def keep_finished(root: Path) -> None:
    """Keeps a trained quickstart for `finished`, without what names its machine."""
    content: dict[str, Any] = {"grid.json": json.loads((root / "grid.json").read_text())}
    for folder in sorted((root / "cells").iterdir()):
        for name in ("config.json", "result.json", "evaluations.json"):
            values = json.loads((folder / name).read_text())
            for measured in ("hostname", "host"):
                values.pop(measured, None)
            content[f"cells/{folder.name}/{name}"] = values
        content[f"cells/{folder.name}/documents.npz"] = base64.b64encode((folder / "documents.npz").read_bytes()).decode()
    (FOLDER / NOW).write_bytes(lzma.compress(json.dumps(content, indent=1).encode(), preset=9))


def compare_quickstart(root: Path) -> list[str]:
    """What a trained quickstart, or some cells of it, has otherwise than the one that is kept.

    Losses within LOSSES (ELSEWHERE on a machine whose bits are not kept), their standard errors within a hundredth: what is
    left of the differences between four documents.
    """
    from gqa_jax import results

    with tempfile.TemporaryDirectory() as folder:
        kept = results.load_results(finished(Path(folder)))
    new = results.load_results(root)
    found = [f"cell {name} was not there" for name in sorted(set(new["cell"]) - set(kept["cell"]))]
    numbers = [name for name in kept.columns if name not in (*MEASURED, "params_sha256", "loss_sem")]
    losses = LOSSES if machine() in kept_bits() else ELSEWHERE
    for columns, relative in ((numbers, losses), (["cell", "loss_sem"], 0.01)):
        old, now = (json.loads(one[columns].to_json(orient="records", double_precision=15)) for one in (kept, new))
        by_name = {row["cell"]: row for row in old}
        for row in now:
            if row["cell"] in by_name:
                found += _differences(by_name[row["cell"]], row, relative, row["cell"])
    return found


# Training


def machine() -> str:
    """What decides the bits of a training run here: the processor, the threads that it is given, jax."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = hashlib.sha256(" ".join(sorted(facts.get("flags", facts.get("Features", "")).split())).encode()).hexdigest()[:8]
    threads = len(os.sched_getaffinity(0))
    return f"{facts.get('model name', 'unknown')}, features {flags}, {threads} threads, jax {jax.__version__}"


MESHES = {"1 device": "data=1", "8 devices": "fsdp=2,tensor=2,context=2"}


@functools.cache
def trained() -> dict[str, Any]:
    """Losses of six steps on one device and on eight, and hashes of the last parameters."""
    from gqa_jax import train
    from gqa_jax.config import TrainConfig, default_config
    from gqa_jax.training import metrics

    found: dict[str, Any] = {}
    for name, mesh in MESHES.items():
        config = default_config()
        config.update(context_length=64, batch_tokens=512, steps=6)
        config.execution.update(mesh=mesh, remat="none", accumulation_steps=1)
        config.model.update(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=320, dtype="float32")
        config.data.update(store="sotu-bytes", block_tokens=64)
        config.evaluation.tokens = 1024
        config.logging.update(every_steps=1, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            result = train.train_and_evaluate(TrainConfig.from_dict(config.to_dict()), Path(folder) / "run")
            rows = [row["loss"] for row in metrics.read_metrics(Path(folder) / "run") if row["kind"] == "train"]
        found[name] = {"losses": rows, "held out": result["loss"], "params_sha256": result["params_sha256"]}
    return found


def training(_: Path) -> str:
    """The losses of `trained`."""
    losses = {name: {key: run[key] for key in ("losses", "held out")} for name, run in trained().items()}
    return json.dumps(losses, indent=1) + "\n"


def bits() -> dict[str, str]:
    """The hashes of `trained`, by the number of devices."""
    return {name: run["params_sha256"] for name, run in trained().items()}


def kept_bits() -> dict[str, dict[str, str]]:
    """`bits` of every machine on which they were kept."""
    return json.loads((FOLDER / "training-bits.json").read_text())


def keep_bits() -> None:
    """Keeps `bits` of this machine; those of others only while the losses are as they were."""
    file = FOLDER / "training-bits.json"
    others = kept_bits() if file.exists() and not _TRAINING.differences(training(FOLDER)) else {}
    file.write_text(json.dumps(others | {machine(): bits()}, indent=1) + "\n")


_TRAINING = Golden("training.json", training, LOSSES, slow=True)

GOLDENS = (
    Golden("identities.json", identities),
    Golden("plan-quickstart.csv", plan("quickstart")),
    Golden("plan-paper.csv", plan("paper")),
    Golden("plan-long-context.csv", plan("long_context")),
    Golden("plan-slices.csv.xz", plan_slices),
    Golden("plan-screens.txt", plan_screens),
    Golden("optimum-paper.json", optimum("paper"), LAWS),
    Golden("optimum-paper-table4.json", optimum("paper-table4"), LAWS),
    Golden("optimum-quickstart.json", optimum_quickstart, THREE_SIZES),
    Golden("answer-screens.txt", answer_screens),
    Golden("answer-formats.txt", answer_formats),
    Golden("fit-screens.txt", fit_screens),
    Golden("laws-presets.json", laws_of_presets, LAWS),
    Golden("laws-quickstart.json", laws_of_quickstart, THREE_SIZES),
    Golden("quickstart-screens.txt", quickstart_screens),
    Golden("quickstart-loss.csv", quickstart_loss),
    Golden("quickstart-cost.csv.xz", quickstart_cost),
    Golden("quickstart-fits.json", quickstart_fits, THREE_SIZES),
    Golden("report-paper.txt", report, slow=True),
    *(
        Golden(f"dry-run-{engine}.txt{'.xz' * (engine == 'tpu')}", dry_run(engine))
        for engine in ("local", "slurm", "tpu", "sky")
    ),
    _TRAINING,
)
