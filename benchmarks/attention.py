"""Attention side by side on the device at hand: every implementation here, the kernels that jax brings, and PyTorch's.

    python -m benchmarks.attention [--torch_python PYTHON] [--lengths 4K,16K] [--heads 8/1,32/8] [--only NAME,...]
    python -m benchmarks.attention --tune [--only NAME,...]

Every contender's output, and gradients, are first compared with float32: a wrong one is reported and not timed. Then all take
turns. Shown are medians, quartiles, the median within turns of how many times as fast as the baseline each is, and TFLOP/s of
causal attention: 4 B N H (T T / 2) forward, 3.5 times that forward and backward (of the gradients of sum(out * g) to q, k, v),
beside matrix products in the same turns; for decoding GB/s beside copies. Temporary memory is the compiler's figure for one
pass, without inputs and results. Arrays are (B, T, N, H), of random normal data. What could not run is a row with its reason.
Written to --out: attention.csv, attention.png and attention.svg; a folder that has results is refused.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from benchmarks import attention_contenders, attention_measure, attention_report, attention_tune
from benchmarks.attention_measure import Ceilings, Limits
from gqa_jax import plots
from gqa_jax.attention import Case
from gqa_jax.attention.spec import target
from gqa_jax.errors import closest
from gqa_jax.formatting import read_context
from gqa_jax.hardware import host

DIRECTIONS = ("forward", "backward", "decode")


class Defaults(NamedTuple):
    lengths: str
    heads: str
    head_dims: str
    dtype: str
    batch_tokens: int  # B T, unless --batch says B
    cache_bytes: int  # of decoding's keys and values, likewise: more than caches hold
    repeats: int
    budget_s: int
    baseline: str
    sample_s: float
    longest_s: float


DEFAULTS = {
    "cpu": Defaults("512,2K", "8/1,8/8", "64", "float32", 1, 2**26, 9, 240, "jax_nn_xla", 0.03, 3.0),
    "gpu": Defaults("4K,16K", "8/1,32/8,32/32", "64,128", "bfloat16", 2**14, 2**30, 20, 450, "cudnn", 0.01, 2.0),
    "tpu": Defaults("4K,16K", "8/1,32/8,32/32", "64,128", "bfloat16", 2**14, 2**30, 20, 450, "splash", 0.01, 2.0),
}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("runs", "benchmarks", f"attention-{time.strftime('%Y%m%d-%H%M%S')}")
    if (options.out / "attention.csv").exists() and not options.tune:
        parser.error(f"--out: {options.out} has results of an earlier run: give another folder")
    # the two frameworks share a GPU's memory: neither may take most of it at the start
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platform, chip = target()[:2]
    if platform not in DEFAULTS:
        parser.error(f"no defaults for platform {platform!r}: there are {', '.join(DEFAULTS)}")
    for field, value in DEFAULTS[platform]._asdict().items():
        if getattr(options, field, None) is None:
            setattr(options, field, value)
    console = Console()
    if options.tune:
        _tune(parser, options, arguments, platform, chip)
        return
    torch = _start_torch(parser, options, platform)
    try:
        _run(parser, options, arguments, chip, torch, console)
    finally:
        if torch is not None:
            torch.close()


def make_parser() -> argparse.ArgumentParser:
    defaults = "\n".join(
        f"  {name}: --lengths {d.lengths} --heads {d.heads} --head_dims {d.head_dims} --dtype {d.dtype} --repeats {d.repeats} "
        f"--budget_s {d.budget_s} --baseline {d.baseline}"
        for name, d in DEFAULTS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        epilog=f"defaults by platform:\n{defaults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=str, help="contexts, comma-separated; 4K is 4096")
    parser.add_argument("--heads", type=str, help="query heads/key-value heads, comma-separated: 8/1,32/8")
    parser.add_argument("--head_dims", type=str, help="head sizes, comma-separated")
    parser.add_argument("--passes", default="forward,backward,decode", help="of %(default)s; backward is forward and backward")
    parser.add_argument("--dtype", choices=tuple(attention_measure.TOLERANCE))
    parser.add_argument(
        "--batch", type=_positive, help="default: 16K tokens in all on accelerators, 1 on a CPU; more to decode"
    )
    parser.add_argument("--repeats", type=_positive, help="turns; slow contenders take part in three at least")
    parser.add_argument("--only", type=str, help="names of contenders, comma-separated; default: all")
    parser.add_argument("--baseline", help="the contender that others are compared with")
    parser.add_argument("--torch_python", help="a Python that has torch; default: this one, if it has")
    parser.add_argument("--budget_s", type=_positive, help="stop after about so many seconds, and say what is missing")
    parser.add_argument("--out", type=Path, help="folder; default: runs/benchmarks/attention-TIME")
    parser.add_argument("--tune", action="store_true", help="try tiles of the kernels here and print the best as Python lines")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def read_heads(text: str) -> tuple[int, int]:
    """ "8/1" as (8, 1); ValueError on anything else."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise ValueError(f"{text!r} is not query heads/key-value heads, such as 8/1")
    if int(first) % int(second):
        raise ValueError(f"{text!r}: {first} query heads are not a multiple of {second} key/value heads")
    return int(first), int(second)


