"""Contenders checked against float32, then timed in turns: rows of figures, or of reasons why there are none."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.attention_contenders import Contender, Prepared, TorchContender, Work
from gqa_jax import hardware
from gqa_jax.attention import Case, attention

#: Of a block of 128 positions: |got - wanted| / |wanted|. Right kernels stay under a third of it (rounding of what they
#: multiply: float32 too is rounded to TF32 or bfloat16 by default on accelerators); a tile of 16 left out exceeds it.
TOLERANCE = {"bfloat16": 0.03, "float16": 0.01, "float32": 0.01}
BLOCK = 128
#: Forward and backward over forward: 2 and 5 products of T x T x H, as everybody counts.
BACKWARD_FACTOR = 3.5


class Limits(NamedTuple):
    """How long things may take. Times are seconds, deadline is of `time.perf_counter`."""

    turns: int
    sample_s: float  # of a contender at 40% of the ceiling
    longest_s: float  # of one contender's samples; after that it takes part in no further turn, but in 3
    deadline: float


class Ceilings(NamedTuple):
    """What the device can do in the same turns: matrix products, and copies for decoding."""

    matmul: timing.Ceiling
    copy: timing.Ceiling

    @classmethod
    def of(cls, platform: str, dtype) -> Ceilings:
        if platform == "cpu":
            return cls(timing.matmul_ceiling(1024, dtype, 4), timing.copy_ceiling(2**26, 4))
        return cls(timing.matmul_ceiling(8192, dtype, 4), timing.copy_ceiling(2**30, 8))

    def get(self, direction: str) -> timing.Ceiling:
        return self.copy if direction == "decode" else self.matmul


def flops(case: Case, direction: str) -> float:
    """Of causal attention: half of the T x T products. Of decoding: one query against S keys."""
    if direction == "decode":
        return 4.0 * case.batch * case.n_heads * case.head_dim * case.keys
    forward = 4.0 * case.batch * case.n_heads * case.head_dim * case.length**2 / 2
    return forward * (BACKWARD_FACTOR if direction == "backward" else 1)


def decode_bytes(case: Case) -> float:
    """The cache read once, the queries read and the output written."""
    return 2.0 * case.batch * case.head_dim * (case.keys * case.n_kv_heads + case.n_heads) * jnp.dtype(case.dtype).itemsize


def make_work(case: Case, direction: str, ceilings: Ceilings, limits: Limits) -> Work:
    """Random normal data, and as many iterations in a sample as take about `limits.sample_s`."""
    b, t, s, n, k, h = case.batch, case.length, case.keys, case.n_heads, case.n_kv_heads, case.head_dim
    q = (b, n, h) if direction == "decode" else (b, t, n, h)
    shapes = [q, (b, s, k, h), (b, s, k, h), *([q] if direction == "backward" else [])]
    arrays = tuple(jax.random.normal(jax.random.key(i), shape, case.dtype) for i, shape in enumerate(shapes))
    jax.block_until_ready(arrays)
    ceiling = ceilings.get(direction)
    amount = decode_bytes(case) if direction == "decode" else flops(case, direction)
    iterations = round(0.4 * limits.sample_s * ceiling.rate(ceiling.seconds()) / amount)
    return Work(case, direction, arrays, min(256, max(1, iterations)))


def expected(work: Work, compiler_options: Mapping[str, Any] | None = None) -> tuple[jax.Array, ...]:
    """What every contender must compute: `xla`, chunked, of the same data in float32 with exact products."""

    def attend(q, k, v):
        if work.direction == "decode":
            return attention(q[:, None], k, v, implementation="xla", q_offset=work.case.keys - 1)[:, 0]
        return attention(q, k, v, implementation="xla")

    def step(q, k, v, *d_out):
        if not d_out:
            return (attend(q, k, v),)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out[0])

    with jax.default_matmul_precision("highest"):
        step = jax.jit(step, compiler_options=compiler_options)
        return jax.block_until_ready(step(*(x.astype(jnp.float32) for x in work.arrays)))


@jax.jit
def _block_error(got, wanted):
    """Largest relative error of a block of positions, which is axis 1."""
    axes = (0, *range(2, got.ndim))
    parts = []
    for x in (got.astype(jnp.float32) - wanted, wanted):
        squares = jnp.sum(x * x, axis=axes)
        parts.append(jnp.pad(squares, (0, -len(squares) % BLOCK)).reshape(-1, BLOCK).sum(axis=1))
    return jnp.max(jnp.sqrt(parts[0] / jnp.maximum(parts[1], 1e-30)))


def worst_error(outputs: Sequence[Any], wanted: Sequence[jax.Array]) -> tuple[float, str]:
    """The largest relative error and the name of the output that has it. NaN is larger than anything."""
    errors = [float(_block_error(jnp.asarray(x), y)) for x, y in zip(outputs, wanted, strict=True)]
    worst = max(range(len(errors)), key=lambda i: (np.isnan(errors[i]), errors[i]))
    return errors[worst], ("the output", "dq", "dk", "dv")[worst]


class Entry(NamedTuple):
    """A contender before it is timed; `prepared` is None unless status is "ok"."""

    name: str
    status: str  # "ok", "wrong", "failed", "refused", "left out"
    reason: str = ""
    prepared: Prepared | None = None
    error: float | None = None


def prepare(contenders: Sequence[Contender | TorchContender], work: Work, limits: Limits) -> list[Entry]:
    """Traces all, compiles them side by side, runs each once and compares what it computed. Nobody's failure is another's."""
    entries: dict[str, Entry] = {}
    lowered = {}
    for contender in contenders:
        if (obstacle := contender.obstacle(work.case)) is not None:
            entries[contender.name] = Entry(contender.name, "refused", obstacle)
            continue
        try:
            lowered[contender.name] = contender.lower(work)
        except Exception as error:  # of any kind: it is a row of the table
            entries[contender.name] = Entry(contender.name, "failed", explain(error))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        compiling = {c.name: pool.submit(c.compile, lowered.pop(c.name)) for c in contenders if c.name in lowered}
        wanted = expected(work) if compiling else ()
    for contender in contenders:
        if contender.name in compiling:
            entries[contender.name] = _start(contender, work, compiling.pop(contender.name), wanted, limits)
    return [entries[contender.name] for contender in contenders]


def _start(contender, work: Work, compiling, wanted, limits: Limits) -> Entry:
    if time.perf_counter() > limits.deadline:
        return Entry(contender.name, "left out", "no time left")
    try:
        prepared = contender.start(work, compiling.result())
        error, where = worst_error(prepared.outputs, wanted)
    except Exception as problem:  # of any kind: it is a row of the table
        return Entry(contender.name, "failed", explain(problem))
    prepared = prepared._replace(outputs=())
    if not error <= TOLERANCE[str(work.case.dtype)]:
        return Entry(contender.name, "wrong", f"{where} is off by {error:.2g}, relatively", error=error)
    return Entry(contender.name, "ok", prepared.remark, prepared, error)


def explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:300]}" if text else kind


def measure(
    contenders: Sequence[Contender | TorchContender], work: Work, ceilings: Ceilings, limits: Limits, baseline: str | None
) -> list[dict]:
    """One row for each contender; a figure that was not measured is None."""
    return time_entries(prepare(contenders, work, limits), work, ceilings, limits, baseline)


def time_entries(entries: Sequence[Entry], work: Work, ceilings: Ceilings, limits: Limits, baseline: str | None) -> list[dict]:
    """Rows of what `prepare` returned, after turns of all that are ready, and the ceiling in every turn."""
    ceiling = ceilings.get(work.direction)
    runs = {entry.name: entry.prepared.run for entry in entries if entry.prepared is not None}
    seconds, failures = timing.interleaved(
        {"": ceiling.seconds, **runs}, limits.turns, longest_s=limits.longest_s, deadline=limits.deadline
    )
    top = ceiling.rate(statistics.median(seconds.pop("")))
    rows = []
    for entry in entries:
        row = _row(entry, work, top)
        if entry.name in failures:
            row |= {"status": "failed", "reason": explain(failures[entry.name])}
        elif entry.prepared is not None:
            row |= _figures(seconds[entry.name], seconds.get(baseline), work, top) | {"baseline": baseline}
        rows.append(row)
    return rows


def left_out(names: Sequence[str], case: Case, direction: str, reason: str) -> list[dict]:
    work = Work(case, direction, (), 0)
    return [_row(Entry(name, "left out", reason), work, None) for name in names]


def _row(entry: Entry, work: Work, top: float | None) -> dict:
    case, decode = work.case, work.direction == "decode"
    return {
        "pass": "forward+backward" if work.direction == "backward" else work.direction,
        "batch": case.batch,
        "length": case.keys,
        "n_heads": case.n_heads,
        "n_kv_heads": case.n_kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype),
        "implementation": entry.name,
        "status": entry.status,
        "reason": entry.reason,
        "matmul_tflops": None if top is None or decode else top / 1e12,
        "copy_gb_s": top / 1e9 if top is not None and decode else None,
        "relative_error": entry.error,
        "temp_bytes": entry.prepared.temp_bytes if entry.prepared is not None else None,
    }


def _figures(seconds: list[float], baseline: list[float] | None, work: Work, top: float) -> dict:
    median = statistics.median(seconds)
    low, high = np.percentile(seconds, (25, 75))
    decode = work.direction == "decode"
    amount = decode_bytes(work.case) if decode else flops(work.case, work.direction)
    peak = None if decode or str(work.case.dtype) != "bfloat16" else hardware.peak_flops(work.case.chip)
    # within turns: both met the same neighbours and the same clocks
    ratio = statistics.median(b / s for b, s in zip(baseline, seconds, strict=False)) if baseline else None
    return {
        "turns": len(seconds),
        "iterations": work.iterations,
        "median_s": median,
        "q25_s": float(low),
        "q75_s": float(high),
        "ratio": ratio,
        "tflops": None if decode else amount / median / 1e12,
        "gb_s": amount / median / 1e9 if decode else None,
        "percent_of_ceiling": 100 * amount / median / top,
        "percent_of_peak": None if peak is None else 100 * amount / median / peak,
    }


def add_backward_by_difference(rows: Sequence[dict]) -> None:
    """Fills `backward_by_difference_s` of forward+backward rows whose forward pass was measured too."""
    keys = ("batch", "length", "n_heads", "n_kv_heads", "head_dim", "dtype", "implementation")
    forward = {tuple(row[key] for key in keys): row.get("median_s") for row in rows if row["pass"] == "forward"}
    for row in rows:
        alone = forward.get(tuple(row[key] for key in keys))
        if row["pass"] == "forward+backward" and row.get("median_s") is not None and alone is not None:
            row["backward_by_difference_s"] = row["median_s"] - alone
