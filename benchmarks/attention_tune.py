"""Tiles of kernels, tried side by side on the device at hand; the best are printed as lines of Python."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import attention_measure as measuring
from benchmarks.attention_contenders import Contender, Work
from benchmarks.attention_measure import Ceilings, Entry, Limits
from gqa_jax.attention import Case, Mask, names, unsupported_reason, xla
from gqa_jax.attention.vjp import Kernel, attend
from gqa_jax.hardware import Tiles

FINALISTS = 4
WORTHWHILE = 1.02  # less is noise, and a table that changes with every run
PRESENT = "present"
WHOLE = "options"  # the part that stands for all of them, where options have no parts


class Tunable(NamedTuple):
    """What a kernel offers to be tuned: the interface between kernels and this benchmark.

    Options are a NamedTuple. Those of its fields that are NamedTuples themselves are tiles, tuned one after the other: that
    called `forward` by the time of the forward pass, the others by that of forward and backward. Options without such fields
    are tuned as a whole, as a part called "options".
    """

    choose: Callable[[Case], Any]  # the present options
    candidates: Callable[[Case, str], Sequence[Any]]  # (case, part): values of that part worth trying
    forward: Callable  # both passes as in `vjp.Kernel`
    backward: Callable
    key: Callable[[Case, str], tuple] = lambda case, part: (case.chip, case.head_dim, part)  # of a row; its cases decide it


def tunables() -> dict[str, Tunable]:
    """By name of the implementation, of those that are registered: the one place to enter a kernel."""
    makers = {"xla": _xla, "pallas_tpu": _pallas_tpu, "pallas_gpu": _pallas_gpu, "pallas_triton": _pallas_triton}
    return {name: make() for name, make in makers.items() if name in names()}


def _xla() -> Tunable:
    def candidates(case: Case, part: str) -> list[xla.Options]:
        """Unrolled blocks while there are few of them; loops over chunks."""
        blocks = [block for block in (64, 128, 256, 512, 1024) if block <= case.length]
        chunks = [chunk for chunk in (128, 256, 512, 1024) if chunk <= case.keys]
        unrolled = [xla.Options(block, None) for block in blocks if case.length // block <= 16]
        return unrolled + [xla.Options(block, chunk) for block in blocks for chunk in chunks]

    return Tunable(
        lambda case: xla.choose(case.batch, case.length, case.n_heads),
        candidates,
        xla.forward,
        xla.backward,
        lambda case, part: (case.chip, case.head_dim, case.group, case.length),
    )


def _pallas_tpu() -> Tunable:
    from gqa_jax.attention import tpu

    def candidates(case: Case, part: str) -> list[Tiles]:
        """Neighbours of the tiles whose schedules are shortest."""
        keys = (1024, 2048, 4096) if part == "forward" else (512, 1024, 2048)
        pieces = [(256, 128, 2), (256, 256, 2), (256, 256, 4), (128, 128, 4)]
        depths = (4, 5, 6, 8) if part == "forward" else (2, 3, 4)
        return [
            Tiles(rows=rows, keys=n, strip=strip, chunk=chunk, ahead=ahead, together=together)
            for rows, n, (strip, chunk, together), ahead in itertools.product((512, 1024, 2048), keys, pieces, depths)
        ]

    return Tunable(tpu.choose, candidates, tpu.forward, tpu.backward)


def _pallas_gpu() -> Tunable:
    from gqa_jax.attention import hopper

    registers = {2: (240, 24), 3: (160, 32)}  # of a consumer's thread and of the loader's

    def choose(case: Case) -> hopper.Options:
        return hopper.choose(case.head_dim, case.length, case.group, case.batch * case.n_kv_heads)

    def candidates(case: Case, part: str) -> list[hopper.Tile]:
        splits = {1, getattr(choose(case), part).splits} if part == "dkv" else {1}
        sizes = itertools.product(registers, (64, 96, 128, 160), (2, 3, 4), sorted(splits))
        return [hopper.Tile(n, block, stages, *registers[n], split) for n, block, stages, split in sizes]

    return Tunable(choose, candidates, hopper.forward, hopper.backward)


def _pallas_triton() -> Tunable:
    from gqa_jax.attention import triton
    from gqa_jax.attention.triton import kernels

    def candidates(case: Case, part: str) -> list[triton.Tile]:
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        return [triton.Tile(*size) for size in sizes]

    return Tunable(
        lambda case: triton.choose(case.length, case.keys, case.group, case.head_dim, case.dtype),
        candidates,
        kernels.forward,
        kernels.backward,
    )


class Row(NamedTuple):
    """A line of a table of tiles: the best value of a part, and for each case that decided it what it brought."""

    key: tuple
    value: Any
    direction: str
    gains: tuple[tuple[Case, float, float], ...]  # case, median seconds, times as fast as the present options
    tried: int
    problems: tuple[str, ...]  # what failed or was wrong

    def line(self) -> str:
        gains = "; ".join(
            f"{case.n_heads}/{case.n_kv_heads} T={case.length}: {1e3 * seconds:.3g} ms, {ratio:.2f}x"
            for case, seconds, ratio in self.gains
        )
        key = ", ".join(map(json.dumps, self.key))
        what = "forward+backward" if self.direction == "backward" else self.direction
        return f"    ({key}): {self.value!r},  # best of {self.tried}, {what}: {gains}"


class Trial(NamedTuple):
    """A case with all that is tried on it, compiled and checked."""

    work: Work
    options: dict[str, Any]
    entries: list[Entry]


def tune(
    name: str, tunable: Tunable, cases: Sequence[Case], directions: Sequence[str], ceilings: Ceilings, limits: Limits
) -> list[Row | str]:
    """Rows of the fastest right tiles, the present ones unless beaten by 2% over a row's cases; or why there are none."""
    found: list[Row | str] = []
    able = []
    for case in cases:
        reason = unsupported_reason(name, case)
        if reason is None:
            able.append(case)
        else:
            found.append(f"{case.n_heads}/{case.n_kv_heads} heads of {case.head_dim}, T={case.length}: {reason}")
    best = {case: tunable.choose(case) for case in able}
    parts = _parts(next(iter(best.values()))) if best else []
    for part in parts:
        direction = "forward" if part == "forward" or "backward" not in directions else "backward"
        if direction not in directions or (part not in ("forward", WHOLE) and direction == "forward"):
            continue
        for key in dict.fromkeys(tunable.key(case, part) for case in able):
            deciding = [case for case in able if tunable.key(case, part) == key]
            found.append(_decide(key, tunable, part, direction, deciding, best, ceilings, limits))
    return found


