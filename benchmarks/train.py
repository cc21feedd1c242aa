"""Training speed on the device at hand: this code beside a PyTorch Llama of the same shape, interleaved in one run.

    python -m benchmarks.train [--platform cpu|gpu] [--torch_python PYTHON] [--json FILE]

PYTHON has torch and transformers; default: this one. All start from the same weights and train on the same tokens with the
same AdamW, clipping and learning rates; the losses of ten steps are compared first. Each turn measures a few steps of every
form, one process at a time while the others wait, so that a busy neighbour slows all alike. On a GPU, for its memory, PyTorch
takes turns with this code first as it is, then compiled.

Shown are medians of tokens/s; model FLOPs utilisation (MFU) with attention counted over T/2 keys a token, as a causal kernel
computes, and over T, as some papers count, of the chip's dense bfloat16 peak; the allocator's peak memory; seconds to compile;
and the ratios within turns, their median and range. Recomputation is not counted. PyTorch recomputes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.workers import Outcome, Worker
from gqa_jax.config import REMAT_POLICIES
from gqa_jax.hardware import host
from gqa_jax.shapes import SIZES

ROOT = Path(__file__).resolve().parent.parent
#: Seconds of silence: a busy CPU compiles for minutes.
LIMITS = {"start": 180.0, "lower": 300.0, "compile": 900.0, "run": 300.0, "check": 120.0}
CASE = "train"
LOSSES = 10  # steps compared
#: Largest difference of a loss from ours, as a part of it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}
OURS = "gqa_jax"


class Defaults(NamedTuple):
    size: str
    context: int
    micro_batch: int
    heads: str
    dtype: str
    attention: str | None  # None: the best here
    remat: str | None  # None: the fastest that fits
    sdpa: str | None  # None: as torch chooses
    turns: int
    steps: int


DEFAULTS = {
    "cpu": Defaults("3M", 1024, 2, "4/4", "float32", None, None, None, 7, 2),
    "gpu": Defaults("470M", 8192, 2, "8/1", "bfloat16", "cudnn", "attention_only", "flash", 5, 5),
}


class Form(NamedTuple):
    """One contender: a worker, and what is asked of it beside the case."""

    name: str
    worker: Worker
    fields: dict[str, Any]


class Failure(Exception):
    """A worker did not do what it was told. The message says which, and why."""


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1: FLOPs of a step per second, of the peak; None where no peak is known."""
    return None if peak is None else flops / seconds / peak


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest difference of two losses of the same step, as a part of ours; NaN where one is NaN."""
    differences = [abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True)]
    return max(differences) if all(x == x for x in differences) else float("nan")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, by seconds of a step in the same turns."""
    values = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def row(form: str, prepared: Mapping[str, Any], seconds: Sequence[float], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of one form.

    Args:
      prepared: its answer to "prepare".
      seconds: of a step, by turn.
      facts: our answer to "prepare": tokens and FLOPs of a step, the chip's peak.
    """
    median = statistics.median(seconds)
    return {
        "form": form,
        "seconds_step": list(seconds),
        "tokens_per_second": facts["tokens_per_step"] / median,
        "mfu_causal": mfu(facts["flops_per_step"]["causal"], median, facts["peak_flops"]),
        "mfu_full": mfu(facts["flops_per_step"]["full"], median, facts["peak_flops"]),
        "bytes_peak": prepared["bytes_peak"],
        "seconds_compile": prepared.get("seconds_lower", 0.0) + prepared["seconds_compile"],
        "versions": prepared["versions"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows that were measured, at most 80 columns wide; columns that nobody has a figure for are left out."""

    def percent(r: Mapping[str, Any]) -> str:
        return "" if r["mfu_causal"] is None else f"{100 * r['mfu_causal']:.1f}, {100 * r['mfu_full']:.1f}"

    columns = {
        "form": lambda r: r["form"],
        "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "MFU %": percent,
        "peak GB": lambda r: "" if r["bytes_peak"] is None else f"{r['bytes_peak'] / 1e9:.1f}",
        "compile s": lambda r: f"{r['seconds_compile']:.1f}",
        f"{OURS} is": lambda r: "{median:.2f}x ({low:.2f} to {high:.2f})".format(**r["ratio"]) if r.get("ratio") else "",
    }
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    measured = [r for r in rows if "tokens_per_second" in r]
    cells = {name: [cell(r) for r in measured] for name, cell in columns.items()}
    shown = [name for name in columns if any(cells[name])]
    for name in shown:
        view.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    for values in zip(*(cells[name] for name in shown), strict=True):
        view.add_row(*values)
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all was measured and the losses agree; 1: something was not, or they don't."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments)
    _require_torch(parser, options.torch_python)
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-train-"))
    console = Console()
    try:
        with contextlib.ExitStack() as stack:
            found = measure(options, folder, stack, console)
    except Failure as error:
        print(f"{error}\nwhat the workers said: {folder}", file=sys.stderr)
        return 1
    found["command"] = shlex.join(["python", "-m", "benchmarks.train", *arguments])
    report(found, console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        console.print(Text(f"wrote {options.json}"))
    if all(r["status"] == "ok" for r in found["forms"]):
        shutil.rmtree(folder)
        return 0
    console.print(Text(f"what the workers said: {folder}"))
    return 1


def make_parser() -> argparse.ArgumentParser:
    def written(d: Defaults) -> str:
        return " ".join(f"--{name} {value}" for name, value in d._asdict().items() if value is not None)

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        epilog="defaults by platform:\n" + "\n".join(f"  {name}: {written(d)}" for name, d in DEFAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--platform", choices=tuple(DEFAULTS), help="default: gpu where JAX finds one")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="a Python that has torch and transformers; default: this"
    )
    parser.add_argument("--size", choices=tuple(SIZES), help="layers and hidden size, by the paper's table")
    parser.add_argument("--context", type=_length, help="tokens of a sequence; 8K is 8192")
    parser.add_argument("--micro_batch", type=_positive, help="sequences of a step")
    parser.add_argument("--heads", type=_heads, help="query heads/key-value heads, of 64: 8/1")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="of the computation; bfloat16 is PyTorch's autocast")
    parser.add_argument("--attention", help="implementation of ours by name (gqa_jax.attention); default on CPUs: the best")
    parser.add_argument("--remat", choices=REMAT_POLICIES, help="what our backward pass computes again; default on CPUs: none")
    parser.add_argument("--sdpa", choices=("flash", "cudnn"), help="PyTorch's attention, on a GPU")
    parser.add_argument("--turns", type=_positive)
    parser.add_argument("--steps", type=_positive, help="steps of each form in a turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _length(text: str) -> int:
    scale = 1024 if text[-1:].upper() == "K" else 1
    return scale * _positive(text[:-1] if scale > 1 else text)


def _heads(text: str) -> str:
    first, _, second = text.partition("/")
    if _positive(first) % _positive(second):
        raise argparse.ArgumentTypeError(f"{text!r}: {first} query heads are not a multiple of {second} key/value heads")
    return text


def _require_torch(parser: argparse.ArgumentParser, python: str) -> None:
    question = (
        "import importlib.util as u; print(' '.join(n for n in ('torch', 'transformers', 'numpy') if not u.find_spec(n)))"
    )
    try:
        asked = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        parser.error(f"--torch_python: {error}")
    if asked.returncode:
        parser.error(f"--torch_python: {python} ends with {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    if missing := asked.stdout.split():
        parser.error(
            f"no {' and no '.join(missing)} in {python}: --torch_python PYTHON, of one that has torch and transformers"
        )


def measure(options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack, console: Console) -> dict[str, Any]:
    """All figures. Fills in the defaults of `options`. Raises Failure where ours can't be measured."""
    ours = start([sys.executable, "-m", "benchmarks.train_ours"], folder / "gqa_jax.log", options.platform)
    stack.callback(ours.close)
    about = _ask(OURS, ours, do="device")
    if options.platform is None:
        if about["platform"] not in DEFAULTS:
            raise Failure(f"PyTorch is measured on CPUs and GPUs, and JAX found a {about['platform']}: --platform cpu")
        options.platform = about["platform"]
    if about["platform"] != options.platform:
        raise Failure(f"--platform {options.platform}: JAX {about['versions']['jax']} found a {about['platform']} alone")
    for name, value in DEFAULTS[options.platform]._asdict().items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    console.print(Text(_hardware(about["device"])))
    n_heads, n_kv_heads = map(int, options.heads.split("/"))
    case = {
        "model": {"size": options.size, "n_heads": n_heads, "n_kv_heads": n_kv_heads},
        "context_length": options.context,
        "micro_batch": options.micro_batch,
        "attention": options.attention,
        "remat": options.remat,
        "dtype": options.dtype,
    }
    facts = _ask(OURS, ours, do="prepare", **case)
    weights = folder / "weights.npz"
    _ask(OURS, ours, do="weights", path=str(weights))
    theirs = {"weights": str(weights), "sdpa": options.sdpa, "autocast": "bfloat16" if options.dtype == "bfloat16" else None}
    torch_argv = [
        options.torch_python,
        "-m",
        "benchmarks.train_torch",
        "--device",
        {"gpu": "cuda"}.get(options.platform, "cpu"),
    ]
    compared = _ask(OURS, ours, do="losses", steps=LOSSES)
    forms = {"PyTorch eager": {"compile": False}, "PyTorch compiled": {"compile": True}}
    # a GPU's memory holds two of the three
    rounds = [[name] for name in forms] if options.platform == "gpu" else [list(forms)]
    ours_seconds: list[float] = []
    rows: list[dict[str, Any]] = []
    for names in rounds:
        ready, prepared, differences = {OURS: ours}, {}, {}
        with contextlib.ExitStack() as these:
            for name in names:
                worker = start(torch_argv, folder / f"{name.replace(' ', '-')}.log", options.platform)
                these.callback(worker.close)
                console.print(Text(f"preparing {name}"))
                try:
                    prepared[name] = _ask(name, worker, do="prepare", **theirs, **forms[name])
                    losses = _ask(name, worker, do="losses", steps=LOSSES)
                    if losses["tokens_sha256"] != compared["tokens_sha256"]:
                        raise Failure(f"{name}: draws other tokens than ours: another numpy")
                    if prepared[name]["parameters"] != facts["parameters"]:
                        raise Failure(f"{name}: {prepared[name]['parameters']:,} parameters, not {facts['parameters']:,}")
                except Failure as error:
                    rows.append({"form": name, "status": "failed", "reason": str(error)})
                    continue
                differences[name] = {
                    "losses": losses["losses"],
                    "loss_difference": loss_difference(compared["losses"], losses["losses"]),
                }
                ready[name] = worker
            seconds, failures = take_turns(ready, options.turns, options.steps)
        ours_seconds += seconds[OURS]
        for name in differences:
            made = {"form": name, "status": "ok"} | differences[name]
            if name in failures:
                made |= {"status": "failed", "reason": failures[name]}
            else:
                made |= row(name, prepared[name], seconds[name], facts) | {"ratio": ratios(seconds[OURS], seconds[name])}
                if not made["loss_difference"] <= TOLERANCE[options.dtype]:
                    made |= {"status": "wrong", "reason": f"its losses differ by {made['loss_difference']:.1e} of ours"}
            rows.append(made)
    mine = {"status": "ok", "losses": compared["losses"]} | row(OURS, facts, ours_seconds, facts)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(about["device"]),
        "case": case | {"size": options.size, "turns": options.turns, "steps": options.steps, "sdpa": options.sdpa},
        "prepared": facts,
        "forms": [mine, *rows],
    }


def start(argv: Sequence[str], log: Path, platform: str | None) -> Worker:
    """A worker on that platform; None: on what JAX finds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if "GLIBC_TUNABLES" not in os.environ:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # for all alike, as the launcher sets it
    if platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return Worker(argv, log, env=environment, cwd=ROOT)


def take_turns(workers: Mapping[str, Worker], turns: int, steps: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of a step of each worker in each turn, its steps following one another; why those that failed did.

    Raises Failure when ours does: there is nothing to compare with.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    failures: dict[str, str] = {}
    for _ in range(turns):
        for name, worker in workers.items():
            if name in failures:
                continue
            try:
                seconds[name] += _ask(name, worker, do="measure", steps=steps, blocked=False)["seconds"]
            except Failure as error:
                if name == OURS:
                    raise
                failures[name] = str(error)
    return seconds, failures


def _ask(name: str, worker: Worker, *, do: str, **fields: Any) -> dict[str, Any]:
    case = {} if do == "device" else {"case": CASE}
    outcome: Outcome = worker.ask({"do": do, **case, **fields}, limits=LIMITS)
    if not outcome.ok:
        raise Failure(f"{name}: {do}: {outcome.status} in phase {outcome.phase!r}: {outcome.reason}")
    return outcome.result


def _hardware(device: str) -> str:
    """The device as its framework names it; of a CPU its model, and how many of them this process may use."""
    return host.described() if device == "cpu" else device


def report(found: Mapping[str, Any], console: Console) -> None:
    """What a person reads: the case, the table, the losses, what failed."""
    case, facts, forms = found["case"], found["prepared"], found["forms"]
    model = case["model"]
    console.print(
        Text(
            f"{case['size']}, {model['n_heads']}/{model['n_kv_heads']} heads, T = {case['context_length']:,}, batch "
            f"{case['micro_batch']}, {case['dtype']}; ours: attention {facts['attention']}, remat {facts['remat']}"
        )
    )
    console.print(table(forms))
    if facts["peak_flops"] is not None:
        console.print(Text(f"MFU: attention over T/2 keys, and over T, of {facts['peak_flops'] / 1e12:,.0f} TFLOP/s"))
    for form in forms[1:]:
        if "loss_difference" in form:
            console.print(Text(f"{form['form']}: losses of {LOSSES} equal steps within {form['loss_difference']:.1e} of ours"))
        if form["status"] != "ok":
            reason = form["reason"].removeprefix(f"{form['form']}: ")
            console.print(Text(f"{form['form']}: {form['status']}: {reason}"))
    for form in forms:
        if "versions" in form:
            console.print(Text(f"{form['form']}: {', '.join(f'{name} {v}' for name, v in form['versions'].items())}"))
    if (planned := facts["planner"]) is not None:
        needed = (planned["bytes_arguments"] + planned["bytes_temporary"]) / 1e9
        console.print(Text(f"planner: a step of at least {planned['seconds_step']:.3f} s, {needed:.1f} GB"))
    console.print(Text(f"{found['date']}: {found['command']}"))


if __name__ == "__main__":
    sys.exit(main())
