"""The loss that never holds all logits beside the plain form, on the device at hand: time and memory.

    python -m benchmarks.loss [--sizes 2K/50304/1536,512/50304/256] [--dtypes float32,bfloat16] [--passes forward,backward]

Sizes are tokens/vocabulary/hidden size. "plain" multiplies hidden states and embedding, takes log-softmax in float32 and picks;
JAX differentiates it. "chunked" is `training.loss`. Both are compared first, then take turns: shown are medians,
the middle half of the turns, and how many times as fast as plain, the median within turns and its range. Memory is the
compiler's: temporary, and in all above the inputs, results included, where the hidden states are given up to their gradient.
For --memory_sizes it is compiled only. Written to --out: loss.csv; a folder that has results is refused.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import attention, timing
from gqa_jax import errors, formatting
from gqa_jax.attention.spec import target
from gqa_jax.hardware import host
from gqa_jax.training import loss

FIELDS = (
    "date", "device", "versions", "command",
    "pass", "tokens", "vocab_size", "d_model", "dtype", "implementation", "reason",
    "turns", "median_s", "q25_s", "q75_s", "ratio", "ratio_low", "ratio_high", "temp_bytes", "above_inputs_bytes",
    "relative_error",
)  # fmt: skip

PASSES = {"forward": "forward", "backward": "forward+backward"}  # as given, and as the rows have it
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the largest gradient; logits of bfloat16 lose digits twice
DEFAULT_SIZES = {"cpu": "2K/50304/1536,2K/50304/256,512/50304/256,8K/512/256"}
LARGE_SIZES = "2K/50304/1536,16K/50304/1536,16K/131072/4096"  # on accelerators


class Case(NamedTuple):
    tokens: int
    vocab_size: int
    d_model: int
    dtype: str
    direction: str


def plain(hidden_BxTxD: jax.Array, embedding_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy with all logits in memory, float32."""
    logits_BxTxV = jnp.einsum("btd,vd->btv", hidden_BxTxD, embedding_VxD, preferred_element_type=jnp.float32)
    picked_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked_BxT)