def _parts(options: Any) -> list[str]:
    return [field for field in options._fields if hasattr(getattr(options, field), "_fields")] or [WHOLE]


def _decide(key, tunable: Tunable, part: str, direction: str, cases, best: dict, ceilings, limits) -> Row | str:
    """The row for a key; enters what it decides into `best`, for the parts that follow."""
    trials = [_prepare(tunable, part, direction, case, best[case], ceilings, limits) for case in cases]
    problems = [
        f"T={trial.work.case.length}: {entry.name}: {entry.status}: {entry.reason}"
        for trial in trials
        for entry in trial.entries
        if entry.status != "ok"
    ]
    # a few turns of all, then all turns of the best: the slower of a hundred candidates are not worth twenty
    _, ratios = _time(trials, None, ceilings, limits._replace(turns=min(3, limits.turns)))
    if not ratios:
        return f"{key}: none of {len(trials[0].options)} ran in all cases: {'; '.join(problems)}"
    finalists = {*sorted(ratios, key=lambda label: -_mean(ratios[label]))[:FINALISTS], PRESENT}
    seconds, ratios_now = _time(trials, finalists, ceilings, limits)
    winner = max(ratios_now, key=lambda label: _mean(ratios_now[label]))
    if PRESENT in ratios_now and _mean(ratios_now[winner]) < WORTHWHILE:
        winner = PRESENT
    best |= {trial.work.case: trial.options[winner] for trial in trials}
    value = _get(trials[0].options[winner], part)
    gains = tuple(zip(cases, seconds[winner], ratios_now[winner], strict=True))
    return Row(key, value, direction, gains, len(ratios), tuple(problems))


def _prepare(tunable, part: str, direction: str, case: Case, present: Any, ceilings, limits) -> Trial:
    values = dict.fromkeys(tunable.candidates(case, part))
    options = {PRESENT: present}
    for value in values:
        options[repr(value)] = value if part == WHOLE else present._replace(**{part: value})
    work = measuring.make_work(case, direction, ceilings, limits)
    contenders = [_contender(label, tunable, each) for label, each in options.items()]
    return Trial(work, options, measuring.prepare(contenders, work, limits))


def _time(trials: Sequence[Trial], labels, ceilings, limits) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Median seconds, and times as fast as the present options, in each trial, of what ran in all of them.

    Where the present options don't run, what ratios are to is the slowest that does.
    """
    results = []
    for trial in trials:
        entries = [entry for entry in trial.entries if labels is None or entry.name in labels]
        rows = measuring.time_entries(entries, trial.work, ceilings, limits, PRESENT)
        results.append({row["implementation"]: row for row in rows if row["status"] == "ok"})
    everywhere = [label for label in trials[0].options if all(label in result for result in results)]
    seconds = {label: [result[label]["median_s"] for result in results] for label in everywhere}
    ratios = {}
    for label in everywhere:
        ratios[label] = []
        for result in results:
            ratio = result[label]["ratio"]
            if ratio is None:
                ratio = max(row["median_s"] for row in result.values()) / result[label]["median_s"]
            ratios[label].append(ratio)
    return seconds, ratios


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _get(options: Any, part: str) -> Any:
    return options if part == WHOLE else getattr(options, part)


def _contender(label: str, tunable: Tunable, options: Any) -> Contender:
    def attending(case: Case):
        kernel = Kernel(tunable.forward, tunable.backward, case.head_dim**-0.5, options)

        def run(q, k, v):
            b, t, n, h = q.shape
            return attend(kernel, q.reshape(b, t, k.shape[2], n // k.shape[2], h), k, v, Mask())[0].reshape(q.shape)

        return run

    return Contender(label, lambda case: None, attending)