def _read_list(parser, option: str, text: str, read) -> list:
    try:
        return list(dict.fromkeys(read(part.strip()) for part in text.split(",") if part.strip()))
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"--{option}: {error}")


def _read_cases(parser, options, directions) -> list[tuple[str, Case]]:
    """Passes and cases, in the order in which they are measured: short contexts first, all passes of one shape together."""
    lengths = sorted(_read_list(parser, "lengths", options.lengths, read_context))
    heads = _read_list(parser, "heads", options.heads, read_heads)
    head_dims = _read_list(parser, "head_dims", options.head_dims, _positive)
    if not (lengths and heads and head_dims):
        parser.error("--lengths, --heads and --head_dims need a value each")
    cases = []
    for head_dim, (n_heads, n_kv_heads), direction, length in itertools.product(head_dims, heads, directions, lengths):
        one = Case.planned(
            batch=1, length=length, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, dtype=options.dtype
        )
        if direction == "decode":
            one = one._replace(length=1, aligned=False)
        if options.batch is not None:
            batch = options.batch
        elif direction == "decode":
            batch = min(512, max(1, int(options.cache_bytes / attention_measure.decode_bytes(one))))
        else:
            batch = max(1, options.batch_tokens // length)
        cases.append((direction, one._replace(batch=batch)))
    return cases


def _read_directions(parser, options) -> list[str]:
    directions = _read_list(parser, "passes", options.passes, str)
    for name in directions:
        if name not in DIRECTIONS:
            parser.error(f"--passes: {name!r} is unknown: there are {', '.join(DIRECTIONS)}")
    return [name for name in DIRECTIONS if name in directions]


def _check_names(parser, option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            torch = " (torch needs --torch_python)" if name.startswith("torch") else ""
            parser.error(f"--{option}: {name!r} is unknown: {closest(name, known)}{torch}")


def _start_torch(parser, options, platform: str):
    wanted = options.only is None or "torch" in options.only or options.baseline.startswith("torch")
    if platform == "tpu" or not wanted or not (options.torch_python or importlib.util.find_spec("torch")):
        return None
    try:
        return attention_contenders.Torch(options.torch_python or sys.executable, platform)
    except (OSError, RuntimeError) as error:
        parser.error(f"--torch_python: {error}")


def versions(platform: str, torch) -> str:
    names = ["gqa-jax", "jax", "jaxlib", "tokamax"]
    names += {"tpu": ["libtpu"], "gpu": ["jax-cuda13-plugin", "jax-cuda12-plugin"]}.get(platform, [])
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # optional
    return ", ".join(found + ([] if torch is None else [f"torch {torch.version}"]))


def _constant(arguments, platform: str, chip: str, torch) -> dict[str, str]:
    """Columns that are the same in every row."""
    device = chip if platform != "cpu" else host.described()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "versions": versions(platform, torch),
        "command": shlex.join(["python", "-m", "benchmarks.attention", *arguments]),
    }


def _limits(options) -> Limits:
    return Limits(options.repeats, options.sample_s, options.longest_s, time.perf_counter() + options.budget_s)


def _run(parser, options, arguments, chip: str, torch, console: Console) -> None:
    directions = _read_directions(parser, options)
    cases = _read_cases(parser, options, directions)
    platform = cases[0][1].platform
    both = attention_contenders.registered() + attention_contenders.peers() + ([] if torch is None else torch.contenders())
    contenders = {"forward": both, "backward": both, "decode": attention_contenders.decoders(torch)}
    known = list(dict.fromkeys(c.name for each in contenders.values() for c in each))
    only = None if options.only is None else _read_list(parser, "only", options.only, str)
    _check_names(parser, "only", only or (), known)
    _check_names(parser, "baseline", () if options.baseline == DEFAULTS[platform].baseline else (options.baseline,), known)
    chosen = {direction: [c for c in each if only is None or c.name in only] for direction, each in contenders.items()}
    # jax.nn's is the one that can decode everywhere
    decoding = options.baseline if options.baseline in [c.name for c in contenders["decode"]] else "jax_nn_xla"
    baselines = {"forward": options.baseline, "backward": options.baseline, "decode": decoding}
    constant = _constant(arguments, platform, chip, torch)
    console.print(Text(f"{constant['device']}; {constant['versions']}; {constant['date']}"))
    also = "" if decoding == options.baseline else f" (decode: {decoding})"
    console.print(Text(f"ratio: times as fast as {options.baseline}{also}, the median within turns"))
    console.print("IQR %: the middle half of the turns, of their median; temp: memory of one pass but inputs and results\n")
    limits = _limits(options)
    ceilings = Ceilings.of(platform, cases[0][1].dtype)
    rows = run(cases, chosen, ceilings, limits, baselines, constant, options.out, console)
    attention_report.print_refused(rows, console)
    title = f"causal attention, {cases[0][1].dtype}: {constant['device']}"
    attention_report.print_left_out(rows, console)
    if not any(row.get("ratio") for row in rows):
        console.print(f"no ratios: the baseline {options.baseline} was not measured")
    written = [options.out / "attention.csv"]
    figure = attention_report.picture(rows, title)
    if figure is not None:
        written += plots.save(figure, options.out / "attention")
    console.print(Text(f"wrote {', '.join(map(str, written))}"))


def run(cases, contenders, ceilings: Ceilings, limits: Limits, baselines, constant, out: Path, console: Console) -> list[dict]:
    """Measures `contenders[direction]` on each (direction, case); writes the CSV after each, prints tables as they are done."""
    rows = []
    with console.status("") as status:
        for _, group in itertools.groupby(cases, lambda x: (x[0], x[1].n_heads, x[1].n_kv_heads, x[1].head_dim)):
            first = len(rows)
            for direction, case in group:
                status.update(f"{direction}, {case.n_heads}/{case.n_kv_heads} heads of {case.head_dim}, {case.keys:,} tokens")
                rows += _measure(contenders[direction], direction, case, ceilings, limits, baselines[direction])
                attention_measure.add_backward_by_difference(rows)
                attention_report.write_csv(rows, constant, out / "attention.csv")
            attention_report.print_tables(rows[first:], console)
    return rows


def _measure(contenders, direction: str, case: Case, ceilings: Ceilings, limits: Limits, baseline: str) -> list[dict]:
    if time.perf_counter() > limits.deadline:
        names = [contender.name for contender in contenders if contender.obstacle(case) is None]
        return attention_measure.left_out(names, case, direction, "no time left")
    if not contenders:
        return []
    work = attention_measure.make_work(case, direction, ceilings, limits)
    return attention_measure.measure(contenders, work, ceilings, limits, baseline)


def _tune(parser, options, arguments, platform: str, chip: str) -> None:
    directions = [name for name in _read_directions(parser, options) if name != "decode"]
    if not directions:
        parser.error("--tune: --passes must have forward or backward")
    tunables = attention_tune.tunables()
    only = list(tunables) if options.only is None else _read_list(parser, "only", options.only, str)
    _check_names(parser, "only", only, list(tunables))
    # forward and backward have the same cases
    cases = list(dict.fromkeys(case for _, case in _read_cases(parser, options, directions)))
    constant = _constant(arguments, platform, chip, None)
    limits = _limits(options)
    ceilings = Ceilings.of(platform, cases[0].dtype)
    print(f"# {constant['device']}; {constant['versions']}; {constant['date'][:10]}\n# {constant['command']}")
    for name in only:
        print(f"# {name}", flush=True)
        shapes = itertools.groupby(cases, lambda case: case.head_dim)
        for found in (
            row for _, group in shapes for row in _tune_one(name, tunables[name], list(group), directions, ceilings, limits)
        ):
            if isinstance(found, str):
                print(f"    # {found}", flush=True)
                continue
            print(found.line(), flush=True)
            for problem in found.problems:
                print(f"    # {problem}", flush=True)


def _tune_one(name: str, tunable, cases: list[Case], directions, ceilings: Ceilings, limits: Limits) -> list:
    if time.perf_counter() > limits.deadline:
        return [f"heads of {cases[0].head_dim}: no time left; --budget_s gives more"]
    return attention_tune.tune(name, tunable, cases, directions, ceilings, limits)


if __name__ == "__main__":
    main()