CONTENDERS = {"plain": plain, "chunked": loss.mean_loss}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments)
    out = options.out or Path("runs", "benchmarks", f"loss-{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "loss.csv").exists():
        parser.error(f"--out: {out} has results of an earlier run: give another folder")
    platform, chip = target()[:2]
    timed = _cases(options.sizes or _read_sizes(DEFAULT_SIZES.get(platform, LARGE_SIZES)), options)
    compiled = _cases(options.memory_sizes, options)
    constant = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": chip if platform != "cpu" else host.described(),
        "versions": attention.versions(platform, None),
        "command": shlex.join(["python", "-m", "benchmarks.loss", *arguments]),
    }
    console = Console()
    console.print(Text(f"{constant['device']}; {constant['versions']}; {constant['date']}"))
    deadline = time.perf_counter() + options.budget_s
    rows: list[dict] = []
    for case in timed + compiled:
        with console.status(f"{case.direction}, {case.tokens:,} tokens, V = {case.vocab_size:,}, {case.dtype}"):
            rows += measure(case, options.repeats, deadline) if case in timed else [memory_row(case, n) for n in CONTENDERS]
        write_csv(rows, constant, out / "loss.csv")
    for _, group in itertools.groupby(rows, lambda row: (row["tokens"], row["vocab_size"], row["d_model"], row["dtype"])):
        console.print(table(list(group)))
    for row in rows:
        if row.get("reason"):
            console.print(Text(f"{row['implementation']}, {row['tokens']:,} tokens, {row['pass']}: {row['reason']}"))
    console.print(Text(f"wrote {out / 'loss.csv'}"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss",
        description=__doc__,
        epilog=f"default sizes: {DEFAULT_SIZES['cpu']} on CPUs, {LARGE_SIZES} elsewhere",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=_read_sizes, help="tokens/vocabulary/hidden size, comma-separated; 2K is 2048")
    parser.add_argument("--memory_sizes", type=_read_sizes, default="128K/50304/1536", help="compiled, not run; %(default)s")
    parser.add_argument("--dtypes", type=_one_of(DTYPES), default=",".join(DTYPES), help="of %(default)s")
    parser.add_argument(
        "--passes", type=_one_of(tuple(PASSES)), default=",".join(PASSES), help="of %(default)s; backward is both"
    )
    parser.add_argument("--repeats", type=_positive, default=7, help="turns, %(default)s; fewer where time runs out")
    parser.add_argument("--budget_s", type=_positive, default=600, help="begin no turn but first ones after so many seconds")
    parser.add_argument("--out", type=Path, help="folder; default: runs/benchmarks/loss-TIME")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown: there are {', '.join(allowed)}")
        return names

    return read


def _read_sizes(text: str) -> list[tuple[int, int, int]]:
    sizes = []
    for part in filter(None, text.split(",")):
        try:
            tokens, vocab_size, d_model = map(formatting.read_context, part.split("/"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not tokens/vocabulary/hidden size such as 2K/50304/1536") from None
        sizes.append((tokens, vocab_size, d_model))
    return sizes


def _cases(sizes: Sequence[tuple[int, int, int]], options) -> list[Case]:
    return [Case(*size, dtype, direction) for size in sizes for dtype in options.dtypes for direction in options.passes]


def measure(case: Case, repeats: int, deadline: float) -> list[dict]:
    """A row per contender; one that fails, or differs from the other, has a reason and no times."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = (
        jax.random.normal(keys[0], (1, case.tokens, case.d_model), case.dtype),
        jax.random.normal(keys[1], (case.vocab_size, case.d_model), case.dtype) / case.d_model**0.5,
        jax.random.randint(keys[2], (1, case.tokens), 0, case.vocab_size),
    )
    rows = {name: memory_row(case, name) for name in CONTENDERS}
    runs, results = {}, {}
    for name, row in rows.items():
        try:
            compiled = jax.jit(_step(name, case.direction)).lower(*arrays).compile()
            results[name] = jax.device_get(compiled(*arrays))
            runs[name] = lambda compiled=compiled: _seconds(compiled, arrays)
        except Exception as error:  # of any kind, out of memory for one: the other goes on
            row["reason"] = errors.named(error, 150)
    if len(results) == len(CONTENDERS):
        error = _difference(*results.values())
        rows["chunked"]["relative_error"] = error
        if not error < TOLERANCE[case.dtype]:
            rows["chunked"]["reason"] = f"differs from plain by {error:.1e}"
            del runs["chunked"]
    seconds, failures = timing.interleaved(runs, repeats, longest_s=np.inf, deadline=deadline)
    for name, error in failures.items():
        rows[name]["reason"] = errors.named(error, 150)
    for name, values in seconds.items():
        if values and name not in failures:
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            rows[name] |= {"turns": len(values), "median_s": median, "q25_s": low, "q75_s": high}
            if len(base := seconds.get("plain", ())) == len(values):
                ratios = np.divide(base, values)
                rows[name] |= {"ratio": np.median(ratios), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
    return list(rows.values())


def memory_row(case: Case, name: str) -> dict:
    """The row of a contender without times: its memory by the compiler."""
    tokens, vocab_size, d_model, dtype, direction = case
    shapes = ((1, tokens, d_model), dtype), ((vocab_size, d_model), dtype), ((1, tokens), "int32")
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    row = case._asdict() | {"pass": PASSES[direction], "implementation": name}
    del row["direction"]
    try:
        given_up = (0,) if direction == "backward" else ()
        used = jax.jit(_step(name, direction), donate_argnums=given_up).lower(*arrays).compile().memory_analysis()
    except Exception as error:
        return row | {"reason": errors.named(error, 150)}
    above = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return row | {"temp_bytes": used.temp_size_in_bytes, "above_inputs_bytes": above}


def _step(name: str, direction: str) -> Callable:
    contender = CONTENDERS[name]
    return jax.value_and_grad(contender, argnums=(0, 1)) if direction == "backward" else lambda *arrays: contender(*arrays)


def _seconds(compiled, arrays) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    return time.perf_counter() - begin


def _difference(a, b) -> float:
    """Largest difference of two results, each array's as a part of its largest value."""
    pairs = zip(*(map(np.float64, jax.tree.leaves(x)) for x in (a, b)), strict=True)
    return float(max(np.max(np.abs(x - y)) / np.max(np.abs(x)) for x, y in pairs))


def write_csv(rows: Sequence[dict], constant: dict[str, str], path: Path) -> None:
    """`constant` holds the columns that are the same in every row. What was not measured is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**constant, **row} for row in rows)


def table(rows: Sequence[dict]) -> Table:
    """The rows of one size and dtype, at most 80 columns wide."""
    first = rows[0]
    title = f"{first['tokens']:,} tokens, V = {first['vocab_size']:,}, D = {first['d_model']:,}, {first['dtype']}"
    view = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in ("pass", "form", "ms", "IQR %", "ratio", "temp MB", "all MB"):
        view.add_column(name, justify="left" if name in ("pass", "form") else "right", no_wrap=True)
    for row in rows:
        figures = [""] * 3
        if "median_s" in row:
            spread = (row["q75_s"] - row["q25_s"]) / row["median_s"]
            figures[:2] = f"{1e3 * row['median_s']:,.0f}", f"{100 * spread:.0f}"
        if "ratio" in row and row["implementation"] != "plain":
            figures[2] = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        memory = [f"{row[name] / 1e6:,.0f}" if name in row else "" for name in ("temp_bytes", "above_inputs_bytes")]
        view.add_row(row["pass"], row["implementation"], *figures, *memory)
    return view


if __name__ == "__main__":
    main()
